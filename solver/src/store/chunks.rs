//! Compressed chunks of layer blobs, remembered by where they stand in a blob that the store has.
//!
//! ```text
//! chunks/HEX    of blob sha256:HEX:  "nacre chunks 2\n"  records, in the order of the blob  BLAKE3 of all before
//! record:       key of its entries 32 bytes (tree/blob.rs)  key of its plain bytes 32, zeros for none
//!               BLAKE3 of the compressed bytes 32  length u32, little-endian
//!               SHA-256 so far of the tar, of the blob: unfinished states, 104 bytes each
//! ```
//! A layer that differs a little from one that was a blob before takes what is the same from there; nothing is kept twice.
//! What is the same from the beginning on need not even be read to be digested: the states go on from there.
//! The tables are written after their blobs and not synced: a table is checked as a whole, and each chunk when it is
//! read. What does not fit is as good as unknown and is compressed again. A table goes with its blob (`prune`).

use super::{Store, blob};
use crate::tree::blob::{ChunkCache, ChunkRecord, Known, STATE_BYTES};
use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

const MAGIC: &[u8] = b"nacre chunks 2\n";
const RECORD: usize = 3 * 32 + 4 + 2 * STATE_BYTES;
/// How many tables are read, newest first, and how large they may be together: a hundred thousand chunks.
const TABLES: usize = 64;
const TABLE_BYTES: usize = 32 << 20;

/// Where chunks stand that were compressed before.
#[derive(Debug, Default)]
pub struct KnownChunks {
    tables: Vec<Table>,
    chunks: HashMap<[u8; 32], Place>,
}

/// A blob and the records of its chunks.
#[derive(Debug)]
struct Table {
    blob: PathBuf,
    records: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    table: usize,
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

fn encode(record: &ChunkRecord, out: &mut Vec<u8>) {
    out.extend_from_slice(&record.entries.unwrap_or_default());
    out.extend_from_slice(&record.bytes.unwrap_or_default());
    out.extend_from_slice(&record.digest);
    out.extend_from_slice(&record.compressed_bytes.to_le_bytes());
    out.extend_from_slice(&record.plain_state);
    out.extend_from_slice(&record.blob_state);
}

fn decode(record: &[u8]) -> Option<ChunkRecord> {
    let (entries, rest) = record.split_first_chunk::<32>()?;
    let (bytes, rest) = rest.split_first_chunk::<32>()?;
    let (digest, rest) = rest.split_first_chunk::<32>()?;
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let (plain_state, rest) = rest.split_first_chunk::<STATE_BYTES>()?;
    let key = |key: &[u8; 32]| (*key != [0; 32]).then_some(*key);
    Some(ChunkRecord {
        entries: key(entries),
        bytes: key(bytes),
        digest: *digest,
        compressed_bytes: u32::from_le_bytes(*length),
        plain_state: *plain_state,
        blob_state: *rest.first_chunk::<STATE_BYTES>()?,
    })
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
        for record in records.chunks_exact(RECORD).filter_map(decode) {
            let (table, length) = (self.tables.len(), record.compressed_bytes);
            for key in [record.entries, record.bytes].into_iter().flatten() {
                self.chunks.entry(key).or_insert(Place { table, offset, length, digest: record.digest });
            }
            offset += u64::from(length);
        }
        self.tables.push(Table { blob, records: records.to_vec() });
    }
}

impl ChunkCache for BlobChunks<'_> {
    fn get(&self, key: &[u8; 32], buffer: &mut Vec<u8>) -> Option<Known> {
        let place = self.known.chunks.get(key)?;
        let file = File::open(&self.known.tables[place.table].blob).ok()?;
        let length = place.length as usize;
        // A damaged table must not become a huge allocation.
        if file.metadata().ok()?.len() < place.offset + u64::from(place.length) {
            return None;
        }
        if buffer.len() < length {
            buffer.resize(length, 0);
        }
        file.read_exact_at(&mut buffer[..length], place.offset).ok()?;
        let digest = place.digest;
        (blake3::hash(&buffer[..length]).as_bytes() == &digest).then_some(Known { length, digest })
    }

    fn beginning(&self, entries: &[Option<[u8; 32]>]) -> Vec<ChunkRecord> {
        let alike = |table: &Table| {
            let records = table.records.chunks_exact(RECORD).zip(entries);
            records.take_while(|(record, key)| key.is_some_and(|key| record.starts_with(&key))).count()
        };
        let longest = self.known.tables.iter().map(|table| (alike(table), table)).max_by_key(|(count, _)| *count);
        let Some((count, table)) = longest else { return Vec::new() };
        table.records.chunks_exact(RECORD).take(count).filter_map(decode).collect()
    }

    fn put(&self, record: &ChunkRecord) {
        encode(record, &mut self.table.lock().unwrap_or_else(PoisonError::into_inner));
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

    fn record(number: u8, compressed: &[u8]) -> ChunkRecord {
        ChunkRecord {
            entries: Some(key(number)),
            bytes: (number == 2).then(|| key(number + 100)),
            digest: *blake3::hash(compressed).as_bytes(),
            compressed_bytes: compressed.len() as u32,
            plain_state: [number; STATE_BYTES],
            blob_state: [number + 1; STATE_BYTES],
        }
    }

    /// A blob of two chunks with its table.
    fn stored(store: &Store) -> String {
        let (digest, _) = store.write_blob(None, &mut &b"firstsecond"[..]).unwrap();
        let known = store.known_chunks();
        let chunks = known.blob();
        chunks.put(&record(1, b"first"));
        chunks.put(&record(2, b"second"));
        store.put_chunks(&digest, chunks);
        digest
    }

    fn get(store: &Store, number: u8) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 2];
        let known = store.known_chunks().blob().get(&key(number), &mut buffer)?;
        Some(buffer[..known.length].to_vec())
    }

    #[test]
    fn chunks_are_found_in_their_blob() {
        let (_directory, store) = temporary();
        assert_eq!(get(&store, 1), None);
        stored(&store);
        assert_eq!(get(&store, 1), Some(b"first".to_vec()));
        assert_eq!(get(&store, 2), Some(b"second".to_vec()));
        assert_eq!(get(&store, 102), Some(b"second".to_vec()));
        assert_eq!(get(&store, 3), None);
    }

    #[test]
    fn the_longest_beginning_is_found() {
        let (_directory, store) = temporary();
        stored(&store);
        let beginning = |keys: &[u8]| {
            let keys: Vec<_> = keys.iter().map(|&number| (number != 0).then(|| key(number))).collect();
            store.known_chunks().blob().beginning(&keys)
        };
        let (first, second) = (record(1, b"first"), record(2, b"second"));
        assert_eq!(beginning(&[1, 2, 3]), [first.clone(), second.clone()]);
        assert_eq!(beginning(&[1, 2]), [first.clone(), second]);
        for others in [&[1, 3, 2][..], &[1, 0]] {
            assert_eq!(beginning(others), std::slice::from_ref(&first));
        }
        assert_eq!(beginning(&[2, 1]), []);
        assert_eq!(beginning(&[]), []);
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
