//! What does the engine answer?
//!
//! Owns:   the loaded models by name, the generations by key, the devices.
//! Thread: called from every connection's thread; what takes long goes to a model's thread or, for loading and
//!         unloading, to a thread of its own. No lock is held while anything blocks, but the load lock, which
//!         only loads wait for.

use crate::backends;
use crate::chat::{ChatJob, GenerateJob};
use crate::devices::{self, Devices};
use crate::embed::{EmbedJob, EmbedRequest};
use crate::generations::{Begun, Generations, Listener};
use crate::model::{self, Model, Swapping, Worker};
use agentd_domain::engine::{
    EngineStatus, Event, Generate, LoadModel, LoadedModel, ModelUsage, PROTOCOL_VERSION, Prompt, Request,
    Share,
};
use agentd_domain::fault::Report;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::token::LlamaToken;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Texts of one `Embed`: their vectors must fit into a frame.
const MAX_INPUTS: usize = 512;
/// Longest idempotency key and model name.
const MAX_NAME_BYTES: usize = 256;
const MAX_STOPS: usize = 16;

pub(crate) struct Engine {
    backend: Arc<LlamaBackend>,
    devices: Devices,
    threads: u32,
    swapping: Swapping,
    started: Instant,
    models: RwLock<BTreeMap<String, Arc<Model>>>,
    /// Held during a load or unload.
    loading: Mutex<()>,
    pub(crate) generations: Generations,
}

impl Engine {
    pub(crate) fn new(backend: LlamaBackend, devices: Devices, threads: u32, swapping: Swapping) -> Self {
        Self {
            backend: Arc::new(backend),
            devices,
            threads,
            swapping,
            started: Instant::now(),
            models: RwLock::default(),
            loading: Mutex::default(),
            generations: Generations::default(),
        }
    }

    pub(crate) fn hello(&self) -> Event {
        Event::Hello { version: PROTOCOL_VERSION, devices: self.devices.list() }
    }

    /// Answers now, or leaves the listener with whoever will.
    pub(crate) fn handle(self: &Arc<Self>, request: Request, listener: Listener) {
        let answered = match request {
            Request::Hello { .. } => Err(Report::caller(
                "hello_again",
                "the request was not run",
                "this connection has said hello already",
                "send one hello, first",
            )),
            Request::Plan(load) => self.aside(listener.clone(), move |engine| engine.plan(&load)),
            Request::Status => Ok(Some(Event::Status(self.status()))),
            Request::Load(load) => self.aside(listener.clone(), move |engine| engine.load(&load)),
            Request::Unload { model } => self.aside(listener.clone(), move |engine| engine.unload(model)),
            Request::Generate(generate) => self.generate(generate, listener.clone()).map(|()| None),
            Request::Attach { key } => self.attach(&key, listener.clone()).map(|()| None),
            Request::Cancel { key } => self.cancel(key).map(Some),
            Request::Embed { model, inputs } => self.embed(&model, &inputs, listener.clone()).map(|()| None),
            Request::Tokenize { model, text } => self.tokenize(&model, &text).map(Some),
            Request::Logits { model, tokens, share } => {
                self.logits(&model, &tokens, share, listener.clone()).map(|()| None)
            }
        };
        match answered {
            Ok(Some(event)) => {
                listener.send(event);
            }
            Ok(None) => {}
            Err(report) => {
                listener.send(Event::Error(report));
            }
        }
    }

    /// Runs on a thread of its own, so that the connection stays responsive.
    fn aside(
        self: &Arc<Self>,
        listener: Listener,
        work: impl FnOnce(&Engine) -> Result<Event, Report> + Send + 'static,
    ) -> Result<Option<Event>, Report> {
        let engine = Arc::clone(self);
        let spawned = std::thread::Builder::new().name("load".to_owned()).spawn(move || {
            let answer = work(&engine).unwrap_or_else(Event::Error);
            listener.send(answer);
        });
        match spawned {
            Ok(_) => Ok(None),
            Err(error) => Err(Report::environment(
                "engine_no_thread",
                "the request was not run",
                error.to_string(),
                "free memory and try again",
            )),
        }
    }

    fn status(&self) -> EngineStatus {
        let models: Vec<Arc<Model>> = self.models().values().cloned().collect();
        let sum = |value: fn(&Model) -> u32| models.iter().map(|model| value(model)).sum();
        let (devices, gpus) = self.devices.read();
        let chats = models.iter().filter(|model| matches!(model.worker, Worker::Chat(_)));
        let usage = chats.map(|model| ModelUsage { model: model.info.model.clone(), ..model.gauge.usage() });
        EngineStatus {
            devices,
            gpus,
            backend: backends::processors(&self.devices.backends),
            backends: self.devices.backends.clone(),
            running_sequences: sum(|model| model.gauge.running.load(Ordering::Relaxed)),
            waiting_requests: sum(|model| model.gauge.waiting.load(Ordering::Relaxed)),
            rss_bytes: devices::rss_bytes(),
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            usage: usage.collect(),
            models: models.iter().map(|model| model.info.clone()).collect(),
        }
    }

    /// Only while there is nothing to lose: a file whose content lies may end this process.
    fn plan(&self, request: &LoadModel) -> Result<Event, Report> {
        let _one_at_a_time = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.models().is_empty() {
            return Err(Report::caller(
                "plan_elsewhere",
                "the model was not planned",
                "this engine holds models, which a bad file could end",
                "start an engine of another device set and ask that one",
            ));
        }
        crate::forecast::plan(request).map(Event::Plan)
    }

    fn load(&self, request: &LoadModel) -> Result<Event, Report> {
        let _one_at_a_time = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if request.model.is_empty() || request.model.len() > MAX_NAME_BYTES {
            return Err(Report::caller(
                "model_name_wrong",
                "no model was loaded",
                "its name is empty or too long",
                format!("give it a name of 1 to {MAX_NAME_BYTES} bytes"),
            ));
        }
        if let Some(loaded) = self.models().get(&request.model) {
            return same_or_conflict(&loaded.info, request);
        }
        let begun = Instant::now();
        let model = model::load(&self.backend, request, self.threads, &self.swapping)?;
        let info = model.info.clone();
        tracing::info!(
            model = info.model,
            path = info.path,
            architecture = info.architecture,
            context_tokens = info.context_tokens,
            chat_template = info.chat_template,
            rss_bytes = devices::rss_bytes(),
            elapsed_ms = begun.elapsed().as_millis() as u64,
            "model loaded"
        );
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        models.insert(request.model.clone(), Arc::new(model));
        Ok(Event::Loaded(info))
    }

    fn unload(&self, name: String) -> Result<Event, Report> {
        let _one_at_a_time = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        let removed = {
            let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
            models.remove(&name)
        };
        let mut model = removed.ok_or_else(|| unknown_model(&name))?;
        // An error means that the thread has ended already.
        match &model.worker {
            Worker::Chat(jobs) => drop(jobs.send(ChatJob::Unload)),
            Worker::Embed(jobs) => drop(jobs.send(EmbedJob::Unload)),
        }
        // Others hold the model only while they count a text's tokens.
        let model = loop {
            match Arc::try_unwrap(model) {
                Ok(model) => break model,
                Err(shared) => model = shared,
            }
            std::thread::yield_now();
        };
        let ended = model.thread.join();
        tracing::info!(
            model = name,
            clean = ended.is_ok(),
            rss_bytes = devices::rss_bytes(),
            "model unloaded"
        );
        Ok(Event::Unloaded { model: name })
    }

    fn generate(&self, mut request: Generate, listener: Listener) -> Result<(), Report> {
        let name =
            |what: &str, why: String, fix: &str| Report::caller(what, "nothing was generated", why, fix);
        if request.key.is_empty() || request.key.len() > MAX_NAME_BYTES {
            let why = format!("its key has {} bytes", request.key.len());
            return Err(name(
                "key_wrong",
                why,
                "send a key of 1 to 256 bytes, another one for every request",
            ));
        }
        if request.stop.len() > MAX_STOPS {
            let why = format!("it has {} stop texts", request.stop.len());
            return Err(name("too_many_stops", why, "send at most 16 stop texts"));
        }
        let model = self.model(&request.model)?;
        let Worker::Chat(jobs) = &model.worker else {
            return Err(wrong_kind(&model.info, "generate"));
        };
        let prompt = match &request.prompt {
            Prompt::Messages(messages) => model.tokenize_chat(messages, unix_seconds())?,
            Prompt::Text(text) => model.tokenize_prompt(text),
            Prompt::Tokens(ids) => model.known_tokens(ids)?,
        };
        check_length(&model.info, &prompt)?;
        check_share(&request.share, prompt.len() as u64, u64::from(request.max_tokens))?;
        let grammar = model.grammar(&request.shape)?;
        // Who asks may have been given more or less since: it is the same request.
        let share = std::mem::take(&mut request.share);
        let fingerprint = format!("{request:?}");
        match self.generations.begin(&request.key, fingerprint, listener, Instant::now()) {
            Begun::Attached => Ok(()),
            Begun::Conflict => Err(name(
                "conflict",
                format!("the key `{}` belongs to another request", request.key),
                "use a new key for every new request",
            )),
            Begun::New(generation) => {
                let job = GenerateJob {
                    prompt,
                    sampling: request.sampling,
                    max_tokens: request.max_tokens,
                    stop: request.stop,
                    share,
                    grammar,
                    generation: Arc::clone(&generation),
                };
                if jobs.send(ChatJob::Generate(job)).is_err() {
                    generation.fail(thread_gone(&model.info), Instant::now());
                }
                Ok(())
            }
        }
    }

    fn attach(&self, key: &str, listener: Listener) -> Result<(), Report> {
        if self.generations.attach(key, listener, Instant::now()) { Ok(()) } else { Err(unknown_key(key)) }
    }

    fn cancel(&self, key: String) -> Result<Event, Report> {
        if self.generations.cancel(&key) { Ok(Event::Cancelled { key }) } else { Err(unknown_key(&key)) }
    }

    fn embed(&self, name: &str, inputs: &[String], listener: Listener) -> Result<(), Report> {
        if inputs.len() > MAX_INPUTS {
            return Err(Report::caller(
                "too_many_inputs",
                "the texts were not embedded",
                format!("there are {}", inputs.len()),
                format!("send at most {MAX_INPUTS} texts at once"),
            ));
        }
        let model = self.model(name)?;
        let Worker::Embed(jobs) = &model.worker else {
            return Err(wrong_kind(&model.info, "embed"));
        };
        let inputs: Vec<Vec<LlamaToken>> =
            inputs.iter().map(|text| model.tokenize_for_embedding(text)).collect();
        if inputs.iter().any(Vec::is_empty) {
            return Err(Report::caller(
                "input_empty",
                "the texts were not embedded",
                "one of them has no tokens",
                "leave empty texts out",
            ));
        }
        jobs.send(EmbedJob::Embed(EmbedRequest { inputs, listener })).map_err(|_| thread_gone(&model.info))
    }

    fn tokenize(&self, name: &str, text: &str) -> Result<Event, Report> {
        let tokens = self.model(name)?.tokenize(text);
        Ok(Event::Tokens { tokens: tokens.into_iter().map(|token| token.0).collect() })
    }

    fn logits(
        &self,
        name: &str,
        tokens: &[i32],
        share: Option<Share>,
        listener: Listener,
    ) -> Result<(), Report> {
        let model = self.model(name)?;
        let Worker::Chat(jobs) = &model.worker else {
            return Err(wrong_kind(&model.info, "give logits"));
        };
        let tokens = model.known_tokens(tokens)?;
        check_length(&model.info, &tokens)?;
        jobs.send(ChatJob::Logits { tokens, share, listener }).map_err(|_| thread_gone(&model.info))
    }

    fn model(&self, name: &str) -> Result<Arc<Model>, Report> {
        self.models().get(name).cloned().ok_or_else(|| unknown_model(name))
    }

    fn models(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<String, Arc<Model>>> {
        self.models.read().unwrap_or_else(PoisonError::into_inner)
    }
}

fn same_or_conflict(loaded: &LoadedModel, request: &LoadModel) -> Result<Event, Report> {
    if loaded.path == request.path && loaded.kind == request.kind {
        return Ok(Event::Loaded(loaded.clone()));
    }
    Err(Report::caller(
        "conflict",
        format!("the model {} was not loaded", request.model),
        format!("another file has that name: {}", loaded.path),
        format!("unload {} first, or give the new model another name", request.model),
    ))
}

/// The prompt and at least one answer token must fit.
fn check_length(info: &LoadedModel, prompt: &[LlamaToken]) -> Result<(), Report> {
    if prompt.is_empty() {
        return Err(Report::caller(
            "prompt_empty",
            "nothing was generated",
            "the prompt has no tokens",
            "send a text",
        ));
    }
    if prompt.len() as u64 >= u64::from(info.context_tokens) {
        return Err(Report::caller(
            "prompt_too_long",
            "nothing was generated",
            format!(
                "the prompt has {} tokens, {} has room for {}",
                prompt.len(),
                info.model,
                info.context_tokens
            ),
            "shorten the conversation, or load the model with a larger context",
        ));
    }
    Ok(())
}

/// Whether an account's cells could ever be enough.
fn check_share(share: &Share, prompt_tokens: u64, max_tokens: u64) -> Result<(), Report> {
    let has = u64::from(share.cells_most);
    if has == 0 || prompt_tokens + max_tokens.max(1) <= has {
        return Ok(());
    }
    let fix = match has.saturating_sub(prompt_tokens) {
        0 => format!(
            "shorten the conversation to fewer than {has} tokens, or give the agent's partition more bytes"
        ),
        room => format!(
            "ask for at most {room} tokens with `max_tokens`, or give the agent's partition more bytes"
        ),
    };
    Err(Report::caller(
        "context_exceeds_budget",
        "nothing was generated",
        format!(
            "the prompt has {prompt_tokens} tokens and the answer may have {max_tokens}; the agent's share of the \
             cache is {has}"
        ),
        fix,
    ))
}

fn unknown_model(name: &str) -> Report {
    Report::caller(
        "not_found",
        "the request was not run",
        format!("no model is loaded as `{name}`"),
        "see the loaded models with `agentctl model ls`",
    )
}

fn unknown_key(key: &str) -> Report {
    Report::caller(
        "not_found",
        "there is nothing to read",
        format!("no generation has the key `{key}`; they are kept for 60 s"),
        "send the request again",
    )
}

fn wrong_kind(info: &LoadedModel, verb: &str) -> Report {
    Report::caller(
        "model_kind_wrong",
        "the request was not run",
        format!("{} was loaded as {:?} and does not {verb}", info.model, info.kind),
        "name a model of the other kind; `agentctl model ls` shows them",
    )
}

fn thread_gone(info: &LoadedModel) -> Report {
    Report::environment(
        "model_unloaded",
        "the request was not run",
        format!("{} is being unloaded", info.model),
        "load the model and send the request again",
    )
}

/// For templates that print the date. Before 1970 is 1970.
fn unix_seconds() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
