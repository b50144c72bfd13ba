//! Runs a command in the sandbox, on a directory as the only layer, and measures it:
//!
//! ```text
//! sandbox_try LAYER SCRATCH COUNT [--none] [--single] [--insecure] [--uid=N] COMMAND...
//! ```
#![allow(clippy::print_stdout, clippy::print_stderr, clippy::exit)]

use nacre_solver::sandbox::idmap::{self, EnterRequest, Entered};
use nacre_solver::sandbox::{self, Cancel, Net, Ownership, Rootfs, RunSpec, SANDBOX_ARGUMENT, Stream};
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().map(String::as_str) == Some(SANDBOX_ARGUMENT) {
        sandbox::sandbox_main();
    }
    let mut flag = |name: &str| {
        let position = args.iter().position(|arg| arg == name || arg.starts_with(&format!("{name}=")));
        position.map(|index| args.remove(index))
    };
    let (none, single) = (flag("--none").is_some(), flag("--single").is_some());
    let (insecure, probe) = (flag("--insecure").is_some(), flag("--probe").is_some());
    let uid = flag("--uid").and_then(|text| text["--uid=".len()..].parse().ok()).unwrap_or(0);
    if probe {
        println!("{:#?}", sandbox::probe(&PathBuf::from(&args[0]))?);
        return Ok(());
    }
    let request = if single { EnterRequest::SingleId } else { EnterRequest::Best };
    let start = Instant::now();
    match idmap::enter(request) {
        Ok(Entered::Parent { exit_code }) => std::process::exit(exit_code),
        Ok(entered) => eprintln!("{entered:?}, {:?}", idmap::ownership()),
        Err(error) => {
            eprintln!("{error}: {:?}", std::error::Error::source(&error).map(ToString::to_string));
            std::process::exit(1);
        }
    }
    eprintln!("entered after {:?}", start.elapsed());
    let [layer, scratch, count, command @ ..] = &args[..] else { return Err("arguments".into()) };
    let mut times = Vec::new();
    for _ in 0..count.parse()? {
        let dir = tempfile::tempdir_in(scratch)?;
        let sub = |name: &str| -> std::io::Result<PathBuf> {
            std::fs::create_dir(dir.path().join(name)).map(|()| dir.path().join(name))
        };
        let spec = RunSpec {
            rootfs: Rootfs::Overlay { lowers: vec![PathBuf::from(layer)], upper: sub("upper")?, work: sub("work")? },
            mounts: Vec::new(),
            args: command.to_vec(),
            env: vec![("PATH".into(), "/bin:/usr/bin:/sbin:/usr/sbin".into())],
            cwd: "/".into(),
            uid,
            gid: uid,
            groups: Vec::new(),
            hostname: "buildkitsandbox".into(),
            hosts: "127.0.0.1 localhost\n".into(),
            resolv_conf: std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
            network: if none { Net::None } else { Net::Host },
            insecure,
            shm_size_bytes: 64 << 20,
            ulimits: Vec::new(),
            umask: 0o022,
            scratch_dir: sub("scratch")?,
            fake_ownership: idmap::ownership() == Ownership::SingleId,
        };
        let start = Instant::now();
        let outcome = sandbox::run(&spec, &Cancel::new()?, &mut |stream, bytes| {
            _ = match stream {
                Stream::Stdout => std::io::stdout().write_all(bytes),
                Stream::Stderr => std::io::stderr().write_all(bytes),
            };
        });
        times.push(start.elapsed());
        if times.len() == 1 {
            match outcome {
                Ok(outcome) => eprintln!("{outcome:?}"),
                Err(error) => {
                    let source = std::error::Error::source(&error);
                    let deeper = source.and_then(std::error::Error::source);
                    eprintln!("{error}: {:?}: {:?}", source.map(ToString::to_string), deeper.map(ToString::to_string));
                }
            }
        }
    }
    times.sort();
    eprintln!("median {:?}, fastest {:?}", times[times.len() / 2], times[0]);
    Ok(())
}
