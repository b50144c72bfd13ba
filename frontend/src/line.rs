//! Physical lines to logical lines: parser directives, comments, continuations, heredocs.
//!
//! A logical line is one instruction. It is made of pieces of physical lines and remembers where each came from, so
//! that every part of it can be shown in the file. The rules (BuildKit's):
//!
//! - Directives (`# escape=`, `# syntax=`, `# check=`) are read until the first line that is none.
//! - Blanks before an instruction and before `#` do not matter. A line that continues keeps its blanks.
//! - The escape character at the end of a line continues it, blanks after it are dropped; two of them do not.
//! - Inside a continuation, comment lines and blank lines are dropped.
//! - The lines of a heredoc are taken as they are, line ends included.

use crate::diagnostic::{Diagnostic, Problem};
use crate::instruction::Text;
use crate::source::{BYTE_ORDER_MARK, Span};
use crate::word::{Lexer, Variables};
use std::ops::Range;

/// An instruction's text with continuations joined and comments dropped.
#[derive(Debug, Clone)]
pub(crate) struct LogicalLine {
    /// Joined text; blanks at its end are kept.
    pub(crate) text: String,
    /// Where each piece starts: in `text`, in the file.
    pieces: Vec<(usize, usize)>,
    /// First and last physical line, counted from 1.
    pub(crate) lines: (u32, u32),
    /// Comments above it.
    pub(crate) comments: Vec<String>,
}

impl LogicalLine {
    /// All of it.
    pub(crate) fn whole(&self) -> Slice<'_> {
        Slice { line: self, start: 0, end: self.text.len() }
    }

    fn source_at(&self, at: usize) -> usize {
        let index = self.pieces.partition_point(|&(start, _)| start <= at).saturating_sub(1);
        self.pieces.get(index).map_or(0, |&(start, source)| source + at - start)
    }

    fn span(&self, start: usize, end: usize) -> Span {
        let first = self.source_at(start);
        // The place of the last byte, not of the one behind it: that may stand on another line.
        Span::new(first, if end > start { self.source_at(end - 1) + 1 } else { first })
    }
}

/// Part of a logical line.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slice<'a> {
    line: &'a LogicalLine,
    start: usize,
    end: usize,
}

impl<'a> Slice<'a> {
    pub(crate) fn as_str(self) -> &'a str {
        &self.line.text[self.start..self.end]
    }

    pub(crate) fn is_empty(self) -> bool {
        self.start == self.end
    }

    pub(crate) fn span(self) -> Span {
        self.line.span(self.start, self.end)
    }

    /// Part of it, by byte offsets that lie on characters.
    pub(crate) fn part(self, range: Range<usize>) -> Self {
        Self { line: self.line, start: self.start + range.start, end: self.start + range.end }
    }

    pub(crate) fn text(self) -> Text {
        Text { value: self.as_str().to_owned(), span: self.span() }
    }

    /// A value that is not literally the text (quotes removed) but stands here.
    pub(crate) fn text_of(self, value: String) -> Text {
        Text { value, span: self.span() }
    }

    pub(crate) fn trim_start(self) -> Self {
        let text = self.as_str();
        self.part(text.len() - text.trim_start().len()..text.len())
    }

    pub(crate) fn trim(self) -> Self {
        let trimmed = self.trim_start();
        trimmed.part(0..trimmed.as_str().trim_end().len())
    }

    /// Splits at runs of tabs, blanks, vertical tabs, form feeds and carriage returns; at most into `limit` parts.
    pub(crate) fn split_blanks(self, limit: usize) -> Vec<Self> {
        let text = self.as_str();
        let mut parts = Vec::new();
        let mut start = 0;
        while parts.len() + 1 < limit {
            let Some(blank) = text[start..].find(is_blank) else { break };
            let end = start + blank;
            parts.push(self.part(start..end));
            start = end + text[end..].find(|ch| !is_blank(ch)).unwrap_or(text.len() - end);
        }
        parts.push(self.part(start..text.len()));
        parts
    }
}

/// Characters that separate arguments. Not all white space: no-break spaces and the like belong to words.
pub(crate) fn is_blank(ch: char) -> bool {
    matches!(ch, '\t' | '\u{b}' | '\u{c}' | '\r' | ' ')
}

/// `<<EOF` as it stands on the instruction's line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeredocMarker {
    /// Its name, without quotes.
    pub name: String,
    /// File descriptor before `<<`; 0 where none is written.
    pub file_descriptor: u32,
    /// `<<-`.
    pub chomp: bool,
    /// No quote in the name.
    pub expand: bool,
}

struct NoVariables;

impl Variables for NoVariables {
    fn get(&self, _: &str) -> Option<&str> {
        None
    }

    fn names(&self) -> Vec<&str> {
        Vec::new()
    }
}

impl HeredocMarker {
    /// Reads a word that is a heredoc marker and nothing else: `<<EOF`, `3<<-"E O F"`. Markers know only the
    /// backslash as escape character, whatever the file says.
    pub fn parse(word: &str) -> Option<Self> {
        let after_digits = word.trim_start_matches(|ch: char| ch.is_ascii_digit());
        let digits = &word[..word.len() - after_digits.len()];
        let rest = after_digits.strip_prefix("<<")?;
        let (chomp, rest) = rest.strip_prefix('-').map_or((false, rest), |rest| (true, rest));
        let rest = rest.trim_start_matches([' ', '\t', '\n', '\r', '\u{c}']);
        if rest.is_empty() || rest.contains('<') {
            return None;
        }
        let lexer = Lexer { skip_unset_env: true, ..Lexer::new('\\') };
        let [name] = <[String; 1]>::try_from(lexer.words(rest, &NoVariables).ok()?).ok()?;
        let [quoted] =
            <[String; 1]>::try_from(Lexer { raw_quotes: true, ..lexer }.words(rest, &NoVariables).ok()?).ok()?;
        // Escaped quotes are in both; those that quote are only in the second.
        let expand = name.matches(['\'', '"']).count() == quoted.matches(['\'', '"']).count();
        let file_descriptor = if digits.is_empty() { 0 } else { digits.parse().unwrap_or(u32::MAX) };
        Some(Self { name, file_descriptor, chomp, expand })
    }

    /// All markers of an instruction's line, in order. A line that is not well quoted has none.
    pub(crate) fn find_all(line: &str) -> Vec<Self> {
        if !line.contains("<<") {
            return Vec::new();
        }
        let lexer = Lexer { raw_quotes: true, raw_escapes: true, skip_unset_env: true, ..Lexer::new('\\') };
        let words = lexer.words(line, &NoVariables).unwrap_or_default();
        words.iter().filter_map(|word| Self::parse(word)).collect()
    }
}

/// Removes the tabs at the start of each line, as `<<-` does.
pub fn chomp(content: &str) -> String {
    content.split_inclusive('\n').map(|line| line.trim_start_matches('\t')).collect()
}

/// What the reader still accepts as a directive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Directives {
    /// All of them.
    All,
    /// Behind a `#!` line: those that describe the file, but not `escape`, as in BuildKit.
    Descriptive,
    /// Over.
    Done,
}

/// Reads logical lines and, when told to, the heredocs behind them.
pub(crate) struct Reader<'a> {
    text: &'a str,
    at: usize,
    /// Physical lines read.
    line: u32,
    pub(crate) escape: char,
    pub(crate) directives: Vec<(String, Text)>,
    pub(crate) problems: Vec<Diagnostic>,
    state: Directives,
    comments: Vec<String>,
}

impl<'a> Reader<'a> {
    /// Reads a file.
    pub(crate) fn new(text: &'a str) -> Self {
        let at = if text.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len_utf8() } else { 0 };
        Self {
            text,
            at,
            line: 0,
            escape: '\\',
            directives: Vec::new(),
            problems: Vec::new(),
            state: Directives::All,
            comments: Vec::new(),
        }
    }

    /// Reads a piece of text that has no directives.
    pub(crate) fn without_directives(text: &'a str, escape: char) -> Self {
        Self { escape, state: Directives::Done, ..Self::new(text) }
    }

    /// Next physical line: its range without the line end, and where the next one starts.
    fn physical(&mut self) -> Option<(Range<usize>, usize)> {
        if self.at >= self.text.len() {
            return None;
        }
        let start = self.at;
        let next = self.text[start..].find('\n').map_or(self.text.len(), |end| start + end + 1);
        self.at = next;
        self.line = self.line.saturating_add(1);
        let length = self.text[start..next].trim_end_matches(['\r', '\n']).len();
        Some((start..start + length, next))
    }

    /// Next instruction's line.
    pub(crate) fn next_line(&mut self) -> Option<LogicalLine> {
        loop {
            let (range, _) = self.physical()?;
            let raw = &self.text[range.clone()];
            let trimmed = raw.trim_start();
            let start = range.end - trimmed.len();
            if let Some(comment) = trimmed.strip_prefix('#') {
                if !self.directive(comment, range.end - comment.len()) {
                    self.comment(comment.trim());
                }
                continue;
            }
            self.state = Directives::Done;
            if trimmed.is_empty() {
                // An empty line parts a comment from the instruction: it describes something else.
                self.comments.clear();
                continue;
            }
            return Some(self.logical(start..range.end));
        }
    }

    /// Joins the physical line at `range` with those that it continues on.
    fn logical(&mut self, range: Range<usize>) -> LogicalLine {
        let first = self.line;
        let mut line = LogicalLine { text: String::new(), pieces: Vec::new(), lines: (first, first), comments: vec![] };
        let mut more = self.piece(range, &mut line);
        while more {
            let Some((range, _)) = self.physical() else { break };
            let trimmed = self.text[range.clone()].trim_start();
            if !trimmed.is_empty() && !trimmed.starts_with('#') {
                more = self.piece(range, &mut line);
            }
        }
        line.lines.1 = self.line;
        line.comments = std::mem::take(&mut self.comments);
        line
    }

    /// Adds a physical line; true when it ends with the escape character.
    fn piece(&self, range: Range<usize>, line: &mut LogicalLine) -> bool {
        let raw = &self.text[range.clone()];
        let body = raw.trim_end_matches([' ', '\t']).strip_suffix(self.escape);
        let (body, more) = match body {
            Some(body) if !body.ends_with(self.escape) => (body, true),
            _ => (raw, false),
        };
        line.pieces.push((line.text.len(), range.start));
        line.text.push_str(body);
        more
    }

    fn comment(&mut self, comment: &str) {
        if comment.is_empty() {
            self.comments.clear();
        } else {
            self.comments.push(comment.to_owned());
        }
    }

    /// Takes a comment as a directive, if it is one; `comment` starts behind `#`, at byte `at`.
    fn directive(&mut self, comment: &str, at: usize) -> bool {
        if self.state == Directives::Done {
            return false;
        }
        if self.line == 1 && comment.starts_with('!') && at == 1 + self.first_byte() {
            self.state = Directives::Descriptive;
            return false;
        }
        let Some((name, range)) = parse_directive(comment) else {
            self.state = Directives::Done;
            return false;
        };
        let value =
            Text { value: comment[range.clone()].to_owned(), span: Span::new(at + range.start, at + range.end) };
        if self.state == Directives::Descriptive && name == "escape" {
            return false;
        }
        if self.directives.iter().any(|(known, _)| *known == name) {
            self.problems.push(Diagnostic::at(value.span, Problem::DuplicateDirective(name)));
            return true;
        }
        if name == "escape" {
            match value.value.as_str() {
                "\\" => self.escape = '\\',
                "`" => self.escape = '`',
                other => {
                    let problem = Problem::EscapeDirective(other.to_owned());
                    self.problems.push(Diagnostic::at(value.span, problem));
                }
            }
        }
        self.directives.push((name, value));
        true
    }

    fn first_byte(&self) -> usize {
        if self.text.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len_utf8() } else { 0 }
    }

    /// Reads the lines of a heredoc up to its end: content as it stands and its place, or `None` when the file ends
    /// before.
    pub(crate) fn heredoc(&mut self, marker: &HeredocMarker) -> Option<Text> {
        let start = self.at;
        while let Some((range, _)) = self.physical() {
            let mut line = &self.text[range.clone()];
            if marker.chomp {
                line = line.trim_start_matches('\t');
            }
            if line == marker.name {
                let span = Span::new(start, range.start);
                return Some(Text { value: self.text[start..range.start].to_owned(), span });
            }
        }
        None
    }

    /// Physical lines read so far.
    pub(crate) fn lines_read(&self) -> u32 {
        self.line
    }

    /// End of what was read so far, without the last line end.
    pub(crate) fn end(&self) -> usize {
        self.text[..self.at].trim_end_matches(['\r', '\n']).len()
    }
}

/// Name in lower case and range of the value of a directive; `None` for an ordinary comment.
fn parse_directive(comment: &str) -> Option<(String, Range<usize>)> {
    let (name, value) = comment.split_once('=')?;
    let name = name.trim();
    let known = ["escape", "syntax", "check"].into_iter().find(|known| name.eq_ignore_ascii_case(known))?;
    let start = comment.len() - value.trim_start().len();
    let end = start + value.trim().len();
    (end > start).then(|| (known.to_owned(), start..end))
}

/// Whether a comment would be a directive if it stood at the start of a file.
pub(crate) fn is_directive(comment: &str) -> bool {
    parse_directive(comment).is_some()
}

/// Front end that a file asks for with `# syntax=`, `// syntax=` or `{"syntax": …}`, where the last two are for files
/// that are no Dockerfiles; a `#!` line before it is skipped.
pub fn detect_syntax(text: &str) -> Option<String> {
    let text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text);
    let text = if text.starts_with("#!") { text.split_once('\n').map_or("", |(_, rest)| rest) } else { text };
    for mark in ["#", "//"] {
        for line in text.lines() {
            let Some((name, range, comment)) = line
                .trim_start()
                .strip_prefix(mark)
                .and_then(|comment| parse_directive(comment).map(|(name, range)| (name, range, comment)))
            else {
                break;
            };
            if name == "syntax" {
                return Some(comment[range].to_owned());
            }
        }
    }
    if !text.trim_start().starts_with('{') {
        return None;
    }
    let value: serde_json::Value = serde_json::from_str(text).ok()?;
    Some(value.get("syntax")?.as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<String> {
        let mut reader = Reader::new(text);
        std::iter::from_fn(|| reader.next_line()).map(|line| line.text).collect()
    }

    #[test]
    fn joining() {
        let check = |text: &str, want: &[&str]| assert_eq!(lines(text), want, "{text:?}");
        check("A b", &["A b"]);
        check("\u{feff}A \\\r\n b\r\n", &["A  b"]);
        check("A \\  \n\n # c\n\tb\n", &["A \tb"]);
        check("A \\\\\nB", &["A \\\\", "B"]);
        check("A \\\\\\\nB", &["A \\\\\\", "B"]);
        check("A \\", &["A "]);
        check("\\\nA", &["A"]);
        check("# escape=`\nA `\nB \\\nC", &["A B \\", "C"]);
        check("\n# escape=`\nA `\nB", &["A `", "B"]);
        check("#!/bin/x\n# escape=`\nA `\nB", &["A `", "B"]);
        check("  # escape = ` \nA `\nB", &["A B"]);
    }

    #[test]
    fn places_survive_joining() {
        let text = "RUN a\\\n  bc\n";
        let mut reader = Reader::new(text);
        let line = reader.next_line().unwrap();
        let check = |range: Range<usize>, want: &str| {
            let span = line.whole().part(range.clone()).span();
            assert_eq!(&text[span.start..span.end], want, "{range:?}");
        };
        check(4..5, "a");
        check(7..9, "bc");
        check(4..9, "a\\\n  bc");
        check(0..5, "RUN a");
    }

    #[test]
    fn markers() {
        let check = |word: &str, want: Option<(&str, u32, bool, bool)>| {
            let found = HeredocMarker::parse(word);
            let found = found.as_ref().map(|m| (m.name.as_str(), m.file_descriptor, m.chomp, m.expand));
            assert_eq!(found, want, "{word}");
        };
        check("<<EOF", Some(("EOF", 0, false, true)));
        check("<< EOF", Some(("EOF", 0, false, true)));
        check("3<<-EOF", Some(("EOF", 3, true, true)));
        check("<<'EOF'", Some(("EOF", 0, false, false)));
        check("<<\"E O\"", Some(("E O", 0, false, false)));
        check("<<E\"O\"F", Some(("EOF", 0, false, false)));
        check("<<eo\\'f", Some(("eo'f", 0, false, true)));
        check("<<$EOF", Some(("$EOF", 0, false, true)));
        check("<<EOF cat", None);
        check("<<", None);
        check("<<-", None);
        check("<<<x", None);
        check("a<<EOF", None);
        check("<<\"EOF", None);
    }

    #[test]
    fn comments_above() {
        let mut reader = Reader::new("# syntax=x\n# gone\n#\n# one\n  #two\nA\nB");
        assert_eq!(reader.next_line().unwrap().comments, ["one", "two"]);
        assert!(reader.next_line().unwrap().comments.is_empty());
        let mut reader = Reader::new("# apart\n \nA\n# one\nB");
        assert!(reader.next_line().unwrap().comments.is_empty());
        assert_eq!(reader.next_line().unwrap().comments, ["one"]);
    }

    #[test]
    fn syntax() {
        let check = |text: &str, want: Option<&str>| assert_eq!(detect_syntax(text).as_deref(), want, "{text}");
        check("# syntax=docker/dockerfile:1\nFROM x", Some("docker/dockerfile:1"));
        check("#!/usr/bin/x\n# check=skip=all\n# Syntax = a b \n", Some("a b"));
        check("// syntax=x\n", Some("x"));
        check("{\"syntax\": \"x\"}", Some("x"));
        check("FROM x\n# syntax=x", None);
        check("# c\n# syntax=x", None);
    }
}
