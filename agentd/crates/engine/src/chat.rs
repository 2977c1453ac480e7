//! How does what was decided happen?
//!
//! One thread per chat model owns its context. Each step asks the plan ([`crate::plan`]) what to do, does it to the
//! cache, decodes one batch with tokens of all who run, and chooses their next tokens.
//!
//! True: a batch has at most the tokens the context was made for, each of one sequence (`LlamaBatch::add` does not
//! check its bounds); every sequence id is below the context's number of them.
//! Waits: for a job when nothing is to be done; otherwise never but for the decode itself.
//! Never: a decision about who goes first, which cells go, or who steps aside: that is the plan's, and tested there.

use crate::answer::{Answer, Task, sampler};
use crate::draft::{Economy, STEP_MOST};
use crate::generations::{Generation, Listener};
use crate::ggml::{self, with_outputs};
use crate::grammar::Matcher;
use crate::model::{Gauge, Settings};
use crate::plan::{Ask, Effect, Holders, Part, Planner, RequestId, Room};
use crate::radix::{Domain, SeqId};
use crate::shape::{Candidates, Chooser};
use crate::shelf::{BlobId, Shelves};
use crate::swap::Swap;
use agentd_domain::engine::{Event, FinishReason, ModelUsage, Sampling, Share};
use agentd_domain::fault::Report;
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::{KvCacheType, LlamaContextParams};
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_sys_2::{LLAMA_FLASH_ATTN_TYPE_AUTO, LLAMA_FLASH_ATTN_TYPE_DISABLED};
use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::thread::JoinHandle;
use std::time::Instant;

/// Tokens of one decode. Larger batches read prompts a little faster and cost memory. Nobody waits for a whole one while answering, chunks are sized in time. Must be at least the number
/// of sequence ids, for llama.cpp's own reservation of outputs.
pub(crate) const BATCH_TOKENS: u32 = agentd_gpu::plan::engine::BATCH_TOKENS as u32;
/// Requests that may wait for a place; more are refused at once, so that their clients can do something else.
pub(crate) const MAX_WAITING: usize = 256;
/// Decodes that may fail one after the other before those in them are told. Between them everything is computed anew.
const MAX_FAILURES: u32 = 2;
/// Each blob that fails to come back costs a step without a batch; so many are more than there can be of them.
const MAX_EMPTY_STEPS: u32 = 1000;

pub(crate) enum ChatJob {
    Generate(GenerateJob),
    Logits {
        tokens: Vec<LlamaToken>,
        share: Option<Share>,
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
    pub(crate) share: Share,
    /// Keeps the answer to a form.
    pub(crate) grammar: Option<Matcher>,
    pub(crate) generation: Arc<Generation>,
}

/// Starts the thread; `ready` gets the number of cells, or why there is no context.
pub(crate) fn spawn(
    backend: &Arc<LlamaBackend>,
    model: &Arc<LlamaModel>,
    settings: Settings,
    swap_folder: Option<PathBuf>,
    inbox: Receiver<ChatJob>,
    gauge: &Arc<Gauge>,
    ready: Sender<Result<u32, String>>,
) -> std::io::Result<JoinHandle<()>> {
    let (backend, model, gauge) = (Arc::clone(backend), Arc::clone(model), Arc::clone(gauge));
    std::thread::Builder::new().name("chat".to_owned()).spawn(move || {
        let made = with_outputs(outputs(settings), || model.new_context(&backend, parameters(settings)));
        let context = match made {
            Ok(context) => context,
            Err(error) => {
                // The loader gave up if nobody listens.
                let _ = ready.send(Err(error.to_string()));
                return;
            }
        };
        let cells = context.n_ctx();
        let _ = ready.send(Ok(cells));
        // The last id is the scratch sequence's.
        let scratch = SeqId(settings.ids - 1);
        let sharing = settings.sharing;
        let room = Room {
            cells,
            running: settings.sequences,
            ids: if sharing { settings.ids - 1 } else { settings.ids },
            batch_tokens: BATCH_TOKENS,
            shelves: settings.shelves,
            sharing,
        };
        let mut decoder = Decoder {
            model: &model,
            context,
            batch: LlamaBatch::new(BATCH_TOKENS as usize, 1),
            planner: Planner::new(room),
            tasks: BTreeMap::new(),
            swap: Swap::new(scratch, swap_folder),
            shelves: settings.shelves,
            apart: !settings.exact_cache && !ggml::any_accelerator(),
            usage: ModelUsage::default(),
            holders: Holders::default(),
            failures: 0,
            empty_steps: 0,
            candidates: Candidates::default(),
            guesses: settings.guesses,
            economy: Economy::default(),
            started: Instant::now(),
            gauge,
        };
        decoder.run(&inbox);
    })
}

/// Rows of logits of one batch at most: one for each who answers, and those of guesses, which are made for few only. As
/// many as llama.cpp keeps anyway, one for each sequence id; it would reserve a row for every token of a batch.
pub(crate) fn outputs(settings: Settings) -> u32 {
    u32::from(settings.ids)
}

const _: () = assert!(STEP_MOST <= agentd_gpu::plan::engine::IDS_LEAST as u32);

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
        .with_n_seq_max(u32::from(settings.ids))
        .with_kv_unified(true)
        .with_type_k(cache)
        .with_type_v(cache)
        .with_n_threads(threads)
        .with_n_threads_batch(threads)
        .with_no_perf(true)
}

mod choices;

struct Decoder<'model> {
    model: &'model LlamaModel,
    context: LlamaContext<'model>,
    batch: LlamaBatch<'static>,
    planner: Planner,
    tasks: BTreeMap<RequestId, Task>,
    swap: Swap,
    shelves: Shelves,
    /// Prompts and answers are decoded one after the other: [`Self::passes`].
    apart: bool,
    /// Only what the plan does not count.
    usage: ModelUsage,
    holders: Holders,
    /// Decodes that failed since the last that did not.
    failures: u32,
    /// Steps in which nobody went on, since the last in which somebody did.
    empty_steps: u32,
    candidates: Candidates,
    guesses: bool,
    /// What guesses cost.
    economy: Economy,
    started: Instant,
    gauge: Arc<Gauge>,
}

impl Decoder<'_> {
    fn run(&mut self, inbox: &Receiver<ChatJob>) {
        loop {
            let received = if self.planner.is_idle() {
                inbox.recv().map_err(|_| TryRecvError::Disconnected)
            } else {
                inbox.try_recv()
            };
            match received {
                Ok(ChatJob::Unload) | Err(TryRecvError::Disconnected) => return self.abandon(inbox),
                Ok(job) if (self.planner.waiting() as usize) < MAX_WAITING => {
                    self.accept(job);
                    continue;
                }
                Ok(job) => {
                    job.fail(busy());
                    continue;
                }
                Err(TryRecvError::Empty) => {}
            }
            self.drop_stopped();
            if !self.planner.is_idle() {
                self.step();
            }
            self.carry_out();
            self.show();
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn accept(&mut self, job: ChatJob) {
        let (tokens, share, most_new, reuse, task) = match job {
            ChatJob::Generate(job) => {
                let sampler = sampler(&job.sampling, &job.prompt, self.model.n_vocab());
                let prompt_tokens = job.prompt.len() as u32;
                let chooser = Chooser::new(sampler, job.grammar);
                let answer = Answer::new(job.generation, chooser, prompt_tokens, job.max_tokens, job.stop);
                (job.prompt, job.share, job.max_tokens, true, Task::Generate(Box::new(answer)))
            }
            ChatJob::Logits { tokens, share, listener } => {
                let reuse = share.is_some();
                (tokens, share.unwrap_or_default(), 1, reuse, Task::Logits(listener))
            }
            ChatJob::Unload => return,
        };
        let ask = Ask {
            account: share.account,
            holder: share.holder,
            domain: Domain::from(share.salt),
            priority: share.priority,
            weight: share.weight,
            cells_most: share.cells_most,
            tokens: tokens.into_iter().map(|token| token.0).collect(),
            most_new,
            reuse,
        };
        let id = self.planner.add(ask, self.now_ms());
        self.tasks.insert(id, task);
    }

    /// Takes out who was cancelled or left alone too long, running or waiting.
    fn drop_stopped(&mut self) {
        let now = Instant::now();
        let reason = |(id, task): (&RequestId, &Task)| Some((*id, task.stop_reason(now)?));
        let stopped: Vec<(RequestId, FinishReason)> = self.tasks.iter().filter_map(reason).collect();
        for (id, reason) in stopped {
            self.finish(id, reason);
        }
    }

    fn step(&mut self) {
        self.planner.arrange(self.now_ms());
        self.carry_out();
        self.guess();
        let parts = self.planner.parts();
        let undecided = self.choose_again(parts.is_empty());
        if parts.is_empty() {
            if undecided {
                return;
            }
            self.empty_steps += 1;
            // A blob that did not come back has emptied everything: the next step begins anew.
            if self.empty_steps > MAX_EMPTY_STEPS {
                self.stuck();
            }
            return;
        }
        self.empty_steps = 0;
        for parts in self.passes(parts) {
            if !self.decode(&parts) {
                return;
            }
        }
    }

    /// What is decoded at once: everything on a device. The processor's attention goes by tiles of 64 tokens and
    /// looks, for all of a tile, at the cells of everybody in it (`GGML_FA_TILE_Q` in ggml-cpu/common.h), so there
    /// prompts go without answers: with three who answered beside it, a prompt of Qwen2.5-0.5B's shape was read a
    /// fifth faster so.
    fn passes(&self, parts: Vec<Part>) -> Vec<Vec<Part>> {
        if !self.apart {
            return vec![parts];
        }
        let (answers, prompts): (Vec<_>, Vec<_>) = parts.into_iter().partition(Part::is_answer);
        [answers, prompts].into_iter().filter(|parts| !parts.is_empty()).collect()
    }

    /// False if all that was in the cache is lost.
    fn decode(&mut self, parts: &[Part]) -> bool {
        let outputs = self.fill(parts);
        let begun = Instant::now();
        if let Err(error) = self.context.decode(&mut self.batch) {
            self.decode_failed(&error.to_string(), parts);
            return false;
        }
        // A device computes on by itself; what is measured is when it is done.
        self.context.synchronize();
        let took = begun.elapsed();
        self.failures = 0;
        self.planner.computed(parts, took);
        self.learn_cell_bytes(parts);
        if parts.iter().all(Part::is_answer) {
            let guessed = parts.iter().map(|part| part.guessed).sum();
            self.economy.measured(parts.len() as u32, guessed, took);
        }
        let answering = outputs.len() as u32;
        for (part, output) in outputs {
            self.advance(&part, output, answering);
        }
        true
    }

    /// Puts the parts into the batch; gives the place of each part's first output, its guess's follow.
    fn fill(&mut self, parts: &[Part]) -> Vec<(Part, i32)> {
        self.batch.clear();
        let mut outputs = Vec::new();
        for part in parts {
            let (tokens, guess) = (self.planner.tokens_of(part), self.planner.guess_of(part));
            for (place, token) in tokens.iter().chain(guess).enumerate() {
                let output = part.last && place + 1 >= tokens.len();
                let position = part.from as i32 + place as i32;
                // One sequence id for a batch made for one, and the plan keeps to the batch's size.
                let seq = [i32::from(part.seq.0)];
                if self.batch.add(LlamaToken(*token), position, &seq, output).is_err() {
                    unreachable!("the plan keeps to the batch's size");
                }
                if output && place + 1 == tokens.len() {
                    outputs.push((*part, self.batch.n_tokens() - 1));
                }
            }
        }
        outputs
    }

    fn finish(&mut self, id: RequestId, reason: FinishReason) {
        let cached = self.planner.cached_tokens(id);
        if let Some(Task::Generate(mut answer)) = self.leave(id) {
            answer.end(reason, cached);
        }
    }

    /// Takes a request out. Whoever is then told finds it counted already.
    fn leave(&mut self, id: RequestId) -> Option<Task> {
        self.planner.finish(id);
        self.show();
        self.tasks.remove(&id)
    }

    fn fail(&mut self, id: RequestId, report: &Report) {
        if let Some(task) = self.leave(id) {
            task.fail(report.clone());
        }
    }

    /// Does to the cache what was decided. What fails is told to the plan, which may decide more.
    fn carry_out(&mut self) {
        loop {
            let effects = self.planner.take_effects();
            if effects.is_empty() {
                return;
            }
            let mut effects = effects.into_iter();
            while let Some(effect) = effects.next() {
                if let Err(blob) = self.apply(effect) {
                    self.context.clear_kv_cache();
                    self.planner.load_failed(blob, effects.collect());
                    break;
                }
            }
        }
    }

    /// `Err` with a blob that did not come back.
    fn apply(&mut self, effect: Effect) -> Result<(), BlobId> {
        let id = |seq: SeqId| i32::from(seq.0);
        match effect {
            // Positions are below the context's length and ids below its number: neither can fail.
            Effect::Share { from, to, length } => {
                let _ = self.context.copy_kv_cache_seq(id(from), id(to), Some(0), Some(length));
            }
            Effect::Trim { seq, from: 0 } => {
                let _ = self.context.clear_kv_cache_seq(Some(u32::from(seq.0)), None, None);
            }
            Effect::Trim { seq, from } => {
                let _ = self.context.clear_kv_cache_seq(Some(u32::from(seq.0)), Some(from), None);
            }
            Effect::Store { seq, from, upto, blob, tier } => {
                match self.swap.store(&mut self.context, seq, (from, upto), (blob, tier)) {
                    Ok(took) => {
                        self.usage.last_swap_out_us = took.as_micros() as u64;
                        self.usage.last_swap_tokens = upto - from;
                    }
                    Err(error) => {
                        tracing::warn!(%error, ?tier, tokens = upto - from, "nothing was put aside");
                        self.planner.blob_lost(blob);
                    }
                }
            }
            Effect::Load { blob, seq, from, upto } => {
                match self.swap.load(&mut self.context, blob, seq, (from, upto)) {
                    Ok(took) => {
                        self.usage.last_swap_in_us = took.as_micros() as u64;
                        self.usage.last_swap_tokens = upto - from;
                    }
                    Err(error) => {
                        tracing::error!(%error, tokens = upto - from, "what was put aside did not come back");
                        return Err(blob);
                    }
                }
            }
            Effect::Drop { blob } => self.swap.forget(blob),
        }
        Ok(())
    }

    /// Keys and values of one cell, as llama.cpp writes them: asked once, of the first sequence that is long enough.
    fn learn_cell_bytes(&mut self, parts: &[Part]) {
        if self.shelves.bytes_per_cell > 0 {
            return;
        }
        let Some(part) = parts.iter().find(|part| part.from + part.tokens >= 16) else { return };
        let flags = llama_cpp_2::context::session::LlamaStateSeqFlags::empty();
        let bytes = self.context.state_seq_get_size_ext(i32::from(part.seq.0), flags);
        self.shelves.bytes_per_cell = (bytes as u64).div_ceil(u64::from(part.from + part.tokens)).max(1);
        self.planner.set_cell_bytes(self.shelves.bytes_per_cell);
    }

    /// A decode failed: what is in the cache is unknown, so everybody computes again. The ledger said that there was
    /// room, so this is a bug or a broken device; who meets it again is told.
    fn decode_failed(&mut self, why: &str, parts: &[Part]) {
        let (used, total) = self.planner.cells();
        self.failures += 1;
        let tokens: u32 = parts.iter().map(|part| part.tokens).sum();
        tracing::error!(why, used, total, tokens, failures = self.failures, "decode failed");
        self.context.clear_kv_cache();
        self.planner.lost(Vec::new());
        if self.failures < MAX_FAILURES {
            return;
        }
        self.failures = 0;
        let report = Report::bug("decode_failed", "the answer ended early", why, "send the request again");
        for part in parts {
            self.fail(part.request, &report);
        }
    }

    /// Requests are here and none can go on: never, by the plan's own tests. Better told than silent.
    fn stuck(&mut self) {
        tracing::error!(waiting = self.planner.waiting(), cells = ?self.planner.cells(), "nobody can go on");
        let why = "the engine found no way to go on with it";
        let report = Report::bug("plan_stuck", "the answer ended early", why, "send the request again");
        for id in self.tasks.keys().copied().collect::<Vec<_>>() {
            self.fail(id, &report);
        }
    }

    fn show(&mut self) {
        let planner = &self.planner;
        let (counts, counters) = (planner.counts(), planner.counters());
        let (used, total) = planner.cells();
        let (memory, disk) = planner.shelved_bytes();
        let usage = ModelUsage {
            running: planner.running(),
            waiting: planner.waiting(),
            cells_total: total,
            cells_private: counts.private,
            cells_shared: counts.shared,
            cells_free: total - used,
            cells_cached: counts.evictable,
            computed_prompt_tokens: counters.computed_tokens,
            cached_prompt_tokens: counters.cached_tokens,
            recomputed_tokens: counters.recomputed_tokens,
            prompt_tokens_per_s: planner.pace().prompt_tokens_per_s(),
            preemptions: counters.preemptions,
            guessed_tokens: counters.guessed_tokens,
            guessed_right: counters.guessed_right,
            swapped_out: counters.stored,
            swapped_in: counters.restored,
            swap_memory_bytes: memory,
            swap_disk_bytes: disk,
            holders: self.holders.now(planner),
            ..self.usage.clone()
        };
        self.gauge.running.store(usage.running, Ordering::Relaxed);
        self.gauge.waiting.store(usage.waiting, Ordering::Relaxed);
        self.gauge.set_usage(usage);
    }

    /// Ends the thread.
    fn abandon(&mut self, inbox: &Receiver<ChatJob>) {
        let report = Report::environment(
            "model_unloaded",
            "the request was not finished",
            "the model was unloaded",
            "load the model and send the request again",
        );
        for (_, task) in std::mem::take(&mut self.tasks) {
            task.fail(report.clone());
        }
        for job in inbox.try_iter() {
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
