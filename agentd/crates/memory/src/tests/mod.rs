//! Tests that need more of the crate than it offers outside.

mod failing_disk;
mod purge;
