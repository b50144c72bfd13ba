//! Owners and ids are the same however they are had: as root, with subordinate ids, or emulated with a single id.
//!
//! The layers' digests are pinned, so that runs of these tests by different users are compared with each other, too.

use crate::story::Build;
use serde_json::Value;
use std::collections::HashMap;
use std::io::Read;
use std::path::Path;

/// Uncompressed digests of an archive's layers, without those of the base.
fn diff_ids(archive: &Path, base_layers: usize) -> Vec<String> {
    let mut blobs = HashMap::new();
    let mut archive = tar::Archive::new(std::fs::File::open(archive).expect("an archive"));
    for entry in archive.entries().expect("an archive") {
        let mut entry = entry.expect("an entry");
        let name = entry.path().expect("a name").to_string_lossy().into_owned();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).expect("bytes");
        blobs.insert(name, bytes);
    }
    let json = |name: &str| -> Value { serde_json::from_slice(&blobs[name]).expect("JSON") };
    let named = |digest: &Value| json(&format!("blobs/sha256/{}", &digest.as_str().expect("a digest")[7..]));
    let manifest = named(&json("index.json")["manifests"][0]["digest"]);
    let config = named(&manifest["config"]["digest"]);
    let ids = config["rootfs"]["diff_ids"].as_array().expect("diff IDs");
    ids.iter().skip(base_layers).map(|id| id.as_str().expect("a digest").to_owned()).collect()
}

/// Builds with emulation and as whoever runs the test; returns the layers' digests, which are the same.
#[track_caller]
fn both(dockerfile: &str) -> (Vec<String>, [String; 2]) {
    both_with(dockerfile, |_| {})
}

/// As [`both`], with more files in the context.
#[track_caller]
fn both_with(dockerfile: &str, fill: impl Fn(&Path)) -> (Vec<String>, [String; 2]) {
    let build = |how: &str| {
        let build = Build::new()
            .dockerfile(dockerfile)
            .file("data", "data\n")
            .flag(format!("--ownership={how}"))
            .env("SOURCE_DATE_EPOCH", "1700000000");
        fill(&build.path("context"));
        let out = build.path("image.tar");
        let build = build.flag(format!("--output=type=oci,rewrite-timestamp=true,dest={}", out.display()));
        let ended = build.runs();
        (diff_ids(&out, 1), ended.stderr)
    };
    let ((emulated, log), (own, own_log)) = (build("emulate"), build("auto"));
    assert_eq!(emulated, own, "emulated:\n{log}\nown:\n{own_log}");
    (own, [log, own_log])
}

/// What the steps printed.
fn printed(log: &str) -> Vec<String> {
    let said = |line: &&str| {
        let words: Vec<&str> = line.split(' ').collect();
        words.len() > 2 && words[0].starts_with('#') && words[1].parse::<f64>().is_ok()
    };
    log.lines().filter(said).map(|line| line.splitn(3, ' ').nth(2).unwrap_or("").to_owned()).collect()
}

/// Each line is a step. What it prints and what it leaves must not depend on how ids are had.
const MATRIX: &str = r#"FROM busybox
RUN touch /f && chown 33:34 /f && stat -c '%u:%g %a' /f && chmod 4755 /f && chown 35 /f && stat -c '%u:%g %a' /f
RUN su app -s /bin/sh -c 'id -u; umask 027; touch /tmp/f; mkdir /tmp/d; ln -s x /tmp/l; mkfifo /tmp/p; echo hi > /tmp/d/new' && stat -c '%u:%g %a %n' /tmp/f /tmp/d /tmp/l /tmp/p /tmp/d/new
RUN cp -a /tmp /copy && mv /copy/f /copy/g && ln /copy/g /copy/h && find /copy -user 1000 | sort
RUN cd /copy && tar cf /t.tar . && mkdir /t && tar xpf /t.tar -C /t && ls -ln /t | awk '{print $1, $3, $4, $9}' && rm /t.tar
RUN mkdir /shared && chgrp 50 /shared && chmod 2775 /shared && touch /shared/a && mkdir /shared/d && su app -s /bin/sh -c 'touch /shared/b' && stat -c '%u:%g %a %n' /shared/*
RUN echo more >> /copy/g && chmod 600 /copy/d/new && mv /tmp/d/new /tmp/d/moved && stat -c '%u:%g %a %n' /copy/g /copy/h /copy/d/new /tmp/d/moved
RUN rm /tmp/f && touch /tmp/f && rm -r /copy/d && mkdir /copy/d && stat -c '%u:%g %n' /tmp/f /copy/d
RUN chown -h 7:8 /tmp/l && chown -R 9:9 /t && stat -c '%u:%g %n' /tmp/l /t /t/g
RUN ( cd / && chroot / sh -c 'chown 11 /f' ) && mkdir -p /jail/bin && cp /bin/busybox /jail/bin/ && chroot /jail /bin/busybox sh -c 'busybox touch /in; busybox chown 12:13 /in' && rm -r /jail/bin && stat -c '%u:%g %n' /f /jail/in
COPY --chown=14:15 data /data/
RUN stat -c '%u:%g %n' /data/data && cp -a /data/data /data/copy && stat -c '%u:%g %n' /data /data/copy
RUN --mount=type=tmpfs,target=/m touch /m/a && chown 16:17 /m/a && cp -a /m/a /a && stat -c '%u:%g' /a
RUN --mount=from=busybox,target=/b stat -c '%u:%g' /b/bin && chown 18 /proc/self/fd/0 2>/dev/null; exec 3>/viafd && chown 19:20 /proc/self/fd/3 && stat -c '%u:%g' /viafd
USER 1000
RUN id -u && id -g && touch /tmp/user && mkdir /tmp/userdir && chown 1000 /tmp/user && ! chown 0 /tmp/user 2>/dev/null && stat -c '%u:%g %n' /tmp/user /tmp/userdir
USER 5:6
RUN id -u && id -g && (exec 4> /tmp/redirected) && stat -c '%u:%g' /tmp/redirected
"#;

#[test]
fn the_same_layers_with_one_id_as_with_many() {
    let (ids, [emulated, own]) = both(MATRIX);
    assert_eq!(printed(&emulated), printed(&own));
    for line in ["33:34 644", "35:34 755", "1000:1000 640 /tmp/f", "1000:1000 600 /copy/d/new", "7:8 /tmp/l"] {
        assert!(printed(&own).iter().any(|printed| printed == line), "{line} is not in {own}");
    }
    assert_eq!(ids.len(), 15);
    assert_eq!(combined(&ids), "13824a8981c473a7");
}

#[test]
fn devices_are_made_by_everybody() {
    let (ids, logs) = both(
        "FROM busybox\nRUN umask 022; mknod /null c 1 3 && mknod -m 600 /disk b 8 300 && test -c /null && test -b /disk\n\
         RUN chown 5:6 /null && cp -a /null /copy && stat -c '%F %t %T %u:%g' /copy /disk\n\
         RUN mv /copy /moved && tar cf - /moved | tar tvf - && chmod 604 /null && ln /disk /link && test -b /link && rm /disk\n\
         RUN --network=none ls -l /null /link\n",
    );
    for log in &logs {
        let said = printed(log);
        for text in
            ["character special file 1 3 5:6", "block special file 8 12c 0:0", "crw-r--r-- 5/6", "crw----r--    1 5"]
        {
            assert!(said.iter().any(|line| line.contains(text)), "`{text}` is not in {log}");
        }
    }
    assert_eq!(combined(&ids), "e4f63303338ee186");
}

#[test]
fn a_device_that_is_made_unseen_is_one_from_the_next_step_on() {
    // Nothing in the command says that it makes one, so with subordinate ids nobody looks.
    let (ids, [emulated, own]) = both(
        "FROM busybox\nRUN umask 022; d=d; mkno$d /null c 1 3; test -c /null && echo a device || echo a file\n\
         RUN test -c /null && echo now a device\n",
    );
    let said = |log: &str, text: &str| printed(log).iter().any(|line| line == text);
    assert!(said(&emulated, "a device"), "{emulated}");
    assert!(said(&own, "a device") || said(&own, "a file"), "{own}");
    assert!(said(&emulated, "now a device") && said(&own, "now a device"), "{own}");
    assert_eq!(combined(&ids), "c0d1c56286363098");
}

#[test]
fn attributes_are_kept_where_layers_hold_them() {
    let program = crate::escape::compiled("attributes", include_str!("../../testdata/hostile/attributes.c"));
    // The program itself is taken from a mount, so that layers do not depend on a compiler.
    let dockerfile = "FROM busybox\nRUN --mount=type=bind,target=/context,source=bin /context/attributes\n\
        RUN stat -c '%a %u:%g %n' /suid /list /owned && cp -a /cap /copy && mv /cap /moved && ln /suid /link\n";
    let (ids, logs) = both_with(dockerfile, |context| {
        std::fs::create_dir(context.join("bin")).expect("a directory of our own");
        std::fs::copy(&program, context.join("bin/attributes")).expect("a file of our own");
    });
    for log in &logs {
        let said = |text: &str| log.lines().any(|line| line.ends_with(text));
        for text in ["capability ok", "read ok", "gone ok", "list ok", "6755 0:0 /suid", "664 0:0 /list", "5:6 /owned"]
        {
            assert!(said(text), "{text} is not in {log}");
        }
        let warning =
            "the access control list of `/list` does not become part of the image, nor the one of another file";
        assert!(log.contains(warning), "{log}");
        assert!(log.contains("warning: [2/3] RUN"), "the step is named: {log}");
    }
    assert_eq!(combined(&ids), "7b602cf48a26bc6a");
    // What another id may do can only be said where there is one.
    let build = |how: &str| {
        let build = Build::new()
            .flag(format!("--ownership={how}"))
            .dockerfile("FROM busybox\nCOPY attributes /\nRUN /attributes 1000\n");
        std::fs::copy(&program, build.path("context/attributes")).expect("a file of our own");
        build.image()
    };
    let emulated = build("emulate");
    assert!(emulated.stderr.contains(" list Invalid argument\n"), "{}", emulated.stderr);
    let entry = format!("{:?}", emulated.record.fs["/cap"]);
    assert!(entry.contains("security.capability"), "{entry}");
}

#[test]
fn programs_keep_capabilities_and_hide_their_memory() {
    let program = crate::escape::compiled("identities", include_str!("../../testdata/hostile/identities.c"));
    let dockerfile = "FROM busybox\nRUN --mount=type=bind,target=/context,source=bin /context/identities\n";
    let (ids, [emulated, own]) = both_with(dockerfile, |context| {
        std::fs::create_dir(context.join("bin")).expect("a directory of our own");
        std::fs::copy(&program, context.join("bin/identities")).expect("a file of our own");
    });
    assert_eq!(printed(&emulated), printed(&own));
    for line in [
        "relative belongs to 7:9",
        "descriptor belongs to 10:11",
        "groups 5 6",
        "ids 13 14 13",
        "setuid too early: Operation not permitted",
        "chown too early: Operation not permitted",
        "setresgid without: Operation not permitted",
        "chown without: Operation not permitted",
        "chroot without: Operation not permitted",
        "mknod without: Operation not permitted",
        "ask for more: Operation not permitted",
        "chown after asking: ok",
        "version: Invalid argument",
        "version 3",
        "no such capability: Invalid argument",
        "chown beside the thread: ok",
        "own program: a link",
        "root's chown: Operation not permitted",
        "root's setgid: ok",
        "chown again: ok",
        "setgid yet: ok",
        "drop as a user: Operation not permitted",
        "setgid after drop: Operation not permitted",
        "setuid after drop: ok",
        "setresgid: ok",
        "chown: ok",
        "setgroups after exec: Operation not permitted",
        "setuid after exec: Operation not permitted",
        "/kept belongs to 23:24",
        "/tmp/of-21 belongs to 21:22",
    ] {
        assert!(printed(&own).iter().any(|printed| printed == line), "`{line}` is not in {own}");
    }
    assert_eq!(combined(&ids), "ad6b15a87ecf1dd6");
}

#[test]
fn set_id_programs_are_that_for_root_too() {
    let program = crate::escape::compiled("identities", include_str!("../../testdata/hostile/identities.c"));
    // As Debian's crontab, whose files belong to its group whoever calls it.
    let dockerfile = "FROM busybox\nCOPY --chown=33:34 --chmod=6755 identities /both\nCOPY --chown=35:36 --chmod=2755 identities /group\n\
         COPY --chown=37:38 --chmod=6644 identities /not\n\
         RUN mkdir -m 777 /d && cd /d && /both a && /group b && ! /not c 2>/dev/null && su app -s /bin/sh -c '/both e; /group f; /group promise /both i'\n\
         USER 7:8\nRUN cd /d && /both g && /group h\n";
    let (ids, [emulated, own]) = both_with(dockerfile, |context| {
        std::fs::copy(&program, context.join("identities")).expect("a file of our own");
    });
    assert_eq!(printed(&emulated), printed(&own));
    for line in [
        "a: 0 33 33, 0 34 34",
        "a belongs to 33:34",
        "b: 0 0 0, 0 36 36",
        "b belongs to 0:36",
        "e belongs to 33:34",
        "f belongs to 1000:36",
        "i: 1000 1000 1000, 1000 36 36",
        "i belongs to 1000:36",
        "g: 7 33 33, 8 34 34",
        "h belongs to 7:36",
    ] {
        assert!(printed(&own).iter().any(|printed| printed == line), "`{line}` is not in {own}");
    }
    assert_eq!(ids.len(), 5);

    // In a container that allows no new privileges, the promise is not the step's.
    let build = Build::new().dockerfile(dockerfile).flag("--ownership=emulate").env("SOURCE_DATE_EPOCH", "1700000000");
    std::fs::copy(&program, build.path("context/identities")).expect("a file of our own");
    let inner = build.command();
    let mut command = std::process::Command::new("setpriv");
    command.args(["--no-new-privs", "--"]).arg(inner.get_program()).args(inner.get_args());
    command.env_clear().envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let ended = crate::story::run(command, None);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(printed(&ended.stderr), printed(&own));
}

#[test]
fn caches_keep_their_owners() {
    let step = "--mount=type=cache,target=/c,id=x,uid=1000,gid=50";
    let build = |how: &str, more: &str| {
        let build = Build::new().flag(format!("--ownership={how}"));
        build.dockerfile(&format!(
            "FROM busybox\nRUN {step} stat -c '%u:%g' /c && touch /c/f && chown 7:8 /c/f\n\
             RUN {step} stat -c '%u:%g %n' /c /c/f{more}\n"
        ))
    };
    for how in ["auto", "emulate"] {
        let log = build(how, "").runs().stderr;
        for line in ["1000:50\n", "1000:50 /c\n", "7:8 /c/f\n"] {
            assert!(log.contains(line), "{how}: {line} is not in {log}");
        }
    }
}

#[test]
fn unknown_ways_are_refused() {
    Build::new()
        .dockerfile("FROM busybox\n")
        .flag("--ownership=mine")
        .fails_with(2, &["mine", "auto, subid and emulate"]);
}

/// One digest of several, for a short constant.
fn combined(ids: &[String]) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(ids.join("\n")).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn without_an_overlay_copies_give_the_same_layers() {
    let dockerfile = "FROM busybox\nRUN mkdir -p /d/e && echo 1 > /d/a && echo 2 > /d/e/b && chown -R 5:6 /d && ln /d/a /d/l\n\
        RUN rm /d/a && echo more >> /d/e/b && chmod 600 /d/e/b && touch /d/new && rm -r /bin/yes && ln -s x /d/s\n\
        RUN --mount=from=busybox,target=/b stat -c '%u:%g' /d /d/e/b && cp -a /b/etc /d/etc && rm -r /d/e && mkfifo /d/p\n\
        RUN find /d | sort && cat /d/l && test ! -e /bin/yes\n";
    let layers = |overlay: bool| {
        let build = Build::new().dockerfile(dockerfile).env("SOURCE_DATE_EPOCH", "1700000000");
        let out = build.path("image.tar");
        let build = build.flag(format!("--output=type=oci,rewrite-timestamp=true,dest={}", out.display()));
        let inner = build.command();
        let mut command = std::process::Command::new("unshare");
        // A store on an overlay: the kernel refuses another one above it.
        let mount = "mount -t overlay -o userxattr,lowerdir=$1/low,upperdir=$1/up,workdir=$1/work over $1/store";
        let script = format!(
            "mkdir -p $1/low $1/up $1/work $1/store && {} && shift && exec \"$@\"",
            if overlay { "true" } else { mount }
        );
        command
            .args(["-Urm", "sh", "-c", &script, "sh"])
            .arg(build.path("."))
            .arg(inner.get_program())
            .args(inner.get_args());
        command.env_clear().envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        let ended = crate::story::run(command, None);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        assert_eq!(ended.stderr.contains("steps work on copies"), !overlay, "{}", ended.stderr);
        diff_ids(&out, 1)
    };
    assert_eq!(layers(false), layers(true));
}
