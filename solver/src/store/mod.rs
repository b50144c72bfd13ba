//! The store on disk.

pub mod blob;
pub mod layers;
pub mod record;
