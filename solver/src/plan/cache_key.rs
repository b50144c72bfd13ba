//! plan/cache_key.
