//! Credential helpers: programs `docker-credential-NAME` that keep passwords in a key ring.
//!
//! A helper is told what to do by its argument and of which server on standard input, and answers in JSON. It gets a limited
//! time: one that waits for a user who is not there would stop a build for ever.

use super::RegistryError;
use super::auth::Credentials;
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// User name that marks the secret as an identity token.
const TOKEN_USER: &str = "<token>";
/// Answers are not read beyond this.
const ANSWER_LIMIT_BYTES: u64 = 1 << 20;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(rename = "ServerURL", default)]
    server_url: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// Asks a helper; `None` when it does not know the host.
pub fn get(program: &str, host: &str, timeout: Duration) -> Result<Option<Credentials>, RegistryError> {
    let (done, output) = run(program, "get", server(host).as_bytes(), timeout)?;
    if !done {
        let text = String::from_utf8_lossy(&output);
        // Every helper that is made with Docker's own library says it in these words.
        let unknown = text.contains("credentials not found") || text.trim().is_empty();
        return if unknown { Ok(None) } else { Err(failed(program, first_line(&text))) };
    }
    let answer: Answer =
        serde_json::from_slice(&output).map_err(|_| failed(program, "its answer is not understood".to_owned()))?;
    let mut credentials = Credentials::default();
    match answer.username.as_str() {
        TOKEN_USER => credentials.identity_token = answer.secret,
        _ => (credentials.user, credentials.password) = (answer.username, answer.secret),
    }
    Ok((credentials != Credentials::default()).then_some(credentials))
}

/// Gives a helper credentials to keep.
pub fn store(program: &str, host: &str, credentials: &Credentials, timeout: Duration) -> Result<(), RegistryError> {
    let (username, secret) = match credentials.identity_token.as_str() {
        "" => (credentials.user.clone(), credentials.password.clone()),
        token => (TOKEN_USER.to_owned(), token.to_owned()),
    };
    let request = Answer { server_url: server(host), username, secret };
    let bytes = serde_json::to_vec(&request).expect("credentials have string keys only");
    finish(program, run(program, "store", &bytes, timeout)?)
}

/// Lets a helper forget a host.
pub fn erase(program: &str, host: &str, timeout: Duration) -> Result<(), RegistryError> {
    finish(program, run(program, "erase", server(host).as_bytes(), timeout)?)
}

fn finish(program: &str, (done, output): (bool, Vec<u8>)) -> Result<(), RegistryError> {
    if done { Ok(()) } else { Err(failed(program, first_line(&String::from_utf8_lossy(&output)))) }
}

/// The name that helpers know a host by.
pub(super) fn server(host: &str) -> String {
    if host == "docker.io" { "https://index.docker.io/v1/".to_owned() } else { host.to_owned() }
}

fn failed(program: &str, reason: String) -> RegistryError {
    RegistryError::Helper { program: format!("docker-credential-{program}"), reason }
}

fn first_line(text: &str) -> String {
    let line: String = text.trim().lines().next().unwrap_or_default().chars().filter(|c| !c.is_control()).collect();
    if line.is_empty() { "it failed and does not say why".to_owned() } else { line.chars().take(300).collect() }
}

fn run(program: &str, action: &str, input: &[u8], timeout: Duration) -> Result<(bool, Vec<u8>), RegistryError> {
    // The name comes out of a file; it must not become a path to some other program.
    if program.contains('/') {
        return Err(failed(program, "not a name of a program".to_owned()));
    }
    let io = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::NotFound => failed(program, "the program is not installed".to_owned()),
        _ => failed(program, error.to_string()),
    };
    let mut child = Command::new(format!("docker-credential-{program}"))
        .arg(action)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(io)?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let (answer, answered) = std::sync::mpsc::channel();
    let input = input.to_vec();
    // A thread of its own: a helper that hangs must not hang us. What it leaves behind ends with the pipe.
    std::thread::spawn(move || {
        let mut output = Vec::new();
        if let Some(mut stdin) = stdin {
            // A helper may end without reading; its exit code tells.
            let _ = stdin.write_all(&input);
        }
        if let Some(stdout) = stdout {
            let _ = stdout.take(ANSWER_LIMIT_BYTES).read_to_end(&mut output);
        }
        let _ = answer.send(output);
    });
    let start = Instant::now();
    let output = answered.recv_timeout(timeout);
    let mut status = child.try_wait().map_err(io)?;
    while status.is_none() && output.is_ok() && start.elapsed() < timeout {
        std::thread::sleep(Duration::from_millis(2));
        status = child.try_wait().map_err(io)?;
    }
    match (status, output) {
        (Some(status), Ok(output)) => Ok((status.success(), output)),
        _ => {
            let _ = child.kill();
            let _ = child.wait();
            Err(failed(program, format!("no answer within {} seconds", timeout.as_secs())))
        }
    }
}
