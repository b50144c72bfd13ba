//! Limits of steps. Whether the kernel keeps them is tried on a kernel of the test's own, in an emulator: on the machine
//! that the tests run on, control groups may be of version 1, or another's.

use crate::bases;
use crate::story::Build;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What packages.sh puts there.
const LINUX: &str = "/var/cache/nacre-tests/linux";

/// Process 1 of the machine.
const INIT: &str = r##"#!/bin/sh
export PATH=/bin
export NO_COLOR=1
if [ ! -e /bin/switch_root ]; then
    # pivot_root(2) does not work on the file system that the kernel unpacks its archive into.
    /bin/busybox --install -s /bin
    mount -t tmpfs -o mode=755 root /root
    cp -a /bin /etc /lib /init /root
    mkdir /root/dev /root/proc /root/sys /root/tmp
    exec switch_root /root /init
fi
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp; mount -t cgroup2 cgroup /sys/fs/cgroup
insmod /lib/overlay.ko
ip link set lo up
chmod 1777 /tmp; mkdir -p /tmp/context /tmp/home; chown 1000:1000 /tmp/home; chmod 777 /tmp/context
cp /bin/busybox /tmp/context
cg=/sys/fs/cgroup

# build NAME DOCKERFILE-LINES FLAGS...: a section of the output, with its exit code.
build() {
    echo "== $1"
    rm -f /tmp/context/Dockerfile
    printf 'FROM scratch\nCOPY busybox /bin/busybox\nRUN ["/bin/busybox", "--install", "-s", "/bin"]\n%b\n' "$2" > /tmp/context/Dockerfile
    shift 2
    nacre build --progress=plain --store "${store:-/tmp/store}" "$@" /tmp/context < /dev/null 2>&1
    echo "exit $?"
}
# as_user GROUP: what follows as an ordinary user who starts in this group.
as_user() {
    group=$1; shift
    { cat /functions; echo 'store=/tmp/home/store; cg=/sys/fs/cgroup'; echo "$@"; } > /tmp/script
    (echo 0 > $cg/$group/cgroup.procs; exec su app -s /bin/sh -c 'export PATH=/bin; . /tmp/script')
}
sed -n '/^build() /,/^}/p' /init > /functions

nacre doctor --store /tmp/store 2>&1 | grep limits
for file in memory.max memory.swap.max cpu.max cpu.weight cpuset.cpus.effective pids.max; do cat="$cat /sys/fs/cgroup/$file"; done
build read "RUN cat $cat; cat /proc/self/cgroup; echo \"processors \$(nproc)\"" --memory 64m --memory-swap 96m --cpu-quota 50000 \
    --cpu-shares 512 --cpuset-cpus 1 --cpuset-mems 0 --pids-limit 99
build hog 'RUN echo before\nRUN head -c 30000000 /dev/zero | tail' --memory 12m --memory-swap 12m
build survived 'RUN head -c 30000000 /dev/zero | tail; true' --memory 12m --memory-swap 12m
build bomb 'RUN for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 30 & done; wait' --pids-limit 8
build slow 'RUN i=0; while [ $i -lt 500 ]; do i=$((i+1)); done; grep nr_throttled /sys/fs/cgroup/cpu.stat' --cpu-period 10000 --cpu-quota 1000
build parent 'RUN echo in a parent' --memory 64m --cgroup-parent /jobs/one
echo "given: $(cat $cg/jobs/one/cgroup.subtree_control)"
build climb 'RUN echo' --cgroup-parent /jobs/../x
build insecure '# syntax=docker/dockerfile:1-labs\nRUN --security=insecure mkdir /sys/fs/cgroup/own /sys/fs/cgroup/own/deep' --memory 64m --allow security.insecure
build absent 'RUN echo' --cpuset-cpus 77

echo "== killed"
printf 'FROM scratch\nCOPY busybox /bin/busybox\nRUN ["/bin/busybox", "sleep", "1000"]\n' > /tmp/context/Dockerfile
nacre build --store /tmp/store --memory 64m /tmp/context < /dev/null > /dev/null 2>&1 &
i=0; until [ "$(cat $cg/nacre-[0-9]*/cgroup.procs 2> /dev/null)" ] || [ $i -gt 1200 ]; do sleep 0.1; i=$((i+1)); done
echo "ran in: $(ls -d $cg/nacre-[0-9]*)"
kill -9 $!
i=0; while ls -d $cg/nacre-[0-9]* > /dev/null 2>&1 && [ $i -lt 1200 ]; do sleep 0.1; i=$((i+1)); done
echo "left: [$(ls -d $cg/nacre-[0-9]* 2> /dev/null)]"

mkdir $cg/mine $cg/theirs
chown -R 1000:1000 $cg/mine
as_user mine "build delegated 'RUN cat /sys/fs/cgroup/memory.max; head -c 30000000 /dev/zero | tail' --memory 13m --memory-swap 13m"
echo "groups: [$(cd $cg/mine; ls -d nacre-*)]"
# Its second build starts where the first one has been moved to.
as_user mine/nacre-init "build again 'RUN cat /sys/fs/cgroup/memory.max' --memory 34m"
echo "groups: [$(cd $cg/mine; ls -d nacre-*)]"
as_user theirs "build denied 'RUN echo' --memory 33m"
echo 0 > $cg/cgroup.procs
mount -o bind,remount,ro $cg
build read-only 'RUN echo' --memory 33m
umount $cg
build none 'RUN echo' --memory 33m
echo "== end"
poweroff -f
"##;

/// An archive that the kernel unpacks (initramfs buffer format, "newc").
fn initramfs(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    let end: [(&str, u32, &[u8]); 1] = [("TRAILER!!!", 0, &[])];
    for (number, (name, mode, content)) in files.iter().chain(&end).enumerate() {
        // Number, mode, owner, group, links, time, size, device and its node twice, length of the name, sum.
        let fields = [number as u32, *mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        archive.extend_from_slice(b"070701");
        fields.iter().for_each(|field| archive.extend_from_slice(format!("{field:08x}").as_bytes()));
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

/// Starts a machine with `init` as its process 1 and returns what it printed until it switched itself off.
fn machine(init: &str) -> String {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let read = |path: &Path| fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let busybox = read(&bases::busybox().expect("busybox is in PATH"));
    let passwd = b"root:x:0:0::/tmp:/bin/sh\napp:x:1000:1000::/tmp/home:/bin/sh\n";
    let directory = |name| (name, 0o040_755, &[][..]);
    let files = [
        directory("bin"),
        directory("etc"),
        directory("lib"),
        directory("dev"),
        directory("proc"),
        directory("sys"),
        directory("tmp"),
        directory("root"),
        ("bin/busybox", 0o100_755, &busybox[..]),
        ("bin/sh", 0o120_777, b"busybox"),
        ("bin/nacre", 0o100_755, &read(Path::new(env!("CARGO_BIN_EXE_nacre")))),
        ("lib/overlay.ko", 0o100_644, &read(&Path::new(LINUX).join("overlay.ko"))),
        ("etc/passwd", 0o100_644, passwd),
        ("init", 0o100_755, init.as_bytes()),
    ];
    let initrd = dir.path().join("initrd");
    fs::write(&initrd, initramfs(&files)).expect("a file of our own");
    let mut command = Command::new("qemu-system-x86_64");
    command.args(
        "-accel tcg,thread=multi -cpu max -smp 2 -m 768 -nographic -nodefaults -no-reboot -serial stdio".split(' '),
    );
    command.arg("-kernel").arg(Path::new(LINUX).join("vmlinuz")).arg("-initrd").arg(&initrd);
    command.args(["-append", "console=ttyS0 quiet panic=-1 random.trust_cpu=on"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut machine = command.spawn().expect("qemu-system-x86_64 starts");
    let mut pipe = machine.stdout.take().expect("a pipe");
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut pipe, &mut bytes).expect("a pipe can be read");
        String::from_utf8_lossy(&bytes).replace('\r', "")
    });
    let start = Instant::now();
    while machine.try_wait().expect("a child of ours").is_none() {
        if start.elapsed() > Duration::from_secs(600) {
            _ = machine.kill();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    reader.join().expect("the reader does not panic")
}

#[test]
fn the_kernel_keeps_limits() {
    // The machine is the same whoever starts it, and CI has root do so, too.
    if std::env::var_os("CI").is_some() && !crate::nested::is_root() {
        return;
    }
    let text = machine(INIT);
    assert!(text.contains("== end"), "the machine did not come to the end:\n{text}");
    let section = |name: &str| {
        let from = text.split_once(&format!("== {name}\n")).unwrap_or_else(|| panic!("no section {name}:\n{text}")).1;
        from.split("\n== ").next().unwrap_or_default().to_owned()
    };
    let check = |name: &str, words: &[&str]| {
        let section = section(name);
        for word in words {
            assert!(section.contains(word), "`{word}` is not in {name}:\n{section}");
        }
    };
    assert!(text.contains("works    limits of steps"), "{text}");
    // Half of the default's weight, by the curve that has 1024 at 100.
    let values = ["67108864", "33554432", "50000 100000", "59", "1", "99", "0::/", "processors 1", "exit 0"];
    check("read", &values);
    check(
        "hog",
        &["(killed by SIGKILL), killed: over --memory 12m (stage 0)", "RUN head -c", "give the step more", "exit 4"],
    );
    check("survived", &["killed a process of this step for want of memory", "exit 0"]);
    check("bomb", &["new processes were refused: over --pids-limit 8", "exit 4"]);
    let slow = section("slow");
    // Behind the command that asks for it.
    let count =
        slow.rsplit("nr_throttled ").next().and_then(|rest| rest.split_whitespace().next()?.parse::<u32>().ok());
    assert!(count.is_some_and(|times| times > 0), "{slow}");
    check("parent", &["in a parent", "exit 0", "given: memory"]);
    check("climb", &["--cgroup-parent cannot be enforced", "no path of a control group", "exit 6"]);
    check("insecure", &["exit 0"]);
    check("absent", &["--cpuset-cpus", "exit 6"]);
    check("killed", &["ran in: /sys/fs/cgroup/nacre-", "left: []"]);
    check("delegated", &["13631488", "killed: over --memory 13m", "exit 4", "groups: [nacre-init]"]);
    check("again", &["35651584", "exit 0", "groups: [nacre-init]"]);
    check(
        "denied",
        &["--memory cannot be enforced", "belongs to somebody else", "systemd-run --user --scope", "exit 6"],
    );
    check("read-only", &["is mounted read-only", "limit the container itself", "exit 6"]);
    check("none", &["no control groups of version 2 are mounted here", "systemd.unified_cgroup_hierarchy=1", "exit 6"]);
}

#[test]
fn limits_that_cannot_be_kept_end_the_build() {
    // Never given: a group of this path could not be made anywhere.
    let never = "--cgroup-parent=/proc/../nacre";
    let build = Build::new().dockerfile("FROM busybox\nRUN true\n").flag("--memory=64m").flag(never);
    let ended = build.fails_with(6, &["--memory cannot be enforced", "help: "]);
    assert!(!ended.stderr.contains("DONE"), "{}", ended.stderr);
    // Nothing runs, so nothing is to be limited.
    let build = Build::new().dockerfile("FROM scratch\nCOPY Dockerfile /\n").flag("--memory=64m").flag(never);
    build.runs();
}
