//! A destination tree with changes on top, while a COPY or WORKDIR makes them; ends as a changeset.

use super::copy::CopyError;
use super::passwd::Owner;
use crate::tree::{Entry, Kind, Node, Origin, Tree, compare_paths, join, parent};
use hashbrown::HashTable;
use std::collections::{BTreeMap, HashSet};
use std::hash::{BuildHasher as _, RandomState};

/// Symlinks to follow for one path, as container tools do.
const MAX_LINKS: usize = 255;
/// Mode bit of directories that give their group to what is made in them.
const SET_GROUP_ID: u32 = 0o2000;

/// What stands at a path.
#[derive(Debug, Clone, Copy)]
pub(super) enum Look<'a> {
    Nothing,
    /// A directory without an entry of its own.
    Implied,
    Node(&'a Node),
}

impl Look<'_> {
    pub(super) fn is_dir(&self) -> bool {
        match self {
            Self::Nothing => false,
            Self::Implied => true,
            Self::Node(node) => node.entry.is_dir(),
        }
    }

    pub(super) fn exists(&self) -> bool {
        !matches!(self, Self::Nothing)
    }
}

/// Path as errors show it.
pub(super) fn shown(path: &[u8]) -> String {
    format!("/{}", String::from_utf8_lossy(path))
}

fn path_of(node: &Option<Node>) -> &[u8] {
    node.as_ref().map_or(&[], |node| &node.entry.path)
}

/// Positions of nodes by path, of those that are still there. The paths themselves stand in the nodes only: there can be
/// very many.
struct Positions {
    table: HashTable<usize>,
    hasher: RandomState,
}

impl Positions {
    fn of(nodes: &[Option<Node>]) -> Self {
        let mut positions = Self { table: HashTable::with_capacity(nodes.len()), hasher: RandomState::new() };
        (0..nodes.len()).for_each(|at| positions.insert(nodes, at));
        positions
    }

    fn find(&self, nodes: &[Option<Node>], path: &[u8]) -> Option<usize> {
        self.table.find(self.hasher.hash_one(path), |&at| path_of(&nodes[at]) == path).copied()
    }

    /// Adds a node whose path is not there yet.
    fn insert(&mut self, nodes: &[Option<Node>], at: usize) {
        let hash = |&at: &usize| self.hasher.hash_one(path_of(&nodes[at]));
        self.table.insert_unique(hash(&at), at, hash);
    }

    fn remove(&mut self, nodes: &mut [Option<Node>], path: &[u8]) {
        if let Ok(found) = self.table.find_entry(self.hasher.hash_one(path), |&at| path_of(&nodes[at]) == path) {
            nodes[found.remove().0] = None;
        }
    }

    fn remove_within(&mut self, nodes: &mut [Option<Node>], path: &[u8]) {
        self.table.retain(|at| {
            let stays = !crate::tree::is_within(path_of(&nodes[*at]), path);
            if !stays {
                nodes[*at] = None;
            }
            stays
        });
    }
}

pub(super) struct Changes<'a> {
    base: &'a Tree,
    /// In the order in which they were put, mostly that of a tree, so that little is left to sort.
    nodes: Vec<Option<Node>>,
    /// Where they are, unless that order is a tree's.
    positions: Option<Positions>,
    /// Directories of the base that were removed, whatever stands there now.
    removed: HashSet<Vec<u8>>,
    now: (i64, u32),
    last_group: u32,
}

impl<'a> Changes<'a> {
    pub(super) fn new(base: &'a Tree, now: (i64, u32)) -> Self {
        Self { base, nodes: Vec::new(), positions: None, removed: HashSet::new(), now, last_group: 0 }
    }

    /// Makes room for as many changes, so that their table need not grow, which takes it twice.
    pub(super) fn reserve(&mut self, more: usize) {
        match self.nodes.is_empty() {
            true => self.nodes.reserve_exact(more),
            false => self.nodes.reserve(more),
        }
    }

    /// Where a path was changed.
    fn position(&self, path: &[u8]) -> Option<usize> {
        match &self.positions {
            Some(positions) => positions.find(&self.nodes, path),
            // Almost always.
            None if self.comes_last(path) => None,
            None => self.nodes.binary_search_by(|node| compare_paths(path_of(node), path)).ok(),
        }
    }

    /// Whether a path stands behind that of the last node in a tree.
    fn comes_last(&self, path: &[u8]) -> bool {
        self.nodes.last().is_none_or(|last| compare_paths(path_of(last), path).is_lt())
    }

    pub(super) fn look(&self, path: &[u8]) -> Look<'_> {
        if let Some(node) = self.position(path).and_then(|at| self.nodes[at].as_ref()) {
            return Look::Node(node);
        }
        if !self.removed.is_empty() {
            let mut above = path;
            loop {
                if self.removed.contains(above) {
                    return Look::Nothing;
                }
                if above.is_empty() {
                    break;
                }
                above = parent(above);
            }
        }
        match self.base.get(path) {
            Some(node) => Look::Node(node),
            None if path.is_empty() || !self.base.subtree(path).is_empty() => Look::Implied,
            None => Look::Nothing,
        }
    }

    /// The path free of symlinks that `path` leads to, whether something stands there or not. `root` is where absolute
    /// links start from and where `..` stops.
    pub(super) fn resolve(&self, root: &[u8], path: &[u8]) -> Result<Vec<u8>, CopyError> {
        let split = |path: &[u8]| -> Vec<Vec<u8>> {
            path.split(|&byte| byte == b'/').rev().filter(|part| !part.is_empty()).map(<[u8]>::to_vec).collect()
        };
        let mut pending = split(path);
        let mut done = root.to_vec();
        let mut links = 0;
        while let Some(part) = pending.pop() {
            if part == b"." {
                continue;
            }
            if part == b".." {
                if done.len() > root.len() {
                    done = parent(&done).to_vec();
                }
                continue;
            }
            let next = join(&done, &part);
            match self.look(&next) {
                Look::Node(Node { entry: Entry { kind: Kind::Symlink { target }, .. }, .. }) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(CopyError::TooManyLinks { path: shown(path) });
                    }
                    if target.starts_with(b"/") {
                        done = root.to_vec();
                    }
                    pending.extend(split(target));
                }
                look if look.exists() && !look.is_dir() && !pending.is_empty() => {
                    return Err(CopyError::NotADirectory { path: shown(&next) });
                }
                _ => done = next,
            }
        }
        Ok(done)
    }

    /// Makes a directory and those above it that are missing. `path` is free of symlinks. As in a file system (see
    /// mkdir(2)), what is made in a set-group-id directory is one, too, and has its group when nobody says another.
    pub(super) fn make_dirs(&mut self, path: &[u8], mode: u32, owner: Option<Owner>) -> Result<(), CopyError> {
        for end in (1..=path.len()).filter(|&at| at == path.len() || path[at] == b'/') {
            let path = &path[..end];
            let look = self.look(path);
            if look.is_dir() {
                continue;
            }
            if look.exists() {
                return Err(CopyError::NotADirectory { path: shown(path) });
            }
            let inherited = match self.look(parent(path)) {
                Look::Node(Node { entry, .. }) if entry.mode & SET_GROUP_ID != 0 => Some(entry.gid),
                _ => None,
            };
            let mode = if inherited.is_some() { mode | SET_GROUP_ID } else { mode };
            let owner = owner.unwrap_or_else(|| Owner { gid: inherited.unwrap_or_default(), ..Owner::default() });
            self.put_dir(path, mode, owner);
        }
        Ok(())
    }

    /// Puts a directory of this moment.
    pub(super) fn put_dir(&mut self, path: &[u8], mode: u32, owner: Owner) {
        let entry = Entry { uid: owner.uid, gid: owner.gid, mtime: self.now, ..Entry::dir(path, mode) };
        self.put(Node { entry, origin: Origin::None });
    }

    /// Puts a node in place of what stood at its path, which must not be a directory with content unless the node is
    /// one too. The root has no entry in a layer.
    pub(super) fn put(&mut self, node: Node) {
        if node.entry.path.is_empty() {
            return;
        }
        match self.position(&node.entry.path) {
            Some(at) => self.nodes[at] = Some(node),
            None => {
                let in_order = self.comes_last(&node.entry.path);
                self.nodes.push(Some(node));
                match &mut self.positions {
                    Some(positions) => positions.insert(&self.nodes, self.nodes.len() - 1),
                    None if in_order => {}
                    None => self.positions = Some(Positions::of(&self.nodes)),
                }
            }
        }
    }

    /// Removes what stands at a path.
    pub(super) fn remove(&mut self, path: &[u8]) {
        let is_dir = self.look(path).is_dir();
        let positions = self.positions.get_or_insert_with(|| Positions::of(&self.nodes));
        if is_dir {
            positions.remove_within(&mut self.nodes, path);
            self.removed.insert(path.to_vec());
        } else {
            positions.remove(&mut self.nodes, path);
        }
    }

    /// A number for a new group of hard links.
    pub(super) fn new_group(&mut self) -> u32 {
        self.last_group += 1;
        self.last_group
    }

    /// The changeset: without directories that stayed what they were, and with hard-link groups of two names at least.
    pub(super) fn finish(self) -> Tree {
        let Self { base, nodes: changed, removed, .. } = self;
        let has_content = |path: &[u8]| base.subtree(path).iter().any(|node| node.entry.path != path);
        let stays = |mut node: Node| {
            if let Kind::Dir { opaque } = &mut node.entry.kind {
                *opaque = removed.contains(&node.entry.path) && has_content(&node.entry.path);
                if !*opaque && base.get(&node.entry.path).is_some_and(|before| is_same(before, &node)) {
                    return None;
                }
            }
            Some(node)
        };
        // Collected in place: there can be very many.
        let nodes: Vec<Node> = changed.into_iter().filter_map(|node| node.and_then(stays)).collect();
        let mut tree = Tree::from_nodes(nodes);
        number_groups(&mut tree);
        tree
    }
}

/// Numbers the hard-link groups of a tree from 1 in path order; a lone name has none.
pub(crate) fn number_groups(tree: &mut Tree) {
    if tree.nodes().iter().all(|node| node.entry.link_group() == 0) {
        return;
    }
    let numbers = crate::tree::index::link_groups(tree);
    for (node, number) in tree.nodes_mut().iter_mut().zip(numbers) {
        if let Kind::File { link_group, .. } = &mut node.entry.kind {
            *link_group = number;
        }
    }
}

/// Would the second, put over the first, change nothing? The time of a directory does not count: it follows from what
/// is done in it. A file whose content is not known yet is never the same.
pub(crate) fn is_same(before: &Node, after: &Node) -> bool {
    let (a, b) = (&before.entry, &after.entry);
    let same_kind = match (&a.kind, &b.kind) {
        (Kind::File { digest: Some(a), size: a_size, .. }, Kind::File { digest: Some(b), size: b_size, .. }) => {
            a == b && a_size == b_size
        }
        (Kind::File { .. }, _) => false,
        (Kind::Dir { .. }, Kind::Dir { opaque }) => !opaque,
        (a, b) => a == b,
    };
    let is_link = matches!(b.kind, Kind::Symlink { .. });
    same_kind
        && (a.uid, a.gid) == (b.uid, b.gid)
        && (is_link || a.mode == b.mode)
        && (b.is_dir() || a.mtime == b.mtime)
        && a.xattrs == b.xattrs
}

/// The changeset without entries that `dest` has already. Digests must be known.
pub fn without_unchanged(changeset: Tree, dest: &Tree) -> Tree {
    let nodes = changeset.into_nodes();
    let changed = |node: &Node| dest.get(&node.entry.path).is_none_or(|before| !is_same(before, node));
    let mut tree = Tree::from_nodes(nodes.into_iter().filter(changed).collect());
    number_groups(&mut tree);
    tree
}

/// The changeset with the directories above its entries, as they are in `dest`: what other builders write into layers.
pub fn with_parents(changeset: Tree, dest: &Tree) -> Tree {
    let mut parents: BTreeMap<&[u8], &Node> = BTreeMap::new();
    for node in changeset.nodes() {
        let mut above = parent(&node.entry.path);
        while !above.is_empty() && !parents.contains_key(above) {
            match (changeset.get(above), dest.get(above)) {
                (None, Some(node)) if node.entry.is_dir() => {
                    parents.insert(above, node);
                }
                _ => {}
            }
            above = parent(above);
        }
    }
    let parents: Vec<Node> = parents.into_values().cloned().collect();
    let mut nodes = changeset.into_nodes();
    nodes.splice(..0, parents);
    Tree::from_nodes(nodes)
}
