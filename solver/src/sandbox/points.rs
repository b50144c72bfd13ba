//! Mount points inside an untrusted root file system.
//!
//! Targets are resolved component by component from the root's descriptor; symbolic links, dangling ones too, lead
//! to where they point inside the root. What is missing is made. After the step, [`remove_unused`] takes away what
//! was made and is still empty, and gives the directories around it their old times, so that a mount leaves no
//! trace in the layer. /proc, /sys and /dev stay, as they do with BuildKit.

use crate::sys::{self, Call};
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, Mode, OFlags, Stat, Timespec, Timestamps, UTIME_OMIT};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

/// As many symbolic links as the kernel follows.
const MAX_LINKS: u32 = 40;

/// A time as seconds and nanoseconds.
type Time = (i64, i64);

/// Something that was made so that there is something to mount on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Created {
    /// Path from the root without leading slash, free of links.
    path: Vec<u8>,
    directory: bool,
    /// Stays although it is empty.
    keep: bool,
    /// Modification time of the directory it is in, before and after.
    parent_before: Time,
    parent_after: Time,
}

/// A directory that existed before something was made below it, so that overlayfs copied it up.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Touched {
    /// Path from the root without leading slash, free of links.
    path: Vec<u8>,
    mode: u32,
    uid: u32,
    gid: u32,
    modified: Time,
}

/// What setting up has changed in the root file system.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Traces {
    created: Vec<Created>,
    touched: Vec<Touched>,
}

/// What a mount point has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A directory.
    Directory,
    /// A directory that may be empty in the image.
    SystemDirectory,
    /// A file.
    File,
}

/// A root file system under construction.
pub(super) struct Root {
    /// Its root directory, mounted.
    fd: OwnedFd,
    /// Device number of the root file system itself, to tell it from what is mounted on it.
    device: u64,
    pub(super) traces: Traces,
}

/// The existing part of a path and the rest.
struct Resolved {
    fd: OwnedFd,
    /// The existing part, free of links.
    path: Vec<OsString>,
    /// Components that do not exist.
    missing: Vec<OsString>,
}

/// A mount point.
pub(super) struct Point {
    /// The file or directory.
    pub(super) fd: OwnedFd,
    /// It existed.
    pub(super) existed: bool,
    /// It is the root directory itself.
    pub(super) is_root: bool,
}

impl Root {
    /// Takes the root directory of a mounted root file system.
    pub(super) fn new(fd: OwnedFd) -> sys::Result<Root> {
        let device = sys::stat_fd(&fd)?.st_dev;
        Ok(Root { fd, device, traces: Traces::default() })
    }

    /// Returns the root directory.
    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Finds the mount point `target`, or makes it.
    pub(super) fn point(&mut self, target: &str, kind: Kind) -> sys::Result<Point> {
        let Resolved { mut fd, mut path, missing } = self.resolve(target)?;
        if missing.is_empty() {
            return Ok(Point { fd, existed: true, is_root: path.is_empty() });
        }
        let on_root = sys::stat_fd(&fd)?.st_dev == self.device;
        if on_root {
            self.touch(&path)?;
        }
        let last = missing.len() - 1;
        for (index, name) in missing.into_iter().enumerate() {
            let before = sys::stat_fd(&fd)?;
            let directory = index != last || kind != Kind::File;
            make(&fd, &name, directory, target)?;
            let after = sys::stat_fd(&fd)?;
            fd = sys::open_entry(&fd, &name).call(|| format!("open({target:?})"))?;
            path.push(name);
            if on_root {
                self.traces.created.push(Created {
                    path: joined(&path),
                    directory,
                    keep: kind == Kind::SystemDirectory,
                    parent_before: modified(&before),
                    parent_after: modified(&after),
                });
            }
        }
        Ok(Point { fd, existed: false, is_root: false })
    }

    /// Remembers the directories on the way to `path`, which are about to be copied up.
    fn touch(&mut self, path: &[OsString]) -> sys::Result<()> {
        for length in 0..=path.len() {
            let path = joined(&path[..length]);
            if self.traces.touched.iter().any(|touched| touched.path == path) {
                continue;
            }
            let stat = sys::stat_fd(open_directory(&self.fd, &path)?)?;
            self.traces.touched.push(Touched {
                path,
                mode: stat.st_mode,
                uid: stat.st_uid,
                gid: stat.st_gid,
                modified: modified(&stat),
            });
        }
        Ok(())
    }

    fn resolve(&self, target: &str) -> sys::Result<Resolved> {
        let describe = || format!("resolve({target:?})");
        let mut fd = open_directory(&self.fd, b"")?;
        let mut path: Vec<OsString> = Vec::new();
        // Components still to be walked, next one last.
        let mut todo = components(target.as_bytes());
        let mut links = 0;
        while let Some(name) = todo.pop() {
            if name == ".." {
                path.pop();
                fd = open_directory(&self.fd, &joined(&path))?;
                continue;
            }
            let entry = match sys::open_entry(&fd, &name) {
                Ok(entry) => entry,
                Err(Errno::NOENT) => {
                    todo.push(name);
                    todo.reverse();
                    // A `..` after something that does not exist means nothing.
                    if todo.iter().any(|name| name == "..") {
                        return Err(sys::CallError::new(describe(), Errno::NOENT));
                    }
                    return Ok(Resolved { fd, path, missing: todo });
                }
                Err(error) => return Err(error).call(describe),
            };
            let mode = sys::stat_fd(&entry)?.st_mode;
            if rustix::fs::FileType::from_raw_mode(mode).is_symlink() {
                links += 1;
                if links > MAX_LINKS {
                    return Err(sys::CallError::new(describe(), Errno::LOOP));
                }
                let link = rustix::fs::readlinkat(&entry, "", Vec::new()).call(describe)?.into_bytes();
                if link.starts_with(b"/") {
                    path.clear();
                    fd = open_directory(&self.fd, b"")?;
                }
                todo.extend(components(&link));
                continue;
            }
            path.push(name);
            fd = entry;
        }
        // Opened again by its path: a component may have been covered by a mount, and an O_PATH descriptor opened
        // by name already is what is mounted there, so this is the same place.
        Ok(Resolved { fd, path, missing: Vec::new() })
    }
}

/// Path components in reverse order, without empty ones and `.`.
fn components(path: &[u8]) -> Vec<OsString> {
    let names = path.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".");
    names.rev().map(|name| OsString::from_vec(name.to_vec())).collect()
}

fn joined(path: &[OsString]) -> Vec<u8> {
    path.join(OsStr::new("/")).into_vec()
}

fn modified(stat: &Stat) -> Time {
    #[expect(clippy::unnecessary_cast, reason = "other architectures have other widths")]
    (stat.st_mtime as i64, stat.st_mtime_nsec as i64)
}

/// Opens the directory `path` (free of links) below `root`.
fn open_directory(root: &OwnedFd, path: &[u8]) -> sys::Result<OwnedFd> {
    let path = if path.is_empty() { OsStr::new(".") } else { OsStr::from_bytes(path) };
    sys::open_in_root(root, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW, Mode::empty())
}

fn make(dir: &OwnedFd, name: &OsStr, directory: bool, target: &str) -> sys::Result<()> {
    let mode = Mode::from_raw_mode(0o755);
    if directory {
        return rustix::fs::mkdirat(dir, name, mode).call(|| format!("mkdir({name:?}) for {target:?}"));
    }
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, mode).map(drop).call(|| format!("create({name:?}) for {target:?}"))
}

/// Removes mount points that were made and not used, by way of the root file system they are in. Returns those that
/// are left. Nothing of the step may be alive.
pub(super) fn remove_unused(root: &OwnedFd, traces: &Traces) -> Vec<String> {
    let mut left = Vec::new();
    for created in traces.created.iter().rev() {
        let path = Path::new(OsStr::from_bytes(&created.path));
        let gone = !created.keep && remove(root, path, created).is_ok();
        if !gone && exists(root, path) {
            left.push(format!("/{}", path.display()));
        }
    }
    left.reverse();
    left
}

fn exists(root: &OwnedFd, path: &Path) -> bool {
    sys::open_in_root(root, path.as_os_str(), OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()).is_ok()
}

fn remove(root: &OwnedFd, path: &Path, created: &Created) -> sys::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let parent = open_directory(root, parent.as_os_str().as_bytes())?;
    let describe = || format!("unlink({path:?})");
    let stat = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW).call(describe)?;
    if !created.directory && (!rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() || stat.st_size != 0) {
        return Err(sys::CallError::new(describe(), Errno::NOTEMPTY));
    }
    let flags = if created.directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
    // A time that is not what making the mount point left is the step's own, and stays.
    let current = modified(&sys::stat_fd(&parent)?);
    rustix::fs::unlinkat(&parent, name, flags).call(describe)?;
    let time = if current == created.parent_after { created.parent_before } else { current };
    set_modified(&parent, time)
}

fn set_modified(dir: &OwnedFd, (seconds, nanoseconds): Time) -> sys::Result<()> {
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: seconds, tv_nsec: nanoseconds },
    };
    rustix::fs::utimensat(dir, ".", &times, AtFlags::empty()).call(|| "utimensat(parent of a mount point)".into())
}

/// Removes directories from the upper directory that are there only because overlayfs copied them up when a mount
/// point was made in them: empty, and as they were. The overlay must not be mounted any more.
pub(super) fn remove_copied_up(upper: &OwnedFd, traces: &Traces) {
    let mut touched: Vec<&Touched> = traces.touched.iter().filter(|touched| !touched.path.is_empty()).collect();
    touched.sort_by_key(|touched| std::cmp::Reverse(touched.path.len()));
    for touched in touched {
        // Best effort: what stays is a directory entry without a change.
        _ = remove_if_unchanged(upper, touched);
    }
}

fn remove_if_unchanged(upper: &OwnedFd, touched: &Touched) -> sys::Result<()> {
    let path = Path::new(OsStr::from_bytes(&touched.path));
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let stat = sys::stat_fd(open_directory(upper, &touched.path)?)?;
    let same = (stat.st_mode, stat.st_uid, stat.st_gid) == (touched.mode, touched.uid, touched.gid)
        && modified(&stat) == touched.modified;
    if !same || has_own_attributes(upper, &touched.path)? {
        return Ok(());
    }
    let parent = open_directory(upper, parent.as_os_str().as_bytes())?;
    let time = modified(&sys::stat_fd(&parent)?);
    rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR).call(|| format!("rmdir({path:?})"))?;
    set_modified(&parent, time)
}

/// Returns whether a directory has extended attributes besides overlayfs's marks that it was copied up. An opaque
/// directory hides something and so is a change.
fn has_own_attributes(upper: &OwnedFd, path: &[u8]) -> sys::Result<bool> {
    let path = OsStr::from_bytes(path);
    let dir = sys::open_in_root(upper, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?;
    let mut names = vec![0; 4096];
    let length = rustix::fs::flistxattr(&dir, &mut names[..]).call(|| format!("listxattr({path:?})"))?;
    let marks: [&[u8]; 3] = [b"user.overlay.origin", b"user.overlay.impure", b"user.overlay.uuid"];
    let names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    Ok(names.into_iter().any(|name| !marks.contains(&name) && name != b"security.selinux"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// Makes `target` in a directory prepared by `setup`; returns what was made, or the error number.
    fn check(target: &str, kind: Kind, expected: Result<&[&str], Errno>) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let at = |path: &str| dir.path().join(path);
        fs::create_dir_all(at("real/deep")).expect("directory");
        fs::write(at("file"), "x").expect("file");
        for (link, to) in [
            ("absolute", "/real"),
            ("up", "../../../real"),
            ("dangling", "/var/x"),
            ("loop", "loop"),
            ("real/back", "../real"),
            ("escape", "../../../../../../tmp/outside"),
        ] {
            std::os::unix::fs::symlink(to, at(link)).expect("link");
        }
        let fd = sys::open_place(dir.path()).expect("open");
        let mut root = Root::new(fd).expect("root");
        let result = root.point(target, kind);
        let created: Vec<_> =
            root.traces.created.iter().map(|created| String::from_utf8_lossy(&created.path).into_owned()).collect();
        match (result, expected) {
            (Ok(_), Ok(expected)) => assert_eq!(created, expected, "{target}"),
            (Err(error), Err(errno)) => assert!(error.is(errno), "{target}: {error} {:?}", error.source),
            (result, expected) => panic!("{target}: {:?}, expected {expected:?}", result.map(|_| created)),
        }
        for path in &created {
            assert!(at(path).symlink_metadata().is_ok(), "{path}");
        }
        remove_unused(root.fd(), &root.traces);
        for path in &created {
            assert!(at(path).symlink_metadata().is_err(), "{path} stayed");
        }
        assert!(at("real/deep").exists());
    }

    #[test]
    fn finds_or_makes_targets_inside_the_root() {
        check("/real", Kind::Directory, Ok(&[]));
        check("/real/deep/", Kind::Directory, Ok(&[]));
        check("/new", Kind::Directory, Ok(&["new"]));
        check("/a/b/f", Kind::File, Ok(&["a", "a/b", "a/b/f"]));
        check("/absolute/deep/x", Kind::File, Ok(&["real/deep/x"]));
        check("/up/x", Kind::Directory, Ok(&["real/x"]));
        check("/real/back/back/x", Kind::Directory, Ok(&["real/x"]));
        check("/dangling", Kind::Directory, Ok(&["var", "var/x"]));
        check("/dangling/y", Kind::File, Ok(&["var", "var/x", "var/x/y"]));
        check("/escape/f", Kind::File, Ok(&["tmp", "tmp/outside", "tmp/outside/f"]));
        check("/real/../../../z", Kind::File, Ok(&["z"]));
        check("/loop", Kind::File, Err(Errno::LOOP));
        check("/file/x", Kind::File, Err(Errno::NOTDIR));
        check("/none/../x", Kind::File, Err(Errno::NOENT));
    }

    #[test]
    fn keeps_what_was_used_and_restores_times() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let old = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
        fs::create_dir(dir.path().join("etc")).expect("directory");
        for path in [dir.path().join("etc"), dir.path().to_owned()] {
            fs::File::open(path).and_then(|file| file.set_modified(old)).expect("times");
        }
        let mut root = Root::new(sys::open_place(dir.path()).expect("open")).expect("root");
        root.point("/etc/hosts", Kind::File).expect("point");
        root.point("/etc/used", Kind::File).expect("point");
        root.point("/full/dir", Kind::Directory).expect("point");
        root.point("/empty/dir", Kind::Directory).expect("point");
        root.point("/proc", Kind::SystemDirectory).expect("point");
        fs::write(dir.path().join("etc/used"), "x").expect("write");
        fs::write(dir.path().join("full/x"), "x").expect("write");
        assert_eq!(remove_unused(root.fd(), &root.traces), ["/etc/used", "/full", "/proc"]);
        assert!(!dir.path().join("empty").exists());
        assert!(!dir.path().join("etc/hosts").exists());

        let mut root = Root::new(sys::open_place(dir.path()).expect("open")).expect("root");
        fs::File::open(dir.path()).and_then(|file| file.set_modified(old)).expect("times");
        root.point("/c/d/e", Kind::Directory).expect("point");
        root.point("/f", Kind::File).expect("point");
        assert_eq!(remove_unused(root.fd(), &root.traces), [""; 0]);
        assert_eq!(fs::metadata(dir.path()).and_then(|stat| stat.modified()).expect("time"), old);
    }
}
