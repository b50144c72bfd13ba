//! Walks a directory and returns what is in it as a tree, with the raw numbers of each inode.
//!
//! The directory may belong to somebody else and may change while it is read: every name is looked up in an open
//! directory and no symlink is followed, so nothing outside of the root is ever seen. The first levels are shared out
//! between threads. Directories below them are visited depth first with an explicit stack, of which only the deepest
//! [`OPEN_DIRECTORIES`] stay open; one above them is opened again through `..` and accepted only when it is still the
//! same inode.
//!
//! Reading file contents is left to others.

use crate::tree::{Attributes, Entry, Inode, Kind, OnDisk, Origin, Tree, TreeBuilder, join};
use rayon::prelude::*;
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RawDir, ResolveFlags, Statx, StatxFlags, openat, openat2, readlinkat, statx,
};
use rustix::io::Errno;
use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How many directories of the path that a thread is in are open at once, where the process may have enough for all threads.
const OPEN_DIRECTORIES: usize = 16;

/// Size of an extended attribute the kernel allows (`XATTR_SIZE_MAX`), and of a list of names.
const XATTR_LIMIT: usize = 65536;

/// What to read of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// What counts of a context: all belongs to root, files have their inodes without birth, and no extended attributes are read,
    /// which is one system call less for each entry.
    Context,
    /// All that the disk has: owners, all extended attributes that can be read, and the inodes of all entries. Needs `/proc`.
    Full,
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
    /// What to read.
    pub detail: Detail,
    /// Which entries.
    pub filter: &'a F,
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
    /// To be returned as soon as something in it is.
    provisional: Option<Scanned>,
}

/// Everything in `root`, root included (its path is empty). Files have no digest. Origins are below `root` and have inodes, as
/// [`Detail`] says. Sockets are left out, and so is what disappears while the scan runs.
///
/// Uses the threads of the global pool: what calls it there must hold no lock that other work of the pool may want.
pub fn scan<F: Filter>(root: impl Into<Arc<Path>>, options: &ScanOptions<'_, F>) -> Result<Tree, ScanError> {
    let walk = Walk { root: root.into(), options, open: open_directories() };
    // The root itself may be named through symlinks: it is the caller's choice.
    let fd = openat(CWD, &*walk.root, LIST_DIRECTORY - OFlags::NOFOLLOW, Mode::empty());
    let fd = fd.map_err(walk.failed("open", b""))?;
    let stat = stat_fd(&fd).map_err(walk.failed("stat", b""))?;
    let mut top = walk.scanned(Vec::new(), &stat, Kind::Dir { opaque: false });
    if options.detail == Detail::Full {
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
    let mut found = Found::default();
    walk.shared(directory, SHARED_LEVELS, &mut found)?;
    Ok(found.finish())
}

/// An entry, and what its inode tells.
#[derive(Debug)]
struct Scanned {
    entry: Entry,
    inode: Inode,
    /// Number of names.
    nlink: u32,
}

/// What has been found, in tree order.
#[derive(Default)]
struct Found {
    nodes: TreeBuilder,
    /// Files with several names: their numbers, devices and inodes.
    linked: Vec<(usize, u64, u64)>,
}

impl Found {
    fn append(&mut self, other: Found) {
        let before = self.nodes.len();
        self.linked.extend(other.linked.into_iter().map(|(number, dev, ino)| (before + number, dev, ino)));
        self.nodes.append(other.nodes);
    }

    fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The tree. Entries that are names of one inode are grouped, counted from 1 in path order; a lone name has none.
    fn finish(self) -> Tree {
        let tree = self.nodes.finish();
        let mut names: HashMap<(u64, u64), Vec<usize>> = HashMap::new();
        for (number, dev, ino) in self.linked {
            names.entry((dev, ino)).or_default().push(number);
        }
        let mut groups: Vec<Vec<usize>> = names.into_values().filter(|names| names.len() > 1).collect();
        if groups.is_empty() {
            return tree;
        }
        groups.sort_unstable();
        let of_names =
            groups.into_iter().zip(1..).flat_map(|(names, group)| names.into_iter().map(move |name| (name, group)));
        let of_names: HashMap<usize, u32> = of_names.collect();
        let mut number = 0;
        tree.map(|node| {
            if let (Some(group), Kind::File { link_group, .. }) = (of_names.get(&number), &mut node.entry.kind) {
                *link_group = *group;
            }
            number += 1;
            true
        })
    }
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
    root: Arc<Path>,
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
        if path.is_empty() { self.root.to_path_buf() } else { self.root.join(std::ffi::OsStr::from_bytes(path)) }
    }

    fn failed<'p>(&'p self, call: &'static str, path: &'p [u8]) -> impl FnOnce(Errno) -> ScanError + 'p {
        move |error| ScanError::Call { call, path: self.at(path), source: error.into() }
    }

    fn keep(&self, Scanned { entry, inode, nlink }: Scanned, found: &mut Found) {
        let is_file = entry.is_file();
        if is_file && nlink > 1 {
            found.linked.push((found.nodes.len(), inode.dev, inode.ino));
        }
        let origin = match is_file || self.options.detail == Detail::Full {
            true => {
                let (directory, path) = (self.root.clone(), entry.path.clone());
                Origin::File(OnDisk { directory, path, inode: Some(inode) })
            }
            false => Origin::None,
        };
        found.nodes.push(&entry, &origin);
    }

    /// A directory and all in it, the first levels read by several threads.
    fn shared(&self, directory: Directory<F::State>, levels: usize, found: &mut Found) -> Result<(), ScanError> {
        if levels == 0 {
            return self.below(directory, found);
        }
        let Directory { found: own, fd, path, mut pending, state, provisional, .. } = directory;
        pending.reverse();
        let read = |names: &[(CString, FileType)], found: &mut Found| -> Result<(), ScanError> {
            for (name, file_type) in names {
                match self.visit(fd.as_fd(), &path, name, *file_type, &state)? {
                    Visited::Nothing => {}
                    Visited::Leaf(leaf) => self.keep(leaf, found),
                    Visited::Directory(directory) => self.shared(*directory, levels - 1, found)?,
                }
            }
            Ok(())
        };
        let read_all = |found: &mut Found| -> Result<(), ScanError> {
            if pending.len() <= SHARED_NAMES {
                return read(&pending, found);
            }
            let part = |names| {
                let mut part = Found::default();
                read(names, &mut part).map(|()| part)
            };
            let parts: Vec<Found> = pending.par_chunks(SHARED_NAMES).map(part).collect::<Result<_, _>>()?;
            parts.into_iter().for_each(|part| found.append(part));
            Ok(())
        };
        if !provisional {
            self.keep(own, found);
            return read_all(found);
        }
        let mut inside = Found::default();
        read_all(&mut inside)?;
        if !inside.is_empty() {
            self.keep(own, found);
            found.append(inside);
        }
        Ok(())
    }

    /// A directory and all in it, to any depth.
    fn below(&self, directory: Directory<F::State>, found: &mut Found) -> Result<(), ScanError> {
        let frame = |directory: Directory<F::State>, found: &mut Found| {
            let Directory { found: own, fd, identity, path, pending, state, provisional } = directory;
            let provisional = match provisional {
                true => Some(own),
                false => {
                    self.keep(own, found);
                    None
                }
            };
            Frame { fd: Some(fd), identity, path, pending, state, provisional }
        };
        let mut stack = vec![frame(directory, found)];
        while let Some(top) = stack.last_mut() {
            let Some((name, file_type)) = top.pending.pop() else {
                let Some(done) = stack.pop() else { break };
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
            let visited = self.visit(dir.as_fd(), &top.path, &name, file_type, &top.state)?;
            let is_kept = match &visited {
                Visited::Nothing => false,
                Visited::Leaf(_) => true,
                Visited::Directory(directory) => !directory.provisional,
            };
            if is_kept {
                stack.iter_mut().filter_map(|frame| frame.provisional.take()).for_each(|own| self.keep(own, found));
            }
            match visited {
                Visited::Nothing => {}
                Visited::Leaf(leaf) => self.keep(leaf, found),
                Visited::Directory(directory) => {
                    stack.push(frame(*directory, found));
                    if let Some(far) = stack.len().checked_sub(self.open + 1) {
                        stack[far].fd = None;
                    }
                }
            }
        }
        Ok(())
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
            let mut leaf = self.scanned(path, &stat, kind);
            if self.options.detail == Detail::Full {
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
        let mut found = self.scanned(path.clone(), &stat, kind);
        if self.options.detail == Detail::Full {
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

    fn scanned(&self, path: Vec<u8>, stat: &Statx, kind: Kind) -> Scanned {
        let (dev, ino) = identity(stat);
        let is_full = self.options.detail == Detail::Full;
        let (uid, gid) = if is_full { (stat.stx_uid, stat.stx_gid) } else { (0, 0) };
        let born = if is_full { (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec) } else { (0, 0) };
        let mode = u32::from(stat.stx_mode) & 0o7777;
        let mtime = (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec);
        let ctime = (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec);
        let entry = Entry { path, kind, mode, uid, gid, mtime, xattrs: Attributes::default() };
        Scanned { entry, inode: Inode { dev, ino, ctime, born }, nlink: stat.stx_nlink }
    }
}

/// Byte-wise sorted, the last first.
fn list_reversed(dir: BorrowedFd<'_>) -> Result<Vec<(CString, FileType)>, Errno> {
    let mut names = list(dir)?;
    names.sort_unstable_by(|a, b| b.0.cmp(&a.0));
    // What is renamed while a directory is read may be listed in both of its places.
    names.dedup_by(|a, b| a.0 == b.0);
    Ok(names)
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
        let found = scan(root, &ScanOptions { detail: Detail::Full, filter }).unwrap();
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
        let found = scan(dir.path(), &ScanOptions { detail: Detail::Context, filter: &Everything }).unwrap();
        assert_eq!(found.iter().map(|node| node.entry.link_group()).collect::<Vec<_>>(), [0, 1, 1, 0, 0]);
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
        let found = scan(dir.path(), &ScanOptions { detail: Detail::Context, filter: &Everything }).unwrap();
        assert_eq!(found.len(), 1 + 3 * 1500);
        crate::materialize::remove_tree(dir.path()).unwrap();
    }

    #[test]
    fn a_missing_root_is_named() {
        let error =
            scan(Path::new("/no/such"), &ScanOptions { detail: Detail::Context, filter: &Everything }).unwrap_err();
        assert_eq!(error.path(), Path::new("/no/such"));
    }
}
