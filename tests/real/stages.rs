//! A program built in stages: a front end with npm, a compiler, and a small image that holds neither.

use crate::bases;
use crate::build::{Scratch, nacre, unpack};

const DOCKERFILE: &str = r#"
FROM node AS web
WORKDIR /web
COPY web/package.json .
RUN npm install
COPY web/ .
RUN date +%s%N > /start && node_modules/.bin/uglifyjs app.js -c -m -o app.min.js && sleep 2 && date +%s%N > /end

FROM debian AS compiler
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev
WORKDIR /src
COPY main.c .
RUN gcc -static -O2 -o server main.c

FROM node AS other
RUN date +%s%N > /start && sleep 2 && date +%s%N > /end

FROM busybox
COPY --from=compiler /src/server /server
COPY --from=web /web/app.min.js /www/app.js
COPY --from=web /start /end /times/web/
COPY --from=other /start /end /times/other/
USER nobody:nobody
CMD ["/server"]
"#;

#[test]
fn the_last_stage_holds_results_and_no_tools() {
    let scratch = Scratch::new("stages");
    scratch
        .file("app/Dockerfile", DOCKERFILE)
        .file("app/main.c", "#include <stdio.h>\nint main(void) { puts(\"compiled\"); return 0; }\n")
        .file("app/web/package.json", r#"{"name":"web","version":"1.0.0","dependencies":{"uglify-js":"3.17.4"}}"#)
        .file(
            "app/web/app.js",
            "function longName(parameter) { return parameter + 1 + 2 }\nconsole.log(longName(1))\n",
        );
    let output = format!("type=oci,dest={},tar=false,name=app:1", scratch.path("layout").display());
    let build = || {
        nacre(&scratch.path("store"))
            .args(["--build-context", &format!("node={}", bases::node())])
            .args(["--build-context", &format!("debian={}", bases::debian())])
            .args(["--build-context", &format!("busybox={}", bases::busybox())])
            .args(["--output", &output])
            .arg(scratch.path("app"))
            .succeeds()
    };
    build();
    let rootfs = unpack(&scratch.path("layout"), "1", &scratch.path("bundle"));
    let compiled = std::process::Command::new(rootfs.join("server")).output().expect("it is static");
    assert_eq!(String::from_utf8_lossy(&compiled.stdout), "compiled\n");
    assert!(std::fs::read_to_string(rootfs.join("www/app.js")).is_ok_and(|text| !text.contains("parameter")));
    for tool in ["usr/bin/gcc", "usr/bin/node", "usr/bin/npm", "usr/bin/apt-get", "usr/lib/gcc"] {
        assert!(!rootfs.join(tool).exists(), "{tool} is not in the last stage");
    }
    let time = |stage: &str, name: &str| -> u128 {
        let path = rootfs.join("times").join(stage).join(name);
        std::fs::read_to_string(path).expect("the stage wrote it").trim().parse().expect("a number")
    };
    assert!(time("other", "start") < time("web", "end"), "stages that do not need each other do not wait");
    let config = std::fs::read_to_string(scratch.path("bundle").join("config.json")).expect("umoci wrote it");
    let config: serde_json::Value = serde_json::from_str(&config).expect("umoci writes JSON");
    assert_eq!(config["process"]["user"]["uid"], 65534);
    build().all_cached();
}
