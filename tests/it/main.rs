//! Runs of the program that prove the wiring; what a crate can show by itself is tested there.
//!
//! A test tells a story: [`story::Build`] lays a context out, builds it, and hands out what came of it. Each has a store
//! of its own. Steps run on busybox, which has to be in PATH.

#![expect(clippy::disallowed_methods, reason = "variables steer the tests")]

#[path = "../support/bases.rs"]
#[allow(dead_code, reason = "shared with the other test program")]
mod bases;
#[path = "../support/git.rs"]
mod git;
#[path = "../support/http.rs"]
mod http;
#[path = "../support/image.rs"]
#[allow(dead_code, reason = "shared with the other test program")]
mod image;
#[path = "../support/process.rs"]
#[allow(dead_code, reason = "shared with the other test program")]
mod process;

#[cfg(feature = "s3")]
mod bucket;
mod cache;
mod certificates;
mod checks;
mod command_line;
mod context;
mod context_git;
mod disk;
mod escape;
mod hostile;
mod interrupt;
mod kill;
mod limits;
mod mistakes;
mod nested;
mod network;
mod output;
mod ownership;
mod platforms;
mod proxies;
#[path = "../../solver/tests/registry/proxy.rs"]
#[expect(dead_code, reason = "the solver's tests use the rest of it")]
mod proxy;
mod registry;
mod remote_cache;
mod second_registry;
mod story;
