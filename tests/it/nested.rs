//! Builds inside of containers: what is chosen, what is said, and what still builds.
//!
//! The containers are runc's, with the rights that Docker gives, and with those that cures give. Only root can make
//! them; `unshare -Ur` is tried by everybody.

use crate::bases;
use crate::story::{Build, busybox_base, last_error, run};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::Command;

/// Capabilities of Docker's containers.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// What Docker's default profile refuses to those who have no more capabilities than these (Docker documentation,
/// Seccomp security profiles, and the calls for mounts that have come since), as far as the kernel knows it.
const REFUSED: &str = "acct add_key bpf clock_adjtime clock_settime create_module delete_module finit_module \
                       fsconfig fsmount fsopen fspick get_kernel_syms init_module io_uring_enter io_uring_register \
                       io_uring_setup ioperm iopl kexec_file_load kexec_load keyctl lookup_dcookie mount mount_setattr \
                       move_mount move_pages nfsservctl open_by_handle_at open_tree perf_event_open pivot_root \
                       query_module quotactl reboot request_key setns settimeofday stime swapoff swapon sysfs _sysctl \
                       umount umount2 unshare uselib userfaultfd ustat vhangup vm86 vm86old";

/// Paths that Docker masks, and makes read-only.
const MASKED: [&str; 9] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Builds that each container tries. `W` is where it may write.
const SCRIPT: &str = r#"
export PATH=/bin HOME=$W SOURCE_DATE_EPOCH=0 NO_COLOR=1
build() {
    echo "== $1"
    shift
    nacre build --progress=plain --store $W/store --build-context busybox=oci-layout:///base:latest "$@" 2>&1 < /dev/null
    echo "exit $?"
}
echo "== doctor"; nacre doctor --store $W/store 2>&1; echo "exit $?"
echo "== json"; nacre doctor --store $W/store --format json 2> /dev/null
build without-run --iidfile $W/plain --output type=oci,dest=$W/plain.tar,rewrite-timestamp=true -f /context/Plain /context
build auto --iidfile $W/auto --output type=oci,dest=$W/auto.tar,rewrite-timestamp=true /context
build chroot --isolation=chroot --no-cache --iidfile $W/chroot --output type=oci,dest=$W/chroot.tar,rewrite-timestamp=true /context
build chroot-mount --isolation=chroot -f /context/Mount /context
build escape --isolation=chroot -f /context/Escape /context
echo "left: [$(pidof sleep)]"
build chroot-network --isolation=chroot --no-cache --network=none /context
echo "== plain"; cat $W/plain; echo
echo "== id-auto"; cat $W/auto; echo
echo "== id-chroot"; cat $W/chroot; echo
echo "== end"
"#;

/// A step as each user, with what a mount would leave if it left something, and what only processes and devices show.
const DOCKERFILE: &str = "\
FROM busybox
COPY Plain /copied
RUN echo text > /file && chown 1000:1000 /file && mkdir -p /d/e && ln -s e /d/link && rm /copied
RUN echo x > /dev/null && head -c 8 /dev/urandom > /dev/full || true; test -c /dev/null && grep -q localhost /etc/hosts
RUN mkdir /p && mkfifo /p/fifo && chmod 4755 /file && mv /d /moved && echo 10.0.0.1 more >> /etc/other
RUN <<END
#!/bin/sh
echo from a heredoc > /heredoc
END
USER 1000
RUN test $(id -u) = 1000 && echo mine > /tmp/mine
";

/// Leaving the root directory, tracing the builder, staying behind.
const ESCAPE: &str = "\
FROM busybox
RUN mkdir -p /j/bin && cp /bin/busybox /j/bin/ && ! chroot /j /bin/busybox true
RUN test -z \"$(ls /proc)\" && cd ../../../.. && test ! -e .dockerenv && test ! -e context
RUN test ! -e /dev/mem && ! mknod /dev/mem1 b 7 0 || ! head -c 1 /dev/mem1
RUN sleep 1000 & sleep 1000 &
";

struct Container {
    text: String,
}

impl Container {
    fn section(&self, name: &str) -> &str {
        let from = self.text.split_once(&format!("== {name}\n"));
        let from = from.unwrap_or_else(|| panic!("no section {name}:\n{}", self.text)).1;
        from.split("\n== ").next().unwrap_or_default()
    }

    #[track_caller]
    fn says(&self, name: &str, words: &[&str]) {
        let section = self.section(name);
        for word in words {
            assert!(section.contains(word), "`{word}` is not in {name}:\n{section}\n\nof\n{}", self.text);
        }
    }

    /// The last error of a section.
    #[track_caller]
    fn fails_with(&self, name: &str, code: i32, words: &[&str]) {
        self.says(name, &[&format!("exit {code}")]);
        let error = last_error(self.section(name));
        for word in words {
            assert!(error.contains(word), "`{word}` is not in the error of {name}:\n{error}");
        }
    }

    /// State of a right according to doctor's JSON.
    fn right(&self, name: &str) -> Value {
        let found: Value = serde_json::from_str(self.section("json")).expect("doctor prints JSON");
        let rights = found["rights"].as_array().cloned().unwrap_or_default();
        rights.into_iter().find(|right| right["right"] == name).unwrap_or_else(|| panic!("no right {name}: {found}"))
    }

    fn chosen(&self) -> Value {
        let found: Value = serde_json::from_str(self.section("json")).expect("doctor prints JSON");
        found["isolation"].clone()
    }
}

/// Makes the directories that all tries use.
fn lay_out(root: &Path) {
    for (name, mode) in [
        ("bin", 0o755),
        ("context", 0o755),
        ("base", 0o755),
        ("proc", 0o755),
        ("sys", 0o755),
        ("dev", 0o755),
        ("etc", 0o755),
        ("tmp", 0o1777),
        ("w0", 0o755),
        ("w1000", 0o755),
    ] {
        fs::create_dir_all(root.join(name)).expect("a directory of our own");
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode)).expect("our own directory");
    }
    let busybox = bases::busybox().expect("busybox is in PATH");
    fs::copy(&busybox, root.join("bin/busybox")).expect("a copy");
    fs::copy(env!("CARGO_BIN_EXE_nacre"), root.join("bin/nacre")).expect("a copy");
    for applet in ["sh", "cat", "echo", "pidof"] {
        symlink("busybox", root.join("bin").join(applet)).expect("a link");
    }
    fs::write(root.join("context/Dockerfile"), DOCKERFILE).expect("a file of our own");
    fs::write(root.join("context/Plain"), "FROM busybox\nCOPY Plain /copied\nWORKDIR /w\nENV a=b\n").expect("a file");
    fs::write(root.join("context/Escape"), ESCAPE).expect("a file of our own");
    fs::write(root.join("context/Mount"), "FROM busybox\nRUN --mount=type=cache,target=/c true\n").expect("a file");
    fs::write(root.join("etc/resolv.conf"), "nameserver 192.0.2.1\n").expect("a file of our own");
    let copied =
        Command::new("cp").arg("-r").arg(busybox_base()).arg(root.join("base/..")).status().expect("cp starts");
    assert!(copied.success());
    fs::remove_dir(root.join("base")).expect("an empty directory");
    fs::rename(root.join("busybox"), root.join("base")).expect("a directory of our own");
}

/// What a container may do.
#[derive(Debug, Clone, Copy)]
struct Rights {
    /// Docker's default profile.
    seccomp: bool,
    /// Parts of /proc are masked.
    masked: bool,
    /// Root, else user 1000 without capabilities who cannot gain any.
    root: bool,
}

fn container(rights: Rights) -> Container {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let root = dir.path().join("rootfs");
    lay_out(&root);
    chown(root.join("w1000"), Some(1000), Some(1000)).expect("root may give files away");
    let (uid, capabilities): (u32, &[&str]) = if rights.root { (0, &CAPABILITIES) } else { (1000, &[]) };
    let refused: Vec<&str> = REFUSED.split_whitespace().collect();
    let mut linux = json!({
        "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"}],
        "resources": {"devices": [{"allow": false, "access": "rwm"}]},
    });
    if rights.seccomp {
        // New namespaces, by any of their flags: time (of clone3 alone) is no flag of clone.
        let flags = [0x0002_0000, 0x0200_0000, 0x0400_0000, 0x0800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000];
        let mut calls = vec![
            json!({"names": refused, "action": "SCMP_ACT_ERRNO", "errnoRet": 1}),
            json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}),
        ];
        calls.extend(flags.map(|flag| {
            let args = json!([{"index": 0, "value": flag, "valueTwo": flag, "op": "SCMP_CMP_MASKED_EQ"}]);
            json!({"names": ["clone"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "args": args})
        }));
        linux["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": calls,
        });
    }
    if rights.masked {
        linux["maskedPaths"] = json!(MASKED);
        linux["readonlyPaths"] = json!(READ_ONLY);
    }
    let tmpfs = |target: &str, kind: &str, options: &[&str]| json!({"destination": target, "type": kind, "source": kind, "options": options});
    let writable = format!("W=/w{uid}");
    let config = json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": uid, "gid": uid},
            "args": ["/bin/sh", "-c", format!("{writable}; {SCRIPT}")],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "noNewPrivileges": !rights.root,
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
        },
        "root": {"path": "rootfs"},
        "hostname": "job",
        "mounts": [
            tmpfs("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            tmpfs("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            tmpfs("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            tmpfs("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            tmpfs("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        ],
        "linux": linux,
    });
    fs::write(root.join(".dockerenv"), "").expect("a file of our own");
    fs::write(dir.path().join("config.json"), config.to_string()).expect("a file of our own");
    let mut command = Command::new("runc");
    let id = format!("nacre-{}-{}", std::process::id(), dir.path().file_name().unwrap_or_default().display());
    command.arg("--root").arg(dir.path().join("state")).args(["run", "--bundle"]).arg(dir.path()).arg(id);
    let ended = run(command, None);
    let text = ended.stdout();
    assert!(text.contains("== end"), "{rights:?}: the container did not come to the end:\n{text}\n{}", ended.stderr);
    Container { text }
}

/// Everything builds in namespaces, and what was built is what any of the others builds.
#[track_caller]
fn builds_in_namespaces(container: &Container) -> String {
    container.says("without-run", &["exit 0"]);
    container.says("auto", &["exit 0"]);
    assert_eq!(container.chosen(), "userns", "{}", container.text);
    for right in ["user-namespace", "overlay", "seccomp", "notification"] {
        assert_eq!(container.right(right)["state"], "works", "{right}: {}", container.text);
    }
    container.section("id-auto").trim().to_owned()
}

pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|metadata| std::os::unix::fs::MetadataExt::uid(&metadata) == 0)
}

#[test]
fn containers_with_dockers_profile_build_without_namespaces() {
    // Containers with real owners are root's to make.
    if !is_root() {
        return;
    }
    let root = container(Rights { seccomp: true, masked: true, root: true });
    root.says("without-run", &["exit 0"]);
    let words = ["cannot create a user namespace", "seccomp profile", "seccomp=unconfined", "--isolation=chroot"];
    root.fails_with("auto", 6, &words);
    root.says("chroot", &["notice: --isolation=chroot: steps share", "exit 0"]);
    root.says("escape", &["exit 0", "left: []"]);
    root.fails_with("chroot-mount", 6, &["the mount of \"/c\" cannot be had with --isolation=chroot"]);
    root.fails_with("chroot-network", 6, &["network", "cannot be had with --isolation=chroot"]);
    root.says(
        "doctor",
        &["refused  user namespace", "what helps: docker run --security-opt", "works    chroot", "exit 6"],
    );
    assert_eq!(root.chosen(), Value::Null);
    assert_eq!(root.right("user-namespace")["state"], "refused");
    assert!(root.right("user-namespace")["cure"].as_str().is_some_and(|cure| cure.contains("seccomp=unconfined")));
    assert_eq!(root.right("chroot")["state"], "works");

    let user = container(Rights { seccomp: true, masked: true, root: false });
    user.says("without-run", &["exit 0"]);
    user.fails_with("auto", 6, &["seccomp profile", "Dockerfiles without RUN build all the same"]);
    user.fails_with("chroot", 6, &["it takes root"]);
    user.says("doctor", &["refused  user namespace", "refused  chroot: it takes root", "exit 6"]);
    assert_eq!(root.section("plain"), user.section("plain"), "an image does not depend on who builds it");

    // With cures: first the profile alone, then /proc, too.
    let mut ids = vec![root.section("id-chroot").trim().to_owned()];
    for (masked, is_root) in [(true, true), (true, false), (false, true), (false, false)] {
        let container = container(Rights { seccomp: false, masked, root: is_root });
        ids.push(builds_in_namespaces(&container));
        assert_eq!(container.section("plain"), root.section("plain"));
        let state = if masked { "refused" } else { "works" };
        assert_eq!(container.right("fresh-proc")["state"], state, "{}", container.text);
        if masked {
            container.says("doctor", &["steps see the processes of this container", "systempaths=unconfined"]);
        }
        container.says("doctor", &["exit 0"]);
        if is_root {
            container.says("chroot", &["exit 0"]);
            ids.push(container.section("id-chroot").trim().to_owned());
        }
    }
    assert!(ids[0].starts_with("sha256:"), "{ids:?}");
    ids.dedup();
    assert_eq!(ids.len(), 1, "an image does not depend on how steps are kept from the machine: {ids:?}");
}

#[test]
fn a_user_namespace_of_the_callers_is_enough() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    lay_out(dir.path());
    let script = format!("W={0}/w0; {1}", dir.path().display(), SCRIPT.replace("export PATH=/bin", "export"))
        .replace("nacre ", &format!("{} ", env!("CARGO_BIN_EXE_nacre")))
        .replace("///base", &format!("//{}/base", dir.path().display()))
        .replace("/context", &format!("{}/context", dir.path().display()));
    let mut command = Command::new("unshare");
    command.args(["-Ur", "sh", "-c", &script]).env_remove("NACRE_STORE").env("TMPDIR", dir.path());
    let ended = run(command, None);
    let container = Container { text: ended.stdout() };
    builds_in_namespaces(&container);
    container.fails_with("chroot", 6, &["--isolation=chroot", "does not work in a user namespace"]);
    container.says("doctor", &["exit 0"]);
    crate::process::remove_tree(&dir.path().join("w0"));
}

#[test]
fn nothing_to_run_takes_no_namespace() {
    let build = Build::new().dockerfile(
        "FROM busybox AS one\nWORKDIR /made\nCOPY --chown=1:2 file /made/\nUSER app\nFROM busybox\nCOPY --from=one /made /made\n",
    );
    let build = build.file("file", "x").flag(format!("--output=type=oci,dest={}", "/dev/null"));
    let traced = |build: &Build| {
        let trace = build.path("trace");
        let nacre = build.command();
        let mut command = Command::new("strace");
        let calls =
            "trace=unshare,clone,clone3,fork,vfork,setns,mount,fsopen,fsmount,open_tree,move_mount,chroot,pivot_root";
        command.args(["-f", "-qq", "-e", calls, "-o"]).arg(&trace).arg(nacre.get_program()).args(nacre.get_args());
        let ended = run(command, None);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        fs::read_to_string(trace).expect("strace has written it")
    };
    let calls = traced(&build);
    assert!(calls.contains("clone"), "threads are seen: {calls}");
    let kept = |line: &&str| !line.contains("CLONE_THREAD");
    assert_eq!(calls.lines().filter(kept).filter(|line| line.contains('(')).collect::<Vec<_>>(), Vec::<&str>::new());
    // The twin that has something to run.
    let build = Build::new().dockerfile("FROM busybox\nRUN true\n");
    assert!(traced(&build).contains("CLONE_NEWNS"));
}

#[test]
fn a_base_that_a_step_runs_on_is_read_once() {
    let blobs = fs::read_dir(busybox_base().join("blobs/sha256")).expect("a layout").flatten();
    let layer = blobs.max_by_key(|blob| blob.metadata().map_or(0, |metadata| metadata.len())).expect("blobs");
    let layer = layer.file_name().into_string().expect("a digest");
    for dockerfile in ["FROM busybox\nRUN true\n", "FROM busybox\nWORKDIR /made\nCOPY file /made/\nRUN true\n"] {
        let build = Build::new().dockerfile(dockerfile).file("file", "x").flag("--output=type=cacheonly");
        let (trace, nacre) = (build.path("trace"), build.command());
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-e", "trace=open,openat,openat2", "-o"]).arg(&trace);
        command.arg(nacre.get_program()).args(nacre.get_args());
        let ended = run(command, None);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let trace = fs::read_to_string(trace).expect("strace has written it");
        assert_eq!(trace.lines().filter(|line| line.contains(&layer)).count(), 1, "{dockerfile}");
    }
}

#[test]
fn triggers_of_a_base_run_although_the_file_runs_nothing() {
    let base = Build::new().dockerfile("FROM busybox\nONBUILD RUN id -u > /triggered\n");
    let layout = base.path("base");
    let base = base.flag(format!("--output=type=oci,tar=false,dest={}", layout.display())).flag("-tbase:latest");
    base.runs();
    let build = Build::new().dockerfile("FROM base\nCOPY Dockerfile /\n");
    let build = build.flag(format!("--build-context=base=oci-layout://{}:latest", layout.display()));
    assert_eq!(build.image().file("/triggered"), "0\n");
}
