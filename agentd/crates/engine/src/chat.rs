//! Who generates what next?
//!
//! One thread per chat model owns its context. Every step decodes one batch with tokens of all running
//! sequences; requests join and leave between steps.
//!
//! ```text
//! waiting --cells promised--> prefill --whole prompt in the cache--> decode --end, bound, stop, cancel--> gone
//! ```
//!
//! True: a sequence holds one id below `sequences` and its promised cells from admission to its end; a batch
//! has at most [`BATCH_TOKENS`] tokens, each of one sequence (`LlamaBatch::add` does not check its bounds).
//! Waits: for a job when nothing runs; otherwise never but for the decode itself.

use crate::batch::{Cells, Demand, shares, wish};
use crate::generations::{Generation, Listener};
use crate::model::{Gauge, Settings};
use crate::text::{Characters, Scan, Stops};
use agentd_domain::engine::{Done, Event, FinishReason, Sampling};
use agentd_domain::fault::Report;
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::{KvCacheType, LlamaContextParams};
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_sys_2::{LLAMA_FLASH_ATTN_TYPE_AUTO, LLAMA_FLASH_ATTN_TYPE_DISABLED};
use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::thread::JoinHandle;
use std::time::Instant;

/// Tokens of one decode. Larger batches read prompts a little faster, cost memory, and make everybody who
/// answers wait longer; must be at least `MAX_SEQUENCES`, so that every sequence gets a token.
const BATCH_TOKENS: u32 = 256;
/// Requests that may wait for a place; more are refused at once, so that their clients can do something else.
pub(crate) const MAX_WAITING: usize = 256;
/// Tokens that the repetition penalty looks back on, llama.cpp's own default.
const PENALTY_TOKENS: usize = 64;

pub(crate) enum ChatJob {
    Generate(GenerateJob),
    Logits {
        tokens: Vec<LlamaToken>,
        listener: Listener,
    },
    /// Ends the thread; whoever runs or waits is told.
    Unload,
}

pub(crate) struct GenerateJob {
    pub(crate) prompt: Vec<LlamaToken>,
    pub(crate) sampling: Sampling,
    pub(crate) max_tokens: u32,
    pub(crate) stop: Vec<String>,
    pub(crate) generation: Arc<Generation>,
}

/// Starts the thread; `ready` gets the number of cells, or why there is no context.
pub(crate) fn spawn(
    backend: &Arc<LlamaBackend>,
    model: &Arc<LlamaModel>,
    settings: Settings,
    inbox: Receiver<ChatJob>,
    gauge: &Arc<Gauge>,
    ready: Sender<Result<u32, String>>,
) -> std::io::Result<JoinHandle<()>> {
    let (backend, model, gauge) = (Arc::clone(backend), Arc::clone(model), Arc::clone(gauge));
    std::thread::Builder::new().name("chat".to_owned()).spawn(move || {
        let context = match model.new_context(&backend, parameters(settings)) {
            Ok(context) => context,
            Err(error) => {
                // The loader gave up if nobody listens.
                let _ = ready.send(Err(error.to_string()));
                return;
            }
        };
        let cells = context.n_ctx();
        let _ = ready.send(Ok(cells));
        let mut decoder = Decoder {
            model: &model,
            context,
            batch: LlamaBatch::new(BATCH_TOKENS as usize, 1),
            cells: Cells::new(cells),
            running: Vec::new(),
            free_ids: (0..settings.sequences as i32).rev().collect(),
            waiting: VecDeque::new(),
            gauge,
        };
        decoder.run(&inbox);
    })
}

pub(crate) fn parameters(settings: Settings) -> LlamaContextParams {
    let cache = if settings.exact_cache { KvCacheType::F32 } else { KvCacheType::F16 };
    let threads = i32::try_from(settings.threads).unwrap_or(1);
    // llama.cpp's flash attention casts a cache in f32 to f16 first.
    let flash_attention =
        if settings.exact_cache { LLAMA_FLASH_ATTN_TYPE_DISABLED } else { LLAMA_FLASH_ATTN_TYPE_AUTO };
    LlamaContextParams::default()
        .with_flash_attention_policy(flash_attention)
        .with_n_ctx(NonZeroU32::new(settings.context_tokens))
        .with_n_batch(BATCH_TOKENS)
        .with_n_ubatch(BATCH_TOKENS)
        .with_n_seq_max(settings.sequences)
        .with_kv_unified(true)
        .with_type_k(cache)
        .with_type_v(cache)
        .with_n_threads(threads)
        .with_n_threads_batch(threads)
        .with_no_perf(true)
}

struct Decoder<'model> {
    model: &'model LlamaModel,
    context: LlamaContext<'model>,
    batch: LlamaBatch<'static>,
    cells: Cells,
    running: Vec<Sequence>,
    free_ids: Vec<i32>,
    waiting: VecDeque<ChatJob>,
    gauge: Arc<Gauge>,
}

struct Sequence {
    id: i32,
    /// Prompt tokens that are not in the cache yet.
    prompt: VecDeque<LlamaToken>,
    prompt_tokens: u32,
    /// Tokens in the cache: the next one's position.
    position: u32,
    /// Cells promised, and the most this sequence may come to.
    promised: u32,
    limit: u32,
    /// Place of its logits in the batch that was decoded last.
    output: Option<i32>,
    task: Task,
}

enum Task {
    Logits(Listener),
    Generate(Box<Answer>),
}

struct Answer {
    generation: Arc<Generation>,
    sampler: LlamaSampler,
    next: Option<LlamaToken>,
    completion_tokens: u32,
    max_tokens: u32,
    characters: Characters,
    stops: Stops,
    /// Tokens whose text has not been sent yet.
    unsent_tokens: u32,
}

impl Decoder<'_> {
    fn run(&mut self, inbox: &Receiver<ChatJob>) {
        loop {
            let idle = self.running.is_empty() && self.waiting.is_empty();
            let received =
                if idle { inbox.recv().map_err(|_| TryRecvError::Disconnected) } else { inbox.try_recv() };
            match received {
                Ok(ChatJob::Unload) | Err(TryRecvError::Disconnected) => return self.abandon(inbox),
                Ok(job) if self.waiting.len() < MAX_WAITING => {
                    self.waiting.push_back(job);
                    continue;
                }
                Ok(job) => {
                    job.fail(busy());
                    continue;
                }
                Err(TryRecvError::Empty) => {}
            }
            self.drop_stopped();
            self.admit();
            if !self.running.is_empty() {
                self.step();
            }
            self.gauge.running.store(self.running.len() as u32, Ordering::Relaxed);
            self.gauge.waiting.store(self.waiting.len() as u32, Ordering::Relaxed);
        }
    }

    /// Takes out who was cancelled or left alone too long, running or waiting.
    fn drop_stopped(&mut self) {
        let now = Instant::now();
        for index in (0..self.running.len()).rev() {
            if let Task::Generate(answer) = &self.running[index].task
                && let Some(reason) = answer.generation.stop_reason(now)
            {
                self.finish(index, reason);
            }
        }
        self.waiting.retain(|job| {
            let ChatJob::Generate(job) = job else { return true };
            let Some(reason) = job.generation.stop_reason(now) else { return true };
            let prompt_tokens = job.prompt.len() as u32;
            job.generation.done(Done { reason, prompt_tokens, completion_tokens: 0 }, now);
            false
        });
    }

    /// In order of arrival: who comes later never overtakes, so nobody starves.
    fn admit(&mut self) {
        while let (Some(job), Some(&id)) = (self.waiting.front(), self.free_ids.last()) {
            let (prompt_tokens, max_tokens) = match job {
                ChatJob::Generate(job) => (job.prompt.len() as u32, job.max_tokens),
                ChatJob::Logits { tokens, .. } => (tokens.len() as u32, 1),
                ChatJob::Unload => (0, 1),
            };
            let (limit, first) = wish(prompt_tokens, max_tokens, self.cells.total());
            if !self.cells.promise(first) {
                return;
            }
            let Some(job) = self.waiting.pop_front() else { return };
            let (prompt, task) = match job {
                ChatJob::Generate(job) => {
                    let (prompt, answer) = Answer::new(job, self.model.n_vocab());
                    (prompt, Task::Generate(Box::new(answer)))
                }
                ChatJob::Logits { tokens, listener } => (tokens, Task::Logits(listener)),
                ChatJob::Unload => continue,
            };
            self.free_ids.pop();
            self.running.push(Sequence {
                id,
                prompt: prompt.into(),
                prompt_tokens,
                position: 0,
                promised: first,
                limit,
                output: None,
                task,
            });
        }
    }

    fn step(&mut self) {
        self.fill();
        if let Err(error) = self.context.decode(&mut self.batch) {
            return self.fail_all(&error.to_string());
        }
        for index in (0..self.running.len()).rev() {
            if let Some(output) = self.running[index].output.take() {
                self.advance(index, output);
            }
        }
    }

    fn fill(&mut self) {
        self.batch.clear();
        let demands: Vec<Demand> = self.running.iter().map(Sequence::demand).collect();
        let shares = shares(&demands, BATCH_TOKENS);
        for (sequence, share) in self.running.iter_mut().zip(shares) {
            for _ in 0..share {
                let Some(token) = sequence.take_token() else { break };
                let last = sequence.prompt.is_empty();
                let place = self.batch.n_tokens();
                // One sequence id for a batch made for one, and `shares` keeps to the batch's size.
                if self.batch.add(token, sequence.position as i32, &[sequence.id], last).is_err() {
                    unreachable!("the shares of a batch fit into it");
                }
                sequence.position += 1;
                sequence.output = last.then_some(place);
            }
        }
    }

    /// The last token of a prompt, or an answer's token, has logits at `output`.
    fn advance(&mut self, index: usize, output: i32) {
        let context = &self.context;
        let vocabulary = self.model.vocab();
        let sequence = &mut self.running[index];
        let answer = match &mut sequence.task {
            Task::Logits(listener) => {
                listener.send(Event::Logits { logits: context.get_logits_ith(output).to_vec() });
                return self.release(index);
            }
            Task::Generate(answer) => answer,
        };
        let token = answer.sampler.sample(context, output);
        if vocabulary.is_eog(token) {
            return self.finish(index, FinishReason::Stop);
        }
        answer.next = Some(token);
        answer.completion_tokens += 1;
        answer.unsent_tokens += 1;
        let text = answer.characters.push(&vocabulary.token_to_piece(token, false, None));
        if answer.show(&text) {
            return self.finish(index, FinishReason::Stop);
        }
        if sequence.position >= sequence.promised {
            let more = self.cells.grow(sequence.promised, sequence.limit);
            sequence.promised += more;
        }
        let full = sequence.position >= sequence.promised;
        let Task::Generate(answer) = &sequence.task else { return };
        if full || answer.completion_tokens == answer.max_tokens {
            self.finish(index, FinishReason::Length);
        }
    }

    fn finish(&mut self, index: usize, reason: FinishReason) {
        let prompt_tokens = self.running[index].prompt_tokens;
        if let Task::Generate(answer) = &mut self.running[index].task {
            answer.end(reason, prompt_tokens);
        }
        self.release(index);
    }

    fn release(&mut self, index: usize) {
        let sequence = self.running.swap_remove(index);
        // Removing a whole sequence cannot fail, and its id is one of the context's.
        let _ = self.context.clear_kv_cache_seq(Some(sequence.id as u32), None, None);
        self.cells.release(sequence.promised);
        self.free_ids.push(sequence.id);
    }

    /// A decode failed: what is in the cache is unknown, so everybody starts over.
    fn fail_all(&mut self, why: &str) {
        tracing::error!(why, running = self.running.len(), "decode failed");
        let report = Report::bug("decode_failed", "the answer ended early", why, "send the request again");
        for mut sequence in self.running.drain(..) {
            sequence.fail(report.clone());
            self.cells.release(sequence.promised);
            self.free_ids.push(sequence.id);
        }
        self.context.clear_kv_cache();
    }

    /// Ends the thread.
    fn abandon(&mut self, inbox: &Receiver<ChatJob>) {
        let report = Report::environment(
            "model_unloaded",
            "the request was not finished",
            "the model was unloaded",
            "load the model and send the request again",
        );
        for mut sequence in self.running.drain(..) {
            sequence.fail(report.clone());
        }
        for job in self.waiting.drain(..).chain(inbox.try_iter()) {
            job.fail(report.clone());
        }
    }
}

impl ChatJob {
    fn fail(self, report: Report) {
        match self {
            Self::Generate(job) => job.generation.fail(report, Instant::now()),
            Self::Logits { listener, .. } => {
                listener.send(Event::Error(report));
            }
            Self::Unload => {}
        }
    }
}

/// Of requests that found the queue full.
pub(crate) fn busy() -> Report {
    Report::environment(
        "too_many_requests",
        "the request was not run",
        format!("{MAX_WAITING} others wait for this model"),
        "try again in some seconds",
    )
}

impl Sequence {
    fn demand(&self) -> Demand {
        match self.prompt.len() {
            0 => Demand::Decode,
            left => Demand::Prefill(left as u32),
        }
    }

    fn take_token(&mut self) -> Option<LlamaToken> {
        self.prompt.pop_front().or_else(|| match &mut self.task {
            Task::Generate(answer) => answer.next.take(),
            Task::Logits(_) => None,
        })
    }

    fn fail(&mut self, report: Report) {
        match &self.task {
            Task::Generate(answer) => answer.generation.fail(report, Instant::now()),
            Task::Logits(listener) => {
                listener.send(Event::Error(report));
            }
        }
    }
}

impl Answer {
    fn new(job: GenerateJob, vocabulary: i32) -> (Vec<LlamaToken>, Self) {
        let answer = Self {
            generation: job.generation,
            sampler: sampler(&job.sampling, &job.prompt, vocabulary),
            next: None,
            completion_tokens: 0,
            max_tokens: job.max_tokens,
            characters: Characters::default(),
            stops: Stops::new(job.stop),
            unsent_tokens: 0,
        };
        (job.prompt, answer)
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

    fn end(&mut self, reason: FinishReason, prompt_tokens: u32) {
        let mut rest = String::new();
        let half = self.characters.finish();
        if !half.is_empty() {
            match self.stops.push(&half) {
                Scan::Show(text) | Scan::Stop(text) => rest.push_str(&text),
            }
        }
        rest.push_str(&self.stops.finish());
        self.send(rest);
        let done = Done { reason, prompt_tokens, completion_tokens: self.completion_tokens };
        self.generation.done(done, Instant::now());
    }
}

/// In llama.cpp's own order: penalties, then the cuts, then temperature, then the draw.
fn sampler(sampling: &Sampling, prompt: &[LlamaToken], vocabulary: i32) -> LlamaSampler {
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
        chain.push(LlamaSampler::greedy());
        return LlamaSampler::chain(chain, true);
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
    LlamaSampler::chain(chain, true)
}
