//! Which records' vectors are near a question's?
//!
//! In:    the question's 8-bit vector, which records it is about. Out: how near all of them are ([`Nearness`]), or the
//!        nearest of them.
//! Always: up to [`CELLS_FROM`] vectors every one is compared, so nothing near is missed; above that those in the cells
//!        (`cells.rs`) nearest to the question, of which its tests and `scripts/bench memory-scale` say how many
//!        of the true first ten they hold.
//! Never:  unsafe. [`dot`] is written so that the compiler uses the vector instructions that every x86-64 has.

use crate::index::{Index, Seen};
use crate::rank::Nearness;
use crate::vector::Coarse;

/// With so many vectors a scan of all takes longer than an answer may (about 6 ms on the machine of the bench).
pub(crate) const CELLS_FROM: usize = 150_000;

/// Cosines that stand for all where not all are looked at: mean and deviation are then known to a fiftieth of the latter.
const SAMPLE: usize = 2048;

/// A vector that is compared with many.
pub(crate) struct Probe {
    values: Vec<i16>,
    /// 128 times the sum of the values: what [`BIAS`] adds to every product.
    bias: i32,
    scale: f32,
}

/// 8-bit numbers stand in the index as unsigned ones, 128 more than they are: widening them is one instruction then and
/// not two, which halves the time of a scan (14 instead of 31 ns for 384 numbers on the bench's machine).
const BIAS: u8 = 128;

/// A number as it stands in the index.
pub(crate) fn biased(value: i8) -> u8 {
    value as u8 ^ BIAS
}

pub(crate) fn unbiased(value: u8) -> i8 {
    (value ^ BIAS) as i8
}

impl Probe {
    pub(crate) fn new(coarse: &Coarse) -> Self {
        let values: Vec<i16> = coarse.values.iter().map(|value| i16::from(*value)).collect();
        let bias = i32::from(BIAS) * values.iter().map(|value| i32::from(*value)).sum::<i32>();
        Self { values, bias, scale: coarse.scale }
    }

    pub(crate) fn dimension(&self) -> usize {
        self.values.len()
    }

    /// About the cosine with a vector of this scale and these biased numbers.
    pub(crate) fn cosine(&self, scale: f32, values: &[u8]) -> f32 {
        (dot(&self.values, values) - self.bias) as f32 * self.scale * scale
    }
}

/// Sum of products.
fn dot(a: &[i16], b: &[u8]) -> i32 {
    const LANES: usize = 32;
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let product = |(a, b): (&i16, &u8)| i32::from(*a) * i32::from(*b);
    let rest: i32 = a.remainder().iter().zip(b.remainder()).map(product).sum();
    rest + a.zip(b).map(|(a, b)| a.iter().zip(b).map(product).sum::<i32>()).sum::<i32>()
}

impl Index {
    /// Hands `use_it` how near every record is that the question looks at.
    pub(crate) fn with_nearness<T>(
        &self,
        query: &Coarse,
        seen: &Seen,
        use_it: impl FnOnce(Nearness<'_>) -> T,
    ) -> T {
        let probe = Probe::new(query);
        let Some(near) = self.cells.near(&probe) else {
            return use_it(Nearness::new(&self.scan(&probe, seen)));
        };
        let near: Vec<u32> = near.filter(|slot| self.is_among(*slot as usize, seen)).collect();
        let step = (self.len() / SAMPLE).max(1);
        let sample: Vec<f32> = (0..self.len())
            .step_by(step)
            .filter(|slot| self.is_among(*slot, seen))
            .map(|slot| self.cosine(slot, &probe))
            .collect();
        let of = |slot: usize| if self.is_among(slot, seen) { self.cosine(slot, &probe) } else { f32::NAN };
        use_it(Nearness::among(&near, &of, &sample))
    }

    /// The nearest records that may be an answer, in no order, with about their cosines.
    pub(crate) fn nearest(&self, query: &Coarse, seen: &Seen, most: usize) -> Vec<(usize, f32)> {
        let probe = Probe::new(query);
        let answer = |slot: &usize| self.may_answer(*slot, seen);
        let mut near: Vec<(usize, f32)> = match self.cells.near(&probe) {
            None => {
                self.scan(&probe, seen).into_iter().enumerate().filter(|(slot, _)| answer(slot)).collect()
            }
            Some(near) => near
                .map(|slot| slot as usize)
                .filter(answer)
                .map(|slot| (slot, self.cosine(slot, &probe)))
                .collect(),
        };
        near.retain(|(_, cosine)| cosine.is_finite());
        if near.len() > most {
            near.select_nth_unstable_by(most, |a, b| b.1.total_cmp(&a.1).then(b.0.cmp(&a.0)));
            near.truncate(most);
        }
        near
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dot_products_of_every_length_are_exact() {
        for length in [0, 1, 31, 32, 33, 100, 384] {
            let a: Vec<i8> = (0..length).map(|i| (i * 37 % 255 - 127) as i8).collect();
            let b: Vec<i8> = (0..length).map(|i| (i * 91 % 255 - 127) as i8).collect();
            let expected: i32 = a.iter().zip(&b).map(|(a, b)| i32::from(*a) * i32::from(*b)).sum();
            let probe = Probe::new(&Coarse { scale: 0.5, values: a });
            let values: Vec<u8> = b.into_iter().map(biased).collect();
            assert_eq!(probe.cosine(2.0, &values), expected as f32, "{length}");
        }
        let lowest = Probe::new(&Coarse { scale: 1.0, values: vec![-128; 384] });
        assert_eq!(lowest.cosine(1.0, &[biased(-128); 384]), (384 * 128 * 128) as f32);
    }
}
