//! Build checks: things that a Dockerfile may do but better should not.
//!
//! The rules carry the names that users know and put into `# check=skip=…`. Lowering finds most of them on its way, as
//! they need the variables in force; what the bare file shows is found here ([`static_checks`]). `CopyIgnoredFile` needs
//! to know what the build context leaves out: the caller hands a function over ([`IgnoreRules`]).
//!
//! A `check` directive (`skip=RULE,…;error=true;experimental=RULE,…`), the build arg BUILDKIT_DOCKERFILE_CHECK in its
//! place, and a comment `# check=skip=RULE` above an instruction select what is reported.

use crate::instruction::{Dockerfile, Instruction, InstructionKind};
use crate::source::Span;
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

/// Tells whether the build context leaves a path out.
///
/// This crate sees no files; whoever does gives the answer. An ignore file with exceptions (`!pattern`) is better not
/// given at all: what is excluded there may come back in part.
#[derive(Clone)]
pub struct IgnoreRules(Arc<dyn Fn(&str) -> bool + Send + Sync>);

impl IgnoreRules {
    /// `ignored` gets paths relative to the context, without `.` and `..`.
    pub fn new(ignored: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(ignored))
    }

    pub(crate) fn ignores(&self, path: &str) -> bool {
        (self.0)(path)
    }
}

impl fmt::Debug for IgnoreRules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IgnoreRules")
    }
}

impl PartialEq for IgnoreRules {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Warning {
    /// Where.
    pub span: Span,
    /// Which rule.
    pub rule: Rule,
    /// What exactly.
    pub message: String,
    /// Page about the rule.
    pub url: String,
}

macro_rules! rules {
    ($($name:ident $page:literal $doc:literal,)*) => {
        /// The rules.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Rule {
            $(#[doc = $doc] $name,)*
        }

        impl Rule {
            /// Every rule.
            pub const ALL: &[Rule] = &[$(Rule::$name,)*];

            /// Its name, as in `# check=skip=NAME`.
            pub fn name(self) -> &'static str {
                match self { $(Rule::$name => stringify!($name),)* }
            }

            /// What it is about, one sentence.
            pub fn description(self) -> &'static str {
                match self { $(Rule::$name => $doc,)* }
            }

            /// Page about it.
            pub fn url(self) -> String {
                let page = match self { $(Rule::$name => $page,)* };
                format!("https://docs.docker.com/go/dockerfile/rule/{page}/")
            }
        }
    };
}

rules! {
    StageNameCasing "stage-name-casing" "Stage names are lower case.",
    FromAsCasing "from-as-casing" "AS is written in the case of FROM.",
    NoEmptyContinuation "no-empty-continuation" "A continued instruction has no empty lines.",
    ConsistentInstructionCasing "consistent-instruction-casing" "All instructions are in the same case.",
    DuplicateStageName "duplicate-stage-name" "Stage names are unique.",
    ReservedStageName "reserved-stage-name" "`scratch` and `context` are no stage names.",
    JSONArgsRecommended "json-args-recommended" "CMD and ENTRYPOINT in JSON form receive signals.",
    MaintainerDeprecated "maintainer-deprecated" "A label replaces MAINTAINER.",
    UndefinedArgInFrom "undefined-arg-in-from" "FROM uses declared arguments only.",
    WorkdirRelativePath "workdir-relative-path" "A relative WORKDIR depends on the base image.",
    UndefinedVar "undefined-var" "Variables are declared before they are used.",
    MultipleInstructionsDisallowed "multiple-instructions-disallowed" "CMD, ENTRYPOINT and HEALTHCHECK stand once in a stage.",
    LegacyKeyValueFormat "legacy-key-value-format" "ENV and LABEL pairs are written with `=`.",
    RedundantTargetPlatform "redundant-target-platform" "TARGETPLATFORM is the default platform of FROM.",
    SecretsUsedInArgOrEnv "secrets-used-in-arg-or-env" "ARG and ENV hold no secrets.",
    InvalidDefaultArgInFrom "invalid-default-arg-in-from" "Defaults of global arguments give a valid base name.",
    FromPlatformFlagConstDisallowed "from-platform-flag-const-disallowed" "`FROM --platform` is not constant.",
    CopyIgnoredFile "copy-ignored-file" "Copied files are not ignored.",
    InvalidDefinitionDescription "invalid-definition-description" "A comment above a stage or argument begins with its name.",
    ExposeProtoCasing "expose-proto-casing" "Protocols of EXPOSE are lower case.",
    ExposeInvalidFormat "expose-invalid-format" "EXPOSE names ports of the container only.",
    InvalidBaseImagePlatform "invalid-base-image-platform" "The base image is one of the platform of the build.",
}

impl Rule {
    /// Off unless asked for.
    pub fn experimental(self) -> bool {
        self == Self::InvalidDefinitionDescription
    }

    /// The rule of a name, in any case.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|rule| rule.name().eq_ignore_ascii_case(name))
    }
}

/// Which rules count.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Selection {
    /// Not reported.
    skip: BTreeSet<Rule>,
    /// Nothing is reported.
    skip_all: bool,
    /// Experimental rules that are on.
    experimental: BTreeSet<Rule>,
    /// All experimental rules are on.
    experimental_all: bool,
    /// What is reported is an error.
    error: bool,
}

impl Selection {
    /// Reads `skip=A,B;error=true;experimental=all`. What is not understood is passed over, as these are comments.
    pub fn parse(text: &str) -> Self {
        let mut selection = Self::default();
        for part in text.split(';') {
            let Some((key, value)) = part.split_once('=') else { continue };
            let (mut rules, mut all) = (BTreeSet::new(), false);
            for name in value.split(',').map(str::trim) {
                all |= name == "all";
                rules.extend(Rule::named(name));
            }
            match key.trim() {
                "skip" => (selection.skip, selection.skip_all) = (rules, all),
                "experimental" => (selection.experimental, selection.experimental_all) = (rules, all),
                "error" => selection.error = matches!(value.trim(), "1" | "t" | "T" | "true" | "TRUE" | "True"),
                _ => {}
            }
        }
        selection
    }

    /// Of a file, or of the caller in its place.
    pub fn of(file: &Dockerfile, caller: Option<&str>) -> Self {
        let directive = file.directives.iter().find(|(name, _)| name == "check").map(|(_, text)| text.value.as_str());
        caller.or(directive).map(Self::parse).unwrap_or_default()
    }

    /// Whether findings are errors.
    pub fn is_error(&self) -> bool {
        self.error
    }

    fn reports(&self, rule: Rule) -> bool {
        if rule.experimental() && !self.experimental_all && !self.experimental.contains(&rule) {
            return false;
        }
        !self.skip_all && !self.skip.contains(&rule)
    }
}

/// Collects warnings.
#[derive(Debug, Default)]
pub(crate) struct Reporter {
    selection: Selection,
    warnings: BTreeSet<Warning>,
}

impl Reporter {
    pub(crate) fn new(selection: Selection) -> Self {
        Self { selection, warnings: BTreeSet::new() }
    }

    /// Reports a finding at an instruction, unless the file, the caller or a comment above it says no.
    pub(crate) fn report(&mut self, rule: Rule, at: &Instruction, span: Span, message: String) {
        let skipped_here = at.comments.iter().any(|comment| {
            let value = comment.strip_prefix("check=");
            value.is_some_and(|value| !Selection::parse(value).reports(rule) && !rule.experimental())
        });
        if self.selection.reports(rule) && !skipped_here {
            self.warnings.insert(Warning { span, rule, message, url: rule.url() });
        }
    }

    /// All findings in the order of the file.
    pub(crate) fn into_warnings(self) -> Vec<Warning> {
        self.warnings.into_iter().collect()
    }
}

/// Finds what the bare file shows.
pub(crate) fn static_checks(file: &Dockerfile, reporter: &mut Reporter) {
    casing(file, reporter);
    let mut names: BTreeSet<String> = BTreeSet::new();
    for instruction in &file.instructions {
        empty_continuation(file, instruction, reporter);
        match &instruction.kind {
            InstructionKind::From { name: Some(name), .. } => {
                stage_name(instruction, name.value.as_str(), name.span, &mut names, reporter);
                from_as_casing(file, instruction, name.span, reporter);
                description(instruction, &[name.value.to_lowercase()], reporter);
            }
            InstructionKind::Arg(pairs) => {
                let keys: Vec<String> = pairs.iter().map(|(name, _)| name.value.clone()).collect();
                description(instruction, &keys, reporter);
            }
            InstructionKind::Maintainer(_) => {
                let message = "MAINTAINER is deprecated; use a label, as org.opencontainers.image.authors".to_owned();
                reporter.report(Rule::MaintainerDeprecated, instruction, instruction.keyword.span, message);
            }
            InstructionKind::Env { legacy: true, pairs } | InstructionKind::Label { legacy: true, pairs } => {
                let keyword = instruction.keyword.value.to_uppercase();
                let message = format!("write `{keyword} key=value` instead of `{keyword} key value`");
                let span = pairs.first().map_or(instruction.span, |(key, value)| key.span.to(value.span));
                reporter.report(Rule::LegacyKeyValueFormat, instruction, span, message);
            }
            _ => {}
        }
    }
}

fn stage_name(at: &Instruction, name: &str, span: Span, names: &mut BTreeSet<String>, reporter: &mut Reporter) {
    let lower = name.to_lowercase();
    if lower != name {
        reporter.report(Rule::StageNameCasing, at, span, format!("stage name `{name}` should be lower case"));
    }
    if matches!(lower.as_str(), "scratch" | "context") {
        reporter.report(Rule::ReservedStageName, at, span, format!("`{lower}` is reserved and no name for a stage"));
    }
    if !names.insert(lower) {
        reporter.report(Rule::DuplicateStageName, at, span, format!("there is more than one stage `{name}`"));
    }
}

fn description(at: &Instruction, names: &[String], reporter: &mut Reporter) {
    let Some(comment) = at.comments.last() else { return };
    let first = comment.split(' ').next().unwrap_or_default();
    if !comment.starts_with("check=") && !names.iter().any(|name| name == first) {
        let name = names.first().map_or("name", String::as_str);
        let message =
            format!("a comment here describes `{name}` and should begin with that word; else leave a line empty");
        reporter.report(Rule::InvalidDefinitionDescription, at, at.span, message);
    }
}

/// AS in another case than FROM. A FROM that is in neither case is another rule's matter.
fn from_as_casing(file: &Dockerfile, at: &Instruction, name: Span, reporter: &mut Reporter) {
    let from = at.keyword.value.as_str();
    let words: Vec<&str> = at.original.split_whitespace().collect();
    let [.., word, _] = words.as_slice() else { return };
    let (lower, upper) = (from == from.to_lowercase(), from == from.to_uppercase());
    let fits = (lower && *word == "as") || (upper && *word == "AS");
    if fits || !word.eq_ignore_ascii_case("as") || !(lower || upper) {
        return;
    }
    // Only blanks and continuations stand between it and the name.
    let before = file.source.text.get(at.span.start..name.start).and_then(|text| text.rfind(word));
    let span = before.map_or(name, |start| Span::new(at.span.start + start, at.span.start + start + word.len()));
    reporter.report(Rule::FromAsCasing, at, span, format!("`{word}` and `{from}` differ in case"));
}

fn casing(file: &Dockerfile, reporter: &mut Reporter) {
    // Global ARGs are not counted.
    let first = file.instructions.iter().position(|one| matches!(one.kind, InstructionKind::From { .. }));
    let instructions = file.instructions.get(first.unwrap_or(0)..).unwrap_or_default();
    let (mut lower, mut upper) = (0, 0);
    for instruction in instructions {
        let word = &instruction.keyword.value;
        lower += usize::from(*word == word.to_lowercase());
        upper += usize::from(*word == word.to_uppercase());
    }
    for instruction in instructions {
        let word = &instruction.keyword.value;
        let (expected, case) =
            if lower > upper { (word.to_lowercase(), "lower") } else { (word.to_uppercase(), "upper") };
        if *word != expected {
            let message = format!("`{word}` should be in {case} case as most instructions here");
            reporter.report(Rule::ConsistentInstructionCasing, instruction, instruction.keyword.span, message);
        }
    }
}

/// An empty line inside of an instruction, but not one of a heredoc.
fn empty_continuation(file: &Dockerfile, instruction: &Instruction, reporter: &mut Reporter) {
    let heredocs: Vec<&crate::instruction::Heredoc> = match &instruction.kind {
        InstructionKind::Run { heredocs, .. } => heredocs.iter().collect(),
        InstructionKind::Copy(copy) | InstructionKind::Add(copy) => copy.heredocs.iter().map(|(_, one)| one).collect(),
        // The heredocs of a trigger are not parsed yet.
        InstructionKind::Onbuild { .. } => return,
        _ => Vec::new(),
    };
    let (first, mut last) = instruction.lines;
    if let Some(start) = heredocs.iter().map(|one| one.span.start).min() {
        last = last.min(file.source.line(start).saturating_sub(1));
    }
    if let Some(line) = (first..=last).find(|line| file.source.line_text(*line).trim().is_empty()) {
        let message = "empty line in a continued instruction".to_owned();
        let start = file.source.line_start(line);
        reporter.report(Rule::NoEmptyContinuation, instruction, Span::new(start, start), message);
    }
}

/// Whether a name sounds like that of a secret.
pub(crate) fn is_secret_name(name: &str) -> bool {
    const SECRET: &[&str] =
        &["apikey", "auth", "credential", "credentials", "key", "password", "pword", "passwd", "secret", "token"];
    const HARMLESS: &[&str] = &["public", "file", "version"];
    let name = name.to_ascii_lowercase();
    let any = |words: &[&str]| name.split('_').any(|part| words.contains(&part));
    any(SECRET) && !any(HARMLESS)
}

#[cfg(test)]
mod tests;
