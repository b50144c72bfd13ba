//! What others than root make, and device nodes.
//!
//! Who makes an object owns it, in the group of its directory when that is set-group-ID. For 0:0 the kernel does all that
//! is needed. For others the object is made here, with the caller's file mode creation mask, and recorded before the
//! caller can get hold of it.

use super::owners::{Device, Metadata, Owner};
use super::{Answer, Emulator, Scope, table};
use crate::sys::notify::Notification;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid, openat};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// As many symbolic links as the kernel follows.
const MAX_LINKS: usize = 40;

/// `__O_TMPFILE`, without O_DIRECTORY.
pub(crate) const UNNAMED: u32 = libc::O_TMPFILE as u32 & !(libc::O_DIRECTORY as u32);

impl Emulator {
    /// Who will own what the caller makes in `dir`.
    fn owner_in(&mut self, call: &Notification, dir: &OwnedFd) -> Result<Owner, Errno> {
        let own = self.credentials(call)?;
        let (uid, gid) = (own.user.file_system, own.group.file_system);
        let stat = table::metadata(dir)?;
        let gid = match Metadata(&stat).mode() & libc::S_ISGID {
            0 => gid,
            _ => self.table.owner(dir, &stat).gid,
        };
        Ok(Owner { uid, gid, device: None })
    }

    /// Whether all that the caller makes belongs to 0:0, wherever it is.
    fn makes_plain(&self, call: &Notification) -> Result<bool, Errno> {
        let own = self.credentials(call)?;
        Ok((own.user.file_system, own.group.file_system) == (0, 0) && !self.table.has_groups())
    }

    /// Takes the caller's file mode creation mask.
    fn use_mask(&mut self, call: &Notification) -> Result<(), Errno> {
        let mask = u32::from_str_radix(self.status(call)?.field("Umask:")?, 8).map_err(|_| Errno::IO)?;
        if mask != self.umask {
            _ = rustix::process::umask(Mode::from_raw_mode(mask));
            self.umask = mask;
        }
        Ok(())
    }

    /// Records what was just made.
    fn record_entry(&mut self, dir: &OwnedFd, name: &[u8], owner: Owner) -> Result<(), Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(dir, OsStr::from_bytes(name), flags, Mode::empty())?;
        self.table.record(file, owner)
    }

    /// Makes `path` by `make`, unless the kernel can do that as well.
    fn make(
        &mut self,
        call: &Notification,
        dir: i32,
        path: u64,
        device: Option<Device>,
        make: impl FnOnce(&OwnedFd, &OsStr) -> Result<(), Errno>,
    ) -> Result<Answer, Errno> {
        if device.is_none() && self.makes_plain(call)? {
            return Ok(Answer::Continue);
        }
        let path = self.read_path(call, path)?;
        // What is wrong with the path, the kernel says best.
        let Ok(Some((parent, name))) = self.parent(call, dir, &path) else { return Ok(Answer::Continue) };
        let owner = Owner { device, ..self.owner_in(call, &parent)? };
        if owner.is_plain() {
            return Ok(Answer::Continue);
        }
        self.use_mask(call)?;
        make(&parent, OsStr::from_bytes(&name))?;
        self.record_entry(&parent, &name, owner)?;
        Ok(Answer::Value(0))
    }

    pub(super) fn make_directory(
        &mut self,
        call: &Notification,
        dir: i32,
        path: u64,
        mode: u32,
    ) -> Result<Answer, Errno> {
        let mode = Mode::from_raw_mode(mode);
        self.make(call, dir, path, None, |parent, name| rustix::fs::mkdirat(parent, name, mode))
    }

    pub(super) fn make_symlink(
        &mut self,
        call: &Notification,
        target: u64,
        dir: i32,
        path: u64,
    ) -> Result<Answer, Errno> {
        if self.makes_plain(call)? {
            return Ok(Answer::Continue);
        }
        let target = self.read_path(call, target)?;
        let make = |parent: &OwnedFd, name: &OsStr| rustix::fs::symlinkat(OsStr::from_bytes(&target), parent, name);
        self.make(call, dir, path, None, make)
    }

    pub(super) fn make_node(
        &mut self,
        call: &Notification,
        dir: i32,
        path: u64,
        mode: u32,
        device: u32,
    ) -> Result<Answer, Errno> {
        let (major, minor) = (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xf_ff00);
        let device = match mode & libc::S_IFMT {
            libc::S_IFCHR => Some(Device { block: false, major, minor }),
            libc::S_IFBLK => Some(Device { block: true, major, minor }),
            _ => None,
        };
        // To overlayfs, the character device 0:0 is a whiteout, which it lets nobody make.
        let whiteout = device == Some(Device { block: false, major: 0, minor: 0 });
        if let Scope::Devices { .. } = self.scope {
            return match device {
                Some(device) if !whiteout => self.make_device(call, dir, path, mode, device),
                Some(_) => Err(Errno::PERM),
                None => Ok(Answer::Continue),
            };
        }
        if device.is_some() && (whiteout || !self.credentials(call)?.can(CapabilitySet::MKNOD)) {
            return Err(Errno::PERM);
        }
        let kind = match (device, FileType::from_raw_mode(mode)) {
            (None, kind @ (FileType::Fifo | FileType::Socket)) => kind,
            (None, FileType::Directory | FileType::Symlink) => return Ok(Answer::Continue),
            _ => FileType::RegularFile,
        };
        let permissions = Mode::from_raw_mode(mode & !libc::S_IFMT);
        self.make(call, dir, path, device, |parent, name| rustix::fs::mknodat(parent, name, kind, permissions, 0))
    }

    /// A device node where ids are real: only the kind of node is not.
    fn make_device(
        &mut self,
        call: &Notification,
        dir: i32,
        path: u64,
        mode: u32,
        device: Device,
    ) -> Result<Answer, Errno> {
        // Real, effective, saved and file system id: proc_pid_status(5).
        let status = self.status(call)?;
        let ids = |field: &str| -> Result<[u32; 2], Errno> {
            let mut ids = status.field(field)?.split_whitespace().skip(1).filter_map(|id| id.parse().ok());
            match (ids.next(), ids.nth(1)) {
                (Some(effective), Some(file_system)) => Ok([effective, file_system]),
                _ => Err(Errno::IO),
            }
        };
        let ([effective, uid], [_, gid]) = (ids("Uid:")?, ids("Gid:")?);
        if effective != 0 {
            return Err(Errno::PERM);
        }
        let path = self.read_path(call, path)?;
        let Ok(Some((parent, name))) = self.parent(call, dir, &path) else { return Ok(Answer::Continue) };
        self.use_mask(call)?;
        let name_text = OsStr::from_bytes(&name);
        let permissions = Mode::from_raw_mode(mode & !libc::S_IFMT);
        rustix::fs::mknodat(&parent, name_text, FileType::RegularFile, permissions, 0)?;
        // The directory's group is there already where it counts.
        let inherits = Metadata(&table::metadata(&parent)?).mode() & libc::S_ISGID != 0;
        let group = (!inherits).then(|| Gid::from_raw(gid));
        rustix::fs::chownat(&parent, name_text, Some(Uid::from_raw(uid)), group, AtFlags::SYMLINK_NOFOLLOW)?;
        self.record_entry(&parent, &name, Owner { uid, gid, device: Some(device) })?;
        Ok(Answer::Value(0))
    }

    /// openat2(2): `how` has flags, mode and resolve flags, 64 bits each.
    pub(super) fn open_extended(
        &mut self,
        call: &Notification,
        dir: i32,
        path: u64,
        how: u64,
        size: u64,
    ) -> Result<Answer, Errno> {
        let mut fields = [0; 24];
        // The kernel refuses what is shorter.
        if size < fields.len() as u64 {
            return Ok(Answer::Continue);
        }
        self.read_exactly(call, how, &mut fields)?;
        let field = |at: usize| fields[8 * at..].first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
        // With rules for its path, a call is carried out by the kernel alone, and what it makes stays root's.
        match field(2) {
            0 => self.open(call, dir, path, field(0) as u32, field(1) as u32),
            _ => Ok(Answer::Continue),
        }
    }

    /// An open that may make a file.
    pub(super) fn open(
        &mut self,
        call: &Notification,
        dir: i32,
        path: u64,
        flags: u32,
        mode: u32,
    ) -> Result<Answer, Errno> {
        let has = |flag: i32| flags & flag as u32 == flag as u32;
        let unnamed = flags & UNNAMED != 0;
        if !has(libc::O_CREAT) && !unnamed || self.makes_plain(call)? {
            return Ok(Answer::Continue);
        }
        let path = self.read_path(call, path)?;
        let mode = Mode::from_raw_mode(mode & 0o7777);
        if unnamed {
            return self.open_unnamed(call, dir, &path, flags, mode);
        }
        let exclusive = has(libc::O_EXCL);
        let trailing = path.ends_with(b"/");
        let Ok(Some((mut parent, mut name))) = self.parent(call, dir, &path) else { return Ok(Answer::Continue) };
        for _ in 0..MAX_LINKS {
            if trailing || exclusive || !self.exists(&parent, &name) {
                break;
            }
            // Something is there: only a link to nowhere lets a file be made.
            let Ok(target) = rustix::fs::readlinkat(&parent, OsStr::from_bytes(&name), Vec::new()) else {
                return Ok(Answer::Continue);
            };
            if has(libc::O_NOFOLLOW) {
                return Ok(Answer::Continue);
            }
            let target = target.into_bytes();
            let next = match target.starts_with(b"/") {
                true => self.parent(call, libc::AT_FDCWD, &target),
                false => self.parent_below(&parent, &target),
            };
            let Ok(Some(next)) = next else { return Ok(Answer::Continue) };
            (parent, name) = next;
        }
        let owner = self.owner_in(call, &parent)?;
        if owner.is_plain() || trailing || !exclusive && self.exists(&parent, &name) {
            return Ok(Answer::Continue);
        }
        self.use_mask(call)?;
        let name_text = OsStr::from_bytes(&name);
        if exclusive {
            let opened = OFlags::from_bits_retain(flags) | OFlags::CLOEXEC;
            let file = openat(&parent, name_text, opened, mode)?;
            self.record_entry(&parent, &name, owner)?;
            return Ok(Answer::File { file, close_on_exec: has(libc::O_CLOEXEC) });
        }
        // The caller's own open finds it then. Where this fails, somebody else was faster, or the kernel will say what is
        // wrong.
        if rustix::fs::mknodat(&parent, name_text, FileType::RegularFile, mode, 0).is_ok() {
            self.record_entry(&parent, &name, owner)?;
        }
        Ok(Answer::Continue)
    }

    fn open_unnamed(
        &mut self,
        call: &Notification,
        dir: i32,
        path: &[u8],
        flags: u32,
        mode: Mode,
    ) -> Result<Answer, Errno> {
        let parent = self.resolve_text(call, dir, path, 0)?;
        let owner = self.owner_in(call, &parent)?;
        if owner.is_plain() {
            return Ok(Answer::Continue);
        }
        self.use_mask(call)?;
        let file = openat(&parent, ".", OFlags::from_bits_retain(flags) | OFlags::CLOEXEC, mode)?;
        let held = file.as_fd().try_clone_to_owned().map_err(|error| super::errno(&error))?;
        self.table.record(held, owner)?;
        Ok(Answer::File { file, close_on_exec: flags & libc::O_CLOEXEC as u32 != 0 })
    }

    /// As [`Emulator::parent`], of a link's target, which starts at the directory that the link is in.
    fn parent_below(&self, dir: &OwnedFd, path: &[u8]) -> Result<Option<(OwnedFd, Vec<u8>)>, Errno> {
        let start = path.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
        let name = &path[start..];
        if name.is_empty() || name == b"." || name == b".." {
            return Ok(None);
        }
        let parent = if start == 0 { OsStr::new(".") } else { OsStr::from_bytes(&path[..start]) };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Some((openat(dir, parent, flags, Mode::empty())?, name.to_vec())))
    }
}
