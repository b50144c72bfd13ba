//! store/layers.
