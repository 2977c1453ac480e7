//! Whose turn is it, and does anybody pay for another's turn?

use crate::client::Client;
use crate::sharing::{asked, joined, of, tokens, with_tiny};
use agentd_domain::engine::{Event, FinishReason, Prompt, Request, Share};
use std::time::{Duration, Instant};

fn alone(client: &mut Client, key: &str, prompt: &[i32], new: u32) -> String {
    let share = Share { salt: key.to_owned(), ..of("reference") };
    client.generate(asked(key, prompt, new, share)).text
}

/// Four times more than fits, with answers that outgrow their first promise: nobody fails, every answer is whole.
#[test]
fn four_times_too_many_all_get_their_whole_answers() {
    let Some((_engine, mut client)) = with_tiny(&[], (2048, 8)) else { return };
    let prompts: Vec<Vec<i32>> = (0..24).map(|n| tokens(n, 200 + 10 * n)).collect();
    let new = 330;
    let ids: Vec<u64> = prompts
        .iter()
        .enumerate()
        .map(|(n, prompt)| {
            client.send(Request::Generate(asked(
                &format!("k{n}"),
                prompt,
                new,
                of(&format!("agent{}", n % 4)),
            )))
        })
        .collect();
    let answers = client.read_answers(&ids);
    let usage = client.usage();
    println!("{usage:?}");
    assert!(usage.preemptions > 0, "it was not tight: {usage:?}");
    assert_eq!((usage.running, usage.waiting), (0, 0));
    assert_eq!(usage.cells_private + usage.cells_shared, usage.cells_cached, "{usage:?}");
    for (n, answer) in answers.into_iter().enumerate() {
        let done = answer.end.unwrap_or_else(|report| panic!("request {n} failed: {report}"));
        assert_eq!((done.reason, done.completion_tokens), (FinishReason::Length, new));
        if n % 6 == 0 {
            assert_eq!(
                answer.text,
                alone(&mut client, &format!("alone{n}"), &prompts[n], new),
                "request {n}"
            );
        }
    }
}

/// E15, and the answers of those who had to step aside are what they would have been.
#[test]
fn the_important_gets_in_while_all_places_are_taken() {
    let Some((engine, mut client)) = with_tiny(&[], (4096, 4)) else { return };
    let long: Vec<Vec<i32>> = (0..4).map(|n| tokens(n, 300)).collect();
    let low = |n: usize| Share { priority: 10, ..of(&format!("low{n}")) };
    let mut ids: Vec<u64> = Vec::new();
    for (n, prompt) in long.iter().enumerate() {
        ids.push(client.send(Request::Generate(asked(&format!("low{n}"), prompt, 700, low(n)))));
    }
    while !matches!(client.receive().body, Event::Piece { .. }) {}
    let mut other = engine.connect();
    assert_eq!(other.usage().running, 4);
    let high = Share { priority: 90, ..of("high") };
    let prompt = tokens(77, 800);
    let id = other.send(Request::Generate(asked("high", &prompt, 20, high)));
    let answer = other.read_answer(id);
    assert_eq!(answer.end.expect("an end").completion_tokens, 20);
    let usage = other.usage();
    assert!(usage.preemptions >= 1, "{usage:?}");
    assert!(usage.running + usage.waiting > 0, "the others had not ended before");
    assert_eq!(answer.text, alone(&mut other, "high alone", &prompt, 20));
    // Their first pieces were read above: what counts is that they end whole.
    let mut ended = 0;
    while ended < 4 {
        let frame = client.receive();
        match frame.body {
            Event::Piece { .. } => {}
            Event::Done(done) => {
                assert_eq!((done.reason, done.completion_tokens), (FinishReason::Length, 700));
                ended += 1;
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    let again = asked("low0", &long[0], 700, low(0));
    let kept = client.generate(again).text;
    assert_eq!(kept, alone(&mut client, "low alone", &long[0], 700));
}

/// E13's rule, by count: whoever answers says something in every step while a long prompt is read.
#[test]
fn a_long_prompt_does_not_freeze_the_others() {
    let Some((engine, mut client)) = with_tiny(&["--threads", "1"], (32_000, 4)) else { return };
    let mut talkers = engine.connect();
    let ids: Vec<u64> = (0..2)
        .map(|n| talkers.send(Request::Generate(asked(&format!("t{n}"), &tokens(n, 20), 0, of("talker")))))
        .collect();
    while !matches!(talkers.receive().body, Event::Piece { .. }) {}
    let long = client.send(Request::Generate(asked("long", &tokens(60, 12_000), 1, of("reader"))));
    let begun = Instant::now();
    let watcher = std::thread::spawn(move || {
        client.read_answer(long).end.expect("an end");
        (client, Instant::now())
    });
    let (mut gaps, mut last) = (Vec::new(), Instant::now());
    while !watcher.is_finished() {
        if let Event::Piece { .. } = talkers.receive().body {
            gaps.push(last.elapsed());
            last = Instant::now();
        }
    }
    let (mut client, ended) = watcher.join().expect("the reader");
    gaps.sort();
    let worst = gaps.last().copied().unwrap_or_default();
    println!(
        "12,000 tokens were read in {:?}; {} pieces meanwhile, longest gap {worst:?}",
        ended - begun,
        gaps.len()
    );
    // Two talkers, and a step is at most 512 tokens of the prompt.
    assert!(gaps.len() >= 2 * 12_000 / 512 / 2, "{} pieces", gaps.len());
    assert!(worst < (ended - begun) / 4 || worst < Duration::from_millis(500), "a gap of {worst:?}");
    for key in ["t0", "t1"] {
        client.ask(Request::Cancel { key: key.to_owned() });
    }
    talkers.read_answers(&ids);
}

#[test]
fn who_goes_away_leaves_nothing_behind() {
    let Some((engine, mut client)) = with_tiny(&[], (4096, 4)) else { return };
    let common = tokens(1, 600);
    for round in 0..3 {
        let mut visitor = engine.connect();
        let keys: Vec<String> = (0..12).map(|n| format!("v{round}-{n}")).collect();
        for (n, key) in keys.iter().enumerate() {
            let priority = if n == 11 { 95 } else { 30 };
            let prompt = joined(&common, &tokens(n as i32, 50 + 20 * n as i32));
            let share = Share { priority, ..of(&format!("agent{}", n % 3)) };
            visitor.send(Request::Generate(asked(key, &prompt, 0, share)));
        }
        while !matches!(visitor.receive().body, Event::Piece { .. }) {}
        for key in keys {
            client.ask(Request::Cancel { key });
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        let usage = loop {
            let usage = client.usage();
            if usage.running + usage.waiting == 0 {
                break usage;
            }
            assert!(Instant::now() < deadline, "{usage:?}");
        };
        assert_eq!(usage.cells_private + usage.cells_shared, usage.cells_cached, "{usage:?}");
        assert_eq!(usage.cells_cached + usage.cells_free, usage.cells_total, "{usage:?}");
    }
    assert_eq!(client.generate(asked("next", &common, 5, of("next"))).piece_tokens, 5);
}

#[test]
fn a_request_over_its_share_is_told_what_would_fit() {
    let Some((_engine, mut client)) = with_tiny(&[], (4096, 4)) else { return };
    let small = Share { cells_most: 300, ..of("small") };
    let refused = client.generate(asked("a", &tokens(1, 200), 101, small.clone())).end.expect_err("too much");
    assert_eq!(refused.code, "context_exceeds_budget");
    assert!(refused.to_string().contains("at most 100 tokens"), "{refused}");
    let refused = client.generate(asked("b", &tokens(1, 300), 0, small.clone())).end.expect_err("too long");
    assert_eq!(refused.code, "context_exceeds_budget");
    assert_eq!(client.generate(asked("c", &tokens(1, 200), 100, small.clone())).piece_tokens, 100);
    // Without a number it ends where its share does.
    let done = client.generate(asked("d", &tokens(1, 200), 0, small)).end.expect("an end");
    assert_eq!((done.reason, done.completion_tokens), (FinishReason::Length, 101));
    let free = client.generate(asked("e", &tokens(1, 200), 900, of("free"))).end.expect("an end");
    assert_eq!(free.completion_tokens, 900);
}

/// The same request with another share is the same request.
#[test]
fn a_retry_with_another_share_finds_its_answer() {
    let Some((_engine, mut client)) = with_tiny(&[], (4096, 4)) else { return };
    let first = client.generate(asked("k", &tokens(1, 20), 30, of("a"))).text;
    let share = Share { priority: 99, weight: 7, ..of("a") };
    assert_eq!(client.generate(asked("k", &tokens(1, 20), 30, share)).text, first);
    let text = Prompt::Text("other".to_owned());
    let other = agentd_domain::engine::Generate { prompt: text, ..asked("k", &[3], 30, of("a")) };
    assert_eq!(client.generate(other).end.expect_err("another request").code, "conflict");
}
