//! One life of the connection to the engine: what is open on it, and what the engine is busy with.
//!
//! Always: each request has one who waits for its answer; a generation holds its model ([`InUse`]) for as long as its
//!         pieces are read or may be read again.

use super::Command;
use super::plan::Choice;
use super::uses::InUse;
use super::wire::{WireError, Writer};
use agentd_domain::engine::{ClientFrame, Device, Event, LoadedModel, ModelUsage, Request};
use agentd_domain::fault::Report;
use agentd_serving::{Leaving, Piece};
use std::collections::HashMap;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// Generations of one caller that go on without a reader, for a client that may return. More are cancelled: a caller
/// that leaves again and again must not fill the engine.
const ALONE_MOST: usize = 4;

/// One life of the connection.
pub(super) struct Session {
    writer: Writer,
    /// Which life: what was asked in an earlier one is not this one's.
    pub(super) life: u64,
    pub(super) devices: Vec<Device>,
    pub(super) loaded: Vec<LoadedModel>,
    /// Of each model, as the engine said before the last load.
    pub(super) usage: Vec<ModelUsage>,
    pub(super) busy: Option<Busy>,
    /// When what the engine is busy with will not be waited for any longer.
    pub(super) busy_until: Option<Instant>,
    /// What it held when it was reached is counted among what stays.
    pub(super) adopted: bool,
    /// How often room was made for the model that is to be loaded.
    pub(super) rounds: u32,
    pub(super) open: HashMap<u64, Open>,
    last_id: u64,
}

pub(super) enum Busy {
    /// How are devices and models used?
    Asking(Choice),
    /// May it be loaded? Asked aside, so that the answers of other models flow on.
    Admitting(Choice),
    Loading(Choice, Instant),
    Unloading(String),
}

/// Whether a generation's pieces are still read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reading {
    Here,
    /// It may come back with the same key, and then reads from the first piece again.
    Away,
}

/// Who waits for the answer to a frame.
pub(super) enum Open {
    One(oneshot::Sender<Result<Event, Report>>),
    Generation {
        key: String,
        ticket: u64,
        pieces: mpsc::UnboundedSender<Result<Piece, Report>>,
        reader: Reading,
        /// Its model stays until it is over.
        _held: InUse,
    },
    Models,
    Usage,
    Cancel,
}

impl Open {
    pub(super) fn fail(self, report: Report) {
        match self {
            Self::One(answer) => drop(answer.send(Err(report))),
            Self::Generation { pieces, .. } => drop(pieces.send(Err(report))),
            Self::Models | Self::Usage | Self::Cancel => {}
        }
    }
}

impl Session {
    /// The model that is on its way.
    pub(super) fn loading(&self) -> Option<&str> {
        match &self.busy {
            Some(Busy::Asking(choice) | Busy::Admitting(choice) | Busy::Loading(choice, _)) => {
                Some(&choice.name)
            }
            Some(Busy::Unloading(_)) | None => None,
        }
    }

    pub(super) fn new(life: u64, writer: Writer, devices: Vec<Device>, loaded: Vec<LoadedModel>) -> Self {
        Self {
            writer,
            life,
            devices,
            loaded,
            usage: Vec::new(),
            busy: None,
            busy_until: None,
            adopted: false,
            rounds: 0,
            open: HashMap::new(),
            last_id: 0,
        }
    }

    pub(super) async fn send(&mut self, body: Request, open: Open) -> Result<(), WireError> {
        self.last_id += 1;
        self.open.insert(self.last_id, open);
        self.writer.send(&ClientFrame { id: self.last_id, body }).await
    }

    pub(super) async fn give(&mut self, command: Command) -> Result<(), WireError> {
        match command {
            Command::One { request, answer } => self.send(request, Open::One(answer)).await,
            Command::Generate { generate, pieces, ticket, held } => {
                let key = generate.key.clone();
                let open = Open::Generation { key, ticket, pieces, reader: Reading::Here, _held: held };
                self.send(Request::Generate(generate), open).await
            }
            Command::GiveUp { ticket, leaving } => self.give_up(ticket, leaving).await,
            // The task's own.
            Command::Have { .. } | Command::Drain { .. } | Command::Reconsider => Ok(()),
        }
    }

    /// Cancels a generation unless its reader may return, or somebody else reads it too: a retry attaches to the one
    /// it repeats.
    async fn give_up(&mut self, gone: u64, leaving: Leaving) -> Result<(), WireError> {
        let found = self.open.iter().find_map(|(id, open)| match open {
            Open::Generation { key, ticket, .. } if *ticket == gone => Some((*id, key.clone())),
            _ => None,
        });
        let Some((id, key)) = found else { return Ok(()) };
        if leaving == Leaving::MayReturn && self.alone_of(caller_of(&key)) < ALONE_MOST {
            if let Some(Open::Generation { reader, .. }) = self.open.get_mut(&id) {
                *reader = Reading::Away;
            }
            return Ok(());
        }
        self.open.remove(&id);
        let shared = self
            .open
            .values()
            .any(|open| matches!(open, Open::Generation { key: other, .. } if *other == key));
        if shared {
            return Ok(());
        }
        self.send(Request::Cancel { key }, Open::Cancel).await
    }

    /// How many generations of this caller go on without a reader.
    fn alone_of(&self, caller: &str) -> usize {
        let alone = |open: &&Open| matches!(open, Open::Generation { key, reader: Reading::Away, .. } if caller_of(key) == caller);
        self.open.values().filter(alone).count()
    }
}

/// A key begins with its caller.
fn caller_of(key: &str) -> &str {
    key.split('/').next().unwrap_or(key)
}
