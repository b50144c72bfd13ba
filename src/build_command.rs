//! `nacre build`: read the Dockerfile, lower it, solve the graph, export. The one place that knows both crates.

use crate::blame;
use crate::cache_command;
use crate::export_command::{self, Built, Live};
use crate::image_commands::sources_at;
use crate::input::{self, Fetcher, Files, Input};
use crate::interrupt::{Signals, last_words};
use crate::progress::{Screen, ScreenOptions};
use crate::report::{CommandError, Exit, Failure, Place, StepFailure, StepOutcome, Style, disk_help, with_causes};
use crate::request::{
    self, BuildRequest, CacheUse, Call, Destination, Environment, NamedSource, Output, OutputKind, OwnershipChoice,
    ProgressMode,
};
use crate::ssh_agents::SshAgents;
use crate::timings::Recorder;
use nacre_frontend::check::{IgnoreRules, Warning};
use nacre_frontend::diagnostic::Diagnostic;
use nacre_frontend::instruction::{Dockerfile, InstructionKind};
use nacre_frontend::llb::{Definition, ImageSource, Network, Op, Platform, Vertex};
use nacre_frontend::lower::{self, BaseConfigs, BaseImage, Lowered, NamedContext};
use nacre_frontend::parser::ParseFailure;
use nacre_frontend::reference::Reference;
use nacre_frontend::source::{SourceFile, Span};
use nacre_frontend::{parser, platform};
use nacre_solver::cache::import::Imports;
use nacre_solver::context::{Context, ContextError, DigestCache, IgnoreFile};
use nacre_solver::leak::LeakScan;
use nacre_solver::materialize::Ownership;
use nacre_solver::op::file::LocalContext;
use nacre_solver::op::run::{Host, RunError};
use nacre_solver::op::source::{Progress, PullPolicy, ResolvedImage, SourceContext, SourceError, Warn, resolve_image};
use nacre_solver::sandbox::cgroup::{Exceeded, Limits};
use nacre_solver::sandbox::foreign::{self, Emulators};
use nacre_solver::sandbox::network::Pasta;
use nacre_solver::sandbox::{self, Cancel, Isolation};
use nacre_solver::snapshot::Workspace;
use nacre_solver::solve::{self, Event, SolveError, VertexError};
use nacre_solver::store::Store;
use nacre_solver::tree::ignore::IgnoreError;
use std::collections::{BTreeMap, BTreeSet};
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
    if !matches!(request.call, Call::Build) {
        return call(request, env, signalled);
    }
    let known = match input::on_disk(request)? {
        Some(input) => Some((parse(&input).map_err(mistakes)?, input)),
        None => None,
    };
    // Before any thread exists, and before standard input is read: an ordinary user's build goes on in a process inside
    // of a user namespace.
    let foreign = foreign_platforms(request, known.as_ref().map(|(dockerfile, _)| dockerfile))?;
    let dockerfile = known.as_ref().map(|(dockerfile, _)| dockerfile);
    let Some(place) = enter(dockerfile, &foreign, request, env.starts_over())? else {
        return Ok(());
    };
    let host_error = |error: &(dyn std::error::Error + 'static)| CommandError::new(Exit::Host, error, None);
    let signals = Signals::listen(signalled).map_err(|error| host_error(&error))?;
    let cancel = Cancel::new().map_err(|error| host_error(&error))?;
    let screen = Screen::start(ScreenOptions {
        mode: request.progress,
        terminal: env.stderr_terminal,
        color: env.color,
        explain: request.explain,
    });
    let recorder = Arc::new(Recorder::new());
    let sink = {
        let (shown, recorder) = (screen.sink(), recorder.clone());
        move |event: Event| {
            recorder.note(&event);
            shown(event);
        }
    };
    let told = sink.clone();
    let progress: Progress = Arc::new(move |digest: &str, done_bytes, total: u64| {
        let short: String = digest.trim_start_matches("sha256:").chars().take(12).collect();
        told(Event::Transfer { id: None, what: format!("fetching {short}"), done_bytes, total_bytes: Some(total) });
    });
    let told = sink.clone();
    let warn: Warn = Arc::new(move |message| told(Event::Warning { message }));
    let mut found = Findings::default();
    let work = || build(request, known, place, env, &cancel, (&sink, progress, warn), &mut found);
    let result = signals.watched(&cancel, last_words(env.color), work);
    screen.finish();
    if found.triggers {
        return Err(CommandError::new(Exit::Host, &sandbox::idmap::start_over(request::STARTS_OVER), None));
    }
    if let (Some(source), ProgressMode::Plain | ProgressMode::Tty) = (&found.source, request.progress) {
        let style = Style { color: env.color };
        crate::print_error(&crate::call_command::in_build(source, &found.warnings, style));
    }
    if request.timings {
        crate::print_error(&recorder.table());
    }
    if let Some(path) = &request.trace {
        let written = std::fs::write(path, recorder.trace());
        let failed =
            |error| failure(Exit::Store, &format!("cannot write {}: {}", path.display(), with_causes(&error)), None);
        // A build that failed has something more important to say.
        if result.is_ok() {
            written.map_err(failed)?;
        }
    }
    let built = result?;
    export_command::report(request, &built)
}

/// What the build checks found, for the end of a build.
#[derive(Default)]
struct Findings {
    source: Option<SourceFile>,
    warnings: BTreeSet<Warning>,
    /// A base image has triggers that run, and this process is where nothing can: the build has to start over.
    triggers: bool,
}

/// Answers a `--call` other than build.
fn call(request: &BuildRequest, env: &Environment, signalled: &Arc<AtomicBool>) -> Result<(), CommandError> {
    let input = match input::on_disk(request)? {
        Some(input) => input,
        None => {
            let workspace = workspace(request, Ownership::SingleId, None, None)?;
            let agents = SshAgents::start(&request.ssh)?;
            let git = input::git_settings(request, env, &agents)?;
            let stop = || signalled.load(Ordering::SeqCst);
            Fetcher { workspace: &workspace, git: &git, stop: &stop, events: &|_| {} }.input(request)?
        }
    };
    let mut options = options(request, platforms(request)?.into_iter().next().flatten())?;
    if let Files::Directory(directory) = &input.context {
        let ignore = IgnoreFile::Dockerfile(&input.dockerfile_path);
        let context = Context::open(directory, ignore).map_err(|error| context_error(&error))?;
        options.ignored = ignored(&context);
    }
    crate::call_command::run(request, parse(&input), options)
}

fn parse(input: &Input) -> Result<Dockerfile, ParseFailure> {
    parser::parse(input.source.clone())
}

fn mistakes(failure: ParseFailure) -> CommandError {
    CommandError::Dockerfile { source: failure.source, diagnostics: failure.diagnostics }
}

/// Where this process is.
struct Surroundings {
    /// What owners of files are.
    ownership: Ownership,
    /// Why steps cannot run.
    refused: Option<CommandError>,
    /// In a user namespace that was made for this build.
    own_namespace: bool,
    /// In none, as nothing in the file needs one.
    without: bool,
}

/// Platforms that are asked for, or named by FROM, and are not this machine's.
fn foreign_platforms(request: &BuildRequest, dockerfile: Option<&Dockerfile>) -> Result<Vec<Platform>, CommandError> {
    let host = platform::host();
    let named = dockerfile.into_iter().flat_map(|dockerfile| &dockerfile.instructions).filter_map(|instruction| {
        match &instruction.kind {
            InstructionKind::From { platform: Some(text), .. } => platform::parse(&text.value, &host).ok(),
            _ => None,
        }
    });
    let mut foreign: Vec<Platform> = platforms(request)?.into_iter().flatten().chain(named).collect();
    foreign.retain(|platform| !foreign::is_native(platform));
    foreign.sort();
    foreign.dedup();
    Ok(foreign)
}

/// Would emulators have to be registered for these platforms?
fn needs_emulators(foreign: &[Platform]) -> bool {
    let Ok(scratch) = tempfile::tempdir() else { return false };
    foreign.iter().any(|platform| !foreign::runs(platform, scratch.path()))
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
///
/// Where nothing runs, no namespace is asked for: what runs in a base image's triggers makes the build start over.
///
/// For foreign platforms root goes there, too: emulators are registered in a namespace of the build's own.
fn enter(
    dockerfile: Option<&Dockerfile>,
    foreign: &[Platform],
    build: &BuildRequest,
    starts_over: bool,
) -> Result<Option<Surroundings>, CommandError> {
    let runs = starts_over || dockerfile.is_some_and(has_runs);
    // A base may have triggers that run, and its files have owners.
    let bases = dockerfile.is_none_or(|dockerfile| {
        dockerfile.instructions.iter().any(|instruction| match &instruction.kind {
            InstructionKind::From { image, .. } => image.value != "scratch",
            InstructionKind::Copy(copy) => copy.from.is_some(),
            _ => false,
        })
    });
    let place = |ownership| Surroundings { ownership, refused: None, own_namespace: false, without: false };
    if !runs && !bases {
        return Ok(Some(place(Ownership::SingleId)));
    }
    if build.isolation == Isolation::Chroot {
        return chroot(build, runs).map(place).map(Some);
    }
    // Files of bases have owners on disk only where they are written to.
    let writes_files = build.outputs.iter().any(|output| matches!(output.kind, OutputKind::Local { .. }));
    let ownership = sandbox::idmap::ownership();
    if !runs && dockerfile.is_some() && (ownership == sandbox::Ownership::Native || !writes_files) {
        return Ok(Some(Surroundings { without: true, ..place(on_disk(ownership)) }));
    }
    let best = match build.ownership {
        OwnershipChoice::Emulate => sandbox::idmap::EnterRequest::SingleId,
        OwnershipChoice::Auto | OwnershipChoice::SubordinateIds => sandbox::idmap::EnterRequest::Best,
    };
    let own = build.ownership != OwnershipChoice::Emulate && runs && !foreign.is_empty() && needs_emulators(foreign);
    let entered = match own {
        // What root may not have a namespace for, it may well be able to do without.
        true => sandbox::idmap::enter(sandbox::idmap::EnterRequest::Own).or_else(|_| sandbox::idmap::enter(best)),
        false => sandbox::idmap::enter(best),
    };
    match entered {
        // Root of a namespace may have no other id than its own, too.
        Ok(sandbox::idmap::Entered::Root) => owners(build, sandbox::idmap::ownership(), None).map(place).map(Some),
        Ok(sandbox::idmap::Entered::Inside { ownership, notice }) => {
            let place = owners(build, ownership, notice).map(place)?;
            Ok(Some(Surroundings { own_namespace: true, ..place }))
        }
        Ok(sandbox::idmap::Entered::Parent { exit_code }) => inside_ended(exit_code).map(|()| None),
        // Without RUN nothing needs a namespace but the owners of a base's files, which the index holds.
        Err(error) => {
            let error = CommandError::new(Exit::Host, &error, Some(without_namespaces()));
            if runs {
                Err(error)
            } else {
                let ownership = Ownership::SingleId;
                Ok(Some(Surroundings { refused: Some(error), ..place(ownership) }))
            }
        }
    }
}

fn on_disk(ownership: sandbox::Ownership) -> Ownership {
    match ownership {
        sandbox::Ownership::Native => Ownership::Native,
        sandbox::Ownership::SingleId => Ownership::SingleId,
    }
}

/// Goes to where a build would unpack images: what owners of files are there. The inner `None` is for where no namespace can be
/// had, as then nothing runs in the usual way; the outer one when a process inside has done the work.
pub(crate) fn enter_to_unpack() -> Result<Option<Option<Ownership>>, CommandError> {
    match sandbox::idmap::enter(sandbox::idmap::EnterRequest::Best) {
        Ok(sandbox::idmap::Entered::Root) => Ok(Some(Some(on_disk(sandbox::idmap::ownership())))),
        Ok(sandbox::idmap::Entered::Inside { ownership, .. }) => Ok(Some(Some(on_disk(ownership)))),
        Ok(sandbox::idmap::Entered::Parent { exit_code }) => inside_ended(exit_code).map(|()| None),
        Err(sandbox::SandboxError::UserNamespace { .. }) => Ok(Some(None)),
        Err(error) => Err(CommandError::new(Exit::Host, &error, None)),
    }
}

/// How a process inside of a namespace ended, which did the work.
fn inside_ended(exit_code: i32) -> Result<(), CommandError> {
    match exit_code {
        0 => Ok(()),
        _ => Err(CommandError::Inside(u8::try_from(exit_code).unwrap_or(u8::MAX))),
    }
}

/// What else there is where no namespace can be had.
fn without_namespaces() -> String {
    match sandbox::idmap::chroot_refusal() {
        None => "--isolation=chroot runs steps without namespaces: they then share the processes, network and rights of this \
                 container; `nacre doctor` tells more"
            .to_owned(),
        Some(_) => "`nacre doctor` tells more; Dockerfiles without RUN build all the same".to_owned(),
    }
}

/// Steps are to have another root directory, and no namespace.
fn chroot(build: &BuildRequest, runs: bool) -> Result<Ownership, CommandError> {
    if let Some(reason) = sandbox::idmap::chroot_refusal() {
        // Without steps there is nothing to isolate.
        return match runs {
            false => Ok(Ownership::SingleId),
            true => Err(failure(
                Exit::Host,
                &format!("--isolation=chroot: {reason}"),
                Some("leave it out to have namespaces; `nacre doctor` tells whether they can be had".to_owned()),
            )),
        };
    }
    if build.ownership == OwnershipChoice::Emulate {
        let help = "leave one of them out".to_owned();
        return Err(failure(Exit::Usage, "--isolation=chroot and --ownership=emulate exclude each other", Some(help)));
    }
    if runs && !build.quiet && matches!(build.progress, ProgressMode::Plain | ProgressMode::Tty) {
        crate::print_error(
            "notice: --isolation=chroot: steps share processes, network, ipc and rights with whatever runs here as root\n",
        );
    }
    Ok(Ownership::Native)
}

/// Whether files have owners on disk; says so if they are emulated without having been asked for.
fn owners(
    build: &BuildRequest,
    ownership: sandbox::Ownership,
    notice: Option<String>,
) -> Result<Ownership, CommandError> {
    let why = || notice.unwrap_or_else(|| "this user namespace has only one id".to_owned());
    match (ownership, build.ownership) {
        (sandbox::Ownership::Native, _) => Ok(Ownership::Native),
        (sandbox::Ownership::SingleId, OwnershipChoice::Emulate) => Ok(Ownership::SingleId),
        (sandbox::Ownership::SingleId, OwnershipChoice::Auto) => {
            let why = why();
            // The result is the same, so programs and those who want to hear nothing are not told.
            if !build.quiet && matches!(build.progress, ProgressMode::Plain | ProgressMode::Tty) {
                crate::print_error(&format!(
                    "notice: only one user id can be used, so owners and users of RUN steps are emulated\nhelp: {why}\n"
                ));
            }
            Ok(Ownership::SingleId)
        }
        (sandbox::Ownership::SingleId, OwnershipChoice::SubordinateIds) => {
            let message = format!("--ownership=subid: only one user id can be used: {}", why());
            Err(failure(Exit::Host, &message, Some("leave it out to have owners emulated".to_owned())))
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
        platform::parse(text, &host).map(Some).map_err(|error| CommandError::new(Exit::Usage, &error, error.help()))
    };
    request.platforms.iter().map(parse).collect()
}

/// Opens the store.
pub(crate) fn workspace(
    request: &BuildRequest,
    ownership: Ownership,
    progress: Option<Progress>,
    warn: Option<Warn>,
) -> Result<Workspace, CommandError> {
    let pull = if request.pull { PullPolicy::Always } else { PullPolicy::Missing };
    let sources = sources_at(&request.store, request.registry.clone(), ownership)?;
    let sources = SourceContext { pull, progress, warn, ..sources };
    Ok(Workspace::new(sources))
}

fn build(
    request: &BuildRequest,
    known: Option<(Dockerfile, Input)>,
    place: Surroundings,
    env: &Environment,
    cancel: &Cancel,
    (events, progress, warn): (&(dyn Fn(Event) + Sync), Progress, Warn),
    found: &mut Findings,
) -> Result<Vec<Built>, CommandError> {
    let workspace = workspace(request, place.ownership, Some(progress), Some(warn))?.with_cancel(cancel.clone());
    let workspace = workspace.with_imports(Arc::new(Imports::new(request.cache_from.clone())));
    let agents = SshAgents::start(&request.ssh)?;
    let git = input::git_settings(request, env, &agents)?;
    let mut host = host(request, &agents)?;
    let mut emulators = env.program_directories();
    emulators.push(foreign::DEBIAN_DIRECTORY.into());
    host.emulators = Emulators::new(emulators, place.own_namespace);
    let (dockerfile, input) = match known {
        Some(known) => known,
        None => {
            let stop = || cancel.is_cancelled();
            let input = Fetcher { workspace: &workspace, git: &git, stop: &stop, events }.input(request)?;
            let dockerfile = parse(&input).map_err(mistakes)?;
            if let (Some(refused), true) = (place.refused, has_runs(&dockerfile)) {
                return Err(refused);
            }
            (dockerfile, input)
        }
    };
    found.source = Some(input.source.clone());
    let contexts = contexts(request, &input, &workspace.store)?;
    let mut plans = Vec::new();
    let mut all = Vec::new();
    let mut pasta = None;
    let collect = !request.cache_from.is_empty() || !request.cache_to.is_empty();
    let platforms = platforms(request)?;
    // Archives of several platforms begin with what all of them need.
    let archive = export_command::planned_archive(request).filter(|_| platforms.len() == 1).map(Arc::new);
    for platform in platforms {
        let mut options = options(request, platform)?;
        options.ignored = contexts.get("context").and_then(|local| ignored(local.context()?));
        let (definition, images) = lowered(&dockerfile, &options, &workspace, events, &mut found.warnings)?;
        let runs = definition.vertices.iter().any(|vertex| matches!(vertex.op, Op::Run(_)));
        if runs && place.without {
            found.triggers = true;
            return Err(CommandError::Interrupted);
        }
        // A build that runs nothing has nothing to limit. One that finds its steps cached fails all the same: whether
        // limits can be had does not depend on the cache.
        if host.group.is_none() && runs {
            let prepared = request.limits.prepare();
            host.group = prepared.map_err(|error| failure(Exit::Host, &error.to_string(), Some(error.help())))?;
        }
        let networked = |vertex: &Vertex| matches!(&vertex.op, Op::Run(op) if op.network == Network::Default);
        if request.pasta && pasta.is_none() && definition.vertices.iter().any(networked) {
            let started = Pasta::start(&env.program_directories());
            let started =
                started.map_err(|error| failure(Exit::Host, &with_causes(&error), Some(error.help().to_owned())))?;
            host.default_network = Some(started.namespace());
            pasta = Some(started);
        }
        let solve_request = solve::Request {
            contexts: contexts.clone(),
            images,
            host: host.clone(),
            git: git.clone(),
            collect,
            compression: export_command::compression(request),
            archive: archive.clone(),
            project: input.project.clone(),
        };
        check_for_secrets(&definition, &solve_request.host)?;
        all.push(solved(&dockerfile, &definition, &workspace, &solve_request, &request.limits, cancel, events)?);
        plans.push((definition, solve_request));
    }
    let live = Live { events, stop: &|| cancel.is_cancelled() };
    while let Err(error) = export_command::export(request, &workspace, &mut all, archive.as_deref(), &live) {
        // A cache that lacks a layer which only an output needed: its step runs, and the outputs begin again.
        let lost = all.iter().any(|one| !one.snapshot().is_whole());
        // What another output has sent to standard output cannot be taken back.
        let is_stdout = |output: &Output| matches!(output.dest(), Some(Destination::Stdout));
        let printed = request.outputs.len() > 1 && request.outputs.iter().any(is_stdout);
        if !lost || printed || cancel.is_cancelled() {
            return Err(error);
        }
        // The layers that are in it may become others.
        archive.iter().for_each(|archive| archive.forget());
        for (one, (definition, solve_request)) in all.iter_mut().zip(&plans) {
            *one = solved(&dockerfile, definition, &workspace, solve_request, &request.limits, cancel, events)?;
        }
    }
    cache_command::keep_imported(&workspace, &all)?;
    cache_command::write_caches(&request.cache_to, &workspace, &all, &live)?;
    let received_bytes = workspace.sources.client.received_bytes();
    if received_bytes > 0 {
        events(Event::Traffic { received_bytes });
    }
    Ok(all)
}

/// Carries a graph out.
fn solved(
    dockerfile: &Dockerfile,
    definition: &Definition,
    workspace: &Workspace,
    request: &solve::Request,
    limits: &Limits,
    cancel: &Cancel,
    events: &(dyn Fn(Event) + Sync),
) -> Result<Built, CommandError> {
    let contexts = &request.contexts;
    let solved = solve::solve(definition, workspace, request, cancel, events);
    for local in contexts.values() {
        // Digests that are not kept are made again: no reason to fail.
        let _ = local.save();
    }
    let steps = blame::Steps { dockerfile, definition, contexts };
    let solved = solved.map_err(|error| solve_error(error, &steps, limits))?;
    Ok(Built::new(definition.image.clone(), solved))
}

/// Looks for secrets in what the image says about itself.
fn check_for_secrets(definition: &Definition, host: &Host) -> Result<(), CommandError> {
    let Some(leaks) = &host.leaks else { return Ok(()) };
    let mut pending = vec![serde_json::to_value(&definition.image).unwrap_or_default()];
    while let Some(value) = pending.pop() {
        match value {
            serde_json::Value::String(text) => {
                let place = || "the image's configuration or history".to_owned();
                leaks.check(text.as_bytes(), place).map_err(|leak| {
                    let help = "an ARG or ENV with a secret can be read by everybody who has the image: use RUN \
                                --mount=type=secret; --allow-secret-leak turns this check off";
                    CommandError::new(Exit::Step, &leak, Some(help.to_owned()))
                })?;
            }
            serde_json::Value::Array(values) => pending.extend(values),
            serde_json::Value::Object(members) => pending.extend(members.into_iter().map(|(_, value)| value)),
            _ => {}
        }
    }
    Ok(())
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
            IgnoreError::TooComplex { .. } => "use fewer wildcards and classes of characters".to_owned(),
            IgnoreError::BadPattern { .. } => "close `[` with `]`, or write `[[]` for the character itself".to_owned(),
        });
        let text = std::fs::read(path).map(|bytes| parser::decode(&bytes)).unwrap_or_default();
        // Its last component says enough: it lies beside the Dockerfile or at the top of the context.
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let file = SourceFile::new(name, text);
        let wanted = match source {
            IgnoreError::EmptyException => "!",
            IgnoreError::BadPattern { pattern } | IgnoreError::TooComplex { pattern } => pattern.as_str(),
        };
        let word = blame::line_of(&file.text, wanted);
        failure.place = Some(Place::word(&file, word));
    }
    CommandError::Failure(Box::new(failure))
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
        let digests = DigestCache::open(&store.part("context").join(name));
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
    dockerfile: &Dockerfile,
    options: &lower::Options,
    workspace: &Workspace,
    events: &(dyn Fn(Event) + Sync),
    found: &mut BTreeSet<Warning>,
) -> Result<(Definition, Images), CommandError> {
    let source = &dockerfile.source;
    let mut bases = BaseConfigs::new();
    let mut images = Images::new();
    loop {
        let in_file = |diagnostics: Vec<Diagnostic>| CommandError::Dockerfile { source: source.clone(), diagnostics };
        let (result, warnings) = lower::lower(dockerfile, options, &bases).map_err(in_file)?;
        match result {
            Lowered::Graph(definition) => {
                for warning in warnings.into_iter().filter(|warning| found.insert(warning.clone())) {
                    let (line, column) = source.line_column(warning.span.start);
                    events(Event::Check {
                        rule: warning.rule.name(),
                        message: warning.message,
                        url: warning.url,
                        file: source.name.clone(),
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

/// Name servers for steps. A network of their own has another loopback than the one that a resolver of this machine
/// listens on; systemd says whom that one asks.
fn resolv_conf(own_loopback: bool) -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let text = read("/etc/resolv.conf");
    let local = |line: &str| line.strip_prefix("nameserver").is_some_and(|server| server.trim().starts_with("127."));
    if own_loopback && text.lines().any(local) {
        let behind = read("/run/systemd/resolve/resolv.conf");
        if !behind.is_empty() {
            return behind;
        }
    }
    text
}

fn host(request: &BuildRequest, agents: &SshAgents) -> Result<Host, CommandError> {
    let mut host = Host {
        resolv_conf: resolv_conf(request.pasta),
        default_network_none: request.network == Network::None,
        step_timeout: request.step_timeout,
        key_warnings: !request.no_secret_warnings,
        isolation: request.isolation,
        ..Host::default()
    };
    for secret in &request.secrets {
        host.secrets.insert(secret.id.clone(), secret.read()?);
    }
    if !request.allow_secret_leak {
        host.leaks = LeakScan::new(&host.secrets).map(Arc::new);
    }
    host.ssh = agents.sockets().clone();
    Ok(host)
}

/// What a step's limits had to do with its end.
fn limit_notes(exceeded: &Exceeded, limits: &Limits) -> Vec<String> {
    let mut notes = Vec::new();
    if exceeded.killed > 0 {
        let memory = limits.memory_bytes.filter(|_| exceeded.own_memory);
        notes.push(match memory {
            Some(bytes) => format!("killed: over --memory {}", binary_size(bytes)),
            None => "killed: the machine, or a control group above the step's, ran out of memory".to_owned(),
        });
    }
    if let (Some(most), 1..) = (limits.processes, exceeded.refused_processes) {
        notes.push(format!("new processes were refused: over --pids-limit {most}"));
    }
    notes
}

/// A size as it is typed: `64m`.
fn binary_size(bytes: u64) -> String {
    let unit =
        [(1 << 30, "g"), (1 << 20, "m"), (1 << 10, "k")].into_iter().find(|(size, _)| bytes.is_multiple_of(*size));
    unit.map_or_else(|| bytes.to_string(), |(size, unit)| format!("{}{unit}", bytes / size))
}

fn solve_error(error: SolveError, steps: &blame::Steps<'_>, limits: &Limits) -> CommandError {
    match error {
        SolveError::Interrupted => CommandError::Interrupted,
        SolveError::Result { source } => CommandError::new(Exit::Dockerfile, &source, None),
        SolveError::Vertex { id, name, stage, lines, tail, log, source: cause, .. } => {
            let found = steps.blame(id, &cause);
            let source = steps.dockerfile.source.clone();
            let place = lines.map(|lines| Place { source, lines, word: found.word });
            let outcome = match &*cause {
                VertexError::Run(RunError::Exit { code, program, disk_full, exceeded }) => {
                    Some((StepOutcome::Exit { code: *code, disk_full: *disk_full }, program.clone(), exceeded))
                }
                VertexError::Run(RunError::Signal { signal, exceeded }) => {
                    Some((StepOutcome::Signal(*signal), String::new(), exceeded))
                }
                _ => None,
            };
            if let Some((outcome, program, exceeded)) = outcome {
                let limits = limit_notes(exceeded, limits);
                let failure = StepFailure { name, stage, program, outcome, limits, place, tail, log };
                return CommandError::Step(Box::new(failure));
            }
            let exit = match &*cause {
                VertexError::Run(RunError::Sandbox(_) | RunError::Emulator(_)) => Exit::Host,
                VertexError::Run(RunError::Snapshot(error)) => export_command::snapshot_exit(error),
                VertexError::Run(RunError::Store(_) | RunError::Io { .. }) | VertexError::Store(_) => Exit::Store,
                VertexError::Run(_) | VertexError::Leak(_) => Exit::Step,
                VertexError::Source(_) | VertexError::Git(_) | VertexError::Unpack(_) => Exit::Source,
                VertexError::Snapshot(error) => export_command::snapshot_exit(error),
                VertexError::Context(_) | VertexError::NoContext(_) => Exit::Dockerfile,
                _ => Exit::General,
            };
            let message = with_causes(&*cause);
            let help = found.help.or_else(|| disk_help(&*cause));
            CommandError::Failure(Box::new(Failure { exit, message, place, help }))
        }
    }
}
