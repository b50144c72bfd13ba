//! From Dockerfile text to a build graph. Pure: no files, processes, network, clock or environment.

pub mod check;
pub mod diagnostic;
pub mod flag;
pub mod image_config;
pub mod instruction;
pub mod line;
pub mod llb;
pub mod lower;
pub mod lower_problem;
pub mod mode;
pub mod outline;
pub mod parser;
pub mod platform;
mod print;
pub mod reference;
pub mod source;
pub mod stage;
pub mod units;
pub mod word;
