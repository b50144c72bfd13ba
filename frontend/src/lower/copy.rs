//! COPY and ADD.

use super::mount::input;
use super::{At, GitUrl, StageLowering, git_url, text};
use crate::check::Rule;
use crate::diagnostic::Diagnostic;
use crate::instruction::{CopyInstruction, Text};
use crate::llb::{CopyOp, CopySource, Op, Source, Vertex, VertexId};
use crate::lower_problem::LowerProblem;
use crate::mode;
use crate::source::Span;
use crate::stage::{Base, External, SourceRef, problem};
use crate::word::Lexer;
use std::rc::Rc;

impl StageLowering<'_, '_> {
    pub(super) fn copy(
        &mut self,
        at: &At<'_>,
        copy: &CopyInstruction,
        add: bool,
        from: Option<&Option<SourceRef>>,
    ) -> Result<(), Diagnostic> {
        let from = from.and_then(Option::as_ref);
        let owner = self.expand_flag(at, copy.chown.as_ref())?;
        let mode = self.expand_flag(at, copy.chmod.as_ref())?;
        let checksum = self.expand_flag(at, copy.checksum.as_ref())?;
        // The one flag in which BuildKit expands nothing.
        let excludes = copy.excludes.iter().map(|text| text.value.clone()).collect();
        let paths = copy
            .sources
            .iter()
            .map(|text| self.expand(at, text).map(|path| (path, text)))
            .collect::<Result<Vec<_>, _>>()?;
        let dest = self.expand(at, &copy.dest)?;
        // Heredocs know one escape character, whatever the file says, and no quotes.
        let lexer = Lexer { skip_process_quotes: true, ..Lexer::new('\\') };
        let mut inline = Vec::new();
        for (_, heredoc) in &copy.heredocs {
            // BuildKit writes it into an empty file system, where there is no directory for it.
            if text::absolute("/", &heredoc.name).matches('/').count() > 1 {
                return Err(problem(at.instruction.span, LowerProblem::HeredocPath(heredoc.name.clone())));
            }
            let content = match heredoc.expand {
                true => self.expand_with(at, &lexer, &heredoc.content, heredoc.span)?,
                false => heredoc.content.clone(),
            };
            inline.push((heredoc.name.clone(), content));
        }

        let chmod = match (&mode, &copy.chmod) {
            (Some(mode), Some(text)) => Some(mode::parse(mode).map_err(|error| problem(text.span, error.into()))?),
            _ => None,
        };
        if let (Some(_), Some(flag)) = (&checksum, &copy.checksum) {
            check_checksum(&paths).map_err(|error| problem(flag.span, error))?;
        }

        let mut created_by = String::from(if add { "ADD" } else { "COPY" });
        if copy.parents {
            created_by.push_str(" --parents");
        }
        for (flag, value) in [("--chown", &owner), ("--chmod", &mode)] {
            if let Some(value) = value {
                created_by.push_str(&format!(" {flag}={value}"));
            }
        }
        let words =
            paths.iter().map(|(path, _)| path.clone()).chain(inline.iter().map(|(name, _)| format!("<<{name}")));
        for word in words.chain([dest.clone()]) {
            created_by.push(' ');
            created_by.push_str(&word);
        }
        created_by.push_str(" # buildkit");

        let env = Rc::clone(&self.state.env);
        let name = self.words(at.instruction, at.trigger, &self.shared.lexer, &env, "");
        let mut inputs = vec![self.state.top];
        let mut sources = Vec::new();
        for (path, text) in paths {
            let source = match remote(&path, text, copy, checksum.as_deref(), add)? {
                None => {
                    if from.is_none() {
                        self.ignored_source(at, &path, text.span, add);
                    }
                    let id = match from {
                        Some(from) => {
                            self.source_vertex(from, copy.from.as_ref().map_or(text.span, |from| from.span))?
                        }
                        None => self.main_context().map_err(|error| problem(text.span, error))?,
                    };
                    let input = match id {
                        Some(id) => input(&mut inputs, id),
                        // The empty file system.
                        None => {
                            inputs.push(None);
                            inputs.len() - 1
                        }
                    };
                    let pattern = if path.is_empty() { "/".to_owned() } else { path };
                    CopySource::Tree { input, pattern }
                }
                Some(source @ Source::Git { .. }) => {
                    let id = self.fetch(source, &name);
                    CopySource::Git { input: input(&mut inputs, id) }
                }
                Some(source) => {
                    let id = self.fetch(source, &name);
                    CopySource::Http { input: input(&mut inputs, id), name: git_url::file_name(&path) }
                }
            };
            sources.push(source);
        }
        sources.extend(inline.into_iter().map(|(name, content)| CopySource::Inline { name, content }));

        let op = CopyOp {
            add,
            sources,
            dest: self.destination(&dest),
            owner,
            // A mode has to be applied to the merged directories, which a layer of its own cannot see.
            link: copy.link && chmod.is_none(),
            chmod,
            parents: copy.parents,
            excludes,
            unpack: copy.unpack,
            from_stage: from.is_some_and(|from| self.keeps_owners(from)),
        };
        self.add(Op::Copy(Box::new(op)), inputs, name);
        self.commit(created_by, false);
        Ok(())
    }

    /// Reports a source that the main context leaves out.
    fn ignored_source(&mut self, at: &At<'_>, path: &str, span: Span, add: bool) {
        let replaced = self.shared.options.contexts.contains_key("context");
        let Some(rules) = self.shared.options.ignored.as_ref().filter(|_| !replaced) else { return };
        let relative = text::absolute("/", path);
        let relative = relative.trim_start_matches('/');
        if !relative.is_empty() && rules.ignores(relative) {
            let keyword = if add { "ADD" } else { "COPY" };
            let message = format!("{keyword} of `{path}`, which .dockerignore excludes");
            self.report(Rule::CopyIgnoredFile, at.instruction, at.trigger, span, message);
        }
    }

    fn expand_flag(&mut self, at: &At<'_>, flag: Option<&Text>) -> Result<Option<String>, Diagnostic> {
        let value = flag.map(|flag| self.expand(at, flag)).transpose()?;
        Ok(value.filter(|value| !value.is_empty()))
    }

    /// Absolute, clean; a slash at the end says that it is a directory.
    fn destination(&self, dest: &str) -> String {
        let mut path = text::absolute(&self.state.cwd(), dest);
        let directory = dest.is_empty() || dest == "." || dest.ends_with('/') || dest.ends_with("/.");
        if directory && path != "/" {
            path.push('/');
        }
        path
    }

    /// Files of stages and images keep their owners, those of contexts belong to root.
    fn keeps_owners(&self, from: &SourceRef) -> bool {
        let external = match from {
            SourceRef::External(external) => external,
            SourceRef::Stage(index) => match &self.shared.plan.stages[*index] {
                stage if stage.replaced => match &stage.base {
                    Base::External(external) => external,
                    Base::Stage(_) => return true,
                },
                _ => return true,
            },
        };
        !matches!(external, External::Files { .. })
    }

    /// The vertex of something that ADD fetches.
    fn fetch(&mut self, source: Source, name: &(String, String)) -> VertexId {
        let stage = self.shared.plan.stages[self.index].label(self.index);
        let (name, text) = name.clone();
        let lines = Some(self.lines);
        let platform = self.state.platform.clone();
        let ignore_cache = self.ignore_cache;
        self.graph.source(source, |op| Vertex {
            op,
            inputs: Vec::new(),
            name,
            stage,
            text,
            lines,
            platform,
            ignore_cache,
        })
    }
}

fn is_url(path: &str) -> bool {
    path.starts_with("http://") || path.starts_with("https://")
}

fn check_checksum(paths: &[(String, &Text)]) -> Result<(), LowerProblem> {
    match paths {
        [(path, _)] if is_url(path) || GitUrl::parse(path).is_some() => Ok(()),
        [(path, _)] => Err(LowerProblem::ChecksumLocal(path.clone())),
        paths => Err(LowerProblem::ChecksumSources(paths.len())),
    }
}

/// What is to be fetched for a source; `None` for files of a context or stage.
fn remote(
    path: &str,
    text: &Text,
    copy: &CopyInstruction,
    checksum: Option<&str>,
    add: bool,
) -> Result<Option<Source>, Diagnostic> {
    let wrong = |error: LowerProblem| problem(text.span, error);
    if let Some(url) = GitUrl::parse(path) {
        let url = url.map_err(|reason| wrong(LowerProblem::BadGitUrl { url: path.to_owned(), reason }))?;
        if !add {
            return Err(wrong(LowerProblem::CopyGit(path.to_owned())));
        }
        if let (Some(flag), Some(of_url)) = (checksum, &url.checksum)
            && flag != of_url
        {
            let (flag, url) = (flag.to_owned(), of_url.clone());
            return Err(wrong(LowerProblem::ChecksumConflict { flag, url }));
        }
        if let (Some(flag), Some(of_url)) = (copy.keep_git_dir, url.keep_git_dir)
            && flag != of_url
        {
            return Err(wrong(LowerProblem::KeepGitDirConflict(path.to_owned())));
        }
        return Ok(Some(Source::Git {
            remote: url.remote,
            reference: url.reference,
            subdir: url.subdir,
            keep_git_dir: url.keep_git_dir.or(copy.keep_git_dir).unwrap_or(false),
            checksum: url.checksum.or_else(|| checksum.map(str::to_owned)),
            submodules: url.submodules.unwrap_or(true),
        }));
    }
    if !is_url(path) {
        return Ok(None);
    }
    if !add {
        return Err(wrong(LowerProblem::CopyUrl(path.to_owned())));
    }
    if let Some(checksum) = checksum
        && !is_digest(checksum)
    {
        let span = copy.checksum.as_ref().map_or(text.span, |flag| flag.span);
        return Err(problem(span, LowerProblem::BadChecksum(checksum.to_owned())));
    }
    Ok(Some(Source::Http { url: path.to_owned(), checksum: checksum.map(str::to_owned) }))
}

fn is_digest(text: &str) -> bool {
    let hex = |digits: &str| digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    text.strip_prefix("sha256:").is_some_and(|digits| digits.len() == 64 && hex(digits))
}
