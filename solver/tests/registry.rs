//! Pulling from and pushing to a real registry (docker-registry on loopback, filled by skopeo), and from servers that misbehave.

#[path = "registry/proxy.rs"]
mod proxy;
#[path = "registry/pull.rs"]
mod pull;
#[path = "registry/push.rs"]
mod push;

use nacre_frontend::image_config::ImageConfig;
use nacre_frontend::llb::{ImageSource, Platform};
use nacre_solver::export::{Dest, ExportImage, Output, export};
use nacre_solver::image::{Annotations, Assembled, Descriptor, Media, assemble, assemble_index};
use nacre_solver::materialize::{Ownership, WriteOptions};
use nacre_solver::op::source::{
    Form, Origin, PullPolicy, SourceContext, SourceError, ensure_blob, ensure_layers, resolve_image,
};
use nacre_solver::registry::auth::Credentials;
use nacre_solver::registry::{Client, ClientOptions, RegistryError, RemoteImage, http_get};
use nacre_solver::store::{Store, blob::sha256};
use nacre_solver::tree::layer::Limits;
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

struct Registry {
    child: Child,
    host: String,
    _directory: tempfile::TempDir,
}

impl Registry {
    fn start(extra: &str) -> Registry {
        for _ in 0..5 {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let directory = tempfile::tempdir().unwrap();
            let config = directory.path().join("config.yml");
            let text = format!(
                "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}/data\nhttp:\n  addr: 127.0.0.1:{port}\n{extra}",
                directory.path().display()
            );
            fs::write(&config, text).unwrap();
            let mut child = Command::new("docker-registry")
                .args(["serve".as_ref(), config.as_os_str()])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("these tests need the program docker-registry");
            for _ in 0..200 {
                if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                    return Registry { child, host: format!("127.0.0.1:{port}"), _directory: directory };
                }
                if child.try_wait().unwrap().is_some() {
                    // Somebody else took the port meanwhile.
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        panic!("docker-registry did not start");
    }

    fn push(&self, layout: &Path, tag: &str, name: &str, credentials: Option<&str>) {
        let mut command = Command::new("skopeo");
        command.args(["--insecure-policy", "copy", "-q", "--all", "--dest-tls-verify=false"]);
        command.args(credentials.map(|credentials| format!("--dest-creds={credentials}")));
        command.arg(format!("oci:{}:{tag}", layout.display())).arg(format!("docker://{}/{name}", self.host));
        assert!(command.status().expect("these tests need the program skopeo").success());
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn store() -> (tempfile::TempDir, Arc<Store>) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("store")).unwrap();
    (directory, Arc::new(store))
}

fn quick() -> ClientOptions {
    ClientOptions { pause: Duration::from_millis(5), ..ClientOptions::default() }
}

fn context(store: &Arc<Store>, options: ClientOptions) -> SourceContext {
    SourceContext {
        store: store.clone(),
        client: Client::new(options),
        pull: PullPolicy::Missing,
        offline: false,
        limits: Limits::default(),
        write: WriteOptions { ownership: Ownership::SingleId },
        progress: None,
        warn: None,
    }
}

fn platform(architecture: &str) -> Platform {
    Platform { os: "linux".into(), architecture: architecture.into(), variant: String::new() }
}

/// A tar with one file.
fn tar_of(name: &str, content: &[u8]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o644);
    header.set_mtime(1000);
    header.set_size(content.len() as u64);
    header.set_uid(0);
    header.set_gid(0);
    builder.append_data(&mut header, name, content).unwrap();
    builder.into_inner().unwrap()
}

fn image(store: &Store, architecture: &str, layers: &[Vec<u8>]) -> Assembled {
    // skopeo would compress what is not compressed, and so change it.
    let layer = |tar: &Vec<u8>| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(tar).unwrap();
        let (digest, size) = store.write_blob(None, &mut encoder.finish().unwrap().as_slice()).unwrap();
        let media_type = "application/vnd.oci.image.layer.v1.tar+gzip".to_owned();
        (Descriptor { media_type, digest, size, ..Descriptor::default() }, sha256(tar))
    };
    let config = ImageConfig { architecture: architecture.into(), os: "linux".into(), ..ImageConfig::default() };
    let layers: Vec<_> = layers.iter().map(layer).collect();
    assemble(config, &layers, Some(0.into()), Media::Oci, &Annotations::default())
}

/// Writes a layout with an index of two platforms, tagged `t`.
fn layout(path: &Path) -> (Vec<Assembled>, Descriptor) {
    let (_directory, store) = store();
    let images = vec![
        image(&store, "amd64", &[tar_of("etc/one", b"1"), tar_of("etc/two", &vec![7; 3 << 20])]),
        image(&store, "arm64", &[tar_of("etc/one", b"1"), tar_of("etc/arm", b"arm")]),
    ];
    let index = assemble_index(&images, Media::Oci, &BTreeMap::new());
    let names = ["localhost/x:t".to_owned()];
    let dest = Dest::Path(path.to_owned());
    let export_image = ExportImage { images: &images, index: Some(&index), names: &names };
    export(&export_image, &store, &Output::Oci { dest: &dest, tar: false }, &mut io::sink()).unwrap();
    let root = index.1.clone();
    (images, root)
}

#[test]
fn an_image_is_pulled_lazily_and_once() {
    let registry = Registry::start("");
    let directory = tempfile::tempdir().unwrap();
    let (_images, root) = layout(&directory.path().join("layout"));
    registry.push(&directory.path().join("layout"), "t", "team/app:1", None);
    let (_store_directory, store) = store();
    let context = context(&store, quick());
    let name = format!("{}/team/app:1", registry.host);
    let source = ImageSource::Reference(name.clone());
    let found = resolve_image(&source, &platform("arm64"), &context).unwrap();
    assert_eq!(found.root_digest, root.digest);
    assert_eq!(found.platform, platform("arm64"));
    assert!(found.layers.iter().all(|layer| !store.has_blob(&layer.descriptor.digest, None)), "nothing is fetched yet");
    let ids = ensure_layers(&found, Form::Index, &context).unwrap();
    assert!(store.layer(&ids[1]).unwrap().get(b"etc/arm").is_some());
    assert!(store.tree_dir(&ids[1]).is_none());
    assert!(found.layers.iter().all(|layer| store.has_blob(&layer.descriptor.digest, Some(layer.descriptor.size))));

    let amd = resolve_image(&source, &platform("amd64"), &context).unwrap();
    let progress = Arc::new(Mutex::new(0));
    let counted = progress.clone();
    let context = SourceContext {
        progress: Some(Arc::new(move |_, received, _| *counted.lock().unwrap() = received)),
        ..context
    };
    let amd_ids = ensure_layers(&amd, Form::Tree, &context).unwrap();
    let tree = store.tree_dir(&amd_ids[1]).unwrap();
    assert_eq!(fs::metadata(tree.join("etc/two")).unwrap().len(), 3 << 20);
    assert_eq!(*progress.lock().unwrap(), amd.layers[1].descriptor.size);
    ensure_blob(&amd, 0, &context).unwrap();

    // With the registry gone, what is known stays usable; with `Always` it does not.
    drop(registry);
    let again = resolve_image(&source, &platform("amd64"), &context).unwrap();
    assert_eq!(again, amd);
    assert_eq!(ensure_layers(&again, Form::Tree, &context).unwrap(), amd_ids);
    let always = SourceContext { pull: PullPolicy::Always, ..context.clone() };
    let error = resolve_image(&source, &platform("amd64"), &always).unwrap_err();
    assert!(matches!(error, SourceError::Registry(RegistryError::Transport { .. })), "{error}");
    let pinned = ImageSource::Reference(format!("{name}@{}", root.digest));
    let offline = SourceContext { offline: true, pull: PullPolicy::Always, ..context };
    assert_eq!(resolve_image(&pinned, &platform("amd64"), &offline).unwrap().manifest_digest, amd.manifest_digest);
}

#[test]
fn a_moved_tag_is_noticed_when_asked() {
    let registry = Registry::start("");
    let directory = tempfile::tempdir().unwrap();
    let (_images, root) = layout(&directory.path().join("layout"));
    registry.push(&directory.path().join("layout"), "t", "app:1", None);
    let (_store_directory, store) = store();
    let missing = context(&store, quick());
    let always = SourceContext { pull: PullPolicy::Always, ..missing.clone() };
    let never = SourceContext { pull: PullPolicy::Never, ..missing.clone() };
    let source = ImageSource::Reference(format!("{}/app:1", registry.host));
    let look = |context: &SourceContext| {
        resolve_image(&source, &platform("amd64"), context).map(|image| image.root_digest).map_err(Box::new)
    };
    assert!(matches!(*look(&never).unwrap_err(), SourceError::NotPulled { .. }));
    assert_eq!(look(&always).unwrap(), root.digest);
    assert_eq!(look(&never).unwrap(), root.digest);

    let (_other_directory, other) = self::store();
    let moved = image(&other, "amd64", &[tar_of("new", b"new")]);
    let names = ["localhost/x:t".to_owned()];
    let dest = Dest::Path(directory.path().join("moved"));
    let moved_image = ExportImage { images: std::slice::from_ref(&moved), index: None, names: &names };
    export(&moved_image, &other, &Output::Oci { dest: &dest, tar: false }, &mut io::sink()).unwrap();
    registry.push(&directory.path().join("moved"), "t", "app:1", None);
    assert_eq!(look(&missing).unwrap(), root.digest);
    assert_ne!(look(&always).unwrap(), root.digest);
    assert_ne!(look(&missing).unwrap(), root.digest);
}

#[test]
fn missing_things_are_named() {
    let registry = Registry::start("");
    let (_store_directory, store) = store();
    let context = context(&store, quick());
    let look = |reference: String| {
        resolve_image(&ImageSource::Reference(reference), &platform("amd64"), &context).unwrap_err().to_string()
    };
    let error = look(format!("{}/no/such:tag", registry.host));
    assert!(
        error.contains(&registry.host) && error.contains("no/such") && error.contains("MANIFEST_UNKNOWN"),
        "{error}"
    );
    assert!(error.contains("manifest tag"), "{error}");
}

#[test]
fn credentials_are_sent_where_they_belong() {
    let directory = tempfile::tempdir().unwrap();
    let passwords = directory.path().join("htpasswd");
    // The password is "secret", as bcrypt.
    fs::write(&passwords, "me:$2b$04$K6fjliXwP7fZicU6OK19p.XN.8dOkcf0DJYHzdem7ACFSgNnePJGa\n").unwrap();
    let registry =
        Registry::start(&format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", passwords.display()));
    let (_images, root) = layout(&directory.path().join("layout"));
    registry.push(&directory.path().join("layout"), "t", "app:1", Some("me:secret"));
    let image = RemoteImage::parse(&format!("{}/app:1", registry.host)).unwrap();
    let error = Client::new(quick()).manifest(&image).unwrap_err();
    assert!(matches!(error, RegistryError::Denied { credentials: false, .. }), "{error}");
    let config = |auth: &str| {
        let path = directory.path().join("config.json");
        fs::write(&path, format!("{{\"auths\":{{\"{}\":{{\"auth\":\"{auth}\"}}}}}}", registry.host)).unwrap();
        Client::new(ClientOptions { credentials: vec![path], ..quick() })
    };
    assert_eq!(config("bWU6c2VjcmV0").manifest(&image).unwrap().1.digest, root.digest);
    let error = config("bWU6d3Jvbmc=").manifest(&image).unwrap_err();
    assert!(matches!(error, RegistryError::Denied { credentials: true, .. }), "{error}");
    assert!(!error.to_string().contains("wrong"));
}

#[test]
fn skopeo_reads_the_store() {
    let (directory, store) = store();
    let image = image(&store, "amd64", &[tar_of("a", b"1")]);
    let names = ["docker.io/library/app:latest".to_owned(), "localhost/app:1".to_owned()];
    let export_image = ExportImage { images: std::slice::from_ref(&image), index: None, names: &names };
    export(&export_image, &store, &Output::Store, &mut io::sink()).unwrap();
    for name in ["app", "app:latest", "docker.io/library/app:latest", "localhost/app:1"] {
        let out = directory.path().join(format!("out-{}", name.replace(['/', ':'], "-")));
        let status = Command::new("skopeo")
            .args(["--insecure-policy", "copy", "-q"])
            .arg(format!("oci:{}:{name}", store.root().display()))
            .arg(format!("oci:{}:x", out.display()))
            .status()
            .expect("these tests need the program skopeo");
        assert!(status.success(), "{name}");
    }
}

#[test]
fn skopeo_reads_exports() {
    let (directory, store) = store();
    let image = image(&store, "amd64", &[tar_of("a", b"1"), tar_of("b", b"2")]);
    let names = ["docker.io/library/app:1".to_owned()];
    let export_image = ExportImage { images: std::slice::from_ref(&image), index: None, names: &names };
    let inspect = |from: String, digest: bool| {
        let output =
            Command::new("skopeo").args(["inspect", &from]).output().expect("these tests need the program skopeo");
        assert!(output.status.success(), "{from}: {}", String::from_utf8_lossy(&output.stderr));
        let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(found["Layers"].as_array().unwrap().len(), 2, "{from}");
        if digest {
            assert_eq!(found["Digest"], image.manifest_descriptor.digest.as_str(), "{from}");
        }
    };
    let dest = Dest::Path(directory.path().join("oci.tar"));
    export(&export_image, &store, &Output::Oci { dest: &dest, tar: true }, &mut io::sink()).unwrap();
    inspect(format!("oci-archive:{}/oci.tar:1", directory.path().display()), true);
    let dest = Dest::Path(directory.path().join("docker.tar"));
    export(&export_image, &store, &Output::Docker { dest: &dest }, &mut io::sink()).unwrap();
    inspect(format!("docker-archive:{}/docker.tar:app:1", directory.path().display()), false);
    let dest = Dest::Path(directory.path().join("layout"));
    export(&export_image, &store, &Output::Oci { dest: &dest, tar: false }, &mut io::sink()).unwrap();
    inspect(format!("oci:{}/layout:1", directory.path().display()), true);
}

// ---- servers that misbehave ----

/// A request's first line and headers, in lower case.
type Request = (String, BTreeMap<String, String>);

/// Serves until dropped: `answer` gets the number of the request and the request, and writes what it likes.
struct Server {
    host: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    fn start(answer: impl Fn(usize, &Request, &mut TcpStream) + Send + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = requests.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let mut first = String::new();
                if reader.read_line(&mut first).unwrap_or(0) == 0 {
                    continue;
                }
                let mut headers = BTreeMap::new();
                let mut length = 0;
                for line in reader.by_ref().lines() {
                    let line = line.unwrap_or_default();
                    let Some((name, value)) = line.split_once(':') else { break };
                    if name.eq_ignore_ascii_case("content-length") {
                        length = value.trim().parse().unwrap_or(0);
                    }
                    headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
                }
                let mut body = vec![0; length];
                let _ = reader.read_exact(&mut body);
                headers.insert("body".into(), String::from_utf8_lossy(&body).into_owned());
                let request = (first.trim().to_owned(), headers);
                let number = seen.lock().unwrap().len();
                seen.lock().unwrap().push(request.clone());
                answer(number, &request, &mut stream);
            }
        });
        Server { host, requests }
    }

    fn lines(&self) -> Vec<String> {
        self.requests.lock().unwrap().iter().map(|(line, _)| line.clone()).collect()
    }

    fn headers(&self, name: &str) -> Vec<Option<String>> {
        self.requests.lock().unwrap().iter().map(|(_, headers)| headers.get(name).cloned()).collect()
    }
}

fn reply(stream: &mut TcpStream, status: &str, headers: &str, body: &[u8]) {
    let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n", body.len());
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(body);
}

fn blob_of(bytes: &[u8]) -> Descriptor {
    Descriptor { digest: sha256(bytes), size: bytes.len() as u64, ..Descriptor::default() }
}

fn read_blob(client: &Client, host: &str, blob: &Descriptor) -> Result<Vec<u8>, RegistryError> {
    let image = RemoteImage::parse(&format!("{host}/app:1")).unwrap();
    let mut bytes = Vec::new();
    client.blob(&image, blob)?.read_limited(u64::MAX - 1, &mut bytes)?;
    Ok(bytes)
}

#[test]
fn a_broken_download_goes_on_where_it_broke() {
    let content: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
    let served = content.clone();
    let server = Server::start(move |_, (_, headers), stream| {
        let start: usize = headers
            .get("range")
            .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix("-399999")?.parse().ok())
            .unwrap_or(0);
        let end = (start + 150_000).min(served.len());
        let (status, range) = match start {
            0 => ("200 OK", String::new()),
            _ => (
                "206 Partial Content",
                format!("Content-Range: bytes {start}-{}/{}\r\n", served.len() - 1, served.len()),
            ),
        };
        let head = format!(
            "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{range}\r\n",
            served.len() - start
        );
        let _ = stream.write_all(head.as_bytes());
        let _ = stream.write_all(&served[start..end]);
    });
    assert_eq!(read_blob(&Client::new(quick()), &server.host, &blob_of(&content)).unwrap(), content);
    assert_eq!(server.lines().len(), 3);
}

#[test]
fn a_server_without_ranges_is_read_again() {
    let content = vec![5; 50_000];
    let served = content.clone();
    let server = Server::start(move |number, _, stream| {
        let head = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", served.len());
        let _ = stream.write_all(head.as_bytes());
        let _ = stream.write_all(&served[..if number == 0 { 20_000 } else { served.len() }]);
    });
    assert_eq!(read_blob(&Client::new(quick()), &server.host, &blob_of(&content)).unwrap(), content);
}

#[test]
fn a_server_that_always_breaks_is_given_up() {
    let server = Server::start(|_, _, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 10\r\n\r\n");
    });
    let options = ClientOptions { attempts: 3, ..quick() };
    assert!(read_blob(&Client::new(options), &server.host, &blob_of(b"0123456789")).is_err());
    assert_eq!(server.lines().len(), 3);
    // Without ranges, much comes each time, and always the same.
    let content = vec![5; 50_000];
    let server = Server::start(|_, _, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 50000\r\n\r\n");
        let _ = stream.write_all(&[5; 20_000]);
    });
    let options = ClientOptions { attempts: 3, ..quick() };
    assert!(read_blob(&Client::new(options), &server.host, &blob_of(&content)).is_err());
    assert_eq!(server.lines().len(), 3);
}

#[test]
fn a_registry_that_refuses_ranges_is_read_again() {
    let content = vec![5; 50_000];
    let served = content.clone();
    let server = Server::start(move |number, (_, headers), stream| match (number, headers.contains_key("range")) {
        (_, true) => reply(stream, "416 Range Not Satisfiable", "", b""),
        (0, _) => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 50000\r\n\r\n");
            let _ = stream.write_all(&served[..20_000]);
        }
        _ => reply(stream, "200 OK", "", &served),
    });
    assert_eq!(read_blob(&Client::new(quick()), &server.host, &blob_of(&content)).unwrap(), content);
    assert_eq!(server.lines().len(), 3);
}

#[test]
fn what_may_succeed_later_is_tried_again() {
    let server = Server::start(|number, _, stream| match number {
        0 => reply(stream, "503 Service Unavailable", "", b""),
        1 => reply(stream, "429 Too Many Requests", "Retry-After: 0\r\n", b""),
        2 => drop(stream.shutdown(std::net::Shutdown::Both)),
        _ => reply(stream, "200 OK", "", b"content"),
    });
    assert_eq!(read_blob(&Client::new(quick()), &server.host, &blob_of(b"content")).unwrap(), b"content");
    let server = Server::start(|_, _, stream| {
        reply(stream, "500 Oops", "", b"{\"errors\":[{\"code\":\"UNKNOWN\",\"message\":\"disk\\nfull\"}]}");
    });
    let error = read_blob(&Client::new(quick()), &server.host, &blob_of(b"x")).unwrap_err().to_string();
    assert!(error.contains("500") && error.contains("UNKNOWN: disk full"), "{error}");
    assert_eq!(server.lines().len(), 5);
    let server = Server::start(|_, _, stream| reply(stream, "400 Bad Request", "", b"not json"));
    assert!(read_blob(&Client::new(quick()), &server.host, &blob_of(b"x")).is_err());
    assert_eq!(server.lines().len(), 1);
}

#[test]
fn silence_ends() {
    let server = Server::start(|_, _, stream| {
        let stream = stream.try_clone().unwrap();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(20));
            drop(stream);
        });
    });
    let options = ClientOptions { answer_timeout: Duration::from_millis(200), attempts: 2, ..quick() };
    let error = read_blob(&Client::new(options), &server.host, &blob_of(b"x")).unwrap_err();
    assert!(matches!(error, RegistryError::Timeout { phase: "answer", .. }), "{error}");
}

#[test]
fn tokens_are_fetched_and_renewed_and_stay_at_home() {
    let elsewhere = Server::start(|_, _, stream| reply(stream, "200 OK", "", b"content"));
    let target = elsewhere.host.clone();
    let server = Server::start(move |number, (line, headers), stream| {
        let host = headers.get("host").cloned().unwrap_or_default();
        if line.contains("/token") {
            return reply(stream, "200 OK", "", format!("{{\"token\":\"t{number}\"}}").as_bytes());
        }
        match headers.get("authorization").map(String::as_str) {
            Some("Bearer t1") if number == 2 => {
                reply(stream, "307 Temporary Redirect", &format!("Location: http://{target}/data?sig=1\r\n"), b"");
            }
            // The first token has expired when it is used again.
            Some("Bearer t4") => reply(stream, "200 OK", "", b"content"),
            _ => {
                let challenge = format!(
                    "WWW-Authenticate: Bearer realm=\"http://{host}/token\",service=\"s\",scope=\"repository:app:pull\"\r\n"
                );
                reply(stream, "401 Unauthorized", &challenge, b"");
            }
        }
    });
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config.json");
    fs::write(&config, format!("{{\"auths\":{{\"{}\":{{\"auth\":\"bWU6c2VjcmV0\"}}}}}}", server.host)).unwrap();
    let client = Client::new(ClientOptions { credentials: vec![config], ..quick() });
    let blob = blob_of(b"content");
    assert_eq!(read_blob(&client, &server.host, &blob).unwrap(), b"content");
    assert_eq!(read_blob(&client, &server.host, &blob).unwrap(), b"content");
    let lines = server.lines();
    assert_eq!(lines.len(), 6, "{lines:?}");
    assert!(lines[1].contains("service=s&scope=repository%3Aapp%3Apull"), "{lines:?}");
    assert_eq!(server.headers("authorization")[1].as_deref(), Some("Basic bWU6c2VjcmV0"));
    assert_eq!(elsewhere.headers("authorization"), [None]);
}

#[test]
fn identity_tokens_are_exchanged() {
    let server = Server::start(|_, (line, headers), stream| {
        let host = headers.get("host").cloned().unwrap_or_default();
        match headers.get("authorization").map(String::as_str) {
            _ if line.starts_with("POST") => reply(stream, "200 OK", "", b"{\"access_token\":\"new\"}"),
            Some("Bearer new") => reply(stream, "200 OK", "", b"content"),
            _ => reply(
                stream,
                "401 Unauthorized",
                &format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\"\r\n"),
                b"",
            ),
        }
    });
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config.json");
    fs::write(&config, format!("{{\"auths\":{{\"{}\":{{\"identitytoken\":\"refresh me\"}}}}}}", server.host)).unwrap();
    let client = Client::new(ClientOptions { credentials: vec![config], ..quick() });
    assert_eq!(read_blob(&client, &server.host, &blob_of(b"content")).unwrap(), b"content");
    let bodies = server.headers("body");
    assert!(bodies[1].as_deref().is_some_and(|body| body.contains("refresh_token=refresh+me")), "{bodies:?}");
}

#[test]
fn a_login_gets_an_identity_token_where_there_is_one() {
    let server = Server::start(|_, (line, headers), stream| {
        let host = headers.get("host").cloned().unwrap_or_default();
        match line.starts_with("POST /token") {
            true => reply(stream, "200 OK", "", b"{\"access_token\":\"a\",\"refresh_token\":\"keep me\"}"),
            false => reply(
                stream,
                "401 Unauthorized",
                &format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\",service=\"s\"\r\n"),
                b"",
            ),
        }
    });
    let credentials = Credentials { user: "me".into(), password: "a&b".into(), ..Credentials::default() };
    let client = Client::new(quick());
    assert_eq!(client.identity_token(&server.host, &credentials).as_deref(), Some("keep me"));
    let body = server.headers("body").into_iter().flatten().last().unwrap();
    for part in ["grant_type=password", "access_type=offline", "service=s", "username=me", "password=a%26b"] {
        assert!(body.contains(part), "{body}");
    }
    // One that asks for a password with every request, one that knows no such tokens, and none at all.
    for challenge in ["Basic realm=\"x\"", "Bearer realm=\"http://127.0.0.1:1/token\"", ""] {
        let header = format!("WWW-Authenticate: {challenge}\r\n");
        let server = Server::start(move |_, _, stream| reply(stream, "401 Unauthorized", &header, b""));
        assert_eq!(client.identity_token(&server.host, &credentials), None, "{challenge}");
    }
}

#[test]
fn redirects_end() {
    let server = Server::start(|_, (_, headers), stream| {
        let host = headers.get("host").cloned().unwrap_or_default();
        reply(stream, "302 Found", &format!("Location: http://{host}/again?secret=1\r\n"), b"");
    });
    let error = read_blob(&Client::new(quick()), &server.host, &blob_of(b"x")).unwrap_err();
    assert!(matches!(error, RegistryError::Redirect { .. }), "{error}");
    assert!(!error.to_string().contains("secret"));
    assert_eq!(server.lines().len(), 11);
    let server = Server::start(|_, _, stream| reply(stream, "302 Found", "Location: file:///etc/passwd\r\n", b""));
    let error = read_blob(&Client::new(quick()), &server.host, &blob_of(b"x")).unwrap_err();
    assert!(matches!(error, RegistryError::Redirect { .. }), "{error}");
}

#[test]
fn lies_are_found_out() {
    let manifest = b"{\"schemaVersion\":2}".to_vec();
    let server = Server::start(move |_, (line, _), stream| {
        if line.contains("/blobs/") {
            // Right in length, wrong in content.
            return reply(stream, "200 OK", "", &[0; 100]);
        }
        let headers =
            "Docker-Content-Digest: sha256:0000000000000000000000000000000000000000000000000000000000000000\r\n";
        reply(stream, "200 OK", headers, &manifest);
    });
    let client = Client::new(quick());
    let image = RemoteImage::parse(&format!("{}/app:1", server.host)).unwrap();
    assert!(matches!(client.manifest(&image), Err(RegistryError::DigestMismatch { .. })));
    let pinned = RemoteImage { digest: Some(sha256(b"other")), ..image };
    assert!(matches!(client.manifest(&pinned), Err(RegistryError::DigestMismatch { .. })));
    let short = Descriptor { digest: sha256(b"x"), size: 5, ..Descriptor::default() };
    assert!(read_blob(&client, &server.host, &short).is_err(), "another length than the descriptor's");

    // Through the whole way: nothing of the wrong layer stays.
    let (_directory, store) = store();
    let context = context(&store, quick());
    let (_other, other) = self::store();
    let assembled = self::image(&other, "amd64", &[tar_of("a", b"1")]);
    store.put_document(&assembled.config_bytes).unwrap();
    store.put_document(&assembled.manifest_bytes).unwrap();
    let name = format!("{}/app@{}", server.host, assembled.manifest_descriptor.digest);
    let mut found = resolve_image(&ImageSource::Reference(name), &platform("amd64"), &context).unwrap();
    assert!(matches!(found.origin, Origin::Registry(_)));
    found.layers[0].descriptor.size = 100;
    let error = ensure_layers(&found, Form::Tree, &context).unwrap_err();
    assert!(matches!(error, SourceError::BlobMismatch { .. }), "{error}");
    assert!(ensure_blob(&found, 0, &context).is_err());
    assert!(!store.has_blob(&found.layers[0].descriptor.digest, None));
    assert_eq!(fs::read_dir(store.part("layers")).unwrap().count(), 0);
}

#[test]
fn files_are_fetched_and_asked_after() {
    let server = Server::start(|number, (line, headers), stream| {
        if line.contains("/missing") {
            return reply(stream, "404 Not Found", "", b"");
        }
        if line.contains("/moved") {
            return reply(stream, "302 Found", "Location: /files/a.txt\r\n", b"");
        }
        match headers.get("if-none-match").map(String::as_str) {
            Some("\"v1\"") if number < 3 => reply(stream, "304 Not Modified", "", b""),
            _ => {
                let text = if number < 3 { "one" } else { "two" };
                let etag = if number < 3 { "v1" } else { "v2" };
                let headers = format!("ETag: \"{etag}\"\r\nLast-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\n");
                reply(stream, "200 OK", &headers, text.as_bytes());
            }
        }
    });
    let (_directory, store) = store();
    let client = Client::new(quick());
    let url = format!("http://{}/files/a.txt?x=1#fragment", server.host);
    let get = |checksum: Option<&str>, offline| http_get(&store, &client, &url, checksum, offline);
    let file = get(None, false).unwrap();
    assert_eq!(fs::read(&file.path).unwrap(), b"one");
    assert_eq!((file.file_name.as_str(), file.last_modified), ("a.txt", Some(1_445_412_480)));
    assert_eq!(get(None, false).unwrap(), file);
    assert_eq!(server.headers("if-none-match"), [None, Some("\"v1\"".to_owned())]);
    assert_eq!(get(Some(&sha256(b"one")), false).unwrap(), file, "the checksum says that it is the one");
    assert_eq!(get(None, true).unwrap(), file);
    assert_eq!(server.lines().len(), 2);
    let error = get(Some(&sha256(b"three")), false).unwrap_err();
    assert!(matches!(&error, RegistryError::DigestMismatch { .. }), "{error}");
    let two = get(Some(&sha256(b"two")), false).unwrap();
    assert_eq!(fs::read(two.path).unwrap(), b"two");
    let sha512 = format!("sha512:{}", "0".repeat(128));
    assert!(matches!(get(Some(&sha512), false), Err(RegistryError::DigestMismatch { .. })));
    assert!(matches!(get(Some(&sha512), true), Err(RegistryError::Offline { .. })));
    let error = http_get(&store, &client, &format!("http://{}/missing", server.host), None, false).unwrap_err();
    assert!(matches!(error, RegistryError::Status { status: 404, .. }), "{error}");
    let moved = http_get(&store, &client, &format!("http://{}/moved", server.host), None, false).unwrap();
    assert_eq!(moved.file_name, "moved");
    for bad in ["ftp://me:secret@x/y", "nonsense", "http://"] {
        let error = http_get(&store, &client, bad, None, false).unwrap_err();
        assert!(matches!(error, RegistryError::BadUrl { .. }) && !error.to_string().contains("secret"), "{error}");
    }
}

#[test]
fn passwords_in_addresses_stay_with_their_host() {
    let elsewhere = Server::start(|_, _, stream| reply(stream, "200 OK", "", b"content"));
    let target = elsewhere.host.clone();
    let server = Server::start(move |_, _, stream| {
        reply(stream, "302 Found", &format!("Location: http://{target}/data\r\n"), b"");
    });
    let (_directory, store) = store();
    let client = Client::new(quick());
    http_get(&store, &client, &format!("http://me:se%63ret@{}/x", server.host), None, false).unwrap();
    assert_eq!(server.headers("authorization"), [Some("Basic bWU6c2VjcmV0".to_owned())]);
    assert_eq!(elsewhere.headers("authorization"), [None]);
    let memo = fs::read_dir(store.part("http")).unwrap().next().unwrap().unwrap().path();
    assert!(!fs::read_to_string(memo).unwrap().contains("ret@"), "no password is written down");
}
