//! `RUN --mount`: expansion, defaults, and where the files come from.

use super::{At, StageLowering, text};
use crate::diagnostic::Diagnostic;
use crate::flag::{self, MountError, MountSpec, MountType, in_mount, option_span};
use crate::instruction::Text;
use crate::llb::{Mount, MountKind, Sharing, VertexId};
use crate::lower_problem::LowerProblem;
use crate::source::Span;
use crate::stage::{SourceRef, problem};
use std::collections::BTreeSet;

/// Mounts of a RUN.
#[derive(Default)]
pub(super) struct Mounts {
    pub(super) mounts: Vec<Mount>,
    /// SSH_AUTH_SOCK, when an agent is mounted.
    pub(super) ssh_socket: Option<String>,
    /// Variables that are filled with secrets.
    pub(super) secret_env: Vec<String>,
}

impl StageLowering<'_, '_> {
    /// Reads the mounts; what they read is added to `inputs`.
    pub(super) fn mounts(
        &mut self,
        at: &At<'_>,
        texts: &[Text],
        sources: &[Option<SourceRef>],
        inputs: &mut Vec<Option<VertexId>>,
    ) -> Result<Mounts, Diagnostic> {
        let mut mounts = Mounts::default();
        let mut agents = 0;
        for (index, text) in texts.iter().enumerate() {
            let spec = self.mount_spec(at, text)?;
            let source = sources.get(index).and_then(Option::as_ref);
            let mount = match spec.kind {
                MountType::Secret => {
                    mounts.secret_env.extend(spec.env.clone().filter(|name| !name.is_empty()));
                    secret(&spec, &self.state.cwd()).map_err(|error| in_mount(text, error))?
                }
                MountType::Ssh => {
                    let mount = ssh(&spec, agents, &self.state.cwd())
                        .map_err(|error| problem(option_span(text, "source"), error))?;
                    agents += 1;
                    mounts.ssh_socket.get_or_insert_with(|| mount.target.clone());
                    mount
                }
                _ => self.file_mount(&spec, source, text, inputs)?,
            };
            let span = if at.trigger { self.shared.plan.stages[self.index].from.span } else { text.span };
            self.graph.outline.mount(&mount.kind, span);
            mounts.mounts.push(mount);
        }
        Ok(mounts)
    }

    /// Reads a mount; each value is expanded for itself.
    fn mount_spec(&mut self, at: &At<'_>, text: &Text) -> Result<MountSpec, Diagnostic> {
        let mut unset = BTreeSet::new();
        let spec = flag::parse_mount_with(&text.value, |value| {
            let expanded = self.shared.lexer.word(value, &*self.state.env)?;
            self.shared.spend(expanded.value.len().saturating_sub(value.len()))?;
            unset.extend(expanded.unmatched);
            Ok(expanded.value)
        });
        for name in unset {
            self.undefined(at, &name, text.span);
        }
        spec.map_err(|error| in_mount(text, error))
    }

    fn file_mount(
        &mut self,
        spec: &MountSpec,
        source: Option<&SourceRef>,
        text: &Text,
        inputs: &mut Vec<Option<VertexId>>,
    ) -> Result<Mount, Diagnostic> {
        let written = spec.target.as_deref().unwrap_or_default();
        let target = text::absolute(&self.state.cwd(), written);
        if target == "/" {
            let span = if written.is_empty() { text.span } else { option_span(text, written) };
            return Err(problem(span, LowerProblem::MountOverRoot(written.to_owned())));
        }
        let path = text::absolute("/", spec.source.as_deref().unwrap_or_default());
        let kind = match spec.kind {
            MountType::Tmpfs => MountKind::Tmpfs { size_bytes: spec.size_bytes },
            MountType::Cache => {
                let from = match source {
                    Some(source) => {
                        self.source_vertex(source, from_span(text, spec))?.map(|id| (input(inputs, id), path))
                    }
                    None => None,
                };
                let id = match spec.id.as_deref() {
                    Some(id) if !id.is_empty() => id.to_owned(),
                    // The path as written: a relative target names the same cache from every directory.
                    _ => clean(written),
                };
                MountKind::Cache {
                    id: match self.shared.cache_namespace.as_str() {
                        "" => id,
                        namespace => format!("{namespace}/{id}"),
                    },
                    sharing: spec.sharing.unwrap_or(Sharing::Shared),
                    from,
                    mode: spec.mode.unwrap_or(0o755),
                    uid: spec.uid.unwrap_or(0),
                    gid: spec.gid.unwrap_or(0),
                }
            }
            _ => {
                let id = match source {
                    Some(source) => self.source_vertex(source, from_span(text, spec))?,
                    None => self.main_context().map_err(|error| problem(text.span, error))?,
                };
                MountKind::Bind { input: id.map(|id| input(inputs, id)), source: path }
            }
        };
        Ok(Mount { target, kind, read_only: spec.read_only })
    }
}

fn from_span(mount: &Text, spec: &MountSpec) -> Span {
    spec.from.as_ref().map_or(mount.span, |from| option_span(mount, from))
}

/// Position of a vertex among the inputs after number 0; added when it is new.
pub(super) fn input(inputs: &mut Vec<Option<VertexId>>, id: VertexId) -> usize {
    let known = inputs.iter().skip(1).position(|one| *one == Some(id));
    known.map_or_else(
        || {
            inputs.push(Some(id));
            inputs.len() - 1
        },
        |at| at + 1,
    )
}

/// A path without `.`, `..` and doubled slashes; a relative one stays relative.
fn clean(path: &str) -> String {
    if path.starts_with('/') {
        return text::absolute("/", path);
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/').filter(|part| !part.is_empty() && *part != ".") {
        match part {
            ".." if parts.last().is_some_and(|last| *last != "..") => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    if parts.is_empty() { ".".to_owned() } else { parts.join("/") }
}

fn base_name(path: &str) -> &str {
    path.trim_end_matches('/').rsplit('/').next().unwrap_or_default()
}

fn secret(spec: &MountSpec, cwd: &str) -> Result<Mount, MountError> {
    let written = spec.target.as_deref().filter(|target| !target.is_empty());
    let named = [&spec.source, &spec.id].into_iter().flatten().find(|name| !name.is_empty());
    let id = match (named, written) {
        (Some(id), _) => id.clone(),
        (None, Some(target)) => base_name(target).to_owned(),
        (None, None) => return Err(MountError::SecretWithoutName),
    };
    let target = match written {
        Some(target) => text::absolute(cwd, target),
        None => format!("/run/secrets/{}", base_name(&id)),
    };
    let kind = MountKind::Secret {
        id,
        required: spec.required,
        mode: spec.mode.unwrap_or(0o400),
        uid: spec.uid.unwrap_or(0),
        gid: spec.gid.unwrap_or(0),
        file: spec.env.is_none() || written.is_some(),
        env: spec.env.clone().filter(|name| !name.is_empty()),
    };
    Ok(Mount { target, kind, read_only: true })
}

fn ssh(spec: &MountSpec, index: usize, cwd: &str) -> Result<Mount, LowerProblem> {
    if let Some(source) = spec.source.as_ref().filter(|source| !source.is_empty()) {
        return Err(LowerProblem::SshSource(source.clone()));
    }
    let target = match spec.target.as_deref() {
        Some(target) if !target.is_empty() => text::absolute(cwd, target),
        _ => format!("/run/buildkit/ssh_agent.{index}"),
    };
    let kind = MountKind::Ssh {
        id: spec.id.clone().filter(|id| !id.is_empty()).unwrap_or_else(|| "default".to_owned()),
        required: spec.required,
        mode: spec.mode.unwrap_or(0o600),
        uid: spec.uid.unwrap_or(0),
        gid: spec.gid.unwrap_or(0),
    };
    Ok(Mount { target, kind, read_only: true })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cleaning() {
        fn check(path: &str, expected: &str) {
            assert_eq!(clean(path), expected);
        }
        check("/a//b/../c/", "/a/c");
        check("a/./b/..", "a");
        check("../a", "../a");
        check(".", ".");
    }
}
