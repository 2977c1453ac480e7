//! Are two texts one memory?
//!
//! Only if both gates say so: their meanings are nearly one (cosine at least 0.97) and so are their words (Jaccard
//! of the terms at least 0.85). One gate alone swallows what matters: "she orders a cortado" and "she orders a flat
//! white" mean nearly the same and are two facts; "the key is under the mat" and "the key is not under the mat" are
//! nearly the same words. Numbers, names and negations are terms like others, so a sentence that differs in one of
//! them passes only if it is long, and then the meaning must be the same too.
//!
//! A record's vector is of its text and the two told before it in its session, and so is what is compared here: "Yes, I
//! do." said again after other words is another memory and stays; told again where nothing else was said, it is the same.
//! What says enough to stand for itself is one memory whatever was said around it in its session, if it is the same word
//! for word ([`says_the_same`]). A fact that is told again in other words in the middle of another conversation is stored twice,
//! which costs room and nothing else.

use crate::text;
use std::collections::BTreeSet;

pub(crate) const COSINE: f32 = 0.97;
pub(crate) const JACCARD: f32 = 0.85;

pub(crate) fn is_duplicate(cosine: f32, jaccard: f32) -> bool {
    cosine >= COSINE && jaccard >= JACCARD
}

/// Words with content from which on a text stands for itself.
const WORDS_ALONE: usize = 3;

/// Are they the same word for word, but for words without content, and do they say enough to need no context?
pub(crate) fn says_the_same(a: &str, b: &str) -> bool {
    let words = text::content_words(a);
    words.len() >= WORDS_ALONE && words == text::content_words(b)
}

/// Common terms of all terms; 1 for two texts without any.
pub(crate) fn jaccard(a: &BTreeSet<&str>, b: &BTreeSet<&str>) -> f32 {
    let common = a.intersection(b).count();
    let all = a.len() + b.len() - common;
    if all == 0 { 1.0 } else { common as f32 / all as f32 }
}

/// Two texts that differ in a number or a negation, or have them in another order, are never one memory, however long
/// they are: terms drop "not", and their sets do not know which number belongs to what.
pub(crate) fn differ_in_what_matters(a: &str, b: &str) -> bool {
    let marks = |text: &str| -> Vec<String> {
        text.to_lowercase()
            .split(|c: char| !c.is_alphanumeric() && c != '\'' && c != '’')
            .map(|word| word.replace('’', "'"))
            .filter(|word| {
                word.ends_with("n't")
                    || matches!(
                        word.as_str(),
                        "not" | "no" | "never" | "none" | "nobody" | "nothing" | "without"
                    )
                    || word.chars().any(|c| c.is_ascii_digit())
            })
            .collect()
    };
    marks(a) != marks(b)
}

/// So many of a text's terms must be looked up to meet every possible duplicate: whoever has 85 % of the terms in
/// common has at least one of any `n - ceil(0.85 n) + 1` of them.
pub(crate) fn terms_to_look_up(terms: usize) -> usize {
    match terms {
        0 => 0,
        n => n - (JACCARD * n as f32).ceil() as usize + 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(a: &str, b: &str) -> f32 {
        let (a, b) = (text::term_counts(a), text::term_counts(b));
        jaccard(&a.keys().map(String::as_str).collect(), &b.keys().map(String::as_str).collect())
    }

    #[test]
    fn both_gates_must_open() {
        assert!(is_duplicate(0.98, 0.9));
        assert!(!is_duplicate(0.98, 0.5), "cortado and flat white");
        assert!(!is_duplicate(0.9, 1.0), "the same words, another order");
        assert!(of("She orders a cortado every morning", "She orders a flat white every morning") < JACCARD);
        assert_eq!(of("The boiler was serviced in May.", "the boiler: serviced, in May!"), 1.0);
    }

    #[test]
    fn what_stands_for_itself_is_the_same_in_any_context() {
        assert!(says_the_same("The user likes green tea.", "the user likes green tea"));
        assert!(!says_the_same("Yes, I do.", "Yes, I do."), "of what?");
        assert!(!says_the_same("The dog bit the old man", "The old man bit the dog"));
    }

    #[test]
    fn numbers_and_negations_make_two_memories() {
        assert!(differ_in_what_matters("the key is under the mat", "the key is not under the mat"));
        assert!(differ_in_what_matters("I can eat nuts", "I can't eat nuts"));
        assert!(differ_in_what_matters("dose: 5 mg", "dose: 50 mg"));
        assert!(
            differ_in_what_matters("round 1 writer 1 item 2", "round 2 writer 1 item 2"),
            "the same set of terms"
        );
        assert!(!differ_in_what_matters("Tea at 5, please", "tea, at 5"));
    }

    proptest! {
        #[test]
        fn any_so_many_terms_meet_every_duplicate(
            n in 1usize..60, kept in any::<prop::sample::Index>(), added in 0usize..20, at in any::<prop::sample::Index>()
        ) {
            let own: Vec<String> = (0..n).map(|i| format!("w{i}")).collect();
            let start = at.index(n);
            let kept = kept.index(n + 1);
            // Another text with `kept` of these terms and some of its own.
            let other: Vec<String> =
                own.iter().take(kept).cloned().chain((0..added).map(|i| format!("x{i}"))).collect();
            let (a, b): (BTreeSet<&str>, BTreeSet<&str>) =
                (own.iter().map(String::as_str).collect(), other.iter().map(String::as_str).collect());
            if jaccard(&a, &b) >= JACCARD {
                let looked_up: Vec<&String> = (0..terms_to_look_up(n)).map(|i| &own[(start + i) % n]).collect();
                prop_assert!(looked_up.iter().any(|term| b.contains(term.as_str())));
            }
        }

        #[test]
        fn jaccard_is_symmetric_and_between_0_and_1(a in "[a-d ]{0,20}", b in "[a-d ]{0,20}") {
            prop_assert_eq!(of(&a, &b), of(&b, &a));
            prop_assert!((0.0..=1.0).contains(&of(&a, &b)));
            prop_assert_eq!(of(&a, &a), 1.0);
        }
    }
}
