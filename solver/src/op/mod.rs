//! What vertices do.

pub mod copy;
pub mod passwd;
pub mod run;
pub mod source;
