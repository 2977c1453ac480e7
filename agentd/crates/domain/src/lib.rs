//! What are the words of the appliance, and which decisions need nothing but data?
//!
//! Owns:  ids, the agent manifest, the sandbox plan, the messages between processes, the management API's
//!        types.
//! Never: a clock, a file, a socket, a thread. What is decided here is done elsewhere: plans are applied by
//!        `agentd-sandbox`, messages are sent by the binaries.
#![forbid(unsafe_code)]

pub mod agent_api;
pub mod api;
pub mod audit;
pub mod config;
pub mod device;
pub mod drivers;
pub mod enforcement;
pub mod engine;
pub mod fault;
pub mod gguf;
pub mod health;
pub mod human;
pub mod ids;
pub mod initctl;
pub mod launcher;
pub mod ledger;
pub mod manifest;
pub mod marker;
pub mod memory_api;
pub mod net;
pub mod netd;
pub mod nodes;
pub mod paths;
pub mod plan;
pub mod rights;
pub mod secret;
pub mod token;
