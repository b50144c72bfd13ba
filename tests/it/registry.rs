//! Images to and from a real registry, credentials, and what the store keeps of it all.

use crate::story::{Build, Ended, busybox_base, run};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

pub(crate) struct Registry {
    child: Child,
    pub(crate) host: String,
    pub(crate) dir: tempfile::TempDir,
}

impl Registry {
    /// Starts Debian's docker-registry; `extra` are lines of its configuration with `DIR` for a directory of its own.
    pub(crate) fn start(extra: &str, prepare: impl Fn(&Path)) -> Registry {
        for _ in 0..5 {
            let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
            let dir = tempfile::tempdir().expect("a temporary directory");
            prepare(dir.path());
            let config = dir.path().join("config.yml");
            let text = format!(
                "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: DIR/data\nhttp:\n  addr: 127.0.0.1:{port}\n{extra}"
            );
            fs::write(&config, text.replace("DIR", &dir.path().display().to_string())).expect("a file of our own");
            let mut child = Command::new("docker-registry")
                .arg("serve")
                .arg(&config)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("these tests need the program docker-registry");
            for _ in 0..200 {
                if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                    return Registry { child, host: format!("127.0.0.1:{port}"), dir };
                }
                if child.try_wait().expect("a child").is_some() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        panic!("docker-registry did not start");
    }

    pub(crate) fn plain() -> Registry {
        Self::start("", |_| ())
    }

    /// With the password "secret" of the user "me".
    fn with_password() -> Registry {
        Self::start("auth:\n  htpasswd:\n    realm: test\n    path: DIR/htpasswd\n", |dir| {
            let line = "me:$2b$04$K6fjliXwP7fZicU6OK19p.XN.8dOkcf0DJYHzdem7ACFSgNnePJGa\n";
            fs::write(dir.join("htpasswd"), line).expect("a file of our own");
        })
    }

    /// Has skopeo put the busybox base there.
    pub(crate) fn add_base(&self) {
        let status = Command::new("skopeo")
            .args(["--insecure-policy", "copy", "-q", "--dest-tls-verify=false"])
            .arg(format!("oci:{}:latest", busybox_base().display()))
            .arg(format!("docker://{}/library/busybox:1", self.host))
            .status()
            .expect("these tests need the program skopeo");
        assert!(status.success());
    }

    /// Files with the bytes of all blobs and documents.
    pub(crate) fn blobs(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut pending = vec![self.dir.path().join("data/docker/registry/v2/blobs/sha256")];
        while let Some(path) = pending.pop() {
            match fs::read_dir(&path) {
                Ok(entries) => pending.extend(entries.map(|entry| entry.expect("an entry").path())),
                Err(_) => found.push(path),
            }
        }
        found
    }

    /// What skopeo says of an image; it reads all of its blobs.
    pub(crate) fn check(&self, name: &str, more: &[&str]) -> Value {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let copy = Command::new("skopeo")
            .args(["--insecure-policy", "copy", "-q", "--src-tls-verify=false"])
            .args(more)
            .arg(format!("docker://{}/{name}", self.host))
            .arg(format!("oci:{}:x", dir.path().join("copy").display()))
            .output()
            .expect("these tests need the program skopeo");
        assert!(copy.status.success(), "{name}: {}", String::from_utf8_lossy(&copy.stderr));
        let inspect = Command::new("skopeo")
            .arg("inspect")
            .arg(format!("oci:{}:x", dir.path().join("copy").display()))
            .output()
            .expect("skopeo runs");
        serde_json::from_slice(&inspect.stdout).expect("JSON")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Another command on a build's store, with a configuration of its own.
pub(crate) fn nacre(build: &Build, args: &[&str], stdin: Option<&[u8]>) -> Ended {
    nacre_with(build, args, &[], stdin)
}

/// And with variables.
pub(crate) fn nacre_with(build: &Build, args: &[&str], variables: &[(&str, &str)], stdin: Option<&[u8]>) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nacre"));
    command.args(args).env("NACRE_STORE", build.store()).env("HOME", build.path("home"));
    for name in ["DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"] {
        command.env_remove(name);
    }
    command.envs(variables.iter().copied());
    run(command, stdin)
}

#[track_caller]
pub(crate) fn works(build: &Build, args: &[&str]) -> String {
    let ended = nacre(build, args, None);
    assert_eq!(ended.code, Some(0), "{args:?}: {}", ended.stderr);
    ended.stdout()
}

#[test]
fn a_build_is_pushed_under_all_of_its_names() {
    let registry = Registry::plain();
    let host = &registry.host;
    let metadata_of = |build: &Build| -> Value {
        serde_json::from_slice(&fs::read(build.path("meta")).expect("a file")).expect("JSON")
    };
    let build = Build::new().dockerfile("FROM busybox\nCOPY a /a\n").file("a", "1");
    let metadata = format!("--metadata-file={}", build.path("meta").display());
    let build = build.flag(metadata);
    let build = build.flag(format!("-t={host}/team/app:1")).flag(format!("-t={host}/team/app:2")).flag("--push");
    build.runs();
    let digest = metadata_of(&build)["containerimage.digest"].clone();
    for tag in ["1", "2"] {
        assert_eq!(registry.check(&format!("team/app:{tag}"), &[])["Digest"], digest);
    }
    assert_eq!(works(&build, &["images", "-q"]), "", "a push alone names nothing in the store");

    let by_digest = Build::new().dockerfile("FROM busybox\nCOPY a /a\n").file("a", "3");
    let metadata = format!("--metadata-file={}", by_digest.path("meta").display());
    let by_digest = by_digest
        .flag(metadata)
        .flag(format!("--output=type=image,push=true,push-by-digest=true,name-canonical=true,name={host}/team/digest"));
    by_digest.runs();
    let digest = metadata_of(&by_digest)["containerimage.digest"].as_str().expect("a digest").to_owned();
    registry.check(&format!("team/digest@{digest}"), &[]);
    assert!(nacre(&by_digest, &["pull", &format!("{host}/team/digest:latest")], None).code == Some(5));
}

#[test]
fn a_base_in_the_same_registry_is_not_downloaded() {
    let registry = Registry::plain();
    registry.add_base();
    let host = &registry.host;
    let build = Build::new().dockerfile(&format!("FROM {host}/library/busybox:1\nLABEL a=b\n"));
    let build = build.flag(format!("-t={host}/team/app:1")).flag("--push");
    build.runs();
    let found = registry.check("team/app:1", &[]);
    let base = found["Layers"][0].as_str().expect("a digest").trim_start_matches("sha256:").to_owned();
    assert!(!build.store().join("blobs/sha256").join(base).exists(), "the base layer was downloaded");
}

#[test]
fn logins_are_tried_kept_and_forgotten() {
    let registry = Registry::with_password();
    let host = &registry.host;
    let build = Build::new().dockerfile("FROM busybox\nCOPY a /a\n").file("a", "1");
    let build = build.flag(format!("-t={host}/team/app:1"));
    build.runs();
    let name = format!("{host}/team/app:1");
    let denied = nacre(&build, &["push", &name], None);
    assert_eq!(denied.code, Some(5));
    assert!(denied.stderr.contains(&format!("nacre login {host}")), "{}", denied.stderr);

    let login = |password: &[u8]| nacre(&build, &["login", "-u", "me", "--password-stdin", host], Some(password));
    let wrong = login(b"not-this-one\n");
    assert_eq!(wrong.code, Some(5), "{}", wrong.stderr);
    assert!(!wrong.stderr.contains("not-this-one"));
    let config = build.path("home/.docker/config.json");
    assert!(!config.exists());
    fs::create_dir_all(config.parent().expect("a parent")).expect("a directory");
    fs::write(&config, "{\"detachKeys\":\"ctrl-z\"}").expect("a file of our own");
    let right = login(b"secret\n");
    assert_eq!(right.code, Some(0), "{}", right.stderr);
    let text = fs::read_to_string(&config).expect("a file");
    assert!(text.contains("detachKeys") && text.contains(host.as_str()), "{text}");
    assert_eq!(fs::metadata(&config).expect("a file").permissions().mode() & 0o777, 0o600);

    let pushed: Value = serde_json::from_str(&works(&build, &["push", "--format=json", &name])).expect("JSON");
    assert_eq!(pushed[0]["sent"], 3, "{pushed}");
    let again: Value = serde_json::from_str(&works(&build, &["push", "--format=json", &name])).expect("JSON");
    assert_eq!((&again[0]["sent"], &again[0]["present"]), (&Value::from(0), &Value::from(3)), "{again}");
    registry.check("team/app:1", &["--src-creds=me:secret"]);

    works(&build, &["logout", host]);
    assert!(!fs::read_to_string(&config).expect("a file").contains(host.as_str()));
    assert_eq!(nacre(&build, &["push", &name], None).code, Some(5));
}

/// Directories of unpacked layers, in each form.
fn unpacked_layers(build: &Build) -> BTreeSet<PathBuf> {
    let layers = fs::read_dir(build.store().join("layers")).expect("a directory");
    let layers = layers.map(|layer| layer.expect("an entry").path());
    layers.flat_map(|layer| ["tree", "tree.single"].map(|form| layer.join(form))).filter(|tree| tree.exists()).collect()
}

#[test]
fn images_are_pulled_named_looked_at_and_saved() {
    let registry = Registry::plain();
    registry.add_base();
    let build = Build::new();
    let name = format!("{}/library/busybox:1", registry.host);
    let digest = works(&build, &["pull", "-q", &name]).trim().to_owned();
    assert!(digest.starts_with("sha256:"), "{digest}");
    let unpacked = unpacked_layers(&build);
    assert_eq!(unpacked.len(), 1);
    // The same ones are what steps run on.
    let build = build.dockerfile(&format!("FROM {name}\nRUN test -d /bin\n"));
    build.runs();
    let layer = unpacked.first().and_then(|tree| tree.parent()).expect("a layer");
    assert!(unpacked_layers(&build).iter().filter(|tree| tree.starts_with(layer)).eq(&unpacked));
    works(&build, &["tag", &name, "localhost/mine:2"]);
    works(&build, &["tag", &digest[..19], "short"]);
    let listed: Value = serde_json::from_str(&works(&build, &["images", "--format=json"])).expect("JSON");
    assert!(listed.to_string().contains("localhost/mine:2"), "{listed}");
    let inspected: Value = serde_json::from_str(&works(&build, &["inspect", "localhost/mine:2"])).expect("JSON");
    assert_eq!(inspected[0]["digest"], digest.as_str());
    assert_eq!(inspected[0]["config"]["os"], "linux");
    let archive = build.path("saved.tar");
    works(&build, &["save", "-o", archive.to_str().expect("text"), "localhost/mine:2"]);
    let output = Command::new("skopeo")
        .arg("inspect")
        .arg(format!("docker-archive:{}:localhost/mine:2", archive.display()))
        .output()
        .expect("these tests need the program skopeo");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    works(&build, &["rmi", "localhost/mine:2", "short", &name]);
    assert_eq!(works(&build, &["images", "-q"]), "");
    assert_eq!(nacre(&build, &["rmi", "short"], None).code, Some(2));
    assert_eq!(nacre(&build, &["inspect", "short"], None).code, Some(2));
    works(&build, &["rmi", "--force", "short"]);
    works(&build, &["prune", "--all"]);
    assert_eq!(fs::read_dir(build.store().join("blobs/sha256")).expect("a directory").count(), 0);
}

#[test]
fn an_image_that_cannot_be_unpacked_is_pulled() {
    let registry = Registry::plain();
    let name = format!("{}/team/owners:1", registry.host);
    let build = Build::new().dockerfile("FROM scratch\nCOPY --chown=2000000000:3 a /a\n").file("a", "1");
    build.flag(format!("-t={name}")).flag("--push").runs();
    let build = Build::new();
    let ended = nacre(&build, &["pull", "-q", &name], None);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    // Whose subordinate ids end before that one. Root has all, and owners are emulated for those without any.
    let unpacked = unpacked_layers(&build).len();
    assert_eq!(ended.stderr.contains("warning: not unpacked"), unpacked == 0, "{}", ended.stderr);
    works(&build, &["save", "-o", build.path("saved.tar").to_str().expect("text"), &name]);
    crate::story::assert_store_is_whole(&build.store());
}

#[test]
fn what_others_pushed_is_read() {
    let registry = Registry::plain();
    registry.add_base();
    let host = &registry.host;
    let dir = tempfile::tempdir().expect("a temporary directory");
    fs::write(dir.path().join("file"), "theirs").expect("a file of our own");
    fs::write(dir.path().join("policy.json"), r#"{"default":[{"type":"insecureAcceptAnything"}]}"#).expect("a file");
    let sh = |script: &str| {
        let output = Command::new("sh").args(["-ec", script]).current_dir(&dir).env("HOST", host).output();
        let output = output.expect("sh runs");
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    };
    // buildah works on files of its own, which takes root or subordinate ids.
    let built = crate::nested::is_root();
    match built {
        true => sh("b() { c=$1; shift; buildah --root $PWD/root --runroot $PWD/run --storage-driver vfs $c \
                $(case $c in from | commit) echo --tls-verify=false --signature-policy policy.json ;; esac) \"$@\"; }
            b from --name c $HOST/library/busybox:1
            b copy c file /theirs
            b commit --format oci c docker://$HOST/team/theirs:oci
            b commit --format docker c docker://$HOST/team/theirs:docker"),
        false => sh("for form in oci v2s2; do
            skopeo --policy policy.json copy --format $form --src-tls-verify=false --dest-tls-verify=false \
                docker://$HOST/library/busybox:1 docker://$HOST/team/theirs:$(echo $form | sed s/v2s2/docker/)
            done"),
    }
    for (tag, media_type) in [("oci", "vnd.oci.image.manifest"), ("docker", "vnd.docker.distribution.manifest.v2")] {
        let name = format!("{host}/team/theirs:{tag}");
        let build = Build::new().dockerfile(&format!("FROM {name}\nRUN cat /theirs > /ours; ls /bin/sh >> /ours\n"));
        assert!(works(&build, &["manifest", "inspect", &name]).contains(media_type), "{tag}");
        works(&build, &["pull", "-q", &name]);
        let expected = if built { "theirs/bin/sh\n" } else { "/bin/sh\n" };
        assert_eq!(build.image().file("/ours"), expected, "{tag}");
        crate::story::assert_store_is_whole(&build.store());
    }
}

/// A certificate for 127.0.0.1 that signs itself, and is an authority, as `openssl req -x509` makes them.
fn certificate(dir: &Path) {
    self_signed(dir, &["subjectAltName=IP:127.0.0.1"]);
}

/// Makes `cert.pem`, a certificate that signs itself, with these extensions, and its `key.pem`.
pub(crate) fn self_signed(dir: &Path, extensions: &[&str]) {
    let status = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"])
        .args(extensions.iter().flat_map(|extension| ["-addext", extension]))
        .arg("-keyout")
        .arg(dir.join("key.pem"))
        .arg("-out")
        .arg(dir.join("cert.pem"))
        .stderr(Stdio::null())
        .status()
        .expect("these tests need the program openssl");
    assert!(status.success());
}

#[test]
fn certificates_are_checked_unless_told_otherwise() {
    let registry = Registry::start("  tls:\n    certificate: DIR/cert.pem\n    key: DIR/key.pem\n", certificate);
    let (host, ca) = (&registry.host, registry.dir.path().join("cert.pem"));
    let ca = ca.to_str().expect("text");
    let build = Build::new().dockerfile("FROM busybox\nCOPY a /a\n").file("a", "1");
    let name = format!("{host}/app:1");
    let build = build.flag(format!("-t={name}"));
    build.runs();
    assert_eq!(nacre(&build, &["push", &name], None).code, Some(5), "nobody vouches for it");
    works(&build, &["push", "--insecure-registry", host, &name]);
    works(&build, &["push", "--tls-ca", ca, &name]);
    // A directory for the host, as docker and podman have it.
    let directory = build.path("home/.docker/certs.d").join(host);
    fs::create_dir_all(&directory).expect("a directory");
    fs::copy(ca, directory.join("ca.crt")).expect("a file");
    works(&build, &["push", &name]);
    fs::write(directory.join("ca.crt"), "nothing").expect("a file");
    let error = nacre(&build, &["push", &name], None);
    assert!(error.code == Some(5) && error.stderr.contains("ca.crt"), "{}", error.stderr);
    let other = Registry::plain();
    let insecure = format!("{}/app:1", other.host);
    works(&build, &["tag", &name, &insecure]);
    works(&build, &["push", "--insecure-registry", &other.host, &insecure]);
    other.check("app:1", &[]);
}

/// `du` of a store, as somebody who may look everywhere in it.
fn du(store: &Path) -> u64 {
    let script = "du -s -B1 \"$1\" | cut -f1";
    let direct = Command::new("sh").args(["-c", script, "sh"]).arg(store).output().expect("sh runs");
    let as_root = |map: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(map).args(["--map-root-user", "sh", "-c", script, "sh"]).arg(store).output().expect("unshare runs")
    };
    let output = match direct.stderr.is_empty() {
        true => direct,
        false => match as_root(&["--map-auto"]) {
            output if output.status.success() => output,
            // Who has no subordinate ids has files of one id only.
            _ => as_root(&[]),
        },
    };
    String::from_utf8_lossy(&output.stdout).trim().parse().expect("a number")
}

#[test]
fn the_cache_is_measured_and_pruned() {
    let build = Build::new()
        .dockerfile(
            "FROM busybox\nCOPY a /a\nRUN mkdir -m 700 /d && cp /a /d/b && chown -R 1000:1000 /d && chmod 0 /d\n",
        )
        .file("a", "1")
        .flag("-t=kept:1");
    build.runs();
    let usage =
        |build: &Build| -> Value { serde_json::from_str(&works(build, &["du", "--format=json"])).expect("JSON") };
    assert_eq!(usage(&build)["total_bytes"], du(&build.store()));
    let records = |build: &Build| usage(build)["kinds"]["records"]["count"].as_u64().unwrap_or(0);
    let before = records(&build);
    build.write("a", "2");
    build.runs();
    assert_eq!(records(&build), before * 2);

    // Nothing is that old.
    works(&build, &["prune", "--filter", "until=24h"]);
    assert_eq!(records(&build), before * 2);
    works(&build, &["prune"]);
    assert_eq!(records(&build), before, "what newer results replaced is gone");
    let again = build.runs();
    assert!(again.ran().iter().all(|step| step.starts_with("[internal]")), "the newest stays: {}", again.stderr);

    let pruned: Value = serde_json::from_str(&works(&build, &["prune", "--all", "--format=json"])).expect("JSON");
    assert_eq!(pruned["left"], Value::Array(Vec::new()), "{pruned}");
    assert!(pruned["freed_bytes"].as_u64().is_some_and(|bytes| bytes > 4096), "{pruned}");
    assert_eq!(records(&build), 0);
    assert_eq!(usage(&build)["total_bytes"], du(&build.store()));
    let status = Command::new("skopeo")
        .args(["--insecure-policy", "copy", "-q"])
        .arg(format!("oci:{}:kept:1", build.store().display()))
        .arg(format!("oci:{}:x", build.path("copy").display()))
        .status()
        .expect("these tests need the program skopeo");
    assert!(status.success(), "an image with a name is whole");
    assert!(!build.runs().ran().is_empty());
    works(&build, &["prune", "--keep-storage", "1"]);
    assert_eq!(records(&build), 0);
    assert_eq!(nacre(&build, &["prune", "--filter", "until=soon"], None).code, Some(2));
    assert_eq!(nacre(&build, &["prune", "--keep-storage", "much"], None).code, Some(2));
}

/// Reads what the program says until these words have come; what was read.
#[track_caller]
fn wait_for_words(child: &mut Child, words: &str) -> String {
    let mut text = Vec::new();
    let stderr = child.stderr.as_mut().expect("a pipe");
    while !String::from_utf8_lossy(&text).contains(words) {
        let mut byte = [0];
        assert_eq!(stderr.read(&mut byte).expect("text"), 1, "no `{words}`: {}", String::from_utf8_lossy(&text));
        text.push(byte[0]);
    }
    String::from_utf8_lossy(&text).into_owned()
}

#[test]
fn pruning_waits_for_builds() {
    let build = Build::new().dockerfile("FROM busybox\nRUN echo it has be''gun; sleep 600\n");
    let quiet = |mut command: Command| {
        let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command.spawn().expect("nacre starts")
    };
    let mut building = quiet(build.command());
    wait_for_words(&mut building, "it has begun");
    let mut prune = Command::new(env!("CARGO_BIN_EXE_nacre"));
    prune.args(["prune", "--all"]).env("NACRE_STORE", build.store());
    let mut pruning = quiet(prune);
    wait_for_words(&mut pruning, "waiting for builds");
    kill_process(Pid::from_child(&building), Signal::INT).expect("it still runs");
    assert_eq!(building.wait().expect("it ends").code(), Some(130));
    assert!(pruning.wait().expect("it ends").success());
}

#[test]
fn what_was_pulled_is_mounted_when_it_is_pushed_elsewhere_in_its_registry() {
    let registry = Registry::plain();
    registry.add_base();
    let host = &registry.host;
    let build = Build::new();
    works(&build, &["pull", "-q", &format!("{host}/library/busybox:1")]);
    works(&build, &["tag", &format!("{host}/library/busybox:1"), &format!("{host}/team/copy:1")]);
    let text = works(&build, &["push", "--format=json", &format!("{host}/team/copy:1")]);
    let pushed: Value = serde_json::from_str(&text).expect("JSON");
    // The layer; the configuration is sent.
    assert_eq!((&pushed[0]["mounted"], &pushed[0]["sent"]), (&Value::from(1), &Value::from(1)), "{pushed}");
    registry.check("team/copy:1", &[]);
}

#[test]
fn mirrors_are_asked_first() {
    let registry = Registry::plain();
    registry.add_base();
    let build = Build::new();
    let mirror = format!("--registry-mirror=registry.test={}", registry.host);
    let digest = works(&build, &["pull", "-q", &mirror, "registry.test/library/busybox:1"]);
    assert!(digest.starts_with("sha256:"), "{digest}");
    let build = Build::new().dockerfile("FROM library/busybox:1\nCOPY Dockerfile /\n");
    // Without a host it is one of Docker Hub.
    build.env("NACRE_REGISTRY_MIRRORS", &registry.host).runs();
    let build = Build::new();
    assert_eq!(nacre(&build, &["pull", "--registry-mirror=nothing=", "x"], None).code, Some(2));
}

#[test]
fn signals_end_commands_with_their_number() {
    // Takes connections and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let host = silent.local_addr().expect("an address").to_string();
    let build = Build::new().dockerfile("FROM busybox\nCOPY Dockerfile /\n").flag(format!("-t={host}/app:1"));
    build.runs();
    let name = format!("{host}/app:1");
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        for args in [&["push", &name][..], &["pull", &name], &["prune", "--all"]] {
            // A build that takes its time.
            let lock = fs::File::options().read(true).write(true).open(build.store().join("lock")).expect("a file");
            lock.lock_shared().expect("nobody else has it");
            // Connections of the command before.
            silent.set_nonblocking(true).expect("a socket");
            while silent.accept().is_ok() {}
            silent.set_nonblocking(false).expect("a socket");
            let mut child = Command::new(env!("CARGO_BIN_EXE_nacre"))
                .args(args)
                .env("NACRE_STORE", build.store())
                .env("HOME", build.path("home"))
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .expect("nacre starts");
            // It listens to signals before it turns to the registry, or waits.
            let mut words = String::new();
            let connection = match args {
                ["prune", ..] => {
                    words = wait_for_words(&mut child, "waiting for builds");
                    None
                }
                _ => Some(silent.accept().expect("a connection")),
            };
            kill_process(Pid::from_child(&child), signal).expect("it still runs");
            let status = child.wait().expect("it ends");
            child.stderr.take().expect("a pipe").read_to_string(&mut words).expect("text");
            drop(connection);
            assert_eq!(status.code(), Some(code), "{args:?}: {words}");
            assert!(words.contains("interrupted"), "{args:?}: {words}");
        }
    }
    crate::story::assert_store_is_whole(&build.store());
}

#[test]
fn archives_of_all_kinds_are_loaded() {
    let source = Build::new().dockerfile("FROM busybox\nCOPY a /a\n").file("a", "loaded");
    let own = source.path("own.tar");
    let mut command = source.command();
    command.args(["-t=app:1", "-t=localhost/other:2"]).arg(format!("--output=type=docker,dest={}", own.display()));
    assert_eq!(run(command, None).code, Some(0));
    let skopeo = |to: &str| {
        let path = source.path("archive").join(to.replace(':', "-"));
        fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        let kind = to.split(':').next().unwrap_or_default();
        let status = Command::new("skopeo")
            .args(["--insecure-policy", "copy", "-q"])
            .arg(format!("docker-archive:{}:app:1", own.display()))
            .arg(format!("{kind}:{}:app:1", path.display()))
            .status()
            .expect("these tests need the program skopeo");
        assert!(status.success());
        path
    };
    let (docker, oci) = (skopeo("docker-archive:x"), skopeo("oci-archive:x"));
    for (path, names) in [(&own, 2), (&docker, 1), (&oci, 1)] {
        let build = Build::new().dockerfile("FROM app:1\nRUN test $(cat /a) = loaded\n");
        let path = path.to_str().expect("text");
        let text = works(&build, &["load", "--format=json", "-i", path]);
        let loaded: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(loaded[0]["names"].as_array().map(Vec::len), Some(names), "{loaded}");
        let unpacked = unpacked_layers(&build);
        assert_eq!(unpacked.len(), 2, "{unpacked:?}");
        build.runs();
        assert!(unpacked_layers(&build).difference(&unpacked).count() <= 1, "but for the step's");
        works(&build, &["prune"]);
        assert!(unpacked_layers(&build).is_superset(&unpacked), "an image with a name stays unpacked");
        works(&build, &["prune", "--all"]);
        assert!(unpacked_layers(&build).is_empty());
        crate::story::assert_store_is_whole(&build.store());
        // From a pipe with a name, which can be opened once.
        let pipe = build.path("pipe");
        assert!(Command::new("mkfifo").arg(&pipe).status().expect("mkfifo runs").success());
        let writer =
            Command::new("timeout").args(["60", "sh", "-c", r#"exec cat "$0" > "$1""#, path]).arg(&pipe).spawn();
        works(&build, &["load", "--tag=piped:1", "-i", pipe.to_str().expect("text")]);
        assert!(writer.expect("timeout runs").wait().expect("it ends").success());
        // From a pipe, compressed, under another name.
        let gzip = Command::new("gzip").arg("-c").arg(path).output().expect("gzip runs").stdout;
        let ended = nacre(&build, &["load", "-q", "--tag=renamed:3"], Some(&gzip));
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let saved = build.path("saved.tar");
        works(&build, &["save", "-o", saved.to_str().expect("text"), "renamed:3"]);
        let again = Build::new();
        works(&again, &["load", "-i", saved.to_str().expect("text")]);
        assert!(works(&again, &["images", "--format=json"]).contains("renamed:3"));
    }
    let build = Build::new();
    let cut = fs::read(&own).expect("a file");
    let ended = nacre(&build, &["load"], Some(&cut[..cut.len() / 2]));
    assert_eq!(ended.code, Some(5), "{}", ended.stderr);
    assert_eq!(nacre(&build, &["load"], Some(b"nothing")).code, Some(5));
    assert_eq!(nacre(&build, &["load", "-i", "/nonexistent"], None).code, Some(2));
    assert_eq!(works(&build, &["images", "-q"]), "");
}

#[test]
fn manifests_are_looked_at_where_they_are() {
    let registry = Registry::plain();
    registry.add_base();
    let build = Build::new();
    let name = format!("{}/library/busybox:1", registry.host);
    let text = works(&build, &["manifest", "inspect", &name]);
    let manifest: Value = serde_json::from_str(&text).expect("JSON");
    assert!(manifest["layers"][0]["digest"].is_string(), "{manifest}");
    let digest = works(&build, &["pull", "-q", &name]);
    let raw = works(&build, &["manifest", "inspect", "--raw", &name]);
    use sha2::Digest;
    let found: String = sha2::Sha256::digest(raw.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(format!("sha256:{found}"), digest.trim());
    let text = works(&build, &["pull", "--format=json", &name]);
    let pulled: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(pulled[0]["digest"], digest.trim());
    let removed: Value = serde_json::from_str(&works(&build, &["rmi", "--format=json", &name])).expect("JSON");
    assert_eq!(removed["removed"][0], name.as_str());
    assert_eq!(nacre(&build, &["manifest", "inspect", &format!("{}/none:1", registry.host)], None).code, Some(5));
}
