//! Mistakes in a Dockerfile: a closed list, each with its place and a way out.
//!
//! Errors end the build, warnings (build checks) do not. The text of both is made here, in one place; colour and
//! layout belong to the caller.

use crate::flag::{self, MountError};
use crate::source::Span;
use crate::units::UnitError;
use crate::word::WordError;

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// What is wrong.
    pub problem: Problem,
    /// Where; `None` when it is about the whole file or comes from outside of it (a base image's trigger).
    pub span: Option<Span>,
}

/// What is wrong. Parsing and expansion mistakes first, then those of stages and lowering.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Nothing in it.
    #[error("file with no instructions")]
    Empty,
    /// Instructions, but no FROM.
    #[error("no build stage: the file has no FROM")]
    NoStage,
    /// `# escape=` with something else than a backslash or a backtick.
    #[error("invalid escape character `{0}`: only ` and \\ are possible")]
    EscapeDirective(String),
    /// A directive given twice.
    #[error("only one `{0}` parser directive can be used")]
    DuplicateDirective(String),
    /// No such instruction; as written.
    #[error("unknown instruction `{0}`")]
    UnknownInstruction(String),
    /// A line continuation with nothing in it.
    #[error("a line continuation without an instruction")]
    MissingInstruction,
    /// Only ARG may stand before the first FROM.
    #[error("`{0}` before the first FROM: no build stage to add it to")]
    BeforeFrom(String),
    /// One argument or more is needed.
    #[error("{0} requires at least one argument")]
    AtLeastOneArgument(String),
    /// One argument is needed.
    #[error("{0} requires exactly one argument")]
    ExactlyOneArgument(String),
    /// COPY and ADD with less than two arguments.
    #[error("{0} requires at least two arguments, a source and the destination")]
    NoDestination(String),
    /// FROM with two or more than three arguments, or without.
    #[error("FROM requires either one argument or three: `FROM image [AS name]`")]
    FromArguments,
    /// `AS` name with symbols or a digit in front.
    #[error("invalid name for a build stage: `{0}`")]
    StageName(String),
    /// `ENV name` without value.
    #[error("{0} must have two arguments, a name and a value")]
    NameWithoutValue(String),
    /// A word without `=` among `name=value` pairs.
    #[error("can't find = in `{word}`: {keyword} takes name=value pairs")]
    PairWithoutEquals {
        /// ENV or LABEL.
        keyword: String,
        /// The word.
        word: String,
    },
    /// `=value`.
    #[error("{0} names can not be blank")]
    BlankName(String),
    /// A JSON array with something else than strings in it.
    #[error("a JSON array of {0} may hold strings only")]
    JsonMember(String),
    /// SHELL without a JSON array.
    #[error("{0} requires its arguments as a JSON array")]
    NotJson(String),
    /// The line that ends a heredoc is missing.
    #[error("unterminated heredoc `{0}`")]
    UnterminatedHeredoc(String),
    /// `COPY file <<EOF`.
    #[error("{0} cannot have a heredoc as its destination")]
    HeredocDestination(String),
    /// No such flag.
    #[error("unknown flag `--{flag}` of {keyword}")]
    UnknownFlag {
        /// Instruction.
        keyword: String,
        /// Without dashes.
        flag: String,
    },
    /// A flag given twice.
    #[error("duplicate flag `--{0}`")]
    DuplicateFlag(String),
    /// A flag without its value.
    #[error("missing value of flag `--{0}`")]
    FlagWithoutValue(String),
    /// A boolean flag with another value.
    #[error("flag `--{flag}` is true or false, not `{value}`")]
    FlagNotBoolean {
        /// Without dashes.
        flag: String,
        /// As written.
        value: String,
    },
    /// `--mount` that cannot be read.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// `--network`.
    #[error("invalid network mode `{0}`")]
    NetworkMode(String),
    /// `--security`.
    #[error("invalid security mode `{0}`")]
    SecurityMode(String),
    /// `HEALTHCHECK` with something else than NONE and CMD.
    #[error("unknown type `{0}` of HEALTHCHECK")]
    HealthcheckType(String),
    /// `HEALTHCHECK NONE something`.
    #[error("HEALTHCHECK NONE takes no arguments")]
    HealthcheckNoneArguments,
    /// `HEALTHCHECK CMD` alone.
    #[error("missing command after HEALTHCHECK CMD")]
    HealthcheckWithoutCommand,
    /// A flag's value is no duration or no number.
    #[error("invalid value of flag `--{flag}`: {error}")]
    FlagValue {
        /// Without dashes.
        flag: String,
        /// Why.
        error: UnitError,
    },
    /// A HEALTHCHECK time below a millisecond.
    #[error("flag `--{flag}` cannot be less than 1ms: `{value}`")]
    ShortInterval {
        /// Without dashes.
        flag: String,
        /// As written.
        value: String,
    },
    /// `--retries` that is negative or no number.
    #[error("flag `--retries` must be a number that is not negative: `{0}`")]
    Retries(String),
    /// `VOLUME [""]`.
    #[error("a VOLUME can not be an empty string")]
    EmptyVolume,
    /// `ONBUILD ONBUILD`.
    #[error("ONBUILD cannot be chained: `ONBUILD ONBUILD`")]
    OnbuildChain,
    /// `ONBUILD FROM`, `ONBUILD MAINTAINER`.
    #[error("{0} isn't allowed as an ONBUILD trigger")]
    OnbuildTrigger(String),
    /// A base image's trigger that is not exactly one instruction.
    #[error("an ONBUILD trigger must be a single instruction")]
    TriggerCount,
    /// A word cannot be expanded.
    #[error(transparent)]
    Word(#[from] WordError),
    /// Found when stages are put together and lowered.
    #[error(transparent)]
    Lower(#[from] crate::lower_problem::LowerProblem),
}

impl Diagnostic {
    /// A mistake at a place.
    pub fn at(span: Span, problem: Problem) -> Self {
        Self { problem, span: Some(span) }
    }
}

/// All instructions.
pub const INSTRUCTIONS: [&str; 18] = [
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "MAINTAINER",
    "ONBUILD",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];

impl Problem {
    /// A way out, one sentence without a full stop.
    pub fn help(&self) -> Option<String> {
        let help = match self {
            Problem::Empty | Problem::NoStage => "start with `FROM image` or `FROM scratch`".to_owned(),
            Problem::EscapeDirective(_) => "write \"# escape=\\\" or \"# escape=`\"".to_owned(),
            Problem::DuplicateDirective(_) => "remove one of them".to_owned(),
            Problem::UnknownInstruction(keyword) => return unknown_instruction_help(keyword),
            Problem::MissingInstruction => "remove the line".to_owned(),
            Problem::BeforeFrom(_) => "move it below FROM; only ARG may stand above".to_owned(),
            Problem::AtLeastOneArgument(keyword) | Problem::ExactlyOneArgument(keyword) => {
                format!("write `{}`", usage(keyword)?)
            }
            Problem::NoDestination(keyword) => format!("write `{keyword} source destination`"),
            Problem::FromArguments => "write `FROM image` or `FROM image AS name`".to_owned(),
            Problem::StageName(_) => {
                "start with a letter, then letters, digits, `-`, `_` and `.` are possible".to_owned()
            }
            Problem::NameWithoutValue(keyword) => format!("write `{keyword} name=value`; the value may be empty"),
            Problem::PairWithoutEquals { word, .. } if word.starts_with('#') => {
                "move the comment to a line of its own".to_owned()
            }
            Problem::PairWithoutEquals { .. } => "put quotes around a value with blanks".to_owned(),
            Problem::BlankName(keyword) => format!("write `{keyword} name=value` without a blank before `=`"),
            Problem::JsonMember(_) => "put double quotes around every member".to_owned(),
            Problem::NotJson(keyword) => format!("write `{keyword} [\"program\", \"argument\"]`"),
            Problem::UnterminatedHeredoc(name) => format!(
                "end it with a line that holds nothing but `{name}`; only `<<-` allows tabs before it, and blanks \
                 after it are never allowed"
            ),
            Problem::HeredocDestination(keyword) => format!("write `{keyword} <<EOF /path`"),
            Problem::UnknownFlag { keyword, flag } => return unknown_flag_help(keyword, flag),
            Problem::DuplicateFlag(_) => "remove one of them".to_owned(),
            Problem::FlagWithoutValue(flag) => format!("write `--{flag}=value`, without blanks around `=`"),
            Problem::FlagNotBoolean { flag, .. } => format!("write `--{flag}` or `--{flag}=false`"),
            Problem::Mount(error) => return error.help(),
            Problem::NetworkMode(mode) => one_of(mode, &["default", "none", "host"]),
            Problem::SecurityMode(mode) => one_of(mode, &["sandbox", "insecure"]),
            Problem::HealthcheckType(word) => one_of(word, &["CMD", "NONE"]),
            Problem::HealthcheckNoneArguments => "write `HEALTHCHECK NONE` or `HEALTHCHECK CMD command`".to_owned(),
            Problem::HealthcheckWithoutCommand => "write `HEALTHCHECK CMD command`".to_owned(),
            Problem::FlagValue { error, .. } => return error.help(),
            Problem::ShortInterval { .. } => "give a unit and at least `1ms`; 0 means the default".to_owned(),
            Problem::Retries(_) => "write a number like `--retries=3`".to_owned(),
            Problem::EmptyVolume => "write `VOLUME /path`".to_owned(),
            Problem::OnbuildChain => "triggers are for direct children only: write one ONBUILD".to_owned(),
            Problem::OnbuildTrigger(_) => "use another instruction as the trigger".to_owned(),
            Problem::TriggerCount => "the base image has to be built again with one instruction a trigger".to_owned(),
            Problem::Word(error) => return error.help(),
            Problem::Lower(problem) => return problem.help(),
        };
        Some(help)
    }
}

/// Returns the candidate that `word` was probably meant to be: few edits away for its length, case aside.
pub fn did_you_mean<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let word: Vec<char> = word.chars().take(MAX_GUESS + 1).flat_map(char::to_lowercase).collect();
    if word.is_empty() || word.len() > MAX_GUESS {
        return None;
    }
    let limit = (word.len() / 3).max(1).min(word.len() - 1);
    candidates
        .into_iter()
        .take(MAX_CANDIDATES)
        // At least as many edits as the lengths differ; a character has at most four bytes.
        .filter(|candidate| candidate.len() >= word.len() - limit && candidate.len() <= 4 * (word.len() + limit))
        .filter_map(|candidate| {
            let lower: Vec<char> = candidate.to_lowercase().chars().collect();
            edit_distance(&word, &lower, limit).map(|distance| (distance, candidate))
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate.to_owned())
}

/// Longest word that a guess is made for; no keyword comes near it.
const MAX_GUESS: usize = 40;
/// Most candidates that are looked at: whole files of mistakes must not take long either.
const MAX_CANDIDATES: usize = 100;

/// Edit distance where inserting, deleting, replacing and swapping two neighbours cost one each; `None` above the limit.
fn edit_distance(a: &[char], b: &[char], limit: usize) -> Option<usize> {
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    for (i, &x) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, &y) in b.iter().enumerate() {
            let mut cost = (above[j] + usize::from(x != y)).min(above[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && x == b[j - 1] && a[i - 1] == y {
                cost = cost.min(before[j - 1] + 1);
            }
            row.push(cost);
        }
        // A swap reaches two rows back, everything else one: no later row gets below these two.
        if row.iter().chain(&above).min().is_some_and(|least| *least > limit) {
            return None;
        }
        before = std::mem::replace(&mut above, row);
    }
    Some(above[b.len()]).filter(|distance| *distance <= limit)
}

/// `did you mean` when one is near, else all of them.
pub(crate) fn one_of(word: &str, candidates: &[&str]) -> String {
    match did_you_mean(word, candidates.iter().copied()) {
        Some(guess) => format!("did you mean `{guess}`?"),
        None => {
            let list: Vec<String> = candidates.iter().map(|candidate| format!("`{candidate}`")).collect();
            match list.split_last() {
                Some((last, others)) if !others.is_empty() => format!("use {} or {last}", others.join(", ")),
                _ => format!("use {}", list.join(", ")),
            }
        }
    }
}

fn unknown_instruction_help(keyword: &str) -> Option<String> {
    let known = INSTRUCTIONS.iter().find(|known| {
        keyword.get(..known.len()).is_some_and(|head| head.eq_ignore_ascii_case(known))
            && keyword[known.len()..].starts_with(['[', '"', '\'', '='])
    });
    if let Some(known) = known {
        return Some(format!("put a blank after `{known}`"));
    }
    if let Some(guess) = did_you_mean(keyword, INSTRUCTIONS) {
        return Some(format!("did you mean `{guess}`?"));
    }
    if keyword.starts_with("//") || keyword.starts_with("/*") {
        return Some("comments start with `#`".to_owned());
    }
    if !keyword.starts_with(|first: char| first.is_ascii_alphabetic()) {
        return Some("if it continues the line above, that line has to end with the escape character".to_owned());
    }
    Some(format!("instructions are {}", INSTRUCTIONS.join(", ")))
}

fn unknown_flag_help(keyword: &str, name: &str) -> Option<String> {
    let own: Vec<&str> = flag::flags_of(keyword).iter().map(|(known, _)| *known).collect();
    if let Some(guess) = did_you_mean(name, own.iter().copied()) {
        return Some(format!("did you mean `--{guess}`?"));
    }
    let others: Vec<&str> = INSTRUCTIONS
        .into_iter()
        .filter(|other| flag::flags_of(other).iter().any(|(known, _)| known.eq_ignore_ascii_case(name)))
        .collect();
    match (others.is_empty(), own.is_empty()) {
        (false, _) => Some(format!("`--{}` is a flag of {}", name.to_ascii_lowercase(), others.join(" and "))),
        (true, true) => Some(format!("{keyword} has no flags; `--` alone ends the flags")),
        (true, false) => {
            let list: Vec<String> = own.iter().map(|known| format!("`--{known}`")).collect();
            Some(format!("{keyword} has {}", list.join(", ")))
        }
    }
}

fn usage(keyword: &str) -> Option<&'static str> {
    Some(match keyword {
        "ARG" => "ARG name[=default]",
        "ENV" => "ENV name=value",
        "LABEL" => "LABEL name=value",
        "EXPOSE" => "EXPOSE port[/protocol]",
        "VOLUME" => "VOLUME /path",
        "SHELL" => "SHELL [\"program\", \"argument\"]",
        "ONBUILD" => "ONBUILD instruction",
        "HEALTHCHECK" => "HEALTHCHECK CMD command",
        "WORKDIR" => "WORKDIR /path",
        "USER" => "USER name[:group]",
        "STOPSIGNAL" => "STOPSIGNAL signal",
        "MAINTAINER" => "MAINTAINER name",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guesses() {
        let check = |word, want: Option<&str>| {
            assert_eq!(did_you_mean(word, INSTRUCTIONS).as_deref(), want, "{word}");
        };
        check("RUM", Some("RUN"));
        check("RNU", Some("RUN"));
        check("rn", Some("RUN"));
        check("FORM", Some("FROM"));
        check("COPPY", Some("COPY"));
        check("ENTRYPIONT", Some("ENTRYPOINT"));
        check("foo", None);
        check("", None);
        check("x", None);
        check(&"RUN".repeat(50), None);
    }

    #[test]
    fn hints() {
        let check = |problem: Problem, want: &str| assert_eq!(problem.help().as_deref(), Some(want));
        check(Problem::UnknownInstruction("CMD[\"a\"]".to_owned()), "put a blank after `CMD`");
        check(Problem::UnknownInstruction("RUNN".to_owned()), "did you mean `RUN`?");
        check(
            Problem::UnknownInstruction("&&".to_owned()),
            "if it continues the line above, that line has to end with the escape character",
        );
        let flag = |keyword: &str, flag: &str| Problem::UnknownFlag { keyword: keyword.into(), flag: flag.into() };
        check(flag("COPY", "chwon"), "did you mean `--chown`?");
        check(flag("COPY", "checksum"), "`--checksum` is a flag of ADD");
        check(flag("FROM", "nope"), "FROM has `--platform`");
        check(flag("ENV", "nope"), "ENV has no flags; `--` alone ends the flags");
        check(Problem::NetworkMode("hosts".to_owned()), "did you mean `host`?");
        check(Problem::NetworkMode("bridge".to_owned()), "use `default`, `none` or `host`");
    }
}
