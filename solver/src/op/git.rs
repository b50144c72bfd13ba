//! Checkouts of git repositories, made by the `git` program.
//!
//! ```text
//! STORE/git/HEX/         one repository, by its address without credentials
//!   lock                 held by who changes anything in here
//!   repo/                bare; as shallow as the server allows
//!   co-KEY/tree          a checkout, and
//!   co-KEY/index         its table of entries
//! ```
//!
//! A name is resolved to a commit first, by asking the server; a commit that was checked out before is then taken as it
//! is. The repository is foreign: git runs without the user's and the system's configuration, without hooks, filters
//! and questions, over ssh, http, https and git only; what it checks out is looked at without following links.

use crate::context::ContextError;
use crate::materialize::remove_tree;
use crate::op::file::digest_uncached;
use crate::registry::auth::encode_base64;
use crate::scan::{self, Detail, Everything, ScanError, ScanOptions};
use crate::store::{Store, StoreError, name_for, open_lock};
use crate::tree::{Entry, Kind, Node, OnDisk, Origin, Resolved, Tree, index, is_within};
use nacre_frontend::lower::without_credentials;
use rustix::process::{Pid, Signal, kill_process_group};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant, SystemTime};

/// Transports that a repository, and its submodules, may use.
const PROTOCOLS: &str = "http:https:git:ssh";
/// Most of an answer that is read.
const OUTPUT_LIMIT_BYTES: u64 = 16 << 20;
/// Lines of git's complaint that an error repeats.
const COMPLAINT_LINES: usize = 6;
/// How long the rest of what an ended git said is waited for.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Changes when checkouts are made in another way.
const FORMAT: &str = "nacre checkout 1";

/// How git is called: what a caller knows of its user.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// The program; empty is `git`.
    pub program: PathBuf,
    /// All of its environment; settings of this module are added.
    pub env: Vec<(OsString, OsString)>,
    /// Socket of the ssh agent to use instead of the one in `env`.
    pub ssh_agent: Option<PathBuf>,
    /// What `ssh` is called with, unless `env` says it.
    pub ssh_command: String,
    /// `GIT_AUTH_TOKEN` and `GIT_AUTH_HEADER`, either with `.HOST` behind it, as BuildKit's clients give them.
    pub secrets: Secrets,
}

/// Secrets by name; never shown.
#[derive(Clone, Default)]
pub struct Secrets(pub BTreeMap<String, Vec<u8>>);

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// What to check out.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Address.
    pub remote: &'a str,
    /// Branch, tag or commit; empty is the default branch.
    pub reference: &'a str,
    /// Directory below the top; empty is the top.
    pub subdir: &'a str,
    /// Keep `.git`. Only possible for the top.
    pub keep_git_dir: bool,
    /// Digits that the commit must start with.
    pub checksum: Option<&'a str>,
    /// Fetch submodules.
    pub submodules: bool,
}

/// A checkout in the store.
#[derive(Debug, Clone)]
pub struct Checkout {
    /// The commit.
    pub commit: String,
    /// Its files: owned by root, read in place, digests known.
    pub tree: Arc<Tree>,
}

/// Why there is no checkout. Addresses in it are without credentials.
#[derive(Debug, thiserror::Error)]
pub enum GitError {
    /// No `git` program.
    #[error("cannot fetch {url}: the program `{}` is not installed", program.display())]
    Missing {
        /// Repository.
        url: String,
        /// What was looked for.
        program: PathBuf,
    },
    /// The program cannot be run.
    #[error("cannot run git for {url}")]
    Run {
        /// Repository.
        url: String,
        /// Why.
        source: io::Error,
    },
    /// Not a name of a branch, tag or commit.
    #[error("`{reference}` is no valid branch, tag or commit of {url}")]
    BadReference {
        /// As given.
        reference: String,
        /// Repository.
        url: String,
    },
    /// Not hexadecimal digits.
    #[error("`{checksum}` is no checksum of a commit of {url}")]
    BadChecksum {
        /// As given.
        checksum: String,
        /// Repository.
        url: String,
    },
    /// The server does not know the name.
    #[error("repository {url} does not contain ref `{reference}`")]
    NoReference {
        /// Repository.
        url: String,
        /// Name, or `HEAD` for the default branch.
        reference: String,
    },
    /// The name stands for another commit than asked for.
    #[error("expected checksum {expected} for {url}, found commit {found}")]
    Checksum {
        /// Repository.
        url: String,
        /// As given.
        expected: String,
        /// The commit.
        found: String,
    },
    /// The subdirectory is not there, or leads elsewhere.
    #[error("{url} has no directory `{subdir}` at commit {commit}")]
    NoSubdir {
        /// Repository.
        url: String,
        /// As given.
        subdir: String,
        /// The commit.
        commit: String,
    },
    /// git failed.
    #[error("cannot {doing} {url}: {message}")]
    Failed {
        /// `reach`, `fetch`, `check out`.
        doing: &'static str,
        /// Repository.
        url: String,
        /// What git said.
        message: String,
    },
    /// A file of the store cannot be handled.
    #[error("cannot use {path:?}", path = .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The checkout cannot be walked.
    #[error("cannot read the checkout")]
    Scan(#[from] ScanError),
    /// A file of the checkout cannot be read.
    #[error(transparent)]
    Context(#[from] ContextError),
    /// Told to stop.
    #[error("interrupted")]
    Interrupted,
}

impl GitError {
    /// A way out.
    pub fn help(&self) -> Option<&'static str> {
        let Self::Failed { message, .. } = self else {
            return matches!(self, Self::Missing { .. }).then_some("install git (Debian: apt-get install git)");
        };
        let says = |words: &[&str]| words.iter().any(|word| message.contains(word));
        if says(&["Host key verification failed"]) {
            Some("connect once with ssh, or add the host with ssh-keyscan to ~/.ssh/known_hosts")
        } else if says(&["could not read Username", "could not read Password", "Authentication failed"]) {
            Some("for a private repository give a token: --secret id=GIT_AUTH_TOKEN,env=GIT_AUTH_TOKEN")
        } else if says(&["Permission denied (publickey"]) {
            Some("add a key that the server knows to the ssh agent, and give --ssh default")
        } else if says(&["transport 'file' not allowed", "transport 'ext' not allowed"]) {
            Some("submodules from this machine are refused; add ?submodules=false to the address")
        } else {
            None
        }
    }
}

/// What a name stands for.
struct Target {
    commit: String,
    /// The annotated tag, or the commit itself.
    object: String,
    /// Full name, if it is one.
    name: Option<String>,
}

/// Checks out. `stop` is asked from time to time whether to go on; `news` is told what git says.
pub fn checkout(
    store: &Store,
    request: &Request<'_>,
    settings: &Settings,
    stop: &dyn Fn() -> bool,
    news: &mut dyn FnMut(&str),
) -> Result<Checkout, GitError> {
    let url = without_credentials(request.remote);
    let dir = store.part("git").join(name_for(url.as_bytes()));
    fs::create_dir_all(&dir).map_err(|source| GitError::Io { path: dir.clone(), source })?;
    let config = Config::write(store, request, &url, settings)?;
    let mut git = Git { url: &url, settings, config: &config.0, stop, news };

    let target = git.resolve(request)?;
    if let Some(expected) = request.checksum {
        git.check(&target, expected)?;
    }
    // Only the top has a `.git` to keep.
    let subdir = clean_subdir(request.subdir);
    let keep_git_dir = request.keep_git_dir && subdir.is_empty();
    let name = target.name.as_deref().filter(|_| keep_git_dir).unwrap_or_default();
    let parts =
        [FORMAT, &target.object, &subdir, name, &keep_git_dir.to_string(), &request.submodules.to_string()].join("\0");
    let place = dir.join(format!("co-{}", name_for(parts.as_bytes())));
    if let Some(tree) = load(&place) {
        return Ok(Checkout { commit: target.commit, tree: Arc::new(tree) });
    }
    let _lock = git.lock(&dir.join("lock"))?;
    if let Some(tree) = load(&place) {
        return Ok(Checkout { commit: target.commit, tree: Arc::new(tree) });
    }
    let repo = dir.join("repo");
    let wanted = Wanted { target: &target, subdir: &subdir, keep_git_dir, submodules: request.submodules };
    let fresh = !repo.exists();
    let made = match git.make(store, &repo, &wanted, &place) {
        // What an earlier process left may be damaged; a new repository is not.
        Err(GitError::Failed { doing: "fetch" | "check out", message, .. }) if !fresh && !is_hopeless(&message) => {
            let doomed = store.tmp_path()?;
            fs::rename(&repo, &doomed).map_err(|source| GitError::Io { path: repo.clone(), source })?;
            let _ = remove_tree(&doomed);
            git.make(store, &repo, &wanted, &place)?
        }
        made => made?,
    };
    Ok(Checkout { commit: target.commit, tree: Arc::new(made) })
}

/// `scheme://host/` with and without credentials, if the address has any.
fn bases(url: &str) -> Option<(String, String)> {
    let (scheme, rest) = url.split_once("://")?;
    let authority = rest.split('/').next()?;
    let (_, host) = authority.rsplit_once('@')?;
    Some((format!("{scheme}://{authority}/"), format!("{scheme}://{host}/")))
}

fn clean_subdir(subdir: &str) -> String {
    let parts: Vec<&str> = subdir.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    parts.join("/")
}

fn is_commit(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// A name that git accepts, and no option or pattern.
fn is_reference(text: &str) -> bool {
    let bad = |byte: u8| byte <= b' ' || byte == 0x7f || b"~^:?*[\\".contains(&byte);
    !text.starts_with(['-', '/']) && !text.contains("..") && !text.contains("@{") && !text.bytes().any(bad)
}

/// The configuration of all git processes of a checkout, those for submodules included, instead of the user's. It may
/// hold credentials and goes away with the value.
struct Config(PathBuf);

impl Config {
    fn write(store: &Store, request: &Request<'_>, url: &str, settings: &Settings) -> Result<Self, GitError> {
        let mut text = String::from(
            "[core]\n hooksPath = /dev/null\n fsmonitor = false\n autocrlf = false\n symlinks = true\n fileMode = true\n \
             attributesFile = /dev/null\n excludesFile = /dev/null\n\
             [gc]\n auto = 0\n[maintenance]\n auto = false\n[init]\n defaultBranch = master\n[advice]\n \
             detachedHead = false\n[protocol]\n version = 2\n[safe]\n directory = *\n[submodule]\n recurse = false\n\
             [http]\n lowSpeedLimit = 1\n lowSpeedTime = 120\n",
        );
        if let Some((with, without)) = bases(request.remote).filter(|_| is_http(url)) {
            text.push_str(&format!("[url {}]\n insteadOf = {}\n", quoted(&with), quoted(&without)));
        }
        if is_http(url)
            && let Some(header) = authorization(url, &settings.secrets.0)
        {
            let header = quoted(&format!("Authorization: {header}"));
            text.push_str(&format!("[http {}]\n extraHeader = {header}\n", quoted(scope(url))));
        }
        let path = store.tmp_path()?;
        let config = Self(path.clone());
        let write = || File::options().write(true).create_new(true).mode(0o600).open(&path)?.write_all(text.as_bytes());
        write().map_err(|source| GitError::Io { path: path.clone(), source })?;
        Ok(config)
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn is_http(url: &str) -> bool {
    url.split_once("://").is_some_and(|(scheme, _)| scheme.to_ascii_lowercase().starts_with("http"))
}

/// A string for git's configuration.
fn quoted(text: &str) -> String {
    let text: String = text.chars().filter(|character| !character.is_control()).collect();
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Where an authorization counts: this repository. GitHub's tokens are for all of its repositories, submodules too.
fn scope(url: &str) -> &str {
    ["https://github.com/", "https://www.github.com/"].into_iter().find(|base| url.starts_with(base)).unwrap_or(url)
}

/// Value of the header that the secrets ask for.
fn authorization(url: &str, secrets: &BTreeMap<String, Vec<u8>>) -> Option<String> {
    let host = url.split_once("://")?.1.split('/').next()?;
    let names = [format!(".{host}"), String::new()];
    for suffix in names {
        let secret = |name: &str| {
            let value = secrets.get(&format!("{name}{suffix}"))?;
            Some(String::from_utf8_lossy(value).trim().to_owned())
        };
        if let Some(header) = secret("GIT_AUTH_HEADER") {
            return Some(header);
        }
        if let Some(token) = secret("GIT_AUTH_TOKEN") {
            return Some(format!("basic {}", encode_base64(format!("x-access-token:{token}").as_bytes())));
        }
    }
    None
}

/// What to make of a repository.
struct Wanted<'a> {
    target: &'a Target,
    subdir: &'a str,
    keep_git_dir: bool,
    submodules: bool,
}

struct Git<'a> {
    url: &'a str,
    settings: &'a Settings,
    config: &'a Path,
    stop: &'a dyn Fn() -> bool,
    news: &'a mut dyn FnMut(&str),
}

/// git ended with another code than 0.
struct Complaint(String);

/// A call of git.
#[derive(Default)]
struct Call<'a> {
    git_dir: Option<&'a Path>,
    work_tree: Option<&'a Path>,
    index: Option<&'a Path>,
    current_dir: Option<&'a Path>,
    /// Transports; none without.
    protocols: &'a str,
}

impl Git<'_> {
    fn failed(&self, doing: &'static str) -> impl FnOnce(Complaint) -> GitError + use<> {
        let url = self.url.to_owned();
        move |complaint| GitError::Failed { doing, url, message: complaint.0 }
    }

    /// Runs git and returns what it wrote to standard output.
    fn run(&mut self, call: &Call<'_>, args: &[&OsStr]) -> Result<Result<String, Complaint>, GitError> {
        let program = match self.settings.program.as_os_str().is_empty() {
            true => Path::new("git"),
            false => &self.settings.program,
        };
        let mut command = Command::new(program);
        command.env_clear().envs(self.settings.env.iter().map(|(name, value)| (name, value)));
        for (name, value) in [
            ("GIT_TERMINAL_PROMPT", "0"),
            ("GIT_CONFIG_NOSYSTEM", "1"),
            ("GIT_ATTR_NOSYSTEM", "1"),
            ("GIT_LFS_SKIP_SMUDGE", "1"),
            ("LC_ALL", "C"),
            ("GIT_ALLOW_PROTOCOL", call.protocols),
        ] {
            command.env(name, value);
        }
        command.env("GIT_CONFIG_GLOBAL", self.config);
        let own_ssh = |(name, _): &(OsString, OsString)| name == "GIT_SSH_COMMAND" || name == "GIT_SSH";
        if !self.settings.env.iter().any(own_ssh) && !self.settings.ssh_command.is_empty() {
            command.env("GIT_SSH_COMMAND", &self.settings.ssh_command);
        }
        if let Some(socket) = &self.settings.ssh_agent {
            command.env("SSH_AUTH_SOCK", socket);
        }
        for (name, path) in
            [("GIT_DIR", call.git_dir), ("GIT_WORK_TREE", call.work_tree), ("GIT_INDEX_FILE", call.index)]
        {
            if let Some(path) = path {
                command.env(name, path);
            }
        }
        // A directory of ours in any case: git must not look for a repository where the user happens to be.
        let current_dir = call.current_dir.or(call.git_dir).unwrap_or(Path::new("/"));
        command.args(args).current_dir(current_dir).process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let run_error = |url: &str| {
            let url = url.to_owned();
            move |source| GitError::Run { url, source }
        };
        let mut child = match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(GitError::Missing { url: self.url.to_owned(), program: program.to_owned() });
            }
            spawned => spawned.map_err(run_error(self.url))?,
        };
        let (out, err) = (child.stdout.take(), child.stderr.take());
        let (lines, inbox) = mpsc::channel::<String>();
        let answer = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut out) = out {
                let _ = out.by_ref().take(OUTPUT_LIMIT_BYTES).read_to_end(&mut bytes);
                // Whoever says more must not wait for ever.
                let _ = io::copy(&mut out, &mut io::sink());
            }
            String::from_utf8_lossy(&bytes).into_owned()
        });
        std::thread::spawn(move || {
            let Some(err) = err else { return };
            let mut reader = BufReader::new(err);
            let mut line = Vec::new();
            // A line without end is handed over in pieces.
            while matches!(reader.by_ref().take(4096).read_until(b'\n', &mut line), Ok(1..)) {
                if lines.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                    return;
                }
                line.clear();
            }
        });
        let mut said: Vec<String> = Vec::new();
        let mut interrupted: Option<Instant> = None;
        let mut ended: Option<Instant> = None;
        loop {
            match inbox.recv_timeout(Duration::from_millis(20)) {
                Ok(line) if !line.is_empty() => {
                    (self.news)(&line);
                    said.push(line);
                    if said.len() > 100 {
                        said.remove(0);
                    }
                }
                Ok(_) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    // What it leaves behind, a shared ssh connection say, may hold the other end for long; what it said
                    // itself is read soon.
                    if matches!(child.try_wait(), Ok(Some(_)))
                        && ended.get_or_insert_with(Instant::now).elapsed() > LAST_WORDS
                    {
                        break;
                    }
                }
            }
            if (self.stop)() {
                // Told nicely it removes its lock files.
                let since = *interrupted.get_or_insert_with(Instant::now);
                let signal = if since.elapsed() < Duration::from_secs(2) { Signal::TERM } else { Signal::KILL };
                let _ = kill_process_group(Pid::from_child(&child), signal);
            }
        }
        let status = child.wait().map_err(run_error(self.url))?;
        let answer = answer.join().unwrap_or_default();
        if interrupted.is_some() {
            return Err(GitError::Interrupted);
        }
        Ok(if status.success() { Ok(answer) } else { Err(Complaint(complaint(&said, status.code()))) })
    }

    /// Finds out which commit the name stands for.
    fn resolve(&mut self, request: &Request<'_>) -> Result<Target, GitError> {
        let reference = request.reference;
        if is_commit(reference) {
            return Ok(Target { commit: reference.to_owned(), object: reference.to_owned(), name: None });
        }
        if !is_reference(reference) {
            return Err(GitError::BadReference { reference: reference.to_owned(), url: self.url.to_owned() });
        }
        let name = if reference.is_empty() { "HEAD" } else { reference };
        let peeled = format!("{name}^{{}}");
        let url = self.url.to_owned();
        let call = Call { protocols: PROTOCOLS, ..Call::default() };
        let args = ["ls-remote", "--symref", "--", &url, name, &peeled].map(OsStr::new);
        let answer = self.run(&call, &args)?.map_err(self.failed("reach"))?;
        find(&answer, name).ok_or_else(|| GitError::NoReference { url, reference: name.to_owned() })
    }

    fn check(&self, target: &Target, expected: &str) -> Result<(), GitError> {
        let url = self.url.to_owned();
        let hex = |byte: u8| byte.is_ascii_hexdigit();
        if expected.is_empty() || expected.len() > 64 || !expected.bytes().all(hex) {
            return Err(GitError::BadChecksum { checksum: expected.to_owned(), url });
        }
        let prefix = expected.to_ascii_lowercase();
        if target.commit.starts_with(&prefix) || target.object.starts_with(&prefix) {
            return Ok(());
        }
        Err(GitError::Checksum { url, expected: expected.to_owned(), found: target.commit.clone() })
    }

    /// Waits for other processes that fetch from this repository.
    fn lock(&self, path: &Path) -> Result<File, GitError> {
        let file = open_lock(path)?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(fs::TryLockError::WouldBlock) if (self.stop)() => return Err(GitError::Interrupted),
                Err(fs::TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(50)),
                Err(fs::TryLockError::Error(source)) => return Err(GitError::Io { path: path.to_owned(), source }),
            }
        }
    }

    /// Fetches what is missing and checks it out to `place`.
    fn make(&mut self, store: &Store, repo: &Path, wanted: &Wanted<'_>, place: &Path) -> Result<Tree, GitError> {
        self.init(store, repo, wanted.target)?;
        self.fetch(repo, wanted.target)?;
        let staging = store.begin_tree()?;
        let made = self.check_out(repo, wanted, &staging).and_then(|top| keep(wanted, self.url, &staging, &top, place));
        let _ = remove_tree(&staging);
        made
    }

    /// Makes the bare repository unless it is there.
    fn init(&mut self, store: &Store, repo: &Path, target: &Target) -> Result<(), GitError> {
        let io_error = |path: &Path| {
            let path = path.to_owned();
            move |source| GitError::Io { path, source }
        };
        if repo.join("HEAD").exists() {
            // Nobody else works here, so these are from a process that was killed.
            for name in ["shallow.lock", "packed-refs.lock", "config.lock", "HEAD.lock"] {
                match fs::remove_file(repo.join(name)) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(io_error(&repo.join(name))(error));
                    }
                    _ => {}
                }
            }
            return Ok(());
        }
        let made = store.begin_tree()?;
        self.new_repository(&made, target, true)?;
        fs::rename(&made, repo).map_err(io_error(repo))
    }

    fn new_repository(&mut self, dir: &Path, target: &Target, bare: bool) -> Result<(), GitError> {
        let format = if target.object.len() == 64 { "--object-format=sha256" } else { "--object-format=sha1" };
        let mut args = vec!["init", "--quiet", "--template=", format];
        if bare {
            args.push("--bare");
        }
        let mut args: Vec<&OsStr> = args.into_iter().map(OsStr::new).collect();
        args.extend([OsStr::new("--"), dir.as_os_str()]);
        self.run(&Call::default(), &args)?.map_err(self.failed("check out"))?;
        Ok(())
    }

    fn has(&mut self, repo: &Path, target: &Target) -> Result<bool, GitError> {
        let call = Call { git_dir: Some(repo), ..Call::default() };
        for object in [&target.object, &target.commit] {
            let what = format!("{object}^{{commit}}");
            // Not only the commit: an interrupted fetch leaves nothing behind that a name points to.
            if self.quietly(&call, &["cat-file", "-e", &what].map(OsStr::new))?.is_err() {
                return Ok(false);
            }
        }
        let name = local_name(&target.object);
        Ok(self.quietly(&call, &["rev-parse", "--verify", "--quiet", &name].map(OsStr::new))?.is_ok())
    }

    /// Runs git when its complaint is an answer and no news.
    fn quietly(&mut self, call: &Call<'_>, args: &[&OsStr]) -> Result<Result<String, Complaint>, GitError> {
        let mut quiet = |_: &str| {};
        let (url, settings, config, stop) = (self.url, self.settings, self.config, self.stop);
        Git { url, settings, config, stop, news: &mut quiet }.run(call, args)
    }

    /// Brings the commit into the repository: alone when the server allows, else with all that there is.
    fn fetch(&mut self, repo: &Path, target: &Target) -> Result<(), GitError> {
        if self.has(repo, target)? {
            return Ok(());
        }
        let url = self.url.to_owned();
        let local = local_name(&target.object);
        let call = Call { git_dir: Some(repo), protocols: PROTOCOLS, ..Call::default() };
        let common = ["fetch", "--no-tags", "--no-write-fetch-head", "--force", "--no-recurse-submodules"];
        let exact = format!("+{}:{local}", target.object);
        let named = target.name.as_ref().map(|name| format!("+{name}:{local}"));
        let all = ["+refs/heads/*:refs/all/heads/*", "+refs/tags/*:refs/all/tags/*"];
        let tries = [Some(vec![exact.as_str()]), named.as_deref().map(|named| vec![named]), Some(all.to_vec())];
        let mut last = None;
        for refspecs in tries.into_iter().flatten() {
            let depth = match (refspecs.len(), repo.join("shallow").exists()) {
                (1, _) => Some("--depth=1"),
                (_, true) => Some("--unshallow"),
                (_, false) => None,
            };
            let words = common.into_iter().chain(depth).chain(["--", &url]).chain(refspecs);
            let args: Vec<&OsStr> = words.map(OsStr::new).collect();
            match self.quietly(&call, &args)? {
                Ok(_) => {
                    // A full fetch gave the commit no name of its own yet; one by name may have brought a newer commit.
                    let args = ["update-ref", "--", &local, &target.object].map(OsStr::new);
                    let named = self.quietly(&call, &args)?.is_ok();
                    if named && self.has(repo, target)? {
                        return Ok(());
                    }
                }
                Err(complaint) => {
                    let hopeless = is_hopeless(&complaint.0);
                    last = Some(complaint);
                    if hopeless {
                        break;
                    }
                }
            }
        }
        match last {
            // The server answered to the end and does not have it.
            Some(complaint) if !is_unknown_object(&complaint.0) => Err(self.failed("fetch")(complaint)),
            _ => Err(GitError::NoReference { url, reference: target.object.clone() }),
        }
    }

    /// Checks out into `staging`; returns the top directory.
    fn check_out(&mut self, repo: &Path, wanted: &Wanted<'_>, staging: &Path) -> Result<PathBuf, GitError> {
        let top = staging.join("tree");
        fs::create_dir(&top).map_err(|source| GitError::Io { path: top.clone(), source })?;
        let commit = wanted.target.commit.as_str();
        let bare = Call { git_dir: Some(repo), ..Call::default() };
        let modules = format!("{commit}:.gitmodules");
        let submodules =
            wanted.submodules && self.quietly(&bare, &["cat-file", "-e", &modules].map(OsStr::new))?.is_ok();
        if !wanted.keep_git_dir && !submodules {
            let index = staging.join("index");
            let call = Call { work_tree: Some(&top), index: Some(&index), current_dir: Some(&top), ..bare };
            let args = ["-c", "core.bare=false", "read-tree", "--reset", "-u", commit].map(OsStr::new);
            self.run(&call, &args)?.map_err(self.failed("check out"))?;
            return Ok(top);
        }
        self.new_repository(&top, wanted.target, false)?;
        let git_dir = top.join(".git");
        let call = Call { git_dir: Some(&git_dir), work_tree: Some(&top), current_dir: Some(&top), ..Call::default() };
        let object = wanted.target.object.as_str();
        let refspec = match &wanted.target.name {
            Some(name) => format!("+{}:{name}", local_name(object)),
            None => local_name(object),
        };
        let mut args: Vec<&OsStr> =
            ["fetch", "--quiet", "--no-tags", "--depth=1", "--update-head-ok", "--no-recurse-submodules", "--"]
                .map(OsStr::new)
                .to_vec();
        args.extend([repo.as_os_str(), OsStr::new(&refspec)]);
        let local = Call { protocols: "file", ..call };
        self.run(&local, &args)?.map_err(self.failed("check out"))?;
        let url = self.url.to_owned();
        let steps: [&[&str]; 3] = [
            &["checkout", "--quiet", "--detach", commit],
            &["remote", "add", "--", "origin", &url],
            &["reflog", "expire", "--all", "--expire=now"],
        ];
        let call = Call { git_dir: Some(&git_dir), work_tree: Some(&top), current_dir: Some(&top), ..Call::default() };
        for step in steps {
            let args: Vec<&OsStr> = step.iter().map(OsStr::new).collect();
            self.run(&call, &args)?.map_err(self.failed("check out"))?;
        }
        let _ = fs::remove_file(git_dir.join("FETCH_HEAD"));
        if submodules {
            let call = Call { current_dir: Some(&top), protocols: PROTOCOLS, ..Call::default() };
            let update = ["submodule", "--quiet", "update", "--init", "--recursive", "--force"];
            let shallow: Vec<&OsStr> = update.into_iter().chain(["--depth=1"]).map(OsStr::new).collect();
            // Not every server gives a single commit.
            if self.quietly(&call, &shallow)?.is_err() {
                let args = update.map(OsStr::new);
                self.run(&call, &args)?.map_err(self.failed("fetch submodules of"))?;
            }
        }
        Ok(top)
    }
}

/// Name that an object has in our own repository.
fn local_name(object: &str) -> String {
    format!("refs/nacre/{object}")
}

/// What the server's answer says of a name: a branch before a tag, as git-checkout has it.
fn find(answer: &str, name: &str) -> Option<Target> {
    let lines: Vec<(&str, &str)> = answer.lines().filter_map(|line| line.split_once('\t')).collect();
    let object = |full: &str| {
        lines.iter().find(|(object, other)| *other == full && is_commit(object)).map(|(object, _)| (*object).to_owned())
    };
    if name == "HEAD" {
        let object = object("HEAD")?;
        let branch = lines.iter().find_map(|(what, other)| what.strip_prefix("ref: ").filter(|_| *other == "HEAD"));
        let name = Some(branch.unwrap_or("HEAD").to_owned());
        return Some(Target { commit: object.clone(), object, name });
    }
    let names = match name.strip_prefix("refs/") {
        Some(_) => vec![name.to_owned()],
        None => ["refs/heads/", "refs/tags/", "refs/"].map(|prefix| format!("{prefix}{name}")).to_vec(),
    };
    names.into_iter().find_map(|name| {
        let found = object(&name)?;
        let commit = object(&format!("{name}^{{}}")).unwrap_or_else(|| found.clone());
        Some(Target { commit, object: found, name: Some(name) })
    })
}

/// The end of what git said, in one line, without what it always says.
fn complaint(said: &[String], code: Option<i32>) -> String {
    let telling: Vec<&str> = said
        .iter()
        .map(|line| line.trim())
        .filter(|line| !line.is_empty() && !line.starts_with("hint:") && !line.starts_with("From "))
        .collect();
    let last = &telling[telling.len().saturating_sub(COMPLAINT_LINES)..];
    match (last.is_empty(), code) {
        (false, _) => last.join("; "),
        (true, Some(code)) => format!("git ended with exit code {code}"),
        (true, None) => "git was killed".to_owned(),
    }
}

/// Would every other way to fetch fail, too?
fn is_hopeless(complaint: &str) -> bool {
    [
        "Could not resolve",
        "Failed to connect",
        "Connection refused",
        "Connection timed out",
        "unable to connect",
        "Authentication failed",
        "could not read Username",
        "Permission denied",
        "Host key verification failed",
        "No space left",
    ]
    .iter()
    .any(|words| complaint.contains(words))
}

/// Does the server not have the object?
fn is_unknown_object(complaint: &str) -> bool {
    ["not our ref", "couldn't find remote ref", "no such remote ref", "unadvertised object"]
        .iter()
        .any(|words| complaint.contains(words))
}

/// Reads a checkout made earlier, and notes that it is in use.
fn load(place: &Path) -> Option<Tree> {
    let bytes = fs::read(place.join("index")).ok()?;
    let tree = index::decode(&bytes).ok()?;
    let _ = File::open(place).and_then(|dir| dir.set_modified(SystemTime::now()));
    Some(with_origins(&tree, &place.join("tree")))
}

fn with_origins(tree: &Tree, top: &Path) -> Tree {
    let directory: Arc<Path> = Arc::from(top);
    tree.map(|Node { entry, origin }| {
        if entry.is_file() {
            *origin = Origin::File(OnDisk { directory: directory.clone(), path: entry.path.clone(), inode: None });
        }
        true
    })
}

/// Looks at what was checked out, and moves the part that is wanted to its place.
fn keep(wanted: &Wanted<'_>, url: &str, staging: &Path, top: &Path, place: &Path) -> Result<Tree, GitError> {
    let found = scan::scan(top, &ScanOptions { detail: Detail::Context, filter: &Everything })?;
    let mut tree = found.map(|Node { entry, origin }| {
        *origin = Origin::None;
        if let Kind::File { link_group, .. } = &mut entry.kind {
            *link_group = 0;
        }
        // What git tracks, whatever the process's umask was.
        entry.mode = match entry.kind {
            Kind::Dir { .. } => 0o755,
            Kind::Symlink { .. } => 0o777,
            _ if entry.mode & 0o100 != 0 => 0o755,
            _ if entry.mode & 0o200 == 0 => 0o444,
            _ => 0o644,
        };
        // Without `.git`, the files that say where a submodule's is lead nowhere. git never tracks that name.
        wanted.keep_git_dir || !is_git_dir(entry)
    });
    let no_subdir = || GitError::NoSubdir {
        url: url.to_owned(),
        subdir: wanted.subdir.to_owned(),
        commit: wanted.target.commit.clone(),
    };
    let path = match tree.resolve(wanted.subdir.as_bytes(), true) {
        Resolved::Found(path) if tree.get(&path).is_some_and(|node| node.entry.is_dir()) => path,
        _ => return Err(no_subdir()),
    };
    if !path.is_empty() {
        let below = tree.subtree(&path).map(|mut node| {
            debug_assert!(is_within(&node.entry.path, &path));
            node.entry.path.drain(..(path.len() + 1).min(node.entry.path.len()));
            node
        });
        tree = below.collect();
    }
    let finished = staging.join("finished");
    let io_error = |path: &Path| {
        let path = path.to_owned();
        move |source| GitError::Io { path, source }
    };
    fs::create_dir(&finished).map_err(io_error(&finished))?;
    let part = top.join(OsStr::from_bytes(&path));
    fs::rename(&part, finished.join("tree")).map_err(io_error(&part))?;
    let mut tree = with_origins(&tree, &finished.join("tree"));
    digest_uncached(&mut tree)?;
    fs::write(finished.join("index"), index::encode(&tree)).map_err(io_error(&finished))?;
    if place.exists() {
        // Its index could not be read.
        remove_tree(place).map_err(|error| io_error(place)(io::Error::other(error)))?;
    }
    fs::rename(&finished, place).map_err(io_error(place))?;
    Ok(with_origins(&tree, &place.join("tree")))
}

fn is_git_dir(entry: &Entry) -> bool {
    entry.path.split(|&byte| byte == b'/').any(|part| part == b".git")
}
