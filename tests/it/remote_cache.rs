//! Two stores as two machines that share a cache through a registry, a directory or an image.

use crate::bases::Layout;
use crate::proxy::{Fault, Proxy};
use crate::registry::Registry;
use crate::story::{Build, Ended};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Two stages on a base from the registry; the first makes 3 MB that no compression shrinks.
fn dockerfile(host: &str) -> String {
    format!(
        "FROM {host}/library/busybox:1 AS builder\n\
         RUN head -c 3000000 /dev/urandom > /big && echo deps > /deps\n\
         COPY src /src\n\
         RUN sort /src/list > /sorted\n\
         FROM {host}/library/busybox:1\n\
         RUN echo runtime > /runtime\n\
         COPY --from=builder /sorted /sorted\n"
    )
}

fn machine(host: &str) -> Build {
    Build::new().dockerfile(&dockerfile(host)).file("src/list", "b\na\n")
}

fn registry() -> Registry {
    let registry = Registry::plain();
    registry.add_base();
    registry
}

/// Bytes that the build says it received.
fn received(ended: &Ended) -> f64 {
    let line = ended.stderr.lines().find(|line| line.contains(" received, ")).unwrap_or_default();
    let before = line.split(" received, ").next().unwrap_or_default();
    let mut words = before.rsplit(' ');
    let (unit, number) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let number: f64 = number.parse().unwrap_or_default();
    match unit {
        "MiB" => number * 1024.0 * 1024.0,
        "KiB" => number * 1024.0,
        _ => number,
    }
}

fn assert_ran(ended: &Ended, words: &[&str]) {
    let ran = ended.ran();
    assert_eq!(ran.len(), words.len(), "{}", ended.stderr);
    for word in words {
        assert!(ran.iter().any(|step| step.contains(word)), "{word}: {}", ended.stderr);
    }
}

#[test]
fn another_machine_runs_nothing_and_downloads_next_to_nothing() {
    let registry = registry();
    let host = &registry.host;
    let cache = format!("{host}/team/cache:main");
    let a = machine(host).flag(format!("-t={host}/team/app:a")).flag("--push");
    let a = a.flag(format!("--cache-to=type=registry,ref={cache},mode=max"));
    let first = a.runs();
    assert_ran(&first, &["urandom", "COPY src", "sort", "runtime", "--from=builder"]);
    assert!(!first.stderr.contains("warning"), "{}", first.stderr);

    let b = machine(host).flag(format!("-t={host}/team/app:b")).flag("--push").flag(format!("--cache-from={cache}"));
    let second = b.runs();
    assert_ran(&second, &[]);
    let bytes = received(&second);
    assert!(bytes > 0.0 && bytes < 40_000.0, "{bytes}: {}", second.stderr);
    assert_eq!(registry.check("team/app:a", &[])["Digest"], registry.check("team/app:b", &[])["Digest"]);

    // One edited file: what comes after it runs, and its reason is known although it never ran here.
    b.write("src/list", "d\nc\n");
    let third = b.runs();
    assert_ran(&third, &["COPY src", "sort", "--from=builder"]);
    assert!(third.stderr.contains("runs because: src/list changed"), "{}", third.stderr);
    assert!(received(&third) > 3_000_000.0, "{}", third.stderr);
}

#[test]
fn a_copy_onto_layers_does_not_fetch_them() {
    let registry = registry();
    let host = &registry.host;
    let cache = format!("{host}/team/cache:main");
    let text = format!(
        "FROM {host}/library/busybox:1\nRUN mkdir /d && chmod 700 /d && head -c 3000000 /dev/urandom > /big\nCOPY app /d/\n"
    );
    let build = || Build::new().dockerfile(&text).file("app", "1").flag(format!("-t={host}/team/app:1")).flag("--push");
    build().flag(format!("--cache-to={cache},mode=max").replace("--cache-to=", "--cache-to=type=registry,ref=")).runs();
    let b = build().file("app", "2").flag(format!("--cache-from={cache}"));
    let b = b.flag(format!("--cache-to=type=registry,ref={host}/team/cache:b,mode=max"));
    let ended = b.runs();
    assert_ran(&ended, &["COPY app"]);
    assert!(received(&ended) < 60_000.0, "{}", ended.stderr);
    let image = b.image();
    assert_eq!(image.file("/d/app"), "2");
    assert_eq!(image.record.fs["/d"]["mode"], "0700", "the directory stays as it was: {:?}", image.record.fs["/d"]);
    // What a cache says of layers goes on to the next one.
    let c = build().file("app", "3").flag(format!("--cache-from={host}/team/cache:b"));
    let ended = c.runs();
    assert_ran(&ended, &["COPY app"]);
    assert!(received(&ended) < 60_000.0, "{}", ended.stderr);
}

#[test]
fn what_was_downloaded_is_known_from_then_on() {
    let registry = registry();
    let host = &registry.host;
    let cache = format!("{host}/team/cache:main");
    machine(host).flag(format!("--cache-to=type=registry,ref={cache},mode=max")).runs();
    let b = machine(host);
    let mut command = b.command();
    command.arg(format!("--cache-from={cache}")).arg("-t=app");
    let with = crate::story::run(command, None);
    assert_eq!(with.code, Some(0), "{}", with.stderr);
    assert_ran(&with, &[]);
    let image = b.image();
    assert_eq!(image.file("/sorted"), "a\nb\n");
    // Layers of the image are here, those of the builder stage are not.
    assert!(image.ran().iter().all(|step| !step.contains("runtime") && !step.contains("--from")), "{}", image.stderr);
    crate::story::assert_store_is_whole(&b.store());
}

#[test]
fn the_smaller_cache_has_only_the_layers_of_the_image() {
    let registry = registry();
    let host = &registry.host;
    let cache = format!("{host}/team/cache:main");
    let a = machine(host).flag(format!("-t={host}/team/app:a")).flag("--push");
    a.flag(format!("--cache-to=type=registry,ref={cache},mode=min")).runs();
    let b = machine(host).flag(format!("-t={host}/team/app:b")).flag("--push");
    let b = b.flag(format!("--cache-from=type=registry,ref={cache}"));
    let second = b.runs();
    // What the builder stage gave is known without having it.
    assert_ran(&second, &[]);
    assert!(received(&second) < 40_000.0, "{}", second.stderr);
    b.write("src/list", "d\nc\n");
    let third = b.runs();
    // Now it is needed.
    assert_ran(&third, &["urandom", "COPY src", "sort", "--from=builder"]);
    assert_eq!(b.image().file("/sorted"), "c\nd\n");
}

#[test]
fn an_image_can_carry_its_own_records() {
    let registry = registry();
    let host = &registry.host;
    let name = format!("{host}/team/app:1");
    machine(host).flag(format!("-t={name}")).flag("--push").flag("--cache-to=type=inline").runs();
    let inspected = registry.check("team/app:1", &[]);
    let b = machine(host).flag(format!("-t={host}/team/app:2")).flag("--push").flag("--cache-to=type=inline");
    let b = b.flag(format!("--cache-from={name}"));
    let second = b.runs();
    assert_ran(&second, &[]);
    assert!(received(&second) < 40_000.0, "{}", second.stderr);
    assert_eq!(registry.check("team/app:2", &[])["Digest"], inspected["Digest"]);
    b.write("src/list", "d\nc\n");
    assert_ran(&b.runs(), &["urandom", "COPY src", "sort", "--from=builder"]);
}

#[test]
fn a_directory_is_a_cache_too() {
    let registry = registry();
    let host = &registry.host;
    let a = machine(host);
    let dest = a.path("cache");
    let target = format!("--cache-to=type=local,dest={},mode=max,compression=zstd", dest.display());
    let a = a.flag(target);
    a.runs();
    let index: Value = serde_json::from_slice(&fs::read(dest.join("index.json")).expect("a file")).expect("JSON");
    assert_eq!(index["manifests"].as_array().map(Vec::len), Some(1), "{index}");
    // Once more: it stays one cache.
    a.write("src/list", "x\n");
    a.runs();
    a.write("src/list", "b\na\n");
    a.runs();
    let index: Value = serde_json::from_slice(&fs::read(dest.join("index.json")).expect("a file")).expect("JSON");
    assert_eq!(index["manifests"].as_array().map(Vec::len), Some(1), "{index}");
    let b = machine(host).flag(format!("--cache-from=type=local,src={}", dest.display()));
    let image = b.image();
    assert_eq!(image.ran(), Vec::<String>::new(), "{}", image.stderr);
    assert_eq!((image.file("/sorted"), image.file("/runtime")), ("a\nb\n", "runtime\n"));
    let other = machine(host).flag(format!("--cache-from=type=local,src={},tag=other", dest.display()));
    let ended = other.runs();
    assert!(ended.stderr.contains("warning: cache") && ended.stderr.contains("no image `other`"), "{}", ended.stderr);
}

#[test]
fn the_first_cache_that_knows_a_step_is_used() {
    let registry = registry();
    let host = &registry.host;
    let reference = |name: &str| format!("type=registry,ref={host}/team/cache:{name}");
    machine(host).flag(format!("--cache-to={},mode=max", reference("main"))).runs();
    let branch = machine(host).file("src/list", "f\ne\n");
    branch
        .flag(format!("--cache-from={}", reference("main")))
        .flag(format!("--cache-to={},mode=max", reference("branch")))
        .runs();
    let b = machine(host).file("src/list", "f\ne\n");
    let b = b.flag(format!("--cache-from={}", reference("none-yet")));
    let b = b.flag(format!("--cache-from={}", reference("branch"))).flag(format!("--cache-from={}", reference("main")));
    let b = b.flag(format!("-t={host}/team/app:b")).flag("--push");
    let ended = b.runs();
    assert_ran(&ended, &[]);
    let warnings: Vec<&str> = ended.stderr.lines().filter(|line| line.starts_with("warning")).collect();
    assert_eq!(warnings.len(), 1, "{}", ended.stderr);
    assert!(warnings[0].contains("none-yet is not used: it does not exist"), "{}", warnings[0]);
    b.write("src/list", "b\na\n");
    assert_ran(&b.runs(), &[]);
}

#[test]
fn a_cache_that_cannot_be_read_or_written_fails_no_build() {
    let registry = registry();
    let host = &registry.host;
    let build = machine(host);
    let build = build.flag(format!("--cache-from={host}/library/busybox:1"));
    let build =
        build.flag("--cache-to=type=registry,ref=127.0.0.1:1/team/cache:main").flag("--cache-from=127.0.0.1:1/x");
    let ended = build.runs();
    for words in
        ["busybox:1 is not used: the image has no records", "127.0.0.1:1/x:latest is not used", "was not written"]
    {
        assert!(ended.stderr.contains(words), "{words}: {}", ended.stderr);
    }
    let strict = machine(host).flag("--cache-to=type=local,dest=/proc/none,ignore-error=false");
    assert_eq!(strict.ends().code, Some(7));
    let lenient = machine(host).flag("--cache-to=type=local,dest=/proc/none");
    assert!(lenient.runs().stderr.contains("warning: the cache to /proc/none was not written"));
    machine(host).flag("--cache-to=type=gha").fails_with(2, &["--cache-to", "type=registry"]);
    machine(host).flag("--cache-from=type=azblob,name=x").fails_with(2, &["--cache-from", "type=registry"]);
}

#[test]
fn mounts_of_a_stage_are_looked_up_without_it() {
    let registry = registry();
    let host = &registry.host;
    let text = format!(
        "FROM {host}/library/busybox:1 AS tools\nRUN head -c 2000000 /dev/urandom > /big; echo tool > /tool\n\
         FROM {host}/library/busybox:1\nRUN --mount=type=bind,from=tools,target=/t cat /t/tool > /used\n"
    );
    let build = || Build::new().dockerfile(&text);
    let cache = format!("{host}/team/cache:main");
    let a = build().flag(format!("--cache-to={cache}"));
    a.runs();
    let b = build().flag(format!("-t={host}/team/app:b")).flag("--push").flag(format!("--cache-from={cache}"));
    let ended = b.runs();
    assert_ran(&ended, &[]);
    assert!(received(&ended) < 40_000.0, "{}", ended.stderr);
}

/// Where the bytes of a cache's blobs are, in a registry or a layout directory.
struct Kept {
    files: Vec<PathBuf>,
    entries: Vec<Value>,
    indexes: Vec<String>,
}

impl Kept {
    fn of(files: Vec<PathBuf>) -> Kept {
        let documents = files.iter().filter_map(|file| serde_json::from_slice(&fs::read(file).expect("a blob")).ok());
        let records: Value =
            documents.into_iter().find(|document: &Value| document.get("keyFormat").is_some()).expect("records");
        let entries = records["entries"].as_array().expect("a list").clone();
        let text = |value: &Value| value.as_str().expect("text").to_owned();
        let indexes = records["indexes"].as_object().expect("a map").values().map(text).collect();
        Kept { files, entries, indexes }
    }

    /// The blob of the layer that a command made.
    #[track_caller]
    fn layer(&self, command: &str) -> String {
        let made = |entry: &&Value| {
            let parts = entry["parts"].as_array().expect("a list");
            parts.iter().any(|part| part["value"].as_str().is_some_and(|value| value.contains(command)))
        };
        let entry = self.entries.iter().find(made).unwrap_or_else(|| panic!("no {command} in {:?}", self.entries));
        entry["blob"].as_str().expect("a layer").to_owned()
    }

    #[track_caller]
    fn file(&self, digest: &str) -> &PathBuf {
        let digits = digest.trim_start_matches("sha256:");
        let found = self.files.iter().find(|file| file.display().to_string().contains(digits));
        found.unwrap_or_else(|| panic!("no file of {digest}"))
    }
}

/// A registry, the name of the cache of a build in it, and what it keeps of that.
fn cached() -> (Registry, String, Kept) {
    let registry = registry();
    let cache = format!("{}/team/cache:main", registry.host);
    machine(&registry.host).flag(format!("--cache-to=type=registry,ref={cache},mode=max")).runs();
    let kept = Kept::of(registry.blobs());
    (registry, cache, kept)
}

/// What may happen to a blob.
type Damage = (&'static str, fn(&Path));

const DAMAGES: [Damage; 3] = [
    ("gone", |file| fs::remove_file(file).expect("a file")),
    ("cut", |file| {
        let length = fs::metadata(file).expect("a file").len();
        fs::OpenOptions::new().write(true).open(file).expect("a file").set_len(length / 2).expect("a file of our own");
    }),
    ("changed", |file| {
        let mut bytes = fs::read(file).expect("a file");
        let at = bytes.len() / 2;
        bytes[at] ^= 0xff;
        fs::write(file, bytes).expect("a file of our own");
    }),
];

/// The warnings of a build are one, which names these.
#[track_caller]
fn assert_one_warning(case: &str, stderr: &str, words: &[&str]) {
    let warnings: Vec<&str> = stderr.lines().filter(|line| line.starts_with("warning")).collect();
    assert_eq!(warnings.len(), 1, "{case}: {stderr}");
    for word in words {
        assert!(warnings[0].contains(word), "{case}: no {word} in {}", warnings[0]);
    }
}

#[test]
fn a_layer_that_a_registry_has_lost_is_made_again() {
    for (case, damage) in DAMAGES {
        let (registry, cache, kept) = cached();
        let host = &registry.host;
        let lost = kept.layer("urandom");
        damage(kept.file(&lost));
        // As long as nobody needs it, nobody notices.
        let same = machine(host).flag(format!("--cache-from={cache}")).flag(format!("-t={host}/team/app:a"));
        let ended = same.flag("--push").runs();
        assert_ran(&ended, &[]);
        assert!(!ended.stderr.contains("warning"), "{case}: {}", ended.stderr);
        // `sort` needs it.
        let edited = machine(host).file("src/list", "d\nc\n").flag(format!("--cache-from={cache}"));
        let edited = edited.flag(format!("--cache-to=type=registry,ref={host}/team/cache:b,mode=max"));
        let image = edited.image();
        let ran = image.ran();
        for word in ["urandom", "COPY src", "sort", "--from=builder"] {
            assert!(ran.iter().any(|step| step.contains(word)), "{case}: {word}: {}", image.stderr);
        }
        assert!(ran.iter().all(|step| !step.contains("runtime")), "{case}: {}", image.stderr);
        assert_eq!((image.file("/sorted"), image.file("/runtime")), ("c\nd\n", "runtime\n"));
        assert_one_warning(case, &image.stderr, &[&cache, &lost]);
        let reason = format!("cache {cache} no longer has its result ({lost})");
        assert!(image.stderr.contains(&reason), "{case}: {}", image.stderr);
        crate::story::assert_store_is_whole(&edited.store());
        // And it is in the new cache.
        let next = machine(host).file("src/list", "d\nc\n").flag(format!("--cache-from={host}/team/cache:b"));
        assert_ran(&next.runs(), &[]);
    }
}

#[test]
fn a_layer_that_only_an_output_needs_is_made_again() {
    for (case, damage) in DAMAGES {
        let (registry, cache, kept) = cached();
        let host = &registry.host;
        let lost = kept.layer("echo runtime");
        damage(kept.file(&lost));
        let build = || machine(host).flag(format!("--cache-from={cache}"));
        let archive = build();
        let image = archive.image();
        let ran = image.ran();
        assert!(ran.iter().any(|step| step.contains("runtime")), "{case}: {}", image.stderr);
        assert!(ran.iter().all(|step| !step.contains("urandom")), "{case}: {}", image.stderr);
        assert_eq!((image.file("/sorted"), image.file("/runtime")), ("a\nb\n", "runtime\n"));
        assert_one_warning(case, &image.stderr, &[&cache, &lost]);

        let files = build();
        let dest = files.path("files");
        let files = files.flag(format!("--output=type=local,dest={}", dest.display()));
        assert_one_warning(case, &files.runs().stderr, &[&cache, &lost]);
        assert_eq!(fs::read_to_string(dest.join("runtime")).expect("a file"), "runtime\n");

        let printed = build().flag("--output=type=tar,dest=-").runs();
        assert_one_warning(case, &printed.stderr, &[&cache, &lost]);
        let mut tar = tar::Archive::new(printed.stdout.as_slice());
        let names = tar.entries().expect("a tar").map(|entry| {
            let entry = entry.expect("an entry");
            String::from_utf8_lossy(&entry.path_bytes()).into_owned()
        });
        assert!(names.collect::<Vec<_>>().iter().any(|name| name.ends_with("runtime")), "{case}");

        // Into another registry, so that it cannot be mounted.
        let other = Registry::plain();
        let pushed = build().flag(format!("-t={}/team/app:1", other.host)).flag("--push").runs();
        assert_one_warning(case, &pushed.stderr, &[&cache, &lost]);
        other.check("team/app:1", &[]);
    }
}

#[test]
fn a_directory_that_has_lost_layers_is_used_as_far_as_it_goes() {
    for (case, damage) in DAMAGES {
        let registry = registry();
        let host = &registry.host;
        let a = machine(host);
        let dest = a.path("cache");
        let a = a.flag(format!("--cache-to=type=local,dest={},mode=max", dest.display()));
        a.runs();
        let blobs = fs::read_dir(dest.join("blobs/sha256")).expect("a directory");
        let kept = Kept::of(blobs.map(|entry| entry.expect("an entry").path()).collect());
        let lost = kept.layer("urandom");
        damage(kept.file(&lost));
        let edited = machine(host).file("src/list", "d\nc\n");
        let edited = edited.flag(format!("--cache-from=type=local,src={}", dest.display()));
        let image = edited.image();
        assert!(image.ran().iter().any(|step| step.contains("urandom")), "{case}: {}", image.stderr);
        assert_eq!(image.file("/sorted"), "c\nd\n");
        assert_one_warning(case, &image.stderr, &[&dest.display().to_string(), &lost]);
    }
}

#[test]
fn a_registry_that_goes_away_after_the_records_ends_no_build() {
    let (registry, _, kept) = cached();
    let (host, lost) = (&registry.host, kept.layer("urandom"));
    let away = Proxy::start(host, move |_, line, _| match line.contains(&format!("/blobs/{lost}")) {
        true => Fault::Drop,
        false => Fault::None,
    });
    let cache = format!("{}/team/cache:main", away.host);
    let edited = machine(host).file("src/list", "d\nc\n").flag(format!("--cache-from={cache}"));
    let image = edited.image();
    assert!(image.ran().iter().any(|step| step.contains("urandom")), "{}", image.stderr);
    assert_eq!(image.file("/sorted"), "c\nd\n");
    assert_one_warning("away", &image.stderr, &["nothing more", &cache, "failed"]);
}

#[test]
fn indexes_and_records_that_are_lost_cost_time_alone() {
    for (case, damage) in DAMAGES {
        let (registry, cache, kept) = cached();
        let host = &registry.host;
        kept.indexes.iter().for_each(|index| damage(kept.file(index)));
        let edited = machine(host).file("src/list", "d\nc\n").flag(format!("--cache-from={cache}"));
        let edited = edited.flag(format!("--cache-to=type=registry,ref={host}/team/cache:b,mode=max"));
        let ended = edited.runs();
        assert_ran(&ended, &["COPY src", "sort", "--from=builder"]);
        assert!(!ended.stderr.contains("warning"), "{case}: {}", ended.stderr);

        let is_records =
            |file: &&PathBuf| fs::read(file).is_ok_and(|bytes| bytes.starts_with(b"{\"version\":1,\"keyF"));
        registry.blobs().iter().filter(is_records).for_each(|file| damage(file));
        let without = machine(host).flag(format!("--cache-from={cache}"));
        let ended = without.runs();
        assert_ran(&ended, &["urandom", "COPY src", "sort", "runtime", "--from=builder"]);
        assert_one_warning(case, &ended.stderr, &[&cache, "is not used"]);
    }
}

/// What curl prints of a request; it must succeed.
#[track_caller]
fn curl(args: &[&str]) -> String {
    let output = Command::new("curl").args(["-sS", "--fail-with-body", "--noproxy", "*"]).args(args).output();
    let output = output.expect("these tests need the program curl");
    let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{args:?}: {out} {error}");
    out.into_owned()
}

/// Puts a blob into a repository and describes it.
fn put_blob(host: &str, repository: &str, bytes: &str, media_type: &str) -> Value {
    use sha2::{Digest, Sha256};
    let digest = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let uploads = format!("http://{host}/v2/{repository}/blobs/uploads/");
    let answer = curl(&["-i", "-X", "POST", &uploads]);
    let location = answer.lines().find_map(|line| line.strip_prefix("Location: ")).expect("a place").trim();
    let place = format!("{location}&digest=sha256:{digest}");
    curl(&["-X", "PUT", "-H", "Content-Type: application/octet-stream", "--data-binary", bytes, &place]);
    json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len()})
}

#[test]
fn caches_of_buildkit_are_told_from_others() {
    const RECORDS: &str = "application/vnd.buildkit.cacheconfig.v0";
    const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    let registry = registry();
    let host = &registry.host;
    // As `image-manifest=true` writes it.
    let records = r#"{"layers":[{"blob":"sha256:0","parent":-1}],"records":[{"digest":"sha256:1","inputs":[[]]}]}"#;
    let layer = put_blob(host, "team/cache", "layer", "application/vnd.oci.image.layer.v1.tar+gzip");
    let config = put_blob(host, "team/cache", records, RECORDS);
    let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer]}).to_string();
    let place = format!("http://{host}/v2/team/cache/manifests/buildkit");
    let header = format!("Content-Type: {MANIFEST}");
    curl(&["-X", "PUT", "-H", &header, "--data-binary", &manifest, &place]);
    // As it writes one into a directory, and did into registries before: an index of blobs.
    let context = machine(host);
    let layout = Layout::new(context.path("buildkit")).expect("a layout");
    let layer = layout.blob(b"layer", "application/vnd.oci.image.layer.v1.tar+gzip").expect("a blob");
    let config = layout.blob(records.as_bytes(), RECORDS).expect("a blob");
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index = json!({"schemaVersion": 2, "mediaType": media_type, "manifests": [layer, config]}).to_string();
    layout.finish(layout.blob(index.as_bytes(), media_type).expect("a blob")).expect("a layout");
    // An image with records inside (`type=inline`).
    let image = r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"moby.buildkit.cache.v0":"e30="}"#;
    let config = put_blob(host, "team/app", image, "application/vnd.oci.image.config.v1+json");
    let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": []}).to_string();
    curl(&["-X", "PUT", "-H", &header, "--data-binary", &manifest, &format!("http://{host}/v2/team/app/manifests/1")]);

    for source in [
        format!("{host}/team/cache:buildkit"),
        format!("type=local,src={}", context.path("buildkit").display()),
        format!("{host}/team/app:1"),
    ] {
        let name = source.trim_start_matches("type=local,src=").to_owned();
        let ended = machine(host).flag(format!("--cache-from={source}")).runs();
        assert_one_warning(&source, &ended.stderr, &[&name, "is not used", "of BuildKit's", RECORDS, "--cache-to"]);
        assert_eq!(ended.ran().len(), 5, "{}", ended.stderr);
    }
}
