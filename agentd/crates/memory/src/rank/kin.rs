//! Which words mean nearly the same?
//!
//! "Which instruments does she play?" is answered by "my clarinet": the words differ and a whole turn's vector says
//! little of one word in it. Each distinct term of a store has a vector of its own, made of the word alone by the same
//! embedder, and a list of its nearest; a question reads the lists and compares nothing.
//!
//! Disposable: it is made again from the words. Incremental: a new term is compared once with those before it.

use std::collections::HashMap;

/// Of each term. All instead of 24 changed the mean recall on LoCoMo by less than 0.1 points.
pub const KIN_MOST: usize = 24;
/// Cosine of two words below which they are not kin. Set by hand for all-MiniLM-L6-v2 and not
/// fitted; with another embedder it has to be looked at again.
const COSINE_LEAST: f32 = 0.45;
/// A likeness of nothing. A cosine of 1 is the likeness 1.
const COSINE_NONE: f32 = 0.35;

/// Terms of one store with their nearest.
#[derive(Debug, Clone, Default)]
pub struct KinTable {
    slots: HashMap<String, u32>,
    terms: Vec<String>,
    dimension: usize,
    /// `dimension` numbers for each term.
    values: Vec<i8>,
    scales: Vec<f32>,
    /// The likest first.
    kin: Vec<Vec<(u32, f32)>>,
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
        let Some((scale, values)) = coarse(vector) else { return };
        if self.knows(term) || !self.terms.is_empty() && values.len() != self.dimension {
            return;
        }
        self.dimension = values.len();
        let slot = self.terms.len() as u32;
        let near = self.near(scale, &values);
        for &(other, likeness) in &near {
            insert(&mut self.kin[other as usize], (slot, likeness));
        }
        let mut own = Vec::new();
        near.into_iter().for_each(|one| insert(&mut own, one));
        self.kin.push(own);
        self.terms.push(term.to_owned());
        self.values.extend(values);
        self.scales.push(scale);
        self.slots.insert(term.to_owned(), slot);
    }

    /// A known term's kin, the likest first.
    pub fn of(&self, term: &str) -> impl Iterator<Item = (&str, f32)> {
        let list = self.slots.get(term).map_or(&[][..], |slot| &self.kin[*slot as usize]);
        list.iter().map(|(slot, likeness)| (self.terms[*slot as usize].as_str(), *likeness))
    }

    /// The kin of a word that no record has, by its vector.
    pub fn nearest(&self, vector: &[f32]) -> Vec<(String, f32)> {
        let Some((scale, values)) = coarse(vector).filter(|(_, values)| values.len() == self.dimension)
        else {
            return Vec::new();
        };
        let mut nearest = Vec::new();
        self.near(scale, &values).into_iter().for_each(|one| insert(&mut nearest, one));
        nearest.into_iter().map(|(slot, likeness)| (self.terms[slot as usize].clone(), likeness)).collect()
    }

    /// All that are near enough.
    fn near(&self, scale: f32, values: &[i8]) -> Vec<(u32, f32)> {
        let others = self.values.chunks_exact(self.dimension.max(1)).zip(&self.scales).zip(0u32..);
        let likeness = |((other, other_scale), slot): ((&[i8], &f32), u32)| {
            let cosine = crate::vector::dot(values, other) as f32 * (scale * other_scale);
            let likeness = ((cosine - COSINE_NONE) / (1.0 - COSINE_NONE)).min(1.0);
            (cosine > COSINE_LEAST).then_some((slot, likeness))
        };
        others.filter_map(likeness).collect()
    }
}

/// Keeps the likest, in order; of equals the one that was there.
fn insert(list: &mut Vec<(u32, f32)>, one: (u32, f32)) {
    let at = list.partition_point(|(_, likeness)| *likeness >= one.1);
    if at < KIN_MOST {
        list.insert(at, one);
        list.truncate(KIN_MOST);
    }
}

fn coarse(vector: &[f32]) -> Option<(f32, Vec<i8>)> {
    let largest = vector.iter().fold(0f32, |most, value| most.max(value.abs()));
    if !vector.iter().all(|value| value.is_finite()) || largest <= f32::MIN_POSITIVE {
        return None;
    }
    let scale = largest / 127.0;
    Some((scale, vector.iter().map(|value| (value / scale).round() as i8).collect()))
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
        let of = |term| table.of(term).map(|(other, _)| other.to_owned()).collect::<Vec<_>>();
        assert_eq!(of("instrument"), ["violin", "clarinet", "tax"]);
        assert_eq!(of("clarinet"), ["instrument", "violin"]);
        assert_eq!(of("piano"), Vec::<String>::new());
        assert_eq!(table.nearest(&unit(0.1))[0].0, "clarinet");
        assert!(table.of("clarinet").all(|(_, likeness)| (0.0..=1.0).contains(&likeness)));
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
                }
                table
            };
            let (one, other) = (table(&mut (0..angles.len())), table(&mut (0..angles.len()).rev()));
            for at in 0..angles.len() {
                let likeness = |table: &KinTable| table.of(&format!("w{at}")).map(|(_, l)| l).collect::<Vec<_>>();
                prop_assert_eq!(likeness(&one), likeness(&other));
                prop_assert!(likeness(&one).len() <= KIN_MOST && likeness(&one).is_sorted_by(|a, b| a >= b));
            }
        }
    }
}
