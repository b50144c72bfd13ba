//! What the stories are told with.

use crate::bases;
use crate::image::{self, Bases, Record};
use crate::process;
use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// A context, a store, and the flags of builds with them.
pub(crate) struct Build {
    dir: tempfile::TempDir,
    flags: Vec<OsString>,
    env: Vec<(String, String)>,
    stdin: Option<Vec<u8>>,
    context: OsString,
}

/// How a run of the program ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Build {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let context = dir.path().join("context");
        fs::create_dir(&context).expect("a directory of our own");
        Self { dir, flags: Vec::new(), env: Vec::new(), stdin: None, context: context.into() }
    }

    /// Writes the Dockerfile.
    pub(crate) fn dockerfile(self, text: &str) -> Self {
        self.file("Dockerfile", text)
    }

    /// Writes a file of the context.
    pub(crate) fn file(self, name: &str, content: &str) -> Self {
        self.write(name, content);
        self
    }

    /// Writes a file of the context between builds.
    pub(crate) fn write(&self, name: &str, content: &str) {
        let path = self.path("context").join(name);
        fs::create_dir_all(path.parent().expect("a name is below the context")).expect("a directory of our own");
        fs::write(path, content).expect("a file of our own");
    }

    /// Adds a flag, with its value behind `=` where it has one.
    pub(crate) fn flag(mut self, flag: impl Into<OsString>) -> Self {
        self.flags.push(flag.into());
        self
    }

    /// Sets a variable of the program's environment.
    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// What the program reads from standard input.
    pub(crate) fn stdin(mut self, content: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(content.into());
        self
    }

    /// Another context than the directory.
    pub(crate) fn context(mut self, context: &str) -> Self {
        self.context = context.into();
        self
    }

    /// A path beside the context.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.path("store")
    }

    /// The command of a build, with `busybox` as a named context.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nacre"));
        command.arg("build").arg("--store").arg(self.store()).arg("--progress=plain");
        command.arg(format!("--build-context=busybox=oci-layout://{}:latest", busybox_base().display()));
        command.args(&self.flags).arg(&self.context).envs(self.env.iter().cloned());
        const PROXIES: [&str; 8] = [
            "http_proxy",
            "HTTP_PROXY",
            "https_proxy",
            "HTTPS_PROXY",
            "all_proxy",
            "ALL_PROXY",
            "no_proxy",
            "NO_PROXY",
        ];
        for name in ["NACRE_STORE", "SOURCE_DATE_EPOCH", "BUILDKIT_PROGRESS"].iter().chain(&PROXIES) {
            if !self.env.iter().any(|(other, _)| other == *name) {
                command.env_remove(name);
            }
        }
        command
    }

    /// Runs it, however it ends.
    pub(crate) fn ends(&self) -> Ended {
        run(self.command(), self.stdin.as_deref())
    }

    /// Runs it; it must succeed.
    #[track_caller]
    pub(crate) fn runs(&self) -> Ended {
        let ended = self.ends();
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        ended
    }

    /// Builds into an OCI archive and reads it.
    #[track_caller]
    pub(crate) fn image(&self) -> Image {
        let out = self.path("image.tar");
        let mut command = self.command();
        command.arg(format!("--output=type=oci,dest={}", out.display()));
        let ended = run(command, self.stdin.as_deref());
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let record = image::read_image(&out, &Bases::default(), true).expect("an image");
        assert_eq!(record.problems, Vec::<String>::new());
        Image { record, stderr: ended.stderr }
    }

    /// Runs it; it must fail with this code, and its last error must name all these words.
    #[track_caller]
    pub(crate) fn fails_with(&self, code: i32, words: &[&str]) -> Ended {
        let ended = self.ends();
        let error = last_error(&ended.stderr);
        for word in words {
            assert!(error.contains(word), "`{word}` is not in:\n{}", ended.stderr);
        }
        assert_eq!(ended.code, Some(code), "{}", ended.stderr);
        ended
    }
}

impl Drop for Build {
    fn drop(&mut self) {
        // A store may hold files of subordinate users, which the temporary directory cannot remove by itself.
        process::remove_tree(&self.store());
    }
}

impl Ended {
    pub(crate) fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Steps that ran, by the text behind their number: those with a `DONE` line.
    pub(crate) fn ran(&self) -> Vec<String> {
        with_state(&self.stderr, "DONE")
    }
}

fn with_state(stderr: &str, state: &str) -> Vec<String> {
    let number = |line: &str| line.split(' ').next().unwrap_or_default().to_owned();
    let ended: Vec<String> = stderr
        .lines()
        .filter(|line| line.starts_with('#') && line.split(' ').nth(1) == Some(state))
        .map(number)
        .collect();
    // A step's first line is its name.
    ended
        .iter()
        .filter_map(|id| stderr.lines().find(|line| number(line) == *id))
        .filter_map(|line| line.split_once(' '))
        .map(|(_, name)| name.to_owned())
        .collect()
}

/// The text from the last line that starts with `error` on.
pub(crate) fn last_error(stderr: &str) -> &str {
    let start = match stderr.rfind("\nerror") {
        Some(at) => at + 1,
        None => 0,
    };
    &stderr[start..]
}

/// Everything in a store is what its name says, and nothing half-done is left.
#[track_caller]
pub(crate) fn assert_store_is_whole(store: &Path) {
    use sha2::{Digest, Sha256};
    let files = |name: &str| -> Vec<PathBuf> {
        let entries = fs::read_dir(store.join(name)).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).filter(|path| path.is_file()).collect()
    };
    for path in files("blobs/sha256") {
        let found: String =
            Sha256::digest(fs::read(&path).expect("a blob")).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(Some(found.as_str()), path.file_name().and_then(|name| name.to_str()), "a blob is damaged");
    }
    for path in files("records").into_iter().chain([store.join("index.json")]).filter(|path| path.exists()) {
        let bytes = fs::read(&path).expect("a record");
        assert!(serde_json::from_slice::<serde_json::Value>(&bytes).is_ok(), "{} is damaged", path.display());
    }
}

/// An image that was built.
pub(crate) struct Image {
    pub(crate) record: Record,
    pub(crate) stderr: String,
}

impl Image {
    /// A short text file's content.
    #[track_caller]
    pub(crate) fn file(&self, path: &str) -> &str {
        let entry = self.record.fs.get(path).unwrap_or_else(|| panic!("no {path} in {:?}", self.record.fs.keys()));
        entry.get("data").and_then(|data| data.as_str()).unwrap_or_else(|| panic!("{path} is {entry:?}"))
    }

    pub(crate) fn has(&self, path: &str) -> bool {
        self.record.fs.contains_key(path)
    }

    /// Steps that ran.
    pub(crate) fn ran(&self) -> Vec<String> {
        with_state(&self.stderr, "DONE")
    }
}

/// Runs a command with something on its standard input.
pub(crate) fn run(mut command: Command, stdin: Option<&[u8]>) -> Ended {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.stdin(if stdin.is_some() { Stdio::piped() } else { Stdio::null() });
    let mut child = command.spawn().expect("the program starts");
    let input = child.stdin.take().zip(stdin.map(<[u8]>::to_vec));
    // A program that ends early does not read all of it.
    let writer = input.map(|(mut pipe, content)| std::thread::spawn(move || drop(pipe.write_all(&content))));
    let output = child.wait_with_output().expect("the program ends");
    if let Some(writer) = writer {
        writer.join().expect("writing does not panic");
    }
    Ended {
        code: output.status.code(),
        stdout: output.stdout,
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// The layout of the base image `busybox`, made once.
pub(crate) fn busybox_base() -> &'static Path {
    static BASE: OnceLock<PathBuf> = OnceLock::new();
    BASE.get_or_init(|| {
        let busybox = bases::busybox().expect("busybox is in PATH; make test installs it");
        let dir = tempfile::Builder::new().prefix("nacre-it-").tempdir().expect("a temporary directory").keep();
        bases::make_bases(&dir, &busybox).expect("base images can be written");
        dir.join("busybox")
    })
}
