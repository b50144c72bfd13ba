//! Users and groups by name: what `--chown` and USER mean for files that the builder creates.
//!
//! The rules are BuildKit's: `root` and numbers need no file, a user alone brings the group of its passwd entry (a
//! number alone is the group too), and a name that is not found is 0.

/// A user and a group as numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// One side of `user:group`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Id<'a> {
    Number(u32),
    Name(&'a str),
}

impl<'a> Id<'a> {
    fn parse(text: &'a str) -> Self {
        match text {
            "" | "root" => Self::Number(0),
            _ => match text.parse::<i32>() {
                Ok(number) if number >= 0 => Self::Number(number.unsigned_abs()),
                _ => Self::Name(text),
            },
        }
    }
}

/// Splits `user[:group]`.
fn split(spec: &str) -> (Id<'_>, Option<Id<'_>>) {
    match spec.split_once(':') {
        Some((user, group)) => (Id::parse(user), Some(Id::parse(group))),
        None => (Id::parse(spec), None),
    }
}

/// The name in `spec` that only a passwd or group file can explain, if there is one.
pub fn name_to_look_up(spec: &str) -> Option<&str> {
    match split(spec) {
        (Id::Name(name), _) | (_, Some(Id::Name(name))) => Some(name),
        _ => None,
    }
}

/// The numbers that `user`, `user:group`, `uid`, `uid:gid`, `user:` or `:group` stand for, given the contents of
/// `/etc/passwd` and `/etc/group`.
pub fn lookup(passwd: &[u8], group: &[u8], spec: &str) -> Owner {
    let (user, wanted_group) = split(spec);
    let mut owner = match user {
        Id::Number(uid) => Owner { uid, gid: uid },
        Id::Name(name) => find(passwd, name)
            .map(|mut fields| Owner { uid: number(fields.next()), gid: number(fields.next()) })
            .unwrap_or_default(),
    };
    match wanted_group {
        None => {}
        Some(Id::Number(gid)) => owner.gid = gid,
        // An unknown group leaves the user's own.
        Some(Id::Name(name)) => {
            if let Some(mut fields) = find(group, name) {
                owner.gid = number(fields.next());
            }
        }
    }
    owner
}

/// Fields after name and password of the first line for `name`.
fn find<'a>(file: &'a [u8], name: &str) -> Option<impl Iterator<Item = &'a [u8]>> {
    file.split(|&byte| byte == b'\n')
        .map(|line| line.trim_ascii().split(|&byte| byte == b':'))
        .find(|fields| fields.clone().next() == Some(name.as_bytes()))
        .map(|fields| fields.skip(2))
}

fn number(field: Option<&[u8]>) -> u32 {
    field.and_then(|field| std::str::from_utf8(field).ok()).and_then(|field| field.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n\n# app:x:1:1\napp:x:1000:1000:App:/home/app:/bin/sh\n\
        svc:x:1001:2000::/:\nodd:x\n";
    const GROUP: &[u8] = b"root:x:0:\nstaff:x:50:app\napp:x:1000:\n";

    #[test]
    fn specs_become_numbers() {
        let check = |spec: &str, uid, gid| assert_eq!(lookup(PASSWD, GROUP, spec), Owner { uid, gid }, "{spec}");
        check("app", 1000, 1000);
        check("svc", 1001, 2000);
        check("app:staff", 1000, 50);
        check("app:7", 1000, 7);
        check("app:", 1000, 0);
        check("app:ghosts", 1000, 1000);
        check("ghost", 0, 0);
        check("ghost:staff", 0, 50);
        check(":staff", 0, 50);
        check("1001", 1001, 1001);
        check("5:6", 5, 6);
        check("5:staff", 5, 50);
        check("root", 0, 0);
        check("root:app", 0, 1000);
        check("odd", 0, 0);
        check("-5", 0, 0);
        check("", 0, 0);
        check("4294967296", 0, 0);
    }

    #[test]
    fn numbers_and_root_need_no_file() {
        for spec in ["", "5", "5:6", "root", "root:root", ":", "5:"] {
            assert_eq!(name_to_look_up(spec), None, "{spec}");
        }
        assert_eq!(name_to_look_up("app:5"), Some("app"));
        assert_eq!(name_to_look_up("5:staff"), Some("staff"));
    }
}
