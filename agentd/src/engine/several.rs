//! Several models of one engine: loaded on demand, sent away with care, back after a crash. The engine is a fake; who may
//! be loaded says a gate of the test's own.

use super::tests::{Scene, choice, generate, ready};
use super::{
    Ask, Device, Engine, EngineHandle, Gate, Generate, Leaving, ModelKind, Report, Stage, Terms, Verdict,
    Wanted,
};
use agentd_domain::enforcement::{DeviceLimit, LimitBy};
use agentd_domain::engine::ModelUsage;
use agentd_domain::launcher::Request;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Room for so many models beside the embedder; who goes is who was idle longest.
struct RoomFor {
    models: usize,
    asked: Mutex<Vec<Ask>>,
    not_loaded: Mutex<Vec<String>>,
}

impl RoomFor {
    fn new(models: usize) -> Arc<Self> {
        Arc::new(Self { models, asked: Mutex::default(), not_loaded: Mutex::default() })
    }
}

impl Gate for RoomFor {
    fn admit(&self, ask: Ask) -> BoxFuture<'static, Verdict> {
        let there = ask.loaded.iter().filter(|model| model.model != "minilm").count();
        let verdict = if ask.choice.name == "minilm" || there < self.models {
            Verdict::Load(None)
        } else {
            let may_go = ask.holders.iter().filter(|one| !one.busy && !one.pinned);
            may_go.max_by_key(|one| one.idle).map_or_else(
                || Verdict::Refused(full(&ask.choice.name)),
                |one| Verdict::MakeRoom(vec![one.model.clone()]),
            )
        };
        self.asked.lock().expect("unpoisoned").push(ask);
        // As slow as a thought.
        async move {
            tokio::time::sleep(Duration::from_millis(5)).await;
            verdict
        }
        .boxed()
    }

    fn not_loaded(&self, model: &str) {
        self.not_loaded.lock().expect("unpoisoned").push(model.to_owned());
    }
}

fn full(model: &str) -> Report {
    Report::environment("vram_budget_exceeded", format!("{model} was not loaded"), "full", "later")
}

fn wanted(chat: &[&str], pinned: &[&str]) -> Wanted {
    Wanted {
        embedder: Some(choice("minilm", "/minilm", ModelKind::Embedding)),
        chat: chat.iter().map(|name| choice(name, &format!("/{name}"), ModelKind::Chat)).collect(),
        embedding: Vec::new(),
        pinned: pinned.iter().map(|name| (*name).to_owned()).collect(),
    }
}

fn of(model: &str, key: &str, stop: &str) -> Generate {
    Generate { model: model.to_owned(), ..generate(key, stop) }
}

/// Asks, and reads the answer to its end.
async fn asked(engine: &Engine, model: &str, key: &str) -> Result<usize, Report> {
    let pieces = EngineHandle::generate(engine, of(model, key, ""), Leaving::Cancels);
    let pieces = tokio::time::timeout(Duration::from_secs(20), pieces).await.expect("an end")?;
    Ok(pieces.collect::<Vec<_>>().await.len())
}

fn unloads(scene: &Scene) -> Vec<String> {
    scene.seen.lock().expect("unpoisoned").unloads.clone()
}

#[tokio::test]
async fn a_model_is_loaded_when_it_is_named_once_for_all_who_wait() {
    let scene = Scene::new();
    let engine = scene.engine();
    engine.want(wanted(&["tiny", "code"], &[]));
    ready(&engine).await;
    assert_eq!(scene.loads(), ["minilm", "tiny"], "what nobody asks for is not loaded");
    let names: Vec<_> = engine.models().into_iter().map(|model| (model.name, model.default)).collect();
    let listed =
        [("tiny", true), ("code", false), ("minilm", true)].map(|(name, default)| (name.to_owned(), default));
    assert_eq!(names, listed, "what can be loaded can be named");
    let keys: Vec<String> = (0..20).map(|number| format!("k{number}")).collect();
    let all = keys.iter().map(|key| asked(&engine, "code", key));
    for answer in futures::future::join_all(all).await {
        assert_eq!(answer.expect("answered"), 3);
    }
    assert_eq!(scene.loads(), ["minilm", "tiny", "code"]);
    assert_eq!((engine.seen("code").inside, engine.seen("tiny").inside), (0, 0));
    assert!(engine.seen("code").last_unix_ms.is_some());
    let unknown = asked(&engine, "nobody", "k").await.expect_err("there is none");
    assert_eq!((unknown.code.as_str(), unknown.http_status()), ("not_found", 404));
}

#[tokio::test]
async fn who_is_idle_gives_way_and_who_works_or_is_pinned_does_not() {
    let scene = Scene::new();
    let gate = RoomFor::new(2);
    let engine = scene.engine_behind(gate.clone());
    engine.want(wanted(&["tiny", "code", "big"], &["big"]));
    ready(&engine).await;
    assert_eq!(scene.loads(), ["minilm", "big", "tiny"], "what is pinned, and the default");
    asked(&engine, "tiny", "a").await.expect("it is there");
    asked(&engine, "code", "b").await.expect("tiny goes");
    assert_eq!(unloads(&scene), ["tiny"]);
    // While it works it stays, and who wants its room is told so at once.
    let busy =
        EngineHandle::generate(&engine, of("code", "c", "hang"), Leaving::Cancels).await.expect("taken");
    let refused = asked(&engine, "tiny", "d").await.expect_err("nobody may go");
    assert_eq!((refused.code.as_str(), refused.http_status()), ("vram_budget_exceeded", 429));
    assert!(engine.view().failed.is_empty(), "it may be another answer in a moment");
    drop(busy);
    engine.status().await.expect("answered after what was before it");
    asked(&engine, "tiny", "e").await.expect("code goes");
    assert_eq!(unloads(&scene), ["tiny", "code"]);
    // Work that only the engine knows of, for a reader of an earlier agentd.
    let usage = ModelUsage { model: "tiny".to_owned(), running: 1, ..ModelUsage::default() };
    scene.seen.lock().expect("unpoisoned").usage = vec![usage];
    asked(&engine, "code", "f").await.expect_err("tiny works");
    assert_eq!(unloads(&scene), ["tiny", "code"]);
    let asks = gate.asked.lock().expect("unpoisoned");
    let last = asks.last().expect("asked");
    let holder = |name: &str| last.holders.iter().find(|one| one.model == name).expect("loaded").clone();
    assert!(holder("big").pinned && holder("minilm").pinned && !holder("tiny").pinned);
    assert!(holder("tiny").busy && !holder("big").busy);
}

#[tokio::test]
async fn a_further_embedding_model_comes_when_it_is_named_and_gives_way_like_any_other() {
    let scene = Scene::new();
    let engine = scene.engine_behind(RoomFor::new(1));
    let mut models = wanted(&["tiny"], &[]);
    models.embedding.push(choice("bge", "/bge", ModelKind::Embedding));
    engine.want(models);
    ready(&engine).await;
    assert_eq!(scene.loads(), ["minilm", "tiny"], "nobody named it");
    let served = |name: &str| engine.models().into_iter().find(|model| model.name == name).expect("served");
    let before = served("bge");
    assert_eq!((before.kind, before.default, before.dimension), (ModelKind::Embedding, false, 0));
    let texts = || vec!["a".to_owned(), "b".to_owned()];
    let (one, other) = futures::future::join(
        EngineHandle::embed(&engine, "bge".to_owned(), texts()),
        EngineHandle::embed(&engine, "bge".to_owned(), texts()),
    )
    .await;
    assert_eq!((one.expect("embedded").vectors.len(), other.expect("embedded").vectors.len()), (2, 2));
    assert_eq!(
        (scene.loads(), unloads(&scene)),
        (["minilm", "tiny", "bge"].map(str::to_owned).into(), vec!["tiny".to_owned()])
    );
    assert_eq!(served("bge").dimension, 2);
    // Memories go on with their own.
    assert_eq!(engine.view().embedder().expect("loaded").name, "minilm");
    asked(&engine, "tiny", "a").await.expect("the idle one goes for it");
    assert_eq!(unloads(&scene), ["tiny", "bge"]);
    EngineHandle::embed(&engine, "minilm".to_owned(), texts()).await.expect("it never went");
    let unknown =
        EngineHandle::embed(&engine, "nobody".to_owned(), texts()).await.expect_err("there is none");
    assert_eq!((unknown.code.as_str(), unknown.http_status()), ("not_found", 404));
}

#[tokio::test]
async fn a_file_that_is_refused_is_refused_to_all_who_wait_and_not_tried_again() {
    let scene = Scene::new();
    let gate = RoomFor::new(9);
    let engine = scene.engine_behind(gate.clone());
    let mut models = wanted(&["tiny"], &[]);
    models.chat.push(choice("bad", "/bad", ModelKind::Chat));
    engine.want(models);
    ready(&engine).await;
    let both = futures::future::join(asked(&engine, "bad", "a"), asked(&engine, "bad", "b")).await;
    for answer in [both.0, both.1, asked(&engine, "bad", "c").await] {
        assert_eq!(answer.expect_err("refused").code, "model_corrupt");
    }
    assert_eq!(scene.loads().iter().filter(|name| *name == "bad").count(), 1);
    assert_eq!(*gate.not_loaded.lock().expect("unpoisoned"), ["bad"]);
    assert!(engine.models().iter().all(|model| model.name != "bad"), "it cannot be named any more");
    asked(&engine, "tiny", "d").await.expect("others go on");
}

#[tokio::test]
async fn a_crash_fails_what_was_in_flight_and_who_comes_later_waits_for_the_next_engine() {
    let mut scene = Scene::new();
    let engine = scene.engine();
    engine.want(wanted(&["tiny", "code"], &[]));
    ready(&engine).await;
    asked(&engine, "code", "a").await.expect("answered");
    let mut flight =
        EngineHandle::generate(&engine, of("code", "b", "hang"), Leaving::Cancels).await.expect("taken");
    flight.next().await.expect("a piece").expect("a word");
    scene.kill_engine();
    let lost = flight.next().await.expect("an end").expect_err("it is lost");
    assert_eq!((lost.code.as_str(), lost.http_status()), ("engine_lost", 503));
    let mut view = engine.watch();
    view.wait_for(|view| matches!(view.stage, Stage::Down(_))).await.expect("alive");
    assert_eq!(engine.models().len(), 3, "they can be named while they are on their way back");
    let later = tokio::spawn({
        let engine = engine.clone();
        async move { asked(&engine, "code", "c").await }
    });
    scene.restart_engine();
    assert_eq!(later.await.expect("no panic").expect("answered"), 3);
    let view = ready(&engine).await;
    let mut back: Vec<_> = view.models.iter().map(|model| model.model.as_str()).collect();
    back.sort_unstable();
    assert_eq!(back, ["code", "minilm", "tiny"], "what was there is there again");
    let order = scene.loads().split_off(3);
    assert_eq!(order, ["minilm", "code", "tiny"], "and first what somebody waits for");
}

#[tokio::test]
async fn another_default_is_loaded_and_the_old_one_stays_until_its_room_is_wanted() {
    let scene = Scene::new();
    let engine = scene.engine_behind(RoomFor::new(2));
    engine.want(wanted(&["tiny"], &[]));
    ready(&engine).await;
    engine.want(wanted(&["mine", "tiny"], &[]));
    engine.watch().wait_for(|view| view.models.len() == 3).await.expect("alive");
    assert_eq!(engine.view().default_chat.as_deref(), Some("mine"));
    // A pin takes room like anything else, and what is removed goes.
    engine.want(wanted(&["mine", "tiny", "code"], &["code"]));
    engine
        .watch()
        .wait_for(|view| view.models.iter().any(|model| model.model == "code"))
        .await
        .expect("alive");
    assert_eq!(unloads(&scene).len(), 1);
    engine.want(wanted(&["code"], &["code"]));
    engine.watch().wait_for(|view| view.models.len() == 2).await.expect("alive");
}

#[tokio::test]
async fn a_machine_with_less_memory_than_the_ledger_knows_sends_the_idle_away_too() {
    let scene = Scene::new();
    let engine = scene.engine();
    engine.want(wanted(&["tiny", "code", "large"], &[]));
    ready(&engine).await;
    let busy =
        EngineHandle::generate(&engine, of("tiny", "a", "hang"), Leaving::Cancels).await.expect("taken");
    let refused = asked(&engine, "large", "b").await.expect_err("the only one that could go works");
    assert_eq!((refused.code.as_str(), refused.http_status()), ("memory_short", 503));
    drop(busy);
    engine.status().await.expect("answered after what was before it");
    asked(&engine, "code", "c").await.expect("answered");
    asked(&engine, "large", "d").await.expect("both go, one after the other");
    assert_eq!(unloads(&scene), ["tiny", "code"]);
}

/// Wants one limit of a device, and hears whether it is in force.
#[derive(Default)]
struct Limiting(Mutex<Vec<Result<usize, String>>>);

impl Gate for Limiting {
    fn admit(&self, _: Ask) -> BoxFuture<'static, Verdict> {
        async { Verdict::Load(None) }.boxed()
    }

    fn not_loaded(&self, _: &str) {}

    fn terms(&self, _: &[Device]) -> Terms {
        let limit = DeviceLimit { by: LimitBy::Nvml { uuid: "GPU-1".to_owned() }, bytes: 7 << 30 };
        Terms { limits: vec![limit], hidden: Vec::new() }
    }

    fn limited(&self, by: Result<&[DeviceLimit], &Report>) {
        let heard = by.map(<[_]>::len).map_err(|report| report.code.clone());
        self.0.lock().expect("unpoisoned").push(heard);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_begins_anew_held_to_its_share_before_it_holds_a_model() {
    let scene = Scene::new();
    let asked = super::testing::fake_launcher(&scene.launcher_socket());
    let gate = Arc::new(Limiting::default());
    let engine = scene.engine_behind(gate.clone());
    engine.want(wanted(&["tiny"], &[]));
    ready(&engine).await;
    let orders: Vec<String> = asked
        .lock()
        .expect("unpoisoned")
        .iter()
        .filter_map(|ask| match ask {
            Request::StartEngine(spec) => Some(format!("start with {}", spec.device_limits.len())),
            Request::StopEngine { set } => Some(format!("stop {set}")),
            _ => None,
        })
        .collect();
    assert_eq!(orders, ["start with 0", "stop host", "start with 1", "start with 1"]);
    assert_eq!(*gate.0.lock().expect("unpoisoned"), [Ok(1)]);
    // An agentd that comes later finds it so, and leaves it alone.
    drop(engine);
    let gate = Arc::new(Limiting::default());
    let engine = scene.engine_behind(gate.clone());
    engine.want(wanted(&["tiny"], &[]));
    ready(&engine).await;
    assert_eq!(*gate.0.lock().expect("unpoisoned"), [Ok(1)]);
    let stops = |ask: &&Request| matches!(ask, Request::StopEngine { .. });
    assert_eq!(asked.lock().expect("unpoisoned").iter().filter(stops).count(), 1);
    assert_eq!(scene.loads(), ["minilm", "tiny"]);
}

/// Terms that a test changes.
#[derive(Default)]
struct Changing {
    terms: Mutex<Terms>,
    in_force: Mutex<Vec<Result<usize, String>>>,
}

impl Changing {
    fn set(&self, limits: &[LimitBy], hidden: &[&str]) {
        let limit = |by: &LimitBy| DeviceLimit { by: by.clone(), bytes: 7 << 30 };
        let hidden = hidden.iter().map(|path| (*path).to_owned()).collect();
        *self.terms.lock().expect("unpoisoned") =
            Terms { limits: limits.iter().map(limit).collect(), hidden };
    }
}

impl Gate for Changing {
    fn admit(&self, _: Ask) -> BoxFuture<'static, Verdict> {
        async { Verdict::Load(None) }.boxed()
    }

    fn not_loaded(&self, _: &str) {}

    fn terms(&self, _: &[Device]) -> Terms {
        self.terms.lock().expect("unpoisoned").clone()
    }

    fn hidden(&self) -> Vec<String> {
        self.terms.lock().expect("unpoisoned").hidden.clone()
    }

    fn limited(&self, by: Result<&[DeviceLimit], &Report>) {
        let heard = by.map(<[_]>::len).map_err(|report| report.code.clone());
        self.in_force.lock().expect("unpoisoned").push(heard);
    }
}

fn orders(asked: &Mutex<Vec<Request>>) -> Vec<String> {
    let said = |ask: &Request| match ask {
        Request::StartEngine(spec) => {
            Some(format!("start with {} without {}", spec.device_limits.len(), spec.hidden.join(" ")))
        }
        Request::StopEngine { .. } => Some("stop".to_owned()),
        _ => None,
    };
    asked.lock().expect("unpoisoned").iter().filter_map(said).collect()
}

async fn in_time(what: &str, done: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(std::time::Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn to_be_reset() -> Report {
    Report::environment("device_unhealthy", "the engine begins anew", "XID 95", "send the request again")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_makes_way_finishes_what_it_has_begun_and_takes_nothing_new() {
    let mut scene = Scene::new();
    let asked_launcher = super::testing::fake_launcher(&scene.launcher_socket());
    let gate = Arc::new(Changing::default());
    let engine = scene.engine_behind(gate.clone());
    engine.want(wanted(&["tiny"], &[]));
    ready(&engine).await;
    // Somebody is at work, and says nothing on the connection.
    let inside = engine.have("tiny", super::Asker::default()).await.expect("there");
    gate.set(&[], &["/dev/nvidia0"]);
    let draining = tokio::spawn({
        let engine = engine.clone();
        async move { engine.drain(Duration::from_secs(60), to_be_reset()).await }
    });
    let mut view = engine.watch();
    view.wait_for(|view| view.stage == Stage::Loading).await.expect("alive");
    // Who comes now waits for the next one.
    let next = tokio::spawn({
        let engine = engine.clone();
        async move { asked(&engine, "tiny", "late").await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!draining.is_finished() && !next.is_finished(), "it was ended with work, or took more");
    assert!(!orders(&asked_launcher).contains(&"stop".to_owned()));
    // Its answer begins only now, with the model that it was let in for.
    let done = engine.generation(of("tiny", "mine", ""), Leaving::Cancels, inside).await.expect("taken");
    assert_eq!(done.collect::<Vec<_>>().await.len(), 3, "its whole answer");
    let drained = draining.await.expect("no panic").expect("told");
    assert_eq!(drained, super::Drained { broken_off: 0 });
    scene.restart_engine();
    assert_eq!(next.await.expect("no panic").expect("answered by the next one"), 3);
    let orders = orders(&asked_launcher);
    let stop = orders.iter().position(|order| order == "stop").expect("ended");
    assert!(
        orders[stop + 1..].iter().all(|order| order == "start with 0 without /dev/nvidia0"),
        "{orders:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_finish_in_time_is_told_to_come_again() {
    let mut scene = Scene::new();
    let _asked = super::testing::fake_launcher(&scene.launcher_socket());
    let engine = scene.engine();
    engine.want(wanted(&["tiny"], &[]));
    ready(&engine).await;
    let mut endless =
        EngineHandle::generate(&engine, of("tiny", "a", "hang"), Leaving::Cancels).await.expect("taken");
    endless.next().await.expect("a piece").expect("a word");
    let begun = std::time::Instant::now();
    let drained = engine.drain(Duration::from_millis(200), to_be_reset()).await.expect("told");
    assert_eq!(drained, super::Drained { broken_off: 1 });
    assert!(begun.elapsed() < Duration::from_secs(10), "it has an end");
    let told = endless.next().await.expect("an end").expect_err("broken off");
    assert_eq!((told.code.as_str(), told.http_status()), ("device_unhealthy", 503));
    assert!(told.why.contains("XID 95") && told.fix.contains("again"), "{told}");
    scene.restart_engine();
    ready(&engine).await;
    assert_eq!(asked(&engine, "tiny", "b").await.expect("it came again"), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guarantee_that_comes_later_holds_for_the_engine_that_lives() {
    let scene = Scene::new();
    let asked_launcher = super::testing::fake_launcher(&scene.launcher_socket());
    let gate = Arc::new(Changing::default());
    let engine = scene.engine_behind(gate.clone());
    engine.want(wanted(&["tiny"], &[]));
    ready(&engine).await;
    let busy =
        EngineHandle::generate(&engine, of("tiny", "a", "hang"), Leaving::Cancels).await.expect("taken");
    let last = || gate.in_force.lock().expect("unpoisoned").last().cloned();
    assert_eq!(last(), Some(Ok(0)));
    gate.set(&[LimitBy::Nvml { uuid: "GPU-1".to_owned() }], &[]);
    engine.reconsider().await;
    in_time("the group's limit is in force", || last() == Some(Ok(1))).await;
    assert!(!orders(&asked_launcher).contains(&"stop".to_owned()), "with its work going on");
    // What only a new process sees waits until nobody uses this one, and is not called in force before.
    gate.set(&[LimitBy::Mig { uuid: "MIG-1".to_owned() }], &[]);
    engine.reconsider().await;
    in_time("it is said that it waits", || last() == Some(Err("engine_conflict".to_owned()))).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!orders(&asked_launcher).contains(&"stop".to_owned()), "it has work");
    assert_eq!(asked(&engine, "tiny", "b").await.expect("and takes more"), 3);
    drop(busy);
    in_time("it begins anew", || orders(&asked_launcher).contains(&"stop".to_owned())).await;
    in_time("the new one is on its instance", || last() == Some(Ok(1))).await;
    assert_eq!(asked(&engine, "tiny", "c").await.expect("answered"), 3);
}
