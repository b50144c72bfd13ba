//! Attacks that need a program, a helper outside, or a second build: other ways to call the kernel, races with a copy,
//! other builds' secrets, limits. What a shell or a file can try is in `escape`.

use crate::escape::{behind_shared_proc, compiled};
use crate::story::{Build, Ended, assert_store_is_whole, run};
use std::fs;
use std::io::Read;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// For what takes as long as the machine lets it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Puts a program into the context.
fn with_program(build: Build, name: &str, text: &str) -> Build {
    fs::copy(compiled(name, text), build.path("context").join(name)).expect("a file of our own");
    build
}

#[track_caller]
fn assert_nothing_escaped(ended: &Ended, tries: usize) {
    let escaped: Vec<&str> = ended.stderr.lines().filter(|line| line.contains("ESCAPED")).collect();
    assert!(escaped.is_empty(), "{escaped:?}\n{}", ended.stderr);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let printed = ended.stderr.lines().filter(|line| line.ends_with(" all was tried") && !line.contains("RUN"));
    assert_eq!(printed.count(), tries, "{}", ended.stderr);
}

/// Is there a process with this in its command line?
fn is_running(word: &str) -> bool {
    let entries = fs::read_dir("/proc").expect("/proc is mounted").flatten();
    let lines = entries.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    lines.into_iter().any(|line| String::from_utf8_lossy(&line).contains(word))
}

#[track_caller]
fn assert_gone(word: &str) {
    let until = Instant::now() + PATIENCE;
    while is_running(word) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(!is_running(word), "a process with {word} is left");
}

/// Segments of shared memory that the host has, if it has any that others may see.
fn shared_memory_key() -> Option<String> {
    let made = Command::new("ipcmk").args(["-M", "4096", "-p", "0666"]).output().ok()?;
    let text = String::from_utf8_lossy(&made.stdout).into_owned();
    let id = text.rsplit(' ').next()?.trim().to_owned();
    let list = fs::read_to_string("/proc/sysvipc/shm").ok()?;
    let key = list.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).find(|fields| fields[1] == id)?[0];
    Some(key.to_owned())
}

#[test]
#[cfg(target_arch = "x86_64")]
fn calls_by_other_ways() {
    let name = format!("nacre-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).expect("a short name");
    let _listener = UnixListener::bind_addr(&address).expect("an abstract socket");
    let key = shared_memory_key().expect("ipcmk of util-linux");
    for how in ["auto", "emulate"] {
        let emulated = if how == "emulate" { "EMULATED=1" } else { "NATIVE=1" };
        let build = Build::new().flag(format!("--ownership={how}")).dockerfile(&format!(
            "FROM busybox\nCOPY foreign /\nENV SHM_KEY={key} ABSTRACT={name} {emulated}\nRUN SHARED=1 /foreign\n\
             RUN --network=none /foreign\nUSER 1000\nRUN SHARED=1 /foreign\n"
        ));
        let build = with_program(build, "foreign", include_str!("../../testdata/hostile/foreign.c"));
        assert_nothing_escaped(&build.ends(), 3);
    }
    let removed = Command::new("ipcrm").args(["-M", &key]).status().expect("ipcrm of util-linux");
    assert!(removed.success());
}

#[test]
fn files_of_the_kernel_and_devices() {
    let mounts = "--mount=type=cache,target=/c --mount=type=tmpfs,target=/t --mount=type=bind,from=busybox,target=/b \
                  --mount=type=bind,from=busybox,target=/w,rw --mount=type=bind,target=/x --mount=type=secret,id=s";
    let build = Build::new().flag("--secret=id=s,env=SECRET").env("SECRET", "s3cr3t-value-4711").dockerfile(&format!(
        "FROM busybox\nCOPY kernel-files /\nRUN {mounts} /kernel-files\nUSER 1000\nRUN {mounts} /kernel-files\n"
    ));
    let build = with_program(build, "kernel-files", include_str!("../../testdata/hostile/kernel-files.c"));
    assert_nothing_escaped(&build.ends(), 2);
}

/// Tries to overwrite the program that a step was started by, while it is one: as the interpreter of a script.
#[test]
fn the_builder_is_not_overwritten() {
    let program = Path::new(env!("CARGO_BIN_EXE_nacre"));
    let before = fs::metadata(program).expect("the program");
    let script = "i=0; while [ $i -lt 300 ]; do for p in /proc/[0-9]*; do (echo x >> $p/exe) 2>/dev/null && \
                  case $(readlink $p/exe) in *busybox) ;; *) echo ESC$N''APED $p;; esac; done; i=$((i+1)); done & ";
    let build = Build::new().dockerfile(&format!(
        "FROM busybox\nRUN printf '#!/proc/self/exe\\n' > /s && chmod +x /s\n\
         RUN {script} for i in 1 2 3 4 5 6 7 8 9; do /s; done; kill $!; echo all was tried\n\
         RUN [\"/s\"]\n"
    ));
    // The last step starts the builder's own program, by its interpreter, which does not know what to do then.
    let ended = build.ends();
    assert!(!ended.stderr.contains("ESCAPED"), "{}", ended.stderr);
    assert!(ended.stderr.contains("all was tried"), "{}", ended.stderr);
    assert_ne!(ended.code, Some(0), "{}", ended.stderr);
    let after = fs::metadata(program).expect("the program");
    assert_eq!((before.len(), before.modified().ok()), (after.len(), after.modified().ok()));
}

/// The value of a secret in parts, so that looking for it does not find who looks.
const SECRET: [&str; 2] = ["other-builds-", "secret-0815"];

/// One build holds a secret; another one, of the same user and at the same time, looks for it wherever it can.
fn look_for_secrets(wrap: impl Fn(Command) -> Command) {
    let holder = Build::new();
    let (ready, done) = (format!("/ready-{}", std::process::id()), format!("holder-{}", std::process::id()));
    let holder = holder.flag("--secret=id=s,env=SECRET").env("SECRET", &SECRET.concat()).dockerfile(&format!(
        "FROM busybox\nRUN --mount=type=secret,id=s --mount=type=secret,id=s,env=TOKEN --mount=type=cache,id=private,\
         target=/c cp /etc/hosts /c/{done}; touch {ready}; echo here; sleep 600\n"
    ));
    let mut child = holder.command().stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("nacre starts");
    let mut said = std::io::BufReader::new(child.stderr.take().expect("it is piped"));
    let mut line = String::new();
    while !line.contains(" here\n") {
        line.clear();
        let length = std::io::BufRead::read_line(&mut said, &mut line).expect("text");
        assert!(length > 0, "the other build ended");
    }
    let [first, second] = SECRET;
    let script = format!(
        "w={first}; w=$w{second}\nfor p in /proc/[0-9]*; do\n\
         grep -qs $w $p/environ $p/cmdline && echo ESCAPED environment of $p\n\
         grep -qs $w $p/root/run/secrets/s && echo ESCAPED secret of $p\n\
         ls $p/root{ready} $p/cwd{ready} >/dev/null 2>&1 && echo ESCAPED root of $p\n\
         for f in $p/fd/*; do case $(readlink $f) in pipe:*|socket:*|/dev/null|*memfd*) ;; *) grep -qs $w $f && echo ESCAPED $f;; esac; done\n\
         head -c 100 $p/mem >/dev/null 2>&1 && echo ESCAPED memory of $p\ndone\n\
         grep -rqs $w /run /tmp /var /c /dev/shm /dev/mqueue && echo ESCAPED file\n\
         [ -e {store} ] && echo ESCAPED store\nls /c/{done} >/dev/null 2>&1 && echo ESCAPED cache\n\
         [ -e /run/secrets/s ] && echo ESCAPED own\necho all was tried\n",
        store = holder.store().display()
    );
    let seeker = Build::new().file("seek.sh", &script).dockerfile(
        "FROM busybox\nCOPY seek.sh /\nRUN --mount=type=cache,target=/c sh /seek.sh\n\
         RUN --mount=type=secret,id=s --mount=type=cache,id=private,target=/c sh /seek.sh\n",
    );
    let ended = run(wrap(seeker.command()), None);
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::KILL)
        .expect("it was not waited for");
    child.wait().expect("it ends");
    assert_nothing_escaped(&ended, 2);
}

#[test]
fn secrets_and_caches_of_other_builds() {
    look_for_secrets(|command| command);
}

#[test]
fn secrets_of_other_builds_where_proc_is_shared() {
    look_for_secrets(behind_shared_proc);
}

#[test]
fn what_is_mounted_cannot_be_linked_into_the_layer() {
    let value = "s3cr3t-value-4711";
    let build = Build::new().flag("--secret=id=s,env=SECRET").env("SECRET", value).dockerfile(
        "FROM busybox\nRUN --mount=type=secret,id=s --mount=type=bind,from=busybox,target=/b,rw \
         --mount=type=cache,target=/c touch /c/f; for f in /run/secrets/s /etc/hosts /etc/resolv.conf /dev/null \
         /proc/version /b/bin/busybox /c/f; do ln $f /kept-${f##*/} 2>/dev/null && echo ESC$N''APED $f; \
         mv $f /moved 2>/dev/null && rm /moved; ln -s $f /link && ln -L /link /kept-${f##*/} 2>/dev/null && \
         echo ESC$N''APED link to $f; rm /link; done; echo all was tried\n",
    );
    let image = build.image();
    assert!(image.stderr.contains("all was tried") && !image.stderr.contains("ESCAPED"), "{}", image.stderr);
    let kept: Vec<_> = image.record.fs.keys().filter(|path| path.contains("kept") || path.contains("secret")).collect();
    assert!(kept.iter().all(|path| *path == "/run/secrets"), "{kept:?}");
}

/// What a cache mount holds is hostile, too: links in it lead nowhere when the next step mounts on or behind them.
#[test]
fn links_in_caches_lead_nowhere() {
    let build = Build::new();
    let outside = build.path("outside");
    fs::create_dir(&outside).expect("a directory of our own");
    fs::write(outside.join("victim"), "before").expect("a file of our own");
    let build = build.dockerfile(&format!(
        "FROM busybox\nRUN --mount=type=cache,target=/c ln -s {0} /c/out; ln -s / /c/root; ln -s ../../../../../..{0} /c/up\n\
         RUN --mount=type=cache,target=/c --mount=type=tmpfs,target=/c/out/t --mount=type=tmpfs,target=/c/up/t \
         touch /c/out/t/x /c/up/t/x; ls /c/out/victim /c/up/victim /c/root{0}/victim 2>/dev/null && echo ESC$N''APED; \
         echo all was tried\n",
        outside.display()
    ));
    assert_nothing_escaped(&build.ends(), 1);
    assert_eq!(fs::read_dir(&outside).expect("still there").count(), 1);
}

/// What a thread does to the context until it is told to stop.
fn meanwhile<T>(act: impl Fn(u32) + Sync, then: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut round = 0;
            while !stop.load(Ordering::Relaxed) {
                act(round);
                round += 1;
            }
        });
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(then));
        stop.store(true, Ordering::Relaxed);
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Renames `new` over `path`; both are ours alone.
fn put(new: &Path, path: &Path) {
    // A directory is in the way of a file and the reverse: out of the way first.
    if fs::rename(new, path).is_err() {
        let aside = new.with_extension("aside");
        let _ = fs::rename(path, &aside);
        let _ = fs::rename(new, path);
        let _ = fs::remove_dir_all(&aside).or_else(|_| fs::remove_file(&aside));
    }
}

#[test]
fn links_that_take_the_place_of_files_meanwhile() {
    const HIDDEN: &str = "hidden outside of the context";
    let build = Build::new().dockerfile("FROM scratch\nCOPY a /a\nCOPY a/file b /c/\nADD a/file /d/\nCOPY . /all\n");
    let outside = build.path("outside");
    fs::create_dir(&outside).expect("a directory of our own");
    fs::write(outside.join("file"), HIDDEN).expect("a file of our own");
    let (context, aside) = (build.path("context"), build.path("aside"));
    fs::create_dir_all(&aside).expect("a directory of our own");
    for name in ["a", "b"] {
        build.write(&format!("{name}/file"), "inside");
    }
    let swap = |round: u32| {
        let (file, dir) = (context.join("a/file"), context.join("b"));
        let new = aside.join(format!("new-{}", round % 3));
        match round % 6 {
            0 | 3 => symlink(outside.join("file"), &new).map(|()| put(&new, &file)),
            1 | 4 => fs::write(&new, "inside").map(|()| put(&new, &file)),
            2 => symlink(&outside, &new).map(|()| put(&new, &dir)),
            _ => fs::create_dir(&new).and_then(|()| fs::write(new.join("file"), "inside")).map(|()| put(&new, &dir)),
        }
        .unwrap_or_default();
        // Now and then for as long as a build takes, so that some come through.
        let pause = if round % 6 == 5 { round * 37 % 40_000 } else { round * 37 % 400 };
        std::thread::sleep(Duration::from_micros(u64::from(pause)));
    };
    let out = build.path("image.tar");
    let mut built = 0;
    meanwhile(swap, || {
        for _ in 0..40 {
            if built == 10 {
                break;
            }
            // Every other time there is so much to read that it is read and compressed at once.
            if built % 2 == 1 {
                build.write("large", &built.to_string().repeat(2 << 20));
            }
            let mut command = build.command();
            command.arg("--no-cache").arg(format!("--output=type=oci,compression=uncompressed,dest={}", out.display()));
            let ended = run(command, None);
            assert!(matches!(ended.code, Some(0 | 3 | 7)), "{:?} {}", ended.code, ended.stderr);
            assert!(!ended.stderr.contains("internal error"), "{}", ended.stderr);
            if ended.code == Some(0) {
                built += 1;
                let bytes = fs::read(&out).expect("the image");
                assert!(memchr(&bytes, HIDDEN.as_bytes()).is_none(), "a link was followed out of the context");
            }
        }
    });
    // Left in peace, it is an ordinary context.
    let (file, dir) = (aside.join("last"), aside.join("last-dir"));
    fs::create_dir(&dir).expect("a directory of our own");
    for new in [&file, &dir.join("file")] {
        fs::write(new, "inside").expect("a file of our own");
    }
    put(&file, &context.join("a/file"));
    put(&dir, &context.join("b"));
    build.runs();
    assert_store_is_whole(&build.store());
    let found = Command::new("grep").args(["-rlaF", HIDDEN]).arg(build.store()).output().expect("grep is there");
    assert_eq!(String::from_utf8_lossy(&found.stdout), "");
}

fn memchr(text: &[u8], word: &[u8]) -> Option<usize> {
    text.windows(word.len()).position(|window| window == word)
}

/// A file of the layers, which are not compressed, in an archive of an image.
fn file_in_layers(archive: &Path, name: &str) -> Option<Vec<u8>> {
    let mut outer = tar::Archive::new(fs::File::open(archive).expect("an archive"));
    for blob in outer.entries().expect("an archive") {
        let mut bytes = Vec::new();
        blob.expect("an archive").read_to_end(&mut bytes).expect("an archive");
        for mut entry in tar::Archive::new(bytes.as_slice()).entries().expect("memory").map_while(Result::ok) {
            if entry.path_bytes().as_ref() == name.as_bytes() {
                let mut content = Vec::new();
                entry.read_to_end(&mut content).expect("a layer");
                return Some(content);
            }
        }
    }
    None
}

#[test]
fn a_context_that_changes_meanwhile() {
    let build =
        Build::new().dockerfile("FROM busybox\nCOPY data /data\nRUN cat /data/* | tr -d '\\n' | tr -s a-z > /kinds\n");
    let data = build.path("context/data");
    fs::create_dir(&data).expect("a directory of our own");
    let change = |round: u32| {
        let letter = [b"a", b"b", b"c"][(round % 3) as usize];
        // Longer and shorter, in place.
        let _ = fs::write(data.join("file"), letter.repeat(1_100_000 + (round % 50) as usize * 4096));
    };
    change(0);
    let out = build.path("out");
    meanwhile(change, || {
        for _ in 0..10 {
            let mut command = build.command();
            command.arg(format!("--output=type=local,dest={}", out.display()));
            let ended = run(command, None);
            assert!(matches!(ended.code, Some(0 | 3 | 7)), "{:?} {}", ended.code, ended.stderr);
            if ended.code != Some(0) {
                assert!(ended.stderr.contains("data/file"), "{}", ended.stderr);
                continue;
            }
            // At each moment the file holds one letter only, and each time another length.
            let kept = fs::read(out.join("data/file")).expect("it was copied");
            assert!(kept.windows(2).all(|pair| pair[0] == pair[1]), "two versions of a file in one");
        }
        let archive = build.path("image.tar");
        for _ in 0..10 {
            let mut command = build.command();
            // Read and written at once.
            command
                .arg("--no-cache")
                .arg(format!("--output=type=oci,compression=uncompressed,dest={}", archive.display()));
            let ended = run(command, None);
            assert!(matches!(ended.code, Some(0 | 3 | 7)), "{:?} {}", ended.code, ended.stderr);
            if ended.code == Some(0) {
                let kept = file_in_layers(&archive, "data/file").expect("it was copied");
                assert!(kept.windows(2).all(|pair| pair[0] == pair[1]), "two versions of a file in one");
            }
        }
    });
    // Whatever was seen is what was kept.
    assert_store_is_whole(&build.store());
    let mut fsck = Command::new(env!("CARGO_BIN_EXE_nacre"));
    let ended = run(
        {
            fsck.args(["fsck", "--store"]).arg(build.store());
            fsck
        },
        None,
    );
    assert_eq!(ended.code, Some(0), "{}\n{}", ended.stdout(), ended.stderr);
    build.runs();
}

#[test]
fn a_fork_bomb_ends_with_its_step() {
    let token = format!("bomb-{}", std::process::id());
    // The first process forks nothing once the others do: a shell that cannot fork ends, and the step with it. For root the
    // limit counts what the user has outside, too: it is nobody's. Where there is one id, it counts all that the tests beside
    // this one run, which takes some dozens, so that there must be room for the bomb's first.
    let build = Build::new().flag("--ulimit=nproc=300").flag("--step-timeout=3s").dockerfile(&format!(
        "FROM busybox\nUSER 54321\nRUN echo {token}; b() {{ b | b & }}; {{ b; b; }} & exec sleep 600\n"
    ));
    build.fails_with(4, &["stopped after 3s"]);
    assert_gone(&token);
    // As many as are allowed, by root too; where only the real root is free of this limit, by another user.
    let build = Build::new().flag("--ulimit=nproc=40").dockerfile(
        "FROM busybox\nUSER 54321\nRUN i=0; while [ $i -lt 200 ]; do sleep 50 & i=$((i+1)); done 2>/dev/null; echo unlimited\n",
    );
    let ended = build.ends();
    let unlimited = ended.stderr.lines().any(|line| line.ends_with(" unlimited") && !line.contains("RUN"));
    assert!(!unlimited, "200 processes within a limit of 40: {}", ended.stderr);
}

#[test]
fn memory_and_files_are_limited() {
    let build = Build::new().flag("--ulimit=data=67108864").flag("--ulimit=fsize=1000000").flag("--ulimit=nofile=50");
    let build = build.dockerfile(
        "FROM busybox\nCOPY hog /\nRUN /hog; echo ended $?\nRUN head -c 5000000 /dev/zero > /large; wc -c < /large\n\
         RUN ulimit -d unlimited 2>/dev/null && echo ESC$N''APED; ulimit -n 51 2>/dev/null && echo ESC$N''APED; true\n",
    );
    let hog = "#include <stdlib.h>\n#include <stdio.h>\n#include <string.h>\nint main(void) { long n = 0; \
               for (char *p; n < 1000 && (p = malloc(1 << 20)); n++) memset(p, 1, 1 << 20); \
               if (n > 64) printf(\"ESCAPED %ld MB\\n\", n); return n < 64; }";
    let ended = with_program(build, "hog", hog).runs();
    assert!(!ended.stderr.contains("ESCAPED"), "{}", ended.stderr);
    assert!(ended.stderr.contains(" ended 1\n") && ended.stderr.contains(" 1000000\n"), "{}", ended.stderr);
}

/// A step that shares its /proc with its supervisor can end it, and gets no more of it than its end.
#[test]
fn killing_the_supervisor_ends_the_step() {
    let token = format!("orphan-{}", std::process::id());
    let attempts = "[ $PPID = 0 ] || for f in mem environ auxv io; do head -c 1 /proc/$PPID/$f 2>/dev/null | grep -q . \
                    && echo ESC$N''APED $f; done; [ $PPID = 0 ] || for f in root cwd exe fd/0 fd/3 ns/mnt; do \
                    readlink /proc/$PPID/$f && echo ESC$N''APED $f; done; echo all was tried";
    let dockerfile = format!(
        "FROM busybox\nRUN {attempts}\nRUN sh -c 'echo {token}; exec sleep 600' & sleep 600 & sleep 1; kill -9 $PPID; \
         kill -STOP $PPID; [ $PPID = 0 ] || sleep 600\n"
    );
    let build = Build::new().dockerfile(&dockerfile);
    // Nobody above process 1 has a number.
    let ended = build.ends();
    assert!(ended.stderr.contains("all was tried") && !ended.stderr.contains("ESCAPED"), "{}", ended.stderr);
    assert_gone(&token);
    let build = Build::new().dockerfile(&dockerfile);
    let start = Instant::now();
    let ended = run(behind_shared_proc(build.command()), None);
    assert!(start.elapsed() < PATIENCE, "what held the output open was waited for");
    assert!(ended.stderr.contains("all was tried") && !ended.stderr.contains("ESCAPED"), "{}", ended.stderr);
    assert_eq!(ended.code, Some(6), "{}", ended.stderr);
    assert!(ended.stderr.contains("supervisor of the step ended without a result"), "{}", ended.stderr);
    assert_gone(&token);
}

/// Where steps share the /proc of what starts them, one can kill or stop the process that forks supervisors. The next step
/// gets another one, and none of them is left behind.
#[test]
fn killing_the_spawner_costs_some_seconds_at_most() {
    // Written so that it does not find itself, nor the step's supervisor, which goes by the same name.
    let spawners = "for p in /proc/[0-9]*; do [ $p != /proc/$PPID ] && grep -q 'spawn[e]r' $p/cmdline 2>/dev/null && echo found && kill -SIGNAL ${p#/proc/}; done";
    let (kill, stop) = (spawners.replace("SIGNAL", "KILL"), spawners.replace("SIGNAL", "STOP"));
    let dockerfile =
        format!("FROM busybox\nRUN {kill}; true\nRUN echo second; {stop}; true\nRUN echo third; {stop}; true\n");
    let build = Build::new().dockerfile(&dockerfile);
    let start = Instant::now();
    let ended = run(behind_shared_proc(build.command()), None);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(start.elapsed() < PATIENCE, "a stopped spawner was waited for");
    for (word, times) in [(" second", 1), (" third", 1), (" found", 3)] {
        let lines = ended.stderr.lines().filter(|line| line.ends_with(word)).count();
        assert!(lines >= times, "{word}: {lines}\n{}", ended.stderr);
    }
}

/// Compresses well beyond what any honest archive does, or claims sizes that nobody has room for.
#[test]
fn archive_bombs() {
    let build = Build::new();
    let context = build.path("context");
    let write = |name: &str, bytes: &[u8]| fs::write(context.join(name), bytes).expect("a file of our own");
    let header = |kind: tar::EntryType, size: u64| {
        let mut header = tar::Header::new_gnu();
        header.set_path("bomb").expect("a short name");
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_size(size);
        header.set_cksum();
        header.as_bytes().to_vec()
    };
    write("claim.tar", &header(tar::EntryType::Regular, 1 << 50));
    write("name.tar", &[header(tar::EntryType::GNULongName, 4 << 30), vec![b'x'; 4096]].concat());
    write("pax.tar", &[header(tar::EntryType::XHeader, 4 << 30), vec![b'x'; 4096]].concat());
    let members = b"\x1f\x8b".repeat(2000);
    write("members.tar.gz", &members);
    for name in ["claim.tar", "name.tar", "pax.tar", "members.tar.gz"] {
        build.write("Dockerfile", &format!("FROM scratch\nADD {name} /d/\n"));
        let start = Instant::now();
        let ended = limited(&build);
        // What is no archive is copied as it is, as BuildKit does.
        assert!(matches!(ended.code, Some(0 | 3 | 7)), "{name}: {:?} {}", ended.code, ended.stderr);
        assert!(!ended.stderr.contains("internal error") && !ended.stderr.contains("memory allocation"), "{name}");
        assert!(start.elapsed() < PATIENCE, "{name}");
        let left = fs::metadata(build.store()).and_then(|_| size_of(&build.store())).expect("the store");
        assert!(left < 50 << 20, "{name} left {left} bytes");
    }
}

/// Runs a build that may have one gigabyte of memory.
fn limited(build: &Build) -> Ended {
    let inner = build.command();
    let mut command = Command::new("prlimit");
    command.arg("--data=1000000000").arg(inner.get_program()).args(inner.get_args());
    run(command, None)
}

fn size_of(dir: &Path) -> std::io::Result<u64> {
    let mut sum = 0;
    let mut left: Vec<PathBuf> = vec![dir.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(dir)?.flatten() {
            let metadata = entry.metadata()?;
            if metadata.is_dir() { left.push(entry.path()) } else { sum += metadata.len() }
        }
    }
    Ok(sum)
}

/// A server chooses names, and the file is where the Dockerfile said.
#[test]
fn names_of_downloads_stay_inside() {
    let build = Build::new();
    let served = build.path("web/x/http");
    fs::create_dir_all(&served).expect("a directory of our own");
    for name in ["%2e%2e%2fevil", "..%2f..%2fevil", "evil\\..\\x"] {
        fs::write(served.join(name), "evil").expect("a file of our own");
    }
    let address = crate::http::serve(build.path("web")).expect("a server");
    for name in ["%2e%2e%2fevil", "..%2f..%2f..%2fevil", "%2e%2e", "evil%00", "a%0Ab"] {
        build.write("Dockerfile", &format!("FROM scratch\nADD {address}/x/{name} /d/e/\n"));
        let mut command = build.command();
        command.arg(format!("--output=type=local,dest={}", build.path("out").display()));
        let ended = run(command, None);
        assert!(!ended.stderr.contains("internal error"), "{name}: {}", ended.stderr);
        let evil = ["evil", "out/evil", "out/d/evil"].map(|path| build.path(path).exists());
        assert_eq!(evil, [false; 3], "{name}");
    }
    assert!(!Path::new("/evil").exists());
    let names = fs::read_dir(build.path("out/d/e")).into_iter().flatten().flatten();
    assert!(names.into_iter().all(|entry| !entry.file_name().as_bytes().contains(&b'/')));
}
