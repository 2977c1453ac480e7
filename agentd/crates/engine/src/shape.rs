//! How is an answer kept to a form?
//!
//! A JSON schema becomes a grammar (llama.cpp's converter), a grammar a sampler that knows which tokens may come next.
//! Compiled grammars are kept for each model; a request takes a copy.
//!
//! In:    schemas and grammars from strangers. Out: a sampler, or what is wrong and where.
//! True:  a keyword that the converter would silently leave out is refused: what is accepted here is enforced. A token
//!        that the grammar does not allow is never accepted by it: llama.cpp ends the process then.
//! Never: a text deep or long enough that llama.cpp's parsers, which call themselves, run out of stack.
//! Source: `common/json-schema-to-grammar.cpp` and `src/llama-grammar.cpp` of llama.cpp; JSON Schema 2020-12.

use agentd_domain::engine::Shape;
use agentd_domain::fault::Report;
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::json_schema_to_grammar;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::token::data_array::LlamaTokenDataArray;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// The largest schemas of tool collections have some tens of kilobytes.
const MAX_TEXT_BYTES: usize = 64 * 1024;
/// Brackets within brackets. A thread here has two megabytes of stack, each level of the parser some hundred bytes.
const MAX_DEPTH: usize = 64;
/// Compiled grammars of one model: agents have a few each.
const MAX_KEPT: usize = 64;

/// What the converter turns into rules.
const ENFORCED: [&str; 23] = [
    "$defs",
    "$ref",
    "additionalProperties",
    "anyOf",
    "const",
    "definitions",
    "enum",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "format",
    "items",
    "maxItems",
    "maxLength",
    "maximum",
    "minItems",
    "minLength",
    "minimum",
    "oneOf",
    "pattern",
    "prefixItems",
    "properties",
    "required",
    "type",
];
/// What says nothing about which values are right.
const REMARKS: [&str; 11] = [
    "$anchor",
    "$comment",
    "$id",
    "$schema",
    "default",
    "deprecated",
    "description",
    "examples",
    "readOnly",
    "title",
    "writeOnly",
];
/// Words that are enforced in some company only: a bound of a number is not, unless the number is an integer; a pattern
/// that the converter does not understand becomes any text. Whether they are shows in what the converter makes.
const BOUNDS: [&str; 10] = [
    "exclusiveMaximum",
    "exclusiveMinimum",
    "format",
    "maxItems",
    "maxLength",
    "maximum",
    "minItems",
    "minLength",
    "minimum",
    "pattern",
];
/// Each of these is the whole rule: the converter looks at nothing that stands beside it.
const ALONE: [&str; 5] = ["$ref", "anyOf", "oneOf", "const", "enum"];

/// The compiled grammars of one model.
#[derive(Default)]
pub(crate) struct Grammars {
    kept: Mutex<HashMap<String, LlamaSampler>>,
}

impl Grammars {
    pub(crate) fn get(&self, model: &LlamaModel, shape: &Shape) -> Result<Option<LlamaSampler>, Report> {
        let (key, text) = match shape {
            Shape::Free => return Ok(None),
            Shape::JsonObject => ("j".to_owned(), r#"{"type":"object"}"#),
            Shape::JsonSchema(schema) => (format!("s{schema}"), schema.as_str()),
            Shape::Grammar(grammar) => (format!("g{grammar}"), grammar.as_str()),
        };
        if let Some(known) = self.lock().get(&key) {
            return Ok(Some(known.clone()));
        }
        bounded(text)?;
        let grammar = match shape {
            Shape::Grammar(grammar) => grammar.clone(),
            _ => {
                checked(text)?;
                json_schema_to_grammar(text).map_err(|error| schema_wrong(error.to_string()))?
            }
        };
        let compiled = LlamaSampler::grammar(model, &grammar, "root").map_err(|error| match shape {
            Shape::Grammar(_) => grammar_wrong(error.to_string()),
            _ => schema_wrong(error.to_string()),
        })?;
        let mut kept = self.lock();
        if kept.len() >= MAX_KEPT {
            // Any will do: what is used often is back at once.
            let some = kept.keys().next().cloned();
            some.and_then(|key| kept.remove(&key));
        }
        kept.insert(key, compiled.clone());
        Ok(Some(compiled))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, LlamaSampler>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Chooses tokens, within a form if there is one.
pub(crate) struct Chooser {
    sampler: LlamaSampler,
    grammar: Option<LlamaSampler>,
}

impl Chooser {
    pub(crate) fn new(sampler: LlamaSampler, grammar: Option<LlamaSampler>) -> Self {
        Self { sampler, grammar }
    }

    /// The next token, from the logits at `output`. `None` when the form allows none of the vocabulary.
    pub(crate) fn choose(
        &mut self,
        context: &LlamaContext<'_>,
        output: i32,
        is_end: impl Fn(LlamaToken) -> bool,
    ) -> Option<LlamaToken> {
        let Some(grammar) = &mut self.grammar else { return Some(self.sampler.sample(context, output)) };
        // Most choices are right by themselves, and one token is checked faster than a whole vocabulary.
        let mut all = context.token_data_array_ith(output);
        all.apply_sampler(&mut self.sampler);
        let free = all.selected_token().filter(|token| {
            let mut one = LlamaTokenDataArray::new(
                vec![llama_cpp_2::token::data::LlamaTokenData::new(*token, 1.0, 0.0)],
                false,
            );
            one.apply_sampler(grammar);
            one.data.iter().all(|data| data.logit().is_finite())
        });
        let token = match free {
            Some(token) => token,
            None => {
                let mut allowed = context.token_data_array_ith(output);
                allowed.apply_sampler(grammar);
                allowed.data.retain(|data| data.logit().is_finite());
                if allowed.data.is_empty() {
                    return None;
                }
                allowed.apply_sampler(&mut self.sampler);
                allowed.selected_token()?
            }
        };
        self.sampler.accept(token);
        // The end is not part of the form.
        if !is_end(token) && grammar.try_accept(token).is_err() {
            return None;
        }
        Some(token)
    }
}

/// Of an answer whose form no token goes on with.
pub(crate) fn dead_end() -> Report {
    Report::caller(
        "shape_dead_end",
        "the answer ended early",
        "what was said so far keeps to the form, and no token of the model goes on with it",
        "ask for a form that can be reached with this model's vocabulary; a contradiction in it is the usual reason",
    )
}

fn schema_wrong(why: impl Into<String>) -> Report {
    Report::caller(
        "schema_refused",
        "nothing was generated",
        why,
        "send a JSON schema that can be fulfilled, with the keywords that are enforced here",
    )
}

fn grammar_wrong(why: impl Into<String>) -> Report {
    Report::caller(
        "grammar_refused",
        "nothing was generated",
        why,
        "send a GBNF grammar with a rule `root`, in which no rule begins with itself",
    )
}

/// Short and flat enough for parsers that call themselves.
fn bounded(text: &str) -> Result<(), Report> {
    let wrong = |why: String| {
        let fix = "send a smaller one";
        Err(Report::caller("shape_too_large", "nothing was generated", why, fix))
    };
    if text.len() > MAX_TEXT_BYTES {
        return wrong(format!("the form has {} bytes, at most {MAX_TEXT_BYTES} are read", text.len()));
    }
    let (mut depth, mut deepest) = (0usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    if deepest > MAX_DEPTH {
        return wrong(format!("it has {deepest} brackets within brackets, at most {MAX_DEPTH} are read"));
    }
    Ok(())
}

/// A schema of which every word is enforced, and which is not plainly impossible.
fn checked(text: &str) -> Result<(), Report> {
    let schema: Value = serde_json::from_str(text).map_err(|error| schema_wrong(error.to_string()))?;
    check(&schema, "#")
}

fn check(schema: &Value, at: &str) -> Result<(), Report> {
    let schema = match schema {
        Value::Object(schema) => schema,
        _ => return Err(schema_wrong(format!("{at}: a schema must be an object"))),
    };
    for key in schema.keys() {
        if !ENFORCED.contains(&key.as_str()) && !REMARKS.contains(&key.as_str()) {
            return Err(schema_wrong(format!("{at}/{key}: `{key}` cannot be enforced")));
        }
    }
    possible(schema, at)?;
    enforced(schema, at)?;
    for key in ["properties", "$defs", "definitions"] {
        for (name, inner) in schema.get(key).and_then(Value::as_object).into_iter().flatten() {
            check(inner, &format!("{at}/{key}/{name}"))?;
        }
    }
    for key in ["anyOf", "oneOf", "prefixItems", "items"] {
        for (index, inner) in schema.get(key).and_then(Value::as_array).into_iter().flatten().enumerate() {
            check(inner, &format!("{at}/{key}/{index}"))?;
        }
    }
    if let Some(items) = schema.get("items").filter(|items| items.is_object()) {
        check(items, &format!("{at}/items"))?;
    }
    match schema.get("additionalProperties") {
        Some(inner @ Value::Object(_)) => check(inner, &format!("{at}/additionalProperties")),
        _ => Ok(()),
    }
}

/// Contradictions that can be seen in one place.
fn possible(schema: &Map<String, Value>, at: &str) -> Result<(), Report> {
    let number = |key: &str| schema.get(key).and_then(Value::as_f64);
    let impossible = |why: String| Err(schema_wrong(format!("{at}: {why}")));
    if schema.get("enum").is_some_and(|values| values.as_array().is_none_or(Vec::is_empty)) {
        return impossible("`enum` needs at least one value".to_owned());
    }
    for (least, most) in [
        ("minLength", "maxLength"),
        ("minItems", "maxItems"),
        ("minimum", "maximum"),
        ("exclusiveMinimum", "exclusiveMaximum"),
    ] {
        if let (Some(low), Some(high)) = (number(least), number(most))
            && low > high
        {
            return impossible(format!("no value has `{least}` {low} and `{most}` {high}"));
        }
    }
    let closed = schema.get("additionalProperties") == Some(&Value::Bool(false));
    for name in schema.get("required").and_then(Value::as_array).into_iter().flatten() {
        let Some(name) = name.as_str() else { return impossible("`required` has names only".to_owned()) };
        let known = schema.get("properties").is_some_and(|properties| properties.get(name).is_some());
        if closed && !known {
            return impossible(format!("`{name}` is required and not among the properties"));
        }
    }
    Ok(())
}

/// Words that the converter would leave out where they stand.
fn enforced(schema: &Map<String, Value>, at: &str) -> Result<(), Report> {
    let refused =
        |key: &str, why: &str| Err(schema_wrong(format!("{at}/{key}: `{key}` cannot be enforced {why}")));
    if let Some(whole) = ALONE.iter().find(|key| schema.contains_key(**key)) {
        let remark = |key: &str| REMARKS.contains(&key) || ["$defs", "definitions"].contains(&key);
        let beside = |key: &&String| {
            // The type of a constant says nothing new.
            key.as_str() != *whole
                && !remark(key)
                && !(key.as_str() == "type" && ["const", "enum"].contains(whole))
        };
        if let Some(key) = schema.keys().find(beside) {
            return refused(key, &format!("beside `{whole}`"));
        }
    }
    let tuple = schema.contains_key("prefixItems") || schema.get("items").is_some_and(Value::is_array);
    if tuple && let Some(key) = ["minItems", "maxItems"].into_iter().find(|key| schema.contains_key(*key)) {
        return refused(key, "on a list of given items");
    }
    if schema.contains_key("prefixItems") && schema.contains_key("items") {
        return refused("prefixItems", "beside `items`");
    }
    let is_bound = |key: &str| BOUNDS.contains(&key);
    let own: Map<String, Value> = schema
        .iter()
        .filter(|(key, _)| is_bound(key) || *key == "type")
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    let grammar_of = |schema: &Map<String, Value>| {
        json_schema_to_grammar(&Value::Object(schema.clone()).to_string())
            .map_err(|_| schema_wrong(format!("{at}: the bounds in it are not of a form that is known")))
    };
    for key in own.keys().filter(|key| is_bound(key)) {
        let trivial = ["minItems", "minLength"].contains(&key.as_str()) && own[key] == 0;
        let mut without = own.clone();
        without.remove(key);
        let grammar = grammar_of(&own)?;
        // What the converter writes for a pattern that it cannot follow.
        let any_text = key == "pattern" && grammar.lines().any(|line| line.trim() == "root ::= string");
        if any_text || (!trivial && grammar == grammar_of(&without)?) {
            return refused(key, "as it stands here: it would change nothing");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn refusal(schema: Value) -> String {
        checked(&schema.to_string()).expect_err(&schema.to_string()).to_string()
    }

    #[test]
    fn schemas_that_are_enforced_whole_are_taken() {
        for schema in [
            json!({ "type": "object", "properties": { "a": { "type": "integer", "minimum": 1, "maximum": 9 } },
                    "required": ["a"], "additionalProperties": false, "title": "T" }),
            json!({ "type": "array", "items": { "$ref": "#/$defs/x" }, "minItems": 1, "maxItems": 3,
                    "$defs": { "x": { "enum": ["a", "b", null] } } }),
            json!({ "anyOf": [{ "type": "string", "pattern": "^[a-z]{1,3}$" }, { "const": 5 }, {}] }),
        ] {
            checked(&schema.to_string()).unwrap_or_else(|report| panic!("{schema}: {report}"));
            assert!(json_schema_to_grammar(&schema.to_string()).expect("a grammar").contains("root ::="));
        }
    }

    #[test]
    fn what_cannot_be_enforced_or_fulfilled_says_where() {
        for (schema, place) in [
            (json!({ "properties": { "a": { "multipleOf": 3 } } }), "#/properties/a/multipleOf"),
            (json!({ "anyOf": [{}, { "not": {} }] }), "#/anyOf/1/not"),
            (json!({ "anyOf": [{}], "properties": {} }), "#/properties"),
            (json!({ "type": "number", "minimum": 3 }), "#/minimum"),
            (json!({ "type": "string", "pattern": "^(?=a)b$" }), "#/pattern"),
            (json!({ "type": "string", "pattern": "^a$", "maxLength": 3 }), "#/maxLength"),
            (json!({ "minLength": 1, "type": "object" }), "#/minLength"),
            (json!({ "items": { "uniqueItems": true } }), "#/items/uniqueItems"),
            (json!({ "enum": [] }), "`enum`"),
            (json!({ "minLength": 5, "maxLength": 2 }), "`minLength` 5"),
            (json!({ "required": ["b"], "additionalProperties": false }), "`b` is required"),
            (json!({ "type": "string", "format": "hostname" }), "#/format"),
            (json!({ "$defs": { "x": false } }), "#/$defs/x"),
            (json!([1]), "an object"),
        ] {
            let why = refusal(schema);
            assert!(why.contains(place), "{why}");
        }
        assert!(checked("{").is_err());
    }

    #[test]
    fn deep_and_long_texts_do_not_reach_a_parser() {
        let code = |text: &str| bounded(text).expect_err("too large").code;
        assert_eq!(code(&"(".repeat(MAX_DEPTH + 1)), "shape_too_large");
        assert_eq!(code(&"a".repeat(MAX_TEXT_BYTES + 1)), "shape_too_large");
        bounded(&"()".repeat(1000)).expect("flat");
    }
}
