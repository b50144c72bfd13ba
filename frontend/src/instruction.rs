//! Typed instructions: a Dockerfile after parsing, before any variable is expanded.
//!
//! Every piece of text that a message may point at is a [`Text`] with its span. Texts are as written after joining
//! continued lines; quotes and `$` are still in them.

use crate::source::{SourceFile, Span};

/// A piece of text and its place.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Text {
    /// As written (continuations joined).
    pub value: String,
    /// Where it stands; covers all of it even over several lines.
    pub span: Span,
}

/// A whole file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dockerfile {
    /// The text it was read from.
    pub source: SourceFile,
    /// `# escape=`, else a backslash.
    pub escape: char,
    /// Directives in order: name in lower case and value (`syntax`, `escape`, `check`).
    pub directives: Vec<(String, Text)>,
    /// All instructions in order: global ARGs, then stages.
    pub instructions: Vec<Instruction>,
}

/// One instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instruction {
    /// All of it, heredocs included.
    pub span: Span,
    /// The keyword as written.
    pub keyword: Text,
    /// First and last line, counted from 1; heredocs included.
    pub lines: (u32, u32),
    /// The logical line as it reads with continuations joined and comments dropped, trimmed, without heredoc bodies.
    pub original: String,
    /// Comment lines directly above it, without `#` and blank (for `--call=outline` and checks).
    pub comments: Vec<String>,
    /// What it says.
    pub kind: InstructionKind,
}

/// A heredoc of an instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heredoc {
    /// Its name, without quotes.
    pub name: String,
    /// File descriptor before `<<` (0 where none is written).
    pub file_descriptor: u32,
    /// `<<-`: leading tabs are removed (already done in `content`).
    pub chomp: bool,
    /// No quote in the name: variables in COPY/ADD content are expanded.
    pub expand: bool,
    /// Lines up to the terminator.
    pub content: String,
    /// Place of the content.
    pub span: Span,
}

/// A command in shell or exec form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// JSON array form (`true`, one element an argument) or shell form (`false`, one element with the line).
    pub exec_form: bool,
    /// Arguments.
    pub args: Vec<String>,
    /// Place of all of it.
    pub span: Span,
}

/// What an instruction says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InstructionKind {
    /// `FROM [--platform=P] image [AS name]`.
    From {
        /// `--platform`.
        platform: Option<Text>,
        /// Image or stage.
        image: Text,
        /// `AS` name as written.
        name: Option<Text>,
    },
    /// `ARG name[=default] …`.
    Arg(Vec<(Text, Option<Text>)>),
    /// `ENV name=value …`; or the old form `ENV name value` (one pair).
    Env {
        /// Pairs; values still quoted.
        pairs: Vec<(Text, Text)>,
        /// `ENV name value`.
        legacy: bool,
    },
    /// `LABEL name=value …`.
    Label {
        /// Pairs; both may be quoted and hold variables.
        pairs: Vec<(Text, Text)>,
        /// `LABEL name value`.
        legacy: bool,
    },
    /// `RUN`.
    Run {
        /// Flags.
        flags: RunFlags,
        /// Command; for a heredoc the shell line as written (`<<EOF`, `cat <<EOF > f`).
        command: Command,
        /// Heredocs in order.
        heredocs: Vec<Heredoc>,
    },
    /// `COPY`.
    Copy(CopyInstruction),
    /// `ADD`.
    Add(CopyInstruction),
    /// `CMD`; `Command::args` is empty for `CMD []`.
    Cmd(Command),
    /// `ENTRYPOINT`.
    Entrypoint(Command),
    /// `SHELL ["…"]`.
    Shell(Command),
    /// `WORKDIR path`.
    Workdir(Text),
    /// `USER name[:group]`.
    User(Text),
    /// `EXPOSE port …`, words.
    Expose(Vec<Text>),
    /// `VOLUME path …` or `VOLUME ["…"]`.
    Volume(Vec<Text>),
    /// `STOPSIGNAL signal`.
    StopSignal(Text),
    /// `MAINTAINER name`.
    Maintainer(Text),
    /// `HEALTHCHECK NONE` or `HEALTHCHECK [flags] CMD …`.
    Healthcheck(HealthcheckInstruction),
    /// `ONBUILD trigger`.
    Onbuild {
        /// The trigger as it goes into the image: as written behind ONBUILD, heredoc bodies included as BuildKit has it.
        text: Text,
        /// Its keyword in upper case.
        keyword: String,
    },
}

/// `HEALTHCHECK`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HealthcheckInstruction {
    /// `NONE`.
    None,
    /// `CMD`; times as written (durations).
    Cmd {
        /// What runs.
        command: Command,
        /// `--interval`, `--timeout`, `--start-period`, `--start-interval` in nanoseconds, 0 when not given.
        interval: i64,
        /// `--timeout`.
        timeout: i64,
        /// `--start-period`.
        start_period: i64,
        /// `--start-interval`.
        start_interval: i64,
        /// `--retries`.
        retries: i64,
    },
}

/// Flags of RUN; values may hold variables.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RunFlags {
    /// `--mount=…`, as written; [`crate::flag::parse_mount`] reads an expanded one.
    pub mounts: Vec<Text>,
    /// `--network=…`.
    pub network: Option<Text>,
    /// `--security=…`.
    pub security: Option<Text>,
    /// `--device=…`.
    pub devices: Vec<Text>,
}

/// COPY or ADD; values may hold variables.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CopyInstruction {
    /// `--from` (COPY).
    pub from: Option<Text>,
    /// `--chown`.
    pub chown: Option<Text>,
    /// `--chmod`.
    pub chmod: Option<Text>,
    /// `--link`.
    pub link: bool,
    /// `--parents`.
    pub parents: bool,
    /// `--exclude`.
    pub excludes: Vec<Text>,
    /// `--checksum` (ADD).
    pub checksum: Option<Text>,
    /// `--keep-git-dir` (ADD).
    pub keep_git_dir: Option<bool>,
    /// `--unpack` (ADD).
    pub unpack: Option<bool>,
    /// Sources in order, heredoc markers (`<<EOF`) left out.
    pub sources: Vec<Text>,
    /// Heredocs, each with the position that it has among the sources (counting both).
    pub heredocs: Vec<(usize, Heredoc)>,
    /// Destination.
    pub dest: Text,
}
