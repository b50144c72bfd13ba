//! Quoting and `${VAR:-default}` expansion of words, as BuildKit's shell lexer does it.
//!
//! | written | value |
//! |---|---|
//! | `$A`, `${A}` | value of `A`, empty when unset |
//! | `${A:-w}`, `${A-w}` | `w` when unset (`:` also when empty) |
//! | `${A:+w}`, `${A+w}` | `w` when set (`:` and not empty) |
//! | `${A:?m}`, `${A?m}` | error `m` when unset (`:` also when empty) |
//! | `${A#p}`, `${A##p}` | without the shortest or longest match of `p` at the start |
//! | `${A%p}`, `${A%%p}` | the same at the end |
//! | `${A/p/w}`, `${A//p/w}` | first or every match of `p` replaced |
//!
//! In patterns `*` and `?` are wildcards. A value that was put in is never expanded again.

use regex::Regex;
use std::collections::BTreeSet;

/// A word cannot be expanded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WordError {
    /// A quote is not closed.
    #[error("unexpected end of statement while looking for matching {0}-quote")]
    UnclosedQuote(&'static str),
    /// `${` without its end.
    #[error("syntax error: missing '}}' of a substitution")]
    MissingBrace,
    /// `${A/pattern}` without the second slash.
    #[error("syntax error: missing '/' in a ${{}} substitution")]
    MissingSlash,
    /// `${}`, `${{`, `${:`.
    #[error("syntax error: bad substitution")]
    BadSubstitution,
    /// `${A:=word}` and other operators that do not exist here.
    #[error("unsupported modifier ({0}) in substitution")]
    UnsupportedModifier(String),
    /// `${A:?message}` of a variable that is not set, or empty.
    #[error("{name}: {message}")]
    Required {
        /// The variable.
        name: String,
        /// Its message, or a default one.
        message: String,
    },
    /// A pattern with an escape that does not exist.
    #[error("invalid pattern ({0}) in substitution")]
    InvalidPattern(String),
    /// Variables that hold variables that hold … make a long text of a short one.
    #[error("variables expand to too long a text")]
    TooLong,
    /// Substitutions inside each other, more than anybody writes.
    #[error("substitutions nested too deeply")]
    TooDeep,
}

impl WordError {
    /// A way out, one sentence.
    pub fn help(&self) -> Option<String> {
        let help = match self {
            WordError::UnclosedQuote("single") => "close it with `'`, or escape it outside of quotes",
            WordError::UnclosedQuote(_) => "close it with `\"`, or escape it",
            WordError::MissingBrace => "close it with `}`, and put quotes around the word if it holds blanks",
            WordError::MissingSlash => "write `${NAME/pattern/replacement}`",
            WordError::BadSubstitution => "write `${NAME}`, or escape the `$`",
            WordError::UnsupportedModifier(modifier) if modifier.ends_with('=') => {
                "`:=` cannot set a variable here: use `:-` for a default"
            }
            WordError::UnsupportedModifier(_) => "`:-`, `:+`, `:?`, `#`, `%` and `/` are possible",
            WordError::Required { .. } => "give it a value with ENV, ARG or `--build-arg`",
            WordError::InvalidPattern(_) => "only `*`, `?`, `/`, `}` and the backslash can be escaped in a pattern",
            WordError::TooLong => "Linux passes at most 128 KiB in a variable: write longer text to a file",
            WordError::TooDeep => "set an ARG or ENV first and use that",
        };
        Some(help.to_owned())
    }
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

    /// Expands all of `text` to one word; blanks stay.
    pub fn word(&self, text: &str, vars: &(impl Variables + ?Sized)) -> Result<Expansion, WordError> {
        let mut run = Run::new(self, text, vars);
        let (value, _) = run.until(None, self.raw_escapes)?;
        Ok(Expansion { value, matched: run.matched, unmatched: run.unmatched })
    }

    /// Expands `text` and splits it at blanks that are not quoted; blanks that come from variables split too.
    pub fn words(&self, text: &str, vars: &(impl Variables + ?Sized)) -> Result<Vec<String>, WordError> {
        Run::new(self, text, vars).until(None, self.raw_escapes).map(|(_, words)| words)
    }
}

/// Substitutions inside each other; keeps the recursion within any thread's stack.
const MAX_DEPTH: usize = 100;
/// Bytes that variables may add to a text: the longest string that Linux passes to a program. Without a limit, 40 lines
/// like `ENV A=$A$A` would fill any memory.
const MAX_GROWTH: usize = 128 << 10;

struct Run<'a, V: ?Sized> {
    lexer: &'a Lexer,
    rest: std::str::Chars<'a>,
    vars: &'a V,
    raw_escapes: bool,
    depth: usize,
    /// Bytes that came from variables.
    grown: usize,
    /// The word being read. There is one for all levels: a word inside `${}` ends the one outside of it, whose start
    /// is lost, so `x${A:-b}y` splits into `by` alone. BuildKit does that; only splitting is concerned.
    split: String,
    matched: BTreeSet<String>,
    unmatched: BTreeSet<String>,
}

impl<'a, V: Variables + ?Sized> Run<'a, V> {
    fn new(lexer: &'a Lexer, text: &'a str, vars: &'a V) -> Self {
        Self {
            lexer,
            rest: text.chars(),
            vars,
            raw_escapes: lexer.raw_escapes,
            depth: 0,
            grown: 0,
            split: String::new(),
            matched: BTreeSet::new(),
            unmatched: BTreeSet::new(),
        }
    }

    fn peek(&self) -> Option<char> {
        self.rest.clone().next()
    }

    fn next(&mut self) -> Option<char> {
        self.rest.next()
    }

    /// Reads up to `stop`, or to the end when there is none.
    fn until(&mut self, stop: Option<char>, raw_escapes: bool) -> Result<(String, Vec<String>), WordError> {
        if self.depth == MAX_DEPTH {
            return Err(WordError::TooDeep);
        }
        self.depth += 1;
        let outer = std::mem::replace(&mut self.raw_escapes, raw_escapes);
        let result = self.until_inner(stop);
        self.raw_escapes = outer;
        self.depth -= 1;
        result
    }

    fn until_inner(&mut self, stop: Option<char>) -> Result<(String, Vec<String>), WordError> {
        let mut result = String::new();
        let mut words = Vec::new();
        while let Some(ch) = self.peek() {
            if stop == Some(ch) {
                self.next();
                self.end_word(&mut words);
                return Ok((result, words));
            }
            match ch {
                '$' => {
                    let value = self.dollar()?;
                    result.push_str(&value);
                    value.chars().for_each(|ch| self.push(ch, &mut words));
                }
                '\'' | '"' if !self.lexer.skip_process_quotes => {
                    let value = if ch == '"' { self.double_quote()? } else { self.single_quote()? };
                    result.push_str(&value);
                    self.split.push_str(&value);
                }
                '<' => {
                    // Blanks between `<<` and the name of a heredoc belong to its word.
                    let value = self.possible_heredoc();
                    result.push_str(&value);
                    self.split.push_str(&value);
                }
                _ => {
                    self.next();
                    if ch != self.lexer.escape {
                        self.push(ch, &mut words);
                        result.push(ch);
                        continue;
                    }
                    if self.raw_escapes {
                        self.split.push(ch);
                        result.push(ch);
                    }
                    // An escape at the very end stands for nothing.
                    let Some(escaped) = self.next() else { break };
                    self.split.push(escaped);
                    result.push(escaped);
                }
            }
        }
        self.end_word(&mut words);
        // What is missing depends on who called; callers inside `${` name it.
        if stop.is_some() { Err(WordError::MissingBrace) } else { Ok((result, words)) }
    }

    /// A character outside of quotes: a blank ends the word.
    fn push(&mut self, ch: char, words: &mut Vec<String>) {
        if ch.is_whitespace() {
            self.end_word(words);
        } else {
            self.split.push(ch);
        }
    }

    fn end_word(&mut self, words: &mut Vec<String>) {
        if !self.split.is_empty() {
            words.push(std::mem::take(&mut self.split));
        }
    }

    fn single_quote(&mut self) -> Result<String, WordError> {
        let mut result = String::new();
        self.quote_mark(&mut result);
        loop {
            match self.peek() {
                None => return Err(WordError::UnclosedQuote("single")),
                Some('\'') => {
                    self.quote_mark(&mut result);
                    return Ok(result);
                }
                Some(ch) => {
                    self.next();
                    result.push(ch);
                }
            }
        }
    }

    fn double_quote(&mut self) -> Result<String, WordError> {
        let mut result = String::new();
        self.quote_mark(&mut result);
        loop {
            match self.peek() {
                None => return Err(WordError::UnclosedQuote("double")),
                Some('"') => {
                    self.quote_mark(&mut result);
                    return Ok(result);
                }
                Some('$') => {
                    let value = self.dollar()?;
                    result.push_str(&value);
                }
                Some(mut ch) => {
                    self.next();
                    if ch == self.lexer.escape {
                        if self.raw_escapes {
                            result.push(ch);
                        }
                        match self.peek() {
                            None => continue,
                            // Nothing else can be escaped between double quotes: the escape character stays.
                            Some(escaped) if matches!(escaped, '"' | '$') || escaped == self.lexer.escape => {
                                self.next();
                                ch = escaped;
                            }
                            Some(_) => {}
                        }
                    }
                    result.push(ch);
                }
            }
        }
    }

    /// Takes a quote; it shows in the result only with `raw_quotes`.
    fn quote_mark(&mut self, result: &mut String) {
        if let Some(mark) = self.next()
            && self.lexer.raw_quotes
        {
            result.push(mark);
        }
    }

    fn possible_heredoc(&mut self) -> String {
        let mut result = String::new();
        result.extend(self.next());
        if self.peek() == Some('<') {
            result.extend(self.next());
            while self.peek().is_some_and(char::is_whitespace) {
                result.extend(self.next());
            }
        }
        result
    }

    /// Everything that starts with `$`.
    fn dollar(&mut self) -> Result<String, WordError> {
        let value = self.substitution()?;
        self.grown = self.grown.saturating_add(value.len());
        if self.grown > MAX_GROWTH { Err(WordError::TooLong) } else { Ok(value) }
    }

    fn substitution(&mut self) -> Result<String, WordError> {
        self.next();
        if self.peek() != Some('{') {
            let name = self.name();
            if name.is_empty() {
                return Ok("$".to_owned());
            }
            return Ok(match self.value(&name, true) {
                None if self.lexer.skip_unset_env => format!("${name}"),
                value => value.unwrap_or_default(),
            });
        }
        self.next();
        match self.peek() {
            None => return Err(WordError::MissingBrace),
            Some('{' | '}' | ':') => return Err(WordError::BadSubstitution),
            Some(_) => {}
        }
        let name = self.name();
        match self.next() {
            None => Err(WordError::MissingBrace),
            Some('}') => Ok(match self.value(&name, true) {
                None if self.lexer.skip_unset_env => format!("${{{name}}}"),
                value => value.unwrap_or_default(),
            }),
            Some('/') => self.replace(&name),
            Some(':') => match self.next() {
                None => Err(WordError::MissingBrace),
                Some(operator) => self.operator(&name, operator, true),
            },
            Some(operator @ ('+' | '-' | '?' | '#' | '%')) => self.operator(&name, operator, false),
            Some(other) => Err(WordError::UnsupportedModifier(other.to_string())),
        }
    }

    /// `${NAME-word}` and its like, behind the operator; `colon`: an empty value counts as unset.
    fn operator(&mut self, name: &str, operator: char, colon: bool) -> Result<String, WordError> {
        let pattern = matches!(operator, '#' | '%');
        let mut word = self.inner_word('}', pattern, WordError::MissingBrace)?;
        let modifier = format!("{}{operator}", if colon { ":" } else { "" });
        let value = self.value(name, pattern);
        if value.is_none() && self.lexer.skip_unset_env {
            return Ok(format!("${{{name}{modifier}{word}}}"));
        }
        let missing = value.as_ref().is_none_or(|value| colon && value.is_empty());
        match operator {
            '-' => Ok(if missing { word } else { value.unwrap_or_default() }),
            '+' => Ok(if missing { String::new() } else { word }),
            '?' if missing => {
                let default = if value.is_none() { "is not allowed to be unset" } else { "is not allowed to be empty" };
                let message = if word.is_empty() { default.to_owned() } else { word };
                Err(WordError::Required { name: name.to_owned(), message })
            }
            '?' => Ok(value.unwrap_or_default()),
            '#' | '%' => {
                let greedy = word.starts_with(operator);
                if greedy {
                    word.remove(0);
                }
                let value = value.unwrap_or_default();
                if operator == '#' {
                    return trim_prefix(&word, &value, greedy);
                }
                // A regular expression finds the leftmost match, so the end is looked at backwards.
                let reversed: String = value.chars().rev().collect();
                let trimmed = trim_prefix(&reverse_pattern(&word), &reversed, greedy)?;
                Ok(trimmed.chars().rev().collect())
            }
            _ => Err(WordError::UnsupportedModifier(modifier)),
        }
    }

    /// `${NAME/pattern/replacement}`, behind the first slash.
    fn replace(&mut self, name: &str) -> Result<String, WordError> {
        let all = self.peek() == Some('/');
        if all {
            self.next();
        }
        let pattern = self.inner_word('/', true, WordError::MissingSlash)?;
        let replacement = self.inner_word('}', true, WordError::MissingBrace)?;
        let value = self.value(name, true);
        if value.is_none() && self.lexer.skip_unset_env {
            return Ok(format!("${{{name}/{pattern}/{replacement}}}"));
        }
        let value = value.unwrap_or_default();
        let regex = pattern_regex(&pattern, true, false)?;
        if all {
            // BuildKit hands the replacement to its regular expressions as it is, so `$1` in it stands for nothing.
            return replace_all(&regex, &value, &replacement);
        }
        Ok(match regex.find(&value) {
            Some(found) => [&value[..found.start()], &replacement, &value[found.end()..]].concat(),
            None => value,
        })
    }

    /// A word inside `${}`. Whatever goes wrong at the end of the text is that the end is missing.
    fn inner_word(&mut self, stop: char, raw_escapes: bool, at_end: WordError) -> Result<String, WordError> {
        match self.until(Some(stop), raw_escapes) {
            Ok((word, _)) => Ok(word),
            Err(WordError::TooLong) => Err(WordError::TooLong),
            Err(_) if self.peek().is_none() => Err(at_end),
            Err(error) => Err(error),
        }
    }

    /// A name behind `$`: letters, digits and `_`; or a number; or one special parameter.
    fn name(&mut self) -> String {
        let mut name = String::new();
        let number = self.peek().is_some_and(is_digit);
        while let Some(ch) = self.peek() {
            if !number && name.is_empty() && matches!(ch, '@' | '*' | '#' | '?' | '-' | '$' | '!') {
                self.next();
                return ch.to_string();
            }
            let part = if number { is_digit(ch) } else { ch == '_' || ch.is_alphabetic() || is_digit(ch) };
            if !part {
                break;
            }
            self.next();
            name.push(ch);
        }
        name
    }

    /// Looks a variable up; `needed` when nothing stands in for an unset one.
    fn value(&mut self, name: &str, needed: bool) -> Option<String> {
        match self.vars.get(name) {
            Some(value) => {
                self.matched.insert(name.to_owned());
                Some(value.to_owned())
            }
            None => {
                if needed {
                    self.unmatched.insert(name.to_owned());
                }
                None
            }
        }
    }
}

fn is_digit(ch: char) -> bool {
    ch.is_ascii_digit() || (!ch.is_ascii() && ch.is_numeric() && !ch.is_alphabetic())
}

fn replace_all(regex: &Regex, value: &str, replacement: &str) -> Result<String, WordError> {
    let groups = replacement.matches('$').count();
    let mut out = String::new();
    let mut end = 0;
    for found in regex.captures_iter(value) {
        let whole = found.get_match();
        out.push_str(&value[end..whole.start()]);
        if out.len() + replacement.len() + groups.saturating_mul(whole.len()) > MAX_GROWTH {
            return Err(WordError::TooLong);
        }
        found.expand(replacement, &mut out);
        end = whole.end();
    }
    out.push_str(&value[end..]);
    Ok(out)
}

fn trim_prefix(pattern: &str, value: &str, greedy: bool) -> Result<String, WordError> {
    let regex = pattern_regex(pattern, greedy, true)?;
    Ok(regex.find(value).map_or(value, |found| &value[found.end()..]).to_owned())
}

/// Translates a shell pattern without bracket expressions.
fn pattern_regex(pattern: &str, greedy: bool, anchored: bool) -> Result<Regex, WordError> {
    let invalid = || WordError::InvalidPattern(pattern.to_owned());
    let mut out = String::from(if anchored { "^" } else { "" });
    let mut chars = pattern.chars().peekable();
    while let Some(ch) = chars.next() {
        match ch {
            '*' => out.push_str(if greedy { ".*" } else { ".*?" }),
            '?' => out.push('.'),
            '\\' => match chars.peek() {
                // These two are escaped for the sake of `${}`, not of the pattern.
                Some('}' | '/') => {}
                Some(&escaped @ ('*' | '?' | '\\')) => {
                    chars.next();
                    out.extend(['\\', escaped]);
                }
                _ => return Err(invalid()),
            },
            _ => out.push_str(&regex::escape(ch.encode_utf8(&mut [0; 4]))),
        }
    }
    Regex::new(&out).map_err(|_| invalid())
}

/// Turns a pattern around, keeping each escape in front of what it escapes.
fn reverse_pattern(pattern: &str) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut chars = pattern.chars();
    while let Some(ch) = chars.next() {
        let mut part = ch.to_string();
        if ch == '\\' {
            part.extend(chars.next());
        }
        parts.push(part);
    }
    parts.into_iter().rev().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn vars(list: &[&str]) -> Vec<(String, String)> {
        list.iter()
            .map(|pair| pair.split_once('=').map(|(name, value)| (name.into(), value.into())).expect("name=value"))
            .collect()
    }

    #[test]
    fn vectors() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/vectors/words.json");
        let file: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        let env: Vec<&str> = file["env"].as_array().unwrap().iter().map(|pair| pair.as_str().unwrap()).collect();
        let env = vars(&env);
        for vector in file["vectors"].as_array().unwrap() {
            let text = vector["in"].as_str().unwrap();
            let escape = vector["escape"].as_str().and_then(|escape| escape.chars().next()).unwrap_or('\\');
            let lexer = Lexer::new(escape);
            let word = lexer.word(text, env.as_slice());
            let words = lexer.words(text, env.as_slice());
            if let Some(error) = vector["error"].as_str() {
                assert!(word.is_err() && words.is_err(), "{text} should fail: {error}");
                continue;
            }
            assert_eq!(word.unwrap().value, vector["word"].as_str().unwrap(), "{text}");
            let want: Vec<String> = serde_json::from_value(vector["words"].clone()).unwrap();
            assert_eq!(words.unwrap(), want, "{text}");
        }
    }

    #[test]
    fn errors_name_what_is_wrong() {
        let env = vars(&["SET=x", "EMPTY="]);
        let check = |text: &str, want: &str| {
            assert_eq!(Lexer::new('\\').word(text, env.as_slice()).unwrap_err().to_string(), want, "{text}");
        };
        check("\"abc", "unexpected end of statement while looking for matching double-quote");
        check("${SET", "syntax error: missing '}' of a substitution");
        check("${SET:", "syntax error: missing '}' of a substitution");
        check("a${}b", "syntax error: bad substitution");
        check("${SET:=x}", "unsupported modifier (:=) in substitution");
        check("${NO:?must be set}", "NO: must be set");
        check("${EMPTY:?}", "EMPTY: is not allowed to be empty");
        check("${SET/x}", "syntax error: missing '/' in a ${} substitution");
        check(&format!("{}{}x", "${NO:-".repeat(200), "}".repeat(200)), "substitutions nested too deeply");
    }

    #[test]
    fn options() {
        let env = vars(&["A=x y"]);
        let check = |lexer: Lexer, text: &str, want: &str| {
            assert_eq!(lexer.word(text, env.as_slice()).unwrap().value, want, "{text}");
        };
        let plain = Lexer::new('\\');
        check(Lexer { raw_quotes: true, ..plain }, "'a' \"$A\"", "'a' \"x y\"");
        check(Lexer { raw_escapes: true, ..plain }, "\\a \"\\\"\"", "\\a \\\"");
        check(Lexer { skip_process_quotes: true, ..plain }, "it's \"$A\"", "it's \"x y\"");
        let skip = Lexer { skip_unset_env: true, ..plain };
        check(skip, "$NO ${NO} ${NO:-d} ${NO#p} ${NO/a/b} $A", "$NO ${NO} ${NO:-d} ${NO#p} ${NO/a/b} x y");
    }

    #[test]
    fn variables_used() {
        let env = vars(&["A=1"]);
        let found = Lexer::new('\\').word("$A $B ${C:-d} ${D+x} ${E#x}", env.as_slice()).unwrap();
        assert_eq!(found.matched.into_iter().collect::<Vec<_>>(), ["A"]);
        assert_eq!(found.unmatched.into_iter().collect::<Vec<_>>(), ["B", "E"]);
    }

    #[test]
    fn heredoc_words_keep_their_blanks() {
        let words = Lexer::new('\\').words("cat <<  EOF > f", [].as_slice()).unwrap();
        assert_eq!(words, ["cat", "<<  EOF", ">", "f"]);
    }

    #[test]
    fn text_does_not_grow_without_end() {
        let long = "x".repeat(100 << 10);
        let vars = [("A".to_owned(), long.clone()), ("B".to_owned(), "xy".repeat(1000))];
        let word = |text: &str| Lexer::new('\\').word(text, vars.as_slice()).map(|word| word.value.len());
        assert_eq!(word("$A"), Ok(long.len()));
        for text in [
            "$A$A",
            "${A}${A}",
            "\"$A$A\"",
            "${A:-x}$A",
            "${B:+$A$A}",
            "${A//x/abc}",
            &format!("${{B//*/{}}}", "\\$0".repeat(70)),
        ] {
            assert_eq!(word(text), Err(WordError::TooLong), "{text}");
        }
        // What was written at that length is not concerned.
        assert_eq!(word(&long.repeat(3)), Ok(3 * long.len()));
        assert_eq!(word("${B//x/z\\$0}"), Ok(2000 + 2 * 1000));
    }
}
