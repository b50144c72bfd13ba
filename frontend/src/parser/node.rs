//! Logical lines to nodes: keyword, flags and arguments, before anything is known about what they mean.
//!
//! How the arguments are split depends on the keyword alone. A node of an unknown keyword has none.

use crate::diagnostic::{Diagnostic, Problem};
use crate::flag::{self, Flag};
use crate::instruction::Text;
use crate::line::{LogicalLine, Slice, is_blank};
use std::ops::Range;

/// An instruction in raw form.
#[derive(Debug, Clone)]
pub(super) struct Node {
    /// As written.
    pub(super) keyword: Text,
    /// In upper case.
    pub(super) upper: String,
    pub(super) flags: Vec<Flag>,
    pub(super) arguments: Arguments,
    /// The arguments are a JSON array.
    pub(super) json: bool,
    /// All that stands behind the flags.
    pub(super) rest: Text,
}

/// Arguments of a node.
#[derive(Debug, Clone)]
pub(super) enum Arguments {
    /// Words, members of a JSON array, or one argument that is all of the line.
    List(Vec<Text>),
    /// ENV and LABEL.
    Pairs {
        pairs: Vec<(Text, Text)>,
        /// `name value` without `=`.
        legacy: bool,
    },
    /// ONBUILD.
    Trigger(Box<Node>),
}

impl Node {
    /// Splits a line; `None`, and a diagnostic, when its arguments cannot be split.
    pub(super) fn new(line: &LogicalLine, escape: char, problems: &mut Vec<Diagnostic>) -> Option<Self> {
        Self::of(line.whole(), escape, 0, problems)
    }

    fn of(line: Slice<'_>, escape: char, depth: usize, problems: &mut Vec<Diagnostic>) -> Option<Self> {
        let line = line.trim();
        let parts = line.split_blanks(2);
        let keyword = parts[0];
        let behind = parts.get(1).copied().unwrap_or(line.part(line.as_str().len()..line.as_str().len()));
        let (flags, rest) = flag::split_flags(behind, escape);
        let rest = rest.trim();
        let upper = keyword.as_str().to_uppercase();
        let mut json = false;
        let mut maybe_json = |whole: bool| match json_strings(rest, &upper) {
            Ok(Some(strings)) => {
                json = true;
                Ok(strings)
            }
            Ok(None) => Ok(if whole { one(rest) } else { blank_separated(rest) }),
            Err(problem) => Err(problem),
        };
        let arguments = match upper.as_str() {
            "ADD" | "COPY" | "VOLUME" => maybe_json(false).map(Arguments::List),
            "CMD" | "ENTRYPOINT" | "RUN" | "SHELL" => maybe_json(true).map(Arguments::List),
            "EXPOSE" | "FROM" => Ok(Arguments::List(blank_separated(rest))),
            "MAINTAINER" | "STOPSIGNAL" | "USER" | "WORKDIR" => Ok(Arguments::List(one(rest))),
            "ARG" => Ok(Arguments::List(words(rest, escape).into_iter().map(Slice::text).collect())),
            "ENV" | "LABEL" => pairs(rest, &upper, escape),
            "HEALTHCHECK" => {
                let text = rest.as_str();
                let end = text.find(char::is_whitespace).unwrap_or(text.len());
                let command = rest.part(end..text.len()).trim_start();
                match json_strings(command, &upper) {
                    Ok(strings) => {
                        json = strings.is_some();
                        let mut list = one(rest.part(0..end));
                        list.extend(strings.unwrap_or_else(|| one(command)));
                        Ok(Arguments::List(list))
                    }
                    Err(problem) => Err(problem),
                }
            }
            // Triggers of triggers are refused later; no need to follow them down.
            "ONBUILD" if !rest.is_empty() && depth < MAX_TRIGGERS => {
                let trigger = Self::of(rest, escape, depth + 1, problems)?;
                Ok(Arguments::Trigger(Box::new(trigger)))
            }
            _ => Ok(Arguments::List(Vec::new())),
        };
        let arguments = arguments.map_err(|problem| problems.push(*problem)).ok()?;
        Some(Self { keyword: keyword.text(), upper, flags, arguments, json, rest: rest.text() })
    }

    /// Whether lines behind this one may be heredocs of it.
    pub(super) fn can_have_heredocs(&self) -> bool {
        let node = match &self.arguments {
            Arguments::Trigger(trigger) => trigger,
            _ => self,
        };
        matches!(node.upper.as_str(), "ADD" | "COPY" | "RUN") && !node.json
    }

    /// The arguments as a list; empty for ENV, LABEL and ONBUILD.
    pub(super) fn list(&self) -> &[Text] {
        match &self.arguments {
            Arguments::List(list) => list,
            _ => &[],
        }
    }
}

const MAX_TRIGGERS: usize = 4;

type Split<T> = Result<T, Box<Diagnostic>>;

/// All of it as one argument, or none.
fn one(rest: Slice<'_>) -> Vec<Text> {
    if rest.is_empty() { Vec::new() } else { vec![rest.text()] }
}

fn blank_separated(rest: Slice<'_>) -> Vec<Text> {
    if rest.is_empty() {
        return Vec::new();
    }
    rest.split_blanks(usize::MAX).into_iter().map(Slice::text).collect()
}

/// Words separated by white space; quotes and escapes count but stay. An escape at the very end is dropped.
fn words(rest: Slice<'_>, escape: char) -> Vec<Slice<'_>> {
    let text = rest.as_str();
    let mut words = Vec::new();
    let mut chars = text.char_indices().peekable();
    loop {
        while chars.next_if(|(_, ch)| ch.is_whitespace()).is_some() {}
        let Some(&(start, _)) = chars.peek() else { return words };
        let mut end = start;
        let mut quote = None;
        while let Some((at, ch)) = chars.next_if(|(_, ch)| quote.is_some() || !ch.is_whitespace()) {
            if quote == Some(ch) {
                quote = None;
            } else if quote.is_none() && matches!(ch, '\'' | '"') {
                quote = Some(ch);
            } else if ch == escape && quote != Some('\'') {
                let Some((escaped_at, escaped)) = chars.next() else { break };
                end = escaped_at + escaped.len_utf8();
                continue;
            }
            end = at + ch.len_utf8();
        }
        if end > start {
            words.push(rest.part(start..end));
        }
    }
}

/// `name=value …` or the old form `name value`, which goes on to the end of the line.
fn pairs(rest: Slice<'_>, keyword: &str, escape: char) -> Split<Arguments> {
    let words = words(rest, escape);
    let Some(first) = words.first() else { return Ok(Arguments::List(Vec::new())) };
    if !first.as_str().contains('=') {
        return match rest.split_blanks(2)[..] {
            [name, value] => Ok(Arguments::Pairs { pairs: vec![(name.text(), value.text())], legacy: true }),
            _ => Err(Box::new(Diagnostic::at(first.span(), Problem::NameWithoutValue(keyword.to_owned())))),
        };
    }
    let pair = |word: Slice<'_>| match word.as_str().find('=') {
        Some(at) => Ok((word.part(0..at).text(), word.part(at + 1..word.as_str().len()).text())),
        None => {
            let problem = Problem::PairWithoutEquals { keyword: keyword.to_owned(), word: word.as_str().to_owned() };
            Err(Box::new(Diagnostic::at(word.span(), problem)))
        }
    };
    let pairs = words.into_iter().map(pair).collect::<Result<_, _>>()?;
    Ok(Arguments::Pairs { pairs, legacy: false })
}

/// Members of a JSON array of strings; `None` when the text is no JSON array, an error when a member is no string.
fn json_strings(rest: Slice<'_>, keyword: &str) -> Split<Option<Vec<Text>>> {
    let text = rest.as_str();
    if !text.starts_with('[') {
        return Ok(None);
    }
    let Ok(values) = serde_json::from_str::<Vec<serde_json::Value>>(text) else { return Ok(None) };
    let mut places = string_literals(text).into_iter();
    let mut strings = Vec::with_capacity(values.len());
    let mut behind = 1;
    for value in values {
        let serde_json::Value::String(value) = value else {
            let span = rest.part(json_value(text, behind)).span();
            return Err(Box::new(Diagnostic::at(span, Problem::JsonMember(keyword.to_owned()))));
        };
        let place = places.next().unwrap_or(0..text.len());
        behind = place.end;
        strings.push(rest.part(place).text_of(value));
    }
    Ok(Some(strings))
}

/// Where the first value of valid JSON from `start` on stands; a comma may come before it.
fn json_value(text: &str, start: usize) -> std::ops::Range<usize> {
    let rest = text.get(start..).unwrap_or_default();
    let value = rest.trim_start_matches([',', ' ', '\t', '\r', '\n']);
    let start = start + rest.len() - value.len();
    let mut values = serde_json::Deserializer::from_str(value).into_iter::<serde::de::IgnoredAny>();
    let found = values.next().is_some_and(|value| value.is_ok());
    let end = if found { start + values.byte_offset() } else { text.len() };
    start..end
}

/// Where the string literals of valid JSON stand, quotes included.
fn string_literals(text: &str) -> Vec<Range<usize>> {
    let mut literals = Vec::new();
    let mut start = None;
    let mut bytes = text.bytes().enumerate();
    while let Some((at, byte)) = bytes.next() {
        match (byte, start) {
            (b'"', None) => start = Some(at),
            (b'"', Some(from)) => {
                literals.push(from..at + 1);
                start = None;
            }
            (b'\\', Some(_)) => {
                bytes.next();
            }
            _ => {}
        }
    }
    literals
}

/// What stands behind `ONBUILD` and the blanks after it.
pub(super) fn behind_onbuild(line: &LogicalLine) -> Slice<'_> {
    let line = line.whole().trim_start();
    let text = line.as_str();
    let end = text.find(is_blank).unwrap_or(text.len());
    line.part(end..text.len()).trim_start()
}
