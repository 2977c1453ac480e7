//! Which tokens keep an answer to its grammar?
//!
//! ```text
//! text ──parse──> Program ──> Machine (one for all sequences with this grammar) ──> Matcher (one for each sequence)
//! ```
//!
//! In:     GBNF, a model's words. Out: whether a token may come next, or all that may.
//! True:   characters are whole: a token that begins one is allowed only if some allowed character begins like that. What
//!         takes longer than a turn is taken up again in the next; what never ends is told ([`Stop`]).
//! Why:    llama.cpp's own sampler decodes and compares every token of the vocabulary each time that a choice is refused,
//!         and has no bound for a grammar with very many readings. Here the words are walked as a tree, what was found
//!         for one sequence serves all, and the work of a turn is counted.
//! Checked: against llama.cpp's sampler, token by token over a model's vocabulary (`tests`).
//! Thread: any; a machine is locked for one choice.

mod machine;
mod parse;
mod program;
#[cfg(test)]
mod tests;
mod vocabulary;

use machine::{Machine, Position};
pub(crate) use machine::{Mask, Stop};
use program::Program;
pub(crate) use vocabulary::Words;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Stacks that one turn may look at: one to two milliseconds.
const TURN_WORK: u64 = 20_000;
/// For one token, all turns together. Real schemas need some hundred; a tenth of a second has long been noticed by then.
const MOST_WORK: u64 = 1_000_000;

/// A grammar, and how far one answer has come in it. A copy shares what is found.
#[derive(Clone)]
pub(crate) struct Matcher {
    machine: Arc<Mutex<Machine>>,
    words: Arc<Words>,
    epoch: u64,
    at: Position,
    /// What was read, to be read again by a machine that has forgotten.
    text: Vec<u8>,
    /// Work for the token that is being looked for.
    spent: u64,
}

impl Matcher {
    pub(crate) fn new(grammar: &str, words: &Arc<Words>) -> Result<Self, String> {
        let program = Program::parse(grammar, "root").map_err(|error| error.to_string())?;
        let machine = Arc::new(Mutex::new(Machine::new(program)));
        let words = Arc::clone(words);
        // Epochs of machines begin at 1: the first look finds the start.
        Ok(Self { machine, words, epoch: 0, at: Position::nowhere(), text: Vec::new(), spent: 0 })
    }

    pub(crate) fn allows(&mut self, token: u32) -> Result<bool, Stop> {
        if self.words.ends().contains(&token) {
            return self.look(|machine, at, _| Ok(machine.is_complete(at)));
        }
        self.look(|machine, at, words| match words.text(token) {
            Some(text) => Ok(machine.read(at, text)?.is_some()),
            None => Ok(false),
        })
    }

    /// The tokens that may come next; empty where the vocabulary has none.
    pub(crate) fn mask(&mut self) -> Result<Arc<Mask>, Stop> {
        self.look(|machine, at, words| machine.mask(at, words))
    }

    /// What was said is all that the grammar wants.
    pub(crate) fn is_finished(&mut self) -> Result<bool, Stop> {
        self.look(|machine, at, _| Ok(machine.is_finished(at)))
    }

    /// Goes on by a token that is allowed. False if it is not, and nothing has changed.
    pub(crate) fn accept(&mut self, token: u32) -> Result<bool, Stop> {
        let next = self.look(|machine, at, words| match words.text(token) {
            Some(text) => machine.read(at, text),
            None => Ok(None),
        })?;
        let (Some(next), Some(text)) = (next, self.words.text(token)) else { return Ok(false) };
        self.text.extend_from_slice(text);
        self.at = next;
        self.spent = 0;
        Ok(true)
    }

    /// Asks the machine within this turn's work. A machine that has forgotten reads the text again.
    fn look<T>(
        &mut self,
        question: impl FnOnce(&mut Machine, Position, &Words) -> Result<T, Stop>,
    ) -> Result<T, Stop> {
        let machine = Arc::clone(&self.machine);
        let mut machine = lock(&machine);
        // As much as all turns before: what cannot be cut into turns comes to its end too.
        let given = TURN_WORK.max(self.spent);
        machine.give(given);
        machine.tidy();
        let answered = self.place(&mut machine).and_then(|at| question(&mut machine, at, &self.words));
        self.spent += given - machine.give(0);
        match answered {
            Err(Stop::Later) if self.spent > MOST_WORK => Err(Stop::TooMuch),
            other => other,
        }
    }

    fn place(&mut self, machine: &mut Machine) -> Result<Position, Stop> {
        if self.epoch != machine.epoch() {
            let start = machine.start()?;
            // It was read once, so it can be read again.
            self.at = machine.read(start, &self.text)?.ok_or(Stop::TooMuch)?;
            self.epoch = machine.epoch();
        }
        Ok(self.at)
    }
}

fn lock(machine: &Mutex<Machine>) -> MutexGuard<'_, Machine> {
    // A panic ends the process in release builds; in tests what was found is still right.
    machine.lock().unwrap_or_else(PoisonError::into_inner)
}
