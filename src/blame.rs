//! What a failed step is about: the word of the Dockerfile, and a way out that only a look at the files can tell.

use nacre_frontend::diagnostic::did_you_mean;
use nacre_frontend::instruction::{CopyInstruction, Dockerfile, Instruction, InstructionKind, Text};
use nacre_frontend::llb::{CopyOp, CopySource, Definition, MountKind, Op, Source, Vertex};
use nacre_frontend::source::Span;
use nacre_solver::context::Context;
use nacre_solver::op::copy::CopyError;
use nacre_solver::op::file::LocalContext;
use nacre_solver::op::run::RunError;
use nacre_solver::op::user::UserError;
use nacre_solver::snapshot::SnapshotError;
use nacre_solver::solve::VertexError;
use nacre_solver::tree::Kind;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Files of a context that are looked through for a similar name.
const MANY_FILES: usize = 50_000;

/// A build's steps and what they read.
pub(crate) struct Steps<'a> {
    /// What the user wrote.
    pub(crate) dockerfile: &'a Dockerfile,
    /// What came of it.
    pub(crate) definition: &'a Definition,
    /// Directories by name.
    pub(crate) contexts: &'a BTreeMap<String, Arc<LocalContext>>,
}

/// What to show with an error.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Blame {
    /// The word that it is about.
    pub(crate) word: Option<Span>,
    /// A way out.
    pub(crate) help: Option<String>,
}

impl Steps<'_> {
    /// Finds word and way out for the error of vertex number `id`.
    pub(crate) fn blame(&self, id: usize, error: &VertexError) -> Blame {
        let Some(vertex) = self.definition.vertices.get(id) else { return Blame::default() };
        let instruction = self.dockerfile.instructions.iter().find(|one| Some(one.lines) == vertex.lines);
        let mut blame = match error {
            VertexError::Snapshot(SnapshotError::Copy(error)) => self.copy(vertex, instruction, error),
            VertexError::Run(error) => self.run(vertex, instruction, error),
            VertexError::Source(_) => {
                let from = match instruction.map(|at| &at.kind) {
                    Some(InstructionKind::Copy(copy)) => copy.from.as_ref(),
                    _ => None,
                };
                Blame {
                    word: instruction.and_then(|at| source_word(vertex, at)),
                    help: from.map(|from| {
                        similar_stage(self.dockerfile, &from.value).unwrap_or_else(|| {
                            let name = &from.value;
                            format!(
                                "`{name}` is neither a stage of this Dockerfile nor a build context, so it is an image"
                            )
                        })
                    }),
                }
            }
            _ => Blame::default(),
        };
        blame.help = blame.help.or_else(|| error.help());
        blame
    }

    fn copy(&self, vertex: &Vertex, at: Option<&Instruction>, error: &CopyError) -> Blame {
        let mut blame = Blame::default();
        if let CopyError::NotFound { path, input } = error {
            blame.help = self.missing(vertex, *input, path);
        }
        if let (CopyError::NotADirectory { .. }, Some(InstructionKind::Workdir(path))) = (error, at.map(|at| &at.kind))
        {
            blame.word = Some(path.span);
        }
        let copy = match at.map(|at| &at.kind) {
            Some(InstructionKind::Copy(copy) | InstructionKind::Add(copy)) => copy,
            _ => return blame,
        };
        let Op::Copy(op) = &vertex.op else { return blame };
        blame.word = match error {
            CopyError::NotFound { path, input } => source(op, copy, |source| match source {
                CopySource::Tree { input: of, pattern } => of == input && leads_to(pattern, path),
                _ => false,
            }),
            CopyError::BadPattern { pattern } => source(op, copy, |source| match source {
                CopySource::Tree { pattern: of, .. } => of.ends_with(pattern.as_str()),
                _ => false,
            }),
            CopyError::Archive { path, .. } => source(op, copy, |source| match source {
                CopySource::Tree { pattern, .. } => leads_to(path, pattern) || leads_to(pattern, path),
                _ => true,
            }),
            CopyError::NoUsers { .. } | CopyError::Users { .. } => copy.chown.as_ref().map(|chown| chown.span),
            CopyError::BadExclude(_) => copy.excludes.first().map(|exclude| exclude.span),
            CopyError::TooManyLinks { .. }
            | CopyError::NotADirectory { .. }
            | CopyError::DirectoryOntoOther { .. }
            | CopyError::FileOntoDirectory { .. } => Some(copy.dest.span),
            CopyError::Staging { .. } | CopyError::NoInput { .. } => None,
        };
        blame
    }

    fn run(&self, vertex: &Vertex, at: Option<&Instruction>, error: &RunError) -> Blame {
        let mounts: &[Text] = match at.map(|at| &at.kind) {
            Some(InstructionKind::Run { flags, .. }) => &flags.mounts,
            _ => &[],
        };
        let Op::Run(op) = &vertex.op else { return Blame::default() };
        let mount = |wanted: &dyn Fn(&MountKind) -> bool| {
            op.mounts.iter().position(|mount| wanted(&mount.kind)).and_then(|at| mounts.get(at)).map(|mount| mount.span)
        };
        match error {
            RunError::User(UserError::NoUser { .. } | UserError::NoGroup { .. } | UserError::Range { .. }) => {
                Blame { word: at.and_then(|at| self.user_before(at, &op.user)), help: None }
            }
            RunError::NoSecret(id) | RunError::SecretNotText(id) => {
                let word = mount(&|kind| matches!(kind, MountKind::Secret { id: of, .. } if of == id));
                Blame { word, help: None }
            }
            RunError::NoSsh(id) => {
                Blame { word: mount(&|kind| matches!(kind, MountKind::Ssh { id: of, .. } if of == id)), help: None }
            }
            RunError::NoSource { target, path, .. } => {
                let found = op.mounts.iter().position(|mount| mount.target == *target);
                let input = found.and_then(|at| match &op.mounts[at].kind {
                    MountKind::Bind { input, .. } => *input,
                    MountKind::Cache { from, .. } => from.as_ref().map(|(input, _)| *input),
                    _ => None,
                });
                let word = found.and_then(|at| mounts.get(at)).map(|mount| {
                    let written = path.trim_start_matches('/');
                    word_in(self.dockerfile, mount.span, written)
                });
                Blame { word, help: input.and_then(|input| self.missing(vertex, input, path)) }
            }
            _ => Blame::default(),
        }
    }

    /// The USER above a step that gives this user. A base image's USER stands nowhere.
    fn user_before(&self, at: &Instruction, user: &str) -> Option<Span> {
        let before = self.dockerfile.instructions.iter().take_while(|one| one.span.start < at.span.start);
        let users = before.filter_map(|one| match &one.kind {
            InstructionKind::User(text) => Some(text),
            _ => None,
        });
        users.filter(|text| text.value == user || text.value.contains('$')).last().map(|text| text.span)
    }

    /// Why a path is not in an input of a step.
    fn missing(&self, vertex: &Vertex, input: usize, path: &str) -> Option<String> {
        let input = vertex.inputs.get(input).copied().flatten()?;
        let input = self.definition.vertices.get(input.0)?;
        let relative = path.trim_start_matches('/');
        match &input.op {
            Op::Source(Source::Local { name }) => missing_in(self.contexts.get(name)?, relative),
            Op::Source(Source::Image(_)) => {
                Some(format!("it is looked up in image `{}`", input.text.trim_start_matches("FROM ")))
            }
            Op::Source(_) => None,
            _ => Some(format!("it is looked up in stage `{}`, after its step `{}`", input.stage, input.text)),
        }
    }
}

/// Why a path, relative to a context, is not in its tree.
fn missing_in(local: &LocalContext, path: &str) -> Option<String> {
    if let Some(help) = local.context().and_then(|context| left_out(context, path)) {
        return Some(help);
    }
    let tree = local.tree().ok()?;
    if let Some(Kind::Symlink { target }) = tree.get(path.as_bytes()).map(|node| node.entry.kind) {
        let target = String::from_utf8_lossy(&target);
        return Some(format!("`{path}` is a link to `{target}`, which is ignored or not there"));
    }
    let paths: Vec<String> =
        tree.iter().take(MANY_FILES).filter_map(|node| String::from_utf8(node.entry.path).ok()).collect();
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    match (similar(path, &paths), local.context()) {
        (Some(guess), _) => Some(format!("did you mean `{guess}`?")),
        (None, _) if paths.len() <= 1 => Some("the build context is empty".to_owned()),
        (None, Some(context)) => Some(format!("paths are those below the build context {}", context.root().display())),
        (None, None) => Some("paths are those below the top of the build context".to_owned()),
    }
}

/// Why a path of a directory is not in the context.
fn left_out(context: &Context, path: &str) -> Option<String> {
    if let Some(link) = link_on_the_way(context.root(), path) {
        return Some(link);
    }
    if !context.is_ignored(path.as_bytes()) {
        return None;
    }
    let file = context.ignore_file()?;
    let file = file.strip_prefix(context.root()).unwrap_or(file).display().to_string();
    Some(match context.root().join(path).symlink_metadata().is_ok() {
        true => format!("`{path}` is there, but {file} excludes it; a line `!{path}` at its end keeps it"),
        false => format!("{file} excludes `{path}`, which does not exist either"),
    })
}

/// A link of the context that leads out of what is there.
fn link_on_the_way(root: &Path, path: &str) -> Option<String> {
    let mut at = root.to_owned();
    for part in path.split('/').filter(|part| !part.is_empty()) {
        at.push(part);
        let target = std::fs::read_link(&at).ok();
        if let Some(target) = target.filter(|_| at.metadata().is_err() || target_is_outside(root, &at)) {
            let link = at.strip_prefix(root).unwrap_or(&at).display().to_string();
            return Some(format!("`{link}` is a link to `{}`, which is not in the build context", target.display()));
        }
    }
    None
}

fn target_is_outside(root: &Path, link: &Path) -> bool {
    link.canonicalize().is_ok_and(|target| !target.starts_with(root))
}

/// The path that somebody probably meant: the same name elsewhere, else a name that differs little.
fn similar(path: &str, paths: &[&str]) -> Option<String> {
    let split = |path: &str| -> (String, String) {
        path.rsplit_once('/').map_or((String::new(), path.to_owned()), |(dir, name)| (dir.to_owned(), name.to_owned()))
    };
    let (dir, name) = split(path);
    if name.is_empty() {
        return None;
    }
    let depth = |path: &str| path.matches('/').count();
    let elsewhere = paths.iter().filter(|other| split(other).1 == name).min_by_key(|other| (depth(other), **other));
    if let Some(found) = elsewhere {
        return Some((*found).to_owned());
    }
    let beside = paths.iter().filter(|other| split(other).0 == dir && !other.is_empty());
    let names: Vec<String> = beside.map(|other| split(other).1).collect();
    if let Some(guess) = did_you_mean(&name, names.iter().map(String::as_str)) {
        return Some(if dir.is_empty() { guess } else { format!("{dir}/{guess}") });
    }
    did_you_mean(path, paths.iter().copied().filter(|other| !other.is_empty()))
}

/// A stage that an image name was probably meant to be.
pub(crate) fn similar_stage(dockerfile: &Dockerfile, name: &str) -> Option<String> {
    let names = dockerfile.instructions.iter().filter_map(|one| match &one.kind {
        InstructionKind::From { name: Some(name), .. } => Some(name.value.as_str()),
        _ => None,
    });
    // The stage itself has the name that its base has, in some files.
    let guess = did_you_mean(name, names.filter(|stage| !stage.eq_ignore_ascii_case(name)))?;
    Some(format!("there is no stage `{name}`, so it is an image; did you mean `{guess}`?"))
}

/// Where the source stands that a test finds. Sources of the op are in the order written, heredocs behind them.
fn source(op: &CopyOp, copy: &CopyInstruction, is_it: impl Fn(&CopySource) -> bool) -> Option<Span> {
    op.sources.iter().zip(&copy.sources).find(|(source, _)| is_it(source)).map(|(_, text)| text.span)
}

/// Does a pattern name this path, or something below it?
fn leads_to(pattern: &str, path: &str) -> bool {
    let parts = |path: &str| -> Vec<String> {
        let mut parts = Vec::new();
        for part in path.split('/') {
            match part {
                "" | "." => {}
                ".." => drop(parts.pop()),
                part => parts.push(part.to_owned()),
            }
        }
        parts
    };
    parts(pattern).starts_with(&parts(path))
}

/// What FROM, `--from` or ADD names.
fn source_word(vertex: &Vertex, at: &Instruction) -> Option<Span> {
    match (&at.kind, &vertex.op) {
        (InstructionKind::From { image, .. }, _) => Some(image.span),
        (InstructionKind::Copy(copy), _) => copy.from.as_ref().map(|from| from.span),
        (InstructionKind::Run { flags, .. }, _) => {
            let mut with_source = flags.mounts.iter().filter(|mount| mount.value.contains("from="));
            with_source.next().filter(|_| with_source.next().is_none()).map(|mount| mount.span)
        }
        (InstructionKind::Add(copy), Op::Source(Source::Http { url, .. } | Source::Git { remote: url, .. })) => {
            let exact = copy.sources.iter().find(|text| text.value.contains(url.as_str()));
            exact.or(copy.sources.first()).map(|text| text.span)
        }
        _ => None,
    }
}

/// A word inside of a span, or all of the span.
fn word_in(dockerfile: &Dockerfile, span: Span, word: &str) -> Span {
    let text = dockerfile.source.text.get(span.start..span.end).unwrap_or_default();
    let found = text.find(word).filter(|_| !word.is_empty());
    found.map_or(span, |at| Span::new(span.start + at, span.start + at + word.len()))
}

/// The first line of an ignore file that gives a pattern.
pub(crate) fn line_of(text: &str, pattern: &str) -> Span {
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let trimmed = line.trim();
        if !line.starts_with('#') && (trimmed == pattern || pattern != "!" && trimmed.contains(pattern)) {
            let start = at + line.len() - line.trim_start().len();
            return Span::new(start, start + trimmed.len());
        }
        at += line.len();
    }
    Span::default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nacre_solver::context::{DigestCache, IgnoreFile};

    #[test]
    fn similar_paths() {
        let paths = ["", "README.md", "src", "src/main.rs", "src/lib.rs", "docs/guide.md", "a/very/deep/config.toml"];
        let check = |path: &str, want: Option<&str>| assert_eq!(similar(path, &paths).as_deref(), want, "{path}");
        check("main.rs", Some("src/main.rs"));
        check("config.toml", Some("a/very/deep/config.toml"));
        check("src/mian.rs", Some("src/main.rs"));
        check("Readme.md", Some("README.md"));
        check("doc/guide.md", Some("docs/guide.md"));
        check("Cargo.toml", None);
        check("", None);
    }

    #[test]
    fn stages_of_a_similar_name() {
        let text = "FROM a AS build\nFROM build AS bild2\nCOPY --from=biuld /a /\n";
        let source = nacre_frontend::source::SourceFile::new("Dockerfile", text);
        let file = nacre_frontend::parser::parse(source).expect("parses");
        let help = similar_stage(&file, "biuld").expect("a guess");
        assert!(help.ends_with("did you mean `build`?"), "{help}");
        assert_eq!(similar_stage(&file, "debian"), None);
    }

    #[test]
    fn patterns_and_paths() {
        assert!(leads_to("a/*/c", "/a"));
        assert!(leads_to("../../etc/passwd", "/etc/passwd"));
        assert!(leads_to("./a.txt", "/a.txt"));
        assert!(!leads_to("ab", "/a"));
    }

    #[test]
    fn lines_of_ignore_files() {
        let text = "# !\nnode_modules\n  !\n[a\n";
        let word = |pattern| {
            let span = line_of(text, pattern);
            &text[span.start..span.end]
        };
        assert_eq!(word("!"), "!");
        assert_eq!(line_of(text, "!").start, 19);
        assert_eq!(word("[a"), "[a");
        assert_eq!(word("gone"), "");
    }

    #[test]
    fn reasons_why_a_file_is_missing() {
        let dir = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).expect("written");
        write(".dockerignore", "secret*\n");
        write("secret.txt", "x");
        write("app.py", "x");
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("out")).expect("a link");
        std::os::unix::fs::symlink("nowhere", dir.path().join("gone")).expect("a link");
        let context = Context::open(dir.path(), IgnoreFile::Directory).expect("a context");
        let digests = DigestCache::open(&dir.path().join("digests"));
        let local = LocalContext::new(context, digests);
        let check = |path: &str, want: &str| {
            let help = missing_in(&local, path).unwrap_or_default();
            assert!(help.contains(want), "{path}: {help}");
        };
        check("secret.txt", "`secret.txt` is there, but .dockerignore excludes it");
        check("secrets.txt", ".dockerignore excludes `secrets.txt`, which does not exist either");
        check("App.py", "did you mean `app.py`?");
        check("out", "`out` is a link to `/etc/passwd`, which is not in the build context");
        check("gone", "`gone` is a link to `nowhere`, which is not in the build context");
        check("other", "paths are those below the build context");
    }
}
