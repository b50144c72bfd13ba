//! The cache that machines share: records of steps and their layers, in a registry or a layout directory.
//!
//! A cache is an ordinary image manifest, so that every registry takes it:
//!
//! ```text
//! manifest   config  → records: one entry a step, with the parts of its key   application/vnd.nacre.cache.config.v1+json
//!            layers  → blobs of the steps' layers, in no order that means anything   the usual layer types
//!                    → indexes of these layers and of the images' bases   application/vnd.nacre.cache.index.v1+zstd
//! ```
//! An image may carry its records itself (`type=inline`): the same document as member `nacre.cache.v1` of its
//! configuration; the layers are the image's own.
//!
//! Reading a cache fetches manifest and records. A layer is fetched when a step needs its files or an output its
//! blob; a copy onto it needs its index alone. A layer is checked like a layer of a base image. What a cache says of a step is believed: who may write to a cache decides what
//! those who read it build.
//!
//! An entry without a layer says what a step's result is without giving it. That is enough to find what comes after it;
//! a step that needs the files all the same is run then.

#[cfg(feature = "s3")]
pub mod bucket;
pub mod export;
pub mod import;

use crate::plan::cache_key::{KEY_FORMAT, Key};
use crate::registry::auth::{decode_base64, encode_base64};
use crate::store::blob::digest_hex;
use crate::store::record::Part;
use crate::tree::{Origin, Tree, index};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};

/// Media type of the records.
pub const CONFIG_TYPE: &str = "application/vnd.nacre.cache.config.v1+json";
/// Media type of a layer's index.
pub const INDEX_TYPE: &str = "application/vnd.nacre.cache.index.v1+zstd";
/// Member of an image configuration with the records of a cache inside of an image.
pub const INLINE_MEMBER: &str = "nacre.cache.v1";
/// Version of the document.
const VERSION: u32 = 1;
/// A list of files that is longer when compressed is left out: it only serves to say which file changed.
const FILES_LIMIT_BYTES: usize = 48 << 10;
/// An index is not unpacked to more than this.
const INDEX_LIMIT_BYTES: usize = 256 << 20;
/// A list of files is not unpacked to more than this.
const FILES_UNPACKED_LIMIT_BYTES: usize = 8 << 20;

/// All records of a cache.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Document {
    /// Always 1.
    pub version: u32,
    /// How keys are made; those of another format mean nothing here.
    pub key_format: u32,
    /// One for each step.
    pub entries: Vec<Entry>,
    /// Digests of the blobs with indexes of layers, by diff ID.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub indexes: BTreeMap<String, String>,
}

/// The result of a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// Cache key in hex.
    pub key: String,
    /// Key made of the whole of the stages that the step reads from, not only of the files that it takes: it can be
    /// compared without having them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inputs_key: Option<String>,
    /// Identities of the step, by its text and by its place.
    pub steps: Vec<String>,
    /// What the key was made of, in order.
    pub parts: Vec<Part>,
    /// Content key of the step's layer, in hex.
    pub content_key: String,
    /// When it was made, in seconds since the epoch.
    pub created: i64,
    /// How long it took.
    #[serde(default)]
    pub duration_ms: u64,
    /// Digest of the uncompressed layer; `None` when the layer is not part of the cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff_id: Option<String>,
    /// Digest of the layer's blob.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blob: Option<String>,
    /// Files that the step selected: an index, compressed, in base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<String>,
}

impl Document {
    /// A document with these entries.
    pub fn new(entries: Vec<Entry>) -> Self {
        Self { version: VERSION, key_format: KEY_FORMAT, entries, indexes: BTreeMap::new() }
    }

    /// Reads a document; the error is a sentence.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Head {
            version: u32,
            key_format: u32,
        }
        let unreadable = |error: serde_json::Error| format!("its records cannot be read ({error})");
        let head: Head = serde_json::from_slice(bytes).map_err(unreadable)?;
        if head.version != VERSION || head.key_format != KEY_FORMAT {
            return Err(format!("it is of format {}.{}, not {VERSION}.{KEY_FORMAT}", head.version, head.key_format));
        }
        let document: Self = serde_json::from_slice(bytes).map_err(unreadable)?;
        for entry in &document.entries {
            let keys = [Some(&entry.key), Some(&entry.content_key), entry.inputs_key.as_ref()];
            let keys = keys.into_iter().flatten().all(|key| Key::from_hex(key).is_some());
            let digests = [&entry.diff_id, &entry.blob].into_iter().flatten().all(|text| digest_hex(text).is_ok());
            if !keys || !digests {
                return Err(format!("its record `{}` is damaged", entry.key));
            }
        }
        let mut indexes = document.indexes.iter();
        if indexes.any(|(diff_id, digest)| digest_hex(diff_id).is_err() || digest_hex(digest).is_err()) {
            return Err("its list of indexes is damaged".to_owned());
        }
        Ok(document)
    }

    /// The document's bytes.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a cache has string keys only")
    }
}

/// Writes a list of files; `None` when it is too long.
fn encode_files(tree: &Tree) -> Option<String> {
    let compressed = zstd::bulk::compress(&index::encode(tree), 9).ok()?;
    (compressed.len() <= FILES_LIMIT_BYTES).then(|| encode_base64(&compressed))
}

/// Reads [`encode_files`]; damage is as good as no list.
fn decode_files(text: &str) -> Option<Tree> {
    let compressed = decode_base64(text)?;
    let bytes = zstd::bulk::decompress(&compressed, FILES_UNPACKED_LIMIT_BYTES).ok()?;
    index::decode(&bytes).ok()
}

/// An index as a blob.
fn encode_index(tree: &Tree) -> Option<Vec<u8>> {
    zstd::bulk::compress(&index::encode(tree), 9).ok()
}

/// Reads [`encode_index`].
pub(crate) fn decode_index(bytes: &[u8]) -> Option<Tree> {
    index::decode(&zstd::bulk::decompress(bytes, INDEX_LIMIT_BYTES).ok()?).ok()
}

/// The files alone, without where their bytes are.
pub(crate) fn bare(tree: &Tree) -> Tree {
    tree.map(|node| {
        node.origin = Origin::None;
        true
    })
}

/// Removes entries of a key that was seen already.
fn deduplicated(entries: Vec<Entry>) -> Vec<Entry> {
    let mut seen = HashSet::new();
    entries.into_iter().filter(|entry| seen.insert(entry.key.clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{Entry as FileEntry, Kind};

    fn entry(key: u8) -> Entry {
        Entry {
            key: Key([key; 32]).hex(),
            inputs_key: None,
            steps: vec!["s".to_owned()],
            parts: vec![Part { name: "command".to_owned(), value: "make".to_owned() }],
            content_key: Key([9; 32]).hex(),
            created: 1,
            duration_ms: 2,
            diff_id: None,
            blob: None,
            files: None,
        }
    }

    #[test]
    fn documents_come_back_and_damage_is_told() {
        let document = Document::new(vec![entry(1), entry(2)]);
        assert_eq!(Document::parse(&document.to_json()), Ok(document.clone()));
        let check = |damage: &dyn Fn(&mut Document), words: &str| {
            let mut document = document.clone();
            damage(&mut document);
            let error = Document::parse(&document.to_json()).expect_err(words);
            assert!(error.contains(words), "{words}: {error}");
        };
        check(&|document| document.version = 2, "format 2.");
        check(&|document| document.key_format += 1, "format 1.");
        check(&|document| document.entries[0].key = "../x".to_owned(), "damaged");
        check(&|document| document.entries[1].content_key.push('0'), "damaged");
        check(&|document| document.entries[1].diff_id = Some("sha256:../x".to_owned()), "damaged");
        check(&|document| document.entries[1].blob = Some("md5:00".to_owned()), "damaged");
        check(&|document| drop(document.indexes.insert("x".to_owned(), "sha256:0".to_owned())), "indexes is damaged");
        assert!(Document::parse(b"{").is_err());
        assert!(Document::parse(b"[]").is_err());
    }

    #[test]
    fn lists_of_files_come_back_unless_they_are_long() {
        let file = |name: &str, digest: [u8; 32]| crate::tree::Node {
            entry: FileEntry {
                kind: Kind::File { size: 1, digest: Some(digest), link_group: 0 },
                ..FileEntry::dir(name, 0o644)
            },
            origin: Origin::None,
        };
        let tree = Tree::from_nodes(vec![file("a", [1; 32]), file("b", [2; 32])]);
        let text = encode_files(&tree).expect("a short list");
        assert_eq!(decode_files(&text), Some(tree));
        assert_eq!(decode_files("AAAA"), None);
        let many = (0..5000u32).map(|at| file(&format!("{at}"), *blake3::hash(&at.to_le_bytes()).as_bytes()));
        assert_eq!(encode_files(&Tree::from_nodes(many.collect())), None);
    }
}
