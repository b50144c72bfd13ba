//! Git repositories as contexts and as sources of ADD, from real servers.

use crate::git::{self, Daemon, commit, git, publish, repository};
use crate::story::Build;
use std::path::{Path, PathBuf};
use std::process::Command;

const DOCKERFILE: &str = "FROM busybox\nCOPY . /src\nRUN cat /src/f > /seen\n";

#[test]
fn a_repository_is_a_context() {
    let (_dir, dir) = git::directory();
    let files = [("Dockerfile", DOCKERFILE), ("f", "one"), (".dockerignore", "secret\n"), ("secret", "x")];
    repository(&dir, "app", &files);
    let url = format!("http://{}/app.git", git::serve(&dir));
    let build = Build::new().context(&url);
    let image = build.image();
    assert_eq!(image.file("/seen"), "one");
    assert!(!image.has("/src/secret") && !image.has("/src/.git"), "{:?}", image.record.fs.keys());
    let again = build.image();
    assert!(!again.ran().iter().any(|step| step.contains("RUN")), "{:?}", again.ran());
    // The branch moves on: the step sees it, and says why it runs.
    commit(&dir.join("app"), &[("f", "two")]);
    let image = build.image();
    assert_eq!(image.file("/seen"), "two");
    assert!(image.stderr.contains("runs because: src/f changed"), "{}", image.stderr);
}

#[test]
fn references_and_subdirectories() {
    let (_dir, dir) = git::directory();
    repository(&dir, "app", &[("Dockerfile", "FROM scratch\nCOPY . /\n"), ("f", "one"), ("sub/g", "deep")]);
    let work = dir.join("app");
    let first = git(&work, &["rev-parse", "HEAD"]);
    git(&work, &["tag", "--annotate", "--message=x", "v1"]);
    git(&work, &["tag", "both"]);
    commit(&work, &[("f", "two")]);
    git(&work, &["branch", "both"]);
    std::os::unix::fs::symlink("sub", work.join("inside")).expect("a link of our own");
    std::os::unix::fs::symlink("/etc", work.join("outside")).expect("a link of our own");
    commit(&work, &[]);
    publish(&work);
    let daemon = Daemon::start(&dir);
    let url = format!("{}/app.git", daemon.url);
    let build = |rest: &str| {
        let dockerfile = "FROM scratch\nCOPY . /\n";
        Build::new().context(&format!("{url}{rest}")).flag("--file=-").stdin(dockerfile)
    };
    let cases = [
        ("", "/f", "two"),
        ("#v1", "/f", "one"),
        ("#refs/tags/v1", "/f", "one"),
        // A branch before a tag.
        ("#both", "/f", "two"),
        ("?tag=both", "/f", "one"),
        (&format!("#{first}"), "/f", "one"),
        (&format!("?ref=v1&checksum={}", &first[..9]), "/f", "one"),
        ("#:sub", "/g", "deep"),
        ("?branch=main&subdir=inside", "/g", "deep"),
        ("#:../sub/./", "/g", "deep"),
    ];
    for (rest, path, content) in cases {
        let image = build(rest).image();
        assert_eq!(image.file(path), content, "{rest}");
    }
    build("#nope").fails_with(5, &["app.git", "`nope`"]);
    build("#-x").fails_with(5, &["no valid branch", "`-x`"]);
    build("#:nope").fails_with(5, &["has no directory `nope`"]);
    build("#:outside").fails_with(5, &["no directory `outside`"]);
    build(&format!("#{}", "0".repeat(40))).fails_with(5, &["does not contain", "0000"]);
    build("#main?checksum=1").fails_with(5, &["main?checksum=1"]);
    build("?ref=main&checksum=123456").fails_with(5, &["checksum 123456", "found commit"]);
}

#[test]
fn add_checks_a_repository_out() {
    let (_dir, dir) = git::directory();
    repository(&dir, "app", &[("f", "one"), ("bin/tool", "#!/bin/sh\n")]);
    let work = dir.join("app");
    git(&work, &["update-index", "--chmod=+x", "bin/tool"]);
    git(&work, &["commit", "--quiet", "--message=mode"]);
    git(&work, &["tag", "v1"]);
    publish(&work);
    let head = git(&work, &["rev-parse", "HEAD"]);
    let url = format!("http://{}/app.git", git::serve(&dir));
    let text = format!(
        "FROM busybox\nADD {url}#main /a\nADD --keep-git-dir=true --checksum={head} {url}#v1 /b\n\
         ADD --chown=7:8 {url}#v1:bin /c/\nRUN test -x /a/bin/tool && cat /b/.git/HEAD > /head\n"
    );
    let build = Build::new().dockerfile(&text);
    let image = build.image();
    assert_eq!((image.file("/a/f"), image.file("/c/tool")), ("one", "#!/bin/sh\n"));
    assert_eq!(image.file("/head"), format!("{head}\n"));
    assert!(image.has("/b/.git/index") && !image.has("/a/.git") && !image.has("/c/.git"));
    assert_eq!(image.record.fs["/c/tool"]["own"], "7:8");
    // Unchanged, all of it comes from the cache, the index of `.git` with its times included.
    let again = build.image();
    assert!(!again.ran().iter().any(|step| step.contains("RUN")), "{}", again.stderr);
    build.write("Dockerfile", &format!("FROM scratch\n\nADD --checksum=12345678 {url} /\n"));
    build.fails_with(5, &["checksum 12345678", "Dockerfile:3"]);
}

#[test]
fn submodules_come_along() {
    let (_dir, dir) = git::directory();
    repository(&dir, "library", &[("l", "library")]);
    repository(&dir, "app", &[("f", "one")]);
    let work = dir.join("app");
    let library = dir.join("library.git").display().to_string();
    git(&work, &["-c", "protocol.file.allow=always", "submodule", "--quiet", "add", &library, "lib"]);
    let modules = |url: &str| format!("[submodule \"lib\"]\n\tpath = lib\n\turl = {url}\n");
    commit(&work, &[(".gitmodules", &modules("../library.git"))]);
    let url = format!("http://{}/app.git", git::serve(&dir));
    let build = |query: &str| Build::new().dockerfile(&format!("FROM scratch\nADD {url}{query} /\n"));
    let image = build("").image();
    assert_eq!((image.file("/f"), image.file("/lib/l")), ("one", "library"));
    assert!(!image.has("/lib/.git") && !image.has("/.git"), "{:?}", image.record.fs.keys());
    let kept = build("?keep-git-dir=1").image();
    assert!(kept.has("/lib/.git") && kept.has("/.git/modules/lib/HEAD"), "{:?}", kept.record.fs.keys());
    let without = build("?submodules=false").image();
    assert!(without.has("/lib") && !without.has("/lib/l"), "{:?}", without.record.fs.keys());
    // A foreign repository must not reach into this machine.
    commit(&work, &[(".gitmodules", &modules(&library))]);
    build("").fails_with(5, &["submodules", "transport 'file' not allowed", "submodules=false", "Dockerfile:2"]);
    commit(&work, &[(".gitmodules", &modules("ext::sh -c 'touch /tmp/nacre-was-here'"))]);
    build("").fails_with(5, &["submodules"]);
}

#[test]
fn configuration_and_hooks_of_the_user_do_not_act() {
    let (_dir, dir) = git::directory();
    repository(&dir, "app", &[("f", "one\n"), (".gitattributes", "f filter=evil\n")]);
    let url = format!("http://{}/app.git", git::serve(&dir));
    let build = Build::new().dockerfile(&format!("FROM scratch\nADD --keep-git-dir {url} /\n"));
    let (home, hooks) = (build.path("home"), build.path("home/hooks"));
    std::fs::create_dir_all(&hooks).expect("a directory of our own");
    let ran = build.path("ran");
    for hook in ["post-checkout", "reference-transaction"] {
        std::fs::write(hooks.join(hook), format!("#!/bin/sh\ntouch {}\n", ran.display())).expect("a file of our own");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(hooks.join(hook), mode).expect("our own file");
    }
    let config = format!(
        "[core]\n hooksPath = {}\n autocrlf = true\n[filter \"evil\"]\n smudge = touch {}\n[url \"http://127.0.0.1:1/\"]\n \
         insteadOf = http://\n",
        hooks.display(),
        ran.display()
    );
    std::fs::write(home.join(".gitconfig"), config).expect("a file of our own");
    let build = build.env("HOME", &home.display().to_string());
    assert_eq!(build.image().file("/f"), "one\n");
    assert!(!ran.exists(), "something of the user's ran");
}

#[test]
fn private_repositories() {
    let (_dir, dir) = git::directory();
    std::fs::create_dir(dir.join("private")).expect("a directory of our own");
    repository(&dir.join("private"), "app", &[("f", "one")]);
    let server = git::serve(&dir);
    let file = |user: &str| {
        let add = format!("ADD --keep-git-dir http://{user}{server}/private/app.git /r/");
        format!("FROM busybox\n{add}\nRUN ! grep -r hunter2 /r\n")
    };
    let refused = Build::new().dockerfile(&file("")).fails_with(5, &["could not read Username", "GIT_AUTH_TOKEN"]);
    assert!(refused.stderr.contains("Dockerfile:2"), "{}", refused.stderr);
    let build = Build::new().dockerfile(&file("")).env("TOKEN", "hunter2");
    let image = build.flag("--secret=id=GIT_AUTH_TOKEN,env=TOKEN").image();
    assert_eq!(image.file("/r/f"), "one");
    let image = Build::new().dockerfile(&file("reader:hunter2@")).image();
    assert_eq!(image.file("/r/f"), "one");
    let build = Build::new().context(&format!("http://reader:wrong-pass@{server}/private/app.git"));
    let ended = build.fails_with(5, &[&format!("http://{server}/private/app.git"), "Authentication failed"]);
    assert!(!ended.stderr.contains("wrong-pass"), "{}", ended.stderr);
}

/// A program in place of ssh: does `first`, and then locally what the other side would.
fn ssh(dir: &Path, first: &str) -> PathBuf {
    let script = dir.join("ssh");
    let text = format!("#!/bin/sh\n{first}\nfor last; do :; done\neval \"git -c safe.directory='*' ${{last#git-}}\"\n");
    std::fs::write(&script, text).expect("a file of our own");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&script, mode).expect("our own file");
    script
}

#[test]
fn ssh_is_called_with_the_agent_that_is_given() {
    let (_dir, dir) = git::directory();
    repository(&dir, "app", &[("f", "one")]);
    let called = dir.join("called");
    let script = ssh(&dir, &format!("echo \"$SSH_AUTH_SOCK $*\" >> {}", called.display()));
    let socket = dir.join("agent");
    let _agent = std::os::unix::net::UnixListener::bind(&socket).expect("a socket of our own");
    let path = dir.join("app.git").display().to_string();
    for address in [format!("git@example.invalid:{path}"), format!("ssh://git@example.invalid{path}")] {
        let build = Build::new().dockerfile(&format!("FROM scratch\nADD {address}#main /\n"));
        let build = build.env("GIT_SSH_COMMAND", &script.display().to_string()).env("GIT_SSH_VARIANT", "ssh");
        let image = build.flag(format!("--ssh=default={}", socket.display())).image();
        assert_eq!(image.file("/f"), "one", "{address}");
    }
    let called = std::fs::read_to_string(called).expect("ssh was called");
    assert!(called.lines().all(|line| line.starts_with(&socket.display().to_string())), "{called}");
    assert!(called.contains("git@example.invalid"), "{called}");
}

/// Makes a key without passphrase, or with one, and returns its fingerprint.
fn key(path: &Path, passphrase: &str) -> String {
    let keygen = |args: &[&str]| {
        let output = Command::new("ssh-keygen").args(args).arg("-f").arg(path).output().expect("ssh-keygen runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    keygen(&["-q", "-t", "ed25519", "-N", passphrase]);
    keygen(&["-l"]).split(' ').nth(1).expect("a fingerprint").to_owned()
}

#[test]
fn key_files_are_given_by_an_agent_that_ends_with_the_build() {
    let (_dir, dir) = git::directory();
    repository(&dir, "app", &[("f", "one")]);
    let fingerprint = key(&dir.join("key"), "");
    let listed = dir.join("listed");
    let script = ssh(&dir, &format!("(echo $SSH_AUTH_SOCK; ssh-add -l) > {}", listed.display()));
    let address = format!("git@example.invalid:{}", dir.join("app.git").display());
    let build = Build::new().dockerfile(&format!(
        "FROM scratch AS files\nADD {address}#main /\nFROM busybox\nCOPY --from=files /f /f\n\
         RUN --mount=type=ssh test -S \"$SSH_AUTH_SOCK\"\n"
    ));
    let build = build.env("GIT_SSH_COMMAND", &script.display().to_string()).env("GIT_SSH_VARIANT", "ssh");
    let image = build.flag(format!("--ssh=default={}", dir.join("key").display())).image();
    assert_eq!(image.file("/f"), "one");
    let listed = std::fs::read_to_string(listed).expect("ssh was called");
    let (socket, keys) = listed.split_once('\n').expect("two lines");
    assert!(keys.contains(&fingerprint), "{keys} has no {fingerprint}");
    assert!(!Path::new(socket).exists(), "the agent still listens at {socket}");
}

#[test]
fn keys_with_a_passphrase_are_refused_at_once() {
    let (_dir, dir) = git::directory();
    key(&dir.join("key"), "secret words");
    let build = Build::new().dockerfile("FROM scratch\nCOPY Dockerfile /\n");
    let build = build.flag(format!("--ssh=default={}", dir.join("key").display()));
    let ended = build.fails_with(2, &["--ssh default", "ssh-add does not take the keys"]);
    assert!(ended.stderr.contains("have no passphrase"), "{}", ended.stderr);
}

#[test]
fn unused_checkouts_are_pruned() {
    let (_dir, dir) = git::directory();
    repository(&dir, "app", &[("f", "one")]);
    let url = format!("http://{}/app.git", git::serve(&dir));
    let build = Build::new().dockerfile(&format!("FROM scratch\nADD {url} /\n"));
    build.runs();
    let checkouts = || {
        let repositories = std::fs::read_dir(build.store().join("git")).expect("a store").flatten();
        let entries = repositories.flat_map(|one| std::fs::read_dir(one.path()).expect("a repository").flatten());
        entries.filter(|entry| entry.path().is_dir()).count()
    };
    assert_eq!(checkouts(), 2, "the repository and a checkout");
    let mut prune = std::process::Command::new(env!("CARGO_BIN_EXE_nacre"));
    prune.args(["prune", "--all", "--store"]).arg(build.store());
    let ended = crate::story::run(prune, None);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(checkouts(), 0, "{}", ended.stderr);
    build.runs();
}

#[test]
fn what_is_missing_is_named() {
    let build = Build::new().dockerfile("FROM scratch\nADD git://127.0.0.1:1/x.git /\n");
    build.fails_with(5, &["cannot reach git://127.0.0.1:1/x.git", "Connection refused", "Dockerfile:2"]);
    let empty = build.path("empty");
    std::fs::create_dir(&empty).expect("a directory of our own");
    let build = build.env("PATH", &empty.display().to_string());
    build.fails_with(5, &["git://127.0.0.1:1/x.git", "`git` is not installed", "apt-get install git"]);
}

#[test]
fn builds_share_a_repository_and_mend_it() {
    let (_dir, dir) = git::directory();
    repository(&dir, "app", &[("f", "one")]);
    let url = format!("http://{}/app.git", git::serve(&dir));
    let text = format!("FROM scratch\nADD {url} /a/\nADD --keep-git-dir {url} /b/\nADD {url}#main /c/\n");
    let build = Build::new().dockerfile(&text);
    let image = build.image();
    assert_eq!((image.file("/a/f"), image.file("/b/f"), image.file("/c/f")), ("one", "one", "one"));
    // A machine that lost power leaves empty objects behind, a killed git its locks.
    let store = build.store().join("git");
    let repo = std::fs::read_dir(store).expect("a store").next().expect("a repository").expect("an entry").path();
    for entry in std::fs::read_dir(&repo).expect("a repository").flatten() {
        if entry.file_name().to_string_lossy().starts_with("co-") {
            std::fs::write(entry.path().join("index"), "damaged").expect("a file of the store");
        }
    }
    std::fs::write(repo.join("repo/shallow.lock"), "").expect("a file of the store");
    for objects in ["pack", "info"] {
        let _ = std::fs::remove_dir_all(repo.join("repo/objects").join(objects));
    }
    for entry in std::fs::read_dir(repo.join("repo/objects")).expect("objects").flatten() {
        for object in std::fs::read_dir(entry.path()).expect("objects").flatten() {
            std::fs::remove_file(object.path()).expect("an object");
            std::fs::write(object.path(), "").expect("an object");
        }
    }
    assert_eq!(build.image().file("/c/f"), "one");
}
