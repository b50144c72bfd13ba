//! Runs nacre and other programs, and says what they printed when they did not do as expected.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// `nacre build` on a store.
pub(crate) struct Nacre(Command);

/// What a build printed.
pub(crate) struct Printed {
    /// Standard error: the progress.
    pub(crate) progress: String,
}

/// Begins a build on a store.
pub(crate) fn nacre(store: &Path) -> Nacre {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nacre"));
    command.args(["build", "--progress", "plain", "--store"]).arg(store);
    Nacre(command)
}

impl Nacre {
    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.0.arg(arg);
        self
    }

    pub(crate) fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.0.args(args);
        self
    }

    /// Builds; the test fails when the build does.
    pub(crate) fn succeeds(mut self) -> Printed {
        let output = self.0.output().expect("nacre can be started");
        let progress = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{:?} ended with {}:\n{progress}", self.0, output.status);
        Printed { progress }
    }
}

impl Printed {
    /// Asserts that a step (part of its name) came from the cache.
    pub(crate) fn cached(&self, step: &str) -> &Self {
        assert_eq!(self.state(step), "CACHED", "{step} should be cached:\n{}", self.progress);
        self
    }

    /// Asserts that a step ran.
    pub(crate) fn ran(&self, step: &str) -> &Self {
        assert_eq!(self.state(step), "DONE", "{step} should have run:\n{}", self.progress);
        self
    }

    /// Asserts that no step ran.
    pub(crate) fn all_cached(&self) -> &Self {
        let ran: Vec<&str> = self.progress.lines().filter(|line| line.contains("runs because:")).collect();
        assert!(ran.is_empty(), "nothing should have run: {ran:?}\n{}", self.progress);
        self
    }

    fn state(&self, step: &str) -> &'static str {
        let head = self.progress.lines().find(|line| line.starts_with('#') && line.contains(step));
        let number = head.and_then(|line| line.split(' ').next());
        let number = number.unwrap_or_else(|| panic!("no step `{step}` in:\n{}", self.progress));
        for line in self.progress.lines().filter(|line| line.split(' ').next() == Some(number)) {
            if line.ends_with("CACHED") {
                return "CACHED";
            }
            if line.contains(" DONE ") {
                return "DONE";
            }
        }
        "unknown"
    }
}

/// Runs a program to its end and returns what it printed on standard output.
pub(crate) fn run(command: &mut Command) -> String {
    let Output { status, stdout, stderr } =
        command.output().unwrap_or_else(|error| panic!("{command:?} cannot be started: {error}"));
    let stdout = String::from_utf8_lossy(&stdout).into_owned();
    assert!(status.success(), "{command:?} ended with {status}:\n{stdout}\n{}", String::from_utf8_lossy(&stderr));
    stdout
}

/// Runs a program given as words.
pub(crate) fn sh(words: &[&str]) -> String {
    run(Command::new(words[0]).args(&words[1..]))
}

/// Are we root?
pub(crate) fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0)
}

/// A directory for one test, on a real file system, removed at the end (also what mapped users own).
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    pub(crate) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("nacre-real-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory of our own");
        Self(path)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a file below, with its directories.
    pub(crate) fn file(&self, name: &str, content: &str) -> &Self {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().expect("names are below the directory")).expect("a directory of our own");
        std::fs::write(&path, content).expect("a file of our own");
        self
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if is_root() {
            let _ = Command::new("rm").arg("-rf").arg(&self.0).status();
        } else {
            // Files of mapped users can only be removed by their namespace's root.
            let _ = Command::new("podman").args(["unshare", "rm", "-rf"]).arg(&self.0).output();
            let _ = Command::new("rm").arg("-rf").arg(&self.0).output();
        }
    }
}

/// Unpacks an OCI layout with umoci; returns the bundle.
pub(crate) fn unpack(layout: &Path, tag: &str, bundle: &Path) -> PathBuf {
    let image = format!("{}:{tag}", layout.display());
    let mut command = Command::new("umoci");
    command.arg("unpack");
    if !is_root() {
        command.arg("--rootless");
    }
    run(command.args(["--image", &image]).arg(bundle));
    bundle.join("rootfs")
}
