//! USER of a RUN step: the ids a process starts with.
//!
//! The rules are those of runc and BuildKit, and stricter than those of `--chown` ([`super::passwd`]): a name that is not
//! in `/etc/passwd` or `/etc/group` is an error.
//!
//! | USER | user | group | more groups |
//! |---|---|---|---|
//! | `5:6` | 5 | 6 | none, no file is looked at |
//! | `5` | 5, also when it is a name | of the passwd entry with this number, else 0 | those that list the entry's name |
//! | `app` | of the passwd entry | of the passwd entry | those that list the name |
//! | `app:staff`, `app:50` | of the passwd entry | of the group entry, or the number | none |
//! | nothing | 0 | as `0`; no entry is no error | as `0` |

use crate::tree::{Node, Resolved, Tree};
use std::io;

/// Why USER means nothing.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// No such user.
    #[error("unable to find user {name}: no matching entries in passwd file")]
    NoUser {
        /// As written.
        name: String,
    },
    /// No such group.
    #[error("unable to find group {name}: no matching entries in group file")]
    NoGroup {
        /// As written.
        name: String,
    },
    /// A number that is no id.
    #[error("uids and gids must be in range 0-2147483647, and {number} is not")]
    Range {
        /// As written.
        number: String,
    },
    /// A file cannot be read.
    #[error("cannot read /{path}")]
    Read {
        /// Which.
        path: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Ids of a process.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct User {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

impl User {
    /// The groups of a process of this user: those above, and before them its own, as containerd has it.
    pub fn all_groups(&self) -> Vec<u32> {
        let own = Some(self.gid).filter(|gid| !self.groups.contains(gid));
        own.into_iter().chain(self.groups.iter().copied()).collect()
    }
}

/// Looks USER up in a root file system.
pub fn look_up(rootfs: &Tree, spec: &str, read: &dyn Fn(&Node) -> io::Result<Vec<u8>>) -> Result<User, UserError> {
    if let Some((uid, gid)) = spec.split_once(':').and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?))) {
        return Ok(User { uid, gid, groups: Vec::new() });
    }
    let file = |path: &'static str| match rootfs.resolve(path.as_bytes(), true) {
        Resolved::Found(found) => match rootfs.get(&found).filter(|node| node.entry.is_file()) {
            Some(node) => read(&node).map_err(|source| UserError::Read { path, source }),
            None => Ok(Vec::new()),
        },
        _ => Ok(Vec::new()),
    };
    let (passwd, group) = (file("etc/passwd")?, file("etc/group")?);
    find(&String::from_utf8_lossy(&passwd), &String::from_utf8_lossy(&group), spec)
}

fn find(passwd: &str, group: &str, spec: &str) -> Result<User, UserError> {
    let (user, wanted_group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (spec, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = |text: Option<&str>| text.and_then(|text| text.parse::<u32>().ok());
    let fields = |line: &'_ str| line.trim().split(':').map(str::to_owned).collect::<Vec<_>>();
    // A number is an id, whatever names there are.
    let is = |fields: &[String], wanted: &str| match wanted.parse::<i64>() {
        Ok(wanted) => number(fields.get(2).map(String::as_str)).map(i64::from) == Some(wanted),
        Err(_) => fields[0] == wanted,
    };
    let id = |wanted: &str| match wanted.parse::<i64>() {
        Ok(id) => match u32::try_from(id).ok().filter(|id| *id <= i32::MAX as u32) {
            Some(id) => Ok(Some(id)),
            None => Err(UserError::Range { number: wanted.to_owned() }),
        },
        Err(_) => Ok(None),
    };
    let entry = passwd.lines().map(fields).find(|fields| !fields[0].is_empty() && is(fields, user));
    let (name, mut found) = match entry {
        Some(fields) => {
            let field = |at: usize| number(fields.get(at).map(String::as_str)).unwrap_or(0);
            (fields[0].clone(), User { uid: field(2), gid: field(3), groups: Vec::new() })
        }
        None => {
            let uid = id(user)?.ok_or_else(|| UserError::NoUser { name: user.to_owned() })?;
            (String::new(), User { uid, ..User::default() })
        }
    };
    let groups = || group.lines().map(fields).filter(|fields| !fields[0].is_empty());
    match wanted_group {
        Some(wanted) => {
            let entry = groups().find(|fields| is(fields, wanted));
            found.gid = match entry.and_then(|fields| number(fields.get(2).map(String::as_str))) {
                Some(gid) => gid,
                None => id(wanted)?.ok_or_else(|| UserError::NoGroup { name: wanted.to_owned() })?,
            };
        }
        None if !name.is_empty() => {
            let lists = |fields: &Vec<String>| {
                fields.get(3).is_some_and(|members| members.split(',').any(|member| member == name))
            };
            found.groups =
                groups().filter(lists).filter_map(|fields| number(fields.get(2).map(String::as_str))).collect();
        }
        None => {}
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\napp:x:1000:1001::/:\n";
    const GROUP: &str = "root:x:0:\nstaff:x:50:other,app\nwheel:x:10:app,root\n";

    #[test]
    fn users_become_ids() {
        let check = |spec: &str, uid, gid, groups: &[u32]| {
            assert_eq!(find(PASSWD, GROUP, spec).unwrap(), User { uid, gid, groups: groups.to_vec() }, "{spec}");
        };
        check("", 0, 0, &[10]);
        check("app", 1000, 1001, &[50, 10]);
        check("1000", 1000, 1001, &[50, 10]);
        check("app:", 1000, 1001, &[50, 10]);
        check("app:staff", 1000, 50, &[]);
        check("app:7", 1000, 7, &[]);
        check("77", 77, 0, &[]);
        check("77:staff", 77, 50, &[]);
    }

    #[test]
    fn unknown_names_are_errors() {
        assert!(matches!(find(PASSWD, GROUP, "ghost"), Err(UserError::NoUser { name }) if name == "ghost"));
        assert!(matches!(find(PASSWD, GROUP, "app:ghosts"), Err(UserError::NoGroup { name }) if name == "ghosts"));
        assert_eq!(find("", "", "").unwrap(), User::default());
    }

    #[test]
    fn numbers_are_ids() {
        let passwd = "123:x:9:9::/:/bin/sh\n";
        let user = |spec: &str| find(passwd, "7:x:50:\n", spec).unwrap();
        assert_eq!(user("123:7"), User { uid: 123, gid: 7, groups: Vec::new() });
        for spec in ["2147483648", "-1", "4294967296", "123:-1"] {
            assert!(matches!(find(passwd, "", spec), Err(UserError::Range { .. })), "{spec}");
        }
    }

    #[test]
    fn two_numbers_need_no_file() {
        let read = |_: &Node| Err(io::Error::other("not read"));
        let found = look_up(&Tree::default(), "5:6", &read).unwrap();
        assert_eq!(found, User { uid: 5, gid: 6, groups: Vec::new() });
        assert_eq!(found.all_groups(), [6]);
        assert_eq!(User { groups: vec![50, 6], ..found }.all_groups(), [50, 6]);
    }
}
