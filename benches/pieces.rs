//! Time of the pieces that builds are made of: scan, hash, index, merge, tar, compression, unpacking, a step's sandbox.
//!
//! `cargo bench -p nacre-solver --bench pieces` prints a table: the least time of five runs, and what that is for each
//! entry or MB. The tree has 20,000 files of 4,000 bytes in 200 directories and lies in the temporary directory.

#![allow(clippy::print_stdout, clippy::exit, clippy::disallowed_methods, reason = "a program of its own")]

use nacre_solver::context::{Context, DigestCache, IgnoreFile, digest_files};
use nacre_solver::materialize::{Ownership, WriteOptions, write_tree};
use nacre_solver::sandbox::idmap::{self, EnterRequest, Entered};
use nacre_solver::sandbox::{self, Cancel, Net, Rootfs, RunSpec, SANDBOX_ARGUMENT};
use nacre_solver::scan::{Detail, Everything, ScanOptions, scan};
use nacre_solver::tree::blob::{BlobOptions, Codec, decompress, write_blob};
use nacre_solver::tree::layer::{Limits, NoSink, TarOptions, read_tar, write_tar};
use nacre_solver::tree::{Node, Origin, Tree, index};
use std::fs::{self, File};
use std::hint::black_box;
use std::io::{self, Read};
use std::path::Path;
use std::time::{Duration, Instant};

const FILES: usize = 20_000;
const FILE_BYTES: usize = 4000;

fn main() {
    if std::env::args().nth(1).as_deref() == Some(SANDBOX_ARGUMENT) {
        sandbox::sandbox_main();
    }
    match idmap::enter(EnterRequest::Best) {
        Ok(Entered::Parent { exit_code }) => std::process::exit(exit_code),
        Ok(_) => {}
        Err(error) => println!("no user namespace: {error}"),
    }
    let directory = tempfile::tempdir().expect("a temporary directory");
    let source = directory.path().join("source");
    generate(&source);
    println!("{:44} {:>10}  for each", "", "least ms");

    let options = ScanOptions { detail: Detail::Context, filter: &Everything };
    piece("scan: list and stat", FILES, "file", || drop(black_box(scan(source.as_path(), &options).expect("a scan"))));

    let context = Context::open(&source, IgnoreFile::None).expect("a context");
    let files = context.tree().expect("a walk").clone();
    let mut digested = Tree::clone(&files);
    piece("hash: read, BLAKE3", megabytes(), "MB", || {
        digested = Tree::clone(&files);
        let mut cache = DigestCache::open(&directory.path().join("none"));
        digest_files(&mut digested, &context, &mut cache).expect("digests");
    });
    let tree = digested;

    let encoded = index::encode(&tree);
    piece("index: encode", FILES, "file", || drop(black_box(index::encode(&tree))));
    piece("index: decode", FILES, "file", || drop(black_box(index::decode(&encoded).expect("an index"))));
    piece("index: content key", FILES, "file", || {
        black_box(index::content_key(&tree));
    });
    let other = tree.iter().step_by(10).collect::<Tree>();
    piece("index: merge a layer of a tenth", FILES, "file", || drop(black_box(tree.apply(&other))));

    let open = |node: &Node| -> io::Result<Box<dyn Read + Send>> {
        match &node.origin {
            Origin::File(file) => Ok(Box::new(File::open(file.whole())?)),
            _ => Ok(Box::new(io::empty())),
        }
    };
    piece("tar: read files, write nowhere", megabytes(), "MB", || {
        write_tar(&tree, &open, &TarOptions::default(), &mut io::sink()).expect("a tar");
    });
    let mut gzip = Vec::new();
    for (codec, level) in [(Codec::Gzip, 1), (Codec::Gzip, 5), (Codec::Gzip, 6), (Codec::Zstd, 3)] {
        for threads in [1, 2] {
            let name = format!("blob: {} {level}, threads: {threads}", codec.name());
            let options = BlobOptions { tar: TarOptions::default(), codec, level: Some(level), threads };
            let mut out = Vec::new();
            piece(&name, megabytes(), "MB", || {
                out.clear();
                write_blob(&tree, &open, &options, None, &mut out).expect("a blob");
            });
            if codec == Codec::Gzip {
                gzip = out;
            }
        }
    }
    piece("blob: read gzip, decompress, digest", megabytes(), "MB", || {
        let plain = decompress(gzip.as_slice()).expect("gzip");
        read_tar(&mut std::io::BufReader::with_capacity(256 << 10, plain), &mut NoSink, &Limits::default())
            .expect("a layer");
    });
    let mut number = 0;
    piece("unpack: write a tree to disk", FILES, "file", || {
        number += 1;
        let read = |node: &Node| open(node).map(|reader| reader as Box<dyn Read>);
        let target = directory.path().join(format!("unpacked{number}"));
        write_tree(&tree, &read, &target, WriteOptions { ownership: Ownership::SingleId }).expect("a tree");
    });
    spawn(directory.path());
}

fn generate(source: &Path) {
    let mut state = 7_u64;
    for number in 0..FILES {
        let parent = source.join(format!("d{}", number / 100));
        if number % 100 == 0 {
            fs::create_dir_all(&parent).expect("a directory");
        }
        let mut text = String::new();
        while text.len() < FILE_BYTES {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            text.push_str(&format!("let value{} = {};\n", state % 100, state % 10_000));
        }
        text.truncate(FILE_BYTES);
        fs::write(parent.join(format!("f{number}")), text).expect("a file");
    }
}

fn megabytes() -> usize {
    FILES * FILE_BYTES / 1_000_000
}

/// Steps that do nothing, on a root file system of busybox below an overlay.
fn spawn(directory: &Path) {
    let found = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
    let Some(busybox) = found else { return println!("sandbox: needs busybox (apt-get install busybox-static)") };
    let lower = directory.join("lower");
    fs::create_dir_all(lower.join("bin")).expect("a directory");
    fs::copy(busybox, lower.join("bin/busybox")).expect("busybox");
    let cancel = Cancel::new().expect("an event");
    let mut number = 0;
    piece("sandbox: 20 steps that do nothing", 20, "step", || {
        for _ in 0..20 {
            number += 1;
            let scratch = directory.join(format!("step{number}"));
            let part = |name: &str| {
                let path = scratch.join(name);
                fs::create_dir_all(&path).expect("a directory");
                path
            };
            let spec = RunSpec {
                isolation: sandbox::Isolation::Namespaces,
                group: None,
                rootfs: Rootfs::Overlay { lowers: vec![lower.clone()], upper: part("upper"), work: part("work") },
                mounts: Vec::new(),
                args: vec!["/bin/busybox".into(), "true".into()],
                env: Vec::new(),
                cwd: "/".into(),
                uid: 0,
                gid: 0,
                groups: Vec::new(),
                hostname: "bench".into(),
                hosts: String::new(),
                resolv_conf: String::new(),
                network: Net::Host,
                insecure: false,
                shm_size_bytes: 1 << 20,
                ulimits: Vec::new(),
                umask: 0o022,
                scratch_dir: part("files"),
                emulation: None,
            };
            sandbox::run(&spec, &cancel, &mut |_, _| {}).expect("a step");
        }
    });
}

fn piece(name: &str, count: usize, unit: &str, mut work: impl FnMut()) {
    let mut least = Duration::MAX;
    for _ in 0..5 {
        let started = Instant::now();
        work();
        least = least.min(started.elapsed());
    }
    let millis = least.as_secs_f64() * 1000.0;
    println!("{name:44} {millis:10.2}  {:.2} µs a {unit}", millis * 1000.0 / count as f64);
}
