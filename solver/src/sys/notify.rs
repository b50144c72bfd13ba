//! Calls that a seccomp filter hands to another process: seccomp_unotify(2).
//!
//! A [`Notification`] stays answerable for as long as the calling thread waits. Everything that was found out by its
//! process id is only known to be about that thread when [`is_waiting`] says so afterwards: the number could have gone
//! to another process meanwhile.

use super::{Call, FilterInstruction, FilterProgram, Result, check};
use rustix::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use rustix::io::Errno;
use std::ffi::CStr;
use std::io;

/// A call that waits for an answer.
#[derive(Debug, Clone, Copy)]
pub struct Notification {
    /// Names the call in answers.
    pub id: u64,
    /// Thread that called, in this process's pid namespace.
    pub thread: i32,
    /// Architecture as seccomp(2) numbers them.
    pub architecture: u32,
    /// Number of the call on that architecture.
    pub number: i32,
    /// Its arguments.
    pub arguments: [u64; 6],
}

/// Installs a filter and returns the descriptor through which its notifications come. Needs CAP_SYS_ADMIN or
/// no_new_privs; a process below another filter with such a descriptor gets EBUSY.
pub fn install_filter_with_listener(instructions: &[FilterInstruction]) -> Result<OwnedFd> {
    let describe = || format!("seccomp(filter with listener, {} instructions)", instructions.len());
    let length = u16::try_from(instructions.len()).map_err(io::Error::other).call(describe)?;
    let program = FilterProgram { length, instructions: instructions.as_ptr() };
    let install = |flags: libc::c_ulong| {
        // SAFETY: `program` has the layout of sock_fprog and its pointer refers to `length` instructions, which live
        // until the call returns. The kernel checks the program itself.
        check(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) })
    };
    let (listener, speculation) = (libc::SECCOMP_FILTER_FLAG_NEW_LISTENER, libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW);
    // Since Linux 5.19 a signal that does not kill cannot interrupt a call that is being answered already, and so does
    // not make it happen twice.
    let killable = libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    let fd = match install(listener | speculation | killable) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => install(listener | speculation),
        result => result,
    };
    let fd = fd.call(describe)?;
    // SAFETY: the call has just made this descriptor, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Lets answers wake the caller on the same CPU (Linux 6.6), which halves the time of a call. Older kernels do without.
pub fn wake_up_at_once(listener: impl AsFd) {
    const SYNC_WAKE_UP: libc::c_ulong = 1;
    // SAFETY: the argument of this request is a plain number.
    unsafe { libc::ioctl(listener.as_fd().as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SET_FLAGS as _, SYNC_WAKE_UP) };
}

/// Takes the next call; `None` when the one that was announced is gone.
pub fn receive(listener: impl AsFd) -> Result<Option<Notification>> {
    // SAFETY: plain data for which all zeroes is a valid value; the kernel insists on them.
    let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: `call` is live and of the type that the request writes.
    let result =
        unsafe { libc::ioctl(listener.as_fd().as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV as _, &raw mut call) };
    match check(result.into()) {
        Ok(_) => Ok(Some(Notification {
            id: call.id,
            thread: call.pid as i32,
            architecture: call.data.arch,
            number: call.data.nr,
            arguments: call.data.args,
        })),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => Ok(None),
        Err(error) => Err(error).call(|| "ioctl(SECCOMP_IOCTL_NOTIF_RECV)".into()),
    }
}

/// Returns whether the thread still waits for the answer to `id`.
pub fn is_waiting(listener: impl AsFd, id: u64) -> bool {
    // SAFETY: `id` is live and of the type that the request reads.
    unsafe { libc::ioctl(listener.as_fd().as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ID_VALID as _, &raw const id) == 0 }
}

fn send(listener: impl AsFd, answer: libc::seccomp_notif_resp) {
    // A caller that was killed meanwhile needs no answer.
    // SAFETY: `answer` is live and of the type that the request reads.
    unsafe { libc::ioctl(listener.as_fd().as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND as _, &raw const answer) };
}

/// Makes the call return `value`.
pub fn answer(listener: impl AsFd, id: u64, value: std::result::Result<i64, Errno>) {
    let (val, error) = match value {
        Ok(value) => (value, 0),
        Err(error) => (0, -error.raw_os_error()),
    };
    send(listener, libc::seccomp_notif_resp { id, val, error, flags: 0 });
}

/// Lets the kernel carry the call out, with the arguments that it finds then.
pub fn let_continue(listener: impl AsFd, id: u64) {
    let flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32;
    send(listener, libc::seccomp_notif_resp { id, val: 0, error: 0, flags });
}

/// Gives the caller a copy of `file` and makes the call return its number.
pub fn answer_with_file(listener: impl AsFd, id: u64, file: impl AsFd, close_on_exec: bool) -> Result<()> {
    let added = libc::seccomp_notif_addfd {
        id,
        flags: libc::SECCOMP_ADDFD_FLAG_SEND as u32,
        srcfd: file.as_fd().as_raw_fd() as u32,
        newfd: 0,
        newfd_flags: if close_on_exec { libc::O_CLOEXEC as u32 } else { 0 },
    };
    // SAFETY: `added` is live and of the type that the request reads.
    let result =
        unsafe { libc::ioctl(listener.as_fd().as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ADDFD as _, &raw const added) };
    check(result.into()).map(drop).call(|| "ioctl(SECCOMP_IOCTL_NOTIF_ADDFD)".into())
}

/// Reads memory of a thread into `buffer`; returns how much could be read, which ends where memory does.
pub fn read_memory(thread: i32, address: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: buffer.len() };
    // SAFETY: `local` describes `buffer`, which is exclusively ours; the kernel checks the other address itself.
    let length = unsafe { libc::process_vm_readv(thread, &raw const local, 1, &raw const remote, 1, 0) };
    check(length as libc::c_long).map(|length| length as usize)
}

/// Writes `bytes` into memory of a thread, where that thread could write itself.
pub fn write_memory(thread: i32, address: u64, bytes: &[u8]) -> io::Result<()> {
    let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: bytes.len() };
    // SAFETY: `local` describes `bytes`, which is only read; the kernel checks the other address itself.
    let length = unsafe { libc::process_vm_writev(thread, &raw const local, 1, &raw const remote, 1, 0) };
    match check(length as libc::c_long)? as usize == bytes.len() {
        true => Ok(()),
        false => Err(io::Error::from_raw_os_error(libc::EFAULT)),
    }
}

/// Returns the soft and hard limit RLIMIT_LOCKS of a process; it limits nothing since Linux 2.4.
pub fn locks_limit(process: i32) -> io::Result<(u64, u64)> {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: no new limit is set, and `limit` is live and of the type that the call writes.
    check(unsafe { libc::prlimit64(process, libc::RLIMIT_LOCKS, std::ptr::null(), &raw mut limit) }.into())?;
    Ok((limit.rlim_cur, limit.rlim_max))
}

/// Sets the soft limit RLIMIT_LOCKS of a process; 0 is the calling one.
pub fn set_locks_limit(process: i32, soft: u64) -> io::Result<()> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: locks_limit(process)?.1 };
    // SAFETY: `limit` is live and of the type that the call reads; the old limit is not asked for.
    check(unsafe { libc::prlimit64(process, libc::RLIMIT_LOCKS, &raw const limit, std::ptr::null_mut()) }.into())
        .map(drop)
}

/// Metadata as statx(2) returns it: 256 bytes at the kernel's offsets.
#[derive(Debug, Clone)]
pub struct RawStatx(pub [u64; 32]);

impl RawStatx {
    /// Asks for the metadata of `path` at `dir`.
    pub fn of(dir: impl AsFd, path: &CStr, flags: u32, mask: u32) -> std::result::Result<RawStatx, Errno> {
        let mut bytes = [0_u64; 32];
        let dir = dir.as_fd().as_raw_fd();
        // SAFETY: `path` is NUL-terminated, and the buffer has the size and alignment of struct statx.
        let result = unsafe { libc::syscall(libc::SYS_statx, dir, path.as_ptr(), flags, mask, bytes.as_mut_ptr()) };
        match check(result) {
            Ok(_) => Ok(RawStatx(bytes)),
            Err(error) => Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
        }
    }
}
