//! What does the audit log hold of a connection?
//!
//! | action | when | `right` | `detail` |
//! |---|---|---|---|
//! | `net.connect` | a stream of bytes was decided on | the rule | door and destination |
//! | `net.request` | a request was read and decided on | the rule | door, method, destination; when denied also the path |
//! | `net.resolve` | a name was asked for that no rule knows | | the name |
//! | `net.end` | what was allowed did not get through, or was ended | the rule | destination, address and why |
//!
//! Always: an allowed request is recorded without its path: equal records are counted, and there are as many paths as
//!         an agent can think of. The log bounds all of it once more (`crate::audit`).
//! Never:  a query, a field, a body.

use crate::audit::Audit;
use agentd_domain::audit::{Actor, Entry, Verdict};
use agentd_domain::ids::{AgentId, RunId};
use agentd_egress::audit::{Door, End, Event};
use agentd_egress::{Destination, Refusal, dns};

/// Of one run.
#[derive(Clone)]
pub(super) struct Recorder {
    pub audit: Audit,
    pub agent: AgentId,
    pub run: RunId,
    /// As the plan lists them.
    pub rules: std::sync::Arc<Vec<String>>,
}

impl agentd_egress::Audit for Recorder {
    fn record(&self, event: Event) {
        if let Some(entry) = self.entry(event) {
            self.audit.report(entry);
        }
    }
}

impl Recorder {
    /// Of a question; what has an answer carries nothing out and is not recorded.
    pub(super) fn asked(&self, outcome: &dns::Outcome) {
        let detail = match outcome {
            dns::Outcome::Unknown(name) => name.to_string(),
            dns::Outcome::BadName(error) => format!("not a name: {error}"),
            dns::Outcome::Full(name) => format!("{name}: all synthetic addresses are in use"),
            dns::Outcome::Address(..) | dns::Outcome::NoData(_) | dns::Outcome::Malformed => return,
        };
        self.audit.report(self.begun("net.resolve", Verdict::Denied).detail(&detail));
    }

    fn entry(&self, event: Event) -> Option<Entry> {
        match event {
            Event::Decided { door, destination, request, verdict, .. } => {
                let action = if request.is_some() { "net.request" } else { "net.connect" };
                Some(match verdict {
                    Ok(rule) => {
                        let asked = asked(door, request.map(|(method, _)| method), destination.as_ref());
                        self.by(self.begun(action, Verdict::Allowed), Some(rule)).detail(&asked)
                    }
                    Err(refusal) => {
                        let words = request.map(|(method, path)| format!("{method} {path}"));
                        let asked = asked(door, words, destination.as_ref());
                        let entry = self.by(self.begun(action, Verdict::Denied), rule_of(&refusal));
                        entry.detail(&format!("{asked}: {}", why(&refusal)))
                    }
                })
            }
            Event::Closed { destination, address, rule, end, .. } => {
                let why = match end {
                    End::Refused(refusal) => why(&refusal),
                    End::Revoked => "the rules no longer allow it".to_owned(),
                    End::Finished | End::Lost => return None,
                };
                let at = address.map(|address| format!(" at {}", address.ip())).unwrap_or_default();
                let entry = self.by(self.begun("net.end", Verdict::Denied), Some(rule));
                Some(entry.detail(&format!("{destination}{at}: {why}")))
            }
        }
    }

    fn begun(&self, action: &str, verdict: Verdict) -> Entry {
        Entry::new(Actor::Agent, action, verdict).of_run(self.agent, self.run)
    }

    fn by(&self, entry: Entry, rule: Option<usize>) -> Entry {
        match rule.and_then(|rule| self.rules.get(rule)) {
            Some(rule) => entry.by_right(&format!("net {rule}")),
            None => entry,
        }
    }
}

fn asked(door: Door, words: Option<String>, destination: Option<&Destination>) -> String {
    let door = match door {
        Door::Connect => "CONNECT",
        Door::Forward => "proxy",
        Door::Socks => "SOCKS",
        Door::Captured => "caught",
    };
    let destination = destination.map(ToString::to_string);
    [Some(door.to_owned()), words, destination].into_iter().flatten().collect::<Vec<_>>().join(" ")
}

fn why(refusal: &Refusal) -> String {
    let report = refusal.report();
    format!("{} ({})", report.why, report.code)
}

/// The rule that was looked at, where there is one.
fn rule_of(refusal: &Refusal) -> Option<usize> {
    match refusal {
        Refusal::Protocol { rule, .. }
        | Refusal::Method { rule, .. }
        | Refusal::Path { rule, .. }
        | Refusal::AmbiguousPath { rule, .. }
        | Refusal::EndTls { rule, .. }
        | Refusal::Secret { rule, .. } => Some(*rule),
        _ => None,
    }
}
