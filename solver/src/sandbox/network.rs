//! `--network=pasta`: a network namespace that a program in user space connects with the host's (pasta(1)).
//!
//! ```text
//! nacre ──exec──▶ holder: a mount namespace with a network namespace in it ──fork, exec──▶ pasta, with a tap device there
//!   │ stdin: closes when nacre ends                   ▲
//!   │ stdout: a byte when pasta is ready              │
//!   └─ steps join /proc/HOLDER/root/DIRECTORY/net ────┘
//! ```
//!
//! One for all steps of a build. Ports of the host's loopback are not reachable from the namespace, nor the other way round. pasta
//! gives up rights before it opens the namespace, so it cannot use the holder's entry in /proc: the namespace is bound to a file, in
//! a mount namespace that only the two are in.

use super::SANDBOX_ARGUMENT;
use super::step::separate_mounts;
use crate::sys::{self, Call, CallError, Fork};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::process::{Pid, Signal, WaitOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Second argument of the holder.
pub(super) const ARGUMENT: &str = "network";

/// The namespace, in the holder's directory.
const FILE: &str = "net";

/// It takes 50 ms. More than this is the hang that it is known for.
const DEADLINE: Duration = Duration::from_secs(10);

/// A network for steps; ends when dropped.
#[derive(Debug)]
pub struct Pasta {
    holder: Child,
    /// Its log and the namespace's file are in it.
    place: PathBuf,
    _dir: tempfile::TempDir,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum PastaError {
    /// No such program.
    #[error("`pasta` is not installed")]
    NotInstalled,
    /// The device that it needs.
    #[error("cannot open /dev/net/tun")]
    NoTun(#[source] std::io::Error),
    /// It did not come up.
    #[error("pasta did not start: {0}")]
    Failed(String),
    /// It did nothing at all.
    #[error("pasta was not ready after {} s", DEADLINE.as_secs())]
    TimedOut,
    /// A preparation failed.
    #[error("cannot prepare a network for the steps")]
    Prepare(#[source] std::io::Error),
}

impl PastaError {
    /// A way out, one sentence.
    pub fn help(&self) -> &'static str {
        match self {
            Self::NotInstalled => "install the package passt, or use the host's network: --network=host",
            Self::NoTun(_) => {
                "docker run --device /dev/net/tun …, on a machine: modprobe tun and chmod 666 /dev/net/tun; or use the host's \
                 network: --network=host"
            }
            Self::Failed(_) | Self::TimedOut | Self::Prepare(_) => {
                "use the host's network, or none: --network=host, --network=none"
            }
        }
    }
}

/// Opens the device that connects user space with a network.
pub(super) fn open_tun() -> std::io::Result<OwnedFd> {
    Ok(rustix::fs::open("/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}

impl Pasta {
    /// Starts pasta out of one of `directories`, as root of some namespace.
    pub fn start(directories: &[PathBuf]) -> Result<Pasta, PastaError> {
        let program = directories.iter().map(|dir| dir.join("pasta")).find(|path| path.is_file());
        let program = program.ok_or(PastaError::NotInstalled)?;
        // Without it, pasta says so and waits for ever.
        drop(open_tun().map_err(PastaError::NoTun)?);
        // The second time without IPv6, whose set-up has been seen to stall.
        match Pasta::attempt(&program, &[]) {
            Err(PastaError::TimedOut) => Pasta::attempt(&program, &["-4"]),
            result => result,
        }
    }

    fn attempt(program: &Path, more: &[&str]) -> Result<Pasta, PastaError> {
        let dir = tempfile::tempdir().map_err(PastaError::Prepare)?;
        // Steps see the directory below the holder's root, where links would lead out again.
        let place = dir.path().canonicalize().map_err(PastaError::Prepare)?;
        let log = place.join("log");
        let stderr = std::fs::File::create(&log).map_err(PastaError::Prepare)?;
        let mut holder = Command::new("/proc/self/exe")
            .args([SANDBOX_ARGUMENT, ARGUMENT])
            .arg(&place)
            .arg(program)
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            // A Ctrl-C at the terminal is for the builder, whose steps need the network until they have ended.
            .process_group(0)
            .spawn()
            .map_err(PastaError::Prepare)?;
        let pipe = holder.stdout.take();
        let pasta = Pasta { holder, place, _dir: dir };
        match pipe.map(|pipe| is_ready(pipe, DEADLINE)).unwrap_or(Ready::No) {
            Ready::Yes => Ok(pasta),
            Ready::Late => Err(PastaError::TimedOut),
            Ready::No => {
                let text = std::fs::read_to_string(&log).unwrap_or_default();
                // Where there is no system log, it says that, too.
                let lines: Vec<&str> = text.lines().filter(|line| !line.contains("to syslog")).collect();
                Err(PastaError::Failed(lines.join("; ")))
            }
        }
    }

    /// The namespace, as a path to be joined by.
    pub fn namespace(&self) -> PathBuf {
        let mut path = PathBuf::from(format!("/proc/{}/root", self.holder.id()));
        path.extend(self.place.components().filter(|part| matches!(part, std::path::Component::Normal(_))));
        path.join(FILE)
    }
}

impl Drop for Pasta {
    fn drop(&mut self) {
        // The holder ends pasta and itself.
        drop(self.holder.stdin.take());
        _ = self.holder.wait();
    }
}

enum Ready {
    Yes,
    No,
    Late,
}

/// Waits for the holder's word.
fn is_ready(mut pipe: std::process::ChildStdout, patience: Duration) -> Ready {
    let timeout = Timespec::try_from(patience).ok();
    loop {
        match rustix::event::poll(&mut [PollFd::new(&pipe, PollFlags::IN)], timeout.as_ref()) {
            Ok(0) => return Ready::Late,
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return Ready::No,
        }
    }
    match pipe.read(&mut [0; 1]) {
        Ok(1) => Ready::Yes,
        _ => Ready::No,
    }
}

/// Runs as the holder: `__sandbox network DIRECTORY PASTA OPTION…`.
pub(super) fn main() -> i32 {
    sys::expect_children();
    let mut args = std::env::args_os().skip(3);
    let (Some(dir), Some(program)) = (args.next(), args.next()) else { return 1 };
    match hold(Path::new(&dir), Path::new(&program), &args.collect::<Vec<_>>()) {
        Ok(()) => 0,
        Err(error) => {
            _ = writeln!(std::io::stderr(), "{error}: {}", error.source);
            1
        }
    }
}

fn hold(dir: &Path, program: &Path, more: &[std::ffi::OsString]) -> sys::Result<()> {
    // The same happens when its standard input closes, which a process that shares it could delay.
    _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    sys::unshare(libc::CLONE_NEWNS)?;
    separate_mounts()?;
    let (file, ready) = (dir.join(FILE), dir.join("pid"));
    std::fs::write(&file, "").call(|| format!("create({file:?})"))?;
    make_namespace(&file)?;

    let pid = match sys::fork(0)? {
        Fork::Child => {
            let error = become_pasta(program, &file, &ready, more);
            _ = writeln!(std::io::stderr(), "{error}: {}", error.source);
            sys::exit_now(1)
        }
        Fork::Parent(pid) => pid,
    };
    let result = watch(pid, &ready);
    // With whatever it has started.
    _ = rustix::process::kill_process_group(pid, Signal::KILL);
    _ = rustix::process::kill_process(pid, Signal::KILL);
    _ = rustix::process::waitpid(Some(pid), WaitOptions::empty());
    result
}

/// Makes a network namespace that is kept by a mount on `file`. This process stays in its own, as pasta has to be in it
/// and nobody but root could come back.
fn make_namespace(file: &Path) -> sys::Result<()> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).call(|| "pipe()".into())?;
    let pid = match sys::fork(libc::CLONE_NEWNET)? {
        Fork::Child => {
            drop(write);
            let up = sys::bring_loopback_up();
            // Until the mount is made.
            _ = rustix::io::read(&read, &mut [0; 1]);
            sys::exit_now(i32::from(up.is_err()))
        }
        Fork::Parent(pid) => pid,
    };
    let path = format!("/proc/{}/ns/net", pid.as_raw_pid());
    let mounted = sys::clone_mount(CWD, Path::new(&path))
        .and_then(|namespace| sys::attach_mount(&namespace, sys::open_place(file)?, "the network namespace"));
    drop(write);
    let status = rustix::process::waitpid(Some(pid), WaitOptions::empty());
    mounted?;
    match status {
        Ok(Some((_, status))) if status.exit_status() == Some(0) => Ok(()),
        _ => Err(CallError::new("ioctl(lo, up)", std::io::Error::other("refused"))),
    }
}

fn become_pasta(program: &Path, namespace: &Path, ready: &Path, more: &[std::ffi::OsString]) -> CallError {
    _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    _ = rustix::process::setsid();
    // pasta takes a signal that is ignored already for a failure.
    sys::reset_signals();
    let arguments = || -> sys::Result<_> {
        let plain = ["pasta", "--config-net", "--foreground", "--quiet", "--stderr", "--no-map-gw", "--runas", "0"];
        // No port of either side's loopback appears at the other.
        let ports = ["-t", "none", "-u", "none", "-T", "none", "-U", "none", "--pid"];
        let mut args = Vec::new();
        for text in plain.into_iter().chain(ports) {
            args.push(sys::c_string(text)?);
        }
        args.push(sys::c_string(ready)?);
        for text in more {
            args.push(sys::c_string(text)?);
        }
        args.push(sys::c_string("--netns")?);
        args.push(sys::c_string(namespace)?);
        Ok((sys::c_string(program)?, args))
    };
    match arguments() {
        Ok((program, args)) => CallError::new(format!("execve({program:?})"), sys::exec(&program, &args, &[])),
        Err(error) => error,
    }
}

/// Tells the builder when pasta is ready, and returns when pasta or the builder has ended.
fn watch(pid: Pid, ready: &Path) -> sys::Result<()> {
    const PAUSE: Duration = Duration::from_millis(5);
    let stdin = std::io::stdin();
    let ended =
        rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).call(|| "pidfd_open()".into())?;
    let mut told = false;
    loop {
        if !told && std::fs::metadata(ready).is_ok_and(|metadata| metadata.len() > 0) {
            rustix::io::write(std::io::stdout(), b"r").call(|| "write(ready)".into())?;
            told = true;
        }
        // Until it is ready, what it writes is looked for; after that, only its end and the builder's count.
        let timeout = if told { None } else { Timespec::try_from(PAUSE).ok() };
        let mut polled = [PollFd::new(&stdin, PollFlags::IN), PollFd::new(&ended, PollFlags::IN)];
        match rustix::event::poll(&mut polled, timeout.as_ref()) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            // Nothing is ever written to it: it is closed. Or pasta has ended.
            _ => return Ok(()),
        }
    }
}
