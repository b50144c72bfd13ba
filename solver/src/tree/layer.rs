//! Layers as tar streams.
