//! What will an answer say next, if it says again what was said before?
//!
//! Code that is edited, JSON that is echoed, a document that is quoted: the last tokens of an answer often stand somewhere
//! before, and what followed there follows again. Such a guess is computed beside the token that was chosen last. It
//! never changes what is chosen: each token is chosen from logits as always, a guess only has them ready.
//!
//! In:     tokens of a prompt and its answer, how many guesses were right, how long steps took. Out: tokens to guess.
//! True:   guessed is only as far as it pays ([`Economy`]): the chance that one more is right, times a step that it spares,
//!         is more than what one more costs. Where it does not pay nothing is guessed but a try now and then.
//! Source: prompt lookup, `docs/speculative.md` (n-gram) of llama.cpp; the length is our own rule.

use std::collections::HashMap;
use std::time::Duration;

/// Tokens that must be the same as before: two are often the same by chance, four are seldom found.
const SAME: usize = 3;
/// Tokens of one guess at most. llama.cpp reserves rows of logits for so many ([`crate::chat::parameters`]).
pub(crate) const GUESS_MOST: u32 = 8;
/// Sequences that may be guessed for at once: with more of them a step has enough to do.
pub(crate) const ANSWERING_MOST: u32 = 2;
/// How much a new observation counts.
const LEARNING: f64 = 0.15;
/// How likely a guess is taken to be right before any was made.
const FIRST_CHANCE: f64 = 0.6;
/// Part of a step that one more token is taken to cost before it was measured. More than it is on most machines.
const FIRST_COST: f64 = 0.4;
/// Tokens without a guess after one that does not pay any more; doubled each time that a try fails.
const REST_LEAST: u32 = 16;
const REST_MOST: u32 = 512;

/// What steps take on this machine, with and without guesses.
#[derive(Debug, Default)]
pub(crate) struct Economy {
    /// A step in which so many (one more than the index) answer.
    plain_ms: [Option<f64>; ANSWERING_MOST as usize],
    /// Of one token of a guess.
    more_ms: [Option<f64>; ANSWERING_MOST as usize],
}

impl Economy {
    /// Of a step without prompts: who answered, and tokens of guesses beside them.
    pub(crate) fn measured(&mut self, answering: u32, guessed: u32, took: Duration) {
        let Some(index) = (answering as usize).checked_sub(1).filter(|index| *index < self.plain_ms.len())
        else {
            return;
        };
        let took_ms = took.as_secs_f64() * 1000.0;
        match (guessed, self.plain_ms[index]) {
            (0, _) => learn(&mut self.plain_ms[index], took_ms),
            (_, Some(plain_ms)) => {
                learn(&mut self.more_ms[index], ((took_ms - plain_ms) / f64::from(guessed)).max(0.0));
            }
            // It cannot be told apart.
            (_, None) => {}
        }
    }

    /// What one token of a guess costs, as a part of a step; `None` before a step was measured.
    fn cost(&self, answering: u32) -> Option<f64> {
        let index = (answering as usize).checked_sub(1)?;
        let plain_ms = (*self.plain_ms.get(index)?)?;
        let more_ms = self.more_ms.get(index).copied().flatten();
        Some(more_ms.map_or(FIRST_COST, |more_ms| more_ms / plain_ms.max(0.001)))
    }
}

fn learn(known: &mut Option<f64>, new: f64) {
    *known = Some(known.map_or(new, |old| old + LEARNING * (new - old)));
}

/// Guesses for one answer.
#[derive(Debug)]
pub(crate) struct Drafter {
    /// Where what follows some tokens begins, the last time that they were there.
    after: HashMap<[i32; SAME], u32>,
    /// Tokens that were looked at.
    seen: usize,
    /// How likely the next guessed token is right, where all before it were.
    chance: f64,
    /// Tokens until the next try, and how long the next rest is.
    resting: u32,
    rest: u32,
}

impl Default for Drafter {
    fn default() -> Self {
        Self { after: HashMap::new(), seen: 0, chance: FIRST_CHANCE, resting: 0, rest: REST_LEAST }
    }
}

impl Drafter {
    /// A guess of what follows; empty where nothing is known or it would not pay.
    pub(crate) fn guess(&mut self, text: &[i32], answering: u32, economy: &Economy) -> Vec<i32> {
        let Some(cost) = economy.cost(answering) else { return Vec::new() };
        if self.resting > 0 {
            self.resting -= 1;
            return Vec::new();
        }
        let Some(from) = self.find(text) else { return Vec::new() };
        let mut guess: Vec<i32> = Vec::new();
        for at in from..from + self.worth(cost) as usize {
            // What goes round in a circle is guessed on from the guess.
            let token = text.get(at).or_else(|| guess.get(at - text.len())).copied();
            guess.extend(token);
        }
        guess
    }

    /// So many were guessed, and the first of them were right.
    pub(crate) fn settled(&mut self, guessed: u32, right: u32, answering: u32, economy: &Economy) {
        for _ in 0..right {
            self.chance += LEARNING * (1.0 - self.chance);
        }
        if right < guessed {
            self.chance -= LEARNING * self.chance;
        }
        if guessed == 0 {
            return;
        }
        let cost = economy.cost(answering).unwrap_or(FIRST_COST);
        if self.chance > cost {
            self.rest = REST_LEAST;
        } else if right == guessed && cost < 1.0 {
            // A try that was right is followed by another one soon.
            self.resting = REST_LEAST / 4;
        } else {
            self.resting = self.rest;
            self.rest = (2 * self.rest).min(REST_MOST);
        }
    }

    /// Tokens to guess: as long as the chance that all are right is more than what the last one costs; one, to try,
    /// where not even the first is worth it.
    fn worth(&self, cost: f64) -> u32 {
        let mut right = self.chance;
        let mut most = 0;
        while most < GUESS_MOST && right > cost {
            right *= self.chance;
            most += 1;
        }
        most.max(1)
    }

    /// Where what followed the last tokens the last time begins.
    fn find(&mut self, text: &[i32]) -> Option<usize> {
        // The last tokens themselves are not what they are looked for in.
        while self.seen + SAME < text.len() {
            let key = key(&text[self.seen..])?;
            self.after.insert(key, (self.seen + SAME) as u32);
            self.seen += 1;
        }
        let last = text.len().checked_sub(SAME)?;
        self.after.get(&key(&text[last..])?).map(|at| *at as usize)
    }
}

fn key(text: &[i32]) -> Option<[i32; SAME]> {
    text.get(..SAME)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: f64) -> Duration {
        Duration::from_secs_f64(ms / 1000.0)
    }

    /// A step takes 20 ms, a guessed token so much more.
    fn economy(more_ms: f64) -> Economy {
        let mut economy = Economy::default();
        for _ in 0..50 {
            economy.measured(1, 0, ms(20.0));
            economy.measured(1, 4, ms(20.0 + 4.0 * more_ms));
        }
        economy
    }

    #[test]
    fn what_was_said_before_is_guessed() {
        let (mut drafter, economy) = (Drafter::default(), economy(1.0));
        assert_eq!(drafter.guess(&[1, 2, 3, 4, 5], 1, &economy).len(), 0, "nothing repeats itself");
        assert_eq!(drafter.guess(&[1, 2, 3, 4, 5, 1, 2, 3], 1, &economy), [4, 5, 1, 2, 3]);
        // The last time counts, and what was said since is known too.
        assert_eq!(drafter.guess(&[1, 2, 3, 4, 5, 1, 2, 3, 9, 1, 2, 3], 1, &economy), [9, 1, 2, 3, 9]);
        assert_eq!(drafter.guess(&[1, 2], 1, &economy).len(), 0);
        assert_eq!(Drafter::default().guess(&[7; 6], 1, &economy), [7; 5], "what goes round");
    }

    #[test]
    fn before_a_step_was_measured_nothing_is_guessed() {
        let again = [1, 2, 3, 4, 1, 2, 3];
        assert_eq!(Drafter::default().guess(&again, 1, &Economy::default()).len(), 0);
        assert_eq!(Drafter::default().guess(&again, 3, &economy(1.0)).len(), 0, "three answer");
        let mut unmeasured = Economy::default();
        unmeasured.measured(1, 0, ms(20.0));
        assert_eq!(
            Drafter::default().guess(&again, 1, &unmeasured),
            [4],
            "0.6 is more than 0.4, 0.36 is not"
        );
    }

    /// The longer the more is right, and the cheaper it is.
    #[test]
    fn guesses_are_as_long_as_they_pay() {
        let text: Vec<i32> = (0..100).chain(0..10).collect();
        let cheap = economy(1.0);
        let mut drafter = Drafter::default();
        let first = drafter.guess(&text, 1, &cheap).len();
        for _ in 0..20 {
            drafter.settled(4, 4, 1, &cheap);
        }
        assert_eq!(drafter.guess(&text, 1, &cheap).len(), GUESS_MOST as usize);
        for _ in 0..3 {
            drafter.settled(4, 0, 1, &cheap);
        }
        let shorter = drafter.guess(&text, 1, &cheap).len();
        assert!(
            (1..GUESS_MOST as usize).contains(&shorter) && first < GUESS_MOST as usize,
            "{first}, {shorter}"
        );
    }

    /// Where it does not pay it ends by itself: in a thousand tokens a handful of tries.
    #[test]
    fn what_does_not_pay_is_left_off() {
        let text: Vec<i32> = (0..100).chain(0..10).collect();
        for (more_ms, right) in [(1.0, 0), (30.0, 1)] {
            let (mut drafter, economy) = (Drafter::default(), economy(more_ms));
            let mut guessed = 0;
            for _ in 0..1000 {
                let guess = drafter.guess(&text, 1, &economy).len() as u32;
                guessed += guess;
                if guess > 0 {
                    drafter.settled(guess, right.min(guess), 1, &economy);
                }
            }
            assert!((1..60).contains(&guessed), "{guessed} guesses where one costs {more_ms} ms");
        }
        // And it begins again where it pays.
        let (mut drafter, economy) = (Drafter::default(), economy(1.0));
        (0..40).for_each(|_| drafter.settled(1, 0, 1, &economy));
        let mut tries = 0;
        for _ in 0..2000 {
            let guess = drafter.guess(&text, 1, &economy).len() as u32;
            tries += u32::from(guess > 0);
            drafter.settled(guess, guess, 1, &economy);
        }
        assert!(tries > 500, "{tries}");
    }
}
