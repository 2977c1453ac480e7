//! Which disk is ours, what is on it, and what may be done to it?
//!
//! [`find`] follows the running root down to its disk; [`table`] keeps the partition table; [`ext4`] says what
//! a partition holds; [`volume`] decides whether it is formatted, checked, or left alone.
//!
//! Never: a search by label or name over all disks. A stick and an internal disk may be clones.

pub mod ext4;
pub mod find;
pub mod table;
pub mod volume;
