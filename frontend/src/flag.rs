//! Flags of instructions: `--from=`, `--chown=`, `--mount=type=…`.
//!
//! Flags stand between the keyword and the first word that does not start with `--`; a lone `--` ends them. Quotes and
//! escapes in a flag are resolved here, so that a value may hold blanks. Variables are expanded later.

use crate::diagnostic::{Diagnostic, did_you_mean, one_of};
use crate::instruction::Text;
use crate::line::Slice;
use crate::llb::Sharing;
use crate::source::Span;
use crate::units;
use crate::word::WordError;

/// What a flag takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FlagKind {
    /// Nothing, `true` or `false`.
    Bool,
    /// A value, once.
    Value,
    /// A value, any number of times.
    Values,
}

/// Flags of an instruction, by its keyword in upper case.
pub(crate) fn flags_of(keyword: &str) -> &'static [(&'static str, FlagKind)] {
    use FlagKind::{Bool, Value, Values};
    match keyword {
        "FROM" => &[("platform", Value)],
        "RUN" => &[("mount", Values), ("network", Value), ("security", Value), ("device", Values)],
        "COPY" => &[
            ("from", Value),
            ("chown", Value),
            ("chmod", Value),
            ("link", Bool),
            ("parents", Bool),
            ("exclude", Values),
        ],
        "ADD" => &[
            ("chown", Value),
            ("chmod", Value),
            ("link", Bool),
            ("checksum", Value),
            ("keep-git-dir", Bool),
            ("unpack", Bool),
            ("exclude", Values),
        ],
        "HEALTHCHECK" => &[
            ("interval", Value),
            ("timeout", Value),
            ("start-period", Value),
            ("start-interval", Value),
            ("retries", Value),
        ],
        _ => &[],
    }
}

/// A flag as written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Flag {
    /// All of it, quotes resolved.
    pub(crate) text: Text,
    /// Between `--` and `=`.
    pub(crate) name: Text,
    /// Behind `=`.
    pub(crate) value: Option<Text>,
}

/// Takes the flags off the start of an instruction's arguments; returns them and what is left.
pub(crate) fn split_flags(arguments: Slice<'_>, escape: char) -> (Vec<Flag>, Slice<'_>) {
    let mut flags = Vec::new();
    let mut rest = arguments.trim_start();
    while rest.as_str().starts_with("--") {
        let text = rest.as_str();
        let mut value = String::new();
        let mut equals = None;
        let mut quote = None;
        let mut end = text.len();
        let mut chars = text.char_indices();
        while let Some((at, mut ch)) = chars.next() {
            if quote.is_none() && ch.is_whitespace() {
                end = at;
                break;
            }
            if quote == Some(ch) {
                quote = None;
                continue;
            }
            if quote.is_none() && matches!(ch, '\'' | '"') {
                quote = Some(ch);
                continue;
            }
            if ch == escape {
                // An escape at the end of the line stands for nothing.
                let Some((_, escaped)) = chars.next() else { break };
                ch = escaped;
            }
            if ch == '=' && equals.is_none() {
                equals = Some((value.len(), chars.offset()));
            }
            value.push(ch);
        }
        let flag = rest.part(0..end);
        rest = rest.part(end..text.len()).trim_start();
        if value == "--" {
            break;
        }
        let name = value[..equals.map_or(value.len(), |(at, _)| at)].trim_start_matches("--").to_owned();
        flags.push(Flag {
            name: flag.part(2.min(end)..equals.map_or(end, |(_, at)| at - 1)).text_of(name),
            value: equals.map(|(at, source)| flag.part(source..end).text_of(value[at + 1..].to_owned())),
            text: flag.text_of(value),
        });
    }
    (flags, rest)
}

/// Kinds of mounts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MountType {
    /// Files of a stage, an image or the context.
    #[default]
    Bind,
    /// A directory kept between builds.
    Cache,
    /// Memory.
    Tmpfs,
    /// A secret.
    Secret,
    /// An ssh agent.
    Ssh,
}

impl MountType {
    const ALL: [(&'static str, MountType); 5] = [
        ("bind", MountType::Bind),
        ("cache", MountType::Cache),
        ("tmpfs", MountType::Tmpfs),
        ("secret", MountType::Secret),
        ("ssh", MountType::Ssh),
    ];

    /// As written in `type=`.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, kind)| *kind == self).map_or("", |(name, _)| name)
    }
}

/// A `--mount`, expanded and read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MountSpec {
    /// `type=`; bind when not given.
    pub kind: MountType,
    /// `from=`.
    pub from: Option<String>,
    /// `source=`.
    pub source: Option<String>,
    /// `target=`.
    pub target: Option<String>,
    /// `readonly`, with the type's default.
    pub read_only: bool,
    /// `required`.
    pub required: bool,
    /// `id=`.
    pub id: Option<String>,
    /// `sharing=`.
    pub sharing: Option<Sharing>,
    /// `mode=`.
    pub mode: Option<u32>,
    /// `uid=`.
    pub uid: Option<u32>,
    /// `gid=`.
    pub gid: Option<u32>,
    /// `size=`; 0 is no limit.
    pub size_bytes: u64,
    /// `env=`; an empty one stands for a default name.
    pub env: Option<String>,
}

/// A `--mount` that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MountError {
    /// `--mount=`.
    #[error("a mount without any option")]
    Empty,
    /// A double quote inside of an unquoted option, or text behind the closing one.
    #[error("misplaced double quote in the mount options `{0}`")]
    Quote(String),
    /// `type=`.
    #[error("unsupported mount type `{0}`")]
    Type(String),
    /// No such option.
    #[error("unexpected key `{key}` in `{field}`")]
    UnknownKey {
        /// Left of `=`.
        key: String,
        /// All of it.
        field: String,
    },
    /// An option of other types.
    #[error("unexpected key `{key}` for mount type `{kind}`")]
    KeyOfOtherType {
        /// Option.
        key: String,
        /// Type in force where it stands.
        kind: &'static str,
    },
    /// An option without `=`.
    #[error("invalid field `{0}`: must be a key=value pair")]
    FieldWithoutValue(String),
    /// A value that does not fit.
    #[error("invalid value `{value}` for {key}")]
    Value {
        /// Option.
        key: String,
        /// As written.
        value: String,
    },
    /// `sharing=`.
    #[error("unsupported sharing value `{0}`")]
    Sharing(String),
    /// mode, uid or gid on bind and tmpfs.
    #[error("{key} not allowed for `{kind}` type mounts")]
    OwnerNotAllowed {
        /// Option.
        key: &'static str,
        /// Type.
        kind: &'static str,
    },
    /// sharing on something else than a cache.
    #[error("cache sharing set for a {0} mount")]
    SharingNotCache(&'static str),
    /// from on a secret.
    #[error("a secret mount should not have a from")]
    SecretFrom,
    /// sharing on a secret.
    #[error("a secret mount should not define sharing")]
    SecretSharing,
    /// A secret without any name.
    #[error("invalid secret mount: one of id, source and target is required")]
    SecretWithoutName,
    /// Two names of a secret.
    #[error("id and source of a secret mount can't both be set")]
    SecretSourceAndId,
    /// `from=$STAGE`.
    #[error("from of a mount doesn't support variable expansion: `{0}`")]
    FromVariable(String),
    /// A value cannot be expanded.
    #[error(transparent)]
    Word(#[from] WordError),
}

impl MountError {
    /// The option that is wrong, as it stands in the text (or only its value or its name).
    pub fn culprit(&self) -> Option<String> {
        Some(match self {
            MountError::UnknownKey { field, .. } | MountError::FieldWithoutValue(field) => field.clone(),
            MountError::Type(value) | MountError::Sharing(value) | MountError::FromVariable(value) => value.clone(),
            MountError::Value { value, .. } => value.clone(),
            MountError::KeyOfOtherType { key, .. } => key.clone(),
            MountError::OwnerNotAllowed { key, .. } => (*key).to_owned(),
            MountError::SharingNotCache(_) | MountError::SecretSharing => "sharing".to_owned(),
            MountError::SecretFrom => "from".to_owned(),
            MountError::SecretSourceAndId => "source".to_owned(),
            MountError::Empty | MountError::Quote(_) | MountError::SecretWithoutName | MountError::Word(_) => {
                return None;
            }
        })
    }

    /// A way out, one sentence.
    pub fn help(&self) -> Option<String> {
        let help = match self {
            MountError::Empty => "write `--mount=type=cache,target=/path`".to_owned(),
            MountError::Quote(_) => {
                "put double quotes around a whole option and escape them: `\\\"source=a,b\\\"`".to_owned()
            }
            MountError::Type(kind) => one_of(kind, &MountType::ALL.map(|(name, _)| name)),
            MountError::UnknownKey { key, .. } => {
                let all = "options are type, target, source, from, id, sharing, required, size, mode, uid, gid, env, \
                           readonly and readwrite";
                did_you_mean(key, KEYS).map_or(all.to_owned(), |guess| format!("did you mean `{guess}`?"))
            }
            MountError::KeyOfOtherType { key, .. } => match key.as_str() {
                "size" => "size is for type=tmpfs; write type= before it".to_owned(),
                _ => format!("{key} is for type=secret and type=ssh; write type= before it"),
            },
            MountError::FieldWithoutValue(field) if field.is_empty() => "remove a comma".to_owned(),
            MountError::FieldWithoutValue(field) => format!("write `{field}=value`"),
            MountError::Value { key, .. } => match key.as_str() {
                "mode" => "write an octal number like `mode=0755`".to_owned(),
                "uid" | "gid" => "only numbers are possible".to_owned(),
                "size" => "write a number with a unit like `size=64m`".to_owned(),
                _ => format!("write `{key}=true` or `{key}=false`"),
            },
            MountError::Sharing(value) => one_of(value, &["shared", "private", "locked"]),
            MountError::OwnerNotAllowed { key, .. } => format!("{key} is for type=cache, type=secret and type=ssh"),
            MountError::SharingNotCache(_) | MountError::SecretSharing => "sharing is for type=cache".to_owned(),
            MountError::SecretFrom => "secrets come from the caller: remove from".to_owned(),
            MountError::SecretWithoutName => "write `id=name`".to_owned(),
            MountError::SecretSourceAndId => "remove source".to_owned(),
            MountError::FromVariable(_) => {
                "give the image a stage of its own, `FROM image AS name`, and write `from=name`".to_owned()
            }
            MountError::Word(error) => return error.help(),
        };
        Some(help)
    }
}

const KEYS: [&str; 19] = [
    "type",
    "from",
    "source",
    "target",
    "readonly",
    "id",
    "sharing",
    "required",
    "size",
    "mode",
    "uid",
    "gid",
    "src",
    "dst",
    "destination",
    "ro",
    "rw",
    "readwrite",
    "env",
];

/// Reads a `--mount` whose variables are already expanded.
pub fn parse_mount(text: &str) -> Result<MountSpec, MountError> {
    check_mount(text)?;
    parse_mount_with(text, |value| Ok(value.to_owned()))
}

/// Reads a `--mount` and expands each value on its own, as BuildKit does: a comma that comes from a variable does not
/// start another option.
pub fn parse_mount_with(
    text: &str,
    mut expand: impl FnMut(&str) -> Result<String, WordError>,
) -> Result<MountSpec, MountError> {
    let mut spec = MountSpec::default();
    let mut read_only = None;
    for field in csv_fields(text)? {
        let (key, value) = match field.split_once('=') {
            Some((key, value)) => (key.to_lowercase(), Some(expand(value)?)),
            None => (field.to_lowercase(), None),
        };
        let for_secrets = matches!(spec.kind, MountType::Secret | MountType::Ssh);
        let other_type = || MountError::KeyOfOtherType { key: key.clone(), kind: spec.kind.name() };
        let Some(value) = value else {
            match key.as_str() {
                "readonly" | "ro" => read_only = Some(true),
                "readwrite" | "rw" => read_only = Some(false),
                "required" if for_secrets => spec.required = true,
                "required" => return Err(other_type()),
                _ => return Err(MountError::FieldWithoutValue(field)),
            }
            continue;
        };
        let invalid = || MountError::Value { key: key.clone(), value: value.clone() };
        match key.as_str() {
            "type" => {
                spec.kind = MountType::ALL
                    .into_iter()
                    .find(|(name, _)| value.to_lowercase() == *name)
                    .map(|(_, kind)| kind)
                    .ok_or_else(|| MountError::Type(value.clone()))?;
            }
            "from" => spec.from = not_empty(value),
            "source" | "src" => spec.source = not_empty(value),
            "target" | "dst" | "destination" => spec.target = not_empty(value),
            "readonly" | "ro" => read_only = Some(parse_bool(&value).ok_or_else(invalid)?),
            "readwrite" | "rw" => read_only = Some(!parse_bool(&value).ok_or_else(invalid)?),
            "required" if for_secrets => spec.required = parse_bool(&value).ok_or_else(invalid)?,
            "size" if spec.kind == MountType::Tmpfs => {
                let size = units::parse_size(&value).map_err(|_| invalid())?;
                spec.size_bytes = u64::try_from(size).map_err(|_| invalid())?;
            }
            "required" | "size" => return Err(other_type()),
            "id" => spec.id = not_empty(value),
            "sharing" => {
                spec.sharing = Some(match value.to_lowercase().as_str() {
                    "shared" => Sharing::Shared,
                    "private" => Sharing::Private,
                    "locked" => Sharing::Locked,
                    _ => return Err(MountError::Sharing(value)),
                });
            }
            "mode" => spec.mode = Some(parse_number(&value, 8).ok_or_else(invalid)?),
            "uid" => spec.uid = Some(parse_number(&value, 10).ok_or_else(invalid)?),
            "gid" => spec.gid = Some(parse_number(&value, 10).ok_or_else(invalid)?),
            "env" => spec.env = Some(value),
            _ => return Err(MountError::UnknownKey { key, field }),
        }
    }
    spec.read_only = read_only.unwrap_or(!matches!(spec.kind, MountType::Cache | MountType::Tmpfs));
    validate(&spec)?;
    Ok(spec)
}

/// Finds what is wrong with a `--mount` before its variables are known.
pub fn check_mount(text: &str) -> Result<(), MountError> {
    for field in csv_fields(text)? {
        if let Some((key, value)) = field.split_once('=')
            && key.eq_ignore_ascii_case("from")
            && value.find('$').is_some_and(|at| at + 1 < value.len())
        {
            return Err(MountError::FromVariable(value.to_owned()));
        }
    }
    Ok(())
}

/// A mistake in a mount, at the option that is wrong.
pub(crate) fn in_mount(mount: &Text, error: MountError) -> Diagnostic {
    let span = error.culprit().map_or(mount.span, |culprit| option_span(mount, &culprit));
    Diagnostic::at(span, error.into())
}

/// Where an option of a `--mount` stands; all of the mount when that is not clear.
pub(crate) fn option_span(mount: &Text, option: &str) -> Span {
    // Places in a text that a continuation interrupts are not those in the file.
    if option.is_empty() || mount.span.end - mount.span.start != mount.value.len() {
        return mount.span;
    }
    let is_edge = |byte: Option<&u8>| byte.is_none_or(|byte| b",=\"".contains(byte));
    let bytes = mount.value.as_bytes();
    let mut places = mount.value.match_indices(option).map(|(start, _)| (start, start + option.len()));
    let found = places.find(|(start, end)| {
        is_edge(start.checked_sub(1).and_then(|before| bytes.get(before))) && is_edge(bytes.get(*end))
    });
    found.map_or(mount.span, |(start, end)| Span::new(mount.span.start + start, mount.span.start + end))
}

fn validate(spec: &MountSpec) -> Result<(), MountError> {
    let kind = spec.kind.name();
    if matches!(spec.kind, MountType::Bind | MountType::Tmpfs) {
        for (key, set) in [("mode", spec.mode), ("uid", spec.uid), ("gid", spec.gid)] {
            if set.is_some() {
                return Err(MountError::OwnerNotAllowed { key, kind });
            }
        }
    }
    if spec.kind == MountType::Secret {
        if spec.from.is_some() {
            return Err(MountError::SecretFrom);
        }
        if spec.sharing.is_some() {
            return Err(MountError::SecretSharing);
        }
        match (&spec.source, &spec.id, &spec.target) {
            (None, None, None) => return Err(MountError::SecretWithoutName),
            (Some(_), Some(_), _) => return Err(MountError::SecretSourceAndId),
            _ => {}
        }
    }
    if spec.sharing.is_some() && spec.kind != MountType::Cache {
        return Err(MountError::SharingNotCache(kind));
    }
    Ok(())
}

/// Fields of one CSV record: separated by commas; double quotes around a whole field, doubled inside of it.
pub(crate) fn csv_fields(text: &str) -> Result<Vec<String>, MountError> {
    let misplaced = || MountError::Quote(text.to_owned());
    let mut rest = text.strip_suffix('\n').map_or(text, |text| text.strip_suffix('\r').unwrap_or(text));
    if rest.is_empty() {
        return Err(MountError::Empty);
    }
    let mut fields = Vec::new();
    loop {
        let mut field = String::new();
        if let Some(mut quoted) = rest.strip_prefix('"') {
            loop {
                let (part, after) = quoted.split_once('"').ok_or_else(misplaced)?;
                field.push_str(part);
                match after.strip_prefix('"') {
                    Some(more) => {
                        field.push('"');
                        quoted = more;
                    }
                    None => {
                        rest = after;
                        break;
                    }
                }
            }
        } else {
            let end = rest.find(',').unwrap_or(rest.len());
            field.push_str(&rest[..end]);
            rest = &rest[end..];
            if field.contains('"') {
                return Err(misplaced());
            }
        }
        fields.push(field);
        match rest.strip_prefix(',') {
            Some(after) => rest = after,
            None if rest.is_empty() => return Ok(fields),
            None => return Err(misplaced()),
        }
    }
}

fn not_empty(value: String) -> Option<String> {
    Some(value).filter(|value| !value.is_empty())
}

/// The spellings of true and false that Go's strconv knows.
fn parse_bool(value: &str) -> Option<bool> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Digits only: no sign, no prefix.
fn parse_number(value: &str, radix: u32) -> Option<u32> {
    if value.starts_with('+') { None } else { u32::from_str_radix(value, radix).ok() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Map, Value, json};

    fn as_json(spec: &MountSpec) -> Value {
        let mut map = Map::new();
        map.insert("type".to_owned(), json!(spec.kind.name()));
        let texts = [
            ("from", &spec.from),
            ("source", &spec.source),
            ("target", &spec.target),
            ("id", &spec.id),
            ("env", &spec.env),
        ];
        for (key, value) in texts {
            if let Some(value) = value {
                map.insert(key.to_owned(), json!(value));
            }
        }
        for (key, value) in [("mode", spec.mode), ("uid", spec.uid), ("gid", spec.gid)] {
            if let Some(value) = value {
                map.insert(key.to_owned(), json!(value));
            }
        }
        for (key, value) in [("readonly", spec.read_only), ("required", spec.required)] {
            if value {
                map.insert(key.to_owned(), json!(true));
            }
        }
        if spec.size_bytes > 0 {
            map.insert("size".to_owned(), json!(spec.size_bytes));
        }
        if let Some(sharing) = spec.sharing {
            map.insert("sharing".to_owned(), json!(format!("{sharing:?}").to_lowercase()));
        }
        Value::Object(map)
    }

    #[test]
    fn vectors() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/vectors/mounts.json");
        let file: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        for vector in file["vectors"].as_array().unwrap() {
            let text = vector["mount"].as_str().unwrap();
            match (parse_mount(text), vector.get("value")) {
                (Ok(spec), Some(want)) => assert_eq!(as_json(&spec), *want, "{text}"),
                (Err(_), None) => {}
                (found, want) => panic!("{text}: {found:?}, not {want:?}"),
            }
        }
    }

    #[test]
    fn errors_name_what_is_wrong() {
        let check = |text: &str, want: &str| assert_eq!(parse_mount(text).unwrap_err().to_string(), want, "{text}");
        check("target=/x,colour=red", "unexpected key `colour` in `colour=red`");
        check("type=cache,target=/c,mode=rwx", "invalid value `rwx` for mode");
        check("type=cache,target=/c,sharing=some", "unsupported sharing value `some`");
        check("type=tmpfs,target=/c,size=big", "invalid value `big` for size");
        check("type=floppy,target=/x", "unsupported mount type `floppy`");
        check("type=bind,target=/c,sharing=shared", "cache sharing set for a bind mount");
        check("type=cache,target=/c,size=1m", "unexpected key `size` for mount type `cache`");
        check("type=cache,uid=+1", "invalid value `+1` for uid");
        check("", "a mount without any option");
        check("a\"b", "misplaced double quote in the mount options `a\"b`");
        check("\"a\"b", "misplaced double quote in the mount options `\"a\"b`");
        check("\"a", "misplaced double quote in the mount options `\"a`");
    }

    #[test]
    fn quoted_options_and_expansion() {
        let spec = parse_mount("type=bind,\"source=a,\"\"b\"\"\",target=/x").unwrap();
        assert_eq!(spec.source.as_deref(), Some("a,\"b\""));
        let spec = parse_mount_with("target=$T,source=s", |value| Ok(value.replace("$T", "/a,b=c"))).unwrap();
        assert_eq!(spec.target.as_deref(), Some("/a,b=c"));
    }
}
