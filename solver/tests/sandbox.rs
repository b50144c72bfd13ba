//! Steps in the real sandbox, on a root file system made of a static busybox.
//!
//! Run by root, everything is tried three times: as root, as a user with subordinate ids when /etc/subuid names one,
//! and as `nobody`, who has a single id. Run by anybody else, with the ids there are and with a single one.
#![allow(clippy::print_stdout, clippy::exit, clippy::disallowed_methods)]

use nacre_solver::sandbox::emulation::{Emulation, Scope};
use nacre_solver::sandbox::idmap::{self, EnterRequest, Entered};
use nacre_solver::sandbox::{
    self, Cancel, Net, Outcome, Ownership, Right, Rootfs, RunSpec, SANDBOX_ARGUMENT, SandboxError, SetupMount,
    SpecProblem, Status, Stream, Verdict,
};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, io, panic, thread};

const BEST: &str = "--cases=best";
const SINGLE: &str = "--cases=single";
/// Runs a step on the layer that follows, for as many seconds as follow, and waits for its end.
const LINGER: &str = "--linger";

fn main() {
    let args: Vec<String> = env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some(SANDBOX_ARGUMENT) => sandbox::sandbox_main(),
        Some(BEST) => cases(EnterRequest::Best),
        Some(SINGLE) => cases(EnterRequest::SingleId),
        Some(LINGER) => linger(Path::new(&args[1]), &args[2]),
        _ => identities(),
    }
}

/// A label, how ids are mapped, and the user and group to run as.
type Identity = (String, &'static str, Option<(u32, u32)>);

/// Runs the cases as everybody who can be had.
fn identities() {
    let busybox = find_busybox().expect("a static busybox is in PATH");
    let mut runs: Vec<Identity> = Vec::new();
    if rustix::process::geteuid().is_root() {
        runs.push(("root".into(), BEST, None));
        match user_with_subordinate_ids() {
            Some((name, ids)) => runs.push((format!("{name}, with subordinate ids"), BEST, Some(ids))),
            None => println!("a user with subordinate ids: skipped, /etc/subuid names none"),
        }
        runs.push(("nobody, with a single id".into(), SINGLE, Some((65534, 65534))));
    } else {
        runs.push(("this user".into(), BEST, None));
        runs.push(("this user, with a single id".into(), SINGLE, None));
    }
    let (mut passed, mut failed) = (0, 0);
    for (label, mode, ids) in runs {
        let dir = tempfile::tempdir().expect("temporary directory");
        // The program may be where the other user cannot reach it.
        let program = dir.path().join("sandbox-test");
        fs::copy("/proc/self/exe", &program).expect("copy of the program");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("permissions");
        let work = dir.path().join("work");
        fs::create_dir(&work).expect("directory");
        let mut command = Command::new(&program);
        command.arg(mode).env("TMPDIR", &work).env("NACRE_TEST_BUSYBOX", &busybox).current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        if let Some((uid, gid)) = ids {
            std::os::unix::fs::chown(&work, Some(uid), Some(gid)).expect("chown");
            command.uid(uid).gid(gid);
        }
        let output = command.output().expect("run of the cases");
        let text = String::from_utf8_lossy(&output.stdout);
        print!("{label}:\n{text}");
        let counts: Vec<u32> =
            text.lines().last().unwrap_or("").split_whitespace().filter_map(|word| word.parse().ok()).collect();
        match counts[..] {
            [good, bad] => {
                passed += good;
                failed += bad;
            }
            _ => failed += 1,
        }
        // What was made with other ids can only be removed by somebody who has them: root here.
        if !rustix::process::geteuid().is_root() {
            _ = fs::set_permissions(&work, fs::Permissions::from_mode(0o700));
        }
    }
    println!("{passed} passed, {failed} failed");
    if failed > 0 {
        std::process::exit(1);
    }
}

fn find_busybox() -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join("busybox")).find(|path| path.is_file())
}

fn user_with_subordinate_ids() -> Option<(String, (u32, u32))> {
    let (subuid, passwd) = (fs::read_to_string("/etc/subuid").ok()?, fs::read_to_string("/etc/passwd").ok()?);
    subuid.lines().filter_map(|line| line.split(':').next()).find_map(|name| {
        let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
        let fields: Vec<&str> = line.split(':').collect();
        let ids = (fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?);
        (ids.0 != 0).then(|| (name.to_owned(), ids))
    })
}

/// Runs all cases as the current user.
fn cases(request: EnterRequest) {
    match idmap::enter(request) {
        Ok(Entered::Parent { exit_code }) => std::process::exit(exit_code),
        Ok(_) => {}
        Err(error) => {
            println!("  skipped: {error}");
            println!("0 passed, 0 failed");
            return;
        }
    }
    let (mut passed, mut failed) = (0, 0);
    for (name, case) in CASES {
        let fixture = Fixture::new();
        match panic::catch_unwind(panic::AssertUnwindSafe(|| case(&fixture))) {
            Ok(()) => passed += 1,
            Err(_) => {
                failed += 1;
                println!("  FAILED: {name}");
            }
        }
    }
    println!("  {passed} passed, {failed} failed");
    std::process::exit(i32::from(failed > 0));
}

/// A layer with busybox, and places for steps.
struct Fixture {
    dir: tempfile::TempDir,
    layer: PathBuf,
    native: bool,
}

/// A step that has ended.
struct Ran {
    outcome: Outcome,
    out: String,
    err: String,
    upper: PathBuf,
}

const APPLETS: &str = "awk cat chmod chown df echo false grep head hostname id ifconfig kill ln ls mkdir mknod mount \
                       mv printf ps pwd readlink reboot rm rmdir sed sh sleep sort stat tail test touch true tr \
                       ulimit umask umount unshare wc";

impl Fixture {
    fn new() -> Fixture {
        let dir = tempfile::tempdir().expect("temporary directory");
        let layer = dir.path().join("layer");
        for name in ["bin", "etc", "tmp", "root", "dev", "proc", "sys", "opt"] {
            fs::create_dir_all(layer.join(name)).expect("directory");
        }
        let busybox = env::var_os("NACRE_TEST_BUSYBOX").expect("busybox");
        fs::copy(busybox, layer.join("bin/busybox")).expect("busybox");
        for applet in APPLETS.split_whitespace() {
            symlink("busybox", layer.join("bin").join(applet)).expect("link");
        }
        fs::write(layer.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n")
            .expect("passwd");
        fs::write(layer.join("etc/hosts"), "of the image\n").expect("hosts");
        fs::write(layer.join("etc/resolv.conf"), "of the image\n").expect("resolv.conf");
        let native = idmap::ownership() == Ownership::Native;
        Fixture { dir, layer, native }
    }

    /// Makes an empty directory.
    fn dir(&self) -> PathBuf {
        let dir = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir_in(self.dir.path());
        dir.expect("directory").keep()
    }

    fn spec(&self, args: &[&str]) -> RunSpec {
        RunSpec {
            isolation: sandbox::Isolation::Namespaces,
            group: None,
            rootfs: Rootfs::Overlay { lowers: vec![self.layer.clone()], upper: self.dir(), work: self.dir() },
            mounts: Vec::new(),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            env: vec![("PATH".into(), "/usr/bin:/bin".into())],
            cwd: "/".into(),
            uid: 0,
            gid: 0,
            groups: Vec::new(),
            hostname: "buildkitsandbox".into(),
            hosts: "127.0.0.1 localhost\n".into(),
            resolv_conf: "nameserver 192.0.2.1\n".into(),
            network: Net::Host,
            insecure: false,
            shm_size_bytes: 64 << 20,
            ulimits: Vec::new(),
            umask: 0o022,
            scratch_dir: self.dir(),
            emulation: (!self.native).then(|| Emulation {
                scope: Scope::SingleId,
                lower: None,
                known: None,
                result: self.dir().join("owners"),
            }),
        }
    }

    fn run(&self, spec: &RunSpec) -> Result<Ran, SandboxError> {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let outcome = sandbox::run(spec, &Cancel::new()?, &mut |stream, bytes| match stream {
            Stream::Stdout => out.extend_from_slice(bytes),
            Stream::Stderr => err.extend_from_slice(bytes),
        })?;
        let upper = match &spec.rootfs {
            Rootfs::Overlay { upper, .. } => upper.clone(),
            Rootfs::Plain { dir } => dir.clone(),
        };
        assert_eq!(fs::read_dir(&spec.scratch_dir).expect("scratch").count(), 0, "scratch directory is empty");
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(Ran { outcome, out: text(out), err: text(err), upper })
    }

    /// Runs a shell script in a spec that `change` has seen; it must end well.
    fn with(&self, script: &str, change: impl FnOnce(&mut RunSpec)) -> Ran {
        let mut spec = self.spec(&["sh", "-c", script]);
        change(&mut spec);
        let ran = self.run(&spec).unwrap_or_else(|error| panic!("{script}: {}", explained(&error)));
        assert_eq!(ran.outcome.status, Status::Exit(0), "{script}: {}{}", ran.out, ran.err);
        ran
    }

    fn sh(&self, script: &str) -> Ran {
        self.with(script, |_| {})
    }

    fn out(&self, script: &str) -> String {
        self.sh(script).out
    }

    fn mounts(&self, script: &str, mounts: Vec<SetupMount>) -> Ran {
        self.with(script, |spec| spec.mounts = mounts)
    }

    /// A directory with one file.
    fn tree(&self, name: &str, content: &str) -> PathBuf {
        let dir = self.dir();
        let path = dir.join(name);
        fs::create_dir_all(path.parent().expect("parent")).expect("directory");
        fs::write(path, content).expect("file");
        dir
    }
}

impl Ran {
    /// Paths in the upper directory; `path!` is a whiteout.
    fn written(&self) -> Vec<String> {
        let mut paths = Vec::new();
        list(&self.upper, &self.upper, &mut paths);
        paths.sort();
        paths
    }
}

fn list(root: &Path, dir: &Path, paths: &mut Vec<String>) {
    for entry in fs::read_dir(dir).expect("directory").flatten() {
        let path = entry.path();
        let name = path.strip_prefix(root).expect("below root").display().to_string();
        let metadata = path.symlink_metadata().expect("metadata");
        let whiteout = metadata.file_type().is_char_device() && metadata.rdev() == 0;
        paths.push(if whiteout { format!("{name}!") } else { name });
        if metadata.is_dir() {
            list(root, &path, paths);
        }
    }
}

fn explained(error: &dyn std::error::Error) -> String {
    error.source().map_or(error.to_string(), |source| format!("{error}: {}", explained(source)))
}

/// Command lines of processes that contain `word`.
fn processes(word: &str) -> Vec<String> {
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    let lines = entries.filter_map(|entry| {
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        Some(String::from_utf8_lossy(&line).replace('\0', " "))
    });
    lines.filter(|line| line.contains(word)).collect()
}

fn wait_until_gone(word: &str) {
    let start = Instant::now();
    while !processes(word).is_empty() {
        assert!(start.elapsed() < Duration::from_secs(10), "still there: {:?}", processes(word));
        thread::sleep(Duration::from_millis(5));
    }
}

/// A number that no other test uses as the argument of `sleep`.
fn unique_seconds(salt: u32) -> String {
    format!("{}", 1_000_000 + u64::from(std::process::id()) * 100 + u64::from(salt))
}

type Case = (&'static str, fn(&Fixture));

const CASES: &[Case] = &[
    ("exit codes come back", |fixture| {
        for code in [0, 1, 3, 127, 255] {
            let ran = fixture.run(&fixture.spec(&["sh", "-c", &format!("exit {code}")])).expect("run");
            assert_eq!(ran.outcome.status, Status::Exit(code));
        }
    }),
    ("a signal from outside comes back as such", |fixture| {
        let spec = fixture.spec(&["sh", "-c", "echo ready; while :; do sleep 1; done"]);
        let outcome = sandbox::run(&spec, &Cancel::new().expect("cancel"), &mut |_, _| {
            let children = |pid: i32| -> Vec<i32> {
                let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
                let lists = tasks.map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default());
                lists
                    .flat_map(|list| list.split_whitespace().map(|pid| pid.parse().expect("pid")).collect::<Vec<_>>())
                    .collect()
            };
            // The spawner has no children.
            let step = children(std::process::id() as i32).into_iter().flat_map(children).next().expect("step");
            let pid = rustix::process::Pid::from_raw(step).expect("pid");
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill");
        });
        assert_eq!(outcome.map_err(|error| explained(&error)).expect("run").status, Status::Signal(9));
        assert_eq!(Status::Signal(9).code(), 137);
    }),
    ("signals in the step are the step's business", |fixture| {
        assert_eq!(fixture.out("sh -c 'kill -9 $$'; echo $?"), "137\n");
    }),
    ("the command is process 1 in a session of its own, with nothing open but the standard streams", |fixture| {
        assert_eq!(fixture.out("echo $$; cat; exec ls /proc/self/fd"), "1\n0\n1\n2\n3\n");
        assert_eq!(fixture.out("readlink /proc/self/fd/0 | cut -d: -f1; awk '{print $6}' /proc/1/stat"), "pipe\n1\n");
    }),
    ("both streams are passed on in full", |fixture| {
        let ran = fixture.sh("i=0; while [ $i -lt 20000 ]; do echo 0123456789; i=$((i+1)); done; echo problem >&2");
        assert_eq!((ran.out.len(), ran.err.as_str()), (220_000, "problem\n"));
    }),
    ("left-over processes die with the step", |fixture| {
        let seconds = unique_seconds(1);
        let start = Instant::now();
        fixture.sh(&format!("sleep {seconds} & (sleep {seconds} >/dev/null 2>&1 &); echo done"));
        assert!(start.elapsed() < Duration::from_secs(20));
        assert_eq!(processes(&seconds), [""; 0]);
    }),
    ("capabilities, filter and privileges are those of a container", |fixture| {
        // The host's network belongs to real root, who could read what others receive.
        let map = fs::read_to_string("/proc/self/uid_map").expect("/proc");
        let of_host = if map.split_whitespace().eq(["0", "0", "4294967295"]) { "a80405fb" } else { "a80425fb" };
        for (network, set) in [(Net::None, "a80425fb"), (Net::Host, of_host)] {
            let script = "grep -E '^(Cap(Inh|Prm|Eff|Bnd|Amb)|NoNewPrivs|Seccomp):' /proc/self/status | tr '\\t' ' '";
            let status = fixture.with(script, |spec| spec.network = network.clone()).out;
            let expected = format!(
                "CapInh: 0000000000000000\nCapPrm: 00000000{set}\nCapEff: 00000000{set}\n\
                 CapBnd: 00000000{set}\nCapAmb: 0000000000000000\nNoNewPrivs: 0\nSeccomp: 2\n"
            );
            assert_eq!(status, expected);
        }
    }),
    ("the machine and the mounts cannot be changed", |fixture| {
        for attempt in [
            "mount -t tmpfs none /tmp",
            "umount /proc",
            "mount -o remount,rw /sys",
            "unshare -U true",
            "unshare -m true",
            "reboot -f",
            "hostname other",
            "echo 1 > /proc/sys/kernel/domainname",
            "echo b > /proc/sysrq-trigger",
            "touch /sys/x",
            "head -c1 /proc/kcore | grep .",
            "echo x >> /etc/hosts",
            "ls /sys/firmware | grep .",
        ] {
            let ran = fixture.run(&fixture.spec(&["sh", "-c", attempt])).expect("run");
            assert_ne!(ran.outcome.status, Status::Exit(0), "{attempt}: {}", ran.out);
        }
    }),
    ("insecure lifts the limits", |fixture| {
        let ran =
            fixture.with("mount -t tmpfs none /tmp && grep Seccomp: /proc/self/status", |spec| spec.insecure = true);
        assert_eq!(ran.out, if fixture.native { "Seccomp:\t0\n" } else { "Seccomp:\t2\n" });
    }),
    ("devices on the root file system cannot be opened", |fixture| {
        match fixture.native {
            true => fixture.sh("mknod /n c 1 3 2>/dev/null || exit 0; if echo x > /n 2>/dev/null; then exit 1; fi"),
            // What stands in its place is a file, whatever is said about it.
            false => fixture.sh("mknod /n c 1 3 && test -c /n && echo x > /n && grep x /n"),
        };
    }),
    ("/dev is that of a container", |fixture| {
        let expected =
            "core\nfd\nfull\nmqueue\nnull\nptmx\npts\nrandom\nshm\nstderr\nstdin\nstdout\ntty\nurandom\nzero\n";
        assert_eq!(fixture.out("ls /dev"), expected);
        assert_eq!(
            fixture.out("echo x > /dev/null && head -c 2 /dev/zero | wc -c && echo > /dev/new && rm /dev/new"),
            "2\n"
        );
        let ran = fixture.with("df -k /dev/shm | tail -1 | awk '{print $2}'", |spec| spec.shm_size_bytes = 32 << 20);
        assert_eq!(ran.out, "32768\n");
    }),
    ("identity and limits are as asked", |fixture| {
        let ran = fixture.with("hostname; umask; ulimit -n; ulimit -Hn; cat /etc/hosts /etc/resolv.conf", |spec| {
            spec.ulimits = vec![("nofile".into(), 100, 200), ("core".into(), 0, 0)];
            spec.umask = 0o027;
        });
        let expected = "buildkitsandbox\n0027\n100\n200\n127.0.0.1 localhost\nnameserver 192.0.2.1\n";
        assert_eq!(ran.out, expected);
        let mut spec = fixture.spec(&["true"]);
        spec.ulimits = vec![("files".into(), 1, 1)];
        let error = fixture.run(&spec).map(|ran| ran.outcome).expect_err("unknown limit");
        assert!(matches!(error, SandboxError::Spec { problem: SpecProblem::UnknownLimit(_) }), "{error}");
    }),
    ("the environment is what was given, and HOME", |fixture| {
        let ran = fixture.with("cat /proc/1/environ | tr '\\0' '\\n'", |spec| {
            spec.env.push(("A".into(), "two words".into()));
        });
        assert_eq!(ran.out, "PATH=/usr/bin:/bin\nA=two words\nHOME=/root\n");
        let ran = fixture.with("echo $HOME", |spec| spec.env.push(("HOME".into(), "/own".into())));
        assert_eq!(ran.out, "/own\n");
    }),
    ("another user is another user", |fixture| {
        let script =
            "id -u; id -g; id -G; echo $HOME; echo x > /dev/stdout; grep CapEff /proc/self/status | tr '\\t' ' '";
        let ran = fixture.with(script, |spec| (spec.uid, spec.gid, spec.groups) = (1000, 1000, vec![1000, 50, 3000]));
        // The kernel's own view of an emulated user is root's.
        let capabilities = if fixture.native { "0000000000000000" } else { "00000000a80425fb" };
        let expected = format!("1000\n1000\n1000 50 3000\n/home/app\nx\nCapEff: {capabilities}\n");
        assert_eq!(ran.out, expected);
    }),
    ("ownership is changed", |fixture| {
        let owner = fixture.out("touch /f && chown 5:6 /f && chown -h 5:6 /bin/sh && stat -c %u:%g /f");
        assert_eq!(owner, "5:6\n");
    }),
    ("commands are looked up in PATH", |fixture| {
        fs::write(fixture.layer.join("opt/tool"), "#!/bin/sh\necho found").expect("tool");
        fs::write(fixture.layer.join("opt/data"), "data").expect("data");
        fs::write(fixture.layer.join("opt/lost"), "#!/no/such\n").expect("lost");
        for (name, mode) in [("tool", 0o755), ("data", 0o644), ("lost", 0o755)] {
            fs::set_permissions(fixture.layer.join("opt").join(name), fs::Permissions::from_mode(mode)).expect("chmod");
        }
        for (program, path, status, words) in [
            ("tool", "/opt", 0, ""),
            ("tool", "/bin", 127, "no such program in PATH (/bin)"),
            ("/opt/tool", "", 0, ""),
            ("/opt/none", "/opt", 127, "not found"),
            ("/opt/lost", "/opt", 127, "interpreter"),
            ("/opt/data", "/opt", 126, "Permission denied"),
            ("/opt", "/opt", 126, "Permission denied"),
        ] {
            let mut spec = fixture.spec(&[program]);
            spec.env = vec![("PATH".into(), path.into())];
            let ran = fixture.run(&spec).expect("run");
            assert_eq!(ran.outcome.status, Status::Exit(status), "{program}: {}", ran.err);
            assert!(ran.err.contains(words), "{program}: {}", ran.err);
        }
        let error = fixture.run(&fixture.spec(&[])).map(|ran| ran.outcome).expect_err("no command");
        assert!(matches!(error, SandboxError::Spec { problem: SpecProblem::NoCommand }), "{error}");
    }),
    ("the working directory is made when it is missing", |fixture| {
        let ran = fixture.with("pwd", |spec| spec.cwd = "/a/b".into());
        assert_eq!((ran.out.as_str(), ran.written()), ("/a/b\n", vec!["a".to_owned(), "a/b".into()]));
        for cwd in ["/proc/self/fd/3", "/proc/self/fd/4", "/proc/self/fd/5", "/proc/self/fd/7"] {
            let mut spec = fixture.spec(&["pwd"]);
            spec.cwd = cwd.into();
            if let Ok(ran) = fixture.run(&spec) {
                panic!("{cwd} led to {}", ran.out);
            }
        }
    }),
    ("a step that writes nothing leaves nothing", |fixture| {
        assert_eq!(fixture.sh("true").written(), [""; 0]);
        assert_eq!(fixture.sh("echo x > /new; rm /etc/passwd").written(), ["etc", "etc/passwd!", "new"]);
    }),
    ("on an empty root file system only /proc, /sys and /dev stay", |fixture| {
        let mut spec = fixture.spec(&["/opt/bb", "touch", "/ran"]);
        let Rootfs::Overlay { lowers, .. } = &mut spec.rootfs else { panic!("overlay") };
        let source = lowers.pop().expect("layer").join("bin/busybox");
        // Started under a name that is no applet, it takes the first argument as one.
        spec.args = vec!["/opt/busybox".into(), "touch".into(), "/ran".into()];
        spec.mounts = vec![SetupMount::Bind { source, target: "/opt/busybox".into(), read_only: true }];
        let ran = fixture.run(&spec).unwrap_or_else(|error| panic!("{}", explained(&error)));
        assert_eq!(ran.outcome.status, Status::Exit(0), "{}", ran.err);
        assert_eq!(ran.written(), ["dev", "proc", "ran", "sys"]);
        assert_eq!(ran.outcome.created_mountpoints, ["/proc", "/dev", "/sys"]);
        assert_eq!(fs::metadata(ran.upper.join("dev")).expect("dev").mode() & 0o7777, 0o755);
    }),
    ("times of directories around mount points are kept", |fixture| {
        fs::remove_file(fixture.layer.join("etc/hosts")).expect("remove");
        fs::remove_file(fixture.layer.join("etc/resolv.conf")).expect("remove");
        let old = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        for dir in [fixture.layer.join("etc"), fixture.layer.clone()] {
            fs::File::open(dir).and_then(|dir| dir.set_modified(old)).expect("times");
        }
        let mounts = |target: &str| vec![SetupMount::Tmpfs { target: target.into(), size_bytes: 0, read_only: false }];
        let ran = fixture.mounts("ls /etc/hosts", mounts("/etc/deep/er"));
        assert_eq!(ran.written(), [""; 0]);
        let ran = fixture.mounts("chmod 700 /etc", mounts("/etc/deep/er"));
        assert_eq!(ran.written(), ["etc"]);
        assert_eq!(fs::metadata(ran.upper.join("etc")).and_then(|etc| etc.modified()).expect("time"), old);
    }),
    ("resolv.conf may be a dangling link", |fixture| {
        let path = fixture.layer.join("etc/resolv.conf");
        fs::remove_file(&path).expect("remove");
        symlink("../run/systemd/stub.conf", &path).expect("link");
        let ran = fixture.sh("cat /etc/resolv.conf");
        assert_eq!((ran.out.as_str(), ran.written()), ("nameserver 192.0.2.1\n", vec![]));
    }),
    ("system directories must not be links", |fixture| {
        fs::remove_dir(fixture.layer.join("proc")).expect("remove");
        symlink("tmp", fixture.layer.join("proc")).expect("link");
        let error = fixture.run(&fixture.spec(&["true"])).map(|ran| ran.outcome).expect_err("link");
        assert!(matches!(error, SandboxError::Spec { problem: SpecProblem::NotDirectory(_) }), "{error}");
    }),
    ("files and directories of the host can be bound", |fixture| {
        let dir = fixture.tree("sub/f", "content\n");
        let bind = |source: &Path, target: &str, read_only| SetupMount::Bind {
            source: source.to_owned(),
            target: target.into(),
            read_only,
        };
        let script = "cat /in/sub/f /etc/passwd; touch /in/n 2>/dev/null || echo ro; echo w > /out/w";
        let mounts =
            vec![bind(&dir, "/in", true), bind(&dir.join("sub/f"), "/etc/passwd", true), bind(&dir, "/out", false)];
        let ran = fixture.mounts(script, mounts);
        assert_eq!((ran.out.as_str(), ran.written()), ("content\ncontent\nro\n", vec![]));
        assert_eq!(fs::read_to_string(dir.join("w")).expect("written"), "w\n");

        let mut spec = fixture.spec(&["true"]);
        spec.mounts = vec![bind(Path::new("/no/such"), "/x", true)];
        let error = fixture.run(&spec).map(|ran| ran.outcome).expect_err("no source");
        assert!(matches!(error, SandboxError::Spec { problem: SpecProblem::NoSource(_) }), "{error}");
    }),
    ("snapshots can be bound, in part, and keep what they had", |fixture| {
        let (top, bottom) = (fixture.tree("d/new", "new\n"), fixture.tree("d/old", "old\n"));
        symlink("/d/old", top.join("link")).expect("link");
        let bind = |lowers: Vec<PathBuf>, subpath: &str, target: &str, read_only| SetupMount::OverlayBind {
            lowers,
            upper: fixture.dir(),
            work: fixture.dir(),
            subpath: subpath.into(),
            target: target.into(),
            read_only,
            owners: None,
        };
        let both = || vec![top.clone(), bottom.clone()];
        let mounts = vec![
            bind(both(), "/", "/all", true),
            bind(both(), "/d", "/rw", false),
            bind(both(), "link", "/file", true),
            bind(vec![bottom.clone()], "/", "/one", true),
            bind(vec![], "/", "/none", true),
            bind(vec![top.clone(), bottom.clone(), top.clone()], "/d", "/twice", true),
        ];
        let script = "ls /all/d /one/d /none /twice; cat /file; echo x > /rw/n && cat /rw/n; touch /all/n 2>/dev/null || echo ro";
        let ran = fixture.mounts(script, mounts);
        assert_eq!(ran.out, "/all/d:\nnew\nold\n\n/none:\n\n/one/d:\nold\n\n/twice:\nnew\nold\nold\nx\nro\n");
        assert_eq!(ran.written(), [""; 0]);
        assert!(!top.join("d/n").exists() && !bottom.join("d/n").exists());
    }),
    ("mounts can lie in mounts and over mounts", |fixture| {
        let dir = fixture.tree("a", "");
        let tmpfs = |target: &str| SetupMount::Tmpfs { target: target.into(), size_bytes: 1 << 20, read_only: false };
        let bind = |target: &str| SetupMount::Bind { source: dir.clone(), target: target.into(), read_only: true };
        let mounts = vec![tmpfs("/t"), bind("/t/in"), tmpfs("/u"), bind("/u"), tmpfs("/tmp")];
        let ran = fixture.mounts("ls /t/in /u; stat -c %a /t /tmp; df -k /t | tail -1 | awk '{print $2}'", mounts);
        assert_eq!(ran.out, "/t/in:\na\n\n/u:\na\n1777\n755\n1024\n");
        assert_eq!(ran.written(), [""; 0]);
    }),
    ("secrets and heredocs live in memory", |fixture| {
        let mounts = vec![
            SetupMount::Secret {
                content: b"s3\0\xffcret".to_vec(),
                target: "/run/secrets/tok".into(),
                mode: 0o440,
                uid: 1000,
                gid: 50,
            },
            SetupMount::Inline {
                content: b"#!/bin/sh\necho inline".to_vec(),
                target: "/dev/pipes/EOF".into(),
                mode: 0o755,
                uid: 0,
                gid: 0,
            },
        ];
        let script = "wc -c < /run/secrets/tok; stat -c '%u:%g %a' /run/secrets/tok; /dev/pipes/EOF; echo x > /run/secrets/tok || echo ro";
        let ran = fixture.mounts(script, mounts);
        assert_eq!(ran.out, "8\n1000:50 440\ninline\nro\n");
        assert_eq!(ran.written(), [""; 0]);
    }),
    ("a mount point that was used stays", |fixture| {
        let mounts = vec![SetupMount::Tmpfs { target: "/deep/er".into(), size_bytes: 0, read_only: false }];
        let ran = fixture.mounts("echo x > /deep/er/lost; echo y > /deep/kept", mounts);
        assert_eq!(ran.written(), ["deep", "deep/kept"]);
        assert_eq!(ran.outcome.created_mountpoints, ["/deep"]);
    }),
    ("sockets can be bound", |fixture| {
        let dir = fixture.dir();
        let _socket = std::os::unix::net::UnixListener::bind(dir.join("s")).expect("socket");
        let mount = SetupMount::Socket {
            source: dir.join("s"),
            target: "/run/buildkit/ssh_agent.0".into(),
            mode: 0o600,
            uid: 0,
            gid: 0,
        };
        let ran =
            fixture.mounts("test -S /run/buildkit/ssh_agent.0 && stat -c %a /run/buildkit/ssh_agent.0", vec![mount]);
        assert_eq!((ran.out.as_str(), ran.written()), ("600\n", vec![]));
    }),
    ("mount targets cannot leave the root or fake /proc", |fixture| {
        let outside = fixture.dir();
        symlink(&outside, fixture.layer.join("opt/absolute")).expect("link");
        symlink(format!("../../../../../../../..{}", outside.display()), fixture.layer.join("opt/up")).expect("link");
        let bind = |target: &str| SetupMount::Bind { source: fixture.dir(), target: target.into(), read_only: true };
        fixture.mounts("true", vec![bind("/opt/absolute/x"), bind("/opt/up/y"), bind("/../../z")]);
        assert_eq!(fs::read_dir(&outside).expect("directory").count(), 0);
        for (target, problem) in [
            ("/proc/self/attr", SpecProblem::TargetInProc("/proc/self/attr".into())),
            ("/proc", SpecProblem::TargetInProc("/proc".into())),
            ("/", SpecProblem::TargetIsRoot("/".into())),
        ] {
            let mut spec = fixture.spec(&["true"]);
            spec.mounts = vec![bind(target)];
            match fixture.run(&spec).map(|ran| ran.outcome) {
                Err(SandboxError::Spec { problem: found }) => assert_eq!(found, problem),
                other => panic!("{target}: {other:?}"),
            }
        }
    }),
    ("an empty network has a loopback interface that is up", |fixture| {
        let ran =
            fixture.with("ls /sys/class/net; ifconfig lo | grep -c 'UP.*RUNNING'", |spec| spec.network = Net::None);
        assert_eq!(ran.out, "lo\n1\n");
        let own = fs::read_link("/proc/self/ns/net").expect("namespace");
        assert_eq!(fixture.out("readlink /proc/self/ns/net").trim(), own.to_string_lossy());
        // Only the owner of a network namespace can enter it.
        if fs::read_to_string("/proc/self/uid_map").expect("map").contains("4294967295") {
            let join = |spec: &mut RunSpec| spec.network = Net::Join("/proc/self/ns/net".into());
            assert_eq!(fixture.with("readlink /proc/self/ns/net", join).out.trim(), own.to_string_lossy());
        }
    }),
    ("a plain directory can be the root file system", |fixture| {
        let ran = fixture.with("echo x > /new; ls /", |spec| {
            spec.rootfs = Rootfs::Plain { dir: fixture.layer.clone() };
            spec.mounts = vec![SetupMount::Tmpfs { target: "/x/y".into(), size_bytes: 0, read_only: false }];
        });
        assert!(ran.out.contains("\nx\n"), "{}", ran.out);
        assert!(fixture.layer.join("new").exists() && !fixture.layer.join("x").exists());
    }),
    ("500 layers are stacked, more are refused in words", |fixture| {
        let layers = |count: usize| -> Vec<PathBuf> {
            let dir = fixture.dir();
            let make = |number| {
                let layer = dir.join(format!("layer-with-a-long-name-{number:04}"));
                fs::create_dir(&layer).and_then(|()| fs::write(layer.join(format!("f{number}")), "")).expect("layer");
                layer
            };
            (1..count).map(make).chain([fixture.layer.clone()]).collect()
        };
        let stack = |count: usize| {
            let mut spec = fixture.spec(&["sh", "-c", "ls / | grep -c ^f"]);
            spec.rootfs = Rootfs::Overlay { lowers: layers(count), upper: fixture.dir(), work: fixture.dir() };
            fixture.run(&spec)
        };
        match stack(500) {
            Ok(ran) => assert_eq!(ran.out, "499\n"),
            // Before `lowerdir+`, options were limited to a page.
            Err(error) => println!("  500 layers: skipped: {}", explained(&error)),
        }
        let error = stack(501).map(|ran| ran.outcome).expect_err("too many");
        assert!(
            explained(&error).contains("limit is 500") || explained(&error).contains("create"),
            "{}",
            explained(&error)
        );
    }),
    ("nothing stays mounted", |fixture| {
        fixture.sh("true");
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        let own = fixture.dir.path().to_string_lossy().into_owned();
        assert!(!mounts.contains(&own), "{mounts}");
    }),
    ("the program of the supervisor cannot be written", |fixture| {
        let spec = fixture.spec(&["echo", "x"]);
        sandbox::run(&spec, &Cancel::new().expect("cancel"), &mut |_, _| {
            let own = std::process::id();
            let child = fs::read_to_string(format!("/proc/{own}/task/{own}/children")).unwrap_or_default();
            let path = format!("/proc/{}/exe", child.trim());
            // It may have ended between the output and now.
            if let Ok(stat) = rustix::fs::statvfs(&path) {
                assert!(stat.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY), "{path}");
            }
        })
        .expect("run");
    }),
    ("a step can be cancelled", |fixture| {
        let seconds = unique_seconds(2);
        let cancel = Cancel::new().expect("cancel");
        let spec =
            fixture.spec(&["sh", "-c", &format!("trap '' TERM INT; echo ready; sleep {seconds}; sleep {seconds}")]);
        let (start, other) = (Instant::now(), cancel.clone());
        let error = sandbox::run(&spec, &cancel, &mut |_, _| other.cancel()).expect_err("cancelled");
        assert!(matches!(error, SandboxError::Cancelled), "{}", explained(&error));
        assert!(start.elapsed() < Duration::from_secs(10));
        assert_eq!(processes(&seconds), [""; 0]);
        let again = sandbox::run(&spec, &cancel, &mut |_, _| {}).expect_err("cancelled before");
        assert!(matches!(again, SandboxError::Cancelled));
    }),
    ("steps run at the same time from several threads", |fixture| {
        thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|number| scope.spawn(move || (number, fixture.out(&format!("echo {number}; sleep 0.05")))))
                .collect();
            for thread in threads {
                let (number, out) = thread.join().expect("thread");
                assert_eq!(out, format!("{number}\n"));
            }
        });
    }),
    ("the step dies with the builder", |fixture| {
        let seconds = unique_seconds(3);
        let mut builder = Command::new("/proc/self/exe")
            .args([LINGER, fixture.layer.to_str().expect("path"), &seconds])
            .stdout(Stdio::piped())
            .spawn()
            .expect("builder");
        let mut line = String::new();
        let out = builder.stdout.take().expect("output");
        io::BufRead::read_line(&mut io::BufReader::new(out), &mut line).expect("line");
        assert_eq!(line, "ready\n");
        assert!(!processes(&format!("sleep {seconds}")).is_empty());
        builder.kill().expect("kill");
        builder.wait().expect("wait");
        wait_until_gone(&seconds);
    }),
    ("what the kernel allows can be asked", |fixture| {
        let probe = sandbox::probe(fixture.dir.path()).expect("probe");
        for (right, verdict) in &probe.tries {
            let expected = match right {
                Right::ManyIds => fixture.native,
                Right::Chroot => rustix::process::geteuid().is_root() && idmap::is_initial_namespace(),
                // These are up to the machine; what was tried has a reason where it does not work.
                Right::Limits | Right::Tun => {
                    assert!(!matches!(verdict, Verdict::NotTried), "{right:?}");
                    continue;
                }
                _ => true,
            };
            assert_eq!(*verdict == Verdict::Works, expected, "{right:?}: {verdict:?}");
        }
        assert_eq!(probe.tries.len(), 10);
    }),
];

/// The builder that is going to be killed.
fn linger(layer: &Path, seconds: &str) {
    let fixture = Fixture {
        dir: tempfile::tempdir().expect("temporary directory"),
        layer: layer.to_owned(),
        native: idmap::ownership() == Ownership::Native,
    };
    let spec = fixture.spec(&["sh", "-c", &format!("(sleep {seconds} &); echo ready; sleep {seconds}; true")]);
    let result = sandbox::run(&spec, &Cancel::new().expect("cancel"), &mut |_, bytes| {
        _ = io::Write::write_all(&mut io::stdout(), bytes);
    });
    println!("ended: {:?}", result.map_err(|error| explained(&error)));
}
