//! Shell patterns as COPY and ADD sources use them: the rules of Go's `path/filepath.Match`.
//!
//! ```text
//! *        any run of bytes without `/`
//! ?        one character except `/`
//! [a-z]    one character of the class (`[^a-z]`: not of it; a class may match `/`)
//! \c       the character c
//! ```
//! A pattern must match the whole name. Names are bytes; where they are not UTF-8 each stray byte counts as one
//! U+FFFD, as Go decodes it. A pattern is checked completely, also where the name decides earlier.

/// The pattern is malformed: an open or empty class, a bad range, or a lone backslash at the end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("syntax error in pattern `{}`", String::from_utf8_lossy(pattern))]
pub struct BadPattern {
    /// The pattern as given.
    pub pattern: Vec<u8>,
}

/// A pattern, checked and ready to be used many times.
#[derive(Debug, Clone)]
pub struct Glob {
    chunks: Vec<Chunk>,
}

/// What stands between two stars.
#[derive(Debug, Clone, Default)]
struct Chunk {
    /// A star stands before it.
    star: bool,
    tokens: Vec<Token>,
}

#[derive(Debug, Clone)]
enum Token {
    Byte(u8),
    AnyCharacter,
    Class { negated: bool, ranges: Vec<(char, char)> },
}

impl Glob {
    /// Checks and compiles a pattern.
    pub fn new(pattern: &[u8]) -> Result<Self, BadPattern> {
        compile(pattern).map(|chunks| Self { chunks }).ok_or_else(|| BadPattern { pattern: pattern.to_vec() })
    }

    /// Does the pattern match the whole name?
    pub fn matches(&self, mut name: &[u8]) -> bool {
        for (at, chunk) in self.chunks.iter().enumerate() {
            let last = at + 1 == self.chunks.len();
            if chunk.star && chunk.tokens.is_empty() {
                return !name.contains(&b'/');
            }
            // The earliest place where a chunk fits is enough, because the next chunk begins with a star again; only
            // the last one has to reach the end of the name. A star moves on by bytes and never over a slash.
            let reach = if chunk.star { name.iter().position(|&byte| byte == b'/').unwrap_or(name.len()) } else { 0 };
            let found = (0..=reach)
                .filter_map(|skip| match_chunk(&chunk.tokens, &name[skip..]))
                .find(|rest| !last || rest.is_empty());
            match found {
                Some(rest) => name = rest,
                None => return false,
            }
        }
        name.is_empty()
    }
}

/// Does the pattern match the whole name?
pub fn matches(pattern: &[u8], name: &[u8]) -> Result<bool, BadPattern> {
    Glob::new(pattern).map(|glob| glob.matches(name))
}

/// Does the pattern hold an unescaped `*`, `?` or `[`? Without one it names a single path (once unescaped).
pub fn has_meta(pattern: &[u8]) -> bool {
    let mut bytes = pattern.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => drop(bytes.next()),
            b'*' | b'?' | b'[' => return true,
            _ => {}
        }
    }
    false
}

/// What is left of the name after the tokens, `None` where they do not fit.
fn match_chunk<'a>(tokens: &[Token], mut name: &'a [u8]) -> Option<&'a [u8]> {
    for token in tokens {
        let &first = name.first()?;
        let length = match token {
            Token::Byte(byte) if *byte == first => 1,
            Token::Byte(_) => return None,
            Token::AnyCharacter if first == b'/' => return None,
            Token::AnyCharacter => decode(name).1,
            Token::Class { negated, ranges } => {
                let (character, length, _) = decode(name);
                if ranges.iter().any(|(low, high)| (low..=high).contains(&&character)) == *negated {
                    return None;
                }
                length
            }
        };
        name = &name[length..];
    }
    Some(name)
}

/// First character, its length, and whether it was valid UTF-8; an invalid byte is U+FFFD of length 1.
fn decode(bytes: &[u8]) -> (char, usize, bool) {
    match bytes.first() {
        Some(byte) if byte.is_ascii() => (char::from(*byte), 1, true),
        _ => {
            let head = &bytes[..bytes.len().min(4)];
            let valid = head.utf8_chunks().next().and_then(|chunk| chunk.valid().chars().next());
            valid.map_or((char::REPLACEMENT_CHARACTER, 1, false), |character| (character, character.len_utf8(), true))
        }
    }
}

fn compile(pattern: &[u8]) -> Option<Vec<Chunk>> {
    let mut chunks = vec![Chunk::default()];
    let mut rest = pattern;
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        let token = match byte {
            b'*' => {
                // Several stars in a row are one.
                match chunks.last_mut() {
                    Some(chunk) if chunk.tokens.is_empty() => chunk.star = true,
                    _ => chunks.push(Chunk { star: true, tokens: Vec::new() }),
                }
                continue;
            }
            b'?' => Token::AnyCharacter,
            b'[' => {
                let negated = rest.first() == Some(&b'^');
                if negated {
                    rest = &rest[1..];
                }
                let mut ranges = Vec::new();
                while ranges.is_empty() || rest.first() != Some(&b']') {
                    let low = class_character(&mut rest)?;
                    let mut high = low;
                    if rest.first() == Some(&b'-') {
                        rest = &rest[1..];
                        high = class_character(&mut rest)?;
                    }
                    ranges.push((low, high));
                }
                rest = &rest[1..];
                Token::Class { negated, ranges }
            }
            b'\\' => {
                let (&escaped, tail) = rest.split_first()?;
                rest = tail;
                Token::Byte(escaped)
            }
            other => Token::Byte(other),
        };
        if let Some(chunk) = chunks.last_mut() {
            chunk.tokens.push(token);
        }
    }
    Some(chunks)
}

/// One character of a class, perhaps escaped. A bare `-` or `]` is no character, and a class must be closed.
fn class_character(rest: &mut &[u8]) -> Option<char> {
    match rest.first()? {
        b'-' | b']' => return None,
        b'\\' => *rest = &rest[1..],
        _ => {}
    }
    if rest.is_empty() {
        return None;
    }
    let (character, length, valid) = decode(rest);
    *rest = &rest[length..];
    (valid && !rest.is_empty()).then_some(character)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(pattern: &str, name: &[u8], expected: Option<bool>) {
        assert_eq!(
            matches(pattern.as_bytes(), name).ok(),
            expected,
            "{pattern:?} on {:?}",
            name.escape_ascii().to_string()
        );
    }

    #[test]
    fn agrees_with_the_recorded_answers() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/vectors/match.json");
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        let vectors = json["vectors"].as_array().unwrap();
        assert!(vectors.len() > 30);
        for vector in vectors {
            let pattern = vector["pattern"].as_str().unwrap();
            if vector.get("error").is_some() {
                check(pattern, b"a", None);
                continue;
            }
            for (key, expected) in [("match", true), ("no", false)] {
                for name in vector[key].as_array().unwrap() {
                    check(pattern, name.as_str().unwrap().as_bytes(), Some(expected));
                }
            }
        }
    }

    #[test]
    fn corners() {
        check("", b"", Some(true));
        check("*", b"", Some(true));
        check("a*b*c", b"axbxxc", Some(true));
        check("a*b*c", b"axbxx", Some(false));
        check("*ab", b"abab", Some(true));
        check("*/b", b"a/b", Some(true));
        check("**/b", b"x/a/b", Some(false));
        check("a[^b]c", b"a/c", Some(true));
        check("a?c", b"a/c", Some(false));
        check("[a-]", b"a", None);
        check("[-a]", b"a", None);
        check("[a\\-z]", b"-", Some(true));
        check("[\\", b"", None);
        check("x\\", b"y", None);
        check("?", b"\xff", Some(true));
        check("a?b", b"a\xffb", Some(true));
        check("[\u{fffd}]", b"\xff", Some(true));
        check("[^a]", b"", Some(false));
        assert!(matches(b"[\xff]", b"a").is_err());
    }

    #[test]
    fn only_unescaped_characters_make_a_pattern() {
        for (pattern, expected) in
            [("a", false), ("a*", true), ("a\\*", false), ("\\\\*", true), ("a]", false), ("[", true)]
        {
            assert_eq!(has_meta(pattern.as_bytes()), expected, "{pattern}");
        }
    }

    /// Tries every length for every star.
    fn naive(pattern: &[u8], name: &[u8]) -> bool {
        match pattern {
            [] => name.is_empty(),
            [b'*', rest @ ..] => {
                let reach = name.iter().position(|&byte| byte == b'/').unwrap_or(name.len());
                (0..=reach).any(|skip| naive(rest, &name[skip..]))
            }
            [b'?', rest @ ..] => name.first().is_some_and(|&byte| byte != b'/') && naive(rest, &name[1..]),
            [b'[', b'^', b'a', b'-', b'b', b']', rest @ ..] => {
                name.first().is_some_and(|byte| !(b'a'..=b'b').contains(byte)) && naive(rest, &name[1..])
            }
            [b'\\', literal, rest @ ..] | [literal, rest @ ..] => {
                name.first() == Some(literal) && naive(rest, &name[1..])
            }
        }
    }

    #[test]
    fn agrees_with_a_matcher_that_tries_everything() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut below = |limit: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % limit as u64) as usize
        };
        let parts = ["a", "b", "c", "*", "**", "?", "/", "[^a-b]", "\\*", "ab"];
        let names = ["a", "b", "c", "/", "*", "ab", "ca"];
        let mut matched = 0;
        for _ in 0..50_000 {
            let pattern: String = (0..below(7)).map(|_| parts[below(parts.len())]).collect();
            let name: String = (0..below(6)).map(|_| names[below(names.len())]).collect();
            // In Go a class matches `/`, which stars never do, and a match that began too early is not tried again.
            if pattern.contains('[') && name.contains('/') {
                continue;
            }
            let want = naive(pattern.as_bytes(), name.as_bytes());
            check(&pattern, name.as_bytes(), Some(want));
            matched += usize::from(want);
        }
        assert!(matched > 1000, "{matched}");
    }
}
