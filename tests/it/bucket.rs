//! Caches in buckets, against moto's S3 server. `make test-s3` installs it and runs these.

use crate::proxy::{Fault, Proxy};
use crate::story::Build;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Where `tests/setup/s3.sh` puts it.
const SERVER: &str = "/var/cache/nacre-tests/moto/bin/moto_server";
/// Must never be seen in what the program prints.
const SECRET: &str = "a-secret-that-nobody-sees";

struct Server {
    child: Child,
    host: String,
}

impl Server {
    /// With the bucket `caches`.
    fn start() -> Server {
        assert!(Path::new(SERVER).exists(), "these tests need moto's server: run tests/setup/s3.sh");
        let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
        let child = Command::new(SERVER)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the server starts");
        let server = Server { child, host: format!("127.0.0.1:{port}") };
        for _ in 0..600 {
            if TcpStream::connect(&server.host).is_ok() {
                server.curl(&["-X", "PUT"], "caches");
                return server;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("moto's server did not start");
    }

    #[track_caller]
    fn curl(&self, args: &[&str], path: &str) -> String {
        let url = format!("http://{}/{path}", self.host);
        let signed = ["-sS", "--fail-with-body", "--user", "key:any", "--aws-sigv4", "aws:amz:us-east-1:s3"];
        let output = Command::new("curl").args(signed).args(args).arg(&url).output();
        let output = output.expect("these tests need the program curl");
        assert!(output.status.success(), "{path}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Keys and sizes of the objects.
    fn objects(&self) -> Vec<(String, u64)> {
        let list = self.curl(&[], "caches?list-type=2");
        let part = |text: &str, name: &str| {
            let rest = text.split_once(&format!("<{name}>")).expect(name).1;
            rest.split_once('<').expect("an end").0.to_owned()
        };
        let objects = list.split("<Contents>").skip(1);
        objects.map(|text| (part(text, "Key"), part(text, "Size").parse().expect("a number"))).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Nobody listens there.
const DEAD_PROXY: &str = "http://user:hunter2@127.0.0.1:1";

/// Two stages; the first makes 20 MB, more than goes in one piece.
const DOCKERFILE: &str = "FROM busybox AS builder\nRUN head -c 20000000 /dev/urandom > /big\nCOPY list /list\n\
                          RUN sort /list > /sorted\nFROM busybox\nRUN echo runtime > /runtime\n\
                          COPY --from=builder /sorted /sorted\n";

fn machine() -> Build {
    let build = Build::new().dockerfile(DOCKERFILE).file("list", "b\na\n");
    build.env("AWS_ACCESS_KEY_ID", "").env("AWS_EC2_METADATA_DISABLED", "true")
}

fn attributes(host: &str, name: &str) -> String {
    format!(
        "type=s3,bucket=caches,region=us-east-1,prefix=team/,name={name},endpoint_url=http://{host},use_path_style=true,\
         access_key_id=key,secret_access_key={SECRET}"
    )
}

fn cached(host: &str) -> Build {
    machine().flag(format!("--cache-from={}", attributes(host, "main")))
}

#[test]
fn another_machine_runs_nothing() {
    let server = Server::start();
    let counting = Proxy::start(&server.host, |_, _, _| Fault::None);
    let first = machine().flag(format!("--cache-to={},mode=max", attributes(&counting.host, "main"))).runs();
    assert!(!first.stderr.contains("warning") && !first.stderr.contains(SECRET), "{}", first.stderr);
    let signed = |value: &String| value.starts_with("AWS4-HMAC-SHA256 Credential=key/");
    assert!(counting.seen().iter().all(|seen| seen.headers.get("authorization").is_some_and(signed)));
    assert!(counting.count("PUT", "partNumber=3") == 1, "a large layer goes in parts: {:?}", counting.seen());
    let objects = server.objects();
    assert!(objects.iter().any(|(key, _)| key == "team/nacre/main"), "{objects:?}");
    assert!(objects.iter().all(|(key, _)| key.starts_with("team/")), "{objects:?}");

    // Written again, nothing but the records goes.
    counting.forget();
    let again = machine().flag(format!("--cache-from={}", attributes(&counting.host, "main")));
    let again = again.flag(format!("--cache-to={},mode=max", attributes(&counting.host, "branch")));
    let again = again.runs();
    assert!(again.ran().is_empty(), "{}", again.stderr);
    assert_eq!(counting.count("PUT", "partNumber"), 0, "{:?}", counting.seen());

    // A proxy is for other machines.
    let b = cached(&server.host).env("HTTP_PROXY", DEAD_PROXY).env("NO_PROXY", "");
    let image = b.image();
    assert_eq!(image.ran(), Vec::<String>::new(), "{}", image.stderr);
    assert_eq!((image.file("/sorted"), image.file("/runtime")), ("a\nb\n", "runtime\n"));
    b.write("list", "d\nc\n");
    let image = b.image();
    assert_eq!(image.ran().len(), 3, "{}", image.stderr);
    assert_eq!(image.file("/sorted"), "c\nd\n");
    crate::story::assert_store_is_whole(&b.store());
}

#[test]
fn what_a_bucket_has_lost_is_made_again() {
    let server = Server::start();
    machine().flag(format!("--cache-to={},mode=max", attributes(&server.host, "main"))).runs();
    let (big, _) = server.objects().into_iter().max_by_key(|(_, size)| *size).expect("objects");
    let digest = big.trim_start_matches("team/blobs/").to_owned();
    let path = format!("caches/{}", big.replace(':', "%3A"));
    for damage in [&["-X", "PUT", "--data-binary", "other bytes"][..], &["-X", "DELETE"]] {
        server.curl(damage, &path);
        let edited = cached(&server.host).file("list", "d\nc\n");
        let image = edited.image();
        assert!(image.ran().iter().any(|step| step.contains("urandom")), "{}", image.stderr);
        assert_eq!(image.file("/sorted"), "c\nd\n");
        let warnings: Vec<&str> = image.stderr.lines().filter(|line| line.starts_with("warning")).collect();
        assert_eq!(warnings.len(), 1, "{}", image.stderr);
        assert!(warnings[0].contains("s3://caches/team/nacre/main") && warnings[0].contains(&digest), "{warnings:?}");
    }
}

#[test]
fn a_bucket_that_cannot_be_reached_fails_no_build() {
    let server = Server::start();
    let none = attributes(&server.host, "main").replace("bucket=caches", "bucket=none");
    let nowhere = attributes("127.0.0.1:1", "main");
    let dropping = Proxy::start(&server.host, |_, _, _| Fault::Drop);
    for (target, words) in
        [(none, "NoSuchBucket"), (nowhere, "cannot be had"), (attributes(&dropping.host, "main"), "cannot be had")]
    {
        let build = machine().flag(format!("--cache-from={target}")).flag(format!("--cache-to={target}"));
        let ended = build.runs();
        let warnings: Vec<&str> = ended.stderr.lines().filter(|line| line.starts_with("warning")).collect();
        assert_eq!(warnings.len(), 2, "{}", ended.stderr);
        assert!(warnings[0].contains("is not used") && warnings[1].contains("was not written"), "{warnings:?}");
        assert!(warnings[1].contains(words), "{words}: {warnings:?}");
        assert!(!ended.stderr.contains(SECRET), "{}", ended.stderr);
    }
    // No loopback address.
    let elsewhere = server.host.replace("127.0.0.1", "0.0.0.0");
    let ended = cached(&elsewhere).env("HTTP_PROXY", DEAD_PROXY).env("NO_PROXY", "").runs();
    assert!(ended.stderr.contains("is not used") && !ended.stderr.contains("hunter2"), "{}", ended.stderr);
    let ended = cached(&elsewhere).env("HTTP_PROXY", DEAD_PROXY).env("NO_PROXY", "0.0.0.0/8").runs();
    assert!(ended.stderr.contains("is not used: it does not exist (yet)"), "{}", ended.stderr);
    let first = cached(&server.host).runs();
    assert!(first.stderr.contains("is not used: it does not exist (yet)"), "{}", first.stderr);
    let strict = machine().flag(format!("--cache-to={},ignore-error=false", attributes("127.0.0.1:1", "main")));
    let ended = strict.fails_with(5, &["s3://caches"]);
    assert!(!ended.stderr.contains(SECRET), "{}", ended.stderr);
    let wrong = machine().flag(format!("--cache-to={},colour=red", attributes(&server.host, "main")));
    assert!(!wrong.fails_with(2, &["colour", "secret_access_key=…"]).stderr.contains(SECRET));
}
