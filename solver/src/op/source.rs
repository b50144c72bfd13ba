//! FROM and named contexts: an image, from a layout directory, the own store or a registry, as layers of the store.
//!
//! [`resolve_image`] finds manifest and configuration and nothing more. Layers are fetched when somebody needs their index or
//! tree ([`ensure_layers`]) or their blob ([`ensure_blob`]): an image that is only copied from never makes a tree, and
//! one whose configuration is all that is asked for downloads nothing else.
//!
//! A layer is read once: compressed bytes are digested (and, from a registry, stored as a blob) on their way into the
//! decompressor, uncompressed bytes on their way into the tar reader, whose files go into a directory aside. Only when
//! digest and diff ID are right is anything of it given its name.
//!
//! Platforms are matched as containerd does: of an index, the manifest that fits best, where `arm64` also takes 32-bit
//! ARM and `amd64` takes `386`. An image that is no index is taken as it is: the caller sees its platform.

#[cfg(feature = "s3")]
use crate::cache::bucket::{Bucket, BucketError};
use crate::image::{Descriptor, DescriptorPlatform, Index, Manifest, media_type};
use crate::materialize::{MaterializeError, TreeWriter, WriteOptions, remove_tree, write_tree};
use crate::registry::client::into_registry_error;
use crate::registry::{Client, RegistryError, RemoteImage};
use crate::store::blob::{self, BlobWriter};
use crate::store::layers::OriginalBlob;
use crate::store::refs::{IMAGE_NAME, REF_NAME, RememberedReference};
use crate::store::{Store, StoreError, hex};
use crate::tree::blob::decompress;
use crate::tree::layer::{LayerError, LayerSink, Limits, NoSink, read_tar};
use crate::tree::stream::{Ahead, ahead, copy_buffered};
use crate::tree::{ContentDigest, Entry, Kind, LayerId, Node, Tree};
use nacre_frontend::diagnostic::did_you_mean;
use nacre_frontend::image_config::ImageConfig;
use nacre_frontend::llb::{ImageSource, Platform};
use nacre_frontend::platform;
use sha2::{Digest, Sha256};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, BufRead, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

/// Layers that are fetched and unpacked at once.
const PARALLEL_LAYERS: usize = 4;
/// Indexes in indexes.
const NESTING_LIMIT: u32 = 4;

/// Whether to ask the registry what a reference means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PullPolicy {
    /// Always, so that a moved tag is noticed. What is in the store is not fetched again.
    Always,
    /// Only when the store does not know.
    #[default]
    Missing,
    /// Never; what the store does not know is an error.
    Never,
}

/// What looking up images needs.
#[derive(Clone)]
pub struct SourceContext {
    /// Where everything ends.
    pub store: Arc<Store>,
    /// For references that the store does not know.
    pub client: Client,
    /// Whether to ask a registry.
    pub pull: PullPolicy,
    /// Never use the network, not even for layers of known images.
    pub offline: bool,
    /// What a layer may cost.
    pub limits: Limits,
    /// How trees are written.
    pub write: WriteOptions,
    /// Is told of downloads: digest, bytes so far, bytes in all.
    pub progress: Option<Progress>,
    /// Is told, once each, of blobs of caches that cannot be had.
    pub warn: Option<Warn>,
}

/// Receives the progress of downloads.
pub type Progress = Arc<dyn Fn(&str, u64, u64) + Send + Sync>;

/// Receives what the user should know, a sentence each.
pub type Warn = Arc<dyn Fn(String) + Send + Sync>;

/// What can be done without: who has a record of a step can run the step.
#[derive(Debug, Clone, Default)]
pub struct Cached {
    /// Why it cannot be had, once that is known.
    lost: OnceLock<String>,
    /// Why nothing of its cache can be had.
    unreachable: Arc<OnceLock<String>>,
    /// It only spares a look at a layer, which is the one to be told of.
    minor: bool,
}

impl Cached {
    /// A blob of a cache; all of them share what is known of the cache itself.
    pub(crate) fn new(unreachable: &Arc<OnceLock<String>>, minor: bool) -> Self {
        Self { lost: OnceLock::new(), unreachable: unreachable.clone(), minor }
    }
}

/// Where an image's blobs come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A layout directory of the caller.
    Layout(PathBuf),
    /// The own store has them.
    Store,
    /// A registry.
    Registry(RemoteImage),
    /// A bucket with a cache.
    #[cfg(feature = "s3")]
    Bucket(Bucket),
}

/// One layer of an image, as its manifest and configuration tell.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageLayer {
    /// The blob.
    pub descriptor: Descriptor,
    /// Digest of the uncompressed layer.
    pub diff_id: String,
}

/// An image for one platform.
#[derive(Debug, Clone)]
pub struct ResolvedImage {
    /// The name that it was asked for by.
    pub name: String,
    /// Its configuration.
    pub config: ImageConfig,
    /// The configuration's bytes.
    pub config_bytes: Vec<u8>,
    /// Digest of what the name means: an index, or the manifest itself.
    pub root_digest: String,
    /// Digest of the manifest.
    pub manifest_digest: String,
    /// Layers, lowest first.
    pub layers: Vec<ImageLayer>,
    /// What the configuration says it is for.
    pub platform: Platform,
    /// Where to get blobs.
    pub origin: Origin,
    /// It is a blob of a cache, which may be lost.
    pub cached: Option<Cached>,
}

impl PartialEq for ResolvedImage {
    /// What is known of a cache meanwhile is no part of the image.
    fn eq(&self, other: &Self) -> bool {
        (&self.name, &self.root_digest, &self.manifest_digest, &self.layers, &self.config_bytes, &self.origin)
            == (
                &other.name,
                &other.root_digest,
                &other.manifest_digest,
                &other.layers,
                &other.config_bytes,
                &other.origin,
            )
    }
}

impl ResolvedImage {
    /// Why its layers cannot be had, if they belong to a cache that has lost them.
    pub fn lost(&self) -> Option<&str> {
        let cached = self.cached.as_ref()?;
        cached.lost.get().or_else(|| cached.unreachable.get()).map(String::as_str)
    }

    /// Notes that a blob cannot be had, unless that is this machine's fault.
    fn note_lost(&self, at: usize, error: &SourceError, context: &SourceContext) {
        let (Some(cached), Some(layer)) = (&self.cached, self.layers.get(at)) else { return };
        if matches!(error, SourceError::Unpack { .. } | SourceError::Lost { .. }) || is_disk_full(error) {
            return;
        }
        let reason = in_one_line(error);
        let unreachable = error.is_unreachable();
        let (known, what) = match unreachable {
            true => (&*cached.unreachable, "nothing more".to_owned()),
            false => (&cached.lost, format!("layer {}", layer.descriptor.digest)),
        };
        if known.set(reason.clone()).is_ok()
            && let Some(warn) = context.warn.as_ref().filter(|_| unreachable || !cached.minor)
        {
            warn(format!("{what} of {} is used: {reason}; steps that need it run", self.name));
        }
    }
}

fn is_disk_full(error: &(dyn std::error::Error + 'static)) -> bool {
    use io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    let mut next = Some(error);
    while let Some(error) = next {
        let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
        if matches!(kind, Some(StorageFull | QuotaExceeded | ReadOnlyFilesystem | PermissionDenied)) {
            return true;
        }
        next = error.source();
    }
    false
}

/// An error with its causes.
pub(crate) fn in_one_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

/// Which form of a layer is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// The index.
    Index,
    /// Index and directory.
    Tree,
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// No such directory, or not a layout.
    #[error("`{}` is not an OCI image layout ({reason})", path.display())]
    NotALayout {
        /// The directory.
        path: PathBuf,
        /// What is missing or wrong.
        reason: String,
    },
    /// The layout has no image of that name.
    #[error("no image `{wanted}` in {} ({})", path.display(), listed(.available))]
    NoSuchTag {
        /// The layout.
        path: PathBuf,
        /// Tag or digest asked for.
        wanted: String,
        /// What there is.
        available: Vec<String>,
    },
    /// Several images, and nothing says which.
    #[error("{} holds several images, name one of them ({})", path.display(), listed(.available))]
    WhichImage {
        /// The layout.
        path: PathBuf,
        /// What there is.
        available: Vec<String>,
    },
    /// An index without a manifest for the platform.
    #[error("{image} is not available for platform {wanted} ({})", listed(.available))]
    NoSuchPlatform {
        /// The image.
        image: String,
        /// Platform asked for.
        wanted: Platform,
        /// Platforms there are.
        available: Vec<String>,
    },
    /// Not a canonical reference.
    #[error("invalid image reference `{reference}`")]
    BadReference {
        /// As given.
        reference: String,
    },
    /// Not in the store, and nobody may be asked.
    #[error("image {image} is not in the store, and pulling is off")]
    NotPulled {
        /// The image.
        image: String,
    },
    /// A document that does not say what it must.
    #[error("{image}: {document} is not usable: {reason}")]
    BadDocument {
        /// The image.
        image: String,
        /// `manifest sha256:…`.
        document: String,
        /// What is wrong.
        reason: String,
    },
    /// A layer's uncompressed bytes are not those that the configuration names.
    #[error("{image}: layer {digest}: expected diff ID {expected}, found {found}")]
    DiffIdMismatch {
        /// The image.
        image: String,
        /// The blob.
        digest: String,
        /// By the configuration.
        expected: String,
        /// Of the bytes.
        found: String,
    },
    /// A blob is not what its descriptor says.
    #[error("{image}: layer {expected}: found digest {found}")]
    BlobMismatch {
        /// The image.
        image: String,
        /// By the manifest.
        expected: String,
        /// Of the bytes.
        found: String,
    },
    /// A blob has another length than its descriptor says.
    #[error("{image}: layer {digest}: expected {expected} bytes, found {found}")]
    BlobSize {
        /// The image.
        image: String,
        /// By the manifest.
        digest: String,
        /// By the manifest.
        expected: u64,
        /// Read.
        found: u64,
    },
    /// A layer's tar cannot be read.
    #[error("{image}: layer {digest} cannot be unpacked")]
    Layer {
        /// The image.
        image: String,
        /// The blob.
        digest: String,
        /// What is wrong.
        source: LayerError,
    },
    /// A layer's bytes cannot be read or written.
    #[error("{image}: layer {digest} cannot be read")]
    LayerIo {
        /// The image.
        image: String,
        /// The blob.
        digest: String,
        /// The cause.
        source: io::Error,
    },
    /// A layer's directory cannot be written.
    #[error("{image}: layer {digest} cannot be written")]
    Unpack {
        /// The image.
        image: String,
        /// The blob.
        digest: String,
        /// The cause.
        source: MaterializeError,
    },
    /// A blob of a cache that could not be had before.
    #[error("{image}: layer {digest} cannot be had: {reason}")]
    Lost {
        /// The cache.
        image: String,
        /// The blob.
        digest: String,
        /// Why, as far as was told the first time.
        reason: String,
    },
    /// The registry failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The bucket failed.
    #[cfg(feature = "s3")]
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl SourceError {
    /// Does it mean that nothing else can be had from there, either?
    fn is_unreachable(&self) -> bool {
        match self {
            Self::Registry(error) => matches!(
                error,
                RegistryError::Transport { .. } | RegistryError::Timeout { .. } | RegistryError::Slow { .. }
            ),
            #[cfg(feature = "s3")]
            Self::Bucket(error) => error.is_unreachable(),
            _ => false,
        }
    }

    /// A way out, one sentence.
    pub fn help(&self) -> Option<String> {
        let near = |wanted: &str, there: &[String]| did_you_mean(wanted, there.iter().map(String::as_str));
        Some(match self {
            Self::NotALayout { .. } => "`skopeo copy IMAGE oci:DIR` makes one".to_owned(),
            Self::NoSuchTag { wanted, available, .. } => format!("did you mean `{}`?", near(wanted, available)?),
            Self::WhichImage { .. } => "write `oci-layout://DIR:TAG`".to_owned(),
            Self::NoSuchPlatform { available, .. } if !available.is_empty() => {
                "choose one of these with --platform".to_owned()
            }
            Self::Registry(RegistryError::DigestMismatch { found, .. }) => {
                format!("if the new content is right, the checksum is {found}")
            }
            Self::Registry(error) => return error.help(),
            _ => return None,
        })
    }
}

fn listed(available: &[String]) -> String {
    if available.is_empty() { "there is none".to_owned() } else { format!("there is: {}", available.join(", ")) }
}

/// Finds an image's manifest for a platform and its configuration.
pub fn resolve_image(
    source: &ImageSource,
    platform: &Platform,
    context: &SourceContext,
) -> Result<ResolvedImage, SourceError> {
    let (name, origin, roots) = match source {
        ImageSource::OciLayout { path, tag, digest } => {
            let (name, roots) = layout_roots(path, tag.as_deref(), digest.as_deref())?;
            (name, Origin::Layout(PathBuf::from(path)), roots)
        }
        ImageSource::Reference(reference) => {
            let remote = RemoteImage::parse(reference)
                .ok_or_else(|| SourceError::BadReference { reference: reference.clone() })?;
            let mut other_platform = None;
            if let Some(root) = own_image(reference, &remote, context)? {
                let found = look_up(reference, &Origin::Store, vec![root], platform, context)?;
                if platform::rank(platform, &found.platform).is_some() {
                    return Ok(found);
                }
                // Built here, but for another platform: the registry may have it for this one.
                other_platform = Some(SourceError::NoSuchPlatform {
                    image: reference.clone(),
                    wanted: platform.clone(),
                    available: vec![found.platform.to_string()],
                });
            }
            match find_reference(reference, &remote, context) {
                Ok(root) => (reference.clone(), Origin::Registry(remote), vec![root]),
                Err(error) => return Err(other_platform.unwrap_or(error)),
            }
        }
    };
    look_up(&name, &origin, roots, platform, context)
}

fn look_up(
    name: &str,
    origin: &Origin,
    roots: Vec<Descriptor>,
    platform: &Platform,
    context: &SourceContext,
) -> Result<ResolvedImage, SourceError> {
    let lookup = Lookup { name, origin, context };
    let root_digest = roots.first().map(|root| root.digest.clone()).unwrap_or_default();
    let (descriptor, bytes) = lookup.choose(roots, platform)?;
    lookup.image(&descriptor, &bytes, root_digest)
}

/// Makes sure that the store has all of an image's layers in this form, several at a time. Ids, lowest first.
pub fn ensure_layers(image: &ResolvedImage, form: Form, context: &SourceContext) -> Result<Vec<LayerId>, SourceError> {
    let mut ids: Vec<Option<LayerId>> = image.layers.iter().map(|layer| ready(layer, form, context)).collect();
    // A layer can stand in an image twice.
    let mut missing: Vec<usize> = (0..ids.len()).filter(|&at| ids[at].is_none()).collect();
    missing.sort_by_key(|&at| (&image.layers[at].diff_id, at));
    missing.dedup_by_key(|at| &image.layers[*at].diff_id);
    missing.sort_unstable();
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..missing.len().min(PARALLEL_LAYERS) {
            scope.spawn(|| {
                while let Some(&at) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = not_lost(image, at).and_then(|()| {
                        unpack(image, at, form, context).inspect_err(|error| image.note_lost(at, error, context))
                    });
                    if result.is_err() {
                        // Nobody begins another one; the others' work is kept.
                        next.store(missing.len(), Ordering::Relaxed);
                    }
                    results.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push((at, result));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    results.sort_by_key(|(at, _)| *at);
    for (at, result) in results {
        let id = result?;
        for (other, layer) in image.layers.iter().enumerate() {
            if layer.diff_id == image.layers[at].diff_id {
                ids[other] = Some(id.clone());
            }
        }
    }
    Ok(ids.into_iter().flatten().collect())
}

/// Makes sure that the store has a layer's blob.
pub fn ensure_blob(image: &ResolvedImage, at: usize, context: &SourceContext) -> Result<(), SourceError> {
    let descriptor = &image.layers[at].descriptor;
    if context.store.has_blob(&descriptor.digest, Some(descriptor.size)) {
        return Ok(());
    }
    not_lost(image, at)?;
    fetch_blob(image, at, context).inspect_err(|error| image.note_lost(at, error, context))
}

/// Nobody asks again for what was not there.
fn not_lost(image: &ResolvedImage, at: usize) -> Result<(), SourceError> {
    image.lost().map_or(Ok(()), |reason| {
        let digest = image.layers[at].descriptor.digest.clone();
        Err(SourceError::Lost { image: image.name.clone(), digest, reason: reason.to_owned() })
    })
}

fn fetch_blob(image: &ResolvedImage, at: usize, context: &SourceContext) -> Result<(), SourceError> {
    let descriptor = &image.layers[at].descriptor;
    let store = &context.store;
    match &image.origin {
        Origin::Layout(path) => {
            store.import_blob(&layout_blob(path, &descriptor.digest)?, &descriptor.digest, descriptor.size)?
        }
        Origin::Store => {
            let (path, digest) = (store.root().to_owned(), descriptor.digest.clone());
            return Err(StoreError::NoBlob { path, digest }.into());
        }
        Origin::Registry(remote) => {
            let mut body = fetch(image, remote, descriptor, context)?;
            let mut writer = store.blob_writer()?;
            blob::copy(&mut body, &mut writer)
                .map_err(|error| into_registry_error(error, &remote.host, &remote.repository))?;
            writer.commit(Some(&descriptor.digest))?;
        }
        #[cfg(feature = "s3")]
        Origin::Bucket(bucket) => {
            let mut body = reporting(bucket.blob(&descriptor.digest, &context.client)?, descriptor, context);
            let mut writer = store.blob_writer()?;
            let failed =
                |source| SourceError::LayerIo { image: image.name.clone(), digest: descriptor.digest.clone(), source };
            blob::copy(&mut body, &mut writer).map_err(failed)?;
            writer.commit(Some(&descriptor.digest))?;
        }
    }
    Ok(())
}

/// The layer, if the store has it in this form.
fn ready(layer: &ImageLayer, form: Form, context: &SourceContext) -> Option<LayerId> {
    let id = context.store.layer_by_diff_id(&layer.diff_id)?;
    (form == Form::Index || context.store.tree_dir(&id).is_some()).then_some(id)
}

fn layout_blob(path: &Path, digest: &str) -> Result<PathBuf, StoreError> {
    Ok(path.join("blobs/sha256").join(blob::digest_hex(digest)?))
}

fn fetch(
    image: &ResolvedImage,
    remote: &RemoteImage,
    descriptor: &Descriptor,
    context: &SourceContext,
) -> Result<Reporting, SourceError> {
    if context.offline {
        return Err(RegistryError::Offline { what: format!("layer {} of {}", descriptor.digest, image.name) }.into());
    }
    Ok(reporting(context.client.blob(remote, descriptor)?, descriptor, context))
}

fn reporting(body: impl Read + Send + 'static, descriptor: &Descriptor, context: &SourceContext) -> Reporting {
    let (digest, total) = (descriptor.digest.clone(), descriptor.size);
    Reporting { inner: Box::new(body), digest, received: 0, total, progress: context.progress.clone() }
}

/// Tells of the bytes that pass.
struct Reporting {
    inner: Box<dyn Read + Send>,
    digest: String,
    received: u64,
    total: u64,
    progress: Option<Progress>,
}

impl Read for Reporting {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.received += count as u64;
        if let Some(progress) = &self.progress {
            progress(&self.digest, self.received, self.total);
        }
        Ok(count)
    }
}

// ---- finding ----

/// The manifests that a tag or digest means in a layout: more than one when the same tag stands at several platforms.
pub(crate) fn layout_roots(
    path: &str,
    tag: Option<&str>,
    digest: Option<&str>,
) -> Result<(String, Vec<Descriptor>), SourceError> {
    let directory = PathBuf::from(path);
    let unusable = |reason: String| SourceError::NotALayout { path: directory.clone(), reason };
    if !directory.is_dir() {
        return Err(unusable("no such directory".to_owned()));
    }
    let file = directory.join("index.json");
    let mut bytes = Vec::new();
    File::open(&file)
        .and_then(|file| file.take(blob::DOCUMENT_LIMIT_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|error| unusable(format!("index.json: {error}")))?;
    if bytes.len() as u64 > blob::DOCUMENT_LIMIT_BYTES {
        return Err(unusable("index.json is too large".to_owned()));
    }
    let index: Index = serde_json::from_slice(&bytes).map_err(|error| unusable(format!("index.json: {error}")))?;
    let names = |entry: &Descriptor| {
        [REF_NAME, IMAGE_NAME].iter().filter_map(|key| entry.annotations.get(*key).cloned()).collect::<Vec<_>>()
    };
    let available = || {
        let mut available: Vec<String> = index
            .manifests
            .iter()
            .map(|entry| names(entry).into_iter().next().unwrap_or_else(|| entry.digest.clone()))
            .collect();
        available.dedup();
        available
    };
    let missing = |wanted: &str| SourceError::NoSuchTag {
        path: directory.clone(),
        wanted: wanted.to_owned(),
        available: available(),
    };
    if let Some(digest) = digest {
        let listed = index.manifests.iter().find(|entry| entry.digest == digest).cloned();
        let root = match listed {
            Some(entry) => entry,
            // A manifest inside an index, or one whose name was taken by another: its blob is enough.
            None => {
                let size = std::fs::metadata(layout_blob(&directory, digest)?).map_err(|_| missing(digest))?.len();
                Descriptor { digest: digest.to_owned(), size, ..Descriptor::default() }
            }
        };
        return Ok((format!("{path}@{digest}"), vec![root]));
    }
    // Some tools write the whole name where others write the tag.
    let with_tag = |tag: &str| -> Vec<Descriptor> {
        let suffix = format!(":{tag}");
        let exact: Vec<_> =
            index.manifests.iter().filter(|entry| names(entry).iter().any(|name| name == tag)).collect();
        let found = match exact.is_empty() {
            false => exact,
            true => {
                index.manifests.iter().filter(|entry| names(entry).iter().any(|name| name.ends_with(&suffix))).collect()
            }
        };
        found.into_iter().cloned().collect()
    };
    let roots = match tag {
        Some(tag) => {
            let roots = with_tag(tag);
            if roots.is_empty() {
                return Err(missing(tag));
            }
            roots
        }
        None => {
            let distinct = index.manifests.iter().any(|entry| names(entry) != names(&index.manifests[0]));
            match (distinct, with_tag("latest")) {
                // One image, or one for several platforms.
                (false, _) => index.manifests.clone(),
                (true, latest) if !latest.is_empty() => latest,
                (true, _) => return Err(SourceError::WhichImage { path: directory.clone(), available: available() }),
            }
        }
    };
    if roots.is_empty() {
        return Err(missing(tag.unwrap_or("latest")));
    }
    let name = tag.map_or_else(|| path.to_owned(), |tag| format!("{path}:{tag}"));
    Ok((name, roots))
}

/// The image of this name that was built here. A digest in the reference names bytes, not a tag.
fn own_image(
    reference: &str,
    remote: &RemoteImage,
    context: &SourceContext,
) -> Result<Option<Descriptor>, SourceError> {
    if remote.digest.is_some() {
        return Ok(None);
    }
    let found = context.store.lookup_tag(reference)?;
    Ok(found.map(|found| Descriptor { annotations: Default::default(), platform: None, ..found }))
}

/// What a reference means: by its digest, by what is remembered, or by its registry.
fn find_reference(reference: &str, remote: &RemoteImage, context: &SourceContext) -> Result<Descriptor, SourceError> {
    let store = &context.store;
    if let Some(digest) = &remote.digest {
        // The name fixes the bytes: nobody needs to be asked.
        if let Ok(bytes) = store.read_document(digest) {
            let size = bytes.len() as u64;
            return Ok(Descriptor { digest: digest.clone(), size, ..Descriptor::default() });
        }
    }
    let remembered = store.remembered_reference(reference)?.map(|remembered| remembered.descriptor);
    let remembered = remembered.filter(|root| store.read_document(&root.digest).is_ok());
    if let Some(root) = remembered.clone().filter(|_| context.offline || context.pull != PullPolicy::Always) {
        return Ok(root);
    }
    if context.offline || context.pull == PullPolicy::Never {
        return Err(SourceError::NotPulled { image: reference.to_owned() });
    }
    // Registries count fetched manifests, but not questions about them. Some do not answer questions.
    if let Some(root) = remembered {
        match context.client.resolve(remote) {
            Ok(Some(found)) if found.digest == root.digest => return Ok(root),
            Ok(_) | Err(RegistryError::Status { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let (bytes, root) = context.client.manifest(remote)?;
    store.put_document(&bytes)?;
    let resolved =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    store.remember_reference(&RememberedReference {
        reference: reference.to_owned(),
        descriptor: root.clone(),
        resolved: i64::try_from(resolved).unwrap_or(i64::MAX),
    })?;
    Ok(root)
}

/// Reads an image's documents from where it is.
pub(crate) struct Lookup<'a> {
    /// Name for messages.
    pub(crate) name: &'a str,
    /// Where the image is.
    pub(crate) origin: &'a Origin,
    /// Store and registry.
    pub(crate) context: &'a SourceContext,
}

impl Lookup<'_> {
    /// Reads a manifest, an index or a configuration; from a registry it is kept.
    pub(crate) fn document(&self, descriptor: &Descriptor, config: bool) -> Result<Vec<u8>, SourceError> {
        let store = &self.context.store;
        let remote = match self.origin {
            Origin::Layout(path) => {
                return Ok(blob::read_document(&layout_blob(path, &descriptor.digest)?, &descriptor.digest)?);
            }
            Origin::Store => return Ok(store.read_document(&descriptor.digest)?),
            Origin::Registry(remote) => remote,
            #[cfg(feature = "s3")]
            Origin::Bucket(bucket) => {
                blob::digest_hex(&descriptor.digest)?;
                let bytes = bucket.config(&descriptor.digest, &self.context.client)?;
                let found = blob::sha256(&bytes);
                if found != descriptor.digest {
                    let expected = descriptor.digest.clone();
                    return Err(SourceError::BlobMismatch { image: self.name.to_owned(), expected, found });
                }
                return Ok(bytes);
            }
        };
        blob::digest_hex(&descriptor.digest)?;
        if let Ok(bytes) = store.read_document(&descriptor.digest) {
            return Ok(bytes);
        }
        if self.context.offline {
            return Err(RegistryError::Offline { what: self.name.to_owned() }.into());
        }
        let bytes = if config {
            let mut bytes = Vec::new();
            self.context.client.blob(remote, descriptor)?.read_limited(blob::DOCUMENT_LIMIT_BYTES, &mut bytes)?;
            let found = blob::sha256(&bytes);
            if found != descriptor.digest {
                return Err(RegistryError::DigestMismatch {
                    host: remote.host.clone(),
                    repository: remote.repository.clone(),
                    expected: descriptor.digest.clone(),
                    found,
                }
                .into());
            }
            bytes
        } else {
            let remote = RemoteImage { digest: Some(descriptor.digest.clone()), ..remote.clone() };
            self.context.client.manifest(&remote)?.0
        };
        store.put_document(&bytes)?;
        Ok(bytes)
    }

    fn bad(&self, document: &str, digest: &str, reason: impl ToString) -> SourceError {
        SourceError::BadDocument {
            image: self.name.to_owned(),
            document: format!("{document} {digest}"),
            reason: reason.to_string(),
        }
    }

    /// Goes through indexes down to the manifest that fits the platform best.
    fn choose(&self, roots: Vec<Descriptor>, platform: &Platform) -> Result<(Descriptor, Vec<u8>), SourceError> {
        let alone = roots.len() == 1;
        let mut candidates = roots;
        let mut best: Option<(usize, Descriptor, Vec<u8>)> = None;
        let mut available = Vec::new();
        // What is alone at the top is taken whatever it is for, unless it is an index.
        let mut checked = !alone;
        for _ in 0..=NESTING_LIMIT {
            let mut nested = Vec::new();
            for descriptor in std::mem::take(&mut candidates) {
                let known = descriptor.platform.as_ref().map(|found| platform::normalize(&found.into()));
                if let Some(found) = known.as_ref().filter(|_| checked && !media_type::is_index(&descriptor.media_type))
                {
                    let rank = platform::rank(platform, found);
                    if found.os != "unknown" {
                        available.push(found.to_string());
                    }
                    if rank.is_none_or(|rank| best.as_ref().is_some_and(|(other, ..)| *other <= rank)) {
                        continue;
                    }
                }
                let foreign = !descriptor.media_type.is_empty()
                    && !media_type::is_index(&descriptor.media_type)
                    && !media_type::is_manifest(&descriptor.media_type);
                if foreign && checked {
                    // Signatures and other things that an index may list.
                    continue;
                }
                let bytes = self.document(&descriptor, false)?;
                match self.parse(&descriptor, &bytes)? {
                    Document::Index(index) => nested.extend(index.manifests),
                    Document::Manifest(_) if !checked => return Ok((descriptor, bytes)),
                    Document::Manifest(manifest) => {
                        let rank = match known {
                            Some(found) => platform::rank(platform, &found),
                            None => {
                                let Ok(found) = self.config_platform(&manifest) else { continue };
                                available.push(found.to_string());
                                platform::rank(platform, &found)
                            }
                        };
                        if let Some(rank) = rank.filter(|rank| best.as_ref().is_none_or(|(other, ..)| rank < other)) {
                            best = Some((rank, descriptor, bytes));
                        }
                    }
                }
            }
            if nested.is_empty() {
                break;
            }
            candidates = nested;
            checked = true;
        }
        available.sort();
        available.dedup();
        let missing = SourceError::NoSuchPlatform { image: self.name.to_owned(), wanted: platform.clone(), available };
        best.map(|(_, descriptor, bytes)| (descriptor, bytes)).ok_or(missing)
    }

    fn parse(&self, descriptor: &Descriptor, bytes: &[u8]) -> Result<Document, SourceError> {
        #[derive(serde::Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Shape {
            #[serde(default)]
            schema_version: u32,
            #[serde(default)]
            media_type: String,
            manifests: Option<serde::de::IgnoredAny>,
            layers: Option<serde::de::IgnoredAny>,
            config: Option<serde::de::IgnoredAny>,
        }
        let bad = |reason: String| self.bad("manifest", &descriptor.digest, reason);
        let shape: Shape = serde_json::from_slice(bytes).map_err(|error| bad(error.to_string()))?;
        if shape.schema_version != 2 {
            return Err(bad(format!("schema version {} (2 is known)", shape.schema_version)));
        }
        // A document that is both would be an image to one reader and an index to another.
        if shape.manifests.is_some() && (shape.layers.is_some() || shape.config.is_some()) {
            return Err(bad("both a manifest and an index".to_owned()));
        }
        let media_type = [&shape.media_type, &descriptor.media_type].into_iter().find(|text| !text.is_empty());
        let index = shape.manifests.is_some();
        match media_type {
            Some(text) if media_type::is_index(text) && !index => {
                return Err(bad("an index without manifests".to_owned()));
            }
            Some(text) if media_type::is_manifest(text) && index => {
                return Err(bad("an index that calls itself a manifest".to_owned()));
            }
            // Some registries and layouts say no more than that it is JSON; the members say the rest.
            _ => {}
        }
        if index {
            let index = serde_json::from_slice(bytes).map_err(|error| bad(error.to_string()))?;
            return Ok(Document::Index(index));
        }
        let manifest: Manifest = serde_json::from_slice(bytes).map_err(|error| bad(error.to_string()))?;
        Ok(Document::Manifest(Box::new(manifest)))
    }

    fn config_platform(&self, manifest: &Manifest) -> Result<Platform, SourceError> {
        let bytes = self.document(&manifest.config, true)?;
        let found: DescriptorPlatform = serde_json::from_slice(&bytes)
            .map_err(|error| self.bad("configuration", &manifest.config.digest, error))?;
        Ok(platform::normalize(&(&found).into()))
    }

    /// Reads the configuration and brings it together with the layers.
    fn image(&self, descriptor: &Descriptor, bytes: &[u8], root_digest: String) -> Result<ResolvedImage, SourceError> {
        let Document::Manifest(manifest) = self.parse(descriptor, bytes)? else {
            return Err(self.bad("manifest", &descriptor.digest, "an index"));
        };
        let bad = |reason: String| self.bad("manifest", &descriptor.digest, reason);
        if !media_type::is_config(&manifest.config.media_type) && !manifest.config.media_type.is_empty() {
            return Err(bad(format!("not an image (its configuration is {})", manifest.config.media_type)));
        }
        let config_bytes = self.document(&manifest.config, true)?;
        let config: ImageConfig = serde_json::from_slice(&config_bytes)
            .map_err(|error| self.bad("configuration", &manifest.config.digest, error))?;
        let descriptors = manifest.layers.unwrap_or_default();
        let diff_ids = config.rootfs.diff_ids.clone().unwrap_or_default();
        if descriptors.len() != diff_ids.len() {
            return Err(bad(format!("{} layers, but {} diff IDs", descriptors.len(), diff_ids.len())));
        }
        let mut layers = Vec::with_capacity(descriptors.len());
        for (descriptor, diff_id) in descriptors.into_iter().zip(diff_ids) {
            blob::digest_hex(&descriptor.digest)?;
            blob::digest_hex(&diff_id)?;
            if !media_type::is_layer(&descriptor.media_type) {
                return Err(bad(format!("a layer of type `{}`", descriptor.media_type)));
            }
            layers.push(ImageLayer { descriptor, diff_id });
        }
        let platform = platform::normalize(&Platform {
            os: config.os.clone(),
            architecture: config.architecture.clone(),
            variant: config.variant.clone(),
        });
        Ok(ResolvedImage {
            name: self.name.to_owned(),
            config,
            config_bytes,
            root_digest,
            manifest_digest: descriptor.digest.clone(),
            layers,
            platform,
            origin: self.origin.clone(),
            cached: None,
        })
    }
}

enum Document {
    Index(Index),
    Manifest(Box<Manifest>),
}

// ---- unpacking ----

/// Digests and counts what is read, and keeps it if asked.
struct Compressed<'a> {
    inner: Box<dyn Read + Send>,
    hasher: Sha256,
    count: u64,
    limit: u64,
    keep: Option<BlobWriter>,
    /// Set when the blob will not be kept.
    unwanted: &'a AtomicBool,
    /// Why reading or keeping failed; what the decompressor makes of it says less.
    failed: Option<io::Error>,
}

impl Compressed<'_> {
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // One byte more than announced is enough to know.
        let room = self.limit.saturating_add(1).saturating_sub(self.count);
        let length = buffer.len().min(usize::try_from(room).unwrap_or(usize::MAX));
        let count = self.inner.read(&mut buffer[..length])?;
        self.count += count as u64;
        self.hasher.update(&buffer[..count]);
        if self.unwanted.load(Ordering::Relaxed) {
            self.keep = None;
        }
        if let Some(keep) = &mut self.keep {
            keep.write_all(&buffer[..count])?;
        }
        Ok(count)
    }
}

impl Read for Compressed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.failed.is_some() {
            return Ok(0);
        }
        self.receive(buffer).map_err(|error| {
            let kind = error.kind();
            if kind != io::ErrorKind::Interrupted {
                self.failed = Some(error);
            }
            kind.into()
        })
    }
}

/// A reader that a decompressor owns and that is read on when the decompressor is gone.
#[derive(Clone)]
struct Shared(Arc<Mutex<Ahead>>);

impl Read for Shared {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).read(buffer)
    }
}

/// Gives files of a tar to the tree that is being written, and counts them.
struct Writing {
    writer: TreeWriter,
    files: usize,
}

impl LayerSink for Writing {
    fn file(&mut self, entry: &Entry, data: &mut dyn BufRead) -> io::Result<()> {
        self.files += 1;
        self.writer.file(entry, data).map_err(io::Error::other)
    }
}

/// Keeps files of a tar by number, with their digests.
struct Spooling {
    directory: PathBuf,
    by_digest: HashMap<ContentDigest, PathBuf>,
    count: usize,
}

impl LayerSink for Spooling {
    fn file(&mut self, _entry: &Entry, data: &mut dyn BufRead) -> io::Result<()> {
        let path = self.directory.join(self.count.to_string());
        self.count += 1;
        let mut hasher = blake3::Hasher::new();
        let mut file = File::create_new(&path)?;
        copy_buffered(data, &mut HashingWrite { inner: &mut file, hasher: &mut hasher })?;
        self.by_digest.insert(*hasher.finalize().as_bytes(), path);
        Ok(())
    }
}

struct HashingWrite<'a> {
    inner: &'a mut File,
    hasher: &'a mut blake3::Hasher,
}

impl Write for HashingWrite<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Fetches a layer, unpacks it in this form and gives it its name.
fn unpack(image: &ResolvedImage, at: usize, form: Form, context: &SourceContext) -> Result<LayerId, SourceError> {
    let layer = &image.layers[at];
    if let Some(id) = ready(layer, form, context) {
        return Ok(id);
    }
    let store = &context.store;
    let known = store.layer_by_diff_id(&layer.diff_id);
    let staging = Staging(store.tmp_path()?);
    let unwritable =
        |source| SourceError::Unpack { image: image.name.clone(), digest: layer.descriptor.digest.clone(), source };
    if form == Form::Index {
        let (tree, uncompressed_bytes) = read_layer(image, at, &mut NoSink, context)?;
        return put(layer, &tree, uncompressed_bytes, context);
    }
    let writer = TreeWriter::new(&staging.0, context.write).map_err(unwritable)?;
    let mut sink = Writing { writer, files: 0 };
    let (mut tree, uncompressed_bytes) = read_layer(image, at, &mut sink, context)?;
    if sink.files == count_inodes(&tree) {
        sink.writer.finish(&tree, &no_content).map_err(unwritable)?;
    } else {
        // The archive has a name twice, or removes what it had. Which of the contents belongs to a hard link then
        // depends on their order, so everything is read again and put where its digest says.
        drop(sink);
        remove_tree(&staging.0).map_err(unwritable)?;
        let spool = Staging(store.begin_tree()?);
        let mut sink = Spooling { directory: spool.0.clone(), by_digest: HashMap::new(), count: 0 };
        tree = read_layer(image, at, &mut sink, context)?.0;
        let content = |node: &Node| -> io::Result<Box<dyn Read>> {
            let Kind::File { digest: Some(digest), .. } = &node.entry.kind else { return no_content(node) };
            let path = sink.by_digest.get(digest).ok_or(io::ErrorKind::NotFound)?;
            Ok(Box::new(File::open(path)?))
        };
        write_tree(&tree, &content, &staging.0, context.write).map_err(unwritable)?;
    }
    let id = match known {
        Some(id) => id,
        None => put(layer, &tree, uncompressed_bytes, context)?,
    };
    store.commit_tree(&staging.0, &id)?;
    Ok(id)
}

fn put(
    layer: &ImageLayer,
    tree: &Tree,
    uncompressed_bytes: u64,
    context: &SourceContext,
) -> Result<LayerId, SourceError> {
    let original =
        OriginalBlob { descriptor: layer.descriptor.clone(), diff_id: layer.diff_id.clone(), uncompressed_bytes };
    Ok(context.store.put_pulled_layer(tree, &original)?)
}

/// All files come from the archive while it is read.
fn no_content(_node: &Node) -> io::Result<Box<dyn Read>> {
    Err(io::ErrorKind::NotFound.into())
}

/// Regular files of a tree, those with several names once.
fn count_inodes(tree: &Tree) -> usize {
    let (mut groups, mut count) = (HashSet::new(), 0);
    let mut cursor = tree.cursor();
    while let Some(Node { entry, .. }) = cursor.next() {
        if let Kind::File { link_group, .. } = entry.kind {
            count += usize::from(link_group == 0 || groups.insert(link_group));
        }
    }
    count
}

/// A directory that is removed unless it was renamed.
struct Staging(PathBuf);

impl Drop for Staging {
    fn drop(&mut self) {
        // What stays is removed with all of this process's temporaries.
        let _ = remove_tree(&self.0);
    }
}

/// Most bytes of a blob that are still received when it cannot be unpacked, to tell whether it was the right one.
const DRAINED_BYTES: u64 = 64 << 20;

/// Reads a layer from where it is and checks digest and diff ID; a blob from a registry is stored on the way. What
/// `sink` was given is valid only if this returns a tree. Also gives the size of the tar.
fn read_layer(
    image: &ResolvedImage,
    at: usize,
    sink: &mut dyn LayerSink,
    context: &SourceContext,
) -> Result<(Tree, u64), SourceError> {
    let ImageLayer { descriptor, diff_id } = &image.layers[at];
    let store = &context.store;
    let digest = descriptor.digest.clone();
    let failed = |source| SourceError::LayerIo { image: image.name.clone(), digest: digest.clone(), source };
    let open = |path: &Path| -> Result<Box<dyn Read + Send>, SourceError> {
        Ok(Box::new(File::open(path).map_err(StoreError::io("open", path))?))
    };
    let mut keep = None;
    let inner: Box<dyn Read + Send> = if store.has_blob(&digest, Some(descriptor.size)) {
        Box::new(store.open_blob(&digest)?)
    } else {
        match &image.origin {
            Origin::Layout(path) => open(&layout_blob(path, &digest)?)?,
            Origin::Store => Box::new(store.open_blob(&digest)?),
            Origin::Registry(remote) => {
                keep = Some(store.blob_writer()?);
                Box::new(fetch(image, remote, descriptor, context)?)
            }
            #[cfg(feature = "s3")]
            Origin::Bucket(bucket) => {
                keep = Some(store.blob_writer()?);
                Box::new(reporting(bucket.blob(&digest, &context.client)?, descriptor, context))
            }
        }
    };
    let known = store.knows_blob(&digest, diff_id);
    let unwanted = AtomicBool::new(false);
    let limit = descriptor.size;
    let compressed =
        Compressed { inner, hasher: Sha256::new(), count: 0, limit, keep, unwanted: &unwanted, failed: None };
    let (unpacked, drained, mut compressed) = std::thread::scope(|scope| {
        let (received, receiving) = ahead(scope, compressed);
        let mut shared = Shared(Arc::new(Mutex::new(received)));
        let unpacked = decompress(shared.clone()).map_err(failed).and_then(|plain| {
            let (plain, _) = ahead(scope, plain);
            let take_in = move |(hasher, count): &mut (Sha256, u64), bytes: &[u8]| {
                if !known {
                    hasher.update(bytes);
                }
                *count += bytes.len() as u64;
            };
            let (mut plain, digesting) = plain.watched(scope, (Sha256::new(), 0), take_in);
            let tree = read_tar(&mut plain, sink, &context.limits).map_err(|source| SourceError::Layer {
                image: image.name.clone(),
                digest: digest.clone(),
                source,
            });
            // The end of a tar may be followed by padding that is part of the diff ID.
            let tree = tree.and_then(|tree| copy_buffered(&mut plain, &mut io::sink()).map_err(failed).map(|_| tree));
            drop(plain);
            let (hasher, count) = digesting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            tree.map(|tree| (tree, hasher, count))
        });
        // Bytes behind the compressed stream belong to the blob. When unpacking failed, reading on tells whether that is
        // because the blob is not the right one, which is the better message.
        unwanted.store(unpacked.is_err(), Ordering::Relaxed);
        let most = if unpacked.is_err() { DRAINED_BYTES } else { u64::MAX };
        let drained = blob::copy(&mut Read::take(&mut shared, most), &mut io::sink()).map(|count| count < most);
        // The thread ends when nobody reads any more.
        drop(shared);
        let compressed = receiving.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (unpacked, drained, compressed)
    });
    if let Some(error) = compressed.failed.take() {
        return Err(match (&image.origin, error.downcast::<RegistryError>()) {
            (_, Ok(error)) => error.into(),
            (_, Err(error)) => failed(error),
        });
    }
    if !drained.map_err(failed)? {
        // It cannot be unpacked, and so much is left that its digest is not waited for.
        return unpacked.map(|(tree, _, count)| (tree, count));
    }
    let image_name = image.name.clone();
    if compressed.count != descriptor.size {
        let (expected, found) = (descriptor.size, compressed.count);
        return Err(SourceError::BlobSize { image: image_name, digest, expected, found });
    }
    let found = format!("sha256:{}", hex(&std::mem::take(&mut compressed.hasher).finalize()));
    if found != digest {
        return Err(SourceError::BlobMismatch { image: image_name, expected: digest, found });
    }
    let (tree, hasher, count) = unpacked?;
    let found = format!("sha256:{}", hex(&hasher.finalize()));
    if !known && found != *diff_id {
        return Err(SourceError::DiffIdMismatch { image: image_name, digest, expected: diff_id.clone(), found });
    }
    if let Some(keep) = compressed.keep.take() {
        keep.commit(Some(&digest))?;
    }
    Ok((tree, count))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Annotations, Assembled, Media, assemble, assemble_index};
    use crate::materialize::Ownership;
    use crate::registry::ClientOptions;
    use std::collections::BTreeMap;
    use std::fs;

    /// A layout directory that is made piece by piece, wrongly if asked.
    struct Layout {
        directory: tempfile::TempDir,
        manifests: Vec<Descriptor>,
    }

    impl Layout {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            fs::create_dir_all(directory.path().join("blobs/sha256")).unwrap();
            Self { directory, manifests: Vec::new() }
        }

        fn path(&self) -> &str {
            self.directory.path().to_str().unwrap()
        }

        fn blob(&self, bytes: &[u8], media_type: &str) -> Descriptor {
            let descriptor = crate::image::describe(bytes, media_type);
            fs::write(layout_blob(self.directory.path(), &descriptor.digest).unwrap(), bytes).unwrap();
            descriptor
        }

        fn layer(&self, tar: &[u8]) -> (Descriptor, String) {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(tar).unwrap();
            let blob = encoder.finish().unwrap();
            (self.blob(&blob, "application/vnd.docker.image.rootfs.diff.tar.gzip"), blob::sha256(tar))
        }

        fn image(&self, platform: &str, layers: &[(Descriptor, String)]) -> Assembled {
            let (os, architecture) = platform.split_once('/').unwrap();
            let (architecture, variant) = architecture.split_once('/').unwrap_or((architecture, ""));
            let config = ImageConfig {
                os: os.into(),
                architecture: architecture.into(),
                variant: variant.into(),
                ..ImageConfig::default()
            };
            let image = assemble(config, layers, None, Media::Docker, &Annotations::default());
            self.blob(&image.config_bytes, "");
            self.blob(&image.manifest_bytes, "");
            image
        }

        fn tag(&mut self, tag: &str, mut descriptor: Descriptor) {
            descriptor.annotations.insert(REF_NAME.to_owned(), tag.to_owned());
            self.untagged(descriptor);
        }

        fn untagged(&mut self, descriptor: Descriptor) {
            self.manifests.push(descriptor);
            let index = Index { schema_version: 2, manifests: self.manifests.clone(), ..Index::default() };
            fs::write(self.directory.path().join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
        }

        fn source(&self, tag: Option<&str>, digest: Option<&str>) -> ImageSource {
            ImageSource::OciLayout {
                path: self.path().to_owned(),
                tag: tag.map(str::to_owned),
                digest: digest.map(str::to_owned),
            }
        }
    }

    fn context() -> (tempfile::TempDir, SourceContext) {
        let (directory, store) = crate::store::temporary();
        let context = SourceContext {
            store: Arc::new(store),
            client: Client::new(ClientOptions::default()),
            pull: PullPolicy::Missing,
            offline: true,
            limits: Limits::default(),
            write: WriteOptions { ownership: Ownership::SingleId },
            progress: None,
            warn: None,
        };
        (directory, context)
    }

    fn platform(text: &str) -> Platform {
        let mut parts = text.splitn(3, '/').map(str::to_owned);
        let mut next = || parts.next().unwrap_or_default();
        Platform { os: next(), architecture: next(), variant: next() }
    }

    /// A tar of (path, content); a content of `None` is a directory, one that begins with `->` a hard link.
    fn tar(entries: &[(&str, Option<&str>)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, content) in entries {
            let mut header = tar::Header::new_ustar();
            header.set_mode(if content.is_none() { 0o755 } else { 0o644 });
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(1000);
            header.set_size(0);
            match content {
                None => {
                    header.set_entry_type(tar::EntryType::Directory);
                    builder.append_data(&mut header, path, io::empty()).unwrap();
                }
                Some(text) if text.starts_with("->") => {
                    header.set_entry_type(tar::EntryType::Link);
                    builder.append_link(&mut header, path, &text[2..]).unwrap();
                }
                Some(text) => {
                    header.set_size(text.len() as u64);
                    builder.append_data(&mut header, path, text.as_bytes()).unwrap();
                }
            }
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn a_layout_is_read_by_tag_digest_and_platform() {
        let mut layout = Layout::new();
        let one = layout.image("linux/amd64", &[layout.layer(&tar(&[("a", Some("1"))]))]);
        let two = layout.image("linux/arm64", &[layout.layer(&tar(&[("a", Some("2"))]))]);
        let index = assemble_index(&[one.clone(), two.clone()], Media::Oci, &BTreeMap::new());
        layout.tag("one", one.manifest_descriptor.clone());
        let (_directory, context) = context();
        let digest = |source: ImageSource, wanted: &str| {
            resolve_image(&source, &platform(wanted), &context).map(|image| image.manifest_digest)
        };
        let (first, second) = (&one.manifest_descriptor.digest, &two.manifest_descriptor.digest);
        assert_eq!(digest(layout.source(None, None), "linux/amd64").unwrap(), *first);
        assert_eq!(digest(layout.source(None, None), "linux/s390x").unwrap(), *first, "no index: taken as it is");
        let nested = layout.blob(&index.0, "");
        layout.tag("both", Descriptor { media_type: index.1.media_type.clone(), ..nested });
        assert!(matches!(digest(layout.source(None, None), "linux/amd64"), Err(SourceError::WhichImage { .. })));
        assert_eq!(digest(layout.source(Some("both"), None), "linux/arm64").unwrap(), *second);
        assert_eq!(digest(layout.source(Some("both"), None), "linux/arm64/v8").unwrap(), *second);
        assert_eq!(digest(layout.source(None, Some(second)), "linux/amd64").unwrap(), *second);
        let error = digest(layout.source(Some("both"), None), "linux/s390x").unwrap_err().to_string();
        assert!(error.contains("linux/s390x") && error.contains("linux/amd64, linux/arm64"), "{error}");
        let error = digest(layout.source(Some("three"), None), "linux/amd64").unwrap_err().to_string();
        assert!(error.contains("`three`") && error.contains("one, both"), "{error}");
        assert!(matches!(
            digest(layout.source(None, Some(&blob::sha256(b"?"))), "linux/amd64"),
            Err(SourceError::NoSuchTag { .. })
        ));
        layout.tag("latest", two.manifest_descriptor.clone());
        assert_eq!(digest(layout.source(None, None), "linux/arm64").unwrap(), *second);

        let mut flat = Layout::new();
        let one = flat.image("linux/amd64", &[]);
        let two = flat.image("linux/arm/v6", &[]);
        flat.untagged(one.manifest_descriptor);
        // Without a platform on the descriptor the configuration tells.
        flat.untagged(Descriptor { platform: None, ..two.manifest_descriptor.clone() });
        assert_eq!(digest(flat.source(None, None), "linux/arm/v7").unwrap(), two.manifest_descriptor.digest);
        assert!(matches!(digest(flat.source(None, None), "linux/arm/v5"), Err(SourceError::NoSuchPlatform { .. })));
    }

    #[test]
    fn layers_come_as_index_tree_and_blob() {
        let mut layout = Layout::new();
        let content = tar(&[("d", None), ("d/f", Some("text")), ("d/g", Some("->d/f")), ("d/.wh.gone", Some(""))]);
        let layer = layout.layer(&content);
        let image = layout.image("linux/amd64", &[layer.clone(), layout.layer(&tar(&[("x", Some("y"))])), layer]);
        layout.tag("latest", image.manifest_descriptor);
        let (_directory, context) = context();
        let image = resolve_image(&layout.source(None, None), &platform("linux/amd64"), &context).unwrap();
        assert_eq!(image.platform, platform("linux/amd64"));
        let ids = ensure_layers(&image, Form::Index, &context).unwrap();
        assert_eq!(ids.len(), 3);
        assert_eq!(ids[0], ids[2]);
        assert!(context.store.tree_dir(&ids[0]).is_none());
        assert!(context.store.layer(&ids[0]).unwrap().get(b"d/gone").is_some());
        assert_eq!(ensure_layers(&image, Form::Tree, &context).unwrap(), ids);
        let tree = context.store.tree_dir(&ids[0]).unwrap();
        assert_eq!(fs::read(tree.join("d/g")).unwrap(), b"text");
        let original = context.store.original_blob(&ids[1]).unwrap();
        assert_eq!(original.descriptor, image.layers[1].descriptor);
        assert!(!context.store.has_blob(&original.descriptor.digest, None));
        ensure_blob(&image, 1, &context).unwrap();
        assert!(context.store.has_blob(&original.descriptor.digest, Some(original.descriptor.size)));
        // What is in the store needs its origin no more.
        drop(layout);
        assert_eq!(ensure_layers(&image, Form::Tree, &context).unwrap(), ids);
        assert!(ensure_blob(&image, 0, &context).is_err());
    }

    #[test]
    fn archives_that_change_their_mind_are_unpacked_right() {
        let mut layout = Layout::new();
        let content =
            tar(&[("a", Some("old")), ("b", Some("new")), ("a", Some("->b")), ("c", Some("1")), ("c", Some("22"))]);
        let image = layout.image("linux/amd64", &[layout.layer(&content)]);
        layout.tag("latest", image.manifest_descriptor);
        let (_directory, context) = context();
        let image = resolve_image(&layout.source(None, None), &platform("linux/amd64"), &context).unwrap();
        let ids = ensure_layers(&image, Form::Tree, &context).unwrap();
        let tree = context.store.tree_dir(&ids[0]).unwrap();
        let read = |name: &str| fs::read_to_string(tree.join(name)).unwrap();
        assert_eq!((read("a").as_str(), read("b").as_str(), read("c").as_str()), ("new", "new", "22"));
    }

    #[test]
    fn hostile_layouts_leave_nothing() {
        let check = |damage: &dyn Fn(&mut Layout), words: &str| {
            let mut layout = Layout::new();
            damage(&mut layout);
            let (_directory, context) = context();
            let resolved = resolve_image(&layout.source(None, None), &platform("linux/amd64"), &context);
            let error = resolved.and_then(|image| ensure_layers(&image, Form::Tree, &context)).expect_err(words);
            let mut text = error.to_string();
            let mut cause = std::error::Error::source(&error);
            while let Some(inner) = cause {
                text = format!("{text}: {inner}");
                cause = inner.source();
            }
            assert!(text.contains(words), "{words}: {text}");
            let left = |part: &str| fs::read_dir(context.store.part(part)).unwrap().count();
            assert_eq!((left("layers"), left("blobs/sha256")), (0, 0), "{words}");
        };
        let with_layers = |layout: &mut Layout, layers: &[(Descriptor, String)]| {
            let image = layout.image("linux/amd64", layers);
            layout.tag("latest", image.manifest_descriptor);
        };
        let good = |layout: &Layout| layout.layer(&tar(&[("a", Some("1"))]));
        check(&|_| {}, "index.json");
        check(&|layout| drop(fs::remove_dir_all(layout.path())), "no such directory");
        check(&|layout| fs::write(layout.directory.path().join("index.json"), "{").unwrap(), "not an OCI image layout");
        check(
            &|layout| fs::write(layout.directory.path().join("index.json"), "{\"schemaVersion\":2}").unwrap(),
            "there is none",
        );
        check(
            &|layout| {
                let layer = good(layout);
                with_layers(layout, std::slice::from_ref(&layer));
                fs::remove_file(layout_blob(layout.directory.path(), &layer.0.digest).unwrap()).unwrap();
            },
            "No such file",
        );
        check(
            &|layout| {
                let (descriptor, diff_id) = good(layout);
                with_layers(layout, &[(Descriptor { size: descriptor.size - 1, ..descriptor }, diff_id)]);
            },
            "bytes, found",
        );
        check(
            &|layout| {
                let (descriptor, diff_id) = good(layout);
                with_layers(layout, &[(Descriptor { size: descriptor.size + 1, ..descriptor }, diff_id)]);
            },
            "bytes, found",
        );
        check(
            &|layout| {
                let layer = good(layout);
                let path = layout_blob(layout.directory.path(), &layer.0.digest).unwrap();
                let mut bytes = fs::read(&path).unwrap();
                let middle = bytes.len() / 2;
                bytes[middle] ^= 0xff;
                fs::write(path, bytes).unwrap();
                with_layers(layout, &[layer]);
            },
            "found digest",
        );
        check(
            &|layout| {
                let layer = (good(layout).0, blob::sha256(b"something else"));
                with_layers(layout, &[layer]);
            },
            "diff ID",
        );
        check(
            &|layout| {
                let layer = layout
                    .layer(b"this is no tar, but a text that is long enough to be looked at".repeat(20).as_slice());
                with_layers(layout, &[layer]);
            },
            "cannot be unpacked",
        );
        check(
            &|layout| {
                let layer = (Descriptor { media_type: "text/plain".into(), ..good(layout).0 }, blob::sha256(b""));
                with_layers(layout, &[layer]);
            },
            "text/plain",
        );
        check(
            &|layout| {
                let layer = (Descriptor { digest: "sha256:../../x".into(), ..good(layout).0 }, blob::sha256(b""));
                with_layers(layout, &[layer]);
            },
            "unsupported digest",
        );
        let manifest = |text: &'static str, words: &str| {
            check(
                &|layout| {
                    let descriptor = layout.blob(text.as_bytes(), media_type::OCI_MANIFEST);
                    layout.tag("latest", descriptor);
                },
                words,
            );
        };
        manifest("[]", "not usable");
        manifest("{\"schemaVersion\":1}", "schema version 1");
        manifest("{\"schemaVersion\":2,\"manifests\":[],\"layers\":[]}", "both");
        manifest("{\"schemaVersion\":2,\"manifests\":[]}", "calls itself");
        manifest("{\"schemaVersion\":2}", "config");
        manifest(
            "{\"schemaVersion\":2,\"config\":{\"mediaType\":\"application/vnd.oci.empty.v1+json\",\"digest\":\"x\",\"size\":2},\"layers\":[]}",
            "not an image",
        );
    }

    #[test]
    fn the_own_store_comes_first_and_offline_means_offline() {
        let (_directory, context) = context();
        let name = "docker.io/library/app:latest";
        let look = || resolve_image(&ImageSource::Reference(name.into()), &platform("linux/amd64"), &context);
        assert!(matches!(look(), Err(SourceError::NotPulled { .. })));
        let config = ImageConfig { os: "linux".into(), architecture: "amd64".into(), ..ImageConfig::default() };
        let image = assemble(config, &[], None, Media::Oci, &Annotations::default());
        context.store.put_document(&image.config_bytes).unwrap();
        context.store.put_document(&image.manifest_bytes).unwrap();
        context.store.tag(name, &image.manifest_descriptor).unwrap();
        let found = look().unwrap();
        assert_eq!((found.origin, found.manifest_digest), (Origin::Store, image.manifest_descriptor.digest.clone()));
        let other = resolve_image(&ImageSource::Reference(name.into()), &platform("linux/arm64"), &context);
        assert!(matches!(other, Err(SourceError::NoSuchPlatform { .. })));
        let pinned = format!("other.io/app@{}", image.manifest_descriptor.digest);
        let source = ImageSource::Reference(pinned);
        assert!(resolve_image(&source, &platform("linux/amd64"), &context).is_ok());
        let source = ImageSource::Reference("app".into());
        let found = resolve_image(&source, &platform("linux/amd64"), &context);
        assert!(matches!(found, Err(SourceError::BadReference { .. })));
    }
}
