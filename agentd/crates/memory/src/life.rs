//! What of a record changes while its text stays?
//!
//! In:    a [`Life`]. Out: the 96 bytes of a value of the table `life`, and back. FORMAT.md lists them.
//! Why apart from the record: being recalled, pinned or forgotten must not write a text anew, and a question needs
//!         these numbers of every record but the texts only of a few. They are not sealed: they hold no word.
//! Always: the last four bytes are the CRC-32 of all before.

use crate::error::Damage;
use crate::rank::{asks, speaker, tells_time};
use crate::record::{Role, SourceKind, tier_code, tier_from_code};
use crate::seal::Mark;
use agentd_domain::agent_api::Tier;

pub(crate) const LIFE_BYTES: usize = 96;

/// Where a record stands between being told and being gone.
///
/// ```text
/// Live --correct, newer claim--> Superseded --rollback of the newer--> Live
/// Live, Superseded --forget, eviction, rollback--> Forgotten --restore--> Live or Superseded
/// Forgotten --seven days, or its room is needed--> (no row)
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    Live,
    /// A later one took its place; found only by questions about then.
    Superseded,
    /// A tombstone: found by no question, restorable.
    Forgotten,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Life {
    pub tier: Tier,
    pub role: Role,
    pub source: SourceKind,
    pub state: State,
    /// What it was before it was forgotten, to go back to.
    pub before: State,
    pub pinned: bool,
    /// How far its source is believed, in hundredths.
    pub trust: u8,
    /// Words without stop words: the length that BM25 knows.
    pub words: u32,
    /// How often it was recalled.
    pub uses: u32,
    /// 0 to 1; rises with every recall.
    pub strength: f32,
    /// Infinite: does not fade.
    pub half_life_days: f32,
    /// When it happened.
    pub event_unix_ms: i64,
    /// When it was told.
    pub recorded_unix_ms: i64,
    /// What it tells is true from then ..
    pub valid_from_unix_ms: i64,
    /// .. until then; `i64::MAX`: no end is known.
    pub valid_to_unix_ms: i64,
    /// When it was recalled last, or told.
    pub last_used_unix_ms: i64,
    /// When its state changed last; 0: never.
    pub changed_unix_ms: i64,
    /// Which run or conversation it belongs to: 8 bytes of a hash; 0: none.
    pub session: u64,
    /// Its place in the session. Neighbours are the next smaller and the next larger of the same session.
    pub order: u64,
    /// Bytes of the record's content: what a budget counts.
    pub bytes: u32,
    /// What its text tells besides its words; none: nobody has looked yet.
    pub told: Option<Told>,
}

/// Read from the text when the record is written, so that no question needs the text for it (`rank/told.rs`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Told {
    /// 24 bits of the keyed hash of who says it; 0: nobody is named.
    pub speaker: u32,
    /// It ends with a question mark.
    pub asks: bool,
    /// It has words of time.
    pub tells_time: bool,
}

/// No end of validity is known.
pub(crate) const OPEN_END: i64 = i64::MAX;

const PINNED: u8 = 1;
const ASKS: u8 = 2;
const TELLS_TIME: u8 = 4;
/// Somebody has looked.
const TOLD: u8 = 8;

impl Told {
    /// `mark` gives the keyed hash of a term.
    pub(crate) fn read(text: &str, mark: impl FnOnce(&str) -> Mark) -> Self {
        let speaker = speaker(text).map_or(0, |term| speaker_number(&mark(&term)));
        Self { speaker, asks: asks(text), tells_time: tells_time(text) }
    }
}

/// How a speaker stands in a life: never 0.
pub(crate) fn speaker_number(mark: &Mark) -> u32 {
    u32::from_le_bytes([mark[0], mark[1], mark[2], 0]).max(1)
}

impl State {
    fn code(self) -> u8 {
        match self {
            Self::Live => 0,
            Self::Superseded => 1,
            Self::Forgotten => 2,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        [Self::Live, Self::Superseded, Self::Forgotten].get(usize::from(code)).copied()
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Superseded => "superseded",
            Self::Forgotten => "forgotten",
        }
    }
}

impl Life {
    pub(crate) fn to_bytes(self) -> [u8; LIFE_BYTES] {
        let mut out = Vec::with_capacity(LIFE_BYTES);
        out.extend([tier_code(self.tier), self.role.code(), self.source.code(), self.state.code()]);
        let flag = |there: bool, flag: u8| if there { flag } else { 0 };
        let told = self.told.unwrap_or_default();
        let flags = flag(self.pinned, PINNED)
            | flag(told.asks, ASKS)
            | flag(told.tells_time, TELLS_TIME)
            | flag(self.told.is_some(), TOLD);
        let [a, b, c, _] = told.speaker.to_le_bytes();
        out.extend([self.before.code(), flags, self.trust, a]);
        // A text of 32 KiB has fewer than 2^16 terms.
        out.extend(u16::try_from(self.words).unwrap_or(u16::MAX).to_le_bytes());
        out.extend([b, c]);
        out.extend(self.uses.to_le_bytes());
        out.extend(self.strength.to_le_bytes());
        out.extend(self.half_life_days.to_le_bytes());
        for time in [
            self.event_unix_ms,
            self.recorded_unix_ms,
            self.valid_from_unix_ms,
            self.valid_to_unix_ms,
            self.last_used_unix_ms,
            self.changed_unix_ms,
        ] {
            out.extend(time.to_le_bytes());
        }
        out.extend(self.session.to_le_bytes());
        out.extend(self.order.to_le_bytes());
        out.extend(self.bytes.to_le_bytes());
        let crc = crc32fast::hash(&out);
        out.extend(crc.to_le_bytes());
        let mut row = [0; LIFE_BYTES];
        row.copy_from_slice(&out);
        row
    }

    pub(crate) fn from_bytes(seq: u64, row: &[u8; LIFE_BYTES]) -> Result<Self, Damage> {
        let damage = |why: &str| Damage::Record { seq, why: format!("its life: {why}") };
        let (body, crc) = row.split_at(LIFE_BYTES - 4);
        if crc32fast::hash(body).to_le_bytes() != crc {
            return Err(damage("checksum"));
        }
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| row[at + i]));
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| row[at + i]));
        let i64_at = |at: usize| i64::from_le_bytes(std::array::from_fn(|i| row[at + i]));
        Ok(Self {
            tier: tier_from_code(row[0]).ok_or_else(|| damage("tier"))?,
            role: Role::from_code(row[1]).ok_or_else(|| damage("role"))?,
            source: SourceKind::from_code(row[2]).ok_or_else(|| damage("source"))?,
            state: State::from_code(row[3]).ok_or_else(|| damage("state"))?,
            before: State::from_code(row[4]).ok_or_else(|| damage("state before"))?,
            pinned: row[5] & PINNED != 0,
            trust: row[6],
            words: u32::from(u16::from_le_bytes([row[8], row[9]])),
            uses: u32_at(12),
            strength: f32::from_bits(u32_at(16)),
            half_life_days: f32::from_bits(u32_at(20)),
            event_unix_ms: i64_at(24),
            recorded_unix_ms: i64_at(32),
            valid_from_unix_ms: i64_at(40),
            valid_to_unix_ms: i64_at(48),
            last_used_unix_ms: i64_at(56),
            changed_unix_ms: i64_at(64),
            session: u64_at(72),
            order: u64_at(80),
            bytes: u32_at(88),
            told: (row[5] & TOLD != 0).then(|| Told {
                speaker: u32::from_le_bytes([row[7], row[10], row[11], 0]),
                asks: row[5] & ASKS != 0,
                tells_time: row[5] & TELLS_TIME != 0,
            }),
        })
    }

    /// How present it is, 0 to 1: its strength, faded by its half-life, as far as its source is believed.
    pub fn presence(&self, now_unix_ms: i64) -> f32 {
        crate::forget::decay::effective(self, now_unix_ms)
    }

    /// Is what it tells true at this time? A forgotten one is never.
    pub fn holds_at(&self, unix_ms: i64) -> bool {
        self.state != State::Forgotten && (self.valid_from_unix_ms..self.valid_to_unix_ms).contains(&unix_ms)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::record::TIERS;
    use proptest::prelude::*;

    pub(crate) fn any_life() -> impl Strategy<Value = Life> {
        let state = || (0u8..3).prop_map(|code| State::from_code(code).unwrap());
        (
            (0usize..5, 0u8..6, 0u8..5, state(), state(), any::<bool>(), 0u8..=100),
            (0u32..1 << 16, any::<u32>(), 0f32..=1.0, prop_oneof![0.1f32..1e5, Just(f32::INFINITY)]),
            any::<[i64; 6]>(),
            (any::<u64>(), any::<u64>(), any::<u32>()),
            proptest::option::of((0u32..1 << 24, any::<bool>(), any::<bool>())),
        )
            .prop_map(|(a, b, times, c, told)| Life {
                tier: TIERS[a.0],
                role: Role::from_code(a.1).unwrap(),
                source: SourceKind::from_code(a.2).unwrap(),
                state: a.3,
                before: a.4,
                pinned: a.5,
                trust: a.6,
                words: b.0,
                uses: b.1,
                strength: b.2,
                half_life_days: b.3,
                event_unix_ms: times[0],
                recorded_unix_ms: times[1],
                valid_from_unix_ms: times[2],
                valid_to_unix_ms: times[3],
                last_used_unix_ms: times[4],
                changed_unix_ms: times[5],
                session: c.0,
                order: c.1,
                bytes: c.2,
                told: told.map(|(speaker, asks, tells_time)| Told { speaker, asks, tells_time }),
            })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(life in any_life()) {
            prop_assert_eq!(Life::from_bytes(1, &life.to_bytes()).unwrap(), life);
        }

        #[test]
        fn one_flipped_bit_is_noticed(life in any_life(), at in 0..LIFE_BYTES, bit in 0u8..8) {
            let mut row = life.to_bytes();
            row[at] ^= 1 << bit;
            prop_assert!(Life::from_bytes(1, &row).is_err());
        }
    }

    #[test]
    fn an_interval_is_closed_at_its_beginning_and_open_at_its_end() {
        let mut life = blank_life();
        (life.valid_from_unix_ms, life.valid_to_unix_ms) = (10, 20);
        assert!(!life.holds_at(9) && life.holds_at(10) && life.holds_at(19) && !life.holds_at(20));
        life.state = State::Forgotten;
        assert!(!life.holds_at(10));
    }

    pub(crate) fn blank_life() -> Life {
        Life {
            tier: Tier::Spirit,
            role: Role::Fact,
            source: SourceKind::User,
            state: State::Live,
            before: State::Live,
            pinned: false,
            trust: 100,
            words: 0,
            uses: 0,
            strength: 1.0,
            half_life_days: 14.0,
            event_unix_ms: 0,
            recorded_unix_ms: 0,
            valid_from_unix_ms: 0,
            valid_to_unix_ms: OPEN_END,
            last_used_unix_ms: 0,
            changed_unix_ms: 0,
            session: 0,
            order: 0,
            bytes: 0,
            told: None,
        }
    }
}
