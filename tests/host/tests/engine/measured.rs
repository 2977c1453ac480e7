//! How much is sharing, swapping and stepping aside worth? Printed, not judged: times belong to the machine.
//!
//! `AGENTD_CHAT_MODEL=model.gguf cargo test -p tests-host --test engine -- --ignored --nocapture measured`, with what
//! `scripts/test host` sets; without a model of its own it measures the tiny one, whose times are mostly overhead.

use crate::client::{Client, Engine};
use crate::sharing::{asked, joined, of, tokens};
use agentd_domain::engine::{Event, ModelKind, Request, Share};
use std::env;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const SEQUENCES: u32 = 8;
const CELLS: u32 = 8192;
const COMMON_TOKENS: i32 = 512;
const TAIL_TOKENS: i32 = 64;
const NEW_TOKENS: u32 = 16;

struct Times {
    firsts: Vec<Duration>,
    whole: Duration,
}

impl Times {
    fn median(&self) -> Duration {
        self.firsts[self.firsts.len() / 2]
    }

    fn last(&self) -> Duration {
        self.firsts[self.firsts.len() - 1]
    }
}

/// Sends all at once; when each began to answer, and when all had ended.
fn together(client: &mut Client, requests: Vec<(String, Vec<i32>, Share)>) -> Times {
    let begun = Instant::now();
    let count = requests.len();
    let mut waiting: Vec<u64> = requests
        .into_iter()
        .map(|(key, prompt, share)| client.send(Request::Generate(asked(&key, &prompt, NEW_TOKENS, share))))
        .collect();
    let (mut firsts, mut ended) = (Vec::new(), 0);
    while ended < count {
        let frame = client.receive();
        match frame.body {
            Event::Piece { .. } | Event::Done(_) => {
                if waiting.contains(&frame.id) {
                    waiting.retain(|id| *id != frame.id);
                    firsts.push(begun.elapsed());
                }
                ended += usize::from(matches!(frame.body, Event::Done(_)));
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    Times { firsts, whole: begun.elapsed() }
}

#[test]
#[ignore = "measures for minutes"]
fn measured() {
    let Some(engine) = Engine::start() else { return };
    let model = env::var_os("AGENTD_CHAT_MODEL").map_or_else(|| engine.tiny(), PathBuf::from);
    let mut client = engine.connect();
    client.load_sized("tiny", &model, ModelKind::Chat, (CELLS, SEQUENCES)).expect("the model loads");
    println!("{}", model.display());
    client.logits("tiny", &tokens(999, 300));

    // E12: with one salt they find each other's prompts, with many they do not.
    let mut runs = Vec::new();
    for (round, shares) in [(0, true), (1, false)] {
        let common = tokens(100 + round, COMMON_TOKENS);
        let requests = (0..8).map(|n| {
            let salt = if shares { "together".to_owned() } else { format!("apart{n}") };
            let share = Share { salt, ..of(&format!("agent{n}")) };
            (format!("{round}-{n}"), joined(&common, &tokens(10 + n, TAIL_TOKENS)), share)
        });
        let before = client.usage();
        let times = together(&mut client, requests.collect());
        let computed = client.usage().computed_prompt_tokens - before.computed_prompt_tokens;
        println!(
            "shared {shares}: {computed} prompt tokens, first token p50 {:?}, last {:?}, all in {:?}",
            times.median(),
            times.last(),
            times.whole
        );
        runs.push((computed, times));
    }
    let ratio = |one: Duration, other: Duration| one.as_secs_f64() / other.as_secs_f64();
    println!(
        "E12 shared over unshared: tokens {:.3}, first token p50 {:.2}, last {:.2}, throughput {:.2} times",
        runs[0].0 as f64 / runs[1].0 as f64,
        ratio(runs[0].1.median(), runs[1].1.median()),
        ratio(runs[0].1.last(), runs[1].1.last()),
        ratio(runs[1].1.whole, runs[0].1.whole),
    );

    // E15: the same prompt's length, idle and while all places are taken by others.
    let urgent = |n: i32| {
        let share = Share { priority: 90, salt: format!("urgent{n}"), ..of("urgent") };
        vec![(format!("urgent{n}"), tokens(200 + n, COMMON_TOKENS), share)]
    };
    let idle = together(&mut client, urgent(0)).last();
    let mut others = engine.connect();
    let low = |n: i32| Share { priority: 10, salt: "low".to_owned(), ..of(&format!("low{n}")) };
    for n in 0..SEQUENCES as i32 {
        others.send(Request::Generate(asked(&format!("low{n}"), &tokens(300 + n, 150), 0, low(n))));
    }
    let mut speaking = 0;
    while speaking < 4 * SEQUENCES {
        speaking += u32::from(matches!(others.receive().body, Event::Piece { .. }));
    }
    let full = together(&mut client, urgent(1)).last();
    println!("E15 first token while full {full:?}, idle {idle:?}: {:.2}", ratio(full, idle));

    // E13: how long they are silent while somebody reads.
    let reader = engine.connect();
    let reading = std::thread::spawn(move || {
        let mut reader = reader;
        together(&mut reader, vec![("reader".to_owned(), tokens(400, 2048), of("reader"))]).last()
    });
    let (mut gaps, mut last) = (Vec::new(), Instant::now());
    while !reading.is_finished() {
        if let Event::Piece { .. } = others.receive().body {
            gaps.push(last.elapsed());
            last = Instant::now();
        }
    }
    gaps.sort();
    let took = reading.join().expect("the reader");
    println!(
        "E13 2,048 tokens were read in {took:?}; of {} gaps of the others p99 {:?}, longest {:?}",
        gaps.len(),
        gaps[gaps.len() * 99 / 100],
        gaps[gaps.len() - 1]
    );

    // E16: what was put aside came back, or would have been computed.
    for n in 0..SEQUENCES {
        client.ask(Request::Cancel { key: format!("low{n}") });
    }
    let prompt = tokens(500, 1000);
    client.logits_with("tiny", &prompt, Some(of("kept")));
    let mut seed = 600;
    while client.usage().swap_memory_bytes == 0 || client.usage().swapped_in == 0 {
        seed += 1;
        client.logits_with("tiny", &tokens(seed, 1500), Some(of("filler")));
        if seed % 6 == 0 {
            client.logits_with("tiny", &joined(&prompt, &[seed]), Some(of("kept")));
        }
        assert!(seed < 640, "nothing comes back");
    }
    let usage = client.usage();
    let computing = f64::from(usage.last_swap_tokens) / f64::from(usage.prompt_tokens_per_s.max(1));
    println!(
        "E16 {} tokens came back in {} us, computing them takes {computing:.3} s: {:.0} times",
        usage.last_swap_tokens,
        usage.last_swap_in_us,
        computing / (usage.last_swap_in_us as f64 / 1e6)
    );
}
