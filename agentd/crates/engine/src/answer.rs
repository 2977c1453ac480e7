//! How does a request get its words?
//!
//! What a request carries besides its place in the plan: how its tokens are chosen, the text that is not shown yet, who listens.

use crate::draft::Drafter;
use crate::generations::{Generation, Listener};
use crate::shape::{Candidates, Choice, Chooser};
use crate::text::{Characters, Scan, Stops};
use agentd_domain::engine::{Done, Event, FinishReason, Sampling};
use agentd_domain::fault::Report;
use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Tokens that the repetition penalty looks back on, llama.cpp's own default.
const PENALTY_TOKENS: usize = 64;
/// A choice within a form that takes longer is felt by those beside it. A vocabulary of 150,000 words is walked in a few.
const LONG_CHOICE: Duration = Duration::from_millis(20);
/// So many times as long the others then go on without it.
const REST_AFTER: u32 = 9;

pub(crate) enum Task {
    Logits(Listener),
    Generate(Box<Answer>),
}

pub(crate) struct Answer {
    pub(crate) generation: Arc<Generation>,
    chooser: Chooser,
    prompt_tokens: u32,
    completion_tokens: u32,
    max_tokens: u32,
    characters: Characters,
    stops: Stops,
    /// Tokens whose text has not been sent yet.
    unsent_tokens: u32,
    pub(crate) drafter: Drafter,
    /// Logits of a token that could not be chosen in its turn.
    pub(crate) kept: Option<Vec<f32>>,
    /// After a choice that took long, others go first.
    resting: Option<Instant>,
}

impl Task {
    pub(crate) fn fail(self, report: Report) {
        match self {
            Self::Generate(answer) => answer.generation.fail(report, Instant::now()),
            Self::Logits(listener) => {
                listener.send(Event::Error(report));
            }
        }
    }

    /// Why the decode thread should stop now, if it should.
    pub(crate) fn stop_reason(&self, now: Instant) -> Option<FinishReason> {
        match self {
            Self::Generate(answer) => answer.generation.stop_reason(now),
            Self::Logits(_) => None,
        }
    }
}

impl Answer {
    pub(crate) fn new(
        generation: Arc<Generation>,
        chooser: Chooser,
        prompt_tokens: u32,
        max_tokens: u32,
        stop: Vec<String>,
    ) -> Self {
        Self {
            generation,
            chooser,
            prompt_tokens,
            completion_tokens: 0,
            max_tokens,
            characters: Characters::default(),
            stops: Stops::new(stop),
            unsent_tokens: 0,
            drafter: Drafter::default(),
            kept: None,
            resting: None,
        }
    }

    /// The next token. A form that takes long has a tenth of the time, as long as there is anybody beside it.
    pub(crate) fn choose(
        &mut self,
        logits: &[f32],
        candidates: &mut Candidates,
        alone: bool,
        is_end: impl Fn(LlamaToken) -> bool,
    ) -> Choice {
        if !self.chooser.has_form() {
            return self.chooser.choose(logits, candidates, is_end);
        }
        let begun = Instant::now();
        if !alone && self.resting.is_some_and(|until| begun < until) {
            return Choice::Later;
        }
        let choice = self.chooser.choose(logits, candidates, is_end);
        let took = begun.elapsed();
        self.resting = (took > LONG_CHOICE).then(|| Instant::now() + REST_AFTER * took);
        choice
    }

    /// Takes a token's bytes; says how the answer ends, if it does.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Option<FinishReason> {
        self.completion_tokens += 1;
        self.unsent_tokens += 1;
        let text = self.characters.push(bytes);
        if self.show(&text) {
            return Some(FinishReason::Stop);
        }
        (self.completion_tokens == self.max_tokens).then_some(FinishReason::Length)
    }

    /// True when a stop text appeared.
    fn show(&mut self, text: &str) -> bool {
        let (text, stopped) = match self.stops.push(text) {
            Scan::Show(text) => (text, false),
            Scan::Stop(text) => (text, true),
        };
        self.send(text);
        stopped
    }

    fn send(&mut self, text: String) {
        if !text.is_empty() {
            let tokens = std::mem::take(&mut self.unsent_tokens);
            self.generation.piece(text, tokens, Instant::now());
        }
    }

    pub(crate) fn end(&mut self, reason: FinishReason, cached_tokens: u32) {
        let mut rest = String::new();
        let half = self.characters.finish();
        if !half.is_empty() {
            match self.stops.push(&half) {
                Scan::Show(text) | Scan::Stop(text) => rest.push_str(&text),
            }
        }
        rest.push_str(&self.stops.finish());
        self.send(rest);
        let done = Done {
            reason,
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            cached_tokens,
        };
        self.generation.done(done, Instant::now());
    }
}

/// In llama.cpp's own order: penalties, then the cuts, then temperature, then the draw. `None` where nothing is drawn and
/// nothing penalised: the most likely token is found without them.
pub(crate) fn sampler(sampling: &Sampling, prompt: &[LlamaToken], vocabulary: i32) -> Option<LlamaSampler> {
    let mut chain = Vec::new();
    let penalises = sampling.repeat_penalty > 0.0 && (sampling.repeat_penalty - 1.0).abs() > f32::EPSILON;
    if penalises {
        let recent = &prompt[prompt.len().saturating_sub(PENALTY_TOKENS)..];
        let penalties =
            LlamaSampler::penalties(vocabulary, PENALTY_TOKENS as i32, sampling.repeat_penalty, 0.0, 0.0);
        chain.push(penalties.with_tokens(recent));
    }
    // A temperature of 0, or one that is no number, is greedy.
    if !(sampling.temperature > 0.0 && sampling.temperature.is_finite()) {
        if chain.is_empty() {
            return None;
        }
        chain.push(LlamaSampler::greedy());
        return Some(LlamaSampler::chain(chain, true));
    }
    if sampling.top_k > 0 {
        chain.push(LlamaSampler::top_k(i32::try_from(sampling.top_k).unwrap_or(i32::MAX)));
    }
    if sampling.top_p > 0.0 && sampling.top_p < 1.0 {
        chain.push(LlamaSampler::top_p(sampling.top_p, 1));
    }
    if sampling.min_p > 0.0 && sampling.min_p < 1.0 {
        chain.push(LlamaSampler::min_p(sampling.min_p, 1));
    }
    chain.push(LlamaSampler::temp(sampling.temperature));
    // llama.cpp's LLAMA_DEFAULT_SEED asks its own random device.
    chain.push(LlamaSampler::dist(sampling.seed.unwrap_or(u32::MAX)));
    Some(LlamaSampler::chain(chain, true))
}
