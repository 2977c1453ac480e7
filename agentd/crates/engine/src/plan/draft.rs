//! How do guessed tokens of an answer get cells, and lose them again?
//!
//! A guess is computed beside the token that was chosen last, in cells that the request was promised anyway. Until it is
//! settled the shadow does not have it: the cache has at most the promised cells more than the shadow says is used.

use super::*;

impl Planner {
    /// Tokens that may come next in an answer, for the next batch only. They are left out where a prompt is read.
    pub(crate) fn guess(&mut self, id: RequestId, tokens: Vec<i32>) {
        // Cells of a cache that cannot be cut at any token cannot be taken back.
        if !self.room.sharing {
            return;
        }
        if let Some(request) = self.requests.get_mut(&id) {
            request.guess = tokens;
        }
    }

    /// What a request said so far, if the next token of its answer is all that it computes.
    pub(crate) fn answer_of(&self, id: RequestId) -> Option<&[i32]> {
        let (request, seq) = self.seated(id).filter(|(request, _)| request.running)?;
        let all = request.tokens.len() as u32;
        let answers = request.stored.is_none() && all == self.tree.length(seq) + 1 && all > request.prompt;
        answers.then_some(&request.tokens)
    }

    /// Who works.
    pub(crate) fn working(&self) -> impl Iterator<Item = RequestId> + '_ {
        self.running.iter().copied()
    }

    /// The guess that is computed with a part.
    pub(crate) fn guess_of(&self, part: &Part) -> &[i32] {
        let guess = self.requests.get(&part.request).map_or(&[][..], |request| &request.guess);
        guess.get(..part.guessed as usize).unwrap_or_default()
    }

    /// How much of a guess fits into what its request was promised, beside the token before it.
    pub(super) fn guessed(&self, request: &Request, held: u32) -> u32 {
        let promised = request.promised.saturating_sub(held + 1);
        (request.guess.len() as u32).min(promised)
    }

    /// Of the guess of a part that was computed, the first `right` tokens were chosen afterwards: their cells stay.
    pub(crate) fn settle(&mut self, part: &Part, right: u32) {
        let right = right.min(part.guessed);
        let Some(request) = self.requests.get_mut(&part.request) else { return };
        // One that was left out is no guess of what comes after the next token.
        let guess = std::mem::take(&mut request.guess);
        if part.guessed == 0 {
            return;
        }
        self.tree.extend(part.seq, &guess[..right as usize]);
        let held = part.from + part.tokens + right;
        request.reached = request.reached.max(held);
        self.counters.guessed_tokens += u64::from(part.guessed);
        self.counters.guessed_right += u64::from(right);
        if right < part.guessed {
            self.effects.push(Effect::Trim { seq: part.seq, from: held });
        }
    }
}
