//! What is a claim code, and does this one match?
//!
//! Whoever can read the machine's screen or serial line may become its owner; the code carries that from the
//! screen to the browser. Twelve characters of an alphabet of 31 are 59 bits. Shown in groups of four; read
//! with any case, spaces and dashes.
//!
//! Invariant: comparing takes the same time wherever a wrong code differs.

use sha2::{Digest, Sha256};
use std::fmt;
use subtle::ConstantTimeEq;

/// Digits and letters that are not mistaken for one another on a small screen: no 0, O, 1, I, L.
pub const ALPHABET: &[u8; 31] = b"23456789ABCDEFGHJKMNPQRSTUVWXYZ";

const CHARACTERS: usize = 12;
const GROUP: usize = 4;

#[derive(Clone)]
pub struct ClaimCode([u8; CHARACTERS]);

impl ClaimCode {
    /// From fresh randomness. Each byte of 248 or more is dropped: 248 is the last multiple of 31, and keeping
    /// the rest would favour eight characters.
    pub fn from_random(mut next: impl FnMut() -> u8) -> Self {
        let mut characters = [0; CHARACTERS];
        for place in &mut characters {
            let fair = loop {
                let byte = next();
                if byte < 248 {
                    break byte;
                }
            };
            *place = ALPHABET[usize::from(fair) % ALPHABET.len()];
        }
        Self(characters)
    }

    pub fn matches(&self, typed: &str) -> bool {
        // Both sides are hashed first, so that the comparison sees 32 bytes whatever was typed.
        let typed = Sha256::digest(normalise(typed));
        let own = Sha256::digest(self.0);
        own.ct_eq(&typed).into()
    }
}

/// As shown to people: `ABCD-EFGH-JKMN`.
impl fmt::Display for ClaimCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, &character) in self.0.iter().enumerate() {
            if index > 0 && index % GROUP == 0 {
                f.write_str("-")?;
            }
            write!(f, "{}", char::from(character))?;
        }
        Ok(())
    }
}

/// What a person types, without what does not count.
fn normalise(typed: &str) -> Vec<u8> {
    typed
        .chars()
        .filter(|c| !c.is_whitespace() && !matches!(c, '-' | '\u{2010}'..='\u{2015}'))
        .flat_map(char::to_uppercase)
        .take(CHARACTERS + 1)
        .collect::<String>()
        .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn code(seed: Vec<u8>) -> ClaimCode {
        let mut bytes = seed.into_iter().chain((0..=247).cycle());
        ClaimCode::from_random(|| bytes.next().expect("endless"))
    }

    #[test]
    fn shown_in_three_groups_of_four() {
        let shown = code(vec![]).to_string();
        assert_eq!(shown, "2345-6789-ABCD");
        assert!(ALPHABET.iter().all(|c| !b"0O1IL".contains(c)));
    }

    #[test]
    fn bytes_that_would_favour_some_characters_are_dropped() {
        assert_eq!(code(vec![248, 255, 251, 0]).to_string(), code(vec![0]).to_string());
        assert_eq!(code(vec![255, 30]).to_string().chars().next(), Some('Z'));
    }

    proptest! {
        #[test]
        fn read_as_people_write_it(seed in proptest::collection::vec(any::<u8>(), 12), dashes in any::<bool>(), lower in any::<bool>()) {
            let code = code(seed);
            let mut typed = code.to_string();
            if !dashes { typed = typed.replace('-', " "); }
            if lower { typed = typed.to_lowercase(); }
            prop_assert!(code.matches(&typed));
            let padded = format!("  {} ", typed);
            prop_assert!(code.matches(&padded));
        }

        #[test]
        fn one_wrong_character_is_wrong(seed in proptest::collection::vec(any::<u8>(), 12), at in 0usize..12, other in 0usize..31) {
            let code = code(seed);
            let mut typed = code.0;
            prop_assume!(typed[at] != ALPHABET[other]);
            typed[at] = ALPHABET[other];
            prop_assert!(!code.matches(std::str::from_utf8(&typed).expect("ASCII")));
        }

        #[test]
        fn anything_else_is_wrong_and_harmless(typed in "\\PC{0,64}") {
            let code = code(vec![7; 12]);
            prop_assert_eq!(code.matches(&typed), normalise(&typed) == code.0);
        }

        #[test]
        fn longer_text_never_matches(seed in proptest::collection::vec(any::<u8>(), 12), tail in "[A-Z]{1,5}") {
            let code = code(seed);
            let typed = format!("{code}{tail}");
            prop_assert!(!code.matches(&typed));
        }
    }
}
