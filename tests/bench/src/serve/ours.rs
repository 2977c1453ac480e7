//! agentd beside the peer: the real launcher, agentd, engine and jails, on this machine's kernel.
//!
//! Each client is an agent of its own, known by the socket it comes through: its jail's `/run/agentd.sock`, which the
//! load generator reaches through `/proc/PID/root`. So a request takes the whole way that an agent's takes: agentd's
//! front, its rights, its records, the engine's socket.
//!
//! agentd has no setting for the size of a model's cache; it takes the engine's own, 4096 cells. A benchmark with more
//! agents than that loads the model itself, over the engine's own socket and under the name that agentd would give it,
//! and starts agentd again, which takes over what the engine holds. Nothing else differs from the appliance but
//! what this kernel lacks (controllers of cgroup v2, quotas).

use super::client::{Ask, Place, get};
use super::processes;
use agentd_domain::engine::{
    ClientFrame, Event, LoadModel, ModelKind, PROTOCOL_VERSION, Request, ServerFrame,
};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tests_host::scene::{LIMIT, Package, Programs, Scene};

/// Half a billion weights from a slow disk.
const LOAD_WITHIN: Duration = Duration::from_secs(180);

pub struct Ours {
    scene: Scene,
    /// Of each agent, in the order of their names.
    places: Vec<Place>,
    engine_pid: i32,
    model: String,
}

impl Ours {
    /// With `agents` agents that do nothing by themselves and one model; `idle` is the program they run.
    pub fn start(
        programs: &Programs,
        idle: &Path,
        model: &Path,
        cells: u32,
        sequences: u32,
        agents: usize,
    ) -> Result<Self> {
        let packages: Vec<Package> = (0..agents).map(|number| package(number, idle)).collect();
        let mut scene = Scene::new(programs.clone(), &packages).map_err(anyhow::Error::msg)?;
        scene.start_launcher();
        let begun = scene.start_agentd();
        ensure!(
            scene.hear_runs(agents, begun + LIMIT).is_some(),
            "the agents did not start:\n{}",
            scene.tail()
        );
        let socket = scene.at("run/agentd/engines/host.sock");
        scene.until("the engine's socket is there", || socket.exists());
        let name = model.file_stem().and_then(|name| name.to_str()).context("a model has a name")?.to_owned();
        let placed = scene.at("data/models").join(format!("{name}.gguf"));
        // A link where both are on one file system: half a gigabyte need not be copied.
        if fs::hard_link(model, &placed).is_err() {
            fs::copy(model, &placed).with_context(|| format!("copying to {}", placed.display()))?;
        }
        load(&socket, &name, &placed, cells, sequences)?;
        scene.kill_agentd();
        let begun = scene.start_agentd();
        let Some((runs, _)) = scene.hear_runs(agents, begun + LIMIT) else {
            bail!("the agents were not taken over:\n{}", scene.tail());
        };
        ensure!(agents > 0, "somebody must ask");
        let mut named = Vec::new();
        for run in runs.values() {
            named.push(own_socket(run.pid)?);
        }
        named.sort_by(|(a, _), (b, _)| a.cmp(b));
        let places: Vec<Place> = named.into_iter().map(|(_, place)| place).collect();
        let engine = processes::children(scene.launcher_pid(), "agentd-engine");
        let engine_pid = *engine.first().context("no engine runs below the launcher")?;
        let ours = Self { scene, places, engine_pid, model: name };
        ours.await_model(&ours.model)?;
        Ok(ours)
    }

    /// Each agent's way in.
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// A way past agentd, for a share of the model that no agent has by itself.
    pub fn past_agentd(&self, share: Value) -> Place {
        Place::Engine { socket: self.engine_socket(), model: self.model.clone(), share }
    }

    /// What the engine says it did with this model since it was loaded.
    pub fn usage(&self) -> Result<Value> {
        let status = match Engine::connect(&self.engine_socket())?.ask(Request::Status)? {
            Event::Status(status) => serde_json::to_value(status)?,
            other => bail!("no status: {other:?}"),
        };
        let models = status["usage"].as_array().context("this engine does not say what it did")?;
        let own = models.iter().find(|usage| usage["model"] == self.model.as_str());
        own.cloned().with_context(|| format!("the engine does not know {}", self.model))
    }

    fn engine_socket(&self) -> PathBuf {
        self.scene.at("run/agentd/engines/host.sock")
    }

    pub fn engine_pid(&self) -> i32 {
        self.engine_pid
    }

    pub fn said(&self) -> String {
        self.scene.tail()
    }

    fn await_model(&self, name: &str) -> Result<()> {
        let begun = Instant::now();
        loop {
            let listed = get(&self.places[0], "/v1/models");
            let there = listed.as_ref().is_ok_and(|listed| {
                listed["data"].as_array().is_some_and(|models| models.iter().any(|model| model["id"] == name))
            });
            // Which model is the default shows a moment later.
            let asked = there.then(|| Ask::new(&self.places[0], tests_models::words(1, 8), 1).run());
            if asked.as_ref().is_some_and(|told| told.failed.is_none()) {
                return Ok(());
            }
            ensure!(
                begun.elapsed() < LOAD_WITHIN,
                "agentd does not serve {name}: {listed:?}, {asked:?}\n{}",
                self.scene.tail()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// `/run/agentd.sock` of the jail that this run's process is in, and the agent's name, to sort by.
fn own_socket(pid: i32) -> Result<(String, Place)> {
    let socket = PathBuf::from(format!("/proc/{pid}/root/run/agentd.sock"));
    ensure!(socket.exists(), "process {pid} has no /run/agentd.sock");
    let place = Place::Unix(socket);
    let own = get(&place, "/agent/v1/self").context("agentd does not say who this agent is")?;
    Ok((own["name"].as_str().unwrap_or_default().to_owned(), place))
}

fn package(number: usize, idle: &Path) -> Package {
    let name = format!("client-{number:02}");
    let manifest = format!(
        "schema = 1\n[agent]\nname = \"{name}\"\nversion = \"1.0.0\"\nexec = [\"/agent/bin/idle\"]\n\
         [model]\nuse = \"default\"\n[limits]\nmemory_high = \"8M\"\nmemory_max = \"8M\"\ndisk = \"1M\"\n\
         [messages]\naccept = true\n[restart]\npolicy = \"always\"\n"
    );
    Package { name, program: idle.to_owned(), manifest }
}

/// Has the engine load a model with this many cells.
fn load(socket: &Path, name: &str, path: &Path, cells: u32, sequences: u32) -> Result<()> {
    let mut engine = Engine::connect(socket)?;
    let load = LoadModel {
        model: name.to_owned(),
        path: path.to_str().context("a plain path")?.to_owned(),
        kind: ModelKind::Chat,
        context_tokens: cells,
        sequences,
        placement: None,
    };
    match engine.ask(Request::Load(load))? {
        Event::Loaded(loaded) if loaded.context_tokens >= cells => Ok(()),
        other => bail!("the engine did not load {name} with {cells} cells: {other:?}"),
    }
}

/// A connection to the engine that speaks its frames.
struct Engine {
    stream: UnixStream,
    last_id: u64,
}

impl Engine {
    fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
        stream.set_read_timeout(Some(LOAD_WITHIN))?;
        let mut engine = Self { stream, last_id: 0 };
        match engine.ask(Request::Hello { version: PROTOCOL_VERSION })? {
            Event::Hello { .. } => Ok(engine),
            other => bail!("no hello from the engine: {other:?}"),
        }
    }

    /// One request, one answer.
    fn ask(&mut self, body: Request) -> Result<Event> {
        self.last_id += 1;
        let frame = serde_json::to_vec(&ClientFrame { id: self.last_id, body })?;
        self.stream.write_all(&u32::try_from(frame.len())?.to_le_bytes())?;
        self.stream.write_all(&frame)?;
        let mut length = [0; 4];
        self.stream.read_exact(&mut length)?;
        let mut answer = vec![0; u32::from_le_bytes(length) as usize];
        self.stream.read_exact(&mut answer)?;
        let answer: ServerFrame = serde_json::from_slice(&answer)?;
        Ok(answer.body)
    }
}
