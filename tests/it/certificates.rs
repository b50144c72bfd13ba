//! Registries that want to see a certificate of their clients (mutual TLS).

use crate::registry::{Registry, nacre, works};
use crate::story::{Build, Ended};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// An authority, a server's certificate by it, and two clients': `client` by it, `stranger` by nobody.
fn certificates(dir: &Path) {
    let openssl = |line: &str| {
        let status = Command::new("openssl")
            .args(line.split(' '))
            .current_dir(dir)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .expect("these tests need the program openssl");
        assert!(status.success(), "{line}");
    };
    let new = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2";
    openssl(&format!("req -x509 {new} -subj /CN=authority -keyout ca.key -out ca.crt"));
    for (name, more) in
        [("server", "-addext subjectAltName=IP:127.0.0.1"), ("client", "-addext keyUsage=digitalSignature")]
    {
        openssl(&format!("req {new} -subj /CN={name} {more} -keyout {name}.key -out {name}.csr"));
        let sign = "x509 -req -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -copy_extensions copy";
        openssl(&format!("{sign} -in {name}.csr -out {name}.crt"));
    }
    openssl(&format!("req -x509 {new} -subj /CN=stranger -keyout stranger.key -out stranger.crt"));
    openssl("ec -in client.key -aes128 -passout pass:word -out encrypted.key");
}

/// A registry that wants certificates, and an image in a store that knows its authority.
struct Fixture {
    registry: Registry,
    build: Build,
    name: String,
}

impl Fixture {
    fn new() -> Fixture {
        let tls =
            "  tls:\n    certificate: DIR/server.crt\n    key: DIR/server.key\n    clientcas:\n      - DIR/ca.crt\n";
        let registry = Registry::start(tls, certificates);
        let name = format!("{}/team/app:1", registry.host);
        let build = Build::new().dockerfile("FROM busybox\nCOPY a /a\n").file("a", "1").flag(format!("-t={name}"));
        build.runs();
        let fixture = Fixture { registry, build, name };
        fixture.put(&[("ca.crt", "ca.crt")]);
        fixture
    }

    fn made(&self, file: &str) -> PathBuf {
        self.registry.dir.path().join(file)
    }

    fn directory(&self) -> PathBuf {
        self.build.path("home/.docker/certs.d").join(&self.registry.host)
    }

    /// Makes the host's directory hold these files (name there, file that was made) and no others.
    fn put(&self, files: &[(&str, &str)]) {
        let directory = self.directory();
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).expect("a directory");
        for (name, file) in files {
            fs::copy(self.made(file), directory.join(name)).expect("a file");
        }
    }

    fn push(&self) -> Ended {
        nacre(&self.build, &["push", &self.name], None)
    }

    /// A push fails with these words.
    #[track_caller]
    fn fails_with(&self, words: &[&str]) {
        let ended = self.push();
        assert_eq!(ended.code, Some(5), "{}", ended.stderr);
        for word in words {
            assert!(ended.stderr.contains(word), "no `{word}` in {}", ended.stderr);
        }
    }
}

const PAIR: [(&str, &str); 3] = [("ca.crt", "ca.crt"), ("client.cert", "client.crt"), ("client.key", "client.key")];

#[test]
fn clients_show_their_certificate() {
    let fixture = Fixture::new();
    fixture.put(&PAIR);
    works(&fixture.build, &["push", &fixture.name]);
    // As podman has it, a chain and a key of the old form; a base image and a push in one build.
    let other = Build::new().dockerfile(&format!("FROM {}\nCOPY b /b\n", fixture.name)).file("b", "2");
    let directory = other.path("home/.config/containers/certs.d").join(&fixture.registry.host);
    fs::create_dir_all(&directory).expect("a directory");
    fs::copy(fixture.made("ca.crt"), directory.join("ca.crt")).expect("a file");
    let read = |file: &str| fs::read_to_string(fixture.made(file)).expect("a file");
    fs::write(directory.join("me.cert"), read("client.crt") + &read("ca.crt")).expect("a file");
    fs::copy(fixture.made("client.key"), directory.join("me.key")).expect("a file");
    let home = other.path("home").display().to_string();
    let other = other.env("HOME", &home).flag(format!("-t={}/team/app:2", fixture.registry.host)).flag("--push");
    other.runs();
    let found = works(&other, &["manifest", "inspect", &format!("{}/team/app:2", fixture.registry.host)]);
    assert_eq!(found.matches("image.layer.v1").count(), 3, "{found}");
    // The same directory serves skopeo.
    let inspect = Command::new("skopeo")
        .args(["inspect", "--cert-dir"])
        .arg(&directory)
        .arg(format!("docker://{}/team/app:2", fixture.registry.host))
        .output()
        .expect("these tests need the program skopeo");
    assert!(inspect.status.success(), "{}", String::from_utf8_lossy(&inspect.stderr));
    // A server that is not checked is shown it, too.
    fixture.put(&PAIR[1..]);
    works(&fixture.build, &["push", "--insecure-registry", &fixture.registry.host, &fixture.name]);
}

#[test]
fn who_has_no_certificate_is_told_where_it_belongs() {
    let fixture = Fixture::new();
    let directory = fixture.directory().display().to_string();
    fixture.fails_with(&["wants a client certificate", &directory, "help: put it there as client.cert", "client.key"]);
    // Without a directory, the authority named by a flag.
    fs::remove_dir_all(fixture.directory()).expect("a directory");
    let ca = fixture.made("ca.crt").display().to_string();
    let flags: [&[&str]; 2] = [&["--tls-ca", &ca], &["--insecure-registry", &fixture.registry.host]];
    for flag in flags {
        let ended = nacre(&fixture.build, &[&["push"], flag, &[&fixture.name]].concat(), None);
        assert_eq!(ended.code, Some(5), "{flag:?}: {}", ended.stderr);
        assert!(ended.stderr.contains("wants a client certificate"), "{flag:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(&directory), "{flag:?}: {}", ended.stderr);
    }
    // A base image in a build.
    fixture.put(&[("ca.crt", "ca.crt")]);
    let home = fixture.build.path("home").display().to_string();
    let build = Build::new().dockerfile(&format!("FROM {}/none:1\n", fixture.registry.host)).env("HOME", &home);
    build.fails_with(5, &["wants a client certificate", &directory]);
}

#[test]
fn what_is_no_pair_is_named() {
    let fixture = Fixture::new();
    let ca = ("ca.crt", "ca.crt");
    fixture.put(&[ca, ("client.cert", "client.crt"), ("client.key", "stranger.key")]);
    fixture.fails_with(&["client.key", "not the key of client.cert"]);
    fixture.put(&[ca, ("client.cert", "client.crt")]);
    fixture.fails_with(&["client.cert", "without its key, client.key beside it"]);
    fixture.put(&[ca, ("client.key", "client.key")]);
    fixture.fails_with(&["client.key", "without its certificate, client.cert beside it"]);
    fixture.put(&[ca, ("client.cert", "client.key"), ("client.key", "client.key")]);
    fixture.fails_with(&["client.cert", "no certificates in PEM"]);
    fixture.put(&[ca, ("client.cert", "client.crt"), ("client.key", "client.crt")]);
    fixture.fails_with(&["client.key", "no private key in PEM"]);
    fixture.put(&[ca, ("client.cert", "client.crt"), ("client.key", "encrypted.key")]);
    fixture.fails_with(&["client.key", "the key has a passphrase"]);
    // Nobody, root included, can read this as a file.
    fixture.put(&[ca, ("client.cert", "client.crt")]);
    fs::create_dir(fixture.directory().join("client.key")).expect("a directory");
    fixture.fails_with(&["client.key", "Is a directory"]);
    // It is the server that nobody vouches for.
    fixture.put(&[("ca.crt", "stranger.crt"), PAIR[1], PAIR[2]]);
    let started = std::time::Instant::now();
    fixture.fails_with(&["invalid peer certificate", "--tls-ca FILE", "--insecure-registry"]);
    assert!(started.elapsed() < std::time::Duration::from_secs(4), "that gets no better with time");
    // A pair, but of somebody else.
    fixture.put(&[ca, ("client.cert", "stranger.crt"), ("client.key", "stranger.key")]);
    fixture.fails_with(&["does not take the client certificate", "client.cert"]);
}
