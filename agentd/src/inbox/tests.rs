use super::*;
use crate::store::Store;
use std::future::pending;
use uuid::Uuid;

const AGENT: AgentId = AgentId(Uuid::from_u128(1));

struct Scene {
    folder: tempfile::TempDir,
    inbox: Inbox,
}

impl Scene {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let inbox = open(&folder);
        Self { folder, inbox }
    }

    /// As after a kill of agentd: what was in memory is gone.
    fn restarted(self) -> Self {
        let Self { folder, inbox } = self;
        drop(inbox);
        let inbox = open(&folder);
        Self { folder, inbox }
    }

    async fn send(&self, text: &str, key: Option<&str>) -> Parts {
        self.inbox.send(AGENT, text.to_owned(), key.map(str::to_owned), pending()).await.expect("taken")
    }

    async fn next(&self, run_number: u128) -> Option<Message> {
        self.inbox.next(AGENT, run(run_number), Duration::ZERO).await.expect("asked")
    }

    async fn reply(&self, run_number: u128, id: &str, parts: Vec<ReplyPart>) -> Result<(), Report> {
        self.inbox.reply(AGENT, run(run_number), id, stream::iter(parts.into_iter().map(Ok))).await
    }
}

fn open(folder: &tempfile::TempDir) -> Inbox {
    Inbox::new(Db::new(Store::open(&folder.path().join("system.redb")).expect("opens")))
}

fn run(n: u128) -> RunId {
    RunId(Uuid::from_u128(n))
}

fn text(text: &str) -> ReplyPart {
    ReplyPart::Text { text: text.to_owned() }
}

async fn heard(parts: Parts) -> String {
    let heard = parts.map(|part| match part {
        ReplyPart::Text { text } => text,
        ReplyPart::Note { text } => format!("({text})"),
        ReplyPart::Done => ".".to_owned(),
        ReplyPart::Failed { report } => format!("!{}", report.code),
    });
    heard.collect::<Vec<_>>().await.concat()
}

#[tokio::test]
async fn an_answer_comes_part_by_part_and_is_kept() {
    let scene = Scene::new();
    let parts = scene.send("hi", Some("k")).await;
    let message = scene.next(1).await.expect("a message");
    assert_eq!((message.text.as_str(), message.history.len()), ("hi", 0));
    assert!(scene.next(1).await.is_none(), "it is not given to the same run twice");
    let note = ReplyPart::Note { text: "n".to_owned() };
    scene.reply(1, &message.id, vec![note, text("he"), text("llo"), ReplyPart::Done]).await.expect("taken");
    assert_eq!(heard(parts).await, "(n)hello.");
    assert_eq!(heard(scene.send("hi", Some("k")).await).await, "(n)hello.", "a retry gets the same answer");
    let _parts = scene.send("more", None).await;
    let next = scene.next(1).await.expect("a message");
    let history: Vec<_> = next.history.iter().map(|turn| turn.content.as_str()).collect();
    assert_eq!(history, ["hi", "hello"]);
}

#[tokio::test]
async fn a_message_outlives_its_run_and_agentd() {
    let scene = Scene::new();
    drop(scene.send("hi", None).await);
    let first = scene.next(1).await.expect("a message");
    let second = scene.next(2).await.expect("the next run gets it");
    assert_eq!(first.id, second.id);
    let late = scene.reply(1, &first.id, vec![ReplyPart::Done]).await.expect_err("the first run is gone");
    assert_eq!(late.code, "conflict");
    let scene = scene.restarted();
    scene.reply(2, &second.id, vec![text("ok"), ReplyPart::Done]).await.expect("the run goes on");
    assert!(scene.next(2).await.is_none());
}

#[tokio::test]
async fn a_reply_that_breaks_off_is_asked_for_again() {
    let scene = Scene::new();
    let parts = scene.send("hi", None).await;
    let message = scene.next(1).await.expect("a message");
    let error = scene.reply(1, &message.id, vec![text("he")]).await.expect_err("no end");
    assert_eq!(error.code, "reply_unfinished");
    let again = scene.next(1).await.expect("given out again");
    assert_eq!(again.id, message.id);
    scene.reply(1, &again.id, vec![text("hello"), ReplyPart::Done]).await.expect("taken");
    assert_eq!(heard(parts).await, "he(the agent was restarted and begins again)hello.");
    let error = scene.reply(1, &again.id, vec![ReplyPart::Done]).await.expect_err("answered already");
    assert_eq!(error.code, "conflict");
}

#[tokio::test]
async fn a_message_that_ends_every_run_is_given_up() {
    let scene = Scene::new();
    let parts = scene.send("bad", None).await;
    for n in 0..u128::from(plan::ATTEMPTS_MOST) {
        assert!(scene.next(n).await.is_some());
    }
    assert!(scene.next(99).await.is_none());
    assert_eq!(heard(parts).await, "!message_given_up");
}

#[tokio::test]
async fn who_waits_is_told_when_the_agent_is_gone() {
    let scene = Scene::new();
    let gone = async { Report::environment("agent_stopped", "w", "y", "f") };
    let parts = scene.inbox.send(AGENT, "hi".to_owned(), None, gone).await.expect("taken");
    assert_eq!(heard(parts).await, "!agent_stopped");
    assert!(scene.next(1).await.is_some(), "the message is kept");
}

#[tokio::test]
async fn a_poll_wakes_up_for_a_message() {
    let scene = Scene::new();
    let inbox = scene.inbox.clone();
    let poll = tokio::spawn(async move { inbox.next(AGENT, run(1), Duration::from_secs(600)).await });
    tokio::task::yield_now().await;
    let _parts = scene.send("hi", None).await;
    let message = poll.await.expect("polled").expect("asked").expect("a message");
    assert_eq!(message.text, "hi");
}

#[tokio::test]
async fn nonsense_is_refused() {
    let scene = Scene::new();
    let send = |text: String| scene.inbox.send(AGENT, text, None, pending());
    assert_eq!(send(" \n".to_owned()).await.err().map(|r| r.code).as_deref(), Some("message_empty"));
    assert_eq!(
        send("x".repeat(TEXT_MOST_BYTES + 1)).await.err().map(|r| r.code).as_deref(),
        Some("too_large")
    );
    let error = scene.reply(1, "no number", vec![]).await.expect_err("unknown");
    assert_eq!(error.code, "not_found");
}
