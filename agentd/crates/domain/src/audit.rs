//! What was allowed, denied or killed, by which right, and who vouches for the list?
//!
//! Owns:  the values of the audit log and their one text form. `agentd-audit` chains, signs and verifies them;
//!        agentd keeps them.
//! In:    an [`Entry`] from whoever decided. Out: a [`Record`] with its place in the log.
//! Always: a value's text is canonical JSON (RFC 8785). The fields below stand in alphabetical order, integers stay
//!         below 2^53, and serde_json escapes texts as ECMAScript does; a test compares. Texts are bounded.
//! Never:  a prompt, an answer, a password or a secret: a text names what was asked for.
//!
//! | action | actor | `right` | `detail` |
//! |---|---|---|---|
//! | `api.use` | agent | the right that was looked up | |
//! | `agent.install`, `.start`, `.stop`, `.remove` | owner | | the agent's name, or the code of the refusal |
//! | `model.add`, `.pull`, `.remove`, `.pin`, `.unpin`, `machine.reboot`, `.poweroff` | owner | | the model's name, or the code |
//! | `claim`, `sign_in` | owner or stranger | | the peer's address, the code of the refusal |
//! | `memory.read`, `.search`, `.correct`, `.pin`, `.forget`, `.restore`, `.purge`, `.block`, `.check` | owner | | the agent and the record's id, the code of the refusal; no word of it |
//! | `knowledge.read`, `.set`, `.remove`, `.grant`, `.revoke`, `.write` | owner | | the collection, and whom it is for |
//! | `secret.set`, `secret.remove` | owner | | the secret's name and whom it is for |
//! | `net.connect`, `.request`, `.resolve`, `.end` | agent | `net` and the rule | door and destination; why not |
//! | `session` | stranger | | the same, of a request that had no session or one that is none |
//! | `run.end` | appliance | | how seccomp ended the run, and for which system call |
//! | `run.process` | agent | | for which system call seccomp killed a process of a run that lives on |
//! | `health.pain`, `.stuck`, `.throttled`, `.restored` | agent | | what was seen; of a pain its severity and kind alone |
//! | `health.killed`, `.quarantined`, `.probe`, `.recovered` | appliance | | what was done |
//! | `agents.start` | agent | the right or limit that stood against a child | why |
//! | `token.hand_on`, `agent.remove` | agent | `agents.start` | its child |
//! | `token.use` | agent | | a token that holds no more, or was brought and refused: `token_stolen` is another's |
//! | `token.mint`, `.revoke`, `.verify` | owner | | the agent or the id, the code of the refusal |
//! | `run.start`, `token.end`, `agent.remove` | appliance | | a run refused or killed for its token, an orphan removed |
//! | `device.event`, `engine.end` | appliance | | what a device's driver said; an engine that was ended for a lost device |
//! | `audit.begin`, `audit.key`, `audit.damaged` | appliance | | what happened to the log itself |
//! | `audit.overflow` | whose they were | | `count` records of this verdict are not kept one by one |

use crate::ids::{AgentId, RunId};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Version of [`Record`] and [`Head`].
pub const VERSION: u32 = 1;
/// Rights and actions are our own words; the longest right names a host (253 bytes, RFC 1035) and its rule.
pub const WORD_MOST_BYTES: usize = 320;
/// A path, an address, a reason. With everything escaped a record stays below 8 KiB.
pub const DETAIL_MOST_BYTES: usize = 512;

/// Who wanted it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Actor {
    /// A run, known by its socket.
    Agent,
    /// Somebody with a session.
    Owner,
    /// Somebody without.
    Stranger,
    /// agentd, or the kernel on its behalf.
    Appliance,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Allowed,
    Denied,
    /// A wall of the kernel ended the run, or agentd did for what the kernel counted.
    Killed,
}

/// One decision, as it is reported. Equal entries that follow each other closely are counted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Entry {
    pub actor: Actor,
    pub action: String,
    pub verdict: Verdict,
    pub agent_id: Option<AgentId>,
    pub run_id: Option<RunId>,
    pub right: Option<String>,
    pub detail: String,
}

impl Entry {
    pub fn new(actor: Actor, action: &str, verdict: Verdict) -> Self {
        Self {
            actor,
            action: clipped(action, WORD_MOST_BYTES),
            verdict,
            agent_id: None,
            run_id: None,
            right: None,
            detail: String::new(),
        }
    }

    pub fn of_agent(self, agent_id: AgentId) -> Self {
        Self { agent_id: Some(agent_id), ..self }
    }

    pub fn of_run(self, agent_id: AgentId, run_id: RunId) -> Self {
        Self { agent_id: Some(agent_id), run_id: Some(run_id), ..self }
    }

    pub fn by_right(self, right: &str) -> Self {
        Self { right: Some(clipped(right, WORD_MOST_BYTES)), ..self }
    }

    /// What is longer than [`DETAIL_MOST_BYTES`] is cut there.
    pub fn detail(self, detail: &str) -> Self {
        Self { detail: clipped(detail, DETAIL_MOST_BYTES), ..self }
    }
}

/// One line of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    pub action: String,
    pub actor: Actor,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<AgentId>,
    /// Milliseconds since the start of the kernel: a clock that was set does not confuse it.
    pub boot_ms: u64,
    /// How many equal decisions this record stands for, the last of them at its time.
    pub count: u32,
    pub detail: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub right: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_id: Option<RunId>,
    /// From 1, without gaps, never given twice.
    pub seq: u64,
    pub unix_ms: i64,
    pub v: u32,
    pub verdict: Verdict,
}

/// A record with the hash that binds it to all before it: one line of an export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Linked {
    pub hash: Digest,
    pub record: Record,
}

/// What a signature vouches for: the log from `first_seq` to `seq` and nothing before it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// The hash of the record before `first_seq`, which is no longer kept; of the beginning when nothing was dropped.
    pub before: Digest,
    /// The oldest record kept. Older ones were dropped to keep the log bounded.
    pub first_seq: u64,
    /// The hash of the record `seq`.
    pub hash: Digest,
    pub key: PublicKey,
    /// The newest record; 0 before the first.
    pub seq: u64,
    pub unix_ms: i64,
    pub v: u32,
}

/// The other kind of line of an export; it stands after the record `seq`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignedHead {
    pub head: Head,
    pub signature: Signature,
}

macro_rules! hex_bytes {
    ($(#[$doc:meta])* $name:ident, $length:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(pub [u8; $length]);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{self}")
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl FromStr for $name {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                let mut bytes = [0; $length];
                read_hex(text, &mut bytes)?;
                Ok(Self(bytes))
            }
        }

        impl TryFrom<String> for $name {
            type Error = String;
            fn try_from(text: String) -> Result<Self, String> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(bytes: $name) -> String {
                bytes.to_string()
            }
        }
    };
}

hex_bytes!(
    /// SHA-256, lower-case hex in text.
    Digest, 32
);
hex_bytes!(
    /// Ed25519 (RFC 8032), lower-case hex in text.
    PublicKey, 32
);
hex_bytes!(
    /// Ed25519 (RFC 8032), lower-case hex in text.
    Signature, 64
);

/// One spelling only: two texts of one value would be two lines with one hash.
fn read_hex(text: &str, bytes: &mut [u8]) -> Result<(), String> {
    let digit = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    let wanted = bytes.len() * 2;
    let bad = || format!("`{}` is not {wanted} lower-case hexadecimal digits", text.escape_debug());
    if text.len() != wanted {
        return Err(bad());
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let [high, low] = pair else { return Err(bad()) };
        *byte = digit(*high).ok_or_else(bad)? << 4 | digit(*low).ok_or_else(bad)?;
    }
    Ok(())
}

fn clipped(text: &str, most_bytes: usize) -> String {
    let end = (0..=most_bytes.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
    text[..end.unwrap_or(0)].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;
    use std::collections::BTreeMap;
    use uuid::Uuid;

    /// RFC 8785 for values without fractions, by another way than serde's derive.
    fn canonical(value: &Value) -> String {
        match value {
            Value::Object(fields) => {
                let sorted: BTreeMap<_, _> = fields.iter().collect();
                let text = sorted.iter().map(|(name, value)| format!("{name:?}:{}", canonical(value)));
                format!("{{{}}}", text.collect::<Vec<_>>().join(","))
            }
            Value::String(text) => format!("\"{}\"", text.chars().map(escaped).collect::<String>()),
            other => other.to_string(),
        }
    }

    /// Quote of a character as in ECMAScript's `QuoteJSONString`.
    fn escaped(c: char) -> String {
        match c {
            '"' => "\\\"".into(),
            '\\' => "\\\\".into(),
            '\u{8}' => "\\b".into(),
            '\t' => "\\t".into(),
            '\n' => "\\n".into(),
            '\u{c}' => "\\f".into(),
            '\r' => "\\r".into(),
            c if c < ' ' => format!("\\u{:04x}", u32::from(c)),
            c => c.into(),
        }
    }

    fn record(detail: String, right: Option<String>, seq: u64, some: bool) -> Record {
        Record {
            action: "api.use".into(),
            actor: Actor::Agent,
            agent_id: some.then_some(AgentId(Uuid::from_u128(1))),
            boot_ms: 5,
            count: 1,
            detail,
            right,
            run_id: some.then_some(RunId(Uuid::from_u128(2))),
            seq,
            unix_ms: -7,
            v: VERSION,
            verdict: Verdict::Denied,
        }
    }

    proptest! {
        #[test]
        fn texts_are_canonical(
            detail in any::<String>(), right in any::<Option<String>>(), seq in 0u64..1 << 53, some: bool,
        ) {
            let linked = Linked { hash: Digest([0xab; 32]), record: record(detail, right, seq, some) };
            let text = serde_json::to_string(&linked).expect("JSON");
            let value: Value = serde_json::from_str(&text).expect("JSON");
            prop_assert_eq!(&text, &canonical(&value));
            prop_assert_eq!(serde_json::from_str::<Linked>(&text).expect("a record"), linked);
        }

        #[test]
        fn a_long_detail_is_cut_between_characters(text in any::<String>()) {
            let entry = Entry::new(Actor::Agent, "a", Verdict::Denied).detail(&text.repeat(40));
            prop_assert!(entry.detail.len() <= DETAIL_MOST_BYTES);
            prop_assert!(text.repeat(40).starts_with(&entry.detail));
        }
    }

    #[test]
    fn a_head_is_canonical_too() {
        let head = Head {
            before: Digest([1; 32]),
            first_seq: 3,
            hash: Digest([2; 32]),
            key: PublicKey([3; 32]),
            seq: 9,
            unix_ms: 4,
            v: VERSION,
        };
        let text = serde_json::to_string(&SignedHead { head, signature: Signature([4; 64]) }).expect("JSON");
        assert_eq!(text, canonical(&serde_json::from_str(&text).expect("JSON")));
    }

    #[test]
    fn hex_has_one_spelling() {
        let good = "0f".repeat(32);
        assert_eq!(good.parse::<Digest>().expect("good").to_string(), good);
        for bad in ["0F".repeat(32), "0f".repeat(31), "0g".repeat(32), "é".repeat(32), String::new()] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }
}
