//! Certificates of the caller: authorities to trust, and what to show to registries that ask who we are.

use super::RegistryError;
use reqwest::Identity;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_name;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use rustls::{AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, SignatureScheme};
use rustls::{SupportedProtocolVersion, version};
use rustls_platform_verifier::Verifier;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a connection needs.
#[derive(Default)]
pub(super) struct Certificates {
    pub(super) authorities: Vec<CertificateDer<'static>>,
    pub(super) client: Option<ClientCertificate>,
}

/// A certificate to show, and the file that it is in.
pub(super) struct ClientCertificate {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    pub(super) identity: Identity,
    pub(super) path: PathBuf,
}

/// TLS with authorities of the caller's besides the system's. `old` is as it was before 1.3.
pub(super) fn config(found: &Certificates, old: bool, protocols: &[&str]) -> Result<ClientConfig, rustls::Error> {
    let versions: &[&SupportedProtocolVersion] =
        if old { &[&version::TLS12] } else { &[&version::TLS13, &version::TLS12] };
    let provider = Arc::new(ring::default_provider());
    let usual = Verifier::new_with_extra_roots(found.authorities.clone(), provider.clone())?;
    let verifier = Arc::new(OrNamed { usual, named: found.authorities.clone() });
    let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(versions)?;
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let mut config = match &found.client {
        Some(client) => builder.with_client_auth_cert(client.chain.clone(), client.key.clone_key())?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    Ok(config)
}

/// Takes, besides what is signed by an authority, a certificate that is one of those that the caller named: what signs
/// itself with `openssl req -x509` calls itself an authority, and must then not be a server's by the book. docker and
/// podman take it.
#[derive(Debug)]
struct OrNamed {
    usual: Verifier,
    named: Vec<CertificateDer<'static>>,
}

impl ServerCertVerifier for OrNamed {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let usual = self.usual.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        match usual {
            // The error's type has no name here. Its dates have been looked at before.
            Err(rustls::Error::InvalidCertificate(CertificateError::Other(reason)))
                if format!("{reason:?}").contains("CaUsedAsEndEntity") && self.named.contains(end_entity) =>
            {
                verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
                Ok(ServerCertVerified::assertion())
            }
            usual => usual,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.usual.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.usual.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.usual.supported_verify_schemes()
    }
}

/// Reads the authorities, and from `DIRECTORY/HOST` of each directory `*.crt` and the pair `NAME.cert` and `NAME.key`; the
/// first pair counts. As docker does, it refuses half a pair; as podman does, it passes over directories that it may not read.
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
                Some("cert") => {
                    let client = pair(&path, &path.with_extension("key"))?;
                    found.client.get_or_insert(client);
                }
                Some("key") if !path.with_extension("cert").exists() => {
                    let name = path.with_extension("cert");
                    let name = name.file_name().unwrap_or_default().display();
                    return Err(bad(&path, &format!("a key without its certificate, {name} beside it")));
                }
                _ => {}
            }
        }
    }
    Ok(found)
}

/// Is this alert about the certificate that a client has or has not shown? Servers differ in what they call it.
pub(super) fn is_about_client(alert: AlertDescription) -> bool {
    matches!(
        alert,
        AlertDescription::CertificateRequired
            | AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied
    )
}

fn pair(certificate: &Path, key: &Path) -> Result<ClientCertificate, RegistryError> {
    let mut pem = read(certificate)?;
    if !key.exists() {
        let name = key.file_name().unwrap_or_default().display();
        return Err(bad(certificate, &format!("a client's certificate without its key, {name} beside it")));
    }
    let key_pem = read(key)?;
    let chain = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>().unwrap_or_default();
    if chain.is_empty() {
        return Err(bad(certificate, "no certificates in PEM"));
    }
    let Ok(private) = PrivateKeyDer::from_pem_slice(&key_pem) else {
        let encrypted = String::from_utf8_lossy(&key_pem).contains("ENCRYPTED");
        return Err(bad(key, if encrypted { "the key has a passphrase" } else { "no private key in PEM" }));
    };
    match CertifiedKey::from_der(chain.clone(), private.clone_key(), &ring::default_provider()) {
        Ok(_) => {}
        Err(rustls::Error::InconsistentKeys(_)) => {
            let name = certificate.file_name().unwrap_or_default().display();
            return Err(bad(key, &format!("it is not the key of {name} beside it")));
        }
        Err(error) => return Err(bad(certificate, &error.to_string())),
    }
    pem.push(b'\n');
    pem.extend(key_pem);
    let identity = Identity::from_pem(&pem).map_err(|_| bad(certificate, "no certificate with a key"))?;
    Ok(ClientCertificate { chain, key: private, identity, path: certificate.to_owned() })
}

fn bundle(path: &Path) -> Result<Vec<CertificateDer<'static>>, RegistryError> {
    let certificates = CertificateDer::pem_slice_iter(&read(path)?).collect::<Result<Vec<_>, _>>();
    let certificates = certificates.map_err(|_| bad(path, "no certificates in PEM"))?;
    if certificates.is_empty() { Err(bad(path, "no certificates in PEM")) } else { Ok(certificates) }
}

fn read(path: &Path) -> Result<Vec<u8>, RegistryError> {
    std::fs::read(path).map_err(|error| bad(path, &error.to_string()))
}

fn bad(path: &Path, reason: &str) -> RegistryError {
    RegistryError::Certificate { path: path.to_owned(), reason: reason.to_owned() }
}
