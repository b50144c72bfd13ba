//! `--chmod` values: octal or symbolic, as BuildKit reads them.
//!
//! Symbolic modes are those of BSD's setmode(3), without a umask:
//! `[ugoa]* ([+-=] [rwxXst | ugo]*)+`, several separated by commas.

use serde::{Deserialize, Serialize};

/// A parsed `--chmod`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ModeChange {
    /// `0755`: the mode itself.
    Octal(u32),
    /// `u+x,go=rX`: the text, known to be valid; applied to each file's mode.
    Symbolic(String),
}

/// A `--chmod` that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModeError {
    /// A number that is not octal or too large.
    #[error("invalid chmod value `{0}`: an octal number between 0 and 07777 is needed")]
    Octal(String),
    /// Something else.
    #[error("invalid chmod value `{0}`")]
    Symbolic(String),
}

impl ModeError {
    /// A way out, one sentence.
    pub fn help(&self) -> Option<String> {
        Some("write an octal mode like `755` or a symbolic one like `u=rwX,go=rX`".to_owned())
    }
}

/// Reads a `--chmod` value.
pub fn parse(text: &str) -> Result<ModeChange, ModeError> {
    if text.starts_with(|first: char| first.is_ascii_digit()) {
        return match u32::from_str_radix(text, 8) {
            Ok(mode) if mode <= ALL => Ok(ModeChange::Octal(mode)),
            _ => Err(ModeError::Octal(text.to_owned())),
        };
    }
    symbolic(text, 0, false)
        .map(|_| ModeChange::Symbolic(text.to_owned()))
        .ok_or_else(|| ModeError::Symbolic(text.to_owned()))
}

impl ModeChange {
    /// Returns the mode (twelve bits) that a file with `mode` gets.
    pub fn apply(&self, mode: u32, is_dir: bool) -> u32 {
        match self {
            ModeChange::Octal(mode) => *mode,
            ModeChange::Symbolic(text) => symbolic(text, mode & ALL, is_dir).unwrap_or(mode),
        }
    }
}

const ALL: u32 = 0o7777;
const SET_IDS: u32 = 0o6000;
const STICKY: u32 = 0o1000;
/// What an empty "who" stands for.
const EVERYBODY: u32 = 0o6777;
const EXECUTE: u32 = 0o111;

/// Applies a symbolic mode; `None` when it is none.
fn symbolic(text: &str, old: u32, is_dir: bool) -> Option<u32> {
    text.split(',').try_fold(old, |mode, clause| clause_of(clause, mode, old, is_dir))
}

/// Applies `who` and its operations. `old` is the mode before the first clause: `X` asks that one.
fn clause_of(clause: &str, mut mode: u32, old: u32, is_dir: bool) -> Option<u32> {
    let operations = clause.trim_start_matches(['u', 'g', 'o', 'a']);
    let mut who = 0;
    for class in clause[..clause.len() - operations.len()].chars() {
        who |= match class {
            'u' => 0o4700,
            'g' => 0o2070,
            'o' => 0o007,
            _ => EVERYBODY,
        };
    }
    let mut letters = operations.chars().peekable();
    letters.peek()?;
    while let Some(operator) = letters.next() {
        if !matches!(operator, '+' | '-' | '=') {
            return None;
        }
        let mut operation = Operation { operator, who, bits: 0, conditional: false, cleared: false };
        while let Some(&letter) = letters.peek() {
            match letter {
                'r' => operation.bits |= 0o444,
                'w' => operation.bits |= 0o222,
                'x' => operation.bits |= EXECUTE,
                'X' => operation.conditional = operator != '-',
                // For others alone, neither means anything.
                's' if who != 0o007 => operation.bits |= SET_IDS,
                't' if who != 0o007 => {
                    operation.bits |= STICKY;
                    operation.who |= STICKY;
                }
                's' | 't' => {}
                'u' | 'g' | 'o' => {
                    mode = operation.flush(mode, old, is_dir, false);
                    mode = operation.copy(mode, letter);
                }
                _ => break,
            }
            letters.next();
        }
        mode = operation.flush(mode, old, is_dir, true);
    }
    Some(mode)
}

/// One operator and the letters behind it.
struct Operation {
    operator: char,
    who: u32,
    /// Bits named but not yet applied.
    bits: u32,
    /// `X` was named and not yet applied.
    conditional: bool,
    /// `=` has already taken the old bits away.
    cleared: bool,
}

impl Operation {
    /// Applies what was named so far.
    fn flush(&mut self, mut mode: u32, old: u32, is_dir: bool, end: bool) -> u32 {
        let mask = if self.who == 0 { ALL } else { self.who };
        let bits = std::mem::take(&mut self.bits);
        match self.operator {
            '+' => mode |= bits & mask,
            '-' => mode &= !(bits & mask),
            _ if bits != 0 || (end && !self.cleared) => {
                mode &= !(if self.who == 0 { EVERYBODY } else { self.who });
                mode |= bits & mask;
                self.cleared = true;
            }
            _ => {}
        }
        if std::mem::take(&mut self.conditional) && (is_dir || old & EXECUTE != 0) {
            mode |= EXECUTE & mask;
        }
        mode
    }

    /// `g=u`: gives one class the bits of another.
    fn copy(&mut self, mode: u32, from: char) -> u32 {
        let bits = match from {
            'u' => mode >> 6,
            'g' => mode >> 3,
            _ => mode,
        } & 0o7;
        let classes = if self.who == 0 { 0o777 } else { self.who & 0o777 };
        let bits = (bits * 0o111) & classes;
        self.cleared = true;
        match self.operator {
            '+' => mode | bits,
            '-' => mode & !bits,
            _ => (mode & !classes) | bits,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn vectors() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/vectors/chmod.json");
        let file: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        for vector in file["vectors"].as_array().unwrap() {
            let text = vector["mode"].as_str().unwrap();
            let Some(apply) = vector["apply"].as_object() else {
                assert!(parse(text).is_err(), "{text} should fail");
                continue;
            };
            let change = parse(text).unwrap();
            for (before, after) in apply {
                let octal = |text: &str| u32::from_str_radix(text.trim_start_matches('d'), 8).unwrap();
                let found = change.apply(octal(before), before.starts_with('d'));
                assert_eq!(
                    format!("{found:04o}"),
                    format!("{:04o}", octal(after.as_str().unwrap())),
                    "{text} {before}"
                );
            }
        }
    }

    #[test]
    fn refused() {
        let check = |text: &str, want: &str| assert_eq!(parse(text).unwrap_err().to_string(), want, "{text}");
        check("888", "invalid chmod value `888`: an octal number between 0 and 07777 is needed");
        check("77777", "invalid chmod value `77777`: an octal number between 0 and 07777 is needed");
        check("0x1", "invalid chmod value `0x1`: an octal number between 0 and 07777 is needed");
        for text in ["", "u", ",", "u+x,", ",u+x", "u+q", "+755", "-1", "é"] {
            check(text, &format!("invalid chmod value `{text}`"));
        }
    }

    #[test]
    fn copies_and_conditions() {
        let check = |text: &str, before: u32, want: u32| {
            let found = parse(text).unwrap().apply(before, false);
            assert_eq!(format!("{found:o}"), format!("{want:o}"), "{text} {before:o}");
        };
        check("go=u-w", 0o700, 0o755);
        check("a-x,a+X", 0o755, 0o755);
        check("go-u", 0o777, 0o700);
        check("o+s", 0o755, 0o755);
        check("u=", 0o4755, 0o055);
    }
}
