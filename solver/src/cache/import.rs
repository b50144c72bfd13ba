//! Reading caches: records at the first miss, layers when they are needed.

#[cfg(feature = "s3")]
use super::bucket::{Bucket, BucketError};
use super::{CONFIG_TYPE, Document, Entry, INDEX_TYPE, INLINE_MEMBER, decode_files};
use crate::image::{Descriptor, Index, Manifest, media_type};
use crate::op::source::{
    Cached, ImageLayer, Lookup, Origin, ResolvedImage, SourceContext, SourceError, in_one_line, layout_roots,
};
use crate::plan::cache_key::Key;
use crate::registry::{RegistryError, RemoteImage};
use crate::tree::Tree;
use nacre_frontend::image_config::ImageConfig;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

/// What BuildKit calls its records.
const BUILDKIT_CONFIG_TYPE: &str = "application/vnd.buildkit.cacheconfig.v0";
/// Where BuildKit puts records into an image's configuration.
const BUILDKIT_INLINE_MEMBER: &str = "moby.buildkit.cache.v0";
/// Images of one index that are looked at for records.
const IMAGES_LIMIT: usize = 32;

/// Where a cache is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheSource {
    /// In a registry: a cache, or an image with records inside.
    Registry(RemoteImage),
    /// In a layout directory.
    Layout {
        /// The directory.
        path: PathBuf,
        /// Which of its caches; `latest` if neither tag nor digest is given.
        tag: Option<String>,
        /// Which of its caches.
        digest: Option<String>,
    },
    /// In a bucket.
    #[cfg(feature = "s3")]
    Bucket(Bucket),
}

impl std::fmt::Display for CacheSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Registry(remote) => remote.fmt(f),
            #[cfg(feature = "s3")]
            Self::Bucket(bucket) => bucket.fmt(f),
            Self::Layout { path, tag, digest } => {
                path.display().fmt(f)?;
                if let Some(tag) = tag {
                    write!(f, ":{tag}")?;
                }
                digest.as_ref().map_or(Ok(()), |digest| write!(f, "@{digest}"))
            }
        }
    }
}

/// Caches to read from, in the order in which they are asked.
#[derive(Default)]
pub struct Imports {
    sources: Vec<CacheSource>,
    loaded: OnceLock<Records>,
}

/// The result of a step as a cache has it.
#[derive(Clone)]
pub struct Hit {
    /// What is recorded.
    pub entry: Arc<Entry>,
    /// The layer, as an image of one layer; `None` when the cache only says what it is.
    pub layer: Option<Arc<ResolvedImage>>,
}

impl Hit {
    /// The files that the step selected, if they are recorded.
    pub fn files(&self) -> Option<Tree> {
        self.entry.files.as_deref().and_then(decode_files)
    }
}

#[derive(Default)]
struct Records {
    by_key: HashMap<String, Hit>,
    by_inputs: HashMap<String, Hit>,
    by_step: HashMap<String, Hit>,
    /// Blobs with indexes of layers, by diff ID.
    indexes: HashMap<String, Arc<ResolvedImage>>,
}

/// What one cache holds.
#[derive(Default)]
struct Cache {
    hits: Vec<Hit>,
    indexes: Vec<(String, Arc<ResolvedImage>)>,
}

impl Cache {
    fn extend(&mut self, other: Cache) {
        self.hits.extend(other.hits);
        self.indexes.extend(other.indexes);
    }
}

impl Records {
    /// What is known already stays, unless it has no layer and this has.
    fn add(&mut self, hit: Hit) {
        let put = |map: &mut HashMap<String, Hit>, key: &str| match map.get(key) {
            Some(known) if known.layer.is_some() || hit.layer.is_none() => {}
            _ => drop(map.insert(key.to_owned(), hit.clone())),
        };
        put(&mut self.by_key, &hit.entry.key);
        if let Some(key) = &hit.entry.inputs_key {
            put(&mut self.by_inputs, key);
        }
        for step in &hit.entry.steps {
            self.by_step.entry(step.clone()).or_insert_with(|| hit.clone());
        }
    }
}

impl Imports {
    /// Caches in order. Nothing is read before somebody asks for a record.
    pub fn new(sources: Vec<CacheSource>) -> Self {
        Self { sources, loaded: OnceLock::new() }
    }

    /// The record of a key. `warn` is told of caches that cannot be read, once.
    pub fn find(&self, key: &Key, context: &SourceContext, warn: &dyn Fn(String)) -> Option<Hit> {
        self.records(context, warn).by_key.get(&key.hex()).cloned()
    }

    /// The record of a key made of whole inputs.
    pub fn find_by_inputs(&self, key: &Key, context: &SourceContext, warn: &dyn Fn(String)) -> Option<Hit> {
        self.records(context, warn).by_inputs.get(&key.hex()).cloned()
    }

    /// Is there a record of a step, whatever its key? Records are fetched for it.
    pub fn has_step(&self, step: &str, context: &SourceContext, warn: &dyn Fn(String)) -> bool {
        self.records(context, warn).by_step.contains_key(step)
    }

    /// A record of a step, whatever its key. Nothing is fetched for it.
    pub fn last_of_step(&self, step: &str) -> Option<Hit> {
        self.loaded.get()?.by_step.get(step).cloned()
    }

    /// The index of a layer, as an image of one blob. Nothing is fetched for it.
    pub fn index(&self, diff_id: &str) -> Option<Arc<ResolvedImage>> {
        self.loaded.get()?.indexes.get(diff_id).cloned()
    }

    /// How many of their blobs could not be had.
    pub fn lost(&self) -> usize {
        let records = self.loaded.get();
        let layers =
            records.into_iter().flat_map(|records| records.by_key.values()).filter_map(|hit| hit.layer.as_ref());
        let indexes = records.into_iter().flat_map(|records| records.indexes.values());
        layers.chain(indexes).filter(|blob| blob.lost().is_some()).count()
    }

    fn records(&self, context: &SourceContext, warn: &dyn Fn(String)) -> &Records {
        self.loaded.get_or_init(|| {
            let mut records = Records::default();
            let results: Vec<_> = std::thread::scope(|scope| {
                let started: Vec<_> =
                    self.sources.iter().map(|source| scope.spawn(move || load(source, context))).collect();
                started.into_iter().map(|thread| thread.join()).collect()
            });
            for (source, result) in self.sources.iter().zip(results) {
                match result {
                    Ok(Ok(cache)) => {
                        cache.hits.into_iter().for_each(|hit| records.add(hit));
                        for (diff_id, index) in cache.indexes {
                            records.indexes.entry(diff_id).or_insert(index);
                        }
                    }
                    Ok(Err(reason)) => warn(format!("cache {source} is not used: {reason}")),
                    Err(_) => warn(format!("cache {source} is not used: internal error")),
                }
            }
            records
        })
    }
}

/// All records of a cache; the error is a sentence.
fn load(source: &CacheSource, context: &SourceContext) -> Result<Cache, String> {
    let (origin, root, bytes) = open(source, context).map_err(|error| match error {
        SourceError::Registry(RegistryError::NotFound { .. }) => "it does not exist (yet)".to_owned(),
        #[cfg(feature = "s3")]
        SourceError::Bucket(BucketError::NotFound { .. }) => "it does not exist (yet)".to_owned(),
        error => in_one_line(&error),
    })?;
    let name = source.to_string();
    let lookup = Lookup { name: &name, origin: &origin, context };
    let mut cache = Cache::default();
    if let Ok(manifest) = serde_json::from_slice::<Manifest>(&bytes) {
        cache.extend(records_of(&lookup, &manifest, &root.digest)?);
    } else {
        let index: Index = serde_json::from_slice(&bytes).map_err(|_| "it is neither a manifest nor an index")?;
        let foreign = |descriptor: &&Descriptor| descriptor.media_type.contains("buildkit");
        if index.manifests.iter().any(|descriptor| foreign(&descriptor)) {
            return Err(format!("it is a {}", by_buildkit("cache")));
        }
        let images = index.manifests.iter().filter(|descriptor| media_type::is_manifest(&descriptor.media_type));
        for descriptor in images.take(IMAGES_LIMIT) {
            let bytes = lookup.document(descriptor, false).map_err(|error| in_one_line(&error))?;
            let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
            // One of an index's images may have records, and another, of attestations, none.
            cache.extend(records_of(&lookup, &manifest, &descriptor.digest).unwrap_or_default());
        }
    }
    if cache.hits.is_empty() {
        return Err("it has no records".to_owned());
    }
    Ok(cache)
}

fn by_buildkit(what: &str) -> String {
    format!("{what} of BuildKit's ({BUILDKIT_CONFIG_TYPE}), which nacre does not read: write one with --cache-to")
}

fn open(source: &CacheSource, context: &SourceContext) -> Result<(Origin, Descriptor, Vec<u8>), SourceError> {
    match source {
        CacheSource::Registry(remote) => {
            if context.offline {
                return Err(RegistryError::Offline { what: remote.to_string() }.into());
            }
            let (bytes, root) = context.client.manifest(remote)?;
            Ok((Origin::Registry(remote.clone()), root, bytes))
        }
        #[cfg(feature = "s3")]
        CacheSource::Bucket(bucket) => {
            if context.offline {
                return Err(RegistryError::Offline { what: bucket.to_string() }.into());
            }
            let bytes = bucket.manifest(&context.client)?;
            let root = Descriptor {
                digest: crate::store::blob::sha256(&bytes),
                size: bytes.len() as u64,
                ..Descriptor::default()
            };
            Ok((Origin::Bucket(bucket.clone()), root, bytes))
        }
        CacheSource::Layout { path, tag, digest } => {
            let text = path.display().to_string();
            let tag = tag.as_deref().or(digest.is_none().then_some("latest"));
            let (_, roots) = layout_roots(&text, tag, digest.as_deref())?;
            let origin = Origin::Layout(path.clone());
            let root = roots.into_iter().next().unwrap_or_default();
            let bytes = Lookup { name: &text, origin: &origin, context }.document(&root, false)?;
            Ok((origin, root, bytes))
        }
    }
}

fn records_of(lookup: &Lookup<'_>, manifest: &Manifest, digest: &str) -> Result<Cache, String> {
    let config_type = manifest.config.media_type.as_str();
    if config_type == BUILDKIT_CONFIG_TYPE {
        return Err(format!("it is a {}", by_buildkit("cache")));
    }
    let inline = media_type::is_config(config_type);
    if !inline && config_type != CONFIG_TYPE {
        return Err(format!("its configuration is {config_type}"));
    }
    let bytes = lookup.document(&manifest.config, true).map_err(|error| in_one_line(&error))?;
    let layers = manifest.layers.as_deref().unwrap_or_default();
    // Layers of a cache are named by their blobs, those of an image by their diff IDs.
    let (document, diff_ids) = if inline {
        let config: ImageConfig = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
        let Some(records) = config.other.get(INLINE_MEMBER) else {
            return match config.other.contains_key(BUILDKIT_INLINE_MEMBER) {
                true => Err(format!("its {}", by_buildkit("records"))),
                false => Err("the image has no records in it".to_owned()),
            };
        };
        let diff_ids = config.rootfs.diff_ids.unwrap_or_default();
        (Document::parse(records.to_string().as_bytes())?, diff_ids)
    } else {
        (Document::parse(&bytes)?, Vec::new())
    };
    let blobs: HashMap<&str, &Descriptor> = match inline {
        true => diff_ids.iter().map(String::as_str).zip(layers).collect(),
        false => layers.iter().map(|layer| (layer.digest.as_str(), layer)).collect(),
    };
    let unreachable = Arc::default();
    let alone = |descriptor: &Descriptor, diff_id: &str| {
        let layer = ImageLayer { descriptor: descriptor.clone(), diff_id: diff_id.to_owned() };
        let cached = Cached::new(&unreachable, descriptor.media_type == INDEX_TYPE);
        let name = format!("cache {}", lookup.name);
        Arc::new(layer_alone(name, digest, layer, lookup.origin.clone(), cached))
    };
    let index = |(diff_id, name): (&String, &String)| {
        let blob = blobs.get(name.as_str()).filter(|blob| blob.media_type == INDEX_TYPE)?;
        Some((diff_id.clone(), alone(blob, diff_id)))
    };
    let indexes = document.indexes.iter().filter_map(index).collect();
    let hits = document.entries.into_iter().map(|entry| {
        let name = if inline { &entry.diff_id } else { &entry.blob };
        let blob = name.as_deref().and_then(|name| blobs.get(name));
        let blob = blob.filter(|blob| media_type::is_layer(&blob.media_type));
        let layer = blob.zip(entry.diff_id.as_ref()).map(|(blob, diff_id)| alone(blob, diff_id));
        Hit { entry: Arc::new(entry), layer }
    });
    Ok(Cache { hits: hits.collect(), indexes })
}

/// A layer as an image, which knows where to get it.
pub(crate) fn layer_alone(
    name: String,
    digest: &str,
    layer: ImageLayer,
    origin: Origin,
    cached: Cached,
) -> ResolvedImage {
    let config = ImageConfig::default();
    ResolvedImage {
        name,
        platform: nacre_frontend::llb::Platform {
            os: config.os.clone(),
            architecture: config.architecture.clone(),
            variant: config.variant.clone(),
        },
        config,
        config_bytes: Vec::new(),
        root_digest: digest.to_owned(),
        manifest_digest: digest.to_owned(),
        layers: vec![layer],
        origin,
        cached: Some(cached),
    }
}
