//! Images for several platforms, and steps for processors that this machine does not have.

use crate::bases::{Layout, busybox, tools_layer};
use crate::registry::Registry;
use crate::story::{Build, last_error};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// What `tests/setup/packages.sh` takes out of Debian's package.
const BUSYBOX_ARM64: &str = "/var/cache/nacre-tests/busybox-arm64";

/// A base image for amd64 and arm64, made once.
fn base() -> &'static Path {
    static BASE: OnceLock<PathBuf> = OnceLock::new();
    BASE.get_or_init(|| {
        let dir = tempfile::Builder::new().prefix("nacre-it-").tempdir().expect("a temporary directory").keep();
        let own = busybox().expect("busybox is in PATH; make test installs it");
        let layout = Layout::new(dir.join("multi")).expect("a layout");
        let config = json!({"Env": ["PATH=/usr/bin:/bin"], "Cmd": ["sh"]});
        let manifests: Vec<Value> = [("amd64", own.as_path()), ("arm64", Path::new(BUSYBOX_ARM64))]
            .into_iter()
            .map(|(architecture, program)| {
                let layer = tools_layer(&own, program).expect("busybox for arm64 is there; make test fetches it");
                let mut image = layout.image(&[&layer], &config, architecture).expect("an image");
                image["platform"] = json!({"os": "linux", "architecture": architecture});
                image
            })
            .collect();
        let media_type = "application/vnd.oci.image.index.v1+json";
        let index = json!({"schemaVersion": 2, "mediaType": media_type, "manifests": manifests});
        layout.finish(layout.blob(index.to_string().as_bytes(), media_type).expect("a blob")).expect("a layout");
        dir.join("multi")
    })
}

fn build(text: &str) -> Build {
    Build::new().dockerfile(text).flag(format!("--build-context=multi=oci-layout://{}:latest", base().display()))
}

/// What `skopeo inspect` says of one platform's image.
fn inspect(place: &str, architecture: &str, more: &[&str]) -> Value {
    let output = Command::new("skopeo")
        .arg(format!("--override-arch={architecture}"))
        .arg("inspect")
        .args(more)
        .arg(place)
        .output()
        .expect("these tests need the program skopeo");
    assert!(output.status.success(), "{place}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn steps_run_for_another_processor() {
    let build = build(
        "FROM multi\nRUN uname -m > /machine && ls -l / | wc -l > /lines && /bin/busybox true\nRUN id -u > /id\n",
    );
    let build = build.flag("--platform=linux/arm64");
    let image = build.image();
    assert_eq!((image.file("/machine"), image.file("/id")), ("aarch64\n", "0\n"));
    assert_eq!(
        inspect(&format!("oci-archive:{}", build.path("image.tar").display()), "arm64", &[])["Architecture"],
        "arm64"
    );
    let ended = build.runs();
    assert!(ended.ran().is_empty(), "{}", ended.stderr);
}

#[test]
fn an_index_of_two_platforms_goes_everywhere() {
    let text = "FROM multi\nARG TARGETARCH\nRUN uname -m > /machine && echo $TARGETARCH > /target\n";
    let build = build(text).flag("--platform=linux/amd64,linux/arm64");
    let archive = build.path("index.tar");
    let mut command = build.command();
    command.arg(format!("--output=type=oci,dest={}", archive.display()));
    let ended = crate::story::run(command, None);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let place = format!("oci-archive:{}", archive.display());
    let raw = inspect(&place, "amd64", &["--raw"]);
    assert_eq!(raw["manifests"].as_array().map(Vec::len), Some(2), "{raw}");
    for architecture in ["amd64", "arm64"] {
        assert_eq!(inspect(&place, architecture, &[])["Architecture"], architecture);
    }

    let registry = Registry::plain();
    let name = format!("{}/team/app:1", registry.host);
    let mut command = build.command();
    command.args([format!("-t={name}"), "--push".to_owned(), "--load".to_owned()]);
    let ended = crate::story::run(command, None);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.ran().is_empty(), "{}", ended.stderr);
    let place = format!("docker://{name}");
    for architecture in ["amd64", "arm64"] {
        let found = inspect(&place, architecture, &["--tls-verify=false"]);
        assert_eq!(found["Architecture"], architecture);
        let copy = build.path(architecture);
        let status = Command::new("skopeo")
            .arg(format!("--override-arch={architecture}"))
            .args(["--insecure-policy", "copy", "-q", "--src-tls-verify=false", &place])
            .arg(format!("dir:{}", copy.display()))
            .status()
            .expect("skopeo runs");
        assert!(status.success());
    }
    let whole = build.path("whole");
    let status = Command::new("skopeo")
        .args(["--insecure-policy", "copy", "-q", "--all"])
        .arg(format!("oci:{}:{name}", build.store().display()))
        .arg(format!("oci:{}:x", whole.display()))
        .status()
        .expect("skopeo runs");
    assert!(status.success(), "the store holds all of the index");
}

#[test]
fn cross_compiling_stages_need_no_emulator() {
    let text = "FROM --platform=$BUILDPLATFORM multi AS build\nARG TARGETARCH BUILDARCH\n\
                RUN uname -m > /out && echo $BUILDARCH to $TARGETARCH >> /out\nFROM multi\nCOPY --from=build /out /out\n";
    let build = build(text).env("PATH", "/nonexistent").flag("--platform=linux/arm64");
    let image = build.image();
    assert_eq!(image.file("/out"), "x86_64\namd64 to arm64\n");
    assert_eq!(
        inspect(&format!("oci-archive:{}", build.path("image.tar").display()), "arm64", &[])["Architecture"],
        "arm64"
    );
}

#[test]
fn an_unknown_processor_is_named() {
    let build = Build::new().dockerfile("FROM scratch\nCOPY Dockerfile /\nRUN [\"/x\"]\n");
    let build = build.flag("--platform=linux/mips64le");
    let ended = build.fails_with(6, &["linux/mips64le"]);
    assert!(!last_error(&ended.stderr).contains("internal"), "{}", ended.stderr);
}

#[test]
fn nothing_is_registered_on_the_host() {
    let before = fs::read_dir("/proc/sys/fs/binfmt_misc").map(Iterator::count).unwrap_or(0);
    build("FROM multi\nRUN true\n").flag("--platform=linux/arm64").flag("--no-cache").runs();
    assert_eq!(fs::read_dir("/proc/sys/fs/binfmt_misc").map(Iterator::count).unwrap_or(0), before);
}

/// An archive with a file of two names.
fn linked() -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o640);
    header.set_size(2);
    archive.append_data(&mut header, "one", &b"1\n"[..]).expect("an archive in memory");
    let mut link = tar::Header::new_gnu();
    link.set_entry_type(tar::EntryType::Link);
    link.set_size(0);
    link.set_mode(0o640);
    archive.append_link(&mut link, "two", "one").expect("an archive in memory");
    archive.into_inner().expect("an archive in memory")
}

#[test]
fn files_of_two_platforms_go_into_a_directory_each() {
    use std::os::unix::fs::MetadataExt;
    let text = "FROM scratch\nARG TARGETARCH\nCOPY $TARGETARCH/ /\nADD linked.tar /links/\n";
    let context = || {
        let build = Build::new().dockerfile(text).file("amd64/a", "amd64\n").file("arm64/a", "arm64\n");
        let build = build.file("arm64/only", "x").flag("--platform=linux/amd64,linux/arm64/v8");
        fs::write(build.path("context/linked.tar"), linked()).expect("a file of our own");
        build
    };
    let local = context();
    let dest = local.path("out");
    let local = local.flag(format!("--output=type=local,dest={}", dest.display()));
    local.runs();
    let mut names: Vec<_> =
        fs::read_dir(&dest).expect("a directory").map(|entry| entry.expect("an entry").file_name()).collect();
    names.sort();
    assert_eq!(names, ["linux_amd64", "linux_arm64"]);
    let metadata = |name: &str| fs::metadata(dest.join(name)).expect(name);
    for platform in ["amd64", "arm64"] {
        let read = fs::read_to_string(dest.join(format!("linux_{platform}/a"))).expect("a file");
        assert_eq!(read, format!("{platform}\n"));
        let [one, two] = ["one", "two"].map(|name| metadata(&format!("linux_{platform}/links/{name}")));
        assert_eq!((one.ino(), one.nlink(), one.mode() & 0o777), (two.ino(), 2, 0o640), "{platform}");
    }
    assert!(!dest.join("linux_amd64/only").exists() && dest.join("linux_arm64/only").exists());

    let printed = context().flag("--output=type=tar,dest=-").runs();
    let mut archive = tar::Archive::new(printed.stdout.as_slice());
    let mut found = std::collections::BTreeMap::new();
    for entry in archive.entries().expect("an archive") {
        let mut entry = entry.expect("an entry");
        let name = String::from_utf8_lossy(&entry.path_bytes()).trim_end_matches('/').to_owned();
        let link = entry.link_name_bytes().map(|name| String::from_utf8_lossy(&name).into_owned());
        let mut content = String::new();
        std::io::Read::read_to_string(&mut entry, &mut content).expect("text");
        found.insert(name, link.unwrap_or(content));
    }
    for (name, content) in [
        ("linux_amd64/a", "amd64\n"),
        ("linux_arm64/a", "arm64\n"),
        ("linux_arm64/only", "x"),
        ("linux_amd64/links/two", "linux_amd64/links/one"),
        ("linux_arm64/links/two", "linux_arm64/links/one"),
    ] {
        assert_eq!(found.get(name).map(String::as_str), Some(content), "{name}: {found:?}");
    }

    // One platform has a directory only when asked for it; several without one must not be in each other's way.
    let single = Build::new().dockerfile("FROM scratch\nCOPY a /\n").file("a", "1").flag("--platform=linux/arm64");
    let dest = single.path("out");
    let single = single.flag(format!("--output=type=local,dest={},platform-split=true", dest.display()));
    single.runs();
    assert!(dest.join("linux_arm64/a").exists());
    let mixed = context().flag("--output=type=tar,dest=-,platform-split=false");
    mixed.fails_with(2, &["linux/amd64", "linux/arm64", "both have `/a`", "platform-split"]);
    let docker = context().flag("--output=type=docker,dest=x.tar");
    let ended = docker.fails_with(2, &["--output", "one platform", "type=oci"]);
    assert!(ended.ran().is_empty(), "told before anything runs: {}", ended.stderr);
}
