//! Programs of other processors: is there an emulator, and if not, can we have the kernel use one?
//!
//! The kernel starts foreign programs with an interpreter that is registered in binfmt_misc (kernel documentation,
//! admin-guide/binfmt-misc.rst). Whether one is can only be told for sure by starting one: a program of a few bytes that
//! exits, inside of the sandbox, where the interpreter of a registration without the flag `F` is not found.
//!
//! Since Linux 6.7 a user namespace may have a binfmt_misc of its own. It is mounted without being put anywhere, an emulator is
//! registered in it, and it ends with the descriptor: nobody else on the machine sees it, and root is not needed. It
//! hides the registrations of the namespace around it, so it is only made when those are not enough, and never in a
//! namespace that is not ours.

use super::emulation::{Emulation, Scope};
use super::{Cancel, Net, Rootfs, RunSpec, SandboxError, Status};
use crate::sys::{self, Call, CallError};
use nacre_frontend::llb::Platform;
use nacre_frontend::platform;
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::mount::MountAttrFlags;
use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

/// Where Debian has names of its emulators under which they keep the first argument as it was.
pub const DEBIAN_DIRECTORY: &str = "/usr/libexec/qemu-binfmt";

/// Programs of this platform cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum EmulatorError {
    /// No emulator.
    #[error("this machine cannot run programs for {platform}, and there is no emulator `{program}`")]
    NoEmulator {
        /// For what.
        platform: Platform,
        /// What was looked for.
        program: String,
    },
    /// There is one, and the kernel does not take it.
    #[error("this machine cannot run programs for {platform}, and {} cannot be registered", program.display())]
    Refused {
        /// For what.
        platform: Platform,
        /// The emulator.
        program: PathBuf,
        /// The call.
        source: CallError,
    },
    /// It was registered and does not run.
    #[error("this machine cannot run programs for {platform}: {} fails", program.display())]
    Broken {
        /// For what.
        platform: Platform,
        /// The emulator.
        program: PathBuf,
    },
    /// Nothing is known of the architecture.
    #[error("this machine cannot run programs for {0}")]
    Unknown(Platform),
    /// It could not be tried.
    #[error("cannot find out whether programs for {platform} run here")]
    Try {
        /// For what.
        platform: Platform,
        /// Why.
        source: Box<SandboxError>,
    },
    /// Its file could not be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl EmulatorError {
    /// A way out, one sentence.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::NoEmulator { .. } => Some(
                "install one (Debian: apt-get install qemu-user-static), or let the stage run on this machine: \
                 FROM --platform=$BUILDPLATFORM"
                    .to_owned(),
            ),
            Self::Refused { .. } => Some(
                "Linux 6.7 lets everybody register emulators; before, root must do it: apt-get install \
                 qemu-user-static binfmt-support"
                    .to_owned(),
            ),
            _ => None,
        }
    }
}

/// A processor: how its programs look, and one that does nothing but exit with 0.
struct Processor {
    /// As in platforms.
    architecture: &'static str,
    /// As in names of emulators.
    qemu: &'static str,
    bits: u8,
    little_endian: bool,
    /// `e_machine` (elf.h).
    machine: u16,
    /// `e_flags`.
    flags: u32,
    /// exit(0), in the order of memory.
    code: &'static [u8],
}

const PROCESSORS: [Processor; 7] = [
    Processor {
        architecture: "amd64",
        qemu: "x86_64",
        bits: 64,
        little_endian: true,
        machine: 62,
        flags: 0,
        // mov eax, 60; xor edi, edi; syscall
        code: &[0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05],
    },
    Processor {
        architecture: "386",
        qemu: "i386",
        bits: 32,
        little_endian: true,
        machine: 3,
        flags: 0,
        // mov eax, 1; xor ebx, ebx; int 0x80
        code: &[0xb8, 1, 0, 0, 0, 0x31, 0xdb, 0xcd, 0x80],
    },
    Processor {
        architecture: "arm64",
        qemu: "aarch64",
        bits: 64,
        little_endian: true,
        machine: 183,
        flags: 0,
        // mov x0, 0; mov x8, 93; svc 0
        code: &[0, 0, 0x80, 0xd2, 0xa8, 0x0b, 0x80, 0xd2, 1, 0, 0, 0xd4],
    },
    Processor {
        architecture: "arm",
        qemu: "arm",
        bits: 32,
        little_endian: true,
        machine: 40,
        flags: 0x0500_0000,
        // mov r0, 0; mov r7, 1; svc 0
        code: &[0, 0, 0xa0, 0xe3, 1, 0x70, 0xa0, 0xe3, 0, 0, 0, 0xef],
    },
    Processor {
        architecture: "riscv64",
        qemu: "riscv64",
        bits: 64,
        little_endian: true,
        machine: 243,
        flags: 0,
        // li a0, 0; li a7, 93; ecall
        code: &[0x13, 5, 0, 0, 0x93, 8, 0xd0, 5, 0x73, 0, 0, 0],
    },
    Processor {
        architecture: "ppc64le",
        qemu: "ppc64le",
        bits: 64,
        little_endian: true,
        machine: 21,
        flags: 2,
        // li r0, 1; li r3, 0; sc
        code: &[1, 0, 0, 0x38, 0, 0, 0x60, 0x38, 2, 0, 0, 0x44],
    },
    Processor {
        architecture: "s390x",
        qemu: "s390x",
        bits: 64,
        little_endian: false,
        machine: 22,
        flags: 0,
        // lghi r2, 0; svc 1
        code: &[0xa7, 0x29, 0, 0, 0x0a, 1],
    },
];

impl Processor {
    fn of(platform: &Platform) -> Option<&'static Processor> {
        PROCESSORS.iter().find(|processor| platform.os == "linux" && processor.architecture == platform.architecture)
    }

    /// The first bytes of its programs.
    fn magic(&self) -> Vec<u8> {
        let mut magic = vec![0x7f, b'E', b'L', b'F', if self.bits == 64 { 2 } else { 1 }];
        magic.extend([if self.little_endian { 1 } else { 2 }, 1, 0]);
        magic.extend([0; 8]);
        magic.extend(self.bytes(2, 2));
        magic.extend(self.bytes(self.machine.into(), 2));
        magic
    }

    /// What of them counts: the operating system's byte does not, and position-independent programs have the type 3.
    fn mask(&self) -> Vec<u8> {
        let mut mask = vec![0xff; 20];
        mask[7] = 0;
        mask[if self.little_endian { 16 } else { 17 }] = 0xfe;
        mask
    }

    /// A number in its byte order.
    fn bytes(&self, value: u64, count: usize) -> Vec<u8> {
        match self.little_endian {
            true => value.to_le_bytes()[..count].to_vec(),
            false => value.to_be_bytes()[8 - count..].to_vec(),
        }
    }

    /// A whole program that exits with 0 (elf(5)): both headers and the code, loaded as they are in the file.
    fn program(&self) -> Vec<u8> {
        const ADDRESS: u64 = 0x1_0000;
        let wide = self.bits == 64;
        let word = if wide { 8 } else { 4 };
        let (header, segment) = if wide { (64, 56) } else { (52, 32) };
        let size = header + segment + self.code.len() as u64;
        let mut program = self.magic();
        program.extend(self.bytes(1, 4));
        for value in [ADDRESS + header + segment, header, 0] {
            program.extend(self.bytes(value, word));
        }
        program.extend(self.bytes(self.flags.into(), 4));
        for value in [header, segment, 1, 0, 0, 0] {
            program.extend(self.bytes(value, 2));
        }
        let (load, read_and_execute) = (1, 5);
        program.extend(self.bytes(load, 4));
        if wide {
            program.extend(self.bytes(read_and_execute, 4));
        }
        for value in [0, ADDRESS, ADDRESS, size, size] {
            program.extend(self.bytes(value, word));
        }
        if !wide {
            program.extend(self.bytes(read_and_execute, 4));
        }
        program.extend(self.bytes(0x1000, word));
        program.extend(self.code);
        program
    }

    /// The line that registers an interpreter. `F` opens it now, so that it need not be in the step's file system; `C`
    /// lets set-uid programs be what they are; `P` tells the interpreter the first argument.
    fn registration(&self, interpreter: &Path, keeps_name: bool) -> Vec<u8> {
        let escaped = |bytes: Vec<u8>| bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect::<String>();
        let flags = if keeps_name { "POCF" } else { "OCF" };
        let (magic, mask) = (escaped(self.magic()), escaped(self.mask()));
        let mut line = format!(":nacre-{}:M::{magic}:{mask}:", self.qemu).into_bytes();
        line.extend(std::os::unix::ffi::OsStrExt::as_bytes(interpreter.as_os_str()));
        line.extend(format!(":{flags}").into_bytes());
        line
    }
}

/// Emulators for the steps of a build. Clones share what is known.
#[derive(Debug, Clone, Default)]
pub struct Emulators(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Where emulators may be.
    directories: Vec<PathBuf>,
    /// The user namespace was made for this build.
    own_namespace: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Architectures whose programs run.
    known: BTreeSet<&'static str>,
    /// A binfmt_misc of our own: the mount and whoever looks after it live as long as this.
    own: Option<OwnedFd>,
}

impl Emulators {
    /// Emulators are looked for in `directories`. With `own_namespace`, this process lives in a user namespace that was
    /// made for it.
    pub fn new(directories: Vec<PathBuf>, own_namespace: bool) -> Self {
        Self(Arc::new(Inner { directories, own_namespace, state: Mutex::default() }))
    }

    /// Makes sure that steps for a platform can run. `scratch` is an empty directory for trying.
    pub fn ensure(&self, platform: &Platform, scratch: &Path, cancel: &Cancel) -> Result<(), EmulatorError> {
        let unknown = || EmulatorError::Unknown(platform.clone());
        let processor = Processor::of(platform).ok_or_else(unknown)?;
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.known.contains(processor.architecture) {
            return Ok(());
        }
        if !runs_in_sandbox(processor, platform, scratch, cancel)? {
            let program = self.register(processor, platform, &mut state)?;
            if !runs_in_sandbox(processor, platform, scratch, cancel)? {
                return Err(EmulatorError::Broken { platform: platform.clone(), program });
            }
        }
        state.known.insert(processor.architecture);
        Ok(())
    }

    fn register(
        &self,
        processor: &Processor,
        platform: &Platform,
        state: &mut State,
    ) -> Result<PathBuf, EmulatorError> {
        let (program, keeps_name) = self.find(processor).ok_or_else(|| EmulatorError::NoEmulator {
            platform: platform.clone(),
            program: format!("qemu-{}-static", processor.qemu),
        })?;
        let refused = |source| EmulatorError::Refused { platform: platform.clone(), program: program.clone(), source };
        if !self.0.own_namespace {
            let source = io::Error::from(io::ErrorKind::PermissionDenied);
            return Err(refused(CallError::new("mount(\"binfmt_misc\")", source)));
        }
        if state.own.is_none() {
            state.own = Some(sys::make_mount("binfmt_misc", &[], MountAttrFlags::empty()).map_err(refused)?);
        }
        let Some(own) = &state.own else { return Ok(program) };
        let write = || -> sys::Result<()> {
            let describe = || format!("write(\"binfmt_misc/register\", {})", program.display());
            let flags = OFlags::WRONLY | OFlags::CLOEXEC;
            let file = rustix::fs::openat(own, "register", flags, Mode::empty()).call(describe)?;
            rustix::io::write(file, &processor.registration(&program, keeps_name)).call(describe).map(drop)
        };
        write().map_err(refused)?;
        Ok(program)
    }

    /// An emulator that needs no libraries, and whether it wants to be told the first argument.
    fn find(&self, processor: &Processor) -> Option<(PathBuf, bool)> {
        let names = ["-binfmt-P", "qemu--static", "qemu-"].map(|pattern| match pattern.strip_prefix("qemu-") {
            Some(end) => (format!("qemu-{}{end}", processor.qemu), false),
            None => (format!("{}{pattern}", processor.qemu), true),
        });
        let named = |(name, keeps): &(String, bool)| {
            let found = self.0.directories.iter().map(|directory| directory.join(name)).find(|path| is_static(path));
            found.map(|path| (path, *keeps))
        };
        names.iter().find_map(named)
    }
}

/// Is this a program without an interpreter of its own? One that needs libraries would not find them in the step.
fn is_static(path: &Path) -> bool {
    const INTERPRETER: u32 = 3;
    let mut head = vec![0; 4096];
    let length = std::fs::File::open(path).and_then(|mut file| file.read(&mut head)).unwrap_or(0);
    let head = &head[..length];
    let number = |at: usize, count: usize| -> Option<usize> {
        let bytes = head.get(at..at + count)?;
        // Ours only: an emulator for this machine has this machine's byte order.
        let value = if cfg!(target_endian = "little") {
            bytes.iter().rev().fold(0usize, |value, &byte| value << 8 | usize::from(byte))
        } else {
            bytes.iter().fold(0usize, |value, &byte| value << 8 | usize::from(byte))
        };
        Some(value)
    };
    if !head.starts_with(b"\x7fELF\x02") {
        return false;
    }
    let headers = || Some((number(32, 8)?, number(54, 2)?, number(56, 2)?));
    let Some((start, size, count)) = headers() else { return false };
    (0..count).all(|at| number(start.saturating_add(at * size), 4).is_some_and(|kind| kind != INTERPRETER as usize))
}

/// Is the platform that of this machine, so that its programs need nothing?
pub fn is_native(platform: &Platform) -> bool {
    platform.architecture == platform::host().architecture && platform.os == "linux"
}

/// Do programs of this platform run when they are simply started? Registrations that steps cannot use count, too.
pub fn runs(platform: &Platform, scratch: &Path) -> bool {
    let Some(processor) = Processor::of(platform) else { return false };
    let path = scratch.join(format!("probe-{}", processor.architecture));
    if write_program(processor, &path).is_err() {
        return false;
    }
    let mut command = Command::new(&path);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let runs = command.status().is_ok_and(|status| status.success());
    let _ = std::fs::remove_file(path);
    runs
}

fn write_program(processor: &Processor, path: &Path) -> io::Result<()> {
    let mut file = std::fs::File::options().write(true).create_new(true).mode(0o755).open(path)?;
    file.write_all(&processor.program())
}

fn runs_in_sandbox(
    processor: &Processor,
    platform: &Platform,
    scratch: &Path,
    cancel: &Cancel,
) -> Result<bool, EmulatorError> {
    let (root, files) = (scratch.join("root"), scratch.join("files"));
    let written =
        std::fs::create_dir_all(&root).and_then(|()| std::fs::create_dir_all(&files)).and_then(|()| {
            match root.join("probe").exists() {
                true => Ok(()),
                false => write_program(processor, &root.join("probe")),
            }
        });
    written.map_err(|source| EmulatorError::Write { path: root.clone(), source })?;
    let single_id = super::idmap::ownership() == super::Ownership::SingleId;
    let spec = RunSpec {
        isolation: super::Isolation::Namespaces,
        group: None,
        rootfs: Rootfs::Plain { dir: root },
        mounts: Vec::new(),
        args: vec!["/probe".to_owned()],
        env: Vec::new(),
        cwd: "/".to_owned(),
        uid: 0,
        gid: 0,
        groups: Vec::new(),
        hostname: "probe".to_owned(),
        hosts: String::new(),
        resolv_conf: String::new(),
        network: Net::Host,
        insecure: false,
        shm_size_bytes: 1 << 20,
        ulimits: Vec::new(),
        umask: 0o022,
        scratch_dir: files,
        emulation: single_id.then(|| Emulation {
            scope: Scope::SingleId,
            lower: None,
            known: None,
            result: scratch.join("owners"),
        }),
    };
    match super::run(&spec, cancel, &mut |_, _| {}) {
        Ok(outcome) => Ok(outcome.status == Status::Exit(0)),
        Err(source) => Err(EmulatorError::Try { platform: platform.clone(), source: Box::new(source) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registrations_are_those_of_debian() {
        let dir = Path::new("/usr/lib/binfmt.d");
        for processor in PROCESSORS.iter().filter(|processor| !matches!(processor.architecture, "amd64" | "386")) {
            let path = dir.join(format!("qemu-{}.conf", processor.qemu));
            let text = std::fs::read_to_string(&path).expect("qemu-user-static is installed; make test installs it");
            let fields = |text: &str| text.trim().split(':').map(str::to_owned).collect::<Vec<_>>();
            let (theirs, own) =
                (fields(&text), fields(&String::from_utf8_lossy(&processor.registration(Path::new("/x"), true))));
            let numbers = |text: &str| -> Vec<u8> {
                let hex = |part: &str| u8::from_str_radix(&part[..2], 16).expect("hex digits");
                text.split("\\x").skip(1).map(hex).collect()
            };
            assert_eq!(numbers(&own[4]), numbers(&theirs[4]), "magic of {}", processor.architecture);
            // Theirs look at a part of the operating system's byte, and for ppc64le at half of the machine's number.
            for (at, (own, theirs)) in numbers(&own[5]).iter().zip(numbers(&theirs[5])).enumerate() {
                let quirk = at == 7 || at == 19 && processor.architecture == "ppc64le";
                assert!(quirk || *own == theirs, "mask of {} at {at}", processor.architecture);
            }
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let arm64 = Platform { os: "linux".into(), architecture: "arm64".into(), variant: String::new() };
        let processor = Processor::of(&arm64).unwrap();
        let register =
            |emulators: &Emulators| emulators.register(processor, &arm64, &mut State::default()).unwrap_err();
        let missing = register(&Emulators::new(vec!["/etc".into()], true));
        assert!(missing.to_string().contains("linux/arm64") && missing.to_string().contains("`qemu-aarch64-static`"));
        assert!(missing.help().is_some_and(|help| help.contains("apt-get install qemu-user-static")));
        let refused = register(&Emulators::new(vec!["/usr/bin".into()], false));
        assert!(refused.to_string().contains("/usr/bin/qemu-aarch64-static cannot be registered"), "{refused}");
        assert!(refused.help().is_some_and(|help| help.contains("binfmt-support")));
        let emulators = Emulators::new(vec!["/usr/bin".into(), DEBIAN_DIRECTORY.into()], true);
        let (found, keeps_name) = emulators.find(processor).unwrap();
        assert!(keeps_name && found.ends_with("aarch64-binfmt-P"));
    }

    #[test]
    fn the_probes_run_under_their_emulators() {
        let dir = tempfile::tempdir().unwrap();
        for processor in &PROCESSORS {
            let path = dir.path().join(processor.architecture);
            write_program(processor, &path).unwrap();
            let emulator = format!("/usr/bin/qemu-{}-static", processor.qemu);
            assert!(is_static(Path::new(&emulator)), "{emulator}: make test installs it");
            let status = Command::new(&emulator).arg(&path).status().unwrap();
            assert_eq!(status.code(), Some(0), "{}", processor.architecture);
        }
        assert!(runs(&platform::host(), dir.path()));
        assert!(!is_static(Path::new("/bin/sh")), "needs libc");
        assert!(!is_static(Path::new("/etc/passwd")));
    }
}
