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
//! It ends when the builder closes the socket or dies.

use super::{SANDBOX_ARGUMENT, init, supervisor_program};
use crate::sys::{self, Call, CallError, Fork};
use rustix::fd::{AsRawFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::Pid;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Mutex, mpsc};

/// Follows [`SANDBOX_ARGUMENT`] for a process that is to be the spawner.
pub(super) const ARGUMENT: &str = "spawner";

/// The order, and where the step's output goes.
const DESCRIPTORS: usize = 3;

/// The builder's end of the socket, while there is a spawner.
static SPAWNER: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// Starts a supervisor with these standard streams; its process id. It is a child of this process.
pub(super) fn spawn(streams: [BorrowedFd<'_>; DESCRIPTORS]) -> sys::Result<Pid> {
    let mut spawner = SPAWNER.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(socket) = &*spawner {
        match ask(socket, streams) {
            // It is gone: without a pid namespace, a step can kill it.
            Err(error) if error.is(Errno::PIPE) || error.is(Errno::CONNRESET) => {}
            answer => return answer,
        }
    }
    ask(spawner.insert(start()?), streams)
}

/// Starts the spawner; this end of its socket.
fn start() -> sys::Result<OwnedFd> {
    let (own, other) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .call(|| "socketpair()".into())?;
    let program = supervisor_program()?;
    let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    command.arg0("nacre").args([SANDBOX_ARGUMENT, ARGUMENT]).env_clear();
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
            if tell.send(started.map(drop)).is_err() || failed {
                return;
            }
            loop {
                std::thread::park();
            }
        })
        .call(|| "thread(spawner)".into())?;
    let started = told.recv();
    started.unwrap_or_else(|_| Err(CallError::new("thread(spawner)", io::Error::from(io::ErrorKind::BrokenPipe))))?;
    Ok(own)
}

fn ask(socket: &OwnedFd, streams: [BorrowedFd<'_>; DESCRIPTORS]) -> sys::Result<Pid> {
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
        (4, pid) if pid > 0 => Pid::from_raw(pid).ok_or(Errno::INVAL).call(call),
        (4, error) => Err(CallError::new("clone(supervisor)", io::Error::from_raw_os_error(-error))),
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
    let Ok(socket) = sys::copy_of_stdin() else { return init::MISUSE };
    loop {
        let streams = match receive(&socket) {
            Ok(Some(streams)) => streams,
            // The builder is gone.
            Ok(None) | Err(Errno::CONNRESET) => return 0,
            Err(_) => return init::MISUSE,
        };
        let answer = match sys::fork(libc::CLONE_PARENT) {
            Ok(Fork::Child) => {
                drop(socket);
                return supervise(streams);
            }
            Ok(Fork::Parent(pid)) => pid.as_raw_pid(),
            Err(error) => -error.source.raw_os_error().unwrap_or(libc::EIO),
        };
        drop(streams);
        if repeated(|| rustix::net::send(&socket, &answer.to_ne_bytes(), SendFlags::NOSIGNAL)).is_err() {
            return 0;
        }
    }
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
        assert_eq!(ask(&one, streams).unwrap().as_raw_pid(), 7);
        let mut text = [0; 7];
        assert_eq!(rustix::io::read(&read, &mut text).unwrap(), 7);
        assert_eq!(&text, b"through");
        assert!(ask(&one, streams).unwrap_err().is(Errno::AGAIN));
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
