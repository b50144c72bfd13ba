//! A step reruns only if something that it can see has changed.

use crate::story::Build;
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

fn project() -> Build {
    Build::new()
        .dockerfile(
            "FROM busybox AS builder\nCOPY list /list\nRUN sort /list > /sorted\n\
             FROM busybox\nCOPY other /other\nCOPY --from=builder /sorted /sorted\n",
        )
        .file("list", "b\na\n")
        .file("other", "o")
}

/// Every file below a directory with size and time of change.
fn state(dir: &Path) -> Vec<(std::path::PathBuf, u64, SystemTime)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let meta = entry.metadata().expect("a file of our own");
        if meta.is_dir() {
            files.extend(state(&entry.path()));
        } else {
            files.push((entry.path(), meta.len(), meta.modified().expect("a time")));
        }
    }
    files.sort();
    files
}

#[test]
fn a_second_build_runs_nothing_and_gives_the_same_image() {
    let build = project();
    let first = build.image();
    assert_eq!(first.file("/sorted"), "a\nb\n");
    let second = build.image();
    assert_eq!(second.ran(), Vec::<String>::new(), "{}", second.stderr);
    assert!(second.stderr.contains("all cached"), "{}", second.stderr);
    assert_eq!(first.record, second.record);
}

#[test]
fn a_fully_cached_build_writes_nothing() {
    let build = project();
    build.runs();
    build.runs();
    let before = state(&build.store().join("layers"));
    let blobs = state(&build.store().join("blobs"));
    build.runs();
    assert_eq!(before, state(&build.store().join("layers")));
    assert_eq!(blobs, state(&build.store().join("blobs")));
}

#[test]
fn a_touched_file_changes_nothing() {
    let build = project();
    build.runs();
    let file = fs::File::options().append(true).open(build.path("context/list")).expect("a file of our own");
    file.set_modified(SystemTime::now() - Duration::from_secs(1000)).expect("a time can be set");
    assert_eq!(build.runs().ran(), Vec::<String>::new());
}

#[test]
fn one_byte_reruns_what_can_see_it_and_says_why() {
    let build = project();
    build.runs();
    build.write("other", "p");
    let ended = build.runs();
    assert!(ended.ran().iter().all(|step| !step.contains("RUN sort")), "{}", ended.stderr);
    assert!(ended.stderr.contains("runs because: other changed"), "{}", ended.stderr);
    build.write("list", "c\na\n");
    let ended = build.runs();
    assert!(ended.ran().iter().any(|step| step.contains("RUN sort")), "{}", ended.stderr);
}

#[test]
fn a_step_with_its_old_result_does_not_rerun_its_children() {
    let build = project();
    let first = build.image();
    // Another order, the same sorted list.
    build.write("list", "a\nb\n");
    let second = build.image();
    assert!(second.ran().iter().any(|step| step.contains("sort")), "{}", second.stderr);
    assert!(second.ran().iter().all(|step| !step.contains("/sorted /sorted")), "{}", second.stderr);
    assert_eq!(first.record.fs, second.record.fs);
}

#[test]
fn no_cache_runs_all() {
    let build = project();
    build.runs();
    let again = build.flag("--no-cache");
    assert!(again.runs().ran().iter().any(|step| step.contains("sort")));
}

#[test]
fn a_failed_step_leaves_finished_ones_in_the_cache() {
    let build = Build::new().dockerfile("FROM busybox\nRUN echo kept > /kept\nRUN exit 1\n");
    build.fails_with(4, &["exit code 1"]);
    build.write("Dockerfile", "FROM busybox\nRUN echo kept > /kept\nRUN true\n");
    let ended = build.runs();
    assert!(ended.ran().iter().all(|step| !step.contains("echo kept")), "{}", ended.stderr);
}
