//! registry/client.
