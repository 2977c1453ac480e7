//! Which weights find what was said?
//!
//! The probability of each evidence turn against the turns that look best without being evidence: a softmax over the
//! weighted sums, one weight per signal, an L2 penalty, Adam from zero. Smooth, so that a few hundred questions are
//! enough; the same examples give the same weights. Which signals take part is the caller's choice.

use agentd_memory::rank::{SIGNALS, Signal, Signals, Weights};

/// Turns that each evidence turn is compared with.
const OTHERS: usize = 200;
const PENALTY: f32 = 0.005;
const STEPS: i32 = 100;
const STEP: f32 = 0.4;

/// One question: what was to be found and what else is there.
pub struct Example {
    evidence: Vec<[f32; SIGNALS]>,
    others: Vec<[f32; SIGNALS]>,
    /// Of each evidence turn; those of a question sum up to 1.
    share: f32,
}

impl Example {
    /// `None` where there is nothing to find. `named` is how many turns the question's evidence names.
    pub fn new(pool: &[(bool, Signals)], named: usize) -> Option<Self> {
        let evidence: Vec<_> = pool.iter().filter(|(is, _)| *is).map(|(_, signals)| signals.0).collect();
        let mut others: Vec<&Signals> =
            pool.iter().filter(|(is, _)| !is).map(|(_, signals)| signals).collect();
        let rough = |signals: &Signals| {
            let of = |signal| signals.get(signal);
            of(Signal::Words)
                + of(Signal::Kin)
                + 0.5 * (of(Signal::Before) + of(Signal::After))
                + of(Signal::Meaning)
        };
        others.sort_by(|a, b| rough(b).total_cmp(&rough(a)));
        others.truncate(OTHERS);
        let others = others.into_iter().map(|signals| signals.0).collect();
        (!evidence.is_empty()).then_some(Self { evidence, others, share: 1.0 / named.max(1) as f32 })
    }
}

/// The weights of the signals that `takes_part` says; those of others are 0.
pub fn fit(examples: &[&Example], takes_part: impl Fn(Signal) -> bool) -> Weights {
    let mask = Signal::ALL.map(|signal| f32::from(u8::from(takes_part(signal))));
    let mut weights = [0.0f32; SIGNALS];
    let (mut mean, mut square) = ([0.0f32; SIGNALS], [0.0f32; SIGNALS]);
    for step in 1..=STEPS {
        let gradient = gradient(examples, &weights);
        let rate = STEP * (1.0 - (step - 1) as f32 / STEPS as f32) + STEP / 80.0;
        for at in 0..SIGNALS {
            let slope = (gradient[at] - PENALTY * weights[at]) * mask[at];
            mean[at] = 0.8 * mean[at] + 0.2 * slope;
            square[at] = 0.98 * square[at] + 0.02 * slope * slope;
            let (mean, square) =
                (mean[at] / (1.0 - 0.8f32.powi(step)), square[at] / (1.0 - 0.98f32.powi(step)));
            weights[at] += rate * mean / (square.sqrt() + 1e-6);
        }
    }
    Weights(weights)
}

/// Of the mean log-likelihood.
fn gradient(examples: &[&Example], weights: &[f32; SIGNALS]) -> [f32; SIGNALS] {
    let sum = |signals: &[f32; SIGNALS]| signals.iter().zip(weights).map(|(a, b)| a * b).sum::<f32>();
    let mut gradient = [0.0f32; SIGNALS];
    for example in examples {
        let sums: Vec<f32> = example.others.iter().map(sum).collect();
        let most = sums.iter().copied().fold(0.0f32, f32::max);
        let mut total = 0.0f32;
        let mut expected = [0.0f32; SIGNALS];
        for (value, signals) in sums.iter().zip(&example.others) {
            let likely = (value - most).exp();
            total += likely;
            expected.iter_mut().zip(signals).for_each(|(sum, signal)| *sum += likely * signal);
        }
        expected.iter_mut().for_each(|sum| *sum /= total.max(f32::MIN_POSITIVE));
        for signals in &example.evidence {
            let likely = (sum(signals) - most).min(60.0).exp();
            let missing = total / (total + likely) * example.share;
            for at in 0..SIGNALS {
                gradient[at] += missing * (signals[at] - expected[at]);
            }
        }
    }
    gradient.map(|sum| sum / examples.len().max(1) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signals(words: f32, kin: f32) -> Signals {
        let mut signals = Signals::default();
        signals.0[Signal::Words as usize] = words;
        signals.0[Signal::Kin as usize] = kin;
        signals
    }

    #[test]
    fn what_tells_evidence_apart_gets_weight() {
        let example = Example::new(
            &[(true, signals(1.0, 0.5)), (false, signals(0.0, 0.5)), (false, signals(0.2, 0.6))],
            1,
        )
        .unwrap();
        let weights = fit(&[&example], |_| true);
        assert!(weights.of(Signal::Words) > 1.0 && weights.of(Signal::Kin) < 0.1, "{weights:?}");
        assert_eq!(weights.of(Signal::Time), 0.0);
        let without = fit(&[&example], |signal| signal != Signal::Words);
        assert_eq!(without.of(Signal::Words), 0.0);
        assert_eq!(fit(&[&example], |_| true), weights);
        assert!(Example::new(&[(false, signals(1.0, 1.0))], 1).is_none());
    }
}
