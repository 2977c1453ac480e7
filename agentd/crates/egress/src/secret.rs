//! How does a secret get into a request, and not back to the agent?
//!
//! In:     the owner's secret and the rule that names it; a request that the rule has allowed; the host's answer.
//! Out:    the request with the secret in its field; the answer in which the secret stands no more.
//! Always: whatever the agent has written into that field is replaced. The answer is asked for without compression and
//!         as a whole, and one that is compressed all the same is refused ([`coding`]), so that the secret is found
//!         where it stands: as it is, in base64 or hexadecimal digits ([`forms`]), escaped as in URLs, JSON and HTML
//!         or not ([`escape`]), in however many pieces it comes ([`search`]). What is found is overwritten with as many
//!         stars, so no length changes.
//! Never:  a copy of the secret in a log, an audit, an error or a `Debug`.
//!
//! What cannot be found: a secret that the host has encrypted, compressed inside an answer that says nothing of it (an
//! archive), spelled in base32, in numbers or backwards, cut into two fields or two answers, or told one bit at a time. So
//! this keeps a secret from an agent whose host is honest: from echoes, errors, redirects and logs. A host that works
//! for the agent can always send back what it was sent; the owner has chosen that exact host, and gave the secret to it.

mod escape;
pub(crate) mod forms;
mod search;

use crate::http1::{Header, Length, Request, Response};
use agentd_domain::net::rule::SecretUse;
use forms::Forms;
use search::Search;
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

/// How an answer's content is coded, where that is anything that cannot be looked into (RFC 9110, 8.4).
pub(crate) fn coding(response: &Response) -> Option<String> {
    let is_coded = |value: &[u8]| {
        value.split(|byte| *byte == b',').any(|token| {
            let token = token.trim_ascii();
            !token.is_empty() && !token.eq_ignore_ascii_case(b"identity")
        })
    };
    let coding = response
        .headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("content-encoding") && is_coded(&header.value))?;
    (response.body != Length::Bytes(0)).then(|| String::from_utf8_lossy(&coding.value).into_owned())
}

/// Overwrites a secret in what passes, in however many pieces it comes.
pub(crate) struct Scrubber<'a> {
    forms: Option<&'a Forms>,
    body: Option<Search<'a>>,
}

impl<'a> Scrubber<'a> {
    pub(crate) fn new(forms: Option<&'a Forms>) -> Self {
        Self { forms, body: forms.map(Search::new) }
    }

    /// Whether there is anything to find.
    pub(crate) fn looks(&self) -> bool {
        self.forms.is_some()
    }

    pub(crate) fn head(&self, response: &mut Response) {
        let Some(forms) = self.forms else { return };
        // Stars in the place of whole letters leave a text a text; what would not be one is emptied.
        let text = |text: &str| String::from_utf8(Search::whole(forms, text.as_bytes())).unwrap_or_default();
        response.reason = text(&response.reason);
        for header in &mut response.headers {
            header.value = Search::whole(forms, &header.value);
            header.name = text(&header.name);
        }
    }

    /// What can be passed on now. Only what may be the beginning of the secret is held back.
    pub(crate) fn piece(&mut self, content: Vec<u8>) -> Vec<u8> {
        match &mut self.body {
            Some(search) => search.piece(&content),
            None => content,
        }
    }

    /// What was held back and turned out to be no secret.
    pub(crate) fn rest(&mut self) -> Vec<u8> {
        self.body.as_mut().map(Search::rest).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
