//! registry/auth.
