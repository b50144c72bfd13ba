//! Snapshots: stacks of layers, and the three forms of each layer made when somebody asks.
//!
//! A [`Layer`] is known by its index. Its tree (a directory that overlayfs stacks) and its blob (the compressed tar) are
//! made on demand, once, whoever asks first; others wait for that one. Where the bytes come from depends on how the
//! layer came to be:
//!
//! | layer | bytes come from |
//! |---|---|
//! | of a base image | its blob: in the store, a layout directory or a registry |
//! | RUN | its tree, which is the upper directory of the step |
//! | COPY, ADD, WORKDIR, run now | the files it copies, read in place |
//! | COPY, ADD, WORKDIR, from the cache | tree or blob if there is one, else the copy is worked out again from its recipe |

use crate::cache::import::Imports;
use crate::context::ContextError;
use crate::image::Descriptor;
use crate::materialize::{self, Ownership};
use crate::op::copy::CopyError;
use crate::op::file::Recipe;
use crate::op::source::{self, Form, ImageLayer, ResolvedImage, SourceContext, SourceError};
use crate::op::unpacked::UnpackError;
use crate::plan::cache_key::Key;
use crate::sandbox::Cancel;
use crate::store::blob::BlobWriter;
use crate::store::chunks::{BlobChunks, KnownChunks};
use crate::store::layers::pulled_layer_id;
use crate::store::{Store, StoreError};
use crate::tree::blob::{BlobInfo, BlobOptions, ChunkCache, Codec, EarlyBlob, write_blob, write_early_blob};
use crate::tree::layer::{LayerError, Open, TarOptions};
use crate::tree::{ContentDigest, LayerId, Node, Origin, Tree};
use std::collections::{HashMap, VecDeque};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

/// A layer cannot be had in the form asked for.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A base image failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A download that serves as a context cannot be unpacked.
    #[error(transparent)]
    Unpack(#[from] Box<UnpackError>),
    /// Reading or writing a layer's tar failed.
    #[error("cannot write layer {layer}")]
    Layer {
        /// Which.
        layer: String,
        /// Why.
        source: LayerError,
    },
    /// Writing a layer's tree failed.
    #[error("cannot write the files of layer {layer}")]
    Materialize {
        /// Which.
        layer: String,
        /// Why.
        source: materialize::MaterializeError,
    },
    /// A copy could not be worked out again.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// The context could not be read again.
    #[error(transparent)]
    Context(#[from] ContextError),
    /// The context is not what it was when the step's key was made.
    #[error("`{path}` changed while the image was built")]
    Changed {
        /// Path in the image.
        path: String,
    },
    /// Neither tree nor blob nor recipe is there.
    #[error("the content of layer {0} is no longer in the store")]
    Gone(String),
    /// A file cannot be read.
    #[error("cannot read `{path}`")]
    Read {
        /// Which.
        path: String,
        /// Why.
        source: io::Error,
    },
}

impl From<UnpackError> for SnapshotError {
    fn from(error: UnpackError) -> Self {
        Self::Unpack(Box::new(error))
    }
}

/// One layer of a snapshot.
#[derive(Clone)]
pub struct Layer(Arc<LayerInner>);

struct LayerInner {
    id: LayerId,
    made: Made,
    /// With origins; set when somebody asked.
    tree: OnceLock<Arc<Tree>>,
    directory: OnceLock<PathBuf>,
    /// Held while a form is made.
    making: Mutex<()>,
}

/// How a layer came to be.
pub(crate) enum Made {
    /// Part of a base image: number `.1` of it.
    Image(Arc<ResolvedImage>, usize),
    /// By a step of this graph, now or earlier.
    Step(Option<Recipe>),
    /// By a step elsewhere. Its content is known by its key, and nothing of it is here.
    Elsewhere,
}

/// A stack of layers. Cheap to clone.
#[derive(Clone)]
pub struct Snapshot(Arc<SnapshotInner>);

struct SnapshotInner {
    parent: Option<Snapshot>,
    layer: Option<Layer>,
    content: Key,
    /// When the layer was made, in seconds since the epoch; `None` for those of base images.
    created: Option<i64>,
    /// All layers as one tree, as long as somebody has it.
    flat: Mutex<Weak<Tree>>,
}

impl Drop for SnapshotInner {
    /// Long chains would otherwise be dropped by recursion.
    fn drop(&mut self) {
        let mut next = self.parent.take();
        while let Some(Snapshot(inner)) = next {
            next = Arc::into_inner(inner).and_then(|mut inner| inner.parent.take());
        }
    }
}

impl Snapshot {
    /// The empty file system.
    pub fn scratch() -> Self {
        Self(Arc::new(SnapshotInner {
            parent: None,
            layer: None,
            content: Key::SCRATCH,
            created: None,
            flat: Mutex::default(),
        }))
    }

    /// This snapshot with a layer on top whose content key is `content`.
    pub(crate) fn with(&self, layer: Layer, content: &[u8; 32], created: Option<i64>) -> Self {
        Self(Arc::new(SnapshotInner {
            content: self.0.content.stacked(content),
            parent: Some(self.clone()),
            layer: Some(layer),
            created,
            flat: Mutex::default(),
        }))
    }

    /// Digest of what is in it, times left out.
    pub fn content(&self) -> Key {
        self.0.content
    }

    /// Can all of its layers be had? Of others only the content key is known. A cache may turn out to have lost a layer at
    /// any time.
    pub fn is_whole(&self) -> bool {
        self.chain().filter_map(|inner| inner.layer.as_ref()).all(Layer::is_there)
    }

    /// Its layers, lowest first.
    pub fn layers(&self) -> Vec<Layer> {
        let mut layers: Vec<Layer> = self.chain().filter_map(|inner| inner.layer.clone()).collect();
        layers.reverse();
        layers
    }

    /// When each of its layers was made, lowest first; `None` for those of base images. Seconds since the epoch.
    pub fn created(&self) -> Vec<Option<i64>> {
        let layers = self.chain().filter(|inner| inner.layer.is_some());
        let mut created: Vec<Option<i64>> = layers.map(|inner| inner.created).collect();
        created.reverse();
        created
    }

    /// Its topmost layer.
    pub(crate) fn top(&self) -> Option<&Layer> {
        self.chain().find_map(|inner| inner.layer.as_ref())
    }

    /// The snapshot that has the lowest `count` of these layers.
    pub(crate) fn lower(&self, count: usize) -> Option<Snapshot> {
        let mut left = self.layers().len();
        let mut at = Some(self);
        while let Some(snapshot) = at {
            if left == count {
                return Some(snapshot.clone());
            }
            left -= usize::from(snapshot.0.layer.is_some());
            at = snapshot.0.parent.as_ref();
        }
        None
    }

    /// From the top down.
    fn chain(&self) -> impl Iterator<Item = &SnapshotInner> {
        std::iter::successors(Some(&*self.0), |inner| inner.parent.as_ref().map(|parent| &*parent.0))
    }
}

impl Layer {
    /// Name in the store.
    pub fn id(&self) -> &LayerId {
        &self.0.id
    }

    /// The base image it belongs to, and its number there.
    pub fn image(&self) -> Option<(&Arc<ResolvedImage>, usize)> {
        match &self.0.made {
            Made::Image(image, at) => Some((image, *at)),
            Made::Step(_) | Made::Elsewhere => None,
        }
    }

    /// Can it be had at all, as far as is known?
    pub fn is_there(&self) -> bool {
        match &self.0.made {
            Made::Image(image, _) => image.lost().is_none(),
            Made::Step(_) => true,
            Made::Elsewhere => false,
        }
    }
}

/// A layer's blob and what it holds.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerBlob {
    /// As the manifest names it.
    pub descriptor: Descriptor,
    /// Digest of the uncompressed tar.
    pub diff_id: String,
}

/// How blobs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compression {
    /// Format.
    pub codec: Codec,
    /// Level; `None` is the codec's usual one.
    pub level: Option<u32>,
    /// No file time is later than this (seconds since the epoch).
    pub clamp_mtime: Option<i64>,
    /// Layers of base images, too, are written anew when their codec is another one.
    pub force: bool,
}

/// The store and the layers this build has met.
pub struct Workspace {
    /// Where everything is kept.
    pub store: Arc<Store>,
    /// Where base images come from.
    pub sources: SourceContext,
    /// Who owns files on disk.
    pub ownership: Ownership,
    /// Threads for compression.
    pub threads: usize,
    /// Caches of other machines.
    pub imports: Arc<Imports>,
    /// Layers cannot be stacked in the store, so that steps work on copies.
    pub(crate) copies: AtomicBool,
    cancel: Option<Cancel>,
    /// Images that steps run on, by the digests of their manifests. Held by who unpacks one.
    run_on: Mutex<HashMap<String, Arc<Mutex<()>>>>,
    layers: Mutex<HashMap<LayerId, Layer>>,
    /// What [`Workspace::flatten`] gave, the last used at the end.
    flats: Mutex<VecDeque<Arc<Tree>>>,
    /// Read when the first blob is written.
    chunks: OnceLock<KnownChunks>,
}

impl Workspace {
    /// A workspace on a store.
    pub fn new(sources: SourceContext) -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let (store, ownership) = (sources.store.clone(), sources.write.ownership);
        Self {
            store,
            sources,
            ownership,
            threads,
            imports: Arc::default(),
            copies: AtomicBool::new(false),
            cancel: None,
            run_on: Mutex::default(),
            layers: Mutex::default(),
            flats: Mutex::default(),
            chunks: OnceLock::new(),
        }
    }

    /// This workspace, with reading that fails once `cancel` is requested: that ends copies and exports half-way.
    pub fn with_cancel(mut self, cancel: Cancel) -> Self {
        self.cancel = Some(cancel);
        self
    }

    /// This workspace with caches of other machines.
    pub fn with_imports(mut self, imports: Arc<Imports>) -> Self {
        self.imports = imports;
        self
    }

    /// A layer's entries, if they are here.
    pub(crate) fn index_here(&self, layer: &Layer) -> Option<Arc<Tree>> {
        match layer.0.tree.get() {
            Some(tree) => Some(tree.clone()),
            None => self.store.layer(&layer.0.id).ok().map(Arc::new),
        }
    }

    /// A layer's entries as another machine's cache tells them. They are not kept: the store's own indexes were made of the
    /// layers that they describe.
    fn index_elsewhere(&self, layer: &Layer) -> Option<Tree> {
        let (image, at) = layer.image()?;
        if self.store.has_layer(&layer.0.id) {
            return None;
        }
        let index = self.imports.index(&image.layers[at].diff_id)?;
        // Whatever is wrong with it, the layer itself can be read.
        source::ensure_blob(&index, 0, &self.sources).ok()?;
        let mut bytes = Vec::new();
        self.store.open_blob(&index.layers[0].descriptor.digest).ok()?.read_to_end(&mut bytes).ok()?;
        crate::cache::decode_index(&bytes)
    }

    /// Steps will run on this image, if they are not cached. Who reads its layers unpacks them then: to read them again for
    /// that would take longer.
    pub(crate) fn will_run_on(&self, image: &ResolvedImage) {
        let mut run_on = self.run_on.lock().unwrap_or_else(PoisonError::into_inner);
        run_on.entry(image.manifest_digest.clone()).or_default();
    }

    /// Makes sure that an image's layers are there in this form, or unpacked where steps will run on it; the id of one. Of
    /// stages that want the same image, one unpacks it.
    fn ensure_layer(&self, image: &ResolvedImage, at: usize, form: Form) -> Result<LayerId, SnapshotError> {
        let run_on = self.run_on.lock().unwrap_or_else(PoisonError::into_inner).get(&image.manifest_digest).cloned();
        let _turn = run_on.as_ref().map(|lock| lock.lock().unwrap_or_else(PoisonError::into_inner));
        let form = if run_on.is_some() { Form::Tree } else { form };
        Ok(source::ensure_layers(image, form, &self.sources)?.swap_remove(at))
    }

    /// The snapshot of a base image. Nothing is fetched yet.
    pub fn image(&self, image: &Arc<ResolvedImage>) -> Snapshot {
        let mut snapshot = Snapshot::scratch();
        for (at, layer) in image.layers.iter().enumerate() {
            let id = self.store.layer_by_diff_id(&layer.diff_id);
            let id = id.unwrap_or_else(|| pulled_layer_id(&layer.diff_id));
            let content = blake3::hash(layer.diff_id.as_bytes());
            snapshot = snapshot.with(self.layer(id, Made::Image(image.clone(), at), None), content.as_bytes(), None);
        }
        snapshot
    }

    /// The layer of an image that has only this one. Nothing is fetched yet.
    pub(crate) fn layer_alone(&self, image: &Arc<ResolvedImage>) -> Option<Layer> {
        let diff_id = &image.layers.first()?.diff_id;
        let id = self.store.layer_by_diff_id(diff_id).unwrap_or_else(|| pulled_layer_id(diff_id));
        Some(self.layer(id, Made::Image(image.clone(), 0), None))
    }

    /// A layer of which only the content key is known.
    pub(crate) fn layer_elsewhere(&self, content: &[u8; 32]) -> Layer {
        self.layer(LayerId(format!("elsewhere-{}", Key(*content).hex()).into()), Made::Elsewhere, None)
    }

    /// Are the entries of all layers at hand, so that nothing need be fetched to look at them?
    pub(crate) fn is_indexed(&self, snapshot: &Snapshot) -> bool {
        snapshot
            .chain()
            .filter_map(|inner| inner.layer.as_ref())
            .all(|layer| layer.is_there() && (layer.0.tree.get().is_some() || self.store.has_layer(&layer.0.id)))
    }

    /// The layer of this name, one object a process, so that its forms are made once.
    pub(crate) fn layer(&self, id: LayerId, made: Made, tree: Option<Arc<Tree>>) -> Layer {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        // A step that has made what a cache has lost gives it anew.
        let known = layers.get(&id).filter(|known| known.is_there() || !matches!(made, Made::Step(_))).cloned();
        let layer = known.unwrap_or_else(|| {
            let inner = LayerInner {
                id: id.clone(),
                made,
                tree: OnceLock::new(),
                directory: OnceLock::new(),
                making: Mutex::new(()),
            };
            Layer(Arc::new(inner))
        });
        layers.insert(id, layer.clone());
        if let Some(tree) = tree {
            let _ = layer.0.tree.set(tree);
        }
        layer
    }

    /// The layer's entries, each with where its bytes are.
    pub fn tree(&self, layer: &Layer) -> Result<Arc<Tree>, SnapshotError> {
        if let Some(tree) = layer.0.tree.get() {
            return Ok(tree.clone());
        }
        let located = |tree: Tree| layer.0.tree.get_or_init(|| Arc::new(tree.in_layer(&layer.0.id))).clone();
        if let Some(tree) = self.index_elsewhere(layer) {
            return Ok(located(tree));
        }
        let id = match &layer.0.made {
            Made::Image(image, at) => self.ensure_layer(image, *at, Form::Index)?,
            Made::Step(_) => layer.0.id.clone(),
            Made::Elsewhere => return Err(SnapshotError::Gone(layer.0.id.0.to_string())),
        };
        Ok(located(self.store.layer(&id)?))
    }

    /// All layers of a snapshot as one tree.
    pub fn flatten(&self, snapshot: &Snapshot) -> Result<Arc<Tree>, SnapshotError> {
        let mut pending = Vec::new();
        let mut at = Some(snapshot);
        let mut flat: Option<Arc<Tree>> = None;
        while let Some(snapshot) = at {
            flat = snapshot.0.flat.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
            if flat.is_some() {
                break;
            }
            pending.extend(snapshot.0.layer.as_ref());
            at = snapshot.0.parent.as_ref();
        }
        let mut flat = flat.unwrap_or_default();
        for layer in pending.into_iter().rev() {
            flat = Arc::new(flat.apply(&*self.tree(layer)?));
        }
        *snapshot.0.flat.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&flat);
        self.keep_flat(&flat);
        Ok(flat)
    }

    /// Keeps the flattened trees that were used last: every step of a long build has one of its own, about as large as
    /// the base.
    fn keep_flat(&self, flat: &Arc<Tree>) {
        const AT_LEAST: usize = 4;
        const NODES: usize = 200_000;
        let mut kept = self.flats.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|other| !Arc::ptr_eq(other, flat));
        kept.push_back(flat.clone());
        while kept.len() > AT_LEAST && kept.iter().map(|tree| tree.len()).sum::<usize>() > NODES {
            kept.pop_front();
        }
    }

    /// Opens a file's bytes.
    pub fn open(&self, node: &Node) -> io::Result<Box<dyn Read + Send>> {
        self.open_whole(node).map(|reader| self.stoppable(reader))
    }

    pub(crate) fn stoppable(&self, reader: Box<dyn Read + Send>) -> Box<dyn Read + Send> {
        match &self.cancel {
            None => reader,
            Some(cancel) => Box::new(Stoppable { reader, cancel: cancel.clone() }),
        }
    }

    fn open_whole(&self, node: &Node) -> io::Result<Box<dyn Read + Send>> {
        match &node.origin {
            Origin::None => Ok(Box::new(io::empty())),
            Origin::Inline(bytes) => Ok(Box::new(io::Cursor::new(bytes.clone()))),
            Origin::File(file) => open_regular(&file.whole()),
            Origin::Layer(id, path) => {
                let layer = self.layers.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned();
                let layer = layer.ok_or_else(|| io::Error::other(SnapshotError::Gone(id.0.to_string())))?;
                let directory = self.tree_dir(&layer).map_err(io::Error::other)?;
                open_regular(&directory.join(OsStr::from_bytes(path)))
            }
        }
    }

    /// Reads a small file (passwd, group) whole; at most 16 MiB.
    pub fn read_small(&self, node: &Node) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.open(node)?.take(16 << 20).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads a file whole: an archive to unpack, or users and groups.
    pub fn read_whole(&self, node: &Node) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.open(node)?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Is there a directory of the layer already?
    pub(crate) fn has_tree_dir(&self, layer: &Layer) -> bool {
        layer.0.directory.get().is_some() || self.store.tree_dir(&layer.0.id).is_some()
    }

    /// The layer as a directory; makes it when there is none.
    pub fn tree_dir(&self, layer: &Layer) -> Result<PathBuf, SnapshotError> {
        if let Some(directory) = layer.0.directory.get() {
            return Ok(directory.clone());
        }
        let _making = layer.0.making.lock().unwrap_or_else(PoisonError::into_inner);
        let directory = match self.store.tree_dir(&layer.0.id) {
            Some(directory) => directory,
            None => match &layer.0.made {
                Made::Image(image, at) => {
                    let id = self.ensure_layer(image, *at, Form::Tree)?;
                    self.store.tree_dir(&id).ok_or_else(|| SnapshotError::Gone(id.0.to_string()))?
                }
                Made::Step(recipe) => self.make_tree(layer, recipe.as_ref())?,
                Made::Elsewhere => return Err(SnapshotError::Gone(layer.0.id.0.to_string())),
            },
        };
        Ok(layer.0.directory.get_or_init(|| directory).clone())
    }

    fn make_tree(&self, layer: &Layer, recipe: Option<&Recipe>) -> Result<PathBuf, SnapshotError> {
        let tree = self.readable(layer, recipe)?;
        let name = &layer.0.id.0;
        self.prepare(&tree)?;
        let staging = self.store.begin_tree()?;
        let read = |node: &Node| self.open(node).map(|reader| reader as Box<dyn Read>);
        materialize::write_tree(&tree, &read, &staging, self.sources.write)
            .map_err(|source| SnapshotError::Materialize { layer: name.to_string(), source })?;
        Ok(self.store.commit_tree(&staging, &layer.0.id)?)
    }

    /// Makes the directories that files of this tree are read from. Whoever reads them in a pool of threads calls this
    /// first: a directory is written by the same pool, and would wait for itself.
    pub fn prepare(&self, tree: &Tree) -> Result<(), SnapshotError> {
        for id in tree.layers() {
            let layer = self.layers.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
            // A layer that nobody knows is told where its file is read.
            if let Some(layer) = layer {
                self.tree_dir(&layer)?;
            }
        }
        Ok(())
    }

    /// The layer's entries with origins that can be read although it has no tree.
    fn readable(&self, layer: &Layer, recipe: Option<&Recipe>) -> Result<Arc<Tree>, SnapshotError> {
        let name = &layer.0.id.0;
        let tree = self.tree(layer)?;
        if !tree.layers().contains(&layer.0.id) {
            return Ok(tree);
        }
        let again = match recipe {
            Some(recipe) => recipe.carry_out(self)?,
            None => return Err(SnapshotError::Gone(name.to_string())),
        };
        let mut changed = None;
        let tree = tree.map(|node| {
            if matches!(&node.origin, Origin::Layer(id, _) if *id == layer.0.id) {
                let found = again.get(&node.entry.path).filter(|other| other.entry.kind == node.entry.kind);
                match found {
                    Some(found) => node.origin = found.origin,
                    None => drop(changed.get_or_insert_with(|| node.entry.path.clone())),
                }
            }
            changed.is_none()
        });
        match changed {
            Some(path) => Err(SnapshotError::Changed { path: String::from_utf8_lossy(&path).into_owned() }),
            None => Ok(Arc::new(tree)),
        }
    }

    /// Can the layer's bytes be had? A record whose layer has lost them is no hit.
    pub(crate) fn is_whole(&self, id: &LayerId, recipe: bool) -> bool {
        self.store.has_layer(id) && (recipe || self.store.tree_dir(id).is_some())
    }

    /// The blob that a base layer came as, if it may stay as it is; the store need not have it.
    pub fn original_blob(&self, layer: &Layer, compression: Compression) -> Option<LayerBlob> {
        let (image, at) = layer.image().filter(|_| layer.is_there())?;
        let layer = &image.layers[at];
        let stays = !compression.force || is_codec(layer, compression.codec);
        stays.then(|| LayerBlob { descriptor: layer.descriptor.clone(), diff_id: layer.diff_id.clone() })
    }

    /// The blob that was made of the layer, if the store has it.
    fn made_blob(&self, layer: &Layer, compression: Compression) -> Option<LayerBlob> {
        let Compression { codec, level, clamp_mtime, .. } = compression;
        let memo = self.store.blob_memo(&layer.0.id, codec, level, clamp_mtime)?;
        self.store.has_blob(&memo.digest, Some(memo.size_bytes)).then(|| layer_blob(memo))
    }

    /// The layer's blob, if the store has it.
    pub(crate) fn blob_here(&self, layer: &Layer, compression: Compression) -> Option<LayerBlob> {
        let original = self.original_blob(layer, compression);
        let here = |blob: &LayerBlob| self.store.has_blob(&blob.descriptor.digest, Some(blob.descriptor.size));
        original.filter(here).or_else(|| self.made_blob(layer, compression))
    }

    /// The layer as a blob in the store; makes it when there is none, and writes it to `also` while it does: all of it
    /// or, when it was there already, nothing.
    pub fn blob(
        &self,
        layer: &Layer,
        compression: Compression,
        mut also: Option<&mut dyn AlsoTo>,
    ) -> Result<LayerBlob, SnapshotError> {
        let recipe = match &layer.0.made {
            Made::Image(image, at) if !compression.force || is_codec(&image.layers[*at], compression.codec) => {
                source::ensure_blob(image, *at, &self.sources)?;
                let layer = &image.layers[*at];
                return Ok(LayerBlob { descriptor: layer.descriptor.clone(), diff_id: layer.diff_id.clone() });
            }
            Made::Image(..) => {
                self.tree_dir(layer)?;
                None
            }
            Made::Step(recipe) => recipe.as_ref(),
            Made::Elsewhere => return Err(SnapshotError::Gone(layer.0.id.0.to_string())),
        };
        let Compression { codec, level, clamp_mtime, .. } = compression;
        let name = &layer.0.id.0;
        let known = || self.made_blob(layer, compression);
        if let Some(blob) = known() {
            return Ok(blob);
        }
        // The directory first: it takes the same lock.
        let tree = match self.store.tree_dir(&layer.0.id) {
            None => self.readable(layer, recipe)?,
            Some(_) => self.tree(layer)?,
        };
        self.prepare(&tree)?;
        let _making = layer.0.making.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(blob) = known() {
            return Ok(blob);
        }
        let directory = self.store.tree_dir(&layer.0.id);
        let open = |node: &Node| match (&node.origin, &directory) {
            (Origin::Layer(id, path), Some(directory)) if *id == layer.0.id => {
                open_regular(&directory.join(OsStr::from_bytes(path))).map(|reader| self.stoppable(reader))
            }
            _ => self.open(node),
        };
        let options = BlobOptions { tar: TarOptions { clamp_mtime }, codec, level, threads: self.threads };
        let mut write = |chunks: Option<&BlobChunks<'_>>| -> Result<BlobInfo, SnapshotError> {
            if let Some(also) = &mut also {
                also.restart();
            }
            let mut out = Both { blob: self.store.trusting_blob_writer()?, also: also.as_deref_mut() };
            let info = write_blob(&tree, &open, &options, chunks.map(|chunks| chunks as &dyn ChunkCache), &mut out)
                .map_err(|source| SnapshotError::Layer { layer: name.to_string(), source })?;
            out.blob.commit(Some(&info.digest))?;
            Ok(info)
        };
        let begin = || self.chunks.get_or_init(|| self.store.known_chunks()).blob();
        let mut chunks = (codec != Codec::None).then(begin);
        let mut info = write(chunks.as_ref());
        if let Err(SnapshotError::Layer { source: LayerError::Remembered, .. }) = info {
            chunks = None;
            info = write(None);
        }
        let info = info?;
        if let Some(chunks) = chunks {
            self.store.put_chunks(&info.digest, chunks);
        }
        self.store.set_blob_memo(&layer.0.id, codec, level, clamp_mtime, &info)?;
        Ok(layer_blob(info))
    }

    /// Writes a layer's blob, and to `also`, before the layer has a name. `open` gives files that are read for the first time;
    /// see [`write_early_blob`]. `None` when this fails in any way.
    pub(crate) fn early_blob(
        &self,
        tree: &Tree,
        open: &Open<'_>,
        compression: Compression,
        also: Option<&mut dyn AlsoTo>,
    ) -> Option<UnclaimedBlob> {
        let Compression { codec, level, clamp_mtime, .. } = compression;
        self.prepare(tree).ok()?;
        let options = BlobOptions { tar: TarOptions { clamp_mtime }, codec, level, threads: self.threads };
        let mut out = Both { blob: self.store.trusting_blob_writer().ok()?, also };
        let blob = write_early_blob(tree, open, &options, &mut out).ok()?;
        Some(UnclaimedBlob { blob, writer: out.blob, options })
    }

    /// Keeps a blob. `tree` is what was written, now with the digests of all files.
    pub(crate) fn keep_blob(&self, unclaimed: UnclaimedBlob, tree: &Tree) -> Result<MadeBlob, SnapshotError> {
        let UnclaimedBlob { blob, writer, options } = unclaimed;
        let info = blob.info.clone();
        let mut chunks = None;
        if options.codec != Codec::None {
            let table = self.chunks.get_or_init(|| self.store.known_chunks()).blob();
            blob.remember(tree, &options, &table)
                .map_err(|source| SnapshotError::Layer { layer: info.diff_id.clone(), source })?;
            chunks = Some(table);
        }
        writer.commit(Some(&info.digest))?;
        if let Some(chunks) = chunks {
            self.store.put_chunks(&info.digest, chunks);
        }
        Ok(MadeBlob { info, options })
    }

    /// Remembers a blob as that of a layer.
    pub(crate) fn adopt_blob(&self, layer: &Layer, made: MadeBlob) -> Result<LayerBlob, SnapshotError> {
        let MadeBlob { info, options: BlobOptions { codec, level, tar: TarOptions { clamp_mtime }, .. } } = made;
        self.store.set_blob_memo(&layer.0.id, codec, level, clamp_mtime, &info)?;
        Ok(layer_blob(info))
    }
}

/// A layer's blob before its layer is known. Dropped, it leaves nothing.
pub(crate) struct UnclaimedBlob {
    blob: EarlyBlob,
    writer: BlobWriter,
    options: BlobOptions,
}

impl UnclaimedBlob {
    /// Digests of the files that were read, by their number in the tree. As large as the tree: they are given once.
    pub(crate) fn take_digests(&mut self) -> Vec<(usize, ContentDigest)> {
        std::mem::take(&mut self.blob.digests)
    }

    /// Size of the blob.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.blob.info.size_bytes
    }
}

/// A blob in the store that no layer is known for yet.
pub(crate) struct MadeBlob {
    info: BlobInfo,
    options: BlobOptions,
}

/// Takes a blob beside the store.
pub trait AlsoTo: Write {
    /// The blob comes from its first byte on, whatever came before.
    fn restart(&mut self);
}

/// A blob on its way to two places.
struct Both<'a, 'b> {
    blob: BlobWriter,
    also: Option<&'a mut (dyn AlsoTo + 'b)>,
}

impl Write for Both<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.blob.write_all(bytes)?;
        if let Some(also) = &mut self.also {
            also.write_all(bytes)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn layer_blob(info: BlobInfo) -> LayerBlob {
    let descriptor = Descriptor {
        media_type: info.media_type.to_owned(),
        digest: info.digest,
        size: info.size_bytes,
        ..Descriptor::default()
    };
    LayerBlob { descriptor, diff_id: info.diff_id }
}

/// Is the layer's blob in this codec already?
fn is_codec(layer: &ImageLayer, codec: Codec) -> bool {
    let media_type = layer.descriptor.media_type.as_str();
    let found = match media_type {
        text if text.ends_with("gzip") => Codec::Gzip,
        text if text.ends_with("zstd") => Codec::Zstd,
        _ => Codec::None,
    };
    found == codec
}

/// Reads until told to stop.
struct Stoppable {
    reader: Box<dyn Read + Send>,
    cancel: Cancel,
}

impl Read for Stoppable {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.cancel.is_cancelled() {
            // Not of the kind `Interrupted`, which means "try again".
            return Err(io::Error::other("interrupted"));
        }
        self.reader.read(buffer)
    }
}

/// Opens a file for reading; never waits on a pipe that took its place.
fn open_regular(path: &Path) -> io::Result<Box<dyn Read + Send>> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no longer a regular file"));
    }
    Ok(Box::new(file))
}
