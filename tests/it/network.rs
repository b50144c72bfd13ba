//! `--network=pasta`: a network of the steps' own.

use crate::story::{Build, last_error, run};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

fn has_tun() -> bool {
    fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun").is_ok()
}

/// A machine with a neighbour, in namespaces: `$@` runs in the one, the other answers at 192.0.2.77. And on the
/// machine's loopback, something listens that steps must not reach.
const NEIGHBOURS: &str = r#"
set -eu
unset http_proxy HTTP_PROXY https_proxy HTTPS_PROXY all_proxy ALL_PROXY
unshare --net sleep 300 & neighbour=$!
cd "$SITE"
while [ "$(readlink /proc/$neighbour/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link set lo up
ip link add name here type veth peer name there netns $neighbour
ip addr add 192.0.2.76/24 dev here
ip link set here up
nsenter --target $neighbour --net sh -c 'ip link set lo up; ip addr add 192.0.2.77/24 dev there; ip link set there up'
ip route add default via 192.0.2.77
nsenter --target $neighbour --net python3 -m http.server --bind 192.0.2.77 8077 >/dev/null 2>&1 & server=$!
python3 -m http.server --bind 127.0.0.1 8078 >/dev/null 2>&1 & own=$!
trap 'kill $neighbour $server $own' EXIT
until busybox wget -q -O - http://192.0.2.77:8077/page >/dev/null 2>&1; do sleep 0.1; done
until busybox wget -q -O - http://127.0.0.1:8078/page >/dev/null 2>&1; do sleep 0.1; done
"$@"
"#;

/// Processes of pasta and of its holder that work for this test: numbers and command lines.
fn workers(mark: &str) -> Vec<(i32, String)> {
    let lines = fs::read_dir("/proc").expect("/proc").flatten().filter_map(|entry| {
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let number = entry.file_name().to_str()?.parse().ok()?;
        Some((number, String::from_utf8_lossy(&line).replace('\0', " ")))
    });
    lines.filter(|(_, line)| line.contains(mark) && line.contains("pasta")).collect()
}

fn left_over(mark: &str) -> Vec<String> {
    workers(mark).into_iter().map(|(_, line)| line).collect()
}

fn neighbourly(build: &Build) -> crate::story::Ended {
    let nacre = build.command();
    let site = build.path("site");
    fs::create_dir_all(&site).expect("a directory of our own");
    fs::write(site.join("page"), "from a neighbour").expect("a file of our own");
    let mut command = Command::new("unshare");
    let root = crate::nested::is_root();
    if !root {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--net", "--mount", "bash", "-c", NEIGHBOURS, "bash"]);
    if !root {
        // The network is another one's, as a machine's is to an ordinary user.
        command.args(["unshare", "--user", "--map-user=1234", "--map-group=1234"]);
    }
    command.arg(nacre.get_program());
    command.args(nacre.get_args()).env("SITE", &site).env("TMPDIR", build.path("site"));
    run(command, None)
}

#[test]
fn pasta_connects_steps_and_shows_them_no_loopback() {
    const FILE: &str = "FROM busybox
RUN wget -q -O /page http://192.0.2.77:8077/page && cat /page
RUN ! wget -q -T 5 -O - http://127.0.0.1:8078/page && ip addr show lo | grep -q UP && echo no such loopback
RUN --network=none ! wget -q -T 5 -O - http://192.0.2.77:8077/page && echo none is none
";
    let build = Build::new().dockerfile(FILE).flag("--network=pasta");
    if !has_tun() {
        let ended = build.fails_with(6, &["cannot open /dev/net/tun", "--device /dev/net/tun", "--network=host"]);
        assert!(!ended.stderr.contains("DONE"), "{}", ended.stderr);
        return;
    }
    let ended = neighbourly(&build);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    for line in ["from a neighbour", "no such loopback", "none is none"] {
        assert!(ended.stderr.contains(line), "`{line}` is not in {}", ended.stderr);
    }
    assert_eq!(left_over(&build.path("site").display().to_string()), Vec::<String>::new());
}

/// A build with pasta whose first step has begun.
struct Begun {
    build: Build,
    builder: std::process::Child,
    mark: String,
}

impl Begun {
    fn new(dockerfile: &str) -> Begun {
        let build = Build::new().dockerfile(dockerfile).flag("--network=pasta");
        let temporary = build.path("temporary");
        fs::create_dir_all(&temporary).expect("a directory of our own");
        let mut command = build.command();
        let log = fs::File::create(build.path("log")).expect("a file of our own");
        let builder = command.env("TMPDIR", &temporary).stderr(log).spawn().expect("the builder starts");
        let begun = Begun { mark: temporary.display().to_string(), build, builder };
        begun.wait("the step begins", || begun.log().contains(" begun\n"));
        assert_eq!(left_over(&begun.mark).len(), 2, "the holder and pasta: {:?}", left_over(&begun.mark));
        begun
    }

    fn log(&self) -> String {
        fs::read_to_string(self.build.path("log")).unwrap_or_default()
    }

    fn wait(&self, what: &str, mut done: impl FnMut() -> bool) {
        for _ in 0..1200 {
            if done() {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("{what}: {:?}\n{}", left_over(&self.mark), self.log());
    }
}

#[test]
fn pasta_ends_with_a_builder_that_is_killed() {
    if !has_tun() {
        // The twin says what happens then.
        return;
    }
    let mut begun = Begun::new("FROM busybox\nRUN echo begun && sleep 1000\n");
    begun.builder.kill().expect("a child of ours");
    begun.builder.wait().expect("a child of ours");
    begun.wait("pasta ends", || left_over(&begun.mark).is_empty());
}

#[test]
fn a_pasta_that_is_killed_hangs_nothing() {
    if !has_tun() {
        return;
    }
    // The step goes on without a network; the next one cannot be given it.
    let mut begun = Begun::new(
        "FROM busybox\nRUN echo begun && i=0; while [ $i -lt 600 ] && ip addr | grep -q 'inet.*scope global'; do sleep 0.1; \
         i=$((i+1)); done; sleep 2; ! wget -q -T 20 -O - http://192.0.2.77:8077/page && echo still here\nRUN echo nev''er\n",
    );
    for (number, line) in workers(&begun.mark) {
        if line.starts_with("pasta") {
            let number = rustix::process::Pid::from_raw(number).expect("a process");
            rustix::process::kill_process(number, rustix::process::Signal::KILL).expect("it is of our user");
        }
    }
    let mut status = None;
    let mut builder = std::mem::replace(&mut begun.builder, Command::new("true").spawn().expect("true"));
    begun.wait("the build ends", || {
        status = builder.try_wait().expect("a child of ours");
        status.is_some()
    });
    assert_eq!(status.and_then(|status| status.code()), Some(6), "{}", begun.log());
    let log = begun.log();
    assert!(log.contains(" still here\n") && !log.contains(" never\n"), "{log}");
    assert!(last_error(&log).contains("cannot join the network of `pasta`, which has ended, for the step"), "{log}");
    assert_eq!(left_over(&begun.mark), Vec::<String>::new());
}

#[test]
fn programs_with_raw_sockets_start_where_there_is_a_network_of_their_own() {
    let program = crate::escape::compiled("capable", include_str!("../../testdata/hostile/capable.c"));
    let build = |step: &str| {
        let build = Build::new().dockerfile(&format!("FROM busybox\nCOPY capable /\nRUN /capable /made\n{step}\n"));
        fs::copy(&program, build.path("context/capable")).expect("a file of our own");
        build
    };
    assert!(build("RUN --network=none /made").runs().stderr.contains("raw socket: ok"));
    match crate::nested::is_root() {
        // It would read what the machine receives.
        true => {
            let ended = build("RUN /made").fails_with(4, &["its file may have capabilities", "--network=pasta"]);
            assert!(ended.stderr.contains("/made: Operation not permitted"), "{}", ended.stderr);
        }
        // The kernel knows that the network is not theirs.
        false => assert!(build("RUN /made").runs().stderr.contains("raw socket: Operation not permitted")),
    }
}

#[test]
fn without_pasta_the_build_says_so() {
    let build = Build::new().dockerfile("FROM busybox\nRUN true\n").flag("--network=pasta");
    let mut command = build.command();
    command.env("PATH", build.path("nothing"));
    let ended = run(command, None);
    assert_eq!(ended.code, Some(6), "{}", ended.stderr);
    let error = last_error(&ended.stderr);
    assert!(error.contains("`pasta` is not installed") && error.contains("package passt"), "{error}");
    // A program of that name that never gets ready is given up, and ended.
    if has_tun() {
        let programs = build.path("programs");
        fs::create_dir_all(&programs).expect("a directory of our own");
        let busybox = crate::bases::busybox().expect("busybox is in PATH");
        let script = |text: &str| write_program(&programs.join("pasta"), text);
        script(&format!("#!{} sh\necho broken >&2; exit 3\n", busybox.display()));
        let mut command = build.command();
        command.env("PATH", &programs);
        let ended = run(command, None);
        assert_eq!(ended.code, Some(6), "{}", ended.stderr);
        assert!(last_error(&ended.stderr).contains("pasta did not start: broken"), "{}", ended.stderr);
        script(&format!("#!{} sh\nexec {} sleep 1000\n", busybox.display(), busybox.display()));
        let mut command = build.command();
        command.env("PATH", &programs);
        let ended = run(command, None);
        assert!(last_error(&ended.stderr).contains("pasta was not ready after 10 s"), "{}", ended.stderr);
    }
}

fn write_program(path: &Path, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, text).expect("a file of our own");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("our own file");
}
