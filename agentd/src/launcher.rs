//! How does the agents' loop talk to the launcher without waiting for it?
//!
//! Owns:  one thread that takes orders in turn and puts the answers into the loop's channel.
//! Always: answers come in the order of the orders. A list therefore knows every start that was ordered before it,
//!         on which the loop's decisions rely (`agents::plan`).
//! Source: the launcher is one thread itself (`agentd_sandbox`), so taking turns costs nothing.

use agentd_domain::fault::Report;
use agentd_domain::ids::{AgentId, RunId};
use agentd_domain::launcher::{KillReason, Listing};
use agentd_domain::plan::{CgroupLimits, DiskQuota, SandboxPlan};
use agentd_sandbox::client::{Launcher, LauncherError, RunHandles};
use std::io;
use std::sync::mpsc;

#[derive(Debug)]
pub enum Order {
    Start {
        agent: AgentId,
        run: RunId,
        plan: Box<SandboxPlan>,
        quota: DiskQuota,
    },
    Adopt {
        agent: AgentId,
        run: RunId,
    },
    Kill {
        run: RunId,
        grace_ms: u32,
        why: KillReason,
    },
    /// New limits for a run, within its plan.
    Limit {
        agent: AgentId,
        run: RunId,
        limits: CgroupLimits,
    },
    RemoveAgent {
        agent: AgentId,
        uid: u32,
    },
    Forget {
        run: RunId,
    },
    List,
}

#[derive(Debug)]
pub enum Answer {
    Started {
        agent: AgentId,
        run: RunId,
        result: Result<RunHandles, Failure>,
    },
    Removed {
        agent: AgentId,
        result: Result<(), Report>,
    },
    /// Limits that were not set.
    NotLimited {
        agent: AgentId,
        run: RunId,
    },
    Listed(Result<Listing, Report>),
}

/// Why a run was not started, and whether it may live all the same.
#[derive(Debug)]
pub struct Failure {
    pub kind: FailureKind,
    pub report: Report,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    NotAsked,
    Unsure,
    Refused,
}

/// Starts the thread. `tell` may block; when it says false, nobody listens any more and the thread ends.
pub fn start(
    launcher: Launcher,
    tell: impl Fn(Answer) -> bool + Send + 'static,
) -> io::Result<mpsc::Sender<Order>> {
    let (orders, queue) = mpsc::channel();
    std::thread::Builder::new().name("launcher-calls".to_owned()).stack_size(512 * 1024).spawn(
        move || {
            while let Ok(order) = queue.recv() {
                let Some(answer) = obey(&launcher, order) else { continue };
                if !tell(answer) {
                    return;
                }
            }
        },
    )?;
    Ok(orders)
}

fn obey(launcher: &Launcher, order: Order) -> Option<Answer> {
    match order {
        Order::Start { agent, run, plan, quota } => {
            // Making the folder again changes nothing, and repairs one that a power cut has left half made.
            let prepared = launcher.prepare_agent(agent, plan.uid, quota).map_err(|error| match error {
                // Nothing of the run was asked for yet.
                LauncherError::Broken(_) | LauncherError::Unexpected(_) => {
                    Failure { kind: FailureKind::NotAsked, report: error.into() }
                }
                other => failure(other),
            });
            let result = prepared.and_then(|()| launcher.start(run, *plan).map_err(failure));
            Some(Answer::Started { agent, run, result })
        }
        Order::Adopt { agent, run } => {
            Some(Answer::Started { agent, run, result: launcher.handover(run).map_err(failure) })
        }
        Order::RemoveAgent { agent, uid } => {
            Some(Answer::Removed { agent, result: launcher.remove_agent(agent, uid).map_err(Report::from) })
        }
        Order::List => Some(Answer::Listed(launcher.list().map_err(Report::from))),
        // Lost orders to kill or to forget are given again after the next list.
        Order::Kill { run, grace_ms, why } => {
            if let Err(error) = launcher.kill_for(run, grace_ms, why) {
                tracing::warn!(run_id = %run, %error, "a run was not killed yet");
            }
            None
        }
        Order::Limit { agent, run, limits } => match launcher.change_limits(run, limits) {
            Ok(()) => None,
            // It may have ended this moment; otherwise the next reading orders them again.
            Err(error) => {
                tracing::warn!(run_id = %run, %error, "a run's limits were not changed yet");
                Some(Answer::NotLimited { agent, run })
            }
        },
        Order::Forget { run } => {
            if let Err(error) = launcher.forget_exit(run) {
                tracing::warn!(run_id = %run, %error, "an exit record was not dropped yet");
            }
            None
        }
    }
}

fn failure(error: LauncherError) -> Failure {
    let kind = match &error {
        LauncherError::Refused(_) => FailureKind::Refused,
        LauncherError::Unreachable { .. } => FailureKind::NotAsked,
        LauncherError::Broken(_) | LauncherError::Unexpected(_) => FailureKind::Unsure,
    };
    Failure { kind, report: error.into() }
}
