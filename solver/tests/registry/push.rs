//! Pushing: to a real registry, through a proxy that counts and breaks things.

use super::proxy::{BoxedRule, Fault, Proxy};
use super::*;
use nacre_solver::export::put_in_store;
use nacre_solver::push::{PushError, PushImage, PushReport, push, push_ahead};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that do not compress.
pub(super) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// An image in the store: root and sizes of its layers.
pub(super) fn stored(store: &Store, layers: &[Vec<u8>]) -> (PushImage, Assembled) {
    let image = image(store, "amd64", layers);
    let export_image = ExportImage { images: std::slice::from_ref(&image), index: None, names: &[] };
    put_in_store(&export_image, store).unwrap();
    (PushImage::of_store(store, &image.manifest_descriptor).unwrap(), image)
}

pub(super) fn to(host: &str, name: &str) -> RemoteImage {
    RemoteImage::parse(&format!("{host}/{name}")).unwrap()
}

pub(super) fn send(
    image: &PushImage,
    targets: &[RemoteImage],
    context: &SourceContext,
) -> Result<PushReport, PushError> {
    push(image, targets, context, &|_, _, _| (), &|| false)
}

/// skopeo's view of an image.
pub(super) fn skopeo_digest(name: &str, more: &[&str]) -> String {
    let output = Command::new("skopeo")
        .args(["inspect", "--tls-verify=false", "--format={{.Digest}}"])
        .args(more)
        .arg(format!("docker://{name}"))
        .output()
        .expect("these tests need the program skopeo");
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Copies everything, so that skopeo checks every digest.
pub(super) fn skopeo_copies(name: &str) {
    let directory = tempfile::tempdir().unwrap();
    let status = Command::new("skopeo")
        .args(["--insecure-policy", "copy", "-q", "--all", "--src-tls-verify=false"])
        .arg(format!("docker://{name}"))
        .arg(format!("oci:{}:x", directory.path().join("copy").display()))
        .status()
        .unwrap();
    assert!(status.success(), "{name}");
}

#[test]
fn only_what_is_missing_is_sent() {
    let registry = Registry::start("");
    let proxy = Proxy::start(&registry.host, |_, _, _| Fault::None);
    let (_directory, store) = store();
    let context = context(&store, quick());
    let big = tar_of("big", &noise(6 << 20, 1));
    let (one, assembled) = stored(&store, &[big.clone(), tar_of("a", b"1")]);
    let first = send(&one, &[to(&proxy.host, "team/app:1"), to(&proxy.host, "team/app:latest")], &context).unwrap();
    assert_eq!((first.sent, first.present, first.mounted), (3, 0, 0));
    let all: u64 = assembled.layers.iter().map(|layer| layer.size).sum::<u64>() + assembled.config_descriptor.size;
    assert_eq!(proxy.blob_bytes() as u64, all);
    assert_eq!(skopeo_digest(&format!("{}/team/app:1", registry.host), &[]), assembled.manifest_descriptor.digest);
    skopeo_copies(&format!("{}/team/app:latest", registry.host));

    // Nothing new: questions only.
    proxy.forget();
    let again = send(&one, &[to(&proxy.host, "team/app:1")], &context).unwrap();
    assert_eq!((again.sent, again.present), (0, 3));
    assert_eq!((proxy.blob_bytes(), proxy.count("POST", "")), (0, 0));

    // One new layer: that layer and the configuration.
    proxy.forget();
    let (two, changed) = stored(&store, &[big, tar_of("a", b"2")]);
    let report = send(&two, &[to(&proxy.host, "team/app:2")], &context).unwrap();
    assert_eq!((report.sent, report.present), (2, 1));
    let small = changed.layers[1].size + changed.config_descriptor.size;
    assert_eq!(proxy.blob_bytes() as u64, small);
    assert!(small < 1000, "{small}");

    // Into another repository of the same registry, with this one as a sibling: mounted, not sent.
    proxy.forget();
    let targets = [to(&proxy.host, "team/app:2"), to(&proxy.host, "other/app:2")];
    let report = send(&two, &targets, &context).unwrap();
    assert_eq!((report.sent, report.present, report.mounted), (0, 3, 3));
    assert_eq!(proxy.blob_bytes(), 0);
    skopeo_copies(&format!("{}/other/app:2", registry.host));
}

#[test]
fn an_index_is_pushed_with_its_images_and_by_digest() {
    let registry = Registry::start("");
    let (_directory, store) = store();
    let context = context(&store, quick());
    for media in [Media::Oci, Media::Docker] {
        let layers = [[tar_of("a", b"1")], [tar_of("a", b"2")]];
        let images: Vec<_> = ["amd64", "arm64"]
            .iter()
            .zip(&layers)
            .map(|(architecture, layers)| {
                let image = image(&store, architecture, layers);
                let config = serde_json::from_slice(&image.config_bytes).unwrap();
                let pairs: Vec<_> = image.layers.iter().cloned().zip(image.diff_ids.iter().cloned()).collect();
                assemble(config, &pairs, Some(0.into()), media, &Annotations::default())
            })
            .collect();
        let index = assemble_index(&images, media, &BTreeMap::new());
        put_in_store(&ExportImage { images: &images, index: Some(&index), names: &[] }, &store).unwrap();
        let image = PushImage::of_store(&store, &index.1).unwrap();
        assert_eq!(image.manifests.len(), 3);
        send(&image, &[to(&registry.host, "multi:1")], &context).unwrap();
        let raw = Command::new("skopeo")
            .args(["inspect", "--raw", "--tls-verify=false"])
            .arg(format!("docker://{}/multi:1", registry.host))
            .output()
            .unwrap();
        assert_eq!(raw.stdout, index.0);
        skopeo_copies(&format!("{}/multi:1", registry.host));
        let by_digest = format!("{}/by-digest@{}", registry.host, index.1.digest);
        send(&image, &[to(&registry.host, &format!("by-digest@{}", index.1.digest))], &context).unwrap();
        skopeo_copies(&by_digest);
    }
}

#[test]
fn base_layers_are_mounted_without_being_fetched() {
    let registry = Registry::start("");
    let proxy = Proxy::start(&registry.host, |_, _, _| Fault::None);
    let (_directory, store) = store();
    let (base, _) = stored(&store, &[tar_of("base", &noise(2 << 20, 2))]);
    send(&base, &[to(&registry.host, "library/base:1")], &context(&store, quick())).unwrap();

    // Another machine.
    let (_other_directory, other) = self::store();
    let context = context(&other, quick());
    let source = ImageSource::Reference(format!("{}/library/base:1", proxy.host));
    let resolved = Arc::new(resolve_image(&source, &platform("amd64"), &context).unwrap());
    let (mut top, assembled) = stored(&other, &[tar_of("top", b"top")]);
    let layer = resolved.layers[0].clone();
    top.blobs
        .insert(0, nacre_solver::push::PushBlob { descriptor: layer.descriptor.clone(), base: Some((resolved, 0)) });
    let pairs =
        [(layer.descriptor.clone(), layer.diff_id), (assembled.layers[0].clone(), assembled.diff_ids[0].clone())];
    let config = serde_json::from_slice(&assembled.config_bytes).unwrap();
    let whole = assemble(config, &pairs, Some(0.into()), Media::Oci, &Annotations::default());
    other.put_document(&whole.config_bytes).unwrap();
    top.add_blob(nacre_solver::push::PushBlob { descriptor: whole.config_descriptor.clone(), base: None });
    top.manifests = vec![(whole.manifest_descriptor.clone(), whole.manifest_bytes.clone())];
    proxy.forget();
    let report = send(&top, &[to(&proxy.host, "team/top:1")], &context).unwrap();
    assert_eq!(report.mounted, 1);
    assert!(!other.has_blob(&layer.descriptor.digest, None), "the base was fetched");
    assert_eq!(proxy.count("GET", "/blobs/"), 0, "{:?}", proxy.seen());
    assert!(proxy.blob_bytes() < 5000);
    skopeo_copies(&format!("{}/team/top:1", registry.host));

    // Where it cannot be mounted it is fetched and sent.
    let elsewhere = Registry::start("");
    let report = send(&top, &[to(&elsewhere.host, "team/top:1")], &context).unwrap();
    assert_eq!(report.mounted, 0);
    skopeo_copies(&format!("{}/team/top:1", elsewhere.host));
}

/// Counts the first requests of a kind and gives those a fault.
pub(super) fn first(
    times: usize,
    method: &'static str,
    part: &'static str,
    fault: impl Fn() -> Fault + Send + Sync + 'static,
) -> impl Fn(usize, &str, &BTreeMap<String, String>) -> Fault + Send + Sync + 'static {
    let count = AtomicUsize::new(0);
    move |_, line: &str, headers: &BTreeMap<String, String>| {
        let length = headers.get("content-length").map_or(0, String::len);
        let large = !method.starts_with("PA") && !line.starts_with("PUT") || !line.contains("/uploads/") || length > 5;
        let hit = line.starts_with(method) && line.contains(part) && large;
        if hit && count.fetch_add(1, Ordering::SeqCst) < times { fault() } else { Fault::None }
    }
}

#[test]
fn faults_are_survived() {
    let registry = Registry::start("");
    let (_directory, store) = store();
    let context = context(&store, quick());
    let (mut survived, mut injected) = (0, 0);
    let mut check = |name: &str, rule: Box<BoxedRule>| -> Proxy {
        let proxy = Proxy::start(&registry.host, rule);
        let content = noise(3 << 20, survived as u64 * 2 + 10);
        let (image, assembled) = stored(&store, &[tar_of("big", &content)]);
        let report = send(&image, &[to(&proxy.host, &format!("fault/n{survived}:1"))], &context);
        let report = report.unwrap_or_else(|error| panic!("{name}: {error}: {:?}", proxy.seen()));
        assert_eq!(report.sent, 2, "{name}");
        let target = format!("{}/fault/n{survived}:1", registry.host);
        assert_eq!(skopeo_digest(&target, &[]), assembled.manifest_descriptor.digest, "{name}");
        skopeo_copies(&target);
        survived += 1;
        injected += proxy.faults();
        proxy
    };
    let answer = |status: &'static str, headers: &str| {
        let headers = headers.to_owned();
        move || Fault::Answer(status, headers.clone())
    };
    check("dropped question", Box::new(first(2, "HEAD", "/blobs/", || Fault::Drop)));
    check("dropped opening", Box::new(first(2, "POST", "/uploads/", || Fault::Drop)));
    check("lost opening", Box::new(first(1, "POST", "/uploads/", || Fault::LoseAnswer)));
    check("busy opening", Box::new(first(2, "POST", "/uploads/", answer("429 Slow", "Retry-After: 0"))));
    check("broken opening", Box::new(first(2, "POST", "/uploads/", answer("500 Oops", ""))));
    check("dropped upload", Box::new(first(2, "PATCH", "/uploads/", || Fault::Drop)));
    check("busy upload", Box::new(first(2, "PATCH", "/uploads/", answer("429 Slow", "Retry-After: 0"))));
    check("broken upload", Box::new(first(2, "PATCH", "/uploads/", answer("503 Oops", ""))));
    // This registry forgets uploads that broke; those that do not are played by `Keeping`.
    check("cut upload", Box::new(first(1, "PATCH", "/uploads/", || Fault::CutBody(2 << 20))));
    check("upload cut often", Box::new(first(3, "PATCH", "/uploads/", || Fault::CutBody(100_000))));
    check("lost answer", Box::new(first(1, "PATCH", "/uploads/", || Fault::LoseAnswer)));
    let proxy = check(
        "lost last answer",
        Box::new({
            let lost = AtomicUsize::new(0);
            move |_, line, _| match line.starts_with("PUT") && line.contains("/uploads/") {
                true if lost.fetch_add(1, Ordering::SeqCst) < 2 => Fault::LoseAnswer,
                _ => Fault::None,
            }
        }),
    );
    assert!(proxy.blob_bytes() < (4 << 20), "sent twice: {:?}", proxy.seen());
    check("cut answer", Box::new(first(1, "PATCH", "/uploads/", || Fault::CutAnswer(20))));
    check(
        "forgotten upload",
        Box::new(first(
            1,
            "PATCH",
            "/uploads/",
            answer("404 Not Found", "\r\n\r\n{\"errors\":[{\"code\":\"BLOB_UPLOAD_UNKNOWN\"}]}"),
        )),
    );
    check("dropped manifest", Box::new(first(2, "PUT", "/manifests/", || Fault::Drop)));
    check("busy manifest", Box::new(first(2, "PUT", "/manifests/", answer("502 Bad Gateway", ""))));
    let proxy = check(
        "no mounts and no large bodies",
        Box::new(|_, line, headers| {
            let length: usize = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
            if line.starts_with('P') && length > (1 << 20) {
                Fault::Answer("413 Too Large", String::new())
            } else {
                Fault::None
            }
        }),
    );
    assert!(proxy.count("PATCH", "/uploads/") >= 3, "{:?}", proxy.seen());
    let proxy = check(
        "a registry that wants chunks",
        Box::new(first(9, "POST", "/uploads/", || Fault::Header("oci-chunk-min-length", "1000".into()))),
    );
    assert!(proxy.count("PATCH", "/uploads/") >= 1);
    let proxy = check(
        "a broken chunk",
        Box::new({
            let cut = AtomicUsize::new(0);
            move |_, line, headers| {
                let length: usize = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
                match line {
                    _ if line.starts_with('P') && length > (2 << 20) => Fault::Answer("413 Too Large", String::new()),
                    _ if line.starts_with("PATCH") && cut.fetch_add(1, Ordering::SeqCst) == 1 => Fault::CutBody(50_000),
                    _ => Fault::None,
                }
            }
        }),
    );
    assert!(proxy.count("PATCH", "/uploads/") >= 3);
    assert_eq!(survived, 19);
    assert!(injected > 30, "{injected}");
}

/// What a registry has of the one blob that it knows.
#[derive(Default)]
struct Kept {
    bytes: Vec<u8>,
    whole: bool,
    lines: Vec<String>,
}

/// A registry that keeps what it got of a broken upload: every connection ends after `limit` bytes of a body.
fn keeping(limit: usize) -> (String, Arc<Mutex<Kept>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let state = Arc::new(Mutex::new(Kept::default()));
    let kept = state.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            let kept = kept.clone();
            // A client may open a connection and send nothing.
            std::thread::spawn(move || keep(stream, &kept, limit));
        }
    });
    (host, state)
}

fn keep(mut stream: TcpStream, kept: &Mutex<Kept>, limit: usize) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut head = String::new();
    while reader.read_line(&mut head).is_ok_and(|count| count > 2) {}
    if head.is_empty() {
        return;
    }
    let lower = head.to_ascii_lowercase();
    let field = |name: &str| lower.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let length: usize = field("content-length:").and_then(|length| length.parse().ok()).unwrap_or(0);
    let line = head.lines().next().unwrap_or_default().to_owned();
    let range = field("content-range:").map(|range| format!(" range {range}")).unwrap_or_default();
    let mut body = vec![0; length.min(limit)];
    reader.read_exact(&mut body).unwrap();
    let mut state = kept.lock().unwrap();
    state.lines.push(format!("{}{range}", line.split('?').next().unwrap()));
    let location = "Location: /v2/app/blobs/uploads/1?state=x\r\n";
    let there = |bytes: &[u8]| format!("Range: 0-{}\r\n{location}", bytes.len().saturating_sub(1));
    match line.split(' ').next().unwrap() {
        "HEAD" => {
            let length =
                format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", state.bytes.len());
            match state.whole {
                true => drop(stream.write_all(length.as_bytes())),
                false => reply(&mut stream, "404 Not Found", "", b""),
            }
        }
        "POST" => reply(&mut stream, "202 Accepted", location, b""),
        "GET" => {
            let head = format!("HTTP/1.1 204 No Content\r\nConnection: close\r\n{}\r\n", there(&state.bytes));
            let _ = stream.write_all(head.as_bytes());
        }
        "PATCH" => {
            state.bytes.extend(body);
            if length <= limit {
                reply(&mut stream, "202 Accepted", &there(&state.bytes), b"");
            }
        }
        _ => {
            state.whole = line.contains(&sha256(&state.bytes).replace(':', "%3A"));
            reply(&mut stream, if state.whole { "201 Created" } else { "400 Bad Request" }, "", b"");
        }
    }
}

#[test]
fn an_interrupted_upload_goes_on_where_it_broke() {
    let (host, state) = keeping(700_000);
    let directory = tempfile::tempdir().unwrap();
    let content = noise(2_000_000, 77);
    let file = directory.path().join("blob");
    fs::write(&file, &content).unwrap();
    let blob = blob_of(&content);
    let client = Client::new(quick());
    let image = to(&host, "app:1");
    let told = Arc::new(Mutex::new(Vec::new()));
    let progress = told.clone();
    let upload = nacre_solver::registry::BlobUpload {
        image: &image,
        blob: &blob,
        from: None,
        progress: Some(Arc::new(move |bytes| progress.lock().unwrap().push(bytes))),
    };
    let nacre_solver::registry::Opened::Upload(opened) = client.open_upload(&upload).unwrap() else {
        panic!("mounted")
    };
    client.upload(&upload, opened, &file).unwrap();
    assert!(client.has_blob(&upload).unwrap());
    let state = state.lock().unwrap();
    assert!(state.bytes == content, "other bytes");
    let patches: Vec<_> = state.lines.iter().filter(|line| line.starts_with("PATCH")).collect();
    assert_eq!(patches.len(), 3, "{patches:?}");
    assert!(patches[1].contains("range 700000-1999999") && patches[2].contains("range 1400000-1999999"), "{patches:?}");
    assert_eq!(told.lock().unwrap().last(), Some(&2_000_000));
}

#[test]
fn hopeless_faults_end_clearly() {
    let registry = Registry::start("");
    let (_directory, store) = store();
    let context = context(&store, ClientOptions { attempts: 3, ..quick() });
    let (image, _) = stored(&store, &[tar_of("big", &noise(200_000, 5))]);
    let fails = |rule: Box<BoxedRule>, words: &str| {
        let proxy = Proxy::start(&registry.host, rule);
        let error = send(&image, &[to(&proxy.host, "hopeless:1")], &context).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert_eq!(proxy.count("PUT", "/manifests/"), usize::from(words.contains("expected digest sha256")), "{error}");
        proxy
    };
    fails(Box::new(first(99, "PUT", "/uploads/", || Fault::Drop)), "failed");
    fails(Box::new(first(99, "PUT", "/uploads/", || Fault::Answer("500 Oops", String::new()))), "500");
    fails(Box::new(first(99, "HEAD", "/blobs/", || Fault::Answer("403 Forbidden", String::new()))), "denied");
    fails(
        Box::new(first(99, "POST", "/uploads/", || {
            Fault::Answer("400 Bad", "\r\n\r\n{\"errors\":[{\"code\":\"NAME_INVALID\"}]}".into())
        })),
        "NAME_INVALID",
    );
    let wrong = sha256(b"something else");
    fails(
        Box::new(first(99, "PUT", "/manifests/", move || Fault::Header("docker-content-digest", wrong.clone()))),
        "expected digest sha256",
    );
    // A blob that is not what it is called.
    let digest = &image.blobs.iter().max_by_key(|blob| blob.descriptor.size).unwrap().descriptor.digest;
    let path = store.blob_path(digest).unwrap();
    let length = fs::metadata(&path).unwrap().len();
    fs::write(&path, vec![0; length as usize]).unwrap();
    let error = send(&image, &[to(&registry.host, "damaged:1")], &context).unwrap_err().to_string();
    assert!(error.contains("DIGEST_INVALID"), "{error}");
    fs::write(&path, "short").unwrap();
    let error = send(&image, &[to(&registry.host, "damaged:1")], &context).unwrap_err().to_string();
    assert!(error.contains("not in the store"), "{error}");
}

#[test]
fn registries_that_never_answer_a_push_end_it_in_time() {
    let registry = Registry::start("");
    let (_directory, store) = store();
    let limit = Duration::from_millis(500);
    let impatient = ClientOptions { attempts: 3, answer_timeout: limit, data_timeout: limit, ..quick() };
    let context = context(&store, impatient);
    // More than the kernel's buffers take.
    let (image, _) = stored(&store, &[tar_of("big", &noise(16 << 20, 9))]);
    for (method, part) in [("HEAD", "/blobs/"), ("POST", "/uploads/"), ("PATCH", "/uploads/"), ("PUT", "/manifests/")] {
        let proxy = Proxy::start(&registry.host, first(99, method, part, || Fault::Hang));
        let started = std::time::Instant::now();
        let name = format!("hang/{}:1", method.to_lowercase());
        let error = send(&image, &[to(&proxy.host, &name)], &context).unwrap_err().to_string();
        assert!(error.contains("got no answer"), "{method}: {error}");
        assert!(started.elapsed() < Duration::from_secs(60), "{method}: {:?}", started.elapsed());
    }
    // Once is no reason to fail. The registry waits for its disk before it answers.
    let limit = Duration::from_secs(4);
    let patient = ClientOptions { attempts: 3, answer_timeout: limit, data_timeout: limit, ..quick() };
    let context = self::context(&store, patient);
    let proxy = Proxy::start(&registry.host, first(1, "PATCH", "/uploads/", || Fault::Hang));
    send(&image, &[to(&proxy.host, "hang/once:1")], &context).unwrap();
    skopeo_copies(&format!("{}/hang/once:1", registry.host));
}

/// A rule that lets only those in who have a token, and gives tokens to those with a password.
/// The scopes of the tokens given are kept.
pub(super) fn with_tokens(
    scopes: Arc<Mutex<Vec<String>>>,
    lifetime: usize,
) -> impl Fn(usize, &str, &BTreeMap<String, String>) -> Fault + Send + Sync + 'static {
    let uses = Mutex::new(BTreeMap::<String, usize>::new());
    move |_, line, headers| {
        let host = headers.get("host").cloned().unwrap_or_default();
        let authorization = headers.get("authorization").map(String::as_str).unwrap_or_default();
        if let Some(query) = line.split(' ').nth(1).and_then(|path| path.strip_prefix("/token?")) {
            if authorization != "Basic bWU6c2VjcmV0" {
                return Fault::Answer("401 Unauthorized", String::new());
            }
            let mut scopes = scopes.lock().unwrap();
            let asked: Vec<String> = query
                .split('&')
                .filter_map(|pair| pair.strip_prefix("scope="))
                .map(|scope| scope.replace("%3A", ":").replace("%2C", ",").replace("%2F", "/"))
                .collect();
            scopes.push(asked.join(" "));
            let number = scopes.len() - 1;
            return Fault::Answer("200 OK", format!("\r\n\r\n{{\"token\":\"t{number}\"}}"));
        }
        let number = authorization.strip_prefix("Bearer t").and_then(|number| number.parse::<usize>().ok());
        let granted = number.and_then(|number| scopes.lock().unwrap().get(number).cloned()).unwrap_or_default();
        let repository = line
            .split("/v2/")
            .nth(1)
            .and_then(|rest| rest.split(["/blobs", "/manifests"][usize::from(line.contains("/manifests/"))]).next());
        let repository = repository.unwrap_or_default();
        let writes = line.starts_with('P');
        let allowed = granted.split(' ').any(|scope| {
            scope == format!("repository:{repository}:pull,push")
                || !writes && scope == format!("repository:{repository}:pull")
        });
        let mut uses = uses.lock().unwrap();
        let used = uses.entry(authorization.to_owned()).or_insert(0);
        *used += 1;
        if allowed && *used <= lifetime {
            return Fault::None;
        }
        let right = if writes { "pull,push" } else { "pull" };
        Fault::Answer(
            "401 Unauthorized",
            format!(
                "WWW-Authenticate: Bearer realm=\"http://{host}/token\",service=\"test\",scope=\"repository:{repository}:{right}\""
            ),
        )
    }
}

fn config_for(host: &str, directory: &Path) -> ClientOptions {
    let config = directory.join("config.json");
    fs::write(&config, format!("{{\"auths\":{{\"{host}\":{{\"auth\":\"bWU6c2VjcmV0\"}}}}}}")).unwrap();
    ClientOptions { credentials: vec![config], ..quick() }
}

#[test]
fn tokens_for_a_push_have_its_scopes_and_are_renewed() {
    let registry = Registry::start("");
    let directory = tempfile::tempdir().unwrap();
    let scopes = Arc::new(Mutex::new(Vec::new()));
    let proxy = Proxy::start(&registry.host, with_tokens(scopes.clone(), 8));
    let (_store_directory, store) = store();
    let context = context(&store, config_for(&proxy.host, directory.path()));
    let (image, _) = stored(&store, &[tar_of("a", &noise(300_000, 7)), tar_of("b", b"2")]);
    let targets = [to(&proxy.host, "team/app:1"), to(&proxy.host, "team/other:1")];
    let report = send(&image, &targets, &context).unwrap();
    assert_eq!((report.sent, report.mounted), (3, 3));
    let scopes = scopes.lock().unwrap().clone();
    assert!(scopes.len() > 2, "tokens ran out and were renewed: {scopes:?}");
    assert!(scopes.contains(&"repository:team/app:pull,push".to_owned()), "{scopes:?}");
    assert!(scopes.contains(&"repository:team/other:pull,push repository:team/app:pull".to_owned()), "{scopes:?}");
    skopeo_copies(&format!("{}/team/other:1", registry.host));

    // Without a password there is no token, and nothing of the password is in what is said.
    let wrong = context_with_password(&store, &proxy.host, directory.path(), "bWU6d3Jvbmc=");
    let error = format!("{:?}", send(&image, &targets, &wrong).unwrap_err());
    assert!(error.contains("Denied") && !error.contains("wrong") && !error.contains("bWU6"), "{error}");
}

fn context_with_password(store: &Arc<Store>, host: &str, directory: &Path, auth: &str) -> SourceContext {
    let config = directory.join("wrong.json");
    fs::write(&config, format!("{{\"auths\":{{\"{host}\":{{\"auth\":\"{auth}\"}}}}}}")).unwrap();
    context(store, ClientOptions { credentials: vec![config], ..quick() })
}

#[test]
fn a_refusal_in_the_middle_of_an_upload_costs_one_token() {
    let registry = Registry::start("");
    let directory = tempfile::tempdir().unwrap();
    let scopes = Arc::new(Mutex::new(Vec::new()));
    let tokens = with_tokens(scopes.clone(), 1000);
    let refused = AtomicUsize::new(0);
    let proxy = Proxy::start(&registry.host, move |number, line, headers| {
        let large = headers.get("content-length").is_some_and(|length| length.len() > 5);
        if line.starts_with("PUT") && large && refused.fetch_add(1, Ordering::SeqCst) == 0 {
            let host = headers.get("host").cloned().unwrap_or_default();
            return Fault::Answer(
                "401 Unauthorized",
                format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\""),
            );
        }
        tokens(number, line, headers)
    });
    let (_store_directory, store) = store();
    let context = context(&store, config_for(&proxy.host, directory.path()));
    let (image, _) = stored(&store, &[tar_of("a", &noise(300_000, 8))]);
    send(&image, &[to(&proxy.host, "app:1")], &context).unwrap();
    assert!(scopes.lock().unwrap().iter().all(|scope| scope == "repository:app:pull,push"));
    skopeo_copies(&format!("{}/app:1", registry.host));
}

#[test]
fn uploads_elsewhere_get_no_credentials() {
    let registry = Registry::start("");
    let directory = tempfile::tempdir().unwrap();
    let storage = Proxy::start(&registry.host, |_, _, _| Fault::None);
    let scopes = Arc::new(Mutex::new(Vec::new()));
    let tokens = with_tokens(scopes, 1000);
    let (upstream, elsewhere) = (registry.host.clone(), storage.host.clone());
    let proxy = Proxy::start(&registry.host, move |number, line, headers| {
        let fault = tokens(number, line, headers);
        if !matches!(fault, Fault::None) || !line.starts_with("POST") {
            return fault;
        }
        // Opens the upload itself and names the other server for it.
        let mut stream = TcpStream::connect(&upstream).unwrap();
        write!(stream, "POST /v2/app/blobs/uploads/ HTTP/1.1\r\nHost: {elsewhere}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let location = answer.lines().find_map(|line| line.strip_prefix("Location: ")).unwrap().trim().to_owned();
        assert!(location.contains(&elsewhere), "{location}");
        Fault::Answer("202 Accepted", format!("Location: {location}"))
    });
    let (_store_directory, store) = store();
    let context = context(&store, config_for(&proxy.host, directory.path()));
    let (image, _) = stored(&store, &[tar_of("a", &noise(300_000, 9))]);
    send(&image, &[to(&proxy.host, "app:1")], &context).unwrap();
    assert!(storage.count("PUT", "/uploads/") == 2, "{:?}", storage.seen());
    assert!(storage.seen().iter().all(|seen| !seen.headers.contains_key("authorization")));
}

#[test]
#[expect(clippy::disallowed_methods, reason = "PATH is where helpers are looked for")]
fn helpers_keep_credentials() {
    // Helpers are looked up in PATH, which only a process of its own can have changed.
    let directory = tempfile::tempdir().unwrap();
    let helper = directory.path().join("docker-credential-nacretest");
    let state = directory.path().join("state");
    fs::write(&helper, format!(
        "#!/bin/sh\ncase $1 in\nstore) cat > {0} ;;\nget) read -r host; if [ -e {0} ]; then cat {0}; else echo credentials not found in native keychain; exit 1; fi ;;\nerase) rm -f {0} ;;\nesac\n",
        state.display()
    )).unwrap();
    fs::set_permissions(&helper, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let slow = directory.path().join("docker-credential-nacreslow");
    fs::write(&slow, "#!/bin/sh\nexec sleep 30\n").unwrap();
    fs::set_permissions(&slow, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let path = std::env::join_paths(
        std::iter::once(directory.path().to_owned()).chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
    )
    .unwrap();
    if std::env::var_os("NACRE_TEST_HELPERS").is_none() {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "push::helpers_keep_credentials", "--nocapture"])
            .env("NACRE_TEST_HELPERS", directory.path())
            .env("PATH", path)
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    use nacre_solver::registry::auth::Credentials;
    use nacre_solver::registry::{helper, login};
    let second = Duration::from_secs(5);
    // The outer process made the programs.
    let get = || helper::get("nacretest", "h.io", second).unwrap();
    assert_eq!(get(), None);
    let config = directory.path().join("sub/config.json");
    fs::create_dir(directory.path().join("sub")).unwrap();
    fs::write(&config, "{\"credHelpers\":{\"h.io\":\"nacretest\"},\"other\":[1]}").unwrap();
    let credentials = Credentials { user: "me".into(), password: "secret".into(), ..Credentials::default() };
    login::store(&config, "h.io", &credentials, second).unwrap();
    assert_eq!(get(), Some(credentials));
    assert!(!fs::read_to_string(&config).unwrap().contains("secret"));
    assert!(login::erase(&config, "h.io", second).unwrap());
    assert_eq!(get(), None);
    let token = Credentials { identity_token: "refresh".into(), ..Credentials::default() };
    helper::store("nacretest", "h.io", &token, second).unwrap();
    assert_eq!(get(), Some(token));
    let error = helper::get("nacreslow", "h.io", Duration::from_millis(100)).unwrap_err().to_string();
    assert!(error.contains("no answer"), "{error}");
    assert!(helper::get("nacremissing", "h.io", second).unwrap_err().to_string().contains("not installed"));
    assert!(helper::get("../x", "h.io", second).is_err());
}

#[test]
fn what_went_ahead_is_not_asked_for_again() {
    let registry = Registry::start("");
    let proxy = Proxy::start(&registry.host, |_, _, _| Fault::None);
    let (_directory, store) = store();
    let context = context(&store, quick());
    let (mut image, assembled) = stored(&store, &[tar_of("big", &noise(2 << 20, 91)), tar_of("a", b"1")]);
    let target = to(&proxy.host, "team/ahead:1");
    let (sender, blobs) = std::sync::mpsc::channel();
    let ahead = std::thread::scope(|scope| {
        let sending = scope.spawn(|| push_ahead(blobs, &target, &context, &|_, _, _| (), &|| false));
        for blob in image.blobs.clone() {
            sender.send(blob).unwrap();
        }
        // One that nobody has does no harm here; the push itself tells of it.
        let digest = sha256(b"nobody has it");
        let descriptor = Descriptor { digest, size: 5, ..image.blobs[0].descriptor.clone() };
        sender.send(nacre_solver::push::PushBlob { descriptor, base: None }).unwrap();
        drop(sender);
        sending.join().unwrap()
    });
    assert_eq!(ahead.len(), 3);
    proxy.forget();
    image.ahead = ahead;
    let report = send(&image, &[target], &context).unwrap();
    assert_eq!((report.sent, report.present), (3, 0));
    assert_eq!((proxy.count("HEAD", "/blobs/"), proxy.blob_bytes()), (0, 0), "{:?}", proxy.seen());
    assert_eq!(skopeo_digest(&format!("{}/team/ahead:1", registry.host), &[]), assembled.manifest_descriptor.digest);
}
