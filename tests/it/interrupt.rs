//! Interrupted builds leave nothing behind and lose nothing.

use crate::story::Build;
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Command lines of all processes.
fn command_lines() -> Vec<String> {
    let mut lines = Vec::new();
    for entry in fs::read_dir("/proc").expect("/proc is mounted").flatten() {
        if let Ok(line) = fs::read(entry.path().join("cmdline")) {
            lines.push(String::from_utf8_lossy(&line).replace('\0', " "));
        }
    }
    lines
}

/// Starts a build, waits until its step runs, sends a signal, and returns the exit code.
fn interrupted_by(signal: Signal, sleep: &str) -> (Option<i32>, String) {
    let build = Build::new()
        .dockerfile(&format!("FROM busybox\nRUN echo kept > /kept\nRUN echo begun && sleep {sleep} & sleep {sleep}\n"));
    let mut child = build
        .command()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("nacre starts");
    let mut stderr = BufReader::new(child.stderr.take().expect("a pipe"));
    let mut seen = String::new();
    while !seen.contains("begun\n") || !seen.lines().any(|line| line.ends_with(" begun")) {
        if stderr.read_line(&mut seen).expect("text") == 0 {
            panic!("the step did not begin: {seen}");
        }
    }
    kill_process(Pid::from_child(&child), signal).expect("it still runs");
    let start = Instant::now();
    let status = child.wait().expect("it ends");
    assert!(start.elapsed() < Duration::from_secs(10), "it took {:?} to end", start.elapsed());
    let mut rest = String::new();
    while stderr.read_line(&mut rest).expect("text") != 0 {}
    // What a dying namespace holds may take a moment to go, and who waits for a slow disk dies when that has answered.
    let wanted = format!("sleep {sleep}");
    let until = Instant::now() + Duration::from_secs(60);
    while command_lines().iter().any(|line| line.trim() == wanted) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(command_lines().iter().all(|line| line.trim() != wanted), "the step's process is still there");
    let mounts = fs::read_to_string("/proc/self/mounts").expect("/proc is mounted");
    let store = build.store().display().to_string();
    assert!(!mounts.contains(&store), "left mounted: {mounts}");

    build.write("Dockerfile", "FROM busybox\nRUN echo kept > /kept\nRUN true\n");
    let again = build.runs();
    assert!(again.ran().iter().all(|step| !step.contains("echo kept")), "{}", again.stderr);
    (status.code(), rest)
}

#[test]
fn an_interrupt_ends_with_130() {
    let (code, stderr) = interrupted_by(Signal::INT, "4711");
    assert_eq!(code, Some(130), "{stderr}");
    assert!(stderr.contains("error: interrupted"), "{stderr}");
}

#[test]
fn so_does_a_request_to_terminate() {
    let (code, stderr) = interrupted_by(Signal::TERM, "4712");
    assert_eq!(code, Some(130), "{stderr}");
}

#[test]
fn a_killed_builder_takes_its_steps_along() {
    let (code, _) = interrupted_by(Signal::KILL, "4713");
    assert_eq!(code, None);
}
