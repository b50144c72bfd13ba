//! apt-get and pip in a Debian base, with the owners that the packages ask for.

use crate::bases;
use crate::build::{Scratch, nacre};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

const DOCKERFILE: &str = r#"
FROM debian
RUN apt-get update && apt-get install -y --no-install-recommends openssh-server cron python3-pip && rm -rf /var/lib/apt/lists/*
RUN pip install --break-system-packages six==1.16.0
RUN useradd --create-home --uid 4321 worker && su worker -c 'touch ~/mine' && chown -R worker:www-data /srv
RUN python3 -c 'import six; print("six", six.__version__)' > /version
"#;

#[test]
fn packages_install_and_their_files_have_the_right_owners() {
    let scratch = Scratch::new("debian");
    scratch.file("app/Dockerfile", DOCKERFILE);
    let layout = scratch.path("layout");
    let output = format!("type=oci,dest={},tar=false,name=apt:1", layout.display());
    let build = || {
        nacre(&scratch.path("store"))
            .args(["--build-context", &format!("debian={}", bases::debian())])
            .args(["--output", &output])
            .arg(scratch.path("app"))
            .succeeds()
    };
    build();
    let files = last_layers(&layout, 4);
    let group = |name: &str| -> u64 {
        let text = &files["etc/group"].3;
        let line = text.lines().find(|line| line.starts_with(&format!("{name}:"))).expect("the package made the group");
        line.split(':').nth(2).expect("it has a number").parse().expect("a number")
    };
    let owner = |path: &str| {
        let file = files.get(path).unwrap_or_else(|| panic!("{path} is in no layer"));
        (file.0, file.1, file.2)
    };
    assert_eq!(owner("usr/bin/ssh-agent"), (0, group("_ssh"), 0o2755), "a set-group-id program");
    assert_eq!(owner("var/spool/cron/crontabs"), (0, group("crontab"), 0o1730));
    assert_eq!(owner("home/worker/mine"), (4321, 4321, 0o644));
    assert_eq!(owner("srv"), (4321, 33, 0o755));
    assert_eq!(files["version"].3, "six 1.16.0\n");
    build().all_cached();
}

/// Owner, group, mode and content (of small files) of all paths in the last layers, the newest winning.
fn last_layers(layout: &Path, count: usize) -> BTreeMap<String, (u64, u64, u32, String)> {
    let read = |digest: &serde_json::Value| {
        let hex = digest.as_str().and_then(|digest| digest.strip_prefix("sha256:")).expect("a digest");
        std::fs::read(layout.join("blobs/sha256").join(hex)).expect("the layout holds it")
    };
    let json = |bytes: &[u8]| -> serde_json::Value { serde_json::from_slice(bytes).expect("JSON") };
    let index = json(&std::fs::read(layout.join("index.json")).expect("the layout has an index"));
    let manifest = json(&read(&index["manifests"][0]["digest"]));
    let layers = manifest["layers"].as_array().expect("it has layers");
    let mut files = BTreeMap::new();
    for layer in &layers[layers.len() - count..] {
        let blob = read(&layer["digest"]);
        let mut archive = tar::Archive::new(flate2::read::MultiGzDecoder::new(&blob[..]));
        for entry in archive.entries().expect("a tar") {
            let mut entry = entry.expect("a whole tar");
            let path = entry.path().expect("a path").to_string_lossy().trim_end_matches('/').to_owned();
            let mut text = String::new();
            if entry.size() < 65536 {
                let _ = entry.read_to_string(&mut text);
            }
            let header = entry.header();
            let numbers = (header.uid().expect("uid"), header.gid().expect("gid"), header.mode().expect("mode"));
            files.insert(path, (numbers.0, numbers.1, numbers.2 & 0o7777, text));
        }
    }
    files
}
