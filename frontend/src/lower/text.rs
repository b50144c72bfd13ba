//! Small texts: clean paths, and Go's way to print durations, quoted strings and dates, which history entries use.

use crate::llb::Platform;
use crate::lower::environment::Environment;
use crate::word::Variables;

/// Joins `path` to `base` unless it is absolute, and removes `.`, `..` and doubled slashes without looking at files.
pub(super) fn absolute(base: &str, path: &str) -> String {
    let base = if path.starts_with('/') { "" } else { base };
    let mut parts: Vec<&str> = Vec::new();
    for part in base.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// A duration as Go prints it: `1h0m5s`, `1.5s`, `20ms`.
pub(super) fn go_duration(nanoseconds: i64) -> String {
    let sign = if nanoseconds < 0 { "-" } else { "" };
    let total = nanoseconds.unsigned_abs();
    let with_fraction = |value: u64, unit: u64, name: &str| {
        let fraction = format!("{:0width$}", value % unit, width = unit.ilog10() as usize);
        let fraction = fraction.trim_end_matches('0');
        let dot = if fraction.is_empty() || unit == 1 { String::new() } else { format!(".{fraction}") };
        format!("{}{dot}{name}", value / unit)
    };
    let text = match total {
        0 => "0s".to_owned(),
        1..1_000 => format!("{total}ns"),
        1_000..1_000_000 => with_fraction(total, 1_000, "µs"),
        1_000_000..1_000_000_000 => with_fraction(total, 1_000_000, "ms"),
        _ => {
            let minutes = total / 60_000_000_000;
            let seconds = with_fraction(total % 60_000_000_000, 1_000_000_000, "s");
            match (minutes / 60, minutes % 60) {
                (0, 0) => seconds,
                (0, minutes) => format!("{minutes}m{seconds}"),
                (hours, minutes) => format!("{hours}h{minutes}m{seconds}"),
            }
        }
    };
    format!("{sign}{text}")
}

/// A list of quoted strings as Go prints it: `["a" "b"]`.
pub(super) fn go_quoted_list(list: &[String]) -> String {
    let quoted: Vec<String> = list.iter().map(|one| go_quoted(one)).collect();
    format!("[{}]", quoted.join(" "))
}

fn go_quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for char in text.chars() {
        match char {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\x07' => out.push_str("\\a"),
            '\x08' => out.push_str("\\b"),
            '\x0c' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\x0b' => out.push_str("\\v"),
            ' ' => out.push(' '),
            char if (char as u32) < 0x20 || char == '\x7f' => out.push_str(&format!("\\x{:02x}", char as u32)),
            char if !is_printable(char) && (char as u32) < 0x1_0000 => {
                out.push_str(&format!("\\u{:04x}", char as u32));
            }
            char if !is_printable(char) => out.push_str(&format!("\\U{:08x}", char as u32)),
            char => out.push(char),
        }
    }
    out.push('"');
    out
}

/// Letters, marks, numbers, punctuation and symbols; not control and format characters, blanks and private use.
fn is_printable(char: char) -> bool {
    !char.is_control()
        && !char.is_whitespace()
        && !matches!(u32::from(char),
            0xad | 0x600..=0x605 | 0x61c | 0x6dd | 0x70f | 0x180e | 0x200b..=0x200f | 0x202a..=0x202e
            | 0x2060..=0x206f | 0xe000..=0xf8ff | 0xfeff | 0xfff0..=0xfffb | 0xfffe..=0xffff
            | 0xe_0000..=0xe_0fff | 0xf_0000..=0x10_ffff)
}

/// Seconds since 1970 as `2023-11-14T22:13:20Z`.
pub(super) fn rfc3339(seconds: i64) -> String {
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Years counted from March make the leap day the last day of a year; an era has 400 of them.
    let shifted = days.saturating_add(719_468);
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

/// `->arm64` when the variables in force name another target than the platform of the stage.
pub(super) fn cross_target(stage: &Platform, env: &Environment) -> String {
    let part = |name: &str| env.get(name).unwrap_or_default().to_owned();
    let target = match env.get("TARGETPLATFORM") {
        Some(target) => {
            let mut parts = target.split('/').map(str::to_owned);
            let mut next = || parts.next().unwrap_or_default();
            Platform { os: next(), architecture: next(), variant: next() }
        }
        None => Platform { os: part("TARGETOS"), architecture: part("TARGETARCH"), variant: part("TARGETVARIANT") },
    };
    let os = if target.os.is_empty() { &stage.os } else { &target.os };
    let architecture = if target.architecture.is_empty() { &stage.architecture } else { &target.architecture };
    let variant = if target.variant.is_empty() { String::new() } else { format!("/{}", target.variant) };
    if *os != stage.os {
        format!("->{os}/{architecture}{variant}")
    } else if *architecture != stage.architecture {
        format!("->{architecture}{variant}")
    } else {
        String::new()
    }
}

/// Replaces the passwords in addresses, `https://user:password@host`, as Go's `URL.Redacted` does.
pub(super) fn without_passwords(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + "://".len());
        out.push_str(before);
        let end = after.find(|c: char| c == '/' || c.is_whitespace()).unwrap_or(after.len());
        let (authority, behind) = after.split_at(end);
        match authority.rsplit_once('@').and_then(|(user, host)| Some((user.split_once(':')?.0, host))) {
            Some((user, host)) => out.push_str(&format!("{user}:xxxxx@{host}")),
            None => out.push_str(authority),
        }
        rest = behind;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        fn check(base: &str, path: &str, expected: &str) {
            assert_eq!(absolute(base, path), expected, "{base} {path}");
        }
        check("/", "", "/");
        check("", "a", "/a");
        check("/a/b", "../c/./d//e/", "/a/c/d/e");
        check("/a", "/b/", "/b");
        check("/a", "../../..", "/");
        check("/a", ".", "/a");
    }

    #[test]
    fn durations() {
        fn check(nanoseconds: i64, expected: &str) {
            assert_eq!(go_duration(nanoseconds), expected);
        }
        check(0, "0s");
        check(1, "1ns");
        check(1_500, "1.5µs");
        check(100_000_000, "100ms");
        check(1_000_000_000, "1s");
        check(1_050_000_000, "1.05s");
        check(60_000_000_000, "1m0s");
        check(3_600_000_000_000, "1h0m0s");
        check(5_430_500_000_000, "1h30m30.5s");
        check(-2_000_000_000, "-2s");
    }

    #[test]
    fn quoted() {
        fn check(text: &str, expected: &str) {
            assert_eq!(go_quoted(text), expected);
        }
        check("a \"b\" \\d\n", r#""a \"b\" \\d\n""#);
        check("č日\u{a0}\u{200b}\x01", "\"č日\\u00a0\\u200b\\x01\"");
    }

    #[test]
    fn dates() {
        fn check(seconds: i64, expected: &str) {
            assert_eq!(rfc3339(seconds), expected);
        }
        check(0, "1970-01-01T00:00:00Z");
        check(1_700_000_000, "2023-11-14T22:13:20Z");
        check(1_500_000_000, "2017-07-14T02:40:00Z");
        check(951_782_400, "2000-02-29T00:00:00Z");
        check(-1, "1969-12-31T23:59:59Z");
    }

    #[test]
    fn passwords() {
        let check = |text: &str, want: &str| assert_eq!(without_passwords(text), want);
        check("ADD https://me:s3cret@host/x /x", "ADD https://me:xxxxx@host/x /x");
        check("RUN git clone http://a:b:c@d@e:80 && x://:p@h", "RUN git clone http://a:xxxxx@e:80 && x://:xxxxx@h");
        check("ADD https://me@host:80/x:y@z /", "ADD https://me@host:80/x:y@z /");
        check("RUN echo ://", "RUN echo ://");
    }
}
