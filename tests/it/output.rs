//! Where results go.

use crate::image::{self, Bases};
use crate::story::{Build, run};
use serde_json::Value;
use std::fs;
use std::io::Read;

fn simple() -> Build {
    Build::new().dockerfile("FROM busybox\nCOPY a /a\nRUN echo b > /b\nCMD [\"sh\"]\n").file("a", "x")
}

#[test]
fn an_oci_layout_as_a_directory() {
    let build = simple();
    let out = build.path("layout");
    let build = build.flag(format!("--output=type=oci,dest={},tar=false", out.display()));
    build.runs();
    let record = image::read_image(&out, &Bases::default(), false).expect("a layout");
    assert_eq!(record.fs["/b"]["data"], "b\n");
    assert!(out.join("oci-layout").exists());
}

#[test]
fn the_store_is_an_oci_layout() {
    let build = simple().flag("--tag=story:1");
    build.runs();
    let record = image::read_image(&build.store(), &Bases::default(), false).expect("a layout");
    assert_eq!(record.fs["/a"]["data"], "x");
}

#[test]
fn a_docker_archive() {
    let build = simple().flag("--tag=story:1");
    let out = build.path("docker.tar");
    let build = build.flag(format!("--output=type=docker,dest={}", out.display()));
    build.runs();
    let mut manifest = String::new();
    let file = fs::File::open(&out).expect("an archive");
    for entry in tar::Archive::new(file).entries().expect("an archive") {
        let mut entry = entry.expect("an archive");
        if entry.path_bytes().as_ref() == b"manifest.json" {
            entry.read_to_string(&mut manifest).expect("text");
        }
    }
    let manifest: Value = serde_json::from_str(&manifest).expect("manifest.json");
    assert!(manifest[0]["RepoTags"].to_string().contains("story:1"), "{manifest}");
}

#[test]
fn files_in_a_directory() {
    let build = simple();
    let out = build.path("files");
    let build = build.flag(format!("--output={}", out.display()));
    build.runs();
    assert_eq!(fs::read_to_string(out.join("a")).expect("a file"), "x");
    assert_eq!(fs::read_to_string(out.join("b")).expect("a file"), "b\n");
}

#[test]
fn files_as_an_archive_on_standard_output() {
    let ended = simple().flag("--output=-").runs();
    let mut found = false;
    for entry in tar::Archive::new(ended.stdout.as_slice()).entries().expect("an archive") {
        let mut entry = entry.expect("an archive");
        if entry.path_bytes().trim_ascii_start().ends_with(b"b") && entry.size() == 2 {
            let mut content = String::new();
            entry.read_to_string(&mut content).expect("text");
            found |= content == "b\n";
        }
    }
    assert!(found, "{}", ended.stderr);
}

#[test]
fn every_compression_gives_the_same_image() {
    let build = simple();
    let mut records = Vec::new();
    for how in ["uncompressed", "gzip", "gzip,compression-level=9", "zstd", "zstd,compression-level=19"] {
        let out = build.path("out.tar");
        let mut command = build.command();
        command.arg(format!("--output=type=oci,dest={},compression={how},force-compression=true", out.display()));
        let ended = run(command, None);
        assert_eq!(ended.code, Some(0), "{how}: {}", ended.stderr);
        let record = image::read_image(&out, &Bases::default(), false).expect("an image");
        assert_eq!(record.problems, Vec::<String>::new(), "{how}");
        records.push(record);
    }
    assert!(records.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn digest_and_metadata_files() {
    let build = simple().flag("--tag=story:1");
    let (digest, metadata) = (build.path("digest"), build.path("metadata.json"));
    let build = build
        .flag(format!("--iidfile={}", digest.display()))
        .flag(format!("--metadata-file={}", metadata.display()))
        .flag("--quiet");
    let ended = build.runs();
    let digest = fs::read_to_string(digest).expect("a digest");
    assert!(digest.starts_with("sha256:") && digest.len() == 71, "{digest}");
    assert_eq!(ended.stdout().trim(), digest);
    assert_eq!(ended.stderr, "");
    let metadata: Value = serde_json::from_slice(&fs::read(metadata).expect("a file")).expect("JSON");
    assert!(metadata["containerimage.digest"].as_str().is_some_and(|text| text.starts_with("sha256:")), "{metadata}");
}

#[test]
fn a_digest_is_no_part_of_an_archive() {
    for kind in ["oci", "docker"] {
        let build = simple().flag(format!("--output=type={kind},dest=-")).flag("--quiet");
        let ended = build.runs();
        assert!(ended.stderr.starts_with("sha256:") && ended.stderr.len() == 72, "{kind}: {}", ended.stderr);
        // An archive ends with zeros; bytes behind it are what some programs complain of.
        assert!(ended.stdout.ends_with(&[0; 1024]) && ended.stdout.len().is_multiple_of(512), "{kind}");
        let names: Vec<_> = tar::Archive::new(ended.stdout.as_slice())
            .entries()
            .expect("an archive")
            .map(|entry| String::from_utf8_lossy(&entry.expect("an entry").path_bytes()).into_owned())
            .collect();
        assert!(names.iter().any(|name| name == "index.json"), "{kind}: {names:?}");
    }
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let bytes = || {
        let build = simple().env("SOURCE_DATE_EPOCH", "1700000000");
        let out = build.path("out.tar");
        build.flag(format!("--output=type=oci,dest={},rewrite-timestamp=true", out.display())).runs_into(&out)
    };
    assert!(bytes() == bytes(), "two builds of the same input differ");
}

impl Build {
    #[track_caller]
    fn runs_into(self, out: &std::path::Path) -> Vec<u8> {
        self.runs();
        fs::read(out).expect("an archive")
    }
}

#[test]
fn progress_as_json_lines() {
    let ended = simple().flag("--progress=rawjson").runs();
    let events: Vec<Value> = ended
        .stderr
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}")))
        .collect();
    assert_eq!(events[0]["event"], "planned", "{}", ended.stderr);
    assert!(events.iter().any(|event| event["event"] == "finished"));
}

/// A context of 4 MB whose files compress a little.
fn several_chunks() -> Build {
    let mut build = Build::new().dockerfile("FROM scratch\nCOPY data /data\n").env("SOURCE_DATE_EPOCH", "1700000000");
    let mut state = 1_u64;
    for number in 0..40 {
        let mut content = String::new();
        while content.len() < 100_000 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            content.push_str(&format!("{:x} ", state));
        }
        build = build.file(&format!("data/file{number:02}"), &content);
    }
    build
}

/// The archive of a build by `program`, in front of which `before` may stand.
#[track_caller]
fn archive_of(build: &Build, before: &[&str], codec: &str) -> Vec<u8> {
    let out = build.path("out.tar");
    let inner = build.command();
    let mut command = match before {
        [] => std::process::Command::new(inner.get_program()),
        [program, args @ ..] => {
            let mut command = std::process::Command::new(program);
            command.args(args).arg(inner.get_program());
            command
        }
    };
    command.args(inner.get_args()).env("SOURCE_DATE_EPOCH", "1700000000");
    command.arg(format!("--output=type=oci,dest={},rewrite-timestamp=true,compression={codec}", out.display()));
    let ended = run(command, None);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    fs::read(out).expect("an archive")
}

#[test]
fn neither_threads_nor_known_chunks_change_a_byte() {
    let status = fs::read_to_string("/proc/self/status").expect("/proc is mounted");
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).expect("a list");
    let one: String = allowed.trim().chars().take_while(char::is_ascii_digit).collect();
    for codec in ["gzip", "zstd"] {
        let known = several_chunks();
        archive_of(&known, &[], codec);
        known.write("data/file20", "edited");
        let with_chunks = archive_of(&known, &[], codec);
        assert_eq!(fs::read_dir(known.store().join("chunks")).expect("a directory").count(), 2, "{codec}");
        let fresh = several_chunks();
        fresh.write("data/file20", "edited");
        assert!(archive_of(&fresh, &[], codec) == with_chunks, "{codec}: known chunks");
        let alone = several_chunks();
        alone.write("data/file20", "edited");
        assert!(archive_of(&alone, &["taskset", "-c", &one], codec) == with_chunks, "{codec}: one thread");
        // Damage in the blob that chunks come from is noticed.
        let blobs = known.store().join("blobs/sha256");
        for entry in fs::read_dir(&blobs).expect("a directory").flatten() {
            let mut bytes = fs::read(entry.path()).expect("a blob");
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            if bytes.len() > 100_000 {
                fs::write(entry.path(), bytes).expect("a file of the store");
            }
        }
        known.write("data/file39", "edited, too");
        fresh.write("data/file39", "edited, too");
        assert!(archive_of(&known, &[], codec) == archive_of(&fresh, &[], codec), "{codec}: damaged chunks");
    }
}

/// Was the layer of the last COPY compressed while its files were read, before anything was stored? By the trace of the build.
#[track_caller]
fn compressed_early(trace: &std::path::Path) -> bool {
    let trace: Value = serde_json::from_slice(&fs::read(trace).expect("a trace")).expect("JSON");
    let events = trace["traceEvents"].as_array().expect("events");
    let begun = |name: &str| {
        let found = events.iter().filter(|event| {
            event["name"] == name && event["args"]["step"].as_str().is_some_and(|step| step.contains("COPY"))
        });
        found.filter_map(|event| event["ts"].as_u64()).min()
    };
    begun("compress").expect("it was compressed") < begun("hash").expect("it was stored")
}

#[test]
fn a_first_build_reads_its_files_once() {
    let make = |copy: &str| {
        let token = "AKIAQ7XH2LTRZ5WDKJ3M";
        let build = several_chunks().file("data/empty", "").file("data/.env", token);
        fs::hard_link(build.path("context/data/file05"), build.path("context/data/another")).expect("a link");
        let trace = build.path("trace.json");
        build.dockerfile(&format!("FROM busybox\n{copy}\n")).flag(format!("--trace={}", trace.display()))
    };
    let early = |build: &Build| compressed_early(&build.path("trace.json"));
    for (copy, codec) in [
        ("COPY data /data", "gzip"),
        ("COPY data /data", "zstd"),
        ("COPY data /data", "uncompressed"),
        ("COPY --chown=7:8 --chmod=640 data /data", "gzip"),
        ("COPY --link data /data", "gzip"),
    ] {
        let once = make(copy);
        // With the base's layers in the store, and without.
        if codec == "zstd" || copy.contains("--link") {
            once.write("Dockerfile", "FROM busybox\n");
            archive_of(&once, &[], codec);
            once.write("Dockerfile", &format!("FROM busybox\n{copy}\n"));
        }
        let archive = archive_of(&once, &[], codec);
        assert!(early(&once), "{copy}, {codec}");
        // The same bytes when the layer is there before anybody wants it compressed.
        let twice = make(copy);
        let mut cache_only = twice.command();
        cache_only.arg("--output=type=cacheonly");
        let ended = run(cache_only, None);
        assert!(ended.code == Some(0) && ended.stderr.contains("`data/.env` looks as if it held"), "{}", ended.stderr);
        assert!(archive_of(&twice, &[], codec) == archive, "{copy}, {codec}");
        // All is known from then on.
        let again = once.runs();
        assert!(again.ran().is_empty(), "{}", again.stderr);
        assert!(archive_of(&once, &[], codec) == archive, "{copy}, {codec}");
    }
    // What a walk does not see of a file goes into the layer, too, and changes how it is written.
    let capable = |build: Build| {
        let file = build.path("context/data/file07");
        let set =
            "import os, sys; os.setxattr(sys.argv[1], 'security.capability', bytes([1, 0, 0, 2, 0, 32] + [0] * 14))";
        let set = std::process::Command::new("unshare").args(["-Ur", "python3", "-c", set]).arg(file).status();
        assert!(set.is_ok_and(|status| status.success()), "a capability can be set in a namespace");
        build
    };
    let once = capable(make("COPY data /data"));
    let archive = archive_of(&once, &[], "gzip");
    assert!(!early(&once));
    let plain = make("COPY data /data");
    assert!(archive_of(&plain, &[], "gzip") != archive);
}

#[test]
fn a_first_build_stores_nothing_that_must_not_be() {
    let build = several_chunks().flag("--secret=id=s,env=SECRET").env("SECRET", "s3cr3t-value-4711");
    let build = build.file("data/file99", "s3cr3t-value-4711");
    build.fails_with(4, &["secret `s` stands in", "/data/file99"]);
    let blobs = fs::read_dir(build.store().join("blobs/sha256")).expect("a directory").flatten();
    let large = blobs.filter(|blob| blob.metadata().is_ok_and(|metadata| metadata.len() > 100_000)).count();
    assert_eq!(large, 0, "a blob of the layer");
    // An archive that was begun is removed.
    let build = several_chunks().dockerfile("FROM busybox\nCOPY data /data\nRUN exit 3\n");
    let out = build.path("out");
    fs::create_dir(&out).expect("a directory of our own");
    let build = build.flag(format!("--output=type=oci,dest={}/image.tar", out.display()));
    build.fails_with(4, &["RUN exit 3"]);
    assert_eq!(fs::read_dir(&out).expect("a directory").count(), 0);
}

#[test]
fn where_the_time_went() {
    let build = simple();
    let trace = build.path("trace.json");
    let build = build.flag("--timings").flag(format!("--trace={}", trace.display()));
    let ended = build.runs();
    let line = ended.stderr.lines().find(|line| line.ends_with("] RUN echo b > /b")).expect("a step");
    assert!(ended.stderr.contains("timings: ") && !line.is_empty(), "{}", ended.stderr);
    let trace: Value = serde_json::from_slice(&fs::read(trace).expect("a file")).expect("JSON");
    let events = trace["traceEvents"].as_array().expect("events");
    for name in ["look up", "run", "hash", "compress"] {
        assert!(events.iter().any(|event| event["name"] == name && event["dur"].is_u64()), "no `{name}`: {trace}");
    }
}
