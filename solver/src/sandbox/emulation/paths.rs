//! The memory and the paths of a calling thread.
//!
//! A path is opened as the thread would open it. Relative ones start at a link of /proc to the thread's working
//! directory or file, absolute ones at the root directory, which this process shares with the step. A thread that has
//! called chroot lends its own root directory for the moment. `/proc/self` would be this process, which has no number
//! in the step's /proc, so that such a path leads nowhere: then it starts at the thread's own links instead. Without a
//! pid namespace this process is in the step's /proc, and no path but those may lead through its links.

use super::Emulator;
use crate::sys::{
    self,
    notify::{self, Notification, RawStatx},
};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};
use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;

/// As in the kernel, with the NUL at the end.
const PATH_MAX: usize = 4096;
/// Links that are followed by hand.
const MAX_LINKS: usize = 16;

const EMPTY_PATH: u32 = libc::AT_EMPTY_PATH as u32;
const NOFOLLOW: u32 = libc::AT_SYMLINK_NOFOLLOW as u32;

/// What `/proc/PID/status` says: proc_pid_status(5).
pub(super) struct Status(String);

impl Status {
    /// What stands behind `field`, such as `Umask:`.
    pub(super) fn field(&self, field: &str) -> Result<&str, Errno> {
        self.0.lines().find_map(|line| line.strip_prefix(field)).map(str::trim).ok_or(Errno::IO)
    }

    /// A set of capabilities, such as `CapPrm:`.
    pub(super) fn capabilities(&self, field: &str) -> Result<CapabilitySet, Errno> {
        let bits = u64::from_str_radix(self.field(field)?, 16).map_err(|_| Errno::IO)?;
        Ok(CapabilitySet::from_bits_retain(bits))
    }
}

impl Emulator {
    // Memory

    /// Reads text up to its NUL.
    pub(super) fn read_path(&self, call: &Notification, address: u64) -> Result<Vec<u8>, Errno> {
        const PAGE: u64 = 4096;
        let mut text = Vec::new();
        let mut buffer = [0; 512];
        let mut at = address;
        while text.len() < PATH_MAX {
            // Memory may end at the end of a page.
            let length = (PAGE - at % PAGE).min(buffer.len() as u64) as usize;
            let found = self.read_some(call, at, &mut buffer[..length])?;
            if found == 0 {
                return Err(Errno::FAULT);
            }
            if let Some(end) = buffer[..found].iter().position(|byte| *byte == 0) {
                text.extend_from_slice(&buffer[..end]);
                return if text.len() < PATH_MAX { Ok(text) } else { Err(Errno::NAMETOOLONG) };
            }
            text.extend_from_slice(&buffer[..found]);
            at += found as u64;
        }
        Err(Errno::NAMETOOLONG)
    }

    pub(super) fn read_exactly(&self, call: &Notification, address: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < buffer.len() {
            match self.read_some(call, address + done as u64, &mut buffer[done..])? {
                0 => return Err(Errno::FAULT),
                length => done += length,
            }
        }
        Ok(())
    }

    fn read_some(&self, call: &Notification, address: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
        let mut read = || {
            notify::read_memory(call.thread, address, buffer).map_err(|error| match super::errno(&error) {
                Errno::PERM => Errno::PERM,
                _ => Errno::FAULT,
            })
        };
        self.as_tracer(&mut read)
    }

    /// Does something with the memory or the descriptors of a caller that has made itself undumpable, as sudo and
    /// ssh-agent do: that takes a capability more. `act` must follow no path that the step can choose.
    fn as_tracer<T>(&self, act: &mut dyn FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
        let refused = match act() {
            Err(error @ (Errno::PERM | Errno::ACCESS)) => error,
            result => return result,
        };
        if !self.capabilities.permitted.contains(CapabilitySet::SYS_PTRACE) {
            return Err(refused);
        }
        let set = |effective| {
            let sets = CapabilitySets { effective, ..self.capabilities };
            rustix::thread::set_capabilities(None, sets)
        };
        let usual = self.effective;
        set(usual | CapabilitySet::SYS_PTRACE)?;
        let result = act();
        if set(usual).is_err() {
            // Never to go on with it: the step ends with this process.
            sys::exit_now(1);
        }
        result
    }

    /// Writes into the caller's memory.
    pub(super) fn write(&self, call: &Notification, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        // Opened first and checked then: the number could be another process's by now, the open memory cannot.
        let path = format!("{}/mem", call.thread);
        let memory = self.as_tracer(&mut || {
            rustix::fs::openat(&self.proc, &*path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
        })?;
        self.still_waiting(call)?;
        let mut done = 0;
        while done < bytes.len() {
            match rustix::io::pwrite(&memory, &bytes[done..], address + done as u64) {
                Ok(length) if length > 0 => done += length,
                Err(Errno::INTR) => {}
                _ => return Err(Errno::FAULT),
            }
        }
        Ok(())
    }

    // Paths. What they lead to is the caller's only if it still waits: `still_waiting`.

    /// Opens what a path in the caller's memory leads to, as a place. Of `flags`, AT_SYMLINK_NOFOLLOW and AT_EMPTY_PATH
    /// count.
    pub(super) fn resolve(&self, call: &Notification, dir: i32, path: u64, flags: u32) -> Result<OwnedFd, Errno> {
        // A null pointer is an empty path where one is allowed (Linux 6.11).
        let text = match path {
            0 if flags & EMPTY_PATH != 0 => Vec::new(),
            _ => self.read_path(call, path)?,
        };
        self.resolve_text(call, dir, &text, flags)
    }

    pub(super) fn resolve_text(
        &self,
        call: &Notification,
        dir: i32,
        path: &[u8],
        flags: u32,
    ) -> Result<OwnedFd, Errno> {
        if path.is_empty() {
            return if flags & EMPTY_PATH != 0 { self.open_descriptor(call, dir) } else { Err(Errno::NOENT) };
        }
        let follow = flags & NOFOLLOW == 0;
        match self.open_place(call, dir, path, follow) {
            Err(Errno::NOENT | Errno::LOOP) => self.resolve_self(call, dir, path, follow),
            found => found,
        }
    }

    /// What is open as number `file`, or the working directory.
    pub(super) fn open_descriptor(&self, call: &Notification, file: i32) -> Result<OwnedFd, Errno> {
        let opened = self.open_link(&base(call, file), OFlags::empty());
        opened.map_err(|error| if error == Errno::NOENT { Errno::BADF } else { error })
    }

    /// Opens one of the links in a thread's directory of /proc, as a place.
    fn open_link(&self, link: &str, more: OFlags) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::CLOEXEC | more;
        self.as_tracer(&mut || rustix::fs::openat(&self.proc, link, flags, Mode::empty()))
    }

    fn open_place(&self, call: &Notification, dir: i32, path: &[u8], follow: bool) -> Result<OwnedFd, Errno> {
        self.with_root_of(call, || {
            let absolute = path.starts_with(b"/");
            if absolute && !self.shared_proc {
                return rustix::fs::open(OsStr::from_bytes(path), place_flags(follow), Mode::empty());
            }
            let whole = [base(call, dir).as_bytes(), b"/", path].concat();
            if !self.shared_proc && whole.len() < PATH_MAX {
                let whole = OsStr::from_bytes(&whole);
                match rustix::fs::openat(&self.proc, whole, place_flags(follow), Mode::empty()) {
                    // Perhaps it is the link alone that may not be followed.
                    Err(Errno::ACCESS) => {}
                    found => return found,
                }
            }
            let start = match absolute {
                true => rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?,
                false => self.open_link(&base(call, dir), OFlags::empty())?,
            };
            self.open_below(&start, path, follow)
        })
    }

    /// Opens a path that starts at an open directory.
    fn open_below(&self, start: &OwnedFd, path: &[u8], follow: bool) -> Result<OwnedFd, Errno> {
        let path = OsStr::from_bytes(path);
        // Where the step shares /proc with this process, a path could lead through what is open here.
        match self.shared_proc {
            true => {
                let resolve = ResolveFlags::NO_MAGICLINKS;
                rustix::fs::openat2(start, path, place_flags(follow), Mode::empty(), resolve)
            }
            false => rustix::fs::openat(start, path, place_flags(follow), Mode::empty()),
        }
    }

    /// Metadata of what a path leads to, with as few calls as possible.
    pub(super) fn stat_path(
        &self,
        call: &Notification,
        dir: i32,
        path: &[u8],
        flags: u32,
        mask: u32,
    ) -> Result<RawStatx, Errno> {
        let text = |bytes: Vec<u8>| CString::new(bytes).map_err(|_| Errno::INVAL);
        if path.is_empty() {
            if flags & EMPTY_PATH == 0 {
                return Err(Errno::NOENT);
            }
            let stat =
                RawStatx::of(&self.proc, &text(base(call, dir).into_bytes())?, flags & !(NOFOLLOW | EMPTY_PATH), mask);
            return match stat {
                Err(Errno::ACCESS) => RawStatx::of(self.open_descriptor(call, dir)?, c"", EMPTY_PATH, mask),
                stat => stat,
            };
        }
        let whole = match path.starts_with(b"/") {
            true => path.to_vec(),
            false => [base(call, dir).as_bytes(), b"/", path].concat(),
        };
        let simple = whole.len() < PATH_MAX && !self.chroots && !self.shared_proc && !names_self(path);
        let stat = match simple {
            true => RawStatx::of(&self.proc, &text(whole)?, flags & !EMPTY_PATH, mask),
            false => Err(Errno::ACCESS),
        };
        match stat {
            Err(Errno::ACCESS) => {
                let file = self.resolve_text(call, dir, path, flags)?;
                RawStatx::of(&file, c"", flags | EMPTY_PATH, mask)
            }
            stat => stat,
        }
    }

    /// The directory that the last component of a path is in, and that component. `None` for a path that names nothing
    /// that could be made.
    pub(super) fn parent(
        &self,
        call: &Notification,
        dir: i32,
        path: &[u8],
    ) -> Result<Option<(OwnedFd, Vec<u8>)>, Errno> {
        let end = path.iter().rposition(|byte| *byte != b'/').map_or(0, |last| last + 1);
        let trimmed = &path[..end];
        let start = trimmed.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
        let name = &trimmed[start..];
        if name.is_empty() || name == b"." || name == b".." {
            return Ok(None);
        }
        let parent = if start == 0 { &b"."[..] } else { &trimmed[..start] };
        Ok(Some((self.resolve_text(call, dir, parent, 0)?, name.to_vec())))
    }

    /// Does something with the caller's root directory as this process's.
    fn with_root_of<T>(&self, call: &Notification, act: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        if !self.chroots {
            return act();
        }
        let root = self.open_link(&format!("{}/root", call.thread), OFlags::DIRECTORY)?;
        self.still_waiting(call)?;
        let io = |error: crate::sys::CallError| super::errno(&error.source);
        super::enter(&root, &self.descriptors).map_err(io)?;
        let result = act();
        super::enter(&self.root, &self.descriptors).map_err(io)?;
        result
    }

    /// Follows links by hand, for those that lead through `/proc/self`.
    fn resolve_self(&self, call: &Notification, dir: i32, path: &[u8], follow: bool) -> Result<OwnedFd, Errno> {
        let (mut dir, mut path) = (dir, path.to_vec());
        for _ in 0..MAX_LINKS {
            if let Some((own, rest)) = own_link(call, &path) {
                // The link itself, which the kernel knows.
                if rest.is_empty() && !follow && !path.ends_with(b"/") {
                    return Err(Errno::NOENT);
                }
                let start = self.open_link(&own, OFlags::empty())?;
                return match rest.is_empty() {
                    true => Ok(start),
                    false => self.open_below(&start, rest, follow),
                };
            }
            if !follow {
                return Err(Errno::NOENT);
            }
            // What a link to nowhere says.
            let link = self.open_place(call, dir, &path, false)?;
            let target = rustix::fs::readlinkat(&link, "", Vec::new()).map_err(|_| Errno::NOENT)?.into_bytes();
            path = match target.starts_with(b"/") {
                true => target,
                false => {
                    let start = path.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
                    [&path[..start], &target].concat()
                }
            };
            if path.starts_with(b"/") {
                dir = libc::AT_FDCWD;
            }
            match self.open_place(call, dir, &path, follow) {
                Err(Errno::NOENT | Errno::LOOP) => {}
                found => return found,
            }
        }
        Err(Errno::LOOP)
    }

    /// The caller's status.
    pub(super) fn status(&self, call: &Notification) -> Result<Status, Errno> {
        let path = format!("{}/status", call.thread);
        let file = rustix::fs::openat(&self.proc, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let mut text = String::new();
        std::io::Read::read_to_string(&mut std::fs::File::from(file), &mut text)
            .map_err(|error| super::errno(&error))?;
        self.still_waiting(call)?;
        Ok(Status(text))
    }

    /// Whether a file starts with `#!`: the kernel ignores set-id bits of scripts.
    pub(super) fn is_script(&self, file: &OwnedFd) -> bool {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let name = file.as_raw_fd().to_string();
        let mut start = [0; 2];
        rustix::fs::openat(&self.descriptors, name, flags, Mode::empty())
            .is_ok_and(|file| rustix::io::read(&file, &mut start) == Ok(2) && start == *b"#!")
    }

    /// Whether `name` exists in `dir`; symbolic links are not followed.
    pub(super) fn exists(&self, dir: &OwnedFd, name: &[u8]) -> bool {
        rustix::fs::statat(dir, OsStr::from_bytes(name), AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }
}

fn place_flags(follow: bool) -> OFlags {
    OFlags::PATH | OFlags::CLOEXEC | if follow { OFlags::empty() } else { OFlags::NOFOLLOW }
}

/// The link to a thread's working directory or open file, as seen from /proc.
fn base(call: &Notification, dir: i32) -> String {
    match dir {
        libc::AT_FDCWD => format!("{}/cwd", call.thread),
        number => format!("{}/fd/{number}", call.thread),
    }
}

/// Whether a path may lead through `/proc/self`.
fn names_self(path: &[u8]) -> bool {
    path.starts_with(b"/proc/") || path.starts_with(b"/dev/")
}

/// The link of /proc that a path through the caller's own directory there starts with, and the rest of the path.
fn own_link<'a>(call: &Notification, path: &'a [u8]) -> Option<(String, &'a [u8])> {
    let streams: [(&[u8], u32); 3] = [(b"/dev/stdin", 0), (b"/dev/stdout", 1), (b"/dev/stderr", 2)];
    for (name, number) in streams {
        if path == name {
            return Some((format!("{}/fd/{number}", call.thread), b""));
        }
    }
    let own = below(path, b"/proc/self").or_else(|| below(path, b"/proc/thread-self"));
    let (kind, rest) = match own.map(component) {
        Some((b"fd", rest)) => ("fd/", rest),
        Some((b"cwd", rest)) => return Some((format!("{}/cwd", call.thread), rest)),
        Some((b"exe", b"")) => return Some((format!("{}/exe", call.thread), b"")),
        Some((b"root", rest)) => return Some((format!("{}/root", call.thread), rest)),
        _ => ("fd/", below(path, b"/dev/fd")?),
    };
    let (number, rest) = component(rest);
    let number: u32 = std::str::from_utf8(number).ok()?.parse().ok()?;
    Some((format!("{}/{kind}{number}", call.thread), rest))
}

/// The first component of a path, and the rest without slashes before it.
fn component(path: &[u8]) -> (&[u8], &[u8]) {
    let path = without_slashes(path);
    let end = path.iter().position(|byte| *byte == b'/').unwrap_or(path.len());
    (&path[..end], without_slashes(&path[end..]))
}

fn without_slashes(path: &[u8]) -> &[u8] {
    &path[path.iter().take_while(|byte| **byte == b'/').count()..]
}

/// What follows `prefix` in a path that is it or lies below it.
fn below<'a>(path: &'a [u8], prefix: &[u8]) -> Option<&'a [u8]> {
    path.strip_prefix(prefix).filter(|rest| rest.is_empty() || rest[0] == b'/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_paths_through_the_own_directory() {
        let call = Notification { id: 0, thread: 7, architecture: 0, number: 0, arguments: [0; 6] };
        for (path, expected) in [
            ("/proc/self/fd/3", Some(("7/fd/3", ""))),
            ("/proc/self//fd/3/../x", Some(("7/fd/3", "../x"))),
            ("/proc/thread-self/cwd/a/b", Some(("7/cwd", "a/b"))),
            ("/proc/self/root/", Some(("7/root", ""))),
            ("/proc/self/exe", Some(("7/exe", ""))),
            ("/dev/fd/0", Some(("7/fd/0", ""))),
            ("/dev/stderr", Some(("7/fd/2", ""))),
            ("/proc/self/fd/../../1/root", None),
            ("/proc/self/task/7/root", None),
            ("/proc/selfish/fd/1", None),
            ("/dev/fdx/1", None),
        ] {
            let found = own_link(&call, path.as_bytes());
            let expected = expected.map(|(link, rest): (&str, &str)| (link.to_owned(), rest.as_bytes()));
            assert_eq!(found, expected, "{path}");
        }
    }
}
