//! Is every acknowledged record there after kill -9?
//!
//! A child of this program writes from four threads, purges some of it, writes the store anew under another key,
//! and prints each id after it was acknowledged. It is killed
//! after a number of lines that changes from round to round (0: while it opens the store), on a file that grows
//! through a hundred rounds, then on a new one. After each kill every printed record of these rounds must be there with
//! its text, every purged one gone, and the file must agree with itself. `KILL_ROUNDS` sets the number of rounds; 25
//! take some seconds, the long run does 10,000. A kill leaves the kernel's cache as it is, so the folder may be memory.
//!
//! No test harness: the child must be this very program.

use agentd_domain::agent_api::{Remember, Tier};
use agentd_domain::ids::{AgentId, OwnerId, RecordId};
use agentd_memory::{Budgets, Embedding, ForgetMode, Identity, NewRecord, Options, Store};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use uuid::Uuid;

const EMBEDDER: [u8; 32] = [3; 32];
const WRITERS: usize = 4;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("child") => write_until_killed(Path::new(&arguments[2]), &arguments[3]),
        // `cargo test -- --list` asks every test program.
        Some("--list") => println!("acknowledged_survives_kill: test"),
        _ => kill_again_and_again(),
    }
}

fn open(path: &Path) -> Store {
    let identity = Identity { agent_id: AgentId(Uuid::from_u128(1)), owner_id: OwnerId(Uuid::from_u128(2)) };
    Store::open(path, Options::new(identity, Budgets::agent())).expect("the store opens")
}

fn write_until_killed(path: &Path, round: &str) {
    let store = open(path);
    store.use_embedder(EMBEDDER, 3).expect("an embedder is named");
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let store = &store;
            scope.spawn(move || {
                for item in 0u64.. {
                    let text = format!("round {round} writer {writer} item {item}");
                    let request = Remember {
                        tier: Tier::Spirit,
                        text: text.clone(),
                        role: None,
                        source: None,
                        event_unix_ms: None,
                    };
                    let new = NewRecord {
                        request,
                        recorded_unix_ms: 0,
                        idempotency_key: Some(text.clone()),
                        detail: Default::default(),
                        with: vec![],
                    };
                    let embedding = (item % 2 == 0).then(|| Embedding {
                        embedder: EMBEDDER,
                        vector: vec![1.0, item as f32, writer as f32],
                    });
                    let id = store.remember(new, embedding).expect("it is remembered").id;
                    say('+', id, &text);
                    if item % 7 == 3 {
                        say('?', id, &text);
                        store.forget(vec![id], ForgetMode::Purge, 0).expect("it is purged");
                        say('-', id, &text);
                        if writer == 0 {
                            store.rewrite(0).expect("the store is written anew");
                        }
                    }
                }
            });
        }
    });
}

/// One write call per line: a line is whole or absent.
fn say(sign: char, id: RecordId, text: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("{sign}{id}\t{text}\n").as_bytes())
        .and_then(|()| out.flush())
        .expect("the parent listens");
}

fn kill_again_and_again() {
    let rounds: u64 =
        std::env::var("KILL_ROUNDS").ok().map_or(25, |text| text.parse().expect("KILL_ROUNDS is a number"));
    let mut total = Total::default();
    let mut begun = 0;
    while begun < rounds {
        let some = ROUNDS_PER_STORE.min(rounds - begun);
        kill_one_store(begun..begun + some, &mut total);
        begun += some;
    }
    assert!(total.acknowledged >= rounds * 8, "only {} records were acknowledged", total.acknowledged);
    assert!(rounds < 25 || total.purged > 0, "nothing was purged");
    println!(
        "kill -9: {rounds} rounds, {} acknowledged records, all there, {} purged, all gone",
        total.acknowledged, total.purged
    );
}

/// All records of a store are looked at after each of its rounds.
const ROUNDS_PER_STORE: u64 = 100;

#[derive(Default)]
struct Total {
    acknowledged: u64,
    purged: u64,
}

fn kill_one_store(rounds: std::ops::Range<u64>, total: &mut Total) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("memory.redb");
    let mut acknowledged: BTreeMap<RecordId, String> = BTreeMap::new();
    let mut purged: BTreeSet<RecordId> = BTreeSet::new();
    for round in rounds {
        // 0 to 40 lines, in a fixed but uneven order.
        for line in one_round(&path, round, round * 17 % 41) {
            match line.sign {
                '+' => {
                    acknowledged.insert(line.id, line.text);
                }
                // Asked for, not acknowledged: it may be there or not.
                '?' => {
                    acknowledged.remove(&line.id);
                }
                _ => {
                    purged.insert(line.id);
                }
            }
        }
        let store = open(&path);
        for (id, text) in &acknowledged {
            let stored = store.get(*id).expect("the store answers");
            assert_eq!(
                stored.map(|s| s.text).as_ref(),
                Some(text),
                "round {round}: an acknowledged record is gone"
            );
        }
        for id in &purged {
            assert!(
                store.get(*id).expect("the store answers").is_none(),
                "round {round}: a purged one is back"
            );
        }
        let checked = store.check().unwrap_or_else(|error| panic!("round {round}: {error}"));
        assert!(checked.records >= acknowledged.len() as u64);
        let keys = std::fs::read_dir(path.parent().expect("a folder")).expect("its files");
        let keys = keys.flatten().filter(|f| f.path().extension().is_some_and(|e| e == "key")).count();
        assert_eq!(keys, 1, "round {round}: a key that must not exist");
    }
    total.acknowledged += acknowledged.len() as u64;
    total.purged += purged.len() as u64;
}

/// Starts a child, kills it after so many acknowledgements, returns all that it had printed.
fn one_round(path: &Path, round: u64, lines: u64) -> Vec<Line> {
    let mut child = Command::new(std::env::current_exe().expect("own path"))
        .args(["child".as_ref(), path.as_os_str(), round.to_string().as_ref()])
        .stdout(Stdio::piped())
        .spawn()
        .expect("the child starts");
    let mut out = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut told = Vec::new();
    let mut line = String::new();
    while (told.len() as u64) < lines {
        line.clear();
        assert!(out.read_line(&mut line).expect("the pipe") > 0, "round {round}: the child ended by itself");
        told.push(parse(&line));
    }
    child.kill().expect("SIGKILL");
    child.wait().expect("the child is gone");
    // What was acknowledged between our last line and its death is a promise, too.
    for line in out.lines() {
        told.push(parse(&line.expect("the pipe")));
    }
    told
}

struct Line {
    /// `+` remembered, `?` about to be purged, `-` purged.
    sign: char,
    id: RecordId,
    text: String,
}

fn parse(line: &str) -> Line {
    let (id, text) = line.trim_end().split_once('\t').expect("id and text");
    let sign = id.chars().next().expect("a sign");
    Line { sign, id: id[1..].parse().expect("an id"), text: text.to_owned() }
}
