//! A destination tree with changes on top, while a COPY or WORKDIR makes them; ends as a changeset.

use super::copy::CopyError;
use super::passwd::Owner;
use crate::tree::node_map::{InTree, NodeMap, merged};
use crate::tree::{Entry, Kind, Node, Origin, Tree, is_within, join, parent};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};

/// Symlinks to follow for one path, as container tools do.
const MAX_LINKS: usize = 255;
/// Mode bit of directories that give their group to what is made in them.
const SET_GROUP_ID: u32 = 0o2000;

/// What stands at a path.
#[derive(Debug, Clone)]
pub(super) enum Look {
    Nothing,
    /// A directory without an entry of its own.
    Implied,
    Node(Box<Node>),
}

impl Look {
    pub(super) fn is_dir(&self) -> bool {
        match self {
            Self::Nothing => false,
            Self::Implied => true,
            Self::Node(node) => node.entry.is_dir(),
        }
    }

    /// Target of a symbolic link.
    fn link(&self) -> Option<&[u8]> {
        match self {
            Self::Node(node) => match &node.entry.kind {
                Kind::Symlink { target } => Some(target),
                _ => None,
            },
            Self::Nothing | Self::Implied => None,
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

/// What was last found out about the base.
#[derive(Default)]
struct Near {
    /// A path where nothing stands, so that what is put below it need not be looked for.
    vacant: Option<Vec<u8>>,
    /// A directory that has something in it.
    occupied: Option<Vec<u8>>,
}

pub(super) struct Changes<'a> {
    base: &'a Tree,
    nodes: NodeMap,
    /// Directories of the base that were removed, whatever stands there now.
    removed: HashSet<Vec<u8>>,
    near: RefCell<Near>,
    now: (i64, u32),
    last_group: u32,
}

impl<'a> Changes<'a> {
    pub(super) fn new(base: &'a Tree, now: (i64, u32)) -> Self {
        let (nodes, removed, near) = (NodeMap::default(), HashSet::new(), RefCell::default());
        Self { base, nodes, removed, near, now, last_group: 0 }
    }

    pub(super) fn look(&self, path: &[u8]) -> Look {
        if let Some(node) = self.nodes.get(path) {
            return Look::Node(Box::new(node));
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
        self.look_below(path)
    }

    /// What stands at a path of the base.
    fn look_below(&self, path: &[u8]) -> Look {
        if path.is_empty() {
            return self.base.get(path).map_or(Look::Implied, |node| Look::Node(Box::new(node)));
        }
        let Near { vacant, occupied } = &mut *self.near.borrow_mut();
        if self.base.is_empty() || vacant.as_ref().is_some_and(|vacant| is_within(path, vacant)) {
            return Look::Nothing;
        }
        match self.base.cursor_within(path).next() {
            Some(node) if node.entry.path == path => Look::Node(Box::new(node.clone())),
            Some(_) => Look::Implied,
            None => {
                let above = parent(path);
                if occupied.as_deref() == Some(above) || self.base.holds(above) {
                    *occupied = Some(above.to_vec());
                } else {
                    *vacant = Some(above.to_vec());
                }
                Look::Nothing
            }
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
            let look = self.look(&next);
            if let Some(target) = look.link() {
                links += 1;
                if links > MAX_LINKS {
                    return Err(CopyError::TooManyLinks { path: shown(path) });
                }
                if target.starts_with(b"/") {
                    done = root.to_vec();
                }
                pending.extend(split(target));
            } else if look.exists() && !look.is_dir() && !pending.is_empty() {
                return Err(CopyError::NotADirectory { path: shown(&next) });
            } else {
                done = next;
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
                Look::Node(node) if node.entry.mode & SET_GROUP_ID != 0 => Some(node.entry.gid),
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
        self.nodes.put(node);
    }

    /// Makes way for what is put at a path next: a directory goes with all that is in it.
    pub(super) fn make_way(&mut self, path: &[u8]) {
        if self.look(path).is_dir() {
            self.nodes.remove(path);
            self.nodes.remove_below(path);
            self.removed.insert(path.to_vec());
        }
    }

    /// A number for a new group of hard links.
    pub(super) fn new_group(&mut self) -> u32 {
        self.last_group += 1;
        self.last_group
    }

    /// The changeset: without directories that stayed what they were, and with hard-link groups of two names at least.
    pub(super) fn finish(self) -> Tree {
        let Self { base, nodes, removed, .. } = self;
        let changed = nodes.finish();
        // Nothing that is copied has marks, and there is nothing to mark.
        if base.is_empty() {
            return changed.number_links();
        }
        let stays = |node: &mut Node| {
            if let Kind::Dir { opaque } = &mut node.entry.kind {
                *opaque = removed.contains(&node.entry.path) && base.has_content(&node.entry.path);
                if !*opaque && base.get(&node.entry.path).is_some_and(|before| is_same(&before, node)) {
                    return false;
                }
            }
            true
        };
        changed.map(stays).number_links()
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
pub fn without_unchanged(changeset: &Tree, dest: &Tree) -> Tree {
    changeset.map(|node| dest.get(&node.entry.path).is_none_or(|before| !is_same(&before, node))).number_links()
}

/// The changeset with the directories above its entries, as they are in `dest`: what other builders write into layers.
pub fn with_parents(changeset: Tree, dest: &Tree) -> Tree {
    if dest.is_empty() {
        return changeset;
    }
    let mut parents: BTreeMap<InTree, Option<Node>> = BTreeMap::new();
    let mut last: Vec<u8> = Vec::new();
    let mut cursor = changeset.cursor();
    while let Some(node) = cursor.next() {
        let mut above = parent(&node.entry.path);
        if above == last {
            continue;
        }
        last = above.to_vec();
        while !above.is_empty() && !parents.contains_key(&InTree(above.to_vec())) {
            let found = match changeset.get(above) {
                None => dest.get(above).filter(|node| node.entry.is_dir()),
                Some(_) => None,
            };
            parents.insert(InTree(above.to_vec()), found);
            above = parent(above);
        }
    }
    let parents: Tree = parents.into_values().flatten().collect();
    match parents.is_empty() {
        true => changeset,
        false => merged(&parents, &changeset).finish(),
    }
}
