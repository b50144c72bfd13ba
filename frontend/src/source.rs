//! Text with places: byte spans and their lines and columns.

use serde::{Deserialize, Serialize};

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

    /// Line and column of a byte, both counted from 1; the column counts characters.
    pub fn line_column(&self, at: usize) -> (u32, u32) {
        let line = self.line(at);
        let start = self.line_starts[line as usize - 1];
        let column = self.text.get(start..at.min(self.text.len())).map_or(0, |before| before.chars().count());
        (line, u32::try_from(column).unwrap_or(u32::MAX - 1) + 1)
    }

    /// A line's text without its end; lines count from 1.
    pub fn line_text(&self, line: u32) -> &str {
        let index = line as usize - 1;
        let start = self.line_starts.get(index).copied().unwrap_or(self.text.len());
        let end = self.line_starts.get(index + 1).copied().unwrap_or(self.text.len());
        self.text[start..end].trim_end_matches(['\n', '\r'])
    }
}
