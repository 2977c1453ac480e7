use super::*;
use agentd_domain::ids::{AgentId, RunId};
use agentd_domain::launcher::{ExitCause, ExitRecord};
use agentd_domain::paths;

pub(super) fn agent_row(store: &Store, n: u128, name: &str) -> AgentRow {
    AgentRow {
        v: 1,
        agent_id: AgentId(Uuid::from_u128(n)),
        owner_id: store.owner,
        name: name.parse().expect("a name"),
        version: "1.0.0".to_owned(),
        digest: "00".to_owned(),
        manifest: "[agent]".to_owned(),
        uid: store.next_uid().expect("a uid"),
        wanted: true,
        bundled: false,
        restarts: 0,
        installed_unix_ms: 5,
        parent: None,
        arguments: Vec::new(),
    }
}

fn request() -> RequestRow {
    RequestRow {
        v: 1,
        unix_ms: 1,
        path: "/x".to_owned(),
        key: None,
        model: "tiny".to_owned(),
        prompt_tokens: 1,
        completion_tokens: 1,
    }
}

fn message(text: &str, key: Option<&str>) -> MessageRow {
    MessageRow {
        v: 1,
        from: "owner".to_owned(),
        text: text.to_owned(),
        sent_unix_ms: 1,
        key: key.map(str::to_owned),
        state: MessageState::Waiting,
    }
}

pub(super) struct Scene {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

impl Scene {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("system.redb");
        Self { _folder: folder, path }
    }

    pub(super) fn open(&self) -> Store {
        Store::open(&self.path).expect("opens")
    }
}

#[test]
fn what_was_acknowledged_is_there_after_a_reopening() {
    let scene = Scene::new();
    let (owner, row, exit) = {
        let store = scene.open();
        let row = agent_row(&store, 1, "echo");
        store.add_agent(&row).expect("added");
        let exit = ExitRecord {
            run_id: RunId(Uuid::from_u128(9)),
            agent_id: row.agent_id,
            cause: ExitCause::OutOfMemory,
            started_boot_ms: 1,
            ended_boot_ms: 2,
            memory_peak_bytes: 3,
            forbidden: None,
        };
        store.end_run(&exit, 7).expect("entered");
        assert_eq!(store.add_message(row.agent_id, &message("hello", None)).expect("queued"), 1);
        (store.owner, row, exit)
    };
    let store = scene.open();
    assert_eq!(store.owner, owner);
    assert_eq!(store.agents().expect("read"), std::slice::from_ref(&row));
    assert_eq!(store.last_exits(row.agent_id, 5).expect("read"), [exit]);
    assert_eq!(store.waiting_messages(row.agent_id).expect("read"), [(1, 0)]);
    assert_eq!(store.message(row.agent_id, 1).expect("read"), Some(message("hello", None)));
}

#[test]
fn uids_and_names_are_never_given_twice() {
    let scene = Scene::new();
    let store = scene.open();
    let first = agent_row(&store, 1, "echo");
    store.add_agent(&first).expect("added");
    let second = agent_row(&store, 2, "echo");
    assert!(matches!(store.add_agent(&second), Err(StoreError::NameTaken(name)) if name == "echo"));
    store.remove_agent(&first).expect("removed");
    store.add_agent(&second).expect("the name is free again");
    assert_eq!((first.uid, second.uid), (paths::UID_AGENTS_FIRST, paths::UID_AGENTS_FIRST + 1));
    drop(store);
    assert_eq!(scene.open().next_uid().expect("a uid"), paths::UID_AGENTS_FIRST + 2);
}

#[test]
fn a_removed_agent_leaves_nothing_and_takes_nothing_of_others() {
    let scene = Scene::new();
    let store = scene.open();
    let (gone, stays) = (agent_row(&store, 1, "gone"), agent_row(&store, 2, "stays"));
    let kept = Kept {
        v: 1,
        unix_ms: 0,
        request: String::new(),
        status: 200,
        content_type: String::new(),
        body: Some("b".to_owned()),
    };
    for row in [&gone, &stays] {
        store.add_agent(row).expect("added");
        store.add_message(row.agent_id, &message("m", None)).expect("queued");
        store.settle(row.agent_id, &request(), Some(("POST /x/k", &kept))).expect("kept");
    }
    store.remove_agent(&gone).expect("removed");
    assert_eq!(store.agents().expect("read"), std::slice::from_ref(&stays));
    assert_eq!(store.waiting_messages(gone.agent_id).expect("read"), []);
    assert_eq!(store.message(gone.agent_id, 1).expect("read"), None);
    assert_eq!(store.kept(gone.agent_id, "POST /x/k", 1).expect("read"), None);
    assert_eq!(store.waiting_messages(stays.agent_id).expect("read").len(), 1);
    assert!(store.kept(stays.agent_id, "POST /x/k", 1).expect("read").is_some());
}

#[test]
fn a_message_with_a_known_key_is_the_same_message() {
    let scene = Scene::new();
    let store = scene.open();
    let agent = AgentId(Uuid::from_u128(1));
    let first = store.add_message(agent, &message("a", Some("k"))).expect("queued");
    assert_eq!(store.add_message(agent, &message("a", Some("k"))).expect("queued"), first);
    assert_ne!(store.add_message(agent, &message("a", Some("l"))).expect("queued"), first);
    assert_eq!(store.waiting_messages(agent).expect("read").len(), 2);
}

#[test]
fn the_first_answer_stays() {
    let scene = Scene::new();
    let store = scene.open();
    let agent = AgentId(Uuid::from_u128(1));
    let seq = store.add_message(agent, &message("a", None)).expect("queued");
    store.deliver_message(agent, seq).expect("counted");
    assert_eq!(store.waiting_messages(agent).expect("read"), [(seq, 1)]);
    let done = |text: &str| Outcome::Done { text: text.to_owned(), notes: vec![] };
    store.answer_message(agent, seq, done("one"), 1).expect("answered");
    let row = store.answer_message(agent, seq, done("two"), 2).expect("answered");
    assert_eq!(row.state, MessageState::Answered { outcome: done("one"), unix_ms: 1 });
    assert_eq!(store.waiting_messages(agent).expect("read"), []);
}

#[test]
fn old_messages_and_their_keys_are_forgotten_and_waiting_ones_are_not() {
    let scene = Scene::new();
    let store = scene.open();
    let agent = AgentId(Uuid::from_u128(1));
    let done = Outcome::Done { text: String::new(), notes: vec![] };
    let stays = store.add_message(agent, &message("waits", Some("waits"))).expect("queued");
    for n in 0..520 {
        let seq = store.add_message(agent, &message("a", Some(&format!("key {n}")))).expect("queued");
        store.answer_message(agent, seq, done.clone(), 1).expect("answered");
    }
    assert!(store.message(agent, stays).expect("read").is_some());
    assert!(store.message(agent, 2).expect("read").is_none());
    assert_eq!(store.add_message(agent, &message("waits", Some("waits"))).expect("queued"), stays);
    assert_eq!(store.add_message(agent, &message("a", Some("key 519"))).expect("queued"), 521);
    assert_eq!(
        store.add_message(agent, &message("a", Some("key 0"))).expect("queued"),
        522,
        "long forgotten"
    );
    let newest = store.messages_before(agent, 522, 3).expect("read");
    let keys: Vec<_> = newest.iter().filter_map(|row| row.key.as_deref()).collect();
    assert_eq!(keys, ["key 519", "key 518", "key 517"]);
}

#[test]
fn the_inbox_is_bounded_and_numbers_go_on() {
    let scene = Scene::new();
    let store = scene.open();
    let agent = AgentId(Uuid::from_u128(1));
    for _ in 0..messages::WAITING_MOST {
        store.add_message(agent, &message("a", None)).expect("queued");
    }
    assert!(matches!(store.add_message(agent, &message("a", None)), Err(StoreError::InboxFull { .. })));
    let done = Outcome::Done { text: String::new(), notes: vec![] };
    store.answer_message(agent, 1, done, 1).expect("answered");
    let next = store.add_message(agent, &message("a", None)).expect("queued");
    assert_eq!(next, messages::WAITING_MOST as u64 + 1);
}

#[test]
fn kept_answers_end_after_a_day() {
    let scene = Scene::new();
    let store = scene.open();
    let row = agent_row(&store, 1, "echo");
    store.add_agent(&row).expect("added");
    let agent = row.agent_id;
    let kept = |unix_ms| Kept {
        v: 1,
        unix_ms,
        request: "r".to_owned(),
        status: 200,
        content_type: "c".to_owned(),
        body: Some("b".to_owned()),
    };
    let keep = |place: &str, unix_ms| store.settle(agent, &request(), Some((place, &kept(unix_ms))));
    keep("k", 1000).expect("kept");
    let day_ms = 24 * 3600 * 1000;
    assert!(store.kept(agent, "k", 1000 + day_ms).expect("read").is_some());
    assert!(store.kept(agent, "k", 1001 + day_ms).expect("read").is_none());
    keep("l", 2000 + day_ms).expect("kept");
    assert!(store.kept(agent, "k", 1000).expect("read").is_none(), "what is over its time was dropped");
}

#[test]
fn a_newer_format_is_refused_by_name() {
    let scene = Scene::new();
    {
        let store = scene.open();
        store
            .write(|txn| {
                txn.open_table(META)?.insert("format", 99u32.to_le_bytes().as_slice())?;
                Ok(Ok(()))
            })
            .expect("written");
    }
    assert!(matches!(Store::open(&scene.path), Err(StoreError::Format { found: 99, .. })));
}

#[test]
fn an_agents_health_is_kept_with_its_agent() {
    use agentd_domain::health::{History, Note, Pain, Severity};
    let scene = Scene::new();
    let store = scene.open();
    let row = agent_row(&store, 1, "echo");
    let pain = Pain::of_agent("tool.broken", Severity::High, "no", 7).expect("a pain");
    let history = History {
        pains: vec![pain],
        notes: vec![Note { unix_ms: 8, text: "restarted".to_owned() }],
        ..History::default()
    };
    store.set_health(row.agent_id, history.clone(), 1).expect("nothing of nobody");
    assert_eq!(store.health(row.agent_id).expect("read"), History::default());
    store.add_agent(&row).expect("added");
    store.set_health(row.agent_id, history.clone(), 3).expect("kept");
    assert_eq!(store.agents().expect("read")[0].restarts, 3, "with the count of its restarts");
    drop(store);
    let store = scene.open();
    assert_eq!(store.health(row.agent_id).expect("read"), history);
    store.remove_agent(&row).expect("removed");
    assert_eq!(store.health(row.agent_id).expect("read"), History::default());
}
