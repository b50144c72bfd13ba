//! The store on disk: what builds leave for later builds.
//!
//! ```text
//! STORE/
//!   version              "nacre store 1"; written first, so a half-made store is recognised
//!   lock                 builds hold it shared, whoever removes things holds it exclusively
//!   oci-layout           )
//!   index.json           ) an OCI image layout: `skopeo copy oci:STORE:NAME …` works as it is
//!   blobs/sha256/HEX     )
//!   chunks/HEX           chunks of blob sha256:HEX (store/chunks.rs)
//!   layers/ID/           index, tree/ (tree.single/ without owners), tree.boot, blob-*.json (store/layers.rs)
//!   diff-ids/HEX         diff ID of a layer -> its id
//!   content/HEX          content key -> id of the layer that first had this content
//!   records/KEY          cache records (store/record.rs)
//!   steps/STEP           identity of a step -> key of its newest record
//!   references/HEX       what image references resolved to (store/refs.rs)
//!   http/HEX             files fetched by address (registry/http.rs)
//!   git/HEX/             a repository and checkouts of it (op/git.rs)
//!   context/ mounts/ logs/   their owners know
//!   tmp/NAME/            one per process, with a lock that the process holds while it lives
//! ```
//!
//! Invariants: nothing outside `tmp/` is ever written in place, but for `git/HEX/repo`, which git itself keeps whole. A file is made in this process's directory in `tmp/`, checked,
//! synced as its meaning needs, and renamed; a directory likewise. What is found under its final name is therefore
//! whole, unless the machine lost power: layer blobs are synced before the rename, small documents are checked against
//! their digest or checksum when read, and trees are checked once after the first boot that follows their making.
//! Nothing here knows image formats beyond the layout's own files; that is for `op::source`, `image` and `export`.

pub mod blob;
pub mod chunks;
pub mod fsck;
pub mod layers;
pub mod prune;
pub mod record;
pub mod refs;

use crate::materialize::remove_tree;
use crate::tree::{LayerId, Tree};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// What the version file of this format holds.
const VERSION: &str = "nacre store 1\n";

/// A short file name for something that has a long one.
pub fn name_for(what: &[u8]) -> String {
    blake3::hash(what).to_hex()[..32].to_owned()
}

/// Directories of a store.
const DIRECTORIES: &[&str] = &[
    "blobs",
    "blobs/sha256",
    "chunks",
    "layers",
    "diff-ids",
    "content",
    "records",
    "steps",
    "references",
    "http",
    "git",
    "context",
    "mounts",
    "logs",
    "tmp",
];

/// An open store.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    /// Made when something is to be written: a build that finds everything leaves the store as it was.
    tmp: Mutex<Option<OwnTmp>>,
    /// Held shared: nobody removes objects meanwhile.
    _lock: File,
    names: AtomicU64,
    layers: Mutex<HashMap<LayerId, Tree>>,
    /// Name of the trees that this process can use.
    tree_name: &'static str,
}

/// This process's directory in `tmp/`.
#[derive(Debug)]
struct OwnTmp {
    path: PathBuf,
    /// Held exclusively while this process lives; shows others that the directory is in use.
    _lock: File,
}

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file operation failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// Verb and, where it helps, object: `create`, `write`, `rename to`.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Not writable.
    #[error("store {} is read-only", path.display())]
    ReadOnly {
        /// The store.
        path: PathBuf,
        /// The kernel's refusal.
        source: io::Error,
    },
    /// Made by somebody else.
    #[error("store {} belongs to user {owner}, not to user {user}", path.display())]
    WrongOwner {
        /// The store.
        path: PathBuf,
        /// Its owner, as seen from this process.
        owner: u32,
        /// This process's user.
        user: u32,
    },
    /// Another version of this program made it.
    #[error("store {} has format `{found}`; this version reads `{}`", path.display(), VERSION.trim_end())]
    Version {
        /// The store.
        path: PathBuf,
        /// What its version file says.
        found: String,
    },
    /// A directory with other things in it.
    #[error("{} is not a store and not empty (it holds `{entry}`)", path.display())]
    NotAStore {
        /// The directory.
        path: PathBuf,
        /// One of the things in it.
        entry: String,
    },
    /// Not `sha256:` and 64 hex digits.
    #[error("unsupported digest `{digest}`")]
    BadDigest {
        /// As given.
        digest: String,
    },
    /// A layer id or key that cannot be a file name of the store.
    #[error("invalid name of a store object `{name}`")]
    BadName {
        /// As given.
        name: String,
    },
    /// Bytes are not what their name says.
    #[error("{}: expected digest {expected}, found {found}", path.display())]
    DigestMismatch {
        /// Where they came from, or the blob.
        path: PathBuf,
        /// Digest asked for.
        expected: String,
        /// Digest of the bytes.
        found: String,
    },
    /// A blob of another length than its descriptor says.
    #[error("{}: expected {expected} bytes, found {found}", path.display())]
    SizeMismatch {
        /// Where it came from, or the blob.
        path: PathBuf,
        /// Size asked for.
        expected: u64,
        /// Size found.
        found: u64,
    },
    /// No such blob.
    #[error("no blob {digest} in store {}", path.display())]
    NoBlob {
        /// The store.
        path: PathBuf,
        /// The digest.
        digest: String,
    },
    /// No such layer.
    #[error("no layer {} in store {}", id.0, path.display())]
    NoLayer {
        /// The store.
        path: PathBuf,
        /// The layer.
        id: LayerId,
    },
    /// A file of the store does not hold what it must.
    #[error("{} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl StoreError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
        move |source| StoreError::Io { action, path: path.to_owned(), source }
    }
}

impl Store {
    /// Opens a store, making it first when there is nothing at `path`, and removes what dead processes left half-done.
    /// Waits while another process removes objects.
    pub fn open(path: &Path) -> Result<Store, StoreError> {
        let refused = |error: StoreError| match error {
            StoreError::Io { source, .. } if source.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                StoreError::ReadOnly { path: path.to_owned(), source }
            }
            other => other,
        };
        if !path.exists() {
            // Trees hold set-id files of images: nobody else may reach them.
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path)
                .map_err(StoreError::io("create", path))
                .map_err(refused)?;
        }
        let root = path.canonicalize().map_err(StoreError::io("open", path))?;
        let metadata = fs::metadata(&root).map_err(StoreError::io("open", &root))?;
        if !metadata.is_dir() {
            return Err(StoreError::Io { action: "open", path: root, source: io::ErrorKind::NotADirectory.into() });
        }
        let user = rustix::process::geteuid().as_raw();
        if metadata.uid() != user {
            return Err(StoreError::WrongOwner { path: root, owner: metadata.uid(), user });
        }
        check_version(&root).map_err(refused)?;
        for name in DIRECTORIES {
            let directory = root.join(name);
            if !directory.is_dir() {
                fs::create_dir_all(&directory).map_err(StoreError::io("create", &directory)).map_err(refused)?;
            }
        }
        let lock = open_lock(&root.join("lock")).map_err(refused)?;
        lock.lock_shared().map_err(StoreError::io("lock", &root.join("lock")))?;
        remove_dead(&root.join("tmp")).map_err(refused)?;
        let store = Store {
            root,
            tmp: Mutex::new(None),
            _lock: lock,
            names: AtomicU64::new(0),
            layers: Mutex::new(HashMap::new()),
            tree_name: "tree",
        };
        store.write_new("oci-layout", b"{\"imageLayoutVersion\":\"1.0.0\"}").map_err(refused)?;
        store.write_new("index.json", refs::EMPTY_INDEX).map_err(refused)?;
        Ok(store)
    }

    /// This store for a process that has only one user id: its trees have no owners, so they must not be taken for
    /// those of a process that has more, and the reverse.
    pub fn with_single_id(mut self) -> Self {
        self.tree_name = "tree.single";
        self
    }

    /// Bytes that the disk has left for this user; `None` when it does not say.
    pub fn free_bytes(&self) -> Option<u64> {
        rustix::fs::statvfs(&self.root).ok().map(|disk| disk.f_bavail.saturating_mul(disk.f_frsize))
    }

    /// The store's directory, absolute and free of symlinks.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Directory of one of the parts whose owners are elsewhere: `context`, `mounts`, `logs`, `http`, `git`.
    pub fn part(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// A path in this process's temporary directory that does not exist yet.
    pub fn tmp_path(&self) -> Result<PathBuf, StoreError> {
        let mut tmp = self.tmp.lock().unwrap_or_else(PoisonError::into_inner);
        let own = match tmp.take() {
            Some(own) => own,
            None => make_tmp(&self.root.join("tmp"))?,
        };
        let own = tmp.insert(own);
        Ok(own.path.join(self.names.fetch_add(1, Ordering::Relaxed).to_string()))
    }

    /// Puts a small file in place by writing a temporary and renaming it. It is not synced: readers must notice a file
    /// that lost its bytes with the power.
    pub fn replace_file(&self, target: &Path, bytes: &[u8]) -> Result<(), StoreError> {
        self.write_renamed(target, bytes, false)
    }

    pub(crate) fn write_renamed(&self, target: &Path, bytes: &[u8], sync: bool) -> Result<(), StoreError> {
        let temporary = self.tmp_path()?;
        let write = || {
            let mut file = File::create_new(&temporary)?;
            file.write_all(bytes)?;
            if sync { file.sync_data() } else { Ok(()) }
        };
        write()
            .map_err(StoreError::io("write", &temporary))
            .and_then(|()| fs::rename(&temporary, target).map_err(StoreError::io("rename to", target)))
            .inspect_err(|_| drop(fs::remove_file(&temporary)))
    }

    /// Writes a file of the layout unless it is there.
    fn write_new(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let target = self.root.join(name);
        if target.exists() { Ok(()) } else { self.replace_file(&target, bytes) }
    }

    /// Reads a file of the store; `None` when it is not there.
    pub(crate) fn read_optional(&self, path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
        match fs::read(path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StoreError::io("read", path)(error)),
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next process that opens the store.
        let tmp = self.tmp.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = tmp.take() {
            let _ = remove_tree(&own.path);
        }
    }
}

/// A name that can only be a file directly in its directory: letters, digits, `-` and `_`.
pub(crate) fn check_name(name: &str) -> Result<&str, StoreError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if name.is_empty() || name.len() > 200 || !name.bytes().all(allowed) {
        return Err(StoreError::BadName { name: name.to_owned() });
    }
    Ok(name)
}

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Accepts this version's store, makes an empty directory one, refuses everything else.
fn check_version(root: &Path) -> Result<(), StoreError> {
    let path = root.join("version");
    let read = || match fs::read_to_string(&path) {
        Ok(text) if text == VERSION => Ok(true),
        Ok(text) => Err(StoreError::Version { path: root.to_owned(), found: text.trim_end().to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(StoreError::io("read", &path)(error)),
    };
    if read()? {
        return Ok(());
    }
    // Names that may stand in a directory that is as good as empty: our own temporaries, and a new file system's.
    let ours = |name: &str| name.starts_with(".nacre-") || name == "lost+found" || name == "version";
    for entry in fs::read_dir(root).map_err(StoreError::io("read", root))? {
        let name = entry.map_err(StoreError::io("read", root))?.file_name().to_string_lossy().into_owned();
        if !ours(&name) {
            // Another process may have made the store since.
            return if read()? { Ok(()) } else { Err(StoreError::NotAStore { path: root.to_owned(), entry: name }) };
        }
    }
    let mut file = tempfile::Builder::new()
        .prefix(".nacre-")
        .tempfile_in(root)
        .map_err(StoreError::io("create a file in", root))?;
    file.write_all(VERSION.as_bytes()).map_err(StoreError::io("write", &path))?;
    file.persist(&path).map_err(|error| StoreError::io("write", &path)(error.error))?;
    Ok(())
}

pub(crate) fn open_lock(path: &Path) -> Result<File, StoreError> {
    File::options().create(true).truncate(false).write(true).open(path).map_err(StoreError::io("open", path))
}

/// Removes what dead processes left in `tmp/`.
fn remove_dead(parent: &Path) -> Result<(), StoreError> {
    let mut dead = Vec::new();
    // Under this lock no directory is without its lock file, so whatever can be locked is dead.
    let guard = lock_tmp(parent)?;
    for entry in fs::read_dir(parent).map_err(StoreError::io("read", parent))? {
        let path = entry.map_err(StoreError::io("read", parent))?.path();
        if !path.is_dir() {
            continue;
        }
        match File::options().write(true).open(path.join("lock")) {
            Ok(file) => {
                if file.try_lock().is_ok() {
                    dead.push((path, Some(file)));
                }
            }
            Err(_) => dead.push((path, None)),
        }
    }
    drop(guard);
    // The locks of the dead are held until their directories are gone: a third process leaves them to us. What
    // belongs to users that this process cannot act for stays, and is no reason to refuse work.
    for (path, _lock) in dead {
        let _ = remove_tree(&path);
    }
    Ok(())
}

impl Store {
    /// This process's directory in `tmp/`, if it was needed.
    fn own_tmp(&self) -> Option<PathBuf> {
        self.tmp.lock().unwrap_or_else(std::sync::PoisonError::into_inner).as_ref().map(|own| own.path.clone())
    }
}

/// Makes this process's temporary directory.
fn make_tmp(parent: &Path) -> Result<OwnTmp, StoreError> {
    let _guard = lock_tmp(parent)?;
    let made = tempfile::Builder::new().prefix("p").tempdir_in(parent);
    let path = made.map_err(StoreError::io("create a directory in", parent))?.keep();
    let lock_path = path.join("lock");
    let lock = open_lock(&lock_path)?;
    lock.lock().map_err(StoreError::io("lock", &lock_path))?;
    Ok(OwnTmp { path, _lock: lock })
}

/// Held while directories in `tmp/` are made or looked at.
fn lock_tmp(parent: &Path) -> Result<File, StoreError> {
    let path = parent.join(".lock");
    let guard = open_lock(&path)?;
    guard.lock().map_err(StoreError::io("lock", &path))?;
    Ok(guard)
}

/// An empty store for a test.
#[cfg(test)]
pub(crate) fn temporary() -> (tempfile::TempDir, Store) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("store")).unwrap();
    (directory, store)
}

/// The store in this directory, for a test that nobody shares it with. A program that another test starts at this moment has
/// all files open until it is executed: this is waited for.
#[cfg(test)]
pub(crate) fn exclusive(root: &Path) -> prune::ExclusiveStore {
    let left = std::sync::atomic::AtomicU32::new(600);
    let wait = || {
        std::thread::sleep(std::time::Duration::from_millis(100));
        left.fetch_sub(1, std::sync::atomic::Ordering::Relaxed) > 1
    };
    prune::ExclusiveStore::open(root, &wait).unwrap().expect("nobody else has it")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_store_is_made_once_and_shared() {
        let (directory, store) = temporary();
        let again = Store::open(&directory.path().join("store")).unwrap();
        let (file, other) = (store.tmp_path().unwrap(), again.tmp_path().unwrap());
        let tmp = file.parent().unwrap().to_owned();
        assert_ne!(Some(&*tmp), other.parent());
        assert!(tmp.is_dir());
        assert_eq!(fs::read(store.root().join("oci-layout")).unwrap(), b"{\"imageLayoutVersion\":\"1.0.0\"}");
        assert_eq!(fs::metadata(store.root()).unwrap().mode() & 0o777, 0o700);
        drop(store);
        assert!(!tmp.exists());
    }

    #[test]
    fn opening_a_store_again_writes_nothing() {
        let (directory, store) = temporary();
        let root = store.root().to_owned();
        drop(store);
        let times = || {
            let of = |path: PathBuf| fs::metadata(path).unwrap().modified().unwrap();
            let names = fs::read_dir(root.join("tmp")).unwrap().count();
            (of(root.clone()), of(root.join("tmp")), names)
        };
        let before = times();
        drop(Store::open(&directory.path().join("store")).unwrap());
        assert_eq!(times(), before);
    }

    #[test]
    fn strange_directories_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("thesis.txt"), "x").unwrap();
        assert!(
            matches!(Store::open(directory.path()), Err(StoreError::NotAStore { entry, .. }) if entry == "thesis.txt")
        );
        let (directory, store) = temporary();
        fs::write(store.root().join("version"), "nacre store 99\n").unwrap();
        let error = Store::open(&directory.path().join("store")).unwrap_err();
        assert!(matches!(&error, StoreError::Version { found, .. } if found == "nacre store 99"), "{error}");
        assert!(matches!(Store::open(Path::new("/proc/nothing/here")), Err(StoreError::Io { .. })));
    }

    #[test]
    fn leftovers_of_dead_processes_are_removed_and_only_those() {
        let (directory, store) = temporary();
        let dead = store.root().join("tmp/pdead");
        fs::create_dir_all(dead.join("tree/ro")).unwrap();
        fs::write(dead.join("lock"), "").unwrap();
        fs::write(dead.join("tree/ro/file"), "x").unwrap();
        fs::set_permissions(dead.join("tree/ro"), fs::Permissions::from_mode(0o555)).unwrap();
        let unlocked = store.root().join("tmp/pnolock");
        fs::create_dir_all(&unlocked).unwrap();
        let mine = store.tmp_path().unwrap();
        fs::write(&mine, "alive").unwrap();
        let _other = Store::open(&directory.path().join("store")).unwrap();
        assert!(!dead.exists() && !unlocked.exists());
        assert!(mine.exists());
    }

    #[test]
    fn many_at_once_make_one_store() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store");
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| drop(Store::open(&path).unwrap()));
            }
        });
        assert!(Store::open(&path).is_ok());
    }

    #[test]
    fn names_cannot_leave_their_directory() {
        for bad in ["", "..", "a/b", "a.b", "a\0b", &"x".repeat(300)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        assert_eq!(check_name("blob-0aF_").unwrap(), "blob-0aF_");
    }
}
