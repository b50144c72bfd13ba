//! COPY, ADD and WORKDIR: which entries they put where, worked out on trees without touching a file.
//!
//! The rules are those BuildKit shows. For every source that a pattern gives:
//!
//! 1. The destination is resolved as in a chroot, its last component too: a symlink to a file is written through.
//! 2. With a slash at its end the destination is made, without one its parent: mode 0755, or an octal `--chmod`.
//! 3. A directory's *content* is copied; its own mode and owner are not. A file goes into an existing directory under
//!    its name, or becomes the destination.
//! 4. Below that, directories merge and take the source's metadata, other entries replace what is no directory, and
//!    a directory never replaces something else, nor the reverse.
//!
//! Archives (ADD) follow tar's rules instead: links are followed inside the directory they are unpacked into, and
//! entries replace whatever they meet, but directories merge.
//!
//! With `--link` all of this happens on an empty tree. The result is a changeset whose files may have no digest yet.

use super::changes::{Changes, Look, shown};
pub use super::changes::{with_parents, without_unchanged};
use super::passwd::{self, Owner};
use crate::scan::is_kept_xattr;
use crate::tree::archive::{self, ArchiveError};
use crate::tree::glob::{self, Glob};
use crate::tree::ignore::{IgnoreError, Matcher, Verdict};
use crate::tree::layer::Limits;
use crate::tree::{ContentDigest, Entry, Kind, Node, Origin, Resolved, Tree, file_name, is_within, join, parent};
use nacre_frontend::llb::{CopyOp, CopySource, MkdirOp};
use nacre_frontend::mode::ModeChange;
use std::cell::OnceCell;
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a vertex's input is to a copy.
#[derive(Debug, Clone, Copy)]
pub enum CopyInput<'a> {
    /// A directory from outside of the graph, or a checkout: everything in it belongs to root.
    Context(&'a Tree),
    /// The file system of a stage or an image.
    Snapshot(&'a Tree),
    /// One fetched file, with mode and time; its path and owner do not matter.
    File(&'a Node),
}

/// Reads a file of the destination.
pub type ReadFile<'a> = dyn Fn(&Node) -> io::Result<Vec<u8>> + 'a;

/// Why a copy is not possible.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// A source that is no pattern, or the directory of a pattern, does not exist.
    #[error("{path}: not found")]
    NotFound {
        /// Path in the source.
        path: String,
        /// Position of the source in the vertex's inputs.
        input: usize,
    },
    /// A source pattern that is none.
    #[error("syntax error in pattern `{pattern}`")]
    BadPattern {
        /// As written.
        pattern: String,
    },
    /// An `--exclude` pattern that is none.
    #[error("invalid exclude pattern")]
    BadExclude(#[from] IgnoreError),
    /// More than 255 symlinks on the way.
    #[error("too many links in {path}")]
    TooManyLinks {
        /// Path that was to be resolved.
        path: String,
    },
    /// Something other than a directory where one is needed.
    #[error("{path}: not a directory")]
    NotADirectory {
        /// Path in the destination.
        path: String,
    },
    /// A directory of the source meets something else.
    #[error("cannot copy a directory to {path}, which is not a directory")]
    DirectoryOntoOther {
        /// Path in the destination.
        path: String,
    },
    /// A file of the source meets a directory.
    #[error("cannot replace directory {path} with a file")]
    FileOntoDirectory {
        /// Path in the destination.
        path: String,
    },
    /// A user or group name without a file system to look it up in: on `scratch`, or with `--link`.
    #[error("cannot look up user or group `{name}` without a file system; use numbers")]
    NoUsers {
        /// The name.
        name: String,
    },
    /// `/etc/passwd` or `/etc/group` of the destination cannot be read.
    #[error("cannot read {path}")]
    Users {
        /// Path in the destination.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// An archive cannot be unpacked.
    #[error("cannot unpack {path}")]
    Archive {
        /// Path in the source.
        path: String,
        /// Why.
        source: Box<ArchiveError>,
    },
    /// The directory for what archives hold cannot be used.
    #[error("cannot use {path:?}", path = .path.display())]
    Staging {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The graph names an input that the vertex does not have, or one of another kind.
    #[error("input {input} is no source of this copy")]
    NoInput {
        /// Position in the vertex's inputs.
        input: usize,
    },
}

impl CopyError {
    /// A way out, one sentence, as far as it can be told without looking at files.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            Self::NotFound { .. } => return None,
            Self::BadPattern { .. } => "close `[` with `]`, or write `[[]` for the character itself".to_owned(),
            Self::BadExclude(_) => "exclude patterns are those of .dockerignore".to_owned(),
            Self::TooManyLinks { .. } => "the links lead in a circle: remove one of them in an earlier step".to_owned(),
            Self::NotADirectory { path } => {
                format!("`{path}` is a file in the image: use another path, or remove it first")
            }
            Self::DirectoryOntoOther { path } | Self::FileOntoDirectory { path } => {
                format!("copy to another place, or remove `{path}` in an earlier step")
            }
            Self::NoUsers { .. } => "write numbers, like `--chown=1000:1000`".to_owned(),
            Self::Archive { .. } => "COPY, or ADD --unpack=false, takes the file as it is".to_owned(),
            Self::Users { .. } | Self::Staging { .. } | Self::NoInput { .. } => return None,
        })
    }
}

/// What COPY or ADD puts onto `dest`. `inputs` stand as in the vertex; `staging` is a directory for the content of
/// archives; `now` is the time of directories that are made and of heredocs; `read` reads files of `dest`, and of inputs
/// that are archives.
pub fn copy(
    op: &CopyOp,
    inputs: &[CopyInput<'_>],
    dest: &Tree,
    staging: &Path,
    now: (i64, u32),
    read: &ReadFile<'_>,
) -> Result<Tree, CopyError> {
    // The mode of a file that exists cannot be changed without looking at it, which is how `--chmod` came to turn
    // `--link` off.
    let is_link = op.link && op.chmod.is_none();
    let empty = Tree::default();
    let base = if is_link { &empty } else { dest };
    let owner = op.owner.as_deref().map(|spec| find_owner(spec, base, read)).transpose()?;
    let exclude = match op.excludes.is_empty() {
        true => None,
        false => Some(Matcher::new(&op.excludes)?),
    };
    let is_dir = op.dest.ends_with('/') || op.dest.ends_with("/.") || op.dest == ".";
    let mut copier = Copier {
        changes: Changes::new(base, now),
        dest: clean(op.dest.as_bytes()),
        dest_is_dir: is_dir,
        owner,
        chmod: op.chmod.as_ref(),
        exclude,
        staging,
        archives: 0,
        read,
    };
    let input = |position: usize| inputs.get(position).ok_or(CopyError::NoInput { input: position });
    for source in &op.sources {
        match source {
            CopySource::Tree { input: position, pattern } => {
                let (CopyInput::Context(tree) | CopyInput::Snapshot(tree)) = input(*position)? else {
                    return Err(CopyError::NoInput { input: *position });
                };
                let from = From {
                    tree,
                    input: *position,
                    by_root: matches!(input(*position)?, CopyInput::Context(_)),
                    carriers: Carriers::default(),
                };
                if op.parents {
                    copier.copy_with_parents(&from, pattern)?;
                    continue;
                }
                for path in from.matches(pattern)? {
                    copier.copy_path(&from, &path, None, op.unpack.unwrap_or(op.add))?;
                }
            }
            CopySource::Git { input: position } => {
                let (CopyInput::Context(tree) | CopyInput::Snapshot(tree)) = input(*position)? else {
                    return Err(CopyError::NoInput { input: *position });
                };
                let from = From { tree, input: *position, by_root: true, carriers: Carriers::default() };
                copier.copy_checkout(&from)?;
            }
            CopySource::Http { input: position, name } => {
                let CopyInput::File(node) = input(*position)? else {
                    return Err(CopyError::NoInput { input: *position });
                };
                let mut node = (*node).clone();
                (node.entry.uid, node.entry.gid) = (0, 0);
                copier.copy_single(&node, name.as_bytes(), op.unpack.unwrap_or(false))?;
            }
            CopySource::Inline { name, content } => {
                let bytes = content.as_bytes();
                let entry = Entry {
                    kind: Kind::File {
                        size: bytes.len() as u64,
                        digest: Some(*blake3::hash(bytes).as_bytes()),
                        link_group: 0,
                    },
                    mtime: now,
                    ..Entry::dir(Vec::new(), 0o644)
                };
                let node = Node { entry, origin: Origin::Inline(Arc::from(bytes)) };
                copier.copy_single(&node, file_name(name.as_bytes()), false)?;
            }
        }
    }
    Ok(copier.changes.finish())
}

/// What WORKDIR makes on `dest`: nothing, when the directory exists. What is made belongs to the user in force.
pub fn mkdir(op: &MkdirOp, dest: &Tree, now: (i64, u32), read: &ReadFile<'_>) -> Result<Tree, CopyError> {
    let mut changes = Changes::new(dest, now);
    let path = changes.resolve(b"", &clean(op.path.as_bytes()))?;
    if !changes.look(&path).is_dir() {
        // Without USER nobody owns it, so that it can have the group of a set-group-id directory.
        let owner = if op.user.is_empty() { None } else { Some(find_owner(&op.user, dest, read)?) };
        changes.make_dirs(&path, 0o755, owner)?;
    }
    Ok(changes.finish())
}

/// Who `spec` is in `dest`.
fn find_owner(spec: &str, dest: &Tree, read: &ReadFile<'_>) -> Result<Owner, CopyError> {
    let Some(name) = passwd::name_to_look_up(spec) else { return Ok(passwd::lookup(b"", b"", spec)) };
    if !dest.has_content(b"") {
        return Err(CopyError::NoUsers { name: name.to_owned() });
    }
    let contents = |path: &'static str| -> Result<Vec<u8>, CopyError> {
        let Resolved::Found(found) = dest.resolve(path.as_bytes(), true) else { return Ok(Vec::new()) };
        match dest.get(&found) {
            Some(node) if node.entry.is_file() => read(&Carriers::default().complete(dest, &node))
                .map_err(|source| CopyError::Users { path: shown(path.as_bytes()), source }),
            _ => Ok(Vec::new()),
        }
    };
    Ok(passwd::lookup(&contents("etc/passwd")?, &contents("etc/group")?, spec))
}

/// Where the content of a tree's hard links is: of a group only one has to know.
#[derive(Default)]
struct Carriers(OnceCell<HashMap<u32, (Origin, Option<ContentDigest>)>>);

impl Carriers {
    /// The node, with an origin and a digest if any name of its inode has them, and without its path: it gets another.
    fn complete(&self, tree: &Tree, node: &Node) -> Node {
        let Node { entry: Entry { path: _, kind, mode, uid, gid, mtime, xattrs }, origin } = node;
        let (path, kind, xattrs) = (Vec::new(), kind.clone(), xattrs.clone());
        let entry = Entry { path, kind, mode: *mode, uid: *uid, gid: *gid, mtime: *mtime, xattrs };
        let mut node = Node { entry, origin: origin.clone() };
        let Kind::File { link_group: group @ 1.., digest, .. } = &mut node.entry.kind else { return node };
        // What lies on disk is digested there.
        if matches!(node.origin, Origin::File(_)) || node.origin != Origin::None && digest.is_some() {
            return node;
        }
        let all = self.0.get_or_init(|| {
            let mut all: HashMap<u32, (Origin, Option<ContentDigest>)> = HashMap::new();
            let mut cursor = tree.cursor();
            while let Some(node) = cursor.next() {
                if let Kind::File { link_group: group @ 1.., digest, .. } = node.entry.kind {
                    let known = all.entry(group).or_insert_with(|| (node.origin.clone(), digest));
                    if known.0 == Origin::None {
                        known.0 = node.origin.clone();
                    }
                    known.1 = known.1.or(digest);
                }
            }
            all
        });
        if let Some((origin, known)) = all.get(group) {
            *digest = digest.or(*known);
            if node.origin == Origin::None {
                node.origin = origin.clone();
            }
        }
        node
    }
}

/// Cleans a path lexically: relative to the root, without empty, `.` and `..` components.
fn clean(path: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join(&b'/')
}

/// A tree that is copied from.
struct From<'a> {
    tree: &'a Tree,
    input: usize,
    /// Everything in it belongs to root.
    by_root: bool,
    carriers: Carriers,
}

impl From<'_> {
    /// Paths that a source stands for, symlinks not followed yet. A pattern may stand for nothing.
    fn matches(&self, pattern: &str) -> Result<Vec<Vec<u8>>, CopyError> {
        let cleaned = clean(pattern.as_bytes());
        let parts: Vec<&[u8]> = cleaned.split(|&byte| byte == b'/').collect();
        let Some(first) = parts.iter().position(|part| glob::has_meta(part)) else { return Ok(vec![cleaned]) };
        let bad = |_| CopyError::BadPattern { pattern: pattern.to_owned() };
        let glob = Glob::new(&parts[first..].join(&b'/')).map_err(bad)?;
        let base = self.resolve(&parts[..first].join(&b'/'))?;
        let skip = if base.is_empty() { 0 } else { base.len() + 1 };
        let depth = parts.len() - first;
        let mut matches = Vec::new();
        let mut cursor = self.tree.cursor_within(&base);
        while let Some(node) = cursor.next() {
            let Some(relative) = node.entry.path.get(skip..).filter(|relative| !relative.is_empty()) else { continue };
            let slashes = relative.iter().filter(|&&byte| byte == b'/').count();
            if slashes + 1 == depth && glob.matches(relative) {
                matches.push(node.entry.path.clone());
            }
        }
        Ok(matches)
    }

    /// Follows symlinks inside the tree.
    fn resolve(&self, path: &[u8]) -> Result<Vec<u8>, CopyError> {
        match self.tree.resolve(path, true) {
            Resolved::Found(found) => Ok(found),
            Resolved::Loop => Err(CopyError::TooManyLinks { path: shown(path) }),
            Resolved::Missing(_) | Resolved::NotADirectory(_) => {
                Err(CopyError::NotFound { path: shown(path), input: self.input })
            }
        }
    }

    /// A node ready to be copied: with content, and an owner that counts, but no path yet.
    fn take(&self, node: &Node) -> Node {
        let mut node = self.carriers.complete(self.tree, node);
        if self.by_root {
            (node.entry.uid, node.entry.gid) = (0, 0);
        }
        node
    }
}

/// A directory of the source whose content is being copied.
struct Level {
    /// Path below the top of the source.
    path: Vec<u8>,
    /// It exists in the destination.
    made: bool,
    owner: Owner,
    included: Verdict,
    excluded: Verdict,
}

struct Copier<'a> {
    changes: Changes<'a>,
    dest: Vec<u8>,
    /// The destination ends in a slash.
    dest_is_dir: bool,
    owner: Option<Owner>,
    chmod: Option<&'a ModeChange>,
    exclude: Option<Matcher>,
    staging: &'a Path,
    /// Archives unpacked so far.
    archives: usize,
    read: &'a ReadFile<'a>,
}

/// New numbers of hard-link groups, by their numbers in the source.
type Groups = HashMap<u32, u32>;

impl Copier<'_> {
    /// `--parents`: the pattern is matched against paths below the pivot, which is where `/./` stands, and the part of
    /// the path that it matches is kept.
    fn copy_with_parents(&mut self, from: &From<'_>, source: &str) -> Result<(), CopyError> {
        let (pivot, pattern) = source.split_once("/./").unwrap_or(("/", source));
        let pattern = clean(pattern.as_bytes());
        let is_literal = |text: &[u8]| !text.split(|&byte| byte == b'/').any(glob::has_meta);
        if is_literal(&pattern) && is_literal(pivot.as_bytes()) {
            let whole = join(&clean(pivot.as_bytes()), &pattern);
            from.resolve(&whole)?;
        }
        let include = Matcher::new([String::from_utf8_lossy(&pattern)])
            .map_err(|_| CopyError::BadPattern { pattern: source.to_owned() })?;
        for path in from.matches(pivot)? {
            self.copy_path(from, &path, Some(&include), false)?;
        }
        Ok(())
    }

    /// Copies one path of a tree: a file, or the content of a directory.
    fn copy_path(
        &mut self,
        from: &From<'_>,
        path: &[u8],
        include: Option<&Matcher>,
        unpack: bool,
    ) -> Result<(), CopyError> {
        let resolved = from.resolve(path)?;
        let Some(node) = from.tree.get(&resolved).filter(|node| !node.entry.is_dir()) else {
            let target = self.prepare()?;
            if !self.changes.look(&target).exists() {
                self.changes.make_dirs(&target, self.mode_of_new_dirs(), self.owner)?;
            }
            return self.copy_content(from, &resolved, &target, include);
        };
        self.copy_single(&from.take(&node), file_name(path), unpack)
    }

    /// Copies a checkout. Its top directory keeps its own metadata when it is made here.
    fn copy_checkout(&mut self, from: &From<'_>) -> Result<(), CopyError> {
        let target = self.prepare()?;
        if !self.changes.look(&target).exists() {
            self.changes.make_dirs(parent(&target), 0o755, self.owner)?;
            match from.tree.get(b"") {
                Some(node) => self.put(from.take(&node), target.clone()),
                None => self.changes.make_dirs(&target, 0o755, self.owner)?,
            }
        }
        self.copy_content(from, b"", &target, None)
    }

    /// Copies one file, or unpacks it.
    fn copy_single(&mut self, node: &Node, name: &[u8], unpack: bool) -> Result<(), CopyError> {
        if unpack
            && node.entry.is_file()
            && let Some(tree) = self.open_archive(node, name)?
        {
            return self.put_archive(tree);
        }
        let mut target = self.prepare()?;
        if self.changes.look(&target).is_dir() {
            target = join(&target, name);
        }
        self.changes.make_dirs(parent(&target), 0o755, self.owner)?;
        self.put_file(node.clone(), target, &mut Groups::new())
    }

    /// Mode of directories that nothing in the sources stands for.
    fn mode_of_new_dirs(&self) -> u32 {
        match self.chmod {
            Some(ModeChange::Octal(mode)) => mode & 0o777,
            _ => 0o755,
        }
    }

    /// Makes the directory that must exist for the destination, and returns what the destination is.
    fn prepare(&mut self) -> Result<Vec<u8>, CopyError> {
        let mode = self.mode_of_new_dirs();
        let dir = if self.dest_is_dir { &self.dest[..] } else { parent(&self.dest) };
        let dir = self.changes.resolve(b"", dir)?;
        self.changes.make_dirs(&dir, mode, self.owner)?;
        self.changes.resolve(b"", &self.dest)
    }

    /// Copies what is in a directory into `target`.
    fn copy_content(
        &mut self,
        from: &From<'_>,
        top: &[u8],
        target: &[u8],
        include: Option<&Matcher>,
    ) -> Result<(), CopyError> {
        if !self.changes.look(target).is_dir() {
            return Err(CopyError::DirectoryOntoOther { path: shown(target) });
        }
        let exclude = self.exclude.take();
        let result = self.copy_levels(from, top, target, include, exclude.as_ref());
        self.exclude = exclude;
        result
    }

    fn copy_levels(
        &mut self,
        from: &From<'_>,
        top: &[u8],
        target: &[u8],
        include: Option<&Matcher>,
        exclude: Option<&Matcher>,
    ) -> Result<(), CopyError> {
        let root = |matcher: Option<&Matcher>| matcher.map(Matcher::root).unwrap_or_default();
        let mut groups = Groups::new();
        let mut levels = vec![Level {
            path: Vec::new(),
            made: true,
            owner: Owner::default(),
            included: root(include),
            excluded: root(exclude),
        }];
        let skip = if top.is_empty() { 0 } else { top.len() + 1 };
        let mut below = from.tree.cursor_within(top);
        while let Some(node) = below.next() {
            let Some(path) = node.entry.path.get(skip..).filter(|path| !path.is_empty()) else { continue };
            while levels.len() > 1 && levels.last().is_some_and(|level| !is_within(path, &level.path)) {
                levels.pop();
            }
            // Directories without an entry of their own, and at the end the node itself.
            let above = levels.last().map_or(0, |level| level.path.len());
            let from_here = if above == 0 { 0 } else { above + 1 };
            let whole = path;
            for end in (from_here..=whole.len()).filter(|&at| at == whole.len() || whole[at] == b'/') {
                let Some(level) = levels.last() else { continue };
                let path = &whole[..end];
                let judge = |matcher: Option<&Matcher>, verdict: &Verdict| {
                    matcher.map(|matcher| matcher.verdict(verdict, path)).unwrap_or_default()
                };
                let included = judge(include, &level.included);
                let excluded = judge(exclude, &level.excluded);
                let selected = (include.is_none() || included.excluded()) && !excluded.excluded();
                let is_node = end == whole.len();
                let node = if is_node {
                    from.take(node)
                } else {
                    Node { entry: Entry::dir(join(top, path), 0o755), origin: Origin::None }
                };
                let (is_dir, owner) = (node.entry.is_dir(), Owner { uid: node.entry.uid, gid: node.entry.gid });
                if selected {
                    self.make_levels(&mut levels, target)?;
                    let target = join(target, path);
                    match is_dir {
                        true => self.merge_dir(node, target)?,
                        false => self.put_file(node, target, &mut groups)?,
                    }
                }
                if is_dir {
                    levels.push(Level { path: path.to_vec(), made: selected, owner, included, excluded });
                }
            }
        }
        Ok(())
    }

    /// Makes the directories on the way to something that is selected, which were not selected themselves.
    fn make_levels(&mut self, levels: &mut [Level], target: &[u8]) -> Result<(), CopyError> {
        for level in levels.iter_mut().filter(|level| !level.made) {
            level.made = true;
            let path = join(target, &level.path);
            let look = self.changes.look(&path);
            if look.is_dir() {
                continue;
            }
            if look.exists() {
                return Err(CopyError::DirectoryOntoOther { path: shown(&path) });
            }
            self.changes.put_dir(&path, self.mode_of_new_dirs(), self.owner.unwrap_or(level.owner));
        }
        Ok(())
    }

    fn merge_dir(&mut self, node: Node, target: Vec<u8>) -> Result<(), CopyError> {
        let look = self.changes.look(&target);
        if look.exists() && !look.is_dir() {
            return Err(CopyError::DirectoryOntoOther { path: shown(&target) });
        }
        self.put(node, target);
        Ok(())
    }

    fn put_file(&mut self, mut node: Node, target: Vec<u8>, groups: &mut Groups) -> Result<(), CopyError> {
        if self.changes.look(&target).is_dir() {
            return Err(CopyError::FileOntoDirectory { path: shown(&target) });
        }
        self.regroup(&mut node, groups);
        self.put(node, target);
        Ok(())
    }

    /// Gives hard links that are copied together a group of their own.
    fn regroup(&mut self, node: &mut Node, groups: &mut Groups) {
        if let Kind::File { link_group: group @ 1.., .. } = &mut node.entry.kind {
            *group = *groups.entry(*group).or_insert_with(|| self.changes.new_group());
        }
    }

    /// Puts a node with the metadata that the instruction asks for.
    fn put(&mut self, mut node: Node, target: Vec<u8>) {
        let entry = &mut node.entry;
        if let (Some(chmod), false) = (self.chmod, matches!(entry.kind, Kind::Symlink { .. })) {
            entry.mode = chmod.apply(entry.mode, entry.is_dir());
        }
        self.put_owned(node, target);
    }

    fn put_owned(&mut self, mut node: Node, target: Vec<u8>) {
        if let Some(owner) = self.owner {
            (node.entry.uid, node.entry.gid) = (owner.uid, owner.gid);
        }
        node.entry.path = target;
        node.entry.xattrs.retain(|name, _| is_kept_xattr(name));
        self.changes.put(node);
    }

    /// What an archive holds; `None` for a file that is none.
    fn open_archive(&mut self, node: &Node, name: &[u8]) -> Result<Option<Tree>, CopyError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| CopyError::Staging { path, source }
        };
        let dir = self.staging.join(self.archives.to_string());
        let stored = self.staging.join(format!("{}.archive", self.archives));
        let path = match &node.origin {
            Origin::File(file) => file.whole(),
            Origin::Inline(bytes) => {
                std::fs::write(&stored, bytes).map_err(failed(&stored))?;
                stored
            }
            Origin::None | Origin::Layer(..) => {
                let bytes = (self.read)(node).map_err(failed(&stored))?;
                std::fs::write(&stored, bytes).map_err(failed(&stored))?;
                stored
            }
        };
        std::fs::create_dir(&dir).map_err(failed(&dir))?;
        self.archives += 1;
        archive::unpack(&path, &dir, &Limits::default()).map_err(|source| CopyError::Archive {
            path: String::from_utf8_lossy(name).into_owned(),
            source: Box::new(source),
        })
    }

    /// Unpacks into the destination, which is made a directory.
    fn put_archive(&mut self, archive: Tree) -> Result<(), CopyError> {
        let top = self.changes.resolve(b"", &self.dest)?;
        self.changes.make_dirs(&top, 0o755, self.owner)?;
        let (mut groups, carriers) = (Groups::new(), Carriers::default());
        let mut cursor = archive.cursor();
        while let Some(node) = cursor.next() {
            if node.entry.path.is_empty() {
                continue;
            }
            let above = self.changes.resolve(&top, parent(&node.entry.path))?;
            self.changes.make_dirs(&above, 0o755, None)?;
            let target = join(&above, file_name(&node.entry.path));
            let mut node = carriers.complete(&archive, node);
            let merges = self.changes.look(&target).is_dir() && node.entry.is_dir();
            if !merges && !matches!(self.changes.look(&target), Look::Nothing) {
                self.changes.make_way(&target);
            }
            self.regroup(&mut node, &mut groups);
            self.put_owned(node, target);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tree from words: `dir/`, `file=content`, `link->target`, `fifo|`, each followed by `,mode`, `,uid:gid` or
    /// `,#group` where it differs from 755 or 644, 0:0 and none.
    fn tree(words: &str) -> Tree {
        let node = |word: &str| {
            let mut attributes = word.split(',');
            let what = attributes.next().unwrap();
            let mut entry = Entry { mtime: (1, 0), ..Entry::dir(Vec::new(), 0o755) };
            let mut origin = Origin::None;
            let path = if let Some((path, target)) = what.split_once("->") {
                entry.kind = Kind::Symlink { target: target.into() };
                entry.mode = 0o777;
                path
            } else if let Some((path, content)) = what.split_once('=') {
                let digest = Some(*blake3::hash(content.as_bytes()).as_bytes());
                entry.kind = Kind::File { size: content.len() as u64, digest, link_group: 0 };
                entry.mode = 0o644;
                origin = Origin::Inline(content.as_bytes().into());
                path
            } else if let Some(path) = what.strip_suffix('|') {
                entry.kind = Kind::Fifo;
                entry.mode = 0o644;
                path
            } else {
                what.strip_suffix('/').unwrap()
            };
            entry.path = path.into();
            for attribute in attributes {
                match (attribute.split_once(':'), attribute.strip_prefix('#'), &mut entry.kind) {
                    (Some((uid, gid)), ..) => (entry.uid, entry.gid) = (uid.parse().unwrap(), gid.parse().unwrap()),
                    (_, Some(group), Kind::File { link_group, .. }) => *link_group = group.parse().unwrap(),
                    _ => entry.mode = u32::from_str_radix(attribute, 8).unwrap(),
                }
            }
            Node { entry, origin }
        };
        Tree::from_nodes(words.split_whitespace().map(node).collect())
    }

    fn words(tree: &Tree) -> String {
        let word = |node: &Node| {
            let path = String::from_utf8_lossy(&node.entry.path).into_owned();
            let (mut word, usual) = match &node.entry.kind {
                Kind::Dir { opaque: true } => (format!("{path}/opaque"), 0o755),
                Kind::Dir { .. } => (format!("{path}/"), 0o755),
                Kind::Symlink { target } => (format!("{path}->{}", String::from_utf8_lossy(target)), 0o777),
                Kind::File { .. } => match &node.origin {
                    Origin::Inline(bytes) => (format!("{path}={}", String::from_utf8_lossy(bytes)), 0o644),
                    Origin::File(file) => (format!("{path}={}", std::fs::read_to_string(file.whole()).unwrap()), 0o644),
                    other => panic!("{other:?}"),
                },
                _ => (format!("{path}|"), 0o644),
            };
            if node.entry.mode != usual {
                word += &format!(",{:o}", node.entry.mode);
            }
            if (node.entry.uid, node.entry.gid) != (0, 0) {
                word += &format!(",{}:{}", node.entry.uid, node.entry.gid);
            }
            match node.entry.kind {
                Kind::File { link_group: group @ 1.., .. } => word + &format!(",#{group}"),
                _ => word,
            }
        };
        tree.nodes().iter().map(word).collect::<Vec<_>>().join(" ")
    }

    fn read(node: &Node) -> io::Result<Vec<u8>> {
        match &node.origin {
            Origin::Inline(bytes) => Ok(bytes.to_vec()),
            Origin::File(file) => std::fs::read(file.whole()),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// An instruction as in a Dockerfile; `<name=content` is a heredoc.
    fn instruction(text: &str) -> CopyOp {
        let mut op = CopyOp {
            add: text.starts_with("ADD"),
            sources: Vec::new(),
            dest: String::new(),
            owner: None,
            chmod: None,
            link: false,
            parents: false,
            excludes: Vec::new(),
            unpack: None,
            from_stage: false,
        };
        for word in text.split_whitespace().skip(1) {
            match word.strip_prefix("--").map(|flag| flag.split_once('=').unwrap_or((flag, ""))) {
                Some(("chown", value)) => op.owner = Some(value.into()),
                Some(("chmod", value)) => op.chmod = Some(nacre_frontend::mode::parse(value).unwrap()),
                Some(("exclude", value)) => op.excludes.push(value.into()),
                Some(("unpack", value)) => op.unpack = Some(value == "true"),
                Some(("link", _)) => op.link = true,
                Some(("parents", _)) => op.parents = true,
                Some((flag, _)) => panic!("{flag}"),
                None => op.sources.push(match word.strip_prefix('<').and_then(|word| word.split_once('=')) {
                    Some((name, content)) => CopySource::Inline { name: name.into(), content: content.into() },
                    None => CopySource::Tree { input: 1, pattern: word.into() },
                }),
            }
        }
        if let Some(CopySource::Tree { pattern, .. }) = op.sources.pop() {
            op.dest = pattern;
        }
        op
    }

    fn run(text: &str, source: &Tree, dest: &Tree) -> Result<Tree, CopyError> {
        let staging = tempfile::tempdir().unwrap();
        let inputs = [CopyInput::Snapshot(dest), CopyInput::Snapshot(source)];
        copy(&instruction(text), &inputs, dest, staging.path(), (9, 9), &read)
    }

    /// Instruction, source, destination, changeset or error.
    fn check(text: &str, source: &str, dest: &str, expected: &str) {
        let got = match run(text, &tree(source), &tree(dest)) {
            Ok(changeset) => words(&changeset),
            Err(error) => format!("error: {error}"),
        };
        assert_eq!(got, expected, "{text}  of {source}  onto {dest}");
    }

    const SOURCE: &str = "a=A b=B d/ d/x=X d/s/ d/s/y=Y l->d/x ld->d out->../../d/x bad->none";

    #[test]
    fn files() {
        check("COPY a /", SOURCE, "", "a=A");
        check("COPY a /n", SOURCE, "", "n=A");
        check("COPY a /p/q/", SOURCE, "", "p/ p/q/ p/q/a=A");
        check("COPY a /p/q", SOURCE, "", "p/ p/q=A");
        check("COPY a /p", SOURCE, "p/", "p/a=A");
        check("COPY a b /p", SOURCE, "", "p=B");
        check("COPY a b /p", SOURCE, "p/", "p/a=A p/b=B");
        check("COPY a d /p/", SOURCE, "", "p/ p/a=A p/s/ p/s/y=Y p/x=X");
        check("COPY ../a /n", SOURCE, "", "n=A");
        check("COPY ./d/../a/ //n", SOURCE, "", "n=A");
        check("COPY a /p/.", SOURCE, "", "p/ p/a=A");
        check("COPY a d/x /n", SOURCE, "n=old,700,5:5", "n=X");
        check("COPY none /", SOURCE, "", "error: /none: not found");
        check("COPY a/b /", SOURCE, "", "error: /a/b: not found");
        check("COPY a d/x /q/", "a=1 d/ d/a=2 d/x=3", "q/,700,1:1", "q/a=1 q/x=3");
    }

    #[test]
    fn directories() {
        check("COPY d /", SOURCE, "", "s/ s/y=Y x=X");
        check("COPY d /n", SOURCE, "", "n/ n/s/ n/s/y=Y n/x=X");
        check("COPY d/. /n", SOURCE, "", "n/ n/s/ n/s/y=Y n/x=X");
        check("COPY d /n", "d/,700,5:5 d/i/,711,5:6", "", "n/ n/i/,711,5:6");
        check("COPY d /n", "d/,700,5:5 d/i/,711,5:6", "n/,770,1:2 n/i/", "n/i/,711,5:6");
        check("COPY d /n", "d/ d/i/,711,5:6 d/i/f=1", "n/ n/i/,711,5:6", "n/i/f=1");
        check("COPY . /", "d/,700 d/f=1", "d/,1777", "d/,700 d/f=1");
        check("COPY / /c/", "f=1", "", "c/ c/f=1");
        check("COPY d /n", "d/", "", "n/");
        check("COPY d /n", "d/e/f=1", "", "n/ n/e/ n/e/f=1");
        check("COPY d /n", "d/ d/f|,640,3:4 d/l->/x,1:1", "", "n/ n/f|,640,3:4 n/l->/x,1:1");
    }

    #[test]
    fn directories_and_others_do_not_replace_each_other() {
        check("COPY d /n", SOURCE, "n=1", "error: cannot copy a directory to /n, which is not a directory");
        check("COPY d /n/", SOURCE, "n=1", "error: /n: not a directory");
        check("COPY d /n", SOURCE, "n/ n/x/", "error: cannot replace directory /n/x with a file");
        check("COPY d /n", SOURCE, "n/ n/s=1", "error: cannot copy a directory to /n/s, which is not a directory");
        check("COPY d /n", SOURCE, "n/ n/s->/ ", "error: cannot copy a directory to /n/s, which is not a directory");
        check("COPY a /n/", "a=1", "n/ n/a/", "error: cannot replace directory /n/a with a file");
        check("COPY a /f/x", "a=1", "f=1", "error: /f: not a directory");
    }

    #[test]
    fn symlinks() {
        check("COPY l /n", SOURCE, "", "n=X");
        check("COPY l /n/", SOURCE, "", "n/ n/l=X");
        check("COPY ld /n", SOURCE, "", "n/ n/s/ n/s/y=Y n/x=X");
        check("COPY ld/x /n", SOURCE, "", "n=X");
        check("COPY out /n", SOURCE, "", "n=X");
        check("COPY bad /n", SOURCE, "", "error: /bad: not found");
        check("COPY loop /n", "loop->loop", "", "error: too many links in /loop");
        check("COPY a /l", SOURCE, "l->r r=1", "r=A");
        check("COPY a /l", SOURCE, "l->/p/new", "p/ p/new=A");
        check("COPY a /l/", SOURCE, "l->/r r/", "r/a=A");
        check("COPY a /l/s/", SOURCE, "l->/r r/", "r/s/ r/s/a=A");
        check("COPY d /l", SOURCE, "l->../r r/", "r/s/ r/s/y=Y r/x=X");
        check("COPY a /l1/", SOURCE, "l1->l2 l2->l1", "error: too many links in /l1");
        check("COPY d /n", "d/ d/l->f", "n/ n/l->other", "n/l->f");
        check("COPY d /n", "d/ d/l=1", "n/ n/l->other", "n/l=1");
        check("COPY a /n/", "a=1", "n/ n/a->/etc", "n/a=1");
    }

    #[test]
    fn patterns() {
        check("COPY *.t /p/", "1.t=1 2.t=2 3.u=3 .t=h", "", "p/ p/.t=h p/1.t=1 p/2.t=2");
        check("COPY * /p/", "d/ d/f=1 .h/ .h/g=2 e=3", "", "p/ p/e=3 p/f=1 p/g=2");
        check("COPY d/*/x /p/", "d/1/x=1 d/1/2/x=2 d/x=0", "", "p/ p/x=1");
        check("COPY d/**/x /p/", "d/1/x=1 d/1/2/x=2 d/x=0", "", "p/ p/x=1");
        check("COPY none* /p/", SOURCE, "", "");
        check("COPY a none* /p/", SOURCE, "", "p/ p/a=A");
        check("COPY none/* /p/", SOURCE, "", "error: /none: not found");
        check("COPY a[ /p/", SOURCE, "", "error: syntax error in pattern `a[`");
        check("COPY [[]a] /p/", "[a]=1 a=2", "", "p/ p/[a]=1");
        check("COPY ld/* /p/", SOURCE, "", "p/ p/x=X p/y=Y");
        check("COPY l* /p/", SOURCE, "", "p/ p/l=X p/s/ p/s/y=Y p/x=X");
        check("COPY bad* /p/", SOURCE, "", "error: /bad: not found");
        check("COPY ?.t /r", "1.t=1", "", "r=1");
    }

    #[test]
    fn owners_and_modes() {
        let base = "etc/ etc/passwd=app:x:1000:1001::: etc/group=staff:x:50:";
        check("COPY --chown=5:6 a /p/q/", SOURCE, "", "p/,5:6 p/q/,5:6 p/q/a=A,5:6");
        check("COPY --chown=app d /p/", "d/ d/l->x", base, "p/,1000:1001 p/l->x,1000:1001");
        check("COPY --chown=app:staff a /", SOURCE, base, "a=A,1000:50");
        check("COPY --chown=ghost a /", SOURCE, base, "a=A");
        check("COPY --chown=app a /", SOURCE, "x=1", "a=A");
        let no_users = "error: cannot look up user or group `app` without a file system; use numbers";
        check("COPY --chown=app a /", SOURCE, "", no_users);
        check("COPY --link --chown=app a /", SOURCE, base, no_users);
        check("COPY --chown=root:root a /", "a=A,3:4", "", "a=A");
        check("COPY --chown=5 a /p/", SOURCE, "p/,1:1", "p/a=A,5:5");
        check("COPY a /", "a=A,4755,3:4", "", "a=A,4755,3:4");
        check("COPY --chmod=700 a /p/q/", SOURCE, "", "p/,700 p/q/,700 p/q/a=A,700");
        check("COPY --chmod=700 d /p", "d/ d/s/ d/s/l->x", "", "p/,700 p/s/,700 p/s/l->x");
        check("COPY --chmod=go-rwx d /p/", "d/ d/s/ d/f=1", "", "p/ p/f=1,600 p/s/,700");
        check("COPY --chmod=644 a /p/", SOURCE, "p/,700", "p/a=A");
        check("COPY --chmod=go-rwx d /q", "d/ d/f=1", "", "q/ q/f=1,600");
        // Directories that are made follow a set-group-id bit; files and what is copied do not.
        let shared = "g/,2775,0:50";
        check("COPY a /g/p/q/a", SOURCE, shared, "g/p/,2755,0:50 g/p/q/,2755,0:50 g/p/q/a=A");
        check("COPY d /g/n", "d/ d/s/ d/s/f=1", shared, "g/n/,2755,0:50 g/n/s/ g/n/s/f=1");
        check("COPY --chown=5:6 --chmod=750 a /g/p/", SOURCE, shared, "g/p/,2750,5:6 g/p/a=A,750,5:6");
    }

    #[test]
    fn heredocs() {
        check("COPY <one=1 <two=2 /d/", "", "", "d/ d/one=1 d/two=2");
        check("COPY <one=1 /d", "", "", "d=1");
        check("COPY <one=1 /d", "", "d/,711", "d/one=1");
        check("COPY --chown=3:4 --chmod=751 <one=1 /p/f", "", "", "p/,751,3:4 p/f=1,751,3:4");
    }

    #[test]
    fn excludes() {
        check("COPY --exclude=*.m . /o/", "a.m=1 b=2 d/ d/c.m=3", "", "o/ o/b=2 o/d/ o/d/c.m=3");
        check("COPY --exclude=s d /o/", SOURCE, "", "o/ o/x=X");
        check("COPY --exclude=d/s . /o/", "d/ d/s/ d/s/y=1 d/x=2", "", "o/ o/d/ o/d/x=2");
        check("COPY --exclude=d --exclude=!d/x . /o/", "d/,700 d/s/ d/s/y=1 d/x=2", "", "o/ o/d/ o/d/x=2");
        check("COPY --exclude=* d /o/", SOURCE, "", "o/");
        check("COPY --exclude=a* a /o/", SOURCE, "", "o/ o/a=A");
        check("COPY --exclude=a* a* /o/", SOURCE, "", "o/ o/a=A");
        check("COPY --exclude=[ d /o/", SOURCE, "", "error: invalid exclude pattern");
    }

    #[test]
    fn parents() {
        let source = "a/,700 a/b/,711 a/b/c.t=C a/b/d.m=D a/e=E f=F x/ x/b/ x/b/c.t=X";
        check("COPY --parents a/b/c.t /o/", source, "", "o/ o/a/ o/a/b/ o/a/b/c.t=C");
        check("COPY --parents a/b /o/", source, "", "o/ o/a/ o/a/b/,711 o/a/b/c.t=C o/a/b/d.m=D");
        check("COPY --parents */b/*.t f /o", source, "", "o/ o/a/ o/a/b/ o/a/b/c.t=C o/f=F o/x/ o/x/b/ o/x/b/c.t=X");
        check("COPY --parents **/*.m /", source, "", "a/ a/b/ a/b/d.m=D");
        check("COPY --parents a/./b/c.t /o/", source, "", "o/ o/b/ o/b/c.t=C");
        check("COPY --parents ./a/./b /o/", source, "", "o/ o/b/,711 o/b/c.t=C o/b/d.m=D");
        check("COPY --parents a/*.z /o/", source, "", "o/");
        check("COPY --parents a/none /o/", source, "", "error: /a/none: not found");
        check("COPY --parents a/./none /o/", source, "", "error: /a/none: not found");
        check("COPY --parents --exclude=**/*.m a /o/", source, "", "o/ o/a/,700 o/a/b/,711 o/a/b/c.t=C o/a/e=E");
        check("COPY --parents --chown=5:6 a/e /o/", source, "o/", "o/a/,5:6 o/a/e=E,5:6");
        check("COPY --parents a/e /o/", source, "o/ o/a/,750", "o/a/e=E");
    }

    #[test]
    fn link_does_not_look_at_the_destination() {
        check("COPY --link a /o/", SOURCE, "o/,700,5:5 o/k=1", "o/ o/a=A");
        check("COPY --link a /l/", SOURCE, "l->r r/", "l/ l/a=A");
        check("COPY --link a /o", SOURCE, "o/", "o=A");
        check("COPY --link --chmod=600 a /l/", SOURCE, "l->r r/", "r/a=A,600");
    }

    #[test]
    fn hard_links() {
        let source = "d/ d/a=1,#7 d/b=1,#7 o=1,#7 e=2,#1 g=2,#1";
        check("COPY d /n", source, "", "n/ n/a=1,#1 n/b=1,#1");
        check("COPY o /n", source, "", "n=1");
        check("COPY e g /n/", source, "", "n/ n/e=2 n/g=2");
        check("COPY . /n", source, "", "n/ n/d/ n/d/a=1,#1 n/d/b=1,#1 n/e=2,#2 n/g=2,#2 n/o=1,#1");
        let mut tree = tree(source);
        tree.edit(|nodes| nodes.iter_mut().find(|node| node.entry.path == b"o").unwrap().origin = Origin::None);
        assert_eq!(words(&run("COPY o /n", &tree, &Tree::default()).unwrap()), "n=1");
    }

    #[test]
    fn other_attributes_are_dropped_and_times_kept() {
        let mut source = tree("d/ d/f=1");
        for name in ["user.x", "security.capability", "security.selinux"] {
            source.edit(|nodes| drop(nodes[1].entry.xattrs.insert(name.into(), b"v".to_vec())));
        }
        let changeset = run("COPY d /n", &source, &Tree::default()).unwrap();
        let entry = &changeset.get(b"n/f").unwrap().entry;
        assert_eq!(entry.xattrs.keys().collect::<Vec<_>>(), [b"security.capability"]);
        assert_eq!((entry.mtime, changeset.get(b"n").unwrap().entry.mtime), ((1, 0), (9, 9)));
    }

    #[test]
    fn contexts_belong_to_root() {
        let source = tree("a=A,5:6 d/ d/x=X,7:8");
        let staging = tempfile::tempdir().unwrap();
        let inputs = [CopyInput::Context(&source), CopyInput::Context(&source)];
        let dest = Tree::default();
        let changeset = copy(&instruction("COPY a d /o/"), &inputs, &dest, staging.path(), (0, 0), &read).unwrap();
        assert_eq!(words(&changeset), "o/ o/a=A o/x=X");
    }

    #[test]
    fn checkouts_and_downloads() {
        let repo = tree("/,700,5:5 f=1 .git/ .git/x=2");
        let file = Node {
            entry: Entry { mode: 0o600, ..tree("f=1,9:9").nodes()[0].entry.clone() },
            ..tree("f=1").nodes()[0].clone()
        };
        let staging = tempfile::tempdir().unwrap();
        let check = |source: CopySource, dest: &str, onto: &str, expected: &str| {
            let mut op = instruction("ADD x /");
            (op.sources, op.dest) = (vec![source], dest.into());
            let inputs = [CopyInput::Snapshot(&repo), CopyInput::Context(&repo), CopyInput::File(&file)];
            let changeset = copy(&op, &inputs, &tree(onto), staging.path(), (0, 0), &read).unwrap();
            assert_eq!(words(&changeset), expected);
        };
        let git = || CopySource::Git { input: 1 };
        check(git(), "/r", "", "r/,700 r/.git/ r/.git/x=2 r/f=1");
        check(git(), "/r/", "", "r/ r/.git/ r/.git/x=2 r/f=1");
        check(git(), "/r", "r/,711", "r/.git/ r/.git/x=2 r/f=1");
        let http = || CopySource::Http { input: 2, name: "f.txt".into() };
        check(http(), "/p/", "", "p/ p/f.txt=1,600");
        check(http(), "/p", "", "p=1,600");
        check(http(), "/p", "p/", "p/f.txt=1,600");
    }

    #[test]
    fn archives() {
        let mut builder = tar::Builder::new(Vec::new());
        let mut add = |path: &str, kind: tar::EntryType, mode: u32, data: &str| {
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(kind);
            header.set_mode(mode);
            header.set_uid(7);
            header.set_gid(8);
            header.set_mtime(5);
            match kind {
                tar::EntryType::Symlink => {
                    header.set_size(0);
                    builder.append_link(&mut header, path, data).unwrap();
                }
                _ => {
                    header.set_size(data.len() as u64);
                    builder.append_data(&mut header, path, data.as_bytes()).unwrap();
                }
            }
        };
        add("./", tar::EntryType::Directory, 0o700, "");
        add("d/", tar::EntryType::Directory, 0o711, "");
        add("d/f", tar::EntryType::Regular, 0o4750, "F");
        add("imp/g", tar::EntryType::Regular, 0o644, "G");
        add("l", tar::EntryType::Symlink, 0o777, "d");
        let bytes = builder.into_inner().unwrap();
        let mut source = tree("x.tar= d/ d/x.tar= no.tar=no");
        source.edit(|nodes| {
            for node in nodes.iter_mut().filter(|node| node.entry.path.ends_with(b"x.tar")) {
                node.origin = Origin::Inline(bytes.clone().into());
            }
        });
        let staging = tempfile::tempdir().unwrap();
        let check = |text: &str, onto: &str, expected: &str| {
            let staging = tempfile::tempdir_in(&staging).unwrap();
            let dest = tree(onto);
            let inputs = [CopyInput::Snapshot(&dest), CopyInput::Context(&source)];
            let got = match copy(&instruction(text), &inputs, &dest, staging.path(), (0, 0), &read) {
                Ok(changeset) => words(&changeset),
                Err(error) => format!("error: {error}"),
            };
            assert_eq!(got, expected, "{text} onto {onto}");
        };
        let inside = "o/d/,711,7:8 o/d/f=F,4750,7:8 o/imp/ o/imp/g=G,7:8 o/l->d,7:8";
        check("ADD x.tar /o", "", &format!("o/ {inside}"));
        check("ADD x.tar /o", "o/,750", inside);
        check("ADD x.tar /r", "r->/o o/", inside);
        check("ADD x.tar /o", "o=1", "error: /o: not a directory");
        check(
            "ADD --chown=1:2 --chmod=600 x.tar /o",
            "",
            "o/,1:2 o/d/,711,1:2 o/d/f=F,4750,1:2 o/imp/ o/imp/g=G,1:2 o/l->d,1:2",
        );
        let kept = inside.replace("o/imp/ ", "");
        check("ADD x.tar /o", "o/ o/d=1 o/imp/ o/imp/g/ o/imp/g/old=1 o/l/ o/l/old=1", &kept);
        check("ADD x.tar /o", "o/ o/d->/imp imp/", inside);
        check("ADD x.tar /o", "o/ o/imp->/e o/e/", "o/d/,711,7:8 o/d/f=F,4750,7:8 o/e/g=G,7:8 o/l->d,7:8");
        check("ADD no.tar /o/", "", "o/ o/no.tar=no");
        check(
            "ADD d/x.tar d /o/",
            "o/",
            &format!(
                "o/d/,711,7:8 o/d/f=F,4750,7:8 o/imp/ o/imp/g=G,7:8 o/l->d,7:8 o/x.tar={}",
                String::from_utf8_lossy(&bytes)
            ),
        );
        check("ADD --unpack=false x.tar /o", "", &format!("o={}", String::from_utf8_lossy(&bytes)));
    }

    #[test]
    fn workdir() {
        let check = |path: &str, user: &str, dest: &str, expected: &str| {
            let op = MkdirOp { path: path.into(), user: user.into() };
            let got = match mkdir(&op, &tree(dest), (9, 9), &read) {
                Ok(changeset) => words(&changeset),
                Err(error) => format!("error: {error}"),
            };
            assert_eq!(got, expected, "{path} {user} {dest}");
        };
        check("/a/b", "", "", "a/ a/b/");
        check("/a/b", "5:6", "a/,700", "a/b/,5:6");
        check("/a/b", "app", "etc/ etc/passwd=app:x:10:20", "a/,10:20 a/b/,10:20");
        check("/a", "ghost", "a/", "");
        check("/", "app", "", "");
        check("/l/s", "", "l->/r r/", "r/s/");
        check("/etc/passwd/x", "", "etc/ etc/passwd=1", "error: /etc/passwd: not a directory");
        check("/f", "", "f=1", "error: /f: not a directory");
    }

    #[test]
    fn parents_and_unchanged_entries() {
        let dest = tree("a/,700 a/b/ a/b/f=1 a/b/g=1");
        let changeset = run("COPY f /a/b/", &tree("f=2"), &dest).unwrap();
        assert_eq!(words(&with_parents(changeset, &dest)), "a/,700 a/b/ a/b/f=2");
        let same = run("COPY . /a/b/", &tree("f=1 g=2"), &dest).unwrap();
        assert_eq!(words(&without_unchanged(&same, &dest)), "a/b/g=2");
    }

    #[test]
    fn nothing_panics_on_odd_paths() {
        let tree = tree(SOURCE);
        for text in ["", "/", "//", ".", "..", "./.", "/./", "*", "a/", "\\", "[", "!", "/./a", "a/./", "**/./*"] {
            for flag in ["", "--parents", "--link", "--exclude=!*"] {
                let _ = run(&format!("COPY {flag} {text} /{text}"), &tree, &tree);
                let _ = run(&format!("ADD {flag} {text} {text}"), &tree, &tree);
            }
        }
    }
}
