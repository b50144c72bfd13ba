//! Writes a layer as a directory that overlayfs can stack, and removes such directories.
//!
//! What the image format says and what overlayfs (mounted with `userxattr`) reads:
//!
//! ```text
//! whiteout          character device 0:0; where the kernel refuses one, an empty file with user.overlay.whiteout in a
//!                   directory with user.overlay.opaque=x (Linux 6.7)
//! opaque directory  user.overlay.opaque=y
//! ```
//! Paths and link targets come from strangers. Every path is looked up below the target's descriptor without following
//! symlinks, so nothing outside of the target is ever written. Attributes of overlayfs itself are never taken from a
//! layer: `user.overlay.redirect` would let a layer name other directories.
//!
//! Metadata is set in the order owner, mode, attributes, times: a change of owner clears set-id bits and capabilities.
//! Directories get theirs last and deepest first, since their content changes their times and a mode may shut us out.
//!
//! The index of a layer stays the truth where the disk cannot hold it: owners with [`Ownership::SingleId`], and devices
//! other than whiteouts, which a user namespace may not create (an empty file stands in).

use crate::scan::{self, LIST_DIRECTORY, open_below};
use crate::tree::layer::LayerSink;
use crate::tree::node_map::NodeMap;
use crate::tree::stream::copy_buffered;
use crate::tree::{self, Entry, Kind, Node, Origin, Tree};
use rayon::prelude::*;
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags, chmodat, chownat, linkat,
    makedev, mkdirat, mknodat, openat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;
use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::fs::File;
use std::io::{self, BufRead, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Who owns files on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ownership {
    /// The image's owner: we are root, or root of a user namespace with a range of IDs.
    Native,
    /// Ourselves, always: only one ID is mapped.
    SingleId,
}

/// How to write a tree.
#[derive(Debug, Clone, Copy)]
pub struct WriteOptions {
    /// Who owns the files.
    pub ownership: Ownership,
}

/// Why a tree cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum MaterializeError {
    /// A system call failed.
    #[error("{call} of {path:?} failed", path = .path.display())]
    Call {
        /// Which.
        call: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The content of a file cannot be copied from where it is kept.
    #[error("cannot copy the content of {path}")]
    Content {
        /// Path in the layer.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The content has another length than the layer says.
    #[error("{path} has {found} bytes instead of {expected}")]
    Changed {
        /// Path in the layer.
        path: String,
        /// Bytes of the layer's entry.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// An owner that has no number in this user namespace.
    #[error("{path} belongs to {uid}:{gid}, which is not mapped in this user namespace")]
    Owner {
        /// Path in the layer.
        path: String,
        /// User.
        uid: u32,
        /// Group.
        gid: u32,
    },
    /// A path with empty, `.` or `..` components, or one below something that is no directory.
    #[error("{path} is no possible path")]
    BadPath {
        /// Path in the layer.
        path: String,
    },
}

/// Opens the content of a file.
pub type ReadContent<'a> = dyn Fn(&Node) -> io::Result<Box<dyn Read>> + Sync + 'a;

/// Writes `tree`, a layer, into the directory `target`, which is made when it is missing. Content is copied from where
/// it is when it is a file on disk (shared, if the file system can), and asked of `read` otherwise.
pub fn write_tree(
    tree: &Tree,
    read: &ReadContent<'_>,
    target: &Path,
    options: WriteOptions,
) -> Result<(), MaterializeError> {
    TreeWriter::new(target, options)?.finish(tree, read)
}

/// Writes a layer whose files come in the order of an archive, before the layer's tree is known: [`Self::file`] for
/// each, then [`Self::finish`] with the tree.
pub struct TreeWriter {
    root: OwnedFd,
    target: PathBuf,
    options: WriteOptions,
    /// Files written so far, with the metadata they were given.
    written: NodeMap,
    /// Directory of the last file.
    last_dir: Option<(Vec<u8>, OwnedFd)>,
    /// Sharing blocks has failed once: do not try again.
    cannot_clone: AtomicBool,
}

impl LayerSink for TreeWriter {
    fn file(&mut self, entry: &Entry, data: &mut dyn BufRead) -> io::Result<()> {
        TreeWriter::file(self, entry, data).map_err(io::Error::other)
    }
}

fn text(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

fn name_of(path: &[u8]) -> &[u8] {
    tree::file_name(path)
}

impl TreeWriter {
    /// A writer into `target`, which is made when it is missing.
    pub fn new(target: &Path, options: WriteOptions) -> Result<Self, MaterializeError> {
        let failed =
            |call, source: Errno| MaterializeError::Call { call, path: target.to_owned(), source: source.into() };
        match mkdirat(CWD, target, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(failed("mkdir", error)),
        }
        let root = openat(CWD, target, LIST_DIRECTORY - OFlags::NOFOLLOW, Mode::empty())
            .map_err(|error| failed("open", error))?;
        Ok(Self {
            root,
            target: target.to_owned(),
            options,
            written: NodeMap::default(),
            last_dir: None,
            cannot_clone: AtomicBool::new(false),
        })
    }

    /// Writes one file. Directories above it are made, and whatever stands in its way is removed, as a later entry of
    /// an archive replaces an earlier one.
    pub fn file(&mut self, entry: &Entry, data: &mut dyn BufRead) -> Result<(), MaterializeError> {
        check_path(&entry.path)?;
        if self.last_dir.as_ref().is_none_or(|(path, _)| path != tree::parent(&entry.path)) {
            self.last_dir = None;
            if let Some(replaced) = self.make_way(tree::parent(&entry.path))? {
                self.written.remove(&replaced);
            }
            let fd = open_below(self.root.as_fd(), tree::parent(&entry.path), OFlags::PATH | OFlags::DIRECTORY)
                .map_err(|error| self.failed("open", tree::parent(&entry.path), error))?;
            self.last_dir = Some((tree::parent(&entry.path).to_vec(), fd));
        }
        let Some((_, dir)) = &self.last_dir else { return Ok(()) };
        let mut file = match create_new(dir.as_fd(), name_of(&entry.path)) {
            // An archive may have a name twice.
            Err(Errno::EXIST) => {
                if self.clear(dir.as_fd(), &entry.path)? {
                    self.written.remove(&entry.path);
                    self.written.remove_below(&entry.path);
                }
                self.create(dir.as_fd(), &entry.path)?
            }
            made => made.map_err(|error| self.failed("create", &entry.path, error))?,
        };
        let found = copy_buffered(data, &mut file)
            .map_err(|source| MaterializeError::Content { path: text(&entry.path), source })?;
        self.check_size(entry, found)?;
        self.set_metadata(file.as_fd(), entry)?;
        self.written.put(Node { entry: entry.clone(), origin: Origin::None });
        Ok(())
    }

    /// Completes the directory so that it holds `tree`. Files that were written are kept when `tree` still has them and
    /// removed otherwise; the content of the others is read as in [`write_tree`].
    pub fn finish(mut self, tree: &Tree, read: &ReadContent<'_>) -> Result<(), MaterializeError> {
        self.last_dir = None;
        let written = std::mem::take(&mut self.written).finish();
        self.remove_stale(tree, &written)?;
        let directories = self.make_directories(tree)?;
        self.write_entries(tree, &written, read)?;
        self.set_directory_metadata(&directories)
    }

    /// Removes what was written for paths that are no files after all.
    fn remove_stale(&self, tree: &Tree, written: &Tree) -> Result<(), MaterializeError> {
        let mut both = written.zip(tree);
        while let Some((before, now)) = both.next() {
            let Some(path) =
                before.filter(|_| !now.is_some_and(|now| now.entry.is_file())).map(|node| &node.entry.path)
            else {
                continue;
            };
            if let Ok(dir) = open_below(self.root.as_fd(), tree::parent(path), OFlags::PATH | OFlags::DIRECTORY) {
                self.clear(dir.as_fd(), path)?;
            }
            // Directories made for it alone.
            let mut above = tree::parent(path);
            while !above.is_empty() && !tree.holds(above) {
                let Ok(dir) = self.open_dir(tree::parent(above)) else { break };
                let _ = unlinkat(&dir, name_of(above), AtFlags::REMOVEDIR);
                above = tree::parent(above);
            }
        }
        Ok(())
    }

    /// Makes all directories, those without an entry of their own too, and returns their entries in tree order.
    fn make_directories(&self, tree: &Tree) -> Result<BTreeMap<Vec<u8>, Option<Entry>>, MaterializeError> {
        let mut directories: BTreeMap<Vec<u8>, Option<Entry>> = BTreeMap::new();
        let mut cursor = tree.cursor();
        while let Some(node) = cursor.next() {
            check_path(&node.entry.path)?;
            if node.entry.is_dir() {
                directories.insert(node.entry.path.clone(), Some(node.entry.clone()));
            }
            let mut above = tree::parent(&node.entry.path);
            while !above.is_empty() && !directories.contains_key(above) {
                if tree.get(above).is_some_and(|node| !node.entry.is_dir()) {
                    return Err(MaterializeError::BadPath { path: text(&node.entry.path) });
                }
                directories.insert(above.to_vec(), None);
                above = tree::parent(above);
            }
        }
        for (path, entry) in directories.iter().filter(|(path, _)| !path.is_empty()) {
            self.make_way(path)?;
            if let Some(Entry { kind: Kind::Dir { opaque: true }, .. }) = entry {
                let fd = self.open_dir(path)?;
                rustix::fs::fsetxattr(&fd, "user.overlay.opaque", b"y", XattrFlags::empty())
                    .map_err(|error| self.failed("set user.overlay.opaque", path, error))?;
            }
        }
        Ok(directories)
    }

    /// Writes everything but directories: in parallel, hard links at the end.
    fn write_entries(&self, tree: &Tree, written: &Tree, read: &ReadContent<'_>) -> Result<(), MaterializeError> {
        // As many nodes are given to a thread at a time: each gets several parts, as files differ in size.
        let at_once = (tree.len() / (8 * rayon::current_num_threads())).clamp(16, 256);
        // Which member of a group has its content on disk, or will have it: one that was written if there is one.
        let mut carriers: HashMap<u32, Vec<u8>> = HashMap::new();
        if tree.has_links() {
            for only_written in [true, false] {
                let mut cursor = tree.cursor();
                while let Some(Node { entry, .. }) = cursor.next() {
                    if entry.link_group() != 0 && (!only_written || written.get(&entry.path).is_some()) {
                        carriers.entry(entry.link_group()).or_insert_with(|| entry.path.clone());
                    }
                }
            }
        }
        let is_link = |entry: &Entry| carriers.get(&entry.link_group()).is_some_and(|carrier| *carrier != entry.path);
        let part = |first: usize| -> Result<(), MaterializeError> {
            let mut dir: Option<(Vec<u8>, OwnedFd)> = None;
            let mut cursor = tree.cursor_at(first);
            for _ in 0..at_once {
                let Some(node) = cursor.next() else { break };
                if node.entry.is_dir() || is_link(&node.entry) {
                    continue;
                }
                let above = tree::parent(&node.entry.path);
                let fd = match &mut dir {
                    Some((path, fd)) if path == above => fd,
                    other => &mut other.insert((above.to_vec(), self.open_dir(above)?)).1,
                };
                self.write_node(fd.as_fd(), node, written, read)?;
            }
            Ok(())
        };
        (0..tree.len().div_ceil(at_once)).into_par_iter().try_for_each(|number| part(number * at_once))?;
        if carriers.is_empty() {
            return Ok(());
        }
        let mut cursor = tree.cursor();
        while let Some(Node { entry, .. }) = cursor.next() {
            let Some(carrier) = carriers.get(&entry.link_group()).filter(|carrier| **carrier != entry.path) else {
                continue;
            };
            let dir = self.open_dir(tree::parent(&entry.path))?;
            let carrier_dir = self.open_dir(tree::parent(carrier))?;
            self.clear(dir.as_fd(), &entry.path)?;
            linkat(&carrier_dir, name_of(carrier), &dir, name_of(&entry.path), AtFlags::empty())
                .map_err(|error| self.failed("link", &entry.path, error))?;
        }
        Ok(())
    }

    fn write_node(
        &self,
        dir: BorrowedFd<'_>,
        node: &Node,
        written: &Tree,
        read: &ReadContent<'_>,
    ) -> Result<(), MaterializeError> {
        let entry = &node.entry;
        let name = name_of(&entry.path);
        let failed = |call| move |error: Errno| self.failed(call, &entry.path, error);
        let before = if entry.is_file() { written.get(&entry.path) } else { None };
        if let Some(before) = before {
            let same = |entry: &Entry| (entry.mode, entry.uid, entry.gid, entry.mtime, entry.xattrs.clone());
            if same(&before.entry) != same(entry) {
                let file = openat(dir, name, OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
                    .map_err(failed("open"))?;
                self.set_metadata(file.as_fd(), entry)?;
            }
            return Ok(());
        }
        match &entry.kind {
            Kind::Dir { .. } => return Ok(()),
            Kind::File { .. } => {
                let mut file = self.create(dir, &entry.path)?;
                let found = self
                    .copy_content(node, &mut file, read)
                    .map_err(|source| MaterializeError::Content { path: text(&entry.path), source })?;
                self.check_size(entry, found)?;
                return self.set_metadata(file.as_fd(), entry);
            }
            Kind::Symlink { target } => {
                retry(dir, name, || symlinkat(target.as_slice(), dir, name)).map_err(failed("symlink"))?;
            }
            Kind::Whiteout => return self.write_whiteout(dir, &entry.path),
            Kind::Fifo => {
                retry(dir, name, || mknodat(dir, name, FileType::Fifo, Mode::RUSR, 0)).map_err(failed("mkfifo"))?;
            }
            Kind::Char { major, minor } | Kind::Block { major, minor } => {
                let file_type = match entry.kind {
                    Kind::Char { .. } => FileType::CharacterDevice,
                    _ => FileType::BlockDevice,
                };
                let made = if makedev(*major, *minor) == 0 && file_type == FileType::CharacterDevice {
                    // It would be a whiteout.
                    Err(Errno::PERM)
                } else {
                    retry(dir, name, || mknodat(dir, name, file_type, Mode::RUSR, makedev(*major, *minor)))
                };
                match made {
                    Err(Errno::PERM) => drop(self.create(dir, &entry.path)?),
                    result => result.map_err(failed("mknod"))?,
                }
            }
        }
        self.set_owner(entry, |uid, gid| chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW))?;
        if !matches!(entry.kind, Kind::Symlink { .. }) {
            chmodat(dir, name, Mode::from_raw_mode(entry.mode & 0o7777), AtFlags::empty()).map_err(failed("chmod"))?;
        }
        utimensat(dir, name, &times(entry), AtFlags::SYMLINK_NOFOLLOW).map_err(failed("set times"))
    }

    fn write_whiteout(&self, dir: BorrowedFd<'_>, path: &[u8]) -> Result<(), MaterializeError> {
        let name = name_of(path);
        let made = retry(dir, name, || mknodat(dir, name, FileType::CharacterDevice, Mode::empty(), makedev(0, 0)));
        match made {
            Err(Errno::PERM | Errno::INVAL | Errno::NOTSUP) => {}
            result => return result.map_err(|error| self.failed("mknod", path, error)),
        }
        let failed = |error| self.failed("set user.overlay.whiteout", path, error);
        let file = self.create(dir, path)?;
        rustix::fs::fsetxattr(&file, "user.overlay.whiteout", b"y", XattrFlags::empty()).map_err(failed)?;
        let dir = openat(dir, c".", LIST_DIRECTORY, Mode::empty()).map_err(failed)?;
        match rustix::fs::fsetxattr(&dir, "user.overlay.opaque", b"x", XattrFlags::CREATE) {
            // Opaque already: there is nothing below that the whiteout could hide.
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(failed(error)),
        }
    }

    /// Copies content; the number of bytes.
    fn copy_content(&self, node: &Node, file: &mut File, read: &ReadContent<'_>) -> io::Result<u64> {
        match &node.origin {
            Origin::Inline(bytes) => io::copy(&mut &bytes[..], file),
            Origin::File(source) => {
                // NONBLOCK: somebody may have put a FIFO there.
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
                let mut source = File::from(openat(CWD, source.whole(), flags, Mode::empty())?);
                let metadata = source.metadata()?;
                if !metadata.is_file() {
                    return Err(Errno::INVAL.into());
                }
                if metadata.len() > 0 && !self.cannot_clone.load(Ordering::Relaxed) {
                    match rustix::fs::ioctl_ficlone(&*file, &source) {
                        Ok(()) => return Ok(file.metadata()?.len()),
                        Err(_) => self.cannot_clone.store(true, Ordering::Relaxed),
                    }
                }
                io::copy(&mut source, file)
            }
            Origin::None | Origin::Layer(..) => io::copy(&mut read(node)?, file),
        }
    }

    fn set_directory_metadata(&self, directories: &BTreeMap<Vec<u8>, Option<Entry>>) -> Result<(), MaterializeError> {
        // What is in a directory sorts after it, so that the reverse order has the deepest first.
        for (path, entry) in directories.iter().rev() {
            let fd = self.open_dir(path)?;
            match entry {
                Some(entry) => self.set_metadata(fd.as_fd(), entry)?,
                None => rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o755))
                    .map_err(|error| self.failed("chmod", path, error))?,
            }
        }
        Ok(())
    }

    /// Metadata of an open file or directory.
    fn set_metadata(&self, fd: BorrowedFd<'_>, entry: &Entry) -> Result<(), MaterializeError> {
        let failed = |call| move |error: Errno| self.failed(call, &entry.path, error);
        self.set_owner(entry, |uid, gid| rustix::fs::fchown(fd, Some(uid), Some(gid)))?;
        rustix::fs::fchmod(fd, Mode::from_raw_mode(entry.mode & 0o7777)).map_err(failed("chmod"))?;
        self.set_xattrs(fd, entry)?;
        rustix::fs::futimens(fd, &times(entry)).map_err(failed("set times"))
    }

    fn set_xattrs(&self, fd: BorrowedFd<'_>, entry: &Entry) -> Result<(), MaterializeError> {
        for (name, value) in &entry.xattrs {
            if name.starts_with(b"user.overlay.") || name.starts_with(b"trusted.overlay.") {
                continue;
            }
            match rustix::fs::fsetxattr(fd, name.as_slice(), value, XattrFlags::empty()) {
                // The file system, our lack of privilege, or an access list that names ids which do not exist here; the
                // index has it.
                Ok(()) | Err(Errno::NOTSUP | Errno::PERM | Errno::INVAL) => {}
                Err(error) => return Err(self.failed("set attribute", &entry.path, error)),
            }
        }
        Ok(())
    }

    /// Sets the owner by `chown`.
    fn set_owner(
        &self,
        entry: &Entry,
        chown: impl FnOnce(Uid, Gid) -> Result<(), Errno>,
    ) -> Result<(), MaterializeError> {
        if self.options.ownership == Ownership::SingleId {
            return Ok(());
        }
        let unmapped = || MaterializeError::Owner { path: text(&entry.path), uid: entry.uid, gid: entry.gid };
        // All ones means "leave as it is" to the kernel.
        if entry.uid == u32::MAX || entry.gid == u32::MAX {
            return Err(unmapped());
        }
        match chown(Uid::from_raw(entry.uid), Gid::from_raw(entry.gid)) {
            Err(Errno::INVAL) => Err(unmapped()),
            result => result.map_err(|error| self.failed("chown", &entry.path, error)),
        }
    }

    /// Makes `path` and what is above it directories; what stood there instead, at most one path, is removed and
    /// returned.
    fn make_way(&self, path: &[u8]) -> Result<Option<Vec<u8>>, MaterializeError> {
        if path.is_empty() || open_below(self.root.as_fd(), path, OFlags::PATH | OFlags::DIRECTORY).is_ok() {
            return Ok(None);
        }
        let mut replaced = None;
        for end in (0..=path.len()).filter(|&at| at == path.len() || path[at] == b'/') {
            let path = &path[..end];
            let dir = self.open_dir(tree::parent(path))?;
            let name = name_of(path);
            let mut made = mkdirat(&dir, name, Mode::RWXU);
            if made == Err(Errno::EXIST) && openat(&dir, name, LIST_DIRECTORY, Mode::empty()).is_err() {
                self.clear(dir.as_fd(), path)?;
                replaced = Some(path.to_vec());
                made = mkdirat(&dir, name, Mode::RWXU);
            }
            match made {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(self.failed("mkdir", path, error)),
            }
        }
        Ok(replaced)
    }

    fn open_dir(&self, path: &[u8]) -> Result<OwnedFd, MaterializeError> {
        open_below(self.root.as_fd(), path, LIST_DIRECTORY).map_err(|error| self.failed("open", path, error))
    }

    /// Removes what stands at a path whose directory is open. Was it a directory?
    fn clear(&self, dir: BorrowedFd<'_>, path: &[u8]) -> Result<bool, MaterializeError> {
        clear_name(dir, name_of(path)).map_err(|error| self.failed("remove", path, error))
    }

    fn create(&self, dir: BorrowedFd<'_>, path: &[u8]) -> Result<File, MaterializeError> {
        let name = name_of(path);
        retry(dir, name, || create_new(dir, name)).map_err(|error| self.failed("create", path, error))
    }

    fn check_size(&self, entry: &Entry, found: u64) -> Result<(), MaterializeError> {
        match entry.kind {
            Kind::File { size, .. } if size != found => {
                Err(MaterializeError::Changed { path: text(&entry.path), expected: size, found })
            }
            _ => Ok(()),
        }
    }

    fn path(&self, path: &[u8]) -> PathBuf {
        self.target.join(std::ffi::OsStr::from_bytes(path))
    }

    fn failed(&self, call: &'static str, path: &[u8], error: Errno) -> MaterializeError {
        MaterializeError::Call { call, path: self.path(path), source: error.into() }
    }
}

fn create_new(dir: BorrowedFd<'_>, name: &[u8]) -> Result<File, Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(dir, name, flags, Mode::RUSR | Mode::WUSR).map(File::from)
}

/// Runs `make`, and once more after removing `name` when that was in the way.
fn retry<T>(dir: BorrowedFd<'_>, name: &[u8], make: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
    match make() {
        Err(Errno::EXIST) => {
            clear_name(dir, name)?;
            make()
        }
        result => result,
    }
}

fn clear_name(dir: BorrowedFd<'_>, name: &[u8]) -> Result<bool, Errno> {
    match unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(false),
        Err(Errno::ISDIR | Errno::PERM) => {
            let inner = open_to_empty(dir, name)?;
            empty_directory(&inner)?;
            unlinkat(dir, name, AtFlags::REMOVEDIR)?;
            Ok(true)
        }
        Err(error) => Err(error),
    }
}

/// Paths are relative and have plain components only.
fn check_path(path: &[u8]) -> Result<(), MaterializeError> {
    let bad = |part: &[u8]| part.is_empty() || part == b"." || part == b"..";
    if !path.is_empty() && path.split(|&byte| byte == b'/').any(bad) {
        return Err(MaterializeError::BadPath { path: text(path) });
    }
    Ok(())
}

fn times(entry: &Entry) -> Timestamps {
    let time = Timespec { tv_sec: entry.mtime.0, tv_nsec: i64::from(entry.mtime.1) };
    Timestamps { last_access: time, last_modification: time }
}

/// Removes a directory and all that is in it, directories without permissions for their owner too. No symlink is
/// followed; `path` may be a file, or missing.
pub fn remove_tree(path: &Path) -> Result<(), MaterializeError> {
    let failed = |call, source: Errno| MaterializeError::Call { call, path: path.to_owned(), source: source.into() };
    match unlinkat(CWD, path, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(failed("remove", error)),
    }
    let dir = open_to_empty(CWD, path.as_os_str().as_bytes()).map_err(|error| failed("open", error))?;
    empty_directory(&dir).map_err(|error| failed("empty", error))?;
    drop(dir);
    unlinkat(CWD, path, AtFlags::REMOVEDIR).map_err(|error| failed("remove", error))
}

/// Opens a directory to remove what is in it, giving ourselves the permission if need be.
fn open_to_empty(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let fd = match openat(dir, name, LIST_DIRECTORY, Mode::empty()) {
        Err(Errno::ACCESS) => {
            // It can become a symlink between here and there; then the mode of its target changes at worst, if we own
            // it, and the second try fails.
            chmodat(dir, name, Mode::RWXU, AtFlags::empty())?;
            openat(dir, name, LIST_DIRECTORY, Mode::empty())?
        }
        result => result?,
    };
    let mode = scan::stat_fd(&fd)?.stx_mode;
    if mode & 0o700 != 0o700 {
        rustix::fs::fchmod(&fd, Mode::RWXU)?;
    }
    Ok(fd)
}

/// Empties a directory. Deep ones are moved up to `top` piece by piece, so that neither stack nor descriptors run out.
fn empty_directory(top: &OwnedFd) -> Result<(), Errno> {
    let mut moved = 0_u64;
    let mut queue: Vec<CString> = Vec::new();
    empty_below(top.as_fd(), top.as_fd(), 0, &mut moved, &mut queue)?;
    while let Some(name) = queue.pop() {
        let dir = open_to_empty(top.as_fd(), name.as_bytes())?;
        empty_below(top.as_fd(), dir.as_fd(), 0, &mut moved, &mut queue)?;
        unlinkat(top, name, AtFlags::REMOVEDIR)?;
    }
    Ok(())
}

fn empty_below(
    top: BorrowedFd<'_>,
    dir: BorrowedFd<'_>,
    depth: usize,
    moved: &mut u64,
    queue: &mut Vec<CString>,
) -> Result<(), Errno> {
    const DEPTH: usize = 50;
    for (name, file_type) in scan::list(dir)? {
        if file_type != FileType::Directory {
            match unlinkat(dir, &name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => continue,
                Err(Errno::ISDIR | Errno::PERM) if file_type == FileType::Unknown => {}
                Err(error) => return Err(error),
            }
        }
        match unlinkat(dir, &name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => continue,
            _ => {}
        }
        let inner = match open_to_empty(dir, name.to_bytes()) {
            Err(Errno::NOENT) => continue,
            result => result?,
        };
        if depth < DEPTH {
            empty_below(top, inner.as_fd(), depth + 1, moved, queue)?;
            drop(inner);
            unlinkat(dir, &name, AtFlags::REMOVEDIR)?;
            continue;
        }
        loop {
            *moved += 1;
            let Ok(new) = CString::new(format!(".nacre-remove-{moved}")) else { return Err(Errno::INVAL) };
            match rustix::fs::renameat_with(dir, &name, top, &new, rustix::fs::RenameFlags::NOREPLACE) {
                Ok(()) => {
                    queue.push(new);
                    break;
                }
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scan::{Detail, Everything, ScanOptions};

    fn entry(path: &str, kind: Kind, mode: u32) -> Entry {
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        Entry { kind, uid, gid, mtime: (7, 9), ..Entry::dir(path, mode) }
    }

    fn file(path: &str, content: &str, link_group: u32) -> Node {
        let kind = Kind::File { size: content.len() as u64, digest: None, link_group };
        Node { entry: entry(path, kind, 0o640), origin: Origin::Inline(content.as_bytes().into()) }
    }

    fn other(path: &str, kind: Kind, mode: u32) -> Node {
        Node { entry: entry(path, kind, mode), origin: Origin::None }
    }

    fn no_content(_: &Node) -> io::Result<Box<dyn Read>> {
        Err(io::ErrorKind::NotFound.into())
    }

    const DIR: Kind = Kind::Dir { opaque: false };
    const OPTIONS: WriteOptions = WriteOptions { ownership: Ownership::Native };

    fn links_to(target: &str) -> Kind {
        Kind::Symlink { target: target.into() }
    }

    fn content(root: &Path) -> Vec<(String, Entry)> {
        let options = ScanOptions { detail: Detail::Full, filter: &Everything };
        let found = scan::scan(root, &options).unwrap();
        let describe = |node: Node| (text(&node.entry.path), node.entry);
        found.iter().skip(1).map(describe).collect()
    }

    #[test]
    fn a_tree_becomes_what_overlayfs_stacks() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("tree");
        let nodes = vec![
            other("", DIR, 0o711),
            other("d", Kind::Dir { opaque: true }, 0o500),
            file("d/f", "content", 1),
            file("d/g", "", 0),
            other("d/sub", DIR, 0o500),
            file("implied/x/y", "content", 1),
            other("gone", Kind::Whiteout, 0),
            other("link", links_to("/nowhere"), 0o777),
            other("pipe", Kind::Fifo, 0o604),
        ];
        let tree = Tree::from_nodes(nodes);
        write_tree(&tree, &no_content, &target, OPTIONS).unwrap();
        let written = content(&target);
        let names: Vec<_> = written.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["d", "d/f", "d/g", "d/sub", "gone", "implied", "implied/x", "implied/x/y", "link", "pipe"]);
        for (name, found) in &written {
            let Some(node) = tree.get(name.as_bytes()) else {
                assert_eq!(found.mode, 0o755, "{name}");
                continue;
            };
            if node.entry.kind == Kind::Whiteout {
                assert_eq!(found.kind, Kind::Char { major: 0, minor: 0 });
                continue;
            }
            assert_eq!((found.mode, found.mtime), (node.entry.mode, node.entry.mtime), "{name}");
        }
        assert_eq!(written[0].1.xattrs.get(&b"user.overlay.opaque"[..]).map(Vec::as_slice), Some(&b"y"[..]));
        assert_eq!(std::fs::metadata(&target).unwrap().permissions().mode() & 0o7777, 0o711);
        let inode = |name: &str| std::fs::metadata(target.join(name)).unwrap().ino();
        assert_eq!(inode("d/f"), inode("implied/x/y"));
        assert_eq!(std::fs::read(target.join("d/f")).unwrap(), b"content");
        remove_tree(&target).unwrap();
        assert!(!target.exists());
    }

    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn content_comes_from_files_and_readers() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        std::fs::write(&source, vec![b'x'; 100_000]).unwrap();
        let size = 100_000;
        let big = |path: &str, origin| Node {
            entry: entry(path, Kind::File { size, digest: None, link_group: 0 }, 0o644),
            origin,
        };
        let target = dir.path().join("tree");
        let tree = Tree::from_nodes(vec![
            big("a", Origin::File(tree::OnDisk::at(&source))),
            big("b", Origin::Layer(tree::LayerId("l".into()), b"b".to_vec())),
        ]);
        let read = |node: &Node| -> io::Result<Box<dyn Read>> {
            assert_eq!(node.entry.path, b"b");
            Ok(Box::new(File::open(&source)?))
        };
        write_tree(&tree, &read, &target, OPTIONS).unwrap();
        for name in ["a", "b"] {
            assert_eq!(std::fs::read(target.join(name)).unwrap().len(), 100_000);
        }
        std::fs::write(&source, "short").unwrap();
        let error = write_tree(&tree, &read, &dir.path().join("other"), OPTIONS).unwrap_err();
        assert!(matches!(error, MaterializeError::Changed { found: 5, expected: 100_000, .. }));
    }

    #[test]
    fn nothing_is_written_outside() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        let link = || links_to(outside.to_str().unwrap());
        let trees = [
            vec![other("l", link(), 0o777), file("l/x", "1", 0)],
            vec![file("../outside/x", "1", 0)],
            vec![file("a/../../outside/x", "1", 0)],
            vec![file("/x", "1", 0)],
            vec![file("a//x", "1", 0)],
            vec![file(".", "1", 0)],
        ];
        for (number, nodes) in trees.into_iter().enumerate() {
            let target = dir.path().join(number.to_string());
            let error = write_tree(&Tree::from_nodes(nodes), &no_content, &target, OPTIONS).unwrap_err();
            assert!(matches!(error, MaterializeError::BadPath { .. }), "{number} {error}");
        }
        // A symlink that stands in the target already.
        let target = dir.path().join("planted");
        std::fs::create_dir(&target).unwrap();
        std::os::unix::fs::symlink(&outside, target.join("l")).unwrap();
        std::os::unix::fs::symlink(outside.join("new"), target.join("f")).unwrap();
        let tree = Tree::from_nodes(vec![other("l", DIR, 0o755), file("l/x", "1", 0), file("f", "2", 0)]);
        write_tree(&tree, &no_content, &target, OPTIONS).unwrap();
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
        assert_eq!(std::fs::read(target.join("l/x")).unwrap(), b"1");
    }

    #[test]
    fn files_of_a_stream_are_kept_replaced_or_removed() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("tree");
        let mut writer = TreeWriter::new(&target, OPTIONS).unwrap();
        let mut put = |path: &str, content: &str| {
            writer.file(&file(path, content, 0).entry, &mut content.as_bytes()).unwrap();
        };
        put("a", "old");
        put("a", "newer");
        put("b/x", "in b");
        put("c/x", "in c");
        put("was-file", "1");
        put("was-file/now", "2");
        put("linked", "shared");
        put("no/longer/here", "1");
        let tree = Tree::from_nodes(vec![
            file("a", "newer", 0),
            other("b", links_to("c"), 0o777),
            other("c", DIR, 0o750),
            file("linked", "shared", 1),
            file("also", "shared", 1),
            other("was-file", DIR, 0o755),
            file("was-file/now", "2", 0),
            file("missing", "read later", 0),
        ]);
        let mut tree = tree;
        tree.edit(|nodes| {
            nodes.iter_mut().filter(|node| node.entry.path != b"missing").for_each(|node| node.origin = Origin::None);
        });
        writer.finish(&tree, &no_content).unwrap();
        let names: Vec<_> = content(&target).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["a", "also", "b", "c", "linked", "missing", "was-file", "was-file/now"]);
        assert_eq!(std::fs::read(target.join("a")).unwrap(), b"newer");
        assert_eq!(std::fs::read(target.join("also")).unwrap(), b"shared");
        assert_eq!(std::fs::metadata(target.join("also")).unwrap().nlink(), 2);
    }

    #[test]
    fn removal_does_not_follow_links() {
        let dir = tempfile::tempdir().unwrap();
        let kept = dir.path().join("kept");
        std::fs::create_dir(&kept).unwrap();
        std::fs::write(kept.join("f"), "1").unwrap();
        let target = dir.path().join("tree");
        std::fs::create_dir_all(target.join("a/b")).unwrap();
        std::os::unix::fs::symlink(&kept, target.join("a/l")).unwrap();
        std::fs::write(target.join("a/b/f"), "1").unwrap();
        std::fs::set_permissions(target.join("a/b"), std::fs::Permissions::from_mode(0o000)).unwrap();
        remove_tree(&target).unwrap();
        remove_tree(&target).unwrap();
        assert!(!target.exists() && kept.join("f").exists());
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&kept, &link).unwrap();
        remove_tree(&link).unwrap();
        assert!(!link.exists() && kept.join("f").exists());
    }
}
