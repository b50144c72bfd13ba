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

impl Dockerfile {
    /// Text that shows everything but places inside of lines: one line an instruction, its parts below it.
    pub fn dump(&self) -> String {
        let mut out = Dump(String::new());
        out.line(0, &format!("escape {}", self.escape));
        for (name, value) in &self.directives {
            out.line(0, &format!("directive {name} {:?}", value.value));
        }
        for instruction in &self.instructions {
            for comment in &instruction.comments {
                out.line(0, &format!("# {comment}"));
            }
            let (first, last) = instruction.lines;
            out.line(0, &format!("{first}-{last} {}", instruction.keyword.value.to_uppercase()));
            instruction.kind.dump(&mut out);
        }
        out.0
    }
}

/// Lines of a dump; texts are quoted, so that each is on one line and blanks show.
struct Dump(String);

impl Dump {
    fn line(&mut self, depth: usize, text: &str) {
        self.0.push_str(&"  ".repeat(depth));
        self.0.push_str(text);
        self.0.push('\n');
    }

    fn text(&mut self, name: &str, text: &Text) {
        self.line(1, &format!("{name} {:?}", text.value));
    }

    fn texts<'a>(&mut self, name: &str, texts: impl IntoIterator<Item = &'a Text>) {
        texts.into_iter().for_each(|text| self.text(name, text));
    }

    fn pairs(&mut self, pairs: &[(Text, Text)], legacy: bool) {
        let sign = if legacy { ' ' } else { '=' };
        for (name, value) in pairs {
            self.line(1, &format!("{:?}{sign}{:?}", name.value, value.value));
        }
    }

    fn command(&mut self, command: &Command) {
        let form = if command.exec_form { "exec" } else { "shell" };
        self.line(1, &format!("{form} {:?}", command.args));
    }

    fn heredoc(&mut self, name: &str, heredoc: &Heredoc) {
        let mut text = format!("{name} {:?}", heredoc.name);
        if heredoc.file_descriptor != 0 {
            text.push_str(&format!(" fd {}", heredoc.file_descriptor));
        }
        for (set, word) in [(heredoc.chomp, " chomp"), (heredoc.expand, " expand")] {
            text.push_str(if set { word } else { "" });
        }
        self.line(1, &format!("{text} {:?}", heredoc.content));
    }
}

impl InstructionKind {
    /// All that it says, places aside.
    pub(crate) fn text(&self) -> String {
        let mut out = Dump(format!("{:?}\n", std::mem::discriminant(self)));
        self.dump(&mut out);
        out.0
    }

    fn dump(&self, out: &mut Dump) {
        match self {
            InstructionKind::From { platform, image, name } => {
                out.texts("platform", platform);
                out.text("image", image);
                out.texts("name", name);
            }
            InstructionKind::Arg(pairs) => {
                for (name, value) in pairs {
                    let value = value.as_ref().map_or(String::new(), |value| format!("={:?}", value.value));
                    out.line(1, &format!("{:?}{value}", name.value));
                }
            }
            InstructionKind::Env { pairs, legacy } | InstructionKind::Label { pairs, legacy } => {
                out.pairs(pairs, *legacy);
            }
            InstructionKind::Run { flags, command, heredocs } => {
                out.texts("mount", &flags.mounts);
                out.texts("network", &flags.network);
                out.texts("security", &flags.security);
                out.texts("device", &flags.devices);
                out.command(command);
                heredocs.iter().for_each(|heredoc| out.heredoc("heredoc", heredoc));
            }
            InstructionKind::Copy(copy) | InstructionKind::Add(copy) => copy.dump(out),
            InstructionKind::Cmd(command) | InstructionKind::Entrypoint(command) | InstructionKind::Shell(command) => {
                out.command(command);
            }
            InstructionKind::Workdir(text)
            | InstructionKind::User(text)
            | InstructionKind::StopSignal(text)
            | InstructionKind::Maintainer(text) => out.text("value", text),
            InstructionKind::Expose(texts) | InstructionKind::Volume(texts) => out.texts("value", texts),
            InstructionKind::Healthcheck(HealthcheckInstruction::None) => out.line(1, "none"),
            InstructionKind::Healthcheck(HealthcheckInstruction::Cmd {
                command,
                interval,
                timeout,
                start_period,
                start_interval,
                retries,
            }) => {
                let numbers = [
                    ("interval", interval),
                    ("timeout", timeout),
                    ("start-period", start_period),
                    ("start-interval", start_interval),
                    ("retries", retries),
                ];
                for (name, number) in numbers.into_iter().filter(|(_, number)| **number != 0) {
                    out.line(1, &format!("{name} {number}"));
                }
                out.command(command);
            }
            InstructionKind::Onbuild { text, keyword } => {
                out.line(1, &format!("keyword {keyword}"));
                out.text("trigger", text);
            }
        }
    }
}

impl CopyInstruction {
    fn dump(&self, out: &mut Dump) {
        out.texts("from", &self.from);
        out.texts("chown", &self.chown);
        out.texts("chmod", &self.chmod);
        let flags = [
            ("link", self.link.then_some(true)),
            ("parents", self.parents.then_some(true)),
            ("keep-git-dir", self.keep_git_dir),
            ("unpack", self.unpack),
        ];
        for (name, value) in flags {
            if let Some(value) = value {
                out.line(1, &format!("{name} {value}"));
            }
        }
        out.texts("exclude", &self.excludes);
        out.texts("checksum", &self.checksum);
        out.texts("source", &self.sources);
        for (position, heredoc) in &self.heredocs {
            out.heredoc(&format!("heredoc {position}"), heredoc);
        }
        out.text("dest", &self.dest);
    }
}
