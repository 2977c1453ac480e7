//! Does the engine stay whole, and its memory bounded, whatever its clients do (E20)?
//!
//! Seen from outside: answers have types, others are served meanwhile, and the process's own memory, as it reports it,
//! does not grow with what is asked.

use crate::client::{Client, Engine, greedy, text};
use agentd_domain::engine::{Event, Generate, ModelKind, Request};
use std::time::{Duration, Instant};
use tests_models::{Layout, SMALL, words};

const MIB: u64 = 1024 * 1024;
const QUEUED: usize = 10_000;
/// What so many requests may cost at any time: the waiting ones' prompts and keys, not those that were refused.
const QUEUE_MOST_BYTES: u64 = 64 * MIB;

fn with_small() -> Option<(Engine, Client)> {
    let engine = Engine::start()?;
    let mut client = engine.connect();
    let cache = tests_models::cache().expect("a cache");
    let path = tests_models::ensure(&cache, &SMALL, Layout::Q4KM).expect("a model");
    client.load("small", &path, ModelKind::Chat).expect("the small model loads");
    Some((engine, client))
}

fn ask(key: &str, prompt: &str, max_tokens: u32) -> Generate {
    Generate { model: "small".to_owned(), ..greedy(key, text(prompt), max_tokens) }
}

/// Where the engine has done everything once, so that what it allocates for ever is there.
fn warmed(client: &mut Client) -> u64 {
    assert!(client.generate(ask("warm", &words(1, 500), 50)).end.is_ok());
    client.status().rss_bytes
}

#[test]
fn what_cannot_be_met_is_refused_with_a_reason_and_others_go_on() {
    let Some((engine, mut client)) = with_small() else { return };
    let mut talker = engine.connect();
    let talk = talker.send(Request::Generate(ask("talk", &words(2, 100), 400)));
    while !matches!(talker.receive().body, Event::Piece { .. }) {}
    let mut refused = |request: Generate| client.generate(request).end.expect_err("it cannot be met");
    let long = refused(ask("long", &words(3, 100_000), 5));
    assert_eq!(long.code, "prompt_too_long");
    assert!(long.why.contains("100000") && long.why.contains("4096"), "what would fit is said: {long}");
    let unknown = refused(Generate { model: "no-such-model".to_owned(), ..ask("unknown", "x", 5) });
    assert_eq!(unknown.code, "not_found");
    assert!(unknown.why.contains("no-such-model"), "{unknown}");
    let missing =
        client.load("missing", &engine.scratch("missing.gguf"), ModelKind::Chat).expect_err("no file");
    assert_eq!(missing.code, "model_file_unreadable");
    for report in [long, unknown, missing] {
        assert!(!report.fix.is_empty(), "{report}");
    }
    let talked = talker.read_answer(talk).end.expect("who talked is not disturbed");
    assert_eq!(talked.completion_tokens, 400);
}

#[test]
fn ten_thousand_queued_requests_are_answered_or_refused_and_cost_no_memory() {
    let Some((engine, mut client)) = with_small() else { return };
    let before = warmed(&mut client);
    let prompt = words(4, 20);
    // Two connections, so that requests arrive faster than one thread of the engine reads them.
    let most = std::thread::scope(|scope| {
        let asking: Vec<_> = (0..2)
            .map(|side| {
                let (engine, prompt) = (&engine, &prompt);
                scope.spawn(move || flood(&mut engine.connect(), side, prompt))
            })
            .collect();
        let mut most = 0;
        while asking.iter().any(|asking| !asking.is_finished()) {
            most = most.max(client.status().rss_bytes);
            std::thread::sleep(Duration::from_millis(20));
        }
        let counts: Vec<(usize, usize)> =
            asking.into_iter().map(|asking| asking.join().expect("no panic")).collect();
        let answered: usize = counts.iter().map(|(answered, _)| answered).sum();
        let refused: usize = counts.iter().map(|(_, refused)| refused).sum();
        println!(
            "{answered} answered, {refused} refused, {} MiB before, {} MiB at most",
            before / MIB,
            most / MIB
        );
        assert_eq!(answered + refused, QUEUED, "somebody was forgotten");
        assert!(answered > 0 && refused > 0, "{answered} answered, {refused} refused: the queue has no end");
        most
    });
    assert!(most.saturating_sub(before) < QUEUE_MOST_BYTES, "from {before} to {most} bytes");
    assert!(client.generate(ask("after", &words(5, 20), 5)).end.is_ok());
}

/// Half of the requests, all sent before the first answer is read.
fn flood(client: &mut Client, side: usize, prompt: &str) -> (usize, usize) {
    let mut open = QUEUED / 2;
    for number in 0..open {
        client.send(Request::Generate(ask(&format!("{side}/{number}"), prompt, 1)));
    }
    let (mut answered, mut refused) = (0, 0);
    while open > 0 {
        match client.receive().body {
            Event::Piece { .. } => continue,
            Event::Done(_) => answered += 1,
            Event::Error(report) => {
                assert_eq!(report.code, "too_many_requests", "{report}");
                assert!(!report.fix.is_empty(), "{report}");
                refused += 1;
            }
            other => panic!("unexpected {other:?}"),
        }
        open -= 1;
    }
    (answered, refused)
}

#[test]
fn clients_that_disconnect_take_nothing_with_them_and_leave_nothing() {
    let Some((engine, mut client)) = with_small() else { return };
    let before = warmed(&mut client);
    for number in 0..100 {
        let mut leaving = engine.connect();
        leaving.send(Request::Generate(ask(&format!("leaving {number}"), &words(number, 100), 20)));
        // Some before their answer, some in its middle, some in the middle of a frame of their own.
        match number % 3 {
            0 => {}
            1 => while !matches!(leaving.receive().body, Event::Piece { .. }) {},
            _ => leaving.send_bytes(&[200, 0, 0, 0, b'{']),
        }
    }
    let stayed = client.generate(ask("stays", &words(7, 50), 100)).end.expect("who stays is served");
    assert_eq!(stayed.completion_tokens, 100);
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let status = client.status();
        if status.running_sequences == 0 && status.waiting_requests == 0 {
            let grown = status.rss_bytes.saturating_sub(before);
            assert!(grown < QUEUE_MOST_BYTES, "grown by {grown} bytes");
            return;
        }
        assert!(Instant::now() < deadline, "still at work for nobody: {status:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_client_that_hardly_reads_holds_up_nobody() {
    let Some((engine, mut client)) = with_small() else { return };
    let before = warmed(&mut client);
    let begun = Instant::now();
    let alone = client.generate(ask("alone", &words(11, 100), 300)).end.expect("an answer");
    let alone_took = begun.elapsed();
    // A byte a second: in this test's time that is none or a few of the hundreds of kilobytes they are sent.
    let mut slow: Vec<Client> = (0..4).map(|_| engine.connect()).collect();
    for (number, slow) in slow.iter_mut().enumerate() {
        slow.send(Request::Generate(ask(&format!("slow {number}"), &words(12 + number as u64, 100), 900)));
    }
    let begun = Instant::now();
    let beside = client.generate(ask("beside", &words(11, 100), 300)).end.expect("an answer");
    let beside_took = begun.elapsed();
    assert_eq!((alone.completion_tokens, beside.completion_tokens), (300, 300));
    // Five share what one had; ten times that is a standstill and no slow machine.
    assert!(
        beside_took < 50 * alone_took + Duration::from_secs(5),
        "{alone_took:?} alone, {beside_took:?} beside"
    );
    for slow in &mut slow {
        slow.read_bytes(1);
        std::thread::sleep(Duration::from_secs(1));
        slow.read_bytes(1);
    }
    let grown = client.status().rss_bytes.saturating_sub(before);
    assert!(grown < QUEUE_MOST_BYTES, "grown by {grown} bytes");
}
