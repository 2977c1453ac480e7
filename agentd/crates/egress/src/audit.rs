//! What is written down about each connection?
//!
//! Always: a decision is recorded before a byte follows from it; an allowed connection or request is recorded a
//!         second time when it ends, with its bytes.
//! Never:  contents, headers, or the query of a request: those may be secrets.

use crate::name::Destination;
use crate::refusal::Refusal;
use agentd_domain::ids::AgentId;
use std::net::SocketAddr;

/// Takes events. Called from the connection's task: it must not block.
pub trait Audit: Send + Sync {
    fn record(&self, event: Event);
}

/// Where the agent knocked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Door {
    Connect,
    Forward,
    Socks,
    /// A connection to a synthetic address.
    Captured,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// May it go out, and by which rule?
    Decided {
        agent: AgentId,
        door: Door,
        /// Absent when the agent's words could not be read.
        destination: Option<Destination>,
        /// Method and path, where they were seen.
        request: Option<(String, String)>,
        verdict: Result<usize, Refusal>,
    },
    /// An allowed connection or request is over.
    Closed {
        agent: AgentId,
        door: Door,
        destination: Destination,
        /// What was dialled.
        address: Option<SocketAddr>,
        rule: usize,
        /// From the agent, as they left the appliance.
        bytes_out: u64,
        bytes_in: u64,
        end: End,
    },
}

/// Why it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// Both sides were done.
    Finished,
    /// One side went away.
    Lost,
    /// The rules changed, and no longer allow it.
    Revoked,
    /// Stopped, or never got through.
    Refused(Refusal),
}
