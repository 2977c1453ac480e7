//! What does each line of an export say?
//!
//! A line counts only in its one canonical spelling: whatever else it says was not written by agentd. So a flipped
//! bit that JSON would forgive, in a space or an escape, is seen too.

use crate::chain::{linked_line, signed_line};
use agentd_domain::audit::{Linked, SignedHead};

pub(crate) enum Line<'b> {
    Record(Box<Linked>),
    Head(Box<SignedHead>),
    Bad { bytes: &'b [u8], why: String },
}

impl Line<'_> {
    pub(crate) fn record(&self) -> Option<&Linked> {
        match self {
            Self::Record(linked) => Some(linked),
            _ => None,
        }
    }
}

const RECORD: &[u8] = b"{\"hash\":";
const HEAD: &[u8] = b"{\"head\":";
/// Inside a text of a record its quotes would be escaped.
const SIGNATURE: &[u8] = b",\"signature\":\"";

pub(crate) fn lines(bytes: &[u8]) -> Vec<Line<'_>> {
    bytes.split_inclusive(|&byte| byte == b'\n').map(line).collect()
}

/// Whether a line that cannot be read was meant to be a record, if it still says so.
pub(crate) fn meant_record(bytes: &[u8]) -> Option<bool> {
    match bytes {
        bytes if bytes.starts_with(RECORD) => Some(true),
        bytes if bytes.starts_with(HEAD) => Some(false),
        bytes => bytes.windows(SIGNATURE.len()).any(|part| part == SIGNATURE).then_some(false),
    }
}

fn line(bytes: &[u8]) -> Line<'_> {
    let bad = |why: String| Line::Bad { bytes, why };
    let Some(text) = bytes.strip_suffix(b"\n") else { return bad("its end is missing".into()) };
    let again = if text.starts_with(HEAD) {
        serde_json::from_slice(text).map(|signed| (signed_line(&signed), Line::Head(Box::new(signed))))
    } else {
        serde_json::from_slice(text).map(|linked| (linked_line(&linked), Line::Record(Box::new(linked))))
    };
    match again {
        Ok((canonical, line)) if canonical == text => line,
        Ok(_) => bad("it is not in canonical form (RFC 8785)".into()),
        Err(error) => bad(error.to_string()),
    }
}
