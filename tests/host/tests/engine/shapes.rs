//! Does an answer have the form that was asked for, whatever the model would rather say?
//!
//! The tiny model's words are noise, so a form it keeps to is not its own idea.

use crate::client::{Client, greedy};
use crate::sharing::with_tiny;
use agentd_domain::engine::{Event, FinishReason, Generate, Prompt, Request, Sampling, Shape};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

fn shaped(key: &str, seed: Option<u32>, shape: Shape) -> Generate {
    let prompt = Prompt::Text("Say something.".to_owned());
    let sampling = match seed {
        None => Sampling { temperature: 0.0, ..Sampling::default() },
        Some(_) => Sampling { temperature: 1.5, seed, ..Sampling::default() },
    };
    Generate { shape, sampling, ..greedy(key, prompt, 400) }
}

#[test]
fn answers_keep_to_a_schema_however_they_are_chosen() {
    let Some((_engine, mut client)) = with_tiny(&[], (4096, 4)) else { return };
    let schema = json!({
        "type": "object",
        "properties": {
            "kind": { "enum": ["add", "remove"] },
            "count": { "type": "integer", "minimum": 10, "maximum": 99 },
            "tags": { "type": "array", "items": { "type": "string", "pattern": "^[a-z]{1,6}$" },
                      "minItems": 1, "maxItems": 2 },
        },
        "required": ["kind", "count", "tags"],
        "additionalProperties": false,
    });
    for round in 0..8u32 {
        let seed = (round > 0).then_some(round);
        let request = shaped(&format!("k{round}"), seed, Shape::JsonSchema(schema.to_string()));
        let answer = client.generate(request);
        assert_eq!(answer.end.expect("an end").reason, FinishReason::Stop, "{}", answer.text);
        let value: Value =
            serde_json::from_str(&answer.text).unwrap_or_else(|e| panic!("{e}: {}", answer.text));
        assert!(["add", "remove"].contains(&value["kind"].as_str().expect("a word")));
        assert!((10..=99).contains(&value["count"].as_i64().expect("a number")));
        let tags = value["tags"].as_array().expect("a list");
        assert!(
            (1..=2).contains(&tags.len())
                && tags.iter().all(|tag| (1..=6).contains(&tag.as_str().expect("text").len()))
        );
        assert_eq!(value.as_object().expect("an object").len(), 3);
    }
    let grammar = Shape::Grammar("root ::= \"yes\" | \"no\"".to_owned());
    assert!(["yes", "no"].contains(&client.generate(shaped("g", None, grammar)).text.as_str()));
    // The same prompt without a form is not kept to one.
    let free = client.generate(shaped("free", None, Shape::Free)).text;
    assert!(serde_json::from_str::<Value>(&free).is_err(), "{free}");
}

/// E20: none of these ends the engine.
#[test]
fn forms_that_cannot_be_kept_say_so() {
    let Some((_engine, mut client)) = with_tiny(&[], (4096, 4)) else { return };
    let schema = |value: Value| Shape::JsonSchema(value.to_string());
    let grammar = |text: &str| Shape::Grammar(text.to_owned());
    let deep = format!("root ::= {}\"a\"{}", "(".repeat(5000), ")".repeat(5000));
    let nested = format!("{}1{}", "[".repeat(5000), "]".repeat(5000));
    for (index, (shape, code)) in [
        (schema(json!({ "enum": [] })), "schema_refused"),
        (schema(json!({ "not": {} })), "schema_refused"),
        (schema(json!({ "$ref": "#/$defs/nowhere" })), "schema_refused"),
        (schema(json!({ "type": "string", "minLength": 9, "maxLength": 1 })), "schema_refused"),
        (Shape::JsonSchema("{".to_owned()), "schema_refused"),
        (Shape::JsonSchema(nested), "shape_too_large"),
        (grammar(""), "grammar_refused"),
        (grammar("root = nothing"), "grammar_refused"),
        (grammar("root ::= root \"a\""), "grammar_refused"),
        (grammar("root ::= other"), "grammar_refused"),
        (grammar(&deep), "shape_too_large"),
    ]
    .into_iter()
    .enumerate()
    {
        let answer = client.generate(shaped(&format!("k{index}"), None, shape));
        match answer.end {
            Err(report) => assert_eq!(report.code, code, "case {index}"),
            Ok(done) => panic!("case {index} was taken: `{}`, {done:?}", answer.text),
        }
    }
    assert_eq!(client.generate(shaped("after", None, Shape::JsonObject)).text.chars().next(), Some('{'));
}

/// Noise begins characters that it does not end: within a form each is whole.
#[test]
fn text_within_a_form_is_text() {
    let Some((_engine, mut client)) = with_tiny(&[], (4096, 4)) else { return };
    let schema = json!({ "type": "object", "properties": { "said": { "type": "string", "maxLength": 20 } },
        "required": ["said"], "additionalProperties": false });
    for seed in 0..12 {
        let answer =
            client.generate(shaped(&format!("k{seed}"), Some(seed), Shape::JsonSchema(schema.to_string())));
        assert!(answer.end.is_ok_and(|done| done.reason == FinishReason::Stop), "{}", answer.text);
        assert!(!answer.text.contains('\u{fffd}'), "{}", answer.text);
        let value: Value =
            serde_json::from_str(&answer.text).unwrap_or_else(|e| panic!("{e}: {}", answer.text));
        assert!(value["said"].as_str().expect("a text").chars().count() <= 20, "{value}");
    }
}

/// A grammar that can be read in ever more ways ends with a reason, and nobody beside it waits for that.
#[test]
fn a_slow_grammar_is_slow_for_itself_alone() {
    let Some((engine, mut client)) = with_tiny(&[], (4096, 4)) else { return };
    let rules: String = (0..24)
        .map(|n| format!("r{n} ::= \"a\" r{n}x | \"a\" r{n}y\nr{n}x ::= \"a\" s\nr{n}y ::= \"a\" s\n"))
        .collect();
    let any = (0..24).map(|n| format!("r{n} | r{n} s")).collect::<Vec<_>>().join(" | ");
    let ambiguous = format!("root ::= s\ns ::= {any}\n{rules}");
    let gap = |client: &mut Client, key: &str| {
        let prompt = Prompt::Text("Say something.".to_owned());
        let id = client.send(Request::Generate(greedy(key, prompt, 200)));
        let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
        loop {
            let frame = client.receive();
            assert_eq!(frame.id, id);
            match frame.body {
                Event::Piece { .. } => {
                    longest = longest.max(last.elapsed());
                    last = Instant::now();
                }
                Event::Done(_) => return longest,
                other => panic!("{other:?}"),
            }
        }
    };
    let alone = gap(&mut client, "alone");
    let mut slow = engine.connect();
    let ids: Vec<u64> = (0..3)
        .map(|n| {
            let request = shaped(&format!("slow{n}"), None, Shape::Grammar(ambiguous.clone()));
            slow.send(Request::Generate(request))
        })
        .collect();
    let beside = gap(&mut client, "beside");
    println!("longest gap {alone:?} alone, {beside:?} beside three slow grammars");
    assert!(beside < Duration::from_millis(500), "{beside:?}");
    for answer in slow.read_answers(&ids) {
        let report = answer.end.expect_err("it cannot be kept to");
        assert_eq!(report.code, "shape_too_slow");
        assert!(answer.text.chars().all(|character| character == 'a'), "{}", answer.text);
    }
}
