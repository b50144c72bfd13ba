//! Workloads with a registry: Debian's docker-registry on loopback, behind a relay that counts bytes.
//!
//! What is timed is a job of a release machine: build and push. The registry keeps what it has from round to round, but for
//! the cold push: there it is empty for every tool and round, since buildah remembers outside of its store which repositories
//! have a blob, and has it mounted. buildah keeps intermediate images and its cache in the registry
//! (`--layers --cache-to --cache-from`); docker 20.10 knows only caches inside of images (`BUILDKIT_INLINE_CACHE`).
//! The base is Debian's minimal system as mmdebstrap makes it (`--debian TAR`: one that is there already).

use crate::measure::{Sample, median, timed};
use crate::tools::{Tool, ToolKind};
use crate::workloads::{Floor, Output, State, Workload, incompressible};
use crate::{Failure, Options};
use serde_json::{Value, json};
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A job with a registry.
struct Job {
    name: &'static str,
    about: &'static str,
    state: State,
    push: bool,
    /// The registry is emptied before.
    blank: bool,
    /// A cache is written before, and read with an empty store.
    cache: bool,
    /// Writes the context; the string is the registry's address.
    generate: fn(&Path, &str) -> Result<(), Failure>,
}

fn jobs() -> Vec<Job> {
    let push =
        |name, about, state, generate| Job { name, about, state, push: true, blank: false, cache: false, generate };
    vec![
        Job {
            blank: true,
            ..push("push-100-cold", "image of 100 MB, empty store and registry", State::Cold, |context, _| {
                image(context, 1)
            })
        },
        push("push-100-edited", "the same after a small change", State::Edited, |context, _| image(context, 1)),
        push("push-500-edited", "image of 500 MB after a small change", State::Edited, |context, _| image(context, 5)),
        Job {
            push: false,
            ..push("pull-run", "Debian base from the registry, one RUN, empty store", State::Cold, |context, host| {
                Ok(fs::write(context.join("Dockerfile"), format!("FROM {host}/base/debian:12\nRUN true\n"))?)
            })
        },
        Job {
            cache: true,
            ..push("warm-cache", "empty store, cache in the registry, no change", State::Cold, application)
        },
    ]
}

/// `count` layers of 100 MB that hardly compress, and a small file on top.
fn image(context: &Path, count: usize) -> Result<(), Failure> {
    let mut text = String::from("FROM scratch\n");
    for at in 0..count {
        incompressible(&context.join(format!("data{at}")), 100_000_000, at as u64 + 1)?;
        text.push_str(&format!("COPY data{at} /data{at}\n"));
    }
    fs::write(context.join("app"), "version 0\n")?;
    Ok(fs::write(context.join("Dockerfile"), text + "COPY app /app\n")?)
}

/// Dependencies of 30 MB that take 2 s to get, and something that is built of the context.
fn application(context: &Path, host: &str) -> Result<(), Failure> {
    fs::create_dir(context.join("src"))?;
    for at in 0..500 {
        fs::write(context.join(format!("src/file{at}")), format!("{}\n", at * 7919 % 1000))?;
    }
    let text = format!(
        "FROM {host}/base/debian:12\nRUN sleep 2; head -c 30000000 /dev/urandom > /dependencies\nCOPY src /src\n\
         RUN sort -n /src/* > /sorted\n"
    );
    Ok(fs::write(context.join("Dockerfile"), text)?)
}

/// A registry and the relay before it.
struct Registry {
    child: Child,
    /// Where it keeps everything.
    directory: PathBuf,
    /// Its own address.
    address: String,
    /// The relay's.
    host: String,
    sent: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
}

impl Registry {
    fn start(directory: &Path) -> Result<Registry, Failure> {
        fs::create_dir_all(directory)?;
        let free = || -> Result<u16, Failure> { Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port()) };
        let port = free()?;
        let config = directory.join("config.yml");
        let text = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:{port}\n",
            directory.join("data").display()
        );
        fs::write(&config, text)?;
        let address = format!("127.0.0.1:{port}");
        let child = serve(directory, &address)?;
        let (sent, received) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let registry = Registry {
            child,
            directory: directory.to_owned(),
            address: address.clone(),
            host: listener.local_addr()?.to_string(),
            sent: sent.clone(),
            received: received.clone(),
        };
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(&address) else { continue };
                for (from, to, count) in [(&client, &server, &sent), (&server, &client, &received)] {
                    if let (Ok(from), Ok(to)) = (from.try_clone(), to.try_clone()) {
                        let count = count.clone();
                        std::thread::spawn(move || relay(from, to, &count));
                    }
                }
            }
        });
        Ok(registry)
    }

    /// Takes away all that it has.
    fn empty(&mut self) -> Result<(), Failure> {
        self.child.kill()?;
        self.child.wait()?;
        fs::remove_dir_all(self.directory.join("data"))?;
        self.child = serve(&self.directory, &self.address)?;
        Ok(())
    }

    /// Bytes since the last call: to the registry, and from it.
    fn bytes(&self) -> (u64, u64) {
        (self.sent.swap(0, Ordering::Relaxed), self.received.swap(0, Ordering::Relaxed))
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts a registry on its directory and waits until it answers.
fn serve(directory: &Path, address: &str) -> Result<Child, Failure> {
    fs::create_dir_all(directory.join("data"))?;
    let mut command = Command::new("docker-registry");
    command.arg("serve").arg(directory.join("config.yml"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let child = command.spawn().map_err(|error| format!("docker-registry: {error}"))?;
    for attempt in 0.. {
        match TcpStream::connect(address) {
            Ok(_) => break,
            Err(error) if attempt == 100 => return Err(format!("docker-registry did not start: {error}").into()),
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
    Ok(child)
}

fn relay(mut from: TcpStream, mut to: TcpStream, count: &AtomicU64) {
    let mut buffer = vec![0; 256 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        count.fetch_add(length as u64, Ordering::Relaxed);
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// One timed job.
struct Measured {
    sample: Sample,
    sent: u64,
    received: u64,
}

/// What a tool does in a job.
struct Run<'a> {
    context: &'a Path,
    /// Name with host and tag.
    name: &'a str,
    push: bool,
    /// Repository of the cache, and whether it is written.
    cache: Option<(&'a str, bool)>,
}

impl Run<'_> {
    fn commands(&self, tool: &Tool) -> Vec<Command> {
        let mut all = Vec::new();
        match tool.kind {
            ToolKind::Nacre => {
                let mut build = tool.nacre();
                build.args(["build", "-q", "-t", self.name]).args(self.push.then_some("--push"));
                build.args(self.cache.map(|(cache, write)| match write {
                    true => format!("--cache-to=type=registry,ref={cache}:nacre,mode=max"),
                    false => format!("--cache-from={cache}:nacre"),
                }));
                build.arg(self.context);
                all.push(build);
            }
            ToolKind::Buildah => {
                let mut build = tool.buildah();
                build.args(["build", "-q", "--layers", "--network=host", "--tls-verify=false", "-t", self.name]);
                if let Some((cache, write)) = self.cache {
                    build.arg(format!("--cache-{}={cache}", if write { "to" } else { "from" }));
                }
                all.push({
                    build.arg(self.context);
                    build
                });
                if self.push {
                    let mut push = tool.buildah();
                    push.args(["push", "-q", "--tls-verify=false", self.name]).arg(format!("docker://{}", self.name));
                    all.push(push);
                }
            }
            ToolKind::Docker => {
                let mut build = tool.docker();
                build.env("DOCKER_BUILDKIT", "1").args(["build", "-q", "--network=host", "-t", self.name]);
                if let Some((cache, write)) = self.cache {
                    match write {
                        true => build.arg("--build-arg=BUILDKIT_INLINE_CACHE=1"),
                        false => build.arg(format!("--cache-from={cache}:docker")),
                    };
                }
                all.push({
                    build.arg(self.context);
                    build
                });
                if self.push {
                    let mut push = tool.docker();
                    push.args(["push", "-q", self.name]);
                    all.push(push);
                }
            }
        }
        all
    }

    fn timed(&self, tool: &Tool, registry: &Registry) -> Result<Measured, Failure> {
        registry.bytes();
        let sample = timed(&mut self.commands(tool), tool.daemon_id())?;
        let (sent, received) = registry.bytes();
        Ok(Measured { sample, sent, received })
    }
}

/// Runs the chosen jobs; what they gave, for the report.
pub(crate) fn measure(options: &Options, scratch: &Path, tools: &mut [Tool]) -> Result<Vec<Value>, Failure> {
    let wanted =
        |job: &Job| options.only.is_empty() || options.only.iter().any(|word| job.name.contains(word.as_str()));
    let mut registry = Registry::start(&scratch.join("registry"))?;
    let mut based = false;
    let mut report = Vec::new();
    println!(
        "{:18} {:8} {:>9} {:>9} {:>9} {:>8} {:>9} {:>9}  ratio",
        "registry", "tool", "min s", "median s", "cpu s", "peak MB", "sent MB", "got MB"
    );
    for job in jobs().iter().filter(|job| wanted(job)) {
        let context = scratch.join(job.name);
        fs::create_dir(&context)?;
        (job.generate)(&context, &registry.host)?;
        if fs::read_to_string(context.join("Dockerfile"))?.contains("/base/debian:12") && !based {
            push_base(options, scratch, &registry, &mut tools[0])?;
            based = true;
        }
        let results = rounds(job, options.rounds, &context, &mut registry, tools)?;
        report.push(show(job, &results));
        fs::remove_dir_all(&context)?;
    }
    Ok(report)
}

/// A store without anything in it.
fn empty() -> Workload {
    Workload {
        name: "registry",
        about: "",
        base: None,
        state: State::Cold,
        output: Output::Store,
        floor: Floor::Seconds(0.0),
        generate: |_| Ok(()),
        edit: |_, _| Ok(()),
    }
}

fn push_base(options: &Options, scratch: &Path, registry: &Registry, tool: &mut Tool) -> Result<(), Failure> {
    let context = scratch.join("debian");
    fs::create_dir(&context)?;
    let rootfs = context.join("rootfs.tar");
    match &options.debian {
        Some(tar) => drop(fs::copy(tar, &rootfs)?),
        None => {
            let status = Command::new("mmdebstrap")
                .args(["--quiet", "--variant=minbase", "bookworm"])
                .arg(&rootfs)
                .stdin(Stdio::null())
                .status()
                .map_err(|error| format!("mmdebstrap: {error}; or give a root file system with --debian TAR"))?;
            if !status.success() {
                return Err("mmdebstrap failed; give a root file system with --debian TAR".into());
            }
        }
    }
    let path = "ENV PATH=/usr/sbin:/usr/bin:/sbin:/bin";
    fs::write(context.join("Dockerfile"), format!("FROM scratch\nADD rootfs.tar /\n{path}\n"))?;
    tool.fresh(&empty())?;
    let name = format!("{}/base/debian:12", registry.host);
    let run = Run { context: &context, name: &name, push: true, cache: None };
    let pushed = run.timed(tool, registry)?;
    println!("base: {:.0} MB in the registry", pushed.sent as f64 / 1e6);
    tool.stop();
    Ok(fs::remove_dir_all(&context)?)
}

type Results = Vec<(ToolKind, Vec<Measured>)>;

fn rounds(
    job: &Job,
    rounds: usize,
    context: &Path,
    registry: &mut Registry,
    tools: &mut [Tool],
) -> Result<Results, Failure> {
    let mut results: Results = tools.iter().map(|tool| (tool.kind, Vec::new())).collect();
    let place = format!("{}/{}", registry.host, job.name);
    let name = |tool: &Tool, tag: &str| format!("{place}/{}:{tag}", tool.kind.name());
    let cache = |tool: &Tool| format!("{place}/{}", tool.kind.name());
    for tool in tools.iter_mut().filter(|_| job.cache || job.state == State::Edited) {
        tool.fresh(&empty())?;
        // Docker's cache is the image itself, under the name that is asked later.
        let (name, cache) = (name(tool, tool.kind.name()), cache(tool));
        let cache = job.cache.then_some((cache.as_str(), true));
        Run { context, name: &name, push: true, cache }.timed(tool, registry)?;
    }
    for round in 0..rounds {
        if job.state == State::Edited {
            fs::write(context.join("app"), format!("version {}\n", round + 1))?;
        }
        for (tool, (_, samples)) in tools.iter_mut().zip(&mut results) {
            if job.state == State::Cold {
                tool.fresh(&empty())?;
            }
            if job.blank {
                registry.empty()?;
            }
            let name = name(tool, &format!("r{round}"));
            let cache = cache(tool);
            let cache = job.cache.then_some((cache.as_str(), false));
            samples.push(Run { context, name: &name, push: job.push, cache }.timed(tool, registry)?);
        }
    }
    tools.iter_mut().for_each(Tool::stop);
    Ok(results)
}

fn show(job: &Job, results: &Results) -> Value {
    let fastest = |all: &[Measured]| all.iter().map(|one| one.sample.wall).fold(f64::INFINITY, f64::min);
    let own = results.first().map(|(_, all)| fastest(all)).unwrap_or_default();
    let mut tools = Vec::new();
    for (kind, all) in results {
        let of = |field: fn(&Measured) -> f64| median(all.iter().map(field).collect());
        let (least, wall, cpu) = (fastest(all), of(|one| one.sample.wall), of(|one| one.sample.cpu));
        let peak = all.iter().map(|one| one.sample.peak_bytes).max().unwrap_or(0) as f64 / 1e6;
        let (sent, received) = (of(|one| one.sent as f64 / 1e6), of(|one| one.received as f64 / 1e6));
        let ratio = least / own.max(1e-9);
        println!(
            "{:18} {:8} {least:9.3} {wall:9.3} {cpu:9.3} {peak:8.0} {sent:9.3} {received:9.3}  {ratio:.1}",
            job.name,
            kind.name()
        );
        tools.push(json!({
            "tool": kind.name(), "wall_seconds": all.iter().map(|one| one.sample.wall).collect::<Vec<_>>(),
            "median_seconds": wall, "min_seconds": least, "cpu_seconds": cpu, "peak_megabytes": peak,
            "sent_megabytes": sent, "received_megabytes": received, "ratio_to_nacre": ratio,
        }));
    }
    json!({ "name": job.name, "about": job.about, "tools": tools })
}

/// Names and descriptions, for `--list`.
pub(crate) fn list() -> Vec<(&'static str, &'static str)> {
    jobs().iter().map(|job| (job.name, job.about)).collect()
}
