//! Caches in buckets of S3 and of what speaks its protocol (`type=s3`); built with the feature `s3`.
//!
//! ```text
//! PREFIXnacre/NAME            the manifest, as it would be in a registry
//! PREFIXblobs/sha256:HEX      what it names: the same blobs
//! ```
//! Blobs are written before the manifest, and only those that are not there: the manifest of a cache names nothing that is
//! missing, unless somebody removed it later. BuildKit's caches have other manifests in other places, so both can share
//! a bucket.
//!
//! Requests are repeated by the library that makes them; what is read is checked by its digest, as everywhere. Bytes must come
//! at a certain pace, as from registries.

use crate::image::Descriptor;
use crate::op::source::{SourceContext, SourceError, ensure_blob};
use crate::push::{PushBlob, PushImage, PushProgress};
use crate::registry::client::Pace;
use crate::registry::{Client, RegistryError};
use crate::store::StoreError;
use crate::store::blob::DOCUMENT_LIMIT_BYTES;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path as Key;
use object_store::{
    BackoffConfig, Certificate, ClientOptions, ObjectStoreExt, PutPayload, RetryConfig, WriteMultipart,
};
use reqwest::Url;
use std::fs::File;
use std::io::{self, Read};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Blobs that are written at once.
const PARALLEL_BLOBS: usize = 4;
/// Larger blobs go in parts of this size, up to ten thousand of them (Amazon S3, multipart upload limits).
const PART_BYTES: u64 = 8 << 20;
/// Parts of one blob that are under way at once.
const PARALLEL_PARTS: usize = 4;
/// Parts of one upload, with room to spare.
const PARTS: u64 = 9_000;

/// Which bucket, and how to get there.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct BucketSettings {
    /// Its name.
    pub bucket: String,
    /// The cache's name in it.
    pub name: String,
    /// What all keys begin with.
    pub prefix: String,
    /// Where it is; the environment may say.
    pub region: Option<String>,
    /// The server, if it is not Amazon's. Plain HTTP is spoken where its address begins with `http:`.
    pub endpoint: Option<String>,
    /// The bucket's name is part of the path, not of the host.
    pub path_style: bool,
    /// Credentials; without, those of the environment, or of the machine's role.
    pub access_key_id: Option<String>,
    /// Their secret part.
    pub secret_access_key: Option<String>,
    /// Their third part, if they end some time.
    pub session_token: Option<String>,
    /// Variables that begin with `AWS_`.
    pub environment: Vec<(String, String)>,
}

impl std::fmt::Debug for BucketSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("BucketSettings");
        shown.field("bucket", &self.bucket).field("name", &self.name).field("prefix", &self.prefix);
        shown.field("region", &self.region).field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

/// A cache in a bucket. Clones share the connection.
#[derive(Clone)]
pub struct Bucket(Arc<Shared>);

struct Shared {
    settings: BucketSettings,
    store: OnceLock<AmazonS3>,
}

impl PartialEq for Bucket {
    fn eq(&self, other: &Self) -> bool {
        self.0.settings == other.0.settings
    }
}

impl Eq for Bucket {}

impl std::fmt::Debug for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.settings.fmt(f)
    }
}

impl std::fmt::Display for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let BucketSettings { bucket, prefix, name, .. } = &self.0.settings;
        write!(f, "s3://{bucket}/{prefix}nacre/{name}")
    }
}

/// Why a bucket could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum BucketError {
    /// Not there.
    #[error("no {what} in s3://{bucket}")]
    NotFound {
        /// The bucket.
        bucket: String,
        /// What was looked for.
        what: String,
    },
    /// The server, or the way there, failed.
    #[error("{what} in s3://{bucket} cannot be had or written: {reason}")]
    Failed {
        /// The bucket.
        bucket: String,
        /// What it was about.
        what: String,
        /// Why, with the first cause: those between say the same again.
        reason: String,
    },
    /// So little came for so long that it would never end.
    #[error("s3://{bucket} sent next to nothing for {} seconds", .after.as_secs())]
    Slow {
        /// The bucket.
        bucket: String,
        /// How long was waited.
        after: Duration,
    },
    /// A document without end.
    #[error("{what} in s3://{bucket} is larger than {DOCUMENT_LIMIT_BYTES} bytes")]
    TooLong {
        /// The bucket.
        bucket: String,
        /// What it was about.
        what: String,
    },
    /// A file cannot be read.
    #[error("blob {digest} cannot be read")]
    Io {
        /// Which.
        digest: String,
        /// Why.
        source: io::Error,
    },
    /// What a client of any kind needs could not be made.
    #[error(transparent)]
    Client(#[from] RegistryError),
    /// A blob could not be fetched from where it is.
    #[error(transparent)]
    Source(Box<SourceError>),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A blob that nobody has.
    #[error("blob {digest} of the cache is not in the store")]
    Missing {
        /// Which.
        digest: String,
    },
    /// Told to stop.
    #[error("interrupted")]
    Interrupted,
}

impl BucketError {
    /// Does it mean that nothing else can be had, either?
    pub(crate) fn is_unreachable(&self) -> bool {
        matches!(self, Self::Failed { .. } | Self::Slow { .. } | Self::Client(_))
    }
}

impl Bucket {
    /// A cache in a bucket. Nothing is asked yet.
    pub fn new(settings: BucketSettings) -> Self {
        Self(Arc::new(Shared { settings, store: OnceLock::new() }))
    }

    fn key(&self, rest: &str) -> Key {
        Key::from(format!("{}{rest}", self.0.settings.prefix))
    }

    fn blob_key(&self, digest: &str) -> Key {
        self.key(&format!("blobs/{digest}"))
    }

    fn manifest_key(&self) -> Key {
        self.key(&format!("nacre/{}", self.0.settings.name))
    }

    /// The error of a write.
    fn failed(&self, what: &Key, error: impl std::error::Error + 'static) -> BucketError {
        let mut first: &dyn std::error::Error = &error;
        while let Some(cause) = first.source() {
            first = cause;
        }
        let (mut reason, first) = (error.to_string(), first.to_string());
        if !reason.contains(&first) {
            reason = format!("{reason}: {first}");
        }
        BucketError::Failed { bucket: self.0.settings.bucket.clone(), what: what.to_string(), reason }
    }

    /// The error of a read.
    fn unread(&self, what: &Key, error: object_store::Error) -> BucketError {
        match error {
            object_store::Error::NotFound { .. } => {
                BucketError::NotFound { bucket: self.0.settings.bucket.clone(), what: what.to_string() }
            }
            error => self.failed(what, error),
        }
    }

    fn store(&self, client: &Client) -> Result<&AmazonS3, BucketError> {
        if let Some(store) = self.0.store.get() {
            return Ok(store);
        }
        let options = client.options();
        client.ensure_tls();
        let settings = &self.0.settings;
        let mut http = ClientOptions::new()
            // Large blobs take what they take; a silent server is another matter.
            .with_timeout_disabled()
            .with_connect_timeout(options.connect_timeout)
            .with_read_timeout(options.data_timeout)
            .with_allow_http(settings.endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("http:")));
        for path in &options.authorities {
            let read = std::fs::read(path).map_err(io::Error::other);
            let failed = |source| BucketError::Io { digest: path.display().to_string(), source };
            let found = Certificate::from_pem_bundle(&read.map_err(failed)?);
            for certificate in found.map_err(|error| self.failed(&Key::default(), error))? {
                http = http.with_root_certificate(certificate);
            }
        }
        // Names of buckets below the service's are reached as the service is.
        let address = settings.endpoint.as_deref().unwrap_or("https://amazonaws.com");
        let routes = client.routes().map_err(|error| self.failed(&Key::default(), error))?;
        http = match Url::parse(address).ok().and_then(|url| routes.of(&url).cloned()) {
            Some(proxy) => http.with_proxy_url(proxy.as_str()),
            // Told of none, it would look for one in the environment, by other rules. The star is for names only.
            None => http.with_proxy_url("http://localhost").with_proxy_excludes("*,0.0.0.0/0,::/0"),
        };
        let mut builder = AmazonS3Builder::new();
        for (name, value) in &settings.environment {
            if let Ok(key) = name.to_ascii_lowercase().parse() {
                builder = builder.with_config(key, value);
            }
        }
        builder = builder
            .with_client_options(http)
            .with_bucket_name(&settings.bucket)
            .with_virtual_hosted_style_request(!settings.path_style)
            .with_retry(RetryConfig {
                max_retries: options.attempts.saturating_sub(1) as usize,
                backoff: BackoffConfig { init_backoff: options.pause, ..BackoffConfig::default() },
                ..RetryConfig::default()
            });
        if let Some(region) = &settings.region {
            builder = builder.with_region(region);
        }
        if let Some(endpoint) = &settings.endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        if let Some(id) = &settings.access_key_id {
            builder = builder.with_access_key_id(id);
        }
        if let Some(secret) = &settings.secret_access_key {
            builder = builder.with_secret_access_key(secret);
        }
        if let Some(token) = &settings.session_token {
            builder = builder.with_token(token);
        }
        let store = builder.build().map_err(|error| self.failed(&Key::default(), error))?;
        Ok(self.0.store.get_or_init(|| store))
    }

    /// The cache's manifest.
    pub fn manifest(&self, client: &Client) -> Result<Vec<u8>, BucketError> {
        self.document(self.manifest_key(), client)
    }

    /// A small blob.
    pub(crate) fn config(&self, digest: &str, client: &Client) -> Result<Vec<u8>, BucketError> {
        self.document(self.blob_key(digest), client)
    }

    fn document(&self, key: Key, client: &Client) -> Result<Vec<u8>, BucketError> {
        let mut bytes = Vec::new();
        let mut body = self.open(key.clone(), client)?;
        let read = body.by_ref().take(DOCUMENT_LIMIT_BYTES + 1).read_to_end(&mut bytes);
        read.map_err(|error| self.of_io(error, &key))?;
        if bytes.len() as u64 > DOCUMENT_LIMIT_BYTES {
            return Err(BucketError::TooLong { bucket: self.0.settings.bucket.clone(), what: key.to_string() });
        }
        Ok(bytes)
    }

    /// An error that went through [`Read`] as what it was.
    fn of_io(&self, error: io::Error, key: &Key) -> BucketError {
        error.downcast::<BucketError>().unwrap_or_else(|error| self.failed(key, error))
    }

    /// Begins to read a blob; its digest is for the reader to check.
    pub(crate) fn blob(&self, digest: &str, client: &Client) -> Result<BucketBody, BucketError> {
        self.open(self.blob_key(digest), client)
    }

    fn open(&self, key: Key, client: &Client) -> Result<BucketBody, BucketError> {
        let store = self.store(client)?;
        let found = client.runtime()?.block_on(store.get(&key)).map_err(|error| self.unread(&key, error))?;
        Ok(BucketBody {
            bucket: self.clone(),
            client: client.clone(),
            key,
            stream: found.into_stream(),
            piece: io::Cursor::default(),
            pace: Pace::default(),
        })
    }

    fn has(&self, key: &Key, size: u64, client: &Client) -> Result<bool, BucketError> {
        let store = self.store(client)?;
        match client.runtime()?.block_on(store.head(key)) {
            Ok(found) => Ok(found.size == size),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(self.failed(key, error)),
        }
    }

    fn put(&self, key: &Key, bytes: Vec<u8>, client: &Client) -> Result<(), BucketError> {
        let store = self.store(client)?;
        let put = client.runtime()?.block_on(store.put(key, PutPayload::from(bytes)));
        put.map(drop).map_err(|error| self.failed(key, error))
    }

    fn put_blob(&self, blob: &Descriptor, mut file: File, client: &Client) -> Result<(), BucketError> {
        let key = self.blob_key(&blob.digest);
        let unreadable = |source| BucketError::Io { digest: blob.digest.clone(), source };
        if blob.size <= PART_BYTES {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).map_err(unreadable)?;
            return self.put(&key, bytes, client);
        }
        let store = self.store(client)?;
        let part = usize::try_from(PART_BYTES.max(blob.size / PARTS)).unwrap_or(usize::MAX);
        client.runtime()?.block_on(async {
            let upload = store.put_multipart(&key).await.map_err(|error| self.failed(&key, error))?;
            let mut upload = WriteMultipart::new_with_chunk_size(upload, part);
            let mut buffer = vec![0; 256 << 10];
            loop {
                let sent = upload.wait_for_capacity(PARALLEL_PARTS).await.map_err(|error| self.failed(&key, error));
                let read = sent.and_then(|()| file.read(&mut buffer).map_err(unreadable));
                match read {
                    Ok(0) => break,
                    Ok(count) => upload.write(&buffer[..count]),
                    Err(error) => {
                        // Parts that stay behind would be paid for.
                        let _ = upload.abort().await;
                        return Err(error);
                    }
                }
            }
            upload.finish().await.map(drop).map_err(|error| self.failed(&key, error))
        })
    }

    /// Writes a cache: the blobs that are not there, then its manifest, which is the last of the image's.
    pub fn write(
        &self,
        image: &PushImage,
        sources: &SourceContext,
        progress: PushProgress<'_>,
        stop: &(dyn Fn() -> bool + Sync),
    ) -> Result<(), BucketError> {
        let next = AtomicUsize::new(0);
        let failed = Mutex::new(None);
        std::thread::scope(|scope| {
            for _ in 0..image.blobs.len().min(PARALLEL_BLOBS) {
                scope.spawn(|| {
                    while let Some(blob) = image.blobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let result = match stop() {
                            true => Err(BucketError::Interrupted),
                            false => self.write_blob(blob, sources, progress),
                        };
                        if let Err(error) = result {
                            failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                            // Nobody begins another one.
                            next.store(image.blobs.len(), Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let Some((_, bytes)) = image.manifests.last() else { return Ok(()) };
        self.put(&self.manifest_key(), bytes.clone(), &sources.client)
    }

    fn write_blob(
        &self,
        blob: &PushBlob,
        sources: &SourceContext,
        progress: PushProgress<'_>,
    ) -> Result<(), BucketError> {
        let descriptor = &blob.descriptor;
        if self.has(&self.blob_key(&descriptor.digest), descriptor.size, &sources.client)? {
            return Ok(());
        }
        if !sources.store.has_blob(&descriptor.digest, Some(descriptor.size)) {
            let missing = || BucketError::Missing { digest: descriptor.digest.clone() };
            let (image, at) = blob.base.as_ref().ok_or_else(missing)?;
            ensure_blob(image, *at, sources).map_err(|error| BucketError::Source(Box::new(error)))?;
        }
        progress(&descriptor.digest, 0, descriptor.size);
        self.put_blob(descriptor, sources.store.open_blob(&descriptor.digest)?, &sources.client)?;
        progress(&descriptor.digest, descriptor.size, descriptor.size);
        Ok(())
    }
}

/// What is read of a blob.
pub(crate) struct BucketBody {
    bucket: Bucket,
    client: Client,
    key: Key,
    stream: Pin<Box<dyn futures_core::Stream<Item = object_store::Result<bytes::Bytes>> + Send>>,
    piece: io::Cursor<bytes::Bytes>,
    pace: Pace,
}

impl Read for BucketBody {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.piece.read(buffer)?;
            if count > 0 || buffer.is_empty() {
                return Ok(count);
            }
            let asked = Instant::now();
            let stream = &mut self.stream;
            let next = std::future::poll_fn(|context| stream.as_mut().poll_next(context));
            let Some(piece) = self.client.runtime().map_err(io::Error::other)?.block_on(next) else { return Ok(0) };
            let piece = piece.map_err(|error| io::Error::other(self.bucket.unread(&self.key, error)))?;
            self.client.count_received(piece.len() as u64);
            let after = self.client.options().data_timeout;
            if self.pace.is_too_slow(piece.len() as u64, asked.elapsed(), after) {
                let bucket = self.bucket.0.settings.bucket.clone();
                return Err(io::Error::other(BucketError::Slow { bucket, after }));
            }
            self.piece = io::Cursor::new(piece);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_shown() {
        let settings = BucketSettings {
            bucket: "b".to_owned(),
            name: "n".to_owned(),
            prefix: "p/".to_owned(),
            secret_access_key: Some("hidden-one".to_owned()),
            session_token: Some("hidden-two".to_owned()),
            environment: vec![("AWS_SECRET_ACCESS_KEY".to_owned(), "hidden-three".to_owned())],
            ..BucketSettings::default()
        };
        let bucket = Bucket::new(settings);
        let shown = format!("{bucket:?} {bucket}");
        assert!(!shown.contains("hidden") && shown.contains("s3://b/p/nacre/n"), "{shown}");
        assert_eq!(bucket.blob_key("sha256:0").as_ref(), "p/blobs/sha256:0");
    }
}
