//! How is a server put under load, and what did it do under it?
//!
//! Closed loop: each client sends its next request when the one before is answered. Open loop: requests come at random
//! times of a given rate, whether or not the server keeps up (Poisson; the times follow from a seed).
//! Out: [`Load`], with the processor time that this process took meanwhile.

use super::client::{Ask, Told};
use rustix::time::{ClockId, clock_gettime};
use std::sync::Barrier;
use std::time::{Duration, Instant};
use tests_models::Dice;

#[derive(Debug)]
pub struct Load {
    /// Of each client, in order.
    pub told: Vec<Vec<Told>>,
    pub begun: Instant,
    pub wall: Duration,
    /// Of the load generator.
    pub own_cpu: Duration,
}

/// What a client asks next, when it knows what came of all before; none when it is done.
pub type Next<'a> = Box<dyn FnMut(&[Told]) -> Option<Ask> + Send + 'a>;

/// All clients begin at once, each on a thread of its own.
pub fn closed(clients: Vec<Next<'_>>) -> Load {
    let together = Barrier::new(clients.len() + 1);
    let before = cpu();
    let (told, begun) = std::thread::scope(|scope| {
        let running: Vec<_> = clients
            .into_iter()
            .map(|mut next| {
                let together = &together;
                scope.spawn(move || {
                    together.wait();
                    let mut told = Vec::new();
                    while let Some(ask) = next(&told) {
                        told.push(ask.run());
                    }
                    told
                })
            })
            .collect();
        together.wait();
        let begun = Instant::now();
        let told: Vec<Vec<Told>> =
            running.into_iter().map(|client| client.join().unwrap_or_default()).collect();
        (told, begun)
    });
    Load { told, begun, wall: begun.elapsed(), own_cpu: cpu().saturating_sub(before) }
}

/// Clients with one request each, all at once.
pub fn together(asks: Vec<Ask>) -> Load {
    closed(asks.into_iter().map(once).collect())
}

fn once<'a>(ask: Ask) -> Next<'a> {
    let mut ask = Some(ask);
    Box::new(move |_| ask.take())
}

/// Requests at random times, `per_second` of them on average; the order is theirs.
pub fn open(mut asks: Vec<Ask>, per_second: f64, seed: u64) -> Load {
    for (ask, at) in asks.iter_mut().zip(arrivals(per_second, seed)) {
        ask.think = at;
    }
    // The wait before an open loop's request is no thought of a client: it is its time of arrival.
    together(asks)
}

/// Times of arrival: the waits between are exponentially distributed.
fn arrivals(per_second: f64, seed: u64) -> impl Iterator<Item = Duration> {
    let mut dice = Dice(seed);
    let mut at = 0.0;
    std::iter::repeat_with(move || {
        at += -(1.0 - dice.share()).ln() / per_second;
        Duration::from_secs_f64(at)
    })
}

impl Load {
    pub fn all(&self) -> impl Iterator<Item = &Told> {
        self.told.iter().flatten()
    }

    pub fn failures(&self) -> Vec<&str> {
        self.all().filter_map(|told| told.failed.as_deref()).collect()
    }

    /// Tokens of all answers per second from the beginning to the last token.
    pub fn tokens_per_second(&self) -> f64 {
        let tokens: u64 = self.all().map(|told| told.usage.completion_tokens).sum();
        tokens as f64 / self.wall.as_secs_f64()
    }

    pub fn firsts_ms(&self) -> Vec<f64> {
        self.all().filter_map(Told::first_ms).collect()
    }

    pub fn gaps_ms(&self) -> Vec<f64> {
        self.all().flat_map(Told::gaps_ms).collect()
    }

    /// Prompt tokens that were computed; none when the server does not say what it had.
    pub fn computed_tokens(&self) -> Option<f64> {
        let each =
            self.all().map(|told| Some(told.usage.prompt_tokens.saturating_sub(told.usage.cached_tokens?)));
        each.sum::<Option<u64>>().map(|tokens| tokens as f64)
    }

    /// Of one processor.
    pub fn own_cpu_share(&self) -> f64 {
        self.own_cpu.as_secs_f64() / self.wall.as_secs_f64()
    }
}

fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// The value below which this share of the sample lies, by nearest rank; none of an empty sample.
pub fn quantile(sample: &[f64], share: f64) -> Option<f64> {
    let mut sorted = sample.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// Jain's index of fairness: 1 when all have the same, 1/n when one has all. Source: Jain, Chiu and Hawe 1984.
pub fn jain(shares: &[f64]) -> f64 {
    let (sum, squares) = shares.iter().fold((0.0, 0.0), |(sum, squares), x| (sum + x, squares + x * x));
    if squares == 0.0 { 0.0 } else { sum * sum / (shares.len() as f64 * squares) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_have_their_rate_and_follow_from_the_seed() {
        let times: Vec<Duration> = arrivals(50.0, 3).take(5000).collect();
        assert_eq!(times, arrivals(50.0, 3).take(5000).collect::<Vec<_>>());
        let rate = 5000.0 / times[4999].as_secs_f64();
        assert!((45.0..55.0).contains(&rate), "{rate}");
        let waits: Vec<f64> = times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
        let mean = waits.iter().sum::<f64>() / waits.len() as f64;
        let deviation = (waits.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / waits.len() as f64).sqrt();
        assert!((0.9..1.1).contains(&(deviation / mean)), "an exponential's deviation is its mean");
    }

    #[test]
    fn quantiles_are_of_the_sample_and_fairness_is_jains() {
        let sample: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(quantile(&sample, 0.5), Some(50.0));
        assert_eq!(quantile(&sample, 0.99), Some(99.0));
        assert_eq!(quantile(&sample, 1.0), Some(100.0));
        assert_eq!(quantile(&[], 0.5), None);
        assert_eq!(jain(&[3.0, 3.0, 3.0, 3.0]), 1.0);
        assert_eq!(jain(&[1.0, 0.0, 0.0, 0.0]), 0.25);
    }
}
