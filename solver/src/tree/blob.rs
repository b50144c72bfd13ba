//! Layers as compressed blobs.
