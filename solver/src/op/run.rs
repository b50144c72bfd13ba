//! RUN as a vertex: its key, its mounts, its sandbox, and the layer that it leaves.

use crate::leak::LeakScan;
use crate::materialize::{self, MaterializeError, Ownership};
use crate::op::agent::AgentSocket;
use crate::op::copied;
use crate::op::file::Value;
use crate::op::owners::{self, Caches};
use crate::op::user::{self, UserError};
use crate::plan::cache_key::{Key, Parts};
use crate::sandbox::cgroup::{Exceeded, StepGroup};
use crate::sandbox::emulation::{Identity, Owner, Records, Scope};
use crate::sandbox::foreign::{self, EmulatorError, Emulators};
use crate::sandbox::{
    self, Cancel, Isolation, Net, Outcome, Rootfs, RunSpec, SandboxError, SetupMount, Status, Stream,
};
use crate::snapshot::{Layer, Made, Snapshot, SnapshotError, Workspace};
use crate::store::StoreError;
use crate::sys;
use crate::tree::{Entry, Node, Origin, Resolved, Tree, TreeBuilder, index};
use crate::upper::{self, LostAttribute, UpperError};
use nacre_frontend::llb::{Mount, MountKind, Network, Platform, RunOp, Security, Sharing, Vertex};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// What the caller of a build gives to its steps.
#[derive(Debug, Clone, Default)]
pub struct Host {
    /// Values of secrets by name.
    pub secrets: BTreeMap<String, Vec<u8>>,
    /// Sockets of ssh agents by name.
    pub ssh: BTreeMap<String, PathBuf>,
    /// Content of /etc/resolv.conf for steps.
    pub resolv_conf: String,
    /// Looks for secrets where they must not be.
    pub leaks: Option<Arc<LeakScan>>,
    /// How long a step may take.
    pub step_timeout: Option<Duration>,
    /// Emulators for steps of other platforms.
    pub emulators: Emulators,
    /// What keeps steps from the rest of the machine.
    pub isolation: Isolation,
    /// Control group of every step, with limits.
    pub group: Option<StepGroup>,
    /// Network of steps that ask for none in particular: none, else the one of `default_network`.
    pub default_network_none: bool,
    /// Warn of files of contexts that look as if they held keys.
    pub key_warnings: bool,
    /// A network namespace for them; without one, they have the host's.
    pub default_network: Option<PathBuf>,
}

/// A RUN failed.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A snapshot could not be had.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The sandbox could not be set up.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The step is for another processor.
    #[error(transparent)]
    Emulator(#[from] EmulatorError),
    /// What the step wrote could not be read.
    #[error("cannot read what the step wrote")]
    Upper(#[from] UpperError),
    /// USER cannot be looked up.
    #[error(transparent)]
    User(#[from] UserError),
    /// A mount's source is not there.
    #[error("mount of `{target}`: no `{path}` in {source_name}")]
    NoSource {
        /// Where it should be mounted.
        target: String,
        /// What is missing.
        path: String,
        /// Which snapshot or context.
        source_name: String,
    },
    /// A required secret was not given.
    #[error("secret `{0}` is required and was not given")]
    NoSecret(String),
    /// A secret for an environment variable is not text.
    #[error("secret `{0}` is not valid UTF-8 and cannot be an environment variable")]
    SecretNotText(String),
    /// A required ssh agent was not given.
    #[error("ssh agent `{0}` is required and was not given")]
    NoSsh(String),
    /// The program ended with an exit code other than 0.
    #[error("exit code: {code}")]
    Exit {
        /// The code.
        code: i32,
        /// The program as the step names it.
        program: String,
        /// The step's files are on a file system that has no room left, which may be why.
        disk_full: bool,
        /// What the step's limits did.
        exceeded: Exceeded,
    },
    /// A signal ended the program.
    #[error("killed by signal {signal}")]
    Signal {
        /// Its number.
        signal: i32,
        /// What the step's limits did.
        exceeded: Exceeded,
    },
    /// It took longer than allowed.
    #[error("stopped after {}", humane(.after))]
    TimedOut {
        /// What was allowed.
        after: Duration,
    },
    /// Told to stop.
    #[error("interrupted")]
    Interrupted,
    /// A file of the store cannot be handled.
    #[error("cannot use `{path}`")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A root file system could not be copied, or what the step changed could not be kept.
    #[error("cannot copy the root file system of the step")]
    Copied(#[source] MaterializeError),
    /// A cache mount could not be filled.
    #[error("cannot prepare a cache mount")]
    CacheMount(#[source] MaterializeError),
}

impl RunError {
    /// A way out, one sentence, as far as it can be told without looking at files.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            Self::User(UserError::NoUser { name }) => {
                format!("make user `{name}` in an earlier step, or give a number: `USER 1000`")
            }
            Self::User(UserError::NoGroup { name }) => {
                format!("make group `{name}` in an earlier step, or give a number: `USER name:1000`")
            }
            Self::TimedOut { .. } => "--step-timeout says how long a step may take".to_owned(),
            Self::Emulator(error) => return error.help(),
            Self::NoSecret(id) => {
                format!("give it with `--secret id={id},src=FILE` or `--secret id={id},env=VARIABLE`")
            }
            Self::SecretNotText(_) => "remove env=, and read the file that the mount makes".to_owned(),
            Self::NoSsh(id) => {
                format!("give one with `--ssh {id}` (the agent of SSH_AUTH_SOCK) or `--ssh {id}=SOCKET`")
            }
            _ => return None,
        })
    }
}

/// A duration in words: `90s`, `1.5s`.
fn humane(duration: &Duration) -> String {
    format!("{}s", duration.as_secs_f64())
}

/// The parts of the key, without those of the root file system.
pub fn parts(
    workspace: &Workspace,
    vertex: &Vertex,
    op: &RunOp,
    inputs: &[Option<Value>],
) -> Result<Parts, SnapshotError> {
    let mut parts = described(vertex, op);
    for (input, mount, source) in mounted_inputs(op) {
        let name = format!("content of mount {} ({source})", mount.target);
        let tree = mounted_tree(workspace, &inputs[input], source)?;
        parts.add(name, tree.map_or_else(String::new, |(tree, _)| Key(index::content_key(&tree)).hex()));
    }
    Ok(parts)
}

/// The parts of the key with the content of whole stages in place of what is mounted of them: they can be had without a
/// look at any file. `None` when nothing of a stage is mounted, or something else than stages.
pub fn parts_of_inputs(vertex: &Vertex, op: &RunOp, inputs: &[Option<Value>]) -> Option<Parts> {
    let mounted = mounted_inputs(op);
    let mut parts = described(vertex, op);
    for (input, mount, source) in &mounted {
        let Some(Some(Value::Snapshot(snapshot))) = inputs.get(*input) else { return None };
        parts.add(format!("stage of mount {} ({source})", mount.target), snapshot.content().hex());
    }
    (!mounted.is_empty()).then_some(parts)
}

/// Mounts that show something of another input than the step's own file system, and which part.
fn mounted_inputs(op: &RunOp) -> Vec<(usize, &Mount, &str)> {
    let shown = op.mounts.iter().filter_map(|mount| match &mount.kind {
        MountKind::Bind { input: Some(input), source } => Some((*input, mount, source.as_str())),
        MountKind::Cache { from: Some((input, source)), .. } => Some((*input, mount, source.as_str())),
        _ => None,
    });
    shown.filter(|(input, ..)| *input != 0).collect()
}

/// The parts of the key that depend on no file.
fn described(vertex: &Vertex, op: &RunOp) -> Parts {
    let mut parts = Parts::default();
    parts.add("op", "run");
    parts.add("command", shell_text(&op.args));
    parts.add("arguments", serde_json::to_string(&op.args).unwrap_or_default());
    for (name, value) in &op.env {
        parts.add(format!("env {name}"), value);
    }
    parts.add("workdir", &op.cwd);
    parts.add("user", &op.user);
    parts.add("network", format!("{:?}", op.network));
    parts.add("security", format!("{:?}", op.security));
    for (name, address) in &op.extra_hosts {
        parts.add(format!("host {name}"), address);
    }
    for (name, soft, hard) in &op.ulimits {
        parts.add(format!("ulimit {name}"), format!("{soft}:{hard}"));
    }
    parts.add("shm size", op.shm_size_bytes.map(|bytes| bytes.to_string()).unwrap_or_default());
    parts.add("hostname", op.hostname.as_deref().unwrap_or_default());
    for (at, mount) in op.mounts.iter().enumerate() {
        // Which cache and whose secret are part of it, what they hold is not.
        let name = format!("mount {} {}", at + 1, mount.target);
        leaves(&mut parts, &name, &serde_json::to_value(mount).unwrap_or_default());
    }
    parts.add("platform", vertex.platform.to_string());
    parts
}

/// Adds the members of a value one by one, so that a difference is told by the member it is in.
fn leaves(parts: &mut Parts, name: &str, value: &serde_json::Value) {
    match value {
        serde_json::Value::Object(members) => {
            for (member, value) in members {
                leaves(parts, &format!("{name} {}", member.to_lowercase()), value);
            }
        }
        serde_json::Value::String(text) => parts.add(name, text),
        other => parts.add(name, other.to_string()),
    }
}

/// Words of an argument list for people: a shell's command line alone, else all words.
fn shell_text(args: &[String]) -> String {
    match args {
        [_, flag, line] if flag == "-c" => line.clone(),
        _ => args.join(" "),
    }
}

/// The part of an input that a mount shows, paths as in the input, and the resolved path; `None` if it is not there.
fn mounted_tree(
    workspace: &Workspace,
    input: &Option<Value>,
    source: &str,
) -> Result<Option<(Tree, Vec<u8>)>, SnapshotError> {
    let tree = match input {
        None => Arc::default(),
        Some(Value::Snapshot(snapshot)) => workspace.flatten(snapshot)?,
        Some(Value::Context(local)) => local.tree()?,
        Some(Value::Checkout(tree)) => tree.clone(),
        Some(Value::File(file)) => file.tree(&workspace.store).map_err(SnapshotError::from)?,
    };
    let path = match tree.resolve(source.as_bytes(), true) {
        Resolved::Found(path) => path,
        _ => return Ok(None),
    };
    let mut part: Tree = tree.subtree(&path).collect();
    match input {
        Some(Value::Context(local)) => drop(local.digest(&mut part)?),
        Some(Value::Checkout(_)) => crate::op::file::digest_uncached(&mut part)?,
        _ => {}
    }
    Ok(Some((part, path)))
}

/// What a RUN left.
pub struct Ran {
    /// The layer: changed entries and their parents.
    pub changes: Tree,
    /// The upper directory, to become the layer's tree.
    pub upper: PathBuf,
    /// When the step's processes were gone.
    pub ended: Instant,
    /// What the layer cannot hold.
    pub lost: Vec<LostAttribute>,
}

/// Makes sure that the platform's programs can run here.
pub fn ensure_platform(
    workspace: &Workspace,
    platform: &Platform,
    host: &Host,
    cancel: &Cancel,
) -> Result<(), RunError> {
    if foreign::is_native(platform) {
        return Ok(());
    }
    let scratch = workspace.store.begin_tree()?;
    let result = host.emulators.ensure(platform, &scratch, cancel);
    let _ = materialize::remove_tree(&scratch);
    Ok(result?)
}

/// Runs the step. Where layers cannot be stacked, this and all later steps work on copies.
pub fn execute(
    workspace: &Workspace,
    op: &RunOp,
    inputs: &[Option<Value>],
    host: &Host,
    cancel: &Cancel,
    log: &mut dyn FnMut(Stream, &[u8]),
) -> Result<Ran, RunError> {
    if host.isolation == Isolation::Chroot {
        workspace.copies.store(true, Ordering::Relaxed);
    }
    if !workspace.copies.load(Ordering::Relaxed) {
        match execute_once(workspace, op, inputs, host, cancel, log, false) {
            Err(RunError::Sandbox(SandboxError::Overlay { source, .. })) => {
                workspace.copies.store(true, Ordering::Relaxed);
                let cause = &source.source;
                let notice = format!(
                    "nacre: layers cannot be stacked in the store ({source}: {cause}), so steps work on copies, which \
                     takes time; choose a directory on a local disk, a volume or a tmpfs with --store\n"
                );
                log(Stream::Stderr, notice.as_bytes());
            }
            result => return result,
        }
    }
    execute_once(workspace, op, inputs, host, cancel, log, true)
}

fn execute_once(
    workspace: &Workspace,
    op: &RunOp,
    inputs: &[Option<Value>],
    host: &Host,
    cancel: &Cancel,
    log: &mut dyn FnMut(Stream, &[u8]),
    copies: bool,
) -> Result<Ran, RunError> {
    let parent = match inputs.first() {
        Some(Some(Value::Snapshot(snapshot))) => snapshot.clone(),
        _ => Snapshot::scratch(),
    };
    let scratch = workspace.store.begin_tree()?;
    let directory = |name: &str| -> Result<PathBuf, RunError> {
        let path = scratch.join(name);
        std::fs::create_dir(&path).map_err(|source| RunError::Io { path: path.clone(), source })?;
        Ok(path)
    };
    // Before anybody asks for the layers' entries alone: what unpacks a layer gives these, too.
    let stacked = if copies { Vec::new() } else { lowers(workspace, &parent)? };
    let flat = workspace.flatten(&parent)?;
    let (upper, work) = (directory("upper")?, directory("work")?);
    set_mode(&upper, 0o755)?;
    let mut copied = Vec::new();
    let rootfs = if copies {
        let dir = directory("root")?;
        set_mode(&dir, 0o755)?;
        copied = copy_snapshot(workspace, &flat, &dir)?;
        Rootfs::Plain { dir }
    } else {
        Rootfs::Overlay { lowers: stacked, upper: upper.clone(), work }
    };

    let read = |node: &Node| workspace.read_small(node);
    let user = user::look_up(&flat, &op.user, &read)?;
    let mut env: Vec<(String, String)> = op.env.clone();
    for (name, value) in &op.env_outside_key {
        if !env.iter().any(|(other, _)| other == name) {
            env.push((name.clone(), value.clone()));
        }
    }
    let mut mounts = Vec::new();
    let mut locks = Vec::new();
    let caches = lock_caches(workspace, &op.mounts, cancel, &mut locks)?;
    let scope = match workspace.ownership {
        _ if host.isolation == Isolation::Chroot => None,
        Ownership::SingleId => Some(Scope::SingleId),
        // The kernel lets nobody but the first namespace's root make device nodes.
        Ownership::Native if sandbox::idmap::is_initial_namespace() => None,
        Ownership::Native => {
            let inline = op.mounts.iter().filter_map(|mount| match &mount.kind {
                MountKind::Inline { content, .. } => Some(content),
                _ => None,
            });
            let texts = op.args.iter().chain(inline).map(String::as_str);
            Some(Scope::Devices { shown: owners::may_see_devices(&flat, texts) })
        }
    };
    let mut setup = MountSetup {
        workspace,
        inputs,
        host,
        scratch: &scratch,
        env: &mut env,
        caches: &caches,
        agents: Vec::new(),
        copies,
        copied,
    };
    let mut in_order: Vec<(usize, &Mount)> = op.mounts.iter().enumerate().collect();
    // What is mounted inside of another mount comes after it, whatever the order in the Dockerfile.
    in_order.sort_by_key(|(_, mount)| mount.target.split('/').filter(|part| !part.is_empty()).count());
    for (at, mount) in in_order {
        mounts.extend(setup.mount(at, mount)?);
    }
    // They listen until the step has ended.
    let agents = std::mem::take(&mut setup.agents);
    let copied = std::mem::take(&mut setup.copied);
    let owners_failed = |source| RunError::Io { path: scratch.clone(), source };
    // After the mounts: new caches have been filled by now.
    let below = (!copies).then_some(&*flat);
    let prepare = |scope| owners::prepare(scope, below, copied, &caches, &scratch);
    let emulation = scope.map(prepare).transpose().map_err(owners_failed)?;
    let spec = RunSpec {
        isolation: host.isolation,
        rootfs,
        mounts,
        args: op.args.clone(),
        env,
        cwd: op.cwd.clone(),
        uid: user.uid,
        gid: user.gid,
        groups: user.all_groups(),
        hostname: op.hostname.clone().unwrap_or_else(|| "buildkitsandbox".to_owned()),
        hosts: hosts_file(&op.extra_hosts),
        resolv_conf: host.resolv_conf.clone(),
        network: match op.network {
            Network::None => Net::None,
            Network::Default if host.default_network_none => Net::None,
            Network::Default => host.default_network.clone().map_or(Net::Host, Net::Join),
            Network::Host => Net::Host,
        },
        insecure: op.security == Security::Insecure,
        shm_size_bytes: op.shm_size_bytes.unwrap_or(64 << 20),
        ulimits: op.ulimits.clone(),
        group: host.group.clone(),
        umask: 0o022,
        scratch_dir: directory("files")?,
        emulation,
    };
    let result = sandbox::run_for(&spec, cancel, host.step_timeout, log);
    let ended = Instant::now();
    // Cache mounts keep their owners whether the step succeeded or not.
    let recorded = match (&spec.emulation, &result) {
        (Some(emulation), Ok(_)) => owners::take(emulation, &caches).map_err(owners_failed)?,
        _ => Records::new(),
    };
    drop((locks, agents));
    let outcome: Outcome = match (result, host.step_timeout) {
        (Err(SandboxError::TimedOut), Some(after)) => return Err(RunError::TimedOut { after }),
        (result, _) => result?,
    };
    if cancel.is_cancelled() {
        return Err(RunError::Interrupted);
    }
    match outcome.status {
        Status::Exit(0) if outcome.exceeded.killed > 0 => {
            let notice = "nacre: the kernel killed a process of this step for want of memory, and the step went on\n";
            log(Stream::Stderr, notice.as_bytes());
        }
        Status::Exit(0) => {}
        Status::Exit(code) => {
            // Asked now: the caller throws the step's files away.
            let disk_full = sys::is_full(&upper);
            let program = op.args.first().cloned().unwrap_or_default();
            return Err(RunError::Exit { code, program, disk_full, exceeded: outcome.exceeded });
        }
        Status::Signal(signal) => return Err(RunError::Signal { signal, exceeded: outcome.exceeded }),
    }
    let mut lost = Vec::new();
    let changes = match &spec.rootfs {
        Rootfs::Overlay { .. } => upper::scan_upper(&upper, &flat, workspace.ownership, &recorded, &mut lost)?,
        Rootfs::Plain { dir } => {
            let changes = copied::changes(dir, &flat, workspace.ownership, &recorded, &mut lost)?;
            copied::write_upper(&changes, &upper, workspace.sources.write).map_err(RunError::Copied)?;
            changes
        }
    };
    let changes = crate::op::copy::with_parents(changes, &flat);
    Ok(Ran { changes, upper, ended, lost })
}

/// The most layers that are stacked one by one: overlayfs takes 500, and a look-up that finds nothing asks each of them.
const STACKED: usize = 200;

/// Trees of a snapshot's layers, top first, made in parallel where they are missing. Of very many the lower ones become
/// one, at every [`STACKED`]th so that this is seldom.
fn lowers(workspace: &Workspace, snapshot: &Snapshot) -> Result<Vec<PathBuf>, SnapshotError> {
    let mut layers = snapshot.layers();
    let merged = layers.len().saturating_sub(1) / STACKED * STACKED;
    let mut bottom = None;
    if let Some(below) = (merged > 0).then(|| snapshot.lower(merged)).flatten() {
        bottom = Some(as_layer(workspace, &*workspace.flatten(&below)?)?);
        layers.drain(..merged);
    }
    let mut missing: Vec<&Layer> = layers.iter().filter(|layer| !workspace.has_tree_dir(layer)).collect();
    // Whoever unpacks one layer of an image unpacks all of them.
    let mut images = std::collections::HashSet::new();
    missing.retain(|layer| layer.image().is_none_or(|(image, _)| images.insert(Arc::as_ptr(image))));
    if missing.len() > 1 {
        let workers = workspace.threads.clamp(1, missing.len());
        let next = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    while let Some(layer) = missing.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
                        // A failure comes up again below, where it can be told.
                        let _ = workspace.tree_dir(layer);
                    }
                });
            }
        });
    }
    layers.iter().rev().map(|layer| workspace.tree_dir(layer)).chain(bottom.map(Ok)).collect()
}

/// Files as the tree of a layer of the store: copied once for as long as they stay the same.
fn as_layer(workspace: &Workspace, tree: &Tree) -> Result<PathBuf, SnapshotError> {
    let id = workspace.store.put_layer(tree.clone())?;
    let layer = workspace.layer(id, Made::Step(None), Some(Arc::new(tree.clone())));
    workspace.tree_dir(&layer)
}

fn hosts_file(extra: &[(String, String)]) -> String {
    let mut text = "127.0.0.1\tlocalhost buildkitsandbox\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    for (name, address) in extra {
        text.push_str(&format!("{address}\t{name}\n"));
    }
    text
}

fn set_mode(path: &Path, mode: u32) -> Result<(), RunError> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .map_err(|source| RunError::Io { path: path.to_owned(), source })
}

struct MountSetup<'a> {
    workspace: &'a Workspace,
    inputs: &'a [Option<Value>],
    host: &'a Host,
    scratch: &'a Path,
    env: &'a mut Vec<(String, String)>,
    /// Directories of the step's cache mounts, by the mounts' ids.
    caches: &'a Caches,
    /// Sockets for the step, kept by the caller until it has ended.
    agents: Vec<AgentSocket>,
    /// Layers cannot be stacked.
    copies: bool,
    /// Owners of what was copied instead.
    copied: Vec<(Identity, Owner)>,
}

/// Copies a snapshot; returns the owners that the disk does not hold.
fn copy_snapshot(workspace: &Workspace, tree: &Tree, dir: &Path) -> Result<Vec<(Identity, Owner)>, RunError> {
    workspace.prepare(tree)?;
    let read = |node: &Node| workspace.open(node).map(|reader| reader as Box<dyn io::Read>);
    copied::copy(tree, &read, dir, workspace.sources.write).map_err(RunError::Copied)
}

/// What a cache is known by: as with BuildKit, another owner or mode of its directory makes it another cache.
fn cache_name(id: &str, mode: u32, owner: (u32, u32)) -> String {
    match (mode & 0o777, owner) {
        (0o755, (0, 0)) => id.to_owned(),
        (mode, (uid, gid)) => format!("{id}\0{uid}:{gid}:{mode:o}"),
    }
}

/// Locks the caches that a step mounts; the locks are to be held until it has ended. A step waits for one cache while
/// it holds others, so all steps take them in one order, and one that a step mounts twice is taken once.
fn lock_caches(
    workspace: &Workspace,
    mounts: &[Mount],
    cancel: &Cancel,
    locks: &mut Vec<File>,
) -> Result<Caches, RunError> {
    let strictness = |sharing: Sharing| match sharing {
        Sharing::Shared => 0,
        Sharing::Locked => 1,
        Sharing::Private => 2,
    };
    let mut wanted: BTreeMap<String, Sharing> = BTreeMap::new();
    for mount in mounts {
        if let MountKind::Cache { id, sharing, mode, uid, gid, .. } = &mount.kind {
            let entry = wanted.entry(cache_name(id, *mode, (*uid, *gid))).or_insert(*sharing);
            if strictness(*sharing) > strictness(*entry) {
                *entry = *sharing;
            }
        }
    }
    let mut caches = BTreeMap::new();
    for (id, sharing) in wanted {
        // Files of other ids cannot be used where only one id exists, and the reverse.
        let scope = if workspace.ownership == Ownership::SingleId { "single\0" } else { "" };
        let name = blake3::hash(format!("{scope}{id}").as_bytes()).to_hex().to_string();
        let (base, lock) = lock_cache(&workspace.store.part("mounts").join(&name[..32]), sharing, cancel)?;
        locks.push(lock);
        caches.insert(id, base);
    }
    Ok(caches)
}

/// Locks one of the directories of a cache; only private ones have more than one.
fn lock_cache(directory: &Path, sharing: Sharing, cancel: &Cancel) -> Result<(PathBuf, File), RunError> {
    let mut number = 0_u32;
    loop {
        let base = directory.join(number.to_string());
        let io = |source| RunError::Io { path: base.clone(), source };
        std::fs::create_dir_all(&base).map_err(io)?;
        let lock = crate::store::open_lock(&base.join("lock"))?;
        // Asked again and again instead of waited for: a wait in the kernel would not end when the build is to.
        loop {
            let taken = if sharing == Sharing::Shared { lock.try_lock_shared() } else { lock.try_lock() };
            match taken {
                Ok(()) => return Ok((base, lock)),
                Err(std::fs::TryLockError::WouldBlock) if sharing == Sharing::Private => break,
                Err(std::fs::TryLockError::WouldBlock) if cancel.is_cancelled() => return Err(RunError::Interrupted),
                Err(std::fs::TryLockError::WouldBlock) => std::thread::sleep(std::time::Duration::from_millis(20)),
                Err(std::fs::TryLockError::Error(source)) => return Err(io(source)),
            }
        }
        number += 1;
    }
}

impl MountSetup<'_> {
    fn mount(&mut self, at: usize, mount: &Mount) -> Result<Option<SetupMount>, RunError> {
        let target = mount.target.clone();
        Ok(match &mount.kind {
            MountKind::Tmpfs { size_bytes } => {
                Some(SetupMount::Tmpfs { target, size_bytes: *size_bytes, read_only: mount.read_only })
            }
            MountKind::Inline { content, mode } => {
                Some(SetupMount::Inline { content: content.clone().into_bytes(), target, mode: *mode, uid: 0, gid: 0 })
            }
            MountKind::Secret { id, required, mode, uid, gid, env, file } => {
                let Some(value) = self.host.secrets.get(id) else {
                    if *required {
                        return Err(RunError::NoSecret(id.clone()));
                    }
                    // The variable is there all the same, as with BuildKit.
                    env.iter().for_each(|name| self.set_env(name, String::new()));
                    return Ok(None);
                };
                if let Some(name) = env {
                    let text = String::from_utf8(value.clone()).map_err(|_| RunError::SecretNotText(id.clone()))?;
                    self.set_env(name, text);
                }
                file.then(|| SetupMount::Secret { content: value.clone(), target, mode: *mode, uid: *uid, gid: *gid })
            }
            MountKind::Ssh { id, required, mode, uid, gid } => {
                if !self.env.iter().any(|(name, _)| name == "SSH_AUTH_SOCK") {
                    self.set_env("SSH_AUTH_SOCK", target.clone());
                }
                match self.host.ssh.get(id) {
                    Some(agent) => {
                        let io = |source| RunError::Io { path: agent.clone(), source };
                        let socket = AgentSocket::new(agent).map_err(io)?;
                        let source = socket.path().to_owned();
                        self.agents.push(socket);
                        Some(SetupMount::Socket { source, target, mode: *mode, uid: *uid, gid: *gid })
                    }
                    None if *required => return Err(RunError::NoSsh(id.clone())),
                    None => None,
                }
            }
            MountKind::Bind { input, source } => Some(self.bind(at, mount, *input, source)?),
            MountKind::Cache { id, from, mode, uid, gid, .. } => {
                // As with BuildKit, special bits do not count.
                let mode = mode & 0o777;
                let directory = self.cache(id, from.as_ref(), mode, (*uid, *gid), &mount.target)?;
                Some(SetupMount::Bind { source: directory, target, read_only: mount.read_only })
            }
        })
    }

    fn set_env(&mut self, name: &str, value: String) {
        self.env.retain(|(other, _)| other != name);
        self.env.push((name.to_owned(), value));
    }

    /// Part of another snapshot or context, read through an overlay of its own so that writes go nowhere.
    fn bind(&mut self, at: usize, mount: &Mount, input: Option<usize>, source: &str) -> Result<SetupMount, RunError> {
        let missing = || RunError::NoSource {
            target: mount.target.clone(),
            path: source.to_owned(),
            source_name: "the mount's source".to_owned(),
        };
        let directory = |name: &str| -> Result<PathBuf, RunError> {
            let path = self.scratch.join(format!("mount{at}-{name}"));
            std::fs::create_dir(&path).map_err(|source| RunError::Io { path: path.clone(), source })?;
            Ok(path)
        };
        let value = input.map_or(&None, |input| &self.inputs[input]);
        let (lowers, subpath, tree) = match value {
            None if source == "/" || source.is_empty() => (Vec::new(), Vec::new(), Arc::default()),
            None => return Err(missing()),
            Some(Value::Snapshot(snapshot)) => {
                let flat = self.workspace.flatten(snapshot)?;
                match flat.resolve(source.as_bytes(), true) {
                    Resolved::Found(path) if self.copies => (Vec::new(), path, flat),
                    Resolved::Found(path) => (lowers(self.workspace, snapshot)?, path, flat),
                    _ => return Err(missing()),
                }
            }
            Some(_) => {
                let Some((tree, path)) = mounted_tree(self.workspace, value, source)? else { return Err(missing()) };
                let tree = Arc::new(tree);
                let lowers = if self.copies { Vec::new() } else { vec![self.stored(&tree)?] };
                (lowers, path, tree)
            }
        };
        if self.copies {
            let dir = directory("copy")?;
            let part: Tree = tree.subtree(&subpath).collect();
            self.copied.extend(copy_snapshot(self.workspace, &part, &dir)?);
            let source = dir.join(std::ffi::OsStr::from_bytes(&subpath));
            return Ok(SetupMount::Bind { source, target: mount.target.clone(), read_only: mount.read_only });
        }
        let subpath = format!("/{}", String::from_utf8_lossy(&subpath));
        let (upper, work) = (directory("upper")?, directory("work")?);
        set_mode(&upper, 0o755)?;
        let (target, read_only) = (mount.target.clone(), mount.read_only);
        let list = self.scratch.join(format!("mount{at}-owners"));
        let owners = match self.workspace.ownership {
            Ownership::Native => None,
            Ownership::SingleId => owners::write_lower(&tree, Scope::SingleId, list.clone())
                .map_err(|source| RunError::Io { path: list, source })?,
        };
        Ok(SetupMount::OverlayBind { lowers, upper, work, subpath, target, read_only, owners })
    }

    /// A context's files as a layer of the store: copied once for as long as they stay the same.
    fn stored(&self, tree: &Tree) -> Result<PathBuf, RunError> {
        Ok(as_layer(self.workspace, tree)?)
    }

    /// The directory of a cache mount, filled when it is new.
    fn cache(
        &self,
        id: &str,
        from: Option<&(usize, String)>,
        mode: u32,
        owner: (u32, u32),
        target: &str,
    ) -> Result<PathBuf, RunError> {
        let missing = || RunError::Io { path: PathBuf::from(target), source: io::ErrorKind::NotFound.into() };
        let data = self.caches.get(&cache_name(id, mode, owner)).ok_or_else(missing)?.join("data");
        if !data.is_dir() {
            self.fill_cache(&data, from, mode, owner, target)?;
        }
        Ok(data)
    }

    /// Writes a new cache's first content beside it and renames it: another step may be doing the same.
    fn fill_cache(
        &self,
        data: &Path,
        from: Option<&(usize, String)>,
        mode: u32,
        owner: (u32, u32),
        target: &str,
    ) -> Result<(), RunError> {
        let staging = self.workspace.store.begin_tree()?;
        let fresh = staging.join("data");
        let mut top = Entry { uid: owner.0, gid: owner.1, ..Entry::dir("", mode) };
        let mut inside = TreeBuilder::new();
        if let Some((input, source)) = from {
            let missing = || RunError::NoSource {
                target: target.to_owned(),
                path: source.clone(),
                source_name: "the cache mount's source".to_owned(),
            };
            let (tree, path) = mounted_tree(self.workspace, &self.inputs[*input], source)?.ok_or_else(missing)?;
            let mut nodes = tree.iter().peekable();
            if let Some(node) = nodes.next_if(|node| node.entry.path == path) {
                top = Entry { path: Vec::new(), ..node.entry };
            }
            inside.push(&top, &Origin::None);
            for mut node in nodes {
                node.entry.path.drain(..if path.is_empty() { 0 } else { path.len() + 1 });
                inside.push_node(&node);
            }
        } else {
            inside.push(&top, &Origin::None);
        }
        std::fs::create_dir(&fresh).map_err(|source| RunError::Io { path: fresh.clone(), source })?;
        let read = |node: &Node| self.workspace.open(node).map(|reader| reader as Box<dyn io::Read>);
        let tree = inside.finish();
        materialize::write_tree(&tree, &read, &fresh, self.workspace.sources.write).map_err(RunError::CacheMount)?;
        let base = data.parent().unwrap_or(data);
        if self.workspace.ownership == Ownership::SingleId && !data.exists() {
            owners::record_cache(base, &fresh, &tree)
                .map_err(|source| RunError::Io { path: base.to_owned(), source })?;
        }
        match std::fs::rename(&fresh, data) {
            Ok(()) => Ok(()),
            Err(_) if data.is_dir() => Ok(()),
            Err(source) => Err(RunError::Io { path: data.to_owned(), source }),
        }
    }
}
