//! The step's first process, from fork to exec.
//!
//! Order matters: mounts first, with everything the builder may do; then limits and identity; the filter while
//! CAP_SYS_ADMIN is still there, so that the step keeps the right to gain privileges by set-uid programs as it has
//! under the container runtimes; capabilities last. Before the working directory is entered, every descriptor is
//! closed, so that no path can lead through one to the host.

use super::cgroup::Group;
use super::init::{self, Progress};
use super::points::{Kind, Root, Traces};
use super::seccomp::{self, Profile};
use super::{Doing, Failure, FailureKind, Isolation, Net, RunSpec, SetupMount, SpecProblem, emulation};
use crate::sys::{self, Call, CallError, KeptFd, Param};
use rustix::event::{PollFd, PollFlags};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{Resource, Rlimit, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets};
use std::ffi::{CString, OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

const RDONLY: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_RDONLY;
const NODEV: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NODEV;
const NOSUID: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID;
const NOEXEC: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOEXEC;

/// Capabilities of a container: CapBnd 00000000a80425fb.
pub(super) const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::AUDIT_WRITE)
    .union(CapabilitySet::SETFCAP);

/// Devices that every container has.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
pub(super) const DEVICE_LINKS: [(&str, &str); 6] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("core", "/proc/kcore"),
    ("ptmx", "pts/ptmx"),
];

/// What of /proc and /sys tells about the machine or changes it; the same paths as in the container runtimes.
const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
];
/// To read `hot_add` of zram-control, which root can, makes a device.
const MASKED_TOO: [&str; 3] = ["/sys/devices/virtual/powercap", "/proc/dynamic_debug", "/sys/class/zram-control"];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Looked up in when the environment has no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

const NOT_FOUND: i32 = 127;
const NOT_EXECUTABLE: i32 = 126;

/// Number of the pipe to the supervisor once all other descriptors are gone.
const REPORT: i32 = 3;

/// Looks for mistakes that can be seen in the spec itself.
pub(super) fn check(spec: &RunSpec) -> Result<(), Failure> {
    if spec.args.first().is_none_or(|program| program.is_empty()) {
        return Err(Failure::spec(SpecProblem::NoCommand));
    }
    if spec.isolation == Isolation::Chroot {
        let needs = |what: String| Err(Failure::spec(SpecProblem::NeedsNamespaces(what)));
        if spec.network != Net::Host {
            return needs("a network of the step's own".to_owned());
        }
        for mount in &spec.mounts {
            match mount {
                SetupMount::Inline { .. } => {}
                SetupMount::Bind { target, .. }
                | SetupMount::OverlayBind { target, .. }
                | SetupMount::Tmpfs { target, .. }
                | SetupMount::Secret { target, .. }
                | SetupMount::Socket { target, .. } => return needs(format!("the mount of {target:?}")),
            }
        }
    }
    spec.ulimits.iter().try_for_each(|(name, ..)| match resource(name) {
        Some(_) => Ok(()),
        None => Err(Failure::spec(SpecProblem::UnknownLimit(name.clone()))),
    })
}

/// Becomes the command. Runs in the child of the supervisor, as process 1 of a new pid namespace (unless
/// `shared_proc`).
pub(super) fn main(spec: &RunSpec, rootfs: &OwnedFd, group: Option<&Group>, report: OwnedFd, shared_proc: bool) -> ! {
    // Takes the place of the order, which is of no use here and holds secrets.
    let Ok(report) = sys::move_fd(report, REPORT, true) else { sys::exit_now(NOT_EXECUTABLE) };
    let mut traces = Traces::default();
    let prepared = die_with_supervisor(report)
        // Before the step has a namespace of groups, whose root this one becomes.
        .and_then(|()| group.map_or(Ok(()), Group::join))
        .and_then(|()| match spec.isolation {
            Isolation::Namespaces => set_up(spec, rootfs, shared_proc, &mut traces),
            Isolation::Chroot => change_root(rootfs).doing(|| "enter the root file system".into()),
        })
        .and_then(|()| prepare_process(spec, report));
    let ready = prepared.is_ok();
    // Stays open until the command starts: the supervisor takes a copy.
    let (listener, later, failure) = match prepared {
        Ok((listener, later)) => (listener, later, None),
        Err(failure) => (None, None, Some(failure)),
    };
    let number = listener.as_ref().map(AsRawFd::as_raw_fd);
    // Said before the lookup: from here on, failures are the command's and go to its standard error.
    let said = init::report(report, &Progress { traces, failure, listener: number });
    if !ready || said.is_err() {
        sys::exit_now(NOT_EXECUTABLE);
    }
    if listener.is_some() {
        // A call that is always asked about and makes nothing: it returns when the supervisor has the listener, which
        // closes with execve.
        _ = rustix::fs::mknodat(CWD, "", rustix::fs::FileType::CharacterDevice, Mode::empty(), 0);
        // Asked about as well.
        if let Some(allowed) = later
            && let Err(error) = reduce_capabilities(spec, allowed)
        {
            _ = rustix::io::write(std::io::stderr(), format!("nacre: drop capabilities: {error}\n").as_bytes());
            sys::exit_now(NOT_EXECUTABLE);
        }
    }
    let (code, message) = execute(spec);
    // Nobody to tell if standard error is gone.
    _ = rustix::io::write(std::io::stderr(), format!("nacre: {message}\n").as_bytes());
    sys::exit_now(code)
}

/// Asks the kernel to kill this process when the supervisor dies, and checks that it has not died before.
fn die_with_supervisor(report: impl AsFd) -> Result<(), Failure> {
    let doing = || "be tied to its supervisor".to_owned();
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .call(|| "prctl(PR_SET_PDEATHSIG)".into())
        .doing(doing)?;
    // Only the supervisor has the other end of the pipe.
    let mut polled = [PollFd::new(&report, PollFlags::empty())];
    let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut polled, Some(&zero)).call(|| "poll(report)".into()).doing(doing)?;
    if polled[0].revents().intersects(PollFlags::ERR | PollFlags::HUP) {
        sys::exit_now(NOT_EXECUTABLE);
    }
    Ok(())
}

// Mounts

fn set_up(spec: &RunSpec, rootfs: &OwnedFd, shared_proc: bool, traces: &mut Traces) -> Result<(), Failure> {
    enter_namespaces(spec)?;
    // Before anything else: if /proc is refused, the supervisor starts over without a pid namespace.
    let proc = match shared_proc {
        true => bound("/proc", NOSUID | NODEV | NOEXEC).doing(|| "mount /proc".into())?,
        false => sys::make_mount("proc", &[], NOSUID | NODEV | NOEXEC).map_err(|error| {
            let masked = error.is(Errno::PERM);
            let kind = if masked { FailureKind::MaskedProc } else { FailureKind::Setup("mount /proc".into()) };
            Failure::new(kind, error)
        })?,
    };
    _ = rustix::process::umask(Mode::empty());
    separate_mounts().doing(|| "separate the mounts".into())?;

    let workshop = Workshop::new(spec)?;
    let mut root = workshop.attach_root(rootfs)?;
    let mounted = mount_all(spec, &mut root, &workshop, proc);
    *traces = std::mem::take(&mut root.traces);
    mounted?;
    enter_root(root.fd()).doing(|| "enter the root file system".into())?;
    if !spec.insecure {
        mask().doing(|| "hide parts of /proc and /sys".into())?;
    }
    Ok(())
}

/// Keeps mounts of this namespace from appearing in others.
pub(super) fn separate_mounts() -> sys::Result<()> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).call(|| "mount(\"/\", private)".into())
}

fn enter_namespaces(spec: &RunSpec) -> Result<(), Failure> {
    let doing = || "make namespaces".to_owned();
    if let Net::Join(path) = &spec.network {
        let join = || format!("setns({path:?}, net)");
        let namespace = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .call(|| format!("open({path:?})"))
            .doing(|| "join the network of `pasta`, which has ended,".to_owned())?;
        let kind = Some(rustix::thread::LinkNameSpaceType::Network);
        rustix::thread::move_into_link_name_space(namespace.as_fd(), kind).call(join).doing(doing)?;
    }
    let mut namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    if spec.network == Net::None {
        namespaces |= libc::CLONE_NEWNET;
    }
    // Cgroup namespaces may be missing; all they do is to hide where in the tree the step is.
    sys::unshare(namespaces | libc::CLONE_NEWCGROUP).or_else(|_| sys::unshare(namespaces)).doing(doing)?;
    rustix::system::sethostname(spec.hostname.as_bytes())
        .call(|| format!("sethostname({:?})", spec.hostname))
        .doing(|| "set the host name".into())?;
    if spec.network == Net::None {
        sys::bring_loopback_up().doing(|| "bring the loopback interface up".into())?;
    }
    Ok(())
}

/// A tmpfs on the scratch directory, seen by this process only: places to attach mounts to while they are taken apart
/// or filled, and the files that must not touch a disk.
struct Workshop<'a> {
    spec: &'a RunSpec,
    dir: OwnedFd,
    path: &'a Path,
    next: std::cell::Cell<u32>,
}

impl<'a> Workshop<'a> {
    fn new(spec: &'a RunSpec) -> Result<Workshop<'a>, Failure> {
        let doing = || format!("mount a tmpfs on {:?}", spec.scratch_dir);
        let params = [Param::Text("mode", OsStr::new("0700")), Param::OptionalFlag("noswap")];
        let dir = sys::make_mount("tmpfs", &params, NOSUID | NODEV).doing(doing)?;
        let place = sys::open_place(&spec.scratch_dir).doing(doing)?;
        sys::attach_mount(&dir, &place, "scratch").doing(doing)?;
        Ok(Workshop { spec, dir, path: &spec.scratch_dir, next: std::cell::Cell::new(0) })
    }

    fn attach_root(&self, rootfs: &OwnedFd) -> Result<Root, Failure> {
        let doing = || "place the root file system".to_owned();
        let (_, place) = self.directory().doing(doing)?;
        sys::attach_mount(rootfs, &place, "root").doing(doing)?;
        let root = rustix::io::fcntl_dupfd_cloexec(rootfs, 0).call(|| "dup(rootfs)".into()).doing(doing)?;
        Root::new(root).doing(doing)
    }

    fn name(&self) -> String {
        self.next.set(self.next.get() + 1);
        format!("{}", self.next.get())
    }

    /// Makes a directory; returns its path and itself.
    fn directory(&self) -> sys::Result<(PathBuf, OwnedFd)> {
        let name = self.name();
        rustix::fs::mkdirat(&self.dir, &name, Mode::from_raw_mode(0o755)).call(|| "mkdir(scratch)".into())?;
        let dir = sys::open_entry(&self.dir, OsStr::new(&name)).call(|| "open(scratch)".into())?;
        Ok((self.path.join(name), dir))
    }

    /// Makes a file and returns a mount of it.
    fn file(&self, content: &[u8], mode: u32, owner: (u32, u32), attributes: MountAttrFlags) -> sys::Result<OwnedFd> {
        let name = self.name();
        let describe = || "write(scratch file)".to_owned();
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.dir, &name, flags, Mode::from_raw_mode(0o600)).call(describe)?;
        let mut file = std::fs::File::from(file);
        std::io::Write::write_all(&mut file, content).call(describe)?;
        self.own(&file, mode, owner)?;
        let mount = sys::clone_mount(&self.dir, Path::new(&name))?;
        sys::set_mount_attributes(&mount, attributes)?;
        Ok(mount)
    }

    fn own(&self, file: impl AsFd, mode: u32, (uid, gid): (u32, u32)) -> sys::Result<()> {
        // With a single id, everything belongs to it.
        if !self.spec.has_single_id() && (uid, gid) != (0, 0) {
            let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
            rustix::fs::fchown(&file, owner.0, owner.1).call(|| format!("fchown({uid}, {gid})"))?;
        }
        rustix::fs::fchmod(&file, Mode::from_raw_mode(mode)).call(|| format!("fchmod({mode:#o})"))
    }
}

fn mount_all(spec: &RunSpec, root: &mut Root, workshop: &Workshop<'_>, proc: OwnedFd) -> Result<(), Failure> {
    mount_system(root, "/proc", &proc)?;
    mount_dev(spec, root)?;
    mount_sys(spec, root)?;
    for (target, content) in [("/etc/resolv.conf", &spec.resolv_conf), ("/etc/hosts", &spec.hosts)] {
        let doing = || format!("mount {target}");
        let attributes = RDONLY | NOSUID | NODEV | NOEXEC;
        let file = workshop.file(content.as_bytes(), 0o644, (0, 0), attributes).doing(doing)?;
        let point = root.point(target, Kind::File).doing(doing)?;
        sys::attach_mount(file, point.fd, target).doing(doing)?;
    }
    spec.mounts.iter().try_for_each(|mount| mount_one(mount, root, workshop))
}

/// Mounts on a directory of the system, which must not be a link: the masks rely on its place.
fn mount_system(root: &mut Root, target: &str, mount: &OwnedFd) -> Result<(), Failure> {
    let doing = || format!("mount {target}");
    let name = OsStr::new(&target[1..]);
    if let Ok(entry) = sys::open_entry(root.fd(), name) {
        let mode = sys::stat_fd(entry).doing(doing)?.st_mode;
        if !rustix::fs::FileType::from_raw_mode(mode).is_dir() {
            return Err(Failure::spec(SpecProblem::NotDirectory(target.into())));
        }
    }
    let point = root.point(target, Kind::SystemDirectory).doing(doing)?;
    sys::attach_mount(mount, point.fd, target).doing(doing)
}

fn mount_dev(spec: &RunSpec, root: &mut Root) -> Result<(), Failure> {
    let doing = || "prepare /dev".to_owned();
    let text = |key, value| Param::Text(key, OsStr::new(value));
    // Devices are mounts of their own, so /dev itself need not allow any.
    let dev = sys::make_mount("tmpfs", &[text("mode", "0755"), text("size", "65536k")], NOSUID | NODEV).doing(doing)?;
    mount_system(root, "/dev", &dev)?;

    let attach = |mount: &OwnedFd, name: &str| {
        let point = sys::open_entry(&dev, OsStr::new(name)).call(|| format!("open(\"/dev/{name}\")"))?;
        sys::attach_mount(mount, point, name)
    };
    for name in DEVICES {
        let Ok(device) = sys::clone_mount(CWD, &Path::new("/dev").join(name)) else { continue };
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
        rustix::fs::openat(&dev, name, flags, Mode::from_raw_mode(0o666))
            .call(|| format!("create(\"/dev/{name}\")"))
            .and_then(|_| attach(&device, name))
            .doing(doing)?;
    }
    for (name, target) in DEVICE_LINKS {
        rustix::fs::symlinkat(target, &dev, name).call(|| format!("symlink(\"/dev/{name}\")")).doing(doing)?;
    }
    let directory = |name: &str, mode: u32| {
        rustix::fs::mkdirat(&dev, name, Mode::from_raw_mode(mode)).call(|| format!("mkdir(\"/dev/{name}\")"))
    };
    // Group 5 is `tty` nearly everywhere; it has no number when there is only one.
    let group = if spec.has_single_id() { text("gid", "0") } else { text("gid", "5") };
    let params = [Param::Flag("newinstance"), text("ptmxmode", "0666"), text("mode", "0620"), group];
    directory("pts", 0o755)
        .and_then(|()| sys::make_mount("devpts", &params, NOSUID | NOEXEC))
        .and_then(|pts| attach(&pts, "pts"))
        .doing(|| "mount /dev/pts".into())?;
    let size = spec.shm_size_bytes.to_string();
    let shm_params = [text("source", "shm"), text("mode", "1777"), text("size", &size)];
    directory("shm", 0o1777)
        .and_then(|()| sys::make_mount("tmpfs", &shm_params, NOSUID | NODEV | NOEXEC))
        .and_then(|shm| attach(&shm, "shm"))
        .doing(|| "mount /dev/shm".into())?;
    directory("mqueue", 0o755).doing(doing)?;
    // Kernels can be built without message queues.
    if let Ok(mqueue) = sys::make_mount("mqueue", &[], NOSUID | NODEV | NOEXEC) {
        attach(&mqueue, "mqueue").doing(|| "mount /dev/mqueue".into())?;
    }
    Ok(())
}

fn mount_sys(spec: &RunSpec, root: &mut Root) -> Result<(), Failure> {
    let doing = || "mount /sys".to_owned();
    let read_only = if spec.insecure { MountAttrFlags::empty() } else { RDONLY };
    let attributes = read_only | NOSUID | NODEV | NOEXEC;
    // A sysfs shows the devices of one network namespace and is only given to who owns that.
    let (mount, fresh) = match sys::make_mount("sysfs", &[], attributes) {
        Ok(mount) => (mount, true),
        Err(_) => (bound("/sys", attributes).doing(doing)?, false),
    };
    mount_system(root, "/sys", &mount)?;

    // The tree as seen from the new cgroup namespace; with version 1 there is no single one, so the outer is shown.
    let cgroups = rustix::fs::statfs("/sys/fs/cgroup").is_ok_and(|stat| stat.f_type == CGROUP2_MAGIC);
    let mount = match cgroups {
        true => sys::make_mount("cgroup2", &[], attributes).ok(),
        false => None,
    };
    let mount = mount.or_else(|| if fresh { bound("/sys/fs/cgroup", attributes).ok() } else { None });
    if let Some(mount) = mount
        && let Ok(point) = sys::open_in_root(root.fd(), OsStr::new("sys/fs/cgroup"), OFlags::PATH, Mode::empty())
    {
        sys::attach_mount(mount, point, "/sys/fs/cgroup").doing(doing)?;
    }
    Ok(())
}

const CGROUP2_MAGIC: rustix::fs::FsWord = 0x6367_7270;
const PROC_MAGIC: rustix::fs::FsWord = 0x9fa0;

fn bound(path: &str, attributes: MountAttrFlags) -> sys::Result<OwnedFd> {
    let mount = sys::clone_mount(CWD, Path::new(path))?;
    sys::set_mount_attributes(&mount, attributes)?;
    Ok(mount)
}

fn mount_one(mount: &SetupMount, root: &mut Root, workshop: &Workshop<'_>) -> Result<(), Failure> {
    let nodev = if workshop.spec.insecure { MountAttrFlags::empty() } else { NODEV };
    let writable = |read_only: bool| nodev | if read_only { RDONLY } else { MountAttrFlags::empty() };
    let target = match mount {
        SetupMount::Bind { target, .. }
        | SetupMount::OverlayBind { target, .. }
        | SetupMount::Tmpfs { target, .. }
        | SetupMount::Secret { target, .. }
        | SetupMount::Inline { target, .. }
        | SetupMount::Socket { target, .. } => target.as_str(),
    };
    let doing = || format!("mount {target:?}");
    let made = match mount {
        SetupMount::Bind { source, read_only, .. } => sys::clone_mount(CWD, source)
            .map_err(|error| no_source(error, source.display().to_string(), doing()))
            .and_then(|tree| sys::set_mount_attributes(&tree, writable(*read_only)).doing(doing).map(|()| tree))?,
        SetupMount::OverlayBind { lowers, upper, work, subpath, read_only, .. } => {
            let (empty, _) = workshop.directory().doing(doing)?;
            let dirs = if *read_only { None } else { Some((upper, work)) };
            let stack = init::overlay(lowers, dirs, &empty, writable(*read_only), true)
                .map_err(|error| init::overlay_failure(error, upper))?;
            // Part of a mount can only be taken from one that is in the tree.
            let (_, place) = workshop.directory().doing(doing)?;
            sys::attach_mount(&stack, &place, "scratch").doing(doing)?;
            let part = sys::open_in_root(&stack, OsStr::new(subpath), OFlags::PATH, Mode::empty())
                .map_err(|error| no_source(error, subpath.clone(), doing()))?;
            sys::clone_mount(&part, Path::new("")).doing(doing)?
        }
        SetupMount::Tmpfs { size_bytes, read_only, .. } => {
            // A directory of the image lends its mode to the memory that covers it.
            let existing = root.point(target, Kind::Directory).doing(doing)?;
            let mode = sys::stat_fd(&existing.fd).doing(doing)?.st_mode & 0o7777;
            let mode = if existing.existed { format!("{mode:o}") } else { "1777".into() };
            let size = size_bytes.to_string();
            let mut params = vec![Param::Text("mode", OsStr::new(&mode))];
            if *size_bytes > 0 {
                params.push(Param::Text("size", OsStr::new(&size)));
            }
            sys::make_mount("tmpfs", &params, NOSUID | writable(*read_only)).doing(doing)?
        }
        SetupMount::Secret { content, mode, uid, gid, .. } => {
            workshop.file(content, *mode, (*uid, *gid), RDONLY | NOSUID | NODEV | NOEXEC).doing(doing)?
        }
        SetupMount::Inline { content, mode, uid, gid, .. } => {
            workshop.file(content, *mode, (*uid, *gid), RDONLY | NOSUID | NODEV).doing(doing)?
        }
        SetupMount::Socket { source, mode, uid, gid, .. } => {
            let socket =
                sys::open_place(source).map_err(|error| no_source(error, source.display().to_string(), doing()))?;
            let describe = || format!("chmod({source:?}, {mode:#o})");
            rustix::fs::chmod(source, Mode::from_raw_mode(*mode)).call(describe).doing(doing)?;
            if !workshop.spec.has_single_id() && (*uid, *gid) != (0, 0) {
                let owner = (Some(Uid::from_raw(*uid)), Some(Gid::from_raw(*gid)));
                rustix::fs::chownat(&socket, "", owner.0, owner.1, AtFlags::EMPTY_PATH)
                    .call(|| format!("chown({source:?}, {uid}, {gid})"))
                    .doing(doing)?;
            }
            let tree = sys::clone_mount(CWD, source).doing(doing)?;
            sys::set_mount_attributes(&tree, NOSUID | NODEV | NOEXEC).doing(doing)?;
            tree
        }
    };
    let mode = sys::stat_fd(&made).doing(doing)?.st_mode;
    let kind = if rustix::fs::FileType::from_raw_mode(mode).is_dir() { Kind::Directory } else { Kind::File };
    let point = root.point(target, kind).doing(doing)?;
    if point.is_root {
        return Err(Failure::spec(SpecProblem::TargetIsRoot(target.into())));
    }
    let inside_proc = rustix::fs::fstatfs(&point.fd).is_ok_and(|stat| stat.f_type == PROC_MAGIC);
    if inside_proc && !workshop.spec.insecure {
        return Err(Failure::spec(SpecProblem::TargetInProc(target.into())));
    }
    sys::attach_mount(made, point.fd, target).doing(doing)
}

fn no_source(error: CallError, source: String, doing: String) -> Failure {
    match error.is(Errno::NOENT) {
        true => Failure::spec(SpecProblem::NoSource(source)),
        false => Failure::setup(doing, error),
    }
}

/// Makes `root` the root directory and lets go of the old one.
fn enter_root(root: &OwnedFd) -> sys::Result<()> {
    rustix::process::fchdir(root).call(|| "fchdir(root)".into())?;
    // Both at one place: the old root ends up on top of the new one and is taken off at once.
    rustix::process::pivot_root(".", ".").call(|| "pivot_root(\".\", \".\")".into())?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).call(|| "umount(\".\", detach)".into())?;
    rustix::process::chdir("/").call(|| "chdir(\"/\")".into())
}

/// Makes `root` the root directory of this process alone. No descriptor of a directory outside is left open when the
/// command starts.
fn change_root(root: &OwnedFd) -> sys::Result<()> {
    rustix::process::fchdir(root).call(|| "fchdir(root)".into())?;
    rustix::process::chroot(".").call(|| "chroot(\".\")".into())?;
    rustix::process::chdir("/").call(|| "chdir(\"/\")".into())
}

/// Covers what a step must not see, and makes read-only what it must not write.
fn mask() -> sys::Result<()> {
    for path in READ_ONLY.map(Path::new) {
        let mount = match sys::clone_mount(CWD, path) {
            Err(error) if error.is(Errno::NOENT) => continue,
            mount => mount?,
        };
        sys::set_mount_attributes(&mount, RDONLY | NOSUID | NODEV | NOEXEC)?;
        sys::attach_mount(mount, sys::open_place(path)?, &path.to_string_lossy())?;
    }
    // One empty directory serves all; the first place it is at is where copies are taken from.
    let mut cover: Option<&Path> = None;
    for path in MASKED.into_iter().chain(MASKED_TOO).map(Path::new) {
        let point = match sys::open_place(path) {
            Err(error) if error.is(Errno::NOENT) => continue,
            point => point?,
        };
        let mode = sys::stat_fd(&point)?.st_mode;
        let mount = if !rustix::fs::FileType::from_raw_mode(mode).is_dir() {
            sys::clone_mount(CWD, Path::new("/dev/null"))?
        } else if let Some(first) = cover {
            sys::clone_mount(CWD, first)?
        } else {
            cover = Some(path);
            sys::make_mount("tmpfs", &[Param::Text("mode", OsStr::new("0555"))], RDONLY | NOSUID | NODEV | NOEXEC)?
        };
        sys::attach_mount(mount, point, &path.to_string_lossy())?;
    }
    Ok(())
}

// Process

/// Takes on the command's identity. Returns the descriptor through which calls about owners are to be answered, if they
/// are emulated, and the capabilities to be reduced to when they are answered.
fn prepare_process(spec: &RunSpec, report: KeptFd) -> Result<(Option<OwnedFd>, Option<CapabilitySet>), Failure> {
    sys::close_from(REPORT + 1, false).doing(|| "close descriptors".into())?;
    // Standard input is a pipe that nobody writes into, as in other builders.
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .call(|| "pipe()".into())
        .and_then(|(input, _)| sys::move_fd(input, 0, false))
        .doing(|| "make an empty standard input".into())?;
    sys::reset_signals();
    _ = rustix::process::setsid();
    sys::leave_session_keyring();
    for (name, soft, hard) in &spec.ulimits {
        let Some(resource) = resource(name) else { continue };
        // It limits nothing, and carries the credentials.
        if spec.has_single_id() && resource == Resource::Locks {
            continue;
        }
        let value = |limit: i64| u64::try_from(limit).ok();
        let limit = Rlimit { current: value(*soft), maximum: value(*hard) };
        rustix::process::setrlimit(resource, limit)
            .call(|| format!("setrlimit({name}, {soft}, {hard})"))
            .doing(|| format!("set the limit {name}"))?;
    }
    let entered = enter_cwd(spec)?;
    let switch = !spec.has_single_id();
    if switch {
        own_streams(spec.uid);
    }
    let allowed = capabilities(spec);
    if !spec.insecure {
        drop_bounding_set(allowed).doing(|| "drop capabilities".into())?;
    }
    let emulate = spec.emulation.as_ref().map(|emulation| emulation.scope);
    let filter = seccomp::filter(Profile { insecure: spec.insecure, emulate });
    let doing = || "install the system call filter".to_owned();
    let mut listener = None;
    if emulate.is_some() {
        if !switch {
            let set = sys::notify::set_locks_limit(0, emulation::FIRST);
            set.call(|| format!("setrlimit(locks, {})", emulation::FIRST)).doing(|| {
                "remember the user in a limit, which must be allowed to grow (ulimit -Hx unlimited)".into()
            })?;
        }
        let installed = sys::notify::install_filter_with_listener(&filter);
        listener = Some(installed.map_err(|error| match error.is(Errno::BUSY) {
            true => Failure::setup("emulate owners where the calls of this process are answered by another one", error),
            false => Failure::setup(doing(), error),
        })?);
    } else if !filter.is_empty() {
        install_filter(spec, &filter).doing(doing)?;
    }
    if switch {
        let doing = || "switch to the user".to_owned();
        let groups: Vec<Gid> = spec.groups.iter().map(|group| Gid::from_raw(*group)).collect();
        rustix::thread::set_thread_groups(&groups).call(|| format!("setgroups({:?})", spec.groups)).doing(doing)?;
        let (uid, gid) = (Uid::from_raw(spec.uid), Gid::from_raw(spec.gid));
        rustix::thread::set_thread_res_gid(gid, gid, gid).call(|| format!("setresgid({})", spec.gid)).doing(doing)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid).call(|| format!("setresuid({})", spec.uid)).doing(doing)?;
        reduce_capabilities(spec, allowed).doing(|| "drop capabilities".into())?;
    }
    if !entered {
        rustix::process::chdir(&spec.cwd)
            .call(|| format!("chdir({:?})", spec.cwd))
            .doing(|| "enter the working directory".into())?;
    }
    check_cwd(&spec.cwd)?;
    // A change of user makes the kernel forget the signal.
    die_with_supervisor(report)?;
    _ = rustix::process::umask(Mode::from_raw_mode(spec.umask));
    Ok((listener, (!switch).then_some(allowed)))
}

/// Installs the filter. Without CAP_SYS_ADMIN that takes a promise never to gain privileges again, with which set-uid
/// programs would be plain ones; so where a container's filter acts already, which forbids namespaces, it is left at that.
fn install_filter(spec: &RunSpec, filter: &[sys::FilterInstruction]) -> sys::Result<()> {
    match sys::install_filter(filter) {
        Err(error) if spec.isolation == Isolation::Chroot && error.is(Errno::ACCESS) => {
            if super::idmap::is_filtered() {
                return Ok(());
            }
            rustix::thread::set_no_new_privs(true).call(|| "prctl(PR_SET_NO_NEW_PRIVS)".into())?;
            sys::install_filter(filter)
        }
        result => result,
    }
}

/// Enters the working directory, making it when it does not exist. Returns false when the command's own user may be
/// able to enter it where root is not.
fn enter_cwd(spec: &RunSpec) -> Result<bool, Failure> {
    let cwd = spec.cwd.as_str();
    let doing = || "enter the working directory".to_owned();
    match rustix::process::chdir(cwd) {
        Err(Errno::NOENT) => {}
        Err(Errno::ACCESS | Errno::PERM) => return Ok(false),
        result => return result.call(|| format!("chdir({cwd:?})")).doing(doing).map(|()| true),
    }
    // With one id only, others cannot be given away before they are emulated.
    let owner = (!spec.has_single_id()).then(|| (Uid::from_raw(spec.uid), Gid::from_raw(spec.gid)));
    make_dirs(Path::new(cwd), owner, MAX_LINKS)
        .call(|| format!("mkdir({cwd:?})"))
        .doing(|| "make the working directory".into())?;
    rustix::process::chdir(cwd).call(|| format!("chdir({cwd:?})")).doing(doing).map(|()| true)
}

/// Links that may lead from one missing directory to the next, as path_resolution(7) has it.
const MAX_LINKS: u32 = 40;

/// Makes a directory and those above it that are missing, for the step's user as BuildKit does; where a link leads to
/// nothing, what it names is made. `..` is resolved by the kernel, behind links.
fn make_dirs(path: &Path, owner: Option<(Uid, Gid)>, links: u32) -> std::io::Result<()> {
    let mut at = PathBuf::new();
    for part in path.components() {
        at.push(part);
        if at.metadata().is_ok() {
            continue;
        }
        match rustix::fs::mkdir(&at, Mode::from_raw_mode(0o755)) {
            Ok(()) => {
                if let Some((uid, gid)) = owner {
                    rustix::fs::chown(&at, Some(uid), Some(gid))?;
                }
            }
            Err(Errno::EXIST) if links > 0 && at.is_symlink() => {
                let target = std::fs::read_link(&at)?;
                make_dirs(&at.parent().unwrap_or(Path::new("/")).join(target), owner, links - 1)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Refuses a working directory that is not below the root, which a magic link could lead to.
fn check_cwd(cwd: &str) -> Result<(), Failure> {
    match rustix::process::getcwd(Vec::new()) {
        Ok(path) if path.as_bytes().starts_with(b"/") => Ok(()),
        // It can be removed or unreadable and still be inside.
        Err(Errno::ACCESS) => Ok(()),
        _ => Err(Failure::spec(SpecProblem::CwdOutside(cwd.into()))),
    }
}

/// Makes the output pipes the command's, so that `/dev/stdout` can be opened by it.
fn own_streams(uid: u32) {
    let (stdout, stderr) = (std::io::stdout(), std::io::stderr());
    for stream in [stdout.as_fd(), stderr.as_fd()] {
        let pipe =
            rustix::fs::fstat(stream).is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_fifo());
        if pipe && uid != 0 {
            // Without this, only opening it anew fails.
            _ = rustix::fs::fchown(stream, Some(Uid::from_raw(uid)), None);
        }
    }
}

/// The capabilities of a step. CAP_NET_RAW is one of a container because that has a network of its own: where it holds
/// for the host's, which it does for real root, whoever has it reads all that the host receives.
fn capabilities(spec: &RunSpec) -> CapabilitySet {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};
    // The kernel knows to whom the network belongs. A socket for sending only, it receives nothing.
    let holds = || socket_with(AddressFamily::INET, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::RAW)).is_ok();
    let capabilities = match spec.isolation {
        Isolation::Namespaces => CAPABILITIES,
        // With it, a root directory can be left.
        Isolation::Chroot => CAPABILITIES.difference(CapabilitySet::SYS_CHROOT),
    };
    match spec.network == Net::Host && holds() {
        true => capabilities.difference(CapabilitySet::NET_RAW),
        false => capabilities,
    }
}

fn drop_bounding_set(allowed: CapabilitySet) -> sys::Result<()> {
    for number in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if allowed.contains(capability) {
            continue;
        }
        // A container may have none left to drop, nor the right to.
        if rustix::thread::capability_is_in_bounding_set(capability) == Ok(false) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // Past the last capability of this kernel.
            Err(Errno::INVAL) => return Ok(()),
            Err(error) => return Err(error).call(|| format!("prctl(PR_CAPBSET_DROP, {number})")),
        }
    }
    Ok(())
}

fn reduce_capabilities(spec: &RunSpec, allowed: CapabilitySet) -> sys::Result<()> {
    // Ambient capabilities would survive the change of user. Kernels without them have none to lose.
    _ = rustix::thread::clear_ambient_capability_set();
    let mut sets = rustix::thread::capabilities(None).call(|| "capget()".into())?;
    if !spec.insecure {
        sets.permitted &= allowed;
        sets.effective = sets.permitted;
    }
    sets.inheritable = CapabilitySet::empty();
    let CapabilitySets { effective, permitted, .. } = sets;
    rustix::thread::set_capabilities(None, sets).call(|| format!("capset({effective:?}, {permitted:?})"))
}

fn resource(name: &str) -> Option<Resource> {
    Some(match name {
        "core" => Resource::Core,
        "cpu" => Resource::Cpu,
        "data" => Resource::Data,
        "fsize" => Resource::Fsize,
        "locks" => Resource::Locks,
        "memlock" => Resource::Memlock,
        "msgqueue" => Resource::Msgqueue,
        "nice" => Resource::Nice,
        "nofile" => Resource::Nofile,
        "nproc" => Resource::Nproc,
        "rss" => Resource::Rss,
        "rtprio" => Resource::Rtprio,
        "rttime" => Resource::Rttime,
        "sigpending" => Resource::Sigpending,
        "stack" => Resource::Stack,
        _ => return None,
    })
}

/// Executes the command. Returns only when that is impossible: with an exit code and the reason.
fn execute(spec: &RunSpec) -> (i32, String) {
    let error = match command_line(spec) {
        Ok((program, args, env)) => sys::exec(&program, &args, &env),
        Err(refusal) => return refusal,
    };
    match error.raw_os_error() {
        Some(libc::ENOENT) => (NOT_FOUND, format!("{:?}: it or the interpreter it needs was not found", spec.args[0])),
        _ => (NOT_EXECUTABLE, format!("cannot execute {:?}: {error}", spec.args[0])),
    }
}

type CommandLine = (CString, Vec<CString>, Vec<CString>);

fn command_line(spec: &RunSpec) -> Result<CommandLine, (i32, String)> {
    let mut env: Vec<(&str, OsString)> =
        spec.env.iter().map(|(key, value)| (key.as_str(), OsString::from(value))).collect();
    if !env.iter().any(|(key, value)| *key == "HOME" && !value.is_empty()) {
        env.retain(|(key, _)| *key != "HOME");
        env.push(("HOME", home(spec.uid)));
    }
    let search = env.iter().find(|(key, _)| *key == "PATH").map_or(OsStr::new(DEFAULT_PATH), |(_, value)| value);
    let program = find_program(&spec.args[0], search).map_err(|message| (NOT_FOUND, message))?;
    let invalid = |error: CallError| (NOT_EXECUTABLE, format!("{error}: {}", error.source));
    let args = spec.args.iter().map(sys::c_string).collect::<sys::Result<_>>().map_err(invalid)?;
    let variables = env.iter().map(|(key, value)| {
        let mut variable = OsString::from(key);
        variable.push("=");
        variable.push(value);
        sys::c_string(variable)
    });
    Ok((program, args, variables.collect::<sys::Result<_>>().map_err(invalid)?))
}

/// Looks a command up as a shell does: in the directories of `search` unless it has a slash.
fn find_program(name: &str, search: &OsStr) -> Result<CString, String> {
    let text = |error: CallError| error.to_string();
    if name.contains('/') {
        return sys::c_string(name).map_err(text);
    }
    for dir in search.as_bytes().split(|byte| *byte == b':') {
        let dir = if dir.is_empty() { OsStr::new(".") } else { OsStr::from_bytes(dir) };
        let path = Path::new(dir).join(name);
        let is_file = std::fs::metadata(&path).is_ok_and(|metadata| metadata.is_file());
        if is_file && rustix::fs::accessat(CWD, &path, rustix::fs::Access::EXEC_OK, AtFlags::EACCESS).is_ok() {
            return sys::c_string(path).map_err(text);
        }
    }
    Err(format!("{name:?}: no such program in PATH ({})", search.to_string_lossy()))
}

/// Home directory of `uid` according to /etc/passwd, else the root directory.
fn home(uid: u32) -> OsString {
    const LIMIT: u64 = 16 << 20;
    // The file is the image's: it may be a FIFO, which must not be waited for.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let found = rustix::fs::open("/etc/passwd", flags, Mode::empty()).ok().and_then(|file| {
        use std::io::Read;
        let file = std::fs::File::from(file);
        let mut text = Vec::new();
        let is_file = file.metadata().is_ok_and(|metadata| metadata.is_file());
        is_file.then(|| file.take(LIMIT).read_to_end(&mut text).ok())??;
        home_in(&text, uid)
    });
    found.unwrap_or_else(|| "/".into())
}

fn home_in(passwd: &[u8], uid: u32) -> Option<OsString> {
    passwd.split(|byte| *byte == b'\n').find_map(|line| {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b':').collect();
        let [_, _, number, _, _, home, ..] = fields[..] else { return None };
        let number: u32 = std::str::from_utf8(number).ok()?.parse().ok()?;
        (number == uid && !home.is_empty()).then(|| OsStr::from_bytes(home).to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_those_of_a_container() {
        assert_eq!(CAPABILITIES.bits(), 0xa804_25fb);
    }

    #[test]
    fn finds_home() {
        let passwd = b"root:x:0:0:root:/root:/bin/sh\nbroken\napp:x:1000:1000:App:/home/app\nnone:x:7:7:::/bin/sh\n";
        for (uid, expected) in [(0, Some("/root")), (1000, Some("/home/app")), (7, None), (8, None)] {
            assert_eq!(home_in(passwd, uid), expected.map(OsString::from), "{uid}");
        }
    }

    #[test]
    fn finds_programs() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let write = |name: &str, mode: u32| {
            use std::os::unix::fs::PermissionsExt;
            let path = dir.path().join(name);
            std::fs::write(&path, "").expect("write");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("chmod");
        };
        write("tool", 0o755);
        write("data", 0o644);
        std::fs::create_dir(dir.path().join("dir")).expect("mkdir");
        let search = OsString::from(format!("/nonexistent:{}", dir.path().display()));
        for (name, found) in [("tool", true), ("data", false), ("dir", false), ("none", false), ("./x", true)] {
            assert_eq!(find_program(name, &search).is_ok(), found, "{name}");
        }
    }
}
