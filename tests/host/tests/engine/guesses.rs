//! Does a guess change anything but the time?
//!
//! The tiny model repeats itself soon, so its answers are guessed in part. One engine guesses and another one does not.

use crate::client::{Client, Engine, greedy};
use crate::sharing::{joined, of, tokens};
use agentd_domain::engine::{Generate, ModelKind, Prompt, Request, Sampling, Shape};

const ANSWER: u32 = 160;

fn with(arguments: &[&str]) -> Option<(Engine, Client)> {
    let engine = Engine::start_with(arguments)?;
    let mut client = engine.connect();
    client.load_sized("tiny", &engine.tiny(), ModelKind::Chat, (2048, 8)).expect("the tiny model loads");
    Some((engine, client))
}

fn prompts() -> Vec<Vec<i32>> {
    // Some say the same several times over.
    (0..6).map(|n| if n % 2 == 0 { tokens(n, 40).repeat(4) } else { tokens(n, 90) }).collect()
}

fn request(key: &str, prompt: &[i32], sampling: Sampling) -> Generate {
    let prompt = Prompt::Tokens(prompt.to_vec());
    Generate { share: of("a"), sampling, ..greedy(key, prompt, ANSWER) }
}

/// E7: the same words, greedy or drawn with a seed, freely or within a form; and no cell is lost over wrong guesses.
#[test]
fn answers_are_the_same_with_and_without_guesses() {
    let Some((_guessing, mut guessing)) = with(&[]) else { return };
    let Some((_plain, mut plain)) = with(&["--no-guesses"]) else { return };
    let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
    let drawn = Sampling { temperature: 0.7, seed: Some(7), ..Sampling::default() };
    let penalised = Sampling { repeat_penalty: 1.1, ..greedy.clone() };
    for (kind, sampling) in [("greedy", greedy), ("drawn", drawn), ("penalised", penalised)] {
        for (n, prompt) in prompts().iter().enumerate() {
            let key = format!("{kind}{n}");
            let ours = guessing.generate(request(&key, prompt, sampling.clone()));
            let theirs = plain.generate(request(&key, prompt, sampling.clone()));
            assert_eq!(ours.text, theirs.text, "{key}");
            let (ours, theirs) = (ours.end.expect("an end"), theirs.end.expect("an end"));
            assert_eq!(
                (ours.completion_tokens, ours.reason),
                (theirs.completion_tokens, theirs.reason),
                "{key}"
            );
        }
    }
    let form = Shape::Grammar("root ::= (\"tick \" | \"tock \"){40}".to_owned());
    for (n, prompt) in prompts().iter().enumerate() {
        let within =
            |key: String| Generate { shape: form.clone(), ..request(&key, prompt, Sampling::default()) };
        let within = |key: String| Generate {
            sampling: Sampling { seed: Some(3), ..Sampling::default() },
            ..within(key)
        };
        assert_eq!(
            guessing.generate(within(format!("f{n}"))).text,
            plain.generate(within(format!("f{n}"))).text
        );
    }
    let (ours, theirs) = (guessing.usage(), plain.usage());
    println!("of {} guessed tokens {} were right", ours.guessed_tokens, ours.guessed_right);
    assert!(ours.guessed_tokens > 0, "{ours:?}");
    assert_eq!((theirs.guessed_tokens, theirs.guessed_right), (0, 0));
    for usage in [ours, theirs] {
        assert_eq!(
            usage.cells_private + usage.cells_shared + usage.cells_free,
            usage.cells_total,
            "{usage:?}"
        );
        assert_eq!(usage.cells_cached, usage.cells_private + usage.cells_shared, "nobody works: {usage:?}");
    }
    // Logits after all of it are those of an engine that never guessed: nothing wrong stayed in the cache.
    for (n, prompt) in prompts().iter().enumerate() {
        let prompt = joined(prompt, &[5]);
        let after = guessing.logits_with("tiny", &prompt, Some(of("a")));
        let never = plain.logits("tiny", &prompt);
        let worst = after.iter().zip(&never).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= 1e-4, "prompt {n}: {worst}");
    }
}

/// Where many work, and while somebody's prompt is read, there is nothing to guess for.
#[test]
fn many_at_once_are_not_guessed_for() {
    let Some((_engine, mut client)) = with(&[]) else { return };
    let ids: Vec<u64> = (0..6)
        .map(|n| {
            // Of one length, so that all begin and end together.
            let share = of(&format!("agent{n}"));
            let prompt = Prompt::Tokens(tokens(n, 20).repeat(3));
            client.send(Request::Generate(Generate { share, ..greedy(&format!("k{n}"), prompt, 60) }))
        })
        .collect();
    for answer in client.read_answers(&ids) {
        assert_eq!(answer.end.expect("an end").completion_tokens, 60);
    }
    let usage = client.usage();
    assert!(usage.guessed_tokens <= 2 * 60, "only the last two may have been guessed for: {usage:?}");
}
