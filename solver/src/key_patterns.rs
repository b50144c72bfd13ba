//! Keys and tokens that can be told by their form, in files that are about to become part of an image.
//!
//! | form | told by |
//! |---|---|
//! | private keys (PEM, OpenSSH, PGP), also inside of JSON | their first line, and base64 or headers behind it |
//! | AWS | `AKIA` or `ASIA` and 16 characters of base32 |
//! | GitHub | `ghp_`, `gho_`, `ghu_`, `ghs_`, `ghr_` and 36 characters; `github_pat_` and 82 |
//! | GitLab | `glpat-` and 20 characters |
//! | Slack | `xoxa-`, `xoxb-`, `xoxe-`, `xoxp-`, `xoxr-`, `xoxs-` and two parts |
//! | npm | `_authToken=` and a value, `npm_` and 36 characters |
//! | Docker Hub | `dckr_pat_` and 27 characters |
//! | age | `AGE-SECRET-KEY-1` and 58 characters |
//!
//! Examples and placeholders are none: a value has many different characters and does not say that it is one. Only the
//! first [`LOOKED_AT`] bytes of a file are looked at, when it is read anyway.

use regex::bytes::Regex;
use std::sync::LazyLock;

/// Bytes of a file that are looked at: keys stand in small files.
pub(crate) const LOOKED_AT: usize = 1 << 16;

/// Kind of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum KeyKind {
    /// A private key in text form.
    Private = 1,
    /// An access key of AWS.
    Aws,
    /// A token of GitHub.
    GitHub,
    /// A token of GitLab.
    GitLab,
    /// A token of Slack.
    Slack,
    /// A token for npm's registry.
    Npm,
    /// A token of Docker Hub.
    DockerHub,
    /// A secret key of age.
    Age,
}

const ALL: [KeyKind; 8] = [
    KeyKind::Private,
    KeyKind::Aws,
    KeyKind::GitHub,
    KeyKind::GitLab,
    KeyKind::Slack,
    KeyKind::Npm,
    KeyKind::DockerHub,
    KeyKind::Age,
];

impl KeyKind {
    /// What it is, as part of a sentence.
    pub fn name(self) -> &'static str {
        match self {
            KeyKind::Private => "a private key",
            KeyKind::Aws => "an access key of AWS",
            KeyKind::GitHub => "a token of GitHub",
            KeyKind::GitLab => "a token of GitLab",
            KeyKind::Slack => "a token of Slack",
            KeyKind::Npm => "a token for npm",
            KeyKind::DockerHub => "a token of Docker Hub",
            KeyKind::Age => "a secret key of age",
        }
    }

    /// The kind that a number stands for in a file.
    pub(crate) fn of_number(number: u8) -> Option<KeyKind> {
        ALL.into_iter().find(|kind| *kind as u8 == number)
    }
}

/// Alternatives of [`PATTERN`]. Each starts with text of its own: a search for those is all that most files cost.
const FORMS: &[&str] = &[
    // Behind the first line: the key, or headers, a line that ends in the escape of a string.
    r"-----BEGIN (?:[A-Z0-9]{2,10} )?(?:ENCRYPTED )?PRIVATE KEY(?: BLOCK)?-----(?:\\r|\\n|[\r\n ])+(?:[A-Za-z-]+: [^\n]{1,100}\n+){0,5}\r?\n?[A-Za-z0-9+/]{32}",
    r"(?:AKIA|ASIA)[A-Z2-7]{16}\b",
    r"gh[pousr]_[A-Za-z0-9]{36}\b",
    r"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}\b",
    r"glpat-[A-Za-z0-9_-]{20}",
    r"xox[abeprs]-[0-9A-Za-z]{6,}-[0-9A-Za-z-]{10,}",
    r#"_authToken\s{0,3}=\s{0,3}"?[A-Za-z0-9_+/=-]{20,}"#,
    r"npm_[A-Za-z0-9]{36}\b",
    r"dckr_pat_[A-Za-z0-9_-]{27}",
    r"AGE-SECRET-KEY-1[AC-HJ-NP-Z02-9]{58}",
];

static PATTERN: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(&format!("(?-u:{})", FORMS.join("|"))).ok());

/// Different characters that a random value of twenty has at least, but for one in millions.
const DIFFERENT: usize = 8;

/// The first key in the start of a file.
pub(crate) fn find(start: &[u8]) -> Option<KeyKind> {
    let bytes = &start[..start.len().min(LOOKED_AT)];
    let pattern = PATTERN.as_ref()?;
    pattern.find_iter(bytes).find_map(|found| {
        let text = found.as_bytes();
        // A longer word that happens to end like this.
        let inside = found.start().checked_sub(1).is_some_and(|before| is_word(bytes[before]));
        let kind = match text {
            [b'-', ..] => KeyKind::Private,
            [b'A', b'K' | b'S', ..] => KeyKind::Aws,
            [b'g', b'h' | b'i', ..] => KeyKind::GitHub,
            [b'g', ..] => KeyKind::GitLab,
            [b'x', ..] => KeyKind::Slack,
            [b'_' | b'n', ..] => KeyKind::Npm,
            [b'd', ..] => KeyKind::DockerHub,
            _ => KeyKind::Age,
        };
        let free = kind == KeyKind::Private || text[0] == b'_' || !inside;
        (free && is_random(&text[text.len().saturating_sub(20)..]) && !says_example(text)).then_some(kind)
    })
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

fn is_random(value: &[u8]) -> bool {
    let mut seen = [false; 256];
    value.iter().for_each(|byte| seen[usize::from(*byte)] = true);
    seen.iter().filter(|seen| **seen).count() >= DIFFERENT
}

fn says_example(value: &[u8]) -> bool {
    let lower = value.to_ascii_lowercase();
    [&b"example"[..], b"xxxx", b"123456789", b"abcdef"]
        .iter()
        .any(|word| lower.windows(word.len()).any(|at| at == *word))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The parts are joined here so that nobody takes this file for one that holds keys.
    fn joined(parts: &[&str]) -> Vec<u8> {
        parts.concat().into_bytes()
    }

    #[test]
    fn keys_are_told_by_their_form() {
        let body = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj";
        let token = "R7kQ2vXz9LmN4bTyW8sHc3JdF6gPa5Ue0iOw";
        let check = |parts: &[&str], expected: Option<KeyKind>| {
            let text = joined(parts);
            assert_eq!(find(&text), expected, "{}", String::from_utf8_lossy(&text));
        };
        use KeyKind as K;
        for kind in ["", "RSA ", "EC ", "DSA ", "OPENSSH ", "ENCRYPTED ", "RSA ENCRYPTED "] {
            check(&["x\n-----BEGIN ", kind, "PRIVATE KEY-----\n", body, "\n"], Some(K::Private));
        }
        let begin = ["-----BEGIN ", "PRIVATE KEY-----"].concat();
        check(&[&begin, "\r\n", body], Some(K::Private));
        check(&["{\"private_key\": \"", &begin, "\\n", body, "\\n\"}"], Some(K::Private));
        let headers = "Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,AB12\n\n";
        check(&["-----BEGIN RSA ", "PRIVATE KEY-----\n", headers, body], Some(K::Private));
        check(&["-----BEGIN PGP ", "PRIVATE KEY BLOCK-----\n\n", body], Some(K::Private));
        check(&["id = AKIA", "QYLPMN5HHHFPZ3KV"], Some(K::Aws));
        check(&["\"ASIA", "QYLPMN5HHHFPZ3KV\""], Some(K::Aws));
        check(&["ghp_", token], Some(K::GitHub));
        check(&["https://x:ghs_", token, "@github.com"], Some(K::GitHub));
        check(&["github_pat_", &token[..22], "_", token, &token[..23]], Some(K::GitHub));
        check(&["glpat-", &token[..20]], Some(K::GitLab));
        check(&["xoxb-", "730191234567-", &token[..24]], Some(K::Slack));
        check(&["//registry.npmjs.org/:_authToken=", token], Some(K::Npm));
        check(&["npm_", token], Some(K::Npm));
        check(&["dckr_pat_", &token[..27]], Some(K::DockerHub));
        let age = "QYLPMN5HHHFPZ3KVQYLPMN5HHHFPZ3KVQYLPMN5HHHFPZ3KVQYLPMN5HH0";
        check(&["AGE-SECRET-KEY-1", &age[..58]], Some(K::Age));
        // The second one counts where the first is an example.
        check(&["AKIA", "IOSFODNN7EXAMPLE AKIA", "QYLPMN5HHHFPZ3KV"], Some(K::Aws));
        for parts in [
            // Public parts, format strings, documents about keys.
            &["-----BEGIN PUBLIC KEY-----\n", body][..],
            &["-----BEGIN CERTIFICATE-----\n", body],
            &[&begin, "\0-----END PRIVATE KEY-----\0"],
            &["the file starts with ", &begin, "\n...\n"],
            &["if line == \"", &begin, "\":"],
            &["AKIA", "IOSFODNN7EXAMPLE"],
            &["AKIA", "QYLPMN5HHHFPZ3KVA"],
            &["XAKIA", "QYLPMN5HHHFPZ3KV"],
            &["ghp_", "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"],
            &["ghp_", "short"],
            &["//registry.npmjs.org/:_authToken=${NPM_TOKEN}"],
            &["npm_", "config_user_agent_and_other_long_variables"],
            &["glpat-", "<your token here>"],
            &["xoxb-", "your-token"],
        ] {
            check(parts, None);
        }
    }

    #[test]
    fn only_the_start_is_looked_at() {
        let key = joined(&["AKIA", "QYLPMN5HHHFPZ3KV "]);
        let at = |position: usize| [vec![b' '; position], key.clone()].concat();
        assert_eq!(find(&at(LOOKED_AT - key.len())), Some(KeyKind::Aws));
        assert_eq!(find(&at(LOOKED_AT)), None);
        assert_eq!(find(b""), None);
    }

    #[test]
    fn numbers_are_kept_for_files() {
        for kind in ALL {
            assert_eq!(KeyKind::of_number(kind as u8), Some(kind));
        }
        assert_eq!((KeyKind::of_number(0), KeyKind::of_number(9)), (None, None));
        assert_eq!(KeyKind::Private as u8, 1);
    }
}
