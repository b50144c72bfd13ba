//! What the store holds, what needs it, and how to be rid of the rest.
//!
//! *Items* are what a user of the cache asks for: records, base images by reference, files by address, cache mounts, digests of
//! contexts, logs. Each has a time of its last use, and needs *objects*: layers and blobs. What a name in `index.json` needs
//! is never removed. Without the exclusive lock nothing is: builds hold it shared.
//!
//! Items go before the objects they need, and a directory gets another name before it is emptied: whenever this ends, what
//! is left under its final name is whole, and what was half removed is in `tmp/`, where the next process finds it.

use super::{Store, StoreError, blob, check_version, open_lock};
use crate::image::{Descriptor, Index, Manifest};
use crate::materialize::remove_tree;
use crate::store::record::Record;
use crate::store::refs::RememberedReference;
use nacre_frontend::image_config::ImageConfig;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// A use is noted once in this time.
const USE_GRAIN: Duration = Duration::from_secs(600);
/// Pause between two looks at the lock.
const LOCK_PAUSE: Duration = Duration::from_millis(100);

/// What a file or directory of the store is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Layers: indexes and trees.
    Layers,
    /// Blobs: documents, compressed layers, files.
    Blobs,
    /// Records of steps.
    Records,
    /// What references meant.
    References,
    /// What is known of files by address.
    Files,
    /// Repositories and checkouts of them.
    Repositories,
    /// Cache mounts.
    Mounts,
    /// Digests of contexts.
    Contexts,
    /// Output of steps.
    Logs,
    /// Everything else: the store's own files.
    Other,
}

impl Kind {
    /// Plural noun.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Layers => "layers",
            Kind::Blobs => "blobs",
            Kind::Records => "records",
            Kind::References => "references",
            Kind::Files => "files",
            Kind::Repositories => "repositories",
            Kind::Mounts => "mounts",
            Kind::Contexts => "contexts",
            Kind::Logs => "logs",
            Kind::Other => "other",
        }
    }
}

/// Number and size of things.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amount {
    /// How many.
    pub count: u64,
    /// Bytes on disk, as `du` counts them.
    pub bytes: u64,
}

/// What a store holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    /// By kind.
    pub kinds: BTreeMap<Kind, Amount>,
    /// Bytes on disk in all.
    pub total_bytes: u64,
    /// Of these, what no name of an image needs.
    pub unnamed_bytes: u64,
}

/// What to remove.
#[derive(Debug, Clone, Default)]
pub struct PruneOptions {
    /// All of the cache, not only what newer results have replaced.
    pub all: bool,
    /// Only what was last used before this.
    pub unused_since: Option<SystemTime>,
    /// Stop as soon as the store is no larger; all of the cache may go for that, longest unused first.
    pub keep_bytes: Option<u64>,
}

/// What was removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pruned {
    /// By kind.
    pub removed: BTreeMap<Kind, Amount>,
    /// Bytes that are free now.
    pub freed_bytes: u64,
    /// What could not be removed, and why.
    pub left: Vec<String>,
}

/// A store that nobody else uses.
#[derive(Debug)]
pub struct ExclusiveStore {
    root: PathBuf,
    _lock: File,
}

/// Notes that something was used: its file's time is the time of its last use.
pub(super) fn note_use(path: &Path) {
    let now = SystemTime::now();
    let recent = |modified: SystemTime| now.duration_since(modified).is_ok_and(|age| age < USE_GRAIN);
    if fs::metadata(path).and_then(|metadata| metadata.modified()).is_ok_and(recent) {
        return;
    }
    // A use that is not noted costs a step that runs again one day.
    let _ = File::options().write(true).open(path).and_then(|file| file.set_modified(now));
}

/// Adds up sizes; what has several names counts once.
#[derive(Default)]
struct Disk {
    seen: HashSet<(u64, u64)>,
}

impl Disk {
    /// Bytes on disk of a file or directory with all that is in it.
    fn usage(&mut self, path: &Path) -> u64 {
        let Ok(metadata) = fs::symlink_metadata(path) else { return 0 };
        if (metadata.nlink() > 1 && !metadata.is_dir()) && !self.seen.insert((metadata.dev(), metadata.ino())) {
            return 0;
        }
        let mut bytes = metadata.blocks() * 512;
        if metadata.is_dir() {
            let mut pending = vec![path.to_owned()];
            while let Some(directory) = pending.pop() {
                for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                    let Ok(metadata) = entry.metadata() else { continue };
                    let several = metadata.nlink() > 1 && !metadata.is_dir();
                    if several && !self.seen.insert((metadata.dev(), metadata.ino())) {
                        continue;
                    }
                    bytes += metadata.blocks() * 512;
                    if metadata.is_dir() {
                        pending.push(entry.path());
                    }
                }
            }
        }
        bytes
    }
}

/// A layer or blob: directory of the store and name.
type Object = (&'static str, String);

/// Something of the cache.
struct Item {
    kind: Kind,
    path: PathBuf,
    used: SystemTime,
    needs: BTreeSet<Object>,
    /// Something newer stands in its place.
    replaced: bool,
}

/// Reads the store as a graph.
struct Survey<'a> {
    root: &'a Path,
    /// What images with names need.
    pinned: BTreeSet<Object>,
    /// Their layers, which can be made of that again.
    named: BTreeSet<Object>,
    items: Vec<Item>,
}

impl<'a> Survey<'a> {
    fn new(root: &'a Path) -> Result<Self, StoreError> {
        let mut survey = Survey { root, pinned: BTreeSet::new(), named: BTreeSet::new(), items: Vec::new() };
        let path = root.join("index.json");
        match fs::read(&path) {
            Ok(bytes) => {
                // Names that cannot be read pin nothing; better to stop than to take what they need.
                let index: Index = serde_json::from_slice(&bytes)
                    .map_err(|error| StoreError::Damaged { path, reason: error.to_string() })?;
                let (mut pinned, mut diff_ids) = (BTreeSet::new(), Vec::new());
                for entry in &index.manifests {
                    survey.image(entry, &mut pinned, &mut diff_ids, 5);
                }
                let mut named = BTreeSet::new();
                survey.unpacked(&diff_ids, &mut named);
                (survey.pinned, survey.named) = (pinned, named);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(StoreError::io("read", &path)(error)),
        }
        survey.records();
        survey.references();
        survey.files();
        for repository in entries(&root.join("git")) {
            for path in entries(&repository).into_iter().filter(|path| path.is_dir()) {
                let (used, needs) = (newest(&path), BTreeSet::new());
                survey.items.push(Item { kind: Kind::Repositories, path, used, needs, replaced: false });
            }
        }
        for (part, kind) in [("mounts", Kind::Mounts), ("context", Kind::Contexts), ("logs", Kind::Logs)] {
            for path in entries(&root.join(part)) {
                let used = newest(&path);
                survey.items.push(Item { kind, path, used, needs: BTreeSet::new(), replaced: kind == Kind::Logs });
            }
        }
        survey.items.sort_by_key(|item| item.used);
        Ok(survey)
    }

    /// An image's documents and blobs; its diff IDs.
    fn image(&self, descriptor: &Descriptor, needs: &mut BTreeSet<Object>, diff_ids: &mut Vec<String>, depth: u32) {
        let Ok(digits) = blob::digest_hex(&descriptor.digest) else { return };
        if !needs.insert(("blobs/sha256", digits.to_owned())) || depth == 0 {
            return;
        }
        let path = self.root.join("blobs/sha256").join(digits);
        let Ok(bytes) = blob::read_document(&path, &descriptor.digest) else { return };
        if let Ok(manifest) = serde_json::from_slice::<Manifest>(&bytes) {
            for part in std::iter::once(&manifest.config).chain(manifest.layers.iter().flatten()) {
                needs.extend(blob::digest_hex(&part.digest).map(|digits| ("blobs/sha256", digits.to_owned())));
            }
            let config = blob::digest_hex(&manifest.config.digest).ok().and_then(|digits| {
                blob::read_document(&self.root.join("blobs/sha256").join(digits), &manifest.config.digest).ok()
            });
            let config = config.and_then(|bytes| serde_json::from_slice::<ImageConfig>(&bytes).ok());
            diff_ids.extend(config.and_then(|config| config.rootfs.diff_ids).unwrap_or_default());
        } else if let Ok(index) = serde_json::from_slice::<Index>(&bytes) {
            for nested in &index.manifests {
                self.image(nested, needs, diff_ids, depth - 1);
            }
        }
    }

    /// A layer, and the blobs that are known to be made of it.
    fn layer(&self, id: &str, needs: &mut BTreeSet<Object>) {
        #[derive(serde::Deserialize)]
        struct Memo {
            digest: Option<String>,
            descriptor: Option<Descriptor>,
        }
        if super::check_name(id).is_err() || !needs.insert(("layers", id.to_owned())) {
            return;
        }
        for path in entries(&self.root.join("layers").join(id)) {
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let memo = fs::read(path).ok().and_then(|bytes| serde_json::from_slice::<Memo>(&bytes).ok());
            let digest = memo.and_then(|memo| memo.digest.or(memo.descriptor.map(|descriptor| descriptor.digest)));
            let digits = digest.and_then(|digest| blob::digest_hex(&digest).ok().map(str::to_owned));
            needs.extend(digits.map(|digits| ("blobs/sha256", digits)));
        }
    }

    /// The layers of an image that was unpacked, or made here.
    fn unpacked(&self, diff_ids: &[String], needs: &mut BTreeSet<Object>) {
        for diff_id in diff_ids {
            self.layer(&super::layers::pulled_layer_id(diff_id).0, needs);
            let known = blob::digest_hex(diff_id).ok().map(|digits| self.root.join("diff-ids").join(digits));
            if let Some(id) = known.and_then(|path| fs::read_to_string(path).ok()) {
                self.layer(&id, needs);
            }
        }
    }

    fn records(&mut self) {
        let mut newest_keys = HashSet::new();
        for path in entries(&self.root.join("steps")) {
            newest_keys.extend(fs::read_to_string(path).ok());
        }
        for path in entries(&self.root.join("records")) {
            let record = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Record>(&bytes).ok());
            let mut needs = BTreeSet::new();
            if let Some(layer) = record.as_ref().and_then(|record| record.layer.as_ref()) {
                self.layer(&layer.0, &mut needs);
            }
            let blob = record.as_ref().and_then(|record| record.blob.as_ref());
            let digits = blob.and_then(|blob| blob::digest_hex(&blob.descriptor.digest).ok());
            needs.extend(digits.map(|digits| ("blobs/sha256", digits.to_owned())));
            let replaced = record.is_none_or(|record| !newest_keys.contains(&record.key));
            self.items.push(Item { kind: Kind::Records, used: modified(&path), path, needs, replaced });
        }
    }

    fn references(&mut self) {
        for path in entries(&self.root.join("references")) {
            let remembered =
                fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<RememberedReference>(&bytes).ok());
            let mut needs = BTreeSet::new();
            let replaced = remembered.is_none();
            if let Some(remembered) = remembered {
                let mut diff_ids = Vec::new();
                self.image(&remembered.descriptor, &mut needs, &mut diff_ids, 5);
                self.unpacked(&diff_ids, &mut needs);
            }
            self.items.push(Item { kind: Kind::References, used: modified(&path), path, needs, replaced });
        }
    }

    fn files(&mut self) {
        #[derive(serde::Deserialize)]
        struct Memo {
            digest: String,
        }
        for path in entries(&self.root.join("http")) {
            let memo = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Memo>(&bytes).ok());
            let digits = memo.and_then(|memo| blob::digest_hex(&memo.digest).ok().map(str::to_owned));
            let replaced = digits.is_none();
            let needs = digits.map(|digits| ("blobs/sha256", digits)).into_iter().collect();
            self.items.push(Item { kind: Kind::Files, used: modified(&path), path, needs, replaced });
        }
    }

    /// All objects, needed or not.
    fn objects(&self) -> Vec<Object> {
        let name = |path: PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned());
        let all = |part: &'static str| {
            entries(&self.root.join(part)).into_iter().filter_map(name).map(move |name| (part, name))
        };
        all("layers").chain(all("blobs/sha256")).collect()
    }
}

pub(super) fn entries(directory: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

fn modified(path: &Path) -> SystemTime {
    fs::symlink_metadata(path).and_then(|metadata| metadata.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// The newest of a directory and what is right in it.
fn newest(path: &Path) -> SystemTime {
    entries(path).iter().map(|path| modified(path)).fold(modified(path), SystemTime::max)
}

fn object_kind(object: &Object) -> Kind {
    if object.0 == "layers" { Kind::Layers } else { Kind::Blobs }
}

/// Adds up what a store holds. Others may use it meanwhile; then the sums are of no single moment.
pub fn usage(store: &Store) -> Result<Usage, StoreError> {
    let survey = Survey::new(&store.root)?;
    let mut usage = Usage::default();
    let mut disk = Disk::default();
    let mut add = |kind: Kind, count: u64, bytes: u64| {
        let amount = usage.kinds.entry(kind).or_default();
        amount.count += count;
        amount.bytes += bytes;
        usage.total_bytes += bytes;
    };
    let mut unnamed = 0;
    for object in survey.objects() {
        let bytes = disk.usage(&store.root.join(object.0).join(&object.1));
        unnamed += if survey.pinned.contains(&object) { 0 } else { bytes };
        add(object_kind(&object), 1, bytes);
    }
    for item in &survey.items {
        let bytes = disk.usage(&item.path);
        unnamed += bytes;
        add(item.kind, 1, bytes);
    }
    // The rest: everything but what was added up.
    let parts = ["layers", "records", "references", "http", "mounts", "context", "logs"];
    let own = |path: &Path| fs::symlink_metadata(path).map_or(0, |metadata| metadata.blocks() * 512);
    let mut other = own(&store.root);
    for path in entries(&store.root) {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        other += match name.as_str() {
            "blobs" => own(&path) + own(&path.join("sha256")),
            // Our own directory is gone when somebody looks.
            "tmp" => {
                let mine = store.own_tmp();
                let others = entries(&path).into_iter().filter(|path| Some(path) != mine.as_ref());
                own(&path) + others.map(|path| disk.usage(&path)).sum::<u64>()
            }
            // A lock is all that is left of each when it is not used any more.
            "git" => {
                let left = |repository: PathBuf| own(&repository) + own(&repository.join("lock"));
                own(&path) + entries(&path).into_iter().map(left).sum::<u64>()
            }
            // Counted entry by entry above.
            name if parts.contains(&name) => own(&path),
            _ => disk.usage(&path),
        };
    }
    add(Kind::Other, 0, other);
    usage.unnamed_bytes = unnamed;
    Ok(usage)
}

impl ExclusiveStore {
    /// Opens a store that is there for nobody but us. Waits for running builds; `wait` is told of that again and again
    /// and ends it by `false`. `None` when there is no store, or waiting was ended.
    pub fn open(path: &Path, wait: &dyn Fn() -> bool) -> Result<Option<Self>, StoreError> {
        let root = match path.canonicalize() {
            Ok(root) => root,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::io("open", path)(error)),
        };
        if !root.join("version").exists() {
            // Never empty a directory that is no store.
            let entry = entries(&root).first().and_then(|path| path.file_name().map(|name| name.to_owned()));
            return match entry {
                None => Ok(None),
                Some(entry) => Err(StoreError::NotAStore { path: root, entry: entry.to_string_lossy().into_owned() }),
            };
        }
        check_version(&root)?;
        let lock_path = root.join("lock");
        let lock = open_lock(&lock_path)?;
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(Some(Self { root, _lock: lock })),
                Err(TryLockError::WouldBlock) if wait() => std::thread::sleep(LOCK_PAUSE),
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(StoreError::io("lock", &lock_path)(error)),
            }
        }
    }

    /// The store's directory.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Removes what may go. `stop` is asked between removals.
    pub fn prune(&self, options: &PruneOptions, stop: &dyn Fn() -> bool) -> Result<Pruned, StoreError> {
        let survey = Survey::new(&self.root)?;
        let before = Disk::default().usage(&self.root);
        let mut disk = Disk::default();
        let mut sizes: BTreeMap<Object, u64> = BTreeMap::new();
        for object in survey.objects() {
            let bytes = disk.usage(&self.root.join(object.0).join(&object.1));
            sizes.insert(object, bytes);
        }
        let mut users: BTreeMap<&Object, u64> = BTreeMap::new();
        // An image that is kept is to stay unpacked, unless all or much is to go.
        let whole_cache = options.all || options.keep_bytes.is_some();
        let named = survey.named.iter().filter(|_| !whole_cache);
        for object in survey.items.iter().flat_map(|item| &item.needs).chain(&survey.pinned).chain(named) {
            *users.entry(object).or_default() += 1;
        }
        let mut pruned = Pruned::default();
        let old = |used: SystemTime| options.unused_since.is_none_or(|since| used < since);
        // Nobody needs these. With a limit of time they must be that old, too: they may be somebody's next base.
        let mut size = before;
        let mut doomed: Vec<Object> = Vec::new();
        for (object, bytes) in &sizes {
            if !users.contains_key(object) && old(modified(&self.root.join(object.0).join(&object.1))) {
                doomed.push(object.clone());
                size = size.saturating_sub(*bytes);
            }
        }
        // What nobody needs frees the most for the least, so it goes first whatever is to be kept.
        for item in &survey.items {
            let enough = options.keep_bytes.is_some_and(|keep| size <= keep);
            let may_go = whole_cache || item.replaced;
            // Waiting for the mounts' next use costs more than any record: they go only when all is to go.
            let mount = matches!(item.kind, Kind::Mounts | Kind::Contexts) && !whole_cache;
            if enough || !may_go || mount || !old(item.used) {
                continue;
            }
            if stop() {
                break;
            }
            let bytes = Disk::default().usage(&item.path);
            if !self.remove(&item.path, item.kind, bytes, &mut pruned) {
                continue;
            }
            size = size.saturating_sub(bytes);
            for object in &item.needs {
                let Some(count) = users.get_mut(object) else { continue };
                *count -= 1;
                if *count == 0 && sizes.contains_key(object) {
                    size = size.saturating_sub(sizes[object]);
                    doomed.push(object.clone());
                }
            }
        }
        // Layers before blobs: a layer's tree can be made of its blob again, but nothing makes the blob.
        doomed.sort_by_key(|object| (object.0 != "layers", object.1.clone()));
        for object in &doomed {
            if stop() {
                break;
            }
            let path = self.root.join(object.0).join(&object.1);
            self.remove(&path, object_kind(object), sizes.get(object).copied().unwrap_or_default(), &mut pruned);
        }
        self.tidy();
        pruned.freed_bytes = before.saturating_sub(Disk::default().usage(&self.root));
        Ok(pruned)
    }

    fn remove(&self, path: &Path, kind: Kind, bytes: u64, pruned: &mut Pruned) -> bool {
        let doomed = self.root.join("tmp").join(format!("pruned-{}", rustix::process::getpid().as_raw_nonzero()));
        let result = fs::rename(path, &doomed)
            .map_err(|error| error.to_string())
            .and_then(|()| remove_tree(&doomed).map_err(|error| error.to_string()));
        match result {
            Ok(()) => {
                let amount = pruned.removed.entry(kind).or_default();
                amount.count += 1;
                amount.bytes += bytes;
                true
            }
            Err(reason) => {
                pruned.left.push(format!("{}: {reason}", path.display()));
                false
            }
        }
    }

    /// Removes names of things that are gone, and what dead processes left: nobody else is alive here.
    fn tidy(&self) {
        let gone =
            |part: &str, text: &str| super::check_name(text).is_err() || !self.root.join(part).join(text).exists();
        for (part, target) in [("steps", "records"), ("diff-ids", "layers"), ("content", "layers")] {
            for path in entries(&self.root.join(part)) {
                if fs::read_to_string(&path).map_or(true, |text| gone(target, &text)) {
                    let _ = fs::remove_file(&path);
                }
            }
        }
        for path in entries(&self.root.join("chunks")) {
            if path.file_name().is_none_or(|name| !self.root.join("blobs/sha256").join(name).exists()) {
                let _ = fs::remove_file(&path);
            }
        }
        for path in entries(&self.root.join("tmp")) {
            if path.file_name().is_some_and(|name| name != ".lock") {
                let _ = remove_tree(&path);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::{Part, RECORD_VERSION};
    use super::super::temporary;
    use super::*;
    use crate::image::{Annotations, Media, assemble};
    use crate::tree::{Entry, LayerId, Node, Origin, Tree};

    fn layer(store: &Store, name: &str) -> LayerId {
        let tree = Tree::from_nodes(vec![Node { entry: Entry::dir(name, 0o755), origin: Origin::None }]);
        let id = store.put_layer(tree).unwrap();
        let staging = store.begin_tree().unwrap();
        fs::create_dir(staging.join(name)).unwrap();
        fs::write(staging.join(name).join("file"), vec![1; 100_000]).unwrap();
        store.commit_tree(&staging, &id).unwrap();
        id
    }

    fn record(store: &Store, key: &str, step: &str, layer: &LayerId, age: u64) {
        let record = Record {
            version: RECORD_VERSION,
            key: key.into(),
            steps: vec![step.into()],
            parts: vec![Part { name: "command".into(), value: key.into() }],
            layer: Some(layer.clone()),
            content_key: "aa".into(),
            created: 0,
            duration_ms: 0,
            blob: None,
            extra: BTreeMap::new(),
        };
        store.put_record(&record).unwrap();
        let file = File::options().write(true).open(store.root.join("records").join(key)).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
    }

    fn exclusive(directory: &Path) -> ExclusiveStore {
        super::super::exclusive(&directory.join("store"))
    }

    #[test]
    fn usage_agrees_with_du() {
        let (_directory, store) = temporary();
        let id = layer(&store, "a");
        record(&store, "k", "s", &id, 0);
        store.write_blob(None, &mut &vec![7; 50_000][..]).unwrap();
        let file = store.root.join("layers").join(&*id.0).join("tree/a/file");
        fs::hard_link(&file, store.root.join("logs/linked")).unwrap();
        let usage = usage(&store).unwrap();
        let mine = store.own_tmp().expect("something was written");
        let output = std::process::Command::new("du")
            .args(["-s", "-B1", "--exclude"])
            .arg(mine.file_name().unwrap())
            .arg(&store.root)
            .output()
            .unwrap();
        let expected: u64 =
            String::from_utf8(output.stdout).unwrap().split_whitespace().next().unwrap().parse().unwrap();
        assert_eq!(usage.total_bytes, expected, "{usage:?}");
        assert_eq!(usage.kinds.values().map(|amount| amount.bytes).sum::<u64>(), expected);
        assert_eq!(usage.kinds[&Kind::Layers].count, 1);
    }

    #[test]
    fn nobody_prunes_while_builds_run() {
        let (directory, store) = temporary();
        let path = directory.path().join("store");
        assert!(ExclusiveStore::open(&path, &|| false).unwrap().is_none());
        drop(store);
        let held = exclusive(directory.path());
        assert!(File::open(path.join("lock")).unwrap().try_lock_shared().is_err());
        drop(held);
        assert!(ExclusiveStore::open(&directory.path().join("none"), &|| false).unwrap().is_none());
        fs::create_dir(directory.path().join("other")).unwrap();
        fs::write(directory.path().join("other/precious"), "").unwrap();
        assert!(ExclusiveStore::open(&directory.path().join("other"), &|| false).is_err());
    }

    #[test]
    fn replaced_results_go_and_names_keep_what_they_need() {
        let (directory, store) = temporary();
        let (old, new, orphan) = (layer(&store, "old"), layer(&store, "new"), layer(&store, "orphan"));
        record(&store, "k1", "s", &old, 100);
        record(&store, "k2", "s", &new, 50);
        let (layer_digest, size) = store.write_blob(None, &mut &b"layer"[..]).unwrap();
        let descriptor = Descriptor { digest: layer_digest.clone(), size, ..Descriptor::default() };
        let config = ImageConfig { os: "linux".into(), architecture: "amd64".into(), ..ImageConfig::default() };
        let diff_id = blob::sha256(b"tar");
        let image = assemble(config, &[(descriptor, diff_id)], None, Media::Oci, &Annotations::default());
        for bytes in [&image.config_bytes, &image.manifest_bytes] {
            store.put_document(bytes).unwrap();
        }
        store.tag("localhost/app:1", &image.manifest_descriptor).unwrap();
        let (garbage, _) = store.write_blob(None, &mut &b"garbage"[..]).unwrap();
        for digest in [&garbage, &layer_digest] {
            store.put_chunks(digest, store.known_chunks().blob());
        }
        drop(store);
        let exclusive = exclusive(directory.path());
        let exists = |part: &str, name: &str| exclusive.root.join(part).join(name).exists();
        let blob = |digest: &str| exists("blobs/sha256", blob::digest_hex(digest).unwrap());

        let since = Some(SystemTime::now() - Duration::from_secs(3600));
        let nothing =
            exclusive.prune(&PruneOptions { unused_since: since, ..PruneOptions::default() }, &|| false).unwrap();
        assert_eq!(nothing.removed, BTreeMap::new());

        let pruned = exclusive.prune(&PruneOptions::default(), &|| false).unwrap();
        assert!(exists("records", "k2") && exists("layers", &new.0), "the newest of its step");
        assert!(!exists("records", "k1") && !exists("layers", &old.0) && !exists("layers", &orphan.0));
        assert!(!blob(&garbage) && blob(&layer_digest));
        let chunks = |digest: &str| exists("chunks", blob::digest_hex(digest).unwrap());
        assert!(!chunks(&garbage) && chunks(&layer_digest));
        assert_eq!(pruned.removed[&Kind::Layers].count, 2);
        assert!(pruned.freed_bytes >= 200_000 && pruned.left.is_empty(), "{pruned:?}");

        exclusive.prune(&PruneOptions { all: true, ..PruneOptions::default() }, &|| false).unwrap();
        assert!(!exists("records", "k2") && !exists("layers", &new.0) && !exists("steps", "s"));
        for digest in [&layer_digest, &image.config_descriptor.digest, &image.manifest_descriptor.digest] {
            assert!(blob(digest), "a name needs it");
        }
    }

    #[test]
    fn the_longest_unused_goes_first() {
        let (directory, store) = temporary();
        let layers: Vec<LayerId> = ["a", "b", "c"].iter().map(|name| layer(&store, name)).collect();
        for (number, layer) in layers.iter().enumerate() {
            record(&store, &format!("k{number}"), &format!("s{number}"), layer, [2000, 3000, 1000][number]);
        }
        // Used: its time is now.
        assert!(store.get_record("k1").unwrap().is_some());
        let total = usage(&store).unwrap().total_bytes;
        drop(store);
        let exclusive = exclusive(directory.path());
        let keep = total - 50_000;
        exclusive.prune(&PruneOptions { keep_bytes: Some(keep), ..PruneOptions::default() }, &|| false).unwrap();
        let left: Vec<bool> = (0..3).map(|number| exclusive.root.join(format!("records/k{number}")).exists()).collect();
        assert_eq!(left, [false, true, true]);
        assert!(Disk::default().usage(&exclusive.root) <= keep);
    }
}
