//! Cache records: the result of a step under its key, with the parts of the key, so that a miss can be explained.
//!
//! One JSON file for each key, `records/KEY`, and `steps/STEP` with the key of the newest record of "the same step".
//! A record that cannot be read is as good as none and is removed: the step runs again.

use super::{Store, StoreError, check_name};
use crate::image::Descriptor;
use crate::tree::LayerId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;

/// Version of the format; records of others are not read.
pub const RECORD_VERSION: u32 = 1;

/// One ingredient of a cache key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// What it is: `command`, `env PATH`, `input 0`.
    pub name: String,
    /// Its value, or a digest of it.
    pub value: String,
}

/// A layer that came as a blob.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RecordBlob {
    /// The blob.
    pub descriptor: Descriptor,
    /// Digest of the uncompressed layer.
    pub diff_id: String,
}

/// The result of a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`RECORD_VERSION`].
    pub version: u32,
    /// Cache key in hex.
    pub key: String,
    /// Identities of the step: the same step in another build, by its text and by its place.
    pub steps: Vec<String>,
    /// What the key was made of, in order.
    pub parts: Vec<Part>,
    /// The layer; `None` when the step made none.
    pub layer: Option<LayerId>,
    /// Content key of the snapshot after the step, in hex.
    pub content_key: String,
    /// When it was made, in seconds since the epoch.
    pub created: i64,
    /// How long it took.
    pub duration_ms: u64,
    /// The layer's blob, when it came from another machine's cache: the layer can be had as long as the blob is here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blob: Option<RecordBlob>,
    /// What later versions add.
    #[serde(default)]
    pub extra: BTreeMap<String, String>,
}

impl Store {
    /// The record of a key.
    pub fn get_record(&self, key: &str) -> Result<Option<Record>, StoreError> {
        let path = self.root.join("records").join(check_name(key)?);
        let Some(bytes) = self.read_optional(&path)? else { return Ok(None) };
        match serde_json::from_slice::<Record>(&bytes) {
            Ok(record) if record.version == RECORD_VERSION && record.key == key => {
                super::prune::note_use(&path);
                Ok(Some(record))
            }
            _ => {
                let _ = fs::remove_file(&path);
                Ok(None)
            }
        }
    }

    /// Stores a record and makes it the newest of its steps.
    pub fn put_record(&self, record: &Record) -> Result<(), StoreError> {
        let path = self.root.join("records").join(check_name(&record.key)?);
        let bytes = serde_json::to_vec(record).expect("a record has string keys only");
        self.replace_file(&path, &bytes)?;
        record.steps.iter().try_for_each(|step| {
            self.replace_file(&self.root.join("steps").join(check_name(step)?), record.key.as_bytes())
        })
    }

    /// Removes a record whose layer turned out to be unusable.
    pub fn remove_record(&self, key: &str) -> Result<(), StoreError> {
        let path = self.root.join("records").join(check_name(key)?);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(StoreError::io("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    /// The newest record of a step, whatever its key.
    pub fn last_record_of_step(&self, step: &str) -> Result<Option<Record>, StoreError> {
        let path = self.root.join("steps").join(check_name(step)?);
        let Some(bytes) = self.read_optional(&path)? else { return Ok(None) };
        match std::str::from_utf8(&bytes).ok().filter(|key| check_name(key).is_ok()) {
            Some(key) => Ok(self.get_record(key)?.filter(|record| record.steps.iter().any(|other| other == step))),
            None => {
                let _ = fs::remove_file(&path);
                Ok(None)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::temporary;
    use super::*;

    fn record(key: &str, step: &str) -> Record {
        Record {
            version: RECORD_VERSION,
            key: key.to_owned(),
            steps: vec![step.to_owned()],
            parts: vec![Part { name: "command".into(), value: "make".into() }],
            layer: Some(LayerId("00ff".into())),
            content_key: "aa".into(),
            created: 1_700_000_000,
            duration_ms: 12,
            blob: None,
            extra: BTreeMap::from([("a".into(), "b".into())]),
        }
    }

    #[test]
    fn records_come_back() {
        let (_directory, store) = temporary();
        assert_eq!(store.get_record("k1").unwrap(), None);
        store.put_record(&record("k1", "s")).unwrap();
        store.put_record(&record("k2", "s")).unwrap();
        assert_eq!(store.get_record("k1").unwrap(), Some(record("k1", "s")));
        assert_eq!(store.last_record_of_step("s").unwrap(), Some(record("k2", "s")));
        assert_eq!(store.last_record_of_step("t").unwrap(), None);
        assert!(store.get_record("../index").is_err());
        store.remove_record("k2").unwrap();
        assert_eq!(store.last_record_of_step("s").unwrap(), None);
    }

    #[test]
    fn damaged_records_are_none() {
        let (_directory, store) = temporary();
        let path = store.root.join("records/k");
        for damage in ["", "{", "{\"version\":1}", "\0\0\0"] {
            fs::write(&path, damage).unwrap();
            assert_eq!(store.get_record("k").unwrap(), None, "{damage:?}");
            assert!(!path.exists());
        }
        store.put_record(&record("other", "s")).unwrap();
        fs::rename(store.root.join("records/other"), &path).unwrap();
        assert_eq!(store.get_record("k").unwrap(), None);
        fs::write(store.root.join("steps/s"), "../x").unwrap();
        assert_eq!(store.last_record_of_step("s").unwrap(), None);
    }
}
