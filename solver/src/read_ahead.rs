//! Files on their way into the page cache before somebody reads them.
//!
//! Whoever reads many small files that are not in memory waits for the disk once for each, a tenth of a millisecond on a good
//! one. So one thread goes through them a little earlier and asks the kernel to fetch them, posix_fadvise(2), which
//! hardly waits. Where they are in memory, as in most builds, it sees that at a few of them, and leaves the others alone.

use crate::sys;
use crate::tree::{Kind, Node, Tree};
use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, Thread};

/// How far in front of the reader, and how much more for each of its threads: each may be a chunk in front of the next one.
const AHEAD_BYTES: u64 = 8 << 20;
const AHEAD_BYTES_PER_THREAD: u64 = 1 << 20;
/// The reader tells how far it is when it has come this much further.
const TELL_EACH_BYTES: u64 = 1 << 20;
/// Files that show whether those around them are in memory, and how many are left alone if they are.
const PROBES: u32 = 32;
const LEFT_ALONE: u32 = 512;
/// What is fetched of a file; the kernel sees by itself that somebody reads a long one.
const FETCHED_BYTES: u64 = 1 << 20;

/// Where a reader is in the files of a tree.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    read_bytes: AtomicU64,
    ended: AtomicBool,
    follower: OnceLock<Thread>,
}

impl Progress {
    /// The reader opens this file now. It is to open each that [`ahead`] is given, and in about their order.
    pub(crate) fn opens(&self, node: &Node) {
        let Some(size) = size_if_read(node) else { return };
        let before = self.read_bytes.fetch_add(size, Ordering::Relaxed);
        if before / TELL_EACH_BYTES != before.wrapping_add(size) / TELL_EACH_BYTES {
            self.wake();
        }
    }

    /// Who runs [`ahead`]: to be said before the first file is opened.
    pub(crate) fn followed_by(&self, thread: &Thread) {
        let _ = self.follower.set(thread.clone());
    }

    fn wake(&self) {
        if let Some(follower) = self.follower.get() {
            follower.unpark();
        }
    }
}

/// Ends [`ahead`], also when the reader panics.
pub(crate) struct Reading<'a>(pub(crate) &'a Progress);

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Relaxed);
        self.0.wake();
    }
}

/// Of several names of a file, some are not read.
fn size_if_read(node: &Node) -> Option<u64> {
    match node.entry.kind {
        Kind::File { size, link_group: 0, .. } => Some(size),
        _ => None,
    }
}

/// Asks for the beginning of a file of this size. Of how much.
pub(crate) fn fetch(file: &OwnedFd, size: u64) -> u64 {
    let length = FETCHED_BYTES.min(size);
    if length > 0 {
        sys::will_read(file, length);
    }
    length
}

/// Has the tree's files fetched until [`Reading`] ends. `open` gives those that may be on disk, `blocks_read` is
/// [`sys::blocks_read_by_thread`].
pub(crate) fn ahead(
    tree: &Tree,
    progress: &Progress,
    threads: usize,
    blocks_read: impl Fn() -> i64,
    open: impl Fn(&Node) -> Option<OwnedFd>,
) {
    let ahead_bytes = AHEAD_BYTES.saturating_add(AHEAD_BYTES_PER_THREAD.saturating_mul(threads as u64));
    let (mut passed, mut probed, mut left_alone) = (0_u64, 0, 0);
    let mut blocks = blocks_read();
    let mut cursor = tree.cursor();
    while let Some(node) = cursor.next() {
        let Some(size) = size_if_read(node).filter(|size| *size > 0) else { continue };
        let begin = passed;
        passed = passed.saturating_add(size);
        loop {
            if progress.ended.load(Ordering::Relaxed) {
                return;
            }
            if begin < progress.read_bytes.load(Ordering::Relaxed).saturating_add(ahead_bytes) {
                break;
            }
            thread::park();
        }
        if left_alone > 0 {
            left_alone -= 1;
            continue;
        }
        if begin < progress.read_bytes.load(Ordering::Relaxed) {
            continue;
        }
        let Some(file) = open(node) else { continue };
        fetch(&file, size);
        probed += 1;
        if probed == PROBES {
            let now = blocks_read();
            left_alone = if now == blocks { LEFT_ALONE } else { 0 };
            (probed, blocks) = (0, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{Entry, Origin};
    use std::cell::Cell;
    use std::sync::Mutex;
    use std::time::Duration;

    /// Every fourth file is another name of one.
    fn tree(files: usize, size: u64) -> Tree {
        let nodes = (0..files).map(|number| {
            let kind = Kind::File { size, digest: None, link_group: u32::from(number % 4 == 3) };
            let entry = Entry { kind, ..Entry::dir(format!("{number:04}").into_bytes(), 0o644) };
            Node { entry, origin: Origin::None }
        });
        Tree::from_nodes(nodes.collect())
    }

    /// Opens a file that is in memory, and keeps the number of the one that was meant.
    fn open<'a>(asked: &'a Mutex<Vec<usize>>) -> impl Fn(&Node) -> Option<OwnedFd> + 'a {
        let in_memory = rustix::fs::memfd_create("in memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        move |node| {
            asked.lock().unwrap().push(str::from_utf8(&node.entry.path).unwrap().parse().unwrap());
            Some(in_memory.try_clone().unwrap())
        }
    }

    /// What is asked for while `reader` goes on, which is given the number of it.
    fn asked(tree: &Tree, reader: impl FnOnce(&Progress, &dyn Fn() -> usize)) -> Vec<usize> {
        let (progress, asked) = (Progress::default(), Mutex::new(Vec::new()));
        thread::scope(|scope| {
            let follower = scope.spawn(|| ahead(tree, &progress, 0, || 0, open(&asked)));
            progress.followed_by(follower.thread());
            let _reading = Reading(&progress);
            reader(&progress, &|| asked.lock().unwrap().len());
        });
        asked.into_inner().unwrap()
    }

    #[test]
    fn it_stays_near_the_reader() {
        let tree = tree(40, AHEAD_BYTES / 8);
        let nodes = tree.nodes();
        let numbers = asked(&tree, |progress, count| {
            for expected in [8, 14] {
                for _ in 0..1000 {
                    if count() < expected {
                        thread::sleep(Duration::from_millis(10));
                    }
                }
                thread::sleep(Duration::from_millis(20));
                assert_eq!(count(), expected);
                nodes[..8].iter().for_each(|node| progress.opens(node));
            }
        });
        // It may or may not have gone on from there before it was ended.
        let few: Vec<usize> = (0..18).filter(|number| number % 4 != 3).collect();
        assert_eq!(numbers[..14], few);
    }

    #[test]
    fn what_is_in_memory_is_left_alone() {
        let (tree, progress) = (tree(2000, 100), Progress::default());
        let count = |blocks_read: &dyn Fn() -> i64| {
            let numbers = Mutex::new(Vec::new());
            ahead(&tree, &progress, 1, blocks_read, open(&numbers));
            numbers.into_inner().unwrap().len()
        };
        assert_eq!(count(&|| 7), 3 * PROBES as usize);
        let blocks = Cell::new(7);
        let more = || blocks.replace(blocks.get() + 1);
        assert_eq!(count(&more), 1500);
    }

    #[test]
    fn what_the_reader_has_passed_is_not_fetched() {
        let (numbers, progress) = (Mutex::new(Vec::new()), Progress::default());
        let tree = tree(40, 1000);
        tree.nodes()[..20].iter().for_each(|node| progress.opens(node));
        ahead(&tree, &progress, 1, || 0, open(&numbers));
        assert_eq!(numbers.into_inner().unwrap(), (20..40).filter(|number| number % 4 != 3).collect::<Vec<_>>());
    }

    #[test]
    fn it_ends_with_the_reader() {
        let tree = tree(100, AHEAD_BYTES);
        asked(&tree, |_, _| {});
        let result = std::panic::catch_unwind(|| asked(&tree, |_, _| panic!("the reader fails")));
        assert!(result.is_err());
    }
}
