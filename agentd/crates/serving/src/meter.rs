//! What did an answer use?
//!
//! Each answer of a model carries a [`Meter`] among its response's extensions. It is filled before the first byte of
//! the answer's end is given out: whoever mounts the router can hold the end back until it has entered what was used.
//! An answer that breaks off fills it never.

use std::sync::{Arc, OnceLock};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Used {
    pub model: String,
    pub prompt_tokens: u32,
    /// 0 for embeddings.
    pub completion_tokens: u32,
    /// Prompt tokens that needed no computing.
    pub cached_tokens: u32,
}

/// Cheap to clone; all clones show the same.
#[derive(Debug, Clone, Default)]
pub struct Meter(Arc<OnceLock<Used>>);

impl Meter {
    pub(crate) fn fill(&self, used: Used) {
        // An answer ends once.
        let _ = self.0.set(used);
    }

    pub fn used(&self) -> Option<&Used> {
        self.0.get()
    }
}
