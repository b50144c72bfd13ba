//! store/record.
