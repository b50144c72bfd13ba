//! What vertices do.

mod agent;
pub(crate) mod changes;
mod copied;
pub mod copy;
pub mod file;
pub mod git;
pub(crate) mod owners;
pub mod passwd;
pub mod run;
pub mod source;
pub mod unpacked;
pub mod user;
