//! Mirrors: other hosts that are asked first for what a host has. Only for reading.
//!
//! A mirror is asked once; one that does not answer is not asked again. Whatever it cannot give comes from the host itself.
//! Its manifests are believed for tags, as those of the host would be, and checked for digests; blobs are always checked.
//! It gets the credentials that are known for the mirror, never those of the host.

use super::client::{Body, Client, RemoteImage};
use super::{RegistryError, client::locked};
use crate::image::Descriptor;

/// A host and where else its images are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// Host as in references: `docker.io`.
    pub of: String,
    /// Host with port of the mirror.
    pub host: String,
    /// Path before the repositories' names there, without slashes at its ends; may be empty.
    pub prefix: String,
}

impl Mirror {
    /// Reads `HOST=MIRROR[/PREFIX]`; a mirror without host is one of Docker Hub.
    pub fn parse(text: &str) -> Option<Self> {
        let (of, place) = text.split_once('=').unwrap_or(("docker.io", text));
        let place = place.trim().trim_start_matches("https://").trim_end_matches('/');
        let (host, prefix) = place.split_once('/').unwrap_or((place, ""));
        let name = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'@');
        let valid = name(of.trim()) && name(host) && (prefix.is_empty() || name(prefix));
        valid.then(|| Self { of: of.trim().to_owned(), host: host.to_owned(), prefix: prefix.to_owned() })
    }

    /// What an image is called there.
    fn place(&self, image: &RemoteImage) -> RemoteImage {
        let repository = match self.prefix.as_str() {
            "" => image.repository.clone(),
            prefix => format!("{prefix}/{}", image.repository),
        };
        RemoteImage { host: self.host.clone(), repository, ..image.clone() }
    }
}

impl Client {
    /// Fetches a manifest or index by the image's tag or digest and checks it.
    pub fn manifest(&self, image: &RemoteImage) -> Result<(Vec<u8>, Descriptor), RegistryError> {
        self.anywhere(image, |place, patient| self.manifest_at(place, patient))
    }

    /// Asks which manifest a tag means, without fetching it. `None` when the registry does not say.
    pub fn resolve(&self, image: &RemoteImage) -> Result<Option<Descriptor>, RegistryError> {
        self.anywhere(image, |place, patient| self.resolve_at(place, patient))
    }

    /// Begins to fetch a blob. The bytes are those of the descriptor in number; their digest is for the reader to check.
    pub fn blob(&self, image: &RemoteImage, blob: &Descriptor) -> Result<Body, RegistryError> {
        self.anywhere(image, |place, patient| self.blob_at(place, blob, patient))
    }

    fn anywhere<T>(
        &self,
        image: &RemoteImage,
        ask: impl Fn(&RemoteImage, bool) -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        for mirror in self.options().mirrors.iter().filter(|mirror| mirror.of == image.host) {
            if locked(self.dead_mirrors()).contains(&mirror.host) {
                continue;
            }
            match ask(&mirror.place(image), false) {
                Ok(found) => return Ok(found),
                Err(error) if is_unreachable(&error) => {
                    locked(self.dead_mirrors()).insert(mirror.host.clone());
                }
                Err(_) => {}
            }
        }
        ask(image, true)
    }
}

/// Would it be the same with the next request?
fn is_unreachable(error: &RegistryError) -> bool {
    matches!(
        error,
        RegistryError::Transport { .. }
            | RegistryError::Proxy { .. }
            | RegistryError::Timeout { .. }
            | RegistryError::Slow { .. }
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_are_hosts_with_a_path() {
        let check = |text: &str, expected: Option<(&str, &str, &str)>| {
            let found = Mirror::parse(text);
            let found = found.as_ref().map(|found| (found.of.as_str(), found.host.as_str(), found.prefix.as_str()));
            assert_eq!(found, expected, "{text}");
        };
        check("docker.io=mirror.example:5000", Some(("docker.io", "mirror.example:5000", "")));
        check("quay.io=https://mirror/quay/io/", Some(("quay.io", "mirror", "quay/io")));
        check("mirror.gcr.io", Some(("docker.io", "mirror.gcr.io", "")));
        check("=x", None);
        check("docker.io=", None);
        check("docker.io=user@host", None);
        check("a b", None);
    }
}
