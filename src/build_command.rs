//! `nacre build`: placeholder until the crates below are joined here.

use crate::report::{CommandError, Exit, Failure};
use crate::request::{BuildRequest, Environment};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Checks that there is a Dockerfile and ends with an error.
pub(crate) fn run(request: &BuildRequest, _env: &Environment, _cancel: &Arc<AtomicBool>) -> Result<(), CommandError> {
    Err(CommandError::Failure(Box::new(Failure {
        exit: Exit::General,
        message: format!("building {:?} is not possible yet", request.context),
        place: None,
        help: None,
    })))
}

/// Becomes a step's first process.
pub(crate) fn sandbox() -> ExitCode {
    ExitCode::FAILURE
}
