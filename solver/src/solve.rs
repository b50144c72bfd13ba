//! The driver: carries out what the schedule asks for and feeds back what happened.
//!
//! Each vertex runs on a thread of its own: look the key up, else do the work, then keep a record. One thread (the
//! caller's) owns the schedule. A vertex depends on the *content* of its inputs, so one that ran again and gave the same
//! content leaves everything after it cached.

mod lookup;
mod step;

use crate::cache::export::StepResult;
use crate::context::ContextError;
use crate::export::PlannedArchive;
use crate::leak::Leak;
use crate::op::file::{Download, FileOp, LocalContext, Value, digest_uncached};
use crate::op::git::{self, GitError};
use crate::op::run::{Host, RunError};
use crate::op::source::{ResolvedImage, SourceError, resolve_image};
use crate::op::unpacked::UnpackError;
use crate::plan::schedule::{self, Command, Schedule};
use crate::registry::http::http_get;
pub use crate::sandbox::Stream;
use crate::sandbox::{Cancel, SandboxError};
use crate::snapshot::{Compression, Layer, Made, Snapshot, SnapshotError, Workspace};
use crate::store::StoreError;
use crate::tree::{LayerId, Tree, index};
use nacre_frontend::llb::{Definition, ImageSource, Op, Platform, Source, Vertex, VertexId};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock, mpsc};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

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
    /// What came over the network in all.
    Traffic {
        /// Bytes of answers' bodies.
        received_bytes: u64,
    },
    /// Something the user should know.
    Warning {
        /// In words.
        message: String,
    },
    /// What time was spent on; told when it is over.
    Span(Span),
}

/// What a vertex spends time on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Working out its key, with reading what is new of a context, and looking for a record.
    LookUp,
    /// The step's own time with its sandbox; of a copy, working out what it changes.
    Run,
    /// Reading what changed, and storing it.
    Hash,
    /// Making a blob of the layer.
    Compress,
}

impl Phase {
    /// A word or two.
    pub fn name(self) -> &'static str {
        match self {
            Phase::LookUp => "look up",
            Phase::Run => "run",
            Phase::Hash => "hash",
            Phase::Compress => "compress",
        }
    }
}

/// Time spent on one thing.
#[derive(Debug, Clone)]
pub struct Span {
    /// For which vertex.
    pub id: Option<usize>,
    /// The layer that was made or found.
    pub layer: Option<LayerId>,
    /// On what.
    pub phase: Phase,
    /// From when.
    pub started: Instant,
    /// How long.
    pub duration: Duration,
    /// Bytes of the files, or of the blob, that it was about; 0 if it is about none.
    pub bytes: u64,
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
    /// A step before this one, which had to run for it after all.
    #[error(transparent)]
    Before(Box<SolveError>),
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
    /// Remember what steps gave, for a cache that is to be written or was read.
    pub collect: bool,
    /// How the layers of the image will be compressed, if they will be.
    pub compression: Option<Compression>,
    /// The archive that is written with this compression, if one is.
    pub archive: Option<Arc<PlannedArchive>>,
    /// Tells one project's steps from another's when a miss is explained: paths of context and Dockerfile.
    pub project: String,
}

struct Build<'a> {
    definition: &'a Definition,
    workspace: &'a Workspace,
    request: &'a Request,
    cancel: &'a Cancel,
    events: &'a (dyn Fn(Event) + Sync),
    values: Vec<RwLock<Option<Value>>>,
    /// Held while a step is run although a cache knew its result.
    realizing: Vec<Mutex<()>>,
    /// Which vertices make layers of the image.
    exported: Vec<bool>,
    /// Which vertices steps run on, directly or with others in between.
    run_on: Vec<bool>,
    /// Held by who reads and compresses at once.
    reading: Mutex<()>,
    results: Mutex<BTreeMap<usize, StepResult>>,
    turns: Mutex<HashMap<String, Arc<Mutex<()>>>>,
    now: (i64, u32),
}

/// What a graph gave.
pub struct Solved {
    /// The file system of its image.
    pub snapshot: Snapshot,
    /// All steps with a result, in the order of the graph.
    pub steps: Vec<StepResult>,
    /// What the steps are called in this store's records.
    pub names: Vec<[String; 2]>,
}

/// Most vertices that are carried out at once, or four for each processor where that is more: enough for steps that wait for
/// the network, while each takes a thread and some MB of memory.
const AT_ONCE: usize = 32;

/// Carries out a graph. `events` is told what happens, from several threads.
pub fn solve(
    definition: &Definition,
    workspace: &Workspace,
    request: &Request,
    cancel: &Cancel,
    events: &(dyn Fn(Event) + Sync),
) -> Result<Solved, SolveError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let build = Build {
        definition,
        workspace,
        request,
        cancel,
        events,
        values: definition.vertices.iter().map(|_| RwLock::default()).collect(),
        realizing: definition.vertices.iter().map(|_| Mutex::default()).collect(),
        exported: exported(definition),
        run_on: run_on(definition),
        reading: Mutex::default(),
        results: Mutex::default(),
        turns: Mutex::default(),
        now: (i64::try_from(now.as_secs()).unwrap_or(i64::MAX), now.subsec_nanos()),
    };
    let info =
        |(id, vertex): (usize, &Vertex)| VertexInfo { id, name: vertex.name.clone(), stage: vertex.stage.clone() };
    build.tell(Event::Planned { vertices: definition.vertices.iter().enumerate().map(info).collect() });
    build.drive()?;
    let failed = |source| match source {
        VertexError::Before(error) => *error,
        source => SolveError::Result { source: Box::new(source) },
    };
    let snapshot = build.result().map_err(failed)?;
    let results = build.results.into_inner().unwrap_or_else(PoisonError::into_inner);
    let names = |&id: &usize| lookup::steps(definition, VertexId(id), &request.project);
    let names = results.keys().map(names).collect();
    Ok(Solved { snapshot, steps: results.into_values().collect(), names })
}

/// Which vertices stand in the image's own chain.
fn exported(definition: &Definition) -> Vec<bool> {
    let mut exported = vec![false; definition.vertices.len()];
    let mut next = definition.image.top;
    while let Some(VertexId(at)) = next {
        exported[at] = true;
        next = definition.vertices[at].inputs.first().copied().flatten();
    }
    exported
}

/// Which vertices are below a RUN in its own stage's chain. Inputs stand before their users.
fn run_on(definition: &Definition) -> Vec<bool> {
    let mut run_on = vec![false; definition.vertices.len()];
    for (at, vertex) in definition.vertices.iter().enumerate().rev() {
        if let Some(VertexId(below)) = vertex.inputs.first().copied().flatten()
            && (run_on[at] || matches!(vertex.op, Op::Run(_)))
        {
            run_on[below] = true;
        }
    }
    run_on
}

impl Build<'_> {
    fn tell(&self, event: Event) {
        (self.events)(event);
    }

    /// The image's snapshot; `FROM` a context makes one of its files.
    fn result(&self) -> Result<Snapshot, VertexError> {
        if let Some(top) = self.definition.image.top {
            self.realize(top)?;
        }
        self.rootfs(&[self.definition.image.top.and_then(|top| self.known(top))])
    }

    /// The value of a vertex, once there is one.
    fn known(&self, id: VertexId) -> Option<Value> {
        self.values[id.0].read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, id: VertexId, value: Value) {
        *self.values[id.0].write().unwrap_or_else(PoisonError::into_inner) = Some(value);
    }

    fn drive(&self) -> Result<(), SolveError> {
        let mut schedule = Schedule::new(self.definition);
        let (reports, inbox) = mpsc::channel::<(VertexId, Result<Value, SolveError>)>();
        let mut failure = None;
        let at_once = std::thread::available_parallelism().map_or(1, usize::from).saturating_mul(4).max(AT_ONCE);
        std::thread::scope(|scope| {
            let mut commands: VecDeque<Command> = schedule.step(schedule::Event::Begin).into();
            let mut interrupted = false;
            let mut ready: VecDeque<VertexId> = VecDeque::new();
            let mut running = 0;
            loop {
                while let Some(command) = commands.pop_front() {
                    match command {
                        Command::Start(vertex) => ready.push_back(vertex),
                        Command::Stop => self.cancel.cancel(),
                        Command::Cancelled(vertex) => self.tell(Event::Canceled { id: vertex.0 }),
                        Command::Finish => return,
                    }
                }
                while running < at_once
                    && let Some(vertex) = ready.pop_front()
                {
                    running += 1;
                    let reports = reports.clone();
                    scope.spawn(move || {
                        let _ = reports.send((vertex, self.carry_out(vertex)));
                    });
                }
                let event = match inbox.recv_timeout(Duration::from_millis(50)) {
                    Ok((vertex, Ok(value))) => {
                        running -= 1;
                        self.set(vertex, value);
                        schedule::Event::Done(vertex)
                    }
                    Ok((vertex, Err(error))) => {
                        running -= 1;
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
        self.attempt(id, false)
    }

    /// As [`Self::carry_out`]; with `whole`, a result of which only the content is known does not count.
    fn attempt(&self, id: VertexId, whole: bool) -> Result<Value, SolveError> {
        let vertex = &self.definition.vertices[id.0];
        let mut log = StepLog::default();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.value(id, vertex, whole, &mut log)))
            .unwrap_or_else(|panic| {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
                Err(VertexError::Panic(text.unwrap_or_default()))
            });
        result.map_err(|source| {
            if let VertexError::Before(error) = source {
                self.tell(Event::Canceled { id: id.0 });
                return *error;
            }
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

    fn value(&self, id: VertexId, vertex: &Vertex, whole: bool, log: &mut StepLog) -> Result<Value, VertexError> {
        loop {
            let inputs = self.inputs(vertex);
            let given = inputs.clone();
            let result = match &vertex.op {
                Op::Source(source) => return self.source(id, vertex, source, log),
                Op::Run(op) => self.run(id, vertex, op, inputs, whole, log),
                Op::Copy(op) => self.file(id, vertex, &FileOp::Copy(op.clone()), inputs, whole),
                Op::Mkdir(op) => self.file(id, vertex, &FileOp::Mkdir(op.clone()), inputs, whole),
            };
            // A cache had less than it said: what it lacks is made, by this or another thread, and the step begun again.
            let lost = || !step::are_whole(&given) || !step::are_whole(&self.inputs(vertex));
            match result {
                Err(error) if !step::is_verdict(&error) && !self.cancel.is_cancelled() && lost() => {
                    self.realize_inputs(vertex)?;
                }
                result => return result.map(Value::Snapshot),
            }
        }
    }

    fn inputs(&self, vertex: &Vertex) -> Vec<Option<Value>> {
        vertex.inputs.iter().map(|input| input.and_then(|input| self.known(input))).collect()
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
                if self.run_on[id.0] {
                    self.workspace.will_run_on(&image);
                }
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
                local.digest(&mut tree)?;
                tree
            }
            Some(Value::Checkout(tree)) => {
                let mut tree = Tree::clone(tree);
                digest_uncached(&mut tree)?;
                tree
            }
        };
        let content = index::content_key(&tree);
        let id = self.workspace.store.put_layer(tree.clone())?;
        let layer = self.workspace.layer(id, Made::Step(None), Some(Arc::new(tree)));
        Ok(Snapshot::scratch().with(layer, &content, Some(self.now.0)))
    }
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
