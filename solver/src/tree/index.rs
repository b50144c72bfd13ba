//! The layer index: a tree as bytes, its content key, and the name of a layer.
//!
//! ```text
//! magic "nacreidx" | version 1 | number of entries | entries in path order | BLAKE3 of all before (32 bytes)
//! entry: bytes shared with the path before | rest of the path (length, bytes)
//!        kind and flags (1 byte) | mode | uid | gid | mtime seconds (zigzag) | mtime nanoseconds
//!        [file] size | [digest 32] | [link group]   [symlink] target   [device] major | minor
//!        [xattrs] number | (name, value) …
//! ```
//! Numbers are LEB128; byte strings have their length in front. The kind is in the low four bits; the flags say which
//! of the optional parts follow. Where bytes can be read (`Origin`) is not stored. Hard-link groups are numbered anew
//! in path order, and a group of one is none, so that equal trees give equal bytes.
//!
//! Invariants of what [`decode`] returns: paths ascend strictly and have no empty, `.` or `..` component and no NUL, so
//! nobody who makes files from an index can be led out of the directory. Memory is bounded by the length of the input.
//!
//! The content key covers the same facts except times:
//!
//! | part | in the key | why |
//! |---|---|---|
//! | path, kind, mode, uid, gid, xattrs, link target, device, opaque | yes | a RUN can see them |
//! | size and digest of files, which names are one inode | yes | a RUN can see them |
//! | mtime | no | a rerun that writes the same bytes must give the same key |
//! | anything but the path of a whiteout | no | it only removes; disks and tars disagree about its mode |

use std::collections::HashMap;
use std::io::{self, Read, Write};

use super::{
    Attributes, ContentDigest, Entry, Kind, LayerId, Node, Origin, Tree, TreeBuilder, compare_paths, shared_length,
};

const MAGIC: &[u8; 8] = b"nacreidx";
const VERSION: u8 = 1;
const TRAILER: usize = blake3::OUT_LEN;
/// Longest path; four times what Linux takes in one call.
const MAX_PATH: usize = 16 << 10;

pub(super) const FILE: u8 = 0;
pub(super) const DIR: u8 = 1;
pub(super) const SYMLINK: u8 = 2;
pub(super) const FIFO: u8 = 3;
pub(super) const CHAR: u8 = 4;
pub(super) const BLOCK: u8 = 5;
const WHITEOUT: u8 = 6;
const KIND_MASK: u8 = 0x0f;
const OPAQUE: u8 = 0x10;
const HAS_DIGEST: u8 = 0x20;
const HAS_XATTRS: u8 = 0x40;
const HAS_LINKS: u8 = 0x80;

/// Why bytes are no index.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// Not an index at all.
    #[error("not a layer index")]
    Magic,
    /// Written by another version of nacre.
    #[error("layer index has format version {found}, expected {VERSION}")]
    Version {
        /// What it says.
        found: u8,
    },
    /// The trailer does not fit the content.
    #[error("layer index is damaged")]
    Damaged,
    /// It cannot be read.
    #[error("cannot read the layer index: {0}")]
    Read(io::ErrorKind),
    /// The content breaks the format's rules although the trailer is right.
    #[error("layer index is malformed at byte {offset}: {what}")]
    Malformed {
        /// Where.
        offset: u64,
        /// Which rule.
        what: &'static str,
    },
}

/// The index of a tree as bytes. Every regular file should have its digest.
pub fn encode(tree: &Tree) -> Vec<u8> {
    let mut out = Vec::with_capacity(64 + tree.len() * 80);
    // Memory takes everything.
    let _ = write(tree, &mut out);
    out
}

/// Writes the index of a tree; the digest of all that was written. Every regular file should have its digest.
pub fn write(tree: &Tree, out: &mut dyn Write) -> io::Result<ContentDigest> {
    const PART: usize = 1 << 16;
    let links = LinkGroups::of(tree);
    let mut hasher = blake3::Hasher::new();
    let mut part = MAGIC.to_vec();
    part.push(VERSION);
    put(&mut part, tree.len() as u64);
    let mut previous: Vec<u8> = Vec::new();
    let mut cursor = tree.cursor();
    while let Some(Node { entry, .. }) = cursor.next() {
        put_path(&mut part, &mut previous, &entry.path);
        put_entry(&mut part, entry, links.number(entry));
        if part.len() >= PART {
            hasher.update(&part);
            out.write_all(&part)?;
            part.clear();
        }
    }
    let trailer = hasher.update(&part).finalize();
    hasher.update(trailer.as_bytes());
    part.extend_from_slice(trailer.as_bytes());
    out.write_all(&part)?;
    Ok(*hasher.finalize().as_bytes())
}

/// Writes all of an entry but its path.
fn put_entry(out: &mut Vec<u8>, entry: &Entry, link_group: u32) {
    let mut flags = kind_number(&entry.kind);
    match &entry.kind {
        Kind::Dir { opaque: true } => flags |= OPAQUE,
        Kind::File { digest, .. } => {
            debug_assert!(digest.is_some(), "file without digest: {}", String::from_utf8_lossy(&entry.path));
            flags |= if digest.is_some() { HAS_DIGEST } else { 0 };
            flags |= if link_group != 0 { HAS_LINKS } else { 0 };
        }
        _ => {}
    }
    flags |= if entry.xattrs.is_empty() { 0 } else { HAS_XATTRS };
    out.push(flags);
    for number in [entry.mode, entry.uid, entry.gid] {
        put(out, u64::from(number));
    }
    put(out, zigzag(entry.mtime.0));
    put(out, u64::from(entry.mtime.1));
    put_rest(out, entry, link_group);
}

/// Writes what only an entry's kind has, and its attributes if there are any.
pub(super) fn put_rest(out: &mut Vec<u8>, entry: &Entry, link_group: u32) {
    match &entry.kind {
        Kind::File { size, digest, .. } => {
            put(out, *size);
            out.extend_from_slice(digest.as_ref().map_or(&[], |digest| digest.as_slice()));
            if link_group != 0 {
                put(out, u64::from(link_group));
            }
        }
        Kind::Symlink { target } => put_bytes(out, target),
        Kind::Char { major, minor } | Kind::Block { major, minor } => {
            put(out, u64::from(*major));
            put(out, u64::from(*minor));
        }
        Kind::Dir { .. } | Kind::Fifo | Kind::Whiteout => {}
    }
    if !entry.xattrs.is_empty() {
        put(out, entry.xattrs.len() as u64);
        for (name, value) in &entry.xattrs {
            put_bytes(out, name);
            put_bytes(out, value);
        }
    }
}

/// Is this an index of this version that is as it was written? The entries are not looked at.
pub fn is_whole(reader: &mut dyn Read, length: u64) -> bool {
    Reader::new(reader, length).is_ok_and(|reader| reader.end().is_ok())
}

/// Reads an index; all origins are [`Origin::None`].
pub fn decode(bytes: &[u8]) -> Result<Tree, IndexError> {
    read(&mut &*bytes, bytes.len() as u64)
}

/// Reads an index of `length` bytes; all origins are [`Origin::None`].
pub fn read(reader: &mut dyn Read, length: u64) -> Result<Tree, IndexError> {
    let mut reader = Reader::new(reader, length)?;
    match entries(&mut reader, length) {
        Err(error @ IndexError::Read(_)) => Err(error),
        // What is damaged may be malformed, too, which is of less interest.
        tree => reader.end().and(tree),
    }
}

fn entries(reader: &mut Reader<'_>, length: u64) -> Result<Tree, IndexError> {
    let count = reader.number()?;
    // The smallest entry has nine bytes.
    if count > length / 9 {
        return reader.malformed("more entries than bytes");
    }
    // Shared prefixes let few bytes stand for long paths; real trees stay far below this.
    let mut path_budget = (1_u64 << 26).saturating_add(length.saturating_mul(256));
    let mut builder = TreeBuilder::new();
    for _ in 0..count {
        let entry = reader.entry(builder.last_path())?;
        match path_budget.checked_sub(entry.path.len() as u64) {
            Some(rest) => path_budget = rest,
            None => return reader.malformed("paths too long in total"),
        }
        builder.push(&entry, &Origin::None);
    }
    if reader.left > 0 || reader.at < reader.buffer.len() {
        return reader.malformed("bytes after the last entry");
    }
    Ok(builder.finish())
}

/// Digest of everything in a tree that a step can depend on (see the module's table).
pub fn content_key(tree: &Tree) -> ContentDigest {
    let links = LinkGroups::of(tree);
    let mut hasher = blake3::Hasher::new();
    let mut part = b"nacre content 1\0".to_vec();
    part.extend_from_slice(&(tree.len() as u64).to_le_bytes());
    let number = |part: &mut Vec<u8>, number: u64| part.extend_from_slice(&number.to_le_bytes());
    let bytes = |part: &mut Vec<u8>, bytes: &[u8]| {
        part.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        part.extend_from_slice(bytes);
    };
    let mut cursor = tree.cursor();
    while let Some(Node { entry, .. }) = cursor.next() {
        bytes(&mut part, &entry.path);
        part.push(kind_number(&entry.kind));
        if entry.kind == Kind::Whiteout {
            continue;
        }
        for value in [entry.mode, entry.uid, entry.gid] {
            number(&mut part, u64::from(value));
        }
        match &entry.kind {
            Kind::File { size, digest, .. } => {
                number(&mut part, *size);
                number(&mut part, u64::from(links.number(entry)));
                match digest {
                    Some(digest) => bytes(&mut part, digest),
                    None => {
                        // Nothing is known of the bytes: rather a needless miss than a false hit.
                        debug_assert!(false, "file without digest: {}", String::from_utf8_lossy(&entry.path));
                        bytes(&mut part, format!("{:?}", entry.mtime).as_bytes());
                    }
                }
            }
            Kind::Dir { opaque } => part.push(u8::from(*opaque)),
            Kind::Symlink { target } => bytes(&mut part, target),
            Kind::Char { major, minor } | Kind::Block { major, minor } => {
                number(&mut part, u64::from(*major));
                number(&mut part, u64::from(*minor));
            }
            Kind::Fifo | Kind::Whiteout => {}
        }
        number(&mut part, entry.xattrs.len() as u64);
        for (name, value) in &entry.xattrs {
            bytes(&mut part, name);
            bytes(&mut part, value);
        }
        // The hasher is fastest on large pieces.
        if part.len() > 1 << 16 {
            hasher.update(&part);
            part.clear();
        }
    }
    hasher.update(&part);
    *hasher.finalize().as_bytes()
}

/// Name of a layer that was built here: BLAKE3 over its encoded index, in hex.
pub fn layer_id(digest: &ContentDigest) -> LayerId {
    LayerId(blake3::Hash::from_bytes(*digest).to_hex().as_str().into())
}

/// Groups of hard links, numbered from 1 in path order.
#[derive(Debug, Default)]
pub struct LinkGroups(HashMap<u32, u32>);

impl LinkGroups {
    /// The groups of a tree that have at least two names.
    pub fn of(tree: &Tree) -> Self {
        if !tree.has_links() {
            return Self::default();
        }
        // How many names, and which comes first.
        let mut groups: HashMap<u32, (u32, usize)> = HashMap::new();
        let mut cursor = tree.cursor();
        while let Some(node) = cursor.next() {
            let group = node.entry.link_group();
            if group != 0 {
                groups.entry(group).or_insert((0, cursor.number())).0 += 1;
            }
        }
        let mut shared: Vec<(usize, u32)> =
            groups.into_iter().filter(|(_, (names, _))| *names > 1).map(|(group, (_, first))| (first, group)).collect();
        shared.sort_unstable();
        Self(shared.into_iter().zip(1..).map(|((_, group), number)| (group, number)).collect())
    }

    /// The number of an entry's group; 0 where no other node shares the inode.
    pub fn number(&self, entry: &Entry) -> u32 {
        match entry.link_group() {
            0 => 0,
            group => self.0.get(&group).copied().unwrap_or_default(),
        }
    }

    /// How many groups there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

pub(super) fn kind_number(kind: &Kind) -> u8 {
    match kind {
        Kind::File { .. } => FILE,
        Kind::Dir { .. } => DIR,
        Kind::Symlink { .. } => SYMLINK,
        Kind::Fifo => FIFO,
        Kind::Char { .. } => CHAR,
        Kind::Block { .. } => BLOCK,
        Kind::Whiteout => WHITEOUT,
    }
}

pub(crate) fn put(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

pub(crate) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Writes how many bytes a path shares with the one before, and the rest of it; then it is the one before.
pub(crate) fn put_path(out: &mut Vec<u8>, before: &mut Vec<u8>, path: &[u8]) {
    let shared = shared_length(before, path);
    put(out, shared as u64);
    put_bytes(out, &path[shared..]);
    before.truncate(shared);
    before.extend_from_slice(&path[shared..]);
}

pub(crate) fn zigzag(number: i64) -> u64 {
    ((number << 1) ^ (number >> 63)) as u64
}

pub(crate) fn unzigzag(number: u64) -> i64 {
    (number >> 1) as i64 ^ -((number & 1) as i64)
}

/// No empty, `.` or `..` component, no NUL; the empty path is the root.
fn is_clean(path: &[u8]) -> bool {
    path.is_empty()
        || !path.contains(&0) && path.split(|&byte| byte == b'/').all(|part| !matches!(part, b"" | b"." | b".."))
}

fn unreadable(error: io::Error) -> IndexError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => IndexError::Damaged,
        kind => IndexError::Read(kind),
    }
}

/// Reads an index but for its trailer, and digests it meanwhile.
struct Reader<'a> {
    source: &'a mut dyn Read,
    hasher: blake3::Hasher,
    buffer: Vec<u8>,
    at: usize,
    /// Bytes in front of the trailer that are not in the buffer yet.
    left: u64,
    /// Of the end of the buffer.
    offset: u64,
}

impl<'a> Reader<'a> {
    fn new(source: &'a mut dyn Read, length: u64) -> Result<Self, IndexError> {
        let left = length.saturating_sub(TRAILER as u64);
        let (hasher, buffer) = (blake3::Hasher::new(), Vec::new());
        let mut reader = Self { source, hasher, buffer, at: 0, left, offset: 0 };
        match reader.take(MAGIC.len() as u64 + 1) {
            Ok([magic @ .., _]) if magic != MAGIC => Err(IndexError::Magic),
            Ok([.., VERSION]) => Ok(reader),
            Ok([.., found]) => Err(IndexError::Version { found: *found }),
            Err(error @ IndexError::Read(_)) => Err(error),
            Ok([]) | Err(_) => Err(IndexError::Damaged),
        }
    }

    /// Reads what is left; the trailer must be right.
    fn end(mut self) -> Result<(), IndexError> {
        while self.left > 0 {
            self.at = self.buffer.len();
            self.fill(1)?;
        }
        let mut trailer = [0; TRAILER];
        self.source.read_exact(&mut trailer).map_err(unreadable)?;
        if self.hasher.finalize().as_bytes() == &trailer { Ok(()) } else { Err(IndexError::Damaged) }
    }

    /// Sees to it that so many bytes are in the buffer.
    fn fill(&mut self, length: usize) -> Result<(), IndexError> {
        const PART: u64 = 1 << 16;
        while self.buffer.len() - self.at < length {
            if self.left == 0 {
                return self.malformed("ends early");
            }
            self.buffer.drain(..self.at);
            let (before, more) = (self.buffer.len(), PART.min(self.left));
            self.at = 0;
            self.buffer.resize(before + more as usize, 0);
            self.source.read_exact(&mut self.buffer[before..]).map_err(unreadable)?;
            self.hasher.update(&self.buffer[before..]);
            (self.left, self.offset) = (self.left - more, self.offset + more);
        }
        Ok(())
    }

    fn malformed<T>(&self, what: &'static str) -> Result<T, IndexError> {
        let offset = self.offset.saturating_sub((self.buffer.len() - self.at) as u64);
        Err(IndexError::Malformed { offset, what })
    }

    fn byte(&mut self) -> Result<u8, IndexError> {
        if self.at == self.buffer.len() {
            self.fill(1)?;
        }
        self.at += 1;
        Ok(self.buffer[self.at - 1])
    }

    fn number(&mut self) -> Result<u64, IndexError> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            if shift == 63 && byte > 1 {
                break;
            }
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        self.malformed("number too large")
    }

    fn small(&mut self) -> Result<u32, IndexError> {
        match u32::try_from(self.number()?) {
            Ok(number) => Ok(number),
            Err(_) => self.malformed("number too large"),
        }
    }

    fn take(&mut self, length: u64) -> Result<&[u8], IndexError> {
        let there = self.left + (self.buffer.len() - self.at) as u64;
        let Some(length) = usize::try_from(length).ok().filter(|&length| length as u64 <= there) else {
            return self.malformed("ends early");
        };
        self.fill(length)?;
        self.at += length;
        Ok(&self.buffer[self.at - length..self.at])
    }

    fn byte_string(&mut self) -> Result<&[u8], IndexError> {
        let length = self.number()?;
        self.take(length)
    }

    fn entry(&mut self, previous: Option<&[u8]>) -> Result<Entry, IndexError> {
        let before = previous.unwrap_or(b"");
        let shared = match usize::try_from(self.number()?).ok().and_then(|shared| before.get(..shared)) {
            Some(shared) => shared,
            None => return self.malformed("shared prefix longer than the path before"),
        };
        let length = self.number()?;
        if length > MAX_PATH as u64 || shared.len() + length as usize > MAX_PATH {
            return self.malformed("path too long");
        }
        let path = [shared, self.take(length)?].concat();
        if !is_clean(&path) {
            return self.malformed("path is not clean");
        }
        if previous.is_some_and(|previous| compare_paths(previous, &path).is_ge()) {
            return self.malformed("paths out of order");
        }
        let flags = self.byte()?;
        let (mode, uid, gid) = (self.small()?, self.small()?, self.small()?);
        let mtime = (unzigzag(self.number()?), self.small()?);
        let (kind, allowed) = match flags & KIND_MASK {
            FILE => {
                let size = self.number()?;
                let digest = if flags & HAS_DIGEST == 0 {
                    None
                } else {
                    ContentDigest::try_from(self.take(blake3::OUT_LEN as u64)?).ok()
                };
                let link_group = if flags & HAS_LINKS == 0 { 0 } else { self.small()? };
                (Kind::File { size, digest, link_group }, HAS_DIGEST | HAS_LINKS)
            }
            DIR => (Kind::Dir { opaque: flags & OPAQUE != 0 }, OPAQUE),
            SYMLINK => (Kind::Symlink { target: self.byte_string()?.to_vec() }, 0),
            FIFO => (Kind::Fifo, 0),
            CHAR => (Kind::Char { major: self.small()?, minor: self.small()? }, 0),
            BLOCK => (Kind::Block { major: self.small()?, minor: self.small()? }, 0),
            WHITEOUT => (Kind::Whiteout, 0),
            _ => return self.malformed("unknown kind"),
        };
        if flags & !(KIND_MASK | HAS_XATTRS | allowed) != 0 {
            return self.malformed("unknown flags");
        }
        let mut xattrs = Attributes::default();
        if flags & HAS_XATTRS != 0 {
            for _ in 0..self.number()? {
                let name = self.byte_string()?.to_vec();
                xattrs.insert(name, self.byte_string()?.to_vec());
            }
        }
        Ok(Entry { path, kind, mode, uid, gid, mtime, xattrs })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::tree) fn node(path: &str, kind: Kind) -> Node {
        let mode = if matches!(kind, Kind::Dir { .. }) { 0o755 } else { 0o644 };
        Node { entry: Entry { kind, mtime: (1_600_000_000, 0), ..Entry::dir(path, mode) }, origin: Origin::None }
    }

    pub(in crate::tree) fn file(path: &str, content: &[u8], link_group: u32) -> Node {
        let digest = Some(*blake3::hash(content).as_bytes());
        node(path, Kind::File { size: content.len() as u64, digest, link_group })
    }

    /// A tree with every kind of entry.
    pub(in crate::tree) fn sample() -> Tree {
        let mut odd = file("etc/odd", b"odd", 0);
        odd.entry.mode = 0o6751;
        odd.entry.uid = 4_000_000_000;
        odd.entry.gid = 70_000;
        odd.entry.mtime = (-5, 0);
        odd.entry.xattrs.insert(b"security.capability".to_vec(), vec![1, 0, 0, 2, b'=', 0, 255]);
        odd.entry.xattrs.insert(b"user.empty".to_vec(), Vec::new());
        let mut strange = file("x", b"", 0);
        strange.entry.path = b"dir/\xff\xc5\xbe".to_vec();
        let mut gone = node("dir/gone", Kind::Whiteout);
        gone.entry.mode = 0;
        Tree::from_nodes(vec![
            node("dir", Kind::Dir { opaque: true }),
            strange,
            gone,
            node("etc", Kind::Dir { opaque: false }),
            file("etc/hosts", b"127.0.0.1 localhost\n", 1),
            file("etc/hosts2", b"127.0.0.1 localhost\n", 1),
            odd,
            node("dev/fifo", Kind::Fifo),
            node("dev/null", Kind::Char { major: 1, minor: 3 }),
            node("dev/sda", Kind::Block { major: 8, minor: 70_000_000 }),
            node("lib", Kind::Symlink { target: b"usr/lib".to_vec() }),
            node("long", Kind::Symlink { target: vec![b't'; 300] }),
            file(&format!("long-{}/name", "d".repeat(120)), &vec![7; 700], 0),
        ])
    }

    #[test]
    fn what_was_encoded_is_decoded() {
        assert_eq!(decode(&encode(&sample())), Ok(sample()));
        assert_eq!(decode(&encode(&Tree::default())), Ok(Tree::default()));
        let mut times = sample();
        times.edit(|nodes| {
            for (number, node) in nodes.iter_mut().enumerate() {
                node.entry.mtime = [(i64::MIN, 999_999_999), (i64::MAX, 0), (0, 1)][number % 3];
            }
        });
        assert_eq!(decode(&encode(&times)), Ok(times));
    }

    #[test]
    fn format_stays() {
        let name = layer_id(blake3::hash(&encode(&sample())).as_bytes()).0;
        assert_eq!(
            &*name, "3a9fdeb7a5d8e88f4f3b9e037f2ab10b935c912fe59eab9ec42e9ef167a1fe2e",
            "a new format needs a new version number"
        );
    }

    #[test]
    fn link_groups_are_numbered_by_path() {
        let with = |groups: [u32; 4]| {
            let nodes = ["a", "b", "c", "d"].iter().zip(groups).map(|(path, group)| file(path, b"x", group));
            Tree::from_nodes(nodes.collect())
        };
        let numbers = |tree: Tree| {
            let groups = LinkGroups::of(&tree);
            tree.iter().map(|node| groups.number(&node.entry)).collect::<Vec<_>>()
        };
        assert_eq!(numbers(with([9, 4, 9, 4])), [1, 2, 1, 2]);
        assert_eq!(numbers(with([9, 4, 9, 0])), [1, 0, 1, 0]);
        assert_eq!(numbers(with([9, 4, 9, 0]).number_links()), [1, 0, 1, 0]);
        assert_eq!(encode(&with([9, 4, 9, 4])), encode(&with([1, 2, 1, 2])));
        assert_eq!(content_key(&with([9, 4, 9, 4])), content_key(&with([2, 1, 2, 1])));
        assert_eq!(content_key(&with([3, 0, 0, 0])), content_key(&with([0, 0, 0, 0])));
        assert_ne!(content_key(&with([1, 1, 0, 0])), content_key(&with([1, 0, 1, 0])));
    }

    #[test]
    fn content_key_depends_on_all_but_times() {
        let changed = |change: &dyn Fn(&mut Entry)| {
            let mut tree = sample();
            tree.edit(|nodes| change(&mut nodes[0].entry));
            content_key(&tree) != content_key(&sample())
        };
        assert!(!changed(&|entry| entry.mtime = (1, 1)));
        assert!(changed(&|entry| entry.mode ^= 1));
        assert!(changed(&|entry| entry.uid = 9));
        assert!(changed(&|entry| entry.gid = 9));
        assert!(changed(&|entry| entry.kind = Kind::Whiteout));
        assert!(changed(&|entry| entry.path = b"a".to_vec()));
        assert!(changed(&|entry| drop(entry.xattrs.insert(b"a".to_vec(), b"b".to_vec()))));
        let xattrs = |pairs: &[(&str, &str)]| {
            let mut node = file("a", b"", 0);
            node.entry.xattrs =
                pairs.iter().map(|(name, value)| (name.as_bytes().into(), value.as_bytes().into())).collect();
            content_key(&Tree::from_nodes(vec![node]))
        };
        assert_ne!(xattrs(&[("a", "bc")]), xattrs(&[("ab", "c")]));
        let opaque = |opaque| content_key(&Tree::from_nodes(vec![node("a", Kind::Dir { opaque })]));
        assert_ne!(opaque(true), opaque(false));
        let target =
            |target: &[u8]| content_key(&Tree::from_nodes(vec![node("a", Kind::Symlink { target: target.into() })]));
        assert_ne!(target(b"a"), target(b"b"));
        assert_ne!(
            content_key(&Tree::from_nodes(vec![file("a", b"1", 0)])),
            content_key(&Tree::from_nodes(vec![file("a", b"2", 0)]))
        );
    }

    #[test]
    fn every_damage_is_noticed() {
        let good = encode(&sample());
        let whole = |bytes: &[u8]| is_whole(&mut &*bytes, bytes.len() as u64);
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(decode(&bad).is_err() && !whole(&bad), "flipped byte {at}");
            assert!(decode(&good[..at]).is_err() && !whole(&good[..at]), "cut to {at}");
        }
        assert!(whole(&good));
        let mut newer = good.clone();
        newer[8] = 2;
        assert_eq!(decode(&newer), Err(IndexError::Version { found: 2 }));
    }

    /// xorshift64.
    pub(in crate::tree) struct Random(pub(in crate::tree) u64);

    impl Random {
        pub(in crate::tree) fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let good = encode(&sample());
        for round in 0..20_000 {
            let mut body = if round % 2 == 0 {
                good[..good.len() - TRAILER].to_vec()
            } else {
                let mut body = good[..9].to_vec();
                body.extend((0..random.next() % 200).map(|_| (random.next() >> 32) as u8));
                body
            };
            for _ in 0..random.next() % 8 {
                let at = 9 + random.next() as usize % (body.len() - 8).max(1);
                if let Some(byte) = body.get_mut(at) {
                    *byte = random.next() as u8;
                }
            }
            // With a right trailer, so that the reader behind it is reached.
            let trailer = blake3::hash(&body);
            body.extend_from_slice(trailer.as_bytes());
            if let Ok(tree) = decode(&body) {
                assert!(tree.nodes().iter().all(|node| is_clean(&node.entry.path)));
            }
        }
    }

    #[test]
    fn hostile_indexes() {
        let sealed = |body: &[u8]| {
            let mut bytes = [MAGIC.as_slice(), &[VERSION], body].concat();
            let trailer = blake3::hash(&bytes);
            bytes.extend_from_slice(trailer.as_bytes());
            decode(&bytes).map_err(|error| match error {
                IndexError::Malformed { what, .. } => what,
                _ => "other",
            })
        };
        let whiteout = [WHITEOUT, 0, 0, 0, 0, 0];
        let entry = |shared: u8, path: &[u8]| [&[shared, path.len() as u8], path, &whiteout].concat();
        assert!(sealed(&[&[1], entry(0, b"a").as_slice()].concat()).is_ok());
        for path in [&b"/a"[..], b"a/", b"a//b", b".", b"..", b"a/../b", b"a\0"] {
            assert_eq!(sealed(&[&[1], entry(0, path).as_slice()].concat()), Err("path is not clean"));
        }
        assert_eq!(sealed(&[&[2], entry(0, b"b").as_slice(), &entry(0, b"a")].concat()), Err("paths out of order"));
        assert_eq!(sealed(&[&[2], entry(0, b"b").as_slice(), &entry(1, b"")].concat()), Err("paths out of order"));
        assert_eq!(
            sealed(&[&[1], entry(1, b"b").as_slice()].concat()),
            Err("shared prefix longer than the path before")
        );
        assert_eq!(sealed(&[0xff, 0xff, 0xff, 0xff, 0x0f]), Err("more entries than bytes"));
        assert_eq!(sealed(&[0xff; 12]), Err("number too large"));
        assert_eq!(sealed(&[0, 0]), Err("bytes after the last entry"));
        assert_eq!(sealed(&[&[1, 0, 0xff, 0xff, 3], [0; 9].as_slice()].concat()), Err("path too long"));
        assert_eq!(sealed(&[&[1, 0, 0x7f], [0; 9].as_slice()].concat()), Err("ends early"));
    }
}
