//! Which tokens does the tiny model know?
//!
//! A byte-level BPE vocabulary in GPT-2's manner, learned from [`CORPUS`]: every byte is a token, so every text
//! can be written; the most frequent neighbours are merged, one merge per further token.
//! Source: Sennrich et al. 2016, arXiv 1508.07909; GPT-2's `bytes_to_unicode`.

use std::collections::BTreeMap;

/// What a home appliance and its agents talk about. Long enough for some hundred useful merges.
const CORPUS: &str = "\
You are echo, an agent that lives on this machine and remembers what it is told. \
The owner tells you something and you keep it; the owner asks and you answer from memory. \
Hello, how are you today? I am well, thank you. What can I do for you? \
I remember that you told me about your garden, your friends, your work and your plans. \
When the power goes out and comes back, I am still here and so is everything you told me. \
My name is echo. What is your name? Where do you live? What do you like to eat in the morning? \
She likes tea with lemon and he drinks coffee without sugar. They have two cats and a dog. \
The meeting is on Monday at nine in the morning, the train leaves at half past seven. \
Please remind me to water the plants, to call my mother, and to pay the rent before Friday. \
The key is under the stone beside the door. The car is parked behind the house near the river. \
An answer should be short, true and kind. If you do not know, say that you do not know. \
There is a time for questions and a time for answers; there is also a time to listen. \
The appliance starts, checks its disk, mounts its data and opens its page for the owner. \
An agent has a name, a memory, a place to work and limits that the kernel enforces for it. \
Nothing leaves the machine unless the owner asks for it. Nothing that was acknowledged is lost. \
The system said that the model is loaded and ready. The user said that the assistant was right. \
They were thinking about the weather: it will rain tomorrow, and the wind will come from the west. \
First we walk through the forest, then over the bridge, and then along the lake until evening. \
I would like to know whether this is the right way, because we should be there before night. \
Could you write that down for me? Yes, of course, I have written it down and will not forget it. \
One, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, a hundred, a thousand. \
In 1999 it was 12 degrees; in 2024 it was 15 degrees, and 0.5 more than in the year before.
";

/// Merges learned; with 256 bytes and the special tokens this gives about a thousand tokens.
const MERGES: usize = 700;

pub(super) struct Vocabulary {
    /// The 256 bytes, then the merged tokens, in GPT-2's printable spelling.
    pub(super) tokens: Vec<String>,
    /// `left right`, best first.
    pub(super) merges: Vec<String>,
}

pub(super) fn learn() -> Vocabulary {
    let mut words: BTreeMap<Vec<String>, usize> = BTreeMap::new();
    for word in split(CORPUS) {
        let spelled = word.bytes().map(|byte| printable(byte).to_string()).collect();
        *words.entry(spelled).or_default() += 1;
    }
    let mut tokens: Vec<String> = (0..=255u8).map(|byte| printable(byte).to_string()).collect();
    let mut merges = Vec::new();
    while merges.len() < MERGES {
        let Some((left, right)) = most_frequent_pair(&words) else {
            break;
        };
        words = words.into_iter().map(|(word, count)| (merge(&word, &left, &right), count)).collect();
        tokens.push(format!("{left}{right}"));
        merges.push(format!("{left} {right}"));
    }
    Vocabulary { tokens, merges }
}

/// Words with the space before them, as GPT-2's pattern cuts ASCII text.
fn split(text: &str) -> Vec<&str> {
    let class = |c: char| match c {
        ' ' | '\n' => 0,
        c if c.is_ascii_alphabetic() => 1,
        c if c.is_ascii_digit() => 2,
        _ => 3,
    };
    let mut words = Vec::new();
    let mut start = 0;
    let mut previous = 0;
    for (at, c) in text.char_indices() {
        let begins = class(c) == 0 || (previous != 0 && class(c) != previous);
        if begins && at > start {
            words.push(&text[start..at]);
            start = at;
        }
        previous = class(c);
    }
    words.push(&text[start..]);
    words
}

/// Of pairs that are equally frequent the first in the alphabet, so that the result does not depend on a map.
fn most_frequent_pair(words: &BTreeMap<Vec<String>, usize>) -> Option<(String, String)> {
    let mut counts: BTreeMap<(&String, &String), usize> = BTreeMap::new();
    for (word, count) in words {
        for pair in word.windows(2) {
            *counts.entry((&pair[0], &pair[1])).or_default() += count;
        }
    }
    let ((left, right), _) = counts.into_iter().rev().max_by_key(|(_, count)| *count)?;
    Some((left.clone(), right.clone()))
}

fn merge(word: &[String], left: &str, right: &str) -> Vec<String> {
    let mut merged: Vec<String> = Vec::with_capacity(word.len());
    let mut rest = word.iter();
    while let Some(part) = rest.next() {
        if part == left && rest.as_slice().first().is_some_and(|next| next == right) {
            rest.next();
            merged.push(format!("{left}{right}"));
        } else {
            merged.push(part.clone());
        }
    }
    merged
}

/// GPT-2's `bytes_to_unicode`: printable bytes stand for themselves, the others for characters from U+0100 on.
fn printable(byte: u8) -> char {
    let own = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if own(byte) {
        return char::from(byte);
    }
    let others_before = (0..byte).filter(|b| !own(*b)).count() as u32;
    char::from_u32(0x100 + others_before).expect("U+0100 to U+01FF are characters")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_spelled_as_in_gpt_2() {
        assert_eq!(printable(b' '), 'Ġ');
        assert_eq!(printable(b'\n'), 'Ċ');
        assert_eq!(printable(b'A'), 'A');
        assert_eq!(printable(0xAD), 'Ń');
    }

    #[test]
    fn every_merge_joins_two_earlier_tokens() {
        let vocabulary = learn();
        assert!(vocabulary.merges.len() > 500, "only {} merges", vocabulary.merges.len());
        for (rank, merge) in vocabulary.merges.iter().enumerate() {
            let (left, right) = merge.split_once(' ').unwrap();
            let known = &vocabulary.tokens[..256 + rank];
            assert!(known.iter().any(|t| t == left) && known.iter().any(|t| t == right), "{merge}");
            assert_eq!(vocabulary.tokens[256 + rank], format!("{left}{right}"));
        }
    }

    #[test]
    fn words_keep_the_space_before_them() {
        assert_eq!(split("It is 12, ok?\n"), ["It", " is", " 12", ",", " ok", "?", "\n"]);
    }
}
