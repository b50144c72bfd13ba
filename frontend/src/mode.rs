//! `--chmod` values: octal or symbolic, as BuildKit reads them.

use serde::{Deserialize, Serialize};

/// A parsed `--chmod`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ModeChange {
    /// `0755`: the mode itself.
    Octal(u32),
    /// `u+x,go=rX`: the text, known to be valid; applied to each file's mode.
    Symbolic(String),
}
