//! What do agentd and an engine say to each other?
//!
//! Frames on a Unix stream socket: 4 bytes little-endian length, then that many bytes of JSON, at most
//! [`MAX_FRAME_BYTES`]. The client sends [`ClientFrame`]s, the engine answers with [`ServerFrame`]s that carry
//! the same `id`; a generation is answered by many frames, every other request by one. Requests of one
//! connection are answered in any order.
//!
//! Invariant: the first frame of each side is `Hello`; another version ends the connection with an error that
//! names both versions.

use crate::device::{DeviceHealth, EccCounters, GpuProcess, MemoryPlan, Mig, Placement};
use crate::fault::Report;
use serde::{Deserialize, Serialize};

/// Raised when a frame changes in a way that an older peer would misread.
pub const PROTOCOL_VERSION: u32 = 3;

/// No honest request is larger: 100,000 tokens of prompt are about 0.5 MB of text.
pub const MAX_FRAME_BYTES: u32 = 8 * 1024 * 1024;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ClientFrame {
    /// Chosen by the client, unique among its open requests.
    pub id: u64,
    pub body: Request,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServerFrame {
    pub id: u64,
    pub body: Event,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    Hello {
        version: u32,
    },
    Load(LoadModel),
    Unload {
        model: String,
    },
    /// What would this load take? Loads nothing. llama.cpp may end the process over a file whose content lies, so
    /// an engine that holds models refuses; ask one of a device set of its own.
    Plan(LoadModel),
    /// Devices, loaded models, memory.
    Status,
    Generate(Generate),
    /// Take over a generation whose client vanished less than 60 s ago; answered from its first token.
    Attach {
        key: String,
    },
    Cancel {
        key: String,
    },
    Embed {
        model: String,
        inputs: Vec<String>,
    },
    /// Token ids of a text, without special tokens: for counting and for evaluation.
    Tokenize {
        model: String,
        text: String,
    },
    /// Logits after the last of these tokens, for evaluation against a reference.
    Logits {
        model: String,
        tokens: Vec<i32>,
        /// Computed like a prompt of theirs, with what is in the cache; without it nothing is taken from there.
        #[serde(default)]
        share: Option<Share>,
    },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadModel {
    /// The name requests use.
    pub model: String,
    pub path: String,
    pub kind: ModelKind,
    /// Cells of the KV cache for all sequences together; 0 takes the smaller of 4096 and the model's own length.
    #[serde(default)]
    pub context_tokens: u32,
    /// Most sequences at once; 0 takes the engine's default.
    #[serde(default)]
    pub sequences: u32,
    /// Where its layers go; without it llama.cpp decides by what is free at that moment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<Placement>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelKind {
    Chat,
    Embedding,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Generate {
    pub model: String,
    /// Idempotency key: the same key never starts a second generation while the first is alive.
    pub key: String,
    pub prompt: Prompt,
    #[serde(default)]
    pub sampling: Sampling,
    /// 0: until the model ends or the context is full.
    #[serde(default)]
    pub max_tokens: u32,
    #[serde(default)]
    pub stop: Vec<String>,
    #[serde(default)]
    pub share: Share,
    /// What form the answer must have.
    #[serde(default)]
    pub shape: Shape,
}

/// The form of an answer. Only tokens that keep to it are chosen, so an answer that ended with `stop` has it; one that
/// ended with `length` is a beginning of it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    #[default]
    Free,
    /// Any JSON object.
    JsonObject,
    /// JSON that a schema accepts: the schema's own text.
    JsonSchema(String),
    /// GBNF, llama.cpp's grammars, with a rule `root`.
    Grammar(String),
}

/// Who asks, and what part of the model's time and cache it may have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Share {
    /// Who is charged for what is computed: an agent. Accounts are served by weight when not all can be.
    pub account: String,
    /// For whom it is counted what the request holds ([`HolderUsage`]): an agent. Empty: the account.
    pub holder: String,
    /// Requests with the same salt find each other's prompts in the cache, and could tell from the time an answer
    /// takes what others asked. So it is the agents' owner, not the machine.
    pub salt: String,
    /// 0 to 100; each twenty are a class. A higher class goes first, and takes the place of a lower one.
    pub priority: u8,
    /// Served so many times as much as an account of weight 1.
    pub weight: u32,
    /// Most cells of the KV cache that requests of this account may be promised at once; 0 is no limit.
    pub cells_most: u32,
}

impl Default for Share {
    fn default() -> Self {
        Self {
            account: String::new(),
            holder: String::new(),
            salt: String::new(),
            priority: 50,
            weight: 1,
            cells_most: 0,
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prompt {
    /// Put through the model's own chat template.
    Messages(Vec<ChatMessage>),
    Text(String),
    Tokens(Vec<i32>),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    pub content: String,
}

/// Names and meanings as in OpenAI's API and llama.cpp's samplers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    pub top_p: f32,
    /// 0 is off.
    pub top_k: u32,
    pub min_p: f32,
    pub repeat_penalty: f32,
    pub seed: Option<u32>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.8, top_p: 0.95, top_k: 40, min_p: 0.05, repeat_penalty: 1.0, seed: None }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event {
    Hello {
        version: u32,
        devices: Vec<Device>,
    },
    Loaded(LoadedModel),
    Unloaded {
        model: String,
    },
    Status(EngineStatus),
    Plan(MemoryPlan),
    /// A piece of text of a generation: always whole UTF-8, so one piece may stand for several tokens.
    Piece {
        text: String,
        tokens: u32,
    },
    Done(Done),
    Cancelled {
        key: String,
    },
    /// One vector per input, each of the model's dimension and of length 1.
    Embeddings {
        vectors: Vec<Vec<f32>>,
        tokens: u32,
        /// Inputs that were longer than the model reads; their ends are not in their vectors.
        #[serde(default)]
        truncated: u32,
    },
    Tokens {
        tokens: Vec<i32>,
    },
    Logits {
        logits: Vec<f32>,
    },
    Error(Report),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    pub reason: FinishReason,
    pub prompt_tokens: u32,
    pub completion_tokens: u32,
    /// Prompt tokens that were in the cache and needed no computing.
    #[serde(default)]
    pub cached_tokens: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended, or a stop text appeared.
    Stop,
    /// `max_tokens` or the context's end.
    Length,
    Cancelled,
}

/// Something that can hold a model: a GPU, or host memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Device {
    /// llama.cpp's name: `CPU`, `CUDA0`, `Vulkan0`.
    pub name: String,
    pub description: String,
    /// `cpu`, `gpu`, `igpu`, `accelerator`.
    pub kind: String,
    pub memory_total_bytes: u64,
    pub memory_free_bytes: u64,
    /// From NVML, where a driver is present.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuReadings>,
}

/// What NVML says of a device; a value the driver does not give is absent, never zero.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct GpuReadings {
    pub uuid: Option<String>,
    pub name: Option<String>,
    /// `0000:c1:00.0`, lower case: what llama.cpp and sysfs call it.
    pub pci_address: Option<String>,
    /// Of the time of the last sample, in which a kernel ran.
    pub utilisation_percent: Option<u32>,
    /// Of that time, in which memory was read or written.
    pub memory_utilisation_percent: Option<u32>,
    pub temperature_celsius: Option<u32>,
    pub power_milliwatts: Option<u32>,
    pub power_limit_milliwatts: Option<u32>,
    /// Since the driver was loaded.
    pub energy_millijoules: Option<u64>,
    pub graphics_clock_mhz: Option<u32>,
    pub memory_clock_mhz: Option<u32>,
    pub memory_total_bytes: Option<u64>,
    pub memory_used_bytes: Option<u64>,
    pub memory_free_bytes: Option<u64>,
    /// Kept by the driver for itself.
    pub memory_reserved_bytes: Option<u64>,
    /// Those with a compute context. Absent where the driver does not list them; none is an empty list.
    pub processes: Option<Vec<GpuProcess>>,
    pub mig: Option<Mig>,
    /// Why it is slower than it could be; NVML's names in snake case.
    pub throttle: Option<Vec<String>>,
    pub ecc: Option<EccCounters>,
    /// Device nodes of this device and no other, as far as they are known; those of instances are with these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<String>,
    pub health: DeviceHealth,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadedModel {
    pub model: String,
    pub path: String,
    pub kind: ModelKind,
    /// `general.architecture` of the file.
    pub architecture: String,
    pub parameters: u64,
    pub file_bytes: u64,
    /// SHA-256 of the file, lower-case hex: what records name as their embedder.
    pub sha256: String,
    pub context_tokens: u32,
    pub sequences: u32,
    /// Length of an embedding vector.
    pub dimension: u32,
    /// Where the chat template came from: `file`; `chatml` when the file has none, followed by a reason when the
    /// file's own could not be taken.
    #[serde(default)]
    pub chat_template: Option<String>,
    /// Why prompts of this model are not kept and shared, where its cache cannot be cut at any token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sharing_refused: Option<String>,
    /// Where its layers are, if its load said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<Placement>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EngineStatus {
    pub devices: Vec<Device>,
    pub models: Vec<LoadedModel>,
    /// The CPU back end that was chosen, for example `libggml-cpu-icelake.so`.
    pub backend: String,
    /// Every kind of back end that the package brings.
    #[serde(default)]
    pub backends: Vec<BackEnd>,
    pub running_sequences: u32,
    pub waiting_requests: u32,
    pub rss_bytes: u64,
    /// Since the process was started.
    #[serde(default)]
    pub uptime_ms: u64,
    /// Every GPU that NVML knows, also those that no back end here can use.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<GpuReadings>,
    /// Of each chat model.
    #[serde(default)]
    pub usage: Vec<ModelUsage>,
}

/// One kind of back end of an engine's package: `cpu`, `cuda`, `vulkan`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BackEnd {
    pub name: String,
    /// The one of its files that was loaded, or would have been.
    pub file: String,
    pub loaded: bool,
    pub devices: u32,
    /// Why it is of no use here. That is a normal state of a machine without such a device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

impl BackEnd {
    pub fn is_of_use(&self) -> bool {
        self.loaded && self.devices > 0
    }

    /// `cuda: libcuda.so.1 is not on this machine`.
    pub fn line(&self) -> String {
        match (&self.why, self.devices) {
            (Some(why), _) => format!("{}: {why}", self.name),
            (None, 1) => format!("{}: one device", self.name),
            (None, devices) => format!("{}: {devices} devices", self.name),
        }
    }
}

/// How one chat model's KV cache is used, and what was done since it was loaded.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ModelUsage {
    pub model: String,
    pub running: u32,
    pub waiting: u32,
    pub cells_total: u32,
    /// Held by one sequence.
    pub cells_private: u32,
    /// Held once by several.
    pub cells_shared: u32,
    pub cells_free: u32,
    /// Of private and shared: nobody works on them, so they may go.
    pub cells_cached: u32,
    pub computed_prompt_tokens: u64,
    pub cached_prompt_tokens: u64,
    /// Of prompts and answers, a second time, after they had to give way.
    pub recomputed_tokens: u64,
    pub prompt_tokens_per_s: u32,
    /// Requests that stepped aside for others.
    pub preemptions: u64,
    /// Parts of the cache that were copied to memory or disk, and brought back.
    pub swapped_out: u64,
    pub swapped_in: u64,
    pub swap_memory_bytes: u64,
    pub swap_disk_bytes: u64,
    /// What the last swap out and the last swap in took, and for how many tokens.
    pub last_swap_out_us: u64,
    pub last_swap_in_us: u64,
    pub last_swap_tokens: u32,
    /// Tokens of answers that were guessed from what was said before, and those of them that were then chosen.
    #[serde(default)]
    pub guessed_tokens: u64,
    #[serde(default)]
    pub guessed_right: u64,
    /// Who has requests here now, by name. What nobody of them holds of the used cells is `cells_cached`.
    #[serde(default)]
    pub holders: Vec<HolderUsage>,
}

/// What the requests of one holder have of a model, as it was within the last tenth of a second.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HolderUsage {
    /// As in [`Share::holder`].
    pub holder: String,
    /// Requests that work.
    pub running: u32,
    /// Requests that do not, those that were put aside among them.
    pub waiting: u32,
    /// They had begun, and gave way to others.
    pub put_aside: u32,
    /// Cells that its requests fill. One that several holders' requests fill counts for each of these in equal parts,
    /// so all holders' cells and `cells_cached` together are the cells that are used.
    pub cells: u32,
    /// Its part of those that others fill as well.
    pub cells_shared: u32,
    /// Cells that its requests may fill besides, without asking.
    pub cells_promised: u32,
    /// Tokens whose keys and values lie in memory or on disk until their request goes on.
    pub aside_tokens: u32,
}
