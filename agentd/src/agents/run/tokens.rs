//! What does a token's state do to the agents' loop?
//!
//! Always: a run is started from its agent's verified token and nothing else; one whose token was revoked, or is over
//!         its time, is killed without grace, and a child ends with its parent. The walls know no clock, so this
//!         loop ends what they would let live.

use super::{Done, Loop, of};
use crate::agents::plan::Event;
use crate::clock;
use crate::store::AgentRow;
use crate::tokens::nothing;
use agentd_capability::{Package, Subject, compile_with, give, parse_manifest, quota_with};
use agentd_domain::audit::{Actor, Entry, Verdict};
use agentd_domain::fault::Report;
use agentd_domain::health::{self, NotStarted, Phase};
use agentd_domain::ids::{AgentId, RunId};
use agentd_domain::manifest::{Manifest, Restart};
use agentd_domain::plan::{DiskQuota, SandboxPlan};
use agentd_domain::token::Verified;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// A kill that did not reach the launcher is ordered again.
const KILL_AGAIN_MS: u64 = 2_000;
/// So is a removal that failed.
const REMOVE_AGAIN_MS: u64 = 30_000;

/// The manifest of an agent. A child has its parent's, under a name of its own, and is not started again when it has
/// ended: it is a task that its parent has given.
pub(super) fn manifest_of(row: &AgentRow) -> Result<(Manifest, Package), Vec<Report>> {
    let mut manifest = parse_manifest(&row.manifest)?;
    let package =
        if row.bundled { Package::Builtin { folder: manifest.name.to_string() } } else { Package::Installed };
    if row.parent.is_some() {
        manifest.name = row.name.clone();
        manifest.restart = Restart::Never;
        manifest.exec.extend(row.arguments.iter().cloned());
    }
    Ok((manifest, package))
}

impl Loop {
    /// What the kernel is to enforce, from the agent's token as it is now.
    pub(super) async fn planned(
        &mut self,
        agent: AgentId,
        run: RunId,
    ) -> Result<(SandboxPlan, DiskQuota), Report> {
        let held = self.links.tokens.of(agent).await?;
        let known = self.known.get(&agent).and_then(|known| Some((known, known.manifest.clone()?)));
        let Some((known, manifest)) = known else { return Err(super::unknown_agent("no run is started")) };
        let subject = Subject { agent_id: agent, uid: known.row.uid, package: known.package.clone() };
        let plan = compile_with(&manifest, &held.rights, &subject)?;
        let plan = self.with_device(agent, run, plan).await?;
        let quota = quota_with(&held.rights);
        self.held.insert(run, Arc::new(held));
        Ok((plan, quota))
    }

    /// The same plan with a device, where one is wanted and there is one that it may have.
    async fn with_device(
        &mut self,
        agent: AgentId,
        run: RunId,
        plan: SandboxPlan,
    ) -> Result<SandboxPlan, Report> {
        let Some(wish) = &plan.device else { return Ok(plan) };
        let (gpu, asked) = (self.links.gpu.clone(), wish.memory_bytes);
        let leased = tokio::task::spawn_blocking(move || gpu.lease(agent, run, asked)).await;
        let given = leased.map_err(|error| crate::appliance::thread_lost(&error.to_string()))??;
        let entry = Entry::new(Actor::Appliance, "device.lease", Verdict::Allowed).of_run(agent, run);
        let held = given.limit().map_or_else(
            || "as a whole".to_owned(),
            |limit| format!("{} bytes ({})", limit.bytes, limit.by.enforcement().name()),
        );
        self.links.audit.report(entry.detail(&format!(
            "{} {held}: {}",
            given.device,
            given.nodes.join(", ")
        )));
        let plan = give(plan, given);
        if plan.is_err() {
            self.free_device(run).await;
        }
        plan
    }

    /// Its run is over, or never was.
    pub(super) async fn free_device(&mut self, run: RunId) {
        if self.links.gpu.has_leases() {
            let gpu = self.links.gpu.clone();
            // It cannot fail but by a panic, which is in the log already.
            let _ = tokio::task::spawn_blocking(move || gpu.release(run)).await;
        }
    }

    /// After the launcher's list: no other run lives, but for those that were ordered and are not served yet.
    pub(super) async fn free_devices_but(&mut self, living: &BTreeSet<RunId>) {
        if self.links.gpu.has_leases() {
            let (gpu, mut living) = (self.links.gpu.clone(), living.clone());
            living.extend(self.held.keys());
            let work = move || gpu.release_others(&|run| living.contains(&run));
            let _ = tokio::task::spawn_blocking(work).await;
        }
    }

    /// A run that was not asked for, because its token gives none.
    pub(super) fn refused(&mut self, agent: AgentId, run: RunId, report: Report) -> Event {
        tracing::warn!(agent_id = %agent, run_id = %run, problem = %report, "a run was not started");
        let entry = Entry::new(Actor::Appliance, "run.start", Verdict::Denied).of_run(agent, run);
        self.links.audit.report(entry.detail(&format!("{}: {}", report.code, report.why)));
        self.links.logs.say(agent, format!("not started: {report}"));
        if let Some(known) = self.known.get_mut(&agent) {
            known.refused = true;
            known.problem = Some(Report { what: "the agent was not started".to_owned(), ..report });
        }
        of(agent, health::Event::NotStarted { run, why: NotStarted::Refused })
    }

    /// The standing of a run that lives: what its token gave at its start, and for one that outlived an agentd what
    /// its agent's token gives now, within what the run was started with.
    pub(super) async fn standing(&mut self, agent: AgentId, run: RunId) -> Arc<Verified> {
        if let Some(held) = self.held.remove(&run) {
            return held;
        }
        match self.links.tokens.of(agent).await {
            Ok(mut held) => {
                if let Some(info) = self.unserved.get(&run) {
                    held.rights.api.retain(|right| info.api.contains(right));
                }
                Arc::new(held)
            }
            Err(report) => {
                tracing::warn!(agent_id = %agent, run_id = %run, problem = %report, "a run's token does not hold");
                Arc::new(nothing(agent))
            }
        }
    }

    /// Kills all runs whose token does not hold any more. The handles are the orders to the launcher.
    pub(super) fn end_what_does_not_hold(&mut self) -> Vec<(AgentId, JoinHandle<()>)> {
        let now_ms = clock::boot_ms();
        let mut ended = Vec::new();
        for (run, attached) in &mut self.runs {
            let Err(report) = self.links.tokens.in_force(&attached.held) else { continue };
            if attached.killed_boot_ms.is_some_and(|at| now_ms < at + KILL_AGAIN_MS) {
                continue;
            }
            if attached.killed_boot_ms.replace(now_ms).is_none() {
                let entry = Entry::new(Actor::Appliance, "token.end", Verdict::Killed);
                let entry = entry.of_run(attached.agent, *run);
                self.links.audit.report(entry.detail(&format!("{}: {}", report.code, report.why)));
                self.links.logs.say(attached.agent, format!("run {run} is ended: {report}"));
                if let Some(known) = self.known.get_mut(&attached.agent) {
                    known.problem = Some(Report { what: "the agent's run was ended".to_owned(), ..report });
                }
            }
            let (launcher, run) = (self.links.launcher.clone(), *run);
            let order = tokio::task::spawn_blocking(move || {
                if let Err(error) = launcher.kill(run, 0) {
                    tracing::warn!(run_id = %run, %error, "a run was not killed yet");
                }
            });
            ended.push((attached.agent, order));
        }
        ended
    }

    /// Answers when the launcher has been told, so that what is acknowledged is being killed already.
    pub(super) fn after_revocation(&mut self, answer: oneshot::Sender<Vec<AgentId>>) {
        let ended = self.end_what_does_not_hold();
        tokio::spawn(async move {
            let mut agents = Vec::new();
            for (agent, order) in ended {
                let _ = order.await;
                agents.push(agent);
            }
            let _ = answer.send(agents);
        });
    }

    /// How long until the first run's token is over.
    pub(super) fn until_expiry(&self) -> Option<Duration> {
        let now_ms = clock::unix_ms();
        let left = |end_s: i64| end_s.saturating_mul(1000).saturating_sub(now_ms).max(0);
        let runs = self.runs.values().filter(|attached| attached.killed_boot_ms.is_none());
        let first = runs.filter_map(|attached| attached.held.expires_unix_s).min()?;
        Some(Duration::from_millis(u64::try_from(left(first)).unwrap_or(0)))
    }

    /// An agent has another token: what it waits for may be over.
    pub(super) async fn renewed(&mut self, agent: AgentId) {
        let _ = self.end_what_does_not_hold();
        if let Some(known) = self.known.get_mut(&agent) {
            known.refused = false;
        }
        let entry = self.state.agents.get(&agent);
        if entry.is_some_and(|entry| {
            entry.health.wanted() && matches!(entry.health.phase(), Phase::Refused { .. })
        }) {
            self.step(of(agent, health::Event::Want(true))).await;
        }
    }

    /// Children whose parent is gone, at rest or being removed, or whose own token holds no more.
    pub(super) async fn end_orphans(&mut self) {
        let now_ms = clock::boot_ms();
        let orphans: Vec<AgentId> = self
            .known
            .iter()
            .filter(|(agent, known)| {
                let orphaned = known.row.parent.is_some_and(|parent| self.is_over(parent));
                let child = known.row.parent.is_some();
                child
                    && (orphaned || known.refused)
                    && !self.removals.contains_key(agent)
                    && now_ms >= known.remove_after_boot_ms
            })
            .map(|(agent, _)| *agent)
            .collect();
        for agent in orphans {
            tracing::info!(agent_id = %agent, "a child ends with its parent, or with its token");
            if let Some(known) = self.known.get_mut(&agent) {
                known.remove_after_boot_ms = now_ms + REMOVE_AGAIN_MS;
                let entry = Entry::new(Actor::Appliance, "agent.remove", Verdict::Allowed).of_agent(agent);
                self.links
                    .audit
                    .report(entry.detail(&format!("{}: its parent or its token has ended", known.row.name)));
            }
            let (answer, _nobody_waits): (Done, _) = oneshot::channel();
            Box::pin(self.begin_removal(agent, answer)).await;
        }
    }

    fn is_over(&self, parent: AgentId) -> bool {
        let phase = self.state.agents.get(&parent).map(|entry| entry.health.phase());
        self.removals.contains_key(&parent)
            || matches!(
                phase,
                None | Some(Phase::Stopped | Phase::Quarantined { .. } | Phase::Refused { .. })
            )
    }

    /// A child that has done its work is not started again when agentd is.
    pub(super) async fn after_child_s_end(&mut self, agent: AgentId) {
        let stopped =
            self.state.agents.get(&agent).is_some_and(|entry| entry.health.phase() == Phase::Stopped);
        let Some(known) = self.known.get_mut(&agent) else { return };
        if !stopped || !known.row.wanted || known.row.parent.is_none() {
            return;
        }
        Arc::make_mut(&mut known.row).wanted = false;
        let stored =
            self.links.db.call(move |store| store.change_agent(agent, |row| row.wanted = false)).await;
        if let Err(error) = stored {
            tracing::warn!(agent_id = %agent, %error, "that a child has ended was not stored");
        }
    }
}
