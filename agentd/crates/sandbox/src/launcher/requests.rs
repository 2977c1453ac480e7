//! What does each request of agentd come to?
//!
//! In:     one [`Request`] of a client whose uid was checked. Out: its answer, now or when a run or a removal is done.
//! Always: every value of a request passes [`check`] before anything is done with it.

use super::device_limits;
use super::engines::{self, Engine};
use super::runs::{Phase, Run};
use super::server::{ENGINES_MAX, GRACE_MAX_MS, LISTING_BYTES, RUNS_MAX, Server, Source, Waits, watch};
use super::volumes::{self, Removal};
use super::{broken, refused};
use crate::{check, wire};
use agentd_domain::fault::Report;
use agentd_domain::ids::{AgentId, RunId};
use agentd_domain::launcher::{EngineSpec, Listing, Request, Response};
use agentd_domain::nodes::Given;
use agentd_domain::plan::SandboxPlan;
use std::os::fd::AsFd;

impl Server {
    pub(super) fn obey(&mut self, token: u64, request: Request) {
        let response = match request {
            Request::Start { run_id, plan } => return self.start(token, run_id, *plan),
            Request::RemoveAgent { agent_id, uid } => return self.remove_agent(token, agent_id, uid),
            Request::Handover { run_id } => return self.hand_over(token, run_id),
            Request::StartCall { run_id, call } => return self.start_call(token, run_id, &call),
            Request::StartEngine(spec) => self.start_engine(spec),
            Request::List { after } => {
                self.kernel_log.read_on();
                Ok(Response::Listing(self.listing(after)))
            }
            other => self.change(other).map(|()| Response::Done),
        };
        self.respond(token, &response.unwrap_or_else(Response::Refused));
    }

    /// Requests that are answered by `Done`.
    fn change(&mut self, request: Request) -> Result<(), Report> {
        match request {
            Request::StopEngine { set } => self.stop_engine(&set),
            Request::ChangeLimits { run_id, cgroup } => {
                let run = self.runs.get(&run_id).ok_or_else(|| unknown(run_id))?;
                check::check_within(&cgroup, &run.plan.cgroup)?;
                // Its plan's own limits are still being set.
                if let Phase::Raising { .. } = run.phase {
                    return Err(not_started(run_id));
                }
                self.hierarchy.change_limits(&run.group, &cgroup)
            }
            Request::Freeze { run_id } => self.freeze(run_id, true),
            Request::Thaw { run_id } => self.freeze(run_id, false),
            Request::Kill { run_id, grace_ms, why } => {
                let run = self.runs.get_mut(&run_id).ok_or_else(|| unknown(run_id))?;
                run.stop(u64::from(grace_ms.min(GRACE_MAX_MS)), why);
                Ok(())
            }
            Request::PrepareAgent { agent_id, uid, quota } => {
                check::check_uid(uid)?;
                check::check_quota(quota)?;
                volumes::prepare(&self.options, agent_id, uid, quota)
            }
            Request::ForgetExit { run_id } => self.records.forget(run_id).map_err(|error| {
                broken("record_failed", format!("the record of run {run_id}: {error}"), "try again")
            }),
            Request::Start { .. }
            | Request::RemoveAgent { .. }
            | Request::Handover { .. }
            | Request::StartCall { .. }
            | Request::StartEngine(_)
            | Request::List { .. } => Err(Report::bug(
                "launcher_dispatch",
                "the launcher did not do it",
                "a request took a wrong turn",
                "report this",
            )),
        }
    }

    fn start(&mut self, token: u64, run_id: RunId, plan: SandboxPlan) {
        match self.try_start(run_id, plan) {
            Ok(()) => self.wait(token, Waits::ForRun(run_id)),
            Err(report) => self.respond(token, &Response::Refused(report)),
        }
    }

    fn try_start(&mut self, run_id: RunId, plan: SandboxPlan) -> Result<(), Report> {
        check::check(&plan)?;
        if let Some(problem) = self.problems.first() {
            // Fail closed: not one run without all walls.
            return Err(problem.clone());
        }
        if self.runs.contains_key(&run_id) || self.records.kept.contains_key(&run_id) {
            return Err(refused(
                "conflict",
                format!("run {run_id} exists already"),
                "every run has an id of its own",
            ));
        }
        if self.stopping || self.runs.len() >= RUNS_MAX {
            return Err(broken("launcher_full", "no more runs are taken", "stop an agent first"));
        }
        if self.removals.iter().any(|removal| removal.agent_id == plan.agent_id) {
            return Err(refused("conflict", "this agent is being removed", "install it again"));
        }
        volumes::verify(&self.options, plan.agent_id, plan.uid)?;
        if let Some(given) = plan.device.as_ref().and_then(|wish| wish.given.as_ref()) {
            self.is_free(given)?;
        }
        self.kernel_log.begin(plan.uid);
        let run = Run::start(&self.options, &self.hierarchy, run_id, plan)?;
        let token = self.next_token;
        self.next_token += 1;
        let watched = watch(&self.epoll, run.control.as_fd(), token);
        self.sources.insert(token, Source::Jail(run_id));
        let run = self.runs.entry(run_id).or_insert(run);
        if watched.is_err() {
            run.kill_now();
        }
        Ok(())
    }

    /// Nobody else has what the run is to have for itself: no engine may open it, no other run has been given it.
    fn is_free(&self, given: &Given) -> Result<(), Report> {
        for path in given.exclusive() {
            if let Some(set) = self.engines.values().find(|engine| !engine.hides(path)).map(Engine::set) {
                let why = format!("the engine {set} may open {path}");
                return Err(refused("device_in_use", why, "start the engine without it first"));
            }
            if let Some(other) = self.runs.values().find(|run| run.has_node(path)) {
                let why = format!("{path} is given to a run of agent {}", other.plan.agent_id);
                return Err(refused("device_in_use", why, "stop that agent first"));
            }
        }
        // A device that is another's alone is nobody's in part.
        let taken = self.runs.values().find(|run| given.nodes.iter().any(|path| run.has_exclusive(path)));
        match taken {
            Some(other) => {
                let why = format!("the device is given to agent {} alone", other.plan.agent_id);
                Err(refused("device_in_use", why, "stop that agent first"))
            }
            None => Ok(()),
        }
    }

    /// No run has for itself what this engine could open.
    fn hides_what_is_given(&self, spec: &EngineSpec) -> Result<(), Report> {
        let open = |run: &&Run| run.exclusive_nodes().any(|path| !spec.hidden.contains(path));
        match self.runs.values().find(open) {
            None => Ok(()),
            Some(run) => {
                let why = format!("a device is given to agent {} alone", run.plan.agent_id);
                Err(refused("device_in_use", why, "start the engine without it"))
            }
        }
    }

    fn hand_over(&mut self, token: u64, run_id: RunId) {
        let Some((run, fds)) = self.runs.get(&run_id).and_then(|run| Some((run, run.handover()?))) else {
            return self.respond(token, &Response::Refused(unknown(run_id)));
        };
        let (pid, network) = (run.pid.as_raw_nonzero().get(), run.plan.network.clone());
        let response = Response::HandedOver { pid, network };
        let sent = self.clients.get(&token).map(|client| wire::send(client.socket.as_fd(), &response, &fds));
        self.answered(token, matches!(sent, Some(Ok(()))));
    }

    fn freeze(&mut self, run_id: RunId, frozen: bool) -> Result<(), Report> {
        let run = self.runs.get_mut(&run_id).ok_or_else(|| unknown(run_id))?;
        if let Phase::Raising { .. } = run.phase {
            return Err(not_started(run_id));
        }
        run.group.freeze(frozen)?;
        run.frozen = frozen;
        Ok(())
    }

    fn start_engine(&mut self, spec: EngineSpec) -> Result<Response, Report> {
        check::check_engine_set(&spec.set)?;
        device_limits::check(&spec.device_limits)?;
        check::check_hidden(&spec.hidden)?;
        self.hides_what_is_given(&spec)?;
        if spec.memory_max_bytes < engines::MEMORY_MIN_BYTES {
            let why = format!("{} bytes hold no engine", spec.memory_max_bytes);
            return Err(refused("plan_refused", why, "give it at least 64 MiB"));
        }
        if let Some(problem) = self.problems.first() {
            return Err(problem.clone());
        }
        if self.stopping {
            return Err(broken("launcher_full", "no more engines are taken", "wait for the restart"));
        }
        let started = |engine: &Engine| Response::EngineStarted {
            pid: engine.pid().map_or(0, |pid| pid.as_raw_nonzero().get()),
        };
        if let Some(engine) = self.engines.get_mut(&spec.set) {
            engine.again(&self.options, &self.hierarchy, spec)?;
            return Ok(started(engine));
        }
        if self.engines.len() >= ENGINES_MAX {
            return Err(broken("launcher_full", "there are too many engines", "stop one first"));
        }
        let set = spec.set.clone();
        let engine = Engine::start(&self.options, &self.hierarchy, spec, &mut self.buried_engines)?;
        let response = started(&engine);
        self.engines.insert(set, engine);
        Ok(response)
    }

    fn stop_engine(&mut self, set: &str) -> Result<(), Report> {
        let Some(mut engine) = self.engines.remove(set) else {
            return Err(refused(
                "not_found",
                format!("there is no engine `{}`", set.escape_debug()),
                "`agentctl status` lists engines",
            ));
        };
        engine.stop();
        self.buried_engines.extend(engine.into_groups(&self.options));
        Ok(())
    }

    fn remove_agent(&mut self, token: u64, agent_id: AgentId, uid: u32) {
        match self.try_remove_agent(agent_id, uid) {
            Ok(Some(removal)) => {
                self.removals.push_back(removal);
                self.wait(token, Waits::ForRemoval(agent_id));
            }
            Ok(None) => self.respond(token, &Response::Done),
            Err(report) => self.respond(token, &Response::Refused(report)),
        }
    }

    fn try_remove_agent(&mut self, agent_id: AgentId, uid: u32) -> Result<Option<Removal>, Report> {
        check::check_uid(uid)?;
        if self.runs.values().any(|run| run.plan.agent_id == agent_id) {
            return Err(refused("conflict", format!("agent {agent_id} is running"), "stop it first"));
        }
        if self.removals.iter().any(|removal| removal.agent_id == agent_id) {
            return Err(refused("conflict", format!("agent {agent_id} is being removed"), "wait for it"));
        }
        Removal::begin(&self.options, agent_id, uid)
    }

    fn listing(&self, after: Option<RunId>) -> Listing {
        let mut listing = Listing::default();
        if after.is_none() {
            listing.engines = self.engines.values().map(Engine::info).collect();
            listing.problems = self.problems.clone();
        }
        let size = |listing: &Listing| serde_json::to_vec(listing).map_or(0, |bytes| bytes.len());
        let mut bytes = size(&listing);
        let mut ids: Vec<RunId> = self.runs.keys().chain(self.records.kept.keys()).copied().collect();
        ids.sort_unstable();
        let mut last = after;
        for id in ids.into_iter().filter(|id| after.is_none_or(|after| *id > after)) {
            if bytes > LISTING_BYTES {
                listing.next = last;
                break;
            }
            let mut one = Listing::default();
            one.runs.extend(self.runs.get(&id).map(|run| run.info(&self.kernel_log)));
            one.exits.extend(self.records.kept.get(&id).cloned());
            bytes += size(&one);
            listing.runs.append(&mut one.runs);
            listing.exits.append(&mut one.exits);
            last = Some(id);
        }
        listing
    }
}

fn not_started(run_id: RunId) -> Report {
    refused("conflict", format!("run {run_id} has not started yet"), "wait for its start")
}

pub(super) fn unknown(run_id: RunId) -> Report {
    refused("not_found", format!("no run {run_id} is alive here"), "`agentctl agent ls` lists runs")
}
