//! Git repositories, and a web server for them and for plain files on loopback: git's own `http-backend` behind the few
//! lines of HTTP that it needs.
//!
//! `/NAME.git/…` is a repository below the served directory; `/private/…` asks for a user `reader` with password
//! `hunter2`, or for the header that GitHub's tokens come in; `/file` is `DIR/file`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// `reader:hunter2`, and `x-access-token:hunter2`.
const PASSES: [&str; 2] = ["cmVhZGVyOmh1bnRlcjI=", "eC1hY2Nlc3MtdG9rZW46aHVudGVyMg=="];

/// Runs git in a directory, without the configuration of whoever runs the tests.
#[track_caller]
pub(crate) fn git(dir: &Path, args: &[&str]) -> String {
    let mut command = Command::new("git");
    command.args(args).current_dir(dir).env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1");
    for who in ["AUTHOR", "COMMITTER"] {
        command.env(format!("GIT_{who}_NAME"), "somebody").env(format!("GIT_{who}_EMAIL"), "somebody@example.com");
    }
    command.env("GIT_ALLOW_PROTOCOL", "file");
    let output = command.output().expect("git is in PATH");
    assert!(output.status.success(), "git {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Makes a repository `NAME.git` in `dir` with a work tree `NAME` beside it, on branch `main`.
pub(crate) fn repository(dir: &Path, name: &str, files: &[(&str, &str)]) {
    let work = dir.join(name);
    std::fs::create_dir_all(&work).expect("a directory of our own");
    git(&work, &["init", "--quiet", "--initial-branch=main"]);
    git(dir, &["init", "--quiet", "--bare", "--initial-branch=main", &format!("{name}.git")]);
    let bare = dir.join(format!("{name}.git"));
    git(&work, &["remote", "add", "origin", &bare.display().to_string()]);
    commit(&work, files);
}

/// Writes files, commits, and pushes everything. Returns the commit.
pub(crate) fn commit(work: &Path, files: &[(&str, &str)]) -> String {
    for (name, content) in files {
        let path = work.join(name);
        std::fs::create_dir_all(path.parent().expect("below the repository")).expect("a directory of our own");
        std::fs::write(path, content).expect("a file of our own");
    }
    git(work, &["add", "--all"]);
    git(work, &["commit", "--quiet", "--message=change"]);
    publish(work);
    git(work, &["rev-parse", "HEAD"])
}

/// Pushes branches and tags.
pub(crate) fn publish(work: &Path) {
    git(work, &["push", "--quiet", "--force", "--all", "origin"]);
    git(work, &["push", "--quiet", "--force", "--tags", "origin"]);
}

/// Serves until the process ends; returns `127.0.0.1:PORT`.
pub(crate) fn serve(dir: &Path) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port on loopback");
    let address = listener.local_addr().expect("an address").to_string();
    let dir = dir.to_owned();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let dir = dir.clone();
            std::thread::spawn(move || drop(answer(stream, &dir)));
        }
    });
    address
}

fn answer(mut stream: TcpStream, dir: &Path) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = line.trim_end().split_once(": ") {
            headers.push((name.to_ascii_lowercase(), value.to_owned()));
        }
    }
    let header = |wanted: &str| headers.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.as_str());
    let mut words = request.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let length: usize = header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let allowed = header("authorization")
        .and_then(|value| value.split_once(' '))
        .is_some_and(|(kind, pass)| kind.eq_ignore_ascii_case("basic") && PASSES.contains(&pass));
    if path.starts_with("/private/") && !allowed {
        let refusal = "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"private\"\r\n";
        return write!(stream, "{refusal}Content-Length: 0\r\nConnection: close\r\n\r\n");
    }
    if !path.contains(".git/") {
        let file = std::fs::read(dir.join(path.trim_start_matches('/'))).ok().filter(|_| !path.contains(".."));
        let status = if file.is_some() { "200 OK" } else { "404 Not Found" };
        let body = file.unwrap_or_default();
        write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len())?;
        return stream.write_all(&body);
    }
    let mut command = Command::new("git");
    command.arg("http-backend").env("GIT_PROJECT_ROOT", dir).env("GIT_HTTP_EXPORT_ALL", "1");
    // Without it, git distrusts repositories when root serves those of somebody else.
    command.env("GIT_CONFIG_COUNT", "1").env("GIT_CONFIG_KEY_0", "safe.directory").env("GIT_CONFIG_VALUE_0", "*");
    command.env("PATH_INFO", path).env("QUERY_STRING", query).env("REQUEST_METHOD", method);
    command.env("CONTENT_LENGTH", length.to_string()).env("REMOTE_ADDR", "127.0.0.1");
    for (name, variable) in [
        ("content-type", "CONTENT_TYPE"),
        ("content-encoding", "HTTP_CONTENT_ENCODING"),
        ("git-protocol", "GIT_PROTOCOL"),
    ] {
        if let Some(value) = header(name) {
            command.env(variable, value);
        }
    }
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let mut input = child.stdin.take();
    let writer = std::thread::spawn(move || drop(input.as_mut().map(|input| input.write_all(&body))));
    let output = child.wait_with_output()?;
    let _ = writer.join();
    let end = output.stdout.windows(4).position(|four| four == b"\r\n\r\n").unwrap_or(output.stdout.len());
    let head = String::from_utf8_lossy(&output.stdout[..end]).into_owned();
    let body = output.stdout.get(end + 4..).unwrap_or_default();
    let (status, rest): (Vec<&str>, Vec<&str>) = head.lines().partition(|line| line.starts_with("Status: "));
    let status = status.first().map_or("200 OK", |line| &line["Status: ".len()..]);
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\n{}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n",
        rest.join("\r\n")
    )?;
    stream.write_all(body)
}

/// A running `git daemon`.
pub(crate) struct Daemon {
    child: std::process::Child,
    /// `git://127.0.0.1:PORT`.
    pub(crate) url: String,
}

impl Daemon {
    /// Serves the repositories of a directory.
    pub(crate) fn start(dir: &Path) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a free port").port();
        let base = format!("--base-path={}", dir.display());
        let mut command = Command::new("git");
        command.args(["-c", "safe.directory=*", "daemon", "--export-all", &base, "--listen=127.0.0.1"]);
        command.arg(format!("--port={port}")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().expect("git daemon starts");
        for _ in 0..200 {
            if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        Self { child, url: format!("git://127.0.0.1:{port}") }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // `git` hands over to another process of the same number: killing it ends the server.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A directory for repositories.
pub(crate) fn directory() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().to_owned();
    (dir, path)
}
