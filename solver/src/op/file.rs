//! COPY, ADD and WORKDIR as vertices: what they select is the key, the changeset is the layer.
//!
//! Carrying one of these out only computes: nothing is written until somebody wants the layer's tree or blob. That is
//! why a layer from the cache that has neither can be had again from its [`Recipe`].

use crate::context::{self, Context, ContextError, DigestCache, FoundKeys};
use crate::key_patterns::KeyKind;
use crate::op::copy::{self, CopyInput};
use crate::op::unpacked::{self, UnpackError};
use crate::plan::cache_key::Parts;
use crate::registry::http::HttpFile;
use crate::snapshot::{Snapshot, SnapshotError, Workspace};
use crate::store::Store;
use crate::tree::{ContentDigest, Entry, Kind, Node, OnDisk, Origin, Part, Tree, index};
use nacre_frontend::llb::{CopyOp, CopySource, MkdirOp};
use std::convert::Infallible;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

/// Result of a vertex.
#[derive(Clone)]
pub enum Value {
    /// A stack of layers.
    Snapshot(Snapshot),
    /// A directory of the caller.
    Context(Arc<LocalContext>),
    /// A fetched file.
    File(Arc<Download>),
    /// A checkout of a git repository, read in place.
    Checkout(Arc<Tree>),
}

/// A directory of the caller with the digests that are known of it, or files that come from elsewhere.
pub struct LocalContext {
    directory: Option<(Context, Mutex<DigestCache>)>,
    /// What it holds when it is no directory.
    tree: Arc<Tree>,
}

impl LocalContext {
    /// `digests` is where digests of its files are kept between builds.
    pub fn new(context: Context, digests: DigestCache) -> Self {
        Self { directory: Some((context, Mutex::new(digests))), tree: Arc::default() }
    }

    /// A context of these files, whose digests are known.
    pub fn of_tree(tree: Arc<Tree>) -> Self {
        Self { directory: None, tree }
    }

    /// The directory and what it leaves out; `None` for files from an archive or a repository.
    pub fn context(&self) -> Option<&Context> {
        self.directory.as_ref().map(|(context, _)| context)
    }

    /// All files that are not ignored, without digests.
    pub fn tree(&self) -> Result<Arc<Tree>, ContextError> {
        Ok(match &self.directory {
            Some((context, _)) => context.tree()?.clone(),
            None => self.tree.clone(),
        })
    }

    /// Fills in the digests of its files that have none. False if one was not as it was walked: times and capabilities are filled
    /// in, too. After an error the tree is of no use.
    pub fn digest(&self, tree: &mut Tree) -> Result<bool, ContextError> {
        let Some((context, digests)) = &self.directory else { return Ok(true) };
        let mut digests = digests.lock().unwrap_or_else(PoisonError::into_inner);
        context::digest_files(tree, context, &mut digests)
    }

    /// Bytes of the files of the directory among these whose digests are not known, and of all.
    fn unread(&self, tree: &Tree) -> Result<(u64, u64), ContextError> {
        let Some((context, digests)) = &self.directory else { return Ok((0, 0)) };
        let mut digests = digests.lock().unwrap_or_else(PoisonError::into_inner);
        context::unread_bytes(tree, context, &mut digests)
    }

    /// Remembers the digests, by the files' numbers in `tree`, of those files that lie in the directory; reading them began at
    /// `started`.
    fn learn(&self, tree: &Tree, read: &[(usize, ContentDigest)], keys: &FoundKeys, started: SystemTime) {
        let Some((context, digests)) = &self.directory else { return };
        digests.lock().unwrap_or_else(PoisonError::into_inner).learn_read(tree, read, context, keys, started);
    }

    /// Files among these that hold keys, by their paths in the directory. Their digests must be known.
    fn keys_in(&self, tree: &Tree) -> Vec<(String, KeyKind)> {
        let Some((context, digests)) = &self.directory else { return Vec::new() };
        let digests = digests.lock().unwrap_or_else(PoisonError::into_inner);
        if digests.has_no_keys() {
            return Vec::new();
        }
        let found = tree.iter().filter_map(|node| {
            let Origin::File(file) = &node.origin else { return None };
            let key = digests.key_in(&file.whole()).filter(|_| context.holds(file))?;
            Some((String::from_utf8_lossy(&file.path).into_owned(), key))
        });
        found.collect()
    }

    /// Keeps what was learned for the next build.
    pub fn save(&self) -> Result<(), ContextError> {
        match &self.directory {
            Some((_, digests)) => digests.lock().unwrap_or_else(PoisonError::into_inner).save(),
            None => Ok(()),
        }
    }
}

/// A fetched file; as a context, what it holds.
pub struct Download {
    /// The file.
    pub file: HttpFile,
    /// When it was fetched: the time of what has none.
    now: (i64, u32),
    tree: Mutex<Option<Arc<Tree>>>,
}

impl Download {
    /// A file that was fetched at `now`.
    pub fn new(file: HttpFile, now: (i64, u32)) -> Self {
        Self { file, now, tree: Mutex::new(None) }
    }

    /// The file as a node: mode 0600 and the server's date, as BuildKit has it.
    fn node(&self) -> Node {
        let mtime = self.file.last_modified.map_or(self.now, |seconds| (seconds, 0));
        unpacked::file_node(&self.file.path, self.file.size_bytes, mtime)
    }

    /// As a file tree: what is in it when it is an archive, else the file itself. Unpacked once.
    pub fn tree(&self, store: &Store) -> Result<Arc<Tree>, UnpackError> {
        let mut tree = self.tree.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tree) = &*tree {
            return Ok(tree.clone());
        }
        let name = Some(self.file.file_name.as_str()).filter(|name| !name.is_empty()).unwrap_or("download");
        let made = Arc::new(unpacked::tree_of(self.node(), name, store, self.now)?);
        Ok(tree.insert(made).clone())
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
    /// The files that a copy selects: those of contexts may have no digest yet.
    pub(crate) fn select(&self, workspace: &Workspace) -> Result<Option<Tree>, SnapshotError> {
        let FileOp::Copy(op) = &self.op else { return Ok(None) };
        // On an empty destination, as plain files and without look-up of names: what is left is the selection.
        let bare = CopyOp { owner: None, unpack: Some(false), ..(**op).clone() };
        self.copy(&bare, &Tree::default(), workspace).map(Some)
    }

    /// The key's parts. The selected files get their digests.
    pub(crate) fn parts(&self, selection: Option<&mut Tree>) -> Result<Parts, SnapshotError> {
        let mut parts = Parts::default();
        match &self.op {
            FileOp::Mkdir(op) => {
                parts.add("op", "mkdir");
                parts.add("path", &op.path);
                parts.add("user", &op.user);
            }
            FileOp::Copy(op) => {
                describe(op, &mut parts);
                if let Some(selection) = selection {
                    self.digest(selection)?;
                    parts.add("files", hex(&index::content_key(selection)));
                }
            }
        }
        Ok(parts)
    }

    /// The key's parts with the content of whole stages in place of the selected files: they can be had without a look
    /// at any file. `None` when something else than stages is copied from.
    pub fn parts_of_inputs(&self) -> Option<Parts> {
        let FileOp::Copy(op) = &self.op else { return None };
        let mut parts = Parts::default();
        describe(op, &mut parts);
        for (at, value) in self.inputs.iter().enumerate().skip(1) {
            let Some(Value::Snapshot(snapshot)) = value else { return None };
            parts.add(format!("stage {at}"), snapshot.content().hex());
        }
        for (at, source) in op.sources.iter().enumerate() {
            match source {
                CopySource::Tree { input, .. } => parts.add(format!("source {} of stage", at + 1), input.to_string()),
                _ => return None,
            }
        }
        Some(parts)
    }

    /// Files of directories among those that were selected that look as if they hold keys: path there, and what it is.
    /// Known for what [`Recipe::parts`] gave.
    pub fn keys_in(&self, selection: &Tree) -> Vec<(String, KeyKind)> {
        let mut found: Vec<_> = self.locals().flat_map(|local| local.keys_in(selection)).collect();
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Whether the selected files of [`Recipe::parts`] are the layer: nothing is unpacked, they keep their owners, and what
    /// they are copied onto is empty or does not count.
    pub fn selects_layer(&self, workspace: &Workspace) -> Result<bool, SnapshotError> {
        Ok(match &self.op {
            FileOp::Copy(op) if op.owner.is_none() && !op.unpack.unwrap_or(op.add) => {
                self.destination(workspace)?.is_empty()
            }
            _ => false,
        })
    }

    /// What is changed, as far as it counts.
    fn destination(&self, workspace: &Workspace) -> Result<Arc<Tree>, SnapshotError> {
        match &self.op {
            // Names of users are looked up in the destination even by an independent copy.
            FileOp::Copy(op) if op.link && op.owner.is_none() => Ok(Arc::default()),
            _ => workspace.flatten(&self.parent),
        }
    }

    /// The layer: changed entries and their parents, digests filled in.
    pub fn carry_out(&self, workspace: &Workspace) -> Result<Tree, SnapshotError> {
        let mut layer = self.undigested(workspace)?;
        self.digest(&mut layer)?;
        Ok(layer)
    }

    /// The layer: of files that lie in contexts or elsewhere on disk, the digests are not filled in.
    pub(crate) fn undigested(&self, workspace: &Workspace) -> Result<Tree, SnapshotError> {
        let independent = matches!(&self.op, FileOp::Copy(op) if op.link);
        let dest = self.destination(workspace)?;
        let changes = match &self.op {
            FileOp::Copy(op) => self.copy(op, &dest, workspace)?,
            FileOp::Mkdir(op) => copy::mkdir(op, &dest, self.now, &|node| workspace.read_small(node))?,
        };
        Ok(if independent { changes } else { copy::with_parents(changes, &dest) })
    }

    /// Bytes of the files among these whose digests are not known, and of all: of what a COPY takes out of contexts. `None` for
    /// everything else.
    pub(crate) fn unread(&self, selection: &Tree) -> Result<Option<(u64, u64)>, ContextError> {
        match &self.op {
            FileOp::Copy(op) if !op.unpack.unwrap_or(op.add) => {}
            _ => return Ok(None),
        }
        let (mut unread, mut all) = (0, 0);
        for local in self.locals() {
            let counted = local.unread(selection)?;
            (unread, all) = (unread + counted.0, all + counted.1);
        }
        Ok(Some((unread, all)))
    }

    /// Opens a file of a context that has not been read: `None` for what lies elsewhere. See [`Context::open_unread`].
    pub(crate) fn open_unread(&self, node: &Node, keys: &FoundKeys) -> Option<io::Result<Box<dyn Read + Send>>> {
        let (context, file) = self.in_context(node)?;
        Some(context.open_unread(&node.entry, file, keys).map(|file| Box::new(file) as Box<dyn Read + Send>))
    }

    /// The file that [`Self::open_unread`] would read, not to be read.
    pub(crate) fn open_ahead(&self, node: &Node) -> Option<OwnedFd> {
        let (context, file) = self.in_context(node)?;
        context.open_walked(file).ok()
    }

    fn in_context<'a>(&'a self, node: &'a Node) -> Option<(&'a Context, &'a OnDisk)> {
        let Origin::File(file) = &node.origin else { return None };
        let context = self.locals().find_map(|local| local.context().filter(|context| context.holds(file)))?;
        Some((context, file))
    }

    /// Takes in the digests, by the files' numbers, ascending, that were found when files were read by way of [`Self::open_unread`], and
    /// fills in those that are left. False if what is left turned out to be something else than the tree says.
    pub(crate) fn learn(
        &self,
        tree: &mut Tree,
        digests: Vec<(usize, ContentDigest)>,
        keys: FoundKeys,
        started: SystemTime,
    ) -> Result<bool, ContextError> {
        for local in self.locals() {
            local.learn(tree, &digests, &keys, started);
        }
        let begin = |part: &Part<'_>| {
            let first = part.first();
            (first, digests.partition_point(|(number, _)| *number < first))
        };
        let fill_in = |(number, next): &mut (usize, usize), entry: &mut Entry, origin: &mut Origin| {
            if let (Some((at, found)), Kind::File { digest, .. }) = (digests.get(*next), &mut entry.kind)
                && at == number
            {
                *digest = Some(*found);
                if let Origin::File(file) = origin {
                    file.inode = None;
                }
                *next += 1;
            }
            *number += 1;
            Ok::<(), Infallible>(())
        };
        let Ok(_) = tree.update(begin, fill_in, |_| ());
        drop(digests);
        // Without content, or another name of a file that was read.
        self.digest(tree)
    }

    /// The contexts among the inputs.
    fn locals(&self) -> impl Iterator<Item = &Arc<LocalContext>> {
        self.inputs.iter().flatten().filter_map(|value| match value {
            Value::Context(local) => Some(local),
            _ => None,
        })
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
                Some(Value::File(file)) if is_fetched(op, at) => Owned::File(Box::new(file.node())),
                Some(Value::File(file)) => Owned::Context(file.tree(&workspace.store)?),
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
        let staging = if unpacks { workspace.store.begin_tree()? } else { std::path::PathBuf::new() };
        Ok(copy::copy(op, &inputs, dest, &staging, self.now, &read)?)
    }

    /// Fills in digests. False if a file of a context was not as it was walked.
    fn digest(&self, tree: &mut Tree) -> Result<bool, ContextError> {
        let mut as_walked = true;
        for local in self.locals() {
            as_walked &= local.digest(tree)?;
        }
        digest_uncached(tree)?;
        Ok(as_walked)
    }
}

/// Is this input what ADD fetches? Else it is a context, whose files are copied.
fn is_fetched(op: &CopyOp, at: usize) -> bool {
    op.sources.iter().any(|source| matches!(source, CopySource::Http { input, .. } if *input == at))
}

/// Trees that a copy borrows.
enum Owned {
    Snapshot(Arc<Tree>),
    Context(Arc<Tree>),
    File(Box<Node>),
}

/// Fills in the digests of what lies on disk and belongs to no context: downloads, checkouts, and what archives held. Their times
/// are not those of the files that hold their bytes. After an error the tree is of no use.
pub(crate) fn digest_uncached(tree: &mut Tree) -> Result<(), ContextError> {
    if tree.unread() == 0 {
        return Ok(());
    }
    let one = |(): &mut (), entry: &mut Entry, origin: &mut Origin| -> Result<(), ContextError> {
        let (Origin::File(file), Kind::File { digest: digest @ None, .. }) = (origin, &mut entry.kind) else {
            return Ok(());
        };
        let mut hasher = blake3::Hasher::new();
        let path = file.whole();
        let read = std::fs::File::open(&path).and_then(|file| Ok(hasher.update_reader(file)?.finalize()));
        let found = read.map_err(|source| ContextError::ReadFile { path, source })?;
        *digest = Some(*found.as_bytes());
        Ok(())
    };
    tree.update(|_| (), one, |()| ()).map(drop)
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
