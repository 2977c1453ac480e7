//! Real sockets on both sides: listeners in the place of a run's, and hosts on an address that the owner has granted.

use super::*;
use crate::clock;
use crate::store::Store;
use agentd_capability::token::RootKey;
use agentd_domain::audit::{Entry, Verdict};
use agentd_domain::net::Host;
use agentd_egress::authority::{Authority, Stored};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio_rustls::{TlsAcceptor, TlsConnector};

struct Scene {
    _root: tempfile::TempDir,
    places: Places,
    audit: Audit,
    agent: AgentId,
    proxy: SocketAddr,
    names: SocketAddr,
    over: CancellationToken,
}

/// An agent with these rules, and an owner who has granted 127.0.0.1 alone.
async fn scene(rules: &[String], host_authority: Option<&Authority>) -> Scene {
    scene_with(rules, host_authority, None).await
}

async fn scene_with(
    rules: &[String],
    host_authority: Option<&Authority>,
    bytes_per_day: Option<u64>,
) -> Scene {
    let (root, places, audit, egress) = opened(host_authority);
    let (agent, run) = (AgentId(clock::fresh_id()), RunId(clock::fresh_id()));
    let listen = || {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        (listener.local_addr().unwrap(), OwnedFd::from(listener))
    };
    let ((proxy, proxy_fd), (_, dns_tcp)) = (listen(), listen());
    let udp = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    udp.set_nonblocking(true).unwrap();
    let names = udp.local_addr().unwrap();
    let sockets = EgressSockets {
        rules: rules.to_vec(),
        bytes_per_day,
        proxy: proxy_fd,
        dns_udp: udp.into(),
        dns_tcp,
        captured: Vec::new(),
    };
    let over = CancellationToken::new();
    egress.serve(Run { agent, run, sockets, over: over.clone() });
    Scene { _root: root, places, audit, agent, proxy, names, over }
}

/// The egress of an owner who has granted 127.0.0.1 alone, and knows it by this authority's certificate.
pub(crate) fn opened(host_authority: Option<&Authority>) -> (tempfile::TempDir, Places, Audit, Egress) {
    let root = tempfile::tempdir().unwrap();
    let places = Places::below(root.path());
    for folder in [&places.state_agentd, &places.data, &places.run_agentd] {
        fs::create_dir_all(folder).unwrap();
    }
    let pem = host_authority
        .map(|authority| format!("authority = '''\n{}'''\n", authority::pem(authority.certificate())))
        .unwrap_or_default();
    let text = format!("[[egress.private]]\nhost = \"127.0.0.1\"\n{pem}");
    init_sys::twofile::TwoFile::new(&places.config).write(text.as_bytes()).unwrap();
    let audit = Audit::default();
    let db = Db::new(Store::open(&places.system_store()).unwrap());
    let tokens = Tokens::open(RootKey::from_secret(&[7; 32]).unwrap(), db.clone()).unwrap();
    let (granted, nerves) = (settings(&places), Nerves::new().0);
    let egress = Egress::open(&places, granted, audit.clone(), (db, tokens), nerves, &Board::starting());
    (root, places, audit, egress)
}

impl Scene {
    async fn proxy(&self) -> TcpStream {
        TcpStream::connect(self.proxy).await.unwrap()
    }

    async fn ask(&self, request: &str) -> String {
        let mut stream = self.proxy().await;
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// What was recorded, when something was that fits.
    async fn recorded(&self, fits: impl Fn(&Entry) -> bool) -> Vec<Entry> {
        let mut all = Vec::new();
        for _ in 0..200 {
            all.extend(self.audit.reported().into_iter().map(|(entry, _)| entry));
            if all.iter().any(&fits) {
                return all;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("nothing that fits among {all:#?}");
    }
}

/// A host that answers each connection with what it has read up to an empty line.
async fn echo_host() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(echo(stream));
        }
    });
    address
}

async fn tls_echo_host(authority: &Authority) -> SocketAddr {
    let config = authority.serving(&Host::parse("127.0.0.1").unwrap()).unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = TlsAcceptor::from(Arc::clone(&config));
            tokio::spawn(async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    echo(stream).await;
                }
            });
        }
    });
    address
}

async fn echo<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", head.len());
    let _ = stream.write_all(&[answer.as_bytes(), &head].concat()).await;
    let _ = stream.shutdown().await;
}

fn by_rule(entries: &[Entry], action: &str, verdict: Verdict) -> Option<Entry> {
    entries.iter().find(|entry| entry.action == action && entry.verdict == verdict).cloned()
}

#[tokio::test]
async fn a_granted_host_is_reached_through_each_door_and_another_one_through_none() {
    let host = echo_host().await;
    let (clear, other) = (echo_host().await, echo_host().await);
    let rules = [
        format!("http://127.0.0.1:{}", clear.port()),
        format!("tcp://10.99.99.99:{}", other.port()),
        format!("tcp://127.0.0.1:{}", host.port()),
    ];
    let scene = scene(&rules, None).await;
    let answer = scene
        .ask(&format!("GET http://{clear}/a?q=1 HTTP/1.1\r\nHost: {clear}\r\nConnection: close\r\n\r\n"))
        .await;
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.contains("GET /a?q=1 HTTP/1.1"), "{answer}");
    let mut tunnel = scene.proxy().await;
    let connect = format!("CONNECT {host} HTTP/1.1\r\nHost: {host}\r\n\r\nhello\r\n\r\n");
    tunnel.write_all(connect.as_bytes()).await.unwrap();
    let mut said = String::new();
    tunnel.read_to_string(&mut said).await.unwrap();
    assert!(said.contains("200 Connection established") && said.ends_with("hello\r\n\r\n"), "{said}");
    let mut socks = scene.proxy().await;
    let asked =
        [&[5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1][..], &host.port().to_be_bytes(), b"hello\r\n\r\n"].concat();
    socks.write_all(&asked).await.unwrap();
    let mut said = Vec::new();
    socks.read_to_end(&mut said).await.unwrap();
    assert_eq!(said.get(..4), Some(&[5, 0, 5, 0][..]));
    assert!(said.ends_with(b"hello\r\n\r\n"));
    // A rule names it, and the owner has not granted it.
    let refused = scene
        .ask(&format!("CONNECT 10.99.99.99:{p} HTTP/1.1\r\nHost: 10.99.99.99:{p}\r\n\r\n", p = other.port()))
        .await;
    assert!(refused.starts_with("HTTP/1.1 403") && refused.contains("[[egress.private]]"), "{refused}");
    // No rule names it: the cloud's service, another port of the granted host.
    for target in ["169.254.169.254:80".to_owned(), "127.0.0.1:8443".to_owned(), other.to_string()] {
        let refused = scene.ask(&format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n")).await;
        assert!(refused.starts_with("HTTP/1.1 403"), "{refused}");
    }
    let entries = scene.recorded(|entry| entry.detail.contains(&other.to_string())).await;
    let request = by_rule(&entries, "net.request", Verdict::Allowed).unwrap();
    assert_eq!(request.right.as_deref(), Some(&*format!("net {}", rules[0])));
    assert_eq!(request.detail, format!("proxy GET {clear}"));
    assert_eq!(request.agent_id, Some(scene.agent));
    let tunnel = by_rule(&entries, "net.connect", Verdict::Allowed).unwrap();
    assert_eq!((tunnel.right, tunnel.detail), (Some(format!("net {}", rules[2])), format!("CONNECT {host}")));
    let private = by_rule(&entries, "net.end", Verdict::Denied).unwrap();
    assert!(
        private.detail.contains("a private network") && private.right == Some(format!("net {}", rules[1]))
    );
    let denied = by_rule(&entries, "net.connect", Verdict::Denied).unwrap();
    assert!(denied.detail.contains("169.254.169.254:80") && denied.right.is_none(), "{denied:?}");
}

#[tokio::test]
async fn tls_is_ended_with_the_bundle_s_authority_and_begun_with_the_host_s() {
    let hosts = Authority::open(&Stored::fresh().unwrap()).unwrap();
    let host = tls_echo_host(&hosts).await;
    let scene = scene(&[format!("https://127.0.0.1:{} GET /v1/*", host.port())], Some(&hosts)).await;
    let mut roots = RootCertStore::empty();
    let bundle = fs::read(scene.places.egress_bundle()).unwrap();
    roots.add_parsable_certificates(CertificateDer::pem_slice_iter(&bundle).flatten());
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = TlsConnector::from(Arc::new(config));
    let ask = async |path: &str| {
        let mut stream = scene.proxy().await;
        let connect = format!("CONNECT {host} HTTP/1.1\r\nHost: {host}\r\n\r\n");
        stream.write_all(connect.as_bytes()).await.unwrap();
        let mut yes = [0; b"HTTP/1.1 200 Connection established\r\n\r\n".len()];
        stream.read_exact(&mut yes).await.unwrap();
        let name = ServerName::from(host.ip());
        let mut stream = connector.connect(name, stream).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        answer
    };
    let answer = ask("/v1/a").await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("GET /v1/a HTTP/1.1"), "{answer}");
    let refused = ask("/v2/a").await;
    assert!(refused.starts_with("HTTP/1.1 403") && refused.contains("egress_path"), "{refused}");
    let entries = scene.recorded(|entry| entry.verdict == Verdict::Denied).await;
    let denied = by_rule(&entries, "net.request", Verdict::Denied).unwrap();
    assert!(denied.detail.contains("GET /v2/a") && denied.right.is_some(), "{denied:?}");
}

#[tokio::test]
async fn a_budget_ends_a_transfer() {
    let host = echo_host().await;
    let scene = scene(&[format!("tcp://127.0.0.1:{} bytes/day=1000", host.port())], None).await;
    let mut stream = scene.proxy().await;
    let long = "x".repeat(4000);
    let asked = format!("CONNECT {host} HTTP/1.1\r\nHost: {host}\r\n\r\n{long}\r\n\r\n");
    stream.write_all(asked.as_bytes()).await.unwrap();
    let mut said = String::new();
    let _ = stream.read_to_string(&mut said).await;
    assert!(!said.contains("xxx"), "nothing came back of what was too long");
    let entries = scene.recorded(|entry| entry.action == "net.end").await;
    let end = by_rule(&entries, "net.end", Verdict::Denied).unwrap();
    assert!(end.detail.contains("byte budget"), "{end:?}");
}

#[tokio::test]
async fn the_agent_s_own_budget_is_one_for_all_rules_and_both_ways() {
    let (one, other) = (echo_host().await, echo_host().await);
    let rules = [one, other].map(|host| format!("http://127.0.0.1:{}", host.port()));
    // Enough for a chunk each way, which a connection that waits holds, and for a few answers beside.
    const BYTES: usize = 40_000;
    let scene = scene_with(&rules, None, Some(BYTES as u64)).await;
    // What goes out comes back.
    let path = "x".repeat(4_000);
    let ask = |host: SocketAddr| format!("GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    let ask = |host: SocketAddr| ask(host).replace("GET /", &format!("GET http://{host}/"));
    let first = scene.ask(&ask(one)).await;
    assert!(first.starts_with("HTTP/1.1 200") && first.contains(&path), "{first}");
    let (mut asked, mut answered) = (0, 1);
    let refused = loop {
        asked += 1;
        assert!(asked < 50, "it was never refused");
        let answer = scene.ask(&ask(if answered % 2 == 0 { one } else { other })).await;
        if !answer.contains(&path) && answer.starts_with("HTTP/1.1 429") {
            break answer;
        }
        answered += usize::from(answer.contains(&path));
        assert!(answered * 2 * path.len() <= BYTES, "more than its budget was moved: {answered} answers");
    };
    assert!(refused.contains("`bytes_per_day` under `[net]`"), "{refused}");
    let entries = scene.recorded(|entry| entry.action == "net.end").await;
    let end = by_rule(&entries, "net.end", Verdict::Denied).unwrap();
    assert!(end.detail.contains("the agent's byte budget is spent (egress_budget)"), "{end:?}");
}

#[tokio::test]
async fn a_known_name_gets_a_synthetic_address_and_another_one_a_record() {
    let scene = scene(&["https://api.example.org:443".to_owned()], None).await;
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let ask = async |labels: &[&str]| {
        let mut question = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in labels {
            question.push(u8::try_from(label.len()).unwrap());
            question.extend(label.as_bytes());
        }
        question.extend([0, 0, 1, 0, 1]);
        socket.send_to(&question, scene.names).await.unwrap();
        let mut answer = [0; 512];
        let (length, _) = socket.recv_from(&mut answer).await.unwrap();
        answer[..length].to_vec()
    };
    let known = ask(&["api", "example", "org"]).await;
    assert_eq!(known[3] & 15, 0);
    assert!(matches!(known.last_chunk::<4>(), Some([198, 18 | 19, _, _])), "{known:?}");
    assert_eq!(ask(&["mzxw6ytboi", "evil", "net"]).await[3] & 15, 3, "it does not exist");
    let entries = scene.recorded(|entry| entry.action == "net.resolve").await;
    let denied = by_rule(&entries, "net.resolve", Verdict::Denied).unwrap();
    assert_eq!(denied.detail, "mzxw6ytboi.evil.net");
    // When the run is over nothing of it is served.
    scene.over.cancel();
    for _ in 0..200 {
        if TcpStream::connect(scene.proxy).await.is_err() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("the proxy is still served");
}
