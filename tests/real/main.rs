//! What people build: a Node service, a multi-stage program, apt-get and pip in a Debian base. The bases come from
//! Debian's packages (mmdebstrap), the results are read by skopeo, umoci, runc and podman.
//!
//! Needs the network for Debian's packages, npm and PyPI, and the programs that `make test` installs; a missing one
//! fails the test. The same tests run as root and as an ordinary user with subordinate IDs.

#![expect(clippy::disallowed_methods, reason = "a test may be told where its bases are")]

mod bases;
mod build;
mod debian;
mod node;
mod readers;
mod stages;
