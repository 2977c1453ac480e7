use super::*;
use proptest::prelude::*;
use rustls::pki_types::ServerName;
use std::sync::Arc;

/// The first flight of a real client.
pub(crate) fn hello(server: &str) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let name = ServerName::try_from(server.to_owned()).unwrap();
    let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

/// A ClientHello with these extensions, in records of `record` bytes.
fn raw_hello(extensions: &[(u16, Vec<u8>)], record: usize) -> Vec<u8> {
    let with_length = |bytes: &[u8]| [&(bytes.len() as u16).to_be_bytes()[..], bytes].concat();
    let mut list = Vec::new();
    for (kind, body) in extensions {
        list.extend(kind.to_be_bytes());
        list.extend(with_length(body));
    }
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.push(0);
    body.extend(with_length(&[0x13, 0x01]));
    body.extend([1, 0]);
    body.extend(with_length(&list));
    let mut message = vec![1];
    message.extend(&(body.len() as u32).to_be_bytes()[1..]);
    message.extend(body);
    message.chunks(record).flat_map(|part| [&[22, 3, 1][..], &with_length(part)].concat()).collect()
}

fn sni(names: &[&[u8]]) -> (u16, Vec<u8>) {
    let mut list = Vec::new();
    for name in names {
        list.push(0);
        list.extend((name.len() as u16).to_be_bytes());
        list.extend(*name);
    }
    (0, [&(list.len() as u16).to_be_bytes()[..], &list].concat())
}

/// signature_algorithms: rustls wants it, as TLS 1.2 and 1.3 do.
fn algorithms() -> (u16, Vec<u8>) {
    (13, vec![0, 2, 4, 3])
}

fn check(bytes: &[u8], host: &str) -> Result<bool, HelloError> {
    HelloReader::default().feed(bytes, &Host::parse(host).unwrap())
}

#[test]
fn a_real_client_is_understood() {
    assert_eq!(check(&hello("example.org"), "example.org"), Ok(true));
    let differs = Err(HelloError::Differs(Name::parse("example.org").unwrap()));
    assert_eq!(check(&hello("example.org"), "example.net"), differs);
    assert_eq!(check(&hello("example.org"), "www.example.org"), differs);
    assert_eq!(check(&hello("example.org"), "93.184.216.34"), differs);
    assert_eq!(check(&hello("93.184.216.34"), "93.184.216.34"), Ok(true));
    assert_eq!(check(&hello("93.184.216.34"), "example.org"), Err(HelloError::NoName));
}

#[test]
fn hostile_hellos_are_refused() {
    let with = |names: &[&[u8]]| raw_hello(&[sni(names), algorithms()], 16_000);
    assert_eq!(check(&with(&[b"Example.org"]), "example.org"), Ok(true));
    assert_eq!(check(&raw_hello(&[algorithms()], 16_000), "example.org"), Err(HelloError::NoName));
    assert_eq!(check(&with(&[b"127.0.0.1"]), "example.org"), Err(HelloError::NoName));
    let malformed: &[&[&[u8]]] = &[
        &[],
        &[b""],
        &[b"example.org", b"evil.net"],
        &[b"example.org", b"example.org"],
        &[b"evil.net\0example.org"],
        &[b"example.org\r\n"],
        &["ex\u{430}mple.org".as_bytes()],
        &[b"*.example.org"],
    ];
    for names in malformed {
        assert!(matches!(check(&with(names), "example.org"), Err(HelloError::Malformed(_))), "{names:?}");
    }
    assert!(check(&with(&[b"example.org."]), "example.org").is_err());
    let twice = raw_hello(&[sni(&[b"example.org"]), algorithms(), sni(&[b"evil.net"])], 16_000);
    assert!(matches!(check(&twice, "example.org"), Err(HelloError::Malformed(_))));
    assert!(matches!(check(&twice, "evil.net"), Err(HelloError::Malformed(_))));
    for not_tls in
        [&b"GET / HTTP/1.1\r\n"[..], b"SSH-2.0-x\r\n", b"\x80\x2e\x01\x03\x01", b"\x17\x03\x03\x00\x01a"]
    {
        assert_eq!(check(not_tls, "example.org"), Err(HelloError::NotTls));
    }
    // An application record, an alert, a ServerHello where the ClientHello should be.
    assert!(matches!(check(&[22, 3, 1, 0, 4, 2, 0, 0, 0], "example.org"), Err(HelloError::Malformed(_))));
    // The outer name counts when there is an encrypted ClientHello (extension 0xfe0d).
    let sealed = [&[0, 0, 1, 0, 1, 7, 0, 32][..], &[9; 32], &[0, 16], &[9; 16]].concat();
    let ech = |outer: &[u8]| raw_hello(&[sni(&[outer]), algorithms(), (0xfe0d, sealed.clone())], 16_000);
    assert_eq!(check(&ech(b"example.org"), "example.org"), Ok(true));
    assert!(matches!(check(&ech(b"evil.net"), "example.org"), Err(HelloError::Differs(_))));
}

#[test]
fn a_hello_without_end_is_refused() {
    let padding = (21, vec![0; 40_000]);
    let long = raw_hello(&[sni(&[b"example.org"]), algorithms(), padding], 4_000);
    let mut reader = HelloReader::default();
    let host = Host::parse("example.org").unwrap();
    let found = long.chunks(1_000).map(|part| reader.feed(part, &host)).find(|found| *found != Ok(false));
    assert_eq!(found, Some(Err(HelloError::TooLarge)));
    // Records without content never complete it either.
    let mut reader = HelloReader::default();
    let empty = [22, 3, 1, 0, 0].repeat(1_000);
    let found = (0..20).map(|_| reader.feed(&empty, &host)).find(|found| *found != Ok(false));
    assert!(matches!(found, Some(Err(_))), "{found:?}");
}

proptest! {
    /// However the hello is cut into records and reads, the verdict is the same.
    #[test]
    fn cuts_change_nothing(record in 1usize..200, step in 1usize..200, good in any::<bool>()) {
        let bytes = raw_hello(&[sni(&[b"example.org"]), algorithms()], record);
        let host = Host::parse(if good { "example.org" } else { "example.net" }).unwrap();
        let mut reader = HelloReader::default();
        let verdict = bytes.chunks(step).map(|part| reader.feed(part, &host)).find(|v| *v != Ok(false));
        prop_assert_eq!(verdict.map(|v| v.is_ok()), Some(good));
    }

    #[test]
    fn any_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let mut record = vec![22, 3, 1, 1, 0x90];
        record.extend(&bytes);
        let _ = check(&record, "example.org");
        let mut cut = hello("example.org");
        for (at, byte) in bytes.iter().enumerate() {
            let place = (usize::from(*byte) * 7 + at) % cut.len();
            cut[place] ^= byte;
        }
        let _ = check(&cut, "example.org");
    }
}
