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

/// Everything below a directory with all that shows a write.
fn state(dir: &Path) -> Vec<(std::path::PathBuf, u64, u64, (i64, i64))> {
    use std::os::unix::fs::MetadataExt;
    let mut found = Vec::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(path) = pending.pop() {
        let meta = path.symlink_metadata().expect("a file of the store");
        // What belongs to subordinate users may not be readable, and is in layers alone.
        if meta.is_dir()
            && let Ok(entries) = fs::read_dir(&path)
        {
            pending.extend(entries.flatten().map(|entry| entry.path()));
        }
        found.push((path, meta.ino(), meta.len(), (meta.ctime(), meta.ctime_nsec())));
    }
    found.sort();
    found
}

/// The reasons that steps give for running, without their numbers.
fn reasons(stderr: &str) -> Vec<String> {
    stderr.lines().filter_map(|line| line.split_once(" runs because: ")).map(|(_, why)| why.to_owned()).collect()
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
    let build = project().flag("--tag=app").flag("--tag=other:1");
    // A file that has just been written is not remembered yet: it could change within the clock's tick.
    std::thread::sleep(Duration::from_millis(100));
    build.runs();
    let before = state(&build.store());
    let again = build.runs();
    assert_eq!(reasons(&again.stderr), Vec::<String>::new());
    let after = state(&build.store());
    let changed: Vec<_> = after.iter().filter(|entry| !before.contains(entry)).collect();
    assert!(before == after, "{changed:?}");
}

#[test]
fn each_change_reruns_what_it_is_for_and_is_named() {
    let text = "FROM busybox\nARG V=1\nENV E=1\nRUN --mount=type=secret,id=s echo $V > /v\nUSER 1000\n\
                RUN --mount=type=tmpfs,target=/scratch id > /tmp/id\n";
    let build = Build::new().dockerfile(text).flag("--secret=id=s,env=SECRET").env("SECRET", "a");
    build.runs();
    let check = |build: &Build, from: &str, to: &str, expected: &[&str]| {
        build.write("Dockerfile", &text.replace(from, to));
        let ended = build.runs();
        let found = reasons(&ended.stderr);
        assert_eq!(found.len(), expected.len(), "{from} to {to}: {found:?}");
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.contains(expected), "{from} to {to}: {found}, not {expected}");
        }
        build.write("Dockerfile", text);
        assert_eq!(reasons(&build.runs().stderr), Vec::<String>::new(), "back from {to}");
    };
    check(&build, "ENV E=1", "ENV E=2", &["env E: 1 → 2", "env E: 1 → 2"]);
    check(&build, "USER 1000", "USER 1001", &["user: 1000 → 1001"]);
    check(&build, "id=s ", "id=s,mode=0444 ", &["mode: 256 → 292"]);
    check(&build, "target=/scratch", "target=/elsewhere", &["mount 1 /elsewhere"]);
    check(&build, "RUN --mount=type=tmpfs,target=/scratch id", "RUN --network=none id", &["network: Default → None"]);
    // A secret's value is nothing a result may depend on.
    let build = build.env("SECRET", "b");
    assert_eq!(reasons(&build.runs().stderr), Vec::<String>::new());
    let build = build.flag("--build-arg=V=2");
    let found = reasons(&build.runs().stderr);
    assert!(found.iter().any(|reason| reason.contains("env V: 1 → 2")), "{found:?}");
}

#[test]
fn only_the_named_stage_goes_without_the_cache() {
    let build = project();
    build.runs();
    let build = build.flag("--no-cache-filter=builder");
    let ran = build.runs().ran();
    assert!(ran.iter().any(|step| step.contains("sort")), "{ran:?}");
    assert!(ran.iter().all(|step| !step.contains("/other") && !step.contains("--from=builder")), "{ran:?}");
}

#[test]
fn equal_steps_of_two_stages_run_once() {
    let random = "RUN head -c 8 /dev/urandom > /x; sleep 0.2";
    let build = Build::new().dockerfile(&format!(
        "FROM busybox AS a\n{random}\nFROM busybox AS b\n{random}\nFROM busybox\nCOPY --from=a /x /a\n\
         COPY --from=b /x /b\nRUN cmp /a /b\n"
    ));
    let ran = build.runs().ran();
    assert_eq!(ran.iter().filter(|step| step.contains("urandom")).count(), 1, "{ran:?}");
}

#[test]
fn one_cache_mounted_twice_is_locked_once() {
    let build = Build::new().dockerfile(
        "FROM busybox\nRUN --mount=type=cache,id=c,target=/a,sharing=locked \
         --mount=type=cache,id=c,target=/b,sharing=locked touch /a/x && ls /b/x\n",
    );
    build.runs();
}

#[test]
fn ten_builds_at_once_share_a_store() {
    let build = Build::new();
    let text = |number: usize| {
        let (one, two) = if number.is_multiple_of(2) { ("x", "y") } else { ("y", "x") };
        format!(
            "FROM busybox\nRUN --mount=type=cache,id={one},target=/1,sharing=locked \
             --mount=type=cache,id={two},target=/2,sharing=locked \
             n=$(cat /2/n 2>/dev/null || echo 0); sleep 0.05; echo $((n+1)) > /2/n; echo {number} > /number\n\
             RUN --mount=type=cache,id=z,target=/z,sharing=private mkdir /z/busy && sleep 0.05 && rmdir /z/busy\n\
             RUN echo same > /same\n"
        )
    };
    std::thread::scope(|scope| {
        for number in 0..10 {
            let path = build.path(&format!("Dockerfile.{number}"));
            // Two of each, so that there are equal ones, too.
            fs::write(&path, text(number / 2)).expect("a file of our own");
            let mut command = build.command();
            command.arg("--file").arg(path).arg(format!("--tag=image:{number}"));
            scope.spawn(move || {
                let ended = crate::story::run(command, None);
                assert_eq!(ended.code, Some(0), "{}", ended.stderr);
            });
        }
    });
    crate::story::assert_store_is_whole(&build.store());
    let sum = Build::new();
    sum.write(
        "Dockerfile",
        "FROM busybox\nRUN --mount=type=cache,id=x,target=/1 --mount=type=cache,id=y,target=/2 \
         test $(($(cat /1/n) + $(cat /2/n))) -ge 5\n",
    );
    let mut command = build.command();
    command.arg("--file").arg(sum.path("context/Dockerfile"));
    let ended = crate::story::run(command, None);
    assert_eq!(ended.code, Some(0), "an update was lost: {}", ended.stderr);
}

#[test]
fn builds_and_prunes_at_once() {
    let build = Build::new();
    let finished = std::sync::atomic::AtomicUsize::new(0);
    let (finished, build_of) = (&finished, &build);
    let pruned = std::thread::scope(|scope| {
        for number in 0..10 {
            let path = build.path(&format!("Dockerfile.{number}"));
            let text = format!(
                "FROM busybox AS a\nRUN echo {} > /a && head -c 100000 /dev/zero > /zero\nFROM busybox\n\
                 COPY --from=a /a /zero /from/\nRUN --mount=type=cache,target=/c echo {number} >> /c/log && cat /from/a > /b\n",
                number / 2
            );
            fs::write(&path, text).expect("a file of our own");
            scope.spawn(move || {
                for round in 0..3 {
                    let out = build_of.path(&format!("out-{number}-{round}.tar"));
                    let mut command = build_of.command();
                    command.arg("--file").arg(&path).arg(format!("--output=type=oci,dest={}", out.display()));
                    let ended = crate::story::run(command, None);
                    finished.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
                    assert!(out.exists());
                }
            });
        }
        let mut pruned = 0;
        while finished.load(std::sync::atomic::Ordering::SeqCst) < 30 {
            let mut prune = std::process::Command::new(env!("CARGO_BIN_EXE_nacre"));
            prune.args(["prune", "--all", "--store"]).arg(build.store());
            let ended = crate::story::run(prune, None);
            assert_eq!(ended.code, Some(0), "{}", ended.stderr);
            pruned += 1;
        }
        pruned
    });
    assert!(pruned > 0);
    let mut fsck = std::process::Command::new(env!("CARGO_BIN_EXE_nacre"));
    fsck.args(["fsck", "--store"]).arg(build.store());
    let ended = crate::story::run(fsck, None);
    assert_eq!(ended.code, Some(0), "{}\n{}", ended.stdout(), ended.stderr);
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

#[test]
fn more_layers_than_are_stacked() {
    let mut dockerfile = String::from("FROM busybox\n");
    for number in 0..210 {
        dockerfile.push_str(&format!("RUN echo {number} > /file{number}\n"));
    }
    dockerfile.push_str("RUN cat /file0 /file205 > /both && rm /file3 /file207 && mkdir /file3\n");
    let image = Build::new().dockerfile(&dockerfile).image();
    assert_eq!(image.record.fs["/both"]["data"], "0\n205\n");
    assert!(!image.record.fs.contains_key("/file207") && image.record.fs.contains_key("/file209"));
    assert_eq!(image.record.fs["/file3"]["t"], "d");
}
