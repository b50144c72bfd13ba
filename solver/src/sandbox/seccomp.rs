//! sandbox/seccomp.
