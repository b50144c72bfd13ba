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

mod copy;
mod git_url;
pub(crate) mod mount;
mod run;
mod text;

pub use git_url::{GitUrl, GitUrlError};

use crate::check::{self, Reporter, Rule, Selection, Warning, is_secret_name};
use crate::diagnostic::{Diagnostic, Problem, did_you_mean};
use crate::image_config::{DEFAULT_PATH, Healthcheck, ImageConfig, split_env};
use crate::instruction::{
    Command as CommandLine, Dockerfile, HealthcheckInstruction, Instruction, InstructionKind, Text,
};
use crate::llb::{Definition, Image, ImageSource, MkdirOp, Network, Op, Platform, Source, Vertex, VertexId};
use crate::lower_problem::LowerProblem;
use crate::parser;
use crate::platform;
use crate::source::Span;
use crate::stage::{Base, Command, External, Plan, SourceRef, problem, set_variable, variable};
use crate::units;
use crate::word::{Lexer, Variables};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// What the caller asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// `--target`; `None` is the last stage.
    pub target: Option<String>,
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
}

impl Options {
    /// Defaults of everything, on this platform.
    pub fn new(build_platform: Platform) -> Self {
        Self {
            target: None,
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
    },
    /// The result of another target of a bake file; the caller puts its image in place before it lowers.
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

/// Result of [`lower`].
#[derive(Debug, Clone, PartialEq)]
pub enum Lowered {
    /// These configurations are needed first: all that can be named by now.
    NeedsBases(BTreeSet<BaseRequest>),
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
    let mut build_args: BTreeMap<String, String> =
        options.build_args.iter().filter_map(|(name, value)| Some((name.clone(), value.clone()?))).collect();
    if let Some(epoch) = options.source_date_epoch {
        build_args.entry("SOURCE_DATE_EPOCH".to_owned()).or_insert_with(|| epoch.to_string());
    }
    let checks = build_args.get("BUILDKIT_DOCKERFILE_CHECK").map(String::as_str);
    let selection = Selection::of(file, checks);
    let checks_are_errors = selection.is_error();
    let mut reporter = Reporter::new(selection);
    check::static_checks(file, &mut reporter);
    let mut plan = Plan::new(file, options, &build_args, &mut reporter)?;

    let lexer = Lexer::new(file.escape);
    let (needed, missing) = reachable(&mut plan, options, bases, &lexer)?;
    if !missing.is_empty() {
        return Ok((Lowered::NeedsBases(missing), reporter.into_warnings()));
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
    let Some(state) = states.swap_remove(plan.target) else {
        return Err(vec![Diagnostic { problem: Problem::Lower(LowerProblem::NoStages), span: None }]);
    };
    let image = finish(state, options, &plan.target_platform, shared.created.clone());
    let definition = Definition { vertices: graph.vertices, image };
    Ok((Lowered::Graph(Box::new(definition)), warnings))
}

/// Which stages the target needs, with the triggers of their bases put in; and the configurations that are missing.
fn reachable(
    plan: &mut Plan<'_>,
    options: &Options,
    bases: &BaseConfigs,
    lexer: &Lexer,
) -> Result<(Vec<bool>, BTreeSet<BaseRequest>), Vec<Diagnostic>> {
    let mut needed = vec![false; plan.stages.len()];
    let mut missing = BTreeSet::new();
    let mut problems = Vec::new();
    let mut todo = vec![plan.target];
    while let Some(index) = todo.pop() {
        if std::mem::replace(&mut needed[index], true) {
            continue;
        }
        let stage = &plan.stages[index];
        let triggers: Vec<String> = match &stage.base {
            Base::Stage(base) => {
                todo.push(*base);
                let commands = plan.stages[*base].commands.iter();
                commands.filter_map(|command| onbuild_text(&command.instruction)).collect()
            }
            Base::External(External::Image { source, platform, .. }) => {
                let request = BaseRequest { source: source.clone(), platform: platform.clone() };
                match bases.get(&request) {
                    Some(base) => base.config.config.on_build.clone(),
                    None => {
                        missing.insert(request);
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
    if let InstructionKind::From { .. } | InstructionKind::Onbuild { .. } | InstructionKind::Maintainer(_) =
        instruction.kind
    {
        let keyword = instruction.keyword.value.to_uppercase();
        return Err(vec![wrap(problem(instruction.span, LowerProblem::NotATrigger(keyword)))]);
    }
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
fn epoch(build_args: &BTreeMap<String, String>, global_args: &[(String, String)]) -> Result<Option<i64>, LowerProblem> {
    let name = "SOURCE_DATE_EPOCH";
    match build_args.get(name).map(String::as_str).or_else(|| variable(global_args, name)) {
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
    /// Date of new history entries, when it is known without a clock.
    created: Option<String>,
    proxies: Vec<(String, String)>,
    cache_namespace: String,
    hostname: Option<String>,
}

/// Vertices made so far.
#[derive(Default)]
struct Graph {
    vertices: Vec<Vertex>,
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
    /// Variables of expansion and RUN.
    env: Vec<(String, String)>,
    /// Declared ARGs in order, for the history of RUN.
    build_args: Vec<(String, Option<String>)>,
    image: ImageConfig,
    platform: Platform,
    /// Descriptions of layers that no history entry belongs to: file trees as bases.
    unrecorded_layers: Vec<String>,
    workdir_set: bool,
}

impl State {
    /// Absolute and clean.
    fn cwd(&self) -> String {
        text::absolute("/", &self.image.config.working_dir)
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
                env: Vec::new(),
                build_args: Vec::new(),
                image: ImageConfig::default(),
                platform: stage.platform.clone().unwrap_or_else(|| shared.plan.target_platform.clone()),
                unrecorded_layers: Vec::new(),
                workdir_set: false,
            },
            label,
            steps: from + stage.commands.iter().filter(has_vertex).count(),
            step: 0,
            ignore_cache: options.no_cache || stage.name.as_ref().is_some_and(filtered),
            seen: BTreeMap::new(),
        }
    }

    fn run(mut self) -> State {
        let stage = &self.shared.plan.stages[self.index];
        self.base();
        if stage.replaced {
            return self.state;
        }
        if !self.state.image.config.env.iter().any(|entry| split_env(entry).0 == "PATH") {
            self.state.image.config.env.push(format!("PATH={DEFAULT_PATH}"));
        }
        // ENV of the base wins over an ARG of the same name that a parent stage declared later.
        for entry in self.state.image.config.env.clone() {
            let (name, value) = split_env(&entry);
            set_variable(&mut self.state.env, name, value.to_owned());
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
                    self.state = state.clone();
                    // Triggers are for the direct child.
                    self.state.image.config.on_build.clear();
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
                let Some(base) = self.shared.bases.get(&request) else { return };
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
                    Source::Http { url, .. } => url.clone(),
                    Source::Git { remote, .. } => remote.clone(),
                    Source::Image(_) => context.clone(),
                });
                self.state.top = Some(self.files_vertex(source, context));
            }
        }
    }

    /// The vertex of FROM's image.
    fn image_vertex(&mut self, source: &ImageSource, platform: &Platform, name: &str) -> VertexId {
        let source = pinned(source, platform, self.shared.bases);
        let stage = &self.shared.plan.stages[self.index];
        let text = match &source {
            ImageSource::Reference(reference) => format!("FROM {reference}"),
            ImageSource::OciLayout { .. } => format!("FROM {name}"),
        };
        let step_name = self.step_name(&text, false, &[]);
        let (lines, label) = (Some(stage.from.lines), stage.label(self.index));
        let platform = platform.clone();
        self.graph.source(Source::Image(source), |op| Vertex {
            op,
            inputs: Vec::new(),
            name: step_name,
            stage: label,
            text,
            lines,
            platform,
            ignore_cache: false,
        })
    }

    /// The vertex of a context: no stage owns it.
    fn files_vertex(&mut self, source: &Source, context: &str) -> VertexId {
        let name = match source {
            Source::Local { .. } if context == "context" => "[internal] load build context".to_owned(),
            Source::Local { .. } => format!("[context {context}] load from client"),
            Source::Http { url, .. } => format!("[context {context}] {url}"),
            Source::Git { remote, .. } => format!("[context {context}] {remote}"),
            Source::Image(_) => format!("[context {context}]"),
        };
        let platform = self.shared.plan.target_platform.clone();
        self.graph.source(source.clone(), |op| Vertex {
            op,
            inputs: Vec::new(),
            text: name.clone(),
            name,
            stage: String::new(),
            lines: None,
            platform,
            ignore_cache: false,
        })
    }

    /// The main context, or what the caller put in its place.
    fn main_context(&mut self) -> Result<Option<VertexId>, LowerProblem> {
        let external = match self.shared.options.contexts.get("context") {
            None => {
                let source = Source::Local { name: "context".to_owned() };
                External::Files { source, context: "context".to_owned() }
            }
            Some(context) => crate::stage::from_context("context", context, &self.shared.plan.target_platform)?,
        };
        Ok(self.external_vertex(&external))
    }

    /// An image or context that is read but not built on.
    fn external_vertex(&mut self, external: &External) -> Option<VertexId> {
        match external {
            External::Scratch => None,
            External::Files { source, context } => Some(self.files_vertex(source, context)),
            External::Image { source, platform, name } => {
                let pinned = pinned(source, platform, self.shared.bases);
                let text = match &pinned {
                    ImageSource::Reference(reference) => format!("FROM {reference}"),
                    ImageSource::OciLayout { .. } => format!("[context {name}] OCI load from client"),
                };
                let platform = platform.clone();
                Some(self.graph.source(Source::Image(pinned), |op| Vertex {
                    op,
                    inputs: Vec::new(),
                    name: text.clone(),
                    stage: String::new(),
                    text,
                    lines: None,
                    platform,
                    ignore_cache: false,
                }))
            }
        }
    }

    /// File system that `--from` names. The outer `None` of the result does not exist; the inner is the empty one.
    fn source_vertex(&mut self, source: &SourceRef, span: Span) -> Result<Option<VertexId>, Diagnostic> {
        match source {
            SourceRef::External(external) => Ok(self.external_vertex(external)),
            SourceRef::Stage(index) => match &self.states[*index] {
                Some(state) => Ok(state.top),
                None => {
                    let stages = &self.shared.plan.stages;
                    let (from, stage) = (stages[*index].label(*index), stages[self.index].label(self.index));
                    Err(problem(span, LowerProblem::NotYetDefined { from, stage }))
                }
            },
        }
    }

    /// Adds a vertex on top of the stage.
    fn add(
        &mut self,
        instruction: &Instruction,
        trigger: bool,
        op: Op,
        inputs: Vec<Option<VertexId>>,
        name: (String, String),
    ) {
        let stage = &self.shared.plan.stages[self.index];
        let (name, text) = name;
        let vertex = Vertex {
            op,
            inputs,
            name,
            stage: stage.label(self.index),
            text,
            lines: (!trigger).then_some(instruction.lines),
            platform: self.state.platform.clone(),
            ignore_cache: self.ignore_cache,
        };
        self.state.top = Some(self.graph.push(vertex));
    }

    /// `[stage 2/5] ` and the words; counts the step.
    fn step_name(&mut self, words: &str, trigger: bool, env: &[(String, String)]) -> String {
        self.step += 1;
        let mut name = String::from("[");
        if self.shared.options.multi_platform {
            name.push_str(&self.state.platform.to_string());
            name.push_str(&text::cross_target(&self.state.platform, env));
            name.push(' ');
        }
        if !self.label.is_empty() {
            name.push_str(&self.label);
            name.push(' ');
        }
        let width = self.steps.to_string().len();
        name.push_str(&format!("{:width$}/{}] ", self.step, self.steps));
        if trigger {
            name.push_str("ONBUILD ");
        }
        name + words
    }

    /// Step name and text of an instruction: expanded, keyword in upper case, on one line.
    fn words(
        &mut self,
        instruction: &Instruction,
        trigger: bool,
        lexer: &Lexer,
        env: &[(String, String)],
        suffix: &str,
    ) -> (String, String) {
        let written = format!("{}{suffix}", instruction.original);
        let expanded = lexer.word(&written, env).map_or(written, |expanded| expanded.value);
        let (keyword, rest) = expanded.split_once(' ').unwrap_or((&expanded, ""));
        let text = format!("{} {rest}", keyword.to_uppercase()).replace(['\n', '\r'], " ");
        let text = text.trim_end().to_owned();
        (self.step_name(&text, trigger, env), text)
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
        let expanded =
            lexer.word(text, self.state.env.as_slice()).map_err(|error| Diagnostic::at(span, error.into()))?;
        for name in &expanded.unmatched {
            self.undefined(at, name, span);
        }
        Ok(expanded.value)
    }

    fn undefined(&mut self, at: &At<'_>, name: &str, span: Span) {
        if self.state.build_args.iter().any(|(declared, _)| declared == name) {
            return;
        }
        let hint = did_you_mean(name, self.state.env.names()).map(|name| format!(" (did you mean `${name}`?)"));
        let message = format!("variable `${name}` is not defined{}", hint.unwrap_or_default());
        self.report(Rule::UndefinedVar, at.instruction, at.trigger, span, message);
    }

    fn command(&mut self, command: &Command<'_>) -> Result<(), Diagnostic> {
        let instruction: &Instruction = &command.instruction;
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
                if units::parse_signal(&value).is_err() {
                    return Err(problem(signal.span, LowerProblem::BadSignal(value)));
                }
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

    fn arg(&mut self, at: &At<'_>, pairs: &[(Text, Option<Text>)]) -> Result<(), Diagnostic> {
        let mut words = vec!["ARG".to_owned()];
        for (name, default) in pairs {
            self.secret_name(at, "ARG", &name.value, name.span);
            let value = match (self.shared.build_args.get(&name.value), default) {
                (Some(value), _) => Some(value.clone()),
                (None, Some(default)) => Some(self.expand(at, default)?),
                (None, None) => variable(&self.shared.plan.global_args, &name.value).map(str::to_owned),
            };
            words.push(match &value {
                Some(value) => format!("{}={value}", name.value),
                None => name.value.clone(),
            });
            if let Some(value) = &value
                && !matches!(name.value.as_str(), "BUILDKIT_SBOM_SCAN_CONTEXT" | "BUILDKIT_SBOM_SCAN_STAGE")
            {
                set_variable(&mut self.state.env, &name.value, value.clone());
            }
            self.state.build_args.push((name.value.clone(), value));
        }
        self.commit(words.join(" "), true);
        Ok(())
    }

    /// Expands pairs with the variables from before the instruction.
    fn expand_pairs(&mut self, at: &At<'_>, pairs: &[(Text, Text)]) -> Result<Vec<(String, String)>, Diagnostic> {
        pairs.iter().map(|(key, value)| Ok((self.expand(at, key)?, self.expand(at, value)?))).collect()
    }

    fn env(&mut self, at: &At<'_>, pairs: &[(Text, Text)]) -> Result<(), Diagnostic> {
        let expanded = self.expand_pairs(at, pairs)?;
        let mut words = vec!["ENV".to_owned()];
        for ((key, value), (written, _)) in expanded.into_iter().zip(pairs) {
            self.secret_name(at, "ENV", &key, written.span);
            words.push(format!("{key}={value}"));
            self.state.image.config.set_env(&key, &value);
            set_variable(&mut self.state.env, &key, value);
        }
        self.commit(words.join(" "), true);
        Ok(())
    }

    fn label(&mut self, at: &At<'_>, pairs: &[(Text, Text)]) -> Result<(), Diagnostic> {
        let mut words = vec!["LABEL".to_owned()];
        for (key, value) in self.expand_pairs(at, pairs)? {
            words.push(format!("{key}={value}"));
            self.state.image.config.labels.insert(key, value);
        }
        self.commit(words.join(" "), true);
        Ok(())
    }

    fn secret_name(&mut self, at: &At<'_>, keyword: &str, name: &str, span: Span) {
        if is_secret_name(name) {
            let message = format!("{keyword} `{name}` looks like a secret, and would stay readable in the image");
            self.report(Rule::SecretsUsedInArgOrEnv, at.instruction, at.trigger, span, message);
        }
    }

    /// Reports that an instruction replaces an earlier one of its stage.
    fn only_once(&mut self, at: &At<'_>, keyword: &'static str) {
        if let Some(earlier) = self.seen.insert(keyword, at.instruction.span) {
            let message = format!("another {keyword} of this stage replaces this one");
            self.report(Rule::MultipleInstructionsDisallowed, at.instruction, at.trigger, earlier, message);
        }
    }

    /// Arguments of CMD and ENTRYPOINT; the shell form gets the shell.
    fn command_line(&mut self, at: &At<'_>, keyword: &'static str, line: &CommandLine) -> Vec<String> {
        self.only_once(at, keyword);
        if line.exec_form {
            return line.args.clone();
        }
        if self.state.image.config.shell.as_ref().is_none_or(Vec::is_empty) {
            let message = format!("{keyword} in shell form does not pass signals on; use the JSON form, or set SHELL");
            self.report(Rule::JSONArgsRecommended, at.instruction, at.trigger, line.span, message);
        }
        self.with_shell(line.args.join(" "))
    }

    fn with_shell(&self, line: String) -> Vec<String> {
        let shell = self.state.image.config.shell.clone().filter(|shell| !shell.is_empty());
        let mut args = shell.unwrap_or_else(|| match self.state.image.os.as_str() {
            "windows" => ["cmd", "/S", "/C"].map(str::to_owned).to_vec(),
            _ => ["/bin/sh", "-c"].map(str::to_owned).to_vec(),
        });
        args.push(line);
        args
    }

    fn workdir(&mut self, at: &At<'_>, path: &Text) -> Result<(), Diagnostic> {
        let written = self.expand(at, path)?;
        if !self.state.workdir_set && !written.starts_with('/') {
            let message = format!("WORKDIR `{written}` is relative to whatever the base image sets");
            self.report(Rule::WorkdirRelativePath, at.instruction, at.trigger, path.span, message);
        }
        self.state.workdir_set = true;
        let current = &self.state.image.config.working_dir;
        // An absolute path goes into the image as written, a relative one is joined and cleaned.
        let absolute = match written.as_str() {
            "" if current.starts_with('/') => current.clone(),
            path if path.starts_with('/') => path.to_owned(),
            path => text::absolute(current, path),
        };
        self.state.image.config.working_dir.clone_from(&absolute);
        let has_layer = absolute != "/";
        if has_layer {
            let env = self.state.env.clone();
            let name = self.words(at.instruction, at.trigger, &self.shared.lexer, &env, "");
            let op = MkdirOp { path: text::absolute("/", &absolute), user: self.state.image.config.user.clone() };
            let inputs = vec![self.state.top];
            self.add(at.instruction, at.trigger, Op::Mkdir(op), inputs, name);
        }
        self.commit(format!("WORKDIR {absolute}"), !has_layer);
        Ok(())
    }

    fn volume(&mut self, at: &At<'_>, paths: &[Text]) -> Result<(), Diagnostic> {
        let mut expanded = Vec::new();
        for path in paths {
            let value = self.expand(at, path)?;
            if value.is_empty() {
                return Err(problem(path.span, LowerProblem::EmptyVolume));
            }
            expanded.push(value);
        }
        self.commit(format!("VOLUME [{}]", expanded.join(" ")), true);
        let empty = || serde_json::Value::Object(serde_json::Map::new());
        self.state.image.config.volumes.extend(expanded.into_iter().map(|path| (path, empty())));
        Ok(())
    }

    fn healthcheck(&mut self, at: &At<'_>, check: &HealthcheckInstruction) {
        self.only_once(at, "HEALTHCHECK");
        let check = match check {
            HealthcheckInstruction::None => Healthcheck { test: vec!["NONE".to_owned()], ..Healthcheck::default() },
            HealthcheckInstruction::Cmd { command, interval, timeout, start_period, start_interval, retries } => {
                let kind = if command.exec_form { "CMD" } else { "CMD-SHELL" };
                Healthcheck {
                    test: std::iter::once(kind.to_owned()).chain(command.args.iter().cloned()).collect(),
                    interval: *interval,
                    timeout: *timeout,
                    start_period: *start_period,
                    start_interval: *start_interval,
                    retries: *retries,
                }
            }
        };
        self.commit(
            format!(
                "HEALTHCHECK {{Test:[{}] Interval:{} Timeout:{} StartPeriod:{} StartInterval:{} Retries:{}}}",
                check.test.join(" "),
                text::go_duration(check.interval),
                text::go_duration(check.timeout),
                text::go_duration(check.start_period),
                text::go_duration(check.start_interval),
                check.retries
            ),
            true,
        );
        self.state.image.config.healthcheck = Some(check);
    }

    fn expose(&mut self, at: &At<'_>, words: &[Text]) -> Result<(), Diagnostic> {
        // Sorted as written, before expansion; the history shows it.
        let mut words: Vec<&Text> = words.iter().collect();
        words.sort_by(|a, b| a.value.cmp(&b.value));
        let mut ports = Vec::new();
        for word in words {
            let env = self.state.env.as_slice();
            let expanded = self.shared.lexer.words(&word.value, env);
            let expanded = expanded.map_err(|error| Diagnostic::at(word.span, error.into()))?;
            let unset = self.shared.lexer.word(&word.value, env).map(|word| word.unmatched).unwrap_or_default();
            for name in unset {
                self.undefined(at, &name, word.span);
            }
            for port in expanded {
                ports.extend(parse_port(&port).map_err(|error| problem(word.span, error))?);
                let (address, protocol) = port.split_once('/').unwrap_or((&port, ""));
                if protocol != protocol.to_lowercase() {
                    let message = format!("protocol `{protocol}` should be lower case");
                    self.report(Rule::ExposeProtoCasing, at.instruction, at.trigger, word.span, message);
                }
                if address.contains(':') {
                    let message = format!("`{port}` names more than a port of the container; the rest is ignored");
                    self.report(Rule::ExposeInvalidFormat, at.instruction, at.trigger, word.span, message);
                }
            }
        }
        self.commit(format!("EXPOSE [{}]", ports.join(" ")), true);
        let empty = || serde_json::Value::Object(serde_json::Map::new());
        self.state.image.config.exposed_ports.extend(ports.into_iter().map(|port| (port, empty())));
        Ok(())
    }
}

/// Where an instruction stands.
struct At<'c> {
    instruction: &'c Instruction,
    /// It is a trigger of the base.
    trigger: bool,
    /// What its spans point into.
    source: &'c str,
}

/// The image by digest, where that is known.
fn pinned(source: &ImageSource, platform: &Platform, bases: &BaseConfigs) -> ImageSource {
    let request = BaseRequest { source: source.clone(), platform: platform.clone() };
    let Some(digest) = bases.get(&request).and_then(|base| base.digest.clone()) else { return source.clone() };
    match source {
        ImageSource::Reference(reference) if !reference.contains('@') => {
            ImageSource::Reference(format!("{reference}@{digest}"))
        }
        ImageSource::OciLayout { path, tag, digest: None } => {
            ImageSource::OciLayout { path: path.clone(), tag: tag.clone(), digest: Some(digest) }
        }
        _ => source.clone(),
    }
}

/// Reads a word of EXPOSE: `[[address:]host:]port[-port][/protocol]`. Only ports of the container are returned.
fn parse_port(word: &str) -> Result<Vec<String>, LowerProblem> {
    let mut parts = word.rsplitn(3, ':');
    let (container, host, address) =
        (parts.next().unwrap_or_default(), parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let (container, protocol) = container.split_once('/').unwrap_or((container, ""));
    if container.is_empty() {
        return Err(LowerProblem::NoPort(word.to_owned()));
    }
    let protocol = match protocol.to_lowercase() {
        protocol if protocol.is_empty() => "tcp".to_owned(),
        protocol if matches!(protocol.as_str(), "tcp" | "udp" | "sctp") => protocol,
        protocol => return Err(LowerProblem::BadPortProtocol { protocol, port: word.to_owned() }),
    };
    let bare = address.strip_prefix('[').and_then(|address| address.strip_suffix(']')).unwrap_or(address);
    if !bare.is_empty() && bare.parse::<std::net::IpAddr>().is_err() {
        return Err(LowerProblem::BadPortAddress(address.to_owned()));
    }
    let range = |text: &str| -> Option<(u16, u16)> {
        let port = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u16>().ok())?;
        let (first, last) = match text.split_once('-') {
            Some((first, last)) => (port(first)?, port(last)?),
            None => (port(text)?, port(text)?),
        };
        (first <= last).then_some((first, last))
    };
    let bad = |text: &str| LowerProblem::BadPort(text.to_owned());
    let (first, last) = range(container).ok_or_else(|| bad(container))?;
    if !host.is_empty() {
        let (host_first, host_last) = range(host).ok_or_else(|| bad(host))?;
        if first != last && last - first != host_last - host_first {
            let (container, host) = (container.to_owned(), host.to_owned());
            return Err(LowerProblem::PortRanges { container, host });
        }
    }
    Ok((first..=last).map(|port| format!("{port}/{protocol}")).collect())
}

#[cfg(test)]
mod tests;
