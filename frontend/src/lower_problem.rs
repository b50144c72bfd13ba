//! Mistakes found when stages are put together and lowered.

use crate::diagnostic::Problem;
use crate::mode::ModeError;
use crate::platform::PlatformError;
use crate::reference::ReferenceError;
use crate::units::UnitError;

/// What is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LowerProblem {
    /// `--target` names no stage.
    #[error("target stage `{name}` could not be found")]
    UnknownTarget {
        /// As given.
        name: String,
        /// A stage of a similar name.
        similar: Option<String>,
        /// Names of all stages.
        stages: Vec<String>,
    },
    /// FROM expands to nothing.
    #[error("base name `{expression}` is blank after expansion")]
    BlankBase {
        /// As written.
        expression: String,
        /// Variables that are not set.
        unset: Vec<String>,
        /// A declared argument of a similar name.
        similar: Option<String>,
    },
    /// `FROM --platform` expands to nothing.
    #[error("empty platform from `{expression}`")]
    EmptyPlatform {
        /// As written.
        expression: String,
        /// A declared argument of a similar name.
        similar: Option<String>,
    },
    /// A platform that does not parse.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// An image name that does not parse.
    #[error("`{name}` is neither a stage nor an image: {error}")]
    Reference {
        /// As expanded.
        name: String,
        /// Why.
        error: ReferenceError,
        /// A stage of a similar name.
        similar: Option<String>,
    },
    /// `--chmod` that does not parse.
    #[error(transparent)]
    Mode(#[from] ModeError),
    /// STOPSIGNAL that is no signal.
    #[error(transparent)]
    Signal(#[from] UnitError),
    /// A context that cannot be used in this place: a stage as the main one.
    #[error("build context `{0}` cannot be used here: a stage cannot take the place of the main context")]
    UnresolvedContext(String),
    /// A named context that stands for a stage which is not there.
    #[error("build context `{context}` is stage `{stage}`, which is not defined before it is used")]
    ContextTarget {
        /// Name of the context.
        context: String,
        /// Name behind `target:`.
        stage: String,
        /// A stage of a similar name.
        similar: Option<String>,
    },
    /// `--from=$X`.
    #[error("variable expansion is not supported in --from ({0})")]
    VariableInFrom(String),
    /// `<<dir/name`, as a file of COPY.
    #[error("open {0}: no such file or directory: the name of a heredoc leads into a directory")]
    HeredocPath(String),
    /// `--from=7` with fewer stages.
    #[error("invalid stage index {index}: {}", count_stages(*.stages))]
    StageIndex {
        /// As written.
        index: String,
        /// Number of stages.
        stages: usize,
    },
    /// Stages that need each other.
    #[error("circular dependency on stage `{0}`")]
    Circular(String),
    /// `COPY --from` a later stage.
    #[error("stage `{from}` must be defined before stage `{stage}`, which uses it")]
    NotYetDefined {
        /// The stage that is used.
        from: String,
        /// The stage that uses it.
        stage: String,
    },
    /// A mount over the root of the file system.
    #[error("invalid mount target `{0}`: the root of the file system cannot be mounted over")]
    MountOverRoot(String),
    /// `source` on an ssh mount.
    #[error("an ssh mount does not take a source (`{0}`)")]
    SshSource(String),
    /// `--security=insecure` without permission.
    #[error("security mode `insecure` is not allowed")]
    InsecureNotAllowed,
    /// `--network=host` without permission.
    #[error("network mode `host` is not allowed")]
    HostNetworkNotAllowed,
    /// `--device`.
    #[error("device `{0}` cannot be given to a step: devices are not supported")]
    Device(String),
    /// COPY of an address.
    #[error("COPY cannot fetch a URL (`{0}`)")]
    CopyUrl(String),
    /// COPY of a repository.
    #[error("COPY cannot fetch a git repository (`{0}`)")]
    CopyGit(String),
    /// `--checksum` with more than one source.
    #[error("--checksum allows only one source, there are {0}")]
    ChecksumSources(usize),
    /// `--checksum` on a file.
    #[error("--checksum requires an HTTP(S) or git source, `{0}` is a file")]
    ChecksumLocal(String),
    /// A checksum that is no digest.
    #[error("checksum `{0}` is not a digest like sha256:<64 hexadecimal digits>")]
    BadChecksum(String),
    /// Two checksums for one repository.
    #[error("checksum `{flag}` contradicts `{url}` of the address")]
    ChecksumConflict {
        /// Of `--checksum`.
        flag: String,
        /// Of the address.
        url: String,
    },
    /// `--keep-git-dir` against the address.
    #[error("--keep-git-dir contradicts the address `{0}`")]
    KeepGitDirConflict(String),
    /// A git address with parts that make no sense.
    #[error("invalid git address `{url}`: {reason}")]
    BadGitUrl {
        /// The address.
        url: String,
        /// Why.
        reason: crate::lower::GitUrlError,
    },
    /// EXPOSE of nothing.
    #[error("no port given in `{0}`")]
    NoPort(String),
    /// EXPOSE with an unknown protocol.
    #[error("invalid protocol `{protocol}` in port `{port}`")]
    BadPortProtocol {
        /// The protocol.
        protocol: String,
        /// All of it.
        port: String,
    },
    /// EXPOSE of something that is no port.
    #[error("invalid port or port range `{0}`")]
    BadPort(String),
    /// EXPOSE with a bad host address.
    #[error("invalid IP address `{0}`")]
    BadPortAddress(String),
    /// EXPOSE with ranges of different lengths.
    #[error("port ranges `{container}` and `{host}` differ in length")]
    PortRanges {
        /// Of the container.
        container: String,
        /// Of the host.
        host: String,
    },
    /// SOURCE_DATE_EPOCH that is no number.
    #[error("invalid SOURCE_DATE_EPOCH `{0}`")]
    BadEpoch(String),
    /// A trigger of the base image or stage is wrong.
    #[error("ONBUILD trigger `{trigger}` of `{base}`: {problem}")]
    Trigger {
        /// The trigger.
        trigger: String,
        /// The base that it comes from.
        base: String,
        /// What is wrong with it.
        problem: Box<Problem>,
    },
    /// A build check that the file or the caller turned into an error.
    #[error("{message} ({rule})")]
    Check {
        /// Name of the rule.
        rule: &'static str,
        /// What it found.
        message: String,
    },
}

/// Stages that a message lists.
const MANY_STAGES: usize = 12;

fn page(rule: &str) -> String {
    crate::check::Rule::named(rule).map(crate::check::Rule::url).unwrap_or_default()
}

fn count_stages(stages: usize) -> String {
    match stages {
        1 => "there is 1 stage".to_owned(),
        more => format!("there are {more} stages"),
    }
}

impl LowerProblem {
    /// A way out, one sentence.
    pub fn help(&self) -> Option<String> {
        let similar = |name: &Option<String>| name.as_ref().map(|name| format!("did you mean `{name}`?"));
        Some(match self {
            Self::UnknownTarget { similar: Some(name), .. } => format!("did you mean `{name}`?"),
            Self::UnknownTarget { stages, .. } if stages.is_empty() => {
                "no stage has a name; give one with `FROM image AS name`".to_owned()
            }
            Self::UnknownTarget { stages, .. } => {
                let more = if stages.len() > MANY_STAGES { ", …" } else { "" };
                let names: Vec<String> = stages.iter().take(MANY_STAGES).map(|name| format!("`{name}`")).collect();
                format!("the stages are {}{more}", names.join(", "))
            }
            Self::BlankBase { similar: name, unset, .. } => {
                return similar(name).or_else(|| {
                    let name = unset.first()?;
                    Some(format!(
                        "declare `ARG {name}` with a default before the first FROM, or give --build-arg {name}=…"
                    ))
                });
            }
            Self::EmptyPlatform { similar: name, .. } => {
                return similar(name)
                    .or_else(|| Some("declare the ARG with a default before the first FROM".to_owned()));
            }
            Self::Platform(error) => return error.help(),
            Self::Reference { error, similar: name, .. } => return similar(name).or_else(|| error.help()),
            Self::ContextTarget { similar: name, .. } => return similar(name),
            Self::Mode(error) => return error.help(),
            Self::Signal(error) => return error.help(),
            Self::VariableInFrom(_) => {
                "define a stage with `FROM $NAME AS stage`, using an ARG from before the first FROM, and copy from that"
                    .to_owned()
            }
            Self::HeredocPath(_) => "name the file only, and put the directory into the destination".to_owned(),
            Self::StageIndex { stages: 1, .. } => "stages count from 0".to_owned(),
            Self::StageIndex { stages, .. } => format!("stages count from 0: the last one is {}", stages - 1),
            Self::Circular(_) => {
                "a stage can only use what does not need it in turn: move the shared part to a stage of \
                                  its own"
                    .to_owned()
            }
            Self::MountOverRoot(_) => "give the mount a target=, like `target=/path`".to_owned(),
            Self::SshSource(_) => "remove source; id names the agent that --ssh gives".to_owned(),
            Self::Device(_) => "remove --device".to_owned(),
            Self::ChecksumSources(_) => "write one ADD for each source".to_owned(),
            Self::ChecksumLocal(_) => "remove --checksum: it is for what is downloaded".to_owned(),
            Self::BadChecksum(_) => "`sha256sum FILE` prints the digits".to_owned(),
            Self::ChecksumConflict { .. } | Self::KeepGitDirConflict(_) => "give it in one place only".to_owned(),
            Self::BadPortAddress(_) => "EXPOSE needs the port of the container only, like `80/tcp`".to_owned(),
            Self::NoPort(_) => "write 80, 80/udp or 8000-8010".to_owned(),
            Self::PortRanges { .. } => "EXPOSE needs the ports of the container only".to_owned(),
            Self::BadEpoch(_) => "write seconds since 1970, as `git log -1 --format=%ct` prints them".to_owned(),
            Self::UnresolvedContext(_) => "use a directory, a repository or an image as this context".to_owned(),
            Self::Check { rule, .. } => {
                format!("`# check=skip={rule}` at the top of the file turns this check off; see {}", page(rule))
            }
            Self::NotYetDefined { from, .. } => format!("move stage `{from}` up"),
            Self::InsecureNotAllowed => "give --allow security.insecure".to_owned(),
            Self::HostNetworkNotAllowed => "give --allow network.host".to_owned(),
            Self::CopyUrl(_) | Self::CopyGit(_) => "use ADD".to_owned(),
            Self::BadPort(_) => "write 80, 80/udp or 8000-8010, first port first".to_owned(),
            Self::BadPortProtocol { .. } => "protocols are tcp, udp and sctp".to_owned(),
            Self::Trigger { problem, .. } => return problem.help(),
            _ => return None,
        })
    }
}
