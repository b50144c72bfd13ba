//! From instructions to the build graph.
//!
//! [`lower`] is pure. Without the configurations of the base images it can say which ones it needs; called again with
//! them it gives the graph. Only what the target needs is lowered, in the order of the file. Each stage carries a
//! [`State`]: the vertex on top, the variables in force and the image configuration so far. A stage built on another one
//! begins with a copy of that stage's last state.
//!
//! Three sets of variables are easily mixed up:
//!
//! | set | holds | seen by |
//! |---|---|---|
//! | global arguments | ARGs before the first FROM, predefined ones | FROM; default of an ARG without value |
//! | variables of the state | ENV and ARG in the order of the file, the last one wins | expansion and RUN |
//! | ENV of the configuration | ENV only | the image |

mod config;
mod copy;
pub(crate) mod environment;
mod git_url;
pub(crate) mod mount;
mod run;
mod text;
mod vertices;

pub use git_url::{GitUrl, GitUrlError, without_credentials};
pub use vertices::with_digest;

use crate::check::{self, IgnoreRules, Reporter, Rule, Selection, Warning};
use crate::diagnostic::{Diagnostic, Problem, did_you_mean};
use crate::image_config::{DEFAULT_PATH, ImageConfig, split_env};
use crate::instruction::{Dockerfile, Instruction, InstructionKind, Text};
use crate::llb::{Definition, Image, ImageSource, Network, Op, Platform, Source, Vertex, VertexId};
use crate::lower_problem::LowerProblem;
use crate::outline::Outline;
use crate::parser;
use crate::platform;
use crate::source::Span;
use crate::stage::{Base, Command, External, Plan, SourceRef, problem};
use crate::units;
use crate::word::{Lexer, Variables, WordError};
use environment::Environment;
use std::borrow::Cow;
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;

/// What the caller asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// `--target`; `None` is the last stage.
    pub target: Option<String>,
    /// Lower every stage, not only those that the target needs: for checks.
    pub all_stages: bool,
    /// `--build-arg`; `None` where the caller had no value, which leaves the argument unset.
    pub build_args: BTreeMap<String, Option<String>>,
    /// `--label`, in order.
    pub labels: Vec<(String, String)>,
    /// `--platform`.
    pub platform: Option<Platform>,
    /// Platform of this machine, or what stands for it.
    pub build_platform: Platform,
    /// `--build-context`, by name; `name::os/arch` is for one platform only. The name `context` replaces the main context.
    pub contexts: BTreeMap<String, NamedContext>,
    /// `--no-cache`.
    pub no_cache: bool,
    /// `--no-cache-filter`: stage names.
    pub no_cache_filter: Vec<String>,
    /// `--network`.
    pub network: Network,
    /// `--add-host`: name and address.
    pub extra_hosts: Vec<(String, String)>,
    /// `--ulimit`: name, soft, hard.
    pub ulimits: Vec<(String, i64, i64)>,
    /// `--shm-size`.
    pub shm_size_bytes: Option<u64>,
    /// `--cgroup-parent`.
    pub cgroup_parent: Option<String>,
    /// Host name of steps.
    pub hostname: Option<String>,
    /// SOURCE_DATE_EPOCH of the caller's environment; the build arg of that name wins.
    pub source_date_epoch: Option<i64>,
    /// More than one platform is built: step names say which.
    pub multi_platform: bool,
    /// `--allow security.insecure`.
    pub allow_insecure: bool,
    /// `--allow network.host`.
    pub allow_network_host: bool,
    /// What the main context leaves out, for the check CopyIgnoredFile; `None` when that is nothing or not known.
    pub ignored: Option<IgnoreRules>,
    /// Only look: go on without configurations that are not given, and report nothing that may come from them. What the
    /// checks find stays a warning, whatever the file says.
    pub check_only: bool,
}

impl Options {
    /// Defaults of everything, on this platform.
    pub fn new(build_platform: Platform) -> Self {
        Self {
            target: None,
            all_stages: false,
            build_args: BTreeMap::new(),
            labels: Vec::new(),
            platform: None,
            build_platform,
            contexts: BTreeMap::new(),
            no_cache: false,
            no_cache_filter: Vec::new(),
            network: Network::Default,
            extra_hosts: Vec::new(),
            ulimits: Vec::new(),
            shm_size_bytes: None,
            cgroup_parent: None,
            hostname: None,
            source_date_epoch: None,
            multi_platform: false,
            allow_insecure: false,
            allow_network_host: false,
            ignored: None,
            check_only: false,
        }
    }
}

/// What `--build-context` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NamedContext {
    /// A directory of the caller.
    Local,
    /// An image. The reference `docker.io/library/scratch:latest` is the empty file system.
    Image(ImageSource),
    /// A file fetched by HTTP(S).
    Http(String),
    /// A repository; see [`GitUrl::parse`].
    Git {
        /// Address as `git fetch` takes it.
        remote: String,
        /// Branch, tag or commit; empty is the default branch.
        reference: String,
        /// Directory below the top.
        subdir: String,
        /// Keep `.git`.
        keep_git_dir: bool,
        /// Digits that the commit must start with.
        checksum: Option<String>,
        /// Fetch submodules.
        submodules: bool,
    },
    /// A stage of the same file.
    Target(String),
    /// An input that the caller gives in another way; not usable yet.
    Input,
}

/// An image whose configuration is needed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BaseRequest {
    /// Which image.
    pub source: ImageSource,
    /// For which platform.
    pub platform: Platform,
}

/// What the caller found out about an image.
#[derive(Debug, Clone, PartialEq)]
pub struct BaseImage {
    /// Its configuration.
    pub config: ImageConfig,
    /// Its digest, so that the build uses exactly what the configuration was read from.
    pub digest: Option<String>,
}

/// Configurations known so far.
pub type BaseConfigs = BTreeMap<BaseRequest, BaseImage>;

/// Images whose configurations are needed, each with the place that names it.
pub type MissingBases = BTreeMap<BaseRequest, Span>;

/// Result of [`lower`].
#[derive(Debug, Clone, PartialEq)]
pub enum Lowered {
    /// These configurations are needed first: all that can be named by now.
    NeedsBases(MissingBases),
    /// The graph.
    Graph(Box<Definition>),
}

/// Lowers a file.
///
/// # Errors
/// All independent mistakes.
pub fn lower(
    file: &Dockerfile,
    options: &Options,
    bases: &BaseConfigs,
) -> Result<(Lowered, Vec<Warning>), Vec<Diagnostic>> {
    lower_and_outline(file, options, bases).map(|(lowered, warnings, _)| (lowered, warnings))
}

/// As [`lower`]; also tells what can be given to a build. The outline is complete with the graph.
///
/// # Errors
/// All independent mistakes.
pub fn lower_and_outline(
    file: &Dockerfile,
    options: &Options,
    bases: &BaseConfigs,
) -> Result<(Lowered, Vec<Warning>, Outline), Vec<Diagnostic>> {
    let mut build_args: BTreeMap<String, String> =
        options.build_args.iter().filter_map(|(name, value)| Some((name.clone(), value.clone()?))).collect();
    if let Some(epoch) = options.source_date_epoch {
        build_args.entry("SOURCE_DATE_EPOCH".to_owned()).or_insert_with(|| epoch.to_string());
    }
    let checks = build_args.get("BUILDKIT_DOCKERFILE_CHECK").map(String::as_str);
    let selection = Selection::of(file, checks);
    let checks_are_errors = selection.is_error() && !options.check_only;
    let mut reporter = Reporter::new(selection);
    check::static_checks(file, &mut reporter);
    let mut plan = Plan::new(file, options, &build_args, &mut reporter)?;

    let lexer = Lexer::new(file.escape);
    let (needed, missing) = reachable(&mut plan, options, bases, &lexer)?;
    if !missing.is_empty() {
        return Ok((Lowered::NeedsBases(missing), reporter.into_warnings(), Outline::default()));
    }

    let epoch = epoch(&build_args, &plan.global_args)
        .map_err(|problem| vec![Diagnostic { problem: Problem::Lower(problem), span: None }])?;
    let shared = Shared {
        file,
        options,
        bases,
        plan: &plan,
        created: epoch.map(text::rfc3339),
        proxies: proxies(&build_args),
        cache_namespace: build_args.get("BUILDKIT_CACHE_MOUNT_NS").cloned().unwrap_or_default(),
        hostname: options.hostname.clone().or_else(|| build_args.get("BUILDKIT_SANDBOX_HOSTNAME").cloned()),
        build_args,
        lexer,
        budget: Cell::new(MAX_TEXT),
    };
    let mut graph = Graph::default();
    let mut problems = Vec::new();
    let mut states: Vec<Option<State>> = vec![None; plan.stages.len()];
    for index in 0..plan.stages.len() {
        if needed[index] {
            let lowering = StageLowering::new(&shared, index, &states, &mut graph, &mut reporter, &mut problems);
            let state = lowering.run();
            states[index] = Some(state);
        }
    }
    let warnings = reporter.into_warnings();
    if checks_are_errors {
        problems.extend(warnings.iter().map(|warning| {
            let check = LowerProblem::Check { rule: warning.rule.name(), message: warning.message.clone() };
            problem(warning.span, check)
        }));
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    let Some(state) = take_with_history(&mut states, plan.target) else {
        return Err(vec![Diagnostic { problem: Problem::NoStage, span: None }]);
    };
    let used: Vec<&Instruction> =
        plan.stages.iter().zip(&needed).filter(|(_, needed)| **needed).map(|(stage, _)| stage.from).collect();
    graph.outline.global_args(file, &used, &plan.global_args, &shared.lexer);
    let outline = graph.outline.finish(plan.stages[plan.target].from);
    let image = finish(state, options, &plan.target_platform, shared.created.clone());
    let definition = Definition { vertices: graph.vertices, image };
    Ok((Lowered::Graph(Box::new(definition)), warnings, outline))
}

/// The state of a stage, with the history of the stages that it is built on before its own.
fn take_with_history(states: &mut [Option<State>], index: usize) -> Option<State> {
    let mut state = states[index].take()?;
    let mut parts = vec![std::mem::take(&mut state.image.history)];
    let mut parent = state.parent;
    while let Some(stage) = parent.and_then(|parent| states[parent].as_ref()) {
        parts.push(stage.image.history.clone());
        parent = stage.parent;
    }
    state.image.history = parts.into_iter().rev().flatten().collect();
    Some(state)
}

/// Which stages the target needs, with the triggers of their bases put in; and the configurations that are missing.
fn reachable(
    plan: &mut Plan<'_>,
    options: &Options,
    bases: &BaseConfigs,
    lexer: &Lexer,
) -> Result<(Vec<bool>, MissingBases), Vec<Diagnostic>> {
    let mut needed = vec![false; plan.stages.len()];
    // Looked for once: very many stages may be built on a long one.
    let triggers_of: Vec<Vec<String>> = plan
        .stages
        .iter()
        .map(|stage| stage.commands.iter().filter_map(|command| onbuild_text(&command.instruction)).collect())
        .collect();
    let mut missing = BTreeMap::new();
    let mut problems = Vec::new();
    let mut todo = if options.all_stages { (0..plan.stages.len()).collect() } else { vec![plan.target] };
    while let Some(index) = todo.pop() {
        if std::mem::replace(&mut needed[index], true) {
            continue;
        }
        let stage = &plan.stages[index];
        let triggers: Vec<String> = match &stage.base {
            Base::Stage(base) => {
                todo.push(*base);
                triggers_of[*base].clone()
            }
            Base::External(External::Image { source, platform, .. }) => {
                let request = BaseRequest { source: source.clone(), platform: platform.clone() };
                match bases.get(&request) {
                    Some(base) => base.config.config.on_build.clone(),
                    None => {
                        if !options.check_only {
                            missing.insert(request, stage.image_span());
                        }
                        Vec::new()
                    }
                }
            }
            Base::External(_) => Vec::new(),
        };
        if !triggers.is_empty() && !stage.replaced {
            let mut commands = Vec::new();
            for trigger in triggers {
                match trigger_command(plan, index, trigger, options, lexer) {
                    Ok(command) => commands.push(command),
                    Err(more) => problems.extend(more),
                }
            }
            plan.stages[index].commands.splice(0..0, commands);
        }
        for source in plan.stages[index].commands.iter().flat_map(|command| command.sources.iter().flatten()) {
            if let SourceRef::Stage(stage) = source {
                todo.push(*stage);
            }
        }
    }
    if problems.is_empty() { Ok((needed, missing)) } else { Err(problems) }
}

fn onbuild_text(instruction: &Instruction) -> Option<String> {
    match &instruction.kind {
        InstructionKind::Onbuild { text, .. } => Some(text.value.clone()),
        _ => None,
    }
}

/// Reads a trigger for the stage `index`.
fn trigger_command<'a>(
    plan: &Plan<'a>,
    index: usize,
    trigger: String,
    options: &Options,
    lexer: &Lexer,
) -> Result<Command<'a>, Vec<Diagnostic>> {
    let stage = &plan.stages[index];
    let base = stage.base_name.clone();
    let wrap = |diagnostic: Diagnostic| in_trigger(diagnostic, &trigger, &base, stage.from.span);
    // A trigger is a file of its own, without directives: its escape character is the default one.
    let mut instruction =
        parser::parse_trigger(&trigger, '\\').map_err(|all| all.into_iter().map(wrap).collect::<Vec<_>>())?;
    let sources = plan.sources(&instruction, options, lexer).map_err(|one| vec![wrap(one)])?;
    instruction.comments.clear();
    Ok(Command { instruction: Cow::Owned(instruction), sources, trigger: Some((trigger, base)) })
}

/// Says that a mistake is one of a trigger; its place is the FROM that fires it.
fn in_trigger(diagnostic: Diagnostic, trigger: &str, base: &str, span: Span) -> Diagnostic {
    let (trigger, base) = (trigger.to_owned(), base.to_owned());
    problem(span, LowerProblem::Trigger { trigger, base, problem: Box::new(diagnostic.problem) })
}

/// SOURCE_DATE_EPOCH as a build arg or a global ARG with a value; empty is none.
fn epoch(build_args: &BTreeMap<String, String>, global_args: &Environment) -> Result<Option<i64>, LowerProblem> {
    let name = "SOURCE_DATE_EPOCH";
    match build_args.get(name).map(String::as_str).or_else(|| global_args.get(name)) {
        None | Some("") => Ok(None),
        Some(value) => value.parse().map(Some).map_err(|_| LowerProblem::BadEpoch(value.to_owned())),
    }
}

/// Proxy settings among the build args, as variables of a step in both cases.
fn proxies(build_args: &BTreeMap<String, String>) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY"] {
        if let Some((_, value)) = build_args.iter().rfind(|(key, _)| key.eq_ignore_ascii_case(name)) {
            found.push((name.to_owned(), value.clone()));
            found.push((name.to_lowercase(), value.clone()));
        }
    }
    found
}

/// The target's image: `--label` on top, the platform that was asked for.
fn finish(state: State, options: &Options, target: &Platform, created: Option<String>) -> Image {
    let mut config = state.image;
    config.config.labels.extend(options.labels.iter().cloned());
    if options.platform.is_some() {
        let same = config.os == target.os && config.architecture == target.architecture;
        config.os.clone_from(&target.os);
        config.architecture.clone_from(&target.architecture);
        if !target.variant.is_empty() || !same {
            config.variant.clone_from(&target.variant);
        }
        if !same {
            config.other.retain(|key, _| !key.starts_with("os."));
        }
    }
    // A file tree as the only base says nothing about a platform.
    if config.os.is_empty() || config.architecture.is_empty() {
        config.os.clone_from(&target.os);
        config.architecture.clone_from(&target.architecture);
        config.variant.clone_from(&target.variant);
    }
    let platform = config.platform();
    let platform = platform::parse(&platform.to_string(), &options.build_platform).unwrap_or(platform);
    config.os.clone_from(&platform.os);
    config.architecture.clone_from(&platform.architecture);
    config.variant.clone_from(&platform.variant);
    for name in state.unrecorded_layers {
        config.commit(name, false, created.clone());
    }
    config.created = created;
    Image { top: state.top, config, platform }
}

/// What all stages of a build share.
struct Shared<'a> {
    file: &'a Dockerfile,
    options: &'a Options,
    bases: &'a BaseConfigs,
    plan: &'a Plan<'a>,
    build_args: BTreeMap<String, String>,
    lexer: Lexer,
    /// Bytes of text that variables may still make.
    budget: Cell<usize>,
    /// Date of new history entries, when it is known without a clock.
    created: Option<String>,
    proxies: Vec<(String, String)>,
    cache_namespace: String,
    hostname: Option<String>,
}

/// Most bytes that expansions, and environments of steps, may take in all; a file could ask for any number of them. Far
/// beyond what a real one needs.
const MAX_TEXT: usize = 256 << 20;

impl Shared<'_> {
    /// Takes some bytes off the budget.
    fn spend(&self, bytes: usize) -> Result<(), WordError> {
        let left = self.budget.get().checked_sub(bytes).ok_or(WordError::TooLong)?;
        self.budget.set(left);
        Ok(())
    }
}

/// Vertices made so far.
#[derive(Default)]
struct Graph {
    vertices: Vec<Vertex>,
    outline: Outline,
    /// Sources are fetched once, whoever uses them.
    sources: HashMap<(Source, Option<Platform>), VertexId>,
}

impl Graph {
    fn push(&mut self, vertex: Vertex) -> VertexId {
        self.vertices.push(vertex);
        VertexId(self.vertices.len() - 1)
    }

    fn source(&mut self, source: Source, vertex: impl FnOnce(Op) -> Vertex) -> VertexId {
        let vertex = vertex(Op::Source(source.clone()));
        // The platform selects an image; other files are the same for all.
        let platform = matches!(source, Source::Image(_)).then(|| vertex.platform.clone());
        if let Some(id) = self.sources.get(&(source.clone(), platform.clone())) {
            return *id;
        }
        let id = self.push(vertex);
        self.sources.insert((source, platform), id);
        id
    }
}

/// Where a stage stands after some of its instructions.
#[derive(Clone)]
struct State {
    top: Option<VertexId>,
    /// Stage that this one is built on. `image` has no history of that stage: a copy for each stage would make chains of
    /// stages slow.
    parent: Option<usize>,
    /// Variables of expansion and RUN; shared with the parent while they are the same.
    env: Rc<Environment>,
    /// Where variables stand in the configuration.
    image_env: Rc<HashMap<String, usize>>,
    /// Declared ARGs in order, for the history of RUN.
    build_args: Vec<(String, Option<String>)>,
    /// Their names.
    declared: Rc<HashSet<String>>,
    image: ImageConfig,
    platform: Platform,
    /// Descriptions of layers that no history entry belongs to: file trees as bases.
    unrecorded_layers: Vec<String>,
    workdir_set: bool,
    /// The base may set variables and a shell that nobody knows of.
    base_unknown: bool,
}

impl State {
    /// What a stage built on this one, number `parent`, begins with.
    fn child(&self, parent: usize) -> Self {
        let image = &self.image;
        let mut config = image.config.clone();
        // Triggers are for the direct child.
        config.on_build.clear();
        Self {
            top: self.top,
            parent: Some(parent),
            env: Rc::clone(&self.env),
            image_env: Rc::clone(&self.image_env),
            build_args: self.build_args.clone(),
            declared: Rc::clone(&self.declared),
            image: ImageConfig {
                created: image.created.clone(),
                author: image.author.clone(),
                architecture: image.architecture.clone(),
                variant: image.variant.clone(),
                os: image.os.clone(),
                config,
                rootfs: image.rootfs.clone(),
                history: Vec::new(),
                other: image.other.clone(),
            },
            platform: self.platform.clone(),
            unrecorded_layers: self.unrecorded_layers.clone(),
            workdir_set: self.workdir_set,
            base_unknown: self.base_unknown,
        }
    }

    /// Sets a variable of the image's configuration: in place where it exists, else at the end.
    fn set_image_env(&mut self, name: &str, value: &str) {
        let entry = format!("{name}={value}");
        let list = &mut self.image.config.env;
        match self.image_env.get(name).and_then(|&place| list.get_mut(place)) {
            Some(old) => *old = entry,
            None => {
                Rc::make_mut(&mut self.image_env).insert(name.to_owned(), list.len());
                list.push(entry);
            }
        }
    }

    /// Absolute and clean.
    fn cwd(&self) -> String {
        text::absolute("/", &self.image.config.working_dir)
    }

    /// Absolute, where a command starts: `..` in it is the kernel's to resolve, behind links.
    fn cwd_as_written(&self) -> String {
        let written = &self.image.config.working_dir;
        if written.starts_with('/') { written.clone() } else { self.cwd() }
    }
}

/// One stage while it is lowered.
struct StageLowering<'s, 'g> {
    shared: &'s Shared<'s>,
    index: usize,
    states: &'s [Option<State>],
    graph: &'g mut Graph,
    reporter: &'g mut Reporter,
    problems: &'g mut Vec<Diagnostic>,
    state: State,
    /// Name of the stage in step names; empty when there is only one.
    label: String,
    steps: usize,
    step: usize,
    ignore_cache: bool,
    /// Lines of the instruction that is lowered; of FROM, for triggers.
    lines: (u32, u32),
    /// CMD, ENTRYPOINT, HEALTHCHECK seen in this stage.
    seen: BTreeMap<&'static str, Span>,
}

impl<'s, 'g> StageLowering<'s, 'g> {
    fn new(
        shared: &'s Shared<'s>,
        index: usize,
        states: &'s [Option<State>],
        graph: &'g mut Graph,
        reporter: &'g mut Reporter,
        problems: &'g mut Vec<Diagnostic>,
    ) -> Self {
        let stage = &shared.plan.stages[index];
        let has_vertex = |command: &&Command<'_>| {
            matches!(
                command.instruction.kind,
                InstructionKind::Run { .. }
                    | InstructionKind::Copy(_)
                    | InstructionKind::Add(_)
                    | InstructionKind::Workdir(_)
            )
        };
        let from = usize::from(matches!(&stage.base, Base::External(base) if *base != External::Scratch));
        let label = match &stage.name {
            _ if shared.plan.stages.len() == 1 => String::new(),
            Some(name) => name.clone(),
            None => format!("stage-{index}"),
        };
        let options = shared.options;
        let filtered = |name: &String| options.no_cache_filter.iter().any(|filter| filter.eq_ignore_ascii_case(name));
        Self {
            shared,
            index,
            states,
            graph,
            reporter,
            problems,
            state: State {
                top: None,
                parent: None,
                env: Rc::default(),
                image_env: Rc::default(),
                build_args: Vec::new(),
                declared: Rc::default(),
                image: ImageConfig::default(),
                platform: stage.platform.clone().unwrap_or_else(|| shared.plan.target_platform.clone()),
                unrecorded_layers: Vec::new(),
                workdir_set: false,
                base_unknown: false,
            },
            label,
            steps: from + stage.commands.iter().filter(has_vertex).count(),
            step: 0,
            lines: stage.from.lines,
            ignore_cache: options.no_cache || stage.name.as_ref().is_some_and(filtered),
            seen: BTreeMap::new(),
        }
    }

    fn run(mut self) -> State {
        let stage = &self.shared.plan.stages[self.index];
        self.base();
        if self.state.parent.is_none() {
            let places = Rc::make_mut(&mut self.state.image_env);
            for (place, entry) in self.state.image.config.env.iter().enumerate() {
                places.entry(split_env(entry).0.to_owned()).or_insert(place);
            }
        }
        if stage.replaced {
            return self.state;
        }
        if !self.state.image_env.contains_key("PATH") {
            self.state.set_image_env("PATH", DEFAULT_PATH);
        }
        // ENV of the base wins over an ARG of the same name that a parent stage declared later.
        for entry in &self.state.image.config.env {
            let (name, value) = split_env(entry);
            if self.state.env.get(name) != Some(value) {
                Rc::make_mut(&mut self.state.env).set(name, value.to_owned());
            }
        }
        for command in &stage.commands {
            if let Err(found) = self.command(command) {
                self.problems.push(match &command.trigger {
                    Some((trigger, base)) => in_trigger(found, trigger, base, stage.from.span),
                    None => found,
                });
            }
        }
        self.state
    }

    /// Begins with the base.
    fn base(&mut self) {
        let stage = &self.shared.plan.stages[self.index];
        match &stage.base {
            Base::Stage(base) => {
                if let Some(state) = &self.states[*base] {
                    self.state = state.child(*base);
                }
            }
            Base::External(External::Scratch) => {
                self.state.platform = self.shared.plan.target_platform.clone();
                self.state.image = match stage.replaced {
                    true => ImageConfig::default(),
                    false => ImageConfig::scratch(&self.state.platform),
                };
            }
            Base::External(External::Image { source, platform, name }) => {
                let request = BaseRequest { source: source.clone(), platform: platform.clone() };
                let Some(base) = self.shared.bases.get(&request) else {
                    self.state.base_unknown = true;
                    return;
                };
                self.state.image = base.config.inherited();
                let actual = base.config.platform();
                if !actual.os.is_empty() && (actual.os != platform.os || actual.architecture != platform.architecture) {
                    let message = format!("base image `{name}` is for {actual}, wanted is {platform}");
                    self.reporter.report(Rule::InvalidBaseImagePlatform, stage.from, stage.from.span, message);
                }
                if !base.config.has_no_layers() {
                    let id = self.image_vertex(source, platform, name);
                    self.state.top = Some(id);
                }
            }
            Base::External(External::Files { source, context }) => {
                if !stage.replaced {
                    self.state.image = ImageConfig::scratch(&self.state.platform);
                }
                self.state.unrecorded_layers.push(match source {
                    Source::Local { name } => format!("local source for {name}"),
                    Source::Http { url, .. } => without_credentials(url),
                    Source::Git { remote, .. } => without_credentials(remote),
                    Source::Image(_) => context.clone(),
                });
                self.state.top = Some(self.files_vertex(source, context));
            }
        }
    }

    fn commit(&mut self, created_by: String, empty_layer: bool) {
        self.state.image.commit(created_by, empty_layer, self.shared.created.clone());
    }

    fn report(&mut self, rule: Rule, instruction: &Instruction, trigger: bool, span: Span, message: String) {
        let from = self.shared.plan.stages[self.index].from;
        match trigger {
            true => self.reporter.report(rule, from, from.span, message),
            false => self.reporter.report(rule, instruction, span, message),
        }
    }

    /// Expands a word with the variables in force.
    fn expand(&mut self, at: &At<'_>, text: &Text) -> Result<String, Diagnostic> {
        self.expand_with(at, &self.shared.lexer, &text.value, text.span)
    }

    fn expand_with(&mut self, at: &At<'_>, lexer: &Lexer, text: &str, span: Span) -> Result<String, Diagnostic> {
        let at_span = |error: WordError| Diagnostic::at(span, error.into());
        let expanded = lexer.word(text, &*self.state.env).map_err(at_span)?;
        self.shared.spend(expanded.value.len().saturating_sub(text.len())).map_err(at_span)?;
        for name in &expanded.unmatched {
            self.undefined(at, name, span);
        }
        Ok(expanded.value)
    }

    fn undefined(&mut self, at: &At<'_>, name: &str, span: Span) {
        if self.state.base_unknown || self.state.declared.contains(name) {
            return;
        }
        let hint = did_you_mean(name, self.state.env.names()).map(|name| format!(" (did you mean `${name}`?)"));
        let message = format!("variable `${name}` is not defined{}", hint.unwrap_or_default());
        let span = at.source.get(span.start..span.end).map_or(span, |text| use_of_variable(text, span, name));
        self.report(Rule::UndefinedVar, at.instruction, at.trigger, span, message);
    }

    fn command(&mut self, command: &Command<'_>) -> Result<(), Diagnostic> {
        let instruction: &Instruction = &command.instruction;
        self.lines = match &command.trigger {
            Some(_) => self.shared.plan.stages[self.index].from.lines,
            None => instruction.lines,
        };
        let at = At { instruction, trigger: command.trigger.is_some(), source: self.source_text(command) };
        match &instruction.kind {
            InstructionKind::From { .. } => Ok(()),
            InstructionKind::Arg(pairs) => self.arg(&at, pairs),
            InstructionKind::Env { pairs, .. } => self.env(&at, pairs),
            InstructionKind::Label { pairs, .. } => self.label(&at, pairs),
            InstructionKind::Run { flags, command: line, heredocs } => {
                self.run_command(&at, flags, line, heredocs, &command.sources)
            }
            InstructionKind::Copy(copy) => self.copy(&at, copy, false, command.sources.first()),
            InstructionKind::Add(copy) => self.copy(&at, copy, true, None),
            InstructionKind::Cmd(line) => {
                let args = self.command_line(&at, "CMD", line);
                self.commit(format!("CMD {}", text::go_quoted_list(&args)), true);
                self.state.image.config.cmd = Some(args).filter(|args| !args.is_empty());
                self.state.image.config.args_escaped = true;
                Ok(())
            }
            InstructionKind::Entrypoint(line) => {
                let args = self.command_line(&at, "ENTRYPOINT", line);
                self.commit(format!("ENTRYPOINT {}", text::go_quoted_list(&args)), true);
                self.state.image.config.entrypoint = Some(args).filter(|args| !args.is_empty());
                if !self.seen.contains_key("CMD") {
                    // The CMD of the base belonged to another program.
                    self.state.image.config.cmd = None;
                }
                Ok(())
            }
            InstructionKind::Shell(line) => {
                self.commit(format!("SHELL [{}]", line.args.join(" ")), true);
                self.state.image.config.shell = Some(line.args.clone());
                Ok(())
            }
            InstructionKind::Workdir(path) => self.workdir(&at, path),
            InstructionKind::User(user) => {
                let user = self.expand(&at, user)?;
                self.commit(format!("USER {user}"), true);
                self.state.image.config.user = user;
                Ok(())
            }
            InstructionKind::Expose(words) => self.expose(&at, words),
            InstructionKind::Volume(paths) => self.volume(&at, paths),
            InstructionKind::StopSignal(signal) => {
                let value = self.expand(&at, signal)?;
                units::parse_signal(&value).map_err(|error| problem(signal.span, error.into()))?;
                self.commit(format!("STOPSIGNAL {value}"), true);
                self.state.image.config.stop_signal = value;
                Ok(())
            }
            InstructionKind::Maintainer(name) => {
                self.commit(format!("MAINTAINER {}", name.value), true);
                self.state.image.author = Some(name.value.clone());
                Ok(())
            }
            InstructionKind::Healthcheck(check) => {
                self.healthcheck(&at, check);
                Ok(())
            }
            InstructionKind::Onbuild { text, .. } => {
                self.state.image.config.on_build.push(text.value.clone());
                Ok(())
            }
        }
    }

    /// The text that the spans of an instruction point into.
    fn source_text<'c>(&self, command: &'c Command<'_>) -> &'c str
    where
        's: 'c,
    {
        match &command.trigger {
            Some((trigger, _)) => trigger,
            None => &self.shared.file.source.text,
        }
    }
}

/// The first `$NAME` or `${NAME…` of a text that stands at `span`; all of it when there is none.
pub(crate) fn use_of_variable(text: &str, span: Span, name: &str) -> Span {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    for (at, _) in text.match_indices('$') {
        let rest = &text[at + 1..];
        let (rest, braces) = rest.strip_prefix('{').map_or((rest, 0), |rest| (rest, 1));
        let Some(after) = rest.strip_prefix(name).filter(|after| !after.starts_with(is_name)) else { continue };
        let closed = usize::from(braces == 1 && after.starts_with('}'));
        return Span::new(span.start + at, span.start + at + 1 + braces + name.len() + closed);
    }
    span
}

/// Where an instruction stands.
struct At<'c> {
    instruction: &'c Instruction,
    /// It is a trigger of the base.
    trigger: bool,
    /// What its spans point into.
    source: &'c str,
}

#[cfg(test)]
mod tests;
