//! Reads from and writes to registries (OCI distribution specification); reads from web servers.
//!
//! Everything here blocks; the asynchronous runtime belongs to the [`Client`] and is started with its first request, so that
//! a build that needs no network pays nothing for it. What the callers can rely on:
//! - bytes are checked against the digest they were asked for, or the error says so;
//! - requests that may succeed later are repeated with growing pauses, and a broken download goes on where it broke;
//! - credentials go to the host they are for and to the token server that it names, never along a redirect elsewhere;
//! - plain HTTP is spoken to loopback addresses and to hosts named by the caller only.

pub mod auth;
mod certificates;
pub mod client;
pub mod helper;
pub mod http;
mod identity;
pub mod login;
pub mod mirror;
mod payload;
pub mod proxies;
pub mod upload;

pub use client::{Body, Client, ClientOptions, RemoteImage};
pub use http::{HttpFile, http_get};
pub use mirror::Mirror;
pub use payload::SendProgress;
pub use proxies::{Proxies, ProxyProblem};
pub use upload::{BlobUpload, Opened, Upload, Uploaded};

use crate::store::StoreError;
use rustls::CertificateError;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why something could not be fetched or sent.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The server's answer was no.
    #[error("{host}: {} answered {status}{}", subject(.repository), described(.code, .message))]
    Status {
        /// Host with port.
        host: String,
        /// Repository and what was asked of it; empty for web servers.
        repository: String,
        /// HTTP status.
        status: u16,
        /// The registry's error code (`MANIFEST_UNKNOWN`), or empty.
        code: String,
        /// The registry's words, or empty.
        message: String,
    },
    /// Not found.
    #[error("{host}: no {what} in {repository}{}", described(.code, .message))]
    NotFound {
        /// Host with port.
        host: String,
        /// Repository.
        repository: String,
        /// Manifest `tag`, blob `digest`.
        what: String,
        /// The registry's error code, or empty.
        code: String,
        /// The registry's words, or empty.
        message: String,
    },
    /// Credentials are missing or wrong.
    #[error("{host}: access{} denied{}{}", to(.repository), if *.credentials { "" } else { " (no credentials known)" }, described(.code, .message))]
    Denied {
        /// Host with port.
        host: String,
        /// Repository.
        repository: String,
        /// Credentials were sent.
        credentials: bool,
        /// The registry's error code, or empty.
        code: String,
        /// The registry's words, or empty.
        message: String,
    },
    /// No answer: name, connection, TLS, or broken on the way.
    #[error("{host}: {} failed", subject(.repository))]
    Transport {
        /// Host with port.
        host: String,
        /// Repository; empty for web servers.
        repository: String,
        /// The cause.
        source: reqwest::Error,
    },
    /// The proxy did not do its part.
    #[error("{host}: {} failed: the proxy {proxy} {problem}", subject(.repository))]
    Proxy {
        /// Host with port of the server that was to be reached.
        host: String,
        /// Repository; empty for web servers.
        repository: String,
        /// Its address, without user and password.
        proxy: String,
        /// What is wrong.
        problem: ProxyProblem,
        /// The cause, where there is more to say.
        source: Option<reqwest::Error>,
    },
    /// Not an address of a proxy.
    #[error("invalid address of a proxy `{proxy}`: {reason}")]
    BadProxy {
        /// As given, without user and password.
        proxy: String,
        /// What was expected.
        reason: &'static str,
    },
    /// The server wants to see another certificate of ours.
    #[error("{host}: {} failed: {}", subject(.repository), shown_certificate(.shown.as_deref(), .expected, .alert))]
    ClientCertificate {
        /// Host with port.
        host: String,
        /// Repository; empty for web servers.
        repository: String,
        /// The server's word for it (`BadCertificate`, `CertificateRequired`).
        alert: String,
        /// The certificate that it was shown.
        shown: Option<PathBuf>,
        /// Directories where one is looked for.
        expected: Vec<PathBuf>,
    },
    /// Nothing came for too long.
    #[error("{host}: {} got no {phase} for {} seconds", subject(.repository), .after.as_secs())]
    Timeout {
        /// Host with port.
        host: String,
        /// Repository; empty for web servers.
        repository: String,
        /// `answer` or `data`.
        phase: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// So little came for so long that it would never end.
    #[error("{host}: {} sent next to nothing for {} seconds ({received} bytes in all)", subject(.repository), .after.as_secs())]
    Slow {
        /// Host with port.
        host: String,
        /// Repository; empty for web servers.
        repository: String,
        /// What came.
        received: u64,
        /// How long was waited.
        after: Duration,
    },
    /// The connection ended before all bytes came, again and again.
    #[error("{host}: {} ended after {received} of {expected} bytes", subject(.repository))]
    Incomplete {
        /// Host with port.
        host: String,
        /// Repository.
        repository: String,
        /// What came.
        received: u64,
        /// What was announced.
        expected: u64,
    },
    /// More bytes than announced.
    #[error("{host}: {} sent more than {expected} bytes", subject(.repository))]
    TooLong {
        /// Host with port.
        host: String,
        /// Repository.
        repository: String,
        /// What was announced or allowed.
        expected: u64,
    },
    /// The bytes are not what was asked for.
    #[error("{host}: {} expected digest {expected}, found {found}", subject(.repository))]
    DigestMismatch {
        /// Host with port.
        host: String,
        /// Repository or address.
        repository: String,
        /// Asked for.
        expected: String,
        /// Of the bytes.
        found: String,
    },
    /// Too many redirects, or one to nowhere.
    #[error("{host}: {} was redirected to `{location}`, which is not followed", subject(.repository))]
    Redirect {
        /// Host with port.
        host: String,
        /// Repository.
        repository: String,
        /// Where to, without secrets.
        location: String,
    },
    /// The token server's answer has no token, or the challenge makes no sense.
    #[error("{host}: {} asks for authentication that is not understood: {challenge}", subject(.repository))]
    Challenge {
        /// Host with port.
        host: String,
        /// Repository.
        repository: String,
        /// What is wrong with it.
        challenge: String,
    },
    /// Not an address that can be fetched.
    #[error("invalid address `{url}`")]
    BadUrl {
        /// As given, without secrets.
        url: String,
    },
    /// Not a checksum.
    #[error("invalid checksum `{checksum}` (sha256, sha384 and sha512 with hex digits are known)")]
    BadChecksum {
        /// As given.
        checksum: String,
    },
    /// Needed, but this build must not use the network.
    #[error("`{what}` is not in the store, and the network may not be used")]
    Offline {
        /// Image or address.
        what: String,
    },
    /// The HTTP client could not be made: no root certificates on this system, mostly.
    #[error("cannot prepare HTTPS (root certificates are looked up as OpenSSL does, SSL_CERT_FILE names others)")]
    Setup {
        /// The cause.
        source: reqwest::Error,
    },
    /// TLS does not take the certificates that it is to use.
    #[error("cannot prepare HTTPS with the certificates that were named")]
    Tls {
        /// The cause.
        source: rustls::Error,
    },
    /// The runtime could not be started.
    #[error("cannot start threads for the network")]
    Runtime {
        /// The cause.
        source: std::io::Error,
    },
    /// The file with credentials cannot be read.
    #[error("cannot read credentials in {}: {reason}", path.display())]
    Credentials {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The file with credentials cannot be written.
    #[error("cannot write credentials to {}: {reason}", path.display())]
    WriteCredentials {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A credential helper failed.
    #[error("{program}: {reason}")]
    Helper {
        /// The program.
        program: String,
        /// What is wrong.
        reason: String,
    },
    /// Not a usable certificate.
    #[error("cannot use certificate {}: {reason}", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The blob here is not what the manifest says.
    #[error("blob {digest} has {found} bytes here, its manifest says {expected}")]
    LocalBlob {
        /// Which.
        digest: String,
        /// By the manifest.
        expected: u64,
        /// By the file.
        found: u64,
    },
    /// An answer that the protocol does not know.
    #[error("{host}: {} gave an answer that makes no sense: {answer}", subject(.repository))]
    Protocol {
        /// Host with port.
        host: String,
        /// Repository.
        repository: String,
        /// What it was.
        answer: String,
    },
    /// What was fetched cannot be stored.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Reading or writing on the way failed.
    #[error("{host}: {} could not be stored", subject(.repository))]
    Io {
        /// Host with port.
        host: String,
        /// Repository.
        repository: String,
        /// The cause.
        source: std::io::Error,
    },
}

impl RegistryError {
    /// A way out, one sentence.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            Self::Denied { host, .. } => format!("log in with: nacre login {host}"),
            Self::NotFound { .. } => "look for a mistake in the name or the tag".to_owned(),
            Self::Proxy { problem: ProxyProblem::Credentials, .. } => {
                "write them into the proxy's variable: HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT".to_owned()
            }
            Self::Proxy { .. } | Self::BadProxy { .. } => {
                "HTTP_PROXY, HTTPS_PROXY and ALL_PROXY name proxies, NO_PROXY the hosts that are reached without"
                    .to_owned()
            }
            Self::ClientCertificate { shown: None, expected, .. } => {
                let directory = expected.first()?.display();
                format!("put it there as client.cert, and its key as client.key: {directory}")
            }
            Self::Transport { host, source, .. } => match client::untrusted(source)? {
                CertificateError::UnknownIssuer | CertificateError::Other(_) => format!(
                    "name the authority with --tls-ca FILE or as certs.d/{host}/ca.crt, or do not check with --insecure-registry {host}"
                ),
                _ => format!("the server needs another certificate; --insecure-registry {host} does not check it"),
            },
            _ => return None,
        })
    }
}

/// What is wrong with a client's certificate.
fn shown_certificate(shown: Option<&Path>, expected: &[PathBuf], alert: &str) -> String {
    let places: Vec<String> = expected.iter().map(|directory| directory.display().to_string()).collect();
    match shown {
        Some(path) => format!("the server does not take the client certificate {} ({alert})", path.display()),
        None => format!(
            "the server wants a client certificate ({alert}), and no NAME.cert with NAME.key is in {}",
            places.join(" or ")
        ),
    }
}

fn to(repository: &str) -> String {
    if repository.is_empty() { String::new() } else { format!(" to {repository}") }
}

fn subject(repository: &str) -> &str {
    if repository.is_empty() { "the request" } else { repository }
}

fn described(code: &str, message: &str) -> String {
    match (code, message) {
        ("", "") => String::new(),
        ("", text) | (text, "") => format!(" ({text})"),
        (code, message) => format!(" ({code}: {message})"),
    }
}
