//! Another registry than docker's: the one of go-containerregistry, as `crane registry serve` runs it. It answers otherwise
//! wherever it may: it mounts nothing and opens an upload instead, tells no state of an upload and cancels none, knows
//! only ranges with an end, and has one set of blobs for all repositories.

use crate::proxy::{Fault, Proxy};
use crate::registry::{nacre, works};
use crate::story::{Build, busybox_base};
use serde_json::Value;
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const CRANE: &str = "/var/cache/nacre-tests/crane";

struct Second {
    child: Child,
    host: String,
    _blobs: tempfile::TempDir,
}

impl Second {
    fn start() -> Second {
        for _ in 0..5 {
            let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
            let host = format!("127.0.0.1:{port}");
            let blobs = tempfile::tempdir().expect("a temporary directory");
            let mut child = Command::new(CRANE)
                .args(["registry", "serve", "--address", &host, "--disk"])
                .arg(blobs.path())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("tests/setup/packages.sh fetches crane");
            for _ in 0..200 {
                if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                    return Second { child, host, _blobs: blobs };
                }
                if child.try_wait().expect("a child").is_some() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        panic!("crane did not start");
    }

    /// Has skopeo put the busybox base there.
    fn with_base() -> Second {
        let second = Second::start();
        let base = format!("oci:{}:latest", busybox_base().display());
        skopeo(&["--dest-tls-verify=false", &base, &format!("docker://{}/library/busybox:1", second.host)]);
        second
    }

    /// Has skopeo copy an image, and crane check all that it is made of.
    #[track_caller]
    fn check(&self, name: &str) {
        let name = format!("{}/{name}", self.host);
        let copy = tempfile::tempdir().expect("a temporary directory");
        let to = format!("oci:{}:x", copy.path().join("copy").display());
        skopeo(&["--all", "--src-tls-verify=false", &format!("docker://{name}"), &to]);
        crane(&["validate", "--remote", &name]);
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[track_caller]
fn skopeo(args: &[&str]) {
    let output = Command::new("skopeo").args(["--insecure-policy", "copy", "-q"]).args(args).output();
    let output = output.expect("these tests need the program skopeo");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[track_caller]
fn crane(args: &[&str]) -> String {
    let output = Command::new(CRANE).args(args).output().expect("tests/setup/packages.sh fetches crane");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A base from there, and 3 MB that no compression shrinks.
fn machine(host: &str) -> Build {
    let text = format!(
        "FROM {host}/library/busybox:1 AS builder\n\
         RUN head -c 3000000 /dev/urandom > /big && echo deps > /deps\n\
         COPY list /list\n\
         RUN sort /list > /sorted\n\
         FROM {host}/library/busybox:1\n\
         COPY --from=builder /sorted /big /\n"
    );
    Build::new().dockerfile(&text).file("list", "b\na\n")
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).expect("JSON")
}

#[test]
fn images_go_there_and_come_back() {
    let second = Second::with_base();
    let host = &second.host;
    let a = machine(host).flag(format!("-t={host}/team/app:1")).flag(format!("-t={host}/other/app:2")).flag("--push");
    a.runs();
    second.check("team/app:1");
    let digest = crane(&["digest", &format!("{host}/other/app:2")]);
    assert_eq!(crane(&["digest", &format!("{host}/team/app:1")]), digest);
    assert_eq!(crane(&["ls", &format!("{host}/team/app")]), "1");
    // By tag, by digest, as a base.
    let b = Build::new().dockerfile(&format!("FROM {host}/team/app:1\nRUN test $(head -n 1 /sorted) = a\n"));
    assert_eq!(works(&b, &["pull", "-q", &format!("{host}/team/app:1")]).trim(), digest);
    assert_eq!(works(&b, &["pull", "-q", &format!("{host}/team/app@{digest}")]).trim(), digest);
    b.runs();
    crate::story::assert_store_is_whole(&b.store());
    // What is there is not sent again, and a mount that is none is an upload.
    works(&b, &["tag", &format!("{host}/team/app:1"), &format!("{host}/third/app:1")]);
    let pushed = json(&works(&b, &["push", "--format=json", &format!("{host}/third/app:1")]));
    assert_eq!((&pushed[0]["sent"], &pushed[0]["mounted"]), (&Value::from(0), &Value::from(0)), "{pushed}");
    let empty = Second::start();
    works(&b, &["tag", &format!("{host}/team/app:1"), &format!("{}/team/app:1", empty.host)]);
    works(&b, &["push", &format!("{}/team/app:1", empty.host)]);
    empty.check("team/app:1");

    let manifest = json(&works(&b, &["manifest", "inspect", &format!("{host}/third/app:1")]));
    assert_eq!(manifest["layers"].as_array().map(Vec::len), Some(2), "{manifest}");
    let none = nacre(&b, &["pull", &format!("{host}/team/app:none")], None);
    assert!(none.code == Some(5) && none.stderr.contains("MANIFEST_UNKNOWN"), "{}", none.stderr);
}

#[test]
fn an_index_goes_there_by_digest_and_with_annotations() {
    let second = Second::start();
    let host = &second.host;
    let build = Build::new().dockerfile("FROM scratch\nCOPY a /a\n").file("a", "1");
    let metadata = build.path("meta");
    let build = build
        .flag("--platform=linux/amd64,linux/arm64")
        .flag("--annotation=index:org.example.a=b")
        .flag(format!("--metadata-file={}", metadata.display()))
        .flag(format!("--output=type=image,push=true,push-by-digest=true,name={host}/team/index"));
    build.runs();
    let metadata = json(&std::fs::read_to_string(metadata).expect("a file"));
    let digest = metadata["containerimage.digest"].as_str().expect("a digest");
    second.check(&format!("team/index@{digest}"));
    let index = json(&crane(&["manifest", &format!("{host}/team/index@{digest}")]));
    assert_eq!(index["manifests"].as_array().map(Vec::len), Some(2), "{index}");
    assert_eq!(index["annotations"]["org.example.a"], "b", "{index}");
    // Docker's media types.
    let docker = Build::new().dockerfile("FROM scratch\nCOPY a /a\n").file("a", "1");
    let docker = docker.flag(format!("--output=type=registry,oci-mediatypes=false,name={host}/team/docker:1"));
    docker.runs();
    second.check("team/docker:1");
    let manifest = crane(&["manifest", &format!("{host}/team/docker:1")]);
    assert!(manifest.contains("vnd.docker.distribution.manifest.v2+json"), "{manifest}");
}

#[test]
fn a_cache_there_is_a_cache() {
    let second = Second::with_base();
    let host = &second.host;
    let cache = format!("{host}/team/cache:main");
    let a = machine(host).flag(format!("-t={host}/team/app:a")).flag("--push");
    let first = a.flag(format!("--cache-to=type=registry,ref={cache},mode=max")).runs();
    assert!(!first.stderr.contains("warning"), "{}", first.stderr);
    let b = machine(host).flag(format!("-t={host}/team/app:b")).flag("--push").flag(format!("--cache-from={cache}"));
    let again = b.runs();
    assert_eq!(again.ran(), Vec::<String>::new(), "{}", again.stderr);
    let digest = |tag: &str| crane(&["digest", &format!("{host}/team/app:{tag}")]);
    assert_eq!(digest("a"), digest("b"));
    b.write("list", "d\nc\n");
    let edited = b.runs();
    assert!(edited.ran().iter().any(|step| step.contains("sort")), "{}", edited.stderr);
    assert!(!edited.ran().iter().any(|step| step.contains("urandom")), "{}", edited.stderr);
    second.check("team/app:b");
}

#[test]
fn broken_transfers_end_well() {
    let second = Second::with_base();
    // Every third answer with a blob and every third piece of an upload breaks off.
    let (down, up) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let proxy = Proxy::start(&second.host, move |_, line, _| {
        let is_blob = line.contains("/blobs/sha256:");
        if line.starts_with("GET") && is_blob && down.fetch_add(1, Ordering::Relaxed) % 3 == 0 {
            Fault::CutAnswer(300_000)
        } else if line.starts_with("PATCH") && up.fetch_add(1, Ordering::Relaxed) % 3 == 0 {
            Fault::CutBody(100_000)
        } else {
            Fault::None
        }
    });
    let a = machine(&proxy.host).flag(format!("-t={}/team/app:1", proxy.host)).flag("--push");
    a.runs();
    second.check("team/app:1");
    let whole = |seen: &&crate::proxy::Seen| seen.line.starts_with("PATCH") && seen.body_bytes > 2_900_000;
    let seen = proxy.seen();
    assert!(proxy.count("PATCH", "") >= 2 && seen.iter().any(|seen| whole(&seen)), "{seen:?}");
    proxy.forget();
    let b = Build::new();
    works(&b, &["pull", "-q", &format!("{}/team/app:1", proxy.host)]);
    crate::story::assert_store_is_whole(&b.store());
    let seen = proxy.seen();
    let rest = seen.iter().find(|seen| seen.headers.contains_key("range")).expect("a broken download goes on");
    assert_eq!(rest.status, 206, "{rest:?}");

    // Large bodies are refused: pieces.
    let proxy = Proxy::start(&second.host, |_, line, headers| {
        let length = headers.get("content-length").and_then(|length| length.parse::<usize>().ok()).unwrap_or(0);
        if line.starts_with("PATCH") && length > 2_000_000 {
            Fault::Answer("413 Too Large", String::new())
        } else {
            Fault::None
        }
    });
    let a = machine(&second.host).flag(format!("-t={}/team/pieces:1", proxy.host)).flag("--push");
    a.runs();
    assert!(proxy.seen().iter().any(|seen| seen.headers.contains_key("content-range")), "{:?}", proxy.seen());
    second.check("team/pieces:1");
}
