//! Layers as tar streams: deterministic writing, and careful reading of what others wrote.
//!
//! Written (POSIX `ustar`, with PAX records only where the old fields do not suffice):
//!
//! ```text
//! dir/               5  directory, slash at the end; the root itself is left out
//! dir/.wh..wh..opq   0  directly after an opaque directory
//! dir/.wh.gone       0  whiteout: empty, mode 0 (image-spec layer.md, Whiteouts)
//! dir/a              0  regular file; of hard links the first in path order
//! dir/b              1  the other names, pointing to the first
//! PAX: path, linkpath (over 100 bytes or not ASCII), size, uid, gid, mtime (too large or negative), SCHILY.xattr.*
//! two zero blocks at the end
//! ```
//! Times are whole seconds, user and group names empty. The bytes depend on the tree and the options alone.
//!
//! Read: v7, ustar, PAX and GNU, as Go's `archive/tar` takes them, since that is what layers and archives met before.
//! Names are confined: an absolute name is relative, `..` stops at the root, a parent that is a symlink of the same
//! archive is followed inside of it. A later entry replaces an earlier one. All that is kept in memory is counted
//! against [`Limits`]. Parents without an entry of their own stay implied.

use std::collections::{BTreeMap, HashSet};
use std::io::{self, BufRead, Read, Write};
use std::ops::Bound;

use super::index::LinkGroups;
use super::node_map::{NodeMap, merged};
use super::stream::copy_buffered;
use super::tar_stream::{BLOCK, Header, TarStream, padding, read_some, show};
use super::{Attributes, ContentDigest, Entry, Kind, Node, Origin, Tree, file_name, join, parent};

const WHITEOUT_PREFIX: &[u8] = b".wh.";
const OPAQUE_NAME: &[u8] = b".wh..wh..opq";
/// Twice what Linux takes in one call; bounds what a long name can cost.
const MAX_PATH: usize = 8192;
/// Symlinks to follow for one name, as the kernel's limit for a chain that somebody meant.
const MAX_LINKS: usize = 255;
/// Most components that are followed behind symbolic links in an archive, beside some for each entry: chains of long
/// links cost seconds for each block of 512 bytes otherwise.
const LINK_STEPS: u64 = 5_000_000;

/// Why a layer could not be written or read. Paths are shown as text.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The bytes of a file could not be read.
    #[error("cannot read {path}")]
    Content {
        /// Path in the layer.
        path: String,
        /// Cause.
        source: io::Error,
    },
    /// The bytes of a file are not those that were digested.
    #[error("{path} changed while it was being read")]
    Changed {
        /// Path in the layer.
        path: String,
    },
    /// What was remembered of an earlier layer is damaged.
    #[error("a remembered chunk is damaged")]
    Remembered,
    /// The output failed.
    #[error("cannot write the layer")]
    Write {
        /// Cause.
        source: io::Error,
    },
    /// The input failed.
    #[error("cannot read the tar stream")]
    Read {
        /// Cause.
        source: io::Error,
    },
    /// What became of a file's bytes failed.
    #[error("cannot store {path}")]
    Store {
        /// Path in the layer.
        path: String,
        /// Cause.
        source: io::Error,
    },
    /// The input breaks the tar format.
    #[error("malformed tar at byte {offset}: {what}")]
    Malformed {
        /// Where the header begins.
        offset: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// The input is valid but nothing an image can hold.
    #[error("{path}: {what} is not supported")]
    Unsupported {
        /// Path in the layer.
        path: String,
        /// What it is.
        what: &'static str,
    },
    /// A name that is too long, holds a NUL byte, or goes round in symlinks.
    #[error("bad name in tar: {path}")]
    BadName {
        /// The name.
        path: String,
    },
    /// Something lies below an entry that is no directory.
    #[error("{path} is not a directory")]
    NotADirectory {
        /// The entry.
        path: String,
    },
    /// A hard link to nothing, or to a directory.
    #[error("hard link {path} has no file at {target}")]
    LinkTarget {
        /// The link.
        path: String,
        /// Where it points.
        target: String,
    },
    /// More than was allowed.
    #[error("archive exceeds the limit of {limit} {what}")]
    Limit {
        /// What was counted.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// Compression level out of range.
    #[error("{codec} has no compression level {level}")]
    BadLevel {
        /// Codec.
        codec: &'static str,
        /// Level asked for.
        level: u32,
    },
    /// A compressor refused a chunk.
    #[error("compression failed")]
    Compress {
        /// Cause.
        source: io::Error,
    },
}

/// Choices of [`write_tar`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TarOptions {
    /// Modification times later than this (seconds since the epoch) become this.
    pub clamp_mtime: Option<i64>,
}

/// Opens the bytes of a regular file.
pub type Open<'a> = dyn Fn(&Node) -> io::Result<Box<dyn Read + Send>> + Sync + 'a;

/// What ends a tar stream.
pub(super) const END: [u8; 2 * BLOCK] = [0; 2 * BLOCK];

/// The nodes of a tree as entries of a tar stream, any of them at any time.
pub(super) struct TarEntries<'a> {
    tree: &'a Tree,
    options: &'a TarOptions,
    links: LinkGroups,
    /// Of hard links, by number: the name that carries the data. Number 0 is none.
    leaders: Vec<Vec<u8>>,
}

impl<'a> TarEntries<'a> {
    pub(super) fn new(tree: &'a Tree, options: &'a TarOptions) -> Self {
        let links = LinkGroups::of(tree);
        let mut leaders = vec![Vec::new()];
        let mut cursor = tree.cursor();
        while leaders.len() <= links.len()
            && let Some(Node { entry, .. }) = cursor.next()
        {
            // They are numbered in the order of their first names.
            if links.number(entry) as usize == leaders.len() {
                leaders.push(entry.path.clone());
            }
        }
        Self { tree, options, links, leaders }
    }

    pub(super) fn tree(&self) -> &'a Tree {
        self.tree
    }

    /// Appends the header blocks of a node, and gives the size of the content that follows them. Fails for names that no tar
    /// can hold.
    pub(super) fn put_head(&self, entry: &Entry, out: &mut Vec<u8>) -> Result<u64, LayerError> {
        if entry.xattrs.keys().any(|name| name.contains(&b'=') || name.contains(&0)) {
            return Err(LayerError::Unsupported { path: show(&entry.path), what: "an xattr name with `=`" });
        }
        let mut header = Header::of(entry, self.options);
        if entry.path.is_empty() {
            if let Kind::Dir { opaque: true } = entry.kind {
                header.opaque_marker(b"").encode_to(out);
            }
            return Ok(0);
        }
        if let Kind::File { size, .. } = entry.kind {
            match self.leaders.get(self.links.number(entry) as usize) {
                Some(leader) if !leader.is_empty() && *leader != entry.path => {
                    header.typeflag = b'1';
                    header.link.clone_from(leader);
                }
                _ => header.size = size,
            }
        }
        header.encode_to(out);
        if let Kind::Dir { opaque: true } = entry.kind {
            header.opaque_marker(&entry.path).encode_to(out);
        }
        Ok(header.size)
    }
}

/// Writes a tree as a tar stream. Where the tree has digests, as many bytes as it says are taken of what `open` gives, and checked;
/// elsewhere there must be as many.
pub fn write_tar(tree: &Tree, open: &Open<'_>, options: &TarOptions, out: &mut dyn Write) -> Result<(), LayerError> {
    let write_error = |source| LayerError::Write { source };
    let entries = TarEntries::new(tree, options);
    let mut head = Vec::new();
    let mut buffer = vec![0; 1 << 17];
    let mut cursor = tree.cursor();
    while let Some(node) = cursor.next() {
        head.clear();
        let size = entries.put_head(&node.entry, &mut head)?;
        out.write_all(&head).map_err(write_error)?;
        let mut content = Content::open(node, open, size)?;
        let mut left = size;
        while left > 0 {
            let wanted = left.min(buffer.len() as u64) as usize;
            content.read(&mut buffer[..wanted])?;
            out.write_all(&buffer[..wanted]).map_err(write_error)?;
            left -= wanted as u64;
        }
        content.finish()?;
        out.write_all(&[0; BLOCK][..padding(size)]).map_err(write_error)?;
    }
    out.write_all(&END).map_err(write_error)
}

/// The bytes of a file, checked while they are read.
pub(super) struct Content {
    /// `None` for what is empty, which nobody needs to open, and for what is no file.
    reader: Option<Box<dyn Read + Send>>,
    hasher: blake3::Hasher,
    path: Vec<u8>,
    expected: Expected,
}

/// What is to be found.
enum Expected {
    /// As many bytes as are read.
    Length,
    Digest(ContentDigest),
}

impl Content {
    /// Opens a file of which `size` bytes are to be read.
    pub(super) fn open(node: &Node, open: &Open<'_>, size: u64) -> Result<Self, LayerError> {
        let path = &node.entry.path;
        let error = |source| LayerError::Content { path: show(path), source };
        let reader = if size == 0 { None } else { Some(open(node).map_err(error)?) };
        let expected = match node.entry.kind {
            Kind::File { digest: Some(digest), size: whole, .. } if size > 0 || whole == 0 => Expected::Digest(digest),
            _ => Expected::Length,
        };
        // Only of what is read there may be something to say.
        let path = match (&reader, &expected) {
            (None, Expected::Length) => Vec::new(),
            _ => path.clone(),
        };
        Ok(Self { reader, hasher: blake3::Hasher::new(), path, expected })
    }

    fn changed(&self) -> LayerError {
        LayerError::Changed { path: show(&self.path) }
    }

    fn unreadable(&self, source: io::Error) -> LayerError {
        LayerError::Content { path: show(&self.path), source }
    }

    /// Fills the buffer; fewer bytes are an error.
    pub(super) fn read(&mut self, mut buffer: &mut [u8]) -> Result<(), LayerError> {
        while !buffer.is_empty() {
            let Some(reader) = &mut self.reader else { return Err(self.changed()) };
            let length = match read_some(&mut **reader, buffer) {
                Ok(0) => return Err(self.changed()),
                Ok(length) => length,
                Err(source) => return Err(self.unreadable(source)),
            };
            self.hasher.update(&buffer[..length]);
            buffer = &mut buffer[length..];
        }
        Ok(())
    }

    /// The digest must be that of the node; what has been appended since then does not count. Without one nothing may be
    /// left, and the digest of what was read is given.
    pub(super) fn finish(mut self) -> Result<Option<ContentDigest>, LayerError> {
        let found = *self.hasher.finalize().as_bytes();
        match (&self.expected, &mut self.reader) {
            (Expected::Digest(digest), _) if *digest != found => Err(self.changed()),
            (Expected::Digest(_), _) | (Expected::Length, None) => Ok(None),
            (Expected::Length, Some(reader)) => match read_some(&mut **reader, &mut [0]) {
                Ok(0) => Ok(Some(found)),
                Ok(_) => Err(self.changed()),
                Err(source) => Err(self.unreadable(source)),
            },
        }
    }
}

impl Header {
    fn of(entry: &Entry, options: &TarOptions) -> Self {
        let seconds = options.clamp_mtime.map_or(entry.mtime.0, |latest| entry.mtime.0.min(latest));
        let mut header = Header {
            name: entry.path.clone(),
            typeflag: b'0',
            mode: entry.mode & 0o7777,
            uid: entry.uid,
            gid: entry.gid,
            mtime: (seconds, 0),
            xattrs: BTreeMap::clone(&entry.xattrs),
            ..Header::default()
        };
        match &entry.kind {
            Kind::File { .. } => {}
            Kind::Dir { .. } => {
                header.typeflag = b'5';
                header.name.push(b'/');
            }
            Kind::Symlink { target } => {
                header.typeflag = b'2';
                header.link.clone_from(target);
            }
            Kind::Fifo => header.typeflag = b'6',
            Kind::Char { major, minor } => {
                (header.typeflag, header.major, header.minor) = (b'3', *major, *minor);
            }
            Kind::Block { major, minor } => {
                (header.typeflag, header.major, header.minor) = (b'4', *major, *minor);
            }
            Kind::Whiteout => {
                let name = [WHITEOUT_PREFIX, file_name(&entry.path)].concat();
                header = Header {
                    name: join(parent(&entry.path), &name),
                    typeflag: b'0',
                    mtime: header.mtime,
                    ..Header::default()
                };
            }
        }
        header
    }

    /// The entry that makes the directory of this header opaque.
    fn opaque_marker(&self, directory: &[u8]) -> Header {
        Header { name: join(directory, OPAQUE_NAME), typeflag: b'0', mtime: self.mtime, ..Header::default() }
    }
}

/// What an untrusted archive may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Entries.
    pub entries: u64,
    /// Bytes of all regular files together.
    pub file_bytes: u64,
    /// Bytes of names, link targets and xattrs that are kept in memory.
    pub metadata_bytes: u64,
    /// Bytes of one PAX header or long name.
    pub header_bytes: u64,
    /// Uncompressed bytes per compressed one, looked at from 1 GiB on; `None` for no limit.
    pub ratio: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: 5_000_000,
            file_bytes: 1 << 40,
            metadata_bytes: 2 << 30,
            header_bytes: 1 << 20,
            ratio: Some(50_000),
        }
    }
}

/// Is given the bytes of each regular file while a tar is read.
pub trait LayerSink {
    /// One file; its digest is not known yet. What is left unread is skipped. A later file can have the same path, and
    /// a later entry can remove it: the tree that is returned has the last word.
    fn file(&mut self, entry: &Entry, data: &mut dyn BufRead) -> io::Result<()>;
}

/// Keeps no bytes: reading gives the index alone.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoSink;

impl LayerSink for NoSink {
    fn file(&mut self, _entry: &Entry, _data: &mut dyn BufRead) -> io::Result<()> {
        Ok(())
    }
}

/// Reads a layer's tar stream to its end, so that a digest computed on the way covers all of it. Whiteouts become
/// entries; an opaque marker makes a directory entry where there is none. File digests are filled in, origins not.
pub fn read_tar(reader: &mut dyn BufRead, sink: &mut dyn LayerSink, limits: &Limits) -> Result<Tree, LayerError> {
    let mut stream = TarStream::new(reader, *limits);
    let tree = Builder::new(*limits, Whiteouts::Recognised, &|_| Origin::None).read(&mut stream, sink)?;
    stream.drain()?;
    Ok(tree)
}

/// Reads an archive as ADD does: whiteouts are ordinary names, the root has no entry, times are what Linux can hold.
/// `origin` tells where the nth file that the sink was given went, counted from 0.
pub(super) fn read_archive(
    reader: &mut dyn BufRead,
    sink: &mut dyn LayerSink,
    limits: &Limits,
    origin: &dyn Fn(u64) -> Origin,
) -> Result<Tree, LayerError> {
    Builder::new(*limits, Whiteouts::Ordinary, origin).read(&mut TarStream::new(reader, *limits), sink)
}

/// Does a tar with at least one entry begin here?
pub(super) fn begins_tar(reader: &mut dyn BufRead, limits: &Limits) -> bool {
    matches!(TarStream::new(reader, *limits).next(true), Ok(Some(_)))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whiteouts {
    /// `.wh.` names mean what they mean in a layer.
    Recognised,
    /// They are names like others.
    Ordinary,
}

/// What a name stands for; several names may share one.
#[derive(Clone)]
struct Inode {
    kind: Kind,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: (i64, u32),
    xattrs: Attributes,
    origin: Origin,
}

/// Collects entries as they come. Keys are paths with NUL for `/`: no name holds a NUL, and plain byte order of such
/// keys is the order of a [`Tree`].
struct Builder<'a> {
    limits: Limits,
    whiteouts: Whiteouts,
    /// Tells where the nth file that the sink was given went.
    origin: &'a dyn Fn(u64) -> Origin,
    /// Names that have an inode of their own, as nearly all have, by their paths.
    single: NodeMap,
    /// The others, by their keys, and the inodes that they share.
    linked: BTreeMap<Vec<u8>, usize>,
    inodes: Vec<Inode>,
    /// Keys that something may stand below.
    parents: HashSet<Vec<u8>>,
    entries: u64,
    file_bytes: u64,
    metadata_bytes: u64,
    /// Components of paths behind symbolic links that were followed.
    link_steps: u64,
    /// A directory (as the archive names it) that is known to need no resolving.
    plain_parent: Option<Vec<u8>>,
}

impl<'a> Builder<'a> {
    fn new(limits: Limits, whiteouts: Whiteouts, origin: &'a dyn Fn(u64) -> Origin) -> Self {
        Self {
            limits,
            whiteouts,
            origin,
            single: NodeMap::default(),
            linked: BTreeMap::new(),
            inodes: Vec::new(),
            parents: HashSet::new(),
            entries: 0,
            file_bytes: 0,
            metadata_bytes: 0,
            link_steps: 0,
            plain_parent: None,
        }
    }

    fn read(mut self, stream: &mut TarStream<'_>, sink: &mut dyn LayerSink) -> Result<Tree, LayerError> {
        let mut files = 0;
        while let Some(header) = stream.next(false)? {
            let name = key_of(&header.name)?;
            self.count(&header)?;
            if self.whiteouts == Whiteouts::Recognised && self.whiteout(&name, &header)? {
                continue;
            }
            if name.is_empty() && (self.whiteouts == Whiteouts::Ordinary || header.typeflag != b'5') {
                if header.typeflag == b'5' {
                    continue;
                }
                return Err(LayerError::BadName { path: show(&header.name) });
            }
            let key = self.resolve(&name)?;
            let inode = self.inode(&header)?;
            match header.typeflag {
                b'0' => {
                    let entry = inode.entry(&key);
                    let (outcome, digest) = {
                        let mut data = stream.data();
                        let outcome = sink.file(&entry, &mut data);
                        if outcome.is_ok() {
                            // A failure is kept in `failed`.
                            drop(copy_buffered(&mut data, &mut io::sink()));
                        }
                        if let Some(failure) = data.failed {
                            return Err(failure);
                        }
                        (outcome, *data.hasher.finalize().as_bytes())
                    };
                    outcome.map_err(|source| LayerError::Store { path: show(&entry.path), source })?;
                    let kind = Kind::File { size: header.size, digest: Some(digest), link_group: 0 };
                    self.insert(key, Inode { kind, origin: (self.origin)(files), ..inode });
                    files += 1;
                }
                b'1' => self.link(key, &header, inode)?,
                _ => self.insert(key, inode),
            }
        }
        Ok(self.finish())
    }

    fn count(&mut self, header: &Header) -> Result<(), LayerError> {
        let Limits { entries, file_bytes, metadata_bytes, .. } = self.limits;
        self.entries += 1;
        if self.entries > entries {
            return Err(LayerError::Limit { what: "entries", limit: entries });
        }
        if header.typeflag == b'0' {
            self.file_bytes = self.file_bytes.saturating_add(header.size);
        }
        if self.file_bytes > file_bytes {
            return Err(LayerError::Limit { what: "bytes", limit: file_bytes });
        }
        let xattrs: usize = header.xattrs.iter().map(|(name, value)| name.len() + value.len() + 64).sum();
        self.metadata_bytes += (header.name.len() + header.link.len() + xattrs) as u64;
        if self.metadata_bytes > metadata_bytes {
            return Err(LayerError::Limit { what: "bytes of names and attributes", limit: metadata_bytes });
        }
        Ok(())
    }

    /// Takes an entry that is whiteout, opaque marker or AUFS bookkeeping; false when it is none of them.
    fn whiteout(&mut self, name: &[u8], header: &Header) -> Result<bool, LayerError> {
        let (directory, base) = split_key(name);
        if base == OPAQUE_NAME {
            // The marker's parent is a directory, so a symlink in its place is followed.
            let child = self.resolve(&join_key(directory, b"x"))?;
            let directory = split_key(&child).0.to_vec();
            match self.look(&directory) {
                Some(inode) if matches!(inode.kind, Kind::Dir { .. }) => self.make_opaque(&directory, inode),
                _ => {
                    let inode = Inode { mtime: header.mtime, ..Inode::directory(true) };
                    self.insert(directory, inode);
                }
            }
            return Ok(true);
        }
        if name.split(|&byte| byte == 0).any(|part| part.starts_with(b".wh..wh.")) {
            return Ok(true);
        }
        let Some(hidden) = base.strip_prefix(WHITEOUT_PREFIX) else {
            return Ok(false);
        };
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(LayerError::BadName { path: show(&header.name) });
        }
        let key = self.resolve(&join_key(directory, hidden))?;
        // A whiteout hides lower layers only: what this layer has at the path stays, and a directory loses what is
        // below it in lower layers.
        match self.look(&key) {
            Some(inode) if matches!(inode.kind, Kind::Dir { .. }) => self.make_opaque(&key, inode),
            Some(_) => {}
            None => {
                let inode = match self.has_children(&key) {
                    true => Inode::directory(true),
                    false => Inode { kind: Kind::Whiteout, mode: 0, ..Inode::directory(false) },
                };
                self.insert(key, Inode { mtime: header.mtime, ..inode });
            }
        }
        Ok(true)
    }

    fn inode(&self, header: &Header) -> Result<Inode, LayerError> {
        let unsupported = |what| Err(LayerError::Unsupported { path: show(&header.name), what });
        let kind = match header.typeflag {
            b'0' | b'1' => Kind::File { size: header.size, digest: None, link_group: 0 },
            b'2' => Kind::Symlink { target: header.link.clone() },
            b'3' => Kind::Char { major: header.major, minor: header.minor },
            b'4' => Kind::Block { major: header.major, minor: header.minor },
            b'5' => Kind::Dir { opaque: false },
            b'6' => Kind::Fifo,
            b'S' => return unsupported("a sparse file"),
            _ => return unsupported("this type of tar entry"),
        };
        if header.link.contains(&0) || header.link.len() > MAX_PATH {
            return Err(LayerError::BadName { path: show(&header.link) });
        }
        let mut mtime = header.mtime;
        // ADD gives files whose time Linux cannot hold in nanoseconds the epoch.
        if self.whiteouts == Whiteouts::Ordinary && !(0..i64::MAX / 1_000_000_000).contains(&mtime.0) {
            mtime = (0, 0);
        }
        // Such attributes would steer overlayfs once the file lies in a layer's tree.
        let steers = |name: &[u8]| name.starts_with(b"user.overlay.") || name.starts_with(b"trusted.overlay.");
        let xattrs = header.xattrs.iter().filter(|(name, _)| !steers(name) && !name.is_empty());
        Ok(Inode {
            kind,
            mode: header.mode,
            uid: header.uid,
            gid: header.gid,
            mtime,
            xattrs: xattrs.map(|(name, value)| (name.clone(), value.clone())).collect(),
            origin: Origin::None,
        })
    }

    /// What stands at a key.
    fn look(&self, key: &[u8]) -> Option<Inode> {
        match self.linked.get(key) {
            Some(&at) => Some(self.inodes[at].clone()),
            None => self.single.get(&path_of(key)).map(Inode::from),
        }
    }

    /// Nothing of lower layers shows in a directory, which is there already.
    fn make_opaque(&mut self, key: &[u8], directory: Inode) {
        self.single.put(Inode { kind: Kind::Dir { opaque: true }, ..directory }.node(key));
    }

    fn link(&mut self, key: Vec<u8>, header: &Header, inode: Inode) -> Result<(), LayerError> {
        let target = key_of(&header.link)?;
        let target = self.resolve(&target)?;
        if target == key && self.look(&key).is_some() {
            return Ok(());
        }
        self.vacate(&key);
        let missing = || LayerError::LinkTarget { path: show(&path_of(&key)), target: show(&path_of(&target)) };
        let found = self.look(&target).ok_or_else(missing)?;
        if matches!(found.kind, Kind::Dir { .. } | Kind::Whiteout) {
            return Err(missing());
        }
        let at = match self.linked.get(&target) {
            Some(&at) => at,
            None => {
                self.single.remove(&path_of(&target));
                self.inodes.push(found);
                self.linked.insert(target, self.inodes.len() - 1);
                self.inodes.len() - 1
            }
        };
        // The header speaks of the inode, so all its names change.
        let shared = &mut self.inodes[at];
        (shared.mode, shared.uid, shared.gid, shared.mtime) = (inode.mode, inode.uid, inode.gid, inode.mtime);
        if !inode.xattrs.is_empty() {
            shared.xattrs = inode.xattrs;
        }
        self.single.remove(&path_of(&key));
        self.note_parents(&key);
        self.linked.insert(key, at);
        Ok(())
    }

    /// Puts a new inode at a key; a directory keeps what is below it when it replaces a directory.
    fn insert(&mut self, key: Vec<u8>, mut inode: Inode) {
        let old = self.look(&key).map(|old| old.kind);
        match (&mut inode.kind, old) {
            (Kind::Dir { opaque }, Some(Kind::Dir { opaque: before })) => *opaque |= before,
            // Whiteout and directory in one layer: only what is new is there.
            (Kind::Dir { opaque }, Some(Kind::Whiteout)) => *opaque = true,
            (Kind::Dir { .. }, _) => {}
            _ => self.vacate(&key),
        }
        self.linked.remove(&key);
        self.note_parents(&key);
        self.single.put(inode.node(&key));
    }

    fn note_parents(&mut self, key: &[u8]) {
        let mut above = split_key(key).0;
        while !above.is_empty() {
            if !self.parents.contains(above) {
                self.parents.insert(above.to_vec());
            }
            above = split_key(above).0;
        }
    }

    /// Removes what is below a key that will not be a directory.
    fn vacate(&mut self, key: &[u8]) {
        if self.plain_parent.as_ref().is_some_and(|parent| below(parent, key) || parent == key) {
            self.plain_parent = None;
        }
        if !self.parents.remove(key) {
            return;
        }
        self.single.remove_below(&path_of(key));
        while let Some(inner) = self.first_linked_below(key) {
            self.linked.remove(&inner);
        }
    }

    fn first_linked_below(&self, key: &[u8]) -> Option<Vec<u8>> {
        let from = Bound::Excluded(key.to_vec());
        let (inner, _) = self.linked.range((from, Bound::Unbounded)).next()?;
        below(inner, key).then(|| inner.clone())
    }

    fn has_children(&mut self, key: &[u8]) -> bool {
        self.parents.contains(key) && (self.first_linked_below(key).is_some() || self.single.has_below(&path_of(key)))
    }

    /// Follows symlinks among the parents of a key, inside the archive. The last component is taken as it is.
    fn resolve(&mut self, key: &[u8]) -> Result<Vec<u8>, LayerError> {
        let (directory, base) = split_key(key);
        if directory.is_empty() || self.plain_parent.as_deref() == Some(directory) {
            return Ok(key.to_vec());
        }
        let parts = |path: &[u8], separator: u8| -> Vec<Vec<u8>> {
            path.split(|&byte| byte == separator).rev().map(<[u8]>::to_vec).collect()
        };
        let bad_name = || LayerError::BadName { path: show(&path_of(key)) };
        let limit = LINK_STEPS + 64 * self.entries;
        let mut pending = parts(directory, 0);
        let mut done: Vec<u8> = Vec::new();
        let mut links = 0;
        while let Some(part) = pending.pop() {
            self.link_steps += u64::from(links > 0);
            if self.link_steps > limit {
                return Err(LayerError::Limit { what: "steps through symbolic links", limit });
            }
            match part.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    done.truncate(split_key(&done).0.len());
                    continue;
                }
                _ => {}
            }
            let next = join_key(&done, &part);
            if next.len() > MAX_PATH {
                return Err(bad_name());
            }
            match self.look(&next).map(|inode| inode.kind) {
                None | Some(Kind::Dir { .. }) => done = next,
                Some(Kind::Symlink { target }) => {
                    links += 1;
                    if links > MAX_LINKS || pending.len() > MAX_PATH {
                        return Err(bad_name());
                    }
                    if target.starts_with(b"/") {
                        done.clear();
                    }
                    pending.extend(parts(&target, b'/'));
                }
                // Something new below what lower layers lose.
                Some(Kind::Whiteout) => {
                    self.insert(next.clone(), Inode::directory(true));
                    done = next;
                }
                Some(_) => return Err(LayerError::NotADirectory { path: show(&path_of(&next)) }),
            }
        }
        if links == 0 {
            self.plain_parent = Some(directory.to_vec());
        }
        let key = join_key(&done, base);
        if key.len() > MAX_PATH { Err(bad_name()) } else { Ok(key) }
    }

    fn finish(self) -> Tree {
        let single = self.single.finish();
        if self.linked.is_empty() {
            return single;
        }
        let linked = self.linked.into_iter().map(|(key, at)| {
            let mut node = self.inodes[at].clone().node(&key);
            if let Kind::File { link_group, .. } = &mut node.entry.kind {
                *link_group = at as u32 + 1;
            }
            node
        });
        merged(&single, &linked.collect()).finish().number_links()
    }
}

impl Inode {
    /// A directory that the archive only implies.
    fn directory(opaque: bool) -> Self {
        Self {
            kind: Kind::Dir { opaque },
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            xattrs: Attributes::default(),
            origin: Origin::None,
        }
    }

    fn node(self, key: &[u8]) -> Node {
        let Inode { kind, mode, uid, gid, mtime, xattrs, origin } = self;
        Node { entry: Entry { path: path_of(key), kind, mode, uid, gid, mtime, xattrs }, origin }
    }

    fn entry(&self, key: &[u8]) -> Entry {
        Entry {
            path: path_of(key),
            kind: self.kind.clone(),
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            mtime: self.mtime,
            xattrs: self.xattrs.clone(),
        }
    }
}

impl From<Node> for Inode {
    fn from(node: Node) -> Self {
        let Node { entry: Entry { path: _, kind, mode, uid, gid, mtime, xattrs }, origin } = node;
        Self { kind, mode, uid, gid, mtime, xattrs, origin }
    }
}

/// A name from an archive as a key: relative, without `.`; `..` stops at the root.
fn key_of(name: &[u8]) -> Result<Vec<u8>, LayerError> {
    if name.contains(&0) || name.len() > MAX_PATH {
        return Err(LayerError::BadName { path: show(&name[..name.len().min(200)]) });
    }
    let mut key: Vec<u8> = Vec::with_capacity(name.len());
    for part in name.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => key.truncate(split_key(&key).0.len()),
            _ => {
                if !key.is_empty() {
                    key.push(0);
                }
                key.extend_from_slice(part);
            }
        }
    }
    Ok(key)
}

fn path_of(key: &[u8]) -> Vec<u8> {
    key.iter().map(|&byte| if byte == 0 { b'/' } else { byte }).collect()
}

fn split_key(key: &[u8]) -> (&[u8], &[u8]) {
    key.iter().rposition(|&byte| byte == 0).map_or((b"", key), |at| (&key[..at], &key[at + 1..]))
}

fn join_key(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() { name.to_vec() } else { [directory, b"\0", name].concat() }
}

/// `key` lies below `directory`, which is not the key itself.
fn below(key: &[u8], directory: &[u8]) -> bool {
    directory.is_empty() && !key.is_empty() || key.starts_with(directory) && key.get(directory.len()) == Some(&0)
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::index::tests::{file, node, sample};
    use super::super::tar_stream::pax_record;
    use super::*;

    /// Bytes of the files of the sample tree.
    pub(in crate::tree) fn sample_content(node: &Node) -> io::Result<Box<dyn Read + Send>> {
        let content: Vec<u8> = match node.entry.path.as_slice() {
            b"etc/hosts" => b"127.0.0.1 localhost\n".to_vec(),
            b"etc/odd" => b"odd".to_vec(),
            path if path.starts_with(b"long-") => vec![7; 700],
            path => panic!("{} is not to be opened", show(path)),
        };
        Ok(Box::new(io::Cursor::new(content)))
    }

    fn sample_tar() -> Vec<u8> {
        let mut out = Vec::new();
        write_tar(&sample(), &sample_content, &TarOptions::default(), &mut out).unwrap();
        out
    }

    fn read(tar: &[u8]) -> Result<Tree, LayerError> {
        read_tar(&mut &*tar, &mut NoSink, &Limits::default())
    }

    #[test]
    fn what_was_written_is_read() {
        assert_eq!(read(&sample_tar()).unwrap(), sample());
        let mut lines = vec![node("new\nline", Kind::Fifo), node("x", Kind::Symlink { target: b"\xff\n\n".to_vec() })];
        lines[0].entry.path.push(0xff);
        lines[0].entry.xattrs.insert(b"user.lines".to_vec(), b"5 a=b\n\0\n".to_vec());
        let lines = Tree::from_nodes(lines);
        let mut out = Vec::new();
        write_tar(&lines, &sample_content, &TarOptions::default(), &mut out).unwrap();
        assert_eq!(read(&out).unwrap(), lines);
        let mut empty = Vec::new();
        write_tar(&Tree::default(), &sample_content, &TarOptions::default(), &mut empty).unwrap();
        assert_eq!(empty, [0; 1024]);
        assert_eq!(read(&empty).unwrap(), Tree::default());
    }

    #[test]
    fn others_read_it() {
        let tar = sample_tar();
        let mut archive = tar::Archive::new(tar.as_slice());
        let mut lines = Vec::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            let xattrs: Vec<String> = match entry.pax_extensions().unwrap() {
                Some(records) => records.map(|record| record.unwrap().key().unwrap().to_owned()).collect(),
                None => Vec::new(),
            };
            let header = entry.header();
            lines.push(format!(
                "{} {:?} {:o} {}:{} {:?} {} {}",
                entry.path_bytes().escape_ascii(),
                header.entry_type(),
                header.mode().unwrap(),
                header.uid().unwrap(),
                header.gid().unwrap(),
                entry.link_name_bytes().map(|name| name.len()),
                content.len(),
                xattrs.join(",")
            ));
        }
        let expected = [
            "dev/fifo Fifo 644 0:0 None 0 ",
            "dev/null Char 644 0:0 None 0 ",
            "dev/sda Block 644 0:0 None 0 ",
            "dir/ Directory 755 0:0 None 0 ",
            "dir/.wh..wh..opq Regular 0 0:0 None 0 ",
            "dir/.wh.gone Regular 0 0:0 None 0 ",
            "dir/\\xff\\xc5\\xbe Regular 644 0:0 None 0 path",
            "etc/ Directory 755 0:0 None 0 ",
            "etc/hosts Regular 644 0:0 None 20 ",
            "etc/hosts2 Link 644 0:0 Some(9) 0 ",
            "etc/odd Regular 6751 4000000000:70000 None 3 SCHILY.xattr.security.capability,SCHILY.xattr.user.empty,mtime,uid",
            "lib Symlink 644 0:0 Some(7) 0 ",
            "long Symlink 644 0:0 Some(300) 0 linkpath",
            &format!("long-{}/name Regular 644 0:0 None 700 path", "d".repeat(120)),
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn times_are_clamped_to_whole_seconds() {
        let mut late = file("late", b"", 0);
        late.entry.mtime = (2_000_000_000, 999);
        let mut early = file("early", b"", 0);
        early.entry.mtime = (5, 999);
        let tree = Tree::from_nodes(vec![late, early, node("gone", Kind::Whiteout)]);
        let mut out = Vec::new();
        write_tar(&tree, &sample_content, &TarOptions { clamp_mtime: Some(1000) }, &mut out).unwrap();
        let times: Vec<_> = read(&out).unwrap().nodes().iter().map(|node| node.entry.mtime).collect();
        assert_eq!(times, [(5, 0), (1000, 0), (1000, 0)]);
    }

    #[test]
    fn changed_files_are_noticed() {
        let tree = Tree::from_nodes(vec![file("a", b"12345", 0)]);
        let write_of = |tree: &Tree, content: &'static [u8]| {
            let open = |_: &Node| -> io::Result<Box<dyn Read + Send>> { Ok(Box::new(content)) };
            let mut out = Vec::new();
            write_tar(tree, &open, &TarOptions::default(), &mut out).map(|()| out)
        };
        let write = |content| write_of(&tree, content);
        // What was appended after the file had been digested is not in the layer.
        assert_eq!(write(b"12345").unwrap(), write(b"123456").unwrap());
        for content in [&b"1234"[..], b"12340", b""] {
            assert!(matches!(write(content), Err(LayerError::Changed { path }) if path == "a"));
        }
        let mut unread = tree.clone();
        unread.edit(|nodes| nodes[0].entry.kind = Kind::File { size: 5, digest: None, link_group: 0 });
        assert!(write_of(&unread, b"12340").is_ok());
        assert!(matches!(write_of(&unread, b"123456"), Err(LayerError::Changed { .. })));
        let gone = |_: &Node| -> io::Result<Box<dyn Read + Send>> { Err(io::ErrorKind::NotFound.into()) };
        let result = write_tar(&tree, &gone, &TarOptions::default(), &mut Vec::new());
        assert!(matches!(result, Err(LayerError::Content { path, .. }) if path == "a"));
    }

    #[test]
    fn the_root_is_only_ever_opaque() {
        let tar = |opaque| {
            let mut out = Vec::new();
            let tree = Tree::from_nodes(vec![node("", Kind::Dir { opaque })]);
            write_tar(&tree, &sample_content, &TarOptions::default(), &mut out).unwrap();
            out
        };
        assert_eq!(tar(false).len(), 1024);
        assert_eq!(read(&tar(true)).unwrap().nodes(), [node("", Kind::Dir { opaque: true })]);
    }

    #[test]
    fn huge_files_have_their_size_in_a_record() {
        let header = Header { name: b"big".to_vec(), typeflag: b'0', size: 9 << 30, ..Header::default() };
        let bytes = header.encode();
        let mut input = bytes.as_slice();
        let mut stream = TarStream::new(&mut input, Limits::default());
        assert_eq!(stream.next(false).unwrap().unwrap().size, 9 << 30);
        assert_eq!(pax_record(b"path", &[b'x'; 90])[..7], *b"99 path");
        assert_eq!(pax_record(b"path", &[b'x'; 91])[..8], *b"101 path");
    }

    fn entry(typeflag: u8, name: &[u8], link: &[u8], data: &[u8]) -> Vec<u8> {
        let size = data.len() as u64;
        let header = Header { name: name.into(), link: link.into(), typeflag, size, mode: 0o644, ..Header::default() };
        [header.encode(), data.to_vec(), vec![0; padding(size)]].concat()
    }

    #[test]
    fn long_links_are_not_followed_for_ever() {
        // 200 links, each through the one before by a detour of 2,000 parts; every file below the last costs all of it.
        let mut tar = entry(b'5', b"d", b"", b"");
        for link in 0..200 {
            let target = match link {
                0 => "d".to_owned(),
                _ => format!("{}l{}", "x/../".repeat(1000), link - 1),
            };
            tar.extend(pax(&[("linkpath", target.as_bytes())]));
            tar.extend(entry(b'2', format!("l{link}").as_bytes(), b"", b""));
        }
        for file in 0..500 {
            tar.extend(entry(b'0', format!("l199/{file}").as_bytes(), b"", b""));
        }
        let error = read_tar(&mut tar.as_slice(), &mut NoSink, &Limits::default()).unwrap_err();
        assert!(error.to_string().contains("steps through symbolic links"), "{error}");
        // An archive where all goes through links stays far below.
        let mut tar = entry(b'2', b"lib", b"usr/lib", b"");
        for file in 0..2000 {
            tar.extend(entry(b'0', format!("lib/a/b/c/{}/{file}", file % 7).as_bytes(), b"", b""));
        }
        assert_eq!(read_tar(&mut tar.as_slice(), &mut NoSink, &Limits::default()).unwrap().nodes().len(), 2001);
    }

    fn plain(name: &str) -> Vec<u8> {
        entry(b'0', name.as_bytes(), b"", b"data")
    }

    /// Header block with some bytes changed and the check sum made right.
    fn patched(mut bytes: Vec<u8>, at: usize, field: &[u8]) -> Vec<u8> {
        bytes[at..at + field.len()].copy_from_slice(field);
        bytes[148..156].fill(b' ');
        let sum: u32 = bytes[..BLOCK].iter().map(|&byte| u32::from(byte)).sum();
        bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        bytes
    }

    fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
        let data: Vec<u8> = records.iter().flat_map(|(key, value)| pax_record(key.as_bytes(), value)).collect();
        entry(b'x', b"pax", b"", &data)
    }

    fn describe(result: Result<Tree, LayerError>) -> String {
        let tree = match result {
            Ok(tree) => tree,
            Err(error) => return format!("error: {error}"),
        };
        let line = |node: &Node| {
            let kind = match &node.entry.kind {
                Kind::File { size, link_group: 0, .. } => format!("={size}"),
                Kind::File { size, link_group, .. } => format!("={size}#{link_group}"),
                Kind::Dir { opaque: false } => "/".to_owned(),
                Kind::Dir { opaque: true } => "/!".to_owned(),
                Kind::Symlink { target } => format!("->{}", target.escape_ascii()),
                Kind::Whiteout => "-".to_owned(),
                other => format!("{other:?}"),
            };
            format!("{}{kind}", node.entry.path.escape_ascii())
        };
        tree.nodes().iter().map(line).collect::<Vec<_>>().join(" ")
    }

    fn check(parts: &[Vec<u8>], expected: &str) {
        let mut tar = parts.concat();
        tar.extend_from_slice(&[0; 1024]);
        assert_eq!(describe(read(&tar)), expected);
    }

    #[test]
    fn names() {
        check(&[plain("./a"), plain("/b"), plain("d//e/./f")], "a=4 b=4 d/e/f=4");
        check(&[plain("../../x"), plain("a/../../y")], "x=4 y=4");
        check(&[entry(b'5', b"./", b"", b""), plain("a")], "/ a=4");
        check(&[plain("a"), entry(b'5', b"a", b"", b"")], "a/");
        check(&[plain("a"), entry(b'0', b"a", b"", b"longer")], "a=6");
        check(&[plain("d/x"), plain("d/y"), plain("d")], "d=4");
        check(&[plain("d/x"), entry(b'5', b"d", b"", b"")], "d/ d/x=4");
        check(&[plain("d-x"), plain("d/x"), entry(b'2', b"d", b"t", b"")], "d->t d-x=4");
        check(&[plain("f"), plain("f/x")], "error: f is not a directory");
        check(&[plain("")], "error: bad name in tar: ");
        check(
            &[entry(b'5', &[b"d/".repeat(5000)].concat(), b"", b"")],
            &format!("error: bad name in tar: {}", "d/".repeat(100)),
        );
    }

    #[test]
    fn symlinked_parents_are_followed_inside() {
        let link = |name: &str, target: &str| entry(b'2', name.as_bytes(), target.as_bytes(), b"");
        check(&[link("lib", "usr/lib"), plain("lib/x")], "lib->usr/lib usr/lib/x=4");
        check(&[link("l", "/etc"), plain("l/x")], "etc/x=4 l->/etc");
        check(&[link("l", "../../.."), plain("l/x")], "l->../../.. x=4");
        check(&[link("l", "l"), plain("l/x")], "error: bad name in tar: l/x");
        check(&[link("l", "k/../.."), link("k", "d"), plain("l/x")], "k->d l->k/../.. x=4");
        check(&[plain("d/a"), link("l", "d"), plain("l/b"), plain("d/a")], "d/a=4 d/b=4 l->d");
        check(&[link("l", "d"), link("l/m", "e"), plain("d/m/x")], "d/e/x=4 d/m->e l->d");
        // What was a plain directory may become a link.
        check(&[plain("d/a"), link("d", "e"), plain("d/b")], "d->e e/b=4");
        check(&[link("l", "d"), entry(b'1', b"h", b"l", b""), plain("h/x")], "d/x=4 h->d l->d");
    }

    #[test]
    fn hard_links() {
        let link = |name: &str, target: &str| entry(b'1', name.as_bytes(), target.as_bytes(), b"");
        check(&[plain("b"), link("a", "b"), link("c", "./a")], "a=4#1 b=4#1 c=4#1");
        check(&[plain("b"), link("a", "/../b"), plain("b")], "a=4 b=4");
        check(&[plain("b"), link("b", "b")], "b=4");
        check(&[link("a", "nothing")], "error: hard link a has no file at nothing");
        check(&[entry(b'5', b"d", b"", b""), link("a", "d")], "error: hard link a has no file at d");
        check(&[entry(b'6', b"p", b"", b""), link("q", "p")], "pFifo qFifo");
        check(&[plain("z"), link("y", "z"), plain("b"), link("a", "b")], "a=4#1 b=4#1 y=4#2 z=4#2");
        check(&[plain("d/f"), link("d", "d/f")], "error: hard link d has no file at d/f");
    }

    #[test]
    fn whiteouts() {
        let opaque = || plain("d/.wh..wh..opq");
        check(&[plain(".wh.a"), plain("d/.wh.b")], "a- d/b-");
        check(&[opaque(), plain("d/x")], "d/! d/x=4");
        check(&[plain("d/x"), entry(b'5', b"d", b"", b""), opaque()], "d/! d/x=4");
        check(&[opaque(), entry(b'5', b"d", b"", b"")], "d/!");
        check(&[plain(".wh.d"), entry(b'5', b"d", b"", b"")], "d/!");
        check(&[entry(b'5', b"d", b"", b""), plain(".wh.d")], "d/!");
        check(&[plain(".wh.d"), plain("d/x")], "d/! d/x=4");
        check(&[plain("d/x"), plain(".wh.d")], "d/! d/x=4");
        check(&[plain(".wh.f"), plain("f")], "f=4");
        check(&[plain("f"), plain(".wh.f")], "f=4");
        check(&[plain(".wh..wh.plnk/1"), plain(".wh..wh.aufs"), plain("a")], "a=4");
        check(&[plain(".wh..wh..opq")], "/!");
        check(&[plain("d/.wh...")], "error: bad name in tar: d/.wh...");
        check(&[plain(".wh.")], "error: bad name in tar: .wh.");
        check(&[plain(".wh..")], "error: bad name in tar: .wh..");
        let tar = [plain("d/.wh.a"), plain("./"), vec![0; 1024]].concat();
        let archive = read_archive(&mut tar.as_slice(), &mut NoSink, &Limits::default(), &|_| Origin::None);
        assert_eq!(describe(archive), "error: bad name in tar: ./");
        let archive = read_archive(&mut &tar[..1024], &mut NoSink, &Limits::default(), &|_| Origin::None);
        assert_eq!(describe(archive), "d/.wh.a=4");
    }

    #[test]
    fn dialects() {
        let long = "n".repeat(150);
        let gnu_name = |typeflag| entry(typeflag, b"././@LongLink", b"", format!("{long}\0").as_bytes());
        check(&[gnu_name(b'L'), plain("cut")], &format!("{long}=4"));
        check(&[gnu_name(b'K'), entry(b'2', b"l", b"cut", b"")], &format!("l->{long}"));
        check(&[pax(&[("path", b"from/pax"), ("comment", b"x")]), plain("cut")], "from/pax=4");
        check(&[pax(&[("path", b"")]), plain("kept")], "kept=4");
        check(&[entry(b'g', b"global", b"", &pax_record(b"path", b"ignored")), plain("a")], "a=4");
        let v7 = |bytes| patched(bytes, 257, &[0; 8]);
        check(&[v7(entry(0, b"d/", b"", b"")), v7(entry(0, b"f", b"", b"1"))], "d/ f=1");
        check(&[patched(plain("f"), 345, b"some/prefix")], "some/prefix/f=4");
        check(&[patched(patched(plain("f"), 257, b"ustar  \0"), 345, b"12345")], "f=4");
        check(&[patched(plain("f"), 124, &[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4])], "f=4");
        check(&[patched(plain("f"), 156, b"7")], "f=4");
        let time =
            |records: &[(&str, &[u8])]| read(&[pax(records), plain("f")].concat()).unwrap().nodes()[0].entry.mtime;
        assert_eq!(time(&[("mtime", b"12.5")]), (12, 500_000_000));
        assert_eq!(time(&[("mtime", b"12.0000000019")]), (12, 1));
        assert_eq!(time(&[("mtime", b"-1.25")]), (-2, 750_000_000));
        assert_eq!(time(&[("mtime", b"-0.25")]), (-1, 750_000_000));
        let negative = read(&patched(plain("f"), 136, &[0xff; 12])).unwrap();
        assert_eq!(negative.nodes()[0].entry.mtime, (-1, 0));
        let attributes = pax(&[("SCHILY.xattr.user.a", b"b=c\nd"), ("SCHILY.xattr.trusted.overlay.opaque", b"y")]);
        let tree = read(&[attributes, plain("f")].concat()).unwrap();
        assert_eq!(tree.nodes()[0].entry.xattrs, [(b"user.a".to_vec(), b"b=c\nd".to_vec())].into_iter().collect());
    }

    #[test]
    fn hostile() {
        check(&[vec![b'x'; 512]], "error: malformed tar at byte 0: bad header");
        check(&[patched(plain("f"), 124, b"9")], "error: malformed tar at byte 0: bad header");
        check(&[patched(plain("f"), 124, &[0xff; 12])], "error: malformed tar at byte 0: bad header");
        check(&[patched(plain("f"), 108, b"-1")], "error: malformed tar at byte 0: bad header");
        check(
            &[entry(b'x', b"p", b"", b"9999 path=a\n"), plain("f")],
            "error: malformed tar at byte 512: bad PAX record",
        );
        check(&[entry(b'x', b"p", b"", b"5 a=\n\xff"), plain("f")], "error: malformed tar at byte 512: bad PAX record");
        check(&[pax(&[("size", b"-4")]), plain("f")], "error: malformed tar at byte 1024: bad PAX value");
        check(&[pax(&[("uid", b"4294967296")]), plain("f")], "error: malformed tar at byte 1024: bad PAX value");
        check(&[pax(&[("path", b"a\0b")]), plain("f")], "error: bad name in tar: a\0b");
        check(&[entry(b'S', b"f", b"", b"")], "error: f: a sparse file is not supported");
        check(&[pax(&[("GNU.sparse.major", b"1")]), plain("f")], "error: f: a sparse file is not supported");
        check(&[entry(b'Z', b"f", b"", b"")], "error: f: this type of tar entry is not supported");
        let huge = patched(entry(b'L', b"n", b"", b""), 124, b"77777777777\0");
        check(&[huge], "error: archive exceeds the limit of 1048576 bytes in a header");
        let bomb = patched(plain("f"), 124, &[0x80, 0, 0, 0, 0x7f, 0, 0, 0, 0, 0, 0, 0]);
        check(&[bomb], "error: archive exceeds the limit of 1099511627776 bytes");
        check(&[[0; 512].to_vec(), plain("f")], "error: malformed tar at byte 512: entry after a zero block");
        assert_eq!(describe(read(&plain("f")[..514])), "error: malformed tar at byte 514: ends inside a file");
        assert_eq!(describe(read(&plain("f")[..200])), "error: malformed tar at byte 0: ends inside a header");
        assert_eq!(describe(read(&plain("f")[..516])), "f=4");
        assert_eq!(describe(read(b"")), "");
        let limits = Limits { entries: 1, ..Limits::default() };
        let two = [plain("a"), plain("b")].concat();
        let result = read_tar(&mut two.as_slice(), &mut NoSink, &limits);
        assert_eq!(describe(result), "error: archive exceeds the limit of 1 entries");
        let limits = Limits { metadata_bytes: 10, ..Limits::default() };
        let result = read_tar(&mut plain("a-long-name").as_slice(), &mut NoSink, &limits);
        assert_eq!(describe(result), "error: archive exceeds the limit of 10 bytes of names and attributes");
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let good = sample_tar();
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for _ in 0..3000 {
            let mut bad = good.clone();
            for _ in 0..1 + random() % 4 {
                // Most blocks of the sample are headers; their sums are made right again half of the time.
                let block = random() as usize % (bad.len() / BLOCK) * BLOCK;
                bad[block + random() as usize % BLOCK] = random() as u8;
                if random() % 2 == 0 {
                    let fixed = patched(bad[block..block + BLOCK].to_vec(), 0, b"");
                    bad[block..block + BLOCK].copy_from_slice(&fixed);
                }
            }
            let limits = Limits { file_bytes: 1 << 20, ..Limits::default() };
            if let Ok(tree) = read_tar(&mut bad.as_slice(), &mut NoSink, &limits) {
                let encoded = super::super::index::encode(&tree);
                assert_eq!(super::super::index::decode(&encoded).as_ref(), Ok(&tree));
            }
        }
    }

    #[test]
    fn a_sink_may_read_less_and_fail() {
        struct First;
        impl LayerSink for First {
            fn file(&mut self, entry: &Entry, data: &mut dyn BufRead) -> io::Result<()> {
                data.read_exact(&mut [0])?;
                if entry.path == b"bad" { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
            }
        }
        let good = [plain("a"), plain("b")].concat();
        let tree = read_tar(&mut good.as_slice(), &mut First, &Limits::default()).unwrap();
        assert_eq!(tree, read(&good).unwrap());
        assert_eq!(tree.nodes()[0].entry.kind, file("a", b"data", 0).entry.kind);
        let result = read_tar(&mut plain("bad").as_slice(), &mut First, &Limits::default());
        assert!(matches!(result, Err(LayerError::Store { path, .. }) if path == "bad"));
    }
}
