//! The Node service of every tutorial.

use crate::bases;
use crate::build::{Scratch, is_root, nacre, sh, unpack};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const DOCKERFILE: &str = "\
FROM node
WORKDIR /usr/src/app
COPY package*.json ./
RUN npm install
COPY . .
EXPOSE 3000
CMD [\"npm\", \"start\"]
";

fn service(scratch: &Scratch, greeting: &str) {
    scratch
        .file("app/Dockerfile", DOCKERFILE)
        .file("app/.dockerignore", "node_modules\n*.log\n")
        .file(
            "app/package.json",
            r#"{"name":"service","version":"1.0.0","scripts":{"start":"node server.js"},"dependencies":{"express":"^4.18.2"}}"#,
        )
        .file(
            "app/server.js",
            &format!(
                "const express = require('express');\nconst app = express();\n\
                 app.get('/', (request, response) => response.send('{greeting}'));\n\
                 app.listen(process.env.PORT || 3000, '127.0.0.1');\n"
            ),
        )
        .file("app/node_modules/left-over/index.js", "throw new Error('must not be copied')\n");
}

#[test]
fn a_node_service_is_built_run_and_built_again() {
    let scratch = Scratch::new("node");
    service(&scratch, "hello from the first build");
    let build = |layout: &str| {
        let output = format!("type=oci,dest={},tar=false,name=service:1", scratch.path(layout).display());
        nacre(&scratch.path("store"))
            .args(["--build-context", &format!("node={}", bases::node())])
            .args(["--output", &output])
            .arg(scratch.path("app"))
            .succeeds()
    };
    build("first").ran("COPY package*.json").ran("RUN npm install").ran("COPY . .");
    let rootfs = unpack(&scratch.path("first"), "1", &scratch.path("bundle1"));
    assert!(rootfs.join("usr/src/app/node_modules/express/package.json").exists());
    assert!(!rootfs.join("usr/src/app/node_modules/left-over").exists(), ".dockerignore keeps it out");
    assert_answers(&scratch.path("bundle1"), "hello from the first build");

    build("again").all_cached().cached("RUN npm install");
    assert_eq!(layers(&scratch.path("first")), layers(&scratch.path("again")));

    service(&scratch, "hello from the second build");
    let second = build("second");
    second.cached("COPY package*.json").cached("RUN npm install").ran("COPY . .");
    assert!(second.progress.contains("server.js changed"), "the reason is told:\n{}", second.progress);
    let (before, after) = (layers(&scratch.path("first")), layers(&scratch.path("second")));
    assert_eq!(before[..before.len() - 1], after[..after.len() - 1], "only the last layer is new");
    assert_ne!(before.last(), after.last());
    unpack(&scratch.path("second"), "1", &scratch.path("bundle2"));
    assert_answers(&scratch.path("bundle2"), "hello from the second build");
}

/// Layer digests of the image in a layout, by skopeo.
fn layers(layout: &Path) -> Vec<String> {
    let text = sh(&["skopeo", "inspect", &format!("oci:{}:1", layout.display())]);
    let image: serde_json::Value = serde_json::from_str(&text).expect("skopeo prints JSON");
    let layers = image["Layers"].as_array().expect("the image has layers");
    layers.iter().map(|layer| layer.as_str().unwrap_or_default().to_owned()).collect()
}

struct Service(Child, String);

impl Drop for Service {
    fn drop(&mut self) {
        if is_root() {
            let _ = Command::new("runc").args(["delete", "--force", &self.1]).output();
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts the service and asks it. Root runs the bundle with runc; an ordinary user, who may lack what runc wants of
/// control groups, runs the same files in a namespace of his own.
fn assert_answers(bundle: &Path, expected: &str) {
    let port =
        std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port").port();
    let name = format!("nacre-test-{}-{port}", std::process::id());
    let mut command = if is_root() {
        let file = bundle.join("config.json");
        let text = std::fs::read_to_string(&file).expect("umoci wrote it");
        let mut config: serde_json::Value = serde_json::from_str(&text).expect("umoci writes JSON");
        config["process"]["terminal"] = false.into();
        let env = config["process"]["env"].as_array_mut().expect("the image has an environment");
        env.push(format!("PORT={port}").into());
        // The host's network, so that curl reaches it.
        let namespaces = config["linux"]["namespaces"].as_array_mut().expect("umoci asks for namespaces");
        namespaces.retain(|namespace| namespace["type"] != "network");
        std::fs::write(&file, config.to_string()).expect("the bundle is ours");
        let mut command = Command::new("runc");
        command.args(["run", "--bundle"]).arg(bundle).arg(&name);
        command
    } else {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--kill-child", "--root"]).arg(bundle.join("rootfs"));
        command.args(["--wd", "/usr/src/app", "--pid", "--fork", "npm", "start"]).env("PORT", port.to_string());
        command
    };
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("the service can be started");
    let service = Service(child, name);
    let until = Instant::now() + Duration::from_secs(60);
    let url = format!("http://127.0.0.1:{port}/");
    loop {
        let answer = Command::new("curl").args(["-s", "--max-time", "5", &url]).output().expect("curl is installed");
        if answer.status.success() {
            assert_eq!(String::from_utf8_lossy(&answer.stdout), expected);
            break;
        }
        assert!(Instant::now() < until, "the service does not answer");
        std::thread::sleep(Duration::from_millis(200));
    }
    drop(service);
}
