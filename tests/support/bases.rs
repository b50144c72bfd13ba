//! The base images that the conformance cases build on, as OCI layouts `DIR/NAME` with the tag `latest`.
//!
//! | name | what |
//! |---|---|
//! | busybox | static busybox, its applets in /bin, passwd and group with root, nobody, app (1000:1000) |
//! | envbase | busybox, and a config with Env, User, WorkingDir, Labels, Entrypoint, Cmd, Volumes, Healthcheck, Shell |
//! | onbuild-base | busybox, and ONBUILD triggers |
//! | layered | busybox, and layers with whiteouts, an opaque directory, hard links, odd modes |
//! | multi | an index of linux/amd64 and linux/arm64 |

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use tar::EntryType;

/// Names of the images, in the order that they are looked for below others.
pub(crate) const BASES: [&str; 5] = ["busybox", "envbase", "onbuild-base", "layered", "multi"];

/// 2024-01-01.
const STAMP: u64 = 1_704_067_200;
const DATE: &str = "2024-01-01T00:00:00Z";
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

const APPLETS: &str = "[ adduser addgroup ash awk base64 basename cat chgrp chmod chown chroot cmp cp cpio cut date dd
    deluser df diff dirname du echo egrep env expand expr false fgrep find fold free getopt grep groups gunzip gzip head
    hexdump hostname id install ip kill link ln ls lsof md5sum mkdir mkfifo mknod mktemp more mount mv nc nproc od paste
    pgrep pidof ping printenv printf ps pwd readlink realpath rev rm rmdir route sed seq sh sha256sum sha1sum sleep sort
    split stat strings su sync tac tail tar tee test time timeout touch tr true truncate tty umount uname uniq unlink unxz
    unzip uptime usleep vi wc wget which who whoami xargs xxd yes zcat";

/// Finds a static busybox: `$BUSYBOX`, else in PATH.
pub(crate) fn busybox() -> Option<PathBuf> {
    let named = std::env::var_os("BUSYBOX").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    named.or_else(|| std::env::split_paths(&path).map(|dir| dir.join("busybox")).find(|file| file.is_file()))
}

/// A layer's archive in the making.
pub(crate) struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    pub(crate) fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn add(mut self, name: &str, kind: EntryType, mode: u32, owner: (u64, u64), data: &[u8], link: &str) -> Self {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(owner.0);
        header.set_gid(owner.1);
        header.set_mtime(STAMP);
        header.set_size(data.len() as u64);
        if link.is_empty() {
            self.0.append_data(&mut header, name, data).expect("writing to memory");
        } else {
            self.0.append_link(&mut header, name, link).expect("writing to memory");
        }
        self
    }

    pub(crate) fn dir(self, name: &str, mode: u32, owner: (u64, u64)) -> Self {
        self.add(name, EntryType::Directory, mode, owner, b"", "")
    }

    pub(crate) fn file(self, name: &str, data: &[u8]) -> Self {
        self.file_with(name, data, 0o644, (0, 0))
    }

    pub(crate) fn file_with(self, name: &str, data: &[u8], mode: u32, owner: (u64, u64)) -> Self {
        self.add(name, EntryType::Regular, mode, owner, data, "")
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Self {
        self.add(name, EntryType::Symlink, 0o777, (0, 0), b"", target)
    }

    pub(crate) fn hard_link(self, name: &str, target: &str) -> Self {
        self.add(name, EntryType::Link, 0o644, (0, 0), b"", target)
    }

    pub(crate) fn fifo(self, name: &str) -> Self {
        self.add(name, EntryType::Fifo, 0o644, (0, 0), b"", "")
    }

    pub(crate) fn done(self) -> Vec<u8> {
        self.0.into_inner().expect("writing to memory")
    }
}

/// An OCI layout in the making.
pub(crate) struct Layout {
    dir: PathBuf,
}

impl Layout {
    pub(crate) fn new(dir: PathBuf) -> std::io::Result<Self> {
        std::fs::create_dir_all(dir.join("blobs/sha256"))?;
        Ok(Self { dir })
    }

    pub(crate) fn blob(&self, data: &[u8], media_type: &str) -> std::io::Result<Value> {
        let hex: String = Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect();
        std::fs::write(self.dir.join("blobs/sha256").join(&hex), data)?;
        Ok(json!({"mediaType": media_type, "digest": format!("sha256:{hex}"), "size": data.len()}))
    }

    /// Writes an image's blobs; returns its descriptor.
    pub(crate) fn image(&self, layers: &[&[u8]], config: &Value, architecture: &str) -> std::io::Result<Value> {
        let mut descriptors = Vec::new();
        let mut diff_ids = Vec::new();
        for layer in layers {
            let hex: String = Sha256::digest(layer).iter().map(|byte| format!("{byte:02x}")).collect();
            diff_ids.push(format!("sha256:{hex}"));
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(layer)?;
            descriptors.push(self.blob(&gzip.finish()?, "application/vnd.oci.image.layer.v1.tar+gzip")?);
        }
        let history: Vec<Value> = layers.iter().map(|_| json!({"created": DATE, "created_by": "base"})).collect();
        let config = json!({
            "created": DATE, "architecture": architecture, "os": "linux", "config": config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids}, "history": history,
        });
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self.blob(config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json")?,
            "layers": descriptors,
        });
        self.blob(manifest.to_string().as_bytes(), "application/vnd.oci.image.manifest.v1+json")
    }

    /// Names the image `latest`.
    pub(crate) fn finish(&self, mut descriptor: Value) -> std::io::Result<()> {
        descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": "latest"});
        let index = json!({"schemaVersion": 2, "manifests": [descriptor]});
        std::fs::write(self.dir.join("index.json"), index.to_string())?;
        std::fs::write(self.dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)
    }
}

/// The layer with busybox, its applets and a few users.
pub(crate) fn busybox_layer(busybox: &Path) -> std::io::Result<Vec<u8>> {
    tools_layer(busybox, busybox)
}

/// The same with another program, for another processor, in the place of busybox.
pub(crate) fn tools_layer(busybox: &Path, program: &Path) -> std::io::Result<Vec<u8>> {
    let list = Command::new(busybox).arg("--list").output()?.stdout;
    let list = String::from_utf8_lossy(&list).into_owned();
    let mut layer = Layer::new();
    for dir in "bin dev etc home home/app proc root sys tmp usr usr/bin var var/tmp".split(' ') {
        let owner = if dir == "home/app" { 1000 } else { 0 };
        let mode = match dir {
            "tmp" | "var/tmp" => 0o1777,
            "root" => 0o700,
            _ => 0o755,
        };
        layer = layer.dir(dir, mode, (owner, owner));
    }
    layer = layer.file_with("bin/busybox", &std::fs::read(program)?, 0o755, (0, 0));
    for applet in APPLETS.split_whitespace().filter(|applet| list.lines().any(|line| line == *applet)) {
        layer = layer.symlink(&format!("bin/{applet}"), "busybox");
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\nbin:x:2:2:bin:/bin:/bin/false\napp:x:1000:1000:App:/home/app:/bin/sh\n\
                  svc:x:1001:2000:Svc:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n";
    let group = "root:x:0:\nbin:x:2:\nstaff:x:50:app\napp:x:1000:\nwheel:x:3000:app,svc\nsvcs:x:2000:\n\
                 nogroup:x:65534:\n";
    Ok(layer.file("etc/passwd", passwd.as_bytes()).file("etc/group", group.as_bytes()).done())
}

/// Writes all base images below `dir`.
pub(crate) fn make_bases(dir: &Path, busybox: &Path) -> std::io::Result<()> {
    let tools = busybox_layer(busybox)?;
    let image = |name: &str, more: &[Vec<u8>], config: Value| -> std::io::Result<()> {
        let layout = Layout::new(dir.join(name))?;
        let layers: Vec<&[u8]> = std::iter::once(&tools).chain(more).map(Vec::as_slice).collect();
        layout.finish(layout.image(&layers, &config, "amd64")?)
    };
    const ROOT: (u64, u64) = (0, 0);

    image("busybox", &[], json!({"Env": [PATH], "Cmd": ["sh"]}))?;

    let srv = Layer::new().dir("srv", 0o755, ROOT).dir("srv/base", 0o755, (1000, 50)).file_with(
        "srv/base/keep",
        b"base\n",
        0o644,
        (1000, 50),
    );
    let config = json!({
        "Env": [PATH, "BASE_VAR=from-base", "SHARED=base", "EMPTY="], "User": "app:staff", "WorkingDir": "/srv/base",
        "Labels": {"base.label": "one", "shared": "base"}, "Entrypoint": ["/bin/echo", "base"], "Cmd": ["arg1", "arg2"],
        "Volumes": {"/data": {}}, "ExposedPorts": {"8080/tcp": {}}, "StopSignal": "SIGINT",
        "Shell": ["/bin/ash", "-e", "-c"],
        "Healthcheck": {"Test": ["CMD-SHELL", "true"], "Interval": 5_000_000_000_u64, "Retries": 2},
    });
    image("envbase", &[srv.done()], config)?;

    let triggers = [
        "ARG WHO=world",
        "RUN echo \"hello $WHO\" > /onbuild.txt",
        "COPY trigger.txt /trigger/",
        "ENV ONB=yes",
        "WORKDIR /onb",
    ];
    image("onbuild-base", &[], json!({"Env": [PATH], "Cmd": ["sh"], "OnBuild": triggers}))?;

    let first = Layer::new()
        .dir("d", 0o755, ROOT)
        .file("d/a", b"a\n")
        .file("d/b", b"b\n")
        .dir("d/sub", 0o755, ROOT)
        .file("d/sub/x", b"x\n")
        .dir("opq", 0o755, ROOT)
        .file("opq/old1", b"1\n")
        .file("opq/old2", b"2\n")
        .file("h1", b"hard\n")
        .hard_link("h2", "h1")
        .file("gone", b"gone\n")
        .file("swap", b"file\n")
        .symlink("lnk", "d")
        .symlink("lib64", "usr/lib")
        .dir("usr/lib", 0o755, ROOT);
    let second = Layer::new()
        .file(".wh.gone", b"")
        .dir("d", 0o755, ROOT)
        .file("d/.wh.a", b"")
        .dir("opq", 0o755, ROOT)
        .file("opq/.wh..wh..opq", b"")
        .file("opq/new", b"new\n")
        .dir("swap", 0o755, ROOT)
        .file("swap/inside", b"in\n")
        .file_with("suid", b"s\n", 0o4755, ROOT)
        .dir("sticky", 0o1777, ROOT)
        .dir("setgid", 0o2775, (0, 50));
    let third = Layer::new()
        .dir("d", 0o755, ROOT)
        .file("d/c", b"c\n")
        .file_with("d/b", b"b2\n", 0o600, (1000, 1000))
        .fifo("fifo")
        .dir("long", 0o755, ROOT)
        .file(&format!("long/{0}/{0}/{0}", "p".repeat(60)), b"long\n");
    image("layered", &[first.done(), second.done(), third.done()], json!({"Env": [PATH], "Cmd": ["sh"]}))?;

    let layout = Layout::new(dir.join("multi"))?;
    let mut manifests = Vec::new();
    for architecture in ["amd64", "arm64"] {
        let layer = Layer::new().file("arch", format!("{architecture}\n").as_bytes()).done();
        let config = json!({"Env": [PATH], "Labels": {"arch": architecture}});
        let mut descriptor = layout.image(&[&layer], &config, architecture)?;
        descriptor["platform"] = json!({"os": "linux", "architecture": architecture});
        if architecture == "arm64" {
            descriptor["platform"]["variant"] = json!("v8");
        }
        manifests.push(descriptor);
    }
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index = json!({"schemaVersion": 2, "mediaType": media_type, "manifests": manifests});
    layout.finish(layout.blob(index.to_string().as_bytes(), media_type)?)
}
