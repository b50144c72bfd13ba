//! Quoting and `${VAR:-default}` expansion of words, as BuildKit's shell lexer does it.

use std::collections::BTreeSet;

/// A word cannot be expanded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WordError {
    /// A quote is not closed.
    #[error("unexpected end of statement while looking for matching {0}-quote")]
    UnclosedQuote(&'static str),
}

/// Variables to expand with.
pub trait Variables {
    /// Value of a variable; `None` when it is not set.
    fn get(&self, name: &str) -> Option<&str>;
    /// Names that are set.
    fn names(&self) -> Vec<&str>;
}

/// In order; of several with one name the last counts.
impl Variables for [(String, String)] {
    fn get(&self, name: &str) -> Option<&str> {
        self.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    fn names(&self) -> Vec<&str> {
        self.iter().map(|(name, _)| name.as_str()).collect()
    }
}

/// How to read words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lexer {
    /// Escape character of the file.
    pub escape: char,
    /// Keep quotes in the result.
    pub raw_quotes: bool,
    /// Keep escapes in the result.
    pub raw_escapes: bool,
    /// Quotes are ordinary characters (heredoc bodies).
    pub skip_process_quotes: bool,
    /// Leave `$NAME` of unset variables as it is.
    pub skip_unset_env: bool,
}

/// Result of an expansion.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Expansion {
    /// The text.
    pub value: String,
    /// Variables that were used and set.
    pub matched: BTreeSet<String>,
    /// Variables that were used, not set, and had no default.
    pub unmatched: BTreeSet<String>,
}

impl Lexer {
    /// An ordinary lexer.
    pub fn new(escape: char) -> Self {
        Self { escape, raw_quotes: false, raw_escapes: false, skip_process_quotes: false, skip_unset_env: false }
    }
}
