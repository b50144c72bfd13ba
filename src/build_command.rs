//! `nacre build`: read the Dockerfile, lower it, solve the graph, export. The one place that knows both crates.

use crate::export_command::{self, Built};
use crate::input::{self, Fetcher, Files, Input};
use crate::interrupt::{Signals, last_words};
use crate::progress::{Screen, ScreenOptions};
use crate::report::{CommandError, Exit, Failure, Place, StepFailure, StepOutcome, with_causes};
use crate::request::{BuildRequest, CacheUse, Call, Environment, NamedSource, SshSource};
use nacre_frontend::diagnostic::Diagnostic;
use nacre_frontend::instruction::{Dockerfile, InstructionKind};
use nacre_frontend::llb::{Definition, ImageSource, Network, Platform};
use nacre_frontend::lower::{self, BaseConfigs, BaseImage, Lowered, NamedContext};
use nacre_frontend::reference::Reference;
use nacre_frontend::source::SourceFile;
use nacre_frontend::{parser, platform};
use nacre_solver::context::{Context, DigestCache, IgnoreFile};
use nacre_solver::materialize::{Ownership, WriteOptions};
use nacre_solver::op::file::LocalContext;
use nacre_solver::op::run::{Host, RunError};
use nacre_solver::op::source::{Progress, PullPolicy, ResolvedImage, SourceContext, SourceError, resolve_image};
use nacre_solver::registry::Client;
use nacre_solver::sandbox::{self, Cancel};
use nacre_solver::snapshot::Workspace;
use nacre_solver::solve::{self, Event, SolveError, VertexError};
use nacre_solver::store::Store;
use nacre_solver::tree::layer::Limits;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Becomes a step's supervisor.
pub(crate) fn sandbox() -> ExitCode {
    sandbox::sandbox_main()
}

/// Builds.
pub(crate) fn run(request: &BuildRequest, env: &Environment, signalled: &Arc<AtomicBool>) -> Result<(), CommandError> {
    let building = matches!(request.call, Call::Build);
    let known = match input::on_disk(request)? {
        Some(input) => Some((parse(&input)?, input)),
        None => None,
    };
    if let (Some((dockerfile, _)), false) = (&known, building) {
        return crate::call_command::run(request, dockerfile, &options(request, None)?);
    }
    if !building {
        let workspace = workspace(request, Ownership::SingleId, None)?;
        let git = input::git_settings(request, env)?;
        let stop = || signalled.load(Ordering::SeqCst);
        let input = Fetcher { workspace: &workspace, git: &git, stop: &stop, events: &|_| {} }.input(request)?;
        return crate::call_command::run(request, &parse(&input)?, &options(request, None)?);
    }
    // Before any thread exists, and before standard input is read: an ordinary user's build goes on in a process inside
    // of a user namespace.
    let Some(place) = enter(known.as_ref().map(|(dockerfile, _)| dockerfile))? else { return Ok(()) };
    let host_error = |error: &(dyn std::error::Error + 'static)| CommandError::new(Exit::Host, error, None);
    let signals = Signals::listen(signalled).map_err(|error| host_error(&error))?;
    let cancel = Cancel::new().map_err(|error| host_error(&error))?;
    let screen = Screen::start(ScreenOptions {
        mode: request.progress,
        terminal: env.stderr_terminal,
        color: env.color,
        explain: request.explain,
    });
    let sink = screen.sink();
    let told = sink.clone();
    let progress: Progress = Arc::new(move |digest: &str, done_bytes, total: u64| {
        let short: String = digest.trim_start_matches("sha256:").chars().take(12).collect();
        told(Event::Transfer { id: None, what: format!("fetching {short}"), done_bytes, total_bytes: Some(total) });
    });
    let result = signals
        .watched(&cancel, last_words(env.color), || build(request, known, place, env, &cancel, (&sink, progress)));
    screen.finish();
    let built = result?;
    export_command::report(request, &built)
}

fn parse(input: &Input) -> Result<Dockerfile, CommandError> {
    parser::parse(input.source.clone())
        .map_err(|failure| CommandError::Dockerfile { source: failure.source, diagnostics: failure.diagnostics })
}

/// Where this process is.
struct Surroundings {
    /// What owners of files are.
    ownership: Ownership,
    /// Why steps cannot run.
    refused: Option<CommandError>,
}

fn has_runs(dockerfile: &Dockerfile) -> bool {
    dockerfile.instructions.iter().any(|instruction| match &instruction.kind {
        InstructionKind::Run { .. } => true,
        InstructionKind::Onbuild { keyword, .. } => keyword == "RUN",
        _ => false,
    })
}

/// Goes into a user namespace if the file needs one and we are not root; a file that is not known yet may. `None` when
/// a process inside has done the work.
fn enter(dockerfile: Option<&Dockerfile>) -> Result<Option<Surroundings>, CommandError> {
    let runs = dockerfile.is_some_and(has_runs);
    // A base may have triggers that run, and its files have owners.
    let bases = dockerfile.is_none_or(|dockerfile| {
        dockerfile.instructions.iter().any(|instruction| match &instruction.kind {
            InstructionKind::From { image, .. } => image.value != "scratch",
            InstructionKind::Copy(copy) => copy.from.is_some(),
            _ => false,
        })
    });
    let place = |ownership| Surroundings { ownership, refused: None };
    if !runs && !bases {
        return Ok(Some(place(Ownership::SingleId)));
    }
    match sandbox::idmap::enter(sandbox::idmap::EnterRequest::Best) {
        // Root of a namespace may have no other id than its own, too.
        Ok(sandbox::idmap::Entered::Root) => {
            let why = "this user namespace has only one id".to_owned();
            Ok(Some(place(owners(sandbox::idmap::ownership(), Some(why)))))
        }
        Ok(sandbox::idmap::Entered::Inside { ownership, notice }) => Ok(Some(place(owners(ownership, notice)))),
        Ok(sandbox::idmap::Entered::Parent { exit_code: 0 }) => Ok(None),
        Ok(sandbox::idmap::Entered::Parent { exit_code }) => {
            Err(CommandError::Inside(u8::try_from(exit_code).unwrap_or(u8::MAX)))
        }
        // Without RUN nothing needs a namespace but the owners of a base's files, which the index holds.
        Err(error) => {
            let error = CommandError::new(Exit::Host, &error, None);
            if runs {
                Err(error)
            } else {
                Ok(Some(Surroundings { ownership: Ownership::SingleId, refused: Some(error) }))
            }
        }
    }
}

/// Whether files have owners; says so if they do not.
fn owners(ownership: sandbox::Ownership, notice: Option<String>) -> Ownership {
    match ownership {
        sandbox::Ownership::Native => Ownership::Native,
        sandbox::Ownership::SingleId => {
            let why = notice.unwrap_or_else(|| "this user namespace has only one id".to_owned());
            crate::print_error(&format!(
                "notice: only one user id can be used: what RUN makes belongs to root, other owners come from COPY, ADD \
                 and base images alone\nhelp: {why}\n"
            ));
            Ownership::SingleId
        }
    }
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
            NamedSource::Git(url) => NamedContext::Git {
                remote: url.remote.clone(),
                reference: url.reference.clone(),
                subdir: url.subdir.clone(),
                keep_git_dir: input::keeps_git_dir(request, url.keep_git_dir),
                checksum: url.checksum.clone(),
                submodules: url.submodules.unwrap_or(true),
            },
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
        platform::parse(text, &host).map(Some).map_err(|error| CommandError::new(Exit::Usage, &error, None))
    };
    request.platforms.iter().map(parse).collect()
}

/// Opens the store.
fn workspace(
    request: &BuildRequest,
    ownership: Ownership,
    progress: Option<Progress>,
) -> Result<Workspace, CommandError> {
    let store_error = |error| CommandError::new(Exit::Store, &error, None);
    let store = Store::open(&request.store).map_err(store_error)?;
    let store = Arc::new(if ownership == Ownership::SingleId { store.with_single_id() } else { store });
    let client = Client::new(request.registry.clone());
    let sources = SourceContext {
        store: store.clone(),
        client,
        pull: if request.pull { PullPolicy::Always } else { PullPolicy::Missing },
        offline: false,
        limits: Limits::default(),
        write: WriteOptions { ownership },
        progress,
    };
    Ok(Workspace::new(sources))
}

fn build(
    request: &BuildRequest,
    known: Option<(Dockerfile, Input)>,
    place: Surroundings,
    env: &Environment,
    cancel: &Cancel,
    (events, progress): (&(dyn Fn(Event) + Sync), Progress),
) -> Result<Vec<Built>, CommandError> {
    let workspace = workspace(request, place.ownership, Some(progress))?.with_cancel(cancel.clone());
    let git = input::git_settings(request, env)?;
    let host = host(request)?;
    let (dockerfile, input) = match known {
        Some(known) => known,
        None => {
            let stop = || cancel.is_cancelled();
            let input = Fetcher { workspace: &workspace, git: &git, stop: &stop, events }.input(request)?;
            let dockerfile = parse(&input)?;
            if let (Some(refused), true) = (place.refused, has_runs(&dockerfile)) {
                return Err(refused);
            }
            (dockerfile, input)
        }
    };
    let contexts = contexts(request, &input, &workspace.store)?;
    let mut all = Vec::new();
    for platform in platforms(request)? {
        let options = options(request, platform)?;
        let (definition, images) = lowered(&input, &dockerfile, &options, &workspace, events)?;
        let solve_request = solve::Request {
            contexts: contexts.clone(),
            images,
            host: host.clone(),
            git: git.clone(),
            project: input.project.clone(),
        };
        let snapshot = solve::solve(&definition, &workspace, &solve_request, cancel, events);
        for local in contexts.values() {
            // Digests that are not kept are made again: no reason to fail.
            let _ = local.save();
        }
        let snapshot = snapshot.map_err(|error| solve_error(error, &input.source))?;
        all.push(Built::new(definition.image, snapshot));
    }
    export_command::export(request, &workspace, &mut all, events, &|| cancel.is_cancelled())?;
    Ok(all)
}

fn contexts(
    request: &BuildRequest,
    input: &Input,
    store: &Store,
) -> Result<BTreeMap<String, Arc<LocalContext>>, CommandError> {
    let open = |directory: &Path, ignore: IgnoreFile<'_>| {
        let error = |error| CommandError::new(Exit::Dockerfile, &error, None);
        let context = Context::open(directory, ignore).map_err(error)?;
        let name = blake3_name(context.root());
        let digests = DigestCache::load(&store.part("context").join(name)).map_err(error)?;
        Ok::<_, CommandError>(Arc::new(LocalContext::new(context, digests)))
    };
    let mut contexts = BTreeMap::new();
    let main = match &input.context {
        Files::Directory(directory) => open(directory, IgnoreFile::Dockerfile(&input.dockerfile_path))?,
        Files::Tree(tree) => Arc::new(LocalContext::of_tree(tree.clone())),
    };
    contexts.insert("context".to_owned(), main);
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
) -> Result<(Definition, Images), CommandError> {
    let mut bases = BaseConfigs::new();
    let mut images = Images::new();
    loop {
        let in_file =
            |diagnostics: Vec<Diagnostic>| CommandError::Dockerfile { source: input.source.clone(), diagnostics };
        let (result, warnings) = lower::lower(dockerfile, options, &bases).map_err(in_file)?;
        match result {
            Lowered::Graph(definition) => {
                for warning in warnings {
                    let line = input.source.line(warning.span.start);
                    events(Event::Warning {
                        message: format!("{:?}: {} (line {line})", warning.rule, warning.message),
                    });
                }
                return Ok((*definition, images));
            }
            Lowered::NeedsBases(needed) => {
                for (base, _) in needed {
                    let image = resolve_image(&base.source, &base.platform, &workspace.sources)
                        .map_err(|error| base_error(&error, &base.source, dockerfile))?;
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

/// An image that cannot be had, with the FROM that asks for it.
fn base_error(error: &SourceError, source: &ImageSource, dockerfile: &Dockerfile) -> CommandError {
    let from = dockerfile.instructions.iter().find_map(|instruction| match (&instruction.kind, source) {
        (InstructionKind::From { image, .. }, ImageSource::Reference(wanted)) => {
            let reference = Reference::parse(&image.value).ok()?;
            (reference.to_string() == *wanted).then_some((&image.value, instruction.lines))
        }
        _ => None,
    });
    let message = match from {
        Some((image, _)) => format!("cannot use base image `{image}`: {}", with_causes(error)),
        None => with_causes(error),
    };
    let place = from.map(|(_, lines)| Place { source: dockerfile.source.clone(), lines });
    CommandError::Failure(Box::new(Failure { exit: Exit::Source, message, place, help: None }))
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

fn solve_error(error: SolveError, source: &SourceFile) -> CommandError {
    match error {
        SolveError::Interrupted => CommandError::Interrupted,
        SolveError::Result { source } => CommandError::new(Exit::Dockerfile, &source, None),
        SolveError::Vertex { name, stage, text, lines, tail, log, source: cause, .. } => {
            let place = lines.map(|lines| Place { source: source.clone(), lines });
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
                VertexError::Run(RunError::Snapshot(error)) => export_command::snapshot_exit(error),
                VertexError::Run(RunError::Store(_) | RunError::Io { .. }) | VertexError::Store(_) => Exit::Store,
                VertexError::Run(_) => Exit::Step,
                VertexError::Source(_) | VertexError::Git(_) | VertexError::Unpack(_) => Exit::Source,
                VertexError::Snapshot(error) => export_command::snapshot_exit(error),
                VertexError::Context(_) | VertexError::NoContext(_) => Exit::Dockerfile,
                _ => Exit::General,
            };
            let message = with_causes(&*cause);
            // An image that no FROM names is one of --from, and stages are named there, too.
            let help = match (&*cause, lines) {
                (VertexError::Git(error), _) => error.help().map(str::to_owned),
                (VertexError::Source(_), None) if text.starts_with("FROM ") => Some(format!(
                    "`{}` is neither a stage of this Dockerfile nor a build context, so it was looked for as an image",
                    text.trim_start_matches("FROM ")
                )),
                _ => None,
            };
            CommandError::Failure(Box::new(Failure { exit, message, place, help }))
        }
    }
}
