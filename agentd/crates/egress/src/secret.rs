//! How does a secret get into a request, and not back to the agent?
//!
//! In:     the owner's secret and the rule that names it; a request that the rule has allowed; the host's answer.
//! Out:    the request with the secret in its field; the answer in which the secret stands no more.
//! Always: whatever the agent has written into that field is replaced. The answer is asked for without compression and
//!         as a whole, so that the secret is found where it stands; what is found is overwritten with as many stars, so
//!         no length changes.
//! Never:  a copy of the secret in a log, an audit, an error or a `Debug`.
//!
//! What comes back in another form (encoded, split by the host into two fields, one letter at a time) is not found. A
//! secret is given to its host; what that host does with it is the host's affair.

use crate::http1::{Header, Request, Response};
use agentd_domain::net::rule::SecretUse;
use std::fmt;

/// Shorter ones stand in answers by chance, and can be guessed.
pub const SECRET_LEAST_BYTES: usize = 8;
pub const SECRET_MOST_BYTES: usize = 4096;

/// Visible ASCII: it can stand in a field of HTTP (RFC 9110, 5.5).
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    #[error("it has {0} bytes; {SECRET_LEAST_BYTES} to {SECRET_MOST_BYTES} are taken")]
    Length(usize),
    #[error("it holds something other than visible ASCII characters")]
    Character,
}

impl Secret {
    pub fn new(bytes: Vec<u8>) -> Result<Self, SecretError> {
        if !(SECRET_LEAST_BYTES..=SECRET_MOST_BYTES).contains(&bytes.len()) {
            return Err(SecretError::Length(bytes.len()));
        }
        if bytes.iter().all(u8::is_ascii_graphic) { Ok(Self(bytes)) } else { Err(SecretError::Character) }
    }

    /// For whoever keeps it.
    pub fn expose(&self) -> &str {
        // It is ASCII since `new`.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// The request as the host gets it.
pub(crate) fn put_in(request: &Request, into: &SecretUse, secret: &Secret) -> Request {
    const HIDING: [&str; 3] = ["accept-encoding", "range", "if-range"];
    let mut request = request.clone();
    request.headers.retain(|header| {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        !is(&into.header) && !HIDING.into_iter().any(is)
    });
    let (before, after) = into.template.split_once("{}").unwrap_or((&into.template, ""));
    let value = [before.as_bytes(), &secret.0, after.as_bytes()].concat();
    request.headers.push(Header { name: into.header.clone(), value });
    request.headers.push(Header { name: "Accept-Encoding".to_owned(), value: b"identity".to_vec() });
    request
}

/// Overwrites a secret in what passes, in however many pieces it comes.
pub(crate) struct Scrubber<'a> {
    secret: Option<&'a Secret>,
    /// The beginning of the secret, perhaps.
    held: Vec<u8>,
}

impl<'a> Scrubber<'a> {
    pub(crate) fn new(secret: Option<&'a Secret>) -> Self {
        Self { secret, held: Vec::new() }
    }

    pub(crate) fn head(&self, response: &mut Response) {
        let Some(Secret(secret)) = self.secret else { return };
        let mut reason = std::mem::take(&mut response.reason).into_bytes();
        overwrite(&mut reason, secret);
        response.reason = String::from_utf8(reason).unwrap_or_default();
        for header in &mut response.headers {
            overwrite(&mut header.value, secret);
            let mut name = std::mem::take(&mut header.name).into_bytes();
            overwrite(&mut name, secret);
            header.name = String::from_utf8(name).unwrap_or_default();
        }
    }

    /// What can be passed on now. Only what may be the beginning of the secret is held back.
    pub(crate) fn piece(&mut self, content: Vec<u8>) -> Vec<u8> {
        let Some(Secret(secret)) = self.secret else { return content };
        let mut all = std::mem::take(&mut self.held);
        all.extend_from_slice(&content);
        overwrite(&mut all, secret);
        let begins = |length: &usize| all.ends_with(secret.get(..*length).unwrap_or_default());
        let kept = (1..secret.len().min(all.len() + 1)).rev().find(begins).unwrap_or(0);
        self.held = all.split_off(all.len() - kept);
        all
    }

    /// What was held back and turned out to be no secret.
    pub(crate) fn rest(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.held)
    }
}

fn overwrite(bytes: &mut [u8], secret: &[u8]) {
    let mut at = 0;
    while let Some(found) =
        bytes.get(at..).and_then(|rest| rest.windows(secret.len()).position(|w| w == secret))
    {
        let end = at + found + secret.len();
        if let Some(place) = bytes.get_mut(at + found..end) {
            place.fill(b'*');
        }
        at = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn scrubbed(secret: &Secret, pieces: &[&[u8]]) -> Vec<u8> {
        let mut scrubber = Scrubber::new(Some(secret));
        let mut out: Vec<u8> = pieces.iter().flat_map(|piece| scrubber.piece(piece.to_vec())).collect();
        out.extend(scrubber.rest());
        out
    }

    #[test]
    fn a_secret_has_a_length_and_letters_that_a_field_can_carry() {
        assert!(Secret::new(b"correct-horse".to_vec()).is_ok());
        assert_eq!(Secret::new(b"short".to_vec()), Err(SecretError::Length(5)));
        assert_eq!(Secret::new(vec![b'x'; 4097]), Err(SecretError::Length(4097)));
        for bad in ["two words here", "line\r\nX: injected", "naïve-secret", "nul\0nul\0nul"] {
            assert_eq!(Secret::new(bad.as_bytes().to_vec()), Err(SecretError::Character), "{bad:?}");
        }
        assert_eq!(format!("{:?}", Secret::new(b"correct-horse".to_vec()).unwrap()), "Secret");
    }

    #[test]
    fn only_what_may_begin_the_secret_waits() {
        let secret = Secret::new(b"abcabcabd".to_vec()).unwrap();
        let mut scrubber = Scrubber::new(Some(&secret));
        assert_eq!(scrubber.piece(b"data: x\n\n".to_vec()), b"data: x\n\n");
        assert_eq!(scrubber.piece(b"data: abcab".to_vec()), b"data: ");
        assert_eq!(scrubber.piece(b"cabcabd.".to_vec()), b"abc*********.");
        assert_eq!(scrubber.rest(), b"");
    }

    proptest! {
        /// However it is cut, the secret is not in what comes out, and what comes out is as long as what went in.
        #[test]
        fn no_cut_lets_the_secret_through(
            secret in "[ab]{8,12}",
            text in proptest::collection::vec("[ab]{0,6}|SECRET|SECRET", 0..8),
            cuts in proptest::collection::vec(0usize..40, 0..8),
        ) {
            let value = Secret::new(secret.clone().into_bytes()).unwrap();
            let text = text.concat().replace("SECRET", &secret).into_bytes();
            let mut pieces = Vec::new();
            let mut rest = text.as_slice();
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            pieces.push(rest);
            let out = scrubbed(&value, &pieces);
            prop_assert_eq!(out.len(), text.len());
            prop_assert!(!out.windows(secret.len()).any(|window| window == secret.as_bytes()));
        }
    }
}
