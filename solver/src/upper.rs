//! upper.
