//! Was this text given to the agent a moment ago?
//!
//! An agent that stores what it has recalled makes that more true with every turn: one peer's store held 97.8 % of such
//! echoes (mem0 issue 4573). Agents seldom say `source.kind = "recall"` by themselves, so agentd remembers what it has
//! handed out.
//!
//! In:    texts of hits as they are given; what is told later. Out: a refusal for the long memory and for shared
//!        knowledge; in the log of the run the text stays, as what it is: recalled.
//! Always: what a person says is theirs, also when the agent knew it. A request that was answered once is answered again.
//! Never:  a text: hashes of its runs of five words. One of these belongs to one agent. It is lost with agentd, and then
//!         the store's own guards are left (two gates against duplicates, no promotion of what is marked as recalled).

use agentd_domain::agent_api::{Source, Tier};
use agentd_domain::fault::Report;
use agentd_domain::memory_api::Told;
use agentd_memory::Refusal;
use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, PoisonError};

/// Words in a row: shorter runs are shared by texts that have nothing to do with each other.
const RUN_WORDS: usize = 5;
/// Runs of words that are known: the texts of some hundred hits. 100 KB with their counts.
const KEPT: usize = 4096;
/// A text is an echo when so much of it was given, in hundredths: a sentence around it makes it none.
const ECHO_HUNDREDTHS: usize = 80;
/// Keys of requests that were answered; a retry comes within minutes.
const KEYS_KEPT: usize = 256;

#[derive(Default)]
pub(super) struct Given(Mutex<Known>);

#[derive(Default)]
struct Known {
    runs: Ring,
    keys: Ring,
}

/// The newest hashes, with how often each is among them.
#[derive(Default)]
struct Ring {
    order: VecDeque<u64>,
    count: HashMap<u64, u32>,
}

impl Ring {
    fn add(&mut self, hash: u64, most: usize) {
        self.order.push_back(hash);
        *self.count.entry(hash).or_default() += 1;
        while self.order.len() > most {
            let Some(old) = self.order.pop_front() else { return };
            if let Some(count) = self.count.get_mut(&old) {
                *count -= 1;
                if *count == 0 {
                    self.count.remove(&old);
                }
            }
        }
    }

    fn has(&self, hash: u64) -> bool {
        self.count.contains_key(&hash)
    }
}

impl Given {
    /// These were handed to the agent.
    pub(super) fn note<'a>(&self, texts: impl IntoIterator<Item = &'a str>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for text in texts {
            for run in runs(text) {
                known.runs.add(run, KEPT);
            }
        }
    }

    /// A request with this key was answered.
    pub(super) fn answered(&self, key: &str) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.keys.add(hash(key), KEYS_KEPT);
    }

    /// Refuses an echo, or marks it as one in the log.
    pub(super) fn check(&self, told: &mut Told, key: Option<&str>) -> Result<(), Report> {
        let by_person = told.source.as_ref().is_some_and(|source| source.kind == "user");
        if by_person || !self.is_echo(&told.text, key) {
            return Ok(());
        }
        match told.tier {
            Tier::Spirit | Tier::Knowledge => Err(Refusal::Echo.report()),
            Tier::Working | Tier::Active | Tier::Codegraph => {
                let reference = told.source.take().and_then(|source| source.reference);
                told.source = Some(Source { kind: "recall".to_owned(), reference });
                Ok(())
            }
        }
    }

    fn is_echo(&self, text: &str, key: Option<&str>) -> bool {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if key.is_some_and(|key| known.keys.has(hash(key))) {
            return false;
        }
        let runs = runs(text);
        let given = runs.iter().filter(|run| known.runs.has(**run)).count();
        !runs.is_empty() && given * 100 >= runs.len() * ECHO_HUNDREDTHS
    }
}

/// Hashes of each five words in a row; of a shorter text, of all of it.
fn runs(text: &str) -> Vec<u64> {
    let lower = text.to_lowercase();
    let words: Vec<&str> =
        lower.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
    match words.len() {
        0 => Vec::new(),
        few if few <= RUN_WORDS => vec![hash(&words)],
        _ => words.windows(RUN_WORDS).map(hash).collect(),
    }
}

fn hash(what: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIVEN: &str = "My grandfather built a ship in Kiel, and it sank on its first voyage.";

    fn told(tier: Tier, text: &str, kind: Option<&str>) -> Told {
        let source = kind.map(|kind| serde_json::json!({ "kind": kind }));
        let told = serde_json::json!({ "tier": tier, "text": text, "source": source });
        serde_json::from_value(told).expect("told")
    }

    #[test]
    fn what_was_given_is_not_told_again() {
        let given = Given::default();
        let mut again = told(Tier::Spirit, GIVEN, None);
        given.check(&mut again, None).expect("nothing was given yet");
        given.note([GIVEN]);
        for (text, echo) in [
            (GIVEN, true),
            ("my grandfather built a SHIP in Kiel and it sank on its first voyage", true),
            ("Note: my grandfather built a ship in Kiel, and it sank on its first voyage.", true),
            (
                "My grandfather built a house in Kiel, and it still stands there, with its first tenants in it.",
                false,
            ),
            ("My sister paints.", false),
        ] {
            let refused = given.check(&mut told(Tier::Spirit, text, Some("agent")), None);
            assert_eq!(
                refused.err().map(|report| report.code),
                echo.then(|| "recalled_text".to_owned()),
                "{text}"
            );
        }
    }

    #[test]
    fn a_person_may_say_it_again_and_the_log_calls_an_echo_by_its_name() {
        let given = Given::default();
        given.note([GIVEN]);
        given.check(&mut told(Tier::Spirit, GIVEN, Some("user")), None).expect("a person's word");
        let mut logged = told(Tier::Working, GIVEN, Some("tool"));
        given.check(&mut logged, None).expect("kept");
        assert_eq!(logged.source.map(|source| source.kind), Some("recall".to_owned()));
    }

    #[test]
    fn a_retry_of_what_was_answered_is_none() {
        let given = Given::default();
        given.answered("k");
        given.note([GIVEN]);
        assert!(given.check(&mut told(Tier::Spirit, GIVEN, None), Some("k")).is_ok());
        assert!(given.check(&mut told(Tier::Spirit, GIVEN, None), Some("other")).is_err());
    }

    #[test]
    fn old_ones_are_forgotten_and_memory_is_bounded() {
        let given = Given::default();
        given.note([GIVEN]);
        let long: String = (0..KEPT + RUN_WORDS).map(|n| format!("word{n} ")).collect();
        given.note([long.as_str()]);
        assert!(given.check(&mut told(Tier::Spirit, GIVEN, None), None).is_ok());
        let known = given.0.lock().expect("unpoisoned");
        assert_eq!((known.runs.order.len(), known.runs.count.len()), (KEPT, KEPT));
    }
}
