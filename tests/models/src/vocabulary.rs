//! Which tokens does a seeded model know?
//!
//! A byte-level BPE vocabulary in Qwen2's manner and of its size, written down instead of learned: the 256 bytes; a
//! space with a letter; two letters; a space with three letters; four letters, until the vocabulary is full; then
//! the control tokens, and unused ones up to the round number that Qwen's vocabulary has too.
//!
//! True: in this order of merges a space with three letters of [`LETTERS`] is one token whatever stands beside it, so
//! a text of [`words`] has as many tokens as words.
//! Source: GPT-2's `bytes_to_unicode`; `tokenizer.ggml.pre` = `qwen2` in llama.cpp's `llama-vocab.cpp`.

use crate::{Dice, Shape};

/// Present in the vocabulary of every shape.
const LETTERS: usize = 12;
/// Ends of texts and of messages: the ids after the last merge.
const CONTROLS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
/// Qwen2.5 has 151,643 tokens before its control tokens and 151,936 in all.
const AFTER_MERGES: usize = 293;

/// Token types of GGUF.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const UNUSED: i32 = 5;

/// ChatML.
pub const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' \
    + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

pub(crate) struct Vocabulary {
    pub(crate) tokens: Vec<String>,
    pub(crate) types: Vec<i32>,
    /// `left right`, best first.
    pub(crate) merges: Vec<String>,
    pub(crate) end_of_text: u32,
    pub(crate) end_of_message: u32,
}

/// Text of so many words, each one token, none of them twice in a row by rule: they follow from the seed.
pub fn words(seed: u64, count: usize) -> String {
    let mut dice = Dice(seed);
    let mut text = String::with_capacity(count * 4);
    for _ in 0..count {
        let drawn = dice.bits() as usize;
        text.push(' ');
        for place in 0..3 {
            text.push(letter(drawn >> (16 * place) & 0xFFFF, LETTERS));
        }
    }
    text
}

fn letter(number: usize, letters: usize) -> char {
    char::from(b'a' + (number % letters) as u8)
}

impl Vocabulary {
    pub(crate) fn new(shape: &Shape) -> Self {
        let wanted = shape.vocabulary - AFTER_MERGES.min(shape.vocabulary / 8);
        // The small vocabulary has fewer letters, so that it has four-letter tokens too.
        let letters = if wanted > 100_000 { 26 } else { LETTERS };
        let mut tokens: Vec<String> = (0..=255u8).map(|byte| printable(byte).to_string()).collect();
        let mut merges = Vec::new();
        let mut merge = |left: &str, right: &str| {
            if tokens.len() < wanted {
                tokens.push(format!("{left}{right}"));
                merges.push(format!("{left} {right}"));
            }
        };
        let single: Vec<String> = (0..letters).map(|at| letter(at, letters).to_string()).collect();
        let pairs: Vec<String> =
            single.iter().flat_map(|a| single.iter().map(move |b| format!("{a}{b}"))).collect();
        let space = printable(b' ').to_string();
        single.iter().for_each(|a| merge(&space, a));
        pairs.iter().for_each(|pair| merge(&pair[..1], &pair[1..]));
        for a in &single {
            pairs.iter().for_each(|pair| merge(&format!("{space}{a}"), pair));
        }
        // Every pair begins a word: the first of each, then the second of each.
        for right in &pairs {
            pairs.iter().for_each(|left| merge(left, right));
        }
        let mut types = vec![NORMAL; tokens.len()];
        let end_of_text = tokens.len() as u32;
        tokens.extend(CONTROLS.map(str::to_owned));
        types.resize(tokens.len(), CONTROL);
        for number in tokens.len()..shape.vocabulary {
            tokens.push(format!("[PAD{number}]"));
        }
        types.resize(tokens.len(), UNUSED);
        Self { tokens, types, merges, end_of_text, end_of_message: end_of_text + 2 }
    }

    /// Whether an answer may hold it: no token that ends one, no half of a character, no control character.
    pub(crate) fn speaks(&self, token: usize) -> bool {
        self.types[token] == NORMAL && (token > 255 || (0x20..0x7F).contains(&token))
    }
}

/// GPT-2's `bytes_to_unicode`: printable bytes stand for themselves, the others for characters from U+0100 on.
fn printable(byte: u8) -> char {
    let own = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if own(byte) {
        return char::from(byte);
    }
    let others_before = (0..byte).filter(|b| !own(*b)).count() as u32;
    char::from_u32(0x100 + others_before).unwrap_or(char::REPLACEMENT_CHARACTER)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{QWEN_HALF_BILLION, SMALL};
    use std::collections::{HashMap, HashSet};

    #[test]
    fn the_large_vocabulary_has_the_size_of_qwens() {
        let vocabulary = Vocabulary::new(&QWEN_HALF_BILLION);
        assert_eq!((vocabulary.tokens.len(), vocabulary.types.len()), (151_936, 151_936));
        assert_eq!(vocabulary.end_of_text, 151_643);
        assert_eq!(vocabulary.merges.len(), 151_643 - 256);
        let distinct: HashSet<&String> = vocabulary.tokens.iter().collect();
        assert_eq!(distinct.len(), vocabulary.tokens.len(), "a token is there twice");
    }

    /// BPE as it is written down: the best merge first, until none is left.
    #[test]
    fn every_word_is_one_token() {
        for shape in [SMALL, QWEN_HALF_BILLION] {
            let vocabulary = Vocabulary::new(&shape);
            let ranks: HashMap<&str, usize> =
                vocabulary.merges.iter().enumerate().map(|(rank, merge)| (merge.as_str(), rank)).collect();
            for word in words(11, 500).split_inclusive(' ').skip(1) {
                let mut parts: Vec<String> =
                    format!(" {}", word.trim()).bytes().map(|byte| printable(byte).to_string()).collect();
                while let Some((_, at)) = (0..parts.len().saturating_sub(1))
                    .filter_map(|at| {
                        let pair = format!("{} {}", parts[at], parts[at + 1]);
                        ranks.get(pair.as_str()).map(|rank| (*rank, at))
                    })
                    .min()
                {
                    let right = parts.remove(at + 1);
                    parts[at].push_str(&right);
                }
                assert_eq!(parts.len(), 1, "{word:?} in {}: {parts:?}", shape.name);
            }
        }
    }

    #[test]
    fn words_follow_from_the_seed() {
        assert_eq!(words(1, 100), words(1, 100));
        assert_ne!(words(1, 100), words(2, 100));
        assert_eq!(words(3, 100).len(), 400);
        assert!(words(1, 200).starts_with(&words(1, 100)));
    }
}
