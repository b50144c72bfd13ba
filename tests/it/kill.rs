//! `kill -9` at any moment leaves nothing behind: no process, no mount, no namespace, nothing half-done in the store.
//! Half of the builds fetch a large base from a registry on loopback and write two outputs.

use crate::registry::Registry;
use crate::story::Build;
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// `make test` by root does this as root and as two other users: 210 times in all.
const KILLS: u32 = 70;
/// Who waits for a slow disk when it is killed dies only when the disk has answered.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of the base that is fetched.
const LARGE: usize = 20_000_000;
/// A store is used for as many builds; a new one fetches its base again.
const BUILDS_PER_STORE: u32 = 5;

/// Processes that a build has started: they are in its directory, or name it, or are its steps.
fn processes(dir: &Path, token: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("/proc is mounted").flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let inside = fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(dir));
        if inside || line.contains(token) || line.contains(&dir.display().to_string()) {
            found.push(format!("{}: {line}", entry.file_name().display()));
        }
    }
    found
}

/// A base image of `busybox` and incompressible megabytes, in a registry.
fn large_base(registry: &Registry) -> String {
    let name = format!("{}/large:1", registry.host);
    let build = Build::new().dockerfile("FROM busybox\nCOPY noise /noise\n").flag("-t").flag(&*name).flag("--push");
    fs::write(build.path("context/noise"), crate::disk::noise(LARGE)).expect("a file of our own");
    build.runs();
    name
}

#[track_caller]
fn assert_whole(build: &Build) {
    let mut fsck = Command::new(env!("CARGO_BIN_EXE_nacre"));
    fsck.args(["fsck", "--store"]).arg(build.store());
    let ended = crate::story::run(fsck, None);
    assert_eq!(ended.code, Some(0), "{}\n{}", ended.stdout(), ended.stderr);
}

#[test]
fn killed_anywhere() {
    // Numbers that look random and are the same every time.
    let mut state = 0x2545_f491_u64;
    let mut random = |below: u128| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        u128::from(state) % below.max(1)
    };
    let mut whole = Duration::from_millis(800);
    let registry = Registry::plain();
    let large = large_base(&registry);
    let mut build = Build::new();
    let mut killed = 0;
    for number in 0..KILLS {
        if number % BUILDS_PER_STORE == 0 {
            assert_whole(&build);
            build = Build::new();
            build.write("large", &"0123456789abcdef".repeat(40_000));
        }
        let token = format!("kill-{}-{number}", std::process::id());
        // A store is new every fifth time, and its first build has to fetch its base then.
        let base = if number % 2 == 0 { &*large } else { "busybox" };
        build.write(
            "Dockerfile",
            &format!(
                "FROM {base}\nRUN echo {token} > /a && head -c 3000000 /dev/zero > /zero\nCOPY large /{number}/\n\
                 RUN --mount=type=cache,target=/c echo {token} >> /c/log && cp /zero /{number}/zero && sync /a\n\
                 COPY --from=busybox / /{number}/root\n"
            ),
        );
        let command = || {
            let mut command = build.command();
            command.current_dir(build.path("."));
            command.arg(format!("--output=type=oci,dest={}", build.path("out.tar").display()));
            command.arg(format!("--output=type=local,dest={}", build.path(&format!("out-{number}")).display()));
            command.args(["-t", "app:1"]);
            command
        };
        let start = Instant::now();
        let mut child = command().stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("nacre starts");
        std::thread::sleep(Duration::from_micros(u64::try_from(random(whole.as_micros())).unwrap_or(0)));
        // It may have ended by then, and is waited for below only, so the number is still its own.
        kill_process(Pid::from_child(&child), Signal::KILL).expect("it was not waited for");
        let status = child.wait().expect("it ends");
        killed += u32::from(status.code().is_none());
        // The next point lies anywhere in the time that a build takes.
        whole = if status.success() { start.elapsed() } else { whole + whole / 50 };

        let until = Instant::now() + PATIENCE;
        let dir = build.path(".").canonicalize().expect("it is there");
        while !processes(&dir, &token).is_empty() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        let left = processes(&dir, &token);
        assert!(left.is_empty(), "kill {number} left {left:#?}");
        // Without process and mount, there is nothing that holds a namespace.
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
        assert!(!mounts.contains(&dir.display().to_string()), "kill {number} left mounted: {mounts}");
        if number % BUILDS_PER_STORE == BUILDS_PER_STORE - 1 {
            assert_whole(&build);
            let ended = crate::story::run(command(), None);
            assert_eq!(ended.code, Some(0), "after kill {number}: {}", ended.stderr);
        }
    }
    assert_whole(&build);
    assert!(killed > KILLS / 2, "only {killed} of {KILLS} builds were still running");
}

#[test]
fn fsck_finds_and_repairs() {
    let build = Build::new().dockerfile("FROM busybox\nRUN echo kept > /kept\n").flag("-t").flag("app:1");
    build.runs();
    assert_whole(&build);
    let blobs = build.store().join("blobs/sha256");
    let blob = fs::read_dir(&blobs).expect("blobs").flatten().next().expect("a blob").path();
    fs::write(&blob, "damaged").expect("it is ours");
    let fsck = |flags: &[&str]| {
        let mut fsck = Command::new(env!("CARGO_BIN_EXE_nacre"));
        fsck.args(["fsck", "--store"]).arg(build.store()).args(flags);
        crate::story::run(fsck, None)
    };
    let found = fsck(&[]);
    assert_eq!(found.code, Some(7), "{}", found.stderr);
    let name = blob.file_name().expect("a name").to_string_lossy().into_owned();
    assert!(found.stdout().contains(&format!("blobs/sha256/{name}: its content has the digest")), "{}", found.stdout());
    assert!(found.stderr.contains("--repair"), "{}", found.stderr);
    let repaired = fsck(&["--repair", "--format=json"]);
    assert_eq!(repaired.code, Some(0), "{}", repaired.stderr);
    let value: serde_json::Value = serde_json::from_slice(&repaired.stdout).expect("JSON");
    assert!(value["findings"].as_array().is_some_and(|list| list.iter().all(|finding| finding["repaired"] == true)));
    assert_whole(&build);
    build.runs();
    assert_whole(&build);
}
