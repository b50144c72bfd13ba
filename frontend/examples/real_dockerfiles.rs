//! Parses, checks and plans Dockerfiles as they come: one line for each path in the arguments, with the number of its
//! lines, its outcome and how often each check was found, between tabs. No base image is looked at: all are empty.

#![allow(clippy::print_stdout, reason = "a program of its own")]

use nacre_frontend::image_config::ImageConfig;
use nacre_frontend::llb::Platform;
use nacre_frontend::lower::{BaseConfigs, BaseImage, Lowered, Options, lower};
use nacre_frontend::parser;
use nacre_frontend::source::SourceFile;
use std::collections::BTreeMap;

/// Outcome, and names of the checks that were found.
fn outcome(text: String) -> (String, Vec<&'static str>) {
    let file = match parser::parse(SourceFile::new("Dockerfile", text)) {
        Ok(file) => file,
        Err(failure) => {
            let problems = failure.diagnostics.iter().map(|one| {
                let line = one.span.map_or(0, |span| failure.source.line(span.start));
                format!("{line}: {}", one.problem)
            });
            return (format!("parse: {}", problems.collect::<Vec<_>>().join("; ")), Vec::new());
        }
    };
    let printed = file.to_text();
    match parser::parse(SourceFile::new("Dockerfile", printed)) {
        Ok(again) if again.same_instructions(&file) => {}
        _ => return ("print: another file".to_owned(), Vec::new()),
    }
    let host = Platform { os: "linux".to_owned(), architecture: "amd64".to_owned(), variant: String::new() };
    let mut options = Options::new(host);
    options.all_stages = true;
    let mut bases = BaseConfigs::new();
    loop {
        match lower(&file, &options, &bases) {
            Ok((Lowered::Graph(_), warnings)) => {
                return ("ok".to_owned(), warnings.iter().map(|warning| warning.rule.name()).collect());
            }
            Ok((Lowered::NeedsBases(missing), _)) => {
                bases.extend(missing.into_keys().map(|request| {
                    let config = ImageConfig::scratch(&request.platform);
                    (request, BaseImage { config, digest: None })
                }));
            }
            Err(found) => {
                let problems = found.iter().map(|one| {
                    let line = one.span.map_or(0, |span| file.source.line(span.start));
                    format!("{line}: {}", one.problem)
                });
                return (format!("plan: {}", problems.collect::<Vec<_>>().join("; ")), Vec::new());
            }
        }
    }
}

fn main() -> std::io::Result<()> {
    for path in std::env::args().skip(1) {
        let text = parser::decode(&std::fs::read(&path)?);
        let lines = text.lines().count();
        let (outcome, found) = outcome(text);
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        found.into_iter().for_each(|name| *counts.entry(name).or_default() += 1);
        let counts: Vec<String> = counts.into_iter().map(|(name, count)| format!("{name}={count}")).collect();
        let outcome = outcome.replace(['\t', '\n', '\r'], " ");
        println!("{path}\t{lines}\t{outcome}\t{}", counts.join(" "));
    }
    Ok(())
}
