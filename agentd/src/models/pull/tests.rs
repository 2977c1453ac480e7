//! A real server on a real socket, which breaks off, changes its file and lies when it is told to.

use super::*;
use crate::egress::tests::opened;
use agentd_egress::authority::{Authority, Stored};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

/// Dials one server, whoever is named.
struct To(std::net::SocketAddr);

impl Outside for To {
    fn dial(&self, _host: Host, _port: u16, _tls: bool) -> Dialling<'_> {
        let address = self.0;
        Box::pin(async move {
            let stream = TcpStream::connect(address).await.expect("connected");
            Ok(Box::new(stream) as Box<dyn Line>)
        })
    }
}

#[derive(Clone, Default)]
struct Server {
    file: Vec<u8>,
    tag: &'static str,
    /// Bytes of each answer's body, after which the line breaks.
    breaks_after: Option<usize>,
    /// What `.sha256` holds.
    sum: Option<String>,
    /// Answers as if it knew no ranges.
    whole_only: bool,
    redirects: usize,
    asked: Vec<String>,
}

async fn serve(server: Server) -> (To, Arc<Mutex<Server>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("bound");
    let shared = Arc::new(Mutex::new(server));
    let of = Arc::clone(&shared);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer(stream, Arc::clone(&of)));
        }
    });
    (To(address), shared)
}

/// The same in TLS, with a certificate for this address that an authority of the test's own has signed.
async fn serve_in_tls(server: Server, authority: &Authority) -> (u16, Arc<Mutex<Server>>) {
    let config = authority.serving(&Host::parse("127.0.0.1").expect("an address")).expect("a certificate");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let port = listener.local_addr().expect("bound").port();
    let shared = Arc::new(Mutex::new(server));
    let of = Arc::clone(&shared);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // A client that does not trust the certificate ends the handshake.
            if let Ok(stream) = TlsAcceptor::from(Arc::clone(&config)).accept(stream).await {
                tokio::spawn(answer(stream, Arc::clone(&of)));
            }
        }
    });
    (port, shared)
}

async fn answer<S: AsyncRead + AsyncWrite + Unpin>(stream: S, server: Arc<Mutex<Server>>) {
    let mut stream = BufReader::new(stream);
    let (mut path, mut range, mut if_range) = (String::new(), None, None);
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await.expect("read") == 0 || line == "\r\n" {
            break;
        }
        let lower = line.trim().to_ascii_lowercase();
        if path.is_empty() {
            path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        } else if let Some(from) = lower.strip_prefix("range: bytes=") {
            range = from.trim_end_matches('-').parse::<usize>().ok();
        } else if let Some(tag) = lower.strip_prefix("if-range: ") {
            if_range = Some(tag.to_owned());
        }
    }
    let (head, body) = {
        let mut server = server.lock().expect("unpoisoned");
        let seen = range.map_or_else(|| path.clone(), |from| format!("{path} from {from}"));
        server.asked.push(seen);
        if path.ends_with(".sha256") {
            match &server.sum {
                Some(sum) => (
                    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n", sum.len()),
                    sum.clone().into_bytes(),
                ),
                None => ("HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n".to_owned(), Vec::new()),
            }
        } else if server.redirects > 0 {
            server.redirects -= 1;
            ("HTTP/1.1 302 Found\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n".to_owned(), Vec::new())
        } else {
            let same = if_range.is_none_or(|tag| tag == server.tag);
            let from = range.filter(|_| same && !server.whole_only).unwrap_or(0);
            let total = server.file.len();
            let tag = server.tag;
            let head = match from {
                0 => format!("HTTP/1.1 200 OK\r\ncontent-length: {total}\r\netag: {tag}\r\n"),
                from => format!(
                    "HTTP/1.1 206 Partial Content\r\ncontent-length: {}\r\ncontent-range: bytes {from}-{}/{total}\r\netag: {tag}\r\n",
                    total - from,
                    total - 1
                ),
            };
            let end = server.breaks_after.map_or(total, |after| (from + after).min(total));
            (head, server.file[from..end].to_vec())
        }
    };
    // A client that has gone is seen by its own test.
    let _ = stream.write_all(format!("{head}connection: close\r\n\r\n").as_bytes()).await;
    let _ = stream.write_all(&body).await;
    let _ = stream.shutdown().await;
}

struct Scene {
    folder: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a folder") }
    }

    fn place(&self) -> Place {
        Place { file: self.folder.path().join("m.gguf.pull"), room_bytes: 1 << 20 }
    }

    async fn pull(&self, to: &To, sha256: Option<&str>) -> Result<[u8; 32], Report> {
        pull(to, &Order::new("https://example.org/m.gguf", sha256)?, &self.place(), &|_, _| {}).await
    }

    fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).expect("read");
        let mut names: Vec<String> = entries
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(self.place().file).expect("a file")
    }
}

fn file(seed: u8) -> Vec<u8> {
    (0..50_000_u32).map(|at| (at % 251) as u8 ^ seed).collect()
}

fn sum(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

#[tokio::test]
async fn a_file_comes_whole_and_is_hashed() {
    let (to, server) = serve(Server { file: file(0), tag: "\"a\"", redirects: 2, ..Server::default() }).await;
    let scene = Scene::new();
    assert_eq!(scene.pull(&to, None).await.expect("pulled"), sum(&file(0)));
    assert_eq!(scene.content(), file(0));
    assert_eq!(
        server.lock().expect("unpoisoned").asked,
        ["/m.gguf", "/elsewhere", "/elsewhere", "/m.gguf.sha256"]
    );
}

#[tokio::test(start_paused = true)]
async fn a_line_that_breaks_is_taken_up_where_it_broke() {
    let server = Server { file: file(0), tag: "\"a\"", breaks_after: Some(20_000), ..Server::default() };
    let (to, server) = serve(server).await;
    let scene = Scene::new();
    scene.pull(&to, None).await.expect("pulled in three pieces");
    assert_eq!(scene.content(), file(0));
    let asked = server.lock().expect("unpoisoned").asked.clone();
    assert_eq!(asked, ["/m.gguf", "/m.gguf from 20000", "/m.gguf from 40000", "/m.gguf.sha256"]);
}

#[tokio::test(start_paused = true)]
async fn an_order_given_again_goes_on_if_the_file_is_the_same() {
    for (second, resumes) in [
        (Server { file: file(0), tag: "\"a\"", ..Server::default() }, true),
        (Server { file: file(9), tag: "\"b\"", ..Server::default() }, false),
    ] {
        let scene = Scene::new();
        let stuck = Server { file: file(0), tag: "\"a\"", breaks_after: Some(10_000), ..Server::default() };
        let (to, server) = serve(stuck).await;
        // Nothing more comes after the first piece.
        let order = Order::new("https://example.org/m.gguf", None).expect("good");
        let place = scene.place();
        let first = fetch(&to, &order, &place, &|_, _| {}).await;
        assert!(matches!(first, Err(Broken::Line(report)) if report.code == "pull_interrupted"));
        drop(server);
        let (to, server) = serve(second.clone()).await;
        scene.pull(&to, None).await.expect("pulled");
        assert_eq!(scene.content(), second.file);
        assert_eq!(server.lock().expect("unpoisoned").asked[0], "/m.gguf from 10000");
        assert_eq!(second.tag == "\"a\"", resumes);
    }
}

#[tokio::test(start_paused = true)]
async fn what_came_of_another_address_or_without_a_validator_is_begun_anew() {
    let scene = Scene::new();
    std::fs::write(scene.place().file, b"other bytes").expect("written");
    for note in [
        r#"{"url":"https://example.org/other.gguf","validator":"\"a\"","total_bytes":50000}"#,
        r#"{"url":"https://example.org/m.gguf","validator":null,"total_bytes":50000}"#,
        "damaged",
    ] {
        std::fs::write(scene.place().note(), note).expect("written");
        let (to, server) = serve(Server { file: file(0), tag: "\"a\"", ..Server::default() }).await;
        scene.pull(&to, None).await.expect("pulled");
        assert_eq!(scene.content(), file(0));
        assert_eq!(server.lock().expect("unpoisoned").asked[0], "/m.gguf");
    }
}

#[tokio::test]
async fn a_server_without_ranges_is_read_from_the_start() {
    let scene = Scene::new();
    std::fs::write(scene.place().file, &file(0)[..10_000]).expect("written");
    let note = r#"{"url":"https://example.org/m.gguf","validator":"\"a\"","total_bytes":50000}"#;
    std::fs::write(scene.place().note(), note).expect("written");
    let (to, _) = serve(Server { file: file(0), tag: "\"a\"", whole_only: true, ..Server::default() }).await;
    scene.pull(&to, None).await.expect("pulled");
    assert_eq!(scene.content(), file(0));
}

#[tokio::test]
async fn other_bytes_than_the_sum_says_are_thrown_away() {
    let wrong = hex::encode([1; 32]);
    let given = Server { file: file(0), tag: "\"a\"", ..Server::default() };
    let beside = Server { sum: Some(format!("{wrong}  m.gguf\n")), ..given.clone() };
    for (server, sum) in [(given, Some(wrong.as_str())), (beside, None)] {
        let scene = Scene::new();
        let (to, _) = serve(server).await;
        assert_eq!(scene.pull(&to, sum).await.expect_err("it differs").code, "sha256_differs");
        assert_eq!(scene.files(), Vec::<String>::new());
    }
    let scene = Scene::new();
    let server =
        Server { file: file(0), tag: "\"a\"", sum: Some(hex::encode(sum(&file(0)))), ..Server::default() };
    let (to, _) = serve(server).await;
    scene.pull(&to, None).await.expect("the sum beside it is the file's");
}

#[tokio::test]
async fn a_file_larger_than_the_room_is_refused_before_it_comes() {
    let scene = Scene::new();
    let (to, _) = serve(Server { file: file(0), tag: "\"a\"", ..Server::default() }).await;
    let place = Place { room_bytes: 40_000, ..scene.place() };
    let order = Order::new("https://example.org/m.gguf", None).expect("good");
    let report = pull(&to, &order, &place, &|_, _| {}).await.expect_err("too large");
    assert_eq!(report.code, "disk_full");
    assert_eq!(scene.files(), Vec::<String>::new());
}

#[tokio::test]
async fn a_server_that_sends_in_circles_is_left() {
    let scene = Scene::new();
    let (to, _) = serve(Server { file: file(0), redirects: 100, ..Server::default() }).await;
    assert_eq!(scene.pull(&to, None).await.expect_err("a circle").code, "redirect_refused");
}

/// The appliance's own way out: real TLS, verified by the authority that the owner wrote into `agentd.toml`.
#[tokio::test]
async fn over_tls_a_host_is_known_by_the_owners_authority_and_by_nothing_else() {
    let (owners, strangers) = (Stored::fresh().expect("made"), Stored::fresh().expect("made"));
    let owners = Authority::open(&owners).expect("opened");
    let strangers = Authority::open(&strangers).expect("opened");
    let beside = format!("{}  m.gguf\n", hex::encode(sum(&file(0))));
    let server = Server {
        file: file(0),
        tag: "\"a\"",
        breaks_after: Some(20_000),
        sum: Some(beside),
        ..Server::default()
    };
    let (port, asked) = serve_in_tls(server.clone(), &owners).await;
    let order = |port: u16| Order::new(&format!("https://127.0.0.1:{port}/m.gguf"), None).expect("good");
    let scene = Scene::new();
    let (_root, _places, _audit, egress) = opened(Some(&owners));
    // The line breaks twice within the file; TLS is begun anew each time.
    let came = pull(&egress, &order(port), &scene.place(), &|_, _| {}).await.expect("pulled over TLS");
    assert_eq!((came, scene.content()), (sum(&file(0)), file(0)));
    assert_eq!(
        asked.lock().expect("unpoisoned").asked,
        ["/m.gguf", "/m.gguf from 20000", "/m.gguf from 40000", "/m.gguf.sha256"]
    );
    // A server with somebody else's certificate, and one that the owner has no certificate for.
    let (foreign, never) = serve_in_tls(server.clone(), &strangers).await;
    let (_root, _places, _audit, public_only) = opened(None);
    for (way, port) in [(&egress, foreign), (&public_only, port)] {
        let scene = Scene::new();
        let refused = pull(way, &order(port), &scene.place(), &|_, _| {}).await.expect_err("not verified");
        assert_eq!(refused.code, "host_not_verified", "{refused}");
        assert!(refused.why.contains("UnknownIssuer") && refused.fix.contains("authority"), "{refused}");
        assert_eq!(scene.files(), Vec::<String>::new());
    }
    assert!(never.lock().expect("unpoisoned").asked.is_empty(), "nothing was asked of a stranger");
    // Nobody has granted another address of this machine, whatever it could show.
    let refused = Order::new(&format!("https://127.0.0.2:{port}/m.gguf"), None).expect("good");
    let refused = pull(&egress, &refused, &scene.place(), &|_, _| {}).await.expect_err("not granted");
    assert_eq!(refused.code, "host_refused", "{refused}");
}

#[test]
fn without_tls_a_sum_is_required() {
    assert_eq!(Order::new("http://example.org/m.gguf", None).expect_err("refused").code, "sha256_required");
    Order::new("http://example.org/m.gguf", Some(&"ab".repeat(32))).expect("with a sum");
    assert_eq!(Order::new("https://example.org/m", Some("ab")).expect_err("short").code, "sha256_malformed");
}
