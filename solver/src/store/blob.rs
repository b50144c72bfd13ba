//! Content-addressed blobs: `blobs/sha256/HEX`.
//!
//! A blob is written to a temporary while its digest is computed, compared with what was asked for, synced and renamed.
//! Two writers of one blob both succeed; the second rename puts the same bytes in place.

use super::{Store, StoreError, hex};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::thread::JoinHandle;

/// Documents (configs, manifests) above this size are refused; as containerd does.
pub const DOCUMENT_LIMIT_BYTES: u64 = 8 << 20;

/// Digest of bytes as `sha256:hex`.
pub fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

/// Digest of a file's bytes as `sha256:hex`.
pub(super) fn sha256_of(file: &mut File) -> io::Result<String> {
    let mut hashing = HashWriter { hasher: Sha256::new(), size_bytes: 0 };
    copy(file, &mut hashing)?;
    Ok(format!("sha256:{}", hex(&hashing.hasher.finalize())))
}

/// The hex digits of a `sha256:` digest.
pub fn digest_hex(digest: &str) -> Result<&str, StoreError> {
    let digits = digest.strip_prefix("sha256:").filter(|digits| {
        digits.len() == 64 && digits.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    });
    digits.ok_or_else(|| StoreError::BadDigest { digest: digest.to_owned() })
}

/// A blob being written. Dropped without [`BlobWriter::commit`], it leaves nothing.
#[derive(Debug)]
pub struct BlobWriter {
    blobs: PathBuf,
    temporary: PathBuf,
    file: Option<File>,
    /// `None` when whoever writes computes the digest.
    hasher: Option<Sha256>,
    size_bytes: u64,
    /// How much of it was there when its syncing was last asked for.
    asked_bytes: u64,
    syncing: Option<Syncing>,
}

/// How much is written before it is synced, while more is made: in the end all of it must be on the disk.
const SYNC_EACH_BYTES: u64 = 8 << 20;

/// Syncs a file that grows. sync_file_range(2) would not do: it goes no further than to the device, and where that is a file
/// or has a cache, the last sync would wait for all of it.
#[derive(Debug)]
struct Syncing {
    ask: SyncSender<()>,
    thread: JoinHandle<io::Result<()>>,
}

impl Syncing {
    fn begin(file: &File) -> io::Result<Self> {
        // Both are the same open file, so an error is told to one of them: here or in the last sync.
        let file = file.try_clone()?;
        Self::with(move || file.sync_data())
    }

    fn with(mut sync: impl FnMut() -> io::Result<()> + Send + 'static) -> io::Result<Self> {
        let (ask, asked) = mpsc::sync_channel(1);
        // Ends with the writer; where that is dropped, after what was asked for, as nobody waits.
        let thread = std::thread::Builder::new()
            .name("sync".into())
            .spawn(move || asked.into_iter().try_for_each(|()| sync()))?;
        Ok(Self { ask, thread })
    }

    /// False when it has failed.
    fn ask(&self) -> bool {
        // Full: it has not come to what was asked before.
        !matches!(self.ask.try_send(()), Err(TrySendError::Disconnected(())))
    }

    fn end(self) -> io::Result<()> {
        drop(self.ask);
        self.thread.join().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))
    }
}

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let file = self.file.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        let count = file.write(bytes)?;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&bytes[..count]);
        }
        self.size_bytes += count as u64;
        if self.size_bytes - self.asked_bytes >= SYNC_EACH_BYTES {
            self.asked_bytes = self.size_bytes;
            if self.syncing.is_none() {
                // Without one, the last sync takes longer.
                self.syncing = Syncing::begin(file).ok();
            }
            if let Some(failed) = self.syncing.take_if(|syncing| !syncing.ask()) {
                // Nothing of it may be committed any more: the error is told once.
                self.file = None;
                failed.end()?;
            }
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl BlobWriter {
    /// Bytes written so far.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Puts the blob in place under its digest and returns digest and size. With `expected`, another digest is an error
    /// and nothing is kept.
    pub fn commit(mut self, expected: Option<&str>) -> Result<(String, u64), StoreError> {
        let digits = match (self.hasher.take(), expected) {
            (Some(hasher), _) => hex(&hasher.finalize()),
            (None, Some(digest)) => digest_hex(digest)?.to_owned(),
            (None, None) => return Err(StoreError::BadDigest { digest: String::new() }),
        };
        let found = format!("sha256:{digits}");
        let target = self.blobs.join(&digits);
        if let Some(expected) = expected.filter(|expected| *expected != found) {
            return Err(StoreError::DigestMismatch { path: target, expected: expected.to_owned(), found });
        }
        let there = fs::metadata(&target).is_ok_and(|metadata| metadata.len() == self.size_bytes);
        if !there {
            let file = self.file.take().ok_or_else(|| io::ErrorKind::BrokenPipe.into());
            let before = self.syncing.take().map_or(Ok(()), Syncing::end);
            let synced = before.and(file).and_then(|file| file.sync_data());
            synced.map_err(StoreError::io("sync", &self.temporary))?;
            fs::rename(&self.temporary, &target).map_err(StoreError::io("rename to", &target))?;
        }
        Ok((found, self.size_bytes))
    }
}

impl Drop for BlobWriter {
    fn drop(&mut self) {
        // After a rename there is nothing left under this name.
        let _ = fs::remove_file(&self.temporary);
    }
}

impl Store {
    /// Where a blob is or would be.
    pub fn blob_path(&self, digest: &str) -> Result<PathBuf, StoreError> {
        Ok(self.root.join("blobs/sha256").join(digest_hex(digest)?))
    }

    /// Begins a blob whose bytes are given by [`Write`].
    pub fn blob_writer(&self) -> Result<BlobWriter, StoreError> {
        let temporary = self.tmp_path()?;
        let file = File::create_new(&temporary).map_err(StoreError::io("create", &temporary))?;
        let blobs = self.root.join("blobs/sha256");
        Ok(BlobWriter {
            blobs,
            temporary,
            file: Some(file),
            hasher: Some(Sha256::new()),
            size_bytes: 0,
            asked_bytes: 0,
            syncing: None,
        })
    }

    /// Begins a blob whose digest is computed by whoever writes it, and must be given to [`BlobWriter::commit`].
    pub fn trusting_blob_writer(&self) -> Result<BlobWriter, StoreError> {
        let mut writer = self.blob_writer()?;
        writer.hasher = None;
        Ok(writer)
    }

    /// Stores all that `reader` gives and returns digest and size. With `expected`, another digest is an error and
    /// nothing is kept.
    pub fn write_blob(&self, expected: Option<&str>, reader: &mut dyn Read) -> Result<(String, u64), StoreError> {
        let mut writer = self.blob_writer()?;
        let path = writer.temporary.clone();
        copy(reader, &mut writer).map_err(StoreError::io("write", &path))?;
        writer.commit(expected)
    }

    /// Stores a document (config, manifest) and returns its digest. It is not synced: [`Store::read_document`] checks it.
    pub fn put_document(&self, bytes: &[u8]) -> Result<String, StoreError> {
        let digest = sha256(bytes);
        let target = self.blob_path(&digest)?;
        if self.read_document(&digest).is_err() {
            self.replace_file(&target, bytes)?;
        }
        Ok(digest)
    }

    /// Reads a document and checks its digest.
    pub fn read_document(&self, digest: &str) -> Result<Vec<u8>, StoreError> {
        read_document(&self.blob_path(digest)?, digest)
    }

    /// Is the blob there? With a size, one of another size does not count (and would be written again).
    pub fn has_blob(&self, digest: &str, size_bytes: Option<u64>) -> bool {
        let length =
            self.blob_path(digest).ok().and_then(|path| fs::metadata(path).ok()).map(|metadata| metadata.len());
        length.is_some_and(|length| size_bytes.is_none_or(|size| size == length))
    }

    /// Opens a blob for reading.
    pub fn open_blob(&self, digest: &str) -> Result<File, StoreError> {
        let path = self.blob_path(digest)?;
        File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => StoreError::NoBlob { path: self.root.clone(), digest: digest.to_owned() },
            _ => StoreError::io("open", &path)(error),
        })
    }

    /// Takes a blob out of a file elsewhere, sharing its extents where the file system can, and checks digest and size.
    /// It is never hard-linked: the file's owner may change it later.
    pub fn import_blob(&self, from: &Path, digest: &str, size_bytes: u64) -> Result<(), StoreError> {
        digest_hex(digest)?;
        if self.has_blob(digest, Some(size_bytes)) {
            return Ok(());
        }
        let source = File::open(from).map_err(StoreError::io("open", from))?;
        let found = source.metadata().map_err(StoreError::io("open", from))?.len();
        if found != size_bytes {
            return Err(StoreError::SizeMismatch { path: from.to_owned(), expected: size_bytes, found });
        }
        let named = |error| match error {
            StoreError::DigestMismatch { expected, found, .. } => {
                StoreError::DigestMismatch { path: from.to_owned(), expected, found }
            }
            other => other,
        };
        let mut writer = self.blob_writer()?;
        let cloned = writer.file.as_ref().is_some_and(|file| rustix::fs::ioctl_ficlone(file, &source).is_ok());
        if !cloned {
            let path = writer.temporary.clone();
            copy(&mut &source, &mut writer).map_err(StoreError::io("copy to", &path))?;
            return writer.commit(Some(digest)).map(drop).map_err(named);
        }
        // The clone is ours alone, so what is hashed now is what stays.
        let mut clone = File::open(&writer.temporary).map_err(StoreError::io("open", &writer.temporary))?;
        let mut hashing = HashWriter { hasher: Sha256::new(), size_bytes: 0 };
        copy(&mut clone, &mut hashing).map_err(StoreError::io("read", &writer.temporary))?;
        writer.hasher = Some(hashing.hasher);
        writer.size_bytes = hashing.size_bytes;
        writer.commit(Some(digest)).map(drop).map_err(named)
    }
}

struct HashWriter {
    hasher: Sha256,
    size_bytes: u64,
}

impl Write for HashWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.hasher.update(bytes);
        self.size_bytes += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Copies in pieces that suit hashing; `io::copy` would use 8 KiB.
pub(crate) fn copy(reader: &mut dyn Read, writer: &mut dyn Write) -> io::Result<u64> {
    let mut buffer = vec![0; 256 << 10];
    let mut total = 0;
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return Ok(total),
            Ok(count) => {
                writer.write_all(&buffer[..count])?;
                total += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Reads a document of a layout or the store and checks its digest.
pub(crate) fn read_document(path: &Path, digest: &str) -> Result<Vec<u8>, StoreError> {
    digest_hex(digest)?;
    let file = File::open(path).map_err(StoreError::io("open", path))?;
    let mut bytes = Vec::new();
    file.take(DOCUMENT_LIMIT_BYTES + 1).read_to_end(&mut bytes).map_err(StoreError::io("read", path))?;
    if bytes.len() as u64 > DOCUMENT_LIMIT_BYTES {
        let reason = format!("a document of more than {DOCUMENT_LIMIT_BYTES} bytes");
        return Err(StoreError::Damaged { path: path.to_owned(), reason });
    }
    let found = sha256(&bytes);
    if found != digest {
        return Err(StoreError::DigestMismatch { path: path.to_owned(), expected: digest.to_owned(), found });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::temporary;
    use super::*;

    #[test]
    fn a_blob_is_there_whole_or_not_at_all() {
        let (_directory, store) = temporary();
        let (digest, size) = store.write_blob(None, &mut &b"hello"[..]).unwrap();
        assert_eq!(digest, sha256(b"hello"));
        assert_eq!(size, 5);
        assert!(store.has_blob(&digest, Some(5)) && !store.has_blob(&digest, Some(6)));
        let wrong = sha256(b"other");
        let error = store.write_blob(Some(&wrong), &mut &b"hello"[..]).unwrap_err();
        assert!(matches!(error, StoreError::DigestMismatch { .. }), "{error}");
        assert!(!store.has_blob(&wrong, None));
        assert!(matches!(store.open_blob(&wrong), Err(StoreError::NoBlob { .. })));
        assert!(matches!(store.open_blob("sha256:../../etc/passwd"), Err(StoreError::BadDigest { .. })));
        drop(store.blob_writer().unwrap());
        assert_eq!(
            fs::read_dir(store.tmp_path().unwrap().parent().unwrap()).unwrap().count(),
            1,
            "only the lock is left"
        );
    }

    #[test]
    fn a_sync_that_failed_is_not_lost() {
        let (_directory, store) = temporary();
        let piece = vec![1; SYNC_EACH_BYTES as usize];
        let begin = || {
            let mut writer = store.blob_writer().unwrap();
            writer.syncing = Some(Syncing::with(|| Err(io::ErrorKind::StorageFull.into())).unwrap());
            writer.write_all(&piece).unwrap();
            writer
        };
        let is_full = |error: &io::Error| error.kind() == io::ErrorKind::StorageFull;
        let error = begin().commit(None).unwrap_err();
        assert!(matches!(&error, StoreError::Io { source, .. } if is_full(source)), "{error:?}");
        let mut writer = begin();
        // It fails when it has come to it, and is told by the next one.
        while !writer.syncing.as_ref().unwrap().thread.is_finished() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(is_full(&writer.write_all(&piece).unwrap_err()));
        assert!(writer.write_all(b"more").is_err());
        writer.commit(None).unwrap_err();
        assert!(!store.has_blob(&sha256(&piece), None) && !store.has_blob(&sha256(&piece.repeat(2)), None));
    }

    #[test]
    fn one_blob_by_many_writers() {
        let (directory, store) = temporary();
        let other = Store::open(&directory.path().join("store")).unwrap();
        let bytes = vec![7; 3 << 20];
        std::thread::scope(|scope| {
            for store in [&store, &other, &store, &other] {
                scope.spawn(|| store.write_blob(Some(&sha256(&bytes)), &mut &bytes[..]).unwrap());
            }
        });
        assert_eq!(fs::read(store.blob_path(&sha256(&bytes)).unwrap()).unwrap(), bytes);
    }

    #[test]
    fn imports_are_checked() {
        let (directory, store) = temporary();
        let file = directory.path().join("file");
        fs::write(&file, "content").unwrap();
        let digest = sha256(b"content");
        assert!(matches!(store.import_blob(&file, &digest, 8), Err(StoreError::SizeMismatch { found: 7, .. })));
        let error = store.import_blob(&file, &sha256(b"x"), 7).unwrap_err();
        assert!(matches!(&error, StoreError::DigestMismatch { path, .. } if *path == file), "{error}");
        store.import_blob(&file, &digest, 7).unwrap();
        fs::write(&file, "changed").unwrap();
        assert_eq!(store.read_document(&digest).unwrap(), b"content");
    }

    #[test]
    fn damaged_documents_are_noticed_and_written_again() {
        let (_directory, store) = temporary();
        let digest = store.put_document(b"{}").unwrap();
        fs::write(store.blob_path(&digest).unwrap(), "").unwrap();
        assert!(matches!(store.read_document(&digest), Err(StoreError::DigestMismatch { .. })));
        assert_eq!(store.put_document(b"{}").unwrap(), digest);
        assert_eq!(store.read_document(&digest).unwrap(), b"{}");
    }
}
