//! op/source.
