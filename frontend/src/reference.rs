//! Image references: parse, normalise, print.
//!
//! `[host[:port]/]path[:tag][@digest]`. Without host the path belongs to Docker Hub, and one of a single component to
//! `library/` there. The first component is a host when it is `localhost`, holds a dot, a colon or an upper-case
//! letter. Rules: distribution-spec and Docker's reference package.

use serde::{Deserialize, Serialize};

/// Docker Hub's name in references.
pub const DOCKER_HUB: &str = "docker.io";

/// An older name of it.
const DOCKER_HUB_INDEX: &str = "index.docker.io";

/// Longest path of a repository.
const MAX_PATH: usize = 255;

/// A normalised image reference.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Reference {
    /// `docker.io`, `localhost:5000`, `[::1]:5000`.
    pub host: String,
    /// `library/debian`.
    pub repository: String,
    /// Tag; `latest` when neither tag nor digest is written.
    pub tag: Option<String>,
    /// Digest, `sha256:…`.
    pub digest: Option<String>,
}

/// A reference that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// Anything that has no better description.
    #[error("invalid reference format: `{0}`")]
    Format(String),
    /// Upper-case letters in the path.
    #[error("invalid reference format: repository name `{0}` must be lowercase")]
    Uppercase(String),
    /// 64 hexadecimal digits: could be meant as an image ID.
    #[error("invalid repository name `{0}`: 64 hexadecimal digits are not possible")]
    Identifier(String),
    /// A path of more than 255 characters.
    #[error("repository name must not be longer than 255 characters: `{0}`")]
    TooLong(String),
    /// A digest of an unknown algorithm or of the wrong length.
    #[error("invalid digest `{0}`")]
    Digest(String),
}

impl ReferenceError {
    /// A way out, one sentence.
    pub fn help(&self) -> Option<String> {
        let help = match self {
            ReferenceError::Format(_) | ReferenceError::TooLong(_) => {
                "write `[host/]path[:tag][@sha256:…]`, like `debian:12`".to_owned()
            }
            ReferenceError::Uppercase(name) => format!("write `{}`", name.to_lowercase()),
            ReferenceError::Identifier(_) => "give the image a tag and write that".to_owned(),
            ReferenceError::Digest(_) => "write `sha256:` and 64 hexadecimal digits".to_owned(),
        };
        Some(help)
    }
}

impl Reference {
    /// Reads and normalises a reference.
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        let format = || ReferenceError::Format(text.to_owned());
        if text.len() == 64 && is_lower_hex(text) {
            return Err(ReferenceError::Identifier(text.to_owned()));
        }
        let (host, remainder) = split_host(text);
        let (name, digest) = match remainder.split_once('@') {
            Some((name, digest)) => (name, Some(digest)),
            None => (remainder.as_str(), None),
        };
        // Host and digest are split off: a colon that is left can only start a tag.
        let (repository, tag) = match name.split_once(':') {
            Some((repository, tag)) => (repository, Some(tag)),
            None => (name, None),
        };
        if repository.to_lowercase() != repository {
            return Err(ReferenceError::Uppercase(repository.to_owned()));
        }
        if !is_host(&host) || !repository.split('/').all(is_component) || !tag.is_none_or(is_tag) {
            return Err(format());
        }
        if let Some(digest) = digest {
            let (algorithm, hex) = digest.split_once(':').ok_or_else(format)?;
            let length = match algorithm {
                "sha256" => 64,
                "sha384" => 96,
                "sha512" => 128,
                _ => 0,
            };
            if length == 0 || hex.len() != length || !is_lower_hex(hex) {
                return Err(ReferenceError::Digest(digest.to_owned()));
            }
        }
        if repository.len() > MAX_PATH {
            return Err(ReferenceError::TooLong(repository.to_owned()));
        }
        let tag = tag.or(if digest.is_none() { Some("latest") } else { None });
        Ok(Self {
            host,
            repository: repository.to_owned(),
            tag: tag.map(str::to_owned),
            digest: digest.map(str::to_owned),
        })
    }

    /// Returns the host of the registry as in the reference: `docker.io` stays so, its API is elsewhere.
    pub fn registry_host(&self) -> &str {
        &self.host
    }

    /// Returns the form that people write: without `docker.io/library/`.
    pub fn familiar(&self) -> String {
        let text = self.to_string();
        let Some(path) = text.strip_prefix(DOCKER_HUB).and_then(|rest| rest.strip_prefix('/')) else { return text };
        match path.strip_prefix("library/") {
            // `library/a/b` is no official image, and `a/b` would be another one.
            Some(name) if !self.repository["library/".len()..].contains('/') => name.to_owned(),
            _ => path.to_owned(),
        }
    }
}

/// The canonical form.
impl std::fmt::Display for Reference {
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

impl std::str::FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        Self::parse(text)
    }
}

/// Splits a host off; what is left is a path with tag and digest.
fn split_host(text: &str) -> (String, String) {
    let (host, path) = match text.split_once('/') {
        Some((first, rest)) if first == DOCKER_HUB_INDEX => (DOCKER_HUB, rest),
        Some((first, rest)) if first == "localhost" || first.contains(['.', ':']) || first.to_lowercase() != first => {
            (first, rest)
        }
        _ => (DOCKER_HUB, text),
    };
    let official = host == DOCKER_HUB && !path.contains('/');
    (host.to_owned(), format!("{}{path}", if official { "library/" } else { "" }))
}

fn is_host(host: &str) -> bool {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let Some((address, port)) = rest.split_once(']') else { return false };
            if address.is_empty() || !address.chars().all(|ch| ch.is_ascii_hexdigit() || ch == ':') {
                return false;
            }
            (None, port)
        }
        None => {
            let end = host.find(':').unwrap_or(host.len());
            (Some(&host[..end]), &host[end..])
        }
    };
    let label = |label: &str| {
        !label.is_empty()
            && label.chars().all(|ch| ch.is_ascii_alphanumeric() || ch == '-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let digits = |port: &str| !port.is_empty() && port.chars().all(|ch| ch.is_ascii_digit());
    name.is_none_or(|name| name.split('.').all(label))
        && (port.is_empty() || port.strip_prefix(':').is_some_and(digits))
}

/// Lower-case letters and digits, with one `.`, one or two `_`, or any number of `-` between them.
fn is_component(component: &str) -> bool {
    let word = |ch: char| ch.is_ascii_lowercase() || ch.is_ascii_digit();
    component.starts_with(word)
        && component.ends_with(word)
        && component.split(word).all(|gap| matches!(gap, "" | "." | "_" | "__") || gap.chars().all(|ch| ch == '-'))
}

fn is_tag(tag: &str) -> bool {
    let word = |ch: char| ch.is_ascii_alphanumeric() || ch == '_';
    tag.starts_with(word) && tag.len() <= 128 && tag.chars().all(|ch| word(ch) || matches!(ch, '.' | '-'))
}

fn is_lower_hex(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn vectors() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/vectors/references.json");
        let file: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        for vector in file["vectors"].as_array().unwrap() {
            let text = vector["in"].as_str().unwrap();
            let found = Reference::parse(text).ok().map(|reference| reference.to_string());
            assert_eq!(found.as_deref(), vector["out"].as_str(), "{text}");
        }
    }

    #[test]
    fn forms() {
        let check = |text: &str, canonical: &str, familiar: &str| {
            let reference = Reference::parse(text).unwrap();
            assert_eq!((reference.to_string(), reference.familiar()), (canonical.into(), familiar.into()), "{text}");
            assert_eq!(Reference::parse(canonical), Ok(reference), "{text}");
        };
        check("busybox", "docker.io/library/busybox:latest", "busybox:latest");
        check("index.docker.io/a/b:1", "docker.io/a/b:1", "a/b:1");
        check("library/a/b", "docker.io/library/a/b:latest", "library/a/b:latest");
        check("Host/a", "Host/a:latest", "Host/a:latest");
        check("[::1]:5000/a/b", "[::1]:5000/a/b:latest", "[::1]:5000/a/b:latest");
        check("localhost/a---b:X", "localhost/a---b:X", "localhost/a---b:X");
    }

    #[test]
    fn refused() {
        let hex = "0".repeat(64);
        let long = format!("h.io/{}", "a".repeat(256));
        let cases = [
            "",
            "/",
            "a/",
            "/a",
            "a:b:c",
            "a@",
            "a@b",
            "a@sha256:00",
            "a___b",
            "a..b",
            "a.-b",
            "-a",
            "h:x/a",
            "h./a",
            "[::1/a",
            "[]/a",
            "a:-t",
            "é",
            "a@md5:00000000000000000000000000000000",
            &long,
        ];
        for text in cases {
            assert!(Reference::parse(text).is_err(), "{text}");
        }
        assert!(Reference::parse(&format!("a@sha256:{hex}")).is_ok());
        assert!(Reference::parse(&format!("a@sha256:{}", hex.replace('0', "A"))).is_err());
    }
}
