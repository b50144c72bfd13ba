//! File trees as values: what a layer or a snapshot holds, without touching a disk.
//!
//! A [`Node`] is one path's metadata plus where its bytes can be read ([`Origin`]). A [`Tree`] is a sorted table of
//! them: a context, a layer, or a stack of layers flattened. Paths are bytes without a leading slash, `/`-separated;
//! the root is the empty path. Order is component-wise byte order (`/` sorts before every other byte), so that a
//! directory stands directly before what is in it.

pub mod archive;
pub mod blob;
pub mod glob;
pub mod ignore;
pub mod index;
pub mod layer;
mod member;
pub(crate) mod node_map;
mod packed;
pub mod stream;
mod tar_stream;

pub use packed::{Cursor, Inode, OnDisk, TreeBuilder};
pub(crate) use packed::{Part, Zip};

use std::collections::BTreeMap;
use std::sync::Arc;

/// BLAKE3 digest of a file's bytes; internal, never in an image.
pub type ContentDigest = [u8; 32];

/// One path of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path without leading slash; empty is the root.
    pub path: Vec<u8>,
    /// Kind and what only that kind has.
    pub kind: Kind,
    /// Permission bits with set-id and sticky bits (07777).
    pub mode: u32,
    /// Owner as the image has it.
    pub uid: u32,
    /// Group as the image has it.
    pub gid: u32,
    /// Modification time: seconds and nanoseconds since the epoch.
    pub mtime: (i64, u32),
    /// Extended attributes that are kept (`security.capability`, `user.*` from RUN …), raw values.
    pub xattrs: Attributes,
}

/// Kinds of entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Regular file.
    File {
        /// Bytes.
        size: u64,
        /// `None` until it has been read (contexts are read lazily).
        digest: Option<ContentDigest>,
        /// Entries with the same number other than 0 are one inode. In path order the first of them carries the data.
        link_group: u32,
    },
    /// Directory.
    Dir {
        /// Hides what lower layers have below this path.
        opaque: bool,
    },
    /// Symbolic link.
    Symlink {
        /// Its target.
        target: Vec<u8>,
    },
    /// Named pipe.
    Fifo,
    /// Character device.
    Char {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// Block device.
    Block {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// Removes the path of lower layers; only in layers, never in a flattened tree.
    Whiteout,
}

/// Where the bytes of a regular file can be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Not a regular file, or nobody will ask.
    None,
    /// A file on disk, read in place: of a context, of a layer's tree, of a staging directory.
    File(OnDisk),
    /// Bytes that stood in the Dockerfile.
    Inline(Arc<[u8]>),
    /// Path `.1` of a stored layer whose tree may not have been made yet.
    Layer(LayerId, Vec<u8>),
}

/// An entry and its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Metadata.
    pub entry: Entry,
    /// Where to read it.
    pub origin: Origin,
}

/// Name of a stored layer: BLAKE3 over its encoded index (times included), in hex; for a layer that came as a blob, over its diff ID.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct LayerId(pub Arc<str>);

/// Extended attributes by name. Hardly an entry has any, so that none take as little memory as can be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[expect(clippy::box_collection, reason = "a map takes three words even when there is nothing in it")]
pub struct Attributes(Option<Box<BTreeMap<Vec<u8>, Vec<u8>>>>);

impl Attributes {
    /// Adds one; the value that its name had before.
    pub fn insert(&mut self, name: Vec<u8>, value: Vec<u8>) -> Option<Vec<u8>> {
        self.0.get_or_insert_default().insert(name, value)
    }

    /// Removes all others.
    pub fn retain(&mut self, keep: impl FnMut(&Vec<u8>, &mut Vec<u8>) -> bool) {
        if let Some(map) = &mut self.0 {
            map.retain(keep);
        }
        // Two without any are equal.
        self.0.take_if(|map| map.is_empty());
    }
}

impl std::ops::Deref for Attributes {
    type Target = BTreeMap<Vec<u8>, Vec<u8>>;

    fn deref(&self) -> &Self::Target {
        static NONE: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        self.0.as_deref().unwrap_or(&NONE)
    }
}

impl FromIterator<(Vec<u8>, Vec<u8>)> for Attributes {
    fn from_iter<T: IntoIterator<Item = (Vec<u8>, Vec<u8>)>>(pairs: T) -> Self {
        let map: BTreeMap<_, _> = pairs.into_iter().collect();
        Self((!map.is_empty()).then(|| Box::new(map)))
    }
}

impl<'a> IntoIterator for &'a Attributes {
    type Item = (&'a Vec<u8>, &'a Vec<u8>);
    type IntoIter = std::collections::btree_map::Iter<'a, Vec<u8>, Vec<u8>>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// A sorted table of nodes, packed. Cheap to clone.
#[derive(Clone, Default)]
pub struct Tree {
    packed: Arc<packed::Packed>,
    /// All files are read from this layer, at their own paths, whatever was packed.
    all_in: Option<LayerId>,
}

/// Nodes of a tree, one after the other.
#[derive(Debug, Clone)]
pub struct Nodes<'a>(Cursor<'a>);

impl Iterator for Nodes<'_> {
    type Item = Node;

    fn next(&mut self) -> Option<Node> {
        self.0.next().cloned()
    }
}

impl std::fmt::Debug for Tree {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_list().entries(self.iter()).finish()
    }
}

/// A tree of nodes that come in path order, each path once.
impl FromIterator<Node> for Tree {
    fn from_iter<T: IntoIterator<Item = Node>>(nodes: T) -> Self {
        let mut builder = TreeBuilder::new();
        nodes.into_iter().for_each(|node| builder.push_node(&node));
        builder.finish()
    }
}

impl PartialEq for Tree {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && self.iter().eq(other.iter())
    }
}

impl Eq for Tree {}

/// How many bytes two paths have in common at their beginnings. Neighbours share most, so that part by words.
pub(crate) fn shared_length(a: &[u8], b: &[u8]) -> usize {
    const WORD: usize = 8;
    let words = a.chunks_exact(WORD).zip(b.chunks_exact(WORD)).take_while(|(x, y)| x == y).count() * WORD;
    words + a[words..].iter().zip(&b[words..]).take_while(|(x, y)| x == y).count()
}

/// Orders paths so that a directory stands directly before its content: byte order with `/` lowest.
pub fn compare_paths(a: &[u8], b: &[u8]) -> std::cmp::Ordering {
    let shared = shared_length(a, b);
    match (a.get(shared), b.get(shared)) {
        (Some(x), Some(y)) => {
            let rank = |byte: &u8| if *byte == b'/' { 0 } else { u16::from(*byte) + 1 };
            rank(x).cmp(&rank(y))
        }
        _ => a.len().cmp(&b.len()),
    }
}

/// Parent of a path; the root's is the root.
pub fn parent(path: &[u8]) -> &[u8] {
    path.iter().rposition(|&byte| byte == b'/').map_or(b"", |at| &path[..at])
}

/// Last component of a path.
pub fn file_name(path: &[u8]) -> &[u8] {
    path.iter().rposition(|&byte| byte == b'/').map_or(path, |at| &path[at + 1..])
}

/// Joins a directory and a relative path; either may be empty.
pub fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() || name.is_empty() {
        return [dir, name].concat();
    }
    [dir, b"/", name].concat()
}

/// `path` is `dir` or lies below it.
pub fn is_within(path: &[u8], dir: &[u8]) -> bool {
    dir.is_empty() || path.starts_with(dir) && (path.len() == dir.len() || path[dir.len()] == b'/')
}

/// What following a path through a tree found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resolved {
    /// The path, free of symlinks, of an existing entry.
    Found(Vec<u8>),
    /// It does not exist: the path it would have once the symlinks before the missing part are followed.
    Missing(Vec<u8>),
    /// More than 255 symlinks.
    Loop,
    /// A component other than the last is neither a directory nor a link to one; its path.
    NotADirectory(Vec<u8>),
}

impl Entry {
    /// A directory owned by root without times.
    pub fn dir(path: impl Into<Vec<u8>>, mode: u32) -> Self {
        Self {
            path: path.into(),
            kind: Kind::Dir { opaque: false },
            mode,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            xattrs: Attributes::default(),
        }
    }

    /// Is it a directory?
    pub fn is_dir(&self) -> bool {
        matches!(self.kind, Kind::Dir { .. })
    }

    /// Hard-link group; 0 for everything but files that share an inode.
    pub fn link_group(&self) -> u32 {
        match self.kind {
            Kind::File { link_group, .. } => link_group,
            _ => 0,
        }
    }

    /// Is it a regular file?
    pub fn is_file(&self) -> bool {
        matches!(self.kind, Kind::File { .. })
    }
}

impl Tree {
    /// A tree of these nodes; sorts them. Of several with one path the last is kept.
    pub fn from_nodes(mut nodes: Vec<Node>) -> Self {
        if !nodes.is_sorted_by(|a, b| compare_paths(&a.entry.path, &b.entry.path).is_lt()) {
            nodes.sort_by(|a, b| compare_paths(&a.entry.path, &b.entry.path));
            nodes.reverse();
            nodes.dedup_by(|a, b| a.entry.path == b.entry.path);
            nodes.reverse();
        }
        nodes.into_iter().collect()
    }

    /// How many nodes there are.
    pub fn len(&self) -> usize {
        self.packed.len()
    }

    /// There is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Something acts on layers below: a whiteout, an opaque directory.
    fn has_marks(&self) -> bool {
        self.packed.has_marks()
    }

    /// How many files have no digest.
    pub fn unread(&self) -> usize {
        self.packed.unread()
    }

    /// Some file belongs to a group of hard links.
    pub fn has_links(&self) -> bool {
        self.packed.has_links()
    }

    /// All nodes in path order.
    pub fn iter(&self) -> Nodes<'_> {
        Nodes(self.cursor())
    }

    /// All nodes in path order, each only lent: without memory of its own.
    pub fn cursor(&self) -> Cursor<'_> {
        Cursor::new(&self.packed, self.all_in.as_ref())
    }

    /// This tree and another at once, in path order.
    pub(crate) fn zip<'a>(&'a self, other: &'a Tree) -> Zip<'a> {
        Zip::new(self.cursor(), other.cursor())
    }

    /// The nodes from this number on.
    pub fn cursor_at(&self, number: usize) -> Cursor<'_> {
        let mut cursor = self.cursor();
        cursor.go_to(&self.packed, number);
        cursor
    }

    /// The nodes from the first on that stands at or behind `path`.
    fn cursor_from(&self, path: &[u8]) -> Cursor<'_> {
        let mut cursor = self.cursor();
        if !path.is_empty() {
            cursor.go_to_path(&self.packed, path);
        }
        cursor
    }

    /// The node of this number.
    pub fn node(&self, number: usize) -> Option<Node> {
        self.cursor_at(number).next().cloned()
    }

    /// The node at exactly this path; symlinks are not followed.
    pub fn get(&self, path: &[u8]) -> Option<Node> {
        self.cursor_from(path).next().filter(|node| node.entry.path == path).cloned()
    }

    /// The node at this path, if there is one, and all below it, each only lent.
    pub fn cursor_within(&self, path: &[u8]) -> Cursor<'_> {
        let mut cursor = self.cursor_from(path);
        cursor.until(path);
        cursor
    }

    /// The node at this path, if there is one, and all below it.
    pub fn subtree(&self, path: &[u8]) -> Nodes<'_> {
        Nodes(self.cursor_within(path))
    }

    /// Is there something at this path or below it?
    pub fn holds(&self, path: &[u8]) -> bool {
        self.cursor_within(path).next().is_some()
    }

    /// Is there something below this path?
    pub fn has_content(&self, path: &[u8]) -> bool {
        let mut cursor = self.cursor_within(path);
        match cursor.next() {
            None => false,
            Some(node) if node.entry.path != path => true,
            Some(_) => cursor.next().is_some(),
        }
    }

    /// The tree with its nodes changed. Paths must stay in their order; a node that is not kept is left out.
    pub fn map(&self, mut change: impl FnMut(&mut Node) -> bool) -> Tree {
        let mut builder = TreeBuilder::new();
        let mut cursor = self.cursor();
        while let Some(node) = cursor.next() {
            let mut node = node.clone();
            if change(&mut node) {
                builder.push_node(&node);
            }
        }
        builder.finish()
    }

    /// Changes entries in place, in several threads where there are many. Paths must stay, and origins but for what a walk saw
    /// of a file. Of each part of the tree, `state` is made anew, which is shown it, and `done` is given
    /// it; what that makes of it comes in the order of the parts. After an error the tree is empty.
    pub(crate) fn update<S: Send, T: Send, E: Send>(
        &mut self,
        state: impl Fn(&Part<'_>) -> S + Sync,
        change: impl Fn(&mut S, &mut Entry, &mut Origin) -> Result<(), E> + Sync,
        done: impl Fn(S) -> T + Sync,
    ) -> Result<Vec<T>, E> {
        let (packed, done) = packed::update(std::mem::take(&mut self.packed), state, change, done)?;
        self.packed = Arc::new(packed);
        Ok(done)
    }

    /// The tree with its groups of hard links numbered from 1 in path order; a lone name has none.
    pub(crate) fn number_links(self) -> Tree {
        if !self.has_links() {
            return self;
        }
        let links = index::LinkGroups::of(&self);
        self.map(|node| {
            let number = links.number(&node.entry);
            if let Kind::File { link_group, .. } = &mut node.entry.kind {
                *link_group = number;
            }
            true
        })
    }

    /// The tree with its files read from a layer, at their own paths.
    pub(crate) fn in_layer(mut self, id: &LayerId) -> Tree {
        self.all_in = Some(id.clone());
        self
    }

    /// Layers that files are read from.
    pub(crate) fn layers(&self) -> Vec<LayerId> {
        match &self.all_in {
            Some(id) if self.packed.has_files() => vec![id.clone()],
            Some(_) => Vec::new(),
            None => self.packed.layers().cloned().collect(),
        }
    }

    /// Follows symlinks inside the tree, `..` stopping at its root, as chroot would. A last component that is a symlink
    /// is followed too when `follow_last`. An implied directory (the tree has something below it but no entry) counts
    /// as a directory.
    pub fn resolve(&self, path: &[u8], follow_last: bool) -> Resolved {
        let mut pending: Vec<Vec<u8>> = path.split(|&byte| byte == b'/').rev().map(<[u8]>::to_vec).collect();
        let mut done: Vec<u8> = Vec::new();
        let mut links = 0;
        let mut missing = false;
        while let Some(part) = pending.pop() {
            if part.is_empty() || part == b"." {
                continue;
            }
            if part == b".." {
                done = parent(&done).to_vec();
                missing = missing && !done.is_empty() && self.get(&done).is_none();
                continue;
            }
            let next = join(&done, &part);
            let last = pending.iter().all(|rest| rest.is_empty() || rest == b".");
            match self.get(&next).map(|node| node.entry.kind) {
                Some(Kind::Symlink { target }) if !last || follow_last => {
                    links += 1;
                    if links > 255 {
                        return Resolved::Loop;
                    }
                    if target.starts_with(b"/") {
                        done.clear();
                    }
                    pending.extend(target.split(|&byte| byte == b'/').rev().map(<[u8]>::to_vec));
                }
                Some(Kind::Dir { .. }) => done = next,
                Some(_) if !last => return Resolved::NotADirectory(next),
                Some(_) => done = next,
                None => {
                    missing = missing || !self.holds(&next);
                    done = next;
                }
            }
        }
        if missing { Resolved::Missing(done) } else { Resolved::Found(done) }
    }

    /// This tree with a layer put on top: whiteouts and opaque directories act, anything but a directory on a directory
    /// replaces all of it. The result has no whiteouts and no opaque marks.
    pub fn apply(&self, layer: &Tree) -> Tree {
        if self.is_empty() && !layer.has_marks() {
            return layer.clone();
        }
        // Link groups are numbered per tree; the layer's must not meet the lower ones.
        let mut groups = 0;
        if self.has_links() && layer.has_links() {
            let mut cursor = self.cursor();
            while let Some(node) = cursor.next() {
                groups = groups.max(node.entry.link_group());
            }
        }
        let mut merged = TreeBuilder::new();
        // What the layer hides: all that is at or below this path.
        let mut hidden: Option<Vec<u8>> = None;
        let is_hidden = |hidden: &Option<Vec<u8>>, path: &[u8]| hidden.as_ref().is_some_and(|dir| is_within(path, dir));
        let mut both = self.zip(layer);
        while let Some((lower, upper)) = both.next() {
            if let Some(node) = upper {
                let hides = match node.entry.kind {
                    Kind::Dir { opaque } => opaque,
                    _ => true,
                };
                if hides && !is_hidden(&hidden, &node.entry.path) {
                    hidden = Some(node.entry.path.clone());
                }
                put_merged(&mut merged, node, groups);
            } else if let Some(node) = lower
                && !is_hidden(&hidden, &node.entry.path)
            {
                put_merged(&mut merged, node, 0);
            }
        }
        merged.finish()
    }
}

/// Adds a node to a flattened tree: whiteouts and opaque marks have acted. `groups` numbers of hard links are taken.
fn put_merged(merged: &mut TreeBuilder, node: &Node, groups: u32) {
    let Node { entry, origin } = node;
    let kind = match &entry.kind {
        Kind::Whiteout => return,
        Kind::Dir { opaque: true } => Kind::Dir { opaque: false },
        Kind::File { link_group, size, digest } if groups != 0 && *link_group != 0 => {
            Kind::File { link_group: link_group.saturating_add(groups), size: *size, digest: *digest }
        }
        _ => return merged.push_node(node),
    };
    merged.push(&Entry { kind, ..entry.clone() }, origin);
}

#[cfg(test)]
impl Tree {
    /// All nodes at once.
    pub(crate) fn nodes(&self) -> Vec<Node> {
        self.iter().collect()
    }

    /// Changes nodes at will.
    pub(crate) fn edit(&mut self, change: impl FnOnce(&mut Vec<Node>)) {
        let mut nodes = self.nodes();
        change(&mut nodes);
        *self = Self::from_nodes(nodes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(paths: &[(&str, Kind)]) -> Tree {
        let node = |(path, kind): &(&str, Kind)| Node {
            entry: Entry { kind: kind.clone(), ..Entry::dir(path.as_bytes(), 0o755) },
            origin: Origin::None,
        };
        Tree::from_nodes(paths.iter().map(node).collect())
    }

    fn paths(tree: &Tree) -> Vec<String> {
        tree.nodes().iter().map(|node| String::from_utf8_lossy(&node.entry.path).into_owned()).collect()
    }

    const DIR: Kind = Kind::Dir { opaque: false };

    #[test]
    fn directories_stand_before_their_content() {
        let sorted = tree(&[("a-b", DIR), ("a", DIR), ("a/x", Kind::Fifo), ("", DIR), ("a.b", DIR)]);
        assert_eq!(paths(&sorted), ["", "a", "a/x", "a-b", "a.b"]);
        assert_eq!(sorted.subtree(b"a").count(), 2);
    }

    #[test]
    fn of_two_nodes_with_one_path_the_last_stays() {
        let twice = tree(&[("b", DIR), ("a", DIR), ("a", Kind::Fifo)]);
        assert_eq!(twice.get(b"a").map(|node| node.entry.kind), Some(Kind::Fifo));
    }

    #[test]
    fn symlinks_stay_inside() {
        let links = tree(&[
            ("", DIR),
            ("usr", DIR),
            ("usr/lib", DIR),
            ("lib", Kind::Symlink { target: b"../../usr/lib".to_vec() }),
            ("loop", Kind::Symlink { target: b"loop".to_vec() }),
            ("file", Kind::Fifo),
        ]);
        assert_eq!(links.resolve(b"lib", true), Resolved::Found(b"usr/lib".to_vec()));
        assert_eq!(links.resolve(b"lib", false), Resolved::Found(b"lib".to_vec()));
        assert_eq!(links.resolve(b"lib/new/x", true), Resolved::Missing(b"usr/lib/new/x".to_vec()));
        assert_eq!(links.resolve(b"loop/x", true), Resolved::Loop);
        assert_eq!(links.resolve(b"file/x", true), Resolved::NotADirectory(b"file".to_vec()));
        assert_eq!(links.resolve(b"../..", true), Resolved::Found(Vec::new()));
    }

    #[test]
    fn layers_hide_what_is_below() {
        let base = tree(&[
            ("", DIR),
            ("d", DIR),
            ("d/a", Kind::Fifo),
            ("d/b", Kind::Fifo),
            ("e", DIR),
            ("e/x", DIR),
            ("f", DIR),
            ("f/y", DIR),
        ]);
        let layer = tree(&[
            ("d", DIR),
            ("d/a", Kind::Whiteout),
            ("d/c", Kind::Fifo),
            ("e", Kind::Dir { opaque: true }),
            ("e/new", Kind::Fifo),
            ("f", Kind::Fifo),
        ]);
        assert_eq!(paths(&base.apply(&layer)), ["", "d", "d/b", "d/c", "e", "e/new", "f"]);
    }
}
