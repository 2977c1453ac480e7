//! In which order do records answer a question?
//!
//! In:     a [`Question`] that was read, how near its vector is to each record's ([`Nearness`]), and a [`Corpus`]:
//!         postings, neighbours and facts, from whatever index holds them.
//! Out:    records, best first, each with every [`Signal`] that it was judged by.
//! Steps:  words score every record that has one ([`words`]); the best few hundred by words and meaning are the pool;
//!         all signals are taken of these; the weighted sum decides; from the sixth place on, a neighbour of
//!         what is listed already waits ([`diverse`]).
//! Always: a signal of a record depends on the question, the record, its neighbours and its session, so nothing is
//!         recomputed when a record is added. The sum is linear: what is explained is what was counted.
//! Never:  a file, a clock, a model, a thread; no weight from a person's taste ([`weights`] says how they were found).
//! Cost:   one pass over the postings of the question's words and their kin, one over the nearness of all records.
//!
//! # How a store feeds it
//!
//! When a record is stored: the embedder gets [`window`] of it and the two before it in its session instead of its
//! text alone, so there is still one vector for each record, and none is made again; [`Facts::read`] of the text is
//! kept beside the record. For words of like meaning each new term is embedded once, alone, and goes to
//! [`KinTable::add`]; without that [`Corpus::kin`] stays as it is and nothing else changes.
//! When a question comes: [`Question::read`]; the embedder gets the question and [`as_told`] of it in one request, the
//! sum of both vectors, divided by its length, is compared with all records; [`rank`] gets the cosines.

mod dates;
mod diverse;
mod kin;
mod plain;
mod question;
mod told;
mod weights;
mod words;

#[cfg(test)]
mod tests;

pub use dates::Span;
pub(crate) use kin::coarse as word_vector;
pub use kin::{KIN_MOST, KinTable};
pub use plain::Plain;
pub use question::{Question, Term, as_told};
pub use told::{Facts, WINDOW_BEFORE, asks, speaker, speaker_id, tells_time, window};
pub use weights::{SIGNALS, Signal, Signals, Weights};
pub(crate) use words::idf;

use std::collections::HashMap;
use words::Found;

/// All signals are taken of so many records: five times the longest answer. More cost time in proportion.
pub const POOL: usize = 256;

/// A session is judged by so many of its records, the best ones.
const SESSION_BEST: usize = 3;

/// What must be known of the stored records. A slot is a number below [`Corpus::slots`]; which record it stands for
/// is the caller's affair.
pub trait Corpus {
    type Error;

    fn slots(&self) -> usize;

    /// How many of the slots hold a record: how rare a word is depends on it.
    fn records(&self) -> usize {
        self.slots()
    }

    /// Content words of a record, on average.
    fn mean_words(&self) -> f32;

    /// Calls `each` with the slot of every record that has the term, and how often; each record once.
    fn postings(&self, term: &str, each: &mut dyn FnMut(usize, u32)) -> Result<(), Self::Error>;

    /// Calls `each` with terms of like meaning and how like they are, above 0 and below 1. None where no term has
    /// a vector: the signal is then the words' own.
    fn kin(&self, _term: &str, _each: &mut dyn FnMut(&str, f32)) -> Result<(), Self::Error> {
        Ok(())
    }

    /// If somebody called so is the speaker of some record: the number that [`Facts::speaker`] has there.
    fn speaker(&self, term: &str) -> Option<u32>;

    fn speaks(&self, term: &str) -> bool {
        self.speaker(term).is_some()
    }

    /// How useful it has proved to be, 0 to 1; 0: nobody has used it.
    fn usefulness(&self, _slot: usize) -> f32 {
        0.0
    }

    fn facts(&self, slot: usize) -> Facts;

    /// The record told before it in its session.
    fn before(&self, slot: usize) -> Option<usize>;

    /// The record told after it in its session.
    fn after(&self, slot: usize) -> Option<usize>;

    /// May it be part of the answer? Others still count as neighbours.
    fn may_answer(&self, _slot: usize) -> bool {
        true
    }
}

/// How near each record's vector is to the question's: cosines by slot, NaN where there is no vector.
#[derive(Clone, Copy)]
pub struct Nearness<'a> {
    cosines: Cosines<'a>,
    mean: f32,
    /// 0 when there is nothing to compare.
    per_cosine: f32,
}

#[derive(Clone, Copy)]
enum Cosines<'a> {
    All(&'a [f32]),
    /// Of these slots it is known that they are near; of any other it can be asked.
    Near {
        near: &'a [u32],
        of: &'a dyn Fn(usize) -> f32,
    },
}

impl<'a> Nearness<'a> {
    /// Cosines of short texts differ little, and by how much depends on the question: they count as what they are above
    /// the mean, in units of four standard deviations, which is the range of the other signals.
    pub fn new(cosines: &'a [f32]) -> Self {
        let (mean, deviation) = mean_and_deviation(cosines);
        Self::of_spread(Cosines::All(cosines), mean, deviation)
    }

    /// The same without looking at all: `near` are slots that an index found, `of` gives the cosine of any slot, `sample`
    /// are cosines of records that stand for all.
    pub fn among(near: &'a [u32], of: &'a dyn Fn(usize) -> f32, sample: &[f32]) -> Self {
        let (mean, deviation) = mean_and_deviation(sample);
        Self::of_spread(Cosines::Near { near, of }, mean, deviation)
    }

    fn of_spread(cosines: Cosines<'a>, mean: f64, deviation: f64) -> Self {
        let per_cosine = if deviation > 1e-6 { (0.25 / deviation) as f32 } else { 0.0 };
        Self { cosines, mean: mean as f32, per_cosine }
    }

    /// No vector at all.
    pub fn none() -> Self {
        Self::new(&[])
    }

    /// What a cosine counts as.
    pub fn counted(&self, cosine: f32) -> f32 {
        if cosine.is_finite() { (cosine - self.mean) * self.per_cosine } else { 0.0 }
    }

    fn cosine(&self, slot: usize) -> f32 {
        match self.cosines {
            Cosines::All(cosines) => cosines.get(slot).copied().unwrap_or(f32::NAN),
            Cosines::Near { of, .. } => of(slot),
        }
    }

    fn of(&self, slot: usize) -> f32 {
        if self.per_cosine > 0.0 { self.counted(self.cosine(slot)) } else { 0.0 }
    }

    /// Calls `each` with the slots that have a vector, and how much meaning speaks for or against them: not at all where
    /// all are as near, as when there is only one.
    fn for_each(&self, slots: usize, mut each: impl FnMut(usize, f32)) {
        let mut tell = |slot: usize, cosine: f32| {
            if cosine.is_finite() {
                each(slot, self.counted(cosine));
            }
        };
        match self.cosines {
            Cosines::All(cosines) => {
                cosines.iter().take(slots).enumerate().for_each(|(slot, cosine)| tell(slot, *cosine));
            }
            Cosines::Near { near, of } => {
                near.iter().for_each(|slot| tell(*slot as usize, of(*slot as usize)))
            }
        }
    }
}

fn mean_and_deviation(cosines: &[f32]) -> (f64, f64) {
    let known = || cosines.iter().filter(|cosine| cosine.is_finite()).map(|cosine| f64::from(*cosine));
    let count = known().count().max(1) as f64;
    let mean = known().sum::<f64>() / count;
    (mean, (known().map(|cosine| (cosine - mean).powi(2)).sum::<f64>() / count).sqrt())
}

/// A record and what it was judged by.
#[derive(Debug, Clone, PartialEq)]
pub struct Ranked {
    pub slot: usize,
    /// The sum of its signals by weight. Comparable within one answer.
    pub score: f32,
    pub signals: Signals,
}

/// The best `most`, best first; of equals the later slot.
///
/// # Errors
/// The corpus's own.
pub fn rank<C: Corpus>(
    corpus: &C,
    question: &Question,
    nearness: Nearness<'_>,
    weights: &Weights,
    most: usize,
) -> Result<Vec<Ranked>, C::Error> {
    let judged = judge(candidates(corpus, question, nearness)?, weights);
    Ok(listed(corpus, judged, most))
}

/// The pool in the order of its scores; of equals the later slot.
pub fn judge(candidates: Vec<(usize, Signals)>, weights: &Weights) -> Vec<Ranked> {
    let mut judged: Vec<Ranked> = candidates
        .into_iter()
        .map(|(slot, signals)| Ranked { slot, score: weights.sum(&signals), signals })
        .collect();
    sort(&mut judged);
    judged
}

pub(crate) fn sort(judged: &mut [Ranked]) {
    judged.sort_unstable_by(|a, b| b.score.total_cmp(&a.score).then(b.slot.cmp(&a.slot)));
}

/// The first `most` of what is sorted, neighbours spread out.
pub fn listed<C: Corpus>(corpus: &C, judged: Vec<Ranked>, most: usize) -> Vec<Ranked> {
    diverse::spread(judged, most, |slot| [corpus.before(slot), corpus.after(slot)])
}

/// The pool with its signals, in no order. What weights are fitted to.
///
/// # Errors
/// The corpus's own.
pub fn candidates<C: Corpus>(
    corpus: &C,
    question: &Question,
    nearness: Nearness<'_>,
) -> Result<Vec<(usize, Signals)>, C::Error> {
    let found = words::search(corpus, question)?;
    let pool = pool(corpus, &found, nearness);
    let sessions = Sessions::of(corpus, &pool, &found, nearness);
    let asked = Asked { named: only_speaker(corpus, question), question };
    Ok(pool
        .into_iter()
        .map(|slot| (slot, asked.signals(corpus, slot, &found, nearness, &sessions)))
        .collect())
}

/// Which records are worth a closer look? Rough on purpose: it must be cheap for every record of the store.
fn pool<C: Corpus>(corpus: &C, found: &Found, nearness: Nearness<'_>) -> Vec<usize> {
    let mut rough = Rough::new(corpus.slots());
    // A record without a word of the question may stand beside one that has all.
    for (slot, words) in found.rows() {
        let value = words.own + words.kin;
        let (before, after) = (corpus.before(slot), corpus.after(slot));
        let two_after = after.and_then(|slot| corpus.after(slot));
        rough.add(slot, value);
        for (slot, share) in [(after, 0.5), (before, 0.3), (two_after, 0.15)] {
            if let Some(slot) = slot {
                rough.add(slot, value * share);
            }
        }
    }
    nearness.for_each(corpus.slots(), |slot, value| rough.add(slot, value));
    let mut best = Best::default();
    for slot in rough.listed {
        let value = value_of(rough.values[slot as usize]);
        if value > best.floor && corpus.may_answer(slot as usize) {
            best.push(slot as usize, value);
        }
    }
    best.finish()
}

/// What speaks for each slot so far. In the store of a million records most slots are never touched, and memory that is
/// zero from the beginning costs nothing until it is: so zero bits stand for "nothing speaks for it yet".
struct Rough {
    values: Vec<u32>,
    listed: Vec<u32>,
}

/// Another way to write a float, in which zero bits are a NaN.
fn value_of(bits: u32) -> f32 {
    f32::from_bits(bits ^ f32::NAN.to_bits())
}

impl Rough {
    fn new(slots: usize) -> Self {
        Self { values: vec![0; slots], listed: Vec::new() }
    }

    fn add(&mut self, slot: usize, value: f32) {
        let place = &mut self.values[slot];
        let sum = if *place == 0 {
            self.listed.push(slot as u32);
            value
        } else {
            value_of(*place) + value
        };
        *place = sum.to_bits() ^ f32::NAN.to_bits();
    }
}

/// Keeps the best [`POOL`] of many without sorting them all.
struct Best {
    kept: Vec<(usize, f32)>,
    /// What is not above this is not among the best.
    floor: f32,
}

impl Default for Best {
    fn default() -> Self {
        Self { kept: Vec::with_capacity(4 * POOL), floor: f32::NEG_INFINITY }
    }
}

impl Best {
    fn push(&mut self, slot: usize, value: f32) {
        self.kept.push((slot, value));
        if self.kept.len() == 4 * POOL {
            self.cut();
        }
    }

    fn cut(&mut self) {
        if self.kept.len() > POOL {
            self.kept.select_nth_unstable_by(POOL - 1, |a, b| b.1.total_cmp(&a.1).then(b.0.cmp(&a.0)));
            self.kept.truncate(POOL);
            self.floor = self.kept.last().map_or(self.floor, |(_, value)| *value);
        }
    }

    fn finish(mut self) -> Vec<usize> {
        self.cut();
        self.kept.into_iter().map(|(slot, _)| slot).collect()
    }
}

/// The one speaker whom the question names; nobody when it names two.
fn only_speaker<C: Corpus>(corpus: &C, question: &Question) -> Option<u32> {
    let mut named = question.terms.iter().filter_map(|term| corpus.speaker(&term.text));
    match (named.next(), named.next()) {
        (Some(one), None) => Some(one),
        _ => None,
    }
}

/// How well whole sessions answer, by the best of their records in the pool.
struct Sessions {
    best: HashMap<u64, [f32; 2]>,
}

impl Sessions {
    fn of<C: Corpus>(corpus: &C, pool: &[usize], found: &Found, nearness: Nearness<'_>) -> Self {
        let mut values: HashMap<u64, Vec<[f32; 2]>> = HashMap::new();
        for &slot in pool {
            let session = corpus.facts(slot).session;
            if session != 0 {
                values.entry(session).or_default().push([around(corpus, found, slot), nearness.of(slot)]);
            }
        }
        let best = values
            .into_iter()
            .map(|(session, values)| (session, [best_mean(&values, |v| v[0]), best_mean(&values, |v| v[1])]));
        Self { best: best.collect() }
    }
}

fn best_mean(values: &[[f32; 2]], part: impl Fn(&[f32; 2]) -> f32) -> f32 {
    let mut parts: Vec<f32> = values.iter().map(part).collect();
    parts.sort_unstable_by(|a, b| b.total_cmp(a));
    parts.truncate(SESSION_BEST);
    parts.iter().sum::<f32>() / parts.len().max(1) as f32
}

/// Words of a record and, less, of its neighbours. The shares were set by hand and not fitted: what is fitted is how much
/// the whole counts.
fn around<C: Corpus>(corpus: &C, found: &Found, slot: usize) -> f32 {
    let [before, after, two_before, two_after] = neighbours(corpus, slot);
    let own = |slot: Option<usize>| slot.map_or(0.0, |slot| found.own(slot));
    found.own(slot) + 0.5 * own(before) + 0.3 * own(after) + 0.15 * own(two_before) + 0.1 * own(two_after)
}

/// Before, after, two before, two after.
fn neighbours<C: Corpus>(corpus: &C, slot: usize) -> [Option<usize>; 4] {
    let (before, after) = (corpus.before(slot), corpus.after(slot));
    let two_before = before.and_then(|slot| corpus.before(slot));
    let two_after = after.and_then(|slot| corpus.after(slot));
    [before, after, two_before, two_after]
}

struct Asked<'a> {
    question: &'a Question,
    /// Of the speaker.
    named: Option<u32>,
}

impl Asked<'_> {
    fn signals<C: Corpus>(
        &self,
        corpus: &C,
        slot: usize,
        found: &Found,
        nearness: Nearness<'_>,
        sessions: &Sessions,
    ) -> Signals {
        let facts = corpus.facts(slot);
        let near = neighbours(corpus, slot);
        let [before, after, two_before, two_after] = near.map(|n| n.map_or(0.0, |slot| found.own(slot)));
        let was_asked = near[0].is_some_and(|slot| corpus.facts(slot).asks);
        let matched =
            near.into_iter().flatten().fold(found.matched(slot), |all, slot| all | found.matched(slot));
        let [session_words, session_meaning] = sessions
            .best
            .get(&facts.session)
            .copied()
            .unwrap_or_else(|| [around(corpus, found, slot), nearness.of(slot)]);
        let yes = |yes: bool| f32::from(u8::from(yes));
        let mut signals = Signals::default();
        for (signal, value) in [
            (Signal::Words, found.own(slot)),
            (Signal::Before, before),
            (Signal::After, after),
            (Signal::TwoBefore, two_before),
            (Signal::TwoAfter, two_after),
            (Signal::Answer, if was_asked { before } else { 0.0 }),
            (Signal::Kin, found.kin(slot)),
            (Signal::Coverage, found.share(matched)),
            (Signal::SessionWords, session_words),
            (Signal::Meaning, nearness.of(slot)),
            (Signal::MeaningAfter, near[1].map_or(0.0, |slot| nearness.of(slot))),
            (Signal::SessionMeaning, session_meaning),
            (Signal::Speaker, yes(self.named.is_some_and(|named| named == facts.speaker))),
            (Signal::Asks, yes(facts.asks)),
            (Signal::TellsTime, yes(self.question.asks_when && facts.tells_time)),
            (Signal::Time, self.question.span.map_or(0.0, |span| span.holds(facts.event_unix_ms))),
            (Signal::Useful, corpus.usefulness(slot)),
        ] {
            signals.set(signal, value);
        }
        signals
    }
}
