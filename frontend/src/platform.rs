//! Platforms as written (`arm64`, `linux/arm/v7`) and which image of several fits one.

use crate::llb::Platform;

/// A platform that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlatformError {
    /// `*` in it.
    #[error("platform `{0}`: wildcards are not supported")]
    Wildcard(String),
    /// A part that is empty or has other characters than letters, digits, `-` and `_`.
    #[error("platform `{text}`: invalid part `{part}`")]
    Part {
        /// Part between slashes.
        part: String,
        /// All of it.
        text: String,
    },
    /// One word that is neither an operating system nor an architecture.
    #[error("platform `{0}`: unknown operating system or architecture")]
    Unknown(String),
    /// More than three parts.
    #[error("platform `{0}`: more than os/architecture/variant")]
    TooManyParts(String),
}

impl PlatformError {
    /// A way out, one sentence.
    pub fn help(&self) -> Option<String> {
        Some("write `os/architecture[/variant]`, like `linux/arm64`".to_owned())
    }
}

const SYSTEMS: [&str; 17] = [
    "aix",
    "android",
    "darwin",
    "dragonfly",
    "freebsd",
    "hurd",
    "illumos",
    "ios",
    "js",
    "linux",
    "nacl",
    "netbsd",
    "openbsd",
    "plan9",
    "solaris",
    "windows",
    "zos",
];

const ARCHITECTURES: [&str; 24] = [
    "386",
    "amd64",
    "amd64p32",
    "arm",
    "armbe",
    "arm64",
    "arm64be",
    "ppc64",
    "ppc64le",
    "loong64",
    "mips",
    "mipsle",
    "mips64",
    "mips64le",
    "mips64p32",
    "mips64p32le",
    "ppc",
    "riscv",
    "riscv64",
    "s390",
    "s390x",
    "sparc",
    "sparc64",
    "wasm",
];

/// Reads a platform and normalises it (`x86_64` is `linux/amd64`). What one word leaves open is taken from `host`.
/// Versions and features of the operating system, `windows(10.0)`, are accepted and dropped.
pub fn parse(text: &str, host: &Platform) -> Result<Platform, PlatformError> {
    if text.contains('*') {
        return Err(PlatformError::Wildcard(text.to_owned()));
    }
    let mut parts: Vec<&str> = text.split('/').collect();
    let bad = |part: &str| PlatformError::Part { part: part.to_owned(), text: text.to_owned() };
    for (index, part) in parts.iter_mut().take(4).enumerate() {
        if index == 0 {
            *part = without_version(part).ok_or_else(|| bad(part))?;
        }
        if part.is_empty() || !part.chars().all(|ch| ch.is_ascii_alphanumeric() || matches!(ch, '-' | '_')) {
            return Err(bad(part));
        }
    }
    match parts[..] {
        [word] => {
            let os = normal_os(word);
            if SYSTEMS.contains(&os.as_str()) {
                return Ok(normal(&os, &host.architecture, &host.variant));
            }
            let platform = normal("linux", word, "");
            if ARCHITECTURES.contains(&platform.architecture.as_str()) {
                Ok(platform)
            } else {
                Err(PlatformError::Unknown(text.to_owned()))
            }
        }
        [os, architecture] => Ok(normal(os, architecture, "")),
        [os, architecture, variant] => Ok(normal(os, architecture, variant)),
        _ => Err(PlatformError::TooManyParts(text.to_owned())),
    }
}

/// The platform that this program was built for; its containers are always Linux.
pub fn host() -> Platform {
    let architecture = match std::env::consts::ARCH {
        "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
        "powerpc64" => "ppc64",
        "loongarch64" => "loong64",
        "x86" => "386",
        other => other,
    };
    normal("linux", architecture, "")
}

/// Gives the parts of a platform their usual spelling (`aarch64` with variant `8` is `arm64` without one).
pub fn normalize(platform: &Platform) -> Platform {
    normal(&platform.os, &platform.architecture, &platform.variant)
}

/// Whether an image for `have` runs on `wanted`.
pub fn matches(wanted: &Platform, have: &Platform) -> bool {
    rank(wanted, have).is_some()
}

/// How well an image for `have` fits `wanted`: 0 is best, `None` does not run there. Newer processors run the
/// variants before theirs, 64-bit ones the 32-bit architecture.
pub fn rank(wanted: &Platform, have: &Platform) -> Option<usize> {
    let have = normalize(have);
    candidates(wanted).iter().position(|candidate| *candidate == have)
}

/// Platforms that run on `wanted`, best first.
fn candidates(wanted: &Platform) -> Vec<Platform> {
    let first = normalize(wanted);
    let number = first.variant.trim_start_matches('v').parse::<u32>().ok().filter(|number| *number < 100);
    let with = |architecture: &str, variant: u32| normal(&first.os, architecture, &format!("v{variant}"));
    let mut list = vec![first.clone()];
    match first.architecture.as_str() {
        "amd64" => {
            list.extend((1..number.unwrap_or(1)).rev().map(|version| with("amd64", version)));
            list.push(normal(&first.os, "386", ""));
        }
        "arm" => list.extend((5..number.unwrap_or(5)).rev().map(|version| with("arm", version))),
        "arm64" => {
            list.extend((8..number.unwrap_or(8)).rev().map(|version| with("arm64", version)));
            list.extend((5..=8).rev().map(|version| with("arm", version)));
        }
        _ => {}
    }
    list
}

/// Takes `(version+feature)` off an operating system.
fn without_version(part: &str) -> Option<&str> {
    let Some((os, rest)) = part.split_once('(') else { return Some(part) };
    let version = rest.strip_suffix(')')?;
    let plain = version.chars().all(|ch| ch.is_ascii_alphanumeric() || matches!(ch, '_' | '.' | '%' | '-' | '+'));
    (plain && !version.ends_with('+') && !version.contains("++")).then_some(os)
}

fn normal_os(os: &str) -> String {
    match os.to_lowercase().as_str() {
        "macos" => "darwin".to_owned(),
        other => other.to_owned(),
    }
}

fn normal(os: &str, architecture: &str, variant: &str) -> Platform {
    let architecture = architecture.to_lowercase();
    let variant = variant.to_lowercase();
    let (architecture, variant) = match (architecture.as_str(), variant.as_str()) {
        ("i386" | "386", _) => ("386", ""),
        ("x86_64" | "x86-64" | "amd64", "v1") => ("amd64", ""),
        ("x86_64" | "x86-64" | "amd64", variant) => ("amd64", variant),
        ("aarch64" | "arm64", "8" | "v8" | "v8.0") => ("arm64", ""),
        ("aarch64" | "arm64", "9" | "9.0" | "v9.0") => ("arm64", "v9"),
        ("aarch64" | "arm64", variant) => ("arm64", variant),
        ("armhf", _) => ("arm", "v7"),
        ("armel", _) => ("arm", "v6"),
        ("arm", "" | "7") => ("arm", "v7"),
        ("arm", "5") => ("arm", "v5"),
        ("arm", "6") => ("arm", "v6"),
        ("arm", "8") => ("arm", "v8"),
        (architecture, variant) => (architecture, variant),
    };
    Platform { os: normal_os(os), architecture: architecture.to_owned(), variant: variant.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn amd64() -> Platform {
        normal("linux", "amd64", "")
    }

    #[test]
    fn vectors() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/vectors/platforms.json");
        let file: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        for vector in file["vectors"].as_array().unwrap() {
            let text = vector["in"].as_str().unwrap();
            let found = parse(text, &amd64()).ok().map(|platform| platform.to_string());
            assert_eq!(found.as_deref(), vector["out"].as_str(), "{text}");
        }
    }

    #[test]
    fn spellings() {
        let check = |text: &str, want: Option<&str>| {
            let found = parse(text, &amd64()).ok().map(|platform| platform.to_string());
            assert_eq!(found.as_deref(), want, "{text}");
        };
        check("arm", Some("linux/arm/v7"));
        check("linux/arm", Some("linux/arm/v7"));
        check("linux/armel", Some("linux/arm/v6"));
        check("macos/arm64", Some("darwin/arm64"));
        check("windows(10.0.17763+win32k)/amd64", Some("windows/amd64"));
        check("bad//plat", None);
        check("linux/", None);
        check("windows(1/amd64", None);
        check("windows(1+)/amd64", None);
        check("no-such-thing", None);
        check("lin/ux/am/d64", None);
        assert_eq!(parse("linux", &host()).unwrap(), host());
    }

    #[test]
    fn fitting() {
        let check = |wanted: &str, have: &str, want: Option<usize>| {
            let read = |text| parse(text, &amd64()).unwrap();
            assert_eq!(rank(&read(wanted), &read(have)), want, "{have} on {wanted}");
            assert_eq!(matches(&read(wanted), &read(have)), want.is_some());
        };
        check("linux/amd64", "linux/amd64", Some(0));
        check("linux/amd64", "linux/386", Some(1));
        check("linux/amd64/v3", "linux/amd64", Some(2));
        check("linux/amd64", "linux/amd64/v2", None);
        check("linux/arm/v7", "linux/arm/v6", Some(1));
        check("linux/arm/v6", "linux/arm/v7", None);
        check("linux/arm64", "linux/arm64/v8", Some(0));
        check("linux/arm64", "linux/arm/v7", Some(2));
        check("linux/amd64/v3", "linux/amd64/v2", Some(1));
        check("linux/amd64", "linux/x86_64", Some(0));
        check("linux/arm/v7", "linux/arm", Some(0));
        check("linux/amd64", "windows/amd64", None);
        check("linux/amd64", "unknown/unknown", None);
    }
}
