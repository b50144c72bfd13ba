//! A socket of our own in front of the caller's ssh agent. The step's mode and owner are set on the socket that is mounted,
//! and the agent's own must keep those that it has.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// The socket; closed and removed when this is dropped.
pub(crate) struct AgentSocket {
    listener: UnixListener,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl AgentSocket {
    /// Listens, and passes every connection on to `agent` until dropped.
    pub(crate) fn new(agent: &Path) -> io::Result<Self> {
        // Not in the store: names of sockets are short, paths of stores may not be.
        let directory = tempfile::Builder::new().prefix("nacre-ssh-").tempdir()?;
        let path = directory.path().join("agent");
        let listener = UnixListener::bind(&path)?;
        let (accepting, agent) = (listener.try_clone()?, agent.to_owned());
        std::thread::spawn(move || {
            for connection in accepting.incoming() {
                let Ok(step) = connection else { return };
                // Without an agent behind it the step sees its connection closed.
                let Ok(agent) = UnixStream::connect(&agent) else { continue };
                std::thread::spawn(move || pass_on(step, agent));
            }
        });
        Ok(Self { listener, path, _directory: directory })
    }

    /// Where it listens.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for AgentSocket {
    fn drop(&mut self) {
        // A listening socket that is shut down accepts no more, which ends the thread.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }
}

/// Copies both ways until either side closes.
fn pass_on(mut step: UnixStream, mut agent: UnixStream) {
    let (Ok(mut from_step), Ok(mut from_agent)) = (step.try_clone(), agent.try_clone()) else { return };
    let back = std::thread::spawn(move || {
        let _ = io::copy(&mut from_agent, &mut step);
        let _ = step.shutdown(Shutdown::Both);
    });
    let _ = io::copy(&mut from_step, &mut agent);
    let _ = agent.shutdown(Shutdown::Both);
    let _ = back.join();
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn bytes_pass_both_ways_and_the_agents_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("real");
        let agent = UnixListener::bind(&path).unwrap();
        let socket = AgentSocket::new(&path).unwrap();
        assert_ne!(socket.path(), path);
        let mut step = UnixStream::connect(socket.path()).unwrap();
        step.write_all(b"question").unwrap();
        let (mut connection, _) = agent.accept().unwrap();
        let mut buffer = [0; 8];
        connection.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"question");
        connection.write_all(b"answer").unwrap();
        drop(connection);
        let mut answer = String::new();
        step.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "answer");
        let ours = socket.path().to_owned();
        drop(socket);
        assert!(UnixStream::connect(ours).is_err());
        assert!(path.exists());
    }
}
