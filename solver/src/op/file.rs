//! COPY, ADD and WORKDIR as vertices: what they select is the key, the changeset is the layer.
//!
//! Carrying one of these out only computes: nothing is written until somebody wants the layer's tree or blob. That is
//! why a layer from the cache that has neither can be had again from its [`Recipe`].

use crate::context::{self, Context, ContextError, DigestCache};
use crate::op::copy::{self, CopyInput};
use crate::plan::cache_key::Parts;
use crate::registry::http::HttpFile;
use crate::snapshot::{Snapshot, SnapshotError, Workspace};
use crate::tree::{Entry, Kind, Node, Origin, Tree, index};
use nacre_frontend::llb::{CopyOp, CopySource, MkdirOp};
use rayon::prelude::*;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Result of a vertex.
#[derive(Clone)]
pub enum Value {
    /// A stack of layers.
    Snapshot(Snapshot),
    /// A directory of the caller.
    Context(Arc<LocalContext>),
    /// A fetched file.
    File(Arc<HttpFile>),
    /// A checkout of a git repository, read in place.
    Checkout(Arc<Tree>),
}

/// A directory of the caller with the digests that are known of it.
pub struct LocalContext {
    context: Context,
    /// A copy of the context's tree that many users share.
    tree: OnceLock<Arc<Tree>>,
    digests: Mutex<DigestCache>,
}

impl LocalContext {
    /// `digests` is where digests of its files are kept between builds.
    pub fn new(context: Context, digests: DigestCache) -> Self {
        Self { context, tree: OnceLock::new(), digests: Mutex::new(digests) }
    }

    /// The directory and what it leaves out.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// All files that are not ignored, without digests.
    pub fn tree(&self) -> Result<Arc<Tree>, ContextError> {
        if let Some(tree) = self.tree.get() {
            return Ok(tree.clone());
        }
        let tree = Arc::new(self.context.tree()?.clone());
        Ok(self.tree.get_or_init(|| tree).clone())
    }

    /// Fills in the digests of files on disk that have none.
    pub fn digest(&self, nodes: &mut [Node]) -> Result<(), ContextError> {
        let mut digests = self.digests.lock().unwrap_or_else(PoisonError::into_inner);
        context::digest_files(nodes, &[&self.context], &mut digests)
    }

    /// Keeps what was learned for the next build.
    pub fn save(&self) -> Result<(), ContextError> {
        self.digests.lock().unwrap_or_else(PoisonError::into_inner).save()
    }
}

/// A file operation with everything it needs.
#[derive(Clone)]
pub struct Recipe {
    /// What to do.
    pub op: FileOp,
    /// What it changes.
    pub parent: Snapshot,
    /// Values of the vertex's inputs by position; number 0 is `parent` and not looked at.
    pub inputs: Vec<Option<Value>>,
    /// Time of what the operation itself makes: seconds and nanoseconds since the epoch.
    pub now: (i64, u32),
}

/// The operations that only compute.
#[derive(Clone)]
pub enum FileOp {
    /// COPY and ADD.
    Copy(Box<CopyOp>),
    /// WORKDIR.
    Mkdir(MkdirOp),
}

impl Recipe {
    /// The key's parts, and the selected files for telling what changed.
    pub fn parts(&self, workspace: &Workspace) -> Result<(Parts, Option<Tree>), SnapshotError> {
        let mut parts = Parts::default();
        let selection = match &self.op {
            FileOp::Mkdir(op) => {
                parts.add("op", "mkdir");
                parts.add("path", &op.path);
                parts.add("user", &op.user);
                None
            }
            FileOp::Copy(op) => {
                describe(op, &mut parts);
                // On an empty destination, as plain files and without look-up of names: what is left is the selection.
                let bare = CopyOp { owner: None, unpack: Some(false), ..(**op).clone() };
                let mut selection = self.copy(&bare, &Tree::default(), workspace)?;
                self.digest(&mut selection)?;
                parts.add("files", hex(&index::content_key(&selection)));
                Some(selection)
            }
        };
        Ok((parts, selection))
    }

    /// The layer: changed entries and their parents, digests filled in.
    pub fn carry_out(&self, workspace: &Workspace) -> Result<Tree, SnapshotError> {
        let independent = matches!(&self.op, FileOp::Copy(op) if op.link);
        let dest = match &self.op {
            // Names of users are looked up in the destination even by an independent copy.
            FileOp::Copy(op) if op.link && op.owner.is_none() => Arc::default(),
            _ => workspace.flatten(&self.parent)?,
        };
        let mut changes = match &self.op {
            FileOp::Copy(op) => self.copy(op, &dest, workspace)?,
            FileOp::Mkdir(op) => copy::mkdir(op, &dest, self.now, &|node| workspace.read_small(node))?,
        };
        self.digest(&mut changes)?;
        Ok(if independent { changes } else { copy::with_parents(&changes, &dest) })
    }

    fn copy(&self, op: &CopyOp, dest: &Tree, workspace: &Workspace) -> Result<Tree, SnapshotError> {
        // Trees first, so that the inputs can borrow them.
        let mut owned = Vec::with_capacity(self.inputs.len());
        for (at, value) in self.inputs.iter().enumerate() {
            owned.push(match value {
                _ if at == 0 => Owned::Snapshot(Arc::default()),
                None => Owned::Snapshot(Arc::default()),
                Some(Value::Snapshot(snapshot)) => Owned::Snapshot(workspace.flatten(snapshot)?),
                Some(Value::Context(local)) => Owned::Context(local.tree()?),
                Some(Value::Checkout(tree)) => Owned::Context(tree.clone()),
                Some(Value::File(file)) => Owned::File(Box::new(self.fetched(file))),
            });
        }
        let inputs: Vec<CopyInput<'_>> = owned
            .iter()
            .map(|owned| match owned {
                Owned::Snapshot(tree) => CopyInput::Snapshot(tree),
                Owned::Context(tree) => CopyInput::Context(tree),
                Owned::File(node) => CopyInput::File(node),
            })
            .collect();
        let read = |node: &Node| workspace.read_whole(node);
        // Kept until the build ends: what archives hold is read in place.
        let unpacks = op.unpack.unwrap_or(op.add);
        let staging = if unpacks { workspace.store.begin_tree()? } else { workspace.store.tmp_path() };
        Ok(copy::copy(op, &inputs, dest, &staging, self.now, &read)?)
    }

    /// A fetched file as a node: mode 0600 and the server's date, as BuildKit has it.
    fn fetched(&self, file: &HttpFile) -> Node {
        let entry = Entry {
            kind: Kind::File { size: file.size_bytes, digest: None, link_group: 0 },
            mtime: file.last_modified.map_or(self.now, |seconds| (seconds, 0)),
            ..Entry::dir("", 0o600)
        };
        Node { entry, origin: Origin::File(Arc::new(file.path.clone())) }
    }

    fn digest(&self, tree: &mut Tree) -> Result<(), ContextError> {
        let locals: Vec<&Arc<LocalContext>> = self
            .inputs
            .iter()
            .flatten()
            .filter_map(|value| match value {
                Value::Context(local) => Some(local),
                _ => None,
            })
            .collect();
        digest_others(tree.nodes_mut(), &locals)?;
        locals.iter().try_for_each(|local| local.digest(tree.nodes_mut()))
    }
}

/// Trees that a copy borrows.
enum Owned {
    Snapshot(Arc<Tree>),
    Context(Arc<Tree>),
    File(Box<Node>),
}

/// Fills in the digests of files that belong to no context.
pub(crate) fn digest_uncached(nodes: &mut [Node]) -> Result<(), ContextError> {
    digest_others(nodes, &[])
}

/// Fills in the digests of downloads and of what archives held. Their times are not those of the files that hold their
/// bytes, so contexts, which take both from the file, must not see them.
fn digest_others(nodes: &mut [Node], locals: &[&Arc<LocalContext>]) -> Result<(), ContextError> {
    nodes.par_iter_mut().try_for_each(|node| {
        let (Origin::File(path), Kind::File { digest: digest @ None, .. }) = (&node.origin, &mut node.entry.kind)
        else {
            return Ok(());
        };
        if locals.iter().any(|local| path.starts_with(local.context.root())) {
            return Ok(());
        }
        let mut hasher = blake3::Hasher::new();
        let read = std::fs::File::open(path.as_path()).and_then(|file| Ok(hasher.update_reader(file)?.finalize()));
        let found = read.map_err(|source| ContextError::ReadFile { path: path.to_path_buf(), source })?;
        *digest = Some(*found.as_bytes());
        Ok(())
    })
}

/// The parts of a COPY's key that do not depend on files.
fn describe(op: &CopyOp, parts: &mut Parts) {
    parts.add("op", if op.add { "add" } else { "copy" });
    for (at, source) in op.sources.iter().enumerate() {
        let text = match source {
            CopySource::Tree { pattern, .. } => format!("path {pattern}"),
            CopySource::Inline { name, .. } => format!("heredoc {name}"),
            CopySource::Http { name, .. } => format!("download {name}"),
            CopySource::Git { .. } => "checkout".to_owned(),
        };
        parts.add(format!("source {}", at + 1), text);
    }
    parts.add("destination", &op.dest);
    parts.add("--chown", op.owner.as_deref().unwrap_or_default());
    parts.add("--chmod", op.chmod.as_ref().map(|mode| format!("{mode:?}")).unwrap_or_default());
    parts.add("--exclude", op.excludes.join("\n"));
    parts.add("--link", op.link.to_string());
    parts.add("--parents", op.parents.to_string());
    parts.add("--unpack", format!("{:?}", op.unpack));
}

fn hex(bytes: &[u8; 32]) -> String {
    crate::plan::cache_key::Key(*bytes).hex()
}
