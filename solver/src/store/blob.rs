//! store/blob.
