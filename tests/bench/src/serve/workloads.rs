//! The nine workloads (those in which agents are in each other's way stand in [`pressure`]) and the idle engine.
//! Sizes stand in the rows; with `--quick` they are small and so is the model.
//!
//! Each function starts both servers anew with the cache and the places that its workload is about, equal on both
//! sides, measures pair by pair and returns its rows. Prompts have one token per word and no two requests share any
//! that the workload does not say they share.

use super::client::{Ask, Told};
use super::load::{Load, Next, closed, open, quantile, together};
use super::peer::{CacheOf, Kind};
use super::{Bed, Compared, Context, Need, Pair, Way, pressure, processes};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::time::Duration;
use tests_models::words;
use tests_tidy::promises::Row;

type Workload = fn(&Context) -> Result<Vec<Row>>;

pub(super) const ALL: [(u8, &str, Workload); 9] = [
    (1, "unique prompts", unique),
    (2, "a shared prompt, all at once", shared),
    (3, "more agents than places, turn by turn", turns),
    (4, "a noisy neighbour", pressure::neighbour),
    (5, "words that were there before", echo),
    (6, "answers by a schema", schema),
    (7, "four times more than fits", pressure::oversubscribed),
    (8, "one more while all is full", pressure::arrival),
    (9, "four branches of one trunk", branches),
];

/// Milliseconds to the first token at this share of the requests.
fn first(share: f64) -> impl Fn(&Load) -> Option<f64> {
    move |load| quantile(&load.firsts_ms(), share)
}

pub(super) fn throughput(load: &Load) -> Option<f64> {
    load.failures().is_empty().then(|| load.tokens_per_second())
}

/// W1, E11. Nothing is shared: the same kernels do the same work, so nothing may be lost.
fn unique(context: &Context) -> Result<Vec<Row>> {
    let (prompt, answer, rounds) = if context.options.quick { (256, 32, 2) } else { (512, 64, 2) };
    let need = Need { cells: 8 * (prompt + answer) + 512, places: 8, agents: 8 };
    let load = |agents: usize| {
        move |way: Way<'_>, seed: u64| {
            let client = |agent: usize| -> Next<'_> {
                // No two requests of a pair have the same words, those of other numbers of agents included.
                let own = seed + 10_000 * agents as u64 + 100 * agent as u64;
                let ask = move |round: usize| {
                    Ask::new(&way(agent), words(own + round as u64, prompt as usize), answer)
                };
                Box::new(move |told: &[Told]| (told.len() < rounds).then(|| ask(told.len())))
            };
            closed((0..agents).map(client).collect())
        }
    };
    let what = |agents: usize| {
        format!(
            "W1, {agents} agents, {rounds} unique prompts of {prompt} and answers of {answer} tokens each, {}{}",
            context.model_words(),
            context.ours_words()
        )
    };
    let (bed, kind, mut rows) = Bed::beside_best(context, need, prompt + answer, &what(8), load(8))?;
    for agents in std::env::var("AGENTS").ok().map(|a| vec![a.parse().unwrap()]).unwrap_or(vec![1usize, 4, 8])
    {
        let pairs = bed.pairs(context.options.pairs, load(agents));
        let what = format!("{}, beside {}", what(agents), kind.words());
        let compared = Compared { what, pairs: &pairs };
        rows.push(compared.ratio("tokens per second", throughput)?.at_least(0.97));
        rows.push(compared.ratio("time to first token p50", first(0.5))?.at_most(1.03));
        rows.extend(compared.sides("tokens per second", "tokens/s", throughput)?);
        rows.extend(compared.sides("time to first token p50", "ms", first(0.5))?);
        rows.extend(compared.sides("time to first token p99", "ms", first(0.99))?);
        rows.extend(compared.sides("between tokens p50", "ms", |load| quantile(&load.gaps_ms(), 0.5))?);
        rows.extend(compared.sides("between tokens p99", "ms", |load| quantile(&load.gaps_ms(), 0.99))?);
        rows.extend(compared.failures());
        rows.push(compared.own_cpu()?);
    }
    // The same in an open loop at half of what the closed one came to.
    let rate = 0.5 * bed_rate(&rows, answer);
    let asks = if context.options.quick { 12 } else { 16 };
    let pairs = bed.pairs(context.options.pairs, |way, seed| {
        let ask = |number: usize| {
            Ask::new(&way(number), words(seed + 500_000 + number as u64, prompt as usize), answer)
        };
        open((0..asks).map(ask).collect(), rate, seed)
    });
    let what = format!(
        "W1, open loop, {asks} requests at {rate:.2} a second (Poisson), prompts of {prompt}, answers of {answer} tokens, {}{}",
        context.model_words(),
        context.ours_words()
    );
    let compared = Compared { what, pairs: &pairs };
    rows.push(compared.ratio("time to first token p50", first(0.5))?.detail());
    rows.extend(compared.sides("time to first token p99", "ms", first(0.99))?);
    rows.extend(compared.failures());
    rows.push(compared.own_cpu()?);
    Ok(rows)
}

/// Requests per second that llama-server answered with eight agents.
fn bed_rate(rows: &[Row], answer: u32) -> f64 {
    let theirs =
        rows.iter().rfind(|row| row.what.ends_with("tokens per second, llama-server")).map(|row| row.value);
    theirs.unwrap_or(1.0) / f64::from(answer)
}

/// W2, E12. Eight agents arrive together; what they share is computed once.
fn shared(context: &Context) -> Result<Vec<Row>> {
    let agents = 8;
    let (shared, tail, answer, most) =
        if context.options.quick { (1024, 64, 32, 0.18) } else { (4096, 100, 64, 0.16) };
    // Room for everything, also where nothing is shared: what is compared is work, not memory.
    let cells = agents * (shared + tail + answer) + 512;
    let need = Need { cells, places: agents, agents: agents as usize };
    let load = |way: Way<'_>, seed: u64| {
        let trunk = words(seed, shared as usize);
        let ask = |agent: u32| {
            let own = words(seed + 1 + u64::from(agent), tail as usize);
            Ask::new(&way(agent as usize), format!("{trunk}{own}"), answer)
        };
        together((0..agents).map(ask).collect())
    };
    let what = format!(
        "W2, {agents} agents at once, {shared} tokens shared, tails of {tail}, answers of {answer}, {}{}",
        context.model_words(),
        context.ours_words()
    );
    let (bed, kind, mut rows) = Bed::beside_best(context, need, shared + tail + answer, &what, load)?;
    let pairs = bed.pairs(context.options.pairs, load);
    let what = format!("{what}, beside {}", kind.words());
    let compared = Compared { what, pairs: &pairs };
    // What agentd does not say it computed, it is taken to have computed.
    let asked = |load: &Load| load.all().map(|told| told.usage.prompt_tokens).sum::<u64>() as f64;
    let computed = |load: &Load| {
        load.failures().is_empty().then(|| load.computed_tokens().unwrap_or_else(|| asked(load)))
    };
    let shares: Option<Vec<f64>> =
        pairs.iter().map(|pair| Some(computed(&pair.ours)? / asked(&pair.ours))).collect();
    let places = rows.first().map(|row| (row.what.clone(), row.value)).context("nothing was tried")?;
    let ours: Option<Vec<f64>> = pairs.iter().map(|pair| throughput(&pair.ours)).collect();
    let ours: Vec<f64> = ours.context("agentd failed")?.into_iter().map(|speed| speed / places.1).collect();
    rows.push(Row::median(format!("agentd over {}", places.0), &ours, "x")?);
    let shares = shares.with_context(|| format!("{:?}", pairs[0].ours.failures()))?;
    let share = format!("{}: of all prompt tokens agentd computed", compared.what);
    rows.push(Row::median(share, &shares, "of 1")?.at_most(most));
    let timed = [
        compared.ratio("time to first token p50", first(0.5))?,
        compared.ratio("time to first token of the last agent", first(1.0))?,
        compared.ratio("tokens per second", throughput)?,
    ];
    if context.options.quick {
        rows.extend(timed);
    } else {
        let [p50, last, tokens] = timed;
        rows.extend([p50.at_most(0.28), last.at_most(0.20), tokens.at_least(4.0)]);
    }
    rows.extend(compared.sides("computed prompt tokens", "tokens", computed)?);
    rows.extend(compared.sides("time to first token p50", "ms", first(0.5))?);
    rows.extend(compared.sides("time to first token of the last agent", "ms", first(1.0))?);
    rows.extend(compared.sides("tokens per second", "tokens/s", throughput)?);
    rows.extend(compared.failures());
    rows.push(compared.own_cpu()?);
    Ok(rows)
}

/// W3, E12's warm turns. Agents that come back after a tool's answer, more of them than places.
fn turns(context: &Context) -> Result<Vec<Row>> {
    let (agents, turns, begin, tool, answer, think_ms) =
        if context.options.quick { (12, 3, 512, 32, 16, 100) } else { (12, 3, 1024, 64, 32, 500) };
    let places = 8;
    let whole = begin + turns * (tool + answer);
    // As many as have a place at once fit; the others' turns wait for a place with their cache kept elsewhere.
    let cells = places * whole + 512;
    let mut rows = Vec::new();
    // Inside llama-server's host cache, and with one that the agents exceed.
    for (words_of, cache_ram_mib, least) in [
        ("inside llama-server's --cache-ram of 8192 MiB", 8192, 0.97),
        ("beyond its --cache-ram of 16 MiB", 16, 2.0),
    ] {
        // As many places as said, for more agents than places is what this is about.
        let kind = Kind::Many { places, cache: CacheOf::All, cache_ram_mib };
        let bed = Bed::beside(context, Need { cells, places, agents }, kind)?;
        let pairs = bed.pairs(context.options.pairs, |way, seed| {
            closed(
                (0..agents)
                    .map(|agent| conversation(way, seed, agent, [begin, turns, tool, answer], think_ms))
                    .collect(),
            )
        });
        let what = format!(
            "W3, {agents} agents on {places} places, {turns} turns from {begin} tokens, {tool} more each, answers of {answer}, \
             {words_of}, {}{}",
            context.model_words(),
            context.ours_words()
        );
        let compared = Compared { what, pairs: &pairs };
        // Of a warm turn what counts is how soon it speaks: its tokens per second hold the thinking.
        let speed = |load: &Load| {
            let warm: Vec<f64> =
                load.told.iter().flat_map(|told| told.iter().skip(1)).filter_map(Told::first_ms).collect();
            load.failures().is_empty().then(|| quantile(&warm, 0.5).map(|ms| 1000.0 / ms)).flatten()
        };
        rows.push(compared.ratio("speed of warm turns to their first token p50", speed)?.at_least(least));
        rows.push(compared.ratio("tokens per second", throughput)?);
        rows.extend(compared.sides("speed of warm turns to their first token p50", "/s", speed)?);
        rows.extend(compared.sides("computed prompt tokens", "tokens", Load::computed_tokens)?);
        rows.extend(compared.failures());
        rows.push(compared.own_cpu()?);
    }
    Ok(rows)
}

/// One agent's turns: its prompt grows by the answer and by what a tool said.
fn conversation<'a>(
    way: Way<'a>,
    seed: u64,
    agent: usize,
    [begin, turns, tool, answer]: [u32; 4],
    think_ms: u64,
) -> Next<'a> {
    let own = seed + 100 * agent as u64;
    let mut prompt = words(own, begin as usize);
    Box::new(move |told: &[Told]| {
        let turn = u32::try_from(told.len()).ok().filter(|turn| *turn < turns)?;
        if let Some(before) = told.last() {
            prompt.push_str(&before.text);
            prompt.push_str(&words(own + u64::from(turn), tool as usize));
        }
        let think = Duration::from_millis(if turn == 0 { 0 } else { think_ms });
        Some(Ask { think, ..Ask::new(&way(agent), prompt.clone(), answer) })
    })
}

/// W5. One agent whose answer says again what was said before: with a model that does so only by chance, where guesses
/// must cost nothing, and with one that always does, where they must pay.
fn echo(context: &Context) -> Result<Vec<Row>> {
    let (block, times, answer) = if context.options.quick { (64, 4, 128) } else { (128, 4, 256) };
    let need = Need { cells: block * times + answer + 512, places: 2, agents: 1 };
    let load = |way: Way<'_>, seed: u64| {
        let prompt = words(seed, block as usize).repeat(times as usize);
        together(vec![Ask::new(&way(0), prompt, answer)])
    };
    let mut rows = Vec::new();
    for context in [context.clone(), context.repeating()?] {
        let what = format!(
            "W5, one agent, {block} tokens {times} times over, an answer of {answer}, {}{}",
            context.model_words(),
            context.ours_words()
        );
        let longest = block * times + answer;
        let (bed, kind, tried) = Bed::beside_best_of(&context, need, longest, &what, Kind::guessing(), load)?;
        let alone = tried.first().map(|row| row.value).context("nothing was tried")?;
        rows.extend(tried);
        let pairs = bed.pairs(context.options.pairs, load);
        let compared = Compared { what: format!("{what}, beside {}", kind.words()), pairs: &pairs };
        rows.push(compared.ratio("tokens per second", throughput)?.at_least(0.97));
        rows.extend(compared.sides("tokens per second", "tokens/s", throughput)?);
        if context.shape.repeats {
            let ours: Option<Vec<f64>> = pairs.iter().map(|pair| throughput(&pair.ours)).collect();
            let ours: Vec<f64> =
                ours.context("agentd failed")?.into_iter().map(|speed| speed / alone).collect();
            let what = format!("{what}: tokens per second, ours over llama-server without guesses");
            rows.push(Row::median(what, &ours, "x")?.at_least(1.3));
        }
        rows.extend(compared.failures());
    }
    Ok(rows)
}

/// W6. Eight agents whose answers follow a JSON schema.
fn schema(context: &Context) -> Result<Vec<Row>> {
    let agents = 8;
    let (prompt, answer) = (128, 96);
    let cells = agents * (prompt + answer) + 512;
    let need = Need { cells, places: agents, agents: agents as usize };
    let schema = json!({ "type": "object", "additionalProperties": false, "required": ["tool", "count", "sure"],
        "properties": { "tool": { "enum": ["read", "write", "search"] },
            "count": { "type": "integer", "minimum": 0, "maximum": 99 }, "sure": { "type": "boolean" } } });
    // OpenAI's form for agentd; llama-server looks for it in chats only and has a key of its own here.
    let form = json!({ "json_schema": schema, "response_format": { "type": "json_schema",
        "json_schema": { "name": "call", "strict": true, "schema": schema } } });
    let load = |way: Way<'_>, seed: u64| {
        let ask = |agent: u32| {
            let ask = Ask::new(&way(agent as usize), words(seed + u64::from(agent), prompt as usize), answer);
            // A schema's answer ends by itself.
            let mut extra = form.clone();
            extra["ignore_eos"] = false.into();
            Ask { extra, ..ask }
        };
        together((0..agents).map(ask).collect())
    };
    let what =
        format!("W6, {agents} agents, JSON by a schema, {}{}", context.model_words(), context.ours_words());
    let (bed, kind, mut rows) = Bed::beside_best(context, need, prompt + answer, &what, load)?;
    let pairs = bed.pairs(context.options.pairs, load);
    let what = format!("{what}, beside {}", kind.words());
    let valid = |load: &Load| {
        let good = |told: &&Told| {
            let value: Option<serde_json::Value> = serde_json::from_str(&told.text).ok();
            value.is_some_and(|value| {
                ["read", "write", "search"].iter().any(|tool| value["tool"] == *tool)
                    && value["count"].as_u64().is_some_and(|count| count <= 99)
                    && value["sure"].is_boolean()
            })
        };
        load.all().filter(good).count() as f64
    };
    let compared = Compared { what, pairs: &pairs };
    let asked = pairs.len() as f64 * f64::from(agents);
    let sum = |side: fn(&Pair) -> &Load| pairs.iter().map(|pair| valid(side(pair))).sum::<f64>();
    rows.extend([
        Row::new(
            format!("{}: valid answers, agentd", compared.what),
            sum(|p| &p.ours),
            &format!("of {asked}"),
        )
        .at_least(asked),
        Row::new(
            format!("{}: valid answers, llama-server", compared.what),
            sum(|p| &p.theirs),
            &format!("of {asked}"),
        ),
    ]);
    // A side that refuses has no speed.
    if let Ok(ratio) = compared.ratio("tokens per second", throughput) {
        rows.push(ratio);
    }
    rows.extend(compared.failures());
    Ok(rows)
}

/// W9. One agent reads a trunk, then four go on from it, each its own way.
fn branches(context: &Context) -> Result<Vec<Row>> {
    let (trunk, tail, answer) = if context.options.quick { (1024, 32, 32) } else { (3072, 64, 64) };
    let agents = 4;
    let cells = (agents + 1) * (trunk + tail + answer) + 512;
    let need = Need { cells, places: agents, agents: agents as usize };
    let load = |way: Way<'_>, seed: u64| {
        let text = words(seed, trunk as usize);
        let read = Ask::new(&way(0), text.clone(), 4).run();
        // What comes of the trunk's own reading is not part of the measurement; if it fails the branches show it.
        drop(read);
        let ask = |agent: u32| {
            let own = words(seed + 1 + u64::from(agent), tail as usize);
            Ask::new(&way(agent as usize), format!("{text}{own}"), answer)
        };
        together((0..agents).map(ask).collect())
    };
    let what = format!(
        "W9, {agents} branches of {tail} tokens from a trunk of {trunk} that was read before, answers of {answer}, {}{}",
        context.model_words(),
        context.ours_words()
    );
    let (bed, kind, mut rows) = Bed::beside_best(context, need, trunk + tail + answer, &what, load)?;
    let pairs = bed.pairs(context.options.pairs, load);
    let what = format!("{what}, beside {}", kind.words());
    let compared = Compared { what, pairs: &pairs };
    rows.push(compared.ratio("tokens per second", throughput)?);
    rows.push(compared.ratio("time to first token of the last branch", first(1.0))?);
    rows.extend(compared.sides("tokens per second", "tokens/s", throughput)?);
    rows.extend(compared.sides("computed prompt tokens", "tokens", Load::computed_tokens)?);
    rows.extend(compared.failures());
    Ok(rows)
}

/// E18. With a model loaded and nobody who asks.
pub(super) fn idle(context: &Context) -> Result<Vec<Row>> {
    let time = Duration::from_secs(60);
    let bed = Bed::start(context, Need { cells: 4096, places: 8, agents: 1 })?;
    // After work, so that whatever spins a while has stopped.
    let warm = bed.pairs(1, |way, seed| together(vec![Ask::new(&way(0), words(seed, 64), 16)]));
    ensure!(warm.iter().all(|pair| pair.ours.failures().is_empty()), "{:?}", bed.ours.said());
    std::thread::sleep(Duration::from_secs(5));
    let pids = [bed.ours.engine_pid(), bed.peer.pid()];
    let before = pids.map(processes::cpu);
    std::thread::sleep(time);
    let mut took = Vec::new();
    for (pid, before) in pids.into_iter().zip(before) {
        took.push((processes::cpu(pid)?.saturating_sub(before?)).as_secs_f64() * 1000.0);
    }
    let what = |who: &str| {
        format!("idle {who} with {} loaded: processor time in {} s", context.model_words(), time.as_secs())
    };
    let resident = |pid: i32| processes::resident_bytes(pid).map(|bytes| bytes as f64 / (1024.0 * 1024.0));
    Ok(vec![
        // One tick is what the kernel can tell.
        Row::new(what("engine"), took[0], "ms").at_most(10.0),
        Row::new(what("llama-server"), took[1], "ms"),
        Row::new(
            format!("engine with {} loaded: resident", context.model_words()),
            resident(pids[0])?,
            "MiB",
        )
        .detail(),
        Row::new(
            format!("llama-server with {} loaded: resident", context.model_words()),
            resident(pids[1])?,
            "MiB",
        )
        .detail(),
    ])
}
