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

/// By slot; made for one question.
pub(super) struct Found {
    own: Vec<f32>,
    kin: Vec<f32>,
    /// Bit n: the question's n-th term is in the record.
    matched: Vec<u64>,
    /// Share of each term in what the question asks, without names of speakers.
    shares: Vec<f32>,
    touched: Vec<usize>,
}

impl Found {
    pub(super) fn touched(&self) -> &[usize] {
        &self.touched
    }

    pub(super) fn own(&self, slot: usize) -> f32 {
        self.own[slot]
    }

    pub(super) fn kin(&self, slot: usize) -> f32 {
        self.kin[slot]
    }

    pub(super) fn matched(&self, slot: usize) -> u64 {
        self.matched[slot]
    }

    /// How much of the question these terms are.
    pub(super) fn share(&self, matched: u64) -> f32 {
        let has = |(bit, share): (usize, &f32)| if matched >> bit & 1 == 1 { *share } else { 0.0 };
        self.shares.iter().enumerate().map(has).sum()
    }
}

pub(super) fn search<C: Corpus>(corpus: &C, question: &Question) -> Result<Found, C::Error> {
    let slots = corpus.slots();
    let mut found = Found {
        own: vec![0.0; slots],
        kin: vec![0.0; slots],
        matched: vec![0; slots],
        shares: Vec::new(),
        touched: Vec::new(),
    };
    let terms = question.terms.get(..TERMS_MOST).unwrap_or(&question.terms);
    let mut lists = Vec::with_capacity(terms.len());
    for term in terms {
        let mut postings = Vec::new();
        corpus.postings(&term.text, &mut |slot, count| postings.push((slot, count)))?;
        lists.push(postings);
    }
    let idfs: Vec<f32> = lists.iter().map(|postings| idf(slots, postings.len())).collect();
    let all = idfs.iter().sum::<f32>().max(0.1);
    let mean_words = corpus.mean_words().max(1.0);
    let mut seen = vec![false; slots];
    // How like its likest word is to the term at hand.
    let mut likest = vec![0.0f32; slots];
    let mut with_kin = Vec::new();
    for (bit, ((term, postings), idf)) in terms.iter().zip(&lists).zip(idfs).enumerate() {
        let share = idf / all;
        let is_name = corpus.speaks(&term.text);
        found.shares.push(if is_name { 0.0 } else { share });
        for &(slot, count) in postings {
            if !std::mem::replace(&mut seen[slot], true) {
                found.touched.push(slot);
            }
            found.matched[slot] |= 1 << bit;
            found.own[slot] += share * term_weight(count, corpus.facts(slot).words, mean_words);
            if !is_name {
                found.kin[slot] += share;
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
                if found.matched[slot] >> bit & 1 == 0 && likeness > likest[slot] {
                    if likest[slot] == 0.0 {
                        with_kin.push(slot);
                    }
                    likest[slot] = likeness;
                }
            })?;
        }
        for slot in with_kin.drain(..) {
            found.kin[slot] += share * std::mem::take(&mut likest[slot]).min(1.0);
            if !std::mem::replace(&mut seen[slot], true) {
                found.touched.push(slot);
            }
        }
    }
    Ok(found)
}

/// How rare a term is: Lucene's form of BM25's idf, which is never negative.
fn idf(records: usize, records_with_term: usize) -> f32 {
    let (n, df) = (records as f32, records_with_term as f32);
    (1.0 + (n - df + 0.5).max(0.0) / (df + 0.5)).ln()
}

/// How strongly a term counts in one record, 0 to `K1 + 1`; 1 for one occurrence in a record of mean length.
fn term_weight(count: u32, words: u32, mean_words: f32) -> f32 {
    let count = count as f32;
    count * (K1 + 1.0) / (count + K1 * (1.0 - B + B * words as f32 / mean_words))
}
