//! Registry client.

pub mod auth;
pub mod client;
