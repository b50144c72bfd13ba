//! What is remembered of the contents of files between builds, as git's index does: digests by path, valid as long as a
//! file's [`Stamp`] stays the same.
//!
//! There may be a million files, so neither the file nor what a build learns is ever a table of records in memory. Records
//! stand packed in blocks, in path order ([`compare_paths`]), which is that in which contexts are walked: whoever asks
//! for ascending paths unpacks each block once. Of the file a directory of its blocks is in memory, and one block for each
//! who asks ([`Near`]).
//!
//! ```text
//! "nacre digests 3\n" | blocks | directory | trailer
//! block: records, 64 or fewer
//! record: bytes shared with the path before | rest of the path (length, bytes) | flags (1 byte) | inode | size
//!         mtime: seconds, nanoseconds | [ctime, when it is another] | [dev] | [day last used]
//!         digest 32 | [security.capability (length, bytes)] | [kind of key in it, 1 byte]
//! directory: for each block its length | its first path, like a record's | first 16 bytes of its BLAKE3
//! trailer: offset of the directory u64 | its length u64 | BLAKE3 of magic, directory, offset and length (little-endian)
//! ```
//! Numbers are LEB128. Inode, times, dev and day are differences to the record before in the block, in zigzag; dev and day
//! are only there when they differ. The first record of a block comes after one of zeros with an empty path.
//!
//! Invariants: the directory is believed when its checksum is right, a block when its own is, so a damaged block holds no
//! records and a damaged directory leaves none. All can be computed again; nothing else is done about damage. No length in
//! the file becomes an allocation before it is compared with a limit or with what is there.

use crate::context::ContextError;
use crate::key_patterns::KeyKind;
use crate::scan;
use crate::tree::index::{put, put_bytes, put_path, unzigzag, zigzag};
use crate::tree::{ContentDigest, compare_paths, shared_length};
use rustix::fs::Statx;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const MAGIC: &[u8; 16] = b"nacre digests 3\n";
/// Records of a block: so few that a single look-up is quick, so many that the directory is small, and some 4 KiB of them,
/// of which BLAKE3 hashes the four chunks at once.
const BLOCK_RECORDS: usize = 64;
/// Longest path that is remembered; four times what Linux takes in one call.
const MAX_PATH: usize = 16 << 10;
/// Longest `security.capability` that is remembered; the kernel's is of 24 bytes at most.
const MAX_CAPABILITY: usize = 256;
/// No block is longer: the numbers and the digest of a record take some 120 bytes at most.
const MAX_BLOCK: usize = BLOCK_RECORDS * (MAX_PATH + MAX_CAPABILITY + 128);
/// No directory is longer, which is enough for tens of millions of files.
const MAX_DIRECTORY: u64 = 64 << 20;
const CHECKSUM: usize = 16;
const TRAILER: usize = 8 + 8 + blake3::OUT_LEN;

/// Records that no build has used for so many days are dropped.
const KEEP_DAYS: u32 = 30;
/// The day of a record's last use may be so much older than the truth.
const REMEMBER_DAYS: u32 = 7;

/// What tells whether a file is the same as before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) dev: u64,
    pub(crate) ino: u64,
    pub(crate) size: u64,
    /// Seconds since the epoch, nanoseconds.
    pub(crate) mtime: (i64, u32),
    pub(crate) ctime: (i64, u32),
}

impl Stamp {
    pub(crate) fn of(stat: &Statx) -> Self {
        let (dev, ino) = scan::identity(stat);
        Self {
            dev,
            ino,
            size: stat.stx_size,
            mtime: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
            ctime: (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
        }
    }

    /// Was the file last changed so long before it was read that a later change must show in its times? Clocks of file
    /// systems tick every few milliseconds, coarse ones every second or two; those are told by times without fraction.
    pub(crate) fn is_settled(&self, read: SystemTime) -> bool {
        let tick = if self.ctime.1 == 0 && self.mtime.1 == 0 { 2_000_000_000 } else { 20_000_000 };
        let nanoseconds = |(seconds, fraction): (i64, u32)| i128::from(seconds) * 1_000_000_000 + i128::from(fraction);
        let read = read.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_nanos() as i128;
        nanoseconds(self.ctime.max(self.mtime)) + tick < read
    }
}

/// Days since the epoch.
pub(crate) fn today() -> u32 {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    u32::try_from(seconds / 86400).unwrap_or(u32::MAX)
}

/// What is remembered of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) stamp: Stamp,
    pub(crate) digest: ContentDigest,
    /// `security.capability`, mostly empty.
    pub(crate) capability: Box<[u8]>,
    /// The last use.
    pub(crate) day: u32,
    /// A key that it holds.
    pub(crate) key: Option<KeyKind>,
}

impl Record {
    /// Is the last use to be written anew? Only now and then: a build that finds everything should have nothing to write.
    pub(crate) fn is_stale(&self, today: u32) -> bool {
        self.day.saturating_add(REMEMBER_DAYS) <= today
    }

    fn fields(&self) -> Fields<'_> {
        Fields { stamp: self.stamp, day: self.day, digest: &self.digest, capability: &self.capability, key: self.key }
    }
}

/// A path in the order of its bytes, which is not that of its components.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ByBytes(pub(crate) Arc<Path>);

impl std::borrow::Borrow<[u8]> for ByBytes {
    fn borrow(&self) -> &[u8] {
        self.0.as_os_str().as_bytes()
    }
}

impl Ord for ByBytes {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.as_os_str().as_bytes().cmp(other.0.as_os_str().as_bytes())
    }
}

impl PartialOrd for ByBytes {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Digests of context files by absolute path, kept in one file between builds.
#[derive(Debug)]
pub struct DigestCache {
    path: PathBuf,
    old: Reading,
    /// Learned since then.
    learned: Segments,
    /// Files that were asked for and hold keys.
    keys: BTreeMap<ByBytes, KeyKind>,
    /// Of what there is to look up, unlike that of any other cache: tells a [`Near`] that its positions are void.
    version: u64,
}

/// How far reading has come.
#[derive(Debug)]
enum Reading {
    /// To be read when it is needed.
    Later,
    Begun(std::thread::JoinHandle<io::Result<Old>>),
    Done(Old),
}

fn next_version() -> u64 {
    // The default of a `Near` is none of them.
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Relaxed)
}

impl DigestCache {
    /// Begins to read the file, for which no time is lost while the context is walked. A missing or damaged one is empty:
    /// digests can always be computed again.
    pub fn open(path: &Path) -> Self {
        let own = path.to_owned();
        let begun = std::thread::Builder::new().name("digests".into()).spawn(move || Old::open(&own));
        let old = begun.map_or(Reading::Later, Reading::Begun);
        let (learned, keys) = (Segments::default(), BTreeMap::new());
        Self { path: path.to_owned(), old, learned, keys, version: next_version() }
    }

    /// Waits until the file has been opened.
    pub(crate) fn ready(&mut self) -> Result<(), ContextError> {
        let read = match std::mem::replace(&mut self.old, Reading::Later) {
            Reading::Later => Old::open(&self.path),
            Reading::Begun(thread) => thread.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())),
            Reading::Done(old) => {
                self.old = Reading::Done(old);
                return Ok(());
            }
        };
        self.old = Reading::Done(read.map_err(|source| self.failed(source))?);
        self.version = next_version();
        Ok(())
    }

    fn failed(&self, source: io::Error) -> ContextError {
        ContextError::DigestCache { path: self.path.clone(), source }
    }

    /// What was there before, if it has been opened.
    fn old(&self) -> Option<&Old> {
        match &self.old {
            Reading::Done(old) => Some(old),
            Reading::Later | Reading::Begun(_) => None,
        }
    }

    /// Writes the file if anything is new, as a whole or not at all. Of two builds that write at once one wins.
    pub fn save(&mut self) -> Result<(), ContextError> {
        if self.learned.0.is_empty() {
            return Ok(());
        }
        self.ready()?;
        self.version = next_version();
        let learned = std::mem::take(&mut self.learned).into_one();
        let oldest = today().saturating_sub(KEEP_DAYS);
        write_file(&self.path, self.old(), learned, oldest).map_err(|source| self.failed(source))?;
        // Hardly ever asked again: the build's steps are done.
        self.old = Reading::Later;
        Ok(())
    }

    /// Nothing is known.
    pub(crate) fn is_empty(&self) -> bool {
        self.learned.0.is_empty() && self.old().is_none_or(|old| old.blocks.is_empty())
    }

    /// What is remembered of the file if it still has this stamp. `near` is for those who ask one after the other: they
    /// find ascending paths quickly.
    pub(crate) fn look_up(&self, path: &[u8], stamp: &Stamp, near: &mut Near) -> Option<Record> {
        if path.is_empty() {
            return None;
        }
        if near.version != self.version {
            near.version = self.version;
            near.held.block = None;
            near.file = Cursor::default();
            near.learned.clear();
            near.learned.resize_with(self.learned.0.len(), Cursor::default);
        }
        // Of what was learned twice, the last counts.
        for (segment, cursor) in self.learned.0.iter().zip(&mut near.learned).rev() {
            if cursor.find(segment, &mut near.held, path) {
                return cursor.record(segment, &mut near.held, stamp);
            }
        }
        let old = self.old()?;
        if !near.file.find(old, &mut near.held, path) {
            return None;
        }
        near.file.record(old, &mut near.held, stamp)
    }

    /// Takes in what was found out. It counts more than what was known before.
    pub(crate) fn add(&mut self, run: Run) {
        let Run { mut segments, open, keys } = run;
        segments.extend(open.finish());
        for segment in segments.0 {
            self.learned.append(segment);
            self.version = next_version();
        }
        self.keys.extend(keys);
    }

    /// The key in a file whose digest was asked for, if there is one.
    pub fn key_in(&self, path: &Path) -> Option<KeyKind> {
        self.keys.get(path.as_os_str().as_bytes()).copied()
    }

    /// No file whose digest was asked for holds a key.
    pub fn has_no_keys(&self) -> bool {
        self.keys.is_empty()
    }

    /// Records that were learned, records of the file.
    #[cfg(test)]
    pub(crate) fn lengths(&self) -> (usize, usize) {
        let learned = self.learned.0.iter().map(|segment| segment.records).sum();
        let mut old = Stream::new(self.old().map(Old::loader).into_iter().flatten());
        (learned, std::iter::from_fn(|| old.advance().then_some(())).count())
    }
}

/// Where somebody who asks one path after the other is.
#[derive(Debug, Default)]
pub(crate) struct Near {
    version: u64,
    held: Held,
    file: Cursor,
    /// For each segment of what was learned.
    learned: Vec<Cursor>,
}

/// A block of the file that has been read. A damaged one is empty.
#[derive(Debug, Default)]
struct Held {
    block: Option<usize>,
    bytes: Vec<u8>,
}

/// What a build found out, in the order in which it did, packed. Made by one thread, to be given to [`DigestCache::add`].
#[derive(Debug, Default)]
pub(crate) struct Run {
    segments: Segments,
    /// Behind the segments.
    open: Packer,
    keys: Vec<(ByBytes, KeyKind)>,
}

impl Run {
    /// Notes the key in a file, if it has one, and, if `keep`, the record for look-ups and later builds.
    pub(crate) fn learn(&mut self, path: &[u8], record: &Record, keep: bool) {
        if let Some(key) = record.key {
            self.keys.push((ByBytes(Arc::from(Path::new(OsStr::from_bytes(path)))), key));
        }
        if !keep || path.is_empty() || path.len() > MAX_PATH || record.capability.len() > MAX_CAPABILITY {
            return;
        }
        if !self.open.push(path, &record.fields()) {
            self.segments.extend(std::mem::take(&mut self.open).finish());
            self.open.push(path, &record.fields());
        }
    }
}

/// Ascending records in memory.
#[derive(Debug)]
struct Segment {
    blocks: Vec<Block>,
    records: usize,
    last_path: Vec<u8>,
}

#[derive(Debug)]
struct Block {
    bytes: Box<[u8]>,
    records: usize,
}

impl Segment {
    /// Takes in what comes behind it.
    fn join(&mut self, behind: Segment) {
        let mut blocks = behind.blocks.into_iter().peekable();
        // Small blocks of many small runs become large ones.
        if let (Some(last), Some(first)) = (self.blocks.last(), blocks.peek())
            && last.records + first.records <= BLOCK_RECORDS
        {
            let mut packer = Packer::default();
            let mut both = Stream::new([self.blocks.pop(), blocks.next()].into_iter().flatten().map(Block::into_bytes));
            while both.advance() {
                packer.push(both.path(), &both.fields());
            }
            self.blocks.extend(packer.finish().into_iter().flat_map(|segment| segment.blocks));
        }
        self.blocks.extend(blocks);
        self.records += behind.records;
        self.last_path = behind.last_path;
    }

    /// What both hold; where they differ, what `newer` says. Memory of theirs becomes free as it goes on.
    fn merge(self, newer: Segment) -> Option<Segment> {
        let mut packer = Packer::default();
        let Ok(()) = merge(self.into_stream(), newer.into_stream(), |path, fields| {
            packer.push(path, fields);
            Ok::<_, Infallible>(())
        });
        packer.finish()
    }

    fn into_stream(self) -> Stream<impl Iterator<Item = Vec<u8>>> {
        Stream::new(self.blocks.into_iter().map(Block::into_bytes))
    }
}

impl Block {
    fn into_bytes(self) -> Vec<u8> {
        self.bytes.into_vec()
    }
}

/// Segments, later ones of which count more. However disorderly they come there are few: those that do not join are
/// merged so that each is less than half of the one before, save the last.
#[derive(Debug, Default)]
struct Segments(Vec<Segment>);

impl Segments {
    fn append(&mut self, segment: Segment) {
        let first = segment.blocks.first().map_or(&b""[..], |block| first_path(&block.bytes));
        match self.0.last_mut() {
            Some(last) if compare_paths(&last.last_path, first).is_lt() => return last.join(segment),
            _ => {}
        }
        while let [.., before, last] = &self.0[..]
            && last.records * 2 >= before.records
        {
            self.merge_last();
        }
        self.0.push(segment);
    }

    fn extend(&mut self, segment: Option<Segment>) {
        if let Some(segment) = segment {
            self.append(segment);
        }
    }

    fn merge_last(&mut self) {
        if let (Some(newer), Some(older)) = (self.0.pop(), self.0.pop()) {
            self.0.extend(older.merge(newer));
        }
    }

    fn into_one(mut self) -> Option<Segment> {
        while self.0.len() > 1 {
            self.merge_last();
        }
        self.0.pop()
    }
}

/// A record whose bytes are elsewhere.
struct Fields<'a> {
    stamp: Stamp,
    day: u32,
    digest: &'a ContentDigest,
    capability: &'a [u8],
    key: Option<KeyKind>,
}

/// A ctime follows that is not the mtime.
const HAS_CTIME: u8 = 1;
/// The file system is another than that of the record before.
const HAS_DEV: u8 = 2;
/// So is the day.
const HAS_DAY: u8 = 4;
const HAS_CAPABILITY: u8 = 8;
const HAS_KEY: u8 = 16;
const FLAGS: u8 = HAS_CTIME | HAS_DEV | HAS_DAY | HAS_CAPABILITY | HAS_KEY;

/// Packs records into blocks.
#[derive(Debug, Default)]
struct Packer {
    blocks: Vec<Block>,
    /// In all.
    records: usize,
    /// The block that is not full.
    open: Vec<u8>,
    open_records: usize,
    /// Of the last record.
    path: Vec<u8>,
    stamp: Stamp,
    day: u32,
}

impl Packer {
    /// Adds a record if its path comes behind the last.
    fn push(&mut self, path: &[u8], fields: &Fields<'_>) -> bool {
        let mut shared = shared_length(&self.path, path);
        if compare_paths(&self.path[shared..], &path[shared..]).is_ge() {
            return false;
        }
        if self.open_records == BLOCK_RECORDS {
            self.close();
        }
        if self.open_records == 0 {
            (shared, self.stamp, self.day) = (0, Stamp::default(), 0);
        }
        put_record(&mut self.open, shared, &path[shared..], (&self.stamp, self.day), fields);
        self.path.truncate(shared);
        self.path.extend_from_slice(&path[shared..]);
        (self.stamp, self.day) = (fields.stamp, fields.day);
        self.open_records += 1;
        self.records += 1;
        true
    }

    fn close(&mut self) {
        if self.open_records > 0 {
            // As long as it is: the room it grew in serves the next.
            self.blocks.push(Block { bytes: self.open.as_slice().into(), records: self.open_records });
            self.open.clear();
            self.open_records = 0;
        }
    }

    fn finish(mut self) -> Option<Segment> {
        self.close();
        let Self { blocks, records, path, .. } = self;
        (records > 0).then_some(Segment { blocks, records, last_path: path })
    }
}

fn put_record(out: &mut Vec<u8>, shared: usize, rest: &[u8], before: (&Stamp, u32), fields: &Fields<'_>) {
    let &Fields { stamp, day, digest, capability, key } = fields;
    let (stamp_before, day_before) = before;
    put(out, shared as u64);
    put_bytes(out, rest);
    let mut flags = 0;
    for (flag, set) in [
        (HAS_CTIME, stamp.ctime != stamp.mtime),
        (HAS_DEV, stamp.dev != stamp_before.dev),
        (HAS_DAY, day != day_before),
        (HAS_CAPABILITY, !capability.is_empty()),
        (HAS_KEY, key.is_some()),
    ] {
        flags |= if set { flag } else { 0 };
    }
    out.push(flags);
    put_difference(out, stamp.ino, stamp_before.ino);
    put(out, stamp.size);
    put_time(out, stamp.mtime, stamp_before.mtime);
    if flags & HAS_CTIME != 0 {
        put_time(out, stamp.ctime, stamp_before.ctime);
    }
    if flags & HAS_DEV != 0 {
        put_difference(out, stamp.dev, stamp_before.dev);
    }
    if flags & HAS_DAY != 0 {
        put_difference(out, day.into(), day_before.into());
    }
    out.extend_from_slice(digest);
    if flags & HAS_CAPABILITY != 0 {
        put_bytes(out, capability);
    }
    if let Some(key) = key {
        out.push(key as u8);
    }
}

/// Modulo 2^64, so that any two numbers have one.
fn put_difference(out: &mut Vec<u8>, number: u64, before: u64) {
    put(out, zigzag(number.wrapping_sub(before).cast_signed()));
}

fn put_time(out: &mut Vec<u8>, time: (i64, u32), before: (i64, u32)) {
    put(out, zigzag(time.0.wrapping_sub(before.0)));
    put_difference(out, time.1.into(), before.1.into());
}

/// Takes bytes off the front.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn byte(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    #[inline]
    fn number(&mut self) -> Option<u64> {
        match self.byte()? {
            byte @ 0..0x80 => Some(byte.into()),
            byte => self.long_number((byte & 0x7f).into()),
        }
    }

    /// Goes on behind the first byte.
    fn long_number(&mut self, mut number: u64) -> Option<u64> {
        for shift in (7..64).step_by(7) {
            let byte = self.byte()?;
            if shift == 63 && byte > 1 {
                return None;
            }
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    fn length(&mut self, most: usize) -> Option<usize> {
        usize::try_from(self.number()?).ok().filter(|&length| length <= most)
    }

    fn difference(&mut self, before: u64) -> Option<u64> {
        Some(before.wrapping_add(unzigzag(self.number()?).cast_unsigned()))
    }

    fn small_difference(&mut self, before: u32) -> Option<u32> {
        u32::try_from(self.difference(before.into())?).ok()
    }

    fn time(&mut self, before: (i64, u32)) -> Option<(i64, u32)> {
        Some((before.0.wrapping_add(unzigzag(self.number()?)), self.small_difference(before.1)?))
    }

    /// Where the next bytes stand.
    fn take(&mut self, length: usize) -> Option<Range<usize>> {
        let end = self.at.checked_add(length).filter(|&end| end <= self.bytes.len())?;
        Some(std::mem::replace(&mut self.at, end)..end)
    }

    /// A path that comes behind `before`: bytes shared with that, and the rest.
    fn path(&mut self, before: &[u8]) -> Option<(usize, &'a [u8])> {
        let shared = self.length(before.len())?;
        let rest = self.length(MAX_PATH - shared)?;
        let rest = &self.bytes[self.take(rest)?];
        compare_paths(&before[shared..], rest).is_lt().then_some((shared, rest))
    }
}

/// First path of a block that was packed here.
fn first_path(block: &[u8]) -> &[u8] {
    Reader { bytes: block, at: 0 }.path(b"").map_or(b"", |(_, path)| path)
}

/// Numbers of a record, and where in its block the rest stands.
#[derive(Debug, Default)]
struct Item {
    stamp: Stamp,
    day: u32,
    digest: usize,
    capability: Range<usize>,
    key: Option<KeyKind>,
}

/// Blocks in order.
trait Table {
    fn blocks(&self) -> usize;

    fn first_path(&self, block: usize) -> &[u8];

    /// The bytes of a block; `held` is for those that are not in memory.
    fn bytes<'a>(&'a self, block: usize, held: &'a mut Held) -> &'a [u8];
}

impl Table for Segment {
    fn blocks(&self) -> usize {
        self.blocks.len()
    }

    fn first_path(&self, block: usize) -> &[u8] {
        first_path(&self.blocks[block].bytes)
    }

    fn bytes<'a>(&'a self, block: usize, _: &'a mut Held) -> &'a [u8] {
        &self.blocks[block].bytes
    }
}

/// A record that has been unpacked, and where in a table it is.
#[derive(Debug, Default)]
struct Cursor {
    block: usize,
    /// Where the next record begins; 0 when none has been unpacked.
    at: usize,
    /// Of the record, or empty.
    path: Vec<u8>,
    item: Item,
    /// When not empty: between this path, which is less than the record's, and the record there is none.
    missed: Vec<u8>,
}

impl Cursor {
    fn enter(&mut self, block: usize) {
        self.block = block;
        self.at = 0;
        self.path.clear();
        self.item = Item::default();
        self.missed.clear();
    }

    /// To the next record of the block. Behind one that is none, there is none.
    fn advance(&mut self, block: &[u8]) -> bool {
        if self.at >= block.len() {
            return false;
        }
        let mut reader = Reader { bytes: block, at: self.at };
        let unpacked = self.unpack(&mut reader);
        self.at = if unpacked.is_some() { reader.at } else { block.len() };
        unpacked.is_some()
    }

    fn unpack(&mut self, reader: &mut Reader<'_>) -> Option<()> {
        let (shared, rest) = reader.path(&self.path)?;
        let before = &self.item.stamp;
        let flags = reader.byte().filter(|flags| flags & !FLAGS == 0)?;
        let ino = reader.difference(before.ino)?;
        let size = reader.number()?;
        let mtime = reader.time(before.mtime)?;
        let ctime = if flags & HAS_CTIME == 0 { mtime } else { reader.time(before.ctime)? };
        let dev = if flags & HAS_DEV == 0 { before.dev } else { reader.difference(before.dev)? };
        let day = if flags & HAS_DAY == 0 { self.item.day } else { reader.small_difference(self.item.day)? };
        let digest = reader.take(blake3::OUT_LEN)?.start;
        let capability = match flags & HAS_CAPABILITY {
            0 => 0..0,
            _ => {
                let length = reader.length(MAX_CAPABILITY)?;
                reader.take(length)?
            }
        };
        let key = if flags & HAS_KEY == 0 { None } else { KeyKind::of_number(reader.byte()?) };
        self.path.truncate(shared);
        self.path.extend_from_slice(rest);
        self.item = Item { stamp: Stamp { dev, ino, size, mtime, ctime }, day, digest, capability, key };
        self.missed.clear();
        Some(())
    }

    /// The record. `block` is its block.
    fn fields<'a>(&self, block: &'a [u8]) -> Fields<'a> {
        const NONE: &ContentDigest = &[0; blake3::OUT_LEN];
        let Item { stamp, day, digest, ref capability, key } = self.item;
        let digest = block.get(digest..).and_then(|rest| rest.first_chunk()).unwrap_or(NONE);
        let capability = block.get(capability.clone()).unwrap_or_default();
        Fields { stamp, day, digest, capability, key }
    }

    fn record(&self, table: &impl Table, held: &mut Held, stamp: &Stamp) -> Option<Record> {
        if self.item.stamp != *stamp {
            return None;
        }
        let Fields { stamp, day, digest, capability, key } = self.fields(table.bytes(self.block, held));
        Some(Record { stamp, digest: *digest, capability: capability.into(), day, key })
    }

    /// Goes to the record of a path, which is not empty. Quick for the one it is at and for those that follow.
    fn find(&mut self, table: &impl Table, held: &mut Held, path: &[u8]) -> bool {
        let onward = if self.at == 0 { Ordering::Less } else { compare_paths(path, &self.path) };
        match onward {
            Ordering::Equal => return true,
            Ordering::Greater => {}
            Ordering::Less if !self.missed.is_empty() && compare_paths(&self.missed, path).is_le() => return false,
            Ordering::Less => match search(table, 0, path) {
                Some(block) => self.enter(block),
                None => return false,
            },
        }
        loop {
            let bytes = table.bytes(self.block, held);
            while self.advance(bytes) {
                match compare_paths(&self.path, path) {
                    Ordering::Less => {}
                    Ordering::Equal => return true,
                    Ordering::Greater => {
                        self.missed.extend_from_slice(path);
                        return false;
                    }
                }
            }
            match search(table, self.block + 1, path) {
                Some(block) => self.enter(block),
                None => return false,
            }
        }
    }
}

/// The last block, from `low` on, that begins with this path or before it.
fn search(table: &impl Table, mut low: usize, path: &[u8]) -> Option<usize> {
    let begins_before = |block: usize| compare_paths(table.first_path(block), path).is_le();
    let mut high = table.blocks();
    if low >= high || !begins_before(low) {
        return None;
    }
    // Mostly it is that one.
    if low + 1 < high && !begins_before(low + 1) {
        return Some(low);
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if begins_before(middle) {
            low = middle;
        } else {
            high = middle;
        }
    }
    Some(low)
}

/// Records in order, block by block.
struct Stream<I> {
    blocks: I,
    bytes: Vec<u8>,
    cursor: Cursor,
}

impl<I: Iterator<Item = Vec<u8>>> Stream<I> {
    fn new(blocks: I) -> Self {
        Self { blocks, bytes: Vec::new(), cursor: Cursor::default() }
    }

    /// To the next record.
    fn advance(&mut self) -> bool {
        while !self.cursor.advance(&self.bytes) {
            match self.blocks.next() {
                Some(bytes) => self.bytes = bytes,
                None => return false,
            }
            self.cursor.enter(0);
        }
        true
    }

    fn path(&self) -> &[u8] {
        &self.cursor.path
    }

    fn fields(&self) -> Fields<'_> {
        self.cursor.fields(&self.bytes)
    }
}

/// Gives out all records in order; of those with the same path `newer`'s.
fn merge<E>(
    mut older: Stream<impl Iterator<Item = Vec<u8>>>,
    mut newer: Stream<impl Iterator<Item = Vec<u8>>>,
    mut give: impl FnMut(&[u8], &Fields<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let (mut has_older, mut has_newer) = (older.advance(), newer.advance());
    while has_older || has_newer {
        let order = match (has_older, has_newer) {
            (true, true) => compare_paths(older.path(), newer.path()),
            (true, false) => Ordering::Less,
            _ => Ordering::Greater,
        };
        if order.is_lt() {
            give(older.path(), &older.fields())?;
        } else {
            give(newer.path(), &newer.fields())?;
        }
        if order.is_le() {
            has_older = older.advance();
        }
        if order.is_ge() {
            has_newer = newer.advance();
        }
    }
    Ok(())
}

/// The file as it was when it was opened: what is written later is another.
#[derive(Debug, Default)]
struct Old {
    /// `None` if there are no blocks.
    file: Option<File>,
    blocks: Vec<Place>,
    /// First paths of the blocks, one behind the other.
    paths: Vec<u8>,
}

/// Where a block is, and what it should be.
#[derive(Debug)]
struct Place {
    offset: u64,
    length: u32,
    /// Of its first path.
    path_end: u32,
    checksum: [u8; CHECKSUM],
}

impl Old {
    fn open(path: &Path) -> io::Result<Old> {
        let read = File::open(path).and_then(Old::read_directory);
        match read {
            // The latter when it is cut at this very moment.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof) => {
                Ok(Old::default())
            }
            read => Ok(read?.unwrap_or_default()),
        }
    }

    /// `None` when the file is no cache, or its directory is damaged.
    fn read_directory(file: File) -> io::Result<Option<Old>> {
        let length = file.metadata()?.len();
        if length < (MAGIC.len() + TRAILER) as u64 {
            return Ok(None);
        }
        let trailer_offset = length - TRAILER as u64;
        let (mut magic, mut trailer) = ([0; MAGIC.len()], [0; TRAILER]);
        file.read_exact_at(&mut magic, 0)?;
        file.read_exact_at(&mut trailer, trailer_offset)?;
        let number = |at: usize| trailer[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let (offset, length) = (number(0), number(8));
        if magic != *MAGIC || length > MAX_DIRECTORY || offset.checked_add(length) != Some(trailer_offset) {
            return Ok(None);
        }
        let mut directory = vec![0; length as usize];
        file.read_exact_at(&mut directory, offset)?;
        if trailer[16..] != *checksum_of_all(&directory, offset).as_bytes() {
            return Ok(None);
        }
        Ok(Old::of_directory(&directory, offset).map(|old| Old { file: Some(file), ..old }))
    }

    /// Blocks fill the file from the magic up to `end`.
    fn of_directory(directory: &[u8], end: u64) -> Option<Old> {
        let (mut blocks, mut paths): (Vec<Place>, Vec<u8>) = (Vec::new(), Vec::new());
        let mut reader = Reader { bytes: directory, at: 0 };
        let (mut offset, mut path_start) = (MAGIC.len() as u64, 0);
        while reader.at < directory.len() {
            let length = reader.length(MAX_BLOCK)? as u32;
            let (shared, rest) = reader.path(&paths[path_start..])?;
            let before = path_start;
            path_start = paths.len();
            paths.extend_from_within(before..before + shared);
            paths.extend_from_slice(rest);
            // The blocks hold these paths whole, so a few bytes cannot stand for endless paths.
            if paths.len() as u64 > end {
                return None;
            }
            let checksum = directory[reader.take(CHECKSUM)?].try_into().ok()?;
            blocks.push(Place { offset, length, path_end: u32::try_from(paths.len()).ok()?, checksum });
            offset += u64::from(length);
        }
        blocks.shrink_to_fit();
        paths.shrink_to_fit();
        (offset == end).then_some(Old { file: None, blocks, paths })
    }

    /// Reads a block. A damaged one is empty.
    fn read(&self, block: usize, bytes: &mut Vec<u8>) {
        let place = &self.blocks[block];
        bytes.resize(place.length as usize, 0);
        let read = self.file.as_ref().is_some_and(|file| file.read_exact_at(bytes, place.offset).is_ok());
        if !read || checksum(bytes) != place.checksum {
            bytes.clear();
        }
    }

    /// All blocks, one after the other.
    fn loader(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        (0..self.blocks.len()).map(|block| {
            let mut bytes = Vec::new();
            self.read(block, &mut bytes);
            bytes
        })
    }
}

impl Table for Old {
    fn blocks(&self) -> usize {
        self.blocks.len()
    }

    fn first_path(&self, block: usize) -> &[u8] {
        let start = block.checked_sub(1).map_or(0, |before| self.blocks[before].path_end);
        &self.paths[start as usize..self.blocks[block].path_end as usize]
    }

    fn bytes<'a>(&'a self, block: usize, held: &'a mut Held) -> &'a [u8] {
        if held.block != Some(block) {
            self.read(block, &mut held.bytes);
            held.block = Some(block);
        }
        &held.bytes
    }
}

fn checksum(block: &[u8]) -> [u8; CHECKSUM] {
    blake3::hash(block).as_bytes().first_chunk().copied().unwrap_or_default()
}

/// Of all that the blocks' own do not cover.
fn checksum_of_all(directory: &[u8], offset: u64) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(MAGIC).update(directory);
    hasher.update(&offset.to_le_bytes()).update(&(directory.len() as u64).to_le_bytes());
    hasher.finalize()
}

/// Puts a new file in the place of the old one: of both all records that were used on `oldest` or later.
fn write_file(path: &Path, old: Option<&Old>, learned: Option<Segment>, oldest: u32) -> io::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file = tempfile::NamedTempFile::new_in(dir)?;
    let mut writer = Writer::new(BufWriter::with_capacity(1 << 16, file))?;
    let older = Stream::new(old.map(Old::loader).into_iter().flatten());
    let newer =
        Stream::new(learned.map(|learned| learned.blocks.into_iter().map(Block::into_bytes)).into_iter().flatten());
    merge(older, newer, |path, fields| if fields.day >= oldest { writer.push(path, fields) } else { Ok(()) })?;
    let file = writer.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.persist(path)?;
    Ok(())
}

/// Writes a file.
struct Writer<W> {
    out: W,
    packer: Packer,
    offset: u64,
    directory: Vec<u8>,
    /// Of the block before.
    first_path: Vec<u8>,
}

impl<W: Write> Writer<W> {
    fn new(mut out: W) -> io::Result<Self> {
        out.write_all(MAGIC)?;
        let offset = MAGIC.len() as u64;
        Ok(Self { out, packer: Packer::default(), offset, directory: Vec::new(), first_path: Vec::new() })
    }

    fn push(&mut self, path: &[u8], fields: &Fields<'_>) -> io::Result<()> {
        self.packer.push(path, fields);
        self.write_blocks()
    }

    fn write_blocks(&mut self) -> io::Result<()> {
        for Block { bytes, .. } in self.packer.blocks.drain(..) {
            let path = first_path(&bytes);
            put(&mut self.directory, bytes.len() as u64);
            put_path(&mut self.directory, &mut self.first_path, path);
            self.directory.extend_from_slice(&checksum(&bytes));
            self.out.write_all(&bytes)?;
            self.offset += bytes.len() as u64;
        }
        Ok(())
    }

    fn finish(mut self) -> io::Result<W> {
        self.packer.close();
        self.write_blocks()?;
        let Self { mut out, offset, directory, .. } = self;
        out.write_all(&directory)?;
        out.write_all(&offset.to_le_bytes())?;
        out.write_all(&(directory.len() as u64).to_le_bytes())?;
        out.write_all(checksum_of_all(&directory, offset).as_bytes())?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 7
        }

        fn below(&mut self, end: usize) -> usize {
            (self.next() % end as u64) as usize
        }
    }

    /// Paths that share much, in which `/` and bytes below it stand at the same places.
    fn path(random: &mut Random) -> Vec<u8> {
        let mut path = b"/home/somebody/project".to_vec();
        for _ in 0..=random.below(3) {
            path.push(b'/');
            path.extend((0..=random.below(3)).map(|_| b"ab-\xff!0"[random.below(6)]));
        }
        path
    }

    fn time(random: &mut Random) -> (i64, u32) {
        match random.below(8) {
            0 => (i64::MIN, u32::MAX),
            1 => (i64::MAX, 0),
            2 => (-1 - (random.next() % 1000) as i64, 999_999_999),
            _ => (1_700_000_000 + (random.next() % 100_000) as i64, (random.next() % 1_000_000_000) as u32),
        }
    }

    fn record(random: &mut Random, day: u32) -> Record {
        let mtime = time(random);
        let stamp = Stamp {
            dev: [3, 3, 3, 2051, u64::MAX][random.below(5)],
            ino: if random.below(20) == 0 { u64::MAX - random.next() } else { 10_000_000 + random.next() % 1000 },
            size: random.next() >> random.below(57),
            mtime,
            ctime: if random.below(2) == 0 { mtime } else { time(random) },
        };
        let capability = vec![7; if random.below(10) == 0 { random.below(MAX_CAPABILITY + 1) } else { 0 }].into();
        let key = if random.below(10) == 0 { KeyKind::of_number((random.next() % 9) as u8) } else { None };
        Record { stamp, digest: *blake3::hash(&random.next().to_le_bytes()).as_bytes(), capability, day, key }
    }

    fn load(path: &Path) -> DigestCache {
        let mut cache = DigestCache::open(path);
        cache.ready().unwrap();
        cache
    }

    fn learn<'a>(cache: &mut DigestCache, records: impl IntoIterator<Item = (&'a [u8], &'a Record)>) {
        let mut run = Run::default();
        for (path, record) in records {
            run.learn(path, record, true);
        }
        cache.add(run);
    }

    /// A file with so many records, and these.
    fn written(file: &Path, random: &mut Random, count: usize) -> Vec<(Vec<u8>, Record)> {
        let mut records: BTreeMap<Vec<u8>, Record> = BTreeMap::new();
        while records.len() < count {
            records.insert(path(random), record(random, today()));
        }
        let mut cache = load(file);
        learn(&mut cache, records.iter().map(|(path, record)| (path.as_slice(), record)));
        cache.save().unwrap();
        records.into_iter().collect()
    }

    /// Asks for all of these in their order.
    fn check(cache: &DigestCache, asked: &[&Vec<u8>], model: &BTreeMap<Vec<u8>, Record>) {
        let mut near = Near::default();
        for &path in asked {
            let expected = model.get(path);
            let stamp = expected.map_or(Stamp::default(), |record| record.stamp);
            assert_eq!(cache.look_up(path, &stamp, &mut near).as_ref(), expected);
            let other = Stamp { size: stamp.size ^ 1, ..stamp };
            assert_eq!(cache.look_up(path, &other, &mut near), None);
        }
    }

    #[test]
    fn all_that_is_learned_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let mut random = Random(0x1234_5678_9abc_def1);
        for round in 0..30 {
            let file = dir.path().join(round.to_string());
            let mut cache = load(&file);
            let mut model = BTreeMap::new();
            let mut paths: Vec<Vec<u8>> = (0..[5, 70, 900][round % 3]).map(|_| path(&mut random)).collect();
            paths.push(Vec::new());
            for step in 0..12 {
                let count = random.below(paths.len());
                let mut learned: Vec<_> = (0..count)
                    .map(|_| (paths[1 + random.below(count)].clone(), record(&mut random, today())))
                    .collect();
                match step % 4 {
                    0 | 1 => learned.sort_by(|a, b| compare_paths(&a.0, &b.0)),
                    2 => learned.sort_by(|a, b| compare_paths(&b.0, &a.0)),
                    _ => {}
                }
                let at_once = [1, 10, 1000][random.below(3)];
                for some in learned.chunks(at_once) {
                    learn(&mut cache, some.iter().map(|(path, record)| (path.as_slice(), record)));
                }
                model.extend(learned.into_iter().filter(|(path, _)| !path.is_empty()));
                match random.below(4) {
                    0 => cache.save().unwrap(),
                    1 => {
                        cache.save().unwrap();
                        cache = load(&file);
                    }
                    _ => {}
                }
                cache.ready().unwrap();
                let mut asked: Vec<_> = paths.iter().collect();
                check(&cache, &asked, &model);
                asked.sort_by(|a, b| compare_paths(a, b));
                check(&cache, &asked, &model);
                asked.reverse();
                check(&cache, &asked, &model);
            }
            cache.save().unwrap();
            assert_eq!(load(&file).lengths(), (0, model.len()));
            // Nobody who wrote it has left anything else behind.
            std::fs::remove_file(&file).unwrap();
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn positions_of_another_cache_do_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        let mut random = Random(0xabcd_ef01_2345_6789);
        let files = ["a", "b"].map(|name| dir.path().join(name));
        let known = files.each_ref().map(|file| written(file, &mut random, 200));
        let caches = files.each_ref().map(|file| load(file));
        let mut near = Near::default();
        for at in 0..200 {
            for (cache, known) in caches.iter().zip(&known) {
                let (path, record) = &known[at];
                assert_eq!(cache.look_up(path, &record.stamp, &mut near).as_ref(), Some(record));
            }
        }
    }

    #[test]
    fn disorder_makes_few_segments() {
        let mut random = Random(0x7777_1234_0000_aaaa);
        let record = record(&mut random, 1);
        let mut cache = DigestCache::open(Path::new("/nowhere"));
        for number in (0..2000).rev() {
            learn(&mut cache, [(format!("/d/{number:05}").as_bytes(), &record)]);
            assert!(cache.learned.0.len() < 14, "{number}");
        }
        // From two sources in turn.
        let mut run = Run::default();
        for number in 0..2000 {
            let dir = if number % 2 == 0 { "b" } else { "a" };
            run.learn(format!("/{dir}/{number:05}").as_bytes(), &record, true);
            assert!(run.segments.0.len() < 14, "{number}");
        }
        cache.add(run);
        assert_eq!(cache.lengths().0, 4000);
        // One by one in order: as if at once.
        let mut cache = DigestCache::open(Path::new("/nowhere"));
        for number in 0..2000 {
            learn(&mut cache, [(format!("/d/{number:05}").as_bytes(), &record)]);
        }
        assert_eq!((cache.learned.0.len(), cache.learned.0[0].blocks.len()), (1, 2000_usize.div_ceil(BLOCK_RECORDS)));
    }

    #[test]
    fn records_that_nobody_uses_are_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("digests");
        let mut random = Random(0x5555_0000_1111_2222);
        let mut save = |paths: &[&str], day: u32| {
            let records = paths.iter().map(|path| (path.as_bytes(), record(&mut random, day))).collect::<Vec<_>>();
            let mut cache = load(&file);
            learn(&mut cache, records.iter().map(|(path, record)| (*path, record)));
            let learned = std::mem::take(&mut cache.learned).into_one();
            write_file(&file, cache.old(), learned, day.saturating_sub(KEEP_DAYS)).unwrap();
            load(&file).lengths().1
        };
        assert_eq!(save(&["/a", "/b", "/c"], 100), 3);
        assert_eq!(save(&["/b"], 100 + KEEP_DAYS), 3);
        assert_eq!(save(&["/d"], 101 + KEEP_DAYS), 2);
        assert_eq!(save(&[], 1000), 0);
        let record = Record { day: 50, ..record(&mut random, 0) };
        assert_eq!((record.is_stale(50 + REMEMBER_DAYS - 1), record.is_stale(50 + REMEMBER_DAYS)), (false, true));
    }

    #[test]
    fn nothing_is_written_when_nothing_was_learned() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("digests");
        let mut cache = load(&file);
        let key = Record { key: Some(KeyKind::Npm), ..record(&mut Random(99), 1) };
        let mut run = Run::default();
        run.learn(b"/x", &key, false);
        cache.add(run);
        cache.save().unwrap();
        assert!(!file.exists() && cache.is_empty() && !cache.has_no_keys());
        assert_eq!((cache.key_in(Path::new("/x")), cache.key_in(Path::new("/y"))), (Some(KeyKind::Npm), None));
        // What is too long is not remembered.
        learn(&mut cache, [(vec![b'/'; MAX_PATH + 1].as_slice(), &key), (b"", &key)]);
        learn(&mut cache, [(&b"/y"[..], &Record { capability: vec![1; MAX_CAPABILITY + 1].into(), ..key.clone() })]);
        assert!(cache.is_empty());
        let long = Record { capability: vec![1; MAX_CAPABILITY].into(), ..key };
        learn(&mut cache, [(vec![b'/'; MAX_PATH].as_slice(), &Record { day: today(), ..long })]);
        cache.save().unwrap();
        assert_eq!(load(&file).lengths(), (0, 1));
    }

    #[test]
    fn damaged_caches_hold_nothing_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("digests");
        let known = written(&file, &mut Random(0x0bad_cafe_0bad_cafe), 2 * BLOCK_RECORDS + 6);
        let good = std::fs::read(&file).unwrap();
        let damaged = dir.path().join("damaged");
        let right = |bytes: &[u8]| {
            std::fs::write(&damaged, bytes).unwrap();
            let cache = load(&damaged);
            let mut near = Near::default();
            let found = known.iter().filter(|(path, record)| {
                let found = cache.look_up(path, &record.stamp, &mut near);
                assert!(found.as_ref().is_none_or(|found| found == record));
                found.is_some()
            });
            let found = found.count();
            assert_eq!(cache.lengths(), (0, found));
            found
        };
        assert_eq!(right(&good), known.len());
        for length in 0..good.len() {
            assert_eq!(right(&good[..length]), 0, "cut to {length}");
        }
        assert_eq!(right(&[&good[..], b"x"].concat()), 0);
        let directory = u64::from_le_bytes(*good[good.len() - TRAILER..].first_chunk().unwrap()) as usize;
        let mut bytes = good.clone();
        for at in 0..good.len() {
            bytes[at] ^= 1 << (at % 8);
            let found = right(&bytes);
            if (MAGIC.len()..directory).contains(&at) {
                assert!(found >= known.len() - BLOCK_RECORDS && found < known.len(), "byte {at}: {found}");
            } else {
                assert_eq!(found, 0, "byte {at}");
            }
            bytes[at] = good[at];
        }
        // One that is damaged is written anew from what is left.
        bytes[MAGIC.len() + 5] ^= 1;
        let left = right(&bytes);
        let mut cache = load(&damaged);
        learn(&mut cache, [(&b"/new"[..], &known[0].1)]);
        cache.save().unwrap();
        assert_eq!(load(&damaged).lengths(), (0, left + 1));
        // A former format.
        assert_eq!(right(b"nacre digests 2\n"), 0);
        // What claims to be long.
        let mut bytes = good.clone();
        let trailer = bytes.len() - TRAILER;
        bytes[trailer..trailer + 16].fill(0xff);
        assert_eq!(right(&bytes), 0);
        assert!(DigestCache::open(dir.path()).ready().is_err(), "a directory is no file");
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("digests");
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let known = written(&file, &mut random, 70);
        let old = Old::open(&file).unwrap();
        let blocks: Vec<Vec<u8>> = old.loader().collect();
        let good = std::fs::read(&file).unwrap();
        let (trailer, end) = (good.len() - TRAILER, MAGIC.len() + blocks.concat().len());
        for round in 0..4000 {
            let mut change = |bytes: &mut Vec<u8>| {
                if round % 4 == 0 {
                    bytes.clear();
                    bytes.extend((0..random.next() % 200).map(|_| (random.next() >> 32) as u8));
                }
                for _ in 0..random.next() % 4 {
                    let at = random.below(bytes.len().max(1));
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte = random.next() as u8;
                    }
                }
            };
            let mut directory = good[end..trailer].to_vec();
            change(&mut directory);
            if let Some(old) = Old::of_directory(&directory, end as u64) {
                assert!((1..old.blocks()).all(|at| compare_paths(old.first_path(at - 1), old.first_path(at)).is_lt()));
            }
            // As if the checksums were right, so that the reader behind them is reached.
            let block = |bytes: &Vec<u8>| {
                let mut bytes = bytes.clone();
                change(&mut bytes);
                Block { bytes: bytes.into(), records: 1 }
            };
            let segment = Segment { blocks: blocks.iter().map(block).collect(), records: 70, last_path: Vec::new() };
            let (mut near, mut cursor) = (Held::default(), Cursor::default());
            for (path, record) in &known {
                if cursor.find(&segment, &mut near, path) {
                    cursor.record(&segment, &mut near, &record.stamp);
                }
            }
            let mut packer = Packer::default();
            let mut stream = segment.into_stream();
            while stream.advance() {
                packer.push(stream.path(), &stream.fields());
            }
            let packed = packer.finish().map_or(0, |segment| segment.records);
            assert!(packed <= 70 + 3 * 200);
        }
    }

    #[test]
    fn hostile_directories() {
        type Entry<'a> = (u64, u64, &'a [u8]);
        let blocks = |entries: &[Entry<'_>], end: u64| {
            let mut directory = Vec::new();
            for (length, shared, rest) in entries {
                put(&mut directory, *length);
                put(&mut directory, *shared);
                put_bytes(&mut directory, rest);
                directory.extend([0; CHECKSUM]);
            }
            Old::of_directory(&directory, end).map(|old| old.blocks())
        };
        let long = vec![b'a'; MAX_PATH];
        let most = MAX_BLOCK as u64;
        assert_eq!(blocks(&[], 16), Some(0));
        assert_eq!(blocks(&[(50, 0, b"/a"), (50, 1, b"b")], 116), Some(2));
        assert_eq!(blocks(&[(most, 0, &long)], 16 + most), Some(1));
        for (entries, end) in [
            (&[(50, 0, &b"/a"[..]), (50, 1, b"b")][..], 115),
            (&[(50, 0, b"/b"), (50, 1, b"a")], 116),
            (&[(50, 0, b"/a"), (50, 2, b"")], 116),
            (&[(50, 0, b"/a"), (50, 3, b"b")], 116),
            (&[(50, 0, b"")], 66),
            (&[(most + 1, 0, b"/a")], 17 + most),
            (&[(u64::MAX, 0, b"/a"), (51, 0, b"/b")], 66),
            (&[(50_000, 0, &long), (50, MAX_PATH as u64, b"a")], 50_066),
            // Longer than what they are said to stand in.
            (&[(0, 0, &long[1..]), (0, MAX_PATH as u64 - 1, b"a"), (17_000, 0, b"b")], 17_016),
        ] {
            assert_eq!(blocks(entries, end), None, "{end}");
        }
    }

    #[test]
    fn several_threads_ask() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("digests");
        let known = written(&file, &mut Random(0x1357_9bdf_0246_8ace), 600);
        let mut cache = load(&file);
        learn(&mut cache, known[100..300].iter().map(|(path, record)| (path.as_slice(), record)));
        let (cache, known) = (&cache, &known);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                scope.spawn(move || {
                    let mut near = Near::default();
                    for at in 0..2000 {
                        let (path, record) = &known[(at * (thread + 1)) % known.len()];
                        assert_eq!(cache.look_up(path, &record.stamp, &mut near).as_ref(), Some(record));
                    }
                });
            }
        });
    }
}
