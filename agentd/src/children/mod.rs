//! How does an agent get children?
//!
//! A child is an agent of its own: its own id, user id, volume and memory, with its parent's program and a token that
//! the appliance has narrowed and handed on to it. It ends with its parent (`agents/run/tokens.rs`).
//! In:    a parent that was allowed to ask (`agents.start`). Out: a child that is being started.
//! Always: one start at a time, so that no two of them share what only one may have; a start that came to nothing
//!         leaves nothing; the same `Idempotency-Key` is the same child.

mod plan;

use crate::agents::{Agents, View, package};
use crate::audit::Audit;
use crate::clock;
use crate::store::{AgentRow, Db, Kept};
use crate::tokens::Tokens;
use agentd_capability::quota_with;
use agentd_capability::token::genuine;
use agentd_domain::agent_api::{Child, StartChild};
use agentd_domain::audit::{Actor, Entry, Verdict};
use agentd_domain::fault::Report;
use agentd_domain::ids::{AgentId, AgentName, RunId};
use agentd_domain::plan::ceiling;
use agentd_domain::rights::Rights;
use agentd_sandbox::client::Launcher;
use plan::{Against, Starts};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use tokio::sync::Mutex;

const WHAT: &str = "no child was started";
/// Where an answer to the same key lies, as the other answers that are kept.
const PLACE: &str = "POST /agent/v1/agents";

/// What is needed of the world.
pub struct Links {
    pub db: Db,
    pub tokens: Tokens,
    pub audit: Audit,
    pub launcher: Launcher,
    /// Of all agents' folders.
    pub folder: PathBuf,
}

/// Who asks, with the token that counts.
pub struct Parent {
    pub agent: AgentId,
    pub run: RunId,
    /// A narrower token than its own that it has shown with the request.
    pub shown: Option<Arc<str>>,
}

/// For the agents' API. Cheap to clone.
#[derive(Clone)]
pub struct Children(Arc<Inner>);

struct Inner {
    links: Links,
    agents: OnceLock<Agents>,
    /// Held during a start. The first agent of a family to its starts.
    turn: Mutex<HashMap<AgentId, Starts>>,
}

impl Children {
    pub fn new(links: Links) -> Self {
        Self(Arc::new(Inner { links, agents: OnceLock::new(), turn: Mutex::default() }))
    }

    /// The agents' loop is there. Before that no run is served, so nobody asks.
    pub fn begin(&self, agents: Agents) {
        let _ = self.0.agents.set(agents);
    }

    pub async fn start(
        &self,
        parent: Parent,
        request: StartChild,
        key: Option<String>,
    ) -> Result<Child, Report> {
        // On a task of its own: a start that was begun is finished, whoever has gone meanwhile.
        let own = self.clone();
        let task = tokio::spawn(async move {
            let asked = digest(&request);
            let place = key.map(|key| format!("{PLACE}/{key}"));
            let result = own.start_in_turn(&parent, request, place, asked).await;
            if let Err(against) = &result {
                own.note_refusal(&parent, against);
            }
            result.map_err(|against| *against.report)
        });
        task.await.map_err(|error| Report::bug("thread_lost", WHAT, error.to_string(), "try again"))?
    }

    async fn start_in_turn(
        &self,
        parent: &Parent,
        request: StartChild,
        place: Option<String>,
        asked: String,
    ) -> Result<Child, Against> {
        let mut turn = self.0.turn.lock().await;
        let links = &self.0.links;
        if let Some(place) = place.clone() {
            let (agent, now) = (parent.agent, clock::unix_ms());
            let kept = links.db.call(move |store| store.kept(agent, &place, now)).await;
            if let Some(kept) = kept.map_err(|error| error.report(WHAT))? {
                return Ok(again(&kept, &asked)?);
            }
        }
        check_request(&request)?;
        let views = self.agents()?.views();
        let view = views.get(&parent.agent).ok_or_else(|| gone(parent.agent))?;
        let token = match &parent.shown {
            Some(shown) => shown.to_string(),
            None => links.tokens.text_of(parent.agent).await?,
        };
        // Once more: the token may have ended while the request waited for its turn.
        let held = links.tokens.verify(&token, parent.agent)?;
        let mut siblings = Vec::new();
        for (id, _) in views.iter().filter(|(_, view)| view.row.parent == Some(parent.agent)) {
            siblings.push(links.tokens.says(*id).await?.rights);
        }
        // A parent that narrows itself for this request still has what its children have together.
        let by = plan::admitted(&held.rights, &siblings, &request.by)?;
        let first = first_of_family(&views, parent.agent);
        let now_ms = clock::boot_ms();
        turn.retain(|_, starts| !starts.is_over(now_ms));
        turn.entry(first).or_default().one_more(now_ms)?;

        let agent = AgentId(clock::fresh_id());
        let uid = links.db.call(|store| store.next_child_uid()).await.map_err(|error| error.report(WHAT))?;
        let name = request.name.clone().unwrap_or_else(|| name_for(&view.row.name, agent));
        let token = links.tokens.handed_on(&token, agent, &by)?;
        let rights = genuine(&token.token, links.tokens.public())?.rights;
        let row = AgentRow {
            v: 1,
            agent_id: agent,
            name,
            uid,
            wanted: true,
            restarts: 0,
            installed_unix_ms: clock::unix_ms(),
            parent: Some(parent.agent),
            arguments: request.arguments,
            ..AgentRow::clone(&view.row)
        };
        let child = described(&row, rights.clone());
        self.make_folder(parent.agent, &row, &rights).await?;
        let kept = Kept {
            v: 1,
            unix_ms: clock::unix_ms(),
            request: asked.clone(),
            status: 200,
            content_type: "application/json".to_owned(),
            body: serde_json::to_string(&child).ok(),
        };
        let (of, stored) = (parent.agent, row.clone());
        let added = links.db.call(move |store| {
            let answer = place.as_deref().map(|place| (place, &kept));
            store.add_child(of, &stored, &token, answer)
        });
        match added.await {
            Ok(None) => {}
            Ok(Some(earlier)) => {
                self.drop_folder(&row).await;
                return Ok(again(&earlier, &asked)?);
            }
            Err(error) => {
                self.drop_folder(&row).await;
                return Err(error.report(WHAT).into());
            }
        }
        tracing::info!(agent_id = %agent, parent = %parent.agent, name = %row.name, "a child is started");
        let entry = Entry::new(Actor::Agent, "token.hand_on", Verdict::Allowed);
        let entry = entry.of_run(parent.agent, parent.run).by_right(agentd_domain::rights::START_AGENTS);
        links.audit.report(entry.detail(&format!("to the child {} {agent}", row.name)));
        self.agents()?.installed(row).await?;
        Ok(child)
    }

    pub async fn list(&self, parent: AgentId) -> Result<Vec<Child>, Report> {
        let views = self.agents()?.views();
        let mut children = Vec::new();
        for view in views.values().filter(|view| view.row.parent == Some(parent)) {
            children.push(self.seen(view).await?);
        }
        Ok(children)
    }

    pub async fn one(&self, parent: AgentId, child: AgentId) -> Result<Child, Report> {
        let views = self.agents()?.views();
        let view = views.get(&child).filter(|view| view.row.parent == Some(parent));
        self.seen(view.ok_or_else(|| no_child(child))?).await
    }

    /// Answers when nothing of it is left.
    pub async fn remove(&self, parent: &Parent, child: AgentId) -> Result<(), Report> {
        let name = self.one(parent.agent, child).await?.name;
        let entry = Entry::new(Actor::Agent, "agent.remove", Verdict::Allowed);
        let entry = entry.of_run(parent.agent, parent.run).by_right(agentd_domain::rights::START_AGENTS);
        self.0.links.audit.report(entry.detail(&format!("its child {name} {child}")));
        let agents = self.agents()?.clone();
        let removal = tokio::spawn(async move { agents.remove(child).await });
        removal.await.map_err(|error| {
            Report::bug("thread_lost", "it was not removed", error.to_string(), "try again")
        })?
    }

    async fn seen(&self, view: &View) -> Result<Child, Report> {
        let rights = self.0.links.tokens.says(view.row.agent_id).await?.rights;
        let child = described(&view.row, rights);
        Ok(Child {
            state: view.state,
            last_exit: view.last_exit.clone(),
            problem: view.problem.clone(),
            ..child
        })
    }

    fn agents(&self) -> Result<&Agents, Report> {
        self.0.agents.get().ok_or_else(|| {
            Report::environment("agents_loop", WHAT, "agentd is starting", "try again in a moment")
        })
    }

    /// The child's own folder and volume, and the package: the same files under another name, which nobody changes.
    async fn make_folder(&self, parent: AgentId, row: &AgentRow, rights: &Rights) -> Result<(), Report> {
        let (launcher, quota) = (self.0.links.launcher.clone(), quota_with(rights));
        let (agent, uid, bundled) = (row.agent_id, row.uid, row.bundled);
        let package = |of: AgentId| self.0.links.folder.join(of.to_string()).join("package");
        let (from, to) = (package(parent), package(agent));
        let made = tokio::task::spawn_blocking(move || {
            launcher.prepare_agent(agent, uid, quota).map_err(Report::from)?;
            if bundled { Ok(()) } else { package::link(&from, &to).map_err(|error| error.report()) }
        });
        let made =
            made.await.map_err(|error| Report::bug("thread_lost", WHAT, error.to_string(), "try again"));
        let made = made.and_then(|made| made);
        if made.is_err() {
            self.drop_folder(row).await;
        }
        made
    }

    /// Of a child that came to nothing.
    async fn drop_folder(&self, row: &AgentRow) {
        let (launcher, agent, uid) = (self.0.links.launcher.clone(), row.agent_id, row.uid);
        let dropped = tokio::task::spawn_blocking(move || launcher.remove_agent(agent, uid));
        if !matches!(dropped.await, Ok(Ok(()))) {
            tracing::warn!(agent_id = %agent, "a folder of no agent was left");
        }
    }

    fn note_refusal(&self, parent: &Parent, against: &Against) {
        let entry =
            Entry::new(Actor::Agent, "agents.start", Verdict::Denied).of_run(parent.agent, parent.run);
        let entry = entry.by_right(&against.right).detail(&against.report.why);
        self.0.links.audit.report(entry);
    }
}

fn described(row: &AgentRow, rights: Rights) -> Child {
    Child {
        agent_id: row.agent_id,
        name: row.name.clone(),
        arguments: row.arguments.clone(),
        rights,
        state: agentd_domain::api::AgentState::Starting,
        last_exit: None,
        problem: None,
    }
}

fn again(kept: &Kept, asked: &str) -> Result<Child, Report> {
    if kept.request != asked {
        return Err(Report::caller(
            "conflict",
            WHAT,
            "this `Idempotency-Key` was used with another body",
            "send a fresh UUID as the key of each new request",
        ));
    }
    serde_json::from_str(kept.body.as_deref().unwrap_or_default())
        .map_err(|error| Report::bug("answer_lost", WHAT, error.to_string(), "send a fresh key"))
}

fn check_request(request: &StartChild) -> Result<(), Report> {
    let bytes: usize = request.arguments.iter().map(String::len).sum();
    if request.arguments.len() > ceiling::ARGS_MAX / 2
        || bytes > ceiling::TEXT_MAX_BYTES / 2
        || request.arguments.iter().any(|argument| argument.contains('\0'))
    {
        return Err(Report::caller(
            "arguments_invalid",
            WHAT,
            "its arguments are too many, too long, or hold a NUL character",
            format!("keep to {} arguments and {} bytes", ceiling::ARGS_MAX / 2, ceiling::TEXT_MAX_BYTES / 2),
        ));
    }
    Ok(())
}

/// The parent's name, shortened, and what is random of the id.
fn name_for(parent: &AgentName, child: AgentId) -> AgentName {
    let id = child.0.simple().to_string();
    let (_, tail) = id.split_at(id.len() - 10);
    let stem: String = parent.as_str().chars().take(29).collect();
    // Both parts are of the characters of a name, and the second begins and ends with one that may.
    format!("{}-{tail}", stem.trim_end_matches('-')).parse().unwrap_or_else(|_| parent.clone())
}

fn first_of_family(views: &crate::agents::Views, agent: AgentId) -> AgentId {
    let mut first = agent;
    for _ in 0..=ceiling::DEPTH_MAX {
        match views.get(&first).and_then(|view| view.row.parent) {
            Some(parent) => first = parent,
            None => break,
        }
    }
    first
}

fn digest(request: &StartChild) -> String {
    hex::encode(Sha256::digest(serde_json::to_vec(request).unwrap_or_default()))
}

fn gone(agent: AgentId) -> Report {
    Report::environment("agent_gone", WHAT, format!("the agent {agent} is being removed"), "it is too late")
}

fn no_child(child: AgentId) -> Report {
    Report::caller(
        "not_found",
        "nothing was done",
        format!("{child} is no child of this agent"),
        "`GET /agent/v1/agents` lists its children",
    )
}
