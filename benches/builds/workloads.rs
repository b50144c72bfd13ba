//! What is built: generated contexts, the same everywhere.

use crate::Failure;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// What was there before the timed build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// An empty store, but for the base image, on which a step has run.
    Cold,
    /// The same build.
    Cached,
    /// The same build; then a file was edited.
    Edited,
}

/// What the build writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// A name in the tool's own store.
    Store,
    /// An OCI archive with gzip layers.
    Gzip,
    /// An OCI archive with zstd layers.
    Zstd,
}

/// The image that a workload starts from.
pub(crate) enum Base {
    /// Static busybox of this machine.
    Busybox,
    /// A root file system in a tar.
    Tar(PathBuf),
}

impl Base {
    pub(crate) fn generate(&self, context: &Path) -> Result<(), Failure> {
        match self {
            Self::Busybox => {
                let found = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
                let target = context.join("busybox");
                fs::copy(found.ok_or("needs a static busybox: apt-get install busybox-static")?, &target)?;
                fs::set_permissions(&target, fs::Permissions::from_mode(0o755))?;
                let run = "RUN [\"/bin/busybox\", \"--install\", \"-s\", \"/bin\"]";
                let text = format!("FROM scratch\nCOPY busybox /bin/busybox\n{run}\nENV PATH=/bin\n");
                Ok(fs::write(context.join("Dockerfile"), text)?)
            }
            Self::Tar(path) => {
                fs::copy(path, context.join("rootfs.tar"))?;
                let path = "ENV PATH=/usr/sbin:/usr/bin:/sbin:/bin";
                Ok(fs::write(context.join("Dockerfile"), format!("FROM scratch\nADD rootfs.tar /\n{path}\n"))?)
            }
        }
    }
}

/// Time of the steps themselves, which ratios leave out.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Floor {
    Seconds(f64),
    /// What this command of the shell takes in a chroot of the base, in a copy of the context in /src. Not known (0) to whoever is
    /// not root.
    Chroot(&'static str),
}

/// Something to build.
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) base: Option<Base>,
    pub(crate) state: State,
    pub(crate) output: Output,
    pub(crate) floor: Floor,
    pub(crate) generate: fn(&Path) -> Result<(), Failure>,
    /// The edit of a round.
    pub(crate) edit: fn(&Path, usize) -> Result<(), Failure>,
}

/// All workloads; those that compile need a root file system with gcc.
pub(crate) fn workloads(toolchain: Option<&Path>) -> Vec<Workload> {
    let plain = |name, about, state, output, generate| Workload {
        name,
        about,
        base: None,
        state,
        output,
        floor: Floor::Seconds(0.0),
        generate,
        edit: |_, _| Ok(()),
    };
    let busybox = |workload: Workload| Workload { base: Some(Base::Busybox), ..workload };
    let mut all = vec![
        busybox(plain("steps-cached", "10 steps, all cached", State::Cached, Output::Store, ten_steps)),
        plain("context-cached", "50,000 files, 200 MB, all cached", State::Cached, Output::Store, many_files),
        plain("ignored-cached", "100,000 files, 99 % ignored, all cached", State::Cached, Output::Store, ignored_files),
        Workload {
            edit: edit_one_file,
            ..plain("context-edited", "50,000 files, one edited, OCI gzip", State::Edited, Output::Gzip, many_files)
        },
        plain("context-cold", "50,000 files cold, OCI gzip", State::Cold, Output::Gzip, many_files),
        plain("large-gzip", "one file of 512 MiB cold, OCI gzip", State::Cold, Output::Gzip, large_file),
        plain("large-zstd", "one file of 512 MiB cold, OCI zstd", State::Cold, Output::Zstd, large_file),
        busybox(plain("runs", "30 small RUN steps", State::Cold, Output::Store, small_runs)),
        Workload {
            floor: Floor::Seconds(1.0),
            ..busybox(plain("stages", "8 independent stages of `sleep 1`", State::Cold, Output::Store, sleeping_stages))
        },
        busybox(plain(
            "run-writes",
            "RUN writing 20,000 files, RUN deleting 5,000, OCI gzip",
            State::Cold,
            Output::Gzip,
            writing_runs,
        )),
        Workload {
            edit: |context, round| Ok(fs::write(context.join("server.js"), format!("serve({round})\n"))?),
            ..busybox(plain(
                "service-edited",
                "dependencies installed, then server.js edited",
                State::Edited,
                Output::Store,
                service,
            ))
        },
    ];
    if let Some(tar) = toolchain {
        let compiling = |name, about, state| Workload {
            base: Some(Base::Tar(tar.to_owned())),
            floor: Floor::Chroot(COMPILE),
            // Number 0 is what there was before.
            edit: |context, round| Ok(fs::write(context.join("f0.c"), source(0, round + 1))?),
            ..plain(name, about, state, Output::Store, c_project)
        };
        all.push(compiling("gcc-cold", "C project of 40 files, cold", State::Cold));
        all.push(compiling("gcc-edited", "C project of 40 files, one edited", State::Edited));
    }
    all
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Text that compresses about as source code does.
    fn text(&mut self, size: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(size + 64);
        while out.len() < size {
            // Few words often, many seldom.
            let range = [60, 60, 900, 20_000][self.next() as usize % 4];
            let word = (self.next() % range).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let length = 2 + word as usize % 9;
            out.extend((0..length).map(|at| b'a' + (word >> (5 * at + 4)) as u8 % 26));
            out.push([b' ', b' ', b'(', b'.', b'\n', b' '][self.next() as usize % 6]);
        }
        out.truncate(size);
        out
    }
}

/// `count` files in directories of a hundred, of 4,000 bytes on average.
fn files(directory: &Path, count: usize, seed: u64) -> Result<(), Failure> {
    let mut random = Random(seed);
    for number in 0..count {
        let parent = directory.join(format!("d{:02}/e{:02}", number / 10_000, number / 100 % 100));
        if number % 100 == 0 {
            fs::create_dir_all(&parent)?;
        }
        let size = 1000 + random.next() as usize % 6000;
        fs::write(parent.join(format!("file{number:06}.src")), random.text(size))?;
    }
    Ok(())
}

fn many_files(context: &Path) -> Result<(), Failure> {
    fs::write(context.join("Dockerfile"), "FROM scratch\nCOPY src /src\n")?;
    files(&context.join("src"), 50_000, 7)
}

fn edit_one_file(context: &Path, round: usize) -> Result<(), Failure> {
    Ok(fs::write(context.join("src/d02/e50/file025000.src"), format!("edited {round}\n"))?)
}

fn ignored_files(context: &Path) -> Result<(), Failure> {
    fs::write(context.join("Dockerfile"), "FROM scratch\nCOPY . /src\n")?;
    fs::write(context.join(".dockerignore"), "node_modules\n**/*.log\n")?;
    files(&context.join("src"), 1000, 3)?;
    for number in 0..99_000 {
        let parent = context.join(format!("node_modules/p{:03}/lib", number / 100));
        if number % 100 == 0 {
            fs::create_dir_all(&parent)?;
        }
        fs::write(parent.join(format!("m{number}.js")), "x")?;
    }
    Ok(())
}

fn large_file(context: &Path) -> Result<(), Failure> {
    fs::write(context.join("Dockerfile"), "FROM scratch\nCOPY data /data\n")?;
    mixed(&context.join("data"), 512 << 20, 11)
}

/// Blocks of 4 KiB, half random bytes, half lines that come again and again, mostly from further away than gzip can see:
/// gzip makes three quarters of them, zstd a little more than half.
fn mixed(path: &Path, size: usize, seed: u64) -> Result<(), Failure> {
    const RANDOM: usize = 1984;
    let mut random = Random(seed);
    let lines: Vec<Vec<u8>> = (0..750)
        .map(|_| {
            let length = 20 + random.next() as usize % 41;
            let mut letters = || b"abcdefghijklmnopqrstuvwxyz   "[random.next() as usize % 29];
            (0..length).map(|_| letters()).chain([b'\n']).collect()
        })
        .collect();
    let mut out = std::io::BufWriter::new(fs::File::create(path)?);
    for _ in 0..size / 4096 {
        let mut block: Vec<u8> = (0..RANDOM / 8).flat_map(|_| random.next().to_le_bytes()).collect();
        while block.len() < 4096 {
            block.extend(&lines[random.next() as usize % lines.len()]);
        }
        block.truncate(4096);
        std::io::Write::write_all(&mut out, &block)?;
    }
    Ok(std::io::Write::flush(&mut out)?)
}

/// Bytes that compress to about four fifths; whole blocks of 4 KiB.
pub(crate) fn incompressible(path: &Path, size: usize, seed: u64) -> Result<(), Failure> {
    let mut random = Random(seed);
    let mut out = std::io::BufWriter::new(fs::File::create(path)?);
    for _ in 0..size / 4096 {
        let mut block: Vec<u8> = (0..2560 / 8).flat_map(|_| random.next().to_le_bytes()).collect();
        block.extend(random.text(1536));
        std::io::Write::write_all(&mut out, &block)?;
    }
    Ok(std::io::Write::flush(&mut out)?)
}

fn ten_steps(context: &Path) -> Result<(), Failure> {
    fs::write(context.join("app.txt"), "application\n")?;
    let mut text = String::from("FROM bench-base\nWORKDIR /app\nCOPY app.txt .\n");
    for number in 0..8 {
        writeln!(text, "RUN echo {number} > file{number}")?;
    }
    Ok(fs::write(context.join("Dockerfile"), text)?)
}

fn small_runs(context: &Path) -> Result<(), Failure> {
    let mut text = String::from("FROM bench-base\n");
    for number in 0..30 {
        writeln!(text, "RUN echo {number} > /file{number}")?;
    }
    Ok(fs::write(context.join("Dockerfile"), text)?)
}

fn sleeping_stages(context: &Path) -> Result<(), Failure> {
    let mut text = String::new();
    for number in 0..8 {
        writeln!(text, "FROM bench-base AS s{number}\nRUN sleep 1; echo {number} > /out{number}")?;
    }
    text.push_str("FROM scratch\n");
    for number in 0..8 {
        writeln!(text, "COPY --from=s{number} /out{number} /")?;
    }
    Ok(fs::write(context.join("Dockerfile"), text)?)
}

/// A command that writes `count` files of 1,000 to 7,000 bytes of `text` in one process.
fn write_files(text: &str, count: usize) -> String {
    let body = format!(
        "for (i = 0; i < {count}; i++) {{ f = sprintf(\"f%05d\", i); printf \"%s\", substr(t, 1 + i * 7919 % 50000, 1000 + i * 31 % 6000) > f; close(f) }}"
    );
    format!("awk '{{ t = t $0 }} END {{ {body} }}' {text}")
}

fn writing_runs(context: &Path) -> Result<(), Failure> {
    fs::write(context.join("text"), Random(5).text(60_000))?;
    let write = format!("RUN mkdir /data && cd /data && {}", write_files("/text", 20_000));
    let delete = "RUN cd /data && rm -f f00* f01* f02* f03* f04*";
    Ok(fs::write(context.join("Dockerfile"), format!("FROM bench-base\nCOPY text /\n{write}\n{delete}\n"))?)
}

fn service(context: &Path) -> Result<(), Failure> {
    fs::write(context.join("package.json"), "{}\n")?;
    fs::write(context.join("server.js"), "serve()\n")?;
    fs::write(context.join("text"), Random(9).text(60_000))?;
    let install = format!("RUN mkdir node_modules && cd node_modules && {}", write_files("/tmp/text", 5000));
    let text = format!(
        "FROM bench-base\nWORKDIR /app\nCOPY text /tmp/text\nCOPY package.json .\n{install}\nCOPY server.js .\nCMD [\"server.js\"]\n"
    );
    Ok(fs::write(context.join("Dockerfile"), text)?)
}

fn source(number: usize, version: usize) -> String {
    format!(
        "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\nint f{number}(int x) {{ char b[64]; \
         snprintf(b, sizeof b, \"%d\", x + {version}); return atoi(b) + (int)strlen(b); }}\n"
    )
}

const COMPILE: &str = "for f in *.c; do gcc -O1 -c $f; done && gcc -o /app *.o";

fn c_project(context: &Path) -> Result<(), Failure> {
    let mut main = String::from("int main(void) { int x = 0;\n");
    for number in 0..40 {
        fs::write(context.join(format!("f{number}.c")), source(number, 0))?;
        writeln!(main, "int f{number}(int); x += f{number}({number});")?;
    }
    fs::write(context.join("main.c"), main + "return x == 0; }\n")?;
    let text = format!("FROM bench-base\nWORKDIR /src\nCOPY . .\nRUN {COMPILE}\n");
    Ok(fs::write(context.join("Dockerfile"), text)?)
}
