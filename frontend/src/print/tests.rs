//! Printed files say the same: recorded ones, awkward ones, and ones made up of parts.

use super::*;
use crate::parser;
use crate::source::SourceFile;

fn parse(text: &str) -> Dockerfile {
    parser::parse(SourceFile::new("Dockerfile", text)).unwrap_or_else(|failure| {
        let problems: Vec<String> = failure.diagnostics.iter().map(|one| one.problem.to_string()).collect();
        panic!("{problems:?}\n{text}")
    })
}

/// Prints, reads again, and returns what was printed.
fn round(text: &str) -> String {
    let file = parse(text);
    let printed = file.to_text();
    let again = parse(&printed);
    assert!(again.same_instructions(&file), "{text}\n--- was printed as\n{printed}");
    assert_eq!(again.to_text(), printed, "printed twice");
    printed
}

#[test]
fn forms() {
    let check = |text: &str, want: &str| assert_eq!(round(text), want);
    check("FROM a\nENV \\\t  X=y\0\n", "FROM a\nENV \\\t X=y\0\n");
    check("from  a   as b\nRUN  x \\\n  # c\n  y\n", "from a AS b\nRUN x   y\n");
    check("# escape=`\n# c\nFROM a\nRUN a `\n b", "# escape=`\n\n# c\nFROM a\nRUN a  b\n");
    check("\n# escape=`\nFROM a", "\n# escape=`\nFROM a\n");
    check("FROM a\nCMD [ \"a\",\"\\u0062\" ]", "FROM a\nCMD [\"a\", \"b\"]\n");
    check("FROM a\nCOPY --from=\"a b\" [\"c d\", \"/\"]", "FROM a\nCOPY --from='a b' [\"c d\", \"/\"]\n");
    check("FROM a\nCOPY <<-A b <<\"C\" /\n\tx\n\tA\n$y\nC\n", "FROM a\nCOPY <<-A b <<\"C\" /\nx\nA\n$y\nC\n");
    check("FROM a\nHEALTHCHECK --interval=1m CMD a", "FROM a\nHEALTHCHECK --interval=60000000000ns CMD a\n");
    check("FROM a\nONBUILD RUN <<E\nx\nE\nUSER -- --a", "FROM a\nONBUILD RUN <<E\nx\nE\nUSER -- --a\n");
}

#[test]
fn awkward() {
    for text in [
        // A blank that is none for continuations keeps the escape from continuing the line.
        "FROM a\nWORKDIR a\\\u{b}\nUSER b",
        // Joined by one blank these words would be JSON.
        "FROM a\nCOPY [\"a\",\u{b}\"b\"]\nVOLUME [\"a\",\u{c}\"b\"]",
        // In JSON a heredoc is empty, and its name may hold anything.
        "FROM a\nCOPY [\"<<E\", \"<<\\\"a b\\\"\", \"/\"]",
        // Quotes of flags are others than those of heredoc markers.
        "# escape=`\nFROM a\nRUN --device=`\" <<E",
        "FROM a\nRUN --device=${ <<E",
        "FROM a\nRUN --device='${' <<E\nx\nE\n",
        "FROM a\nRUN <<E <<E\n1\nE\n2\nE\n",
        "FROM a\nCOPY <<\"E\tF\" a /\nE\tF\n",
        "FROM a\nENV a b = c\nENV a=b\\ c 'd e'=\"f g\"\nARG a b=c 'd'\nLABEL \"a b\"=c",
        "FROM a\nRUN --mount=type=cache,target=/a RUN\nADD --unpack=false --keep-git-dir --link=false a b",
        "FROM a\nONBUILD COPY <<-E <<F /\n\tx\n\tE\ny\nF\n",
    ] {
        round(text);
    }
}

#[test]
fn recorded_files() {
    let cases = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/conformance/cases");
    let mut parsed = 0;
    for case in std::fs::read_dir(cases).unwrap() {
        let Ok(bytes) = std::fs::read(case.unwrap().path().join("context/Dockerfile")) else { continue };
        let text = parser::decode(&bytes);
        if parser::parse(SourceFile::new("Dockerfile", text.clone())).is_ok() {
            round(&text);
            parsed += 1;
        }
    }
    assert!(parsed > 400, "{parsed} files");
}

/// Numbers from a seed (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }

    fn of<'a>(&mut self, list: &[&'a str]) -> &'a str {
        list[self.below(list.len())]
    }

    /// Some parts behind each other.
    fn some(&mut self, parts: &[&str], most: usize, between: &str) -> String {
        let count = 1 + self.below(most);
        (0..count).map(|_| self.of(parts)).collect::<Vec<_>>().join(between)
    }
}

/// A line of parts that mean something to the parser, in no sensible order.
fn line(random: &mut Random, escape: &str) -> String {
    let word = ["a", "/b", "$A", "${B:-c}", "\"d e\"", "'f'", "=", "--", "[", "]", "\",", "é", "<", "#", "\u{a0}"];
    let keyword = random.of(&[
        "RUN",
        "run",
        "COPY",
        "ADD",
        "ENV",
        "ARG",
        "LABEL",
        "CMD",
        "ENTRYPOINT",
        "SHELL",
        "WORKDIR",
        "USER",
        "EXPOSE",
        "VOLUME",
        "STOPSIGNAL",
        "MAINTAINER",
        "HEALTHCHECK",
        "ONBUILD RUN",
        "ONBUILD COPY",
        "FROM",
    ]);
    let flags = [
        "--from=x",
        "--chown=1:2",
        "--mount=type=cache,target=/c",
        "--network=none",
        "--link",
        "--parents=true",
        "--exclude=\"a b\"",
        "--exclude=c'd'",
        "--interval=1s",
        "--retries=3",
        "--device=a",
        "--unpack",
        "--platform=p",
        "--",
    ];
    let mut line = keyword.to_owned();
    if random.below(3) == 0 {
        line.push(' ');
        line.push_str(&random.some(&flags, 2, " "));
    }
    match random.below(6) {
        0 => line.push_str(&format!(" [{}]", random.some(&["\"a\"", "\"b c\"", "\"\"", "\"<<E\""], 3, ", "))),
        1 => line.push_str(&format!(" {} CMD {}", random.of(&["", "x"]), random.some(&word, 3, " "))),
        2 => line.push_str(&format!(" {} /to", random.some(&["<<E", "3<<-F", "<<\"G\"", "a", "a\"b"], 3, " "))),
        3 => line.push_str(&format!(" {}={}", random.of(&["A", "b.c", "\"d e\""]), random.some(&word, 2, ""))),
        _ => {
            let between = random.of(&[" ", "", "\t"]);
            line.push_str(&format!(" {}", random.some(&word, 4, between)));
        }
    }
    match random.below(8) {
        0 => line.push_str(&format!(" {escape}\n  # comment\n\n more")),
        1 => line.push_str(&format!("{escape}{escape}")),
        2 => line.push('\u{b}'),
        _ => {}
    }
    // Bodies for markers, where there are some; else lines that are wrong.
    if line.contains("<<") && random.below(4) != 0 {
        line.push_str("\nbody $A\n\tE\nE\n\tF\nF\n  G\nG");
    }
    line
}

#[test]
fn made_up_files() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut parsed = 0;
    for _ in 0..20_000 {
        let (head, escape) = match random.below(4) {
            0 => ("# escape=`\n# note\nFROM base\n", "`"),
            1 => ("# syntax=a\n\n# escape=`\nARG A=1\nFROM $A AS b\n", "\\"),
            _ => ("FROM base\n", "\\"),
        };
        let text = format!("{head}{}\n", line(&mut random, escape));
        if parser::parse(SourceFile::new("Dockerfile", text.clone())).is_ok() {
            round(&text);
            parsed += 1;
        }
    }
    assert!(parsed > 3_000, "{parsed} files");
}
