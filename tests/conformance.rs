//! Runs the cases of `testdata/conformance/cases`: Dockerfile builds whose results were recorded from BuildKit.
//!
//! A case is a directory: `case.json` (see [`Case`]), `context/`, `expected.json` for those that build, and optionally
//! `make.sh` (run in a copy of the context to make modes, links, odd names, archives), `http/` (served on loopback;
//! `http://HTTPD` in args) and directories for named contexts. Every case gets a scratch directory and a fresh store.
//!
//! `testdata/conformance/known-failures.txt` must be exact: a case in it that passes is a failure of this test too.
//!
//! Environment: NACRE_CONFORMANCE_FILTER (part of a name, `^` anchors it), NACRE_CONFORMANCE_JOBS,
//! NACRE_CONFORMANCE_STRICT=1 (history text too), NACRE_CONFORMANCE_KEEP=1 (keep scratch directories),
//! NACRE_CONFORMANCE_BUILDER (another program with nacre's command line), NACRE_CONFORMANCE_BLESS=1 (write the list of
//! known failures), NACRE_TEST_ROOT (where `testdata` is, when not where this was compiled).

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a test program's results")]
#![expect(clippy::disallowed_methods, reason = "variables steer the tests")]

#[path = "support/bases.rs"]
#[allow(dead_code, reason = "shared with the other test program")]
mod bases;
#[path = "support/http.rs"]
mod http;
#[path = "support/image.rs"]
mod image;
#[path = "support/process.rs"]
mod process;

use bases::BASES;
use image::{Bases, Strictness};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_OMIT};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Stands for the address of the test's own server.
const HTTPD: &str = "http://HTTPD";
const TIMEOUT: Duration = Duration::from_secs(120);
const DAY_SECONDS: i64 = 86_400;

/// `case.json`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    /// What it is about, for people.
    about: String,
    /// Group in the table.
    area: String,
    /// `ok` or `error`.
    expect: String,
    /// Words that the message must name; `a|b` is either.
    #[serde(default)]
    error: Vec<String>,
    /// Build args; `null` takes the environment's value.
    #[serde(default)]
    args: Map<String, Value>,
    #[serde(default)]
    target: Option<String>,
    #[serde(default)]
    platform: Option<String>,
    /// Secrets by id; each character is a byte.
    #[serde(default)]
    secrets: Map<String, Value>,
    /// Ids of ssh agents.
    #[serde(default)]
    ssh: Vec<String>,
    #[serde(default)]
    labels: Map<String, Value>,
    /// Named contexts: `local:DIR` of the case or `base:NAME`.
    #[serde(default)]
    contexts: Map<String, Value>,
    /// Dockerfile in the context.
    #[serde(default)]
    file: Option<String>,
    /// More flags.
    #[serde(default)]
    flags: Vec<String>,
    /// Environment of the builder.
    #[serde(default)]
    env: BTreeMap<String, String>,
    /// Why BuildKit's result is unspecified: a mismatch does not count.
    #[serde(default)]
    lenient: Option<String>,
    /// `root`: only runs as root.
    #[serde(default)]
    needs: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Pass,
    Fail,
    Lenient,
    NotForThisUser,
}

struct Outcome {
    verdict: Verdict,
    area: String,
    about: String,
    diffs: Vec<String>,
}

/// What all cases share.
struct Harness {
    cases: PathBuf,
    builder: PathBuf,
    work: PathBuf,
    bases_dir: PathBuf,
    bases: Bases,
    httpd: String,
    how: Strictness,
    keep: bool,
    root: bool,
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["--read", image, bases] => return show(Path::new(image), Path::new(bases)),
        ["--bases", dir] => return write_bases(Path::new(dir)),
        ["--stage", case, dir] => return stage_only(Path::new(case), Path::new(dir)),
        // What test runners ask every test program.
        words if words.contains(&"--list") => return ExitCode::SUCCESS,
        _ => {}
    }
    let filter = std::env::var("NACRE_CONFORMANCE_FILTER").ok();
    let filter = filter.or_else(|| args.into_iter().find(|arg| !arg.starts_with('-'))).unwrap_or_default();
    match run_all(&filter) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            eprintln!("conformance: {message}");
            ExitCode::FAILURE
        }
    }
}

fn set(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| !value.is_empty() && value != "0")
}

fn testdata() -> PathBuf {
    let root = std::env::var_os("NACRE_TEST_ROOT").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    root.join("testdata/conformance")
}

/// Runs the cases that `filter` names; `Ok(true)` when all is as it should be.
fn run_all(filter: &str) -> Result<bool, String> {
    let Some(busybox) = bases::busybox() else {
        if set("CI") {
            return Err("there is no busybox in PATH".to_owned());
        }
        println!("conformance: skipped, there is no busybox in PATH");
        return Ok(true);
    };
    let testdata = testdata();
    let cases = testdata.join("cases");
    let names = case_names(&cases, filter)?;
    if names.is_empty() {
        println!("conformance: no case matches `{filter}`");
        return Ok(true);
    }
    let work = std::env::temp_dir().join(format!("nacre-{}", letters(std::process::id() as usize)));
    fs::create_dir_all(&work).map_err(|error| format!("{}: {error}", work.display()))?;
    fs::set_permissions(&work, fs::Permissions::from_mode(0o755)).map_err(|error| error.to_string())?;
    let bases_dir = work.join("bases");
    bases::make_bases(&bases_dir, &busybox).map_err(|error| format!("cannot make base images: {error}"))?;
    let harness = Harness {
        bases: Bases::read(&bases_dir, &BASES)?,
        bases_dir,
        builder: std::env::var_os("NACRE_CONFORMANCE_BUILDER")
            .map_or(env!("CARGO_BIN_EXE_nacre").into(), PathBuf::from),
        httpd: http::serve(cases.clone()).map_err(|error| format!("cannot serve: {error}"))?,
        how: Strictness { strict: set("NACRE_CONFORMANCE_STRICT") },
        keep: set("NACRE_CONFORMANCE_KEEP"),
        root: rustix::process::geteuid().is_root(),
        cases,
        work,
    };
    let outcomes = run_cases(&harness, &names);
    let left = mounts_below(&harness.work);
    if harness.keep {
        println!("scratch directories are in {}", harness.work.display());
    } else {
        process::remove_tree(&harness.work);
    }
    let list = testdata.join("known-failures.txt");
    judge(&names, &outcomes, &left, &list, harness.root)
}

/// A number without digits and without letters that words are made of: a path in an error message must never be what
/// names a case's words.
fn letters(mut number: usize) -> String {
    let mut text = String::new();
    while text.is_empty() || number > 0 {
        text.push(['q', 'x', 'j', 'z'][number % 4]);
        number /= 4;
    }
    text
}

fn case_names(cases: &Path, filter: &str) -> Result<Vec<String>, String> {
    let entries = fs::read_dir(cases).map_err(|error| format!("{}: {error}", cases.display()))?;
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| match filter.strip_prefix('^') {
            Some(start) => name.starts_with(start),
            None => name.contains(filter),
        })
        .filter(|name| cases.join(name).join("case.json").exists())
        .collect();
    names.sort();
    Ok(names)
}

fn run_cases(harness: &Harness, names: &[String]) -> Vec<Outcome> {
    let jobs = std::env::var("NACRE_CONFORMANCE_JOBS").ok().and_then(|jobs| jobs.parse().ok());
    let jobs = jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(2, std::num::NonZero::get));
    let next = AtomicUsize::new(0);
    let outcomes: Mutex<Vec<Option<Outcome>>> = Mutex::new(names.iter().map(|_| None).collect());
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(name) = names.get(number) else { break };
                    let outcome = run_case(harness, name, &letters(number));
                    outcomes.lock().expect("no case panics with the lock")[number] = Some(outcome);
                }
            });
        }
    });
    outcomes.into_inner().expect("no case panics with the lock").into_iter().flatten().collect()
}

/// Prints what there is to say; returns whether all is as it should be.
fn judge(
    names: &[String],
    outcomes: &[Outcome],
    left_mounts: &[String],
    list: &Path,
    root: bool,
) -> Result<bool, String> {
    let known = known_failures(list, root)?;
    let mut table: BTreeMap<&str, [usize; 4]> = BTreeMap::new();
    let mut unexpected = Vec::new();
    let mut surprises = Vec::new();
    let mut failed = BTreeSet::new();
    for (name, outcome) in names.iter().zip(outcomes) {
        let is_known = known.contains(name);
        table.entry(&outcome.area).or_default()[outcome.verdict as usize] += 1;
        match outcome.verdict {
            Verdict::Pass | Verdict::Lenient if is_known => surprises.push(name),
            Verdict::Fail if !is_known => unexpected.push(name),
            _ => {}
        }
        if outcome.verdict == Verdict::Fail {
            failed.insert(name.clone());
        }
        if !outcome.diffs.is_empty() {
            let word = match outcome.verdict {
                Verdict::Fail if is_known => "KNOWN",
                Verdict::Fail => "FAIL",
                _ => "NOTE",
            };
            println!("{word} {name}: {}", outcome.about);
            for diff in outcome.diffs.iter().take(12) {
                println!("    {}", diff.replace('\n', "\n      "));
            }
            if outcome.diffs.len() > 12 {
                println!("    ... {} more", outcome.diffs.len() - 12);
            }
        }
    }
    println!("\n{:12}{:>9}{:>9}{:>9}{:>9}", "area", "passed", "failed", "lenient", "not run");
    for (area, row) in &table {
        println!("{area:12}{:>9}{:>9}{:>9}{:>9}", row[0], row[1], row[2], row[3]);
    }
    let sum = |column: usize| table.values().map(|row| row[column]).sum::<usize>();
    println!("{} mismatches in lenient cases (not counted), {} need root and did not run", sum(2), sum(3));
    for mount in left_mounts {
        println!("left mounted: {mount}");
    }
    if set("NACRE_CONFORMANCE_BLESS") {
        write_known_failures(list, names, &failed, root)?;
        println!("wrote {}", list.display());
        return Ok(left_mounts.is_empty());
    }
    for name in &surprises {
        println!("{name} is listed in {} but does not fail: take it out", list.display());
    }
    for name in known.iter().filter(|name| !list_has_case(list, name)) {
        println!("{name} is listed in {} but there is no such case", list.display());
        surprises.push(name);
    }
    if !unexpected.is_empty() {
        println!("not known to fail: {}", unexpected.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(" "));
    }
    println!("{} of the failures are known", failed.len() - unexpected.len());
    println!("{} passed, {} failed", sum(0), sum(1));
    Ok(unexpected.is_empty() && surprises.is_empty() && left_mounts.is_empty())
}

fn list_has_case(list: &Path, name: &str) -> bool {
    list.parent().is_some_and(|dir| dir.join("cases").join(name).join("case.json").exists())
}

/// One name a line; `user:NAME` and `root:NAME` fail only for ordinary users or only for root; `#` starts a comment.
fn known_failures(list: &Path, root: bool) -> Result<BTreeSet<String>, String> {
    let text = match fs::read_to_string(list) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(format!("{}: {error}", list.display())),
    };
    let mut names = BTreeSet::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        match line.split_once(':') {
            Some(("user", _)) if root => {}
            Some(("root", _)) if !root => {}
            Some((_, name)) => drop(names.insert(name.to_owned())),
            None if line.is_empty() => {}
            None => drop(names.insert(line.to_owned())),
        }
    }
    Ok(names)
}

/// Keeps lines of cases that were not run and of the other kind of user.
fn write_known_failures(list: &Path, ran: &[String], failed: &BTreeSet<String>, root: bool) -> Result<(), String> {
    let text = fs::read_to_string(list).unwrap_or_default();
    let other = if root { "user:" } else { "root:" };
    let mut lines: BTreeSet<String> = text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .filter(|line| line.starts_with(other) || !ran.iter().any(|name| line.ends_with(name.as_str())))
        .map(str::to_owned)
        .collect();
    lines.extend(failed.iter().cloned());
    let comments: Vec<&str> = text.lines().filter(|line| line.starts_with('#')).collect();
    let text: String = comments.into_iter().map(str::to_owned).chain(lines).map(|line| line + "\n").collect();
    fs::write(list, text).map_err(|error| format!("{}: {error}", list.display()))
}

fn mounts_below(dir: &Path) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let dir = dir.to_string_lossy().into_owned();
    mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .filter(|at| at.starts_with(&dir))
        .map(str::to_owned)
        .collect()
}

/// A case laid out in a scratch directory.
struct Job {
    name: String,
    dir: PathBuf,
    tmp: PathBuf,
    case: Case,
    /// Kept open while the build runs.
    agents: Vec<UnixListener>,
}

fn run_case(harness: &Harness, name: &str, scratch: &str) -> Outcome {
    let mut outcome =
        Outcome { verdict: Verdict::Fail, area: "harness".into(), about: String::new(), diffs: Vec::new() };
    let tmp = harness.work.join(format!("w{scratch}"));
    let result = fs::create_dir(&tmp).map_err(|error| error.to_string()).and_then(|()| {
        let dir = harness.cases.join(name);
        let case = read_case(&dir)?;
        outcome.area.clone_from(&case.area);
        outcome.about.clone_from(&case.about);
        if case.needs.iter().any(|need| need == "root") && !harness.root {
            return Ok((Verdict::NotForThisUser, Vec::new()));
        }
        if let Some(why) = &case.lenient {
            outcome.about.push_str(&format!(" (lenient: {why})"));
        }
        let lenient = case.lenient.is_some();
        let mut job = Job { name: name.to_owned(), dir, tmp: tmp.clone(), case, agents: Vec::new() };
        let diffs = run_job(harness, &mut job)?;
        let verdict = match () {
            () if diffs.is_empty() => Verdict::Pass,
            () if lenient => Verdict::Lenient,
            () => Verdict::Fail,
        };
        Ok((verdict, diffs))
    });
    match result {
        Ok((verdict, diffs)) => (outcome.verdict, outcome.diffs) = (verdict, diffs),
        Err(message) => outcome.diffs = vec![format!("harness: {message}")],
    }
    if !harness.keep {
        process::remove_tree(&tmp);
    }
    outcome
}

fn read_case(dir: &Path) -> Result<Case, String> {
    let text = fs::read_to_string(dir.join("case.json")).map_err(|error| format!("case.json: {error}"))?;
    serde_json::from_str(&text).map_err(|error| format!("case.json: {error}"))
}

/// Builds and compares; returns the differences.
fn run_job(harness: &Harness, job: &mut Job) -> Result<Vec<String>, String> {
    let out = job.tmp.join("out.tar");
    let command = job.command(harness, &out)?;
    let (code, log) =
        process::run(command, TIMEOUT).map_err(|error| format!("{}: {error}", harness.builder.display()))?;
    let log = log.trim();
    if job.case.expect == "error" {
        if code == Some(0) {
            return Ok(vec!["expected the build to fail, it succeeded".to_owned()]);
        }
        let lost = missing_words(&job.case.error, log);
        return Ok(lost
            .iter()
            .map(|word| format!("error message does not name '{word}'; its end was: {}", end_of(log, 400)))
            .collect());
    }
    if code != Some(0) {
        let code = code.map_or("killed".to_owned(), |code| format!("exit {code}"));
        return Ok(vec![format!("build failed ({code}): {}", end_of(log, 600))]);
    }
    let epoch = job.case.args.contains_key("SOURCE_DATE_EPOCH") || job.case.env.contains_key("SOURCE_DATE_EPOCH");
    let mut got = image::read_image(&out, &harness.bases, epoch)?;
    for (created_by, _) in &mut got.history {
        *created_by = created_by.replace(&harness.httpd, HTTPD);
    }
    let expected =
        fs::read_to_string(job.dir.join("expected.json")).map_err(|error| format!("expected.json: {error}"))?;
    let expected = image::parse_record(&expected).map_err(|error| format!("expected.json: {error}"))?;
    Ok(image::compare(&expected, &got, harness.how))
}

fn end_of(text: &str, characters: usize) -> &str {
    let skip = text.chars().count().saturating_sub(characters);
    text.char_indices().nth(skip).map_or("", |(at, _)| &text[at..])
}

/// Words that the error message, the text from the last `error` line on, lacks.
fn missing_words<'a>(words: &'a [String], log: &str) -> Vec<&'a String> {
    let lines: Vec<&str> = log.lines().flat_map(|line| line.split('\r')).collect();
    let starts = |line: &&str| {
        let line = line.trim_start_matches(|c: char| !c.is_alphanumeric() && c != '_').to_lowercase();
        ["error", "nacre: error", "fatal"].iter().any(|word| line.starts_with(word))
    };
    let at = lines.iter().rposition(starts).unwrap_or(0);
    let message = lines.get(at..).unwrap_or_default().join("\n").to_lowercase();
    words.iter().filter(|word| !word.split('|').any(|word| message.contains(&word.to_lowercase()))).collect()
}

impl Job {
    /// Lays the case out and returns the command line of its build.
    fn command(&mut self, harness: &Harness, out: &Path) -> Result<Command, String> {
        let failed = |error: std::io::Error| error.to_string();
        let mut command = Command::new(&harness.builder);
        command.arg("build").arg("--store").arg(self.tmp.join("store"));
        let rewrite = self.case.flags.iter().any(|flag| flag == "--rewrite-timestamp");
        let more = if rewrite { ",rewrite-timestamp=true" } else { "" };
        command.arg("--output").arg(format!("type=oci,dest={}{more}", out.display()));
        for (name, value) in &self.case.args {
            let value = value.as_str().map(|value| format!("={}", value.replace(HTTPD, &harness.httpd)));
            command.arg("--build-arg").arg(format!("{name}{}", value.unwrap_or_default()));
        }
        let context = self.stage("context").map_err(failed)?;
        for (flag, value) in [("--target", &self.case.target), ("--platform", &self.case.platform)] {
            if let Some(value) = value {
                command.args([flag, value]);
            }
        }
        if let Some(file) = &self.case.file {
            command.arg("-f").arg(context.join(file));
        }
        for (name, value) in &self.case.labels {
            command.arg("--label").arg(format!("{name}={}", value.as_str().unwrap_or_default()));
        }
        for (number, (id, value)) in self.case.secrets.iter().enumerate() {
            let path = self.tmp.join(format!("secret{number}"));
            let bytes: Vec<u8> = value
                .as_str()
                .unwrap_or_default()
                .chars()
                .map(|c| u8::try_from(u32::from(c)).unwrap_or(b'?'))
                .collect();
            fs::write(&path, bytes).map_err(failed)?;
            command.arg("--secret").arg(format!("id={id},src={}", path.display()));
        }
        for (number, id) in self.case.ssh.iter().enumerate() {
            // In the scratch directory, but a socket's path has a limit of 108 bytes.
            let path = self.tmp.join(letters(number));
            let listener = UnixListener::bind(&path).map_err(failed)?;
            command.arg("--ssh").arg(format!("{id}={}", path.display()));
            self.agents.push(listener);
        }
        for base in BASES {
            let layout = harness.bases_dir.join(base);
            command.arg("--build-context").arg(format!("{base}=oci-layout://{}:latest", layout.display()));
        }
        for (name, source) in &self.case.contexts {
            let source = match source.as_str().unwrap_or_default().split_once(':') {
                Some(("local", dir)) => self.stage(dir).map_err(failed)?.display().to_string(),
                Some((_, base)) => format!("oci-layout://{}:latest", harness.bases_dir.join(base).display()),
                None => return Err(format!("context {name} is neither local: nor base:")),
            };
            command.arg("--build-context").arg(format!("{name}={source}"));
        }
        command.args(self.case.flags.iter().filter(|flag| *flag != "--rewrite-timestamp"));
        command.arg(&context).envs(&self.case.env);
        Ok(command)
    }

    /// Copies a fixture, runs `make.sh` in it, and gives what that left untouched fixed modes and times.
    fn stage(&self, sub: &str) -> std::io::Result<PathBuf> {
        stage(&self.dir, &self.name, sub, &self.tmp)
    }
}

fn stage(case: &Path, name: &str, sub: &str, tmp: &Path) -> std::io::Result<PathBuf> {
    let (from, to) = (case.join(sub), tmp.join(sub.replace('/', "_")));
    if from.is_dir() {
        copy_tree(&from, &to)?
    } else {
        fs::create_dir(&to)?
    }
    fs::set_permissions(&to, fs::Permissions::from_mode(0o755))?;
    let script = case.join("make.sh");
    if sub == "context" && script.exists() {
        let status = Command::new("sh")
            .args(["-c", "umask 022; exec sh -eu \"$1\"", "sh"])
            .arg(fs::canonicalize(script)?)
            .current_dir(&to)
            .envs([("LC_ALL", "C"), ("TAR_OPTIONS", "--sort=name")])
            .status()?;
        if !status.success() {
            return Err(std::io::Error::other(format!("make.sh: {status}")));
        }
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs().cast_signed());
    set_times(&to, format!("{name}/{sub}").into(), now - DAY_SECONDS)?;
    Ok(to)
}

/// Copies contents and links; files keep nothing of their mode but whether they are executable.
fn copy_tree(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (path, dest) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy_tree(&path, &dest)?;
            fs::set_permissions(&dest, fs::Permissions::from_mode(0o755))?;
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(&path)?, &dest)?;
        } else {
            fs::copy(&path, &dest)?;
            let executable = entry.metadata()?.mode() & 0o111 != 0;
            fs::set_permissions(&dest, fs::Permissions::from_mode(if executable { 0o755 } else { 0o644 }))?;
        }
    }
    Ok(())
}

/// Gives what `make.sh` did not date itself a time that depends on its case and path, as the records have it.
fn set_times(path: &Path, key: OsString, old: i64) -> std::io::Result<()> {
    let metadata = path.symlink_metadata()?;
    if metadata.is_dir() {
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let mut key = key.clone();
            key.push("/");
            key.push(entry.file_name());
            set_times(&entry.path(), key, old)?;
        }
    }
    if metadata.mtime() > old || metadata.mtime() == 0 {
        let mut crc = flate2::Crc::new();
        crc.update(key.as_bytes());
        let time = Timespec { tv_sec: 1_500_000_000 + i64::from(crc.sum() % 100_000_000), tv_nsec: 0 };
        let times = Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }, last_modification: time };
        rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}

/// `--read IMAGE BASES`: prints an image's record.
fn show(image: &Path, bases: &Path) -> ExitCode {
    let record = Bases::read(bases, &BASES).and_then(|bases| image::read_image(image, &bases, false));
    match record {
        Ok(record) => println!("{}", serde_json::to_value(record).unwrap_or_default()),
        Err(message) => {
            eprintln!("{message}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// `--bases DIR`: writes the base images.
fn write_bases(dir: &Path) -> ExitCode {
    let busybox = bases::busybox().unwrap_or_else(|| PathBuf::from("busybox"));
    match bases::make_bases(dir, &busybox) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// `--stage CASE DIR`: lays a case's context out.
fn stage_only(case: &Path, dir: &Path) -> ExitCode {
    let name = case.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match stage(case, &name, "context", dir) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
