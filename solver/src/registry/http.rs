//! Files fetched by address (`ADD https://…`).
//!
//! The bytes become a blob of the store. `http/HEX` (of the address) remembers blob, `ETag` and `Last-Modified`, so that
//! the next build asks only whether it changed, and with a checksum it does not even ask.

use super::auth::Credentials;
use super::client::{Access, Exchange, basic, into_registry_error};
use super::{Client, RegistryError};
use crate::store::blob::{copy, digest_hex};
use crate::store::{Store, hex};
use reqwest::header::{self, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, StatusCode, Url};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha384, Sha512};
use std::io::{self, Write};
use std::path::PathBuf;

/// A fetched file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpFile {
    /// Where its bytes are.
    pub path: PathBuf,
    /// `sha256:hex`.
    pub digest: String,
    /// Bytes.
    pub size_bytes: u64,
    /// `Last-Modified` in seconds since the epoch.
    pub last_modified: Option<i64>,
    /// Name by the server's `Content-Disposition`, else the last part of the address's path; may be empty.
    pub file_name: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Memo {
    url: String,
    etag: Option<String>,
    last_modified: Option<String>,
    digest: String,
    size_bytes: u64,
    file_name: String,
}

/// Fetches a file, or finds that the one in the store is still it. `checksum` is `sha256:hex` (or sha384, sha512) and must
/// match. `offline` takes what the store has without asking.
pub fn http_get(
    store: &Store,
    client: &Client,
    url: &str,
    checksum: Option<&str>,
    offline: bool,
) -> Result<HttpFile, RegistryError> {
    let mut address = Url::parse(url).map_err(|_| RegistryError::BadUrl { url: without_secrets(url) })?;
    if !matches!(address.scheme(), "http" | "https") || address.host().is_none() {
        return Err(RegistryError::BadUrl { url: without_secrets(url) });
    }
    let checksum = checksum.map(Checksum::parse).transpose()?;
    let mut headers = HeaderMap::new();
    // Not every server accepts a request without it; nothing here would undo a compression.
    headers.insert(header::ACCEPT, HeaderValue::from_static("*/*"));
    headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    // As a header it stays with this host when the answer is a redirect, and out of what is written down.
    let credentials = (!address.username().is_empty() || address.password().is_some()).then(|| Credentials {
        user: percent_decoded(address.username()),
        password: percent_decoded(address.password().unwrap_or_default()),
        ..Credentials::default()
    });
    let authorization = credentials.and_then(|known| {
        let mut value = HeaderValue::from_str(&basic(&known)).ok()?;
        value.set_sensitive(true);
        Some(value)
    });
    if address.set_username("").is_err() || address.set_password(None).is_err() {
        return Err(RegistryError::BadUrl { url: without_secrets(url) });
    }
    address.set_fragment(None);
    let memo_path = store.part("http").join(hex(blake3::hash(address.as_str().as_bytes()).as_bytes()));
    let memo = store.read_optional(&memo_path)?.and_then(|bytes| serde_json::from_slice::<Memo>(&bytes).ok());
    let memo = memo.filter(|memo| memo.url == address.as_str() && store.has_blob(&memo.digest, Some(memo.size_bytes)));
    if let Some(memo) = &memo {
        let pinned = match &checksum {
            Some(checksum) => checksum.matches(store, &memo.digest)?,
            None => false,
        };
        if pinned || offline && checksum.is_none() {
            return file(store, memo);
        }
        // What is remembered is not what is wanted: only a fresh copy can be.
        if checksum.is_none() {
            for (name, value) in [(header::IF_NONE_MATCH, &memo.etag), (header::IF_MODIFIED_SINCE, &memo.last_modified)]
            {
                if let Some(value) = value.as_deref().and_then(|value| HeaderValue::from_str(value).ok()) {
                    headers.insert(name, value);
                }
            }
        }
    }
    if offline {
        return Err(RegistryError::Offline { what: without_secrets(url) });
    }
    let host = match address.port() {
        Some(port) => format!("{}:{port}", address.host_str().unwrap_or_default()),
        None => address.host_str().unwrap_or_default().to_owned(),
    };
    let exchange = Exchange {
        method: Method::GET,
        url: address.clone(),
        home: address.clone(),
        headers,
        host: host.clone(),
        repository: String::new(),
        access: Access::Web,
        body: None,
        repeat: true,
        what: String::new(),
        downgrade: true,
        authorization,
    };
    let mut body = client.open(exchange, None)?;
    if let Some(memo) = memo.filter(|_| body.status() == StatusCode::NOT_MODIFIED) {
        return file(store, &memo);
    }
    let mut writer = store.blob_writer()?;
    let mut hashing = checksum.as_ref().map(Checksum::hasher);
    let mut both = Tee { writer: &mut writer, hasher: hashing.as_mut() };
    copy(&mut body, &mut both).map_err(|error| into_registry_error(error, &host, ""))?;
    let (digest, size_bytes) = match &checksum {
        Some(Checksum { algorithm: Algorithm::Sha256, text, .. }) => {
            writer.commit(Some(text)).map_err(|error| match error {
                crate::store::StoreError::DigestMismatch { expected, found, .. } => RegistryError::DigestMismatch {
                    host: host.clone(),
                    repository: without_secrets(url),
                    expected,
                    found,
                },
                other => other.into(),
            })?
        }
        Some(Checksum { text, .. }) => {
            let found = hashing.map(Hasher::finish).unwrap_or_default();
            if found != *text {
                let (repository, expected) = (without_secrets(url), text.clone());
                return Err(RegistryError::DigestMismatch { host, repository, expected, found });
            }
            writer.commit(None)?
        }
        None => writer.commit(None)?,
    };
    let memo = Memo {
        url: address.to_string(),
        etag: body.header(header::ETAG),
        last_modified: body.header(header::LAST_MODIFIED),
        digest,
        size_bytes,
        file_name: body
            .header(HeaderName::from_static("content-disposition"))
            .and_then(|value| disposition_name(&value))
            .unwrap_or_else(|| address.path().rsplit('/').next().unwrap_or_default().to_owned()),
    };
    let bytes = serde_json::to_vec(&memo).expect("a memo has string keys only");
    store.replace_file(&memo_path, &bytes)?;
    file(store, &memo)
}

fn file(store: &Store, memo: &Memo) -> Result<HttpFile, RegistryError> {
    Ok(HttpFile {
        path: store.blob_path(&memo.digest)?,
        digest: memo.digest.clone(),
        size_bytes: memo.size_bytes,
        last_modified: memo.last_modified.as_deref().and_then(parse_date),
        file_name: memo.file_name.clone(),
    })
}

/// An HTTP date (RFC 9110, 5.6.7) in seconds since the epoch.
pub(super) fn parse_date(text: &str) -> Option<i64> {
    jiff::fmt::rfc2822::parse(text.trim()).ok().map(|date| date.timestamp().as_second())
}

/// The file name of a `Content-Disposition`, if it is a name and no path.
fn disposition_name(value: &str) -> Option<String> {
    let name = value.split(';').skip(1).find_map(|parameter| {
        let (key, value) = parameter.split_once('=')?;
        key.trim().eq_ignore_ascii_case("filename").then(|| value.trim().trim_matches('"').to_owned())
    })?;
    let usable = !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0']);
    usable.then_some(name)
}

/// An address for messages: no user, password or query.
fn without_secrets(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    match url.split_once("://") {
        Some((scheme, rest)) => {
            let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
            format!("{scheme}://{}{path}", authority.rsplit('@').next().unwrap_or_default())
        }
        None => url.to_owned(),
    }
}

/// Undoes `%63`; what is no such sequence stays.
fn percent_decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let digits = text.get(at + 1..at + 3).filter(|_| bytes[at] == b'%');
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                decoded.push(byte);
                at += 3;
            }
            None => {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Algorithm {
    Sha256,
    Sha384,
    Sha512,
}

#[derive(Debug)]
struct Checksum {
    algorithm: Algorithm,
    text: String,
}

enum Hasher {
    /// The blob's own digest says it.
    Sha256,
    Sha384(Box<Sha384>),
    Sha512(Box<Sha512>),
}

impl Checksum {
    fn parse(text: &str) -> Result<Self, RegistryError> {
        let known = match text.split_once(':') {
            Some(("sha256", digits)) => Some((Algorithm::Sha256, 64, digits)),
            Some(("sha384", digits)) => Some((Algorithm::Sha384, 96, digits)),
            Some(("sha512", digits)) => Some((Algorithm::Sha512, 128, digits)),
            _ => None,
        };
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        match known {
            Some((algorithm, length, digits)) if digits.len() == length && digits.bytes().all(is_digit) => {
                Ok(Self { algorithm, text: text.to_owned() })
            }
            _ => Err(RegistryError::BadChecksum { checksum: text.to_owned() }),
        }
    }

    fn hasher(&self) -> Hasher {
        match self.algorithm {
            Algorithm::Sha256 => Hasher::Sha256,
            Algorithm::Sha384 => Hasher::Sha384(Box::default()),
            Algorithm::Sha512 => Hasher::Sha512(Box::default()),
        }
    }

    /// Is the stored blob the one that is meant?
    fn matches(&self, store: &Store, digest: &str) -> Result<bool, RegistryError> {
        digest_hex(digest)?;
        if self.algorithm == Algorithm::Sha256 {
            return Ok(self.text == digest);
        }
        let mut hasher = self.hasher();
        let mut file = store.open_blob(digest)?;
        let hashed = copy(&mut file, &mut Tee { writer: &mut io::sink(), hasher: Some(&mut hasher) });
        Ok(hashed.is_ok() && hasher.finish() == self.text)
    }
}

impl Hasher {
    fn finish(self) -> String {
        match self {
            Hasher::Sha256 => String::new(),
            Hasher::Sha384(hasher) => format!("sha384:{}", hex(&hasher.finalize())),
            Hasher::Sha512(hasher) => format!("sha512:{}", hex(&hasher.finalize())),
        }
    }
}

struct Tee<'a> {
    writer: &'a mut dyn Write,
    hasher: Option<&'a mut Hasher>,
}

impl Write for Tee<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.write_all(bytes)?;
        match &mut self.hasher {
            Some(Hasher::Sha384(hasher)) => hasher.update(bytes),
            Some(Hasher::Sha512(hasher)) => hasher.update(bytes),
            Some(Hasher::Sha256) | None => {}
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_parse() {
        assert_eq!(parse_date("Wed, 21 Oct 2015 07:28:00 GMT"), Some(1_445_412_480));
        assert_eq!(parse_date("yesterday"), None);
    }

    #[test]
    fn names_of_dispositions() {
        let check = |value: &str, expected: Option<&str>| {
            assert_eq!(disposition_name(value).as_deref(), expected, "{value}");
        };
        check("attachment; filename=\"a b.tar\"", Some("a b.tar"));
        check("attachment; FileName=x", Some("x"));
        check("attachment", None);
        check("attachment; filename=\"../x\"", None);
        check("attachment; filename=..", None);
    }

    #[test]
    fn messages_hold_no_secrets() {
        let check = |url: &str, expected: &str| assert_eq!(without_secrets(url), expected);
        check("https://user:pw@host/a?token=x#y", "https://host/a");
        check("https://host", "https://host");
        check("nonsense?x", "nonsense");
    }

    #[test]
    fn checksums_parse() {
        assert!(Checksum::parse(&format!("sha256:{}", "0".repeat(64))).is_ok());
        assert!(Checksum::parse(&format!("sha512:{}", "0".repeat(128))).is_ok());
        for bad in ["", "sha256:", "sha256:zz", "md5:00", &format!("sha256:{}", "A".repeat(64))] {
            assert!(Checksum::parse(bad).is_err(), "{bad}");
        }
    }
}
