//! What a hostile Dockerfile, context or base image tries is refused or harmless.

use crate::story::Build;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

/// A name, and the entries of an archive: path, kind, and content or link target.
type Attempt<'a> = (&'a str, Vec<(&'a [u8], tar::EntryType, &'a [u8])>);

/// Shell commands. Each prints `ESCAPED` if it gets what it must not, and none of their failures ends the step.
const ATTEMPTS: &[(&str, &str)] = &[
    ("mount a tmpfs", "mkdir -p /m; mount -t tmpfs t /m && echo ESCAPED"),
    ("mount another proc", "mkdir -p /m; mount -t proc p /m && echo ESCAPED"),
    ("bind the root elsewhere", "mkdir -p /m; mount -o bind / /m && echo ESCAPED"),
    ("uncover /proc/sys", "umount /proc/sys && echo ESCAPED"),
    ("uncover /proc/kcore", "umount -l /proc/kcore && echo ESCAPED"),
    ("make /proc/sys writable", "mount -o remount,rw /proc/sys && echo ESCAPED"),
    ("a new user namespace", "unshare -U true && echo ESCAPED"),
    ("a new mount namespace", "unshare -m true && echo ESCAPED"),
    ("the namespace of process 1", "nsenter -t 1 -m true && echo ESCAPED"),
    ("read a device made by hand", "mknod /d b 7 0 2>/dev/null && [ $(head -c 1 /d | wc -c) = 1 ] && echo ESCAPED"),
    (
        "write a harmless device made by hand",
        "mknod /n c 1 3 2>/dev/null && [ -c /n ] && echo x > /n && [ ! -s /n ] && echo ESCAPED",
    ),
    ("host files behind process 1", "[ -e /proc/1/root$MARK ] && echo ESCAPED"),
    ("host files behind any process", "for p in /proc/[0-9]*; do [ -e $p/root$MARK ] && echo ESCAPED; done"),
    (
        "host files behind ..",
        "[ -e /../../../../..$MARK ] && echo ESCAPED; cd /proc/1/cwd && [ -e ..$MARK ] && echo ESCAPED",
    ),
    ("chroot and climb", "mkdir /j && chroot /j /bin/true; cd ../../../..; [ -e .$MARK ] && echo ESCAPED"),
    ("restart the machine by sysrq", "(echo s > /proc/sysrq-trigger) && echo ESCAPED"),
    ("run a program on crashes", "(echo '|/x' > /proc/sys/kernel/core_pattern) && echo ESCAPED"),
    ("change a sysctl", "(echo 1 > /proc/sys/vm/drop_caches) && echo ESCAPED"),
    ("run a program on hotplug", "(echo /x > /sys/kernel/uevent_helper) && echo ESCAPED"),
    ("make a control group", "mkdir /sys/fs/cgroup/x && echo ESCAPED; mkdir /sys/fs/cgroup/memory/x && echo ESCAPED"),
    (
        "read kernel memory",
        "[ -n \"$(head -c 1 /proc/kcore | od)\" ] && head -c 1 /proc/kcore | grep -q . && echo ESCAPED",
    ),
    ("read kernel keys", "grep -q . /proc/keys && echo ESCAPED"),
    ("read kernel log", "dmesg | grep -q . && echo ESCAPED; grep -q . /dev/kmsg && echo ESCAPED"),
    ("name the machine", "hostname evil && echo ESCAPED"),
    ("switch the machine off", "reboot -f && echo ESCAPED"),
    ("swap on a file", "head -c 100000 /dev/zero > /s; swapon /s && echo ESCAPED"),
    ("raise its priority", "renice -n -20 -p $$ && echo ESCAPED"),
    ("be spared by the out-of-memory killer", "(echo -1000 > /proc/self/oom_score_adj) && echo ESCAPED"),
    ("change the network", "ip link set lo down && echo ESCAPED; ip addr add 192.0.2.9 dev lo && echo ESCAPED"),
    ("see other processes", "[ $(ls -d /proc/[0-9]* | wc -l) -gt 8 ] && echo ESCAPED"),
    (
        "leaked descriptors",
        "for f in /proc/1/fd/*; do case $(readlink $f) in pipe:*|/dev/null|/t.sh|socket:*) ;; *) echo ESCAPED $f $(readlink $f);; esac; done",
    ),
    (
        "environment of the builder",
        "tr '\\0' '\\n' < /proc/1/environ | grep HOST_ONLY && echo ESCAPED; env | grep HOST_ONLY && echo ESCAPED",
    ),
    (
        "fill memory through /dev/shm",
        "head -c 200000000 /dev/zero > /dev/shm/x 2>/dev/null && echo ESCAPED; rm -f /dev/shm/x",
    ),
    ("the terminal", "(: < /dev/tty) && echo ESCAPED"),
    // The last one: it ends the script, too.
    ("kill everything", "kill -9 -1; [ -d /proc/1 ] || echo ESCAPED"),
];

/// System calls that busybox has no command for.
const CALLS: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/perf_event.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
static int escaped;
static void try(const char *name, long result) {
    if (result >= 0) { printf("ESCAPED %s\n", name); escaped = 1; }
}
int main(void) {
    char space[4096] = {0};
    union bpf_attr bpf = {.map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 4, .max_entries = 1};
    struct perf_event_attr perf = {.type = PERF_TYPE_SOFTWARE, .size = sizeof perf};
    try("unshare user", unshare(CLONE_NEWUSER));
    try("unshare all", unshare(CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET));
    try("clone user", syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0));
    try("clone3 user", syscall(SYS_clone3, (unsigned long[11]){CLONE_NEWUSER}, 88));
    try("mount", mount("none", "/tmp", "tmpfs", 0, 0));
    try("fsopen", syscall(SYS_fsopen, "tmpfs", 0));
    try("open_tree", syscall(SYS_open_tree, AT_FDCWD, "/", 1));
    try("move_mount", syscall(SYS_move_mount, AT_FDCWD, "/", AT_FDCWD, "/tmp", 0));
    try("mount_setattr", syscall(SYS_mount_setattr, AT_FDCWD, "/", 0, space, 32));
    try("pivot_root", syscall(SYS_pivot_root, "/", "/"));
    try("umount", umount2("/proc/sys", MNT_DETACH));
    try("setns", setns(open("/proc/1/ns/mnt", O_RDONLY), 0));
    try("bpf", syscall(SYS_bpf, BPF_MAP_CREATE, &bpf, sizeof bpf));
    try("perf", syscall(SYS_perf_event_open, &perf, 0, -1, -1, 0));
    try("userfaultfd", syscall(SYS_userfaultfd, O_CLOEXEC));
    try("io_uring", syscall(SYS_io_uring_setup, 4, space));
    try("add_key", syscall(SYS_add_key, "user", "x", "y", 1, -3));
    try("keyctl", syscall(SYS_keyctl, 0, -3, 1));
    try("request_key", syscall(SYS_request_key, "user", "x", 0, -3));
    try("open_by_handle_at", syscall(SYS_open_by_handle_at, AT_FDCWD, space, O_RDONLY));
    try("packet socket", socket(AF_PACKET, SOCK_RAW, 0x0300));
    try("init_module", syscall(SYS_init_module, space, 64, ""));
    try("finit_module", syscall(SYS_finit_module, 0, "", 0));
    try("kexec", syscall(SYS_kexec_load, 0, 0, 0, 0));
    try("iopl", syscall(SYS_iopl, 3));
    try("quotactl", syscall(SYS_quotactl, 0x800002 << 8, "/dev/null", 0, space));
    try("acct", syscall(SYS_acct, "/tmp/acct"));
    try("settimeofday", syscall(SYS_settimeofday, (long[2]){1, 1}, 0));
    try("sethostname", sethostname("evil", 4));
    try("fanotify", syscall(SYS_fanotify_init, 0, 0));
    try("lookup_dcookie", syscall(SYS_lookup_dcookie, 0L, space, 64));
    try("vhangup", syscall(SYS_vhangup));
    try("tiocsti", ioctl(0, 0x5412, "x"));
    try("mknod and read", mknod("/dn", S_IFCHR | 0600, 0x105) || read(open("/dn", O_RDONLY), space, 1) != 1 ? -1 : 0);
    return escaped;
}
"#;

/// What a program tries with the supervisor that answers its calls about owners. `MARK` names a file of the host.
const SUPERVISOR: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
static volatile char path[4096];
static volatile int done;
static char own[] = "/mine", mark[4000], climb[4096];
static void *swap(void *unused) {
    while (!done) { strcpy((char *)path, own); strcpy((char *)path, climb); strcpy((char *)path, mark); }
    return 0;
}
static void *leave(void *unused) { for (int i = 0; i < 200; i++) chown(own, i, i); return 0; }
static void check(const char *name, int wrong) { if (wrong) printf("ESCAPED %s\n", name); }
int main(void) {
    struct stat st;
    pthread_t thread;
    snprintf(mark, sizeof mark, "%s", getenv("MARK"));
    snprintf(climb, sizeof climb, "/proc/self/root/../../../..%s", mark);
    close(open(own, O_CREAT | O_WRONLY, 0600));
    // Paths that lead elsewhere, directly.
    const char *ways[] = {"/proc/self/cwd/../../../..", "/proc/self/fd/0/..", "/proc/1/root", "/proc/self/root",
        "/proc/thread-self/root/../..", "/dev/fd/0/../..", "/proc/1/cwd/..", "/proc/self/task/1/root"};
    for (int i = 0; i < 8; i++) {
        char way[4096];
        snprintf(way, sizeof way, "%s%s", ways[i], mark);
        check(way, chown(way, 12345, 12345) == 0 || mkdir(way, 0700) == 0);
        symlink(way, "/link");
        check("a link", chown("/link", 12345, 12345) == 0);
        unlink("/link");
    }
    // The path changes while it is looked at.
    pthread_create(&thread, 0, swap, 0);
    setresuid(-1, 1000, -1);
    for (int i = 0; i < 3000; i++) {
        chown((char *)path, -1, -1); lstat((char *)path, &st); mkdir((char *)path, 0700);
        int fd = open((char *)path, O_CREAT | O_EXCL | O_WRONLY, 0600);
        if (fd >= 0) { fstat(fd, &st); close(fd); unlink(own); }
        rename((char *)path, "/renamed"); rename("/renamed", own);
    }
    setresuid(-1, 0, -1);
    done = 1;
    pthread_join(thread, 0);
    // Callers that die in the middle, of many threads and without memory of their own.
    for (int i = 0; i < 50; i++) {
        pid_t pid = vfork();
        if (pid == 0) { chown(own, 1, 1); setuid(1000); _exit(getuid() == 1000 ? 0 : 1); }
        int status;
        waitpid(pid, &status, 0);
        check("ids of a vforked child", status != 0 || getuid() != 0);
        pid = fork();
        if (pid == 0) {
            for (int t = 0; t < 4; t++) pthread_create(&thread, 0, leave, 0);
            leave(0);
            syscall(SYS_exit, 0);
        }
        usleep(i * 20);
        kill(pid, SIGKILL);
        waitpid(pid, 0, 0);
    }
    // Memory that is not there or must not be written.
    char *page = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    munmap(page + 4096, 4096);
    memcpy(page + 4090, "/mine", 6);
    check("a path at the end of memory", chown(page + 4090, 7, 8) != 0);
    memcpy(page + 4091, "/mine", 5);
    check("a path without end", chown(page + 4091, 9, 9) == 0 || errno != EFAULT);
    check("stat into nothing", stat(own, (void *)(page + 4000)) == 0 || errno != EFAULT);
    check("stat", stat(own, &st) != 0 || st.st_uid != 7 || st.st_gid != 8);
    char *longest = malloc(100000);
    memset(longest, 'a', 99999); longest[99999] = 0;
    check("a long path", chown(longest, 1, 1) == 0 || errno != ENAMETOOLONG);
    check("a descriptor that is not open", fchown(999, 1, 1) == 0 || errno != EBADF);
    // Where the ids are kept.
    struct rlimit limit = {0, 0};
    setrlimit(RLIMIT_LOCKS, &limit);
    check("ids", getuid() != 0);
    check("become anybody", setuid(1000) != 0 || setuid(0) == 0);
    limit.rlim_cur = limit.rlim_max = RLIM_INFINITY;
    setrlimit(RLIMIT_LOCKS, &limit);
    syscall(SYS_prlimit64, 0, RLIMIT_LOCKS, (unsigned long[2]){0, 0}, 0);
    check("ids after limits", getuid() != 1000 || syscall(SYS_setgroups, 0, 0) == 0);
    check("give away", chown(own, 1000, 1000) == 0);
    check("chroot", chroot("/") == 0);
    return 0;
}
"#;

/// Runs [`SUPERVISOR`] as a step, by the command that `wrap` makes of the build's.
#[track_caller]
fn confuse(wrap: impl Fn(Command) -> Command) {
    use std::os::unix::fs::MetadataExt;
    let build = Build::new();
    let mark = build.path("context/Dockerfile");
    let build = build.flag("--ownership=emulate").dockerfile(&format!(
        "FROM busybox\nENV MARK={0}\nCOPY confuse /confuse\nRUN /confuse; echo result $?\n\
         RUN stat -c %u:%g /mine; for p in /proc/[0-9]*; do [ -e $p/root{0} ] && echo ESC$NOTHING''APED; \
         chown 5 $p/cwd{0} $p/fd/*{0} 2>/dev/null && echo ESC$NOTHING''APED; done; true\n",
        mark.display()
    ));
    fs::copy(compiled("confuse", SUPERVISOR), build.path("context/confuse")).expect("a file of our own");
    let before = fs::metadata(&mark).expect("it is there");
    let ended = crate::story::run(wrap(build.command()), None);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(!ended.stderr.contains("ESCAPED"), "{}", ended.stderr);
    assert!(ended.stderr.contains("result 0") && ended.stderr.contains("7:8"), "{}", ended.stderr);
    let after = fs::metadata(&mark).expect("it is there");
    let of = |metadata: &fs::Metadata| (metadata.uid(), metadata.gid(), metadata.mode(), metadata.ctime_nsec());
    assert_eq!(of(&before), of(&after));
}

#[test]
fn the_supervisor_is_not_confused() {
    confuse(|command| command);
}

#[test]
fn nor_where_it_shares_its_proc_with_the_step() {
    confuse(behind_shared_proc);
}

/// Runs a build where no fresh /proc can be had.
pub(crate) fn behind_shared_proc(inner: Command) -> Command {
    // What covers a part of /proc cannot be taken away in the inner namespace, so no other one can be mounted: not while a
    // single one is to be seen whole.
    let script = "while read -r _ at type _; do [ \"$type\" != proc ] || mount -t tmpfs cover \"$at/driver\" || exit; done \
                  < /proc/mounts; exec unshare -Urm \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["-Urmpf", "--mount-proc", "sh", "-c", script, "sh"]).arg(inner.get_program());
    command.args(inner.get_args()).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command
}

/// The program of [`CALLS`], made once.
fn calls() -> PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| compiled("calls", CALLS)).clone()
}

/// Compiles a program.
pub(crate) fn compiled(name: &str, text: &str) -> PathBuf {
    let dir = tempfile::Builder::new().prefix("nacre-calls-").tempdir().expect("a temporary directory").keep();
    let (source, program) = (dir.join(format!("{name}.c")), dir.join(name));
    fs::write(&source, text).expect("a file of our own");
    let status = Command::new("cc").args(["-static", "-pthread", "-w", "-o"]).arg(&program).arg(&source).status();
    assert!(status.expect("cc, which Rust needs to link, is there").success(), "cc fails");
    program
}

fn shell_build(script: &str) -> Build {
    // The host has this file, the image does not.
    let build = Build::new().env("HOST_ONLY", "leaked");
    let mark = build.path("context/Dockerfile");
    build
        .dockerfile(&format!(
            "FROM busybox\nENV MARK={}\nCOPY t.sh /t.sh\nRUN sh /t.sh 2>&1; echo the end\n",
            mark.display()
        ))
        .file("t.sh", script)
}

#[test]
fn shell_attempts() {
    let script: String = ATTEMPTS.iter().map(|(name, code)| format!("echo '--- {name}'\n( {code} )\n")).collect();
    let ended = shell_build(&script).runs();
    assert!(ended.stderr.contains("the end"), "{}", ended.stderr);
    for (name, _) in ATTEMPTS {
        assert!(ended.stderr.contains(&format!("--- {name}")), "{name} was not tried: {}", ended.stderr);
    }
    let escaped: Vec<&str> = ended.stderr.lines().filter(|line| line.contains("ESCAPED")).collect();
    assert!(escaped.is_empty(), "{escaped:?}\n{}", ended.stderr);
}

#[test]
fn system_calls() {
    let build = Build::new().dockerfile(
        "FROM busybox\nCOPY calls /calls\nRUN /calls; echo result $?\nUSER 1000\nRUN /calls; echo result $?\n",
    );
    fs::copy(calls(), build.path("context/calls")).expect("a file of our own");
    let ended = build.runs();
    assert!(!ended.stderr.contains("ESCAPED"), "{}", ended.stderr);
    assert_eq!(ended.stderr.matches("result 0").count(), 2, "{}", ended.stderr);
}

#[test]
fn what_a_step_leaves_running_is_killed() {
    let build = Build::new()
        .dockerfile("FROM busybox\nRUN (setsid sleep 4801 &) ; nohup sleep 4801 >/dev/null 2>&1 & echo ok\n");
    build.runs();
    let found = fs::read_dir("/proc")
        .expect("/proc is mounted")
        .flatten()
        .any(|entry| fs::read(entry.path().join("cmdline")).is_ok_and(|line| line == b"sleep\x004801\0"));
    assert!(!found, "a process outlives its step");
}

#[test]
fn output_of_any_kind_is_borne() {
    let build = Build::new().dockerfile(
        "FROM busybox\nRUN head -c 20000000 /dev/zero | tr '\\0' a\nRUN printf '\\033]0;title\\007\\033[2J\\377\\000'\n\
         RUN exec >&- 2>&-; echo kept > /kept\nRUN test -s /kept\n",
    );
    build.runs();
}

#[test]
fn mount_targets_stay_inside() {
    let build = Build::new();
    let outside = build.path("outside");
    fs::create_dir(&outside).expect("a directory of our own");
    let build = build.dockerfile(&format!(
        "FROM busybox\nRUN ln -s {0} /link && ln -s ../../../../../../../../{0} /climb && ln -s /proc/1/root{0} /magic\n\
         RUN --mount=type=tmpfs,target=/link/a touch /link/a/x\n\
         RUN --mount=type=cache,target=/climb/b touch /climb/b/x\n\
         WORKDIR /link/w\nRUN touch here\nCOPY Dockerfile /link/copied\nCOPY Dockerfile /climb/\nADD Dockerfile /link/x/y\n",
        outside.display()
    ));
    let image = build.image();
    assert_eq!(fs::read_dir(&outside).expect("still there").count(), 0, "something was made outside");
    assert!(image.has(&format!("{}/copied", outside.display())), "the link is followed inside");
}

#[test]
fn deep_directories_in_dev_are_taken_out_without_namespaces() {
    let program = compiled(
        "deep",
        "#include <stdio.h>\n#include <sys/stat.h>\n#include <unistd.h>\nint main(void) { int n = 0; chdir(\"/dev\"); \
         while (n < 20000 && mkdir(\"d\", 0700) == 0 && chdir(\"d\") == 0) n++; printf(\"%d deep\\n\", n); return 0; }",
    );
    let build = Build::new()
        .flag("--isolation=chroot")
        .dockerfile("FROM busybox\nCOPY deep /\nRUN /deep && rm /deep\nRUN test ! -e /dev/d && test -c /dev/null\n");
    std::fs::copy(&program, build.path("context/deep")).expect("a file of our own");
    match crate::nested::is_root() {
        true => {
            let image = build.image();
            assert!(image.stderr.contains("20000 deep"), "{}", image.stderr);
            assert!(!image.record.fs.keys().any(|path| path.starts_with("/dev/")), "{:?}", image.record.fs);
        }
        false => drop(build.fails_with(6, &["it takes root"])),
    }
}

#[test]
fn a_proc_link_leads_nowhere() {
    let build =
        Build::new().dockerfile("FROM busybox\nRUN ln -s /proc/self/root/tmp /out\nCOPY Dockerfile /out/evil\n");
    build.image();
    assert!(!std::path::Path::new("/tmp/evil").exists());
}

#[test]
fn context_links_do_not_lead_out() {
    let build = Build::new().dockerfile("FROM scratch\nCOPY link/secret /\n");
    fs::create_dir(build.path("outside")).expect("a directory of our own");
    fs::write(build.path("outside/secret"), "hidden").expect("a file of our own");
    symlink(build.path("outside"), build.path("context/link")).expect("a link");
    build.fails_with(3, &["not found"]);
    symlink("../outside/secret", build.path("context/up")).expect("a link");
    build.write("Dockerfile", "FROM scratch\nCOPY up /\nCOPY ../outside/secret /second\n");
    let ended = build.ends();
    assert_ne!(ended.code, Some(0), "{}", ended.stderr);
}

/// Writes an archive of entries: path, type, link target or content.
fn archive(entries: &[(&[u8], tar::EntryType, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (path, kind, what) in entries {
        let link = kind.is_symlink() || kind.is_hard_link();
        // By hand, since no honest program writes such names.
        let mut header = tar::Header::new_ustar();
        let bytes = header.as_mut_bytes();
        bytes[..path.len().min(100)].copy_from_slice(&path[..path.len().min(100)]);
        if link {
            bytes[157..157 + what.len()].copy_from_slice(what);
        }
        header.set_entry_type(*kind);
        header.set_mode(0o6755);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        header.set_size(if link { 0 } else { what.len() as u64 });
        if kind.is_character_special() || kind.is_block_special() {
            header.set_device_major(1).expect("ustar has devices");
            header.set_device_minor(1).expect("ustar has devices");
        }
        header.set_cksum();
        out.extend_from_slice(header.as_bytes());
        if !link {
            out.extend_from_slice(what);
            out.resize(out.len().next_multiple_of(512), 0);
        }
    }
    out.resize(out.len() + 1024, 0);
    out
}

#[test]
fn archives_stay_inside() {
    use tar::EntryType as T;
    let build = Build::new();
    let outside = build.path("outside");
    fs::create_dir(&outside).expect("a directory of our own");
    let (out, victim) = (outside.as_os_str().as_bytes(), [outside.as_os_str().as_bytes(), b"/victim"].concat());
    fs::write(outside.join("victim"), "before").expect("a file of our own");
    let climb = [&b"../../../../../../../../../.."[..], out, b"/c"].concat();
    let through = b"l/through".to_vec();
    let hostile: Vec<Attempt<'_>> = vec![
        ("dots", vec![(&climb, T::Regular, b"x")]),
        ("dots in the middle", vec![(b"a/../../../../../../../../tmp/nacre-evil", T::Regular, b"x")]),
        ("absolute", vec![(&victim, T::Regular, b"after")]),
        ("through an absolute link", vec![(b"l", T::Symlink, out), (&through, T::Regular, b"x")]),
        ("through a climbing link", vec![(b"l", T::Symlink, b"../../../../../../tmp"), (&through, T::Regular, b"x")]),
        ("a hard link to the outside", vec![(b"h", T::Link, &victim), (b"h", T::Regular, b"after")]),
        ("a hard link by dots", vec![(b"h", T::Link, b"../../../../../../../etc/passwd")]),
        (
            "a hard link through a link",
            vec![(b"l", T::Symlink, out), (b"h", T::Link, b"l/victim"), (b"h", T::Regular, b"after")],
        ),
        ("a device", vec![(b"mem", T::Char, b""), (b"disk", T::Block, b"")]),
        ("the root itself", vec![(b".", T::Symlink, out), (b"x", T::Regular, b"x")]),
        ("a newline and no text", vec![(b"a\nb\xff\x1b[2J", T::Regular, b"x")]),
        ("a file in a file", vec![(b"f", T::Regular, b"x"), (b"f/g", T::Regular, b"x")]),
        ("a link in a loop", vec![(b"l", T::Symlink, b"l"), (b"l/x", T::Regular, b"x")]),
    ];
    for (name, entries) in &hostile {
        fs::write(build.path("context/a.tar"), archive(entries)).expect("a file of our own");
        build.write("Dockerfile", "FROM busybox\nADD a.tar /d/\nRUN ls /d >/dev/null\n");
        let ended = build.ends();
        assert!(matches!(ended.code, Some(0 | 3 | 7)), "{name}: {:?} {}", ended.code, ended.stderr);
        assert!(!ended.stderr.contains("internal error"), "{name}: {}", ended.stderr);
        let left: Vec<_> =
            fs::read_dir(&outside).expect("still there").flatten().map(|entry| entry.file_name()).collect();
        assert_eq!(left, ["victim"], "{name}");
        assert_eq!(fs::read_to_string(outside.join("victim")).expect("still there"), "before", "{name}");
        assert!(
            !std::path::Path::new("/tmp/nacre-evil").exists() && !std::path::Path::new("/tmp/through").exists(),
            "{name}"
        );
    }
}

#[test]
fn a_sparse_file_costs_nothing_on_the_way_in() {
    let build = Build::new().dockerfile("FROM scratch\nCOPY sparse /\n");
    let file = fs::File::create(build.path("context/sparse")).expect("a file of our own");
    file.set_len(50 << 20).expect("a length");
    build.runs();
}

#[test]
fn strange_names_arrive_as_they_are() {
    let build =
        Build::new().dockerfile("FROM busybox\nCOPY names /names/\nRUN [ $(ls -A /names | grep -c .) -ge 3 ]\n");
    let dir = build.path("context/names");
    fs::create_dir(&dir).expect("a directory of our own");
    for name in [&b"new\nline"[..], b"\xff\xfe", b"-rf", b"\x1b[2J", b" ", b"*"] {
        fs::write(dir.join(std::ffi::OsStr::from_bytes(name)), "x").expect("a file of our own");
    }
    let image = build.image();
    assert!(image.has("/names/new\nline") && image.has("/names/-rf") && image.has("/names/*"));
}

/// A base image of one layer, with what is to be wrong about it.
fn hostile_base(build: &Build, layer: &[u8], diff_id: Option<&str>, digest: Option<&str>, size: Option<u64>) {
    use sha2::{Digest, Sha256};
    let sha = |bytes: &[u8]| -> String { Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect() };
    let layout = build.path("layout");
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).expect("a directory of our own");
    let put = |bytes: &[u8]| {
        fs::write(blobs.join(sha(bytes)), bytes).expect("a file of our own");
        format!("sha256:{}", sha(bytes))
    };
    let layer_digest = put(layer);
    let diff_id = diff_id.map_or_else(|| layer_digest.clone(), str::to_owned);
    let config = serde_json::json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff_id]}});
    let config = config.to_string();
    let config_digest = put(config.as_bytes());
    let named = digest.map_or_else(|| layer_digest.clone(), str::to_owned);
    if digest.is_some_and(|digest| digest.len() == 71 && !digest.contains('.')) {
        fs::copy(blobs.join(&layer_digest[7..]), blobs.join(&named[7..])).expect("a file of our own");
    }
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest, "size": config.len()},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": named,
                    "size": size.unwrap_or(layer.len() as u64)}],
    });
    let manifest = manifest.to_string();
    let manifest_digest = put(manifest.as_bytes());
    let index = serde_json::json!({
        "schemaVersion": 2, "manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": manifest_digest, "size": manifest.len()}],
    });
    fs::write(layout.join("index.json"), index.to_string()).expect("a file of our own");
    fs::write(layout.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}").expect("a file of our own");
}

#[test]
fn hostile_base_images() {
    use tar::EntryType as T;
    let zeros = format!("sha256:{}", "0".repeat(64));
    let good = archive(&[(b"etc/x", T::Regular, b"x")]);
    type Base<'a> = (&'a str, Vec<u8>, Option<&'a str>, Option<&'a str>, Option<u64>);
    let wrong: Vec<Base<'_>> = vec![
        ("a wrong digest", good.clone(), None, Some(&zeros), None),
        ("a wrong diff id", good.clone(), Some(&zeros), None, None),
        ("a wrong size", good.clone(), None, None, Some(7)),
        ("a digest that is a path", good.clone(), None, Some("sha256:../../../../etc/passwd"), None),
        ("a diff id that is a path", good.clone(), Some("../../../../tmp/evil"), None, None),
        ("half an archive", good[..400].to_vec(), None, None, None),
        ("no archive", vec![b'x'; 5000], None, None, None),
    ];
    for (name, layer, diff_id, digest, size) in &wrong {
        let build = Build::new().dockerfile("FROM evil\nRUN [\"/etc/x\"]\n");
        hostile_base(&build, layer, *diff_id, *digest, *size);
        let flag = format!("--build-context=evil=oci-layout://{}", build.path("layout").display());
        let build = build.flag(flag);
        let ended = build.ends();
        assert!(matches!(ended.code, Some(5 | 7)), "{name}: {:?} {}", ended.code, ended.stderr);
        assert!(!ended.stderr.contains("internal error"), "{name}: {}", ended.stderr);
        crate::story::assert_store_is_whole(&build.store());
    }
    let victim_dir = Build::new();
    let outside = victim_dir.path("outside");
    fs::create_dir(&outside).expect("a directory of our own");
    fs::write(outside.join("victim"), "before").expect("a file of our own");
    let out = outside.as_os_str().as_bytes();
    let whiteout = [&b"l/.wh.victim"[..]].concat();
    let tricks: Vec<Attempt<'_>> = vec![
        ("a whiteout through a link", vec![(b"l", T::Symlink, out), (&whiteout, T::Regular, b"")]),
        ("a whiteout of ..", vec![(b"a/.wh...", T::Regular, b"")]),
        ("a whiteout of .", vec![(b"a/.wh..", T::Regular, b"")]),
        ("a whiteout without a name", vec![(b".wh.", T::Regular, b"")]),
        ("an opaque root", vec![(b".wh..wh..opq", T::Regular, b""), (b"x", T::Regular, b"x")]),
        ("reserved names", vec![(b".wh..wh.plnk", T::Directory, b""), (b".wh..wh.aufs", T::Regular, b"")]),
        ("overlayfs's own whiteout", vec![(b"gone", T::Char, b"")]),
        (
            "a link over a directory",
            vec![(b"d/x", T::Regular, b"x"), (b"d", T::Symlink, out), (b"d/victim", T::Regular, b"after")],
        ),
        ("dots", vec![(b"../../../../../../tmp/nacre-evil2", T::Regular, b"x")]),
    ];
    for (name, entries) in &tricks {
        let build = Build::new().dockerfile("FROM evil\nCOPY --from=busybox / /\nRUN true\n");
        hostile_base(&build, &archive(entries), None, None, None);
        let flag = format!("--build-context=evil=oci-layout://{}", build.path("layout").display());
        let ended = build.flag(flag).ends();
        assert!(matches!(ended.code, Some(0 | 3 | 4 | 5 | 7)), "{name}: {:?} {}", ended.code, ended.stderr);
        assert!(!ended.stderr.contains("internal error"), "{name}: {}", ended.stderr);
        assert_eq!(fs::read_to_string(outside.join("victim")).expect("still there"), "before", "{name}");
        assert!(!std::path::Path::new("/tmp/nacre-evil2").exists(), "{name}");
    }
}

#[test]
fn secrets_stay_out_of_layers_logs_and_the_store() {
    let value = "s3cr3t-value-4711";
    let build = Build::new()
        .dockerfile(
            "FROM busybox\nRUN --mount=type=secret,id=s --mount=type=secret,id=s,env=TOKEN [ \"$TOKEN\" = \"$(cat /run/secrets/s)\" ]\n\
             RUN [ ! -e /run/secrets/s ] && [ -z \"$TOKEN\" ]\nRUN --mount=type=secret,id=s false\n",
        )
        .flag("--secret=id=s,env=SECRET")
        .env("SECRET", value);
    let ended = build.ends();
    assert_eq!(ended.code, Some(4), "{}", ended.stderr);
    assert!(!ended.stderr.contains(value), "{}", ended.stderr);
    let found = Command::new("grep").args(["-rlaF", value]).arg(build.store()).output().expect("grep is there");
    assert_eq!(String::from_utf8_lossy(&found.stdout), "");
}

#[test]
fn secrets_in_the_wrong_place_end_the_build() {
    let value = "s3cr3t-value-4711";
    let build = |dockerfile: &str| {
        Build::new()
            .dockerfile(dockerfile)
            .file("config/.env", &format!("TOKEN={value}\n"))
            .flag("--secret=id=s,env=SECRET")
            .env("SECRET", value)
    };
    let mount = "FROM busybox\nRUN --mount=type=secret,id=s";
    for (dockerfile, place) in [
        (format!("{mount} cp /run/secrets/s /etc/token"), "/etc/token"),
        (format!("{mount} base64 /run/secrets/s > /etc/token"), "/etc/token, in base64"),
        (format!("{mount} ln -s $(cat /run/secrets/s) /link"), "/link"),
        (format!("{mount} touch /$(cat /run/secrets/s)"), "the name of a file"),
        (format!("{mount} cat /run/secrets/s"), "what the step printed"),
        ("FROM busybox\nCOPY config /config\n".to_owned(), "/config/.env"),
        (format!("FROM busybox\nENV TOKEN={value}\n"), "the image's configuration or history"),
        (format!("FROM busybox\nARG TOKEN={value}\nRUN true\n"), "the image's configuration or history"),
    ] {
        let build = build(&dockerfile);
        let ended = build.fails_with(4, &["secret `s` stands in", place, "--allow-secret-leak"]);
        let logs = fs::read_dir(build.store().join("logs")).into_iter().flatten().flatten();
        for log in logs {
            let text = fs::read_to_string(log.path()).expect("text");
            assert!(!text.contains(value), "{dockerfile}: {text}");
        }
        drop(ended);
        build.flag("--allow-secret-leak").runs();
    }
    build(&format!("{mount} [ $(cat /run/secrets/s) = {value} ]\n").replace(value, "s3cr3t-\"\"value-4711")).runs();
}

#[test]
fn steps_end_in_time() {
    let build =
        Build::new().dockerfile("FROM busybox\nRUN echo begun; sleep 4821 & sleep 4821\n").flag("--step-timeout=1s");
    let start = std::time::Instant::now();
    build.fails_with(4, &["stopped after 1s", "--step-timeout"]);
    assert!(start.elapsed() < std::time::Duration::from_secs(20), "{:?}", start.elapsed());
    Build::new().dockerfile("FROM busybox\nRUN true\n").flag("--step-timeout=1h").runs();
}

#[test]
fn keys_in_a_context_are_warned_of() {
    let value = "QYLPMN5HHHFPZ3KV";
    let build = Build::new()
        .dockerfile("FROM scratch\nCOPY README deploy /app/\nADD .npmrc /\n")
        .file("README", "set AKIAIOSFODNN7EXAMPLE\n")
        .file("deploy/aws.ini", &format!("key = AKIA{value}\n"))
        .file("other", &format!("key = AKIA{value}\n"))
        .file(".npmrc", &["//registry.npmjs.org/:_auth", "Token=R7kQ2vXz9LmN4bTyW8sHc3JdF6gPa5Ue0iOw\n"].concat());
    let ended = build.runs();
    let warnings =
        |ended: &crate::story::Ended| ended.stderr.lines().filter(|line| line.starts_with("warning: ")).count();
    for words in [
        "warning: [1/2] COPY README deploy /app/: `deploy/aws.ini` looks as if it held an access key of AWS",
        "warning: [2/2] ADD .npmrc /: `.npmrc` looks as if it held a token for npm",
        "--no-secret-warnings",
    ] {
        assert!(ended.stderr.contains(words), "`{words}` is not in {}", ended.stderr);
    }
    assert_eq!(warnings(&ended), 2, "{}", ended.stderr);
    assert!(!ended.stderr.contains(value), "the value itself is shown: {}", ended.stderr);
    // Nothing runs, nothing is copied.
    assert_eq!(warnings(&build.runs()), 0);
    // Files that were read earlier are not read again, and warned of all the same.
    build.write("Dockerfile", "FROM scratch\nCOPY deploy /elsewhere/\n");
    assert_eq!(warnings(&build.runs()), 1);
    let quiet = build.flag("--no-secret-warnings").flag("--no-cache");
    assert_eq!(warnings(&quiet.runs()), 0);
}
