//! Owners of files around a RUN when there is only one id: what its supervisor is told, and what it hands back.
//!
//! Owners of snapshots come from their indexes. Cache mounts are plain directories without an index: owners of what is in
//! them stand in a file `owners` beside the data.

use crate::sandbox::emulation::{
    self, Device, Emulation, Identity, LowerOwner, Owner, Records, Scope, UPPER, read_list, write_list,
};
use crate::sys::notify::RawStatx;
use crate::tree::{Entry, Kind, Node, Tree};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Name of the file with the owners of a cache's content.
const FILE: &str = "owners";

/// Directories of cache mounts by their ids.
pub(super) type Caches = BTreeMap<String, PathBuf>;

/// Who owns an entry.
pub(crate) fn owner_of(entry: &Entry) -> Owner {
    let device = match entry.kind {
        Kind::Char { major, minor } => Some(Device { block: false, major, minor }),
        Kind::Block { major, minor } => Some(Device { block: true, major, minor }),
        _ => None,
    };
    Owner { uid: entry.uid, gid: entry.gid, device }
}

/// Whether a step may look at a device: one that is below it (those of /dev are covered), or that its command, given by its
/// `texts`, makes by the usual program. A program that makes one by itself and looks at it is not recognised.
pub(super) fn may_see_devices<'a>(flat: &Tree, mut texts: impl Iterator<Item = &'a str>) -> bool {
    let covered = |path: &[u8]| [&b"dev/"[..], b"proc/", b"sys/"].iter().any(|directory| path.starts_with(directory));
    let is_device = |entry: &Entry| owner_of(entry).device.is_some() && !covered(&entry.path);
    if texts.any(|text| text.contains("mknod")) {
        return true;
    }
    let mut cursor = flat.cursor();
    while let Some(node) = cursor.next() {
        if is_device(&node.entry) {
            return true;
        }
    }
    false
}

/// What the disk does not hold of an entry where `scope` is emulated.
fn emulated(entry: &Entry, scope: Scope) -> Option<Owner> {
    let owner = owner_of(entry);
    let differs = match scope {
        Scope::SingleId => !owner.is_plain(),
        Scope::Devices { .. } => owner.device.is_some(),
    };
    differs.then_some(owner)
}

/// Writes the owners of `tree` that the disk does not hold to the new file `path`. `None` when there are none.
pub(super) fn write_lower(tree: &Tree, scope: Scope, path: PathBuf) -> io::Result<Option<PathBuf>> {
    let mut list: Vec<LowerOwner> = Vec::new();
    let mut cursor = tree.cursor();
    while let Some(node) = cursor.next() {
        if let Some(owner) = emulated(&node.entry, scope) {
            let linked = matches!(node.entry.kind, Kind::File { link_group: 1.., .. });
            list.push(LowerOwner { path: node.entry.path.clone(), owner, linked });
        }
    }
    if list.is_empty() {
        return Ok(None);
    }
    // The supervisor searches by bytes, in which `/` is nothing special.
    list.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    write_list(&path, list.iter())?;
    Ok(Some(path))
}

/// Files for the supervisor of a step, in `scratch`.
/// Without a tree below, `copied` are the owners of what was copied.
pub(super) fn prepare(
    scope: Scope,
    flat: Option<&Tree>,
    copied: Vec<(Identity, Owner)>,
    caches: &Caches,
    scratch: &Path,
) -> io::Result<Emulation> {
    let result = scratch.join("owners");
    if scope == (Scope::Devices { shown: false }) {
        return Ok(Emulation { scope, lower: None, known: None, result });
    }
    let mut known = copied;
    if scope == Scope::SingleId {
        for base in caches.values() {
            known.extend(read_cache(base)?);
        }
    }
    let path = scratch.join("known-owners");
    if !known.is_empty() {
        write_list(&path, known.iter())?;
    }
    Ok(Emulation {
        scope,
        lower: match flat {
            Some(flat) => write_lower(flat, scope, scratch.join("lower-owners"))?,
            None => None,
        },
        known: (!known.is_empty()).then_some(path),
        result,
    })
}

/// Takes what the supervisor recorded: keeps what is about cache mounts, returns what is about the upper directory.
pub(super) fn take(emulation: &Emulation, caches: &Caches) -> io::Result<Records> {
    let (upper, other): (Vec<_>, Vec<_>) = read_list::<(Identity, Owner)>(&emulation.result)?
        .into_iter()
        .partition(|(identity, _)| identity.device == UPPER);
    let caches = caches.values().filter(|_| emulation.scope == Scope::SingleId);
    for base in caches {
        let Some(device) = device(&base.join("data"))? else { continue };
        let mut records: Records = read_cache(base)?.into_iter().collect();
        let before = records.clone();
        records.extend(other.iter().filter(|(identity, _)| identity.device == device).copied());
        if records != before {
            write_cache(base, records.into_iter().collect())?;
        }
    }
    Ok(upper.into_iter().collect())
}

/// Records who owns the files that a cache was filled with.
pub(super) fn record_cache(base: &Path, data: &Path, tree: &Tree) -> io::Result<()> {
    write_cache(base, identities(data, tree, Scope::SingleId)?)
}

/// Who owns what `tree` was written as, as far as the disk does not hold it.
pub(super) fn identities(directory: &Path, tree: &Tree, scope: Scope) -> io::Result<Vec<(Identity, Owner)>> {
    let root = crate::sys::open_place(directory).map_err(|error| error.source)?;
    let mut records = Vec::new();
    let mut cursor = tree.cursor();
    while let Some(Node { entry, .. }) = cursor.next() {
        let Some(owner) = emulated(entry, scope) else { continue };
        let path = if entry.path.is_empty() { OsStr::new(".") } else { OsStr::from_bytes(&entry.path) };
        let text = crate::sys::c_string(path).map_err(|error| error.source)?;
        records.push((Identity::of(&stat(&root, &text)?), owner));
    }
    Ok(records)
}

fn stat(dir: impl rustix::fd::AsFd, path: &std::ffi::CStr) -> io::Result<RawStatx> {
    let flags = libc::AT_SYMLINK_NOFOLLOW as u32;
    Ok(RawStatx::of(dir, path, flags, libc::STATX_BASIC_STATS | libc::STATX_BTIME)?)
}

/// Device number of what is at `path`, if there is something.
fn device(path: &Path) -> io::Result<Option<(u32, u32)>> {
    let text = crate::sys::c_string(path).map_err(|error| error.source)?;
    match stat(rustix::fs::CWD, &text) {
        Ok(stat) => Ok(Some(Identity::of(&stat).device)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Owners in a cache; device numbers are those of today.
fn read_cache(base: &Path) -> io::Result<Vec<(Identity, Owner)>> {
    let (device, list) = match (device(&base.join("data"))?, read_list(&base.join(FILE))) {
        (Some(device), Ok(list)) => (device, list),
        (None, _) => return Ok(Vec::new()),
        (_, Err(error)) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        (_, Err(error)) => return Err(error),
    };
    let today = |(identity, owner): (Identity, Owner)| (Identity { device, ..identity }, owner);
    Ok(list.into_iter().map(today).collect())
}

/// Replaces the owners of a cache in one step: others may be reading them.
fn write_cache(base: &Path, mut records: Vec<(Identity, Owner)>) -> io::Result<()> {
    records.sort_unstable_by_key(|(identity, _)| *identity);
    let fresh = tempfile::NamedTempFile::new_in(base)?;
    emulation::write_list(fresh.path(), records.iter())?;
    fresh.persist(base.join(FILE)).map_err(|error| error.error)?;
    Ok(())
}
