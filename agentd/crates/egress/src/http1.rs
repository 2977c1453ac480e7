//! What does an HTTP/1 head ask for, if it can be read in one way only?
//!
//! In:     one complete head (found by [`head_end`]): a proxy request, a request inside a connection whose host is
//!         known, or a host's answer.
//! Out:    a [`Request`] or [`Response`] that is written anew for the other side; bytes that were not understood
//!         are never passed on.
//! Always: CRLF line ends, no folded lines, one `Host` that agrees with the target, at most one of Content-Length
//!         and Transfer-Encoding and each at most once, HTTP/1.0 or 1.1, no user information, no fragment.
//!         The grammar is `httparse`'s; the strictness is ours.
//! Never:  repair. RFC 9112 lets a proxy mend some of this; two programs mend differently.
//! Source: RFC 9112, 2.2, 3.2, 5.1, 6, 11.2; RFC 9110, 7.6.1 (hop-by-hop fields), 9.3.6 (CONNECT).

mod body;

use crate::name::{Destination, NameError};
use crate::rules::Inside;
use std::num::NonZeroU16;

pub use body::{Body, Piece, Strictness};

/// Twice what browsers send at most. A longer head is refused with 431.
pub const HEAD_MAX_BYTES: usize = 32 * 1024;
const HEADERS_MAX: usize = 100;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    #[error("the head is longer than 32 KiB or has more than 100 fields")]
    TooLarge,
    #[error("it ended too early")]
    Truncated,
    #[error("a line does not end with CR LF")]
    LineEnd,
    #[error("it is not HTTP/1: {0}")]
    Grammar(&'static str),
    #[error("the target is neither `host:port` for CONNECT nor `http://host/path`")]
    Form,
    #[error("only `http://` is forwarded; other schemes go through CONNECT")]
    Scheme,
    #[error("the target has a fragment, a backslash, or bytes that are not printable ASCII")]
    Target,
    #[error("the target's host is wrong: {0}")]
    TargetHost(NameError),
    #[error("the `Host` field is missing")]
    HostMissing,
    #[error("the `Host` field is there twice")]
    HostTwice,
    #[error("the `Host` field and the target name different hosts")]
    HostDiffers,
    #[error("the length of the body is given twice, or not as one plain number")]
    Length,
    #[error("the only transfer coding that is passed on is `chunked`, alone, in HTTP/1.1")]
    TransferEncoding,
    #[error("the only expectation that is passed on is `100-continue`")]
    Expect,
    #[error("a chunk of the body is malformed, has an extension, or is followed by trailers")]
    Chunk,
    #[error("it switches to another protocol")]
    Upgrade,
    #[error("it begins with HTTP/2, which is not spoken here")]
    Http2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    Http10,
    Http11,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Connect,
    /// One request to pass on.
    Forward,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub kind: Kind,
    pub destination: Destination,
    /// Decides which port `Host` may leave out.
    pub inside: Inside,
    pub method: String,
    /// With its query. Empty for CONNECT.
    pub path: String,
    pub version: Version,
    /// What may be passed on.
    pub headers: Vec<Header>,
    pub body: Length,
    /// Whether the client waits for another answer on this connection.
    pub keep_alive: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    pub reason: String,
    pub headers: Vec<Header>,
    pub body: Length,
    /// What Content-Length said, also where no body follows (HEAD, 304).
    pub declared: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub name: String,
    pub value: Vec<u8>,
}

/// Where a body ends (RFC 9112, 6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    Bytes(u64),
    Chunked,
    /// Answers only.
    UntilClose,
}

/// What a client begins with that speaks HTTP/2 without having asked (RFC 9113, 3.4).
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\n";

/// The length of the head at the start of `buffer`, when its end is there. `searched` bytes were seen before.
pub fn head_end(buffer: &[u8], searched: usize) -> Result<Option<usize>, HeadError> {
    for at in searched.saturating_sub(1)..buffer.len() {
        let (byte, before, next) = (buffer.get(at), buffer.get(at.wrapping_sub(1)), buffer.get(at + 1));
        if byte == Some(&b'\n') && before != Some(&b'\r')
            || byte == Some(&b'\r') && next.is_some_and(|n| *n != b'\n')
        {
            return Err(HeadError::LineEnd);
        }
        let end = at + 1;
        if end > HEAD_MAX_BYTES {
            return Err(HeadError::TooLarge);
        }
        if buffer.get(..end).is_some_and(|head| head.ends_with(b"\r\n\r\n")) {
            return Ok(Some(end));
        }
    }
    Ok(None)
}

/// A request to the proxy itself: CONNECT, or an absolute `http://` target.
pub fn parse_proxy(head: &[u8]) -> Result<Request, HeadError> {
    parse_request(head, Inside::Clear, |method, target| {
        if method == "CONNECT" {
            let destination = Destination::parse(target, None).map_err(HeadError::TargetHost)?;
            return Ok((Kind::Connect, destination, String::new()));
        }
        let (scheme, rest) = target.split_once("://").ok_or(HeadError::Form)?;
        if !scheme.eq_ignore_ascii_case("http") {
            return Err(HeadError::Scheme);
        }
        let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let destination =
            Destination::parse(authority, NonZeroU16::new(80)).map_err(HeadError::TargetHost)?;
        let path = match path.as_bytes().first() {
            Some(b'/') => path.to_owned(),
            // RFC 9112, 3.2.4 would have OPTIONS mean the whole server here.
            _ if method == "OPTIONS" => return Err(HeadError::Form),
            _ => format!("/{path}"),
        };
        Ok((Kind::Forward, destination, path))
    })
}

/// A request inside a connection to `destination`: only a path, and `Host` must be that destination.
pub fn parse_inside(head: &[u8], destination: &Destination, inside: Inside) -> Result<Request, HeadError> {
    parse_request(head, inside, |method, target| {
        if method == "CONNECT" || !target.starts_with('/') {
            return Err(HeadError::Form);
        }
        Ok((Kind::Forward, destination.clone(), target.to_owned()))
    })
}

/// The answer to a request with this method.
pub fn parse_response(head: &[u8], method: &str) -> Result<Response, HeadError> {
    let mut space = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut parsed = httparse::Response::new(&mut space);
    complete(parsed.parse(head), head)?;
    let status = parsed.code.ok_or(HeadError::Truncated)?;
    if !(100..=599).contains(&status) {
        return Err(HeadError::Grammar("a status outside 100 to 599"));
    }
    if status == 101 {
        return Err(HeadError::Upgrade);
    }
    let version = version(parsed.version)?;
    let framing = framing(parsed.headers, version)?;
    let bodiless = method == "HEAD" || status < 200 || matches!(status, 204 | 304);
    let body = match framing {
        _ if bodiless => Length::Bytes(0),
        None => Length::UntilClose,
        Some(length) => length,
    };
    let declared = match framing {
        Some(Length::Bytes(bytes)) if status >= 200 && status != 204 => Some(bytes),
        _ => None,
    };
    let reason = parsed.reason.unwrap_or_default().to_owned();
    Ok(Response { status, reason, headers: end_to_end(parsed.headers), body, declared })
}

fn parse_request(
    head: &[u8],
    inside: Inside,
    read_target: impl FnOnce(&str, &str) -> Result<(Kind, Destination, String), HeadError>,
) -> Result<Request, HeadError> {
    if head.starts_with(HTTP2_PREFACE) {
        return Err(HeadError::Http2);
    }
    // httparse skips empty lines before a request; here the first byte belongs to the method.
    if !head.first().is_some_and(u8::is_ascii_alphabetic) {
        return Err(HeadError::Grammar("the first byte is no method's"));
    }
    let mut space = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut parsed = httparse::Request::new(&mut space);
    complete(parsed.parse(head), head)?;
    let (method, target) = parsed.method.zip(parsed.path).ok_or(HeadError::Truncated)?;
    if !target.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'#' | b'\\')) {
        return Err(HeadError::Target);
    }
    let version = version(parsed.version)?;
    let (kind, destination, path) = read_target(method, target)?;
    // CONNECT has no scheme and so no port of its own to leave out; clients leave out the target's.
    let default = if kind == Kind::Connect { Some(destination.port) } else { default_port(inside) };
    host_agrees(parsed.headers, default, &destination, version)?;
    let body = framing(parsed.headers, version)?.unwrap_or(Length::Bytes(0));
    if kind == Kind::Connect && body != Length::Bytes(0) {
        return Err(HeadError::Length);
    }
    if fields(parsed.headers, "expect").any(|value| !value.eq_ignore_ascii_case(b"100-continue")) {
        return Err(HeadError::Expect);
    }
    let says_close = |name| {
        fields(parsed.headers, name).flat_map(tokens).any(|token| token.eq_ignore_ascii_case(b"close"))
    };
    let keep_alive =
        version == Version::Http11 && !says_close("connection") && !says_close("proxy-connection");
    let headers = end_to_end(parsed.headers);
    let method = method.to_owned();
    Ok(Request { kind, destination, inside, method, path, version, headers, body, keep_alive })
}

fn complete(status: httparse::Result<usize>, head: &[u8]) -> Result<(), HeadError> {
    match status {
        Ok(httparse::Status::Complete(length)) if length == head.len() => Ok(()),
        Ok(_) => Err(HeadError::Truncated),
        Err(httparse::Error::TooManyHeaders) => Err(HeadError::TooLarge),
        Err(httparse::Error::HeaderName) => {
            Err(HeadError::Grammar("a field name is wrong, or a line is folded"))
        }
        Err(httparse::Error::HeaderValue) => Err(HeadError::Grammar("a field value is wrong")),
        Err(httparse::Error::Version) => Err(HeadError::Grammar("the version is neither 1.0 nor 1.1")),
        Err(_) => Err(HeadError::Grammar("the first line is wrong")),
    }
}

fn version(minor: Option<u8>) -> Result<Version, HeadError> {
    match minor {
        Some(0) => Ok(Version::Http10),
        Some(1) => Ok(Version::Http11),
        _ => Err(HeadError::Grammar("the version is neither 1.0 nor 1.1")),
    }
}

fn fields<'a>(headers: &'a [httparse::Header<'a>], name: &'a str) -> impl Iterator<Item = &'a [u8]> {
    headers.iter().filter(move |header| header.name.eq_ignore_ascii_case(name)).map(|header| header.value)
}

fn tokens(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii)
}

/// One `Host`, and the same host and port as the target. Only HTTP/1.0 may leave it out (RFC 9112, 3.2).
fn host_agrees(
    headers: &[httparse::Header<'_>],
    default: Option<NonZeroU16>,
    destination: &Destination,
    version: Version,
) -> Result<(), HeadError> {
    let mut hosts = fields(headers, "host");
    let host = match (hosts.next(), hosts.next()) {
        (Some(_), Some(_)) => return Err(HeadError::HostTwice),
        (None, _) if version == Version::Http10 => return Ok(()),
        (None, _) => return Err(HeadError::HostMissing),
        (Some(host), None) => std::str::from_utf8(host).map_err(|_| HeadError::HostDiffers)?,
    };
    match Destination::parse(host, default) {
        Ok(named) if named == *destination => Ok(()),
        _ => Err(HeadError::HostDiffers),
    }
}

/// The port of `http` and `https` (RFC 9110, 4.2).
fn default_port(inside: Inside) -> Option<NonZeroU16> {
    NonZeroU16::new(match inside {
        Inside::Clear => 80,
        Inside::Tls => 443,
    })
}

/// What the head says about the body; nothing, if it says nothing.
fn framing(headers: &[httparse::Header<'_>], version: Version) -> Result<Option<Length>, HeadError> {
    let mut lengths = fields(headers, "content-length");
    let mut codings = fields(headers, "transfer-encoding");
    let (length, coding) = (lengths.next(), codings.next());
    if lengths.next().is_some() || length.is_some() && coding.is_some() {
        return Err(HeadError::Length);
    }
    if let Some(coding) = coding {
        let plain = coding.eq_ignore_ascii_case(b"chunked") && codings.next().is_none();
        let good = plain && version == Version::Http11;
        return if good { Ok(Some(Length::Chunked)) } else { Err(HeadError::TransferEncoding) };
    }
    let Some(digits) = length else { return Ok(None) };
    // Rust's own reader would take a sign.
    let plain = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    let number = std::str::from_utf8(digits).ok().filter(|_| plain).and_then(|text| text.parse().ok());
    number.map(|bytes| Some(Length::Bytes(bytes))).ok_or(HeadError::Length)
}

/// Fields that belong to one connection (RFC 9110, 7.6.1), and those that are written anew.
const NOT_PASSED_ON: &[&str] = &[
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authentication-info",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

fn end_to_end(headers: &[httparse::Header<'_>]) -> Vec<Header> {
    let named: Vec<&[u8]> = fields(headers, "connection").flat_map(tokens).collect();
    headers
        .iter()
        .filter(|header| !NOT_PASSED_ON.iter().any(|name| header.name.eq_ignore_ascii_case(name)))
        .filter(|header| !named.iter().any(|name| header.name.as_bytes().eq_ignore_ascii_case(name)))
        .map(|header| Header { name: header.name.to_owned(), value: header.value.to_vec() })
        .collect()
}

impl Request {
    /// The head as the host gets it. The connection ends with the answer, so no second request can follow it.
    pub fn to_host(&self) -> Vec<u8> {
        let mut head = format!("{} {} HTTP/1.1\r\n", self.method, self.path).into_bytes();
        let host = if Some(self.destination.port) == default_port(self.inside) {
            self.destination.host.to_string()
        } else {
            self.destination.to_string()
        };
        field(&mut head, "Host", host.as_bytes());
        write_fields(&mut head, &self.headers);
        match self.body {
            Length::Chunked => field(&mut head, "Transfer-Encoding", b"chunked"),
            // RFC 9110, 8.6: methods that expect content say so when there is none.
            Length::Bytes(bytes) if bytes > 0 || matches!(self.method.as_str(), "POST" | "PUT" | "PATCH") => {
                field(&mut head, "Content-Length", bytes.to_string().as_bytes());
            }
            _ => {}
        }
        field(&mut head, "Connection", b"close");
        head.extend_from_slice(b"\r\n");
        head
    }
}

impl Response {
    /// The head as the agent gets it. Whoever does not know chunks gets a body that ends with the connection.
    pub fn to_agent(&self, keep_alive: bool, version: Version) -> Vec<u8> {
        let mut head = format!("HTTP/1.1 {} {}\r\n", self.status, self.reason).into_bytes();
        write_fields(&mut head, &self.headers);
        match (self.body, self.declared) {
            (Length::Chunked, _) if version == Version::Http11 => {
                field(&mut head, "Transfer-Encoding", b"chunked")
            }
            (_, Some(bytes)) => field(&mut head, "Content-Length", bytes.to_string().as_bytes()),
            _ => {}
        }
        if self.status >= 200 {
            field(&mut head, "Connection", if keep_alive { b"keep-alive" } else { b"close" });
        }
        head.extend_from_slice(b"\r\n");
        head
    }
}

fn write_fields(head: &mut Vec<u8>, headers: &[Header]) {
    for header in headers {
        field(head, &header.name, &header.value);
    }
}

fn field(head: &mut Vec<u8>, name: &str, value: &[u8]) {
    head.extend_from_slice(name.as_bytes());
    head.extend_from_slice(b": ");
    head.extend_from_slice(value);
    head.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests;
