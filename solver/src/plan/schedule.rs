//! plan/schedule.
