//! Who we are: challenges of registries and the credentials of `~/.docker/config.json`. Only computes.
//!
//! A registry answers 401 with `WWW-Authenticate: Bearer realm="…",service="…",scope="…"` (a token is fetched from the
//! realm) or `Basic`. Credentials are entries of `auths` in the configuration file; its keys are hosts, addresses
//! (`https://index.docker.io/v1/`) or, in podman's files, hosts with a path. The most specific key wins.

use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;

/// What a registry asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Challenge {
    /// User and password with every request.
    Basic,
    /// A token from `realm`.
    Bearer {
        /// Address of the token server.
        realm: String,
        /// For whom.
        service: Option<String>,
        /// For what.
        scope: Option<String>,
    },
}

/// Credentials for one registry.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Credentials {
    /// User name; may be empty with an identity token.
    pub user: String,
    /// Password or access token.
    pub password: String,
    /// Refresh token for the token server, instead of a password.
    pub identity_token: String,
    /// Sent as it is.
    pub registry_token: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("user", &self.user).finish_non_exhaustive()
    }
}

/// All credentials of a configuration file.
#[derive(Debug, Clone, Default)]
pub struct CredentialFile {
    auths: BTreeMap<String, Credentials>,
    /// Helper programs by host.
    helpers: BTreeMap<String, String>,
    /// Helper program of all other hosts.
    store: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct ConfigJson {
    auths: Option<BTreeMap<String, AuthJson>>,
    cred_helpers: Option<BTreeMap<String, String>>,
    creds_store: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct AuthJson {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

impl CredentialFile {
    /// Reads a `config.json` or `auth.json`. No file means no credentials.
    pub fn read(path: &Path) -> Result<Self, super::RegistryError> {
        let fail = |reason: String| super::RegistryError::Credentials { path: path.to_owned(), reason };
        match std::fs::read(path) {
            // The parser's message would quote the file.
            Ok(bytes) => Self::parse(&bytes).map_err(|error| fail(format!("line {}: not as expected", error.line()))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(fail(error.to_string())),
        }
    }

    fn parse(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        let config: ConfigJson = serde_json::from_slice(bytes)?;
        let mut auths = BTreeMap::new();
        for (key, entry) in config.auths.unwrap_or_default() {
            let mut credentials = Credentials {
                user: entry.username,
                password: entry.password,
                identity_token: entry.identitytoken,
                registry_token: entry.registrytoken,
            };
            if let Some((user, password)) = decode_auth(&entry.auth) {
                credentials.user = user;
                credentials.password = password;
            }
            if credentials != Credentials::default() {
                auths.insert(normal_key(&key), credentials);
            }
        }
        let helpers = config.cred_helpers.unwrap_or_default();
        Ok(Self {
            auths,
            helpers: helpers.into_iter().map(|(host, program)| (normal_key(&host), program)).collect(),
            store: config.creds_store.filter(|program| !program.is_empty()),
        })
    }

    /// The program that keeps the credentials for a host: `docker-credential-` goes before it.
    pub fn helper(&self, host: &str) -> Option<&str> {
        // An empty name switches the common one off for this host.
        let found = self.helpers.get(host).or(self.store.as_ref());
        found.map(String::as_str).filter(|program| !program.is_empty())
    }

    /// Does the file itself hold credentials for a host?
    pub fn knows(&self, host: &str) -> bool {
        self.auths.contains_key(host)
    }

    /// Credentials for a repository, by the longest key that is a prefix of `host/repository`.
    pub fn find(&self, host: &str, repository: &str) -> Option<&Credentials> {
        let mut key = format!("{host}/{repository}");
        loop {
            if let Some(found) = self.auths.get(&key) {
                return Some(found);
            }
            key.truncate(key.rfind('/')?);
        }
    }
}

/// Does a key of `auths` stand for all of this host?
pub(super) fn is_for(key: &str, host: &str) -> bool {
    normal_key(key) == host
}

/// Docker Hub has many names; addresses lose their scheme and, where Docker wrote it, the version.
fn normal_key(key: &str) -> String {
    let address = key.starts_with("http://") || key.starts_with("https://");
    let key = key.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
    let key = if address { key.trim_end_matches("/v1").trim_end_matches("/v2") } else { key };
    let (host, path) = key.split_once('/').map_or((key, None), |(host, path)| (host, Some(path)));
    let host = match host {
        "index.docker.io" | "registry-1.docker.io" | "docker.io" => "docker.io",
        other => other,
    };
    match path {
        // `https://index.docker.io/v1` without its last slash, and such.
        Some("v1" | "v2") | None => host.to_owned(),
        Some(path) => format!("{host}/{path}"),
    }
}

fn decode_auth(text: &str) -> Option<(String, String)> {
    let decoded = String::from_utf8(decode_base64(text)?).ok()?;
    let (user, password) = decoded.split_once(':')?;
    Some((user.to_owned(), password.trim_end_matches('\0').to_owned()))
}

pub(crate) fn encode_base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let value = group.iter().fold(0u32, |value, &byte| value << 8 | u32::from(byte)) << (8 * (3 - group.len()));
        for place in 0..4 {
            let digit = ALPHABET[(value >> (18 - 6 * place) & 63) as usize];
            text.push(if place <= group.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

/// Base64, standard or URL-safe alphabet, padding optional.
pub(crate) fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0u32, 0u32);
    for byte in text.trim().trim_end_matches('=').bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    (count < 6).then_some(bytes)
}

/// The challenge to answer among those of one or more `WWW-Authenticate` values: a token if there is the choice.
pub fn parse_challenge<'a>(values: impl Iterator<Item = &'a str>) -> Option<Challenge> {
    let mut best = None;
    for value in values {
        for (scheme, parameters) in split_challenges(value) {
            let find = |name: &str| {
                parameters.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.clone())
            };
            if scheme.eq_ignore_ascii_case("bearer") {
                if let Some(realm) = find("realm") {
                    return Some(Challenge::Bearer { realm, service: find("service"), scope: find("scope") });
                }
            } else if scheme.eq_ignore_ascii_case("basic") {
                best = Some(Challenge::Basic);
            }
        }
    }
    best
}

/// Splits `Scheme key=value, key="va,lue", Scheme …` (RFC 9110, 11.6.1).
fn split_challenges(value: &str) -> Vec<(String, Vec<(String, String)>)> {
    let mut challenges: Vec<(String, Vec<(String, String)>)> = Vec::new();
    let mut rest = value.trim_start();
    while !rest.is_empty() {
        let end = rest.find([' ', ',', '=']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        let after = after.trim_start();
        if let Some(value) = after.strip_prefix('=').filter(|_| !challenges.is_empty()) {
            let (value, remaining) = parameter_value(value.trim_start());
            if let Some((_, parameters)) = challenges.last_mut() {
                parameters.push((word.to_owned(), value));
            }
            rest = remaining;
        } else {
            if !word.is_empty() {
                challenges.push((word.to_owned(), Vec::new()));
            }
            rest = after.trim_start_matches('=');
        }
        rest = rest.trim_start_matches([',', ' ', '\t']);
    }
    challenges
}

fn parameter_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            other => value.push(other),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_parse() {
        let bearer = |realm: &str, service: Option<&str>, scope: Option<&str>| {
            Some(Challenge::Bearer {
                realm: realm.into(),
                service: service.map(str::to_owned),
                scope: scope.map(str::to_owned),
            })
        };
        let check = |values: &[&str], expected: Option<Challenge>| {
            assert_eq!(parse_challenge(values.iter().copied()), expected, "{values:?}");
        };
        check(
            &[
                "Bearer realm=\"https://auth.docker.io/token\",service=\"registry.docker.io\",scope=\"repository:a/b:pull,push\"",
            ],
            bearer("https://auth.docker.io/token", Some("registry.docker.io"), Some("repository:a/b:pull,push")),
        );
        check(&["Basic realm=\"x\""], Some(Challenge::Basic));
        check(&["basic realm=x, bearer realm=y , service = \"a\\\"b\""], bearer("y", Some("a\"b"), None));
        check(&["Basic", "Bearer realm=\"r\""], bearer("r", None, None));
        check(&["Negotiate"], None);
        check(&["Bearer"], None);
        for odd in ["=", ",,,", "Bearer realm=\"", "Bearer =x", "\"", "Bearer realm=\"a\\"] {
            let _ = parse_challenge([odd].into_iter());
        }
    }

    #[test]
    fn base64_decodes() {
        let check =
            |text: &str, expected: Option<&[u8]>| assert_eq!(decode_base64(text).as_deref(), expected, "{text}");
        check("", Some(b""));
        check("dTpw", Some(b"u:p"));
        check("dXNlcjpwYXNz", Some(b"user:pass"));
        check("dQ==", Some(b"u"));
        check("dQ", Some(b"u"));
        check("dXM=", Some(b"us"));
        check("-_-_", Some(&[0xfb, 0xff, 0xbf]));
        check("d", None);
        check("a b", None);
    }

    #[test]
    fn the_most_specific_key_wins() {
        let file = CredentialFile::parse(
            br#"{"auths":{"https://index.docker.io/v1/":{"auth":"aHViOnB3"},"quay.io":{"auth":"cTpw"},
                "quay.io/team":{"username":"t","password":"p"},"localhost:5000":{"identitytoken":"id"},"empty.io":{}},
                "credsStore":"desktop"}"#,
        )
        .unwrap();
        let check = |host: &str, repository: &str, expected: Option<&str>| {
            assert_eq!(file.find(host, repository).map(|found| found.user.as_str()), expected, "{host}/{repository}");
        };
        check("docker.io", "library/debian", Some("hub"));
        check("quay.io", "other/image", Some("q"));
        check("quay.io", "team/image", Some("t"));
        check("quay.io", "teams/image", Some("q"));
        check("localhost:5000", "x", Some(""));
        check("empty.io", "x", None);
        check("other.io", "x", None);
        assert!(CredentialFile::parse(b"{}").unwrap().auths.is_empty());
        assert!(CredentialFile::parse(b"{\"auths\":null}").unwrap().auths.is_empty());
        assert!(!format!("{file:?}").contains("pw"));
    }
}
