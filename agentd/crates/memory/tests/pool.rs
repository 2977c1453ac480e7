//! Do many agents' stores fit into one process?

use agentd_domain::agent_api::{Recall, Remember, Tier};
use agentd_domain::ids::{AgentId, OwnerId};
use agentd_memory::{Budgets, Identity, Limits, NewRecord, OpenError, Options, Pool};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use uuid::Uuid;

fn options(agent: u128) -> Options {
    let identity =
        Identity { agent_id: AgentId(Uuid::from_u128(agent)), owner_id: OwnerId(Uuid::from_u128(1)) };
    Options::new(identity, Budgets::agent())
}

fn path(dir: &Path, agent: u128) -> PathBuf {
    dir.join(format!("{agent}.redb"))
}

fn told(text: &str) -> NewRecord {
    let request =
        Remember { tier: Tier::Spirit, text: text.to_owned(), role: None, source: None, event_unix_ms: None };
    NewRecord {
        request,
        recorded_unix_ms: 1,
        idempotency_key: None,
        detail: Default::default(),
        with: vec![],
    }
}

fn asked(query: &str) -> Recall {
    Recall {
        query: query.to_owned(),
        k: None,
        tiers: vec![],
        budget_tokens: None,
        explain: false,
        signals: None,
        neighbours: None,
    }
}

/// Threads, files and memory are the process's, so no two tests of this file run at once.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Of stores: others are the harness's.
fn writers() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names =
        tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default());
    names.filter(|name| name.trim() == "memory-writer").count()
}

/// Sixteen times more agents than may be open: everyone's memory answers, and never more than four are open.
#[test]
fn more_agents_than_open_stores() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { open: 4, ..Limits::default() };
    let pool = Pool::new(limits);
    let most_open = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for worker in 0..4u128 {
            let (pool, dir, most_open) = (pool.clone(), dir.path(), &most_open);
            scope.spawn(move || {
                for round in 0..2 {
                    for agent in (worker..64).step_by(4) {
                        let store = pool.lease(&path(dir, agent), || options(agent)).unwrap();
                        store.remember(told(&format!("agent{agent} round{round}")), None).unwrap();
                        most_open.fetch_max(pool.in_use().open, Ordering::SeqCst);
                    }
                }
            });
        }
    });
    assert!(most_open.load(Ordering::SeqCst) <= 4, "{most_open:?} stores were open");
    assert!(writers() <= 4, "closed stores leave no thread behind");
    for agent in 0..64 {
        let store = pool.lease(&path(dir.path(), agent), || options(agent)).unwrap();
        let own = store.recall(&asked(&format!("agent{agent}")), None).unwrap();
        assert_eq!(own.hits.len(), 2);
        let next = store.recall(&asked(&format!("agent{}", agent + 1)), None).unwrap();
        assert!(next.hits.is_empty(), "another agent's record");
        store.check().unwrap();
    }
}

#[test]
fn a_leased_store_is_never_closed_and_who_finds_no_room_is_told() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { open: 2, patience: Duration::from_millis(50), ..Limits::default() };
    let pool = Pool::new(limits);
    let first = pool.lease(&path(dir.path(), 1), || options(1)).unwrap();
    let again = pool.lease(&path(dir.path(), 1), || panic!("it is open")).unwrap();
    let _second = pool.lease(&path(dir.path(), 2), || options(2)).unwrap();
    let refused = pool.lease(&path(dir.path(), 3), || options(3)).unwrap_err();
    assert!(matches!(refused, OpenError::NoRoom { open: 2, .. }), "{refused:?}");
    assert_eq!(refused.report().code, "memory_busy");
    assert!(!pool.close(&path(dir.path(), 1)), "it is leased twice");
    drop(first);
    assert!(pool.lease(&path(dir.path(), 3), || options(3)).is_err(), "one lease is left");
    drop(again);
    let third = pool.lease(&path(dir.path(), 3), || options(3)).unwrap();
    third.remember(told("there was room"), None).unwrap();
    drop(third);
    assert!(pool.close(&path(dir.path(), 3)));
    assert_eq!(pool.in_use().open, 1);
}

#[test]
fn two_who_come_at_once_get_one_store() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::new(Limits::default());
    let opened = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let make = || {
                    opened.fetch_add(1, Ordering::SeqCst);
                    options(1)
                };
                pool.lease(&path(dir.path(), 1), make).unwrap().remember(told("one of eight"), None).unwrap();
            });
        }
    });
    assert_eq!(opened.load(Ordering::SeqCst), 1);
    let store = pool.lease(&path(dir.path(), 1), || options(1)).unwrap();
    assert_eq!(store.counters().unwrap().records(), 8);
}

#[test]
fn indexes_of_idle_stores_give_way() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::new(Limits { index_bytes: 1, ..Limits::default() });
    {
        let store = pool.lease(&path(dir.path(), 1), || options(1)).unwrap();
        store.remember(told("the index is large"), None).unwrap();
        store.recall(&asked("large"), None).unwrap();
        assert!(store.index_bytes() > 0);
        // Leased: its index stays although it is too large.
        drop(pool.lease(&path(dir.path(), 2), || options(2)).unwrap());
        assert!(store.index_bytes() > 0);
    }
    drop(pool.lease(&path(dir.path(), 3), || options(3)).unwrap());
    assert_eq!(pool.in_use().index_bytes, 0);
    let store = pool.lease(&path(dir.path(), 1), || options(1)).unwrap();
    assert_eq!(store.recall(&asked("large"), None).unwrap().hits.len(), 1);
}

#[test]
fn a_store_that_does_not_open_leaves_its_place() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(path(dir.path(), 1), b"no store").unwrap();
    let pool = Pool::new(Limits { open: 1, ..Limits::default() });
    assert!(pool.lease(&path(dir.path(), 1), || options(1)).is_err());
    pool.lease(&path(dir.path(), 2), || options(2)).unwrap().remember(told("works"), None).unwrap();
}

/// Bytes of this process in memory, and its open files.
fn taken() -> (usize, usize) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
    let kib: usize = line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
    (kib * 1024, std::fs::read_dir("/proc/self/fd").map(Iterator::count).unwrap_or(0))
}

/// A thousand agents (`POOL_AGENTS`; fewer in the short run) use their memories in turn: what the process takes is
/// bounded by the pool's limits, not by the number of agents.
#[test]
fn what_a_thousand_stores_take_is_bounded() {
    let _alone = alone();
    let agents: u128 =
        std::env::var("POOL_AGENTS").map_or(150, |n| n.parse().expect("POOL_AGENTS is a number"));
    // Nothing here asks whether the disk keeps it: memory spares a thousand stores' fsyncs.
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let pool = Pool::new(Limits::default());
    let each = |agent: u128| {
        let store = pool.lease(&path(dir.path(), agent), || options(agent)).unwrap();
        let texts =
            (0..20).map(|i| (told(&format!("agent{agent} note{i} of the harbour and its ships")), None));
        assert!(store.remember_many(texts.collect()).unwrap().iter().all(Result::is_ok));
        assert!(!store.recall(&asked("harbour"), None).unwrap().hits.is_empty());
    };
    // As many as are open at once: from here on nothing may be added by more agents.
    let full = Limits::default().open as u128;
    (0..full).for_each(each);
    let (bytes_at_full, files_at_full) = taken();
    let (mut most_bytes, mut most_files) = (0, 0);
    for agent in full..agents.max(full + 50) {
        each(agent);
        let (bytes, files) = taken();
        (most_bytes, most_files) = (most_bytes.max(bytes), most_files.max(files));
        let used = pool.in_use();
        assert!(used.open <= Limits::default().open && used.index_bytes <= Limits::default().index_bytes);
    }
    let mib = |bytes: usize| bytes / (1024 * 1024);
    println!(
        "{agents} stores: {} MiB and {most_files} files at most; with {full} stores {} MiB and {files_at_full} files",
        mib(most_bytes),
        mib(bytes_at_full)
    );
    // Other tests of this program run beside this one and open files of their own.
    assert!(most_files <= files_at_full + 48, "{files_at_full} files with {full} stores, then {most_files}");
    let spare = 48 * 1024 * 1024;
    assert!(most_bytes <= bytes_at_full + spare, "{} MiB, then {}", mib(bytes_at_full), mib(most_bytes));
    // All are there, whoever was closed meanwhile.
    for agent in (0..agents).step_by(37) {
        let store = pool.lease(&path(dir.path(), agent), || options(agent)).unwrap();
        assert_eq!(store.counters().unwrap().records(), 20, "agent {agent}");
    }
}
