//! The command line outside of builds.

use crate::story::{Build, Ended, run};
use std::process::Command;

fn nacre(args: &[&str]) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nacre"));
    command.args(args).env("HOME", "/nonexistent").env_remove("NACRE_STORE").env_remove("XDG_DATA_HOME");
    run(command, None)
}

#[test]
fn help_documents_exit_codes_and_environment() {
    let help = nacre(&["--help"]);
    assert_eq!(help.code, Some(0));
    for words in ["130  interrupted", "4    a RUN step failed", "NACRE_STORE", "SOURCE_DATE_EPOCH"] {
        assert!(help.stdout().contains(words), "{words}");
    }
    let build = nacre(&["buildx", "build", "--help"]);
    assert!(build.stdout().contains("--build-arg <NAME[=VALUE]>"), "{}", build.stdout());
}

#[test]
fn version_is_a_result() {
    let version = nacre(&["version"]);
    assert_eq!(version.stdout(), format!("nacre {}\n", env!("CARGO_PKG_VERSION")));
    assert_eq!(version.stderr, "");
}

#[test]
fn a_command_line_without_sense_ends_with_2() {
    for args in [
        &["build"][..],
        &["build", "--nope", "."],
        &["run", "debian"],
        &["build", "/nonexistent"],
        &["build", "-f", "-", "-"],
        &["build", "--output", "type=floppy", "."],
        &["build", "--secret", "id=a,src=/nonexistent", "."],
        &["build", "--push", "."],
    ] {
        let ended = nacre(args);
        assert_eq!(ended.code, Some(2), "{args:?}: {}", ended.stderr);
        assert!(ended.stderr.starts_with("error: "), "{args:?}: {}", ended.stderr);
        assert_eq!(ended.stdout(), "", "{args:?}");
    }
}

#[test]
fn an_empty_store_has_no_images() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let list = nacre(&["images", "-q", "--store", dir.path().to_str().expect("text")]);
    assert_eq!((list.code, list.stdout().as_str()), (Some(0), ""));
}

#[test]
fn a_name_is_in_the_list_of_images() {
    let build = Build::new().dockerfile("FROM scratch\nCOPY a /\n").file("a", "x").flag("--tag=story:1");
    build.runs();
    let store = build.store();
    let list = nacre(&["images", "--store", store.to_str().expect("text")]);
    assert_eq!(list.stdout().matches("story:1").count(), 1, "{}", list.stdout());
}

#[test]
fn flags_of_docker_are_taken() {
    let build = Build::new().dockerfile("FROM scratch\nCOPY a /\n").file("a", "x");
    let build = build.flag("--rm").flag("--force-rm=true").flag("--provenance=false").flag("--squash");
    let ended = build.runs();
    assert!(ended.stderr.contains("warning: --squash does nothing"), "{}", ended.stderr);
}

#[test]
fn the_doctor_tells_what_works() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let doctor = |more: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_nacre"));
        command.args(["doctor", "--store"]).arg(dir.path().join("no/store/yet")).args(more);
        crate::story::run(command, None)
    };
    let table = doctor(&[]);
    assert_eq!(table.code, Some(0), "{}{}", table.stdout(), table.stderr);
    for line in [
        "works    user namespace\n",
        "works    overlay on the store\n",
        "works    system call filter\n",
        "so: RUN steps have namespaces",
    ] {
        assert!(table.stdout().contains(line), "{line} is not in {}", table.stdout());
    }
    let json = doctor(&["--format=json"]);
    let value: serde_json::Value = serde_json::from_slice(&json.stdout).expect("JSON");
    let rights = value["rights"].as_array().expect("a list");
    assert_eq!(rights.len(), 10);
    assert_eq!(value["isolation"], "userns");
    assert!(rights.iter().all(|right| right["state"] != "refused" || right["reason"].is_string()));
    assert!(!dir.path().join("no").exists(), "it leaves nothing");
}

#[test]
fn without_namespaces_everything_but_run_works() {
    let build = crate::story::Build::new().file("a", "x");
    // Root of a namespace that allows no other one and may not mount either.
    let without = |inner: std::process::Command| {
        let script =
            "echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all --inh-caps=-all \"$@\"";
        let mut command = std::process::Command::new("unshare");
        command.args(["-Ur", "sh", "-c", script, "sh"]).arg(inner.get_program()).args(inner.get_args());
        crate::story::run(command, None)
    };
    build.write("Dockerfile", "FROM busybox\nWORKDIR /w\nCOPY a /a\nCOPY --from=busybox /etc/passwd /p\n");
    let out = build.path("out.tar");
    let mut command = build.command();
    command.arg(format!("--output=type=oci,dest={}", out.display()));
    let ended = without(command);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(out.exists());
    build.write("Dockerfile", "FROM busybox\nRUN true\n");
    let ended = without(build.command());
    assert_eq!(ended.code, Some(6), "{}", ended.stderr);
    assert!(ended.stderr.contains("sysctl -w user.max_user_namespaces"), "{}", ended.stderr);
    let mut doctor = std::process::Command::new(env!("CARGO_BIN_EXE_nacre"));
    doctor.arg("doctor").arg("--store").arg(build.store());
    let ended = without(doctor);
    assert_eq!(ended.code, Some(6), "{}", ended.stderr);
    assert!(ended.stdout().starts_with("refused  user namespace: "), "{}", ended.stdout());
    assert!(ended.stdout().contains("unknown  overlay on the store"), "{}", ended.stdout());
}
