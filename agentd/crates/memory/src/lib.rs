//! What did the agent live through, and what of it answers this question?
//!
//! One [`Store`] is one file: an agent's own memory, or later the shared knowledge. Texts are kept word for word;
//! no model is asked to write or to read. A record is found by its words, its meaning, its neighbours, its session, who
//! speaks, time and use ([`rank`]), each with a measured weight.
//!
//! Owns:    the file's format (`FORMAT.md` beside this crate), its key, its one writer thread, the index in memory.
//! In:      [`Remember`] and [`Recall`] as agents send them, and vectors that somebody else made.
//! Out:     answers of the agent API; errors with a [`Report`].
//! Always:  a record, its life, its postings, its vector, the journal and the counts are one transaction;
//!          acknowledged means on disk (`tests/kill.rs`, `src/tests/failing_disk.rs`). A store answers only for the
//!          agent it was made for. What is made of words or meaning is sealed (`seal.rs`).
//! Never:   an embedder, a network, an await, a language model. A question is not a write: recalling changes nothing
//!          on disk; who gave the hits to somebody says so with [`Store::used`].
//! Threads: everything here blocks. [`Store`] is `Send + Sync`; a call waits for the disk (remember, two fsyncs)
//!          or computes (recall, under a millisecond for 10,000 records). A [`Pool`] keeps the lately used stores of
//!          many agents open and closes the others.
//!
//! # What is kept where
//!
//! | tier | here it is |
//! |---|---|
//! | working | records of a session, word for word, found by words; a ring; gone a day after [`Store::end_session`] |
//! | active | blocks under a key ([`Store::set_block`]), written over the version their writer has seen |
//! | spirit | records with half-lives; when full, the least present become tombstones |
//! | knowledge | records that do not fade, in a store of their own ([`Budgets::knowledge`]) |
//!
//! # Forgetting
//!
//! [`Store::forget`] makes a tombstone, which [`Store::restore`] takes back for seven days, or purges. [`Store::sweep`],
//! every hour or so, does what time has come for and says until when [`Store::rewrite`] is due: it writes the store
//! anew under another key and destroys the old one. [`Store::journal`] and [`Store::history`] tell what went when and
//! why. The rules are in `forget/`.
//!
//! # How agentd uses it
//!
//! ```no_run
//! # use agentd_memory::*;
//! # use agentd_domain::agent_api::{Remember, Recall, Tier};
//! # fn embed(_: &str) -> Option<Embedding> { None }
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let (agent_id, owner_id) = (agentd_domain::ids::AgentId(Default::default()), agentd_domain::ids::OwnerId(Default::default()));
//! # let (digest, dimension, now_unix_ms) = ([0; 32], 384, 0);
//! // Once per agent, on a blocking thread; keep it in an Arc.
//! let options = Options::new(Identity { agent_id, owner_id }, Budgets::agent());
//! let store = Store::open("/data/agents/ID/memory.redb".as_ref(), options)?;
//!
//! // Whenever the embedding model is loaded: digest and dimension are the engine's `LoadedModel`.
//! if store.use_embedder(digest, dimension)?.pending > 0 {
//!     // A background task, until the batch is empty: embed, hand in; wait and retry when the engine is away.
//!     let batch = store.pending_batch(32)?;
//!     let made = |p: Pending| Some(Made { id: p.id, vector: embed(&p.text)?.vector, with: p.with });
//!     store.complete_pending(digest, batch.into_iter().filter_map(made).collect())?;
//!     // Then the same with the words of the records, each once.
//!     let words = store.pending_words(128)?;
//!     let vectors: Option<Vec<_>> = words.words.iter().map(|word| Some(embed(word)?.vector)).collect();
//!     if let Some(vectors) = vectors {
//!         store.complete_words(digest, words, vectors)?;
//!     }
//! }
//!
//! // A request: embed first if the engine answers within a moment, store in any case.
//! let request: Remember = serde_json::from_str(r#"{"tier":"spirit","text":"my sister is called Ana"}"#)?;
//! let mut new = NewRecord::new(request, now_unix_ms);
//! let window = store.window(new.request.tier, &new.request.text, &new.detail)?;
//! let embedding = embed(&window.text);
//! new.with = window.with;
//! let remembered = store.remember(new, embedding).map_err(|error| error.report())?;
//!
//! let request: Recall = serde_json::from_str(r#"{"query":"what is my sibling's name?"}"#)?;
//! let wanted = store.wanted(&request)?;
//! let vectors: Option<Vec<_>> = wanted.texts.iter().map(|text| Some(embed(text)?.vector)).collect();
//! let vectors = vectors.and_then(|vectors| wanted.with(digest, vectors));
//! let asked = Asked { now_unix_ms: Some(now_unix_ms), vectors, ..Asked::default() };
//! let recalled = store.answer(&request, &asked).map_err(|error| error.report())?;
//! # Ok(()) }
//! ```
//!
//! A state of `pending` in [`Remembered`] means that the background task has work.
//!
//! [`Remember`]: agentd_domain::agent_api::Remember
//! [`Recall`]: agentd_domain::agent_api::Recall
//! [`Remembered`]: agentd_domain::agent_api::Remembered
//! [`Report`]: agentd_domain::fault::Report
#![forbid(unsafe_code)]

mod cells;
mod check;
mod corpus;
mod error;
mod explain;
mod file;
mod forget;
mod index;
mod journal;
mod key;
mod life;
mod near;
mod pack;
pub mod plan;
mod pool;
mod postings;
pub mod rank;
mod read;
mod recall;
mod record;
mod rewrite;
mod rows;
mod run;
mod seal;
mod tables;
#[cfg(test)]
mod tests;
pub mod text;
mod vector;
mod vocabulary;
mod work;
mod write;

pub use check::Checked;
pub use error::{Damage, OpenError, Refusal, RefusedVector, StoreError};
pub use file::destroy;
pub use journal::{Deed, Entry, Why};
pub use life::{Life, State, Told};
pub use plan::{At, Budget, Budgets, Detail, Duplicates};
pub use pool::{Lease, Limits, Pool, PoolUse};
pub use read::{History, Listing, Pending, Stored, Window};
pub use recall::{Asked, QuestionVectors, Wanted};
pub use record::{Claim, Role, SourceKind};
pub use run::{NewRecord, Options, Store, Tuning};
pub use tables::{Counters, FORMAT_VERSION, Identity, TierCounts};
pub use vector::BadVector;
pub use vocabulary::PendingWords;
pub use write::{
    Block, Completed, EmbedderDigest, EmbedderUse, Embedding, ForgetMode, Made, RolledBack, SessionEnd,
    SessionEnded, Swept,
};
