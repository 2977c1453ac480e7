//! How does a program that speaks OpenAI's API use the appliance's own models?
//!
//! Owns:  the shape of `/v1/chat/completions`, `/v1/completions`, `/v1/embeddings` and `/v1/models`.
//! In:    HTTP requests of one caller, whose identity the binary has established before ([`Front::caller`]).
//! Out:   calls of [`EngineHandle`]; answers and errors as OpenAI's clients expect them.
//! True:  parameters that this version does not know are tolerated; parameters that it knows and cannot
//!        honour are refused with an error that names them, never silently ignored.
//! Never: authentication, rights, budgets, records. Those belong to who mounts the router, which finds what an
//!        answer used in its [`Meter`].
//! Source: <https://platform.openai.com/docs/api-reference>, and what the `openai` Python package sends.
#![forbid(unsafe_code)]

mod choices;
mod error;
mod handle;
mod meter;
mod plan;
mod request;
mod response;
mod run;

pub use error::ApiError;
pub use handle::{Embeddings, EngineHandle, Leaving, Pending, Piece, Pieces, ServedModel};
pub use meter::{Meter, Used};
pub use run::{Front, router};
