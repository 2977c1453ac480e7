//! What does the log hold of an order of the owner?
//!
//! Always: one record per order, committed before the owner has the answer. An order whose asker has gone meanwhile
//!         is recorded too: it may have been carried out.

use super::Audit;
use agentd_console::auth::{Attempt, Entrance};
use agentd_domain::audit::{Actor, Entry, Verdict};
use agentd_domain::fault::{Fault, Report};
use agentd_domain::ids::AgentId;

/// An order, and what it is about.
pub struct Order {
    pub action: &'static str,
    pub agent: Option<AgentId>,
    /// A name; what is not known before the order is carried out may be added after it.
    pub about: String,
}

impl Audit {
    /// Carries an order out and records how it ended. `learn` may add to the record what the outcome tells.
    pub async fn order<T>(
        &self,
        order: Order,
        work: impl Future<Output = Result<T, Report>>,
        learn: impl FnOnce(&T, &mut Order),
    ) -> Result<T, Report> {
        let mut begun = Begun { audit: self, order: Some(order) };
        let result = work.await;
        let Some(mut order) = begun.order.take() else { return result };
        let entry = match &result {
            Ok(value) => {
                learn(value, &mut order);
                entry(&order, Verdict::Allowed, "")
            }
            // What is no fault of the order was allowed, and failed.
            Err(report) if report.fault == Fault::Caller => entry(&order, Verdict::Denied, &report.code),
            Err(report) => entry(&order, Verdict::Allowed, &report.code),
        };
        self.record(entry).await;
        result
    }
}

struct Begun<'a> {
    audit: &'a Audit,
    order: Option<Order>,
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        if let Some(order) = self.order.take() {
            self.audit.report(entry(&order, Verdict::Allowed, "nobody waited for its end"));
        }
    }
}

fn entry(order: &Order, verdict: Verdict, outcome: &str) -> Entry {
    let detail = match (order.about.as_str(), outcome) {
        (about, "") => about.to_owned(),
        ("", outcome) => outcome.to_owned(),
        (about, outcome) => format!("{about}: {outcome}"),
    };
    let entry = Entry::new(Actor::Owner, order.action, verdict).detail(&detail);
    Entry { agent_id: order.agent, ..entry }
}

/// What the log holds of somebody who wants to come in.
pub fn entrance(attempt: &Attempt<'_>) -> Entry {
    // One socket serves both families, and shows an IPv4 address inside an IPv6 one.
    let peer = attempt.peer.to_canonical();
    let action = match attempt.entrance {
        Entrance::Claim => "claim",
        Entrance::SignIn => "sign_in",
        Entrance::Session => "session",
    };
    match attempt.denied {
        None => Entry::new(Actor::Owner, action, Verdict::Allowed).detail(&format!("from {peer}")),
        Some(denied) => {
            let detail = format!("from {peer}: {}", denied.report().code);
            Entry::new(Actor::Stranger, action, Verdict::Denied).detail(&detail)
        }
    }
}
