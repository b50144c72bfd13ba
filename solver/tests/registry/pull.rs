//! Pulling through a proxy that breaks things, through mirrors and through a proxy of the network's.

use super::proxy::{BoxedRule, Fault, Proxy};
use super::push::{noise, send, skopeo_digest, stored, to};
use super::*;
use nacre_solver::registry::{Mirror, Proxies};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Size of the large layer's content.
const LARGE: usize = 3 << 20;

/// A registry with an image of two layers.
fn filled() -> (Registry, Assembled) {
    let registry = Registry::start("");
    let (_directory, store) = store();
    let (image, assembled) = stored(&store, &[tar_of("big", &noise(LARGE, 77)), tar_of("a", b"1")]);
    send(&image, &[to(&registry.host, "team/app:1")], &context(&store, quick())).unwrap();
    (registry, assembled)
}

/// Pulls all of it: both forms of each layer.
fn pull(host: &str, context: &SourceContext) -> Result<(), SourceError> {
    let source = ImageSource::Reference(format!("{host}/team/app:1"));
    let image = resolve_image(&source, &platform("amd64"), context)?;
    ensure_layers(&image, Form::Tree, context)?;
    (0..image.layers.len()).try_for_each(|at| ensure_blob(&image, at, context))
}

/// The first answers to requests of a kind have a fault.
fn first(times: usize, part: &'static str, fault: impl Fn() -> Fault + Send + Sync + 'static) -> Box<BoxedRule> {
    let count = AtomicUsize::new(0);
    Box::new(move |_, line, _| match line.contains(part) && count.fetch_add(1, Ordering::SeqCst) < times {
        true => fault(),
        false => Fault::None,
    })
}

/// Everything under its final name is what the name says, and nothing half done is left.
fn assert_whole(store: &Store, name: &str) {
    for entry in fs::read_dir(store.part("blobs/sha256")).unwrap() {
        let path = entry.unwrap().path();
        let found = sha256(&fs::read(&path).unwrap());
        assert_eq!(found.trim_start_matches("sha256:"), path.file_name().unwrap().to_str().unwrap(), "{name}");
    }
}

#[test]
fn faults_are_survived() {
    let (registry, assembled) = filled();
    let big = assembled.layers[0].digest.clone();
    let (mut survived, mut injected) = (0, 0);
    let mut check = |name: &str, faults: usize, rule: Box<BoxedRule>| -> Proxy {
        let proxy = Proxy::start(&registry.host, rule);
        let (_directory, store) = store();
        let context = context(&store, ClientOptions { data_timeout: Duration::from_millis(1500), ..quick() });
        pull(&proxy.host, &context).unwrap_or_else(|error| panic!("{name}: {error}: {:?}", proxy.seen()));
        assert_whole(&store, name);
        for layer in &assembled.layers {
            assert!(store.has_blob(&layer.digest, Some(layer.size)), "{name}");
        }
        assert!(proxy.faults() >= faults, "{name}: {:?}", proxy.seen());
        survived += 1;
        injected += faults;
        proxy
    };
    let answer = |status: &'static str, headers: &'static str| move || Fault::Answer(status, headers.to_owned());
    for part in ["/manifests/", "/blobs/"] {
        check("dropped", 3, first(3, part, || Fault::Drop));
        check("lost answer", 2, first(2, part, || Fault::LoseAnswer));
        check("too many", 2, first(2, part, answer("429 Slow Down", "Retry-After: 0")));
        check("broken", 3, first(3, part, answer("500 Oops", "")));
        check("not there just now", 2, first(2, part, answer("503 Busy", "Retry-After: 0")));
        check("cut head", 2, first(2, part, || Fault::CutAnswer(30)));
    }
    let big_part: &'static str = Box::leak(format!("/blobs/{big}").into_boxed_str());
    for at in [200, 1000, 70_000, 1 << 20, LARGE] {
        let proxy = check("cut in the middle", 1, first(1, big_part, move || Fault::CutAnswer(at)));
        if at >= 70_000 {
            let ranges = proxy.seen().iter().filter(|seen| seen.headers.contains_key("range")).count();
            assert_eq!(ranges, 1, "cut at {at}: it goes on where it broke");
        }
    }
    check("cut again and again", 4, first(4, big_part, || Fault::CutAnswer(500_000)));
    check("slow", 1, first(1, big_part, || Fault::Slow(64 << 10)));
    let started = std::time::Instant::now();
    check("patience", 1, first(1, big_part, answer("429 Slow Down", "Retry-After: 1")));
    assert!(started.elapsed() >= Duration::from_secs(1), "Retry-After counts");
    // A token that ends in the middle.
    check("401 at a blob", 1, {
        let count = AtomicUsize::new(0);
        Box::new(move |_, line, headers| {
            let host = headers.get("host").cloned().unwrap_or_default();
            if line.contains("/token") {
                return Fault::Answer("200 OK", "\r\n\r\n{\"token\":\"t\"}".to_owned());
            }
            match line.contains("/blobs/") && count.fetch_add(1, Ordering::SeqCst) == 1 {
                true => Fault::Answer(
                    "401 Unauthorized",
                    format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\",service=\"s\""),
                ),
                false => Fault::None,
            }
        })
    });
    assert_eq!((survived, injected), (21, 40));
}

#[test]
fn hopeless_faults_end_clearly_and_leave_nothing_wrong() {
    let (registry, assembled) = filled();
    let big: &'static str = Box::leak(format!("/blobs/{}", assembled.layers[0].digest).into_boxed_str());
    let config: &'static str = Box::leak(format!("/blobs/{}", assembled.config_descriptor.digest).into_boxed_str());
    let mut ended = 0;
    let mut check = |name: &str, part: &'static str, fault: fn() -> Fault, words: &str| {
        let proxy = Proxy::start(&registry.host, first(usize::MAX, part, fault));
        let (_directory, store) = store();
        let context = context(&store, ClientOptions { data_timeout: Duration::from_millis(500), ..quick() });
        let error = pull(&proxy.host, &context).expect_err(name);
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(inner) = cause {
            text = format!("{text}: {inner}");
            cause = inner.source();
        }
        assert!(text.contains(words), "{name}: `{words}` is not in `{text}`");
        assert_whole(&store, name);
        ended += 1;
    };
    check("other bytes in a layer", big, || Fault::Corrupt, "found digest");
    check("other bytes in a configuration", config, || Fault::Corrupt, "found sha256");
    check("other bytes in a manifest", "/manifests/", || Fault::Corrupt, "expected digest");
    check(
        "another digest in the answer",
        "/manifests/",
        || Fault::Header("docker-content-digest", sha256(b"x")),
        "expected digest",
    );
    check("a longer length", big, || Fault::Header("content-length", "9999999999".into()), "of ");
    check("a shorter length", big, || Fault::Header("content-length", "100".into()), "of ");
    check("always cut", big, || Fault::CutAnswer(300), "failed");
    check("always dropped", big, || Fault::Drop, "failed");
    check("always busy", "/manifests/", || Fault::Answer("429 Slow Down", "Retry-After: 0".into()), "429");
    check("always broken", big, || Fault::Answer("500 Oops", String::new()), "500");
    check("not allowed", "/manifests/", || Fault::Answer("403 Forbidden", String::new()), "denied");
    check("gone", big, || Fault::Answer("404 Not Found", String::new()), "no blob");
    check(
        "no registry",
        "/manifests/",
        || Fault::Answer("200 OK", "Content-Type: text/html\r\n\r\n<html>".into()),
        "not usable",
    );
    assert_eq!(ended, 13);
}

#[test]
fn servers_that_trickle_or_never_answer_end_in_time() {
    let (registry, assembled) = filled();
    let big: &'static str = Box::leak(format!("/blobs/{}", assembled.layers[0].digest).into_boxed_str());
    let impatient = || {
        let limit = Duration::from_millis(800);
        ClientOptions { attempts: 3, answer_timeout: limit, data_timeout: limit, ..quick() }
    };
    let check = |name: &str, part: &'static str, fault: fn() -> Fault, words: &str| {
        let proxy = Proxy::start(&registry.host, first(usize::MAX, part, fault));
        let (_directory, store) = store();
        let started = std::time::Instant::now();
        let text = pull(&proxy.host, &context(&store, impatient())).expect_err(name).to_string();
        assert!(text.contains(words), "{name}: {text}");
        // Three attempts of some seconds; by the byte it would be hours.
        assert!(started.elapsed() < Duration::from_secs(60), "{name}: {:?}", started.elapsed());
        assert!(proxy.count("GET", part) <= 9, "{name}: {:?}", proxy.seen());
        assert_whole(&store, name);
    };
    check("a manifest that never comes", "/manifests/", || Fault::Hang, "got no answer");
    check("a layer that never comes", big, || Fault::Hang, "got no answer");
    check("a manifest by the byte", "/manifests/", || Fault::Slow(1), "got no answer");
    check("a layer by the byte", big, || Fault::Trickle(1000), "sent next to nothing");
    check("pieces that get nowhere", big, || Fault::CutAnswer(400), "failed");
    // A slow line that does get somewhere, and a server that answers once the third time.
    let (_directory, store) = store();
    let proxy = Proxy::start(&registry.host, first(2, big, || Fault::Trickle(1 << 20)));
    pull(&proxy.host, &context(&store, impatient())).unwrap();
    let ranges = proxy.seen().iter().filter(|seen| seen.headers.contains_key("range")).count();
    assert_eq!(ranges, 2, "what had come is kept: {:?}", proxy.seen());
}

#[test]
fn mirrors_come_first_and_are_not_needed() {
    let (registry, assembled) = filled();
    let origin = Proxy::start(&registry.host, |_, _, _| Fault::None);
    let mirror_of =
        |host: &str, prefix: &str| Mirror { of: origin.host.clone(), host: host.to_owned(), prefix: prefix.to_owned() };
    let pulled = |mirrors: Vec<Mirror>| {
        let (_directory, store) = store();
        let context = context(&store, ClientOptions { mirrors, ..quick() });
        origin.forget();
        pull(&origin.host, &context).unwrap();
        assert!(store.has_blob(&assembled.layers[0].digest, None));
        origin.seen().len()
    };
    let copy = Proxy::start(&registry.host, |_, _, _| Fault::None);
    assert_eq!(pulled(vec![mirror_of(&copy.host, "")]), 0, "the mirror has all of it");
    assert!(copy.count("GET", "/blobs/") >= 3);

    // A prefix that the mirror does not have, a mirror that is down, and one that only has no blobs.
    assert!(pulled(vec![mirror_of(&copy.host, "elsewhere")]) > 0);
    let down = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    assert!(pulled(vec![mirror_of(&down, "")]) > 0);
    let without = Proxy::start(&registry.host, |_, line, _| match line.contains("/blobs/") {
        true => Fault::Answer("404 Not Found", String::new()),
        false => Fault::None,
    });
    assert!(pulled(vec![mirror_of(&without.host, "")]) > 0);
    assert!(without.count("GET", "/manifests/") > 0);
}

#[test]
fn mirrors_get_their_own_credentials_alone() {
    let (registry, _) = filled();
    let mirror = Proxy::start(&registry.host, |_, _, _| {
        Fault::Answer("401 Unauthorized", "WWW-Authenticate: Basic realm=\"mirror\"".into())
    });
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config.json");
    fs::write(&config, format!("{{\"auths\":{{\"{}\":{{\"auth\":\"bWU6c2VjcmV0\"}}}}}}", registry.host)).unwrap();
    let mirrors = vec![Mirror { of: registry.host.clone(), host: mirror.host.clone(), prefix: String::new() }];
    let (_directory, store) = store();
    pull(&registry.host, &context(&store, ClientOptions { credentials: vec![config], mirrors, ..quick() })).unwrap();
    assert!(!mirror.seen().is_empty());
    assert!(mirror.seen().iter().all(|seen| !seen.headers.contains_key("authorization")), "{:?}", mirror.seen());
}

#[test]
fn proxies_of_the_network_are_used_but_for_exceptions() {
    let registry = Registry::start("");
    let proxy = Proxy::start(&registry.host, |_, _, _| Fault::None);
    let (_directory, store) = store();
    let host = "registry.test:5000";
    let proxies = |exceptions: Option<&str>| Proxies {
        http: Some(format!("http://{}", proxy.host)),
        https: None,
        exceptions: exceptions.map(str::to_owned),
    };
    let options = |exceptions| ClientOptions { insecure: vec![host.into()], proxies: proxies(exceptions), ..quick() };
    let (image, assembled) = stored(&store, &[tar_of("a", b"1")]);
    send(&image, &[to(host, "team/app:1")], &context(&store, options(None))).unwrap();
    assert_eq!(skopeo_digest(&format!("{}/team/app:1", registry.host), &[]), assembled.manifest_descriptor.digest);
    let through = proxy.seen().iter().filter(|seen| seen.line.contains("http://registry.test:5000/v2/")).count();
    assert_eq!(through, proxy.seen().len(), "{:?}", proxy.seen());
    let (_other_directory, other) = self::store();
    pull(host, &context(&other, options(None))).unwrap();
    proxy.forget();
    let patient = ClientOptions { attempts: 1, ..options(Some("registry.test")) };
    assert!(pull(host, &context(&self::store().1, patient)).is_err(), "there is no such host");
    assert_eq!(proxy.seen().len(), 0);
}
