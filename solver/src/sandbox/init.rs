//! sandbox/init.
