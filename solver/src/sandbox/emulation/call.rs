//! The system calls that are about owners and ids, by architecture and number.

use super::super::seccomp::{ARCHITECTURES, Column};
use super::super::syscalls::ALLOWED;
use std::collections::HashMap;

/// A call that is answered instead of carried out, or watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Chown,
    Lchown,
    Fchown,
    Fchownat,
    SetUid,
    SetGid,
    SetReUid,
    SetReGid,
    SetResUid,
    SetResGid,
    SetFsUid,
    SetFsGid,
    SetGroups,
    GetUid,
    GetEUid,
    GetGid,
    GetEGid,
    GetResUid,
    GetResGid,
    GetGroups,
    Open,
    OpenAt,
    OpenAt2,
    Creat,
    Mkdir,
    MkdirAt,
    Symlink,
    SymlinkAt,
    Mknod,
    MknodAt,
    Rename,
    RenameAt,
    Link,
    LinkAt,
    Stat,
    Lstat,
    Fstat,
    FstatAt,
    Statx,
    Chroot,
    Execve,
    ExecveAt,
    SetLimit,
    GetLimit,
    ProcessLimit,
    Control,
    SetCapabilities,
}

impl Call {
    /// The call of this name, if it is one of them; `wide` tells that the architecture is a 64-bit one.
    pub(crate) fn of(name: &str, wide: bool) -> Option<Call> {
        // The 32-bit architectures have calls for ids of 16 bits too, without a number at the end of their names.
        let name = name.strip_suffix("32").unwrap_or(name);
        Some(match name {
            "chown" => Call::Chown,
            "lchown" => Call::Lchown,
            "fchown" => Call::Fchown,
            "fchownat" => Call::Fchownat,
            "setuid" => Call::SetUid,
            "setgid" => Call::SetGid,
            "setreuid" => Call::SetReUid,
            "setregid" => Call::SetReGid,
            "setresuid" => Call::SetResUid,
            "setresgid" => Call::SetResGid,
            "setfsuid" => Call::SetFsUid,
            "setfsgid" => Call::SetFsGid,
            "setgroups" => Call::SetGroups,
            "getuid" => Call::GetUid,
            "geteuid" => Call::GetEUid,
            "getgid" => Call::GetGid,
            "getegid" => Call::GetEGid,
            "getresuid" => Call::GetResUid,
            "getresgid" => Call::GetResGid,
            "getgroups" => Call::GetGroups,
            "open" => Call::Open,
            "openat" => Call::OpenAt,
            "openat2" => Call::OpenAt2,
            "creat" => Call::Creat,
            "mkdir" => Call::Mkdir,
            "mkdirat" => Call::MkdirAt,
            "symlink" => Call::Symlink,
            "symlinkat" => Call::SymlinkAt,
            "mknod" => Call::Mknod,
            "mknodat" => Call::MknodAt,
            "rename" => Call::Rename,
            "renameat" | "renameat2" => Call::RenameAt,
            "link" => Call::Link,
            "linkat" => Call::LinkAt,
            // The narrow ones are of a time before large files; nothing that is still in use calls them.
            "stat" if wide => Call::Stat,
            "lstat" if wide => Call::Lstat,
            "fstat" if wide => Call::Fstat,
            "stat64" => Call::Stat,
            "lstat64" => Call::Lstat,
            "fstat64" => Call::Fstat,
            "newfstatat" | "fstatat64" => Call::FstatAt,
            "statx" => Call::Statx,
            "chroot" => Call::Chroot,
            "execve" => Call::Execve,
            "execveat" => Call::ExecveAt,
            "setrlimit" => Call::SetLimit,
            "getrlimit" | "ugetrlimit" => Call::GetLimit,
            "prlimit64" => Call::ProcessLimit,
            "prctl" => Call::Control,
            "capset" => Call::SetCapabilities,
            _ => return None,
        })
    }
}

/// How a process passes values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// The machine's own.
    Native,
    /// i386: 32-bit words.
    I386,
    /// 32-bit arm.
    Arm,
}

/// A call as the table has it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Known {
    pub(super) call: Call,
    pub(super) layout: Layout,
    /// Ids have 16 bits.
    pub(super) short_ids: bool,
}

/// All calls by architecture and number.
pub(super) fn table() -> HashMap<(u32, i32), Known> {
    let mut table = HashMap::new();
    for (position, (architecture, column)) in ARCHITECTURES.iter().enumerate() {
        let column: Column = *column;
        let wide = position == 0;
        let layout = match (wide, cfg!(target_arch = "x86_64")) {
            (true, _) => Layout::Native,
            (false, true) => Layout::I386,
            (false, false) => Layout::Arm,
        };
        for row in ALLOWED.iter().filter(|row| column(row) >= 0) {
            let Some(call) = Call::of(row.0, wide) else { continue };
            let short_ids = !wide && has_wide_variant(row.0);
            table.insert((*architecture, column(row)), Known { call, layout, short_ids });
        }
    }
    table
}

fn has_wide_variant(name: &str) -> bool {
    ALLOWED.iter().any(|row| row.0.strip_suffix("32") == Some(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn knows_both_architectures() {
        let table = table();
        let native = ARCHITECTURES[0].0;
        let other = ARCHITECTURES[1].0;
        for (architecture, number, call, layout, short_ids) in [
            (native, libc::SYS_fchownat as i32, Call::Fchownat, Layout::Native, false),
            (native, libc::SYS_setuid as i32, Call::SetUid, Layout::Native, false),
            (native, libc::SYS_stat as i32, Call::Stat, Layout::Native, false),
            (other, 182, Call::Chown, Layout::I386, true),
            (other, 212, Call::Chown, Layout::I386, false),
            (other, 298, Call::Fchownat, Layout::I386, false),
            (other, 195, Call::Stat, Layout::I386, false),
        ] {
            let known = table.get(&(architecture, number)).expect("known");
            assert_eq!((known.call, known.layout, known.short_ids), (call, layout, short_ids), "{number}");
        }
        // The oldest stat of i386 has no room for large numbers.
        assert!(!table.contains_key(&(other, 106)));
    }
}
