//! Who waits for a model that is not loaded yet?
//!
//! Always: a queue with an end, and an end to each wait: who finds the queue full is told so at once, who has waited
//!         too long too. Who has gone is forgotten, and with the last of them the wish for the model.

use super::uses::{InUse, Uses};
use agentd_domain::fault::Report;
use agentd_domain::ledger::PartitionId;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// As many as the engine lets wait for a model that it has.
pub(super) const WAITING_MOST: usize = 256;
/// Programs that speak OpenAI's API give up after ten minutes; a load that takes longer goes on without them.
pub(super) const WAIT_MOST: Duration = Duration::from_secs(300);

/// For whom a model is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asker {
    /// Of its partition: models that were loaded for more important ones do not give way to it.
    pub priority: u8,
    pub partition: PartitionId,
}

impl Default for Asker {
    fn default() -> Self {
        Self { priority: 50, partition: PartitionId::default_partition() }
    }
}

#[derive(Default)]
pub(super) struct Waiting(Vec<Waiter>);

struct Waiter {
    model: String,
    asker: Asker,
    since: Instant,
    answer: oneshot::Sender<Result<InUse, Report>>,
}

pub(super) type Answer = oneshot::Sender<Result<InUse, Report>>;

impl Waiting {
    /// Behind those who wait already.
    pub(super) fn push(&mut self, model: String, asker: Asker, answer: Answer) {
        self.0.retain(|one| !one.answer.is_closed());
        if self.0.len() >= WAITING_MOST {
            let _ = answer.send(Err(full()));
            return;
        }
        self.0.push(Waiter { model, asker, since: Instant::now(), answer });
    }

    /// Those that are waited for, with the most important asker of each; the most important first, among equals who came
    /// first.
    pub(super) fn models(&self) -> Vec<(String, Asker)> {
        let mut all: Vec<(String, Asker)> = Vec::new();
        for one in self.0.iter().filter(|one| !one.answer.is_closed()) {
            match all.iter_mut().find(|(model, _)| *model == one.model) {
                Some((_, asker)) if asker.priority < one.asker.priority => *asker = one.asker.clone(),
                Some(_) => {}
                None => all.push((one.model.clone(), one.asker.clone())),
            }
        }
        all.sort_by_key(|(_, asker)| std::cmp::Reverse(asker.priority));
        all
    }

    /// It is there: everybody goes in.
    pub(super) fn came(&mut self, model: &str, uses: &Uses) {
        for one in self.take(|one| one.model == model) {
            if let Some(inside) = uses.enter(model) {
                // Who has gone meanwhile drops it, and is out again.
                let _ = one.answer.send(Ok(inside));
            }
        }
    }

    /// It will not come. How many were told.
    pub(super) fn fail(&mut self, model: &str, report: &Report) -> usize {
        let gone = self.take(|one| one.model == model);
        let told = gone.into_iter().filter_map(|one| one.answer.send(Err(report.clone())).ok());
        told.count()
    }

    /// Tells those who have waited so long.
    pub(super) fn fail_older(&mut self, than: Duration, report: &dyn Fn(&str) -> Report) {
        for one in self.take(|one| one.since.elapsed() >= than) {
            let why = report(&one.model);
            let _ = one.answer.send(Err(why));
        }
    }

    pub(super) fn expire(&mut self) {
        self.fail_older(WAIT_MOST, &|model| {
            Report::environment(
                "model_not_ready",
                "the request was not run",
                format!("the model {model} was not loaded within {} s", WAIT_MOST.as_secs()),
                "send it again: the model goes on loading; `agentctl model ls` shows how far it is",
            )
        });
    }

    /// When the next one has waited long enough.
    pub(super) fn next_end(&self) -> Option<Instant> {
        self.0.iter().map(|one| one.since + WAIT_MOST).min()
    }

    fn take(&mut self, which: impl Fn(&Waiter) -> bool) -> Vec<Waiter> {
        let (taken, kept) = std::mem::take(&mut self.0).into_iter().partition(which);
        self.0 = kept;
        taken
    }
}

fn full() -> Report {
    Report::environment(
        "queue_full",
        "the request was not run",
        format!("{WAITING_MOST} requests wait for models already"),
        "send it again in a moment",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asks(waiting: &mut Waiting, model: &str, priority: u8) -> oneshot::Receiver<Result<InUse, Report>> {
        let (answer, answered) = oneshot::channel();
        waiting.push(model.to_owned(), Asker { priority, ..Asker::default() }, answer);
        answered
    }

    #[tokio::test]
    async fn the_most_important_goes_first_and_everybody_gets_in_at_once() {
        let mut waiting = Waiting::default();
        let first = asks(&mut waiting, "a", 50);
        let (second, third) = (asks(&mut waiting, "b", 80), asks(&mut waiting, "a", 20));
        let order: Vec<_> = waiting.models().into_iter().map(|(model, by)| (model, by.priority)).collect();
        assert_eq!(order, [("b".to_owned(), 80), ("a".to_owned(), 50)]);
        drop(second);
        assert_eq!(waiting.models().len(), 1, "nobody wants it any more");
        let uses = Uses::default();
        uses.came("a", None);
        waiting.came("a", &uses);
        let inside = (first.await.expect("told").expect("in"), third.await.expect("told").expect("in"));
        assert_eq!(uses.seen("a").inside, 2);
        drop(inside);
        assert!(waiting.models().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn the_queue_and_each_wait_have_an_end() {
        let mut waiting = Waiting::default();
        let all: Vec<_> = (0..WAITING_MOST).map(|_| asks(&mut waiting, "a", 50)).collect();
        let refused = asks(&mut waiting, "b", 100).await.expect("told").expect_err("full");
        assert_eq!((refused.code.as_str(), refused.http_status()), ("queue_full", 429));
        tokio::time::advance(WAIT_MOST).await;
        waiting.expire();
        for one in all {
            let report = one.await.expect("told").expect_err("too late");
            assert_eq!((report.code.as_str(), report.http_status()), ("model_not_ready", 503));
        }
        assert_eq!(waiting.next_end(), None);
    }
}
