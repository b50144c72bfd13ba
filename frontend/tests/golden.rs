//! Dockerfiles with what parser and lowering make of them: `testdata/dockerfile/CASE/{Dockerfile,ast,graph}`.
//!
//! `ast` is the typed file, or its mistakes. `graph` is a line for each vertex, the image, and the findings of the
//! checks, or the mistakes. NACRE_REWRITE_GOLDEN=1 writes both anew; read the difference before it is committed.

use nacre_frontend::check::Warning;
use nacre_frontend::diagnostic::Diagnostic;
use nacre_frontend::image_config::{DEFAULT_PATH, ImageConfig};
use nacre_frontend::instruction::Dockerfile;
use nacre_frontend::llb::Platform;
use nacre_frontend::lower::{BaseConfigs, BaseImage, Lowered, Options, lower};
use nacre_frontend::parser;
use nacre_frontend::source::SourceFile;
use std::path::{Path, PathBuf};

fn host() -> Platform {
    Platform { os: "linux".to_owned(), architecture: "amd64".to_owned(), variant: String::new() }
}

/// Every base image: one layer and PATH; one called `onbuild` has a trigger.
fn base(request: &str) -> BaseImage {
    let mut config = ImageConfig::scratch(&host());
    config.config.env = vec![format!("PATH={DEFAULT_PATH}")];
    config.config.cmd = Some(vec!["sh".to_owned()]);
    if request.contains("onbuild") {
        config.config.on_build = vec!["ARG WHO=world".to_owned(), "RUN echo $WHO".to_owned()];
    }
    config.commit("base".to_owned(), false, None);
    config.rootfs.diff_ids = Some(vec![format!("sha256:{:064}", 1)]);
    BaseImage { config, digest: None }
}

fn mistakes(source: &SourceFile, found: &[Diagnostic]) -> String {
    let line = |one: &Diagnostic| {
        let place = one.span.map(|span| {
            let (line, column) = source.line_column(span.start);
            format!("{line}:{column} {:?} ", &source.text[span.start..span.end])
        });
        let help = one.problem.help().map(|help| format!("\n  help: {help}")).unwrap_or_default();
        format!("mistake {}{}{help}\n", place.unwrap_or_default(), one.problem)
    };
    found.iter().map(line).collect()
}

fn findings(source: &SourceFile, warnings: &[Warning]) -> String {
    let line = |one: &Warning| {
        let (line, column) = source.line_column(one.span.start);
        let marked = &source.text[one.span.start..one.span.end];
        format!("check {} {line}:{column} {marked:?} {}\n", one.rule.name(), one.message)
    };
    warnings.iter().map(line).collect()
}

fn graph(file: &Dockerfile) -> String {
    let options = Options { multi_platform: false, ..Options::new(host()) };
    let mut bases = BaseConfigs::new();
    loop {
        match lower(file, &options, &bases) {
            Err(found) => return mistakes(&file.source, &found),
            Ok((Lowered::NeedsBases(missing), _)) => {
                assert!(!missing.is_empty());
                bases.extend(missing.into_keys().map(|request| {
                    let image = base(&format!("{:?}", request.source));
                    (request, image)
                }));
            }
            Ok((Lowered::Graph(definition), warnings)) => {
                let mut text = String::new();
                for (id, vertex) in definition.vertices.iter().enumerate() {
                    text.push_str(&format!("{id} {}\n", vertex.name));
                    text.push_str(&format!("  {}\n", serde_json::to_string(&vertex).expect("serialises")));
                }
                let image = serde_json::to_string_pretty(&definition.image).expect("serialises");
                return text + "image " + &image + "\n" + &findings(&file.source, &warnings);
            }
        }
    }
}

fn compare(path: &Path, got: &str, rewrite: bool, wrong: &mut Vec<String>) {
    if rewrite {
        std::fs::write(path, got).expect("the file can be written");
        return;
    }
    let want = std::fs::read_to_string(path).unwrap_or_default();
    if want != got {
        let line = want.lines().zip(got.lines()).position(|(want, got)| want != got);
        let line = line.unwrap_or(want.lines().count().min(got.lines().count()));
        wrong.push(format!(
            "{}:{}\n  recorded: {}\n  now:      {}",
            path.display(),
            line + 1,
            want.lines().nth(line).unwrap_or("(end)"),
            got.lines().nth(line).unwrap_or("(end)")
        ));
    }
}

#[test]
fn recorded_files() {
    #[expect(clippy::disallowed_methods, reason = "a variable steers the test")]
    let rewrite = std::env::var_os("NACRE_REWRITE_GOLDEN").is_some();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/dockerfile");
    let mut cases: Vec<PathBuf> =
        std::fs::read_dir(&root).expect("cases").map(|entry| entry.expect("an entry").path()).collect();
    cases.sort();
    assert!(cases.len() >= 25, "{} cases", cases.len());
    let mut wrong = Vec::new();
    for case in cases {
        let bytes = std::fs::read(case.join("Dockerfile")).expect("a Dockerfile");
        let (ast, graph) = match parser::parse(SourceFile::new("Dockerfile", parser::decode(&bytes))) {
            Ok(file) => (file.dump(), graph(&file)),
            Err(failure) => (mistakes(&failure.source, &failure.diagnostics), String::new()),
        };
        compare(&case.join("ast"), &ast, rewrite, &mut wrong);
        compare(&case.join("graph"), &graph, rewrite, &mut wrong);
    }
    assert!(wrong.is_empty(), "{}\nNACRE_REWRITE_GOLDEN=1 records anew", wrong.join("\n"));
}
