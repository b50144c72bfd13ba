//! Names of images: tags in `index.json`, and what references of registries resolved to.
//!
//! `index.json` is the image layout's own index. Tools look for an entry whose annotation
//! `org.opencontainers.image.ref.name` equals what the user typed behind `oci:STORE:`, byte by byte, so that an image
//! has an entry for every way to write its name: `docker.io/library/app:latest`, `app:latest`, `app`. All of them carry
//! the canonical name as `io.containerd.image.name`, which is what this module goes by (and what `ctr` reads).

use super::{Store, StoreError, hex, open_lock};
use crate::image::{Descriptor, Index, Manifest};
use serde::{Deserialize, Serialize};
use std::fs::File;

/// Annotation by which layout readers find an image.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Annotation with the canonical name.
pub const IMAGE_NAME: &str = "io.containerd.image.name";

/// `index.json` of a new store.
pub(super) const EMPTY_INDEX: &[u8] =
    b"{\"schemaVersion\":2,\"mediaType\":\"application/vnd.oci.image.index.v1+json\",\"manifests\":[]}";

/// What a reference meant when a registry was last asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RememberedReference {
    /// Canonical text.
    pub reference: String,
    /// The manifest or index.
    pub descriptor: Descriptor,
    /// When, in seconds since the epoch.
    pub resolved: i64,
}

/// The ways to write a canonical name that users type, itself first.
pub fn spellings(canonical: &str) -> Vec<String> {
    let mut names = vec![canonical.to_owned()];
    let familiar = canonical.strip_prefix("docker.io/").map(|rest| rest.strip_prefix("library/").unwrap_or(rest));
    names.extend(familiar.map(str::to_owned));
    if let Some(untagged) = names.last().and_then(|name| name.strip_suffix(":latest")) {
        names.push(untagged.to_owned());
    }
    names
}

impl Store {
    /// Reads `index.json`.
    pub fn index(&self) -> Result<Index, StoreError> {
        let path = self.root.join("index.json");
        let bytes = std::fs::read(&path).map_err(StoreError::io("read", &path))?;
        serde_json::from_slice(&bytes)
            .map_err(|error| StoreError::Damaged { path: path.clone(), reason: error.to_string() })
    }

    /// Gives an image (or an index of images) a name, canonical with tag. The name's former image loses it. The image's
    /// documents are made durable first: a name never outlives the power better than what it names.
    pub fn tag(&self, name: &str, manifest: &Descriptor) -> Result<(), StoreError> {
        self.sync_documents(manifest, 4)?;
        self.edit_index(|index| {
            let entries: Vec<Descriptor> = spellings(name)
                .into_iter()
                .map(|spelling| {
                    let mut entry = manifest.clone();
                    entry.annotations.insert(REF_NAME.to_owned(), spelling);
                    entry.annotations.insert(IMAGE_NAME.to_owned(), name.to_owned());
                    entry
                })
                .collect();
            let named = index.manifests.iter().filter(|entry| is_named(entry, name)).count();
            if named == entries.len() && entries.iter().all(|entry| index.manifests.contains(entry)) {
                return;
            }
            index.manifests.retain(|entry| !is_named(entry, name));
            for entry in entries {
                // Another name's spelling may be ours (`app` as a tag of some other tool): the newest wins.
                index.manifests.retain(|other| other.annotations.get(REF_NAME) != entry.annotations.get(REF_NAME));
                index.manifests.push(entry);
            }
        })
    }

    /// Takes a name away; whether it was there.
    pub fn untag(&self, name: &str) -> Result<bool, StoreError> {
        let mut found = false;
        self.edit_index(|index| {
            found = index.manifests.iter().any(|entry| is_named(entry, name));
            index.manifests.retain(|entry| !is_named(entry, name));
        })?;
        Ok(found)
    }

    /// What a canonical name with tag refers to.
    pub fn lookup_tag(&self, name: &str) -> Result<Option<Descriptor>, StoreError> {
        Ok(self.index()?.manifests.into_iter().find(|entry| is_named(entry, name)))
    }

    /// All names and what they refer to.
    pub fn tags(&self) -> Result<Vec<(String, Descriptor)>, StoreError> {
        let mut tags = Vec::new();
        for entry in self.index()?.manifests {
            let name = entry.annotations.get(IMAGE_NAME).or_else(|| entry.annotations.get(REF_NAME)).cloned();
            if let Some(name) = name.filter(|name| !tags.iter().any(|(known, _)| known == name)) {
                tags.push((name, entry));
            }
        }
        Ok(tags)
    }

    fn edit_index(&self, edit: impl FnOnce(&mut Index)) -> Result<(), StoreError> {
        let lock_path = self.root.join("index.lock");
        let lock = open_lock(&lock_path)?;
        lock.lock().map_err(StoreError::io("lock", &lock_path))?;
        let mut index = self.index()?;
        let before = index.clone();
        edit(&mut index);
        if index == before {
            return Ok(());
        }
        let bytes = serde_json::to_vec(&index).expect("an index has string keys only");
        self.write_renamed(&self.root.join("index.json"), &bytes, true)
    }

    /// Syncs a manifest and its configuration, or all of an index; documents are stored unsynced.
    fn sync_documents(&self, descriptor: &Descriptor, depth: u32) -> Result<(), StoreError> {
        let bytes = self.read_document(&descriptor.digest)?;
        self.sync_blob(&descriptor.digest)?;
        if let Ok(manifest) = serde_json::from_slice::<Manifest>(&bytes) {
            return self.sync_blob(&manifest.config.digest);
        }
        for image in serde_json::from_slice::<Index>(&bytes).map(|index| index.manifests).unwrap_or_default() {
            // An index taken from elsewhere may list images that were never fetched.
            if depth > 0 && self.has_blob(&image.digest, None) {
                self.sync_documents(&image, depth - 1)?;
            }
        }
        Ok(())
    }

    fn sync_blob(&self, digest: &str) -> Result<(), StoreError> {
        let path = self.blob_path(digest)?;
        File::open(&path).and_then(|file| file.sync_data()).map_err(StoreError::io("sync", &path))
    }

    /// What a registry said about a reference last time; nothing when it was never asked.
    pub fn remembered_reference(&self, reference: &str) -> Result<Option<RememberedReference>, StoreError> {
        let path = self.reference_path(reference);
        let bytes = self.read_optional(&path)?;
        if bytes.is_some() {
            super::prune::note_use(&path);
        }
        let remembered = bytes.and_then(|bytes| serde_json::from_slice::<RememberedReference>(&bytes).ok());
        Ok(remembered.filter(|remembered| remembered.reference == reference))
    }

    /// All that registries said about references; what cannot be read is left out.
    pub fn remembered_references(&self) -> Result<Vec<RememberedReference>, StoreError> {
        let path = self.root.join("references");
        let entries = std::fs::read_dir(&path).map_err(StoreError::io("read", &path))?;
        let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        let read = |path: std::path::PathBuf| serde_json::from_slice(&std::fs::read(path).ok()?).ok();
        Ok(paths.into_iter().filter_map(read).collect())
    }

    /// Remembers what a registry says about a reference.
    pub fn remember_reference(&self, remembered: &RememberedReference) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(remembered).expect("a remembered reference has string keys only");
        self.replace_file(&self.reference_path(&remembered.reference), &bytes)
    }

    fn reference_path(&self, reference: &str) -> std::path::PathBuf {
        self.root.join("references").join(hex(blake3::hash(reference.as_bytes()).as_bytes()))
    }
}

fn is_named(entry: &Descriptor, name: &str) -> bool {
    match entry.annotations.get(IMAGE_NAME) {
        Some(canonical) => canonical == name,
        None => entry.annotations.get(REF_NAME).is_some_and(|written| written == name),
    }
}

#[cfg(test)]
mod tests {
    use super::super::temporary;
    use super::*;
    use crate::image::{Annotations, Media, assemble};

    fn image(store: &Store, architecture: &str) -> Descriptor {
        let config = nacre_frontend::image_config::ImageConfig {
            architecture: architecture.into(),
            os: "linux".into(),
            ..Default::default()
        };
        let image = assemble(config, &[], None, Media::Oci, &Annotations::default());
        store.put_document(&image.config_bytes).unwrap();
        store.put_document(&image.manifest_bytes).unwrap();
        image.manifest_descriptor
    }

    #[test]
    fn names_have_spellings() {
        let check = |name: &str, expected: &[&str]| assert_eq!(spellings(name), expected, "{name}");
        check("docker.io/library/app:latest", &["docker.io/library/app:latest", "app:latest", "app"]);
        check("docker.io/me/app:1", &["docker.io/me/app:1", "me/app:1"]);
        check("localhost/app:1", &["localhost/app:1"]);
        check("ghcr.io/a/b:latest", &["ghcr.io/a/b:latest", "ghcr.io/a/b"]);
    }

    #[test]
    fn a_tag_moves() {
        let (_directory, store) = temporary();
        let (one, two) = (image(&store, "amd64"), image(&store, "arm64"));
        let name = "docker.io/library/app:latest";
        assert_eq!(store.lookup_tag(name).unwrap(), None);
        store.tag(name, &one).unwrap();
        store.tag("localhost/app:1", &one).unwrap();
        store.tag(name, &two).unwrap();
        assert_eq!(store.lookup_tag(name).unwrap().unwrap().digest, two.digest);
        assert_eq!(store.lookup_tag("localhost/app:1").unwrap().unwrap().digest, one.digest);
        assert_eq!(store.index().unwrap().manifests.len(), 4);
        assert_eq!(store.tags().unwrap().len(), 2);
        assert!(store.untag(name).unwrap() && !store.untag(name).unwrap());
        assert_eq!(store.index().unwrap().manifests.len(), 1);
    }

    #[test]
    fn tags_of_many_builds_all_stay() {
        let (directory, store) = temporary();
        let image = image(&store, "amd64");
        std::thread::scope(|scope| {
            for number in 0..8 {
                let (directory, image) = (&directory, &image);
                scope.spawn(move || {
                    let store = Store::open(&directory.path().join("store")).unwrap();
                    store.tag(&format!("localhost/app:{number}"), image).unwrap();
                });
            }
        });
        assert_eq!(store.tags().unwrap().len(), 8);
    }

    #[test]
    fn a_name_needs_its_image() {
        let (_directory, store) = temporary();
        let missing = Descriptor { digest: super::super::blob::sha256(b"x"), ..Descriptor::default() };
        assert!(store.tag("localhost/app:1", &missing).is_err());
        assert_eq!(store.tags().unwrap().len(), 0);
    }

    #[test]
    fn references_are_remembered() {
        let (_directory, store) = temporary();
        let reference = "docker.io/library/debian:12".to_owned();
        assert_eq!(store.remembered_reference(&reference).unwrap(), None);
        let remembered = RememberedReference { reference, descriptor: image(&store, "amd64"), resolved: 7 };
        store.remember_reference(&remembered).unwrap();
        assert_eq!(store.remembered_reference(&remembered.reference).unwrap(), Some(remembered.clone()));
        assert_eq!(store.remembered_references().unwrap(), [remembered]);
    }
}
