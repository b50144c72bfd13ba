//! Steps without namespaces: `--isolation=chroot`.
//!
//! For root of a container that may make neither namespaces nor mounts, but chroot(2). The root file system is a copy;
//! what otherwise is mounted on it is put in the place of what is there, and taken out again when the step has ended:
//!
//! ```text
//! root/dev                       a directory with device nodes, and shm
//! root/etc/hosts, resolv.conf    files, as the text of a heredoc
//! root/proc, root/sys            empty directories: they cannot be had without a mount
//! aside/                         what was in these places
//! ```
//!
//! The step has the capabilities of others but CAP_SYS_CHROOT, with which it could leave its root; lacking one that
//! the builder has, it may not trace the builder either. It shares processes, network, ipc and host name with the
//! container: it may signal the processes of its user, which is root, and listen where they would.

use super::points::{self, Kind, Root, Traces};
use super::{Doing, Failure, RunSpec, SetupMount, SpecProblem};
use crate::materialize::{self, MaterializeError};
use crate::sys::{self, Call};
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Character devices of /dev: name, major and minor number.
const DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// What was put into a root file system, to be taken out again.
pub(super) struct Furniture<'a> {
    root: OwnedFd,
    /// An empty directory on the same file system.
    aside: &'a Path,
    traces: Traces,
    placed: Vec<Placed>,
}

/// Something in the place of something else.
struct Placed {
    /// Directory that it is in, without links.
    parent: OwnedFd,
    name: OsString,
    /// What was there is aside under this name.
    was: Option<String>,
    /// Modification time of the directory, before and after.
    before: Timespec,
    after: Timespec,
}

impl<'a> Furniture<'a> {
    /// Puts everything in its place.
    pub(super) fn place(spec: &'a RunSpec, root: OwnedFd) -> Result<Furniture<'a>, Failure> {
        let copy = root.try_clone().call(|| "dup(root)".into()).doing(|| "use the root file system".into())?;
        let mut furniture =
            Furniture { root: copy, aside: &spec.scratch_dir, traces: Traces::default(), placed: Vec::new() };
        match furniture.place_all(spec, root) {
            Ok(()) => Ok(furniture),
            Err(failure) => {
                furniture.take_out();
                Err(failure)
            }
        }
    }

    fn place_all(&mut self, spec: &RunSpec, root: OwnedFd) -> Result<(), Failure> {
        let mut points = Root::new(root).doing(|| "use the root file system".into())?;
        for target in ["/proc", "/sys", "/dev"] {
            let doing = || format!("make {target}");
            let entry = sys::open_entry(&self.root, OsStr::new(&target[1..]));
            if let Ok(entry) = entry
                && !FileType::from_raw_mode(sys::stat_fd(&entry).doing(doing)?.st_mode).is_dir()
            {
                return Err(Failure::spec(SpecProblem::NotDirectory(target.into())));
            }
            let made = points.point(target, Kind::SystemDirectory);
            // Whatever has been made is undone.
            self.traces = points.traces.clone();
            made.doing(doing)?;
        }
        self.place_dev()?;
        let texts = [("/etc/resolv.conf", &spec.resolv_conf), ("/etc/hosts", &spec.hosts)];
        for (target, text) in texts {
            self.place_file(&mut points, target, text.as_bytes(), 0o644, (0, 0))?;
        }
        for mount in &spec.mounts {
            // The others were refused when the spec was checked.
            if let SetupMount::Inline { content, target, mode, uid, gid } = mount {
                self.place_file(&mut points, target, content, *mode, (*uid, *gid))?;
            }
        }
        Ok(())
    }

    fn place_dev(&mut self) -> Result<(), Failure> {
        let doing = || "prepare /dev".to_owned();
        self.replace(OsStr::new("."), OsStr::new("dev"), |parent, name| {
            rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)).call(|| "mkdir(\"/dev\")".into())
        })
        .doing(doing)?;
        let dev = sys::open_in_root(&self.root, OsStr::new("dev"), OFlags::PATH | OFlags::NOFOLLOW, Mode::empty());
        let dev = dev.doing(doing)?;
        for (name, major, minor) in DEVICES {
            let describe = || format!("mknod(\"/dev/{name}\", c {major} {minor})");
            let device = rustix::fs::makedev(major, minor);
            rustix::fs::mknodat(&dev, name, FileType::CharacterDevice, Mode::from_raw_mode(0o666), device)
                .call(describe)
                .and_then(|()| {
                    // Whatever the mask of the caller is.
                    let path = format!("/proc/self/fd/{}/{name}", dev.as_raw_fd());
                    rustix::fs::chmod(path.as_str(), Mode::from_raw_mode(0o666))
                        .call(|| format!("chmod(\"/dev/{name}\")"))
                })
                .doing(doing)?;
        }
        // A file system can be mounted without devices.
        rustix::fs::openat(&dev, "null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .call(|| "open(\"/dev/null\")".into())
            .doing(|| {
                "use devices in the store; --store on a file system that is not mounted with nodev helps".into()
            })?;
        for (name, target) in super::step::DEVICE_LINKS {
            if name != "ptmx" {
                rustix::fs::symlinkat(target, &dev, name).call(|| format!("symlink(\"/dev/{name}\")")).doing(doing)?;
            }
        }
        rustix::fs::mkdirat(&dev, "shm", Mode::from_raw_mode(0o1777))
            .call(|| "mkdir(\"/dev/shm\")".into())
            .doing(doing)?;
        let shm = format!("/proc/self/fd/{}/shm", dev.as_raw_fd());
        rustix::fs::chmod(shm.as_str(), Mode::from_raw_mode(0o1777)).call(|| "chmod(\"/dev/shm\")".into()).doing(doing)
    }

    fn place_file(
        &mut self,
        points: &mut Root,
        target: &str,
        content: &[u8],
        mode: u32,
        (uid, gid): (u32, u32),
    ) -> Result<(), Failure> {
        let doing = || format!("write {target}");
        let made = points.point(target, Kind::File);
        self.traces = points.traces.clone();
        made.doing(doing)?;
        let path = Path::new(target);
        let directory = path.parent().unwrap_or(Path::new("/")).as_os_str();
        let name = path.file_name().unwrap_or_default();
        self.replace(directory, name, |parent, name| {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let describe = || format!("create({target:?})");
            let file = rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o600)).call(describe)?;
            let mut file = std::fs::File::from(file);
            std::io::Write::write_all(&mut file, content).call(describe)?;
            let owner = (Some(rustix::fs::Uid::from_raw(uid)), Some(rustix::fs::Gid::from_raw(gid)));
            rustix::fs::fchown(&file, owner.0, owner.1).call(describe)?;
            rustix::fs::fchmod(&file, Mode::from_raw_mode(mode)).call(describe)
        })
        .doing(doing)
    }

    /// Puts what is at a place aside and makes something else there.
    fn replace(
        &mut self,
        directory: &OsStr,
        name: &OsStr,
        make: impl FnOnce(&OwnedFd, &OsStr) -> sys::Result<()>,
    ) -> sys::Result<()> {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let parent = sys::open_in_root(&self.root, directory, flags, Mode::empty())?;
        let before = modified(&parent)?;
        let aside = format!("aside{}", self.placed.len());
        let moved = rustix::fs::renameat(&parent, name, rustix::fs::CWD, self.aside.join(&aside));
        let was = match moved {
            Ok(()) => Some(aside),
            Err(Errno::NOENT) => None,
            Err(error) => return Err(error).call(|| format!("rename({name:?})")),
        };
        let made = make(&parent, name);
        let after = modified(&parent)?;
        self.placed.push(Placed { parent, name: name.to_owned(), was, before, after });
        made
    }

    /// Takes everything out. Returns the mount points that are left, as [`points::remove_unused`] does. Nothing of the
    /// step may be alive.
    pub(super) fn take_out(mut self) -> Vec<String> {
        while let Some(Placed { parent, name, was, before, after }) = self.placed.pop() {
            let current = modified(&parent);
            // What the step wrote there is not part of its layer, as with a mount. Best effort: what stays is a change.
            _ = self.remove(&parent, &name);
            if let Some(was) = was {
                _ = rustix::fs::renameat(rustix::fs::CWD, self.aside.join(was), &parent, name.as_os_str());
            }
            if let Ok(current) = current {
                let time = if same(current, after) { before } else { current };
                _ = set_modified(&parent, time);
            }
        }
        points::remove_unused(&self.root, &self.traces)
    }

    /// Removes a file, or a directory with what is in it, however deep: at a path that no other process changes.
    fn remove(&self, parent: &OwnedFd, name: &OsStr) -> Result<(), MaterializeError> {
        match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
            Err(Errno::ISDIR | Errno::PERM) => {}
            _ => return Ok(()),
        }
        // A name of its own: what cannot be removed must not stand in the way of the next.
        static REMOVED: AtomicUsize = AtomicUsize::new(0);
        let gone = self.aside.join(format!("gone{}", REMOVED.fetch_add(1, Ordering::Relaxed)));
        match rustix::fs::renameat(parent, name, rustix::fs::CWD, &gone) {
            Ok(()) => materialize::remove_tree(&gone),
            Err(source) => Err(MaterializeError::Call { call: "rename", path: gone, source: source.into() }),
        }
    }
}

fn modified(dir: &OwnedFd) -> sys::Result<Timespec> {
    let stat = sys::stat_fd(dir)?;
    Ok(Timespec { tv_sec: stat.st_mtime as i64, tv_nsec: stat.st_mtime_nsec as _ })
}

fn same(one: Timespec, other: Timespec) -> bool {
    (one.tv_sec, one.tv_nsec) == (other.tv_sec, other.tv_nsec)
}

fn set_modified(dir: &OwnedFd, time: Timespec) -> sys::Result<()> {
    let times = Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }, last_modification: time };
    rustix::fs::utimensat(dir, ".", &times, AtFlags::empty()).call(|| "utimensat()".into())
}
