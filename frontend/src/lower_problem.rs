//! Mistakes found when stages are put together and lowered.

/// What is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LowerProblem {
    /// `--target` names no stage.
    #[error("target stage `{0}` could not be found")]
    UnknownTarget(String),
}

impl LowerProblem {
    /// A way out, one sentence.
    pub fn help(&self) -> Option<String> {
        None
    }
}
