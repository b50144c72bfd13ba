//! Looks whether a store is what it should be: every blob, index, tree, record and name.
//!
//! | part | must be |
//! |---|---|
//! | index.json | an image index; what a name refers to is there with its configuration and layers |
//! | blobs/sha256/HEX | the bytes that HEX is the digest of |
//! | layers/ID/index | whole, and what ID says it is |
//! | layers/ID/tree, tree.single | the files of the index |
//! | layers/ID/blob-\*.json | readable |
//! | records/KEY | a record of this key, whose layer is there |
//! | steps, diff-ids, content | the name of a record or layer; it may be gone |
//! | references, http | readable, under the name that its content has |
//! | mounts/\*/\*/owners | readable |
//!
//! What is broken can be removed: then the store has forgotten something and makes or fetches it anew. Repositories
//! check themselves when they are used.

use super::prune::{ExclusiveStore, entries};
use super::record::{RECORD_VERSION, Record};
use super::refs::{IMAGE_NAME, REF_NAME, RememberedReference};
use super::{StoreError, blob, check_name, hex, layers};
use crate::image::{Descriptor, Index, Manifest};
use crate::materialize::remove_tree;
use crate::sandbox::emulation::{Identity, Owner, read_list};
use crate::tree::{Tree, index};
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Where, from the store's directory.
    pub path: PathBuf,
    /// What, without a full stop.
    pub problem: String,
    /// It was removed.
    pub repaired: bool,
}

/// What was looked at and found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checked {
    /// How many of each part were looked at.
    pub counts: BTreeMap<&'static str, u64>,
    /// What is wrong, in the order of paths.
    pub findings: Vec<Finding>,
    /// What this user may not read, from the store's directory.
    pub unreadable: Vec<PathBuf>,
}

/// What a look at one thing gave.
enum Verdict {
    Good,
    Bad(String),
    /// It belongs to another user.
    Unreadable,
}

impl From<io::Result<Result<(), String>>> for Verdict {
    fn from(result: io::Result<Result<(), String>>) -> Verdict {
        match result {
            Ok(Ok(())) => Verdict::Good,
            Ok(Err(problem)) => Verdict::Bad(problem),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Verdict::Unreadable,
            Err(error) => Verdict::Bad(format!("cannot be read: {error}")),
        }
    }
}

struct Check<'a> {
    root: &'a Path,
    repair: bool,
    stop: &'a dyn Fn() -> bool,
    checked: Checked,
}

impl ExclusiveStore {
    /// Looks at everything; removes what is broken if `repair`. `stop` is asked between files; what was found so far is
    /// returned then.
    pub fn check(&self, repair: bool, stop: &dyn Fn() -> bool) -> Result<Checked, StoreError> {
        let mut check = Check { root: self.root(), repair, stop, checked: Checked::default() };
        check.blobs();
        check.layers();
        check.records();
        check.small_files();
        // Last: what its names need has been looked at, and broken blobs may be gone.
        check.names()?;
        check.checked.findings.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(check.checked)
    }
}

fn name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

impl Check<'_> {
    fn count(&mut self, part: &'static str) {
        *self.checked.counts.entry(part).or_default() += 1;
    }

    /// Notes what is wrong with `path`. Returns whether it is good.
    fn note(&mut self, path: &Path, verdict: impl Into<Verdict>) -> bool {
        let relative = path.strip_prefix(self.root).unwrap_or(path).to_owned();
        match verdict.into() {
            Verdict::Good => true,
            Verdict::Unreadable => {
                self.checked.unreadable.push(relative);
                true
            }
            Verdict::Bad(problem) => {
                let repaired = self.repair && self.remove(path);
                self.checked.findings.push(Finding { path: relative, problem, repaired });
                false
            }
        }
    }

    fn remove(&self, path: &Path) -> bool {
        match path.symlink_metadata() {
            Ok(metadata) if metadata.is_dir() => remove_tree(path).is_ok(),
            Ok(_) => fs::remove_file(path).is_ok(),
            Err(_) => true,
        }
    }

    /// Entries of a part, until told to stop.
    fn each(&mut self, part: &'static str, directory: &Path, look: impl Fn(&mut Self, &Path)) {
        for path in entries(directory) {
            if (self.stop)() {
                return;
            }
            self.count(part);
            look(self, &path);
        }
    }

    fn blobs(&mut self) {
        let directory = self.root.join("blobs/sha256");
        self.each("blobs", &directory, |check, path| {
            let digits = name(path);
            let found = || -> io::Result<Result<(), String>> {
                if blob::digest_hex(&format!("sha256:{digits}")).is_err() {
                    return Ok(Err("its name is no digest".to_owned()));
                }
                let found = blob::sha256_of(&mut File::open(path)?)?;
                Ok(match found == format!("sha256:{digits}") {
                    true => Ok(()),
                    false => Err(format!("its content has the digest {found}")),
                })
            };
            check.note(path, found());
        });
    }

    fn layers(&mut self) {
        let directory = self.root.join("layers");
        self.each("layers", &directory, |check, path| {
            let files = entries(path);
            // A process that died before it wrote the index leaves that, and the next one goes on from there.
            if files.is_empty() {
                return;
            }
            let index = match fs::read(path.join("index")).map(|bytes| layer_index(&name(path), &bytes)) {
                Ok(Ok(tree)) => tree,
                Ok(Err(problem)) => {
                    check.note(path, Ok(Err(problem)));
                    return;
                }
                Err(error) => {
                    check.note(path, Err(error));
                    return;
                }
            };
            for file in files {
                let file_name = name(&file);
                let trees = ["tree", "tree.single"];
                if trees.contains(&file_name.as_str()) {
                    check.count("trees");
                    check.note(&file, layers::compare_tree(&file, &index));
                } else if file_name.ends_with(".json") {
                    check.json::<serde_json::Value>(&file, |_| Ok(()));
                }
            }
        });
    }

    /// Reads a file as JSON and looks at the value.
    fn json<T: DeserializeOwned>(&mut self, path: &Path, look: impl Fn(T) -> Result<(), String>) -> bool {
        let read = fs::read(path).map(|bytes| match serde_json::from_slice(&bytes) {
            Ok(value) => look(value),
            Err(error) => Err(format!("it is not what it should be: {error}")),
        });
        self.note(path, read)
    }

    fn records(&mut self) {
        let (directory, root) = (self.root.join("records"), self.root.to_owned());
        self.each("records", &directory, |check, path| {
            check.json(path, |record: Record| match &record.layer {
                _ if record.version != RECORD_VERSION => Err(format!("it has version {}", record.version)),
                _ if record.key != name(path) => Err(format!("it is of the key {}", record.key)),
                Some(layer) if check_name(&layer.0).is_err() => Err("the name of its layer is none".to_owned()),
                Some(layer) if !root.join("layers").join(&*layer.0).join("index").exists() => {
                    Err(format!("its layer {} is not there", layer.0))
                }
                _ => Ok(()),
            });
        });
    }

    fn small_files(&mut self) {
        for part in ["steps", "diff-ids", "content"] {
            let directory = self.root.join(part);
            self.each(part, &directory, |check, path| {
                let read = fs::read_to_string(path).map(|text| check_name(&text).map(drop));
                check.note(path, read.map(|found| found.map_err(|_| "it holds no name".to_owned())));
            });
        }
        let directory = self.root.join("references");
        self.each("references", &directory, |check, path| {
            check.json(path, |remembered: RememberedReference| {
                match hex(blake3::hash(remembered.reference.as_bytes()).as_bytes()) == name(path) {
                    true => Ok(()),
                    false => Err(format!("it is of {}", remembered.reference)),
                }
            });
        });
        let directory = self.root.join("http");
        self.each("files", &directory, |check, path| {
            check.json::<serde_json::Value>(path, |_| Ok(()));
        });
        let directory = self.root.join("mounts");
        self.each("mounts", &directory, |check, path| {
            for path in entries(path).into_iter().map(|path| path.join("owners")).filter(|path| path.exists()) {
                let read = read_list::<(Identity, Owner)>(&path).map(|_| Ok(()));
                check.note(&path, read);
            }
        });
    }

    fn names(&mut self) -> Result<(), StoreError> {
        let path = self.root.join("index.json");
        let index = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice::<Index>(&bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(StoreError::io("read", &path)(error)),
        };
        let Ok(mut index) = index else {
            self.note(&path, Ok(Err("it is no image index; all names are lost".to_owned())));
            return Ok(());
        };
        let before = index.manifests.len();
        let mut broken = Vec::new();
        for entry in &index.manifests {
            self.count("names");
            if let Err(problem) = self.image(entry, 5) {
                let annotation = |key: &str| entry.annotations.get(key).cloned();
                let name = annotation(REF_NAME).or_else(|| annotation(IMAGE_NAME)).unwrap_or_default();
                broken.push((entry.clone(), format!("the image `{name}`: {problem}")));
            }
        }
        index.manifests.retain(|entry| !broken.iter().any(|(other, _)| other == entry));
        let repaired = self.repair && index.manifests.len() < before && self.rewrite(&path, &index).is_ok();
        for (_, problem) in broken {
            self.checked.findings.push(Finding { path: "index.json".into(), problem, repaired });
        }
        Ok(())
    }

    fn rewrite(&self, path: &Path, index: &Index) -> io::Result<()> {
        let mut fresh = tempfile::NamedTempFile::new_in(self.root.join("tmp"))?;
        serde_json::to_writer(&mut fresh, index)?;
        fresh.as_file().sync_data()?;
        fresh.persist(path).map_err(|error| error.error)?;
        Ok(())
    }

    /// Whether all that an image consists of is there. Digests have been looked at already.
    fn image(&self, descriptor: &Descriptor, depth: u32) -> Result<(), String> {
        let path = |digest: &str| -> Result<PathBuf, String> {
            let digits = blob::digest_hex(digest).map_err(|error| error.to_string())?;
            Ok(self.root.join("blobs/sha256").join(digits))
        };
        let bytes = fs::read(path(&descriptor.digest)?).map_err(|_| format!("{} is not there", descriptor.digest))?;
        if let Ok(manifest) = serde_json::from_slice::<Manifest>(&bytes) {
            let parts = std::iter::once(&manifest.config).chain(manifest.layers.iter().flatten());
            for part in parts {
                if !path(&part.digest)?.exists() {
                    return Err(format!("{} is not there", part.digest));
                }
            }
            return Ok(());
        }
        let Ok(index) = serde_json::from_slice::<Index>(&bytes) else {
            return Err(format!("{} is neither a manifest nor an index", descriptor.digest));
        };
        // An index from elsewhere may list images that were never fetched.
        let fetched = |nested: &&Descriptor| path(&nested.digest).is_ok_and(|path| path.exists());
        match depth {
            0 => Ok(()),
            _ => index.manifests.iter().filter(fetched).try_for_each(|nested| self.image(nested, depth - 1)),
        }
    }
}

/// Decodes a layer's index and compares it with the layer's name.
fn layer_index(id: &str, bytes: &[u8]) -> Result<Tree, String> {
    let tree = index::decode(bytes).map_err(|error| format!("its index is damaged: {error}"))?;
    let found = blake3::hash(bytes).to_hex().to_string();
    // One that came as a blob is named by that.
    match found == id || id.starts_with("blob-") {
        true => Ok(tree),
        false => Err(format!("its index is that of {found}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Store, exclusive, temporary};
    use super::*;
    use crate::image::{Annotations, Media, assemble};
    use crate::tree::{Entry, Kind, LayerId, Node, Origin};

    fn layer(store: &Store, content: &[u8]) -> LayerId {
        let digest = Some(*blake3::hash(content).as_bytes());
        let kind = Kind::File { size: content.len() as u64, digest, link_group: 0 };
        let node = Node { entry: Entry { kind, ..Entry::dir("f", 0o644) }, origin: Origin::Inline(content.into()) };
        let id = store.put_layer(Tree::from_nodes(vec![node])).unwrap();
        let staging = store.begin_tree().unwrap();
        fs::write(staging.join("f"), content).unwrap();
        store.commit_tree(&staging, &id).unwrap();
        id
    }

    fn record(store: &Store, key: &str, layer: &LayerId) {
        let record = Record {
            version: RECORD_VERSION,
            key: key.into(),
            steps: vec!["step".into()],
            parts: Vec::new(),
            layer: Some(layer.clone()),
            blob: None,
            content_key: String::new(),
            created: 0,
            duration_ms: 0,
            extra: BTreeMap::new(),
        };
        store.put_record(&record).unwrap();
    }

    fn check(root: &Path, repair: bool) -> Checked {
        exclusive(root).check(repair, &|| false).unwrap()
    }

    #[test]
    fn what_is_broken_is_found_and_removed() {
        let (directory, store) = temporary();
        let root = directory.path().join("store");
        let (good, bad, lost) = (layer(&store, b"good"), layer(&store, b"bad"), layer(&store, b"lost"));
        record(&store, "good", &good);
        record(&store, "lost", &lost);
        let config = nacre_frontend::image_config::ImageConfig {
            architecture: "amd64".into(),
            os: "linux".into(),
            ..Default::default()
        };
        let image = assemble(config, &[], None, Media::Oci, &Annotations::default());
        store.put_document(&image.config_bytes).unwrap();
        let manifest = store.put_document(&image.manifest_bytes).unwrap();
        store.tag("docker.io/library/app:latest", &image.manifest_descriptor).unwrap();
        drop(store);
        let clean = check(&root, false);
        assert_eq!(clean.findings, []);
        assert_eq!((clean.counts["layers"], clean.counts["trees"], clean.counts["names"]), (3, 3, 3));

        fs::write(root.join("layers").join(&*bad.0).join("tree/f"), "bat").unwrap();
        fs::remove_dir_all(root.join("layers").join(&*lost.0)).unwrap();
        fs::write(root.join("blobs/sha256").join(blob::digest_hex(&manifest).unwrap()), "x").unwrap();
        fs::write(root.join("blobs/sha256/odd"), "x").unwrap();
        fs::write(root.join("records/half"), "{").unwrap();
        fs::write(root.join("steps/odd"), "../x").unwrap();
        fs::create_dir(root.join("layers/0")).unwrap();
        fs::create_dir(root.join("layers/1")).unwrap();
        fs::write(root.join("layers/1/index"), "no index").unwrap();
        let expected: Vec<String> = [
            format!("blobs/sha256/{}", blob::digest_hex(&manifest).unwrap()),
            "blobs/sha256/odd".into(),
            "index.json".into(),
            "index.json".into(),
            "index.json".into(),
            "layers/1".into(),
            format!("layers/{}/tree", bad.0),
            "records/half".into(),
            "records/lost".into(),
            "steps/odd".into(),
        ]
        .into();
        let paths = |checked: &Checked| -> Vec<String> {
            checked.findings.iter().map(|finding| finding.path.display().to_string()).collect()
        };
        let found = check(&root, false);
        assert_eq!(paths(&found), expected, "{found:#?}");
        assert!(found.findings.iter().all(|finding| !finding.repaired));
        let repaired = check(&root, true);
        assert_eq!(paths(&repaired), expected);
        assert!(repaired.findings.iter().all(|finding| finding.repaired), "{repaired:#?}");
        let after = check(&root, false);
        assert_eq!(after.findings, []);
        let store = Store::open(&root).unwrap();
        assert!(store.get_record("good").unwrap().is_some() && store.tree_dir(&good).is_some());
        assert!(store.tree_dir(&bad).is_none() && store.has_layer(&bad));
        assert_eq!(store.lookup_tag("docker.io/library/app:latest").unwrap(), None);
    }
}
