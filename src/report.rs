//! Any error becomes text: message, source excerpt with caret, way out, exit code.
//!
//! The text's last block that starts with `error:` is the main one, so that people find it above the prompt and
//! programs at the end. A failed step's output therefore stands before its error, and the sum under several mistakes
//! of a file does not start with `error`.
//!
//! ```text
//! error: unknown instruction `RUNN`
//!  --> Dockerfile:3:1
//!   |
//! 3 | RUNN apk add curl
//!   | ^^^^
//! help: did you mean `RUN`?
//! ```

use annotate_snippets::renderer::DecorStyle;
use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};
use nacre_frontend::diagnostic::Diagnostic;
use nacre_frontend::source::{SourceFile, Span};
use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

/// Lines of a failed step's output to show.
pub(crate) const TAIL_LINES: usize = 20;

/// What the process ends with; `nacre --help` lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// A mistake in nacre, or one that fits nowhere else.
    General = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// A mistake in the Dockerfile, or in what it names in the context.
    Dockerfile = 3,
    /// A RUN step failed.
    Step = 4,
    /// A base image, git repository or download could not be had.
    Source = 5,
    /// The machine does not allow what the build needs.
    Host = 6,
    /// The store or an output could not be read or written.
    Store = 7,
    /// SIGINT or SIGTERM; what shells say of a program that ^C ended.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

/// Why a command ended.
#[derive(Debug)]
pub(crate) enum CommandError {
    /// The Dockerfile has mistakes: all of them.
    Dockerfile {
        /// The file they are in.
        source: SourceFile,
        /// In the order found; shown in the order of lines.
        diagnostics: Vec<Diagnostic>,
    },
    /// A step failed.
    Step(Box<StepFailure>),
    /// Anything else.
    Failure(Box<Failure>),
    /// The user stopped it.
    Interrupted,
    /// The process that did the work in a user namespace ended with this code, and has said why.
    Inside(u8),
}

impl CommandError {
    /// What went wrong, on one line.
    pub(crate) fn message(&self) -> String {
        match self {
            Self::Failure(failure) => failure.message.clone(),
            Self::Dockerfile { .. } => "the Dockerfile has mistakes".to_owned(),
            Self::Step(_) => "a step failed".to_owned(),
            Self::Interrupted => "interrupted".to_owned(),
            Self::Inside(code) => format!("ended with code {code}"),
        }
    }
}

/// Something went wrong outside of the Dockerfile's text.
#[derive(Debug)]
pub(crate) struct Failure {
    /// What kind of thing it is.
    pub(crate) exit: Exit,
    /// The message, with its causes.
    pub(crate) message: String,
    /// Where in the Dockerfile the step stands that met it.
    pub(crate) place: Option<Place>,
    /// A way out.
    pub(crate) help: Option<String>,
}

/// Lines of a Dockerfile.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// The file.
    pub(crate) source: SourceFile,
    /// First and last line, counted from 1.
    pub(crate) lines: (u32, u32),
    /// The word that it is about, if that is known.
    pub(crate) word: Option<Span>,
}

/// A RUN that did not end well.
#[derive(Debug)]
pub(crate) struct StepFailure {
    /// `[builder 2/5] RUN make`.
    pub(crate) name: String,
    /// Stage as the user named it, or its number.
    pub(crate) stage: String,
    /// The program that it starts: the shell, in shell form.
    pub(crate) program: String,
    /// How it ended.
    pub(crate) outcome: StepOutcome,
    /// What its limits had to do with that.
    pub(crate) limits: Vec<String>,
    /// Where it stands; `None` for triggers of a base image.
    pub(crate) place: Option<Place>,
    /// Last lines of its output; at most [`TAIL_LINES`] are shown.
    pub(crate) tail: Vec<String>,
    /// All of its output.
    pub(crate) log: Option<PathBuf>,
}

/// How a step ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum StepOutcome {
    /// By itself.
    Exit {
        /// A number other than 0.
        code: i32,
        /// The file system that it wrote to has no room left.
        disk_full: bool,
    },
    /// By a signal.
    Signal(i32),
}

impl CommandError {
    /// An error with all of its causes.
    pub(crate) fn new(exit: Exit, error: &(dyn Error + 'static), help: Option<String>) -> Self {
        let help = help.or_else(|| disk_help(error));
        Self::Failure(Box::new(Failure { exit, message: with_causes(error), place: None, help }))
    }

    /// Returns what the process ends with.
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Dockerfile { .. } => Exit::Dockerfile,
            Self::Step(_) => Exit::Step,
            Self::Failure(failure) => failure.exit,
            Self::Interrupted => Exit::Interrupted,
            Self::Inside(_) => Exit::General,
        }
    }
}

impl From<crate::request::RequestError> for CommandError {
    fn from(error: crate::request::RequestError) -> Self {
        Self::new(Exit::Usage, &error, error.help())
    }
}

/// Joins an error and its causes with colons; a cause that its parent's text ends with is not repeated.
pub(crate) fn with_causes(error: &dyn Error) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !message.ends_with(&text) {
            message.push_str(": ");
            message.push_str(&text);
        }
        cause = error.source();
    }
    message
}

/// What SIGKILL often means.
const OUT_OF_MEMORY: &str = "the kernel kills with SIGKILL when memory runs out";

/// A way out of a full disk.
const MAKE_ROOM: &str = "make room there (`nacre prune` clears what the cache does not need), or choose another place \
                         with --store or --output";

/// A way out when a file system is full or takes no writes.
pub(crate) fn disk_help(error: &(dyn Error + 'static)) -> Option<String> {
    use std::io::ErrorKind;
    let mut cause = Some(error);
    while let Some(error) = cause {
        match error.downcast_ref::<std::io::Error>().map(std::io::Error::kind) {
            Some(ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => return Some(MAKE_ROOM.to_owned()),
            Some(ErrorKind::ReadOnlyFilesystem) => {
                return Some("choose a place that can be written with --store or --output".to_owned());
            }
            _ => cause = error.source(),
        }
    }
    None
}

/// How to print.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Style {
    /// With colours.
    pub(crate) color: bool,
}

/// Severity of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Severity {
    /// Ends the command.
    Error,
    /// Does not.
    Warning,
}

impl Style {
    /// Returns the text for an error, complete with line end.
    pub(crate) fn error(self, error: &CommandError) -> String {
        match error {
            CommandError::Dockerfile { source, diagnostics } => self.diagnostics(source, diagnostics),
            CommandError::Step(step) => self.step(step),
            CommandError::Failure(failure) => {
                let place = failure.place.as_ref().map(|place| (&place.source, place.span()));
                self.block(Severity::Error, &failure.message, place, &[], failure.help.as_deref())
            }
            // It could not say this itself.
            CommandError::Inside(code @ 129..) if *code != Exit::Interrupted as u8 => {
                let signal = i32::from(*code) - 128;
                let message = format!("the process that builds was killed by {}", signal_name(signal));
                let help = (signal == 9).then_some(OUT_OF_MEMORY);
                self.block(Severity::Error, &message, None, &[], help)
            }
            CommandError::Inside(_) => String::new(),
            CommandError::Interrupted => {
                self.block(Severity::Error, "interrupted", None, &[], Some("finished steps are kept in the cache"))
            }
        }
    }

    /// Returns one block: message, excerpt, notes, way out.
    pub(crate) fn block(
        self,
        severity: Severity,
        message: &str,
        place: Option<(&SourceFile, Option<Span>)>,
        notes: &[String],
        help: Option<&str>,
    ) -> String {
        let level = match severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let message = one_line(message);
        let excerpt = place.and_then(|(source, span)| Some((source, Excerpt::new(source, span?)?)));
        let mut text = match &excerpt {
            Some((source, excerpt)) => {
                let snippet = Snippet::source(excerpt.text.as_str())
                    .line_start(excerpt.first_line as usize)
                    .path(source.name.as_str())
                    .annotation(AnnotationKind::Primary.span(excerpt.span.start..excerpt.span.end));
                self.renderer().render(&[level.primary_title(message.as_str()).element(snippet)])
            }
            None => {
                let mut text = self.renderer().render(&[Group::with_title(level.primary_title(message.as_str()))]);
                if let Some((source, _)) = place {
                    text.push_str(&format!("\n --> {}", source.name));
                }
                text
            }
        };
        for (level, line) in
            notes.iter().map(|note| (Level::NOTE, note.as_str())).chain(help.map(|help| (Level::HELP, help)))
        {
            let line = one_line(line);
            text.push('\n');
            text.push_str(&self.renderer().render(&[Group::with_title(level.secondary_title(line.as_str()))]));
        }
        text.push('\n');
        text
    }

    fn renderer(self) -> Renderer {
        let renderer = if self.color { Renderer::styled() } else { Renderer::plain() };
        renderer.decor_style(DecorStyle::Ascii)
    }

    fn diagnostics(self, source: &SourceFile, diagnostics: &[Diagnostic]) -> String {
        let mut sorted: Vec<&Diagnostic> = diagnostics.iter().collect();
        // Those without a place come first: they are about the file as a whole.
        sorted.sort_by_key(|diagnostic| diagnostic.span);
        let blocks: Vec<String> = sorted
            .iter()
            .map(|diagnostic| {
                let message = diagnostic.problem.to_string();
                let help = diagnostic.problem.help();
                self.block(Severity::Error, &message, Some((source, diagnostic.span)), &[], help.as_deref())
            })
            .collect();
        let mut text = blocks.join("\n");
        if let [first, _, ..] = sorted.as_slice() {
            let line = first.span.map(|span| format!(" (line {})", source.line(span.start))).unwrap_or_default();
            let first = one_line(&first.problem.to_string());
            text.push_str(&format!("\n{} mistakes in {}; the first: {first}{line}\n", sorted.len(), source.name));
        }
        text
    }

    fn step(self, step: &StepFailure) -> String {
        let mut text = String::new();
        if !step.tail.is_empty() {
            let shown = &step.tail[step.tail.len().saturating_sub(TAIL_LINES)..];
            text.push_str(&format!("--- last lines of {}\n", printable(&step.name)));
            for line in shown {
                text.push_str(&format!("  > {}\n", printable(line)));
            }
            text.push_str("---\n");
        }
        let outcome = match &step.outcome {
            StepOutcome::Exit { code, .. } => {
                format!("{} failed with exit code {code}{}", step.name, exit_meaning(*code))
            }
            StepOutcome::Signal(signal) => format!("{} was killed by {}", step.name, signal_name(*signal)),
        };
        // A limit that was reached is why, whatever the shell made of it.
        let limit: String = step.limits.iter().map(|limit| format!(", {limit}")).collect();
        let message = format!("{outcome}{limit} (stage {})", step.stage);
        let mut notes = Vec::new();
        if matches!(step.outcome, StepOutcome::Exit { code: 126 | 127, .. }) {
            notes
                .push(format!("`{}`, or a command that it was given, is not in the image or no program", step.program));
        }
        if let StepOutcome::Exit { disk_full: true, .. } = step.outcome {
            notes.push("the file system of the store, which the step writes to, is full".to_owned());
        }
        if let Some(log) = &step.log {
            notes.push(format!("all of its output is in {}", log.display()));
        }
        let place = step.place.as_ref().map(|place| (&place.source, place.span()));
        let help = match step.outcome {
            StepOutcome::Exit { disk_full: true, .. } => Some(MAKE_ROOM),
            _ if !step.limits.is_empty() => Some("give the step more, or let it do less at once"),
            StepOutcome::Signal(9) => Some(OUT_OF_MEMORY),
            StepOutcome::Exit { code: 126, .. }
                if step.tail.iter().any(|line| line.contains("Operation not permitted")) =>
            {
                Some(WANTS_CAPABILITIES)
            }
            StepOutcome::Exit { .. } | StepOutcome::Signal(_) => None,
        };
        text.push_str(&self.block(Severity::Error, &message, place, &notes, help));
        text
    }
}

/// What the kernel means by it when a shell starts a program: execve(2), EPERM.
const WANTS_CAPABILITIES: &str = "its file may have capabilities that steps do not: `ping` wants raw sockets, which are not \
                                  given to root on the host's network; --network=pasta has them";

/// Meanings that shells give to exit codes.
fn exit_meaning(code: i32) -> String {
    match code {
        126 => " (command cannot be executed)".to_owned(),
        127 => " (command not found)".to_owned(),
        129..=192 => format!(" (killed by {})", signal_name(code - 128)),
        _ => String::new(),
    }
}

fn signal_name(number: i32) -> String {
    let name = match number {
        1 => "SIGHUP",
        2 => "SIGINT",
        3 => "SIGQUIT",
        4 => "SIGILL",
        6 => "SIGABRT",
        7 => "SIGBUS",
        8 => "SIGFPE",
        9 => "SIGKILL",
        11 => "SIGSEGV",
        13 => "SIGPIPE",
        14 => "SIGALRM",
        15 => "SIGTERM",
        24 => "SIGXCPU",
        25 => "SIGXFSZ",
        31 => "SIGSYS",
        _ => return format!("signal {number}"),
    };
    name.to_owned()
}

impl Place {
    /// A word of a file.
    pub(crate) fn word(source: &SourceFile, word: Span) -> Self {
        let last = word.end.max(word.start + 1) - 1;
        Self { source: source.clone(), lines: (source.line(word.start), source.line(last)), word: Some(word) }
    }

    /// The word; else from the first line's first character to the last line's end.
    fn span(&self) -> Option<Span> {
        if self.word.is_some() {
            return self.word;
        }
        let (first, last) = self.lines;
        let mut start = None;
        let mut at = 0;
        for (line, text) in (1u32..).zip(self.source.text.split_inclusive('\n')) {
            if line == first {
                start = Some(at);
            }
            at += text.len();
            if line >= last {
                break;
            }
        }
        let start = start?;
        Some(Span::new(start, start + self.source.text[start..at].trim_end().len()))
    }
}

/// The lines around a span, with the span moved into them. Only they are given to the renderer, which reads all that
/// it is given.
struct Excerpt {
    text: String,
    first_line: u32,
    span: Span,
}

impl Excerpt {
    /// `None` for a file without text. Spans are trusted in nothing: they are cut to the text and to characters.
    fn new(source: &SourceFile, span: Span) -> Option<Self> {
        let text = source.text.as_str();
        if text.is_empty() {
            return None;
        }
        let start = floor(text, span.start);
        let end = floor(text, span.end).max(start);
        // The line end behind a place is no part of it.
        let end = start + text[start..end].trim_end_matches(['\n', '\r']).len();
        let line_start = text[..start].rfind('\n').map_or(0, |at| at + 1);
        let line_end = text[end..].find('\n').map_or(text.len(), |at| end + at);
        let mut excerpt = String::new();
        let mut moved = Span::default();
        for (at, c) in text[line_start..line_end].char_indices() {
            if line_start + at == start {
                moved.start = excerpt.len();
            }
            if line_start + at == end {
                moved.end = excerpt.len();
            }
            // What a terminal would obey, and a byte order mark, which has no width.
            match c {
                '\n' | '\t' => excerpt.push(c),
                '\r' | '\u{feff}' => {}
                c if unsafe_to_print(c) => excerpt.push('\u{fffd}'),
                c => excerpt.push(c),
            }
        }
        if line_end == start {
            moved.start = excerpt.len();
        }
        if line_end == end {
            moved.end = excerpt.len();
        }
        Some(Self { text: excerpt, first_line: source.line(line_start), span: moved })
    }
}

fn floor(text: &str, at: usize) -> usize {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// Control characters, and those that turn the direction of what follows.
fn unsafe_to_print(c: char) -> bool {
    c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A message of several lines (a program's, in most cases) becomes one, so that none of them looks like another error.
fn one_line(text: &str) -> String {
    let lines: Vec<String> = text.lines().map(|line| printable(line.trim())).filter(|line| !line.is_empty()).collect();
    lines.join("; ")
}

/// Text from files and steps without what a terminal would obey; line ends and tabs stay.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if unsafe_to_print(c) && !matches!(c, '\n' | '\t') { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nacre_frontend::diagnostic::Problem;

    const PLAIN: Style = Style { color: false };

    fn file(text: &str) -> SourceFile {
        SourceFile::new("Dockerfile", text)
    }

    fn mistake(start: usize, end: usize, name: &str) -> Diagnostic {
        Diagnostic::at(Span::new(start, end), Problem::UnknownInstruction(name.to_owned()))
    }

    #[test]
    fn a_place_is_shown_with_a_caret() {
        let source = file("FROM a\n\nRUNN apk add curl\nRUN x\n");
        let text = PLAIN.block(
            Severity::Error,
            "unknown instruction `RUNN`",
            Some((&source, Some(Span::new(8, 12)))),
            &[],
            Some("did you mean `RUN`?"),
        );
        let expected = "\
error: unknown instruction `RUNN`
 --> Dockerfile:3:1
  |
3 | RUNN apk add curl
  | ^^^^
help: did you mean `RUN`?
";
        assert_eq!(text, expected);
    }

    #[test]
    fn several_mistakes_in_line_order_with_a_sum() {
        let source = file("FROM a\nRUN b\n");
        let diagnostics = vec![mistake(7, 10, "//second"), mistake(5, 6, "//first")];
        let text = PLAIN.error(&CommandError::Dockerfile { source, diagnostics });
        let expected = "\
error: unknown instruction `//first`
 --> Dockerfile:1:6
  |
1 | FROM a
  |      ^
help: comments start with `#`

error: unknown instruction `//second`
 --> Dockerfile:2:1
  |
2 | RUN b
  | ^^^
help: comments start with `#`

2 mistakes in Dockerfile; the first: unknown instruction `//first` (line 1)
";
        assert_eq!(text, expected);
        let one = CommandError::Dockerfile { source: file("FROM a\n"), diagnostics: vec![mistake(5, 6, "x")] };
        assert!(!PLAIN.error(&one).contains("mistakes"));
        assert_eq!(one.exit() as u8, 3);
    }

    #[test]
    fn a_mistake_without_place_names_the_file() {
        let diagnostics = vec![Diagnostic { problem: Problem::Empty, span: None }];
        let text = PLAIN.error(&CommandError::Dockerfile { source: file(""), diagnostics });
        assert_eq!(
            text,
            "error: file with no instructions\n --> Dockerfile\nhelp: start with `FROM image` or `FROM scratch`\n"
        );
    }

    #[test]
    fn a_failed_step_shows_its_output_before_the_error() {
        let source = file("FROM a\nRUN make \\\n  all\n");
        let step = StepFailure {
            name: "[builder 2/2] RUN make all".to_owned(),
            stage: "builder".to_owned(),
            program: "/bin/sh".to_owned(),
            outcome: StepOutcome::Exit { code: 127, disk_full: false },
            limits: Vec::new(),
            place: Some(Place { source, lines: (2, 3), word: None }),
            tail: (0..30).map(|n| format!("error: line {n}\u{1b}[2J")).collect(),
            log: Some("/store/logs/1".into()),
        };
        let error = CommandError::Step(Box::new(step));
        let text = PLAIN.error(&error);
        assert!(!text.contains("line 9\u{fffd}") && text.contains("  > error: line 10\u{fffd}[2J\n"), "{text}");
        let (_, end) = text.split_once("---\nerror: ").expect("the error comes after the output");
        let expected = "\
[builder 2/2] RUN make all failed with exit code 127 (command not found) (stage builder)
 --> Dockerfile:2:1
  |
2 | / RUN make \\
3 | |   all
  | |_____^
note: `/bin/sh`, or a command that it was given, is not in the image or no program
note: all of its output is in /store/logs/1
";
        assert_eq!(end, expected);
        assert_eq!(error.exit() as u8, 4);
    }

    #[test]
    fn signals_have_names() {
        for (outcome, words) in [
            (StepOutcome::Signal(9), "was killed by SIGKILL"),
            (StepOutcome::Signal(40), "was killed by signal 40"),
            (StepOutcome::Exit { code: 137, disk_full: false }, "exit code 137 (killed by SIGKILL)"),
            (StepOutcome::Exit { code: 1, disk_full: false }, "exit code 1 (stage 0)"),
        ] {
            let step = StepFailure {
                name: "RUN x".into(),
                stage: "0".into(),
                program: "x".into(),
                outcome,
                limits: vec![],
                place: None,
                tail: vec![],
                log: None,
            };
            let text = PLAIN.error(&CommandError::Step(Box::new(step)));
            assert!(text.starts_with("error: RUN x ") && text.contains(words), "{text}");
        }
    }

    #[test]
    fn a_limit_is_named() {
        let step = StepFailure {
            name: "RUN x".into(),
            stage: "0".into(),
            program: "x".into(),
            outcome: StepOutcome::Exit { code: 137, disk_full: false },
            limits: vec!["killed: over --memory 64m".into()],
            place: None,
            tail: vec![],
            log: None,
        };
        assert_eq!(
            PLAIN.error(&CommandError::Step(Box::new(step))),
            "error: RUN x failed with exit code 137 (killed by SIGKILL), killed: over --memory 64m (stage 0)\n\
             help: give the step more, or let it do less at once\n"
        );
    }

    #[test]
    fn causes_are_joined_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot write `/x`")]
        struct Outer(#[source] std::io::Error);
        #[derive(Debug, thiserror::Error)]
        #[error("store: {0}")]
        struct Repeats(#[source] std::io::Error);
        let io = || std::io::Error::other("disk full");
        assert_eq!(with_causes(&Outer(io())), "cannot write `/x`: disk full");
        assert_eq!(with_causes(&Repeats(io())), "store: disk full");
        let error = CommandError::new(Exit::Store, &Outer(io()), Some("make room".into()));
        assert_eq!(PLAIN.error(&error), "error: cannot write `/x`: disk full\nhelp: make room\n");
        assert_eq!(error.exit() as u8, 7);
    }

    #[test]
    fn no_span_panics() {
        for text in ["", "\n", "\r\n", "a", "ä\n", "\u{feff}FROM x\r\nRUN\ty\0\u{1b}[2J", "x\n\n\n", "\u{202e}\tü€\n\r"]
        {
            let source = file(text);
            for start in 0..text.len() + 3 {
                for end in 0..text.len() + 3 {
                    let span = Some(Span::new(start, end));
                    for style in [PLAIN, Style { color: true }] {
                        let text = style.block(Severity::Error, "m", Some((&source, span)), &[], None);
                        assert!(!text.contains("\u{1b}[2J"));
                    }
                }
            }
            for lines in [(0, 0), (1, 1), (1, 9), (2, 1), (7, 9)] {
                let place = Place { source: source.clone(), lines, word: None };
                PLAIN.block(Severity::Warning, "m", Some((&source, place.span())), &[], None);
            }
        }
    }

    #[test]
    fn colours_only_when_asked() {
        let failure = CommandError::Interrupted;
        assert!(Style { color: true }.error(&failure).contains("\u{1b}["));
        assert!(!PLAIN.error(&failure).contains('\u{1b}'));
        assert_eq!(failure.exit() as u8, 130);
    }
}
