//! Layers by their id, in up to three forms.
//!
//! ```text
//! layers/ID/index                    the layer index (tree/index.rs), which has a checksum; always there
//! layers/ID/tree/                    what overlayfs stacks; made on demand, renamed into place whole
//! layers/ID/tree.boot                boot during which the tree was made; removed once its files were checked after another
//! layers/ID/blob-original.json       a layer that came as a blob: the blob it came as
//! layers/ID/blob-CODEC-LEVEL[-clampSECONDS].json    a blob made of it here
//! ```
//!
//! A layer made here is named by its index, so that its name is its content. A layer that came as a blob is named by its
//! diff ID (`blob-HEX`), which is known before the blob is: whoever has unpacked it need not look at it again.

use super::{Store, StoreError, check_name, hex};
use crate::image::Descriptor;
use crate::materialize::remove_tree;
use crate::tree::blob::{BlobInfo, Codec};
use crate::tree::index::IndexError;
use crate::tree::{ContentDigest, Kind, LayerId, Node, Origin, Tree, index};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Cursor, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// What is remembered of a blob that was made here.
#[derive(Serialize, Deserialize)]
struct Memo {
    diff_id: String,
    digest: String,
    size_bytes: u64,
    uncompressed_bytes: u64,
}

/// The blob that a pulled layer came as.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OriginalBlob {
    /// As in the manifest it came with.
    pub descriptor: Descriptor,
    /// Digest of the plain tar.
    pub diff_id: String,
    /// Size of the plain tar.
    pub uncompressed_bytes: u64,
}

/// The id of a layer that comes as a blob.
pub fn pulled_layer_id(diff_id: &str) -> LayerId {
    LayerId(format!("blob-{}", blake3::hash(diff_id.as_bytes()).to_hex()).into())
}

impl Store {
    fn layer_dir(&self, id: &LayerId) -> Result<PathBuf, StoreError> {
        Ok(self.root.join("layers").join(check_name(&id.0)?))
    }

    /// Stores a layer's index and returns the layer's id. The tree's origins stay usable through [`Store::layer`] as
    /// long as this process lives.
    pub fn put_layer(&self, tree: Tree) -> Result<LayerId, StoreError> {
        let (written, digest) = self.write_index(&tree)?;
        let id = index::layer_id(&digest);
        self.put_index(&id, &written, &digest)?;
        self.remember_tree(&id, tree);
        Ok(id)
    }

    /// Stores the index of a layer that came as a blob, and which blob that was.
    pub fn put_pulled_layer(&self, tree: &Tree, blob: &OriginalBlob) -> Result<LayerId, StoreError> {
        let id = pulled_layer_id(&blob.diff_id);
        let (written, digest) = self.write_index(tree)?;
        self.put_index(&id, &written, &digest)?;
        self.put_json(&id, "blob-original.json", blob)?;
        self.remember_tree(&id, tree.clone().in_layer(&id));
        Ok(id)
    }

    /// Writes an index to a temporary file: its path, and the digest of its bytes.
    fn write_index(&self, tree: &Tree) -> Result<(PathBuf, ContentDigest), StoreError> {
        let path = self.tmp_path()?;
        let written = File::create_new(&path).and_then(|mut file| index::write(tree, &mut file));
        let digest = written.map_err(StoreError::io("write", &path)).inspect_err(|_| drop(fs::remove_file(&path)))?;
        Ok((path, digest))
    }

    /// Puts an index that was written in its place, unless it is there.
    fn put_index(&self, id: &LayerId, written: &Path, digest: &ContentDigest) -> Result<(), StoreError> {
        let directory = self.layer_dir(id)?;
        let path = directory.join("index");
        let digest_there =
            || -> io::Result<blake3::Hash> { Ok(blake3::Hasher::new().update_reader(File::open(&path)?)?.finalize()) };
        if digest_there().is_ok_and(|there| there.as_bytes() == digest) {
            let _ = fs::remove_file(written);
            return Ok(());
        }
        fs::create_dir_all(&directory)
            .map_err(StoreError::io("create", &directory))
            .and_then(|()| fs::rename(written, &path).map_err(StoreError::io("rename to", &path)))
            .inspect_err(|_| drop(fs::remove_file(written)))
    }

    /// Is there a usable index of this layer?
    pub fn has_layer(&self, id: &LayerId) -> bool {
        if self.layers.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).contains_key(id) {
            return true;
        }
        // Only the checksum is looked at: most layers of a build that finds everything are never asked what they hold.
        let Ok(path) = self.layer_dir(id).map(|directory| directory.join("index")) else { return false };
        File::open(path)
            .and_then(|file| Ok((file.metadata()?.len(), file)))
            .is_ok_and(|(length, mut file)| index::is_whole(&mut file, length))
    }

    /// A layer's tree as a value. Read once in a process.
    pub fn layer(&self, id: &LayerId) -> Result<Tree, StoreError> {
        if let Some(tree) = self.layers.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get(id) {
            return Ok(tree.clone());
        }
        let tree = self.read_layer(id)?.in_layer(id);
        self.remember_tree(id, tree.clone());
        Ok(tree)
    }

    /// A layer's entries, without where their bytes are. Read each time: for a look at a layer that the build does not
    /// need.
    pub fn read_layer(&self, id: &LayerId) -> Result<Tree, StoreError> {
        let path = self.layer_dir(id)?.join("index");
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::NoLayer { path: self.root.clone(), id: id.clone() });
            }
            Err(error) => return Err(StoreError::io("read", &path)(error)),
        };
        let length = file.metadata().map_err(StoreError::io("read", &path))?.len();
        let tree = index::read(&mut file, length);
        tree.map_err(|error| match error {
            IndexError::Read(kind) => StoreError::io("read", &path)(kind.into()),
            error => StoreError::Damaged { path: path.clone(), reason: error.to_string() },
        })
    }

    fn remember_tree(&self, id: &LayerId, tree: Tree) {
        self.layers.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(id.clone(), tree);
    }

    /// The layer's directory for overlayfs, if it was made and is whole. The first time after a boot that follows its
    /// making its files are read and compared with the index; if the power took some, the directory is removed.
    pub fn tree_dir(&self, id: &LayerId) -> Option<PathBuf> {
        let directory = self.layer_dir(id).ok()?;
        let tree = directory.join(self.tree_name);
        if !tree.is_dir() {
            return None;
        }
        let mark = directory.join(format!("{}.boot", self.tree_name));
        match fs::read(&mark) {
            Ok(boot) if boot == boot_id() => Some(tree),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some(tree),
            _ => {
                if self.layer(id).is_ok_and(|index| tree_is_whole(&tree, &index)) {
                    let _ = fs::remove_file(&mark);
                    return Some(tree);
                }
                // Renamed first, so that it is gone at once and for everybody.
                let doomed = self.tmp_path().ok()?;
                fs::rename(&tree, &doomed).ok()?;
                let _ = remove_tree(&doomed);
                None
            }
        }
    }

    /// Makes an empty directory to build a layer's tree in.
    pub fn begin_tree(&self) -> Result<PathBuf, StoreError> {
        let path = self.tmp_path()?;
        fs::create_dir(&path).map_err(StoreError::io("create", &path))?;
        Ok(path)
    }

    /// Makes a finished directory the layer's tree. If another process was faster, ours is removed. The layer's index
    /// must be stored already.
    pub fn commit_tree(&self, staging: &Path, id: &LayerId) -> Result<PathBuf, StoreError> {
        let index = self.layer(id)?;
        let directory = self.layer_dir(id)?;
        let tree = directory.join(self.tree_name);
        // The mark comes first: between the two renames a tree without mark would count as checked. It may stand there
        // without a tree.
        if self.tree_dir(id).is_none() {
            self.replace_file(&directory.join(format!("{}.boot", self.tree_name)), boot_id())?;
        }
        match fs::rename(staging, &tree) {
            Ok(()) => {}
            // What a directory cannot be renamed over is another directory that is not empty: the winner's. An empty
            // one is replaced, which is right, too.
            Err(_) if tree.is_dir() => drop(remove_tree(staging)),
            Err(error) => return Err(StoreError::io("rename to", &tree)(error)),
        }
        // Origins of files pointed into the staging directory.
        self.remember_tree(id, index.in_layer(id));
        Ok(tree)
    }

    /// Makes the upper directory of a finished RUN the layer's tree; as [`Store::commit_tree`].
    pub fn adopt_upper(&self, upper: &Path, id: &LayerId) -> Result<PathBuf, StoreError> {
        self.commit_tree(upper, id)
    }

    /// Opens the bytes of a regular file. Files of a layer need its tree.
    pub fn open_origin(&self, origin: &Origin) -> io::Result<Box<dyn Read + Send>> {
        Ok(match origin {
            Origin::None => return Err(io::Error::new(io::ErrorKind::NotFound, "a file without origin")),
            Origin::File(file) => Box::new(File::open(file.whole())?),
            Origin::Inline(bytes) => Box::new(Cursor::new(bytes.clone())),
            Origin::Layer(id, path) => {
                let tree = self.tree_dir(id).ok_or_else(|| {
                    io::Error::new(io::ErrorKind::NotFound, format!("layer {} has not been unpacked", id.0))
                })?;
                Box::new(open_in(&tree, path)?)
            }
        })
    }

    /// A blob that was made of the layer this way. The blob itself may have been removed since.
    pub fn blob_memo(&self, id: &LayerId, codec: Codec, level: Option<u32>, clamp: Option<i64>) -> Option<BlobInfo> {
        let memo: Memo = self.read_json(id, &memo_name(codec, level, clamp))?;
        Some(BlobInfo {
            diff_id: memo.diff_id,
            digest: memo.digest,
            size_bytes: memo.size_bytes,
            uncompressed_bytes: memo.uncompressed_bytes,
            media_type: codec.media_type(),
        })
    }

    /// Remembers a blob that was made of the layer.
    pub fn set_blob_memo(
        &self,
        id: &LayerId,
        codec: Codec,
        level: Option<u32>,
        clamp: Option<i64>,
        blob: &BlobInfo,
    ) -> Result<(), StoreError> {
        let memo = Memo {
            diff_id: blob.diff_id.clone(),
            digest: blob.digest.clone(),
            size_bytes: blob.size_bytes,
            uncompressed_bytes: blob.uncompressed_bytes,
        };
        self.put_json(id, &memo_name(codec, level, clamp), &memo)?;
        // With clamped times, unpacking the blob does not give this layer.
        if clamp.is_none() { self.set_layer_by_diff_id(&blob.diff_id, id) } else { Ok(()) }
    }

    /// The blob that a pulled layer came as. The store need not have it.
    pub fn original_blob(&self, id: &LayerId) -> Option<OriginalBlob> {
        self.read_json(id, "blob-original.json")
    }

    /// Has the store made this blob, or unpacked it, and does it hold this tar then? Whoever finds the blob's own digest right
    /// need not digest the tar again.
    pub fn knows_blob(&self, digest: &str, diff_id: &str) -> bool {
        let Some(id) = self.layer_by_diff_id(diff_id) else { return false };
        if self.original_blob(&id).is_some_and(|blob| blob.descriptor.digest == digest && blob.diff_id == diff_id) {
            return true;
        }
        let files = self.layer_dir(&id).ok().and_then(|directory| fs::read_dir(directory).ok());
        files.into_iter().flatten().flatten().any(|file| {
            let name = file.file_name();
            let name = name.to_str().filter(|name| name.starts_with("blob-") && name.ends_with(".json"));
            let memo: Option<Memo> = name.and_then(|name| self.read_json(&id, name));
            memo.is_some_and(|memo| memo.digest == digest && memo.diff_id == diff_id)
        })
    }

    fn read_json<T: serde::de::DeserializeOwned>(&self, id: &LayerId, name: &str) -> Option<T> {
        serde_json::from_slice(&fs::read(self.layer_dir(id).ok()?.join(name)).ok()?).ok()
    }

    fn put_json(&self, id: &LayerId, name: &str, value: &impl Serialize) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(value).expect("what is remembered of blobs has string keys only");
        self.replace_file(&self.layer_dir(id)?.join(name), &bytes)
    }

    /// The layer that a diff ID is known to be: pulled, or made here and turned into a blob.
    pub fn layer_by_diff_id(&self, diff_id: &str) -> Option<LayerId> {
        let pulled = pulled_layer_id(diff_id);
        if self.has_layer(&pulled) {
            return Some(pulled);
        }
        self.read_layer_name(&self.root.join("diff-ids").join(super::blob::digest_hex(diff_id).ok()?))
    }

    fn set_layer_by_diff_id(&self, diff_id: &str, id: &LayerId) -> Result<(), StoreError> {
        let path = self.root.join("diff-ids").join(super::blob::digest_hex(diff_id)?);
        self.replace_file(&path, check_name(&id.0)?.as_bytes())
    }

    /// The layer that first had this content.
    pub fn layer_by_content(&self, key: &ContentDigest) -> Option<LayerId> {
        self.read_layer_name(&self.root.join("content").join(hex(key)))
    }

    /// Remembers which layer has this content.
    pub fn set_layer_by_content(&self, key: &ContentDigest, id: &LayerId) -> Result<(), StoreError> {
        self.replace_file(&self.root.join("content").join(hex(key)), check_name(&id.0)?.as_bytes())
    }

    fn read_layer_name(&self, path: &Path) -> Option<LayerId> {
        let id = LayerId(fs::read_to_string(path).ok()?.into());
        self.has_layer(&id).then_some(id)
    }
}

fn memo_name(codec: Codec, level: Option<u32>, clamp: Option<i64>) -> String {
    let level = level.map_or_else(|| "default".to_owned(), |level| level.to_string());
    let clamp = clamp.map(|seconds| format!("-clamp{seconds}")).unwrap_or_default();
    format!("blob-{}-{level}{clamp}.json", codec.name())
}

/// Identifies the time since the machine was started; constant where the kernel does not tell.
fn boot_id() -> &'static [u8] {
    static BOOT: OnceLock<Vec<u8>> = OnceLock::new();
    BOOT.get_or_init(|| fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default())
}

/// Opens a regular file of a tree; no component may be a symlink.
fn open_in(directory: &Path, path: &[u8]) -> io::Result<File> {
    use rustix::fs::{Mode, OFlags, ResolveFlags, openat, openat2};
    let root = File::open(directory)?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    match openat2(&root, path, flags, Mode::empty(), resolve) {
        Ok(file) => Ok(File::from(file)),
        // Some sandboxes know no openat2. The trees are ours and their indexes were checked.
        Err(rustix::io::Errno::NOSYS | rustix::io::Errno::PERM) => {
            Ok(File::from(openat(&root, path, flags, Mode::empty())?))
        }
        Err(error) => Err(error.into()),
    }
}

/// Returns whether a tree's files are those of the index: all there, with the right bytes.
fn tree_is_whole(directory: &Path, index: &Tree) -> bool {
    matches!(compare_tree(directory, index), Ok(Ok(())))
}

/// Compares a tree's files with the index; tells the first difference.
pub(super) fn compare_tree(directory: &Path, index: &Tree) -> io::Result<Result<(), String>> {
    let same = |node: &Node| -> io::Result<bool> {
        let path = directory.join(std::ffi::OsStr::from_bytes(&node.entry.path));
        match &node.entry.kind {
            Kind::Whiteout | Kind::Fifo | Kind::Char { .. } | Kind::Block { .. } => Ok(true),
            Kind::Dir { .. } => Ok(fs::symlink_metadata(&path)?.is_dir()),
            Kind::Symlink { target } => Ok(fs::read_link(&path)?.as_os_str().as_bytes() == target),
            Kind::File { size, digest, .. } => {
                let mut file = open_in(directory, &node.entry.path)?;
                if file.metadata()?.len() != *size {
                    return Ok(false);
                }
                let Some(digest) = digest else { return Ok(true) };
                let mut hasher = blake3::Hasher::new();
                super::blob::copy(&mut file, &mut hasher)?;
                Ok(hasher.finalize().as_bytes() == digest)
            }
        }
    };
    let mut cursor = index.cursor();
    while let Some(node) = cursor.next() {
        let path = || String::from_utf8_lossy(&node.entry.path).into_owned();
        match same(node) {
            Ok(true) => {}
            Ok(false) => return Ok(Err(format!("{} is not what its layer says", path()))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Err(format!("{} is missing", path()))),
            Err(error) => return Err(error),
        }
    }
    Ok(Ok(()))
}

#[cfg(test)]
mod tests {
    use super::super::temporary;
    use super::*;
    use crate::tree::Entry;

    fn file(path: &str, content: &[u8]) -> Node {
        let digest = Some(*blake3::hash(content).as_bytes());
        let kind = Kind::File { size: content.len() as u64, digest, link_group: 0 };
        Node { entry: Entry { kind, ..Entry::dir(path, 0o644) }, origin: Origin::Inline(content.into()) }
    }

    fn tree(content: &[u8]) -> Tree {
        Tree::from_nodes(vec![Node { entry: Entry::dir("d", 0o755), origin: Origin::None }, file("d/f", content)])
    }

    fn staged(store: &Store, content: &[u8]) -> PathBuf {
        let staging = store.begin_tree().unwrap();
        fs::create_dir(staging.join("d")).unwrap();
        fs::write(staging.join("d/f"), content).unwrap();
        staging
    }

    fn read(store: &Store, id: &LayerId) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let layer = store.layer(id).unwrap();
        store.open_origin(&layer.get(b"d/f").unwrap().origin)?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    #[test]
    fn a_layer_has_its_forms_when_they_are_made() {
        let (directory, store) = temporary();
        let id = store.put_layer(tree(b"one")).unwrap();
        assert_eq!(store.put_layer(tree(b"one")).unwrap(), id);
        assert_ne!(store.put_layer(tree(b"two")).unwrap(), id);
        assert_eq!(store.tree_dir(&id), None);
        assert_eq!(read(&store, &id).unwrap(), b"one", "from where the bytes are now");

        let other = Store::open(&directory.path().join("store")).unwrap();
        assert_eq!(other.layer(&id).unwrap().nodes().len(), 2);
        assert!(read(&other, &id).is_err(), "nobody made the tree");

        let path = store.commit_tree(&staged(&store, b"one"), &id).unwrap();
        assert_eq!(store.tree_dir(&id), Some(path.clone()));
        assert_eq!(other.commit_tree(&staged(&other, b"one"), &id).unwrap(), path);
        assert_eq!(read(&store, &id).unwrap(), b"one");
        assert_eq!(read(&other, &id).unwrap(), b"one");
        assert!(matches!(other.layer(&LayerId("0".into())), Err(StoreError::NoLayer { .. })));
        assert!(matches!(other.layer(&LayerId("../x".into())), Err(StoreError::BadName { .. })));
    }

    #[test]
    fn trees_are_checked_after_a_boot() {
        let (_directory, store) = temporary();
        let id = store.put_layer(tree(b"one")).unwrap();
        let path = store.commit_tree(&staged(&store, b"one"), &id).unwrap();
        let mark = path.with_file_name("tree.boot");
        fs::write(&mark, "an earlier boot").unwrap();
        assert!(store.tree_dir(&id).is_some());
        assert!(!mark.exists(), "checked once");
        fs::write(path.join("d/f"), "").unwrap();
        assert!(store.tree_dir(&id).is_some(), "what was checked is trusted");
        fs::write(&mark, "an earlier boot").unwrap();
        assert_eq!(store.tree_dir(&id), None);
        assert!(!path.exists());
    }

    #[test]
    fn damaged_indexes_are_noticed() {
        let (directory, store) = temporary();
        let id = store.put_layer(tree(b"one")).unwrap();
        let path = store.root().join("layers").join(&*id.0).join("index");
        let good = fs::read(&path).unwrap();
        let check = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            let store = Store::open(&directory.path().join("store")).unwrap();
            assert!(matches!(store.layer(&id), Err(StoreError::Damaged { .. })));
        };
        check(b"");
        check(&good[..good.len() - 1]);
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 1;
        check(&flipped);
        store.put_layer(tree(b"one")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), good, "put again, it is whole");
    }

    #[test]
    fn blobs_and_contents_are_remembered() {
        let (_directory, store) = temporary();
        let id = store.put_layer(tree(b"one")).unwrap();
        let diff_id = super::super::blob::sha256(b"tar");
        let info = BlobInfo {
            diff_id: diff_id.clone(),
            digest: super::super::blob::sha256(b"gz"),
            size_bytes: 2,
            uncompressed_bytes: 3,
            media_type: Codec::Gzip.media_type(),
        };
        store.set_blob_memo(&id, Codec::Gzip, Some(6), Some(0), &info).unwrap();
        assert_eq!(store.layer_by_diff_id(&diff_id), None);
        assert!(store.blob_memo(&id, Codec::Gzip, Some(6), None).is_none());
        store.set_blob_memo(&id, Codec::Gzip, Some(6), None, &info).unwrap();
        assert!(store.blob_memo(&id, Codec::Zstd, Some(6), None).is_none());
        assert_eq!(store.layer_by_diff_id(&diff_id), Some(id.clone()));
        assert!(store.knows_blob(&info.digest, &diff_id));
        assert!(!store.knows_blob("sha256:other", &diff_id) && !store.knows_blob(&info.digest, "sha256:other"));
        assert_eq!(store.blob_memo(&id, Codec::Gzip, Some(6), None), Some(info));
        let original =
            OriginalBlob { descriptor: Descriptor::default(), diff_id: diff_id.clone(), uncompressed_bytes: 3 };
        let pulled = store.put_pulled_layer(&tree(b"one"), &original).unwrap();
        assert!(pulled.0.starts_with("blob-"));
        assert!(store.knows_blob(&original.descriptor.digest, &diff_id) && !store.knows_blob("sha256:other", &diff_id));
        assert_eq!(store.original_blob(&pulled), Some(original));
        assert_eq!(store.layer_by_diff_id(&diff_id), Some(pulled));
        assert_eq!(store.layer_by_content(&[1; 32]), None);
        store.set_layer_by_content(&[1; 32], &id).unwrap();
        assert_eq!(store.layer_by_content(&[1; 32]), Some(id));
    }
}
