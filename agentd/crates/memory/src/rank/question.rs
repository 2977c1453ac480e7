//! What does a question ask for?
//!
//! In:  its text and when it is asked. Out: its terms, whether it asks when, the time that it names; and how the
//!      answer would begin if it was told ([`as_told`]).
//! English only; of a question in another language the terms remain.

use super::dates::{self, Span};
use crate::text;
use std::collections::HashSet;

/// A question as the ranking sees it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Question {
    /// Distinct, in their order.
    pub terms: Vec<Term>,
    pub asks_when: bool,
    pub span: Option<Span>,
}

/// A word as it is indexed, and as it was written, folded: the text that a word's vector is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Term {
    pub text: String,
    pub word: String,
}

impl Question {
    /// `now_unix_ms` is when it is asked: "last week" and "in May" are counted from there.
    pub fn read(question: &str, now_unix_ms: i64) -> Self {
        let mut seen = HashSet::new();
        let terms = text::content_words(question)
            .into_iter()
            .filter_map(|word| Some(Term { text: text::terms(&word).into_iter().next()?, word }))
            .filter(|term| seen.insert(term.text.clone()))
            .collect();
        Self { terms, asks_when: asks_when(question), span: dates::span(question, now_unix_ms) }
    }
}

fn asks_when(question: &str) -> bool {
    const PHRASES: [&str; 9] = [
        "how long",
        "what date",
        "what day",
        "what month",
        "what year",
        "what time",
        "which day",
        "which month",
        "which year",
    ];
    let lower = question.trim_start().to_lowercase();
    lower.starts_with("when") || PHRASES.iter().any(|phrase| lower.contains(phrase))
}

/// The question as the one whom it names would tell it: "When did Ana go to her sister?" becomes "I go to my sister".
///
/// Records are told, not asked, and by the person in question; a vector of this beside the question's own is nearer to
/// them. `is_speaker` gets a term. Without exactly one speaker in it only the question's words are taken away.
pub fn as_told(question: &str, is_speaker: impl Fn(&str) -> bool) -> String {
    /// They ask, as long as they stand at the beginning.
    const ASK: [&str; 27] = [
        "what", "when", "where", "who", "which", "how", "why", "did", "does", "do", "is", "are", "was",
        "were", "has", "have", "had", "would", "will", "could", "can", "might", "many", "much", "kind",
        "type", "long",
    ];
    const HELP: [&str; 5] = ["did", "does", "do", "has", "have"];
    /// The beginning ends with so many words that were kept.
    const BEGINNING_WORDS: usize = 3;
    let words: Vec<&str> = question
        .split_whitespace()
        .map(|word| word.trim_matches(|c: char| !c.is_alphanumeric()))
        .filter(|word| !word.is_empty())
        .collect();
    let speaker = |word: &str| {
        let term = text::terms(without_possessive(word)).into_iter().next();
        term.filter(|term| is_speaker(term))
    };
    let named: HashSet<String> = words.iter().filter_map(|word| speaker(word)).collect();
    let one = named.len() == 1;
    let mut told: Vec<String> = Vec::new();
    let mut beginning = true;
    for word in words {
        let lower = word.to_lowercase();
        if HELP.contains(&lower.as_str()) || beginning && ASK.contains(&lower.as_str()) {
            continue;
        }
        if one && speaker(word).is_some() {
            told.push(if without_possessive(word) == word { "I" } else { "my" }.to_owned());
            beginning = false;
            continue;
        }
        told.push(match lower.as_str() {
            "her" | "his" | "their" if one => "my".to_owned(),
            "she" | "he" | "they" if one => "I".to_owned(),
            "him" | "them" if one => "me".to_owned(),
            _ => word.to_owned(),
        });
        beginning &= told.len() <= BEGINNING_WORDS;
    }
    if told.is_empty() { question.to_owned() } else { told.join(" ") }
}

fn without_possessive(word: &str) -> &str {
    word.strip_suffix("'s").or_else(|| word.strip_suffix("\u{2019}s")).unwrap_or(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_are_distinct_and_keep_their_words() {
        let question = Question::read("When did Ana's hiking hikes begin?", 0);
        let terms: Vec<_> = question.terms.iter().map(|t| (t.text.as_str(), t.word.as_str())).collect();
        assert_eq!(terms, [("ana", "ana"), ("hike", "hiking"), ("begin", "begin")]);
        assert!(question.asks_when && question.span.is_none());
        assert!(!Question::read("Whenever?", 0).terms.is_empty());
        assert!(!Question::read("what is it?", 0).asks_when);
        assert!(Question::read("In which month was it?", 0).asks_when);
    }

    #[test]
    fn a_question_is_told_by_the_one_it_names() {
        let told = |question| as_told(question, |term| ["ana", "bob"].contains(&term));
        assert_eq!(told("When did Ana go to her sister?"), "I go to my sister");
        assert_eq!(told("What is Ana's dog called?"), "my dog called");
        assert_eq!(told("What did Ana give Bob?"), "Ana give Bob", "two are named");
        assert_eq!(told("Where is the museum?"), "the museum");
        assert_eq!(told("What?"), "What?", "nothing would be left");
        assert_eq!(told("¿Dónde está?"), "Dónde está");
    }
}
