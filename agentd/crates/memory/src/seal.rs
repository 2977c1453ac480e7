//! How is what an agent remembers kept from whoever holds only the disk?
//!
//! In:    a key of 32 bytes from a file (`key.rs`), a row, its bytes. Out: sealed bytes, and back.
//! Always: every value made of words or meaning is sealed (AES-256-GCM) with the place it stands in as
//!         authenticated data, so that a row that was changed, moved or taken from another store does not open. A
//!         nonce is 96 random bits, never a counter: pages of a transaction that was lost in a power cut stay on
//!         the medium, and a counter would give their nonces again. A record told alone seals some fifty blocks
//!         (its words'), so 80 million records stay below the 2^32 seals per key of NIST SP 800-38D, and forgetting
//!         changes the key long before.
//!         Terms, subjects, predicates and keys of blocks stand as keyed hashes (HMAC-SHA-256, 16 bytes of it).
//! Never:  the key in redb, or in a log. What stays readable without the key: how many records there are and
//!         their ids (with the time in them), how long their blocks are, and how many share a term.
//! Source: RFC 5869 (both keys are derived from the one in the file), `ring`, which rustls brings already.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use ring::{hkdf, hmac};
use std::sync::atomic::{AtomicU64, Ordering};
use zeroize::Zeroizing;

/// 32 random bytes.
pub(crate) type Secret = Zeroizing<[u8; 32]>;
/// What stands on disk for a word.
pub(crate) type Mark = [u8; 16];

/// What a sealed row is longer than its content.
pub(crate) const SEAL_BYTES: usize = NONCE_LEN + 16;

/// Which table a sealed row stands in. Codes are never given a second meaning: 1 to 3 are of format 2, and so was 4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Row {
    Canary = 0,
    Record = 1,
    Coarse = 2,
    Fine = 3,
    Block = 5,
    Journal = 6,
    RecordBlock = 7,
    LifeBlock = 8,
    CoarseBlock = 9,
    FineBlock = 10,
    TermBlock = 11,
    Word = 12,
}

/// What a keyed hash is of, so that equal texts of two kinds do not look alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hashed {
    Term = 1,
    Claim = 2,
    BlockKey = 3,
    Request = 4,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the system gave no random numbers")]
pub(crate) struct NoRandom;

/// The two keys of a store, derived from the one in its file.
pub(crate) struct Seal {
    values: LessSafeKey,
    marks: hmac::Key,
    /// Tells it from every other of this process.
    number: u64,
}

static NUMBERS: AtomicU64 = AtomicU64::new(0);

impl Seal {
    pub(crate) fn new(secret: &Secret) -> Self {
        let root = hkdf::Salt::new(hkdf::HKDF_SHA256, b"agentd memory 2").extract(secret.as_slice());
        // Both lengths are those of their algorithms, which is all that can be wrong with them.
        let values = root
            .expand(&[b"values"], &AES_256_GCM)
            .map(|okm| LessSafeKey::new(UnboundKey::from(okm)))
            .unwrap_or_else(|_| unreachable!("one block of HKDF"));
        let marks = root
            .expand(&[b"marks"], hmac::HMAC_SHA256)
            .map(hmac::Key::from)
            .unwrap_or_else(|_| unreachable!("one block of HKDF"));
        Self { values, marks, number: NUMBERS.fetch_add(1, Ordering::Relaxed) }
    }

    /// What was made with one seal is not another's: their numbers differ.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    pub(crate) fn seal(
        &self,
        nonces: &mut Nonces,
        row: Row,
        key: &[u8],
        content: &[u8],
    ) -> Result<Vec<u8>, NoRandom> {
        let nonce = nonces.take()?;
        let mut out = Vec::with_capacity(content.len() + SEAL_BYTES);
        out.extend_from_slice(&nonce);
        out.extend_from_slice(content);
        let (_, body) = out.split_at_mut(NONCE_LEN);
        let tag = self
            .values
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::from(place(row, key)), body)
            .unwrap_or_else(|_| unreachable!("a record is far below 64 GiB"));
        out.extend_from_slice(tag.as_ref());
        Ok(out)
    }

    /// The content, in the given buffer. None: it was not sealed with this key, at this place, as it stands.
    pub(crate) fn open<'a>(
        &self,
        row: Row,
        key: &[u8],
        sealed: &[u8],
        into: &'a mut Vec<u8>,
    ) -> Option<&'a [u8]> {
        let (nonce, body) = sealed.split_first_chunk::<NONCE_LEN>()?;
        into.clear();
        into.extend_from_slice(body);
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let content = self.values.open_in_place(nonce, Aad::from(place(row, key)), into).ok()?;
        Some(content)
    }

    /// What stands on disk for this text.
    pub(crate) fn mark(&self, what: Hashed, text: &[u8]) -> Mark {
        let mut context = hmac::Context::with_key(&self.marks);
        context.update(&[what as u8]);
        context.update(text);
        let tag = context.sign();
        let mut mark = Mark::default();
        mark.copy_from_slice(&tag.as_ref()[..16]);
        mark
    }
}

/// Authenticated with every row. Keys of rows are at most 32 bytes; a longer one would not fit a place.
fn place(row: Row, key: &[u8]) -> impl AsRef<[u8]> {
    let mut place = [0u8; 34];
    place[0] = row as u8;
    place[1] = key.len() as u8;
    place[2..2 + key.len()].copy_from_slice(key);
    place
}

/// Random nonces, asked for many at a time.
pub(crate) struct Nonces {
    random: SystemRandom,
    bytes: Vec<u8>,
}

impl Nonces {
    pub(crate) fn new() -> Self {
        Self { random: SystemRandom::new(), bytes: Vec::new() }
    }

    fn take(&mut self) -> Result<[u8; NONCE_LEN], NoRandom> {
        const AT_ONCE: usize = 128;
        if self.bytes.len() < NONCE_LEN {
            self.bytes.resize(NONCE_LEN * AT_ONCE, 0);
            self.random.fill(&mut self.bytes).map_err(|_| NoRandom)?;
        }
        let rest = self.bytes.len() - NONCE_LEN;
        let nonce = self.bytes.last_chunk().copied().unwrap_or_default();
        self.bytes.truncate(rest);
        Ok(nonce)
    }
}

pub(crate) fn random_secret() -> Result<Secret, NoRandom> {
    let mut secret = Secret::default();
    SystemRandom::new().fill(secret.as_mut_slice()).map_err(|_| NoRandom)?;
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn seal(n: u8) -> Seal {
        Seal::new(&Zeroizing::new([n; 32]))
    }

    proptest! {
        #[test]
        fn what_is_sealed_opens_only_where_it_stood(
            content in proptest::collection::vec(any::<u8>(), 0..300), key in any::<[u8; 8]>(),
            at in any::<prop::sample::Index>(), bit in 0u8..8
        ) {
            let own = seal(1);
            let mut sealed = own.seal(&mut Nonces::new(), Row::Record, &key, &content).unwrap();
            prop_assert_eq!(sealed.len(), content.len() + SEAL_BYTES);
            let mut into = Vec::new();
            prop_assert_eq!(own.open(Row::Record, &key, &sealed, &mut into), Some(content.as_slice()));
            prop_assert_eq!(own.open(Row::Fine, &key, &sealed, &mut into), None, "another table");
            prop_assert_eq!(own.open(Row::Record, &[], &sealed, &mut into), None, "another key");
            prop_assert_eq!(seal(2).open(Row::Record, &key, &sealed, &mut into), None, "another store");
            let at = at.index(sealed.len());
            sealed[at] ^= 1 << bit;
            prop_assert_eq!(own.open(Row::Record, &key, &sealed, &mut into), None, "a flipped bit");
        }

        #[test]
        fn any_bytes_do_not_open(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(seal(1).open(Row::Record, &[], &bytes, &mut Vec::new()).is_none());
        }
    }

    #[test]
    fn nonces_do_not_come_twice() {
        let mut nonces = Nonces::new();
        let taken: HashSet<_> = (0..10_000).map(|_| nonces.take().unwrap()).collect();
        assert_eq!(taken.len(), 10_000);
    }

    #[test]
    fn marks_differ_by_key_and_kind() {
        let mark = seal(1).mark(Hashed::Term, b"lemon");
        assert_eq!(mark, seal(1).mark(Hashed::Term, b"lemon"));
        assert_ne!(mark, seal(2).mark(Hashed::Term, b"lemon"));
        assert_ne!(mark, seal(1).mark(Hashed::Claim, b"lemon"));
    }
}
