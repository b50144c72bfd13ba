//! Contexts that are no directory: what an archive or a downloaded file holds, as a tree.
//!
//! The rules are those of ADD onto an empty file system, so names and links of an archive are confined to it. Bytes stay
//! in a staging directory of the store's `tmp`, which lives as long as the process.

use crate::context::ContextError;
use crate::op::copy::{self, CopyError, CopyInput};
use crate::op::file::digest_uncached;
use crate::store::{Store, StoreError};
use crate::tree::ignore::{self, IgnoreError, Matcher, Verdict};
use crate::tree::{Entry, Kind, Node, OnDisk, Origin, Resolved, Tree, TreeBuilder, archive, parent};
use nacre_frontend::llb::{CopyOp, CopySource};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Why a file cannot be made a context.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The archive is damaged or too large.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// What was unpacked cannot be read again.
    #[error(transparent)]
    Context(#[from] ContextError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file itself cannot be read.
    #[error("cannot read {path:?}", path = .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The ignore file has a pattern that is none.
    #[error("{name} is not valid")]
    BadIgnoreFile {
        /// Its path in the context.
        name: String,
        /// Why.
        source: IgnoreError,
    },
}

/// Is the file an archive: tar, plain or compressed, by its content?
pub fn is_archive(path: &Path) -> Result<bool, UnpackError> {
    let file = File::open(path).map_err(|source| UnpackError::Read { path: path.to_owned(), source })?;
    Ok(archive::open(file).is_some())
}

/// What the file holds when it is an archive, else the file alone under `name`. All digests are known. `now` is the time
/// of directories that the archive only implies.
pub fn tree_of(file: Node, name: &str, store: &Store, now: (i64, u32)) -> Result<Tree, UnpackError> {
    let op = CopyOp {
        add: true,
        sources: vec![CopySource::Http { input: 0, name: name.to_owned() }],
        dest: "/".to_owned(),
        owner: None,
        chmod: None,
        link: false,
        parents: false,
        excludes: Vec::new(),
        unpack: Some(true),
        from_stage: false,
    };
    let staging = store.begin_tree()?;
    let read = |_: &Node| Err(io::ErrorKind::Unsupported.into());
    let tree = copy::copy(&op, &[CopyInput::File(&file)], &Tree::default(), &staging, now, &read)?;
    let mut rooted = TreeBuilder::new();
    if tree.get(b"").is_none() {
        rooted.push(&Entry { mtime: now, ..Entry::dir("", 0o755) }, &Origin::None);
    }
    tree.iter().for_each(|node| rooted.push_node(&node));
    let mut tree = rooted.finish();
    digest_uncached(&mut tree)?;
    Ok(tree)
}

/// A file on disk as a node for [`tree_of`].
pub fn file_node(path: &Path, size: u64, mtime: (i64, u32)) -> Node {
    let kind = Kind::File { size, digest: None, link_group: 0 };
    let entry = Entry { kind, mtime, ..Entry::dir("", 0o600) };
    Node { entry, origin: Origin::File(OnDisk::at(path)) }
}

/// Reads a file of a tree whose bytes are on disk, links followed inside the tree; `None` when there is none.
pub fn read_file(tree: &Tree, path: &str, limit: u64) -> io::Result<Option<Vec<u8>>> {
    let Resolved::Found(found) = tree.resolve(path.as_bytes(), true) else { return Ok(None) };
    let Some(Node { entry, origin }) = tree.get(&found) else { return Ok(None) };
    match (entry.is_file(), origin) {
        (true, Origin::File(file)) => {
            let mut bytes = Vec::new();
            File::open(file.whole())?.take(limit).read_to_end(&mut bytes)?;
            Ok(Some(bytes))
        }
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")),
    }
}

/// The tree without what its ignore file excludes: `DOCKERFILE.dockerignore` when it exists, else `.dockerignore`.
pub fn without_ignored(tree: Tree, dockerfile: &str) -> Result<Tree, UnpackError> {
    const LIMIT_BYTES: u64 = 16 << 20;
    for name in [format!("{dockerfile}.dockerignore"), ".dockerignore".to_owned()] {
        let read = read_file(&tree, &name, LIMIT_BYTES);
        let read = read.map_err(|source| UnpackError::Read { path: PathBuf::from(&name), source })?;
        if let Some(bytes) = read {
            let matcher = Matcher::new(ignore::parse(&bytes));
            return Ok(filtered(tree, &matcher.map_err(|source| UnpackError::BadIgnoreFile { name, source })?));
        }
    }
    Ok(tree)
}

/// As a walk of a directory would see it: an excluded directory stays when something in it does.
fn filtered(tree: Tree, matcher: &Matcher) -> Tree {
    if matcher.is_empty() {
        return tree;
    }
    let mut verdicts: BTreeMap<Vec<u8>, Verdict> = BTreeMap::new();
    let mut wanted: BTreeSet<Vec<u8>> = BTreeSet::new();
    let mut cursor = tree.cursor();
    while let Some(Node { entry, .. }) = cursor.next() {
        let verdict = match entry.path.is_empty() {
            true => matcher.root(),
            false => {
                let above = verdicts.get(parent(&entry.path)).cloned().unwrap_or_else(|| matcher.root());
                matcher.verdict(&above, &entry.path)
            }
        };
        if !verdict.excluded() {
            let mut path = entry.path.as_slice();
            while !path.is_empty() && wanted.insert(path.to_vec()) {
                path = parent(path);
            }
        }
        if entry.is_dir() {
            verdicts.insert(entry.path.clone(), verdict);
        }
    }
    // Of hard links the first carries the bytes; here every name has its own origin, so any may go.
    tree.map(|node| node.entry.path.is_empty() || wanted.contains(&node.entry.path)).number_links()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(entries: &[(&str, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, content) in entries {
            let mut header = tar::Header::new_ustar();
            header.set_mode(0o644);
            header.set_size(content.len() as u64);
            builder.append_data(&mut header, name, content.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn paths(tree: &Tree) -> Vec<String> {
        tree.nodes().iter().map(|node| String::from_utf8_lossy(&node.entry.path).into_owned()).collect()
    }

    fn unpacked(store: &Store, bytes: &[u8]) -> Tree {
        let path = store.tmp_path().unwrap();
        std::fs::write(&path, bytes).unwrap();
        tree_of(file_node(&path, bytes.len() as u64, (1, 0)), "name", store, (2, 0)).unwrap()
    }

    #[test]
    fn archives_are_whole_trees_and_other_files_stay_files() {
        let (_directory, store) = crate::store::temporary();
        let tree = unpacked(&store, &archive(&[("a/b/c", "x"), ("d", "y")]));
        assert_eq!(paths(&tree), ["", "a", "a/b", "a/b/c", "d"]);
        assert_eq!(read_file(&tree, "/a/../a/b/c", 9).unwrap().as_deref(), Some(&b"x"[..]));
        assert_eq!(read_file(&tree, "nothing", 9).unwrap(), None);
        assert!(read_file(&tree, "a", 9).is_err());
        let digests = tree.iter().filter(|node| matches!(node.entry.kind, Kind::File { digest: Some(_), .. }));
        assert_eq!(digests.count(), 2);
        assert_eq!(paths(&unpacked(&store, b"no archive")), ["", "name"]);
    }

    #[test]
    fn ignore_files_act() {
        let (_directory, store) = crate::store::temporary();
        let files = [("d/keep", "x"), ("d/drop", "x"), ("e/f", "x"), (".dockerignore", "d\n!d/keep\ne\n")];
        let tree = unpacked(&store, &archive(&files));
        assert_eq!(paths(&without_ignored(tree.clone(), "Dockerfile").unwrap()), ["", ".dockerignore", "d", "d/keep"]);
        let own = [&files[..], &[("sub/D.dockerignore", "")]].concat();
        let tree = unpacked(&store, &archive(&own));
        assert_eq!(without_ignored(tree.clone(), "sub/D").unwrap(), tree);
        let tree = unpacked(&store, &archive(&[(".dockerignore", "a[\n")]));
        assert!(
            matches!(without_ignored(tree, "D"), Err(UnpackError::BadIgnoreFile { name, .. }) if name == ".dockerignore")
        );
    }
}
