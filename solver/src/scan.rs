//! Walks a directory and returns what is in it as [`Entry`]s in tree order, with the raw numbers of each inode.
//!
//! The directory may belong to somebody else and may change while it is read: every name is looked up in an open
//! directory and no symlink is followed, so nothing outside of the root is ever seen. The first levels are shared out
//! between threads. Directories below them are visited depth first with an explicit stack, of which only the deepest
//! [`OPEN_DIRECTORIES`] stay open; one above them is opened again through `..` and accepted only when it is still the
//! same inode.
//!
//! Reading file contents is left to others.

use crate::tree::{Attributes, Entry, Kind, join};
use rayon::prelude::*;
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RawDir, ResolveFlags, Statx, StatxFlags, openat, openat2, readlinkat, statx,
};
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// How many directories of the path that a thread is in are open at once, where the process may have enough for all threads.
const OPEN_DIRECTORIES: usize = 16;

/// Size of an extended attribute the kernel allows (`XATTR_SIZE_MAX`), and of a list of names.
const XATTR_LIMIT: usize = 65536;

/// Which extended attributes to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Xattrs {
    /// None: one system call less for each entry.
    None,
    /// All that can be read. Needs `/proc`.
    All,
}

/// What to do with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Return it, and look into it when it is a directory.
    Keep,
    /// Leave it out with all that is in it.
    Skip,
    /// Look into the directory; return it only if something in it is returned. As `Skip` for anything else.
    Look,
}

/// Decides which entries a scan returns.
pub trait Filter: Sync {
    /// What the filter remembers about a directory for the entries in it.
    type State: Send + Sync;

    /// State for the entries of the root.
    fn root(&self) -> Self::State;

    /// The decision about `path`, which lies in the directory that `parent` belongs to, and the state for what is in it.
    fn choose(&self, parent: &Self::State, path: &[u8], is_dir: bool) -> (Choice, Self::State);
}

/// Keeps everything.
#[derive(Debug, Clone, Copy)]
pub struct Everything;

impl Filter for Everything {
    type State = ();

    fn root(&self) {}

    fn choose(&self, (): &(), _: &[u8], _: bool) -> (Choice, ()) {
        (Choice::Keep, ())
    }
}

/// How to scan.
#[derive(Debug, Clone, Copy)]
pub struct ScanOptions<'a, F> {
    /// Extended attributes.
    pub xattrs: Xattrs,
    /// Which entries.
    pub filter: &'a F,
}

/// An entry with the numbers of its inode. Owner, mode and all extended attributes that were asked for stand in `entry`
/// as the disk has them; files have no digest and no link group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scanned {
    /// The entry.
    pub entry: Entry,
    /// Device of the file system.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Change time: seconds and nanoseconds.
    pub ctime: (i64, u32),
    /// Number of names.
    pub nlink: u32,
    /// Birth: seconds and nanoseconds; 0 where the file system does not know.
    pub born: (i64, u32),
}

/// Why a directory cannot be scanned.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// A system call failed.
    #[error("{call} of {path:?} failed", path = .path.display())]
    Call {
        /// Which.
        call: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Somebody moved or replaced a directory meanwhile.
    #[error("{path:?} changed while it was read", path = .path.display())]
    Changed {
        /// Which directory.
        path: PathBuf,
    },
}

impl ScanError {
    /// Path that the error is about.
    pub fn path(&self) -> &Path {
        match self {
            Self::Call { path, .. } | Self::Changed { path } => path,
        }
    }
}

/// Device and inode number of an open file.
pub(crate) fn identity(stat: &Statx) -> (u64, u64) {
    (rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor), stat.stx_ino)
}

/// `statx` of an open file.
pub(crate) fn stat_fd(fd: impl AsFd) -> Result<Statx, Errno> {
    statx(fd, c"", AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT, StatxFlags::BASIC_STATS | StatxFlags::BTIME)
}

/// `statx` of a name in a directory; a symlink is not followed.
pub(crate) fn stat_at(dir: impl AsFd, name: &CStr) -> Result<Statx, Errno> {
    statx(dir, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT, StatxFlags::BASIC_STATS | StatxFlags::BTIME)
}

/// Flags to list a directory.
pub(crate) const LIST_DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC).union(OFlags::NONBLOCK);

/// Names and types in a directory, in the order of the file system, without `.` and `..`.
pub(crate) fn list(dir: BorrowedFd<'_>) -> Result<Vec<(CString, FileType)>, Errno> {
    let mut buffer = [MaybeUninit::<u8>::uninit(); 32768];
    let mut names = Vec::new();
    let mut iter = RawDir::new(dir, &mut buffer);
    while let Some(entry) = iter.next() {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push((name.to_owned(), entry.file_type()));
        }
    }
    Ok(names)
}

/// Opens `path`, relative, below `dir` without following any symlink on the way or at its end. Longer paths than the
/// kernel takes in one call are walked in pieces.
pub(crate) fn open_below(dir: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    const PIECE: usize = 2048;
    let step = OFlags::PATH | OFlags::DIRECTORY;
    let mut held: Option<OwnedFd> = None;
    let mut rest = path;
    while rest.len() > PIECE {
        let Some(cut) = rest[..PIECE].iter().rposition(|&byte| byte == b'/') else { return Err(Errno::NAMETOOLONG) };
        let next = open_piece(held.as_ref().map_or(dir, |fd| fd.as_fd()), &rest[..cut], step)?;
        rest = &rest[cut + 1..];
        held = Some(next);
    }
    let rest = if rest.is_empty() { b"." } else { rest };
    open_piece(held.as_ref().map_or(dir, |fd| fd.as_fd()), rest, flags)
}

fn open_piece(dir: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    match openat2(dir, path, flags, Mode::empty(), resolve) {
        // Not known before Linux 5.6, and refused by seccomp filters older than that.
        Err(Errno::NOSYS | Errno::PERM) => {}
        result => return result,
    }
    let mut held: Option<OwnedFd> = None;
    let mut parts = path.split(|&byte| byte == b'/').peekable();
    while let Some(part) = parts.next() {
        if part == b".." {
            return Err(Errno::XDEV);
        }
        let flags = if parts.peek().is_some() {
            OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
        } else {
            flags
        };
        held = Some(openat(held.as_ref().map_or(dir, |fd| fd.as_fd()), part, flags, Mode::empty())?);
    }
    held.ok_or(Errno::NOENT)
}

/// A directory being visited.
struct Frame<S> {
    /// `None` when it was closed to stay within [`OPEN_DIRECTORIES`].
    fd: Option<OwnedFd>,
    identity: (u64, u64),
    path: Vec<u8>,
    /// What is still to be visited, last first.
    pending: Vec<(CString, FileType)>,
    state: S,
    /// Its own position in the result when it is to be removed unless something in it is returned.
    provisional: Option<usize>,
}

/// Everything in `root`, root included (its path is empty), in tree order. Sockets are left out, and so is what
/// disappears while the scan runs.
///
/// Uses the threads of the global pool: what calls it there must hold no lock that other work of the pool may want.
pub fn scan<F: Filter>(root: &Path, options: &ScanOptions<'_, F>) -> Result<Vec<Scanned>, ScanError> {
    let pieces = scan_in_pieces(root, options)?;
    let mut found = Vec::with_capacity(pieces.iter().map(Vec::len).sum());
    found.extend(pieces.into_iter().flatten());
    Ok(found)
}

/// As [`scan`], in the pieces that its threads have read, which follow each other in tree order: who takes one after the other
/// need not have all in memory twice.
pub(crate) fn scan_in_pieces<F: Filter>(
    root: &Path,
    options: &ScanOptions<'_, F>,
) -> Result<Vec<Vec<Scanned>>, ScanError> {
    let walk = Walk { root, options, open: open_directories() };
    // The root itself may be named through symlinks: it is the caller's choice.
    let fd = openat(CWD, root, LIST_DIRECTORY - OFlags::NOFOLLOW, Mode::empty()).map_err(walk.failed("open", b""))?;
    let stat = stat_fd(&fd).map_err(walk.failed("stat", b""))?;
    let mut top = scanned(Vec::new(), &stat, Kind::Dir { opaque: false });
    if options.xattrs == Xattrs::All {
        top.entry.xattrs = read_xattrs(Target::Open(fd.as_fd())).map_err(walk.failed("read attributes", b""))?;
    }
    let pending = list_reversed(fd.as_fd()).map_err(walk.failed("list", b""))?;
    let directory = Directory {
        found: top,
        fd,
        identity: identity(&stat),
        path: Vec::new(),
        pending,
        state: options.filter.root(),
        provisional: false,
    };
    walk.shared(directory, SHARED_LEVELS)
}

/// Levels below the root whose directories are shared out between threads.
const SHARED_LEVELS: usize = 6;

/// As many names of a directory are given to a thread at a time; directories with less are read by one.
const SHARED_NAMES: usize = 32;

/// A directory that has been opened and listed.
struct Directory<S> {
    found: Scanned,
    fd: OwnedFd,
    identity: (u64, u64),
    path: Vec<u8>,
    /// What is in it, last first.
    pending: Vec<(CString, FileType)>,
    /// The filter's state for what is in it.
    state: S,
    /// To be returned only if something in it is.
    provisional: bool,
}

/// What a name turned out to be.
enum Visited<S> {
    /// Gone, not chosen, or a socket.
    Nothing,
    /// No directory.
    Leaf(Scanned),
    Directory(Box<Directory<S>>),
}

struct Walk<'a, F> {
    root: &'a Path,
    options: &'a ScanOptions<'a, F>,
    /// At most as many directories of a thread's path are open.
    open: usize,
}

/// A quarter of the descriptors that the process may have, for all threads.
fn open_directories() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    let threads = rayon::current_num_threads().max(1) as u64;
    usize::try_from(limit / 4 / threads).unwrap_or(usize::MAX).clamp(2, OPEN_DIRECTORIES)
}

impl<F: Filter> Walk<'_, F> {
    fn at(&self, path: &[u8]) -> PathBuf {
        use std::os::unix::ffi::OsStrExt;
        if path.is_empty() { self.root.to_owned() } else { self.root.join(std::ffi::OsStr::from_bytes(path)) }
    }

    fn failed<'p>(&'p self, call: &'static str, path: &'p [u8]) -> impl FnOnce(Errno) -> ScanError + 'p {
        move |error| ScanError::Call { call, path: self.at(path), source: error.into() }
    }

    /// A directory and all in it, in pieces, the first levels read by several threads.
    fn shared(&self, directory: Directory<F::State>, levels: usize) -> Result<Vec<Vec<Scanned>>, ScanError> {
        if levels == 0 {
            return Ok(vec![self.below(directory)?]);
        }
        let Directory { found, fd, path, mut pending, state, provisional, .. } = directory;
        pending.reverse();
        let read = |names: &[(CString, FileType)]| -> Result<Vec<Vec<Scanned>>, ScanError> {
            let mut pieces = Vec::new();
            let mut leaves = Vec::new();
            for (name, file_type) in names {
                match self.visit(fd.as_fd(), &path, name, *file_type, &state)? {
                    Visited::Nothing => {}
                    Visited::Leaf(found) => leaves.push(found),
                    Visited::Directory(directory) => {
                        pieces.push(std::mem::take(&mut leaves));
                        pieces.extend(self.shared(*directory, levels - 1)?);
                    }
                }
            }
            pieces.push(leaves);
            Ok(pieces)
        };
        let inside = if pending.len() > SHARED_NAMES {
            let parts: Vec<Vec<Vec<Scanned>>> = pending.par_chunks(SHARED_NAMES).map(read).collect::<Result<_, _>>()?;
            parts.into_iter().flatten().collect()
        } else {
            read(&pending)?
        };
        if provisional && inside.iter().all(Vec::is_empty) {
            return Ok(Vec::new());
        }
        let mut pieces = vec![vec![found]];
        pieces.extend(inside.into_iter().filter(|piece| !piece.is_empty()));
        Ok(pieces)
    }

    /// A directory and all in it, to any depth.
    fn below(&self, directory: Directory<F::State>) -> Result<Vec<Scanned>, ScanError> {
        let frame = |directory: Directory<F::State>, position: usize| {
            let Directory { found, fd, identity, path, pending, state, provisional } = directory;
            let provisional = provisional.then_some(position);
            (found, Frame { fd: Some(fd), identity, path, pending, state, provisional })
        };
        let (top, first) = frame(directory, 0);
        let mut found = vec![top];
        let mut stack = vec![first];
        while let Some(top) = stack.last_mut() {
            let Some((name, file_type)) = top.pending.pop() else {
                let Some(done) = stack.pop() else { break };
                if done.provisional.is_some_and(|position| position + 1 == found.len()) {
                    found.pop();
                }
                if let (Some(parent), Some(child)) = (stack.last_mut(), done.fd)
                    && parent.fd.is_none()
                {
                    let path_flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    let fd =
                        openat(&child, c"..", path_flags, Mode::empty()).map_err(self.failed("open", &parent.path))?;
                    let stat = stat_fd(&fd).map_err(self.failed("stat", &parent.path))?;
                    if identity(&stat) != parent.identity {
                        return Err(ScanError::Changed { path: self.at(&parent.path) });
                    }
                    parent.fd = Some(fd);
                }
                continue;
            };
            let Some(dir) = &top.fd else { continue };
            match self.visit(dir.as_fd(), &top.path, &name, file_type, &top.state)? {
                Visited::Nothing => {}
                Visited::Leaf(leaf) => found.push(leaf),
                Visited::Directory(directory) => {
                    let (entry, next) = frame(*directory, found.len());
                    found.push(entry);
                    stack.push(next);
                    if let Some(far) = stack.len().checked_sub(self.open + 1) {
                        stack[far].fd = None;
                    }
                }
            }
        }
        Ok(found)
    }

    /// Looks at one name of an open directory; opens and lists it when it is a directory itself.
    fn visit(
        &self,
        dir: BorrowedFd<'_>,
        parent: &[u8],
        name: &CStr,
        file_type: FileType,
        state: &F::State,
    ) -> Result<Visited<F::State>, ScanError> {
        let path = join(parent, name.to_bytes());
        let mut stat = None;
        if file_type == FileType::Unknown {
            match stat_at(dir, name) {
                Err(Errno::NOENT) => return Ok(Visited::Nothing),
                result => stat = Some(result.map_err(self.failed("stat", &path))?),
            }
        }
        let type_of = |stat: &Statx| FileType::from_raw_mode(u32::from(stat.stx_mode));
        let is_dir = stat.as_ref().map_or(file_type, type_of) == FileType::Directory;
        let (choice, state) = self.options.filter.choose(state, &path, is_dir);
        if choice == Choice::Skip || choice == Choice::Look && !is_dir {
            return Ok(Visited::Nothing);
        }
        let stat = match stat.map_or_else(|| stat_at(dir, name), Ok) {
            Err(Errno::NOENT) => return Ok(Visited::Nothing),
            result => result.map_err(self.failed("stat", &path))?,
        };
        let kind = match type_of(&stat) {
            FileType::RegularFile => Kind::File { size: stat.stx_size, digest: None, link_group: 0 },
            FileType::Directory => Kind::Dir { opaque: false },
            FileType::Symlink => match readlinkat(dir, name, Vec::new()) {
                Err(Errno::NOENT | Errno::INVAL) => return Ok(Visited::Nothing),
                target => Kind::Symlink { target: target.map_err(self.failed("read link", &path))?.into_bytes() },
            },
            FileType::Fifo => Kind::Fifo,
            FileType::CharacterDevice => Kind::Char { major: stat.stx_rdev_major, minor: stat.stx_rdev_minor },
            FileType::BlockDevice => Kind::Block { major: stat.stx_rdev_major, minor: stat.stx_rdev_minor },
            FileType::Socket | FileType::Unknown => return Ok(Visited::Nothing),
        };
        let entry_is_dir = matches!(kind, Kind::Dir { .. });
        if entry_is_dir != is_dir {
            return Err(ScanError::Changed { path: self.at(&path) });
        }
        if !entry_is_dir {
            let mut leaf = scanned(path, &stat, kind);
            if self.options.xattrs == Xattrs::All {
                match read_xattrs(Target::Named(dir, name)) {
                    Err(Errno::NOENT) => return Ok(Visited::Nothing),
                    xattrs => {
                        leaf.entry.xattrs = xattrs.map_err(self.failed("read attributes", &leaf.entry.path))?;
                    }
                }
            }
            return Ok(Visited::Leaf(leaf));
        }
        let fd = match openat(dir, name, LIST_DIRECTORY, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(Visited::Nothing),
            Err(Errno::LOOP | Errno::NOTDIR) => return Err(ScanError::Changed { path: self.at(&path) }),
            fd => fd.map_err(self.failed("open", &path))?,
        };
        let stat = stat_fd(&fd).map_err(self.failed("stat", &path))?;
        let mut found = scanned(path.clone(), &stat, kind);
        if self.options.xattrs == Xattrs::All {
            found.entry.xattrs =
                read_xattrs(Target::Open(fd.as_fd())).map_err(self.failed("read attributes", &path))?;
        }
        let pending = list_reversed(fd.as_fd()).map_err(self.failed("list", &path))?;
        let provisional = choice == Choice::Look;
        Ok(Visited::Directory(Box::new(Directory {
            found,
            fd,
            identity: identity(&stat),
            path,
            pending,
            state,
            provisional,
        })))
    }
}

/// Byte-wise sorted, the last first.
fn list_reversed(dir: BorrowedFd<'_>) -> Result<Vec<(CString, FileType)>, Errno> {
    let mut names = list(dir)?;
    names.sort_unstable_by(|a, b| b.0.cmp(&a.0));
    Ok(names)
}

fn scanned(path: Vec<u8>, stat: &Statx, kind: Kind) -> Scanned {
    let (dev, ino) = identity(stat);
    Scanned {
        entry: Entry {
            path,
            kind,
            mode: u32::from(stat.stx_mode) & 0o7777,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            mtime: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
            xattrs: Attributes::default(),
        },
        dev,
        ino,
        ctime: (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
        nlink: stat.stx_nlink,
        born: (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec),
    }
}

/// Numbers the groups of entries that are names of one inode, counted from 1 in path order; a lone name gets 0.
pub(crate) fn link_groups<'a>(found: impl IntoIterator<Item = &'a Scanned>) -> Vec<u32> {
    let mut groups: std::collections::HashMap<(u64, u64), (usize, u32)> = std::collections::HashMap::new();
    let mut numbers = Vec::new();
    let mut last = 0;
    for (position, item) in found.into_iter().enumerate() {
        numbers.push(0);
        if item.nlink < 2 || !item.entry.is_file() {
            continue;
        }
        let group = groups.entry((item.dev, item.ino)).or_insert((position, 0));
        if group.0 != position {
            if group.1 == 0 {
                last += 1;
                group.1 = last;
                numbers[group.0] = last;
            }
            numbers[position] = group.1;
        }
    }
    numbers
}

/// What to read attributes of.
enum Target<'a> {
    /// An open file or directory.
    Open(BorrowedFd<'a>),
    /// A name in an open directory, itself if it is a symlink.
    Named(BorrowedFd<'a>, &'a CStr),
}

/// All attributes. There is no system call for attributes of a name in a directory before Linux 6.13, so that the name
/// is reached through `/proc/self/fd`, which is the open directory itself.
fn read_xattrs(target: Target<'_>) -> Result<Attributes, Errno> {
    let path = match &target {
        Target::Open(_) => Vec::new(),
        Target::Named(dir, name) => {
            let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
            path.extend_from_slice(name.to_bytes());
            path
        }
    };
    let list = |buffer: &mut [u8]| match target {
        Target::Open(fd) => rustix::fs::flistxattr(fd, buffer),
        Target::Named(..) => rustix::fs::llistxattr(path.as_slice(), buffer),
    };
    let mut names = vec![0; 256];
    let length = match list(&mut names) {
        Err(Errno::RANGE) => {
            names.resize(XATTR_LIMIT, 0);
            list(&mut names)?
        }
        Err(Errno::NOTSUP) => 0,
        result => result?,
    };
    let mut xattrs = Attributes::default();
    for name in names[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        let read = |buffer: &mut [u8]| match target {
            Target::Open(fd) => rustix::fs::fgetxattr(fd, name, buffer),
            Target::Named(..) => rustix::fs::lgetxattr(path.as_slice(), name, buffer),
        };
        let mut value = vec![0; 256];
        let length = match read(&mut value) {
            Err(Errno::RANGE) => {
                value.resize(XATTR_LIMIT, 0);
                read(&mut value)
            }
            result => result,
        };
        match length {
            Ok(length) => {
                value.truncate(length);
                xattrs.insert(name.to_vec(), value);
            }
            // Removed meanwhile, or for the eyes of others only (`trusted.*` lists but does not read in some cases).
            Err(Errno::NODATA | Errno::NOTSUP | Errno::PERM | Errno::ACCESS) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(xattrs)
}

/// Attributes that images hold. BuildKit writes no other into a layer, whatever a file has.
pub fn is_kept_xattr(name: &[u8]) -> bool {
    name == b"security.capability"
}

/// Leaves an entry only the attributes that images hold. Returns one of those that somebody will miss: not what belongs
/// to overlayfs or to a security module of this machine.
pub(crate) fn keep_attributes(entry: &mut Entry) -> Option<Vec<u8>> {
    if entry.xattrs.is_empty() {
        return None;
    }
    let of_machine = [&b"user.overlay."[..], b"trusted.overlay.", b"security."];
    let missed = entry.xattrs.keys().find(|name| !of_machine.iter().any(|prefix| name.starts_with(prefix))).cloned();
    entry.xattrs.retain(|name, _| is_kept_xattr(name));
    missed
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn listing(root: &Path, filter: &impl Filter) -> Vec<String> {
        let found = scan(root, &ScanOptions { xattrs: Xattrs::All, filter }).unwrap();
        found.iter().map(|item| String::from_utf8_lossy(&item.entry.path).into_owned()).collect()
    }

    /// Decides by name: `x…` is skipped, `l…` looked into.
    struct ByName;

    impl Filter for ByName {
        type State = ();
        fn root(&self) {}
        fn choose(&self, (): &(), path: &[u8], _: bool) -> (Choice, ()) {
            let choice = match crate::tree::file_name(path)[0] {
                b'x' => Choice::Skip,
                b'l' => Choice::Look,
                _ => Choice::Keep,
            };
            (choice, ())
        }
    }

    #[test]
    fn entries_come_in_tree_order() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a-b", "a/x", "a.b/y"] {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, name).unwrap();
        }
        symlink("nowhere", dir.path().join("s")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
        assert_eq!(listing(dir.path(), &Everything), ["", "a", "a/x", "a-b", "a.b", "a.b/y", "s"]);
    }

    #[test]
    fn filters_prune_and_look() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["x/a", "l1/x", "l1/l2/x", "l3/l4/b", "l5"] {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, name).unwrap();
        }
        assert_eq!(listing(dir.path(), &ByName), ["", "l3", "l3/l4", "l3/l4/b"]);
    }

    #[test]
    fn hard_links_are_grouped() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "c", "d"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        std::fs::hard_link(dir.path().join("a"), dir.path().join("b")).unwrap();
        let outside = tempfile::NamedTempFile::new_in(dir.path().parent().unwrap()).unwrap();
        std::fs::remove_file(outside.path()).unwrap();
        std::fs::hard_link(dir.path().join("c"), outside.path()).unwrap();
        let found = scan(dir.path(), &ScanOptions { xattrs: Xattrs::None, filter: &Everything }).unwrap();
        assert_eq!(link_groups(&found), [0, 1, 1, 0, 0]);
    }

    #[test]
    fn depth_costs_neither_stack_nor_descriptors() {
        let dir = tempfile::tempdir().unwrap();
        let mut fd = openat(CWD, dir.path(), LIST_DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..1500 {
            rustix::fs::mkdirat(&fd, c"d", Mode::RWXU).unwrap();
            let next = openat(&fd, c"d", LIST_DIRECTORY, Mode::empty()).unwrap();
            for name in [c"a", c"z"] {
                openat(&fd, name, OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap();
            }
            fd = next;
        }
        let found = scan(dir.path(), &ScanOptions { xattrs: Xattrs::None, filter: &Everything }).unwrap();
        assert_eq!(found.len(), 1 + 3 * 1500);
        crate::materialize::remove_tree(dir.path()).unwrap();
    }

    #[test]
    fn a_missing_root_is_named() {
        let error =
            scan(Path::new("/no/such"), &ScanOptions { xattrs: Xattrs::None, filter: &Everything }).unwrap_err();
        assert_eq!(error.path(), Path::new("/no/such"));
    }
}
