//! The supervisor of a step.
//!
//! ```text
//! stdin: memfd with the order (JSON); the answer (JSON) is appended to it
//! stdout, stderr: pipes, inherited by the step
//! ```
//!
//! It has one thread and no state worth keeping. It mounts the root file system without a place in the tree, forks
//! the step, waits for it, and removes unused mount points. SIGTERM means "kill the step"; the kernel sends the same
//! when the builder dies.

use super::cgroup::{Group, StepGroup};
use super::chroot::Furniture;
use super::emulation::Emulator;
use super::points::{self, Traces};
use super::{
    Failure, FailureKind, Isolation, Order, Outcome, Rootfs, RunSpec, SpecProblem, Status, network, probe, spawner,
    step,
};
use crate::sys::{self, Call, CallError, Fork, Param};
use rustix::event::{PollFd, PollFlags};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MountFlags, UnmountFlags};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// What the step tells its supervisor before it becomes the command.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Progress {
    pub(super) traces: Traces,
    pub(super) failure: Option<Failure>,
    /// Number of the step's descriptor through which its calls about owners are to be answered.
    pub(super) listener: Option<i32>,
}

/// Runs as one of the sandbox's own processes; never returns. The binary's `main` calls this first thing, before anything
/// makes a thread, when its first argument is [`super::SANDBOX_ARGUMENT`].
pub fn sandbox_main() -> ! {
    sys::forgo_huge_pages();
    let code = match std::env::args_os().nth(1 + 1) {
        Some(word) if word == probe::ARGUMENT => probe::main(),
        Some(word) if word == network::ARGUMENT => network::main(),
        Some(word) if word == spawner::ARGUMENT => spawner::main(),
        _ => MISUSE,
    };
    sys::exit_now(code)
}

/// Exit code for a caller that does not speak the protocol.
pub(super) const MISUSE: i32 = 70;

/// Runs as the supervisor of a step, in a process that the spawner has forked for it; the exit code.
pub(super) fn main() -> i32 {
    // Blocked first: from here on a SIGTERM is read, not suffered.
    sys::block_signals(&[libc::SIGTERM]);
    sys::expect_children();
    if sys::close_from(3, false).is_err() {
        return MISUSE;
    }
    let Ok(channel) = sys::copy_of_stdin() else { return MISUSE };
    let mut channel = std::fs::File::from(channel);
    let Ok(order) = read_order(&mut channel) else { return MISUSE };
    let watch = rustix::process::set_parent_process_death_signal(Some(Signal::TERM));
    if watch.is_err() || rustix::process::getppid().map(Pid::as_raw_pid) != Some(order.parent) {
        return MISUSE;
    }
    let answer = supervise(&order.spec);
    // At once: a channel is no buffer.
    let written = serde_json::to_vec(&answer).map(|answer| std::io::Write::write_all(&mut channel, &answer));
    i32::from(!matches!(written, Ok(Ok(()))))
}

fn read_order(channel: &mut std::fs::File) -> std::io::Result<Order<RunSpec>> {
    let mut text = Vec::new();
    std::io::Read::read_to_end(channel, &mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

fn supervise(spec: &RunSpec) -> Result<Outcome, Failure> {
    step::check(spec)?;
    if spec.isolation == Isolation::Chroot {
        return supervise_chroot(spec);
    }
    let rootfs = mount_rootfs(spec)?;
    let terminate =
        sys::signal_fd(&[libc::SIGTERM]).map_err(|error| Failure::setup("watch for cancellation", error))?;
    let group = spec.group.as_ref().map(StepGroup::make).transpose()?;
    let (mut progress, mut status) = run_step(spec, &rootfs, group.as_ref(), &terminate, false)?;
    let masked =
        |progress: &Progress| progress.failure.as_ref().is_some_and(|failure| failure.kind == FailureKind::MaskedProc);
    let shared_proc = masked(&progress);
    if shared_proc {
        (progress, status) = run_step(spec, &rootfs, group.as_ref(), &terminate, true)?;
    }
    let exceeded = group.map(|group| group.exceeded()).unwrap_or_default();
    let created_mountpoints = points::remove_unused(&rootfs, &progress.traces);
    drop(rootfs);
    if let Rootfs::Overlay { upper, .. } = &spec.rootfs
        && let Ok(upper) = sys::open_place(upper)
    {
        points::remove_copied_up(&upper, &progress.traces);
    }
    match progress.failure {
        Some(failure) => Err(failure),
        None => Ok(Outcome { status, created_mountpoints, shared_proc, exceeded }),
    }
}

/// The same without namespaces and mounts.
fn supervise_chroot(spec: &RunSpec) -> Result<Outcome, Failure> {
    let Rootfs::Plain { dir } = &spec.rootfs else {
        return Err(Failure::spec(SpecProblem::NeedsNamespaces("a stack of layers".to_owned())));
    };
    let doing = |error| Failure::setup("use the root file system", error);
    let rootfs = sys::open_place(dir).map_err(doing)?;
    let terminate =
        sys::signal_fd(&[libc::SIGTERM]).map_err(|error| Failure::setup("watch for cancellation", error))?;
    let group = spec.group.as_ref().map(StepGroup::make).transpose()?;
    let copy = rootfs.try_clone().call(|| "dup(root)".into()).map_err(doing)?;
    let furniture = Furniture::place(spec, copy)?;
    let ran = run_step(spec, &rootfs, group.as_ref(), &terminate, true);
    let exceeded = group.map(|group| group.exceeded()).unwrap_or_default();
    let created_mountpoints = furniture.take_out();
    let (progress, status) = ran?;
    match progress.failure {
        Some(failure) => Err(failure),
        None => Ok(Outcome { status, created_mountpoints, shared_proc: true, exceeded }),
    }
}

/// Returns the root file system, mounted nowhere.
fn mount_rootfs(spec: &RunSpec) -> Result<OwnedFd, Failure> {
    let nodev = if spec.insecure { MountAttrFlags::empty() } else { MountAttrFlags::MOUNT_ATTR_NODEV };
    match &spec.rootfs {
        Rootfs::Overlay { lowers, upper, work } => {
            overlay(lowers, Some((upper, work)), &spec.scratch_dir, nodev, false)
                .map_err(|error| overlay_failure(error, upper))
        }
        Rootfs::Plain { dir } => sys::clone_mount(rustix::fs::CWD, dir)
            .and_then(|mount| sys::set_mount_attributes(&mount, nodev).map(|()| mount))
            .map_err(|error| Failure::setup(format!("mount {dir:?} as root file system"), error)),
    }
}

/// Mounts layers, top first, below an optional upper and work directory. `empty` is an empty directory; `private`
/// tells that the mount namespace is this process's own.
pub(super) fn overlay(
    lowers: &[PathBuf],
    upper: Option<(&PathBuf, &PathBuf)>,
    empty: &Path,
    attributes: MountAttrFlags,
    private: bool,
) -> sys::Result<OwnedFd> {
    // overlayfs refuses a directory that it has already. Whatever the lower one of two gives, the upper one gives too.
    let mut seen = HashSet::new();
    let mut lowers: Vec<&Path> = lowers.iter().map(PathBuf::as_path).filter(|lower| seen.insert(*lower)).collect();
    // It wants one layer below an upper directory, and two without.
    match (lowers.len(), upper) {
        (0, None) => {
            let mount = sys::clone_mount(rustix::fs::CWD, empty)?;
            return sys::set_mount_attributes(&mount, attributes).map(|()| mount);
        }
        (0, Some(_)) | (1, None) => lowers.push(empty),
        _ => {}
    }
    let mut params = vec![
        Param::Flag("userxattr"),
        // Layers are combined anew for every step, which an index of inodes would not allow.
        Param::OptionalText("index", OsStr::new("off")),
    ];
    if let Some((upper, work)) = upper {
        params.push(Param::Text("upperdir", upper.as_os_str()));
        params.push(Param::Text("workdir", work.as_os_str()));
        // A layer counts only once it is in the store, which syncs as it must.
        params.push(Param::OptionalFlag("volatile"));
    }
    params.extend(lowers.iter().map(|lower| Param::Text("lowerdir+", lower.as_os_str())));
    match sys::make_mount("overlay", &params, attributes) {
        Err(error) if lacks_lowerdir_plus(&error) => overlay_in_one_string(&lowers, upper, empty, attributes, private),
        result => result,
    }
}

/// Tells layers that cannot be stacked from a directory that cannot be written through overlayfs.
pub(super) fn overlay_failure(error: CallError, upper: &Path) -> Failure {
    let kind = match error.is(Errno::NOENT) || error.call.contains("lower") {
        true => FailureKind::Setup("stack the layers".into()),
        false => FailureKind::Overlay(upper.to_owned()),
    };
    Failure::new(kind, error)
}

/// Returns whether this is how a kernel before 6.8 refuses `lowerdir+`: by name, or before 6.5, when it looks at
/// parameters only in the end, without a word.
fn lacks_lowerdir_plus(error: &CallError) -> bool {
    let named = error.call.contains("lowerdir+") && error.call.contains("nknown parameter");
    error.is(Errno::INVAL) && (named || error.call.ends_with("create)"))
}

/// Space for the options of mount(2).
const PAGE: usize = 4096;

/// The same by mount(2), whose options are limited to a page; descriptors keep them short. A mount made this way has
/// a place, so it is copied from there, and the place cleared.
fn overlay_in_one_string(
    lowers: &[&Path],
    upper: Option<(&PathBuf, &PathBuf)>,
    place: &Path,
    attributes: MountAttrFlags,
    private: bool,
) -> sys::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    // Before anything is opened: descriptors keep to the namespace that they were opened in.
    if !private {
        sys::unshare(libc::CLONE_NEWNS)?;
        step::separate_mounts()?;
    }
    let mut open = Vec::new();
    let mut by_descriptor = |path: &Path| {
        let fd = sys::open_place(path)?;
        let name = format!("/proc/self/fd/{}", fd.as_raw_fd());
        open.push(fd);
        Ok(name)
    };
    let lowers: Vec<String> = lowers.iter().map(|path| by_descriptor(path)).collect::<sys::Result<_>>()?;
    let mut options = format!("userxattr,index=off,lowerdir={}", lowers.join(":"));
    if let Some((upper, work)) = upper {
        options += &format!(",volatile,upperdir={},workdir={}", by_descriptor(upper)?, by_descriptor(work)?);
    }
    let describe = || format!("mount(\"overlay\" -> {place:?}, {} layers in {} bytes)", lowers.len(), options.len());
    if options.len() >= PAGE {
        return Err(CallError::new(describe(), std::io::Error::other("more than this kernel, before 6.8, can take")));
    }
    let text = sys::c_string(&options)?;
    rustix::mount::mount("overlay", place, "overlay", MountFlags::empty(), Some(text.as_c_str())).call(describe)?;
    let copy = sys::clone_mount(rustix::fs::CWD, place);
    rustix::mount::unmount(place, UnmountFlags::DETACH).call(|| format!("umount({place:?})"))?;
    let copy = copy?;
    sys::set_mount_attributes(&copy, attributes)?;
    Ok(copy)
}

/// Forks the step and waits until it and everything it started is gone.
fn run_step(
    spec: &RunSpec,
    rootfs: &OwnedFd,
    group: Option<&Group>,
    terminate: &OwnedFd,
    shared_proc: bool,
) -> Result<(Progress, Status), Failure> {
    let doing = |what: &'static str| move |error| Failure::setup(what, error);
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .call(|| "pipe()".into())
        .map_err(doing("talk to the step"))?;
    if shared_proc {
        // Without a pid namespace, what the step leaves behind becomes a child of this process.
        rustix::process::set_child_subreaper(Pid::from_raw(1))
            .call(|| "prctl(PR_SET_CHILD_SUBREAPER)".into())
            .map_err(doing("keep hold of the step's processes"))?;
    }
    let namespaces = if shared_proc { 0 } else { libc::CLONE_NEWPID };
    let pid = match sys::fork(namespaces).map_err(doing("start the step"))? {
        Fork::Child => {
            drop(read);
            step::main(spec, rootfs, group, write, shared_proc)
        }
        Fork::Parent(pid) => pid,
    };
    drop(write);
    let mut emulator = None;
    let start = |listener| match &spec.emulation {
        Some(emulation) => Emulator::start(pid, listener, spec, emulation, shared_proc).map(Some),
        None => Ok(None),
    };
    let waited = wait(pid, read, terminate, start, &mut emulator);
    // Also after a failure: it has another root directory.
    let finished = emulator.map_or(Ok(()), Emulator::finish);
    if shared_proc {
        sweep();
    }
    waited.and_then(|waited| finished.map(|()| waited))
}

/// Reads what the step reports until it becomes the command, then waits for its end, answering its calls about owners
/// by the emulator that `start` makes of their listener's number.
fn wait(
    pid: Pid,
    report: OwnedFd,
    terminate: &OwnedFd,
    start: impl Fn(i32) -> Result<Option<Emulator>, Failure>,
    emulator: &mut Option<Emulator>,
) -> Result<(Progress, Status), Failure> {
    let handle = rustix::process::pidfd_open(pid, PidfdFlags::empty())
        .call(|| format!("pidfd_open({pid:?})"))
        .map_err(|error| {
            _ = rustix::process::kill_process(pid, Signal::KILL);
            Failure::setup("watch the step", error)
        })?;
    let (mut text, mut report, mut cancelled) = (Vec::new(), Some(report), false);
    let (mut broken, mut listening) = (None, false);
    let mut buffer = [0; 16 << 10];
    // The kernel kills the rest of the pid namespace with its process 1.
    let kill = || _ = rustix::process::pidfd_send_signal(&handle, Signal::KILL);
    loop {
        let mut polled = vec![PollFd::new(&handle, PollFlags::IN)];
        let mut at = [usize::MAX; 3];
        let waited_for = [
            (!cancelled).then_some(terminate),
            report.as_ref(),
            emulator.as_ref().filter(|_| listening).map(Emulator::listener),
        ];
        for (at, fd) in at.iter_mut().zip(waited_for) {
            if let Some(fd) = fd {
                *at = polled.len();
                polled.push(PollFd::new(fd, PollFlags::IN));
            }
        }
        match rustix::event::poll(&mut polled, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                kill();
                return Err(Failure::setup("watch the step", CallError::new("poll()", error)));
            }
        }
        let events = |at: usize| polled.get(at).map_or(PollFlags::empty(), PollFd::revents);
        let (ended, asked) = (!events(0).is_empty(), !events(at[0]).is_empty());
        let (has_report, calls) = (!events(at[1]).is_empty(), events(at[2]));
        drop(polled);
        if asked {
            cancelled = true;
            kill();
        }
        if let (true, Some(pipe)) = (has_report, &report) {
            match rustix::io::read(pipe, &mut buffer) {
                Ok(length) if length > 0 => {
                    text.extend_from_slice(&buffer[..length]);
                    // The step goes on only when its calls are answered, so this does not wait for the end of the text.
                    let listener = serde_json::from_slice::<Progress>(&text).ok().and_then(|said| said.listener);
                    if let (Some(listener), None, false) = (listener, &emulator, cancelled) {
                        match start(listener) {
                            Ok(started) => (*emulator, listening) = (started, true),
                            Err(failure) => {
                                broken = Some(failure);
                                kill();
                            }
                        }
                    }
                }
                Err(Errno::INTR) => {}
                _ => report = None,
            }
            continue;
        }
        if let (true, Some(emulator)) = (calls.contains(PollFlags::IN), emulator.as_mut()) {
            if let Err(error) = emulator.serve() {
                broken = Some(Failure::setup("answer the step's calls about owners", error));
                kill();
                listening = false;
            }
            continue;
        }
        // Nobody is left who could call.
        listening &= !calls.intersects(PollFlags::HUP | PollFlags::ERR);
        if ended {
            break;
        }
    }
    let status = loop {
        match rustix::process::waitpid(Some(pid), WaitOptions::empty()) {
            Ok(Some((_, status))) => break Status::of(status),
            Ok(None) | Err(Errno::INTR) => {}
            Err(error) => return Err(Failure::setup("wait for the step", CallError::new("wait()", error))),
        }
    };
    let mut progress: Progress = match (text.is_empty(), serde_json::from_slice(&text)) {
        (_, Ok(progress)) => progress,
        // It was killed before it could say anything.
        (true, Err(_)) if cancelled || broken.is_some() => Progress::default(),
        (_, Err(error)) => {
            let error = CallError::new(format!("the step ended with {status:?} before it began"), error);
            return Err(Failure::setup("prepare the root file system", error));
        }
    };
    if let Some(failure) = broken {
        progress.failure = Some(failure);
    }
    if cancelled {
        let error = CallError::new("kill()", Errno::INTR);
        progress.failure = Some(Failure::new(FailureKind::Cancelled, error));
    }
    Ok((progress, status))
}

/// Kills and collects what the step left behind, where no pid namespace does that.
fn sweep() {
    loop {
        for (pid, _) in children() {
            _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

/// Kills and collects what a supervisor that was killed has left of its step, which this process has inherited: all
/// that is in another session than this process's own helpers.
pub(super) fn sweep_inherited() {
    /// Two at once would wait for each other's processes, whose numbers are free then.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let own = parent_and_session("self").map(|(_, session)| session);
    loop {
        let left: Vec<Pid> =
            children().into_iter().filter(|(_, session)| Some(*session) != own).map(|(pid, _)| pid).collect();
        if left.is_empty() {
            return;
        }
        for pid in left {
            _ = rustix::process::kill_process(pid, Signal::KILL);
            // Its own children are inherited when it is gone.
            _ = rustix::process::waitpid(Some(pid), WaitOptions::empty());
        }
    }
}

/// Processes whose parent is this one, and their sessions.
fn children() -> Vec<(Pid, i32)> {
    let own = rustix::process::getpid().as_raw_pid();
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let numbers = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let child = |pid: i32| {
        let (parent, session) = parent_and_session(&pid.to_string())?;
        (parent == own).then_some((Pid::from_raw(pid)?, session))
    };
    numbers.filter_map(child).collect()
}

/// Parent and session of a process in /proc; 0 is one outside of its pid namespace.
fn parent_and_session(process: &str) -> Option<(i32, i32)> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The command's name is in parentheses and may hold anything. Then: state, parent, process group, session.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(1);
    let parent = fields.next()?.parse().ok()?;
    Some((parent, fields.nth(1)?.parse().ok()?))
}

/// Sends the report of the step, which is all it ever says.
pub(super) fn report(pipe: impl AsFd, progress: &Progress) -> sys::Result<()> {
    let text = serde_json::to_vec(progress).call(|| "encode(report)".into())?;
    let mut rest = &text[..];
    while !rest.is_empty() {
        match rustix::io::write(&pipe, rest) {
            Ok(length) => rest = &rest[length..],
            Err(Errno::INTR) => {}
            Err(error) => return Err(CallError::new("write(report)", error)),
        }
    }
    Ok(())
}
