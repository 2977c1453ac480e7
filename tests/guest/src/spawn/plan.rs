//! The plan that everybody gets, as closely as each can follow it.
//!
//! It is the one that the sandbox's own tests use: a usual agent with all walls, and nothing left out.

use agentd_domain::plan::SandboxPlan;

pub fn plan() -> SandboxPlan {
    let text = include_str!("../../../../agentd/crates/sandbox/tests/fixtures/plan.json");
    let mut plan: SandboxPlan = serde_json::from_str(text).expect("the sandbox's tests read the same file");
    plan.exec = vec!["/agent/one-byte".to_owned()];
    plan
}
