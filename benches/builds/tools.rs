//! The builders: how each is given a fresh store, a base image and a build.

use crate::Failure;
use crate::measure::{Sample, timed};
use crate::workloads::{Output, Workload};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A builder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ToolKind {
    Nacre,
    Buildah,
    Docker,
}

impl ToolKind {
    pub(crate) fn parse(name: &str) -> Result<Self, Failure> {
        match name {
            "buildah" => Ok(Self::Buildah),
            "docker" => Ok(Self::Docker),
            _ => Err(format!("no peer `{name}`; there are buildah and docker").into()),
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Nacre => "nacre",
            Self::Buildah => "buildah",
            Self::Docker => "docker",
        }
    }
}

/// A builder with its store.
pub(crate) struct Tool {
    pub(crate) kind: ToolKind,
    nacre: PathBuf,
    /// Where docker is installed, if not in this system's root; everything has the same path there.
    docker_root: Option<PathBuf>,
    /// Image of the store's file system, where it is mounted, and where outputs go.
    image: PathBuf,
    store: PathBuf,
    out: PathBuf,
    mounted: bool,
    daemon: Option<Child>,
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// What docker in a root of its own needs there: the kernel's file systems, and the benchmark's directory at the same path.
pub(crate) struct RootMounts(Vec<PathBuf>);

impl RootMounts {
    pub(crate) fn new(root: &Path, scratch: &Path) -> Result<Self, Failure> {
        let mut mounts = Self(Vec::new());
        let mut mount = |from: &Path, at: PathBuf, kind: &str| -> Result<(), Failure> {
            fs::create_dir_all(&at)?;
            run(Command::new("mount").arg("--rbind").arg(from).arg(&at))?;
            mounts.0.push(at.clone());
            run(Command::new("mount").arg(kind).arg(&at))
        };
        // runc wants the root to be a mount.
        mount(root, root.to_owned(), "--make-rprivate")?;
        // Shared, so that a store's file system that is mounted later appears on both sides.
        mount(scratch, scratch.to_owned(), "--make-rshared")?;
        mount(scratch, root.join(scratch.strip_prefix("/")?), "--make-rshared")?;
        for name in ["proc", "sys", "dev"] {
            mount(&Path::new("/").join(name), root.join(name), "--make-rslave")?;
        }
        Ok(mounts)
    }
}

impl Drop for RootMounts {
    fn drop(&mut self) {
        for target in self.0.iter().rev() {
            let _ = run(Command::new("umount").arg("-R").arg("-l").arg(target));
        }
    }
}

/// Runs a command that must succeed.
fn run(command: &mut Command) -> Result<(), Failure> {
    let output = command.stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)).into())
}

fn read_all(directory: &Path) -> Result<(), Failure> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        match entry.file_type()? {
            kind if kind.is_dir() => read_all(&entry.path())?,
            kind if kind.is_file() => drop(std::io::copy(&mut fs::File::open(entry.path())?, &mut std::io::sink())?),
            _ => {}
        }
    }
    Ok(())
}

impl Tool {
    pub(crate) fn new(
        kind: ToolKind,
        nacre: &Path,
        docker_root: Option<&Path>,
        scratch: &Path,
    ) -> Result<Self, Failure> {
        let own = scratch.join(format!("tool-{}", kind.name()));
        let (store, out) = (own.join("store"), own.join("out"));
        fs::create_dir_all(&store)?;
        fs::create_dir(&out)?;
        let image = own.join("store.img");
        let docker_root = docker_root.map(Path::to_owned);
        Ok(Self { kind, nacre: nacre.to_owned(), docker_root, image, store, out, mounted: false, daemon: None })
    }

    pub(crate) fn has_own_file_system(&self) -> bool {
        is_root()
    }

    /// Gives the tool an empty store with the workload's base image.
    pub(crate) fn fresh(&mut self, workload: &Workload) -> Result<(), Failure> {
        self.stop();
        if is_root() {
            let _ = fs::remove_file(&self.image);
            fs::File::create(&self.image)?.set_len(16 << 30)?;
            run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&self.image))?;
            run(Command::new("mount").args(["-o", "loop"]).arg(&self.image).arg(&self.store))?;
            self.mounted = true;
        } else {
            run(Command::new("rm").arg("-rf").arg(&self.store))?;
            fs::create_dir(&self.store)?;
        }
        if self.kind == ToolKind::Docker {
            self.start_daemon()?;
        }
        if let Some(base) = &workload.base {
            let context = self.out.join("base");
            let _ = fs::remove_dir_all(&context);
            fs::create_dir_all(&context)?;
            base.generate(&context)?;
            run(&mut self.command(&context, "bench-base", None))?;
            // docker has it unpacked now; nacre does that when the first step runs on it.
            let context = self.out.join("on-base");
            let _ = fs::remove_dir_all(&context);
            fs::create_dir_all(&context)?;
            fs::write(context.join("Dockerfile"), "FROM bench-base\nRUN true\n")?;
            let mut command = self.command(&context, "bench-used", None);
            run(&mut command)?;
        }
        Ok(())
    }

    fn start_daemon(&mut self) -> Result<(), Failure> {
        let log = fs::File::create(self.out.join("daemon.log"))?;
        let mut command = self.docker_program("dockerd");
        command.arg("--data-root").arg(self.store.join("data")).arg("--exec-root").arg(self.out.join("exec"));
        command.arg("--pidfile").arg(self.out.join("daemon.pid")).arg("-H").arg(self.socket());
        command.args(["--iptables=false", "--ip6tables=false", "--bridge=none", "--ip-forward=false"]);
        if self.docker_root.is_some() {
            // The exporters of archives need it.
            command.args(["--feature", "containerd-snapshotter=true"]);
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .map_err(|error| format!("dockerd: {error}"))?;
        self.daemon = Some(child);
        let started = Instant::now();
        loop {
            if run(self.docker().arg("info")).is_ok() {
                return Ok(());
            }
            if started.elapsed() > Duration::from_secs(30) {
                return Err(fs::read_to_string(self.out.join("daemon.log"))?.into());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// A program of docker's.
    fn docker_program(&self, program: &str) -> Command {
        match &self.docker_root {
            Some(root) => {
                let mut command = Command::new("chroot");
                command.arg(root).arg(program);
                command
            }
            // Debian's, should another be in front of it on the path.
            None => Command::new(Path::new(if program == "dockerd" { "/usr/sbin" } else { "/usr/bin" }).join(program)),
        }
    }

    fn socket(&self) -> String {
        format!("unix://{}", self.out.join("docker.sock").display())
    }

    /// Ends the daemon and takes the store's file system away; the next build needs [`Self::fresh`].
    pub(crate) fn stop(&mut self) {
        if let Some(mut child) = self.daemon.take() {
            let pid = rustix::process::Pid::from_child(&child);
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            let _ = child.wait();
        }
        if self.mounted {
            // What a tool left mounted below goes with it.
            let _ = run(Command::new("umount").arg("-R").arg(&self.store));
            self.mounted = false;
            let _ = fs::remove_file(&self.image);
        }
    }

    /// The command that builds `context` under a name.
    fn command(&self, context: &Path, name: &str, archive: Option<(&Path, &'static str)>) -> Command {
        match self.kind {
            ToolKind::Nacre => {
                let mut command = Command::new(&self.nacre);
                command.args(["build", "-q", "--store"]).arg(self.store.join("nacre"));
                match archive {
                    Some((path, codec)) => {
                        command.arg("-o").arg(format!("type=oci,dest={},compression={codec}", path.display()))
                    }
                    None => command.args(["-t", name]),
                };
                command.arg(context);
                command
            }
            ToolKind::Buildah => {
                let mut command = self.buildah();
                command.args(["build", "-q", "--layers", "--pull=never", "--network=host", "-t", name]).arg(context);
                command
            }
            ToolKind::Docker => {
                let mut command = self.docker();
                command.env("DOCKER_BUILDKIT", "1").args(["build", "-q", "--network=host"]);
                match archive {
                    Some((path, codec)) if self.docker_root.is_some() => {
                        command.args(["--provenance=false", "-o"]);
                        command.arg(format!("type=oci,dest={},compression={codec}", path.display()))
                    }
                    _ => command.args(["-t", name]),
                };
                command.arg(context);
                command
            }
        }
    }

    pub(crate) fn buildah(&self) -> Command {
        let mut command = Command::new("buildah");
        command.arg("--root").arg(self.store.join("root")).arg("--runroot").arg(self.store.join("run"));
        command.args(["--storage-driver", "overlay"]);
        command
    }

    /// nacre, on the tool's store.
    pub(crate) fn nacre(&self) -> Command {
        let mut command = Command::new(&self.nacre);
        command.env("NACRE_STORE", self.store.join("nacre"));
        command
    }

    /// docker's client, for the tool's daemon.
    pub(crate) fn docker(&self) -> Command {
        let mut command = self.docker_program("docker");
        command.arg("-H").arg(self.socket());
        command
    }

    /// The daemon's process.
    pub(crate) fn daemon_id(&self) -> Option<u32> {
        self.daemon.as_ref().map(Child::id)
    }

    /// One timed build; `None` when the tool cannot do it.
    pub(crate) fn build(&mut self, workload: &Workload, context: &Path) -> Result<Option<Sample>, Failure> {
        let archive = self.out.join("image.tar");
        let _ = fs::remove_file(&archive);
        let codec = match workload.output {
            Output::Store => None,
            Output::Gzip => Some("gzip"),
            Output::Zstd => Some("zstd"),
        };
        let mut commands = vec![self.command(context, "bench", codec.map(|codec| (archive.as_path(), codec)))];
        match (self.kind, codec) {
            (ToolKind::Buildah, Some(codec)) => {
                let mut push = self.buildah();
                push.args(["push", "-q", "--compression-format", codec, "bench"]);
                push.arg(format!("oci-archive:{}", archive.display()));
                commands.push(push);
            }
            // It writes archives without compression only.
            (ToolKind::Docker, Some(_)) if self.docker_root.is_some() => {}
            (ToolKind::Docker, Some("gzip")) => {
                let mut save = Command::new("sh");
                let (socket, archive) = (self.socket(), archive.display());
                save.arg("-c").arg(format!("/usr/bin/docker -H {socket} save bench | gzip > {archive}"));
                commands.push(save);
            }
            (ToolKind::Docker, Some(_)) => return Ok(None),
            _ => {}
        }
        // Nobody's build is to wait until what others left behind, or the base, is on the disk; and everybody finds the files
        // in memory, as after a checkout. Whoever comes after a long build of another would not.
        rustix::fs::sync();
        read_all(context)?;
        let daemon = self.daemon.as_ref().map(Child::id);
        let mut sample = timed(&mut commands, daemon)?;
        sample.output_bytes = fs::metadata(&archive).map(|metadata| metadata.len()).unwrap_or(0);
        Ok(Some(sample))
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        self.stop();
    }
}
