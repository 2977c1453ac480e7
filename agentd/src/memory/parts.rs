//! How does a document become records?
//!
//! In:    a text. Out: its parts in order: together they are all of its words.
//! Always: a part has at most [`PART_BYTES`] bytes, and ends at the end of a paragraph, else of a line, else of a
//!         sentence, else between two words, wherever one is in its second half.
//! Pure.

/// The embedder reads 512 tokens, about 2,000 characters of English; a smaller part is found more exactly, and says
/// less by itself.
pub(super) const PART_BYTES: usize = 1200;

pub(super) fn split(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let (part, after) = rest.split_at(end_of_part(rest));
        let part = part.trim_end();
        if !part.is_empty() {
            parts.push(part);
        }
        rest = after.trim_start();
    }
    parts
}

fn end_of_part(text: &str) -> usize {
    if text.len() <= PART_BYTES {
        return text.len();
    }
    let most = last_boundary(text, PART_BYTES);
    let head = &text[..most];
    let half = last_boundary(text, PART_BYTES / 2);
    for mark in ["\n\n", "\n", ". ", "? ", "! ", " "] {
        if let Some(at) = head.rfind(mark).filter(|at| *at >= half) {
            return at + mark.len();
        }
    }
    most
}

/// Where a character begins, at or before there.
fn last_boundary(text: &str, at: usize) -> usize {
    (0..=at).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(text: &str) -> String {
        text.split_whitespace().collect()
    }

    #[test]
    fn a_part_ends_where_a_paragraph_does() {
        let first = "One sentence here. ".repeat(40);
        let text = format!("{first}\n\n{}", "Another paragraph. ".repeat(60));
        let parts = split(&text);
        assert_eq!(parts[0], first.trim_end());
        assert!(parts[1..].iter().all(|part| part.ends_with('.')), "{parts:?}");
    }

    #[test]
    fn a_text_without_a_space_is_cut_between_characters() {
        let text = "ß".repeat(2000);
        let parts = split(&text);
        assert_eq!(parts.concat(), text);
        assert!(parts.iter().all(|part| part.len() <= PART_BYTES));
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_no_part_is_too_long(text in "[a-zäß .!?\n]{0,6000}") {
            let parts = split(&text);
            prop_assert!(parts.iter().all(|part| !part.trim().is_empty() && part.len() <= PART_BYTES));
            prop_assert_eq!(words(&parts.concat()), words(&text));
        }
    }
}
