//! What vertices do.

pub mod copy;
pub mod run;
pub mod source;
