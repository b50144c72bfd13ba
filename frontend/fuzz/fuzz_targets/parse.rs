//! A Dockerfile from its bytes to the graph: without base images, then with one whose triggers are the same bytes.
//! Every place that a message points at must lie in the text and on characters, since the text is cut there to be shown.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nacre_frontend::check::Warning;
use nacre_frontend::diagnostic::Diagnostic;
use nacre_frontend::image_config::ImageConfig;
use nacre_frontend::llb::Platform;
use nacre_frontend::lower::{BaseConfigs, BaseImage, Lowered, Options, lower};
use nacre_frontend::parser;
use nacre_frontend::source::{SourceFile, Span};

fn place(source: &SourceFile, span: Span) {
    assert!(span.start <= span.end, "{span:?} of {}", source.text.len());
    assert!(source.text.get(span.start..span.end).is_some(), "{span:?} of {}", source.text.len());
    source.line_column(span.start);
}

fn diagnostics(source: &SourceFile, all: &[Diagnostic]) {
    assert!(!all.is_empty(), "failed without a reason");
    for one in all {
        if let Some(span) = one.span {
            place(source, span);
        }
        assert!(!one.problem.to_string().is_empty());
        one.problem.help();
    }
}

fn warnings(source: &SourceFile, all: &[Warning]) {
    all.iter().for_each(|one| place(source, one.span));
}

fuzz_target!(|data: &[u8]| {
    let text = parser::decode(data);
    nacre_frontend::line::detect_syntax(&text);
    let file = match parser::parse(SourceFile::new("Dockerfile", text)) {
        Ok(file) => file,
        Err(failure) => return diagnostics(&failure.source, &failure.diagnostics),
    };
    for instruction in &file.instructions {
        place(&file.source, instruction.span);
        place(&file.source, instruction.keyword.span);
    }
    nacre_frontend::stage::targets(&file);
    let printed = file.to_text();
    match parser::parse(SourceFile::new("Dockerfile", printed.clone())) {
        Ok(again) => {
            assert!(again.same_instructions(&file), "{}\n--- printed as\n{printed}", file.source.text);
            assert_eq!(again.to_text(), printed, "printing twice gives another text");
        }
        Err(failure) => panic!("{printed}: {:?}", failure.diagnostics),
    }

    let host = Platform { os: "linux".to_owned(), architecture: "amd64".to_owned(), variant: String::new() };
    let mut options = Options::new(host.clone());
    options.all_stages = data.len() % 2 == 0;
    let mut bases = BaseConfigs::new();
    // Every round names all bases that are known by then, so it cannot take many.
    for _ in 0..4 {
        match lower(&file, &options, &bases) {
            Err(found) => return diagnostics(&file.source, &found),
            Ok((Lowered::Graph(graph), found)) => {
                warnings(&file.source, &found);
                for (at, vertex) in graph.vertices.iter().enumerate() {
                    assert!(vertex.inputs.iter().flatten().all(|input| input.0 < at), "inputs come first");
                }
                return;
            }
            Ok((Lowered::NeedsBases(missing), found)) => {
                warnings(&file.source, &found);
                assert!(!missing.is_empty(), "asks for nothing");
                for (request, _) in missing {
                    let mut config = ImageConfig::scratch(&host);
                    config.config.env = vec!["PATH=/bin".to_owned(), "A=b c".to_owned(), "=".to_owned()];
                    config.config.on_build = file.source.text.split('\0').skip(1).map(str::to_owned).collect();
                    let image = BaseImage { config, digest: None };
                    assert!(bases.insert(request, image).is_none(), "asked twice");
                }
            }
        }
    }
    panic!("asks for ever");
});
