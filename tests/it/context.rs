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
