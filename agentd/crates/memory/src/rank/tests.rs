//! What holds for every corpus and question, and one small conversation read by eye.

use super::*;
use proptest::prelude::*;

const DAY_MS: i64 = 24 * 60 * 60 * 1000;
/// 2023-10-22.
const NOW: i64 = 19_652 * DAY_MS;

fn told(records: &[(&str, u64, i64)]) -> Plain {
    let mut corpus = Plain::default();
    for (text, session, day) in records {
        corpus.push(text, *session, day * DAY_MS);
    }
    corpus
}

fn ask(corpus: &Plain, question: &str, cosines: &[f32], most: usize) -> Vec<Ranked> {
    let question = Question::read(question, NOW);
    let Ok(ranked) = rank(corpus, &question, Nearness::new(cosines), &Weights::MEASURED, most);
    ranked
}

fn conversation() -> Plain {
    told(&[
        ("Ana: Hi Bob, how was the weekend?", 1, 19_600),
        ("Bob: Great, I adopted a puppy yesterday!", 1, 19_600),
        ("Ana: What is it called?", 1, 19_600),
        ("Bob: Biscuit.", 1, 19_600),
        ("Ana: I play the clarinet in an orchestra.", 2, 19_640),
        ("Bob: We should record a song together.", 2, 19_640),
        ("Ana: My sister Eva moved to Lisbon.", 3, 19_500),
    ])
}

#[test]
fn an_answer_is_found_by_the_question_before_it() {
    let ranked = ask(&conversation(), "What is Bob's puppy called?", &[], 3);
    assert!(ranked.iter().any(|one| one.slot == 3), "{ranked:?}");
    let answer = ranked.iter().find(|one| one.slot == 3).unwrap();
    assert!(answer.signals.get(Signal::Answer) > 0.0 && answer.signals.get(Signal::Words) < 0.6);
    assert_eq!(answer.signals.get(Signal::Speaker), 1.0);
}

#[test]
fn a_word_of_like_meaning_finds_what_no_word_finds() {
    let mut corpus = conversation();
    let question = "Which instrument is there?";
    assert!(ask(&corpus, question, &[], 5).is_empty(), "no word is shared");
    corpus.add_word("clarinet", &[1.0, 0.1]);
    corpus.add_word("lisbon", &[0.0, 1.0]);
    corpus.add_asked("instrument", &[0.9, 0.2]);
    let ranked = ask(&corpus, question, &[], 1);
    assert_eq!(ranked[0].slot, 4);
    assert!(ranked[0].signals.get(Signal::Kin) > 0.5 && ranked[0].signals.get(Signal::Words) == 0.0);
}

#[test]
fn a_date_in_the_question_prefers_its_time() {
    let corpus = told(&[("We bought a car", 1, 19_500), ("We bought a car", 2, 19_640)]);
    let october = ask(&corpus, "What was bought in October 2023?", &[], 2);
    let may = ask(&corpus, "What was bought in May 2023?", &[], 2);
    assert_eq!((october[0].slot, may[0].slot), (1, 0));
    assert_eq!(may[0].signals.get(Signal::Time), 1.0);
}

#[test]
fn two_named_speakers_are_no_hint() {
    let ranked = ask(&conversation(), "Which song do Ana and Bob record?", &[], 7);
    assert!(ranked.iter().all(|one| one.signals.get(Signal::Speaker) == 0.0));
}

#[test]
fn meaning_alone_finds_records_and_unknown_vectors_do_no_harm() {
    let cosines = [0.1, 0.2, f32::NAN, 0.1, 0.8, 0.1, f32::INFINITY];
    let ranked = ask(&conversation(), "xyzzy", &cosines, 10);
    assert_eq!(ranked[0].slot, 4);
    assert!(ranked.iter().all(|one| one.score.is_finite() && one.slot != 2 && one.slot != 6), "{ranked:?}");
    assert!(ask(&conversation(), "xyzzy", &[f32::NAN; 7], 10).is_empty());
}

#[test]
fn explanations_add_up_to_the_score() {
    for one in ask(&conversation(), "What is Bob's puppy called?", &[0.3, 0.7, 0.1, 0.2, 0.0, 0.1, 0.1], 7) {
        let parts = Weights::MEASURED.explain(&one.signals);
        let sum: f32 = parts.iter().map(|(_, part)| part).sum();
        assert!((sum - one.score).abs() < 1e-4, "{sum} {}", one.score);
        assert!(parts.iter().all(|(_, part)| *part != 0.0));
    }
}

const WORDS: [&str; 8] = ["apple", "boat", "candle", "drum", "Ana:", "yesterday", "Bob", "what?"];

fn texts() -> impl Strategy<Value = Vec<(String, u64)>> {
    let text = proptest::collection::vec(0usize..WORDS.len(), 1..6)
        .prop_map(|words| words.into_iter().map(|at| WORDS[at]).collect::<Vec<_>>().join(" "));
    proptest::collection::vec((text, 0u64..4), 1..40)
}

fn plain(texts: &[(String, u64)]) -> Plain {
    let mut corpus = Plain::default();
    for (at, (text, session)) in texts.iter().enumerate() {
        corpus.push(text, *session, at as i64 * DAY_MS);
    }
    corpus
}

proptest! {
    #[test]
    fn an_answer_is_whole_sorted_within_five_and_without_repetition(
        texts in texts(), most in 0usize..60, seed in any::<u64>()
    ) {
        let corpus = plain(&texts);
        let cosines: Vec<f32> = (0..texts.len())
            .map(|at| (seed.rotate_left(at as u32 % 64) % 1000) as f32 / 1000.0)
            .collect();
        let ranked = ask(&corpus, "When had Ana a boat and a candle?", &cosines, most);
        let mut slots: Vec<usize> = ranked.iter().map(|one| one.slot).collect();
        prop_assert!(ranked[..ranked.len().min(5)].is_sorted_by(|a, b| a.score >= b.score));
        prop_assert!(ranked.iter().all(|one| one.score.is_finite()));
        slots.sort_unstable();
        slots.dedup();
        prop_assert_eq!(slots.len(), ranked.len());
        prop_assert!(ranked.len() <= most);
    }

    /// Nothing of the order depends on how a record's slot is counted.
    #[test]
    fn a_longer_list_begins_with_the_shorter(texts in texts(), most in 1usize..20) {
        let corpus = plain(&texts);
        let (short, long) = (ask(&corpus, "what drum?", &[], most), ask(&corpus, "what drum?", &[], 2 * most));
        prop_assert_eq!(&long[..short.len()], &short[..]);
    }

    /// A session of its own changes nothing of the others' neighbours: inserting needs no recomputation.
    #[test]
    fn what_is_added_elsewhere_leaves_neighbours_alone(texts in texts()) {
        let mut corpus = plain(&texts);
        let links = |corpus: &Plain| (0..texts.len()).map(|s| (corpus.before(s), corpus.after(s))).collect::<Vec<_>>();
        let before = links(&corpus);
        corpus.push("Ana: another boat", 99, 0);
        prop_assert_eq!(links(&corpus), before);
    }

    #[test]
    fn signals_stay_in_their_range(texts in texts()) {
        let corpus = plain(&texts);
        let question = Question::read("When had Ana a boat and a candle yesterday?", NOW);
        let cosines: Vec<f32> = (0..texts.len()).map(|at| at as f32 / 40.0).collect();
        let Ok(all) = candidates(&corpus, &question, Nearness::new(&cosines));
        for (slot, signals) in all {
            for signal in Signal::ALL {
                let value = signals.get(signal);
                let range = match signal {
                    Signal::Meaning | Signal::MeaningAfter | Signal::SessionMeaning => -10.0..=10.0,
                    Signal::Words | Signal::Before | Signal::After | Signal::TwoBefore | Signal::TwoAfter
                    | Signal::Answer => 0.0..=2.2,
                    Signal::SessionWords => 0.0..=2.2 * 2.05,
                    _ => 0.0..=1.001,
                };
                prop_assert!(range.contains(&value), "{slot} {signal:?} {value}");
            }
        }
    }

    #[test]
    fn any_question_is_read(text in ".{0,200}", now in any::<i64>()) {
        let question = Question::read(&text, now);
        prop_assert!(question.terms.iter().all(|term| !term.text.is_empty()));
        let _ = as_told(&text, |term| term.len() > 3);
    }
}
