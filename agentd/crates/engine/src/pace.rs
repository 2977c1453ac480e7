//! How many tokens of a prompt are read in one step, so that nobody who answers stalls?
//!
//! What a token of a prompt takes grows with how far back it looks, so each measurement gives a point of a line over
//! the depth. The processor has two such lines: llama.cpp attends by tiles of 64 tokens, and to fewer token by token,
//! which takes over twice as long for each cell (`GGML_FA_TILE_Q` in ggml-cpu/common.h,
//! `ggml_compute_forward_flash_attn_ext` in ggml-cpu/ops.cpp). Where even one tile takes too long, as behind thousands of
//! tokens on a small machine, smaller pieces keep the time at the cost of speed. Devices have one line, found twice.
//!
//! Pure: in come measurements, out goes a number of tokens.

use std::time::Duration;

/// Longest step beside somebody who answers, below the half second that a reader takes for a stall.
const STALL: Duration = Duration::from_millis(440);
/// The same while a prompt is read that is more important than all who answer: they wait longer, it hardly at all.
const URGENT_STALL: Duration = Duration::from_millis(1000);
/// Where answering alone takes so long that no such time can be kept, a prompt has as much of a step as the answers
/// have, an urgent one twice as much: it must come to its end there too.
const OWN_SHARE: f64 = 1.0;
const URGENT_SHARE: f64 = 2.0;
/// From here on the processor attends by tiles.
const TILE_TOKENS: u32 = 64;
/// Chunks of tiles are whole such pieces: half a tile costs little.
const GRAIN_TOKENS: u32 = 32;
/// So many tokens one by one take as long as a tile behind nothing at all, and behind more a tile is faster.
const NEARLY_A_TILE_TOKENS: u32 = 48;
/// A chunk is never smaller: below this the weights are read for too few tokens.
const LEAST_TOKENS: u32 = 8;
/// Before anything is known of single tokens: how much longer one takes than in a tile.
const SINGLE_OVER_TILE: f64 = 2.0;
/// Depths that differ by less say little of a slope: 200 tokens, squared, in thousands (ridge regression).
const SPREAD_THAT_COUNTS: f64 = 0.04;
/// What is left of a measurement's say after the next.
const MEMORY: f64 = 0.9;

/// How a prompt stands to those who answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Urgency {
    Usual,
    AboveAllAnswers,
}

/// Tokens of prompts in one batch, and the mean of the positions they stand at.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Read {
    tokens: u32,
    positions: f64,
}

impl Read {
    pub(crate) fn add(&mut self, from: u32, tokens: u32) {
        self.tokens += tokens;
        self.positions += f64::from(tokens) * middle(from, tokens);
    }

    fn depth(&self) -> f64 {
        self.positions / f64::from(self.tokens.max(1))
    }
}

/// What steps take on this machine, measured as they go by.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    tiles: Line,
    singles: Line,
    /// A step in which everybody only answers.
    answer_ms: Option<f64>,
}

impl Pace {
    pub(crate) fn measured(&mut self, read: Read, answering: u32, took: Duration) {
        let took_ms = took.as_secs_f64() * 1000.0;
        if read.tokens == 0 {
            self.answer_ms =
                Some(self.answer_ms.map_or(took_ms, |old| MEMORY * old + (1.0 - MEMORY) * took_ms));
            return;
        }
        let beside = if answering > 0 { self.answer_ms.unwrap_or(0.0) } else { 0.0 };
        // At least a tenth belongs to the prompt, whatever was measured before.
        let own_ms = (took_ms - beside).max(took_ms / 10.0).max(0.001);
        let line = if read.tokens >= TILE_TOKENS {
            &mut self.tiles
        } else if read.tokens >= LEAST_TOKENS {
            &mut self.singles
        } else {
            // A prompt's last word measures the reading of weights.
            return;
        };
        line.learn(read.depth(), own_ms / f64::from(read.tokens));
    }

    /// Prompt tokens of the next step, of which the first stands at `from`.
    pub(crate) fn chunk(&self, answering: u32, urgency: Urgency, from: u32, most: u32) -> u32 {
        if answering == 0 {
            return most;
        }
        let (stall, share) = match urgency {
            Urgency::Usual => (STALL, OWN_SHARE),
            Urgency::AboveAllAnswers => (URGENT_STALL, URGENT_SHARE),
        };
        let answer_ms = self.answer_ms.unwrap_or(0.0);
        let own_ms = (stall.as_secs_f64() * 1000.0 - answer_ms).max(share * answer_ms);
        let fits = |tokens: &u32| {
            let each_ms = self.tiles.at(middle(from, *tokens));
            each_ms.is_some_and(|each_ms| each_ms * f64::from(*tokens) <= own_ms)
        };
        let tiles =
            (TILE_TOKENS..=most).rev().filter(|tokens| tokens.is_multiple_of(GRAIN_TOKENS)).find(fits);
        let tokens = tiles.or_else(|| {
            let each_ms = self.single_ms(f64::from(from))?;
            let singles = (own_ms / each_ms).min(f64::from(most)) as u32;
            Some(if singles >= NEARLY_A_TILE_TOKENS { TILE_TOKENS } else { singles.max(LEAST_TOKENS) })
        });
        tokens.unwrap_or(TILE_TOKENS).min(most)
    }

    /// What a token takes that is read by itself. Short prompts teach that for small depths only, so the way down is the
    /// tiles', and steeper, until something was measured there.
    fn single_ms(&self, depth: f64) -> Option<f64> {
        let guess_ms = || Some(SINGLE_OVER_TILE * self.tiles.at(depth)?);
        self.singles.at_by(depth, SINGLE_OVER_TILE * self.tiles.slope(0.0)).or_else(guess_ms)
    }

    /// How long so many prompt tokens take, by what is known.
    pub(crate) fn prompt_ms(&self, tokens: u32) -> u64 {
        // Before the first measurement any order of magnitude does: a small model on a small machine.
        (f64::from(tokens) * self.tiles.at(0.0).or(self.singles.at(0.0)).unwrap_or(2.0)) as u64
    }

    pub(crate) fn prompt_tokens_per_s(&self) -> u32 {
        self.tiles.at(0.0).or(self.singles.at(0.0)).map_or(0, |each_ms| (1000.0 / each_ms) as u32)
    }
}

fn middle(from: u32, tokens: u32) -> f64 {
    f64::from(from) + f64::from(tokens) / 2.0
}

/// Milliseconds for a token over its depth: the straight line that is nearest to what was measured, the last
/// measurements before older ones. Sums of weighted least squares.
#[derive(Debug, Default)]
struct Line {
    weight: f64,
    depths: f64,
    squares: f64,
    times: f64,
    products: f64,
}

impl Line {
    /// Depths are counted in thousands, so that all sums are of one size.
    fn learn(&mut self, depth: f64, each_ms: f64) {
        let depth = depth / 1000.0;
        for (sum, new) in [
            (&mut self.weight, 1.0),
            (&mut self.depths, depth),
            (&mut self.squares, depth * depth),
            (&mut self.times, each_ms),
            (&mut self.products, depth * each_ms),
        ] {
            *sum = MEMORY * *sum + new;
        }
    }

    fn at(&self, depth: f64) -> Option<f64> {
        self.at_by(depth, 0.0)
    }

    /// With a slope that holds as long as depths hardly differed.
    fn at_by(&self, depth: f64, usual_slope: f64) -> Option<f64> {
        if self.weight == 0.0 {
            return None;
        }
        let (mean_depth, mean_time) = (self.depths / self.weight, self.times / self.weight);
        let time = mean_time + self.slope(usual_slope) * (depth / 1000.0 - mean_depth);
        Some(time.max(mean_time / 10.0))
    }

    /// For a thousand tokens of depth. Nothing gets faster with depth.
    fn slope(&self, usual: f64) -> f64 {
        if self.weight == 0.0 {
            return usual;
        }
        let (mean_depth, mean_time) = (self.depths / self.weight, self.times / self.weight);
        let spread = self.squares / self.weight - mean_depth * mean_depth;
        let together = self.products / self.weight - mean_depth * mean_time;
        ((together + SPREAD_THAT_COUNTS * usual) / (spread.max(0.0) + SPREAD_THAT_COUNTS)).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ms(time: f64) -> Duration {
        Duration::from_secs_f64(time / 1000.0)
    }

    fn read(from: u32, tokens: u32) -> Read {
        let mut read = Read::default();
        read.add(from, tokens);
        read
    }

    /// As measured with Qwen2.5-0.5B's shape on two processors.
    fn took_ms(from: u32, tokens: u32) -> f64 {
        let (base, slope) = if tokens >= TILE_TOKENS { (3.5, 0.000_8) } else { (5.4, 0.002_1) };
        f64::from(tokens) * (base + slope * middle(from, tokens))
    }

    #[test]
    fn a_chunk_is_as_long_as_a_stall_may_be() {
        let mut pace = Pace::default();
        assert_eq!(pace.chunk(0, Urgency::Usual, 0, 512), 512, "nobody is kept waiting");
        assert_eq!(pace.chunk(3, Urgency::Usual, 0, 512), TILE_TOKENS, "nothing is known yet");
        // 512 tokens a second, an answer's step takes 50 ms.
        pace.measured(Read::default(), 3, ms(50.0));
        for _ in 0..30 {
            pace.measured(read(0, 100), 3, ms(50.0 + 195.312));
        }
        assert_eq!(
            pace.chunk(3, Urgency::Usual, 0, 512),
            192,
            "390 ms at 512 tokens a second, in pieces of 32"
        );
        assert_eq!(pace.chunk(3, Urgency::AboveAllAnswers, 0, 512), 480, "950 ms");
        assert_eq!(pace.prompt_ms(512), 999);
        // Answering alone takes half a second: nothing fits, and prompts have as much again.
        for _ in 0..100 {
            pace.measured(Read::default(), 3, ms(500.0));
        }
        assert_eq!(pace.chunk(3, Urgency::Usual, 0, 2048), 224);
        assert_eq!(pace.chunk(3, Urgency::AboveAllAnswers, 0, 2048), 480);
        // A machine that reads very slowly still reads something.
        for _ in 0..100 {
            pace.measured(read(0, 100), 3, Duration::from_secs(100));
        }
        assert_eq!(pace.chunk(3, Urgency::Usual, 0, 512), LEAST_TOKENS);
    }

    /// A prompt of 16,000 tokens beside four who answer: no step is longer than a reader's patience, from the first.
    #[test]
    fn deep_prompts_stall_nobody() {
        // Whether or not short pieces of short prompts were read before.
        for short in [&[][..], &[8], &[40, 50, 60]] {
            let mut pace = Pace::default();
            pace.measured(Read::default(), 4, ms(70.0));
            for tokens in short {
                pace.measured(read(0, *tokens), 0, ms(took_ms(0, *tokens)));
            }
            deep_prompt_stalls_nobody(pace);
        }
    }

    fn deep_prompt_stalls_nobody(mut pace: Pace) {
        let (mut at, mut steps) = (0, Vec::new());
        while at < 16_000 {
            let tokens = pace.chunk(4, Urgency::Usual, at, 512).min(16_000 - at);
            let took = took_ms(at, tokens);
            pace.measured(read(at, tokens), 0, ms(took));
            steps.push((at, tokens, took + 70.0));
            at += tokens;
        }
        let late: Vec<_> = steps.iter().filter(|(_, _, took)| *took > 450.0).collect();
        // The first pieces of each kind are guesses.
        assert!(late.len() <= 4, "{late:?}");
        assert!(steps.iter().take(20).all(|(_, tokens, _)| *tokens >= TILE_TOKENS), "tiles where they fit");
        // Another prompt begins anew, with tiles again.
        assert!(pace.chunk(4, Urgency::Usual, 0, 512) >= TILE_TOKENS);
    }

    proptest! {
        /// Whatever is measured, some number of tokens comes out that a batch can hold.
        #[test]
        fn there_is_always_a_chunk(
            measured in proptest::collection::vec((0u32..100_000, 0u32..2048, 0u32..5, 0.0f64..1e6), 0..50),
            from in 0u32..200_000,
            most in 1u32..2048,
        ) {
            let mut pace = Pace::default();
            for (from, tokens, answering, took) in measured {
                pace.measured(read(from, tokens), answering, ms(took));
            }
            for urgency in [Urgency::Usual, Urgency::AboveAllAnswers] {
                let tokens = pace.chunk(1, urgency, from, most);
                prop_assert!((1..=most).contains(&tokens));
            }
            prop_assert!(pace.prompt_ms(most) < u64::MAX);
        }
    }
}
