//! The port as strangers meet it: real sockets on loopback, real TLS.

mod fake;

use agentd_console::{Auth, Authority, Limits, boot_clock, router, serve_tls_with};
use bytes::Bytes;
use fake::{Fake, Files, NOW_UNIX_MS};
use http_body_util::{BodyExt, Empty};
use hyper::Request;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;

/// Nothing here takes this long; what does hangs.
const DEADLINE: Duration = Duration::from_secs(60);

struct Scene {
    address: SocketAddr,
    authority: Arc<Authority>,
    shutdown: CancellationToken,
    server: JoinHandle<()>,
    auth: Arc<Auth>,
    fake: Arc<Fake>,
}

impl Scene {
    async fn new(limits: Limits) -> Self {
        let files = Arc::new(Files::default());
        let auth = Arc::new(Auth::open(files.clone(), boot_clock()).expect("opens"));
        let authority = Arc::new(Authority::open(files).expect("made"));
        authority.refresh(&[], NOW_UNIX_MS / 1000).expect("issued");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        let shutdown = CancellationToken::new();
        let fake = Arc::new(Fake::default());
        let router = router(fake.clone(), auth.clone());
        let tls = authority.tls_config().expect("a configuration");
        let server = tokio::spawn(serve_tls_with(listener, tls, router, shutdown.clone(), limits));
        Self { address, authority, shutdown, server, auth, fake }
    }

    /// A client that trusts the authority as a browser would that has imported it.
    async fn connect(
        &self,
        name: &'static str,
        protocols: &[&[u8]],
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.certificate().clone()).expect("an authority");
        let mut config =
            ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .expect("versions")
                .with_root_certificates(roots)
                .with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|p| p.to_vec()).collect();
        let stream = TcpStream::connect(self.address).await?;
        let name = ServerName::try_from(name).expect("a name");
        TlsConnector::from(Arc::new(config)).connect(name, stream).await
    }

    async fn claim(&self) -> String {
        let code = self.auth.claim_code().expect("unclaimed");
        let claim = agentd_domain::api::Claim { code, password: "correct horse battery".into() };
        self.auth.claim(claim, "127.0.0.1".parse().expect("address")).await.expect("claimed").token
    }

    async fn end(self) {
        self.shutdown.cancel();
        timeout(DEADLINE, self.server).await.expect("the server ends").expect("without a panic");
    }
}

async fn raw(stream: &mut TlsStream<TcpStream>, request: &str) -> String {
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = Vec::new();
    timeout(DEADLINE, stream.read_to_end(&mut answer)).await.expect("an answer").expect("read");
    String::from_utf8_lossy(&answer).into_owned()
}

const HEALTH: &str = "GET /healthz HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n";

#[tokio::test]
async fn a_browser_that_trusts_the_authority_accepts_every_name() {
    let scene = Scene::new(Limits::default()).await;
    for name in ["localhost", "agentd-os.local", "127.0.0.1", "::1"] {
        let mut stream = scene.connect(name, &[b"http/1.1"]).await.unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(raw(&mut stream, HEALTH).await.starts_with("HTTP/1.1 200"));
    }
    scene.connect("example.org", &[b"http/1.1"]).await.expect_err("a name that is not ours");
    scene.end().await;
}

#[tokio::test]
async fn http2_when_the_client_offers_it() {
    let scene = Scene::new(Limits::default()).await;
    let stream = scene.connect("localhost", &[b"h2", b"http/1.1"]).await.expect("connected");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .expect("HTTP/2");
    let client = tokio::spawn(connection);
    let request = Request::get("https://localhost/healthz").body(Empty::<Bytes>::new()).expect("a request");
    let answer = sender.send_request(request).await.expect("an answer");
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["x-content-type-options"], "nosniff");
    answer.into_body().collect().await.expect("a body");
    scene.end().await;
    client.abort();
}

/// The whole body is sent before the answer is read, as simple clients do: the answer must not be lost to a
/// reset, and the server must not keep what it is sent.
#[tokio::test]
async fn the_refusal_of_100_mb_arrives() {
    let scene = Scene::new(Limits::default()).await;
    let mut stream = scene.connect("localhost", &[b"http/1.1"]).await.expect("connected");
    let head = "POST /api/v1/login HTTP/1.1\r\nHost: box\r\nContent-Type: application/json\r\nContent-Length: 100000000\r\n\r\n";
    stream.write_all(head.as_bytes()).await.expect("sent");
    let piece = vec![b' '; 1 << 20];
    let mut left = 100_000_000;
    while left > 0 {
        let count = piece.len().min(left);
        stream.write_all(&piece[..count]).await.expect("no reset while sending");
        left -= count;
    }
    let answer = raw(&mut stream, "").await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    assert!(answer.contains("too_large") && answer.contains("8 MiB"), "{answer}");
    scene.end().await;
}

/// The answer comes although nothing of the body was sent.
#[tokio::test]
async fn the_refusal_does_not_wait_for_the_body() {
    let scene = Scene::new(Limits::default()).await;
    let mut stream = scene.connect("localhost", &[b"http/1.1"]).await.expect("connected");
    let head = "POST /api/v1/login HTTP/1.1\r\nHost: box\r\nContent-Length: 100000000\r\n\r\n";
    stream.write_all(head.as_bytes()).await.expect("sent");
    let mut first = [0; 12];
    timeout(DEADLINE, stream.read_exact(&mut first)).await.expect("an answer").expect("read");
    assert_eq!(&first, b"HTTP/1.1 413");
    drop(stream);
    scene.end().await;
}

#[tokio::test]
async fn plain_http_is_told_what_to_do() {
    let scene = Scene::new(Limits::default()).await;
    let mut stream = TcpStream::connect(scene.address).await.expect("connected");
    stream.write_all(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n").await.expect("sent");
    stream.shutdown().await.expect("ended");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("read");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.1 400") && body.contains("https://"), "{answer}");
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{answer}");
    scene.end().await;
}

#[tokio::test]
async fn connections_that_say_nothing_are_let_go() {
    let limits =
        Limits { handshake: Duration::from_millis(50), head: Duration::from_millis(50), ..Limits::default() };
    let scene = Scene::new(limits).await;
    let mut silent = TcpStream::connect(scene.address).await.expect("connected");
    let mut after_handshake = scene.connect("localhost", &[b"http/1.1"]).await.expect("connected");
    let mut nothing = Vec::new();
    timeout(DEADLINE, silent.read_to_end(&mut nothing)).await.expect("let go").expect("read");
    assert!(nothing.is_empty());
    let _ = timeout(DEADLINE, after_handshake.read_to_end(&mut nothing)).await.expect("let go");
    scene.end().await;
}

#[tokio::test]
async fn unused_http2_connections_are_let_go_and_open_streams_are_not() {
    let limits = Limits { idle: Duration::from_millis(50), ..Limits::default() };
    let scene = Scene::new(limits).await;
    let token = scene.claim().await;
    let connect = async || {
        let stream = scene.connect("localhost", &[b"h2"]).await.expect("connected");
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .expect("HTTP/2")
    };
    let (mut sender, connection) = connect().await;
    let streaming = tokio::spawn(connection);
    let request = Request::get("https://localhost/api/v1/agents/echo/logs?lines=1&follow=true")
        .header("authorization", format!("Bearer {token}"))
        .body(Empty::<Bytes>::new())
        .expect("a request");
    let mut answer = sender.send_request(request).await.expect("an answer");
    answer.frame().await.expect("a line").expect("no error");

    let (_unused_sender, unused) = connect().await;
    timeout(DEADLINE, unused).await.expect("let go").expect("in order");

    scene.fake.say_in_log("still here");
    let line = answer.frame().await.expect("a line").expect("no error");
    assert!(String::from_utf8_lossy(line.data_ref().expect("data")).contains("still here"));
    drop((answer, sender));
    let _ = timeout(DEADLINE, streaming).await.expect("let go once its stream has ended");
    scene.end().await;
}

#[tokio::test]
async fn one_client_cannot_take_every_place() {
    let limits = Limits { connections: 8, per_client: 2, ..Limits::default() };
    let scene = Scene::new(limits).await;
    let first = scene.connect("localhost", &[b"http/1.1"]).await.expect("connected");
    let _second = scene.connect("localhost", &[b"http/1.1"]).await.expect("connected");
    scene.connect("localhost", &[b"http/1.1"]).await.expect_err("the third is turned away");
    drop(first);
    // The place is free once the server has noticed: what is waited for is an event, not a time.
    let mut again = timeout(DEADLINE, async {
        loop {
            match scene.connect("localhost", &[b"http/1.1"]).await {
                Ok(stream) => return stream,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    })
    .await
    .expect("the place is free again");
    assert!(raw(&mut again, HEALTH).await.starts_with("HTTP/1.1 200"));
    scene.end().await;
}

#[tokio::test]
async fn shutdown_ends_streams_after_the_grace() {
    let limits = Limits { grace: Duration::from_millis(50), ..Limits::default() };
    let scene = Scene::new(limits).await;
    let token = scene.claim().await;
    let mut stream = scene.connect("localhost", &[b"http/1.1"]).await.expect("connected");
    let request = format!(
        "GET /api/v1/agents/echo/logs?follow=true HTTP/1.1\r\nHost: box\r\nAuthorization: Bearer {}\r\n\r\n",
        token
    );
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut first = [0; 12];
    stream.read_exact(&mut first).await.expect("read");
    assert_eq!(&first, b"HTTP/1.1 200");
    scene.end().await;
}

#[tokio::test]
async fn a_new_address_gets_into_the_certificate_without_a_restart() {
    let scene = Scene::new(Limits::default()).await;
    scene.connect("192.0.2.7", &[b"http/1.1"]).await.expect_err("not in the certificate yet");
    let address = "192.0.2.7".parse().expect("an address");
    assert!(scene.authority.refresh(&[address], NOW_UNIX_MS / 1000).expect("issued"));
    scene.connect("192.0.2.7", &[b"http/1.1"]).await.expect("in the certificate now");
    scene.end().await;
}

#[tokio::test]
async fn the_server_sends_its_authority_along() {
    let scene = Scene::new(Limits::default()).await;
    let stream = scene.connect("localhost", &[b"http/1.1"]).await.expect("connected");
    let chain: Vec<CertificateDer<'_>> = stream.get_ref().1.peer_certificates().expect("a chain").to_vec();
    assert_eq!(chain.len(), 2);
    assert_eq!(&chain[1], scene.authority.certificate());
    drop(stream);
    scene.end().await;
}
