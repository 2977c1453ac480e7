//! How does a message of a person reach an agent, and the answer the person?
//!
//! Owns:  who has been given which message, and the parts of answers that are being given.
//! In:    messages from the console; polls and replies from agents' runs.
//! Out:   to the agent one message at a time; to the person the parts of the answer as they come.
//! Always: a message is in the store before it is taken, and its answer before its end is told to anybody. A
//!         message is given out at least once, and again when the run that had it is gone: agents tell a
//!         repetition by its id.
//! Threads: any task; the mutex is never held across an await.

mod plan;

use crate::clock;
use crate::store::{Db, MessageRow, MessageState, Outcome, StoreError};
use agentd_domain::agent_api::{Message, ReplyPart};
use agentd_domain::fault::Report;
use agentd_domain::ids::{AgentId, RunId};
use futures::{Stream, StreamExt, stream};
use plan::{LEASE_MS, Lease, Pick};
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// Without any part of the answer for so long, the person is told that it takes longer.
const PATIENCE: Duration = Duration::from_secs(300);
/// The longest answer that is kept.
const ANSWER_MOST_BYTES: usize = 512 * 1024;
pub const TEXT_MOST_BYTES: usize = 32 * 1024;

pub type Parts = Pin<Box<dyn Stream<Item = ReplyPart> + Send + 'static>>;

/// All agents' messages. Cheap to clone.
#[derive(Clone)]
pub struct Inbox {
    db: Db,
    boxes: Arc<Mutex<HashMap<AgentId, AgentBox>>>,
}

#[derive(Default)]
struct AgentBox {
    leases: HashMap<u64, Lease>,
    talks: HashMap<u64, Arc<Talk>>,
    wake: Arc<Notify>,
}

/// An answer that is being given. It only grows, so a reader needs no more than a position.
struct Talk {
    parts: Mutex<Vec<ReplyPart>>,
    grown: watch::Sender<usize>,
}

impl Default for Talk {
    fn default() -> Self {
        Self { parts: Mutex::default(), grown: watch::channel(0).0 }
    }
}

impl Talk {
    fn push(&self, part: ReplyPart) {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        parts.push(part);
        let count = parts.len();
        drop(parts);
        self.grown.send_replace(count);
    }

    fn begun(&self) -> bool {
        !self.parts.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    fn get(&self, at: usize) -> Option<ReplyPart> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner).get(at).cloned()
    }
}

impl Inbox {
    pub fn new(db: Db) -> Self {
        Self { db, boxes: Arc::default() }
    }

    /// Queues a message. The stream ends with `Done` or `Failed`; `gone` tells when the agent will not answer
    /// any more. The message stays queued when the stream is dropped.
    pub async fn send(
        &self,
        agent: AgentId,
        text: String,
        key: Option<String>,
        gone: impl Future<Output = Report> + Send + 'static,
    ) -> Result<Parts, Report> {
        check_text(&text)?;
        let row = MessageRow {
            v: 1,
            from: "owner".to_owned(),
            text,
            sent_unix_ms: clock::unix_ms(),
            key,
            state: MessageState::Waiting,
        };
        let queued = self.db.call(move |store| {
            let seq = store.add_message(agent, &row)?;
            Ok((seq, store.message(agent, seq)?))
        });
        let (seq, stored) = queued.await.map_err(|error| error.report("the message was not taken"))?;
        if let Some(MessageRow { state: MessageState::Answered { outcome, .. }, .. }) = stored {
            return Ok(Box::pin(stream::iter(told_again(outcome))));
        }
        let (talk, wake) = self.with_box(agent, |agent_box| {
            (Arc::clone(agent_box.talks.entry(seq).or_default()), Arc::clone(&agent_box.wake))
        });
        wake.notify_one();
        Ok(listen(talk, gone))
    }

    /// The next message for this run; waits for one at most so long.
    pub async fn next(&self, agent: AgentId, run: RunId, wait: Duration) -> Result<Option<Message>, Report> {
        let deadline = tokio::time::Instant::now() + wait;
        let wake = self.with_box(agent, |agent_box| Arc::clone(&agent_box.wake));
        loop {
            // Registered before looking, so that a message that comes in between is not missed.
            let woken = wake.notified();
            tokio::pin!(woken);
            woken.as_mut().enable();
            if let Some(message) =
                self.take(agent, run).await.map_err(|error| error.report("no message was given"))?
            {
                return Ok(Some(message));
            }
            if tokio::time::timeout_at(deadline, woken).await.is_err() {
                return Ok(None);
            }
        }
    }

    async fn take(&self, agent: AgentId, run: RunId) -> Result<Option<Message>, StoreError> {
        loop {
            let waiting = self.db.call(move |store| store.waiting_messages(agent)).await?;
            let now_boot_ms = clock::boot_ms();
            let pick = self.with_box(agent, |agent_box| {
                let pick = plan::pick(&waiting, &agent_box.leases, run, now_boot_ms);
                if let Pick::Deliver(seq) = pick {
                    agent_box.leases.insert(seq, Lease { run, until_boot_ms: now_boot_ms + LEASE_MS });
                }
                pick
            });
            match pick {
                Pick::Nothing => return Ok(None),
                Pick::GiveUp(seq) => self.settle(agent, seq, Outcome::Failed { report: given_up() }).await?,
                Pick::Deliver(seq) => {
                    let delivered = self.db.call(move |store| {
                        let row = store.deliver_message(agent, seq)?;
                        Ok((row, store.messages_before(agent, seq, plan::HISTORY_TURNS * 2)?))
                    });
                    let (row, before) = match delivered.await {
                        Ok(delivered) => delivered,
                        Err(error) => {
                            self.release(agent, seq, run);
                            return Err(error);
                        }
                    };
                    let talk = self.talk(agent, seq);
                    if talk.begun() {
                        talk.push(ReplyPart::Note {
                            text: "the agent was restarted and begins again".to_owned(),
                        });
                    }
                    return Ok(Some(Message {
                        id: seq.to_string(),
                        history: plan::history(&before, &row.from),
                        from: row.from,
                        text: row.text,
                        sent_unix_ms: row.sent_unix_ms,
                    }));
                }
            }
        }
    }

    /// Takes an agent's answer, part by part. Ok only when the answer's end is in the store.
    pub async fn reply(
        &self,
        agent: AgentId,
        run: RunId,
        id: &str,
        mut parts: impl Stream<Item = Result<ReplyPart, Report>> + Send + Unpin,
    ) -> Result<(), Report> {
        let what = "the reply was not taken";
        let seq: u64 = id.parse().map_err(|_| StoreError::NoMessage(id.to_owned()).report(what))?;
        self.may_reply(agent, run, seq).await?;
        let talk = self.talk(agent, seq);
        let (mut text, mut notes) = (String::new(), Vec::new());
        let outcome = loop {
            let part = match parts.next().await {
                Some(Ok(part)) => part,
                Some(Err(report)) => {
                    self.release(agent, seq, run);
                    return Err(report);
                }
                None => {
                    self.release(agent, seq, run);
                    return Err(unfinished());
                }
            };
            match part {
                ReplyPart::Text { text: more } => {
                    text.push_str(&more);
                    talk.push(ReplyPart::Text { text: more });
                }
                ReplyPart::Note { text: note } => {
                    notes.push(note.clone());
                    talk.push(ReplyPart::Note { text: note });
                }
                ReplyPart::Done => break Outcome::Done { text, notes },
                ReplyPart::Failed { report } => break Outcome::Failed { report },
            }
            if text.len() + notes.iter().map(String::len).sum::<usize>() > ANSWER_MOST_BYTES {
                self.release(agent, seq, run);
                return Err(too_long());
            }
        };
        self.settle(agent, seq, outcome).await.map_err(|error| error.report(what))
    }

    /// Messages from before this agentd that are not answered.
    pub fn know(&self, agent: AgentId, waiting: &[u64]) {
        if !waiting.is_empty() {
            self.with_box(agent, |agent_box| {
                for seq in waiting {
                    agent_box.talks.entry(*seq).or_default();
                }
            });
        }
    }

    /// How many messages wait for an agent, or were given to it and are not answered.
    pub fn work(&self, agent: AgentId) -> u32 {
        let boxes = self.boxes();
        let count = boxes.get(&agent).map_or(0, |agent_box| {
            let only_leased = agent_box.leases.keys().filter(|seq| !agent_box.talks.contains_key(seq));
            agent_box.talks.len() + only_leased.count()
        });
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// An agent that is removed: whoever waits for its answers is told by `gone` of [`Inbox::send`].
    pub fn forget(&self, agent: AgentId) {
        self.boxes().remove(&agent);
    }

    async fn may_reply(&self, agent: AgentId, run: RunId, seq: u64) -> Result<(), Report> {
        let what = "the reply was not taken";
        let row =
            self.db.call(move |store| store.message(agent, seq)).await.map_err(|error| error.report(what))?;
        let row = row.ok_or_else(|| StoreError::NoMessage(seq.to_string()).report(what))?;
        let leased = self.with_box(agent, |agent_box| agent_box.leases.get(&seq).copied());
        // Without a lease agentd was restarted while the agent was thinking: its answer is as good as before.
        let elsewhere = leased.is_some_and(|lease| lease.run != run);
        if row.state != MessageState::Waiting || elsewhere {
            return Err(Report::caller(
                "conflict",
                what,
                format!("message {seq} is answered already, or was given to another run"),
                "ask for the next message",
            ));
        }
        self.with_box(agent, |agent_box| {
            agent_box.leases.insert(seq, Lease { run, until_boot_ms: clock::boot_ms() + LEASE_MS });
        });
        Ok(())
    }

    /// Stores how the message ended, then tells those who listen.
    async fn settle(&self, agent: AgentId, seq: u64, outcome: Outcome) -> Result<(), StoreError> {
        let stored = outcome.clone();
        self.db.call(move |store| store.answer_message(agent, seq, stored, clock::unix_ms())).await?;
        let talk = self.with_box(agent, |agent_box| {
            agent_box.leases.remove(&seq);
            agent_box.talks.remove(&seq)
        });
        if let Some(talk) = talk {
            talk.push(match outcome {
                Outcome::Done { .. } => ReplyPart::Done,
                Outcome::Failed { report } => ReplyPart::Failed { report },
            });
        }
        Ok(())
    }

    /// The run did not finish: the next poll, of whichever run, gets the message again.
    fn release(&self, agent: AgentId, seq: u64, run: RunId) {
        let wake = self.with_box(agent, |agent_box| {
            if agent_box.leases.get(&seq).is_some_and(|lease| lease.run == run) {
                agent_box.leases.remove(&seq);
            }
            Arc::clone(&agent_box.wake)
        });
        wake.notify_one();
    }

    fn talk(&self, agent: AgentId, seq: u64) -> Arc<Talk> {
        self.with_box(agent, |agent_box| Arc::clone(agent_box.talks.entry(seq).or_default()))
    }

    fn with_box<T>(&self, agent: AgentId, use_it: impl FnOnce(&mut AgentBox) -> T) -> T {
        use_it(self.boxes().entry(agent).or_default())
    }

    fn boxes(&self) -> MutexGuard<'_, HashMap<AgentId, AgentBox>> {
        self.boxes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn listen(talk: Arc<Talk>, gone: impl Future<Output = Report> + Send + 'static) -> Parts {
    struct Ear {
        talk: Arc<Talk>,
        grown: watch::Receiver<usize>,
        at: usize,
        gone: Pin<Box<dyn Future<Output = Report> + Send>>,
        over: bool,
    }
    let grown = talk.grown.subscribe();
    let ear = Ear { talk, grown, at: 0, gone: Box::pin(gone), over: false };
    Box::pin(stream::unfold(ear, |mut ear| async move {
        if ear.over {
            return None;
        }
        loop {
            if let Some(part) = ear.talk.get(ear.at) {
                ear.at += 1;
                ear.over = matches!(part, ReplyPart::Done | ReplyPart::Failed { .. });
                return Some((part, ear));
            }
            let failed = tokio::select! {
                biased;
                grown = tokio::time::timeout(PATIENCE, ear.grown.changed()) => match grown {
                    Ok(Ok(())) => continue,
                    Ok(Err(_)) | Err(_) => slow(),
                },
                report = &mut ear.gone => report,
            };
            ear.over = true;
            return Some((ReplyPart::Failed { report: failed }, ear));
        }
    }))
}

fn told_again(outcome: Outcome) -> Vec<ReplyPart> {
    match outcome {
        Outcome::Done { text, notes } => {
            let mut parts: Vec<_> = notes.into_iter().map(|text| ReplyPart::Note { text }).collect();
            parts.extend([ReplyPart::Text { text }, ReplyPart::Done]);
            parts
        }
        Outcome::Failed { report } => vec![ReplyPart::Failed { report }],
    }
}

fn check_text(text: &str) -> Result<(), Report> {
    let what = "the message was not taken";
    if text.trim().is_empty() {
        return Err(Report::caller("message_empty", what, "it holds no text", "write something"));
    }
    if text.len() > TEXT_MOST_BYTES {
        return Err(Report::caller(
            "too_large",
            what,
            format!("it has {} bytes", text.len()),
            format!("keep to {TEXT_MOST_BYTES} bytes"),
        ));
    }
    Ok(())
}

fn slow() -> Report {
    Report::environment(
        "timeout",
        "the agent has not answered",
        format!("nothing came for {} s", PATIENCE.as_secs()),
        "the message is kept and will be answered; `agentctl agent logs NAME` shows what the agent does",
    )
}

fn given_up() -> Report {
    Report::environment(
        "message_given_up",
        "the message was not answered",
        format!("the agent ended {} times while it had it", plan::ATTEMPTS_MOST),
        "`agentctl agent logs NAME` shows how it ended; send the message again when that is mended",
    )
}

fn unfinished() -> Report {
    Report::caller(
        "reply_unfinished",
        "the reply was not taken",
        "it ended without `done` or `failed`",
        "end the reply with {\"type\":\"done\"}; the message will be given out again",
    )
}

fn too_long() -> Report {
    Report::caller(
        "too_large",
        "the reply was not taken",
        format!("it has more than {ANSWER_MOST_BYTES} bytes"),
        "answer more briefly; the message will be given out again",
    )
}

#[cfg(test)]
mod tests;
