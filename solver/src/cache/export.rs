//! Writing caches: which steps and which of their layers, and the documents.

use super::import::Hit;
use super::{CONFIG_TYPE, Document, Entry, INDEX_TYPE, bare, deduplicated, encode_files, encode_index};
use crate::image::{Assembled, Descriptor, Manifest, media_type, to_json};
use crate::op::source::ResolvedImage;
use crate::plan::cache_key::Key;
use crate::snapshot::{Layer, LayerBlob, Snapshot, Workspace};
use crate::store::blob::{DOCUMENT_LIMIT_BYTES, sha256};
use crate::store::record::{Part, Record, RecordBlob};
use crate::store::{Store, StoreError};
use crate::tree::{LayerId, Tree};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// Which layers a cache has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheMode {
    /// Those of the image. Of other stages' steps only the records.
    Min,
    /// Those of all steps.
    Max,
}

/// What a step gave, wherever it came from.
#[derive(Clone)]
pub struct StepResult {
    /// Cache key.
    pub key: Key,
    /// Cache key made of whole inputs.
    pub inputs_key: Option<Key>,
    /// Identities of the step that do not depend on the machine.
    pub steps: [String; 2],
    /// What the key was made of.
    pub parts: Vec<Part>,
    /// Content key of the layer.
    pub content: [u8; 32],
    /// When it was made.
    pub created: i64,
    /// How long it took.
    pub duration_ms: u64,
    /// The layer.
    pub layer: Layer,
    /// Files that the step selected.
    pub files: Option<Tree>,
    /// The record that it came from, if that was in another machine's cache.
    pub hit: Option<Hit>,
}

/// Why a cache could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// More records than any reader takes.
    #[error("its records take {size} bytes, more than {DOCUMENT_LIMIT_BYTES}")]
    TooLarge {
        /// How large.
        size: u64,
    },
}

/// The layers that belong to a cache of these steps.
pub fn layers(steps: &[StepResult], results: &[&Snapshot], mode: CacheMode) -> Vec<Layer> {
    let wanted: HashSet<LayerId> =
        results.iter().flat_map(|snapshot| snapshot.layers()).map(|layer| layer.id().clone()).collect();
    let mut seen = HashSet::new();
    let layers = steps.iter().map(|step| &step.layer).filter(|layer| layer.is_there());
    let layers = layers.filter(|layer| mode == CacheMode::Max || wanted.contains(layer.id()));
    layers.filter(|layer| seen.insert(layer.id().clone())).cloned().collect()
}

/// The records, with those layers whose blobs are known.
pub fn document(steps: &[StepResult], blobs: &HashMap<LayerId, LayerBlob>) -> Document {
    let entries = steps.iter().map(|step| {
        let blob = blobs.get(step.layer.id());
        Entry {
            key: step.key.hex(),
            inputs_key: step.inputs_key.map(|key| key.hex()),
            steps: step.steps.to_vec(),
            parts: step.parts.clone(),
            content_key: Key(step.content).hex(),
            created: step.created,
            duration_ms: step.duration_ms,
            diff_id: blob.map(|blob| blob.diff_id.clone()),
            blob: blob.map(|blob| blob.descriptor.digest.clone()),
            files: step.files.as_ref().and_then(|files| encode_files(&bare(files))),
        }
    });
    Document::new(deduplicated(entries.collect()))
}

/// The records for an image's own configuration: nothing that differs from one run to the next.
pub fn inline_document(steps: &[StepResult], layers: &[Layer], diff_ids: &[String], epoch: Option<i64>) -> Document {
    let diff_ids: HashMap<&LayerId, &String> = layers.iter().map(Layer::id).zip(diff_ids).collect();
    let mut document = document(steps, &HashMap::new());
    let by_key: HashMap<String, &LayerId> = steps.iter().map(|step| (step.key.hex(), step.layer.id())).collect();
    for entry in &mut document.entries {
        entry.duration_ms = 0;
        entry.created = epoch.unwrap_or(entry.created);
        entry.files = None;
        entry.diff_id = by_key.get(&entry.key).and_then(|id| diff_ids.get(id)).map(|id| (*id).clone());
    }
    document
}

/// Blobs with indexes of layers, by diff ID, and where those that are not here can be had.
pub type Indexes = BTreeMap<String, (Descriptor, Option<Arc<ResolvedImage>>)>;

/// Indexes of layers as blobs: of those layers whose index can be had without fetching the layer.
pub fn indexes(workspace: &Workspace, layers: &[(Layer, String)]) -> Result<Indexes, StoreError> {
    let mut indexes = BTreeMap::new();
    for (layer, diff_id) in layers {
        if indexes.contains_key(diff_id) {
            continue;
        }
        if let Some(bytes) = workspace.index_here(layer).and_then(|tree| encode_index(&bare(&tree))) {
            let (digest, size) = workspace.store.write_blob(None, &mut bytes.as_slice())?;
            let descriptor = Descriptor { media_type: INDEX_TYPE.to_owned(), digest, size, ..Descriptor::default() };
            indexes.insert(diff_id.clone(), (descriptor, None));
        } else if let Some(image) = workspace.imports.index(diff_id).filter(|image| image.lost().is_none())
            && let Some(blob) = image.layers.first()
        {
            indexes.insert(diff_id.clone(), (blob.descriptor.clone(), Some(image)));
        }
    }
    Ok(indexes)
}

/// The manifest and the records of a cache, as an image whose configuration they are.
pub fn assemble(document: &Document, blobs: Vec<LayerBlob>, indexes: &[Descriptor]) -> Result<Assembled, CacheError> {
    let mut document = document.clone();
    let mut config_bytes = document.to_json();
    if config_bytes.len() as u64 > DOCUMENT_LIMIT_BYTES {
        // Lists of files only explain; without them there are the records all the same.
        document.entries.iter_mut().for_each(|entry| entry.files = None);
        config_bytes = document.to_json();
    }
    if config_bytes.len() as u64 > DOCUMENT_LIMIT_BYTES {
        return Err(CacheError::TooLarge { size: config_bytes.len() as u64 });
    }
    let describe = |bytes: &[u8], media_type: &str| Descriptor {
        media_type: media_type.to_owned(),
        digest: sha256(bytes),
        size: bytes.len() as u64,
        ..Descriptor::default()
    };
    let config_descriptor = describe(&config_bytes, CONFIG_TYPE);
    let mut seen = HashSet::new();
    let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
    for blob in blobs.into_iter().filter(|blob| seen.insert(blob.descriptor.digest.clone())) {
        layers.push(Descriptor { annotations: BTreeMap::new(), platform: None, ..blob.descriptor });
        diff_ids.push(blob.diff_id);
    }
    for index in indexes.iter().filter(|index| seen.insert(index.digest.clone())) {
        layers.push(index.clone());
    }
    let manifest = Manifest {
        schema_version: 2,
        media_type: media_type::OCI_MANIFEST.to_owned(),
        config: config_descriptor.clone(),
        layers: Some(layers.clone()),
        annotations: BTreeMap::new(),
    };
    let manifest_bytes = to_json(&manifest);
    let manifest_descriptor = describe(&manifest_bytes, media_type::OCI_MANIFEST);
    Ok(Assembled {
        config_bytes,
        config_descriptor,
        manifest_bytes,
        manifest_descriptor,
        layers,
        diff_ids,
        created: None,
    })
}

/// Makes the store's own records of those that came from elsewhere and whose layers are here by now, so that the next
/// build need not ask for them.
pub fn keep(steps: &[StepResult], local_steps: &[[String; 2]], store: &Store) -> Result<(), StoreError> {
    for (step, names) in steps.iter().zip(local_steps) {
        let Some(image) = step.hit.as_ref().and_then(|hit| hit.layer.as_ref()) else { continue };
        let Some(layer) = image.layers.first() else { continue };
        let id = store.layer_by_diff_id(&layer.diff_id).filter(|id| store.tree_dir(id).is_some());
        let blob = store.has_blob(&layer.descriptor.digest, Some(layer.descriptor.size));
        if id.is_none() && !blob {
            continue;
        }
        store.put_record(&Record {
            version: crate::store::record::RECORD_VERSION,
            key: step.key.hex(),
            steps: names.to_vec(),
            parts: step.parts.clone(),
            layer: Some(id.unwrap_or_else(|| step.layer.id().clone())),
            content_key: Key(step.content).hex(),
            created: step.created,
            duration_ms: step.duration_ms,
            blob: blob.then(|| RecordBlob { descriptor: layer.descriptor.clone(), diff_id: layer.diff_id.clone() }),
            extra: BTreeMap::new(),
        })?;
    }
    Ok(())
}
