//! How much does an item of a run deserve to be kept?
//!
//! salience = 0.35 novelty + 0.20 information + 0.20 marker + 0.15 outcome + 0.10 reference, each 0 to 1:
//! novelty   how unlike everything in the long memory it is (1 - the largest cosine, or the largest share of common
//!           words where there is no vector);
//! information how much rare content its words carry;
//! marker    whether it says of itself that it matters: a correction, a decision, a preference, "remember";
//! outcome   whether a failure was mended or a person approved;
//! reference whether the run itself came back to it.
//! The weights are a proposal (no labelled data says which items were worth keeping); their sum is 1 by test.

use crate::record::Role;

#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Signals {
    pub(crate) novelty: f32,
    pub(crate) information: f32,
    pub(crate) marker: f32,
    pub(crate) outcome: f32,
    pub(crate) reference: f32,
}

const WEIGHTS: [f32; 5] = [0.35, 0.20, 0.20, 0.15, 0.10];

pub(crate) fn salience(signals: &Signals) -> f32 {
    let Signals { novelty, information, marker, outcome, reference } = *signals;
    [novelty, information, marker, outcome, reference]
        .into_iter()
        .zip(WEIGHTS)
        .map(|(signal, weight)| if signal.is_nan() { 0.0 } else { signal.clamp(0.0, 1.0) * weight })
        .sum()
}

/// So much idf is as much information as one item is credited with: about eight rare words.
const IDF_MASS_FULL: f32 = 40.0;

pub(crate) fn information(idf_mass: f32) -> f32 {
    (idf_mass / IDF_MASS_FULL).clamp(0.0, 1.0)
}

/// Phrases by which people mark what matters, folded to lower case; the first that fits decides the role.
const MARKERS: [(&str, Role, f32); 31] = [
    ("remember that", Role::Fact, 1.0),
    ("please remember", Role::Fact, 1.0),
    ("don't forget", Role::Fact, 1.0),
    ("do not forget", Role::Fact, 1.0),
    ("for the record", Role::Fact, 0.8),
    ("my name is", Role::Fact, 1.0),
    ("i live in", Role::Fact, 0.8),
    ("i work ", Role::Fact, 0.6),
    ("actually,", Role::Fact, 0.8),
    ("correction", Role::Fact, 1.0),
    ("that's wrong", Role::Fact, 0.8),
    ("that is wrong", Role::Fact, 0.8),
    ("i meant", Role::Fact, 0.7),
    ("we decided", Role::Fact, 0.9),
    ("i decided", Role::Fact, 0.9),
    ("decision:", Role::Fact, 1.0),
    ("i prefer", Role::Preference, 1.0),
    ("i'd rather", Role::Preference, 0.9),
    ("i like", Role::Preference, 0.6),
    ("i love", Role::Preference, 0.6),
    ("i hate", Role::Preference, 0.8),
    ("i don't like", Role::Preference, 0.9),
    ("my favorite", Role::Preference, 0.9),
    ("my favourite", Role::Preference, 0.9),
    ("allergic to", Role::Preference, 1.0),
    ("from now on", Role::Procedure, 1.0),
    ("always ", Role::Procedure, 0.6),
    ("never ", Role::Procedure, 0.6),
    ("make sure to", Role::Procedure, 0.8),
    ("the way to", Role::Procedure, 0.6),
    ("lesson learned", Role::Procedure, 1.0),
];

/// What the text says of its own weight, and what kind of memory it would be. A question marks nothing.
pub(crate) fn marker(text: &str) -> (f32, Option<Role>) {
    let folded = text.replace('’', "'").to_lowercase();
    if folded.trim_end().ends_with('?') {
        return (0.0, None);
    }
    let begins_word = |at: usize| !folded[..at].chars().next_back().is_some_and(char::is_alphanumeric);
    let mut best: (f32, Option<Role>) = (0.0, None);
    for (phrase, role, weight) in MARKERS {
        if folded.match_indices(phrase).any(|(at, _)| begins_word(at)) && weight > best.0 {
            best = (weight, Some(role));
        }
    }
    best
}

/// Words of somebody who is content with what was done.
pub(crate) fn approves(text: &str) -> bool {
    const APPROVAL: [&str; 8] = [
        "that works",
        "that worked",
        "works now",
        "perfect",
        "exactly what i",
        "well done",
        "great, thank",
        "thanks, that",
    ];
    let folded = text.replace('’', "'").to_lowercase();
    APPROVAL.iter().any(|phrase| folded.contains(phrase))
}

/// Words of something that went wrong.
pub(crate) fn reports_failure(text: &str) -> bool {
    const FAILURE: [&str; 9] = [
        "error:",
        "failed",
        "exception",
        "traceback",
        "permission denied",
        "not found",
        "timed out",
        "exit status 1",
        "panicked at",
    ];
    let folded = text.to_lowercase();
    FAILURE.iter().any(|phrase| folded.contains(phrase))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn all_signals_together_are_one() {
        let all = Signals { novelty: 1.0, information: 1.0, marker: 1.0, outcome: 1.0, reference: 1.0 };
        assert!((salience(&all) - 1.0).abs() < 1e-6);
        assert_eq!(salience(&Signals::default()), 0.0);
    }

    #[test]
    fn what_marks_itself_is_seen_and_questions_are_not() {
        assert_eq!(marker("From now on answer in French.").1, Some(Role::Procedure));
        assert_eq!(marker("I’d rather have tea").1, Some(Role::Preference));
        assert_eq!(marker("Please remember my flight is at nine").1, Some(Role::Fact));
        assert_eq!(marker("Do you remember that I prefer tea?"), (0.0, None));
        assert_eq!(marker("the weather is nice"), (0.0, None));
        assert_eq!(marker("hallways and forever young"), (0.0, None), "inside of words");
        assert!(approves("Thanks, that’s it: works now") && !approves("it does not"));
        assert!(reports_failure("error: no such file") && !reports_failure("all 5 tests passed"));
    }

    proptest! {
        #[test]
        fn more_of_any_signal_is_never_less(
            base in any::<[f32; 5]>(), more in any::<[f32; 5]>()
        ) {
            let of = |s: [f32; 5]| salience(&Signals {
                novelty: s[0], information: s[1], marker: s[2], outcome: s[3], reference: s[4],
            });
            prop_assert!((0.0..=1.0 + 1e-6).contains(&of(base)));
            let larger: [f32; 5] = std::array::from_fn(|i| {
                if base[i].is_nan() || more[i].is_nan() { base[i] } else { base[i].max(more[i]) }
            });
            prop_assert!(of(larger) + 1e-6 >= of(base));
        }

        #[test]
        fn any_text_is_read_without_panic(text in "\\PC{0,80}") {
            let _ = (marker(&text), approves(&text), reports_failure(&text));
        }
    }
}
