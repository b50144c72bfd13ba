//! line.
