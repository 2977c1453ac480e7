//! How does a person, or `agentctl`, see and steer the appliance?
#![forbid(unsafe_code)]

pub mod appliance;
mod state;

pub use appliance::{Appliance, Flow, Follow, LogQuery, Pending, Upload};
pub use state::StateFiles;
