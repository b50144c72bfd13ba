//! RUN: arguments, heredocs and the environment of the step.

use super::mount::Mounts;
use super::{At, StageLowering, text};
use crate::diagnostic::{Diagnostic, Problem};
use crate::instruction::{Command as CommandLine, Heredoc, RunFlags};
use crate::llb::{Mount, MountKind, Network, Op, RunOp, Security};
use crate::lower::environment::Environment;
use crate::lower_problem::LowerProblem;
use crate::stage::{SourceRef, problem};
use crate::word::{Lexer, Variables};
use std::rc::Rc;

/// What a variable takes beside its text.
const PAIR: usize = 64;

impl StageLowering<'_, '_> {
    pub(super) fn run_command(
        &mut self,
        at: &At<'_>,
        flags: &RunFlags,
        line: &CommandLine,
        heredocs: &[Heredoc],
        sources: &[Option<SourceRef>],
    ) -> Result<(), Diagnostic> {
        let network = self.network(flags)?;
        let security = self.security(flags)?;
        if let Some(device) = flags.devices.first() {
            return Err(problem(device.span, LowerProblem::Device(device.value.clone())));
        }
        let (shared, options) = (self.shared, self.shared.options);
        let mut inputs = vec![self.state.top];
        let Mounts { mut mounts, ssh_socket, secret_env } = self.mounts(at, &flags.mounts, sources, &mut inputs)?;

        let (args, script) = self.arguments(at, line, heredocs);
        mounts.extend(script);
        // Every step has an environment of its own in the graph.
        let size: usize = self.state.env.list().iter().map(|(name, value)| name.len() + value.len() + PAIR).sum();
        shared.spend(size).map_err(|error| Diagnostic::at(line.span, error.into()))?;
        let mut env = self.state.env.list().to_vec();
        if let Some(socket) = ssh_socket
            && !env.iter().any(|(name, _)| name == "SSH_AUTH_SOCK")
        {
            env.push(("SSH_AUTH_SOCK".to_owned(), socket));
        }
        let proxies = shared.proxies.iter().filter(|(name, _)| !env.iter().any(|(set, _)| set == name));
        let op = RunOp {
            args: args.clone(),
            env_outside_key: proxies.cloned().collect(),
            env,
            cwd: self.state.cwd_as_written(),
            user: self.state.image.config.user.clone(),
            mounts,
            network,
            security,
            extra_hosts: options.extra_hosts.clone(),
            ulimits: options.ulimits.clone(),
            shm_size_bytes: options.shm_size_bytes,
            cgroup_parent: options.cgroup_parent.clone(),
            hostname: shared.hostname.clone(),
        };

        // Names of steps show what is known; the shell's own variables stay, and so do quotes.
        let lexer = Lexer { raw_quotes: true, skip_unset_env: true, ..shared.lexer };
        let mut shown = Rc::clone(&self.state.env);
        for name in secret_env {
            Rc::make_mut(&mut shown).set(&name, "****".to_owned());
        }
        let name = self.words(at.instruction, at.trigger, &lexer, &shown, &summary(line, heredocs));
        self.add(Op::Run(Box::new(op)), inputs, name);
        let created_by = format!("RUN {}{} # buildkit", self.declared_args(), args.join(" "));
        self.commit(created_by, false);
        Ok(())
    }

    fn network(&self, flags: &RunFlags) -> Result<Network, Diagnostic> {
        let default = self.shared.options.network;
        let Some(network) = &flags.network else { return Ok(default) };
        match network.value.as_str() {
            "default" => Ok(default),
            "none" => Ok(Network::None),
            "host" if self.shared.options.allow_network_host || default == Network::Host => Ok(Network::Host),
            "host" => Err(problem(network.span, LowerProblem::HostNetworkNotAllowed)),
            other => Err(Diagnostic::at(network.span, Problem::NetworkMode(other.to_owned()))),
        }
    }

    fn security(&self, flags: &RunFlags) -> Result<Security, Diagnostic> {
        let Some(security) = &flags.security else { return Ok(Security::Sandbox) };
        match security.value.as_str() {
            "sandbox" => Ok(Security::Sandbox),
            "insecure" if self.shared.options.allow_insecure => Ok(Security::Insecure),
            "insecure" => Err(problem(security.span, LowerProblem::InsecureNotAllowed)),
            other => Err(Diagnostic::at(security.span, Problem::SecurityMode(other.to_owned()))),
        }
    }

    /// Arguments of the process, and the mount of the script that a heredoc with an interpreter line is.
    fn arguments(&self, at: &At<'_>, line: &CommandLine, heredocs: &[Heredoc]) -> (Vec<String>, Option<Mount>) {
        if line.exec_form {
            return (line.args.clone(), None);
        }
        let written = line.args.join(" ");
        match heredocs {
            [] => (self.with_shell(written), None),
            [heredoc] if is_only_heredoc(&written) => {
                if heredoc.content.starts_with("#!") && self.state.image.os != "windows" {
                    let target = text::absolute("/dev/pipes", &heredoc.name);
                    let kind = MountKind::Inline { content: heredoc.content.clone(), mode: 0o755 };
                    return (self.with_shell(target.clone()), Some(Mount { target, kind, read_only: true }));
                }
                (self.with_shell(heredoc.content.clone()), None)
            }
            heredocs => {
                // The shell reads the heredocs itself.
                let mut all = written;
                for heredoc in heredocs {
                    all.push('\n');
                    all.push_str(raw_content(at, heredoc));
                    all.push_str(&heredoc.name);
                }
                (self.with_shell(all), None)
            }
        }
    }

    /// `|2 A=1 B=2 `: the declared arguments with their values, each once.
    fn declared_args(&self) -> String {
        let mut words = Environment::default();
        for (name, value) in &self.state.build_args {
            let current = self.state.env.get(name).map(str::to_owned);
            words.set(name, current.or_else(|| value.clone()).unwrap_or_default());
        }
        let words = words.list();
        if words.is_empty() {
            return String::new();
        }
        let pairs: Vec<String> = words.iter().map(|(name, value)| format!("{name}={value}")).collect();
        format!("|{} {} ", words.len(), pairs.join(" "))
    }
}

/// Whether a command line is one heredoc marker and nothing else.
fn is_only_heredoc(line: &str) -> bool {
    let rest = line.trim_start_matches(|char: char| char.is_ascii_digit());
    let Some(name) = rest.strip_prefix("<<") else { return false };
    let name = name.strip_prefix('-').unwrap_or(name);
    let lexer = Lexer { skip_unset_env: true, ..Lexer::new('\\') };
    let none: &[(String, String)] = &[];
    !name.contains('<') && lexer.words(name, none).is_ok_and(|words| words.len() == 1)
}

/// The lines of a heredoc as written: the shell strips tabs itself, and the history shows them.
fn raw_content<'c>(at: &At<'c>, heredoc: &'c Heredoc) -> &'c str {
    match at.source.get(heredoc.span.start..heredoc.span.end) {
        Some(raw) if heredoc.chomp && is_chomped(raw, &heredoc.content) => raw,
        _ => &heredoc.content,
    }
}

fn is_chomped(raw: &str, content: &str) -> bool {
    raw.lines().map(|line| line.trim_start_matches('\t')).eq(content.lines()) && raw.ends_with('\n')
}

/// ` (first line...)` behind the marker of a script.
fn summary(line: &CommandLine, heredocs: &[Heredoc]) -> String {
    match heredocs {
        [heredoc] if !line.exec_form && is_only_heredoc(&line.args.join(" ")) => {
            let content = heredoc.content.trim();
            let first = content.lines().next().unwrap_or_default();
            let more = if content.lines().count() > 1 { "..." } else { "" };
            format!(" ({first}{more})")
        }
        _ => String::new(),
    }
}
