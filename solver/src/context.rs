//! Build contexts: a directory of the caller seen through its ignore file, and what is remembered of file contents.
//!
//! A context is walked once, when its tree is first asked for, and no file in it is opened until a COPY selects it:
//! [`digest_files`] fills in the digests of exactly those. [`DigestCache`] keeps digests between builds, as git's index
//! does: a file whose path, inode, size and times are those of the record is not read again. A record is only made of a
//! file that was last changed well before it was read, since a change within the same tick of the clock would not show.
//!
//! ```text
//! "nacre digests 2\n"  records, sorted by path  BLAKE3 of all before
//! record: path length u32, path, dev u64, ino u64, size u64, mtime i64 u32, ctime i64 u32, day last used u32,
//!         digest 32 bytes, length of security.capability u32, its value, kind of key in it u8   (little-endian)
//! ```
//!
//! The owner of everything in a context is root. Of extended attributes images keep `security.capability` alone; it is
//! read together with a file's content.

use crate::key_patterns::{self, KeyKind};
use crate::scan::{self, Choice, Filter, ScanError, ScanOptions, Scanned, Xattrs, open_below};
use crate::tree::ignore::{self, IgnoreError, Matcher, Verdict};
use crate::tree::{ContentDigest, Entry, Kind, Node, Origin, Tree};
use rayon::prelude::*;
use rustix::fs::{CWD, FileType, Mode, OFlags, Statx, openat};
use rustix::io::Errno;
use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Where the patterns of a context come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IgnoreFile<'a> {
    /// Nothing is ignored.
    None,
    /// `.dockerignore` in the directory.
    Directory,
    /// `PATH.dockerignore` for the path of this Dockerfile when it exists, even if it is empty; else as `Directory`.
    Dockerfile(&'a Path),
}

/// Why a context cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    /// The directory is missing or no directory.
    #[error("cannot open build context {path:?}", path = .path.display())]
    Open {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The ignore file cannot be read.
    #[error("cannot read {path:?}", path = .path.display())]
    ReadIgnoreFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The ignore file has a pattern that is none.
    #[error("{path:?} is not valid", path = .path.display())]
    BadIgnoreFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: IgnoreError,
    },
    /// The directory cannot be walked.
    #[error("cannot read the build context")]
    Scan(#[from] ScanError),
    /// A file cannot be read.
    #[error("cannot read {path:?}", path = .path.display())]
    ReadFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The record of digests cannot be read or written.
    #[error("cannot use {path:?}", path = .path.display())]
    DigestCache {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A directory of the caller.
#[derive(Debug)]
pub struct Context {
    /// Free of symlinks, so that later opening can refuse all.
    root: PathBuf,
    fd: OwnedFd,
    matcher: Matcher,
    /// The file that the patterns come from.
    ignore_file: Option<PathBuf>,
    walked: OnceLock<Walked>,
}

#[derive(Debug)]
struct Walked {
    tree: Arc<Tree>,
    /// For each node of the tree.
    inodes: Vec<Inode>,
}

/// What a [`Stamp`] has and a node has not.
#[derive(Debug, Clone, Copy)]
struct Inode {
    dev: u64,
    ino: u64,
    ctime: (i64, u32),
}

/// What tells whether a file is the same as before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    dev: u64,
    ino: u64,
    size: u64,
    mtime: (i64, u32),
    ctime: (i64, u32),
}

impl Stamp {
    fn of(stat: &Statx) -> Self {
        let (dev, ino) = scan::identity(stat);
        Self {
            dev,
            ino,
            size: stat.stx_size,
            mtime: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
            ctime: (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
        }
    }

    fn of_walked(entry: &Entry, Inode { dev, ino, ctime }: Inode) -> Self {
        let size = match entry.kind {
            Kind::File { size, .. } => size,
            _ => 0,
        };
        Self { dev, ino, size, mtime: entry.mtime, ctime }
    }
}

/// Leaves out what an ignore file excludes.
struct Ignored<'a>(&'a Matcher);

impl Filter for Ignored<'_> {
    type State = Verdict;

    fn root(&self) -> Verdict {
        self.0.root()
    }

    fn choose(&self, parent: &Verdict, path: &[u8], is_dir: bool) -> (Choice, Verdict) {
        let verdict = self.0.verdict(parent, path);
        let choice = if !verdict.excluded() {
            Choice::Keep
        } else if is_dir && !self.0.can_prune(path) {
            Choice::Look
        } else {
            Choice::Skip
        };
        (choice, verdict)
    }
}

impl Context {
    /// Opens a directory and reads its ignore file; does not walk it yet.
    pub fn open(dir: &Path, ignore: IgnoreFile<'_>) -> Result<Self, ContextError> {
        let failed = |source| ContextError::Open { path: dir.to_owned(), source };
        let root = std::fs::canonicalize(dir).map_err(failed)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = openat(CWD, &root, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
        let general = root.join(".dockerignore");
        let mut files = Vec::new();
        if let IgnoreFile::Dockerfile(path) = ignore {
            let mut own = path.as_os_str().to_owned();
            own.push(".dockerignore");
            files.push(PathBuf::from(own));
        }
        if ignore != IgnoreFile::None {
            files.push(general);
        }
        let mut context = Self { root, fd, matcher: Matcher::default(), ignore_file: None, walked: OnceLock::new() };
        for file in files {
            if let Some(matcher) = read_ignore_file(&file)? {
                (context.matcher, context.ignore_file) = (matcher, Some(file));
                break;
            }
        }
        Ok(context)
    }

    /// The file that says what is left out, if there is one.
    pub fn ignore_file(&self) -> Option<&Path> {
        self.ignore_file.as_deref()
    }

    /// The patterns. Paths are relative to the context.
    pub fn ignore_rules(&self) -> &Matcher {
        &self.matcher
    }

    /// The directory, free of symlinks.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Does the ignore file exclude this path? To explain why a source is missing.
    pub fn is_ignored(&self, path: &[u8]) -> bool {
        let mut verdict = self.matcher.root();
        for end in (0..=path.len()).filter(|&at| at == path.len() || path[at] == b'/') {
            if end > 0 {
                verdict = self.matcher.verdict(&verdict, &path[..end]);
            }
        }
        verdict.excluded()
    }

    /// All that is not ignored, root included: owned by root, without digests, read in place. Walks the directory when
    /// called for the first time.
    pub fn tree(&self) -> Result<&Arc<Tree>, ContextError> {
        Ok(&self.walk()?.tree)
    }

    fn walk(&self) -> Result<&Walked, ContextError> {
        if let Some(walked) = self.walked.get() {
            return Ok(walked);
        }
        let options = ScanOptions { xattrs: Xattrs::None, filter: &Ignored(&self.matcher) };
        let found = scan::scan_in_pieces(&self.root, &options)?;
        let groups = scan::link_groups(found.iter().flatten());
        let mut inodes = Vec::with_capacity(groups.len());
        let mut nodes = Vec::with_capacity(groups.len());
        let node = |item: Scanned, group: u32| {
            let inode = Inode { dev: item.dev, ino: item.ino, ctime: item.ctime };
            let mut entry = item.entry;
            (entry.uid, entry.gid) = (0, 0);
            let origin = match &mut entry.kind {
                Kind::File { link_group, .. } => {
                    *link_group = group;
                    Origin::File(Arc::from(self.root.join(std::ffi::OsStr::from_bytes(&entry.path))))
                }
                _ => Origin::None,
            };
            (Node { entry, origin }, inode)
        };
        let mut groups = groups.into_iter();
        let mut pieces = found.into_iter().map(|piece| {
            let groups: Vec<u32> = groups.by_ref().take(piece.len()).collect();
            piece.into_iter().zip(groups)
        });
        // A pool of threads is woken for many files only, and gets few pieces at a time, so that little is there twice.
        const AT_ONCE: usize = 512;
        let make = |piece: std::iter::Zip<std::vec::IntoIter<Scanned>, std::vec::IntoIter<u32>>| {
            piece.map(|(item, group)| node(item, group)).collect::<Vec<_>>()
        };
        loop {
            let some: Vec<_> = pieces.by_ref().take(AT_ONCE).collect();
            let made: Vec<Vec<(Node, Inode)>> = match some.len() {
                0 => break,
                AT_ONCE => some.into_par_iter().map(make).collect(),
                _ => some.into_iter().map(make).collect(),
            };
            for (node, inode) in made.into_iter().flatten() {
                nodes.push(node);
                inodes.push(inode);
            }
        }
        Ok(self.walked.get_or_init(|| Walked { tree: Arc::new(Tree::from_nodes(nodes)), inodes }))
    }

    /// Does the path, which must be clean, lead to something in the directory?
    pub(crate) fn holds(&self, path: &Path) -> bool {
        self.relative(path).is_some()
    }

    /// Path below the root, if it is one.
    fn relative<'a>(&self, path: &'a Path) -> Option<&'a [u8]> {
        // Both are clean, so that bytes can be compared, which is much faster than components.
        let rest = path.as_os_str().as_bytes().strip_prefix(self.root.as_os_str().as_bytes())?;
        match rest.strip_prefix(b"/") {
            Some(rest) => Some(rest),
            None => (rest.is_empty() || self.root.as_os_str() == "/").then_some(rest),
        }
    }

    /// Opens a file that the walk saw, to be read once and whole. `keys` takes what it holds of that kind.
    pub(crate) fn open_unread(&self, path: &Arc<Path>, keys: &FoundKeys) -> io::Result<UnreadFile> {
        let relative = self.relative(path).ok_or(io::ErrorKind::NotFound)?;
        let stamp = self.stamp(relative, &mut 0).ok_or(io::ErrorKind::NotFound)?;
        let file = File::from(open_below(self.fd.as_fd(), relative, READ_FILE)?);
        Ok(UnreadFile { file, path: path.clone(), stamp, left: stamp.size, keys: Arc::clone(keys) })
    }

    /// The stamp that the walk saw. `near` is where the one before was found.
    fn stamp(&self, relative: &[u8], near: &mut usize) -> Option<Stamp> {
        let walked = self.walked.get()?;
        let nodes = walked.tree.nodes();
        let compare = |at: usize| crate::tree::compare_paths(&nodes[at].entry.path, relative);
        *near = find_near(nodes.len(), *near, compare)?;
        Some(Stamp::of_walked(&nodes[*near].entry, *walked.inodes.get(*near)?))
    }
}

/// Position of what `compare` finds equal in a sorted table, looked for a little behind `near` first: whoever looks up
/// one after the other in about the table's order finds each at once.
fn find_near(length: usize, near: usize, compare: impl Fn(usize) -> Ordering) -> Option<usize> {
    const CLOSE: usize = 4;
    if let Some(at) = (near..length.min(near + CLOSE)).find(|&at| compare(at).is_eq()) {
        return Some(at);
    }
    let (mut low, mut high) = (0, length);
    while low < high {
        let middle = low + (high - low) / 2;
        match compare(middle) {
            Ordering::Equal => return Some(middle),
            Ordering::Less => low = middle + 1,
            Ordering::Greater => high = middle,
        }
    }
    None
}

/// `None` when there is no such file.
/// A directory of that name is one of the context like any other.
fn is_no_file(error: io::ErrorKind) -> bool {
    matches!(error, io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory)
}

fn read_ignore_file(path: &Path) -> Result<Option<Matcher>, ContextError> {
    match std::fs::read(path) {
        Ok(bytes) => Matcher::new(ignore::parse(&bytes))
            .map(Some)
            .map_err(|source| ContextError::BadIgnoreFile { path: path.to_owned(), source }),
        Err(error) if is_no_file(error.kind()) => Ok(None),
        Err(source) => Err(ContextError::ReadIgnoreFile { path: path.to_owned(), source }),
    }
}

/// BLAKE3 and length of all that is left to read.
pub(crate) fn digest_of(reader: &mut impl Read) -> io::Result<(ContentDigest, u64)> {
    digest_and_look(reader, |_| {})
}

/// What the kernel keeps a file's capabilities in (capabilities(7)).
const CAPABILITY: &str = "security.capability";

/// As [`digest_of`]; `look` is shown the first bytes, up to 128 KiB of a file.
fn digest_and_look(reader: &mut impl Read, mut look: impl FnMut(&[u8])) -> io::Result<(ContentDigest, u64)> {
    thread_local! {
        /// Kept: most files are much smaller than it takes to clear it.
        static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; 1 << 17]);
    }
    BUFFER.with_borrow_mut(|buffer| {
        let mut hasher = blake3::Hasher::new();
        let mut length = 0;
        loop {
            match reader.read(buffer) {
                Ok(0) => return Ok((*hasher.finalize().as_bytes(), length)),
                Ok(read) => {
                    if length == 0 {
                        look(&buffer[..read]);
                    }
                    hasher.update(&buffer[..read]);
                    length += read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    })
}

/// Flags to read a file that somebody may have replaced by a FIFO or a symlink.
const READ_FILE: OFlags =
    OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC).union(OFlags::NONBLOCK).union(OFlags::NOCTTY);

/// Reads a file: its stamp, digest and capabilities, all of the same moment.
fn read_content(path: &Path, contexts: &[&Context]) -> io::Result<Record> {
    let below = contexts.iter().find_map(|context| Some((context, context.relative(path)?)));
    let fd = match below {
        Some((context, relative)) => open_below(context.fd.as_fd(), relative, READ_FILE),
        None => openat(CWD, path, READ_FILE, Mode::empty()),
    };
    let mut file = File::from(fd?);
    for _ in 0..3 {
        let before = scan::stat_fd(&file)?;
        if FileType::from_raw_mode(before.stx_mode.into()) != FileType::RegularFile {
            return Err(Errno::INVAL.into());
        }
        let mut key = None;
        // Not asked whether there is more: what is appended meanwhile changes the stamp. But files that are made while they
        // are read say that they have nothing.
        let expected = if before.stx_size == 0 { u64::MAX } else { before.stx_size };
        let mut content = Read::take(&mut file, expected);
        let (digest, length) = digest_and_look(&mut content, |start| key = key_patterns::find(start))?;
        let stamp = Stamp::of(&scan::stat_fd(&file)?);
        if Stamp::of(&before) == stamp && length == stamp.size {
            let mut value = [0; 256];
            let length = rustix::fs::fgetxattr(&file, CAPABILITY, &mut value[..]).unwrap_or(0);
            return Ok(Record { stamp, digest, capability: value[..length].into(), day: today(), key });
        }
        io::Seek::rewind(&mut file)?;
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, "the file changes while it is read"))
}

/// Keys in files that were read, by the files' paths.
pub(crate) type FoundKeys = Arc<Mutex<BTreeMap<ByBytes, KeyKind>>>;

/// A file of a context that is read for the first time. With its last byte it is made sure that all of them are of one moment:
/// the file is what it was when the context was walked. Else, or if it has what no walk sees (capabilities), reading fails.
#[derive(Debug)]
pub(crate) struct UnreadFile {
    file: File,
    path: Arc<Path>,
    stamp: Stamp,
    left: u64,
    keys: FoundKeys,
}

impl Read for UnreadFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if length == 0 {
            return Ok(0);
        }
        let read = self.file.read(&mut buffer[..length])?;
        if self.left == self.stamp.size
            && let Some(key) = key_patterns::find(&buffer[..read])
        {
            self.keys.lock().unwrap_or_else(PoisonError::into_inner).insert(ByBytes(self.path.clone()), key);
        }
        self.left -= read as u64;
        if self.left == 0 && !self.is_as_walked()? {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "the file is not what it was"));
        }
        Ok(read)
    }
}

impl UnreadFile {
    fn is_as_walked(&self) -> io::Result<bool> {
        let no_capabilities = match rustix::fs::fgetxattr(&self.file, CAPABILITY, &mut [0_u8; 64][..]) {
            Ok(length) => length == 0,
            Err(error) => error != Errno::RANGE,
        };
        Ok(no_capabilities && Stamp::of(&scan::stat_fd(&self.file)?) == self.stamp)
    }
}

/// Bytes of the files of a context among these whose digests are not known, and of all.
pub(crate) fn unread_bytes(
    nodes: &[Node],
    context: &Context,
    cache: &mut DigestCache,
) -> Result<(u64, u64), ContextError> {
    cache.ready()?;
    let (mut unread, mut all) = (0, 0);
    let mut near = (0, 0);
    for node in nodes {
        let (Origin::File(path), Kind::File { digest: None, size, .. }) = (&node.origin, &node.entry.kind) else {
            continue;
        };
        let Some(relative) = context.relative(path) else { continue };
        all += size;
        let known = !cache.is_empty()
            && context
                .stamp(relative, &mut near.0)
                .is_some_and(|stamp| cache.look_up(path, stamp, &mut near.1).is_some());
        unread += if known { 0 } else { *size };
    }
    Ok((unread, all))
}

/// Fills in digest and size of every file that has no digest and lies on disk. `contexts` are those that the files may
/// come from: such files are opened without following any symlink and are remembered, and their times and capabilities
/// are taken at the same moment. Reads in parallel.
pub fn digest_files(nodes: &mut [Node], contexts: &[&Context], cache: &mut DigestCache) -> Result<(), ContextError> {
    cache.ready()?;
    let near = || (0, 0);
    // A pool of threads is woken for many files only.
    if nodes.len() < 64 {
        let mut near = near();
        for node in nodes {
            if let Some(learned) = digest_node(node, contexts, &*cache, &mut near)? {
                let kept = cache.learn(learned);
                cache.changes.extend(kept);
            }
        }
        return Ok(());
    }
    let known = &*cache;
    let digested = nodes.par_iter_mut().map_init(near, |near, node| digest_node(node, contexts, known, near));
    let learned = digested.filter_map(Result::transpose).collect::<Result<Vec<_>, _>>()?;
    // In the same memory.
    let kept: Vec<_> = learned.into_iter().filter_map(|learned| cache.learn(learned)).collect();
    match cache.changes.is_empty() {
        true => cache.changes = kept,
        false => cache.changes.extend(kept),
    }
    Ok(())
}

/// What is found out about a file, or known already and worth saying.
struct Learned {
    path: Arc<Path>,
    record: Record,
    /// For the next build, too.
    keep: bool,
}

/// Digests one file; what there is to remember or to tell. `near` is where the file before was found: in the walk, in the cache.
fn digest_node(
    node: &mut Node,
    contexts: &[&Context],
    cache: &DigestCache,
    near: &mut (usize, usize),
) -> Result<Option<Learned>, ContextError> {
    let (Origin::File(path), Kind::File { digest: None, .. }) = (&node.origin, &node.entry.kind) else {
        return Ok(None);
    };
    let path = Arc::clone(path);
    let in_context = contexts.iter().any(|context| context.relative(&path).is_some());
    let stamp = contexts.iter().find_map(|context| context.stamp(context.relative(&path)?, &mut near.0));
    if let Some(record) = stamp.and_then(|stamp| cache.look_up(&path, stamp, &mut near.1)) {
        fill_in(node, &record, in_context);
        let today = today();
        // The day is told now and then only: a build that finds everything should have nothing to write.
        let keep = record.day + REMEMBER_DAYS <= today;
        let record = if keep { Record { day: today, ..record } } else { record };
        return Ok((keep || record.key.is_some()).then_some(Learned { path, record, keep }));
    }
    let started = SystemTime::now();
    let record =
        read_content(&path, contexts).map_err(|source| ContextError::ReadFile { path: path.to_path_buf(), source })?;
    fill_in(node, &record, in_context);
    let keep = stamp.is_some() && is_settled(&record.stamp, started);
    Ok((keep || in_context && record.key.is_some()).then_some(Learned { path, record, keep }))
}

fn fill_in(node: &mut Node, record: &Record, in_context: bool) {
    if let Kind::File { size, digest, .. } = &mut node.entry.kind {
        *digest = Some(record.digest);
        *size = record.stamp.size;
    }
    // Downloads and the like only hold the content: their metadata comes from elsewhere.
    if !in_context {
        return;
    }
    node.entry.mtime = record.stamp.mtime;
    if !record.capability.is_empty() {
        node.entry.xattrs.insert(b"security.capability".to_vec(), record.capability.to_vec());
    }
}

/// Was the file last changed so long before it was read that a later change must show in its times? Clocks of file
/// systems tick every few milliseconds, coarse ones every second or two; those are told by times without fraction.
fn is_settled(stamp: &Stamp, read: SystemTime) -> bool {
    let tick = if stamp.ctime.1 == 0 && stamp.mtime.1 == 0 { 2_000_000_000 } else { 20_000_000 };
    let nanoseconds = |(seconds, fraction): (i64, u32)| i128::from(seconds) * 1_000_000_000 + i128::from(fraction);
    let read = read.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_nanos() as i128;
    nanoseconds(stamp.ctime.max(stamp.mtime)) + tick < read
}

/// Days since the epoch.
fn today() -> u32 {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    u32::try_from(seconds / 86400).unwrap_or(u32::MAX)
}

/// What is remembered of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Record {
    stamp: Stamp,
    digest: ContentDigest,
    capability: Box<[u8]>,
    day: u32,
    /// A key that it holds.
    key: Option<KeyKind>,
}

/// Digests of context files by path, kept in one file between builds.
#[derive(Debug)]
pub struct DigestCache {
    path: PathBuf,
    old: Reading,
    /// Learned since then, sorted by [`DigestCache::ready`]. A table, not a map: it can be as long as a context.
    changes: Vec<(ByBytes, Record)>,
    /// Files that were asked for and hold keys.
    keys: BTreeMap<ByBytes, KeyKind>,
}

/// A path in the order of its bytes, which is not that of its components.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ByBytes(Arc<Path>);

impl std::borrow::Borrow<[u8]> for ByBytes {
    fn borrow(&self) -> &[u8] {
        self.0.as_os_str().as_bytes()
    }
}

impl Ord for ByBytes {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.as_os_str().as_bytes().cmp(other.0.as_os_str().as_bytes())
    }
}

impl PartialOrd for ByBytes {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// How far reading has come.
#[derive(Debug)]
enum Reading {
    /// To be read when it is needed.
    Later,
    Begun(std::thread::JoinHandle<io::Result<Old>>),
    Done(Old),
}

/// The file as it was read.
#[derive(Debug, Default)]
struct Old {
    /// Without the checksum.
    bytes: Vec<u8>,
    /// Where each record starts.
    starts: Vec<usize>,
}

impl Old {
    fn read(path: &Path) -> io::Result<Old> {
        let mut bytes = match std::fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Old::default()),
            bytes => bytes?,
        };
        let Some(starts) = record_starts(&bytes) else { return Ok(Old::default()) };
        bytes.truncate(bytes.len() - 32);
        Ok(Old { bytes, starts })
    }
}

const MAGIC: &[u8] = b"nacre digests 2\n";

/// Records that no build has used for so many days are dropped.
const KEEP_DAYS: u32 = 30;
/// The day of a record's last use may be so much older than the truth.
const REMEMBER_DAYS: u32 = 7;

impl DigestCache {
    /// Begins to read the file, for which no time is lost while the context is walked. A missing or damaged one is empty:
    /// digests can always be computed again.
    pub fn open(path: &Path) -> Self {
        let own = path.to_owned();
        let begun = std::thread::Builder::new().name("digests".into()).spawn(move || Old::read(&own));
        let old = begun.map_or(Reading::Later, Reading::Begun);
        Self { path: path.to_owned(), old, changes: Vec::new(), keys: BTreeMap::new() }
    }

    /// Waits until the file has been read.
    fn ready(&mut self) -> Result<(), ContextError> {
        let read = match std::mem::replace(&mut self.old, Reading::Later) {
            Reading::Later => Old::read(&self.path),
            Reading::Begun(thread) => thread.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())),
            Reading::Done(old) => Ok(old),
        };
        let failed = |source| ContextError::DigestCache { path: self.path.clone(), source };
        self.old = Reading::Done(read.map_err(failed)?);
        // Of what was learned twice, the last counts.
        self.changes.sort_by(|a, b| a.0.cmp(&b.0));
        self.changes.dedup_by(|next, kept| {
            let same = next.0 == kept.0;
            if same {
                std::mem::swap(next, kept);
            }
            same
        });
        Ok(())
    }

    /// What was there before, if it has been read.
    fn old(&self) -> &Old {
        static NONE: Old = Old { bytes: Vec::new(), starts: Vec::new() };
        match &self.old {
            Reading::Done(old) => old,
            Reading::Later | Reading::Begun(_) => &NONE,
        }
    }

    /// Writes the file if anything is new, as a whole or not at all. Of two builds that write at once one wins.
    pub fn save(&mut self) -> Result<(), ContextError> {
        if self.changes.is_empty() {
            return Ok(());
        }
        fn bytes(path: &ByBytes) -> &[u8] {
            path.0.as_os_str().as_bytes()
        }
        self.ready()?;
        let mut out = MAGIC.to_vec();
        let oldest = today().saturating_sub(KEEP_DAYS);
        let mut changes = std::mem::take(&mut self.changes).into_iter().peekable();
        let Old { bytes: old, starts } = self.old();
        let old = starts.iter().filter_map(|&start| parse_record(old, start));
        for (path, record, _) in old {
            while let Some((path, record)) = changes.next_if(|change| bytes(&change.0) < path) {
                write_record(&mut out, bytes(&path), &record);
            }
            match changes.next_if(|change| bytes(&change.0) == path) {
                Some((path, record)) => write_record(&mut out, bytes(&path), &record),
                None if record.day >= oldest => write_record(&mut out, path, &record),
                None => {}
            }
        }
        for (path, record) in changes {
            write_record(&mut out, bytes(&path), &record);
        }
        let checksum = blake3::hash(&out);
        let failed = |source| ContextError::DigestCache { path: self.path.clone(), source };
        let dir = self.path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(dir).map_err(failed)?;
        file.write_all(&out).and_then(|()| file.write_all(checksum.as_bytes())).map_err(failed)?;
        file.persist(&self.path).map_err(|error| failed(error.error))?;
        // Hardly ever asked again: the build's steps are done.
        self.old = Reading::Later;
        Ok(())
    }

    /// Notes a key. What is to be added to `changes`.
    fn learn(&mut self, Learned { path, record, keep }: Learned) -> Option<(ByBytes, Record)> {
        if let Some(key) = record.key {
            self.keys.insert(ByBytes(path.clone()), key);
        }
        keep.then_some((ByBytes(path), record))
    }

    /// Nothing is known.
    fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.old().starts.is_empty()
    }

    /// Learns the digests of files of a context that were read as [`UnreadFile`]; that began at `started`.
    pub(crate) fn learn_read<'a>(
        &mut self,
        nodes: impl Iterator<Item = &'a Node>,
        context: &Context,
        keys: &FoundKeys,
        started: SystemTime,
    ) {
        let keys = keys.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut near, day) = (0, today());
        for node in nodes {
            let (Origin::File(path), Kind::File { digest: Some(digest), .. }) = (&node.origin, &node.entry.kind) else {
                continue;
            };
            let stamp = context.relative(path).and_then(|relative| context.stamp(relative, &mut near));
            let Some(stamp) = stamp else { continue };
            let key = keys.get(path.as_os_str().as_bytes()).copied();
            let record = Record { stamp, digest: *digest, capability: Box::default(), day, key };
            let keep = is_settled(&stamp, started);
            let kept = self.learn(Learned { path: path.clone(), record, keep });
            self.changes.extend(kept);
        }
    }

    /// The key in a file whose digest was asked for, if there is one.
    pub fn key_in(&self, path: &Path) -> Option<KeyKind> {
        self.keys.get(path.as_os_str().as_bytes()).copied()
    }

    /// No file whose digest was asked for holds a key.
    pub fn has_no_keys(&self) -> bool {
        self.keys.is_empty()
    }

    fn look_up(&self, path: &Path, stamp: Stamp, near: &mut usize) -> Option<Record> {
        let path = path.as_os_str().as_bytes();
        let changed = self.changes.binary_search_by(|(changed, _)| changed.0.as_os_str().as_bytes().cmp(path));
        if let Ok(found) = changed {
            let record = &self.changes[found].1;
            return (record.stamp == stamp).then(|| record.clone());
        }
        let Old { bytes, starts } = self.old();
        let compare = |at: usize| path_at(bytes, starts[at]).unwrap_or_default().cmp(path);
        *near = find_near(starts.len(), *near, compare)?;
        let (_, record, _) = parse_record(bytes, starts[*near])?;
        (record.stamp == stamp).then_some(record)
    }
}

/// Starts of the records of a whole file, `None` when it is damaged.
fn record_starts(bytes: &[u8]) -> Option<Vec<usize>> {
    let (body, checksum) = bytes.split_last_chunk::<32>()?;
    if blake3::hash(body).as_bytes() != checksum {
        return None;
    }
    starts_within(body)
}

fn starts_within(body: &[u8]) -> Option<Vec<usize>> {
    let mut starts = Vec::new();
    let mut at = if body.starts_with(MAGIC) { MAGIC.len() } else { return None };
    while at < body.len() {
        starts.push(at);
        at = parse_record(body, at)?.2;
    }
    Some(starts)
}

fn write_record(out: &mut Vec<u8>, path: &[u8], record: &Record) {
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes();
    out.extend_from_slice(&length(path));
    out.extend_from_slice(path);
    for number in [record.stamp.dev, record.stamp.ino, record.stamp.size] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    for (seconds, fraction) in [record.stamp.mtime, record.stamp.ctime] {
        out.extend_from_slice(&seconds.to_le_bytes());
        out.extend_from_slice(&fraction.to_le_bytes());
    }
    out.extend_from_slice(&record.day.to_le_bytes());
    out.extend_from_slice(&record.digest);
    out.extend_from_slice(&length(&record.capability));
    out.extend_from_slice(&record.capability);
    out.push(record.key.map_or(0, |key| key as u8));
}

/// Takes bytes off the front.
fn take<'a, const N: usize>(rest: &mut &'a [u8]) -> Option<&'a [u8; N]> {
    let (head, tail) = rest.split_first_chunk::<N>()?;
    *rest = tail;
    Some(head)
}

/// Takes bytes off the front whose number stands before them.
fn take_counted<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = u32::from_le_bytes(*take(rest)?) as usize;
    let (head, tail) = rest.split_at_checked(length)?;
    *rest = tail;
    Some(head)
}

fn path_at(bytes: &[u8], start: usize) -> Option<&[u8]> {
    take_counted(&mut bytes.get(start..)?)
}

/// Path, record and the position behind it.
fn parse_record(bytes: &[u8], start: usize) -> Option<(&[u8], Record, usize)> {
    let mut rest = bytes.get(start..)?;
    let path = take_counted(&mut rest)?;
    let mut number = || take(&mut rest).map(|bytes| u64::from_le_bytes(*bytes));
    let (dev, ino, size) = (number()?, number()?, number()?);
    let mut time = || Some((i64::from_le_bytes(*take(&mut rest)?), u32::from_le_bytes(*take(&mut rest)?)));
    let (mtime, ctime) = (time()?, time()?);
    let day = u32::from_le_bytes(*take(&mut rest)?);
    let digest = *take(&mut rest)?;
    let capability = take_counted(&mut rest)?.into();
    let key = KeyKind::of_number(take::<1>(&mut rest)?[0]);
    let record = Record { stamp: Stamp { dev, ino, size, mtime, ctime }, digest, capability, day, key };
    Some((path, record, bytes.len() - rest.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, name: &str, content: &str) {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    fn paths(context: &Context) -> Vec<String> {
        let name = |node: &Node| String::from_utf8_lossy(&node.entry.path).into_owned();
        context.tree().unwrap().nodes().iter().map(name).collect()
    }

    #[test]
    fn ignore_files_are_chosen_and_applied() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "d/a", "d/b", "e/f/g", "h/i"] {
            write(dir.path(), name, name);
        }
        let dockerfile = dir.path().join("Dockerfile");
        let check = |ignore: IgnoreFile<'_>, expected: &[&str]| {
            let context = Context::open(dir.path(), ignore).unwrap();
            let visible: Vec<_> = paths(&context).into_iter().filter(|path| !path.contains(".dockerignore")).collect();
            assert_eq!(visible, expected, "{ignore:?}");
        };
        let all = ["", "a", "d", "d/a", "d/b", "e", "e/f", "e/f/g", "h", "h/i"];
        check(IgnoreFile::Directory, &all);
        write(dir.path(), ".dockerignore", "d\n!d/b\ne\n!e/x\nh\n");
        check(IgnoreFile::Directory, &["", "a", "d", "d/b"]);
        check(IgnoreFile::Dockerfile(&dockerfile), &["", "a", "d", "d/b"]);
        check(IgnoreFile::None, &all);
        write(dir.path(), "Dockerfile.dockerignore", "");
        check(IgnoreFile::Dockerfile(&dockerfile), &all);
        let context = Context::open(dir.path(), IgnoreFile::Directory).unwrap();
        assert!(context.is_ignored(b"h/i") && context.is_ignored(b"d/a") && !context.is_ignored(b"d/b"));
    }

    #[test]
    fn bad_contexts_are_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            Context::open(&dir.path().join("none"), IgnoreFile::None),
            Err(ContextError::Open { path, .. }) if path.ends_with("none")
        ));
        write(dir.path(), ".dockerignore", "a[\n");
        assert!(matches!(
            Context::open(dir.path(), IgnoreFile::Directory),
            Err(ContextError::BadIgnoreFile { path, .. }) if path.ends_with(".dockerignore")
        ));
    }

    #[test]
    fn links_stay_links_and_owners_do_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "a", "x");
        std::fs::hard_link(dir.path().join("a"), dir.path().join("b")).unwrap();
        let _ = std::os::unix::fs::chown(dir.path().join("a"), Some(5), Some(6));
        let context = Context::open(dir.path(), IgnoreFile::None).unwrap();
        for node in &context.tree().unwrap().nodes()[1..] {
            assert_eq!((node.entry.uid, node.entry.gid), (0, 0));
            assert!(matches!(node.entry.kind, Kind::File { size: 1, digest: None, link_group: 1 }));
        }
    }

    fn load(path: &Path) -> DigestCache {
        let mut cache = DigestCache::open(path);
        cache.ready().unwrap();
        cache
    }

    fn digest_all(dir: &Path, cache: &mut DigestCache) -> Result<Vec<Node>, ContextError> {
        let context = Context::open(dir, IgnoreFile::None)?;
        let mut nodes = context.tree()?.nodes().to_vec();
        digest_files(&mut nodes, &[&context], cache)?;
        Ok(nodes)
    }

    fn digests(nodes: &[Node]) -> Vec<ContentDigest> {
        let digest = |node: &Node| match node.entry.kind {
            Kind::File { digest, .. } => digest,
            _ => None,
        };
        nodes.iter().filter_map(digest).collect()
    }

    #[test]
    fn digests_are_remembered_until_the_file_changes() {
        let dir = tempfile::tempdir().unwrap();
        let store = tempfile::tempdir().unwrap();
        let file = store.path().join("digests");
        // However long the first look takes to come.
        let touch = |to: SystemTime| {
            for name in ["b", "a/c", "a-c"] {
                File::options().write(true).open(dir.path().join(name)).unwrap().set_modified(to).unwrap();
            }
        };
        let hour = Duration::from_secs(3600);
        for name in ["b", "a/c", "a-c"] {
            write(dir.path(), name, name);
        }
        touch(SystemTime::now() + hour);
        let expected: Vec<_> = ["a/c", "a-c", "b"].map(|name| *blake3::hash(name.as_bytes()).as_bytes()).into();
        let mut cache = load(&file);
        assert_eq!(digests(&digest_all(dir.path(), &mut cache).unwrap()), expected);
        assert!(cache.changes.is_empty(), "files of this very moment are not trusted");
        touch(SystemTime::now() - hour);
        std::thread::sleep(Duration::from_millis(40));
        assert_eq!(digests(&digest_all(dir.path(), &mut cache).unwrap()), expected);
        assert_eq!(cache.changes.len(), 3);
        cache.save().unwrap();
        let mut again = load(&file);
        assert_eq!(again.old().starts.len(), 3);
        assert_eq!(digests(&digest_all(dir.path(), &mut again).unwrap()), expected);
        assert!(again.changes.is_empty());
        write(dir.path(), "a-c", "new");
        std::thread::sleep(Duration::from_millis(40));
        let changed = digests(&digest_all(dir.path(), &mut again).unwrap());
        assert_eq!(changed[1], *blake3::hash(b"new").as_bytes());
        assert_eq!(again.changes.len(), 1);
        again.save().unwrap();
        assert_eq!(load(&file).old().starts.len(), 3);
    }

    #[test]
    fn of_files_outside_of_contexts_only_the_content_counts() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "download", "content");
        let mut entry = crate::tree::Entry { mtime: (5, 0), ..crate::tree::Entry::dir("f", 0o600) };
        entry.kind = Kind::File { size: 7, digest: None, link_group: 0 };
        let mut nodes = [Node { entry, origin: Origin::File(Arc::from(dir.path().join("download"))) }];
        let mut cache = load(&dir.path().join("cache"));
        digest_files(&mut nodes, &[], &mut cache).unwrap();
        assert_eq!(digests(&nodes), [*blake3::hash(b"content").as_bytes()]);
        assert_eq!(nodes[0].entry.mtime, (5, 0));
        assert!(cache.changes.is_empty());
    }

    #[test]
    fn damaged_caches_are_empty() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("digests");
        let mut cache = load(&file);
        let stamp = Stamp { dev: 1, ino: 2, size: 3, mtime: (4, 5), ctime: (-6, 7) };
        let record =
            Record { stamp, digest: [9; 32], capability: (*b"cap").into(), day: today(), key: Some(KeyKind::Npm) };
        cache.changes.push((ByBytes(Path::new("/x").into()), record.clone()));
        cache.save().unwrap();
        let bytes = std::fs::read(&file).unwrap();
        assert_eq!(load(&file).look_up(Path::new("/x"), stamp, &mut 0), Some(record));
        for length in 0..bytes.len() {
            std::fs::write(&file, &bytes[..length]).unwrap();
            assert!(load(&file).old().starts.is_empty(), "{length}");
        }
    }

    #[test]
    fn files_are_read_once_as_they_were_walked() {
        let dir = tempfile::tempdir().unwrap();
        let token = "AKIAQ7XH2LTRZ5WDKJ3M";
        for (name, content) in [("ctx/d/same", "same"), ("ctx/edited", "before"), ("ctx/key", token), ("ctx/gone", "x")]
        {
            write(dir.path(), name, content);
        }
        // Clocks of file systems tick slowly.
        let edited = File::options().write(true).open(dir.path().join("ctx/edited")).unwrap();
        edited.set_modified(UNIX_EPOCH).unwrap();
        let context = Context::open(&dir.path().join("ctx"), IgnoreFile::None).unwrap();
        let nodes = context.tree().unwrap().nodes().to_vec();
        let mut cache = load(&dir.path().join("cache"));
        assert_eq!(unread_bytes(&nodes, &context, &mut cache).unwrap(), (31, 31));
        // As long as before.
        write(dir.path(), "ctx/edited", "beyond");
        std::fs::remove_file(dir.path().join("ctx/gone")).unwrap();
        std::os::unix::fs::symlink("key", dir.path().join("ctx/gone")).unwrap();
        let keys = FoundKeys::default();
        let read = |name: &str| {
            let mut content = Vec::new();
            let mut file = context.open_unread(&context.root().join(name).into(), &keys)?;
            file.read_to_end(&mut content).map(|_| content)
        };
        assert_eq!(read("d/same").unwrap(), b"same");
        assert_eq!(read("key").unwrap(), token.as_bytes());
        assert_eq!(read("edited").unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        assert!(read("gone").is_err() && read("never").is_err());
        let mut read = nodes;
        read.retain(|node| [&b"d/same"[..], b"key"].contains(&&*node.entry.path));
        for (node, content) in read.iter_mut().zip([&b"same"[..], token.as_bytes()]) {
            if let Kind::File { digest, .. } = &mut node.entry.kind {
                *digest = Some(*blake3::hash(content).as_bytes());
            }
        }
        cache.learn_read(read.iter(), &context, &keys, SystemTime::now() + Duration::from_secs(5));
        assert_eq!(cache.key_in(&context.root().join("key")), Some(KeyKind::Aws));
        cache.save().unwrap();
        // The next build knows what was read.
        let mut cache = load(&dir.path().join("cache"));
        let context = Context::open(&dir.path().join("ctx"), IgnoreFile::None).unwrap();
        let nodes = context.tree().unwrap().nodes();
        assert_eq!(unread_bytes(nodes, &context, &mut cache).unwrap(), (6, 30));
        // What changed too short a time before it was read is not remembered.
        let mut fresh = load(&dir.path().join("fresh"));
        fresh.learn_read(read.iter(), &context, &keys, UNIX_EPOCH);
        assert!(fresh.is_empty());
    }

    #[test]
    fn swapped_files_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "ctx/d/f", "inside");
        write(dir.path(), "secret/f", "secret");
        let context = Context::open(&dir.path().join("ctx"), IgnoreFile::None).unwrap();
        let mut nodes = context.tree().unwrap().nodes().to_vec();
        std::fs::rename(dir.path().join("ctx/d"), dir.path().join("ctx/e")).unwrap();
        std::os::unix::fs::symlink("../secret", dir.path().join("ctx/d")).unwrap();
        let mut cache = load(&dir.path().join("cache"));
        let error = digest_files(&mut nodes, &[&context], &mut cache).unwrap_err();
        assert!(matches!(error, ContextError::ReadFile { path, .. } if path.ends_with("ctx/d/f")));
    }
}
