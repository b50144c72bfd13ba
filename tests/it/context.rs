//! Where contexts and Dockerfiles come from.

use crate::story::Build;

#[test]
fn a_dockerfile_from_standard_input_has_no_context() {
    let build = Build::new().context("-").stdin("FROM scratch\nCOPY <<EOF /a\nhello\nEOF\n");
    assert_eq!(build.image().file("/a"), "hello\n");
}

#[test]
fn a_dockerfile_from_standard_input_with_a_directory() {
    let build = Build::new().file("a", "x").flag("--file=-").stdin("FROM scratch\nCOPY a /\n");
    assert_eq!(build.image().file("/a"), "x");
}

#[test]
fn a_context_from_standard_input() {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, content) in [("Dockerfile", "FROM scratch\nCOPY a /\n"), ("a", "from the archive")] {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, name, content.as_bytes()).expect("writing to memory");
    }
    let archive = archive.into_inner().expect("writing to memory");
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut gzip, &archive).expect("writing to memory");
    let compressed = gzip.finish().expect("writing to memory");
    for input in [archive, compressed] {
        let build = Build::new().context("-").stdin(input);
        assert_eq!(build.image().file("/a"), "from the archive");
    }
}

#[test]
fn a_dockerfile_elsewhere_has_its_own_ignore_file() {
    let build = Build::new()
        .file("docker/App.dockerfile", "FROM scratch\nCOPY . /\n")
        .file("docker/App.dockerfile.dockerignore", "b\ndocker\n")
        .file(".dockerignore", "a\n")
        .file("a", "a")
        .file("b", "b");
    let flag = format!("--file={}", build.path("context/docker/App.dockerfile").display());
    let image = build.flag(flag).image();
    assert!(image.has("/a") && !image.has("/b") && !image.has("/docker"), "{:?}", image.record.fs.keys());
}

#[test]
fn a_named_context() {
    let build = Build::new().dockerfile("FROM scratch\nCOPY --from=more a /\n").file("sub/a", "named");
    let flag = format!("--build-context=more={}", build.path("context/sub").display());
    assert_eq!(build.flag(flag).image().file("/a"), "named");
}

#[test]
fn a_stage_in_place_of_an_image() {
    let build =
        Build::new().dockerfile("FROM busybox AS made\nRUN echo x > /x\nFROM nowhere.invalid/base\nRUN cat /x\n");
    assert_eq!(build.flag("--build-context=nowhere.invalid/base=target:made").image().file("/x"), "x\n");
}

#[test]
fn build_args_of_the_environment() {
    let build = Build::new().dockerfile("FROM busybox\nARG WHO=nobody\nRUN echo $WHO > /who\n");
    assert_eq!(build.env("WHO", "env").flag("--build-arg=WHO").image().file("/who"), "env\n");
}

/// Runs a compressor.
fn compressed(program: &str, bytes: &[u8]) -> Vec<u8> {
    let mut command = std::process::Command::new(program);
    command.args(["-c"]);
    let ended = crate::story::run(command, Some(bytes));
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    ended.stdout
}

fn archive(files: &[(&str, &str)]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_uid(1234);
        header.set_size(content.len() as u64);
        // As bytes: the crate refuses names that lead upwards.
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        archive.append(&header, content.as_bytes()).expect("writing to memory");
    }
    archive.into_inner().expect("writing to memory")
}

#[test]
fn archives_of_every_compression_are_contexts() {
    let files = [
        ("docker/App", "FROM busybox\nCOPY . /src\nRUN cat /src/d/a > /seen\n"),
        ("d/a", "from the archive"),
        ("../../up", "confined"),
        ("drop/b", "x"),
        (".dockerignore", "drop\n"),
    ];
    let plain = archive(&files);
    for input in ["cat", "gzip", "bzip2", "xz", "zstd"].map(|program| match program {
        "cat" => plain.clone(),
        program => compressed(program, &plain),
    }) {
        let image = Build::new().context("-").flag("--file=docker/App").stdin(input).image();
        assert_eq!((image.file("/seen"), image.file("/src/up")), ("from the archive", "confined"));
        assert!(!image.has("/src/drop") && image.has("/src/docker/App"), "{:?}", image.record.fs.keys());
        assert_eq!(image.record.fs["/src/d/a"].get("uid").and_then(|uid| uid.as_u64()).unwrap_or(0), 0);
    }
    Build::new().context("-").stdin(plain.clone()).fails_with(3, &["`Dockerfile`", "no such file", "-f"]);
    let mut cut = compressed("gzip", &plain);
    cut.truncate(cut.len() / 2);
    Build::new().context("-").flag("--file=docker/App").stdin(cut).fails_with(3, &["context"]);
    Build::new().context("-").stdin(compressed("gzip", b"text")).fails_with(3, &["standard input", "archive"]);
    Build::new().context("-").flag("--file=x").stdin("FROM scratch\n").fails_with(2, &["no archive", "-f"]);
}

#[test]
fn steps_run_with_a_dockerfile_from_standard_input() {
    let text = "FROM busybox\nRUN echo x > /x\n";
    assert_eq!(Build::new().context("-").stdin(text).image().file("/x"), "x\n");
    let build = Build::new().file("a", "y").flag("--file=-").stdin("FROM busybox\nCOPY a /\nRUN cat /a > /x\n");
    assert_eq!(build.image().file("/x"), "y");
    let check = Build::new().context("-").flag("--call=targets").stdin("FROM scratch AS first\n").runs();
    assert!(check.stdout().contains("first"), "{}", check.stdout());
}

#[test]
fn contexts_and_dockerfiles_from_a_web_server() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let files = [("Dockerfile", "FROM busybox\nRUN echo x > /x\nCOPY . /src\n"), ("a", "one"), ("d/b", "two")];
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).expect("a file of our own");
    write("app.tar.gz", &compressed("gzip", &archive(&files)));
    write("Other", b"FROM scratch\nCOPY a /other\n");
    write("Alone", b"FROM busybox\nRUN echo alone > /x\n");
    write("data", b"plain");
    let base = format!("http://{}", crate::git::serve(dir.path()));
    let url = |name: &str| format!("{base}/{name}");

    let image = Build::new().context(&url("app.tar.gz")).image();
    assert_eq!((image.file("/x"), image.file("/src/d/b")), ("x\n", "two"));
    let image = Build::new().context(&url("app.tar.gz")).flag(format!("--file={}", url("Other"))).image();
    assert_eq!(image.file("/other"), "one");
    assert_eq!(Build::new().context(&url("Alone")).image().file("/x"), "alone\n");
    let image = Build::new().file("a", "local").flag(format!("--file={}", url("Other"))).image();
    assert_eq!(image.file("/other"), "local");
    Build::new().context(&url("nothing")).fails_with(5, &["nothing", "404"]);

    let named = |name: &str| format!("--build-context=more={}", url(name));
    let text = "FROM busybox\nCOPY --from=more d/b /b\nRUN --mount=from=more,target=/m cat /m/a > /x\n";
    let image = Build::new().dockerfile(text).flag(named("app.tar.gz")).image();
    assert_eq!((image.file("/b"), image.file("/x")), ("two", "one"));
    let image = Build::new().dockerfile("FROM more\nCOPY --from=more a /c\n").flag(named("app.tar.gz")).image();
    assert_eq!((image.file("/a"), image.file("/c")), ("one", "one"));
    // What is no archive is a directory of one file.
    let image = Build::new().dockerfile("FROM scratch\nCOPY --from=more data /\n").flag(named("data")).image();
    assert_eq!(image.file("/data"), "plain");
}

#[test]
fn repositories_and_stages_as_named_contexts() {
    let (_dir, dir) = crate::git::directory();
    crate::git::repository(&dir, "app", &[("sub/a", "one"), ("sub/.dockerignore", "a\n")]);
    let server = crate::git::serve(&dir);
    let text = "FROM scratch AS made\nCOPY --from=more a /a\nFROM scratch\nCOPY --from=stage /a /b\n";
    let build = Build::new().dockerfile(text).flag("--build-context=stage=target:made");
    let image = build.flag(format!("--build-context=more=http://{server}/app.git#main:sub")).image();
    assert_eq!(image.file("/b"), "one");
    let build = Build::new().dockerfile("FROM scratch\nCOPY --from=stage /a /b\n");
    build.flag("--build-context=stage=target:nope").fails_with(3, &["`stage`", "`nope`", "Dockerfile:2"]);
}
