//! Text with places: byte spans and their lines and columns.

use serde::{Deserialize, Serialize};

/// Byte order mark; some editors put one at the start of a file.
pub(crate) const BYTE_ORDER_MARK: char = '\u{feff}';

/// Byte range in a [`SourceFile`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Span {
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

impl Span {
    /// Range from `start` to before `end`.
    pub fn new(start: usize, end: usize) -> Self {
        Self { start, end }
    }

    /// Smallest range that holds both.
    pub fn to(self, other: Span) -> Self {
        Self { start: self.start.min(other.start), end: self.end.max(other.end) }
    }
}

/// A file's name and text, with the starts of its lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    /// Name to show.
    pub name: String,
    /// The bytes as read, made valid UTF-8; spans point into this.
    pub text: String,
    line_starts: Vec<usize>,
}

impl SourceFile {
    /// Takes a file's text.
    pub fn new(name: impl Into<String>, text: impl Into<String>) -> Self {
        let text = text.into();
        let line_starts = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        Self { name: name.into(), text, line_starts }
    }

    /// Line of a byte, counted from 1.
    pub fn line(&self, at: usize) -> u32 {
        u32::try_from(self.line_starts.partition_point(|&start| start <= at)).unwrap_or(u32::MAX)
    }

    /// Line and column of a byte, both counted from 1; the column counts characters, a byte order mark is none.
    pub fn line_column(&self, at: usize) -> (u32, u32) {
        let line = self.line(at);
        let start = self.line_starts.get(line as usize - 1).copied().unwrap_or(0);
        let before = self.text.get(start..at.min(self.text.len())).unwrap_or("");
        let before = if start == 0 { before.trim_start_matches(BYTE_ORDER_MARK) } else { before };
        (line, u32::try_from(before.chars().count()).unwrap_or(u32::MAX - 1) + 1)
    }

    /// First byte of a line; lines count from 1.
    pub fn line_start(&self, line: u32) -> usize {
        self.line_starts.get((line as usize).saturating_sub(1)).copied().unwrap_or(self.text.len())
    }

    /// A line's text without its end; lines count from 1.
    pub fn line_text(&self, line: u32) -> &str {
        let index = (line as usize).saturating_sub(1);
        let start = self.line_start(line);
        let end = self.line_starts.get(index + 1).copied().unwrap_or(self.text.len());
        self.text[start..end].trim_end_matches(['\n', '\r'])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        let source = SourceFile::new("f", "\u{feff}ab\r\nčd\n");
        let check = |at, want| assert_eq!(source.line_column(at), want, "{at}");
        check(0, (1, 1));
        check(3, (1, 1));
        check(4, (1, 2));
        check(7, (2, 1));
        check(9, (2, 2));
        check(11, (3, 1));
        check(900, (3, 1));
        assert_eq!(source.line_text(2), "čd");
        assert_eq!(source.line_text(0), source.line_text(1));
        assert_eq!(source.line_text(77), "");
    }
}
