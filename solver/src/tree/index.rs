//! The layer index.
