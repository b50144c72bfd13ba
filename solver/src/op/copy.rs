//! op/copy.
