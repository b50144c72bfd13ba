//! Stages: their names, bases and the edges between them.
//!
//! A stage is found by name or number; the name of a named build context takes the place of a stage or of an image.
//! FROM sees the stages above it and takes names exactly; `--from` sees all stages and takes names in any case, so that
//! using a later one can be told apart from using an image.

use crate::check::{Reporter, Rule};
use crate::diagnostic::{Diagnostic, Problem, did_you_mean};
use crate::flag::csv_fields;
use crate::flag::option_span;
use crate::instruction::{Dockerfile, Instruction, InstructionKind, Text};
use crate::llb::{ImageSource, Platform, Source};
use crate::lower::environment::Environment;
use crate::lower::{NamedContext, Options, use_of_variable};
use crate::lower_problem::LowerProblem;
use crate::platform;
use crate::reference::Reference;
use crate::source::Span;
use crate::word::{Lexer, Variables};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

/// A stage as `--call=targets` lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Lower-case name, if it has one.
    pub name: Option<String>,
    /// Base as written.
    pub base: String,
    /// `--platform` as written.
    pub platform: Option<String>,
    /// Comment above it that begins with its name.
    pub description: Option<String>,
    /// Built when no target is named.
    pub default: bool,
    /// Lines of its FROM.
    pub lines: (u32, u32),
}

/// Lists the stages of a file.
pub fn targets(file: &Dockerfile) -> Vec<Target> {
    let mut targets: Vec<Target> = file
        .instructions
        .iter()
        .filter_map(|instruction| match &instruction.kind {
            InstructionKind::From { platform, image, name } => {
                let name = name.as_ref().map(|name| name.value.to_lowercase());
                Some(Target {
                    description: name.as_deref().and_then(|name| described(instruction, name)),
                    base: image.value.clone(),
                    platform: platform.as_ref().map(|platform| platform.value.clone()),
                    default: false,
                    lines: instruction.lines,
                    name,
                })
            }
            _ => None,
        })
        .collect();
    if let Some(last) = targets.last_mut() {
        last.default = true;
    }
    targets
}

/// The comment above an instruction that begins with a name, without the name.
pub(crate) fn described(instruction: &Instruction, name: &str) -> Option<String> {
    instruction.comments.iter().find_map(|comment| {
        let (first, rest) = comment.split_once(' ')?;
        (first == name).then(|| rest.trim().to_owned())
    })
}

/// All stages, resolved as far as that goes without image configurations.
pub(crate) struct Plan<'a> {
    pub(crate) stages: Vec<Stage<'a>>,
    /// Arguments from before the first FROM and the predefined ones, with their values.
    pub(crate) global_args: Environment,
    /// What the build is for.
    pub(crate) target_platform: Platform,
    /// Number of the stage to build.
    pub(crate) target: usize,
    names: BTreeMap<String, usize>,
}

/// A stage.
pub(crate) struct Stage<'a> {
    pub(crate) from: &'a Instruction,
    /// Lower case.
    pub(crate) name: Option<String>,
    /// FROM's image after expansion.
    pub(crate) base_name: String,
    pub(crate) platform: Option<Platform>,
    pub(crate) base: Base,
    /// A named context stands in the place of this stage: its instructions do not count.
    pub(crate) replaced: bool,
    pub(crate) commands: Vec<Command<'a>>,
}

impl Stage<'_> {
    /// Where FROM names its image.
    pub(crate) fn image_span(&self) -> Span {
        match &self.from.kind {
            InstructionKind::From { image, .. } => image.span,
            _ => self.from.span,
        }
    }

    /// Name or number, as the user can write it.
    pub(crate) fn label(&self, index: usize) -> String {
        self.name.clone().unwrap_or_else(|| index.to_string())
    }
}

/// What a stage begins with.
pub(crate) enum Base {
    Stage(usize),
    External(External),
}

/// Files from outside of the stages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum External {
    Scratch,
    Image {
        source: ImageSource,
        platform: Platform,
        /// Words for people: the image name, or what the context says.
        name: String,
    },
    Files {
        source: Source,
        /// Name of the context.
        context: String,
    },
}

/// An instruction of a stage and the other file systems that it reads.
#[derive(Clone)]
pub(crate) struct Command<'a> {
    pub(crate) instruction: Cow<'a, Instruction>,
    /// `--from` of COPY, or of the mounts of RUN (one member for each mount).
    pub(crate) sources: Vec<Option<SourceRef>>,
    /// Trigger text and the base it comes from.
    pub(crate) trigger: Option<(String, String)>,
}

/// What `--from` means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SourceRef {
    Stage(usize),
    External(External),
}

impl From<SourceRef> for Base {
    fn from(source: SourceRef) -> Self {
        match source {
            SourceRef::Stage(index) => Self::Stage(index),
            SourceRef::External(external) => Self::External(external),
        }
    }
}

pub(crate) fn problem(span: Span, problem: LowerProblem) -> Diagnostic {
    Diagnostic::at(span, Problem::Lower(problem))
}

impl<'a> Plan<'a> {
    /// Finds the stages of a file and what connects them.
    pub(crate) fn new(
        file: &'a Dockerfile,
        options: &Options,
        build_args: &BTreeMap<String, String>,
        reporter: &mut Reporter,
    ) -> Result<Self, Vec<Diagnostic>> {
        let mut builder = Builder {
            options,
            build_args,
            lexer: Lexer::new(file.escape),
            target_platform: options.platform.clone().unwrap_or_else(|| options.build_platform.clone()),
            reporter,
            problems: Vec::new(),
        };
        let first = file.instructions.iter().position(|one| matches!(one.kind, InstructionKind::From { .. }));
        let globals = &file.instructions[..first.unwrap_or(file.instructions.len())];
        let Some(first) = first else {
            return Err(vec![Diagnostic { problem: Problem::NoStage, span: None }]);
        };

        let mut raw: Vec<(&'a Instruction, Vec<&'a Instruction>)> = Vec::new();
        for instruction in &file.instructions[first..] {
            match (&instruction.kind, raw.last_mut()) {
                (InstructionKind::From { .. }, _) => raw.push((instruction, Vec::new())),
                (_, Some((_, commands))) => commands.push(instruction),
                (_, None) => {}
            }
        }

        let predefined = builder.predefined_args(&raw);
        builder.check_defaults(&raw, &predefined, globals);
        let (global_args, declared) = builder.global_args(predefined, globals, build_args);
        let mut plan = Plan {
            stages: Vec::new(),
            global_args,
            target_platform: builder.target_platform.clone(),
            target: raw.len() - 1,
            names: BTreeMap::new(),
        };
        for (from, commands) in &raw {
            builder.stage(&mut plan, from, commands, &declared);
        }
        for index in 0..plan.stages.len() {
            for at in 0..plan.stages[index].commands.len() {
                let command = &plan.stages[index].commands[at];
                match plan.sources(&command.instruction, options, &builder.lexer) {
                    Ok(sources) => plan.stages[index].commands[at].sources = sources,
                    Err(problem) => builder.problems.push(problem),
                }
            }
        }
        if let Some(target) = &options.target {
            match plan.names.get(&target.to_lowercase()) {
                Some(index) => plan.target = *index,
                None => {
                    let similar = did_you_mean(target, plan.names.keys().map(String::as_str));
                    let stages = plan.stages.iter().filter_map(|stage| stage.name.clone()).collect();
                    let unknown = LowerProblem::UnknownTarget { name: target.clone(), similar, stages };
                    builder.problems.push(Diagnostic { problem: Problem::Lower(unknown), span: None });
                }
            }
        }
        if builder.problems.is_empty() {
            builder.problems.extend(plan.circular());
        }
        if builder.problems.is_empty() { Ok(plan) } else { Err(builder.problems) }
    }

    /// What the `--from` of an instruction means.
    pub(crate) fn sources(
        &self,
        instruction: &Instruction,
        options: &Options,
        lexer: &Lexer,
    ) -> Result<Vec<Option<SourceRef>>, Diagnostic> {
        match &instruction.kind {
            InstructionKind::Copy(copy) => {
                let Some(from) = &copy.from else { return Ok(Vec::new()) };
                let none: &[(String, String)] = &[];
                let expanded =
                    lexer.word(&from.value, none).map_err(|error| Diagnostic::at(from.span, error.into()))?;
                if expanded.value != from.value {
                    return Err(problem(from.span, LowerProblem::VariableInFrom(from.value.clone())));
                }
                if let Ok(number) = from.value.parse::<i64>() {
                    let stages = self.stages.len();
                    return match usize::try_from(number).ok().filter(|&number| number < stages) {
                        Some(number) => Ok(vec![Some(SourceRef::Stage(number))]),
                        None => {
                            let index = from.value.clone();
                            Err(problem(from.span, LowerProblem::StageIndex { index, stages }))
                        }
                    };
                }
                Ok(vec![Some(self.by_name(&from.value, from.span, options)?)])
            }
            InstructionKind::Run { flags, .. } => {
                let source = |mount: &Text| match mount_from(&mount.value) {
                    None => Ok(None),
                    Some(from) if has_variable(&from) => {
                        Err(problem(option_span(mount, &from), LowerProblem::VariableInFrom(from)))
                    }
                    Some(from) => self.by_name(&from, option_span(mount, &from), options).map(Some),
                };
                flags.mounts.iter().map(source).collect()
            }
            _ => Ok(Vec::new()),
        }
    }

    fn by_name(&self, name: &str, span: Span, options: &Options) -> Result<SourceRef, Diagnostic> {
        match self.names.get(&name.to_lowercase()) {
            Some(index) => Ok(SourceRef::Stage(*index)),
            None => self
                .external(name, &self.target_platform, options)
                .map_err(|error| problem(span, self.with_similar_stage(error))),
        }
    }

    /// What a name that is no stage means.
    fn external(&self, name: &str, platform: &Platform, options: &Options) -> Result<SourceRef, LowerProblem> {
        if name == "scratch" {
            return Ok(SourceRef::External(External::Scratch));
        }
        let reference = Reference::parse(name).map_err(|error| LowerProblem::Reference {
            name: name.to_owned(),
            error,
            similar: None,
        })?;
        if let Some((key, context)) = named_context(name, platform, options) {
            return self.context(key, context, platform);
        }
        let name = reference.to_string();
        let source = ImageSource::Reference(name.clone());
        Ok(SourceRef::External(External::Image { source, platform: platform.clone(), name }))
    }

    /// What a named context means: `target:` names one of the stages known so far.
    fn context(&self, key: &str, context: &NamedContext, platform: &Platform) -> Result<SourceRef, LowerProblem> {
        let NamedContext::Target(stage) = context else {
            return from_context(key, context, platform).map(SourceRef::External);
        };
        match self.names.get(&stage.to_lowercase()) {
            Some(index) => Ok(SourceRef::Stage(*index)),
            None => Err(LowerProblem::ContextTarget {
                context: key.to_owned(),
                stage: stage.clone(),
                similar: did_you_mean(stage, self.names.keys().map(String::as_str)),
            }),
        }
    }

    /// Adds a stage of a similar name to the complaint about a base.
    fn with_similar_stage(&self, error: LowerProblem) -> LowerProblem {
        match error {
            LowerProblem::Reference { name, error, .. } => {
                let similar = did_you_mean(&name, self.names.keys().map(String::as_str));
                LowerProblem::Reference { name, error, similar }
            }
            other => other,
        }
    }

    /// First use of a stage that closes a circle.
    fn circular(&self) -> Option<Diagnostic> {
        #[derive(Clone, Copy, PartialEq)]
        enum Visit {
            New,
            OnPath,
            Done,
        }
        let uses = |index: usize| -> Vec<(usize, Span)> {
            let commands = self.stages[index].commands.iter();
            let stages = commands.flat_map(|command| {
                command.sources.iter().enumerate().filter_map(|(at, source)| match source {
                    Some(SourceRef::Stage(stage)) => Some((*stage, from_span(&command.instruction, at))),
                    _ => None,
                })
            });
            stages.collect()
        };
        let mut visits = vec![Visit::New; self.stages.len()];
        // Not recursive: a file may have very many stages.
        for start in 0..self.stages.len() {
            if visits[start] != Visit::New {
                continue;
            }
            visits[start] = Visit::OnPath;
            let mut path = vec![(start, uses(start))];
            while let Some((index, todo)) = path.last_mut() {
                match todo.pop() {
                    None => {
                        visits[*index] = Visit::Done;
                        path.pop();
                    }
                    Some((next, span)) => match visits[next] {
                        Visit::Done => {}
                        Visit::OnPath => {
                            let label = self.stages[next].label(next);
                            return Some(problem(span, LowerProblem::Circular(label)));
                        }
                        Visit::New => {
                            visits[next] = Visit::OnPath;
                            path.push((next, uses(next)));
                        }
                    },
                }
            }
        }
        None
    }
}

struct Builder<'o, 'r> {
    options: &'o Options,
    build_args: &'o BTreeMap<String, String>,
    lexer: Lexer,
    target_platform: Platform,
    reporter: &'r mut Reporter,
    problems: Vec<Diagnostic>,
}

impl Builder<'_, '_> {
    /// TARGETPLATFORM and its like; a build arg of the same name wins.
    fn predefined_args(&self, raw: &[(&Instruction, Vec<&Instruction>)]) -> Environment {
        let (build, target) = (&self.options.build_platform, &self.target_platform);
        let last = raw.last().and_then(|(from, _)| match &from.kind {
            InstructionKind::From { name: Some(name), .. } => Some(name.value.to_lowercase()),
            _ => None,
        });
        let stage = self.options.target.clone().or(last).unwrap_or_else(|| "default".to_owned());
        let all = [
            ("BUILDPLATFORM", build.to_string()),
            ("BUILDOS", build.os.clone()),
            ("BUILDOSVERSION", String::new()),
            ("BUILDARCH", build.architecture.clone()),
            ("BUILDVARIANT", build.variant.clone()),
            ("TARGETPLATFORM", target.to_string()),
            ("TARGETOS", target.os.clone()),
            ("TARGETOSVERSION", String::new()),
            ("TARGETARCH", target.architecture.clone()),
            ("TARGETVARIANT", target.variant.clone()),
            ("TARGETSTAGE", stage),
        ];
        let mut args = Environment::default();
        for (name, value) in all {
            args.set(name, self.build_args.get(name).cloned().unwrap_or(value));
        }
        args
    }

    /// Values of the ARGs before the first FROM, and all names declared there.
    fn global_args(
        &mut self,
        mut args: Environment,
        globals: &[Instruction],
        build_args: &BTreeMap<String, String>,
    ) -> (Environment, BTreeSet<String>) {
        let mut declared = BTreeSet::new();
        for instruction in globals {
            let InstructionKind::Arg(pairs) = &instruction.kind else { continue };
            for (name, default) in pairs {
                declared.insert(name.value.clone());
                let value = match (build_args.get(&name.value), default) {
                    (Some(value), _) => value.clone(),
                    (None, Some(default)) => match self.lexer.word(&default.value, &args) {
                        Ok(expanded) => expanded.value,
                        Err(error) => {
                            self.problems.push(Diagnostic::at(default.span, error.into()));
                            continue;
                        }
                    },
                    (None, None) => continue,
                };
                args.set(&name.value, value);
            }
        }
        (args, declared)
    }

    /// Whether every base has a valid name when no build arg is given.
    fn check_defaults(
        &mut self,
        raw: &[(&Instruction, Vec<&Instruction>)],
        predefined: &Environment,
        globals: &[Instruction],
    ) {
        let before = self.problems.len();
        let (args, _) = self.global_args(predefined.clone(), globals, &BTreeMap::new());
        if self.problems.len() != before {
            // The same mistakes are found again with the real arguments, if they matter then.
            self.problems.truncate(before);
            return;
        }
        for (from, _) in raw {
            let InstructionKind::From { image, .. } = &from.kind else { continue };
            let Ok(expanded) = self.lexer.word(&image.value, &args) else { continue };
            if expanded.value.is_empty() || Reference::parse(&expanded.value).is_err() {
                let message = format!("without build args `{}` is no valid base image name", image.value);
                self.reporter.report(Rule::InvalidDefaultArgInFrom, from, image.span, message);
            }
        }
    }

    fn stage<'a>(
        &mut self,
        plan: &mut Plan<'a>,
        from: &'a Instruction,
        commands: &[&'a Instruction],
        declared: &BTreeSet<String>,
    ) {
        let InstructionKind::From { platform, image, name } = &from.kind else { return };
        let name = name.as_ref().map(|name| name.value.to_lowercase());
        let platform = platform.as_ref().and_then(|text| self.platform(plan, from, text, name.as_deref(), declared));
        let base_name = self.base_name(plan, from, image, declared);

        let lookup_platform = platform.clone().unwrap_or_else(|| self.target_platform.clone());
        let replacement = name.as_ref().and_then(|name| named_context(name, &lookup_platform, self.options));
        let replaced = replacement.is_some();
        let base = match (replacement, &base_name) {
            (Some((key, context)), _) => plan.context(key, context, &lookup_platform).map(Base::from),
            // A blank name is reported already.
            (None, None) => Ok(Base::External(External::Scratch)),
            (None, Some(base)) => match plan.names.get(base) {
                Some(index) => Ok(Base::Stage(*index)),
                None => plan.external(base, &lookup_platform, self.options).map(Base::from),
            },
        };
        let base = base.unwrap_or_else(|error| {
            self.problems.push(problem(image.span, plan.with_similar_stage(error)));
            Base::External(External::Scratch)
        });
        let commands = if replaced { &[] } else { commands };
        plan.stages.push(Stage {
            from,
            name: name.clone(),
            base_name: base_name.unwrap_or_default(),
            platform,
            base,
            replaced,
            commands: commands
                .iter()
                .map(|&instruction| Command {
                    instruction: Cow::Borrowed(instruction),
                    sources: Vec::new(),
                    trigger: None,
                })
                .collect(),
        });
        if let Some(name) = name {
            plan.names.insert(name, plan.stages.len() - 1);
        }
    }

    fn base_name(
        &mut self,
        plan: &Plan<'_>,
        from: &Instruction,
        image: &Text,
        declared: &BTreeSet<String>,
    ) -> Option<String> {
        let args = &plan.global_args;
        let expanded = match self.lexer.word(&image.value, args) {
            Ok(expanded) => expanded,
            Err(error) => {
                self.problems.push(Diagnostic::at(image.span, error.into()));
                return None;
            }
        };
        self.undefined_in_from(&expanded.unmatched, args, from, image, declared);
        if expanded.value.is_empty() {
            let similar = similar_variable(&expanded.unmatched, args);
            let unset = expanded.unmatched.into_iter().collect();
            let expression = image.value.clone();
            self.problems.push(problem(image.span, LowerProblem::BlankBase { expression, unset, similar }));
            return None;
        }
        Some(expanded.value)
    }

    fn platform(
        &mut self,
        plan: &Plan<'_>,
        from: &Instruction,
        text: &Text,
        stage: Option<&str>,
        declared: &BTreeSet<String>,
    ) -> Option<Platform> {
        let args = &plan.global_args;
        let expanded = match self.lexer.word(&text.value, args) {
            Ok(expanded) => expanded,
            Err(error) => {
                self.problems.push(Diagnostic::at(text.span, error.into()));
                return None;
            }
        };
        self.undefined_in_from(&expanded.unmatched, args, from, text, declared);
        if expanded.value.is_empty() {
            let similar = similar_variable(&expanded.unmatched, args);
            let expression = text.value.clone();
            self.problems.push(problem(text.span, LowerProblem::EmptyPlatform { expression, similar }));
            return None;
        }
        let parsed = match platform::parse(&expanded.value, &self.options.build_platform) {
            Ok(parsed) => parsed,
            Err(error) => {
                self.problems.push(problem(text.span, error.into()));
                return None;
            }
        };
        if !text.value.contains('$') {
            let named = stage.is_some_and(|stage| stage.contains(&parsed.os) || stage.contains(&parsed.architecture));
            if !named {
                let message = format!("--platform is the constant `{}`", expanded.value);
                self.reporter.report(Rule::FromPlatformFlagConstDisallowed, from, text.span, message);
            }
        } else if expanded.unmatched.is_empty()
            && expanded.matched.len() == 1
            && expanded.matched.contains("TARGETPLATFORM")
            && args.get("TARGETPLATFORM") == Some(expanded.value.as_str())
        {
            let message = format!("--platform={} is the default and can be left out", text.value);
            self.reporter.report(Rule::RedundantTargetPlatform, from, text.span, message);
        }
        Some(parsed)
    }

    fn undefined_in_from(
        &mut self,
        unmatched: &BTreeSet<String>,
        args: &Environment,
        from: &Instruction,
        text: &Text,
        declared: &BTreeSet<String>,
    ) {
        for name in unmatched.iter().filter(|name| !declared.contains(*name)) {
            let candidates = args.names().into_iter().chain(declared.iter().map(String::as_str));
            let hint = did_you_mean(name, candidates).map(|name| format!(" (did you mean `{name}`?)"));
            let message = format!("`{name}` is not declared before the first FROM{}", hint.unwrap_or_default());
            // Places in a text that a continuation interrupts are not those in the file.
            let whole = text.span.end - text.span.start == text.value.len();
            let span = if whole { use_of_variable(&text.value, text.span, name) } else { text.span };
            self.reporter.report(Rule::UndefinedArgInFrom, from, span, message);
        }
    }
}

fn similar_variable(unset: &BTreeSet<String>, args: &Environment) -> Option<String> {
    unset.iter().find_map(|name| did_you_mean(name, args.names()))
}

/// Where an instruction names its source number `at`: the value of `--from`, or `from=…` of a mount.
fn from_span(instruction: &Instruction, at: usize) -> Span {
    match &instruction.kind {
        InstructionKind::Copy(copy) => copy.from.as_ref().map_or(instruction.span, |from| from.span),
        InstructionKind::Run { flags, .. } => flags.mounts.get(at).map_or(instruction.span, |mount| {
            let from = mount_from(&mount.value).map(|from| format!("from={from}"));
            from.map_or(mount.span, |from| option_span(mount, &from))
        }),
        _ => instruction.span,
    }
}

/// `from` of a mount that is not expanded yet; the last one counts.
fn mount_from(mount: &str) -> Option<String> {
    let fields = csv_fields(mount).ok()?;
    let from = |field: &String| {
        let (key, value) = field.split_once('=')?;
        key.eq_ignore_ascii_case("from").then(|| value.to_owned())
    };
    fields.iter().rev().find_map(from).filter(|from| !from.is_empty())
}

/// A `$` that is not the last character.
fn has_variable(text: &str) -> bool {
    text.find('$').is_some_and(|at| at + 1 < text.len())
}

/// The named context for a name: one for exactly this platform (`name::os/arch`) before a general one. Names are
/// compared as image names, so that `busybox` also stands for `docker.io/library/busybox:latest`.
fn named_context<'o>(name: &str, platform: &Platform, options: &'o Options) -> Option<(&'o str, &'o NamedContext)> {
    if name.eq_ignore_ascii_case("scratch") || name.eq_ignore_ascii_case("context") {
        return None;
    }
    let canonical = |name: &str| Reference::parse(name).map_or_else(|_| name.to_owned(), |name| name.to_string());
    let wanted = canonical(name);
    let find = |platform: Option<&str>| {
        options.contexts.iter().find(|(key, _)| {
            let (key, only) = key.split_once("::").map_or((key.as_str(), None), |(key, only)| (key, Some(only)));
            only == platform && key != "context" && canonical(key) == wanted
        })
    };
    find(Some(&platform.to_string())).or_else(|| find(None)).map(|(key, context)| (key.as_str(), context))
}

/// The files of a named context.
pub(crate) fn from_context(key: &str, context: &NamedContext, platform: &Platform) -> Result<External, LowerProblem> {
    let files = |source| Ok(External::Files { source, context: key.to_owned() });
    match context {
        NamedContext::Local => files(Source::Local { name: key.to_owned() }),
        NamedContext::Http(url) => files(Source::Http { url: url.clone(), checksum: None }),
        NamedContext::Git { remote, reference, subdir, keep_git_dir, checksum, submodules } => files(Source::Git {
            remote: remote.clone(),
            reference: reference.clone(),
            subdir: subdir.clone(),
            keep_git_dir: *keep_git_dir,
            checksum: checksum.clone(),
            submodules: *submodules,
        }),
        NamedContext::Image(ImageSource::Reference(name))
            if name == "scratch" || name == "docker.io/library/scratch:latest" =>
        {
            Ok(External::Scratch)
        }
        NamedContext::Image(source) => {
            let name = match source {
                ImageSource::Reference(name) => name.clone(),
                ImageSource::OciLayout { .. } => key.to_owned(),
            };
            Ok(External::Image { source: source.clone(), platform: platform.clone(), name })
        }
        NamedContext::Target(_) | NamedContext::Input => Err(LowerProblem::UnresolvedContext(key.to_owned())),
    }
}
