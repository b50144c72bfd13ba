//! Whole builds, timed: nacre against other builders on the same machine, in one interleaved run.
//!
//! ```text
//! cargo bench --bench builds -- --peer buildah --peer docker --json out.json
//!   --peer NAME       also measure buildah or docker (a dockerd of our own with BuildKit); may be repeated
//!   --only WORD       only workloads whose name contains it; may be repeated
//!   --rounds N        timed builds of each workload and tool [3]
//!   --scratch DIR     where contexts, stores and outputs go [/var/tmp]; needs about 12 GB
//!   --nacre FILE      another nacre than the one built with this benchmark
//!   --docker-root DIR docker of another system, installed below DIR (see below)
//!   --toolchain TAR   root file system with gcc, for the workloads that compile
//!   --registry        the workloads with a registry in place of the others; see benches/builds/registry.rs
//!   --debian TAR      root file system of their base; else mmdebstrap makes it
//!   --json FILE       all numbers
//!   --generate DIR    only write the workloads' contexts, each to a directory of its name
//!   --list            only print the workloads
//! ```
//!
//! Every context is generated and the same on every machine. Each tool keeps its store on a file system of its own: an ext4
//! image on a loop device when started by root, made anew for every cold build, since ext4 is several times slower
//! for minutes after many files were deleted; otherwise in plain directories, and the table says so. Rounds of the tools
//! alternate. Before each build everything is written to disk, and the context is read, so that all find it in memory. A base image has
//! been made by the tool itself, and a step has run on it: docker unpacks a base when it gets it, nacre when a step first
//! needs its files, and neither is part of the times. Ratios are of the least times, which other work on the machine
//! disturbs least; time that no builder can save, `(itself)` (of a compiler in a chroot of the base), is taken off both
//! sides of them. Wall time is that of the command; CPU time is that of all its processes and, for
//! docker, of the daemon's; memory is the largest sum that was seen over the tool's processes of the memory that is their
//! own (anonymous and shared, without pages of files; sampled every 40 ms, so 0 for what ends sooner). Nothing here fails
//! because something is slow.
//!
//! Debian 12's docker.io has no OCI export: where an archive is asked for it is `docker save | gzip`, and zstd is left out
//! (`-`). A newer one writes the same archives as nacre; install it into a directory of its own, as root, and name that:
//!
//! ```text
//! mmdebstrap --variant=minbase --include=docker.io,docker-cli,docker-buildx,ca-certificates sid DIR
//! ```

#![allow(clippy::print_stdout, clippy::print_stderr, clippy::exit, reason = "a program of its own")]

mod measure;
mod registry;
mod tools;
mod workloads;

use measure::{Sample, median};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use tools::{Tool, ToolKind};
use workloads::{Base, Floor, State, Workload, workloads};

/// A failed command, or a file that could not be made.
pub(crate) type Failure = Box<dyn std::error::Error>;

pub(crate) struct Options {
    peers: Vec<ToolKind>,
    only: Vec<String>,
    rounds: usize,
    scratch: PathBuf,
    nacre: PathBuf,
    docker_root: Option<PathBuf>,
    toolchain: Option<PathBuf>,
    json: Option<PathBuf>,
    generate: Option<PathBuf>,
    list: bool,
    registry: bool,
    debian: Option<PathBuf>,
}

fn options() -> Result<Options, Failure> {
    let mut options = Options {
        peers: Vec::new(),
        only: Vec::new(),
        rounds: 3,
        scratch: PathBuf::from("/var/tmp"),
        nacre: PathBuf::from(env!("CARGO_BIN_EXE_nacre")),
        docker_root: None,
        toolchain: None,
        json: None,
        generate: None,
        list: false,
        registry: false,
        debian: None,
    };
    let mut args = std::env::args().skip(1);
    while let Some(flag) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{flag} needs a value"));
        match flag.as_str() {
            // What cargo adds.
            "--bench" => {}
            "--peer" => options.peers.push(ToolKind::parse(&value()?)?),
            "--only" => options.only.push(value()?),
            "--rounds" => options.rounds = value()?.parse::<usize>()?.max(1),
            "--scratch" => options.scratch = value()?.into(),
            "--nacre" => options.nacre = value()?.into(),
            "--docker-root" => options.docker_root = Some(std::fs::canonicalize(value()?)?),
            "--toolchain" => options.toolchain = Some(value()?.into()),
            "--json" => options.json = Some(value()?.into()),
            "--generate" => options.generate = Some(value()?.into()),
            "--list" => options.list = true,
            "--registry" => options.registry = true,
            "--debian" => options.debian = Some(value()?.into()),
            _ => return Err(format!("unknown option {flag}; see benches/builds/main.rs").into()),
        }
    }
    Ok(options)
}

fn main() {
    if let Err(error) = run() {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn run() -> Result<(), Failure> {
    let options = options()?;
    let wanted = |workload: &Workload| {
        options.only.is_empty() || options.only.iter().any(|word| workload.name.contains(word.as_str()))
    };
    let chosen: Vec<Workload> = workloads(options.toolchain.as_deref()).into_iter().filter(wanted).collect();
    if options.list {
        chosen.iter().for_each(|workload| println!("{:20} {}", workload.name, workload.about));
        registry::list().iter().for_each(|(name, about)| println!("{name:20} {about} (--registry)"));
        return Ok(());
    }
    if let Some(directory) = &options.generate {
        return chosen.iter().try_for_each(|workload| {
            let context = directory.join(workload.name);
            std::fs::create_dir_all(&context)?;
            (workload.generate)(&context)
        });
    }
    let scratch = tempfile::Builder::new().prefix("nacre-bench-").tempdir_in(&options.scratch)?;
    let kinds = std::iter::once(ToolKind::Nacre).chain(options.peers.iter().copied());
    let docker_root = options.docker_root.as_deref();
    let _mounts = docker_root.map(|root| tools::RootMounts::new(root, scratch.path())).transpose()?;
    let mut tools = kinds
        .map(|kind| Tool::new(kind, &options.nacre, docker_root, scratch.path()))
        .collect::<Result<Vec<_>, _>>()?;
    let write = |report: &[Value]| match &options.json {
        Some(path) => {
            std::fs::write(path, serde_json::to_vec_pretty(&json!({ "workloads": report }))?).map_err(Failure::from)
        }
        None => Ok(()),
    };
    println!("stores: {}", if tools[0].has_own_file_system() { "ext4 images" } else { "plain directories" });
    if options.registry {
        return write(&registry::measure(&options, scratch.path(), &mut tools)?);
    }
    println!(
        "{:18} {:8} {:>9} {:>9} {:>9} {:>8} {:>9}  ratio",
        "workload", "tool", "min s", "median s", "cpu s", "peak MB", "out MB"
    );
    let mut report = Vec::new();
    for workload in &chosen {
        let contexts = scratch.path().join(workload.name);
        std::fs::create_dir(&contexts)?;
        (workload.generate)(&contexts)?;
        let mut bare = Bare::new(workload, scratch.path())?;
        let results = measure_workload(workload, &contexts, &mut tools, &mut bare, options.rounds)?;
        report.push(show(workload, &bare, &results));
        std::fs::remove_dir_all(&contexts)?;
        write(&report)?;
    }
    Ok(())
}

/// Samples of each tool; none for a tool that cannot do it.
type Results = Vec<(ToolKind, Vec<Sample>)>;

/// The step of a workload without a builder, where its own time is what it takes in a chroot.
struct Bare {
    root: Option<tempfile::TempDir>,
    command: &'static str,
    /// Seconds.
    times: Vec<f64>,
}

impl Bare {
    fn new(workload: &Workload, scratch: &Path) -> Result<Self, Failure> {
        let (Floor::Chroot(command), Some(Base::Tar(tar))) = (workload.floor, &workload.base) else {
            let times = if let Floor::Seconds(seconds) = workload.floor { vec![seconds] } else { Vec::new() };
            return Ok(Self { root: None, command: "", times });
        };
        if !tools::is_root() {
            return Ok(Self { root: None, command, times: Vec::new() });
        }
        let root = tempfile::tempdir_in(scratch)?;
        let mut unpack = Command::new("tar");
        unpack.arg("-xf").arg(tar).arg("-C").arg(root.path());
        measure::timed(&mut [unpack], None)?;
        Ok(Self { root: Some(root), command, times: Vec::new() })
    }

    fn run(&mut self, context: &Path) -> Result<(), Failure> {
        let Some(root) = &self.root else { return Ok(()) };
        let source = root.path().join("src");
        let _ = std::fs::remove_dir_all(&source);
        std::fs::create_dir(&source)?;
        for entry in std::fs::read_dir(context)? {
            let entry = entry?;
            std::fs::copy(entry.path(), source.join(entry.file_name()))?;
        }
        rustix::fs::sync();
        let mut command = Command::new("chroot");
        command.arg(root.path()).args(["sh", "-c"]).arg(format!("cd /src && {}", self.command));
        self.times.push(measure::timed(&mut [command], None)?.wall);
        Ok(())
    }

    fn seconds(&self) -> f64 {
        self.times.iter().copied().reduce(f64::min).unwrap_or_default()
    }
}

fn measure_workload(
    workload: &Workload,
    context: &Path,
    tools: &mut [Tool],
    bare: &mut Bare,
    rounds: usize,
) -> Result<Results, Failure> {
    let mut results: Results = tools.iter().map(|tool| (tool.kind, Vec::new())).collect();
    if workload.state != State::Cold {
        for tool in tools.iter_mut() {
            tool.fresh(workload)?;
            // Digests are only remembered of files that were left alone for a moment.
            std::thread::sleep(std::time::Duration::from_millis(100));
            tool.build(workload, context)?;
        }
    }
    for round in 0..rounds {
        if workload.state == State::Edited {
            (workload.edit)(context, round)?;
        }
        bare.run(context)?;
        for (tool, (_, samples)) in tools.iter_mut().zip(&mut results) {
            if workload.state == State::Cold {
                tool.fresh(workload)?;
            }
            samples.extend(tool.build(workload, context)?);
        }
    }
    tools.iter_mut().for_each(Tool::stop);
    Ok(results)
}

fn show(workload: &Workload, bare: &Bare, results: &Results) -> Value {
    let mut tools = Vec::new();
    let of = |samples: &[Sample], field: fn(&Sample) -> f64| median(samples.iter().map(field).collect());
    let fastest = |samples: &[Sample]| samples.iter().map(|sample| sample.wall).fold(f64::INFINITY, f64::min);
    // Some workloads have time in them that no builder can save.
    let floor = bare.seconds();
    if floor > 0.0 {
        println!("{:18} {:8} {floor:9.3} {:9.3}", workload.name, "(itself)", median(bare.times.clone()));
    }
    let own = results.first().map(|(_, samples)| fastest(samples)).unwrap_or_default();
    for (kind, samples) in results {
        if samples.is_empty() {
            println!("{:18} {:8} {:>9}", workload.name, kind.name(), "-");
            continue;
        }
        let wall = of(samples, |sample| sample.wall);
        let least = fastest(samples);
        let cpu = of(samples, |sample| sample.cpu);
        let peak = samples.iter().map(|sample| sample.peak_bytes).max().unwrap_or(0) as f64 / 1e6;
        let out = samples.iter().map(|sample| sample.output_bytes).max().unwrap_or(0) as f64 / 1e6;
        // Times of the same work differ by some milliseconds.
        let resolution = if floor > 0.0 { 0.01 } else { 1e-9 };
        let ratio = (least - floor).max(resolution) / (own - floor).max(resolution);
        println!(
            "{:18} {:8} {least:9.3} {wall:9.3} {cpu:9.3} {peak:8.0} {out:9.1}  {ratio:.1}",
            workload.name,
            kind.name()
        );
        tools.push(json!({
            "tool": kind.name(), "wall_seconds": samples.iter().map(|sample| sample.wall).collect::<Vec<_>>(),
            "median_seconds": wall, "min_seconds": least, "cpu_seconds": cpu, "peak_megabytes": peak,
            "output_megabytes": out, "ratio_to_nacre": ratio,
        }));
    }
    json!({ "name": workload.name, "about": workload.about, "floor_seconds": floor, "tools": tools })
}
