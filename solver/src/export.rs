//! Images out of the store: OCI layout (directory or tar), docker archive, root file system as tar or directory.
//!
//! ```text
//! type=oci     blobs/sha256/…  index.json  oci-layout
//! type=docker  the same and manifest.json: what `docker save` writes, for `docker load` and `podman load`
//! ```
//! Archives depend on the image and its names alone: layers in their order, then documents by digest, owners and times are
//! zero. Blobs are streamed out of the store, which must have them, or written while they are made ([`Archive`]). Files are written beside their destination and renamed; what is no regular file
//! (a pipe, `/dev/null`) is written into.

use crate::image::{Assembled, Descriptor, Index, media_type, to_json};
use crate::materialize::{MaterializeError, ReadContent, WriteOptions, write_tree};
use crate::snapshot::AlsoTo;
use crate::store::refs::{IMAGE_NAME, REF_NAME, spellings};
use crate::store::{Store, StoreError, blob};
use crate::tree::Tree;
use crate::tree::layer::{LayerError, Open, TarOptions, write_tar};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tempfile::NamedTempFile;

/// Annotation with the date of an image.
const CREATED: &str = "org.opencontainers.image.created";
/// `oci-layout` of every layout.
const LAYOUT: &[u8] = b"{\"imageLayoutVersion\":\"1.0.0\"}";

/// An image with all that belongs to it.
#[derive(Debug, Clone, Copy)]
pub struct ExportImage<'a> {
    /// One for each platform.
    pub images: &'a [Assembled],
    /// Bytes and descriptor of the index over them; needed for more than one.
    pub index: Option<&'a (Vec<u8>, Descriptor)>,
    /// Canonical names with tag.
    pub names: &'a [String],
}

/// Where an export goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dest {
    /// A file or directory.
    Path(PathBuf),
    /// Standard output.
    Stdout,
}

/// What to write.
pub enum Output<'a> {
    /// An OCI layout.
    Oci {
        /// Where to.
        dest: &'a Dest,
        /// As a tar; else a directory.
        tar: bool,
    },
    /// A docker archive.
    Docker {
        /// Where to.
        dest: &'a Dest,
    },
    /// The root file system as tar.
    Tar {
        /// Where to.
        dest: &'a Dest,
        /// The file system: layers applied on each other.
        tree: &'a Tree,
        /// Opens its files.
        open: &'a Open<'a>,
        /// Clamps times.
        options: TarOptions,
    },
    /// The root file system as a directory.
    Local {
        /// Where to.
        dest: &'a Path,
        /// The file system: layers applied on each other.
        tree: &'a Tree,
        /// Opens its files.
        read: &'a ReadContent<'a>,
        /// Owners.
        options: WriteOptions,
    },
    /// Names in the store.
    Store,
}

/// Why an export failed.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The destination cannot be written.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Standard output, or what stands for it, cannot be written.
    #[error("cannot write the image to standard output")]
    Stdout {
        /// The cause.
        source: io::Error,
    },
    /// A directory cannot go to standard output.
    #[error("a directory cannot be written to standard output")]
    DirectoryToStdout,
    /// Docker archives hold one platform.
    #[error("a docker archive holds one platform, not {count}; type=oci holds all")]
    ManyPlatforms {
        /// How many there are.
        count: usize,
    },
    /// Several platforms without an index, or none.
    #[error("{count} images and no index")]
    NoIndex {
        /// How many there are.
        count: usize,
    },
    /// An existing layout's index is not one.
    #[error("{} is not the index of an OCI layout", path.display())]
    BadLayout {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// A layer is still on its way into an archive.
    #[error("{} is still being written", path.display())]
    Busy {
        /// The archive.
        path: PathBuf,
    },
    /// The root file system cannot be written as tar.
    #[error("cannot write the root file system")]
    Tar(#[source] LayerError),
    /// The root file system cannot be written as a directory.
    #[error("cannot write the root file system")]
    Local(#[source] MaterializeError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Writes an image. `stdout` is where [`Dest::Stdout`] goes.
pub fn export(
    image: &ExportImage<'_>,
    store: &Store,
    output: &Output<'_>,
    stdout: &mut dyn Write,
) -> Result<(), ExportError> {
    match output {
        Output::Oci { dest, tar: true } => to_dest(dest, stdout, |out| write_whole_archive(image, store, false, out)),
        Output::Oci { dest: Dest::Path(path), tar: false } => write_layout(image, store, path),
        Output::Oci { dest: Dest::Stdout, tar: false } => Err(ExportError::DirectoryToStdout),
        Output::Docker { dest } => {
            if image.images.len() != 1 {
                return Err(ExportError::ManyPlatforms { count: image.images.len() });
            }
            to_dest(dest, stdout, |out| write_whole_archive(image, store, true, out))
        }
        Output::Tar { dest, tree, open, options } => to_dest(dest, stdout, |out| {
            write_tar(tree, open, options, out).map_err(|error| match error {
                LayerError::Write { source } => Problem::Write(source),
                other => Problem::Other(ExportError::Tar(other)),
            })
        }),
        Output::Local { dest, tree, read, options } => {
            fs::create_dir_all(dest).map_err(io_error("create", dest))?;
            write_tree(tree, read, dest, *options).map_err(ExportError::Local)
        }
        Output::Store => put_in_store(image, store),
    }
}

/// Stores an image's documents and gives it its names.
pub fn put_in_store(image: &ExportImage<'_>, store: &Store) -> Result<(), ExportError> {
    let (root, documents, _) = parts(image)?;
    for bytes in documents.values() {
        store.put_document(bytes)?;
    }
    for name in image.names {
        store.tag(name, root)?;
    }
    Ok(())
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ExportError {
    move |source| ExportError::Io { action, path: path.to_owned(), source }
}

/// Tells a failing destination, which only the caller can name, from everything else.
enum Problem {
    Write(io::Error),
    Other(ExportError),
}

impl Problem {
    /// Names the destination.
    fn at(self, path: &Path) -> ExportError {
        match self {
            Problem::Write(source) => io_error("write", path)(source),
            Problem::Other(error) => error,
        }
    }
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        Problem::Write(error)
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        Problem::Other(error.into())
    }
}

impl From<ExportError> for Problem {
    fn from(error: ExportError) -> Self {
        Problem::Other(error)
    }
}

/// Gives `write` the destination; a regular file appears when all of it is written.
fn to_dest(
    dest: &Dest,
    stdout: &mut dyn Write,
    write: impl FnOnce(&mut dyn Write) -> Result<(), Problem>,
) -> Result<(), ExportError> {
    let path = match dest {
        Dest::Path(path) => path,
        Dest::Stdout => {
            return write(stdout).and_then(|()| Ok(stdout.flush()?)).map_err(|problem| match problem {
                Problem::Write(source) => ExportError::Stdout { source },
                Problem::Other(error) => error,
            });
        }
    };
    let named = |problem: Problem| problem.at(path);
    // Through a symlink to where it points; a renamed file would take the link's place.
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
    if fs::metadata(&target).is_ok_and(|metadata| !metadata.is_file()) {
        let file = File::options().write(true).open(&target).map_err(io_error("open", path))?;
        return buffered(&file, write).map_err(named);
    }
    let temporary = beside(path, &target)?;
    buffered(temporary.as_file(), write).map_err(named)?;
    temporary.persist(&target).map_err(|error| io_error("rename to", path)(error.error))?;
    Ok(())
}

/// Gives `write` a buffer in front of the file.
fn buffered(file: &File, write: impl FnOnce(&mut dyn Write) -> Result<(), Problem>) -> Result<(), Problem> {
    let mut out = BufWriter::with_capacity(256 << 10, file);
    write(&mut out)?;
    out.into_inner().map(drop).map_err(|error| Problem::Write(error.into_error()))
}

/// A file that will take the place of `target`, which the user calls `path`.
fn beside(path: &Path, target: &Path) -> Result<NamedTempFile, ExportError> {
    let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    // The umask takes away what it does.
    builder.prefix(".nacre-").permissions(fs::Permissions::from_mode(0o666));
    builder.tempfile_in(parent).map_err(io_error("create", path))
}

/// Documents by digest.
type Documents<'a> = BTreeMap<&'a str, &'a [u8]>;

/// What names point to; documents by digest; layer blobs.
fn parts<'a>(
    image: &ExportImage<'a>,
) -> Result<(&'a Descriptor, Documents<'a>, BTreeMap<&'a str, &'a Descriptor>), ExportError> {
    let mut documents = BTreeMap::new();
    let mut layers = BTreeMap::new();
    for one in image.images {
        documents.insert(one.config_descriptor.digest.as_str(), one.config_bytes.as_slice());
        documents.insert(one.manifest_descriptor.digest.as_str(), one.manifest_bytes.as_slice());
        layers.extend(one.layers.iter().map(|layer| (layer.digest.as_str(), layer)));
    }
    let root = match (image.index, image.images) {
        (Some((bytes, descriptor)), _) => {
            documents.insert(descriptor.digest.as_str(), bytes.as_slice());
            descriptor
        }
        (None, [one]) => &one.manifest_descriptor,
        (None, images) => return Err(ExportError::NoIndex { count: images.len() }),
    };
    Ok((root, documents, layers))
}

/// The entries of `index.json`: one for each name.
fn index_entries(image: &ExportImage<'_>, root: &Descriptor) -> Vec<Descriptor> {
    let mut entry = root.clone();
    if let [one] = image.images
        && let Some(created) = &one.created
    {
        entry.annotations.insert(CREATED.to_owned(), created.clone());
    }
    if image.names.is_empty() {
        return vec![entry];
    }
    let named = |name: &String| {
        let mut entry = entry.clone();
        // As BuildKit: the tag alone for layout readers, all of the name for containerd.
        let tag = name.rsplit('/').next().and_then(|last| last.split_once(':')).map_or("latest", |(_, tag)| tag);
        entry.annotations.insert(REF_NAME.to_owned(), tag.to_owned());
        entry.annotations.insert(IMAGE_NAME.to_owned(), name.clone());
        entry
    };
    image.names.iter().map(named).collect()
}

fn layout_index(manifests: Vec<Descriptor>) -> Index {
    Index { schema_version: 2, media_type: media_type::OCI_INDEX.to_owned(), manifests, ..Index::default() }
}

/// Writes a layout as tar, for docker with its own manifest.
fn write_whole_archive(
    image: &ExportImage<'_>,
    store: &Store,
    docker: bool,
    out: &mut dyn Write,
) -> Result<(), Problem> {
    out.write_all(&directories()?)?;
    write_archive(image, store, docker, &[], out)
}

/// Writes what stands behind the directories in an archive. Of the layers, the first `there` are in it already.
fn write_archive(
    image: &ExportImage<'_>,
    store: &Store,
    docker: bool,
    there: &[String],
    out: &mut dyn Write,
) -> Result<(), Problem> {
    let (root, documents, _) = parts(image)?;
    let mut written: BTreeSet<&str> = there.iter().map(String::as_str).collect();
    for layer in image.images.iter().flat_map(|one| &one.layers) {
        if written.insert(&layer.digest) {
            copy_layer(layer, store, out)?;
        }
    }
    for (digest, bytes) in documents {
        file(out, &blob_name(digest)?, bytes)?;
    }
    file(out, "index.json", &to_json(&layout_index(index_entries(image, root))))?;
    if docker {
        file(out, "manifest.json", &docker_manifest(image)?)?;
    }
    file(out, "oci-layout", LAYOUT)?;
    out.write_all(&[0; 1024])?;
    Ok(())
}

/// What archives begin with.
fn directories() -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    directory(&mut out, "blobs/")?;
    directory(&mut out, "blobs/sha256/")?;
    Ok(out)
}

fn blob_name(digest: &str) -> Result<String, StoreError> {
    Ok(format!("blobs/sha256/{}", blob::digest_hex(digest)?))
}

fn copy_layer(layer: &Descriptor, store: &Store, out: &mut dyn Write) -> Result<(), Problem> {
    let (digest, size) = (&layer.digest, layer.size);
    let mut blob = open_whole(store, digest, size)?;
    header(out, &blob_name(digest)?, tar::EntryType::Regular, 0o644, size)?;
    let copied = blob::copy(&mut blob, out)?;
    // The store's blobs do not change; if one does all the same, the archive would be broken without this.
    if copied != size {
        let path = store.blob_path(digest)?;
        return Err(StoreError::SizeMismatch { path, expected: size, found: copied }.into());
    }
    Ok(pad(out, size)?)
}

/// An archive in a file that is begun before its layers are there. A layer is written into it while it is made, if it is
/// the next one; else it is copied out of the store. The bytes are the same.
pub struct Archive {
    /// As the user calls it, and what it is.
    path: PathBuf,
    target: PathBuf,
    temporary: NamedTempFile,
    begun: Mutex<Begun>,
}

/// An archive that is begun when somebody has a layer for it, or when it is to be written.
pub struct PlannedArchive {
    dest: Dest,
    begun: Mutex<Option<Arc<Archive>>>,
}

impl PlannedArchive {
    /// Nothing is begun yet.
    pub fn new(dest: Dest) -> Self {
        Self { dest, begun: Mutex::default() }
    }

    /// The archive; `None` when it cannot be begun, for whatever reason.
    pub(crate) fn get(&self) -> Option<Arc<Archive>> {
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        if begun.is_none() {
            *begun = Archive::begin(&self.dest).ok().flatten();
        }
        begun.clone()
    }

    /// Removes what has been begun.
    pub fn forget(&self) {
        *self.begun.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The archive with what is in it so far. Who asks again gets a new one: as [`Archive::begin`].
    pub fn take(&self) -> Result<Option<Arc<Archive>>, ExportError> {
        match self.begun.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(archive) => Ok(Some(archive)),
            None => Archive::begin(&self.dest),
        }
    }
}

/// How far an archive is.
struct Begun {
    end: u64,
    /// The layer that comes next.
    next: usize,
    /// Somebody writes it.
    busy: bool,
    /// Digests of those that are in.
    there: Vec<String>,
}

impl Archive {
    /// Begins an archive; `None` when the destination is not a file of its own.
    pub fn begin(dest: &Dest) -> Result<Option<Arc<Self>>, ExportError> {
        let Dest::Path(path) = dest else { return Ok(None) };
        let target = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
        if fs::metadata(&target).is_ok_and(|metadata| !metadata.is_file()) {
            return Ok(None);
        }
        let temporary = beside(path, &target)?;
        let begin = directories().map_err(io_error("write", path))?;
        temporary.as_file().write_all_at(&begin, 0).map_err(io_error("write", path))?;
        let begun = Begun { end: begin.len() as u64, next: 0, busy: false, there: Vec::new() };
        Ok(Some(Arc::new(Self { path: path.clone(), target, temporary, begun: Mutex::new(begun) })))
    }

    fn begun(&self) -> MutexGuard<'_, Begun> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for layer number `at`, if it is its turn.
    pub fn layer(self: &Arc<Self>, at: usize) -> Option<ArchiveLayer> {
        let mut begun = self.begun();
        if begun.busy || begun.next != at {
            return None;
        }
        begun.busy = true;
        Some(ArchiveLayer { archive: self.clone(), start: begun.end + 512, size: 0, failed: false })
    }

    /// Writes the rest. All layers must be in the store, and nobody may still write one.
    pub fn finish(self: Arc<Self>, image: &ExportImage<'_>, store: &Store, docker: bool) -> Result<(), ExportError> {
        let busy = |archive: Arc<Self>| ExportError::Busy { path: archive.path.clone() };
        Arc::try_unwrap(self).map_err(busy)?.write_rest(image, store, docker)
    }

    fn write_rest(self, image: &ExportImage<'_>, store: &Store, docker: bool) -> Result<(), ExportError> {
        if docker && image.images.len() != 1 {
            return Err(ExportError::ManyPlatforms { count: image.images.len() });
        }
        let Begun { end, there, .. } = self.begun.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut file = self.temporary.as_file();
        let path = &self.path;
        // What a layer left that did not come to its end.
        file.set_len(end).map_err(io_error("write", path))?;
        file.seek(io::SeekFrom::End(0)).map_err(io_error("write", path))?;
        buffered(file, |out| write_archive(image, store, docker, &there, out)).map_err(|problem| problem.at(path))?;
        self.temporary.persist(&self.target).map_err(|error| io_error("rename to", path)(error.error))?;
        Ok(())
    }
}

/// A layer on its way into an [`Archive`]. Dropped without [`ArchiveLayer::end`], it leaves nothing.
pub struct ArchiveLayer {
    archive: Arc<Archive>,
    start: u64,
    size: u64,
    /// What cannot be written now is written at the end, where failure is told.
    failed: bool,
}

impl ArchiveLayer {
    /// The layer is made. Nothing of it has been written if it was there before; it is copied then.
    pub fn end(mut self, layer: &Descriptor, store: &Store) {
        if self.archive.begun().there.contains(&layer.digest) {
            self.archive.begun().next += 1;
            return;
        }
        if self.size == 0
            && let Ok(mut blob) = open_whole(store, &layer.digest, layer.size)
        {
            self.failed |= blob::copy(&mut blob, &mut self).is_err();
        }
        if !self.failed && self.size == layer.size && self.frame(&layer.digest).is_ok() {
            let mut begun = self.archive.begun();
            begun.end = (self.start + self.size).next_multiple_of(512);
            begun.next += 1;
            begun.there.push(layer.digest.clone());
        }
    }

    /// Writes what stands before and after a blob.
    fn frame(&self, digest: &str) -> Result<(), Problem> {
        let (mut before, mut after) = (Vec::new(), Vec::new());
        header(&mut before, &blob_name(digest)?, tar::EntryType::Regular, 0o644, self.size)?;
        pad(&mut after, self.size)?;
        let file = self.archive.temporary.as_file();
        file.write_all_at(&before, self.start - 512)?;
        Ok(file.write_all_at(&after, self.start + self.size)?)
    }
}

impl AlsoTo for ArchiveLayer {
    fn restart(&mut self) {
        self.size = 0;
    }
}

impl Write for ArchiveLayer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.failed {
            let at = self.start + self.size;
            self.failed = self.archive.temporary.as_file().write_all_at(bytes, at).is_err();
        }
        self.size += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for ArchiveLayer {
    fn drop(&mut self) {
        self.archive.begun().busy = false;
    }
}

/// `manifest.json` of docker archives.
fn docker_manifest(image: &ExportImage<'_>) -> Result<Vec<u8>, StoreError> {
    #[derive(Serialize)]
    #[serde(rename_all = "PascalCase")]
    struct Entry {
        config: String,
        repo_tags: Option<Vec<String>>,
        layers: Vec<String>,
    }
    let path = |digest: &str| Ok(format!("blobs/sha256/{}", blob::digest_hex(digest)?));
    let mut entries = Vec::new();
    for one in image.images {
        let tags: Vec<String> = image.names.iter().map(|name| familiar(name)).collect();
        entries.push(Entry {
            config: path(&one.config_descriptor.digest)?,
            repo_tags: (!tags.is_empty()).then_some(tags),
            layers: one.layers.iter().map(|layer| path(&layer.digest)).collect::<Result<_, StoreError>>()?,
        });
    }
    Ok(to_json(&entries))
}

/// The name as docker shows it: without `docker.io/library/`, with tag.
fn familiar(name: &str) -> String {
    spellings(name).into_iter().find(|spelling| !spelling.starts_with("docker.io/")).unwrap_or_else(|| name.to_owned())
}

/// Opens a blob of this length and no other.
fn open_whole(store: &Store, digest: &str, size: u64) -> Result<File, StoreError> {
    let file = store.open_blob(digest)?;
    let path = store.blob_path(digest)?;
    let found = file.metadata().map_err(StoreError::io("open", &path))?.len();
    if found == size { Ok(file) } else { Err(StoreError::SizeMismatch { path, expected: size, found }) }
}

fn header(out: &mut dyn Write, name: &str, kind: tar::EntryType, mode: u32, size: u64) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_path(name)?;
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    out.write_all(header.as_bytes())
}

fn directory(out: &mut dyn Write, name: &str) -> io::Result<()> {
    header(out, name, tar::EntryType::Directory, 0o755, 0)
}

fn file(out: &mut dyn Write, name: &str, bytes: &[u8]) -> io::Result<()> {
    header(out, name, tar::EntryType::Regular, 0o644, bytes.len() as u64)?;
    out.write_all(bytes)?;
    pad(out, bytes.len() as u64)
}

fn pad(out: &mut dyn Write, size: u64) -> io::Result<()> {
    let rest = usize::try_from(size % 512).unwrap_or_default();
    if rest == 0 { Ok(()) } else { out.write_all(&[0; 512][rest..]) }
}

/// Writes a layout directory, or adds the image to one. Entries of the same name are replaced; an image without name
/// replaces the one without name.
fn write_layout(image: &ExportImage<'_>, store: &Store, path: &Path) -> Result<(), ExportError> {
    let (root, documents, layers) = parts(image)?;
    let blobs = path.join("blobs/sha256");
    fs::create_dir_all(&blobs).map_err(io_error("create", &blobs))?;
    for (digest, layer) in layers {
        let target = blobs.join(blob::digest_hex(digest)?);
        if fs::metadata(&target).is_ok_and(|metadata| metadata.len() == layer.size) {
            continue;
        }
        let mut source = open_whole(store, digest, layer.size)?;
        replace(&target, |file| match rustix::fs::ioctl_ficlone(file, &source) {
            Ok(()) => Ok(()),
            Err(_) => blob::copy(&mut source, &mut &*file).map(drop),
        })?;
    }
    for (digest, bytes) in documents {
        replace(&blobs.join(blob::digest_hex(digest)?), |mut file| file.write_all(bytes))?;
    }
    replace(&path.join("oci-layout"), |mut file| file.write_all(LAYOUT))?;
    // Two exports into one directory take turns.
    let lock_path = path.join("index.json.lock");
    let lock = File::options().create(true).truncate(false).write(true).open(&lock_path);
    let lock = lock.map_err(io_error("open", &lock_path))?;
    lock.lock().map_err(io_error("lock", &lock_path))?;
    let index_path = path.join("index.json");
    let mut bytes = Vec::new();
    let mut index = match File::open(&index_path) {
        Ok(file) => {
            file.take(blob::DOCUMENT_LIMIT_BYTES).read_to_end(&mut bytes).map_err(io_error("read", &index_path))?;
            serde_json::from_slice::<Index>(&bytes)
                .map_err(|source| ExportError::BadLayout { path: index_path.clone(), source })?
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => layout_index(Vec::new()),
        Err(error) => return Err(io_error("read", &index_path)(error)),
    };
    for entry in index_entries(image, root) {
        let name =
            |entry: &Descriptor| (entry.annotations.get(REF_NAME).cloned(), entry.annotations.get(IMAGE_NAME).cloned());
        index.manifests.retain(|other| name(other) != name(&entry));
        index.manifests.push(entry);
    }
    replace(&index_path, |mut file| file.write_all(&to_json(&index)))?;
    let _ = fs::remove_file(&lock_path);
    Ok(())
}

/// Puts a file in place by way of a temporary.
fn replace(target: &Path, write: impl FnOnce(&File) -> io::Result<()>) -> Result<(), ExportError> {
    let parent = target.parent().unwrap_or(Path::new("."));
    let temporary = tempfile::Builder::new()
        .prefix(".nacre-")
        .permissions(fs::Permissions::from_mode(0o666))
        .tempfile_in(parent)
        .map_err(io_error("create", target))?;
    write(temporary.as_file()).map_err(io_error("write", target))?;
    temporary.persist(target).map_err(|error| io_error("rename to", target)(error.error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Annotations, Media, assemble, assemble_index};
    use crate::store::temporary;
    use nacre_frontend::image_config::ImageConfig;

    fn image(store: &Store, architecture: &str) -> Assembled {
        let config = ImageConfig { architecture: architecture.into(), os: "linux".into(), ..ImageConfig::default() };
        let layer = [&b"layer for "[..], architecture.as_bytes()].concat();
        let (digest, size) = store.write_blob(None, &mut layer.as_slice()).unwrap();
        let descriptor = Descriptor {
            media_type: media_type::OCI_LAYER.into(),
            digest: digest.clone(),
            size,
            ..Descriptor::default()
        };
        assemble(config, &[(descriptor, digest)], Some(0.into()), Media::Oci, &Annotations::default())
    }

    fn entries(bytes: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(bytes);
        let mut found = BTreeMap::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().to_str().unwrap().to_owned();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            assert_eq!(entry.header().mtime().unwrap(), 0);
            found.insert(name, content);
        }
        found
    }

    fn archive(image: &ExportImage<'_>, store: &Store, docker: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        let dest = Dest::Stdout;
        let output = if docker { Output::Docker { dest: &dest } } else { Output::Oci { dest: &dest, tar: true } };
        export(image, store, &output, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn an_archive_holds_the_image_and_is_the_same_twice() {
        let (_directory, store) = temporary();
        let images = [image(&store, "amd64")];
        let names = ["docker.io/library/app:1".to_owned(), "localhost:5000/app:latest".to_owned()];
        let image = ExportImage { images: &images, index: None, names: &names };
        let bytes = archive(&image, &store, true);
        assert_eq!(bytes, archive(&image, &store, true));
        let found = entries(&bytes);
        let listed: Vec<&str> = found.keys().map(String::as_str).filter(|name| !name.contains("256/")).collect();
        assert_eq!(listed, ["blobs/", "index.json", "manifest.json", "oci-layout"]);
        for (name, content) in &found {
            if let Some(digits) = name.strip_prefix("blobs/sha256/").filter(|rest| !rest.is_empty()) {
                assert_eq!(blob::sha256(content), format!("sha256:{digits}"));
            }
        }
        assert_eq!(found.keys().filter(|name| name.starts_with("blobs/sha256/")).count(), 4);
        let manifest: serde_json::Value = serde_json::from_slice(&found["manifest.json"]).unwrap();
        assert_eq!(manifest[0]["RepoTags"], serde_json::json!(["app:1", "localhost:5000/app:latest"]));
        let index: Index = serde_json::from_slice(&found["index.json"]).unwrap();
        let annotations: Vec<_> = index.manifests.iter().map(|entry| entry.annotations[REF_NAME].as_str()).collect();
        assert_eq!(annotations, ["1", "latest"]);
        assert_eq!(index.manifests[0].annotations[IMAGE_NAME], "docker.io/library/app:1");
        assert_eq!(index.manifests[0].annotations[CREATED], "1970-01-01T00:00:00Z");
        assert!(!entries(&archive(&image, &store, false)).contains_key("manifest.json"));
    }

    #[test]
    fn several_platforms_need_an_index() {
        let (_directory, store) = temporary();
        let images = [image(&store, "amd64"), image(&store, "arm64")];
        let index = assemble_index(&images, Media::Oci, &BTreeMap::new());
        let both = ExportImage { images: &images, index: Some(&index), names: &[] };
        let found = entries(&archive(&both, &store, false));
        assert_eq!(found.keys().filter(|name| name.len() > 70).count(), 7);
        let listed: Index = serde_json::from_slice(&found["index.json"]).unwrap();
        assert_eq!(listed.manifests.len(), 1);
        assert_eq!(listed.manifests[0].digest, index.1.digest);
        let check =
            |image: ExportImage<'_>, output: &Output<'_>| export(&image, &store, output, &mut io::sink()).unwrap_err();
        assert!(matches!(
            check(both, &Output::Docker { dest: &Dest::Stdout }),
            ExportError::ManyPlatforms { count: 2 }
        ));
        let without = ExportImage { index: None, ..both };
        assert!(matches!(check(without, &Output::Oci { dest: &Dest::Stdout, tar: true }), ExportError::NoIndex { .. }));
        assert!(matches!(
            check(both, &Output::Oci { dest: &Dest::Stdout, tar: false }),
            ExportError::DirectoryToStdout
        ));
    }

    #[test]
    fn a_layout_grows_and_names_move() {
        let (directory, store) = temporary();
        let path = directory.path().join("out/layout");
        let (one, two) = ([image(&store, "amd64")], [image(&store, "arm64")]);
        let names = ["localhost/app:1".to_owned()];
        let write = |images: &[Assembled], names: &[String]| {
            let dest = Dest::Path(path.clone());
            let image = ExportImage { images, index: None, names };
            export(&image, &store, &Output::Oci { dest: &dest, tar: false }, &mut io::sink()).unwrap();
            let index: Index = serde_json::from_slice(&fs::read(path.join("index.json")).unwrap()).unwrap();
            index.manifests.into_iter().map(|entry| entry.digest).collect::<Vec<_>>()
        };
        let (first, second) = (&one[0].manifest_descriptor.digest, &two[0].manifest_descriptor.digest);
        assert_eq!(write(&one, &names), std::slice::from_ref(first));
        assert_eq!(write(&two, &[]), [first.clone(), second.clone()]);
        assert_eq!(write(&two, &names), [second.clone(), second.clone()]);
        let names: Vec<_> = fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), 3, "{names:?}");
        assert_eq!(fs::read_dir(path.join("blobs/sha256")).unwrap().count(), 6);
    }

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        let (directory, store) = temporary();
        let images = [image(&store, "amd64")];
        let image = ExportImage { images: &images, index: None, names: &[] };
        let (path, link) = (directory.path().join("out.tar"), directory.path().join("link.tar"));
        std::os::unix::fs::symlink("out.tar", &link).unwrap();
        fs::write(&path, "before").unwrap();
        let blob_path = store.blob_path(&images[0].layers[0].digest).unwrap();
        let blob = fs::read(&blob_path).unwrap();
        let write = |path: &Path| {
            let dest = Dest::Path(path.to_owned());
            export(&image, &store, &Output::Oci { dest: &dest, tar: true }, &mut io::sink())
        };
        fs::write(&blob_path, "short").unwrap();
        assert!(matches!(write(&path), Err(ExportError::Store(StoreError::SizeMismatch { found: 5, .. }))));
        fs::remove_file(&blob_path).unwrap();
        assert!(matches!(write(&path), Err(ExportError::Store(StoreError::NoBlob { .. }))));
        assert_eq!(fs::read(&path).unwrap(), b"before");
        fs::write(&blob_path, blob).unwrap();
        write(&link).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert!(fs::metadata(&path).unwrap().len() > 1024);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 3, "no temporary is left");
        write(Path::new("/dev/null")).unwrap();
        assert!(fs::metadata("/dev/null").is_ok_and(|metadata| !metadata.is_file()));
        assert!(matches!(write(&directory.path().join("missing/x.tar")), Err(ExportError::Io { .. })));
    }

    #[test]
    fn the_store_gets_names() {
        let (_directory, store) = temporary();
        let images = [image(&store, "amd64")];
        let names = ["docker.io/library/app:latest".to_owned()];
        let image = ExportImage { images: &images, index: None, names: &names };
        export(&image, &store, &Output::Store, &mut io::sink()).unwrap();
        let found = store.lookup_tag("docker.io/library/app:latest").unwrap().unwrap();
        assert_eq!(found.digest, images[0].manifest_descriptor.digest);
        assert_eq!(store.read_document(&found.digest).unwrap(), images[0].manifest_bytes);
    }
}
