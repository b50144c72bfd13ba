//! Looks for the values of secrets where they must not be: in layers, logs, and what an image says about itself.
//!
//! A value is looked for as it is, in base64 at any of the three places in a group, and as part of a URL. Values shorter
//! than [`SHORTEST`] are not looked for: they would be found everywhere.

use crate::registry::auth::encode_base64;
use regex::bytes::Regex;
use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read};

/// Bytes that a value must have to be looked for.
pub const SHORTEST: usize = 12;

/// How much of a file is looked at in one go.
const PIECE: usize = 1 << 20;

/// A secret that was found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("secret `{secret}` stands in {place}{form}")]
pub struct Leak {
    /// Its name.
    pub secret: String,
    /// Where.
    pub place: String,
    /// In which form, as part of a sentence; empty for the value itself.
    pub form: &'static str,
}

/// What is looked for.
#[derive(Debug)]
pub struct LeakScan {
    pattern: Regex,
    forms: HashMap<Vec<u8>, (String, &'static str)>,
    longest: usize,
}

impl LeakScan {
    /// Looks for these secrets; `None` when none of them can be looked for.
    pub fn new(secrets: &BTreeMap<String, Vec<u8>>) -> Option<LeakScan> {
        let mut forms: HashMap<Vec<u8>, (String, &'static str)> = HashMap::new();
        for (name, value) in secrets {
            // Files end in a newline that nobody counts as part of the secret.
            let value = value.trim_ascii_end();
            if value.len() < SHORTEST {
                continue;
            }
            let mut add = |bytes: Vec<u8>, form| _ = forms.entry(bytes).or_insert_with(|| (name.clone(), form));
            add(value.to_vec(), "");
            for skipped in 0..3 {
                add(base64(value, skipped, b"+/"), ", in base64");
                add(base64(value, skipped, b"-_"), ", in base64");
            }
            for (space, digits) in [("%20", HEX_UPPER), ("%20", HEX_LOWER), ("+", HEX_UPPER), ("+", HEX_LOWER)] {
                add(url(value, space, digits), ", as part of a URL");
            }
        }
        // The longest first: of several that start at one place, the first is found.
        let mut all: Vec<&Vec<u8>> = forms.keys().collect();
        all.sort_by_key(|form| (std::cmp::Reverse(form.len()), (*form).clone()));
        let longest = all.first()?.len();
        let text: Vec<String> =
            all.iter().map(|form| form.iter().map(|byte| format!("\\x{byte:02x}")).collect()).collect();
        // So large that the pattern cannot be made: megabytes of keys. Those are not looked for.
        let pattern = Regex::new(&format!("(?s-u:{})", text.join("|"))).ok()?;
        Some(LeakScan { pattern, forms, longest })
    }

    /// Looks at bytes that are at `place`.
    pub fn check(&self, bytes: &[u8], place: impl FnOnce() -> String) -> Result<(), Leak> {
        let Some(found) = self.pattern.find(bytes) else { return Ok(()) };
        let (secret, form) = self.forms.get(found.as_bytes()).cloned().unwrap_or_default();
        Err(Leak { secret, place: place(), form })
    }

    /// Looks at everything that `reader` gives.
    pub fn check_reader(&self, reader: &mut dyn Read, place: impl FnOnce() -> String) -> io::Result<Result<(), Leak>> {
        let mut stream = LeakStream::new(self);
        let mut buffer = vec![0; PIECE];
        loop {
            let length = reader.read(&mut buffer)?;
            if length == 0 {
                return Ok(Ok(()));
            }
            if let Some((secret, form)) = stream.push(&buffer[..length]) {
                return Ok(Err(Leak { secret, place: place(), form }));
            }
        }
    }
}

/// Bytes that come in pieces; what ends one and starts the next is found too.
#[derive(Debug)]
pub struct LeakStream<'a> {
    scan: &'a LeakScan,
    /// The end of what came, shorter than the longest form.
    tail: Vec<u8>,
}

impl<'a> LeakStream<'a> {
    /// Nothing has come yet.
    pub fn new(scan: &'a LeakScan) -> Self {
        Self { scan, tail: Vec::new() }
    }

    /// Takes a piece; returns the name of a secret that was found, and its form.
    pub fn push(&mut self, bytes: &[u8]) -> Option<(String, &'static str)> {
        self.tail.extend_from_slice(bytes);
        let leak = self.scan.check(&self.tail, String::new).err().map(|leak| (leak.secret, leak.form));
        let keep = self.tail.len().min(self.scan.longest - 1);
        self.tail.drain(..self.tail.len() - keep);
        leak
    }
}

/// The characters that a value gives in base64 when `skipped` bytes stand before it in its group, without those at both
/// ends that depend on its neighbours; `last` are the two that alphabets differ by.
fn base64(value: &[u8], skipped: usize, last: &[u8; 2]) -> Vec<u8> {
    let whole = encode_base64(&[&[0; 2][..skipped], value].concat());
    let (start, end) = ((skipped * 8).div_ceil(6), (skipped + value.len()) * 8 / 6);
    let character = |byte: u8| match byte {
        b'+' => last[0],
        b'/' => last[1],
        other => other,
    };
    whole.as_bytes()[start..end].iter().copied().map(character).collect()
}

const HEX_UPPER: &[u8; 16] = b"0123456789ABCDEF";
const HEX_LOWER: &[u8; 16] = b"0123456789abcdef";

/// A value with all but unreserved characters (RFC 3986, 2.3) as %XX.
fn url(value: &[u8], space: &str, digits: &[u8; 16]) -> Vec<u8> {
    let mut text = Vec::with_capacity(value.len());
    for byte in value {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => text.push(*byte),
            b' ' => text.extend_from_slice(space.as_bytes()),
            _ => text.extend([b'%', digits[usize::from(byte >> 4)], digits[usize::from(byte & 15)]]),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(secrets: &[(&str, &str)]) -> Option<LeakScan> {
        let secrets = secrets.iter().map(|(name, value)| ((*name).to_owned(), value.as_bytes().to_vec()));
        LeakScan::new(&secrets.collect())
    }

    #[test]
    fn values_are_found_in_every_form() {
        let scan = scan(&[("token", "s3cr3t/+ value\n"), ("other", "correct horse")]).expect("long enough");
        // The base64 is coreutils' of "s3cr3t/+ value" after "", "x" and "xy", followed by "z".
        for (text, expected) in [
            ("nothing here", None),
            ("a s3cr3t/+ value b", Some(("token", ""))),
            ("a s3cr3t/+ valu", None),
            ("-czNjcjN0LysgdmFsdWV6-", Some(("token", ", in base64"))),
            ("eHMzY3IzdC8rIHZhbHVleg==", Some(("token", ", in base64"))),
            ("eHlzM2NyM3QvKyB2YWx1ZXo=", Some(("token", ", in base64"))),
            ("?q=s3cr3t%2F%2B%20value", Some(("token", ", as part of a URL"))),
            ("?q=s3cr3t%2f%2b+value&", Some(("token", ", as part of a URL"))),
            ("?q=correct+horse", Some(("other", ", as part of a URL"))),
        ] {
            let found = scan.check(text.as_bytes(), || "here".to_owned()).err();
            let found = found.as_ref().map(|leak| (leak.secret.as_str(), leak.form));
            assert_eq!(found, expected, "{text}");
        }
    }

    #[test]
    fn short_values_are_left_alone() {
        assert!(scan(&[("a", "12345678901"), ("b", ""), ("c", "short\n\n\n\n")]).is_none());
        assert!(scan(&[("a", "123456789012")]).is_some());
    }

    #[test]
    fn pieces_are_one_text() {
        let scan = scan(&[("token", "0123456789abcdef")]).expect("long enough");
        for piece in 1..20 {
            let text = format!("{}0123456789abcdef{}", "x".repeat(50), "y".repeat(50));
            let mut stream = LeakStream::new(&scan);
            assert!(text.as_bytes().chunks(piece).any(|chunk| stream.push(chunk).is_some()), "{piece}");
        }
        let mut far = io::Read::chain(io::repeat(b'x').take(PIECE as u64 - 5), &b"0123456789abcdef"[..]);
        let found = scan.check_reader(&mut far, || "it".to_owned()).expect("readable").expect_err("found");
        assert_eq!(found.to_string(), "secret `token` stands in it");
    }
}
