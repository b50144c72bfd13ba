//! `nacre build --call=…` and `--check`: what can be said of a Dockerfile without building it.
//!
//! The answer goes to standard output. Base images are asked for their configuration as in a build, because it may
//! hold variables, triggers and a shell; one that cannot be had is no reason to fail.

use crate::build_command::{failure, workspace};
use crate::report::{CommandError, Exit, Severity, Style, printable};
use crate::request::{BuildRequest, Call, CallFormat};
use nacre_frontend::check::{Rule, Warning};
use nacre_frontend::diagnostic::Diagnostic;
use nacre_frontend::instruction::Dockerfile;
use nacre_frontend::lower::{self, BaseConfigs, BaseImage, BaseRequest, Lowered};
use nacre_frontend::outline::{Given, Outline};
use nacre_frontend::parser::ParseFailure;
use nacre_frontend::source::{SourceFile, Span};
use nacre_frontend::stage::{self, Target};
use nacre_solver::materialize::Ownership;
use nacre_solver::op::source::resolve_image;
use nacre_solver::snapshot::Workspace;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// Findings that a build shows with their places; the rest is counted.
const SHOWN_IN_BUILD: usize = 5;

/// Without colours: standard output is for programs too.
const PLAIN: Style = Style { color: false };

/// Answers on standard output.
pub(crate) fn run(
    request: &BuildRequest,
    parsed: Result<Dockerfile, ParseFailure>,
    mut options: lower::Options,
) -> Result<(), CommandError> {
    let dockerfile = match parsed {
        Ok(dockerfile) => dockerfile,
        Err(failure) => return Err(broken(request.call, failure.source, failure.diagnostics)?),
    };
    if let Call::Targets(format) = request.call {
        return crate::print_result(&targets(&dockerfile, format)?);
    }
    let check = matches!(request.call, Call::Check(_));
    // Without a target all stages are checked, not only those that the last one needs.
    options.all_stages = check && options.target.is_none();
    let bases = bases(request, &dockerfile, &options);
    options.check_only = true;
    let (_, warnings, outline) = match lower::lower_and_outline(&dockerfile, &options, &bases) {
        Ok(result) => result,
        Err(diagnostics) => return Err(broken(request.call, dockerfile.source, diagnostics)?),
    };
    let source = &dockerfile.source;
    match request.call {
        Call::Outline(format) => crate::print_result(&outline_text(source, &outline, format)?),
        Call::Check(format) => {
            crate::print_result(&findings(source, &warnings, None, format))?;
            if warnings.is_empty() {
                return Ok(());
            }
            let help = Some("`# check=skip=RULE,…` at the top of the file turns checks off".to_owned());
            Err(failure(Exit::Dockerfile, &format!("the checks found {}", count(warnings.len())), help))
        }
        Call::Build | Call::Targets(_) => Ok(()),
    }
}

/// A file with mistakes: programs that read the findings of checks are told where they look.
fn broken(call: Call, source: SourceFile, diagnostics: Vec<Diagnostic>) -> Result<CommandError, CommandError> {
    if let Call::Check(format @ (CallFormat::Json | CallFormat::Sarif)) = call {
        crate::print_result(&findings(&source, &[], diagnostics.first(), format))?;
    }
    Ok(CommandError::Dockerfile { source, diagnostics })
}

/// Configurations of all base images that can be had.
fn bases(request: &BuildRequest, dockerfile: &Dockerfile, options: &lower::Options) -> BaseConfigs {
    let mut bases = BaseConfigs::new();
    let mut gone: BTreeSet<BaseRequest> = BTreeSet::new();
    let mut opened: Option<Workspace> = None;
    // Triggers of a base may name further images. A file with mistakes needs none: they are told by the caller.
    while let Ok((Lowered::NeedsBases(mut missing), _)) = lower::lower(dockerfile, options, &bases) {
        missing.retain(|base, _| !gone.contains(base));
        if missing.is_empty() {
            break;
        }
        if opened.is_none() {
            opened = workspace(request, Ownership::SingleId, None, None).ok();
        }
        let Some(opened) = &opened else {
            notice("the store cannot be used: base images are not looked at, what they hold may be missed");
            break;
        };
        // All at once: one that nobody answers for takes its time.
        let found: Vec<_> = std::thread::scope(|scope| {
            let ask = |base: BaseRequest| {
                let image = resolve_image(&base.source, &base.platform, &opened.sources);
                (base, image)
            };
            let threads: Vec<_> = missing.into_keys().map(|base| scope.spawn(move || ask(base))).collect();
            threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
        });
        if found.is_empty() {
            break;
        }
        for (base, image) in found {
            match image {
                Ok(image) => {
                    let digest = Some(image.root_digest.clone());
                    bases.insert(base, BaseImage { config: image.config.clone(), digest });
                }
                Err(error) => {
                    let error = crate::report::with_causes(&error);
                    notice(&format!("a base image is not looked at, what it holds may be missed: {error}"));
                    gone.insert(base);
                }
            }
        }
    }
    bases
}

fn notice(text: &str) {
    crate::print_error(&PLAIN.block(Severity::Warning, text, None, &[], None));
}

/// What the checks found, in one of the formats.
fn findings(source: &SourceFile, warnings: &[Warning], mistake: Option<&Diagnostic>, format: CallFormat) -> String {
    match format {
        CallFormat::Text => {
            let mut text = format!("Check complete, {} found.\n", count(warnings.len()));
            for warning in warnings {
                text.push('\n');
                text.push_str(&block(source, warning, PLAIN));
            }
            text
        }
        CallFormat::Json => pretty(&check_json(source, warnings, mistake)),
        CallFormat::Sarif => pretty(&sarif(source, warnings, mistake)),
    }
}

fn block(source: &SourceFile, warning: &Warning, style: Style) -> String {
    let message = format!("{} ({})", warning.message, warning.rule.name());
    let notes = [warning.url.clone()];
    style.block(Severity::Warning, &message, Some((source, Some(warning.span))), &notes, None)
}

/// What a build shows when its steps are done; empty without findings.
pub(crate) fn in_build(source: &SourceFile, found: &BTreeSet<Warning>, style: Style) -> String {
    if found.is_empty() {
        return String::new();
    }
    let mut text: String = found.iter().take(SHOWN_IN_BUILD).map(|one| block(source, one, style) + "\n").collect();
    let shown = match found.len() > SHOWN_IN_BUILD {
        true => format!(", {SHOWN_IN_BUILD} shown (use --check to see all)"),
        false => String::new(),
    };
    text.push_str(&format!("{} found{shown}\n", count(found.len())));
    text
}

fn count(warnings: usize) -> String {
    match warnings {
        0 => "no warnings".to_owned(),
        1 => "1 warning".to_owned(),
        more => format!("{more} warnings"),
    }
}

fn pretty(value: &Value) -> String {
    // A value of strings and numbers always serialises.
    serde_json::to_string_pretty(value).unwrap_or_default() + "\n"
}

/// First and last place of a span; lines count from 1, characters from 0.
fn range(source: &SourceFile, span: Span) -> Value {
    let place = |at: usize| {
        let (line, column) = source.line_column(at);
        json!({ "line": line, "character": column - 1 })
    };
    json!({ "start": place(span.start), "end": place(span.end) })
}

fn location(source: &SourceFile, span: Span) -> Value {
    json!({ "sourceIndex": 0, "ranges": [range(source, span)] })
}

/// The members that docker's answer has.
fn check_json(source: &SourceFile, warnings: &[Warning], mistake: Option<&Diagnostic>) -> Value {
    let warnings: Vec<Value> = warnings
        .iter()
        .map(|warning| {
            json!({
                "ruleName": warning.rule.name(),
                "description": warning.rule.description(),
                "url": warning.url,
                "detail": warning.message,
                "location": location(source, warning.span),
            })
        })
        .collect();
    let mut answer = json!({
        "warnings": warnings,
        "sources": [{ "fileName": source.name, "language": "Dockerfile", "data": base64(source.text.as_bytes()) }],
    });
    if let Some(mistake) = mistake {
        let location = mistake.span.map(|span| location(source, span));
        answer["buildError"] = json!({ "message": mistake.problem.to_string(), "location": location });
    }
    answer
}

/// SARIF 2.1.0.
fn sarif(source: &SourceFile, warnings: &[Warning], mistake: Option<&Diagnostic>) -> Value {
    let rules: Vec<Value> = Rule::ALL
        .iter()
        .map(|rule| {
            json!({
                "id": rule.name(), "name": rule.name(), "helpUri": rule.url(),
                "shortDescription": { "text": rule.description() },
                "defaultConfiguration": { "level": "warning", "enabled": !rule.experimental() },
            })
        })
        .collect();
    let place = |span: Option<Span>| {
        let region = span.map(|span| {
            let ((line, column), (last, end)) = (source.line_column(span.start), source.line_column(span.end));
            json!({ "startLine": line, "startColumn": column, "endLine": last, "endColumn": end })
        });
        let mut place = json!({ "artifactLocation": { "uri": uri(&source.name) } });
        if let Some(region) = region {
            place["region"] = region;
        }
        json!([{ "physicalLocation": place }])
    };
    let mut results: Vec<Value> = warnings
        .iter()
        .map(|warning| {
            json!({
                "ruleId": warning.rule.name(),
                "ruleIndex": Rule::ALL.iter().position(|rule| *rule == warning.rule),
                "level": "warning",
                "message": { "text": warning.message },
                "locations": place(Some(warning.span)),
            })
        })
        .collect();
    results.extend(mistake.map(|mistake| {
        json!({
            "level": "error", "message": { "text": mistake.problem.to_string() }, "locations": place(mistake.span),
        })
    }));
    json!({
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{
            "tool": { "driver": { "name": "nacre", "version": env!("CARGO_PKG_VERSION"), "rules": rules } },
            "columnKind": "unicodeCodePoints",
            "results": results,
        }],
    })
}

/// A path as a URI reference.
fn uri(path: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    path.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let number = three.iter().chain([0, 0].iter()).take(3).fold(0, |number, byte| number << 8 | usize::from(*byte));
        for digit in 0..4 {
            match digit <= three.len() {
                true => text.push(char::from(DIGITS[number >> (18 - 6 * digit) & 63])),
                false => text.push('='),
            }
        }
    }
    text
}

fn no_sarif<T>(call: &str) -> Result<T, CommandError> {
    Err(failure(Exit::Usage, &format!("--call={call} has no SARIF format"), Some("use format=json".to_owned())))
}

/// Columns as wide as they must be; the first row is the head.
fn table(rows: &[Vec<String>]) -> String {
    let mut widths: BTreeMap<usize, usize> = BTreeMap::new();
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| printable(&cell.replace('\n', " "))).collect()).collect();
    for (at, cell) in rows.iter().flat_map(|row| row.iter().enumerate()) {
        let width = widths.entry(at).or_default();
        *width = (*width).max(cell.chars().count());
    }
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<String> =
            row.iter().enumerate().map(|(at, cell)| format!("{cell:width$}", width = widths[&at])).collect();
        text.push_str(cells.join("   ").trim_end());
        text.push('\n');
    }
    text
}

fn targets(dockerfile: &Dockerfile, format: CallFormat) -> Result<String, CommandError> {
    let targets = stage::targets(dockerfile);
    let source = &dockerfile.source;
    match format {
        CallFormat::Text => {
            let mut rows = vec![vec!["TARGET".to_owned(), "BASE".to_owned(), "DESCRIPTION".to_owned()]];
            for (number, target) in targets.iter().enumerate() {
                let name = target.name.clone().unwrap_or_else(|| number.to_string());
                let name = if target.default { format!("{name} (default)") } else { name };
                rows.push(vec![name, target.base.clone(), target.description.clone().unwrap_or_default()]);
            }
            Ok(table(&rows))
        }
        CallFormat::Json => {
            let targets: Vec<Value> = targets.iter().map(|target| target_json(source, target)).collect();
            Ok(pretty(&json!({ "targets": targets, "sources": [base64(source.text.as_bytes())] })))
        }
        CallFormat::Sarif => no_sarif("targets"),
    }
}

/// Members without a value are left out, as docker does.
fn object(members: &[(&str, Option<Value>)]) -> Value {
    Value::Object(members.iter().filter_map(|(name, value)| Some(((*name).to_owned(), value.clone()?))).collect())
}

fn target_json(source: &SourceFile, target: &Target) -> Value {
    let (first, last) = target.lines;
    let text = |text: &Option<String>| text.clone().map(Value::String);
    let span = Span::new(source.line_start(first), source.line_start(last) + source.line_text(last).len());
    object(&[
        ("name", text(&target.name)),
        ("default", target.default.then_some(Value::Bool(true))),
        ("description", text(&target.description)),
        ("base", Some(Value::String(target.base.clone()))),
        ("platform", text(&target.platform)),
        ("location", Some(location(source, span))),
    ])
}

fn outline_text(source: &SourceFile, outline: &Outline, format: CallFormat) -> Result<String, CommandError> {
    match format {
        CallFormat::Text => Ok(outline_table(outline)),
        CallFormat::Json => Ok(pretty(&outline_json(source, outline))),
        CallFormat::Sarif => no_sarif("outline"),
    }
}

fn outline_table(outline: &Outline) -> String {
    let mut head = Vec::new();
    for (what, text) in [("TARGET:", &outline.name), ("DESCRIPTION:", &outline.description)] {
        if let Some(text) = text {
            head.push(vec![what.to_owned(), text.clone()]);
        }
    }
    let mut parts = vec![table(&head)];
    let mut list = |columns: &[&str], rows: Vec<Vec<String>>| {
        if !rows.is_empty() {
            let head = columns.iter().map(|column| (*column).to_owned()).collect();
            parts.push(table(&[vec![head], rows].concat()));
        }
    };
    let args = outline.args.iter().map(|arg| {
        vec![arg.name.clone(), arg.value.clone().unwrap_or_default(), arg.description.clone().unwrap_or_default()]
    });
    list(&["BUILD ARG", "VALUE", "DESCRIPTION"], args.collect());
    let given = |list: &[Given]| -> Vec<Vec<String>> {
        let required = |one: &Given| if one.required { "true".to_owned() } else { String::new() };
        list.iter().map(|one| vec![one.name.clone(), required(one)]).collect()
    };
    list(&["SECRET", "REQUIRED"], given(&outline.secrets));
    list(&["SSH", "REQUIRED"], given(&outline.ssh));
    list(&["CACHE"], outline.caches.iter().map(|one| vec![one.name.clone()]).collect());
    parts.retain(|part| !part.is_empty());
    parts.join("\n")
}

fn outline_json(source: &SourceFile, outline: &Outline) -> Value {
    let text = |text: &Option<String>| text.clone().map(Value::String);
    let list = |list: Vec<Value>| (!list.is_empty()).then_some(Value::Array(list));
    let args = outline.args.iter().map(|arg| {
        object(&[
            ("name", Some(json!(arg.name))),
            ("description", text(&arg.description)),
            ("value", text(&arg.value)),
            ("location", Some(location(source, arg.span))),
        ])
    });
    let given = |list: &[Given], name: &str| -> Vec<Value> {
        list.iter()
            .map(|one| {
                object(&[
                    (name, Some(json!(one.name))),
                    ("required", one.required.then_some(Value::Bool(true))),
                    ("location", Some(location(source, one.span))),
                ])
            })
            .collect()
    };
    object(&[
        ("name", text(&outline.name)),
        ("description", text(&outline.description)),
        ("args", list(args.collect())),
        ("secrets", list(given(&outline.secrets, "name"))),
        ("ssh", list(given(&outline.ssh, "name"))),
        ("cache", list(given(&outline.caches, "ID"))),
        ("sources", Some(json!([base64(source.text.as_bytes())]))),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_known_texts() {
        for (text, want) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(text.as_bytes()), want);
        }
        assert_eq!(base64(&[0xff, 0xfe, 0xfd, 0]), "//79AA==");
    }

    #[test]
    fn tables_line_up() {
        let row = |cells: &[&str]| cells.iter().map(|cell| (*cell).to_owned()).collect::<Vec<_>>();
        let text = table(&[row(&["A", "LONG", "C"]), row(&["a name", "x", ""]), row(&["é", "", "z\u{1b}[m"])]);
        assert_eq!(text, "A        LONG   C\na name   x\né               z\u{fffd}[m\n");
    }

    #[test]
    fn a_build_shows_a_few_findings_and_counts_all() {
        let source = SourceFile::new("Dockerfile", "FROM scratch AS B\n");
        let finding = |end: usize| Warning {
            span: Span::new(16, end),
            rule: Rule::StageNameCasing,
            message: "stage name".to_owned(),
            url: Rule::StageNameCasing.url(),
        };
        assert_eq!(in_build(&source, &BTreeSet::new(), PLAIN), "");
        let one = in_build(&source, &BTreeSet::from([finding(17)]), PLAIN);
        let expected = "\
warning: stage name (StageNameCasing)
 --> Dockerfile:1:17
  |
1 | FROM scratch AS B
  |                 ^
note: https://docs.docker.com/go/dockerfile/rule/stage-name-casing/

1 warning found
";
        assert_eq!(one, expected);
        let many: BTreeSet<Warning> = (10..17).map(|at| Warning { span: Span::new(at, 17), ..finding(17) }).collect();
        let text = in_build(&source, &many, PLAIN);
        assert!(text.ends_with("\n7 warnings found, 5 shown (use --check to see all)\n"), "{text}");
        assert_eq!(text.matches("warning: ").count(), 5);
    }
}
