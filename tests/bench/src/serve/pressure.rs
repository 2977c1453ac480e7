//! The workloads in which agents are in each other's way: who talks beside a long prompt, too many at once, and one who
//! cannot wait. Sizes stand in the rows; with `--quick` they are small and so is the model.

use super::client::{Ask, Speakers, Told};
use super::load::{Load, Next, closed, jain, quantile, together};
use super::ours::Ours;
use super::workloads::throughput;
use super::{Bed, Compared, Context, LATE, Need, Pair, Way};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tests_models::words;
use tests_tidy::promises::Row;

/// Words that no pair has.
const AGAIN_SEED: u64 = 999_999_999;
const WEIGHTED_SEED: u64 = 800_000_000;
/// A token of an answer beside one of a prompt, as the engine weighs them.
const OUTPUT_COST: usize = 2;

/// W4, E13. Four agents talk while a fifth sends long prompts.
pub(super) fn neighbour(context: &Context) -> Result<Vec<Row>> {
    let (long, prompts, answer) = if context.options.quick { (4000, 2, 256) } else { (8000, 2, 768) };
    let talkers = 4;
    let cells = long + talkers * (128 + answer) + 1024;
    let bed = Bed::start(context, Need { cells, places: talkers + 1, agents: talkers as usize + 1 })?;
    let pairs = bed.pairs(context.options.pairs, |way, seed| {
        let talk = |agent: u32| {
            let ask = Ask::new(&way(agent as usize), words(seed + u64::from(agent), 128), answer);
            let mut ask = Some(ask);
            Box::new(move |_: &[Told]| ask.take()) as Next<'_>
        };
        let noise = move |told: &[Told]| {
            let number = told.len();
            let prompt = || words(seed + 50 + number as u64, long as usize);
            let think = Duration::from_millis(500);
            (number < prompts).then(|| Ask { think, ..Ask::new(&way(talkers as usize), prompt(), 8) })
        };
        closed((0..talkers).map(talk).chain([Box::new(noise) as Next<'_>]).collect())
    });
    let what = format!(
        "W4, {talkers} agents talk ({answer} tokens) while one sends {prompts} prompts of {long} tokens, {}{}",
        context.model_words(),
        context.ours_words()
    );
    let compared = Compared { what, pairs: &pairs };
    let gaps = |share: f64| {
        move |load: &Load| {
            let talk = load.told.iter().take(talkers as usize).flatten();
            quantile(&talk.flat_map(Told::gaps_ms).collect::<Vec<_>>(), share)
        }
    };
    let stalls: Vec<f64> = pairs.iter().filter_map(|pair| gaps(0.99)(&pair.ours)).collect();
    let mut rows = vec![
        Row::median(format!("{}: stall of who talks p99, agentd", compared.what), &stalls, "ms")?
            .at_most(500.0),
    ];
    rows.extend(compared.sides("stall of who talks p99", "ms", gaps(0.99))?);
    rows.extend(compared.sides("stall of who talks, the longest", "ms", gaps(1.0))?);
    rows.push(compared.ratio("tokens per second", throughput)?);
    let last = |load: &Load| load.told.last().and_then(|noise| quantile(&firsts(noise), 0.5));
    rows.extend(compared.sides("time to first token of the long prompts", "ms", last)?);
    rows.extend(compared.failures());
    rows.push(compared.own_cpu()?);
    Ok(rows)
}

/// W7, E14. All agents ask all the time, four times more than the cache holds.
pub(super) fn oversubscribed(context: &Context) -> Result<Vec<Row>> {
    let (prompt, answer, seconds) = if context.options.quick { (96, 160, 16) } else { (64, 64, 90) };
    let agents = 16;
    let cells = agents * (prompt + answer) / 4;
    let bed = Bed::start(context, Need { cells, places: agents, agents: agents as usize })?;
    let window = Duration::from_secs(seconds);
    let pairs = bed.pairs(context.options.pairs, |way, seed| {
        let until = Instant::now() + window;
        closed(
            (0..agents)
                .map(|agent| {
                    let own = seed + 1000 * u64::from(agent);
                    Box::new(move |told: &[Told]| {
                        let text = || words(own + told.len() as u64, prompt as usize);
                        (Instant::now() < until).then(|| Ask::new(&way(agent as usize), text(), answer))
                    }) as Next<'_>
                })
                .collect(),
        )
    });
    let what = format!(
        "W7, {agents} agents for {seconds} s, prompts of {prompt}, answers of {answer}, {cells} cells for four times as many, {}{}",
        context.model_words(),
        context.ours_words()
    );
    let compared = Compared { what, pairs: &pairs };
    let fairness = |load: &Load| Some(jain(&service(load, window, prompt)));
    let fair: Vec<f64> = pairs.iter().filter_map(|pair| fairness(&pair.ours)).collect();
    let mut rows = vec![
        Row::median(format!("{}: Jain's index of service, agentd", compared.what), &fair, "of 1")?
            .at_least(0.95),
    ];
    rows.extend(compared.sides("Jain's index of service", "of 1", fairness)?);
    let done = |load: &Load| {
        let whole = load.all().filter(|told| told.failed.is_none());
        let tokens: u64 = whole.map(|told| told.usage.completion_tokens).sum();
        Some(tokens as f64 / load.wall.as_secs_f64())
    };
    rows.extend(compared.sides("tokens of whole answers per second", "tokens/s", done)?);
    rows.extend(compared.failures());
    rows.push(compared.own_cpu()?);
    drop(bed);
    rows.extend(by_weight(context)?);
    Ok(rows)
}

/// What each was given while all wanted more: tokens of answers, and prompts that came to speak.
fn service(load: &Load, window: Duration, prompt: u32) -> Vec<f64> {
    let end = load.begun + window;
    let of = |told: &Vec<Told>| {
        let spoken =
            told.iter().map(|told| told.pieces.iter().filter(|at| **at <= end).count()).sum::<usize>();
        let read = told.iter().filter(|told| told.pieces.first().is_some_and(|at| *at <= end)).count();
        (OUTPUT_COST * spoken + read * prompt as usize) as f64
    };
    load.told.iter().map(of).collect()
}

/// W7 by weights, which the shares of partitions have; llama-server knows none. Smaller requests for a longer time:
/// the lightest must come to its turn a few times before its share can be told from chance.
fn by_weight(context: &Context) -> Result<Vec<Row>> {
    let (prompt, answer, seconds) = if context.options.quick { (96, 160, 16) } else { (64, 64, 300) };
    let agents = 16;
    let cells = agents * (prompt + answer) / 4;
    let ours = Ours::start(&context.programs, &context.idle, &context.model, cells, agents, agents as usize)?;
    let window = Duration::from_secs(seconds);
    let weight = |agent: u32| [1, 2, 4, 8][agent as usize % 4];
    let place = |agent: u32| {
        ours.past_agentd(json!({ "account": format!("weighted-{agent}"), "weight": weight(agent) }))
    };
    super::warm(&place(0));
    let until = Instant::now() + window;
    let load = closed(
        (0..agents)
            .map(|agent| {
                let (place, own) = (place(agent), WEIGHTED_SEED + 1000 * u64::from(agent));
                Box::new(move |told: &[Told]| {
                    let text = || words(own + told.len() as u64, prompt as usize);
                    (Instant::now() < until).then(|| Ask::new(&place, text(), answer))
                }) as Next<'_>
            })
            .collect(),
    );
    let service = service(&load, window, prompt);
    let by_weight: Vec<f64> =
        (0..agents).zip(service).map(|(agent, service)| service / f64::from(weight(agent))).collect();
    let what = format!(
        "W7, {agents} agents with weights of 1, 2, 4 and 8 for {seconds} s, prompts of {prompt}, answers of {answer}, {cells} \
         cells for four times as many, {}{}, agentd's engine",
        context.model_words(),
        context.ours_words()
    );
    let failed = load.failures();
    Ok(vec![
        Row::new(format!("{what}: Jain's index of service by weight"), jain(&by_weight), "of 1")
            .at_least(0.95),
        Row::new(
            format!("{what}: failed requests of {}", load.all().count()),
            failed.len() as f64,
            "requests",
        )
        .at_most(0.0),
    ])
}

/// W8, E15 and E16. Every place is taken by long answers; one more agent comes, whose priority is the highest.
///
/// No agent has a priority of its own through agentd's front: who comes late asks the engine itself, with the same words.
/// llama-server has no priorities; there it waits for a place.
pub(super) fn arrival(context: &Context) -> Result<Vec<Row>> {
    let (prompt, answer) = if context.options.quick { (512, 512) } else { (1024, 512) };
    let (busy, late) = (8, 4096);
    // What those who speak have not used yet is less than what comes: somebody's cells are needed.
    let cells = busy * (prompt + answer) + 256;
    let mut bed = Bed::start(context, Need { cells, places: busy, agents: busy as usize })?;
    bed.late = Some(bed.ours.past_agentd(json!({ "account": "late", "priority": 100 })));
    let one = |way: Way<'_>, seed: u64| Ask::new(&way(LATE), words(seed + 99, late), 8);
    let idle = bed.pairs(context.options.pairs, |way, seed| together(vec![one(way, seed + 500)]));
    let full = bed.pairs(context.options.pairs, |way, seed| {
        let speakers = Arc::new(Speakers::default());
        let talk = |agent: u32| {
            let ask = Ask::new(&way(agent as usize), words(seed + u64::from(agent), prompt as usize), answer);
            let mut ask = Some(Ask { speaks: Some(Arc::clone(&speakers)), ..ask });
            Box::new(move |_: &[Told]| ask.take()) as Next<'_>
        };
        // When all others speak.
        let mut comes = Some(Ask { after: Some((Arc::clone(&speakers), busy)), ..one(way, seed) });
        closed((0..busy).map(talk).chain([Box::new(move |_: &[Told]| comes.take()) as Next<'_>]).collect())
    });
    let what = format!(
        "W8, an agent of the highest priority with {late} tokens while {busy} of {busy} places with {prompt} speak, {}{}",
        context.model_words(),
        context.ours_words()
    );
    let last = |load: &Load| load.told.last().and_then(|told| quantile(&firsts(told), 0.5));
    let times = |side: fn(&Pair) -> &Load| -> Result<Vec<f64>> {
        let pairs = idle.iter().zip(&full);
        let times = pairs.map(|(idle, full)| Some(last(side(full))? / last(side(idle))?));
        let failed =
            || full.iter().find_map(|pair| side(pair).failures().first().map(|why| (*why).to_owned()));
        let times: Option<Vec<f64>> = times.collect();
        times.with_context(|| format!("who came late was not answered: {:?}", failed()))
    };
    let over = "first token over that of an idle machine";
    let mut rows = vec![
        Row::median(format!("{what}: {over}, agentd's engine"), &times(|pair| &pair.ours)?, "x")?
            .at_most(1.5),
        Row::median(format!("{what}: {over}, llama-server"), &times(|pair| &pair.theirs)?, "x")?,
    ];
    let compared = Compared { what, pairs: &full };
    rows.extend(compared.sides("time to first token of who came late", "ms", last)?);
    rows.extend(compared.failures());
    rows.extend(restored(&compared.what, &bed)?);
    Ok(rows)
}

/// E16: what was preempted meanwhile, brought back instead of computed again: beside the time to the first token of as
/// long a prompt, when nobody else is there.
fn restored(what: &str, bed: &Bed) -> Result<Vec<Row>> {
    let usage = bed.ours.usage()?;
    let number = |name: &str| usage[name].as_f64().with_context(|| format!("no {name} in {usage}"));
    ensure!(number("swapped_in")? > 0.0, "nobody had to give way, so nothing was brought back: {usage}");
    let (tokens, us) = (number("last_swap_tokens")?, number("last_swap_in_us")?);
    let again = Ask::new(&bed.ours.places()[0], words(AGAIN_SEED, tokens as usize), 1).run();
    let again_ms = again.first_ms().with_context(|| format!("not computed again: {:?}", again.failed))?;
    let what = format!("{what}: the last sequence of {tokens} tokens that gave way");
    Ok(vec![
        Row::new(
            format!("{what}, brought back so many times faster than computed again"),
            again_ms * 1000.0 / us.max(1.0),
            "x",
        )
        .at_least(10.0),
        Row::new(format!("{what}, brought back in"), us / 1000.0, "ms").detail(),
        Row::new(format!("{what}, copied away in"), number("last_swap_out_us")? / 1000.0, "ms").detail(),
        Row::new(format!("{what}, as many tokens computed in"), again_ms, "ms").detail(),
    ])
}

fn firsts(told: &[Told]) -> Vec<f64> {
    told.iter().filter_map(Told::first_ms).collect()
}
