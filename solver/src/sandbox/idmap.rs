//! sandbox/idmap.
