//! Layers as blobs: the tar stream, cut into chunks, each compressed alone, joined in order.
//!
//! ```text
//! calling thread:  tree ─▶ tar ─▶ chunks ─┬──▶ workers: compress (or take from the chunk cache) ──┐
//!                                         └──▶ one thread: SHA-256 of the plain bytes = diff ID   │
//! calling thread:  in order ─▶ SHA-256 of the blob ─▶ out  ◀──────────────────────────────────────┘
//! ```
//! A chunk is one gzip member or one zstd frame, so the blob is an ordinary stream for everyone else. Where to cut
//! depends on paths and sizes only: after an entry whose path hashes low for its size (about every MiB), and inside
//! files at every MiB. An edit of one file therefore changes the chunk it is in and no other, and the number of threads
//! changes no byte. Only a few chunks per thread are in memory at a time.

use std::collections::VecDeque;
use std::io::{self, BufReader, Read, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};

use super::Tree;
use super::layer::{LayerError, Open, TarOptions, TarSink, write_tar};

/// No cut makes a chunk smaller than this, save the last.
const MIN_CHUNK: usize = 256 << 10;
/// How far beyond the minimum a cut comes on average.
const MEAN_REST: u64 = 768 << 10;
/// A chunk this large ends with the current entry, whatever the hash says. What a single entry can add before it is cut
/// inside is 1.25 MiB, so chunks stay below 4 MiB.
const FORCED_CHUNK: usize = 5 << 19;
/// Enough for nearly every chunk: what no hash cuts is cut here, and an entry that comes last can be as long again.
const CHUNK_CAPACITY: usize = FORCED_CHUNK + (3 << 19);
/// Goes into the keys of the chunk cache. To be raised when a compressor's version changes the bytes.
const CHUNK_FORMAT: &[u8] = b"nacre chunk 1\0";

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
    /// Compression level; `None` is the codec's default (gzip 5, zstd 3).
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

/// Remembers compressed chunks. The key covers the plain bytes, codec, level and format.
pub trait ChunkCache: Sync {
    /// A chunk that was put in before, exactly as it was.
    fn get(&self, key: &[u8; 32]) -> Option<Vec<u8>>;
    /// Is told of all chunks of a blob in their order, whether they were known or not.
    fn put(&self, key: &[u8; 32], compressed: &[u8]);
}

/// Writes a tree as a layer blob.
pub fn write_blob(
    tree: &Tree,
    open: &Open<'_>,
    options: &BlobOptions,
    cache: Option<&dyn ChunkCache>,
    out: &mut dyn Write,
) -> Result<BlobInfo, LayerError> {
    let level = options.codec.level(options.level)?;
    let threads = options.threads.max(1);
    let in_flight = 2 * threads + 1;
    let (plain, plain_end) = sync_channel::<Arc<Vec<u8>>>(in_flight);
    let (jobs, jobs_end) = sync_channel::<Job>(in_flight);
    let jobs_end = Mutex::new(jobs_end);
    let buffers = Buffers::default();
    std::thread::scope(|scope| {
        let buffers = &buffers;
        let diff_id = scope.spawn(move || {
            let mut sha = Sha256::new();
            for chunk in plain_end {
                sha.update(chunk.as_slice());
                buffers.give_back(chunk);
            }
            sha.finalize()
        });
        if options.codec != Codec::None {
            for _ in 0..threads {
                scope.spawn(|| work(&jobs_end, options.codec, level, cache, buffers));
            }
        }
        let mut sink = ChunkSink {
            chunk: buffers.take(),
            buffers,
            path: Vec::new(),
            entry_bytes: 0,
            uncompressed_bytes: 0,
            plain,
            jobs: (options.codec != Codec::None).then_some(jobs),
            pending: VecDeque::new(),
            in_flight,
            sha: Sha256::new(),
            size_bytes: 0,
            out,
            cache,
            failed: None,
        };
        // Dropping the sink on any way out ends the threads.
        write_tar(tree, open, &options.tar, &mut sink).map_err(|error| sink.failed.take().unwrap_or(error))?;
        sink.finish()?;
        let (digest, size_bytes, uncompressed_bytes) = (sink.sha.finalize(), sink.size_bytes, sink.uncompressed_bytes);
        drop((sink.plain, sink.jobs));
        let diff_id = diff_id.join().map_err(|_| worker_lost())?;
        Ok(BlobInfo {
            diff_id: sha256_name(&diff_id),
            digest: sha256_name(&digest),
            size_bytes,
            uncompressed_bytes,
            media_type: options.codec.media_type(),
        })
    })
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
        (true, _) => Box::new(flate2::bufread::MultiGzDecoder::new(whole)),
        (_, true) => Box::new(zstd::stream::read::Decoder::with_buffer(whole)?),
        _ => Box::new(whole),
    })
}

/// A zstd frame, or a skippable one in front of it, begins with these bytes.
pub(super) fn is_zstd(head: &[u8]) -> bool {
    matches!(head, [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
}

/// A chunk to compress and where the result goes.
struct Job {
    chunk: Arc<Vec<u8>>,
    done: SyncSender<io::Result<Compressed>>,
}

/// A compressed chunk and its key, which only a cache needs.
struct Compressed {
    key: Option<[u8; 32]>,
    bytes: Vec<u8>,
}

/// Memory of chunks that are done, for those to come: fresh memory costs as much as reading a file into it.
#[derive(Default)]
struct Buffers(Mutex<Vec<Vec<u8>>>);

impl Buffers {
    fn take(&self) -> Vec<u8> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        // With all it will take: growing would leave pieces of memory behind.
        known.unwrap_or_else(|| Vec::with_capacity(CHUNK_CAPACITY))
    }

    /// Keeps the memory when nobody else has the chunk any more.
    fn give_back(&self, chunk: Arc<Vec<u8>>) {
        if let Some(mut chunk) = Arc::into_inner(chunk) {
            chunk.clear();
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(chunk);
        }
    }
}

/// Takes jobs until there are no more.
fn work(jobs: &Mutex<Receiver<Job>>, codec: Codec, level: u32, cache: Option<&dyn ChunkCache>, buffers: &Buffers) {
    let mut compressor = None;
    let mut scratch = Vec::new();
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { chunk, done }) = job else {
            return;
        };
        let key = cache.map(|_| chunk_key(&chunk, codec, level));
        let known = cache.zip(key.as_ref()).and_then(|(cache, key)| cache.get(key));
        let result = match known {
            Some(compressed) => Ok(compressed),
            None => compress(&mut compressor, &mut scratch, &chunk, codec, level),
        };
        buffers.give_back(chunk);
        let result = result.map(|bytes| Compressed { key, bytes });
        // Nobody waits any more when the build failed elsewhere.
        drop(done.send(result));
    }
}

fn chunk_key(chunk: &[u8], codec: Codec, level: u32) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(CHUNK_FORMAT);
    hasher.update(codec.name().as_bytes());
    hasher.update(&[0]);
    hasher.update(&level.to_le_bytes());
    hasher.update(chunk);
    *hasher.finalize().as_bytes()
}

/// A thread's compressor, kept for its memory.
enum Compressor {
    Gzip(libdeflater::Compressor),
    Zstd(zstd::bulk::Compressor<'static>),
}

/// Compresses a chunk. `scratch` keeps the memory that the longest possible result would take.
fn compress(
    slot: &mut Option<Compressor>,
    scratch: &mut Vec<u8>,
    chunk: &[u8],
    codec: Codec,
    level: u32,
) -> io::Result<Vec<u8>> {
    let compressor = match slot {
        Some(compressor) => compressor,
        None => slot.insert(match codec {
            Codec::Zstd => Compressor::Zstd(zstd::bulk::Compressor::new(level as i32)?),
            Codec::Gzip | Codec::None => {
                let level = libdeflater::CompressionLvl::new(level as i32);
                let level = level.map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
                Compressor::Gzip(libdeflater::Compressor::new(level))
            }
        }),
    };
    let bound = match compressor {
        Compressor::Gzip(compressor) => compressor.gzip_compress_bound(chunk.len()),
        Compressor::Zstd(_) => zstd::zstd_safe::compress_bound(chunk.len()),
    };
    if scratch.len() < bound {
        scratch.resize(bound, 0);
    }
    let length = match compressor {
        Compressor::Gzip(compressor) => compressor.gzip_compress(chunk, scratch).map_err(io::Error::other)?,
        Compressor::Zstd(compressor) => compressor.compress_to_buffer(chunk, scratch.as_mut_slice())?,
    };
    Ok(scratch[..length].to_vec())
}

/// Cuts the tar stream and keeps the pipeline filled.
struct ChunkSink<'a> {
    chunk: Vec<u8>,
    buffers: &'a Buffers,
    /// The entry being written, and what of it has been written.
    path: Vec<u8>,
    entry_bytes: u64,
    uncompressed_bytes: u64,
    plain: SyncSender<Arc<Vec<u8>>>,
    /// `None` when nothing is compressed.
    jobs: Option<SyncSender<Job>>,
    /// Results to come, in the order of the stream.
    pending: VecDeque<Receiver<io::Result<Compressed>>>,
    in_flight: usize,
    sha: Sha256,
    size_bytes: u64,
    out: &'a mut dyn Write,
    cache: Option<&'a dyn ChunkCache>,
    /// The reason behind an error that the tar writer was told of.
    failed: Option<LayerError>,
}

impl TarSink for ChunkSink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.chunk.extend_from_slice(bytes);
        self.entry_bytes += bytes.len() as u64;
        Ok(())
    }

    fn boundary(&mut self, path: &[u8]) -> io::Result<()> {
        let length = self.chunk.len();
        if length >= FORCED_CHUNK || length >= MIN_CHUNK && ends_chunk(&self.path, self.entry_bytes) {
            self.cut()?;
        }
        self.path.clear();
        self.path.extend_from_slice(path);
        self.entry_bytes = 0;
        Ok(())
    }

    fn inside(&mut self, offset: u64, size: u64) -> io::Result<()> {
        // A short rest of the file stays with the chunk before it.
        if size - offset >= MIN_CHUNK as u64 { self.cut() } else { Ok(()) }
    }
}

/// May a chunk end after this entry? The more bytes it has the likelier, so that the average is in bytes, not entries.
fn ends_chunk(path: &[u8], entry_bytes: u64) -> bool {
    let hash = blake3::hash(path);
    let hash = hash.as_bytes().iter().take(8).fold(0_u64, |number, &byte| number << 8 | u64::from(byte));
    u128::from(hash) * u128::from(MEAN_REST) < u128::from(entry_bytes) << 64
}

impl ChunkSink<'_> {
    fn cut(&mut self) -> io::Result<()> {
        self.submit().map_err(|error| {
            self.failed = Some(error);
            io::ErrorKind::Other.into()
        })
    }

    fn submit(&mut self) -> Result<(), LayerError> {
        let chunk = Arc::new(std::mem::replace(&mut self.chunk, self.buffers.take()));
        self.uncompressed_bytes += chunk.len() as u64;
        self.plain.send(Arc::clone(&chunk)).map_err(|_| worker_lost())?;
        let Some(jobs) = &self.jobs else {
            self.put(&chunk)?;
            self.buffers.give_back(chunk);
            return Ok(());
        };
        let (done, result) = sync_channel(1);
        jobs.send(Job { chunk, done }).map_err(|_| worker_lost())?;
        self.pending.push_back(result);
        if self.pending.len() >= self.in_flight { self.take_oldest() } else { Ok(()) }
    }

    fn take_oldest(&mut self) -> Result<(), LayerError> {
        let Some(oldest) = self.pending.pop_front() else {
            return Ok(());
        };
        let compressed = oldest.recv().map_err(|_| worker_lost())?;
        let Compressed { key, bytes } = compressed.map_err(|source| LayerError::Compress { source })?;
        if let (Some(cache), Some(key)) = (self.cache, key) {
            cache.put(&key, &bytes);
        }
        self.put(&bytes)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), LayerError> {
        self.sha.update(bytes);
        self.size_bytes += bytes.len() as u64;
        self.out.write_all(bytes).map_err(|source| LayerError::Write { source })
    }

    fn finish(&mut self) -> Result<(), LayerError> {
        if !self.chunk.is_empty() {
            self.submit()?;
        }
        while !self.pending.is_empty() {
            self.take_oldest()?;
        }
        self.out.flush().map_err(|source| LayerError::Write { source })
    }
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
        hits: Mutex<usize>,
    }

    impl ChunkCache for Cache {
        fn get(&self, key: &[u8; 32]) -> Option<Vec<u8>> {
            let found = self.chunks.lock().unwrap().get(key).cloned();
            *self.hits.lock().unwrap() += usize::from(found.is_some());
            found
        }

        fn put(&self, key: &[u8; 32], compressed: &[u8]) {
            self.chunks.lock().unwrap().insert(*key, compressed.to_vec());
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
            (Codec::Gzip, "686a1946939a6969b49684bbe601eb325cf71d7929c41ad718a1aee5b9cbd919"),
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
        let cache = Cache::default();
        let (first, _) = write(None, &options(Codec::Gzip, 2), Some(&cache));
        let chunks = cache.chunks.lock().unwrap().len();
        assert!((8..20).contains(&chunks), "{chunks} chunks of 9 MiB");
        let (again, _) = write(None, &options(Codec::Gzip, 2), Some(&cache));
        assert!(first == again);
        assert_eq!(*cache.hits.lock().unwrap(), chunks);
        let (edited, _) = write(Some(100), &options(Codec::Gzip, 2), Some(&cache));
        assert!(edited != first);
        assert!(cache.chunks.lock().unwrap().len() <= chunks + 2);
        // Another level is another chunk.
        let level_one = BlobOptions { level: Some(1), ..options(Codec::Gzip, 2) };
        let hits = *cache.hits.lock().unwrap();
        write(None, &level_one, Some(&cache));
        assert_eq!(*cache.hits.lock().unwrap(), hits);
    }

    #[test]
    fn chunks_keep_their_size() {
        struct Sizes(Mutex<Vec<usize>>);
        impl ChunkCache for Sizes {
            fn get(&self, _key: &[u8; 32]) -> Option<Vec<u8>> {
                None
            }
            fn put(&self, _key: &[u8; 32], compressed: &[u8]) {
                let mut plain = Vec::new();
                flate2::read::GzDecoder::new(compressed).read_to_end(&mut plain).unwrap();
                self.0.lock().unwrap().push(plain.len());
            }
        }
        let sizes = Sizes(Mutex::default());
        let (tree, files) = big(None);
        let open = |node: &Node| -> io::Result<Box<dyn Read + Send>> {
            Ok(Box::new(io::Cursor::new(files[&node.entry.path].clone())))
        };
        write_blob(&tree, &open, &options(Codec::Gzip, 1), Some(&sizes), &mut io::sink()).unwrap();
        let sizes = sizes.0.into_inner().unwrap();
        assert!(sizes.iter().all(|&size| size <= 4 << 20), "{sizes:?}");
        assert!(sizes[..sizes.len() - 1].iter().all(|&size| size >= MIN_CHUNK), "{sizes:?}");
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
