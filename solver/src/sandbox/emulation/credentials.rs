//! Ids that the processes of a step believe to have, and the rules by which they change: credentials(7), setresuid(2).
//!
//! The kernel's own ids are 0 throughout, as no other exists. A process inherits its ids over fork and execve, which
//! nobody tells us about. So the kernel carries them: a number into the table of all credentials ever seen stands in
//! the soft limit RLIMIT_LOCKS of each process, which means nothing else since Linux 2.4.

use rustix::io::Errno;
use rustix::thread::CapabilitySet;
use std::collections::HashMap;
use std::sync::Arc;

/// "Leave it as it is."
pub(super) const KEEP: u32 = u32::MAX;
/// The kernel's limit, NGROUPS_MAX.
pub(super) const MAX_GROUPS: usize = 65_536;

/// Real, effective, saved and file system id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Ids {
    pub(super) real: u32,
    pub(super) effective: u32,
    pub(super) saved: u32,
    pub(super) file_system: u32,
}

impl Ids {
    fn all(id: u32) -> Ids {
        Ids { real: id, effective: id, saved: id, file_system: id }
    }

    fn has(&self, id: u32) -> bool {
        [self.real, self.effective, self.saved].contains(&id)
    }

    /// setuid(2), setgid(2).
    fn set(&mut self, id: u32, privileged: bool) -> Result<(), Errno> {
        match id {
            KEEP => return Err(Errno::INVAL),
            _ if privileged => *self = Ids::all(id),
            _ if id == self.real || id == self.saved => (self.effective, self.file_system) = (id, id),
            _ => return Err(Errno::PERM),
        }
        Ok(())
    }

    /// setreuid(2), setregid(2).
    fn set_two(&mut self, real: u32, effective: u32, privileged: bool) -> Result<(), Errno> {
        let real_allowed = real == KEEP || privileged || real == self.real || real == self.effective;
        if !real_allowed || !(effective == KEEP || privileged || self.has(effective)) {
            return Err(Errno::PERM);
        }
        let old_real = self.real;
        if real != KEEP {
            self.real = real;
        }
        if effective != KEEP {
            self.effective = effective;
        }
        if real != KEEP || effective != KEEP && effective != old_real {
            self.saved = self.effective;
        }
        self.file_system = self.effective;
        Ok(())
    }

    /// setresuid(2), setresgid(2).
    fn set_three(&mut self, real: u32, effective: u32, saved: u32, privileged: bool) -> Result<(), Errno> {
        if !privileged && ![real, effective, saved].into_iter().all(|id| id == KEEP || self.has(id)) {
            return Err(Errno::PERM);
        }
        for (place, id) in [(&mut self.real, real), (&mut self.effective, effective), (&mut self.saved, saved)] {
            if id != KEEP {
                *place = id;
            }
        }
        self.file_system = self.effective;
        Ok(())
    }

    /// setfsuid(2), setfsgid(2): returns the old id, whether it worked or not.
    fn set_file_system(&mut self, id: u32, privileged: bool) -> u32 {
        let old = self.file_system;
        if id != KEEP && (privileged || self.has(id) || id == old) {
            self.file_system = id;
        }
        old
    }

    /// What execve(2) does: of a program that is set-id to `program`.
    fn execute(&mut self, program: Option<u32>) {
        if let Some(id) = program {
            self.effective = id;
        }
        (self.saved, self.file_system) = (self.effective, self.effective);
    }
}

/// Capabilities that a process believes to have, as far as they decide what the supervisor answers, and what becomes of
/// them when it changes its user: capabilities(7), "Effect of user ID changes on capabilities". The kernel's own sets stay
/// root's, but for what the process itself gives up. Inheritable and ambient ones are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Capabilities {
    permitted: CapabilitySet,
    effective: CapabilitySet,
    bounding: CapabilitySet,
    /// PR_SET_KEEPCAPS.
    kept: bool,
    /// SECBIT_NO_SETUID_FIXUP.
    fixed: bool,
    /// SECBIT_NOROOT.
    no_root: bool,
    /// PR_SET_NO_NEW_PRIVS, by the step itself.
    promised: bool,
}

/// Those that come and go with the id for files.
const OF_FILES: CapabilitySet = CapabilitySet::CHOWN.union(CapabilitySet::MKNOD);
/// All that are asked about, which a container's root has.
const ALL: CapabilitySet = OF_FILES
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::SYS_CHROOT);

impl Capabilities {
    /// Those of a process whose ids are this one.
    fn of(id: u32) -> Capabilities {
        let own = if id == 0 { ALL } else { CapabilitySet::empty() };
        let (kept, fixed, no_root, promised) = (false, false, false, false);
        Capabilities { permitted: own, effective: own, bounding: ALL, kept, fixed, no_root, promised }
    }

    fn follow(&mut self, before: Ids, after: Ids) {
        if self.fixed {
            return;
        }
        if before.has(0) && !after.has(0) && !self.kept {
            (self.permitted, self.effective) = (CapabilitySet::empty(), CapabilitySet::empty());
        }
        match (before.effective == 0, after.effective == 0) {
            (true, false) => self.effective = CapabilitySet::empty(),
            (false, true) => self.effective = self.permitted,
            _ => {}
        }
    }

    fn follow_file_system(&mut self, before: u32, after: u32) {
        match (before == 0, after == 0) {
            _ if self.fixed => {}
            (true, false) => self.effective -= OF_FILES,
            (false, true) => self.effective |= self.permitted & OF_FILES,
            _ => {}
        }
    }
}

impl Default for Capabilities {
    fn default() -> Capabilities {
        Capabilities::of(0)
    }
}

/// Ids of a process.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(super) struct Credentials {
    pub(super) user: Ids,
    pub(super) group: Ids,
    pub(super) groups: Vec<u32>,
    capabilities: Capabilities,
}

impl Credentials {
    /// Those of a process that a step starts with.
    pub(super) fn new(uid: u32, gid: u32, groups: Vec<u32>) -> Credentials {
        Credentials { user: Ids::all(uid), group: Ids::all(gid), groups, capabilities: Capabilities::of(uid) }
    }

    /// Whether these capabilities are in effect.
    pub(super) fn can(&self, what: CapabilitySet) -> bool {
        self.capabilities.effective.contains(what)
    }

    /// prctl(PR_SET_KEEPCAPS).
    pub(super) fn keep_capabilities(&mut self, kept: bool) {
        self.capabilities.kept = kept;
    }

    /// prctl(PR_SET_SECUREBITS).
    pub(super) fn set_secure_bits(&mut self, bits: u32) {
        const NO_ROOT: u32 = 1 << 0;
        const NO_SETUID_FIXUP: u32 = 1 << 2;
        const KEEP_CAPS: u32 = 1 << 4;
        // The kernel refuses others.
        const KNOWN: u32 = 0xfff;
        if bits & !KNOWN != 0 {
            return;
        }
        self.capabilities.no_root = bits & NO_ROOT != 0;
        self.capabilities.fixed = bits & NO_SETUID_FIXUP != 0;
        self.capabilities.kept = bits & KEEP_CAPS != 0;
    }

    /// prctl(PR_SET_NO_NEW_PRIVS).
    pub(super) fn promise_no_new_privileges(&mut self) {
        self.capabilities.promised = true;
    }

    /// prctl(PR_CAPBSET_DROP).
    pub(super) fn drop_from_bounding(&mut self, dropped: CapabilitySet) {
        self.capabilities.bounding -= dropped;
    }

    /// capset(2), which gives nobody what is not permitted already.
    pub(super) fn set_capabilities(&mut self, effective: CapabilitySet, permitted: CapabilitySet) {
        self.capabilities.permitted &= permitted;
        self.capabilities.effective = effective & self.capabilities.permitted;
    }

    fn change_user(&mut self, change: impl FnOnce(&mut Ids, bool) -> Result<(), Errno>) -> Result<(), Errno> {
        let (before, privileged) = (self.user, self.can(CapabilitySet::SETUID));
        change(&mut self.user, privileged)?;
        self.capabilities.follow(before, self.user);
        Ok(())
    }

    pub(super) fn set_uid(&mut self, id: u32) -> Result<(), Errno> {
        self.change_user(|user, privileged| user.set(id, privileged))
    }

    pub(super) fn set_gid(&mut self, id: u32) -> Result<(), Errno> {
        let privileged = self.can(CapabilitySet::SETGID);
        self.group.set(id, privileged)
    }

    pub(super) fn set_two_uids(&mut self, real: u32, effective: u32) -> Result<(), Errno> {
        self.change_user(|user, privileged| user.set_two(real, effective, privileged))
    }

    pub(super) fn set_two_gids(&mut self, real: u32, effective: u32) -> Result<(), Errno> {
        let privileged = self.can(CapabilitySet::SETGID);
        self.group.set_two(real, effective, privileged)
    }

    pub(super) fn set_three_uids(&mut self, [real, effective, saved]: [u32; 3]) -> Result<(), Errno> {
        self.change_user(|user, privileged| user.set_three(real, effective, saved, privileged))
    }

    pub(super) fn set_three_gids(&mut self, [real, effective, saved]: [u32; 3]) -> Result<(), Errno> {
        let privileged = self.can(CapabilitySet::SETGID);
        self.group.set_three(real, effective, saved, privileged)
    }

    pub(super) fn set_file_system_uid(&mut self, id: u32) -> u32 {
        let privileged = self.can(CapabilitySet::SETUID);
        let before = self.user.set_file_system(id, privileged);
        self.capabilities.follow_file_system(before, self.user.file_system);
        before
    }

    pub(super) fn set_file_system_gid(&mut self, id: u32) -> u32 {
        let privileged = self.can(CapabilitySet::SETGID);
        self.group.set_file_system(id, privileged)
    }

    pub(super) fn set_groups(&mut self, groups: Vec<u32>) -> Result<(), Errno> {
        if !self.can(CapabilitySet::SETGID) {
            return Err(Errno::PERM);
        }
        self.groups = groups;
        Ok(())
    }

    /// After execve of a program that may be set-user-ID or set-group-ID.
    pub(super) fn execute(&mut self, set_uid: Option<u32>, set_gid: Option<u32>) {
        let own = &mut self.capabilities;
        self.user.execute(set_uid.filter(|_| !own.promised));
        self.group.execute(set_gid.filter(|_| !own.promised));
        let most = if own.promised { own.bounding & own.permitted } else { own.bounding };
        let all_if = |root: bool| if root && !own.no_root { most } else { CapabilitySet::empty() };
        let effective = all_if(self.user.effective == 0);
        (own.permitted, own.effective) = (all_if(self.user.real == 0) | effective, effective);
        own.kept = false;
    }

    /// Whether an object of `(uid, gid)` may be given to `(new_uid, new_gid)`; [`KEEP`] leaves one. chown(2).
    pub(super) fn may_chown(&self, (uid, gid): (u32, u32), (new_uid, new_gid): (u32, u32)) -> bool {
        if self.can(CapabilitySet::CHOWN) {
            return true;
        }
        let owns = self.user.file_system == uid;
        let in_group = |group| self.group.file_system == group || self.groups.contains(&group);
        (new_uid == KEEP || owns && new_uid == uid)
            && (new_gid == KEEP || owns && (new_gid == gid || in_group(new_gid)))
    }
}

/// All credentials that were seen, by number. Number 0 is root.
#[derive(Debug)]
pub(super) struct Registry {
    all: Vec<Arc<Credentials>>,
    numbers: HashMap<Arc<Credentials>, usize>,
    /// Groups in all of them.
    groups: usize,
}

/// How many credentials are remembered, and groups in them, which cost memory of a process that no limit of the step
/// counts for.
const MAX_CREDENTIALS: usize = 1 << 18;
const MAX_GROUPS_IN_ALL: usize = 1 << 22;

/// Number of those that the step's first process has.
pub(crate) const FIRST: u64 = 1;

impl Registry {
    /// With root and the credentials of the step's first process, [`FIRST`].
    pub(super) fn new(first: Credentials) -> Registry {
        let groups = first.groups.len();
        let all = vec![Arc::new(Credentials::default()), Arc::new(first)];
        // The first number counts where both are root.
        let numbers = all.iter().cloned().enumerate().rev().map(|(number, one)| (one, number)).collect();
        Registry { all, numbers, groups }
    }

    /// Those of a number; a limit that nobody has set means root.
    pub(super) fn find(&self, number: u64) -> &Credentials {
        usize::try_from(number).ok().and_then(|number| self.all.get(number)).unwrap_or(&self.all[0])
    }

    /// The number of `credentials`; ENOMEM when there have been too many different ones.
    pub(super) fn number(&mut self, credentials: Credentials) -> Result<u64, Errno> {
        if let Some(number) = self.numbers.get(&credentials) {
            return Ok(*number as u64);
        }
        let groups = self.groups + credentials.groups.len();
        if self.all.len() >= MAX_CREDENTIALS || groups > MAX_GROUPS_IN_ALL {
            return Err(Errno::NOMEM);
        }
        let (number, credentials) = (self.all.len(), Arc::new(credentials));
        self.groups = groups;
        self.numbers.insert(credentials.clone(), number);
        self.all.push(credentials);
        Ok(number as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(ids: Ids) -> [u32; 4] {
        [ids.real, ids.effective, ids.saved, ids.file_system]
    }

    #[test]
    fn root_becomes_a_user_for_good() {
        let mut root = Credentials::default();
        root.set_groups(vec![33]).unwrap();
        root.set_gid(33).unwrap();
        root.set_uid(33).unwrap();
        assert_eq!((ids(root.user), ids(root.group)), ([33; 4], [33; 4]));
        assert_eq!(root.set_uid(0), Err(Errno::PERM));
        assert_eq!(root.set_groups(vec![]), Err(Errno::PERM));
        assert_eq!(root.set_uid(KEEP), Err(Errno::INVAL));
        assert_eq!(root.set_uid(33), Ok(()));
    }

    #[test]
    fn a_saved_id_leads_back() {
        let mut root = Credentials::default();
        root.set_three_uids([KEEP, 42, KEEP]).unwrap();
        assert_eq!(ids(root.user), [0, 42, 0, 42]);
        assert_eq!(root.set_gid(5), Err(Errno::PERM));
        root.set_three_uids([KEEP, 0, KEEP]).unwrap();
        root.set_gid(5).unwrap();
        root.set_two_uids(42, 42).unwrap();
        assert_eq!(ids(root.user), [42; 4]);
        assert_eq!(root.set_two_uids(0, KEEP), Err(Errno::PERM));
        assert_eq!(root.set_three_uids([42, 42, 0]), Err(Errno::PERM));
    }

    #[test]
    fn file_system_ids_follow_and_can_be_set_alone() {
        let mut root = Credentials::default();
        assert_eq!(root.set_file_system_uid(7), 0);
        assert_eq!(ids(root.user), [0, 0, 0, 7]);
        assert_eq!(root.set_file_system_uid(KEEP), 7);
        let mut user = Credentials::new(7, 7, vec![]);
        assert_eq!((user.set_file_system_uid(0), user.user.file_system), (7, 7));
    }

    #[test]
    fn set_id_programs() {
        let mut user = Credentials::new(7, 8, vec![]);
        user.execute(Some(0), None);
        assert_eq!((ids(user.user), ids(user.group)), ([7, 0, 0, 0], [8; 4]));
        user.execute(None, Some(9));
        assert_eq!(ids(user.group), [8, 9, 9, 9]);
    }

    #[test]
    fn capabilities_can_be_kept() {
        // As setpriv(1) does it: the user first.
        let mut root = Credentials::default();
        root.keep_capabilities(true);
        root.set_three_uids([7, 7, 7]).unwrap();
        // They are permitted, and have to be put into effect again.
        assert_eq!((root.set_uid(0), root.set_groups(vec![])), (Err(Errno::PERM), Err(Errno::PERM)));
        let (both, all) = (CapabilitySet::CHOWN | CapabilitySet::SETGID, CapabilitySet::all());
        root.set_capabilities(both, all);
        root.set_three_gids([8, 8, 8]).unwrap();
        root.set_groups(vec![8]).unwrap();
        assert!(root.may_chown((0, 0), (1, 1)));
        assert_eq!(root.set_uid(0), Err(Errno::PERM));
        let mut next = root.clone();
        next.execute(None, None);
        assert_eq!((next.set_uid(0), next.set_groups(vec![])), (Err(Errno::PERM), Err(Errno::PERM)));
        root.set_capabilities(both, both);
        root.set_capabilities(all, all);
        assert_eq!((root.set_uid(0), root.can(both)), (Err(Errno::PERM), true));

        let mut fixed = Credentials::default();
        fixed.set_secure_bits(1 << 2);
        fixed.set_uid(7).unwrap();
        fixed.set_gid(8).unwrap();
        // A user who asks to keep what he has not.
        let mut user = Credentials::new(7, 7, vec![]);
        user.keep_capabilities(true);
        user.set_capabilities(all, all);
        assert_eq!(user.set_uid(0), Err(Errno::PERM));
    }

    #[test]
    fn root_without_capabilities() {
        let mut root = Credentials::default();
        root.set_file_system_uid(7);
        assert!(!root.may_chown((0, 0), (7, 7)) && root.can(CapabilitySet::SETUID));
        root.set_file_system_uid(0);
        assert!(root.may_chown((0, 0), (7, 7)));
        root.drop_from_bounding(CapabilitySet::CHOWN);
        assert!(root.may_chown((0, 0), (7, 7)));
        root.execute(None, None);
        assert!(!root.may_chown((0, 0), (7, 7)) && root.can(CapabilitySet::SETUID));
        root.set_capabilities(CapabilitySet::empty(), CapabilitySet::all());
        assert_eq!(root.set_uid(7), Err(Errno::PERM));
        // It is still root, and so is what it executes.
        root.execute(None, None);
        assert!(root.can(CapabilitySet::SETUID));
        let mut other = root.clone();
        other.set_secure_bits(1 << 13 | 1);
        other.execute(None, None);
        assert!(other.can(CapabilitySet::SETUID));
        other.set_secure_bits(1);
        other.execute(None, None);
        assert_eq!((other.set_uid(7), other.user.effective), (Err(Errno::PERM), 0));
        // Who has promised gains nothing by executing, neither its own nor others' privileges.
        let mut other = root.clone();
        other.promise_no_new_privileges();
        other.set_capabilities(CapabilitySet::SETGID, CapabilitySet::SETGID);
        other.execute(Some(9), Some(9));
        assert_eq!((ids(other.user), ids(other.group)), ([0; 4], [0; 4]));
        assert!(other.can(CapabilitySet::SETGID) && !other.can(CapabilitySet::SETUID));
    }

    #[test]
    fn who_may_chown() {
        let user = Credentials::new(7, 8, vec![9]);
        for (owner, new, allowed) in [
            ((7, 8), (KEEP, 9), true),
            ((7, 8), (7, 8), true),
            ((7, 8), (KEEP, 10), false),
            ((7, 8), (0, KEEP), false),
            ((0, 8), (KEEP, 9), false),
            ((0, 0), (KEEP, KEEP), true),
        ] {
            assert_eq!(user.may_chown(owner, new), allowed, "{owner:?} {new:?}");
            assert!(Credentials::default().may_chown(owner, new));
        }
    }

    #[test]
    fn equal_credentials_have_one_number() {
        let mut registry = Registry::new(Credentials::new(7, 7, vec![]));
        assert_eq!(registry.find(u64::MAX), &Credentials::default());
        assert_eq!(registry.find(FIRST).user.real, 7);
        let mut number = |uid, gid, groups| registry.number(Credentials::new(uid, gid, groups));
        assert_eq!((number(1, 2, vec![3]), number(1, 2, vec![3])), (Ok(2), Ok(2)));
        assert_eq!((number(0, 0, vec![]), number(7, 7, vec![])), (Ok(0), Ok(1)));
        assert_eq!(Registry::new(Credentials::default()).find(FIRST), &Credentials::default());
    }

    #[test]
    fn memory_for_credentials_is_limited() {
        let mut registry = Registry::new(Credentials::default());
        let lists = (0..).map(|first| (first..first + MAX_GROUPS as u32).collect());
        let numbered = lists.map_while(|groups| registry.number(Credentials::new(0, 0, groups)).ok()).count();
        assert_eq!(numbered, MAX_GROUPS_IN_ALL / MAX_GROUPS);
        assert_eq!(registry.number(Credentials::new(0, 0, (0..MAX_GROUPS as u32).collect())), Ok(2));
        let numbered = (1..).map_while(|uid| registry.number(Credentials::new(uid, 0, vec![])).ok()).count();
        assert_eq!(numbered, MAX_CREDENTIALS - 2 - MAX_GROUPS_IN_ALL / MAX_GROUPS);
        assert_eq!(registry.number(Credentials::new(5, 0, vec![])), Ok(70));
    }
}
