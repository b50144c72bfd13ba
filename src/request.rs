//! Flags, environment and defaults become one validated [`BuildRequest`].
//!
//! The environment is read in this module and nowhere else: [`Environment`] takes it in once, at start. What is
//! looked at on disk is only what a flag's meaning depends on (is the context a directory, is the ssh source a socket,
//! is there a secret file); contents are read when the build needs them.

use crate::cache_options::{self, CacheTarget};
use crate::cli::{self, BuildArgs, RegistryArgs};
use nacre_frontend::llb::Network;
use nacre_frontend::lower::{GitUrl, GitUrlError};
use nacre_frontend::reference::Reference;
use nacre_frontend::units;
use nacre_solver::cache::import::CacheSource;
use nacre_solver::registry::{ClientOptions, Mirror, Proxies};
use nacre_solver::sandbox::Isolation;
use nacre_solver::sandbox::cgroup::{Limits, Swap};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::IsTerminal;
use std::net::IpAddr;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A secret may not be larger; BuildKit has the same limit.
const SECRET_LIMIT_BYTES: u64 = 500 * 1024;

/// Names that setrlimit knows, as docker writes them.
const ULIMIT_NAMES: [&str; 15] = [
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

/// Everything a build needs to know, checked.
#[derive(Debug)]
pub(crate) struct BuildRequest {
    /// The build context.
    pub(crate) context: ContextSource,
    /// The Dockerfile.
    pub(crate) dockerfile: DockerfileSource,
    /// `--target`.
    pub(crate) target: Option<String>,
    /// Build args, names unique, in the order given; SOURCE_DATE_EPOCH of the environment and the proxies of docker's
    /// configuration are among them.
    pub(crate) build_args: Vec<(String, String)>,
    /// `--label`, names unique.
    pub(crate) labels: Vec<(String, String)>,
    /// `--annotation`.
    pub(crate) annotations: Vec<Annotation>,
    /// `--platform` as typed; empty is the machine's own.
    pub(crate) platforms: Vec<String>,
    /// `--build-context`, names unique.
    pub(crate) named_contexts: Vec<(String, NamedSource)>,
    /// Where the result goes; never empty for [`Call::Build`].
    pub(crate) outputs: Vec<Output>,
    /// `--iidfile`.
    pub(crate) iid_file: Option<PathBuf>,
    /// `--metadata-file`.
    pub(crate) metadata_file: Option<PathBuf>,
    /// What to do with the Dockerfile.
    pub(crate) call: Call,
    /// Directory of cache and images, absolute.
    pub(crate) store: PathBuf,
    /// Which results of earlier builds may be used.
    pub(crate) cache_use: CacheUse,
    /// `--cache-from`, in order.
    pub(crate) cache_from: Vec<CacheSource>,
    /// `--cache-to`.
    pub(crate) cache_to: Vec<CacheTarget>,
    /// `--pull`.
    pub(crate) pull: bool,
    /// `--explain`.
    pub(crate) explain: bool,
    /// `--timings`.
    pub(crate) timings: bool,
    /// `--trace`.
    pub(crate) trace: Option<PathBuf>,
    /// `--secret`, ids unique.
    pub(crate) secrets: Vec<Secret>,
    /// `--ssh`, ids unique.
    pub(crate) ssh: Vec<SshAgent>,
    /// `--network`.
    pub(crate) network: Network,
    /// `--network=pasta`: what is the default is pasta's.
    pub(crate) pasta: bool,
    /// `--allow-secret-leak`.
    pub(crate) allow_secret_leak: bool,
    /// `--no-secret-warnings`.
    pub(crate) no_secret_warnings: bool,
    /// `--step-timeout`.
    pub(crate) step_timeout: Option<Duration>,
    /// `--ownership`.
    pub(crate) ownership: OwnershipChoice,
    /// `--isolation`.
    pub(crate) isolation: Isolation,
    /// `--add-host`: name and address.
    pub(crate) extra_hosts: Vec<(String, String)>,
    /// `--allow`.
    pub(crate) allow: Rights,
    /// `--ulimit`: name, soft, hard; -1 is unlimited.
    pub(crate) ulimits: Vec<(String, i64, i64)>,
    /// `--shm-size`.
    pub(crate) shm_size_bytes: Option<u64>,
    /// `--memory` and its like.
    pub(crate) limits: Limits,
    /// `--cgroup-parent`, which is also one of the limits.
    pub(crate) cgroup_parent: Option<String>,
    /// Value of the SOURCE_DATE_EPOCH build arg, in seconds.
    pub(crate) source_date_epoch: Option<i64>,
    /// How to show what happens.
    pub(crate) progress: ProgressMode,
    /// `-q`: print only the image's digest.
    pub(crate) quiet: bool,
    /// How to talk to registries and web servers: credentials, certificates, proxies.
    pub(crate) registry: ClientOptions,
    /// Sentences about flags that do nothing here.
    pub(crate) notices: Vec<String>,
}

/// Where the build context comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ContextSource {
    /// A directory, as typed.
    Directory(PathBuf),
    /// Standard input: a tar archive, compressed or not, or a Dockerfile; its first bytes tell.
    Stdin,
    /// An address that gives a tar archive or a Dockerfile.
    Http(String),
    /// A git repository.
    Git(GitUrl),
}

/// Where the Dockerfile comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DockerfileSource {
    /// `Dockerfile` at the top of the context.
    Default,
    /// Another path in the context.
    InContext(String),
    /// A file of the caller, inside or outside of the context.
    File(PathBuf),
    /// Standard input.
    Stdin,
    /// An address.
    Http(String),
}

/// Where a named context comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NamedSource {
    /// A directory.
    Directory(PathBuf),
    /// `docker-image://`.
    Image(String),
    /// `oci-layout://DIR[:tag][@digest]`.
    OciLayout {
        /// The directory.
        path: PathBuf,
        /// Without colon.
        tag: Option<String>,
        /// `sha256:…`.
        digest: Option<String>,
    },
    /// A git repository.
    Git(GitUrl),
    /// An address that gives a tar archive.
    Http(String),
    /// `target:STAGE`: a stage of the same Dockerfile.
    Target(String),
}

/// What to do with the Dockerfile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    /// Build it.
    Build,
    /// Print the build checks' findings.
    Check(CallFormat),
    /// Print args, secrets and the like of the target.
    Outline(CallFormat),
    /// Print the stages.
    Targets(CallFormat),
}

/// How `--call` prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum CallFormat {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
    /// For code scanning services.
    Sarif,
}

/// Which results of earlier builds may be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CacheUse {
    /// All.
    All,
    /// None.
    None,
    /// All but those of these stages.
    NotStages(Vec<String>),
}

/// `--ownership`: how files get owners.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OwnershipChoice {
    /// Real ones where there are ids for them.
    Auto,
    /// Real ones, or an error.
    SubordinateIds,
    /// Emulated, even where there are ids.
    Emulate,
}

/// What the Dockerfile may ask for beyond the sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Rights {
    /// `RUN --network=host`.
    pub(crate) network_host: bool,
    /// `RUN --security=insecure`.
    pub(crate) security_insecure: bool,
}

/// An annotation and where it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Annotation {
    /// Where.
    pub(crate) place: AnnotationPlace,
    /// Name.
    pub(crate) name: String,
    /// Value.
    pub(crate) value: String,
}

/// Where an annotation goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AnnotationPlace {
    /// Each platform's manifest.
    Manifest,
    /// The index above.
    Index,
    /// The descriptors of manifests in the index.
    ManifestDescriptor,
    /// The index's own descriptor in the layout.
    IndexDescriptor,
}

/// One result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Output {
    /// What is written.
    pub(crate) kind: OutputKind,
    /// Names of the image: `name=` of the output, else those of `-t`.
    pub(crate) names: Vec<String>,
    /// Push the image, and how.
    pub(crate) push: Option<Push>,
    /// The registry's certificate is not checked.
    pub(crate) insecure: bool,
    /// How layers are compressed.
    pub(crate) compression: Compression,
    /// Compress layers of the base again when they are compressed otherwise.
    pub(crate) force_compression: bool,
    /// Docker's media types in place of OCI's.
    pub(crate) docker_media_types: bool,
    /// Clamp file times to SOURCE_DATE_EPOCH.
    pub(crate) rewrite_timestamp: bool,
    /// `annotation…=` of the output.
    pub(crate) annotations: Vec<Annotation>,
}

/// How an image is pushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Push {
    /// Under its tags.
    ByName,
    /// Under its digest alone.
    ByDigest,
}

/// What is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum OutputKind {
    /// The image, into the store.
    Store,
    /// The image, into registries only.
    Registry,
    /// An OCI layout.
    Oci {
        /// Where.
        dest: Destination,
        /// As a tar archive, not a directory.
        tar: bool,
    },
    /// What docker load reads.
    Docker {
        /// Where.
        dest: Destination,
        /// As a tar archive, not a directory.
        tar: bool,
    },
    /// The root file system's files.
    Local {
        /// Directory.
        dest: PathBuf,
        /// A directory below for each platform; `None` when there are several.
        platform_split: Option<bool>,
    },
    /// The root file system as a tar archive.
    Tar {
        /// Where.
        dest: Destination,
        /// A directory in it for each platform; `None` when there are several.
        platform_split: Option<bool>,
    },
    /// Nothing: only the cache is filled.
    CacheOnly,
}

/// Where an archive goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Destination {
    /// Standard output, which is no terminal.
    Stdout,
    /// A file or directory.
    Path(PathBuf),
}

/// How layers are compressed. A level of `None` is the codec's default here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    /// Not at all.
    Uncompressed,
    /// gzip, level 0 to 9.
    Gzip(Option<u32>),
    /// Zstandard, level 1 to 22.
    Zstd(Option<u32>),
}

/// A secret of the caller.
pub(crate) struct Secret {
    /// Its name in RUN --mount.
    pub(crate) id: String,
    source: SecretSource,
}

enum SecretSource {
    File(PathBuf),
    Value(Vec<u8>),
}

/// Never shows a value.
impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secret").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Secret {
    /// Reads the value.
    pub(crate) fn read(&self) -> Result<Vec<u8>, RequestError> {
        let path = match &self.source {
            SecretSource::Value(value) => return Ok(value.clone()),
            SecretSource::File(path) => path,
        };
        let failed = |source| RequestError::ReadSecret { id: self.id.clone(), path: path.clone(), source };
        let mut value = Vec::new();
        let file = std::fs::File::open(path).map_err(failed)?;
        // One byte more than allowed shows a file that is too large, also where it has no size (a pipe).
        std::io::Read::read_to_end(&mut std::io::Read::take(file, SECRET_LIMIT_BYTES + 1), &mut value)
            .map_err(failed)?;
        if value.len() as u64 > SECRET_LIMIT_BYTES {
            return Err(RequestError::SecretTooLarge { id: self.id.clone() });
        }
        Ok(value)
    }
}

/// What RUN --mount=type=ssh gives access to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SshAgent {
    /// Its name in RUN --mount.
    pub(crate) id: String,
    /// Where the keys are.
    pub(crate) source: SshSource,
}

/// Where ssh keys are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SshSource {
    /// A running agent.
    Socket(PathBuf),
    /// Files with private keys.
    Keys(Vec<PathBuf>),
}

/// How to show what happens; `auto` is already decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProgressMode {
    /// Live view.
    Tty,
    /// Lines.
    Plain,
    /// JSON lines.
    RawJson,
    /// Nothing.
    Quiet,
}

/// The process's surroundings, taken in once.
#[derive(Debug, Clone)]
pub(crate) struct Environment {
    variables: BTreeMap<OsString, OsString>,
    /// Current directory.
    pub(crate) current_dir: PathBuf,
    /// Standard output is a terminal.
    pub(crate) stdout_terminal: bool,
    /// Standard error is a terminal.
    pub(crate) stderr_terminal: bool,
    /// Use colours on standard error.
    pub(crate) color: bool,
}

/// Where the program runs, as far as that decides what helps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Surroundings {
    /// A job of a GitLab runner.
    GitLab,
    /// A job of GitHub Actions.
    GitHub,
    /// A pod.
    Kubernetes,
    /// A container of podman.
    Podman,
    /// A container of Docker.
    Docker,
    /// None of these.
    Machine,
}

/// Set for a build that starts over because of a base image's triggers.
pub(crate) const STARTS_OVER: &str = "NACRE_STARTS_OVER";

impl Environment {
    /// Takes in the process's own.
    #[expect(clippy::disallowed_methods, reason = "the one place where the environment is read")]
    pub(crate) fn of_process() -> Self {
        let stderr = std::io::stderr();
        Self {
            variables: std::env::vars_os().collect(),
            current_dir: std::env::current_dir().unwrap_or_else(|_| PathBuf::from(".")),
            stdout_terminal: std::io::stdout().is_terminal(),
            stderr_terminal: stderr.is_terminal(),
            // Knows NO_COLOR, CLICOLOR_FORCE and TERM.
            color: anstream::AutoStream::choice(&stderr) != anstream::ColorChoice::Never,
        }
    }

    /// Returns where the program seems to run: in a job of a service, in a container, or on a machine.
    pub(crate) fn surroundings(&self) -> Surroundings {
        let set = |name: &str| self.get(name).is_some();
        match () {
            () if set("GITLAB_CI") => Surroundings::GitLab,
            () if set("GITHUB_ACTIONS") => Surroundings::GitHub,
            () if set("KUBERNETES_SERVICE_HOST") => Surroundings::Kubernetes,
            () if Path::new("/run/.containerenv").exists() => Surroundings::Podman,
            () if Path::new("/.dockerenv").exists() => Surroundings::Docker,
            () => Surroundings::Machine,
        }
    }

    /// Returns whether this build has begun without a namespace and needs one.
    pub(crate) fn starts_over(&self) -> bool {
        self.get(STARTS_OVER).is_some()
    }

    /// Returns a variable that is set and not empty.
    fn get(&self, name: &str) -> Option<&OsStr> {
        self.variables.get(OsStr::new(name)).map(OsString::as_os_str).filter(|value| !value.is_empty())
    }

    fn text(&self, name: &str) -> Result<Option<String>, RequestError> {
        match self.variables.get(OsStr::new(name)) {
            None => Ok(None),
            Some(value) => {
                value.to_str().map(|value| Some(value.to_owned())).ok_or(RequestError::NotUnicode(name.to_owned()))
            }
        }
    }

    /// Returns the directory of cache and images: the flag, NACRE_STORE, or one in the user's data directory.
    pub(crate) fn store(&self, flag: Option<&Path>) -> Result<PathBuf, RequestError> {
        let path = match (flag, self.get("NACRE_STORE"), self.get("XDG_DATA_HOME"), self.get("HOME")) {
            (Some(flag), ..) if flag.as_os_str().is_empty() => return Err(RequestError::EmptyStore),
            (Some(flag), ..) => flag.to_owned(),
            (None, Some(store), ..) => store.into(),
            // The base directory specification tells to ignore a relative one.
            (None, None, Some(data), _) if Path::new(data).is_absolute() => Path::new(data).join("nacre"),
            (None, None, _, Some(home)) => Path::new(home).join(".local/share/nacre"),
            (None, None, _, None) => return Err(RequestError::NoStore),
        };
        Ok(self.current_dir.join(path))
    }

    /// Returns the variables whose names begin so.
    #[cfg(feature = "s3")]
    pub(crate) fn with_prefix(&self, prefix: &str) -> Vec<(String, String)> {
        let text = |text: &OsString| text.to_str().map(str::to_owned);
        let all = self.variables.iter().filter_map(|(name, value)| Some((text(name)?, text(value)?)));
        all.filter(|(name, _)| name.starts_with(prefix)).collect()
    }

    /// Returns the directories of programs.
    pub(crate) fn program_directories(&self) -> Vec<PathBuf> {
        let path = self.get("PATH").unwrap_or(OsStr::new("/usr/local/bin:/usr/bin:/bin"));
        std::env::split_paths(path).filter(|directory| directory.is_absolute()).collect()
    }

    /// Returns the user's home directory.
    pub(crate) fn home(&self) -> Option<&Path> {
        self.get("HOME").map(Path::new)
    }

    /// Returns what git may know of the environment: how to reach servers, nothing that changes what it does.
    pub(crate) fn for_git(&self) -> Vec<(OsString, OsString)> {
        const NAMES: [&str; 24] = [
            "PATH",
            "HOME",
            "USER",
            "LOGNAME",
            "TMPDIR",
            "LD_LIBRARY_PATH",
            "GIT_EXEC_PATH",
            "SSH_AUTH_SOCK",
            "GIT_SSH",
            "GIT_SSH_COMMAND",
            "GIT_SSH_VARIANT",
            "SSL_CERT_FILE",
            "SSL_CERT_DIR",
            "GIT_SSL_CAINFO",
            "GIT_SSL_CAPATH",
            "GIT_SSL_NO_VERIFY",
            "http_proxy",
            "https_proxy",
            "HTTPS_PROXY",
            "no_proxy",
            "NO_PROXY",
            "all_proxy",
            "ALL_PROXY",
            "HTTP_PROXY",
        ];
        NAMES.iter().filter_map(|name| Some((OsString::from(name), self.get(name)?.to_owned()))).collect()
    }

    fn docker_config(&self) -> Option<PathBuf> {
        let dir = match (self.get("DOCKER_CONFIG"), self.get("HOME")) {
            (Some(dir), _) => PathBuf::from(dir),
            (None, Some(home)) => Path::new(home).join(".docker"),
            (None, None) => return None,
        };
        Some(dir.join("config.json"))
    }

    /// Returns the file that a login goes to.
    pub(crate) fn login_file(&self) -> Result<PathBuf, RequestError> {
        let named = self.get("REGISTRY_AUTH_FILE").map(PathBuf::from);
        named.or_else(|| self.docker_config()).map(|path| self.current_dir.join(path)).ok_or(RequestError::NoHome)
    }

    /// Returns how to talk to registries.
    pub(crate) fn registry(&self, args: &RegistryArgs) -> ClientOptions {
        let home = |rest: &str| self.get("HOME").map(|home| Path::new(home).join(rest));
        let below = |variable: &str, rest: &str| self.get(variable).map(|directory| Path::new(directory).join(rest));
        let credentials = match self.get("REGISTRY_AUTH_FILE") {
            Some(file) => vec![PathBuf::from(file)],
            None => [
                self.docker_config(),
                below("XDG_RUNTIME_DIR", "containers/auth.json"),
                below("XDG_CONFIG_HOME", "containers/auth.json").or_else(|| home(".config/containers/auth.json")),
            ]
            .into_iter()
            .flatten()
            .collect(),
        };
        let certificates = [
            home(".docker/certs.d"),
            home(".config/containers/certs.d"),
            Some("/etc/containers/certs.d".into()),
            Some("/etc/docker/certs.d".into()),
        ];
        // Steps are run elsewhere; paths must not depend on the directory we were started in.
        let absolute = |paths: Vec<PathBuf>| paths.into_iter().map(|path| self.current_dir.join(path)).collect();
        ClientOptions {
            credentials: absolute(credentials),
            certificates: certificates.into_iter().flatten().collect(),
            authorities: absolute(args.authorities.clone()),
            insecure: args.insecure.clone(),
            mirrors: self.mirrors(args),
            proxies: self.proxies(),
            ..ClientOptions::default()
        }
    }

    /// Those of the flags, else those of NACRE_REGISTRY_MIRRORS.
    fn mirrors(&self, args: &RegistryArgs) -> Vec<Mirror> {
        let variable = self.get("NACRE_REGISTRY_MIRRORS").and_then(OsStr::to_str).unwrap_or_default();
        match args.mirrors.as_slice() {
            [] => variable.split([',', ' ']).filter_map(Mirror::parse).collect(),
            given => given.to_vec(),
        }
    }

    fn proxies(&self) -> Proxies {
        // As in Go, capital letters first, and what is empty is as good as not there.
        let first = |names: &[&str]| {
            let mut values = names.iter().filter_map(|name| self.get(name)?.to_str());
            values.find(|value| !value.trim().is_empty()).map(|value| value.trim().to_owned())
        };
        Proxies {
            http: first(&["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"]),
            https: first(&["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]),
            exceptions: first(&["NO_PROXY", "no_proxy"]),
        }
    }
}

/// The command line makes no sense, or names what is not there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    /// Neither a directory nor an address.
    #[error("build context `{}` not found", .0.display())]
    NoContext(PathBuf),
    /// A file.
    #[error("build context `{}` is not a directory", .0.display())]
    ContextNotDirectory(PathBuf),
    /// A context's directory cannot be looked at.
    #[error("cannot use build context `{}`", path.display())]
    ContextUnreadable {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A repository's address whose query makes no sense.
    #[error("invalid git address `{url}`")]
    BadGitUrl {
        /// As typed.
        url: String,
        /// Why.
        source: GitUrlError,
    },
    /// `-f - -`.
    #[error("both the build context and the Dockerfile are to come from standard input")]
    StdinTwice,
    /// Docker calls a build arg, label and the like `NAME=VALUE`; this one has no name.
    #[error("{flag} `{value}` has no name")]
    NoName {
        /// The flag.
        flag: &'static str,
        /// As typed.
        value: String,
    },
    /// A variable to pass on is not text.
    #[error("environment variable {0} is not valid UTF-8")]
    NotUnicode(String),
    /// Not `NAME=SOURCE`.
    #[error("invalid --build-context `{0}`, expected NAME=SOURCE")]
    BadBuildContext(String),
    /// A named context's directory is not there.
    #[error("build context `{name}`: `{}` is not a directory", path.display())]
    NoNamedContext {
        /// Its name.
        name: String,
        /// The directory.
        path: PathBuf,
    },
    /// A value that cannot be read, with what was expected.
    #[error("invalid {flag} `{value}`: {expected}")]
    BadValue {
        /// The flag.
        flag: &'static str,
        /// As typed.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// An attribute that the flag does not have.
    #[error("unknown attribute `{attribute}` in {flag} `{value}`")]
    UnknownAttribute {
        /// The flag.
        flag: &'static str,
        /// As typed.
        value: String,
        /// The attribute.
        attribute: String,
        /// Attributes that the flag has.
        known: &'static str,
    },
    /// An attribute is missing.
    #[error("{flag} `{value}` needs {attribute}")]
    MissingAttribute {
        /// The flag.
        flag: &'static str,
        /// As typed.
        value: String,
        /// The attribute.
        attribute: &'static str,
    },
    /// The same id twice.
    #[error("{flag} `{id}` is given twice")]
    Twice {
        /// The flag.
        flag: &'static str,
        /// The id.
        id: String,
    },
    /// A secret's file is not there.
    #[error("secret `{id}`: cannot read `{}`", path.display())]
    ReadSecret {
        /// Which.
        id: String,
        /// Its file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// More than the limit.
    #[error("secret `{id}` is larger than 500 KiB")]
    SecretTooLarge {
        /// Which.
        id: String,
    },
    /// `--ssh default` without an agent.
    #[error("no ssh agent for --ssh `{0}`: SSH_AUTH_SOCK is not set")]
    NoSshAgent(String),
    /// Its socket or key is not there.
    #[error("--ssh `{id}`: cannot use `{}`", path.display())]
    SshUnusable {
        /// Which.
        id: String,
        /// The socket or key.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// More than one socket, or sockets and keys.
    #[error("--ssh `{0}`: give one agent socket, or only key files")]
    SshMixed(String),
    /// Not a user of the network.
    #[error("unknown network mode `{0}`")]
    UnknownNetwork(String),
    /// Not a time for a step.
    #[error("--step-timeout `{0}` is no duration above 0")]
    BadTimeout(String),
    /// Not a way to have owners.
    #[error("unknown ownership `{0}`")]
    UnknownOwnership(String),
    /// Not a kind of sandbox.
    #[error("unknown isolation `{0}`")]
    UnknownIsolation(String),
    /// Not a right.
    #[error("unknown right `{0}` in --allow")]
    UnknownRight(String),
    /// Not a method.
    #[error("unknown method `{0}` in --call")]
    UnknownCall(String),
    /// Not a mode.
    #[error("unknown progress mode `{mode}` in {from}")]
    UnknownProgress {
        /// As typed.
        mode: String,
        /// The flag or variable.
        from: &'static str,
    },
    /// Binary data would end on the screen.
    #[error("refusing to write the result of --output `{0}` to a terminal")]
    OutputToTerminal(String),
    /// Several results in one stream.
    #[error("more than one output goes to standard output")]
    StdoutTwice,
    /// Nothing says where to push to.
    #[error("{0} needs the name of an image")]
    PushWithoutName(String),
    /// A tag makes no sense.
    #[error("`{0}` has a tag and is to be pushed by its digest")]
    TagByDigest(String),
    /// Not a name.
    #[error("invalid image name `{name}`: {reason}")]
    BadName {
        /// As typed.
        name: String,
        /// Why.
        reason: String,
    },
    /// No home for credentials.
    #[error("no place for credentials: neither REGISTRY_AUTH_FILE, DOCKER_CONFIG nor HOME is set")]
    NoHome,
    /// No home.
    #[error("no directory for the store: neither --store, NACRE_STORE, XDG_DATA_HOME nor HOME is set")]
    NoStore,
    /// `--store=`.
    #[error("--store is empty")]
    EmptyStore,
    /// Not a number.
    #[error("SOURCE_DATE_EPOCH `{0}` is not a number of seconds")]
    BadEpoch(String),
}

impl RequestError {
    /// Returns a way out, one sentence.
    pub(crate) fn help(&self) -> Option<String> {
        let help = match self {
            Self::NoContext(path) if path.as_os_str() == "" => "`.` is the current directory".to_owned(),
            Self::NoContext(_) => {
                "give a directory, an address that ends in .git or starts with http://, or - for standard input"
                    .to_owned()
            }
            Self::ContextNotDirectory(path) => {
                let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
                format!("a Dockerfile is named with -f: nacre build -f {} {}", path.display(), dir.display())
            }
            Self::StdinTwice => "give one of them as a file or directory".to_owned(),
            Self::UnknownAttribute { known, .. } => format!("known are {known}"),
            Self::ReadSecret { .. } => "a secret is given as id=ID,src=FILE or id=ID,env=VARIABLE".to_owned(),
            Self::SecretTooLarge { .. } => "large files come in through a build context: --build-context".to_owned(),
            Self::NoSshAgent(_) => "start ssh-agent, or name a key: --ssh default=$HOME/.ssh/id_ed25519".to_owned(),
            Self::UnknownNetwork(_) => "there are default, none, host and pasta".to_owned(),
            Self::BadTimeout(_) => "write it as 90s, 10m or 1h30m".to_owned(),
            Self::UnknownOwnership(_) => "there are auto, subid and emulate".to_owned(),
            Self::UnknownIsolation(kind) if kind == "process" || kind == "hyperv" => {
                "that is for Windows; on Linux there are auto (docker's default), userns and chroot".to_owned()
            }
            Self::UnknownIsolation(_) => "there are auto, userns and chroot".to_owned(),
            Self::UnknownRight(_) => "there are network.host and security.insecure".to_owned(),
            Self::UnknownCall(_) => "there are build, check, outline and targets".to_owned(),
            Self::UnknownProgress { .. } => "there are auto, tty, plain, rawjson and quiet".to_owned(),
            Self::OutputToTerminal(_) => "give dest=FILE, or pipe the output into a program".to_owned(),
            Self::PushWithoutName(_) => "give one: -t REGISTRY/REPOSITORY:TAG".to_owned(),
            Self::TagByDigest(_) => "name the repository alone".to_owned(),
            Self::NoHome => "set DOCKER_CONFIG to a directory".to_owned(),
            Self::NoStore | Self::EmptyStore => "give a directory: --store DIR".to_owned(),
            Self::BadEpoch(_) => "use a Unix time, as `git log -1 --pretty=%ct` prints it".to_owned(),
            _ => return None,
        };
        Some(help)
    }
}

/// Gives the flags of `nacre build` their meaning.
pub(crate) fn build_request(args: BuildArgs, env: &Environment) -> Result<BuildRequest, RequestError> {
    let mut notices = args.without_meaning();
    let store = env.store(args.store.as_deref())?;
    let context = context_source(&args.context, env)?;
    let dockerfile = dockerfile_source(args.file.as_deref(), &context, env)?;
    let docker_config = env.docker_config();

    let mut build_args = Vec::new();
    for arg in &args.build_args {
        let (name, value) = match arg.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (arg.as_str(), env.text(arg)?),
        };
        check_name("--build-arg", name, arg)?;
        // Without a value and not in the environment: as if it had not been given.
        if let Some(value) = value {
            set(&mut build_args, name, value);
        }
    }
    if !has(&build_args, "SOURCE_DATE_EPOCH")
        && let Some(value) = env.text("SOURCE_DATE_EPOCH")?.filter(|value| !value.is_empty())
    {
        set(&mut build_args, "SOURCE_DATE_EPOCH", value);
    }
    if let Some(text) = docker_config.as_deref().and_then(|path| std::fs::read_to_string(path).ok()) {
        for (name, value) in docker_proxies(&text) {
            if !has(&build_args, &name) && !has(&build_args, &name.to_lowercase()) {
                set(&mut build_args, &name, value);
            }
        }
    }
    let source_date_epoch = match build_args.iter().find(|(name, _)| name == "SOURCE_DATE_EPOCH") {
        Some((_, value)) if !value.is_empty() => {
            Some(value.parse().map_err(|_| RequestError::BadEpoch(value.clone()))?)
        }
        _ => None,
    };

    let mut labels = Vec::new();
    for label in &args.labels {
        let (name, value) = label.split_once('=').unwrap_or((label, ""));
        check_name("--label", name, label)?;
        set(&mut labels, name, value.to_owned());
    }
    let annotations = args.annotations.iter().map(|text| annotation("--annotation", text)).collect::<Result<_, _>>()?;

    let mut named_contexts: Vec<(String, NamedSource)> = Vec::new();
    for text in &args.build_contexts {
        let (name, source) = named_source(text, env)?;
        named_contexts.retain(|(other, _)| *other != name);
        named_contexts.push((name, source));
    }

    let call = call(&args)?;
    let outputs = outputs(&args, env, call, &mut notices)?;
    let cache_use = match () {
        () if args.no_cache => CacheUse::None,
        () if args.no_cache_filter.is_empty() => CacheUse::All,
        () => CacheUse::NotStages(args.no_cache_filter.clone()),
    };
    let secrets = secrets(&args.secrets, env)?;
    let ssh = ssh_agents(&args.ssh, env)?;
    let network = match args.network.as_deref() {
        None | Some("" | "default" | "bridge" | "pasta") => Network::Default,
        Some("none") => Network::None,
        Some("host") => Network::Host,
        Some(other) => return Err(RequestError::UnknownNetwork(other.to_owned())),
    };
    let step_timeout = args.step_timeout.as_deref().map(step_timeout).transpose()?;
    let ownership = match args.ownership.as_deref() {
        None | Some("" | "auto") => OwnershipChoice::Auto,
        Some("subid") => OwnershipChoice::SubordinateIds,
        Some("emulate") => OwnershipChoice::Emulate,
        Some(other) => return Err(RequestError::UnknownOwnership(other.to_owned())),
    };
    let isolation = match args.isolation.as_deref() {
        None | Some("" | "auto" | "default" | "userns") => Isolation::Namespaces,
        Some("chroot") => Isolation::Chroot,
        Some(other) => return Err(RequestError::UnknownIsolation(other.to_owned())),
    };
    let allow = rights(&args.allow, &mut notices)?;
    let ulimits = args.ulimits.iter().map(|text| ulimit(text)).collect::<Result<_, _>>()?;
    let shm_size_bytes = args.shm_size.as_deref().map(|text| size_bytes("--shm-size", text)).transpose()?;
    let limits = limits(&args)?;
    let progress = progress_mode(&args, env)?;
    let mut registry = env.registry(&args.registry);
    for output in outputs.iter().filter(|output| output.insecure) {
        for name in &output.names {
            registry.insecure.extend(Reference::parse(name).map(|reference| reference.host));
        }
    }
    let given = |values: &[String]| -> Vec<String> {
        values.iter().filter(|value| !value.trim().is_empty()).cloned().collect()
    };
    let mut cache_from = Vec::new();
    for text in given(&args.cache_from) {
        cache_from.push(cache_options::cache_source(&text, env, &mut registry.insecure)?);
    }
    let mut cache_to = Vec::new();
    for text in given(&args.cache_to) {
        cache_to.push(cache_options::cache_target(&text, env, &mut registry.insecure)?);
    }

    Ok(BuildRequest {
        context,
        dockerfile,
        target: args.target.filter(|target| !target.is_empty()),
        build_args,
        labels,
        annotations,
        platforms: args
            .platforms
            .into_iter()
            .map(|text| text.trim().to_owned())
            .filter(|text| !text.is_empty())
            .collect(),
        named_contexts,
        outputs,
        iid_file: args.iid_file,
        metadata_file: args.metadata_file,
        call,
        store,
        cache_use,
        cache_from,
        cache_to,
        pull: args.pull,
        explain: args.explain,
        timings: args.timings,
        trace: args.trace,
        secrets,
        ssh,
        network,
        pasta: args.network.as_deref() == Some("pasta"),
        allow_secret_leak: args.allow_secret_leak,
        no_secret_warnings: args.no_secret_warnings,
        step_timeout,
        ownership,
        isolation,
        extra_hosts: args.add_hosts.iter().map(|text| extra_host(text)).collect::<Result<_, _>>()?,
        allow,
        ulimits,
        shm_size_bytes,
        cgroup_parent: limits.parent.clone(),
        limits,
        source_date_epoch,
        progress,
        quiet: args.quiet,
        registry,
        notices,
    })
}

fn set(list: &mut Vec<(String, String)>, name: &str, value: String) {
    match list.iter_mut().find(|(other, _)| other == name) {
        Some(entry) => entry.1 = value,
        None => list.push((name.to_owned(), value)),
    }
}

fn has(list: &[(String, String)], name: &str) -> bool {
    list.iter().any(|(other, _)| other == name)
}

fn check_name(flag: &'static str, name: &str, value: &str) -> Result<(), RequestError> {
    if name.is_empty() { Err(RequestError::NoName { flag, value: value.to_owned() }) } else { Ok(()) }
}

fn is_http(text: &str) -> bool {
    text.starts_with("http://") || text.starts_with("https://")
}

/// Reads an address of a git repository; `None` when it names a file to fetch.
fn git(text: &str) -> Option<Result<GitUrl, RequestError>> {
    // Docker's short form; GitHub serves a repository with and without the ending.
    let short = text.starts_with("github.com/").then(|| {
        let (path, rest) = text.split_at(text.find(['#', '?']).unwrap_or(text.len()));
        format!("https://{}.git{rest}", path.trim_end_matches('/').trim_end_matches(".git"))
    });
    let url = GitUrl::parse(short.as_deref().unwrap_or(text))?;
    Some(url.map_err(|source| RequestError::BadGitUrl { url: text.to_owned(), source }))
}

fn context_source(context: &OsStr, env: &Environment) -> Result<ContextSource, RequestError> {
    if context == "-" {
        return Ok(ContextSource::Stdin);
    }
    let path = Path::new(context);
    // A directory wins over an address that looks the same (`github.com/…`).
    match std::fs::metadata(env.current_dir.join(path)) {
        Ok(metadata) if metadata.is_dir() && !context.is_empty() => Ok(ContextSource::Directory(path.to_owned())),
        Ok(_) if !context.is_empty() => Err(RequestError::ContextNotDirectory(path.to_owned())),
        Ok(_) => Err(RequestError::NoContext(path.to_owned())),
        Err(error) => match context.to_str().map(|text| (text, git(text))) {
            Some((_, Some(url))) => Ok(ContextSource::Git(url?)),
            Some((text, None)) if is_http(text) => Ok(ContextSource::Http(text.to_owned())),
            _ if error.kind() == std::io::ErrorKind::NotFound => Err(RequestError::NoContext(path.to_owned())),
            _ => Err(RequestError::ContextUnreadable { path: path.to_owned(), source: error }),
        },
    }
}

fn dockerfile_source(
    file: Option<&OsStr>,
    context: &ContextSource,
    env: &Environment,
) -> Result<DockerfileSource, RequestError> {
    let Some(file) = file.filter(|file| !file.is_empty()) else { return Ok(DockerfileSource::Default) };
    if file == "-" {
        return match context {
            ContextSource::Stdin => Err(RequestError::StdinTwice),
            _ => Ok(DockerfileSource::Stdin),
        };
    }
    if let Some(text) = file.to_str().filter(|text| is_http(text)) {
        return Ok(DockerfileSource::Http(text.to_owned()));
    }
    let path = Path::new(file);
    match context {
        ContextSource::Directory(dir) => {
            // Paths start at the current directory; a name that is only found in the context is meant too.
            let in_context = dir.join(path);
            let exists = |path: &Path| env.current_dir.join(path).exists();
            if path.is_relative() && !exists(path) && exists(&in_context) {
                Ok(DockerfileSource::File(in_context))
            } else {
                Ok(DockerfileSource::File(path.to_owned()))
            }
        }
        _ if path.is_absolute() => Ok(DockerfileSource::File(path.to_owned())),
        _ => Ok(DockerfileSource::InContext(path.to_string_lossy().into_owned())),
    }
}

fn named_source(text: &str, env: &Environment) -> Result<(String, NamedSource), RequestError> {
    let bad = || RequestError::BadBuildContext(text.to_owned());
    let (name, source) =
        text.split_once('=').filter(|(name, source)| !name.is_empty() && !source.is_empty()).ok_or_else(bad)?;
    let parsed = if let Some(image) = source.strip_prefix("docker-image://") {
        NamedSource::Image(image.to_owned())
    } else if let Some(layout) = source.strip_prefix("oci-layout://") {
        let (rest, digest) = match layout.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.to_owned())),
            None => (layout, None),
        };
        let (path, tag) = match rest.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => (path, Some(tag.to_owned())),
            _ => (rest, None),
        };
        let path = directory(name, path, env)?;
        NamedSource::OciLayout { path, tag, digest }
    } else if let Some(target) = source.strip_prefix("target:") {
        NamedSource::Target(target.to_owned())
    } else if env.current_dir.join(source).is_dir() {
        NamedSource::Directory(PathBuf::from(source))
    } else if let Some(url) = git(source) {
        NamedSource::Git(url?)
    } else if is_http(source) {
        NamedSource::Http(source.to_owned())
    } else {
        NamedSource::Directory(directory(name, source, env)?)
    };
    Ok((name.to_owned(), parsed))
}

fn directory(name: &str, path: &str, env: &Environment) -> Result<PathBuf, RequestError> {
    if env.current_dir.join(path).is_dir() {
        Ok(PathBuf::from(path))
    } else {
        Err(RequestError::NoNamedContext { name: name.to_owned(), path: PathBuf::from(path) })
    }
}

/// Splits comma separated fields; a field in double quotes may hold commas, `""` in it is a quote.
pub(crate) fn fields(text: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut quoted = false;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let at_start = fields.last().is_none_or(String::is_empty);
        match c {
            '"' if !quoted && at_start => quoted = true,
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                push(&mut fields, '"');
            }
            '"' if quoted => quoted = false,
            ',' if !quoted => fields.push(String::new()),
            c => push(&mut fields, c),
        }
    }
    fields
}

fn push(fields: &mut [String], c: char) {
    if let Some(field) = fields.last_mut() {
        field.push(c);
    }
}

/// Fields as names (in lower case) and values; a field without `=` has the value `default`.
pub(crate) fn attributes(text: &str, default: &str) -> Vec<(String, String)> {
    fields(text)
        .iter()
        .map(|field| match field.split_once('=') {
            Some((name, value)) => (name.trim().to_lowercase(), value.to_owned()),
            None => (field.trim().to_lowercase(), default.to_owned()),
        })
        .collect()
}

fn call(args: &BuildArgs) -> Result<Call, RequestError> {
    let fields = fields(&args.call);
    let (method, rest) = fields.split_first().map_or(("", &[][..]), |(method, rest)| (method.as_str(), rest));
    let mut format = CallFormat::Text;
    for field in rest {
        match field.split_once('=') {
            Some(("format", "text")) => format = CallFormat::Text,
            Some(("format", "json")) => format = CallFormat::Json,
            Some(("format", "sarif")) => format = CallFormat::Sarif,
            _ => {
                let expected = "after the method comes format=text, format=json or format=sarif";
                return Err(RequestError::BadValue { flag: "--call", value: args.call.clone(), expected });
            }
        }
    }
    match method {
        "" | "build" if args.check => Ok(Call::Check(format)),
        "" | "build" => Ok(Call::Build),
        "check" | "lint" => Ok(Call::Check(format)),
        "outline" => Ok(Call::Outline(format)),
        "targets" => Ok(Call::Targets(format)),
        other => Err(RequestError::UnknownCall(other.to_owned())),
    }
}

fn outputs(
    args: &BuildArgs,
    env: &Environment,
    call: Call,
    notices: &mut Vec<String>,
) -> Result<Vec<Output>, RequestError> {
    let mut outputs = Vec::new();
    for text in &args.outputs {
        outputs.push(output(text, &args.tags, env, notices)?);
    }
    if args.push && !outputs.iter().any(|output| output.push.is_some()) {
        // As buildx: an image output is pushed; without one there is one more output.
        let named = args
            .outputs
            .iter()
            .zip(&mut outputs)
            .find(|(text, output)| output.kind == OutputKind::Store && text.contains("type=image"));
        match named {
            Some((_, output)) => output.push = Some(Push::ByName),
            None => {
                let output = Output { push: Some(Push::ByName), ..Output::of_kind(OutputKind::Registry, &args.tags) };
                outputs.push(output);
            }
        }
    }
    for output in outputs.iter().filter(|output| output.push.is_some()) {
        let what = if output.kind == OutputKind::Registry { "a push" } else { "--output type=image,push=true" };
        if output.names.is_empty() {
            return Err(RequestError::PushWithoutName(what.to_owned()));
        }
        for name in &output.names {
            let bad = |reason: String| RequestError::BadName { name: name.clone(), reason };
            Reference::parse(name).map_err(|error| bad(error.to_string()))?;
            let last = name.rsplit('/').next().unwrap_or_default();
            if output.push == Some(Push::ByDigest) && last.contains(':') {
                return Err(RequestError::TagByDigest(name.clone()));
            }
            if name.contains('@') {
                return Err(bad("a digest cannot be given to an image that is to be built".to_owned()));
            }
        }
    }
    let in_store = |output: &Output| output.kind == OutputKind::Store;
    if (outputs.is_empty() || args.load) && !outputs.iter().any(in_store) && call == Call::Build {
        outputs.push(Output::of_kind(OutputKind::Store, &args.tags));
    }
    if args.platforms.len() > 1
        && let Some(at) = outputs.iter().position(|output| matches!(output.kind, OutputKind::Docker { .. }))
    {
        return Err(RequestError::BadValue {
            flag: "--output",
            value: args.outputs.get(at).cloned().unwrap_or_default(),
            expected: "a docker archive holds one platform; type=oci holds several",
        });
    }
    let to_stdout = outputs.iter().filter(|output| output.dest() == Some(&Destination::Stdout)).count();
    if to_stdout > 1 {
        return Err(RequestError::StdoutTwice);
    }
    Ok(outputs)
}

impl Output {
    fn of_kind(kind: OutputKind, names: &[String]) -> Self {
        Self {
            docker_media_types: matches!(kind, OutputKind::Docker { .. }),
            kind,
            names: names.to_vec(),
            push: None,
            insecure: false,
            compression: Compression::Gzip(None),
            force_compression: false,
            rewrite_timestamp: false,
            annotations: Vec::new(),
        }
    }

    /// Where an archive goes.
    pub(crate) fn dest(&self) -> Option<&Destination> {
        match &self.kind {
            OutputKind::Oci { dest, .. } | OutputKind::Docker { dest, .. } | OutputKind::Tar { dest, .. } => Some(dest),
            OutputKind::Store | OutputKind::Registry | OutputKind::Local { .. } | OutputKind::CacheOnly => None,
        }
    }
}

fn output(text: &str, tags: &[String], env: &Environment, notices: &mut Vec<String>) -> Result<Output, RequestError> {
    const FLAG: &str = "--output";
    let bad = |expected| RequestError::BadValue { flag: FLAG, value: text.to_owned(), expected };
    // A single word without `=` is a directory, or `-` for a tar archive.
    let attributes = match fields(text).as_slice() {
        [word] if word == "-" => vec![("type".to_owned(), "tar".to_owned()), ("dest".to_owned(), "-".to_owned())],
        [word] if word.is_empty() => return Err(bad("expected a directory or type=…")),
        [word] if !word.contains('=') => {
            vec![("type".to_owned(), "local".to_owned()), ("dest".to_owned(), word.clone())]
        }
        _ => attributes(text, "true"),
    };
    let find = |name: &str| attributes.iter().rev().find(|(other, _)| other == name).map(|(_, value)| value.as_str());
    let flag =
        |name: &str| find(name).map(|value| cli::boolean(value).map_err(|_| bad("expected true or false"))).transpose();
    let kind_name = find("type").unwrap_or_default().to_owned();
    let path = find("dest").filter(|dest| !dest.is_empty());
    let dest = || match path {
        Some("-") | None if env.stdout_terminal => Err(RequestError::OutputToTerminal(text.to_owned())),
        Some("-") | None => Ok(Destination::Stdout),
        Some(path) => Ok(Destination::Path(PathBuf::from(path))),
    };
    let needs_dest = || RequestError::MissingAttribute { flag: FLAG, value: text.to_owned(), attribute: "dest=…" };
    let tar = flag("tar")?.unwrap_or(true);
    let archive = |tar: bool| match path {
        None | Some("-") if !tar => Err(needs_dest()),
        _ => dest(),
    };
    let platform_split = flag("platform-split")?;
    let kind = match kind_name.as_str() {
        "oci" => OutputKind::Oci { dest: archive(tar)?, tar },
        // Without a destination docker's own exporter loads into the daemon; here the store is in its place.
        "docker" if path.is_none() => OutputKind::Store,
        "docker" => OutputKind::Docker { dest: archive(tar)?, tar },
        "local" => OutputKind::Local {
            dest: path.filter(|path| *path != "-").map(PathBuf::from).ok_or_else(needs_dest)?,
            platform_split,
        },
        "tar" => OutputKind::Tar { dest: dest()?, platform_split },
        "image" => OutputKind::Store,
        "registry" => OutputKind::Registry,
        "cacheonly" => OutputKind::CacheOnly,
        "" => return Err(RequestError::MissingAttribute { flag: FLAG, value: text.to_owned(), attribute: "type=…" }),
        _ => return Err(bad("there are the types oci, docker, local, tar, image, registry and cacheonly")),
    };
    let mut output = Output::of_kind(kind, tags);
    if let Some(names) = find("name").filter(|names| !names.is_empty()) {
        output.names = names.split(',').map(|name| name.trim().to_owned()).collect();
    }
    output.compression = compression(find("compression"), find("compression-level")).map_err(bad)?;
    let by_digest = flag("push-by-digest")?.unwrap_or(false);
    let push = match kind_name.as_str() {
        "registry" => flag("push")?.unwrap_or(true),
        "image" => flag("push")?.unwrap_or(false),
        _ => false,
    };
    if output.kind == OutputKind::Registry && !push {
        return Err(bad("type=registry is there to push"));
    }
    output.push = push.then_some(if by_digest { Push::ByDigest } else { Push::ByName });
    output.insecure = flag("registry.insecure")?.unwrap_or(false);
    output.force_compression = flag("force-compression")?.unwrap_or(false);
    output.rewrite_timestamp = flag("rewrite-timestamp")?.unwrap_or(false);
    if let Some(oci) = flag("oci-mediatypes")? {
        output.docker_media_types = !oci;
    }
    for (name, value) in &attributes {
        match name.as_str() {
            "type" | "dest" | "tar" | "name" | "platform-split" | "push" | "compression" | "compression-level"
            | "force-compression" | "rewrite-timestamp" | "oci-mediatypes" => {}
            // What is pushed has its canonical name, `NAME@DIGEST`, in the registry anyway.
            "push-by-digest" | "registry.insecure" | "name-canonical" if output.push.is_some() => {}
            name if name.starts_with("annotation") => {
                // `annotation.NAME=VALUE`, `annotation-index.NAME=VALUE`
                let name = name.trim_start_matches("annotation");
                let placed = match name.strip_prefix('-') {
                    Some(place) => place.replacen('.', ":", 1),
                    None => name.trim_start_matches('.').to_owned(),
                };
                output.annotations.push(annotation(FLAG, &format!("{placed}={value}"))?);
            }
            // Attributes of buildx that change nothing here: how a daemon stores or names an image.
            "store"
            | "unpack"
            | "name-canonical"
            | "dangling-name-prefix"
            | "buildinfo"
            | "context"
            | "registry.insecure"
            | "prefer-nondist-layers"
            | "push-by-digest"
            | "attestation-prefix"
            | "mode" => {
                notices.push(format!("{name} in --output does nothing"));
            }
            _ => {
                return Err(RequestError::UnknownAttribute {
                    flag: FLAG,
                    value: text.to_owned(),
                    attribute: name.clone(),
                    known: "type, dest, name, tar, push, push-by-digest, compression, compression-level, \
                            force-compression, oci-mediatypes, rewrite-timestamp, platform-split and annotation",
                });
            }
        }
    }
    Ok(output)
}

/// Reads `compression` and `compression-level`; the error is a sentence.
pub(crate) fn compression(codec: Option<&str>, level: Option<&str>) -> Result<Compression, &'static str> {
    let level = |limit: std::ops::RangeInclusive<u32>, expected| match level {
        None | Some("") => Ok(None),
        Some(level) => level.parse().ok().filter(|level| limit.contains(level)).map(Some).ok_or(expected),
    };
    match codec {
        None | Some("" | "gzip") => Ok(Compression::Gzip(level(0..=9, "a gzip level is 0 to 9")?)),
        Some("zstd") => Ok(Compression::Zstd(level(1..=22, "a zstd level is 1 to 22")?)),
        Some("uncompressed") => Ok(Compression::Uncompressed),
        Some(_) => Err("there are the compressions gzip, zstd and uncompressed"),
    }
}

fn annotation(flag: &'static str, text: &str) -> Result<Annotation, RequestError> {
    let (name, value) = text.split_once('=').ok_or_else(|| RequestError::BadValue {
        flag,
        value: text.to_owned(),
        expected: "expected NAME=VALUE",
    })?;
    let (place, name) = match name.split_once(':') {
        Some(("manifest", name)) => (AnnotationPlace::Manifest, name),
        Some(("index", name)) => (AnnotationPlace::Index, name),
        Some(("manifest-descriptor", name)) => (AnnotationPlace::ManifestDescriptor, name),
        Some(("index-descriptor", name)) => (AnnotationPlace::IndexDescriptor, name),
        _ => (AnnotationPlace::Manifest, name),
    };
    check_name(flag, name, text)?;
    Ok(Annotation { place, name: name.to_owned(), value: value.to_owned() })
}

fn secrets(flags: &[String], env: &Environment) -> Result<Vec<Secret>, RequestError> {
    const FLAG: &str = "--secret";
    let mut secrets: Vec<Secret> = Vec::new();
    for text in flags {
        let (mut id, mut file, mut variable, mut kind) = (None, None, None, None);
        for (name, value) in attributes(text, "") {
            match name.as_str() {
                "id" => id = Some(value),
                "src" | "source" => file = Some(value),
                "env" => variable = Some(value),
                "type" if value == "file" || value == "env" => kind = Some(value),
                "type" => {
                    let expected = "there are the types file and env";
                    return Err(RequestError::BadValue { flag: FLAG, value: text.clone(), expected });
                }
                _ => {
                    return Err(RequestError::UnknownAttribute {
                        flag: FLAG,
                        value: text.clone(),
                        attribute: name,
                        known: "id, src, env and type",
                    });
                }
            }
        }
        let Some(id) = id.filter(|id| !id.is_empty()) else {
            return Err(RequestError::MissingAttribute { flag: FLAG, value: text.clone(), attribute: "id=…" });
        };
        if secrets.iter().any(|other| other.id == id) {
            return Err(RequestError::Twice { flag: FLAG, id });
        }
        // `type=env` makes `src` the name of a variable; without any source the id is tried as one, then as a file.
        if kind.as_deref() == Some("env") && variable.is_none() {
            variable = Some(file.take().unwrap_or_else(|| id.clone()));
        }
        if variable.is_none() && file.is_none() && kind.is_none() && env.variables.contains_key(OsStr::new(&id)) {
            variable = Some(id.clone());
        }
        let source = match variable {
            Some(variable) => {
                let value = env.variables.get(OsStr::new(&variable)).cloned().unwrap_or_default();
                SecretSource::Value(std::os::unix::ffi::OsStringExt::into_vec(value))
            }
            None => {
                let path = env.current_dir.join(home(file.as_deref().unwrap_or(&id), env));
                // Looked at now so that a wrong path ends the build before anything runs.
                std::fs::metadata(&path).map_err(|source| RequestError::ReadSecret {
                    id: id.clone(),
                    path: path.clone(),
                    source,
                })?;
                SecretSource::File(path)
            }
        };
        secrets.push(Secret { id, source });
    }
    Ok(secrets)
}

/// `~/x` in the user's home: shells do not expand it behind `src=`.
fn home(path: &str, env: &Environment) -> PathBuf {
    match (path.strip_prefix("~/"), env.get("HOME")) {
        (Some(rest), Some(home)) => Path::new(home).join(rest),
        _ => PathBuf::from(path),
    }
}

fn ssh_agents(flags: &[String], env: &Environment) -> Result<Vec<SshAgent>, RequestError> {
    let mut agents: Vec<SshAgent> = Vec::new();
    for text in flags {
        let (id, paths) = match text.split_once('=') {
            Some((id, paths)) => (id, paths),
            None => (text.as_str(), ""),
        };
        let id = if id.is_empty() { "default" } else { id }.to_owned();
        if agents.iter().any(|other| other.id == id) {
            return Err(RequestError::Twice { flag: "--ssh", id });
        }
        let paths: Vec<PathBuf> = match paths {
            "" => vec![PathBuf::from(env.get("SSH_AUTH_SOCK").ok_or_else(|| RequestError::NoSshAgent(id.clone()))?)],
            paths => fields(paths).iter().map(|path| home(path, env)).collect(),
        };
        let (mut sockets, mut keys) = (Vec::new(), Vec::new());
        for path in paths {
            let path = env.current_dir.join(path);
            match std::fs::metadata(&path) {
                Ok(metadata) if metadata.file_type().is_socket() => sockets.push(path),
                Ok(_) => keys.push(path),
                Err(source) => return Err(RequestError::SshUnusable { id, path, source }),
            }
        }
        let source = match (sockets.pop(), keys) {
            (Some(socket), keys) if sockets.is_empty() && keys.is_empty() => SshSource::Socket(socket),
            (None, keys) => SshSource::Keys(keys),
            _ => return Err(RequestError::SshMixed(id)),
        };
        agents.push(SshAgent { id, source });
    }
    Ok(agents)
}

fn rights(flags: &[String], notices: &mut Vec<String>) -> Result<Rights, RequestError> {
    let mut rights = Rights::default();
    for right in flags {
        match right.as_str() {
            "network.host" => rights.network_host = true,
            "security.insecure" => rights.security_insecure = true,
            right if right.starts_with("fs") || right == "ssh" || right.starts_with("device") => {
                notices.push(format!("--allow {right} does nothing"));
            }
            other => return Err(RequestError::UnknownRight(other.to_owned())),
        }
    }
    Ok(rights)
}

fn extra_host(text: &str) -> Result<(String, String), RequestError> {
    let bad = || RequestError::BadValue {
        flag: "--add-host",
        value: text.to_owned(),
        expected: "expected NAME:ADDRESS or NAME=ADDRESS",
    };
    let (name, address) = text.split_once('=').or_else(|| text.split_once(':')).ok_or_else(bad)?;
    let address = match address {
        // Steps share the host's network, so the host is where they are.
        "host-gateway" => "127.0.0.1",
        address => address.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')).unwrap_or(address),
    };
    if name.is_empty() || name.chars().any(char::is_whitespace) || address.parse::<IpAddr>().is_err() {
        return Err(bad());
    }
    Ok((name.to_owned(), address.to_owned()))
}

fn ulimit(text: &str) -> Result<(String, i64, i64), RequestError> {
    let bad = |expected| RequestError::BadValue { flag: "--ulimit", value: text.to_owned(), expected };
    let (name, limits) = text.split_once('=').ok_or_else(|| bad("expected NAME=SOFT[:HARD]"))?;
    if !ULIMIT_NAMES.contains(&name) {
        return Err(bad("no such limit"));
    }
    let number = |text: &str| text.parse::<i64>().ok().filter(|value| *value >= -1).ok_or_else(|| bad("not a limit"));
    let (soft, hard) = match limits.split_once(':') {
        Some((soft, hard)) => (number(soft)?, number(hard)?),
        None => (number(limits)?, number(limits)?),
    };
    if hard != -1 && (soft == -1 || soft > hard) {
        return Err(bad("the soft limit is above the hard one"));
    }
    Ok((name.to_owned(), soft, hard))
}

/// The least that docker accepts: with less, no process starts.
const LEAST_MEMORY_BYTES: u64 = 6 << 20;

fn limits(args: &BuildArgs) -> Result<Limits, RequestError> {
    let bad = |flag, value: &str, expected| RequestError::BadValue { flag, value: value.to_owned(), expected };
    // Zero is no limit, as docker has it.
    let number = |flag, text: &Option<String>, range: std::ops::RangeInclusive<u64>, expected| match text.as_deref() {
        None | Some("" | "0") => Ok(None),
        Some(text) => {
            let value = text.parse().ok().filter(|value| range.contains(value));
            value.map(Some).ok_or_else(|| bad(flag, text, expected))
        }
    };
    let list = |flag, text: &Option<String>| match text.as_deref() {
        None | Some("") => Ok(None),
        Some(text) if text.bytes().all(|byte| byte.is_ascii_digit() || byte == b',' || byte == b'-') => {
            Ok(Some(text.to_owned()))
        }
        Some(text) => Err(bad(flag, text, "expected numbers such as 0-1,3")),
    };
    let memory_bytes = match args.memory.as_deref() {
        None | Some("") => None,
        Some(text) => match size_bytes("--memory", text)? {
            0 => None,
            bytes if bytes < LEAST_MEMORY_BYTES => return Err(bad("--memory", text, "expected 6m or more")),
            bytes => Some(bytes),
        },
    };
    let swap = match (args.memory_swap.as_deref(), memory_bytes) {
        (None | Some("" | "0"), _) => Swap::AsMemory,
        (Some(text), None) => return Err(bad("--memory-swap", text, "it goes with --memory")),
        (Some("-1"), Some(_)) => Swap::Unlimited,
        (Some(text), Some(memory)) => {
            let swap = size_bytes("--memory-swap", text)?.checked_sub(memory);
            let expected = "expected memory and swap together, so no less than --memory";
            Swap::Bytes(swap.ok_or_else(|| bad("--memory-swap", text, expected))?)
        }
    };
    let unlimited = |text: &Option<String>| text.clone().filter(|text| text != "-1");
    Ok(Limits {
        memory_bytes,
        swap,
        cpu_period_us: number(
            "--cpu-period",
            &args.cpu_period,
            1_000..=1_000_000,
            "expected microseconds from 1000 to 1000000",
        )?,
        cpu_quota_us: number(
            "--cpu-quota",
            &unlimited(&args.cpu_quota),
            1_000..=u64::MAX / 1_000,
            "expected microseconds from 1000 on, or -1",
        )?,
        cpu_shares: number("--cpu-shares", &args.cpu_shares, 2..=262_144, "expected a number from 2 to 262144")?,
        cpuset_cpus: list("--cpuset-cpus", &args.cpuset_cpus)?,
        cpuset_mems: list("--cpuset-mems", &args.cpuset_mems)?,
        processes: number(
            "--pids-limit",
            &unlimited(&args.pids_limit),
            1..=4_194_304,
            "expected a number of processes, or -1",
        )?,
        parent: args.cgroup_parent.clone().filter(|parent| !parent.is_empty()),
    })
}

fn size_bytes(flag: &'static str, text: &str) -> Result<u64, RequestError> {
    units::parse_size(text).ok().and_then(|size| u64::try_from(size).ok()).ok_or_else(|| RequestError::BadValue {
        flag,
        value: text.to_owned(),
        expected: "expected a size such as 64m or 1g",
    })
}

fn progress_mode(args: &BuildArgs, env: &Environment) -> Result<ProgressMode, RequestError> {
    if args.quiet {
        return Ok(ProgressMode::Quiet);
    }
    let (mode, from) = match (args.progress.as_deref(), env.get("BUILDKIT_PROGRESS")) {
        (Some(mode), _) => (mode.to_owned(), "--progress"),
        (None, Some(mode)) => (mode.to_string_lossy().into_owned(), "BUILDKIT_PROGRESS"),
        (None, None) => ("auto".to_owned(), "--progress"),
    };
    let dumb = env.get("TERM").is_none_or(|term| term == "dumb");
    match mode.as_str() {
        "auto" | "" if env.stderr_terminal && !dumb => Ok(ProgressMode::Tty),
        "auto" | "" | "plain" => Ok(ProgressMode::Plain),
        // A live view into a file would be unreadable.
        "tty" if env.stderr_terminal => Ok(ProgressMode::Tty),
        "tty" => Ok(ProgressMode::Plain),
        "rawjson" => Ok(ProgressMode::RawJson),
        "quiet" | "none" => Ok(ProgressMode::Quiet),
        _ => Err(RequestError::UnknownProgress { mode, from }),
    }
}

/// Proxy build args from `proxies.default` in docker's configuration. What cannot be read is no proxy.
fn docker_proxies(text: &str) -> Vec<(String, String)> {
    let config: serde_json::Value = serde_json::from_str(text).unwrap_or_default();
    let names = [
        ("httpProxy", "HTTP_PROXY"),
        ("httpsProxy", "HTTPS_PROXY"),
        ("noProxy", "NO_PROXY"),
        ("ftpProxy", "FTP_PROXY"),
        ("allProxy", "ALL_PROXY"),
    ];
    names
        .iter()
        .filter_map(|(member, name)| Some((name, config["proxies"]["default"][member].as_str()?)))
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| ((*name).to_owned(), value.to_owned()))
        .collect()
}

/// A duration above 0.
fn step_timeout(text: &str) -> Result<Duration, RequestError> {
    let nanoseconds = units::parse_duration(text).ok().and_then(|nanoseconds| u64::try_from(nanoseconds).ok());
    let duration = nanoseconds.filter(|nanoseconds| *nanoseconds > 0).map(Duration::from_nanos);
    duration.ok_or_else(|| RequestError::BadTimeout(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn env(variables: &[(&str, &str)], dir: &Path) -> Environment {
        let mut all: BTreeMap<OsString, OsString> =
            [("HOME", "/home/someone")].iter().map(|(name, value)| (name.into(), value.into())).collect();
        all.extend(variables.iter().map(|(name, value)| (name.into(), value.into())));
        Environment {
            variables: all,
            current_dir: dir.to_owned(),
            stdout_terminal: false,
            stderr_terminal: false,
            color: false,
        }
    }

    fn parse(args: &[&str]) -> BuildArgs {
        match Cli::parse_from(["nacre", "build"].iter().chain(args)).command {
            Command::Build(build) => *build,
            other => panic!("{other:?}"),
        }
    }

    /// A scratch directory with `app/Dockerfile`, `app/other`, `here`, `file`, `key`, `socket`.
    fn scratch() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::create_dir(dir.path().join("app")).expect("a directory");
        for name in ["app/Dockerfile", "app/other", "here", "file", "key"] {
            std::fs::write(dir.path().join(name), name).expect("a file");
        }
        std::os::unix::net::UnixListener::bind(dir.path().join("socket")).expect("a socket");
        dir
    }

    fn request(args: &[&str], variables: &[(&str, &str)]) -> Result<BuildRequest, RequestError> {
        let dir = scratch();
        build_request(parse(args), &env(variables, dir.path()))
    }

    fn ok(args: &[&str]) -> BuildRequest {
        request(args, &[]).unwrap_or_else(|error| panic!("{args:?}: {error}"))
    }

    #[track_caller]
    fn refused(args: &[&str], words: &str) {
        match request(args, &[]) {
            Ok(_) => panic!("{args:?} was accepted"),
            Err(error) => {
                let text = format!("{error}; {}", error.help().unwrap_or_default());
                assert!(text.contains(words), "{args:?}: {text}");
            }
        }
    }

    #[test]
    fn contexts() {
        let git = |remote: &str, reference: &str, subdir: &str| {
            let (remote, reference, subdir) = (remote.to_owned(), reference.to_owned(), subdir.to_owned());
            ContextSource::Git(GitUrl { remote, reference, subdir, ..GitUrl::default() })
        };
        let http = |text: &str| ContextSource::Http(text.to_owned());
        let cases = [
            ("app", ContextSource::Directory("app".into())),
            (".", ContextSource::Directory(".".into())),
            ("-", ContextSource::Stdin),
            ("https://h/x.git", git("https://h/x.git", "", "")),
            ("https://h/x.git#main:sub", git("https://h/x.git", "main", "sub")),
            ("https://h/x.git?ref=main", git("https://h/x.git", "main", "")),
            ("git://h/x", git("git://h/x", "", "")),
            ("ssh://git@h/x", git("ssh://git@h/x", "", "")),
            ("git@h.org:a/b.git", git("git@h.org:a/b.git", "", "")),
            ("github.com/a/b", git("https://github.com/a/b.git", "", "")),
            ("github.com/a/b.git#v1", git("https://github.com/a/b.git", "v1", "")),
            ("https://h/x.tar.gz", http("https://h/x.tar.gz")),
            ("http://h/x", http("http://h/x")),
        ];
        for (text, expected) in cases {
            assert_eq!(ok(&[text]).context, expected, "{text}");
        }
        refused(&["nowhere"], "`nowhere` not found");
        refused(&["file"], "nacre build -f file .");
        refused(&["app/Dockerfile"], "nacre build -f app/Dockerfile app");
        refused(&["a@b"], "not found");
        refused(&["https://h/x.git?colour=red"], "invalid git address");
    }

    #[test]
    fn dockerfiles() {
        let cases: [(&[&str], DockerfileSource); 9] = [
            (&["app"], DockerfileSource::Default),
            (&["-f", "here", "app"], DockerfileSource::File("here".into())),
            (&["-f", "other", "app"], DockerfileSource::File("app/other".into())),
            (&["-f", "missing", "app"], DockerfileSource::File("missing".into())),
            (&["-f", "-", "app"], DockerfileSource::Stdin),
            (&["-f", "http://h/Dockerfile", "app"], DockerfileSource::Http("http://h/Dockerfile".into())),
            (&["-f", "sub/D", "-"], DockerfileSource::InContext("sub/D".into())),
            (&["-f", "/abs", "git@h:x"], DockerfileSource::File("/abs".into())),
            (&["-"], DockerfileSource::Default),
        ];
        for (args, expected) in cases {
            assert_eq!(ok(args).dockerfile, expected, "{args:?}");
        }
        refused(&["-f", "-", "-"], "standard input");
    }

    #[test]
    fn build_args_come_from_flags_then_environment() {
        let args =
            ["--build-arg", "A=1", "--build-arg", "FROM_ENV", "--build-arg", "UNSET", "--build-arg", "A=2=3", "."];
        let request = request(&args, &[("FROM_ENV", "e"), ("SOURCE_DATE_EPOCH", "5")]).expect("a request");
        let expected = [("A", "2=3"), ("FROM_ENV", "e"), ("SOURCE_DATE_EPOCH", "5")];
        assert_eq!(request.build_args, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
        assert_eq!(request.source_date_epoch, Some(5));
        assert_eq!(ok(&["--build-arg", "SOURCE_DATE_EPOCH=7", "."]).source_date_epoch, Some(7));
        refused(&["--build-arg", "=x", "."], "has no name");
        refused(&["--build-arg", "SOURCE_DATE_EPOCH=soon", "."], "number of seconds");
    }

    #[test]
    fn proxies_of_docker_are_build_args() {
        let text = r#"{"auths":{},"proxies":{"default":{"httpProxy":"http://p:1","noProxy":"a,b","allProxy":""}}}"#;
        let expected = [("HTTP_PROXY", "http://p:1"), ("NO_PROXY", "a,b")];
        assert_eq!(docker_proxies(text), expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
        assert_eq!(docker_proxies("not json"), []);
        assert_eq!(docker_proxies("{\"proxies\":3}"), []);
    }

    #[test]
    fn store_directory() {
        let check = |flag: Option<&str>, variables: &[(&str, &str)], expected: &str| {
            let store = env(variables, Path::new("/work")).store(flag.map(Path::new)).expect("a store");
            assert_eq!(store, Path::new(expected), "{flag:?} {variables:?}");
        };
        check(Some("s"), &[("NACRE_STORE", "/n")], "/work/s");
        check(None, &[("NACRE_STORE", "/n"), ("XDG_DATA_HOME", "/x")], "/n");
        check(None, &[("XDG_DATA_HOME", "/x")], "/x/nacre");
        check(None, &[("XDG_DATA_HOME", "relative")], "/home/someone/.local/share/nacre");
        check(None, &[], "/home/someone/.local/share/nacre");
        let nothing = env(&[("HOME", "")], Path::new("/"));
        assert!(matches!(nothing.store(None), Err(RequestError::NoStore)));
    }

    #[test]
    fn outputs_are_typed() {
        let path = |path: &str| Destination::Path(path.into());
        let cases: [(&[&str], OutputKind); 13] = [
            (&[], OutputKind::Store),
            (&["-o", "type=oci,dest=x.tar"], OutputKind::Oci { dest: path("x.tar"), tar: true }),
            (&["-o", "type=oci,dest=x,tar=false"], OutputKind::Oci { dest: path("x"), tar: false }),
            (&["-o", "type=oci"], OutputKind::Oci { dest: Destination::Stdout, tar: true }),
            (&["-o", "type=docker,dest=x"], OutputKind::Docker { dest: path("x"), tar: true }),
            (&["-o", "type=docker"], OutputKind::Store),
            (&["-o", "type=image"], OutputKind::Store),
            (&["-o", "type=local,dest=d"], OutputKind::Local { dest: "d".into(), platform_split: None }),
            (&["-o", "d"], OutputKind::Local { dest: "d".into(), platform_split: None }),
            (&["-o", "-"], OutputKind::Tar { dest: Destination::Stdout, platform_split: None }),
            (&["-o", "type=tar,dest=-"], OutputKind::Tar { dest: Destination::Stdout, platform_split: None }),
            (&["-o", "type=cacheonly"], OutputKind::CacheOnly),
            (&["-o", "\"type=oci\",\"dest=a,b\""], OutputKind::Oci { dest: path("a,b"), tar: true }),
        ];
        for (args, expected) in cases {
            let all: Vec<&str> = args.iter().copied().chain(["."]).collect();
            let outputs = ok(&all).outputs;
            assert_eq!(outputs.len(), 1, "{args:?}");
            assert_eq!(outputs[0].kind, expected, "{args:?}");
        }
        let both = ok(&["-t", "a", "--load", "-o", "type=oci,dest=x,name=b", "."]).outputs;
        assert_eq!((both[0].names[0].as_str(), both[1].names[0].as_str()), ("b", "a"));
        assert_eq!(both[1].kind, OutputKind::Store);
        let zstd = ok(&["-o", "type=oci,dest=x,compression=zstd,compression-level=7,rewrite-timestamp=true", "."]);
        assert_eq!(zstd.outputs[0].compression, Compression::Zstd(Some(7)));
        assert!(zstd.outputs[0].rewrite_timestamp);
        refused(&["-o", "type=oci,dest=x,compression=lzma", "."], "gzip, zstd and uncompressed");
        refused(&["-o", "type=oci,dest=x,compression-level=11", "."], "0 to 9");
        refused(&["-o", "type=floppy", "."], "there are the types");
        refused(&["-o", "dest=x", "."], "needs type=");
        refused(&["-o", "type=local", "."], "needs dest=");
        refused(&["-o", "type=oci,dset=x", "."], "unknown attribute `dset`");
        refused(&["-o", "-", "-o", "type=oci", "."], "more than one output");
        let pushed = |args: &[&str]| {
            let outputs = ok(args).outputs;
            outputs.iter().map(|output| (output.kind.clone(), output.push)).collect::<Vec<_>>()
        };
        let (store, registry) = (OutputKind::Store, OutputKind::Registry);
        assert_eq!(pushed(&["--push", "-t", "h.io/a:1", "."]), [(registry.clone(), Some(Push::ByName))]);
        let both = [(registry.clone(), Some(Push::ByName)), (store.clone(), None)];
        assert_eq!(pushed(&["--push", "--load", "-t", "h.io/a:1", "."]), both);
        assert_eq!(pushed(&["-o", "type=image,push=true,name=h.io/a", "."]), [(store.clone(), Some(Push::ByName))]);
        assert_eq!(pushed(&["--push", "-o", "type=image,name=h.io/a", "."]), [(store, Some(Push::ByName))]);
        let by_digest = pushed(&["-o", "type=registry,push-by-digest=true,name-canonical=true,name=h.io/a", "."]);
        assert_eq!(by_digest, [(registry, Some(Push::ByDigest))]);
        assert!(ok(&["-o", "type=registry,name=h.io/a,registry.insecure=true", "."]).registry.insecure == ["h.io"]);
        refused(&["--push", "."], "needs the name");
        refused(&["-o", "type=registry", "."], "needs the name");
        refused(&["--push", "-t", "h.io/A", "."], "lowercase");
        refused(&["-t", "h.io/a:1", "-o", "type=image,push=true,push-by-digest=true", "."], "by its digest");
    }

    #[test]
    fn nothing_binary_on_a_terminal() {
        let dir = scratch();
        let terminal = Environment { stdout_terminal: true, ..env(&[], dir.path()) };
        let error = build_request(parse(&["-o", "type=oci", "."]), &terminal).expect_err("a refusal");
        assert!(matches!(error, RequestError::OutputToTerminal(_)), "{error}");
    }

    #[test]
    fn named_contexts() {
        let layout = |tag: Option<&str>, digest: Option<&str>| NamedSource::OciLayout {
            path: "app".into(),
            tag: tag.map(str::to_owned),
            digest: digest.map(str::to_owned),
        };
        let cases = [
            ("a=app", NamedSource::Directory("app".into())),
            ("a=docker-image://debian:12", NamedSource::Image("debian:12".into())),
            ("a=oci-layout://app", layout(None, None)),
            ("a=oci-layout://app:latest", layout(Some("latest"), None)),
            ("a=oci-layout://app@sha256:00", layout(None, Some("sha256:00"))),
            ("a=oci-layout://app:t@sha256:00", layout(Some("t"), Some("sha256:00"))),
            ("a=https://h/x.git", NamedSource::Git(GitUrl { remote: "https://h/x.git".into(), ..GitUrl::default() })),
            ("a=https://h/x.tar", NamedSource::Http("https://h/x.tar".into())),
            ("a=target:base", NamedSource::Target("base".into())),
        ];
        for (text, expected) in cases {
            assert_eq!(ok(&["--build-context", text, "."]).named_contexts, [("a".to_owned(), expected)], "{text}");
        }
        refused(&["--build-context", "app", "."], "NAME=SOURCE");
        refused(&["--build-context", "a=nowhere", "."], "not a directory");
        refused(&["--build-context", "a=oci-layout://nowhere:1", "."], "`nowhere` is not a directory");
    }

    #[test]
    fn secrets_are_read_when_asked() {
        let secret = |text: &str, variables: &[(&str, &str)]| {
            let dir = scratch();
            let request = build_request(parse(&["--secret", text, "."]), &env(variables, dir.path()))?;
            request.secrets[0].read()
        };
        let text = |result: Result<Vec<u8>, RequestError>| String::from_utf8(result.expect("a value")).expect("text");
        assert_eq!(text(secret("id=a,src=file", &[])), "file");
        assert_eq!(text(secret("id=file", &[])), "file");
        assert_eq!(text(secret("id=a,env=V", &[("V", "v")])), "v");
        assert_eq!(text(secret("type=env,id=a,src=V", &[("V", "v")])), "v");
        assert_eq!(text(secret("id=V", &[("V", "v")])), "v");
        assert_eq!(text(secret("type=env,id=V", &[("V", "v")])), "v");
        refused(&["--secret", "id=a,src=nowhere", "."], "cannot read");
        refused(&["--secret", "src=file", "."], "needs id=");
        refused(&["--secret", "id=file,size=3", "."], "unknown attribute `size`");
        refused(&["--secret", "id=file,type=disk", "."], "file and env");
        refused(&["--secret", "id=file", "--secret", "id=file", "."], "given twice");
        let hidden = format!("{:?}", request(&["--secret", "id=V", "."], &[("V", "hush")]).expect("a request"));
        assert!(!hidden.contains("hush"), "{hidden}");
    }

    #[test]
    fn too_large_a_secret_is_refused() {
        let dir = scratch();
        std::fs::write(dir.path().join("large"), vec![0; 500 * 1024 + 1]).expect("a file");
        let request = build_request(parse(&["--secret", "id=large", "."]), &env(&[], dir.path())).expect("a request");
        assert!(matches!(request.secrets[0].read(), Err(RequestError::SecretTooLarge { .. })));
    }

    #[test]
    fn ssh_agents_and_keys() {
        let dir = scratch();
        let socket = dir.path().join("socket");
        let ssh = |text: &str| {
            let variables = [("SSH_AUTH_SOCK", socket.to_str().expect("text"))];
            build_request(parse(&["--ssh", text, "."]), &env(&variables, dir.path()))
                .map(|request| request.ssh[0].clone())
        };
        let agent = |id: &str, source| SshAgent { id: id.to_owned(), source };
        assert_eq!(ssh("default").expect("an agent"), agent("default", SshSource::Socket(socket.clone())));
        assert_eq!(ssh("x=socket").expect("an agent"), agent("x", SshSource::Socket(socket.clone())));
        let keys = SshSource::Keys(vec![dir.path().join("key"), dir.path().join("file")]);
        assert_eq!(ssh("x=key,file").expect("an agent"), agent("x", keys));
        assert!(matches!(ssh("x=key,socket"), Err(RequestError::SshMixed(_))));
        assert!(matches!(ssh("x=nowhere"), Err(RequestError::SshUnusable { .. })));
        refused(&["--ssh", "default", "."], "SSH_AUTH_SOCK");
    }

    #[test]
    fn step_settings() {
        let request = ok(&[
            "--add-host",
            "a:1.2.3.4",
            "--add-host",
            "b=[::1]",
            "--add-host",
            "c:::1",
            "--ulimit",
            "nofile=10:20",
            "--ulimit",
            "core=-1",
            "--shm-size",
            "64m",
            "--network",
            "none",
            "--allow",
            "network.host,security.insecure",
            ".",
        ]);
        let hosts = [("a", "1.2.3.4"), ("b", "::1"), ("c", "::1")].map(|(name, at)| (name.to_owned(), at.to_owned()));
        assert_eq!(request.extra_hosts, hosts);
        assert_eq!(request.ulimits, [("nofile".to_owned(), 10, 20), ("core".to_owned(), -1, -1)]);
        assert_eq!(request.shm_size_bytes, Some(64 << 20));
        assert_eq!(request.network, Network::None);
        assert_eq!(request.ownership, OwnershipChoice::Auto);
        assert_eq!((request.step_timeout, request.allow_secret_leak), (None, false));
        let timed = ok(&["--step-timeout=1m30s", "--allow-secret-leak", "."]);
        assert_eq!((timed.step_timeout, timed.allow_secret_leak), (Some(Duration::from_secs(90)), true));
        assert_eq!(ok(&["--ownership=emulate", "."]).ownership, OwnershipChoice::Emulate);
        assert_eq!(ok(&["--ownership=subid", "."]).ownership, OwnershipChoice::SubordinateIds);
        assert_eq!(request.allow, Rights { network_host: true, security_insecure: true });
        for (flag, value) in [
            ("--add-host", "a"),
            ("--add-host", "a:b"),
            ("--add-host", ":1.2.3.4"),
            ("--ulimit", "nofile"),
            ("--ulimit", "files=1"),
            ("--ulimit", "nofile=2:1"),
            ("--ulimit", "nofile=x"),
            ("--shm-size", "1x"),
            ("--shm-size", ""),
            ("--network", "mynet"),
            ("--ownership", "mine"),
            ("--step-timeout", "0s"),
            ("--step-timeout", "soon"),
            ("--allow", "everything"),
            ("--call", "me"),
            ("--call", "check,format=xml"),
            ("--progress", "loud"),
            ("--isolation", "hyperv"),
            ("--memory", "1m"),
            ("--memory", "much"),
            ("--memory-swap", "1g"),
            ("--cpu-period", "10"),
            ("--cpu-quota", "-2"),
            ("--cpu-shares", "1"),
            ("--cpuset-cpus", "all"),
            ("--pids-limit", "-7"),
        ] {
            refused(&[flag, value, "."], "");
        }
    }

    #[test]
    fn limits_are_those_of_docker() {
        assert!(ok(&["."]).limits.is_empty());
        let none =
            ["-m0", "--memory-swap=0", "--cpu-quota=-1", "--cpu-shares=0", "--pids-limit=-1", "--cpuset-cpus=", "."];
        assert!(ok(&none).limits.is_empty());
        let limits =
            ok(&["-m", "64m", "--memory-swap", "96m", "-c512", "--cpu-quota=50000", "--cpuset-mems=0-1,3", "."]).limits;
        assert_eq!((limits.memory_bytes, limits.swap), (Some(64 << 20), Swap::Bytes(32 << 20)));
        assert_eq!((limits.cpu_shares, limits.cpu_quota_us), (Some(512), Some(50_000)));
        assert_eq!(limits.cpuset_mems.as_deref(), Some("0-1,3"));
        assert_eq!(ok(&["-m", "64m", "--memory-swap=-1", "."]).limits.swap, Swap::Unlimited);
        refused(&["-m", "64m", "--memory-swap", "32m", "."], "--memory-swap");
        let parent = ok(&["--cgroup-parent=/jobs", "."]);
        assert_eq!(parent.limits.parent.as_deref(), Some("/jobs"));
        assert!(!parent.limits.is_empty());
    }

    #[test]
    fn kinds_of_isolation() {
        for name in ["", "auto", "default", "userns"] {
            assert_eq!(ok(&[&format!("--isolation={name}"), "."]).isolation, Isolation::Namespaces, "{name}");
        }
        assert_eq!(ok(&["--isolation=chroot", "."]).isolation, Isolation::Chroot);
        refused(&["--isolation=process", "."], "isolation");
    }

    #[test]
    fn calls_and_cache_use() {
        assert_eq!(ok(&["."]).call, Call::Build);
        assert_eq!(ok(&["--check", "."]).call, Call::Check(CallFormat::Text));
        assert_eq!(ok(&["--call=check,format=sarif", "."]).call, Call::Check(CallFormat::Sarif));
        assert_eq!(ok(&["--call=outline,format=json", "."]).call, Call::Outline(CallFormat::Json));
        assert_eq!(ok(&["--call=targets", "."]).outputs, []);
        assert_eq!(ok(&["--no-cache", "."]).cache_use, CacheUse::None);
        let filter = CacheUse::NotStages(vec!["a".into(), "b".into()]);
        assert_eq!(ok(&["--no-cache-filter", "a,b", "."]).cache_use, filter);
    }

    #[test]
    fn progress_by_flag_environment_and_terminal() {
        let dir = scratch();
        let mode = |args: &[&str], variables: &[(&str, &str)], terminal: bool| {
            let env = Environment { stderr_terminal: terminal, ..env(variables, dir.path()) };
            build_request(parse(args), &env).expect("a request").progress
        };
        let xterm = ("TERM", "xterm");
        assert_eq!(mode(&["."], &[xterm], true), ProgressMode::Tty);
        assert_eq!(mode(&["."], &[xterm], false), ProgressMode::Plain);
        assert_eq!(mode(&["."], &[("TERM", "dumb")], true), ProgressMode::Plain);
        assert_eq!(mode(&["."], &[], true), ProgressMode::Plain);
        assert_eq!(mode(&["--progress=tty", "."], &[xterm], false), ProgressMode::Plain);
        assert_eq!(mode(&["."], &[xterm, ("BUILDKIT_PROGRESS", "rawjson")], true), ProgressMode::RawJson);
        assert_eq!(mode(&["--progress=plain", "."], &[("BUILDKIT_PROGRESS", "rawjson")], true), ProgressMode::Plain);
        assert_eq!(mode(&["-q", "--progress=plain", "."], &[xterm], true), ProgressMode::Quiet);
    }

    #[test]
    fn fields_may_be_quoted() {
        let check = |text: &str, expected: &[&str]| assert_eq!(fields(text), expected, "{text}");
        check("a,b", &["a", "b"]);
        check("\"a,b\",c", &["a,b", "c"]);
        check("\"a \"\"b\"\"\",c", &["a \"b\"", "c"]);
        check("", &[""]);
        check("a,", &["a", ""]);
    }

    #[test]
    fn annotations_have_a_place() {
        let request = ok(&[
            "--annotation",
            "index:a=b",
            "--annotation",
            "org.x:y=c",
            "-o",
            "type=oci,dest=x,annotation-index.k=v,annotation.l=w",
            ".",
        ]);
        let places: Vec<_> = request.annotations.iter().map(|a| (a.place, a.name.as_str(), a.value.as_str())).collect();
        assert_eq!(places, [(AnnotationPlace::Index, "a", "b"), (AnnotationPlace::Manifest, "org.x:y", "c")]);
        let places: Vec<_> = request.outputs[0].annotations.iter().map(|a| (a.place, a.name.as_str())).collect();
        assert_eq!(places, [(AnnotationPlace::Index, "k"), (AnnotationPlace::Manifest, "l")]);
    }
}
