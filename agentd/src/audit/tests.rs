use super::keep::Keeper;
use super::plan::Counted;
use super::*;
use crate::state_files::TwoFiles;
use crate::store::{AUDIT_MOST_BYTES, Store};
use agentd_audit::{At, Demands, FirstBad, Summary, verify};
use agentd_console::StateFiles;
use agentd_console::auth::{Attempt, Denied, Entrance};
use agentd_domain::audit::{Actor, Linked, Verdict};
use agentd_domain::ids::{AgentId, RunId};
use proptest::prelude::*;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use tempfile::TempDir;
use uuid::Uuid;

fn agent(n: u128) -> AgentId {
    AgentId(Uuid::from_u128(n))
}

fn asked(n: u128, right: &str, verdict: Verdict) -> Entry {
    Entry::new(Actor::Agent, "api.use", verdict).of_run(agent(n), RunId(Uuid::from_u128(1))).by_right(right)
}

fn at(boot_ms: u64) -> Now {
    Now { unix_ms: 0, boot_ms }
}

fn counts(batch: &[Counted]) -> Vec<(&str, u32)> {
    batch.iter().map(|counted| (counted.entry.right.as_deref().unwrap_or("-"), counted.count)).collect()
}

#[test]
fn the_first_is_written_at_once_and_its_repetitions_as_one() {
    let mut pending = Pending::default();
    for ms in 0..5 {
        pending.take(asked(1, "models", Verdict::Denied), at(ms));
    }
    assert_eq!(counts(&pending.drain(at(5))), [("models", 1)]);
    assert_eq!(pending.next_boot_ms(), Some(60_000));
    assert_eq!(counts(&pending.drain(at(59_999))), []);
    pending.take(asked(1, "models", Verdict::Allowed), at(59_999));
    assert_eq!(counts(&pending.drain(at(60_000))), [("models", 1), ("models", 4)]);
    // After a window without any, the next is a first one again.
    assert_eq!(pending.next_boot_ms(), None);
    pending.take(asked(1, "models", Verdict::Denied), at(500_000));
    assert!(pending.waits());
}

#[test]
fn an_agent_that_tries_everything_is_counted_and_crowds_out_nobody() {
    let mut pending = Pending::default();
    for n in 0..500 {
        pending.take(asked(1, &format!("egress {n}"), Verdict::Denied), at(n));
    }
    pending.take(asked(2, "models", Verdict::Denied), at(500));
    let batch = pending.drain(at(500));
    assert_eq!(batch.len(), 33);
    assert_eq!(counts(&batch).last(), Some(&("models", 1)));
    let rest = pending.drain_all(at(501));
    let [more] = rest.as_slice() else { panic!("one record of what is not kept: {rest:?}") };
    assert_eq!((more.entry.action.as_str(), more.entry.verdict), ("audit.overflow", Verdict::Denied));
    assert_eq!((more.entry.agent_id, more.count), (Some(agent(1)), 468));
}

#[test]
fn each_order_of_the_owner_is_a_record() {
    let mut pending = Pending::default();
    for _ in 0..3 {
        pending.take(Entry::new(Actor::Owner, "agent.start", Verdict::Allowed).detail("echo"), at(0));
    }
    assert_eq!(pending.drain(at(0)).len(), 3);
}

#[test]
fn what_could_not_be_written_comes_first_again() {
    let mut pending = Pending::default();
    pending.take(asked(1, "a", Verdict::Denied), at(0));
    pending.take(asked(1, "b", Verdict::Denied), at(0));
    let batch = pending.drain(at(0));
    pending.take(asked(1, "c", Verdict::Denied), at(0));
    pending.put_back(batch);
    assert_eq!(counts(&pending.drain(at(0))), [("a", 1), ("b", 1), ("c", 1)]);
}

proptest! {
    #[test]
    fn no_entry_is_lost(
        steps in prop::collection::vec((0u128..3, 0u8..60, any::<bool>(), any::<bool>(), 0u64..100_000), 0..400),
    ) {
        let mut pending = Pending::default();
        let (mut now, mut taken, mut written) = (0, [0u32; 3], [0u32; 3]);
        let mut add = |batch: Vec<Counted>| for counted in batch {
            written[usize::try_from(counted.entry.agent_id.expect("one").0.as_u128()).expect("small")] += counted.count;
        };
        for (who, right, denied, drain, pause_ms) in steps {
            let verdict = if denied { Verdict::Denied } else { Verdict::Allowed };
            pending.take(asked(who, &right.to_string(), verdict), at(now));
            taken[usize::try_from(who).expect("small")] += 1;
            now += pause_ms;
            if drain {
                add(pending.drain(at(now)));
            }
        }
        add(pending.drain_all(at(now)));
        prop_assert_eq!(taken, written);
    }
}

struct Scene {
    folder: TempDir,
    board: Arc<Board>,
}

fn signer(n: u8) -> Signer {
    Signer::from_seed(&[n; 32]).expect("32 bytes")
}

impl Scene {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a folder"), board: Arc::default() }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("system.redb")
    }

    fn db(&self) -> Db {
        Db::new(Store::open(&self.path()).expect("opens"))
    }

    fn keeper(&self, db: &Db, key: u8) -> (Audit, Keeper) {
        self.bounded(db, key, AUDIT_MOST_BYTES)
    }

    fn bounded(&self, db: &Db, key: u8, most_bytes: u64) -> (Audit, Keeper) {
        let (audit, board) = (Audit::default(), Arc::clone(&self.board));
        let keeper =
            Keeper::open_with(audit.clone(), db.clone(), signer(key), board, most_bytes).expect("opens");
        (audit, keeper)
    }
}

fn batch(right: &str, count: usize) -> Vec<Counted> {
    let one = |n| Counted { entry: asked(1, &format!("{right} {n}"), Verdict::Denied), count: 1, at: at(n) };
    (0..count as u64).map(one).collect()
}

/// What was found at the opening, as it will be written.
fn told(audit: &Audit) -> Vec<Counted> {
    audit.lock().pending.drain_all(now())
}

fn export(db: &Db) -> Vec<u8> {
    let mut whole = Vec::new();
    loop {
        let after = records(&whole).last().map_or(0, |linked| linked.record.seq);
        let query = AuditQuery { after: Some(after), most: 1000, agent: None };
        let page = db.here().audit_lines(&query).expect("read");
        let done = page.is_empty() || records(&page).is_empty();
        whole.extend(page);
        if done {
            return whole;
        }
    }
}

fn records(lines: &[u8]) -> Vec<Linked> {
    lines.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()
}

fn judge(db: &Db, key: u8) -> Result<Summary, FirstBad> {
    verify(&export(db), &Demands { key: Some(signer(key).key()), seen: None })
}

#[test]
fn a_power_cut_between_two_commits_loses_nothing_and_the_log_goes_on() {
    let scene = Scene::new();
    let db = scene.db();
    let (audit, mut keeper) = scene.keeper(&db, 1);
    keeper.write(&told(&audit), false).expect("written");
    for n in 1..=6u64 {
        // Without a head behind the last records: what follows the newest head is followed at the opening.
        keeper.write(&batch("before", 3), n % 3 == 0).expect("written");
        let after_cut = Scene::new();
        fs::copy(scene.path(), after_cut.path()).expect("copied");
        let again = after_cut.db();
        let (audit, mut keeper) = after_cut.keeper(&again, 1);
        assert_eq!(told(&audit), [], "nothing is wrong after commit {n}");
        keeper.write(&batch("after", 2), true).expect("written");
        let summary = judge(&again, 1).expect("whole");
        assert_eq!((summary.last_seq, summary.signed_seq), (1 + 3 * n + 2, 1 + 3 * n + 2));
        assert!(after_cut.board.problems().is_empty());
    }
}

#[test]
fn the_log_is_bounded_and_says_what_it_dropped() {
    const MOST_BYTES: u64 = 64 * 1024;
    let scene = Scene::new();
    let db = scene.db();
    let (_audit, mut keeper) = scene.bounded(&db, 1, MOST_BYTES);
    let mut first_before = 1;
    for n in 0..60 {
        keeper.write(&batch("flood", 20), n % 7 == 0).expect("written");
        let (records, heads, bytes) = db.here().audit_size();
        assert!(bytes <= MOST_BYTES, "{bytes} bytes in {records} records and {heads} heads");
        let summary = verify(&export(&db), &Demands { key: Some(signer(1).key()), seen: None });
        let summary = summary.expect("whole after each commit");
        assert!(summary.first_seq >= first_before);
        assert_eq!(summary.last_seq + 1 - summary.first_seq, records);
        first_before = summary.first_seq;
    }
    assert!(first_before > 500, "the oldest were dropped");
    drop(keeper);
    // Opened again it goes on where it was, and drops on.
    let (audit, mut keeper) = scene.bounded(&db, 1, MOST_BYTES);
    assert_eq!(told(&audit), []);
    keeper.write(&batch("later", 200), false).expect("written");
    assert!(judge(&db, 1).expect("whole").first_seq > first_before);
}

#[test]
fn a_spoiled_end_is_told_at_the_opening_and_named_for_ever() {
    let spoil: [fn(&Store, Vec<u8>); 3] = [
        |store, line| store.spoil_audit(5, Some(&[&line[..line.len() - 4], b"x\"}}"].concat())),
        |store, _| store.spoil_audit(5, None),
        |store, line| {
            store.spoil_audit(5, Some(&String::from_utf8_lossy(&line).replace("end 3", "end 9").into_bytes()))
        },
    ];
    for (case, spoil) in spoil.into_iter().enumerate() {
        let scene = Scene::new();
        let db = scene.db();
        let (_audit, mut keeper) = scene.keeper(&db, 1);
        keeper.write(&batch("head", 1), true).expect("written");
        keeper.write(&batch("end", 6), false).expect("written");
        drop(keeper);
        let lines = export(&db);
        let line =
            lines.split(|&byte| byte == b'\n').find(|line| line.windows(5).any(|part| part == b"end 3"));
        spoil(db.here(), line.expect("there").to_vec());
        let (audit, mut keeper) = scene.keeper(&db, 1);
        let told = told(&audit);
        assert_eq!(told[0].entry.action, "audit.damaged", "case {case}");
        assert!(told[0].entry.detail.contains("record 5"), "case {case}: {}", told[0].entry.detail);
        assert_eq!(scene.board.problems()[0].code, "audit_damaged");
        keeper.write(&told, true).expect("written");
        keeper.write(&batch("later", 3), true).expect("written");
        let at = judge(&db, 1).expect_err("spoiled").at;
        assert_eq!(at, At::Record { seq: 5 }, "case {case}");
        assert_eq!(records(&export(&db)).last().map(|last| last.record.seq), Some(11), "it is kept on");
    }
}

#[test]
fn another_key_is_told_and_takes_the_log_over() {
    let scene = Scene::new();
    let db = scene.db();
    let (_audit, mut keeper) = scene.bounded(&db, 1, 16 * 1024);
    for _ in 0..10 {
        keeper.write(&batch("old", 10), true).expect("written");
    }
    drop(keeper);
    let (audit, mut keeper) = scene.keeper(&db, 2);
    let told = told(&audit);
    assert_eq!(told[0].entry.action, "audit.key");
    assert!(told[0].entry.detail.contains(&signer(1).key().to_string()));
    keeper.write(&told, true).expect("written");
    assert!(judge(&db, 2).expect("whole").first_seq > 1);
    assert!(judge(&db, 1).is_err(), "whoever knows the old key is told");
}

#[test]
fn pages_together_are_the_log_and_filters_hold() {
    let scene = Scene::new();
    let db = scene.db();
    let (_audit, mut keeper) = scene.keeper(&db, 1);
    for _ in 0..5 {
        keeper.write(&batch("x", 7), true).expect("written");
    }
    let mut other = batch("y", 1);
    other[0].entry.agent_id = Some(agent(2));
    // An agent cannot pass its records off as another's.
    other[0].entry.detail = format!("\"agent_id\":\"{}\"", agent(1));
    keeper.write(&other, true).expect("written");
    let ask = |after, most, agent| db.here().audit_lines(&AuditQuery { after, most, agent }).expect("read");
    let mut pages = Vec::new();
    for after in (0..36).step_by(4) {
        pages.extend(ask(Some(after), 4, None));
    }
    assert_eq!(pages, ask(Some(0), 1000, None));
    let numbers = |lines: Vec<u8>| records(&lines).iter().map(|linked| linked.record.seq).collect::<Vec<_>>();
    assert_eq!(numbers(ask(None, 3, None)), [34, 35, 36]);
    assert_eq!(numbers(ask(None, 3, Some(agent(1)))), [33, 34, 35]);
    let of_other = ask(Some(0), 1000, Some(agent(2)));
    assert_eq!(of_other.iter().filter(|&&byte| byte == b'\n').count(), 1, "no heads");
    assert_eq!(numbers(of_other), [36]);
    assert_eq!(ask(Some(36), 10, None), b"");
    assert_eq!(ask(Some(u64::MAX), 10, None), b"");
}

#[tokio::test]
async fn what_is_reported_is_chained_signed_and_closed() {
    let scene = Scene::new();
    let db = scene.db();
    let audit = Audit::default();
    assert!(audit.head().await.is_err(), "not kept yet");
    // Before the store is there: it waits.
    audit.report(asked(1, "models", Verdict::Denied));
    audit.record(asked(1, "messages", Verdict::Allowed)).await;
    audit.keep(db.clone(), signer(1), Arc::clone(&scene.board)).expect("kept");
    audit.record(Entry::new(Actor::Owner, "agent.start", Verdict::Allowed).detail("echo")).await;
    assert_eq!(records(&export(&db)).len(), 4, "on the disk when `record` returns");
    let head = audit.head().await.expect("a head");
    assert_eq!(head.head.seq, 4);
    assert_eq!(judge(&db, 1).expect("whole").signed_seq, 4);
    assert_eq!(audit.head().await.expect("a head").head.seq, 4, "nothing new, nothing waited for");
    audit.report(asked(1, "models", Verdict::Denied));
    audit.close().await;
    let summary = judge(&db, 1).expect("whole");
    assert_eq!((summary.last_seq, summary.signed_seq), (5, 5), "the count was written, and signed");
    assert_eq!(summary.decisions.denied, 2);
    assert!(scene.board.problems().is_empty());
}

#[tokio::test]
async fn many_threads_report_and_every_decision_is_counted() {
    let scene = Scene::new();
    let db = scene.db();
    let audit = Audit::default();
    audit.keep(db.clone(), signer(1), Arc::clone(&scene.board)).expect("kept");
    std::thread::scope(|scope| {
        for who in 0..4 {
            let audit = audit.clone();
            scope.spawn(move || {
                for n in 0..500 {
                    audit.report(asked(who, &format!("right {}", n % 50), Verdict::Denied));
                }
            });
        }
    });
    audit.close().await;
    assert_eq!(judge(&db, 1).expect("whole").decisions.denied, 2000);
}

#[tokio::test]
async fn an_order_is_recorded_with_its_outcome() {
    let audit = Audit::default();
    let order = |about: &str| Order { action: "agent.start", agent: Some(agent(1)), about: about.to_owned() };
    let caller = Report::caller("conflict", "w", "y", "f");
    let environment = Report::environment("launcher_away", "w", "y", "f");
    let _ = audit.order(order(""), async { Ok(()) }, |(), order| order.about = "echo".to_owned()).await;
    let _ = audit.order::<()>(order("echo"), async { Err(caller) }, |_, _| {}).await;
    let _ = audit.order::<()>(order("echo"), async { Err(environment) }, |_, _| {}).await;
    let never = audit.order::<()>(order("echo"), std::future::pending(), |_, _| {});
    assert!(tokio::time::timeout(Duration::ZERO, never).await.is_err());
    let told: Vec<_> = audit.reported().into_iter().map(|(e, _)| (e.verdict, e.detail, e.agent_id)).collect();
    let expected = [
        (Verdict::Allowed, "echo"),
        (Verdict::Denied, "echo: conflict"),
        (Verdict::Allowed, "echo: launcher_away"),
        (Verdict::Allowed, "echo: nobody waited for its end"),
    ];
    assert_eq!(told, expected.map(|(verdict, detail)| (verdict, detail.to_owned(), Some(agent(1)))));
}

#[test]
fn who_comes_in_and_who_does_not_is_recorded_without_secrets() {
    let attempt = |entrance, denied| {
        let entry = super::entrance(&Attempt {
            entrance,
            peer: IpAddr::V6(Ipv4Addr::LOCALHOST.to_ipv6_mapped()),
            denied,
        });
        (entry.actor, entry.action, entry.verdict, entry.detail)
    };
    let in_ = (Actor::Owner, "claim".to_owned(), Verdict::Allowed, "from 127.0.0.1".to_owned());
    assert_eq!(attempt(Entrance::Claim, None), in_);
    let out = "from 127.0.0.1: unauthorized".to_owned();
    let out = (Actor::Stranger, "sign_in".to_owned(), Verdict::Denied, out);
    assert_eq!(attempt(Entrance::SignIn, Some(&Denied::PasswordWrong)), out);
}

#[test]
fn the_key_is_made_once_and_is_nobody_elses_to_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let files = TwoFiles { folder: folder.path().to_owned() };
    let made = open_key(&files).expect("made").key();
    assert_eq!(open_key(&files).expect("read").key(), made);
    for copy in fs::read_dir(folder.path()).expect("listed") {
        let mode = copy.expect("a copy").metadata().expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    files.write(key::KEY_FILE, b"{}").expect("written");
    assert!(open_key(&files).is_err(), "a damaged key is never replaced");
}
