//! Layers as blobs: the tar stream, cut into chunks, each compressed alone, joined in order.
//!
//! ```text
//! calling thread:  tree ─▶ where to cut, keys
//! workers:         read a chunk's files ─▶ tar ─┬──▶ compress, or take from the chunk cache ──┐
//! one thread:                                   └──▶ in order, SHA-256 = diff ID              │
//! calling thread:  in order ─▶ SHA-256 of the blob ─▶ out  ◀──────────────────────────────────┘
//! ```
//! A chunk is one gzip member or one zstd frame, so the blob is an ordinary stream for everyone else. Where to cut
//! depends on paths and sizes only: after an entry whose path hashes low for its size (about every MiB), and inside
//! files at every MiB. An edit of one file therefore changes the chunk it is in and no other, and the number of threads
//! changes no byte. Only a few chunks per thread are in memory at a time.

use std::collections::HashMap;
use std::io::{self, BufReader, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use sha2::digest::common::hazmat::SerializableState;
use sha2::{Digest, Sha256};

use super::layer::{Content, END, LayerError, Open, TarEntries, TarOptions};
use super::member::{self, Members};
use super::tar_stream::padding;
use super::{ContentDigest, Kind, Node, Tree};

/// Goes into the keys of the chunk cache. To be raised when a compressor's version changes the bytes.
const CHUNK_FORMAT: &[u8] = b"nacre chunk 5\0";

/// How a blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codec {
    /// gzip, readable by every tool.
    Gzip,
    /// zstd: faster and smaller.
    Zstd,
    /// The tar itself.
    None,
}

impl Codec {
    /// OCI media type of a layer blob (image-spec layer.md).
    pub fn media_type(self) -> &'static str {
        match self {
            Codec::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Codec::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
            Codec::None => "application/vnd.oci.image.layer.v1.tar",
        }
    }

    /// Name as users write it.
    pub fn name(self) -> &'static str {
        match self {
            Codec::Gzip => "gzip",
            Codec::Zstd => "zstd",
            Codec::None => "uncompressed",
        }
    }

    /// The level to use: the one asked for when the codec has it, else its default.
    pub fn level(self, level: Option<u32>) -> Result<u32, LayerError> {
        let (default, range) = match self {
            // As small as zlib makes it at its level 6, in less time: libdeflate's levels are others.
            Codec::Gzip => (5, 0..=12),
            Codec::Zstd => (3, 1..=22),
            Codec::None => return Ok(0),
        };
        let level = level.unwrap_or(default);
        if range.contains(&level) { Ok(level) } else { Err(LayerError::BadLevel { codec: self.name(), level }) }
    }
}

/// How to make a blob.
#[derive(Debug, Clone, Copy)]
pub struct BlobOptions {
    /// Choices for the tar.
    pub tar: TarOptions,
    /// Compression.
    pub codec: Codec,
    /// Compression level; `None` is the codec's default (gzip 5, or less for chunks that it hardly makes smaller; zstd 3).
    pub level: Option<u32>,
    /// Threads that compress; at least one.
    pub threads: usize,
}

/// What came out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobInfo {
    /// `sha256:` digest of the plain tar.
    pub diff_id: String,
    /// `sha256:` digest of the blob.
    pub digest: String,
    /// Size of the blob.
    pub size_bytes: u64,
    /// Size of the plain tar.
    pub uncompressed_bytes: u64,
    /// OCI media type.
    pub media_type: &'static str,
}

/// Remembers compressed chunks.
pub trait ChunkCache: Sync {
    /// A chunk that was put in before, exactly as it was, at the beginning of `buffer`.
    fn get(&self, key: &[u8; 32], buffer: &mut Vec<u8>) -> Option<Known>;
    /// How many of these chunks, from the first on, stand at the beginning of one blob, and how its digests stood then.
    fn beginning(&self, entries: &[Option<[u8; 32]>]) -> Vec<ChunkRecord>;
    /// Is told of all chunks of a blob in their order, whether they were known or not.
    fn put(&self, record: &ChunkRecord);
}

/// A compressed chunk that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// Length of the gzip member or zstd frame.
    pub length: usize,
    /// BLAKE3 of it.
    pub digest: [u8; 32],
}

/// What is remembered of a chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkRecord {
    /// Key of the entries in it (their headers and the digests of their contents), codec, level and format. `None` if a
    /// digest is missing.
    pub entries: Option<[u8; 32]>,
    /// Key of the plain bytes, codec, level and format; only of chunks that hold a part of a file: when the file changes,
    /// this part may be what it was.
    pub bytes: Option<[u8; 32]>,
    /// BLAKE3 of the compressed bytes.
    pub digest: [u8; 32],
    /// How many there are.
    pub compressed_bytes: u32,
    /// SHA-256 of the tar up to the end of this chunk, to go on from.
    pub plain_state: ShaState,
    /// The same of the blob.
    pub blob_state: ShaState,
}

/// A SHA-256 that is not finished, as bytes.
pub type ShaState = [u8; STATE_BYTES];
/// Chaining value, number of blocks, length of the buffer, buffer.
pub const STATE_BYTES: usize = 8 * 4 + 8 + 64;

fn save(sha: &Sha256) -> ShaState {
    sha.serialize().into()
}

fn restore(state: &ShaState) -> Result<Sha256, LayerError> {
    Sha256::deserialize(&(*state).into()).map_err(|_| LayerError::Remembered)
}

/// Writes a tree as a layer blob. [`LayerError::Remembered`]: what the cache gave is damaged; without it all is well.
pub fn write_blob(
    tree: &Tree,
    open: &Open<'_>,
    options: &BlobOptions,
    cache: Option<&dyn ChunkCache>,
    out: &mut dyn Write,
) -> Result<BlobInfo, LayerError> {
    let method = Method::of(options)?;
    let entries = TarEntries::new(tree, &options.tar);
    let seed = cache.map(|_| method.key_hasher());
    let plan = plan(&entries, options.codec, seed.as_ref())?;
    let known = cache.map(|cache| beginning(cache, &plan.chunks)).unwrap_or_default();
    Pipeline::new(&entries, &plan, method, cache, open, options.threads).carry_out(&known, out)
}

/// A blob whose files had not been read before.
pub struct EarlyBlob {
    /// The blob.
    pub info: BlobInfo,
    /// Digests of the files that had none, by their number in the tree, ascending. Of hard links, the first name's.
    pub digests: Vec<(usize, ContentDigest)>,
    chunks: Vec<ChunkRecord>,
}

impl EarlyBlob {
    /// Tells `cache` of the chunks. `tree` is the one that was written, now with the digests of all files.
    pub fn remember(self, tree: &Tree, options: &BlobOptions, cache: &dyn ChunkCache) -> Result<(), LayerError> {
        let entries = TarEntries::new(tree, &options.tar);
        let plan = plan(&entries, options.codec, Some(&Method::of(options)?.key_hasher()))?;
        for (chunk, record) in plan.chunks.iter().zip(self.chunks) {
            cache.put(&ChunkRecord { entries: chunk.key, ..record });
        }
        Ok(())
    }
}

/// As [`write_blob`], of a tree with files whose digests are not known: they are read once, digested and compressed at the
/// same time. `open` must give as many bytes as the tree says and see to it that they are of one moment.
pub fn write_early_blob(
    tree: &Tree,
    open: &Open<'_>,
    options: &BlobOptions,
    out: &mut dyn Write,
) -> Result<EarlyBlob, LayerError> {
    /// Knows nothing, and keeps what it is told.
    #[derive(Default)]
    struct Keep(Mutex<Vec<ChunkRecord>>);
    impl ChunkCache for Keep {
        fn get(&self, _: &[u8; 32], _: &mut Vec<u8>) -> Option<Known> {
            None
        }
        fn beginning(&self, _: &[Option<[u8; 32]>]) -> Vec<ChunkRecord> {
            Vec::new()
        }
        fn put(&self, record: &ChunkRecord) {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(record.clone());
        }
    }
    let method = Method::of(options)?;
    let entries = TarEntries::new(tree, &options.tar);
    let plan = plan(&entries, options.codec, None)?;
    let keep = Keep::default();
    let pipeline =
        Pipeline { early: true, ..Pipeline::new(&entries, &plan, method, Some(&keep), open, options.threads) };
    let info = pipeline.carry_out(&[], out)?;
    let mut digests = std::mem::take(&mut pipeline.lock().learned);
    // Threads tell them in any order.
    digests.sort_unstable_by_key(|(number, _)| *number);
    let chunks = std::mem::take(&mut *keep.0.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(EarlyBlob { info, digests, chunks })
}

/// The plain tar of a blob: gzip (all members), zstd (all frames) or plain, told by the first bytes.
pub fn decompress<'a>(reader: impl Read + Send + 'a) -> io::Result<Box<dyn Read + Send + 'a>> {
    let mut reader = BufReader::with_capacity(1 << 17, reader);
    // A reader may give single bytes; the four that decide have to be there.
    let mut head = Vec::with_capacity(4);
    reader.by_ref().take(4).read_to_end(&mut head)?;
    let (gzip, zstd) = (head.starts_with(&[0x1f, 0x8b]), is_zstd(&head));
    let whole = BufReader::with_capacity(1 << 17, io::Cursor::new(head).chain(reader));
    Ok(match (gzip, zstd) {
        (true, _) => Box::new(Members::new(Box::new(whole))),
        (_, true) => Box::new(zstd::stream::read::Decoder::with_buffer(whole)?),
        _ => Box::new(whole),
    })
}

/// A zstd frame, or a skippable one in front of it, begins with these bytes.
pub(super) fn is_zstd(head: &[u8]) -> bool {
    matches!(head, [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
}

/// Where to cut. None makes a chunk smaller than `min`, save the last.
struct Cutting {
    min: usize,
    /// How far beyond the minimum a cut comes on average.
    mean_rest: u64,
    /// A chunk this large ends with the current entry, whatever the hash says.
    forced: usize,
    /// Files are cut at multiples of this.
    inside: u64,
}

impl Codec {
    /// zstd finds what is alike over a longer distance, so its chunks are longer: cut at each MiB, real file systems become
    /// 2 to 3 % larger, and larger than other builders write them. deflate sees 32 KiB only.
    fn cutting(self) -> Cutting {
        match self {
            Codec::Zstd => Cutting { min: 1 << 20, mean_rest: 2 << 20, forced: 5 << 20, inside: 4 << 20 },
            _ => Cutting { min: 256 << 10, mean_rest: 768 << 10, forced: 5 << 19, inside: 1 << 20 },
        }
    }
}

/// Where a chunk begins, and what it is known by.
struct Chunk {
    /// The first node, and where in its content; 0 is in front of its headers.
    node: usize,
    offset: u64,
    /// Length of the tar in it.
    bytes: usize,
    /// Key of the entries; see [`ChunkRecord`].
    key: Option<[u8; 32]>,
    /// Begins or ends inside a file.
    has_part: bool,
}

/// A tar stream, cut.
struct Plan {
    chunks: Vec<Chunk>,
    bytes: u64,
}

/// Cuts the tar stream; needs sizes only. With `seed`, chunks get keys.
fn plan(entries: &TarEntries<'_>, codec: Codec, seed: Option<&blake3::Hasher>) -> Result<Plan, LayerError> {
    let Cutting { min, mean_rest, forced, inside } = codec.cutting();
    let mut plan = Plan { chunks: Vec::new(), bytes: 0 };
    let mut current = Chunk { node: 0, offset: 0, bytes: 0, key: None, has_part: false };
    let mut keys = Keys { seed, hasher: None, whole: true };
    keys.begin();
    let mut head = Vec::new();
    let (mut before, mut before_bytes): (Vec<u8>, u64) = (Vec::new(), 0);
    let mut cursor = entries.tree().cursor();
    while cursor.next().is_some() {
        let (at, node) = (cursor.number(), cursor.node());
        let cut = current.bytes >= forced || current.bytes >= min && ends_chunk(&before, before_bytes, mean_rest);
        if cut {
            plan.end(&mut current, (at, 0), &mut keys);
        }
        head.clear();
        let size = entries.put_head(&node.entry, &mut head)?;
        current.bytes += head.len();
        keys.entry(&head, node, size);
        let mut offset = 0;
        while offset < size {
            // A short rest of the file stays with the chunk before it.
            if offset > 0 && size - offset >= min as u64 {
                current.has_part = true;
                plan.end(&mut current, (at, offset), &mut keys);
                current.has_part = true;
                keys.part(node, offset);
            }
            let piece = inside.min(size - offset);
            current.bytes += piece as usize;
            offset += piece;
        }
        current.bytes += padding(size);
        before.clone_from(&node.entry.path);
        before_bytes = (head.len() + padding(size)) as u64 + size;
    }
    current.bytes += END.len();
    plan.end(&mut current, (entries.tree().len(), 0), &mut keys);
    Ok(plan)
}

impl Plan {
    fn end(&mut self, current: &mut Chunk, (node, offset): (usize, u64), keys: &mut Keys<'_>) {
        self.bytes += current.bytes as u64;
        current.key = keys.end(offset);
        let next = Chunk { node, offset, bytes: 0, key: None, has_part: false };
        self.chunks.push(std::mem::replace(current, next));
    }
}

/// Makes the keys of chunks from the entries in them.
struct Keys<'a> {
    seed: Option<&'a blake3::Hasher>,
    hasher: Option<blake3::Hasher>,
    /// All contents have digests.
    whole: bool,
}

impl Keys<'_> {
    fn begin(&mut self) {
        self.hasher = self.seed.cloned();
        if let Some(hasher) = &mut self.hasher {
            hasher.update(b"entries\0");
        }
        self.whole = true;
    }

    fn entry(&mut self, head: &[u8], node: &Node, size: u64) {
        if let Some(hasher) = &mut self.hasher {
            hasher.update(head);
            if size > 0 {
                self.content(node);
            }
        }
    }

    /// The chunk begins inside of this file.
    fn part(&mut self, node: &Node, offset: u64) {
        if let Some(hasher) = &mut self.hasher {
            hasher.update(b"part\0").update(&offset.to_le_bytes());
            self.content(node);
        }
    }

    fn content(&mut self, node: &Node) {
        match (&node.entry.kind, &mut self.hasher) {
            (Kind::File { digest: Some(digest), size, .. }, Some(hasher)) => {
                hasher.update(digest).update(&size.to_le_bytes());
            }
            _ => self.whole = false,
        }
    }

    /// The key of the chunk. The nodes follow from the headers; of the last, the offset says how much of it is in.
    fn end(&mut self, offset: u64) -> Option<[u8; 32]> {
        let key = self.hasher.take().map(|mut hasher| *hasher.update(&offset.to_le_bytes()).finalize().as_bytes());
        let whole = self.whole;
        self.begin();
        key.filter(|_| whole)
    }
}

/// What is known of the first chunks. Files are read from their beginning, so what follows must not begin inside of one.
fn beginning(cache: &dyn ChunkCache, chunks: &[Chunk]) -> Vec<ChunkRecord> {
    let keys: Vec<Option<[u8; 32]>> = chunks.iter().map(|chunk| chunk.key).collect();
    let mut known = cache.beginning(&keys);
    known.truncate(chunks.len());
    while chunks.get(known.len()).is_some_and(|next| next.offset > 0) {
        known.pop();
    }
    known
}

/// May a chunk end after this entry? The more bytes it has the likelier, so that the average is in bytes, not entries.
fn ends_chunk(path: &[u8], entry_bytes: u64, mean_rest: u64) -> bool {
    let hash = blake3::hash(path);
    let hash = hash.as_bytes().iter().take(8).fold(0_u64, |number, &byte| number << 8 | u64::from(byte));
    u128::from(hash) * u128::from(mean_rest) < u128::from(entry_bytes) << 64
}

/// Chunks on their way: read and compressed by any thread, hashed and written in order.
struct Pipeline<'a> {
    entries: &'a TarEntries<'a>,
    plan: &'a Plan,
    method: Method,
    cache: Option<&'a dyn ChunkCache>,
    open: &'a Open<'a>,
    threads: usize,
    /// Digests are not known yet, so that chunks have no keys, and there is no cache to ask.
    early: bool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The chunk that nobody has begun, the one to be hashed next, and the one to be written next.
    next: usize,
    hashed: usize,
    written: usize,
    slots: HashMap<usize, Slot>,
    /// Files that go on in the chunks of these numbers: several, as who reads one may be behind those who read others.
    carried: HashMap<usize, Content>,
    /// Memory of chunks that are done, for those to come: fresh memory costs as much as reading a file into it.
    plain_buffers: Vec<Vec<u8>>,
    compressed_buffers: Vec<Vec<u8>>,
    /// Digests of files that had none, by their numbers.
    learned: Vec<(usize, ContentDigest)>,
    failed: Option<LayerError>,
    ended: bool,
}

/// How far a chunk has come.
#[derive(Default)]
struct Slot {
    plain: Option<Arc<Vec<u8>>>,
    plain_state: Option<ShaState>,
    compressed: Option<Compressed>,
}

struct Compressed {
    bytes: Bytes,
    digest: [u8; 32],
    /// Key of the plain bytes.
    key: Option<[u8; 32]>,
}

enum Bytes {
    Plain(Arc<Vec<u8>>),
    /// Memory that is used again, and how much of it counts.
    Buffer(Vec<u8>, usize),
}

/// Tells the others when a thread ends before its time, by a panic or an error.
struct Guard<'p, 'a>(&'p Pipeline<'a>);

impl Drop for Guard<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(worker_lost());
        }
    }
}

impl<'a> Pipeline<'a> {
    fn new(
        entries: &'a TarEntries<'a>,
        plan: &'a Plan,
        method: Method,
        cache: Option<&'a dyn ChunkCache>,
        open: &'a Open<'a>,
        threads: usize,
    ) -> Self {
        let (state, changed) = (Mutex::default(), Condvar::new());
        Self { entries, plan, method, cache, open, threads: threads.max(1), early: false, state, changed }
    }

    /// Writes the blob. `known` is what is known of the first chunks.
    fn carry_out(&self, known: &[ChunkRecord], out: &mut dyn Write) -> Result<BlobInfo, LayerError> {
        let (mut plain, mut blob) = (Sha256::new(), Sha256::new());
        let mut size_bytes = 0;
        if let (Some(last), Some(cache)) = (known.last(), self.cache) {
            (plain, blob) = (restore(&last.plain_state)?, restore(&last.blob_state)?);
            let mut buffer = Vec::new();
            for record in known {
                let chunk = record.entries.as_ref().and_then(|key| cache.get(key, &mut buffer));
                let chunk = chunk.filter(|chunk| chunk.digest == record.digest).ok_or(LayerError::Remembered)?;
                out.write_all(&buffer[..chunk.length]).map_err(|source| LayerError::Write { source })?;
                size_bytes += chunk.length as u64;
                cache.put(record);
            }
        }
        {
            let mut state = self.lock();
            (state.next, state.hashed, state.written) = (known.len(), known.len(), known.len());
        }
        std::thread::scope(|scope| {
            let diff_id = scope.spawn(|| {
                let _guard = Guard(self);
                self.hash(plain)
            });
            for _ in 0..self.threads {
                scope.spawn(|| {
                    let _guard = Guard(self);
                    self.work();
                });
            }
            let written = {
                let _guard = Guard(self);
                self.write(&mut blob, &mut size_bytes, out)
            };
            let diff_id = diff_id.join().map_err(|_| worker_lost())?;
            written?;
            Ok(BlobInfo {
                diff_id: sha256_name(&diff_id.finalize()),
                digest: sha256_name(&blob.finalize()),
                size_bytes,
                uncompressed_bytes: self.plan.bytes,
                media_type: self.method.codec.media_type(),
            })
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `ready` gives something; `None` when the others have failed.
    fn wait<T>(&self, mut ready: impl FnMut(&mut State) -> Option<T>) -> Option<T> {
        let mut state = self.lock();
        loop {
            if state.ended {
                return None;
            }
            if let Some(found) = ready(&mut state) {
                return Some(found);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Changes the state and wakes those who wait for it.
    fn tell<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.notify_all();
        result
    }

    /// Ends all threads; the first reason counts.
    fn fail(&self, error: LayerError) {
        self.tell(|state| {
            state.failed.get_or_insert(error);
            state.ended = true;
        });
    }

    /// Reads and compresses chunks until there are no more.
    fn work(&self) {
        let mut compressors = Compressors::default();
        loop {
            let next = self.wait(|state| {
                let at = state.next;
                if at >= self.plan.chunks.len() {
                    return Some(None);
                }
                if at - state.hashed.min(state.written) > 2 * self.threads {
                    return None;
                }
                state.next += 1;
                Some(Some((at, state.plain_buffers.pop(), state.compressed_buffers.pop())))
            });
            let Some(Some((at, plain, buffer))) = next else { return };
            if let Err(error) = self.chunk(at, plain.unwrap_or_default(), buffer.unwrap_or_default(), &mut compressors)
            {
                return self.fail(error);
            }
        }
    }

    fn chunk(
        &self,
        at: usize,
        mut plain: Vec<u8>,
        mut buffer: Vec<u8>,
        compressors: &mut Compressors,
    ) -> Result<(), LayerError> {
        let chunk = &self.plan.chunks[at];
        if !self.fill(at, &mut plain)? {
            return Ok(());
        }
        let plain = Arc::new(plain);
        self.tell(|state| state.slots.entry(at).or_default().plain = Some(plain.clone()));
        let compressed = if self.method.codec == Codec::None {
            Compressed { bytes: Bytes::Plain(plain), digest: [0; 32], key: None }
        } else {
            let by_bytes = chunk.has_part || chunk.key.is_none() && !self.early;
            let key = (self.cache.is_some() && by_bytes).then(|| self.method.bytes_key(&plain));
            let mut get = |key: Option<&[u8; 32]>| self.cache?.get(key?, &mut buffer);
            let (length, digest) = match get(chunk.key.as_ref()).or_else(|| get(key.as_ref())) {
                Some(Known { length, digest }) => (length, digest),
                None => {
                    let length = self
                        .method
                        .compress(compressors, &mut buffer, &plain)
                        .map_err(|source| LayerError::Compress { source })?;
                    (length, self.cache.map_or([0; 32], |_| *blake3::hash(&buffer[..length]).as_bytes()))
                }
            };
            let bytes = Bytes::Buffer(buffer, length);
            // The hashing thread may still have it.
            self.give_back(plain);
            Compressed { bytes, digest, key }
        };
        self.tell(|state| state.slots.entry(at).or_default().compressed = Some(compressed));
        Ok(())
    }

    /// Puts the tar of a chunk into `plain`; false when others have failed meanwhile.
    fn fill(&self, at: usize, plain: &mut Vec<u8>) -> Result<bool, LayerError> {
        let chunk = &self.plan.chunks[at];
        let (end_node, end_offset) =
            self.plan.chunks.get(at + 1).map_or((self.entries.tree().len(), 0), |next| (next.node, next.offset));
        // What is left of another chunk is overwritten.
        plain.resize(chunk.bytes, 0);
        let mut rest = plain.as_mut_slice();
        let mut head = Vec::new();
        let mut offset = chunk.offset;
        let mut carried = None;
        let mut cursor = self.entries.tree().cursor_at(chunk.node);
        if offset > 0 {
            let Some(content) = self.wait(|state| state.carried.remove(&at)) else { return Ok(false) };
            carried = Some(content);
        }
        for number in chunk.node..end_node + usize::from(end_offset > 0) {
            let Some(node) = cursor.next() else { break };
            let (mut content, size) = match carried.take() {
                Some(content) => (content, content_size(node)),
                None => {
                    head.clear();
                    let size = self.entries.put_head(&node.entry, &mut head)?;
                    take(&mut rest, head.len()).copy_from_slice(&head);
                    (Content::open(node, self.open, size)?, size)
                }
            };
            let to = if number == end_node { end_offset } else { size };
            content.read(take(&mut rest, (to - offset) as usize))?;
            if number == end_node {
                self.tell(|state| state.carried.insert(at + 1, content));
                return Ok(true);
            }
            if let Some(digest) = content.finish()? {
                self.lock().learned.push((number, digest));
            }
            take(&mut rest, padding(size)).fill(0);
            offset = 0;
        }
        rest.fill(0);
        Ok(true)
    }

    /// Keeps the memory when nobody else has the chunk any more.
    fn give_back(&self, chunk: Arc<Vec<u8>>) {
        if let Some(chunk) = Arc::into_inner(chunk) {
            self.lock().plain_buffers.push(chunk);
        }
    }

    /// The diff ID.
    fn hash(&self, mut sha: Sha256) -> Sha256 {
        let first = self.lock().hashed;
        for at in first..self.plan.chunks.len() {
            let Some(plain) = self.wait(|state| state.slots.get_mut(&at)?.plain.take()) else { break };
            sha.update(plain.as_slice());
            self.give_back(plain);
            let saved = save(&sha);
            self.tell(|state| {
                state.slots.entry(at).or_default().plain_state = Some(saved);
                state.hashed = at + 1;
            });
        }
        sha
    }

    fn write(&self, sha: &mut Sha256, size_bytes: &mut u64, out: &mut dyn Write) -> Result<(), LayerError> {
        let first = self.lock().written;
        for (at, chunk) in self.plan.chunks.iter().enumerate().skip(first) {
            let ready = self.wait(|state| {
                let slot = state.slots.get(&at)?;
                // The state is for the cache; what has been hashed is soon done.
                if slot.compressed.is_none() || slot.plain_state.is_none() {
                    return None;
                }
                let slot = state.slots.remove(&at)?;
                slot.compressed.zip(slot.plain_state)
            });
            let Some((compressed, plain_state)) = ready else { break };
            let bytes = match &compressed.bytes {
                Bytes::Plain(bytes) => bytes.as_slice(),
                Bytes::Buffer(bytes, length) => &bytes[..*length],
            };
            sha.update(bytes);
            *size_bytes += bytes.len() as u64;
            if let Err(source) = out.write_all(bytes) {
                self.fail(LayerError::Write { source });
                break;
            }
            if let Some(cache) = self.cache.filter(|_| self.method.codec != Codec::None) {
                cache.put(&ChunkRecord {
                    entries: chunk.key,
                    bytes: compressed.key,
                    digest: compressed.digest,
                    compressed_bytes: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
                    plain_state,
                    blob_state: save(sha),
                });
            }
            match compressed.bytes {
                Bytes::Plain(bytes) => self.give_back(bytes),
                Bytes::Buffer(buffer, _) => self.lock().compressed_buffers.push(buffer),
            }
            self.tell(|state| state.written = at + 1);
        }
        if let Some(error) = self.lock().failed.take() {
            return Err(error);
        }
        out.flush().map_err(|source| LayerError::Write { source })
    }
}

/// Splits `length` bytes off the front.
fn take<'b>(rest: &mut &'b mut [u8], length: usize) -> &'b mut [u8] {
    let (front, back) = std::mem::take(rest).split_at_mut(length);
    *rest = back;
    front
}

fn content_size(node: &Node) -> u64 {
    match node.entry.kind {
        Kind::File { size, .. } => size,
        _ => 0,
    }
}

/// How chunks are compressed.
#[derive(Debug, Clone, Copy)]
struct Method {
    codec: Codec,
    level: u32,
    /// Nobody asked for a level: each chunk gets the lowest one that makes it about as small as the usual one.
    adapts: bool,
}

/// A thread's compressors, each made when first used and kept for its memory.
#[derive(Default)]
struct Compressors(Vec<(u32, Compressor)>);

impl Compressors {
    fn of(&mut self, codec: Codec, level: u32) -> io::Result<&mut Compressor> {
        let at = match self.0.iter().position(|(of, _)| *of == level) {
            Some(at) => at,
            None => {
                self.0.push((level, Compressor::new(codec, level)?));
                self.0.len() - 1
            }
        };
        Ok(&mut self.0[at].1)
    }
}

enum Compressor {
    Gzip(libdeflater::Compressor),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Method {
    fn of(options: &BlobOptions) -> Result<Self, LayerError> {
        let BlobOptions { codec, level, .. } = *options;
        Ok(Method { codec, level: codec.level(level)?, adapts: codec == Codec::Gzip && level.is_none() })
    }

    /// The beginning of all keys.
    fn key_hasher(self) -> blake3::Hasher {
        let mut hasher = blake3::Hasher::new();
        hasher.update(CHUNK_FORMAT);
        hasher.update(self.codec.name().as_bytes());
        hasher.update(&[0, u8::from(self.adapts)]);
        hasher.update(&self.level.to_le_bytes());
        hasher
    }

    fn bytes_key(self, chunk: &[u8]) -> [u8; 32] {
        *self.key_hasher().update(b"bytes\0").update(chunk).finalize().as_bytes()
    }

    /// Compresses a chunk into `buffer`, which is made as long as the longest possible result; the length.
    fn compress(self, compressors: &mut Compressors, buffer: &mut Vec<u8>, chunk: &[u8]) -> io::Result<usize> {
        let level = if self.adapts { self.level_for(compressors, buffer, chunk)? } else { self.level };
        compressors.of(self.codec, level)?.compress(chunk, buffer)
    }

    /// The lowest level that makes a chunk about as small as the usual one does, tried on parts of it. Archives, pictures and
    /// packages do not get smaller at all, and bytes that are partly random are as small at level 1 as at level 5, in two
    /// thirds of the time: what is evenly spread is tried there, on a sixteenth of a MiB. All else is tried at level 2, on a
    /// 64th: text whose words come in no order gains 1 % by a longer search, source files and programs 3 to 9 %.
    ///
    /// All in whole numbers: every machine must decide alike.
    fn level_for(self, compressors: &mut Compressors, buffer: &mut Vec<u8>, chunk: &[u8]) -> io::Result<u32> {
        let mut compress = |level: u32, piece: &[u8]| compressors.of(self.codec, level)?.compress(piece, buffer);
        if is_evenly_spread(chunk) {
            let (mut plain, mut quick, mut usual) = (0, 0, 0);
            for piece in pieces(chunk, 4, 16 << 10) {
                plain += piece.len();
                quick += compress(QUICK, piece)?;
                usual += compress(self.level, piece)?;
            }
            return Ok(match quick {
                _ if quick >= plain => STORED,
                _ if quick <= usual + usual / 200 => QUICK,
                _ => self.level,
            });
        }
        if chunk.len() < LEAST_TRIED {
            return Ok(self.level);
        }
        for piece in pieces(chunk, 2, 8 << 10) {
            let (less, usual) = (compress(LESS, piece)?, compress(self.level, piece)?);
            // Zeros and random bytes are alike at all levels, and say nothing about what is around them.
            let tells = usual > piece.len() / 16 && usual < piece.len() - piece.len() / 16;
            if !tells || less > usual + usual / 128 {
                return Ok(self.level);
            }
        }
        Ok(LESS)
    }
}

/// Some pieces of a chunk, from the middle of each part: at the beginning there may be a header, which compresses.
fn pieces(chunk: &[u8], count: usize, bytes: usize) -> impl Iterator<Item = &[u8]> {
    (0..count).map(move |number| {
        let start = chunk.len() / (2 * count) * (2 * number + 1);
        &chunk[start..chunk.len().min(start + bytes)]
    })
}

/// Trying smaller ones would take longer than compressing them.
const LEAST_TRIED: usize = 256 << 10;
/// Levels of gzip that chunks get instead of the usual one.
const STORED: u32 = 0;
const QUICK: u32 = 1;
const LESS: u32 = 2;

impl Compressor {
    fn new(codec: Codec, level: u32) -> io::Result<Compressor> {
        Ok(match codec {
            Codec::Zstd => Compressor::Zstd(zstd::bulk::Compressor::new(level as i32)?),
            Codec::Gzip | Codec::None => {
                let level = libdeflater::CompressionLvl::new(level as i32);
                let level = level.map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
                Compressor::Gzip(libdeflater::Compressor::new(level))
            }
        })
    }

    /// Writes to the beginning of `buffer`, which grows to hold the longest possible result; the length.
    fn compress(&mut self, plain: &[u8], buffer: &mut Vec<u8>) -> io::Result<usize> {
        let bound = match self {
            Compressor::Gzip(compressor) => member::bound(compressor, plain.len()),
            Compressor::Zstd(_) => zstd::zstd_safe::compress_bound(plain.len()),
        };
        if buffer.len() < bound {
            buffer.resize(bound, 0);
        }
        match self {
            Compressor::Gzip(compressor) => member::write(compressor, plain, buffer),
            Compressor::Zstd(compressor) => compressor.compress_to_buffer(plain, buffer.as_mut_slice()),
        }
    }
}

/// Do many values of a byte occur about as often as each other? Text has as many bits in a byte as 15 equally frequent values
/// would give, programs fewer, base64 as 64, what has been compressed or encrypted as all 256. Looks at a sixteenth of a MiB.
fn is_evenly_spread(chunk: &[u8]) -> bool {
    const PIECES: usize = 16;
    const PIECE: usize = 4096;
    const VALUES: u64 = 40;
    let mut counts = [0_u64; 256];
    let mut total = 0_u64;
    for piece in 0..PIECES {
        let start = chunk.len() / PIECES * piece;
        for &byte in chunk[start..].iter().take(PIECE) {
            counts[usize::from(byte)] += 1;
            total += 1;
        }
    }
    total * total >= VALUES * counts.iter().map(|count| count * count).sum::<u64>()
}

fn worker_lost() -> LayerError {
    LayerError::Compress { source: io::ErrorKind::BrokenPipe.into() }
}

fn sha256_name(digest: &[u8]) -> String {
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

#[cfg(test)]
mod tests {
    use super::super::index::tests::{file, sample};
    use super::super::layer::tests::sample_content;
    use super::super::layer::{Limits, NoSink, read_tar};
    use super::super::{Kind, Node, file_name};
    use super::*;
    use std::collections::HashMap;

    fn options(codec: Codec, threads: usize) -> BlobOptions {
        BlobOptions { tar: TarOptions::default(), codec, level: None, threads }
    }

    /// Bytes that compress a little, the same for each name and version.
    fn content(seed: &str, size: usize) -> Vec<u8> {
        let mut reader = blake3::Hasher::new().update(seed.as_bytes()).finalize_xof();
        let mut bytes = vec![0; size];
        reader.fill(&mut bytes);
        bytes.iter().map(|byte| b'a' + byte % 16).collect()
    }

    /// 600 small files and one of 5 MiB and a bit; `edited` is another version of a file.
    fn big(edited: Option<usize>) -> (Tree, HashMap<Vec<u8>, Vec<u8>>) {
        let mut files = HashMap::new();
        for number in 0..600 {
            let version = u32::from(edited == Some(number));
            files.insert(
                format!("d/{number:04}").into_bytes(),
                content(&format!("{number} {version}"), 7000 + number * 3),
            );
        }
        files.insert(b"d/0300-large".to_vec(), content("large", (5 << 20) + 1000));
        let node = |(path, content): (&Vec<u8>, &Vec<u8>)| file(&String::from_utf8_lossy(path), content, 0);
        (Tree::from_nodes(files.iter().map(node).collect()), files)
    }

    #[derive(Default)]
    struct Cache {
        chunks: Mutex<HashMap<[u8; 32], Vec<u8>>>,
        /// Of the blob before this one.
        before: Vec<ChunkRecord>,
        records: Mutex<Vec<ChunkRecord>>,
        hits: Mutex<usize>,
    }

    impl Cache {
        /// What the blob that was written becomes for the next one; `out` is that blob.
        fn next(self, out: &[u8]) -> Self {
            let mut chunks = self.chunks.into_inner().unwrap();
            let records = self.records.into_inner().unwrap();
            let mut rest = out;
            for record in &records {
                let (chunk, after) = rest.split_at(record.compressed_bytes as usize);
                for key in [record.entries, record.bytes].into_iter().flatten() {
                    chunks.insert(key, chunk.to_vec());
                }
                rest = after;
            }
            assert!(rest.is_empty());
            Cache { chunks: Mutex::new(chunks), before: records, ..Cache::default() }
        }
    }

    impl ChunkCache for Cache {
        fn get(&self, key: &[u8; 32], buffer: &mut Vec<u8>) -> Option<Known> {
            *buffer = self.chunks.lock().unwrap().get(key).cloned()?;
            *self.hits.lock().unwrap() += 1;
            Some(Known { length: buffer.len(), digest: *blake3::hash(buffer).as_bytes() })
        }

        fn beginning(&self, entries: &[Option<[u8; 32]>]) -> Vec<ChunkRecord> {
            let alike =
                self.before.iter().zip(entries).take_while(|(known, key)| key.is_some() && known.entries == **key);
            alike.map(|(known, _)| known.clone()).collect()
        }

        fn put(&self, record: &ChunkRecord) {
            self.records.lock().unwrap().push(record.clone());
        }
    }

    fn write(edited: Option<usize>, options: &BlobOptions, cache: Option<&Cache>) -> (Vec<u8>, BlobInfo) {
        let (tree, files) = big(edited);
        let open = |node: &Node| -> io::Result<Box<dyn Read + Send>> {
            Ok(Box::new(io::Cursor::new(files[&node.entry.path].clone())))
        };
        let mut out = Vec::new();
        let info = write_blob(&tree, &open, options, cache.map(|cache| cache as _), &mut out).unwrap();
        assert_eq!(info.digest, sha256_name(&Sha256::digest(&out)));
        assert_eq!(info.size_bytes, out.len() as u64);
        (out, info)
    }

    #[test]
    fn bytes_stay() {
        for (codec, expected) in [
            (Codec::Gzip, "d0e714d91e62f4e7c1444829e5d28c6955bdd74c5cb47aeb26f2e5ea872a2841"),
            (Codec::Zstd, "b9c80629ba694ca217dfc5b14c3f137328946c5826a9cea631a548b5a6f74d5d"),
            (Codec::None, "a2f6a17bafc90dca629db4dea5bf261a41c5c20a870a9ed4112cc8665f5dae1a"),
        ] {
            let mut out = Vec::new();
            let info = write_blob(&sample(), &sample_content, &options(codec, 1), None, &mut out).unwrap();
            assert_eq!(info.digest, format!("sha256:{expected}"), "{codec:?}");
        }
    }

    #[test]
    fn every_codec_gives_the_tar_back() {
        let (plain, plain_info) = write(None, &options(Codec::None, 1), None);
        assert_eq!((&plain_info.digest, plain_info.size_bytes), (&plain_info.diff_id, plain_info.uncompressed_bytes));
        for codec in [Codec::Gzip, Codec::Zstd, Codec::None] {
            let (blob, info) = write(None, &options(codec, 2), None);
            assert_eq!((&info.diff_id, info.uncompressed_bytes), (&plain_info.diff_id, plain.len() as u64));
            assert_eq!(info.media_type, codec.media_type());
            let mut tar = Vec::new();
            decompress(blob.as_slice()).unwrap().read_to_end(&mut tar).unwrap();
            assert!(tar == plain, "{codec:?}");
        }
        assert_eq!(read_tar(&mut plain.as_slice(), &mut NoSink, &Limits::default()).unwrap(), big(None).0);
    }

    #[test]
    fn threads_change_nothing() {
        for codec in [Codec::Gzip, Codec::Zstd] {
            let one = write(None, &options(codec, 1), None);
            assert!(one == write(None, &options(codec, 4), None), "{codec:?}");
            assert!(one == write(None, &options(codec, 0), None), "{codec:?}");
        }
    }

    #[test]
    fn an_edit_changes_one_chunk() {
        for codec in [Codec::Gzip, Codec::Zstd] {
            let cache = Cache::default();
            let (first, first_info) = write(None, &options(codec, 2), Some(&cache));
            let cache = cache.next(&first);
            let chunks = cache.before.len();
            assert!((3..20).contains(&chunks), "{chunks} chunks of 9 MiB");
            let (again, _) = write(None, &options(codec, 2), Some(&cache));
            assert!(first == again);
            assert_eq!(*cache.hits.lock().unwrap(), chunks);
            // At the beginning, in the middle and at the end; each is as it would be without a cache.
            let mut cache = cache.next(&first);
            for number in [0, 100, 299, 301, 599, 0] {
                let (expected, info) = write(Some(number), &options(codec, 2), None);
                let (edited, edited_info) = write(Some(number), &options(codec, 2), Some(&cache));
                assert!(edited == expected && edited_info == info && edited != first, "{number}");
                assert_ne!(edited_info.diff_id, first_info.diff_id);
                let records = cache.records.lock().unwrap().len();
                assert!(*cache.hits.lock().unwrap() + 2 >= records, "{number}: {records}");
                cache = cache.next(&edited);
            }
            // Another level is another chunk.
            let level_one = BlobOptions { level: Some(1), ..options(codec, 2) };
            write(None, &level_one, Some(&cache));
            assert_eq!(*cache.hits.lock().unwrap(), 0);
        }
    }

    #[test]
    fn a_changed_large_file_keeps_its_chunks() {
        let blob = |content: &[u8], cache: &Cache| {
            let tree = Tree::from_nodes(vec![file("a", b"small", 0), file("big", content, 0), file("c", b"more", 0)]);
            let open = |node: &Node| -> io::Result<Box<dyn Read + Send>> {
                Ok(Box::new(io::Cursor::new(match node.entry.path.as_slice() {
                    b"a" => b"small".to_vec(),
                    b"c" => b"more".to_vec(),
                    _ => content.to_vec(),
                })))
            };
            let mut out = Vec::new();
            write_blob(&tree, &open, &options(Codec::Gzip, 2), Some(cache), &mut out).unwrap();
            out
        };
        let mut bytes = content("large", 6 << 20);
        let cache = Cache::default();
        let first = blob(&bytes, &cache);
        let cache = cache.next(&first);
        bytes[(3 << 20) + 5] ^= 1;
        let second = blob(&bytes, &cache);
        assert!(second == blob(&bytes, &Cache::default()) && second != first);
        assert_eq!(*cache.hits.lock().unwrap(), cache.before.len() - 1);
    }

    #[test]
    fn damage_in_the_cache_is_told() {
        let cache = Cache::default();
        let (first, _) = write(None, &options(Codec::Gzip, 2), Some(&cache));
        let mut cache = cache.next(&first);
        let (tree, files) = big(Some(500));
        let open = |node: &Node| -> io::Result<Box<dyn Read + Send>> {
            Ok(Box::new(io::Cursor::new(files[&node.entry.path].clone())))
        };
        cache.before[0].digest[0] ^= 1;
        let result = write_blob(&tree, &open, &options(Codec::Gzip, 2), Some(&cache), &mut io::sink());
        assert!(matches!(result, Err(LayerError::Remembered)));
        cache.before[0].digest[0] ^= 1;
        let last = cache.before.len() - 1;
        for record in &mut cache.before[..last] {
            // No such state: more bytes wait than a block has.
            record.plain_state = [0xff; STATE_BYTES];
        }
        let result = write_blob(&tree, &open, &options(Codec::Gzip, 2), Some(&cache), &mut io::sink());
        assert!(matches!(result, Err(LayerError::Remembered)));
    }

    #[test]
    fn what_was_not_read_before_gives_the_same() {
        let (mut tree, mut files) = big(None);
        // Two names of a file, one of which is in front of the other.
        files.insert(b"d/0300-other".to_vec(), files[&b"d/0300-large"[..]].clone());
        let mut other = tree.get(b"d/0300-large").unwrap();
        other.entry.path = b"d/0300-other".to_vec();
        tree.edit(|nodes| {
            nodes.push(other);
            nodes.push(file("empty", b"", 0));
            for node in nodes {
                if let Kind::File { link_group, .. } = &mut node.entry.kind {
                    *link_group = u32::from(node.entry.path.starts_with(b"d/0300-"));
                }
            }
        });
        let mut unread = tree.clone();
        unread.edit(|nodes| {
            for (at, node) in nodes.iter_mut().enumerate() {
                if let Kind::File { digest, .. } = &mut node.entry.kind
                    && at != 7
                {
                    *digest = None;
                }
            }
        });
        let open = |node: &Node| -> io::Result<Box<dyn Read + Send>> {
            Ok(Box::new(io::Cursor::new(files[&node.entry.path].clone())))
        };
        for (codec, threads) in [(Codec::Gzip, 1), (Codec::Gzip, 3), (Codec::Zstd, 2), (Codec::None, 2)] {
            let options = options(codec, threads);
            let usual = Cache::default();
            let mut expected = Vec::new();
            let info = write_blob(&tree, &open, &options, Some(&usual), &mut expected).unwrap();
            let mut blob = Vec::new();
            let early = write_early_blob(&unread, &open, &options, &mut blob).unwrap();
            assert!(blob == expected && early.info == info, "{codec:?}");
            let wanted = tree.iter().enumerate().filter_map(|(at, node)| match node.entry.kind {
                // Read by its first name; nothing to read; known.
                _ if node.entry.path == b"d/0300-other" || node.entry.path == b"empty" || at == 7 => None,
                Kind::File { digest, .. } => Some((at, digest?)),
                _ => None,
            });
            assert!(early.digests == wanted.collect::<Vec<_>>(), "{codec:?}");
            let cache = Cache::default();
            early.remember(&tree, &options, &cache).unwrap();
            assert!(*cache.records.lock().unwrap() == *usual.records.lock().unwrap(), "{codec:?}");
        }
        let short = |_: &Node| -> io::Result<Box<dyn Read + Send>> { Ok(Box::new(io::empty())) };
        let result = write_early_blob(&unread, &short, &options(Codec::Gzip, 2), &mut io::sink());
        assert!(matches!(result, Err(LayerError::Changed { .. })));
    }

    #[test]
    fn chunks_keep_their_size() {
        for codec in [Codec::Gzip, Codec::Zstd] {
            let tree = big(None).0;
            let tar = TarOptions::default();
            let plan = plan(&TarEntries::new(&tree, &tar), codec, None).unwrap();
            let sizes: Vec<usize> = plan.chunks.iter().map(|chunk| chunk.bytes).collect();
            let Cutting { min, forced, inside, .. } = codec.cutting();
            assert!(sizes.iter().all(|&size| size <= forced + inside as usize + min), "{sizes:?}");
            assert!(sizes[..sizes.len() - 1].iter().all(|&size| size >= min), "{sizes:?}");
            assert_eq!(sizes.iter().sum::<usize>() as u64, plan.bytes);
        }
    }

    #[test]
    fn files_that_go_on_in_other_chunks_do_not_meet() {
        use std::sync::mpsc;
        const PART: usize = 1 << 20;
        /// Says when it has given its first part, or waits for that before it gives any.
        enum When {
            Tell(mpsc::Sender<()>),
            Wait(mpsc::Receiver<()>),
        }
        struct Slow(io::Cursor<Vec<u8>>, When);
        impl Read for Slow {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                let at = self.0.position() as usize;
                match &self.1 {
                    When::Wait(said) if at == 0 => said.recv().map_err(io::Error::other)?,
                    When::Tell(tell) if at >= PART => drop(tell.send(())),
                    _ => {}
                }
                let most = if at < PART { buffer.len().min(PART - at) } else { buffer.len() };
                self.0.read(&mut buffer[..most])
            }
        }
        let bytes = [content("a", 5 * PART / 2), content("b", 5 * PART / 2)];
        let tree = Tree::from_nodes(vec![file("a", &bytes[0], 0), file("b", &bytes[1], 0)]);
        let blob = |threads: usize, ordered: bool| {
            let (tell, said) = mpsc::channel();
            let whens = [When::Wait(said), When::Tell(tell.clone())];
            let readers = Mutex::new(
                whens
                    .into_iter()
                    .zip(&bytes)
                    .map(|(when, bytes)| Some(Slow(io::Cursor::new(bytes.clone()), when)))
                    .collect::<Vec<_>>(),
            );
            if !ordered {
                tell.send(()).unwrap();
            }
            let open = |node: &Node| -> io::Result<Box<dyn Read + Send>> {
                let at = usize::from(node.entry.path == b"b");
                Ok(Box::new(readers.lock().unwrap()[at].take().unwrap()))
            };
            let mut out = Vec::new();
            write_blob(&tree, &open, &options(Codec::Gzip, threads), None, &mut out).map(|_| out).unwrap()
        };
        // The second file is carried on before the first one is.
        assert!(blob(4, true) == blob(1, false));
    }

    #[test]
    fn failures_end_the_threads() {
        let (tree, files) = big(None);
        let open = |node: &Node| -> io::Result<Box<dyn Read + Send>> {
            match file_name(&node.entry.path) {
                b"0500" => Err(io::ErrorKind::PermissionDenied.into()),
                _ => Ok(Box::new(io::Cursor::new(files[&node.entry.path].clone()))),
            }
        };
        let result = write_blob(&tree, &open, &options(Codec::Zstd, 3), None, &mut io::sink());
        assert!(matches!(result, Err(LayerError::Content { path, .. }) if path == "d/0500"));
        struct Full;
        impl Write for Full {
            fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let open = |node: &Node| -> io::Result<Box<dyn Read + Send>> {
            Ok(Box::new(io::Cursor::new(files[&node.entry.path].clone())))
        };
        for codec in [Codec::Gzip, Codec::None] {
            let result = write_blob(&tree, &open, &options(codec, 3), None, &mut Full);
            assert!(matches!(result, Err(LayerError::Write { source }) if source.kind() == io::ErrorKind::StorageFull));
        }
        assert!(tree.nodes().iter().all(|node| matches!(node.entry.kind, Kind::File { .. })));
    }

    #[test]
    fn effort_is_for_what_compresses() {
        let mut random = vec![0; 1 << 20];
        blake3::Hasher::new().update(b"random").finalize_xof().fill(&mut random);
        assert!(is_evenly_spread(&random));
        assert!(!is_evenly_spread(&content("text", 1 << 20)));
        let half: Vec<u8> =
            random.iter().enumerate().map(|(at, &byte)| if at % 2 == 0 { byte } else { b' ' }).collect();
        let blob = |level: Option<u32>, bytes: &[u8]| {
            let tree = Tree::from_nodes(vec![file("f", bytes, 0)]);
            let open = |_: &Node| -> io::Result<Box<dyn Read + Send>> { Ok(Box::new(io::Cursor::new(bytes.to_vec()))) };
            let mut out = Vec::new();
            write_blob(&tree, &open, &BlobOptions { level, ..options(Codec::Gzip, 1) }, None, &mut out).unwrap();
            out
        };
        let stored = blob(None, &random);
        assert!(stored.len() < random.len() + 4096 && stored.windows(1024).any(|window| window == &random[..1024]));
        assert!(!is_evenly_spread(&half));
        assert!(blob(None, &half) == blob(Some(2), &half) && blob(None, &half) != blob(Some(5), &half));
        // Phrases that come again, whole or in part, as in source files: level 2 makes several percent more of them.
        let letters: Vec<u8> = random.iter().map(|byte| b'a' + byte % 16).collect();
        let source: Vec<u8> = random
            .chunks(4)
            .flat_map(|four| {
                let start = usize::from(four[0] % 64) * 40;
                &letters[start + usize::from(four[1] % 8)..start + 40 - usize::from(four[2] % 16)]
            })
            .copied()
            .take(1 << 20)
            .collect();
        assert!(!is_evenly_spread(&source));
        assert!(blob(None, &source) == blob(Some(5), &source) && blob(None, &source) != blob(Some(2), &source));
        // A picture among zeros is not everything.
        let among = [vec![0; 200 << 10], random[..600 << 10].to_vec(), vec![0; 200 << 10]].concat();
        assert!(!is_evenly_spread(&among));
        assert!(blob(None, &among) == blob(Some(5), &among));
        // As uneven as programs are, but no smaller with more effort.
        let words: Vec<&[u8]> = random[..16 << 10].chunks(16).collect();
        let picked = random.chunks(2).map(|two| words[usize::from(u16::from_le_bytes([two[0], two[1]])) % words.len()]);
        let pool: Vec<u8> = picked.flatten().copied().take(1 << 20).collect();
        assert!(is_evenly_spread(&pool));
        assert!(blob(None, &pool) == blob(Some(1), &pool));
    }

    #[test]
    fn levels() {
        for (codec, level, expected) in [
            (Codec::Gzip, None, Some(5)),
            (Codec::Gzip, Some(12), Some(12)),
            (Codec::Gzip, Some(13), None),
            (Codec::Zstd, None, Some(3)),
            (Codec::Zstd, Some(0), None),
            (Codec::Zstd, Some(22), Some(22)),
            (Codec::None, Some(99), Some(0)),
        ] {
            assert_eq!(codec.level(level).ok(), expected, "{codec:?} {level:?}");
        }
    }

    #[test]
    fn short_streams_are_plain() {
        for text in ["", "a", "abc", "plain text"] {
            let mut out = String::new();
            decompress(text.as_bytes()).unwrap().read_to_string(&mut out).unwrap();
            assert_eq!(out, text);
        }
    }
}
