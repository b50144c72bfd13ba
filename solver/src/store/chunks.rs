//! Compressed chunks of layer blobs, remembered by where they stand in a blob that the store has.
//!
//! ```text
//! chunks/HEX    of blob sha256:HEX:  "nacre chunks 1\n"  records, in the order of the blob  BLAKE3 of all before
//! record:       key 32 bytes (tree/blob.rs: plain bytes, codec, level)  length u32, little-endian  BLAKE3 of the compressed bytes
//! ```
//! A layer that differs a little from one that was a blob before takes what is the same from there; nothing is kept twice.
//! The tables are written after their blobs and not synced: a table is checked as a whole, and each chunk when it is
//! read. What does not fit is as good as unknown and is compressed again. A table goes with its blob (`prune`).

use super::{Store, blob};
use crate::tree::blob::ChunkCache;
use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

const MAGIC: &[u8] = b"nacre chunks 1\n";
const RECORD: usize = 32 + 4 + 32;
/// How many tables are read, newest first, and how large they may be together: half a million chunks.
const TABLES: usize = 64;
const TABLE_BYTES: usize = 32 << 20;

/// Where chunks stand that were compressed before.
#[derive(Debug, Default)]
pub struct KnownChunks {
    blobs: Vec<PathBuf>,
    chunks: HashMap<[u8; 32], Place>,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    blob: usize,
    offset: u64,
    length: u32,
    digest: [u8; 32],
}

/// The chunks of a blob that is being written; those that are known are taken from where they stand.
#[derive(Debug)]
pub struct BlobChunks<'a> {
    known: &'a KnownChunks,
    table: Mutex<Vec<u8>>,
}

impl KnownChunks {
    /// Begins a blob.
    pub fn blob(&self) -> BlobChunks<'_> {
        BlobChunks { known: self, table: Mutex::new(MAGIC.to_vec()) }
    }

    fn add(&mut self, blob: PathBuf, table: &[u8]) {
        let Some((body, checksum)) = table.split_last_chunk::<32>() else { return };
        let Some(records) = body.strip_prefix(MAGIC) else { return };
        if blake3::hash(body).as_bytes() != checksum {
            return;
        }
        let mut offset = 0;
        for record in records.chunks_exact(RECORD) {
            let (Some((key, rest)), Some(digest)) = (record.split_first_chunk::<32>(), record.last_chunk::<32>())
            else {
                return;
            };
            let Some(length) = rest.first_chunk::<4>().map(|bytes| u32::from_le_bytes(*bytes)) else { return };
            let place = Place { blob: self.blobs.len(), offset, length, digest: *digest };
            self.chunks.entry(*key).or_insert(place);
            offset += u64::from(length);
        }
        self.blobs.push(blob);
    }
}

impl ChunkCache for BlobChunks<'_> {
    fn get(&self, key: &[u8; 32]) -> Option<Vec<u8>> {
        let place = self.known.chunks.get(key)?;
        let file = File::open(&self.known.blobs[place.blob]).ok()?;
        // A damaged table must not become a huge allocation.
        let length = u64::from(place.length);
        if file.metadata().ok()?.len() < place.offset + length {
            return None;
        }
        let mut compressed = vec![0; place.length as usize];
        file.read_exact_at(&mut compressed, place.offset).ok()?;
        (blake3::hash(&compressed).as_bytes() == &place.digest).then_some(compressed)
    }

    fn put(&self, key: &[u8; 32], compressed: &[u8]) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.extend_from_slice(key);
        table.extend_from_slice(&u32::try_from(compressed.len()).unwrap_or(u32::MAX).to_le_bytes());
        table.extend_from_slice(blake3::hash(compressed).as_bytes());
    }
}

impl Store {
    /// The chunks of the blobs that were written last.
    pub fn known_chunks(&self) -> KnownChunks {
        let mut tables: Vec<(SystemTime, PathBuf, u64)> = Vec::new();
        for entry in fs::read_dir(self.root.join("chunks")).into_iter().flatten().flatten() {
            if let Ok(metadata) = entry.metadata() {
                let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                tables.push((modified, entry.path(), metadata.len()));
            }
        }
        tables.sort_by(|a, b| b.cmp(a));
        let mut known = KnownChunks::default();
        let mut left = TABLE_BYTES as u64;
        for (_, path, size_bytes) in tables.into_iter().take(TABLES) {
            let Some(rest) = left.checked_sub(size_bytes) else { break };
            left = rest;
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let blob = self.blob_path(&format!("sha256:{name}"));
            if let (Ok(blob), Ok(table)) = (blob, fs::read(&path)) {
                known.add(blob, &table);
            }
        }
        known
    }

    /// Remembers the chunks of a blob that has been stored. A table that cannot be written is no reason to fail.
    pub fn put_chunks(&self, digest: &str, chunks: BlobChunks<'_>) {
        let mut table = chunks.table.into_inner().unwrap_or_else(PoisonError::into_inner);
        let checksum = blake3::hash(&table);
        table.extend_from_slice(checksum.as_bytes());
        if let Ok(digits) = blob::digest_hex(digest) {
            let _ = self.replace_file(&self.root.join("chunks").join(digits), &table);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::temporary;
    use super::*;

    fn key(number: u8) -> [u8; 32] {
        [number; 32]
    }

    /// A blob of two chunks with its table.
    fn stored(store: &Store) -> String {
        let (digest, _) = store.write_blob(None, &mut &b"firstsecond"[..]).unwrap();
        let known = store.known_chunks();
        let chunks = known.blob();
        chunks.put(&key(1), b"first");
        chunks.put(&key(2), b"second");
        store.put_chunks(&digest, chunks);
        digest
    }

    fn get(store: &Store, number: u8) -> Option<Vec<u8>> {
        store.known_chunks().blob().get(&key(number))
    }

    #[test]
    fn chunks_are_found_in_their_blob() {
        let (_directory, store) = temporary();
        assert_eq!(get(&store, 1), None);
        stored(&store);
        assert_eq!(get(&store, 1), Some(b"first".to_vec()));
        assert_eq!(get(&store, 2), Some(b"second".to_vec()));
        assert_eq!(get(&store, 3), None);
    }

    #[test]
    fn damage_is_noticed() {
        let (_directory, store) = temporary();
        let digest = stored(&store);
        let blob = store.blob_path(&digest).unwrap();
        fs::write(&blob, b"firstSecond").unwrap();
        assert_eq!((get(&store, 1), get(&store, 2)), (Some(b"first".to_vec()), None));
        fs::write(&blob, b"first").unwrap();
        assert_eq!((get(&store, 1), get(&store, 2)), (Some(b"first".to_vec()), None));
        let table = store.root.join("chunks").join(blob::digest_hex(&digest).unwrap());
        let good = fs::read(&table).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&table, &bad).unwrap();
            assert_eq!(get(&store, 1), None, "flipped byte {at}");
            fs::write(&table, &good[..at]).unwrap();
            assert_eq!(get(&store, 1), None, "cut to {at}");
        }
        fs::write(&table, &good).unwrap();
        assert_eq!(get(&store, 1), Some(b"first".to_vec()));
        fs::remove_file(&blob).unwrap();
        assert_eq!(get(&store, 1), None);
    }
}
