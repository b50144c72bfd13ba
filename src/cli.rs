//! The command line: flags exactly as typed. Reads nothing but its arguments; [`crate::request`] gives them a meaning.
//!
//! Names and forms are docker build's, so that `alias docker=nacre` works: booleans take `--pull=false`, flags and
//! context come in any order, `nacre buildx build` is `nacre build`. Flags that only mean something to a daemon are
//! accepted, and [`BuildArgs::without_meaning`] names those that were given.

use clap::{Args, Parser, Subcommand, ValueEnum};
use nacre_solver::registry::Mirror;
use std::ffi::OsString;
use std::path::PathBuf;

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    a mistake in nacre itself, or one that fits nowhere else
  2    the command line makes no sense
  3    a mistake in the Dockerfile, or in what it names in the context
  4    a RUN step failed
  5    a base image, git repository or download could not be had, or a registry refused
  6    this machine does not allow what the build needs
  7    the store or an output could not be read or written
  130  interrupted

Environment:
  NACRE_STORE        directory of cache and images, as --store
  XDG_DATA_HOME      its parent when neither is given (else ~/.local/share)
  SOURCE_DATE_EPOCH  build arg of that name: fixes the dates in the image
  BUILDKIT_PROGRESS  default of --progress
  NO_COLOR           no colours
  SSH_AUTH_SOCK      agent of --ssh default
  DOCKER_CONFIG      directory of config.json: credentials, and proxies for RUN
  REGISTRY_AUTH_FILE file with credentials in its place
  SSL_CERT_FILE      certificates of authorities in place of the system's
  HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY   for nacre's own requests, also in small letters";

const IGNORED_FLAGS: &str = "\
Accepted for docker build's sake, without effect: --rm, --force-rm, --compress, --squash, --builder, \
--disable-content-trust, --security-opt, --debug. --sbom, --provenance and --attest may be switched off.";

/// Builds container images from Dockerfiles: no root, no daemon, cached by content.
#[derive(Debug, Parser)]
#[command(name = "nacre", version, max_term_width = 110, after_help = EXIT_CODES, args_override_self = true)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Subcommands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Build an image
    #[command(visible_alias = "b", after_long_help = IGNORED_FLAGS)]
    Build(Box<BuildArgs>),
    /// List the images in the store
    #[command(visible_alias = "ls")]
    Images(ImagesArgs),
    /// Fetch an image into the store, and unpack it for steps that will run on it
    Pull(PullArgs),
    /// Send an image of the store to its registry
    Push(PushArgs),
    /// Give an image of the store another name
    Tag(TagArgs),
    /// Take names away from images; `prune` frees the space
    Rmi(RmiArgs),
    /// Print what is known of an image, as JSON
    Inspect(InspectArgs),
    /// Write images of the store into an archive that docker and podman load
    Save(SaveArgs),
    /// Put the images of an archive into the store, and unpack them for steps that will run on them
    Load(LoadArgs),
    /// Look at images in registries
    Manifest(ManifestArgs),
    /// Keep credentials for a registry
    Login(LoginArgs),
    /// Forget the credentials for a registry
    Logout(LogoutArgs),
    /// Remove what the cache no longer needs
    Prune(PruneArgs),
    /// Tell what of the kernel's rights is there, what is missing, and what helps. Ends with 6 if RUN cannot work
    Doctor(DoctorArgs),
    /// Look whether the store is whole: every blob, layer, record and name. Ends with 7 if something is wrong
    Fsck(FsckArgs),
    /// Show how much space the store takes
    #[command(name = "du")]
    Usage(UsageArgs),
    /// Print the version
    Version,
    /// Become a build step's first process; only nacre itself calls this
    #[command(name = "__sandbox", hide = true)]
    Sandbox,
}

/// `nacre build`.
#[derive(Debug, Args)]
pub(crate) struct BuildArgs {
    /// Directory, git or http(s) address of the build context; `-` reads a tar archive or a Dockerfile from standard input
    #[arg(value_name = "CONTEXT")]
    pub(crate) context: OsString,

    /// Dockerfile to use, `-` for standard input [default: CONTEXT/Dockerfile]
    #[arg(short, long, value_name = "FILE", help_heading = "What to build")]
    pub(crate) file: Option<OsString>,
    /// Stage to build [default: the last]
    #[arg(long, value_name = "STAGE", help_heading = "What to build")]
    pub(crate) target: Option<String>,
    /// Value of an ARG; `NAME` alone takes it from the environment
    #[arg(long = "build-arg", value_name = "NAME[=VALUE]", help_heading = "What to build")]
    pub(crate) build_args: Vec<String>,
    /// Another source of files or images for FROM, COPY --from and RUN --mount: a directory, an address,
    /// docker-image://NAME, oci-layout://DIR[:TAG], target:STAGE
    #[arg(long = "build-context", value_name = "NAME=SOURCE", help_heading = "What to build")]
    pub(crate) build_contexts: Vec<String>,
    /// Platforms to build for, as linux/arm64 [default: this machine's]
    #[arg(long = "platform", value_name = "PLATFORM", value_delimiter = ',', help_heading = "What to build")]
    pub(crate) platforms: Vec<String>,
    /// What to do with the Dockerfile: build, check, outline, targets; `,format=json` or `,format=sarif` for programs
    #[arg(long, value_name = "METHOD", default_value = "build", help_heading = "What to build")]
    pub(crate) call: String,
    /// Only look for mistakes in the Dockerfile, as --call=check
    #[arg(long, help_heading = "What to build", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = boolean, value_name = "BOOL", hide_default_value = true)]
    pub(crate) check: bool,

    /// Name of the image in the store and in outputs; may be repeated
    #[arg(short = 't', long = "tag", value_name = "NAME[:TAG]", help_heading = "Image and outputs")]
    pub(crate) tags: Vec<String>,
    /// Label of the image
    #[arg(long = "label", value_name = "NAME=VALUE", help_heading = "Image and outputs")]
    pub(crate) labels: Vec<String>,
    /// Annotation of the manifest, as [manifest|index|manifest-descriptor|index-descriptor:]NAME=VALUE
    #[arg(long = "annotation", value_name = "NAME=VALUE", help_heading = "Image and outputs")]
    pub(crate) annotations: Vec<String>,
    /// Where the result goes: type=oci|docker|tar,dest=FILE, type=local,dest=DIR, type=registry, type=image,push=true,
    /// or a directory; may be repeated
    /// [default: the store]
    #[arg(short, long = "output", value_name = "OUTPUT", help_heading = "Image and outputs")]
    pub(crate) outputs: Vec<String>,
    /// Put the image into the store, also beside other outputs
    #[arg(long, help_heading = "Image and outputs", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = boolean, value_name = "BOOL", hide_default_value = true)]
    pub(crate) load: bool,
    /// Push the image to its registry, as --output type=registry
    #[arg(long, help_heading = "Image and outputs", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = boolean, value_name = "BOOL", hide_default_value = true)]
    pub(crate) push: bool,
    /// Write the image's digest to a file
    #[arg(long = "iidfile", value_name = "FILE", help_heading = "Image and outputs")]
    pub(crate) iid_file: Option<PathBuf>,
    /// Write digests and names to a file, as JSON
    #[arg(long, value_name = "FILE", help_heading = "Image and outputs")]
    pub(crate) metadata_file: Option<PathBuf>,

    /// Directory of cache and images [default: $NACRE_STORE, else nacre in the user's data directory]
    #[arg(long, value_name = "DIR", help_heading = "Cache")]
    pub(crate) store: Option<PathBuf>,
    /// Run every step again
    #[arg(long, help_heading = "Cache", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = boolean, value_name = "BOOL", hide_default_value = true)]
    pub(crate) no_cache: bool,
    /// Run the steps of these stages again
    #[arg(long = "no-cache-filter", value_name = "STAGE", value_delimiter = ',', help_heading = "Cache")]
    pub(crate) no_cache_filter: Vec<String>,
    /// Ask the registry for newer base images
    #[arg(long, help_heading = "Cache", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = boolean, value_name = "BOOL", hide_default_value = true)]
    pub(crate) pull: bool,
    /// Say for every step that ran which input differs from the last time
    #[arg(long, help_heading = "Cache", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = boolean, value_name = "BOOL", hide_default_value = true)]
    pub(crate) explain: bool,
    /// Cache of other machines to read: NAME or type=registry,ref=NAME; type=local,src=DIR; type=s3,bucket=NAME; may be repeated
    #[arg(long = "cache-from", value_name = "SOURCE", help_heading = "Cache")]
    pub(crate) cache_from: Vec<String>,
    /// Cache to write for other machines: type=registry,ref=NAME; type=local,dest=DIR; type=s3,bucket=NAME; type=inline; mode=min|max
    #[arg(long = "cache-to", value_name = "DEST", help_heading = "Cache")]
    pub(crate) cache_to: Vec<String>,

    /// Secret for RUN --mount=type=secret: id=ID[,src=FILE|,env=VARIABLE]
    #[arg(long = "secret", value_name = "SECRET", help_heading = "Steps")]
    pub(crate) secrets: Vec<String>,
    /// Go on when a secret's value stands in a new layer, the image's configuration or a step's output
    #[arg(long, help_heading = "Steps", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = boolean, value_name = "BOOL", hide_default_value = true)]
    pub(crate) allow_secret_leak: bool,
    /// Do not warn of keys and tokens in files that COPY and ADD take from a context
    #[arg(long, help_heading = "Steps", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = boolean, value_name = "BOOL", hide_default_value = true)]
    pub(crate) no_secret_warnings: bool,
    /// Agent or keys for RUN --mount=type=ssh: default, or ID=SOCKET or ID=KEY[,KEY]
    #[arg(long = "ssh", value_name = "AGENT", help_heading = "Steps")]
    pub(crate) ssh: Vec<String>,
    /// Network of RUN steps: default (the host's), none, host, pasta (one of their own, connected by the program pasta)
    #[arg(long, value_name = "MODE", help_heading = "Steps")]
    pub(crate) network: Option<String>,
    /// How long a step may take, as 90s or 1h30m
    #[arg(long, value_name = "DURATION", help_heading = "Steps")]
    pub(crate) step_timeout: Option<String>,
    /// How files get owners: auto, subid (real ones; needs root or subordinate ids), emulate (needs neither)
    #[arg(long, value_name = "HOW", help_heading = "Steps")]
    pub(crate) ownership: Option<String>,
    /// What keeps steps from the rest of the machine: auto, userns (namespaces), chroot (root's last resort in a container
    /// that may make none: steps share its processes, network and rights)
    #[arg(long, value_name = "HOW", help_heading = "Steps")]
    pub(crate) isolation: Option<String>,
    /// Line in the steps' /etc/hosts
    #[arg(long = "add-host", value_name = "NAME:ADDRESS", help_heading = "Steps")]
    pub(crate) add_hosts: Vec<String>,
    /// Allow more to the Dockerfile: network.host, security.insecure
    #[arg(long, value_name = "RIGHT", value_delimiter = ',', help_heading = "Steps")]
    pub(crate) allow: Vec<String>,
    /// Limit of the steps' processes
    #[arg(long = "ulimit", value_name = "NAME=SOFT[:HARD]", help_heading = "Steps")]
    pub(crate) ulimits: Vec<String>,
    /// Size of /dev/shm, as 64m
    #[arg(long, value_name = "SIZE", help_heading = "Steps")]
    pub(crate) shm_size: Option<String>,

    /// Most memory of a step, as 512m; needs control groups of version 2, as all limits here
    #[arg(short = 'm', long, value_name = "SIZE", help_heading = "Limits of steps")]
    pub(crate) memory: Option<String>,
    /// Most memory and swap of a step together, -1 for any amount of swap [default: twice --memory]
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true, help_heading = "Limits of steps")]
    pub(crate) memory_swap: Option<String>,
    /// Length of a period that --cpu-quota is for, in microseconds [default: 100000]
    #[arg(long, value_name = "US", help_heading = "Limits of steps")]
    pub(crate) cpu_period: Option<String>,
    /// CPU time that a step gets in a period, in microseconds; 200000 are two processors
    #[arg(long, value_name = "US", allow_hyphen_values = true, help_heading = "Limits of steps")]
    pub(crate) cpu_quota: Option<String>,
    /// Weight of a step where CPU time is short; 1024 is everybody's
    #[arg(short = 'c', long, value_name = "WEIGHT", help_heading = "Limits of steps")]
    pub(crate) cpu_shares: Option<String>,
    /// Processors that steps may use, as 0-1,3
    #[arg(long, value_name = "LIST", help_heading = "Limits of steps")]
    pub(crate) cpuset_cpus: Option<String>,
    /// Memory nodes that steps may use, as 0-1
    #[arg(long, value_name = "LIST", help_heading = "Limits of steps")]
    pub(crate) cpuset_mems: Option<String>,
    /// Most processes and threads of a step
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true, help_heading = "Limits of steps")]
    pub(crate) pids_limit: Option<String>,
    /// Control group to make the steps' own in: from the root with a slash in front, else below nacre's own
    #[arg(long, value_name = "CGROUP", help_heading = "Limits of steps")]
    pub(crate) cgroup_parent: Option<String>,

    /// How to show what happens: auto, tty, plain, rawjson, quiet
    #[arg(long, value_name = "MODE", help_heading = "Display")]
    pub(crate) progress: Option<String>,
    /// In the end, print what each step spent its time on
    #[arg(long, help_heading = "Display", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = boolean, value_name = "BOOL", hide_default_value = true)]
    pub(crate) timings: bool,
    /// Write what took time to a file that ui.perfetto.dev and chrome://tracing show
    #[arg(long, value_name = "FILE", help_heading = "Display")]
    pub(crate) trace: Option<PathBuf>,
    /// Show nothing but the image's digest
    #[arg(short, long, help_heading = "Display", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = boolean, value_name = "BOOL", hide_default_value = true)]
    pub(crate) quiet: bool,

    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
    #[command(flatten)]
    docker: DockerOnlyArgs,
}

/// Flags of docker build that have no meaning without a daemon or that nacre cannot follow.
#[derive(Debug, Args)]
struct DockerOnlyArgs {
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    rm: Option<bool>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    force_rm: Option<bool>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    compress: Option<bool>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    squash: Option<bool>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    disable_content_trust: Option<bool>,
    #[arg(short = 'D', long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    debug: Option<bool>,
    #[arg(long, hide = true)]
    builder: Option<String>,
    #[arg(long, hide = true)]
    security_opt: Vec<String>,
    #[arg(long, hide = true)]
    sbom: Option<String>,
    #[arg(long, hide = true)]
    provenance: Option<String>,
    #[arg(long, hide = true)]
    attest: Vec<String>,
}

/// `nacre images`.
#[derive(Debug, Args)]
pub(crate) struct ImagesArgs {
    #[command(flatten)]
    pub(crate) at: StoreArgs,
    /// How to print the list
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: ListFormat,
    /// Only digests
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Accepted for docker's sake; every image is listed anyway
    #[arg(short, long, hide = true)]
    pub(crate) all: bool,
}

/// Form of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ListFormat {
    /// Columns.
    Table,
    /// One JSON array.
    Json,
}

/// How to talk to registries.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Registries")]
pub(crate) struct RegistryArgs {
    /// Registry (with port) whose certificate is not checked and that may speak plain HTTP; may be repeated
    #[arg(long = "insecure-registry", value_name = "HOST")]
    pub(crate) insecure: Vec<String>,
    /// Certificates (PEM) of authorities to trust besides the system's; may be repeated
    #[arg(long = "tls-ca", value_name = "FILE")]
    pub(crate) authorities: Vec<PathBuf>,
    /// Registry to ask first for what another has, as docker.io=HOST[/PATH]; may be repeated
    #[arg(long = "registry-mirror", value_name = "HOST=MIRROR", value_parser = mirror)]
    pub(crate) mirrors: Vec<Mirror>,
}

fn mirror(text: &str) -> Result<Mirror, String> {
    Mirror::parse(text).ok_or_else(|| "expected HOST=MIRROR, as docker.io=mirror.example.com:5000".to_owned())
}

/// `nacre pull`.
#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// Image to fetch
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    /// Platform of an image that is for several [default: this machine's]
    #[arg(long, value_name = "PLATFORM")]
    pub(crate) platform: Option<String>,
    /// Print only the digest
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Form of the result
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: ListFormat,
    #[command(flatten)]
    pub(crate) at: StoreArgs,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
}

/// `nacre push`.
#[derive(Debug, Args)]
pub(crate) struct PushArgs {
    /// Images to send
    #[arg(value_name = "NAME", required = true)]
    pub(crate) names: Vec<String>,
    /// Print only digests
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Form of the result
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: ListFormat,
    #[command(flatten)]
    pub(crate) at: StoreArgs,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
}

/// `nacre tag`.
#[derive(Debug, Args)]
pub(crate) struct TagArgs {
    /// Name or digest of the image
    #[arg(value_name = "IMAGE")]
    pub(crate) image: String,
    /// Name to give it
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) at: StoreArgs,
}

/// Where a command works.
#[derive(Debug, Args)]
pub(crate) struct StoreArgs {
    /// Directory of cache and images
    #[arg(long, value_name = "DIR")]
    pub(crate) store: Option<PathBuf>,
}

/// `nacre rmi`.
#[derive(Debug, Args)]
pub(crate) struct RmiArgs {
    /// Names to take away
    #[arg(value_name = "NAME", required = true)]
    pub(crate) names: Vec<String>,
    /// A name that is not there is no error
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Form of the result
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: ListFormat,
    #[command(flatten)]
    pub(crate) at: StoreArgs,
}

/// `nacre inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Names or digests
    #[arg(value_name = "IMAGE", required = true)]
    pub(crate) images: Vec<String>,
    /// Accepted for symmetry; the result is always JSON
    #[arg(long, hide = true)]
    pub(crate) format: Option<String>,
    #[command(flatten)]
    pub(crate) at: StoreArgs,
}

/// `nacre save`.
#[derive(Debug, Args)]
pub(crate) struct SaveArgs {
    /// Image to write
    #[arg(value_name = "IMAGE")]
    pub(crate) image: String,
    /// File to write to [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) at: StoreArgs,
}

/// `nacre load`.
#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    /// Archive, also compressed [default: standard input]
    #[arg(short, long, value_name = "FILE")]
    pub(crate) input: Option<PathBuf>,
    /// Name for the archive's only image, in place of those it has
    #[arg(short, long, value_name = "NAME")]
    pub(crate) tag: Option<String>,
    /// Print only digests
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Form of the result
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: ListFormat,
    #[command(flatten)]
    pub(crate) at: StoreArgs,
}

/// `nacre manifest`.
#[derive(Debug, Args)]
pub(crate) struct ManifestArgs {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: ManifestCommand,
}

/// Subcommands of `nacre manifest`.
#[derive(Debug, Subcommand)]
pub(crate) enum ManifestCommand {
    /// Print a manifest or index, as JSON
    Inspect(ManifestInspectArgs),
}

/// `nacre manifest inspect`.
#[derive(Debug, Args)]
pub(crate) struct ManifestInspectArgs {
    /// Image in a registry
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    /// The bytes as they are, for digests
    #[arg(long)]
    pub(crate) raw: bool,
    /// Accepted for symmetry; the result is always JSON
    #[arg(long, hide = true)]
    pub(crate) format: Option<String>,
    /// The registry's certificate is not checked, and it may speak plain HTTP
    #[arg(long = "insecure", hide = true)]
    pub(crate) unchecked: bool,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
}

/// `nacre login`.
#[derive(Debug, Args)]
pub(crate) struct LoginArgs {
    /// Registry, with port [default: docker.io]
    #[arg(value_name = "HOST")]
    pub(crate) host: Option<String>,
    /// User name
    #[arg(short, long, value_name = "NAME")]
    pub(crate) username: Option<String>,
    /// Read the password from standard input
    #[arg(long)]
    pub(crate) password_stdin: bool,
    /// Password; other users of the machine can see it
    #[arg(short, long, value_name = "PASSWORD", conflicts_with = "password_stdin")]
    pub(crate) password: Option<String>,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
}

/// `nacre logout`.
#[derive(Debug, Args)]
pub(crate) struct LogoutArgs {
    /// Registry, with port [default: docker.io]
    #[arg(value_name = "HOST")]
    pub(crate) host: Option<String>,
}

/// `nacre prune`.
#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    #[command(flatten)]
    pub(crate) at: StoreArgs,
    /// All of the cache, also what the newest builds used; images with names stay
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Remove only until the store is no larger, as 10GB; what was not used for longest goes first
    #[arg(long, visible_alias = "max-used-space", value_name = "SIZE")]
    pub(crate) keep_storage: Option<String>,
    /// until=24h: only what was not used for so long
    #[arg(long = "filter", value_name = "FILTER")]
    pub(crate) filters: Vec<String>,
    /// Accepted for docker's sake; there is no question
    #[arg(short, long, hide = true)]
    pub(crate) force: bool,
    /// How to print the result
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: ListFormat,
}

/// `nacre doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    pub(crate) at: StoreArgs,
    /// How to print the result
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: ListFormat,
}

/// `nacre fsck`.
#[derive(Debug, Args)]
pub(crate) struct FsckArgs {
    #[command(flatten)]
    pub(crate) at: StoreArgs,
    /// Remove what is broken, to be made or fetched anew; ends with 0 if nothing broken is left
    #[arg(long)]
    pub(crate) repair: bool,
    /// How to print the result
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: ListFormat,
}

/// `nacre du`.
#[derive(Debug, Args)]
pub(crate) struct UsageArgs {
    #[command(flatten)]
    pub(crate) at: StoreArgs,
    /// How to print the list
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: ListFormat,
}

impl BuildArgs {
    /// Returns a sentence for each flag that was given and does nothing here, or not what docker build does.
    pub(crate) fn without_meaning(&self) -> Vec<String> {
        let docker = &self.docker;
        let mut notices = Vec::new();
        if docker.squash == Some(true) {
            notices.push("--squash does nothing: layers stay as they are".to_owned());
        }
        if !docker.security_opt.is_empty() {
            notices.push("--security-opt does nothing: steps always run with the default profile".to_owned());
        }
        for (flag, value) in [("--sbom", &docker.sbom), ("--provenance", &docker.provenance)] {
            if value.as_deref().is_some_and(|value| boolean(value) != Ok(false)) {
                notices.push(format!("{flag} does nothing yet: no attestation is made"));
            }
        }
        if docker.attest.iter().any(|value| !value.contains("disabled=true")) {
            notices.push("--attest does nothing yet: no attestation is made".to_owned());
        }
        notices
    }
}

/// Takes the words away that docker has between its own name and the subcommand: `buildx build`, `image build`,
/// `builder prune`, `image ls`.
pub(crate) fn without_docker_groups(mut args: Vec<OsString>) -> Vec<OsString> {
    let word = |at: usize| args.get(at).and_then(|arg| arg.to_str()).unwrap_or_default();
    let grouped = matches!(
        (word(1), word(2)),
        ("buildx", "build" | "b" | "version" | "prune")
            | ("builder", "build" | "prune")
            | ("builder" | "buildx", "du")
            | (
                "image",
                "build" | "ls" | "list" | "pull" | "push" | "tag" | "rm" | "inspect" | "save" | "load" | "prune"
            )
    );
    if grouped {
        args.remove(1);
        if args[1] == "list" {
            args[1] = "ls".into();
        } else if args[1] == "rm" {
            args[1] = "rmi".into();
        }
    }
    args
}

/// Reads a boolean as Go's flag packages do.
pub(crate) fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("expected true or false".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn build(line: &str) -> BuildArgs {
        let args = std::iter::once("nacre").chain(line.split_whitespace()).map(OsString::from).collect();
        match Cli::try_parse_from(without_docker_groups(args)).map(|cli| cli.command) {
            Ok(Command::Build(build)) => *build,
            Ok(other) => panic!("{line}: parsed as {other:?}"),
            Err(error) => panic!("{line}: {error}"),
        }
    }

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn docker_build_lines_are_understood() {
        for line in [
            "build .",
            "b .",
            "buildx build .",
            "buildx b .",
            "image build .",
            "builder build .",
            "build -",
            "build -f - .",
            "build -fother -t a:1 -ta:2 --build-arg A --build-arg B=1=2 .",
            "build . -f x --target y",
            "build --pull=false --rm --force-rm=true --compress -D --no-cache=0 .",
            "build --rm --rm=false --pull --pull .",
            "build -m 1g --memory-swap -1 --cpu-quota -1 -c 5 --cpuset-cpus 0-1 --cpuset-mems 0 .",
            "build --sbom=false --provenance mode=max .",
            "build --provenance=mode=max,version=v1 --attest type=sbom --builder default .",
            "build --platform linux/amd64,linux/arm64 --platform linux/386 .",
            "build -o - -o type=oci,dest=x --load --push=false --iidfile i --metadata-file m .",
            "build --secret id=a,src=b --ssh default --network host --add-host a:1.2.3.4 --allow network.host .",
            "build --ulimit nofile=1:2 --shm-size 1g --cgroup-parent /x --call check --check .",
            "build --progress plain --progress=tty -q --explain --store /s .",
        ] {
            build(line);
        }
    }

    #[test]
    fn last_of_a_repeated_flag_counts_and_lists_grow() {
        let args = build("build --target a --target b --pull --pull=false -t x -t y --platform a,b --platform c .");
        assert_eq!(args.target.as_deref(), Some("b"));
        assert!(!args.pull);
        assert_eq!(args.tags, ["x", "y"]);
        assert_eq!(args.platforms, ["a", "b", "c"]);
    }

    #[test]
    fn flags_without_meaning_are_named() {
        let quiet = build("build --rm --force-rm --sbom=false --provenance=false --builder x --isolation default .");
        assert_eq!(quiet.without_meaning(), Vec::<String>::new());
        let loud = build("build --squash --sbom=true --provenance=mode=max --security-opt x .");
        assert_eq!(loud.without_meaning().len(), 4, "{:?}", loud.without_meaning());
    }

    #[test]
    fn other_commands_have_docker_names_too() {
        let parse = |line: &str| {
            let args = std::iter::once("nacre").chain(line.split_whitespace()).map(OsString::from).collect();
            Cli::try_parse_from(without_docker_groups(args)).map(|cli| cli.command)
        };
        for line in ["images", "image ls", "image list", "ls", "images -a -q"] {
            assert!(matches!(parse(line), Ok(Command::Images(_))), "{line}");
        }
        assert!(matches!(parse("image rm a"), Ok(Command::Rmi(_))));
        assert!(matches!(parse("builder du"), Ok(Command::Usage(_))));
        assert!(matches!(parse("image push a b"), Ok(Command::Push(_))));
        assert!(matches!(parse("login -u me --password-stdin localhost:5000"), Ok(Command::Login(_))));
        for line in ["prune", "builder prune -af", "buildx prune --all"] {
            assert!(matches!(parse(line), Ok(Command::Prune(_))), "{line}");
        }
        assert!(matches!(parse("buildx version"), Ok(Command::Version)));
        assert!(parse("run debian").is_err());
    }
}
