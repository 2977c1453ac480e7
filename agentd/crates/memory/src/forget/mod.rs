//! What is worth keeping, and what goes first?
//!
//! Rules, not a model: each file is one rule as a pure function over numbers and texts, with its properties tested.
//! What they decide is done in `write/`, in the transaction of the work that asked, and written into the journal.
//!
//! | file | decides |
//! |---|---|
//! | `salience.rs` | how much an item of a run deserves to be kept |
//! | `promote.rs` | which items of a run that ended go to the long memory, and as what |
//! | `duplicate.rs` | whether two texts are one memory |
//! | `supersede.rs` | which of two claims about the same thing holds when |
//! | `decay.rs` | how present a record is now, and what being recalled does to it |
//! | `evict.rs` | what goes when a budget is full |
//! | `trust.rs` | how far a source is believed, and what it may not say |
//!
//! Never: a language model, a clock, a file.

pub(crate) mod decay;
pub(crate) mod duplicate;
pub(crate) mod evict;
pub(crate) mod promote;
pub(crate) mod salience;
pub(crate) mod supersede;
pub(crate) mod trust;
