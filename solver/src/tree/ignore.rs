//! `.dockerignore` files, and the patterns of `COPY --exclude`.
//!
//! Reading ([`parse`]): a byte order mark is dropped, a line with `#` in column one is a comment, the rest is trimmed and
//! cleaned as a path, a leading slash goes, `!` keeps its place in front.
//!
//! Matching ([`Matcher`]): patterns apply in order and the last one that matches decides; one with `!` re-includes. A
//! pattern that matches a directory matches all below it. Users rely on details of the reference implementation, which
//! turns patterns into regular expressions of Go, so this module does the same in two steps:
//!
//! ```text
//! pattern ──▶ literal, prefix (`x**`), suffix (`**x`), or a regular expression in Go's syntax ──▶ crate `regex`
//! `**`, `**/`  →  (.*/)?      `*`  →  [^/]*      `?`  →  [^/]      `\c`  →  \c (so `\d` is a digit)
//! ```
//!
//! Two questions can be asked. [`Matcher::excluded`] judges one path alone. [`Matcher::verdict`] carries the results for
//! the parent along, which is what a directory walk does: cheaper, and what BuildKit's context transfer shows to users.
//! They differ in one corner: a pattern that made no difference for the parent is not held against the children
//! (`a/b` followed by `!a` excludes `a/b` in a walk). Use verdicts for contexts.
//!
//! Whoever walks must still show an excluded directory when something below it is included.

use std::borrow::Cow;

use regex::Regex;

use super::glob::Glob;

/// Patterns that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IgnoreError {
    /// Malformed pattern.
    #[error("syntax error in pattern `{pattern}`")]
    BadPattern {
        /// As written, without `!`.
        pattern: String,
    },
    /// More wildcards or classes of characters than anybody writes; matching would take very long.
    #[error("pattern `{pattern}` is too complex")]
    TooComplex {
        /// As written, without `!`.
        pattern: String,
    },
    /// `!` alone.
    #[error("illegal exclusion pattern: \"!\"")]
    EmptyException,
}

/// Most stars in a pattern: the time to match grows with their number, for every path.
const MAX_STARS: usize = 100;
/// Most `\pL` and its like in all patterns: each is a large table.
const MAX_CLASSES: usize = 100;

/// Reads an ignore file into patterns. Bytes that are not UTF-8 become U+FFFD, which matches any such byte.
pub fn parse(text: &[u8]) -> Vec<String> {
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    let text = decode(text);
    let mut patterns = Vec::new();
    for line in text.split('\n') {
        // The comment sign counts before blanks are trimmed: ` #x` is a pattern.
        let line = line.strip_suffix('\r').unwrap_or(line);
        let pattern = line.trim();
        if line.starts_with('#') || pattern.is_empty() {
            continue;
        }
        let (bang, pattern) = match pattern.strip_prefix('!') {
            Some(rest) => ("!", rest.trim()),
            None => ("", pattern),
        };
        let mut cleaned = if pattern.is_empty() { String::new() } else { clean(pattern) };
        if cleaned.len() > 1 && cleaned.starts_with('/') {
            cleaned.remove(0);
        }
        patterns.push(format!("{bang}{cleaned}"));
    }
    patterns
}

/// Compiled patterns.
#[derive(Debug, Clone, Default)]
pub struct Matcher {
    patterns: Vec<Pattern>,
}

#[derive(Debug, Clone)]
struct Pattern {
    /// Has a `!`: what it matches is included again.
    exception: bool,
    cleaned: String,
    /// Every path that it matches starts with this, or the path starts the prefix off.
    literal_prefix: String,
    test: Test,
}

#[derive(Debug, Clone)]
enum Test {
    Exact,
    /// `x**`: holds x.
    Prefix(String),
    /// `**x`: holds x.
    Suffix(String),
    Regex(Regex),
}

/// What the patterns said about a path; carried from a directory to what is in it.
#[derive(Debug, Clone, Default)]
pub struct Verdict {
    excluded: bool,
    /// False for the root: nothing is known of parents.
    known: bool,
    /// Bit n: pattern n matched this path or a parent. Patterns from 64 on are in `more`.
    matched: u64,
    more: Vec<u64>,
}

impl Verdict {
    /// Is the path excluded?
    pub fn excluded(&self) -> bool {
        self.excluded
    }

    fn get(&self, index: usize) -> bool {
        let word = if index < 64 { Some(&self.matched) } else { self.more.get(index / 64 - 1) };
        word.is_some_and(|word| word >> (index % 64) & 1 == 1)
    }

    fn set(&mut self, index: usize) {
        let bit = 1 << (index % 64);
        if index < 64 {
            self.matched |= bit;
            return;
        }
        let at = index / 64 - 1;
        if self.more.len() <= at {
            self.more.resize(at + 1, 0);
        }
        self.more[at] |= bit;
    }
}

impl Matcher {
    /// Compiles patterns as [`parse`] returns them, or as they stand after `--exclude=`.
    pub fn new<S: AsRef<str>>(patterns: impl IntoIterator<Item = S>) -> Result<Self, IgnoreError> {
        let mut compiled = Vec::new();
        let mut classes = 0;
        for pattern in patterns {
            let trimmed = pattern.as_ref().trim();
            if trimmed.is_empty() {
                continue;
            }
            let cleaned = clean(trimmed);
            let (exception, cleaned) = match cleaned.strip_prefix('!') {
                Some("") => return Err(IgnoreError::EmptyException),
                Some(rest) => (true, rest.to_owned()),
                None => (false, cleaned),
            };
            let bad = || IgnoreError::BadPattern { pattern: cleaned.clone() };
            Glob::new(cleaned.as_bytes()).map_err(|_| bad())?;
            classes += cleaned.matches("\\p").count() + cleaned.matches("\\P").count();
            if cleaned.matches('*').count() > MAX_STARS || classes > MAX_CLASSES {
                return Err(IgnoreError::TooComplex { pattern: cleaned });
            }
            let test = compile(&cleaned).ok_or_else(bad)?;
            let meta = ['*', '?', '[', ']', '\\', '^', '\u{feff}'];
            let literal_prefix = match test {
                Test::Exact => cleaned.clone(),
                _ => cleaned[..cleaned.find(meta).unwrap_or(cleaned.len())].to_owned(),
            };
            compiled.push(Pattern { exception, cleaned, literal_prefix, test });
        }
        Ok(Self { patterns: compiled })
    }

    /// No patterns: nothing is excluded.
    pub fn is_empty(&self) -> bool {
        self.patterns.is_empty()
    }

    /// Does a pattern start with `!`? Then what is below an excluded path may be there all the same.
    pub fn has_exceptions(&self) -> bool {
        self.patterns.iter().any(|pattern| pattern.exception)
    }

    /// Is the path, judged alone, excluded? The root never is.
    pub fn excluded(&self, path: impl AsRef<[u8]>) -> bool {
        let path = decode(path.as_ref());
        let mut excluded = false;
        if path.is_empty() || path == "." {
            return false;
        }
        for pattern in &self.patterns {
            // A pattern that cannot change the answer is not asked.
            if pattern.exception == excluded && pattern.matches_with_parents(&path) {
                excluded = !pattern.exception;
            }
        }
        excluded
    }

    /// The verdict to start a walk with: the root's own.
    pub fn root(&self) -> Verdict {
        Verdict::default()
    }

    /// Judges a path by the verdict on its parent directory.
    pub fn verdict(&self, parent: &Verdict, path: impl AsRef<[u8]>) -> Verdict {
        let path = decode(path.as_ref());
        let mut verdict = Verdict { known: true, ..Verdict::default() };
        if path.is_empty() || path == "." {
            return Verdict::default();
        }
        for (index, pattern) in self.patterns.iter().enumerate() {
            let mut matched = parent.get(index);
            if !matched && pattern.exception == verdict.excluded {
                matched = if parent.known { pattern.matches(&path) } else { pattern.matches_with_parents(&path) };
            }
            if matched {
                verdict.set(index);
                verdict.excluded = !pattern.exception;
            }
        }
        verdict
    }

    /// May a walk skip what is below this excluded directory? Yes when no `!` pattern can match there.
    pub fn can_prune(&self, directory: impl AsRef<[u8]>) -> bool {
        let directory = format!("{}/", decode(directory.as_ref()));
        self.patterns.iter().filter(|pattern| pattern.exception).all(|pattern| {
            let prefix = &pattern.literal_prefix;
            let below = prefix.starts_with(&directory);
            match pattern.test {
                Test::Exact => !below,
                _ => !below && !directory.starts_with(prefix.as_str()),
            }
        })
    }
}

impl Pattern {
    fn matches(&self, path: &str) -> bool {
        match &self.test {
            Test::Exact => path == self.cleaned,
            Test::Prefix(prefix) => path.starts_with(prefix.as_str()),
            Test::Suffix(suffix) => path.ends_with(suffix.as_str()) || suffix.strip_prefix('/') == Some(path),
            Test::Regex(regex) => regex.is_match(path),
        }
    }

    fn matches_with_parents(&self, path: &str) -> bool {
        self.matches(path) || path.match_indices('/').any(|(at, _)| self.matches(&path[..at]))
    }
}

/// The text of bytes as Go sees it: each byte that is not part of valid UTF-8 is one U+FFFD.
fn decode(bytes: &[u8]) -> Cow<'_, str> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Cow::Borrowed(text),
        Err(_) => {
            let mut text = String::with_capacity(bytes.len() + 16);
            for chunk in bytes.utf8_chunks() {
                text.push_str(chunk.valid());
                text.extend(chunk.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
            }
            Cow::Owned(text)
        }
    }
}

/// The shortest equal path, by text alone: no empty, `.` or inner `..` components, no slash at the end; `.` when nothing
/// is left.
fn clean(path: &str) -> String {
    let rooted = path.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|last| *last != "..") => drop(parts.pop()),
            ".." if rooted => {}
            other => parts.push(other),
        }
    }
    let joined = parts.join("/");
    match (rooted, joined.is_empty()) {
        (true, _) => format!("/{joined}"),
        (false, true) => ".".to_owned(),
        (false, false) => joined,
    }
}

/// Chooses the test for a cleaned pattern; `None` when Go would refuse the regular expression.
fn compile(pattern: &str) -> Option<Test> {
    #[derive(PartialEq)]
    enum Shape {
        Exact,
        Prefix,
        Suffix,
        Regex,
    }
    let mut shape = Shape::Exact;
    let mut regex = String::from("^");
    // Go's scanner, which the reference uses, drops a byte order mark in front.
    let mut characters = pattern.strip_prefix('\u{feff}').unwrap_or(pattern).chars().peekable();
    let mut first = true;
    while let Some(character) = characters.next() {
        match character {
            '*' if characters.next_if_eq(&'*').is_some() => {
                // `**/` means the same as `**`.
                characters.next_if_eq(&'/');
                if characters.peek().is_some() {
                    regex.push_str("(.*/)?");
                    shape = Shape::Regex;
                } else if shape == Shape::Exact {
                    shape = Shape::Prefix;
                } else {
                    regex.push_str(".*");
                    shape = Shape::Regex;
                }
                if first {
                    shape = Shape::Suffix;
                }
            }
            '*' => {
                regex.push_str("[^/]*");
                shape = Shape::Regex;
            }
            '?' => {
                regex.push_str("[^/]");
                shape = Shape::Regex;
            }
            '.' | '+' | '(' | ')' | '|' | '{' | '}' | '$' => {
                regex.push('\\');
                regex.push(character);
            }
            '\\' => {
                regex.push('\\');
                if let Some(escaped) = characters.next() {
                    regex.push(escaped);
                    shape = Shape::Regex;
                }
            }
            '[' | ']' => {
                regex.push(character);
                shape = Shape::Regex;
            }
            other => regex.push(other),
        }
        first = false;
    }
    Some(match shape {
        Shape::Exact => Test::Exact,
        Shape::Prefix => Test::Prefix(pattern[..pattern.len() - 2].to_owned()),
        // Behind a byte order mark the two bytes to drop may end inside it; such a pattern is refused.
        Shape::Suffix => Test::Suffix(pattern.get(2..)?.to_owned()),
        Shape::Regex => {
            regex.push('$');
            let source = GoRegex { text: &regex.chars().collect::<Vec<_>>(), at: 0 }.translate()?;
            Test::Regex(regex::RegexBuilder::new(&source).size_limit(1 << 26).build().ok()?)
        }
    })
}

/// Reads the part of Go's regular expression syntax that [`compile`] can produce and writes it for the `regex` crate.
/// The two differ where users can notice: nested classes and set operations (`[a[b]`, `[a&&b]` are plain characters in
/// Go), `\d`, `\s`, `\w` (ASCII in Go), octal escapes and `\Q`.
struct GoRegex<'a> {
    text: &'a [char],
    at: usize,
}

/// What a backslash can introduce, inside and outside a class.
enum Escaped {
    Character(char),
    /// Items to stand inside brackets.
    Items(String),
}

impl GoRegex<'_> {
    fn peek(&self) -> Option<char> {
        self.text.get(self.at).copied()
    }

    fn next(&mut self) -> Option<char> {
        let character = self.peek();
        self.at += usize::from(character.is_some());
        character
    }

    fn next_if(&mut self, accept: impl Fn(char) -> bool) -> Option<char> {
        self.peek().filter(|&character| accept(character)).inspect(|_| self.at += 1)
    }

    fn translate(&mut self) -> Option<String> {
        let mut out = String::new();
        while let Some(character) = self.next() {
            match character {
                '[' => out.push_str(&self.class()?),
                '\\' => self.outer_escape(&mut out)?,
                '^' => out.push_str("\\A"),
                '$' => out.push_str("\\z"),
                '.' | '*' | '?' | '(' | ')' => out.push(character),
                other => literal(&mut out, other),
            }
        }
        Some(out)
    }

    fn outer_escape(&mut self, out: &mut String) -> Option<()> {
        match self.peek()? {
            'A' => out.push_str("\\A"),
            'z' => out.push_str("\\z"),
            'b' => out.push_str("(?-u:\\b)"),
            'B' => out.push_str("\\B"),
            'Q' => {
                self.at += 1;
                while let Some(character) = self.next() {
                    if character == '\\' && self.next_if(|next| next == 'E').is_some() {
                        break;
                    }
                    literal(out, character);
                }
                return Some(());
            }
            _ => {
                match self.escape()? {
                    Escaped::Character(character) => literal(out, character),
                    Escaped::Items(items) => out.push_str(&format!("[{items}]")),
                }
                return Some(());
            }
        }
        self.at += 1;
        Some(())
    }

    /// What follows a backslash.
    fn escape(&mut self) -> Option<Escaped> {
        let items = |items: &str| Some(Escaped::Items(items.to_owned()));
        let character = match self.next()? {
            'd' => return items("0-9"),
            'D' => return items("[^0-9]"),
            's' => return items("\\t\\n\\x0C\\r\\x20"),
            'S' => return items("[^\\t\\n\\x0C\\r\\x20]"),
            'w' => return items("0-9A-Za-z_"),
            'W' => return items("[^0-9A-Za-z_]"),
            kind @ ('p' | 'P') => {
                let name = self.next_if(|name| "CLMNPSZ".contains(name))?;
                return Some(Escaped::Items(format!("\\{kind}{{{name}}}")));
            }
            'a' => '\x07',
            'f' => '\x0c',
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            'v' => '\x0b',
            'x' => {
                let high = self.next()?.to_digit(16)?;
                char::from_u32(high * 16 + self.next()?.to_digit(16)?)?
            }
            digit @ '0'..='7' => {
                let octal = |character: char| character.is_digit(8);
                // A single digit from 1 on would be a back reference, which Go does not have.
                if digit != '0' && !self.peek().is_some_and(octal) {
                    return None;
                }
                let mut value = digit.to_digit(8)?;
                for _ in 0..2 {
                    if let Some(next) = self.next_if(octal) {
                        value = value * 8 + next.to_digit(8)?;
                    }
                }
                char::from_u32(value)?
            }
            other if other.is_ascii() && !other.is_ascii_alphanumeric() => other,
            _ => return None,
        };
        Some(Escaped::Character(character))
    }

    /// A class; its `[` has been read.
    fn class(&mut self) -> Option<String> {
        let mut out = String::from("[");
        if self.next_if(|next| next == '^').is_some() {
            out.push('^');
        }
        let mut first = true;
        while first || self.peek()? != ']' {
            first = false;
            if let Some(name) = self.named_class() {
                out.push_str(&name?);
                continue;
            }
            let low = match self.class_character()? {
                Escaped::Character(character) => character,
                Escaped::Items(items) => {
                    out.push_str(&items);
                    continue;
                }
            };
            let mut high = low;
            if self.peek() == Some('-') && self.text.get(self.at + 1).is_some_and(|&next| next != ']') {
                self.at += 1;
                high = match self.class_character()? {
                    Escaped::Character(character) if character >= low => character,
                    _ => return None,
                };
            }
            out.push_str(&format!("\\x{{{:x}}}-\\x{{{:x}}}", u32::from(low), u32::from(high)));
        }
        self.at += 1;
        out.push(']');
        Some(out)
    }

    fn class_character(&mut self) -> Option<Escaped> {
        match self.next()? {
            '\\' => self.escape(),
            other => Some(Escaped::Character(other)),
        }
    }

    /// `[:alpha:]` inside a class; the inner `None` is an unknown name.
    fn named_class(&mut self) -> Option<Option<String>> {
        const NAMES: [&str; 14] = [
            "alnum", "alpha", "ascii", "blank", "cntrl", "digit", "graph", "lower", "print", "punct", "space", "upper",
            "word", "xdigit",
        ];
        let rest = self.text.get(self.at..)?.strip_prefix(&['[', ':'])?;
        let end = rest.windows(2).position(|pair| pair == [':', ']'])?;
        let name: String = rest[..end].iter().collect();
        self.at += end + 4;
        Some(NAMES.contains(&name.strip_prefix('^').unwrap_or(&name)).then(|| format!("[:{name}:]")))
    }
}

fn literal(out: &mut String, character: char) {
    out.push_str(&regex::escape(character.encode_utf8(&mut [0; 4])));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_recorded_answers() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/vectors/dockerignore.json");
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        let vectors = json["vectors"].as_array().unwrap();
        assert!(vectors.len() > 90);
        for vector in vectors {
            let ignore = vector["ignore"].as_str().unwrap();
            let strings = |key: &str| -> Vec<String> {
                let list = vector[key].as_array().cloned().unwrap_or_default();
                list.iter().map(|item| item.as_str().unwrap().to_owned()).collect()
            };
            let patterns = parse(ignore.as_bytes());
            assert_eq!(patterns, strings("patterns"), "{ignore:?}");
            let matcher = Matcher::new(&patterns);
            assert_eq!(matcher.is_err(), vector.get("error").is_some(), "{ignore:?}: {matcher:?}");
            let Ok(matcher) = matcher else { continue };
            for (key, expected) in [("excluded", true), ("kept", false)] {
                for path in strings(key) {
                    assert_eq!(matcher.excluded(&path), expected, "{ignore:?} on {path:?}");
                }
            }
        }
    }

    /// Judges as a walk does: verdict by verdict, and pruned where that is allowed.
    fn walked(matcher: &Matcher, path: &str) -> bool {
        let mut verdict = matcher.root();
        let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
        let mut pruned = false;
        for end in ends {
            verdict = matcher.verdict(&verdict, &path[..end]);
            assert!(!pruned || verdict.excluded(), "pruned above {path}");
            pruned |= verdict.excluded() && matcher.can_prune(&path[..end]);
        }
        verdict.excluded()
    }

    fn check(patterns: &[&str], path: &str, alone: bool, in_walk: bool) {
        let matcher = Matcher::new(patterns).unwrap();
        assert_eq!(matcher.excluded(path), alone, "{patterns:?} on {path}");
        assert_eq!(walked(&matcher, path), in_walk, "{patterns:?} on {path} in a walk");
    }

    #[test]
    fn walks_and_single_questions() {
        check(&["dir"], "dir/a/b", true, true);
        check(&["dir", "!dir/sub"], "dir/sub/x", false, false);
        check(&["dir", "!dir/sub"], "dir/other", true, true);
        check(&["*", "!a*"], "abc/x", false, false);
        check(&["**", "!src/**/*.rs"], "src/a/b.rs", false, false);
        check(&["**", "!src/**/*.rs"], "other/b.rs", true, true);
        check(&["src/**"], "src", false, false);
        check(&["**/x"], "x", true, true);
        check(&["a/b", "!a"], "a/b", false, true);
        check(&["dir", "!dir/x", "*r"], "dir/x", true, false);
    }

    #[test]
    fn patterns_are_regular_expressions_of_go() {
        for (pattern, path, expected) in [
            ("\\d*", "7", true),
            ("\\d*", "d", false),
            ("a\\x41", "aA", true),
            ("[[:alpha:]]x", "bx", true),
            ("[?]", "/]", true),
            ("[*]", "[]", true),
            ("[a&&b]", "&", true),
            ("[a~~b]*", "~", true),
            ("e^*", "e^f", false),
            ("x*y", "x\ny", true),
            ("a/**/b", "a/b", true),
            ("a/**/b", "a/x\ny/b", false),
            ("?", "\u{17e}", true),
            ("\\Qa*b", "a[^/]*b$", true),
        ] {
            assert_eq!(Matcher::new([pattern]).unwrap().excluded(path), expected, "{pattern} on {path:?}");
        }
        for pattern in ["[b-a]", "[[:nope:]]", "\\y", "\\C", "\\1x", "[a-*]", "\u{17e}["] {
            assert!(Matcher::new([pattern]).is_err(), "{pattern}");
        }
    }

    #[test]
    fn names_that_are_not_utf8() {
        let matcher = Matcher::new(parse(b"a\xffb\nx?")).unwrap();
        assert!(matcher.excluded(b"a\xfeb"));
        assert!(matcher.excluded(b"x\x80"));
        assert!(!matcher.excluded(b"x\x80\x80"));
    }

    #[test]
    fn pruning_stops_for_exceptions_below() {
        for (exception, directory, expected) in [
            ("!a/b/c", "a", false),
            ("!a/b/c", "a/b", false),
            ("!a/b/c", "a/c", true),
            ("!a/b", "a/b", true),
            ("!ab", "a", true),
            ("!**/x", "a", false),
            ("!a/*/x", "b", true),
            ("!a/*/x", "a", false),
            ("!a*", "abc", false),
            ("!a/**", "a", false),
            ("!a\\b", "ab", false),
        ] {
            assert_eq!(
                Matcher::new(["*", exception]).unwrap().can_prune(directory),
                expected,
                "{exception} {directory}"
            );
        }
        assert!(Matcher::new(["*"]).unwrap().can_prune("a"));
    }

    #[test]
    fn more_patterns_than_bits() {
        let mut patterns: Vec<String> = (0..200).map(|number| format!("n{number}")).collect();
        patterns.push("!n150/keep".to_owned());
        let matcher = Matcher::new(&patterns).unwrap();
        assert!(walked(&matcher, "n199/x"));
        assert!(walked(&matcher, "n150/x"));
        assert!(!walked(&matcher, "n150/keep/x"));
        assert!(!walked(&matcher, "m/x"));
    }

    #[test]
    fn lines() {
        let parsed = parse(b"\xef\xbb\xbf# no\n #yes\n\n  /a/../b/ \r\n! /c \n!\n..\n");
        assert_eq!(parsed, ["#yes", "b", "!c", "!", ".."]);
    }

    #[test]
    fn patterns_that_would_take_for_ever_are_refused() {
        let complex = |patterns: &[String]| matches!(Matcher::new(patterns), Err(IgnoreError::TooComplex { .. }));
        assert!(complex(&["a*".repeat(3000)]));
        assert!(complex(&["**/a?*".repeat(600)]));
        let classes: Vec<String> = (0..20).map(|line| format!("{}{line}", "[\\pL]".repeat(300))).collect();
        assert!(complex(&classes));
        assert!(!complex(&["a*".repeat(50), "[\\pL]x".to_owned(), "?".repeat(4000)]));
    }

    /// What the patterns mean, read from the beginning for every path: all ways to split it are tried.
    fn naive(pattern: &[char], path: &[char]) -> bool {
        match pattern {
            [] => path.is_empty(),
            ['*', '*', '/', rest @ ..] | ['*', '*', rest @ ..] if !rest.is_empty() => {
                naive(rest, path) || (0..path.len()).any(|at| path[at] == '/' && naive(rest, &path[at + 1..]))
            }
            ['*', '*', ..] => true,
            ['*', rest @ ..] => {
                let reach = path.iter().position(|&next| next == '/').unwrap_or(path.len());
                (0..=reach).any(|skip| naive(rest, &path[skip..]))
            }
            ['?', rest @ ..] => path.first().is_some_and(|&next| next != '/') && naive(rest, &path[1..]),
            ['\\', literal, rest @ ..] | [literal, rest @ ..] => {
                path.first() == Some(literal) && naive(rest, &path[1..])
            }
        }
    }

    #[test]
    fn agrees_with_a_matcher_that_tries_everything() {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut below = |limit: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % limit as u64) as usize
        };
        let parts = ["a", "b", "ab", "*", "?", "**", "\\*", ".", "a*b", "**/", "*.a"];
        let names = ["a", "b", "ab", "ba", ".", "x.a", "*", "aab"];
        let mut matched = 0;
        for _ in 0..20_000 {
            let pattern: Vec<&str> = (0..1 + below(3)).map(|_| parts[below(parts.len())]).collect();
            let pattern = clean(&pattern.join(if below(3) == 0 { "" } else { "/" }));
            // Behind a star `**` is a suffix or prefix test in the reference, which is its own table of corners.
            let corner = pattern.starts_with("**") || pattern.contains("***") || pattern.ends_with("**");
            let path: Vec<&str> = (0..1 + below(4)).map(|_| names[below(names.len())]).collect();
            let path = clean(&path.join("/"));
            if corner || path.starts_with('.') || pattern == "." {
                continue;
            }
            let chars = |text: &str| text.chars().collect::<Vec<_>>();
            let want = path
                .match_indices('/')
                .map(|(at, _)| at)
                .chain([path.len()])
                .any(|end| naive(&chars(&pattern), &chars(&path[..end])));
            let Ok(matcher) = Matcher::new([&pattern]) else { panic!("{pattern}") };
            assert_eq!(matcher.excluded(&path), want, "{pattern} on {path}");
            matched += usize::from(want);
        }
        assert!(matched > 500, "{matched}");
    }
}
