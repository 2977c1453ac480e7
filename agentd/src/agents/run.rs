//! The loop that owns every agent's state.
//!
//! It takes wishes and the launcher's answers in turn, asks `plan::step` what to do, does it, and shows the
//! result. What takes long is not done here: the launcher has a thread of its own, a run's API runs on the data
//! plane.

mod tokens;

use super::nerves::{Felt, Nerves};
use super::plan::{self, Action, Event, Now, State};
use super::vitals::{self, Look, Seen};
use super::words::{
    forbidden, hurting, is_about_walls, killed, noted, place_of, quarantined, self_health, shown_health,
    told, unknown_agent, wall_failed,
};
use super::{Agents, LivingRun, QUEUE, View, Views};
use crate::audit::Audit;
use crate::clock;
use crate::gpu::Gpu;
use crate::health::{Board, START, Weight};
use crate::inbox::Inbox;
use crate::launcher::{self, Answer, FailureKind, Order};
use crate::logs::Logs;
use crate::memory::Memories;
use crate::store::{AgentRow, Db, StoreError};
use crate::tokens::Tokens;
use agentd_capability::Package;
use agentd_domain::api::AgentState;
use agentd_domain::fault::Report;
use agentd_domain::health::{self, Effect, Health, History, NotStarted, Phase, Renewal};
use agentd_domain::ids::{AgentId, RunId};
use agentd_domain::launcher::{ExitCause, ExitRecord, Forbidden, KillReason, Listing, RunInfo};
use agentd_domain::manifest::Manifest;
use agentd_domain::plan::CgroupLimits;
use agentd_domain::token::Verified;
use agentd_sandbox::client::{Launcher, RunHandles};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// How often the launcher's list is compared with what we believe, when nothing happens.
const LIST_EVERY: Duration = Duration::from_secs(30);
/// While the launcher is away, or a run has ended and its record is not written yet.
const LIST_SOON: Duration = Duration::from_millis(200);

/// How often the runs that live are looked at. Twice this is how soon a livelock ends (`agentd_domain::health`).
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Newest ends that are shown.
const EXITS_SHOWN: usize = 5;

/// Between two lists; the agent's log has the number.
const FORBIDDEN_RECORDED_MOST: u64 = 100;

/// Below it one process more or less says nothing.
const CROWD_PIDS: u64 = 16;

/// A living run, given to the data plane.
pub struct Serve {
    pub agent: AgentId,
    pub run: RunId,
    pub manifest: Arc<Manifest>,
    /// What the run may do, while its token holds.
    pub held: Arc<Verified>,
    pub handles: RunHandles,
    pub over: CancellationToken,
    /// Called once when the run's process has ended.
    pub ended: Box<dyn FnOnce() + Send>,
}

/// What the loop needs of the world.
pub struct Links {
    pub db: Db,
    pub audit: Audit,
    pub logs: Logs,
    pub inbox: Inbox,
    pub memories: Memories,
    pub board: Arc<Board>,
    pub launcher: Launcher,
    pub tokens: Tokens,
    pub nerves: Nerves,
    pub felt: mpsc::Receiver<Felt>,
    pub cgroup_root: PathBuf,
    /// Gives runs devices of their own.
    pub gpu: Gpu,
    /// Serves a run's API and watches its process, on the data plane.
    pub serve: Box<dyn Fn(Serve) + Send>,
}

pub(super) enum Input {
    Want {
        agent: AgentId,
        wanted: bool,
        answer: Done,
    },
    Installed {
        row: Box<AgentRow>,
        answer: Done,
    },
    Remove {
        agent: AgentId,
        answer: Done,
    },
    /// Something was revoked: told when it is acted on, and to whom it was done.
    Revoked {
        answer: oneshot::Sender<Vec<AgentId>>,
    },
    /// An agent has another token.
    Renewed {
        agent: AgentId,
        answer: Done,
    },
    Answer(Answer),
    ProcessEnded {
        run: RunId,
    },
    Seen(Seen),
}

type Done = oneshot::Sender<Result<(), Report>>;

/// Starts the loop on the current runtime with the agents that the store knows.
pub async fn start(links: Links) -> Result<Agents, Report> {
    let what = "the agents were not loaded";
    let rows = links.db.call(|store| {
        let rows = store.agents()?;
        let past = |row: &AgentRow| {
            Ok(Past {
                exits: store.last_exits(row.agent_id, EXITS_SHOWN)?,
                history: store.health(row.agent_id)?,
                waiting: store.waiting_messages(row.agent_id)?.into_iter().map(|(seq, _)| seq).collect(),
            })
        };
        let pasts = rows.iter().map(past).collect::<Result<Vec<_>, StoreError>>()?;
        Ok(rows.into_iter().zip(pasts).collect::<Vec<_>>())
    });
    let rows = rows.await.map_err(|error| error.report(what))?;
    let (wishes, inputs) = mpsc::channel(QUEUE);
    let to_loop = wishes.clone();
    let orders = launcher::start(links.launcher.clone(), move |answer| {
        to_loop.blocking_send(Input::Answer(answer)).is_ok()
    });
    let threads_spent = |error: io::Error| {
        Report::environment("threads_spent", what, error.to_string(), "reboot the appliance")
    };
    let orders = orders.map_err(threads_spent)?;
    let to_loop = wishes.downgrade();
    let looks = vitals::start(links.cgroup_root.clone(), move |seen| {
        to_loop.upgrade().is_some_and(|to_loop| to_loop.blocking_send(Input::Seen(seen)).is_ok())
    });
    let looks = looks.map_err(threads_spent)?;
    let (shown, views) = watch::channel(Views::default());
    let mut agents = Loop {
        links,
        state: State::default(),
        known: BTreeMap::new(),
        runs: HashMap::new(),
        unserved: HashMap::new(),
        limits: HashMap::new(),
        looks,
        looking: false,
        orders,
        to_self: wishes.downgrade(),
        shown,
        removals: HashMap::new(),
        ending: BTreeSet::new(),
        forbidden: HashMap::new(),
        held: HashMap::new(),
    };
    for (row, past) in rows {
        // Nothing is due before the launcher's list was seen.
        let _ = agents.learn(row, past);
    }
    agents.order(Order::List);
    agents.show();
    tokio::spawn(agents.run(inputs));
    Ok(Agents { wishes, views })
}

struct Loop {
    links: Links,
    state: State,
    known: BTreeMap<AgentId, Known>,
    runs: HashMap<RunId, Attached>,
    /// Runs that live and are not served yet, from the launcher's last list.
    unserved: HashMap<RunId, RunInfo>,
    /// What the plan of a run that lives allows, which a throttle is lifted to.
    limits: HashMap<RunId, CgroupLimits>,
    looks: std::sync::mpsc::SyncSender<Look>,
    /// The answer to a look is awaited.
    looking: bool,
    orders: std::sync::mpsc::Sender<Order>,
    to_self: mpsc::WeakSender<Input>,
    shown: watch::Sender<Views>,
    removals: HashMap<AgentId, Done>,
    /// Runs whose process is gone and whose exit record is awaited.
    ending: BTreeSet<RunId>,
    /// Processes of each run that seccomp has killed, as far as it was told.
    forbidden: HashMap<RunId, u64>,
    /// Of runs that were asked for and are not served yet.
    held: HashMap<RunId, Arc<Verified>>,
}

/// What the loop knows of an agent besides its phase.
struct Known {
    row: Arc<AgentRow>,
    manifest: Option<Arc<Manifest>>,
    package: Package,
    /// Newest first.
    exits: Vec<ExitRecord>,
    problem: Option<Report>,
    /// Its token gave no run when one was to be started.
    refused: bool,
    /// Of a child that is removed with its parent: not tried again before.
    remove_after_boot_ms: u64,
    /// Of the history that is on the disk.
    kept: u64,
}

/// What the store knows of an agent besides its row.
#[derive(Default)]
struct Past {
    exits: Vec<ExitRecord>,
    history: History,
    /// Messages that were not answered.
    waiting: Vec<u64>,
}

/// A run whose API is served.
struct Attached {
    agent: AgentId,
    pid: i32,
    started_boot_ms: u64,
    over: CancellationToken,
    held: Arc<Verified>,
    /// When its token was found to hold no more.
    killed_boot_ms: Option<u64>,
}

impl Loop {
    async fn run(mut self, mut inputs: mpsc::Receiver<Input>) {
        let mut next_list = tokio::time::Instant::now() + LIST_EVERY;
        let mut next_look = tokio::time::Instant::now() + LOOK_EVERY;
        loop {
            let tick = plan::next_tick_ms(&self.state)
                .map(|at_ms| Duration::from_millis(at_ms.saturating_sub(clock::boot_ms())));
            let tick = tick.unwrap_or(LIST_EVERY).min(LIST_EVERY);
            let tick = tick.min(self.until_expiry().unwrap_or(LIST_EVERY));
            tokio::select! {
                input = inputs.recv() => match input {
                    None => return,
                    Some(input) => {
                        let soon = self.take(input).await;
                        if soon {
                            next_list = tokio::time::Instant::now() + LIST_SOON;
                        }
                    }
                },
                Some(felt) = self.links.felt.recv() => self.feel(felt).await,
                () = tokio::time::sleep_until(next_look), if !self.looking && !self.runs.is_empty() => {
                    self.look();
                    next_look = tokio::time::Instant::now() + LOOK_EVERY;
                    continue;
                }
                () = tokio::time::sleep(tick) => self.step(Event::Tick).await,
                () = tokio::time::sleep_until(next_list) => {
                    self.order(Order::List);
                    next_list = tokio::time::Instant::now() + LIST_EVERY;
                }
            }
            let _ = self.end_what_does_not_hold();
            self.end_orphans().await;
            self.show();
        }
    }

    /// True when the launcher's list is wanted soon.
    async fn take(&mut self, input: Input) -> bool {
        match input {
            Input::Want { agent, wanted, answer } => {
                let result = self.want(agent, wanted).await;
                self.show();
                let _ = answer.send(result);
            }
            Input::Installed { row, answer } => {
                let actions = self.learn(*row, Past::default());
                self.act(actions).await;
                self.show();
                let _ = answer.send(Ok(()));
            }
            Input::Remove { agent, answer } => self.begin_removal(agent, answer).await,
            Input::Revoked { answer } => self.after_revocation(answer),
            Input::Renewed { agent, answer } => {
                self.renewed(agent).await;
                let _ = answer.send(Ok(()));
            }
            Input::ProcessEnded { run } => {
                self.ending.insert(run);
                self.order(Order::List);
            }
            Input::Answer(Answer::Started { agent, run, result }) => {
                return self.started(agent, run, result).await;
            }
            Input::Seen(seen) => self.see(seen).await,
            Input::Answer(Answer::NotLimited { agent, run }) => {
                self.step(of(agent, health::Event::NotThrottled { run })).await;
            }
            Input::Answer(Answer::Removed { agent, result }) => self.removed(agent, result).await,
            Input::Answer(Answer::Listed(Ok(listing))) => {
                self.links.board.clear("launcher");
                self.listed(listing).await;
                self.links.board.clear(START);
                return !self.ending.is_empty();
            }
            Input::Answer(Answer::Listed(Err(report))) => {
                self.links.board.set("launcher", Weight::Broken, report);
                self.links.board.clear(START);
                self.step(Event::LauncherLost).await;
                return true;
            }
        }
        false
    }

    fn learn(&mut self, row: AgentRow, past: Past) -> Vec<Action> {
        let mut actions = Vec::new();
        let agent = row.agent_id;
        let (manifest, package, problem) = match tokens::manifest_of(&row) {
            Ok((manifest, package)) => (Some(Arc::new(manifest)), package, None),
            // An agent that this version cannot read is shown and not started.
            Err(reports) => (None, Package::Installed, reports.into_iter().next()),
        };
        let mut problem = problem;
        if let Some(manifest) = &manifest {
            let (wanted, restart, restarts) = (row.wanted, manifest.restart, row.restarts);
            actions = self.decide(Event::Known { agent, wanted, restart, restarts, history: past.history });
            let phase = self.state.agents.get(&agent).map(|entry| entry.health.phase());
            if matches!(phase, Some(Phase::Quarantined { .. })) {
                problem = Some(quarantined(&row, past.exits.first()));
            }
        }
        self.links.inbox.know(agent, &past.waiting);
        let (refused, remove_after_boot_ms) = (false, 0);
        let exits = past.exits;
        let known = Known {
            row: Arc::new(row),
            manifest,
            package,
            exits,
            problem,
            refused,
            remove_after_boot_ms,
            kept: 0,
        };
        self.known.insert(agent, known);
        actions
    }

    async fn want(&mut self, agent: AgentId, wanted: bool) -> Result<(), Report> {
        let what = if wanted { "the agent was not started" } else { "the agent was not stopped" };
        let row = self.links.db.call(move |store| store.change_agent(agent, |row| row.wanted = wanted)).await;
        let row = row.map_err(|error| error.report(what))?;
        if let Some(known) = self.known.get_mut(&agent) {
            known.row = Arc::new(row);
            if known.manifest.is_none() {
                return Err(known.problem.clone().unwrap_or_else(|| unknown_agent(what)));
            }
            known.problem = None;
        }
        self.step(of(agent, health::Event::Want(wanted))).await;
        // A wish forgives, and is not to be forgotten with this agentd.
        self.keep_history(agent).await;
        Ok(())
    }

    async fn begin_removal(&mut self, agent: AgentId, answer: Done) {
        let stopped =
            self.links.db.call(move |store| store.change_agent(agent, |row| row.wanted = false)).await;
        if let Err(error) = stopped {
            let _ = answer.send(Err(error.report("the agent was not removed")));
            return;
        }
        self.removals.insert(agent, answer);
        if self.state.agents.contains_key(&agent) {
            self.step(Event::Remove { agent }).await;
        } else {
            self.remove_files(agent).await;
        }
    }

    async fn remove_files(&mut self, agent: AgentId) {
        let Some(known) = self.known.get(&agent) else { return };
        let uid = known.row.uid;
        self.links.memories.destroy(agent).await;
        self.order(Order::RemoveAgent { agent, uid });
    }

    async fn removed(&mut self, agent: AgentId, result: Result<(), Report>) {
        let result = match result {
            Ok(()) => self.forget(agent).await,
            Err(report) => {
                // It stays, stopped, so that its owner can try again.
                if let Some(known) = self.known.get_mut(&agent) {
                    Arc::make_mut(&mut known.row).wanted = false;
                    known.problem = Some(report.clone());
                    if let Some(manifest) = &known.manifest {
                        let (restart, restarts) = (manifest.restart, known.row.restarts);
                        let history = History::default();
                        self.decide(Event::Known { agent, wanted: false, restart, restarts, history });
                    }
                }
                Err(report)
            }
        };
        self.show();
        if let Some(answer) = self.removals.remove(&agent) {
            let _ = answer.send(result);
        }
    }

    async fn forget(&mut self, agent: AgentId) -> Result<(), Report> {
        let Some(known) = self.known.remove(&agent) else { return Ok(()) };
        self.links.board.clear(&place_of(agent));
        self.links.inbox.forget(agent);
        self.links.nerves.forget(agent);
        self.links.logs.forget(agent).await;
        let row = known.row;
        let forgotten = self.links.db.call(move |store| store.remove_agent(&row)).await;
        tracing::info!(agent_id = %agent, "an agent is removed");
        forgotten.map_err(|error| error.report("the agent was not forgotten"))
    }

    /// True when the launcher's list is wanted soon.
    async fn started(
        &mut self,
        agent: AgentId,
        run: RunId,
        result: Result<RunHandles, launcher::Failure>,
    ) -> bool {
        match result {
            Ok(handles) => {
                let held = self.standing(agent, run).await;
                self.attach(agent, run, handles, held);
                if let Some(known) = self.known.get_mut(&agent) {
                    known.problem = None;
                }
                self.step(of(agent, health::Event::Started { run })).await;
            }
            Err(failure) => {
                self.held.remove(&run);
                if failure.kind != FailureKind::Unsure {
                    self.free_device(run).await;
                }
                tracing::warn!(agent_id = %agent, run_id = %run, problem = %failure.report, "a run was not started");
                self.links.logs.say(agent, format!("not started: {}", failure.report));
                if let Some(known) = self.known.get_mut(&agent) {
                    known.problem = Some(failure.report.clone());
                }
                let why = match failure.kind {
                    FailureKind::NotAsked => NotStarted::NotAsked,
                    FailureKind::Unsure => NotStarted::Unsure,
                    FailureKind::Refused => NotStarted::Refused,
                };
                self.limits.remove(&run);
                self.step(of(agent, health::Event::NotStarted { run, why })).await;
                if why == NotStarted::NotAsked {
                    self.links.board.set("launcher", Weight::Broken, failure.report);
                    self.step(Event::LauncherLost).await;
                    return true;
                }
            }
        }
        false
    }

    /// Serves a run's API. Also for a run that is to be killed: its end must be seen.
    fn attach(&mut self, agent: AgentId, run: RunId, handles: RunHandles, held: Arc<Verified>) {
        let Some(manifest) = self.known.get(&agent).and_then(|known| known.manifest.clone()) else { return };
        let over = CancellationToken::new();
        let listed = self.unserved.remove(&run);
        let started_boot_ms = listed.as_ref().map_or_else(clock::boot_ms, |info| info.started_boot_ms);
        if let Some(limits) = listed.as_ref().and_then(|info| info.cgroup.clone()) {
            self.limits.insert(run, limits);
        }
        let (pid, over_of_run) = (handles.pid, over.clone());
        let attached = Attached {
            agent,
            pid,
            started_boot_ms,
            over: over_of_run,
            held: Arc::clone(&held),
            killed_boot_ms: None,
        };
        self.runs.insert(run, attached);
        tracing::info!(agent_id = %agent, run_id = %run, pid = handles.pid, "a run is served");
        self.links.logs.say(agent, format!("run {run} is served, process {}", handles.pid));
        let to_self = self.to_self.clone();
        let ended = Box::new(move || {
            // The loop may be busy or gone; a list will show the end as well.
            if let Some(to_self) = to_self.upgrade() {
                tokio::spawn(async move { to_self.send(Input::ProcessEnded { run }).await });
            }
        });
        (self.links.serve)(Serve { agent, run, manifest, held, handles, over, ended });
    }

    async fn listed(&mut self, listing: Listing) {
        match listing.problems.into_iter().next() {
            Some(report) => self.links.board.set("walls", Weight::Broken, report),
            None => self.links.board.clear("walls"),
        }
        for exit in listing.exits {
            self.enter_exit(exit).await;
        }
        self.unserved.clear();
        for info in &listing.runs {
            self.tell_forbidden(info.agent_id, info.run_id, info.forbidden.as_ref());
            match self.runs.get_mut(&info.run_id) {
                Some(attached) => attached.started_boot_ms = info.started_boot_ms,
                None => drop(self.unserved.insert(info.run_id, info.clone())),
            }
        }
        let living: BTreeSet<RunId> = listing.runs.iter().map(|info| info.run_id).collect();
        self.ending.retain(|run| living.contains(run));
        self.forbidden.retain(|run, _| living.contains(run));
        let gone: Vec<RunId> = self.runs.keys().filter(|run| !living.contains(run)).copied().collect();
        for run in gone {
            self.detach(run);
        }
        self.free_devices_but(&living).await;
        let runs = listing.runs.iter().map(|info| (info.run_id, info.agent_id)).collect();
        self.step(Event::Listed { runs }).await;
    }

    /// A wall held against a process of a run that lives on, or lived on then.
    fn tell_forbidden(&mut self, agent: AgentId, run: RunId, seen: Option<&Forbidden>) {
        let Some(seen) = seen else { return };
        let told = self.forbidden.insert(run, seen.processes).unwrap_or(0);
        let more = seen.processes.saturating_sub(told);
        if more == 0 {
            return;
        }
        let what = format!("seccomp killed {more} of its processes, the last for {}", seen.syscall);
        self.links.logs.say(agent, what);
        // A fork bomb of these is one line with a count there, and no more than that here.
        for _ in 0..more.min(FORBIDDEN_RECORDED_MOST) {
            self.links.audit.report(forbidden(agent, run, seen));
        }
    }

    /// Stores how a run ended, and only then lets the launcher forget it.
    async fn enter_exit(&mut self, exit: ExitRecord) {
        let (agent, run) = (exit.agent_id, exit.run_id);
        self.tell_forbidden(agent, run, exit.forbidden.as_ref());
        // Before the launcher forgets the run: twice recorded is better than not at all.
        if let Some(entry) = killed(&exit) {
            self.links.audit.record(entry).await;
        }
        let stored = exit.clone();
        let entered = self.links.db.call(move |store| store.end_run(&stored, clock::unix_ms())).await;
        if let Err(error) = entered {
            self.links.board.set("store", Weight::Broken, error.report("how a run ended was not stored"));
            return;
        }
        self.links.board.clear("store");
        self.detach(run);
        let told = told(&exit);
        tracing::info!(agent_id = %agent, run_id = %run, cause = %told, "a run ended");
        if let Some(known) = self.known.get_mut(&agent) {
            self.links.logs.say(agent, format!("run {run} ended: {told}"));
            // The answer to the start has said it better, unless that was to a former agentd.
            if let (ExitCause::WallFailed { why }, None) = (&exit.cause, &known.problem) {
                known.problem = Some(wall_failed(&known.row, why));
            }
            known.exits.insert(0, exit.clone());
            known.exits.truncate(EXITS_SHOWN);
        }
        self.limits.remove(&run);
        self.free_device(run).await;
        self.links.memories.end_run(agent, run);
        let (began_ms, ended_ms) = (exit.started_boot_ms, exit.ended_boot_ms);
        self.step(of(agent, health::Event::Ended { run, cause: exit.cause, began_ms, ended_ms })).await;
        self.after_child_s_end(agent).await;
        self.after_end(agent).await;
        // When it is counted too: a run's end that is told again counts once, one that was forgotten never.
        self.order(Order::Forget { run });
    }

    /// Says so when the end led into quarantine, and keeps the count of restarts.
    async fn after_end(&mut self, agent: AgentId) {
        let Some(entry) = self.state.agents.get(&agent) else { return };
        let phase = entry.health.phase();
        let Some(known) = self.known.get_mut(&agent) else { return };
        if matches!(phase, Phase::Quarantined { .. }) {
            let report = quarantined(&known.row, known.exits.first());
            self.links.logs.say(agent, report.to_string());
            known.problem = Some(report);
        }
        self.keep_history(agent).await;
    }

    fn detach(&mut self, run: RunId) {
        self.ending.remove(&run);
        if let Some(attached) = self.runs.remove(&run) {
            tracing::info!(agent_id = %attached.agent, run_id = %run, "a run is no longer served");
            attached.over.cancel();
        }
    }

    fn decide(&mut self, event: Event) -> Vec<Action> {
        let mut fresh_run = || RunId(clock::fresh_id());
        // The last bits of a UUIDv7 are random.
        let mut jitter = || (clock::fresh_id().as_u128() & 0xffff) as u16;
        let (boot_ms, unix_ms) = (clock::boot_ms(), clock::unix_ms());
        let mut now = Now { boot_ms, unix_ms, fresh_run: &mut fresh_run, jitter: &mut jitter };
        plan::step(&mut self.state, event, &mut now)
    }

    async fn step(&mut self, event: Event) {
        let actions = self.decide(event);
        self.act(actions).await;
    }

    async fn act(&mut self, actions: Vec<Action>) {
        let mut actions = VecDeque::from(actions);
        while let Some(action) = actions.pop_front() {
            match action {
                Action::For { agent, effect: Effect::Start { run } } => {
                    match self.planned(agent, run).await {
                        Ok((plan, quota)) => {
                            self.limits.insert(run, plan.cgroup.clone());
                            self.order(Order::Start { agent, run, plan: Box::new(plan), quota });
                        }
                        Err(report) => {
                            let refused = self.refused(agent, run, report);
                            actions.extend(self.decide(refused));
                        }
                    }
                }
                Action::For { agent, effect } => self.effect(agent, effect),
                Action::Kill { run, grace_ms } => {
                    self.order(Order::Kill { run, grace_ms, why: KillReason::Order });
                }
                Action::List => self.order(Order::List),
                Action::Remove { agent } => self.remove_files(agent).await,
            }
        }
    }

    fn effect(&self, agent: AgentId, effect: Effect) {
        match effect {
            Effect::Adopt { run } => self.order(Order::Adopt { agent, run }),
            Effect::Kill { run, grace_ms, why } => self.order(Order::Kill { run, grace_ms, why }),
            Effect::Limit { run, throttle } => {
                if let Some(limits) = self.limits.get(&run) {
                    self.order(Order::Limit { agent, run, limits: throttle.within(limits) });
                }
            }
            Effect::Tell(notice) => {
                tracing::info!(agent_id = %agent, about = notice.about.name(), told = %notice.brief, "an agent's health");
                self.links.logs.say(agent, notice.text.clone());
                let run = self.state.agents.get(&agent).and_then(|entry| entry.health.phase().run());
                self.links.audit.report(noted(agent, run, &notice));
            }
            // Done by `act`, and an action of its own.
            Effect::Start { .. } | Effect::List => {}
        }
    }

    /// Asks for readings of all runs that are served.
    fn look(&mut self) {
        let look = self.runs.iter().map(|(run, attached)| (attached.agent, *run)).collect();
        self.looking = self.looks.try_send(look).is_ok();
    }

    async fn see(&mut self, seen: Seen) {
        self.looking = false;
        for (agent, run, mut reading) in seen {
            reading.pulse = self.links.nerves.beat(agent).pulse(self.links.inbox.work(agent));
            let (pids, most) =
                (u64::from(reading.pids), self.limits.get(&run).map_or(0, |l| u64::from(l.pids_max)));
            self.step(of(agent, health::Event::Read { run, reading: Box::new(reading) })).await;
            // Of a few processes one is much; what has room for a crowd is told when it is nearly there.
            if most >= CROWD_PIDS {
                let name = "processes".to_owned();
                let renewal = Renewal::WhenFreed;
                self.step(of(agent, health::Event::Budget { name, used: pids, most, renewal })).await;
            }
            self.keep_history(agent).await;
            if let (Some(entry), Some(known)) = (self.state.agents.get(&agent), self.known.get(&agent)) {
                let limits =
                    known.manifest.as_ref().map(|manifest| manifest.limits.clone()).unwrap_or_default();
                self.links.nerves.show(agent, self_health(&entry.health, limits, clock::boot_ms()));
            }
        }
    }

    async fn feel(&mut self, felt: Felt) {
        match felt {
            Felt::Hurt { agent, pain } => {
                self.step(of(agent, health::Event::Hurt(pain))).await;
                self.keep_history(agent).await;
            }
            Felt::Spent { agent, name, used, most } => {
                let renewal = Renewal::EachDay;
                self.step(of(agent, health::Event::Budget { name, used, most, renewal })).await;
                self.keep_history(agent).await;
            }
        }
    }

    /// Stores what is new of an agent's history.
    async fn keep_history(&mut self, agent: AgentId) {
        let Some(entry) = self.state.agents.get(&agent) else { return };
        let (version, history) = (entry.health.pains().version(), entry.health.pains().history());
        let restarts = entry.health.restarts();
        let Some(known) = self.known.get_mut(&agent).filter(|known| known.kept != version) else { return };
        known.kept = version;
        Arc::make_mut(&mut known.row).restarts = restarts;
        let history = history.clone();
        let kept = self.links.db.call(move |store| store.set_health(agent, history, restarts)).await;
        if let Err(error) = kept {
            self.links.board.set("store", Weight::Broken, error.report("an agent's health was not kept"));
        }
    }

    fn order(&self, order: Order) {
        // The thread ends only with the loop itself.
        let _ = self.orders.send(order);
    }

    /// An agent that does not do what its owner wants, or that hurts, is a problem; one that has no walls makes the
    /// health red.
    fn show_problem(&self, agent: AgentId, known: &Known) {
        let health = self.state.agents.get(&agent).map(|entry| &entry.health);
        let weight = match (health.map(Health::phase), &known.problem) {
            (Some(Phase::Refused { .. }), Some(report)) if is_about_walls(report) => Weight::Broken,
            (Some(Phase::Refused { .. } | Phase::Quarantined { .. }) | None, Some(_)) => Weight::Degraded,
            _ => {
                let hurt = health.and_then(|health| hurting(&known.row, health, clock::unix_ms()));
                return match hurt {
                    Some(report) => self.links.board.set(&place_of(agent), Weight::Degraded, report),
                    None => self.links.board.clear(&place_of(agent)),
                };
            }
        };
        if let Some(report) = &known.problem {
            self.links.board.set(&place_of(agent), weight, report.clone());
        }
    }

    fn show(&self) {
        for (agent, known) in &self.known {
            self.show_problem(*agent, known);
        }
        let view = |(agent, known): (&AgentId, &Known)| {
            let entry = self.state.agents.get(agent);
            let run = entry.and_then(|entry| entry.health.phase().run()).and_then(|run_id| {
                let attached = self.runs.get(&run_id)?;
                Some(LivingRun { run_id, pid: attached.pid, started_boot_ms: attached.started_boot_ms })
            });
            let state = match (entry, &known.manifest) {
                (Some(entry), _) => entry.health.state(),
                (None, None) => AgentState::Refused,
                (None, Some(_)) => AgentState::Stopped,
            };
            let view = View {
                row: known.row.clone(),
                manifest: known.manifest.clone(),
                state,
                run,
                restarts: entry.map_or(known.row.restarts, |entry| entry.health.restarts()),
                health: shown_health(
                    entry.map(|entry| &entry.health),
                    &known.exits,
                    clock::boot_ms(),
                    clock::unix_ms(),
                ),
                last_exit: known.exits.first().cloned(),
                problem: known.problem.clone(),
            };
            (*agent, view)
        };
        self.shown.send_replace(Arc::new(self.known.iter().map(view).collect()));
    }
}

fn of(agent: AgentId, event: health::Event) -> Event {
    Event::Of { agent, event }
}

#[cfg(test)]
mod tests;
