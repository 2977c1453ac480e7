//! What waits for the writer, and how is it answered?
//!
//! In:    a function of a [`Batch`]: what one request changes. Out: its result, sent to whoever waits.
//! Always: a result is sent once, after the end of the transaction is known. A refusal is that work's own answer;
//!         an error of the disk or a damaged file ends the transaction, and is everybody's answer.

use crate::error::StoreError;
use crate::write::Batch;
use std::sync::mpsc::SyncSender;

pub(crate) type Reply<T> = SyncSender<Result<T, StoreError>>;

/// One work whose result type is forgotten, so that works of all kinds stand in one queue.
pub(crate) trait Job: Send {
    /// Does the work inside the transaction. An error ends the transaction for all.
    fn apply(&mut self, batch: &mut Batch<'_>) -> Result<(), StoreError>;
    /// Tells the caller how it ended.
    fn acknowledge(self: Box<Self>, committed: Result<(), StoreError>);
    /// How much this adds to a transaction: a pile of large works must not delay a small one.
    fn bytes(&self) -> usize;
}

pub(crate) struct Work<T, F> {
    work: F,
    bytes: usize,
    outcome: Option<Result<T, StoreError>>,
    reply: Reply<T>,
}

impl<T, F> Work<T, F>
where
    F: FnMut(&mut Batch<'_>) -> Result<T, StoreError> + Send,
    T: Send,
{
    pub(crate) fn new(bytes: usize, work: F, reply: Reply<T>) -> Self {
        Self { work, bytes, outcome: None, reply }
    }
}

impl<T, F> Job for Work<T, F>
where
    F: FnMut(&mut Batch<'_>) -> Result<T, StoreError> + Send,
    T: Send,
{
    fn apply(&mut self, batch: &mut Batch<'_>) -> Result<(), StoreError> {
        let outcome = (self.work)(batch);
        match outcome {
            Err(error) if !matches!(error, StoreError::Refused(_)) => Err(error),
            outcome => {
                self.outcome = Some(outcome);
                Ok(())
            }
        }
    }

    fn acknowledge(self: Box<Self>, committed: Result<(), StoreError>) {
        let own = self.outcome.unwrap_or(Err(StoreError::Closing));
        // A caller that is gone has nothing to be told.
        drop(self.reply.send(committed.and(own)));
    }

    fn bytes(&self) -> usize {
        self.bytes
    }
}
