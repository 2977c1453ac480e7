//! Which record comes next, when its neighbour is listed already?
//!
//! Neighbours share words and meaning, so they crowd together, and a question with several answers finds the second one
//! late. From the sixth place on, a neighbour of what is listed waits (Carbonell and Goldstein's maximal marginal
//! relevance, 1998, with "is its neighbour" for similarity). The first five are left alone: one answer is what most
//! questions have, and it costs them.

use super::Ranked;
use std::collections::HashSet;

/// Places that go by score alone.
const UNTOUCHED: usize = 5;
/// What a neighbour loses, in units of the score; fitted weights make one unit a factor of e in likelihood.
const PENALTY: f32 = 0.5;

/// The first `most` of what is sorted by score.
pub(super) fn spread(
    judged: Vec<Ranked>,
    most: usize,
    neighbours: impl Fn(usize) -> [Option<usize>; 2],
) -> Vec<Ranked> {
    let mut left: Vec<Option<Ranked>> = judged.into_iter().map(Some).collect();
    let mut listed = Vec::with_capacity(most.min(left.len()));
    let mut crowded: HashSet<usize> = HashSet::new();
    let mut from = 0;
    while listed.len() < most {
        while left.get(from).is_some_and(Option::is_none) {
            from += 1;
        }
        let spreads = listed.len() >= UNTOUCHED;
        let Some(chosen) = next(&left, from, |slot| spreads && crowded.contains(&slot)) else { break };
        let Some(one) = left[chosen].take() else { break };
        crowded.extend(neighbours(one.slot).into_iter().flatten());
        listed.push(one);
    }
    listed
}

/// The best of what is left; only as far as a penalty can reach.
fn next(left: &[Option<Ranked>], from: usize, is_crowded: impl Fn(usize) -> bool) -> Option<usize> {
    let mut best: Option<(usize, f32)> = None;
    for (at, one) in left.iter().enumerate().skip(from) {
        let Some(one) = one else { continue };
        if best.is_some_and(|(_, score)| one.score <= score) {
            break;
        }
        let score = if is_crowded(one.slot) { one.score - PENALTY } else { one.score };
        if best.is_none_or(|(_, most)| score > most) {
            best = Some((at, score));
        }
    }
    best.map(|(at, _)| at)
}
