//! Limits of steps: control groups, version 2 (cgroups(7), the kernel's admin-guide/cgroup-v2.rst).
//!
//! ```text
//! parent          --cgroup-parent, else the group that nacre runs in; gives its controllers to those below
//! ├─ nacre-init   what was in the group of nacre's own, nacre included
//! └─ nacre-PID    one step, by the process id of its supervisor; gone when the step has ended
//! ```
//!
//! A group below which controllers are to act may hold no process itself, but for the root of the hierarchy. So nacre's
//! own group is emptied into one beside the steps', as builders and container daemons do that run in a container.
//! It stays: taking it back would race with other builds.
//!
//! The builder prepares the parent once, and the supervisor of each step makes, reads and removes the step's group. A
//! step joins its group before it gets a cgroup namespace, of which the group then is the root.

use super::Failure;
use crate::sys::{self, Call, CallError};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Group that processes of nacre's own group are moved to.
const INIT: &str = "nacre-init";

/// What a step may use at most. `None` is no limit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// `--memory`.
    pub memory_bytes: Option<u64>,
    /// `--memory-swap`.
    pub swap: Swap,
    /// `--cpu-period`, in microseconds.
    pub cpu_period_us: Option<u64>,
    /// `--cpu-quota`: CPU time per period, in microseconds.
    pub cpu_quota_us: Option<u64>,
    /// `--cpu-shares`, 2 to 262,144; 1024 is what groups have without.
    pub cpu_shares: Option<u64>,
    /// `--cpuset-cpus`, as `0-1,3`.
    pub cpuset_cpus: Option<String>,
    /// `--cpuset-mems`.
    pub cpuset_mems: Option<String>,
    /// `--pids-limit`: processes and threads at one time.
    pub processes: Option<u64>,
    /// `--cgroup-parent`: from the root of the hierarchy when it starts with a slash, else below the group of this
    /// process.
    pub parent: Option<String>,
}

/// Swap beside a memory limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Swap {
    /// As much again as memory, as docker has it; nothing to enforce where the kernel does not count swap.
    #[default]
    AsMemory,
    /// This many bytes.
    Bytes(u64),
    /// Any amount.
    Unlimited,
}

/// One file of a group and what is written into it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Setting {
    controller: String,
    file: String,
    value: String,
    flag: String,
    /// Kernels can be built without the file, and then there is nothing to limit.
    optional: bool,
}

/// Where the group of a step is made, and with which limits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepGroup {
    parent: PathBuf,
    settings: Vec<Setting>,
}

/// What happened to a step because of its limits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exceeded {
    /// Processes of the step that the kernel killed for want of memory.
    pub killed: u64,
    /// It was the step's own limit that was reached, not one of the machine or of a group above.
    pub own_memory: bool,
    /// Times that a new process or thread was refused.
    pub refused_processes: u64,
}

/// Why limits cannot be enforced.
#[derive(Debug, thiserror::Error)]
#[error("{flag} cannot be enforced: {cause}")]
pub struct LimitError {
    /// The flag that asks for it.
    pub flag: String,
    /// Why not.
    pub cause: LimitRefusal,
}

/// See [`LimitError`].
#[derive(Debug)]
pub enum LimitRefusal {
    /// No cgroup2 file system is mounted here.
    NotMounted,
    /// The controller belongs to a hierarchy of version 1.
    Version1 {
        /// The controller.
        controller: String,
    },
    /// The kernel was built or started without it.
    NoController {
        /// The controller.
        controller: String,
    },
    /// This process's group is not below what is mounted.
    Outside {
        /// The group as the kernel names it.
        group: String,
    },
    /// A group does not have the controller, so those below cannot either.
    NotDelegated {
        /// The controller.
        controller: String,
        /// The group.
        group: PathBuf,
        /// What it has.
        has: String,
    },
    /// The hierarchy is mounted read-only.
    ReadOnly {
        /// Where.
        mount: PathBuf,
    },
    /// The group belongs to somebody else.
    Denied {
        /// The group.
        group: PathBuf,
    },
    /// There are processes in it, which keeps controllers from acting below it.
    Busy {
        /// The group.
        group: PathBuf,
        /// One of its processes; 0 is one that this container does not see.
        process: i32,
    },
    /// `--cgroup-parent` leaves the hierarchy.
    BadParent {
        /// As typed.
        parent: String,
    },
    /// Something else.
    Refused(CallError),
}

impl fmt::Display for LimitRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotMounted => write!(f, "no control groups of version 2 are mounted here"),
            Self::Version1 { controller } => {
                write!(f, "controller `{controller}` is used by control groups of version 1 on this machine")
            }
            Self::NoController { controller } => write!(f, "this kernel has no controller `{controller}`"),
            Self::Outside { group } => {
                write!(f, "the control group of this process ({group}) is not below what is mounted")
            }
            Self::NotDelegated { controller, group, has } => {
                let has = if has.is_empty() { "none" } else { has };
                write!(f, "{} was not given the controller `{controller}` (it has {has})", group.display())
            }
            Self::ReadOnly { mount } => write!(f, "{} is mounted read-only", mount.display()),
            Self::Denied { group } => write!(f, "{} belongs to somebody else", group.display()),
            Self::Busy { group, process: 0 } => {
                write!(f, "{} holds processes from outside of this container", group.display())
            }
            Self::Busy { group, process } => {
                write!(f, "{} holds a process that cannot be moved (process {process})", group.display())
            }
            Self::BadParent { parent } => write!(f, "`{parent}` is no path of a control group"),
            Self::Refused(error) => write!(f, "{error}: {}", error.source),
        }
    }
}

impl LimitError {
    /// A way out, one sentence.
    pub fn help(&self) -> String {
        let flag = &self.flag;
        match &self.cause {
            LimitRefusal::NotMounted | LimitRefusal::Version1 { .. } => format!(
                "start the machine with systemd.unified_cgroup_hierarchy=1 (other init systems: cgroup_no_v1=all, and mount \
                 cgroup2 on /sys/fs/cgroup), limit the container or job that the build runs in, or leave {flag} out"
            ),
            LimitRefusal::NoController { .. } => format!("leave {flag} out"),
            LimitRefusal::ReadOnly { .. } | LimitRefusal::Outside { .. } => format!(
                "limit the container itself (docker run --memory …, resources.limits in Kubernetes), or give it a control \
                 group that it may write to (docker run --privileged --cgroupns=private …), or leave {flag} out"
            ),
            LimitRefusal::NotDelegated { .. } | LimitRefusal::Denied { .. } | LimitRefusal::Busy { .. } => {
                let user = if rustix::process::geteuid().is_root() && super::idmap::is_initial_namespace() {
                    ""
                } else {
                    "--user "
                };
                format!(
                    "start the build in a group of its own: systemd-run {user}--scope -p Delegate=yes nacre build …, or name \
                     one that you may write to with --cgroup-parent, or leave {flag} out"
                )
            }
            LimitRefusal::BadParent { .. } => {
                "give a path without `..`: from the root of the hierarchy with a slash in front, else below the builder's \
                 own group"
                    .to_owned()
            }
            LimitRefusal::Refused(_) => format!("leave {flag} out"),
        }
    }
}

impl Limits {
    /// Nothing is asked for.
    pub fn is_empty(&self) -> bool {
        *self == Limits::default()
    }

    fn settings(&self) -> Vec<Setting> {
        let mut settings = Vec::new();
        let mut set = |controller: &str, file: &str, value: String, flag: &str, optional: bool| {
            let (controller, file, flag) = (controller.to_owned(), file.to_owned(), flag.to_owned());
            settings.push(Setting { controller, file, value, flag, optional });
        };
        if let Some(bytes) = self.memory_bytes {
            set("memory", "memory.max", bytes.to_string(), "--memory", false);
            let (swap, optional) = match self.swap {
                Swap::AsMemory => (bytes.to_string(), true),
                Swap::Bytes(bytes) => (bytes.to_string(), bytes == 0),
                Swap::Unlimited => ("max".to_owned(), true),
            };
            set("memory", "memory.swap.max", swap, "--memory-swap", optional);
        }
        if let Some(quota) = self.cpu_quota_us {
            let period = self.cpu_period_us.unwrap_or(DEFAULT_PERIOD_US);
            set("cpu", "cpu.max", format!("{quota} {period}"), "--cpu-quota", false);
        } else if let Some(period) = self.cpu_period_us {
            set("cpu", "cpu.max", format!("max {period}"), "--cpu-period", false);
        }
        if let Some(shares) = self.cpu_shares {
            set("cpu", "cpu.weight", weight(shares).to_string(), "--cpu-shares", false);
        }
        if let Some(cpus) = &self.cpuset_cpus {
            set("cpuset", "cpuset.cpus", cpus.clone(), "--cpuset-cpus", false);
        }
        if let Some(nodes) = &self.cpuset_mems {
            set("cpuset", "cpuset.mems", nodes.clone(), "--cpuset-mems", false);
        }
        if let Some(processes) = self.processes {
            set("pids", "pids.max", processes.to_string(), "--pids-limit", false);
        }
        settings
    }

    /// Makes the parent of the steps' groups ready; `None` when nothing is asked for.
    pub fn prepare(&self) -> Result<Option<StepGroup>, LimitError> {
        if self.is_empty() {
            return Ok(None);
        }
        let settings = self.settings();
        let first = settings.first().map_or("--cgroup-parent", |setting| setting.flag.as_str()).to_owned();
        let refused = |cause| LimitError { flag: first.clone(), cause };
        let controllers = |cause: LimitRefusal, controller: &str| {
            let flag = settings.iter().find(|setting| setting.controller == controller);
            LimitError { flag: flag.map_or_else(|| first.clone(), |setting| setting.flag.clone()), cause }
        };
        for setting in &settings {
            let cause = missing_controller(&setting.controller);
            cause.map_or(Ok(()), |cause| Err(controllers(cause, &setting.controller)))?;
        }
        let hierarchy = Hierarchy::find().map_err(refused)?;
        let parent = hierarchy.parent(self.parent.as_deref()).map_err(refused)?;
        if let Err(error) = std::fs::create_dir_all(&parent) {
            let error = CallError::new(format!("mkdir({parent:?})"), error);
            return Err(refused(hierarchy.cause(error, parent.parent().unwrap_or(&parent))));
        }
        let mut wanted: Vec<&str> = settings.iter().map(|setting| setting.controller.as_str()).collect();
        wanted.dedup();
        for controller in wanted {
            hierarchy.give(controller, &parent).map_err(|cause| controllers(cause, controller))?;
        }
        // The rest is up to who owns it; asked before a step has been prepared.
        if let Err(error) = rustix::fs::access(&parent, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK) {
            let error = CallError::new(format!("access({parent:?})"), error);
            return Err(refused(hierarchy.cause(error, &parent)));
        }
        Ok(Some(StepGroup { parent, settings }))
    }

    /// Finds out, without changing anything, whether a memory limit could be enforced.
    pub(super) fn probe() -> Result<(), LimitError> {
        let refused = |cause| LimitError { flag: "--memory".to_owned(), cause };
        missing_controller("memory").map_or(Ok(()), |cause| Err(refused(cause)))?;
        let hierarchy = Hierarchy::find().map_err(refused)?;
        let group = hierarchy.own.clone();
        let has = words(&group.join("cgroup.controllers")).map_err(|error| refused(LimitRefusal::Refused(error)))?;
        if !has.iter().any(|name| name == "memory") {
            let controller = "memory".to_owned();
            return Err(refused(LimitRefusal::NotDelegated { controller, group, has: has.join(" ") }));
        }
        for file in [&group, &group.join("cgroup.procs"), &group.join("cgroup.subtree_control")] {
            rustix::fs::access(file, rustix::fs::Access::WRITE_OK).map_err(|error| {
                refused(hierarchy.cause(CallError::new(format!("access({file:?})"), error), &group))
            })?;
        }
        Ok(())
    }
}

/// What the kernel has without a setting.
const DEFAULT_PERIOD_US: u64 = 100_000;

/// Weight of a group for what `--cpu-shares` says, by powers so that 2, 1024 and 262,144, the least, the default and the
/// most of version 1, become 1, 100 and 10,000, those of version 2.
fn weight(shares: u64) -> u64 {
    let logarithm = (shares.clamp(2, 262_144) as f64).log2();
    let exponent = (logarithm * logarithm + 125.0 * logarithm) / 612.0 - 7.0 / 34.0;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 1 and 10,000")]
    let weight = 10_f64.powf(exponent).ceil() as u64;
    weight.clamp(1, 10_000)
}

/// Why version 2 cannot have a controller anywhere on this machine.
fn missing_controller(controller: &str) -> Option<LimitRefusal> {
    // Name, number of the hierarchy (0 is version 2 or none), groups, enabled. Containers may hide the file.
    let text = std::fs::read_to_string("/proc/cgroups").ok()?;
    let line = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let found = line.into_iter().find(|fields| fields.first() == Some(&controller));
    let controller = controller.to_owned();
    match found.as_deref() {
        None | Some([_, _, _, "0"]) => Some(LimitRefusal::NoController { controller }),
        Some([_, "0", ..]) => None,
        Some(_) => Some(LimitRefusal::Version1 { controller }),
    }
}

fn words(path: &Path) -> sys::Result<Vec<String>> {
    let text = std::fs::read_to_string(path).call(|| format!("read({path:?})"))?;
    Ok(text.split_whitespace().map(str::to_owned).collect())
}

/// Writes into a file of a group, in one call as the kernel wants it.
fn write(path: &Path, value: &str) -> sys::Result<()> {
    use std::io::Write;
    let describe = || format!("write({path:?}, {value:?})");
    let mut file = std::fs::OpenOptions::new().write(true).open(path).call(describe)?;
    file.write_all(value.as_bytes()).call(describe)
}

/// The tree of groups as it is mounted.
#[derive(Debug)]
struct Hierarchy {
    mount: PathBuf,
    /// Group of this process; the one above when it is one that nacre has made.
    own: PathBuf,
}

impl Hierarchy {
    fn find() -> Result<Hierarchy, LimitRefusal> {
        let read = |path: &str| {
            std::fs::read_to_string(path).call(|| format!("read({path:?})")).map_err(LimitRefusal::Refused)
        };
        let mounts = read("/proc/self/mountinfo")?;
        let own = read("/proc/self/cgroup")?;
        let group = own.lines().find_map(|line| line.strip_prefix("0::")).ok_or(LimitRefusal::NotMounted)?;
        Hierarchy::of(&mounts, group)
    }

    /// `mounts` is a mountinfo, `group` the group's path as the kernel names it.
    fn of(mounts: &str, group: &str) -> Result<Hierarchy, LimitRefusal> {
        let mut mounted = false;
        for line in mounts.lines() {
            // Number, parent, device, root, mount point, options …, `-`, type, source, options (proc_pid_mountinfo(5)).
            let Some((front, back)) = line.split_once(" - ") else { continue };
            if back.split(' ').next() != Some("cgroup2") {
                continue;
            }
            mounted = true;
            let fields: Vec<&str> = front.split(' ').collect();
            let (Some(root), Some(mount)) = (fields.get(3), fields.get(4)) else { continue };
            let Ok(below) = Path::new(group).strip_prefix(unescaped(root)) else { continue };
            if below.components().any(|part| !matches!(part, std::path::Component::Normal(_))) {
                continue;
            }
            let mount = unescaped(mount);
            let mut own = if below.as_os_str().is_empty() { mount.clone() } else { mount.join(below) };
            if own.ends_with(INIT) && own != mount {
                own.pop();
            }
            return Ok(Hierarchy { mount, own });
        }
        match mounted {
            true => Err(LimitRefusal::Outside { group: group.to_owned() }),
            false => Err(LimitRefusal::NotMounted),
        }
    }

    fn parent(&self, asked: Option<&str>) -> Result<PathBuf, LimitRefusal> {
        let Some(asked) = asked else { return Ok(self.own.clone()) };
        let mut path = if asked.starts_with('/') { self.mount.clone() } else { self.own.clone() };
        for part in asked.split('/').filter(|part| !part.is_empty()) {
            if [".", ".."].contains(&part) || part.contains('\0') {
                return Err(LimitRefusal::BadParent { parent: asked.to_owned() });
            }
            path.push(part);
        }
        Ok(path)
    }

    /// Lets a controller act below `parent`, in every group from the root on.
    fn give(&self, controller: &str, parent: &Path) -> Result<(), LimitRefusal> {
        let below = parent.strip_prefix(&self.mount).unwrap_or(Path::new(""));
        let mut chain = vec![self.mount.clone()];
        for part in below.components() {
            chain.push(chain[chain.len() - 1].join(part));
        }
        for group in chain {
            let control = group.join("cgroup.subtree_control");
            let gives = words(&control).map_err(|error| self.cause(error, &group))?;
            if gives.iter().any(|name| name == controller) {
                continue;
            }
            let has = words(&group.join("cgroup.controllers")).map_err(LimitRefusal::Refused)?;
            if !has.iter().any(|name| name == controller) {
                let controller = controller.to_owned();
                return Err(LimitRefusal::NotDelegated { controller, group, has: has.join(" ") });
            }
            let enable = || write(&control, &format!("+{controller}"));
            let result = match enable() {
                Err(error) if error.is(Errno::BUSY) && group == self.own => {
                    empty(&group)?;
                    enable()
                }
                result => result,
            };
            result.map_err(|error| self.cause(error, &group))?;
        }
        Ok(())
    }

    /// What an error of a call about `group` means.
    fn cause(&self, error: CallError, group: &Path) -> LimitRefusal {
        match () {
            () if error.is(Errno::ROFS) => LimitRefusal::ReadOnly { mount: self.mount.clone() },
            () if error.is(Errno::ACCESS) || error.is(Errno::PERM) => LimitRefusal::Denied { group: group.to_owned() },
            () if error.is(Errno::BUSY) => {
                let process = words(&group.join("cgroup.procs")).unwrap_or_default();
                let process = process.first().and_then(|number| number.parse().ok()).unwrap_or_default();
                LimitRefusal::Busy { group: group.to_owned(), process }
            }
            () => LimitRefusal::Refused(error),
        }
    }
}

/// Moves everything that is in a group into one below it.
fn empty(group: &Path) -> Result<(), LimitRefusal> {
    let leaf = group.join(INIT);
    match std::fs::create_dir(&leaf).call(|| format!("mkdir({leaf:?})")) {
        Err(error) if !error.is(Errno::EXIST) => return Err(LimitRefusal::Refused(error)),
        _ => {}
    }
    // Processes may start others meanwhile.
    for _ in 0..100 {
        let processes = words(&group.join("cgroup.procs")).map_err(LimitRefusal::Refused)?;
        if processes.is_empty() {
            break;
        }
        for process in processes {
            match write(&leaf.join("cgroup.procs"), &process) {
                Err(error) if !error.is(Errno::SRCH) => {
                    let process = process.parse().unwrap_or_default();
                    return Err(LimitRefusal::Busy { group: group.to_owned(), process });
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// Undoes the octal escapes of mountinfo.
fn unescaped(path: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let (mut bytes, mut rest) = (Vec::new(), path.as_bytes());
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.filter(|_| byte == b'\\').and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(value) => {
                bytes.push(value);
                rest = &after[3..];
            }
            None => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

/// The group of one step.
pub(super) struct Group {
    path: PathBuf,
}

impl StepGroup {
    /// Makes the group of the step that this process supervises.
    pub(super) fn make(&self) -> Result<Group, Failure> {
        let id = std::process::id();
        // Other containers have the same numbers, and a supervisor that was killed leaves its group behind.
        let names = std::iter::once(format!("nacre-{id}")).chain((1_u32..).map(|at| format!("nacre-{id}-{at}")));
        let mut made = None;
        for path in names.map(|name| self.parent.join(name)) {
            match std::fs::create_dir(&path).call(|| format!("mkdir({path:?})")) {
                Err(error) if error.is(Errno::EXIST) => {}
                result => {
                    made = Some(result.map(|()| Group { path }));
                    break;
                }
            }
        }
        let group = made.unwrap_or_else(|| Err(CallError::new("mkdir()", Errno::EXIST)));
        let group = group.map_err(|error| Failure::setup("make a control group", error))?;
        for setting in &self.settings {
            match write(&group.path.join(&setting.file), &setting.value) {
                Err(error) if setting.optional && error.is(Errno::NOENT) => {}
                result => result.map_err(|error| Failure::setup(format!("set {}", setting.flag), error))?,
            }
        }
        Ok(group)
    }
}

impl Group {
    /// Puts the calling process into the group.
    pub(super) fn join(&self) -> Result<(), Failure> {
        write(&self.path.join("cgroup.procs"), "0").map_err(|error| Failure::setup("enter its control group", error))
    }

    /// Tells what the limits did.
    pub(super) fn exceeded(&self) -> Exceeded {
        let events = |file: &str| std::fs::read_to_string(self.path.join(file)).unwrap_or_default();
        exceeded(&events("memory.events"), &events("pids.events"))
    }
}

fn exceeded(memory: &str, processes: &str) -> Exceeded {
    let count = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
    };
    Exceeded {
        killed: count(memory, "oom_kill"),
        own_memory: count(memory, "oom") > 0,
        refused_processes: count(processes, "max"),
    }
}

impl Drop for Group {
    /// Kills what is left in the group and removes it.
    fn drop(&mut self) {
        /// A process that was killed leaves its group when it is gone, which takes a moment.
        const PATIENCE: Duration = Duration::from_secs(5);
        // Since 5.14; without it, the pid namespace has done the same.
        _ = write(&self.path.join("cgroup.kill"), "1");
        let start = Instant::now();
        loop {
            match remove(&self.path) {
                Err(error) if error.is(Errno::BUSY) && start.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                // What is left holds nothing and limits nobody.
                _ => return,
            }
        }
    }
}

/// Removes a group and those below it, which a step with all rights may have made.
fn remove(path: &Path) -> sys::Result<()> {
    let entries = std::fs::read_dir(path).call(|| format!("open({path:?})"))?;
    for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove(&entry.path())?;
    }
    std::fs::remove_dir(path).call(|| format!("rmdir({path:?})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_become_weights() {
        for (shares, expected) in
            [(0, 1), (2, 1), (512, 59), (1024, 100), (2048, 174), (262_144, 10_000), (u64::MAX, 10_000)]
        {
            assert_eq!(weight(shares), expected, "{shares}");
        }
    }

    #[test]
    fn flags_become_files() {
        let check = |limits: Limits, expected: &[(&str, &str)]| {
            let settings = limits.settings();
            let found: Vec<_> =
                settings.iter().map(|setting| (setting.file.as_str(), setting.value.as_str())).collect();
            assert_eq!(found, expected, "{limits:?}");
        };
        let memory = |swap| Limits { memory_bytes: Some(64), swap, ..Limits::default() };
        check(Limits::default(), &[]);
        check(memory(Swap::AsMemory), &[("memory.max", "64"), ("memory.swap.max", "64")]);
        check(memory(Swap::Bytes(0)), &[("memory.max", "64"), ("memory.swap.max", "0")]);
        check(memory(Swap::Unlimited), &[("memory.max", "64"), ("memory.swap.max", "max")]);
        let cpu = |cpu_period_us, cpu_quota_us| Limits { cpu_period_us, cpu_quota_us, ..Limits::default() };
        check(cpu(None, Some(50_000)), &[("cpu.max", "50000 100000")]);
        check(cpu(Some(20_000), Some(50_000)), &[("cpu.max", "50000 20000")]);
        check(cpu(Some(20_000), None), &[("cpu.max", "max 20000")]);
        let rest = Limits {
            cpu_shares: Some(1024),
            cpuset_cpus: Some("0-1".into()),
            cpuset_mems: Some("0".into()),
            processes: Some(7),
            ..Limits::default()
        };
        check(rest, &[("cpu.weight", "100"), ("cpuset.cpus", "0-1"), ("cpuset.mems", "0"), ("pids.max", "7")]);
    }

    #[test]
    fn finds_its_group() {
        let line =
            |root: &str, mount: &str, kind: &str| format!("1 2 0:3 {root} {mount} rw,nosuid shared:1 - {kind} x rw\n");
        let whole = line("/", "/sys/fs/cgroup", "cgroup2");
        let part = line("/a/b", "/mnt/c\\040g", "cgroup2");
        let own = |mounts: &str, group: &str| Hierarchy::of(mounts, group).map(|found| found.own.display().to_string());
        for (mounts, group, expected) in [
            (&whole, "/", "/sys/fs/cgroup"),
            (&whole, "/a/b.scope", "/sys/fs/cgroup/a/b.scope"),
            (&whole, "/a/nacre-init", "/sys/fs/cgroup/a"),
            (&whole, "/nacre-init", "/sys/fs/cgroup"),
            (&part, "/a/b", "/mnt/c g"),
            (&part, "/a/b/c", "/mnt/c g/c"),
        ] {
            assert_eq!(own(mounts, group).expect(group), expected);
        }
        assert!(matches!(own(&part, "/a"), Err(LimitRefusal::Outside { .. })));
        assert!(matches!(own(&whole, "/../x"), Err(LimitRefusal::Outside { .. })));
        assert!(matches!(own(&line("/", "/sys/fs/cgroup", "cgroup"), "/"), Err(LimitRefusal::NotMounted)));
        let found = Hierarchy::of(&whole, "/job").expect("a hierarchy");
        for (asked, expected) in [
            (None, "/sys/fs/cgroup/job"),
            (Some("/"), "/sys/fs/cgroup"),
            (Some("/x/y"), "/sys/fs/cgroup/x/y"),
            (Some("x//y/"), "/sys/fs/cgroup/job/x/y"),
        ] {
            assert_eq!(found.parent(asked).expect("a path"), Path::new(expected));
        }
        assert!(matches!(found.parent(Some("/a/../b")), Err(LimitRefusal::BadParent { .. })));
    }

    #[test]
    fn reads_events() {
        let memory = "low 0\nhigh 0\nmax 12\noom 2\noom_kill 1\noom_group_kill 0\n";
        assert_eq!(exceeded(memory, "max 3\n"), Exceeded { killed: 1, own_memory: true, refused_processes: 3 });
        assert_eq!(
            exceeded("oom 0\noom_kill 1\n", ""),
            Exceeded { killed: 1, own_memory: false, refused_processes: 0 }
        );
        assert_eq!(exceeded("", ""), Exceeded::default());
    }
}
