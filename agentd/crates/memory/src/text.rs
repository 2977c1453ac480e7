//! Which words does a text stand under?
//!
//! In:    a text as it was said, or a question as it was asked.
//! Out:   its terms in order: folded (NFKD without marks, lower case), split at everything that is neither
//!        letter nor digit, without stop words, stemmed with Snowball's English stemmer ("Porter2"). Scripts
//!        written without spaces give overlapping pairs of characters.
//! Always: [`terms`] of a stored text and of a question go the same way, or words would not meet. Whoever
//!        changes it raises [`WORDS_VERSION`]: postings are derived from the texts and are rebuilt.
//! Never: a language guess. Words of other languages pass the English stemmer, on both sides alike.
//!
//! Source: Unicode TR15 (normalisation), snowballstem.org/algorithms/english/stemmer.html. Without stemmer
//! and stop words BM25 finds five points less on LoCoMo (R@10 54.3 against 59.7).

use rust_stemmers::{Algorithm, Stemmer};
use std::collections::{BTreeMap, HashSet};
use std::sync::LazyLock;
use unicode_normalization::UnicodeNormalization;
use unicode_normalization::char::is_combining_mark;

/// Stored with every file; another value means that its postings must be rebuilt from the texts.
pub const WORDS_VERSION: u32 = 1;

/// Longer runs are cut: nobody asks for them whole, and a key of redb should stay small.
const TERM_CHARS_MAX: usize = 32;

/// English words that carry no content, folded; also what apostrophes leave behind ("don", "t", "ll").
/// From the list of the Snowball project, with question words.
const STOP_WORDS: &str = include_str!("stop_words.txt");

/// The terms of a text, in order, with repetitions.
pub fn terms(text: &str) -> Vec<String> {
    let mut terms = Vec::new();
    Words::default().for_each(text, |word, stemmer| terms.extend(term_of(word, stemmer)));
    terms
}

/// How often each term occurs in the text.
pub fn term_counts(text: &str) -> BTreeMap<String, u32> {
    let mut counts = BTreeMap::new();
    for term in terms(text) {
        *counts.entry(term).or_insert(0) += 1;
    }
    counts
}

/// Folded words without stop words, not yet stemmed.
pub fn content_words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    Words::default().for_each(text, |word, _| {
        if !is_stop_word(word) {
            words.push(word.to_owned());
        }
    });
    words
}

/// The term of a folded word; none if it carries no content.
pub(crate) fn term_of(word: &str, stemmer: &Stemmer) -> Option<String> {
    (!is_stop_word(word)).then(|| cut(&stemmer.stem(word)))
}

/// Splits texts into folded words, stop words among them.
pub(crate) struct Words {
    stemmer: Stemmer,
    /// The word that is being read.
    run: String,
}

impl Default for Words {
    fn default() -> Self {
        Self { stemmer: Stemmer::create(Algorithm::English), run: String::new() }
    }
}

impl Words {
    pub(crate) fn for_each(&mut self, text: &str, mut each: impl FnMut(&str, &Stemmer)) {
        let Self { stemmer, run } = self;
        run.clear();
        if text.is_ascii() {
            // No marks to take off, and one case for each letter.
            for word in text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()) {
                run.clear();
                run.extend(word.chars().map(|c| c.to_ascii_lowercase()));
                each(run, stemmer);
            }
            return;
        }
        for c in text.nfkd().filter(|c| !is_combining_mark(*c)).flat_map(char::to_lowercase) {
            if c.is_alphanumeric() {
                run.push(c);
            } else {
                take_run(run, stemmer, &mut each);
            }
        }
        take_run(run, stemmer, &mut each);
    }
}

pub fn is_stop_word(folded: &str) -> bool {
    static SET: LazyLock<HashSet<&str>> = LazyLock::new(|| STOP_WORDS.split_whitespace().collect());
    SET.contains(folded)
}

fn take_run(run: &mut String, stemmer: &Stemmer, each: &mut impl FnMut(&str, &Stemmer)) {
    if run.chars().any(is_unspaced) {
        pairs(run).iter().for_each(|pair| each(pair, stemmer));
    } else if !run.is_empty() {
        each(run, stemmer);
    }
    run.clear();
}

/// Scripts that put no space between words: Han, Hiragana, Katakana, Thai, Lao, Khmer, Myanmar.
fn is_unspaced(c: char) -> bool {
    matches!(c, '\u{0E00}'..='\u{0EFF}' | '\u{1000}'..='\u{109F}' | '\u{1780}'..='\u{17FF}'
        | '\u{3040}'..='\u{30FF}' | '\u{3400}'..='\u{4DBF}' | '\u{4E00}'..='\u{9FFF}' | '\u{20000}'..='\u{3FFFF}')
}

fn pairs(run: &str) -> Vec<String> {
    let chars: Vec<char> = run.chars().collect();
    if chars.len() < 2 {
        return vec![run.to_owned()];
    }
    chars.windows(2).map(|pair| pair.iter().collect()).collect()
}

fn cut(term: &str) -> String {
    term.chars().take(TERM_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folds_stems_and_drops_stop_words() {
        assert_eq!(
            terms("The Cafés were RUNNING, don't you know?"),
            ["café".replace('é', "e"), "run".into(), "know".into()]
        );
        assert_eq!(terms("I'm allergic to peanuts"), ["allerg", "peanut"]);
        assert_eq!(terms("ﬁle №7 x²"), ["file", "no7", "x2"]);
        assert_eq!(terms("the of and"), Vec::<String>::new());
    }

    #[test]
    fn unspaced_scripts_meet_by_pairs() {
        assert_eq!(terms("東京都"), ["東京", "京都"]);
        assert!(terms("東京").iter().all(|t| terms("東京都に住む").contains(t)));
    }

    #[test]
    fn long_runs_are_cut_on_a_character() {
        let long = "é".repeat(100);
        assert_eq!(terms(&long), ["e".repeat(TERM_CHARS_MAX)]);
    }

    #[test]
    fn no_term_holds_a_zero_byte() {
        // Keys of postings end a term with 0x00.
        assert!(terms("a\0b zero\0bytes").iter().all(|t| !t.contains('\0')));
    }
}
