//! Where among a million vectors is it worth looking?
//!
//! Vectors are shared out to cells by the nearest of some thousand centres ("inverted file", Sivic and Zisserman, 2003); a
//! question looks into the cells whose centres are nearest to it. Centres are found in two steps, coarse ones and finer
//! ones below each (k-means on a sample), so that a vector is compared with 64 of them and not with a thousand.
//!
//! Disposable: made of the index's own vectors when it is loaded with more than [`super::near::CELLS_FROM`] of them, and
//!         followed by every change; no file holds it. It is made anew, with the index, when the vectors have doubled.
//! Always: every vector is in exactly one cell. The same vectors in the same order give the same cells.

use crate::near::{Probe, biased, unbiased};
use crate::vector::Coarse;

/// Coarse centres, and finer ones below each.
const FANOUT: usize = 32;
/// Vectors that centres are found by.
const SAMPLE: usize = 32 * FANOUT * FANOUT;
const ROUNDS: usize = 6;
/// A question looks into cells until it has seen this share of all vectors.
const SHARE_LOOKED_AT: f64 = 0.04;

/// Not in a cell.
const NOWHERE: u16 = u16::MAX;

#[derive(Debug, Default)]
pub(crate) struct Cells {
    coarse: Vec<Centre>,
    /// [`FANOUT`] for each coarse one, in their order.
    fine: Vec<Centre>,
    members: Vec<Vec<u32>>,
    /// By slot.
    cell_of: Vec<u16>,
    vectors: usize,
    /// How many there were when the centres were found.
    found_with: usize,
}

#[derive(Debug, Clone)]
struct Centre {
    scale: f32,
    /// As in the index.
    biased: Vec<u8>,
}

impl Centre {
    fn of(sum: &[f32]) -> Self {
        let length = sum.iter().map(|v| v * v).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
        let largest = sum.iter().fold(0f32, |most, v| most.max(v.abs())).max(f32::MIN_POSITIVE);
        let values: Vec<i8> = sum.iter().map(|v| (v / largest * 127.0).round() as i8).collect();
        // Of length 1, whatever was summed.
        let scale = largest / 127.0 / length;
        let biased = values.iter().map(|value| biased(*value)).collect();
        Self { scale, biased }
    }
}

/// The vectors of an index.
#[derive(Clone, Copy)]
pub(crate) struct Vectors<'a> {
    pub(crate) dimension: usize,
    pub(crate) scales: &'a [f32],
    /// Biased.
    pub(crate) values: &'a [u8],
}

impl Vectors<'_> {
    fn of(&self, slot: usize) -> Option<Coarse> {
        let scale = *self.scales.get(slot).filter(|scale| **scale > 0.0)?;
        let values = self.values.get(slot * self.dimension..(slot + 1) * self.dimension)?;
        Some(Coarse { scale, values: values.iter().map(|value| unbiased(*value)).collect() })
    }
}

impl Cells {
    /// Shares out all vectors. Some seconds for a million, on all processors.
    pub(crate) fn of(vectors: Vectors<'_>) -> Self {
        let slots: Vec<u32> =
            (0..vectors.scales.len() as u32).filter(|slot| vectors.scales[*slot as usize] > 0.0).collect();
        let step = (slots.len() / SAMPLE).max(1);
        let sample: Vec<Coarse> =
            slots.iter().step_by(step).filter_map(|slot| vectors.of(*slot as usize)).collect();
        let coarse = k_means(&sample.iter().collect::<Vec<_>>());
        let mut below: Vec<Vec<&Coarse>> = vec![Vec::new(); coarse.len()];
        for vector in &sample {
            below[nearest(&coarse, &Probe::new(vector)).0].push(vector);
        }
        let fine: Vec<Centre> = below
            .iter()
            .zip(&coarse)
            // Nothing of the sample was near it: its cells share what comes.
            .flat_map(|(own, above)| if own.is_empty() { vec![above.clone(); FANOUT] } else { k_means(own) })
            .collect();
        let mut cells = Self {
            members: vec![Vec::new(); fine.len()],
            coarse,
            fine,
            cell_of: vec![NOWHERE; vectors.scales.len()],
            vectors: 0,
            found_with: slots.len(),
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let parts: Vec<&[u32]> = slots.chunks(slots.len().div_ceil(threads).max(1)).collect();
        let shared: Vec<Vec<u16>> = std::thread::scope(|scope| {
            let workers: Vec<_> = parts
                .iter()
                .map(|part| scope.spawn(|| part.iter().map(|slot| cells.cell(vectors, *slot)).collect()))
                .collect();
            // A part that is missing would be records that nobody finds.
            let part = |worker: std::thread::ScopedJoinHandle<'_, Vec<u16>>| {
                worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            workers.into_iter().map(part).collect()
        });
        for (part, found) in parts.iter().zip(shared) {
            for (slot, cell) in part.iter().zip(found) {
                cells.put(*slot, cell);
            }
        }
        cells
    }

    pub(crate) fn are_there(&self) -> bool {
        !self.fine.is_empty()
    }

    /// The centres were found for half as many.
    pub(crate) fn are_outgrown(&self) -> bool {
        self.are_there() && self.vectors > 2 * self.found_with
    }

    /// A slot has this vector now, or none.
    pub(crate) fn set(&mut self, vectors: Vectors<'_>, slot: u32) {
        if !self.are_there() {
            return;
        }
        self.cell_of.resize(vectors.scales.len().max(self.cell_of.len()), NOWHERE);
        self.take(slot);
        let cell = self.cell(vectors, slot);
        self.put(slot, cell);
    }

    fn put(&mut self, slot: u32, cell: u16) {
        if let (Some(members), Some(place)) =
            (self.members.get_mut(usize::from(cell)), self.cell_of.get_mut(slot as usize))
        {
            members.push(slot);
            *place = cell;
            self.vectors += 1;
        }
    }

    fn take(&mut self, slot: u32) {
        let Some(place) = self.cell_of.get_mut(slot as usize) else { return };
        let cell = std::mem::replace(place, NOWHERE);
        if let Some(members) = self.members.get_mut(usize::from(cell)) {
            members.retain(|other| *other != slot);
            self.vectors -= 1;
        }
    }

    fn cell(&self, vectors: Vectors<'_>, slot: u32) -> u16 {
        let Some(vector) = vectors.of(slot as usize) else { return NOWHERE };
        let probe = Probe::new(&vector);
        let above = nearest(&self.coarse, &probe).0 * FANOUT;
        let below = self.fine.get(above..above + FANOUT).unwrap_or_default();
        u16::try_from(above + nearest(below, &probe).0).unwrap_or(NOWHERE)
    }

    /// Slots in the nearest cells; none when there are no cells.
    pub(crate) fn near(&self, probe: &Probe) -> Option<impl Iterator<Item = u32> + '_> {
        if !self.are_there() {
            return None;
        }
        let mut order: Vec<(f32, usize)> = self
            .fine
            .iter()
            .enumerate()
            .map(|(cell, centre)| (probe.cosine(centre.scale, &centre.biased), cell))
            .collect();
        order.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
        let wanted = (self.vectors as f64 * SHARE_LOOKED_AT) as usize;
        let mut seen = 0;
        let near = order.into_iter().map(|(_, cell)| &self.members[cell]).take_while(move |members| {
            let go_on = seen < wanted;
            seen += members.len();
            go_on
        });
        Some(near.flatten().copied())
    }

    pub(crate) fn bytes(&self) -> usize {
        let centres = self.coarse.len() + self.fine.len();
        let dimension = self.fine.first().map_or(0, |centre| centre.biased.len());
        self.members.iter().map(|members| 24 + members.capacity() * 4).sum::<usize>()
            + self.cell_of.capacity() * 2
            + centres * (dimension + 32)
    }
}

fn nearest(centres: &[Centre], probe: &Probe) -> (usize, f32) {
    let cosines = centres.iter().map(|centre| probe.cosine(centre.scale, &centre.biased)).enumerate();
    cosines.fold((0, f32::NEG_INFINITY), |best, one| if one.1 > best.1 { one } else { best })
}

/// [`FANOUT`] centres of these, by direction. Begun with vectors at even distances, so that nothing is random.
fn k_means(vectors: &[&Coarse]) -> Vec<Centre> {
    let dimension = vectors.first().map_or(0, |vector| vector.values.len());
    let floats =
        |vector: &Coarse| vector.values.iter().map(|v| f32::from(*v) * vector.scale).collect::<Vec<_>>();
    if vectors.is_empty() {
        return Vec::new();
    }
    let mut centres: Vec<Centre> = (0..FANOUT)
        .filter_map(|at| vectors.get(at * vectors.len() / FANOUT))
        .map(|vector| Centre::of(&floats(vector)))
        .collect();
    for _ in 0..ROUNDS {
        let mut sums = vec![vec![0.0f32; dimension]; FANOUT];
        let mut counts = [0usize; FANOUT];
        for vector in vectors {
            let (centre, _) = nearest(&centres, &Probe::new(vector));
            counts[centre] += 1;
            for (sum, value) in sums[centre].iter_mut().zip(&vector.values) {
                *sum += f32::from(*value) * vector.scale;
            }
        }
        for (at, (sum, count)) in sums.iter().zip(counts).enumerate() {
            // One that nobody is near to stays where it is.
            if count > 0 {
                centres[at] = Centre::of(sum);
            }
        }
    }
    centres
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIMENSION: usize = 32;

    /// In clusters, scattered by a third.
    fn vectors(count: usize, seed: u64) -> (Vec<f32>, Vec<u8>) {
        let mut state = seed;
        let mut unit = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        let centres: Vec<Vec<f32>> = (0..300).map(|_| (0..DIMENSION).map(|_| unit()).collect()).collect();
        let (mut scales, mut values) = (Vec::new(), Vec::new());
        for at in 0..count {
            let vector: Vec<f32> = centres[at * 7 % 300].iter().map(|v| v + 0.35 * unit()).collect();
            let centre = Centre::of(&vector);
            scales.push(centre.scale);
            values.extend(centre.biased);
        }
        (scales, values)
    }

    fn of<'a>(scales: &'a [f32], values: &'a [u8]) -> Vectors<'a> {
        Vectors { dimension: DIMENSION, scales, values }
    }

    fn cosine(vectors: Vectors<'_>, probe: &Probe, slot: usize) -> f32 {
        let start = slot * DIMENSION;
        probe.cosine(vectors.scales[slot], &vectors.values[start..start + DIMENSION])
    }

    #[test]
    fn the_nearest_ten_are_nearly_always_in_the_cells_looked_at() {
        let (scales, values) = vectors(10_000, 88172645463325252);
        let vectors = of(&scales, &values);
        let cells = Cells::of(vectors);
        let (mut found, mut looked_at) = (0, 0);
        for asked in (0..10_000).step_by(200) {
            let probe = Probe::new(&vectors.of(asked).unwrap());
            let mut exact: Vec<usize> = (0..10_000).collect();
            let order =
                |a: &usize, b: &usize| cosine(vectors, &probe, *b).total_cmp(&cosine(vectors, &probe, *a));
            exact.select_nth_unstable_by(10, order);
            let near: Vec<u32> = cells.near(&probe).unwrap().collect();
            looked_at += near.len();
            found += exact[..10].iter().filter(|slot| near.contains(&(**slot as u32))).count();
        }
        assert!(found >= 490, "{found} of 500");
        assert!(looked_at < 50 * 10_000 / 10, "{looked_at}");
    }

    #[test]
    fn every_vector_is_in_one_cell_whatever_happens_to_it() {
        let (mut scales, values) = vectors(5_000, 4101842887655102017);
        let mut cells = Cells::of(of(&scales, &values));
        assert!(cells.are_there() && !cells.are_outgrown());
        let all = |cells: &Cells| {
            let mut all: Vec<u32> = cells.members.iter().flatten().copied().collect();
            all.sort_unstable();
            all
        };
        assert_eq!(all(&cells), (0..5_000).collect::<Vec<u32>>());
        scales[17] = 0.0;
        cells.set(of(&scales, &values), 17);
        assert!(!all(&cells).contains(&17) && cells.vectors == 4_999);
        scales[17] = 0.01;
        cells.set(of(&scales, &values), 17);
        cells.set(of(&scales, &values), 17);
        assert_eq!((all(&cells), cells.vectors), ((0..5_000).collect(), 5_000));
        // One that came later.
        let (more, more_values) = vectors(5_001, 4101842887655102017);
        cells.set(of(&more, &more_values), 5_000);
        assert_eq!(cells.vectors, 5_001);
    }

    #[test]
    fn few_vectors_and_equal_ones_are_shared_out_too() {
        for count in [0usize, 1, 5, 40] {
            let (scales, values) = vectors(1, 7);
            let scales: Vec<f32> = scales.iter().cycle().take(count).copied().collect();
            let values: Vec<u8> = values.iter().cycle().take(count * DIMENSION).copied().collect();
            let cells = Cells::of(of(&scales, &values));
            assert_eq!(cells.members.iter().map(Vec::len).sum::<usize>(), count);
        }
    }
}
