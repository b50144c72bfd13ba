//! The build graph: what the solver executes.
//!
//! A [`Definition`] is a list of vertices in topological order (an input always has a smaller [`VertexId`] than its
//! user) and the image that the last of them belongs to. Every vertex gives one snapshot: a stack of layers. Values
//! here are already expanded: no `$VAR` is left, destinations are absolute, the shell is part of a RUN's arguments.
//! Names of users are the exception: they are looked up in the root file system that the step runs on.

use crate::image_config::ImageConfig;
use serde::{Deserialize, Serialize};

/// Position of a vertex in [`Definition::vertices`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct VertexId(pub usize);

/// A build graph for one platform and the image it ends in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Definition {
    /// Vertices, inputs before users. Only what the target needs.
    pub vertices: Vec<Vertex>,
    /// The image to export.
    pub image: Image,
}

/// The image a build ends in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Image {
    /// Vertex whose snapshot is the root file system; `None` is the empty file system of `FROM scratch`.
    pub top: Option<VertexId>,
    /// Configuration, complete but for `rootfs`, `created` and the dates of new history entries, which the solver
    /// knows. History entries of the base image come first, as they were.
    pub config: ImageConfig,
    /// Platform of the target.
    pub platform: Platform,
}

/// One step of the graph.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Vertex {
    /// What it does.
    pub op: Op,
    /// Snapshots it uses. For every op but [`Op::Source`], number 0 is the file system it changes; `None` is the
    /// empty one of `FROM scratch`. Mounts and copy sources name the others by position.
    pub inputs: Vec<Option<VertexId>>,
    /// Words for the progress display: `[builder 2/5] RUN make`.
    pub name: String,
    /// Stage it belongs to, as the user named it, or its number.
    pub stage: String,
    /// The instruction, expanded, on one line; identifies "the same step" between builds together with `stage`.
    pub text: String,
    /// First and last line in the Dockerfile, counted from 1: of FROM, for triggers of a base; `None` for contexts.
    pub lines: Option<(u32, u32)>,
    /// Platform it runs for.
    pub platform: Platform,
    /// `--no-cache` or `--no-cache-filter` names it: never look its result up.
    pub ignore_cache: bool,
}

/// What a vertex does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Op {
    /// Files from outside of the graph. No inputs.
    Source(Source),
    /// Runs a process on input 0.
    Run(Box<RunOp>),
    /// COPY and ADD onto input 0.
    Copy(Box<CopyOp>),
    /// WORKDIR: makes a directory on input 0.
    Mkdir(MkdirOp),
}

/// Where files come from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Source {
    /// An image; also what the front end asks configurations of.
    Image(ImageSource),
    /// A directory of the caller: the build context (name `context`) or a named one.
    Local {
        /// `context`, or the name given with `--build-context`.
        name: String,
    },
    /// One file fetched by HTTP(S).
    Http {
        /// Address.
        url: String,
        /// `--checksum`, as `sha256:hex`.
        checksum: Option<String>,
    },
    /// A checkout of a git repository.
    Git {
        /// Repository address without fragment, as `git fetch` takes it.
        remote: String,
        /// Branch, tag or commit; empty is the default branch.
        reference: String,
        /// Directory below the top; empty is the top.
        subdir: String,
        /// Keep `.git`.
        keep_git_dir: bool,
        /// `--checksum`: the commit must start with these hex digits.
        checksum: Option<String>,
        /// Fetch submodules.
        submodules: bool,
    },
}

/// An image by where it is looked up.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ImageSource {
    /// By reference: the own store first when it was built there, else the registry. Canonical text, as
    /// `docker.io/library/debian:12` or with `@sha256:…`.
    Reference(String),
    /// In an OCI layout directory of the caller (`--build-context name=oci-layout://DIR[:tag|@digest]`).
    OciLayout {
        /// Directory as given.
        path: String,
        /// `:tag` (without colon); none takes the only manifest, or `latest`.
        tag: Option<String>,
        /// `@digest`.
        digest: Option<String>,
    },
}

/// RUN.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunOp {
    /// The program and its arguments, shell included.
    pub args: Vec<String>,
    /// Environment, in order, names unique: the image's ENV, then build args in force.
    pub env: Vec<(String, String)>,
    /// Proxy settings and what else reaches the process but is not part of the key.
    pub env_outside_key: Vec<(String, String)>,
    /// Absolute directory it starts in.
    pub cwd: String,
    /// USER in force as written: `name`, `uid`, `name:group` …; empty is root.
    pub user: String,
    /// Mounts in the order written.
    pub mounts: Vec<Mount>,
    /// Network mode.
    pub network: Network,
    /// Security mode.
    pub security: Security,
    /// `--add-host`: name and address.
    pub extra_hosts: Vec<(String, String)>,
    /// `--ulimit`: name, soft, hard.
    pub ulimits: Vec<(String, i64, i64)>,
    /// Size of /dev/shm in bytes; `None` is 64 MiB.
    pub shm_size_bytes: Option<u64>,
    /// `--cgroup-parent`.
    pub cgroup_parent: Option<String>,
    /// Host name inside; `None` is `buildkitsandbox`, as Dockerfiles expect.
    pub hostname: Option<String>,
}

/// `RUN --network`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Network {
    /// What the builder gives by default.
    Default,
    /// Loopback only.
    None,
    /// The host's.
    Host,
}

/// `RUN --security`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Security {
    /// The sandbox.
    Sandbox,
    /// All capabilities that the builder has.
    Insecure,
}

/// `RUN --mount`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Mount {
    /// Absolute path inside; relative ones were resolved against WORKDIR.
    pub target: String,
    /// What is mounted.
    pub kind: MountKind,
    /// Read-only.
    pub read_only: bool,
}

/// Kinds of mounts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum MountKind {
    /// Part of another snapshot or of a context; writes are thrown away.
    Bind {
        /// Position in [`Vertex::inputs`]; `None` is an empty file system.
        input: Option<usize>,
        /// Path in it, absolute.
        source: String,
    },
    /// A directory kept between builds.
    Cache {
        /// Name of the cache.
        id: String,
        /// Who may use it at once.
        sharing: Sharing,
        /// What a new cache starts from: position in [`Vertex::inputs`] and path.
        from: Option<(usize, String)>,
        /// Mode of a new directory.
        mode: u32,
        /// Owner of a new directory.
        uid: u32,
        /// Group of a new directory.
        gid: u32,
    },
    /// Memory.
    Tmpfs {
        /// Limit in bytes; 0 is none.
        size_bytes: u64,
    },
    /// A secret of the caller.
    Secret {
        /// Which.
        id: String,
        /// Fail without it.
        required: bool,
        /// Mode, owner and group of the file.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// Set this variable to the value.
        env: Option<String>,
        /// Mount the file at `target` (false for `env=` without `target`).
        file: bool,
    },
    /// The caller's ssh agent.
    Ssh {
        /// Which.
        id: String,
        /// Fail without it.
        required: bool,
        /// Mode of the socket.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
    },
    /// A file whose content stands in the Dockerfile (a heredoc that is run as a program).
    Inline {
        /// Its bytes.
        content: String,
        /// Its mode.
        mode: u32,
    },
}

/// Sharing of a cache mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sharing {
    /// Any number of writers.
    Shared,
    /// Another writer gets a directory of its own.
    Private,
    /// Another writer waits.
    Locked,
}

/// COPY and ADD.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CopyOp {
    /// ADD: archives of a context are unpacked unless `unpack` says otherwise.
    pub add: bool,
    /// What is copied, in order.
    pub sources: Vec<CopySource>,
    /// Absolute destination; a trailing slash means "a directory" and is kept.
    pub dest: String,
    /// `--chown`, expanded, as written: `user`, `user:group`, numbers.
    pub owner: Option<String>,
    /// `--chmod`, parsed.
    pub chmod: Option<crate::mode::ModeChange>,
    /// `--link`.
    pub link: bool,
    /// `--parents`.
    pub parents: bool,
    /// `--exclude` patterns.
    pub excludes: Vec<String>,
    /// `ADD --unpack`; `None` is the default (local archives yes, fetched ones no).
    pub unpack: Option<bool>,
    /// Owner and group of files from outside of the graph (contexts): 0:0. Copies from stages keep theirs.
    pub from_stage: bool,
}

/// One source of a COPY or ADD.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum CopySource {
    /// Paths or globs in input `input` (a context, a stage, an image).
    Tree {
        /// Position in [`Vertex::inputs`].
        input: usize,
        /// Path or pattern as written (expanded).
        pattern: String,
    },
    /// A heredoc.
    Inline {
        /// File name.
        name: String,
        /// Content.
        content: String,
    },
    /// A fetched file: input `input` is a [`Source::Http`].
    Http {
        /// Position in [`Vertex::inputs`].
        input: usize,
        /// Name the file gets in a directory (last part of the address's path).
        name: String,
    },
    /// A checkout: input `input` is a [`Source::Git`]; its content is copied.
    Git {
        /// Position in [`Vertex::inputs`].
        input: usize,
    },
}

/// WORKDIR.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MkdirOp {
    /// Absolute path; missing parents are made too.
    pub path: String,
    /// USER in force as written; owner of what is made. Empty is root.
    pub user: String,
}

/// Operating system and processor, normalised: `linux/amd64`, `linux/arm/v7`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// `amd64`, `arm64` …
    pub architecture: String,
    /// `v7` …, or empty.
    pub variant: String,
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if !self.variant.is_empty() {
            write!(f, "/{}", self.variant)?;
        }
        Ok(())
    }
}
