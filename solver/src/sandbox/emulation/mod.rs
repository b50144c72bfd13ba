//! Owners and ids for a step when there is only one id: the supervisor answers the calls that are about them.
//!
//! ```text
//! step: chown("/f", 33, 33) ──seccomp──▶ supervisor: opens /f as the step would, records 33:33, answers 0
//! step: stat("/f")          ──────────▶ supervisor: stat, knows the file, answers with uid 33
//! step: stat("/g")          ──────────▶ supervisor: nothing known of it: the kernel carries on
//! ```
//!
//! | calls | answer |
//! |---|---|
//! | chown family | owner recorded; set-id bits and capabilities are cleared by a real chown to 0 |
//! | set\*id, get\*id, groups, execve of set-id programs | by [`credentials`], which the kernel hands on to children |
//! | open with O_CREAT, mkdir, symlink, mknod | carried on for root; for others the object is made here and recorded |
//! | mknod of a device | an empty file in its place, recorded |
//! | stat family | patched when the owner is not 0:0 |
//! | rename, link | what comes from the base with an owner is copied up and recorded, as its path is lost |
//! | chroot | noted, as paths mean something else from then on |
//! | capset, prctl about capabilities | carried on, and noted: who keeps some may change ids or owners as another user |
//!
//! Paths are those of a hostile program, and it can change them in memory while they are looked at. So they are
//! resolved by the kernel, by this process with the step's root directory as its own and with no more capabilities than
//! the step has: whatever a path says, it leads to a file that the step can reach. Where a call goes on in the kernel
//! with another path than was looked at, only the step's own view of owners suffers.
//!
//! What is not emulated: permission checks of ids other than 0 (everybody is root, as far as the kernel knows), and ids
//! in /proc, in credentials of sockets and in ACLs.

mod call;
mod creation;
mod credentials;
mod layout;
mod owners;
mod paths;
mod table;

pub(super) use call::Call;
pub(super) use creation::UNNAMED;
pub(super) use credentials::FIRST;
pub use owners::{Device, Identity, LowerOwner, Owner, Records, read_list, write_list};

use super::{Doing, Failure, Rootfs, RunSpec, SetupMount, step};
use crate::sys::notify::{self, Notification, RawStatx};
use crate::sys::{self, Call as _};
use call::{Known, Layout};
use credentials::{Credentials, KEEP, MAX_GROUPS, Registry};
use owners::Metadata;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, StatVfsMountFlags, Uid};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};
use rustix::thread::{CapabilitySet, CapabilitySets};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use table::{Stack, Table};

/// How much is emulated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scope {
    /// Everything: there is one id.
    SingleId,
    /// Only device nodes, which a user namespace refuses to make: ids are real. The layer has the device; for the step, an
    /// empty file is in its place.
    Devices {
        /// The stat family says that it is a device, which costs time at every look at a file.
        shown: bool,
    },
}

/// What is emulated, and the files through which owners come and go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Emulation {
    /// How much.
    pub scope: Scope,
    /// [`LowerOwner`]s of the root file system, sorted by path.
    pub lower: Option<PathBuf>,
    /// [`Records`] that are known already: of cache mounts.
    pub known: Option<PathBuf>,
    /// Made by the supervisor: [`Records`] of what the step changed. Those of the root file system have the device
    /// number [`UPPER`].
    pub result: PathBuf,
}

/// Device number that stands for the upper directory in what the supervisor hands back.
pub const UPPER: (u32, u32) = (0, 0);

/// What becomes of a call.
enum Answer {
    /// The kernel carries it out.
    Continue,
    Value(i64),
    /// A descriptor for the caller.
    File {
        file: OwnedFd,
        close_on_exec: bool,
    },
}

/// The supervisor's side.
pub(super) struct Emulator {
    listener: OwnedFd,
    calls: HashMap<(u32, i32), Known>,
    registry: Registry,
    table: Table,
    /// /proc of this process, in which threads are numbered as notifications name them.
    proc: OwnedFd,
    /// `/proc/self/fd`, the working directory.
    descriptors: OwnedFd,
    /// The step's root directory, and now this process's.
    root: OwnedFd,
    /// The root directory before.
    outside: OwnedFd,
    capabilities: CapabilitySets,
    /// Those in effect while calls are answered.
    effective: CapabilitySet,
    scope: Scope,
    /// The step sees this process's /proc.
    shared_proc: bool,
    /// Somebody has called chroot.
    chroots: bool,
    /// File mode creation mask of this process.
    umask: u32,
    result: std::fs::File,
}

impl Emulator {
    /// Takes the listener number `listener` of the step's first process over, which is set up and waits.
    pub(super) fn start(
        pid: Pid,
        listener: i32,
        spec: &RunSpec,
        emulation: &Emulation,
        shared_proc: bool,
    ) -> Result<Emulator, Failure> {
        let doing = || "answer the step's calls about owners".to_owned();
        let handle =
            rustix::process::pidfd_open(pid, PidfdFlags::empty()).call(|| "pidfd_open()".into()).doing(doing)?;
        let listener = rustix::process::pidfd_getfd(&handle, listener, PidfdGetfdFlags::empty())
            .call(|| "pidfd_getfd(listener)".into())
            .doing(doing)?;
        notify::wake_up_at_once(&listener);
        let result =
            std::fs::File::create(&emulation.result).call(|| format!("create({:?})", emulation.result)).doing(doing)?;
        let place = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |dir: &OwnedFd, path: &str| {
            rustix::fs::openat(dir, path, place, Mode::empty()).call(|| format!("open({path:?})")).doing(doing)
        };
        let outside = sys::open_place("/".as_ref()).doing(doing)?;
        let proc = open(&outside, "proc")?;
        let descriptors = open(&proc, "self/fd")?;
        let root = open(&proc, &format!("{}/root", pid.as_raw_pid()))?;
        let lists = read_lists(spec, emulation)?;

        raise_descriptor_limit();
        let capabilities = rustix::thread::capabilities(None).call(|| "capget()".into()).doing(doing)?;
        let emulator = Emulator {
            listener,
            calls: call::table(),
            registry: Registry::new(Credentials::new(spec.uid, spec.gid, spec.groups.clone())),
            table: Table::new(descriptors.try_clone().call(|| "dup()".into()).doing(doing)?, Vec::new()),
            proc,
            descriptors,
            root,
            outside,
            effective: capabilities.effective,
            capabilities,
            scope: emulation.scope,
            shared_proc,
            chroots: false,
            umask: 0,
            result,
        };
        emulator.prepared(spec, lists).doing(doing)
    }

    /// Goes into the step's root and looks at its mounts.
    fn prepared(mut self, spec: &RunSpec, lists: Lists) -> sys::Result<Emulator> {
        enter(&self.root, &self.descriptors)?;
        if !spec.insecure {
            self.effective = self.capabilities.effective & step::CAPABILITIES;
            let sets = CapabilitySets { effective: self.effective, ..self.capabilities };
            rustix::thread::set_capabilities(None, sets).call(|| "capset()".into())?;
        }
        _ = rustix::process::umask(Mode::empty());
        let mut stacks = Vec::new();
        for (target, part, lower, upper) in lists.stacks {
            let target: Vec<u8> = normal(&target);
            let path = [b"/", &*target].concat();
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let describe = || format!("open({:?})", String::from_utf8_lossy(&path));
            let place = rustix::fs::open(std::ffi::OsStr::from_bytes(&path), flags, Mode::empty()).call(describe)?;
            let stat = table::metadata(&place).call(describe)?;
            // A target behind a link is seen elsewhere.
            let name = rustix::fs::readlinkat(
                &self.descriptors,
                std::os::fd::AsRawFd::as_raw_fd(&place).to_string(),
                Vec::new(),
            );
            let target = name.map_or(target, |name| normal(&String::from_utf8_lossy(name.as_bytes())));
            let device = Metadata(&stat).device();
            stacks.push(Stack { device, target, part: normal(&part), lower, upper });
        }
        self.table = Table::new(self.descriptors.try_clone().call(|| "dup()".into())?, stacks);
        self.table.preload(lists.known);
        let owned = if self.scope == Scope::SingleId { &spec.mounts[..] } else { &[] };
        for mount in owned {
            let (target, uid, gid) = match mount {
                SetupMount::Secret { target, uid, gid, .. }
                | SetupMount::Inline { target, uid, gid, .. }
                | SetupMount::Socket { target, uid, gid, .. } => (target, *uid, *gid),
                _ => continue,
            };
            if (uid, gid) == (0, 0) {
                continue;
            }
            let describe = || format!("open({target:?})");
            let place = rustix::fs::open(target, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).call(describe)?;
            self.table.record(place, Owner { uid, gid, device: None }).call(describe)?;
        }
        Ok(self)
    }

    /// Readable when a call waits.
    pub(super) fn listener(&self) -> &OwnedFd {
        &self.listener
    }

    /// Answers one call.
    pub(super) fn serve(&mut self) -> sys::Result<()> {
        let Some(call) = notify::receive(&self.listener)? else { return Ok(()) };
        self.table.forget_path();
        let answer = match self.calls.get(&(call.architecture, call.number)) {
            None => Ok(Answer::Continue),
            Some(known) => self.carry_out(&call, *known),
        };
        match answer {
            Ok(Answer::Continue) => notify::let_continue(&self.listener, call.id),
            Ok(Answer::Value(value)) => notify::answer(&self.listener, call.id, Ok(value)),
            Err(error) => notify::answer(&self.listener, call.id, Err(error)),
            Ok(Answer::File { file, close_on_exec }) => {
                let added = notify::answer_with_file(&self.listener, call.id, file, close_on_exec);
                if let Err(error) = added {
                    // The caller has too many files open, or is gone.
                    let errno = error.source.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error);
                    notify::answer(&self.listener, call.id, Err(errno));
                }
            }
        }
        Ok(())
    }

    /// Leaves the step's root and hands over what was recorded.
    pub(super) fn finish(self) -> Result<(), Failure> {
        let device = self.table.root_device();
        let doing = || "record the owners of what the step made".to_owned();
        rustix::thread::set_capabilities(None, self.capabilities).call(|| "capset()".into()).doing(doing)?;
        enter(&self.outside, &self.outside).doing(doing)?;
        _ = rustix::process::umask(Mode::empty());
        // As the entries of the upper directory, whose device is not the overlay's.
        let upper = |(identity, owner): (Identity, Owner)| match identity.device == device {
            true => (Identity { device: UPPER, ..identity }, owner),
            false => (identity, owner),
        };
        owners::write_to(self.result, self.table.changed().map(upper)).call(|| "write(owners)".into()).doing(doing)
    }

    fn carry_out(&mut self, call: &Notification, known: Known) -> Result<Answer, Errno> {
        let argument = |at: usize| call.arguments[at];
        let number = |at: usize| call.arguments[at] as u32;
        let dir = |at: usize| call.arguments[at] as i32;
        let id = |at: usize| match (call.arguments[at] as u32, known.short_ids) {
            (id, true) if id & 0xffff == 0xffff => KEEP,
            (id, true) => id & 0xffff,
            (id, false) => id,
        };
        const HERE: i32 = libc::AT_FDCWD;
        const NOFOLLOW: u32 = libc::AT_SYMLINK_NOFOLLOW as u32;
        match known.call {
            Call::Chown => self.chown(call, HERE, argument(0), 0, (id(1), id(2))),
            Call::Lchown => self.chown(call, HERE, argument(0), NOFOLLOW, (id(1), id(2))),
            Call::Fchownat => self.chown(call, dir(0), argument(1), number(4), (id(2), id(3))),
            Call::Fchown => {
                let file = self.open_descriptor(call, dir(0))?;
                self.chown_file(call, file, (id(1), id(2)))
            }

            Call::SetUid => self.change(call, |own| own.set_uid(id(0)).map(|()| 0)),
            Call::SetGid => self.change(call, |own| own.set_gid(id(0)).map(|()| 0)),
            Call::SetReUid => self.change(call, |own| own.set_two_uids(id(0), id(1)).map(|()| 0)),
            Call::SetReGid => self.change(call, |own| own.set_two_gids(id(0), id(1)).map(|()| 0)),
            Call::SetResUid => self.change(call, |own| own.set_three_uids([id(0), id(1), id(2)]).map(|()| 0)),
            Call::SetResGid => self.change(call, |own| own.set_three_gids([id(0), id(1), id(2)]).map(|()| 0)),
            Call::SetFsUid => self.change(call, |own| Ok(own.set_file_system_uid(id(0)).into())),
            Call::SetFsGid => self.change(call, |own| Ok(own.set_file_system_gid(id(0)).into())),
            Call::SetGroups => {
                let groups = self.read_groups(call, number(0) as i32, argument(1), known.short_ids)?;
                self.change(call, |own| own.set_groups(groups).map(|()| 0))
            }
            Call::GetUid => self.tell(call, known, |own| own.user.real),
            Call::GetEUid => self.tell(call, known, |own| own.user.effective),
            Call::GetGid => self.tell(call, known, |own| own.group.real),
            Call::GetEGid => self.tell(call, known, |own| own.group.effective),
            Call::GetResUid => self.tell_three(call, known, |own| own.user),
            Call::GetResGid => self.tell_three(call, known, |own| own.group),
            Call::GetGroups => self.tell_groups(call, known, number(0) as i32, argument(1)),

            Call::Open => self.open(call, HERE, argument(0), number(1), number(2)),
            Call::Creat => {
                let flags = libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC;
                self.open(call, HERE, argument(0), flags as u32, number(1))
            }
            Call::OpenAt => self.open(call, dir(0), argument(1), number(2), number(3)),
            Call::OpenAt2 => self.open_extended(call, dir(0), argument(1), argument(2), argument(3)),
            Call::Mkdir => self.make_directory(call, HERE, argument(0), number(1)),
            Call::MkdirAt => self.make_directory(call, dir(0), argument(1), number(2)),
            Call::Symlink => self.make_symlink(call, argument(0), HERE, argument(1)),
            Call::SymlinkAt => self.make_symlink(call, argument(0), dir(1), argument(2)),
            Call::Mknod => self.make_node(call, HERE, argument(0), number(1), number(2)),
            Call::MknodAt => self.make_node(call, dir(0), argument(1), number(2), number(3)),
            Call::Rename => self.keep_owner(call, HERE, argument(0), 0),
            Call::RenameAt => self.keep_owner(call, dir(0), argument(1), 0),
            Call::Link => self.keep_owner(call, HERE, argument(0), 0),
            Call::LinkAt => self.keep_owner(call, dir(0), argument(1), number(4)),

            Call::Stat => self.stat(call, known, HERE, argument(0), 0, argument(1)),
            Call::Lstat => self.stat(call, known, HERE, argument(0), NOFOLLOW, argument(1)),
            Call::Fstat => self.stat_file(call, known, dir(0), argument(1)),
            Call::FstatAt => self.stat(call, known, dir(0), argument(1), number(3), argument(2)),
            Call::Statx => self.statx(call),

            Call::Chroot => {
                // With real ids the kernel knows who may.
                if self.scope == Scope::SingleId && !self.credentials(call)?.can(CapabilitySet::SYS_CHROOT) {
                    return Err(Errno::PERM);
                }
                self.chroots = true;
                Ok(Answer::Continue)
            }
            Call::Execve => self.execute(call, HERE, argument(0), 0),
            Call::ExecveAt => self.execute(call, dir(0), argument(1), number(4)),
            // The limit carries the number of the credentials, which nobody else may see or change.
            Call::SetLimit => Ok(Answer::Value(0)),
            Call::GetLimit => self.tell_no_limit(call, known.layout, argument(1)),
            Call::ProcessLimit if argument(3) == 0 => Ok(Answer::Value(0)),
            Call::ProcessLimit => self.tell_no_limit(call, Layout::Native, argument(3)),
            Call::Control if number(0) as i32 == libc::PR_SET_KEEPCAPS => match number(1) {
                kept @ (0 | 1) => self.follow(call, |own| own.keep_capabilities(kept != 0)),
                // The kernel refuses it.
                _ => Ok(Answer::Continue),
            },
            Call::Control if number(0) as i32 == libc::PR_SET_NO_NEW_PRIVS => match argument(1) {
                1 => self.follow(call, Credentials::promise_no_new_privileges),
                _ => Ok(Answer::Continue),
            },
            Call::Control if !self.credentials(call)?.can(CapabilitySet::SETPCAP) => Err(Errno::PERM),
            Call::Control if number(0) as i32 == libc::PR_CAPBSET_DROP => {
                let dropped = u32::try_from(argument(1)).ok().and_then(|number| 1_u64.checked_shl(number)).unwrap_or(0);
                self.follow(call, |own| own.drop_from_bounding(CapabilitySet::from_bits_retain(dropped)))
            }
            Call::Control => self.follow(call, |own| own.set_secure_bits(number(1))),
            Call::SetCapabilities => self.set_capabilities(call),
        }
    }

    // Ids

    /// Those of the caller, if it still waits: [`Emulator::still_waiting`].
    fn credentials(&self, call: &Notification) -> Result<&Credentials, Errno> {
        let (number, _) = notify::locks_limit(call.thread).map_err(|error| errno(&error))?;
        Ok(self.registry.find(number))
    }

    /// What was found out by the caller's number was about the caller only if it still waits. To be asked once, after all
    /// looks and before anything is changed or written; answers alone reach nobody else.
    fn still_waiting(&self, call: &Notification) -> Result<(), Errno> {
        // Nobody hears the error.
        if notify::is_waiting(&self.listener, call.id) { Ok(()) } else { Err(Errno::SRCH) }
    }

    fn change(
        &mut self,
        call: &Notification,
        change: impl FnOnce(&mut Credentials) -> Result<i64, Errno>,
    ) -> Result<Answer, Errno> {
        let mut own = self.credentials(call)?.clone();
        let value = change(&mut own)?;
        let number = self.registry.number(own)?;
        self.still_waiting(call)?;
        notify::set_locks_limit(call.thread, number).map_err(|error| errno(&error))?;
        Ok(Answer::Value(value))
    }

    /// The kernel carries the call out, on its own sets, and what it means to the emulated ones is noted.
    fn follow(&mut self, call: &Notification, change: impl FnOnce(&mut Credentials)) -> Result<Answer, Errno> {
        let own = self.credentials(call)?.clone();
        let mut after = own.clone();
        change(&mut after);
        if after != own {
            let number = self.registry.number(after)?;
            self.still_waiting(call)?;
            notify::set_locks_limit(call.thread, number).map_err(|error| errno(&error))?;
        }
        Ok(Answer::Continue)
    }

    /// capset(2): the structures are those of its manual page. The kernel carries it out; what it will refuse is not noted.
    fn set_capabilities(&mut self, call: &Notification) -> Result<Answer, Errno> {
        const FIRST_VERSION: u32 = 0x1998_0330;
        const OTHER_VERSIONS: [u32; 2] = [0x2007_1026, 0x2008_0522];
        let mut header = [0; 8];
        // Effective, permitted and inheritable ones; the first version has the lower 32 of each only.
        let mut sets = [0; 24];
        let word =
            |bytes: &[u8], at: usize| bytes[4 * at..].first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
        if self.read_exactly(call, call.arguments[0], &mut header).is_err() {
            return Ok(Answer::Continue);
        }
        let length = match word(&header, 0) {
            FIRST_VERSION => sets.len() / 2,
            version if OTHER_VERSIONS.contains(&version) => sets.len(),
            _ => return Ok(Answer::Continue),
        };
        if self.read_exactly(call, call.arguments[1], &mut sets[..length]).is_err() {
            return Ok(Answer::Continue);
        }
        let set = |at| {
            CapabilitySet::from_bits_retain(word(&sets, at).into())
                | CapabilitySet::from_bits_retain(u64::from(word(&sets, at + 3)) << 32)
        };
        let (effective, permitted) = (set(0), set(1));
        let status = self.status(call)?;
        let itself = status.field("NSpid:")?.split_whitespace().next_back().map(str::to_owned);
        let refused = !permitted.contains(effective)
            || !status.capabilities("CapPrm:")?.contains(permitted)
            || word(&header, 1) != 0 && Some(word(&header, 1).to_string()) != itself;
        // Threads have capabilities of their own, but one number together. What one of several lays down is no reason to
        // refuse something to the others.
        let of_many = status.field("Threads:")? != "1" && status.field("Tgid:")? != status.field("Pid:")?;
        if refused || of_many {
            return Ok(Answer::Continue);
        }
        self.follow(call, |own| own.set_capabilities(effective, permitted))
    }

    fn tell(&self, call: &Notification, known: Known, id: fn(&Credentials) -> u32) -> Result<Answer, Errno> {
        Ok(Answer::Value(shortened(id(self.credentials(call)?), known).into()))
    }

    fn tell_three(
        &self,
        call: &Notification,
        known: Known,
        ids: fn(&Credentials) -> credentials::Ids,
    ) -> Result<Answer, Errno> {
        let ids = ids(self.credentials(call)?);
        for (at, id) in [ids.real, ids.effective, ids.saved].into_iter().enumerate() {
            self.write(call, call.arguments[at], &encoded(id, known))?;
        }
        Ok(Answer::Value(0))
    }

    fn tell_groups(&self, call: &Notification, known: Known, size: i32, list: u64) -> Result<Answer, Errno> {
        let groups = &self.credentials(call)?.groups;
        let room = usize::try_from(size).map_err(|_| Errno::INVAL)?;
        if room > 0 {
            if room < groups.len() {
                return Err(Errno::INVAL);
            }
            let bytes: Vec<u8> = groups.iter().flat_map(|group| encoded(*group, known)).collect();
            self.write(call, list, &bytes)?;
        }
        Ok(Answer::Value(groups.len() as i64))
    }

    fn read_groups(&self, call: &Notification, size: i32, list: u64, short: bool) -> Result<Vec<u32>, Errno> {
        let count = usize::try_from(size).ok().filter(|count| *count <= MAX_GROUPS).ok_or(Errno::INVAL)?;
        let width = if short { 2 } else { 4 };
        let mut bytes = vec![0; count * width];
        self.read_exactly(call, list, &mut bytes)?;
        let wide = |bytes: &[u8]| bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
        Ok(bytes.chunks(width).map(wide).collect())
    }

    fn tell_no_limit(&self, call: &Notification, layout: Layout, place: u64) -> Result<Answer, Errno> {
        let width = if layout == Layout::Native { 16 } else { 8 };
        self.write(call, place, &[0xff; 16][..width])?;
        Ok(Answer::Value(0))
    }

    /// execve of a set-id program gives the caller the ids of its owner, also when that is root.
    fn execute(&mut self, call: &Notification, dir: i32, path: u64, flags: u32) -> Result<Answer, Errno> {
        /// Only asks whether it could be executed.
        const CHECK: u32 = 0x1_0000;
        if flags & CHECK != 0 {
            return Ok(Answer::Continue);
        }
        // A path that leads nowhere is for the kernel to refuse, and changes nothing.
        let Ok(file) = self.resolve(call, dir, path, flags) else { return Ok(Answer::Continue) };
        let stat = table::metadata(&file)?;
        let mode = Metadata(&stat).mode();
        if mode & libc::S_IFMT != libc::S_IFREG || mode & 0o111 == 0 {
            return Ok(Answer::Continue);
        }
        let set_gid = libc::S_ISGID | libc::S_IXGRP;
        let by_user = mode & libc::S_ISUID != 0;
        let by_group = mode & set_gid == set_gid;
        // The step's root file system may lie on one that is mounted so: programs of the image are what they are.
        let elsewhere = || Metadata(&stat).device() != self.table.root_device();
        let is_nosuid =
            || rustix::fs::fstatvfs(&file).is_ok_and(|found| found.f_flag.contains(StatVfsMountFlags::NOSUID));
        if !(by_user || by_group) || self.is_script(&file) || elsewhere() && is_nosuid() {
            return self.follow(call, |own| own.execute(None, None));
        }
        let owner = self.table.owner(&file, &stat);
        self.follow(call, |own| own.execute(by_user.then_some(owner.uid), by_group.then_some(owner.gid)))
    }

    // Owners

    fn chown(
        &mut self,
        call: &Notification,
        dir: i32,
        path: u64,
        flags: u32,
        owner: (u32, u32),
    ) -> Result<Answer, Errno> {
        if flags & !((libc::AT_SYMLINK_NOFOLLOW | libc::AT_EMPTY_PATH) as u32) != 0 {
            return Err(Errno::INVAL);
        }
        let file = self.resolve(call, dir, path, flags)?;
        self.chown_file(call, file, owner)
    }

    fn chown_file(&mut self, call: &Notification, file: OwnedFd, (uid, gid): (u32, u32)) -> Result<Answer, Errno> {
        let stat = table::metadata(&file)?;
        let before = self.table.owner(&file, &stat);
        if !self.credentials(call)?.may_chown((before.uid, before.gid), (uid, gid)) {
            return Err(Errno::PERM);
        }
        self.still_waiting(call)?;
        // To the ids that it has: this copies it up, clears what a change of owner clears, and fails where that would.
        let real = ((uid != KEEP).then_some(Uid::ROOT), (gid != KEEP).then_some(Gid::ROOT));
        rustix::fs::chownat(&file, "", real.0, real.1, AtFlags::EMPTY_PATH)?;
        let kept = |new: u32, old: u32| if new == KEEP { old } else { new };
        let owner = Owner { uid: kept(uid, before.uid), gid: kept(gid, before.gid), ..before };
        self.table.record(file, owner)?;
        Ok(Answer::Value(0))
    }

    /// What comes from the base and does not belong to 0:0 is copied up and recorded before it gets another path.
    fn keep_owner(&mut self, call: &Notification, dir: i32, path: u64, flags: u32) -> Result<Answer, Errno> {
        if self.table.is_empty() {
            return Ok(Answer::Continue);
        }
        // Both rename and link act on symbolic links themselves, but for one flag of linkat.
        let follow = flags & libc::AT_SYMLINK_FOLLOW as u32 != 0;
        let flags = flags & libc::AT_EMPTY_PATH as u32 | if follow { 0 } else { libc::AT_SYMLINK_NOFOLLOW as u32 };
        let Ok(file) = self.resolve(call, dir, path, flags) else { return Ok(Answer::Continue) };
        let stat = table::metadata(&file)?;
        let owner = self.table.owner(&file, &stat);
        let is_directory = Metadata(&stat).mode() & libc::S_IFMT == libc::S_IFDIR;
        if !owner.is_plain() && !is_directory && !self.table.is_changed(&stat) {
            self.still_waiting(call)?;
            self.table.copy_up(&file, &stat)?;
            self.table.record(file, owner)?;
        }
        Ok(Answer::Continue)
    }

    fn stat(
        &mut self,
        call: &Notification,
        known: Known,
        dir: i32,
        path: u64,
        flags: u32,
        place: u64,
    ) -> Result<Answer, Errno> {
        let Some((stat, owner)) = self.foreign(call, dir, path, flags, 0) else { return Ok(Answer::Continue) };
        self.tell_stat(call, known, &stat, owner, place)
    }

    fn stat_file(&mut self, call: &Notification, known: Known, file: i32, place: u64) -> Result<Answer, Errno> {
        if self.table.is_empty() {
            return Ok(Answer::Continue);
        }
        let found = self.open_descriptor(call, file).and_then(|file| {
            let stat = table::metadata(&file)?;
            let owner = self.table.owner(&file, &stat);
            Ok((stat, owner))
        });
        match found {
            Ok((stat, owner)) if !owner.is_plain() => {
                self.tell_stat(call, known, &stat, self.told(&stat, owner), place)
            }
            _ => Ok(Answer::Continue),
        }
    }

    fn tell_stat(
        &self,
        call: &Notification,
        known: Known,
        stat: &RawStatx,
        owner: Owner,
        place: u64,
    ) -> Result<Answer, Errno> {
        match layout::stat(stat, owner, known.layout) {
            Some(bytes) => self.write(call, place, &bytes).map(|()| Answer::Value(0)),
            None => Ok(Answer::Continue),
        }
    }

    fn statx(&mut self, call: &Notification) -> Result<Answer, Errno> {
        let [dir, path, flags, mask, place, _] = call.arguments;
        let found = self.foreign(call, dir as i32, path, flags as u32, mask as u32);
        let Some((stat, owner)) = found else { return Ok(Answer::Continue) };
        self.write(call, place, &layout::statx(&stat, owner)).map(|()| Answer::Value(0))
    }

    /// Metadata and owner of what a path leads to; `None` when the kernel knows as much.
    fn foreign(
        &mut self,
        call: &Notification,
        dir: i32,
        path: u64,
        flags: u32,
        mask: u32,
    ) -> Option<(RawStatx, Owner)> {
        if self.table.is_empty() {
            return None;
        }
        let mask = mask | libc::STATX_BASIC_STATS | libc::STATX_BTIME;
        let text = self.read_path(call, path).ok()?;
        let stat = self.stat_path(call, dir, &text, flags, mask).ok()?;
        let owner = match self.table.known(&stat) {
            Some(owner) => owner,
            None => {
                let file = self.resolve_text(call, dir, &text, flags).ok()?;
                let stat = table::metadata(&file).ok()?;
                self.table.owner(&file, &stat)
            }
        };
        (!owner.is_plain()).then(|| {
            let owner = self.told(&stat, owner);
            (stat, owner)
        })
    }

    /// What the caller hears of an owner: where ids are real, the kernel knows them better.
    fn told(&self, stat: &RawStatx, owner: Owner) -> Owner {
        match self.scope {
            Scope::SingleId => owner,
            Scope::Devices { .. } => {
                let (uid, gid) = Metadata(stat).owner();
                Owner { uid, gid, device: owner.device }
            }
        }
    }
}

fn shortened(id: u32, known: Known) -> u32 {
    // 65534 stands for what does not fit: user_namespaces(7).
    if known.short_ids && id > 0xffff { 65_534 } else { id }
}

fn encoded(id: u32, known: Known) -> Vec<u8> {
    let width = if known.short_ids { 2 } else { 4 };
    shortened(id, known).to_le_bytes()[..width].to_vec()
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// Without slashes at the ends.
fn normal(path: &str) -> Vec<u8> {
    path.trim_matches('/').as_bytes().to_vec()
}

/// Takes a root directory and a working directory.
fn enter(root: impl AsFd, working: impl AsFd) -> sys::Result<()> {
    rustix::process::fchdir(root).call(|| "fchdir(root)".into())?;
    rustix::process::chroot(".").call(|| "chroot(\".\")".into())?;
    rustix::process::fchdir(working).call(|| "fchdir()".into())
}

/// Lists from files, read before the root directory is another one.
struct Lists {
    /// Target, part, owners and upper directory of each overlay.
    stacks: Vec<(String, String, Vec<LowerOwner>, Option<OwnedFd>)>,
    known: Vec<(Identity, Owner)>,
}

fn read_lists(spec: &RunSpec, emulation: &Emulation) -> Result<Lists, Failure> {
    let doing = || "read the owners of the base".to_owned();
    let lower = |path: &Option<PathBuf>| match path {
        None => Ok(Vec::new()),
        Some(path) => read_list(path).call(|| format!("read({path:?})")).doing(doing),
    };
    let place = |path: &PathBuf| sys::open_place(path).doing(doing);
    let upper = match &spec.rootfs {
        Rootfs::Overlay { upper, .. } => Some(place(upper)?),
        Rootfs::Plain { .. } => None,
    };
    let mut stacks = vec![(String::new(), String::new(), lower(&emulation.lower)?, upper)];
    for mount in &spec.mounts {
        if let SetupMount::OverlayBind { target, subpath, upper, read_only, owners, .. } = mount {
            let upper = if *read_only { None } else { Some(place(upper)?) };
            stacks.push((target.clone(), subpath.clone(), lower(owners)?, upper));
        }
    }
    let known = match &emulation.known {
        None => Vec::new(),
        Some(path) => read_list(path).call(|| format!("read({path:?})")).doing(doing)?,
    };
    Ok(Lists { stacks, known })
}

/// Objects are held open for a while: see [`table`].
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // Where that is not allowed, the usual 1024 are enough.
    _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}
