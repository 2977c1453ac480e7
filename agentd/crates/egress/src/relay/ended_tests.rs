//! TLS that is ended: real handshakes on both sides, with memory between.

use super::tests::{Scene, end, expect, rest, scene_ending, verdict};
use super::*;
use crate::authority::{Authority, Stored};
use crate::hello::HelloError;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

const RULES: &str = r#"[
    {"host": "api.example.org", "methods": ["GET", "POST"], "paths": ["/v1/*"],
     "secret": {"name": "mail", "header": "authorization", "template": "Bearer {}"}},
    {"host": "plain.example.org", "methods": ["GET"]},
    {"host": "*.example.net", "paths": ["/a"]}]"#;
pub(super) const SECRET: &str = "canary-7f3a9c-secret";

pub(super) struct Ends {
    scene: Scene,
    /// What the agent trusts.
    agent: TlsConnector,
    own: Arc<Authority>,
    /// Who issues the hosts' own certificates.
    hosts: Authority,
}

fn connector(root: &Authority) -> TlsConnector {
    offering(root, &[])
}

/// With these protocols in its handshake.
fn offering(root: &Authority, protocols: &[&str]) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(root.certificate().clone()).unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    TlsConnector::from(Arc::new(config))
}

fn ends() -> Ends {
    let own = Arc::new(Authority::open(&Stored::fresh().unwrap()).unwrap());
    let hosts = Authority::open(&Stored::fresh().unwrap()).unwrap();
    let mut public = RootCertStore::empty();
    public.add(hosts.certificate().clone()).unwrap();
    let ending = Ending::new(Arc::clone(&own), &public, Vec::new()).unwrap();
    let secrets = HashMap::from([(0, Secret::new(SECRET.as_bytes().to_vec()).unwrap())]);
    Ends { scene: scene_ending(RULES, ending, secrets), agent: connector(&own), own, hosts }
}

/// With these checks replaced by "allow".
pub(super) fn ends_without(off: &'static [super::checks::Check]) -> Ends {
    let ends = ends();
    Ends { scene: ends.scene.without(off), ..ends }
}

impl Ends {
    pub(super) fn dialled(&self) -> Vec<String> {
        self.scene.dialled()
    }

    /// TLS with what answers for `name`, through a CONNECT to `host`.
    pub(super) async fn tls(&self, host: &str, name: &str) -> io::Result<TlsStream<DuplexStream>> {
        let stream = self.scene.connected(&format!("{host}:443")).await;
        self.agent.connect(ServerName::try_from(name.to_owned()).unwrap(), stream).await
    }

    /// Sends a request, lets the host answer, and gives what each side has seen.
    pub(super) async fn exchange(&mut self, request: &str, answer: &str) -> (String, String) {
        self.exchange_with("api.example.org", request, answer).await
    }

    async fn exchange_with(&mut self, name: &str, request: &str, answer: &str) -> (String, String) {
        let mut client = self.tls(name, name).await.unwrap();
        client.write_all(request.as_bytes()).await.unwrap();
        let host = self.scene.host().await;
        let config = self.hosts.serving(&Host::parse(name).unwrap()).unwrap();
        let mut host = TlsAcceptor::from(config).accept(host).await.unwrap();
        let asked = read_head(&mut host).await;
        host.write_all(answer.as_bytes()).await.unwrap();
        host.shutdown().await.unwrap();
        client.shutdown().await.unwrap();
        let mut seen = Vec::new();
        // The proxy closes when the agent has.
        let _ = client.read_to_end(&mut seen).await;
        (asked, String::from_utf8_lossy(&seen).into_owned())
    }
}

async fn read_head<S: AsyncRead + Unpin>(stream: &mut S) -> String {
    let mut text = Vec::new();
    while !text.ends_with(b"\r\n\r\n") {
        text.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(text).unwrap()
}

#[tokio::test]
async fn the_agent_never_sees_the_secret_that_the_host_gets() {
    let mut ends = ends();
    let (asked, seen) = ends
        .exchange(
            "POST /v1/messages?q=1 HTTP/1.1\r\nHost: api.example.org\r\nAuthorization: Bearer mine\r\n\
             Accept-Encoding: gzip\r\nRange: bytes=0-3\r\nContent-Length: 0\r\n\r\n",
            &format!(
                "HTTP/1.1 401 {SECRET}\r\nX-Echo: Bearer {SECRET}\r\nContent-Length: {}\r\n\r\nyou sent {SECRET}, {SECRET}",
                "you sent , ".len() + 2 * SECRET.len()
            ),
        )
        .await;
    assert_eq!(
        asked,
        format!(
            "POST /v1/messages?q=1 HTTP/1.1\r\nHost: api.example.org\r\nauthorization: Bearer {SECRET}\r\n\
             Accept-Encoding: identity\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
    );
    assert!(!seen.contains(SECRET) && !seen.contains("canary"), "{seen}");
    let stars = "*".repeat(SECRET.len());
    assert!(seen.starts_with(&format!("HTTP/1.1 401 {stars}\r\nX-Echo: Bearer {stars}\r\n")), "{seen}");
    assert!(seen.ends_with(&format!("\r\n\r\nyou sent {stars}, {stars}")), "{seen}");
    let events = ends.scene.events(2).await;
    assert_eq!(verdict(&events[0]), Ok(0));
    assert_eq!(end(&events[1]).0, End::Finished);
    assert!(!format!("{events:?}").contains("canary"), "nor does the audit");
}

#[tokio::test]
async fn a_secret_in_pieces_of_a_stream_is_found() {
    let mut ends = ends();
    let (head, tail) = SECRET.split_at(9);
    let answer = format!(
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata:\r\n9\r\n{head}\r\n{:x}\r\n{tail}\r\n0\r\n\r\n",
        tail.len()
    );
    let (_, seen) = ends.exchange("GET /v1/a HTTP/1.1\r\nHost: api.example.org\r\n\r\n", &answer).await;
    assert!(!seen.contains("canary") && seen.contains("data:"), "{seen}");
    assert_eq!(seen.matches('*').count(), SECRET.len(), "{seen}");
}

#[tokio::test]
async fn an_encoded_secret_is_found_in_fields_and_across_chunks() {
    use base64::Engine;
    let mut ends = ends();
    let inner = base64::engine::general_purpose::STANDARD.encode(format!("user:{SECRET}"));
    let escaped: String = SECRET.bytes().map(|byte| format!("\\u{byte:04x}")).collect();
    let percent: String = SECRET.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let mut chunks = String::new();
    for piece in format!("{{\"a\": \"{escaped}\", \"b\": \"{inner}\"}}").as_bytes().chunks(5) {
        chunks.push_str(&format!("{:x}\r\n{}\r\n", piece.len(), String::from_utf8_lossy(piece)));
    }
    let answer = format!(
        "HTTP/1.1 302 Found\r\nLocation: https://elsewhere.example/?key={percent}\r\n\
         WWW-Authenticate: Basic {inner}\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}0\r\n\r\n"
    );
    let (_, seen) = ends.exchange("GET /v1/a HTTP/1.1\r\nHost: api.example.org\r\n\r\n", &answer).await;
    let stars = |length: usize| "*".repeat(length);
    assert!(seen.contains(&format!("?key={}\r\n", stars(percent.len()))), "{seen}");
    // The letters of `user:` say nothing of the secret.
    assert!(seen.contains("Basic dXNlcj*"), "{seen}");
    let starred = seen.matches('*').count();
    assert!(starred >= percent.len() + escaped.len() + 2 * 4 * SECRET.len() / 3, "{starred}: {seen}");
}

#[tokio::test]
async fn an_answer_that_cannot_be_looked_into_is_refused_and_recorded() {
    for coding in ["gzip", "br", "zstd", "identity, gzip"] {
        let mut ends = ends();
        let answer =
            format!("HTTP/1.1 200 OK\r\nContent-Encoding: {coding}\r\nContent-Length: 4\r\n\r\n\x1f\u{8}xy");
        let (asked, seen) = ends
            .exchange(
                "GET /v1/a HTTP/1.1\r\nHost: api.example.org\r\nAccept-Encoding: gzip, br\r\n\r\n",
                &answer,
            )
            .await;
        assert!(asked.contains("Accept-Encoding: identity\r\n") && !asked.contains("br"), "{asked}");
        assert!(seen.starts_with("HTTP/1.1 502") && seen.contains("egress_answer_coded"), "{seen}");
        assert!(seen.contains(&format!("`{coding}`")) && !seen.contains("xy"), "{seen}");
        let events = ends.scene.events(2).await;
        assert_eq!(end(&events[1]).0, End::Refused(Refusal::Coded { coding: coding.to_owned() }));
    }
}

#[tokio::test]
async fn without_a_secret_an_answer_may_be_compressed() {
    let mut ends = ends();
    let answer = "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd";
    let request = "GET / HTTP/1.1\r\nHost: plain.example.org\r\nAccept-Encoding: gzip\r\n\r\n";
    let (asked, seen) = ends.exchange_with("plain.example.org", request, answer).await;
    assert!(asked.contains("Accept-Encoding: gzip\r\n"), "{asked}");
    assert!(
        seen.starts_with("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n") && seen.ends_with("abcd"),
        "{seen}"
    );
}

#[tokio::test]
async fn methods_and_paths_are_held_inside_tls_and_nothing_is_dialled_for_what_is_refused() {
    let ends = ends();
    for (request, status, code) in [
        ("DELETE /v1/a HTTP/1.1\r\nHost: api.example.org\r\n\r\n", 403, "egress_method"),
        ("TRACE /v1/a HTTP/1.1\r\nHost: api.example.org\r\n\r\n", 403, "egress_method"),
        ("GET /v2/a HTTP/1.1\r\nHost: api.example.org\r\n\r\n", 403, "egress_path"),
        ("GET /v1/../v2 HTTP/1.1\r\nHost: api.example.org\r\n\r\n", 403, "egress_path_ambiguous"),
        ("GET /v1/%2e%2e/v2 HTTP/1.1\r\nHost: api.example.org\r\n\r\n", 403, "egress_path_ambiguous"),
        // Another host inside than the handshake named: the front of a shared server would pass it on.
        ("GET /v1/a HTTP/1.1\r\nHost: evil.example.org\r\n\r\n", 400, "egress_request"),
        (
            "GET /v1/a HTTP/1.1\r\nHost: api.example.org\r\nHost: evil.example.org\r\n\r\n",
            400,
            "egress_request",
        ),
        ("GET http://evil.example.org/ HTTP/1.1\r\nHost: evil.example.org\r\n\r\n", 400, "egress_request"),
        (
            "CONNECT evil.example.org:443 HTTP/1.1\r\nHost: evil.example.org:443\r\n\r\n",
            400,
            "egress_request",
        ),
        (
            "POST /v1/a HTTP/1.1\r\nHost: api.example.org\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
            400,
            "egress_request",
        ),
    ] {
        let mut client = ends.tls("api.example.org", "api.example.org").await.unwrap();
        client.write_all(request.as_bytes()).await.unwrap();
        let mut seen = String::new();
        let _ = client.read_to_string(&mut seen).await;
        assert!(seen.starts_with(&format!("HTTP/1.1 {status} ")) && seen.contains(code), "{request}: {seen}");
    }
    assert_eq!(ends.scene.dialled(), Vec::<String>::new());
    assert_eq!(ends.scene.resolved(), Vec::<String>::new());
    assert!(ends.scene.events(10).await.iter().all(|event| verdict(event).is_err()));
}

#[tokio::test]
async fn a_handshake_for_another_name_is_refused_before_any_answer() {
    let ends = ends();
    assert!(ends.tls("api.example.org", "plain.example.org").await.is_err());
    let events = ends.scene.events(1).await;
    assert!(matches!(verdict(&events[0]), Err(Refusal::Hello { error: HelloError::Differs(_), .. })));
    // And a name of a star's rule gets a certificate of its own.
    ends.tls("b.example.net", "b.example.net").await.unwrap();
}

#[tokio::test]
async fn a_host_that_cannot_be_verified_gets_no_request() {
    let mut ends = ends();
    let mut client = ends.tls("api.example.org", "api.example.org").await.unwrap();
    client.write_all(b"GET /v1/a HTTP/1.1\r\nHost: api.example.org\r\n\r\n").await.unwrap();
    let host = ends.scene.host().await;
    // Somebody in between, with a certificate of an authority that nobody trusts.
    let other = Authority::open(&Stored::fresh().unwrap()).unwrap();
    let config = other.serving(&Host::parse("api.example.org").unwrap()).unwrap();
    assert!(TlsAcceptor::from(config).accept(host).await.is_err());
    let mut seen = String::new();
    let _ = client.read_to_string(&mut seen).await;
    assert!(seen.starts_with("HTTP/1.1 502") && seen.contains("egress_tls_host"), "{seen}");
    let events = ends.scene.events(2).await;
    assert!(matches!(end(&events[1]), (End::Refused(Refusal::HostTls { .. }), 0, 0)), "{events:?}");
}

#[tokio::test]
async fn the_right_authority_for_another_name_is_not_enough() {
    let mut ends = ends();
    let mut client = ends.tls("api.example.org", "api.example.org").await.unwrap();
    client.write_all(b"GET /v1/a HTTP/1.1\r\nHost: api.example.org\r\n\r\n").await.unwrap();
    let host = ends.scene.host().await;
    let config = ends.hosts.serving(&Host::parse("evil.example.org").unwrap()).unwrap();
    assert!(TlsAcceptor::from(config).accept(host).await.is_err());
    let mut seen = String::new();
    let _ = client.read_to_string(&mut seen).await;
    assert!(seen.contains("egress_tls_host"), "{seen}");
}

#[tokio::test]
async fn without_its_secret_a_rule_lets_no_request_out() {
    let ends = ends();
    let mut changed = Policy::clone(&ends.scene.policy());
    changed.secrets.clear();
    ends.scene.set(changed);
    let mut client = ends.tls("api.example.org", "api.example.org").await.unwrap();
    client.write_all(b"GET /v1/a HTTP/1.1\r\nHost: api.example.org\r\n\r\n").await.unwrap();
    let mut seen = String::new();
    let _ = client.read_to_string(&mut seen).await;
    assert!(seen.starts_with("HTTP/1.1 403") && seen.contains("agentctl secret set mail"), "{seen}");
    assert_eq!(ends.scene.dialled(), Vec::<String>::new());
}

#[tokio::test]
async fn clear_bytes_are_no_handshake() {
    let ends = ends();
    let mut client = ends.scene.connected("api.example.org:443").await;
    client.write_all(b"GET /v1/a HTTP/1.1\r\nHost: api.example.org\r\n\r\n").await.unwrap();
    expect(&mut client, &crate::hello::ALERT_ACCESS_DENIED).await;
    assert_eq!(rest(&mut client).await, "");
    assert_eq!(ends.scene.dialled(), Vec::<String>::new());
}

#[tokio::test]
async fn a_client_that_knows_http2_as_well_gets_http1() {
    let mut ends = ends();
    ends.agent = offering(&ends.own, &["h2", "http/1.1"]);
    let client = ends.tls("plain.example.org", "plain.example.org").await.unwrap();
    assert_eq!(client.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    drop(client);
    let answer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    let request = "GET / HTTP/1.1\r\nHost: plain.example.org\r\n\r\n";
    let (_, seen) = ends.exchange_with("plain.example.org", request, answer).await;
    assert!(seen.starts_with("HTTP/1.1 200 OK"), "{seen}");
}

#[tokio::test]
async fn a_client_that_insists_on_http2_hears_that_it_is_not_spoken() {
    let mut ends = ends();
    ends.agent = offering(&ends.own, &["h2"]);
    let error = ends.tls("plain.example.org", "plain.example.org").await.unwrap_err();
    assert!(error.to_string().contains("NoApplicationProtocol"), "{error}");
    let events = ends.scene.events(1).await;
    let Err(refusal) = verdict(&events[0]) else { panic!("{events:?}") };
    assert!(matches!(refusal, Refusal::Hello { error: HelloError::Protocol, .. }), "{refusal:?}");
    assert_eq!(refusal.report().code, "egress_http2");
    // Without a word of it in the handshake (prior knowledge).
    ends.agent = connector(&ends.own);
    let mut client = ends.tls("plain.example.org", "plain.example.org").await.unwrap();
    client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut seen = String::new();
    let _ = client.read_to_string(&mut seen).await;
    assert!(seen.starts_with("HTTP/1.1 505 HTTP Version Not Supported\r\n"), "{seen}");
    assert!(seen.contains("egress_http2") && seen.contains("speak HTTP/1.1"), "{seen}");
    let events = ends.scene.events(1).await;
    assert_eq!(verdict(&events[0]), Err(Refusal::Head(crate::http1::HeadError::Http2)));
    assert_eq!(ends.scene.dialled(), Vec::<String>::new());
}
