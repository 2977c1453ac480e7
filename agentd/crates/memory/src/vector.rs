//! How near are two meanings?
//!
//! A vector is kept in two parts: 8-bit whole numbers with one scale, which a scan reads for every record, and
//! what that rounding left, again in 8 bits, with which the best are scored again. The 8-bit scan alone loses 1 to
//! 3 in 100 of the true first ten. Both parts together are 16-bit fixed-point numbers: five times nearer to the
//! truth than 16-bit floats for numbers of this size, in two thirds of the room.
//!
//! Always: vectors have length 1 once they passed [`Vector::new`], so a dot product is the cosine.

use std::sync::OnceLock;

/// Far above any embedding model in use; a larger number comes from a broken engine.
pub(crate) const DIMENSION_MAX: u32 = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadVector {
    #[error("it has {got} numbers, the embedder's dimension is {expected}")]
    Dimension { expected: u32, got: usize },
    #[error("number {at} of it is not finite")]
    NotFinite { at: usize },
    #[error("its length is zero")]
    Zero,
}

/// A vector of length 1.
#[derive(Debug, Clone)]
pub(crate) struct Vector(Vec<f32>, OnceLock<Parts>);

/// A vector as it stands on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Parts {
    /// The scale, and the 8-bit numbers.
    pub(crate) first: Vec<u8>,
    /// What their rounding left.
    pub(crate) fine: Vec<u8>,
}

/// A vector as the scan sees it: value = `scale` times the 8-bit number.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Coarse {
    pub(crate) scale: f32,
    pub(crate) values: Vec<i8>,
}

impl Parts {
    pub(crate) fn coarse(&self) -> Coarse {
        let (scale, values) = self.first.split_first_chunk().unwrap_or((&[0; 4], &[]));
        Coarse { scale: f32::from_le_bytes(*scale), values: values.iter().map(|v| *v as i8).collect() }
    }
}

impl Vector {
    pub(crate) fn new(values: &[f32], dimension: u32) -> Result<Self, BadVector> {
        if values.len() != dimension as usize {
            return Err(BadVector::Dimension { expected: dimension, got: values.len() });
        }
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(BadVector::NotFinite { at });
        }
        // f64: the squares of large finite f32 numbers would overflow.
        let length = values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt();
        if length < f64::from(f32::MIN_POSITIVE) {
            return Err(BadVector::Zero);
        }
        Ok(Self(values.iter().map(|v| (f64::from(*v) / length) as f32).collect(), OnceLock::new()))
    }

    /// The direction of several together, each of length 1 before.
    pub(crate) fn sum(vectors: &[Vec<f32>], dimension: u32) -> Result<Self, BadVector> {
        let mut sum = vec![0.0f32; dimension as usize];
        for vector in vectors {
            let vector = Self::new(vector, dimension)?;
            sum.iter_mut().zip(&vector.0).for_each(|(sum, value)| *sum += value);
        }
        Self::new(&sum, dimension)
    }

    pub(crate) fn coarse(&self) -> Coarse {
        self.parts().coarse()
    }

    /// Both parts as they stand on disk; rounded once.
    pub(crate) fn parts(&self) -> &Parts {
        self.1.get_or_init(|| {
            let largest = self.0.iter().fold(0f32, |most, v| most.max(v.abs()));
            let scale = largest / 127.0;
            let mut first = Vec::with_capacity(coarse_bytes(self.0.len()));
            first.extend_from_slice(&scale.to_le_bytes());
            let mut fine = Vec::with_capacity(self.0.len());
            for value in &self.0 {
                let steps = value / scale;
                let rounded = round(steps).clamp(-127, 127);
                first.push(rounded as i8 as u8);
                fine.push(round((steps - rounded as f32) * FINE_STEPS).clamp(-127, 127) as i8 as u8);
            }
            Parts { first, fine }
        })
    }

    /// The cosine with a stored vector, from both parts. None when it has another dimension.
    pub(crate) fn cosine_with_stored(&self, first: &[u8], fine: &[u8]) -> Option<f32> {
        let (_, values) = coarse_of_stored(first, self.0.len())?;
        if fine.len() != values.len() {
            return None;
        }
        let stored =
            values.iter().zip(fine).map(|(v, f)| f32::from(*v as i8) + f32::from(*f as i8) / FINE_STEPS);
        let (dot, square) = self
            .0
            .iter()
            .zip(stored)
            .fold((0f32, 0f32), |(dot, square), (a, b)| (dot + a * b, square + b * b));
        // The scale cancels out, and so does what rounding did to the length.
        Some((dot / square.sqrt().max(f32::MIN_POSITIVE)).clamp(-1.0, 1.0))
    }
}

/// The nearest whole number of one far below 2^22: added to 1.5 * 2^23, a float has no room for a fraction. (`f32::round`
/// is a call into the C library on processors without SSE 4.1, for which this is compiled.)
fn round(value: f32) -> i32 {
    const NO_FRACTION: f32 = 12_582_912.0;
    (value + NO_FRACTION).to_bits() as i32 - NO_FRACTION.to_bits() as i32
}

/// What is left of a number after rounding is at most half a step of the scale; it is kept in 254ths of a step.
const FINE_STEPS: f32 = 254.0;

pub(crate) fn coarse_bytes(dimension: usize) -> usize {
    4 + dimension
}

/// Scale and numbers of a first part. None when it has another dimension.
pub(crate) fn coarse_of_stored(first: &[u8], dimension: usize) -> Option<(f32, &[u8])> {
    if first.len() != coarse_bytes(dimension) {
        return None;
    }
    let (scale, values) = first.split_first_chunk()?;
    Some((f32::from_le_bytes(*scale), values))
}

/// Sum of products. Written so that the compiler uses vector instructions without unsafe code: products of
/// 8-bit numbers summed as 32-bit ones over a fixed length become `pmaddwd`, which every x86-64 has.
pub(crate) fn dot(a: &[i8], b: &[i8]) -> i32 {
    const LANES: usize = 32;
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let product = |(a, b): (&i8, &i8)| i32::from(*a) * i32::from(*b);
    let rest: i32 = a.remainder().iter().zip(b.remainder()).map(product).sum();
    rest + a.zip(b).map(|(a, b)| a.iter().zip(b).map(product).sum::<i32>()).sum::<i32>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn unit(values: &[f32]) -> Vector {
        Vector::new(values, values.len() as u32).unwrap()
    }

    proptest! {
        #[test]
        fn both_halves_give_the_cosine(
            pair in proptest::collection::vec((-1f32..1.0, -1f32..1.0), 384..=384)
        ) {
            let (a, b): (Vec<f32>, Vec<f32>) = pair.into_iter().unzip();
            prop_assume!(a.iter().any(|v| v.abs() > 0.1) && b.iter().any(|v| v.abs() > 0.1));
            let (a, b) = (unit(&a), unit(&b));
            let exact: f32 = a.0.iter().zip(&b.0).map(|(x, y)| x * y).sum();
            let Parts { first, fine } = b.parts().clone();
            prop_assert!((a.cosine_with_stored(&first, &fine).unwrap() - exact).abs() < 1e-5);
            prop_assert!((b.cosine_with_stored(&first, &fine).unwrap() - 1.0).abs() < 1e-5);
            let (scale, values) = coarse_of_stored(&first, 384).unwrap();
            let values: Vec<i8> = values.iter().map(|v| *v as i8).collect();
            let query = a.coarse();
            let coarse = dot(&query.values, &values) as f32 * query.scale * scale;
            prop_assert!((coarse - exact).abs() < 0.02, "{coarse} {exact}");
        }
    }

    #[test]
    fn dot_products_of_every_length_are_exact() {
        for length in [0, 1, 31, 32, 33, 100, 384] {
            let a: Vec<i8> = (0..length).map(|i| (i * 37 % 255 - 127) as i8).collect();
            let b: Vec<i8> = (0..length).map(|i| (i * 91 % 255 - 127) as i8).collect();
            let expected: i32 = (0..length as usize).map(|i| i32::from(a[i]) * i32::from(b[i])).sum();
            assert_eq!(dot(&a, &b), expected, "{length}");
        }
        assert_eq!(dot(&[-128; 384], &[-128; 384]), 384 * 128 * 128);
    }

    #[test]
    fn a_broken_embedder_is_refused() {
        assert_eq!(Vector::new(&[1.0], 2).unwrap_err(), BadVector::Dimension { expected: 2, got: 1 });
        assert_eq!(Vector::new(&[1.0, f32::NAN], 2).unwrap_err(), BadVector::NotFinite { at: 1 });
        assert_eq!(Vector::new(&[1.0, f32::INFINITY], 2).unwrap_err(), BadVector::NotFinite { at: 1 });
        assert_eq!(Vector::new(&[0.0, 0.0], 2).unwrap_err(), BadVector::Zero);
        assert!(Vector::new(&[f32::MAX, f32::MAX], 2).is_ok());
    }

    #[test]
    fn a_row_of_another_dimension_is_not_compared() {
        let Parts { first, fine } = unit(&[1.0, 0.0]).parts().clone();
        assert_eq!(unit(&[1.0, 0.0, 0.0]).cosine_with_stored(&first, &fine), None);
        assert_eq!(coarse_of_stored(&first, 3), None);
        assert_eq!(unit(&[1.0, 0.0]).cosine_with_stored(&first, &fine[1..]), None);
        assert_eq!(unit(&[1.0, 0.0]).cosine_with_stored(&first, &fine), Some(1.0));
    }
}
