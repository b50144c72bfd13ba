//! From a configuration and layers to the documents of an image: config, manifest, index. Only computes.
//!
//! Documents are written compactly with members in the order of the specification's Go types, maps sorted: the same
//! input gives the same bytes.

use nacre_frontend::image_config::{History, ImageConfig};
use nacre_frontend::llb::Platform;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Media types (image-spec media-types.md; Docker image manifest version 2, schema 2).
pub mod media_type {
    /// OCI image index.
    pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
    /// OCI image manifest.
    pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    /// OCI image configuration.
    pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    /// OCI layer, not compressed; `+gzip` and `+zstd` are appended.
    pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
    /// OCI layer that must not be distributed.
    pub const OCI_LAYER_NONDISTRIBUTABLE: &str = "application/vnd.oci.image.layer.nondistributable.v1.tar";
    /// Docker manifest list.
    pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    /// Docker manifest.
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
    /// Docker image configuration.
    pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
    /// Docker layer; `.gzip` is appended.
    pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
    /// Docker layer that must not be distributed.
    pub const DOCKER_LAYER_FOREIGN: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar";

    /// Is it an index or a manifest list?
    pub fn is_index(media_type: &str) -> bool {
        media_type == OCI_INDEX || media_type == DOCKER_LIST
    }

    /// Is it an image manifest?
    pub fn is_manifest(media_type: &str) -> bool {
        media_type == OCI_MANIFEST || media_type == DOCKER_MANIFEST
    }

    /// Is it an image configuration?
    pub fn is_config(media_type: &str) -> bool {
        media_type == OCI_CONFIG || media_type == DOCKER_CONFIG
    }

    /// Is this a layer that may not be distributed?
    pub fn is_foreign(text: &str) -> bool {
        text.starts_with(OCI_LAYER_NONDISTRIBUTABLE) || text.starts_with(DOCKER_LAYER_FOREIGN)
    }

    /// Is it a layer that can be unpacked?
    pub fn is_layer(media_type: &str) -> bool {
        [OCI_LAYER, OCI_LAYER_NONDISTRIBUTABLE, DOCKER_LAYER, DOCKER_LAYER_FOREIGN]
            .iter()
            .filter_map(|known| media_type.strip_prefix(known))
            .any(|rest| matches!(rest, "" | "+gzip" | "+zstd" | ".gzip" | ".zstd"))
    }
}

/// A reference to a blob (image-spec descriptor.md).
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    #[serde(default)]
    pub media_type: String,
    /// `sha256:hex`.
    pub digest: String,
    /// Bytes.
    pub size: u64,
    /// Other places to get it from.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_default")]
    pub urls: Vec<String>,
    /// Notes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "null_default")]
    pub annotations: BTreeMap<String, String>,
    /// In an index: what it runs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<DescriptorPlatform>,
    /// In an index: what it is, if not an image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
}

/// `platform` of a descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DescriptorPlatform {
    /// Processor.
    #[serde(default)]
    pub architecture: String,
    /// Operating system.
    #[serde(default)]
    pub os: String,
    /// Its version (Windows).
    #[serde(rename = "os.version", default, skip_serializing_if = "String::is_empty")]
    pub os_version: String,
    /// Its features (Windows).
    #[serde(rename = "os.features", default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_default")]
    pub os_features: Vec<String>,
    /// Processor variant.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub variant: String,
}

impl From<&Platform> for DescriptorPlatform {
    fn from(platform: &Platform) -> Self {
        Self {
            architecture: platform.architecture.clone(),
            os: platform.os.clone(),
            variant: platform.variant.clone(),
            ..Self::default()
        }
    }
}

impl From<&DescriptorPlatform> for Platform {
    fn from(platform: &DescriptorPlatform) -> Self {
        Self { os: platform.os.clone(), architecture: platform.architecture.clone(), variant: platform.variant.clone() }
    }
}

/// An image manifest.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// OCI or Docker.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    /// The configuration.
    pub config: Descriptor,
    /// Layers, lowest first; `null` without layers, as BuildKit writes it.
    pub layers: Option<Vec<Descriptor>>,
    /// Notes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "null_default")]
    pub annotations: BTreeMap<String, String>,
}

/// An image index.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    pub schema_version: u32,
    /// OCI or Docker; absent in `index.json` of a layout.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    /// Images and nested indexes.
    #[serde(default, deserialize_with = "null_default")]
    pub manifests: Vec<Descriptor>,
    /// Notes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "null_default")]
    pub annotations: BTreeMap<String, String>,
}

/// Which family of media types to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Media {
    /// image-spec.
    Oci,
    /// Docker's schema 2.
    Docker,
}

/// Notes for the documents of an image.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Annotations {
    /// In the manifest.
    pub manifest: BTreeMap<String, String>,
    /// On the manifest's descriptor in an index.
    pub manifest_descriptor: BTreeMap<String, String>,
}

/// One platform's image, ready to be stored and exported.
#[derive(Debug, Clone, PartialEq)]
pub struct Assembled {
    /// The configuration's bytes.
    pub config_bytes: Vec<u8>,
    /// Refers to them.
    pub config_descriptor: Descriptor,
    /// The manifest's bytes.
    pub manifest_bytes: Vec<u8>,
    /// Refers to them, with the platform.
    pub manifest_descriptor: Descriptor,
    /// The layers in order.
    pub layers: Vec<Descriptor>,
    /// The layers' diff IDs in order.
    pub diff_ids: Vec<String>,
    /// `created` of the configuration.
    pub created: Option<String>,
}

/// A point in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timestamp {
    /// Seconds since the epoch.
    pub seconds: i64,
    /// Nanoseconds in the second.
    pub nanoseconds: u32,
}

impl From<i64> for Timestamp {
    fn from(seconds: i64) -> Self {
        Self { seconds, nanoseconds: 0 }
    }
}

impl std::fmt::Display for Timestamp {
    /// RFC 3339 in UTC with as many digits of a second as needed, as Go prints it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Years that RFC 3339 cannot hold give its last moment rather than something no reader accepts.
        let nanoseconds = i32::try_from(self.nanoseconds.min(999_999_999)).unwrap_or_default();
        let timestamp = jiff::Timestamp::new(self.seconds, nanoseconds).unwrap_or(if self.seconds < 0 {
            jiff::Timestamp::UNIX_EPOCH
        } else {
            jiff::Timestamp::MAX
        });
        write!(f, "{timestamp}")
    }
}

/// Builds config and manifest of one image. `config` comes with history but without `rootfs`; history entries without
/// date get `created`, those of the base image keep theirs. Layers are descriptors in any family's media types; they
/// are translated. Where history and layers do not agree in number (old base images), entries are added or marked
/// empty until they do.
pub fn assemble(
    mut config: ImageConfig,
    layers: &[(Descriptor, String)],
    created: Option<Timestamp>,
    media: Media,
    annotations: &Annotations,
) -> Assembled {
    let date = created.map(|created| created.to_string());
    let diff_ids: Vec<String> = layers.iter().map(|(_, diff_id)| diff_id.clone()).collect();
    config.rootfs.kind = "layers".to_owned();
    config.rootfs.diff_ids = (!diff_ids.is_empty()).then(|| diff_ids.clone());
    level_history(&mut config.history, layers.len());
    for entry in &mut config.history {
        if entry.created.is_none() {
            entry.created.clone_from(&date);
        }
    }
    if date.is_some() {
        config.created = date;
    }
    let config_bytes = to_json(&config);
    let config_descriptor = describe(
        &config_bytes,
        match media {
            Media::Oci => media_type::OCI_CONFIG,
            Media::Docker => media_type::DOCKER_CONFIG,
        },
    );
    let layers: Vec<Descriptor> = layers
        .iter()
        .map(|(descriptor, _)| Descriptor {
            media_type: translate_layer(&descriptor.media_type, media),
            annotations: match media {
                Media::Oci => descriptor.annotations.clone(),
                Media::Docker => BTreeMap::new(),
            },
            ..descriptor.clone()
        })
        .collect();
    let manifest = Manifest {
        schema_version: 2,
        media_type: match media {
            Media::Oci => media_type::OCI_MANIFEST,
            Media::Docker => media_type::DOCKER_MANIFEST,
        }
        .to_owned(),
        config: config_descriptor.clone(),
        layers: (!layers.is_empty()).then(|| layers.clone()),
        annotations: annotations.manifest.clone(),
    };
    let manifest_bytes = to_json(&manifest);
    let manifest_descriptor = Descriptor {
        platform: Some(DescriptorPlatform {
            architecture: config.architecture.clone(),
            os: config.os.clone(),
            variant: config.variant.clone(),
            ..DescriptorPlatform::default()
        }),
        annotations: annotations.manifest_descriptor.clone(),
        ..describe(&manifest_bytes, &manifest.media_type)
    };
    Assembled {
        config_bytes,
        config_descriptor,
        manifest_bytes,
        manifest_descriptor,
        layers,
        diff_ids,
        created: config.created,
    }
}

/// Builds the index of an image for several platforms.
pub fn assemble_index(
    images: &[Assembled],
    media: Media,
    annotations: &BTreeMap<String, String>,
) -> (Vec<u8>, Descriptor) {
    let media_type = match media {
        Media::Oci => media_type::OCI_INDEX,
        Media::Docker => media_type::DOCKER_LIST,
    };
    let index = Index {
        schema_version: 2,
        media_type: media_type.to_owned(),
        manifests: images.iter().map(|image| image.manifest_descriptor.clone()).collect(),
        annotations: annotations.clone(),
    };
    let bytes = to_json(&index);
    let descriptor = describe(&bytes, media_type);
    (bytes, descriptor)
}

/// Descriptor of bytes.
pub fn describe(bytes: &[u8], media_type: &str) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest: crate::store::blob::sha256(bytes),
        size: bytes.len() as u64,
        ..Descriptor::default()
    }
}

/// The media type that says the same in the other family. Docker has none for zstd; then the OCI one stays, as
/// BuildKit does it.
pub fn translate_layer(from: &str, media: Media) -> String {
    use media_type::{DOCKER_LAYER, DOCKER_LAYER_FOREIGN, OCI_LAYER, OCI_LAYER_NONDISTRIBUTABLE};
    let (pairs, gzip) = match media {
        Media::Oci => ([(DOCKER_LAYER, OCI_LAYER), (DOCKER_LAYER_FOREIGN, OCI_LAYER_NONDISTRIBUTABLE)], "+gzip"),
        Media::Docker => ([(OCI_LAYER, DOCKER_LAYER), (OCI_LAYER_NONDISTRIBUTABLE, DOCKER_LAYER_FOREIGN)], ".gzip"),
    };
    for (old, new) in pairs {
        match from.strip_prefix(old) {
            Some("") => return new.to_owned(),
            Some("+gzip" | ".gzip") => return format!("{new}{gzip}"),
            Some(".zstd") if media == Media::Oci => return format!("{new}+zstd"),
            _ => {}
        }
    }
    from.to_owned()
}

/// Chain IDs of a stack of diff IDs (image-spec config.md, Layer ChainID).
pub fn chain_ids(diff_ids: &[String]) -> Vec<String> {
    let mut chain: Vec<String> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        chain.push(match chain.last() {
            None => diff_id.clone(),
            Some(parent) => crate::store::blob::sha256(format!("{parent} {diff_id}").as_bytes()),
        });
    }
    chain
}

/// Makes the number of history entries that are not empty the number of layers.
fn level_history(history: &mut Vec<History>, layers: usize) {
    let mut filled = 0;
    for entry in history.iter_mut().filter(|entry| !entry.empty_layer) {
        filled += 1;
        entry.empty_layer = filled > layers;
    }
    // Which layers have no entry cannot be known; BuildKit, too, puts the missing ones behind.
    for _ in filled..layers {
        history.push(History { created_by: Some("unknown".to_owned()), ..History::default() });
    }
}

pub(crate) fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("the documents have string keys only")
}

/// Go writes nil slices and maps as `null`.
fn null_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(media_type: &str, at: u8) -> (Descriptor, String) {
        let digest = crate::store::blob::sha256(&[at]);
        let diff_id = crate::store::blob::sha256(&[at, at]);
        (Descriptor { media_type: media_type.to_owned(), digest, size: 1, ..Descriptor::default() }, diff_id)
    }

    fn history(created_by: &str, created: Option<&str>, empty_layer: bool) -> History {
        History {
            created_by: Some(created_by.to_owned()),
            created: created.map(str::to_owned),
            empty_layer,
            ..History::default()
        }
    }

    fn config(history: Vec<History>) -> ImageConfig {
        ImageConfig { architecture: "amd64".into(), os: "linux".into(), history, ..ImageConfig::default() }
    }

    #[test]
    fn times_print_as_go_prints_them() {
        let check = |seconds, nanoseconds, expected: &str| {
            assert_eq!(Timestamp { seconds, nanoseconds }.to_string(), expected);
        };
        check(0, 0, "1970-01-01T00:00:00Z");
        check(1_700_000_000, 0, "2023-11-14T22:13:20Z");
        check(1_700_000_000, 120_000_000, "2023-11-14T22:13:20.12Z");
        check(1_700_000_000, 1, "2023-11-14T22:13:20.000000001Z");
        check(-1, 0, "1969-12-31T23:59:59Z");
        assert!(Timestamp { seconds: i64::MAX, nanoseconds: 0 }.to_string().starts_with("9999-"));
    }

    #[test]
    fn an_image_without_layers_has_null() {
        let image = assemble(config(vec![]), &[], None, Media::Oci, &Annotations::default());
        assert!(String::from_utf8(image.manifest_bytes).unwrap().ends_with("\"layers\":null}"));
        let text = String::from_utf8(image.config_bytes).unwrap();
        assert!(text.contains("\"rootfs\":{\"type\":\"layers\",\"diff_ids\":null}"), "{text}");
    }

    #[test]
    fn bytes_are_pinned() {
        let base = history("base", Some("2024-01-01T00:00:00Z"), false);
        let layers = [layer(media_type::DOCKER_LAYER, 1), layer("application/vnd.oci.image.layer.v1.tar+gzip", 2)];
        let image = assemble(
            config(vec![base.clone(), history("ENV A=1", None, true), history("COPY f /", None, false)]),
            &layers,
            Some(1_500_000_000.into()),
            Media::Oci,
            &Annotations::default(),
        );
        let text = String::from_utf8(image.manifest_bytes.clone()).unwrap();
        let expected = format!(
            "{{\"schemaVersion\":2,\"mediaType\":\"application/vnd.oci.image.manifest.v1+json\",\"config\":{{\"mediaType\":\
             \"application/vnd.oci.image.config.v1+json\",\"digest\":\"{}\",\"size\":{}}},\"layers\":[{{\"mediaType\":\
             \"application/vnd.oci.image.layer.v1.tar\",\"digest\":\"{}\",\"size\":1}},{{\"mediaType\":\
             \"application/vnd.oci.image.layer.v1.tar+gzip\",\"digest\":\"{}\",\"size\":1}}]}}",
            image.config_descriptor.digest,
            image.config_bytes.len(),
            layers[0].0.digest,
            layers[1].0.digest
        );
        assert_eq!(text, expected);
        let config: ImageConfig = serde_json::from_slice(&image.config_bytes).unwrap();
        assert_eq!(config.created.as_deref(), Some("2017-07-14T02:40:00Z"));
        assert_eq!(config.history[0], base);
        assert_eq!(config.history[1].created.as_deref(), Some("2017-07-14T02:40:00Z"));
        assert_eq!(config.rootfs.diff_ids.unwrap(), [layers[0].1.clone(), layers[1].1.clone()]);
    }

    #[test]
    fn history_and_layers_agree_in_number() {
        let check = |given: &[bool], layers: usize, expected: &[bool]| {
            let mut entries: Vec<History> = given.iter().map(|&empty| history("x", None, empty)).collect();
            level_history(&mut entries, layers);
            assert_eq!(entries.iter().map(|entry| entry.empty_layer).collect::<Vec<_>>(), expected);
        };
        check(&[false, true, false], 2, &[false, true, false]);
        check(&[], 2, &[false, false]);
        check(&[false, false], 1, &[false, true]);
        check(&[true], 1, &[true, false]);
    }

    #[test]
    fn media_types_translate() {
        let check = |from: &str, media: Media, expected: &str| assert_eq!(translate_layer(from, media), expected);
        check(
            "application/vnd.oci.image.layer.v1.tar+gzip",
            Media::Docker,
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
        );
        check(
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
            Media::Oci,
            "application/vnd.oci.image.layer.v1.tar+gzip",
        );
        check(
            "application/vnd.oci.image.layer.v1.tar+zstd",
            Media::Docker,
            "application/vnd.oci.image.layer.v1.tar+zstd",
        );
        check("application/vnd.oci.image.layer.v1.tar+zstd", Media::Oci, "application/vnd.oci.image.layer.v1.tar+zstd");
        check(
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            Media::Oci,
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        );
        assert!(media_type::is_layer("application/vnd.oci.image.layer.v1.tar+zstd"));
        assert!(!media_type::is_layer("application/vnd.in-toto+json"));
    }

    #[test]
    fn chain_ids_follow_the_specification() {
        let ids = ["sha256:a".to_owned(), "sha256:b".to_owned()];
        let chain = chain_ids(&ids);
        assert_eq!(chain[0], "sha256:a");
        assert_eq!(chain[1], crate::store::blob::sha256(b"sha256:a sha256:b"));
    }
}
