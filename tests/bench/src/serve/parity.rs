//! Is what stands side by side the same arithmetic?
//!
//! First the loops: one small program (`tests/bench/serve-loop.c`), linked with the engine's libraries and with the
//! peer's, reads a prompt and answers, in turn. What differs there differs between two versions of ggml and two ways to
//! run threads, and is no merit or fault of a server; ratios of servers are told as they are and divided by it.
//! Then the words: single requests to both servers, greedy, each to an empty cache, must have the same answer.

use super::client::{Ask, post};
use super::load::Load;
use super::{Bed, Context as Bench, Need};
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use tests_models::words;
use tests_tidy::promises::Row;

/// Pairs of loops, interleaved.
const PAIRS: usize = 7;
const PROMPT_TOKENS: u32 = 512;
const ANSWER_TOKENS: u32 = 64;
/// Logarithms of probabilities that two builds of ggml may put in either order: activations have eight bits, a flip
/// of the last moves a logit by about half of this. The models' two best are ten times that apart on average.
const TIE: f64 = 0.05;
/// Single requests whose words are compared, of growing length.
const REQUESTS: usize = 8;

#[derive(Debug, Deserialize)]
struct Times {
    reading_us: f64,
    answering_us: f64,
    tokens: Vec<i32>,
}

/// How much faster our library's loop is than the peer's: 1 when ggml is the same.
#[derive(Debug, Clone, Copy)]
pub struct Loops {
    pub reading: f64,
    pub answering: f64,
}

impl Loops {
    /// A ratio of servers without what their versions of ggml differ by; none for other rows.
    pub fn normalised(self, row: &Row) -> Option<Row> {
        let value = if row.what.ends_with("tokens per second, ours over theirs") {
            row.value / self.answering
        } else if row.what.contains("time to first token") && row.what.ends_with("ours over theirs") {
            row.value * self.reading
        } else {
            return None;
        };
        Some(Row::new(format!("{}, without ggml's own difference", row.what), value, "x").detail())
    }
}

pub fn loops(bench: &Bench) -> Result<(Loops, Vec<Row>)> {
    let folder = tempfile::tempdir()?;
    let own = ours(bench, folder.path())?;
    let variants = [
        ("compiled for this machine alone", bench.peer.native_backends()),
        ("as shipped", bench.programs.backends.clone()),
    ];
    let mut rows = Vec::new();
    let mut native = None;
    for (words, backends) in variants {
        let (mut reading, mut answering, mut equal) = (Vec::new(), Vec::new(), 0);
        for _ in 0..PAIRS {
            let our = run(bench, &own, Some(&backends))?;
            let their = run(bench, &bench.peer.loop_program(), None)?;
            reading.push(their.reading_us / our.reading_us);
            answering.push(their.answering_us / our.answering_us);
            equal += usize::from(our.tokens == their.tokens);
        }
        let model = bench.model_words();
        let what = format!("the same loop with our ggml {words} over the peer's, {model}");
        let read = Row::median(format!("{what}: reading {PROMPT_TOKENS} tokens"), &reading, "x")?;
        let answered = Row::median(format!("{what}: answering {ANSWER_TOKENS} tokens"), &answering, "x")?;
        if native.is_none() {
            let apart = |row: &Row| (row.value - 1.0).abs() * 100.0;
            let most = apart(&read).max(apart(&answered));
            let what =
                format!("loops of our ggml and the peer's, both native: apart, {PAIRS} pairs, {model}");
            rows.push(Row::new(what, most, "%").at_most(2.0));
            native = Some(Loops { reading: read.value, answering: answered.value });
        }
        rows.extend([read.detail(), answered.detail()]);
        let what = format!("greedy answers of the loops, ours {words}, that are the peer's, of {PAIRS}");
        rows.push(Row::new(what, equal as f64, "pairs").detail());
    }
    Ok((native.context("two variants were measured")?, rows))
}

/// The loop, linked with the libraries that lie beside the engine.
fn ours(bench: &Bench, folder: &Path) -> Result<PathBuf> {
    let libraries = bench.programs.engine.parent().context("the engine's folder")?;
    let program = folder.join("loop-ours");
    let mut gcc = Command::new("gcc");
    gcc.arg("-O2").arg("-I").arg(bench.peer.tree.join("include"));
    gcc.arg("-I").arg(bench.peer.tree.join("ggml/include"));
    gcc.arg(bench.checkout.path("tests/bench/serve-loop.c")).arg("-o").arg(&program).arg("-L").arg(libraries);
    // Of the whole program, also of what the libraries need themselves.
    gcc.arg(format!("-Wl,--disable-new-dtags,-rpath,{}", libraries.display()));
    gcc.args(["-l:libllama.so.0", "-l:libggml.so.0", "-l:libggml-base.so.0"]);
    crate::spawn::run(&mut gcc)?;
    Ok(program)
}

fn run(bench: &Bench, program: &Path, backends: Option<&Path>) -> Result<Times> {
    let mut command = Command::new(program);
    command.arg(&bench.model).arg(bench.threads.to_string());
    command.args([PROMPT_TOKENS.to_string(), ANSWER_TOKENS.to_string()]).args(backends);
    let output = command.output().with_context(|| format!("cannot start {}", program.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", program.display());
    let times: Times = serde_json::from_slice(&output.stdout).with_context(|| said.into_owned())?;
    ensure!(times.tokens.len() == ANSWER_TOKENS as usize + 1, "{} tokens", times.tokens.len());
    Ok(times)
}

/// Single greedy requests to both, compared word for word. Where they part, llama-server is asked how near its two best
/// words were: two builds of ggml round differently, and what is nearer than that is a tie.
pub fn words_agree(bench: &Bench) -> Result<Vec<Row>> {
    let (mut equal, mut tied) = (0, 0);
    for request in 0..REQUESTS {
        // Each on two servers that have answered nothing: agentd keeps earlier prompts in its cache, the next one's
        // cells lie behind them, and flash attention then adds up in other groups, in 16 bits.
        let bed = Bed::start(bench, Need { cells: 2048, places: 2, agents: 1 })?;
        let prompt = words(900 + request as u64, 16 << (request % 6));
        let our = Ask::new(&bed.ours.places()[0], prompt.clone(), ANSWER_TOKENS).run();
        ensure!(our.failed.is_none(), "{:?}", our.failed);
        ensure!(our.usage.completion_tokens == u64::from(ANSWER_TOKENS), "{:?}", our.usage);
        ensure!(distinct(&our.text) > 8, "the model says the same again and again: {:?}", our.text);
        let body = json!({ "prompt": prompt, "n_predict": ANSWER_TOKENS, "temperature": 0, "ignore_eos": true,
            "n_probs": 2 });
        let mut text = String::new();
        post(&bed.peer.place, "/completion", &body)?.read_to_string(&mut text)?;
        let their: Value = serde_json::from_str(&text)?;
        match parted(&our.text, &their)? {
            None => equal += 1,
            Some(Parting { at, apart }) => {
                println!("a prompt of {} tokens: apart at token {at}, {apart:?}", our.usage.prompt_tokens);
                tied += usize::from(apart.is_some_and(|apart| apart <= TIE));
            }
        }
    }
    let what = format!(
        "greedy answers of {ANSWER_TOKENS} tokens, single requests of 16 to 512 tokens to empty caches, {}{}",
        bench.model_words(),
        bench.ours_words()
    );
    let of = format!("of {REQUESTS}");
    let same = Row::new(format!("{what}: token for token llama-server's"), equal as f64, &of);
    let until =
        format!("{what}: the same, or until its two best tokens were within {TIE} of each other (log)");
    Ok(vec![same.at_least(REQUESTS as f64), Row::new(until, (equal + tied) as f64, &of)])
}

/// Where an answer leaves the peer's.
#[derive(Debug, PartialEq)]
struct Parting {
    at: usize,
    /// How far the peer's best token was from its second, when the second is what we said.
    apart: Option<f64>,
}

fn parted(ours: &str, theirs: &Value) -> Result<Option<Parting>> {
    let steps =
        theirs["completion_probabilities"].as_array().context("no tokens in llama-server's answer")?;
    let mut rest = ours;
    for (at, step) in steps.iter().enumerate() {
        let said = step["token"].as_str().context("a token's text")?;
        if let Some(after) = rest.strip_prefix(said) {
            rest = after;
            continue;
        }
        let best = step["top_logprobs"].as_array().context("the best tokens")?;
        let second = best
            .iter()
            .find(|token| token["token"].as_str().is_some_and(|text| text != said && rest.starts_with(text)));
        let log = |token: &Value| token["logprob"].as_f64();
        let apart = second.and_then(|second| Some((log(step)? - log(second)?).abs()));
        return Ok(Some(Parting { at, apart }));
    }
    Ok((!rest.is_empty()).then_some(Parting { at: steps.len(), apart: None }))
}

/// Different texts of four letters in an answer: a model that repeats itself shows nothing.
fn distinct(text: &str) -> usize {
    let parts: std::collections::BTreeSet<&[u8]> = text.as_bytes().chunks(4).collect();
    parts.len()
}

/// What the load generator itself took, of one processor.
pub fn own_cpu<'a>(what: &str, loads: impl Iterator<Item = &'a Load>) -> Result<Row> {
    let shares: Vec<f64> = loads.map(|load| load.own_cpu_share() * 100.0).collect();
    Ok(Row::median(format!("{what}: load generator, of one processor"), &shares, "%")?.detail())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_two_answers_part_is_found_and_how_near_it_was() {
        let step = |token: &str, second: &str| {
            json!({ "token": token, "logprob": -1.0, "top_logprobs": [
                { "token": token, "logprob": -1.0 }, { "token": second, "logprob": -1.02 } ] })
        };
        let theirs = json!({ "completion_probabilities": [step(" ab", "x"), step("cd", "ef")] });
        assert_eq!(parted(" abcd", &theirs).unwrap(), None);
        let near = parted(" abefgh", &theirs).unwrap().unwrap();
        assert!(near.at == 1 && near.apart.unwrap() <= TIE, "{near:?}");
        assert_eq!(parted(" abzz", &theirs).unwrap(), Some(Parting { at: 1, apart: None }));
        assert_eq!(parted(" abcdcd", &theirs).unwrap(), Some(Parting { at: 2, apart: None }));
    }

    #[test]
    fn a_ratio_of_servers_is_told_without_what_ggml_differs_by() {
        let loops = Loops { reading: 1.1, answering: 0.9 };
        let of = |what: &str, value: f64| loops.normalised(&Row::new(what, value, "x")).map(|row| row.value);
        assert_eq!(of("W1: tokens per second, ours over theirs", 0.9), Some(1.0));
        assert_eq!(of("W2: time to first token p50, ours over theirs", 0.5), Some(0.55));
        assert_eq!(of("W2: computed prompt tokens, ours over theirs", 0.1), None);
        assert_eq!(of("W1: tokens per second, agentd", 0.1), None);
    }
}
