//! How do a batch's logits become words?
//!
//! In:     where the logits of each answer's next token are, and of the tokens that were guessed after it.
//! Out:    text to who listens, tokens to the plan, the end of an answer.
//! True:   a token is chosen from the logits after all tokens before it, guessed or not; what was guessed wrong leaves the
//!         cache. A form that takes long keeps its logits and is asked again, so that nobody waits for it.

use super::*;
use crate::draft::ANSWERING_MOST;
use crate::shape::{Choice, dead_end, too_slow};

/// What came of one or more choices.
#[derive(Default)]
struct Said {
    tokens: Vec<i32>,
    end: Option<Result<FinishReason, Report>>,
}

impl Said {
    fn and(&mut self, more: Self) {
        self.tokens.extend(more.tokens);
        self.end = more.end;
    }
}

impl Decoder<'_> {
    /// Guesses how answers go on, where few of them are all there is to do.
    pub(super) fn guess(&mut self) {
        let answering = self.planner.running();
        if !self.guesses || answering > ANSWERING_MOST || self.planner.waiting() > 0 {
            return;
        }
        let mut guesses = Vec::new();
        for id in self.planner.working() {
            let Some(Task::Generate(answer)) = self.tasks.get_mut(&id) else { return };
            // Its next token is not chosen yet, or somebody's prompt is read.
            let Some(said) = self.planner.answer_of(id).filter(|_| answer.kept.is_none()) else { return };
            guesses.push((id, answer.drafter.guess(said, answering, &self.economy)));
        }
        for (id, guess) in guesses {
            self.planner.guess(id, guess);
        }
    }

    /// Chooses for those whose token could not be found in its turn; true when there was one. `alone` when there is
    /// nothing else to do.
    pub(super) fn choose_again(&mut self, alone: bool) -> bool {
        let kept = |(id, task): (&RequestId, &Task)| match task {
            Task::Generate(answer) if answer.kept.is_some() => Some(*id),
            _ => None,
        };
        let undecided: Vec<RequestId> = self.tasks.iter().filter_map(kept).collect();
        for &id in &undecided {
            let Some(Task::Generate(answer)) = self.tasks.get_mut(&id) else { continue };
            let Some(logits) = answer.kept.take() else { continue };
            let vocabulary = self.model.vocab();
            let is_end = |token| vocabulary.is_eog(token);
            match answer.choose(&logits, &mut self.candidates, alone, is_end) {
                Choice::Later => answer.kept = Some(logits),
                choice => {
                    let said = self.say(id, choice);
                    self.go_on(id, &said);
                }
            }
        }
        !undecided.is_empty()
    }

    /// The logits for a request's next token are at `output`, those after its guess behind it.
    pub(super) fn advance(&mut self, part: &Part, output: i32, answering: u32) {
        let id = part.request;
        match self.tasks.get(&id) {
            Some(Task::Generate(answer)) if answer.kept.is_none() => {}
            Some(Task::Logits(listener)) => {
                let (listener, logits) = (listener.clone(), self.context.get_logits_ith(output).to_vec());
                self.leave(id);
                listener.send(Event::Logits { logits });
                return;
            }
            // Its cells were lost and computed again while it looked for its token.
            _ => return self.planner.settle(part, 0),
        }
        let guess = self.planner.guess_of(part).to_vec();
        let mut said = Said::default();
        let mut right = 0;
        loop {
            let Some(Task::Generate(answer)) = self.tasks.get_mut(&id) else { return };
            let (context, vocabulary) = (&self.context, self.model.vocab());
            let logits = context.get_logits_ith(output + right as i32);
            let is_end = |token| vocabulary.is_eog(token);
            let choice = answer.choose(logits, &mut self.candidates, false, is_end);
            if choice == Choice::Later {
                answer.kept = Some(logits.to_vec());
                break;
            }
            said.and(self.say(id, choice));
            let last = said.tokens.last().copied();
            if said.end.is_some() || last.is_none() || guess.get(right) != last.as_ref() {
                break;
            }
            right += 1;
        }
        self.planner.settle(part, right as u32);
        if let Some(Task::Generate(answer)) = self.tasks.get_mut(&id) {
            answer.drafter.settled(part.guessed, right as u32, answering, &self.economy);
        }
        self.go_on(id, &said);
    }

    /// Says what was chosen.
    fn say(&mut self, id: RequestId, choice: Choice) -> Said {
        let Some(Task::Generate(answer)) = self.tasks.get_mut(&id) else { return Said::default() };
        let vocabulary = self.model.vocab();
        let ended = |end| Said { tokens: Vec::new(), end: Some(end) };
        match choice {
            Choice::Token(token) if vocabulary.is_eog(token) => ended(Ok(FinishReason::Stop)),
            Choice::Token(token) => {
                let end = answer.take(&vocabulary.token_to_piece(token, false, None));
                Said { tokens: vec![token.0], end: end.map(Ok) }
            }
            Choice::Complete => ended(Ok(FinishReason::Stop)),
            Choice::DeadEnd => ended(Err(dead_end())),
            Choice::TooMuch => ended(Err(too_slow())),
            Choice::Later => Said::default(),
        }
    }

    /// Tells the plan what was said.
    fn go_on(&mut self, id: RequestId, said: &Said) {
        let mut full = false;
        for token in &said.tokens {
            full = self.planner.chosen(id, *token);
        }
        match &said.end {
            Some(Ok(reason)) => self.finish(id, *reason),
            Some(Err(report)) => self.fail(id, report),
            None if full => self.finish(id, FinishReason::Length),
            None => {}
        }
    }
}
