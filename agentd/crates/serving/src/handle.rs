//! What must an engine be able to do so that it can be served?
//!
//! agentd's engine client implements [`EngineHandle`]; tests use one fake. Futures are boxed so that the trait
//! can be an object: the front is compiled once.

use agentd_domain::engine::{Done, Generate, ModelKind};
use agentd_domain::fault::Report;
use futures::Stream;
use std::future::Future;
use std::pin::Pin;

/// An answer that is being worked on. Dropping it gives the request up.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = Result<T, Report>> + Send + 'a>>;

/// What a generation says, in order. Ends after [`Piece::Done`] or an error. Dropping it before means what
/// [`Leaving`] says.
pub type Pieces = Pin<Box<dyn Stream<Item = Result<Piece, Report>> + Send + 'static>>;

#[derive(Debug, Clone, PartialEq)]
pub enum Piece {
    Text(String),
    Done(Done),
}

/// What a reader that goes away before the end means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leaving {
    /// Nobody can ask for it again: it is cancelled.
    Cancels,
    /// Its client gave a key and may come back with it: it goes on for a while.
    MayReturn,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Embeddings {
    /// One per input, of length 1.
    pub vectors: Vec<Vec<f32>>,
    pub tokens: u32,
}

/// A model that requests may name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedModel {
    pub name: String,
    pub kind: ModelKind,
    /// Whether `default` means this model, among those of its kind.
    pub default: bool,
    /// Length of an embedding vector; 0 while nobody knows, because the model was not loaded yet.
    pub dimension: u32,
}

pub trait EngineHandle: Send + Sync + 'static {
    /// The models that are there or come when they are named; empty while the engine starts. Never waits.
    fn models(&self) -> Vec<ServedModel>;

    /// Answers when the engine has taken the request. A key whose generation is alive attaches to it.
    fn generate(&self, request: Generate, leaving: Leaving) -> Pending<'_, Pieces>;

    fn embed(&self, model: String, inputs: Vec<String>) -> Pending<'_, Embeddings>;
}
