//! Other people's programs read what nacre wrote.

use crate::bases;
use crate::build::{Scratch, is_root, nacre, run, sh};
use std::process::Command;

const DOCKERFILE: &str =
    "FROM busybox\nRUN echo built > /built && ln /built /linked && rm /bin/vi\nCOPY . /\nCMD [\"cat\", \"/built\"]\n";

fn build(scratch: &Scratch, output: &str) {
    scratch.file("app/Dockerfile", DOCKERFILE);
    nacre(&scratch.path("store"))
        .args(["--build-context", &format!("busybox={}", bases::busybox())])
        .args(["--output", output])
        .arg(scratch.path("app"))
        .succeeds();
}

#[test]
fn skopeo_reads_the_store_and_every_codec() {
    let scratch = Scratch::new("skopeo");
    scratch.file("app/Dockerfile", DOCKERFILE);
    nacre(&scratch.path("store"))
        .args(["--build-context", &format!("busybox={}", bases::busybox())])
        .args(["-t", "localhost/app:1"])
        .arg(scratch.path("app"))
        .succeeds();
    let from = format!("oci:{}:localhost/app:1", scratch.path("store").display());
    sh(&["skopeo", "--insecure-policy", "copy", "-q", &from, &format!("dir:{}", scratch.path("copy").display())]);
    for compression in ["gzip", "zstd", "uncompressed"] {
        let layout = scratch.path(compression);
        build(&scratch, &format!("type=oci,dest={},tar=false,compression={compression},name=a:1", layout.display()));
        let to = format!("dir:{}", scratch.path(&format!("copy-{compression}")).display());
        sh(&["skopeo", "--insecure-policy", "copy", "-q", &format!("oci:{}:1", layout.display()), &to]);
    }
}

/// Bytes for chunks of every kind: text, which takes the usual level; what gets no smaller; and both in turns.
fn chunks_of_every_kind() -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let text: Vec<u8> = (0..200_000).flat_map(|_| format!("{} ", next() % 5000).into_bytes()).collect();
    let random: Vec<u8> = (0..400_000).flat_map(|_| next().to_le_bytes()).collect();
    let turns: Vec<u8> =
        random.chunks(2048).zip(text.chunks(2048).cycle()).flat_map(|(a, b)| [a, b].concat()).collect();
    [text, random, turns].concat()
}

#[test]
fn zlib_libdeflate_7z_go_and_gnu_tar_read_the_layers() {
    let scratch = Scratch::new("gzip");
    let layout = scratch.path("layout");
    std::fs::create_dir_all(scratch.path("app")).expect("a directory of ours");
    std::fs::write(scratch.path("app/data"), chunks_of_every_kind()).expect("a file of ours");
    build(&scratch, &format!("type=oci,dest={},tar=false,name=a:1", layout.display()));
    // Go's: skopeo writes each layer as the tar that it holds, under the tar's digest.
    let plain = scratch.path("plain");
    let image = format!("oci:{}:1", layout.display());
    sh(&[
        "skopeo",
        "--insecure-policy",
        "copy",
        "-q",
        "--dest-decompress",
        &image,
        &format!("dir:{}", plain.display()),
    ]);
    let mut read = 0;
    for blob in std::fs::read_dir(layout.join("blobs/sha256")).expect("the layout holds blobs") {
        let path = blob.expect("a blob").path();
        if !std::fs::read(&path).expect("a blob").starts_with(&[0x1f, 0x8b]) {
            continue;
        }
        let path = path.to_str().expect("a digest").to_owned();
        let readers = [
            "gzip -dc",
            "pigz -dc",
            "libdeflate-gunzip -c",
            "7z e -so -si -tgzip",
            "python3 -c 'import gzip, shutil, sys; shutil.copyfileobj(gzip.open(sys.stdin.buffer), sys.stdout.buffer)'",
        ];
        let sums = readers.map(|reader| {
            run(Command::new("bash")
                .args(["-c", &format!("set -o pipefail; {reader} < {path} 2>/dev/null | sha256sum")]))
        });
        assert!(sums.iter().all(|sum| *sum == sums[0]), "{readers:?}: {sums:?}");
        let digest = sums[0].split_whitespace().next().expect("a sum");
        assert!(plain.join(digest).exists(), "skopeo found another tar than {digest}");
        assert!(!sh(&["tar", "-tzf", &path]).is_empty());
        read += 1;
    }
    assert!(read >= 3, "base, RUN and COPY have layers");
}

#[test]
fn podman_loads_and_runs_the_docker_archive() {
    let scratch = Scratch::new("podman");
    let archive = scratch.path("image.tar");
    build(&scratch, &format!("type=docker,dest={},name=localhost/nacre-test:1", archive.display()));
    if is_root() {
        let root = scratch.path("podman");
        let podman = |args: &[&str]| {
            let mut command = Command::new("podman");
            command.arg("--root").arg(&root).arg("--runroot").arg(scratch.path("podman-run"));
            command.args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"]);
            run(command.args(args))
        };
        podman(&["load", "-q", "-i", archive.to_str().expect("a path of ours")]);
        let mounts = podman(&["image", "inspect", "localhost/nacre-test:1", "--format", "{{.Config.Cmd}}"]);
        assert!(mounts.contains("cat"), "{mounts}");
    } else {
        let to = format!("oci:{}:1", scratch.path("converted").display());
        let from = format!("docker-archive:{}", archive.display());
        sh(&["skopeo", "--insecure-policy", "copy", "-q", &from, &to]);
    }
}
