//! The tar format, without any meaning for images: headers to bytes, and a stream of bytes to headers.
//!
//! Written are `ustar` blocks with PAX records in front where the old fields do not suffice. Read are v7, ustar, PAX and
//! GNU; extension headers are resolved here, so that callers see one kind of [`Header`]. The bytes may be hostile.

use std::collections::BTreeMap;
use std::io::{self, BufRead, Read};

use super::layer::{LayerError, Limits};
use super::{file_name, join, parent};

pub(super) const BLOCK: usize = 512;

/// One tar entry without its data, independent of the dialect.
#[derive(Debug, Clone, Default)]
pub(super) struct Header {
    /// As it stands in the tar.
    pub(super) name: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) typeflag: u8,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) size: u64,
    pub(super) mtime: (i64, u32),
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Header {
    /// The header's blocks, PAX records included.
    #[cfg(test)]
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.encode_to(&mut out);
        out
    }

    /// Appends the header's blocks, PAX records included.
    pub(super) fn encode_to(&self, out: &mut Vec<u8>) {
        let mut records: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        let mut record = |key: &[u8], value: Vec<u8>| drop(records.insert(key.to_vec(), value));
        let fits = |text: &[u8]| text.len() <= 100 && text.is_ascii();
        if !fits(&self.name) {
            record(b"path", self.name.clone());
        }
        if !fits(&self.link) {
            record(b"linkpath", self.link.clone());
        }
        if self.size >> 33 != 0 {
            record(b"size", self.size.to_string().into_bytes());
        }
        if self.uid >> 21 != 0 {
            record(b"uid", self.uid.to_string().into_bytes());
        }
        if self.gid >> 21 != 0 {
            record(b"gid", self.gid.to_string().into_bytes());
        }
        if self.mtime.0 >> 33 != 0 {
            record(b"mtime", self.mtime.0.to_string().into_bytes());
        }
        for (name, value) in &self.xattrs {
            record(&[b"SCHILY.xattr.", name.as_slice()].concat(), value.clone());
        }
        if !records.is_empty() {
            let mut data = Vec::new();
            for (key, value) in &records {
                data.extend_from_slice(&pax_record(key, value));
            }
            let directory = parent(self.name.strip_suffix(b"/").unwrap_or(&self.name));
            let base = file_name(self.name.strip_suffix(b"/").unwrap_or(&self.name));
            let name = join(&join(directory, b"PaxHeaders.0"), base);
            let extended = Header { name, typeflag: b'x', size: data.len() as u64, ..Header::default() };
            out.extend_from_slice(&extended.block());
            out.extend_from_slice(&data);
            out.resize(out.len() + padding(data.len() as u64), 0);
        }
        out.extend_from_slice(&self.block());
    }

    /// The ustar block; what does not fit is cut or zero, and stands in a PAX record.
    pub(super) fn block(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        let mut text = |at: usize, text: &[u8]| {
            let ascii = text.iter().copied().filter(u8::is_ascii).take(100);
            block[at..at + 100].iter_mut().zip(ascii).for_each(|(field, byte)| *field = byte);
        };
        text(0, &self.name);
        text(157, &self.link);
        let mut octal = |at: usize, length: usize, number: u64| {
            let digits = length - 1;
            let mut rest = if number >> (3 * digits) == 0 { number } else { 0 };
            for place in block[at..at + digits].iter_mut().rev() {
                *place = b'0' + (rest & 7) as u8;
                rest >>= 3;
            }
        };
        octal(100, 8, u64::from(self.mode));
        octal(108, 8, u64::from(self.uid));
        octal(116, 8, u64::from(self.gid));
        octal(124, 12, self.size);
        octal(136, 12, u64::try_from(self.mtime.0).unwrap_or(0));
        for (at, number) in [(329, self.major), (337, self.minor)] {
            octal(at, 8, u64::from(number));
        }
        for (at, number) in [(329, self.major), (337, self.minor)] {
            // There is no PAX record for devices; this is GNU's way, which all readers know.
            if number >> 21 != 0 {
                block[at..at + 4].copy_from_slice(&[0x80, 0, 0, 0]);
                block[at + 4..at + 8].copy_from_slice(&number.to_be_bytes());
            }
        }
        block[156] = self.typeflag;
        block[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum::<u32>() + 8 * u32::from(b' ');
        for (at, place) in block[148..154].iter_mut().rev().enumerate() {
            *place = b'0' + (sum >> (3 * at) & 7) as u8;
        }
        block[154..156].copy_from_slice(b"\0 ");
        block
    }
}

/// `LENGTH KEY=VALUE\n`, where the length counts its own digits.
pub(super) fn pax_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + rest.to_string().len();
    length = rest + length.to_string().len();
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

pub(super) fn read_some(reader: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match reader.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Zero bytes between the end of the data and the next block.
pub(super) fn padding(size: u64) -> usize {
    (size.wrapping_neg() % BLOCK as u64) as usize
}

pub(super) fn show(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

/// The headers of a tar stream, dialects and extension headers resolved.
pub(super) struct TarStream<'a> {
    reader: &'a mut dyn BufRead,
    offset: u64,
    /// Data and padding of the current entry that nobody has read.
    unread: u64,
    padding: usize,
    limits: Limits,
}

impl<'a> TarStream<'a> {
    pub(super) fn new(reader: &'a mut dyn BufRead, limits: Limits) -> Self {
        Self { reader, offset: 0, unread: 0, padding: 0, limits }
    }

    /// Fills the buffer, or less at the end of the stream; the length.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, LayerError> {
        let mut length = 0;
        while length < buffer.len() {
            match read_some(self.reader, &mut buffer[length..]) {
                Ok(0) => break,
                Ok(more) => length += more,
                Err(source) => return Err(read_error(source)),
            }
        }
        self.offset += length as u64;
        Ok(length)
    }

    fn malformed<T>(&self, what: &'static str) -> Result<T, LayerError> {
        Err(LayerError::Malformed { offset: self.offset.saturating_sub(BLOCK as u64), what })
    }

    /// Data of an extension header.
    fn extension(&mut self, size: u64) -> Result<Vec<u8>, LayerError> {
        if size > self.limits.header_bytes {
            return Err(LayerError::Limit { what: "bytes in a header", limit: self.limits.header_bytes });
        }
        let mut data = vec![0; size as usize + padding(size)];
        if self.fill(&mut data)? < size as usize {
            return self.malformed("ends inside a header");
        }
        data.truncate(size as usize);
        Ok(data)
    }

    pub(super) fn drain(&mut self) -> Result<(), LayerError> {
        let mut buffer = [0; 1 << 14];
        while self.fill(&mut buffer)? != 0 {}
        Ok(())
    }

    /// The next entry; its data is behind [`Self::data`]. Global headers are passed over unless `report_global`.
    pub(super) fn next(&mut self, report_global: bool) -> Result<Option<Header>, LayerError> {
        let mut records: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        let (mut long_name, mut long_link) = (None, None);
        let mut extensions = 0_u64;
        loop {
            let mut skip = [0; 1 << 13];
            while self.unread > 0 {
                let wanted = self.unread.min(skip.len() as u64) as usize;
                if self.fill(&mut skip[..wanted])? < wanted {
                    return self.malformed("ends inside a file");
                }
                self.unread -= wanted as u64;
            }
            let rest = std::mem::take(&mut self.padding);
            let mut block = [0; BLOCK];
            // Some writers leave the padding and the zero blocks at the end out.
            if self.fill(&mut block[..rest])? < rest {
                return Ok(None);
            }
            match self.fill(&mut block)? {
                0 => return Ok(None),
                BLOCK => {}
                _ => return self.malformed("ends inside a header"),
            }
            if block == [0; BLOCK] {
                let length = self.fill(&mut block)?;
                if length < BLOCK || block == [0; BLOCK] {
                    return Ok(None);
                }
                return self.malformed("entry after a zero block");
            }
            let Some(mut header) = parse_block(&block) else {
                return self.malformed("bad header");
            };
            match header.typeflag {
                b'x' | b'g' | b'L' | b'K' => {
                    // Only the data of the last one of each counts, so memory stays bounded; so must the time be.
                    extensions += 1;
                    if extensions > 1000 {
                        return self.malformed("too many extension headers");
                    }
                    let data = self.extension(header.size)?;
                    let until_nul = |data: Vec<u8>| data.split(|&byte| byte == 0).next().map(<[u8]>::to_vec);
                    match header.typeflag {
                        b'x' => {
                            records = match pax_records(&data) {
                                Some(records) => records,
                                None => return self.malformed("bad PAX record"),
                            }
                        }
                        b'L' => long_name = until_nul(data),
                        b'K' => long_link = until_nul(data),
                        _ if report_global => return Ok(Some(header)),
                        _ => {}
                    }
                    continue;
                }
                _ => {}
            }
            if header.merge(records).is_none() {
                return self.malformed("bad PAX value");
            }
            header.name = long_name.unwrap_or(header.name);
            header.link = long_link.unwrap_or(header.link);
            if matches!(header.typeflag, 0 | b'0' | b'7') {
                header.typeflag = if header.typeflag == 0 && header.name.ends_with(b"/") { b'5' } else { b'0' };
            }
            // The other kinds have no data, whatever their size field says.
            if !matches!(header.typeflag, b'1'..=b'6') {
                self.unread = header.size;
                self.padding = padding(header.size);
            }
            return Ok(Some(header));
        }
    }

    /// The data of the current entry.
    pub(super) fn data(&mut self) -> Data<'_, 'a> {
        Data { stream: self, hasher: blake3::Hasher::new(), failed: None }
    }
}

/// The data of a file on its way to a sink, digested as it passes.
pub(super) struct Data<'s, 'a> {
    stream: &'s mut TarStream<'a>,
    pub(super) hasher: blake3::Hasher,
    /// The stream's own failure, to tell it from the sink's.
    pub(super) failed: Option<LayerError>,
}

impl Read for Data<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.fill_buf()?.read(buffer)?;
        self.consume(length);
        Ok(length)
    }
}

impl BufRead for Data<'_, '_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.stream.unread == 0 {
            return Ok(&[]);
        }
        let failure = match self.stream.reader.fill_buf().map(<[u8]>::is_empty) {
            Ok(false) => {
                // The same bytes again: none were consumed.
                let bytes = self.stream.reader.fill_buf()?;
                return Ok(&bytes[..bytes.len().min(usize::try_from(self.stream.unread).unwrap_or(usize::MAX))]);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Err(error),
            Ok(true) => LayerError::Malformed { offset: self.stream.offset, what: "ends inside a file" },
            Err(source) => read_error(source),
        };
        self.failed = Some(failure);
        Err(io::ErrorKind::UnexpectedEof.into())
    }

    fn consume(&mut self, count: usize) {
        if let (1.., Ok(bytes)) = (count, self.stream.reader.fill_buf()) {
            self.hasher.update(&bytes[..count]);
            self.stream.reader.consume(count);
            self.stream.unread -= count as u64;
            self.stream.offset += count as u64;
        }
    }
}

/// A failed read; a limit that a decompressor ran into comes as such.
fn read_error(source: io::Error) -> LayerError {
    match source.downcast::<RatioExceeded>() {
        Ok(RatioExceeded { limit }) => LayerError::Limit { what: "uncompressed bytes per compressed byte", limit },
        Err(source) => LayerError::Read { source },
    }
}

/// Passes through `io::Error` from the reader that watches the ratio.
#[derive(Debug, thiserror::Error)]
#[error("more than {limit} uncompressed bytes per compressed byte")]
pub(super) struct RatioExceeded {
    pub(super) limit: u64,
}

/// Reads one header block; `None` when the check sum or a number is wrong.
fn parse_block(block: &[u8; BLOCK]) -> Option<Header> {
    let stored = parse_octal(&block[148..156])?;
    let outside = || block[..148].iter().chain(&block[156..]);
    let unsigned = outside().map(|&byte| i64::from(byte)).sum::<i64>() + 8 * 32;
    let signed = outside().map(|&byte| i64::from(byte as i8)).sum::<i64>() + 8 * 32;
    let stored = i64::try_from(stored).ok()?;
    if stored != unsigned && stored != signed {
        return None;
    }
    let text =
        |range: std::ops::Range<usize>| block[range].split(|&byte| byte == 0).next().unwrap_or_default().to_vec();
    let owner = |range: std::ops::Range<usize>| u32::try_from(parse_number(&block[range])?).ok();
    let mut header = Header {
        name: text(0..100),
        link: text(157..257),
        typeflag: block[156],
        mode: (parse_number(&block[100..108])? & 0o7777) as u32,
        uid: owner(108..116)?,
        gid: owner(116..124)?,
        size: u64::try_from(parse_number(&block[124..136])?).ok()?,
        mtime: (parse_number(&block[136..148])?, 0),
        ..Header::default()
    };
    let posix = &block[257..263] == b"ustar\0";
    let gnu = &block[257..265] == b"ustar  \0";
    if posix || gnu {
        header.major = owner(329..337)?;
        header.minor = owner(337..345)?;
    }
    if posix {
        // The older `star` dialect has times behind a shorter prefix.
        let prefix = text(if &block[508..512] == b"tar\0" { 345..476 } else { 345..500 });
        header.name = if prefix.is_empty() { header.name } else { [prefix.as_slice(), b"/", &header.name].concat() };
    }
    Some(header)
}

/// Octal text, or GNU's big-endian binary with the top bit set.
fn parse_number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 == 0 {
        return i64::try_from(parse_octal(field)?).ok();
    }
    let invert = if first & 0x40 == 0 { 0 } else { 0xff };
    let mut number = 0_u64;
    for (at, byte) in field.iter().enumerate() {
        let byte = (byte ^ invert) & if at == 0 { 0x7f } else { 0xff };
        if number >> 56 != 0 {
            return None;
        }
        number = number << 8 | u64::from(byte);
    }
    let number = i64::try_from(number).ok()?;
    Some(if invert == 0 { number } else { !number })
}

fn parse_octal(field: &[u8]) -> Option<u64> {
    let blank = |byte: &u8| matches!(byte, b' ' | 0);
    let start = field.iter().position(|byte| !blank(byte)).unwrap_or(field.len());
    let digits = field[start..].split(blank).next().unwrap_or_default();
    if digits.is_empty() {
        return Some(0);
    }
    // `from_str_radix` would take a sign.
    digits.iter().all(u8::is_ascii_digit).then_some(())?;
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()
}

fn pax_records(mut data: &[u8]) -> Option<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut records = BTreeMap::new();
    while !data.is_empty() {
        let blank = data.iter().take(20).position(|&byte| byte == b' ')?;
        let length: usize = std::str::from_utf8(&data[..blank]).ok()?.parse().ok()?;
        let record = data.get(blank + 1..length)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|&byte| byte == b'=')?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        if key.is_empty() || key.contains(&0) {
            return None;
        }
        records.insert(key.to_vec(), value.to_vec());
        data = &data[length..];
    }
    Some(records)
}

/// Seconds with a fraction, which is cut to nanoseconds.
fn pax_time(text: &str) -> Option<(i64, u32)> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanoseconds: u32 = format!("{fraction:0<9}").get(..9)?.parse().ok()?;
    match (whole.starts_with('-'), nanoseconds) {
        (true, 1..) => Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds)),
        _ => Some((seconds, nanoseconds)),
    }
}

impl Header {
    /// Puts PAX records over the fields; `None` when one is malformed.
    fn merge(&mut self, records: BTreeMap<Vec<u8>, Vec<u8>>) -> Option<()> {
        let text = |value: &[u8]| String::from_utf8(value.to_vec()).ok();
        for (key, value) in records {
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                self.xattrs.insert(name.to_vec(), value);
                continue;
            }
            // An empty value takes a record back.
            if value.is_empty() {
                continue;
            }
            match key.as_slice() {
                b"path" => self.name = value,
                b"linkpath" => self.link = value,
                b"size" => self.size = text(&value)?.parse::<i64>().ok()?.try_into().ok()?,
                b"uid" => self.uid = text(&value)?.parse().ok()?,
                b"gid" => self.gid = text(&value)?.parse().ok()?,
                b"mtime" => self.mtime = pax_time(&text(&value)?)?,
                // Data of such a file is a map and fragments; taking it for the file would be silent damage.
                key if key.starts_with(b"GNU.sparse.") => self.typeflag = b'S',
                _ => {}
            }
        }
        Some(())
    }
}
