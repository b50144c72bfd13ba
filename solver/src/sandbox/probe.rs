//! Tries out what the kernel allows, for `nacre doctor`.
//!
//! The tries need namespaces of their own, so they are made by a process of their own, as a supervisor is.

use super::cgroup::Limits;
use super::emulation::Scope;
use super::seccomp::{self, Profile};
use super::{SANDBOX_ARGUMENT, SandboxError, idmap};
use crate::sys::{self, Call, CallError, Fork};
use rustix::mount::MountAttrFlags;
use rustix::process::WaitOptions;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Second argument of the process that makes the tries.
pub(super) const ARGUMENT: &str = "probe";

/// Something that the kernel must allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Right {
    /// To be root of a user namespace, or root.
    UserNamespace,
    /// To map more than one id.
    ManyIds,
    /// To stack layers in the store with overlayfs.
    Overlay,
    /// To mount a /proc of a new pid namespace.
    FreshProc,
    /// To make a network namespace.
    NetworkNamespace,
    /// To filter system calls.
    Seccomp,
    /// To answer system calls of other processes.
    Notification,
    /// To connect a network namespace with the host's network.
    Tun,
    /// To limit steps by control groups.
    Limits,
    /// To run steps with another root directory alone.
    Chroot,
}

/// How a try ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It works.
    Works,
    /// It does not; the call, and why.
    Refused(String),
    /// It needs something that was refused before.
    NotTried,
}

/// What a sandbox can do here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// Every right once, in the order in which they build on each other.
    pub tries: Vec<(Right, Verdict)>,
}

impl Probe {
    /// How the try of a right ended.
    pub fn verdict(&self, right: Right) -> &Verdict {
        self.tries.iter().find(|(tried, _)| *tried == right).map_or(&Verdict::NotTried, |(_, verdict)| verdict)
    }
}

/// Tries out what a sandbox needs, with a store in `dir`, which exists.
pub fn probe(dir: &Path) -> Result<Probe, SandboxError> {
    let prepare = |source| SandboxError::Prepare { doing: "find out what the kernel allows".into(), source };
    let output = Command::new("/proc/self/exe")
        .args([SANDBOX_ARGUMENT, ARGUMENT])
        .arg(dir)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .map_err(|error| prepare(CallError::new("execve(\"/proc/self/exe\")", error)))?;
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Runs in the process that makes the tries; writes the result to standard output.
pub(super) fn main() -> i32 {
    sys::expect_children();
    let dir = std::env::args_os().nth(3).map(PathBuf::from).unwrap_or_default();
    let result = try_out(&dir);
    let Ok(text) = serde_json::to_vec(&result) else { return 1 };
    i32::from(rustix::io::write(std::io::stdout(), &text).is_err())
}

fn try_out(dir: &Path) -> Probe {
    let mut tries = Vec::new();
    let mut note = |right: Right, result: Result<(), String>| {
        let works = result.is_ok();
        tries.push((right, result.map_or_else(Verdict::Refused, |()| Verdict::Works)));
        works
    };
    let why = |error: CallError| format!("{error}: {}", error.source);
    let has_root = idmap::can_mount();
    // Before this process is in a namespace of its own, too.
    let chroot = idmap::chroot_refusal().map_or(Verdict::Works, Verdict::Refused);
    let entered = || -> sys::Result<()> {
        let ids = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        sys::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS)?;
        idmap::map_single(ids)?;
        super::step::separate_mounts()
    };
    // Before this process is in a namespace of its own.
    let ids = match has_root {
        true if idmap::ownership() == idmap::Ownership::Native => Ok(()),
        true => Err("this user namespace has only one id".to_owned()),
        false => idmap::try_ranges(),
    };
    let root = if has_root { Ok(()) } else { entered() };
    let root = root.map_err(|error| format!("{} ({error}: {})", idmap::refusal(&error), error.source));
    if !note(Right::UserNamespace, root) {
        let rest = [
            Right::ManyIds,
            Right::Overlay,
            Right::FreshProc,
            Right::NetworkNamespace,
            Right::Seccomp,
            Right::Notification,
            Right::Tun,
            Right::Limits,
        ];
        tries.extend(rest.map(|right| (right, Verdict::NotTried)));
        tries.push((Right::Chroot, chroot));
        return Probe { tries };
    }
    note(Right::ManyIds, ids);
    note(Right::Overlay, try_overlay(dir).map_err(why));
    let mount_proc = || sys::make_mount("proc", &[], MountAttrFlags::empty()).map(drop);
    note(Right::FreshProc, in_child(libc::CLONE_NEWPID, mount_proc));
    note(Right::NetworkNamespace, in_child(libc::CLONE_NEWNET, sys::bring_loopback_up));
    let filter = || sys::install_filter(&seccomp::filter(Profile::default()));
    note(Right::Seccomp, in_child(0, filter));
    let listen = || {
        let filter = seccomp::filter(Profile { insecure: false, emulate: Some(Scope::Devices { shown: false }) });
        sys::notify::install_filter_with_listener(&filter).map(drop)
    };
    note(Right::Notification, in_child(0, listen));
    let tun = || super::network::open_tun().map(drop).map_err(|error| format!("open(\"/dev/net/tun\"): {error}"));
    note(Right::Tun, tun());
    note(Right::Limits, Limits::probe().map_err(|error| error.cause.to_string()));
    tries.push((Right::Chroot, chroot));
    Probe { tries }
}

fn try_overlay(dir: &Path) -> sys::Result<()> {
    let dir = tempfile::tempdir_in(dir).call(|| format!("mkdir({dir:?})"))?;
    let sub = |name: &str| {
        let path = dir.path().join(name);
        std::fs::create_dir(&path).call(|| format!("mkdir({path:?})")).map(|()| path)
    };
    let (lower, upper, work) = (sub("lower")?, sub("upper")?, sub("work")?);
    let mounted = super::init::overlay(&[lower], Some((&upper, &work)), dir.path(), MountAttrFlags::empty(), false);
    drop(mounted?);
    // overlayfs leaves a directory without permissions, which only root can remove as it is.
    let inner = work.join("work");
    _ = rustix::fs::chmod(&inner, rustix::fs::Mode::RWXU);
    Ok(())
}

/// Tries something in a process of its own, in new namespaces.
fn in_child(namespaces: libc::c_int, attempt: impl Fn() -> sys::Result<()>) -> Result<(), String> {
    const OTHER: i32 = 255;
    let child = sys::fork(namespaces).map_err(|error| format!("{error}: {}", error.source))?;
    let pid = match child {
        Fork::Child => {
            sys::exit_now(attempt().map_or_else(|error| error.source.raw_os_error().unwrap_or(OTHER), |()| 0))
        }
        Fork::Parent(pid) => pid,
    };
    let status = rustix::process::waitpid(Some(pid), WaitOptions::empty()).ok().flatten();
    match status.and_then(|(_, status)| status.exit_status()) {
        Some(0) => Ok(()),
        Some(OTHER) | None => Err("the process that tried it failed".into()),
        Some(errno) => Err(std::io::Error::from_raw_os_error(errno).to_string()),
    }
}
