//! Certificates of the caller: authorities to trust, and what to show to registries that ask who we are.

use super::RegistryError;
use reqwest::{Certificate, Identity};
use std::path::{Path, PathBuf};

/// What a connection needs.
#[derive(Default)]
pub(super) struct Certificates {
    pub(super) authorities: Vec<Certificate>,
    pub(super) identity: Option<Identity>,
}

/// Reads the authorities, and from `DIRECTORY/HOST` of each directory `*.crt` and the pair `NAME.cert` and `NAME.key`.
pub(super) fn load(
    authorities: &[PathBuf],
    directories: &[PathBuf],
    host: Option<&str>,
) -> Result<Certificates, RegistryError> {
    let mut found = Certificates::default();
    for path in authorities {
        found.authorities.extend(bundle(path)?);
    }
    let host = host.filter(|host| !host.contains('/'));
    for directory in directories.iter().filter_map(|directory| Some(directory.join(host?))) {
        let mut paths: Vec<PathBuf> = match std::fs::read_dir(&directory) {
            Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
            Err(_) => continue,
        };
        paths.sort();
        for path in paths {
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("crt") => found.authorities.extend(bundle(&path)?),
                Some("cert") if found.identity.is_none() => {
                    let mut pem = read(&path)?;
                    pem.push(b'\n');
                    pem.extend(read(&path.with_extension("key"))?);
                    let identity = Identity::from_pem(&pem).map_err(|_| bad(&path, "no certificate with a key"))?;
                    found.identity = Some(identity);
                }
                _ => {}
            }
        }
    }
    Ok(found)
}

fn bundle(path: &Path) -> Result<Vec<Certificate>, RegistryError> {
    let certificates = Certificate::from_pem_bundle(&read(path)?).map_err(|_| bad(path, "no certificates in PEM"))?;
    if certificates.is_empty() { Err(bad(path, "no certificates in PEM")) } else { Ok(certificates) }
}

fn read(path: &Path) -> Result<Vec<u8>, RegistryError> {
    std::fs::read(path).map_err(|error| bad(path, &error.to_string()))
}

fn bad(path: &Path, reason: &str) -> RegistryError {
    RegistryError::Certificate { path: path.to_owned(), reason: reason.to_owned() }
}
