//! Which records have the question's words, or words that mean nearly the same?
//!
//! BM25 (Robertson and Zaragoza, 2009) as a share of what the question asks: 1 when a record of mean length has every
//! word of it once. Words that nobody ever said count below the line too, so one chance match of five stays a fifth.

use super::{Corpus, Question};

/// The usual value.
const K1: f32 = 1.2;
/// Turns of a conversation are short, and a long one is long because it tells more: less than the usual 0.75.
const B: f32 = 0.6;

/// Bits of one word; a question with more terms is a document.
pub(super) const TERMS_MOST: usize = 64;

/// What of the question is in one record.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Row {
    pub(super) own: f32,
    pub(super) kin: f32,
    /// Bit n: the question's n-th term is in the record.
    pub(super) matched: u64,
    slot: u32,
    /// How like its likest word is to the term at hand.
    likest: f32,
}

/// Made for one question; holds what the question touches.
pub(super) struct Found {
    /// By slot the place of its row and one more; 0: it has none.
    places: Vec<u32>,
    rows: Vec<Row>,
    /// Share of each term in what the question asks, without names of speakers.
    shares: Vec<f32>,
}

impl Found {
    pub(super) fn rows(&self) -> impl Iterator<Item = (usize, &Row)> {
        self.rows.iter().map(|row| (row.slot as usize, row))
    }

    pub(super) fn of(&self, slot: usize) -> Row {
        match self.places.get(slot) {
            None | Some(0) => Row::default(),
            Some(place) => self.rows[*place as usize - 1],
        }
    }

    pub(super) fn own(&self, slot: usize) -> f32 {
        self.of(slot).own
    }

    pub(super) fn kin(&self, slot: usize) -> f32 {
        self.of(slot).kin
    }

    pub(super) fn matched(&self, slot: usize) -> u64 {
        self.of(slot).matched
    }

    /// How much of the question these terms are.
    pub(super) fn share(&self, matched: u64) -> f32 {
        let has = |(bit, share): (usize, &f32)| if matched >> bit & 1 == 1 { *share } else { 0.0 };
        self.shares.iter().enumerate().map(has).sum()
    }

    fn row(&mut self, slot: usize) -> &mut Row {
        let place = &mut self.places[slot];
        if *place == 0 {
            self.rows.push(Row { slot: slot as u32, ..Row::default() });
            *place = self.rows.len() as u32;
        }
        &mut self.rows[*place as usize - 1]
    }
}

pub(super) fn search<C: Corpus>(corpus: &C, question: &Question) -> Result<Found, C::Error> {
    let mut found = Found { places: vec![0; corpus.slots()], rows: Vec::new(), shares: Vec::new() };
    let terms = question.terms.get(..TERMS_MOST).unwrap_or(&question.terms);
    let mut lists = Vec::with_capacity(terms.len());
    for term in terms {
        let mut postings = Vec::new();
        corpus.postings(&term.text, &mut |slot, count| postings.push((slot, count)))?;
        lists.push(postings);
    }
    let idfs: Vec<f32> = lists.iter().map(|postings| idf(corpus.records(), postings.len())).collect();
    let all = idfs.iter().sum::<f32>().max(0.1);
    let mean_words = corpus.mean_words().max(1.0);
    let mut with_kin: Vec<usize> = Vec::new();
    for (bit, ((term, postings), idf)) in terms.iter().zip(&lists).zip(idfs).enumerate() {
        let share = idf / all;
        let is_name = corpus.speaks(&term.text);
        found.shares.push(if is_name { 0.0 } else { share });
        for &(slot, count) in postings {
            let own = share * term_weight(count, corpus.facts(slot).words, mean_words);
            let row = found.row(slot);
            row.matched |= 1 << bit;
            row.own += own;
            if !is_name {
                row.kin += share;
            }
        }
        // Who is meant is one person: nobody is meant by a like name.
        if is_name {
            continue;
        }
        let mut kin = Vec::new();
        corpus.kin(&term.text, &mut |other, likeness| kin.push((other.to_owned(), likeness)))?;
        for (other, likeness) in kin {
            corpus.postings(&other, &mut |slot, _| {
                let row = found.row(slot);
                if row.matched >> bit & 1 == 0 && likeness > row.likest {
                    if row.likest == 0.0 {
                        with_kin.push(slot);
                    }
                    row.likest = likeness;
                }
            })?;
        }
        for slot in with_kin.drain(..) {
            let row = found.row(slot);
            row.kin += share * std::mem::take(&mut row.likest).min(1.0);
        }
    }
    Ok(found)
}

/// How rare a term is: Lucene's form of BM25's idf, which is never negative.
pub(crate) fn idf(records: usize, records_with_term: usize) -> f32 {
    let (n, df) = (records as f32, records_with_term as f32);
    (1.0 + (n - df + 0.5).max(0.0) / (df + 0.5)).ln()
}

/// How strongly a term counts in one record, 0 to `K1 + 1`; 1 for one occurrence in a record of mean length.
fn term_weight(count: u32, words: u32, mean_words: f32) -> f32 {
    let count = count as f32;
    count * (K1 + 1.0) / (count + K1 * (1.0 - B + B * words as f32 / mean_words))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three records, "cat sat", "cat cat dog", "dog", counted by hand.
    #[test]
    fn bm25_is_what_paper_and_pencil_give() {
        // ln(1 + (3 - 2 + 0.5) / (2 + 0.5)) = ln 1.6
        assert!((idf(3, 2) - 0.470_004).abs() < 1e-6);
        // A term nobody said: ln(1 + 3.5 / 0.5) = ln 8.
        assert!((idf(3, 0) - 8f32.ln()).abs() < 1e-6);
        let mean_words = 2.0;
        // 1 * 2.2 / (1 + 1.2 * (0.4 + 0.6 * 2 / 2)) = 2.2 / 2.2
        assert!((term_weight(1, 2, mean_words) - 1.0).abs() < 1e-6);
        // 2 * 2.2 / (2 + 1.2 * (0.4 + 0.6 * 3 / 2)) = 4.4 / 3.56
        assert!((term_weight(2, 3, mean_words) - 1.235_955).abs() < 1e-6);
    }
}
