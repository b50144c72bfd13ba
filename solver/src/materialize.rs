//! materialize.
