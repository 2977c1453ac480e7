//! Does an answer have the form that was asked for, whatever the model would rather say?
//!
//! The tiny model's words are noise, so a form it keeps to is not its own idea. Its text is kept to ASCII: llama.cpp's
//! grammars take a byte that begins a character for a whole one whatever follows, and noise says such things.

use crate::client::greedy;
use crate::sharing::with_tiny;
use agentd_domain::engine::{FinishReason, Generate, Prompt, Sampling, Shape};
use serde_json::{Value, json};

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
