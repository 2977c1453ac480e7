//! How do seeded weights look in ggml's quantised blocks?
//!
//! Each block is drawn as it will lie in the file: its scale, and whole numbers that are equally likely. Their mean is
//! zero, also where the numbers are not symmetric (a scale's sign is drawn too): a mean would add up over a
//! row, and the same over all layers, until every token has the same answer.
//! Source: `ggml/src/ggml-common.h` (the blocks) and `ggml/src/ggml-quants.c` (`dequantize_row_*`: their meaning).

use crate::Dice;
use half::f16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    F32,
    Q5_0,
    Q8_0,
    Q4K,
    Q6K,
}

impl Kind {
    /// `ggml_type`.
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::Q5_0 => 6,
            Self::Q8_0 => 8,
            Self::Q4K => 12,
            Self::Q6K => 14,
        }
    }

    /// Elements and bytes of a block.
    pub(crate) fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::Q5_0 => (32, 22),
            Self::Q8_0 => (32, 34),
            Self::Q4K => (256, 144),
            Self::Q6K => (256, 210),
        }
    }

    /// One block of weights around zero with this standard deviation, within a quarter.
    pub(crate) fn draw(self, dice: &mut Dice, deviation: f32, into: &mut Vec<u8>) {
        // Three quarters to five quarters: no two blocks have one scale.
        let deviation = deviation * (0.75 + (dice.bits() >> 40) as f32 / (1u64 << 25) as f32);
        match self {
            Self::F32 => {
                // Uniform: the deviation of -1 to 1 is the root of a third.
                let number = (dice.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
                into.extend((number * deviation * 1.732_050_8).to_le_bytes());
            }
            Self::Q5_0 => {
                let scale = signed(deviation / UNIFORM_32, dice);
                into.extend(f16::from_f32(scale).to_le_bytes());
                bytes(dice, 20, into);
            }
            Self::Q8_0 => {
                into.extend(f16::from_f32(deviation / UNIFORM_255).to_le_bytes());
                let begin = into.len();
                bytes(dice, 32, into);
                // -128 is no quantised number.
                into[begin..].iter_mut().filter(|byte| **byte == 0x80).for_each(|byte| *byte = 0x81);
            }
            Self::Q4K => q4_k(dice, deviation, into),
            Self::Q6K => {
                // 64 values of 6 bits; the scale of each 16 is a byte, 64 to 127, of either sign.
                bytes(dice, 192, into);
                for _ in 0..2 {
                    let drawn = dice.bits();
                    for at in 0..8 {
                        let byte = (drawn >> (8 * at)) as u8;
                        let scale = i8::try_from(64 | (byte & 63)).unwrap_or(i8::MAX);
                        into.push(if byte & 64 == 0 { scale } else { -scale }.cast_unsigned());
                    }
                }
                into.extend(f16::from_f32(deviation / UNIFORM_64 / MIDDLE_SCALE).to_le_bytes());
            }
        }
    }
}

/// Standard deviations of whole numbers that are equally likely: the root of (n * n - 1) / 12.
const UNIFORM_16: f32 = 4.609_772;
const UNIFORM_32: f32 = 9.233_093;
const UNIFORM_64: f32 = 18.472_954;
const UNIFORM_255: f32 = 73.611_48;
/// Of 64 to 127 in Q6_K.
const MIDDLE_SCALE: f32 = 95.5;
/// Of 32 to 63 in Q4_K.
const MIDDLE_SCALE_4: f32 = 47.5;

/// Eight groups of 32, each with a scale and a minimum of 6 bits. Both are the same number here and `dmin` is 7.5
/// times `d`, so that the 16 values lie evenly around zero.
fn q4_k(dice: &mut Dice, deviation: f32, into: &mut Vec<u8>) {
    let scale = f16::from_f32(deviation / UNIFORM_16 / MIDDLE_SCALE_4);
    into.extend(scale.to_le_bytes());
    into.extend(f16::from_f32(scale.to_f32() * 7.5).to_le_bytes());
    let drawn = dice.bits();
    let scales: [u8; 8] = std::array::from_fn(|group| 32 | ((drawn >> (8 * group)) as u8 & 31));
    // `get_scale_min_k4`: the first four lie plain, the others' low and high bits apart.
    let mut packed = [0u8; 12];
    for (group, scale) in scales.into_iter().enumerate() {
        if group < 4 {
            packed[group] |= scale;
            packed[group + 4] |= scale;
        } else {
            packed[group + 4] = (scale & 15) | (scale << 4);
            packed[group - 4] |= (scale >> 4) << 6;
            packed[group] |= (scale >> 4) << 6;
        }
    }
    into.extend(packed);
    bytes(dice, 128, into);
}

fn signed(scale: f32, dice: &mut Dice) -> f32 {
    if dice.bits() & 1 == 0 { scale } else { -scale }
}

fn bytes(dice: &mut Dice, count: usize, into: &mut Vec<u8>) {
    let end = into.len() + count;
    while into.len() < end {
        into.extend(dice.bits().to_le_bytes());
    }
    into.truncate(end);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn half(bytes: &[u8]) -> f32 {
        f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
    }

    /// As ggml's `dequantize_row_*`.
    fn read(kind: Kind, block: &[u8]) -> Vec<f32> {
        match kind {
            Kind::F32 => vec![f32::from_le_bytes(block.try_into().unwrap())],
            Kind::Q8_0 => block[2..].iter().map(|q| half(block) * f32::from(q.cast_signed())).collect(),
            Kind::Q5_0 => {
                let high = u32::from_le_bytes(block[2..6].try_into().unwrap());
                let value = |low: u8, at: usize| {
                    half(block) * (f32::from(low | (((high >> at) as u8 & 1) << 4)) - 16.0)
                };
                let low = block[6..].iter().enumerate().map(|(at, byte)| value(byte & 15, at));
                low.chain(block[6..].iter().enumerate().map(|(at, byte)| value(byte >> 4, at + 16))).collect()
            }
            Kind::Q4K => {
                let (scale, least, packed) = (half(block), half(&block[2..]), &block[4..16]);
                (0..256)
                    .map(|at| {
                        let group = at / 32;
                        let (s, m) = if group < 4 {
                            (packed[group] & 63, packed[group + 4] & 63)
                        } else {
                            (
                                (packed[group + 4] & 15) | ((packed[group - 4] >> 6) << 4),
                                (packed[group + 4] >> 4) | ((packed[group] >> 6) << 4),
                            )
                        };
                        let byte = block[16 + group / 2 * 32 + at % 32];
                        let q = if group % 2 == 0 { byte & 15 } else { byte >> 4 };
                        scale * f32::from(s) * f32::from(q) - least * f32::from(m)
                    })
                    .collect()
            }
            Kind::Q6K => (0..256)
                .map(|at| {
                    let (part, place) = (at / 128, at % 128);
                    let (group, l) = (place / 32, place % 32);
                    let byte = block[part * 64 + l + 32 * (group % 2)];
                    let low = if group < 2 { byte & 15 } else { byte >> 4 };
                    let high = (block[128 + part * 32 + l] >> (2 * group)) & 3;
                    let scale = block[192 + part * 8 + 2 * group + l / 16].cast_signed();
                    half(&block[208..]) * f32::from(scale) * (f32::from(low | (high << 4)) - 32.0)
                })
                .collect(),
        }
    }

    #[test]
    fn each_kind_of_block_is_read_back_around_zero_with_its_deviation() {
        for kind in [Kind::F32, Kind::Q5_0, Kind::Q8_0, Kind::Q4K, Kind::Q6K] {
            let (elements, size) = kind.block();
            let (mut dice, mut numbers) = (Dice(7), Vec::new());
            while numbers.len() < 100_000 {
                let mut block = Vec::new();
                kind.draw(&mut dice, 0.5, &mut block);
                assert_eq!(block.len(), size, "{kind:?}");
                let read = read(kind, &block);
                assert_eq!(read.len(), elements, "{kind:?}");
                numbers.extend(read.into_iter().map(f64::from));
            }
            let mean = numbers.iter().sum::<f64>() / numbers.len() as f64;
            let variance = numbers.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / numbers.len() as f64;
            assert!(mean.abs() < 0.02, "{kind:?}: mean {mean}");
            assert!((variance.sqrt() - 0.5).abs() < 0.05, "{kind:?}: deviation {}", variance.sqrt());
        }
    }
}
