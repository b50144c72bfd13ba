//! Reads the upper directory of an overlay after a RUN as a layer: what the step changed.
//!
//! ```text
//! upper has                                   layer has
//! character device 0:0, or a file with        a whiteout, if the lower layers have something there
//!   overlay.whiteout
//! directory with overlay.opaque=y             an opaque directory, if the lower layers have content there
//! entry copied up and left as it was          nothing
//! directory that differs by its time only     nothing (its content stands for itself)
//! socket                                      nothing
//! ```
//! The file system marks files with attributes in the `user.overlay.` (or `trusted.overlay.`) namespace; none of them
//! reaches a layer. An entry is "as it was" when kind, mode, owner, kept attributes, content, target and, but for
//! directories, time are those of the lower layers.

use crate::context::digest_of;
use crate::materialize::Ownership;
use crate::op::changes::is_same;
use crate::op::owners;
use crate::sandbox::emulation::{Device, Identity, Records, UPPER};
use crate::scan::{self, Detail, Everything, ScanError, ScanOptions, keep_attributes, open_below};
use crate::tree::{Attributes, ContentDigest, Entry, Inode, Kind, Node, Origin, Tree, TreeBuilder, is_within};
use rustix::fs::{CWD, Mode, OFlags, openat};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Why an upper directory cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum UpperError {
    /// It cannot be walked.
    #[error("cannot read what the step changed")]
    Scan(#[from] ScanError),
    /// A file in it cannot be read.
    #[error("cannot read {path:?}", path = .path.display())]
    ReadFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// An extended attribute that a step has set and a layer cannot hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LostAttribute {
    /// Of which file, without leading slash.
    pub path: Vec<u8>,
    /// Its name.
    pub name: Vec<u8>,
}

/// The layer that `upper` makes of `lower`, the flattened stack below it, whose digests must be known. Files are read
/// in place and have their digests; hard links are grouped. `recorded` is what the disk does not hold: device nodes and,
/// where only one id exists, owners; those that the step has not changed are as below, or 0:0. `lost` takes what layers
/// do not hold.
pub fn scan_upper(
    upper: &Path,
    lower: &Tree,
    ownership: Ownership,
    recorded: &Records,
    lost: &mut Vec<LostAttribute>,
) -> Result<Tree, UpperError> {
    let mut found = scan::scan(upper, &ScanOptions { detail: Detail::Full, filter: &Everything })?;
    digest_all(upper, &mut found)?;
    let mut changes = TreeBuilder::new();
    // The directory in which nothing of the lower layers shows.
    let mut hiding: Option<Vec<u8>> = None;
    let mut cursor = found.cursor();
    while let Some(node) = cursor.next() {
        let Node { mut entry, mut origin } = node.clone();
        if entry.path.is_empty() {
            continue;
        }
        let inode = take_inode(&mut origin);
        let mark = |name: &str| overlay_mark(&entry.xattrs, name).map(<[u8]>::to_vec);
        let (whiteout, opaque, copied_from) = (mark("whiteout"), mark("opaque"), mark("origin"));
        if hiding.as_ref().is_some_and(|dir| !is_within(&entry.path, dir)) {
            hiding = None;
        }
        let hidden = hiding.is_some();
        let before = if hidden { None } else { lower.get(&entry.path) };
        let is_whiteout =
            matches!(entry.kind, Kind::Char { major: 0, minor: 0 }) || entry.is_file() && whiteout.is_some();
        if is_whiteout {
            if !hidden && lower.holds(&entry.path) {
                changes.push(&Entry { kind: Kind::Whiteout, ..Entry::dir(entry.path, 0) }, &Origin::None);
            }
            continue;
        }
        let is_opaque = opaque.as_deref() == Some(b"y");
        let copied_up = match &mut entry.kind {
            Kind::Dir { opaque } => {
                *opaque = is_opaque && !hidden && lower.has_content(&entry.path);
                let was_dir = before.as_ref().is_some_and(|node| node.entry.is_dir());
                if !hidden && (is_opaque || before.is_some() && !was_dir) {
                    hiding = Some(entry.path.clone());
                }
                was_dir && !is_opaque
            }
            // Of hard links the kernel does not note where they came from.
            Kind::File { .. } => {
                copied_from.is_some() || before.as_ref().is_some_and(|node| node.entry.link_group() != 0)
            }
            _ => copied_from.is_some(),
        };
        if !entry.is_file() {
            origin = Origin::None;
        }
        let known =
            inode.and_then(|Inode { ino, born, .. }| recorded.get(&Identity { device: UPPER, inode: ino, born }));
        let below = before.as_ref().filter(|_| copied_up).map(|node| owners::owner_of(&node.entry));
        let owner = known.copied().or(below).unwrap_or_default();
        if ownership == Ownership::SingleId {
            (entry.uid, entry.gid) = (owner.uid, owner.gid);
        }
        // A file has taken its place.
        if let (Some(Device { block, major, minor }), true) = (owner.device, entry.is_file()) {
            entry.kind = if block { Kind::Block { major, minor } } else { Kind::Char { major, minor } };
            origin = Origin::None;
        }
        let missed = keep_attributes(&mut entry);
        let node = Node { entry, origin };
        if !before.is_some_and(|before| is_same(&before, &node)) {
            lost.extend(missed.map(|name| LostAttribute { path: node.entry.path.clone(), name }));
            changes.push_node(&node);
        }
    }
    Ok(changes.finish().number_links())
}

/// What the walk saw of a file's inode, which is of no use later.
pub(crate) fn take_inode(origin: &mut Origin) -> Option<Inode> {
    match origin {
        Origin::File(file) => file.inode.take(),
        _ => None,
    }
}

/// Value of one of overlayfs's own attributes.
fn overlay_mark<'a>(xattrs: &'a Attributes, name: &str) -> Option<&'a [u8]> {
    ["user.overlay.", "trusted.overlay."]
        .iter()
        .find_map(|prefix| xattrs.get(format!("{prefix}{name}").as_bytes()))
        .map(Vec::as_slice)
}

/// Fills in the digests of all files of what was found in `upper`, in parallel; of hard links once for each inode.
pub(crate) fn digest_all(upper: &Path, found: &mut Tree) -> Result<(), UpperError> {
    let failed = |path: &Path, source| UpperError::ReadFile { path: path.to_owned(), source };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = openat(CWD, upper, flags, Mode::empty()).map_err(|error| failed(upper, error.into()))?;
    let linked: Mutex<HashMap<u32, ContentDigest>> = Mutex::default();
    let digest_of_group = |group: u32| match group {
        0 => None,
        group => linked.lock().unwrap_or_else(PoisonError::into_inner).get(&group).copied(),
    };
    let one = |(): &mut (), entry: &mut Entry, _: &mut Origin| -> Result<(), UpperError> {
        let Kind::File { digest, link_group, .. } = &mut entry.kind else { return Ok(()) };
        let read = || -> io::Result<ContentDigest> {
            let flags = OFlags::RDONLY | OFlags::NONBLOCK;
            let mut file = File::from(open_below(root.as_fd(), &entry.path, flags)?);
            Ok(digest_of(&mut file)?.0)
        };
        let found = match digest_of_group(*link_group) {
            Some(found) => found,
            None => read().map_err(|source| failed(&upper.join(OsStr::from_bytes(&entry.path)), source))?,
        };
        if *link_group != 0 {
            linked.lock().unwrap_or_else(PoisonError::into_inner).insert(*link_group, found);
        }
        *digest = Some(found);
        Ok(())
    };
    found.update(|_| (), one, |()| ()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::materialize::{WriteOptions, write_tree};
    use crate::sandbox::emulation::Owner;
    use rustix::fs::{FileType, XattrFlags, makedev, mknodat};

    const NATIVE: Ownership = Ownership::Native;

    fn changes_in(upper: &Path, lower: &Tree, ownership: Ownership, recorded: &Records) -> Result<Tree, UpperError> {
        scan_upper(upper, lower, ownership, recorded, &mut Vec::new())
    }

    /// A lower tree and its directory. Owners are ours, so that the test needs no privilege.
    fn lower(dir: &Path, paths: &[(&str, &str)]) -> Tree {
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        let node = |(path, content): &(&str, &str)| {
            let mut entry = Entry { uid, gid, mtime: (1, 5), ..Entry::dir(path.trim_end_matches('/'), 0o755) };
            let mut origin = Origin::None;
            if !path.ends_with('/') {
                let bytes = content.as_bytes();
                let digest = Some(*blake3::hash(bytes).as_bytes());
                entry.kind = Kind::File { size: bytes.len() as u64, digest, link_group: 0 };
                entry.mode = 0o644;
                origin = Origin::Inline(bytes.into());
            }
            Node { entry, origin }
        };
        let tree = Tree::from_nodes(paths.iter().map(node).collect());
        let read = |_: &Node| Err(io::ErrorKind::NotFound.into());
        write_tree(&tree, &read, dir, WriteOptions { ownership: NATIVE }).unwrap();
        tree
    }

    fn listing(tree: &Tree) -> Vec<String> {
        let line = |node: &Node| {
            let path = String::from_utf8_lossy(&node.entry.path);
            match &node.entry.kind {
                Kind::Whiteout => format!("-{path}"),
                Kind::Dir { opaque: true } => format!("{path}/!"),
                Kind::Dir { .. } => format!("{path}/"),
                Kind::File { link_group: group @ 1.., .. } => format!("{path}#{group}"),
                _ => path.into_owned(),
            }
        };
        tree.nodes().iter().map(line).collect()
    }

    /// Copies a whole tree as the kernel copies up: same metadata.
    fn copy_up(from: &Tree, upper: &Path) {
        let read = |_: &Node| Err(io::ErrorKind::NotFound.into());
        write_tree(from, &read, upper, WriteOptions { ownership: NATIVE }).unwrap();
    }

    fn mark_opaque(path: &Path) {
        rustix::fs::setxattr(path, "user.overlay.opaque", b"y", XattrFlags::empty()).unwrap();
    }

    fn whiteout(path: &Path) {
        mknodat(CWD, path, FileType::CharacterDevice, Mode::empty(), makedev(0, 0)).unwrap();
    }

    #[test]
    fn only_changes_remain() {
        let dir = tempfile::tempdir().unwrap();
        let (base, upper) = (dir.path().join("base"), dir.path().join("upper"));
        let tree =
            lower(&base, &[("/", ""), ("d/", ""), ("d/a", "1"), ("d/b", "2"), ("d/c", "3"), ("e/", ""), ("e/x", "4")]);
        copy_up(&tree, &upper);
        assert_eq!(listing(&changes_in(&upper, &tree, NATIVE, &Records::new()).unwrap()), [""; 0]);
        std::fs::write(upper.join("d/b"), "new").unwrap();
        std::fs::write(upper.join("d/n"), "new").unwrap();
        let changed = changes_in(&upper, &tree, NATIVE, &Records::new()).unwrap();
        assert_eq!(listing(&changed), ["d/b", "d/n"]);
        let touched = File::options().write(true).open(upper.join("d/c")).unwrap();
        touched.set_modified(std::time::UNIX_EPOCH).unwrap();
        rustix::fs::chmod(upper.join("e"), Mode::RWXU).unwrap();
        std::fs::remove_file(upper.join("d/a")).unwrap();
        whiteout(&upper.join("d/a"));
        whiteout(&upper.join("nothing-there"));
        std::fs::hard_link(upper.join("d/n"), upper.join("m")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(upper.join("socket")).unwrap();
        let changed = changes_in(&upper, &tree, NATIVE, &Records::new()).unwrap();
        assert_eq!(listing(&changed), ["-d/a", "d/b", "d/c", "d/n#1", "e/", "m#1"]);
        assert!(matches!(
            changed.get(b"m").unwrap().entry.kind,
            Kind::File { digest: Some(digest), size: 3, .. } if digest == *blake3::hash(b"new").as_bytes()
        ));
    }

    #[test]
    fn opaque_directories() {
        let dir = tempfile::tempdir().unwrap();
        let (base, upper) = (dir.path().join("base"), dir.path().join("upper"));
        let tree = lower(&base, &[("d/", ""), ("d/s/", ""), ("d/s/a", "1"), ("e/", ""), ("f", "2")]);
        for name in ["d/s", "e", "f", "n"] {
            std::fs::create_dir_all(upper.join(name)).unwrap();
        }
        for name in ["d", "e", "f", "n"] {
            mark_opaque(&upper.join(name));
        }
        std::fs::write(upper.join("d/s/a"), "1").unwrap();
        // `d/s` shows nothing of below although it has no mark, and a whiteout in it hides nothing.
        whiteout(&upper.join("d/s/w"));
        let changed = changes_in(&upper, &tree, NATIVE, &Records::new()).unwrap();
        assert_eq!(listing(&changed), ["d/!", "d/s/", "d/s/a", "f/", "n/"]);
    }

    #[test]
    fn with_one_id_owners_come_from_below() {
        let dir = tempfile::tempdir().unwrap();
        let (base, upper) = (dir.path().join("base"), dir.path().join("upper"));
        let mut tree = lower(&base, &[("d/", ""), ("d/a", "1"), ("d/b", "1")]);
        tree.edit(|nodes| nodes.iter_mut().for_each(|node| (node.entry.uid, node.entry.gid) = (5, 6)));
        std::fs::create_dir_all(upper.join("d")).unwrap();
        for name in ["d/a", "d/b"] {
            std::fs::write(upper.join(name), "changed").unwrap();
        }
        rustix::fs::setxattr(upper.join("d/a"), "user.overlay.origin", b"", XattrFlags::empty()).unwrap();
        for name in ["d/c", "d/node"] {
            std::fs::write(upper.join(name), "").unwrap();
        }
        let device = Some(Device { block: true, major: 8, minor: 1 });
        let record = |(path, owner): (&str, Owner)| {
            let found = crate::scan::stat_at(CWD, &crate::sys::c_string(upper.join(path)).unwrap()).unwrap();
            let born = (found.stx_btime.tv_sec, found.stx_btime.tv_nsec);
            (Identity { device: UPPER, inode: found.stx_ino, born }, owner)
        };
        let owners = [("d/c", Owner { uid: 7, gid: 8, device: None }), ("d/node", Owner { uid: 0, gid: 9, device })];
        let recorded: Records = owners.map(record).into();
        let changed = changes_in(&upper, &tree, Ownership::SingleId, &recorded).unwrap();
        assert_eq!(listing(&changed), ["d/a", "d/b", "d/c", "d/node"]);
        let owner = |path: &[u8]| changed.get(path).map(|node| (node.entry.uid, node.entry.gid)).unwrap();
        assert_eq!([owner(b"d/a"), owner(b"d/b"), owner(b"d/c"), owner(b"d/node")], [(5, 6), (0, 0), (7, 8), (0, 9)]);
        let node = &changed.get(b"d/node").unwrap();
        assert_eq!((&node.entry.kind, &node.origin), (&Kind::Block { major: 8, minor: 1 }, &Origin::None));
        assert!(changed.nodes().iter().all(|node| node.entry.xattrs.is_empty()));
    }

    #[test]
    fn attributes_that_layers_do_not_hold_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let (base, upper) = (dir.path().join("base"), dir.path().join("upper"));
        let tree = lower(&base, &[("/", "")]);
        std::fs::create_dir(&upper).unwrap();
        for (name, attribute) in [("a", "user.note"), ("b", "user.overlay.origin"), ("c", "user.overlay.note")] {
            std::fs::write(upper.join(name), "new").unwrap();
            rustix::fs::setxattr(upper.join(name), attribute, b"x", XattrFlags::empty()).unwrap();
        }
        let mut lost = Vec::new();
        scan_upper(&upper, &tree, NATIVE, &Records::new(), &mut lost).unwrap();
        assert_eq!(lost, [LostAttribute { path: b"a".to_vec(), name: b"user.note".to_vec() }]);
    }
}
