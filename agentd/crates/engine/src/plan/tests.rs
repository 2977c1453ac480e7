//! Does a whole engine keep the promises, with a cache that is exactly what llama.cpp's is?
//!
//! The cache here has cells with a position, a token and the sequences that hold them. A cell's *state* is a hash of
//! everything before it, so that a wrong prefix, a hole or a swapped blob shows in what is "computed".

mod machine;

use super::*;
use machine::*;
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};

/// E7: whatever is guessed, answers are what they would be, in fewer steps, and no cell is lost.
#[test]
fn guesses_change_no_answer() {
    let mut steps = Vec::new();
    for guesses in [0, 1, 4, 9] {
        let mut machine = Machine::new(room(1024, 2));
        machine.guesses = guesses;
        let prompts: Vec<Vec<i32>> = (0..2).map(|n| text(n, 200)).collect();
        let ids: Vec<RequestId> = prompts.iter().map(|prompt| machine.ask(0, prompt.clone(), 290)).collect();
        let mut taken = 0;
        while machine.step() {
            taken += 1;
        }
        steps.push(taken);
        for (id, prompt) in ids.iter().zip(&prompts) {
            assert_eq!(machine.answer(*id), alone(prompt, 290), "{guesses} guesses");
        }
        let counters = machine.planner.counters();
        assert!(counters.guessed_right <= counters.guessed_tokens);
        assert_eq!(guesses > 0, counters.guessed_right > 0);
        assert_eq!(machine.planner.cells().0, machine.planner.counts().evictable, "what is left is cached");
    }
    assert!(steps.is_sorted_by(|before, after| before > after), "{steps:?}");
}

/// E12's count, as CI takes it: eight at once, 1k in common, tails of 64.
#[test]
fn what_arrives_together_is_computed_once() {
    let mut machine = Machine::new(room(4096, 8));
    let common = text(1, 1024);
    for tail in 0..8 {
        machine.ask(tail as usize, joined(&common, &text(100 + tail, 64)), 20);
    }
    machine.run_to_end();
    let whole = 8 * (1024 + 64);
    assert!(machine.computed as f64 <= 0.18 * f64::from(whole), "{} of {whole}", machine.computed);
    assert_eq!(machine.planner.counters().cached_tokens, 7 * 1024);
    assert_eq!(machine.planner.counters().preemptions, 0);
    // And a ninth finds it all, later.
    let before = machine.computed;
    machine.ask(3, joined(&common, &text(104, 64)), 5);
    machine.run_to_end();
    assert_eq!(machine.computed - before, 1);
}

#[test]
fn what_several_hold_counts_for_each_in_equal_parts() {
    let mut machine = Machine::new(room(4096, 4));
    let common = text(1, 401);
    let named = |holder: &str, own: i32| Ask {
        account: "partition both".to_owned(),
        holder: holder.to_owned(),
        domain: Domain::from("all"),
        priority: 50,
        weight: 1,
        cells_most: 0,
        tokens: joined(&common, &text(own, 40)),
        most_new: 300,
        reuse: true,
    };
    let answers = |machine: &Machine, id: RequestId| machine.clients[&id].first_ms.is_some();
    let first = machine.put(0, named("first", 2));
    while !answers(&machine, first) {
        assert!(machine.step());
    }
    // The beginning is there: the others have what they have in common with the first from it.
    let others = [
        machine.put(0, named("second", 3)),
        machine.put(0, named("second", 4)),
        machine.put(0, Ask { holder: String::new(), tokens: text(9, 100), ..named("", 5) }),
    ];
    while !others.iter().all(|id| answers(&machine, *id)) {
        assert!(machine.step());
    }
    let held = machine.planner.holders();
    let names: Vec<_> = held.iter().map(|one| (one.holder.as_str(), one.running, one.waiting)).collect();
    assert_eq!(names, [("first", 1, 0), ("partition both", 1, 0), ("second", 2, 0)]);
    assert_eq!([held[0].cells_shared, held[1].cells_shared, held[2].cells_shared], [201, 0, 200]);
    let own = |account: &str| {
        let of = machine.planner.requests.values().filter(|request| request.holder == account);
        of.map(|request| machine.planner.tree.private(request.seq.unwrap())).sum::<u32>()
    };
    assert_eq!(held[0].cells, 201 + own("first"));
    assert_eq!(held[1].cells, own("partition both"));
    assert_eq!(held[2].cells, 200 + own("second"));
    assert!(held.iter().all(|one| one.cells_promised > 0 && one.aside_tokens == 0));
    machine.run_to_end();
    assert_eq!(machine.planner.holders(), []);
}

#[test]
fn who_gave_way_is_counted_with_what_lies_aside() {
    let mut machine = Machine::new(room(512, 2));
    machine.ask_as(0, text(1, 300), 200, 10, 1);
    for _ in 0..6 {
        machine.step();
    }
    machine.ask_as(1, text(2, 300), 20, 90, 1);
    machine.step();
    let held = machine.planner.holders();
    assert_eq!((held[0].running, held[0].waiting, held[0].put_aside), (0, 1, 1), "{held:?}");
    assert_eq!((held[1].running, held[1].put_aside), (1, 0), "{held:?}");
    assert!(held[0].cells == 0 && held[0].aside_tokens >= 300, "{held:?}");
    machine.run_to_end();
}

#[test]
fn one_owners_cache_is_not_anothers() {
    let mut machine = Machine::new(room(4096, 8));
    let prompt = text(1, 500);
    let ask = |owner: &str| Ask {
        account: "same".to_owned(),
        holder: String::new(),
        domain: Domain::from(owner),
        priority: 50,
        weight: 1,
        cells_most: 0,
        tokens: prompt.clone(),
        most_new: 3,
        reuse: true,
    };
    for owner in ["first", "second"] {
        let ask = ask(owner);
        machine.put(0, ask);
    }
    machine.run_to_end();
    assert_eq!(machine.computed, 1000);
    assert_eq!(machine.planner.counters().cached_tokens, 0);
}

#[test]
fn a_longer_conversation_computes_only_what_is_new() {
    let mut machine = Machine::new(room(4096, 4));
    let first = text(5, 300);
    let id = machine.ask(0, first.clone(), 40);
    machine.run_to_end();
    let so_far = joined(&first, machine.answer(id));
    machine.computed = 0;
    machine.ask(0, joined(&so_far, &text(9, 30)), 10);
    machine.run_to_end();
    // The answer's last token was chosen and never computed.
    assert_eq!(machine.computed, 31);
}

#[test]
fn cached_beginnings_go_for_cells_and_come_back_from_memory() {
    let mut machine = Machine::new(room(1024, 2));
    let prompts: Vec<Vec<i32>> = (0..4).map(|n| text(n, 400)).collect();
    for (n, prompt) in prompts.iter().enumerate() {
        machine.ask(n, prompt.clone(), 10);
        machine.run_to_end();
    }
    machine.computed = 0;
    let id = machine.ask(0, prompts[0].clone(), 10);
    machine.run_to_end();
    assert!(machine.computed <= 1, "{} tokens were computed again", machine.computed);
    assert!(machine.planner.counters().restored >= 1);
    assert_eq!(machine.answer(id), alone(&prompts[0], 10));
}

/// Answering for long makes nobody important: only waiting does.
#[test]
fn who_has_answered_for_minutes_still_makes_room() {
    let mut machine = Machine::new(room(8192, 4));
    for n in 0..4 {
        machine.ask(n, text(n as i32, 100), 0);
    }
    while machine.now_ms < 40_000 {
        machine.step();
    }
    let high = machine.ask_as(9, text(77, 600), 20, 100, 1);
    machine.step();
    assert!(machine.planner.requests[&high].running, "admitted within one step");
}

/// E15's rule, and E7's: who is important is in at once, nobody fails, everybody's answer is what it would be alone.
#[test]
fn the_important_gets_in_while_it_is_full() {
    let mut machine = Machine::new(room(2048, 4));
    let low: Vec<RequestId> = (0..6).map(|n| machine.ask_as(n, text(n as i32, 300), 200, 20, 1)).collect();
    for _ in 0..20 {
        machine.step();
    }
    let (before, asked) = (machine.planner.counters().preemptions, machine.now_ms);
    let high = machine.ask_as(9, text(77, 600), 20, 90, 1);
    machine.step();
    assert!(machine.planner.requests[&high].running, "admitted within one step");
    assert!(machine.planner.counters().preemptions > before);
    machine.run_to_end();
    let waited = machine.clients[&high].first_ms.unwrap() - asked;
    // Alone it would be 600 tokens in three steps; the others answer beside it.
    assert!(waited as f64 <= 1.5 * (600.0 / 2.0 + 3.0 * 20.0), "{waited} ms");
    for id in low {
        let client = &machine.clients[&id];
        assert_eq!(client.answer, alone(&client.prompt, 200), "request {id}");
    }
    assert!(machine.planner.counters().recomputed_tokens <= 400, "{:?}", machine.planner.counters());
}

#[test]
fn a_long_prompt_does_not_freeze_who_answers() {
    let mut machine = Machine::new(room(16_384, 8));
    for n in 0..4 {
        machine.ask(n, text(n as i32, 30), 400);
    }
    for _ in 0..30 {
        machine.step();
    }
    machine.ask(8, text(50, 8000), 10);
    let mut worst = 0;
    while machine.planner.running() > 4 || machine.planner.waiting() > 0 {
        let before = (machine.now_ms, machine.clients.values().map(|c| c.answer.len()).sum::<usize>());
        machine.step();
        let answered = machine.clients.values().map(|c| c.answer.len()).sum::<usize>() - before.1;
        if machine.planner.running() >= 5 {
            assert!(answered >= 4, "all four said something");
        }
        worst = worst.max(machine.now_ms - before.0);
    }
    assert!(worst <= 450, "a step of {worst} ms");
}

/// Answering alone takes longer than a stall may: prompts are read all the same, an urgent one in good time.
#[test]
fn a_slow_machine_reads_prompts_too() {
    for (priority, times) in [(50, 2.2), (90, 1.7)] {
        let mut machine = Machine::new(room(16_384, 8));
        machine.weights_ms = 600;
        for n in 0..4 {
            machine.ask(n, text(n as i32, 30), 0);
        }
        for _ in 0..60 {
            machine.step();
        }
        let asked = machine.now_ms;
        let id = machine.ask_as(8, text(50, 4000), 10, priority, 1);
        while machine.clients[&id].first_ms.is_none() {
            machine.step();
        }
        let waited = machine.clients[&id].first_ms.unwrap() - asked;
        let idle = 4000 / 2 + 600 * (4000 / 256);
        assert!(waited as f64 <= times * idle as f64, "priority {priority}: {waited} ms, alone {idle} ms");
    }
}

#[test]
fn an_account_at_its_limit_waits_for_itself_and_for_nobody_else() {
    let mut machine = Machine::new(room(8192, 8));
    let ask = |account: &str, seed: i32| Ask {
        account: account.to_owned(),
        holder: String::new(),
        domain: Domain::from("all"),
        priority: 50,
        weight: 1,
        cells_most: 400,
        tokens: text(seed, 200),
        most_new: 0,
        reuse: true,
    };
    for seed in 0..3 {
        machine.put(0, ask("bound", seed));
    }
    machine.put(1, ask("other", 9));
    let mut most = 0;
    for _ in 0..100_000 {
        if !machine.step() {
            break;
        }
        most = most.max(machine.planner.account_cells("bound"));
    }
    assert!(most <= 400, "{most} cells");
    for client in machine.clients.values() {
        assert_eq!(client.answer.len(), 201, "to the end of its share");
        assert_eq!(client.answer, alone(&client.prompt, 201));
    }
}

#[test]
fn a_cache_that_was_lost_is_computed_again() {
    let mut machine = Machine::new(room(1024, 3));
    let ids: Vec<RequestId> = (0..5).map(|n| machine.ask(n, text(n as i32, 200), 80)).collect();
    for _ in 0..40 {
        machine.step();
    }
    machine.planner.lost(Vec::new());
    machine.cache.cells.clear();
    machine.run_to_end();
    for id in ids {
        assert_eq!(machine.answer(id), alone(&machine.clients[&id].prompt, 80));
    }
}

/// E14's rule: four times more than fits, for a long time; service by weight.
fn oversubscribed(weights: &[u32], requests_each: usize, weights_ms: u64) -> Vec<f64> {
    let mut machine = Machine::new(room(1500, 4));
    machine.weights_ms = weights_ms;
    let mut open: Vec<usize> = weights.iter().map(|_| 0).collect();
    let mut next = 0i32;
    // Each account keeps the same number of requests waiting or running: four times what there are places for.
    let each = (16 / weights.len()).max(2);
    let mut ask = |machine: &mut Machine, account: usize| {
        next += 1;
        let (prompt, new) = (100 + (next as usize * 37) % 200, 40 + (next as u32 * 13) % 60);
        machine.ask_as(account, text(next, prompt), new, 50, weights[account]);
    };
    let end = 20_000 * weights_ms;
    let mut ended = HashSet::new();
    while machine.now_ms < end {
        for (account, open) in open.iter_mut().enumerate() {
            while *open < each {
                ask(&mut machine, account);
                *open += 1;
            }
        }
        assert!(machine.step());
        for (id, client) in &machine.clients {
            if client.ended_ms.is_some() && ended.insert(*id) {
                open[client.account] -= 1;
            }
        }
    }
    assert!(ended.len() > requests_each, "{} requests ended", ended.len());
    let mut served = vec![0.0; weights.len()];
    for client in machine.clients.values() {
        if client.first_ms.is_some() {
            served[client.account] += client.prompt.len() as f64 + 2.0 * client.answer.len() as f64;
        }
        if client.ended_ms.is_some() {
            assert_eq!(client.answer, alone(&client.prompt, client.most_new));
        }
    }
    served.iter().zip(weights).map(|(served, weight)| served / f64::from(*weight)).collect()
}

#[test]
fn service_is_fair_by_weight_when_four_times_too_many_ask() {
    for weights in [&[1u32, 1, 1, 1][..], &[1, 2, 4, 1], &[3, 1]] {
        let shares = oversubscribed(weights, 100, 20);
        assert!(jain(&shares) >= 0.95, "{weights:?}: {shares:?}");
    }
}

/// Where everybody waits for longer than a class is worth, waiting makes nobody equal to who has more weight.
#[test]
fn a_slow_machine_is_as_fair() {
    for weights in [&[1u32, 2, 4, 8][..], &[1, 1, 2, 2, 4, 4, 8, 8], &[3, 1]] {
        let shares = oversubscribed(weights, 100, 200);
        assert!(jain(&shares) >= 0.95, "{weights:?}: {shares:?}");
    }
}

/// W7 of `scripts/bench serve`: sixteen accounts that ask again as soon as they are answered, and places for four.
#[test]
fn one_request_at_a_time_is_served_by_weight() {
    for weights in [[1, 1, 1, 1], [1, 2, 4, 8]] {
        let shares = one_at_a_time(weights);
        assert!(jain(&shares) >= 0.97, "{weights:?}: {} {shares:?}", jain(&shares));
    }
}

fn one_at_a_time(weights: [u32; 4]) -> Vec<f64> {
    let mut machine = Machine::new(room(512, 16));
    machine.weights_ms = 60;
    let mut seed = 0;
    let mut open: Vec<RequestId> = Vec::new();
    let mut ask = |machine: &mut Machine, account: usize| {
        seed += 1;
        machine.ask_as(account, text(seed, 64), 64, 50, weights[account % 4])
    };
    for account in 0..16 {
        open.push(ask(&mut machine, account));
    }
    while machine.now_ms < 300_000 {
        // Who has its answer asks again while the next step is on its way: its place has gone to somebody else.
        let ended: Vec<usize> = (0..16).filter(|n| machine.clients[&open[*n]].ended_ms.is_some()).collect();
        machine.step();
        for account in ended {
            open[account] = ask(&mut machine, account);
        }
    }
    let mut served = [0.0; 16];
    for client in machine.clients.values() {
        if client.first_ms.is_some() {
            served[client.account] += client.prompt.len() as f64 + 2.0 * client.answer.len() as f64;
        }
    }
    (0..16).map(|account| served[account] / f64::from(weights[account % 4])).collect()
}

/// A place is kept for who asks again, from who is further from its next share; for a step and no longer.
#[test]
fn a_place_is_kept_for_a_step() {
    for (light, comes_back) in [(50, true), (50, false), (100, false)] {
        let mut machine = Machine::new(room(512, 2));
        let heavy = machine.ask_as(0, text(1, 64), 5, 50, 8);
        let other = machine.ask_as(2, text(3, 64), 64, 50, 8);
        let poor = machine.ask_as(1, text(2, 64), 5, light, 1);
        machine.planner.accounts.charge_answer("a1", 400);
        let runs = |machine: &Machine, id: RequestId| machine.planner.requests[&id].running;
        if light == 50 {
            while machine.clients[&heavy].ended_ms.is_none() {
                machine.step();
            }
            assert!(!runs(&machine, poor));
        }
        machine.step();
        assert_eq!(runs(&machine, poor), light == 100, "in the step after the end");
        let again = comes_back.then(|| machine.ask_as(0, text(4, 64), 5, 50, 8));
        machine.step();
        if let Some(again) = again {
            assert!(runs(&machine, again) && !runs(&machine, poor));
        } else {
            assert!(runs(&machine, poor));
        }
        machine.run_to_end();
        assert!(machine.clients[&other].ended_ms.is_some() && machine.clients[&poor].ended_ms.is_some());
    }
}

/// Requests of the highest priority come without end; one of the lowest is served all the same.
#[test]
fn nobody_starves() {
    let mut machine = Machine::new(room(1200, 2));
    let poor = machine.ask_as(0, text(1, 100), 30, 0, 1);
    let mut seed = 2;
    while machine.clients[&poor].ended_ms.is_none() {
        while machine.planner.waiting() < 6 {
            seed += 1;
            machine.ask_as(1 + (seed % 3) as usize, text(seed, 150), 50, 100, 1);
        }
        machine.step();
        assert!(machine.now_ms < 120_000, "it waits for two minutes");
    }
    assert_eq!(machine.answer(poor), alone(&machine.clients[&poor].prompt, 30));
}

#[derive(Debug, Clone)]
enum Act {
    Ask { account: usize, shared: usize, own: usize, new: u32, priority: u8, weight: u32, cells_most: u32 },
    Cancel(usize),
    Steps(u32),
    Pass(u64),
    Lose,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        6 => (0usize..4, 0usize..400, 1usize..200, 0u32..150, 0u8..=100, 1u32..5, prop_oneof![3 => Just(0u32), 1 => 650u32..900])
            .prop_map(|(account, shared, own, new, priority, weight, cells_most)| {
                Act::Ask { account, shared, own, new, priority, weight, cells_most }
            }),
        1 => (0usize..40).prop_map(Act::Cancel),
        6 => (1u32..25).prop_map(Act::Steps),
        1 => (0u64..30_000).prop_map(Act::Pass),
        1 => Just(Act::Lose),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(std::env::var("CASES").map_or(160, |c| c.parse().unwrap())))]
    /// Whatever comes, goes, grows and is put aside: no cell is promised twice, no answer is other than alone, and
    /// everything ends.
    #[test]
    fn a_whole_engine(
        acts in proptest::collection::vec(act(), 1..40),
        cells in 620u32..2000,
        running in 1u32..6,
        memory in 0u64..120_000,
        disk in 0u64..120_000,
        broken in proptest::bool::weighted(0.2),
        sharing in proptest::bool::weighted(0.8),
        guesses in 0u32..6,
    ) {
        let shelves = Shelves { memory_bytes: memory, disk_bytes: disk, bytes_per_cell: 100 };
        let mut machine = Machine::new(Room { shelves, sharing, ids: (running + 3) as u16, ..room(cells, running) });
        machine.cache.broken = broken;
        machine.guesses = guesses;
        let (mut ids, mut cancelled, mut most) = (Vec::new(), HashSet::new(), HashMap::new());
        for act in acts {
            match act {
                Act::Ask { account, shared, own, new, priority, weight, cells_most } => {
                    let tokens = joined(&text(1, shared), &text(2 + account as i32, own));
                    ids.push(machine.put(account, Ask {
                        account: format!("a{account}"),
                        holder: String::new(),
                        domain: Domain::from(if account == 3 { "apart" } else { "together" }),
                        priority,
                        weight,
                        cells_most,
                        tokens,
                        most_new: new,
                        reuse: !own.is_multiple_of(7),
                    }));
                    most.extend(ids.last().map(|id| (*id, cells_most)));
                }
                Act::Cancel(which) => if let Some(id) = ids.get(which) {
                    cancelled.insert(*id);
                    machine.planner.finish(*id);
                    machine.cache.run(&mut machine.planner);
                    machine.agree();
                },
                Act::Steps(count) => for _ in 0..count {
                    machine.step();
                },
                Act::Pass(ms) => machine.now_ms += ms,
                Act::Lose => {
                    machine.planner.lost(Vec::new());
                    machine.cache.cells.clear();
                }
            }
        }
        machine.run_to_end();
        for id in &ids {
            let client = &machine.clients[id];
            let expected = alone(&client.prompt, client.answer.len() as u32);
            prop_assert_eq!(&client.answer, &expected);
            prop_assert!(cancelled.contains(id) || client.ended_ms.is_some(), "request {} was lost", id);
            if !cancelled.contains(id) {
                let limit = if most[id] == 0 { cells } else { most[id].min(cells) };
                // The last token of an answer needs no cell.
                let room = limit.max(client.prompt.len() as u32) - client.prompt.len() as u32 + 1;
                let wanted = if client.most_new == 0 { room } else { client.most_new.min(room) };
                prop_assert_eq!(client.answer.len() as u32, wanted);
            }
        }
        // Nothing is left but what may be thrown away.
        prop_assert_eq!(machine.planner.counts().evictable, machine.planner.cells().0);
        prop_assert!(machine.clients.values().all(|client| client.began_ms <= machine.now_ms));
    }
}
