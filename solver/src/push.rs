//! Images into registries: which blobs go where, in which order, several at a time.
//!
//! Blobs first, then manifests, an index last: a tag never names something that is not all there. A blob that the repository
//! has is not sent; one that another repository of the same registry has is mounted. A base layer that is not in the store
//! is fetched only when both fail.

use crate::image::{Descriptor, Index, Manifest, media_type};
use crate::op::source::{self, Origin, ResolvedImage, SourceContext, SourceError};
use crate::registry::{BlobUpload, Client, Opened, RegistryError, RemoteImage, SendProgress, Uploaded};
use crate::store::{Store, StoreError};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Blobs that are sent at once.
const PARALLEL_BLOBS: usize = 4;
/// Indexes in indexes.
const NESTING_LIMIT: u32 = 4;

/// Why an image could not be pushed.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The registry failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A base layer could not be fetched.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A document in the store makes no sense.
    #[error("document {digest} is not usable: {reason}")]
    BadDocument {
        /// Which.
        digest: String,
        /// Why.
        reason: String,
    },
    /// A blob that the store does not have and nobody else.
    #[error("blob {digest} of the image is not in the store")]
    Missing {
        /// Which.
        digest: String,
    },
    /// Told to stop.
    #[error("interrupted")]
    Interrupted,
}

/// A configuration or layer to push.
#[derive(Debug, Clone)]
pub struct PushBlob {
    /// The blob.
    pub descriptor: Descriptor,
    /// The base image it belongs to, and its number there.
    pub base: Option<(Arc<ResolvedImage>, usize)>,
}

/// All that belongs to an image.
#[derive(Debug, Clone, Default)]
pub struct PushImage {
    /// Configurations and layers.
    pub blobs: Vec<PushBlob>,
    /// Manifests with their bytes, what refers to others behind them; the last is the root.
    pub manifests: Vec<(Descriptor, Vec<u8>)>,
    /// Repositories that are known to have blobs, by digest: places to mount them from.
    pub places: BTreeMap<String, Vec<RemoteImage>>,
}

/// What came of a push.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PushReport {
    /// Blobs that were there.
    pub present: usize,
    /// Blobs that were mounted.
    pub mounted: usize,
    /// Blobs that were sent.
    pub sent: usize,
    /// Their bytes.
    pub sent_bytes: u64,
}

/// Is told of blobs under way: digest, bytes so far, bytes in all.
pub type PushProgress<'a> = &'a (dyn Fn(&str, u64, u64) + Sync);

impl PushImage {
    /// Collects an image out of the store. An index needs all of its images: registries refuse it without.
    pub fn of_store(store: &Store, root: &Descriptor) -> Result<Self, PushError> {
        let mut image = Self::default();
        image.add(store, root, NESTING_LIMIT)?;
        for remembered in store.remembered_references()? {
            let Some(remote) = RemoteImage::parse(&remembered.reference) else { continue };
            for digest in known_blobs(store, &remembered.descriptor.digest, NESTING_LIMIT) {
                image.places.entry(digest).or_default().push(remote.clone());
            }
        }
        Ok(image)
    }

    fn add(&mut self, store: &Store, descriptor: &Descriptor, depth: u32) -> Result<(), PushError> {
        if self.manifests.iter().any(|(known, _)| known.digest == descriptor.digest) {
            return Ok(());
        }
        let bytes = store.read_document(&descriptor.digest)?;
        let bad = |reason: String| PushError::BadDocument { digest: descriptor.digest.clone(), reason };
        let mut descriptor = Descriptor { annotations: BTreeMap::new(), platform: None, ..descriptor.clone() };
        match serde_json::from_slice::<Manifest>(&bytes) {
            Ok(manifest) => {
                if descriptor.media_type.is_empty() {
                    descriptor.media_type.clone_from(&manifest.media_type);
                }
                let layers = manifest.layers.unwrap_or_default();
                for blob in std::iter::once(manifest.config).chain(layers) {
                    self.add_blob(PushBlob { descriptor: blob, base: None });
                }
            }
            Err(_) => {
                let index: Index = serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
                if depth == 0 {
                    return Err(bad("indexes in indexes in indexes".to_owned()));
                }
                if descriptor.media_type.is_empty() {
                    descriptor.media_type.clone_from(&index.media_type);
                }
                for nested in &index.manifests {
                    self.add(store, nested, depth - 1)?;
                }
            }
        }
        if descriptor.media_type.is_empty() {
            return Err(bad("it has no media type".to_owned()));
        }
        self.manifests.push((descriptor, bytes));
        Ok(())
    }

    /// Adds a blob unless it is known; what is known of its origin counts.
    pub fn add_blob(&mut self, blob: PushBlob) {
        match self.blobs.iter_mut().find(|known| known.descriptor.digest == blob.descriptor.digest) {
            Some(known) => known.base = known.base.take().or(blob.base),
            None => self.blobs.push(blob),
        }
    }

    /// What stands for the image.
    pub fn root(&self) -> Option<&Descriptor> {
        self.manifests.last().map(|(root, _)| root)
    }
}

/// Digests of the blobs of an image, as far as its documents are here: what is pulled for one platform is not there in
/// whole.
fn known_blobs(store: &Store, digest: &str, depth: u32) -> Vec<String> {
    let Ok(bytes) = store.read_document(digest) else { return Vec::new() };
    if let Ok(manifest) = serde_json::from_slice::<Manifest>(&bytes) {
        let layers = manifest.layers.unwrap_or_default();
        return layers.into_iter().map(|layer| layer.digest).collect();
    }
    let index = serde_json::from_slice::<Index>(&bytes).unwrap_or_default();
    let nested = index.manifests.iter().filter(|_| depth > 0);
    nested.flat_map(|image| known_blobs(store, &image.digest, depth - 1)).collect()
}

/// Pushes an image to all of `targets`; by its digest alone where a target has no tag. `stop` is asked between blobs.
pub fn push(
    image: &PushImage,
    targets: &[RemoteImage],
    sources: &SourceContext,
    progress: PushProgress<'_>,
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<PushReport, PushError> {
    let mut report = PushReport::default();
    let mut done: BTreeSet<(&str, &str)> = BTreeSet::new();
    for target in targets {
        let place = (target.host.as_str(), target.repository.as_str());
        if done.insert(place) {
            // What went to another repository of this registry a moment ago need not go again.
            let sibling = done.iter().find(|(host, repository)| *host == place.0 && *repository != place.1);
            let sibling = sibling.map(|(_, repository)| *repository);
            let one = push_blobs(image, target, sibling, sources, progress, stop)?;
            report.present += one.present;
            report.mounted += one.mounted;
            report.sent += one.sent;
            report.sent_bytes += one.sent_bytes;
            for (descriptor, bytes) in image.manifests.iter().rev().skip(1).rev() {
                put(&sources.client, target, None, descriptor, bytes)?;
            }
        }
        if stop() {
            return Err(PushError::Interrupted);
        }
        if let Some((root, bytes)) = image.manifests.last() {
            put(&sources.client, target, target.tag.as_deref(), root, bytes)?;
        }
    }
    Ok(report)
}

fn put(
    client: &Client,
    target: &RemoteImage,
    tag: Option<&str>,
    descriptor: &Descriptor,
    bytes: &[u8],
) -> Result<(), RegistryError> {
    let digest = tag.is_none().then(|| descriptor.digest.clone());
    let place = RemoteImage { tag: tag.map(str::to_owned), digest, ..target.clone() };
    client.put_manifest(&place, descriptor, bytes)
}

fn push_blobs(
    image: &PushImage,
    target: &RemoteImage,
    sibling: Option<&str>,
    sources: &SourceContext,
    progress: PushProgress<'_>,
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<PushReport, PushError> {
    // The largest first: the last one to begin should not be the longest.
    let mut blobs: Vec<&PushBlob> =
        image.blobs.iter().filter(|blob| !media_type::is_foreign(&blob.descriptor.media_type)).collect();
    blobs.sort_by_key(|blob| std::cmp::Reverse(blob.descriptor.size));
    let next = AtomicUsize::new(0);
    let state = Mutex::new((PushReport::default(), None::<PushError>));
    std::thread::scope(|scope| {
        for _ in 0..blobs.len().min(PARALLEL_BLOBS) {
            scope.spawn(|| {
                while let Some(blob) = blobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = match stop() {
                        true => Err(PushError::Interrupted),
                        false => push_blob(blob, target, from(image, blob, target, sibling), sources, progress),
                    };
                    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                    match result {
                        Ok(Uploaded::Present) => state.0.present += 1,
                        Ok(Uploaded::Mounted) => state.0.mounted += 1,
                        Ok(Uploaded::Sent) => {
                            state.0.sent += 1;
                            state.0.sent_bytes += blob.descriptor.size;
                        }
                        Err(error) => {
                            state.1.get_or_insert(error);
                            // Nobody begins another one.
                            next.store(blobs.len(), Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    match state.into_inner().unwrap_or_else(PoisonError::into_inner) {
        (_, Some(error)) => Err(error),
        (report, None) => Ok(report),
    }
}

/// A repository of the target's registry that is known, or may be expected, to have the blob.
fn from<'a>(
    image: &'a PushImage,
    blob: &'a PushBlob,
    target: &RemoteImage,
    sibling: Option<&'a str>,
) -> Option<&'a str> {
    let base = blob.base.as_ref().and_then(|(image, _)| match &image.origin {
        Origin::Registry(remote) => Some(remote),
        _ => None,
    });
    let known = base.into_iter().chain(image.places.get(&blob.descriptor.digest).into_iter().flatten());
    let mut near = known.filter(|remote| remote.host == target.host && remote.repository != target.repository);
    near.next().map(|remote| remote.repository.as_str()).or(sibling)
}

fn push_blob(
    blob: &PushBlob,
    target: &RemoteImage,
    from: Option<&str>,
    sources: &SourceContext,
    progress: PushProgress<'_>,
) -> Result<Uploaded, PushError> {
    let descriptor = &blob.descriptor;
    let sent = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let counter = sent.clone();
    let counting: SendProgress = Arc::new(move |bytes| counter.store(bytes, Ordering::Relaxed));
    let upload = BlobUpload { image: target, blob: descriptor, from, progress: Some(counting) };
    let client = &sources.client;
    if client.has_blob(&upload)? {
        return Ok(Uploaded::Present);
    }
    let opened = match client.open_upload(&upload)? {
        Opened::Mounted => return Ok(Uploaded::Mounted),
        Opened::Upload(opened) => opened,
    };
    if !sources.store.has_blob(&descriptor.digest, Some(descriptor.size)) {
        match &blob.base {
            Some((image, at)) => source::ensure_blob(image, *at, sources)?,
            None => return Err(PushError::Missing { digest: descriptor.digest.clone() }),
        }
    }
    let path = sources.store.blob_path(&descriptor.digest)?;
    // The display may be slow; the connection must not wait for it.
    let finished = std::sync::atomic::AtomicBool::new(false);
    let result = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut shown = None;
            while !finished.load(Ordering::Acquire) {
                let now = sent.load(Ordering::Relaxed);
                if shown != Some(now) {
                    progress(&descriptor.digest, now, descriptor.size);
                    shown = Some(now);
                }
                std::thread::park_timeout(std::time::Duration::from_millis(100));
            }
        });
        let result = client.upload(&upload, opened, &path);
        finished.store(true, Ordering::Release);
        watcher.thread().unpark();
        result
    });
    result?;
    progress(&descriptor.digest, descriptor.size, descriptor.size);
    Ok(Uploaded::Sent)
}
