//! How is a pull ordered and followed?
//!
//! Always: it lasts as long as somebody listens; who gives the order again goes on with what has come. One record in the
//!         audit log for each order, when it ends.

use super::PullOrder;
use crate::appliance::Machine;
use crate::audit::Order;
use agentd_console::Flow;
use agentd_domain::api::{ModelName, PullModel, PullPart};
use agentd_domain::fault::Report;
use futures::{StreamExt, stream};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// A person reads no faster.
const TELL_EVERY: Duration = Duration::from_millis(250);

/// Ends the pull when its listener goes.
struct Ends(AbortHandle);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Machine {
    pub(crate) fn model_pull(&self, name: ModelName, wish: &PullModel) -> Result<Flow<PullPart>, Report> {
        let order = PullOrder::new(&wish.url, wish.sha256.as_deref())?;
        let outside = self.parts()?.egress.clone();
        let (models, audit) = (self.models.clone(), self.audit.clone());
        let (parts, told) = mpsc::channel(16);
        // The address without its query: some carry a key there.
        let shown = wish.url.split(['?', '#']).next().unwrap_or_default();
        let about = Order { action: "model.pull", agent: None, about: format!("{name} from {shown}") };
        let task = tokio::spawn(async move {
            let last = Mutex::new(None::<Instant>);
            let progress = |bytes: u64, total_bytes: Option<u64>| {
                let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
                if last.is_none_or(|at| at.elapsed() >= TELL_EVERY) {
                    *last = Some(Instant::now());
                    // A listener that is slow misses some of it.
                    let _ = parts.try_send(PullPart::Progress { bytes, total_bytes });
                }
            };
            let pulled = audit.order(about, models.pull(&outside, &name, &order, &progress), |_, _| {}).await;
            let end = match pulled {
                Ok(model) => PullPart::Done { model },
                Err(report) => PullPart::Failed { report },
            };
            // Whoever ordered it has gone.
            let _ = parts.send(end).await;
        });
        let ends = Ends(task.abort_handle());
        let flow = stream::unfold((told, ends), |(mut told, ends)| async move {
            Some((told.recv().await?, (told, ends)))
        });
        Ok(flow.boxed())
    }
}
