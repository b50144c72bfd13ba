//! Tries out what the kernel allows, for messages: `nacre doctor`, and hints before a first RUN.
//!
//! The tries need namespaces of their own, so they are made by a process of their own, as a supervisor is.

use super::{SANDBOX_ARGUMENT, SandboxError, idmap};
use crate::sys::{self, CallError, Fork};
use rustix::mount::MountAttrFlags;
use rustix::process::WaitOptions;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Second argument of the process that makes the tries.
pub(super) const ARGUMENT: &str = "probe";

/// What a sandbox can do here. Each is `None` when it works, else the reason why not.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// A user namespace can be made, or is not needed.
    pub user_namespace: Option<String>,
    /// overlayfs can write to the directory asked for.
    pub overlay: Option<String>,
    /// A fresh /proc can be mounted.
    pub fresh_proc: Option<String>,
}

/// Tries out what a sandbox needs, with a store in `dir`.
pub fn probe(dir: &Path) -> Result<Probe, SandboxError> {
    let prepare = |source| SandboxError::Prepare { doing: "find out what the kernel allows".into(), source };
    let output = Command::new("/proc/self/exe")
        .args([SANDBOX_ARGUMENT, ARGUMENT])
        .arg(dir)
        .env_clear()
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .map_err(|error| prepare(CallError::new("execve(\"/proc/self/exe\")", error)))?;
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Runs in the process that makes the tries; writes the result to standard output.
pub(super) fn main() -> i32 {
    let dir = std::env::args_os().nth(3).map(PathBuf::from).unwrap_or_default();
    let result = try_out(&dir);
    let Ok(text) = serde_json::to_vec(&result) else { return 1 };
    i32::from(rustix::io::write(std::io::stdout(), &text).is_err())
}

fn try_out(dir: &Path) -> Probe {
    let mut result = Probe::default();
    if !idmap::can_mount() {
        let ids = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let entered = sys::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS).and_then(|()| idmap::map_single(ids));
        if let Err(error) = entered {
            let reason = format!("{}: {} ({})", idmap::refusal(&error), error, error.source);
            result.user_namespace = Some(reason);
            let without = Some("not tried without a user namespace".to_owned());
            return Probe { overlay: without.clone(), fresh_proc: without, ..result };
        }
    }
    let why = |error: CallError| format!("{error}: {}", error.source);
    result.overlay = try_overlay(dir).err().map(why);
    result.fresh_proc = try_proc().err();
    result
}

fn try_overlay(dir: &Path) -> sys::Result<()> {
    use sys::Call;
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

fn try_proc() -> Result<(), String> {
    let child = sys::fork(libc::CLONE_NEWPID).map_err(|error| format!("{error}: {}", error.source))?;
    let pid = match child {
        Fork::Child => {
            let result = sys::make_mount("proc", &[], MountAttrFlags::empty());
            sys::exit_now(result.map_or_else(|error| error.source.raw_os_error().unwrap_or(255), |_| 0))
        }
        Fork::Parent(pid) => pid,
    };
    let status = rustix::process::waitpid(Some(pid), WaitOptions::empty()).ok().flatten();
    match status.and_then(|(_, status)| status.exit_status()) {
        Some(0) => Ok(()),
        Some(libc::EPERM) => Err("the container runtime masks /proc; use procMount: Unmasked (Kubernetes) or \
                                  --security-opt systempaths=unconfined. Steps share the existing /proc"
            .into()),
        Some(errno) => Err(std::io::Error::from_raw_os_error(errno).to_string()),
        None => Err("the process that tried it died".into()),
    }
}
