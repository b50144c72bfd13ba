//! How time and memory of a build grow with files, layer size, steps and stages: no worse than in proportion.
//!
//! `cargo bench --bench growth` prints a table: CPU seconds (of all processes) and peak memory (of the largest) of nacre for a
//! first build into an OCI archive and for one that finds everything cached. `-- --up-to N` leaves out what is N times
//! the smallest size and more; `--only WORD` picks a kind; `--plot FILE` draws the same as SVG, logarithmic on both axes.
//! Needs busybox, and 15 GB in the temporary directory for the largest.

#![allow(clippy::print_stdout, clippy::print_stderr, clippy::exit, reason = "a program of its own")]

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

type Failure = Box<dyn std::error::Error>;

/// A kind of growth: name, sizes, and what makes the context.
type Kind = (&'static str, &'static [usize], fn(&Path, usize) -> Result<(), Failure>);

const KINDS: [Kind; 4] = [
    ("files", &[1000, 10_000, 100_000, 500_000], files),
    ("MB of a layer", &[1, 100, 1000, 4000], large),
    ("steps", &[10, 100, 500, 2000], steps),
    ("stages", &[1, 10, 100, 500], stages),
];

fn main() {
    if let Err(error) = run() {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn run() -> Result<(), Failure> {
    let (mut up_to, mut only, mut plot) = (usize::MAX, String::new(), None);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--bench" => {}
            "--up-to" => up_to = value()?.parse()?,
            "--only" => only = value()?,
            "--plot" => plot = Some(value()?),
            _ => return Err(format!("unknown option {arg}; see benches/growth.rs").into()),
        }
    }
    println!("{:>8} {:14} {:>9} {:>8} {:>11} {:>8}", "size", "", "first s", "MB", "cached s", "MB");
    let mut panels = Vec::new();
    for (name, sizes, generate) in KINDS.iter().filter(|(name, ..)| name.contains(&only)) {
        let mut points = Vec::new();
        for &size in sizes.iter().filter(|&&size| size / sizes[0] < up_to) {
            let directory = tempfile::Builder::new().prefix("nacre-growth-").tempdir()?;
            let context = directory.path().join("context");
            fs::create_dir(&context)?;
            generate(&context, size)?;
            std::thread::sleep(std::time::Duration::from_millis(50));
            let first = build(directory.path())?;
            let cached = build(directory.path())?;
            println!("{size:8} {name:14} {:9.2} {:8.0} {:11.3} {:8.0}", first.0, first.1, cached.0, cached.1);
            points.push((size as f64, [first.0, first.1, cached.0, cached.1]));
            // Trees may have directories that only root enters.
            let _ = Command::new("chmod").arg("-R").arg("u+rwX").arg(directory.path()).status();
        }
        panels.push((*name, points));
    }
    Ok(plot.map_or(Ok(()), |file| fs::write(file, drawing(&panels)))?)
}

/// Sizes with CPU seconds and megabytes of the first build, then of the cached one.
type Points = Vec<(f64, [f64; 4])>;

/// A panel for each kind, seconds above megabytes. All panels have the same scale of powers of ten, so that a line at 45 degrees
/// is growth in proportion.
fn drawing(panels: &[(&str, Points)]) -> String {
    /// Pixels of a power of ten.
    const DECADE: f64 = 34.0;
    /// Of both kinds of panels: powers of ten shown, of which the lowest is.
    const ROWS: [(&str, i32, i32); 2] = [("CPU s", -3, 2), ("MB", 0, 3)];
    let place = |value: f64, lowest: i32| (value.max(1e-9).log10() - f64::from(lowest)).max(0.0) * DECADE;
    let mut out = String::new();
    let width = panels.len() as f64 * 6.6 * DECADE + 50.0;
    let rows: f64 = ROWS.iter().map(|(_, low, high)| f64::from(high - low) * DECADE + 60.0).sum();
    let height = rows + 20.0;
    let _ = writeln!(
        out,
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:.0} {height:.0}' font-family='sans-serif' font-size='10'>\n\
         <rect width='100%' height='100%' fill='white'/>"
    );
    let mut top = 30.0;
    for (row, (unit, low, high)) in ROWS.into_iter().enumerate() {
        let bottom = top + f64::from(high - low) * DECADE;
        for (column, (name, points)) in panels.iter().enumerate() {
            let left = 50.0 + column as f64 * 6.6 * DECADE;
            let right = left + 6.0 * DECADE;
            for power in low..=high {
                let y = bottom - f64::from(power - low) * DECADE;
                let _ = writeln!(out, "<path d='M{left:.1} {y:.1}H{right:.1}' stroke='#ddd'/>");
                if column == 0 {
                    let value = 10_f64.powi(power);
                    let _ = writeln!(
                        out,
                        "<text x='{:.1}' y='{:.1}' text-anchor='end'>{value}</text>",
                        left - 4.0,
                        y + 3.0
                    );
                }
            }
            for power in 0..=6 {
                let x = left + f64::from(power) * DECADE;
                let _ = writeln!(out, "<path d='M{x:.1} {top:.1}V{bottom:.1}' stroke='#ddd'/>");
                let y = bottom + 12.0;
                let _ = writeln!(out, "<text x='{x:.1}' y='{y:.1}' text-anchor='middle'>1e{power}</text>");
            }
            let _ = writeln!(out, "<text x='{left:.1}' y='{:.1}' font-weight='bold'>{unit}, {name}</text>", top - 6.0);
            for (series, colour) in [(row, "#c33"), (row + 2, "#36c")] {
                let at =
                    |(size, values): &(f64, [f64; 4])| (left + place(*size, 0), bottom - place(values[series], low));
                let line: Vec<String> = points.iter().map(at).map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
                let _ =
                    writeln!(out, "<path d='M{}' fill='none' stroke='{colour}' stroke-width='1.5'/>", line.join("L"));
                for (x, y) in points.iter().map(at) {
                    let _ = writeln!(out, "<circle cx='{x:.1}' cy='{y:.1}' r='2.5' fill='{colour}'/>");
                }
            }
        }
        top = bottom + 60.0;
    }
    let y = height - 10.0;
    let _ = writeln!(
        out,
        "<text x='50' y='{y:.0}' fill='#c33'>first build</text>\n<text x='120' y='{y:.0}' fill='#36c'>all cached</text>\n\
         <text x='190' y='{y:.0}'>growth in proportion is a line at 45 degrees</text>\n</svg>"
    );
    out
}

/// Builds; CPU seconds and peak memory in MB.
fn build(directory: &Path) -> Result<(f64, f64), Failure> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nacre"));
    command.args(["build", "-q", "--store"]).arg(directory.join("store"));
    command.arg("-o").arg(format!("type=oci,compression=zstd,dest={}", directory.join("out.tar").display()));
    command.arg(directory.join("context"));
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
    // SAFETY: `usage` and `status` are plain data that the call fills in; the child is ours and not waited for elsewhere.
    #[allow(unsafe_code, reason = "std does not tell what a child has used")]
    let (status, usage) = unsafe {
        let (mut status, mut usage): (libc::c_int, libc::rusage) = (0, std::mem::zeroed());
        libc::wait4(child.id() as libc::pid_t, &mut status, 0, &mut usage);
        (status, usage)
    };
    if status != 0 {
        return Err(format!("{command:?} failed").into());
    }
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    Ok((seconds(usage.ru_utime) + seconds(usage.ru_stime), usage.ru_maxrss as f64 / 1000.0))
}

fn files(context: &Path, count: usize) -> Result<(), Failure> {
    fs::write(context.join("Dockerfile"), "FROM scratch\nCOPY src /src\n")?;
    for number in 0..count {
        let parent = context.join(format!("src/d{:02}/e{:02}", number / 10_000, number / 100 % 100));
        if number % 100 == 0 {
            fs::create_dir_all(&parent)?;
        }
        fs::write(parent.join(format!("file{number:06}")), format!("content of file {number}\n").repeat(10))?;
    }
    Ok(())
}

fn large(context: &Path, megabytes: usize) -> Result<(), Failure> {
    fs::write(context.join("Dockerfile"), "FROM scratch\nCOPY data /data\n")?;
    let mut out = std::io::BufWriter::new(fs::File::create(context.join("data"))?);
    let mut state = 7_u64;
    for _ in 0..megabytes * 1_000_000 / 16 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.write_all(&state.to_le_bytes())?;
        out.write_all(b"the same")?;
    }
    Ok(out.flush()?)
}

/// Puts busybox into the context; instructions that install it.
fn base(context: &Path) -> Result<String, Failure> {
    let found = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
    fs::copy(found.ok_or("needs a static busybox: apt-get install busybox-static")?, context.join("busybox"))?;
    let install = "RUN [\"/bin/busybox\", \"--install\", \"-s\", \"/bin\"]";
    Ok(format!("FROM scratch AS base\nCOPY busybox /bin/busybox\n{install}\nENV PATH=/bin\n"))
}

fn steps(context: &Path, count: usize) -> Result<(), Failure> {
    let mut text = base(context)?;
    (0..count).try_for_each(|number| writeln!(text, "RUN echo {number} > /file{number}"))?;
    Ok(fs::write(context.join("Dockerfile"), text)?)
}

fn stages(context: &Path, count: usize) -> Result<(), Failure> {
    let mut text = base(context)?;
    for number in 0..count {
        writeln!(text, "FROM base AS s{number}\nRUN echo {number} > /out{number}")?;
    }
    text.push_str("FROM scratch\n");
    (0..count).try_for_each(|number| writeln!(text, "COPY --from=s{number} /out{number} /"))?;
    Ok(fs::write(context.join("Dockerfile"), text)?)
}
