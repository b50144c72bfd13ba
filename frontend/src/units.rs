//! Durations, sizes and signals, spelled as Go and Docker spell them.

/// A value that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// No duration, or one of more than 292 years.
    #[error("invalid duration `{0}`")]
    Duration(String),
    /// A number without unit.
    #[error("missing unit in duration `{0}`")]
    MissingUnit(String),
    /// A unit that does not exist.
    #[error("unknown unit `{unit}` in duration `{text}`")]
    UnknownUnit {
        /// Unit.
        unit: String,
        /// All of it.
        text: String,
    },
    /// No size.
    #[error("invalid size `{0}`")]
    Size(String),
    /// No signal.
    #[error("invalid signal `{0}`")]
    Signal(String),
}

impl UnitError {
    /// A way out, one sentence.
    pub fn help(&self) -> Option<String> {
        let help = match self {
            UnitError::Duration(_) | UnitError::MissingUnit(_) | UnitError::UnknownUnit { .. } => {
                "write numbers with the units h, m, s, ms, us and ns, like `1m30s`"
            }
            UnitError::Size(_) => "write a number with b, k, m, g, t or p behind it, like `64m`",
            UnitError::Signal(_) => "write a name like `SIGTERM` or a number",
        };
        Some(help.to_owned())
    }
}

/// Reads a duration like `1m30s`; nanoseconds.
pub fn parse_duration(text: &str) -> Result<i64, UnitError> {
    let invalid = || UnitError::Duration(text.to_owned());
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Ok(0);
    }
    if rest.is_empty() {
        return Err(invalid());
    }
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let whole = take_while(&mut rest, |ch| ch.is_ascii_digit());
        let fraction = match rest.strip_prefix('.') {
            Some(after) => {
                rest = after;
                Some(take_while(&mut rest, |ch| ch.is_ascii_digit()))
            }
            None => None,
        };
        if whole.is_empty() && fraction.is_none_or(str::is_empty) {
            return Err(invalid());
        }
        let unit = take_while(&mut rest, |ch| ch != '.' && !ch.is_ascii_digit());
        let nanoseconds: u64 = match unit {
            "" => return Err(UnitError::MissingUnit(text.to_owned())),
            "ns" => 1,
            "us" | "\u{b5}s" | "\u{3bc}s" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return Err(UnitError::UnknownUnit { unit: unit.to_owned(), text: text.to_owned() }),
        };
        let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| invalid())? };
        let part = whole
            .checked_mul(nanoseconds)
            .and_then(|part| part.checked_add(fraction_of(fraction.unwrap_or(""), nanoseconds)));
        total = part.and_then(|part| total.checked_add(part)).filter(|&sum| sum <= 1 << 63).ok_or_else(invalid)?;
    }
    match (negative, i64::try_from(total)) {
        (false, Ok(total)) => Ok(total),
        (true, Ok(total)) => Ok(-total),
        (true, Err(_)) => Ok(i64::MIN),
        (false, Err(_)) => Err(invalid()),
    }
}

/// `0.digits` of a unit; digits beyond nanoseconds do not count.
fn fraction_of(digits: &str, unit: u64) -> u64 {
    // 18 digits of a fraction fit into 64 bits and are more than any unit resolves.
    let digits = digits.get(..18).unwrap_or(digits);
    let scale = 10u128.pow(u32::try_from(digits.len()).unwrap_or(0));
    let value = digits.parse::<u128>().unwrap_or(0);
    u64::try_from(value * u128::from(unit) / scale).unwrap_or(0)
}

fn take_while<'a>(rest: &mut &'a str, keep: impl Fn(char) -> bool) -> &'a str {
    let end = rest.find(|ch| !keep(ch)).unwrap_or(rest.len());
    let (taken, left) = rest.split_at(end);
    *rest = left;
    taken
}

/// Reads a size like `64m` or `1.5GiB`; bytes. All units are powers of 1024.
pub fn parse_size(text: &str) -> Result<i64, UnitError> {
    let invalid = || UnitError::Size(text.to_owned());
    let last = text.rfind(|ch: char| ch.is_ascii_digit() || matches!(ch, '.' | ' ')).ok_or_else(invalid)?;
    let (number, suffix) = text.split_at(last + 1);
    let number = number.strip_suffix(' ').unwrap_or(number);
    let size = parse_float(number).filter(|size| *size >= 0.0).ok_or_else(invalid)?;
    let suffix = suffix.to_ascii_lowercase();
    let mut letters = suffix.chars();
    let exponent = match letters.next() {
        None => 0,
        Some('b') if suffix.len() == 1 => 0,
        Some(unit) => {
            let exponent = "kmgtp".find(unit).ok_or_else(invalid)? + 1;
            if !matches!(letters.as_str(), "" | "b" | "ib") {
                return Err(invalid());
            }
            exponent
        }
    };
    let bytes = size * 1024f64.powi(i32::try_from(exponent).unwrap_or(0));
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "the range is checked")]
    if bytes < i64::MAX as f64 { Ok(bytes as i64) } else { Err(invalid()) }
}

/// A decimal number; single underscores may separate digits.
fn parse_float(text: &str) -> Option<f64> {
    let bytes = text.as_bytes();
    let digit_at = |at: Option<usize>| at.and_then(|at| bytes.get(at)).is_some_and(u8::is_ascii_digit);
    for (at, _) in text.match_indices('_') {
        if !digit_at(at.checked_sub(1)) || !digit_at(Some(at + 1)) {
            return None;
        }
    }
    let plain = text.replace('_', "");
    // Rust also reads words like "infinity".
    let number = plain.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b'.' | b'e' | b'E' | b'+' | b'-'));
    plain.parse::<f64>().ok().filter(|value| number && value.is_finite())
}

/// Linux signals by name without `SIG`; the real-time ones are computed.
const SIGNALS: [(&str, i32); 36] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
    ("RTMIN", SIGNAL_RTMIN),
    ("RTMAX", SIGNAL_RTMAX),
];
const SIGNAL_RTMIN: i32 = 34;
const SIGNAL_RTMAX: i32 = 64;

/// Reads a signal: a name with or without `SIG`, in any case, or a number (any: the runtime decides).
pub fn parse_signal(text: &str) -> Result<i32, UnitError> {
    let invalid = || UnitError::Signal(text.to_owned());
    match text.parse() {
        Ok(0) => return Err(invalid()),
        Ok(number) => return Ok(number),
        Err(_) => {}
    }
    let upper = text.to_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = SIGNALS.iter().find(|(known, _)| *known == name) {
        return Ok(*number);
    }
    let (base, offset, range) = match (name.strip_prefix("RTMIN+"), name.strip_prefix("RTMAX-")) {
        (Some(offset), _) => (SIGNAL_RTMIN, offset, 1..=15),
        (_, Some(offset)) => (SIGNAL_RTMAX, offset, 1..=14),
        _ => return Err(invalid()),
    };
    let number: i32 = offset.parse().ok().filter(|number| range.contains(number)).ok_or_else(invalid)?;
    if number.to_string() != offset {
        return Err(invalid());
    }
    Ok(if base == SIGNAL_RTMIN { base + number } else { base - number })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn vectors<T: TryFrom<i64> + PartialEq + std::fmt::Debug>(
        file: &str,
        parse: impl Fn(&str) -> Result<T, UnitError>,
    ) {
        let file = format!("{}/../testdata/vectors/{file}.json", env!("CARGO_MANIFEST_DIR"));
        let file: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        for vector in file["vectors"].as_array().unwrap() {
            let text = vector["in"].as_str().unwrap();
            let want = vector["out"].as_i64().and_then(|want| T::try_from(want).ok());
            assert_eq!(parse(text).ok(), want, "{text}");
        }
    }

    #[test]
    fn all_vectors() {
        vectors("durations", parse_duration);
        vectors("sizes", parse_size);
        vectors("signals", parse_signal);
    }

    #[test]
    fn limits() {
        assert_eq!(parse_duration("-9223372036854775808ns"), Ok(i64::MIN));
        assert!(parse_duration("9223372036854775808ns").is_err());
        assert_eq!(parse_duration("0.000000000123456789123456789h"), Ok(444));
        for text in ["-", "+", ".", ".s", "s", "1", "1.5.5s", "3000000h", "é"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
        for text in ["", " ", "k", "-1", "1kib2", "1bb", "1kx", "1__0", "_1", "inf", "9e99", "1é"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        for text in ["", "SIG", "RTMIN+0", "RTMIN+03", "RTMIN+16", "RTMAX-15", "RTMAX+1"] {
            assert!(parse_signal(text).is_err(), "{text}");
        }
    }

    #[test]
    fn messages() {
        let check = |error: UnitError, want: &str| assert_eq!(error.to_string(), want);
        check(parse_duration("soon").unwrap_err(), "invalid duration `soon`");
        check(parse_duration("1d").unwrap_err(), "unknown unit `d` in duration `1d`");
        check(parse_duration("5").unwrap_err(), "missing unit in duration `5`");
        check(parse_signal("SIGFOO").unwrap_err(), "invalid signal `SIGFOO`");
    }
}
