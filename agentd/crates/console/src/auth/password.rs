//! Is this the owner's password?
//!
//! Argon2id with 19 MiB, two passes and one lane: the second of OWASP's recommended settings, small enough for a
//! guest of 512 MiB and for emulated processors. Each stored hash carries its own parameters, so they can rise
//! later without locking anyone out.
//!
//! Calls block for tens of milliseconds (a second or two when emulated): never from an async worker.
//!
//! Sources: RFC 9106; OWASP Password Storage Cheat Sheet; NIST SP 800-63B, 5.1.1.2 (length over composition,
//! NFKC before hashing, so that a letter with an accent is the same from every keyboard).

use argon2::password_hash::phc::PasswordHash;
use argon2::{Algorithm, Argon2, Params, PasswordHasher, PasswordVerifier, Version};
use unicode_normalization::UnicodeNormalization;

pub const SHORTEST_CHARACTERS: usize = 10;
/// Longer than any pass phrase; bounds the work of normalising it.
pub const LONGEST_BYTES: usize = 512;

const MEMORY_KIB: u32 = 19 * 1024;
const PASSES: u32 = 2;
const LANES: u32 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Weak {
    #[error("it has fewer than {SHORTEST_CHARACTERS} characters")]
    Short,
    #[error("it is longer than {LONGEST_BYTES} bytes")]
    Long,
    #[error("it repeats a single character")]
    Uniform,
}

#[derive(Debug, thiserror::Error)]
#[error("Argon2id failed: {0}")]
pub struct HashError(argon2::password_hash::Error);

/// Whether a new password may be taken.
pub fn check_new(password: &str) -> Result<(), Weak> {
    if password.len() > LONGEST_BYTES {
        return Err(Weak::Long);
    }
    let normal: Vec<char> = password.nfkc().collect();
    if normal.len() < SHORTEST_CHARACTERS {
        return Err(Weak::Short);
    }
    if normal.windows(2).all(|pair| pair[0] == pair[1]) {
        return Err(Weak::Uniform);
    }
    Ok(())
}

/// The PHC string to store.
pub fn hash(password: &str) -> Result<String, HashError> {
    let params = Params::new(MEMORY_KIB, PASSES, LANES, None).map_err(|e| HashError(e.into()))?;
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    let hash: PasswordHash = argon2.hash_password(&normalise(password)).map_err(HashError)?;
    Ok(hash.to_string())
}

/// Whether `stored` has the shape of a hash, so that a damaged file is found at start and not at sign-in.
pub fn is_hash(stored: &str) -> bool {
    PasswordHash::new(stored).is_ok_and(|hash| hash.salt.is_some() && hash.hash.is_some())
}

/// Compares in constant time; false for anything that is not a hash.
pub fn matches(password: &str, stored: &str) -> bool {
    if password.len() > LONGEST_BYTES {
        return false;
    }
    let Ok(stored) = PasswordHash::new(stored) else { return false };
    // The parameters are taken from the hash, not from this instance.
    Argon2::default().verify_password(&normalise(password), &stored).is_ok()
}

fn normalise(password: &str) -> Vec<u8> {
    password.nfkc().collect::<String>().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_matches_its_password_and_no_other() {
        let stored = hash("correct horse battery").expect("hashes");
        assert!(stored.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{stored}");
        assert!(is_hash(&stored));
        assert!(matches("correct horse battery", &stored));
        assert!(!matches("correct horse batterz", &stored));
        assert!(!matches("", &stored));
        assert!(!matches("correct horse battery", "$argon2id$v=19$m=19456,t=2,p=1$"));
        assert!(!matches(&"x".repeat(LONGEST_BYTES + 1), &stored));
    }

    #[test]
    fn the_same_letter_from_another_keyboard_is_the_same_password() {
        let composed = "gr\u{fc}ner Baum am See";
        let decomposed = "gru\u{308}ner Baum am See";
        assert!(matches(decomposed, &hash(composed).expect("hashes")));
    }

    #[test]
    fn new_passwords_need_length_not_decoration() {
        assert_eq!(check_new("too short"), Err(Weak::Short));
        assert_eq!(check_new("aaaaaaaaaaaaaa"), Err(Weak::Uniform));
        assert_eq!(check_new(&"ab".repeat(300)), Err(Weak::Long));
        assert_eq!(check_new("long enough"), Ok(()));
        assert_eq!(check_new("ключ от дома"), Ok(()));
    }

    #[test]
    fn damaged_hashes_are_recognised() {
        for damaged in ["", "plain", "$argon2id$v=19$m=19456,t=2,p=1$", "\u{0}\u{0}"] {
            assert!(!is_hash(damaged), "{damaged:?}");
        }
    }
}
