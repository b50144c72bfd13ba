//! What a build can be given: arguments, secrets, agents, and the caches that it keeps.
//!
//! Lowering collects it on its way through the stages that the target needs. Descriptions are comments right above an
//! ARG or FROM that begin with the name: `# VERSION is the release to fetch`.

use crate::instruction::{Dockerfile, Instruction, InstructionKind, Text};
use crate::llb::MountKind;
use crate::lower::environment::Environment;
use crate::source::Span;
use crate::stage::described;
use crate::word::{Lexer, Variables};
use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};

/// All that a target can be given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outline {
    /// The target as the user named it, if it has a name.
    pub name: Option<String>,
    /// What its comment says.
    pub description: Option<String>,
    /// Build args in the order of the file.
    pub args: Vec<Argument>,
    /// Secrets in the order of the file.
    pub secrets: Vec<Given>,
    /// ssh agents in the order of the file.
    pub ssh: Vec<Given>,
    /// Cache mounts by their id.
    pub caches: Vec<Given>,
    /// What the lists hold already: the kind (0 for args) and the name, with the place.
    known: HashMap<(u8, String), usize>,
}

/// A build arg.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Argument {
    /// Its name.
    pub name: String,
    /// What its comment says.
    pub description: Option<String>,
    /// Value in this build: given, or the default.
    pub value: Option<String>,
    /// Where it is declared.
    pub span: Span,
}

/// A secret, agent or cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    /// Its name.
    pub name: String,
    /// The build fails without.
    pub required: bool,
    /// The mount that names it first.
    pub span: Span,
}

impl Outline {
    /// An ARG of a stage. One without a default of its own may stand for a global one; that one is listed then.
    pub(crate) fn arg(&mut self, at: &Instruction, name: &Text, has_default: bool, value: Option<&str>) {
        match self.known.entry((0, name.value.clone())) {
            Entry::Occupied(_) if !has_default => return,
            entry => _ = entry.or_insert(self.args.len()),
        }
        self.args.push(Argument {
            name: name.value.clone(),
            description: described(at, &name.value),
            value: value.map(str::to_owned),
            span: name.span,
        });
    }

    /// A mount of RUN.
    pub(crate) fn mount(&mut self, kind: &MountKind, span: Span) {
        let (kind, list, name, required) = match kind {
            MountKind::Secret { id, required, .. } => (1, &mut self.secrets, id, *required),
            MountKind::Ssh { id, required, .. } => (2, &mut self.ssh, id, *required),
            MountKind::Cache { id, .. } => (3, &mut self.caches, id, false),
            _ => return,
        };
        let at = *self.known.entry((kind, name.clone())).or_insert(list.len());
        match list.get_mut(at) {
            Some(one) => one.required |= required,
            None => list.push(Given { name: name.clone(), required, span }),
        }
    }

    /// Takes in the ARGs before the first FROM that the given FROMs use, or an ARG of a stage repeats.
    pub(crate) fn global_args(
        &mut self,
        file: &Dockerfile,
        used_by: &[&Instruction],
        values: &Environment,
        lexer: &Lexer,
    ) {
        let names = |word: &Text| -> BTreeSet<String> {
            lexer.word(&word.value, values).map(|word| &word.matched | &word.unmatched).unwrap_or_default()
        };
        let mut used: BTreeSet<String> = self.args.iter().map(|arg| arg.name.clone()).collect();
        for from in used_by {
            if let InstructionKind::From { platform, image, .. } = &from.kind {
                used.extend(names(image));
                used.extend(platform.iter().flat_map(names));
            }
        }
        // Defaults use what is declared before them: backwards, so that one pass is enough.
        let globals: Vec<&Instruction> =
            file.instructions.iter().take_while(|one| !matches!(one.kind, InstructionKind::From { .. })).collect();
        let mut found = Vec::new();
        for instruction in globals.into_iter().rev() {
            let InstructionKind::Arg(pairs) = &instruction.kind else { continue };
            for (name, default) in pairs.iter().rev().filter(|(name, _)| used.contains(&name.value)).collect::<Vec<_>>()
            {
                used.extend(default.iter().flat_map(names));
                found.push(Argument {
                    name: name.value.clone(),
                    description: described(instruction, &name.value),
                    value: values.get(&name.value).map(str::to_owned),
                    span: name.span,
                });
            }
        }
        // What a stage only repeats is listed where it is declared.
        let mut repeats = HashMap::new();
        for (at, arg) in self.args.iter().enumerate() {
            repeats.entry((arg.name.clone(), arg.value.clone())).or_insert(at);
        }
        for global in found {
            let at = repeats.get(&(global.name.clone(), global.value.clone()));
            match at.and_then(|at| self.args.get_mut(*at)) {
                Some(repeated) => {
                    let description = repeated.description.take().or(global.description);
                    *repeated = Argument { description, ..global };
                }
                None => self.args.push(global),
            }
        }
    }

    /// Adds what the target's FROM says and puts everything in the order of the file.
    pub(crate) fn finish(mut self, target: &Instruction) -> Self {
        if let InstructionKind::From { name: Some(name), .. } = &target.kind {
            self.description = described(target, &name.value.to_lowercase());
            self.name = Some(name.value.to_lowercase());
        }
        // Places are others from here on.
        self.known.clear();
        self.args.sort_by_key(|arg| arg.span);
        for list in [&mut self.secrets, &mut self.ssh, &mut self.caches] {
            list.sort_by_key(|one| one.span);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llb::Platform;
    use crate::lower::{BaseConfigs, Options, lower_and_outline};
    use crate::parser;
    use crate::source::SourceFile;

    const FILE: &str = "\
# TAG of the base
ARG TAG=1${MAJOR}.2
ARG MAJOR=1
ARG UNUSED=x
FROM base:$TAG AS deps
RUN --mount=type=cache,id=mods,target=/m --mount=type=secret,id=npm true

FROM scratch AS other
ARG NOT_LISTED

# app is what runs
FROM deps AS App
# VERSION to build
ARG VERSION=0 TAG
ARG LEVEL
RUN --mount=type=secret,id=npm,required --mount=type=ssh true
";

    fn outline(options: &Options) -> Outline {
        let file = parser::parse(SourceFile::new("Dockerfile", FILE)).expect("parses");
        lower_and_outline(&file, options, &BaseConfigs::new()).expect("lowers").2
    }

    #[test]
    fn everything_the_target_needs() {
        let host = Platform { os: "linux".to_owned(), architecture: "amd64".to_owned(), variant: String::new() };
        let args = [("VERSION".to_owned(), Some("7".to_owned()))].into();
        let options = Options { check_only: true, build_args: args, ..Options::new(host) };
        let found = outline(&options);
        assert_eq!((found.name.as_deref(), found.description.as_deref()), (Some("app"), Some("is what runs")));
        let args: Vec<(&str, Option<&str>, Option<&str>)> = found
            .args
            .iter()
            .map(|arg| (arg.name.as_str(), arg.value.as_deref(), arg.description.as_deref()))
            .collect();
        let expected = [
            ("TAG", Some("1.2"), Some("of the base")),
            ("VERSION", Some("7"), Some("to build")),
            ("LEVEL", None, None),
        ];
        assert_eq!(args, expected);
        let names = |list: &[Given]| -> Vec<(String, bool)> {
            list.iter().map(|one| (one.name.clone(), one.required)).collect()
        };
        assert_eq!(names(&found.secrets), [("npm".to_owned(), true)]);
        assert_eq!(names(&found.ssh), [("default".to_owned(), false)]);
        assert_eq!(names(&found.caches), [("mods".to_owned(), false)]);

        let found = outline(&Options { target: Some("other".to_owned()), ..options });
        assert_eq!(found.args.len(), 1);
        assert_eq!((found.description, found.secrets), (None, Vec::new()));
    }
}
