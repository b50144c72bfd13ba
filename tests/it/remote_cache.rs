//! Two stores as two machines that share a cache through a registry, a directory or an image.

use crate::registry::Registry;
use crate::story::{Build, Ended};
use serde_json::Value;
use std::fs;

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
