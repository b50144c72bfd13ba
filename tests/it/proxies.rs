//! Registries and web servers behind proxies, which the usual variables name.

use crate::proxy::{Fault, Proxy};
use crate::registry::{Registry, nacre_with};
use crate::story::{Build, Ended};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A forward proxy: tunnels (CONNECT), requests with whole addresses, and SOCKS 5. It alone knows where the hosts are.
struct Forward {
    address: String,
    seen: Arc<Log>,
}

/// First lines (`SOCKS HOST:PORT`) and headers of what a proxy was asked.
type Log = Mutex<Vec<(String, BTreeMap<String, String>)>>;
/// Hosts, with ports where they are not the usual ones.
type Map = &'static [&'static str];

impl Forward {
    /// `hosts` are at `place`; `login` is what a client must send (`user:password` in base64), if anything.
    fn start(hosts: Map, place: &str, login: Option<&'static str>) -> Forward {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let seen = Arc::new(Log::default());
        let (place, log) = (place.to_owned(), seen.clone());
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (place, log) = (place.clone(), log.clone());
                // A client that goes away is none of the proxy's business.
                std::thread::spawn(move || drop(forward(client, hosts, &place, login, &log)));
            }
        });
        Forward { address, seen }
    }

    fn lines(&self) -> Vec<String> {
        self.seen.lock().expect("nobody panicked").iter().map(|(line, _)| line.clone()).collect()
    }

    /// What was asked since the last time.
    fn count(&self) -> usize {
        std::mem::take(&mut *self.seen.lock().expect("nobody panicked")).len()
    }
}

fn forward(mut client: TcpStream, hosts: Map, place: &str, login: Option<&str>, log: &Log) -> std::io::Result<()> {
    let mut first = [0];
    client.peek(&mut first)?;
    if first == [5] {
        return socks(client, hosts, place, log);
    }
    let mut reader = BufReader::new(client.try_clone()?);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let line = line.trim_end().to_owned();
        let mut headers = BTreeMap::new();
        for header in reader.by_ref().lines() {
            let header = header?;
            let Some((name, value)) = header.split_once(':') else { break };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        log.lock().expect("nobody panicked").push((line.clone(), headers.clone()));
        let mut words = line.split(' ');
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        let mut body = Vec::new();
        reader.by_ref().take(length).read_to_end(&mut body)?;
        let given = headers.get("proxy-authorization").map(|value| value.trim_start_matches("Basic "));
        if login.is_some() && given != login {
            client.write_all(b"HTTP/1.1 407 Who are you?\r\nProxy-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n")?;
            continue;
        }
        let (host, path) = match target.strip_prefix("http://") {
            Some(rest) => rest.split_at(rest.find('/').unwrap_or(rest.len())),
            None => (target, ""),
        };
        if !hosts.contains(&host) {
            client.write_all(b"HTTP/1.1 502 Not there\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?;
            return Ok(());
        }
        let mut server = TcpStream::connect(place)?;
        if method == "CONNECT" {
            client.write_all(b"HTTP/1.1 200 Connected\r\n\r\n")?;
            return both_ways(client, server);
        }
        // What is for the proxy ends here.
        write!(server, "{method} {path} HTTP/1.1\r\nConnection: close\r\n")?;
        for (name, value) in headers.iter().filter(|(name, _)| !name.starts_with("proxy-") && *name != "connection") {
            write!(server, "{name}: {value}\r\n")?;
        }
        server.write_all(b"\r\n")?;
        server.write_all(&body)?;
        std::io::copy(&mut server, &mut client)?;
        client.shutdown(Shutdown::Both)?;
        return Ok(());
    }
}

fn both_ways(client: TcpStream, server: TcpStream) -> std::io::Result<()> {
    let (mut from, mut to) = (client.try_clone()?, server.try_clone()?);
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
    let (mut from, mut to) = (server, client);
    std::io::copy(&mut from, &mut to)?;
    to.shutdown(Shutdown::Write)
}

/// SOCKS 5 (RFC 1928) without a login, with names only.
fn socks(mut client: TcpStream, hosts: Map, place: &str, log: &Log) -> std::io::Result<()> {
    let mut head = [0; 2];
    client.read_exact(&mut head)?;
    client.read_exact(&mut vec![0; usize::from(head[1])])?;
    client.write_all(&[5, 0])?;
    let mut request = [0; 5];
    client.read_exact(&mut request)?;
    let mut name = vec![0; usize::from(request[4])];
    client.read_exact(&mut name)?;
    let mut port = [0; 2];
    client.read_exact(&mut port)?;
    let host = format!("{}:{}", String::from_utf8_lossy(&name), u16::from_be_bytes(port));
    log.lock().expect("nobody panicked").push((format!("SOCKS {host}"), BTreeMap::new()));
    let is_known = request[..4] == [5, 1, 0, 3] && hosts.contains(&host.as_str());
    client.write_all(&[5, if is_known { 0 } else { 4 }, 0, 1, 0, 0, 0, 0, 0, 0])?;
    if is_known { both_ways(client, TcpStream::connect(place)?) } else { Ok(()) }
}

/// A certificate for names that only the proxy knows.
fn certificate(dir: &Path) {
    crate::registry::self_signed(dir, &["subjectAltName=DNS:registry.example", "basicConstraints=critical,CA:FALSE"]);
}

/// A registry whose certificate is for registry.example.
fn far_registry() -> Registry {
    Registry::start("  tls:\n    certificate: DIR/cert.pem\n    key: DIR/key.pem\n", certificate)
}

const FAR: Map = &["registry.example:443"];
const NEAR: Map = &["registry.example:5000", "files.example"];

/// All variables that name proxies, empty; the test's own may say something.
fn variables<'a>(given: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let names =
        ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"];
    names.into_iter().map(|name| (name, "")).chain(given.iter().copied()).collect()
}

fn with(build: Build, given: &[(&str, &str)]) -> Build {
    variables(given).into_iter().fold(build, |build, (name, value)| build.env(name, value))
}

#[track_caller]
fn fails(ended: &Ended, words: &[&str]) {
    assert_eq!(ended.code, Some(5), "{}", ended.stderr);
    for word in words {
        assert!(ended.stderr.contains(word), "no `{word}` in {}", ended.stderr);
    }
}

#[test]
fn registries_are_reached_through_tunnels() {
    let registry = far_registry();
    let proxy = Forward::start(FAR, &registry.host, None);
    let address = format!("http://{}", proxy.address);
    let ca = registry.dir.path().join("cert.pem").display().to_string();
    let build = Build::new().dockerfile("FROM busybox\nCOPY a /a\n").file("a", "1");
    let build = build.flag("-t=registry.example/team/app:1").flag("--push").flag(format!("--tls-ca={ca}"));
    let build = with(build, &[("HTTPS_PROXY", &address)]);
    build.runs();
    let lines = proxy.lines();
    assert!(!lines.is_empty() && lines.iter().all(|line| line == "CONNECT registry.example:443 HTTP/1.1"), "{lines:?}");
    proxy.count();

    let plain = proxy.address.clone();
    let socks = format!("socks5://{}", proxy.address);
    let dead = "http://127.0.0.1:1";
    let inspect = ["manifest", "inspect", "--tls-ca", &ca, "registry.example/team/app:1"];
    for given in [
        &[("HTTPS_PROXY", plain.as_str())][..],
        &[("https_proxy", &address), ("HTTP_PROXY", dead)],
        &[("HTTPS_PROXY", &address), ("https_proxy", dead), ("ALL_PROXY", dead)],
        &[("ALL_PROXY", &address)],
        &[("all_proxy", &socks)],
    ] {
        let ended = nacre_with(&build, &inspect, &variables(given), None);
        assert_eq!(ended.code, Some(0), "{given:?}: {}", ended.stderr);
        assert!(proxy.count() > 0, "{given:?}");
    }
    let other = Build::new();
    let pull = ["pull", "-q", "--tls-ca", &ca, "registry.example/team/app:1"];
    let ended = nacre_with(&other, &pull, &variables(&[("HTTPS_PROXY", &address)]), None);
    assert!(ended.stdout().starts_with("sha256:"), "{}", ended.stderr);
    // Behind the tunnel it is still the server that has to prove who it is.
    let unknown = ["pull", "registry.example/team/app:1"];
    let ended = nacre_with(&other, &unknown, &variables(&[("HTTPS_PROXY", &address)]), None);
    fails(&ended, &["--tls-ca"]);
    assert!(!ended.stderr.contains(&proxy.address), "{}", ended.stderr);
}

#[test]
fn plain_requests_carry_the_whole_address() {
    let registry = Registry::plain();
    let proxy = Forward::start(NEAR, &registry.host, None);
    let address = format!("http://{}", proxy.address);
    let given = [("HTTP_PROXY", address.as_str()), ("HTTPS_PROXY", &address)];
    let build = Build::new().dockerfile("FROM busybox\nCOPY a /a\n").file("a", "1").flag("--push");
    let build = build.flag("-t=registry.example:5000/team/app:1").flag("--insecure-registry=registry.example:5000");
    with(build, &given).runs();
    let lines = proxy.lines();
    let put = "PUT http://registry.example:5000/v2/team/app/manifests/1 HTTP/1.1";
    assert!(lines.iter().any(|line| line == put), "{lines:?}");
    registry.check("team/app:1", &[]);
    let other = Build::new();
    let pull = ["pull", "-q", "--insecure-registry=registry.example:5000", "registry.example:5000/team/app:1"];
    let ended = nacre_with(&other, &pull, &variables(&given), None);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);

    // A file for ADD.
    let directory = tempfile::tempdir().expect("a temporary directory");
    fs::create_dir_all(directory.path().join("site/http")).expect("a directory");
    fs::write(directory.path().join("site/http/file"), "from afar").expect("a file");
    let server = crate::http::serve(directory.path().to_owned()).expect("a server");
    let proxy = Forward::start(NEAR, server.trim_start_matches("http://"), None);
    let build = Build::new().dockerfile("FROM scratch\nADD http://files.example/site/file /file\n");
    let build = with(build, &[("http_proxy", &proxy.address)]);
    assert_eq!(build.image().file("/file"), "from afar");
    assert_eq!(proxy.lines()[0], "GET http://files.example/site/file HTTP/1.1");
}

#[test]
fn exceptions_and_this_machine_are_reached_directly() {
    let registry = Registry::plain();
    registry.add_base();
    let port = registry.host.trim_start_matches("127.0.0.1:").to_owned();
    let proxy = Forward::start(&[], &registry.host, None);
    let address = format!("http://{}", proxy.address);
    let build = Build::new();
    let inspect = |host: &str, exceptions: &str| {
        let insecure = format!("--insecure-registry={host}");
        let name = format!("{host}/library/busybox:1");
        let given = [("HTTP_PROXY", address.as_str()), ("HTTPS_PROXY", &address), ("no_proxy", exceptions)];
        nacre_with(&build, &["manifest", "inspect", &insecure, &name], &variables(&given), None)
    };
    // The registry listens on 127.0.0.1; 0.0.0.0 leads there and is no loopback address.
    let outside = format!("0.0.0.0:{port}");
    for exceptions in ["0.0.0.0", "example.com, 0.0.0.0/8", "*", &outside] {
        let ended = inspect(&outside, exceptions);
        assert_eq!(ended.code, Some(0), "{exceptions}: {}", ended.stderr);
        assert_eq!(proxy.count(), 0, "{exceptions}");
    }
    for exceptions in ["", "0.0.0.1", "10.0.0.0/8", "0.0.0.0:1"] {
        fails(&inspect(&outside, exceptions), &["through the proxy", &address]);
        assert!(proxy.count() > 0, "{exceptions}");
    }
    for host in [registry.host.clone(), format!("localhost:{port}")] {
        let ended = inspect(&host, "");
        assert_eq!(ended.code, Some(0), "{host}: {}", ended.stderr);
        assert_eq!(proxy.count(), 0, "{host}");
    }
}

/// A web server with TLS that writes down the headers it gets.
struct Listening {
    child: Child,
    host: String,
    headers: std::path::PathBuf,
}

impl Listening {
    fn start(dir: &Path) -> Listening {
        certificate(dir);
        let script = "import http.server, ssl, sys\n\
            class Handler(http.server.BaseHTTPRequestHandler):\n\
            \x20   def do_GET(self):\n\
            \x20       open('headers', 'a').write(str(self.headers))\n\
            \x20       self.send_response(200); self.send_header('Content-Length', '2'); self.end_headers(); self.wfile.write(b'hi')\n\
            server = http.server.HTTPServer(('127.0.0.1', 0), Handler)\n\
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.load_cert_chain('cert.pem', 'key.pem')\n\
            server.socket = context.wrap_socket(server.socket, server_side=True)\n\
            print(server.server_address[1], flush=True)\n\
            server.serve_forever()\n";
        let mut child = Command::new("python3")
            .args(["-c", script])
            .current_dir(dir)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("these tests need the program python3");
        let mut port = String::new();
        BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut port).expect("a port");
        Listening { child, host: format!("127.0.0.1:{}", port.trim()), headers: dir.join("headers") }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// "user:hunter2" in base64.
const LOGIN: &str = "dXNlcjpodW50ZXIy";

#[test]
fn passwords_of_proxies_are_for_proxies_only() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let server = Listening::start(directory.path());
    let tunnel = Forward::start(FAR, &server.host, Some(LOGIN));
    let ca = directory.path().join("cert.pem").display().to_string();
    let address = format!("http://user:hunter2@{}", tunnel.address);
    let build = Build::new().dockerfile("FROM scratch\nADD https://registry.example/file /file\n");
    let build = with(build.flag(format!("--tls-ca={ca}")), &[("HTTPS_PROXY", &address)]);
    let ended = build.runs();
    assert!(!ended.stderr.contains("hunter2") && !ended.stderr.contains(LOGIN), "{}", ended.stderr);
    assert_eq!(tunnel.seen.lock().expect("nobody panicked")[0].1["proxy-authorization"], format!("Basic {LOGIN}"));
    let headers = fs::read_to_string(&server.headers).expect("headers").to_lowercase();
    assert!(headers.contains("user-agent: nacre/") && !headers.contains("authorization"), "{headers}");

    // Who is reached directly does not get it either.
    let registry = Registry::plain();
    registry.add_base();
    let counting = Proxy::start(&registry.host, |_, _, _| Fault::None);
    let proxies = [("HTTP_PROXY", address.as_str()), ("HTTPS_PROXY", &address)];
    let name = format!("{}/library/busybox:1", counting.host);
    let ended = nacre_with(&build, &["pull", &name], &variables(&proxies), None);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let seen = counting.seen();
    assert!(!seen.is_empty() && seen.iter().all(|seen| !seen.headers.contains_key("proxy-authorization")), "{seen:?}");

    // Plain requests: with the login, without it, with another one.
    let plain = Forward::start(NEAR, &registry.host, Some(LOGIN));
    let inspect = |address: &str, host: &str| {
        let insecure = format!("--insecure-registry={host}");
        let name = format!("{host}/library/busybox:1");
        let given = [("HTTP_PROXY", address), ("HTTPS_PROXY", address)];
        nacre_with(&build, &["manifest", "inspect", &insecure, &name], &variables(&given), None)
    };
    let ended = inspect(&format!("http://user:hunter2@{}", plain.address), "registry.example:5000");
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    for (login, forward, host) in [
        ("", &plain, "registry.example:5000"),
        ("user:swordfish@", &plain, "registry.example:5000"),
        ("", &tunnel, "registry.example"),
        ("user:swordfish@", &tunnel, "registry.example"),
    ] {
        let ended = inspect(&format!("http://{login}{}", forward.address), host);
        let shown = format!("the proxy http://{} wants a user and a password (407)", forward.address);
        fails(&ended, &[&shown, "USER:PASSWORD"]);
        assert!(!ended.stderr.contains("swordfish"), "{}", ended.stderr);
    }
}

#[test]
fn a_proxy_that_does_not_help_is_named() {
    let registry = far_registry();
    let refusing = Forward::start(&[], &registry.host, None);
    let name = "registry.example/team/app:1";
    let build = Build::new();
    let pull = |address: &str| {
        let started = std::time::Instant::now();
        let ended = nacre_with(&build, &["pull", name], &variables(&[("HTTPS_PROXY", address)]), None);
        assert!(started.elapsed() < Duration::from_secs(60), "{}", ended.stderr);
        assert!(!ended.stderr.contains("hunter2"), "{}", ended.stderr);
        ended
    };
    let ended = pull(&format!("http://user:hunter2@{}", refusing.address));
    fails(&ended, &[&format!("the proxy http://{} refuses to connect", refusing.address), "NO_PROXY"]);
    let ended = pull("http://user:hunter2@127.0.0.1:1");
    fails(&ended, &["the proxy http://127.0.0.1:1 cannot be reached", "Connection refused"]);
    fails(&pull("socks5://127.0.0.1:1"), &["the proxy socks5h://127.0.0.1:1 cannot be reached"]);
    fails(&pull("ftp://user:hunter2@127.0.0.1:1"), &["invalid address of a proxy `ftp://127.0.0.1:1`", "socks5"]);
    let build = Build::new().dockerfile(&format!("FROM {name}\n"));
    let build = with(build, &[("HTTPS_PROXY", "http://user:hunter2@127.0.0.1:1")]);
    let ended = build.fails_with(5, &["the proxy http://127.0.0.1:1 cannot be reached"]);
    assert!(!ended.stderr.contains("hunter2"), "{}", ended.stderr);
}

#[test]
fn steps_get_proxies_as_build_args_only() {
    let text = "FROM busybox\nRUN env | grep -i proxy | sort > /proxies; true\n";
    let build = || Build::new().dockerfile(text);
    let ambient = [("HTTP_PROXY", "http://127.0.0.1:1"), ("no_proxy", "a.test")];
    assert_eq!(with(build(), &ambient).image().file("/proxies"), "");
    // With a value, and with the one of the environment.
    let given = with(build(), &ambient).flag("--build-arg=https_proxy=http://p:2").flag("--build-arg=HTTP_PROXY");
    let image = given.image();
    let expected = "HTTPS_PROXY=http://p:2\nHTTP_PROXY=http://127.0.0.1:1\nhttp_proxy=http://127.0.0.1:1\nhttps_proxy=http://p:2\n";
    let mut found: Vec<&str> = image.file("/proxies").lines().collect();
    found.sort_unstable();
    assert_eq!(found.join("\n") + "\n", expected);
    let documents = format!("{:?} {:?}", image.record.config, image.record.history).to_lowercase();
    assert!(!documents.contains("p:2") && !documents.contains("127.0.0.1:1"), "{documents}");
    // Nor does another proxy make it run again.
    let again = given.flag("--build-arg=HTTP_PROXY=http://other:3").runs();
    assert!(!again.ran().iter().any(|step| step.contains("RUN")), "{}", again.stderr);
}
