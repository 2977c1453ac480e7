//! How do texts become vectors?
//!
//! One thread per embedding model owns its context. Several texts, of one request or of many, share a decode;
//! requests take turns, so a long list does not delay a single question.
//!
//! True: a decode has at most [`BATCH_TOKENS`] tokens and [`SEQUENCES`] texts, and no text has more tokens
//! than the model has positions: llama.cpp aborts on a position that does not exist.

use crate::chat::{MAX_WAITING, busy};
use crate::generations::Listener;
use crate::model::{Gauge, Settings};
use agentd_domain::engine::Event;
use agentd_domain::fault::Report;
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::{LlamaContextParams, LlamaPoolingType};
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::token::LlamaToken;
use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::thread::JoinHandle;

/// Tokens of one decode, and so of one text: what sentence embedders are trained for.
pub(crate) const BATCH_TOKENS: u32 = agentd_gpu::plan::engine::EMBED_BATCH_TOKENS as u32;
/// Texts of one decode.
const SEQUENCES: u32 = agentd_gpu::plan::engine::EMBED_SEQUENCES as u32;

pub(crate) enum EmbedJob {
    Embed(EmbedRequest),
    /// Ends the thread; whoever waits is told.
    Unload,
}

pub(crate) struct EmbedRequest {
    /// Each text's tokens, special ones included.
    pub(crate) inputs: Vec<Vec<LlamaToken>>,
    pub(crate) listener: Listener,
}

/// Starts the thread; `ready` gets the most tokens of a text, or why there is no context.
pub(crate) fn spawn(
    backend: &Arc<LlamaBackend>,
    model: &Arc<LlamaModel>,
    settings: Settings,
    pooling_type: Option<u64>,
    inbox: Receiver<EmbedJob>,
    gauge: &Arc<Gauge>,
    ready: Sender<Result<u32, String>>,
) -> std::io::Result<JoinHandle<()>> {
    let (backend, model, gauge) = (Arc::clone(backend), Arc::clone(model), Arc::clone(gauge));
    std::thread::Builder::new().name("embed".to_owned()).spawn(move || {
        let longest = BATCH_TOKENS.min(model.n_ctx_train());
        let context = match model.new_context(&backend, parameters(settings, pooling_type)) {
            Ok(context) => context,
            Err(error) => {
                // The loader gave up if nobody listens.
                let _ = ready.send(Err(error.to_string()));
                return;
            }
        };
        let _ = ready.send(Ok(longest));
        let batch = LlamaBatch::new(BATCH_TOKENS as usize, 1);
        Embedder { context, batch, longest: longest as usize, jobs: VecDeque::new(), gauge }.run(&inbox);
    })
}

pub(crate) fn parameters(settings: Settings, pooling_type: Option<u64>) -> LlamaContextParams {
    // A model that does not say how to pool gets the mean, as sentence-transformers does.
    let pooling = match pooling_type {
        Some(2) => LlamaPoolingType::Cls,
        Some(3) => LlamaPoolingType::Last,
        _ => LlamaPoolingType::Mean,
    };
    let threads = i32::try_from(settings.threads).unwrap_or(1);
    LlamaContextParams::default()
        .with_n_ctx(NonZeroU32::new(BATCH_TOKENS))
        .with_n_batch(BATCH_TOKENS)
        .with_n_ubatch(BATCH_TOKENS)
        .with_n_seq_max(SEQUENCES)
        .with_kv_unified(true)
        .with_embeddings(true)
        .with_pooling_type(pooling)
        .with_n_threads(threads)
        .with_n_threads_batch(threads)
        .with_no_perf(true)
}

struct Embedder<'model> {
    context: LlamaContext<'model>,
    batch: LlamaBatch<'static>,
    longest: usize,
    jobs: VecDeque<Job>,
    gauge: Arc<Gauge>,
}

/// A request under way.
struct Job {
    inputs: VecDeque<(usize, Vec<LlamaToken>)>,
    vectors: Vec<Vec<f32>>,
    missing: usize,
    tokens: u32,
    truncated: u32,
    /// Its client has been told of an error; the rest of its texts are forgotten.
    failed: bool,
    listener: Listener,
}

impl Embedder<'_> {
    fn run(&mut self, inbox: &Receiver<EmbedJob>) {
        loop {
            let received = if self.jobs.is_empty() {
                inbox.recv().map_err(|_| TryRecvError::Disconnected)
            } else {
                inbox.try_recv()
            };
            match received {
                Ok(EmbedJob::Unload) | Err(TryRecvError::Disconnected) => return self.abandon(inbox),
                Ok(EmbedJob::Embed(request)) if self.jobs.len() >= MAX_WAITING => {
                    request.listener.send(Event::Error(busy()));
                    continue;
                }
                Ok(EmbedJob::Embed(request)) => {
                    self.jobs.push_back(Job::new(request, self.longest));
                    continue;
                }
                Err(TryRecvError::Empty) => {}
            }
            self.gauge.running.store(self.jobs.len() as u32, Ordering::Relaxed);
            self.step();
            self.answer_complete();
            self.gauge.running.store(self.jobs.len() as u32, Ordering::Relaxed);
        }
    }

    /// Decodes one batch of texts, taken from the requests in turn.
    fn step(&mut self) {
        let chosen = choose(&mut self.jobs);
        if chosen.is_empty() {
            return;
        }
        self.batch.clear();
        for (sequence, (_, _, tokens)) in (0..).zip(&chosen) {
            for (position, token) in (0..).zip(tokens) {
                // One sequence id for a batch made for one, and `choose` keeps to the batch's size.
                if self.batch.add(*token, position, &[sequence], true).is_err() {
                    unreachable!("the chosen texts fit into a batch");
                }
            }
        }
        // Models with a KV cache keep what they read; every text starts from nothing.
        self.context.clear_kv_cache();
        let decoded = self.context.decode(&mut self.batch);
        for (sequence, (job, input, _)) in (0..).zip(&chosen) {
            let vector = match &decoded {
                Ok(()) => self.context.embeddings_seq_ith(sequence).map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            match vector {
                Ok(vector) => self.jobs[*job].put(*input, normalised(vector)),
                Err(why) => self.jobs[*job].fail(&why),
            }
        }
    }

    fn answer_complete(&mut self) {
        self.jobs.retain_mut(|job| {
            if job.missing > 0 {
                return true;
            }
            let vectors = std::mem::take(&mut job.vectors);
            if !job.failed {
                let (tokens, truncated) = (job.tokens, job.truncated);
                job.listener.send(Event::Embeddings { vectors, tokens, truncated });
            }
            false
        });
    }

    fn abandon(&mut self, inbox: &Receiver<EmbedJob>) {
        let report = Report::environment(
            "model_unloaded",
            "the texts were not embedded",
            "the model was unloaded",
            "load the model and send the request again",
        );
        for job in self.jobs.drain(..) {
            job.listener.send(Event::Error(report.clone()));
        }
        for job in inbox.try_iter() {
            if let EmbedJob::Embed(request) = job {
                request.listener.send(Event::Error(report.clone()));
            }
        }
    }
}

impl Job {
    fn new(request: EmbedRequest, longest: usize) -> Self {
        let mut truncated = 0;
        let mut tokens = 0;
        let inputs: VecDeque<_> = request
            .inputs
            .into_iter()
            .map(|mut input| {
                if input.len() > longest {
                    truncated += 1;
                    shorten(&mut input, longest);
                }
                tokens += input.len() as u32;
                input
            })
            .enumerate()
            .collect();
        let count = inputs.len();
        Self {
            inputs,
            vectors: vec![Vec::new(); count],
            missing: count,
            tokens,
            truncated,
            failed: false,
            listener: request.listener,
        }
    }

    fn put(&mut self, input: usize, vector: Vec<f32>) {
        if !self.failed {
            self.vectors[input] = vector;
            self.missing -= 1;
        }
    }

    fn fail(&mut self, why: &str) {
        if !self.failed {
            let report =
                Report::bug("embedding_failed", "the texts were not embedded", why, "send the request again");
            self.listener.send(Event::Error(report));
        }
        self.failed = true;
        self.inputs.clear();
        self.missing = 0;
    }
}

/// Cuts a text's end but keeps its last token, which closes it.
fn shorten(tokens: &mut Vec<LlamaToken>, longest: usize) {
    if let (Some(last), true) = (tokens.last().copied(), longest > 0) {
        tokens.truncate(longest - 1);
        tokens.push(last);
    }
}

/// One text of each request in turn while they fit: job, index of the text in it, tokens.
fn choose(jobs: &mut VecDeque<Job>) -> Vec<(usize, usize, Vec<LlamaToken>)> {
    let mut chosen = Vec::new();
    let mut used = 0;
    loop {
        let before = chosen.len();
        for (index, job) in jobs.iter_mut().enumerate() {
            let fits = |input: &(usize, Vec<LlamaToken>)| used + input.1.len() <= BATCH_TOKENS as usize;
            if chosen.len() < SEQUENCES as usize
                && job.inputs.front().is_some_and(fits)
                && let Some((input, tokens)) = job.inputs.pop_front()
            {
                used += tokens.len();
                chosen.push((index, input, tokens));
            }
        }
        if chosen.len() == before {
            return chosen;
        }
    }
}

/// The vector of length 1 in the same direction.
fn normalised(vector: &[f32]) -> Vec<f32> {
    let length = vector.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let scale = if length > 0.0 { 1.0 / length } else { 0.0 };
    vector.iter().map(|x| (f64::from(*x) * scale) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    fn job(lengths: &[usize]) -> Job {
        let (outbox, _) = channel();
        let inputs = lengths.iter().map(|length| vec![LlamaToken(1); *length]).collect();
        Job::new(EmbedRequest { inputs, listener: Listener { connection: 1, request: 1, outbox } }, 512)
    }

    #[test]
    fn requests_take_turns_and_a_batch_is_not_overfilled() {
        let mut jobs: VecDeque<Job> = [job(&[200, 200, 200]), job(&[10])].into();
        let chosen: Vec<(usize, usize)> = choose(&mut jobs).iter().map(|c| (c.0, c.1)).collect();
        assert_eq!(chosen, [(0, 0), (1, 0), (0, 1)]);
        let chosen: Vec<(usize, usize)> = choose(&mut jobs).iter().map(|c| (c.0, c.1)).collect();
        assert_eq!(chosen, [(0, 2)]);
        assert!(choose(&mut jobs).is_empty());
        let mut many: VecDeque<Job> = [job(&[1; 40])].into();
        assert_eq!(choose(&mut many).len(), SEQUENCES as usize);
    }

    #[test]
    fn a_text_that_is_too_long_keeps_its_end_mark_and_is_counted() {
        let (outbox, _) = channel();
        let input: Vec<LlamaToken> = (0..600).map(LlamaToken).collect();
        let request =
            EmbedRequest { inputs: vec![input], listener: Listener { connection: 1, request: 1, outbox } };
        let job = Job::new(request, 512);
        assert_eq!((job.truncated, job.tokens), (1, 512));
        let tokens = &job.inputs[0].1;
        assert_eq!((tokens.len(), tokens[511], tokens[510]), (512, LlamaToken(599), LlamaToken(510)));
    }

    #[test]
    fn vectors_have_length_one() {
        assert_eq!(normalised(&[3.0, 4.0]), [0.6, 0.8]);
        assert_eq!(normalised(&[0.0, 0.0]), [0.0, 0.0]);
    }
}
