//! How does the owner give agents a secret that they never see?
//!
//! | method and path | who | body | answer |
//! |---|---|---|---|
//! | `GET /api/v1/secrets` | session | | `[`[`SecretInfo`]`]` |
//! | `POST /api/v1/secrets` | session | [`SecretOrder`] | 204 |
//! | `DELETE /api/v1/secrets/{name}?agent=NAME` | session | | 204 |
//!
//! Never: a value on its way out. There is no route that gives one.

use crate::ids::{AgentId, AgentName};
use crate::net::Host;
use crate::net::rule::SecretName;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A secret takes the place of the one with the same name for the same agent.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretOrder {
    pub name: SecretName,
    /// Name or id of the one agent that it is for; absent for every agent whose rule names one of the hosts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
    /// The only hosts that may get it; empty, with an agent: those of that agent's own rules.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<Host>,
    pub value: String,
}

/// All that is shown of a secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretInfo {
    pub name: SecretName,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<AgentId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<AgentName>,
    pub hosts: Vec<Host>,
}

impl fmt::Debug for SecretOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretOrder")
            .field("name", &self.name)
            .field("agent", &self.agent)
            .finish_non_exhaustive()
    }
}
