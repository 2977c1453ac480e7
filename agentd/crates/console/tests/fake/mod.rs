//! The one fake of [`Appliance`]: a small machine in memory, for the router's tests, `agentctl`'s tests and a
//! look at the pages (`examples/demo.rs`).
//!
//! It keeps the trait's promises: errors are reports, a flow ends, an upload that breaks off leaves nothing.
#![allow(dead_code, reason = "each test program uses its own part")]

mod devices;
mod memory;
mod models;
mod status;

use agentd_console::{Appliance, AuditQuery, Flow, Follow, LogQuery, Pending, Residence, StateFiles, Upload};
use agentd_domain::agent_api::ReplyPart;
use agentd_domain::api::*;
use agentd_domain::audit::{Linked, SignedHead};
use agentd_domain::engine::LoadedModel;
use agentd_domain::fault::Report;
use agentd_domain::health::{Note, Pain, PainFrom, Pressure, Severity, Throttle};
use agentd_domain::ids::AgentId;
use agentd_domain::initctl::Health;
use agentd_domain::launcher::{ExitCause, ExitRecord};
use agentd_domain::ledger::*;
use agentd_domain::manifest::Limits;
use agentd_domain::memory_api;
use agentd_domain::net::rule::SecretName;
use agentd_domain::plan::*;
use agentd_domain::rights::Rights;
use agentd_domain::secret::{SecretInfo, SecretOrder};
use agentd_domain::token::*;
use bytes::Bytes;
use devices::{devices, model_plan, partition_view};
use futures::StreamExt;
use models::{chat_model, cut_model, embedder};
pub use status::status;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub struct Fake {
    inner: Mutex<Inner>,
    log: tokio::sync::broadcast::Sender<LogLine>,
}

struct Inner {
    agents: BTreeMap<String, Agent>,
    models: BTreeMap<String, Model>,
    log: Vec<LogLine>,
    /// Of each message, by its text.
    keys: HashMap<String, String>,
    calls: Vec<String>,
    /// As agentd keeps it: each record's line, and each head's behind it.
    audit: Vec<u8>,
    secrets: Vec<SecretInfo>,
    devices: Devices,
    memory: memory::Memory,
}

pub const NOW_UNIX_MS: i64 = 1_795_176_243_000;
const MIB: u64 = 1 << 20;
/// The beginning of a log: a head, a record, a head.
pub const AUDIT_EXAMPLE: &[u8] = include_bytes!("../../../audit/src/example.jsonl");

impl Default for Fake {
    fn default() -> Self {
        let mut agents = BTreeMap::new();
        for agent in [echo(), scout(), broken()] {
            agents.insert(agent.name.to_string(), agent);
        }
        let models = [embedder(), chat_model(), cut_model()].map(|m| (m.name.clone(), m)).into();
        let log = first_log();
        let audit = AUDIT_EXAMPLE.to_vec();
        Self {
            inner: Mutex::new(Inner {
                agents,
                models,
                log,
                keys: HashMap::new(),
                calls: Vec::new(),
                audit,
                secrets: Vec::new(),
                devices: devices(),
                memory: memory::Memory::default(),
            }),
            log: tokio::sync::broadcast::channel(64).0,
        }
    }
}

impl Fake {
    /// What was asked of the machine, oldest first.
    pub fn calls(&self) -> Vec<String> {
        self.inner.lock().expect("lock").calls.clone()
    }

    /// The idempotency key with which this message came.
    pub fn key_of(&self, text: &str) -> Option<String> {
        self.inner.lock().expect("lock").keys.get(text).cloned()
    }

    pub fn say_in_log(&self, text: &str) {
        let line = LogLine { unix_ms: NOW_UNIX_MS, stream: "out".into(), text: text.into() };
        self.inner.lock().expect("lock").log.push(line.clone());
        let _ = self.log.send(line);
    }

    /// What the audit log says from now on.
    pub fn set_audit(&self, lines: &[u8]) {
        self.inner.lock().expect("lock").audit = lines.to_vec();
    }

    pub fn followers(&self) -> usize {
        self.log.receiver_count()
    }

    fn find<T>(&self, key: &AgentKey, act: impl FnOnce(&mut Agent) -> T) -> Result<T, Report> {
        let mut inner = self.inner.lock().expect("lock");
        let found = match key {
            AgentKey::Name(name) => inner.agents.get_mut(name.as_str()),
            AgentKey::Id(id) => inner.agents.values_mut().find(|a| a.agent_id == *id),
        };
        found.map(act).ok_or_else(|| {
            Report::caller(
                "not_found",
                "no agent was looked up",
                format!("there is no agent `{key}`"),
                "`agentctl agent ls` shows the names",
            )
        })
    }

    fn note(&self, call: impl Into<String>) {
        self.inner.lock().expect("lock").calls.push(call.into());
    }
}

fn ready<'a, T: Send + 'a>(value: Result<T, Report>) -> Pending<'a, T> {
    Box::pin(async move { value })
}

async fn swallow(mut upload: Upload) -> Result<u64, Report> {
    let mut bytes = 0;
    while let Some(piece) = upload.pieces.next().await {
        bytes += piece
            .map_err(|e| {
                Report::caller("upload_broken", "nothing was stored", e.to_string(), "send it again")
            })?
            .len() as u64;
    }
    Ok(bytes)
}

impl Appliance for Fake {
    fn health(&self) -> Health {
        Health::Yellow
    }

    fn status(&self) -> Pending<'_, ApplianceStatus> {
        ready(Ok(status()))
    }

    fn plan(&self, manifest: String) -> Pending<'_, SandboxPlan> {
        if manifest.contains("[agent]") {
            return ready(Ok(plan()));
        }
        ready(Err(Report::caller(
            "manifest_invalid",
            "no plan was made",
            "`agent.name` is missing",
            "add `[agent]` with `name` and `exec`",
        )))
    }

    fn agents(&self) -> Pending<'_, Vec<Agent>> {
        ready(Ok(self.inner.lock().expect("lock").agents.values().cloned().collect()))
    }

    fn agent(&self, agent: AgentKey) -> Pending<'_, Agent> {
        ready(self.find(&agent, |a| a.clone()))
    }

    fn install(&self, package: Upload) -> Pending<'_, Agent> {
        Box::pin(async move {
            let mut bytes = Vec::new();
            let mut pieces = package.pieces;
            while let Some(piece) = pieces.next().await {
                let piece = piece.map_err(|e| {
                    Report::caller("upload_broken", "nothing was installed", e.to_string(), "send it again")
                })?;
                bytes.extend_from_slice(&piece);
            }
            self.note(format!("install {} bytes", bytes.len()));
            let mut agent = scout();
            agent.name = "guest".parse().expect("name");
            agent.bundled = false;
            agent.digest = sha256_hex(&bytes);
            self.inner.lock().expect("lock").agents.insert("guest".into(), agent.clone());
            Ok(agent)
        })
    }

    fn start(&self, agent: AgentKey) -> Pending<'_, Agent> {
        self.note(format!("start {agent}"));
        ready(self.find(&agent, |a| {
            a.wanted = true;
            a.state = AgentState::Ready;
            a.clone()
        }))
    }

    fn stop(&self, agent: AgentKey) -> Pending<'_, Agent> {
        self.note(format!("stop {agent}"));
        ready(self.find(&agent, |a| {
            a.wanted = false;
            a.state = AgentState::Stopped;
            a.run = None;
            a.clone()
        }))
    }

    fn remove(&self, agent: AgentKey) -> Pending<'_, ()> {
        self.note(format!("remove {agent}"));
        let name = self.find(&agent, |a| a.name.to_string());
        ready(name.map(|name| {
            self.inner.lock().expect("lock").agents.remove(&name);
        }))
    }

    fn logs(&self, agent: AgentKey, query: LogQuery) -> Pending<'_, Flow<LogLine>> {
        let found = self.find(&agent, |_| ());
        let log = self.inner.lock().expect("lock").log.clone();
        let old = log[log.len().saturating_sub(query.lines)..].to_vec();
        let old = futures::stream::iter(old);
        let new = tokio_stream::wrappers::BroadcastStream::new(self.log.subscribe());
        let new = new.filter_map(|line| async move { line.ok() });
        ready(found.map(|()| match query.follow {
            Follow::No => Box::pin(old) as Flow<LogLine>,
            Follow::Yes => Box::pin(old.chain(new)) as Flow<LogLine>,
        }))
    }

    fn chat(&self, agent: AgentKey, message: ChatRequest) -> Pending<'_, Flow<ReplyPart>> {
        let takes = self.find(&agent, |a| a.messages);
        let result = takes.and_then(|takes| {
            if !takes {
                return Err(Report::caller(
                    "no_messages",
                    "the message was not sent",
                    "this agent takes no messages",
                    "chat with `echo`",
                ));
            }
            self.note(format!("chat {agent} {}", message.text));
            let key = message.idempotency_key.clone().unwrap_or_default();
            let before = self.inner.lock().expect("lock").keys.insert(message.text.clone(), key.clone());
            if message.text.starts_with("slow") && before != Some(key) {
                // Its reply is whole when it is asked for again.
                let begun =
                    [ReplyPart::Note { text: "begun".into() }, ReplyPart::Text { text: "Let me ".into() }];
                return Ok(
                    Box::pin(futures::stream::iter(begun).chain(futures::stream::pending())) as Flow<_>
                );
            }
            let words = format!(
                "I have kept that: \u{201c}{}\u{201d}. Ask me by meaning and I will find it again.",
                message.text
            );
            let mut parts = vec![ReplyPart::Note { text: "stored as a memory".into() }];
            parts.extend(words.split_inclusive(' ').map(|word| ReplyPart::Text { text: word.into() }));
            parts.push(ReplyPart::Done);
            Ok(Box::pin(futures::stream::iter(parts)) as Flow<ReplyPart>)
        });
        ready(result)
    }

    fn models(&self) -> Pending<'_, Vec<Model>> {
        ready(Ok(self.inner.lock().expect("lock").models.values().cloned().collect()))
    }

    fn add_model(&self, name: ModelName, file: Upload) -> Pending<'_, Model> {
        Box::pin(async move {
            let bytes = swallow(file).await?;
            self.note(format!("model {name} {bytes}"));
            let model = Model {
                name: name.to_string(),
                file: format!("{name}.gguf"),
                bytes,
                origin: "data".into(),
                ..chat_model()
            };
            self.inner.lock().expect("lock").models.insert(name.to_string(), model.clone());
            Ok(model)
        })
    }

    fn remove_model(&self, name: ModelName) -> Pending<'_, ()> {
        let removed = self.inner.lock().expect("lock").models.remove(name.as_str());
        ready(removed.map(drop).ok_or_else(|| {
            Report::caller(
                "not_found",
                "no model was removed",
                format!("there is no model `{name}`"),
                "`agentctl model ls` shows the names",
            )
        }))
    }

    fn pin_model(&self, name: ModelName, residence: Residence) -> Pending<'_, Model> {
        self.note(format!("{} {name}", if residence == Residence::Pinned { "pin" } else { "unpin" }));
        let mut inner = self.inner.lock().expect("lock");
        let model = inner.models.get_mut(name.as_str()).map(|model| {
            model.pinned = residence == Residence::Pinned;
            model.clone()
        });
        ready(model.ok_or_else(|| {
            let why = format!("there is no model `{name}`");
            Report::caller(
                "not_found",
                "the model was not pinned",
                why,
                "`agentctl model ls` shows the names",
            )
        }))
    }

    fn pull_model(&self, name: ModelName, from: PullModel) -> Pending<'_, Flow<PullPart>> {
        self.note(format!("pull {name} from {}", from.url));
        if !from.url.starts_with("https://") {
            let fix = "name an https address";
            return ready(Err(Report::caller(
                "url_malformed",
                "the model was not pulled",
                "no address",
                fix,
            )));
        }
        let mut model = chat_model();
        model.name = name.as_str().to_owned();
        let parts = vec![
            PullPart::Progress { bytes: 512, total_bytes: Some(1024) },
            PullPart::Progress { bytes: 1024, total_bytes: Some(1024) },
            PullPart::Done { model },
        ];
        ready(Ok(Box::pin(futures::stream::iter(parts)) as Flow<PullPart>))
    }

    fn devices(&self) -> Pending<'_, Devices> {
        ready(Ok(self.inner.lock().expect("lock").devices.clone()))
    }

    fn set_partition(&self, partition: Partition) -> Pending<'_, Devices> {
        self.note(format!("set partition {}", partition.id));
        let mut inner = self.inner.lock().expect("lock");
        inner.devices.partitions.retain(|one| one.partition.id != partition.id);
        inner.devices.partitions.push(partition_view(partition));
        ready(Ok(inner.devices.clone()))
    }

    fn remove_partition(&self, id: PartitionId) -> Pending<'_, Devices> {
        self.note(format!("remove partition {id}"));
        let mut inner = self.inner.lock().expect("lock");
        let before = inner.devices.partitions.len();
        inner.devices.partitions.retain(|one| one.partition.id != id);
        ready(if inner.devices.partitions.len() < before {
            Ok(inner.devices.clone())
        } else {
            let why = format!("there is no partition `{id}`");
            Err(Report::caller(
                "not_found",
                "nothing was removed",
                why,
                "`agentctl gpu partition ls` shows them",
            ))
        })
    }

    fn assign_partition(&self, agent: AgentKey, to: PartitionId) -> Pending<'_, Devices> {
        self.note(format!("assign {agent} to {to}"));
        let found = self.find(&agent, |_| ());
        ready(found.map(|()| self.inner.lock().expect("lock").devices.clone()))
    }

    fn memory(&self, agent: AgentKey, order: memory_api::Order) -> Pending<'_, memory_api::Outcome> {
        self.note(format!("{} of {agent} {}", order.action(), order.about()));
        let found = self.find(&agent, |_| ());
        ready(found.and_then(|()| self.inner.lock().expect("lock").memory.carry_out(order)))
    }

    fn knowledge(&self, order: memory_api::KnowledgeOrder) -> Pending<'_, memory_api::KnowledgeOutcome> {
        self.note(format!("{} {}", order.action(), order.about()));
        ready(self.inner.lock().expect("lock").memory.share(order))
    }

    fn grant_device(&self, agent: AgentKey, device: Option<String>) -> Pending<'_, Devices> {
        self.note(format!("grant {} to {agent}", device.as_deref().unwrap_or("nothing")));
        let found = self.find(&agent, |_| ());
        ready(found.map(|()| self.inner.lock().expect("lock").devices.clone()))
    }

    fn plan_model(&self, name: ModelName, context_tokens: u32, _sequences: u32) -> Pending<'_, ModelPlan> {
        self.note(format!("plan {name} with {context_tokens}"));
        ready(Ok(model_plan(name.as_str())))
    }

    fn plan_header(&self, order: PlanOrder) -> Pending<'_, ModelPlan> {
        self.note(format!("plan header {} of {} blocks", order.architecture, order.shape.blocks.len()));
        ready(Ok(model_plan(&order.model)))
    }

    fn secrets(&self) -> Pending<'_, Vec<SecretInfo>> {
        ready(Ok(self.inner.lock().expect("lock").secrets.clone()))
    }

    fn set_secret(&self, secret: SecretOrder) -> Pending<'_, ()> {
        let info = SecretInfo { name: secret.name, agent_id: None, agent: None, hosts: secret.hosts };
        self.inner.lock().expect("lock").secrets.push(info);
        ready(Ok(()))
    }

    fn remove_secret(&self, name: SecretName, _agent: Option<AgentKey>) -> Pending<'_, ()> {
        let mut inner = self.inner.lock().expect("lock");
        let before = inner.secrets.len();
        inner.secrets.retain(|secret| secret.name != name);
        let removed = inner.secrets.len() < before;
        ready(if removed {
            Ok(())
        } else {
            Err(Report::caller("not_found", "no secret was removed", "there is none", "look at the list"))
        })
    }

    fn audit(&self, query: AuditQuery) -> Pending<'_, Bytes> {
        let of_agent = match query.agent.as_ref().map(|agent| self.find(agent, |a| a.agent_id)) {
            Some(Err(report)) => return ready(Err(report)),
            Some(Ok(agent)) => Some(agent),
            None => None,
        };
        let lines = self.inner.lock().expect("lock").audit.clone();
        // A line that is no record, and each head, belongs to the record before it.
        let (mut number, mut page) = (0, Vec::<(u64, Vec<u8>)>::new());
        for line in lines.split_inclusive(|&byte| byte == b'\n') {
            let record = serde_json::from_slice::<Linked>(line).ok().map(|linked| linked.record);
            number = record.as_ref().map_or(number, |record| record.seq);
            let wanted = of_agent.is_none_or(|agent| record.is_some_and(|r| r.agent_id == Some(agent)));
            if wanted && (number > query.after.unwrap_or(0) || query.after.is_none_or(|after| after == 0)) {
                page.push((number, line.to_vec()));
            }
        }
        let mut numbers: Vec<u64> = page.iter().map(|(number, _)| *number).filter(|n| *n > 0).collect();
        numbers.dedup();
        let kept: Vec<u64> = match query.after {
            Some(_) => numbers.into_iter().take(query.most).collect(),
            None => numbers.into_iter().rev().take(query.most).collect(),
        };
        page.retain(|(number, _)| *number == 0 || kept.contains(number));
        ready(Ok(page.into_iter().flat_map(|(_, line)| line).collect()))
    }

    fn audit_head(&self) -> Pending<'_, SignedHead> {
        let lines = self.inner.lock().expect("lock").audit.clone();
        let newest = lines.rsplit(|&byte| byte == b'\n').find_map(|line| serde_json::from_slice(line).ok());
        ready(newest.ok_or_else(|| Report::environment("audit_not_kept", "no head", "there is none", "wait")))
    }

    fn token(&self, agent: AgentKey) -> Pending<'_, Shown> {
        ready(self.find(&agent, |agent| shown(agent.agent_id)))
    }

    fn mint_token(&self, mint: Mint) -> Pending<'_, Shown> {
        self.note(format!("mint {} {}", mint.agent, serde_json::to_string(&mint.by).expect("JSON")));
        let key = mint.agent.parse().expect("a name");
        ready(self.find(&key, |agent| shown(agent.agent_id)))
    }

    fn attenuate_token(&self, _body: Attenuate) -> Pending<'_, Shown> {
        ready(Ok(shown(AgentId(id(1)))))
    }

    fn inspect_token(&self, _body: Inspect) -> Pending<'_, Shown> {
        ready(Ok(shown(AgentId(id(1)))))
    }

    fn verify_token(&self, body: Verify) -> Pending<'_, Verified> {
        self.note(format!("verify {} {:?}", body.token, body.agent));
        let says = shown(AgentId(id(1))).says;
        ready(Ok(Verified {
            holder: says.holder,
            rights: says.rights,
            expires_unix_s: says.expires_unix_s,
            revocation_ids: says.revocation_ids,
        }))
    }

    fn revoke_token(&self, body: Revoke) -> Pending<'_, Revocation> {
        self.note(format!("revoke {:?} {}", body.target, body.why));
        let revoked = Revoked {
            id: RevocationId("ab".repeat(64)),
            unix_ms: NOW_UNIX_MS,
            by: "owner".into(),
            why: body.why,
        };
        ready(Ok(Revocation { revoked, ended: vec![AgentId(id(1))] }))
    }

    fn revoked_tokens(&self) -> Pending<'_, Vec<Revoked>> {
        let id = RevocationId("ab".repeat(64));
        let entry = Revoked { id, unix_ms: NOW_UNIX_MS, by: "owner".into(), why: "it was lost".into() };
        ready(Ok(vec![entry]))
    }

    fn token_key(&self) -> Pending<'_, Key> {
        ready(Ok(Key { key: agentd_domain::audit::PublicKey([7; 32]) }))
    }

    fn reboot(&self) -> Pending<'_, ()> {
        self.note("reboot");
        ready(Ok(()))
    }

    fn poweroff(&self) -> Pending<'_, ()> {
        self.note("poweroff");
        ready(Ok(()))
    }
}

/// What a token says; its text is none.
fn shown(holder: AgentId) -> Shown {
    let rights = Rights {
        api: ["models".to_owned()].into(),
        read: Default::default(),
        calls: Default::default(),
        net: Default::default(),
        limits: Default::default(),
    };
    let grant = Grant { holder, rights: rights.clone(), expires_unix_s: None };
    let revocation_ids = vec![RevocationId("ab".repeat(64))];
    let says = Inspected { grant, later: Vec::new(), holder, rights, expires_unix_s: None, revocation_ids };
    Shown { token: "not-a-token".into(), says }
}

/// State files in memory.
#[derive(Default)]
pub struct Files(Mutex<HashMap<String, Vec<u8>>>);

impl StateFiles for Files {
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        Ok(self.0.lock().expect("lock").get(name).cloned())
    }

    fn write(&self, name: &str, content: &[u8]) -> io::Result<()> {
        self.0.lock().expect("lock").insert(name.to_owned(), content.to_vec());
        Ok(())
    }
}

/// A boot clock that moves when told.
#[derive(Clone, Default)]
pub struct TestClock(Arc<Mutex<Duration>>);

impl TestClock {
    pub fn advance(&self, by: Duration) {
        *self.0.lock().expect("lock") += by;
    }

    pub fn boot(&self) -> agentd_console::BootClock {
        let own = self.clone();
        Arc::new(move || *own.0.lock().expect("lock"))
    }
}

pub fn sha256_hex(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    hex::encode(Sha256::digest(bytes))
}

fn id(n: u128) -> uuid::Uuid {
    uuid::Uuid::from_u128(0x0199_3f21_7c4a_7000_8000_0000_0000_0000 + n)
}

fn agent(n: u128, name: &str, description: &str, state: AgentState) -> Agent {
    Agent {
        agent_id: agentd_domain::ids::AgentId(id(n)),
        owner_id: agentd_domain::ids::OwnerId(id(99)),
        parent: None,
        name: name.parse().expect("name"),
        version: "0.1.0".into(),
        description: description.into(),
        state,
        wanted: true,
        run: None,
        limits: Limits::default(),
        restarts: 0,
        last_exit: None,
        digest: sha256_hex(name.as_bytes()),
        bundled: true,
        messages: true,
        problem: None,
        health: AgentHealth::default(),
    }
}

fn run(n: u128, memory_bytes: u64, pids: u32) -> Run {
    let pid = 412 + i32::try_from(n).expect("small");
    Run {
        run_id: agentd_domain::ids::RunId(id(200 + n)),
        pid,
        started_boot_ms: 3_390,
        uptime_ms: 8_042_311,
        memory_bytes,
        cpu_ms: 15_730,
        pids,
    }
}

fn echo() -> Agent {
    let run = run(1, 23 * MIB, 3);
    Agent {
        run: Some(run),
        ..agent(1, "echo", "Remembers what you tell it, and recalls it by meaning", AgentState::Ready)
    }
}

fn scout() -> Agent {
    let run = run(2, 214 * MIB, 11);
    Agent {
        run: Some(run),
        health: hurt(),
        messages: false,
        bundled: false,
        ..agent(2, "scout", "Reads the house's sensors every minute", AgentState::Throttled)
    }
}

/// One that is throttled, hurts, and was killed by seccomp and by the watchdog.
fn hurt() -> AgentHealth {
    let pain = Pain {
        kind: "sensor.lost".into(),
        severity: Severity::High,
        message: "<b>the boiler</b> does not answer".into(),
        from: PainFrom::Agent,
        at_unix_ms: 1_795_176_243_000,
        count: 3,
        over: false,
    };
    let exit = |cause| ExitRecord {
        run_id: agentd_domain::ids::RunId(id(301)),
        agent_id: agentd_domain::ids::AgentId(id(2)),
        cause,
        started_boot_ms: 60_000,
        ended_boot_ms: 62_410,
        memory_peak_bytes: 0,
        forbidden: None,
    };
    AgentHealth {
        reason: "it has half of its processor time: it starts processes against its limit".into(),
        pressure: Some(Pressure { memory_some_permille: 715, memory_high_events: 42, ..Pressure::default() }),
        throttle: Throttle::Half,
        pain: Some(pain.clone()),
        pains: vec![pain],
        notes: vec![Note {
            unix_ms: 1_795_176_243_000,
            text: "throttled to half of its processor time".into(),
        }],
        exits: vec![exit(ExitCause::Seccomp { syscall: Some("ptrace".into()) }), exit(ExitCause::Pressure)],
    }
}

fn broken() -> Agent {
    let exit = ExitRecord {
        run_id: agentd_domain::ids::RunId(id(300)),
        agent_id: agentd_domain::ids::AgentId(id(3)),
        cause: ExitCause::OutOfMemory,
        started_boot_ms: 60_000,
        ended_boot_ms: 62_410,
        memory_peak_bytes: 256 * MIB,
        forbidden: None,
    };
    let problem = Report::environment(
        "agent_quarantined",
        "the agent was not started again",
        "it went over its memory limit 5 times in 2 minutes",
        "raise `limits.memory_max` in its agent.toml and install it again",
    );
    Agent {
        restarts: 5,
        last_exit: Some(exit),
        problem: Some(problem),
        bundled: false,
        ..agent(3, "indexer", "Reads the library", AgentState::Quarantined)
    }
}

fn loaded(model: &Model, parameters: u64, dimension: u32) -> LoadedModel {
    LoadedModel {
        model: model.name.clone(),
        path: format!("/usr/share/agentd/models/{}", model.file),
        kind: model.kind,
        architecture: model.architecture.clone(),
        parameters,
        file_bytes: model.bytes,
        sha256: sha256_hex(model.name.as_bytes()),
        context_tokens: 512,
        sequences: 4,
        dimension,
        chat_template: None,
        sharing_refused: None,
        placement: None,
    }
}

fn first_log() -> Vec<LogLine> {
    let lines = [
        ("agentd", "run 01993f21-7c4a-7000-8000-0000000000c9 started, pid 413"),
        ("out", "echo 0.1.0, model tiny, memory spirit: 31 records"),
        ("out", "waiting for messages"),
        ("out", "message 1: remembered in 12 ms"),
        ("err", "the embedder was away for 210 ms: 1 record found by words only"),
        ("out", "<script>alert('an agent may print this')</script>"),
    ];
    (0i64..)
        .zip(lines)
        .map(|(n, (stream, text))| LogLine {
            unix_ms: NOW_UNIX_MS - 60_000 + n * 7_300,
            stream: stream.into(),
            text: text.into(),
        })
        .collect()
}

fn plan() -> SandboxPlan {
    SandboxPlan {
        version: PLAN_VERSION,
        agent_id: agentd_domain::ids::AgentId(id(1)),
        name: "echo".parse().expect("name"),
        uid: 1_000_000,
        exec: vec!["/agent/bin/echo".into()],
        workdir: "/work".into(),
        env: vec![("HOME".into(), "/work".into())],
        mounts: vec![Mount::Work { target: "/work".into() }],
        landlock: LandlockPlan { abi_min: 6, rules: vec![], connect_tcp: vec![7070] },
        seccomp: SeccompPlan {
            groups: vec!["base".into()],
            allow: vec!["read".into()],
            enosys: vec![],
            kill: vec![],
            ioctls: vec![],
            ioctl_types: vec![],
            socket_families: vec![2],
            datagram_families: Vec::new(),
            prctls: vec![],
        },
        cgroup: CgroupLimits {
            memory_high_bytes: 192 * MIB,
            memory_max_bytes: 256 * MIB,
            pids_max: 64,
            cpu_quota_us: 50_000,
            cpu_period_us: 100_000,
            io_bytes_per_second: None,
        },
        rlimits: vec![Rlimit { name: "NOFILE".into(), soft: 512, hard: 512 }],
        network: NetworkPlan::LoopbackOnly,
        api: vec!["memory.remember".into()],
        device: None,
    }
}
