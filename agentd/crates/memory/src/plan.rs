//! May this be stored, and which records answer a question best?
//!
//! In:    requests as agents send them, counters, scores. Out: checked values, refusals, an order.
//! Pure: no clock, no file, no thread. `write.rs` and `read.rs` do what is decided here.

use crate::error::Refusal;
use crate::forget::trust;
use crate::record::{Claim, EVIDENCE_MOST, Role, SourceKind};
use agentd_domain::agent_api::{Recall, Remember, Signals, Tier};
use agentd_domain::ids::RecordId;
use std::collections::BTreeMap;

/// One record is one thought; longer texts are documents and come in parts (the page of the agent API).
pub const TEXT_BYTES_MAX: usize = 32 * 1024;
/// A question of more than about 2,000 words is a document; the embedder reads 512 tokens of it.
pub const QUERY_BYTES_MAX: usize = 8 * 1024;
/// A message id, a URL, a path with its line.
pub const REFERENCE_BYTES_MAX: usize = 1024;
pub const IDEMPOTENCY_KEY_BYTES_MAX: usize = 128;
/// How long a repeated request is recognised: agents retry within minutes, a night's outage fits.
pub const IDEMPOTENCY_KEPT_MS: i64 = 24 * 60 * 60 * 1000;
pub const K_MAX: u32 = 50;
pub const K_DEFAULT: u32 = 5;
/// An English token is about four characters; the answer's budget is counted with this.
pub const CHARS_PER_TOKEN: usize = 4;

/// Neighbours on each side of a hit.
pub const NEIGHBOURS_MOST: u32 = 5;
/// Words of one question that are embedded because no record has them.
pub const ASKED_WORDS_MOST: usize = 16;
/// With a budget of tokens so many times the hits that were asked for are looked at: some do not fit.
const LOOKED_AT_TIMES: usize = 4;

/// What may differ between stores in what they do with a text that is told again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Duplicates {
    /// A text that both gates call known strengthens what is known (`forget/duplicate.rs`).
    Reinforce,
    /// Everything is stored: for an import that must come out as it went in.
    Keep,
}

/// What an agent names a block of its prompt.
pub const BLOCK_KEY_BYTES_MAX: usize = 64;
/// The default of the blocks of a prompt together: about 2,000 tokens with their names and marks.
pub const BLOCK_BYTES_DEFAULT: u64 = 32 * 1024;
/// A run's id, a conversation's name.
pub const SESSION_BYTES_MAX: usize = 128;
/// "Ana", "lives in".
pub const CLAIM_BYTES_MAX: usize = 256;

/// At most so many records and bytes of encoded records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    pub records: u64,
    pub bytes: u64,
}

/// The tiers a store keeps, each with its budget; others are refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Budgets {
    tiers: BTreeMap<Tier, Budget>,
    /// All blocks of the prompt together, names and texts.
    pub block_bytes: u64,
}

impl Budgets {
    pub fn new(budgets: impl IntoIterator<Item = (Tier, Budget)>) -> Self {
        Self { tiers: budgets.into_iter().collect(), block_bytes: BLOCK_BYTES_DEFAULT }
    }

    /// An agent's own store: what happened, word for word, and its long memory.
    pub fn agent() -> Self {
        const MIB: u64 = 1024 * 1024;
        Self::new([
            (Tier::Working, Budget { records: u64::MAX, bytes: 32 * MIB }),
            (Tier::Spirit, Budget { records: 250_000, bytes: 256 * MIB }),
        ])
    }

    /// The shared store: documents and facts of all who may read them.
    pub fn knowledge() -> Self {
        let bytes = 512 * 1024 * 1024;
        Self { block_bytes: 0, ..Self::new([(Tier::Knowledge, Budget { records: u64::MAX, bytes })]) }
    }

    /// An agent's own store within so many bytes and records of all tiers together. The log gets an eighth, what is
    /// always in the prompt a sixty-fourth, each at most what [`Budgets::agent`] has; the long memory has the rest.
    pub fn agent_within(bytes: u64, records: u64) -> Self {
        let usual = Self::agent();
        let most = |tier| usual.of(tier).map_or(0, |budget| budget.bytes);
        let block_bytes = usual.block_bytes.min(bytes / 64);
        let working = Budget { records: records / 8, bytes: most(Tier::Working).min(bytes / 8) };
        let spirit =
            Budget { records: records - working.records, bytes: bytes - working.bytes - block_bytes };
        Self { block_bytes, ..Self::new([(Tier::Working, working), (Tier::Spirit, spirit)]) }
    }

    /// One shared collection within so many bytes and records.
    pub fn knowledge_within(bytes: u64, records: u64) -> Self {
        Self { block_bytes: 0, ..Self::new([(Tier::Knowledge, Budget { records, bytes })]) }
    }

    /// None: the tier is not kept.
    pub fn budget(&self, tier: Tier) -> Option<Budget> {
        self.tiers.get(&tier).copied()
    }

    pub(crate) fn of(&self, tier: Tier) -> Result<Budget, Refusal> {
        self.tiers.get(&tier).copied().ok_or(Refusal::Tier(tier))
    }

    fn default_tiers(&self) -> Vec<Tier> {
        if self.tiers.contains_key(&Tier::Spirit) {
            vec![Tier::Spirit]
        } else {
            self.tiers.keys().copied().collect()
        }
    }
}

/// Records of these tiers get a vector; the others are found by words and time, or under a key.
pub(crate) fn has_meaning(tier: Tier) -> bool {
    matches!(tier, Tier::Spirit | Tier::Knowledge)
}

/// What a request of an agent does not say, but its host or a caller within it may.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Detail {
    /// The run or conversation the record belongs to: its neighbours there are found with it.
    pub session: Option<String>,
    /// Its place in the session; default after all that were told before.
    pub order: Option<u64>,
    pub claim: Option<Claim>,
    /// What it tells is true from then; default: since it happened.
    pub valid_from_unix_ms: Option<i64>,
    /// Until then; default: no end is known.
    pub valid_to_unix_ms: Option<i64>,
    /// Days until half of its strength is gone; default by role.
    pub half_life_days: Option<f32>,
    /// Never goes by itself.
    pub pinned: bool,
    /// What an insight was drawn from; at least one.
    pub evidence: Vec<RecordId>,
}

/// A request to remember that may be stored if there is room.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Checked {
    pub(crate) detail: Detail,
    /// Without spaces around its parts.
    pub(crate) claim: Option<Claim>,
    pub(crate) tier: Tier,
    pub(crate) role: Role,
    pub(crate) source: SourceKind,
    pub(crate) reference: Option<String>,
    pub(crate) text: String,
    pub(crate) event_unix_ms: Option<i64>,
}

pub(crate) fn check_remember(
    request: Remember,
    mut detail: Detail,
    budgets: &Budgets,
) -> Result<Checked, Refusal> {
    budgets.of(request.tier)?;
    check_text(&request.text)?;
    let role = match request.role {
        None => Role::Event,
        Some(name) => Role::from_name(&name).ok_or(Refusal::Role(name))?,
    };
    let (source, reference) = match request.source {
        None => (SourceKind::Agent, None),
        Some(source) => {
            (SourceKind::from_name(&source.kind).ok_or(Refusal::SourceKind(source.kind))?, source.reference)
        }
    };
    if let Some(bytes) = reference.as_ref().map(String::len).filter(|b| *b > REFERENCE_BYTES_MAX) {
        return Err(Refusal::ReferenceTooLong { bytes, most: REFERENCE_BYTES_MAX });
    }
    if !trust::may_be(source, role) {
        return Err(Refusal::Untrusted { role: role.name(), kind: source.name() });
    }
    if trust::is_echo(source) && has_meaning(request.tier) {
        return Err(Refusal::Echo);
    }
    let claim = detail.claim.take().map(check_claim).transpose()?;
    check_detail(&detail, role, request.event_unix_ms)?;
    Ok(Checked {
        detail,
        claim,
        tier: request.tier,
        role,
        source,
        reference,
        text: request.text,
        event_unix_ms: request.event_unix_ms,
    })
}

pub(crate) fn check_text(text: &str) -> Result<(), Refusal> {
    if text.trim().is_empty() {
        return Err(Refusal::TextEmpty);
    }
    match text.len() {
        bytes if bytes > TEXT_BYTES_MAX => Err(Refusal::TextTooLong { bytes, most: TEXT_BYTES_MAX }),
        _ => Ok(()),
    }
}

fn check_claim(claim: Claim) -> Result<Claim, Refusal> {
    let even = |text: String| match text.trim() {
        "" => Err(Refusal::Claim { bytes: 0, most: CLAIM_BYTES_MAX }),
        text if text.len() > CLAIM_BYTES_MAX => {
            Err(Refusal::Claim { bytes: text.len(), most: CLAIM_BYTES_MAX })
        }
        text => Ok(text.to_owned()),
    };
    Ok(Claim { subject: even(claim.subject)?, predicate: even(claim.predicate)?, ..claim })
}

fn check_detail(detail: &Detail, role: Role, event_unix_ms: Option<i64>) -> Result<(), Refusal> {
    if let Some(bytes) =
        detail.session.as_ref().map(String::len).filter(|b| !(1..=SESSION_BYTES_MAX).contains(b))
    {
        return Err(Refusal::Session { bytes, most: SESSION_BYTES_MAX });
    }
    let from = detail.valid_from_unix_ms.or(event_unix_ms);
    if from.zip(detail.valid_to_unix_ms).is_some_and(|(from, to)| from >= to) {
        return Err(Refusal::Interval);
    }
    if detail.half_life_days.is_some_and(|days| days.is_nan() || days <= 0.0) {
        return Err(Refusal::HalfLife);
    }
    if detail.evidence.len() > EVIDENCE_MOST {
        return Err(Refusal::TooMuchEvidence { named: detail.evidence.len(), most: EVIDENCE_MOST });
    }
    if role == Role::Insight && detail.evidence.is_empty() {
        return Err(Refusal::InsightWithoutEvidence);
    }
    Ok(())
}

pub(crate) fn check_key(key: &str) -> Result<(), Refusal> {
    match key.len() {
        1..=IDEMPOTENCY_KEY_BYTES_MAX => Ok(()),
        bytes => Err(Refusal::IdempotencyKey { bytes, most: IDEMPOTENCY_KEY_BYTES_MAX }),
    }
}

/// A question that may be answered.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Question {
    pub(crate) tiers: Vec<Tier>,
    pub(crate) k: usize,
    pub(crate) budget_tokens: Option<u32>,
    pub(crate) signals: Signals,
    pub(crate) explain: bool,
    pub(crate) neighbours: u32,
    pub(crate) at: At,
}

/// Of which time a question is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum At {
    /// What stands now: nothing that a later record took the place of.
    #[default]
    Latest,
    /// What was true then (Unix milliseconds), as far as it is known now.
    Time(i64),
}

pub(crate) fn check_recall(request: &Recall, at: At, budgets: &Budgets) -> Result<Question, Refusal> {
    if request.query.trim().is_empty() {
        return Err(Refusal::QueryEmpty);
    }
    if request.query.len() > QUERY_BYTES_MAX {
        return Err(Refusal::QueryTooLong { bytes: request.query.len(), most: QUERY_BYTES_MAX });
    }
    let k = request.k.unwrap_or(K_DEFAULT);
    if !(1..=K_MAX).contains(&k) {
        return Err(Refusal::K { k, most: K_MAX });
    }
    let mut tiers = if request.tiers.is_empty() { budgets.default_tiers() } else { request.tiers.clone() };
    tiers.sort_unstable();
    tiers.dedup();
    for tier in &tiers {
        budgets.of(*tier)?;
    }
    Ok(Question {
        tiers,
        k: k as usize,
        budget_tokens: request.budget_tokens,
        signals: request.signals.unwrap_or(Signals::Both),
        explain: request.explain,
        neighbours: request.neighbours.unwrap_or(0).min(NEIGHBOURS_MOST),
        at,
    })
}

/// How many of the best are looked at for an answer.
pub(crate) fn looked_at(question: &Question) -> usize {
    match question.budget_tokens {
        None => question.k,
        Some(_) => LOOKED_AT_TIMES * question.k,
    }
}

/// What a text costs in an answer.
pub(crate) fn tokens(text: &str) -> u32 {
    u32::try_from(text.chars().count().div_ceil(CHARS_PER_TOKEN)).unwrap_or(u32::MAX)
}

/// What an answer may still cost. A text that does not fit is left out, and a shorter one after it may still fit: the budget
/// is a promise, the order is not broken.
pub(crate) struct Purse {
    /// None: whatever it costs.
    left_tokens: Option<u32>,
}

impl Purse {
    pub(crate) fn new(budget_tokens: Option<u32>) -> Self {
        Self { left_tokens: budget_tokens }
    }

    /// Whether the text fits; then it is paid for.
    pub(crate) fn pays(&mut self, text: &str) -> bool {
        let Some(left) = &mut self.left_tokens else { return true };
        match left.checked_sub(tokens(text)) {
            None => false,
            Some(rest) => {
                *left = rest;
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_leaves_out_what_does_not_fit() {
        let texts = ["12345678", "123456789012", "1234", "12345"];
        let paid = |budget| {
            let mut purse = Purse::new(budget);
            texts.iter().copied().filter(|text| purse.pays(text)).collect::<Vec<_>>()
        };
        assert_eq!(paid(Some(3)), ["12345678", "1234"]);
        assert_eq!(paid(None), texts);
        assert_eq!(tokens("ééééé"), 2, "characters, not bytes");
    }
}
