//! op/run.
