//! In which order do the parts come to life, and how do they end?
//!
//! Walls, runtimes, engine, store, agents, console; each that fails leaves a problem on the board and what does not
//! need it goes on. Without its own walls agentd starts no agents: fail closed.

use crate::agent_api::{self, Services};
use crate::agents::{self, Nerves, Serve};
use crate::appliance::{Machine, Parts, thread_lost};
use crate::audit::{self, Audit};
use crate::bundled;
use crate::children::{self, Children};
use crate::confine::{self, Listening};
use crate::egress::{self, Egress};
use crate::engine::{self, Engine, Stage};
use crate::gpu::{self, Configured, Gpu};
use crate::health::{Board, START, Weight};
use crate::inbox::Inbox;
use crate::initlink::Init;
use crate::logs::Logs;
use crate::memory::{Folders, Memories};
use crate::models::{self, Models};
use crate::options::{Options, Walls};
use crate::places::Places;
use crate::state_files::TwoFiles;
use crate::store::{Db, Store};
use crate::tokens::{self, Tokens};
use crate::{clock, readings};
use agentd_console::{Appliance, Auth, Authority, StateFiles, boot_clock, router, serve_tls};
use agentd_domain::config::EgressSettings;
use agentd_domain::fault::Report;
use agentd_domain::initctl::AgentdReport;
use agentd_sandbox::client::Launcher;
use std::collections::BTreeSet;
use std::fs::DirBuilder;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// init shows this report on the local console; each minute again, because init may have been restarted.
const REPORT_EVERY: Duration = Duration::from_secs(60);
/// Addresses change rarely; a certificate that lags some seconds costs a warning in a browser.
const ADDRESSES_EVERY: Duration = Duration::from_secs(15);
const ADDRESSES_SOON: Duration = Duration::from_secs(1);
/// While the data or the state partition is missing.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// Left to the rest of the system when the engine takes all it may.
const SYSTEM_BYTES: u64 = 160 * 1024 * 1024;
/// A thread's stack is touched page by page; this is only address space.
const STACK_BYTES: usize = 1024 * 1024;

/// Returns when agentd was told to end.
pub fn run(options: &Options) -> Result<(), Report> {
    let places = options.places();
    let port = options.https_port(&places);
    let granted = egress::settings(&places);
    let configured = (gpu::configured(&places), models::configured_pins(&places));
    // Before the walls, which take this from agentd for good.
    let entrance = Entrance { port, listener: listen(port).ok() };
    let listening = if entrance.listener.is_some() { Listening::Begun } else { Listening::NotYet(port) };
    let board = Arc::new(Board::starting());
    let walls = match options.walls {
        Walls::Down => {
            board.set("own walls", Weight::Degraded, walls_left_down());
            Ok(())
        }
        Walls::Up => confine::confine(&places, listening).map_err(|error| error.report()),
    };
    if let Err(report) = &walls {
        board.set("own walls", Weight::Broken, report.clone());
    }
    let threads_spent = |error: io::Error| {
        Report::environment(
            "threads_spent",
            "agentd did not start",
            error.to_string(),
            "reboot the appliance",
        )
    };
    let control = runtime("control", 1).map_err(threads_spent)?;
    let data = runtime("data", 2).map_err(threads_spent)?;
    let result =
        control.block_on(live(places, entrance, (granted, configured), board, walls, data.handle().clone()));
    data.shutdown_timeout(Duration::from_secs(1));
    control.shutdown_timeout(Duration::from_secs(1));
    result
}

fn runtime(name: &str, workers: usize) -> io::Result<Runtime> {
    Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(16)
        .thread_keep_alive(Duration::from_secs(5))
        .thread_stack_size(STACK_BYTES)
        .thread_name(name)
        .enable_all()
        .build()
}

/// Where people knock.
struct Entrance {
    port: u16,
    /// Not when the port was taken; it is tried again.
    listener: Option<std::net::TcpListener>,
}

async fn live(
    places: Places,
    entrance: Entrance,
    (granted, (configured, pinned)): (EgressSettings, (Configured, BTreeSet<String>)),
    board: Arc<Board>,
    walls: Result<(), Report>,
    data: Handle,
) -> Result<(), Report> {
    let over = CancellationToken::new();
    end_on_signal(over.clone())?;
    let init = Init::at(places.init_socket.clone());
    let launcher = Launcher::at(&places.launcher_socket);
    // People first: the sign-in page does not wait for models.
    let open = CancellationToken::new();
    let gpu = Gpu::new(engine_memory_bytes());
    let to_engines = launcher.clone().with_software_devices(configured.software_devices);
    let engine = start_engine(&places, &data, &gpu, to_engines, (Arc::clone(&board), open.clone()));
    data.spawn(gpu.clone().follow(engine.clone()));
    tokio::spawn(watch_engine(engine.clone(), Arc::clone(&board)));
    let models = Models::new(&places, engine.clone());
    let audit = Audit::default();
    data.spawn(gpu.clone().tend(engine.clone(), launcher.clone(), Arc::clone(&board), audit.clone()));
    let parts = match walls {
        Ok(()) => start_agents(&places, granted, &board, &launcher, (&engine, &gpu), &audit, &data).await,
        Err(report) => Err(report),
    };
    if let Ok(parts) = &parts {
        open_partitions(&gpu, &parts.db, configured, &board).await;
        models.open(parts.db.clone(), pinned, &board).await;
    }
    if let Err(report) = &parts {
        board.set("agents", Weight::Broken, report.clone());
        board.clear(START);
        tokio::spawn(end_when_data_comes(places.clone(), over.clone()));
    }
    tokio::spawn(first_models(models.clone(), open.clone()));
    let state = places.state_agentd.clone();
    let out = parts.as_ref().ok().map(|parts| parts.egress.clone());
    let machine = Machine {
        places,
        board: Arc::clone(&board),
        init: init.clone(),
        engine,
        models,
        gpu,
        launcher,
        audit: audit.clone(),
        parts,
    };
    serve_people(machine, &state, entrance, init, board, open, over).await;
    if let Some(egress) = out {
        egress.close().await;
    }
    audit.close().await;
    tracing::info!("agentd ends");
    Ok(())
}

fn end_on_signal(over: CancellationToken) -> Result<(), Report> {
    let no_signals = |error: io::Error| {
        Report::environment("signals", "agentd did not start", error.to_string(), "reboot the appliance")
    };
    let mut terminate = signal(SignalKind::terminate()).map_err(no_signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(no_signals)?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        over.cancel();
    });
    Ok(())
}

/// A small model takes a second, under plain emulation some; a large one has more (`engine::run`).
const LOAD_PATIENCE: Duration = Duration::from_secs(120);

/// What the engine may take of host memory. On the smallest machine half of it: what is swapped in and out would be
/// slower than none.
fn engine_memory_bytes() -> u64 {
    let memory = readings::memory().total_bytes;
    memory.saturating_sub(SYSTEM_BYTES).max(memory / 2)
}

fn start_engine(
    places: &Places,
    data: &Handle,
    gpu: &Gpu,
    launcher: Launcher,
    (board, open): (Arc<Board>, CancellationToken),
) -> Engine {
    let sockets = places.engine_sockets.clone();
    let memory_max_bytes = engine_memory_bytes();
    let planner = engine::Planner::new(launcher.clone(), sockets.clone(), memory_max_bytes);
    let cgroup_root = places.cgroup_root.clone();
    let gate = Arc::new(gpu::AtTheDoor { gpu: gpu.clone(), planner, board, cgroup_root });
    let links = engine::Links { launcher, sockets, memory_max_bytes, load_patience: LOAD_PATIENCE, gate };
    let _on_data = data.enter();
    engine::start(links, open.cancelled_owned())
}

async fn first_models(models: Models, open: CancellationToken) {
    open.cancelled().await;
    models.refresh().await;
}

/// An engine that is away, or a model that was refused, is a problem for people.
async fn watch_engine(engine: Engine, board: Arc<Board>) {
    let mut view = engine.watch();
    loop {
        let now = view.borrow_and_update().clone();
        match &now.stage {
            Stage::Down(report) => board.set("engine", Weight::Degraded, report.clone()),
            Stage::Starting | Stage::Loading | Stage::Ready => board.clear("engine"),
        }
        match now.failed.values().next() {
            Some(report) => board.set("model", Weight::Degraded, report.clone()),
            None => board.clear("model"),
        }
        if view.changed().await.is_err() {
            return;
        }
    }
}

async fn start_agents(
    places: &Places,
    granted: EgressSettings,
    board: &Arc<Board>,
    launcher: &Launcher,
    (engine, gpu): (&Engine, &Gpu),
    audit: &Audit,
    data: &Handle,
) -> Result<Parts, Report> {
    let what = "no agent is started";
    make_folders(places).map_err(|error| {
        Report::environment(
            "data_missing",
            what,
            error.to_string(),
            "see the data partition's state on the local console",
        )
    })?;
    let path = places.system_store();
    let opened = tokio::task::spawn_blocking(move || Store::open(&path)).await;
    let opened = opened
        .map_err(|error| Report::bug("thread_lost", what, error.to_string(), "reboot the appliance"))?;
    let db = Db::new(opened.map_err(|error| error.report(what))?);
    tokio::spawn(keep_audit(audit.clone(), db.clone(), places.clone(), Arc::clone(board)));
    open_devices(gpu, &db).await?;
    let root_hash = bundled::root_hash(&std::fs::read_to_string("/proc/cmdline").unwrap_or_default());
    bundled::install(&db, &places.builtin_agents, root_hash, board)
        .await
        .map_err(|error| error.report(what))?;
    let tokens = open_tokens(&db, places).await?;
    let logs = Logs::start(places.logs()).map_err(|error| {
        Report::environment("threads_spent", what, error.to_string(), "reboot the appliance")
    })?;
    let inbox = Inbox::new(db.clone());
    let memories = {
        let _on_data = data.enter();
        let folders = Folders { agents: places.agents(), knowledge: places.knowledge() };
        Memories::start(folders, db.clone(), engine.clone())
    };
    let children = Children::new(children::Links {
        db: db.clone(),
        tokens: tokens.clone(),
        audit: audit.clone(),
        launcher: launcher.clone(),
        folder: places.agents(),
    });
    let (nerves, felt) = Nerves::new();
    let services = Services {
        db: db.clone(),
        inbox: inbox.clone(),
        memories: memories.clone(),
        engine: engine.clone(),
        gpu: gpu.clone(),
        audit: audit.clone(),
        launcher: launcher.clone(),
        tokens: tokens.clone(),
        children: children.clone(),
        nerves: nerves.clone(),
    };
    let egress = {
        let (places, audit, board) = (places.clone(), audit.clone(), Arc::clone(board));
        let of = (db.clone(), tokens.clone());
        let (on_data, nerves, what) = (data.clone(), nerves.clone(), "no agent is started");
        let opened = tokio::task::spawn_blocking(move || {
            let _on_data = on_data.enter();
            Egress::open(&places, granted, audit, of, nerves, &board)
        });
        opened
            .await
            .map_err(|error| Report::bug("thread_lost", what, error.to_string(), "reboot the appliance"))?
    };
    let (to_data, lines, out) = (data.clone(), logs.clone(), egress.clone());
    let serve = Box::new(move |mut run: Serve| {
        let _on_data = to_data.enter();
        if let Some(sockets) = run.handles.sockets.egress.take() {
            out.serve(egress::Run { agent: run.agent, run: run.run, sockets, over: run.over.clone() });
        }
        agent_api::serve(run, services.clone(), &lines);
    });
    let links = agents::Links {
        db: db.clone(),
        audit: audit.clone(),
        logs: logs.clone(),
        inbox: inbox.clone(),
        memories: memories.clone(),
        board: Arc::clone(board),
        launcher: launcher.clone(),
        tokens: tokens.clone(),
        nerves,
        felt,
        cgroup_root: places.cgroup_root.clone(),
        gpu: gpu.clone(),
        serve,
    };
    let agents = agents::start(links).await?;
    children.begin(agents.clone());
    Ok(Parts { db, agents, inbox, logs, tokens, egress, memories })
}

/// Without what is stored a device could be given twice: then no agent is started.
async fn open_devices(gpu: &Gpu, db: &Db) -> Result<(), Report> {
    let (gpu, db) = (gpu.clone(), db.clone());
    let opened = tokio::task::spawn_blocking(move || gpu.open_devices(&db)).await;
    let opened = opened.map_err(|error| thread_lost(&error.to_string()))?;
    opened.map_err(|error| error.report("no agent is started"))
}

/// Without them all agents are in the default partition.
async fn open_partitions(gpu: &Gpu, db: &Db, configured: Configured, board: &Arc<Board>) {
    let (gpu, db) = (gpu.clone(), db.clone());
    let what = "partitions of devices are not in force";
    let opened = tokio::task::spawn_blocking(move || gpu.open(db, configured)).await;
    let report = match opened {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.report(what),
        Err(error) => Report::bug("thread_lost", what, error.to_string(), "reboot the appliance"),
    };
    board.set("partitions", Weight::Degraded, report);
}

/// Without the key no token is verified, and without a token no agent runs.
async fn open_tokens(db: &Db, places: &Places) -> Result<Tokens, Report> {
    let (db, folder) = (db.clone(), places.state_agentd.clone());
    let opened = tokio::task::spawn_blocking(move || {
        let key = tokens::open_key(&TwoFiles { folder }).map_err(|error| tokens::key_report(&error))?;
        let tokens = Tokens::open(key, db).map_err(|error| error.report("no agent is started"))?;
        tokens.settle()?;
        Ok(tokens)
    });
    opened.await.map_err(|error| thread_lost(&error.to_string()))?
}

/// What is decided meanwhile waits in memory, so that nobody waits for the key's file. Without a key agents run all
/// the same: their walls do not depend on the log.
async fn keep_audit(audit: Audit, db: Db, places: Places, board: Arc<Board>) {
    let on_board = Arc::clone(&board);
    let opened = tokio::task::spawn_blocking(move || {
        let signer = audit::open_key(&TwoFiles { folder: places.state_agentd })
            .map_err(|error| audit::key_report(&error))?;
        audit.keep(db, signer, on_board)
    });
    let report = match opened.await {
        Ok(Ok(())) => return,
        Ok(Err(report)) => report,
        Err(error) => {
            let what = "the audit log is not kept";
            Report::bug("thread_lost", what, error.to_string(), "reboot the appliance")
        }
    };
    board.set("audit", Weight::Degraded, report);
}

/// What agentd itself writes to. The engine reads models with its own uid.
fn make_folders(places: &Places) -> io::Result<()> {
    // What an installation left that was broken off.
    if let Err(error) = std::fs::remove_dir_all(places.incoming())
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    for folder in [places.models(), places.logs()] {
        match DirBuilder::new().mode(0o755).create(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(io::Error::new(error.kind(), format!("{}: {error}", folder.display())));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Landlock knows folders by what is mounted there when the walls go up: when the data partition comes later,
/// agentd begins again, and init starts it.
async fn end_when_data_comes(places: Places, over: CancellationToken) {
    let device = |path: &Path| std::fs::metadata(path).map(|data| data.dev()).ok();
    let before = device(&places.data);
    loop {
        tokio::select! {
            () = over.cancelled() => return,
            () = tokio::time::sleep(LOOK_AGAIN) => {}
        }
        if device(&places.data) != before {
            tracing::info!("the data partition has come: agentd begins again");
            over.cancel();
        }
    }
}

/// Serves the console until agentd is told to end. `open` is told when it is served, or cannot be yet.
async fn serve_people(
    machine: Machine,
    state: &Path,
    mut entrance: Entrance,
    init: Init,
    board: Arc<Board>,
    open: CancellationToken,
    over: CancellationToken,
) {
    let files: Arc<dyn StateFiles> = Arc::new(TwoFiles { folder: state.to_owned() });
    let port = entrance.port;
    let mut shown = AgentdReport { https_port: port, ..AgentdReport::default() };
    let (auth, authority, listener) = loop {
        match open_console(&files, &mut entrance, &machine.audit).await {
            Ok(opened) => break opened,
            Err(report) => {
                open.cancel();
                board.set("console", Weight::Broken, report);
                shown.health = board.health();
                shown.problems = board.problems();
                let _ = init.report(shown.clone()).await;
            }
        }
        tokio::select! {
            () = over.cancelled() => return,
            () = tokio::time::sleep(LOOK_AGAIN) => {}
        }
    };
    board.clear("console");
    let refreshed = refresh(&authority, Vec::new()).await;
    note_certificate(&board, refreshed);
    let tls = match authority.tls_config() {
        Ok(tls) => tls,
        Err(error) => {
            open.cancel();
            return board.set("console", Weight::Broken, error.report());
        }
    };
    tokio::spawn(follow_addresses(Arc::clone(&authority), init.clone(), Arc::clone(&board)));
    shown.fingerprint = authority.fingerprint().to_owned();
    tokio::spawn(report_to_init(shown, Arc::clone(&auth), Arc::clone(&board), init));
    let appliance: Arc<dyn Appliance> = Arc::new(machine);
    tracing::info!(port, "the console is served");
    open.cancel();
    serve_tls(listener, tls, router(appliance, auth), over).await;
}

async fn open_console(
    files: &Arc<dyn StateFiles>,
    entrance: &mut Entrance,
    audit: &Audit,
) -> Result<(Arc<Auth>, Arc<Authority>, TcpListener), Report> {
    let (for_files, audit) = (Arc::clone(files), audit.clone());
    let opened = tokio::task::spawn_blocking(move || {
        let auth = Auth::open(Arc::clone(&for_files), boot_clock()).map_err(|error| error.report())?;
        let auth = auth.witnessed_by(move |attempt| audit.report(audit::entrance(&attempt)));
        let authority = Authority::open(for_files).map_err(|error| error.report())?;
        Ok::<_, Report>((Arc::new(auth), Arc::new(authority)))
    });
    let what = "the console is not served";
    let opened = opened
        .await
        .map_err(|error| Report::bug("thread_lost", what, error.to_string(), "reboot the appliance"))?;
    let (auth, authority) = opened?;
    let port = entrance.port;
    let listener = entrance.listener.take().map_or_else(|| listen(port), Ok);
    let listener = listener.and_then(TcpListener::from_std).map_err(|error| {
        Report::environment(
            "port_taken",
            what,
            format!("port {port}: {error}"),
            "set another `[console] port` in agentd.toml, or reboot the appliance",
        )
    })?;
    Ok((auth, authority, listener))
}

/// One socket for both families, unless the kernel has no IPv6.
fn listen(port: u16) -> io::Result<std::net::TcpListener> {
    let everywhere = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let listener = match std::net::TcpListener::bind(everywhere) {
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error()) => {
            std::net::TcpListener::bind(("0.0.0.0", port))
        }
        other => other,
    }?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

async fn refresh(authority: &Arc<Authority>, addresses: Vec<IpAddr>) -> Result<(), Report> {
    let authority = Arc::clone(authority);
    let now_unix_s = clock::unix_ms() / 1000;
    let refreshed = tokio::task::spawn_blocking(move || authority.refresh(&addresses, now_unix_s)).await;
    match refreshed {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(error.report()),
        Err(error) => Err(Report::bug(
            "thread_lost",
            "the certificate is old",
            error.to_string(),
            "reboot the appliance",
        )),
    }
}

fn note_certificate(board: &Board, refreshed: Result<(), Report>) {
    match refreshed {
        Ok(()) => board.clear("certificate"),
        Err(report) => board.set("certificate", Weight::Degraded, report),
    }
}

/// Keeps the certificate fitting the machine's addresses and clock.
async fn follow_addresses(authority: Arc<Authority>, init: Init, board: Arc<Board>) {
    loop {
        let addresses: Vec<IpAddr> = match init.status().await {
            Ok(system) => {
                system.addresses.iter().filter_map(|text| text.split('/').next()?.parse().ok()).collect()
            }
            Err(_) => Vec::new(),
        };
        let pause = if addresses.is_empty() { ADDRESSES_SOON } else { ADDRESSES_EVERY };
        if !addresses.is_empty() {
            let refreshed = refresh(&authority, addresses).await;
            note_certificate(&board, refreshed);
        }
        tokio::time::sleep(pause).await;
    }
}

/// Tells init what the local console shows, whenever it changes and once a minute.
async fn report_to_init(mut shown: AgentdReport, auth: Arc<Auth>, board: Arc<Board>, init: Init) {
    let mut changed = board.watch();
    // A claim ends the code's life without a change on the board.
    let mut look = tokio::time::interval(Duration::from_secs(2));
    let mut sent: Option<(AgentdReport, tokio::time::Instant)> = None;
    loop {
        shown.claim_code = auth.claim_code();
        shown.health = board.health();
        shown.problems = board.problems();
        let due = sent.as_ref().is_none_or(|(last, at)| *last != shown || at.elapsed() >= REPORT_EVERY);
        if due {
            match init.report(shown.clone()).await {
                Ok(()) => sent = Some((shown.clone(), tokio::time::Instant::now())),
                Err(error) => tracing::debug!(%error, "init was not told"),
            }
        }
        tokio::select! {
            alive = changed.changed() => if alive.is_err() { return },
            _ = look.tick() => {}
        }
    }
}

fn walls_left_down() -> Report {
    Report::environment(
        "own_walls_down",
        "agentd is not shut in",
        "it was started with `--unconfined`",
        "start it without; this is for developers' machines only",
    )
}
