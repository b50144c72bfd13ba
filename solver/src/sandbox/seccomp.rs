//! The seccomp filter of a step.
//!
//! ```text
//! architecture ─▶ native or 32-bit variant ─▶ binary search over call numbers ─▶ verdict
//!      └ any other: ENOSYS
//! ```
//!
//! Everything that `syscalls.rs` does not list is refused with EPERM, calls newer than the list with ENOSYS. Some
//! calls depend on an argument: namespaces by `clone`, `personality`, `AF_VSOCK` sockets. `clone3` hides its flags in memory, which a filter cannot read, so it does not
//! exist for the step (ENOSYS) and libraries use `clone`.
//!
//! Calls about owners and ids go to the supervisor where there is a single id, and those that make device nodes where
//! that is not allowed: `emulation`.
//!
//! The search is a tree because the kernel runs the filter for every call number once, when it is installed, to learn
//! which are always allowed; only the others run it again.

use super::emulation;
use super::syscalls::{ALLOWED, NEWEST, Row};
use crate::sys::FilterInstruction;

const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_AT_LEAST: u16 = 0x35;
const JUMP_ANY_BIT: u16 = 0x45;
const AND: u16 = 0x54;
const RETURN: u16 = 0x06;

const RETURN_ERRNO: u32 = 0x0005_0000;
const RETURN_ALLOW: u32 = 0x7fff_0000;
const RETURN_NOTIFY: u32 = 0x7fc0_0000;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
/// Lower half of an argument; both supported architectures are little-endian, and the kernel uses 32 bits of each
/// argument that is looked at here.
const fn argument(index: u32) -> u32 {
    16 + 8 * index
}

/// Architectures as the kernel reports them, with the column of the list.
#[cfg(target_arch = "x86_64")]
pub(super) const ARCHITECTURES: &[(u32, Column)] = &[(0xc000_003e, |row| row.1), (0x4000_0003, |row| row.2)];
#[cfg(target_arch = "aarch64")]
pub(super) const ARCHITECTURES: &[(u32, Column)] = &[(0xc000_00b7, |row| row.3), (0x4000_0028, |row| row.4)];

/// A column of the list.
pub(super) type Column = fn(&Row) -> i32;

/// CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET.
const CLONE_NAMESPACES: u32 = 0x7e02_0000;
/// Values of personality(2) that do not weaken a process: Linux and 32-bit, each also with a short `uname`, and "ask".
const PERSONALITIES: [u32; 5] = [0, 8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Allow,
    /// Answered with this error; 0 is "done".
    Errno(u32),
    Clone,
    Personality,
    Socket,
    /// The supervisor is asked.
    Notify,
    /// The supervisor is asked when a file may be made; the flags are argument `.0`.
    NotifyToCreate(u32),
    /// The supervisor is asked for device nodes; the mode is argument `.0`.
    NotifyOfDevice(u32),
    /// The supervisor is asked about the limit that carries credentials; its number is argument `.0`.
    NotifyAboutLocks(u32),
    /// The supervisor is told what becomes of capabilities when the user changes: prctl(2).
    NotifyToKeep,
}

/// What the filter has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Profile {
    /// Do not forbid anything.
    pub insecure: bool,
    /// What the supervisor is asked about.
    pub emulate: Option<emulation::Scope>,
}

/// Returns the filter for `profile`; empty when there is nothing to filter.
pub fn filter(profile: Profile) -> Vec<FilterInstruction> {
    if profile.insecure && profile.emulate.is_none() {
        return Vec::new();
    }
    let mut code = vec![statement(LOAD, ARCHITECTURE)];
    for (architecture, column) in ARCHITECTURES {
        let mut section = vec![statement(LOAD, NUMBER)];
        search(&segments(profile, *column, *architecture == ARCHITECTURES[0].0), &mut section);
        // The section can be longer than a conditional jump reaches.
        code.push(jump(JUMP_EQUAL, *architecture, 1, 0));
        code.push(statement(JUMP, section.len() as u32));
        code.append(&mut section);
    }
    code.push(errno(libc::ENOSYS));
    code
}

fn verdict(name: &str, profile: Profile, wide: bool) -> Verdict {
    if let Some(emulation::Scope::Devices { shown }) = profile.emulate {
        use emulation::Call::{
            Chroot, Fstat, FstatAt, Link, LinkAt, Lstat, Mknod, MknodAt, Rename, RenameAt, Stat, Statx,
        };
        match emulation::Call::of(name, wide) {
            Some(Mknod) => return Verdict::NotifyOfDevice(1),
            Some(MknodAt) => return Verdict::NotifyOfDevice(2),
            Some(Chroot) => return Verdict::Notify,
            Some(Stat | Lstat | Fstat | FstatAt | Statx | Rename | RenameAt | Link | LinkAt) if shown => {
                return Verdict::Notify;
            }
            _ => {}
        }
    }
    if profile.emulate == Some(emulation::Scope::SingleId) {
        match emulation::Call::of(name, wide) {
            None => {}
            Some(emulation::Call::Open) => return Verdict::NotifyToCreate(1),
            Some(emulation::Call::OpenAt) => return Verdict::NotifyToCreate(2),
            Some(emulation::Call::SetLimit | emulation::Call::GetLimit) => return Verdict::NotifyAboutLocks(0),
            Some(emulation::Call::ProcessLimit) => return Verdict::NotifyAboutLocks(1),
            Some(emulation::Call::Control) => return Verdict::NotifyToKeep,
            Some(_) => return Verdict::Notify,
        }
    }
    match name {
        _ if profile.insecure => Verdict::Allow,
        "clone" => Verdict::Clone,
        "clone3" | "io_uring_setup" | "io_uring_enter" | "io_uring_register" => Verdict::Errno(libc::ENOSYS as u32),
        "personality" => Verdict::Personality,
        "socket" => Verdict::Socket,
        _ => Verdict::Allow,
    }
}

/// Ranges of call numbers by their first, in order, starting at 0; a range ends where the next one starts.
fn segments(profile: Profile, column: Column, wide: bool) -> Vec<(u32, Verdict)> {
    let (known, newer) = match profile.insecure {
        true => (Verdict::Allow, Verdict::Allow),
        false => (Verdict::Errno(libc::EPERM as u32), Verdict::Errno(libc::ENOSYS as u32)),
    };
    let mut listed: Vec<(u32, Verdict)> = ALLOWED
        .iter()
        .filter_map(|row| Some((u32::try_from(column(row)).ok()?, verdict(row.0, profile, wide))))
        .collect();
    listed.sort_unstable_by_key(|(number, _)| *number);
    let mut segments = vec![(0, known)];
    let mut add = |number: u32, verdict: Verdict| match segments.last_mut() {
        Some(last) if last.0 == number => last.1 = verdict,
        Some(last) if last.1 == verdict => {}
        _ => segments.push((number, verdict)),
    };
    let gap = |number: u32| if number > NEWEST { newer } else { known };
    let mut newer_added = false;
    for (number, verdict) in listed {
        if number > NEWEST && !newer_added {
            add(NEWEST + 1, newer);
            newer_added = true;
        }
        add(number, verdict);
        add(number + 1, gap(number + 1));
    }
    if !newer_added {
        add(NEWEST + 1, newer);
    }
    // Two neighbours can have become equal when the first of them was replaced in place.
    segments.dedup_by_key(|(_, verdict)| *verdict);
    segments
}

/// Appends a binary search over `segments`; the call number is in the accumulator.
fn search(segments: &[(u32, Verdict)], code: &mut Vec<FilterInstruction>) {
    if let [(_, verdict)] = segments {
        return decide(*verdict, code);
    }
    let middle = segments.len() / 2;
    let mut below = Vec::new();
    search(&segments[..middle], &mut below);
    match u8::try_from(below.len()) {
        Ok(skip) => code.push(jump(JUMP_AT_LEAST, segments[middle].0, skip, 0)),
        Err(_) => {
            code.push(jump(JUMP_AT_LEAST, segments[middle].0, 0, 1));
            code.push(statement(JUMP, below.len() as u32));
        }
    }
    code.append(&mut below);
    search(&segments[middle..], code);
}

fn decide(verdict: Verdict, code: &mut Vec<FilterInstruction>) {
    match verdict {
        Verdict::Allow => code.push(allow()),
        Verdict::Errno(number) => code.push(statement(RETURN, RETURN_ERRNO | number)),
        Verdict::Clone => code.extend([
            statement(LOAD, argument(0)),
            jump(JUMP_ANY_BIT, CLONE_NAMESPACES, 0, 1),
            errno(libc::EPERM),
            allow(),
        ]),
        Verdict::Personality => {
            code.push(statement(LOAD, argument(0)));
            for (position, value) in PERSONALITIES.into_iter().enumerate() {
                code.push(jump(JUMP_EQUAL, value, (PERSONALITIES.len() - position) as u8, 0));
            }
            code.extend([errno(libc::EPERM), allow()]);
        }
        Verdict::Socket => code.extend([
            statement(LOAD, argument(0)),
            jump(JUMP_EQUAL, libc::AF_VSOCK as u32, 1, 0),
            // With the host's network and a real root's capabilities it would read all that the host receives.
            jump(JUMP_EQUAL, libc::AF_PACKET as u32, 0, 1),
            errno(libc::EPERM),
            allow(),
        ]),
        Verdict::Notify => code.push(notify()),
        Verdict::NotifyToCreate(flags) => code.extend([
            statement(LOAD, argument(flags)),
            jump(JUMP_ANY_BIT, libc::O_CREAT as u32 | emulation::UNNAMED, 0, 1),
            notify(),
            allow(),
        ]),
        Verdict::NotifyOfDevice(mode) => code.extend([
            statement(LOAD, argument(mode)),
            statement(AND, libc::S_IFMT),
            jump(JUMP_EQUAL, libc::S_IFCHR, 1, 0),
            jump(JUMP_EQUAL, libc::S_IFBLK, 0, 1),
            notify(),
            allow(),
        ]),
        Verdict::NotifyToKeep => code.extend([
            statement(LOAD, argument(0)),
            jump(JUMP_EQUAL, libc::PR_SET_KEEPCAPS as u32, 3, 0),
            jump(JUMP_EQUAL, libc::PR_SET_NO_NEW_PRIVS as u32, 2, 0),
            jump(JUMP_EQUAL, libc::PR_CAPBSET_DROP as u32, 1, 0),
            jump(JUMP_EQUAL, libc::PR_SET_SECUREBITS as u32, 0, 1),
            notify(),
            allow(),
        ]),
        Verdict::NotifyAboutLocks(number) => code.extend([
            statement(LOAD, argument(number)),
            jump(JUMP_EQUAL, libc::RLIMIT_LOCKS, 0, 1),
            notify(),
            allow(),
        ]),
    }
}

fn statement(code: u16, operand: u32) -> FilterInstruction {
    jump(code, operand, 0, 0)
}

fn jump(code: u16, operand: u32, jump_true: u8, jump_false: u8) -> FilterInstruction {
    FilterInstruction { code, jump_true, jump_false, operand }
}

fn allow() -> FilterInstruction {
    statement(RETURN, RETURN_ALLOW)
}

fn notify() -> FilterInstruction {
    statement(RETURN, RETURN_NOTIFY)
}

fn errno(number: i32) -> FilterInstruction {
    statement(RETURN, RETURN_ERRNO | number as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the filter as the kernel does.
    fn run(code: &[FilterInstruction], architecture: u32, number: u32, arguments: [u32; 3]) -> u32 {
        let (mut accumulator, mut position) = (0, 0);
        loop {
            let instruction = code[position];
            let operand = instruction.operand;
            let holds = match instruction.code {
                LOAD => {
                    accumulator = match operand {
                        NUMBER => number,
                        ARCHITECTURE => architecture,
                        _ => arguments[(operand as usize - 16) / 8],
                    };
                    true
                }
                AND => {
                    accumulator &= operand;
                    true
                }
                JUMP => {
                    position += operand as usize;
                    true
                }
                JUMP_EQUAL => accumulator == operand,
                JUMP_AT_LEAST => accumulator >= operand,
                JUMP_ANY_BIT => accumulator & operand != 0,
                RETURN => return operand,
                other => panic!("unknown instruction {other:#x}"),
            };
            position += 1 + usize::from(if holds { instruction.jump_true } else { instruction.jump_false });
        }
    }

    const OK: u32 = RETURN_ALLOW;
    const NOTIFY: u32 = RETURN_NOTIFY;
    const EPERM: u32 = RETURN_ERRNO | 1;
    const ENOSYS: u32 = RETURN_ERRNO | 38;

    fn check(profile: Profile, name: &str, number: libc::c_long, arguments: [u32; 3], expected: u32) {
        let code = filter(profile);
        let got = run(&code, ARCHITECTURES[0].0, number as u32, arguments);
        assert_eq!(got, expected, "{name} {arguments:?} with {profile:?}");
    }

    #[test]
    fn decides_by_number_and_argument() {
        let plain = Profile::default();
        let emulate = Profile { emulate: Some(emulation::Scope::SingleId), ..plain };
        let devices = Profile { emulate: Some(emulation::Scope::Devices { shown: false }), ..plain };
        let shown = Profile { emulate: Some(emulation::Scope::Devices { shown: true }), ..plain };
        let insecure_emulate = Profile { insecure: true, ..emulate };
        for (profile, name, number, arguments, expected) in [
            (plain, "read", libc::SYS_read, [0; 3], OK),
            (plain, "removexattrat", 466, [0; 3], OK),
            (plain, "mount", libc::SYS_mount, [0; 3], EPERM),
            (plain, "unshare", libc::SYS_unshare, [0; 3], EPERM),
            (plain, "keyctl", libc::SYS_keyctl, [0; 3], EPERM),
            (plain, "reboot", libc::SYS_reboot, [0; 3], EPERM),
            (plain, "bpf", libc::SYS_bpf, [0; 3], EPERM),
            (plain, "clone3", libc::SYS_clone3, [0; 3], ENOSYS),
            (plain, "io_uring_setup", libc::SYS_io_uring_setup, [0; 3], ENOSYS),
            (plain, "newer than the list", NEWEST as libc::c_long + 1, [0; 3], ENOSYS),
            (plain, "x32 read", 0x4000_0000, [0; 3], ENOSYS),
            (plain, "clone", libc::SYS_clone, [libc::SIGCHLD as u32, 0, 0], OK),
            (plain, "clone", libc::SYS_clone, [libc::CLONE_NEWUSER as u32 | 17, 0, 0], EPERM),
            (plain, "clone", libc::SYS_clone, [libc::CLONE_NEWCGROUP as u32, 0, 0], EPERM),
            (plain, "personality", libc::SYS_personality, [0, 0, 0], OK),
            (plain, "personality", libc::SYS_personality, [u32::MAX, 0, 0], OK),
            (plain, "personality", libc::SYS_personality, [0x0040_0000, 0, 0], EPERM),
            (plain, "socket", libc::SYS_socket, [libc::AF_INET as u32, 0, 0], OK),
            (plain, "socket", libc::SYS_socket, [libc::AF_VSOCK as u32, 0, 0], EPERM),
            (plain, "fchownat", libc::SYS_fchownat, [0; 3], OK),
            (plain, "mknodat", libc::SYS_mknodat, [0, 0, libc::S_IFCHR | 0o600], OK),
            (emulate, "fchownat", libc::SYS_fchownat, [0; 3], NOTIFY),
            (emulate, "setgroups", libc::SYS_setgroups, [0; 3], NOTIFY),
            (emulate, "getuid", libc::SYS_getuid, [0; 3], NOTIFY),
            (emulate, "mknodat", libc::SYS_mknodat, [0, 0, libc::S_IFCHR | 0o600], NOTIFY),
            (emulate, "statx", libc::SYS_statx, [0; 3], NOTIFY),
            (emulate, "openat", libc::SYS_openat, [0, 0, libc::O_RDWR as u32], OK),
            (emulate, "openat", libc::SYS_openat, [0, 0, (libc::O_RDWR | libc::O_CREAT) as u32], NOTIFY),
            (emulate, "openat", libc::SYS_openat, [0, 0, libc::O_DIRECTORY as u32], OK),
            (emulate, "openat", libc::SYS_openat, [0, 0, libc::O_TMPFILE as u32], NOTIFY),
            (emulate, "prlimit64", libc::SYS_prlimit64, [0, libc::RLIMIT_NOFILE, 0], OK),
            (emulate, "prlimit64", libc::SYS_prlimit64, [0, libc::RLIMIT_LOCKS, 0], NOTIFY),
            (emulate, "prctl", libc::SYS_prctl, [libc::PR_SET_NAME as u32, 0, 0], OK),
            (emulate, "prctl", libc::SYS_prctl, [libc::PR_SET_KEEPCAPS as u32, 1, 0], NOTIFY),
            (emulate, "prctl", libc::SYS_prctl, [libc::PR_SET_SECUREBITS as u32, 4, 0], NOTIFY),
            (emulate, "prctl", libc::SYS_prctl, [libc::PR_CAPBSET_DROP as u32, 4, 0], NOTIFY),
            (emulate, "prctl", libc::SYS_prctl, [libc::PR_SET_NO_NEW_PRIVS as u32, 1, 0], NOTIFY),
            (emulate, "capset", libc::SYS_capset, [0; 3], NOTIFY),
            (emulate, "capget", libc::SYS_capget, [0; 3], OK),
            (plain, "prctl", libc::SYS_prctl, [libc::PR_SET_KEEPCAPS as u32, 1, 0], OK),
            (emulate, "read", libc::SYS_read, [0; 3], OK),
            (emulate, "mount", libc::SYS_mount, [0; 3], EPERM),
            (emulate, "clone3", libc::SYS_clone3, [0; 3], ENOSYS),
            (devices, "mknodat", libc::SYS_mknodat, [0, 0, libc::S_IFCHR | 0o600], NOTIFY),
            (devices, "mknodat", libc::SYS_mknodat, [0, 0, libc::S_IFBLK], NOTIFY),
            (devices, "mknodat", libc::SYS_mknodat, [0, 0, libc::S_IFIFO | 0o600], OK),
            (devices, "fchownat", libc::SYS_fchownat, [0; 3], OK),
            (devices, "statx", libc::SYS_statx, [0; 3], OK),
            (shown, "statx", libc::SYS_statx, [0; 3], NOTIFY),
            (shown, "renameat2", libc::SYS_renameat2, [0; 3], NOTIFY),
            (shown, "mknodat", libc::SYS_mknodat, [0, 0, libc::S_IFBLK], NOTIFY),
            (shown, "fchownat", libc::SYS_fchownat, [0; 3], OK),
            (insecure_emulate, "mount", libc::SYS_mount, [0; 3], OK),
            (insecure_emulate, "clone3", libc::SYS_clone3, [0; 3], OK),
            (insecure_emulate, "fchown", libc::SYS_fchown, [0; 3], NOTIFY),
        ] {
            check(profile, name, number, arguments, expected);
        }
        assert_eq!(filter(Profile { insecure: true, emulate: None }), []);
    }

    #[test]
    fn agrees_with_the_list_for_every_number_and_architecture() {
        let code = filter(Profile::default());
        for (architecture, column) in ARCHITECTURES {
            for number in 0..=NEWEST {
                let row = ALLOWED.iter().find(|row| column(row) == number as i32);
                let expected = match row.map(|row| verdict(row.0, Profile::default(), true)) {
                    None => EPERM,
                    Some(Verdict::Errno(number)) => RETURN_ERRNO | number,
                    Some(_) => OK,
                };
                assert_eq!(run(&code, *architecture, number, [0; 3]), expected, "{number} {row:?}");
            }
            assert_eq!(run(&code, *architecture, 0x7fff_ffff, [0; 3]), ENOSYS);
        }
        assert_eq!(run(&code, 0x1234, 0, [0; 3]), ENOSYS, "foreign architecture");
    }

    #[test]
    fn list_is_sorted_and_matches_the_headers() {
        let sort_key = |row: &Row| row.0.trim_start_matches('_').to_owned();
        assert!(ALLOWED.is_sorted_by_key(sort_key));
        for (name, number) in [
            ("openat2", libc::SYS_openat2),
            ("statx", libc::SYS_statx),
            ("execve", libc::SYS_execve),
            ("prlimit64", libc::SYS_prlimit64),
            ("wait4", libc::SYS_wait4),
            ("mseal", libc::SYS_mseal),
        ] {
            let row = ALLOWED.iter().find(|row| row.0 == name).expect(name);
            assert_eq!(libc::c_long::from(ARCHITECTURES[0].1(row)), number, "{name}");
        }
    }
}
