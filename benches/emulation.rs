//! What emulated owners cost: whole builds with `--ownership=emulate` against the same with `--ownership=subid`.
//!
//! ```text
//! cargo bench --bench emulation -- --json out.json
//!   --rounds N        timed builds of each workload and way [5]
//!   --only WORD       only workloads whose name contains it; may be repeated
//!   --user NAME       who builds when root starts this: needs subordinate ids [nacre-test]
//!   --base DIR        OCI layout of Debian with Node.js [/var/tmp/nacre-test-bases-0/node/layout, which tests/real makes]
//!   --scratch DIR     where stores and the context go [/var/tmp]; needs about 8 GB
//!   --nacre FILE      another nacre than the one built with this benchmark
//!   --json FILE       all numbers
//! ```
//!
//! The ways alternate. What a step installs is in an earlier, cached stage, so the network does not count; every timed build
//! runs exactly one step and reads its layer. Wall time is that of the command, CPU time that of all its processes; the
//! table has medians. Nothing fails because something is slow.

#![allow(clippy::print_stdout, clippy::print_stderr, clippy::exit, reason = "a program of its own")]

#[path = "builds/measure.rs"]
#[expect(dead_code, reason = "shared with another benchmark")]
mod measure;

use measure::{Sample, median, timed};
use serde_json::json;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

type Failure = Box<dyn std::error::Error>;

/// Ways of `--ownership`: what is paid, and what it is compared with.
const WAYS: [&str; 2] = ["emulate", "subid"];

/// Files in the archive of others' files.
const FILES: usize = 20_000;

/// Names of stages, and what they time.
const WORKLOADS: [(&str, &str); 6] = [
    ("apt", "apt-get install of 70 packages and more"),
    ("npm", "npm install of 10 packages and what they need"),
    ("pip", "pip install of 8 wheels"),
    ("tar", "tar x of 20,000 files of others, and a look at each"),
    ("copy", "cp -a of 20,000 files of others"),
    ("compile", "gcc of 60 files"),
];

const DOCKERFILE: &str = r#"
FROM node AS tools
ENV DEBIAN_FRONTEND=noninteractive
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev make python3-pip && rm -rf /var/lib/apt/lists/*

FROM node AS packages
RUN apt-get update && mkdir -p /debs/partial && apt-get install -y --download-only --no-install-recommends \
    -o Dir::Cache::archives=/debs openssh-server sudo cron at dbus man-db screen rsyslog iputils-ping uuid-runtime plocate \
    postfix redis-server memcached nginx-light logrotate ssl-cert python3-minimal acl procps file rsync less vim-tiny \
    curl wget git tmux zip unzip bc tree strace psmisc lsof attr bsdextrautils polkitd exim4-base- && ls /debs | wc -l

FROM node AS modules
WORKDIR /modules
RUN npm install --no-fund --no-audit --cache /cache express@4.18.2 uglify-js@3.17.4 lodash@4.17.21 webpack@5.88.2 eslint@8.47.0 \
    typescript@5.1.6 axios@1.4.0 chalk@4.1.2 commander@11.0.0 rollup@3.28.0

FROM tools AS wheels
RUN pip download -d /wheels tabulate==0.9.0 idna==3.7 requests==2.31.0 jinja2==3.1.2 click==8.1.6 sympy==1.12 \
    pygments==2.16.1 networkx==3.1

FROM node AS unpacked
RUN --mount=target=/context mkdir /files && tar -xf /context/files.tar -C /files

FROM node AS apt
ENV DEBIAN_FRONTEND=noninteractive
ARG ROUND
RUN --network=none --mount=from=packages,source=/debs,target=/debs apt-get install -y --no-install-recommends /debs/*.deb

FROM node AS npm
WORKDIR /app
ARG ROUND
RUN --network=none --mount=from=modules,source=/cache,target=/cache,rw --mount=from=modules,source=/modules,target=/modules \
    cp /modules/package.json /modules/package-lock.json . && npm ci --offline --no-fund --no-audit --cache /cache

FROM tools AS pip
ARG ROUND
RUN --network=none --mount=from=wheels,source=/wheels,target=/wheels \
    pip install --break-system-packages --no-index --find-links /wheels /wheels/*.whl

FROM node AS tar
ARG ROUND
RUN --network=none --mount=target=/context mkdir /files && tar -xf /context/files.tar -C /files && ls -lR /files | wc -l

FROM unpacked AS copy
ARG ROUND
RUN --network=none cp -a /files /copy

FROM tools AS compile
ARG ROUND
RUN --network=none --mount=target=/context mkdir /objects && make -f /context/sources/Makefile -j2 -C /objects
"#;

struct Options {
    rounds: usize,
    only: Vec<String>,
    user: String,
    base: PathBuf,
    scratch: PathBuf,
    nacre: PathBuf,
    json: Option<PathBuf>,
}

fn main() {
    if let Err(error) = run() {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn options() -> Result<Options, Failure> {
    let mut options = Options {
        rounds: 5,
        only: Vec::new(),
        user: "nacre-test".to_owned(),
        base: "/var/tmp/nacre-test-bases-0/node/layout".into(),
        scratch: "/var/tmp".into(),
        nacre: env!("CARGO_BIN_EXE_nacre").into(),
        json: None,
    };
    let mut args = std::env::args().skip(1);
    while let Some(flag) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{flag} needs a value"));
        match flag.as_str() {
            // What cargo adds.
            "--bench" => {}
            "--rounds" => options.rounds = value()?.parse::<usize>()?.max(1),
            "--only" => options.only.push(value()?),
            "--user" => options.user = value()?,
            "--base" => options.base = value()?.into(),
            "--scratch" => options.scratch = value()?.into(),
            "--nacre" => options.nacre = value()?.into(),
            "--json" => options.json = Some(value()?.into()),
            _ => return Err(format!("unknown option {flag}; see benches/emulation.rs").into()),
        }
    }
    Ok(options)
}

fn run() -> Result<(), Failure> {
    let options = options()?;
    let wanted = |name: &str| options.only.is_empty() || options.only.iter().any(|word| name.contains(word.as_str()));
    let chosen: Vec<_> = WORKLOADS.iter().filter(|(name, _)| wanted(name)).collect();
    // Of the user who builds, so that he may enter and clean it.
    let scratch = Scratch::new(&options)?;
    println!(
        "{:8} {:52} {:>9} {:>9} {:>6} {:>9} {:>9} {:>6}",
        "", "", "subid", "emulate", "wall", "subid", "emulate", "CPU"
    );
    let mut results = Vec::new();
    for (name, about) in chosen {
        let mut samples: [Vec<Sample>; 2] = Default::default();
        for round in 0..=options.rounds {
            for (way, samples) in WAYS.iter().zip(&mut samples) {
                let sample = timed(&mut [scratch.build(way, name, round)], None)
                    .map_err(|error| Failure::from(format!("{name} with --ownership={way}: {error}")))?;
                // The first one makes the stages below.
                if round > 0 {
                    samples.push(sample);
                }
            }
        }
        let of = |way: usize, what: fn(&Sample) -> f64| median(samples[way].iter().map(what).collect());
        let [emulate, subid] = [0, 1].map(|way| (of(way, |sample| sample.wall), of(way, |sample| sample.cpu)));
        let percent = |one: f64, other: f64| (one / other - 1.0) * 100.0;
        let (wall, cpu) = (percent(emulate.0, subid.0), percent(emulate.1, subid.1));
        println!(
            "{name:8} {about:52} {:7.2} s {:7.2} s {wall:+5.0}% {:7.2} s {:7.2} s {cpu:+5.0}%",
            subid.0, emulate.0, subid.1, emulate.1
        );
        let all = |way: usize| samples[way].iter().map(|one| json!([one.wall, one.cpu])).collect::<Vec<_>>();
        results.push(json!({
            "name": name, "wall_percent": wall, "cpu_percent": cpu, "emulate": all(0), "subid": all(1),
        }));
    }
    if let Some(path) = &options.json {
        std::fs::write(path, serde_json::to_string_pretty(&results)?)?;
    }
    Ok(())
}

struct Scratch<'a> {
    directory: tempfile::TempDir,
    options: &'a Options,
}

impl<'a> Scratch<'a> {
    fn new(options: &'a Options) -> Result<Scratch<'a>, Failure> {
        let directory = tempfile::Builder::new().prefix("nacre-emulation-").tempdir_in(&options.scratch)?;
        let scratch = Scratch { directory, options };
        let context = scratch.path("context");
        std::fs::create_dir_all(context.join("sources"))?;
        std::fs::write(context.join("Dockerfile"), DOCKERFILE)?;
        archive(&context.join("files.tar"))?;
        sources(&context.join("sources"))?;
        copy_tree(&options.base, &scratch.path("base"))
            .map_err(|error| format!("{}: {error}", options.base.display()))?;
        std::fs::copy(&options.nacre, scratch.path("nacre"))?;
        std::fs::create_dir(scratch.path("stores"))?;
        std::fs::set_permissions(scratch.directory.path(), std::fs::Permissions::from_mode(0o755))?;
        if is_root() {
            let owner = format!("{}:", options.user);
            succeed(Command::new("chown").arg("-R").arg(owner).arg(scratch.directory.path()))?;
        }
        Ok(scratch)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// One build of a stage; only its last step runs when that has been built in another round.
    fn build(&self, way: &str, stage: &str, round: usize) -> Command {
        let mut command = self.as_user(&self.path("nacre"));
        command.args(["build", "-q", "--no-secret-warnings", "--store"]).arg(self.path("stores").join(way));
        command.arg(format!("--ownership={way}")).arg(format!("--build-arg=ROUND={round}"));
        command.arg(format!("--build-context=node=oci-layout://{}", self.path("base").display()));
        command.args(["--target", stage]).arg(self.path("context"));
        command
    }

    fn as_user(&self, program: &Path) -> Command {
        if !is_root() {
            return Command::new(program);
        }
        let user = &self.options.user;
        let mut command = Command::new("setpriv");
        command.args([&format!("--reuid={user}"), &format!("--regid={user}")]);
        command
            .args(["--init-groups", "--inh-caps=-all", "--", "env"])
            .arg(format!("HOME={}", self.path("").display()));
        command.arg(program);
        command
    }
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        // What subordinate ids own, only root or their namespace may remove.
        let stores = self.path("stores");
        let mut command = match is_root() {
            true => Command::new("rm"),
            false => {
                let mut command = Command::new("unshare");
                command.args(["--map-auto", "--map-root-user", "rm"]);
                command
            }
        };
        _ = command.arg("-rf").arg(stores).status();
    }
}

fn is_root() -> bool {
    rustix::process::getuid().is_root()
}

fn succeed(command: &mut Command) -> Result<(), Failure> {
    let status = command.status().map_err(|error| format!("{command:?}: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?}: {status}").into()) }
}

fn copy_tree(from: &Path, to: &Path) -> Result<(), Failure> {
    std::fs::create_dir(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => copy_tree(&entry.path(), &target)?,
            false => drop(std::fs::copy(entry.path(), target)?),
        }
    }
    Ok(())
}

/// Files of 40 users and 20 groups in 200 directories.
fn archive(path: &Path) -> Result<(), Failure> {
    let mut archive = tar::Builder::new(std::io::BufWriter::new(std::fs::File::create(path)?));
    let mut add = |name: String, kind: tar::EntryType, number: usize, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(if content.is_empty() { 0o755 } else { 0o644 });
        header.set_uid(1000 + number as u64 % 40);
        header.set_gid(30 + number as u64 % 20);
        header.set_mtime(1_700_000_000);
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, name, content)
    };
    for number in 0..FILES {
        let directory = number / 100;
        if number % 100 == 0 {
            add(format!("d{directory}/"), tar::EntryType::Directory, number, b"")?;
        }
        let content = format!("{number}\n").repeat(20);
        add(format!("d{directory}/f{number}"), tar::EntryType::Regular, number, content.as_bytes())?;
    }
    archive.into_inner()?.flush()?;
    Ok(())
}

/// Files of C with what includes much, and a Makefile.
fn sources(directory: &Path) -> Result<(), Failure> {
    let mut names = Vec::new();
    for file in 0..60 {
        let mut text = "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n#include <math.h>\n".to_owned();
        for function in 0..40 {
            text.push_str(&format!(
                "double f{file}_{function}(double *a, int n) {{ double s = 0; for (int i = 0; i < n; i++) \
                 s += sqrt(a[i] * {function}) + (i % {}); return s; }}\n",
                function + 2
            ));
        }
        std::fs::write(directory.join(format!("s{file}.c")), text)?;
        names.push(format!("s{file}.o"));
    }
    let rules = format!("all: {}\n%.o: /context/sources/%.c\n\tgcc -O1 -c $< -o $@\n", names.join(" "));
    std::fs::write(directory.join("Makefile"), rules)?;
    Ok(())
}
