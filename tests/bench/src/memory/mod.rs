//! Is what an agent was told found again, and what does each signal of the ranking cost and bring? (M9)
//!
//! LoCoMo's conversations, each turn a record, ranked by the appliance's own code ([`agentd_memory::rank`]) with
//! vectors of its own embedder, made by its own engine. No language model takes part. Weights were fitted to
//! [`FITTED`], chosen before anything was measured; the promise is about the other conversations of the file, which no
//! choice was made by. What is told apart: the fitted ones as they are; each of them with weights fitted to the
//! other fitted ones; the others.

mod bed;
pub mod disk;
mod fit;
mod locomo;
mod metric;
pub mod peers;
pub mod scale;
mod speed;
mod synthetic;
mod told;
mod vectors;

use crate::report;
use agentd_memory::rank::{SIGNALS, Signal, Weights};
use anyhow::{Context, Result, ensure};
use bed::{Bed, Tokens};
use fit::Example;
use image::cache::Cache;
use image::source::Checkout;
use image::{models, programs};
use locomo::Category;
use metric::{PLACES, Recall};
use std::path::{Path, PathBuf};
use tests_tidy::promises::{Bench, Row};
use vectors::Vectors;

/// The reference study tuned on the same three.
const FITTED: [&str; 3] = ["conv-26", "conv-30", "conv-41"];

/// At 5, 10, 25 and 50 places, on conversations that nothing was fitted to.
const GOALS: [f64; PLACES.len()] = [76.0, 84.0, 90.0, 93.0];
/// At 10 places.
const GOAL_MULTI_HOP: f64 = 52.0;
const GOAL_OPEN_DOMAIN: f64 = 45.0;

/// Signals that are one idea, and what it is called.
const IDEAS: [(&str, &[Signal]); 11] = [
    ("the record's own words", &[Signal::Words]),
    (
        "neighbours' words",
        &[Signal::Before, Signal::After, Signal::TwoBefore, Signal::TwoAfter, Signal::Coverage],
    ),
    ("words of the question it answers", &[Signal::Answer]),
    ("words of like meaning", &[Signal::Kin]),
    ("meaning of three turns", &[Signal::Meaning, Signal::MeaningAfter]),
    ("the vector of the turn after", &[Signal::MeaningAfter]),
    ("its session", &[Signal::SessionWords, Signal::SessionMeaning]),
    ("who speaks", &[Signal::Speaker]),
    ("asking or telling", &[Signal::Asks]),
    ("words of time for a question when", &[Signal::TellsTime]),
    ("the date in the question", &[Signal::Time]),
];

pub struct Options {
    /// LoCoMo's `locomo10.json`, or some of its conversations in the same form.
    pub locomo: PathBuf,
    /// Prints weights fitted to [`FITTED`] for `rank/weights.rs` and measures nothing else.
    pub fit: bool,
}

pub fn measure(options: &Options) -> Result<Option<Bench>> {
    let checkout = Checkout::find()?;
    let cache = Cache::from_env()?;
    let conversations = locomo::read(&options.locomo)?;
    let texts: Vec<String> = conversations.iter().flat_map(bed::texts).collect();
    let embedder = models::ensure(&cache.path(""))?.embedder;
    let mut vectors = Vectors::open(&cache.path(""), engine(&cache, &checkout)?, embedder)?;
    vectors.ensure(texts.iter().map(String::as_str))?;
    let beds: Vec<Bed> = conversations.iter().map(|one| Bed::new(one, &vectors)).collect::<Result<_>>()?;
    let (fitted, others): (Vec<Bed>, Vec<Bed>) =
        beds.into_iter().partition(|bed| FITTED.contains(&bed.name.as_str()));
    ensure!(fitted.len() == FITTED.len(), "the file lacks one of {FITTED:?}");
    let study = Study::new(fitted, others, vectors);
    if options.fit {
        study.print_fit();
        return Ok(None);
    }
    ensure!(!study.others.is_empty(), "the file has no conversation but {FITTED:?}");
    let mut rows = study.promises()?;
    rows.extend(study.store()?);
    rows.extend(study.details());
    rows.extend(study.ideas());
    rows.extend(costs(study.beds().map(|bed| bed.tokens), &study.vectors));
    rows.extend(speed::measure(&conversations, &study.vectors)?);
    let mut bench = report::here("memory", rows, &checkout);
    bench.command = "scripts/bench memory --locomo FILE".to_owned();
    Ok(Some(bench))
}

/// Named by the environment, as for the tests of `tests/host`, or built now.
fn engine(cache: &Cache, checkout: &Checkout) -> Result<PathBuf> {
    if let Some(engine) = std::env::var_os("AGENTD_ENGINE_BIN") {
        return Ok(engine.into());
    }
    let built = programs::build(cache, checkout)?;
    let found = built.programs.iter().find(|program| program.built.ends_with(Path::new("agentd-engine")));
    Ok(found.context("no program agentd-engine")?.built.clone())
}

struct Study {
    fitted: Vec<Bed>,
    others: Vec<Bed>,
    /// Of the fitted ones, in their order.
    examples: Vec<Vec<Example>>,
    vectors: Vectors,
}

impl Study {
    fn new(fitted: Vec<Bed>, others: Vec<Bed>, vectors: Vectors) -> Self {
        let examples = fitted.iter().map(Bed::examples).collect();
        Self { fitted, others, examples, vectors }
    }

    fn beds(&self) -> impl Iterator<Item = &Bed> {
        self.fitted.iter().chain(&self.others)
    }

    fn fit_without(&self, left_out: &[Signal], conversation: Option<usize>) -> Weights {
        let chosen = self.examples.iter().enumerate().filter(|(at, _)| Some(*at) != conversation);
        let examples: Vec<&Example> = chosen.flat_map(|(_, examples)| examples).collect();
        fit::fit(&examples, |signal| !left_out.contains(&signal))
    }

    /// Each fitted conversation with weights fitted to the other two.
    fn crossed(&self, left_out: &[Signal]) -> Recall {
        let each =
            self.fitted.iter().enumerate().map(|(at, bed)| bed.recall(&self.fit_without(left_out, Some(at))));
        each.fold(Recall::default(), merged)
    }

    fn print_fit(&self) {
        let weights = self.fit_without(&[], None);
        for signal in Signal::ALL {
            println!("    {signal:?}, \"{}\", {:.2};", signal.name(), weights.of(signal));
        }
        let all = self.crossed(&[]);
        println!("each by weights of the other two: {:.2}: {}", all.mean_overall(), words(&all));
        for (idea, left_out) in IDEAS {
            let crossed = self.crossed(left_out);
            println!("without {idea}: {:.2}: {}", crossed.mean_overall(), words(&crossed));
        }
    }

    /// What the store finds.
    fn found(&self, beds: &[Bed]) -> Result<Recall> {
        let mut each = beds.iter().map(|bed| bed.told.recall(&bed.asked, &self.vectors));
        each.try_fold(Recall::default(), |sum, one| Ok(merged(sum, one?)))
    }

    /// What the store finds beside the ranking alone, and what usefulness could spoil.
    fn store(&self) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for (group, beds) in [("not fitted to", &self.others), ("fitted to", &self.fitted)] {
            let (found, alone) = (self.found(beds)?, recall_of(beds, |bed| bed.recall(&Weights::MEASURED)));
            let differing: usize = beds.iter().map(|bed| bed.differing(&self.vectors)).sum::<Result<_>>()?;
            let what = format!("LoCoMo, {group}: questions whose first ten the store orders otherwise");
            let spread = format!("store {}; ranking alone {}", words(&found), words(&alone));
            rows.push(Row { spread, ..Row::new(what, differing as f64, "questions") }.detail());
            let misled = recall_of(beds, |bed| bed.misled(&Weights::MEASURED));
            let what = format!("LoCoMo, {group}: recall at 10 lost at worst by usefulness");
            let lost = alone.overall()[1] - misled.overall()[1];
            rows.push(Row { spread: words(&misled), ..Row::new(what, lost, "points") }.at_most(0.5));
        }
        Ok(rows)
    }

    fn promises(&self) -> Result<Vec<Row>> {
        let recall = self.found(&self.others)?;
        let names: Vec<&str> = self.others.iter().map(|bed| bed.name.as_str()).collect();
        let questions: u32 = Category::ALL.iter().map(|category| recall.questions(*category)).sum();
        let of = format!("{questions} questions of {}", names.join(", "));
        let row = |what: String, value: f64, goal: f64| {
            Row { spread: of.clone(), ..Row::new(what, value, "%") }.at_least(goal)
        };
        let overall = recall.overall().into_iter().zip(GOALS).zip(PLACES);
        let mut rows: Vec<Row> = overall
            .map(|((value, goal), places)| {
                row(format!("LoCoMo, not fitted to: recall at {places}"), value, goal)
            })
            .collect();
        for (category, goal) in
            [(Category::MultiHop, GOAL_MULTI_HOP), (Category::OpenDomain, GOAL_OPEN_DOMAIN)]
        {
            let what = format!("LoCoMo, not fitted to: recall at 10, {}", category.name());
            let of = format!("{} questions", recall.questions(category));
            rows.push(Row { spread: of, ..Row::new(what, recall.of(category)[1], "%") }.at_least(goal));
        }
        Ok(rows)
    }

    /// By category, and beside what others do.
    fn details(&self) -> Vec<Row> {
        let measured = |bed: &Bed| bed.recall(&Weights::MEASURED);
        let mut rows = table("not fitted to", &recall_of(&self.others, measured));
        rows.extend(table("fitted to", &recall_of(&self.fitted, measured)));
        rows.extend(table("fitted to, by weights of the other two", &self.crossed(&[])));
        for (group, beds) in [("not fitted to", &self.others), ("fitted to", &self.fitted)] {
            rows.extend(table(
                &format!("{group}, plain BM25 of single turns"),
                &recall_of(beds, Bed::plain_words),
            ));
            rows.extend(table(
                &format!("{group}, plain cosine of single turns"),
                &recall_of(beds, Bed::plain_cosine),
            ));
        }
        rows
    }

    /// What is lost without each idea, all weights fitted anew without it.
    fn ideas(&self) -> Vec<Row> {
        let refitted = |left_out: &[Signal]| {
            let weights = self.fit_without(left_out, None);
            recall_of(&self.others, |bed| bed.recall(&weights))
        };
        let (all_crossed, all_others) = (self.crossed(&[]), refitted(&[]));
        let mut rows = Vec::new();
        for (idea, left_out) in IDEAS {
            for (group, all, without) in [
                ("fitted to, by weights of the other two", &all_crossed, self.crossed(left_out)),
                ("not fitted to", &all_others, refitted(left_out)),
            ] {
                let what = format!("LoCoMo, {group}: mean recall lost without {idea}");
                let spread = format!("then {}", words(&without));
                let lost = all.mean_overall() - without.mean_overall();
                rows.push(Row { spread, ..Row::new(what, lost, "points") }.detail());
            }
        }
        rows
    }
}

fn recall_of(beds: &[Bed], recall: impl Fn(&Bed) -> Recall) -> Recall {
    beds.iter().map(recall).fold(Recall::default(), merged)
}

fn merged(mut sum: Recall, one: Recall) -> Recall {
    sum.merge(&one);
    sum
}

fn table(group: &str, recall: &Recall) -> Vec<Row> {
    let places = |name: &str, values: [f64; PLACES.len()]| -> Vec<Row> {
        let each = values.into_iter().zip(PLACES);
        each.map(|(value, places)| {
            Row::new(format!("LoCoMo, {group}: recall at {places}{name}"), value, "%").detail()
        })
        .collect()
    };
    let mut rows = places(", all", recall.overall());
    for category in Category::ALL {
        rows.extend(places(&format!(", {}", category.name()), recall.of(category)));
    }
    rows
}

/// `80.1/85.0/90.2/94.0, multi-hop at 10 50.0, open-domain 45.0`.
fn words(recall: &Recall) -> String {
    let overall = recall.overall().map(|value| format!("{value:.1}")).join("/");
    let (multi, open) = (recall.of(Category::MultiHop)[1], recall.of(Category::OpenDomain)[1]);
    format!("{overall}, multi-hop at 10 {multi:.1}, open-domain {open:.1}")
}

/// What the embedder reads.
fn costs(beds: impl Iterator<Item = Tokens>, vectors: &Vectors) -> Vec<Row> {
    let all = beds.fold(Tokens::default(), |sum, one| sum.with(&one));
    let per = |count: u64, of: u64| count as f64 / of.max(1) as f64;
    let row = |what: &str, value: f64| Row::new(what, value, "tokens").detail();
    let mut rows = vec![
        row("embedded for a record with the two before it", per(all.windows, all.records)),
        row("embedded for a record alone, not used", per(all.alone, all.records)),
        row("embedded for each distinct word of a store, once", per(all.words, all.distinct_words)),
        row("embedded for a question", per(all.asked, all.questions)),
        row("embedded for what would be told, for each question", per(all.told, all.questions)),
        row("embedded for new words, for each question", per(all.new_words, all.questions)),
        Row::new("distinct words for each record", per(all.distinct_words, all.records), "words").detail(),
        Row::new("signals, each with one weight", SIGNALS as f64, "signals").detail(),
    ];
    if vectors.made_tokens > 0 {
        let speed = vectors.made_tokens as f64 / vectors.made_in.as_secs_f64();
        rows.push(Row::new("embedding for this run", speed, "tokens/s").detail());
    }
    rows
}
