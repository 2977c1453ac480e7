//! Is this audit log whole, and does the appliance's key say so?
//!
//! Owns:  the chain of hashes, the signature of a head, and [`verify`], which names the first bad record.
//! In:    records, heads, bytes of an export, a key. Out: hashes, signatures, verdicts.
//! Never: a clock, a file, a socket, randomness: agentd keeps the log and the key, `agentctl` reads files. Both link
//!        this crate, so what one writes the other can check.
//! Format: `FORMAT.md` beside this crate's manifest.
//! Sources: RFC 8785 (canonical JSON), FIPS 180-4 (SHA-256), RFC 8032 (Ed25519); for chains with signed heads,
//!          Crosby and Wallach, "Efficient Data Structures for Tamper-Evident Logging" (USENIX Security 2009), and
//!          RFC 9162, 4.10, signed tree heads.
#![forbid(unsafe_code)]

mod chain;
mod export;
mod verify;

pub use chain::{Signer, authentic, genesis, link, linked_line, signed_line};
pub use verify::{At, Demands, FirstBad, Seen, Summary, Tally, Why, follow, verify};

#[cfg(test)]
mod tests;
