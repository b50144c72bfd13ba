//! Nodes by path, in little memory when they come in about the order of a tree, which they mostly do.
//!
//! Each run is packed, in that order, and of what stands in several the last counts. What comes out of order is collected until it
//! makes a run of its own. What is removed stands in a later run as a tombstone, so that nothing is ever changed in place.

use super::{Entry, Kind, Node, Origin, Tree, TreeBuilder, compare_paths, is_within};
use std::cmp::Ordering;
use std::collections::BTreeMap;

/// A path in the order of trees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InTree(pub(crate) Vec<u8>);

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

/// Mode of what was removed. No entry has it.
const REMOVED: u32 = u32::MAX;

fn is_removed(entry: &Entry) -> bool {
    entry.mode == REMOVED
}

fn tombstone(path: &[u8]) -> Node {
    Node { entry: Entry { kind: Kind::Whiteout, ..Entry::dir(path, REMOVED) }, origin: Origin::None }
}

/// See the module.
#[derive(Default)]
pub(crate) struct NodeMap {
    runs: Vec<TreeBuilder>,
    recent: BTreeMap<InTree, Node>,
    /// Tombstones, and nodes under them, that were passed over since there were none.
    passed: usize,
}

impl NodeMap {
    /// As many nodes out of order are kept unpacked, some 5 MB: what is looked for among them is found soonest.
    const RECENT: usize = 1 << 14;

    /// The node at exactly this path.
    pub(crate) fn get(&self, path: &[u8]) -> Option<Node> {
        let recent = match self.recent.is_empty() {
            true => None,
            // To look up without a copy of the path takes more than a copy.
            false => self.recent.get(&InTree(path.to_vec())).cloned(),
        };
        let found = recent.or_else(|| self.runs.iter().rev().find_map(|run| run.get(path)));
        found.filter(|node| !is_removed(&node.entry))
    }

    /// Puts a node in place of the one at its path.
    pub(crate) fn put(&mut self, node: Node) {
        if !self.recent.is_empty()
            && let Some(recent) = self.recent.get_mut(&InTree(node.entry.path.clone()))
        {
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

    /// Takes the node at this path away.
    pub(crate) fn remove(&mut self, path: &[u8]) -> Option<Node> {
        let found = self.get(path)?;
        self.put(tombstone(path));
        Some(found)
    }

    /// Takes away all that is below this path.
    pub(crate) fn remove_below(&mut self, path: &[u8]) {
        if self.is_last(path) {
            return;
        }
        let mut found: BTreeMap<InTree, bool> = BTreeMap::new();
        for run in &self.runs {
            run.each_within(path, |entry| {
                found.insert(InTree(entry.path.clone()), is_removed(entry));
                true
            });
        }
        for (inner, node) in self.recent_within(path) {
            found.insert(inner.clone(), is_removed(&node.entry));
        }
        found.remove(&InTree(path.to_vec()));
        let mut passed = 0;
        for (inner, removed) in found {
            match removed {
                true => passed += 1,
                false => self.put(tombstone(&inner.0)),
            }
        }
        self.pass(passed);
    }

    /// Is there something below this path?
    pub(crate) fn has_below(&mut self, path: &[u8]) -> bool {
        if self.is_last(path) {
            return false;
        }
        let (mut found, mut passed) = (false, 0);
        let mut look = |entry: &Entry| {
            // What a later run says of it counts.
            found = entry.path != path && self.get(&entry.path).is_some();
            passed += usize::from(!found);
            !found
        };
        let is_done = self.recent_within(path).any(|(_, node)| !look(&node.entry));
        if !is_done {
            let _ = self.runs.iter().rev().all(|run| run.each_within(path, &mut look));
        }
        self.pass(passed);
        found
    }

    /// Does nothing stand behind this path? Mostly so, as they come in order.
    fn is_last(&self, path: &[u8]) -> bool {
        let is_last = |path: InTree| self.recent.range(path..).next().is_none();
        self.runs.iter().all(|run| run.comes_last(path)) && (self.recent.is_empty() || is_last(InTree(path.to_vec())))
    }

    /// At or below a path.
    fn recent_within<'a>(&'a self, path: &'a [u8]) -> impl Iterator<Item = (&'a InTree, &'a Node)> {
        self.recent.range(InTree(path.to_vec())..).take_while(|(inner, _)| is_within(&inner.0, path))
    }

    /// Whoever passes over tombstones again and again is rid of them, when that has cost as much as it costs to drop them.
    fn pass(&mut self, passed: usize) {
        self.passed += passed;
        if self.passed > Self::RECENT && self.passed > self.runs.iter().map(TreeBuilder::len).sum() {
            let all = std::mem::take(self).finish();
            let mut run = TreeBuilder::new();
            let mut cursor = all.cursor();
            while let Some(node) = cursor.next() {
                run.push_node(node);
            }
            self.runs.push(run);
        }
    }

    /// Makes a run of what was out of order. Each run stays less than half of the one before, so that there are few.
    fn end_run(&mut self) {
        let mut run = TreeBuilder::new();
        std::mem::take(&mut self.recent).into_values().for_each(|node| run.push_node(&node));
        while let Some(before) = self.runs.pop_if(|before| before.len() <= 2 * run.len()) {
            run = merged(&before.finish(), &run.finish());
        }
        self.runs.push(run);
    }

    /// All nodes.
    pub(crate) fn finish(mut self) -> Tree {
        if self.runs.len() > 1 || !self.recent.is_empty() {
            self.end_run();
        }
        let mut all = Tree::default();
        for run in self.runs {
            let run = run.finish();
            all = if all.is_empty() { run } else { merged(&all, &run).finish() };
        }
        // Whiteouts, and nothing else, can be tombstones.
        match all.has_marks() {
            true => all.map(|node| !is_removed(&node.entry)),
            false => all,
        }
    }
}

/// The nodes of both; the second's where both have one.
pub(crate) fn merged(first: &Tree, second: &Tree) -> TreeBuilder {
    let mut merged = TreeBuilder::new();
    let mut both = first.zip(second);
    while let Some((first, second)) = both.next() {
        second.or(first).into_iter().for_each(|node| merged.push_node(node));
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::super::index::tests::Random;
    use super::*;

    fn node(path: &str, mode: u32) -> Node {
        Node { entry: Entry { kind: Kind::Fifo, ..Entry::dir(path, mode) }, origin: Origin::None }
    }

    #[test]
    fn in_whatever_order_they_come_the_last_counts() {
        // Ascending, descending, in disorder, and with many that come twice.
        let count = 3 * NodeMap::RECENT as u64;
        let orders: [&dyn Fn(u64) -> u64; 4] =
            [&|at| at, &|at| count - at, &|at| at.wrapping_mul(7919) % count, &|at| at * at % 5003];
        for (number, order) in orders.iter().enumerate() {
            let mut map = NodeMap::default();
            let mut expected = BTreeMap::new();
            for at in 0..count {
                let number = order(at);
                let node = node(&format!("d{}/f{number:05}", number % 7), at as u32);
                expected.insert(InTree(node.entry.path.clone()), node.clone());
                map.put(node.clone());
                assert_eq!(map.get(&node.entry.path), Some(node));
                if at == count / 2 {
                    map.remove_below(b"d3");
                    expected.retain(|path, _| !is_within(&path.0, b"d3"));
                }
            }
            assert!(map.runs.len() < 8, "{} runs", map.runs.len());
            for path in expected.keys() {
                assert!(map.get(&path.0).is_some());
            }
            assert_eq!(map.get(b"d3/none"), None);
            assert!(map.finish() == expected.into_values().collect(), "order {number}");
        }
    }

    #[test]
    fn what_is_removed_is_gone() {
        let mut random = Random(0x0dd_ba11);
        for _ in 0..40 {
            let mut map = NodeMap::default();
            let mut expected: BTreeMap<InTree, Node> = BTreeMap::new();
            for step in 0..2000 {
                let depth = 1 + random.next() % 4;
                let path = (0..depth).map(|_| ["a", "b", "a-b", "c"][random.next() as usize % 4]);
                let path = path.collect::<Vec<_>>().join("/");
                let below = |inner: &InTree| is_within(&inner.0, path.as_bytes()) && inner.0 != path.as_bytes();
                match random.next() % 8 {
                    0 => assert_eq!(map.remove(path.as_bytes()), expected.remove(&InTree(path.clone().into()))),
                    1 => {
                        map.remove_below(path.as_bytes());
                        expected.retain(|inner, _| !below(inner));
                    }
                    2 => assert_eq!(map.has_below(path.as_bytes()), expected.keys().any(below)),
                    3 => assert_eq!(map.get(path.as_bytes()).as_ref(), expected.get(&InTree(path.clone().into()))),
                    _ => {
                        let node = node(&path, step);
                        expected.insert(InTree(path.clone().into()), node.clone());
                        map.put(node);
                    }
                }
                if random.next().is_multiple_of(50) {
                    map.end_run();
                }
            }
            assert_eq!(map.finish(), expected.into_values().collect());
        }
    }

    #[test]
    fn who_removes_much_again_and_again_does_not_wait() {
        // Each time, all that was removed before would be passed over.
        let mut map = NodeMap::default();
        for number in 0..100_000 {
            map.put(node(&format!("d/f{number:06}"), 0));
            map.put(node(&format!("e/f{number:06}"), 0));
        }
        for _ in 0..100_000 {
            map.remove_below(b"d");
            map.put(node("d", 0));
            map.put(node("d/x", 0));
            assert!(map.has_below(b"d"));
        }
        assert_eq!(map.finish().len(), 100_002);
    }
}
