//! Nodes in little memory: a context can have very many.
//!
//! A tree is a list of blocks of up to [`BLOCK_NODES`] nodes. In a block each node is written as its difference to the one before:
//!
//! ```text
//! bytes shared with the path before | rest of the path (length, bytes)
//! kind and flags (2 bytes) | [mode | uid | gid] | mtime seconds (difference) | [nanoseconds (4 bytes)]
//! [file] size | [digest 32] | [link group]   [symlink] target   [device] major | minor
//! [xattrs] number | (name, value) …
//! [origin] [source | bytes of the path left out | bytes put in front of the rest] | [inode]
//! ```
//! Numbers are LEB128, differences zigzag. The path of an origin is mostly that of the node with another beginning, the same for
//! many nodes, so that only a change of that is written. The format is of this process alone; what is stored is `index`.
//!
//! Blocks are read from their beginning: [`Cursor`] decodes one node after the other into the same memory.

use super::index::{
    BLOCK, CHAR, DIR, FIFO, FILE, SYMLINK, kind_number, put, put_bytes, put_path, put_rest, unzigzag, zigzag,
};
use super::{Attributes, ContentDigest, Entry, Kind, LayerId, Node, Origin, compare_paths, is_within};
use rayon::prelude::*;
use std::cmp::Ordering;
use std::ffi::OsString;
use std::ops::ControlFlow;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Nodes of a block, at most: to find a path, half of them are decoded.
const BLOCK_NODES: u32 = 32;

const KIND_MASK: u8 = 0b111;
/// Of a directory.
const OPAQUE: u8 = 1 << 3;
/// Of a file.
const HAS_DIGEST: u8 = 1 << 3;
const HAS_LINKS: u8 = 1 << 4;
const HAS_XATTRS: u8 = 1 << 5;
/// Mode and owner are those of the last directory or of the last other node.
const SAME_OWNER: u8 = 1 << 6;
const WHOLE_SECONDS: u8 = 1 << 7;

const HAS_ORIGIN: u8 = 1;
/// The path of the origin follows from that of the node as it did for the node before.
const SAME_PLACE: u8 = 1 << 1;
const HAS_INODE: u8 = 1 << 2;
const SAME_DEVICE: u8 = 1 << 3;
const HAS_BIRTH: u8 = 1 << 4;

/// A file on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OnDisk {
    /// A directory that it is below.
    pub directory: Arc<Path>,
    /// Its path there; empty for the directory itself.
    pub path: Vec<u8>,
    /// What a walk saw.
    pub inode: Option<Inode>,
}

/// What a walk sees of an inode, beside its entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inode {
    /// Device of the file system.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Change time: seconds and nanoseconds.
    pub ctime: (i64, u32),
    /// Birth: seconds and nanoseconds; 0 where nobody asked, or the file system does not know.
    pub born: (i64, u32),
}

impl OnDisk {
    /// A file at a path that is in no directory of interest.
    pub fn at(path: &Path) -> Self {
        Self { directory: Arc::from(path), path: Vec::new(), inode: None }
    }

    /// Its whole path.
    pub fn whole(&self) -> PathBuf {
        let mut whole = Vec::new();
        self.write_whole(&mut whole);
        OsString::from_vec(whole).into()
    }

    /// Its whole path in place of what is in `out`, memory that is used again.
    pub(crate) fn write_whole(&self, out: &mut Vec<u8>) {
        out.clear();
        out.extend_from_slice(self.directory.as_os_str().as_bytes());
        if !self.path.is_empty() {
            if !out.ends_with(b"/") {
                out.push(b'/');
            }
            out.extend_from_slice(&self.path);
        }
    }
}

/// Where the bytes of several files are.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    Directory(Arc<Path>),
    Inline(Arc<[u8]>),
    Layer(LayerId),
}

impl Source {
    fn of(origin: &Origin) -> Option<Self> {
        Some(match origin {
            Origin::None => return None,
            Origin::File(file) => Self::Directory(file.directory.clone()),
            Origin::Inline(bytes) => Self::Inline(bytes.clone()),
            Origin::Layer(id, _) => Self::Layer(id.clone()),
        })
    }

    fn is_of(&self, origin: &Origin) -> bool {
        match (self, origin) {
            (Self::Directory(ours), Origin::File(OnDisk { directory, .. })) => {
                Arc::ptr_eq(ours, directory) || ours == directory
            }
            (Self::Inline(ours), Origin::Inline(bytes)) => Arc::ptr_eq(ours, bytes),
            (Self::Layer(ours), Origin::Layer(id, _)) => Arc::ptr_eq(&ours.0, &id.0) || ours == id,
            _ => false,
        }
    }
}

#[derive(Debug, Clone)]
struct Block {
    /// Number of its first node.
    start: usize,
    nodes: u32,
    bytes: Box<[u8]>,
}

impl Block {
    fn first_path(&self) -> &[u8] {
        let mut bytes = Bytes(&self.bytes);
        bytes.number();
        let length = bytes.length();
        bytes.take(length)
    }
}

/// Nodes in path order.
#[derive(Debug, Clone, Default)]
pub(super) struct Packed {
    blocks: Vec<Block>,
    len: usize,
    sources: Vec<Source>,
    has_links: bool,
    has_marks: bool,
    has_files: bool,
    unread: usize,
}

impl Packed {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Some file belongs to a group of hard links.
    pub(super) fn has_links(&self) -> bool {
        self.has_links
    }

    /// How many files have no digest.
    pub(super) fn unread(&self) -> usize {
        self.unread
    }

    /// There are regular files.
    pub(super) fn has_files(&self) -> bool {
        self.has_files
    }

    /// Something acts on layers below: a whiteout, an opaque directory.
    pub(super) fn has_marks(&self) -> bool {
        self.has_marks
    }

    /// The block in which a path stands or would stand.
    fn block_of(&self, path: &[u8]) -> usize {
        let behind = |block: &Block| compare_paths(block.first_path(), path).is_le();
        self.blocks.partition_point(behind).saturating_sub(1)
    }

    /// Layers that files are read from.
    pub(super) fn layers(&self) -> impl Iterator<Item = &LayerId> {
        self.sources.iter().filter_map(|source| match source {
            Source::Layer(id) => Some(id),
            Source::Directory(_) | Source::Inline(_) => None,
        })
    }
}

/// How the path of an origin follows from that of its node: without its first `strip` bytes, `prefix` in front.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Place {
    source: usize,
    strip: usize,
    prefix: Vec<u8>,
}

impl Place {
    fn of(source: usize, entry: &[u8], path: &[u8]) -> Self {
        let alike = entry.iter().rev().zip(path.iter().rev()).take_while(|(a, b)| a == b).count();
        // Whole components, as those of other nodes.
        let is_edge = |length: &usize| {
            let starts = |whole: &[u8]| {
                let (front, end) = whole.split_at(whole.len() - length);
                front.is_empty() || front.ends_with(b"/") || end.starts_with(b"/")
            };
            *length == 0 || starts(entry) && starts(path)
        };
        let alike = (0..=alike).rev().find(is_edge).unwrap_or(0);
        Self { source, strip: entry.len() - alike, prefix: path[..path.len() - alike].to_vec() }
    }

    fn gives(&self, source: usize, entry: &[u8], path: &[u8]) -> bool {
        let rest = || path.strip_prefix(self.prefix.as_slice());
        self.source == source && entry.get(self.strip..).is_some_and(|end| rest() == Some(end))
    }
}

/// What is known of the nodes before in a block.
#[derive(Debug, Clone, Default)]
struct Before {
    /// Mode, user and group of the last directory, and of the last other node.
    owners: [(u32, u32, u32); 2],
    mtime: i64,
    place: Option<Place>,
    dev: u64,
    ino: u64,
}

/// Makes a tree of nodes that come in path order, each path once.
#[derive(Debug, Clone, Default)]
pub struct TreeBuilder {
    packed: Packed,
    bytes: Vec<u8>,
    nodes: u32,
    path: Vec<u8>,
    before: Before,
}

impl TreeBuilder {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many nodes there are.
    pub fn len(&self) -> usize {
        self.packed.len + self.nodes as usize
    }

    /// Nothing has been pushed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Path of the last node.
    pub fn last_path(&self) -> Option<&[u8]> {
        (!self.is_empty()).then_some(&self.path)
    }

    /// Does this path stand behind that of the last node?
    pub fn comes_last(&self, path: &[u8]) -> bool {
        self.last_path().is_none_or(|last| compare_paths(last, path).is_lt())
    }

    /// Adds a node, whose path must stand behind that of the last.
    pub fn push(&mut self, entry: &Entry, origin: &Origin) {
        debug_assert!(self.comes_last(&entry.path), "{:?} after {:?}", entry.path, self.path);
        let source = self.source_of(origin);
        if self.nodes == BLOCK_NODES {
            self.end_block();
        }
        if self.nodes == 0 {
            self.path.clear();
        }
        put_path(&mut self.bytes, &mut self.path, &entry.path);
        self.packed.has_links |= entry.link_group() != 0;
        self.packed.has_files |= entry.is_file();
        self.packed.unread += usize::from(is_unread(entry));
        self.packed.has_marks |= matches!(entry.kind, Kind::Whiteout | Kind::Dir { opaque: true });
        encode(&mut self.bytes, &mut self.before, entry, origin, source);
        self.nodes += 1;
    }

    /// Adds a node, whose path must stand behind that of the last.
    pub fn push_node(&mut self, node: &Node) {
        self.push(&node.entry, &node.origin);
    }

    fn source_of(&mut self, origin: &Origin) -> Option<usize> {
        if *origin == Origin::None {
            return None;
        }
        let last = self.before.place.as_ref().map(|place| place.source);
        if let Some(last) = last.filter(|&last| self.packed.sources[last].is_of(origin)) {
            return Some(last);
        }
        let known = self.packed.sources.iter().position(|source| source.is_of(origin));
        known.or_else(|| {
            self.packed.sources.push(Source::of(origin)?);
            Some(self.packed.sources.len() - 1)
        })
    }

    fn end_block(&mut self) {
        if self.nodes > 0 {
            let block = Block { start: self.packed.len, nodes: self.nodes, bytes: self.bytes.as_slice().into() };
            self.packed.len += self.nodes as usize;
            self.packed.blocks.push(block);
            self.bytes.clear();
            self.nodes = 0;
            self.before = Before::default();
        }
    }

    /// Adds all nodes of another, whose paths must stand behind that of the last node.
    pub(crate) fn append(&mut self, other: TreeBuilder) {
        if other.is_empty() {
            return;
        }
        let TreeBuilder { packed, bytes, nodes, path, before } = other;
        if self.packed.sources.starts_with(&packed.sources) {
            // All of theirs are known.
        } else if packed.sources.starts_with(&self.packed.sources) {
            self.packed.sources = packed.sources;
        } else {
            let open = Block { start: 0, nodes, bytes: bytes.into() };
            for block in packed.blocks.iter().chain((nodes > 0).then_some(&open)) {
                self.push_all(&block.bytes, block.nodes, &packed.sources);
            }
            return;
        }
        self.packed.has_links |= packed.has_links;
        self.packed.has_marks |= packed.has_marks;
        self.packed.has_files |= packed.has_files;
        let unread = self.packed.unread + packed.unread;
        for block in packed.blocks {
            // Full ones are moved as they are.
            if block.nodes < BLOCK_NODES && self.nodes + block.nodes <= BLOCK_NODES {
                let sources = self.packed.sources.clone();
                self.push_all(&block.bytes, block.nodes, &sources);
            } else {
                self.end_block();
                let start = self.packed.len;
                self.packed.len += block.nodes as usize;
                self.packed.blocks.push(Block { start, ..block });
            }
        }
        if self.nodes > 0 && self.nodes + nodes <= BLOCK_NODES {
            let sources = self.packed.sources.clone();
            self.push_all(&bytes, nodes, &sources);
        } else {
            self.end_block();
            (self.bytes, self.nodes, self.before) = (bytes, nodes, before);
        }
        (self.path, self.packed.unread) = (path, unread);
    }

    fn push_all(&mut self, bytes: &[u8], nodes: u32, sources: &[Source]) {
        let mut cursor = Cursor::of_block(bytes, nodes, sources);
        while let Some(node) = cursor.next() {
            self.push_node(node);
        }
    }

    /// The node at exactly this path.
    pub fn get(&self, path: &[u8]) -> Option<Node> {
        if self.comes_last(path) {
            return None;
        }
        let open = Cursor::of_block(&self.bytes, self.nodes, &self.packed.sources);
        open.find(path).or_else(|| {
            let block = self.packed.blocks.get(self.packed.block_of(path))?;
            Cursor::of_block(&block.bytes, block.nodes, &self.packed.sources).find(path)
        })
    }

    /// Shows entries at and below a path, until `more` says that it has seen enough; whether it never did.
    pub(super) fn each_within(&self, path: &[u8], mut more: impl FnMut(&Entry) -> bool) -> bool {
        if self.comes_last(path) {
            return true;
        }
        let mut packed = Cursor::new(&self.packed, None);
        packed.go_to_path(&self.packed, path);
        let mut open = Cursor::of_block(&self.bytes, self.nodes, &self.packed.sources);
        for cursor in [&mut packed, &mut open] {
            while let Some(Node { entry, .. }) = cursor.next() {
                let is_inside = is_within(&entry.path, path);
                if is_inside && !more(entry) {
                    return false;
                }
                if !is_inside && compare_paths(&entry.path, path).is_gt() {
                    break;
                }
            }
        }
        true
    }

    /// The tree.
    pub fn finish(mut self) -> super::Tree {
        self.end_block();
        self.packed.blocks.shrink_to_fit();
        super::Tree { packed: Arc::new(self.packed), all_in: None }
    }
}

fn is_unread(entry: &Entry) -> bool {
    matches!(entry.kind, Kind::File { digest: None, .. })
}

fn encode(out: &mut Vec<u8>, before: &mut Before, entry: &Entry, origin: &Origin, source: Option<usize>) {
    let at = out.len();
    out.extend_from_slice(&[0; 2]);
    let mut flags = match &entry.kind {
        Kind::File { digest, link_group, .. } => {
            let digest = if digest.is_some() { HAS_DIGEST } else { 0 };
            digest | if *link_group != 0 { HAS_LINKS } else { 0 }
        }
        Kind::Dir { opaque: true } => OPAQUE,
        _ => 0,
    };
    let owner = &mut before.owners[usize::from(entry.is_dir())];
    if *owner == (entry.mode, entry.uid, entry.gid) {
        flags |= SAME_OWNER;
    } else {
        *owner = (entry.mode, entry.uid, entry.gid);
        for number in [entry.mode, entry.uid, entry.gid] {
            put(out, u64::from(number));
        }
    }
    put(out, zigzag(entry.mtime.0.wrapping_sub(before.mtime)));
    before.mtime = entry.mtime.0;
    match entry.mtime.1 {
        0 => flags |= WHOLE_SECONDS,
        nanoseconds => out.extend_from_slice(&nanoseconds.to_le_bytes()),
    }
    flags |= if entry.xattrs.is_empty() { 0 } else { HAS_XATTRS };
    put_rest(out, entry, entry.link_group());
    let more = encode_origin(out, before, entry, origin, source);
    out[at] = kind_number(&entry.kind) | flags;
    out[at + 1] = more;
}

fn encode_origin(out: &mut Vec<u8>, before: &mut Before, entry: &Entry, origin: &Origin, source: Option<usize>) -> u8 {
    let Some(source) = source else { return 0 };
    let mut flags = HAS_ORIGIN;
    let (path, inode): (&[u8], _) = match origin {
        Origin::File(OnDisk { path, inode, .. }) => (path, *inode),
        Origin::Layer(_, path) => (path, None),
        Origin::Inline(_) | Origin::None => (&[], None),
    };
    if before.place.as_ref().is_some_and(|place| place.gives(source, &entry.path, path)) {
        flags |= SAME_PLACE;
    } else {
        let place = Place::of(source, &entry.path, path);
        put(out, place.source as u64);
        put(out, place.strip as u64);
        put_bytes(out, &place.prefix);
        before.place = Some(place);
    }
    if let Some(Inode { dev, ino, ctime, born }) = inode {
        flags |= HAS_INODE;
        match dev == before.dev {
            true => flags |= SAME_DEVICE,
            false => put(out, dev),
        }
        put(out, zigzag(ino.wrapping_sub(before.ino) as i64));
        (before.dev, before.ino) = (dev, ino);
        let mut time = |time: (i64, u32)| {
            put(out, zigzag(time.0.wrapping_sub(entry.mtime.0)));
            out.extend_from_slice(&time.1.to_le_bytes());
        };
        time(ctime);
        if born != (0, 0) {
            flags |= HAS_BIRTH;
            time(born);
        }
    }
    flags
}

/// What is left to be decoded of a block. Blocks are of this process, so that nothing is ever missing.
#[derive(Debug, Clone, Copy)]
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    fn number(&mut self) -> u64 {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte();
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        number
    }

    fn length(&mut self) -> usize {
        usize::try_from(self.number()).unwrap_or(usize::MAX)
    }

    fn small(&mut self) -> u32 {
        u32::try_from(self.number()).unwrap_or(u32::MAX)
    }

    fn take(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn counted(&mut self) -> &'a [u8] {
        let length = self.length();
        self.take(length)
    }

    fn nanoseconds(&mut self) -> u32 {
        self.take(4).try_into().map_or(0, u32::from_le_bytes)
    }
}

/// Goes through a tree in path order, one node at a time.
#[derive(Debug, Clone)]
pub struct Cursor<'a> {
    blocks: &'a [Block],
    sources: &'a [Source],
    /// All files are read from here, at their own paths.
    all_in: Option<&'a LayerId>,
    /// What is left of the block that is being read.
    bytes: Bytes<'a>,
    nodes: u32,
    /// Number of the next node.
    number: usize,
    before: Before,
    node: Node,
    /// Memory of the last origin while a node without one is shown.
    spare: Origin,
    /// The node was decoded, but not given yet.
    is_ready: bool,
    /// Ends behind what is at or below this path.
    within: Option<Vec<u8>>,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(packed: &'a Packed, all_in: Option<&'a LayerId>) -> Self {
        Self { blocks: &packed.blocks, all_in, ..Self::of_block(&[], 0, &packed.sources) }
    }

    fn of_block(bytes: &'a [u8], nodes: u32, sources: &'a [Source]) -> Self {
        Self {
            blocks: &[],
            sources,
            all_in: None,
            bytes: Bytes(bytes),
            nodes,
            number: 0,
            before: Before::default(),
            node: Node { entry: Entry::dir(Vec::new(), 0), origin: Origin::None },
            spare: Origin::None,
            is_ready: false,
            within: None,
        }
    }

    /// Goes on with the node of this number.
    pub(super) fn go_to(&mut self, packed: &'a Packed, number: usize) {
        let at = packed.blocks.partition_point(|block| block.start <= number).saturating_sub(1);
        self.begin_at(packed, at);
        while self.number < number && self.decode() {}
    }

    /// Goes on with the first node at or behind this path.
    pub(super) fn go_to_path(&mut self, packed: &'a Packed, path: &[u8]) {
        self.begin_at(packed, packed.block_of(path));
        while self.decode() {
            if compare_paths(&self.node.entry.path, path).is_ge() {
                self.is_ready = true;
                return;
            }
        }
    }

    fn begin_at(&mut self, packed: &'a Packed, block: usize) {
        self.blocks = packed.blocks.get(block..).unwrap_or_default();
        self.number = self.blocks.first().map_or(packed.len, |block| block.start);
        (self.nodes, self.is_ready) = (0, false);
    }

    /// Ends behind what is at or below this path.
    pub(super) fn until(&mut self, within: &[u8]) {
        self.within = (!within.is_empty()).then(|| within.to_vec());
    }

    /// The next node, until the one after that.
    #[expect(clippy::should_implement_trait, reason = "what is given is only lent")]
    pub fn next(&mut self) -> Option<&Node> {
        if !self.is_ready && !self.decode() {
            return None;
        }
        self.is_ready = false;
        match &self.within {
            Some(within) if !is_within(&self.node.entry.path, within) => {
                (self.blocks, self.nodes) = (&[], 0);
                None
            }
            _ => Some(&self.node),
        }
    }

    /// Number in the tree of the node that was given last, counted from 0.
    pub fn number(&self) -> usize {
        self.number.saturating_sub(1)
    }

    /// The node that was given last.
    pub fn node(&self) -> &Node {
        &self.node
    }

    fn find(mut self, path: &[u8]) -> Option<Node> {
        while self.decode() {
            match compare_paths(&self.node.entry.path, path) {
                Ordering::Less => {}
                Ordering::Equal => return Some(self.node),
                Ordering::Greater => return None,
            }
        }
        None
    }

    fn decode(&mut self) -> bool {
        if self.nodes == 0 {
            let Some((first, rest)) = self.blocks.split_first() else { return false };
            (self.bytes, self.nodes, self.blocks) = (Bytes(&first.bytes), first.nodes, rest);
            self.before.owners = Default::default();
            (self.before.mtime, self.before.dev, self.before.ino) = (0, 0, 0);
        }
        self.nodes -= 1;
        self.number += 1;
        let entry = &mut self.node.entry;
        let bytes = &mut self.bytes;
        let shared = bytes.length();
        let rest = bytes.counted();
        entry.path.truncate(shared);
        entry.path.extend_from_slice(rest);
        let (flags, more) = (bytes.byte(), bytes.byte());
        let kind = flags & KIND_MASK;
        let owner = &mut self.before.owners[usize::from(kind == DIR)];
        if flags & SAME_OWNER == 0 {
            *owner = (bytes.small(), bytes.small(), bytes.small());
        }
        (entry.mode, entry.uid, entry.gid) = *owner;
        self.before.mtime = self.before.mtime.wrapping_add(unzigzag(bytes.number()));
        let nanoseconds = if flags & WHOLE_SECONDS == 0 { bytes.nanoseconds() } else { 0 };
        entry.mtime = (self.before.mtime, nanoseconds);
        entry.kind = match kind {
            FILE => {
                let size = bytes.number();
                let digest = if flags & HAS_DIGEST == 0 { None } else { ContentDigest::try_from(bytes.take(32)).ok() };
                let link_group = if flags & HAS_LINKS == 0 { 0 } else { bytes.small() };
                Kind::File { size, digest, link_group }
            }
            DIR => Kind::Dir { opaque: flags & OPAQUE != 0 },
            SYMLINK => Kind::Symlink { target: bytes.counted().to_vec() },
            FIFO => Kind::Fifo,
            CHAR => Kind::Char { major: bytes.small(), minor: bytes.small() },
            BLOCK => Kind::Block { major: bytes.small(), minor: bytes.small() },
            _ => Kind::Whiteout,
        };
        if !entry.xattrs.is_empty() {
            entry.xattrs = Attributes::default();
        }
        if flags & HAS_XATTRS != 0 {
            for _ in 0..bytes.number() {
                entry.xattrs.insert(bytes.counted().to_vec(), bytes.counted().to_vec());
            }
        }
        self.decode_origin(more);
        true
    }

    fn decode_origin(&mut self, flags: u8) {
        let Self { node: Node { entry, origin }, before, bytes, sources, spare, .. } = self;
        let has_origin = match self.all_in {
            Some(_) => entry.is_file(),
            None => flags & HAS_ORIGIN != 0,
        };
        let mut is_new = false;
        if flags & HAS_ORIGIN != 0 && flags & SAME_PLACE == 0 {
            let (source, strip) = (bytes.length(), bytes.length());
            let prefix = bytes.counted();
            is_new = before.place.as_ref().is_none_or(|place| place.source != source);
            let place = before.place.get_or_insert_default();
            (place.source, place.strip) = (source, strip);
            place.prefix.clear();
            place.prefix.extend_from_slice(prefix);
        }
        let inode = (flags & HAS_INODE != 0).then(|| {
            if flags & SAME_DEVICE == 0 {
                before.dev = bytes.number();
            }
            before.ino = before.ino.wrapping_add(unzigzag(bytes.number()) as u64);
            let mut time = || (entry.mtime.0.wrapping_add(unzigzag(bytes.number())), bytes.nanoseconds());
            let ctime = time();
            let born = if flags & HAS_BIRTH != 0 { time() } else { (0, 0) };
            Inode { dev: before.dev, ino: before.ino, ctime, born }
        });
        if !has_origin {
            if *origin != Origin::None {
                *spare = std::mem::replace(origin, Origin::None);
            }
            // What was kept is of another source.
            if is_new {
                *spare = Origin::None;
            }
            return;
        }
        if *origin == Origin::None {
            std::mem::swap(origin, spare);
        }
        if let Some(id) = self.all_in {
            match origin {
                Origin::Layer(_, path) => path.clone_from(&entry.path),
                _ => *origin = Origin::Layer(id.clone(), entry.path.clone()),
            }
            return;
        }
        let Some(place) = &before.place else { return };
        if is_new || *origin == Origin::None {
            *origin = match sources.get(place.source) {
                Some(Source::Directory(directory)) => {
                    Origin::File(OnDisk { directory: directory.clone(), path: Vec::new(), inode: None })
                }
                Some(Source::Inline(bytes)) => Origin::Inline(bytes.clone()),
                Some(Source::Layer(id)) => Origin::Layer(id.clone(), Vec::new()),
                None => Origin::None,
            };
        }
        if let Origin::File(OnDisk { path, .. }) | Origin::Layer(_, path) = origin {
            path.clear();
            path.extend_from_slice(&place.prefix);
            path.extend_from_slice(entry.path.get(place.strip..).unwrap_or_default());
        }
        if let Origin::File(file) = origin {
            file.inode = inode;
        }
    }
}

/// Goes through two trees at once, in path order.
#[derive(Debug, Clone)]
pub(crate) struct Zip<'a> {
    cursors: [Cursor<'a>; 2],
    /// Which have a node that is still to be given.
    has: [bool; 2],
    /// Of which the last was given.
    given: [bool; 2],
}

impl<'a> Zip<'a> {
    pub(super) fn new(ours: Cursor<'a>, theirs: Cursor<'a>) -> Self {
        Self { cursors: [ours, theirs], has: [false; 2], given: [true; 2] }
    }

    /// What both have at the next path at which one of them has something, until the one after that.
    pub(crate) fn next(&mut self) -> Option<(Option<&Node>, Option<&Node>)> {
        for ((cursor, has), given) in self.cursors.iter_mut().zip(&mut self.has).zip(self.given) {
            if given {
                *has = cursor.next().is_some();
            }
        }
        let [ours, theirs] = &self.cursors;
        let (ours, theirs) = (ours.node(), theirs.node());
        self.given = match self.has {
            [false, false] => return None,
            [true, true] => {
                let order = compare_paths(&ours.entry.path, &theirs.entry.path);
                [order.is_le(), order.is_ge()]
            }
            has => has,
        };
        Some((self.given[0].then_some(ours), self.given[1].then_some(theirs)))
    }
}

/// As many blocks are given to a thread at a time, at most.
const BLOCKS_AT_ONCE: usize = 64;

/// Some nodes of a tree that follow each other.
pub(crate) struct Part<'a> {
    blocks: &'a [Block],
    sources: &'a [Source],
}

impl Part<'_> {
    /// Number of the first node.
    pub(crate) fn first(&self) -> usize {
        self.blocks.first().map_or(0, |block| block.start)
    }

    /// Shows the nodes one after the other, until `look` has seen enough.
    pub(crate) fn each(&self, mut look: impl FnMut(&Node) -> ControlFlow<()>) {
        for block in self.blocks {
            let mut cursor = Cursor::of_block(&block.bytes, block.nodes, self.sources);
            while cursor.decode() {
                if look(&cursor.node).is_break() {
                    return;
                }
            }
        }
    }
}

/// See [`super::Tree::update`].
pub(super) fn update<S: Send, T: Send, E: Send>(
    packed: Arc<Packed>,
    state: impl Fn(&Part<'_>) -> S + Sync,
    change: impl Fn(&mut S, &mut Entry, &mut Origin) -> Result<(), E> + Sync,
    done: impl Fn(S) -> T + Sync,
) -> Result<(Packed, Vec<T>), E> {
    let Packed { blocks, len, sources, has_links, has_marks, has_files, .. } = Arc::unwrap_or_clone(packed);
    let part = |part: Vec<Block>| -> Result<(Vec<Block>, usize, T), E> {
        let mut state = state(&Part { blocks: &part, sources: &sources });
        let mut changed = Vec::with_capacity(part.len());
        let (mut bytes, mut unread) = (Vec::new(), 0);
        for block in part {
            let mut cursor = Cursor::of_block(&block.bytes, block.nodes, &sources);
            let mut before = Before::default();
            let mut path: Vec<u8> = Vec::new();
            bytes.clear();
            while cursor.decode() {
                let source = match &cursor.node.origin {
                    Origin::None => None,
                    _ => cursor.before.place.as_ref().map(|place| place.source),
                };
                let Node { entry, origin } = &mut cursor.node;
                change(&mut state, entry, origin)?;
                unread += usize::from(is_unread(entry));
                put_path(&mut bytes, &mut path, &entry.path);
                encode(&mut bytes, &mut before, entry, origin, source);
            }
            changed.push(Block { bytes: bytes.as_slice().into(), ..block });
        }
        Ok((changed, unread, done(state)))
    };
    // A pool of threads is woken for many files only; and of those each thread gets several parts, as they differ in size.
    let changed: Vec<(Vec<Block>, usize, T)> = if len < 64 {
        vec![part(blocks)?]
    } else {
        let at_once = (blocks.len() / (8 * rayon::current_num_threads())).clamp(1, BLOCKS_AT_ONCE);
        let mut blocks = blocks.into_iter();
        let parts = std::iter::from_fn(|| {
            let part: Vec<Block> = blocks.by_ref().take(at_once).collect();
            (!part.is_empty()).then_some(part)
        });
        let parts: Vec<Vec<Block>> = parts.collect();
        parts.into_par_iter().map(part).collect::<Result<_, E>>()?
    };
    let mut packed = Packed { blocks: Vec::new(), len, sources, has_links, has_marks, has_files, unread: 0 };
    let mut results = Vec::with_capacity(changed.len());
    for (blocks, unread, done) in changed {
        packed.blocks.extend(blocks);
        packed.unread += unread;
        results.push(done);
    }
    Ok((packed, results))
}

#[cfg(test)]
mod tests {
    use super::super::Tree;
    use super::super::index::tests::Random;
    use super::*;
    use std::convert::Infallible;

    /// Nodes of all kinds, with origins of all kinds, in tree order.
    fn nodes(random: &mut Random, count: usize) -> Vec<Node> {
        let directories: [Arc<Path>; 3] =
            [Arc::from(Path::new("/ctx")), Arc::from(Path::new("/other")), Arc::from(Path::new("/"))];
        let inline: Arc<[u8]> = Arc::from(&b"inline"[..]);
        let layers = [LayerId("one".into()), LayerId("two".into())];
        let mut nodes: Vec<Node> = Vec::new();
        for _ in 0..count {
            let mut below = |number: u64| random.next() % number;
            let names = ["a", "b", "b-c", "lib", "file", "x\u{17e}"];
            let depth = below(4);
            let mut path: Vec<u8> =
                (0..depth).map(|_| names[below(6) as usize].as_bytes()).collect::<Vec<_>>().join(&b'/');
            if below(20) > 0 {
                path = super::super::join(&path, format!("f{}", below(5000)).as_bytes());
            }
            let kind = match below(12) {
                0 => Kind::Dir { opaque: below(2) == 0 },
                1 => Kind::Symlink { target: format!("../t{}", below(100)).into_bytes() },
                2 => Kind::Fifo,
                3 => Kind::Char { major: below(300) as u32, minor: below(70_000_000) as u32 },
                4 => Kind::Block { major: 8, minor: 1 },
                5 => Kind::Whiteout,
                _ => {
                    let digest = (below(2) == 0).then(|| *blake3::hash(&path).as_bytes());
                    Kind::File { size: random.next() >> (random.next() % 64), digest, link_group: 0 }
                }
            };
            let mut below = |number: u64| random.next() % number;
            let mut entry = Entry { kind, ..Entry::dir(path, 0o644) };
            if below(4) == 0 {
                (entry.mode, entry.uid, entry.gid) =
                    (below(0o10000) as u32, below(1 << 32) as u32, below(1 << 32) as u32);
            }
            if let (Kind::File { link_group, .. }, 0) = (&mut entry.kind, below(9)) {
                *link_group = 1 + below(4) as u32;
            }
            entry.mtime = match below(8) {
                0 => (i64::MIN, 999_999_999),
                1 => (i64::MAX, 1),
                2 => (0, 0),
                _ => (1_700_000_000 + below(1000) as i64, below(1_000_000_000) as u32),
            };
            if below(10) == 0 {
                entry.xattrs.insert(b"user.x".to_vec(), vec![0; below(300) as usize]);
            }
            let inode = (below(3) > 0).then(|| Inode {
                dev: if below(9) == 0 { u64::MAX } else { 7 },
                ino: if below(9) == 0 { u64::MAX } else { below(1 << 40) },
                ctime: if below(2) == 0 { entry.mtime } else { (below(1 << 40) as i64, 3) },
                born: if below(2) == 0 { (0, 0) } else { (i64::MAX, 999_999_999) },
            });
            let strip = (below(entry.path.len() as u64 + 1)) as usize;
            let other = [b"src/", &entry.path[strip..]].concat();
            let origin = match below(8) {
                0 => Origin::None,
                1 => Origin::Inline(inline.clone()),
                2 => Origin::Layer(layers[below(2) as usize].clone(), entry.path.clone()),
                3 => Origin::File(OnDisk { directory: directories[2].clone(), path: Vec::new(), inode }),
                4 => Origin::File(OnDisk { directory: directories[1].clone(), path: other, inode }),
                _ => Origin::File(OnDisk { directory: directories[0].clone(), path: entry.path.clone(), inode }),
            };
            nodes.push(Node { entry, origin });
        }
        nodes.sort_by(|a, b| compare_paths(&a.entry.path, &b.entry.path));
        nodes.dedup_by(|a, b| a.entry.path == b.entry.path);
        nodes
    }

    #[test]
    fn what_was_packed_is_unpacked() {
        let mut random = Random(0x1234_5678_9abc_def1);
        for round in 0..300 {
            let count = (random.next() % 200) as usize;
            let all = nodes(&mut random, count);
            let tree: Tree = all.iter().cloned().collect();
            assert_eq!(tree.nodes(), all, "round {round}");
            assert_eq!(tree.len(), all.len());
            let unread = |node: &&Node| matches!(node.entry.kind, Kind::File { digest: None, .. });
            assert_eq!(tree.unread(), all.iter().filter(unread).count());
            assert_eq!(tree.has_links(), all.iter().any(|node| node.entry.link_group() != 0));
            for (at, node) in all.iter().enumerate() {
                assert_eq!(tree.node(at).as_ref(), Some(node));
                assert_eq!(tree.get(&node.entry.path).as_ref(), Some(node));
            }
            for path in [&b""[..], b"a", b"b", b"b/a", b"b-c", b"lib/lib", b"z", b"a/nothing", b"0"] {
                let inside: Vec<Node> = all.iter().filter(|node| is_within(&node.entry.path, path)).cloned().collect();
                assert_eq!(tree.subtree(path).collect::<Vec<_>>(), inside, "{path:?}");
                assert_eq!(tree.holds(path), !inside.is_empty());
                assert_eq!(tree.has_content(path), inside.iter().any(|node| node.entry.path != path));
                assert_eq!(tree.get(path), inside.into_iter().find(|node| node.entry.path == path));
            }
            let mut from = tree.cursor_at(all.len() / 2);
            for (at, node) in all.iter().enumerate().skip(all.len() / 2) {
                assert_eq!(from.next(), Some(node));
                assert_eq!(from.number(), at);
            }
            assert_eq!(from.next(), None);
        }
    }

    #[test]
    fn trees_in_layers_are_read_from_there() {
        let all = nodes(&mut Random(99), 300);
        let id = LayerId("layer".into());
        let tree = all.iter().cloned().collect::<Tree>().in_layer(&id);
        let expected = all.into_iter().map(|Node { entry, .. }| {
            let origin = match entry.is_file() {
                true => Origin::Layer(id.clone(), entry.path.clone()),
                false => Origin::None,
            };
            Node { entry, origin }
        });
        let expected: Vec<Node> = expected.collect();
        assert_eq!(tree.nodes(), expected);
        assert_eq!(tree.layers(), std::slice::from_ref(&id));
        // Where there are no files, nothing is read from there.
        let bare: Tree = expected.iter().filter(|node| !node.entry.is_file()).cloned().collect();
        assert_eq!(bare.in_layer(&id).layers(), []);
        assert_eq!(tree.map(|_| true).nodes(), expected);
    }

    #[test]
    fn parts_are_put_together() {
        let mut random = Random(0xfeed_beef_0123_4567);
        for _ in 0..300 {
            let count = (random.next() % 300) as usize;
            let all = nodes(&mut random, count);
            let mut whole = TreeBuilder::new();
            let mut rest = all.as_slice();
            while !rest.is_empty() {
                let (part, behind) = rest.split_at(rest.len().min(random.next() as usize % 70));
                let mut builder = TreeBuilder::new();
                part.iter().for_each(|node| builder.push_node(node));
                assert_eq!(builder.last_path(), part.last().map(|node| node.entry.path.as_slice()));
                whole.append(builder);
                assert_eq!(whole.len(), all.len() - behind.len());
                for node in part {
                    assert_eq!(whole.get(&node.entry.path).as_ref(), Some(node));
                }
                // Some one by one.
                let (singly, behind) = behind.split_at(behind.len().min(random.next() as usize % 5));
                singly.iter().for_each(|node| whole.push_node(node));
                rest = behind;
            }
            assert_eq!(whole.finish(), all.into_iter().collect());
        }
    }

    #[test]
    fn entries_are_changed_in_parts() {
        for count in [0, 10, 500, 40_000] {
            let all = nodes(&mut Random(0xabcd_ef01), count);
            let mut tree: Tree = all.iter().cloned().collect();
            let change = |number: &mut usize, entry: &mut Entry, origin: &mut Origin| {
                if let (Kind::File { digest, .. }, Origin::File(file)) = (&mut entry.kind, origin) {
                    (*digest, file.inode) = (Some([*number as u8; 32]), None);
                }
                entry.mtime.0 = *number as i64;
                *number += 1;
                Ok::<(), Infallible>(())
            };
            let Ok(ends) = tree.update(|part| part.first(), change, |end| end);
            assert!(ends.is_sorted() && ends.last().is_none_or(|&last| last == all.len()));
            let expected = all
                .into_iter()
                .enumerate()
                .map(|(number, mut node)| change(&mut { number }, &mut node.entry, &mut node.origin).map(|()| node));
            let Ok(expected) = expected.collect::<Result<Tree, Infallible>>();
            assert_eq!(tree.unread(), expected.unread());
            assert!(tree == expected, "{count} nodes");
            let mut failing = tree;
            let fail = |(): &mut (), _: &mut Entry, _: &mut Origin| Err(());
            assert_eq!(failing.update(|_| (), fail, |()| ()).is_err(), count > 0);
        }
    }

    #[test]
    fn a_node_takes_little_memory() {
        let directory: Arc<Path> = Arc::from(Path::new("/home/somebody/project"));
        let mut builder = TreeBuilder::new();
        for number in 0..10_000_u64 {
            let path = format!("src/d{:02}/file{number:06}", number / 100).into_bytes();
            let digest = Some(*blake3::hash(&path).as_bytes());
            let kind = Kind::File { size: 1000 + number % 500, digest, link_group: 0 };
            let mtime = (1_700_000_000 + number as i64 / 7, number as u32 * 99_991);
            let entry = Entry { kind, mtime, ..Entry::dir(path.clone(), 0o644) };
            builder.push(&entry, &Origin::File(OnDisk { directory: directory.clone(), path, inode: None }));
        }
        let bytes: usize = builder.packed.blocks.iter().map(|block| block.bytes.len() + size_of::<Block>()).sum();
        assert!(bytes < 55 * 10_000, "{bytes} bytes");
    }
}
