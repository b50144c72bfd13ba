//! Becoming root of a user namespace.
//!
//! ```text
//! nacre build ──fork──▶ child: unshare(user, mount) ──exec──▶ nacre build, as root of the namespace
//!      │                   ▲
//!      └─ newuidmap, newgidmap; then waits, passes signals on, and exits as the child does
//! ```
//!
//! With subordinate ids (subuid(5)) and the set-uid helpers, ids 1… of the namespace are mapped too and owners on
//! disk are real ([`Ownership::Native`]). Without, only the caller's own id exists, as 0 ([`Ownership::SingleId`]).
//! A caller that is root and may mount needs no namespace.

use super::SandboxError;
use crate::sys::{self, Call, CallError, Fork};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions};
use rustix::thread::CapabilitySet;
use std::fmt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

/// Set for the process inside of the namespace: the parent's process id, a colon, and a notice.
const VARIABLE: &str = "NACRE_USERNS";

const FORWARDED: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// How ids are to be mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EnterRequest {
    /// A range when there is one.
    #[default]
    Best,
    /// One id, even when there is a range.
    SingleId,
    /// A namespace also for root, with all of its ids (but the last one, by which it is told from the initial one).
    Own,
}

/// Where [`enter`] left the process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entered {
    /// As real root, in no new namespace.
    Root,
    /// As root of a user namespace.
    Inside {
        /// What owners are.
        ownership: Ownership,
        /// Why there is no range of ids, for a notice.
        notice: Option<String>,
    },
    /// Outside; the process inside has ended and there is nothing left to do but to exit.
    Parent {
        /// Exit code to end with.
        exit_code: i32,
    },
}

/// What an owner on disk means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ownership {
    /// Owners of inodes are the truth.
    Native,
    /// Only id 0 exists; owners live in the index, and changes of ownership are emulated.
    SingleId,
}

/// Why the kernel refuses a user namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// `user.max_user_namespaces` is 0.
    Forbidden,
    /// `kernel.unprivileged_userns_clone` is 0 (Debian).
    UnprivilegedClone,
    /// AppArmor takes the rights away in a namespace (Ubuntu).
    AppArmor,
    /// A seccomp filter, so a container.
    Seccomp,
    /// The root directory is a chroot.
    Chroot,
    /// The kernel was built without.
    Unsupported,
    /// Too many are in use.
    Exhausted,
    /// None of the above.
    Unknown,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::Forbidden => "they are switched off; allow some with: sysctl -w user.max_user_namespaces=15000",
            Refusal::UnprivilegedClone => {
                "only root may make them; allow it with: sysctl -w kernel.unprivileged_userns_clone=1"
            }
            Refusal::AppArmor => {
                "AppArmor restricts them; allow them with: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, \
                 or install an AppArmor profile for nacre with the rule `userns,`"
            }
            Refusal::Seccomp => {
                "this container's seccomp profile forbids them; run it with --security-opt seccomp=unconfined \
                 (Kubernetes: seccompProfile type Unconfined, or hostUsers: false)"
            }
            Refusal::Chroot => {
                "the kernel does not allow it inside a chroot; enter the directory as a container instead"
            }
            Refusal::Unsupported => "this kernel has none (CONFIG_USER_NS)",
            Refusal::Exhausted => "too many are in use (sysctl user.max_user_namespaces)",
            Refusal::Unknown => "the kernel, a security module or a container's seccomp profile forbids it",
        })
    }
}

/// Makes this process root of a user namespace, unless it is root already and may have more than one id.
///
/// Call it before any thread exists. When it returns [`Entered::Parent`], the build has been done by another process.
pub fn enter(request: EnterRequest) -> Result<Entered, SandboxError> {
    sys::expect_children();
    if let Some(notice) = marked()? {
        return Ok(Entered::Inside { ownership: ownership(), notice });
    }
    if request == EnterRequest::Best && can_mount() {
        return Ok(Entered::Root);
    }
    spawn_inside(request)
}

/// Replaces this process by the same program with the same arguments and `variable` set. Returns only when that failed.
pub fn start_over(variable: &str) -> SandboxError {
    // What this process has blocked would stay so.
    sys::block_signals(&[]);
    let mut args = std::env::args_os();
    let mut command = Command::new("/proc/self/exe");
    if let Some(name) = args.next() {
        command.arg0(name);
    }
    let error = command.args(args).env(variable, "1").exec();
    in_preparation("start over")(CallError::new("execve(\"/proc/self/exe\")", error))
}

/// Returns what owners are for this process: [`Ownership::Native`] for a root that has other ids to give away.
pub fn ownership() -> Ownership {
    let enough = mapped_ids("/proc/self/uid_map") > 1 && mapped_ids("/proc/self/gid_map") > 1;
    let root = rustix::process::geteuid().is_root();
    if root && enough { Ownership::Native } else { Ownership::SingleId }
}

/// Looks whether [`spawn_inside`] started this process; then returns its notice.
fn marked() -> Result<Option<Option<String>>, SandboxError> {
    #[allow(clippy::disallowed_methods, reason = "a message from this module to itself, across execve")]
    let variable = std::env::var_os(VARIABLE);
    let Some(value) = variable else { return Ok(None) };
    // Whoever set it: it is not for the programs that this process starts.
    sys::remove_env(VARIABLE).map_err(in_preparation("take the namespace over"))?;
    let Some((parent, notice)) = value.to_str().and_then(|value| value.split_once(':')) else { return Ok(None) };
    if is_initial_namespace() || !rustix::process::geteuid().is_root() || !can_mount() {
        return Ok(None);
    }
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .call(|| "prctl(PR_SET_PDEATHSIG)".into())
        .map_err(in_preparation("be tied to the process outside"))?;
    if rustix::process::getppid().map(|pid| pid.as_raw_pid().to_string()).as_deref() != Some(parent) {
        return Err(SandboxError::Cancelled);
    }
    Ok(Some(Some(notice.to_owned()).filter(|notice| !notice.is_empty())))
}

fn in_preparation(doing: &str) -> impl FnOnce(CallError) -> SandboxError {
    let doing = doing.to_owned();
    move |source| SandboxError::Prepare { doing, source }
}

/// Returns whether this process is in no user namespace but the first one.
pub fn is_initial_namespace() -> bool {
    mapped_ids("/proc/self/uid_map") == u64::from(u32::MAX)
}

fn mapped_ids(path: &str) -> u64 {
    extents(&std::fs::read_to_string(path).unwrap_or_default()).map(|(_, _, count)| count).sum()
}

/// Lines of an id map: first id inside, first id outside, count.
fn extents(map: &str) -> impl Iterator<Item = (u64, u64, u64)> {
    map.lines().filter_map(|line| {
        let mut numbers = line.split_whitespace().map(|word| word.parse().ok());
        Some((numbers.next()??, numbers.next()??, numbers.next()??))
    })
}

/// Returns whether this process is root and may mount file systems.
pub(super) fn can_mount() -> bool {
    rustix::process::geteuid().is_root()
        && rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN))
        // Root of a namespace that owns no mount namespace has the capability and yet may not.
        && sys::make_mount("tmpfs", &[], rustix::mount::MountAttrFlags::empty()).is_ok()
}

/// Ids that a namespace gets besides the caller's own, as (first outside, count).
type Ranges = Vec<(u64, u64)>;

fn spawn_inside(request: EnterRequest) -> Result<Entered, SandboxError> {
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).call(|| "pipe()".into());
    let pipes = || Ok((pipe()?, pipe()?));
    let ((from_child, to_parent), (from_parent, to_child)) = pipes().map_err(in_preparation("talk to the child"))?;

    // Held back from now on, so that none is lost between the fork and the wait.
    sys::block_signals(&[&FORWARDED[..], &[libc::SIGCHLD]].concat());
    let parent = rustix::process::getpid();
    let pid = match sys::fork(0).map_err(in_preparation("start a process for the namespace"))? {
        Fork::Child => {
            drop((from_child, to_child));
            become_inside(parent, &to_parent, &from_parent)
        }
        Fork::Parent(pid) => pid,
    };
    drop((to_parent, from_parent));
    match prepare_inside(request, pid, &from_child, &to_child) {
        Ok(()) => drop(to_child),
        Err(error) => {
            drop(to_child);
            _ = rustix::process::kill_process(pid, Signal::KILL);
            _ = rustix::process::waitpid(Some(pid), WaitOptions::empty());
            sys::block_signals(&[]);
            return Err(error);
        }
    }
    wait_for(pid)
}

/// Stages in which the child can fail, as it reports them: a letter and the error number.
const UNSHARED: u8 = b'u';
const MAPPED_SINGLE: u8 = b'm';
const READY: u8 = b'r';
const SINGLE: u8 = b's';
const RANGE: u8 = b'g';

fn say(pipe: &OwnedFd, stage: u8, error: Option<&CallError>) -> bool {
    let errno = error.map_or(0, |error| error.source.raw_os_error().unwrap_or(libc::EIO));
    let mut message = vec![stage];
    message.extend(errno.to_ne_bytes());
    rustix::io::write(pipe, &message).is_ok_and(|length| length == message.len())
}

/// The child: enters the namespace and executes this program anew.
fn become_inside(parent: Pid, to_parent: &OwnedFd, from_parent: &OwnedFd) -> ! {
    const FAILED: i32 = 125;
    // Inside, they cannot be asked for any more.
    let ids = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let result = (|| {
        let report = |stage: u8, result: sys::Result<()>| match result {
            Ok(()) => say(to_parent, stage, None).then_some(()),
            Err(error) => {
                say(to_parent, stage, Some(&error));
                None
            }
        };
        report(UNSHARED, sys::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS))?;
        let order = hear(from_parent)?;
        if order.first() == Some(&SINGLE) {
            report(MAPPED_SINGLE, map_single(ids))?;
        }
        let notice = String::from_utf8_lossy(order.get(1..)?).into_owned();
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).ok()?;
        report(READY, super::step::separate_mounts())?;
        Some(notice)
    })();
    let Some(notice) = result else { sys::exit_now(FAILED) };
    sys::block_signals(&[]);
    let mut args = std::env::args_os();
    let mut command = Command::new("/proc/self/exe");
    if let Some(name) = args.next() {
        command.arg0(name);
    }
    command.args(args).env(VARIABLE, format!("{}:{notice}", parent.as_raw_pid()));
    let error = command.exec();
    say(to_parent, READY, Some(&CallError::new("execve(\"/proc/self/exe\")", error)));
    sys::exit_now(FAILED)
}

/// Reads one message; nothing when the other side is gone.
fn hear(pipe: &OwnedFd) -> Option<Vec<u8>> {
    let mut buffer = [0; 4096];
    loop {
        match rustix::io::read(pipe, &mut buffer) {
            Ok(0) => return None,
            Ok(length) => return Some(buffer[..length].to_vec()),
            Err(Errno::INTR) => {}
            Err(_) => return None,
        }
    }
}

/// Maps `(uid, gid)`, the caller's own, to 0, which needs no help.
pub(super) fn map_single((uid, gid): (u32, u32)) -> sys::Result<()> {
    let write = |file: &str, text: &str| {
        std::fs::write(format!("/proc/self/{file}"), text).call(|| format!("write(/proc/self/{file}, {text:?})"))
    };
    write("setgroups", "deny")?;
    write("uid_map", &format!("0 {uid} 1"))?;
    write("gid_map", &format!("0 {gid} 1"))
}

/// The parent's part in setting the child up.
fn prepare_inside(
    request: EnterRequest,
    pid: Pid,
    from_child: &OwnedFd,
    to_child: &OwnedFd,
) -> Result<(), SandboxError> {
    expect(from_child, UNSHARED)?;
    let notice = match request {
        EnterRequest::SingleId => Some("asked for".to_owned()),
        EnterRequest::Best | EnterRequest::Own => map_ranges(pid).err(),
    };
    let order = match &notice {
        None => vec![RANGE],
        Some(notice) => [&[SINGLE], notice.as_bytes()].concat(),
    };
    rustix::io::write(to_child, &order[..order.len().min(4096)])
        .call(|| "write(child)".into())
        .map_err(in_preparation("set the namespace up"))?;
    if notice.is_some() {
        expect(from_child, MAPPED_SINGLE)?;
    }
    expect(from_child, READY)
}

/// Waits for the child to report that it has passed `stage`.
fn expect(from_child: &OwnedFd, stage: u8) -> Result<(), SandboxError> {
    let mut message = [0; 5];
    let length = rustix::io::read(from_child, &mut message).unwrap_or(0);
    let errno = i32::from_ne_bytes([message[1], message[2], message[3], message[4]]);
    if length == message.len() && message[0] == stage && errno == 0 {
        return Ok(());
    }
    let call = match stage {
        UNSHARED => "unshare(user, mount)",
        MAPPED_SINGLE => "write(/proc/self/uid_map)",
        _ => "mount(\"/\", private)",
    };
    let source = match errno {
        0 => std::io::Error::other("the process died"),
        errno => std::io::Error::from_raw_os_error(errno),
    };
    let source = CallError::new(call, source);
    Err(SandboxError::UserNamespace { cause: refusal(&source), source })
}

/// Finds out why a namespace was refused.
pub(super) fn refusal(error: &CallError) -> Refusal {
    let sysctl = |path: &str| std::fs::read_to_string(format!("/proc/sys/{path}")).ok();
    let is = |path: &str, value: &str| sysctl(path).is_some_and(|text| text.trim() == value);
    if is("user/max_user_namespaces", "0") {
        return Refusal::Forbidden;
    }
    if is("kernel/unprivileged_userns_clone", "0") {
        return Refusal::UnprivilegedClone;
    }
    if error.is(Errno::INVAL) {
        return Refusal::Unsupported;
    }
    if error.is(Errno::NOSPC) || error.is(Errno::USERS) {
        return Refusal::Exhausted;
    }
    if is("kernel/apparmor_restrict_unprivileged_userns", "1") {
        return Refusal::AppArmor;
    }
    if is_filtered() {
        return Refusal::Seccomp;
    }
    if is_chroot() { Refusal::Chroot } else { Refusal::Unknown }
}

/// Returns whether a seccomp filter acts on this process.
pub(super) fn is_filtered() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() == "2"))
}

/// Says why steps cannot be isolated by chroot(2) alone; nothing if they can.
pub fn chroot_refusal() -> Option<String> {
    let sets = rustix::thread::capabilities(None).unwrap_or(rustix::thread::CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    });
    let needed = [
        (CapabilitySet::SYS_CHROOT, "CAP_SYS_CHROOT"),
        (CapabilitySet::CHOWN, "CAP_CHOWN"),
        (CapabilitySet::SETUID, "CAP_SETUID"),
        (CapabilitySet::SETGID, "CAP_SETGID"),
        (CapabilitySet::SETPCAP, "CAP_SETPCAP"),
        (CapabilitySet::MKNOD, "CAP_MKNOD"),
    ];
    let missing: Vec<&str> =
        needed.iter().filter(|(capability, _)| !sets.effective.contains(*capability)).map(|(_, name)| *name).collect();
    if !rustix::process::geteuid().is_root() {
        return Some("it takes root".to_owned());
    }
    if !missing.is_empty() {
        return Some(format!("it takes {}, which this process has not", missing.join(", ")));
    }
    // Only the root that device nodes belong to may make them.
    (!is_initial_namespace()).then(|| "it does not work in a user namespace".to_owned())
}

/// Returns whether the root directory is not the root of a mount, which it is except in a chroot.
fn is_chroot() -> bool {
    let flags = rustix::fs::AtFlags::empty();
    rustix::fs::statx(rustix::fs::CWD, "/", flags, rustix::fs::StatxFlags::BASIC_STATS)
        .is_ok_and(|stat| !stat.stx_attributes.contains(rustix::fs::StatxAttributes::MOUNT_ROOT))
}

/// Maps the ranges that the caller may use to the child; says why it cannot.
fn map_ranges(pid: Pid) -> Result<(), String> {
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    if uid.is_root() {
        return map_everything(pid);
    }
    let name = user_name(uid.as_raw());
    let uids = subordinate("/etc/subuid", name.as_deref(), uid.as_raw())?;
    let gids = subordinate("/etc/subgid", name.as_deref(), uid.as_raw())?;
    map_with("newuidmap", pid, uid.as_raw(), &uids)?;
    map_with("newgidmap", pid, gid.as_raw(), &gids)
}

/// Root of some namespace can hand on all its ids.
fn map_everything(pid: Pid) -> Result<(), String> {
    for file in ["uid_map", "gid_map"] {
        let own = std::fs::read_to_string(format!("/proc/self/{file}")).map_err(|error| error.to_string())?;
        let mut lines: Vec<(u64, u64, u64)> = extents(&own).collect();
        // A namespace with all ids would look like the initial one.
        if let [(0, 0, count)] = lines.as_mut_slice()
            && *count == u64::from(u32::MAX)
        {
            *count -= 1;
        }
        if lines.iter().map(|(_, _, count)| count).sum::<u64>() <= 1 {
            return Err("this namespace has only one id".into());
        }
        let map: String = lines.iter().map(|(first, _, count)| format!("{first} {first} {count}\n")).collect();
        let path = format!("/proc/{}/{file}", pid.as_raw_pid());
        std::fs::write(&path, map).map_err(|error| format!("cannot write {path}: {error}"))?;
    }
    Ok(())
}

/// Maps the caller's ranges to a new namespace, to see whether that works; says why not.
pub(super) fn try_ranges() -> Result<(), String> {
    let failed = |error: CallError| format!("{error}: {}", error.source);
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|error| error.to_string())?;
    let pid = match sys::fork(libc::CLONE_NEWUSER).map_err(failed)? {
        // Lives until the other end of the pipe is closed.
        Fork::Child => {
            drop(write);
            _ = rustix::io::read(&read, &mut [0; 1]);
            sys::exit_now(0)
        }
        Fork::Parent(pid) => pid,
    };
    let mapped = map_ranges(pid);
    drop(write);
    _ = rustix::process::waitpid(Some(pid), WaitOptions::empty());
    mapped
}

fn user_name(uid: u32) -> Option<String> {
    let passwd = std::fs::read_to_string("/etc/passwd").ok()?;
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, number) = (fields.next()?, fields.nth(1)?);
        (number.parse() == Ok(uid)).then(|| name.to_owned())
    })
}

fn subordinate(file: &str, name: Option<&str>, uid: u32) -> Result<Ranges, String> {
    let text = std::fs::read_to_string(file).map_err(|error| format!("cannot read {file}: {error}"))?;
    let ranges = ranges_of(&text, name, uid);
    if ranges.is_empty() {
        let who = name.map_or_else(|| uid.to_string(), str::to_owned);
        return Err(format!(
            "{file} has no range for {who} (as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 \
             {who})"
        ));
    }
    Ok(ranges)
}

/// Ranges of a user in subuid(5) or subgid(5): lines of `name or id:first:count`.
fn ranges_of(text: &str, name: Option<&str>, uid: u32) -> Ranges {
    let uid = uid.to_string();
    let mut ranges = Ranges::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.trim().split(':').collect();
        let [who, first, count] = fields[..] else { continue };
        let (Ok(first), Ok(count)) = (first.parse::<u32>(), count.parse::<u32>()) else { continue };
        if count > 0 && (Some(who) == name || who == uid) {
            ranges.push((first.into(), count.into()));
        }
    }
    ranges
}

/// Arguments of newuidmap(1): the own id becomes 0, the ranges follow.
fn map_arguments(own: u32, ranges: &Ranges) -> Vec<String> {
    let mut arguments = vec!["0".into(), own.to_string(), "1".into()];
    let mut inside = 1;
    for (first, count) in ranges {
        arguments.extend([inside, *first, *count].map(|number| number.to_string()));
        inside += count;
    }
    arguments
}

fn map_with(program: &str, pid: Pid, own: u32, ranges: &Ranges) -> Result<(), String> {
    let result = Command::new(program)
        .arg(pid.as_raw_pid().to_string())
        .args(map_arguments(own, ranges))
        .stdin(Stdio::null())
        .output();
    match result {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let message = String::from_utf8_lossy(&output.stderr);
            Err(format!("{program} failed: {}", message.lines().next().unwrap_or("no message")))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(format!("{program} is not installed (package uidmap or shadow-utils)"))
        }
        Err(error) => Err(format!("{program} could not be started: {error}")),
    }
}

/// Waits for the process inside, passing signals on.
fn wait_for(pid: Pid) -> Result<Entered, SandboxError> {
    let waiting = [&FORWARDED[..], &[libc::SIGCHLD]].concat();
    loop {
        let (signal, from_process) = sys::wait_signal(&waiting).map_err(in_preparation("wait for the build"))?;
        if signal != libc::SIGCHLD {
            // What the terminal sends, it sends to the whole process group: the child has got it.
            if from_process && let Some(signal) = Signal::from_named_raw(signal) {
                _ = rustix::process::kill_process(pid, signal);
            }
            continue;
        }
        match rustix::process::waitpid(Some(pid), WaitOptions::NOHANG) {
            Ok(Some((_, status))) => return Ok(Entered::Parent { exit_code: super::Status::of(status).code() }),
            Ok(None) | Err(Errno::INTR) => {}
            Err(error) => {
                let source = CallError::new("wait()", error);
                return Err(SandboxError::Prepare { doing: "wait for the build".into(), source });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_subordinate_ranges() {
        let text = "root:100000:65536\nann:165536:65536\nbad\nann:x:1\n1000:300000:10\nann:400000:0\n:1:1\n";
        for (name, uid, expected) in [
            (Some("ann"), 1000, vec![(165_536, 65_536), (300_000, 10)]),
            (Some("bob"), 1001, vec![]),
            (None, 1000, vec![(300_000, 10)]),
            (Some("root"), 0, vec![(100_000, 65_536)]),
        ] {
            assert_eq!(ranges_of(text, name, uid), expected, "{name:?} {uid}");
        }
    }

    #[test]
    fn maps_ranges_one_after_the_other() {
        let ranges = vec![(165_536, 65_536), (300_000, 10)];
        let expected = "0 1000 1 1 165536 65536 65537 300000 10";
        assert_eq!(map_arguments(1000, &ranges).join(" "), expected);
    }

    #[test]
    fn reads_id_maps() {
        let map = "         0       1000          1\n         1     100000      65536\n";
        assert_eq!(extents(map).collect::<Vec<_>>(), [(0, 1000, 1), (1, 100_000, 65_536)]);
        assert_eq!(extents("junk\n0 1\n").count(), 0);
    }
}
