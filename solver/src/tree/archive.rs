//! Archives that ADD unpacks: tar, plain or in gzip, bzip2, xz or zstd.
//!
//! The content decides, never the name: a file is an archive when, decompressed by its first bytes, it begins with a
//! valid tar entry. An empty tar is none, nor is a gzip file that holds something else; ADD copies those as they are.
//! No name from an archive touches the disk: bytes go to numbered files in a staging directory, and the result is a
//! [`Tree`] over them. Archives are foreign bytes, so everything is bounded by [`Limits`].

use std::cell::Cell;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use super::blob::is_zstd;
use super::layer::{LayerError, LayerSink, Limits, begins_tar, read_archive};
use super::stream::copy_buffered;
use super::tar_stream::{BLOCK, RatioExceeded};
use super::{Entry, OnDisk, Origin, Tree};

/// Most memory that an xz stream may ask for; its strongest preset takes 65 MiB.
const XZ_MEMORY: u64 = 512 << 20;
/// A small archive of zeros has an extreme ratio and does no harm.
const RATIO_FROM: u64 = 1 << 30;
/// Most bytes looked at to find the first entry; extension headers can stand before it.
const PROBE_BYTES: usize = 8 << 20;
/// Read at a time.
const READ_BYTES: usize = 256 << 10;

/// How an archive is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// gzip.
    Gzip,
    /// bzip2.
    Bzip2,
    /// xz.
    Xz,
    /// zstd.
    Zstd,
}

/// Why an archive could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The archive file itself.
    #[error("cannot open archive {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Its content, or the staging directory.
    #[error("cannot unpack archive {}", path.display())]
    Unpack {
        /// The file.
        path: PathBuf,
        /// Cause.
        source: LayerError,
    },
}

/// The compression that begins with these bytes (six are enough); `None` is no known one.
pub fn detect(prefix: &[u8]) -> Option<Compression> {
    match prefix {
        [0x1f, 0x8b, 0x08, ..] => Some(Compression::Gzip),
        [b'B', b'Z', b'h', ..] => Some(Compression::Bzip2),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Compression::Xz),
        head if is_zstd(head) => Some(Compression::Zstd),
        _ => None,
    }
}

/// The plain tar inside, from its beginning; `None` when there is none.
pub fn open<'a>(reader: impl Read + 'a) -> Option<Box<dyn Read + 'a>> {
    open_limited(reader, &Limits::default())
}

/// Unpacks an archive: the bytes of regular files into numbered files of `staging` (a fresh directory), all else into
/// the tree. Owners, modes, links, devices and times are as in the archive, parents without an entry stay implied.
/// `None` when the file is not an archive.
pub fn unpack(path: &Path, staging: &Path, limits: &Limits) -> Result<Option<Tree>, ArchiveError> {
    let open_error = |source| ArchiveError::Open { path: path.to_owned(), source };
    // Opening a fifo would wait for a writer.
    if !fs::symlink_metadata(path).map_err(open_error)?.is_file() {
        return Ok(None);
    }
    let file = File::open(path).map_err(open_error)?;
    let Some(tar) = open_limited(file, limits) else {
        return Ok(None);
    };
    let numbered = |number: u64| staging.join(number.to_string());
    let mut sink = Staging { numbered: &numbered, next: 0 };
    let directory: Arc<Path> = Arc::from(staging);
    let origin = |number: u64| {
        let path = number.to_string().into_bytes();
        Origin::File(OnDisk { directory: directory.clone(), path, inode: None })
    };
    let tree = read_archive(&mut BufReader::with_capacity(READ_BYTES, tar), &mut sink, limits, &origin);
    tree.map(Some).map_err(|source| ArchiveError::Unpack { path: path.to_owned(), source })
}

struct Staging<'a> {
    numbered: &'a dyn Fn(u64) -> PathBuf,
    next: u64,
}

impl LayerSink for Staging<'_> {
    fn file(&mut self, _entry: &Entry, data: &mut dyn BufRead) -> io::Result<()> {
        let path = (self.numbered)(self.next);
        self.next += 1;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        copy_buffered(data, &mut file).map(drop)
    }
}

fn open_limited<'a>(reader: impl Read + 'a, limits: &Limits) -> Option<Box<dyn Read + 'a>> {
    let mut plain = decompress(reader, limits)?;
    let mut recorder = Recorder { inner: &mut *plain, seen: Vec::new() };
    if !begins_tar(&mut BufReader::with_capacity(BLOCK, &mut recorder), limits) {
        return None;
    }
    let seen = recorder.seen;
    Some(Box::new(Cursor::new(seen).chain(plain)))
}

fn decompress<'a>(mut reader: impl Read + 'a, limits: &Limits) -> Option<Box<dyn Read + 'a>> {
    let mut head = Vec::with_capacity(6);
    reader.by_ref().take(6).read_to_end(&mut head).ok()?;
    let compression = detect(&head);
    let compressed = Rc::new(Cell::new(0));
    let counted = Counted { inner: Cursor::new(head).chain(reader), count: Rc::clone(&compressed) };
    let buffered = BufReader::with_capacity(1 << 16, counted);
    let plain: Box<dyn Read + 'a> = match compression {
        None => return Some(Box::new(buffered)),
        Some(Compression::Gzip) => Box::new(flate2::bufread::MultiGzDecoder::new(buffered)),
        Some(Compression::Bzip2) => Box::new(bzip2::bufread::MultiBzDecoder::new(buffered)),
        Some(Compression::Xz) => {
            let stream = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY, liblzma::stream::CONCATENATED).ok()?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(buffered, stream))
        }
        Some(Compression::Zstd) => Box::new(zstd::stream::read::Decoder::with_buffer(buffered).ok()?),
    };
    Some(match limits.ratio {
        Some(ratio) => Box::new(RatioWatch { inner: plain, compressed, plain_bytes: 0, ratio }),
        None => plain,
    })
}

/// Keeps what was read so that it can be read again.
struct Recorder<'a> {
    inner: &'a mut dyn Read,
    seen: Vec<u8>,
}

impl Read for Recorder<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = buffer.len().min(PROBE_BYTES - self.seen.len());
        let length = self.inner.read(&mut buffer[..length])?;
        self.seen.extend_from_slice(&buffer[..length]);
        Ok(length)
    }
}

struct Counted<R> {
    inner: R,
    count: Rc<Cell<u64>>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.count.set(self.count.get() + length as u64);
        Ok(length)
    }
}

/// Stops a decompression bomb.
struct RatioWatch<R> {
    inner: R,
    compressed: Rc<Cell<u64>>,
    plain_bytes: u64,
    ratio: u64,
}

impl<R: Read> Read for RatioWatch<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.plain_bytes += length as u64;
        if self.plain_bytes > RATIO_FROM && self.plain_bytes / self.ratio > self.compressed.get() {
            return Err(io::Error::other(RatioExceeded { limit: self.ratio }));
        }
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::super::index::tests::{file, sample};
    use super::super::layer::tests::sample_content;
    use super::super::layer::{TarOptions, write_tar};
    use super::super::{Kind, Node};
    use super::*;
    use std::io::Write;

    fn tar(tree: &Tree) -> Vec<u8> {
        let mut out = Vec::new();
        write_tar(tree, &sample_content, &TarOptions::default(), &mut out).unwrap();
        out
    }

    fn compressed(plain: &[u8]) -> Vec<(Option<Compression>, Vec<u8>)> {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(plain).unwrap();
        let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        bzip2.write_all(plain).unwrap();
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
        xz.write_all(plain).unwrap();
        vec![
            (None, plain.to_vec()),
            (Some(Compression::Gzip), gzip.finish().unwrap()),
            (Some(Compression::Bzip2), bzip2.finish().unwrap()),
            (Some(Compression::Xz), xz.finish().unwrap()),
            (Some(Compression::Zstd), zstd::encode_all(plain, 1).unwrap()),
        ]
    }

    fn unpacked(bytes: &[u8], limits: &Limits) -> (tempfile::TempDir, Result<Option<Tree>, ArchiveError>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("archive.txt");
        fs::write(&path, bytes).unwrap();
        let staging = dir.path().join("staging");
        fs::create_dir(&staging).unwrap();
        let result = unpack(&path, &staging, limits);
        (dir, result)
    }

    #[test]
    fn every_compression_is_unpacked() {
        for (compression, bytes) in compressed(&tar(&sample())) {
            assert_eq!(detect(&bytes), compression);
            let (_dir, result) = unpacked(&bytes, &Limits::default());
            let tree = result.unwrap().unwrap();
            let read = |path: &str| match &tree.get(path.as_bytes()).unwrap().origin {
                Origin::File(file) => fs::read(file.whole()).unwrap(),
                other => panic!("{other:?}"),
            };
            assert_eq!(read("etc/hosts"), b"127.0.0.1 localhost\n");
            assert_eq!(read("etc/hosts2"), b"127.0.0.1 localhost\n");
            assert_eq!(read("etc/odd"), b"odd");
            assert_eq!(read("dir/.wh.gone"), b"");
            let odd = tree.get(b"etc/odd").unwrap();
            assert_eq!((odd.entry.mode, odd.entry.uid, odd.entry.mtime), (0o6751, 4_000_000_000, (0, 0)));
            assert_eq!(tree.get(b"dir").unwrap().entry.kind, Kind::Dir { opaque: false });
            assert_eq!(tree.get(b"etc/hosts").unwrap().entry.kind, file("", b"127.0.0.1 localhost\n", 1).entry.kind);
            assert_eq!(tree.get(b"dev"), None);
        }
    }

    #[test]
    fn what_is_no_archive() {
        for plain in [&b""[..], b"short", &[0; 512], &[0; 4096], &[b'x'; 4096], &tar(&Tree::default())] {
            for (compression, bytes) in compressed(plain) {
                let (_dir, result) = unpacked(&bytes, &Limits::default());
                assert_eq!(result.unwrap(), None, "{compression:?} of {} bytes", plain.len());
            }
        }
        // Cut before the first header is complete.
        for (compression, bytes) in compressed(&tar(&sample())).iter().skip(1) {
            let (_dir, result) = unpacked(&bytes[..10], &Limits::default());
            assert_eq!(result.unwrap(), None, "{compression:?}");
        }
        let dir = tempfile::tempdir().unwrap();
        assert!(unpack(dir.path(), dir.path(), &Limits::default()).unwrap().is_none());
        let missing = unpack(&dir.path().join("none"), dir.path(), &Limits::default());
        assert!(matches!(missing, Err(ArchiveError::Open { .. })));
    }

    #[test]
    fn damage_after_the_beginning_is_an_error() {
        let whole = tar(&sample());
        let (_dir, result) = unpacked(&whole[..whole.len() - 2000], &Limits::default());
        assert!(matches!(result, Err(ArchiveError::Unpack { source: LayerError::Malformed { .. }, .. })), "{result:?}");
        let content = |_: &Node| -> io::Result<Box<dyn Read + Send>> {
            Ok(Box::new(blake3::Hasher::new().finalize_xof().take(1 << 20)))
        };
        let mut node = file("noise", b"", 0);
        node.entry.kind = Kind::File { size: 1 << 20, digest: None, link_group: 0 };
        let mut plain = Vec::new();
        write_tar(&Tree::from_nodes(vec![node]), &content, &TarOptions::default(), &mut plain).unwrap();
        for (compression, bytes) in compressed(&plain).iter().skip(1) {
            let (_dir, result) = unpacked(&bytes[..bytes.len() - bytes.len() / 8], &Limits::default());
            // Some decoders report a cut stream, others just end.
            assert!(matches!(result, Err(ArchiveError::Unpack { .. }) | Ok(None)), "{compression:?}: {result:?}");
        }
    }

    #[test]
    fn opened_from_the_beginning() {
        let plain = tar(&sample());
        for (compression, bytes) in compressed(&plain) {
            let mut out = Vec::new();
            open(bytes.as_slice()).unwrap().read_to_end(&mut out).unwrap();
            assert!(out == plain, "{compression:?}");
        }
        assert!(open(&b"nothing"[..]).is_none());
    }

    #[test]
    fn limits_have_names() {
        for (limits, what) in [
            (Limits { file_bytes: 100, ..Limits::default() }, "bytes"),
            (Limits { entries: 5, ..Limits::default() }, "entries"),
        ] {
            let (_dir, result) = unpacked(&tar(&sample()), &limits);
            let Err(ArchiveError::Unpack { source: LayerError::Limit { what: found, .. }, .. }) = result else {
                panic!("{result:?}");
            };
            assert_eq!(found, what);
        }
    }

    #[test]
    fn bombs_stop_at_the_ratio() {
        let compressed = Rc::new(Cell::new(1000));
        let mut watch = RatioWatch { inner: io::repeat(0), compressed, plain_bytes: 0, ratio: 2_000_000 };
        let error = io::copy(&mut watch, &mut io::sink()).unwrap_err();
        assert!(error.downcast::<RatioExceeded>().is_ok());
        assert!(watch.plain_bytes > RATIO_FROM && watch.plain_bytes < 3 << 30);
    }
}
