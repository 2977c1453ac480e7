//! Which words mean nearly the same?
//!
//! "Which instruments does she play?" is answered by "my clarinet": the words differ and a whole turn's vector says
//! little of one word in it. Each distinct term of a store has a vector of its own, made of the word alone by the same
//! embedder, and a list of its nearest; a question reads the lists and compares nothing.
//!
//! Disposable: it is made again from the words. Lists are made when they are first asked for, by one comparison with all
//! terms, and a bounded number of them is kept; a new term is compared with what is kept. So taking in a word costs next
//! to nothing, and the lists are the same whichever way the words came.

use crate::vector::{Coarse, dot};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Of each term. All instead of 24 changed the mean recall on LoCoMo by less than 0.1 points.
pub const KIN_MOST: usize = 24;
/// Cosine of two words below which they are not kin. Set by hand for all-MiniLM-L6-v2 and not
/// fitted; with another embedder it has to be looked at again.
const COSINE_LEAST: f32 = 0.45;
/// A likeness of nothing. A cosine of 1 is the likeness 1.
const COSINE_NONE: f32 = 0.35;
/// Lists that are kept; 200 bytes each. The words of questions repeat.
const LISTS_KEPT: usize = 4096;

type List = Vec<(u32, f32)>;

/// Terms of one store with their vectors.
#[derive(Debug, Default)]
pub struct KinTable {
    slots: HashMap<String, u32>,
    terms: Vec<String>,
    term_bytes: usize,
    dimension: usize,
    /// `dimension` numbers for each term.
    values: Vec<i8>,
    scales: Vec<f32>,
    /// By term, the likest first.
    lists: Mutex<HashMap<u32, List>>,
}

impl KinTable {
    pub fn len(&self) -> usize {
        self.terms.len()
    }

    pub fn is_empty(&self) -> bool {
        self.terms.is_empty()
    }

    pub fn knows(&self, term: &str) -> bool {
        self.slots.contains_key(term)
    }

    /// Takes in a term with its vector, of length 1. A vector that is none (another dimension, not finite, zero) and a
    /// term that is there already change nothing.
    pub fn add(&mut self, term: &str, vector: &[f32]) {
        if let Some(coarse) = coarse(vector) {
            self.add_coarse(term, coarse.scale, &coarse.values);
        }
    }

    pub(crate) fn add_coarse(&mut self, term: &str, scale: f32, values: &[i8]) {
        if self.knows(term) || values.is_empty() || !self.is_empty() && values.len() != self.dimension {
            return;
        }
        self.dimension = values.len();
        let slot = self.terms.len() as u32;
        let mut lists = std::mem::take(&mut self.lists).into_inner().unwrap_or_else(PoisonError::into_inner);
        for (other, list) in &mut lists {
            if let Some(likeness) = self.likeness(*other, scale, values) {
                insert(list, (slot, likeness));
            }
        }
        self.lists = Mutex::new(lists);
        self.term_bytes += term.len();
        self.terms.push(term.to_owned());
        self.values.extend_from_slice(values);
        self.scales.push(scale);
        self.slots.insert(term.to_owned(), slot);
    }

    /// A known term's kin, the likest first.
    pub fn of(&self, term: &str) -> Vec<(&str, f32)> {
        let Some(slot) = self.slots.get(term) else { return Vec::new() };
        let kept = self.lists.lock().unwrap_or_else(PoisonError::into_inner).get(slot).cloned();
        let list = kept.unwrap_or_else(|| {
            let start = *slot as usize * self.dimension;
            let (scale, values) = (self.scales[*slot as usize], &self.values[start..start + self.dimension]);
            let list = self.near(scale, values, Some(*slot));
            let mut lists = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
            if lists.len() >= LISTS_KEPT {
                lists.clear();
            }
            lists.insert(*slot, list.clone());
            list
        });
        list.into_iter().map(|(slot, likeness)| (self.terms[slot as usize].as_str(), likeness)).collect()
    }

    /// The kin of a word that no record has, by its vector.
    pub fn nearest(&self, vector: &[f32]) -> Vec<(String, f32)> {
        let Some(coarse) = coarse(vector).filter(|coarse| coarse.values.len() == self.dimension) else {
            return Vec::new();
        };
        let near = self.near(coarse.scale, &coarse.values, None);
        near.into_iter().map(|(slot, likeness)| (self.terms[slot as usize].clone(), likeness)).collect()
    }

    /// What it takes in memory.
    pub(crate) fn bytes(&self) -> usize {
        // A term stands twice, each time with 24 bytes of its own, once with 16 of the map.
        let terms = 2 * self.term_bytes + self.terms.len() * (2 * 24 + 16);
        let lists = self.lists.lock().unwrap_or_else(PoisonError::into_inner).len();
        terms + self.values.capacity() + self.scales.capacity() * 4 + lists * (KIN_MOST * 8 + 40)
    }

    /// The likest of all.
    fn near(&self, scale: f32, values: &[i8], except: Option<u32>) -> List {
        let mut list = Vec::with_capacity(KIN_MOST + 1);
        for slot in (0..self.terms.len() as u32).filter(|slot| Some(*slot) != except) {
            if let Some(likeness) = self.likeness(slot, scale, values) {
                insert(&mut list, (slot, likeness));
            }
        }
        list
    }

    fn likeness(&self, slot: u32, scale: f32, values: &[i8]) -> Option<f32> {
        let start = slot as usize * self.dimension;
        let other = &self.values[start..start + self.dimension];
        let cosine = dot(values, other) as f32 * (scale * self.scales[slot as usize]);
        (cosine > COSINE_LEAST).then(|| ((cosine - COSINE_NONE) / (1.0 - COSINE_NONE)).min(1.0))
    }
}

/// Keeps the likest, in order; of equals the one that was there.
fn insert(list: &mut List, one: (u32, f32)) {
    let at = list.partition_point(|(_, likeness)| *likeness >= one.1);
    if at < KIN_MOST {
        list.insert(at, one);
        list.truncate(KIN_MOST);
    }
}

/// A word's vector as the table keeps it; none where it is no vector.
pub(crate) fn coarse(vector: &[f32]) -> Option<Coarse> {
    let largest = vector.iter().fold(0f32, |most, value| most.max(value.abs()));
    if !vector.iter().all(|value| value.is_finite()) || largest <= f32::MIN_POSITIVE {
        return None;
    }
    let scale = largest / 127.0;
    Some(Coarse { scale, values: vector.iter().map(|value| (value / scale).round() as i8).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn unit(angle: f32) -> [f32; 2] {
        [angle.cos(), angle.sin()]
    }

    #[test]
    fn like_words_are_kin_and_unlike_ones_are_not() {
        let mut table = KinTable::default();
        for (term, angle) in [("clarinet", 0.0), ("instrument", 0.5), ("violin", 0.9), ("tax", 1.5)] {
            table.add(term, &unit(angle));
        }
        let of = |term| table.of(term).into_iter().map(|(other, _)| other.to_owned()).collect::<Vec<_>>();
        assert_eq!(of("instrument"), ["violin", "clarinet", "tax"]);
        assert_eq!(of("clarinet"), ["instrument", "violin"]);
        assert_eq!(of("piano"), Vec::<String>::new());
        assert_eq!(table.nearest(&unit(0.1))[0].0, "clarinet");
        assert!(table.of("clarinet").iter().all(|(_, likeness)| (0.0..=1.0).contains(likeness)));
        // A list that is kept hears of a new word.
        table.add("oboe", &unit(0.05));
        assert_eq!(table.of("clarinet")[0].0, "oboe");
    }

    #[test]
    fn what_is_no_vector_is_not_taken() {
        let mut table = KinTable::default();
        for vector in [&[f32::NAN, 1.0][..], &[0.0, 0.0], &[f32::INFINITY, 0.0], &[]] {
            table.add("x", vector);
        }
        assert!(table.is_empty());
        table.add("x", &[1.0, 0.0]);
        table.add("y", &[1.0, 0.0, 0.0]);
        table.add("x", &[0.0, 1.0]);
        assert_eq!((table.len(), table.nearest(&[1.0]).len()), (1, 0));
    }

    proptest! {
        /// Whichever way the words came.
        #[test]
        fn the_order_of_arrival_does_not_matter(angles in proptest::collection::vec(0f32..3.0, 1..60)) {
            let table = |order: &mut dyn Iterator<Item = usize>| {
                let mut table = KinTable::default();
                for at in order {
                    table.add(&format!("w{at}"), &unit(angles[at]));
                    table.of("w0");
                }
                table
            };
            let (one, other) = (table(&mut (0..angles.len())), table(&mut (0..angles.len()).rev()));
            for at in 0..angles.len() {
                let likeness = |table: &KinTable| table.of(&format!("w{at}")).into_iter().map(|(_, l)| l).collect::<Vec<_>>();
                prop_assert_eq!(likeness(&one), likeness(&other));
                prop_assert!(likeness(&one).len() <= KIN_MOST && likeness(&one).is_sorted_by(|a, b| a >= b));
            }
        }
    }
}
