//! The driver: carries out what the schedule asks for and feeds back what happened.
//!
//! Each vertex runs on a thread of its own: look the key up, else do the work, then keep a record. One thread (the
//! caller's) owns the schedule. A vertex depends on the *content* of its inputs, so one that ran again and gave the same
//! content leaves everything after it cached.

use crate::context::ContextError;
use crate::leak::{Leak, LeakStream};
use crate::op::file::{Download, FileOp, LocalContext, Recipe, Value, digest_uncached};
use crate::op::git::{self, GitError};
use crate::op::run::{self, Host, RunError};
use crate::op::source::{ResolvedImage, SourceError, resolve_image};
use crate::op::unpacked::UnpackError;
use crate::plan::cache_key::{Key, Parts};
use crate::plan::explain::{self, Reason};
use crate::plan::schedule::{self, Command, Schedule};
use crate::registry::http::http_get;
pub use crate::sandbox::Stream;
use crate::sandbox::{Cancel, SandboxError};
use crate::snapshot::{Layer, Made, Snapshot, SnapshotError, Workspace};
use crate::store::StoreError;
use crate::store::record::{Part, Record};
use crate::tree::{Kind, LayerId, Tree, index};
use nacre_frontend::llb::{Definition, ImageSource, Op, Platform, Source, Vertex, VertexId};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The part of a key that stands for the file system that a step changes.
const PARENT: &str = "content below";
/// Lines of a failed step's output that its error repeats.
const TAIL_LINES: usize = 20;
/// A line longer than this is cut in the error; the log keeps it whole.
const TAIL_LINE_BYTES: usize = 2000;

/// Something that a display may show. Vertices are numbered as in the definition.
#[derive(Debug, Clone)]
pub enum Event {
    /// The graph is known.
    Planned {
        /// All its vertices.
        vertices: Vec<VertexInfo>,
    },
    /// A vertex begins to run: its result was not in the cache.
    Started {
        /// Which.
        id: usize,
    },
    /// A vertex has its result from the cache.
    Cached {
        /// Which.
        id: usize,
    },
    /// Output of a step.
    Log {
        /// Which.
        id: usize,
        /// Standard output or standard error.
        stream: Stream,
        /// Bytes as they came; may end in the middle of a line.
        data: Vec<u8>,
    },
    /// Bytes that come or go over a network.
    Transfer {
        /// For which vertex.
        id: Option<usize>,
        /// Name to show.
        what: String,
        /// So far.
        done_bytes: u64,
        /// In all, if known.
        total_bytes: Option<u64>,
    },
    /// Why a vertex ran.
    Explained {
        /// Which.
        id: usize,
        /// In words: `package.json changed`.
        reason: String,
    },
    /// A vertex has its result.
    Finished {
        /// Which.
        id: usize,
        /// From its start.
        duration: Duration,
    },
    /// A vertex failed.
    Failed {
        /// Which.
        id: usize,
        /// Why, on one line.
        message: String,
    },
    /// A vertex will not run.
    Canceled {
        /// Which.
        id: usize,
    },
    /// The build context or the Dockerfile begins to be fetched.
    Loading {
        /// Which.
        what: String,
    },
    /// It is there.
    Loaded {
        /// Which.
        what: String,
        /// How long it took.
        duration: Duration,
    },
    /// An output begins to be written.
    Exporting {
        /// Which.
        what: String,
    },
    /// An output is written.
    Exported {
        /// Which.
        what: String,
        /// How long it took.
        duration: Duration,
    },
    /// Something that a build check found in the Dockerfile.
    Check {
        /// Name of the rule.
        rule: &'static str,
        /// What it found, in words.
        message: String,
        /// Page about the rule.
        url: String,
        /// Name of the file.
        file: String,
        /// Line, counted from 1.
        line: u32,
        /// Column, counted from 1.
        column: u32,
    },
    /// Something the user should know.
    Warning {
        /// In words.
        message: String,
    },
}

/// A vertex as a display names it.
#[derive(Debug, Clone)]
pub struct VertexInfo {
    /// Number in the definition.
    pub id: usize,
    /// `[builder 2/5] RUN make`.
    pub name: String,
    /// Its stage.
    pub stage: String,
}

/// A step of the graph failed; the build ends.
#[derive(Debug, thiserror::Error)]
pub enum SolveError {
    /// A vertex failed.
    #[error("{text}: {source}")]
    Vertex {
        /// Its number.
        id: usize,
        /// Name to show: `[builder 2/5] RUN make`.
        name: String,
        /// Its stage.
        stage: String,
        /// The instruction.
        text: String,
        /// Lines in the Dockerfile.
        lines: Option<(u32, u32)>,
        /// Last lines of its output.
        tail: Vec<String>,
        /// Where all of its output is.
        log: Option<PathBuf>,
        /// Why.
        source: Box<VertexError>,
    },
    /// The files of a context could not be made an image.
    #[error(transparent)]
    Result {
        /// Why.
        source: Box<VertexError>,
    },
    /// Told to stop.
    #[error("interrupted")]
    Interrupted,
}

/// Why a vertex failed.
#[derive(Debug, thiserror::Error)]
pub enum VertexError {
    /// RUN.
    #[error(transparent)]
    Run(#[from] RunError),
    /// A source.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A copy, or a layer that could not be had.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A context.
    #[error(transparent)]
    Context(#[from] ContextError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A context that the request did not bring.
    #[error("no build context named `{0}`")]
    NoContext(String),
    /// A git repository.
    #[error(transparent)]
    Git(#[from] GitError),
    /// A download that serves as a context.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    /// A secret is where it must not be.
    #[error(transparent)]
    Leak(#[from] Leak),
    /// A fault of ours.
    #[error("internal error: {0}")]
    Panic(String),
}

impl VertexError {
    /// A way out, one sentence.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Run(error) => error.help(),
            Self::Source(error) | Self::Snapshot(SnapshotError::Source(error)) => error.help(),
            Self::Snapshot(SnapshotError::Copy(error)) => error.help(),
            Self::Git(error) => error.help().map(str::to_owned),
            Self::Leak(_) => Some(
                "keep it out: use it in the step that mounts it, and remove what the step wrote of it; \
                 --allow-secret-leak turns this check off"
                    .to_owned(),
            ),
            Self::Snapshot(SnapshotError::Changed { .. }) => Some("build again when nothing writes to it".to_owned()),
            Self::NoContext(name) => Some(format!("give it with `--build-context {name}=DIRECTORY`")),
            _ => None,
        }
    }
}

/// What a build is given besides its graph.
pub struct Request {
    /// Directories by name; `context` is the build context.
    pub contexts: BTreeMap<String, Arc<LocalContext>>,
    /// Images resolved for the graph's sources.
    pub images: BTreeMap<(ImageSource, Platform), Arc<ResolvedImage>>,
    /// What steps are given.
    pub host: Host,
    /// How git is called.
    pub git: git::Settings,
    /// Tells one project's steps from another's when a miss is explained: paths of context and Dockerfile.
    pub project: String,
}

struct Build<'a> {
    definition: &'a Definition,
    workspace: &'a Workspace,
    request: &'a Request,
    cancel: &'a Cancel,
    events: &'a (dyn Fn(Event) + Sync),
    values: Vec<OnceLock<Value>>,
    turns: Mutex<HashMap<String, Arc<Mutex<()>>>>,
    now: (i64, u32),
}

/// Carries out a graph; returns the snapshot of its image. `events` is told what happens, from several threads.
pub fn solve(
    definition: &Definition,
    workspace: &Workspace,
    request: &Request,
    cancel: &Cancel,
    events: &(dyn Fn(Event) + Sync),
) -> Result<Snapshot, SolveError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let build = Build {
        definition,
        workspace,
        request,
        cancel,
        events,
        values: definition.vertices.iter().map(|_| OnceLock::new()).collect(),
        turns: Mutex::default(),
        now: (i64::try_from(now.as_secs()).unwrap_or(i64::MAX), now.subsec_nanos()),
    };
    let info =
        |(id, vertex): (usize, &Vertex)| VertexInfo { id, name: vertex.name.clone(), stage: vertex.stage.clone() };
    build.tell(Event::Planned { vertices: definition.vertices.iter().enumerate().map(info).collect() });
    build.drive()?;
    build.result().map_err(|source| SolveError::Result { source: Box::new(source) })
}

impl Build<'_> {
    fn tell(&self, event: Event) {
        (self.events)(event);
    }

    /// The image's snapshot; `FROM` a context makes one of its files.
    fn result(&self) -> Result<Snapshot, VertexError> {
        self.rootfs(&[self.definition.image.top.and_then(|top| self.values[top.0].get()).cloned()])
    }

    fn drive(&self) -> Result<(), SolveError> {
        let mut schedule = Schedule::new(self.definition);
        let (reports, inbox) = mpsc::channel::<(VertexId, Result<Value, SolveError>)>();
        let mut failure = None;
        std::thread::scope(|scope| {
            let mut commands: VecDeque<Command> = schedule.step(schedule::Event::Begin).into();
            let mut interrupted = false;
            loop {
                while let Some(command) = commands.pop_front() {
                    match command {
                        Command::Start(vertex) => {
                            let reports = reports.clone();
                            scope.spawn(move || {
                                let _ = reports.send((vertex, self.carry_out(vertex)));
                            });
                        }
                        Command::Stop => self.cancel.cancel(),
                        Command::Cancelled(vertex) => self.tell(Event::Canceled { id: vertex.0 }),
                        Command::Finish => return,
                    }
                }
                let event = match inbox.recv_timeout(Duration::from_millis(50)) {
                    Ok((vertex, Ok(value))) => {
                        let _ = self.values[vertex.0].set(value);
                        schedule::Event::Done(vertex)
                    }
                    Ok((vertex, Err(error))) => {
                        failure.get_or_insert(error);
                        schedule::Event::Failed(vertex)
                    }
                    Err(_) if self.cancel.is_cancelled() && !interrupted => {
                        interrupted = true;
                        schedule::Event::Interrupt
                    }
                    Err(_) => continue,
                };
                commands.extend(schedule.step(event));
            }
        });
        match failure {
            Some(error) => Err(error),
            None if self.cancel.is_cancelled() => Err(SolveError::Interrupted),
            None => Ok(()),
        }
    }

    /// One vertex from look-up to record. A panic in it is a failed step, not a lost build.
    fn carry_out(&self, id: VertexId) -> Result<Value, SolveError> {
        let vertex = &self.definition.vertices[id.0];
        let mut log = StepLog::default();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.value(id, vertex, &mut log)))
            .unwrap_or_else(|panic| {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
                Err(VertexError::Panic(text.unwrap_or_default()))
            });
        result.map_err(|source| {
            let told = matches!(
                source,
                VertexError::Run(RunError::Interrupted | RunError::Sandbox(SandboxError::Cancelled))
                    | VertexError::Git(GitError::Interrupted)
            );
            if told {
                self.tell(Event::Canceled { id: id.0 });
                return SolveError::Interrupted;
            }
            self.tell(Event::Failed { id: id.0, message: source.to_string() });
            SolveError::Vertex {
                id: id.0,
                name: vertex.name.clone(),
                stage: vertex.stage.clone(),
                text: vertex.text.clone(),
                lines: vertex.lines,
                tail: log.tail(),
                log: log.path.take(),
                source: Box::new(source),
            }
        })
    }

    fn value(&self, id: VertexId, vertex: &Vertex, log: &mut StepLog) -> Result<Value, VertexError> {
        let inputs: Vec<Option<Value>> =
            vertex.inputs.iter().map(|input| input.and_then(|input| self.values[input.0].get().cloned())).collect();
        match &vertex.op {
            Op::Source(source) => self.source(id, vertex, source, log),
            Op::Run(op) => self.run(id, vertex, op, &inputs, log).map(Value::Snapshot),
            Op::Copy(op) => self.file(id, vertex, FileOp::Copy(op.clone()), inputs).map(Value::Snapshot),
            Op::Mkdir(op) => self.file(id, vertex, FileOp::Mkdir(op.clone()), inputs).map(Value::Snapshot),
        }
    }

    fn source(&self, id: VertexId, vertex: &Vertex, source: &Source, log: &mut StepLog) -> Result<Value, VertexError> {
        let started = Instant::now();
        let value = match source {
            Source::Image(source) => {
                let image = self.request.images.get(&(source.clone(), vertex.platform.clone()));
                // Images that are only copied from are not asked for before the graph is known.
                let image = match image {
                    Some(found) => found.clone(),
                    None => Arc::new(resolve_image(source, &vertex.platform, &self.workspace.sources)?),
                };
                self.tell(Event::Cached { id: id.0 });
                return Ok(Value::Snapshot(self.workspace.image(&image)));
            }
            Source::Local { name } => {
                let local = self.request.contexts.get(name).ok_or_else(|| VertexError::NoContext(name.clone()))?;
                local.tree()?;
                // Nothing is copied: a context is read in place, by the steps that want something of it.
                self.tell(Event::Cached { id: id.0 });
                return Ok(Value::Context(local.clone()));
            }
            Source::Http { url, checksum } => {
                self.tell(Event::Started { id: id.0 });
                let sources = &self.workspace.sources;
                let fetched =
                    http_get(&self.workspace.store, &sources.client, url, checksum.as_deref(), sources.offline)
                        .map_err(SourceError::from)?;
                Value::File(Arc::new(Download::new(fetched, self.now)))
            }
            Source::Git { remote, reference, subdir, keep_git_dir, checksum, submodules } => {
                self.tell(Event::Started { id: id.0 });
                let request = git::Request {
                    remote,
                    reference,
                    subdir,
                    keep_git_dir: *keep_git_dir,
                    checksum: checksum.as_deref(),
                    submodules: *submodules,
                };
                let mut news = |line: &str| {
                    let data = format!("{line}\n").into_bytes();
                    log.write(&data);
                    self.tell(Event::Log { id: id.0, stream: Stream::Stderr, data });
                };
                let stop = || self.cancel.is_cancelled();
                let found = git::checkout(&self.workspace.store, &request, &self.request.git, &stop, &mut news)?;
                Value::Checkout(found.tree)
            }
        };
        self.tell(Event::Finished { id: id.0, duration: started.elapsed() });
        Ok(value)
    }

    fn parent(inputs: &[Option<Value>]) -> Option<&Value> {
        inputs.first().and_then(Option::as_ref)
    }

    /// The snapshot a step changes; a context may stand where an image is expected.
    fn rootfs(&self, inputs: &[Option<Value>]) -> Result<Snapshot, VertexError> {
        let tree = match Self::parent(inputs) {
            None => return Ok(Snapshot::scratch()),
            Some(Value::Snapshot(snapshot)) => return Ok(snapshot.clone()),
            Some(Value::File(file)) => Tree::clone(&*file.tree(&self.workspace.store)?),
            Some(Value::Context(local)) => {
                let mut tree = Tree::clone(&*local.tree()?);
                local.digest(tree.nodes_mut())?;
                tree
            }
            Some(Value::Checkout(tree)) => {
                let mut tree = Tree::clone(tree);
                digest_uncached(tree.nodes_mut())?;
                tree
            }
        };
        let content = index::content_key(&tree);
        let id = self.workspace.store.put_layer(&tree)?;
        let layer = self.workspace.layer(id, Made::Step(None), Some(Arc::new(tree)));
        Ok(Snapshot::scratch().with(layer, &content, Some(self.now.0)))
    }

    /// Held by whoever looks for, or makes, the result of a key.
    fn turn(&self, key: &Key) -> Arc<Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.entry(key.hex()).or_default().clone()
    }

    /// The step's name in the key is the same whatever it stands on: a predecessor that is written in another way and
    /// gives the same content changes nothing.
    fn add_parent(parts: &mut Parts, parent: &Snapshot) {
        parts.add(PARENT, parent.content().hex());
    }

    /// What a difference in the parent's content is called.
    fn parent_name(&self, id: VertexId) -> String {
        let input = self.definition.vertices[id.0].inputs.first().copied().flatten();
        match input.map(|input| &self.definition.vertices[input.0]) {
            None => "content of scratch".to_owned(),
            Some(Vertex { op: Op::Source(Source::Image(_)), text, .. }) => {
                format!("content of image {}", text.trim_start_matches("FROM "))
            }
            Some(before) => format!("content of {}", before.text),
        }
    }

    fn steps(&self, id: VertexId, vertex: &Vertex) -> [String; 2] {
        let same_stage =
            self.definition.vertices[..id.0].iter().filter(|other| other.stage == vertex.stage).count().to_string();
        let step = |kind: &str, what: &str| {
            let mut parts = Parts::default();
            parts.add("project", &self.request.project);
            parts.add("platform", vertex.platform.to_string());
            parts.add("stage", &vertex.stage);
            parts.add(kind, what);
            parts.key().hex()
        };
        [step("text", &vertex.text), step("position", &same_stage)]
    }

    /// The snapshot a record stands for, if its layer can still be had.
    fn look_up(&self, key: &Key, parent: &Snapshot, recipe: Option<&Recipe>) -> Result<Snapshot, Reason> {
        let record = self.workspace.store.get_record(&key.hex()).ok().flatten().ok_or(Reason::FirstBuild)?;
        let content = Key::from_hex(&record.content_key);
        let (Some(id), Some(content)) = (record.layer, content) else { return Err(Reason::FirstBuild) };
        if !self.workspace.is_whole(&id, recipe.is_some()) {
            return Err(Reason::ResultGone);
        }
        let layer = self.workspace.layer(id, Made::Step(recipe.cloned()), None);
        Ok(parent.with(layer, &content.0, Some(record.created)))
    }

    fn explain(&self, id: VertexId, reason: Reason, steps: &[String; 2], parts: &Parts, selection: Option<&Tree>) {
        let store = &self.workspace.store;
        // What stood in this place before is only of use when it was a step of this kind.
        let op = parts.0.iter().find(|(name, _)| name == "op").map(|(_, value)| value);
        let alike = |record: &Record| record.parts.iter().find(|part| part.name == "op").map(|part| &part.value) == op;
        let last = || steps.iter().find_map(|step| store.last_record_of_step(step).ok().flatten().filter(alike));
        let reason = match reason {
            Reason::FirstBuild => match last() {
                None => Reason::FirstBuild,
                Some(record) => {
                    let old: Vec<(String, String)> =
                        record.parts.iter().map(|part| (part.name.clone(), part.value.clone())).collect();
                    let mut differences = parts.differences(&old);
                    differences.retain(|difference| difference.part != "arguments" || differences_only(&old, parts));
                    for difference in differences.iter_mut().filter(|difference| difference.part == PARENT) {
                        difference.part = self.parent_name(id);
                    }
                    let files = differences.iter().any(|difference| difference.part == "files");
                    differences.retain(|difference| difference.part != "files");
                    let layer = record.layer.as_ref().and_then(|layer| store.layer(layer).ok());
                    match (files, selection, layer) {
                        (true, Some(new), Some(old)) => {
                            let mut names = explain::changed_files(&old, new);
                            if names.is_empty() {
                                names.push("selected files changed".to_owned());
                            }
                            Reason::Files(names)
                        }
                        _ => Reason::Changed(differences),
                    }
                }
            },
            other => other,
        };
        self.tell(Event::Explained { id: id.0, reason: reason.to_string() });
    }

    fn keep(
        &self,
        key: &Key,
        steps: &[String; 2],
        parts: Parts,
        layer: &LayerId,
        content: &[u8; 32],
        started: Instant,
    ) -> Result<(), StoreError> {
        let record = Record {
            version: crate::store::record::RECORD_VERSION,
            key: key.hex(),
            steps: steps.to_vec(),
            parts: parts.0.into_iter().map(|(name, value)| Part { name, value }).collect(),
            layer: Some(layer.clone()),
            content_key: Key(*content).hex(),
            created: self.now.0,
            duration_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
            extra: BTreeMap::new(),
        };
        self.workspace.store.put_record(&record)
    }

    fn file(
        &self,
        id: VertexId,
        vertex: &Vertex,
        op: FileOp,
        inputs: Vec<Option<Value>>,
    ) -> Result<Snapshot, VertexError> {
        let started = Instant::now();
        let parent = self.rootfs(&inputs)?;
        let recipe = Recipe { op, parent: parent.clone(), inputs, now: self.now };
        let (mut parts, selection) = recipe.parts(self.workspace)?;
        parts.add("platform", vertex.platform.to_string());
        Self::add_parent(&mut parts, &parent);
        let (key, steps) = (parts.key(), self.steps(id, vertex));
        let reason = match vertex.ignore_cache {
            true => Reason::CacheOff,
            false => match self.look_up(&key, &parent, Some(&recipe)) {
                Ok(snapshot) => {
                    self.tell(Event::Cached { id: id.0 });
                    return Ok(snapshot);
                }
                Err(reason) => reason,
            },
        };
        self.tell(Event::Started { id: id.0 });
        self.explain(id, reason, &steps, &parts, selection.as_ref());
        let tree = recipe.carry_out(self.workspace)?;
        self.check_for_secrets(&tree)?;
        let content = index::content_key(&tree);
        let layer_id = self.workspace.store.put_layer(&tree)?;
        let layer = self.workspace.layer(layer_id, Made::Step(Some(recipe)), Some(Arc::new(tree)));
        self.keep(&key, &steps, parts, layer.id(), &content, started)?;
        self.tell(Event::Finished { id: id.0, duration: started.elapsed() });
        Ok(parent.with(layer, &content, Some(self.now.0)))
    }

    /// Looks for secrets in the names, links, attributes and files of a new layer.
    fn check_for_secrets(&self, tree: &Tree) -> Result<(), VertexError> {
        let Some(leaks) = &self.request.host.leaks else { return Ok(()) };
        self.workspace.prepare(tree)?;
        for node in tree.nodes() {
            let entry = &node.entry;
            let path = || format!("/{}", String::from_utf8_lossy(&entry.path));
            leaks.check(&entry.path, || "the name of a file".to_owned())?;
            if let Kind::Symlink { target } = &entry.kind {
                leaks.check(target, path)?;
            }
            entry.xattrs.values().try_for_each(|value| leaks.check(value, path))?;
            if entry.is_file() {
                let read = |source| SnapshotError::Read { path: path(), source };
                let mut file = self.workspace.open(node).map_err(read)?;
                leaks.check_reader(&mut file, path).map_err(read)??;
            }
        }
        Ok(())
    }

    fn run(
        &self,
        id: VertexId,
        vertex: &Vertex,
        op: &nacre_frontend::llb::RunOp,
        inputs: &[Option<Value>],
        log: &mut StepLog,
    ) -> Result<Snapshot, VertexError> {
        let started = Instant::now();
        let parent = self.rootfs(inputs)?;
        let mut inputs = inputs.to_vec();
        if let Some(first) = inputs.first_mut() {
            *first = Some(Value::Snapshot(parent.clone()));
        }
        let mut parts = run::parts(self.workspace, vertex, op, &inputs)?;
        Self::add_parent(&mut parts, &parent);
        let (key, steps) = (parts.key(), self.steps(id, vertex));
        // Of equal steps in two stages one runs, and the other takes its result.
        let turn = self.turn(&key);
        let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        let reason = match vertex.ignore_cache {
            true => Reason::CacheOff,
            false => match self.look_up(&key, &parent, None) {
                Ok(snapshot) => {
                    self.tell(Event::Cached { id: id.0 });
                    return Ok(snapshot);
                }
                Err(reason) => reason,
            },
        };
        if self.cancel.is_cancelled() {
            return Err(RunError::Interrupted.into());
        }
        self.tell(Event::Started { id: id.0 });
        self.explain(id, reason, &steps, &parts, None);
        log.path = Some(self.workspace.store.part("logs").join(key.hex()));
        let leaks = self.request.host.leaks.as_deref();
        // Each stream by itself: pieces of the two come in any order.
        let mut streams = leaks.map(|leaks| [LeakStream::new(leaks), LeakStream::new(leaks)]);
        let mut leaked = None;
        let mut output = |stream: Stream, data: &[u8]| {
            if let (Some(streams), None) = (&mut streams, &leaked) {
                leaked = streams[usize::from(stream == Stream::Stderr)].push(data);
            }
            log.write(data);
            self.tell(Event::Log { id: id.0, stream, data: data.to_vec() });
        };
        let ran = run::execute(self.workspace, op, &inputs, &self.request.host, self.cancel, &mut output);
        if let Some((secret, form)) = leaked {
            log.forget();
            return Err(Leak { secret, place: "what the step printed".to_owned(), form }.into());
        }
        let ran = ran?;
        self.check_for_secrets(&ran.changes)?;
        let content = index::content_key(&ran.changes);
        let snapshot_key = parent.content().stacked(&content);
        // The same content as an earlier run on the same content: that layer stays, so that the image's bytes do too.
        let earlier = self.workspace.store.layer_by_content(&snapshot_key.0);
        let layer = match earlier.filter(|id| self.workspace.is_whole(id, false)) {
            Some(id) => self.workspace.layer(id, Made::Step(None), None),
            None => {
                let id = self.workspace.store.put_layer(&ran.changes)?;
                self.workspace.store.adopt_upper(&ran.upper, &id)?;
                self.workspace.store.set_layer_by_content(&snapshot_key.0, &id)?;
                self.workspace.layer(id, Made::Step(None), None)
            }
        };
        self.keep(&key, &steps, parts, layer.id(), &content, started)?;
        self.tell(Event::Finished { id: id.0, duration: started.elapsed() });
        Ok(parent.with(layer, &content, Some(self.now.0)))
    }
}

/// `arguments` repeats `command` word by word: it is told only when it is all that differs.
fn differences_only(old: &[(String, String)], parts: &Parts) -> bool {
    let command = |parts: &[(String, String)]| parts.iter().find(|(name, _)| name == "command").cloned();
    command(old) == command(&parts.0)
}

/// Output of a step: all of it to a file, the last lines in memory.
#[derive(Default)]
struct StepLog {
    path: Option<PathBuf>,
    file: Option<std::fs::File>,
    lines: VecDeque<Vec<u8>>,
    open_line: Vec<u8>,
}

impl StepLog {
    fn write(&mut self, data: &[u8]) {
        if self.file.is_none() {
            self.file = self.path.as_ref().and_then(|path| std::fs::File::create(path).ok());
        }
        if let Some(file) = &mut self.file {
            // A log that cannot be written must not end the step; its tail is still in memory.
            let _ = file.write_all(data);
        }
        for &byte in data {
            if byte == b'\n' {
                self.lines.push_back(std::mem::take(&mut self.open_line));
                if self.lines.len() > TAIL_LINES {
                    self.lines.pop_front();
                }
            } else if self.open_line.len() < TAIL_LINE_BYTES {
                self.open_line.push(byte);
            }
        }
    }

    /// Removes what was written: it holds what nobody may see.
    fn forget(&mut self) {
        self.file = None;
        if let Some(path) = self.path.take() {
            // Nothing was printed, or the file could not be made.
            let _ = std::fs::remove_file(path);
        }
        self.lines.clear();
        self.open_line.clear();
    }

    fn tail(&mut self) -> Vec<String> {
        if !self.open_line.is_empty() {
            self.lines.push_back(std::mem::take(&mut self.open_line));
        }
        self.lines.iter().map(|line| String::from_utf8_lossy(line).into_owned()).collect()
    }
}

/// A layer of a snapshot, for exports.
pub type SnapshotLayer = Layer;
