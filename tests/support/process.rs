//! Running the builder and cleaning up behind it.

use rustix::process::{Pid, Signal, kill_process_group};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Runs a program without input; returns its exit code (`None` when it was killed, also by the timeout) and what it
/// wrote to both outputs, in order.
pub(crate) fn run(mut command: Command, timeout: Duration) -> std::io::Result<(Option<i32>, String)> {
    let (mut reader, writer) = std::io::pipe()?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer).process_group(0);
    let mut child = command.spawn()?;
    // The command keeps the pipe's other end; with it open, reading would never end.
    drop(command);
    let output = std::thread::spawn(move || {
        let mut output = Vec::new();
        let _ = reader.read_to_end(&mut output);
        String::from_utf8_lossy(&output).into_owned()
    });
    let start = Instant::now();
    let mut pause = Duration::from_millis(1);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if start.elapsed() > timeout {
            let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    };
    let mut output = output.join().unwrap_or_default();
    if start.elapsed() > timeout {
        output.push_str(&format!("\ntimeout after {}s", timeout.as_secs()));
    }
    Ok((status.code(), output))
}

/// Removes a tree as well as it can be. An ordinary user's stores hold files of subordinate users, which need a user
/// namespace to go away.
pub(crate) fn remove_tree(path: &Path) {
    if std::fs::remove_dir_all(path).is_ok() {
        return;
    }
    let script = "chmod -R u+rwX \"$1\"; rm -rf \"$1\"";
    let quiet = |command: &mut Command| {
        let _ = command.arg(path).stdout(Stdio::null()).stderr(Stdio::null()).status();
    };
    quiet(Command::new("unshare").args(["--map-auto", "--map-root-user", "sh", "-c", script, "sh"]));
    if path.exists() {
        quiet(Command::new("sh").args(["-c", script, "sh"]));
    }
}
