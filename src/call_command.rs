//! `nacre build --call=…` and `--check`: what can be said of a Dockerfile without building it.

use crate::build_command::failure;
use crate::report::{CommandError, Exit};
use crate::request::{BuildRequest, Call, CallFormat};
use nacre_frontend::instruction::{Dockerfile, InstructionKind};
use nacre_frontend::lower::{self, BaseConfigs};

/// Answers on standard output.
pub(crate) fn run(
    request: &BuildRequest,
    dockerfile: &Dockerfile,
    options: &lower::Options,
) -> Result<(), CommandError> {
    match request.call {
        Call::Check(format) => check(dockerfile, options, format),
        Call::Targets(CallFormat::Text) => crate::print_result(&targets(dockerfile)),
        Call::Build | Call::Outline(_) | Call::Targets(_) => {
            Err(failure(Exit::Usage, "this --call method or format is not possible yet", None))
        }
    }
}

/// Prints the findings of the build checks; any finding makes the exit code 3.
fn check(dockerfile: &Dockerfile, options: &lower::Options, format: CallFormat) -> Result<(), CommandError> {
    let source = &dockerfile.source;
    let in_file = |diagnostics| CommandError::Dockerfile { source: source.clone(), diagnostics };
    // What only a base image's configuration could tell is left out: a check fetches nothing.
    let (_, warnings) = lower::lower(dockerfile, options, &BaseConfigs::new()).map_err(in_file)?;
    let mut text = String::new();
    match format {
        CallFormat::Text => {
            for warning in &warnings {
                let (line, column) = source.line_column(warning.span.start);
                text.push_str(&format!("{}:{line}:{column}: {:?}: {}\n", source.name, warning.rule, warning.message));
            }
            text.push_str(&format!("Check complete, {} found.\n", count(warnings.len())));
        }
        CallFormat::Json => {
            let warnings: Vec<serde_json::Value> = warnings
                .iter()
                .map(|warning| {
                    let (line, column) = source.line_column(warning.span.start);
                    serde_json::json!({
                        "rule": format!("{:?}", warning.rule), "message": warning.message, "url": warning.url,
                        "file": source.name, "line": line, "column": column,
                    })
                })
                .collect();
            text = format!("{}\n", serde_json::json!({ "warnings": warnings }));
        }
        CallFormat::Sarif => return Err(failure(Exit::Usage, "SARIF is not possible yet", None)),
    }
    crate::print_result(&text)?;
    if warnings.is_empty() {
        return Ok(());
    }
    Err(failure(Exit::Dockerfile, &format!("the checks found {}", count(warnings.len())), None))
}

fn count(warnings: usize) -> String {
    match warnings {
        0 => "no warnings".to_owned(),
        1 => "1 warning".to_owned(),
        more => format!("{more} warnings"),
    }
}

/// A line for each stage: its name or number, and what it builds on.
fn targets(dockerfile: &Dockerfile) -> String {
    let stages = dockerfile.instructions.iter().filter_map(|instruction| match &instruction.kind {
        InstructionKind::From { image, name, .. } => Some((name, image, &instruction.comments)),
        _ => None,
    });
    let mut text = String::new();
    for (number, (name, image, comments)) in stages.enumerate() {
        let name = name.as_ref().map_or_else(|| number.to_string(), |name| name.value.clone());
        text.push_str(&format!("{name:20} FROM {}", image.value));
        if let Some(comment) = comments.last() {
            text.push_str(&format!("  # {comment}"));
        }
        text.push('\n');
    }
    text
}
