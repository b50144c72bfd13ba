//! Instructions back to text: a Dockerfile in one form, one line an instruction.
//!
//! What is printed parses to the same instructions, places and the texts of lines aside. Comments above instructions
//! stay, others are gone, as are continuations and blanks that mean nothing.

use crate::instruction::{
    Command, CopyInstruction, Dockerfile, HealthcheckInstruction, Heredoc, Instruction, InstructionKind, Text,
};
use crate::line::{self, HeredocMarker, is_blank};
use std::borrow::Cow;

impl Dockerfile {
    /// The file as text.
    pub fn to_text(&self) -> String {
        let mut out = String::new();
        for (name, value) in &self.directives {
            out.push_str(&format!("# {name}={}\n", value.value));
        }
        // A blank line ends the directives: comments that look like one stay comments.
        let comments = self.instructions.first().map_or(&[][..], |first| &first.comments);
        if !out.is_empty() || comments.iter().any(|comment| line::is_directive(comment)) {
            out.push('\n');
        }
        for instruction in &self.instructions {
            for comment in &instruction.comments {
                out.push_str(&format!("# {comment}\n"));
            }
            Printer { escape: self.escape, line: String::new() }.instruction(instruction, &mut out);
        }
        out
    }

    /// Whether two files say the same, wherever it stands.
    pub fn same_instructions(&self, other: &Dockerfile) -> bool {
        let directives = |file: &Dockerfile| -> Vec<(String, String)> {
            file.directives.iter().map(|(name, value)| (name.clone(), value.value.clone())).collect()
        };
        let same = |(a, b): (&Instruction, &Instruction)| {
            a.keyword.value == b.keyword.value && a.comments == b.comments && a.kind.text() == b.kind.text()
        };
        self.escape == other.escape
            && directives(self) == directives(other)
            && self.instructions.len() == other.instructions.len()
            && self.instructions.iter().zip(&other.instructions).all(same)
    }
}

/// Prints one instruction.
struct Printer {
    escape: char,
    line: String,
}

impl Printer {
    fn instruction(mut self, instruction: &Instruction, out: &mut String) {
        self.line.push_str(&instruction.keyword.value);
        let mut heredocs = Vec::new();
        let mut reads_heredocs = false;
        match &instruction.kind {
            InstructionKind::From { platform, image, name } => {
                self.flags("platform", platform);
                let name = name.as_ref().map_or(String::new(), |name| format!(" AS {}", name.value));
                self.rest(&format!("{}{name}", image.value));
            }
            InstructionKind::Arg(pairs) => {
                let word = |(name, value): &(Text, Option<Text>)| match value {
                    Some(value) => format!("{}={}", name.value, value.value),
                    None => name.value.clone(),
                };
                self.rest(&pairs.iter().map(word).collect::<Vec<_>>().join(" "));
            }
            InstructionKind::Env { pairs, legacy } | InstructionKind::Label { pairs, legacy } => {
                let escape = self.escape;
                let sign = |name: &str| match legacy {
                    false => "=",
                    // One blank behind the escape character would belong to the name.
                    true if name.ends_with(escape) => "\t ",
                    true => " ",
                };
                let word = |(name, value): &(Text, Text)| format!("{}{}{}", name.value, sign(&name.value), value.value);
                self.rest(&pairs.iter().map(word).collect::<Vec<_>>().join(" "));
            }
            InstructionKind::Run { flags, command, heredocs: all } => {
                self.flags("mount", &flags.mounts);
                self.flags("network", &flags.network);
                self.flags("security", &flags.security);
                self.flags("device", &flags.devices);
                self.command(command);
                heredocs.extend(all);
                reads_heredocs = !command.exec_form;
            }
            InstructionKind::Copy(copy) | InstructionKind::Add(copy) => {
                heredocs.extend(copy.heredocs.iter().map(|(_, heredoc)| heredoc));
                reads_heredocs = self.copy(copy);
            }
            InstructionKind::Cmd(command) | InstructionKind::Entrypoint(command) | InstructionKind::Shell(command) => {
                self.command(command);
            }
            InstructionKind::Workdir(text)
            | InstructionKind::User(text)
            | InstructionKind::StopSignal(text)
            | InstructionKind::Maintainer(text) => self.rest(&text.value),
            InstructionKind::Expose(words) => {
                self.rest(&words.iter().map(|word| word.value.as_str()).collect::<Vec<_>>().join(" "));
            }
            InstructionKind::Volume(words) => {
                self.words(&words.iter().map(|word| word.value.as_str()).collect::<Vec<_>>());
            }
            InstructionKind::Healthcheck(HealthcheckInstruction::None) => self.rest("NONE"),
            InstructionKind::Healthcheck(HealthcheckInstruction::Cmd {
                command,
                interval,
                timeout,
                start_period,
                start_interval,
                retries,
            }) => {
                let times = [
                    ("interval", interval),
                    ("timeout", timeout),
                    ("start-period", start_period),
                    ("start-interval", start_interval),
                ];
                for (name, time) in times.into_iter().filter(|(_, time)| **time != 0) {
                    self.line.push_str(&format!(" --{name}={time}ns"));
                }
                if *retries != 0 {
                    self.line.push_str(&format!(" --retries={retries}"));
                }
                self.line.push_str(" CMD ");
                self.line.push_str(&command_text(command));
            }
            InstructionKind::Onbuild { text, .. } => {
                // Bodies of heredocs are part of the text.
                self.line.push(' ');
                self.line.push_str(&text.value);
            }
        }
        let mut markers = if reads_heredocs { HeredocMarker::find_all(&self.line) } else { Vec::new() };
        if let InstructionKind::Run { heredocs, .. } = &instruction.kind
            && markers.len() != heredocs.len()
        {
            // Flags whose quotes hid the markers from the reader: only as it was written is it read as it was.
            self.line.clone_from(&instruction.original);
            markers = HeredocMarker::find_all(&self.line);
        }
        out.push_str(&self.line);
        // The escape character at the end would continue the line; behind it stood a blank of another kind.
        let end = self.line.trim_end_matches([' ', '\t']);
        if end.strip_suffix(self.escape).is_some_and(|before| !before.ends_with(self.escape)) {
            out.push('\u{b}');
        }
        out.push('\n');
        let in_order = markers.len() == heredocs.len();
        for (at, marker) in markers.iter().enumerate() {
            let named = |heredoc: &&&Heredoc| heredoc.name == marker.name;
            let heredoc = if in_order { heredocs.get(at) } else { heredocs.iter().rfind(named) };
            out.push_str(heredoc.map_or("", |heredoc| &heredoc.content));
            out.push_str(&marker.name);
            out.push('\n');
        }
    }

    /// `--name=value` for each value.
    fn flags<'t>(&mut self, name: &str, values: impl IntoIterator<Item = &'t Text>) {
        for value in values {
            self.line.push_str(&format!(" --{name}={}", self.flag_value(&value.value)));
        }
    }

    /// A value in quotes if it needs them; well quoted also for who looks for heredoc markers in the line.
    fn flag_value<'t>(&self, value: &'t str) -> Cow<'t, str> {
        let plain = |ch: char| ch.is_alphanumeric() || "-_=,./:@%+*!#~".contains(ch);
        if value.chars().all(plain) {
            return Cow::Borrowed(value);
        }
        let mut quoted = String::from("'");
        for ch in value.chars() {
            match ch {
                '\'' => quoted.push_str("'\"'\"'"),
                ch if ch == self.escape => quoted.extend([ch, ch]),
                ch => quoted.push(ch),
            }
        }
        quoted.push('\'');
        Cow::Owned(quoted)
    }

    /// The arguments; `--` keeps them from being flags.
    fn rest(&mut self, text: &str) {
        if text.starts_with("--") {
            self.line.push_str(" --");
        }
        if !text.is_empty() {
            self.line.push(' ');
            self.line.push_str(text);
        }
    }

    fn command(&mut self, command: &Command) {
        self.rest(&command_text(command));
    }

    /// Words between blanks, or a JSON array if they cannot be written so; false in the second case.
    fn words(&mut self, words: &[&str]) -> bool {
        let plain = |word: &&str| {
            !word.is_empty() && !word.contains(|ch| is_blank(ch) || ch == '\n') && word.trim().len() == word.len()
        };
        let joined = words.join(" ");
        let is_json = joined.starts_with('[') && serde_json::from_str::<Vec<serde_json::Value>>(&joined).is_ok();
        if words.iter().all(plain) && !is_json {
            self.rest(&joined);
            return true;
        }
        self.rest(&json(words));
        false
    }

    fn copy(&mut self, copy: &CopyInstruction) -> bool {
        self.flags("from", &copy.from);
        self.flags("chown", &copy.chown);
        self.flags("chmod", &copy.chmod);
        for (name, set) in [("link", copy.link), ("parents", copy.parents)] {
            if set {
                self.line.push_str(&format!(" --{name}"));
            }
        }
        self.flags("exclude", &copy.excludes);
        self.flags("checksum", &copy.checksum);
        for (name, value) in [("keep-git-dir", copy.keep_git_dir), ("unpack", copy.unpack)] {
            if let Some(value) = value {
                self.line.push_str(&format!(" --{name}={value}"));
            }
        }
        let mut words: Vec<Cow<'_, str>> = Vec::new();
        let mut sources = copy.sources.iter().map(|source| Cow::Borrowed(source.value.as_str()));
        for (position, heredoc) in &copy.heredocs {
            words.extend(sources.by_ref().take(position.saturating_sub(words.len())));
            words.push(Cow::Owned(marker(heredoc)));
        }
        words.extend(sources);
        words.push(Cow::Borrowed(&copy.dest.value));
        self.words(&words.iter().map(AsRef::as_ref).collect::<Vec<_>>())
    }
}

fn command_text(command: &Command) -> String {
    if command.exec_form { json(&command.args) } else { command.args.join(" ") }
}

fn json<T: AsRef<str>>(words: &[T]) -> String {
    let words: Vec<String> = words.iter().map(|word| serde_json::Value::from(word.as_ref()).to_string()).collect();
    format!("[{}]", words.join(", "))
}

/// `<<EOF` with the quotes and escapes that its name needs.
fn marker(heredoc: &Heredoc) -> String {
    let mut out = String::new();
    if heredoc.file_descriptor != 0 {
        out.push_str(&heredoc.file_descriptor.to_string());
    }
    out.push_str(if heredoc.chomp { "<<-" } else { "<<" });
    let special = |ch: char| match heredoc.expand {
        true => !ch.is_alphanumeric() && !matches!(ch, '_' | '.' | '/'),
        false => matches!(ch, '"' | '\\' | '$'),
    };
    let quote = if heredoc.expand { "" } else { "\"" };
    out.push_str(quote);
    for ch in heredoc.name.chars() {
        if special(ch) {
            out.push('\\');
        }
        out.push(ch);
    }
    out + quote
}

#[cfg(test)]
mod tests;
