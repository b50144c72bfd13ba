//! The sandbox that RUN steps live in.
//!
//! ```text
//! nacre ─spawner─▶ supervisor ──fork──▶ step: pid 1 of its own pid namespace
//!   │  spec, result: memfd   │ mounts the overlay (detached)   │ mount, ipc, uts, cgroup (and net) namespaces
//!   │  output: two pipes     │ waits, cleans mount points up   │ mounts, pivot_root, limits, seccomp, capabilities
//!   └────────────────────────┴─────────────────────────────────┴▶ execve of the command
//! ```
//!
//! The *supervisor* (`init::main`) is a small single-threaded process, because a builder with threads and a large
//! heap must not fork; see [`spawner`]. It mounts the root file system without putting it anywhere, so that nothing is ever mounted
//! on the host, and keeps a descriptor of it to take unused mount points away after the step. The step's first
//! process becomes the command itself, process 1 as Dockerfiles expect, so that its exit status or signal is exact
//! and the kernel kills everything else of the step with it.
//!
//! Nobody outlives anybody: the supervisor is told by the kernel when the builder dies and kills the step; the step
//! is killed by the kernel when the supervisor dies.
//!
//! | kernel feature | since | used for | without it |
//! |---|---|---|---|
//! | openat2, `RESOLVE_IN_ROOT` | 5.6 | every path inside a root file system | error |
//! | fsopen, fsmount, move_mount, open_tree | 5.2 | all mounts | error |
//! | mount_setattr | 5.12 | read-only and nodev bind mounts | error |
//! | overlayfs in a user namespace, `userxattr` | 5.11 | the root file system | error (root: same) |
//! | overlayfs `lowerdir+` | 6.8 | up to 500 layers | mount(2), options in one page: about 220 |
//! | seccomp user notification with added descriptors | 5.14 | owners, when there is only one id | error |
//! | close_range with CLOEXEC | 5.11 | no descriptor reaches the step | error |
//! | binfmt_misc in a user namespace | 6.7 | emulators for other processors' programs | those that root registered |
//! | a procfs that is not masked | – | fresh /proc, pid namespace | the outer /proc, processes swept up after the step |
//! | control groups, version 2; their `cgroup.kill` | 4.5; 5.14 | limits, when asked for | error; the pid namespace kills |
//!
//! Device nodes on the root file system and on mounts cannot be opened (`nodev`): that replaces the devices
//! cgroup, so no cgroup is needed without limits even when the builder is really root.

pub mod cgroup;
mod chroot;
pub mod emulation;
pub mod foreign;
pub mod idmap;
pub mod init;
pub mod network;
mod points;
mod probe;
pub mod seccomp;
mod spawner;
mod step;
mod syscalls;

pub use idmap::Ownership;
pub use init::sandbox_main;
pub use probe::{Probe, Right, Verdict, probe};

use crate::sys::{self, Call, CallError};
use rustix::event::{PollFd, PollFlags};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use serde::{Deserialize, Serialize};
use std::io::Seek;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// First argument of a nacre process that belongs to a sandbox: `nacre __sandbox`.
pub const SANDBOX_ARGUMENT: &str = "__sandbox";

/// What keeps a step from the rest of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Isolation {
    /// Namespaces of its own.
    #[default]
    Namespaces,
    /// Another root directory, and fewer capabilities. Only for a [`Rootfs::Plain`] and for root.
    Chroot,
}

/// Everything about one step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunSpec {
    /// What keeps it from the rest of the machine.
    pub isolation: Isolation,
    /// The root file system.
    pub rootfs: Rootfs,
    /// Mounts, in the order in which they are made; parents before what lies in them.
    pub mounts: Vec<SetupMount>,
    /// The command and its arguments. The command is looked up in the PATH of `env` when it has no slash.
    pub args: Vec<String>,
    /// Environment. HOME is added when it is missing.
    pub env: Vec<(String, String)>,
    /// Absolute directory the command starts in; made when it does not exist.
    pub cwd: String,
    /// User id of the command.
    pub uid: u32,
    /// Group id of the command.
    pub gid: u32,
    /// Supplementary groups of the command.
    pub groups: Vec<u32>,
    /// Host name inside.
    pub hostname: String,
    /// Content of /etc/hosts.
    pub hosts: String,
    /// Content of /etc/resolv.conf.
    pub resolv_conf: String,
    /// Network namespace.
    pub network: Net,
    /// `--security=insecure`: all capabilities that the builder has, no filter, nothing masked.
    pub insecure: bool,
    /// Size of /dev/shm in bytes.
    pub shm_size_bytes: u64,
    /// Limits: name as in `--ulimit`, soft, hard; -1 is unlimited.
    pub ulimits: Vec<(String, i64, i64)>,
    /// A control group for the step, with limits.
    pub group: Option<cgroup::StepGroup>,
    /// File mode creation mask of the command; Dockerfiles expect 0o022.
    pub umask: u32,
    /// An empty directory that only this step uses, as a place for mounts. It is empty again afterwards.
    pub scratch_dir: PathBuf,
    /// What the kernel cannot do here and the supervisor does instead.
    pub emulation: Option<emulation::Emulation>,
}

impl RunSpec {
    /// Only one user id exists ([`Ownership::SingleId`]).
    fn has_single_id(&self) -> bool {
        self.emulation.as_ref().is_some_and(|emulation| emulation.scope == emulation::Scope::SingleId)
    }
}

/// The root file system of a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rootfs {
    /// Layers, stacked by overlayfs.
    Overlay {
        /// Directories of the layers, top first; may be empty. At most 500.
        lowers: Vec<PathBuf>,
        /// Existing, empty directory that receives what the step writes. Its mode and owner are those of `/`.
        upper: PathBuf,
        /// Existing, empty directory on the file system of `upper`, for the kernel's use.
        work: PathBuf,
    },
    /// One directory, written in place.
    Plain {
        /// The directory.
        dir: PathBuf,
    },
}

/// One mount of a step. Targets are absolute paths, resolved inside the root file system. What does not exist there is
/// made, and removed after the step when nothing was put into it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SetupMount {
    /// A file or directory of the host.
    Bind {
        /// What, as a host path; links are followed.
        source: PathBuf,
        /// Where.
        target: String,
        /// Read-only.
        read_only: bool,
    },
    /// A file or directory of another snapshot; writes are thrown away by the caller, together with `upper`.
    OverlayBind {
        /// Directories of the layers, top first; may be empty.
        lowers: Vec<PathBuf>,
        /// Existing, empty directory for writes; not used when `read_only`.
        upper: PathBuf,
        /// Existing, empty directory on the same file system; not used when `read_only`.
        work: PathBuf,
        /// What, as a path in the snapshot; links are followed inside it.
        subpath: String,
        /// Where.
        target: String,
        /// Read-only.
        read_only: bool,
        /// With emulation: [`emulation::LowerOwner`]s of the snapshot, sorted by path.
        owners: Option<PathBuf>,
    },
    /// Memory.
    Tmpfs {
        /// Where.
        target: String,
        /// Limit in bytes; 0 is the kernel's default.
        size_bytes: u64,
        /// Read-only.
        read_only: bool,
    },
    /// A file that lives in memory only, read-only and not executable.
    Secret {
        /// Its bytes.
        content: Vec<u8>,
        /// Where.
        target: String,
        /// Its mode.
        mode: u32,
        /// Its owner.
        uid: u32,
        /// Its group.
        gid: u32,
    },
    /// A file that lives in memory only, read-only; a program when its mode says so.
    Inline {
        /// Its bytes.
        content: Vec<u8>,
        /// Where.
        target: String,
        /// Its mode.
        mode: u32,
        /// Its owner.
        uid: u32,
        /// Its group.
        gid: u32,
    },
    /// A socket that the caller listens on for this step; it gets the mode and the owner given here.
    Socket {
        /// Host path of the socket.
        source: PathBuf,
        /// Where.
        target: String,
        /// Its mode.
        mode: u32,
        /// Its owner.
        uid: u32,
        /// Its group.
        gid: u32,
    },
}

/// Network namespace of a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Net {
    /// The builder's.
    Host,
    /// An empty one with loopback.
    None,
    /// An existing one, by the path of its descriptor file (`/proc/PID/ns/net`).
    Join(PathBuf),
}

/// Which output stream bytes belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// How a step ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Exit status of the command.
    pub status: Status,
    /// Mount points that had to be made in the root file system and are still there: /proc, /sys, /dev, and those
    /// that the step put something into.
    pub created_mountpoints: Vec<String>,
    /// /proc could not be mounted afresh, so the step saw the builder's processes.
    pub shared_proc: bool,
    /// What the step's limits did.
    pub exceeded: cgroup::Exceeded,
}

/// Exit status of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Status {
    /// It exited with this code. 127: not found, 126: could not be executed.
    Exit(i32),
    /// This signal killed it.
    Signal(i32),
}

impl Status {
    /// Returns the exit code a shell would give.
    pub fn code(self) -> i32 {
        match self {
            Status::Exit(code) => code,
            Status::Signal(signal) => 128 + signal,
        }
    }

    fn of(status: rustix::process::WaitStatus) -> Status {
        match status.terminating_signal() {
            Some(signal) => Status::Signal(signal),
            None => Status::Exit(status.exit_status().unwrap_or(1)),
        }
    }
}

/// Why a step could not be run. A command that fails is no error but an [`Outcome`].
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// No user namespace, so no sandbox.
    #[error("cannot create a user namespace: {cause}")]
    UserNamespace {
        /// Why, and what helps.
        cause: idmap::Refusal,
        /// The call.
        source: CallError,
    },
    /// A preparation outside of the step failed.
    #[error("cannot {doing}")]
    Prepare {
        /// What was to be done.
        doing: String,
        /// The call.
        source: CallError,
    },
    /// The root file system could not be stacked.
    #[error(
        "cannot stack the layers in {upper}: the store may be on a file system that overlayfs cannot write to, such \
         as another overlay or NFS; choose a directory on a local disk or a tmpfs with --store"
    )]
    Overlay {
        /// The upper directory.
        upper: PathBuf,
        /// The call.
        source: CallError,
    },
    /// Part of the set-up inside of the step's namespaces failed.
    #[error("cannot {doing} for the step")]
    Setup {
        /// What was to be done.
        doing: String,
        /// The call.
        source: CallError,
    },
    /// The spec cannot be carried out.
    #[error("{problem}")]
    Spec {
        /// What is wrong with it.
        problem: SpecProblem,
    },
    /// The spec could not be handed over; a host path that is not UTF-8, for instance.
    #[error("cannot hand the step over to its supervisor")]
    Encoding(#[from] serde_json::Error),
    /// The supervisor died.
    #[error("the supervisor of the step ended without a result ({status})")]
    Lost {
        /// Its status.
        status: String,
    },
    /// [`Cancel::cancel`] was called; the step is gone.
    #[error("the step was cancelled")]
    Cancelled,
    /// The step took longer than allowed, and is gone.
    #[error("the step took too long")]
    TimedOut,
}

/// A mistake in a [`RunSpec`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum SpecProblem {
    /// There is no command.
    #[error("the command is empty")]
    NoCommand,
    /// A limit with an unknown name.
    #[error("unknown limit {0:?} in --ulimit")]
    UnknownLimit(String),
    /// A mount inside /proc would let the step see a false one.
    #[error("mount target {0:?} is inside /proc")]
    TargetInProc(String),
    /// /proc or another directory of the system is something else in the root file system.
    #[error("{0} is not a directory in the root file system")]
    NotDirectory(String),
    /// A mount covers the whole root file system.
    #[error("mount target {0:?} is the root directory")]
    TargetIsRoot(String),
    /// What is to be mounted does not exist.
    #[error("mount source {0:?} does not exist")]
    NoSource(String),
    /// Something that cannot be had without namespaces.
    #[error("{0} cannot be had with --isolation=chroot")]
    NeedsNamespaces(String),
    /// Started in a directory that is not below the root.
    #[error("working directory {0:?} is outside of the root file system")]
    CwdOutside(String),
}

/// An error on its way from one process to another.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Failure {
    kind: FailureKind,
    call: String,
    errno: Option<i32>,
    /// The cause in words, for errors without number.
    text: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum FailureKind {
    Setup(String),
    Overlay(PathBuf),
    Spec(SpecProblem),
    /// A fresh procfs is refused because the existing one is masked.
    MaskedProc,
    Cancelled,
}

impl Failure {
    fn setup(doing: impl Into<String>, error: CallError) -> Failure {
        Failure::new(FailureKind::Setup(doing.into()), error)
    }

    fn new(kind: FailureKind, error: CallError) -> Failure {
        let (errno, text) = (error.source.raw_os_error(), error.source.to_string());
        Failure { kind, call: error.call, errno, text }
    }

    fn spec(problem: SpecProblem) -> Failure {
        Failure { kind: FailureKind::Spec(problem), call: String::new(), errno: None, text: String::new() }
    }

    fn into_error(self) -> SandboxError {
        let source = match self.errno {
            Some(errno) => std::io::Error::from_raw_os_error(errno),
            None => std::io::Error::other(self.text),
        };
        let source = CallError { call: self.call, source };
        match self.kind {
            FailureKind::Setup(doing) => SandboxError::Setup { doing, source },
            FailureKind::Overlay(upper) => SandboxError::Overlay { upper, source },
            FailureKind::Spec(problem) => SandboxError::Spec { problem },
            FailureKind::MaskedProc => SandboxError::Setup { doing: "mount /proc".into(), source },
            FailureKind::Cancelled => SandboxError::Cancelled,
        }
    }
}

/// Says what was being done when a call failed.
trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T> Doing<T> for sys::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| Failure::setup(what(), error))
    }
}

/// What the builder hands to the supervisor.
#[derive(Serialize, Deserialize)]
struct Order<T> {
    /// The builder's process id, to notice that it died before the supervisor asked to be told.
    parent: i32,
    spec: T,
}

/// A request to stop a step, shared between threads.
#[derive(Debug, Clone)]
pub struct Cancel {
    inner: Arc<CancelInner>,
}

#[derive(Debug)]
struct CancelInner {
    requested: AtomicBool,
    /// Readable once requested, to wake a thread that waits for output.
    event: OwnedFd,
}

impl Cancel {
    /// Makes one that is not requested.
    pub fn new() -> Result<Cancel, SandboxError> {
        use rustix::event::{EventfdFlags, eventfd};
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .call(|| "eventfd()".into())
            .map_err(|source| SandboxError::Prepare { doing: "prepare cancellation".into(), source })?;
        Ok(Cancel { inner: Arc::new(CancelInner { requested: AtomicBool::new(false), event }) })
    }

    /// Stops every step that runs with this.
    pub fn cancel(&self) {
        self.inner.requested.store(true, Ordering::SeqCst);
        // Fails only when the counter is full, and then it is readable already.
        _ = rustix::io::write(&self.inner.event, &1u64.to_ne_bytes());
    }

    /// Returns whether it was requested.
    pub fn is_cancelled(&self) -> bool {
        self.inner.requested.load(Ordering::SeqCst)
    }
}

/// Runs a step and passes its output on while it comes. Returns when all its processes are gone.
///
/// The calling thread must not end before this returns, as the step is tied to its life.
pub fn run(spec: &RunSpec, cancel: &Cancel, output: &mut dyn FnMut(Stream, &[u8])) -> Result<Outcome, SandboxError> {
    run_for(spec, cancel, None, output)
}

/// As [`run`], but ends the step when it takes longer than `limit`.
pub fn run_for(
    spec: &RunSpec,
    cancel: &Cancel,
    limit: Option<Duration>,
    output: &mut dyn FnMut(Stream, &[u8]),
) -> Result<Outcome, SandboxError> {
    // A time so far away that it cannot be counted is none.
    let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
    if cancel.is_cancelled() {
        return Err(SandboxError::Cancelled);
    }
    let prepare = |doing: &str| {
        let doing = doing.to_owned();
        move |source| SandboxError::Prepare { doing, source }
    };
    let order = serde_json::to_vec(&Order { parent: std::process::id() as i32, spec })?;
    // The result comes back in the same memory, behind the spec.
    let channel = memory_file("nacre-step", &order).map_err(prepare("pass the step on"))?;
    // Where a step shares the pid namespace, it can kill its supervisor; what is left of it comes here then.
    rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1))
        .call(|| "prctl(PR_SET_CHILD_SUBREAPER)".into())
        .map_err(prepare("keep hold of the step's processes"))?;
    let pipe = || {
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .call(|| "pipe()".into())
            .map_err(prepare("take the step's output"))
    };
    let ((stdout, to_stdout), (stderr, to_stderr)) = (pipe()?, pipe()?);
    let pid = spawner::spawn([channel.as_fd(), to_stdout.as_fd(), to_stderr.as_fd()])
        .map_err(prepare("start the supervisor of the step"))?;
    // The ends of the streams that keep them open.
    drop((to_stdout, to_stderr));
    let streams = vec![(Stream::Stdout, stdout), (Stream::Stderr, stderr)];
    let forwarded = forward(streams, pid, cancel, deadline, output);
    if forwarded.is_err() {
        // Nobody reads the output any more: do not leave the step behind.
        _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    let status = wait_for(pid).map_err(prepare("wait for the step"))?;
    let in_time = forwarded.map_err(prepare("read the output of the step"))?;

    let report = read_answer(channel, order.len() as u64);
    match report.and_then(|bytes| serde_json::from_slice::<Result<Outcome, Failure>>(&bytes).ok()) {
        _ if cancel.is_cancelled() => Err(SandboxError::Cancelled),
        _ if !in_time => Err(SandboxError::TimedOut),
        Some(Ok(outcome)) if status.success() => Ok(outcome),
        Some(Err(failure)) => Err(failure.into_error()),
        Some(Ok(_)) | None => Err(SandboxError::Lost { status: status.to_string() }),
    }
}

/// Waits for a child of this process.
fn wait_for(pid: rustix::process::Pid) -> sys::Result<ExitStatus> {
    loop {
        match rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()) {
            Ok(Some((_, status))) => return Ok(ExitStatus::from_raw(status.as_raw())),
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(CallError::new(format!("wait({pid:?})"), error)),
        }
    }
}

/// Returns what stands in the file behind the order, if anything does.
fn read_answer(file: std::fs::File, offset: u64) -> Option<Vec<u8>> {
    use std::io::{Read, SeekFrom};
    let (mut file, mut bytes) = (file, Vec::new());
    file.seek(SeekFrom::Start(offset)).ok()?;
    file.read_to_end(&mut bytes).ok()?;
    (!bytes.is_empty()).then_some(bytes)
}

/// Passes output on until both streams are closed, which is when the supervisor has ended. Returns whether that was
/// before the deadline.
fn forward(
    mut streams: Vec<(Stream, OwnedFd)>,
    supervisor: rustix::process::Pid,
    cancel: &Cancel,
    deadline: Option<Instant>,
    output: &mut dyn FnMut(Stream, &[u8]),
) -> sys::Result<bool> {
    let mut buffer = vec![0; 64 << 10];
    let (mut told, mut in_time) = (false, true);
    // Without it, only a supervisor that is killed by its step is noticed late.
    let mut handle = rustix::process::pidfd_open(supervisor, rustix::process::PidfdFlags::empty()).ok();
    while !streams.is_empty() {
        let mut polled: Vec<_> = streams.iter().map(|(_, fd)| PollFd::new(fd, PollFlags::IN)).collect();
        polled.extend(handle.iter().map(|handle| PollFd::new(handle, PollFlags::IN)));
        if !told {
            polled.push(PollFd::new(&cancel.inner.event, PollFlags::IN));
        }
        let left = deadline.filter(|_| !told).map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let wait = left.and_then(|left| rustix::event::Timespec::try_from(left).ok());
        match rustix::event::poll(&mut polled, wait.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(CallError::new("poll(output)", error)),
        }
        let late = left.is_some() && deadline.is_some_and(|deadline| deadline <= Instant::now());
        let ready: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(polled);
        if handle.is_some() && ready[streams.len()] {
            handle = None;
            if was_killed(supervisor) {
                // Whoever holds the streams open would be waited for.
                init::sweep_inherited();
            }
        }
        if !told && (late || cancel.is_cancelled()) {
            (told, in_time) = (true, !late);
            // It cannot have been waited for yet, so the number is still its own.
            _ = rustix::process::kill_process(supervisor, rustix::process::Signal::TERM);
        }
        let mut closed = Vec::new();
        for (index, (stream, fd)) in streams.iter().enumerate() {
            if !ready[index] {
                continue;
            }
            match rustix::io::read(fd, &mut buffer) {
                Ok(0) => closed.push(index),
                Ok(length) => output(*stream, &buffer[..length]),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(CallError::new(format!("read({stream:?})"), error)),
            }
        }
        for index in closed.into_iter().rev() {
            streams.remove(index);
        }
    }
    Ok(in_time)
}

/// Returns whether a process that has ended, and was not waited for yet, was killed.
fn was_killed(pid: rustix::process::Pid) -> bool {
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    waitid(WaitId::Pid(pid), options).ok().flatten().is_some_and(|status| !status.exited())
}

/// Returns an anonymous file in memory with `content`, positioned at its start.
fn memory_file(name: &str, content: &[u8]) -> sys::Result<std::fs::File> {
    use std::io::Write;
    let describe = || format!("memfd({name:?}, {} bytes)", content.len());
    let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).call(describe)?;
    let mut file = std::fs::File::from(file);
    file.write_all(content).and_then(|()| file.rewind()).call(describe)?;
    Ok(file)
}

/// Returns a descriptor through which this program can be executed but never be written.
///
/// A step can reach the program it was started from as `/proc/self/exe` in the moment before its own starts, as the
/// interpreter of a script for instance, and later open it for writing, if it may. So supervisors are started from a
/// read-only mount of the file, or from a sealed copy where that cannot be made.
fn supervisor_program() -> sys::Result<&'static OwnedFd> {
    static PROGRAM: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(program) = PROGRAM.get() {
        return Ok(program);
    }
    let program = read_only_program().or_else(|_| sealed_program())?;
    Ok(PROGRAM.get_or_init(|| program))
}

fn read_only_program() -> sys::Result<OwnedFd> {
    let own = Path::new("/proc/self/exe");
    // The link itself leads to the mount of the namespace that nacre was started in. The same path in this one must
    // be looked up by name, and can have been replaced meanwhile.
    let path = std::fs::read_link(own).call(|| "readlink(/proc/self/exe)".into())?;
    let mount = sys::clone_mount(rustix::fs::CWD, &path)?;
    sys::set_mount_attributes(&mount, rustix::mount::MountAttrFlags::MOUNT_ATTR_RDONLY)?;
    let (found, expected) = (sys::stat_fd(&mount)?, sys::stat_fd(sys::open_place(own)?)?);
    if (found.st_dev, found.st_ino) != (expected.st_dev, expected.st_ino) {
        let call = format!("open_tree({path:?})");
        return Err(CallError::new(call, std::io::Error::other("the program was replaced while it runs")));
    }
    Ok(mount)
}

fn sealed_program() -> sys::Result<OwnedFd> {
    let program = std::fs::read("/proc/self/exe").call(|| "read(/proc/self/exe)".into())?;
    let file = memory_file("nacre", &program)?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_add_seals(&file, seals).call(|| "fcntl(memfd, F_ADD_SEALS)".into())?;
    // Opened again for reading only: a file that is open for writing cannot be executed.
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).call(|| format!("open({path})"))
}
