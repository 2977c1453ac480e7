//! How is an answer kept to a form?
//!
//! A JSON schema becomes a grammar (llama.cpp's converter), a grammar a matcher that knows which tokens may come next
//! ([`crate::grammar`]). Compiled grammars are kept for each model; a request takes a copy, which shares what others find.
//!
//! In:    schemas and grammars from strangers. Out: a matcher, or what is wrong and where.
//! True:  a keyword that the converter would silently leave out is refused: what is accepted here is enforced. A token
//!        is chosen freely first; only one that the form refuses is chosen again among those that it allows.
//! Slow:  a grammar with very many readings is looked through in turns ([`Choice::Later`]) and ends with a reason
//!        when it needs too many ([`Choice::TooMuch`]).
//! Never: a text deep or long enough that llama.cpp's converter, which calls itself, runs out of stack.
//! Source: `common/json-schema-to-grammar.cpp` of llama.cpp; JSON Schema 2020-12.

use crate::grammar::{Mask, Matcher, Stop, Words};
use agentd_domain::engine::Shape;
use agentd_domain::fault::Report;
use llama_cpp_2::json_schema_to_grammar;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::token::data::LlamaTokenData;
use llama_cpp_2::token::data_array::LlamaTokenDataArray;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// The largest schemas of tool collections have some tens of kilobytes.
const MAX_TEXT_BYTES: usize = 64 * 1024;
/// Brackets within brackets. A thread here has two megabytes of stack, each level of the parser some hundred bytes.
const MAX_DEPTH: usize = 64;
/// Compiled grammars of one model: agents have a few each. Each keeps some megabytes at most.
const MAX_KEPT: usize = 32;

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
    words: OnceLock<Arc<Words>>,
    kept: Mutex<HashMap<String, Matcher>>,
}

impl Grammars {
    pub(crate) fn get(&self, model: &LlamaModel, shape: &Shape) -> Result<Option<Matcher>, Report> {
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
        let words = self.words.get_or_init(|| Arc::new(Words::of_model(model)));
        let compiled = Matcher::new(&grammar, words).map_err(|error| match shape {
            Shape::Grammar(_) => grammar_wrong(error),
            _ => schema_wrong(error),
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

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Matcher>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What came of choosing a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Choice {
    Token(LlamaToken),
    /// The form is complete and nothing may follow.
    Complete,
    /// The form allows none of the vocabulary.
    DeadEnd,
    /// This turn's work is used up: ask again, with the same logits.
    Later,
    /// The form takes too much work.
    TooMuch,
}

impl From<Stop> for Choice {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Later => Self::Later,
            Stop::TooMuch => Self::TooMuch,
        }
    }
}

/// Room for all tokens of the vocabulary, used again for every choice.
#[derive(Debug)]
pub(crate) struct Candidates(LlamaTokenDataArray);

impl Default for Candidates {
    fn default() -> Self {
        Self(LlamaTokenDataArray::new(Vec::new(), false))
    }
}

impl Candidates {
    fn choose(
        &mut self,
        sampler: &mut LlamaSampler,
        from: impl Iterator<Item = (u32, f32)>,
    ) -> Option<LlamaToken> {
        let Self(array) = self;
        array.data.clear();
        array
            .data
            .extend(from.map(|(token, logit)| LlamaTokenData::new(LlamaToken(token as i32), logit, 0.0)));
        (array.selected, array.sorted) = (None, false);
        if array.data.is_empty() {
            return None;
        }
        array.apply_sampler(sampler);
        array.selected_token()
    }
}

/// Chooses tokens, within a form if there is one.
pub(crate) struct Chooser {
    /// Without one the most likely token is taken.
    sampler: Option<LlamaSampler>,
    form: Option<Matcher>,
    /// What was drawn for the token that is looked for: drawn once, however many turns it takes.
    drawn: Option<Drawn>,
}

#[derive(Debug, Clone, Copy)]
enum Drawn {
    Freely(LlamaToken),
    Within(LlamaToken),
}

impl Chooser {
    pub(crate) fn new(sampler: Option<LlamaSampler>, form: Option<Matcher>) -> Self {
        Self { sampler, form, drawn: None }
    }

    /// Choosing may take long.
    pub(crate) fn has_form(&self) -> bool {
        self.form.is_some()
    }

    /// The next token, from these logits of the whole vocabulary.
    pub(crate) fn choose(
        &mut self,
        logits: &[f32],
        candidates: &mut Candidates,
        is_end: impl Fn(LlamaToken) -> bool,
    ) -> Choice {
        let token = match self.within(logits, candidates) {
            Choice::Token(token) => token,
            other => return other,
        };
        // The end is not part of the form.
        if let Some(form) = self.form.as_mut().filter(|_| !is_end(token)) {
            match form.accept(token.0 as u32) {
                Ok(true) => {}
                Ok(false) => return Choice::DeadEnd,
                Err(stop) => return stop.into(),
            }
        }
        self.drawn = None;
        if let Some(sampler) = &mut self.sampler {
            sampler.accept(token);
        }
        Choice::Token(token)
    }

    /// Most free choices are right by themselves, and one token is checked faster than a whole vocabulary.
    fn within(&mut self, logits: &[f32], candidates: &mut Candidates) -> Choice {
        let all = logits.iter().enumerate().map(|(token, logit)| (token as u32, *logit));
        let Some(form) = &mut self.form else {
            let token = draw(self.sampler.as_mut(), candidates, all);
            return token.map_or(Choice::DeadEnd, Choice::Token);
        };
        let free = match self.drawn {
            Some(Drawn::Within(token)) => return Choice::Token(token),
            Some(Drawn::Freely(token)) => token,
            None => {
                match form.is_finished() {
                    Ok(false) => {}
                    Ok(true) => return Choice::Complete,
                    Err(stop) => return stop.into(),
                }
                let Some(token) = draw(self.sampler.as_mut(), candidates, all) else {
                    return Choice::DeadEnd;
                };
                self.drawn = Some(Drawn::Freely(token));
                token
            }
        };
        let mask = match form.allows(free.0 as u32) {
            Ok(true) => return Choice::Token(free),
            Ok(false) => form.mask(),
            Err(stop) => return stop.into(),
        };
        let mask: Arc<Mask> = match mask {
            Ok(mask) => mask,
            Err(stop) => return stop.into(),
        };
        let allowed = mask.tokens().filter_map(|token| Some((token, *logits.get(token as usize)?)));
        match draw(self.sampler.as_mut(), candidates, allowed) {
            Some(token) => {
                self.drawn = Some(Drawn::Within(token));
                Choice::Token(token)
            }
            None => Choice::DeadEnd,
        }
    }
}

/// One of these tokens; the first of the most likely where there is no sampler, as llama.cpp's greedy one.
fn draw(
    sampler: Option<&mut LlamaSampler>,
    candidates: &mut Candidates,
    from: impl Iterator<Item = (u32, f32)>,
) -> Option<LlamaToken> {
    if let Some(sampler) = sampler {
        return candidates.choose(sampler, from);
    }
    let best = from.reduce(|best, next| if next.1 > best.1 { next } else { best });
    best.map(|(token, _)| LlamaToken(token as i32))
}

/// Of an answer whose form takes too long to be kept.
pub(crate) fn too_slow() -> Report {
    Report::caller(
        "shape_too_slow",
        "the answer ended early",
        "there are so many ways to read what was said by its form that the next token could not be found in time",
        "write the grammar so that a text can be read in few ways: no two alternatives that begin alike again and again",
    )
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
