//! Graphs, configurations and mistakes of small files; and the recorded conformance cases.

use super::*;
use crate::image_config::{ContainerConfig, History, RootFs};
use crate::llb::{CopySource, MountKind};
use crate::source::SourceFile;
use serde_json::{Value, json};

fn amd64() -> Platform {
    Platform { os: "linux".to_owned(), architecture: "amd64".to_owned(), variant: String::new() }
}

fn base(config: Value, layers: usize) -> BaseImage {
    let diff_ids: Vec<String> = (0..layers).map(|layer| format!("sha256:{layer:064}")).collect();
    let history = (0..layers).map(|_| History { created_by: Some("base".to_owned()), ..History::default() }).collect();
    let config: ContainerConfig = serde_json::from_value(config).expect("a configuration");
    let config = ImageConfig {
        architecture: "amd64".to_owned(),
        os: "linux".to_owned(),
        config,
        rootfs: RootFs { kind: "layers".to_owned(), diff_ids: Some(diff_ids) },
        history,
        ..ImageConfig::default()
    };
    BaseImage { config, digest: None }
}

/// The images that tests build on, by short name.
fn known_base(name: &str, platform: &Platform) -> Option<BaseImage> {
    let path = format!("PATH={DEFAULT_PATH}");
    Some(match name {
        "busybox" => base(json!({"Env": [path], "Cmd": ["sh"]}), 1),
        "envbase" => base(
            json!({
                "Env": [path, "BASE_VAR=from-base", "SHARED=base", "EMPTY="], "User": "app:staff",
                "WorkingDir": "/srv/base", "Labels": {"base.label": "one", "shared": "base"},
                "Entrypoint": ["/bin/echo", "base"], "Cmd": ["arg1", "arg2"], "Volumes": {"/data": {}},
                "ExposedPorts": {"8080/tcp": {}}, "StopSignal": "SIGINT", "Shell": ["/bin/ash", "-e", "-c"],
                "Healthcheck": {"Test": ["CMD-SHELL", "true"], "Interval": 5_000_000_000_i64, "Retries": 2}
            }),
            2,
        ),
        "onbuild-base" => base(
            json!({"Env": [path], "Cmd": ["sh"], "OnBuild": [
                "ARG WHO=world", "RUN echo \"hello $WHO\" > /onbuild.txt", "COPY trigger.txt /trigger/", "ENV ONB=yes",
                "WORKDIR /onb"
            ]}),
            1,
        ),
        "layered" => base(json!({"Env": [path], "Cmd": ["sh"]}), 4),
        "multi" => {
            let mut image = base(json!({"Env": [path], "Labels": {"arch": platform.architecture}}), 1);
            image.config.architecture.clone_from(&platform.architecture);
            image
        }
        "copies" => base(json!({"OnBuild": ["COPY --from=tools /t /t", "COPY --from=busybox /bin/sh /sh"]}), 1),
        "broken" => base(json!({"OnBuild": ["FOO bar"]}), 1),
        _ => return None,
    })
}

type Outcome = Result<(Definition, Vec<Warning>), Vec<String>>;

/// Lowers until no configuration is missing. The second member counts the rounds.
fn lower_all(text: &str, options: &Options) -> (Outcome, usize) {
    let mut bases = BaseConfigs::new();
    let name = "Dockerfile";
    let file = match parser::parse(SourceFile::new(name, text)) {
        Ok(file) => file,
        Err(failure) => return (Err(failure.diagnostics.iter().map(|one| one.problem.to_string()).collect()), 0),
    };
    for round in 1..5 {
        match lower(&file, options, &bases) {
            Err(found) => return (Err(found.iter().map(|one| one.problem.to_string()).collect()), round),
            Ok((Lowered::Graph(definition), warnings)) => return (Ok((*definition, warnings)), round),
            Ok((Lowered::NeedsBases(missing), _)) => {
                assert!(!missing.is_empty());
                for (request, _) in missing {
                    let name = match &request.source {
                        ImageSource::OciLayout { path, .. } => path.clone(),
                        ImageSource::Reference(name) => {
                            name.trim_start_matches("docker.io/library/").trim_end_matches(":latest").to_owned()
                        }
                    };
                    match known_base(&name, &request.platform) {
                        Some(base) => assert!(bases.insert(request, base).is_none(), "asked twice"),
                        None => return (Err(vec![format!("no image {name}")]), round),
                    }
                }
            }
        }
    }
    panic!("lowering asks for ever");
}

fn dump(definition: &Definition) -> String {
    let mut out = String::new();
    let id = |input: &Option<VertexId>| input.map_or("scratch".to_owned(), |id| id.0.to_string());
    for (index, vertex) in definition.vertices.iter().enumerate() {
        let inputs: Vec<String> = vertex.inputs.iter().map(id).collect();
        out.push_str(&format!("{index} "));
        match &vertex.op {
            Op::Source(Source::Image(ImageSource::Reference(name))) => out.push_str(&format!("image {name}")),
            Op::Source(source) => out.push_str(&format!("{source:?}")),
            Op::Mkdir(op) => out.push_str(&format!("[{}] mkdir {} {:?}", inputs.join(" "), op.path, op.user)),
            Op::Run(op) => {
                out.push_str(&format!("[{}] run {:?} in {}", inputs.join(" "), op.args, op.cwd));
                for (name, value) in op.env.iter().filter(|(name, _)| name != "PATH") {
                    out.push_str(&format!(" {name}={value}"));
                }
                for (name, value) in &op.env_outside_key {
                    out.push_str(&format!(" ({name}={value})"));
                }
                for mount in &op.mounts {
                    let kind = match &mount.kind {
                        MountKind::Inline { content, mode } => format!("inline {content:?} {mode:o}"),
                        MountKind::Bind { input, source } => format!("bind {input:?} {source}"),
                        MountKind::Cache { id, sharing, from, mode, uid, gid } => {
                            format!("cache {id} {sharing:?} {from:?} {mode:o} {uid}:{gid}")
                        }
                        MountKind::Tmpfs { size_bytes } => format!("tmpfs {size_bytes}"),
                        MountKind::Secret { id, required, mode, uid, gid, env, file } => {
                            format!("secret {id} required={required} {mode:o} {uid}:{gid} {env:?} file={file}")
                        }
                        MountKind::Ssh { id, required, mode, uid, gid } => {
                            format!("ssh {id} required={required} {mode:o} {uid}:{gid}")
                        }
                    };
                    let access = if mount.read_only { "ro" } else { "rw" };
                    out.push_str(&format!("\n    {} {access} {kind}", mount.target));
                }
            }
            Op::Copy(op) => {
                let add = if op.add { "add" } else { "copy" };
                out.push_str(&format!("[{}] {add}", inputs.join(" ")));
                for source in &op.sources {
                    out.push_str(&match source {
                        CopySource::Tree { input, pattern } => format!(" {input}:{pattern}"),
                        CopySource::Inline { name, content } => format!(" <<{name} {content:?}"),
                        CopySource::Http { input, name } => format!(" {input}:http:{name}"),
                        CopySource::Git { input } => format!(" {input}:git"),
                    });
                }
                out.push_str(&format!(" -> {}", op.dest));
                if let Some(owner) = &op.owner {
                    out.push_str(&format!(" {owner}"));
                }
                for (name, set) in [("link", op.link), ("parents", op.parents), ("stage", op.from_stage)] {
                    if set {
                        out.push_str(&format!(" {name}"));
                    }
                }
            }
        }
        out.push('\n');
    }
    out + &format!("top {}\n", id(&definition.image.top))
}

fn lowered(text: &str, options: &Options) -> Definition {
    match lower_all(text, options).0 {
        Ok((definition, _)) => definition,
        Err(problems) => panic!("{text}\n{problems:?}"),
    }
}

#[track_caller]
fn check_with(text: &str, options: &Options, expected: &str) {
    let got = dump(&lowered(text, options));
    let lines = |text: &str| text.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect();
    let (got_lines, expected): (Vec<String>, Vec<String>) = (lines(&got), lines(expected));
    assert_eq!(got_lines, expected, "{text}\n{got}");
}

#[track_caller]
fn check(text: &str, expected: &str) {
    check_with(text, &Options::new(amd64()), expected);
}

#[track_caller]
fn fails(text: &str, expected: &[&str]) {
    match lower_all(text, &Options::new(amd64())).0 {
        Ok(_) => panic!("{text}\nwas accepted"),
        Err(problems) => assert_eq!(problems, expected, "{text}"),
    }
}

#[test]
fn stages_and_sources() {
    check(
        "FROM busybox AS a\nRUN x\nFROM scratch\nCOPY --from=A /x /y/\nCOPY f g .\n",
        r#"0 image docker.io/library/busybox:latest
        1 [0] run ["/bin/sh", "-c", "x"] in /
        2 [scratch 1] copy 1:/x -> /y/ stage
        3 Local { name: "context" }
        4 [2 3] copy 1:f 1:g -> /
        top 4"#,
    );
    // What the target does not need costs nothing.
    check("FROM nosuch AS a\nRUN x\nFROM a AS b\nRUN y\nFROM scratch\nLABEL a=b\n", "top scratch");
    // An image is fetched once.
    check(
        "FROM busybox AS a\nFROM busybox\nCOPY --from=busybox /a /a\nCOPY --from=0 /b /b\n",
        "0 image docker.io/library/busybox:latest\n1 [0 0] copy 1:/a -> /a stage\n2 [1 0] copy 1:/b -> /b stage\ntop 2",
    );
    check("FROM scratch AS a\nFROM scratch\nCOPY --from=a / /\n", "0 [scratch scratch] copy 1:/ -> / stage\ntop 0");
}

#[test]
fn triggers() {
    let text = "FROM scratch AS tools\nCOPY t /t\nFROM copies\nRUN x\n";
    check(
        text,
        r#"0 Local { name: "context" }
        1 [scratch 0] copy 1:t -> /t
        2 image docker.io/library/copies:latest
        3 [2 1] copy 1:/t -> /t stage
        4 image docker.io/library/busybox:latest
        5 [3 4] copy 1:/bin/sh -> /sh stage
        6 [5] run ["/bin/sh", "-c", "x"] in /
        top 6"#,
    );
    assert_eq!(lower_all(text, &Options::new(amd64())).1, 2);
    let names: Vec<String> =
        lowered(text, &Options::new(amd64())).vertices.into_iter().map(|vertex| vertex.name).collect();
    assert_eq!(
        names,
        [
            "[internal] load build context",
            "[tools 1/1] COPY t /t",
            "[stage-1 1/4] FROM docker.io/library/copies:latest",
            "[stage-1 2/4] ONBUILD COPY --from=tools /t /t",
            "FROM docker.io/library/busybox:latest",
            "[stage-1 3/4] ONBUILD COPY --from=busybox /bin/sh /sh",
            "[stage-1 4/4] RUN x",
        ]
    );
    fails("FROM broken\n", &["ONBUILD trigger `FOO bar` of `broken`: unknown instruction `FOO`"]);
    // Triggers of a stage fire in its direct child only.
    check(
        "FROM busybox AS a\nONBUILD RUN x\nFROM a AS b\nFROM b\nRUN y\n",
        r#"0 image docker.io/library/busybox:latest
        1 [0] run ["/bin/sh", "-c", "x"] in /
        2 [1] run ["/bin/sh", "-c", "y"] in /
        top 2"#,
    );
}

#[test]
fn steps_of_run() {
    check(
        "FROM busybox\nARG A=1\nENV B=$A A2=x\nWORKDIR w\nUSER app\nRUN [\"x\", \"$A\"]\n",
        r#"0 image docker.io/library/busybox:latest
        1 [0] mkdir /w ""
        2 [1] run ["x", "$A"] in /w A=1 B=1 A2=x
        top 2"#,
    );
    check(
        "FROM busybox\nRUN <<EOF\n#!/usr/bin/env x\nbody\nEOF\nRUN <<-EOF cat\n\tbody\n\tEOF\n",
        r##"0 image docker.io/library/busybox:latest
        1 [0] run ["/bin/sh", "-c", "/dev/pipes/EOF"] in /
            /dev/pipes/EOF ro inline "#!/usr/bin/env x\nbody\n" 755
        2 [1] run ["/bin/sh", "-c", "<<-EOF cat\n\tbody\nEOF"] in /
        top 2"##,
    );
    let mut options = Options::new(amd64());
    options.build_args.insert("http_proxy".to_owned(), Some("p".to_owned()));
    options.build_args.insert("UNSET".to_owned(), None);
    check_with(
        "FROM busybox\nARG UNSET=default\nRUN x\n",
        &options,
        r#"0 image docker.io/library/busybox:latest
        1 [0] run ["/bin/sh", "-c", "x"] in / UNSET=default (HTTP_PROXY=p) (http_proxy=p)
        top 1"#,
    );
}

#[test]
fn mounts() {
    check(
        "FROM busybox\nWORKDIR /w\nARG T=/t,1\nRUN --mount=target=$T,source=a/../b --mount=type=cache,target=c \\\n \
         --mount=from=layered,target=/m,rw --mount=type=cache,target=/d/,from=busybox,source=etc,id=i,uid=1 x\n",
        r#"0 image docker.io/library/busybox:latest
        1 [0] mkdir /w ""
        2 Local { name: "context" }
        3 image docker.io/library/layered:latest
        4 [1 2 3 0] run ["/bin/sh", "-c", "x"] in /w T=/t,1
            /t,1 ro bind Some(1) /b
            /w/c rw cache c Shared None 755 0:0
            /m rw bind Some(2) /
            /d rw cache i Shared Some((3, "/etc")) 755 1:0
        top 4"#,
    );
    check(
        "FROM busybox\nRUN --mount=type=secret,id=a/b --mount=type=secret,target=/x/y,env=E --mount=type=ssh \\\n \
         --mount=type=secret,id=z,env=Z,required,mode=444 --mount=type=ssh,id=q --mount=type=tmpfs,target=/t,size=1k x\n",
        r#"0 image docker.io/library/busybox:latest
        1 [0] run ["/bin/sh", "-c", "x"] in / SSH_AUTH_SOCK=/run/buildkit/ssh_agent.0
            /run/secrets/b ro secret a/b required=false 400 0:0 None file=true
            /x/y ro secret y required=false 400 0:0 Some("E") file=true
            /run/buildkit/ssh_agent.0 ro ssh default required=false 600 0:0
            /run/secrets/z ro secret z required=true 444 0:0 Some("Z") file=false
            /run/buildkit/ssh_agent.1 ro ssh q required=false 600 0:0
            /t rw tmpfs 1024
        top 1"#,
    );
    let mut options = Options::new(amd64());
    options.build_args.insert("BUILDKIT_CACHE_MOUNT_NS".to_owned(), Some("ns".to_owned()));
    check_with(
        "FROM busybox\nRUN --mount=type=cache,target=/c --mount=from=scratch,target=/e x\n",
        &options,
        r#"0 image docker.io/library/busybox:latest
        1 [0] run ["/bin/sh", "-c", "x"] in /
            /c rw cache ns//c Shared None 755 0:0
            /e ro bind None /
        top 1"#,
    );
}

#[test]
fn copies() {
    check(
        "FROM scratch\nWORKDIR /w\nARG A=1\nCOPY --chown=$A:2 --link $A <<E <<'F' d/.\n$A \"$A\" \\$A\nE\n$A\nF\nADD [\"a\", \"b c\", \"..\"]\n",
        r#"0 [scratch] mkdir /w ""
        1 Local { name: "context" }
        2 [0 1] copy 1:1 <<E "1 \"1\" $A\n" <<F "$A\n" -> /w/d/ 1:2 link
        3 [2 1] add 1:a 1:b c -> /
        top 3"#,
    );
    let sum = "sha256:0123456789012345678901234567890123456789012345678901234567890123";
    check(
        &format!(
            "FROM scratch\nADD --checksum={sum} http://x/y/z?q /\nADD --keep-git-dir https://x/r.git#v1:sub git@h:p /g\n"
        ),
        &format!(
            r#"0 Http {{ url: "http://x/y/z?q", checksum: Some("{sum}") }}
        1 [scratch 0] add 1:http:z -> /
        2 Git {{ remote: "https://x/r.git", reference: "v1", subdir: "sub", keep_git_dir: true, checksum: None, submodules: true }}
        3 Git {{ remote: "git@h:p", reference: "", subdir: "", keep_git_dir: true, checksum: None, submodules: true }}
        4 [1 2 3] add 1:git 2:git -> /g
        top 4"#
        ),
    );
}

#[test]
fn named_contexts() {
    let mut options = Options::new(amd64());
    let mut context = |name: &str, context| options.contexts.insert(name.to_owned(), context);
    context("dep", NamedContext::Local);
    context("busybox", NamedContext::Image(ImageSource::Reference("docker.io/library/layered:latest".to_owned())));
    context("tool:1::linux/amd64", NamedContext::Http("http://x/t".to_owned()));
    context("tool:1", NamedContext::Local);
    check_with(
        "FROM docker.io/library/busybox AS dep\nRUN exit 1\nFROM busybox:latest\nCOPY --from=dep a b\nCOPY --from=0 c d\n\
         COPY --from=tool:1 e f\n",
        &options,
        r#"0 Local { name: "dep" }
        1 image docker.io/library/layered:latest
        2 [1 0] copy 1:a -> /b
        3 [2 0] copy 1:c -> /d
        4 Http { url: "http://x/t", checksum: None }
        5 [3 4] copy 1:e -> /f
        top 5"#,
    );
    options.contexts.insert("context".to_owned(), NamedContext::Local);
    check_with(
        "FROM scratch\nCOPY a b\n",
        &options,
        "0 Local { name: \"context\" }\n1 [scratch 0] copy 1:a -> /b\ntop 1",
    );
}

#[test]
fn stages_as_named_contexts() {
    let mut options = Options::new(amd64());
    options.contexts.insert("base".to_owned(), NamedContext::Target("Made".to_owned()));
    options.contexts.insert("old".to_owned(), NamedContext::Target("made".to_owned()));
    check_with(
        "FROM scratch AS made\nCOPY a b\nFROM scratch AS old\nRUN exit 1\nFROM base\nCOPY --from=base b c\n\
         COPY --from=old b d\n",
        &options,
        r#"0 Local { name: "context" }
        1 [scratch 0] copy 1:a -> /b
        2 [1 1] copy 1:b -> /c stage
        3 [2 1] copy 1:b -> /d stage
        top 3"#,
    );
    options.contexts.insert("base".to_owned(), NamedContext::Target("mad".to_owned()));
    let dockerfile = "FROM scratch AS made\nFROM base\n";
    let file = crate::parser::parse(crate::source::SourceFile::new("Dockerfile", dockerfile)).expect("it parses");
    let found = lower(&file, &options, &BaseConfigs::new()).expect_err("no such stage");
    assert_eq!(
        found[0].problem.to_string(),
        "build context `base` is stage `mad`, which is not defined before it is used"
    );
    assert_eq!(found[0].problem.help().as_deref(), Some("did you mean `made`?"));
}

#[test]
fn mistakes() {
    fails("ARG A\n", &["no build stage: the file has no FROM"]);
    fails("FROM $X\n", &["base name `$X` is blank after expansion"]);
    fails("FROM --platform=$X a\n", &["empty platform from `$X`"]);
    fails("FROM busybox\nCOPY --from=1 a b\n", &["invalid stage index 1: there is 1 stage"]);
    fails("FROM busybox\nCOPY --from=-1 a b\n", &["invalid stage index -1: there is 1 stage"]);
    fails("FROM busybox AS a\nCOPY --from=a a b\n", &["circular dependency on stage `a`"]);
    fails("FROM busybox AS a\nCOPY --from=$a a b\n", &["variable expansion is not supported in --from ($a)"]);
    fails(
        "FROM busybox AS a\nCOPY --from=b a b\nFROM busybox AS b\nFROM a\n",
        &["stage `b` must be defined before stage `a`, which uses it"],
    );
    fails(
        "FROM busybox\nCOPY <<a/b /f\n1\na/b\n",
        &["open a/b: no such file or directory: the name of a heredoc leads into a directory"],
    );
    // All that are independent.
    fails(
        "FROM busybox\nEXPOSE http 80/xyz\nVOLUME a $X\nCOPY http://x/y /\nSTOPSIGNAL SIGFOO\nRUN --mount=target=/ x\n\
         RUN --security=insecure x\n",
        &[
            "invalid protocol `xyz` in port `80/xyz`",
            "a VOLUME can not be an empty string",
            "COPY cannot fetch a URL (`http://x/y`)",
            "invalid signal `SIGFOO`",
            "invalid mount target `/`: the root of the file system cannot be mounted over",
            "security mode `insecure` is not allowed",
        ],
    );
    // A circle of many stages does not exhaust the stack.
    let circle: String =
        (0..20_000).map(|at| format!("FROM scratch AS s{at}\nCOPY --from=s{} a b\n", (at + 1) % 20_000)).collect();
    fails(&circle, &["circular dependency on stage `s0`"]);
    let mut options = Options::new(amd64());
    options.target = Some("buidl".to_owned());
    let file = parser::parse(SourceFile::new("Dockerfile", "FROM scratch AS build\n")).expect("parses");
    let found = lower(&file, &options, &BaseConfigs::new()).expect_err("no such target");
    assert_eq!(found[0].problem.to_string(), "target stage `buidl` could not be found");
    assert_eq!(found[0].problem.help().as_deref(), Some("did you mean `build`?"));
    let file = parser::parse(SourceFile::new("Dockerfile", "FROM scratch AS base\nFROM Base\n")).expect("parses");
    let found = lower(&file, &Options::new(amd64()), &BaseConfigs::new()).expect_err("no such image");
    assert_eq!(found[0].problem.help().as_deref(), Some("did you mean `base`?"));
    // Stages that the target does not need may be wrong, unless all are wanted.
    let file = parser::parse(SourceFile::new("Dockerfile", "FROM scratch\nEXPOSE x\nFROM scratch\n")).expect("parses");
    let mut options = Options::new(amd64());
    assert!(lower(&file, &options, &BaseConfigs::new()).is_ok());
    options.all_stages = true;
    assert!(lower(&file, &options, &BaseConfigs::new()).is_err());
}

#[test]
fn ports() {
    fn check(word: &str, expected: &str) {
        let got = match config::parse_port(word) {
            Ok(ports) => ports.join(" "),
            Err(error) => format!("error: {error}"),
        };
        assert_eq!(got, expected, "{word}");
    }
    check("80", "80/tcp");
    check("80/UDP", "80/udp");
    check("1-3/sctp", "1/sctp 2/sctp 3/sctp");
    check("8080:80", "80/tcp");
    check("127.0.0.1:1-2:80", "80/tcp");
    check("[::1]:8080:80", "80/tcp");
    check("::80", "80/tcp");
    check("65535", "65535/tcp");
    check("65536", "error: invalid port or port range `65536`");
    check("+1", "error: invalid port or port range `+1`");
    check("3-1", "error: invalid port or port range `3-1`");
    check("/tcp", "error: no port given in `/tcp`");
    check("1-2:1-3", "error: port ranges `1-3` and `1-2` differ in length");
    check("x:1:1", "error: invalid IP address `x`");
}

#[test]
fn checks() {
    #[track_caller]
    fn check(text: &str, expected: &[&str]) {
        let (result, _) = lower_all(text, &Options::new(amd64()));
        let (_, warnings) = result.unwrap_or_else(|problems| panic!("{text}\n{problems:?}"));
        let got: Vec<String> = warnings.iter().map(|one| format!("{}: {}", one.rule.name(), one.message)).collect();
        assert_eq!(got, expected, "{text}");
    }
    check("FROM scratch AS Build\nLABEL a=b\n", &["StageNameCasing: stage name `Build` should be lower case"]);
    check("FROM scratch as b\nLABEL a=b\n", &["FromAsCasing: `as` and `FROM` differ in case"]);
    check("from scratch as b\nlabel a=b\n", &[]);
    check(
        "FROM scratch\nlabel a=b\nLABEL c=d\n",
        &["ConsistentInstructionCasing: `label` should be in upper case as most instructions here"],
    );
    check("FROM scratch\nLABEL a=$FOO\n", &["UndefinedVar: variable `$FOO` is not defined"]);
    check(
        "FROM scratch\nENV FOOD=1\nLABEL a=$FOOT b=${X:-d}\n",
        &["UndefinedVar: variable `$FOOT` is not defined (did you mean `$FOOD`?)"],
    );
    check("FROM scratch\nARG A\nLABEL a=$A\n", &[]);
    check(
        "FROM busybox\nCMD x\nCMD [\"y\"]\n",
        &[
            "MultipleInstructionsDisallowed: another CMD of this stage replaces this one",
            "JSONArgsRecommended: CMD in shell form does not pass signals on; use the JSON form, or set SHELL",
        ],
    );
    check("FROM scratch\nENV A b\n", &["LegacyKeyValueFormat: write `ENV key=value` instead of `ENV key value`"]);
    check(
        "FROM busybox\nWORKDIR a\nWORKDIR b\n",
        &["WorkdirRelativePath: WORKDIR `a` is relative to whatever the base image sets"],
    );
    check(
        "FROM scratch\nARG API_KEY\nENV TOKEN_FILE=x\n",
        &["SecretsUsedInArgOrEnv: ARG `API_KEY` looks like a secret, and would stay readable in the image"],
    );
    check(
        "FROM --platform=$TARGETPLATFORM busybox\n",
        &["RedundantTargetPlatform: --platform=$TARGETPLATFORM is the default and can be left out"],
    );
    check(
        "FROM --platform=linux/amd64 busybox\n",
        &["FromPlatformFlagConstDisallowed: --platform is the constant `linux/amd64`"],
    );
    check("FROM --platform=$BUILDPLATFORM busybox\n", &[]);
    check(
        "ARG TAG\nFROM busybox:${TAG:-latest}\nFROM busybox$TAGS\n",
        &["UndefinedArgInFrom: `TAGS` is not declared before the first FROM (did you mean `TAG`?)"],
    );
    check("# check=skip=StageNameCasing,UndefinedVar\nFROM scratch AS B\nLABEL a=$X\n", &[]);
    check("FROM scratch\n# check=skip=UndefinedVar\nLABEL a=$X\n", &[]);
    check(
        "FROM scratch\nEXPOSE 80:80/TCP\n",
        &[
            "ExposeProtoCasing: protocol `TCP` should be lower case",
            "ExposeInvalidFormat: `80:80/TCP` names more than a port of the container; the rest is ignored",
        ],
    );
    check("FROM busybox\nRUN a \\\n\n b\n", &["NoEmptyContinuation: empty line in a continued instruction"]);
    check("FROM busybox\nRUN <<E\n\nE\n", &[]);
    fails(
        "# check=error=true\nFROM scratch AS B\nLABEL a=b\n",
        &["stage name `B` should be lower case (StageNameCasing)"],
    );
}

/// The recorded members of a configuration that say something.
fn recorded_config(config: &ImageConfig) -> Value {
    let names = "Env Cmd Entrypoint User WorkingDir Labels ExposedPorts Volumes StopSignal Healthcheck Shell OnBuild ArgsEscaped";
    let all = serde_json::to_value(&config.config).expect("serialises");
    let mut kept = serde_json::Map::new();
    for name in names.split(' ') {
        if let Some(value) = all.get(name) {
            kept.insert(name.to_owned(), value.clone());
        }
    }
    if let Some(author) = &config.author {
        kept.insert("Author".to_owned(), json!(author));
    }
    Value::Object(kept)
}

/// Compares with what the reference builder recorded: configuration and history, without running anything.
#[test]
fn conformance() {
    let cases = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/conformance/cases");
    let entries = std::fs::read_dir(cases).expect("the cases are part of the repository");
    let mut failures = Vec::new();
    let mut compared = 0;
    for entry in entries {
        let dir = entry.expect("readable directory").path();
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let read = |path: &str| std::fs::read_to_string(dir.join(path));
        let case: Value = serde_json::from_str(&read("case.json").expect("case.json")).expect("JSON");
        let dockerfile = format!("context/{}", case["file"].as_str().unwrap_or("Dockerfile"));
        let Ok(text) = std::fs::read(dir.join(dockerfile)) else { continue };
        let text = String::from_utf8_lossy(&text);
        let (result, _) = lower_all(&text, &case_options(&case));
        let lenient = case.get("lenient").is_some();
        let failure = match (case["expect"].as_str(), result) {
            (Some("ok"), Err(problems)) => Some(format!("refused: {problems:?}")),
            (Some("ok"), Ok((definition, _))) => {
                // File names that are not UTF-8 are recorded with lone surrogates, which JSON does not know.
                let text = read("expected.json").expect("expected.json").replace("\\udc", "\\u00");
                let expected: Value = serde_json::from_str(&text).expect("JSON");
                compare(&expected, &definition.image)
            }
            // Mistakes that only show when steps are run are not found here.
            (_, Ok(_)) => None,
            (_, Err(problems)) => {
                let message = problems.join("\n").to_lowercase();
                let words = case["error"].as_array().cloned().unwrap_or_default();
                let lost = words
                    .iter()
                    .filter_map(Value::as_str)
                    .find(|words| !words.split('|').any(|word| message.contains(&word.to_lowercase())));
                lost.map(|lost| format!("does not name {lost}: {message}"))
            }
        };
        compared += 1;
        if let (Some(failure), false) = (failure, lenient) {
            failures.push(format!("{name}: {failure}"));
        }
    }
    failures.sort();
    assert!(failures.is_empty(), "{} of {compared} cases differ\n{}", failures.len(), failures.join("\n"));
}

fn case_options(case: &Value) -> Options {
    let mut options = Options::new(amd64());
    let strings = |name: &str| case[name].as_object().cloned().unwrap_or_default();
    let layout = |name: &str| {
        NamedContext::Image(ImageSource::OciLayout {
            path: name.to_owned(),
            tag: Some("latest".to_owned()),
            digest: None,
        })
    };
    for name in ["busybox", "envbase", "onbuild-base", "layered", "multi"] {
        options.contexts.insert(name.to_owned(), layout(name));
    }
    for (name, value) in strings("contexts") {
        let value = value.as_str().unwrap_or_default();
        let context = value.strip_prefix("base:").map_or(NamedContext::Local, layout);
        options.contexts.insert(name, context);
    }
    for (name, value) in strings("args") {
        options.build_args.insert(name, value.as_str().map(str::to_owned));
    }
    for (name, value) in strings("labels") {
        options.labels.push((name, value.as_str().unwrap_or_default().to_owned()));
    }
    options.target = case["target"].as_str().map(str::to_owned);
    options.platform = case["platform"].as_str().and_then(|text| platform::parse(text, &amd64()).ok());
    options.source_date_epoch = case["env"]["SOURCE_DATE_EPOCH"].as_str().and_then(|epoch| epoch.parse().ok());
    for flag in case["flags"].as_array().cloned().unwrap_or_default() {
        match flag.as_str() {
            Some("--no-cache") => options.no_cache = true,
            Some("--network=none") => options.network = Network::None,
            Some("--allow=security.insecure") => options.allow_insecure = true,
            Some("--allow=network.host") => options.allow_network_host = true,
            _ => {}
        }
    }
    options
}

fn compare(expected: &Value, image: &Image) -> Option<String> {
    let config = recorded_config(&image.config);
    if config != expected["config"] {
        return Some(format!("config\n  expected {}\n  got      {config}", expected["config"]));
    }
    if image.platform.to_string() != expected["platform"].as_str().unwrap_or_default() {
        return Some(format!("platform {}", image.platform));
    }
    let history = |text: &str, empty: bool| match text.starts_with("local source for ") {
        // The name is that of the recording.
        true => json!(["local source", empty]),
        false => json!([text, empty]),
    };
    let got: Vec<Value> = image
        .config
        .history
        .iter()
        .map(|entry| history(entry.created_by.as_deref().unwrap_or_default(), entry.empty_layer))
        .collect();
    let wanted: Vec<Value> = expected["history"]
        .as_array()
        .cloned()
        .unwrap_or_default()
        .iter()
        .map(|entry| history(entry[0].as_str().unwrap_or_default(), entry[1].as_bool().unwrap_or_default()))
        .collect();
    if got != wanted {
        return Some(format!("history\n  expected {}\n  got      {}", json!(wanted), json!(got)));
    }
    if let Some(created) = expected.get("created")
        && json!(image.config.created) != created[0]
    {
        return Some(format!("created {:?}", image.config.created));
    }
    None
}

#[test]
fn files_that_ask_for_endless_text_are_refused() {
    let problems = |text: String| lower_all(&text, &Options::new(amd64())).0.unwrap_err();
    let doubling = "ENV A=$A$A\n".repeat(60);
    assert!(problems(format!("FROM scratch\nENV A=x\n{doubling}"))[0].contains("too long"));
    assert!(problems(format!("ARG A=x\n{}FROM $A\n", "ARG A=$A$A\n".repeat(60)))[0].contains("too long"));
    // Each alone is short enough; all together are not.
    let long = "x".repeat(100 << 10);
    assert!(problems(format!("FROM scratch\nENV A={long}\n{}", "LABEL a=$A\n".repeat(3000)))[0].contains("too long"));
    assert!(problems(format!("FROM scratch\nENV A={long}\n{}", "RUN x\n".repeat(3000)))[0].contains("too long"));
}

#[test]
fn the_history_of_a_chain_of_stages_is_whole() {
    let mut text = "FROM busybox AS s0\nENV A0=0\n".to_owned();
    for stage in 1..50 {
        text.push_str(&format!("FROM s{} AS s{stage}\nENV A{stage}=$A{}\n", stage - 1, stage - 1));
    }
    let mut options = Options::new(amd64());
    options.target = Some("s40".to_owned());
    options.all_stages = true;
    let image = lower_all(&text, &options).0.unwrap().0.image;
    let history: Vec<&str> = image.config.history.iter().filter_map(|one| one.created_by.as_deref()).collect();
    assert_eq!(history.len(), 1 + 41);
    assert_eq!((history[0], history[1], history[41]), ("base", "ENV A0=0", "ENV A40=0"));
    assert_eq!(image.config.config.env.len(), 1 + 41);
}

/// The text that a mistake marks, and the help: both are what a user looks at first.
#[test]
fn mistakes_mark_the_exact_word() {
    #[track_caller]
    fn check(text: &str, marked: &str, help: &str) {
        let found = match parser::parse(SourceFile::new("Dockerfile", text)) {
            Err(failure) => failure.diagnostics,
            Ok(file) => {
                let only = !file.directives.iter().any(|(name, _)| name == "check");
                let options = Options { check_only: only, ..Options::new(amd64()) };
                lower(&file, &options, &BaseConfigs::new()).expect_err("a mistake")
            }
        };
        let [one] = found.as_slice() else { panic!("{text}\n{found:?}") };
        let span = one.span.expect("a place");
        let got = (&text[span.start..span.end], one.problem.help().unwrap_or_default());
        assert_eq!(got, (marked, help.to_owned()), "{text}");
    }
    check(
        "FROM a\nRUN --mount=type=bind,target=/x,colour=red true\n",
        "colour=red",
        "options are type, target, source, \
           from, id, sharing, required, size, mode, uid, gid, env, readonly and readwrite",
    );
    check("FROM a\nRUN --mount=type=bind,targte=/x true\n", "targte=/x", "did you mean `target`?");
    check("FROM a\nRUN --mount=type=cahce,target=/x true\n", "cahce", "did you mean `cache`?");
    check(
        "FROM a\nRUN --mount=type=cache,target=/mode,mode=rwx true\n",
        "rwx",
        "write an octal number like `mode=0755`",
    );
    check(
        "FROM a\nRUN --mount=type=cache,target=/mode,sharing=some true\n",
        "some",
        "use `shared`, `private` or `locked`",
    );
    check(
        "FROM a\nRUN --mount=type=bind,target=/mode,mode=0700 true\n",
        "mode",
        "mode is for type=cache, type=secret and type=ssh",
    );
    check("FROM a\nRUN --mount=type=bind,target true\n", "target", "write `target=value`");
    check("FROM a\nRUN --mount=type=cache,target=/ true\n", "/", "give the mount a target=, like `target=/path`");
    check(
        "FROM a\nRUN --mount=from=$X,target=/a true\n",
        "$X",
        "give the image a stage of its own, `FROM image AS name`, and write `from=name`",
    );
    check(
        "FROM a AS b\nCOPY --from=c / /\nFROM a AS c\nCOPY --from=b / /\n",
        "b",
        "a stage can only use what does not need it in turn: move the shared part to a stage of its own",
    );
    check(
        "FROM a AS b\nRUN --mount=from=b,target=/b true\n",
        "from=b",
        "a stage can only use what does not need it in turn: move the shared part to a stage of its own",
    );
    check("FROM a\nCOPY --from=3 / /\n", "3", "stages count from 0");
    check("FROM a AS build\nFROM Biuld\n", "Biuld", "did you mean `build`?");
    check("FROM a\nCMD [\"a\", 12 , \"b\"]\n", "12", "put double quotes around every member");
    check("FROM a\nCMD [{\"a\": [1]}]\n", "{\"a\": [1]}", "put double quotes around every member");
    check("FROM a\nADD --checksum=sha256:00 b /\n", "sha256:00", "remove --checksum: it is for what is downloaded");
    check(
        "FROM a\nfoo bar\n",
        "foo",
        "instructions are ADD, ARG, CMD, COPY, ENTRYPOINT, ENV, EXPOSE, FROM, HEALTHCHECK, \
           LABEL, MAINTAINER, ONBUILD, RUN, SHELL, STOPSIGNAL, USER, VOLUME, WORKDIR",
    );
    check(
        "# check=error=true\nFROM scratch AS B\n",
        "B",
        "`# check=skip=StageNameCasing` at the top of the file turns this check \
           off; see https://docs.docker.com/go/dockerfile/rule/stage-name-casing/",
    );
}
