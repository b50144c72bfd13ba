//! gzip members that say how long they are, so that they can be read whole.
//!
//! ```text
//! 1f 8b 08 04  mtime 0 (4 bytes)  0  255     flag 04: extra field (RFC 1952)
//! 08 00  'N' 'C' 04 00  length of the member (u32, little-endian)
//! deflate …  CRC-32  length of the plain bytes (u32, little-endian)
//! ```
//! Every gzip reader passes the extra field over. Who knows it can decompress a member in one go, which libdeflate does in
//! three quarters of the time that a reader of streams needs. The lengths are hints of whoever made the blob, and not trusted: what
//! does not hold is read as a stream, as everything else is.

use std::io::{self, BufRead, Cursor, Read};
use std::ops::Range;

use flate2::bufread::MultiGzDecoder;

use crate::sys::gunzip::Gunzip;

/// What stands in front of the length.
const BEGIN: [u8; 16] = [0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 255, 8, 0, b'N', b'C', 4, 0];
const HEADER_BYTES: usize = BEGIN.len() + 4;
const TRAILER_BYTES: usize = 8;
/// Longer members are read as streams; those written here are of some MiB.
const LONGEST_BYTES: usize = 8 << 20;

/// The longest that a member of so many plain bytes can become.
pub(super) fn bound(compressor: &mut libdeflater::Compressor, plain: usize) -> usize {
    HEADER_BYTES + compressor.deflate_compress_bound(plain) + TRAILER_BYTES
}

/// Writes a member to the beginning of `buffer`, which is long enough for it; its length.
pub(super) fn write(compressor: &mut libdeflater::Compressor, plain: &[u8], buffer: &mut [u8]) -> io::Result<usize> {
    let too_long = || io::Error::from(io::ErrorKind::FileTooLarge);
    let (header, rest) = buffer.split_at_mut_checked(HEADER_BYTES).ok_or_else(too_long)?;
    let deflated = compressor.deflate_compress(plain, rest).map_err(io::Error::other)?;
    let length = HEADER_BYTES + deflated + TRAILER_BYTES;
    header[..BEGIN.len()].copy_from_slice(&BEGIN);
    header[BEGIN.len()..].copy_from_slice(&u32::try_from(length).map_err(|_| too_long())?.to_le_bytes());
    let mut crc = libdeflater::Crc::new();
    crc.update(plain);
    let trailer = rest.get_mut(deflated..deflated + TRAILER_BYTES).ok_or_else(too_long)?;
    trailer[..4].copy_from_slice(&crc.sum().to_le_bytes());
    // Modulo 2^32, as RFC 1952 has it.
    trailer[4..].copy_from_slice(&(plain.len() as u32).to_le_bytes());
    Ok(length)
}

/// Where the bytes come from.
type Input<'a> = Box<dyn BufRead + Send + 'a>;

/// Reads gzip: members that say how long they are in one go, from the first other one on as a stream.
pub(super) struct Members<'a> {
    /// `None`: what is left is read by `stream`.
    input: Option<Input<'a>>,
    stream: Option<MultiGzDecoder<Input<'a>>>,
    /// `None`: there is no memory for it.
    gunzip: Option<Gunzip>,
    member: Vec<u8>,
    /// Memory for a member's plain bytes; those that count and have not been given.
    plain: Vec<u8>,
    ready: Range<usize>,
}

impl<'a> Members<'a> {
    pub(super) fn new(input: Input<'a>) -> Self {
        let gunzip = Gunzip::new();
        let (input, stream) = match gunzip {
            Some(_) => (Some(input), None),
            None => (None, Some(MultiGzDecoder::new(input))),
        };
        Self { input, stream, gunzip, member: Vec::new(), plain: Vec::new(), ready: 0..0 }
    }

    /// Gets the next member's plain bytes; false when there is none that can be had in one go. Then `member` holds what was
    /// taken out of the input.
    fn next_member(&mut self) -> io::Result<bool> {
        let (Some(input), Some(gunzip)) = (&mut self.input, &mut self.gunzip) else { return Ok(false) };
        self.member.clear();
        input.by_ref().take(HEADER_BYTES as u64).read_to_end(&mut self.member)?;
        let length = self.member.strip_prefix(&BEGIN).and_then(|length| <[u8; 4]>::try_from(length).ok());
        let Some(length) = length else { return Ok(false) };
        let length = u32::from_le_bytes(length) as usize;
        if !(HEADER_BYTES + TRAILER_BYTES..=LONGEST_BYTES).contains(&length) {
            return Ok(false);
        }
        input.by_ref().take((length - HEADER_BYTES) as u64).read_to_end(&mut self.member)?;
        let Some(plain) = self.member.last_chunk::<4>().map(|plain| u32::from_le_bytes(*plain) as usize) else {
            return Ok(false);
        };
        if self.member.len() != length || plain > LONGEST_BYTES {
            return Ok(false);
        }
        if self.plain.len() < plain {
            self.plain.resize(plain, 0);
        }
        // All of it, as every reader of streams would take it: not the first of several members, nor something behind it.
        let whole = gunzip.member(&self.member, &mut self.plain[..plain]) == Some((length, plain));
        self.ready = if whole { 0..plain } else { 0..0 };
        Ok(whole)
    }
}

impl<'a> Read for Members<'a> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(stream) = &mut self.stream {
                return stream.read(buffer);
            }
            let ready = &self.plain[self.ready.clone()];
            if !ready.is_empty() || buffer.is_empty() {
                let count = ready.len().min(buffer.len());
                buffer[..count].copy_from_slice(&ready[..count]);
                self.ready.start += count;
                return Ok(count);
            }
            if self.next_member()? {
                continue;
            }
            let Some(rest) = self.input.take() else { return Ok(0) };
            let taken = Cursor::new(std::mem::take(&mut self.member));
            // Where nothing was taken, the members have come to their end.
            self.stream =
                (!taken.get_ref().is_empty()).then(|| MultiGzDecoder::new(Box::new(taken.chain(rest)) as Input<'a>));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use std::io::Write;

    fn text(length: usize) -> Vec<u8> {
        (0..length).flat_map(|number| format!("{} ", number * number % 7919).into_bytes()).take(length).collect()
    }

    fn member(plain: &[u8]) -> Vec<u8> {
        let mut compressor = libdeflater::Compressor::new(libdeflater::CompressionLvl::new(5).unwrap());
        let mut buffer = vec![0; bound(&mut compressor, plain.len())];
        let length = write(&mut compressor, plain, &mut buffer).unwrap();
        buffer.truncate(length);
        buffer
    }

    fn other(plain: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(plain).unwrap();
        encoder.finish().unwrap()
    }

    /// What is read, and whether all of it was read in one go each; in small pieces.
    fn read(bytes: &[u8]) -> io::Result<(Vec<u8>, bool)> {
        let mut members = Members::new(Box::new(io::BufReader::with_capacity(7, bytes)));
        let mut plain = Vec::new();
        let mut buffer = [0; 1000];
        loop {
            match members.read(&mut buffer)? {
                0 => return Ok((plain, members.stream.is_none())),
                count => plain.extend_from_slice(&buffer[..count]),
            }
        }
    }

    fn as_stream(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut plain = Vec::new();
        MultiGzDecoder::new(bytes).read_to_end(&mut plain).map(|_| plain)
    }

    #[test]
    fn members_and_streams_give_the_same() {
        let (a, b, empty) = (text(5000), text(300_000), Vec::new());
        for (bytes, fast) in [
            (member(&a), true),
            ([member(&a), member(&empty), member(&b)].concat(), true),
            (other(&b), false),
            ([member(&a), other(&b), member(&a)].concat(), false),
            ([other(&a), member(&b)].concat(), false),
        ] {
            let (plain, in_one_go) = read(&bytes).unwrap();
            assert!(plain == as_stream(&bytes).unwrap());
            assert_eq!(in_one_go, fast);
        }
        assert_eq!(read(&member(&text(LONGEST_BYTES))).unwrap().0.len(), LONGEST_BYTES);
        let (plain, in_one_go) = read(&member(&text(LONGEST_BYTES + 1))).unwrap();
        assert_eq!((plain.len(), in_one_go), (LONGEST_BYTES + 1, false));
    }

    #[test]
    fn lengths_are_not_trusted() {
        let (a, b) = (member(&text(500)), member(&text(700)));
        let bytes = [a.clone(), b.clone()].concat();
        let lie = |length: usize| {
            let mut bytes = bytes.clone();
            bytes[BEGIN.len()..HEADER_BYTES].copy_from_slice(&(length as u32).to_le_bytes());
            bytes
        };
        // Two members at once, of which a reader that stops after the first would see one; half a member; more than there is.
        for length in (0..bytes.len() + 10).chain([LONGEST_BYTES, usize::MAX]) {
            let (plain, _) = read(&lie(length)).unwrap();
            assert!(plain == as_stream(&bytes).unwrap(), "{length}");
        }
        // The same twice: the last bytes are those of the first member.
        let twice = [a.clone(), a.clone()].concat();
        let mut lying = twice.clone();
        lying[BEGIN.len()..HEADER_BYTES].copy_from_slice(&(twice.len() as u32).to_le_bytes());
        assert!(read(&lying).unwrap().0 == as_stream(&twice).unwrap());
    }

    #[test]
    fn damage_is_told_as_for_streams() {
        let good = [member(&text(500)), member(&text(300))].concat();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            match (read(&bad), as_stream(&bad)) {
                (Ok((plain, _)), Ok(expected)) => assert!(plain == expected, "{at}"),
                (Err(_), Err(_)) => {}
                (found, expected) => panic!("{at}: {} and {}", found.is_ok(), expected.is_ok()),
            }
            let cut = &good[..at];
            assert_eq!(read(cut).is_ok(), at == 0 || as_stream(cut).is_ok(), "cut at {at}");
        }
    }
}
