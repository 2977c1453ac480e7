//! How does a file become a loaded model?
//!
//! Order: the header is checked in Rust; memory is compared with what is available; llama.cpp loads the weights
//! (mapped, not copied, where it can) while another thread hashes the file; the model's own thread makes its
//! context. Only then the model has a name.
//! Never: two loads at once, because llama.cpp's loader keeps global state (the caller holds a lock).

use crate::chat::{self, ChatJob};
use crate::devices;
use crate::embed::{self, EmbedJob};
use crate::ggml::{self, Split};
use crate::grammar::Matcher;
use crate::logging;
use crate::shape::Grammars;
use crate::shelf::Shelves;
use crate::template::{Segment, Template};
use agentd_domain::engine::{ChatMessage, LoadModel, LoadedModel, ModelKind, ModelUsage, Shape};
use agentd_domain::fault::Report;
use agentd_domain::gguf::{self, Summary};
use agentd_gpu::plan::engine as defaults;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU32;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Architectures without a decoder: they embed and cannot chat.
const ENCODERS: [&str; 9] = [
    "bert",
    "eurobert",
    "gemma-embedding",
    "jina-bert-v2",
    "jina-bert-v3",
    "modern-bert",
    "neo-bert",
    "nomic-bert",
    "nomic-bert-moe",
];
/// Memory that must be left after a load: the system and its agents live there.
const HEADROOM_BYTES: u64 = 32 * 1024 * 1024;

/// Numbers that `Status` shows, kept by the model's thread.
#[derive(Debug, Default)]
pub(crate) struct Gauge {
    pub(crate) running: AtomicU32,
    pub(crate) waiting: AtomicU32,
    usage: Mutex<ModelUsage>,
}

impl Gauge {
    pub(crate) fn set_usage(&self, usage: ModelUsage) {
        *self.usage.lock().unwrap_or_else(PoisonError::into_inner) = usage;
    }

    pub(crate) fn usage(&self) -> ModelUsage {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What may be kept of the KV cache outside of it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Swapping {
    pub(crate) memory_bytes: u64,
    pub(crate) disk_bytes: u64,
    /// Without one nothing goes to disk.
    pub(crate) folder: Option<PathBuf>,
    /// Tokens of answers are guessed where it pays.
    pub(crate) guesses: bool,
}

pub(crate) enum Worker {
    Chat(Sender<ChatJob>),
    Embed(Sender<EmbedJob>),
}

pub(crate) struct Model {
    pub(crate) info: LoadedModel,
    pub(crate) worker: Worker,
    pub(crate) gauge: Arc<Gauge>,
    pub(crate) thread: JoinHandle<()>,
    grammars: Grammars,
    llama: Arc<LlamaModel>,
    template: Template,
    /// Texts of the control tokens, which a message may not contain as such.
    controls: Vec<String>,
}

/// Loads the model; blocks until its context exists.
pub(crate) fn load(
    backend: &Arc<LlamaBackend>,
    request: &LoadModel,
    threads: u32,
    swapping: &Swapping,
) -> Result<Model, Report> {
    let path = Path::new(&request.path);
    let (file, file_bytes) = open(path)?;
    let summary = gguf::check(file_bytes, &mut |at, into| {
        file.read_exact_at(into, at).map_err(|error| error.to_string())
    })
    .map_err(|error| error.report(&request.path))?;
    check_kind(request, &summary)?;
    let sizes = sizes(request, &summary);
    check_memory(request, &summary, &sizes)?;
    let split = split(request, &summary)?;

    let (llama, sha256) = std::thread::scope(|scope| {
        let hashing = scope.spawn(|| sha256(&file));
        let llama = load_weights(backend, request, split.as_ref());
        (llama, hashing.join())
    });
    let llama = Arc::new(llama?);
    let sha256 = sha256
        .map_err(|_| "the hashing thread panicked".to_owned())
        .and_then(|hashed| hashed.map_err(|error| error.to_string()))
        .map_err(|why| unreadable(path, &why))?;

    let gauge = Arc::new(Gauge::default());
    let refused = sharing_refused(&llama, &summary);
    let sharing = refused.is_none();
    let settings = Settings {
        guesses: swapping.guesses,
        threads: useful_threads(&summary, threads),
        ids: if sharing { sizes.ids } else { sizes.sequences as u16 },
        sharing,
        shelves: if sharing { shelves(swapping) } else { Shelves::default() },
        ..sizes
    };
    let (ready, readiness) = channel();
    let (worker, thread) = match request.kind {
        ModelKind::Chat => {
            let (jobs, inbox) = channel();
            let folder = swapping.folder.clone();
            let spawned = chat::spawn(backend, &llama, settings, folder, inbox, &gauge, ready);
            (Worker::Chat(jobs), spawned)
        }
        ModelKind::Embedding => {
            let (jobs, inbox) = channel();
            let pooling = summary.pooling_type;
            let spawned = embed::spawn(backend, &llama, settings, pooling, inbox, &gauge, ready);
            (Worker::Embed(jobs), spawned)
        }
    };
    let thread = thread.map_err(|error| {
        Report::environment(
            "engine_no_thread",
            not_loaded(request),
            error.to_string(),
            "free memory and try again",
        )
    })?;
    let made = readiness.recv().unwrap_or_else(|_| Err("its thread ended".to_owned()));
    let context_tokens = made.map_err(|why| {
        let why = logging::take_error().map_or_else(|| why.clone(), |error| format!("{why}: {error}"));
        Report::environment("model_no_context", not_loaded(request), why, "load it with a smaller context")
    })?;
    Ok(describe(
        request,
        &summary,
        llama,
        Loaded { file_bytes, sha256, context_tokens, settings, worker, thread, gauge, refused },
    ))
}

/// What the context of a model is made with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub(crate) context_tokens: u32,
    pub(crate) sequences: u32,
    pub(crate) threads: u32,
    /// KV cache in 32-bit numbers, where that is cheap.
    pub(crate) exact_cache: bool,
    /// Sequence ids: for who works, who stepped aside, what is cached, and one that copies go through.
    pub(crate) ids: u16,
    pub(crate) sharing: bool,
    pub(crate) shelves: Shelves,
    pub(crate) guesses: bool,
}

/// Why a cache cannot be cut and shared at any token, if so.
fn sharing_refused(llama: &LlamaModel, summary: &Summary) -> Option<String> {
    let number = |key: &str| {
        let value = llama.meta_val_str(&format!("{}.{key}", summary.architecture)).ok()?;
        value.parse::<u64>().ok().filter(|number| *number > 0)
    };
    if llama.is_recurrent() {
        return Some("it is recurrent: its state has no tokens to cut at".to_owned());
    }
    if llama.is_hybrid() {
        return Some("it is partly recurrent: its state has no tokens to cut at".to_owned());
    }
    if let Some(window) = number("attention.sliding_window") {
        return Some(format!("some layers see the last {window} tokens only: earlier ones leave the cache"));
    }
    number("attention.indexer.head_count")
        .map(|_| "its attention keeps a second index of the cache".to_owned())
}

/// Memory for what is put aside: as configured, but at most half of what is left once the weights are loaded.
fn shelves(swapping: &Swapping) -> Shelves {
    let left_bytes = devices::host_memory().map_or(u64::MAX, |(_, available_bytes)| available_bytes);
    let memory_bytes = swapping.memory_bytes.min(left_bytes.saturating_sub(HEADROOM_BYTES) / 2);
    let disk_bytes = if swapping.folder.is_some() { swapping.disk_bytes } else { 0 };
    // How large a cell is shows when the first was computed.
    Shelves { memory_bytes, disk_bytes, bytes_per_cell: 0 }
}

/// By the numbers that agentd plans with before it orders a load ([`defaults`]).
pub(crate) fn sizes(request: &LoadModel, summary: &Summary) -> Settings {
    let own = summary
        .context_length
        .map_or(defaults::CONTEXT_TOKENS as u32, |length| u32::try_from(length).unwrap_or(u32::MAX));
    let wanted = match request.context_tokens {
        0 => own.min(defaults::CONTEXT_TOKENS as u32),
        wanted => wanted.clamp(defaults::CONTEXT_TOKENS_LEAST as u32, defaults::CONTEXT_TOKENS_MOST as u32),
    };
    let sequences = match request.sequences {
        0 => defaults::SEQUENCES as u32,
        wanted => wanted.min(defaults::SEQUENCES_MOST as u32),
    };
    let exact_cache = cache_bytes(summary, wanted, 4) <= defaults::EXACT_CACHE_BYTES;
    let ids = defaults::ids(u64::from(sequences), summary.vocabulary) as u16;
    Settings {
        context_tokens: wanted,
        sequences,
        threads: 1,
        exact_cache,
        ids,
        sharing: true,
        shelves: Shelves::default(),
        guesses: true,
    }
}

/// Weights that a thread should have to read for each token. Below that the threads mostly wait for each other,
/// and they wait spinning: on cores that agents use too, a second thread makes a small model many times slower.
const BYTES_PER_THREAD: u64 = 32 * 1024 * 1024;

fn useful_threads(summary: &Summary, most: u32) -> u32 {
    let useful = summary.tensor_bytes.div_ceil(BYTES_PER_THREAD);
    u32::try_from(useful).unwrap_or(most).clamp(1, most.max(1))
}

/// Size of the KV cache if every layer keeps keys and values of the full width: an upper bound.
fn cache_bytes(summary: &Summary, context_tokens: u32, bytes_per_number: u64) -> u64 {
    let width = summary.embedding_length.unwrap_or(0);
    let layers = summary.block_count.unwrap_or(0);
    2 * width * layers * u64::from(context_tokens) * bytes_per_number
}

pub(crate) fn check_kind(request: &LoadModel, summary: &Summary) -> Result<(), Report> {
    let encoder = ENCODERS.contains(&summary.architecture.as_str());
    let wrong = match request.kind {
        ModelKind::Chat if encoder => Some("it can embed but not chat"),
        ModelKind::Chat if summary.architecture == "t5" => Some("encoder-decoder models are not served"),
        _ if summary.architecture == "t5encoder" => Some("encoder-decoder models are not served"),
        _ if summary.vocabulary == 0 => Some("it has no tokenizer"),
        ModelKind::Embedding if summary.pooling_type == Some(4) => {
            Some("it ranks documents and does not embed")
        }
        _ => None,
    };
    match wrong {
        None => Ok(()),
        Some(wrong) => Err(Report::caller(
            "model_kind_wrong",
            not_loaded(request),
            format!("its architecture is {}: {wrong}", summary.architecture),
            "add it with the kind it was made for, or take another model",
        )),
    }
}

/// Only host memory is judged here; a GPU's ledger is agentd's.
fn check_memory(request: &LoadModel, summary: &Summary, sizes: &Settings) -> Result<(), Report> {
    let Some((_, available_bytes)) = devices::host_memory() else {
        return Ok(());
    };
    let cache = if request.kind == ModelKind::Chat {
        cache_bytes(summary, sizes.context_tokens, if sizes.exact_cache { 4 } else { 2 })
    } else {
        0
    };
    let needs_bytes = summary.tensor_bytes + cache + HEADROOM_BYTES;
    if ggml::any_accelerator() || needs_bytes <= available_bytes {
        return Ok(());
    }
    let mebibytes = |bytes: u64| bytes.div_ceil(1024 * 1024);
    Err(Report::environment(
        "memory_short",
        not_loaded(request),
        format!(
            "it needs up to {} MiB, {} MiB are available",
            mebibytes(needs_bytes),
            mebibytes(available_bytes)
        ),
        "unload another model, take a smaller one or a smaller context, or add memory",
    ))
}

/// How llama.cpp is told where the layers go, if the request says it.
pub(crate) fn split(request: &LoadModel, summary: &Summary) -> Result<Option<Split>, Report> {
    let Some(placement) = &request.placement else { return Ok(None) };
    // The blocks, and the output layer.
    let layers = summary.block_count.unwrap_or(0).saturating_add(1);
    let split = if u64::from(placement.layers()) > layers {
        Err(format!("{placement} are more layers than it has, which is {layers}"))
    } else {
        Split::of(placement)
    };
    split.map(Some).map_err(|why| {
        let fix = "place it on devices that the engine lists, with as many layers as it has at most";
        Report::caller("placement_wrong", not_loaded(request), why, fix)
    })
}

fn load_weights(
    backend: &LlamaBackend,
    request: &LoadModel,
    split: Option<&Split>,
) -> Result<LlamaModel, Report> {
    let _older = logging::take_error();
    let load = |parameters| LlamaModel::load_from_file(backend, &request.path, &parameters);
    let loaded = match split {
        Some(split) => split.with(load).and_then(|loaded| loaded.map_err(|error| error.to_string())),
        None => load(LlamaModelParams::default()).map_err(|error| error.to_string()),
    };
    loaded.map_err(|error| {
        let why = logging::take_error().unwrap_or(error);
        Report::caller(
            "model_refused",
            not_loaded(request),
            format!("llama.cpp refused it: {why}"),
            "take a model of an architecture that llama.cpp knows, or fetch the file again",
        )
    })
}

struct Loaded {
    file_bytes: u64,
    sha256: String,
    context_tokens: u32,
    settings: Settings,
    worker: Worker,
    thread: JoinHandle<()>,
    gauge: Arc<Gauge>,
    refused: Option<String>,
}

fn describe(request: &LoadModel, summary: &Summary, llama: Arc<LlamaModel>, loaded: Loaded) -> Model {
    let vocabulary = llama.vocab();
    let text = |token: LlamaToken| {
        let known = token.0 >= 0 && token.0 < vocabulary.n_tokens();
        let text = if known { vocabulary.text(token) } else { None };
        text.map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
    };
    let template =
        Template::new(summary.chat_template.as_deref(), text(vocabulary.bos()), text(vocabulary.eos()));
    let controls = vocabulary.tokens().filter(|token| vocabulary.is_control(*token)).map(text).collect();
    let chat = request.kind == ModelKind::Chat;
    let info = LoadedModel {
        model: request.model.clone(),
        path: request.path.clone(),
        kind: request.kind,
        architecture: summary.architecture.clone(),
        parameters: summary.parameters,
        file_bytes: loaded.file_bytes,
        sha256: loaded.sha256,
        context_tokens: loaded.context_tokens,
        sequences: loaded.settings.sequences,
        dimension: u32::try_from(llama.n_embd_out()).unwrap_or(0),
        chat_template: chat.then(|| template.origin.clone()),
        sharing_refused: loaded.refused.filter(|_| chat),
        placement: request.placement.clone(),
    };
    Model {
        info,
        worker: loaded.worker,
        gauge: loaded.gauge,
        thread: loaded.thread,
        grammars: Grammars::default(),
        llama,
        template,
        controls,
    }
}

impl Model {
    /// What keeps an answer to a form, compiled once for all who want it.
    pub(crate) fn grammar(&self, shape: &Shape) -> Result<Option<Matcher>, Report> {
        self.grammars.get(&self.llama, shape)
    }

    /// Token ids of a text, without special tokens.
    pub(crate) fn tokenize(&self, text: &str) -> Vec<LlamaToken> {
        self.llama.vocab().tokenize(text.as_bytes(), false, false)
    }

    /// Token ids of a text to embed, with the special tokens that the model was trained with.
    pub(crate) fn tokenize_for_embedding(&self, text: &str) -> Vec<LlamaToken> {
        self.llama.vocab().tokenize(text.as_bytes(), true, false)
    }

    /// A conversation, through the model's template.
    pub(crate) fn tokenize_chat(
        &self,
        messages: &[ChatMessage],
        unix_seconds: i64,
    ) -> Result<Vec<LlamaToken>, Report> {
        let segments = self.template.render(messages, &self.controls, unix_seconds).map_err(|error| {
            Report::caller(
                "messages_refused",
                "the model did not answer",
                error.to_string(),
                "send roles and an order of messages that this model's template accepts",
            )
        })?;
        let vocabulary = self.llama.vocab();
        let mut tokens = Vec::new();
        for segment in segments {
            let (text, markup) = match &segment {
                Segment::Markup(text) => (text, true),
                Segment::Plain(text) => (text, false),
            };
            tokens.extend(vocabulary.tokenize(text.as_bytes(), false, markup));
        }
        // Templates that write the beginning themselves must not get it twice.
        let begin = vocabulary.bos();
        if vocabulary.should_add_bos() && begin.0 >= 0 && tokens.first() != Some(&begin) {
            tokens.insert(0, begin);
        }
        Ok(tokens)
    }

    /// Raw text, with the beginning token if the model wants one; control tokens in it are control tokens.
    pub(crate) fn tokenize_prompt(&self, text: &str) -> Vec<LlamaToken> {
        self.llama.vocab().tokenize(text.as_bytes(), true, true)
    }

    /// Ids of a client, if all of them exist.
    pub(crate) fn known_tokens(&self, ids: &[i32]) -> Result<Vec<LlamaToken>, Report> {
        let count = self.llama.vocab().n_tokens();
        match ids.iter().find(|id| !(0..count).contains(*id)) {
            None => Ok(ids.iter().copied().map(LlamaToken).collect()),
            Some(id) => Err(Report::caller(
                "token_unknown",
                "the request was not run",
                format!("{id} is not a token of {}", self.info.model),
                format!("use ids from 0 to {}", count - 1),
            )),
        }
    }
}

pub(crate) fn open(path: &Path) -> Result<(File, u64), Report> {
    let opened = File::open(path).and_then(|file| file.metadata().map(|metadata| (file, metadata)));
    let (file, metadata) = opened.map_err(|error| unreadable(path, &error.to_string()))?;
    if !metadata.is_file() {
        return Err(unreadable(path, "it is not a file"));
    }
    Ok((file, metadata.len()))
}

fn sha256(file: &File) -> std::io::Result<String> {
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 256 * 1024];
    let mut reader = file;
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok(hex::encode(digest.finalize())),
            count => digest.update(&buffer[..count]),
        }
    }
}

fn not_loaded(request: &LoadModel) -> String {
    format!("the model {} was not loaded", request.model)
}

fn unreadable(path: &Path, why: &str) -> Report {
    Report::environment(
        "model_file_unreadable",
        format!("the model {} was not loaded", path.display()),
        why,
        "check that the file is there and that the engine may read it",
    )
}
