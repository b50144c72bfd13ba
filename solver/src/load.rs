//! Images out of archives: what `docker save`, `podman save`, `skopeo` and BuildKit write.
//!
//! Two forms, which new archives mix: an OCI layout (`oci-layout`, `index.json`, `blobs/`) and Docker's own
//! (`manifest.json` with names of files). Every file becomes a blob of the store under the digest of its bytes while the
//! archive is read, wherever it stands; the documents are looked at afterwards. What a damaged archive leaves is whole and unused,
//! and goes with the next prune.

use crate::image::{Annotations, Descriptor, Index, Manifest, Media, assemble, media_type};
use crate::push::{PushError, PushImage};
use crate::store::blob::{self, DOCUMENT_LIMIT_BYTES};
use crate::store::refs::{IMAGE_NAME, REF_NAME};
use crate::store::{Store, StoreError};
use crate::tree::blob::decompress;
use nacre_frontend::image_config::ImageConfig;
use nacre_frontend::reference::Reference;
use std::collections::BTreeMap;
use std::io::{self, Read};

/// Files of one archive; an image has a few for each layer.
const FILES_LIMIT: usize = 100_000;

/// Why an archive cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// No tar, or cut.
    #[error("the archive cannot be read")]
    Read(#[source] io::Error),
    /// More files than any image has.
    #[error("the archive has more than {FILES_LIMIT} files")]
    TooMany,
    /// Neither form.
    #[error("the archive holds no image: it has neither index.json nor manifest.json")]
    NoImage,
    /// A file is named that is not there.
    #[error("the archive's {document} names `{name}`, which is not in it")]
    Missing {
        /// What names it.
        document: &'static str,
        /// What it names.
        name: String,
    },
    /// A document that does not say what it must.
    #[error("the archive's {document} is not usable: {reason}")]
    Bad {
        /// Which.
        document: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A blob is not what its name says.
    #[error("the archive's `{name}` has the digest {found}")]
    Mismatch {
        /// Its name.
        name: String,
        /// Of the bytes.
        found: String,
    },
    /// The image is not all there.
    #[error(transparent)]
    Incomplete(#[from] PushError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// An image of an archive.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// Canonical names that the archive gives it.
    pub names: Vec<String>,
    /// Its manifest or index.
    pub root: Descriptor,
}

/// A file of the archive, by now a blob of the store.
#[derive(Debug, Clone)]
enum File {
    Blob {
        digest: String,
        size: u64,
    },
    /// Another name of it.
    Link(String),
}

/// Reads an archive, plain or compressed, into the store. The images have no names there yet.
pub fn load(archive: impl Read + Send, store: &Store) -> Result<Vec<Loaded>, LoadError> {
    let files = Files::read(archive, store)?;
    let mut images = Vec::new();
    if let Some(bytes) = files.document("index.json", store)? {
        let index: Index = serde_json::from_slice(&bytes).map_err(|error| bad("index.json", error))?;
        for entry in index.manifests {
            let names = names_of(&entry);
            let root = Descriptor { annotations: BTreeMap::new(), platform: None, ..entry };
            // All documents and layers have to be there.
            let whole = PushImage::of_store(store, &root)?;
            for blob in &whole.blobs {
                let Descriptor { digest, size, media_type, .. } = &blob.descriptor;
                if !store.has_blob(digest, Some(*size)) && !media_type::is_foreign(media_type) {
                    return Err(PushError::Missing { digest: digest.clone() }.into());
                }
            }
            let root = whole.root().cloned().unwrap_or(root);
            match images.iter_mut().find(|image: &&mut Loaded| image.root.digest == root.digest) {
                Some(known) => known.names.extend(names),
                None => images.push(Loaded { names, root }),
            }
        }
    }
    if let Some(bytes) = files.document("manifest.json", store)? {
        let entries: Vec<DockerEntry> = serde_json::from_slice(&bytes).map_err(|error| bad("manifest.json", error))?;
        for entry in entries {
            let names = entry.repo_tags.iter().flatten().filter_map(|name| canonical(name)).collect::<Vec<_>>();
            // In archives of both forms both speak of the same images.
            let config = files.find("manifest.json", &entry.config)?.0;
            let known = images.iter_mut().find(|image| config_of(store, &image.root).as_ref() == Some(&config));
            match known {
                Some(known) => known.names.extend(names),
                None => images.push(Loaded { names, root: files.docker_image(&entry, store)? }),
            }
        }
    }
    if images.is_empty() {
        return Err(LoadError::NoImage);
    }
    for image in &mut images {
        image.names.sort();
        image.names.dedup();
    }
    Ok(images)
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEntry {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Vec<String>,
}

fn bad(document: &str, reason: impl ToString) -> LoadError {
    LoadError::Bad { document: document.to_owned(), reason: reason.to_string() }
}

fn canonical(name: &str) -> Option<String> {
    Reference::parse(name).ok().filter(|reference| reference.digest.is_none()).map(|reference| reference.to_string())
}

/// BuildKit writes the whole name beside the tag; skopeo and podman write the whole name where others write the tag.
fn names_of(entry: &Descriptor) -> Vec<String> {
    let whole = entry.annotations.get(IMAGE_NAME);
    let written = entry.annotations.get(REF_NAME).filter(|name| name.contains([':', '/']));
    whole.or(written).and_then(|name| canonical(name)).into_iter().collect()
}

fn config_of(store: &Store, root: &Descriptor) -> Option<String> {
    let bytes = store.read_document(&root.digest).ok()?;
    Some(serde_json::from_slice::<Manifest>(&bytes).ok()?.config.digest)
}

struct Files(BTreeMap<String, File>);

impl Files {
    fn read(archive: impl Read + Send, store: &Store) -> Result<Self, LoadError> {
        let mut archive = tar::Archive::new(decompress(archive).map_err(LoadError::Read)?);
        let mut files = BTreeMap::new();
        for entry in archive.entries().map_err(LoadError::Read)? {
            let mut entry = entry.map_err(LoadError::Read)?;
            let name = plain(&String::from_utf8_lossy(&entry.path_bytes()));
            if files.len() >= FILES_LIMIT {
                return Err(LoadError::TooMany);
            }
            let kind = entry.header().entry_type();
            if kind.is_file() {
                let mut writer = store.blob_writer()?;
                blob::copy(&mut entry, &mut writer).map_err(LoadError::Read)?;
                let size = writer.size_bytes();
                if size != entry.size() {
                    return Err(LoadError::Read(io::ErrorKind::UnexpectedEof.into()));
                }
                let (digest, size) = writer.commit(None)?;
                let named = name.strip_prefix("blobs/sha256/");
                if named.is_some_and(|digits| digest.strip_prefix("sha256:") != Some(digits)) {
                    return Err(LoadError::Mismatch { name, found: digest });
                }
                files.insert(name, File::Blob { digest, size });
            } else if kind.is_symlink() || kind.is_hard_link() {
                let target = entry.link_name_bytes().unwrap_or_default();
                let target = String::from_utf8_lossy(&target).into_owned();
                // Links are only followed to other names in the archive.
                let from = if kind.is_symlink() { name.rsplit_once('/').map_or("", |(parent, _)| parent) } else { "" };
                files.insert(name.clone(), File::Link(plain(&format!("{from}/{target}"))));
            }
        }
        Ok(Self(files))
    }

    /// A blob by the name of its file.
    fn find(&self, document: &'static str, name: &str) -> Result<(String, u64), LoadError> {
        let mut at = plain(name);
        for _ in 0..4 {
            match self.0.get(&at) {
                Some(File::Blob { digest, size }) => return Ok((digest.clone(), *size)),
                Some(File::Link(target)) => at = target.clone(),
                None => break,
            }
        }
        Err(LoadError::Missing { document, name: name.to_owned() })
    }

    fn document(&self, name: &'static str, store: &Store) -> Result<Option<Vec<u8>>, LoadError> {
        if !self.0.contains_key(name) {
            return Ok(None);
        }
        let (digest, size) = self.find("list of files", name)?;
        if size > DOCUMENT_LIMIT_BYTES {
            return Err(bad(name, "it is too large"));
        }
        Ok(Some(store.read_document(&digest)?))
    }

    /// An image of Docker's own form: the manifest is ours, configuration and layers are the archive's.
    fn docker_image(&self, entry: &DockerEntry, store: &Store) -> Result<Descriptor, LoadError> {
        let (config_digest, config_size) = self.find("manifest.json", &entry.config)?;
        if config_size > DOCUMENT_LIMIT_BYTES {
            return Err(bad(&entry.config, "it is too large"));
        }
        let bytes = store.read_document(&config_digest)?;
        let config: ImageConfig = serde_json::from_slice(&bytes).map_err(|error| bad(&entry.config, error))?;
        let diff_ids = config.rootfs.diff_ids.clone().unwrap_or_default();
        if diff_ids.len() != entry.layers.len() {
            let reason = format!("{} diff IDs for {} layers", diff_ids.len(), entry.layers.len());
            return Err(bad(&entry.config, reason));
        }
        let mut layers = Vec::new();
        for (name, diff_id) in entry.layers.iter().zip(diff_ids) {
            let (digest, size) = self.find("manifest.json", name)?;
            let mut head = Vec::new();
            let file = store.open_blob(&digest)?;
            file.take(4).read_to_end(&mut head).map_err(LoadError::Read)?;
            let suffix = match head.as_slice() {
                [0x1f, 0x8b, ..] => "+gzip",
                [0x28, 0xb5, 0x2f, 0xfd] => "+zstd",
                // Not compressed, so that its digest is the diff ID.
                _ if digest != diff_id => return Err(LoadError::Mismatch { name: name.clone(), found: digest }),
                _ => "",
            };
            let media_type = format!("{}{suffix}", media_type::OCI_LAYER);
            layers.push((Descriptor { media_type, digest, size, ..Descriptor::default() }, diff_id));
        }
        // Only for the manifest: the configuration's bytes stay as they are.
        let assembled = assemble(config, &layers, None, Media::Oci, &Annotations::default());
        let config = Descriptor { digest: config_digest, size: config_size, ..assembled.config_descriptor };
        let manifest = Manifest {
            schema_version: 2,
            media_type: media_type::OCI_MANIFEST.to_owned(),
            config,
            layers: Some(assembled.layers),
            annotations: BTreeMap::new(),
        };
        let bytes = serde_json::to_vec(&manifest).expect("a manifest has string keys only");
        let digest = store.put_document(&bytes)?;
        let size = bytes.len() as u64;
        Ok(Descriptor { media_type: media_type::OCI_MANIFEST.to_owned(), digest, size, ..Descriptor::default() })
    }
}

/// A name without `.`, `..` and doubled slashes; what would leave the archive stays at its top.
fn plain(name: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::blob::sha256;

    fn archive(files: &[(&str, &[u8])], links: &[(&str, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, content) in files {
            let mut header = tar::Header::new_ustar();
            header.set_mode(0o644);
            header.set_size(content.len() as u64);
            builder.append_data(&mut header, name, *content).unwrap();
        }
        for (name, target) in links {
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            builder.append_link(&mut header, name, target).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn config(diff_ids: &[String]) -> Vec<u8> {
        let text = serde_json::json!({
            "architecture": "amd64", "os": "linux", "config": {"Cmd": ["x"]}, "container": "kept",
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        text.to_string().into_bytes()
    }

    #[test]
    fn old_docker_archives_are_images() {
        let (_directory, store) = crate::store::temporary();
        let layer = [0u8; 1024];
        let diff_id = sha256(&layer);
        let config = config(&[diff_id.clone(), diff_id.clone()]);
        let manifest =
            br#"[{"Config":"c.json","RepoTags":["app:1","localhost/b:2"],"Layers":["a/layer.tar","b/layer.tar"]}]"#;
        let files = [("a/layer.tar", &layer[..]), ("c.json", &config), ("manifest.json", manifest)];
        let bytes = archive(&files, &[("b/layer.tar", "../a/layer.tar")]);
        let loaded = load(bytes.as_slice(), &store).unwrap();
        assert_eq!(loaded[0].names, ["docker.io/library/app:1", "localhost/b:2"]);
        let manifest: Manifest = serde_json::from_slice(&store.read_document(&loaded[0].root.digest).unwrap()).unwrap();
        assert_eq!(manifest.config.digest, sha256(&config), "its bytes stay");
        assert_eq!(manifest.layers.unwrap().len(), 2);
        let compressed = zstd::encode_all(bytes.as_slice(), 1).unwrap();
        assert_eq!(load(compressed.as_slice(), &store).unwrap(), loaded);
    }

    #[test]
    fn damaged_archives_are_refused() {
        let (_directory, store) = crate::store::temporary();
        let check = |files: &[(&str, &[u8])], links: &[(&str, &str)], words: &str| {
            let error = load(archive(files, links).as_slice(), &store).expect_err(words).to_string();
            assert!(error.contains(words), "{words}: {error}");
        };
        let digits = "0".repeat(64);
        check(&[], &[], "holds no image");
        check(&[("a", b"x")], &[], "holds no image");
        check(&[("manifest.json", b"{")], &[], "manifest.json is not usable");
        check(&[("index.json", b"[]")], &[], "index.json is not usable");
        check(&[("manifest.json", br#"[{"Config":"c","Layers":[]}]"#)], &[], "names `c`");
        check(&[("manifest.json", br#"[{"Config":"c","Layers":[]}]"#)], &[("c", "c")], "names `c`");
        check(
            &[("manifest.json", br#"[{"Config":"c","Layers":[]}]"#)],
            &[("c", "../../../../etc/passwd")],
            "names `c`",
        );
        check(&[(&format!("blobs/sha256/{digits}"), b"x")], &[], "has the digest sha256:");
        let index = format!(r#"{{"schemaVersion":2,"manifests":[{{"digest":"sha256:{digits}","size":2}}]}}"#);
        check(&[("index.json", index.as_bytes())], &[], "");
        let config = config(&[sha256(b"other")]);
        let files =
            [("c", config.as_slice()), ("l", b"layer"), ("manifest.json", br#"[{"Config":"c","Layers":["l"]}]"#)];
        check(&files, &[], "`l` has the digest");
        let files = [("c", config.as_slice()), ("manifest.json", br#"[{"Config":"c","Layers":[]}]"#)];
        check(&files, &[], "1 diff IDs for 0 layers");
        let whole = archive(&[("c", &[7; 5000])], &[]);
        assert!(matches!(load(&whole[..2000], &store), Err(LoadError::Read(_))));
        assert!(load(&b"no archive at all, but long enough to be looked at"[..], &store).is_err());
    }
}
