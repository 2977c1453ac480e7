//! How does a request reach the appliance?
//!
//! One HTTP/1.1 connection over TLS per request: a command makes one or two. The server is checked before a byte
//! of HTTP is sent (see `pin`).

use crate::pin::{Demand, Pin, Verifier};
use agentd_domain::fault::Report;
use bytes::Bytes;
use futures::{Stream, StreamExt};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyDataStream, BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::crypto::ring;
use rustls::pki_types::ServerName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

/// An emulated appliance needs seconds for a handshake.
const CONNECT: Duration = Duration::from_secs(30);
/// For the head of an ordinary answer; starting and stopping agents takes its time.
const ANSWER: Duration = Duration::from_secs(120);
const DEFAULT_PORT: u16 = agentd_domain::paths::HTTPS_PORT;

pub type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Where an appliance is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// A name, or an address without brackets.
    name: String,
    port: u16,
}

impl Default for Host {
    fn default() -> Self {
        Self { name: "127.0.0.1".to_owned(), port: DEFAULT_PORT }
    }
}

impl FromStr for Host {
    type Err = String;
    /// `https://box:8443`, `box`, `192.0.2.7:8443`, `[fd00::1]`; the port is 8443 when absent.
    fn from_str(text: &str) -> Result<Self, String> {
        let bad =
            || format!("`{text}` is not the address of an appliance; write https://127.0.0.1:8443 or a name");
        if text.starts_with("http://") {
            return Err(format!("`{text}` is not encrypted; write https://"));
        }
        let bare = text.strip_prefix("https://").unwrap_or(text).trim_end_matches('/');
        let uri: http::uri::Authority = bare.parse().map_err(|_| bad())?;
        let name = uri.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if ServerName::try_from(name.as_str()).is_err() || bare.contains('@') {
            return Err(bad());
        }
        // What follows the name; `Uri` ignores a port that is no number.
        let port = match bare.strip_prefix(uri.host()) {
            Some("") => DEFAULT_PORT,
            Some(rest) => rest.strip_prefix(':').and_then(|port| port.parse().ok()).ok_or_else(bad)?,
            None => return Err(bad()),
        };
        Ok(Self { name, port })
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "https://{}", self.authority())
    }
}

impl Host {
    fn authority(&self) -> String {
        if self.name.contains(':') {
            format!("[{}]:{}", self.name, self.port)
        } else {
            format!("{}:{}", self.name, self.port)
        }
    }
}

/// A known appliance, signed in or not.
pub struct Client {
    pub host: Host,
    pub pin: Pin,
    pub token: Option<String>,
}

/// The fingerprint that the server at this address shows. Nothing is sent to it.
pub async fn fingerprint(host: &Host) -> Result<Pin, Report> {
    let verifier = Verifier::new(Demand::Any);
    connect(host, &verifier).await?;
    verifier.seen().ok_or_else(|| unreachable(host, "it showed no certificate"))
}

impl Client {
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Report> {
        parse(self.send(Method::GET, path, None, empty()).await?).await
    }

    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, Report> {
        parse(self.post_json(path, body).await?).await
    }

    /// For answers without content.
    pub async fn order(&self, method: Method, path: &str) -> Result<(), Report> {
        self.send(method, path, None, empty()).await.map(drop)
    }

    pub async fn post_json(&self, path: &str, body: &impl Serialize) -> Result<Response<Incoming>, Report> {
        let bytes = serde_json::to_vec(body).map_err(|e| unreadable(&e.to_string()))?;
        self.send(Method::POST, path, Some("application/json"), full(bytes)).await
    }

    pub async fn send(
        &self,
        method: Method,
        path: &str,
        content_type: Option<&str>,
        body: Body,
    ) -> Result<Response<Incoming>, Report> {
        let answer = timeout(ANSWER, self.send_slowly(method, path, content_type, body)).await;
        answer
            .unwrap_or_else(|_| Err(broken(&self.host, &format!("no answer within {} s", ANSWER.as_secs()))))
    }

    /// As [`Self::send`], for bodies that take longer to send than an answer may take.
    pub async fn send_slowly(
        &self,
        method: Method,
        path: &str,
        content_type: Option<&str>,
        body: Body,
    ) -> Result<Response<Incoming>, Report> {
        let mut request =
            Request::builder().method(method).uri(path).header(header::HOST, self.host.authority());
        if let Some(content_type) = content_type {
            request = request.header(header::CONTENT_TYPE, content_type);
        }
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request.body(body).map_err(|e| unreadable(&e.to_string()))?;
        let verifier = Verifier::new(Demand::Authority(self.pin));
        let mut sender = connect(&self.host, &verifier).await?;
        let answer = sender.send_request(request).await.map_err(|e| broken(&self.host, &with_sources(&e)))?;
        if answer.status().is_success() { Ok(answer) } else { Err(refusal(answer).await) }
    }
}

/// Each JSON value of an NDJSON answer, as it comes. An error from `each` ends it.
pub async fn lines<T: DeserializeOwned>(
    answer: Response<Incoming>,
    mut each: impl FnMut(T, &str) -> Result<(), Report>,
) -> Result<(), Report> {
    let mut pieces = BodyDataStream::new(answer.into_body());
    let mut rest = Vec::new();
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|e| connection_lost(&with_sources(&e)))?;
        rest.extend_from_slice(&piece);
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end();
            if !line.is_empty() {
                each(serde_json::from_str(line).map_err(|e| unreadable(&e.to_string()))?, line)?;
            }
        }
    }
    Ok(())
}

/// The code of the error that a broken connection gives: what may be tried again.
pub const CONNECTION_LOST: &str = "connection_lost";

pub fn connection_lost(why: &str) -> Report {
    Report::environment(
        CONNECTION_LOST,
        "the answer is not whole",
        why,
        "try again; if the appliance has restarted, sign in first: `agentctl login`",
    )
}

pub fn empty() -> Body {
    full(Vec::new())
}

pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

pub fn streamed(pieces: impl Stream<Item = io::Result<Bytes>> + Send + 'static) -> Body {
    BodyExt::boxed_unsync(StreamBody::new(pieces.map(|piece| piece.map(Frame::data))))
}

async fn connect(host: &Host, verifier: &Arc<Verifier>) -> Result<SendRequest<Body>, Report> {
    let io = timeout(CONNECT, handshake(host, verifier)).await;
    let io = match io {
        Ok(Ok(io)) => io,
        Ok(Err(error)) => return Err(tls_or_network(host, verifier, &error)),
        Err(_) => return Err(unreachable(host, &format!("no connection within {} s", CONNECT.as_secs()))),
    };
    let (sender, connection) = http1::handshake(io).await.map_err(|e| broken(host, &with_sources(&e)))?;
    // Ends with the connection; what it would report, the request reports.
    tokio::spawn(connection);
    Ok(sender)
}

async fn handshake(
    host: &Host,
    verifier: &Arc<Verifier>,
) -> io::Result<TokioIo<tokio_rustls::client::TlsStream<TcpStream>>> {
    let stream = TcpStream::connect((host.name.as_str(), host.port)).await?;
    stream.set_nodelay(true)?;
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::clone(verifier) as _)
        .with_no_client_auth();
    let name = ServerName::try_from(host.name.clone()).map_err(io::Error::other)?;
    TlsConnector::from(Arc::new(config)).connect(name, stream).await.map(TokioIo::new)
}

pub async fn parse<T: DeserializeOwned>(answer: Response<Incoming>) -> Result<T, Report> {
    let bytes =
        answer.into_body().collect().await.map_err(|e| connection_lost(&with_sources(&e)))?.to_bytes();
    serde_json::from_slice(&bytes).map_err(|e| unreadable(&e.to_string()))
}

async fn refusal(answer: Response<Incoming>) -> Report {
    let status = answer.status();
    match parse::<Report>(answer).await {
        Ok(report) => report,
        Err(_) => not_an_appliance(status),
    }
}

fn not_an_appliance(status: StatusCode) -> Report {
    Report::environment(
        "answer_unreadable",
        "the request failed",
        format!("the answer was {status} without a report"),
        "use the agentctl of the appliance's version: `agentctl --version`",
    )
}

fn tls_or_network(host: &Host, verifier: &Verifier, error: &io::Error) -> Report {
    match (verifier.demand(), verifier.seen()) {
        (Demand::Authority(pin), Some(seen)) if seen != pin => Report::caller(
            "wrong_authority",
            format!("nothing was sent to {host}"),
            format!("its authority is {seen}, and the pinned one is {pin}"),
            "compare with the fingerprint on the appliance's screen; if it was set up anew, `agentctl login --fingerprint` takes the new one; otherwise something stands between you and it",
        ),
        _ => unreachable(host, &with_sources(error)),
    }
}

fn unreachable(host: &Host, why: &str) -> Report {
    Report::environment(
        "appliance_unreachable",
        format!("{host} was not reached"),
        why,
        "check that the appliance runs and that the address and port are the ones on its screen; set them with `--host`",
    )
}

fn broken(host: &Host, why: &str) -> Report {
    let mut report = connection_lost(why);
    report.what = format!("{host} did not answer");
    report
}

fn unreadable(why: &str) -> Report {
    Report::environment(
        "answer_unreadable",
        "the answer was not understood",
        why,
        "use the agentctl of the appliance's version: `agentctl --version`",
    )
}

fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn addresses_as_people_write_them() {
        for (text, shown) in [
            ("https://127.0.0.1:8443", "https://127.0.0.1:8443"),
            ("https://127.0.0.1:8443/", "https://127.0.0.1:8443"),
            ("box", "https://box:8443"),
            ("agentd-os.local:9000", "https://agentd-os.local:9000"),
            ("[fd00::1]", "https://[fd00::1]:8443"),
            ("https://[fd00::1]:444", "https://[fd00::1]:444"),
        ] {
            let host: Host = text.parse().expect(text);
            assert_eq!(host.to_string(), shown);
            assert_eq!(host.to_string().parse(), Ok(host), "what is shown can be typed");
        }
        for wrong in
            ["", "http://box", "https://", "box:port", "box:", "box:70000", "user@box", "box/path", "a b"]
        {
            assert!(wrong.parse::<Host>().is_err(), "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_is_a_panic(text in "\\PC{0,40}") {
            let _ = text.parse::<Host>();
        }
    }
}
