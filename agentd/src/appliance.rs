//! What does the console see and steer?
//!
//! The one implementation of [`Appliance`]: it asks the parts of agentd and puts their answers together.
//! Always: a part that is missing (no data partition, no launcher, no init) costs what needs it and nothing else.

use crate::agents::{Agents, View, Views};
use crate::audit::{Audit, Order};
use crate::clock;
use crate::egress::Egress;
use crate::engine::{Engine, Stage};
use crate::gpu::Gpu;
use crate::health::Board;
use crate::inbox::Inbox;
use crate::initlink::Init;
use crate::logs::Logs;
use crate::memory::Memories;
use crate::models::Models;
use crate::places::Places;
use crate::readings;
use crate::store::{self, Db};
use crate::tokens::{self, Tokens};
use agentd_capability::{Package, Subject, compile, parse_manifest};
use agentd_console::{Appliance, AuditQuery, Flow, Follow, LogQuery, Pending, Residence, Upload};
use agentd_domain::agent_api::ReplyPart;
use agentd_domain::api::{
    Agent, AgentKey, AgentState, ApplianceStatus, ChatRequest, EngineState, LogLine, Model, ModelName,
    PullModel, PullPart, Run,
};
use agentd_domain::audit::SignedHead;
use agentd_domain::engine::{Device, GpuReadings};
use agentd_domain::fault::Report;
use agentd_domain::ids::AgentId;
use agentd_domain::initctl::Health;
use agentd_domain::ledger::{Devices, ModelPlan, Partition, PartitionId, PlanOrder};
use agentd_domain::manifest::{Limits, Manifest};
use agentd_domain::memory_api::{self, KnowledgeOrder, KnowledgeOutcome};
use agentd_domain::net::rule::SecretName;
use agentd_domain::plan::SandboxPlan;
use agentd_domain::secret::{SecretInfo, SecretOrder};
use agentd_domain::token::{
    Attenuate, Inspect, Key, Mint, Revocation, Revoke, Revoked, Shown, Verified, Verify,
};
use agentd_sandbox::client::Launcher;
use bytes::Bytes;
use futures::{StreamExt, stream};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast;
use tokio::time::timeout;

/// A start raises walls for up to ten seconds, under plain emulation too.
const START_PATIENCE: Duration = Duration::from_secs(25);
/// The grace of a stop, and the time to see its end.
const STOP_PATIENCE: Duration = Duration::from_secs(15);
/// init answers at once or not at all.
const INIT_PATIENCE: Duration = Duration::from_secs(3);

/// What only works with a data partition.
#[derive(Clone)]
pub struct Parts {
    pub db: Db,
    pub agents: Agents,
    pub inbox: Inbox,
    pub logs: Logs,
    pub tokens: Tokens,
    pub egress: Egress,
    pub memories: Memories,
}

pub struct Machine {
    pub places: Places,
    pub board: Arc<Board>,
    pub init: Init,
    pub engine: Engine,
    pub models: Models,
    pub gpu: Gpu,
    pub launcher: Launcher,
    pub audit: Audit,
    /// Or why there are no agents.
    pub parts: Result<Parts, Report>,
}

impl Machine {
    pub(crate) fn parts(&self) -> Result<&Parts, Report> {
        self.parts.as_ref().map_err(Clone::clone)
    }

    pub(crate) fn find(&self, key: &AgentKey) -> Result<(AgentId, View), Report> {
        let views = self.parts()?.agents.views();
        let found = views.iter().find(|(id, view)| match key {
            AgentKey::Name(name) => view.row.name == *name,
            AgentKey::Id(wanted) => *id == wanted,
        });
        found.map(|(id, view)| (*id, view.clone())).ok_or_else(|| {
            Report::caller(
                "not_found",
                "nothing was done",
                format!("there is no agent `{key}`"),
                "`agentctl agent ls` shows the agents",
            )
        })
    }

    pub(crate) fn order_for(&self, action: &'static str, key: &AgentKey) -> Order {
        let agent = self.find(key).ok().map(|(agent, _)| agent);
        Order { action, agent, about: key.to_string() }
    }

    fn show(&self, agent: AgentId, view: &View) -> Agent {
        let run = view.run.map(|run| {
            let used = readings::run_use(&self.places.cgroup_root, agent, &run);
            Run {
                run_id: run.run_id,
                pid: run.pid,
                started_boot_ms: run.started_boot_ms,
                uptime_ms: clock::boot_ms().saturating_sub(run.started_boot_ms),
                memory_bytes: used.memory_bytes,
                cpu_ms: used.cpu_ms,
                pids: used.pids,
            }
        });
        let manifest = view.manifest.as_deref();
        Agent {
            agent_id: agent,
            owner_id: view.row.owner_id,
            parent: view.row.parent,
            name: view.row.name.clone(),
            version: view.row.version.clone(),
            description: manifest.map(|manifest| manifest.description.clone()).unwrap_or_default(),
            state: view.state,
            wanted: view.row.wanted,
            run,
            limits: manifest.map_or_else(Limits::default, |manifest| manifest.limits.clone()),
            restarts: view.restarts,
            last_exit: view.last_exit.clone(),
            digest: view.row.digest.clone(),
            bundled: view.row.bundled,
            messages: manifest.is_some_and(|manifest| manifest.messages),
            problem: view.problem.clone(),
            health: view.health.clone(),
        }
    }

    pub(crate) fn shown(&self, agent: AgentId) -> Result<Agent, Report> {
        let (agent, view) = self.find(&AgentKey::Id(agent))?;
        Ok(self.show(agent, &view))
    }

    /// Waits until an agent's state is what is waited for, at most so long; then shows what it is.
    async fn when(
        &self,
        agent: AgentId,
        patience: Duration,
        settled: impl Fn(AgentState) -> bool,
    ) -> Result<Agent, Report> {
        let mut views = self.parts()?.agents.watch();
        let waited = views.wait_for(|views| views.get(&agent).is_none_or(|view| settled(view.state)));
        let _ = timeout(patience, waited).await;
        self.shown(agent)
    }

    async fn status_of_all(&self) -> ApplianceStatus {
        let system = match timeout(INIT_PATIENCE, self.init.status()).await {
            Ok(Ok(system)) => Some(system),
            Ok(Err(error)) => {
                tracing::debug!(%error, "init did not say how the system is");
                None
            }
            Err(_) => None,
        };
        let memory = readings::memory();
        let disk = readings::disk(&self.places.data);
        let mut problems = self.board.problems();
        let (engine, asked) = self.engine_state().await;
        // What was read when agentd connected, where the engine does not answer.
        let (devices, gpus) = asked.unwrap_or_else(|| (self.engine.view().devices.clone(), Vec::new()));
        problems.extend(gpus.iter().filter_map(GpuReadings::problem));
        let mut status = ApplianceStatus {
            version: crate::VERSION.to_owned(),
            variant: String::new(),
            slot: "unknown".to_owned(),
            uptime_ms: clock::boot_ms(),
            health: self.board.health(),
            problems: Vec::new(),
            memory_total_bytes: memory.total_bytes,
            memory_available_bytes: memory.available_bytes,
            agentd_rss_bytes: readings::own_rss_bytes(),
            data_total_bytes: disk.total_bytes,
            data_available_bytes: disk.available_bytes,
            devices,
            gpus,
            regions: readings::device_regions(&self.places.cgroup_root),
            clock: Default::default(),
            now_unix_ms: clock::unix_ms(),
            addresses: Vec::new(),
            engine,
            milestones: Vec::new(),
        };
        if let Some(system) = system {
            status.version = system.version;
            status.variant = system.variant;
            status.slot = system.slot;
            status.health = worse(status.health, system.health);
            for problem in system.problems {
                if !problems.contains(&problem) {
                    problems.push(problem);
                }
            }
            status.addresses = system.addresses;
            status.clock = system.clock;
            status.milestones = system.milestones;
        }
        status.problems = problems;
        status
    }

    /// With the devices as the engine reads them now, if it answers.
    async fn engine_state(&self) -> (EngineState, Option<(Vec<Device>, Vec<GpuReadings>)>) {
        let view = self.engine.view();
        match &view.stage {
            Stage::Starting => (EngineState::Starting, None),
            Stage::Down(report) => (EngineState::Down { report: report.clone() }, None),
            Stage::Loading | Stage::Ready => match self.engine.status().await {
                Ok(status) => {
                    let ready = EngineState::Ready {
                        backend: status.backend,
                        backends: status.backends,
                        models: status.models,
                        rss_bytes: status.rss_bytes,
                        private_bytes: readings::engines_private_bytes(&self.places.cgroup_root),
                        uptime_ms: status.uptime_ms,
                        loading: view.stage == Stage::Loading,
                    };
                    (ready, Some((status.devices, status.gpus)))
                }
                Err(report) => (EngineState::Down { report }, None),
            },
        }
    }

    async fn chat_with(&self, key: AgentKey, message: ChatRequest) -> Result<Flow<ReplyPart>, Report> {
        let parts = self.parts()?;
        let (agent, view) = self.find(&key)?;
        let takes = view.manifest.as_ref().is_some_and(|manifest| manifest.messages);
        if !takes {
            return Err(Report::caller(
                "no_messages",
                "the message was not taken",
                format!("the agent {} takes no messages", view.row.name),
                "its `agent.toml` would have to say `[messages]` with `accept = true`",
            ));
        }
        if let Some(report) = away(&view) {
            return Err(report);
        }
        let gone = until_away(parts.agents.watch(), agent);
        parts.inbox.send(agent, message.text, message.idempotency_key, gone).await
    }
}

/// Reads a manifest; all its mistakes in one report.
pub fn checked(text: &str) -> Result<Manifest, Report> {
    parse_manifest(text).map_err(|reports| {
        let all = |part: fn(&Report) -> &str| reports.iter().map(part).collect::<Vec<_>>().join("; ");
        let code = reports.first().map_or("manifest_invalid", |report| &report.code);
        Report::caller(
            code,
            "the manifest was not accepted",
            all(|report| &report.why),
            all(|report| &report.fix),
        )
    })
}

impl Appliance for Machine {
    fn health(&self) -> Health {
        self.board.health()
    }

    fn status(&self) -> Pending<'_, ApplianceStatus> {
        Box::pin(async { Ok(self.status_of_all().await) })
    }

    fn plan(&self, manifest: String) -> Pending<'_, SandboxPlan> {
        Box::pin(async move {
            let manifest = checked(&manifest)?;
            let known = self.find(&AgentKey::Name(manifest.name.clone())).ok();
            let subject = known.map_or_else(Subject::nobody, |(agent_id, view)| Subject {
                agent_id,
                uid: view.row.uid,
                package: Package::Installed,
            });
            Ok(compile(&manifest, &subject))
        })
    }

    fn agents(&self) -> Pending<'_, Vec<Agent>> {
        Box::pin(async {
            let views = self.parts()?.agents.views();
            let mut agents: Vec<_> = views.iter().map(|(id, view)| self.show(*id, view)).collect();
            agents.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(agents)
        })
    }

    fn agent(&self, agent: AgentKey) -> Pending<'_, Agent> {
        Box::pin(async move { self.find(&agent).map(|(id, view)| self.show(id, &view)) })
    }

    fn install(&self, package: Upload) -> Pending<'_, Agent> {
        let order = Order { action: "agent.install", agent: None, about: String::new() };
        Box::pin(self.audit.order(order, self.install_package(package), |agent, order| {
            order.agent = Some(agent.agent_id);
            order.about = agent.name.to_string();
        }))
    }

    fn start(&self, agent: AgentKey) -> Pending<'_, Agent> {
        let order = self.order_for("agent.start", &agent);
        let work = async move {
            let (agent, _) = self.find(&agent)?;
            self.parts()?.agents.want(agent, true).await?;
            self.when(agent, START_PATIENCE, |state| {
                !matches!(state, AgentState::Starting | AgentState::Stopped)
            })
            .await
        };
        Box::pin(self.audit.order(order, work, |_, _| {}))
    }

    fn stop(&self, agent: AgentKey) -> Pending<'_, Agent> {
        let order = self.order_for("agent.stop", &agent);
        let work = async move {
            let (agent, _) = self.find(&agent)?;
            self.parts()?.agents.want(agent, false).await?;
            self.when(agent, STOP_PATIENCE, |state| state == AgentState::Stopped).await
        };
        Box::pin(self.audit.order(order, work, |_, _| {}))
    }

    fn remove(&self, agent: AgentKey) -> Pending<'_, ()> {
        let order = self.order_for("agent.remove", &agent);
        let work = async move {
            let (agent, view) = self.find(&agent)?;
            if view.row.bundled && view.row.parent.is_none() {
                return Err(Report::caller(
                    "conflict",
                    "the agent was not removed",
                    format!("{} is part of the image", view.row.name),
                    format!("stop it instead: `agentctl agent stop {}`", view.row.name),
                ));
            }
            let agents = self.parts()?.agents.clone();
            // On a task of its own: a removal that was begun is finished, whoever has gone meanwhile.
            let secrets = self.parts()?.egress.secrets().clone();
            let gpu = self.gpu.clone();
            let removal = tokio::spawn(async move {
                agents.remove(agent).await?;
                gpu.forget(agent);
                let forgotten = tokio::task::spawn_blocking(move || secrets.forget(agent)).await;
                forgotten.map_err(|error| thread_lost(&error.to_string()))?
            });
            removal.await.map_err(|error| thread_lost(&error.to_string()))?
        };
        Box::pin(self.audit.order(order, work, |_, _| {}))
    }

    fn logs(&self, agent: AgentKey, query: LogQuery) -> Pending<'_, Flow<LogLine>> {
        Box::pin(async move {
            let (agent, _) = self.find(&agent)?;
            let (lines, follow) = self.parts()?.logs.tail(agent, query.lines);
            let lines = stream::iter(lines);
            Ok(match query.follow {
                Follow::No => lines.boxed(),
                Follow::Yes => lines.chain(following(follow)).boxed(),
            })
        })
    }

    fn chat(&self, agent: AgentKey, message: ChatRequest) -> Pending<'_, Flow<ReplyPart>> {
        Box::pin(self.chat_with(agent, message))
    }

    fn models(&self) -> Pending<'_, Vec<Model>> {
        Box::pin(async { Ok(self.models_shown().await) })
    }

    fn pin_model(&self, name: ModelName, residence: Residence) -> Pending<'_, Model> {
        Box::pin(self.model_pin(name, residence))
    }

    fn add_model(&self, name: ModelName, file: Upload) -> Pending<'_, Model> {
        let order = Order { action: "model.add", agent: None, about: name.to_string() };
        Box::pin(self.audit.order(order, self.models.add(name, file), |_, _| {}))
    }

    fn pull_model(&self, name: ModelName, from: PullModel) -> Pending<'_, Flow<PullPart>> {
        Box::pin(async move { self.model_pull(name, &from) })
    }

    fn remove_model(&self, name: ModelName) -> Pending<'_, ()> {
        let order = Order { action: "model.remove", agent: None, about: name.to_string() };
        Box::pin(self.audit.order(order, self.models.remove(name), |_, _| {}))
    }

    fn devices(&self) -> Pending<'_, Devices> {
        Box::pin(self.devices_now())
    }

    fn set_partition(&self, partition: Partition) -> Pending<'_, Devices> {
        Box::pin(self.partition_set(partition))
    }

    fn remove_partition(&self, id: PartitionId) -> Pending<'_, Devices> {
        Box::pin(self.partition_remove(id))
    }

    fn assign_partition(&self, agent: AgentKey, to: PartitionId) -> Pending<'_, Devices> {
        Box::pin(self.partition_assign(agent, to))
    }

    fn grant_device(&self, agent: AgentKey, device: Option<String>) -> Pending<'_, Devices> {
        Box::pin(self.device_grant(agent, device))
    }

    fn plan_model(&self, name: ModelName, context_tokens: u32, sequences: u32) -> Pending<'_, ModelPlan> {
        Box::pin(self.model_plan(name, context_tokens, sequences))
    }

    fn plan_header(&self, order: PlanOrder) -> Pending<'_, ModelPlan> {
        Box::pin(async move { Ok(self.header_plan(order)) })
    }

    fn memory(&self, agent: AgentKey, order: memory_api::Order) -> Pending<'_, memory_api::Outcome> {
        Box::pin(self.memory_order(agent, order))
    }

    fn knowledge(&self, order: KnowledgeOrder) -> Pending<'_, KnowledgeOutcome> {
        Box::pin(self.knowledge_order(order))
    }

    fn secrets(&self) -> Pending<'_, Vec<SecretInfo>> {
        Box::pin(async { self.secret_list() })
    }

    fn set_secret(&self, secret: SecretOrder) -> Pending<'_, ()> {
        Box::pin(self.secret_set(secret))
    }

    fn remove_secret(&self, name: SecretName, agent: Option<AgentKey>) -> Pending<'_, ()> {
        Box::pin(self.secret_remove(name, agent))
    }

    fn audit(&self, query: AuditQuery) -> Pending<'_, Bytes> {
        Box::pin(async move {
            let agent = match &query.agent {
                None => None,
                // Also of an agent that is gone: its records stay.
                Some(AgentKey::Id(agent)) => Some(*agent),
                Some(key) => Some(self.find(key)?.0),
            };
            let query = store::AuditQuery { after: query.after, most: query.most, agent };
            self.audit.lines(query).await.map(Bytes::from)
        })
    }

    fn audit_head(&self) -> Pending<'_, SignedHead> {
        Box::pin(self.audit.head())
    }

    fn token(&self, agent: AgentKey) -> Pending<'_, Shown> {
        Box::pin(self.token_of_agent(agent))
    }

    fn mint_token(&self, mint: Mint) -> Pending<'_, Shown> {
        Box::pin(self.mint(mint))
    }

    fn attenuate_token(&self, body: Attenuate) -> Pending<'_, Shown> {
        Box::pin(async move { self.attenuate(&body) })
    }

    fn inspect_token(&self, body: Inspect) -> Pending<'_, Shown> {
        Box::pin(async move { tokens::shown(body.token) })
    }

    fn verify_token(&self, body: Verify) -> Pending<'_, Verified> {
        Box::pin(Machine::verify_token(self, body))
    }

    fn revoke_token(&self, body: Revoke) -> Pending<'_, Revocation> {
        Box::pin(self.revoke(body))
    }

    fn revoked_tokens(&self) -> Pending<'_, Vec<Revoked>> {
        Box::pin(self.all_revoked())
    }

    fn token_key(&self) -> Pending<'_, Key> {
        Box::pin(async { self.key_of_tokens() })
    }

    fn reboot(&self) -> Pending<'_, ()> {
        let order = Order { action: "machine.reboot", agent: None, about: String::new() };
        let work = async {
            self.init.reboot().await.map_err(|error| error.report("the appliance was not rebooted"))
        };
        Box::pin(self.audit.order(order, work, |_, _| {}))
    }

    fn poweroff(&self) -> Pending<'_, ()> {
        let order = Order { action: "machine.poweroff", agent: None, about: String::new() };
        let work = async {
            self.init.power_off().await.map_err(|error| error.report("the appliance was not switched off"))
        };
        Box::pin(self.audit.order(order, work, |_, _| {}))
    }
}

fn following(follow: broadcast::Receiver<LogLine>) -> impl futures::Stream<Item = LogLine> + Send {
    stream::unfold(follow, |mut follow| async move {
        let line = match follow.recv().await {
            Ok(line) => line,
            Err(broadcast::error::RecvError::Lagged(count)) => LogLine {
                unix_ms: clock::unix_ms(),
                stream: "agentd".to_owned(),
                text: format!("{count} lines were skipped: the reader was slower than the agent"),
            },
            Err(broadcast::error::RecvError::Closed) => return None,
        };
        Some((line, follow))
    })
}

/// Why an agent will not answer now, if so.
fn away(view: &View) -> Option<Report> {
    let name = &view.row.name;
    match view.state {
        state if view.row.wanted && (state.is_running() || is_coming(state)) => None,
        AgentState::Quarantined | AgentState::Refused => {
            view.problem.clone().or_else(|| Some(stopped(name.as_str())))
        }
        _ => Some(stopped(name.as_str())),
    }
}

fn is_coming(state: AgentState) -> bool {
    matches!(state, AgentState::Starting | AgentState::Crashed)
}

fn stopped(name: &str) -> Report {
    Report::environment(
        "agent_stopped",
        "the message was not answered",
        format!("the agent {name} is stopped"),
        format!("start it: `agentctl agent start {name}`"),
    )
}

async fn until_away(mut views: tokio::sync::watch::Receiver<Views>, agent: AgentId) -> Report {
    loop {
        let report = match views.borrow_and_update().get(&agent) {
            Some(view) => away(view),
            None => Some(stopped("that was asked")),
        };
        if let Some(report) = report {
            return report;
        }
        if views.changed().await.is_err() {
            return stopped("that was asked");
        }
    }
}

pub(crate) fn thread_lost(why: &str) -> Report {
    Report::bug("thread_lost", "it was not done", why, "try again")
}

fn worse(a: Health, b: Health) -> Health {
    let rank = |health| match health {
        Health::Green => 0,
        Health::Yellow => 1,
        Health::Red => 2,
    };
    if rank(a) >= rank(b) { a } else { b }
}
