//! How near are two meanings?
//!
//! A vector is kept twice: 8-bit whole numbers with one scale, which a scan reads for every record, and
//! 16-bit floats, with which the best are scored again. The 8-bit scan alone loses 1 to 3 in 100 of the true
//! first ten; with the second look nothing is lost (memory scan measurements: recall 1.000 to 1M vectors).
//!
//! Always: vectors have length 1 once they passed [`Vector::new`], so a dot product is the cosine.

use half::f16;

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
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Vector(Vec<f32>);

/// A vector as the scan sees it: value = `scale` times the 8-bit number.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Coarse {
    pub(crate) scale: f32,
    pub(crate) values: Vec<i8>,
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
        Ok(Self(values.iter().map(|v| (f64::from(*v) / length) as f32).collect()))
    }

    pub(crate) fn coarse(&self) -> Coarse {
        let largest = self.0.iter().fold(0f32, |most, v| most.max(v.abs()));
        let scale = largest / 127.0;
        Coarse { scale, values: self.0.iter().map(|v| (v / scale).round() as i8).collect() }
    }

    /// `scale (f32), dimension 8-bit numbers, dimension 16-bit floats`, little-endian.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let coarse = self.coarse();
        let mut bytes = Vec::with_capacity(4 + self.0.len() * 3);
        bytes.extend_from_slice(&coarse.scale.to_le_bytes());
        bytes.extend(coarse.values.iter().map(|v| *v as u8));
        bytes.extend(self.0.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()));
        bytes
    }

    /// The cosine with a stored vector, from its 16-bit half. None when the row has another dimension.
    pub(crate) fn cosine_with_stored(&self, row: &[u8]) -> Option<f32> {
        let dimension = self.0.len();
        if row.len() != stored_bytes(dimension) {
            return None;
        }
        let fine = &row[4 + dimension..];
        let (dot, square) =
            self.0.iter().zip(fine.chunks_exact(2)).fold((0f32, 0f32), |(dot, square), (a, b)| {
                let b = f16::from_le_bytes([b[0], b[1]]).to_f32();
                (dot + a * b, square + b * b)
            });
        // Rounding to 16 bits changes the length by up to one in a thousand: divide it out.
        Some((dot / square.sqrt().max(f32::MIN_POSITIVE)).clamp(-1.0, 1.0))
    }
}

pub(crate) fn stored_bytes(dimension: usize) -> usize {
    4 + dimension * 3
}

/// The 8-bit half of a stored vector. None when the row has another dimension.
pub(crate) fn coarse_of_stored(row: &[u8], dimension: usize) -> Option<(f32, &[u8])> {
    if row.len() != stored_bytes(dimension) {
        return None;
    }
    let (scale, rest) = row.split_first_chunk()?;
    Some((f32::from_le_bytes(*scale), &rest[..dimension]))
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
            let row = b.to_bytes();
            prop_assert!((a.cosine_with_stored(&row).unwrap() - exact).abs() < 1e-3);
            let (scale, values) = coarse_of_stored(&row, 384).unwrap();
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
        assert_eq!(Vector::new(&[1.0], 2), Err(BadVector::Dimension { expected: 2, got: 1 }));
        assert_eq!(Vector::new(&[1.0, f32::NAN], 2), Err(BadVector::NotFinite { at: 1 }));
        assert_eq!(Vector::new(&[1.0, f32::INFINITY], 2), Err(BadVector::NotFinite { at: 1 }));
        assert_eq!(Vector::new(&[0.0, 0.0], 2), Err(BadVector::Zero));
        assert!(Vector::new(&[f32::MAX, f32::MAX], 2).is_ok());
    }

    #[test]
    fn a_row_of_another_dimension_is_not_compared() {
        let row = unit(&[1.0, 0.0]).to_bytes();
        assert_eq!(unit(&[1.0, 0.0, 0.0]).cosine_with_stored(&row), None);
        assert_eq!(coarse_of_stored(&row, 3), None);
        assert_eq!(unit(&[1.0, 0.0]).cosine_with_stored(&row), Some(1.0));
    }
}
