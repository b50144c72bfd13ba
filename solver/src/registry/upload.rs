//! Writing to a registry: blobs and manifests (distribution specification, "Push").
//!
//! A blob that is there is not sent. Else one request asks for a mount from another repository and opens an upload at
//! once: 201 is the mount, 202 the upload. A small blob goes in one PUT. A large one goes in one PATCH, which registries
//! keep what they got of when it breaks, and an empty PUT; the registry is asked how much it has, and the rest follows.
//! Where a server or something before it refuses that (413) or names a smallest chunk, it goes in pieces.

use super::RegistryError;
use super::client::{Access, Client, Exchange, RemoteImage, is_passing, is_passing_status};
use super::payload::{Payload, SendProgress};
use crate::image::Descriptor;
use reqwest::header::{self, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, Url};
use std::path::Path;

/// A blob above this is worth another request, so that its upload can go on after an interruption.
const WHOLE_BYTES: u64 = 1 << 20;
/// Size of pieces where the whole is refused and the server names no size.
const CHUNK_BYTES: u64 = 8 << 20;
/// Pieces are not made smaller than this when even they are refused.
const SMALLEST_CHUNK_BYTES: u64 = 256 << 10;

/// How a blob got to where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Uploaded {
    /// It was there.
    Present,
    /// The registry took it from another of its repositories.
    Mounted,
    /// It was sent.
    Sent,
}

/// What opening an upload gave.
#[derive(Debug)]
pub enum Opened {
    /// The blob is there by now: mounted.
    Mounted,
    /// Where to send it.
    Upload(Upload),
}

/// An upload in progress.
#[derive(Debug)]
pub struct Upload {
    location: Url,
    /// Bytes that the registry has.
    offset: u64,
    way: Way,
}

/// How the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// With the PUT that ends the upload.
    Whole,
    /// All that is missing in one PATCH.
    Stream,
    /// In PATCHes of this size.
    Chunks(u64),
}

/// A blob to write, and how.
#[derive(Clone)]
pub struct BlobUpload<'a> {
    /// The repository.
    pub image: &'a RemoteImage,
    /// The blob.
    pub blob: &'a Descriptor,
    /// Another repository of the same registry that has it.
    pub from: Option<&'a str>,
    /// Is told how many bytes were sent.
    pub progress: Option<SendProgress>,
}

impl Client {
    /// Is the blob in the repository?
    pub fn has_blob(&self, upload: &BlobUpload<'_>) -> Result<bool, RegistryError> {
        let alone = BlobUpload { from: None, ..upload.clone() };
        let exchange = self.write(Method::HEAD, &alone, &format!("blobs/{}", upload.blob.digest))?;
        match self.exchange(&exchange) {
            Ok((response, _)) => {
                // A registry that lost a part of it must not keep us from sending it again.
                let length = response.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
                let length = length.and_then(|length| length.parse::<u64>().ok());
                Ok(length.is_none_or(|length| length == upload.blob.size))
            }
            Err(RegistryError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Opens an upload, or has the blob mounted.
    pub fn open_upload(&self, upload: &BlobUpload<'_>) -> Result<Opened, RegistryError> {
        if let Some(from) = upload.from.filter(|from| *from != upload.image.repository) {
            let mut exchange = self.write(Method::POST, upload, "blobs/uploads/")?;
            exchange.url.query_pairs_mut().append_pair("mount", &upload.blob.digest).append_pair("from", from);
            exchange.body = Some(Payload::Bytes(Vec::new()));
            match self.exchange(&exchange) {
                Ok((response, _)) if response.status().as_u16() == 201 => return Ok(Opened::Mounted),
                Ok((response, url)) => {
                    return self.opened(upload, &exchange, response.headers(), &url).map(Opened::Upload);
                }
                // The other repository may not be ours to read, or the registry knows no mounts: then without.
                Err(RegistryError::Denied { .. } | RegistryError::NotFound { .. } | RegistryError::Status { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let alone = BlobUpload { from: None, ..upload.clone() };
        let mut exchange = self.write(Method::POST, &alone, "blobs/uploads/")?;
        exchange.body = Some(Payload::Bytes(Vec::new()));
        let (response, url) = self.exchange(&exchange)?;
        self.opened(upload, &exchange, response.headers(), &url).map(Opened::Upload)
    }

    fn opened(
        &self,
        upload: &BlobUpload<'_>,
        exchange: &Exchange,
        headers: &HeaderMap,
        url: &Url,
    ) -> Result<Upload, RegistryError> {
        let chunk = headers.get("oci-chunk-min-length").and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        let location = location(exchange, headers, url)?;
        let way = match chunk {
            Some(least) => Way::Chunks(least.max(CHUNK_BYTES)),
            None if upload.blob.size > WHOLE_BYTES => Way::Stream,
            None => Way::Whole,
        };
        Ok(Upload { location, offset: 0, way })
    }

    /// Sends a blob out of a file into an opened upload; begins anew where it must.
    pub fn upload(&self, target: &BlobUpload<'_>, opened: Upload, file: &Path) -> Result<(), RegistryError> {
        let target = &BlobUpload { from: None, ..target.clone() };
        let found = std::fs::metadata(file).map_err(|source| RegistryError::Io {
            host: target.image.host.clone(),
            repository: target.image.repository.clone(),
            source,
        })?;
        if found.len() != target.blob.size {
            return Err(RegistryError::LocalBlob {
                digest: target.blob.digest.clone(),
                expected: target.blob.size,
                found: found.len(),
            });
        }
        let mut upload = opened;
        let mut failures = 0;
        let mut refused = false;
        loop {
            let before = upload.offset;
            let error = match self.step(target, &mut upload, file) {
                Ok(true) => return Ok(()),
                Ok(false) => {
                    failures = 0;
                    continue;
                }
                Err(error) => error,
            };
            let status = match &error {
                RegistryError::Status { status, .. } => *status,
                RegistryError::NotFound { .. } => 404,
                _ => 0,
            };
            let way = match (status, upload.way) {
                // Too much at once.
                (413, Way::Whole | Way::Stream) => Some(Way::Chunks(CHUNK_BYTES.min(target.blob.size.div_ceil(2)))),
                (413, Way::Chunks(length)) => {
                    Some(Way::Chunks(length / 2)).filter(|_| length / 2 >= SMALLEST_CHUNK_BYTES)
                }
                (405 | 501, Way::Stream | Way::Chunks(_)) if !refused => Some(Way::Whole),
                _ => None,
            };
            if let Some(way) = way {
                refused |= way == Way::Whole;
                upload = Upload { way, ..self.anew(target)? };
                continue;
            }
            // 400 and 416 are what registries say when they lost count; 404 when they forgot the upload.
            let lost = matches!(status, 400 | 404 | 416);
            failures += 1;
            let hopeless = !(lost || is_passing(&error) || is_passing_status(status));
            if hopeless || failures >= self.attempts() {
                self.give_up(target, &upload);
                return Err(error);
            }
            self.wait(failures);
            // The answer may have been lost, and not the blob.
            if self.has_blob(target)? {
                return Ok(());
            }
            let known = if lost { None } else { self.how_far(target, &upload) };
            upload = match known {
                Some(known) if known.offset <= target.blob.size => {
                    if known.offset > before {
                        failures = 0;
                    }
                    known
                }
                _ => Upload { way: upload.way, ..self.anew(target)? },
            };
        }
    }

    fn anew(&self, target: &BlobUpload<'_>) -> Result<Upload, RegistryError> {
        match self.open_upload(target)? {
            Opened::Upload(upload) => Ok(upload),
            // Only answers to a request for a mount say that, and there was none.
            Opened::Mounted => Err(self.confused(target, "201 to the opening of an upload")),
        }
    }

    fn confused(&self, target: &BlobUpload<'_>, answer: &str) -> RegistryError {
        RegistryError::Protocol {
            host: target.image.host.clone(),
            repository: target.image.repository.clone(),
            answer: answer.to_owned(),
        }
    }

    /// Sends the whole, the next piece, or the end; `true` when the blob is there.
    fn step(&self, target: &BlobUpload<'_>, upload: &mut Upload, file: &Path) -> Result<bool, RegistryError> {
        let (size, offset) = (target.blob.size, upload.offset);
        let whole = offset == 0 && upload.way == Way::Whole;
        let length = match upload.way {
            Way::Chunks(length) => length.min(size - offset),
            Way::Whole | Way::Stream => size - offset,
        };
        let part = |length| Payload::File { path: file.to_owned(), offset, length, progress: target.progress.clone() };
        if !whole && offset < size {
            let mut exchange = self.part(Method::PATCH, target, upload.location.clone())?;
            // A stream from the start goes without, as Docker's client sends it: every registry takes that.
            if offset > 0 || length < size {
                let range = format!("{offset}-{}", offset + length - 1);
                insert(&mut exchange.headers, header::CONTENT_RANGE, &range);
            }
            exchange.body = Some(part(length));
            let (response, url) = self.exchange(&exchange)?;
            upload.location = location(&exchange, response.headers(), &url)?;
            let expected = offset + length;
            upload.offset = range_end(response.headers()).unwrap_or(expected);
            if upload.offset <= offset || upload.offset > expected {
                let answer = format!("a range that ends at {} after {expected} bytes", upload.offset);
                return Err(self.confused(target, &answer));
            }
            return Ok(false);
        }
        let mut location = upload.location.clone();
        location.query_pairs_mut().append_pair("digest", &target.blob.digest);
        let mut exchange = self.part(Method::PUT, target, location)?;
        exchange.body = Some(if whole { part(size) } else { Payload::Bytes(Vec::new()) });
        let (response, _) = self.exchange(&exchange)?;
        self.check_digest(&exchange, response.headers(), &target.blob.digest)?;
        Ok(true)
    }

    /// Asks how much of an upload has arrived.
    fn how_far(&self, target: &BlobUpload<'_>, upload: &Upload) -> Option<Upload> {
        let exchange = Exchange { repeat: true, ..self.part(Method::GET, target, upload.location.clone()).ok()? };
        let (response, url) = self.exchange(&exchange).ok()?;
        let location = location(&exchange, response.headers(), &url).unwrap_or_else(|_| upload.location.clone());
        // `0-0` is nothing to one registry and one byte to another: better begin again.
        let offset = range_end(response.headers()).filter(|end| *end != 1)?;
        Some(Upload { location, offset, way: upload.way })
    }

    /// Tells the registry that nothing more comes. It cleans up by itself in the end.
    fn give_up(&self, target: &BlobUpload<'_>, upload: &Upload) {
        if let Ok(exchange) = self.part(Method::DELETE, target, upload.location.clone()) {
            let _ = self.exchange(&exchange);
        }
    }

    /// Writes a manifest or index under a tag or digest.
    pub fn put_manifest(&self, image: &RemoteImage, root: &Descriptor, bytes: &[u8]) -> Result<(), RegistryError> {
        let version = image.version();
        let (path, what) = (format!("manifests/{version}"), format!("manifest {version}"));
        let mut exchange = self.request(Method::PUT, image, &path, what, Access::Push { from: None })?;
        insert(&mut exchange.headers, header::CONTENT_TYPE, &root.media_type);
        exchange.body = Some(Payload::Bytes(bytes.to_vec()));
        let (response, _) = self.exchange(&exchange)?;
        self.check_digest(&exchange, response.headers(), &root.digest)
    }

    /// The registry's own idea of what it stored.
    fn check_digest(&self, exchange: &Exchange, headers: &HeaderMap, expected: &str) -> Result<(), RegistryError> {
        let found = headers.get("docker-content-digest").and_then(|value| value.to_str().ok());
        match found.filter(|found| found.starts_with("sha256:") && *found != expected) {
            Some(found) => Err(RegistryError::DigestMismatch {
                host: exchange.host.clone(),
                repository: exchange.repository.clone(),
                expected: expected.to_owned(),
                found: found.to_owned(),
            }),
            None => Ok(()),
        }
    }

    fn write(&self, method: Method, upload: &BlobUpload<'_>, path: &str) -> Result<Exchange, RegistryError> {
        let what = format!("blob {}", upload.blob.digest);
        let from = upload.from.filter(|from| *from != upload.image.repository).map(str::to_owned);
        self.request(method, upload.image, path, what, Access::Push { from })
    }

    /// A request to an upload's own address; never repeated as it is.
    fn part(&self, method: Method, target: &BlobUpload<'_>, location: Url) -> Result<Exchange, RegistryError> {
        let mut exchange = self.write(method, target, "blobs/uploads/")?;
        insert(&mut exchange.headers, header::CONTENT_TYPE, "application/octet-stream");
        exchange.what = format!("upload of blob {}", target.blob.digest);
        exchange.url = location;
        exchange.repeat = false;
        Ok(exchange)
    }
}

fn insert(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// Where an upload goes on.
fn location(exchange: &Exchange, headers: &HeaderMap, url: &Url) -> Result<Url, RegistryError> {
    let refused = |location: &str| RegistryError::Redirect {
        host: exchange.host.clone(),
        repository: exchange.repository.clone(),
        location: location.split(['?', '#']).next().unwrap_or_default().to_owned(),
    };
    let text = headers.get(header::LOCATION).and_then(|value| value.to_str().ok()).ok_or_else(|| refused(""))?;
    let next = url.join(text).map_err(|_| refused(text))?;
    let downgrade = exchange.home.scheme() == "https" && next.scheme() != "https";
    if !matches!(next.scheme(), "http" | "https") || downgrade { Err(refused(text)) } else { Ok(next) }
}

/// Bytes up to the end of `Range: 0-N` (with or without `bytes=`).
fn range_end(headers: &HeaderMap) -> Option<u64> {
    let text = headers.get(header::RANGE)?.to_str().ok()?;
    let (_, end) = text.trim().rsplit_once('-')?;
    end.trim().parse::<u64>().ok()?.checked_add(1)
}
