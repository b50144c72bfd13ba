//! Dockerfile text to typed instructions; goes on after a mistake and collects all of them.
//!
//! Three steps: [`crate::line`] joins physical lines, `node` splits each logical line into keyword, flags and
//! arguments, and this module gives them their meaning. Whatever needs more than one instruction, other than their
//! order, is left to lowering.

mod node;

use crate::diagnostic::{Diagnostic, Problem};
use crate::flag::{self, Flag, FlagKind};
use crate::instruction::{
    Command, CopyInstruction, Dockerfile, HealthcheckInstruction, Heredoc, Instruction, InstructionKind, RunFlags, Text,
};
use crate::line::{self, HeredocMarker, LogicalLine, Reader};
use crate::source::{BYTE_ORDER_MARK, SourceFile, Span};
use crate::units;
use node::{Arguments, Node};

/// A file with mistakes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseFailure {
    /// The file, for showing the places.
    pub source: SourceFile,
    /// All mistakes, in the order of the file.
    pub diagnostics: Vec<Diagnostic>,
}

impl std::fmt::Display for ParseFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: mistakes found: {}", self.source.name, self.diagnostics.len())
    }
}

impl std::error::Error for ParseFailure {}

/// Makes text of a file's bytes: without byte order mark, with a replacement character for what is not UTF-8.
pub fn decode(bytes: &[u8]) -> String {
    let mut text = String::from_utf8_lossy(bytes).into_owned();
    if text.starts_with(BYTE_ORDER_MARK) {
        text.drain(..BYTE_ORDER_MARK.len_utf8());
    }
    text
}

/// Parses a Dockerfile.
pub fn parse(source: SourceFile) -> Result<Dockerfile, ParseFailure> {
    let mut reader = Reader::new(&source.text);
    let mut instructions = Vec::new();
    let mut problems = Vec::new();
    let mut stage = false;
    let mut complained = false;
    let mut empty = true;
    while let Some(item) = Item::read(&mut reader, &mut problems) {
        empty = false;
        let upper = item.keyword.value.to_uppercase();
        let known = crate::diagnostic::INSTRUCTIONS.contains(&upper.as_str());
        if upper == "FROM" {
            stage = true;
        } else if !stage && known && upper != "ARG" && !complained {
            // One complaint is enough: the others have the same reason.
            complained = true;
            problems.push(Diagnostic::at(item.keyword.span, Problem::BeforeFrom(upper)));
        }
        instructions.extend(item.instruction(&mut problems));
    }
    problems.splice(0..0, std::mem::take(&mut reader.problems));
    if empty {
        problems.push(Diagnostic { problem: Problem::Empty, span: None });
    } else if !stage && problems.is_empty() {
        problems.push(Diagnostic { problem: Problem::NoStage, span: None });
    }
    let (escape, directives) = (reader.escape, reader.directives);
    if problems.is_empty() {
        Ok(Dockerfile { source, escape, directives, instructions })
    } else {
        Err(ParseFailure { source, diagnostics: problems })
    }
}

/// Parses an ONBUILD trigger of a base image. Spans in the instruction point into `text`; diagnostics have none.
pub fn parse_trigger(text: &str, escape: char) -> Result<Instruction, Vec<Diagnostic>> {
    let mut reader = Reader::without_directives(text, escape);
    let mut problems = Vec::new();
    let mut instructions = Vec::new();
    let mut count = 0;
    while let Some(item) = Item::read(&mut reader, &mut problems) {
        count += 1;
        if item.keyword.value.eq_ignore_ascii_case("FROM") {
            problems.push(Diagnostic::at(item.keyword.span, Problem::OnbuildTrigger("FROM".to_owned())));
        }
        instructions.extend(item.instruction(&mut problems));
    }
    if count != 1 {
        problems.insert(0, Diagnostic { problem: Problem::TriggerCount, span: None });
    }
    match instructions.pop() {
        Some(instruction) if problems.is_empty() => Ok(instruction),
        _ => {
            problems.iter_mut().for_each(|diagnostic| diagnostic.span = None);
            Err(problems)
        }
    }
}

/// A logical line with its heredocs and its node.
struct Item {
    line: LogicalLine,
    /// First word of the line.
    keyword: Text,
    /// `None` when the line could not be split; that has been reported.
    node: Option<Node>,
    /// Markers and content as it stands.
    heredocs: Vec<(HeredocMarker, Text)>,
    /// All of it.
    span: Span,
    lines: (u32, u32),
}

impl Item {
    fn read(reader: &mut Reader<'_>, problems: &mut Vec<Diagnostic>) -> Option<Self> {
        let line = reader.next_line()?;
        let whole = line.whole().trim();
        let keyword = whole.split_blanks(2)[0].text();
        let node = Node::new(&line, reader.escape, problems);
        let mut span = whole.span();
        let mut heredocs = Vec::new();
        if node.as_ref().is_some_and(Node::can_have_heredocs) {
            let mut place = 0;
            for marker in HeredocMarker::find_all(&line.text) {
                place = line.text[place..].find("<<").map_or(place, |at| place + at + 2);
                match reader.heredoc(&marker) {
                    Some(content) => heredocs.push((marker, content)),
                    None => {
                        let text = &line.text[place..];
                        let end = place + text.find(char::is_whitespace).unwrap_or(text.len());
                        let problem = Problem::UnterminatedHeredoc(marker.name);
                        let start = place.saturating_sub(2);
                        problems.push(Diagnostic::at(line.whole().part(start..end).span(), problem));
                    }
                }
            }
            if !heredocs.is_empty() {
                span.end = reader.end().max(span.end);
            }
        }
        let lines = (line.lines.0, reader.lines_read());
        Some(Self { line, keyword, node, heredocs, span, lines })
    }

    /// Gives the node its meaning.
    fn instruction(self, problems: &mut Vec<Diagnostic>) -> Option<Instruction> {
        let node = self.node.as_ref()?;
        let before = problems.len();
        let kind = Meaning { item: &self, node, problems }.kind();
        if problems.len() > before {
            return None;
        }
        Some(Instruction {
            span: self.span,
            lines: self.lines,
            original: self.line.text.trim().to_owned(),
            kind: kind?,
            keyword: self.keyword,
            comments: self.line.comments,
        })
    }
}

/// What a node means; `None` wherever a problem was pushed.
struct Meaning<'a> {
    item: &'a Item,
    node: &'a Node,
    problems: &'a mut Vec<Diagnostic>,
}

impl Meaning<'_> {
    fn kind(&mut self) -> Option<InstructionKind> {
        let node = self.node;
        match node.upper.as_str() {
            "FROM" => self.from(),
            "ARG" => self.arg(),
            "ENV" => {
                let (pairs, legacy) = self.pairs()?;
                Some(InstructionKind::Env { pairs, legacy })
            }
            "LABEL" => {
                let (pairs, legacy) = self.pairs()?;
                Some(InstructionKind::Label { pairs, legacy })
            }
            "RUN" => self.run(),
            "COPY" => Some(InstructionKind::Copy(self.copy()?)),
            "ADD" => Some(InstructionKind::Add(self.copy()?)),
            "CMD" => {
                self.flags();
                Some(InstructionKind::Cmd(self.command()))
            }
            "ENTRYPOINT" => {
                self.flags();
                Some(InstructionKind::Entrypoint(self.command()))
            }
            "SHELL" => self.shell(),
            "WORKDIR" => {
                self.flags();
                self.single().map(InstructionKind::Workdir)
            }
            "USER" => {
                self.flags();
                self.single().map(InstructionKind::User)
            }
            // BuildKit never looks at flags of STOPSIGNAL.
            "STOPSIGNAL" => self.single().map(InstructionKind::StopSignal),
            "MAINTAINER" => {
                self.flags();
                self.single().map(InstructionKind::Maintainer)
            }
            "EXPOSE" => {
                self.flags();
                self.some(node.list().to_vec()).map(InstructionKind::Expose)
            }
            "VOLUME" => self.volume(),
            "HEALTHCHECK" => self.healthcheck().map(InstructionKind::Healthcheck),
            "ONBUILD" => self.onbuild(),
            "" => self.refuse(Problem::MissingInstruction),
            _ => self.refuse(Problem::UnknownInstruction(node.keyword.value.clone())),
        }
    }

    fn push(&mut self, span: Span, problem: Problem) {
        self.problems.push(Diagnostic::at(span, problem));
    }

    /// Pushes a problem of the instruction as such, shown at its keyword.
    fn refuse<T>(&mut self, problem: Problem) -> Option<T> {
        self.push(self.node.keyword.span, problem);
        None
    }

    fn keyword(&self) -> String {
        self.node.upper.clone()
    }

    /// Exactly one argument.
    fn single(&mut self) -> Option<Text> {
        match self.node.list() {
            [text] => Some(text.clone()),
            _ => self.refuse(Problem::ExactlyOneArgument(self.keyword())),
        }
    }

    /// At least one argument.
    fn some<T>(&mut self, list: Vec<T>) -> Option<Vec<T>> {
        if list.is_empty() { self.refuse(Problem::AtLeastOneArgument(self.keyword())) } else { Some(list) }
    }

    fn from(&mut self) -> Option<InstructionKind> {
        let flags = self.flags();
        let (image, name) = match self.node.list() {
            [image] => (image, None),
            [image, r#as, name] if r#as.value.eq_ignore_ascii_case("as") => (image, Some(name.clone())),
            [] => return self.refuse(Problem::FromArguments),
            [_, rest @ ..] => {
                let span = rest.iter().fold(rest.first()?.span, |span, text| span.to(text.span));
                self.push(span, Problem::FromArguments);
                return None;
            }
        };
        if let Some(name) = name.as_ref().filter(|name| !is_stage_name(&name.value)) {
            self.push(name.span, Problem::StageName(name.value.clone()));
        }
        Some(InstructionKind::From { platform: flags.value("platform"), image: image.clone(), name })
    }

    fn arg(&mut self) -> Option<InstructionKind> {
        self.flags();
        let mut pairs = Vec::new();
        for word in self.node.list() {
            let Some((name, value)) = word.value.split_once('=') else {
                pairs.push((word.clone(), None));
                continue;
            };
            if name.is_empty() {
                self.push(word.span, Problem::BlankName(self.keyword()));
            }
            // A word that goes on over several lines has no place for each half: both then show all of it.
            let whole = word.span.end - word.span.start == word.value.len();
            let part = |value: &str, start: usize| Text {
                value: value.to_owned(),
                span: if whole {
                    Span::new(word.span.start + start, word.span.start + start + value.len())
                } else {
                    word.span
                },
            };
            pairs.push((part(name, 0), Some(part(value, name.len() + 1))));
        }
        self.some(pairs).map(InstructionKind::Arg)
    }

    fn pairs(&mut self) -> Option<(Vec<(Text, Text)>, bool)> {
        self.flags();
        let Arguments::Pairs { pairs, legacy } = &self.node.arguments else {
            return self.refuse(Problem::AtLeastOneArgument(self.keyword()));
        };
        for (name, value) in pairs.iter().filter(|(name, _)| name.value.is_empty()) {
            self.push(name.span.to(value.span), Problem::BlankName(self.keyword()));
        }
        Some((pairs.clone(), *legacy))
    }

    fn command(&self) -> Command {
        let list = self.node.list();
        let args = list.iter().map(|text| text.value.clone()).collect();
        Command { exec_form: self.node.json, args, span: self.node.rest.span }
    }

    fn run(&mut self) -> Option<InstructionKind> {
        let flags = self.flags();
        let run = RunFlags {
            mounts: flags.values("mount"),
            network: flags.given("network"),
            security: flags.given("security"),
            devices: flags.values("device"),
        };
        for mount in &run.mounts {
            if let Err(error) = flag::check_mount(&mount.value) {
                let wrong = flag::in_mount(mount, error);
                self.push(wrong.span.unwrap_or(mount.span), wrong.problem);
            }
        }
        // Neither takes variables.
        if let Some(mode) = run.network.as_ref().filter(|mode| !["default", "none", "host"].contains(&&*mode.value)) {
            self.push(mode.span, Problem::NetworkMode(mode.value.clone()));
        }
        if let Some(mode) = run.security.as_ref().filter(|mode| !["sandbox", "insecure"].contains(&&*mode.value)) {
            self.push(mode.span, Problem::SecurityMode(mode.value.clone()));
        }
        let heredocs = self.item.heredocs.iter().map(|(marker, content)| heredoc(marker, content)).collect();
        Some(InstructionKind::Run { flags: run, command: self.command(), heredocs })
    }

    fn copy(&mut self) -> Option<CopyInstruction> {
        let flags = self.flags();
        let [sources @ .., dest] = self.node.list() else {
            return self.refuse(Problem::NoDestination(self.keyword()));
        };
        if sources.is_empty() {
            return self.refuse(Problem::NoDestination(self.keyword()));
        }
        if HeredocMarker::parse(&dest.value).is_some() {
            self.push(dest.span, Problem::HeredocDestination(self.keyword()));
        }
        let mut copy = CopyInstruction {
            from: flags.value("from"),
            chown: flags.value("chown"),
            chmod: flags.value("chmod"),
            link: flags.bool("link").unwrap_or(false),
            parents: flags.bool("parents").unwrap_or(false),
            excludes: flags.values("exclude"),
            checksum: flags.value("checksum"),
            keep_git_dir: flags.bool("keep-git-dir"),
            unpack: flags.bool("unpack"),
            dest: dest.clone(),
            ..CopyInstruction::default()
        };
        for (index, source) in sources.iter().enumerate() {
            let Some(marker) = HeredocMarker::parse(&source.value) else {
                copy.sources.push(source.clone());
                continue;
            };
            // Of several with one name the last counts. In JSON form a marker has no lines: the file is empty.
            let content = self.item.heredocs.iter().rev().find(|(known, _)| known.name == marker.name);
            let empty = Text { value: String::new(), span: source.span };
            copy.heredocs.push((index, heredoc(&marker, content.map_or(&empty, |(_, content)| content))));
        }
        Some(copy)
    }

    fn shell(&mut self) -> Option<InstructionKind> {
        self.flags();
        let command = self.command();
        if command.args.is_empty() {
            return self.refuse(Problem::AtLeastOneArgument(self.keyword()));
        }
        if !command.exec_form {
            self.push(command.span, Problem::NotJson(self.keyword()));
        }
        Some(InstructionKind::Shell(command))
    }

    fn volume(&mut self) -> Option<InstructionKind> {
        self.flags();
        let mut volumes = self.some(self.node.list().to_vec())?;
        for volume in &mut volumes {
            volume.value = volume.value.trim().to_owned();
            if volume.value.is_empty() {
                self.push(volume.span, Problem::EmptyVolume);
            }
        }
        Some(InstructionKind::Volume(volumes))
    }

    fn healthcheck(&mut self) -> Option<HealthcheckInstruction> {
        let Some((kind, arguments)) = self.node.list().split_first() else {
            return self.refuse(Problem::AtLeastOneArgument(self.keyword()));
        };
        if kind.value.eq_ignore_ascii_case("NONE") {
            // BuildKit never looks at the flags of this form.
            if let Some(argument) = arguments.first() {
                self.push(argument.span, Problem::HealthcheckNoneArguments);
            }
            return Some(HealthcheckInstruction::None);
        }
        let flags = self.flags();
        if !kind.value.eq_ignore_ascii_case("CMD") {
            self.push(kind.span, Problem::HealthcheckType(kind.value.clone()));
            return None;
        }
        let Some(first) = arguments.first() else {
            self.push(kind.span, Problem::HealthcheckWithoutCommand);
            return None;
        };
        let retries = flags.value("retries").map_or(0, |text| match parse_retries(&text.value) {
            Some(retries) => retries,
            None => {
                self.push(text.span, Problem::Retries(text.value));
                0
            }
        });
        let span = arguments.iter().fold(first.span, |span, text| span.to(text.span));
        let args = arguments.iter().map(|text| text.value.clone()).collect();
        Some(HealthcheckInstruction::Cmd {
            command: Command { exec_form: self.node.json, args, span },
            interval: self.interval(&flags, "interval"),
            timeout: self.interval(&flags, "timeout"),
            start_period: self.interval(&flags, "start-period"),
            start_interval: self.interval(&flags, "start-interval"),
            retries,
        })
    }

    fn interval(&mut self, flags: &Flags, name: &str) -> i64 {
        let Some(text) = flags.value(name) else { return 0 };
        let flag = name.to_owned();
        let problem = match units::parse_duration(&text.value) {
            Ok(interval) if interval == 0 || interval >= SHORTEST_INTERVAL => return interval,
            Ok(_) => Problem::ShortInterval { flag, value: text.value },
            Err(error) => Problem::FlagValue { flag, error },
        };
        self.push(text.span, problem);
        0
    }

    fn onbuild(&mut self) -> Option<InstructionKind> {
        self.flags();
        let Arguments::Trigger(trigger) = &self.node.arguments else {
            return self.refuse(Problem::AtLeastOneArgument(self.keyword()));
        };
        match trigger.upper.as_str() {
            "ONBUILD" => self.push(trigger.keyword.span, Problem::OnbuildChain),
            "FROM" | "MAINTAINER" => {
                self.push(trigger.keyword.span, Problem::OnbuildTrigger(trigger.upper.clone()));
            }
            // Any other is stored as it is; what is wrong with it shows in the build that it fires in.
            _ => {}
        }
        let mut text = node::behind_onbuild(&self.item.line).text();
        for (marker, content) in &self.item.heredocs {
            text.value.push('\n');
            text.value.push_str(&content.value);
            text.value.push_str(&marker.name);
            text.span.end = self.item.span.end;
        }
        Some(InstructionKind::Onbuild { text, keyword: trigger.upper.clone() })
    }

    /// Checks the flags against those that the instruction has.
    fn flags(&mut self) -> Flags {
        let mut found = Flags(Vec::new());
        for flag in &self.node.flags {
            let name = &flag.name.value;
            let known = flag::flags_of(&self.node.upper).iter().find(|(known, _)| known == name);
            let Some(&(known, kind)) = known else {
                let problem = Problem::UnknownFlag { keyword: self.keyword(), flag: name.clone() };
                self.push(flag.text.span, problem);
                continue;
            };
            if kind != FlagKind::Values && found.0.iter().any(|(name, _)| *name == known) {
                self.push(flag.text.span, Problem::DuplicateFlag(name.clone()));
                continue;
            }
            if let Err(problem) = check_flag(flag, kind) {
                self.push(flag.text.span, problem);
                continue;
            }
            found.0.push((known, flag.value.clone()));
        }
        found
    }
}

/// Shortest time that a container runtime takes for health checks, in nanoseconds.
const SHORTEST_INTERVAL: i64 = 1_000_000;

/// Flags of an instruction that are as they should be.
struct Flags(Vec<(&'static str, Option<Text>)>);

impl Flags {
    /// Value of a flag, even if it is empty.
    fn given(&self, name: &str) -> Option<Text> {
        self.0.iter().find(|(known, _)| *known == name).and_then(|(_, value)| value.clone())
    }

    /// Value of a flag; an empty one is as good as none.
    fn value(&self, name: &str) -> Option<Text> {
        self.given(name).filter(|value| !value.value.is_empty())
    }

    fn values(&self, name: &str) -> Vec<Text> {
        self.0.iter().filter(|(known, _)| *known == name).filter_map(|(_, value)| value.clone()).collect()
    }

    fn bool(&self, name: &str) -> Option<bool> {
        let (_, value) = self.0.iter().find(|(known, _)| *known == name)?;
        Some(value.as_ref().is_none_or(|value| value.value.eq_ignore_ascii_case("true")))
    }
}

fn check_flag(flag: &Flag, kind: FlagKind) -> Result<(), Problem> {
    let name = || flag.name.value.clone();
    match (kind, &flag.value) {
        (FlagKind::Bool, None) => Ok(()),
        (FlagKind::Bool, Some(value)) if value.value.is_empty() => Err(Problem::FlagWithoutValue(name())),
        (FlagKind::Bool, Some(value)) => match value.value.to_ascii_lowercase().as_str() {
            "true" | "false" => Ok(()),
            _ => Err(Problem::FlagNotBoolean { flag: name(), value: value.value.clone() }),
        },
        (_, None) => Err(Problem::FlagWithoutValue(name())),
        (_, Some(_)) => Ok(()),
    }
}

fn heredoc(marker: &HeredocMarker, content: &Text) -> Heredoc {
    Heredoc {
        name: marker.name.clone(),
        file_descriptor: marker.file_descriptor,
        chomp: marker.chomp,
        expand: marker.expand,
        content: if marker.chomp { line::chomp(&content.value) } else { content.value.clone() },
        span: content.span,
    }
}

fn is_stage_name(name: &str) -> bool {
    let name = name.to_lowercase();
    name.starts_with(|first: char| first.is_ascii_lowercase())
        && name.chars().all(|ch| ch.is_ascii_lowercase() || ch.is_ascii_digit() || matches!(ch, '-' | '_' | '.'))
}

fn parse_retries(text: &str) -> Option<i64> {
    text.parse::<i32>().ok().filter(|retries| *retries >= 0).map(i64::from)
}

#[cfg(test)]
mod tests;
