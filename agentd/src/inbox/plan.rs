//! Which message does an agent get next, and which earlier turns go with it?
//!
//! Pure. A message belongs to the run that was given it until it is answered, its lease is over, the answer's
//! connection broke, or another run asks, because then the first one is gone.

use crate::store::{MessageRow, MessageState, Outcome};
use agentd_domain::engine::ChatMessage;
use agentd_domain::ids::RunId;
use std::collections::HashMap;

/// A slow model on a slow machine may think for minutes; after this the message is given out again.
pub const LEASE_MS: u64 = 15 * 60_000;
/// A message that ended so many deliveries is not given out again: it may be what ends the agent.
pub const ATTEMPTS_MOST: u32 = 5;
/// Earlier turns that go with a message.
pub const HISTORY_TURNS: usize = 10;
const HISTORY_BYTES: usize = 8 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    pub run: RunId,
    pub until_boot_ms: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pick {
    Deliver(u64),
    /// It was given out too often.
    GiveUp(u64),
    Nothing,
}

/// `waiting` holds number and attempts, oldest first.
pub fn pick(waiting: &[(u64, u32)], leases: &HashMap<u64, Lease>, run: RunId, now_boot_ms: u64) -> Pick {
    let free = |seq: u64| match leases.get(&seq) {
        None => true,
        Some(lease) => lease.run != run || now_boot_ms >= lease.until_boot_ms,
    };
    match waiting.iter().find(|(seq, _)| free(*seq)) {
        None => Pick::Nothing,
        Some(&(seq, attempts)) if attempts >= ATTEMPTS_MOST => Pick::GiveUp(seq),
        Some(&(seq, _)) => Pick::Deliver(seq),
    }
}

/// The newest answered turns with this sender, oldest first; `rows` come newest first.
pub fn history(rows: &[MessageRow], from: &str) -> Vec<ChatMessage> {
    let mut turns = Vec::new();
    let mut bytes = 0;
    for row in rows.iter().filter(|row| row.from == from) {
        let MessageState::Answered { outcome: Outcome::Done { text, .. }, .. } = &row.state else { continue };
        bytes += row.text.len() + text.len();
        if turns.len() == HISTORY_TURNS || bytes > HISTORY_BYTES {
            break;
        }
        turns.push((row.text.clone(), text.clone()));
    }
    let message = |role: &str, content| ChatMessage { role: role.to_owned(), content };
    turns
        .into_iter()
        .rev()
        .flat_map(|(asked, answered)| [message("user", asked), message("assistant", answered)])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn run(n: u128) -> RunId {
        RunId(Uuid::from_u128(n))
    }

    #[test]
    fn a_leased_message_is_not_given_to_its_run_again_and_to_another_at_once() {
        let waiting = [(1, 1), (2, 0)];
        let leases = HashMap::from([(1, Lease { run: run(1), until_boot_ms: 100 })]);
        assert_eq!(pick(&waiting, &leases, run(1), 99), Pick::Deliver(2));
        assert_eq!(pick(&waiting, &leases, run(1), 100), Pick::Deliver(1));
        assert_eq!(pick(&waiting, &leases, run(2), 0), Pick::Deliver(1));
    }

    #[test]
    fn a_message_that_ends_its_agent_is_given_up() {
        assert_eq!(pick(&[(3, ATTEMPTS_MOST)], &HashMap::new(), run(1), 0), Pick::GiveUp(3));
        assert_eq!(pick(&[], &HashMap::new(), run(1), 0), Pick::Nothing);
    }

    #[test]
    fn history_is_the_senders_newest_turns_within_bounds() {
        let row = |from: &str, text: &str, answer: Option<&str>| MessageRow {
            v: 1,
            from: from.to_owned(),
            text: text.to_owned(),
            sent_unix_ms: 0,
            key: None,
            state: match answer {
                None => MessageState::Waiting,
                Some(text) => MessageState::Answered {
                    outcome: Outcome::Done { text: text.to_owned(), notes: vec![] },
                    unix_ms: 0,
                },
            },
        };
        let rows = [
            row("a", "4", Some("four")),
            row("a", "3", None),
            row("b", "2", Some("two")),
            row("a", "1", Some("one")),
        ];
        let said: Vec<_> = history(&rows, "a").into_iter().map(|m| (m.role, m.content)).collect();
        let expect = [("user", "1"), ("assistant", "one"), ("user", "4"), ("assistant", "four")];
        assert_eq!(said, expect.map(|(role, text)| (role.to_owned(), text.to_owned())));
        let long = "x".repeat(HISTORY_BYTES);
        assert!(history(&[row("a", &long, Some("y"))], "a").is_empty());
        let many: Vec<_> = (0..40).map(|_| row("a", "q", Some("r"))).collect();
        assert_eq!(history(&many, "a").len(), 2 * HISTORY_TURNS);
    }
}
