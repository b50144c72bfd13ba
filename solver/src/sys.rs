//! System calls: what rustix does not have, and what deserves an error that names the call.
//!
//! This is the only module with `unsafe`. Everything here is a thin wrapper; an error prints as the call with its
//! arguments, caused by the kernel's answer:
//!
//! ```text
//! fsconfig("overlay", create): too many lower directories, limit is 500: Invalid argument (os error 22)
//! ```
//!
//! File descriptors are opened with CLOEXEC throughout. Paths that belong to a root file system are opened with
//! [`open_in_root`], which never leaves it, whatever symbolic links it holds.

#![allow(unsafe_code)]

pub mod gunzip;
pub mod notify;

use rustix::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags};
use rustix::process::Pid;
use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::num::NonZeroU64;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// A system call that failed: the call as text, and the kernel's answer.
#[derive(Debug, thiserror::Error)]
#[error("{call}")]
pub struct CallError {
    /// The call with its arguments, and what the kernel had to say about it.
    pub call: String,
    /// The error number.
    pub source: io::Error,
}

impl CallError {
    /// Puts an error together.
    pub fn new(call: impl Into<String>, source: impl Into<io::Error>) -> CallError {
        CallError { call: call.into(), source: source.into() }
    }

    /// Returns whether the kernel answered with `errno`.
    pub fn is(&self, errno: rustix::io::Errno) -> bool {
        self.source.raw_os_error() == Some(errno.raw_os_error())
    }
}

/// Result of a wrapped call.
pub type Result<T> = std::result::Result<T, CallError>;

/// Names the call that a result came from.
pub trait Call<T> {
    /// Turns an error into a [`CallError`]; `call` is only run then.
    fn call(self, call: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Call<T> for std::result::Result<T, E> {
    fn call(self, call: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| CallError::new(call(), source))
    }
}

fn check(value: libc::c_long) -> io::Result<libc::c_long> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

// Processes

/// Which side of a [`fork`] returned.
#[derive(Debug)]
pub enum Fork {
    /// The new process.
    Child,
    /// The process that called, with the child's id.
    Parent(Pid),
}

/// Splits the process in two; the child lives in new namespaces according to `namespaces` (`CLONE_NEW*`), and is a child of this
/// process's parent with `CLONE_PARENT`.
///
/// Refuses when the process has more than one thread: the child would have copies of locks that nobody releases.
pub fn fork(namespaces: libc::c_int) -> Result<Fork> {
    let describe = || format!("clone({namespaces:#x})");
    if thread_count() != 1 {
        return Err(CallError::new(describe(), io::Error::other("the process has more than one thread")));
    }
    let flags = libc::c_long::from(namespaces | libc::SIGCHLD);
    // SAFETY: without CLONE_VM this is a fork: the child runs on its own copy of the memory, on the same stack
    // addresses. All pointer arguments are null, which the flags allow. The process has one thread (checked above),
    // so no lock of the allocator or of std can be held by a thread that does not exist in the child.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) }).call(describe)?;
    Ok(match i32::try_from(pid).ok().and_then(Pid::from_raw) {
        None => Fork::Child,
        Some(pid) => Fork::Parent(pid),
    })
}

/// Number of threads of this process; 1 when /proc is not there to ask.
#[allow(clippy::unnecessary_cast, reason = "the width of st_nlink differs between architectures")]
fn thread_count() -> u64 {
    #[expect(clippy::unnecessary_cast, reason = "other architectures have other widths")]
    rustix::fs::stat("/proc/self/task").map_or(1, |stat| (stat.st_nlink as u64).saturating_sub(2).max(1))
}

/// Moves the process into new namespaces (`CLONE_NEW*`).
pub fn unshare(namespaces: libc::c_int) -> Result<()> {
    // SAFETY: no memory is involved. CLONE_FILES, the flag that could surprise owners of descriptors, is masked out.
    let result = unsafe { libc::unshare(namespaces & !libc::CLONE_FILES) };
    check(result.into()).map(drop).call(|| format!("unshare({namespaces:#x})"))
}

/// Replaces the program of this process. Returns only when that failed.
pub fn exec(program: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    if gives_huge_pages() {
        // SAFETY: no memory is involved.
        unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, libc::c_ulong::from(false), 0, 0, 0) };
    }
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both arrays are null-terminated and point to NUL-terminated strings that live until the call returns.
    unsafe { libc::execve(program.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// `purge_delay` among the options of mimalloc.h.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Makes mimalloc give memory back to the system as soon as it is free, not a second later: what one phase of a build leaves is
/// about what the next one takes, so that they would add up.
pub fn return_memory_at_once() {
    // SAFETY: sets a number that the allocator looks at when it has freed something.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, 0) };
}

/// Ends the process at once, without running destructors or flushing buffers.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no conditions.
    unsafe { libc::_exit(code) }
}

/// Removes a variable from the environment of this process.
///
/// Refuses when there is more than one thread, because another one could be reading it.
pub fn remove_env(name: &str) -> Result<()> {
    if thread_count() != 1 {
        let cause = io::Error::other("the process has more than one thread");
        return Err(CallError::new(format!("unsetenv({name:?})"), cause));
    }
    // SAFETY: there is one thread (checked above), so nothing reads the environment at the same time.
    unsafe { std::env::remove_var(name) };
    Ok(())
}

/// Marks every descriptor from `first` on as close-on-exec, or closes it.
pub fn close_from(first: RawFd, at_exec: bool) -> Result<()> {
    let flags = if at_exec { libc::CLOSE_RANGE_CLOEXEC } else { 0 };
    // SAFETY: closing is only asked for by the child of a step just before it executes the command; it owns all
    // descriptors of its copy of the table and uses none of those that are closed afterwards. (See `KeptFd`.)
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, flags) };
    check(result).map(drop).call(|| format!("close_range({first}, max, {flags})"))
}

/// Moves `fd` to the number `number`, replacing what is open there.
pub fn move_fd(fd: OwnedFd, number: RawFd, close_on_exec: bool) -> Result<KeptFd> {
    let flags = if close_on_exec { libc::O_CLOEXEC } else { 0 };
    if fd.as_raw_fd() == number {
        let kept = KeptFd(number);
        // The number is taken over as it is: the owner must not close it.
        std::mem::forget(fd);
        rustix::io::fcntl_setfd(
            kept.as_fd(),
            if close_on_exec { rustix::io::FdFlags::CLOEXEC } else { rustix::io::FdFlags::empty() },
        )
        .call(|| format!("fcntl({number}, F_SETFD)"))?;
        return Ok(kept);
    }
    // SAFETY: both numbers are plain integers; `fd` is open. What was open at `number` is given up by the caller.
    let result = unsafe { libc::dup3(fd.as_raw_fd(), number, flags) };
    check(result.into()).call(|| format!("dup3({}, {number})", fd.as_raw_fd()))?;
    Ok(KeptFd(number))
}

/// A descriptor with a fixed number that stays open until the process ends.
#[derive(Debug, Clone, Copy)]
pub struct KeptFd(RawFd);

impl AsFd for KeptFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: made by `move_fd`, which opened the number; nothing closes it before the process ends.
        unsafe { BorrowedFd::borrow_raw(self.0) }
    }
}

/// Takes a copy of a standard stream, close-on-exec and with a number above the standard ones.
pub fn copy_of_stdin() -> Result<OwnedFd> {
    // SAFETY: number 0 is only read by the call; a closed one gives EBADF.
    let fd = check(unsafe { libc::fcntl(0, libc::F_DUPFD_CLOEXEC, 3) }.into()).call(|| "fcntl(0, F_DUPFD)".into())?;
    // SAFETY: the call has just made this descriptor, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

// Signals

fn signal_set(signals: &[libc::c_int]) -> libc::sigset_t {
    // SAFETY: sigset_t is plain data for which all zeroes is a valid value; sigemptyset then sets it up.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a live, exclusive sigset_t.
    unsafe { libc::sigemptyset(&mut set) };
    for signal in signals {
        // SAFETY: as above; a number out of range is refused without effect.
        unsafe { libc::sigaddset(&mut set, *signal) };
    }
    set
}

/// Blocks exactly `signals` in this thread.
pub fn block_signals(signals: &[libc::c_int]) {
    let set = signal_set(signals);
    // SAFETY: `set` is initialised, the old mask is not asked for. The call cannot fail with these arguments.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut()) };
}

/// Waits for one of the blocked `signals`; returns its number and whether another process sent it.
pub fn wait_signal(signals: &[libc::c_int]) -> Result<(libc::c_int, bool)> {
    let set = signal_set(signals);
    loop {
        // SAFETY: siginfo_t is plain data that the call fills in.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: both are live and of the right type.
        let signal = unsafe { libc::sigwaitinfo(&set, &mut info) };
        match check(signal.into()) {
            // Codes of the kernel are positive; 0 and below mean kill, sigqueue and the like.
            Ok(_) => return Ok((signal, info.si_code <= 0)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(CallError::new("sigwaitinfo()", error)),
        }
    }
}

/// Returns a descriptor that becomes readable when one of the blocked `signals` arrives.
pub fn signal_fd(signals: &[libc::c_int]) -> Result<OwnedFd> {
    let set = signal_set(signals);
    // SAFETY: `set` is initialised and only read.
    let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    let fd = check(fd.into()).call(|| format!("signalfd({signals:?})"))?;
    // SAFETY: the call has just made this descriptor, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Lets this process wait for its children, even when it was started with SIGCHLD ignored: the kernel would throw
/// their status away.
pub fn expect_children() {
    // SAFETY: SIG_DFL is no function of ours.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// Gives every signal its default action back and unblocks all, as a fresh program expects it.
pub fn reset_signals() {
    // The kernel's sigaction: handler, flags, restorer and mask, all empty. The C library keeps two signals to itself.
    let default = [0_u64; 4];
    for signal in 1..=64 {
        // SAFETY: SIG_DFL is no function of ours; numbers that cannot be changed are refused without effect.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), std::ptr::null::<u64>(), 8_usize) };
    }
    block_signals(&[]);
}

// Mounts

/// Setting of a file system to be mounted.
#[derive(Debug, Clone, Copy)]
pub enum Param<'a> {
    /// Without value.
    Flag(&'a str),
    /// Without value; passed over when this kernel does not know it.
    OptionalFlag(&'a str),
    /// With value.
    Text(&'a str, &'a OsStr),
    /// With value; passed over when this kernel does not know it.
    OptionalText(&'a str, &'a OsStr),
}

/// Makes a file system and returns its mount, which is nowhere in the tree yet.
pub fn make_mount(kind: &str, params: &[Param<'_>], attributes: MountAttrFlags) -> Result<OwnedFd> {
    let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).call(|| format!("fsopen({kind:?})"))?;
    let explain = |error: rustix::io::Errno, call: &str| {
        let log = kernel_log(&context);
        let separator = if log.is_empty() { "" } else { ": " };
        CallError::new(format!("fsconfig({kind:?}, {call}){separator}{log}"), error)
    };
    // What mount tables show as the device; the kernel's own file systems have none.
    let named = params.iter().any(|param| matches!(param, Param::Text("source", _)));
    if !named {
        rustix::mount::fsconfig_set_string(&context, "source", kind).map_err(|error| explain(error, "source"))?;
    }
    for param in params {
        match *param {
            Param::Flag(key) => {
                rustix::mount::fsconfig_set_flag(&context, key).map_err(|error| explain(error, key))?;
            }
            Param::Text(key, value) => rustix::mount::fsconfig_set_string(&context, key, value)
                .map_err(|error| explain(error, &format!("{key:?}, {value:?}")))?,
            Param::OptionalFlag(key) => _ = rustix::mount::fsconfig_set_flag(&context, key),
            Param::OptionalText(key, value) => _ = rustix::mount::fsconfig_set_string(&context, key, value),
        }
    }
    rustix::mount::fsconfig_create(&context).map_err(|error| explain(error, "create"))?;
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(|error| {
        let log = kernel_log(&context);
        let separator = if log.is_empty() { "" } else { ": " };
        CallError::new(format!("fsmount({kind:?}){separator}{log}"), error)
    })
}

/// What the kernel wrote about a file system context: `e overlay: too many …`, one message per read.
fn kernel_log(context: &OwnedFd) -> String {
    let mut messages = Vec::new();
    let mut buffer = [0; 1024];
    while messages.len() < 16 {
        let Ok(length) = rustix::io::read(context, &mut buffer) else { break };
        let text = String::from_utf8_lossy(&buffer[..length]).trim().to_owned();
        // `e `, `w ` and `i ` say how serious it is; only errors explain a failure.
        if let Some(text) = text.strip_prefix("e ") {
            messages.push(text.to_owned());
        }
    }
    messages.join(", ")
}

/// Puts a mount where the open file or directory `point` is.
pub fn attach_mount(mount: impl AsFd, point: impl AsFd, name: &str) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mount, "", point, "", flags).call(|| format!("move_mount(-> {name:?})"))
}

/// Returns a copy of the mount tree at `path`, from there downwards, that is nowhere in the tree yet.
pub fn clone_mount(dir: impl AsFd, path: &Path) -> Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    if path.as_os_str().is_empty() {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    rustix::mount::open_tree(dir, path, flags).call(|| format!("open_tree({path:?}, clone)"))
}

#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Sets attributes on a whole mount tree (mount_setattr(2), since Linux 5.12).
pub fn set_mount_attributes(mount: impl AsFd, attributes: MountAttrFlags) -> Result<()> {
    let attr = MountAttr { set: attributes.bits().into(), clear: 0, propagation: 0, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: the path is an empty NUL-terminated string, `attr` has the kernel's layout of version 0 and the size
    // that is passed, and both live until the call returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    check(result).map(drop).call(|| format!("mount_setattr({attributes:?})"))
}

// Files below a root

/// Opens `path` as it is seen from inside `root`: absolute links and `..` stay below it (openat2(2)).
pub fn open_in_root(root: impl AsFd, path: &OsStr, flags: OFlags, mode: Mode) -> Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    // The kernel gives up with EAGAIN when a rename elsewhere makes it unsure about `..`.
    for _ in 0..64 {
        match rustix::fs::openat2(&root, path, flags | OFlags::CLOEXEC, mode, resolve) {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            result => return result.call(|| format!("openat2(root, {path:?}, in root)")),
        }
    }
    Err(CallError::new(format!("openat2(root, {path:?}, in root)"), rustix::io::Errno::AGAIN))
}

/// Opens `name`, a single component, in `dir` without following a symbolic link, for use as a place only.
pub fn open_entry(dir: impl AsFd, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// Opens a host path for use as a place only, following links.
pub fn open_place(path: &Path) -> Result<OwnedFd> {
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .call(|| format!("open({path:?}, O_PATH)"))
}

/// Returns the metadata of what `fd` refers to.
pub fn stat_fd(fd: impl AsFd) -> Result<rustix::fs::Stat> {
    rustix::fs::statat(&fd, "", AtFlags::EMPTY_PATH).call(|| format!("fstat({})", fd.as_fd().as_raw_fd()))
}

/// Returns whether the file system of `path` has no room for another file; false when it cannot be asked.
pub fn is_full(path: &Path) -> bool {
    // What a program could not write may be larger than what is left.
    const LITTLE_BYTES: u64 = 1 << 20;
    rustix::fs::statvfs(path).is_ok_and(|disk| {
        let inodes = disk.f_files > 0 && disk.f_favail == 0;
        inodes || disk.f_bavail.saturating_mul(disk.f_frsize) < LITTLE_BYTES
    })
}

// Security

/// One instruction of a socket filter, as seccomp(2) takes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct FilterInstruction {
    /// Operation.
    pub code: u16,
    /// Instructions to skip when the comparison holds.
    pub jump_true: u8,
    /// Instructions to skip when it does not.
    pub jump_false: u8,
    /// Operand.
    pub operand: u32,
}

#[repr(C)]
struct FilterProgram {
    length: u16,
    instructions: *const FilterInstruction,
}

/// Installs a seccomp filter on this process. Needs CAP_SYS_ADMIN or no_new_privs.
pub fn install_filter(instructions: &[FilterInstruction]) -> Result<()> {
    let describe = || format!("seccomp(filter, {} instructions)", instructions.len());
    let length = u16::try_from(instructions.len()).map_err(io::Error::other).call(describe)?;
    let program = FilterProgram { length, instructions: instructions.as_ptr() };
    let install = |flags: libc::c_ulong| {
        // SAFETY: `program` has the layout of sock_fprog and its pointer refers to `length` instructions, which live
        // until the call returns. The kernel checks the program itself.
        check(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) })
    };
    // The field's runtimes leave speculative store bypass on, which older kernels would turn off with a filter.
    install(libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW).or_else(|_| install(0)).map(drop).call(describe)
}

/// Asks the kernel to fetch the beginning of a file, posix_fadvise(2). Errors do not matter, since nothing is relied on.
pub fn will_read(file: impl AsFd, length: u64) {
    let _ = rustix::fs::fadvise(file, 0, NonZeroU64::new(length), rustix::fs::Advice::WillNeed);
}

/// Blocks that were read from disks for this thread so far, also for its memory, getrusage(2). File systems that do not count them,
/// as some over networks, leave it as it is.
pub fn blocks_read_by_thread() -> i64 {
    // SAFETY: `usage` is a plain structure that the call fills in.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage);
        usage.ru_inblock
    }
}

/// Names the variable that tells a supervisor, which inherits the setting, that its step is to have huge pages.
pub const HUGE_PAGES: &str = "NACRE_HUGE_PAGES";
static HUGE_PAGES_BACK: AtomicBool = AtomicBool::new(false);

/// Ends the use of huge pages for this process's memory, prctl(2), until [`exec`]: a supervisor lives for milliseconds, of
/// which clearing one takes a tenth, and a builder's memory becomes a third larger by them. Errors do not matter.
#[allow(clippy::disallowed_methods, reason = "a message from this program to itself, across execve")]
pub fn forgo_huge_pages() {
    // SAFETY: no memory is involved.
    let disabled = unsafe { libc::prctl(libc::PR_GET_THP_DISABLE, 0, 0, 0, 0) };
    if disabled == 0 || std::env::var_os(HUGE_PAGES).is_some() {
        HUGE_PAGES_BACK.store(true, Ordering::Relaxed);
    }
    // SAFETY: as above.
    unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, libc::c_ulong::from(true), 0, 0, 0) };
}

/// Are programs that this one starts to have huge pages?
pub fn gives_huge_pages() -> bool {
    HUGE_PAGES_BACK.load(Ordering::Relaxed)
}

/// Gives the process an empty session keyring, so that it does not share the caller's. Errors do not matter: the
/// kernel may be built without keyrings, or the quota be used up.
pub fn leave_session_keyring() {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;
    // SAFETY: a null name asks for an anonymous keyring; no memory is involved.
    unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0) };
}

// Network

/// Brings the loopback interface of this network namespace up.
pub fn bring_loopback_up() -> Result<()> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)
        .call(|| "socket(AF_INET)".into())?;
    // SAFETY: ifreq is plain data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq; `request` is one and lives until the call returns.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) };
    check(result.into()).map(drop).call(|| "ioctl(SIOCSIFFLAGS, \"lo\", up)".into())
}

/// Turns text into the form that system calls take; an inner NUL is an error.
pub fn c_string(text: impl AsRef<OsStr>) -> Result<CString> {
    let text = text.as_ref();
    CString::new(text.as_bytes()).map_err(io::Error::from).call(|| format!("argument {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_is_the_delay() {
        // SAFETY: reads a number.
        let delay = || unsafe { libmimalloc_sys::mi_option_get(PURGE_DELAY) };
        // Its default, which no other option has: their numbers change between versions.
        assert_eq!(delay(), 1000);
        return_memory_at_once();
        assert_eq!(delay(), 0);
    }
}
