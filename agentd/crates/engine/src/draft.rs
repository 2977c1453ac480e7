//! What will an answer say next, if it says again what was said before?
//!
//! Code that is edited, JSON that is echoed, a document that is quoted: the last tokens of an answer often stand somewhere
//! before, and what followed there follows again. Such a guess is computed beside the token that was chosen last. It
//! never changes what is chosen: each token is chosen from logits as always, a guess only has them ready.
//!
//! In:     tokens of a prompt and its answer, how many guesses were right, how long steps took. Out: tokens to guess.
//! True:   guessed is only as far as it pays ([`Economy`]): as many as give the most tokens in a time, by how often guesses
//!         were right and what steps of so many tokens took. Where none pay nothing is guessed but a try now and then.
//! Source: prompt lookup, `docs/speculative.md` (n-gram) of llama.cpp; the length is our own rule.

use std::collections::HashMap;
use std::time::Duration;

/// Tokens that must be the same as before: two are often the same by chance, four are seldom found.
const SAME: usize = 3;
/// Tokens of a step with guesses at most. llama.cpp reserves as many rows of logits anyway ([`crate::chat::outputs`]).
pub(crate) const STEP_MOST: u32 = 32;
/// Sequences that may be guessed for at once: with more of them a step has enough to do.
pub(crate) const ANSWERING_MOST: u32 = 2;
/// How much a new observation counts.
const LEARNING: f64 = 0.15;
/// How likely a guess is taken to be right before any was made.
const FIRST_CHANCE: f64 = 0.6;
/// Part of a step that one more token is taken to cost before it was measured.
const FIRST_COST: f64 = 0.4;
/// Tokens without a guess after one that does not pay any more; doubled each time that a try fails.
const REST_LEAST: u32 = 16;
const REST_MOST: u32 = 512;

/// What steps take on this machine, by the tokens in them. It need not grow evenly: the processor's kernels take tokens
/// in fours, so that four may take hardly longer than two.
#[derive(Debug, Default)]
pub(crate) struct Economy {
    /// Of one token, of two, and so on.
    step_ms: [Option<f64>; STEP_MOST as usize],
}

impl Economy {
    /// Of a step without prompts: who answered, and tokens of guesses beside them.
    pub(crate) fn measured(&mut self, answering: u32, guessed: u32, took: Duration) {
        if answering > ANSWERING_MOST {
            return;
        }
        let index = (answering + guessed).checked_sub(1).map(|index| index as usize);
        if let Some(known) = index.and_then(|index| self.step_ms.get_mut(index)) {
            learn(known, took.as_secs_f64() * 1000.0);
        }
    }

    /// What a step of so many tokens takes. What was not measured is taken to be cheap, so that it is tried: between two
    /// that were, it takes what the smaller one takes; beyond them, little more. `None` if no step as small was measured.
    fn step_ms(&self, tokens: u32) -> Option<f64> {
        let known = |(index, ms): (usize, &Option<f64>)| Some((index as f64 + 1.0, (*ms)?));
        let mut points = self.step_ms.iter().enumerate().filter_map(known).peekable();
        let first = points.next().filter(|(at, _)| *at <= f64::from(tokens))?;
        let (mut each_ms, mut last) = (FIRST_COST * first.1, first);
        while let Some(point) = points.next_if(|(at, _)| *at <= f64::from(tokens)) {
            each_ms = each_ms.min(((point.1 - last.1) / (point.0 - last.0)).max(0.0));
            last = point;
        }
        let beyond = if points.peek().is_some() { 0.0 } else { f64::from(tokens) - last.0 };
        Some(last.1 + each_ms * beyond)
    }

    /// Whether a step with a guess gave more tokens than steps without one would have given in that time.
    fn paid(&self, guessed: u32, right: u32, answering: u32) -> bool {
        let (plain, with) = (self.step_ms(answering), self.step_ms(answering + guessed));
        let each = f64::from(answering);
        plain.zip(with).is_some_and(|(plain, with)| (each + f64::from(right)) * plain > each * with)
    }

    /// Tokens to guess for one of those who answer: the number with which most tokens are chosen in a time, where each
    /// is right with this chance if those before it were.
    fn worth(&self, chance: f64, answering: u32) -> u32 {
        let speed = |guess: u32, chosen: f64| {
            let step_ms = self.step_ms(answering + guess)?;
            Some((f64::from(answering) - 1.0 + chosen) / step_ms.max(0.001))
        };
        let Some(plain) = speed(0, 1.0) else { return 0 };
        let (mut best, mut most) = (plain, 0);
        let (mut chosen, mut right) = (1.0, 1.0);
        for guess in 1..STEP_MOST / answering.max(1) {
            right *= chance;
            chosen += right;
            if let Some(speed) = speed(guess, chosen).filter(|speed| *speed > best) {
                (best, most) = (speed, guess);
            }
        }
        most
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
    /// Tokens of a try. After one that was right comes a longer one: it is long guesses that pay, if any.
    trying: u32,
}

impl Default for Drafter {
    fn default() -> Self {
        Self { after: HashMap::new(), seen: 0, chance: FIRST_CHANCE, resting: 0, rest: REST_LEAST, trying: 1 }
    }
}

impl Drafter {
    /// A guess of what follows; empty where nothing is known or it would not pay.
    pub(crate) fn guess(&mut self, text: &[i32], answering: u32, economy: &Economy) -> Vec<i32> {
        if answering > ANSWERING_MOST || economy.step_ms(answering).is_none() {
            return Vec::new();
        }
        if self.resting > 0 {
            self.resting -= 1;
            return Vec::new();
        }
        let Some(from) = self.find(text) else { return Vec::new() };
        let mut guess: Vec<i32> = Vec::new();
        let length = match economy.worth(self.chance, answering) {
            0 => self.trying.min(STEP_MOST / answering.max(1) - 1),
            worth => worth,
        };
        for at in from..from + length as usize {
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
            self.trying = 1;
        }
        if guessed == 0 {
            return;
        }
        if economy.paid(guessed, right, answering) {
            self.rest = REST_LEAST;
        } else if economy.worth(self.chance, answering) > 0 {
            // One that was wrong among many that were right.
        } else if right == guessed && economy.worth(1.0, answering) > 0 {
            // More of them could pay.
            self.trying = 2 * guessed + 1;
        } else {
            self.resting = self.rest;
            self.rest = (2 * self.rest).min(REST_MOST);
        }
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
        assert_eq!(drafter.guess(&[1, 2, 3, 4, 5, 1, 2, 3], 1, &economy), [4, 5, 1]);
        // The last time counts, and what was said since is known too.
        assert_eq!(drafter.guess(&[1, 2, 3, 4, 5, 1, 2, 3, 9, 1, 2, 3], 1, &economy), [9, 1, 2]);
        assert_eq!(drafter.guess(&[1, 2], 1, &economy).len(), 0);
        assert_eq!(Drafter::default().guess(&[7; 6], 1, &economy), [7; 3], "what goes round");
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
            "1.6 tokens in 28 ms are more than one in 20, and than 1.96 in 36"
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
        let longest = STEP_MOST as usize - 1;
        assert_eq!(drafter.guess(&text, 1, &cheap).len(), longest);
        assert_eq!(drafter.guess(&text, 2, &cheap).len(), longest / 2, "two share a step");
        for _ in 0..3 {
            drafter.settled(4, 0, 1, &cheap);
        }
        let shorter = drafter.guess(&text, 1, &cheap).len();
        assert!((1..longest).contains(&shorter) && first < longest, "{first}, {shorter}");
    }

    /// A processor whose kernels take tokens in fours: two take longer than twice one, eight hardly longer than four.
    #[test]
    fn steps_need_not_grow_evenly() {
        let took = |tokens: u32| match tokens {
            0..9 => ms([0.0, 17.5, 43.0, 52.0, 59.0, 78.0, 86.0, 98.0, 82.0][tokens as usize]),
            more => ms(100.0 + 14.0 * f64::from(more - 9)),
        };
        let text: Vec<i32> = (0..100).chain(0..10).collect();
        let (mut drafter, mut economy) = (Drafter::default(), Economy::default());
        economy.measured(1, 0, took(1));
        let mut last = 0;
        for _ in 0..200 {
            let guessed = drafter.guess(&text, 1, &economy).len() as u32;
            economy.measured(1, guessed, took(1 + guessed));
            drafter.settled(guessed, guessed, 1, &economy);
            last = if guessed > 0 { guessed } else { last };
        }
        assert_eq!(last, 7, "{economy:?}");
        // Where one in three is wrong nothing pays there.
        assert_eq!(economy.worth(0.66, 1), 0);
    }

    /// Where it does not pay it ends by itself: in a thousand tokens a handful of tries.
    #[test]
    fn what_does_not_pay_is_left_off() {
        let text: Vec<i32> = (0..100).chain(0..10).collect();
        for (more_ms, right) in [(1.0, 0), (30.0, 1)] {
            let (mut drafter, mut economy) = (Drafter::default(), economy(more_ms));
            let mut guessed = 0;
            for _ in 0..1000 {
                let guess = drafter.guess(&text, 1, &economy).len() as u32;
                economy.measured(1, guess, ms(20.0 + f64::from(guess) * more_ms));
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
