//! Build contexts: a directory of the caller seen through its ignore file, and what is remembered of file contents.
//!
//! A context is walked once, when its tree is first asked for, and no file in it is opened until a COPY selects it:
//! [`digest_files`] fills in the digests of exactly those. [`DigestCache`] keeps digests between builds, as git's index
//! does: a file whose path, inode, size and times are those of the record is not read again. A record is only made of a
//! file that was last changed well before it was read, since a change within the same tick of the clock would not show.
//!
//! The owner of everything in a context is root. Of extended attributes images keep `security.capability` alone; it is
//! read together with a file's content.

pub use crate::digest_cache::DigestCache;
use crate::digest_cache::{ByBytes, Near, Record, Run, Stamp, today};
use crate::key_patterns::{self, KeyKind};
use crate::read_ahead;
use crate::scan::{self, Choice, Detail, Filter, ScanError, ScanOptions, open_below};
use crate::sys;
use crate::tree::ignore::{self, IgnoreError, Matcher, Verdict};
use crate::tree::{ContentDigest, Entry, Inode, Kind, Node, OnDisk, Origin, Part, Tree};
use rustix::fs::{CWD, FileType, Mode, OFlags, openat};
use rustix::io::Errno;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::SystemTime;

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
    root: Arc<Path>,
    fd: OwnedFd,
    matcher: Matcher,
    /// The file that the patterns come from.
    ignore_file: Option<PathBuf>,
    walked: OnceLock<Arc<Tree>>,
}

impl Stamp {
    fn of_walked(entry: &Entry, Inode { dev, ino, ctime, .. }: Inode) -> Self {
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
        let root: Arc<Path> = std::fs::canonicalize(dir).map_err(failed)?.into();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = openat(CWD, &*root, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
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
        if let Some(tree) = self.walked.get() {
            return Ok(tree);
        }
        let options = ScanOptions { detail: Detail::Context, filter: &Ignored(&self.matcher) };
        let tree = scan::scan(self.root.clone(), &options)?;
        Ok(self.walked.get_or_init(|| Arc::new(tree)))
    }

    /// Does the file come from a walk of this directory?
    pub(crate) fn holds(&self, file: &OnDisk) -> bool {
        // One that was opened again is the same.
        Arc::ptr_eq(&self.root, &file.directory) || self.root == file.directory
    }

    /// Opens a file that the walk saw.
    pub(crate) fn open_walked(&self, file: &OnDisk) -> io::Result<OwnedFd> {
        Ok(open_below(self.fd.as_fd(), &file.path, READ_FILE)?)
    }

    /// Opens a file that the walk saw, to be read once and whole. `keys` takes what it holds of that kind.
    pub(crate) fn open_unread(&self, entry: &Entry, file: &OnDisk, keys: &FoundKeys) -> io::Result<UnreadFile> {
        let stamp = Stamp::of_walked(entry, file.inode.ok_or(io::ErrorKind::NotFound)?);
        let open = File::from(self.open_walked(file)?);
        Ok(UnreadFile { file: open, path: file.whole(), stamp, left: stamp.size, keys: Arc::clone(keys) })
    }
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
fn read_content(file: &OnDisk, context: &Context) -> io::Result<Record> {
    let fd = open_below(context.fd.as_fd(), &file.path, READ_FILE);
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
    path: PathBuf,
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
            self.keys.lock().unwrap_or_else(PoisonError::into_inner).insert(ByBytes(Arc::from(&*self.path)), key);
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

/// Bytes of the files of a context in a tree whose digests are not known, and of all.
pub(crate) fn unread_bytes(
    tree: &Tree,
    context: &Context,
    cache: &mut DigestCache,
) -> Result<(u64, u64), ContextError> {
    cache.ready()?;
    let (mut unread, mut all) = (0, 0);
    let (mut path, mut near) = (Vec::new(), Near::default());
    let mut cursor = tree.cursor();
    while let Some(Node { entry, origin }) = cursor.next() {
        let (Origin::File(file), Kind::File { digest: None, size, .. }) = (origin, &entry.kind) else { continue };
        if !context.holds(file) {
            continue;
        }
        all += size;
        unread += if is_known(cache, entry, file, &mut path, &mut near) { 0 } else { *size };
    }
    Ok((unread, all))
}

/// Need this file not be read? `path` is memory for paths, `near` where the file before was found.
fn is_known(cache: &DigestCache, entry: &Entry, file: &OnDisk, path: &mut Vec<u8>, near: &mut Near) -> bool {
    let Some(inode) = file.inode.filter(|_| !cache.is_empty()) else { return false };
    file.write_whole(path);
    cache.look_up(path, &Stamp::of_walked(entry, inode), near).is_some()
}

/// Fills in the digest of every file of a context that has none, and size, times and capabilities of the same moment. Files are opened
/// without following any symlink, and are remembered. False if one was not as it was walked. Reads in parallel. After an
/// error the tree is of no use.
pub fn digest_files(tree: &mut Tree, context: &Context, cache: &mut DigestCache) -> Result<bool, ContextError> {
    cache.ready()?;
    if tree.unread() == 0 {
        return Ok(true);
    }
    let known = &*cache;
    // Of the part that was read last, something was not in memory.
    let on_disk = AtomicBool::new(false);
    let begin = |part: &Part<'_>| {
        if on_disk.load(Ordering::Relaxed) && !fetch_unknown(part, context, known, read_ahead::fetch) {
            on_disk.store(false, Ordering::Relaxed);
        }
        Digesting { blocks: sys::blocks_read_by_thread(), ..Digesting::default() }
    };
    let digest = |part: &mut Digesting, entry: &mut Entry, origin: &mut Origin| {
        digest_entry(entry, origin, context, known, part)
    };
    let end = |part: Digesting| {
        if sys::blocks_read_by_thread() > part.blocks {
            on_disk.store(true, Ordering::Relaxed);
        }
        (part.run, part.differs)
    };
    let parts = tree.update(begin, digest, end)?;
    let mut as_walked = true;
    for (run, differs) in parts {
        as_walked &= !differs;
        cache.add(run);
    }
    Ok(as_walked)
}

/// Has the files of a part fetched that have to be read. False if the disk was not needed for it.
fn fetch_unknown(
    part: &Part<'_>,
    context: &Context,
    known: &DigestCache,
    fetch: impl Fn(&OwnedFd, u64) -> u64,
) -> bool {
    /// For all threads. What is fetched more may be gone again before it is read.
    const MOST_BYTES: u64 = 128 << 20;
    let most_bytes = MOST_BYTES / rayon::current_num_threads().max(1) as u64;
    let before = sys::blocks_read_by_thread();
    let (mut path, mut near, mut bytes) = (Vec::new(), Near::default(), 0);
    part.each(|Node { entry, origin }| {
        let (Origin::File(file), Kind::File { digest: None, size, .. }) = (origin, &entry.kind) else {
            return ControlFlow::Continue(());
        };
        if context.holds(file)
            && !is_known(known, entry, file, &mut path, &mut near)
            && let Ok(file) = context.open_walked(file)
        {
            bytes += fetch(&file, *size);
        }
        if bytes < most_bytes { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    });
    sys::blocks_read_by_thread() > before
}

/// A part of a tree whose files get their digests.
#[derive(Default)]
struct Digesting {
    /// What had been read from disks when it was begun.
    blocks: i64,
    /// What there is to remember or to tell.
    run: Run,
    /// Memory for paths.
    path: Vec<u8>,
    /// Where the file before was found.
    near: Near,
    /// A file was not as it was walked.
    differs: bool,
}

/// Digests one file; keeps what there is to remember or to tell.
fn digest_entry(
    entry: &mut Entry,
    origin: &mut Origin,
    context: &Context,
    cache: &DigestCache,
    part: &mut Digesting,
) -> Result<(), ContextError> {
    let (Origin::File(file), Kind::File { digest: None, .. }) = (origin, &entry.kind) else { return Ok(()) };
    if !context.holds(file) {
        return Ok(());
    }
    let stamp = file.inode.map(|inode| Stamp::of_walked(entry, inode));
    file.write_whole(&mut part.path);
    let known = stamp.and_then(|stamp| cache.look_up(&part.path, &stamp, &mut part.near));
    let record = match known {
        Some(mut record) => {
            let today = today();
            let keep = record.is_stale(today);
            if keep {
                record.day = today;
            }
            part.run.learn(&part.path, &record, keep);
            record
        }
        None => {
            let started = SystemTime::now();
            let record =
                read_content(file, context).map_err(|source| ContextError::ReadFile { path: file.whole(), source })?;
            part.run.learn(&part.path, &record, stamp.is_some() && record.stamp.is_settled(started));
            record
        }
    };
    part.differs |= stamp != Some(record.stamp) || !record.capability.is_empty();
    fill_in(entry, record);
    file.inode = None;
    Ok(())
}

fn fill_in(entry: &mut Entry, record: Record) {
    if let Kind::File { size, digest, .. } = &mut entry.kind {
        *digest = Some(record.digest);
        *size = record.stamp.size;
    }
    entry.mtime = record.stamp.mtime;
    if !record.capability.is_empty() {
        entry.xattrs.insert(b"security.capability".to_vec(), record.capability.into_vec());
    }
}

impl DigestCache {
    /// Learns the digests of files of a context, by their numbers in `tree`, ascending, that were read as [`UnreadFile`]; that began
    /// at `started`.
    pub(crate) fn learn_read(
        &mut self,
        tree: &Tree,
        digests: &[(usize, ContentDigest)],
        context: &Context,
        keys: &FoundKeys,
        started: SystemTime,
    ) {
        let keys = keys.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut run, day) = (Run::default(), today());
        let mut path = Vec::new();
        let mut cursor = tree.cursor();
        let mut digests = digests.iter().peekable();
        while digests.peek().is_some() && cursor.next().is_some() {
            let Some((_, digest)) = digests.next_if(|(number, _)| *number == cursor.number()) else { continue };
            let Node { entry, origin: Origin::File(file @ OnDisk { inode: Some(inode), .. }) } = cursor.node() else {
                continue;
            };
            if !context.holds(file) {
                continue;
            }
            let stamp = Stamp::of_walked(entry, *inode);
            file.write_whole(&mut path);
            let key = keys.get(path.as_slice()).copied();
            let record = Record { stamp, digest: *digest, capability: Box::default(), day, key };
            run.learn(&path, &record, stamp.is_settled(started));
        }
        self.add(run);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

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
        let mut tree = Tree::clone(context.tree()?);
        digest_files(&mut tree, &context, cache)?;
        Ok(tree.nodes())
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
        assert_eq!(cache.lengths(), (0, 0), "files of this very moment are not trusted");
        touch(SystemTime::now() - hour);
        std::thread::sleep(Duration::from_millis(40));
        assert_eq!(digests(&digest_all(dir.path(), &mut cache).unwrap()), expected);
        assert_eq!(cache.lengths(), (3, 0));
        cache.save().unwrap();
        let mut again = load(&file);
        assert_eq!(again.lengths(), (0, 3));
        assert_eq!(digests(&digest_all(dir.path(), &mut again).unwrap()), expected);
        assert_eq!(again.lengths(), (0, 3));
        write(dir.path(), "a-c", "new");
        std::thread::sleep(Duration::from_millis(40));
        let changed = digests(&digest_all(dir.path(), &mut again).unwrap());
        assert_eq!(changed[1], *blake3::hash(b"new").as_bytes());
        assert_eq!(again.lengths(), (1, 3));
        again.save().unwrap();
        assert_eq!(load(&file).lengths(), (0, 3));
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
        let tree = Tree::clone(context.tree().unwrap());
        let mut cache = load(&dir.path().join("cache"));
        assert_eq!(unread_bytes(&tree, &context, &mut cache).unwrap(), (31, 31));
        // As long as before.
        write(dir.path(), "ctx/edited", "beyond");
        std::fs::remove_file(dir.path().join("ctx/gone")).unwrap();
        std::os::unix::fs::symlink("key", dir.path().join("ctx/gone")).unwrap();
        let keys = FoundKeys::default();
        let read = |name: &str| {
            let mut content = Vec::new();
            let node = tree.get(name.as_bytes()).unwrap();
            let Origin::File(file) = &node.origin else { panic!("{name} is a file") };
            let mut file = context.open_unread(&node.entry, file, &keys)?;
            file.read_to_end(&mut content).map(|_| content)
        };
        assert_eq!(read("d/same").unwrap(), b"same");
        assert_eq!(read("key").unwrap(), token.as_bytes());
        assert_eq!(read("edited").unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        assert!(read("gone").is_err());
        let number = |path: &[u8]| tree.nodes().iter().position(|node| node.entry.path == path).unwrap();
        let found = [(&b"d/same"[..], "same"), (b"key", token)];
        let found = found.map(|(path, content)| (number(path), *blake3::hash(content.as_bytes()).as_bytes()));
        cache.learn_read(&tree, &found, &context, &keys, SystemTime::now() + Duration::from_secs(5));
        assert_eq!(cache.key_in(&context.root().join("key")), Some(KeyKind::Aws));
        cache.save().unwrap();
        // The next build knows what was read.
        let mut cache = load(&dir.path().join("cache"));
        let context = Context::open(&dir.path().join("ctx"), IgnoreFile::None).unwrap();
        assert_eq!(unread_bytes(context.tree().unwrap(), &context, &mut cache).unwrap(), (6, 30));
        // What changed too short a time before it was read is not remembered.
        let mut fresh = load(&dir.path().join("fresh"));
        fresh.learn_read(&tree, &found, &context, &keys, UNIX_EPOCH);
        assert!(fresh.is_empty());
    }

    #[test]
    fn what_has_to_be_read_is_fetched() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["ctx/gone", "ctx/known", "ctx/new", "ctx/swapped", "secret"] {
            write(dir.path(), name, name);
        }
        for name in ["gone", "new", "swapped"] {
            std::fs::rename(dir.path().join("ctx").join(name), dir.path().join(name)).unwrap();
        }
        let touched = File::options().write(true).open(dir.path().join("ctx/known")).unwrap();
        touched.set_modified(UNIX_EPOCH).unwrap();
        std::thread::sleep(Duration::from_millis(40));
        let mut cache = load(&dir.path().join("cache"));
        digest_all(&dir.path().join("ctx"), &mut cache).unwrap();
        assert_eq!(cache.lengths(), (1, 0));
        for name in ["gone", "new", "swapped"] {
            std::fs::rename(dir.path().join(name), dir.path().join("ctx").join(name)).unwrap();
        }
        let context = Context::open(&dir.path().join("ctx"), IgnoreFile::None).unwrap();
        let mut tree = Tree::clone(context.tree().unwrap());
        std::fs::remove_file(dir.path().join("ctx/gone")).unwrap();
        std::fs::remove_file(dir.path().join("ctx/swapped")).unwrap();
        std::os::unix::fs::symlink("../secret", dir.path().join("ctx/swapped")).unwrap();
        let fetched = std::sync::Mutex::new(Vec::new());
        let fetch = |file: &OwnedFd, size| {
            let mut content = Vec::new();
            File::from(file.try_clone().unwrap()).read_to_end(&mut content).unwrap();
            fetched.lock().unwrap().push((content, size));
            size
        };
        let begin = |part: &Part<'_>| _ = fetch_unknown(part, &context, &cache, fetch);
        let Ok::<_, std::convert::Infallible>(_) = tree.update(begin, |(), _, _| Ok(()), |()| ());
        assert_eq!(fetched.into_inner().unwrap(), [(b"ctx/new".to_vec(), 7)]);
    }

    #[test]
    fn swapped_files_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "ctx/d/f", "inside");
        write(dir.path(), "secret/f", "secret");
        let context = Context::open(&dir.path().join("ctx"), IgnoreFile::None).unwrap();
        let mut tree = Tree::clone(context.tree().unwrap());
        std::fs::rename(dir.path().join("ctx/d"), dir.path().join("ctx/e")).unwrap();
        std::os::unix::fs::symlink("../secret", dir.path().join("ctx/d")).unwrap();
        let mut cache = load(&dir.path().join("cache"));
        let error = digest_files(&mut tree, &context, &mut cache).unwrap_err();
        assert!(matches!(error, ContextError::ReadFile { path, .. } if path.ends_with("ctx/d/f")));
    }
}
