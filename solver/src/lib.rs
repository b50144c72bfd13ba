//! Executes a build graph.

pub mod cache;
pub mod context;
mod digest_cache;
pub mod export;
pub mod image;
pub mod key_patterns;
pub mod leak;
pub mod load;
pub mod materialize;
pub mod op;
pub mod plan;
pub mod push;
mod read_ahead;
pub mod registry;
pub mod sandbox;
pub mod scan;
pub mod snapshot;
pub mod solve;
pub mod store;
pub mod sys;
pub mod tree;
pub mod upper;
