//! The spawner: `nacre __sandbox spawner`.
//!
//! ```text
//! nacre ──exec, once──▶ spawner ──fork──▶ supervisor of a step, a child of nacre
//!   └──────── socket: descriptors, process id ──────┘
//! ```
//!
//! A builder with threads and a large heap must not fork, and executing the program for each step would cost a third of a
//! short step: a static program has thousands of addresses to set before it can start. So the program is executed once,
//! and this small process with one thread forks whenever the builder asks. Supervisors are the builder's own children
//! (`CLONE_PARENT`), as if it had forked them: it waits for them, and they are told when it dies.
//!
//! A supervisor names itself to the builder before it does anything: where no name comes, nothing runs, and another spawner can
//! be asked. That matters where a step shares the pid namespace and can stop or kill this process. It ends when the builder
//! closes the socket or dies.

use super::{SANDBOX_ARGUMENT, init, supervisor_program};
use crate::sys::{self, Call, CallError, Fork};
use rustix::fd::{AsRawFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::{Pid, Signal};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, mpsc};
use std::time::Duration;

/// Follows [`SANDBOX_ARGUMENT`] for a process that is to be the spawner.
pub(super) const ARGUMENT: &str = "spawner";

/// The order, and where the step's output goes.
const DESCRIPTORS: usize = 3;

/// How long a spawner may take to fork. One that takes longer has been stopped by a step.
const PATIENCE: Duration = Duration::from_secs(10);

struct Spawner {
    /// The builder's end.
    socket: OwnedFd,
    process: Child,
}

impl Drop for Spawner {
    fn drop(&mut self) {
        // Errors: it has ended already.
        _ = self.process.kill();
        _ = self.process.wait();
    }
}

static SPAWNER: Mutex<Option<Spawner>> = Mutex::new(None);

/// Starts a supervisor with these standard streams; its process id. It is a child of this process.
pub(super) fn spawn(streams: [BorrowedFd<'_>; DESCRIPTORS]) -> sys::Result<Pid> {
    let mut spawner = SPAWNER.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(known) = &*spawner {
        match ask(&known.socket, streams) {
            Ok(answer) => return answer,
            // It is gone, or will be: what is late must not be taken for the answer to another question.
            Err(_) => *spawner = None,
        }
    }
    let started = spawner.insert(start()?);
    ask(&started.socket, streams).unwrap_or_else(|error| {
        *spawner = None;
        Err(error)
    })
}

fn start() -> sys::Result<Spawner> {
    let (own, other) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .call(|| "socketpair()".into())?;
    for direction in [Timeout::Recv, Timeout::Send] {
        sockopt::set_socket_timeout(&own, direction, Some(PATIENCE)).call(|| "setsockopt(timeout)".into())?;
    }
    let program = supervisor_program()?;
    let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    command.arg0("nacre").args([SANDBOX_ARGUMENT, ARGUMENT]).env_clear();
    command.arg(std::process::id().to_string());
    if sys::gives_huge_pages() {
        command.env(sys::HUGE_PAGES, "1");
    }
    command.stdin(other).stdout(Stdio::null()).stderr(Stdio::null());
    // A Ctrl-C at the terminal is for the builder alone; it decides what happens to its steps.
    command.process_group(0);
    let (tell, told) = mpsc::sync_channel(1);
    // Supervisors get the thread that starts their spawner as their parent, and a signal when that thread ends. So it stays.
    std::thread::Builder::new()
        .name("spawner".to_owned())
        .spawn(move || {
            let started = command.spawn().call(|| format!("execve({:?}, {SANDBOX_ARGUMENT})", command.get_program()));
            // The end of the other end of the socket that this process has.
            drop(command);
            let failed = started.is_err();
            if tell.send(started).is_err() || failed {
                return;
            }
            loop {
                std::thread::park();
            }
        })
        .call(|| "thread(spawner)".into())?;
    let started = told.recv();
    let lost = |_| Err(CallError::new("thread(spawner)", io::Error::from(io::ErrorKind::BrokenPipe)));
    Ok(Spawner { socket: own, process: started.unwrap_or_else(lost)? })
}

/// What the spawner answers; the outer error is that it does not.
fn ask(socket: &OwnedFd, streams: [BorrowedFd<'_>; DESCRIPTORS]) -> sys::Result<sys::Result<Pid>> {
    let call = || "sendmsg(spawner)".to_owned();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&streams)) {
        return Err(CallError::new(call(), io::Error::from(io::ErrorKind::InvalidInput)));
    }
    repeated(|| rustix::net::sendmsg(socket, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)).call(call)?;
    let call = || "recv(spawner)".to_owned();
    let mut answer = [0; 4];
    let length = repeated(|| rustix::net::recv(socket, &mut answer, RecvFlags::empty()).map(|(length, _)| length));
    match (length.call(call)?, i32::from_ne_bytes(answer)) {
        (4, pid) if pid > 0 => Ok(Pid::from_raw(pid).ok_or(Errno::INVAL).call(call)),
        (4, error) => Ok(Err(CallError::new("clone(supervisor)", io::Error::from_raw_os_error(-error)))),
        _ => Err(CallError::new(call(), Errno::PIPE)),
    }
}

fn repeated<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

/// Runs as the spawner; its children return as supervisors. The exit code.
pub(super) fn main() -> i32 {
    sys::expect_children();
    // Whatever the builder was given by its caller is not for this process to keep open.
    if sys::close_from(3, false).is_err() {
        return init::MISUSE;
    }
    let Ok(socket) = sys::copy_of_stdin() else { return init::MISUSE };
    // A process that is stopped reads no end of a socket. The signal is not passed on to the children.
    let watch = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    let parent = std::env::args().nth(3).and_then(|pid| pid.parse().ok());
    if watch.is_err() || rustix::process::getppid().map(Pid::as_raw_pid) != parent {
        return init::MISUSE;
    }
    loop {
        let streams = match receive(&socket) {
            Ok(Some(streams)) => streams,
            // The builder is gone.
            Ok(None) | Err(Errno::CONNRESET) => return 0,
            Err(_) => return init::MISUSE,
        };
        let answer = match sys::fork(libc::CLONE_PARENT) {
            Ok(Fork::Child) => {
                let own = rustix::process::getpid().as_raw_pid();
                if tell(&socket, own).is_err() {
                    // Nobody waits for this step any more.
                    return init::MISUSE;
                }
                drop(socket);
                return supervise(streams);
            }
            Ok(Fork::Parent(_)) => Ok(()),
            Err(error) => tell(&socket, -error.source.raw_os_error().unwrap_or(libc::EIO)),
        };
        drop(streams);
        if answer.is_err() {
            return 0;
        }
    }
}

fn tell(socket: &OwnedFd, answer: i32) -> rustix::io::Result<()> {
    repeated(|| rustix::net::send(socket, &answer.to_ne_bytes(), SendFlags::NOSIGNAL)).map(drop)
}

/// The descriptors of one request; `None` when there will be no more.
fn receive(socket: &OwnedFd) -> rustix::io::Result<Option<[OwnedFd; DESCRIPTORS]>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = repeated(|| {
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    if message.bytes == 0 {
        return Ok(None);
    }
    if message.flags.contains(ReturnFlags::CTRUNC) {
        return Err(Errno::INVAL);
    }
    let received: Vec<OwnedFd> = control
        .drain()
        .flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
            _ => Vec::new(),
        })
        .collect();
    received.try_into().map(Some).map_err(|_| Errno::INVAL)
}

/// Goes on as the supervisor of one step.
fn supervise(streams: [OwnedFd; DESCRIPTORS]) -> i32 {
    let [order, output, errors] = streams;
    let placed = rustix::stdio::dup2_stdin(&order)
        .and_then(|()| rustix::stdio::dup2_stdout(&output))
        .and_then(|()| rustix::stdio::dup2_stderr(&errors))
        .and_then(|()| rustix::process::setpgid(None, None));
    drop((order, output, errors));
    match placed {
        Ok(()) => init::main(),
        Err(_) => init::MISUSE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fd::AsFd;

    #[test]
    fn requests_carry_three_descriptors() {
        let (one, other) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let answering = std::thread::spawn(move || {
            let streams = receive(&other).unwrap().unwrap();
            rustix::io::write(&streams[1], b"through").unwrap();
            rustix::net::send(&other, &7_i32.to_ne_bytes(), SendFlags::empty()).unwrap();
            // A copy of the asker's end is among them.
            drop(streams);
            drop(receive(&other).unwrap().unwrap());
            rustix::net::send(&other, &(-libc::EAGAIN).to_ne_bytes(), SendFlags::empty()).unwrap();
            receive(&other).unwrap().is_none()
        });
        let (read, write) = rustix::pipe::pipe().unwrap();
        let streams = [one.as_fd(), write.as_fd(), write.as_fd()];
        assert_eq!(ask(&one, streams).unwrap().unwrap().as_raw_pid(), 7);
        let mut text = [0; 7];
        assert_eq!(rustix::io::read(&read, &mut text).unwrap(), 7);
        assert_eq!(&text, b"through");
        assert!(ask(&one, streams).unwrap().unwrap_err().is(Errno::AGAIN));
        drop(one);
        assert!(answering.join().unwrap());
    }

    #[test]
    fn a_spawner_that_is_gone_is_noticed() {
        let (one, other) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let streams = [one.as_fd(); DESCRIPTORS];
        drop(other);
        assert!(ask(&one, streams).unwrap_err().is(Errno::PIPE));
    }
}
