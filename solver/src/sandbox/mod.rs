//! The sandbox that RUN steps live in.

pub mod idmap;
pub mod init;
pub mod seccomp;
