//! Cache keys: what a step can see, named part by part.
//!
//! | input | in the key | why |
//! |---|---|---|
//! | the op as lowered: arguments, ENV, build args, USER, WORKDIR, mounts' definitions, network, security, hosts | yes | the step sees them |
//! | content of the file system it runs on and of stages it mounts or copies from | yes, without times | the step sees it; times would make every rebuild a miss |
//! | selected files of a context: name, kind, mode, content, link target | yes | as above |
//! | platform, version of the key format | yes | another machine or another reading of the same op |
//! | values of secrets, proxy settings, what a cache mount holds, ssh agents, progress, limits of time | no | must not change an image |
//!
//! A key is the digest of its parts, each with its length, so that `("ab", "c")` is not `("a", "bc")`. The parts
//! themselves stay in the record, so that a miss can be told by comparing them and not only their digest.

use std::collections::BTreeMap;

/// Raised whenever the same op would be carried out differently.
pub const KEY_FORMAT: u32 = 1;

/// A cache key or the content key of a snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(pub [u8; 32]);

impl Key {
    /// The empty file system.
    pub const SCRATCH: Key = Key([0; 32]);

    /// Lower-case hex.
    pub fn hex(&self) -> String {
        blake3::Hash::from_bytes(self.0).to_hex().to_string()
    }

    /// Reads [`Self::hex`].
    pub fn from_hex(text: &str) -> Option<Self> {
        blake3::Hash::from_hex(text).ok().map(|hash| Self(*hash.as_bytes()))
    }

    /// Content key of a snapshot: this one with a layer on top.
    pub fn stacked(&self, layer: &[u8; 32]) -> Key {
        let mut hasher = blake3::Hasher::new_derive_key("nacre snapshot content v1");
        hasher.update(&self.0).update(layer);
        Key(*hasher.finalize().as_bytes())
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.hex())
    }
}

/// The parts of a key, in order, each with a name that is unique in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parts(pub Vec<(String, String)>);

impl Parts {
    /// Adds a part.
    pub fn add(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.0.push((name.into(), value.into()));
    }

    /// The key of all parts.
    pub fn key(&self) -> Key {
        let mut hasher = blake3::Hasher::new_derive_key("nacre vertex key");
        hasher.update(&KEY_FORMAT.to_le_bytes());
        for text in self.0.iter().flat_map(|(name, value)| [name, value]) {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        Key(*hasher.finalize().as_bytes())
    }

    /// What differs from the parts of an earlier run, in this key's order.
    pub fn differences(&self, old: &[(String, String)]) -> Vec<Difference> {
        let before: BTreeMap<&str, &str> = old.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let now: BTreeMap<&str, &str> = self.0.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let changed = self.0.iter().filter(|(name, value)| before.get(name.as_str()) != Some(&value.as_str())).map(
            |(name, value)| Difference {
                part: name.clone(),
                old: before.get(name.as_str()).map(|&text| text.to_owned()),
                new: Some(value.clone()),
            },
        );
        let gone = old.iter().filter(|(name, _)| !now.contains_key(name.as_str())).map(|(name, value)| Difference {
            part: name.clone(),
            old: Some(value.clone()),
            new: None,
        });
        changed.chain(gone).collect()
    }
}

/// A part of a key that is not what it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Its name.
    pub part: String,
    /// Value then; `None` when the part is new.
    pub old: Option<String>,
    /// Value now; `None` when it is gone.
    pub new: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(pairs: &[(&str, &str)]) -> Parts {
        Parts(pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn keys_tell_lengths_names_and_order_apart() {
        let key = parts(&[("ab", "c")]).key();
        assert_eq!(key, parts(&[("ab", "c")]).key());
        for other in [parts(&[("a", "bc")]), parts(&[("ab", "c"), ("", "")]), parts(&[("c", "ab")]), parts(&[])] {
            assert_ne!(key, other.key());
        }
        assert_eq!(Key::from_hex(&key.hex()), Some(key));
        assert_eq!(Key::from_hex("zz"), None);
    }

    #[test]
    fn a_stack_depends_on_its_order() {
        let (a, b) = ([1; 32], [2; 32]);
        assert_ne!(Key::SCRATCH.stacked(&a).stacked(&b), Key::SCRATCH.stacked(&b).stacked(&a));
        assert_ne!(Key::SCRATCH.stacked(&a), Key(a));
    }

    #[test]
    fn differences_name_what_changed_came_and_went() {
        let old = parts(&[("same", "1"), ("changed", "1"), ("gone", "1")]);
        let new = parts(&[("same", "1"), ("changed", "2"), ("new", "3")]);
        let text = |d: &Difference| format!("{} {:?} {:?}", d.part, d.old.as_deref(), d.new.as_deref());
        let found: Vec<String> = new.differences(&old.0).iter().map(text).collect();
        assert_eq!(found, [r#"changed Some("1") Some("2")"#, r#"new None Some("3")"#, r#"gone Some("1") None"#]);
    }
}
