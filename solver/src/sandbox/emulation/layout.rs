//! How answers look in the memory of the process that asked: struct stat and its like.

use super::call::Layout;
use super::owners::{Device, Metadata, Owner};
use crate::sys::notify::RawStatx;

/// Bits of a mode that tell the kind.
const KIND: u32 = libc::S_IFMT;

fn mode(found: u32, device: Option<Device>) -> u32 {
    match device {
        None => found,
        Some(Device { block: true, .. }) => found & !KIND | libc::S_IFBLK,
        Some(Device { block: false, .. }) => found & !KIND | libc::S_IFCHR,
    }
}

fn node(metadata: &Metadata<'_>, device: Option<Device>) -> (u32, u32) {
    device.map_or_else(|| metadata.node(), |device| (device.major, device.minor))
}

/// struct statx with another owner.
pub(super) fn statx(stat: &RawStatx, owner: Owner) -> Vec<u8> {
    let metadata = Metadata(stat);
    let mut bytes: Vec<u8> = stat.0.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let mut put = |offset: usize, value: &[u8]| bytes[offset..offset + value.len()].copy_from_slice(value);
    put(20, &owner.uid.to_ne_bytes());
    put(24, &owner.gid.to_ne_bytes());
    put(28, &(mode(metadata.mode(), owner.device) as u16).to_ne_bytes());
    let (major, minor) = node(&metadata, owner.device);
    put(128, &major.to_ne_bytes());
    put(132, &minor.to_ne_bytes());
    bytes
}

/// struct stat, or struct stat64 of i386, with another owner; `None` for a layout that is not known.
pub(super) fn stat(stat: &RawStatx, owner: Owner, layout: Layout) -> Option<Vec<u8>> {
    let metadata = Metadata(stat);
    let number = |(major, minor): (u32, u32)| rustix::fs::makedev(major, minor);
    let (device, special) = (number(metadata.device()), number(node(&metadata, owner.device)));
    let mode = mode(metadata.mode(), owner.device);
    // Two words of 32 bits, the first one in the lower half: both supported architectures are little-endian.
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let (inode, links, size) = (metadata.inode(), metadata.links(), metadata.size());
    let (block_size, blocks) = (metadata.block_size(), metadata.blocks());
    let times = [metadata.accessed(), metadata.modified(), metadata.changed()];
    let long_times: Vec<u64> =
        times.into_iter().flat_map(|(seconds, nanoseconds)| [seconds as u64, nanoseconds.into()]).collect();
    let words = match layout {
        Layout::Native if cfg!(target_arch = "x86_64") => {
            let start = [device, inode, links.into(), pair(mode, owner.uid), owner.gid.into(), special];
            [&start[..], &[size, block_size.into(), blocks], &long_times, &[0; 3]].concat()
        }
        Layout::Native => {
            let start = [device, inode, pair(mode, links), pair(owner.uid, owner.gid), special, 0];
            [&start[..], &[size, block_size.into(), blocks], &long_times, &[0]].concat()
        }
        Layout::I386 => {
            let start = [device, pair(0, inode as u32), pair(mode, links), pair(owner.uid, owner.gid), special];
            let sizes = [pair(0, size as u32), pair((size >> 32) as u32, block_size), blocks];
            let times = times.map(|(seconds, nanoseconds)| pair(seconds as u32, nanoseconds));
            [&start[..], &sizes, &times, &[inode]].concat()
        }
        Layout::Arm => return None,
    };
    Some(words.into_iter().flat_map(u64::to_ne_bytes).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    /// A number from `bytes` at `offset`.
    fn number<const N: usize>(bytes: &[u8], offset: usize) -> u64 {
        let mut value = [0; 8];
        value[..N].copy_from_slice(&bytes[offset..offset + N]);
        u64::from_le_bytes(value)
    }

    #[test]
    fn owners_are_replaced_and_the_rest_is_kept() {
        let file = tempfile::NamedTempFile::new().expect("file");
        std::fs::write(file.path(), "twelve bytes").expect("write");
        let expected = file.path().metadata().expect("metadata");
        let fd = crate::sys::open_place(file.path()).expect("open");
        let raw = RawStatx::of(&fd, c"", libc::AT_EMPTY_PATH as u32, libc::STATX_ALL).expect("statx");
        let owner = Owner { uid: 33, gid: 34, device: Some(Device { block: false, major: 1, minor: 300 }) };
        let mode = u64::from(expected.mode() & 0o7777 | libc::S_IFCHR);

        let x = statx(&raw, owner);
        assert_eq!((number::<4>(&x, 20), number::<4>(&x, 24), number::<2>(&x, 28)), (33, 34, mode));
        assert_eq!((number::<8>(&x, 40), number::<4>(&x, 128), number::<4>(&x, 132)), (12, 1, 300));

        let old = stat(&raw, owner, Layout::I386).expect("known");
        assert_eq!((old.len(), number::<8>(&old, 88), number::<8>(&old, 44)), (96, expected.ino(), 12));
        assert_eq!((number::<4>(&old, 16), number::<4>(&old, 24), number::<4>(&old, 28)), (mode, 33, 34));
        assert_eq!(number::<4>(&old, 72), expected.mtime() as u32 as u64);

        // The machine's own, read back through the C library's type by its size and fields.
        let own = stat(&raw, owner, Layout::Native).expect("known");
        assert_eq!(own.len(), size_of::<libc::stat>());
        let at = |offset| number::<8>(&own, offset);
        assert_eq!(at(std::mem::offset_of!(libc::stat, st_ino)), expected.ino());
        assert_eq!(at(std::mem::offset_of!(libc::stat, st_size)), 12);
        assert_eq!(at(std::mem::offset_of!(libc::stat, st_rdev)), rustix::fs::makedev(1, 300));
        assert_eq!(at(std::mem::offset_of!(libc::stat, st_mtime)), expected.mtime() as u64);
        assert_eq!(at(std::mem::offset_of!(libc::stat, st_ctime_nsec)), expected.ctime_nsec() as u64);
        assert_eq!(at(std::mem::offset_of!(libc::stat, st_blocks)), expected.blocks());
        assert_eq!(number::<4>(&own, std::mem::offset_of!(libc::stat, st_mode)), mode);
        assert_eq!(number::<4>(&own, std::mem::offset_of!(libc::stat, st_uid)), 33);
        assert_eq!(number::<4>(&own, std::mem::offset_of!(libc::stat, st_gid)), 34);
    }
}
