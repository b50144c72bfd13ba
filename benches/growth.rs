//! How time and memory of a build grow with files, layer size, steps and stages: no worse than in proportion.
//!
//! `cargo bench --bench growth` prints a table: CPU seconds (of all processes) and peak memory (of the largest) of nacre for a
//! first build into an OCI archive and for one that finds everything cached. `-- --up-to N` leaves out what is N times
//! the smallest size and more; `--only WORD` picks a kind. Needs busybox, and 15 GB in the temporary directory for the
//! largest.

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
    let (mut up_to, mut only) = (usize::MAX, String::new());
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--bench" => {}
            "--up-to" => up_to = value()?.parse()?,
            "--only" => only = value()?,
            _ => return Err(format!("unknown option {arg}; see benches/growth.rs").into()),
        }
    }
    println!("{:>8} {:14} {:>9} {:>8} {:>11} {:>8}", "size", "", "first s", "MB", "cached s", "MB");
    for (name, sizes, generate) in KINDS.iter().filter(|(name, ..)| name.contains(&only)) {
        for &size in sizes.iter().filter(|&&size| size / sizes[0] < up_to) {
            let directory = tempfile::Builder::new().prefix("nacre-growth-").tempdir()?;
            let context = directory.path().join("context");
            fs::create_dir(&context)?;
            generate(&context, size)?;
            std::thread::sleep(std::time::Duration::from_millis(50));
            let first = build(directory.path())?;
            let cached = build(directory.path())?;
            println!("{size:8} {name:14} {:9.2} {:8.0} {:11.3} {:8.0}", first.0, first.1, cached.0, cached.1);
            // Trees may have directories that only root enters.
            let _ = Command::new("chmod").arg("-R").arg("u+rwX").arg(directory.path()).status();
        }
    }
    Ok(())
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
