//! Archives that ADD unpacks.
