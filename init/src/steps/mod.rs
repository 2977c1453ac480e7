//! The steps of the boot, each a function of the machine. The order stands in [`crate::boot`].

pub mod clock;
pub mod config;
pub mod control_groups;
pub mod crashes;
pub mod disk;
pub mod drivers;
pub mod kernel;
pub mod medium;
pub mod provisioning;
pub mod sysctl;
pub mod terminals;
pub mod volumes;
pub mod walls;
