//! What binds a record to all before it, and a head to its key?
//!
//! Each use of a hash or a signature begins with a text of its own, so that bytes made for one are never good for
//! another.

use agentd_domain::audit::{Digest, Head, Linked, PublicKey, Record, Signature, SignedHead};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

const GENESIS: &[u8] = b"agentd-os audit 1 beginning\n";
const RECORD: &[u8] = b"agentd-os audit 1 record\n";
const HEAD: &[u8] = b"agentd-os audit 1 head\n";

/// The hash before the first record.
pub fn genesis() -> Digest {
    Digest(Sha256::digest(GENESIS).into())
}

/// The hash of a record that follows the one with the hash `before`.
pub fn link(before: &Digest, record: &Record) -> Digest {
    let hash = Sha256::new().chain_update(RECORD).chain_update(before.0).chain_update(text(record));
    Digest(hash.finalize().into())
}

/// Whether the key that a head names has signed it.
pub fn authentic(signed: &SignedHead) -> bool {
    let key = UnparsedPublicKey::new(&ED25519, signed.head.key.0);
    key.verify(&to_sign(&signed.head), &signed.signature.0).is_ok()
}

/// Signs heads. The key's 32 secret bytes are kept by whoever made this.
pub struct Signer(Ed25519KeyPair);

impl Signer {
    /// `None` when these are not the 32 bytes of a key.
    pub fn from_seed(seed: &[u8]) -> Option<Self> {
        Ed25519KeyPair::from_seed_unchecked(seed).ok().map(Self)
    }

    pub fn key(&self) -> PublicKey {
        let mut bytes = [0; 32];
        // Ed25519 keys have 32 bytes (RFC 8032, 5.1.5).
        bytes.iter_mut().zip(self.0.public_key().as_ref()).for_each(|(to, from)| *to = *from);
        PublicKey(bytes)
    }

    /// The head names this signer's key, whatever it named before.
    pub fn sign(&self, head: Head) -> SignedHead {
        let head = Head { key: self.key(), ..head };
        let signed = self.0.sign(&to_sign(&head));
        let mut signature = [0; 64];
        signature.iter_mut().zip(signed.as_ref()).for_each(|(to, from)| *to = *from);
        SignedHead { head, signature: Signature(signature) }
    }
}

/// A line of an export, without its end.
pub fn linked_line(linked: &Linked) -> Vec<u8> {
    text(linked)
}

/// A line of an export, without its end.
pub fn signed_line(signed: &SignedHead) -> Vec<u8> {
    text(signed)
}

fn to_sign(head: &Head) -> Vec<u8> {
    [HEAD, &text(head)].concat()
}

/// Canonical: see [`agentd_domain::audit`]. These types always encode; they hold no maps.
fn text(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}
