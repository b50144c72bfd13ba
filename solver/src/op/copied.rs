//! Root file systems without overlayfs: a copy that the step writes in place, compared with what it was copied from.
//!
//! Blocks are shared where the file system can. What the step did to files gives the same layer as with overlayfs; a
//! directory that it removed and made anew is told by what is missing in it, not by an opaque mark.

use super::changes::is_same;
use super::owners;
use crate::materialize::{self, MaterializeError, Ownership, ReadContent, WriteOptions};
use crate::sandbox::emulation::{Device, Identity, Owner, Records, Scope, UPPER};
use crate::scan::{self, Detail, Everything, ScanOptions, keep_attributes};
use crate::tree::{Entry, Inode, Kind, Node, Origin, Tree, TreeBuilder, parent};
use crate::upper::{LostAttribute, UpperError, digest_all, take_inode};
use std::io;
use std::path::Path;

/// Writes a snapshot into the new directory `root`; returns the owners that the disk does not hold.
pub(super) fn copy(
    tree: &Tree,
    read: &ReadContent<'_>,
    root: &Path,
    options: WriteOptions,
) -> Result<Vec<(Identity, Owner)>, MaterializeError> {
    materialize::write_tree(tree, read, root, options)?;
    let scope = match options.ownership {
        // Where the kernel makes devices, nobody asks for this.
        Ownership::Native => Scope::Devices { shown: true },
        Ownership::SingleId => Scope::SingleId,
    };
    owners::identities(root, tree, scope).map_err(|source| MaterializeError::Call {
        call: "stat",
        path: root.to_owned(),
        source,
    })
}

/// The layer that the step has made of `before`, whose copy is `root`.
pub(super) fn changes(
    root: &Path,
    before: &Tree,
    ownership: Ownership,
    recorded: &Records,
    lost: &mut Vec<LostAttribute>,
) -> Result<Tree, UpperError> {
    let mut found = scan::scan(root, &ScanOptions { detail: Detail::Full, filter: &Everything })?;
    digest_all(root, &mut found)?;
    let mut changes = TreeBuilder::new();
    let mut both = before.zip(&found);
    while let Some((old, new)) = both.next() {
        let Some(Node { mut entry, mut origin }) = new.cloned() else {
            let path = old.map_or(&b""[..], |old| &old.entry.path);
            // What was in something that is gone needs no whiteout of its own.
            if !path.is_empty() && found.get(parent(path)).is_some_and(|above| above.entry.is_dir()) {
                changes.push(&Entry { kind: Kind::Whiteout, ..Entry::dir(path, 0) }, &Origin::None);
            }
            continue;
        };
        if entry.path.is_empty() {
            continue;
        }
        let inode = take_inode(&mut origin);
        if !entry.is_file() {
            origin = Origin::None;
        }
        let known =
            inode.and_then(|Inode { ino, born, .. }| recorded.get(&Identity { device: UPPER, inode: ino, born }));
        if ownership == Ownership::SingleId {
            (entry.uid, entry.gid) = known.map_or((0, 0), |owner| (owner.uid, owner.gid));
        }
        // An empty file stands for a device that cannot be made; one that was there before has no record where ids
        // are real.
        let stands_for = known.and_then(|owner| owner.device).or_else(|| {
            let empty = matches!(entry.kind, Kind::File { size: 0, .. });
            old.filter(|_| empty).and_then(|old| owners::owner_of(&old.entry).device)
        });
        if let (Some(Device { block, major, minor }), true) = (stands_for, entry.is_file()) {
            entry.kind = if block { Kind::Block { major, minor } } else { Kind::Char { major, minor } };
            origin = Origin::None;
        }
        let missed = keep_attributes(&mut entry);
        let node = Node { entry, origin };
        if !old.is_some_and(|old| is_same(old, &node)) {
            lost.extend(missed.map(|name| LostAttribute { path: node.entry.path.clone(), name }));
            changes.push_node(&node);
        }
    }
    Ok(changes.finish().number_links())
}

/// Writes the changes as a directory that a layer's tree can be.
pub(super) fn write_upper(tree: &Tree, upper: &Path, options: WriteOptions) -> Result<(), MaterializeError> {
    let read = |_: &Node| Err::<Box<dyn io::Read>, _>(io::Error::other("every file of the copy is on disk"));
    materialize::write_tree(tree, &read, upper, options)
}
