//! How long does the ranking take at 10,000 records?
//!
//! All turns of the file, again and again as sessions of their own until there are enough, and the file's questions.
//! One thread. The scan of the vectors is the store's own and measured there; here its result is given.

use super::locomo::{Conversation, Turn};
use super::vectors::Vectors;
use agentd_memory::rank::{Corpus, KIN_MOST, Nearness, Plain, Question, Weights, as_told, rank};
use agentd_memory::text;
use anyhow::{Context, Result};
use std::hint::black_box;
use std::time::Instant;
use tests_tidy::promises::Row;

const RECORDS: usize = 10_000;
/// As an agent asks: a handful of hits.
const HITS: usize = 10;

pub fn measure(conversations: &[Conversation], vectors: &Vectors) -> Result<Vec<Row>> {
    let turns: Vec<&Turn> = conversations.iter().flat_map(|one| &one.turns).collect();
    let (mut with_kin, mut without_kin) = (Plain::default(), Plain::default());
    let mut session = 0;
    let mut last = None;
    for at in 0..RECORDS {
        let turn = turns[at % turns.len()];
        if last.replace((turn.session, at / turns.len())) != Some((turn.session, at / turns.len())) {
            session += 1;
        }
        let record = turn.record_text();
        for corpus in [&mut with_kin, &mut without_kin] {
            corpus.push(&record, session, turn.unix_ms);
        }
        for word in text::content_words(&record) {
            let term = text::terms(&word).into_iter().next();
            if let (Some(term), Ok(vector)) = (term, vectors.of(&word)) {
                with_kin.add_word(&term, vector);
            }
        }
    }
    let now = turns.last().context("no turns")?.unix_ms;
    let questions: Vec<&str> =
        conversations.iter().flat_map(|one| &one.questions).map(|question| question.text.as_str()).collect();
    let read: Vec<Question> = questions.iter().map(|text| Question::read(text, now)).collect();
    // Anything of a likely spread: the ranking does not know where they come from.
    let cosines: Vec<f32> = (0..RECORDS).map(|at| (at as f32 * 0.618).fract() * 0.4).collect();
    let reading = each(&questions, |text| {
        black_box(Question::read(text, now));
        black_box(as_told(text, |term| with_kin.speaks(term)));
    });
    let ranking = |corpus: &Plain, cosines: &[f32]| {
        each(&read, |question| {
            let _ = black_box(rank(corpus, question, Nearness::new(cosines), &Weights::MEASURED, HITS));
        })
    };
    let words = ranking(&without_kin, &[]);
    let meaning = ranking(&without_kin, &cosines);
    let all = ranking(&with_kin, &cosines);
    let row = |what: &str, (p50, p99): (f64, f64)| Row {
        spread: format!("p99 {p99:.0} us"),
        ..Row::new(format!("{what}, p50"), p50, "us").detail()
    };
    Ok(vec![
        row("a question read and retold", reading),
        row(&format!("ranking {RECORDS} records by words, neighbours, sessions, speaker and time"), words),
        row("the same and meaning, without the scan", meaning),
        row(&format!("the same and words of like meaning, {KIN_MOST} for each word"), all),
    ])
}

/// p50 and p99 in microseconds; all are run once before.
fn each<T>(all: &[T], run: impl Fn(&T)) -> (f64, f64) {
    all.iter().for_each(&run);
    let mut times: Vec<f64> = all
        .iter()
        .map(|one| {
            let begun = Instant::now();
            run(one);
            begun.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    times.sort_by(f64::total_cmp);
    let at =
        |share: f64| times.get(((times.len() as f64 - 1.0) * share) as usize).copied().unwrap_or(f64::NAN);
    (at(0.5), at(0.99))
}
