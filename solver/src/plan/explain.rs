//! Why a step ran: differences between key parts, in words.

use super::cache_key::Difference;
use crate::tree::{Entry, Kind, Tree};

/// Reasons shown for one step; the rest is counted.
const SHOWN: usize = 3;

/// Why a step ran although a look-up was allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// No record of this step.
    FirstBuild,
    /// `--no-cache` or `--no-cache-filter`.
    CacheOff,
    /// The record's layer is no longer in the store.
    ResultGone,
    /// A cache knows the result and does not have it any more.
    Lost {
        /// The cache.
        cache: String,
        /// The layer's blob.
        digest: String,
    },
    /// Parts of the key differ.
    Changed(Vec<Difference>),
    /// Files of a context or stage that the step copies differ.
    Files(Vec<String>),
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::FirstBuild => f.write_str("first build"),
            Self::CacheOff => f.write_str("the cache is turned off for it"),
            Self::ResultGone => f.write_str("its earlier result is no longer in the store"),
            Self::Lost { cache, digest } => write!(f, "{cache} no longer has its result ({digest})"),
            Self::Changed(differences) => listed(f, &differences.iter().map(in_words).collect::<Vec<_>>()),
            Self::Files(files) => listed(f, files),
        }
    }
}

fn listed(f: &mut std::fmt::Formatter<'_>, reasons: &[String]) -> std::fmt::Result {
    f.write_str(&reasons[..reasons.len().min(SHOWN)].join(", "))?;
    match reasons.len().saturating_sub(SHOWN) {
        0 => Ok(()),
        more => write!(f, " and {more} more"),
    }
}

fn in_words(difference: &Difference) -> String {
    let Difference { part, old, new } = difference;
    let short = |text: &Option<String>| match text {
        Some(text) if text.is_empty() => "empty".to_owned(),
        Some(text) if text.chars().count() > 60 => format!("{}…", text.chars().take(57).collect::<String>()),
        Some(text) => text.clone(),
        None => "unset".to_owned(),
    };
    if let Some(what) = part.strip_prefix("content of ") {
        return match what.strip_prefix("image ") {
            Some(image) => format!("base {image} changed"),
            None => format!("{what} changed"),
        };
    }
    if let Some(image) = part.strip_prefix("base ") {
        return format!("base {image} moved to {}", short(new));
    }
    format!("{part}: {} → {}", short(old), short(new))
}

/// Names what differs between the files that a step selected and those of its earlier layer.
pub fn changed_files(old: &Tree, new: &Tree) -> Vec<String> {
    let mut reasons = Vec::new();
    let name = |entry: &Entry| String::from_utf8_lossy(&entry.path).into_owned();
    let mut removed = Vec::new();
    let mut both = old.zip(new);
    while let Some(pair) = both.next() {
        match pair {
            (Some(old), None) if old.entry.is_dir() => {}
            (Some(old), None) => removed.push(format!("{} removed", name(&old.entry))),
            (None, Some(new)) => reasons.push(format!("{} added", name(&new.entry))),
            (Some(old), Some(new)) if !same(&old.entry, &new.entry) => {
                reasons.push(format!("{} changed", name(&new.entry)));
            }
            _ => {}
        }
    }
    reasons.append(&mut removed);
    reasons
}

/// Same but for owner, times and, for directories, the mode: the selection does not know those of the destination.
fn same(a: &Entry, b: &Entry) -> bool {
    match (&a.kind, &b.kind) {
        (Kind::Dir { .. }, Kind::Dir { .. }) => true,
        (Kind::File { digest: x, .. }, Kind::File { digest: y, .. }) => x == y && a.mode == b.mode,
        (x, y) => x == y,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(part: &str, old: Option<&str>, new: Option<&str>) -> String {
        let difference = Difference { part: part.into(), old: old.map(Into::into), new: new.map(Into::into) };
        Reason::Changed(vec![difference]).to_string()
    }

    #[test]
    fn reasons_read_as_sentences() {
        assert_eq!(words("build arg VERSION", Some("1"), Some("2")), "build arg VERSION: 1 → 2");
        assert_eq!(words("env A", None, Some("")), "env A: unset → empty");
        assert_eq!(words("content of COPY . .", Some("aa"), Some("bb")), "COPY . . changed");
        assert_eq!(words("base debian:12", Some("sha256:a"), Some("sha256:b")), "base debian:12 moved to sha256:b");
        let many: Vec<String> = (0..5).map(|at| format!("f{at} changed")).collect();
        assert_eq!(Reason::Files(many).to_string(), "f0 changed, f1 changed, f2 changed and 2 more");
    }
}
