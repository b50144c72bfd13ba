//! Owners that the disk does not hold, and how builder and supervisor tell them to each other.
//!
//! An object is known by its identity: device, inode and time of birth, the last because inode numbers are used again.
//! Two kinds of file pass between builder and supervisor:
//!
//! | file | from | holds |
//! |---|---|---|
//! | [`LowerOwner`]s | builder | paths of a snapshot that do not belong to 0:0, or are device nodes |
//! | [`Records`] | both | owners by identity |
//!
//! Both are lists of JSON values, a line each; they live as long as a step, but for those of cache mounts.

use crate::sys::notify::RawStatx;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io::{self, BufRead, BufWriter, Write};
use std::path::Path;

/// A device node that cannot be made: its place is taken by an empty file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Device {
    /// Block device, else character device.
    pub block: bool,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

/// Who owns an object, and what it stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// The device node that it stands for.
    pub device: Option<Device>,
}

impl Owner {
    /// Whether nothing differs from what the disk says.
    pub fn is_plain(&self) -> bool {
        *self == Owner::default()
    }
}

/// Identity of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Identity {
    /// Device number of its file system.
    pub device: (u32, u32),
    /// Inode number.
    pub inode: u64,
    /// Birth in seconds and nanoseconds since the epoch; 0 where the file system does not know.
    pub born: (i64, u32),
}

impl Identity {
    /// That of an object with this metadata.
    pub fn of(stat: &RawStatx) -> Identity {
        let metadata = Metadata(stat);
        Identity { device: metadata.device(), inode: metadata.inode(), born: metadata.born() }
    }
}

/// Fields of statx(2) by their places.
pub(super) struct Metadata<'a>(pub(super) &'a RawStatx);

impl Metadata<'_> {
    fn word(&self, offset: usize) -> u32 {
        let (word, high) = (self.0.0[offset / 8], !offset.is_multiple_of(8));
        // The kernel's structure, read as words of 64 bits: both supported architectures are little-endian.
        if high { (word >> 32) as u32 } else { word as u32 }
    }

    fn long(&self, offset: usize) -> u64 {
        self.0.0[offset / 8]
    }

    pub(super) fn block_size(&self) -> u32 {
        self.word(4)
    }

    pub(super) fn links(&self) -> u32 {
        self.word(16)
    }

    pub(super) fn mode(&self) -> u32 {
        self.word(28) & 0xffff
    }

    pub(super) fn owner(&self) -> (u32, u32) {
        (self.word(20), self.word(24))
    }

    pub(super) fn inode(&self) -> u64 {
        self.long(32)
    }

    pub(super) fn size(&self) -> u64 {
        self.long(40)
    }

    pub(super) fn blocks(&self) -> u64 {
        self.long(48)
    }

    fn time(&self, offset: usize) -> (i64, u32) {
        (self.long(offset) as i64, self.word(offset + 8))
    }

    pub(super) fn accessed(&self) -> (i64, u32) {
        self.time(64)
    }

    pub(super) fn born(&self) -> (i64, u32) {
        self.time(80)
    }

    pub(super) fn changed(&self) -> (i64, u32) {
        self.time(96)
    }

    pub(super) fn modified(&self) -> (i64, u32) {
        self.time(112)
    }

    pub(super) fn node(&self) -> (u32, u32) {
        (self.word(128), self.word(132))
    }

    pub(super) fn device(&self) -> (u32, u32) {
        (self.word(136), self.word(140))
    }
}

/// Owner of an object of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LowerOwner {
    /// Path in the snapshot, without leading slash; any bytes.
    #[serde(with = "bytes")]
    pub path: Vec<u8>,
    /// Its owner.
    pub owner: Owner,
    /// It has hard links, of which overlayfs does not note where they came from.
    pub linked: bool,
}

/// Bytes as text in which each byte is one character.
mod bytes {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&bytes.iter().map(|byte| char::from(*byte)).collect::<String>())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.chars().map(|one| u8::try_from(one).map_err(serde::de::Error::custom)).collect()
    }
}

/// Owners by identity.
pub type Records = HashMap<Identity, Owner>;

/// Writes a list into a new file.
pub fn write_list<T: Serialize>(path: &Path, list: impl Iterator<Item = T>) -> io::Result<()> {
    write_to(std::fs::File::create(path)?, list)
}

pub(super) fn write_to<T: Serialize>(file: std::fs::File, list: impl Iterator<Item = T>) -> io::Result<()> {
    let mut file = BufWriter::new(file);
    for item in list {
        serde_json::to_writer(&mut file, &item)?;
        file.write_all(b"\n")?;
    }
    file.flush()
}

/// Reads what [`write_list`] wrote.
pub fn read_list<T: for<'de> Deserialize<'de>>(path: &Path) -> io::Result<Vec<T>> {
    let file = io::BufReader::new(std::fs::File::open(path)?);
    file.split(b'\n').map(|line| Ok(serde_json::from_slice(&line?)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_come_back() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("list");
        let device = Some(Device { block: true, major: 8, minor: 1 });
        let list = [
            LowerOwner { path: b"a\nb\xff\x00c".to_vec(), owner: Owner { uid: 1, gid: 2, device }, linked: true },
            LowerOwner { path: b"d".to_vec(), owner: Owner::default(), linked: false },
        ];
        write_list(&path, list.iter()).expect("write");
        assert_eq!(read_list::<LowerOwner>(&path).expect("read"), list);
        let record = (Identity { device: (0, 5), inode: 7, born: (-1, 9) }, Owner::default());
        write_list(&path, [record].iter()).expect("write");
        assert_eq!(read_list::<(Identity, Owner)>(&path).expect("read"), [record]);
    }

    #[test]
    fn metadata_is_that_of_the_kernel() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().expect("temporary directory");
        let fd = crate::sys::open_place(dir.path()).expect("open");
        let stat = RawStatx::of(&fd, c"", libc::AT_EMPTY_PATH as u32, libc::STATX_ALL).expect("statx");
        let (metadata, expected) = (Metadata(&stat), dir.path().metadata().expect("metadata"));
        assert_eq!((metadata.inode(), metadata.mode()), (expected.ino(), expected.mode()));
        assert_eq!((metadata.size(), metadata.blocks()), (expected.size(), expected.blocks()));
        assert_eq!(u64::from(metadata.links()), expected.nlink());
        assert_eq!(metadata.modified(), (expected.mtime(), expected.mtime_nsec() as u32));
        assert_eq!(metadata.changed(), (expected.ctime(), expected.ctime_nsec() as u32));
        assert_eq!(metadata.accessed(), (expected.atime(), expected.atime_nsec() as u32));
        assert_eq!(u64::from(metadata.block_size()), expected.blksize());
        let (major, minor) = metadata.device();
        assert_eq!(rustix::fs::makedev(major, minor), expected.dev());
    }
}
