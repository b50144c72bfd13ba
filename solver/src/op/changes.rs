//! A destination tree with changes on top, while a COPY or WORKDIR makes them; ends as a changeset.

use super::copy::CopyError;
use super::passwd::Owner;
use crate::tree::{Entry, Kind, Node, Origin, Tree, TreeBuilder, compare_paths, is_within, join, parent};
use std::cell::RefCell;
use std::cmp::Ordering;
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

/// A path in the order of trees.
#[derive(Debug, Clone, PartialEq, Eq)]
struct InTree(Vec<u8>);

impl Ord for InTree {
    fn cmp(&self, other: &Self) -> Ordering {
        compare_paths(&self.0, &other.0)
    }
}

impl PartialOrd for InTree {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Nodes by path, in little memory when they come in about the order of a tree, which they mostly do: each run is in that order,
/// and of what stands in several the last counts. What comes out of order is collected until it makes a run of its own.
#[derive(Default)]
struct Runs {
    runs: Vec<TreeBuilder>,
    recent: BTreeMap<InTree, Node>,
}

impl Runs {
    /// As many nodes out of order are kept unpacked.
    const RECENT: usize = 4096;

    fn get(&self, path: &[u8]) -> Option<Node> {
        let recent = || match self.recent.is_empty() {
            true => None,
            // To look up without a copy of the path takes more than a copy.
            false => self.recent.get(&InTree(path.to_vec())).cloned(),
        };
        recent().or_else(|| self.runs.iter().rev().find_map(|run| run.get(path)))
    }

    fn put(&mut self, node: Node) {
        if let Some(recent) = self.recent.get_mut(&InTree(node.entry.path.clone())) {
            *recent = node;
            return;
        }
        if self.runs.is_empty() {
            self.runs.push(TreeBuilder::new());
        }
        match self.runs.last_mut().filter(|run| run.comes_last(&node.entry.path)) {
            Some(run) => run.push_node(&node),
            None => drop(self.recent.insert(InTree(node.entry.path.clone()), node)),
        }
        if self.recent.len() >= Self::RECENT {
            self.end_run();
        }
    }

    /// Makes a run of what was out of order. Each run stays less than half of the one before, so that there are few.
    fn end_run(&mut self) {
        let mut run = TreeBuilder::new();
        std::mem::take(&mut self.recent).into_values().for_each(|node| run.push_node(&node));
        while let Some(before) = self.runs.pop_if(|before| before.len() <= 2 * run.len()) {
            run = merged(&before.finish(), &run.finish(), |_| true);
        }
        self.runs.push(run);
    }

    /// Leaves out what does not stay.
    fn retain(&mut self, stays: impl Fn(&[u8]) -> bool) {
        self.recent.retain(|path, _| stays(&path.0));
        for run in &mut self.runs {
            let all = std::mem::take(run).finish();
            *run = merged(&all, &Tree::default(), |node| stays(&node.entry.path));
        }
    }

    fn finish(mut self) -> Tree {
        if self.runs.len() == 1 && self.recent.is_empty() {
            return self.runs.remove(0).finish();
        }
        self.end_run();
        let mut all = Tree::default();
        for run in self.runs {
            all = merged(&all, &run.finish(), |_| true).finish();
        }
        all
    }
}

/// The nodes of both that stay; the second's where both have one.
fn merged(first: &Tree, second: &Tree, stays: impl Fn(&Node) -> bool) -> TreeBuilder {
    let mut merged = TreeBuilder::new();
    let mut push = |node: &Node| {
        if stays(node) {
            merged.push_node(node);
        }
    };
    let mut second = second.cursor();
    let mut more = second.next().is_some();
    let mut first = first.cursor();
    while let Some(node) = first.next() {
        let mut replaced = false;
        while more {
            let order = compare_paths(&second.node().entry.path, &node.entry.path);
            if order.is_gt() {
                break;
            }
            replaced |= order.is_eq();
            push(second.node());
            more = second.next().is_some();
        }
        if !replaced {
            push(node);
        }
    }
    while more {
        push(second.node());
        more = second.next().is_some();
    }
    merged
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
    nodes: Runs,
    /// Directories of the base that were removed, whatever stands there now.
    removed: HashSet<Vec<u8>>,
    near: RefCell<Near>,
    now: (i64, u32),
    last_group: u32,
}

impl<'a> Changes<'a> {
    pub(super) fn new(base: &'a Tree, now: (i64, u32)) -> Self {
        let (nodes, removed, near) = (Runs::default(), HashSet::new(), RefCell::default());
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
            self.nodes.retain(|other| !is_within(other, path));
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
        false => merged(&parents, &changeset, |_| true).finish(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(number: u64, mode: u32) -> Node {
        let path = format!("d{}/f{number:05}", number % 7);
        Node { entry: Entry { kind: Kind::Fifo, ..Entry::dir(path, mode) }, origin: Origin::None }
    }

    #[test]
    fn in_whatever_order_they_come_the_last_counts() {
        // Ascending, descending, in disorder, and with many that come twice.
        let count = 3 * Runs::RECENT as u64;
        let orders: [&dyn Fn(u64) -> u64; 4] =
            [&|at| at, &|at| count - at, &|at| at.wrapping_mul(7919) % count, &|at| at * at % 5003];
        for (number, order) in orders.iter().enumerate() {
            let mut runs = Runs::default();
            let mut expected = BTreeMap::new();
            for at in 0..count {
                let node = node(order(at), at as u32);
                expected.insert(InTree(node.entry.path.clone()), node.clone());
                runs.put(node.clone());
                assert_eq!(runs.get(&node.entry.path), Some(node));
                if at == count / 2 {
                    runs.retain(|path| !is_within(path, b"d3"));
                    expected.retain(|path, _| !is_within(&path.0, b"d3"));
                }
            }
            assert!(runs.runs.len() < 8, "{} runs", runs.runs.len());
            for path in expected.keys() {
                assert!(runs.get(&path.0).is_some());
            }
            assert_eq!(runs.get(b"d3/none"), None);
            assert!(runs.finish() == expected.into_values().collect(), "order {number}");
        }
    }
}
