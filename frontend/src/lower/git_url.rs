//! Which addresses are git repositories, and what their fragments and queries say.
//!
//! `ssh://`, `git://` and `user@host:path` always are; `http(s)://` only when the path ends in `.git`. The fragment is
//! `#reference:subdirectory`; the query may say the same by name (`ref`, `tag`, `branch`, `subdir`, `checksum`,
//! `keep-git-dir`, `submodules`).

/// A parsed repository address.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GitUrl {
    /// Address without fragment and query.
    pub remote: String,
    /// Branch, tag or commit; empty is the default branch.
    pub reference: String,
    /// Directory below the top; empty is the top.
    pub subdir: String,
    /// Digits that the commit must start with.
    pub checksum: Option<String>,
    /// Keep `.git`.
    pub keep_git_dir: Option<bool>,
    /// Fetch submodules; not set is yes.
    pub submodules: Option<bool>,
}

/// What is wrong with a repository address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GitUrlError {
    /// A query member without value.
    #[error("`{0}` has no value")]
    NoValue(String),
    /// A query member twice.
    #[error("`{0}` is given twice")]
    Twice(String),
    /// A query member that is not known.
    #[error("unknown key `{0}`")]
    UnknownKey(String),
    /// Neither true nor false.
    #[error("`{value}` is no value for `{key}`")]
    NotBoolean {
        /// Key.
        key: String,
        /// Value.
        value: String,
    },
    /// Two different values for one thing.
    #[error("`{first}` contradicts `{second}`")]
    Conflict {
        /// One.
        first: String,
        /// Other.
        second: String,
    },
}

impl GitUrl {
    /// Reads an address; `None` when it is not one of a git repository.
    ///
    /// # Errors
    /// The address is one of a repository, but its query makes no sense.
    pub fn parse(text: &str) -> Option<Result<Self, GitUrlError>> {
        if text.starts_with("./") || text.starts_with("../") {
            return None;
        }
        let (rest, fragment) = text.split_once('#').map_or((text, ""), |(rest, fragment)| (rest, fragment));
        let (remote, query) = rest.split_once('?').map_or((rest, ""), |(remote, query)| (remote, query));
        match scheme(text) {
            Some("ssh" | "git") => {}
            Some("http" | "https") => {
                if !remote.ends_with(".git") {
                    return None;
                }
            }
            Some(_) => return None,
            None if is_scp_style(remote) => {}
            None => return None,
        }
        let (reference, subdir) = fragment.split_once(':').unwrap_or((fragment, ""));
        let mut url = Self {
            remote: remote.to_owned(),
            reference: reference.to_owned(),
            subdir: subdir.to_owned(),
            ..Self::default()
        };
        Some(url.read_query(query).map(|()| url))
    }

    fn read_query(&mut self, query: &str) -> Result<(), GitUrlError> {
        let mut seen: Vec<String> = Vec::new();
        let (mut tag, mut branch) = (None, None);
        for part in query.split('&').filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let (key, value) = (percent_decode(&key.replace('+', " ")), percent_decode(&value.replace('+', " ")));
            if seen.contains(&key) {
                return Err(GitUrlError::Twice(key));
            }
            seen.push(key.clone());
            let boolean = |value: &str| match value {
                "" | "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
                "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
                _ => Err(GitUrlError::NotBoolean { key: key.clone(), value: value.to_owned() }),
            };
            match key.as_str() {
                "keep-git-dir" => self.keep_git_dir = Some(boolean(&value)?),
                "submodules" => self.submodules = Some(boolean(&value)?),
                _ if value.is_empty() => return Err(GitUrlError::NoValue(key)),
                "ref" => set(&mut self.reference, value)?,
                "tag" => tag = Some(value),
                "branch" => branch = Some(value),
                "subdir" => set(&mut self.subdir, value)?,
                "checksum" | "commit" => self.checksum = Some(value),
                _ => return Err(GitUrlError::UnknownKey(key)),
            }
        }
        if let (Some(first), Some(second)) = (&tag, &branch) {
            return Err(GitUrlError::Conflict { first: first.clone(), second: second.clone() });
        }
        for (value, prefix) in [(tag, "refs/tags/"), (branch, "refs/heads/")] {
            if let Some(value) = value {
                let value = if value.starts_with(prefix) { value } else { format!("{prefix}{value}") };
                set(&mut self.reference, value)?;
            }
        }
        Ok(())
    }
}

fn set(place: &mut String, value: String) -> Result<(), GitUrlError> {
    if !place.is_empty() && *place != value {
        return Err(GitUrlError::Conflict { first: place.clone(), second: value });
    }
    *place = value;
    Ok(())
}

/// The scheme of an address, if it has one; upper case is accepted but not returned.
fn scheme(text: &str) -> Option<&'static str> {
    let (scheme, _) = text.split_once("://")?;
    if scheme.is_empty() || !scheme.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return None;
    }
    let known = ["http", "https", "ssh", "git"].into_iter().find(|known| scheme.eq_ignore_ascii_case(known));
    Some(known.unwrap_or("unknown"))
}

/// `user@host:path`.
fn is_scp_style(text: &str) -> bool {
    let Some((user, rest)) = text.split_once('@') else { return false };
    let Some((host, _)) = rest.split_once(':') else { return false };
    let word = |text: &str, more: &[u8]| {
        !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || more.contains(&byte))
    };
    word(user, b"-_") && word(host, b"-.")
}

/// Name that a fetched file gets in a directory: the last part of the path.
pub(crate) fn file_name(url: &str) -> String {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let rest = rest.split(['#', '?']).next().unwrap_or_default();
    let path = rest.split_once('/').map_or("", |(_, path)| path);
    match percent_decode(path.trim_end_matches('/').rsplit('/').next().unwrap_or_default()) {
        name if name.is_empty() || name == "." => "__unnamed__".to_owned(),
        // A decoded slash must not make a path out of a name.
        name => name.rsplit('/').find(|part| !part.is_empty()).unwrap_or("__unnamed__").to_owned(),
    }
}

/// An address as it may be shown: without user and password, which over ssh is the password alone.
pub fn without_credentials(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
    let Some((user, host)) = authority.rsplit_once('@') else { return url.to_owned() };
    match user.split(':').next() {
        // Over http the user may be a token; over ssh it is part of the address.
        Some(user) if scheme.eq_ignore_ascii_case("ssh") => format!("{scheme}://{user}@{host}{path}"),
        _ => format!("{scheme}://{host}{path}"),
    }
}

fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let digits = bytes.get(at + 1..at + 3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.filter(|_| bytes[at] == b'%').and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8(out).unwrap_or_else(|_| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        fn check(text: &str, expected: &str) {
            let got = match GitUrl::parse(text) {
                None => "none".to_owned(),
                Some(Err(error)) => format!("error: {error}"),
                Some(Ok(url)) => format!(
                    "{} {:?} {:?} {:?} {:?}",
                    url.remote, url.reference, url.subdir, url.checksum, url.keep_git_dir
                ),
            };
            assert_eq!(got, expected, "{text}");
        }
        check("https://github.com/a/b.git", r#"https://github.com/a/b.git "" "" None None"#);
        check("https://github.com/a/b.git#v1:dir/x", r#"https://github.com/a/b.git "v1" "dir/x" None None"#);
        check("https://github.com/a/b.git#:dir", r#"https://github.com/a/b.git "" "dir" None None"#);
        check("https://x/b.git?branch=m&subdir=d", r#"https://x/b.git "refs/heads/m" "d" None None"#);
        check("https://x/b.git?tag=v1&keep-git-dir", r#"https://x/b.git "refs/tags/v1" "" None Some(true)"#);
        check("https://x/b.git?commit=abc#main", r#"https://x/b.git "main" "" Some("abc") None"#);
        check("https://x/b.git?ref=a#b", "error: `b` contradicts `a`");
        check("https://x/b.git?nope=1", "error: unknown key `nope`");
        check("https://x/b.git?ref=", "error: `ref` has no value");
        check("https://x/b.tar.gz", "none");
        check("https://x/b#main.git", "none");
        check("git@github.com:a/b#main", r#"git@github.com:a/b "main" "" None None"#);
        check("ssh://git@x:22/b", r#"ssh://git@x:22/b "" "" None None"#);
        check("git://x/b", r#"git://x/b "" "" None None"#);
        check("github.com/a/b", "none");
        check("ftp://x/b.git", "none");
        check("../a@b:c", "none");
        check("dir/a", "none");
        check("a@b", "none");
    }

    #[test]
    fn shown_addresses() {
        fn check(url: &str, expected: &str) {
            assert_eq!(without_credentials(url), expected, "{url}");
        }
        check("https://user:pw@host:8/a@b.git", "https://host:8/a@b.git");
        check("https://token@host", "https://host");
        check("ssh://git:pw@host/a", "ssh://git@host/a");
        check("git@host:a/b", "git@host:a/b");
        check("https://host/a", "https://host/a");
    }

    #[test]
    fn file_names() {
        fn check(url: &str, expected: &str) {
            assert_eq!(file_name(url), expected, "{url}");
        }
        check("http://x/a/b.txt", "b.txt");
        check("http://x/a/b.txt?q=/c#d/e", "b.txt");
        check("http://x/a/", "a");
        check("http://x/", "__unnamed__");
        check("http://x", "__unnamed__");
        check("http://x/a%20b", "a b");
        check("http://x/a%2fb", "b");
    }
}
