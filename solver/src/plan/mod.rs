//! Computes what to do; touches nothing.

pub mod cache_key;
pub mod explain;
pub mod schedule;
