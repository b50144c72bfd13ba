//! `--ssh`: agents that run already, and an agent of our own for key files.

use crate::build_command::failure;
use crate::report::{CommandError, Exit};
use crate::request::{SshAgent, SshSource};
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Loads the keys, says so, and ends the agent when standard input is closed: also when this process is killed.
const SCRIPT: &str = r#"ssh-add -q -- "$@" </dev/null && echo ready && cat >/dev/null; kill "$SSH_AGENT_PID""#;

/// Agents by the name that `RUN --mount=type=ssh,id=NAME` uses. Those that were started end when this is dropped.
pub(crate) struct SshAgents {
    sockets: BTreeMap<String, PathBuf>,
    _started: Vec<KeyAgent>,
}

impl SshAgents {
    /// Starts an agent for every list of key files.
    pub(crate) fn start(agents: &[SshAgent]) -> Result<Self, CommandError> {
        let mut started = Vec::new();
        let mut sockets = BTreeMap::new();
        for agent in agents {
            let socket = match &agent.source {
                SshSource::Socket(path) => path.clone(),
                SshSource::Keys(keys) => {
                    let own = KeyAgent::start(&agent.id, keys)?;
                    let socket = own.socket();
                    started.push(own);
                    socket
                }
            };
            sockets.insert(agent.id.clone(), socket);
        }
        Ok(Self { sockets, _started: started })
    }

    /// Sockets by name.
    pub(crate) fn sockets(&self) -> &BTreeMap<String, PathBuf> {
        &self.sockets
    }
}

/// A running `ssh-agent` with keys.
struct KeyAgent {
    child: Child,
    directory: tempfile::TempDir,
}

impl KeyAgent {
    fn start(id: &str, keys: &[PathBuf]) -> Result<Self, CommandError> {
        let error = |message: String, help: &str| failure(Exit::Usage, &message, Some(help.to_owned()));
        let cannot = |source: std::io::Error| match source.kind() {
            ErrorKind::NotFound => error(
                format!("--ssh {id}: key files need the program ssh-agent, which is not installed"),
                "install it (Debian: openssh-client), or give the socket of an agent",
            ),
            _ => error(format!("--ssh {id}: cannot start ssh-agent: {source}"), "give the socket of an agent"),
        };
        // Names of sockets are short, paths of stores may not be.
        let directory = tempfile::Builder::new().prefix("nacre-ssh-").tempdir().map_err(cannot)?;
        let mut command = Command::new("ssh-agent");
        command.arg("-a").arg(socket_in(directory.path())).args(["sh", "-c", SCRIPT, "sh"]).args(keys);
        // A passphrase is not asked for: a build has nobody to ask.
        command.env("SSH_ASKPASS", "/bin/false").env("SSH_ASKPASS_REQUIRE", "force");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A Ctrl-C at the terminal is for the builder alone.
        command.process_group(0);
        let mut child = command.spawn().map_err(cannot)?;
        let mut answer = [0; b"ready\n".len()];
        let ready = child.stdout.take().is_some_and(|mut stdout| stdout.read_exact(&mut answer).is_ok());
        let agent = Self { child, directory };
        if ready { Ok(agent) } else { Err(agent.refusal(id, &error)) }
    }

    /// What ssh-add said.
    fn refusal(mut self, id: &str, error: &dyn Fn(String, &str) -> CommandError) -> CommandError {
        drop(self.child.stdin.take());
        let mut said = String::new();
        if let Some(stderr) = self.child.stderr.take() {
            // Whatever it is: it explains, and a key's name is short.
            let _ = stderr.take(4096).read_to_string(&mut said);
        }
        error(
            format!("--ssh {id}: ssh-add does not take the keys: {}", said.trim()),
            "keys must belong to you and have no passphrase; an agent that has the others can be given by its socket",
        )
    }

    fn socket(&self) -> PathBuf {
        socket_in(self.directory.path())
    }
}

fn socket_in(directory: &Path) -> PathBuf {
    directory.join("agent")
}

impl Drop for KeyAgent {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        // It has been asked to end, and removes its socket; nothing depends on how that goes.
        let _ = self.child.wait();
    }
}
