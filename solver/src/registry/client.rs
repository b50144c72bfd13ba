//! The HTTP side of a registry: requests with authentication, redirects, repetition; manifests and blobs.
//!
//! Every request runs through [`Client::exchange`]: it sends, follows redirects (without credentials once the origin
//! changes), answers one challenge, and repeats what may succeed later. Bodies are read through [`Body`], which asks for
//! the rest with a range request when the connection breaks.

use super::RegistryError;
use super::auth::{Challenge, CredentialFile, Credentials, encode_base64, parse_challenge};
use super::helper;
use super::mirror::Mirror;
use super::payload::Payload;
use super::proxies::{Proxies, ProxyProblem, Routes};
use crate::image::{Descriptor, media_type};
use crate::store::blob::{DOCUMENT_LIMIT_BYTES, sha256};
use reqwest::header::{self, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, StatusCode, Url};
use std::collections::{HashMap, HashSet};
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Redirects that are followed; browsers and Go stop at 10 or 20.
const REDIRECT_LIMIT: u32 = 10;
/// Answers to errors are not read beyond this.
const ERROR_BODY_LIMIT_BYTES: u64 = 64 << 10;
/// No pause between attempts is longer, whatever the server asks for.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Fewer bytes than this in the time that there is for data are as good as none.
const LEAST_BYTES: u64 = 4 << 10;

/// How to talk to registries.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Files with credentials (`config.json`, `auth.json`); the first that knows a registry counts.
    pub credentials: Vec<PathBuf>,
    /// Credentials that go before all files, for one host: those that a login tries.
    pub given: Option<(String, Credentials)>,
    /// Hosts (with port) that are spoken to by plain HTTP besides loopback ones.
    pub plain_http: Vec<String>,
    /// Hosts (with port) whose certificates are not checked, and that may speak plain HTTP.
    pub insecure: Vec<String>,
    /// Files with certificates (PEM) of authorities that are trusted besides the system's.
    pub authorities: Vec<PathBuf>,
    /// Directories with a directory for each host: `*.crt` authorities, `NAME.cert` and `NAME.key` for the client.
    pub certificates: Vec<PathBuf>,
    /// Hosts that are asked first for what others have.
    pub mirrors: Vec<Mirror>,
    /// How to get out.
    pub proxies: Proxies,
    /// Attempts for one request.
    pub attempts: u32,
    /// First pause between attempts; each is twice the one before.
    pub pause: Duration,
    /// Time to open a connection.
    pub connect_timeout: Duration,
    /// Time from the request to the head of the answer.
    pub answer_timeout: Duration,
    /// Time in which at least 4 KiB of a body must come, if there is as much.
    pub data_timeout: Duration,
    /// Time that a credential helper is given.
    pub helper_timeout: Duration,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            credentials: Vec::new(),
            given: None,
            plain_http: Vec::new(),
            insecure: Vec::new(),
            authorities: Vec::new(),
            certificates: Vec::new(),
            mirrors: Vec::new(),
            proxies: Proxies::default(),
            attempts: 5,
            pause: Duration::from_millis(300),
            connect_timeout: Duration::from_secs(20),
            answer_timeout: Duration::from_secs(60),
            data_timeout: Duration::from_secs(60),
            helper_timeout: Duration::from_secs(60),
        }
    }
}

/// A client for any number of registries. Clones share everything.
#[derive(Debug, Clone)]
pub struct Client(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    options: ClientOptions,
    runtime: OnceLock<tokio::runtime::Runtime>,
    clients: Mutex<HashMap<Reach, Connections>>,
    /// Who has answered by HTTPS, and so is content with our certificate.
    content: Mutex<HashSet<String>>,
    routes: OnceLock<Routes>,
    files: OnceLock<Vec<CredentialFile>>,
    /// What files and helpers said, by host and repository.
    credentials: Mutex<HashMap<(String, String), Option<Credentials>>>,
    /// `Authorization` by host and what it is for.
    authorizations: Mutex<HashMap<(String, String), HeaderValue>>,
    /// Which of the hosts that may speak plain HTTP speak HTTPS.
    speaks_https: Mutex<HashMap<String, bool>>,
    /// Mirrors that do not answer.
    dead_mirrors: Mutex<HashSet<String>>,
    /// Bytes of bodies that came.
    received: AtomicU64,
}

/// What connections of one kind have in common.
#[derive(Debug, Clone)]
struct Connections {
    client: reqwest::Client,
    /// The file with the certificate that is shown to who asks.
    identity: Option<PathBuf>,
}

/// Kinds of connections, each with a client of its own: only HTTPS loads certificates.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Reach {
    Http,
    Https,
    /// A host (with port) with certificates of its own, or whose certificate is not checked.
    Special(String),
}

/// What a connection may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// HTTP/2 and TLS 1.3 where the server knows them.
    Best,
    /// HTTP/1.1.
    Plain,
    /// HTTP/1.1 and TLS 1.2.
    Old,
}

/// What a request is for: decides about credentials and the scope of tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Access {
    /// A web server; gets no credentials.
    Web,
    /// Reading a repository.
    Pull,
    /// Writing it, with blobs that another repository of the registry has.
    Push {
        /// That repository.
        from: Option<String>,
    },
    /// Nothing but being let in.
    Login,
}

impl Access {
    /// Scopes of the token, and the name under which the authorization is kept.
    fn scopes(&self, repository: &str) -> Vec<String> {
        match self {
            Access::Web | Access::Login => Vec::new(),
            Access::Pull => vec![format!("repository:{repository}:pull")],
            Access::Push { from } => std::iter::once(format!("repository:{repository}:pull,push"))
                .chain(from.iter().map(|from| format!("repository:{from}:pull")))
                .collect(),
        }
    }
}

/// An image in a registry.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RemoteImage {
    /// Host with port, as in the reference: `docker.io`.
    pub host: String,
    /// `library/debian`.
    pub repository: String,
    /// Tag.
    pub tag: Option<String>,
    /// Digest; decides when both are given.
    pub digest: Option<String>,
}

impl RemoteImage {
    /// Takes a canonical reference apart; `None` when it is not one.
    pub fn parse(canonical: &str) -> Option<Self> {
        let (name, digest) = match canonical.split_once('@') {
            Some((name, digest)) => (name, Some(digest.to_owned())),
            None => (canonical, None),
        };
        let (host, path) = name.split_once('/')?;
        let (repository, tag) = match path.split_once(':') {
            Some((repository, tag)) => (repository, Some(tag.to_owned())),
            None => (path, None),
        };
        let whole = !host.is_empty() && !repository.is_empty() && (tag.is_some() || digest.is_some());
        whole.then(|| Self { host: host.to_owned(), repository: repository.to_owned(), tag, digest })
    }

    /// Digest or tag, as it stands in addresses.
    pub fn version(&self) -> &str {
        self.digest.as_deref().or(self.tag.as_deref()).unwrap_or("latest")
    }
}

impl std::fmt::Display for RemoteImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// One request, as often as it takes.
#[derive(Debug, Clone)]
pub(super) struct Exchange {
    pub(super) method: Method,
    pub(super) url: Url,
    /// An address at the server that credentials are for. An upload's address may be elsewhere.
    pub(super) home: Url,
    pub(super) headers: HeaderMap,
    /// Host as in the reference, for messages and credentials.
    pub(super) host: String,
    /// Repository, for messages and credentials; empty for web servers.
    pub(super) repository: String,
    pub(super) access: Access,
    pub(super) body: Option<Payload>,
    /// Send again what may succeed later. A part of an upload must not be sent twice.
    pub(super) repeat: bool,
    /// What is asked for, for messages: `manifest 12`.
    pub(super) what: String,
    /// A redirect from HTTPS may lead to HTTP.
    pub(super) downgrade: bool,
    /// `Authorization` that is sent without being asked for.
    pub(super) authorization: Option<HeaderValue>,
}

impl Client {
    /// Makes a client. Nothing is read or started before the first request.
    pub fn new(options: ClientOptions) -> Self {
        Self(Arc::new(Shared {
            options,
            runtime: OnceLock::new(),
            clients: Mutex::default(),
            content: Mutex::default(),
            routes: OnceLock::new(),
            files: OnceLock::new(),
            credentials: Mutex::default(),
            authorizations: Mutex::default(),
            speaks_https: Mutex::default(),
            dead_mirrors: Mutex::default(),
            received: AtomicU64::new(0),
        }))
    }

    /// Bytes of manifests, blobs and files that came so far.
    pub fn received_bytes(&self) -> u64 {
        self.0.received.load(Ordering::Relaxed)
    }

    /// Fetches a manifest or index by the image's tag or digest and checks it.
    pub(super) fn manifest_at(
        &self,
        image: &RemoteImage,
        patient: bool,
    ) -> Result<(Vec<u8>, Descriptor), RegistryError> {
        let exchange = Exchange { repeat: patient, ..self.manifest_exchange(Method::GET, image)? };
        let mut body = self.open(exchange, None)?;
        let content_type = body.header(header::CONTENT_TYPE);
        let mut bytes = Vec::new();
        body.read_limited(DOCUMENT_LIMIT_BYTES, &mut bytes)?;
        let found = sha256(&bytes);
        // The header is the registry's own claim; the reference's digest is the user's.
        let claimed = body.header(HeaderName::from_static("docker-content-digest"));
        let expected = image.digest.clone().or(claimed.filter(|claimed| claimed.starts_with("sha256:")));
        if let Some(expected) = expected.filter(|expected| *expected != found) {
            return Err(RegistryError::DigestMismatch {
                host: image.host.clone(),
                repository: image.repository.clone(),
                expected,
                found,
            });
        }
        let media_type = content_type.map(|value| without_parameters(&value)).unwrap_or_default();
        let size = bytes.len() as u64;
        Ok((bytes, Descriptor { media_type, digest: found, size, ..Descriptor::default() }))
    }

    /// Asks which manifest a tag means, without fetching it. `None` when the registry does not say.
    pub(super) fn resolve_at(&self, image: &RemoteImage, patient: bool) -> Result<Option<Descriptor>, RegistryError> {
        let exchange = Exchange { repeat: patient, ..self.manifest_exchange(Method::HEAD, image)? };
        let (response, _) = self.exchange(&exchange)?;
        let text = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let digest = text("docker-content-digest").filter(|digest| crate::store::blob::digest_hex(digest).is_ok());
        Ok(digest.map(|digest| Descriptor {
            media_type: text("content-type").map(|value| without_parameters(&value)).unwrap_or_default(),
            digest,
            size: text("content-length").and_then(|length| length.parse().ok()).unwrap_or_default(),
            ..Descriptor::default()
        }))
    }

    /// Begins to fetch a blob. The bytes are those of the descriptor in number; their digest is for the reader to check.
    pub(super) fn blob_at(&self, image: &RemoteImage, blob: &Descriptor, patient: bool) -> Result<Body, RegistryError> {
        let what = format!("blob {}", blob.digest);
        let exchange = self.request(Method::GET, image, &format!("blobs/{}", blob.digest), what, Access::Pull)?;
        self.open(Exchange { repeat: patient, ..exchange }, Some(blob.size))
    }

    /// A request about something in a repository.
    pub(super) fn request(
        &self,
        method: Method,
        image: &RemoteImage,
        path: &str,
        what: String,
        access: Access,
    ) -> Result<Exchange, RegistryError> {
        let url = self.registry_url(&image.host, &format!("{}/{path}", image.repository))?;
        Ok(Exchange {
            method,
            home: url.clone(),
            url,
            headers: HeaderMap::new(),
            host: image.host.clone(),
            repository: image.repository.clone(),
            access,
            body: None,
            repeat: true,
            what,
            downgrade: false,
            authorization: None,
        })
    }

    /// Tries whether a registry lets us in with the credentials that it would be given.
    pub fn log_in(&self, host: &str) -> Result<(), RegistryError> {
        let url = self.registry_url(host, "")?;
        let nobody = RemoteImage { host: host.to_owned(), repository: String::new(), tag: None, digest: None };
        self.exchange(&self.login_exchange(Method::GET, &nobody, url)).map(drop)
    }

    /// A request about nothing but who we are.
    pub(super) fn login_exchange(&self, method: Method, image: &RemoteImage, url: Url) -> Exchange {
        Exchange {
            method,
            home: url.clone(),
            url,
            headers: HeaderMap::new(),
            host: image.host.clone(),
            repository: image.repository.clone(),
            access: Access::Login,
            body: None,
            repeat: true,
            what: "login".to_owned(),
            downgrade: false,
            authorization: None,
        }
    }

    /// Sends a request once, whatever the answer.
    pub(super) fn ask_once(
        &self,
        exchange: &Exchange,
        url: &Url,
        request: reqwest::RequestBuilder,
    ) -> Result<reqwest::Response, RegistryError> {
        self.await_answer(exchange, url, request, None)
    }

    pub(crate) fn options(&self) -> &ClientOptions {
        &self.0.options
    }

    pub(super) fn dead_mirrors(&self) -> &Mutex<HashSet<String>> {
        &self.0.dead_mirrors
    }

    fn manifest_exchange(&self, method: Method, image: &RemoteImage) -> Result<Exchange, RegistryError> {
        let accepted =
            [media_type::OCI_INDEX, media_type::DOCKER_LIST, media_type::OCI_MANIFEST, media_type::DOCKER_MANIFEST];
        let mut headers = HeaderMap::new();
        headers.insert(
            header::ACCEPT,
            HeaderValue::from_str(&accepted.join(", ")).expect("media types are header values"),
        );
        let version = image.version();
        let (path, what) = (format!("manifests/{version}"), format!("manifest {version}"));
        Ok(Exchange { headers, ..self.request(method, image, &path, what, Access::Pull)? })
    }

    /// Address of something below `/v2/` of a registry. Docker Hub's registry has another name than its images.
    pub(super) fn registry_url(&self, host: &str, path: &str) -> Result<Url, RegistryError> {
        let server = match host {
            "docker.io" | "index.docker.io" => "registry-1.docker.io",
            other => other,
        };
        let loopback = is_loopback(host_name(server));
        let plain = if self.0.options.plain_http.iter().any(|known| known == host) {
            true
        } else if self.is_insecure(server) || loopback && !self.0.options.authorities.is_empty() {
            !self.speaks_https(server)?
        } else {
            loopback && !self.has_certificates(server)
        };
        let text = format!("{}://{server}/v2/{path}", if plain { "http" } else { "https" });
        Url::parse(&text).map_err(|_| RegistryError::BadUrl { url: text })
    }

    /// Sends a GET and gives its body, which goes on after interruptions.
    pub(super) fn open(&self, exchange: Exchange, expected: Option<u64>) -> Result<Body, RegistryError> {
        let (response, _) = self.exchange(&exchange)?;
        let announced = response.content_length();
        if let (Some(expected), Some(announced)) = (expected, announced)
            && expected != announced
        {
            return Err(RegistryError::Incomplete {
                host: exchange.host,
                repository: format!("{}: {}", exchange.repository, exchange.what),
                received: announced,
                expected,
            });
        }
        Ok(Body {
            client: self.clone(),
            headers: response.headers().clone(),
            status: response.status(),
            exchange,
            response: Some(response),
            chunk: Default::default(),
            received: 0,
            skip: 0,
            expected: expected.or(announced),
            failures: 0,
            since_failure: 0,
            pace: Pace::default(),
        })
    }

    /// Chooses what TLS is made of, once a process.
    pub(crate) fn ensure_tls(&self) {
        // Somebody may have been faster.
        let _ = rustls::crypto::ring::default_provider().install_default();
    }

    /// Adds to the bytes that came over the network.
    #[cfg(feature = "s3")]
    pub(crate) fn count_received(&self, bytes: u64) {
        self.0.received.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn runtime(&self) -> Result<&tokio::runtime::Runtime, RegistryError> {
        if let Some(runtime) = self.0.runtime.get() {
            return Ok(runtime);
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("nacre-net")
            .enable_all()
            .build()
            .map_err(|source| RegistryError::Runtime { source })?;
        Ok(self.0.runtime.get_or_init(|| runtime))
    }

    fn is_insecure(&self, host: &str) -> bool {
        self.0.options.insecure.iter().any(|known| known == host)
    }

    fn has_certificates(&self, host: &str) -> bool {
        !host.contains('/') && self.0.options.certificates.iter().any(|directory| directory.join(host).is_dir())
    }

    /// Asks a host that may speak plain HTTP once which protocol it speaks.
    fn speaks_https(&self, host: &str) -> Result<bool, RegistryError> {
        if let Some(known) = locked(&self.0.speaks_https).get(host) {
            return Ok(*known);
        }
        let text = format!("https://{host}/v2/");
        let url = Url::parse(&text).map_err(|_| RegistryError::BadUrl { url: text })?;
        let request = self.http_client(&url)?.get(url.clone());
        let timeout = self.0.options.connect_timeout;
        let answer = self.runtime()?.block_on(async { tokio::time::timeout(timeout, request.send()).await });
        // A certificate that is not good enough, ours or the server's, is HTTPS, too; connections include TLS.
        let https = match &answer {
            Ok(Ok(_)) => true,
            Ok(Err(error)) => {
                !error.is_connect() || untrusted(error).is_some() || self.alert_about_client(error, &url).is_some()
            }
            Err(_) => false,
        };
        locked(&self.0.speaks_https).insert(host.to_owned(), https);
        Ok(https)
    }

    /// Proxies, as they were given.
    pub(crate) fn routes(&self) -> Result<&Routes, RegistryError> {
        if let Some(routes) = self.0.routes.get() {
            return Ok(routes);
        }
        let routes = Routes::read(&self.0.options.proxies)?;
        Ok(self.0.routes.get_or_init(|| routes))
    }

    pub(super) fn http_client(&self, url: &Url) -> Result<reqwest::Client, RegistryError> {
        let reach = self.reach(url);
        if let (Reach::Special(_), Some(proxy)) = (&reach, self.routes()?.of(url))
            && proxy.scheme() == "https"
        {
            // One set of rules is used for both of them: the proxy would be trusted as the host is, and shown its certificate.
            let proxy = self.routes()?.shown(url).unwrap_or_default();
            let reason = "a proxy reached by https cannot lead to a host with certificates of its own or without verification; use one \
                          reached by http, or name the host in NO_PROXY";
            return Err(RegistryError::BadProxy { proxy, reason });
        }
        if let Some(known) = locked(&self.0.clients).get(&reach) {
            return Ok(known.client.clone());
        }
        let (builder, identity) = self.client_builder(&reach, Way::Best)?;
        let client = builder.build().map_err(|source| RegistryError::Setup { source })?;
        let made = Connections { client, identity };
        Ok(locked(&self.0.clients).entry(reach).or_insert(made).client.clone())
    }

    /// What makes clients for connections of a kind, and the file with the certificate that they show.
    fn client_builder(
        &self,
        reach: &Reach,
        way: Way,
    ) -> Result<(reqwest::ClientBuilder, Option<PathBuf>), RegistryError> {
        let (old, plain) = (way == Way::Old, way != Way::Best);
        // Fails when it is installed already, which is as good.
        self.ensure_tls();
        let options = &self.0.options;
        let routes = self.routes()?.clone();
        let localhost =
            [SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0), SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), 0)];
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("nacre/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(options.connect_timeout)
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .no_proxy()
            .proxy(reqwest::Proxy::custom(move |url| routes.of(url).cloned()))
            .resolve_to_addrs("localhost", &localhost)
            .http1_max_headers(200);
        if plain {
            builder = builder.http1_only();
        }
        let mut identity = None;
        match reach {
            Reach::Https | Reach::Special(_) => {
                let host = match reach {
                    Reach::Special(host) => Some(host.as_str()),
                    _ => None,
                };
                let found = super::certificates::load(&options.authorities, &options.certificates, host)?;
                let insecure = host.is_some_and(|host| self.is_insecure(host));
                if insecure {
                    builder = builder.tls_certs_only([]).tls_danger_accept_invalid_certs(true);
                }
                if insecure || found.authorities.is_empty() {
                    if old {
                        builder = builder.max_tls_version(reqwest::tls::Version::TLS_1_2);
                    }
                    if let Some(client) = &found.client {
                        builder = builder.identity(client.identity.clone());
                    }
                } else {
                    let protocols: &[&str] = if plain { &["http/1.1"] } else { &["h2", "http/1.1"] };
                    let config = super::certificates::config(&found, old, protocols);
                    builder =
                        builder.tls_backend_preconfigured(config.map_err(|source| RegistryError::Tls { source })?);
                }
                identity = found.client.map(|client| client.path);
            }
            Reach::Http if self.routes()?.by_https() => {}
            Reach::Http => builder = builder.tls_certs_only([]),
        }
        Ok((builder, identity))
    }

    fn reach(&self, url: &Url) -> Reach {
        if url.scheme() != "https" {
            return Reach::Http;
        }
        let host = host_with_port(url);
        if self.is_insecure(&host) || self.has_certificates(&host) { Reach::Special(host) } else { Reach::Https }
    }

    /// Whether a request failed because the server wants another certificate of ours, and its word for that. In TLS 1.3 it
    /// says so when the client may be sending already, and with HTTP/2 nobody listens any more: so it is asked again in an
    /// older way.
    fn alert_about_client(&self, error: &reqwest::Error, url: &Url) -> Option<String> {
        if let Some(alert) = refuses_client(error) {
            return Some(alert);
        }
        let is_new = !locked(&self.0.content).contains(&host_with_port(url));
        if !is_new || url.scheme() != "https" || !came_far(error) {
            return None;
        }
        let root = url.join("/v2/").ok()?;
        [Way::Old, Way::Plain].into_iter().find_map(|way| {
            let (builder, _) = self.client_builder(&self.reach(url), way).ok()?;
            let client = builder.build().ok()?;
            let timeout = self.0.options.connect_timeout;
            let answer = self
                .runtime()
                .ok()?
                .block_on(async { tokio::time::timeout(timeout, client.get(root.clone()).send()).await });
            refuses_client(&answer.ok()?.err()?)
        })
    }

    /// What a request that got no answer died of.
    fn lost(&self, exchange: &Exchange, url: &Url, source: reqwest::Error) -> RegistryError {
        let (host, repository) = (exchange.host.clone(), exchange.repository.clone());
        let source = source.without_url();
        if let Some(alert) = self.alert_about_client(&source, url) {
            let shown = locked(&self.0.clients).get(&self.reach(url)).and_then(|known| known.identity.clone());
            let place = host_with_port(url);
            let expected = self.0.options.certificates.iter().map(|directory| directory.join(&place)).collect();
            return RegistryError::ClientCertificate { host, repository, alert, shown, expected };
        }
        let proxy = self.routes().ok().and_then(|routes| routes.shown(url));
        match proxy.zip(proxy_problem(&source, url)) {
            Some((proxy, problem)) => {
                // The rest of a refusal is that there was one.
                let source = Some(source).filter(|_| problem == ProxyProblem::Unreachable);
                RegistryError::Proxy { host, repository, proxy, problem, source }
            }
            None => RegistryError::Transport { host, repository, source },
        }
    }

    fn credentials(&self, host: &str, repository: &str) -> Result<Option<Credentials>, RegistryError> {
        let host = if host == "index.docker.io" { "docker.io" } else { host };
        let options = &self.0.options;
        if let Some((_, given)) = options.given.as_ref().filter(|(known, _)| known == host) {
            return Ok(Some(given.clone()));
        }
        let key = (host.to_owned(), repository.to_owned());
        // Held while a helper runs: several threads need the same answer, and it may ask the user.
        let mut known = locked(&self.0.credentials);
        if let Some(found) = known.get(&key) {
            return Ok(found.clone());
        }
        let files = match self.0.files.get() {
            Some(files) => files,
            None => {
                let read = options.credentials.iter().map(|path| CredentialFile::read(path));
                let files = read.collect::<Result<Vec<_>, _>>()?;
                self.0.files.get_or_init(|| files)
            }
        };
        let mut found = None;
        for file in files {
            if let Some(program) = file.helper(host) {
                found = helper::get(program, host, options.helper_timeout)?;
            }
            found = found.or_else(|| file.find(host, repository).cloned());
            if found.is_some() {
                break;
            }
        }
        known.insert(key, found.clone());
        Ok(found)
    }

    /// Sends a request until it is answered. Returns answers that are a success (or 304), and the address they came from.
    pub(super) fn exchange(&self, exchange: &Exchange) -> Result<(reqwest::Response, Url), RegistryError> {
        let options = &self.0.options;
        let key = (exchange.host.clone(), exchange.access.scopes(&exchange.repository).join(" "));
        let mut attempt = 1;
        let mut answered_challenge = false;
        let mut took_others = false;
        loop {
            let authorization =
                exchange.authorization.clone().or_else(|| locked(&self.0.authorizations).get(&key).cloned());
            let sent_credentials = authorization.is_some();
            let result = self.send(exchange, authorization.as_ref());
            let (error, pause) = match result {
                Ok((response, url)) => {
                    let status = response.status();
                    if status.is_success() || status == StatusCode::NOT_MODIFIED {
                        return Ok((response, url));
                    }
                    let ours = same_origin(&url, &exchange.home) && exchange.access != Access::Web;
                    if status == StatusCode::UNAUTHORIZED && ours {
                        // Another thread may have been told so before, and has a new token already.
                        let newer = locked(&self.0.authorizations).get(&key).cloned();
                        if newer.is_some() && newer != authorization && !took_others {
                            took_others = true;
                            continue;
                        }
                        if !answered_challenge {
                            answered_challenge = true;
                            locked(&self.0.authorizations).remove(&key);
                            if let Some(authorization) = self.authorize(exchange, response.headers())? {
                                locked(&self.0.authorizations).insert(key.clone(), authorization);
                                continue;
                            }
                        }
                    }
                    let pause = retry_after(response.headers());
                    let again = is_passing_status(status.as_u16());
                    let error = self.refusal(exchange, &url, response, sent_credentials);
                    if !again {
                        return Err(error);
                    }
                    (error, pause)
                }
                Err(error) if is_passing(&error) => (error, None),
                Err(error) => return Err(error),
            };
            if attempt >= options.attempts || !exchange.repeat {
                // Who repeats by other means must wait as long as the server asks for.
                if let Some(pause) = pause.filter(|_| !exchange.repeat) {
                    std::thread::sleep(pause.min(LONGEST_PAUSE));
                }
                return Err(error);
            }
            std::thread::sleep(pause.unwrap_or_else(|| growing_pause(options.pause, attempt)).min(LONGEST_PAUSE));
            attempt += 1;
        }
    }

    /// Waits before another attempt.
    pub(super) fn wait(&self, attempt: u32) {
        std::thread::sleep(growing_pause(self.0.options.pause, attempt));
    }

    pub(super) fn attempts(&self) -> u32 {
        self.0.options.attempts
    }

    /// Sends once and follows redirects.
    fn send(
        &self,
        exchange: &Exchange,
        authorization: Option<&HeaderValue>,
    ) -> Result<(reqwest::Response, Url), RegistryError> {
        let refused = |location: &str| RegistryError::Redirect {
            host: exchange.host.clone(),
            repository: exchange.repository.clone(),
            location: location.split(['?', '#']).next().unwrap_or_default().to_owned(),
        };
        let mut url = exchange.url.clone();
        for _ in 0..=REDIRECT_LIMIT {
            let mut headers = exchange.headers.clone();
            if let Some(authorization) = authorization.filter(|_| same_origin(&url, &exchange.home)) {
                headers.insert(header::AUTHORIZATION, authorization.clone());
            }
            let mut request = self.http_client(&url)?.request(exchange.method.clone(), url.clone()).headers(headers);
            let mut sent = None;
            if let Some(payload) = &exchange.body {
                let (body, counter) = payload.body().map_err(|source| RegistryError::Io {
                    host: exchange.host.clone(),
                    repository: exchange.repository.clone(),
                    source,
                })?;
                // Without it the body would go in HTTP's own chunks, which many registries refuse.
                request = request.header(header::CONTENT_LENGTH, payload.length()).body(body);
                sent = Some(counter);
            }
            let response = self.await_answer(exchange, &url, request, sent.as_deref())?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok((response, url));
            }
            let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
            let location = location.ok_or_else(|| refused(""))?;
            let next = url.join(location).map_err(|_| refused(location))?;
            let downgrade = url.scheme() == "https" && next.scheme() != "https" && !exchange.downgrade;
            if !matches!(next.scheme(), "http" | "https") || downgrade {
                return Err(refused(location));
            }
            url = next;
        }
        Err(refused(url.as_str()))
    }

    fn await_answer(
        &self,
        exchange: &Exchange,
        url: &Url,
        request: reqwest::RequestBuilder,
        sent: Option<&AtomicU64>,
    ) -> Result<reqwest::Response, RegistryError> {
        let after = self.0.options.answer_timeout;
        let answer = self.runtime()?.block_on(async {
            let mut answer = std::pin::pin!(request.send());
            let mut before = 0;
            loop {
                let result = tokio::time::timeout(after, &mut answer).await;
                // A long body is on its way as long as more of it goes.
                let now = sent.map_or(0, |sent| sent.load(Ordering::Relaxed));
                if result.is_ok() || now == before {
                    return result;
                }
                before = now;
            }
        });
        match answer {
            Ok(Ok(answer)) => {
                if url.scheme() == "https" {
                    locked(&self.0.content).insert(host_with_port(url));
                }
                Ok(answer)
            }
            Ok(Err(source)) => Err(self.lost(exchange, url, source)),
            Err(_) => Err(RegistryError::Timeout {
                host: exchange.host.clone(),
                repository: exchange.repository.clone(),
                phase: "answer",
                after,
            }),
        }
    }

    /// Answers a challenge: the header to send from now on, or nothing when there is nothing to try.
    fn authorize(&self, exchange: &Exchange, headers: &HeaderMap) -> Result<Option<HeaderValue>, RegistryError> {
        let values = headers.get_all(header::WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        let credentials = self.credentials(&exchange.host, &exchange.repository)?;
        let credentials = credentials.as_ref();
        let confused = |challenge: String| RegistryError::Challenge {
            host: exchange.host.clone(),
            repository: exchange.repository.clone(),
            challenge,
        };
        let sensitive = |text: String| {
            let mut value =
                HeaderValue::from_str(&text).map_err(|_| confused("a token that is no header".to_owned()))?;
            value.set_sensitive(true);
            Ok(value)
        };
        if let Some(token) = credentials.map(|known| &known.registry_token).filter(|token| !token.is_empty()) {
            return sensitive(format!("Bearer {token}")).map(Some);
        }
        match parse_challenge(values) {
            None => Ok(None),
            Some(Challenge::Basic) => match credentials.filter(|known| !known.password.is_empty()) {
                Some(known) => sensitive(basic(known)).map(Some),
                None => Ok(None),
            },
            Some(Challenge::Bearer { realm, service, scope }) => {
                let realm = Url::parse(&realm).map_err(|_| confused(format!("realm `{realm}`")))?;
                // A registry reached safely must not send passwords elsewhere in the clear.
                if realm.scheme() != "https" && exchange.home.scheme() == "https" || realm.host().is_none() {
                    return Err(confused(format!("realm `{realm}`")));
                }
                // To read, what the registry asks for; to write, all that the whole push will need.
                let scopes = match (scope, &exchange.access) {
                    (Some(scope), Access::Pull | Access::Login) => vec![scope],
                    _ => exchange.access.scopes(&exchange.repository),
                };
                let token = self.token(exchange, realm, service.as_deref(), &scopes, credentials)?;
                sensitive(format!("Bearer {token}")).map(Some)
            }
        }
    }

    /// Fetches a token (distribution specification, token authentication; OAuth2 for identity tokens).
    fn token(
        &self,
        exchange: &Exchange,
        mut realm: Url,
        service: Option<&str>,
        scopes: &[String],
        credentials: Option<&Credentials>,
    ) -> Result<String, RegistryError> {
        #[derive(serde::Deserialize, Default)]
        #[serde(default)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        let identity = credentials.map(|known| known.identity_token.as_str()).filter(|token| !token.is_empty());
        let mut form = Url::parse("http://form/").expect("a constant address");
        {
            let target = if identity.is_some() { &mut form } else { &mut realm };
            let mut pairs = target.query_pairs_mut();
            pairs.extend_pairs(service.map(|service| ("service", service)));
            // A form has each name once; an address may repeat it, which old token servers insist on.
            match identity {
                Some(_) if !scopes.is_empty() => drop(pairs.append_pair("scope", &scopes.join(" "))),
                _ => drop(pairs.extend_pairs(scopes.iter().map(|scope| ("scope", scope)))),
            }
            if let Some(token) = identity {
                pairs.append_pair("grant_type", "refresh_token").append_pair("client_id", "nacre");
                pairs.append_pair("refresh_token", token);
            }
        }
        let options = &self.0.options;
        let mut attempt = 1;
        let response = loop {
            let client = self.http_client(&realm)?;
            let request = match (identity, credentials) {
                (Some(_), _) => client
                    .post(realm.clone())
                    .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
                    .body(form.query().unwrap_or_default().to_owned()),
                (None, Some(known)) if !known.password.is_empty() => {
                    client.get(realm.clone()).header(header::AUTHORIZATION, basic(known))
                }
                _ => client.get(realm.clone()),
            };
            let (error, pause) = match self.await_answer(exchange, &realm, request, None) {
                Ok(response) if response.status().is_success() => break response,
                Ok(response) => {
                    let pause = retry_after(response.headers());
                    let again = is_passing_status(response.status().as_u16());
                    let error = self.refusal(exchange, &realm, response, credentials.is_some());
                    if !again {
                        return Err(error);
                    }
                    (error, pause)
                }
                Err(error) if is_passing(&error) => (error, None),
                Err(error) => return Err(error),
            };
            if attempt >= options.attempts {
                return Err(error);
            }
            std::thread::sleep(pause.unwrap_or_else(|| growing_pause(options.pause, attempt)).min(LONGEST_PAUSE));
            attempt += 1;
        };
        let bytes = self.small_body(response).unwrap_or_default();
        let token: Token = serde_json::from_slice(&bytes).unwrap_or_default();
        token
            .token
            .filter(|token| !token.is_empty())
            .or(token.access_token)
            .filter(|token| !token.is_empty())
            .ok_or_else(|| RegistryError::Challenge {
                host: exchange.host.clone(),
                repository: exchange.repository.clone(),
                challenge: format!("no token from {}", realm.host_str().unwrap_or_default()),
            })
    }

    /// Reads what there is of a short body.
    pub(super) fn small_body(&self, mut response: reqwest::Response) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        let timeout = self.0.options.data_timeout;
        self.runtime().ok()?.block_on(async {
            let all = async {
                while let Ok(Some(chunk)) = response.chunk().await {
                    bytes.extend_from_slice(&chunk);
                    if bytes.len() as u64 > ERROR_BODY_LIMIT_BYTES {
                        break;
                    }
                }
            };
            // What there is by then has to do.
            let _ = tokio::time::timeout(timeout, all).await;
        });
        Some(bytes)
    }

    /// The error that an answer means.
    fn refusal(&self, exchange: &Exchange, url: &Url, response: reqwest::Response, credentials: bool) -> RegistryError {
        #[derive(serde::Deserialize, Default)]
        #[serde(default)]
        struct Errors {
            errors: Vec<OneError>,
            details: Option<String>,
        }
        #[derive(serde::Deserialize, Default)]
        #[serde(default)]
        struct OneError {
            code: Option<String>,
            message: Option<String>,
        }
        let status = response.status();
        let body = self.small_body(response).unwrap_or_default();
        let mut errors: Errors = serde_json::from_slice(&body).unwrap_or_default();
        let first = if errors.errors.is_empty() { OneError::default() } else { errors.errors.swap_remove(0) };
        let code = first.code.unwrap_or_default();
        // Foreign text: one line of it, no control characters.
        let message = first.message.or(errors.details).unwrap_or_default();
        let mut message: String = message.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect();
        let (host, repository) = (exchange.host.clone(), exchange.repository.clone());
        // Where there is no tunnel, who answers may be the proxy.
        let proxy = self.routes().ok().and_then(|routes| routes.shown(url)).filter(|_| url.scheme() == "http");
        if let Some(proxy) = proxy {
            if status == StatusCode::PROXY_AUTHENTICATION_REQUIRED {
                let problem = ProxyProblem::Credentials;
                return RegistryError::Proxy { host, repository, proxy, problem, source: None };
            }
            if message.is_empty() {
                message = format!("through the proxy {proxy}");
            }
        }
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if exchange.access != Access::Web => {
                RegistryError::Denied { host, repository, credentials, code, message }
            }
            StatusCode::NOT_FOUND if !repository.is_empty() => {
                RegistryError::NotFound { host, repository, what: exchange.what.clone(), code, message }
            }
            status => RegistryError::Status { host, repository, status: status.as_u16(), code, message },
        }
    }
}

/// The body of an answer. Reading goes on with a range request when the connection breaks; the reader must check the
/// digest at the end.
#[derive(Debug)]
pub struct Body {
    client: Client,
    headers: HeaderMap,
    status: StatusCode,
    exchange: Exchange,
    response: Option<reqwest::Response>,
    chunk: Chunk,
    /// Bytes given to the reader or in `chunk`.
    received: u64,
    /// Bytes of a repeated answer that the reader already has.
    skip: u64,
    expected: Option<u64>,
    /// Interruptions without anything worth the name between them.
    failures: u32,
    /// Bytes since the last interruption.
    since_failure: u64,
    pace: Pace,
}

/// Whether bytes come fast enough: time spent waiting, and the bytes that came in it. A server that sends one now and
/// then would keep a build for ever.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    waited: Duration,
    bytes: u64,
}

impl Pace {
    /// Counts bytes that came after a wait; `limit` is the time for [`LEAST_BYTES`].
    pub(crate) fn is_too_slow(&mut self, count: u64, took: Duration, limit: Duration) -> bool {
        self.waited += took;
        self.bytes += count;
        if self.bytes >= LEAST_BYTES {
            *self = Self::default();
        }
        self.waited > limit
    }
}

/// A received piece and how much of it was read.
#[derive(Debug, Default)]
struct Chunk {
    bytes: Vec<u8>,
    read: usize,
}

impl Body {
    /// A header of the first answer.
    pub(super) fn header(&self, name: HeaderName) -> Option<String> {
        self.headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
    }

    /// Status of the first answer.
    pub(super) fn status(&self) -> StatusCode {
        self.status
    }

    /// Bytes in all, where the server or the descriptor says.
    pub fn expected(&self) -> Option<u64> {
        self.expected
    }

    /// Reads all of a document.
    pub fn read_limited(&mut self, limit: u64, bytes: &mut Vec<u8>) -> Result<(), RegistryError> {
        let (host, repository) = (self.exchange.host.clone(), self.exchange.repository.clone());
        self.by_ref()
            .take(limit + 1)
            .read_to_end(bytes)
            .map_err(|error| into_registry_error(error, &host, &repository))?;
        if bytes.len() as u64 > limit {
            return Err(RegistryError::TooLong { host, repository, expected: limit });
        }
        Ok(())
    }

    /// Waits for the next piece; `false` at the end.
    fn fill(&mut self) -> Result<bool, RegistryError> {
        loop {
            let (host, repository) = (self.exchange.host.clone(), self.exchange.repository.clone());
            let after = self.client.0.options.data_timeout;
            let asked = Instant::now();
            let piece = match self.response.as_mut() {
                Some(response) => {
                    self.client.runtime()?.block_on(async { tokio::time::timeout(after, response.chunk()).await })
                }
                None => Ok(Ok(None)),
            };
            let error = match piece {
                Ok(Ok(Some(bytes))) if self.pace.is_too_slow(bytes.len() as u64, asked.elapsed(), after) => {
                    RegistryError::Slow { host, repository, received: self.received, after }
                }
                Ok(Ok(Some(bytes))) => {
                    let skipped = self.skip.min(bytes.len() as u64);
                    self.skip -= skipped;
                    let bytes = &bytes[usize::try_from(skipped).unwrap_or(bytes.len())..];
                    // What was there before is no progress.
                    self.since_failure += bytes.len() as u64;
                    self.received += bytes.len() as u64;
                    self.client.0.received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    if let Some(expected) = self.expected.filter(|expected| self.received > *expected) {
                        return Err(RegistryError::TooLong { host, repository, expected });
                    }
                    if bytes.is_empty() {
                        continue;
                    }
                    self.chunk = Chunk { bytes: bytes.to_vec(), read: 0 };
                    return Ok(true);
                }
                Ok(Ok(None)) => match self.expected.filter(|expected| self.received < *expected) {
                    None => return Ok(false),
                    Some(expected) => RegistryError::Incomplete { host, repository, received: self.received, expected },
                },
                Ok(Err(source)) => RegistryError::Transport { host, repository, source: source.without_url() },
                Err(_) => RegistryError::Timeout { host, repository, phase: "data", after },
            };
            self.failures = if self.since_failure >= LEAST_BYTES { 1 } else { self.failures + 1 };
            (self.since_failure, self.pace) = (0, Pace::default());
            self.response = None;
            // Without a length nobody knows whether the rest is the rest of the same.
            if self.failures >= self.client.0.options.attempts || self.expected.is_none() {
                return Err(error);
            }
            std::thread::sleep(growing_pause(self.client.0.options.pause, self.failures));
            self.resume()?;
        }
    }

    fn resume(&mut self) -> Result<(), RegistryError> {
        let mut exchange = self.exchange.clone();
        // Some registries know no range without an end.
        let last = self.expected.map(|expected| expected.saturating_sub(1).to_string()).unwrap_or_default();
        if self.received > 0
            && let Ok(range) = HeaderValue::from_str(&format!("bytes={}-{last}", self.received))
        {
            exchange.headers.insert(header::RANGE, range);
        }
        let (response, _) = match self.client.exchange(&exchange) {
            // And some no ranges at all, which they must not call an error, but do.
            Err(RegistryError::Status { status: 400 | 416 | 501, .. }) => self.client.exchange(&self.exchange)?,
            answer => answer?,
        };
        let from_start = |start: u64| {
            let range = response.headers().get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
            range.is_some_and(|range| range.starts_with(&format!("bytes {start}-")))
        };
        // A server that cannot do ranges begins again.
        self.skip = match response.status() {
            StatusCode::PARTIAL_CONTENT if from_start(self.received) => 0,
            StatusCode::PARTIAL_CONTENT => {
                return Err(RegistryError::Incomplete {
                    host: self.exchange.host.clone(),
                    repository: self.exchange.repository.clone(),
                    received: self.received,
                    expected: self.expected.unwrap_or_default(),
                });
            }
            _ => self.received,
        };
        self.response = Some(response);
        Ok(())
    }
}

impl Read for Body {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.chunk.read == self.chunk.bytes.len() && !self.fill().map_err(io::Error::other)? {
            return Ok(0);
        }
        let rest = &self.chunk.bytes[self.chunk.read..];
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        self.chunk.read += count;
        Ok(count)
    }
}

/// An error that went through [`Read`] as what it was.
pub(crate) fn into_registry_error(error: io::Error, host: &str, repository: &str) -> RegistryError {
    match error.downcast::<RegistryError>() {
        Ok(error) => error,
        Err(source) => RegistryError::Io { host: host.to_owned(), repository: repository.to_owned(), source },
    }
}

pub(super) fn basic(credentials: &Credentials) -> String {
    let text = format!("{}:{}", credentials.user, credentials.password);
    format!("Basic {}", encode_base64(text.as_bytes()))
}

fn without_parameters(content_type: &str) -> String {
    content_type.split(';').next().unwrap_or_default().trim().to_owned()
}

/// May the same request succeed later?
pub(super) fn is_passing_status(status: u16) -> bool {
    matches!(status, 408 | 429 | 500 | 502 | 503 | 504)
}

/// May the same request succeed later? A certificate stays as bad as it is.
pub(super) fn is_passing(error: &RegistryError) -> bool {
    match error {
        RegistryError::Transport { source, .. } => untrusted(source).is_none(),
        RegistryError::Proxy { problem, .. } => *problem != ProxyProblem::Credentials,
        other => matches!(other, RegistryError::Timeout { .. } | RegistryError::Slow { .. }),
    }
}

/// What TLS had to say, if it did.
fn tls_error(error: &reqwest::Error) -> Option<&rustls::Error> {
    causes(error).find_map(|error| {
        // An I/O error that wraps another one, and that may wrap one more, does not give it as its source.
        let mut inner = Some(error);
        while let Some(error) = inner {
            if let Some(found) = error.downcast_ref() {
                return Some(found);
            }
            let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
            inner = wrapped.map(|wrapped| wrapped as &(dyn std::error::Error + 'static));
        }
        None
    })
}

/// The server's word for what it has against our certificate, or against there being none.
fn refuses_client(error: &reqwest::Error) -> Option<String> {
    match tls_error(error) {
        Some(rustls::Error::AlertReceived(alert)) if super::certificates::is_about_client(*alert) => {
            Some(format!("{alert:?}"))
        }
        _ => None,
    }
}

/// Whether a request died behind the handshake of TLS, as far as that can be told: setting HTTP/2 up counts as
/// connecting. Where it cannot, it costs a question more.
fn came_far(error: &reqwest::Error) -> bool {
    let near = ["tcp connect error", "dns error", "tunnel error"];
    let never_got_there = |error: &(dyn std::error::Error + 'static)| {
        let words = error.to_string();
        near.iter().any(|start| words.starts_with(start))
    };
    !error.is_timeout() && tls_error(error).is_none() && !causes(error).any(never_got_there)
}

/// What is wrong with the server's certificate, if that is it.
pub(super) fn untrusted(error: &reqwest::Error) -> Option<&rustls::CertificateError> {
    match tls_error(error) {
        Some(rustls::Error::InvalidCertificate(reason)) => Some(reason),
        _ => None,
    }
}

/// Whether a request through a proxy died of the proxy. The type of a tunnel's errors has no name here, so it is their
/// words that tell.
fn proxy_problem(error: &reqwest::Error, url: &Url) -> Option<ProxyProblem> {
    let words = causes(error).map(ToString::to_string).find(|words| words.starts_with("tunnel error: "));
    match words.as_deref() {
        Some("tunnel error: proxy authorization required") => Some(ProxyProblem::Credentials),
        Some("tunnel error: unsuccessful") => Some(ProxyProblem::Refused),
        Some(_) => Some(ProxyProblem::Unreachable),
        None => {
            let socks = causes(error).any(|error| error.to_string().contains("SOCKS"));
            // Behind a tunnel it is the server that TLS is spoken to.
            (socks || error.is_connect() && (url.scheme() == "http" || tls_error(error).is_none()))
                .then_some(ProxyProblem::Unreachable)
        }
    }
}

fn causes(error: &reqwest::Error) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error as &(dyn std::error::Error + 'static)), |error| error.source())
}

/// As directories of certificates are called.
fn host_with_port(url: &Url) -> String {
    match url.port() {
        Some(port) => format!("{}:{port}", url.host_str().unwrap_or_default()),
        None => url.host_str().unwrap_or_default().to_owned(),
    }
}

/// Host without port; IPv6 without brackets.
fn host_name(host: &str) -> &str {
    if let Some(rest) = host.strip_prefix('[') {
        return rest.split(']').next().unwrap_or_default();
    }
    host.rsplit_once(':').map_or(host, |(name, _)| name)
}

fn is_loopback(name: &str) -> bool {
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme() && a.host() == b.host() && a.port_or_known_default() == b.port_or_known_default()
}

/// `Retry-After` in seconds or as a date.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?;
    if let Ok(seconds) = text.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    let wait = super::http::parse_date(text)? - jiff::Timestamp::now().as_second();
    Some(Duration::from_secs(u64::try_from(wait).unwrap_or(0)))
}

/// Twice as long each time, and a random part, so that many clients do not come back at once.
fn growing_pause(first: Duration, attempt: u32) -> Duration {
    let pause = first.saturating_mul(1 << (attempt - 1).min(10));
    let mut random = [0; 1];
    let _ = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::NONBLOCK);
    (pause + pause.saturating_mul(u32::from(random[0])) / 512).min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_come_apart() {
        let check = |text: &str, expected: Option<(&str, &str, &str)>| {
            let image = RemoteImage::parse(text);
            let found = image.as_ref().map(|image| (image.host.as_str(), image.repository.as_str(), image.version()));
            assert_eq!(found, expected, "{text}");
            if let Some(image) = image {
                assert_eq!(image.to_string(), text);
            }
        };
        check("docker.io/library/debian:12", Some(("docker.io", "library/debian", "12")));
        check("localhost:5000/x:latest", Some(("localhost:5000", "x", "latest")));
        check("[::1]:5000/a/b:t", Some(("[::1]:5000", "a/b", "t")));
        check("h.io/a:t@sha256:00", Some(("h.io", "a", "sha256:00")));
        check("h.io/a@sha256:00", Some(("h.io", "a", "sha256:00")));
        check("debian", None);
        check("h.io/a", None);
        check("", None);
    }

    #[test]
    fn plain_http_is_for_loopback_and_named_hosts() {
        let client = Client::new(ClientOptions { plain_http: vec!["lan:5000".into()], ..ClientOptions::default() });
        let check = |host: &str, expected: &str| {
            assert_eq!(client.registry_url(host, "a/blobs/x").unwrap().as_str(), format!("{expected}/v2/a/blobs/x"));
        };
        check("docker.io", "https://registry-1.docker.io");
        check("ghcr.io", "https://ghcr.io");
        check("localhost:5000", "http://localhost:5000");
        check("127.0.0.1:5000", "http://127.0.0.1:5000");
        check("[::1]:5000", "http://[::1]:5000");
        check("lan:5000", "http://lan:5000");
        check("localhost.evil.com", "https://localhost.evil.com");
        check("127.evil.com", "https://127.evil.com");
        assert!(client.registry_url("a b", "x").is_err());
    }

    #[test]
    fn base64_encodes() {
        let check = |text: &str, expected: &str| assert_eq!(encode_base64(text.as_bytes()), expected);
        check("", "");
        check("u", "dQ==");
        check("us", "dXM=");
        check("u:p", "dTpw");
        check("user:pass", "dXNlcjpwYXNz");
    }

    #[test]
    fn pauses_grow_and_end() {
        let first = Duration::from_millis(100);
        assert!(growing_pause(first, 1) < growing_pause(first, 3));
        assert!(growing_pause(Duration::from_secs(50), 40) <= LONGEST_PAUSE);
    }
}
