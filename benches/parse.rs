//! Time to parse, check and plan Dockerfiles by their length and number of stages: it has to grow with the length only.
//!
//! `cargo bench -p nacre-frontend` prints a table; words behind `--` choose rows. `--bench parse -- --assert` also fails
//! when 10,000 lines with 2,000 stages take 100 ms or more, or when a line of a file that is 20 times as long costs over
//! five times as much: memory is slower than the caches.

#![allow(clippy::print_stdout, reason = "a program of its own")]

use nacre_frontend::image_config::ImageConfig;
use nacre_frontend::llb::Platform;
use nacre_frontend::lower::{BaseConfigs, BaseImage, Lowered, Options, lower};
use nacre_frontend::parser;
use nacre_frontend::source::SourceFile;
use std::time::Duration;

/// How much more a line of a long file may cost. What grew with the square would be 20.
const LIMIT: usize = 5;

/// How stages are connected.
#[derive(Clone, Copy)]
enum Shape {
    /// Each is built on the one before it.
    Chain,
    /// All are built on the first one, which is long.
    Fan,
    /// Each has the same image as its base and copies from the one before it.
    Copies,
    /// Instructions of one kind only, in one stage.
    Only(&'static str),
}

fn file(lines: usize, stages: usize, shape: Shape) -> String {
    let mut out = String::from("ARG BASE=base\n");
    let each = (lines - 1) / stages;
    // The first stage of a fan has half of all lines.
    let (first, others) = match shape {
        Shape::Fan => (lines / 2, (lines / 2 / stages).max(2)),
        _ => (each, each),
    };
    for stage in 0..stages {
        let before = stage.saturating_sub(1);
        match shape {
            Shape::Chain if stage > 0 => out.push_str(&format!("FROM s{before} AS s{stage}\n")),
            Shape::Fan if stage > 0 => out.push_str(&format!("FROM s0 AS s{stage}\n")),
            _ => out.push_str(&format!("FROM $BASE AS s{stage}\n")),
        }
        for line in 1..if stage == 0 { first } else { others } {
            let text = match (shape, line % 5) {
                (Shape::Only(text), _) => {
                    text.replace('%', &line.to_string()).replace('@', &format!("\n{}", "body $BASE\n".repeat(100)))
                }
                (Shape::Copies, 1) if stage > 0 => format!("COPY --from=s{before} /a /b{line}"),
                (Shape::Fan, _) if stage > 0 => format!("RUN --mount=from=s{before},target=/m echo {line}"),
                (_, 0) => format!("ENV NAME{} value-{stage}-$BASE", line % 40),
                (_, 1) => format!("COPY --chown=1:1 src/file-{line}.txt /to/"),
                (_, 2) => format!("LABEL label{}=\"a value\"", line % 40),
                (_, 3) => format!("RUN apt-get install -y package-{line} && \\"),
                _ => "    rm -rf /var/lib/apt/lists/*".to_owned(),
            };
            out.push_str(&text);
            out.push('\n');
        }
        if out.ends_with("\\\n") {
            out.push_str("    true\n");
        }
    }
    out
}

/// What this thread has computed so far: other programs on the machine do not count.
fn computed() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("statistics of the scheduler");
    let nanoseconds = text.split(' ').next().and_then(|first| first.parse().ok());
    Duration::from_nanos(nanoseconds.expect("nanoseconds"))
}

/// Time of a run, and the vertices of the graph. The scheduler counts in steps of some milliseconds, so there are as many
/// runs as make those small.
fn run(text: &str) -> (Duration, usize) {
    let host = Platform { os: "linux".to_owned(), architecture: "amd64".to_owned(), variant: String::new() };
    let mut options = Options::new(host.clone());
    options.all_stages = true;
    let mut vertices = 0;
    let mut runs = 0;
    let start = computed();
    while runs < 3 || computed() - start < Duration::from_millis(200) {
        runs += 1;
        let file = match parser::parse(SourceFile::new("Dockerfile", text)) {
            Ok(file) => file,
            Err(failure) => panic!("{failure}: {:?}", failure.diagnostics.first()),
        };
        let mut bases = BaseConfigs::new();
        loop {
            match lower(&file, &options, &bases) {
                Ok((Lowered::Graph(graph), _)) => {
                    vertices = graph.vertices.len();
                    break;
                }
                Ok((Lowered::NeedsBases(missing), _)) => {
                    let image = BaseImage { config: ImageConfig::scratch(&host), digest: None };
                    bases.extend(missing.into_keys().map(|request| (request, image.clone())));
                }
                Err(found) => panic!("{:?}", found.first()),
            }
        }
    }
    ((computed() - start) / runs, vertices)
}

fn main() {
    let assert = std::env::args().any(|argument| argument == "--assert");
    println!("{:34} {:>7} {:>7} {:>9} {:>9} {:>8}", "shape", "lines", "stages", "vertices", "ms", "ns/line");
    #[expect(clippy::type_complexity, reason = "a table")]
    let shapes: [(&str, Shape, &[(usize, usize)]); 12] = [
        ("chain", Shape::Chain, &[(1_000, 100), (2_500, 500), (5_000, 1_000), (10_000, 2_000), (20_000, 4_000)]),
        ("fan", Shape::Fan, &[(1_000, 100), (2_500, 500), (5_000, 1_000), (10_000, 2_000), (20_000, 4_000)]),
        ("copies", Shape::Copies, &[(1_000, 100), (2_500, 500), (5_000, 1_000), (10_000, 2_000), (20_000, 4_000)]),
        ("one stage", Shape::Chain, &[(1_000, 1), (5_000, 1), (20_000, 1)]),
        ("only ENV A%=$A1", Shape::Only("ENV A%=$A1"), &[(1_000, 1), (5_000, 1), (20_000, 1)]),
        ("only ARG A%=x", Shape::Only("ARG A%=x"), &[(1_000, 1), (5_000, 1), (20_000, 1)]),
        ("only LABEL a%=b", Shape::Only("LABEL a%=b"), &[(1_000, 1), (5_000, 1), (20_000, 1)]),
        ("only RUN a $UNSET%", Shape::Only("RUN a $UNSET%"), &[(1_000, 1), (5_000, 1), (20_000, 1)]),
        ("only FROM x AS a%", Shape::Only("FROM x AS a%"), &[(1_000, 1), (5_000, 1), (20_000, 1)]),
        ("only COPY <<E / with 100 lines", Shape::Only("COPY <<E /@E"), &[(100, 1), (500, 1), (2_000, 1)]),
        ("ENV A%=$UNSET", Shape::Only("ENV AB%=$UNSET"), &[(1_000, 1), (5_000, 1), (20_000, 1)]),
        ("only COPY $UNSET% /", Shape::Only("COPY a$UNSET% /"), &[(1_000, 1), (5_000, 1), (20_000, 1)]),
    ];
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str()));
    for (name, shape, sizes) in shapes.into_iter().filter(|(name, ..)| is_wanted(name)) {
        let mut first = None;
        for &(lines, stages) in sizes {
            let text = file(lines, stages, shape);
            let count = text.lines().count();
            let (time, vertices) = run(&text);
            let each = time.as_nanos() as usize / count;
            println!("{name:34} {count:7} {stages:7} {vertices:9} {:9.2} {each:8}", time.as_secs_f64() * 1e3);
            if assert {
                let limit = *first.get_or_insert(each) * LIMIT;
                assert!(each <= limit, "{name}: {each} ns a line, not below {limit}");
                assert!(stages != 2_000 || time < Duration::from_millis(100), "{name}: {time:?}");
            }
        }
    }
}
