//! Disks that are full or take no writes: the build says so, and what is in the store stays whole.
//!
//! The store is a small tmpfs in a mount namespace of the test's own, which an ordinary user can have too.

use crate::story::{Build, Ended, assert_store_is_whole, last_error, run};
use std::ffi::OsString;
use std::fs;
use std::process::Command;

/// Size of the small disk: enough for busybox and what a build keeps beside it.
const DISK: &str = "16M";
/// Bytes of the file that has no room there.
const LARGE: usize = 30_000_000;

/// Bytes that do not compress, always the same.
pub(crate) fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// Runs a shell script that sees the small disk at `$DISK`, and `nacre build` with a store there as `build`.
fn on_small_disk(build: &Build, script: &str) -> Ended {
    let disk = build.path("disk");
    fs::create_dir_all(&disk).expect("a directory of our own");
    let nacre = build.command();
    let args: Vec<OsString> = nacre
        .get_args()
        .map(|arg| if arg == build.store() { disk.join("store").into() } else { arg.to_owned() })
        .collect();
    let setup = format!("set -u; mount -t tmpfs -o size={DISK} none \"$DISK\"; NACRE=$1; shift; {script}");
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", &setup, "sh"]);
    command.arg(nacre.get_program()).args(args).env("DISK", &disk).env("OUT", build.path("out"));
    fs::create_dir_all(build.path("out")).expect("a directory of our own");
    for (name, value) in nacre.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    run(command, None)
}

/// Builds, says the exit code, removes what is too large, builds again, and hands the store out.
const TWICE: &str = r#"
    "$NACRE" "$@" --output=type=oci,dest="$DISK/image.tar"; echo "first $?"
    ls -A "$DISK" "$DISK/store/tmp" "$DISK/store/steps"
    mv "$CONTEXT/Smaller" "$CONTEXT/Dockerfile"
    "$NACRE" "$@" --output=type=oci,dest="$OUT/image.tar"; echo "second $?"
    cp -r "$DISK/store/." "$OUT/store""#;

#[track_caller]
fn fails_and_recovers(step: &str, code: i32, words: &[&str]) {
    let common = "FROM busybox\nRUN echo kept > /kept\nCOPY small /small\n";
    let build = Build::new().file("small", "x").file("Smaller", common);
    let build = build.dockerfile(&format!("{common}{step}\n"));
    fs::write(build.path("context").join("large"), noise(LARGE)).expect("a file of our own");
    let script = TWICE.replace("$CONTEXT", &build.path("context").display().to_string());
    let ended = on_small_disk(&build, &script);
    let (first, second) =
        ended.stderr.split_once("#1 [1/3]").map_or((ended.stderr.as_str(), ""), |(first, second)| (first, second));
    assert!(ended.stdout().starts_with(&format!("first {code}\n")), "{}\n{}", ended.stdout(), ended.stderr);
    for word in words {
        assert!(last_error(first).contains(word), "`{word}` is not in:\n{first}");
    }
    assert!(!ended.stdout().contains("image.tar"), "a half-written image: {}", ended.stdout());
    assert!(ended.stdout().contains("second 0\n"), "{}\n{}", ended.stdout(), ended.stderr);
    assert!(second.contains("3 steps") || second.contains("4 steps"), "{second}");
    assert!(second.contains("all cached"), "what was finished is kept:\n{second}");
    assert_store_is_whole(&build.path("out").join("store"));
    assert!(build.path("out").join("image.tar").exists());
}

#[test]
fn a_layer_that_has_no_room_is_no_layer() {
    fails_and_recovers("COPY large /large", 7, &["No space left on device", "help: make room there"]);
}

#[test]
fn files_that_have_no_room_for_a_step() {
    let words = ["large", "No space left on device", "5 | ", "help: make room there"];
    fails_and_recovers("COPY large /large\nRUN true", 7, &words);
}

#[test]
fn a_step_that_fills_the_disk() {
    let step = "RUN head -c 30000000 /dev/zero > /large";
    fails_and_recovers(step, 4, &["exit code 1", "file system of the store", "is full", "help: make room there"]);
}

#[test]
fn a_store_that_takes_no_writes() {
    let build = Build::new().dockerfile("FROM scratch\nCOPY Dockerfile /\n");
    let script = r#"mount -o remount,bind,ro "$DISK"; "$NACRE" "$@"; echo "ended $?""#;
    let ended = on_small_disk(&build, script);
    assert_eq!(ended.stdout(), "ended 7\n", "{}", ended.stderr);
    let error = last_error(&ended.stderr);
    assert!(error.contains("store") && error.contains("Read-only file system"), "{error}");
    assert!(error.contains("help: choose a place that can be written with --store"), "{error}");
}

#[test]
fn an_output_that_takes_no_writes() {
    let build = Build::new().dockerfile("FROM scratch\nCOPY Dockerfile /\n");
    let script = r#"mkdir "$DISK/here"; mount --bind "$DISK/here" "$OUT"; mount -o remount,ro,bind "$OUT"
        "$NACRE" "$@" --output="type=oci,dest=$OUT/image.tar"; echo "ended $?""#;
    let ended = on_small_disk(&build, script);
    assert_eq!(ended.stdout(), "ended 7\n", "{}", ended.stderr);
    let error = last_error(&ended.stderr);
    assert!(error.contains("image.tar") && error.contains("Read-only file system"), "{error}");
}
