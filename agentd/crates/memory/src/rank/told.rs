//! What is told by a record besides its words, and what text stands for it before the embedder?
//!
//! Derived from the text alone when a record is stored; five small numbers that an index keeps in memory.

use crate::text;

/// A record's vector is made of it and so many before it in its session: one turn of a conversation seldom says what it
/// is about. None after it, so no vector is ever made again.
pub const WINDOW_BEFORE: usize = 2;

/// A name before a colon is no longer than so.
const NAME_BYTES_MAX: usize = 40;
const NAME_WORDS_MAX: usize = 3;

/// Of a record, for the ranking.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Facts {
    /// Records of one session are neighbours of each other; 0: of none.
    pub session: u64,
    pub event_unix_ms: i64,
    /// Content words.
    pub words: u32,
    /// Of whom tells it; 0: nobody is named.
    pub speaker: u32,
    /// It ends with a question mark.
    pub asks: bool,
    /// It has words of time: yesterday, next month, 2023.
    pub tells_time: bool,
}

impl Facts {
    /// `Ana: shall we?` is Ana's question.
    pub fn read(record_text: &str, session: u64, event_unix_ms: i64) -> Self {
        let words = text::terms(record_text).len();
        Self {
            session,
            event_unix_ms,
            words: u32::try_from(words).unwrap_or(u32::MAX),
            speaker: speaker(record_text).map_or(0, |term| speaker_id(&term)),
            asks: asks(record_text),
            tells_time: tells_time(record_text),
        }
    }
}

/// Does it end with a question mark?
pub fn asks(record_text: &str) -> bool {
    without_remark(record_text).trim_end().ends_with('?')
}

/// The term of the name before a colon, as `Corpus::speaks` is asked for it.
pub fn speaker(record_text: &str) -> Option<String> {
    let (name, rest) = record_text.split_once(':')?;
    let is_name = name.len() <= NAME_BYTES_MAX
        && name.chars().next().is_some_and(char::is_uppercase)
        && name.split_whitespace().count() <= NAME_WORDS_MAX
        && name.chars().all(|c| c.is_alphabetic() || c.is_whitespace() || matches!(c, '.' | '-' | '\''))
        && rest.starts_with(char::is_whitespace);
    if is_name { text::terms(name).into_iter().next() } else { None }
}

/// FNV-1a; two names with one number would only share a bonus.
pub fn speaker_id(term: &str) -> u32 {
    let hash =
        term.bytes().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    hash.max(1)
}

/// The text that the embedder gets for a record; `before` are those before it in its session, the latest last.
pub fn window(before: &[&str], record_text: &str) -> String {
    let start = before.len().saturating_sub(WINDOW_BEFORE);
    let mut parts = before[start..].to_vec();
    parts.push(record_text);
    parts.join("\n")
}

/// Without `[shares a photo: ..]` at its end.
fn without_remark(record_text: &str) -> &str {
    let text = record_text.trim_end();
    match text.rfind('[') {
        Some(start) if text.ends_with(']') && start > 0 => &text[..start],
        _ => text,
    }
}

/// Has it words of time?
pub fn tells_time(record_text: &str) -> bool {
    const WORDS: [&str; 43] = [
        "yesterday",
        "today",
        "tomorrow",
        "tonight",
        "ago",
        "last",
        "next",
        "week",
        "month",
        "year",
        "weekend",
        "recently",
        "morning",
        "just",
        "since",
        "monday",
        "tuesday",
        "wednesday",
        "thursday",
        "friday",
        "saturday",
        "sunday",
        "january",
        "february",
        "march",
        "april",
        "may",
        "june",
        "july",
        "august",
        "september",
        "october",
        "november",
        "december",
        "spring",
        "summer",
        "fall",
        "autumn",
        "winter",
        "days",
        "weeks",
        "months",
        "years",
    ];
    without_remark(record_text).split(|c: char| !c.is_alphanumeric()).any(|word| {
        let year =
            word.len() == 4 && word.bytes().all(|b| b.is_ascii_digit()) && matches!(&word[..2], "19" | "20");
        // No word of the list is longer.
        year || word.len() <= 9 && WORDS.iter().any(|known| word.eq_ignore_ascii_case(known))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_before_a_colon_speaks() {
        assert_eq!(speaker("Caroline: hi").as_deref(), Some("carolin"));
        assert_eq!(speaker("Dr. Ana Lima: hi").as_deref(), Some("dr"));
        for text in
            ["note: buy milk", "https://x.org", "12:30 is fine", "No colon here", "Ana:no space", ": x"]
        {
            assert_eq!(speaker(text), None, "{text}");
        }
        assert_ne!(speaker_id("ana"), speaker_id("bob"));
        assert_ne!(speaker_id(""), 0);
    }

    #[test]
    fn a_photo_does_not_hide_the_question_mark() {
        let facts = Facts::read("Ana: Is it yours? [shares a photo: a cat last year]", 7, 5);
        assert!(facts.asks && !facts.tells_time);
        assert_eq!((facts.session, facts.event_unix_ms, facts.speaker), (7, 5, speaker_id("ana")));
        let facts = Facts::read("We moved in 2019.", 0, 0);
        assert!(!facts.asks && facts.tells_time && facts.speaker == 0);
        assert!(Facts::read("[what?]", 0, 0).speaker == 0);
    }

    #[test]
    fn a_window_looks_back_only() {
        assert_eq!(window(&[], "c"), "c");
        assert_eq!(window(&["x", "a", "b"], "c"), "a\nb\nc");
    }
}
