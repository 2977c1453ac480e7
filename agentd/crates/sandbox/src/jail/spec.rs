//! What do the launcher and a jail say to each other?
//!
//! One message per packet on the socket that the jail finds at [`CONTROL_FD`]. The first is the spec; after that each
//! side sends when it has something to say. The end of the socket is the end of the peer.

use super::Failure;
use agentd_domain::plan::SandboxPlan;
use serde::{Deserialize, Serialize};

/// The one descriptor besides stdio that a jail is born with.
pub const CONTROL_FD: i32 = 3;

/// Everything a jail needs to know. The launcher has checked it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailSpec {
    pub plan: SandboxPlan,
    /// Where the data partition is mounted: `/data`, and another folder in tests.
    pub data_dir: String,
    /// An empty folder on which the new root is put, in the jail's own mount namespace only.
    pub root_mountpoint: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromJail {
    /// All walls are up and the program is running. Descriptors of a run: TCP listener, Unix listener, stdout, stderr,
    /// and the egress's where the plan has one; of a call: stdin, stdout, stderr.
    Up,
    /// The jail of a run is confined, and the agent's process waits for `Go` before it raises its last walls.
    Ready,
    /// The run's namespaces, in the order in which a call enters them.
    Doors,
    /// Nothing of the agent has run, and nothing will.
    Failed { failure: Failure },
    /// The agent's first process has ended: a raw wait status (wait(2)). The jail exits right after.
    Ended { status: i32 },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
// By its own name and not by a tag inside: for a tag, the reader keeps the whole plan in pieces before it reads it.
#[serde(rename_all = "snake_case")]
pub enum ToJail {
    Spec(Box<JailSpec>),
    /// The answer to `Ready`: all limits are in force.
    Go,
    /// Instead of the spec: start this in the run whose doors come with it.
    Call(Box<SandboxPlan>),
    /// To a run: hand out the doors.
    Knock,
    /// SIGTERM to the agent's first process.
    Terminate,
}
