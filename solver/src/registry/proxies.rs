//! Which proxy a request goes through. The rules are those of Go's programs (golang.org/x/net/http/httpproxy), docker and
//! podman among them, so that what works for these works here:
//!
//! | entry of `NO_PROXY` | who is reached directly |
//! |---|---|
//! | `*` | everybody |
//! | `example.com` | this host and those below it |
//! | `.example.com`, `*.example.com` | those below it |
//! | `10.1.2.3`, `::1`, `10.0.0.0/8`, `fd00::/8` | these addresses; names are not looked up |
//! | any of the first three kinds with `:PORT` (`[::1]:80`) | the same, at this port |
//!
//! `localhost` and loopback addresses are always reached directly.

use super::RegistryError;
use reqwest::Url;
use std::net::IpAddr;

/// Proxies, as the usual variables name them.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Proxies {
    /// For `http:`: an address, or `HOST:PORT`.
    pub http: Option<String>,
    /// For `https:`.
    pub https: Option<String>,
    /// Hosts that are reached without, as in the table.
    pub exceptions: Option<String>,
}

/// An address may hold a password.
impl std::fmt::Debug for Proxies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = |proxy: &Option<String>| proxy.as_deref().map(without_password);
        f.debug_struct("Proxies")
            .field("http", &shown(&self.http))
            .field("https", &shown(&self.https))
            .field("exceptions", &self.exceptions)
            .finish()
    }
}

/// What went wrong at a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyProblem {
    /// No connection to it.
    Unreachable,
    /// It wants to know who asks.
    Credentials,
    /// It does not connect us.
    Refused,
}

impl std::fmt::Display for ProxyProblem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ProxyProblem::Unreachable => "cannot be reached",
            ProxyProblem::Credentials => "wants a user and a password (407)",
            ProxyProblem::Refused => "refuses to connect to it",
        })
    }
}

/// [`Proxies`] that have been read.
#[derive(Debug, Clone, Default)]
pub(crate) struct Routes {
    http: Option<Url>,
    https: Option<Url>,
    direct: Vec<Direct>,
}

/// An entry of `NO_PROXY`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Direct {
    All,
    Network { address: IpAddr, bits: u32 },
    Address { address: IpAddr, port: Option<String> },
    Name { name: String, itself: bool, port: Option<String> },
}

impl Routes {
    /// Reads what the variables say.
    pub(crate) fn read(proxies: &Proxies) -> Result<Self, RegistryError> {
        let read = |text: &Option<String>| text.as_deref().map(proxy_url).transpose();
        let exceptions = proxies.exceptions.as_deref().unwrap_or_default();
        let entries = exceptions.split(|c: char| c == ',' || c.is_whitespace()).filter_map(Direct::parse);
        Ok(Self { http: read(&proxies.http)?, https: read(&proxies.https)?, direct: entries.collect() })
    }

    /// The proxy for an address, with user and password.
    pub(crate) fn of(&self, url: &Url) -> Option<&Url> {
        let proxy = if url.scheme() == "https" { self.https.as_ref() } else { self.http.as_ref() };
        let name = url.host_str()?.trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
        let port = url.port_or_known_default().map(|port| port.to_string()).unwrap_or_default();
        let address = name.parse::<IpAddr>().ok();
        let here = name == "localhost" || address.is_some_and(|address| address.to_canonical().is_loopback());
        proxy.filter(|_| !here && !self.direct.iter().any(|entry| entry.covers(&name, &port, address)))
    }

    /// Is a proxy for plain HTTP itself asked by HTTPS?
    pub(crate) fn by_https(&self) -> bool {
        self.http.as_ref().is_some_and(|proxy| proxy.scheme() == "https")
    }

    /// The proxy for an address as it may be shown.
    pub(crate) fn shown(&self, url: &Url) -> Option<String> {
        self.of(url).map(|proxy| without_password(proxy.as_str()))
    }
}

impl Direct {
    fn parse(entry: &str) -> Option<Self> {
        let entry = entry.to_ascii_lowercase();
        if entry == "*" {
            return Some(Direct::All);
        }
        if let Some((address, bits)) = entry.split_once('/') {
            let (address, bits): (IpAddr, u32) = (address.parse().ok()?, bits.parse().ok()?);
            return (bits <= width(address)).then_some(Direct::Network { address, bits });
        }
        // An IPv6 address without brackets is all colons.
        let (name, port) = match entry.rsplit_once(':') {
            Some((name, port)) if entry.parse::<IpAddr>().is_err() && !name.is_empty() => {
                (name, Some(port.to_owned()).filter(|port| !port.is_empty()))
            }
            Some(("", _)) => return None,
            _ => (entry.as_str(), None),
        };
        let name = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
        if let Ok(address) = name.parse() {
            return Some(Direct::Address { address, port });
        }
        let name = name.strip_prefix('*').filter(|rest| rest.starts_with('.')).unwrap_or(name);
        let itself = !name.starts_with('.');
        let name = name.trim_start_matches('.').to_owned();
        (!name.is_empty()).then_some(Direct::Name { name, itself, port })
    }

    fn covers(&self, name: &str, port: &str, address: Option<IpAddr>) -> bool {
        let same_port = |known: &Option<String>| known.as_deref().is_none_or(|known| known == port);
        match self {
            Direct::All => true,
            Direct::Network { address: network, bits } => address.is_some_and(|address| {
                width(address) == width(*network) && prefix(address, *bits) == prefix(*network, *bits)
            }),
            Direct::Address { address: known, port } => address == Some(*known) && same_port(port),
            Direct::Name { name: known, itself, port } => {
                let below = name.strip_suffix(known.as_str()).is_some_and(|rest| rest.ends_with('.'));
                (below || *itself && name == known) && same_port(port)
            }
        }
    }
}

fn width(address: IpAddr) -> u32 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// The first bits of an address.
fn prefix(address: IpAddr, bits: u32) -> u128 {
    let number = match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    };
    number.checked_shr(width(address) - bits).unwrap_or(0)
}

/// An address of a proxy. Without a scheme it is one of HTTP.
fn proxy_url(text: &str) -> Result<Url, RegistryError> {
    let bad = |reason| RegistryError::BadProxy { proxy: without_password(text), reason };
    let known = ["http", "https", "socks5", "socks5h"];
    let url = Url::parse(text).ok().filter(|url| url.has_host());
    let mut url = match url {
        Some(url) => url,
        None if text.contains("://") => return Err(bad("no address")),
        None => Url::parse(&format!("http://{text}")).map_err(|_| bad("no address"))?,
    };
    if !known.contains(&url.scheme()) {
        return Err(bad("http, https and socks5 proxies are known"));
    }
    if url.scheme() == "socks5" {
        // As in Go: the proxy looks names up.
        url = Url::parse(&url.as_str().replacen("socks5", "socks5h", 1)).map_err(|_| bad("no address"))?;
    }
    if url.scheme() == "socks5h" && url.port().is_none() && url.set_port(Some(1080)).is_err() {
        return Err(bad("no address"));
    }
    Ok(url)
}

/// A proxy's address for messages.
fn without_password(text: &str) -> String {
    let (scheme, rest) = text.split_once("://").map_or(("", text), |(scheme, rest)| (scheme, rest));
    // The last one: a password that nobody has encoded may hold others, and slashes.
    let place = rest.rsplit('@').next().unwrap_or_default();
    let place = place.split(['/', '?', '#']).next().unwrap_or_default();
    // Without a host, `user:password` looks like `host:port`.
    let place = match place.rsplit_once(':') {
        Some((host, port))
            if !host.is_empty() && !place.ends_with(']') && !port.bytes().all(|byte| byte.is_ascii_digit()) =>
        {
            host.split(':').next().unwrap_or_default()
        }
        _ => place,
    };
    if scheme.is_empty() { place.to_owned() } else { format!("{scheme}://{place}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes(http: &str, https: &str, exceptions: &str) -> Result<Routes, RegistryError> {
        let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        Routes::read(&Proxies { http: some(http), https: some(https), exceptions: some(exceptions) })
    }

    #[test]
    fn schemes_have_their_proxies() {
        let found = routes("plain:1", "http://u:p@safe:2", "").unwrap();
        let of = |url: &str| found.of(&Url::parse(url).unwrap()).map(Url::as_str);
        assert_eq!(of("http://host/x"), Some("http://plain:1/"));
        assert_eq!(of("https://host/x"), Some("http://u:p@safe:2/"));
        assert_eq!(found.shown(&Url::parse("https://host/x").unwrap()).as_deref(), Some("http://safe:2"));
        for here in ["http://localhost:5000", "https://127.0.0.1", "http://127.9.9.9:1", "https://[::1]:5000"] {
            assert_eq!(of(here), None, "{here}");
        }
        assert_eq!(of("http://localhost.example"), Some("http://plain:1/"));
        assert_eq!(routes("", "p", "").unwrap().of(&Url::parse("http://host").unwrap()), None);
    }

    #[test]
    fn exceptions_are_those_of_go() {
        let check = |exceptions: &str, url: &str, direct: bool| {
            let found = routes("http://p:1", "http://p:1", exceptions).unwrap();
            assert_eq!(found.of(&Url::parse(url).unwrap()).is_none(), direct, "{exceptions}: {url}");
        };
        check("", "https://example.com", false);
        check("*", "https://example.com", true);
        check("a.test, example.com", "https://example.com:5000", true);
        check("a.test example.com", "https://example.com", true);
        check("example.com", "https://registry.Example.com", true);
        check("example.com", "https://badexample.com", false);
        check("example.com", "https://example.com.evil.test", false);
        check(".example.com", "https://registry.example.com", true);
        check(".example.com", "https://example.com", false);
        check("*.example.com", "https://registry.example.com", true);
        check("*.example.com", "https://example.com", false);
        check("*example.com", "https://registry.example.com", false);
        check("example.com:5000", "https://example.com:5000", true);
        check("example.com:5000", "https://example.com:5001", false);
        check("example.com:443", "https://example.com", true);
        check("example.com:80", "http://www.example.com", true);
        check(":443", "https://example.com", false);
        check("10.1.2.3", "http://10.1.2.3:5000", true);
        check("10.1.2.3", "http://10.1.2.4", false);
        check("10.1.2.3:5000", "http://10.1.2.3:5000", true);
        check("10.1.2.3:5000", "http://10.1.2.3", false);
        check("10.0.0.0/8", "http://10.200.1.1", true);
        check("10.0.0.0/8", "http://11.0.0.1", false);
        check("0.0.0.0/0", "http://11.0.0.1", true);
        check("0.0.0.0/0", "http://[2001:db8::1]", false);
        check("10.0.0.0/33", "http://10.0.0.1", false);
        check("2001:db8::1", "https://[2001:db8::1]", true);
        check("[2001:db8::1]:5000", "https://[2001:db8::1]:5000", true);
        check("[2001:db8::1]:5000", "https://[2001:db8::1]", false);
        check("fd00::/8", "http://[fd12::1]", true);
        check("fd00::/8", "http://[fe80::1]", false);
        check(",,  ,", "https://example.com", false);
    }

    #[test]
    fn addresses_of_proxies() {
        let check = |text: &str, expected: Option<&str>| {
            let found = proxy_url(text).ok();
            assert_eq!(found.as_ref().map(Url::as_str), expected, "{text}");
        };
        check("http://proxy:3128", Some("http://proxy:3128/"));
        check("https://u:p@proxy", Some("https://u:p@proxy/"));
        check("proxy:3128", Some("http://proxy:3128/"));
        check("u:p@proxy:3128", Some("http://u:p@proxy:3128/"));
        check("proxy", Some("http://proxy/"));
        check("10.1.1.1:80", Some("http://10.1.1.1/"));
        check("socks5://proxy", Some("socks5h://proxy:1080"));
        check("socks5h://proxy:9", Some("socks5h://proxy:9"));
        check("ftp://proxy", None);
        check("http://", None);
        check("http://a b", None);
    }

    #[test]
    fn passwords_are_not_shown() {
        let check = |text: &str, expected: &str| assert_eq!(without_password(text), expected);
        check("http://u:p@proxy:3128/", "http://proxy:3128");
        check("u:p@ss/w@proxy:3128", "proxy:3128");
        check("proxy", "proxy");
        let error = routes("ftp://user:hunter2@proxy", "", "").unwrap_err().to_string();
        assert!(error.contains("ftp://proxy") && !error.contains("hunter2"), "{error}");
        let proxies = Proxies { https: Some("http://user:hunter2@proxy".to_owned()), ..Proxies::default() };
        assert!(!format!("{proxies:?}").contains("hunter2"));
    }
}
