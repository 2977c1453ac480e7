//! What will a model take, exactly, before anything is taken?
//!
//! llama.cpp counts it (`Request::Plan`), and ends its process over a file whose content lies. So it is asked in an engine
//! of a device set of its own, which holds nothing and lives for one question: its death is nobody's loss, and a file that
//! ends it never reaches the engine that holds everybody's models.
//!
//! Always: the process is gone when an answer is given, so what it took of a device is free for the load. Whatever the
//!         file does, there is an answer.

use super::gate::Terms;
use super::plan::{self, Choice};
use super::run::{DEATHS_MOST, killed_report, lost_report};
use super::wire::{self, WireError};
use agentd_domain::device::{MemoryPlan, Placement};
use agentd_domain::engine::{ClientFrame, Event, PROTOCOL_VERSION, Request};
use agentd_domain::fault::Report;
use agentd_domain::launcher::EngineSpec;
use agentd_sandbox::client::Launcher;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The device set of questions.
const SET: &str = "plan";
/// Counting takes tables and vocabulary, no weights and no cache.
const MEMORY_MOST_BYTES: u64 = 512 * 1024 * 1024;
/// Starting an engine and counting takes a second; under plain emulation some.
const LIMIT: Duration = Duration::from_secs(60);

/// Asks, one question at a time. Cheap to clone.
#[derive(Clone)]
pub struct Planner {
    launcher: Launcher,
    sockets: PathBuf,
    memory_max_bytes: u64,
    one: Arc<tokio::sync::Mutex<()>>,
}

/// Why there is no plan.
#[derive(Debug)]
pub enum Unplanned {
    /// The file's fault, or the machine's with this file.
    Refused(Report),
    /// Nobody could be asked: that says nothing about the file.
    Away(Report),
}

impl Planner {
    pub fn new(launcher: Launcher, sockets: PathBuf, engine_memory_bytes: u64) -> Self {
        let memory_max_bytes = engine_memory_bytes.min(MEMORY_MOST_BYTES);
        Self { launcher, sockets, memory_max_bytes, one: Arc::default() }
    }

    pub async fn plan(
        &self,
        choice: &Choice,
        placement: Option<Placement>,
        terms: &Terms,
    ) -> Result<MemoryPlan, Unplanned> {
        let _one = self.one.lock().await;
        let mut last = None;
        for _ in 0..DEATHS_MOST {
            self.begin(terms).await?;
            let asked = tokio::time::timeout(LIMIT, self.ask(choice, placement.clone())).await;
            self.end().await;
            match asked {
                Ok(Ok(Event::Plan(plan))) => return Ok(plan),
                Ok(Ok(Event::Error(report))) => return Err(Unplanned::Refused(report)),
                Ok(Ok(_)) => last = Some(Ended::Away(lost_report(&WireError::Closed))),
                Ok(Err(ended)) => last = Some(ended),
                Err(_) => {
                    last = Some(Ended::OfFile("the engine did not come to an end of counting what it takes"))
                }
            }
        }
        Err(match last {
            Some(Ended::OfFile(why)) => Unplanned::Refused(killed_report(&choice.name, why)),
            Some(Ended::Away(report)) => Unplanned::Away(report),
            None => Unplanned::Away(lost_report(&WireError::Closed)),
        })
    }

    /// A fresh process: what an agentd that died has left is ended first.
    async fn begin(&self, terms: &Terms) -> Result<(), Unplanned> {
        self.end().await;
        let launcher = self.launcher.clone();
        let spec = EngineSpec {
            set: SET.to_owned(),
            memory_max_bytes: self.memory_max_bytes,
            // What it sees is what the engine sees; it takes nothing that it would have to be held to.
            device_limits: terms.limits.iter().filter(|limit| limit.is_seen()).cloned().collect(),
            hidden: terms.hidden.clone(),
            software_devices: false,
        };
        match tokio::task::spawn_blocking(move || launcher.start_engine(spec)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(Unplanned::Away(error.into())),
            Err(_) => Err(Unplanned::Away(lost_report(&WireError::Closed))),
        }
    }

    async fn end(&self) {
        let launcher = self.launcher.clone();
        // There is none, or there is no launcher: then there is nothing to end.
        let _ = tokio::task::spawn_blocking(move || launcher.stop_engine(SET)).await;
    }

    async fn ask(&self, choice: &Choice, placement: Option<Placement>) -> Result<Event, Ended> {
        let away = |error: WireError| Ended::Away(lost_report(&error));
        let (mut reader, mut writer) =
            wire::connect(&self.sockets.join(format!("{SET}.sock"))).await.map_err(away)?;
        let hello = ClientFrame { id: 0, body: Request::Hello { version: PROTOCOL_VERSION } };
        writer.send(&hello).await.map_err(away)?;
        match reader.next().await.map_err(away)?.body {
            Event::Hello { version: PROTOCOL_VERSION, .. } => {}
            Event::Hello { version, .. } => return Err(away(WireError::Version { engine: version })),
            _ => return Err(away(WireError::Closed)),
        }
        let body = Request::Plan(plan::load(choice, placement));
        writer.send(&ClientFrame { id: 1, body }).await.map_err(away)?;
        // It was well until it looked at the file.
        let died = |_| Ended::OfFile("an engine ended while it counted what the file would take");
        reader.next().await.map(|frame| frame.body).map_err(died)
    }
}

enum Ended {
    OfFile(&'static str),
    Away(Report),
}
