use super::*;
use serde_json::{Value, json};

/// The first mistake's place (line, column, text) and message of a file, or all of them.
fn mistakes(text: &str) -> Vec<(u32, u32, String, String)> {
    let Err(failure) = parse(SourceFile::new("Dockerfile", text)) else { return Vec::new() };
    let source = &failure.source;
    let show = |diagnostic: &Diagnostic| {
        let (line, column) = diagnostic.span.map_or((0, 0), |span| source.line_column(span.start));
        let text = diagnostic.span.map_or("", |span| &source.text[span.start..span.end]);
        (line, column, text.to_owned(), diagnostic.problem.to_string())
    };
    failure.diagnostics.iter().map(show).collect()
}

fn dump(text: &str) -> String {
    parse(SourceFile::new("Dockerfile", text)).unwrap().dump()
}

/// A node as BuildKit's parser prints it.
fn as_json(node: &Node, lines: (u32, u32), heredocs: &[(HeredocMarker, Text)]) -> Value {
    let mut args: Vec<Value> = match &node.arguments {
        Arguments::List(list) => list.iter().map(|text| json!(text.value)).collect(),
        Arguments::Pairs { pairs, legacy } => {
            let sign = if *legacy { "" } else { "=" };
            pairs.iter().flat_map(|(name, value)| [json!(name.value), json!(value.value), json!(sign)]).collect()
        }
        Arguments::Trigger(trigger) => vec![as_json(trigger, (0, 0), &[])],
    };
    if !crate::diagnostic::INSTRUCTIONS.contains(&node.upper.as_str()) {
        args = vec![json!("")];
    }
    let mut value = json!({"instruction": node.upper, "args": args, "lines": [lines.0, lines.1]});
    if !node.flags.is_empty() {
        value["flags"] = node.flags.iter().map(|flag| json!(flag.text.value)).collect();
    }
    if node.json {
        value["json"] = json!(true);
    }
    if !heredocs.is_empty() {
        let heredoc = |(marker, content): &(HeredocMarker, Text)| {
            json!({
                "name": marker.name, "fd": marker.file_descriptor, "chomp": marker.chomp, "expand": marker.expand,
                "content": content.value,
            })
        };
        value["heredocs"] = heredocs.iter().map(heredoc).collect();
    }
    value
}

#[test]
fn vectors() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/vectors/parse.json");
    let file: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    for vector in file["vectors"].as_array().unwrap() {
        let text = vector["dockerfile"].as_str().unwrap();
        let mut reader = Reader::new(text);
        let mut problems = Vec::new();
        let mut nodes = Vec::new();
        while let Some(item) = Item::read(&mut reader, &mut problems) {
            nodes.extend(item.node.as_ref().map(|node| as_json(node, item.lines, &item.heredocs)));
        }
        problems.append(&mut reader.problems);
        if vector.get("error").is_some() {
            assert!(!problems.is_empty() || nodes.is_empty(), "{text}");
            assert!(parse(SourceFile::new("Dockerfile", text)).is_err(), "{text}");
            continue;
        }
        assert_eq!(problems, [], "{text}");
        assert_eq!(Value::Array(nodes), vector["nodes"], "{text}");
        assert_eq!(reader.escape.to_string(), vector["escape"].as_str().unwrap_or("\\"), "{text}");
    }
}

#[test]
fn mistakes_have_places() {
    let check = |text: &str, want: (u32, u32, &str, &str)| {
        let found = mistakes(text);
        let found: Vec<_> = found.iter().map(|(l, c, at, message)| (*l, *c, at.as_str(), message.as_str())).collect();
        assert_eq!(found, [want], "{text}");
    };
    check("", (0, 0, "", "file with no instructions"));
    check("# c\n", (0, 0, "", "file with no instructions"));
    check("ARG A\n", (0, 0, "", "no build stage: the file has no FROM"));
    check("FROM x\n\n  RUNN a\n", (3, 3, "RUNN", "unknown instruction `RUNN`"));
    check("\u{feff}FOO\r\nFROM x\r\n", (1, 1, "FOO", "unknown instruction `FOO`"));
    check("RUN a\nUSER b\nFROM x", (1, 1, "RUN", "`RUN` before the first FROM: no build stage to add it to"));
    check("FROM x\n\\\n", (2, 1, "", "a line continuation without an instruction"));
    check("# escape=x\nFROM x", (1, 10, "x", "invalid escape character `x`: only ` and \\ are possible"));
    check("#check=a\n#check=b\nFROM x", (2, 8, "b", "only one `check` parser directive can be used"));
    let arguments = "FROM requires either one argument or three: `FROM image [AS name]`";
    check("FROM", (1, 1, "FROM", arguments));
    check("FROM a b\\\n c", (1, 8, "b\\\n c", arguments));
    check("FROM a AS b c", (1, 8, "AS b c", arguments));
    check("FROM a as 1b", (1, 11, "1b", "invalid name for a build stage: `1b`"));
    check("FROM x\nENV", (2, 1, "ENV", "ENV requires at least one argument"));
    check("FROM x\nENV a", (2, 5, "a", "ENV must have two arguments, a name and a value"));
    check("FROM x\nENV A=1 \\\n  B", (3, 3, "B", "can't find = in `B`: ENV takes name=value pairs"));
    check("FROM x\nLABEL a=1 =x", (2, 11, "=x", "LABEL names can not be blank"));
    check("FROM x\nARG =x", (2, 5, "=x", "ARG names can not be blank"));
    check("FROM x\nCMD [\"a\", 1]", (2, 11, "1", "a JSON array of CMD may hold strings only"));
    check("FROM x\nONBUILD CMD [1]", (2, 14, "1", "a JSON array of CMD may hold strings only"));
    check("FROM x\nSHELL a b", (2, 7, "a b", "SHELL requires its arguments as a JSON array"));
    check("FROM x\nSHELL []", (2, 1, "SHELL", "SHELL requires at least one argument"));
    check("FROM x\nRUN cat <<A\n", (2, 9, "<<A", "unterminated heredoc `A`"));
    check("FROM x\nCOPY a <<A\nA", (2, 8, "<<A", "COPY cannot have a heredoc as its destination"));
    check("FROM x\nCOPY a", (2, 1, "COPY", "COPY requires at least two arguments, a source and the destination"));
    check("FROM x\nCOPY --checksum=x a b", (2, 6, "--checksum=x", "unknown flag `--checksum` of COPY"));
    check("FROM x\nCOPY --link=maybe a b", (2, 6, "--link=maybe", "flag `--link` is true or false, not `maybe`"));
    check("FROM x\nCOPY --link --link a b", (2, 13, "--link", "duplicate flag `--link`"));
    check("FROM x\nCOPY --from a b", (2, 6, "--from", "missing value of flag `--from`"));
    check("FROM x\nRUN --network=x a", (2, 15, "x", "invalid network mode `x`"));
    check("FROM x\nRUN --security=x a", (2, 16, "x", "invalid security mode `x`"));
    check(
        "FROM x\nRUN --mount=from=$a,target=/b a",
        (2, 18, "$a", "from of a mount doesn't support variable expansion: `$a`"),
    );
    check("FROM x\nHEALTHCHECK NONE x", (2, 18, "x", "HEALTHCHECK NONE takes no arguments"));
    check("FROM x\nHEALTHCHECK x", (2, 13, "x", "unknown type `x` of HEALTHCHECK"));
    check("FROM x\nHEALTHCHECK CMD", (2, 13, "CMD", "missing command after HEALTHCHECK CMD"));
    check(
        "FROM x\nHEALTHCHECK --interval=1us CMD x",
        (2, 24, "1us", "flag `--interval` cannot be less than 1ms: `1us`"),
    );
    check(
        "FROM x\nHEALTHCHECK --timeout=soon CMD x",
        (2, 23, "soon", "invalid value of flag `--timeout`: invalid duration `soon`"),
    );
    check(
        "FROM x\nHEALTHCHECK --retries=-1 CMD x",
        (2, 23, "-1", "flag `--retries` must be a number that is not negative: `-1`"),
    );
    check("FROM x\nVOLUME [\"\"]", (2, 9, "\"\"", "a VOLUME can not be an empty string"));
    check("FROM x\nONBUILD onbuild RUN x", (2, 9, "onbuild", "ONBUILD cannot be chained: `ONBUILD ONBUILD`"));
    check("FROM x\nONBUILD FROM x", (2, 9, "FROM", "FROM isn't allowed as an ONBUILD trigger"));
    check("FROM x\nWORKDIR", (2, 1, "WORKDIR", "WORKDIR requires exactly one argument"));
}

#[test]
fn all_mistakes_are_found() {
    let found = mistakes("RUN x\nFROM a b\nFOO\nCOPY --fro=x --link=q a\nENV X\n");
    let lines: Vec<_> = found.iter().map(|(line, column, ..)| (*line, *column)).collect();
    assert_eq!(lines, [(1, 1), (2, 8), (3, 1), (4, 6), (4, 14), (4, 1), (5, 5)]);
}

#[test]
fn instructions() {
    let text = "# syntax=a\n# Says hello.\nARG V=1 W\nFROM --platform=$P x AS Y\nENV a=b \"c\"=\"d e\"\nENV old form  x\n\
        RUN --mount=type=cache,target=/c --network=none make <<A 3<<-'B'\n1\nA\n\t2\n\tB\n\
        COPY --chown=a:b --link --exclude=\"x y\" f <<A /d/\n$x\nA\n\
        ADD --unpack=false --keep-git-dir [\"a b\", \"/c\"]\n\
        HEALTHCHECK --interval=1m30s --retries=3 CMD [\"x\"]\nHEALTHCHECK NONE\nCMD\nENTRYPOINT [\"a\"]\n\
        VOLUME /a /b\nONBUILD  COPY <<A /x \nb\nA\nWORKDIR /a b\n";
    let want = r#"escape \
directive syntax "a"
# Says hello.
3-3 ARG
  "V"="1"
  "W"
4-4 FROM
  platform "$P"
  image "x"
  name "Y"
5-5 ENV
  "a"="b"
  "\"c\""="\"d e\""
6-6 ENV
  "old" "form  x"
7-11 RUN
  mount "type=cache,target=/c"
  network "none"
  shell ["make <<A 3<<-'B'"]
  heredoc "A" expand "1\n"
  heredoc "B" fd 3 chomp "2\n"
12-14 COPY
  chown "a:b"
  link true
  exclude "x y"
  source "f"
  heredoc 1 "A" expand "$x\n"
  dest "/d/"
15-15 ADD
  keep-git-dir true
  unpack false
  source "a b"
  dest "/c"
16-16 HEALTHCHECK
  interval 90000000000
  retries 3
  exec ["x"]
17-17 HEALTHCHECK
  none
18-18 CMD
  shell []
19-19 ENTRYPOINT
  exec ["a"]
20-20 VOLUME
  value "/a"
  value "/b"
21-23 ONBUILD
  keyword COPY
  trigger "COPY <<A /x \nb\nA"
24-24 WORKDIR
  value "/a b"
"#;
    assert_eq!(dump(text), want);
}

#[test]
fn texts_have_places() {
    let text = "FROM x AS y\nCOPY --from='a' [\"b\\u0020c\", \\\n \"/d\"]\nARG A=\"b c\" D\nRUN <<-E\n\tx\nE\n";
    let file = parse(SourceFile::new("Dockerfile", text)).unwrap();
    let at = |span: Span| &text[span.start..span.end];
    let InstructionKind::Copy(copy) = &file.instructions[1].kind else { panic!("COPY") };
    let from = copy.from.as_ref().unwrap();
    assert_eq!((from.value.as_str(), at(from.span)), ("a", "'a'"));
    assert_eq!((copy.sources[0].value.as_str(), at(copy.sources[0].span)), ("b c", "\"b\\u0020c\""));
    assert_eq!(at(copy.dest.span), "\"/d\"");
    assert_eq!(file.instructions[1].original, "COPY --from='a' [\"b\\u0020c\",  \"/d\"]");
    let InstructionKind::Arg(pairs) = &file.instructions[2].kind else { panic!("ARG") };
    assert_eq!((at(pairs[0].0.span), at(pairs[0].1.as_ref().unwrap().span)), ("A", "\"b c\""));
    let InstructionKind::Run { heredocs, .. } = &file.instructions[3].kind else { panic!("RUN") };
    assert_eq!((heredocs[0].content.as_str(), at(heredocs[0].span)), ("x\n", "\tx\n"));
    assert_eq!(at(file.instructions[3].span), "RUN <<-E\n\tx\nE");
}

#[test]
fn triggers() {
    let ok = |text: &str| parse_trigger(text, '\\').unwrap();
    assert!(matches!(ok("RUN make").kind, InstructionKind::Run { .. }));
    assert!(matches!(ok("MAINTAINER me").kind, InstructionKind::Maintainer(_)));
    let InstructionKind::Copy(copy) = ok("COPY <<A /x\nb\nA").kind else { panic!("COPY") };
    assert_eq!(copy.heredocs[0].1.content, "b\n");
    let check = |text: &str, want: &str| {
        let problems = parse_trigger(text, '\\').unwrap_err();
        assert_eq!((problems[0].problem.to_string().as_str(), problems[0].span), (want, None), "{text}");
    };
    check("FOO bar", "unknown instruction `FOO`");
    check("FROM x", "FROM isn't allowed as an ONBUILD trigger");
    check("", "an ONBUILD trigger must be a single instruction");
    check("RUN a\nRUN b", "an ONBUILD trigger must be a single instruction");
}

#[test]
fn bytes_become_text() {
    assert_eq!(decode(b"\xef\xbb\xbfFROM x"), "FROM x");
    assert_eq!(decode(b"a\xffb"), "a\u{fffd}b");
}

/// Small files that show most of the syntax; mutated below.
const SEEDS: [&str; 8] = [
    "# escape=`\n# check=skip=all\nARG A=1 B=\"x y\"\nFROM --platform=$A x:${B:-1} AS s\nRUN a `\n# c\n\n b\n",
    "FROM busybox\nRUN --mount=type=bind,from=s,target=/m --network=none cat <<EOF 3<<-'E F' > /o\n$x\nEOF\n\ty\nE F\n",
    "FROM x\nCOPY --chown=1:2 --chmod=u+x --exclude=\"a b\" a b\\ c <<EOF /d/\nč${A:?é}\nEOF\n",
    "FROM x\nADD --checksum=sha256:00 --link=true [\"a\\u00e9\", \"b\\\"c\"]\nVOLUME [\"/a\", 1]\nSHELL [\"sh\"]\n",
    "FROM x\r\nENV a=b c='d e' f=\"g\\\"h\" \\\r\n i=${j##*/}\r\nLABEL old form\r\n",
    "FROM x\nHEALTHCHECK --interval=1m --retries=3 CMD [\"a\"]\nONBUILD COPY <<A /b\nx\nA\nONBUILD ONBUILD RUN x\n",
    "\u{feff}#!/usr/bin/env x\n# syntax=docker/dockerfile:1\nfrom scratch\nEXPOSE 80 81/udp\nSTOPSIGNAL 9\nUSER a b\n",
    "FROM x\nRUN <<a <<b <<\"c\\\nd\"\na\nb\nCMD\nENTRYPOINT ['a']\nWORKDIR /a \u{a0}b\u{85}\n\\\n\n",
];

/// Pieces that are put in at random places.
const PIECES: [&str; 24] = [
    "\\", "\\\n", "`", "\"", "'", "$", "${", "}", "<<", "<<-E\n", "\n", "\r\n", "#", "--", "=", "[", "]", ",",
    "\u{feff}", "é", "\u{a0}", "\0", "ONBUILD ", "FROM ",
];

#[test]
fn never_panics() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below.max(1) as u64).unwrap()
    };
    for round in 0..20_000 {
        let mut text: Vec<char> = SEEDS[round % SEEDS.len()].chars().collect();
        for _ in 0..=random(6) {
            let at = random(text.len());
            match random(4) {
                0 => text.truncate(at),
                1 => drop(text.drain(at..(at + random(9)).min(text.len()))),
                2 => drop(text.splice(at..at, PIECES[random(PIECES.len())].chars())),
                _ => {
                    let from = random(text.len());
                    let copy: Vec<char> = text[from..(from + random(20)).min(text.len())].to_vec();
                    text.splice(at..at, copy);
                }
            }
        }
        let text: String = text.into_iter().collect();
        // Every span has to lie on characters and inside of the file, or showing it would panic.
        match parse(SourceFile::new("f", text.as_str())) {
            Ok(file) => {
                file.dump();
                for instruction in &file.instructions {
                    assert!(text.get(instruction.span.start..instruction.span.end).is_some(), "{text:?}");
                    let words = crate::word::Lexer::new(file.escape).words(&instruction.original, [].as_slice());
                    drop(words);
                }
            }
            Err(failure) => {
                for diagnostic in &failure.diagnostics {
                    let span = diagnostic.span.unwrap_or_default();
                    assert!(text.get(span.start..span.end).is_some(), "{text:?} {diagnostic:?}");
                    failure.source.line_column(span.start);
                    drop((diagnostic.problem.to_string(), diagnostic.problem.help()));
                }
            }
        }
        drop(parse_trigger(&text, '`'));
        drop(crate::line::detect_syntax(&text));
        drop(flag::parse_mount(&text));
        drop(crate::mode::parse(&text));
        drop(crate::reference::Reference::parse(&text));
        drop((units::parse_duration(&text), units::parse_size(&text), units::parse_signal(&text)));
    }
}
