//! Who owns what the step can see.
//!
//! What the step has changed is known by identity. Anything else has the owner that the snapshot's index says, found by
//! its path the first time somebody asks. An object of a lower layer gets another identity when overlayfs copies it up
//! and, where the kernel cannot note where it came from, once more when it has forgotten the copy; so what is recorded
//! is recorded under the identity of the upper directory's entry too, and a copy that nobody has recorded is
//! recognised by the mark that it was copied up.

use super::owners::{Identity, LowerOwner, Metadata, Owner};
use crate::sys::notify::RawStatx;
use rustix::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// Objects that were changed last are held open, so that their inodes cannot be used again: within the few
/// milliseconds that the kernel's clock for births stands still, time alone would not tell a new object from them.
const HELD: usize = 256;

/// An overlay that the step sees.
pub(super) struct Stack {
    /// Device number of the overlay.
    pub(super) device: (u32, u32),
    /// Where the step sees it, without slash at either end.
    pub(super) target: Vec<u8>,
    /// What of it is mounted there, in the same form.
    pub(super) part: Vec<u8>,
    /// Sorted by path.
    pub(super) lower: Vec<LowerOwner>,
    /// Upper directory, unless it is read-only.
    pub(super) upper: Option<OwnedFd>,
}

struct Known {
    owner: Owner,
    /// Recorded because the step did something, not looked up.
    changed: bool,
}

pub(super) struct Table {
    known: HashMap<Identity, Known>,
    stacks: Vec<Stack>,
    held: VecDeque<OwnedFd>,
    /// `/proc/self/fd` of this process, which is its working directory too.
    descriptors: OwnedFd,
    /// Something belongs to a group other than 0.
    has_groups: bool,
    has_lower: bool,
    /// What an open object was last seen as, by its descriptor.
    seen: RefCell<Option<(RawFd, Vec<u8>)>>,
}

/// Metadata of an open object.
pub(super) fn metadata(fd: impl AsFd) -> Result<RawStatx, rustix::io::Errno> {
    RawStatx::of(fd, c"", libc::AT_EMPTY_PATH as u32, libc::STATX_BASIC_STATS | libc::STATX_BTIME)
}

impl Table {
    /// Overlays in the order in which they were mounted, so that later ones cover earlier ones.
    pub(super) fn new(descriptors: OwnedFd, stacks: Vec<Stack>) -> Table {
        let lower = || stacks.iter().flat_map(|stack| &stack.lower);
        Table {
            has_groups: lower().any(|lower| lower.owner.gid != 0),
            has_lower: lower().next().is_some(),
            known: HashMap::new(),
            stacks,
            held: VecDeque::new(),
            descriptors,
            seen: RefCell::new(None),
        }
    }

    /// Adds what was recorded earlier.
    pub(super) fn preload(&mut self, records: impl IntoIterator<Item = (Identity, Owner)>) {
        for (identity, owner) in records {
            self.has_groups |= owner.gid != 0;
            self.known.insert(identity, Known { owner, changed: true });
        }
    }

    /// Device number of the root file system.
    pub(super) fn root_device(&self) -> (u32, u32) {
        self.stacks.first().map_or(super::UPPER, |stack| stack.device)
    }

    /// Whether everything belongs to 0:0.
    pub(super) fn is_empty(&self) -> bool {
        self.known.is_empty() && !self.has_lower
    }

    /// Whether a directory may hand a group on to what is made in it.
    pub(super) fn has_groups(&self) -> bool {
        self.has_groups
    }

    /// The owner of an object, if it is known without looking at paths.
    pub(super) fn known(&self, stat: &RawStatx) -> Option<Owner> {
        self.known.get(&Identity::of(stat)).map(|known| known.owner)
    }

    /// Whether the step has changed the owner of an object.
    pub(super) fn is_changed(&self, stat: &RawStatx) -> bool {
        self.known.get(&Identity::of(stat)).is_some_and(|known| known.changed)
    }

    /// The owner of an open object.
    pub(super) fn owner(&mut self, fd: &OwnedFd, stat: &RawStatx) -> Owner {
        if let Some(owner) = self.known(stat) {
            return owner;
        }
        let owner = self.look_up(fd, stat).unwrap_or_default();
        self.known.insert(Identity::of(stat), Known { owner, changed: false });
        owner
    }

    /// What the index of the snapshot says about an object of it.
    fn look_up(&self, fd: &OwnedFd, stat: &RawStatx) -> Option<Owner> {
        if !self.has_lower {
            return None;
        }
        let (stack, path) = self.place(fd, stat)?;
        let found = stack.lower.binary_search_by(|lower| lower.path.as_slice().cmp(&path)).ok()?;
        let lower = &stack.lower[found];
        let Some(upper) = &stack.upper else { return Some(lower.owner) };
        match open_upper(upper, &path) {
            // It is one of a lower layer.
            None => Some(lower.owner),
            Some(entry) => {
                let is_directory = Metadata(stat).mode() & libc::S_IFMT == libc::S_IFDIR;
                let is_copy = self.has_origin(&entry) || lower.linked && !is_directory || path.is_empty();
                is_copy.then_some(lower.owner)
            }
        }
    }

    /// The overlay that an open object is in, and its path there.
    fn place(&self, fd: &OwnedFd, stat: &RawStatx) -> Option<(&Stack, Vec<u8>)> {
        let device = Metadata(stat).device();
        let path = self.path(fd)?;
        let stack = self.stacks.iter().rev().find(|stack| {
            stack.device == device
                && (stack.target.is_empty()
                    || path.strip_prefix(&*stack.target).is_some_and(|rest| rest.is_empty() || rest[0] == b'/'))
        })?;
        let rest = path[stack.target.len()..].strip_prefix(b"/").unwrap_or(&path[stack.target.len()..]);
        let separator: &[u8] = if stack.part.is_empty() || rest.is_empty() { b"" } else { b"/" };
        Some((stack, [&stack.part, separator, rest].concat()))
    }

    /// Where the kernel sees an open object, from the step's root, without leading slash. Asked once a call.
    fn path(&self, fd: &OwnedFd) -> Option<Vec<u8>> {
        let number = fd.as_raw_fd();
        if let Some((seen, path)) = &*self.seen.borrow()
            && *seen == number
        {
            return Some(path.clone());
        }
        let path = rustix::fs::readlinkat(&self.descriptors, number.to_string(), Vec::new()).ok()?.into_bytes();
        let path = path.strip_prefix(b"/")?.to_vec();
        *self.seen.borrow_mut() = Some((number, path.clone()));
        Some(path)
    }

    /// To be told when a new call is looked at: descriptors get other meanings.
    pub(super) fn forget_path(&mut self) {
        *self.seen.get_mut() = None;
    }

    /// Whether an entry of an upper directory was copied up.
    fn has_origin(&self, entry: &OwnedFd) -> bool {
        // Attributes cannot be read from a descriptor that is a place only, but through `/proc/self/fd`, which is this
        // process's working directory.
        let name = entry.as_raw_fd().to_string();
        let has = |attribute: &str| rustix::fs::getxattr_query(&*name, attribute).is_ok();
        has("user.overlay.origin") || has("trusted.overlay.origin")
    }

    /// Records who owns an open object from now on. Nothing of a lower layer may be recorded before it was copied up.
    pub(super) fn record(&mut self, fd: OwnedFd, owner: Owner) -> Result<(), rustix::io::Errno> {
        let stat = metadata(&fd)?;
        let identity = Identity::of(&stat);
        if let Some(inode) = self.upper_inode(&fd, &stat) {
            self.known.insert(Identity { inode, ..identity }, Known { owner, changed: true });
        }
        self.known.insert(identity, Known { owner, changed: true });
        self.has_groups |= owner.gid != 0;
        if self.held.len() == HELD {
            self.held.pop_front();
        }
        self.held.push_back(fd);
        self.forget_path();
        Ok(())
    }

    /// Inode number of an object's entry in the upper directory.
    fn upper_inode(&self, fd: &OwnedFd, stat: &RawStatx) -> Option<u64> {
        let (stack, path) = self.place(fd, stat)?;
        let entry = metadata(open_upper(stack.upper.as_ref()?, &path)?).ok()?;
        // Another one may have taken the path meanwhile.
        (Metadata(&entry).born() == Metadata(stat).born()).then(|| Metadata(&entry).inode())
    }

    /// Gives a file its bytes in the upper directory, so that what is recorded about it stays true.
    pub(super) fn copy_up(&self, fd: &OwnedFd, stat: &RawStatx) -> Result<(), rustix::io::Errno> {
        let mode = Metadata(stat).mode();
        match mode & libc::S_IFMT {
            libc::S_IFLNK => rustix::fs::chownat(fd, "", Some(rustix::fs::Uid::ROOT), None, AtFlags::EMPTY_PATH),
            libc::S_IFDIR => Ok(()),
            _ => {
                let name = fd.as_raw_fd().to_string();
                rustix::fs::chmodat(&self.descriptors, name, Mode::from_raw_mode(mode), AtFlags::empty())
            }
        }
    }

    /// All that the step has changed.
    pub(super) fn changed(&self) -> impl Iterator<Item = (Identity, Owner)> {
        let changed = self.known.iter().filter(|(_, known)| known.changed);
        changed.map(|(identity, known)| (*identity, known.owner))
    }
}

/// Opens an entry of an upper directory as a place.
fn open_upper(upper: &OwnedFd, path: &[u8]) -> Option<OwnedFd> {
    let path = if path.is_empty() { OsStr::new(".") } else { OsStr::from_bytes(path) };
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    rustix::fs::openat2(upper, path, flags, Mode::empty(), resolve).ok()
}
