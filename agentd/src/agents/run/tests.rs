//! The loop with its own store, tokens and audit log, and a launcher that starts real processes without walls.

use super::*;
use crate::agent_api::Services;
use crate::children::{self, Children, Parent};
use crate::engine;
use crate::store::Store;
use crate::tokens::Tokens;
use agentd_capability::token::RootKey;
use agentd_domain::agent_api::StartChild;
use agentd_domain::launcher::{ExitRecord, Forbidden, Request, Response};
use agentd_domain::plan::SandboxPlan;
use agentd_domain::rights::{Limit, Narrowing};
use agentd_sandbox::wire;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept, bind, listen, socket_with,
};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;
use uuid::Uuid;

const PATIENCE: Duration = Duration::from_secs(20);
/// What is promised of a run whose token was revoked.
const DEAD_WITHIN: Duration = Duration::from_millis(100);

#[derive(Default)]
struct Fake {
    runs: BTreeMap<RunId, (SandboxPlan, Child)>,
    exits: Vec<ExitRecord>,
    plans: Vec<SandboxPlan>,
    removed: Vec<AgentId>,
    /// What seccomp has killed of each run.
    forbidden: Option<Forbidden>,
}

impl Fake {
    fn serve(path: &Path) -> Arc<Mutex<Self>> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let socket = socket.expect("a socket");
        bind(&socket, &SocketAddrUnix::new(path).expect("a path")).expect("bound");
        listen(&socket, 64).expect("listening");
        let fake = Arc::new(Mutex::new(Self::default()));
        let served = fake.clone();
        std::thread::spawn(move || {
            while let Ok(peer) = accept(&socket) {
                let served = served.clone();
                std::thread::spawn(move || {
                    let Ok((request, _)) = wire::receive::<Request>(peer.as_fd()) else { return };
                    let mut fake = served.lock().unwrap_or_else(PoisonError::into_inner);
                    let (response, fds) = fake.answer(request);
                    let _ = wire::send(peer.as_fd(), &response, &wire::borrowed(&fds));
                });
            }
        });
        fake
    }

    fn answer(&mut self, request: Request) -> (Response, Vec<OwnedFd>) {
        match request {
            Request::Start { run_id, plan } => self.start(run_id, *plan),
            Request::Kill { run_id, .. } => {
                if let Some((_, child)) = self.runs.get_mut(&run_id) {
                    child.kill().expect("killed");
                }
                (Response::Done, Vec::new())
            }
            Request::List { .. } => (Response::Listing(self.listing()), Vec::new()),
            Request::ForgetExit { run_id } => {
                self.exits.retain(|exit| exit.run_id != run_id);
                (Response::Done, Vec::new())
            }
            Request::RemoveAgent { agent_id, .. } => {
                self.removed.push(agent_id);
                (Response::Done, Vec::new())
            }
            _ => (Response::Done, Vec::new()),
        }
    }

    fn start(&mut self, run: RunId, plan: SandboxPlan) -> (Response, Vec<OwnedFd>) {
        let mut command = Command::new("sleep");
        command.arg("600").stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("started");
        let pid = i32::try_from(child.id()).expect("a pid");
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
        let folder = tempfile::tempdir().expect("a folder");
        let unix = std::os::unix::net::UnixListener::bind(folder.path().join("s")).expect("bound");
        let pidfd = rustix::process::Pid::from_raw(pid).expect("a pid");
        let pidfd =
            rustix::process::pidfd_open(pidfd, rustix::process::PidfdFlags::empty()).expect("a pidfd");
        let stdout = OwnedFd::from(child.stdout.take().expect("piped"));
        let stderr = OwnedFd::from(child.stderr.take().expect("piped"));
        for fd in [&stdout, &stderr] {
            rustix::io::ioctl_fionbio(fd, true).expect("set");
        }
        let network = plan.network.clone();
        self.plans.push(plan.clone());
        self.runs.insert(run, (plan, child));
        (Response::Started { pid, network }, vec![tcp.into(), unix.into(), stdout, stderr, pidfd])
    }

    fn listing(&mut self) -> Listing {
        let mut gone = Vec::new();
        for (run, (_, child)) in &mut self.runs {
            if child.try_wait().expect("asked").is_some() {
                gone.push(*run);
            }
        }
        for run_id in gone {
            if let Some((plan, _)) = self.runs.remove(&run_id) {
                let (agent_id, at) = (plan.agent_id, clock::boot_ms());
                let cause = ExitCause::Stopped;
                let exit = ExitRecord {
                    run_id,
                    agent_id,
                    cause,
                    started_boot_ms: at,
                    ended_boot_ms: at,
                    memory_peak_bytes: 0,
                    forbidden: None,
                };
                self.exits.push(exit);
            }
        }
        let info = |(run_id, (plan, child)): (&RunId, &(SandboxPlan, Child))| RunInfo {
            run_id: *run_id,
            agent_id: plan.agent_id,
            uid: plan.uid,
            pid: i32::try_from(child.id()).unwrap_or(0),
            frozen: false,
            api: plan.api.clone(),
            started_boot_ms: 0,
            cgroup: Some(plan.cgroup.clone()),
            forbidden: self.forbidden.clone(),
        };
        Listing {
            runs: self.runs.iter().map(info).collect(),
            exits: self.exits.clone(),
            ..Listing::default()
        }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        for (_, child) in self.runs.values_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

struct Scene {
    _folder: tempfile::TempDir,
    fake: Arc<Mutex<Fake>>,
    db: Db,
    tokens: Tokens,
    audit: Audit,
    agents: Agents,
    children: Children,
}

const MANIFEST: &str = "[agent]\nname = \"parent\"\nexec = [\"/agent/run\"]\n[messages]\naccept = true\n\
                        [agents]\nchildren = 2\ndepth = 2\n";

impl Scene {
    /// With one agent of the image, which wants to run.
    async fn new() -> Self {
        Self::after(Vec::new()).await
    }

    /// The same after runs that ended while no agentd lived.
    async fn after(exits: Vec<ExitRecord>) -> Self {
        let scene = Self::of(MANIFEST, exits, &|_| crate::gpu::Gpu::new(0)).await;
        scene.until("the parent runs", |views| running(views, PARENT)).await;
        scene
    }

    /// With an agent of this manifest, and devices.
    async fn of(manifest: &str, exits: Vec<ExitRecord>, gpu: &dyn Fn(&Db) -> crate::gpu::Gpu) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("launcher.sock");
        let fake = Fake::serve(&socket);
        fake.lock().unwrap_or_else(PoisonError::into_inner).exits = exits;
        let launcher = Launcher::at(&socket);
        let db = Db::new(Store::open(&folder.path().join("system.redb")).expect("opens"));
        let row = AgentRow {
            v: 1,
            agent_id: AgentId(Uuid::from_u128(1)),
            owner_id: db.owner(),
            name: "parent".parse().expect("a name"),
            version: "1".to_owned(),
            digest: String::new(),
            manifest: manifest.to_owned(),
            uid: db.here().next_uid().expect("a uid"),
            wanted: true,
            bundled: true,
            restarts: 0,
            installed_unix_ms: 5,
            parent: None,
            arguments: Vec::new(),
        };
        db.here().add_agent(&row).expect("added");
        let tokens =
            Tokens::open(RootKey::from_secret(&[7; 32]).expect("a key"), db.clone()).expect("opened");
        tokens.settle().expect("settled");
        let engine = engine::start(
            engine::Links {
                launcher: launcher.clone(),
                sockets: folder.path().to_owned(),
                memory_max_bytes: 1,
                load_patience: std::time::Duration::from_secs(2),
                gate: crate::engine::testing::open_gate(),
            },
            std::future::pending(),
        );
        let memories = Memories::start(
            crate::memory::Folders {
                agents: folder.path().to_owned(),
                knowledge: folder.path().join("knowledge"),
            },
            db.clone(),
            engine.clone(),
        );
        let (audit, inbox) = (Audit::default(), Inbox::new(db.clone()));
        let logs = Logs::start(folder.path().join("logs")).expect("started");
        let children = Children::new(children::Links {
            db: db.clone(),
            tokens: tokens.clone(),
            audit: audit.clone(),
            launcher: launcher.clone(),
            folder: folder.path().to_owned(),
        });
        let (nerves, felt) = Nerves::new();
        let services = Services {
            db: db.clone(),
            inbox: inbox.clone(),
            memories: memories.clone(),
            engine,
            gpu: crate::gpu::Gpu::new(0),
            audit: audit.clone(),
            launcher: launcher.clone(),
            tokens: tokens.clone(),
            children: children.clone(),
            nerves: nerves.clone(),
        };
        let lines = logs.clone();
        let serve = Box::new(move |run: Serve| crate::agent_api::serve(run, services.clone(), &lines));
        let links = Links {
            db: db.clone(),
            audit: audit.clone(),
            logs,
            inbox,
            memories,
            board: Arc::new(Board::starting()),
            launcher,
            tokens: tokens.clone(),
            nerves,
            felt,
            cgroup_root: folder.path().join("no-cgroups"),
            gpu: gpu(&db),
            serve,
        };
        let agents = start(links).await.expect("started");
        children.begin(agents.clone());
        Self { _folder: folder, fake, db, tokens, audit, agents, children }
    }

    async fn until(&self, what: &str, seen: impl Fn(&Views) -> bool) -> Views {
        let mut views = self.agents.watch();
        let waited = tokio::time::timeout(PATIENCE, views.wait_for(|views| seen(views))).await;
        waited
            .unwrap_or_else(|_| panic!("{what}: {:?}", self.agents.views()))
            .expect("the loop lives")
            .clone()
    }

    async fn child_of(&self, parent: AgentId, by: Narrowing) -> Result<AgentId, Report> {
        let run = self.agents.views().get(&parent).and_then(|view| view.run).expect("it runs").run_id;
        let request = StartChild { by, ..StartChild::default() };
        let child = self.children.start(Parent { agent: parent, run, shown: None }, request, None).await?;
        self.until("the child runs", |views| running(views, child.agent_id)).await;
        Ok(child.agent_id)
    }

    fn pid(&self, agent: AgentId) -> i32 {
        self.agents.views().get(&agent).and_then(|view| view.run).expect("it runs").pid
    }

    async fn id_of(&self, agent: AgentId) -> agentd_domain::token::RevocationId {
        self.tokens.says(agent).await.expect("a token").revocation_ids.pop().expect("an id")
    }

    async fn revoke(&self, agent: AgentId) -> Vec<AgentId> {
        let id = self.id_of(agent).await;
        self.tokens.revoke(id, "owner", "a test").await.expect("revoked");
        self.agents.revoked().await
    }

    fn recorded(&self) -> Vec<String> {
        let reported = self.audit.reported();
        reported.into_iter().map(|(entry, _)| format!("{} {}", entry.action, entry.detail)).collect()
    }
}

const PARENT: AgentId = AgentId(Uuid::from_u128(1));

fn running(views: &Views, agent: AgentId) -> bool {
    views.get(&agent).is_some_and(|view| view.state == AgentState::Ready && view.run.is_some())
}

/// Dead, or a zombie that only waits to be reaped.
fn is_dead(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z') || rest.starts_with('X'))
}

fn code(views: &Views, agent: AgentId) -> Option<String> {
    views.get(&agent)?.problem.as_ref().map(|report| report.code.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_gets_what_its_token_gives() {
    let scene = Scene::new().await;
    let few = Narrowing {
        api: Some(["messages".to_owned()].into()),
        limits: [(Limit::Pids, 9)].into(),
        ..Narrowing::default()
    };
    let child = scene.child_of(PARENT, few).await.expect("started");
    let plans = scene.fake.lock().expect("unpoisoned").plans.clone();
    let plan = |agent| plans.iter().find(|plan| plan.agent_id == agent).expect("a plan").clone();
    assert_eq!(
        (plan(PARENT).api, plan(PARENT).cgroup.pids_max),
        (vec!["agents.start".to_owned(), "messages".to_owned()], 64)
    );
    assert_eq!((plan(child).api, plan(child).cgroup.pids_max), (vec!["messages".to_owned()], 9));
    assert_ne!(plan(child).uid, plan(PARENT).uid);
    let package = |plan: &SandboxPlan| format!("{:?}", plan.mounts).contains("agents/parent\"");
    assert!(package(&plan(child)) && package(&plan(PARENT)), "the same package");
}

#[tokio::test(flavor = "multi_thread")]
async fn to_revoke_a_token_kills_its_run_and_its_children_s_at_once() {
    let scene = Scene::new().await;
    let child = scene.child_of(PARENT, Narrowing::default()).await.expect("started");
    let grandchild = scene.child_of(child, Narrowing::default()).await.expect("started");
    let pids = [PARENT, child, grandchild].map(|agent| scene.pid(agent));
    let ended = scene.revoke(PARENT).await;
    let acknowledged = Instant::now();
    assert_eq!(ended.len(), 3, "{ended:?}");
    while !pids.iter().all(|pid| is_dead(*pid)) {
        assert!(acknowledged.elapsed() < DEAD_WITHIN, "{pids:?} live {:?} later", acknowledged.elapsed());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    println!("dead {:?} after the acknowledgement", acknowledged.elapsed());
    let views = scene
        .until("the parent is refused and the others are gone", |views| {
            views.len() == 1 && views.values().all(|view| view.state == AgentState::Refused)
        })
        .await;
    assert_eq!(code(&views, PARENT).as_deref(), Some("token_revoked"));
    let removed = scene.fake.lock().expect("unpoisoned").removed.clone();
    assert!(removed.contains(&child) && removed.contains(&grandchild), "{removed:?}");
    assert!(scene.db.here().token(child).expect("read").is_none(), "its token is gone with it");
    let recorded = scene.recorded();
    for action in ["token.end token_revoked", "run.start token_revoked", "agent.remove", "token.hand_on"] {
        assert!(recorded.iter().any(|record| record.starts_with(action)), "{action}: {recorded:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn to_revoke_a_child_s_token_leaves_its_parent_alone() {
    let scene = Scene::new().await;
    let child = scene.child_of(PARENT, Narrowing::default()).await.expect("started");
    let (parents, childs) = (scene.pid(PARENT), scene.pid(child));
    assert_eq!(scene.revoke(child).await, [child]);
    scene.until("the child is gone", |views| views.len() == 1).await;
    assert!(is_dead(childs) && !is_dead(parents));
    // Its place is free again.
    scene.child_of(PARENT, Narrowing::default()).await.expect("started");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_ends_when_its_parent_is_stopped() {
    let scene = Scene::new().await;
    let child = scene.child_of(PARENT, Narrowing::default()).await.expect("started");
    scene.child_of(child, Narrowing::default()).await.expect("started");
    scene.agents.want(PARENT, false).await.expect("stopped");
    let views = scene.until("the family is gone", |views| views.len() == 1).await;
    assert!(views.contains_key(&PARENT));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_third_child_is_refused_and_leaves_nothing() {
    let scene = Scene::new().await;
    for _ in 0..2 {
        scene.child_of(PARENT, Narrowing::default()).await.expect("started");
    }
    let refused = scene.child_of(PARENT, Narrowing::default()).await.expect_err("one too many");
    assert_eq!((refused.code.as_str(), scene.agents.views().len()), ("forbidden", 3));
    let records = scene.audit.reported();
    let denied = records.iter().find(|(entry, _)| entry.action == "agents.start").expect("recorded");
    assert_eq!(denied.0.right.as_deref(), Some("agents.children"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_key_is_the_same_child() {
    let scene = Scene::new().await;
    let run = scene.agents.views().get(&PARENT).and_then(|view| view.run).expect("it runs").run_id;
    let ask = |arguments: &[&str]| {
        let parent = Parent { agent: PARENT, run, shown: None };
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let request = StartChild { arguments, ..StartChild::default() };
        scene.children.start(parent, request, Some("key".to_owned()))
    };
    let (one, two) = tokio::join!(ask(&["a"]), ask(&["a"]));
    assert_eq!(one.expect("started").agent_id, two.expect("the same").agent_id);
    assert_eq!(ask(&["b"]).await.expect_err("another").code, "conflict");
    assert_eq!(scene.children.list(PARENT).await.expect("listed").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_ends_with_its_token_s_time_and_a_new_token_starts_it_again() {
    let scene = Scene::new().await;
    let row = scene.agents.views().get(&PARENT).expect("there").row.clone();
    let manifest = agentd_capability::parse_manifest(MANIFEST).expect("a manifest");
    let soon = Narrowing { expires_unix_s: Some(clock::unix_ms() / 1000 + 3), ..Narrowing::default() };
    for by in [soon, Narrowing::default()] {
        let token = scene.tokens.minted(PARENT, &manifest, &by).expect("minted");
        scene.tokens.replace(&row, token).await.expect("replaced");
        scene.agents.revoked().await;
        scene.agents.renewed(PARENT).await.expect("told");
        if by.expires_unix_s.is_some() {
            let over = |views: &Views| code(views, PARENT).is_some_and(|code| code == "token_expired");
            scene.until("its time is over", |views| over(views) && !running(views, PARENT)).await;
        }
    }
    scene.until("it runs again", |views| running(views, PARENT)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_ended_while_no_agentd_lived_is_held_against_its_agent() {
    let ended_boot_ms = clock::boot_ms();
    let exit = ExitRecord {
        run_id: RunId(Uuid::from_u128(7)),
        agent_id: PARENT,
        cause: ExitCause::Exited { code: 1 },
        started_boot_ms: ended_boot_ms.saturating_sub(50),
        ended_boot_ms,
        memory_peak_bytes: 0,
        forbidden: None,
    };
    let scene = Scene::after(vec![exit.clone()]).await;
    let waited_ms = clock::boot_ms() - ended_boot_ms;
    assert!(waited_ms >= health::BACKOFF_FIRST_MS, "started again after {waited_ms} ms");
    let view = &scene.agents.views()[&PARENT];
    assert_eq!((view.restarts, view.last_exit.as_ref()), (1, Some(&exit)));
    let kept = scene.db.here().health(PARENT).expect("read");
    assert_eq!((kept.ends.failed_unix_ms.len(), kept.ends.newest), (1, Some(exit.run_id)));
    let forgotten = || scene.fake.lock().unwrap_or_else(PoisonError::into_inner).exits.is_empty();
    assert!(forgotten(), "its record is dropped once it counts");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_seccomp_kills_shows_while_its_run_lives_on() {
    let scene = Scene::new().await;
    let killed = |processes| Some(Forbidden { processes, syscall: "ptrace".to_owned() });
    let tell = |seen| scene.fake.lock().unwrap_or_else(PoisonError::into_inner).forbidden = seen;
    let mut told = Vec::new();
    for (processes, expected) in [(1, 1), (1, 1), (3, 3), (3, 3)] {
        tell(killed(processes));
        // A run that nobody knows: the loop looks at the launcher's list.
        let nobody = Input::ProcessEnded { run: RunId(Uuid::nil()) };
        assert!(scene.agents.wishes.send(nobody).await.is_ok());
        let deadline = Instant::now() + PATIENCE;
        loop {
            told.extend(scene.recorded().into_iter().filter(|line| line.starts_with("run.process")));
            if told.len() >= expected {
                break;
            }
            assert!(Instant::now() < deadline, "{told:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(told.len(), expected, "{told:?}");
    }
    assert!(told.iter().all(|line| line.contains("SIGSYS") && line.contains("ptrace")), "{told:?}");
    assert!(running(&scene.agents.views(), PARENT));
}

const PAINTER: &str = "[agent]\nname = \"parent\"\nexec = [\"/agent/run\"]\n[gpu]\nmemory = \"4G\"\n\
                       [agents]\nchildren = 2\ndepth = 1\n";

/// From the manifest through the token to the plan that the launcher gets, and back when the run has ended.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_s_own_program_gets_a_device_for_as_long_as_its_run_lives() {
    use agentd_domain::enforcement::LimitBy;
    let gpu = std::sync::OnceLock::new();
    let scene = Scene::of(PAINTER, Vec::new(), &|db| {
        let card = crate::gpu::programs::tests::card();
        gpu.get_or_init(|| crate::gpu::programs::tests::with_engine_on(db, &card)).clone()
    })
    .await;
    scene.until("it runs", |views| running(views, PARENT)).await;
    let plan = scene.fake.lock().expect("unpoisoned").plans[0].clone();
    let wish = plan.device.clone().expect("a device");
    let given = wish.given.expect("chosen");
    let limit = given.limit().expect("a share");
    assert_eq!((&limit.by, limit.bytes), (&LimitBy::Nvml { uuid: "GPU-1".to_owned() }, 4 << 30));
    assert_eq!(given.nodes, ["/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"]);
    agentd_sandbox::check::check(&plan).expect("the launcher would take it");
    // A child has none unless it asks for some of it, and never more.
    let child = scene.child_of(PARENT, Narrowing::default()).await.expect("started");
    let plans = scene.fake.lock().expect("unpoisoned").plans.clone();
    assert_eq!(plans.iter().find(|plan| plan.agent_id == child).expect("a plan").device, None);
    let more = Narrowing { limits: [(Limit::GpuBytes, 5 << 30)].into(), ..Narrowing::default() };
    assert_eq!(scene.child_of(PARENT, more).await.expect_err("more than it has").code, "forbidden");
    assert!(scene.recorded().iter().any(|record| record.contains("device.lease")), "{:?}", scene.recorded());
    let gpu = gpu.get().expect("made").clone();
    assert!(gpu.has_leases());
    scene.agents.want(PARENT, false).await.expect("stopped");
    scene.until("it is at rest", |views| !running(views, PARENT)).await;
    let deadline = Instant::now() + PATIENCE;
    while gpu.has_leases() {
        assert!(Instant::now() < deadline, "its device is held");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Nothing holds a program to a share there: no node is given, and no run is asked for.
#[tokio::test(flavor = "multi_thread")]
async fn where_nothing_holds_a_program_to_its_share_it_is_not_started() {
    let scene = Scene::of(PAINTER, Vec::new(), &|db| {
        let mut card = crate::gpu::programs::tests::card();
        // The kernel accounts for no region of it.
        card.gpu.as_mut().expect("readings").pci_address = Some("0000:99:00.0".to_owned());
        crate::gpu::programs::tests::with_engine_on(db, &card)
    })
    .await;
    let refused = |views: &Views| code(views, PARENT).as_deref() == Some("device_not_enforced");
    let views = scene.until("it is refused", refused).await;
    let problem = views[&PARENT].problem.clone().expect("why");
    assert!(problem.why.contains("nothing there holds a program to a share"), "{problem}");
    assert!(problem.fix.contains("agentctl gpu grant"), "{problem}");
    assert!(scene.fake.lock().expect("unpoisoned").plans.is_empty());
}
