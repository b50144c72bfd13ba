//! `--cache-from` and `--cache-to`, as buildx writes them.

use crate::cli;
use crate::request::{Compression, Environment, RequestError, attributes, compression, fields};
use nacre_frontend::reference::Reference;
#[cfg(feature = "s3")]
use nacre_solver::cache::bucket::{Bucket, BucketSettings};
use nacre_solver::cache::export::CacheMode;
use nacre_solver::cache::import::CacheSource;
use nacre_solver::registry::RemoteImage;
use std::path::PathBuf;

const FROM: &str = "--cache-from";
const TO: &str = "--cache-to";

/// A cache to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CacheTarget {
    /// Where.
    pub(crate) place: CachePlace,
    /// Which layers.
    pub(crate) mode: CacheMode,
    /// How they are compressed.
    pub(crate) compression: Compression,
    /// Compress layers again when they are compressed otherwise.
    pub(crate) force_compression: bool,
    /// The build fails if the cache cannot be written.
    pub(crate) must_succeed: bool,
}

/// Where a cache is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CachePlace {
    /// Into the image's own configuration.
    Inline,
    /// To a registry.
    Registry(RemoteImage),
    /// Into a layout directory.
    Local {
        /// The directory.
        dest: PathBuf,
        /// The cache's name in it.
        tag: String,
    },
    /// Into a bucket.
    #[cfg(feature = "s3")]
    Bucket(Bucket),
}

/// Attributes of one flag.
struct Attributes<'a> {
    flag: &'static str,
    text: &'a str,
    all: Vec<(String, String)>,
    insecure: &'a mut Vec<String>,
}

impl Attributes<'_> {
    fn find(&self, name: &str) -> Option<&str> {
        self.all.iter().rev().find(|(other, _)| other == name).map(|(_, value)| value.as_str())
    }

    /// The flag as typed, without secrets.
    fn shown(&self) -> String {
        const SECRET: [&str; 2] = ["secret_access_key", "session_token"];
        if !self.all.iter().any(|(name, _)| SECRET.contains(&name.as_str())) {
            return self.text.to_owned();
        }
        let field = |(name, value): &(String, String)| match SECRET.contains(&name.as_str()) {
            true => format!("{name}=…"),
            false => format!("{name}={value}"),
        };
        self.all.iter().map(field).collect::<Vec<_>>().join(",")
    }

    fn bad(&self, expected: &'static str) -> RequestError {
        RequestError::BadValue { flag: self.flag, value: self.shown(), expected }
    }

    fn missing(&self, attribute: &'static str) -> RequestError {
        RequestError::MissingAttribute { flag: self.flag, value: self.shown(), attribute }
    }

    fn boolean(&self, name: &str) -> Result<Option<bool>, RequestError> {
        let read = |value: &str| cli::boolean(value).map_err(|_| self.bad("expected true or false"));
        self.find(name).map(read).transpose()
    }

    /// `ref`, whose registry is added to the insecure ones if it is one.
    fn remote(&mut self) -> Result<RemoteImage, RequestError> {
        let name = self.find("ref").filter(|name| !name.is_empty()).ok_or_else(|| self.missing("ref=NAME"))?.to_owned();
        let bad = |reason: String| RequestError::BadName { name: name.clone(), reason };
        let reference = Reference::parse(&name).map_err(|error| bad(error.to_string()))?;
        let remote = RemoteImage::parse(&reference.to_string());
        let remote = remote.ok_or_else(|| bad("it is no name in a registry".to_owned()))?;
        if self.boolean("registry.insecure")?.unwrap_or(false) {
            self.insecure.push(remote.host.clone());
        }
        Ok(remote)
    }

    fn check(&self, known: &'static str) -> Result<(), RequestError> {
        let is_known = |name: &str| known.split(", ").any(|other| other == name);
        match self.all.iter().find(|(name, _)| !is_known(name)) {
            None => Ok(()),
            Some((attribute, _)) => Err(RequestError::UnknownAttribute {
                flag: self.flag,
                value: self.shown(),
                attribute: attribute.clone(),
                known,
            }),
        }
    }

    fn unsupported(&self) -> RequestError {
        match self.find("type").unwrap_or_default() {
            "" => self.missing("type=…"),
            "s3" => {
                self.bad("this nacre was built without buckets: build it with `cargo build --release --features s3`")
            }
            "gha" | "azblob" => self.bad(
                "caches are kept in registries (type=registry), directories (type=local), images (type=inline) and \
                 buckets (type=s3)",
            ),
            _ => self.bad("there are the types registry, local, inline and s3"),
        }
    }
}

/// What both flags know of a bucket.
#[cfg(feature = "s3")]
macro_rules! bucket_attributes {
    ($more:literal) => {
        concat!(
            "type, bucket, name, region, prefix, endpoint_url, use_path_style, access_key_id, secret_access_key, ",
            "session_token",
            $more
        )
    };
}

#[cfg(feature = "s3")]
impl Attributes<'_> {
    fn bucket(&self, env: &Environment) -> Result<Bucket, RequestError> {
        let text = |name: &str| self.find(name).filter(|value| !value.is_empty()).map(str::to_owned);
        let secret = (text("access_key_id"), text("secret_access_key"));
        if secret.0.is_some() != secret.1.is_some() {
            return Err(self.bad("expected both access_key_id and secret_access_key, or neither"));
        }
        let name = text("name").unwrap_or_else(|| "nacre".to_owned());
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/');
        if !name.chars().all(is_plain) {
            return Err(RequestError::BadName {
                name,
                reason: "a cache's name in a bucket has letters, digits, `.`, `_`, `-` and `/`".to_owned(),
            });
        }
        Ok(Bucket::new(BucketSettings {
            bucket: text("bucket").ok_or_else(|| self.missing("bucket=NAME"))?,
            name,
            prefix: text("prefix").unwrap_or_default(),
            region: text("region"),
            endpoint: text("endpoint_url"),
            path_style: self.boolean("use_path_style")?.unwrap_or(false),
            access_key_id: secret.0,
            secret_access_key: secret.1,
            session_token: text("session_token"),
            environment: env.with_prefix("AWS_"),
        }))
    }
}

/// Reads a flag; a word without attributes is `type=registry,ref=WORD`.
fn parse<'a>(flag: &'static str, text: &'a str, insecure: &'a mut Vec<String>) -> Attributes<'a> {
    let all = match fields(text).as_slice() {
        [word] if !word.contains('=') => {
            vec![("type".to_owned(), "registry".to_owned()), ("ref".to_owned(), word.trim().to_owned())]
        }
        _ => attributes(text, "true"),
    };
    Attributes { flag, text, all, insecure }
}

/// Reads `--cache-from`. Hosts of insecure registries are added to `insecure`.
pub(crate) fn cache_source(
    text: &str,
    env: &Environment,
    insecure: &mut Vec<String>,
) -> Result<CacheSource, RequestError> {
    let mut attributes = parse(FROM, text, insecure);
    match attributes.find("type").unwrap_or_default() {
        "registry" => {
            attributes.check("type, ref, registry.insecure")?;
            attributes.remote().map(CacheSource::Registry)
        }
        "local" => {
            attributes.check("type, src, tag, digest")?;
            let path = attributes.find("src").filter(|path| !path.is_empty());
            let path = path.ok_or_else(|| attributes.missing("src=DIRECTORY"))?;
            let text = |name: &str| attributes.find(name).filter(|value| !value.is_empty()).map(str::to_owned);
            Ok(CacheSource::Layout { path: env.current_dir.join(path), tag: text("tag"), digest: text("digest") })
        }
        #[cfg(feature = "s3")]
        "s3" => {
            attributes.check(bucket_attributes!(""))?;
            attributes.bucket(env).map(CacheSource::Bucket)
        }
        "inline" => Err(attributes.bad("records in an image are read with type=registry,ref=NAME")),
        _ => Err(attributes.unsupported()),
    }
}

/// Reads `--cache-to`. Hosts of insecure registries are added to `insecure`.
pub(crate) fn cache_target(
    text: &str,
    env: &Environment,
    insecure: &mut Vec<String>,
) -> Result<CacheTarget, RequestError> {
    let mut attributes = parse(TO, text, insecure);
    let place = match attributes.find("type").unwrap_or_default() {
        "registry" => {
            attributes.check(
                "type, ref, mode, compression, compression-level, force-compression, ignore-error, image-manifest, \
                 oci-mediatypes, registry.insecure",
            )?;
            let remote = attributes.remote()?;
            if remote.digest.is_some() {
                return Err(attributes.bad("a cache is written to a tag, not to a digest"));
            }
            CachePlace::Registry(remote)
        }
        "local" => {
            attributes.check(
                "type, dest, tag, mode, compression, compression-level, force-compression, ignore-error, \
                 image-manifest, oci-mediatypes",
            )?;
            let dest = attributes.find("dest").filter(|path| !path.is_empty());
            let dest = env.current_dir.join(dest.ok_or_else(|| attributes.missing("dest=DIRECTORY"))?);
            let tag = attributes.find("tag").filter(|tag| !tag.is_empty()).unwrap_or("latest").to_owned();
            Reference::parse(&format!("cache:{tag}")).map_err(|_| attributes.bad("its tag is no tag"))?;
            CachePlace::Local { dest, tag }
        }
        "inline" => {
            attributes.check("type, mode, ignore-error")?;
            CachePlace::Inline
        }
        #[cfg(feature = "s3")]
        "s3" => {
            attributes
                .check(bucket_attributes!(", mode, compression, compression-level, force-compression, ignore-error"))?;
            CachePlace::Bucket(attributes.bucket(env)?)
        }
        _ => return Err(attributes.unsupported()),
    };
    if attributes.boolean("image-manifest")? == Some(false) {
        return Err(attributes.bad("a cache is always an image manifest, which every registry takes"));
    }
    if attributes.boolean("oci-mediatypes")? == Some(false) {
        return Err(attributes.bad("a cache always has OCI media types: Docker's know no configuration but an image's"));
    }
    let mode = match (attributes.find("mode"), &place) {
        (None | Some("min"), _) => CacheMode::Min,
        (Some("max"), CachePlace::Inline) => {
            return Err(
                attributes.bad("an image holds no layers of other stages: mode=max needs type=registry or type=local")
            );
        }
        (Some("max"), _) => CacheMode::Max,
        (Some(_), _) => return Err(attributes.bad("mode is min or max")),
    };
    let compression = compression(attributes.find("compression"), attributes.find("compression-level"));
    Ok(CacheTarget {
        mode,
        compression: compression.map_err(|expected| attributes.bad(expected))?,
        force_compression: attributes.boolean("force-compression")?.unwrap_or(false),
        must_succeed: attributes.boolean("ignore-error")? == Some(false),
        place,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(text: &str) -> Result<CacheTarget, String> {
        cache_target(text, &Environment::of_process(), &mut Vec::new()).map_err(|error| error.to_string())
    }

    fn from(text: &str) -> Result<CacheSource, String> {
        cache_source(text, &Environment::of_process(), &mut Vec::new()).map_err(|error| error.to_string())
    }

    #[test]
    fn targets_are_what_buildx_means() {
        let found = to(
            "type=registry,ref=host:5000/a/b:cache,mode=max,compression=zstd,compression-level=3,image-manifest=true",
        )
        .expect("a target");
        assert_eq!(found.mode, CacheMode::Max);
        assert_eq!(found.compression, Compression::Zstd(Some(3)));
        assert!(!found.must_succeed);
        assert!(matches!(&found.place, CachePlace::Registry(remote) if remote.to_string() == "host:5000/a/b:cache"));
        assert_eq!(to("user/app").map(|found| found.mode), Ok(CacheMode::Min));
        let local = to("type=local,dest=/x,tag=y,ignore-error=false").expect("a target");
        assert_eq!(local.place, CachePlace::Local { dest: "/x".into(), tag: "y".to_owned() });
        assert!(local.must_succeed);
        assert_eq!(to("type=inline").map(|found| found.place), Ok(CachePlace::Inline));
    }

    #[test]
    fn targets_that_cannot_be_are_refused() {
        let refused = |text: &str, words: &str| {
            let error = to(text).expect_err(text);
            assert!(error.contains(words), "{text}: {error}");
        };
        refused("type=gha", "kept in registries");
        refused("type=azblob,name=x", "kept in registries");
        if cfg!(feature = "s3") {
            refused("type=s3,region=x", "bucket=NAME");
            refused("type=s3,bucket=x,access_key_id=y", "secret_access_key");
            refused("type=s3,bucket=x,name=a b", "letters");
            refused("type=s3,bucket=x,blobs_prefix=y", "blobs_prefix");
            assert!(
                to("type=s3,bucket=x,secret_access_key=hidden,access_key_id=y,mode=most")
                    .is_err_and(|error| !error.contains("hidden"))
            );
        } else {
            refused("type=s3,bucket=x", "--features s3");
        }
        refused("type=tape", "types registry, local, inline and s3");
        refused("mode=max", "type=");
        refused("type=registry", "ref=");
        refused("type=registry,ref=UPPER CASE", "UPPER CASE");
        refused("type=registry,ref=a/b,mode=most", "mode is min or max");
        refused("type=registry,ref=a/b,image-manifest=false", "always an image manifest");
        refused("type=registry,ref=a/b,oci-mediatypes=false", "OCI media types");
        refused("type=registry,ref=a/b,compression=estargz", "gzip, zstd and uncompressed");
        refused("type=registry,ref=a/b,colour=red", "colour");
        refused("type=local", "dest=");
        refused("type=inline,mode=max", "mode=max");
    }

    #[test]
    fn sources_are_registries_and_directories() {
        assert!(matches!(from("user/app:cache"), Ok(CacheSource::Registry(remote)) if remote.host == "docker.io"));
        let layout = CacheSource::Layout { path: "/x".into(), tag: Some("y".to_owned()), digest: None };
        assert_eq!(from("type=local,src=/x,tag=y"), Ok(layout));
        assert!(from("type=local").is_err_and(|error| error.contains("src=")));
        assert!(from("type=gha").is_err_and(|error| error.contains("kept in registries")));
        assert!(from("type=inline").is_err_and(|error| error.contains("type=registry")));
        let mut insecure = Vec::new();
        let env = Environment::of_process();
        cache_source("type=registry,ref=h:1/a,registry.insecure=true", &env, &mut insecure).expect("a source");
        assert_eq!(insecure, ["h:1"]);
    }
}
