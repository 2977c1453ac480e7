use super::*;
use crate::address::{AddressError, Class};
use crate::hello::HelloError;
use crate::hello::tests::hello;
use crate::http1::HeadError;
use crate::name::NameError;
use crate::rules::decide;
use crate::socks5::SocksError;
use proptest::prelude::*;
use std::sync::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::mpsc;

/// Time is paused and jumps only when every task waits, so a hang shows at once.
const DEADLINE: Duration = Duration::from_secs(20);
const PUBLIC: &str = "93.184.216.34";

/// The world outside: what names resolve to, who was dialled, what was written down.
struct World {
    answers: HashMap<String, Vec<IpAddr>>,
    resolved: Mutex<Vec<Name>>,
    dialled: Mutex<Vec<SocketAddr>>,
    events: Mutex<Vec<Event>>,
    hosts: mpsc::UnboundedSender<DuplexStream>,
}

impl Resolve for Arc<World> {
    async fn resolve(&self, name: &Name) -> io::Result<Vec<IpAddr>> {
        self.resolved.lock().unwrap().push(name.clone());
        self.answers.get(name.as_str()).cloned().ok_or(io::ErrorKind::NotFound.into())
    }
}

impl Dial for Arc<World> {
    type Stream = DuplexStream;
    async fn dial(&self, to: Vetted) -> io::Result<DuplexStream> {
        self.dialled.lock().unwrap().push(to.socket());
        let (ours, theirs) = duplex(64 * 1024);
        self.hosts.send(theirs).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(ours)
    }
}

impl Audit for Arc<World> {
    fn record(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }
}

pub(super) struct Scene {
    world: Arc<World>,
    relay: Arc<Relay<Arc<World>, Arc<World>, Arc<World>>>,
    policy: watch::Sender<Arc<Policy>>,
    hosts: mpsc::UnboundedReceiver<DuplexStream>,
}

fn policy(rules: &str, bytes: u64) -> Arc<Policy> {
    Arc::new(Policy {
        rules: serde_json::from_str(rules).unwrap(),
        budgets: Budgets { agent: vec![(Whose::Agent, ByteBudget::new(bytes))], by_rule: HashMap::new() },
        own: vec!["198.41.0.4".parse().unwrap()],
        secrets: HashMap::new(),
    })
}

fn scene_with(rules: &str, answers: &[(&str, &[&str])], bytes: u64) -> Scene {
    scene_of(policy(rules, bytes), answers, None)
}

pub(super) fn scene_ending(rules: &str, ending: Ending, secrets: HashMap<usize, Secret>) -> Scene {
    let answers: &[(&str, &[&str])] =
        &[("api.example.org", &[PUBLIC]), ("plain.example.org", &[PUBLIC]), ("b.example.net", &[PUBLIC])];
    let policy = Policy { secrets, ..Policy::clone(&policy(rules, 1 << 30)) };
    scene_of(Arc::new(policy), answers, Some(ending))
}

fn scene_of(policy: Arc<Policy>, answers: &[(&str, &[&str])], ending: Option<Ending>) -> Scene {
    let (sender, hosts) = mpsc::unbounded_channel();
    let (policy, watched) = watch::channel(policy);
    let parsed = |list: &[&str]| list.iter().map(|text| text.parse().unwrap()).collect();
    let world = Arc::new(World {
        answers: answers.iter().map(|(name, list)| ((*name).to_owned(), parsed(list))).collect(),
        resolved: Mutex::default(),
        dialled: Mutex::default(),
        events: Mutex::default(),
        hosts: sender,
    });
    let relay = Relay {
        agent: AgentId(uuid::Uuid::nil()),
        policy: watched,
        limits: Limits::default(),
        resolve: Arc::clone(&world),
        dial: Arc::clone(&world),
        audit: Arc::clone(&world),
        ending,
        checks: Checks::default(),
    };
    Scene { world, relay: Arc::new(relay), policy, hosts }
}

fn scene(rules: &str) -> Scene {
    let answers: &[(&str, &[&str])] =
        &[("example.org", &[PUBLIC]), ("api.example.org", &["2606:4700::1111", PUBLIC])];
    scene_with(rules, answers, 1 << 30)
}

impl Scene {
    /// With these checks replaced by "allow".
    pub(super) fn without(mut self, off: &'static [super::checks::Check]) -> Self {
        Arc::get_mut(&mut self.relay).expect("nothing is served yet").checks.off = off;
        self
    }

    pub(super) async fn host(&mut self) -> DuplexStream {
        timeout(DEADLINE, self.hosts.recv()).await.expect("in time").unwrap()
    }

    pub(super) fn policy(&self) -> Arc<Policy> {
        self.relay.policy()
    }

    pub(super) fn set(&self, policy: Policy) {
        self.policy.send_replace(Arc::new(policy));
    }

    fn knock(&self) -> DuplexStream {
        let (client, server) = duplex(64 * 1024);
        let relay = Arc::clone(&self.relay);
        tokio::spawn(async move { relay.serve_proxy(server).await });
        client
    }

    fn captured(&self, destination: Option<&str>) -> DuplexStream {
        let (client, server) = duplex(64 * 1024);
        let relay = Arc::clone(&self.relay);
        let destination = destination.map(|text| Destination::parse(text, None).unwrap());
        tokio::spawn(async move { relay.serve_captured(server, destination).await });
        client
    }

    /// A CONNECT that was answered with 200.
    pub(super) async fn connected(&self, target: &str) -> DuplexStream {
        let mut client = self.knock();
        let head = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n");
        client.write_all(head.as_bytes()).await.unwrap();
        expect(&mut client, b"HTTP/1.1 200 Connection established\r\n\r\n").await;
        client
    }

    /// Sends all, and reads all that comes back until the end.
    async fn ask(&self, bytes: &[u8]) -> String {
        let mut client = self.knock();
        client.write_all(bytes).await.unwrap();
        rest(&mut client).await
    }

    pub(super) fn dialled(&self) -> Vec<String> {
        self.world.dialled.lock().unwrap().iter().map(ToString::to_string).collect()
    }

    pub(super) fn resolved(&self) -> Vec<String> {
        self.world.resolved.lock().unwrap().iter().map(ToString::to_string).collect()
    }

    /// Waits for the next `count` events.
    pub(super) async fn events(&self, count: usize) -> Vec<Event> {
        for _ in 0..10_000 {
            if self.world.events.lock().unwrap().len() >= count {
                break;
            }
            tokio::task::yield_now().await;
        }
        let events = std::mem::take(&mut *self.world.events.lock().unwrap());
        assert_eq!(events.len(), count, "{events:#?}");
        events
    }
}

pub(super) async fn expect(stream: &mut DuplexStream, bytes: &[u8]) {
    let mut found = vec![0; bytes.len()];
    timeout(DEADLINE, stream.read_exact(&mut found)).await.expect("in time").unwrap();
    assert_eq!(String::from_utf8_lossy(&found), String::from_utf8_lossy(bytes));
}

pub(super) async fn rest(stream: &mut DuplexStream) -> String {
    let mut text = Vec::new();
    // A connection may be quiet for all of its time, and is then closed from our side.
    let end = Limits::default().total * 2;
    timeout(end, stream.read_to_end(&mut text)).await.expect("in time").unwrap();
    String::from_utf8_lossy(&text).into_owned()
}

pub(super) fn verdict(event: &Event) -> Result<usize, Refusal> {
    match event {
        Event::Decided { verdict, .. } => verdict.clone(),
        closed => panic!("not a decision: {closed:?}"),
    }
}

pub(super) fn end(event: &Event) -> (End, u64, u64) {
    match event {
        Event::Closed { end, bytes_out, bytes_in, .. } => (end.clone(), *bytes_out, *bytes_in),
        decided => panic!("not an end: {decided:?}"),
    }
}

fn by_name(name: &[u8], port: u16) -> Vec<u8> {
    [&[5, 1, 0, 5, 1, 0, 3, name.len() as u8][..], name, &port.to_be_bytes()].concat()
}

const TCP: &str = r#"[{"host": "example.org", "protocol": "tcp", "ports": [993]}]"#;
const TLS: &str = r#"[{"host": "*.example.org"}, {"host": "example.org"}, {"host": "93.184.216.34"}]"#;
const HTTP: &str =
    r#"[{"host": "example.org", "protocol": "http", "methods": ["GET", "POST"], "paths": ["/v1/*"]}]"#;

#[tokio::test(start_paused = true)]
async fn a_tunnel_carries_bytes_and_says_how_many() {
    let mut scene = scene(TCP);
    let mut client = scene.connected("example.org:993").await;
    let mut host = scene.hosts.recv().await.unwrap();
    client.write_all(b"hello").await.unwrap();
    expect(&mut host, b"hello").await;
    host.write_all(b"and back").await.unwrap();
    expect(&mut client, b"and back").await;
    // One side may finish before the other.
    client.shutdown().await.unwrap();
    assert_eq!(rest(&mut host).await, "");
    host.write_all(b"late").await.unwrap();
    drop(host);
    assert_eq!(rest(&mut client).await, "late");
    let events = scene.events(2).await;
    assert_eq!(verdict(&events[0]), Ok(0));
    assert_eq!(end(&events[1]), (End::Finished, 5, 12));
    // What was reserved and not moved has gone back.
    assert_eq!(scene.relay.policy().budgets.agent[0].1.left(), (1 << 30) - 5 - 12);
    assert_eq!(scene.resolved(), ["example.org"]);
    assert_eq!(scene.dialled(), ["93.184.216.34:993"]);
}

#[tokio::test(start_paused = true)]
async fn what_no_rule_names_is_not_even_resolved() {
    let scene = scene(TLS);
    for (target, refusal) in [
        ("evil.net:443", "no rule names evil.net"),
        ("example.org.evil.net:443", "no rule names example.org.evil.net"),
        ("a.b.example.org:443", "no rule names a.b.example.org"),
        ("example.org:8443", "no rule for example.org names port 8443"),
        ("127.0.0.1:8443", "no rule names 127.0.0.1"),
        ("169.254.169.254:80", "no rule names 169.254.169.254"),
    ] {
        let said = scene.ask(format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n").as_bytes()).await;
        assert!(said.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{said}");
        for part in ["the connection did not go out\n", "  why: ", refusal, "  fix: add a rule for host `"] {
            assert!(said.contains(part), "{target}: {part:?} is not in {said}");
        }
        assert!(verdict(&scene.events(1).await[0]).is_err());
    }
    assert_eq!((scene.resolved(), scene.dialled()), (vec![], vec![]));
}

#[tokio::test(start_paused = true)]
async fn the_handshake_has_to_name_the_host() {
    let mut scene = scene(TLS);
    let sent = hello("api.example.org");
    let mut client = scene.connected("api.example.org:443").await;
    for part in sent.chunks(50) {
        client.write_all(part).await.unwrap();
    }
    let mut host = scene.hosts.recv().await.unwrap();
    let mut found = vec![0; sent.len()];
    host.read_exact(&mut found).await.unwrap();
    assert_eq!(found, sent, "the hello arrives as it was sent");
    drop((client, host));
    assert_eq!(scene.events(2).await.len(), 2);

    let other = Name::parse("www.example.org").unwrap();
    for (bytes, error) in [
        (hello("www.example.org"), HelloError::Differs(other)),
        (hello("93.184.216.34"), HelloError::NoName),
        (b"SSH-2.0-OpenSSH_10\r\n".to_vec(), HelloError::NotTls),
        (b"CONNECT evil.net:443 HTTP/1.1\r\n\r\n".to_vec(), HelloError::NotTls),
    ] {
        let mut client = scene.connected("api.example.org:443").await;
        client.write_all(&bytes).await.unwrap();
        let mut alert = Vec::new();
        timeout(DEADLINE, client.read_to_end(&mut alert)).await.expect("in time").unwrap();
        assert_eq!(alert, crate::hello::ALERT_ACCESS_DENIED);
        let mut host = scene.hosts.recv().await.unwrap();
        assert_eq!(rest(&mut host).await, "", "no byte reached the host");
        let events = scene.events(2).await;
        let destination = Destination::parse("api.example.org:443", None).unwrap();
        assert_eq!(end(&events[1]), (End::Refused(Refusal::Hello { destination, error }), 0, 0));
    }
    let mut client = scene.connected("93.184.216.34:443").await;
    client.write_all(&hello("93.184.216.34")).await.unwrap();
    assert_eq!(scene.hosts.recv().await.unwrap().read_u8().await.unwrap(), 22);
}

#[tokio::test(start_paused = true)]
async fn a_rule_that_looks_inside_tls_is_not_kept_by_looking_away() {
    let scene = scene(r#"[{"host": "example.org", "methods": ["GET"]}]"#);
    let said = scene.ask(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n").await;
    assert!(said.starts_with("HTTP/1.1 403") && said.contains("egress_tls_not_ended"), "{said}");
    assert_eq!(scene.dialled(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn addresses_are_vetted_after_the_name_was_allowed() {
    let answers: &[(&str, &[&str])] = &[
        ("rebound.example.org", &[PUBLIC, "127.0.0.1"]),
        ("metadata.example.org", &["169.254.169.254"]),
        ("mapped.example.org", &["::ffff:10.0.0.1"]),
        ("lan.example.org", &["192.168.1.9"]),
        ("console.example.org", &["198.41.0.4"]),
        ("empty.example.org", &[]),
        ("nas", &["192.168.1.9"]),
        ("router", &["127.0.0.1"]),
    ];
    let rules = r#"[{"host": "*.example.org"}, {"host": "nas", "reach": "private"}, {"host": "router", "reach": "private"},
        {"host": "10.0.0.7", "reach": "private"}, {"host": "127.0.0.1", "reach": "private", "ports": [9]}]"#;
    let scene = scene_with(rules, answers, 1 << 20);
    for (host, class) in [
        ("rebound.example.org", Some(Class::Loopback)),
        ("metadata.example.org", Some(Class::Metadata)),
        ("mapped.example.org", Some(Class::Translated)),
        ("lan.example.org", Some(Class::Private)),
        ("console.example.org", Some(Class::Own)),
        ("router", Some(Class::Loopback)),
        ("empty.example.org", None),
    ] {
        let said =
            scene.ask(format!("CONNECT {host}:443 HTTP/1.1\r\nHost: {host}:443\r\n\r\n").as_bytes()).await;
        assert!(said.starts_with("HTTP/1.1 403"), "{host}: {said}");
        let events = scene.events(2).await;
        match (end(&events[1]).0, class) {
            (
                End::Refused(Refusal::Address { error: AddressError::Refused { class, .. }, .. }),
                Some(expected),
            ) => {
                assert_eq!(class, expected, "{host}");
            }
            (End::Refused(Refusal::Address { error: AddressError::NoAddress, .. }), None) => {}
            other => panic!("{host}: {other:?}"),
        }
    }
    assert_eq!(scene.dialled(), [""; 0], "not even the public half of an answer");
    let said = scene.ask(b"CONNECT gone.example.org:443 HTTP/1.1\r\nHost: gone.example.org\r\n\r\n").await;
    assert!(said.starts_with("HTTP/1.1 502"), "{said}");
    for target in ["nas:443", "10.0.0.7:443", "127.0.0.1:9"] {
        drop(scene.connected(target).await);
    }
    assert_eq!(scene.dialled(), ["192.168.1.9:443", "10.0.0.7:443", "127.0.0.1:9"]);
}

#[tokio::test(start_paused = true)]
async fn requests_are_written_anew_and_each_is_decided() {
    let mut scene = scene(HTTP);
    let mut client = scene.knock();
    // The body looks like a request to somebody else; so do the bytes after it.
    client
        .write_all(
            b"POST http://Example.org/v1/a?key=secret HTTP/1.1\r\nHost: example.org\r\nProxy-Authorization: Basic eA==\r\n\
              Content-Length: 35\r\n\r\nGET http://evil.net/ HTTP/1.1\r\n\r\n..GET http://example.org/v1/b HTTP/1.1\r\nHost: \
              example.org\r\n\r\nDELETE http://example.org/v1/c HTTP/1.1\r\nHost: example.org\r\n\r\n",
        )
        .await
        .unwrap();
    let mut host = scene.hosts.recv().await.unwrap();
    expect(
        &mut host,
        b"POST /v1/a?key=secret HTTP/1.1\r\nHost: example.org\r\nContent-Length: 35\r\nConnection: close\r\n\r\n\
          GET http://evil.net/ HTTP/1.1\r\n\r\n..",
    )
    .await;
    host.write_all(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nKeep-Alive: 5\r\n\r\n3;x=y\r\nabc\r\n0\r\nX: y\r\n\r\nHTTP/1.1 200 OK\r\n\r\nnot asked for")
        .await
        .unwrap();
    expect(
        &mut client,
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    )
    .await;
    assert_eq!(rest(&mut host).await, "", "what follows a request does not follow it to the host");
    let mut host = scene.hosts.recv().await.unwrap();
    expect(&mut host, b"GET /v1/b HTTP/1.1\r\nHost: example.org\r\nConnection: close\r\n\r\n").await;
    host.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
    expect(&mut client, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nok").await;
    let said = rest(&mut client).await;
    assert!(said.starts_with("HTTP/1.1 403") && said.contains("does not allow DELETE"), "{said}");
    let events = scene.events(5).await;
    assert_eq!(verdict(&events[0]), Ok(0));
    assert!(
        matches!(&events[0], Event::Decided { request: Some((m, p)), .. } if m == "POST" && p == "/v1/a")
    );
    assert_eq!(end(&events[1]).0, End::Finished);
    assert_eq!((verdict(&events[2]), end(&events[3]).0), (Ok(0), End::Finished));
    assert!(matches!(verdict(&events[4]), Err(Refusal::Method { .. })));
    assert_eq!(scene.resolved(), ["example.org"; 2], "once for each request");
    let moved: u64 = [&events[1], &events[3]].map(|event| end(event).1 + end(event).2).iter().sum();
    assert_eq!(scene.relay.policy().budgets.agent[0].1.left(), (1 << 30) - moved);
}

#[tokio::test(start_paused = true)]
async fn answers_that_are_not_plain_http_are_not_passed_on() {
    let mut scene = scene(HTTP);
    for (answer, error) in [
        (&b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"[..], HeadError::Upgrade),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", HeadError::Length),
        (b"HTTP/1.1 200 OK\nContent-Length: 1\n\n", HeadError::LineEnd),
        (b"HTTP/1.1 200 OK\r\nCont", HeadError::Truncated),
    ] {
        let mut client = scene.knock();
        client.write_all(b"GET http://example.org/v1/a HTTP/1.1\r\nHost: example.org\r\n\r\n").await.unwrap();
        let mut host = scene.hosts.recv().await.unwrap();
        host.write_all(answer).await.unwrap();
        host.shutdown().await.unwrap();
        let said = rest(&mut client).await;
        assert!(said.starts_with("HTTP/1.1 502 Bad Gateway"), "{said}");
        assert_eq!(end(&scene.events(2).await[1]).0, End::Refused(Refusal::Answer(error)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_host_may_answer_before_it_has_read_everything() {
    let mut scene = scene(HTTP);
    let mut client = scene.knock();
    client
        .write_all(
            b"POST http://example.org/v1/a HTTP/1.1\r\nHost: example.org\r\nContent-Length: 1000\r\n\r\nab",
        )
        .await
        .unwrap();
    let mut host = scene.hosts.recv().await.unwrap();
    host.write_all(b"HTTP/1.1 413 No\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    let began = tokio::time::Instant::now();
    let said = rest(&mut client).await;
    assert!(said.starts_with("HTTP/1.1 413 No"), "{said}");
    assert!(began.elapsed() < DEADLINE, "the rest of the body is not waited for as if it were a request");
    assert_eq!(end(&scene.events(2).await[1]).0, End::Finished);
}

#[tokio::test(start_paused = true)]
async fn old_clients_get_a_body_that_ends_with_the_connection() {
    let mut scene = scene(HTTP);
    let mut client = scene.knock();
    client.write_all(b"GET http://example.org/v1/a HTTP/1.0\r\n\r\n").await.unwrap();
    let mut host = scene.hosts.recv().await.unwrap();
    host.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
        .await
        .unwrap();
    assert_eq!(rest(&mut client).await, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nabc");
}

#[tokio::test(start_paused = true)]
async fn malformed_requests_get_400_and_nothing_goes_out() {
    let scene = scene(HTTP);
    for head in [
        "GET http://example.org/v1/a HTTP/1.1\r\nHost: evil.net\r\n\r\n",
        "GET http://example.org/v1/a HTTP/1.1\nHost: example.org\n\n",
        "GET http://user@example.org/v1/a HTTP/1.1\r\nHost: example.org\r\n\r\n",
        "GET /v1/a HTTP/1.1\r\nHost: example.org\r\n\r\n",
        "CONNECT example.org HTTP/1.1\r\nHost: example.org\r\n\r\n",
        "POST http://example.org/v1/a HTTP/1.1\r\nHost: example.org\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    ] {
        let said = scene.ask(head.as_bytes()).await;
        assert!(said.starts_with("HTTP/1.1 400 Bad Request") && said.contains("  fix: "), "{head:?}: {said}");
        assert!(matches!(verdict(&scene.events(1).await[0]), Err(Refusal::Head(_))));
    }
    let said = scene.ask(b"\x16\x03\x01\x00\x05hello").await;
    assert!(said.contains("egress_not_a_proxy_request"), "{said}");
    let said = scene.ask(b"\x04\x01\x00\x50\x01\x01\x01\x01\x00").await;
    assert!(said.contains("egress_not_a_proxy_request"), "{said}");
    assert_eq!((scene.resolved(), scene.dialled()), (vec![], vec![]));
}

#[tokio::test(start_paused = true)]
async fn socks_is_the_same_door() {
    let mut scene = scene(TLS);
    let mut client = scene.knock();
    client.write_all(&by_name(b"api.example.org", 443)).await.unwrap();
    expect(&mut client, &[5, 0]).await;
    expect(&mut client, &[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]).await;
    client.write_all(&hello("api.example.org")).await.unwrap();
    let mut host = scene.hosts.recv().await.unwrap();
    assert_eq!(host.read_u8().await.unwrap(), 22);
    drop((client, host));
    assert_eq!(verdict(&scene.events(2).await[0]), Ok(0));
    for (bytes, code, refusal) in [
        (
            by_name(b"attacker.net\0.example.org", 443),
            1,
            Refusal::Socks(SocksError::Name(NameError::Character)),
        ),
        (
            by_name(b"evil.net", 443),
            2,
            Refusal::Host { destination: Destination::parse("evil.net:443", None).unwrap() },
        ),
        (vec![5, 1, 0, 5, 2, 0, 1, 1, 1, 1, 1, 0, 80], 7, Refusal::Socks(SocksError::Command)),
        (vec![5, 1, 0, 5, 1, 0, 9, 1, 1, 1, 1, 0, 80], 8, Refusal::Socks(SocksError::AddressType)),
    ] {
        let mut client = scene.knock();
        client.write_all(&bytes).await.unwrap();
        expect(&mut client, &[5, 0, 5, code]).await;
        assert_eq!(verdict(&scene.events(1).await[0]), Err(refusal));
    }
    let mut client = scene.knock();
    client.write_all(&[5, 1, 2]).await.unwrap();
    expect(&mut client, &[5, 0xff]).await;
    assert_eq!(scene.dialled().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn clear_http_is_read_request_by_request_behind_every_door() {
    for door in ["connect", "socks", "captured"] {
        let mut scene = scene(HTTP);
        let mut client = match door {
            "connect" => scene.connected("example.org:80").await,
            "socks" => {
                let mut client = scene.knock();
                client.write_all(&by_name(b"example.org", 80)).await.unwrap();
                expect(&mut client, &[5, 0, 5, 0, 0, 1, 0, 0, 0, 0, 0, 0]).await;
                client
            }
            _ => scene.captured(Some("example.org:80")),
        };
        assert_eq!(scene.dialled(), [""; 0], "{door}: nothing is dialled before a request is decided");
        client.write_all(b"GET /v1/a HTTP/1.1\r\nHost: example.org\r\n\r\n").await.unwrap();
        let mut host = scene.hosts.recv().await.unwrap();
        expect(&mut host, b"GET /v1/a HTTP/1.1\r\nHost: example.org\r\nConnection: close\r\n\r\n").await;
        host.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
        expect(&mut client, b"HTTP/1.1 204 No Content\r\nConnection: keep-alive\r\n\r\n").await;
        client.write_all(b"GET /v1/../admin HTTP/1.1\r\nHost: example.org\r\n\r\n").await.unwrap();
        let said = rest(&mut client).await;
        assert!(said.starts_with("HTTP/1.1 403") && said.contains("egress_path_ambiguous"), "{door}: {said}");
        assert_eq!(scene.events(3).await.len(), 3);
        for request in
            ["CONNECT evil.net:80 HTTP/1.1\r\nHost: evil.net:80", "GET /v1/a HTTP/1.1\r\nHost: evil.net"]
        {
            let mut client = scene.captured(Some("example.org:80"));
            client.write_all(format!("{request}\r\n\r\n").as_bytes()).await.unwrap();
            assert!(rest(&mut client).await.starts_with("HTTP/1.1 400"), "{request}");
        }
        assert_eq!(scene.dialled().len(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn caught_connections() {
    let mut scene = scene(TLS);
    let mut client = scene.captured(Some("example.org:443"));
    client.write_all(&hello("example.org")).await.unwrap();
    assert_eq!(scene.hosts.recv().await.unwrap().read_u8().await.unwrap(), 22);
    assert_eq!(scene.events(1).await.len(), 1);
    let mut unknown = scene.captured(None);
    assert_eq!(rest(&mut unknown).await, "");
    drop(client);
    let events = scene.events(2).await;
    assert!(events.iter().any(|e| matches!(e, Event::Decided { verdict: Err(Refusal::NotSynthetic), .. })));
}

#[tokio::test(start_paused = true)]
async fn a_budget_is_never_overdrawn_by_many_at_once() {
    let mut scene = scene_with(TCP, &[("example.org", &[PUBLIC])], 1_000);
    let mut clients = Vec::new();
    for _ in 0..10 {
        clients.push(scene.connected("example.org:993").await);
    }
    let mut hosts = Vec::new();
    for _ in 0..10 {
        hosts.push(scene.hosts.recv().await.unwrap());
    }
    for client in &mut clients {
        // A connection that is out of budget may be closed already.
        let _ = client.write_all(&[7; 400]).await;
    }
    let mut arrived = 0;
    for host in &mut hosts {
        drop(clients.remove(0));
        arrived += rest(host).await.len();
    }
    assert!(arrived <= 1_000, "{arrived}");
    let events = scene.events(20).await;
    let spent = events
        .iter()
        .any(|e| matches!(e, Event::Closed { end: End::Refused(Refusal::Budget(Whose::Agent)), .. }));
    assert!(spent, "{events:#?}");
}

#[tokio::test(start_paused = true)]
async fn a_rule_has_a_budget_of_its_own() {
    let mut scene = scene(HTTP);
    let mut changed = Policy::clone(&scene.relay.policy());
    changed.budgets.by_rule.insert(0, vec![(Whose::Rule, ByteBudget::new(10))]);
    scene.policy.send_replace(Arc::new(changed));
    let said = scene.ask(b"GET http://example.org/v1/a HTTP/1.1\r\nHost: example.org\r\n\r\n").await;
    assert!(said.starts_with("HTTP/1.1 429 Too Many Requests"), "{said}");
    assert_eq!(rest(&mut scene.hosts.recv().await.unwrap()).await, "", "no byte reached the host");
}

#[tokio::test(start_paused = true)]
async fn nothing_waits_for_ever() {
    let mut scene = scene(TCP);
    let mut silent = scene.knock();
    assert_eq!(rest(&mut silent).await, "");
    let mut slow = scene.knock();
    slow.write_all(b"CONNECT example.org:9").await.unwrap();
    assert!(rest(&mut slow).await.starts_with("HTTP/1.1 408"));
    assert_eq!(verdict(&scene.events(1).await[0]), Err(Refusal::Slow(Waiting::Head)));

    let mut idle = scene.connected("example.org:993").await;
    let began = tokio::time::Instant::now();
    assert_eq!(rest(&mut idle).await, "");
    assert!(began.elapsed() >= scene.relay.limits.idle);
    assert_eq!(end(&scene.events(2).await[1]).0, End::Refused(Refusal::Slow(Waiting::Idle)));
    drop(scene.hosts.recv().await);

    let busy = scene.connected("example.org:993").await;
    let mut host = scene.hosts.recv().await.unwrap();
    let (mut read, mut write) = tokio::io::split(busy);
    let began = tokio::time::Instant::now();
    tokio::spawn(async move {
        while host.write_all(b".").await.is_ok() {
            tokio::time::sleep(Duration::from_secs(60)).await
        }
    });
    let mut all = Vec::new();
    timeout(scene.relay.limits.total * 2, read.read_to_end(&mut all)).await.expect("in time").unwrap();
    assert!(began.elapsed() >= scene.relay.limits.total && all.len() > 300);
    assert!(write.write_all(b"x").await.is_err());
    assert_eq!(end(&scene.events(2).await[1]).0, End::Refused(Refusal::Slow(Waiting::Total)));
}

#[tokio::test(start_paused = true)]
async fn a_connection_ends_when_its_rule_does() {
    let mut scene = scene(TCP);
    let mut client = scene.connected("example.org:993").await;
    let mut host = scene.hosts.recv().await.unwrap();
    // A change that still allows it leaves it alone.
    let wider =
        r#"[{"host": "example.net"}, {"host": "example.org", "protocol": "tcp", "ports": [993, 994]}]"#;
    scene.policy.send_replace(policy(wider, 1 << 20));
    client.write_all(b"still").await.unwrap();
    expect(&mut host, b"still").await;
    scene.policy.send_replace(policy("[]", 1 << 20));
    assert_eq!(rest(&mut client).await, "");
    assert_eq!(rest(&mut host).await, "");
    assert_eq!(end(&scene.events(2).await[1]).0, End::Revoked);
}

/// Hosts as an agent that means harm writes them, beside honest ones.
fn written_host() -> impl Strategy<Value = String> {
    let honest = prop_oneof![
        Just("example.org"),
        Just("API.example.org"),
        Just("nas"),
        Just("93.184.216.34"),
        Just("10.0.0.7"),
        Just("rebound.example.org"),
        Just("[2606:4700::1111]"),
        Just("evil.net"),
    ];
    let twist = prop_oneof![
        Just(""),
        Just("."),
        Just("\0"),
        Just("%00"),
        Just(".evil.net"),
        Just("@evil.net"),
        Just("\\evil.net"),
        Just(" "),
        Just("\u{430}"),
        Just("#"),
        Just("/"),
        Just("?"),
        Just(":1"),
        Just(","),
    ];
    let disguised = prop_oneof![
        Just("0x7f.1"),
        Just("2130706433"),
        Just("127.1"),
        Just("0177.0.0.1"),
        Just("[::ffff:127.0.0.1]"),
        Just("[::1]"),
    ];
    prop_oneof![
        4 => honest.clone().prop_map(str::to_owned),
        3 => (honest.clone(), twist.clone()).prop_map(|(host, twist)| format!("{host}{twist}")),
        2 => (twist, honest).prop_map(|(twist, host)| format!("{twist}{host}")),
        1 => disguised.prop_map(str::to_owned),
        1 => "[ -~]{1,12}",
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever is written at whichever door: what is dialled is an address of the host that the rules allowed,
    /// at the port that they allowed; all doors come to the same end; each decision is written down once.
    #[test]
    fn what_is_dialled_is_what_was_decided(host in written_host(), port in prop_oneof![Just(443u16), Just(80), 0u16..1000]) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let rules = r#"[{"host": "*.example.org", "protocol": "tcp", "ports": [443]},
            {"host": "example.org", "protocol": "tcp", "ports": [80, 443]}, {"host": "nas", "protocol": "tcp", "ports": [443], "reach": "private"},
            {"host": "93.184.216.34", "protocol": "tcp", "ports": [443]}]"#;
        let answers: &[(&str, &[&str])] = &[
            ("example.org", &[PUBLIC]), ("api.example.org", &["2606:4700::1111", PUBLIC]), ("nas", &["192.168.1.9"]),
            ("rebound.example.org", &["127.0.0.1"]), ("evil.net", &["203.0.114.1"]),
        ];
        runtime.block_on(async {
            let mut ends = Vec::new();
            for door in ["connect", "socks"] {
                let mut scene = scene_with(rules, answers, 1 << 20);
                let bytes = match door {
                    "connect" => format!("CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n").into_bytes(),
                    _ => by_name(host.as_bytes(), port),
                };
                let mut client = scene.knock();
                client.write_all(&bytes).await.unwrap();
                client.shutdown().await.unwrap();
                scene.hosts.close();
                rest(&mut client).await;
                let dialled = scene.world.dialled.lock().unwrap().clone();
                let resolved = scene.world.resolved.lock().unwrap().clone();
                let events = scene.world.events.lock().unwrap().clone();
                assert_eq!(events.iter().filter(|e| matches!(e, Event::Decided { .. })).count(), 1, "{events:?}");
                assert!(resolved.len() <= 1, "{resolved:?}");
                let Event::Decided { destination, verdict, .. } = &events[0] else { panic!("{events:?}") };
                match destination {
                    Some(destination) => {
                        let written = format!("{host}:{port}");
                        assert_eq!(Ok(destination.clone()), Destination::parse(&written, None));
                        let policy = scene.relay.policy();
                        let again = decide(&policy.rules, destination, Asked::Stream);
                        assert_eq!(verdict.as_ref().ok(), again.ok().map(|allow| allow.rule).as_ref());
                        let may: Vec<IpAddr> = match &destination.host {
                            Host::Name(name) => {
                                assert!(resolved.iter().all(|found| found == name));
                                scene.world.answers.get(name.as_str()).cloned().unwrap_or_default()
                            }
                            Host::Address(address) => vec![*address],
                        };
                        for address in &dialled {
                            assert!(verdict.is_ok() && may.contains(&address.ip()) && address.port() == destination.port.get());
                            assert_ne!(crate::address::classify(address.ip()), Class::Loopback);
                        }
                    }
                    None => assert!(verdict.is_err() && dialled.is_empty() && resolved.is_empty()),
                }
                ends.push((destination.clone(), dialled));
            }
            assert_eq!(&ends[0], &ends[1], "CONNECT and SOCKS disagree about {host:?}:{port}");

        });
    }
}
