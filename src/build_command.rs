//! `nacre build`: read the Dockerfile, lower it, solve the graph, export. The one place that knows both crates.

use crate::blame;
use crate::export_command::{self, Built};
use crate::progress::{Screen, ScreenOptions};
use crate::report::{CommandError, Exit, Failure, Place, StepFailure, StepOutcome, Style, with_causes};
use crate::request::{
    BuildRequest, CacheUse, Call, ContextSource, DockerfileSource, Environment, NamedSource, ProgressMode, SshSource,
};
use nacre_frontend::check::{IgnoreRules, Warning};
use nacre_frontend::diagnostic::Diagnostic;
use nacre_frontend::instruction::{Dockerfile, InstructionKind};
use nacre_frontend::llb::{Definition, ImageSource, Network, Platform};
use nacre_frontend::lower::{self, BaseConfigs, BaseImage, Lowered, NamedContext};
use nacre_frontend::reference::Reference;
use nacre_frontend::source::{SourceFile, Span};
use nacre_frontend::{parser, platform};
use nacre_solver::context::{Context, ContextError, DigestCache, IgnoreFile};
use nacre_solver::materialize::{Ownership, WriteOptions};
use nacre_solver::op::file::LocalContext;
use nacre_solver::op::run::{Host, RunError};
use nacre_solver::op::source::{PullPolicy, ResolvedImage, SourceContext, SourceError, resolve_image};
use nacre_solver::registry::{Client, ClientOptions};
use nacre_solver::sandbox::{self, Cancel};
use nacre_solver::snapshot::Workspace;
use nacre_solver::solve::{self, Event, SolveError, VertexError};
use nacre_solver::store::Store;
use nacre_solver::tree::ignore::IgnoreError;
use nacre_solver::tree::layer::Limits;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Becomes a step's supervisor.
pub(crate) fn sandbox() -> ExitCode {
    sandbox::sandbox_main()
}

/// A context on disk and the Dockerfile.
struct Input {
    /// The build context.
    directory: PathBuf,
    /// The Dockerfile's path, for its own ignore file.
    dockerfile_path: PathBuf,
    /// Its text.
    source: SourceFile,
}

/// Builds.
pub(crate) fn run(request: &BuildRequest, env: &Environment, signalled: &Arc<AtomicBool>) -> Result<(), CommandError> {
    let input = read_input(request)?;
    let parsed = parser::parse(input.source.clone());
    if !matches!(request.call, Call::Build) {
        let mut options = options(request, platforms(request)?.into_iter().next().flatten())?;
        let ignore = IgnoreFile::Dockerfile(&input.dockerfile_path);
        let context = Context::open(&input.directory, ignore).map_err(|error| context_error(&error))?;
        options.ignored = ignored(&context);
        return crate::call_command::run(request, parsed, options);
    }
    let dockerfile = parsed
        .map_err(|failure| CommandError::Dockerfile { source: failure.source, diagnostics: failure.diagnostics })?;
    // Before any thread exists: an ordinary user's build goes on in a process inside of a user namespace.
    let Some(ownership) = enter(&dockerfile)? else { return Ok(()) };
    let screen = Screen::start(ScreenOptions {
        mode: request.progress,
        terminal: env.stderr_terminal,
        color: env.color,
        explain: request.explain,
    });
    let sink = screen.sink();
    let mut found = BTreeSet::new();
    let result = build(request, &input, &dockerfile, ownership, signalled, &sink, &mut found);
    screen.finish();
    if matches!(request.progress, ProgressMode::Plain | ProgressMode::Tty) {
        crate::print_error(&crate::call_command::in_build(&input.source, &found, Style { color: env.color }));
    }
    let built = result?;
    export_command::report(request, &built)
}

/// Goes into a user namespace if the file needs one and we are not root. `None` when a process inside has done the work.
fn enter(dockerfile: &Dockerfile) -> Result<Option<Ownership>, CommandError> {
    let runs = dockerfile.instructions.iter().any(|instruction| match &instruction.kind {
        InstructionKind::Run { .. } => true,
        InstructionKind::Onbuild { keyword, .. } => keyword == "RUN",
        _ => false,
    });
    // A base may have triggers that run, and its files have owners.
    let bases = dockerfile.instructions.iter().any(|instruction| match &instruction.kind {
        InstructionKind::From { image, .. } => image.value != "scratch",
        InstructionKind::Copy(copy) => copy.from.is_some(),
        _ => false,
    });
    if !runs && !bases {
        return Ok(Some(Ownership::SingleId));
    }
    match sandbox::idmap::enter(sandbox::idmap::EnterRequest::Best) {
        Ok(sandbox::idmap::Entered::Root) => Ok(Some(Ownership::Native)),
        Ok(sandbox::idmap::Entered::Inside { ownership, notice }) => {
            if let Some(notice) = notice {
                crate::print_error(&format!("notice: {notice}\n"));
            }
            Ok(Some(match ownership {
                sandbox::Ownership::Native => Ownership::Native,
                sandbox::Ownership::SingleId => Ownership::SingleId,
            }))
        }
        Ok(sandbox::idmap::Entered::Parent { exit_code: 0 }) => Ok(None),
        Ok(sandbox::idmap::Entered::Parent { exit_code }) => {
            Err(CommandError::Inside(u8::try_from(exit_code).unwrap_or(u8::MAX)))
        }
        // Without RUN nothing needs a namespace but the owners of a base's files, which the index holds.
        Err(_) if !runs => Ok(Some(Ownership::SingleId)),
        Err(error) => Err(CommandError::new(Exit::Host, &error, None)),
    }
}

fn read_input(request: &BuildRequest) -> Result<Input, CommandError> {
    let directory = match &request.context {
        ContextSource::Directory(path) => path.clone(),
        ContextSource::Stdin | ContextSource::Http(_) | ContextSource::Git(_) => {
            return Err(failure(Exit::Usage, "only a directory can be the build context so far", None));
        }
    };
    let path = match &request.dockerfile {
        DockerfileSource::Default => directory.join("Dockerfile"),
        DockerfileSource::InContext(path) => directory.join(path),
        DockerfileSource::File(path) => path.clone(),
        DockerfileSource::Stdin => {
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut std::io::Read::take(std::io::stdin(), DOCKERFILE_LIMIT_BYTES), &mut bytes)
                .map_err(|error| CommandError::new(Exit::Dockerfile, &error, None))?;
            let source = SourceFile::new("Dockerfile", parser::decode(&bytes));
            return Ok(Input { dockerfile_path: directory.join("Dockerfile"), directory, source });
        }
        DockerfileSource::Http(_) => {
            return Err(failure(Exit::Usage, "a Dockerfile cannot be fetched by its address so far", None));
        }
    };
    let bytes = read_limited(&path).map_err(|error| {
        let message = format!("cannot read the Dockerfile `{}`: {error}", path.display());
        let help = matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::IsADirectory)
            .then(|| "name it with -f, or make a file called Dockerfile at the top of the context".to_owned());
        failure(Exit::Dockerfile, &message, help)
    })?;
    let name = path.strip_prefix(&directory).unwrap_or(&path).display().to_string();
    Ok(Input { source: SourceFile::new(name, parser::decode(&bytes)), directory, dockerfile_path: path })
}

/// No Dockerfile that somebody wrote comes near it.
const DOCKERFILE_LIMIT_BYTES: u64 = 64 << 20;

fn read_limited(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path)?;
    std::io::Read::read_to_end(&mut std::io::Read::take(file, DOCKERFILE_LIMIT_BYTES), &mut bytes)?;
    Ok(bytes)
}

pub(crate) fn failure(exit: Exit, message: &str, help: Option<String>) -> CommandError {
    CommandError::Failure(Box::new(Failure { exit, message: message.to_owned(), place: None, help }))
}

/// The request in the front end's terms, for one platform.
fn options(request: &BuildRequest, platform: Option<Platform>) -> Result<lower::Options, CommandError> {
    let mut options = lower::Options::new(platform::host());
    options.target = request.target.clone();
    options.build_args = request.build_args.iter().map(|(name, value)| (name.clone(), Some(value.clone()))).collect();
    options.labels = request.labels.clone();
    options.platform = platform;
    options.multi_platform = request.platforms.len() > 1;
    options.no_cache = request.cache_use == CacheUse::None;
    if let CacheUse::NotStages(stages) = &request.cache_use {
        options.no_cache_filter = stages.clone();
    }
    options.network = request.network;
    options.extra_hosts = request.extra_hosts.clone();
    options.ulimits = request.ulimits.clone();
    options.shm_size_bytes = request.shm_size_bytes;
    options.cgroup_parent = request.cgroup_parent.clone();
    options.source_date_epoch = request.source_date_epoch;
    options.allow_insecure = request.allow.security_insecure;
    options.allow_network_host = request.allow.network_host;
    for (name, source) in &request.named_contexts {
        let context = match source {
            NamedSource::Directory(_) => NamedContext::Local,
            NamedSource::Image(image) => {
                let reference =
                    Reference::parse(image).map_err(|error| CommandError::new(Exit::Usage, &error, None))?;
                NamedContext::Image(ImageSource::Reference(reference.to_string()))
            }
            NamedSource::OciLayout { path, tag, digest } => NamedContext::Image(ImageSource::OciLayout {
                path: path.display().to_string(),
                tag: tag.clone(),
                digest: digest.clone(),
            }),
            NamedSource::Http(url) => NamedContext::Http(url.clone()),
            NamedSource::Target(stage) => NamedContext::Target(stage.clone()),
            NamedSource::Git(_) => {
                let message = format!("build context `{name}`: git repositories cannot be used yet");
                return Err(failure(Exit::Usage, &message, None));
            }
        };
        options.contexts.insert(name.clone(), context);
    }
    Ok(options)
}

/// The platforms to build for; none asked for is the machine's own, told to the front end as "not given".
fn platforms(request: &BuildRequest) -> Result<Vec<Option<Platform>>, CommandError> {
    let host = platform::host();
    if request.platforms.is_empty() {
        return Ok(vec![None]);
    }
    let parse = |text: &String| {
        platform::parse(text, &host).map(Some).map_err(|error| CommandError::new(Exit::Usage, &error, error.help()))
    };
    request.platforms.iter().map(parse).collect()
}

fn build(
    request: &BuildRequest,
    input: &Input,
    dockerfile: &Dockerfile,
    ownership: Ownership,
    signalled: &Arc<AtomicBool>,
    events: &(dyn Fn(Event) + Sync),
    found: &mut BTreeSet<Warning>,
) -> Result<Vec<Built>, CommandError> {
    let store_error = |error| CommandError::new(Exit::Store, &error, None);
    let store = Store::open(&request.store).map_err(store_error)?;
    let store = Arc::new(if ownership == Ownership::SingleId { store.with_single_id() } else { store });
    let workspace = Workspace::new(image_sources(request, store.clone(), ownership));
    let cancel = Cancel::new().map_err(|error| CommandError::new(Exit::Host, &error, None))?;
    let contexts = contexts(request, input, &store)?;
    let mut all = Vec::new();
    for platform in platforms(request)? {
        let mut options = options(request, platform)?;
        options.ignored = contexts.get("context").and_then(|local| ignored(local.context()));
        let (definition, images) = lowered(input, dockerfile, &options, &workspace, events, found)?;
        let solve_request = solve::Request {
            contexts: contexts.clone(),
            images,
            host: host(request)?,
            project: format!("{}\n{}", input.directory.display(), input.dockerfile_path.display()),
        };
        let snapshot =
            watched(signalled, &cancel, || solve::solve(&definition, &workspace, &solve_request, &cancel, events));
        for local in contexts.values() {
            // Digests that are not kept are made again: no reason to fail.
            let _ = local.save();
        }
        let steps = blame::Steps { dockerfile, definition: &definition, contexts: &contexts };
        let snapshot = snapshot.map_err(|error| solve_error(error, &steps))?;
        all.push(Built::new(definition.image, snapshot));
    }
    export_command::export(request, &workspace, &mut all, events)?;
    Ok(all)
}

/// Where images come from.
pub(crate) fn image_sources(request: &BuildRequest, store: Arc<Store>, ownership: Ownership) -> SourceContext {
    let client = Client::new(ClientOptions { credentials: request.docker_config.clone(), ..ClientOptions::default() });
    SourceContext {
        store,
        client,
        pull: if request.pull { PullPolicy::Always } else { PullPolicy::Missing },
        offline: false,
        limits: Limits::default(),
        write: WriteOptions { ownership },
        progress: None,
    }
}

/// What the build checks need to know of a context. With exceptions nothing is said: what is below an excluded
/// directory may be there all the same.
fn ignored(context: &Context) -> Option<IgnoreRules> {
    let rules = context.ignore_rules();
    if rules.is_empty() || rules.has_exceptions() {
        return None;
    }
    let rules = rules.clone();
    Some(IgnoreRules::new(move |path| rules.excluded(path)))
}

/// A context that cannot be used; a wrong ignore file is shown.
fn context_error(error: &ContextError) -> CommandError {
    let mut failure = Failure { exit: Exit::Dockerfile, message: with_causes(error), place: None, help: None };
    if let ContextError::BadIgnoreFile { path, source } = error {
        failure.message = source.to_string();
        failure.help = Some(match source {
            IgnoreError::EmptyException => "put a pattern behind `!`, or remove the line".to_owned(),
            IgnoreError::BadPattern { .. } => "close `[` with `]`, or write `[[]` for the character itself".to_owned(),
        });
        let text = read_limited(path).map(|bytes| parser::decode(&bytes)).unwrap_or_default();
        // Its last component says enough: it lies beside the Dockerfile or at the top of the context.
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let file = SourceFile::new(name, text);
        let wanted = match source {
            IgnoreError::EmptyException => "!",
            IgnoreError::BadPattern { pattern } => pattern.as_str(),
        };
        let word = blame::line_of(&file.text, wanted);
        failure.place = Some(Place::word(&file, word));
    }
    CommandError::Failure(Box::new(failure))
}

/// Runs `work` while another thread passes the user's wish to stop on.
fn watched<T>(signalled: &AtomicBool, cancel: &Cancel, work: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                if signalled.load(Ordering::SeqCst) {
                    cancel.cancel();
                    return;
                }
                std::thread::park_timeout(Duration::from_millis(50));
            }
        });
        let result = work();
        done.store(true, Ordering::SeqCst);
        watcher.thread().unpark();
        result
    })
}

fn contexts(
    request: &BuildRequest,
    input: &Input,
    store: &Store,
) -> Result<BTreeMap<String, Arc<LocalContext>>, CommandError> {
    let open = |directory: &Path, ignore: IgnoreFile<'_>| {
        let error = |error: ContextError| context_error(&error);
        let context = Context::open(directory, ignore).map_err(error)?;
        let name = blake3_name(context.root());
        let digests = DigestCache::load(&store.part("context").join(name)).map_err(error)?;
        Ok::<_, CommandError>(Arc::new(LocalContext::new(context, digests)))
    };
    let mut contexts = BTreeMap::new();
    contexts.insert("context".to_owned(), open(&input.directory, IgnoreFile::Dockerfile(&input.dockerfile_path))?);
    for (name, source) in &request.named_contexts {
        if let NamedSource::Directory(directory) = source {
            contexts.insert(name.clone(), open(directory, IgnoreFile::Directory)?);
        }
    }
    Ok(contexts)
}

/// A file name for what is remembered of a directory.
fn blake3_name(directory: &Path) -> String {
    nacre_solver::store::name_for(std::os::unix::ffi::OsStrExt::as_bytes(directory.as_os_str()))
}

type Images = BTreeMap<(ImageSource, Platform), Arc<ResolvedImage>>;

/// Lowers until all base images' configurations are known.
fn lowered(
    input: &Input,
    dockerfile: &Dockerfile,
    options: &lower::Options,
    workspace: &Workspace,
    events: &(dyn Fn(Event) + Sync),
    found: &mut BTreeSet<Warning>,
) -> Result<(Definition, Images), CommandError> {
    let mut bases = BaseConfigs::new();
    let mut images = Images::new();
    loop {
        let in_file =
            |diagnostics: Vec<Diagnostic>| CommandError::Dockerfile { source: input.source.clone(), diagnostics };
        let (result, warnings) = lower::lower(dockerfile, options, &bases).map_err(in_file)?;
        match result {
            Lowered::Graph(definition) => {
                for warning in warnings.into_iter().filter(|warning| found.insert(warning.clone())) {
                    let (line, column) = input.source.line_column(warning.span.start);
                    events(Event::Check {
                        rule: warning.rule.name(),
                        message: warning.message,
                        url: warning.url,
                        file: input.source.name.clone(),
                        line,
                        column,
                    });
                }
                return Ok((*definition, images));
            }
            Lowered::NeedsBases(needed) => {
                for (base, span) in needed {
                    let image = resolve_image(&base.source, &base.platform, &workspace.sources)
                        .map_err(|error| base_error(&error, dockerfile, span))?;
                    let image = Arc::new(image);
                    let pinned = lower::with_digest(&base.source, image.root_digest.clone());
                    images.insert((pinned, base.platform.clone()), image.clone());
                    let digest = Some(image.root_digest.clone());
                    bases.insert(base, BaseImage { config: image.config.clone(), digest });
                }
            }
        }
    }
}

/// A base image that cannot be had; `span` is its name in FROM.
fn base_error(error: &SourceError, dockerfile: &Dockerfile, span: Span) -> CommandError {
    let source = &dockerfile.source;
    let image = source.text.get(span.start..span.end).unwrap_or_default();
    let message = format!("cannot use base image `{image}`: {}", with_causes(error));
    let place = Some(Place::word(source, span));
    let help = blame::similar_stage(dockerfile, image).or_else(|| error.help());
    CommandError::Failure(Box::new(Failure { exit: Exit::Source, message, place, help }))
}

fn host(request: &BuildRequest) -> Result<Host, CommandError> {
    let mut host = Host {
        resolv_conf: std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
        default_network_none: request.network == Network::None,
        ..Host::default()
    };
    for secret in &request.secrets {
        host.secrets.insert(secret.id.clone(), secret.read()?);
    }
    for agent in &request.ssh {
        match &agent.source {
            SshSource::Socket(path) => host.ssh.insert(agent.id.clone(), path.clone()),
            SshSource::Keys(_) => {
                let message = format!("--ssh {}: key files cannot be used yet", agent.id);
                return Err(failure(Exit::Usage, &message, Some("start an ssh-agent and add them".to_owned())));
            }
        };
    }
    Ok(host)
}

fn solve_error(error: SolveError, steps: &blame::Steps<'_>) -> CommandError {
    match error {
        SolveError::Interrupted => CommandError::Interrupted,
        SolveError::Result { source } => CommandError::new(Exit::Dockerfile, &source, None),
        SolveError::Vertex { id, name, stage, lines, tail, log, source: cause, .. } => {
            let found = steps.blame(id, &cause);
            let source = steps.dockerfile.source.clone();
            let place = lines.map(|lines| Place { source, lines, word: found.word });
            let outcome = match &*cause {
                VertexError::Run(RunError::Exit { code, program }) => Some((StepOutcome::Exit(*code), program.clone())),
                VertexError::Run(RunError::Signal { signal }) => Some((StepOutcome::Signal(*signal), String::new())),
                _ => None,
            };
            if let Some((outcome, program)) = outcome {
                let failure = StepFailure { name, stage, program, outcome, place, tail, log };
                return CommandError::Step(Box::new(failure));
            }
            let exit = match &*cause {
                VertexError::Run(RunError::Sandbox(_)) => Exit::Host,
                VertexError::Run(RunError::Store(_) | RunError::Io { .. }) | VertexError::Store(_) => Exit::Store,
                VertexError::Run(_) => Exit::Step,
                VertexError::Source(_) => Exit::Source,
                VertexError::Snapshot(error) => export_command::snapshot_exit(error),
                VertexError::Context(_) | VertexError::NoContext(_) => Exit::Dockerfile,
                _ => Exit::General,
            };
            let message = with_causes(&*cause);
            CommandError::Failure(Box::new(Failure { exit, message, place, help: found.help }))
        }
    }
}
