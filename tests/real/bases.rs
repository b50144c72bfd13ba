//! Base images from Debian's packages, made once a machine and kept as OCI layouts.

use crate::build::{nacre, run};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Debian with nothing but apt and certificates.
pub(crate) fn debian() -> String {
    base("debian", "ca-certificates")
}

/// Debian with Node.js and npm.
pub(crate) fn node() -> String {
    base("node", "ca-certificates,nodejs,npm")
}

/// Only a static busybox and its links.
pub(crate) fn busybox() -> String {
    layout("busybox", |dir| {
        let context = dir.join("context");
        fs::create_dir_all(&context).expect("a directory of our own");
        let program = ["/bin/busybox", "/usr/bin/busybox"].iter().find(|path| Path::new(path).exists());
        fs::copy(program.expect("busybox is installed"), context.join("busybox")).expect("busybox can be read");
        fs::write(
            context.join("Dockerfile"),
            "FROM scratch\nCOPY --chmod=755 busybox /bin/busybox\n\
             RUN [\"/bin/busybox\", \"--install\", \"-s\", \"/bin\"]\n\
             COPY <<passwd /etc/passwd\nroot:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\npasswd\n\
             COPY <<group /etc/group\nroot:x:0:\nnobody:x:65534:\ngroup\n\
             CMD [\"sh\"]\n",
        )
        .expect("a file of our own");
        context
    })
}

/// The program `busybox` comes from the build itself elsewhere; here Debian's packages are the source.
fn base(name: &str, packages: &str) -> String {
    layout(name, |dir| {
        let tar = dir.join("context/rootfs.tar");
        fs::create_dir_all(dir.join("context")).expect("a directory of our own");
        let include = format!("--include={packages}");
        run(Command::new("mmdebstrap")
            .args(["--quiet", "--variant=minbase", "--aptopt=Acquire::Retries \"5\"", &include, "bookworm"])
            .arg(&tar)
            .arg("http://deb.debian.org/debian"));
        // npm and pip trust what this machine trusts, also where a proxy signs for others.
        let certificates = std::env::var_os("SSL_CERT_FILE")
            .map_or_else(|| PathBuf::from("/etc/ssl/certs/ca-certificates.crt"), PathBuf::from);
        fs::copy(certificates, dir.join("context/ca-certificates.crt")).expect("ca-certificates is installed");
        let dockerfile = "FROM scratch\nADD rootfs.tar /\nCOPY ca-certificates.crt /etc/ssl/certs/\nCMD [\"bash\"]\n";
        fs::write(dir.join("context/Dockerfile"), dockerfile).expect("a file of our own");
        dir.join("context")
    })
}

/// `oci-layout://…` of a base; `prepare` makes its context when there is none yet.
fn layout(name: &str, prepare: impl FnOnce(&Path) -> PathBuf) -> String {
    let user =
        fs::metadata("/proc/self").map(|meta| std::os::unix::fs::MetadataExt::uid(&meta)).expect("/proc is mounted");
    let all = std::env::var_os("NACRE_TEST_BASES")
        .map_or_else(|| PathBuf::from(format!("/var/tmp/nacre-test-bases-{user}")), PathBuf::from);
    let dir = all.join(name);
    fs::create_dir_all(&dir).expect("the directory of bases can be made");
    // Several tests want the same base at once; the first makes it.
    let lock = File::create(dir.join("lock")).expect("the directory of bases can be written");
    lock.lock().expect("locks work in the directory of bases");
    let layout = dir.join("layout");
    if !layout.join("index.json").exists() {
        let context = prepare(&dir);
        let fresh = dir.join("layout.new");
        let _ = fs::remove_dir_all(&fresh);
        let output = format!("type=oci,dest={},tar=false", fresh.display());
        let store = dir.join("store");
        nacre(&store).arg("--output").arg(output).arg(&context).succeeds();
        fs::rename(&fresh, &layout).expect("both are in one directory");
    }
    format!("oci-layout://{}", layout.display())
}
