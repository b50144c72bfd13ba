//! Mistakes in a Dockerfile: a closed list, each with its place and a way out.
//!
//! Errors end the build, warnings (build checks) do not. The text of both is made here, in one place; colour and
//! layout belong to the caller.

use crate::source::Span;

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// What is wrong.
    pub problem: Problem,
    /// Where; `None` when it is about the whole file or comes from outside of it (a base image's trigger).
    pub span: Option<Span>,
}

/// What is wrong. Parsing and expansion mistakes first, then those of stages and lowering.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Nothing in it.
    #[error("file with no instructions")]
    Empty,
    /// A word cannot be expanded.
    #[error(transparent)]
    Word(#[from] crate::word::WordError),
    /// Found when stages are put together and lowered.
    #[error(transparent)]
    Lower(#[from] crate::lower_problem::LowerProblem),
}

impl Diagnostic {
    /// A mistake at a place.
    pub fn at(span: Span, problem: Problem) -> Self {
        Self { problem, span: Some(span) }
    }
}
