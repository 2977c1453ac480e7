use super::*;
use proptest::prelude::*;

fn proxy(head: &str) -> Result<Request, HeadError> {
    match head_end(head.as_bytes(), 0)? {
        Some(end) => parse_proxy(&head.as_bytes()[..end]),
        None => Err(HeadError::Truncated),
    }
}

fn inside(head: &str) -> Result<Request, HeadError> {
    let destination = Destination::parse("example.org:80", None).unwrap();
    match head_end(head.as_bytes(), 0)? {
        Some(end) => parse_inside(&head.as_bytes()[..end], &destination, Inside::Clear),
        None => Err(HeadError::Truncated),
    }
}

fn answer(head: &str, method: &str) -> Result<Response, HeadError> {
    match head_end(head.as_bytes(), 0)? {
        Some(end) => parse_response(&head.as_bytes()[..end], method),
        None => Err(HeadError::Truncated),
    }
}

#[test]
fn requests_with_one_reading() {
    for (head, kind, to, path) in [
        (
            "CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n",
            Kind::Connect,
            "example.org:443",
            "",
        ),
        (
            "CONNECT Example.ORG:443 HTTP/1.1\r\nhost: example.org\r\n\r\n",
            Kind::Connect,
            "example.org:443",
            "",
        ),
        ("CONNECT example.org:443 HTTP/1.0\r\n\r\n", Kind::Connect, "example.org:443", ""),
        (
            "CONNECT [2606:4700::1]:443 HTTP/1.1\r\nHost: [2606:4700::1]:443\r\n\r\n",
            Kind::Connect,
            "[2606:4700::1]:443",
            "",
        ),
        (
            "GET http://example.org/a/b?c HTTP/1.1\r\nHost: example.org\r\n\r\n",
            Kind::Forward,
            "example.org:80",
            "/a/b?c",
        ),
        (
            "GET HTTP://example.org:8080 HTTP/1.1\r\nHost: example.org:8080\r\n\r\n",
            Kind::Forward,
            "example.org:8080",
            "/",
        ),
        (
            "GET http://example.org?q=http://x/ HTTP/1.1\r\nHost: example.org:80\r\n\r\n",
            Kind::Forward,
            "example.org:80",
            "/?q=http://x/",
        ),
        (
            "GET http://example.org/@evil.example/ HTTP/1.0\r\n\r\n",
            Kind::Forward,
            "example.org:80",
            "/@evil.example/",
        ),
    ] {
        let found = proxy(head).unwrap_or_else(|error| panic!("{head:?}: {error}"));
        assert_eq!(
            (found.kind, found.destination.to_string().as_str(), found.path.as_str()),
            (kind, to, path)
        );
    }
}

#[test]
fn hostile_requests_are_refused_and_said_why() {
    use HeadError::*;
    use NameError::*;
    let with_host = |target: &str| format!("GET {target} HTTP/1.1\r\nHost: example.org\r\n\r\n");
    let with =
        |fields: &str| format!("POST http://example.org/ HTTP/1.1\r\nHost: example.org\r\n{fields}\r\n");
    let many = "A: b\r\n".repeat(101);
    let long = format!("A: {}\r\n", "b".repeat(HEAD_MAX_BYTES));
    let cases: Vec<(String, HeadError)> = vec![
        // CONNECT
        ("CONNECT example.org HTTP/1.1\r\nHost: example.org\r\n\r\n".into(), TargetHost(PortMissing)),
        ("CONNECT example.org:0 HTTP/1.1\r\nHost: example.org\r\n\r\n".into(), TargetHost(Port)),
        ("CONNECT example.org:443/ HTTP/1.1\r\nHost: example.org\r\n\r\n".into(), TargetHost(Port)),
        ("CONNECT user@example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n".into(), TargetHost(Character)),
        ("CONNECT http://example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n".into(), TargetHost(Port)),
        ("CONNECT 0x7f.1:443 HTTP/1.1\r\nHost: 0x7f.1\r\n\r\n".into(), TargetHost(Disguised)),
        ("CONNECT example.org.:443 HTTP/1.1\r\nHost: example.org\r\n\r\n".into(), TargetHost(TrailingDot)),
        (
            "CONNECT evil.net%00.example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n".into(),
            TargetHost(Character),
        ),
        ("CONNECT [::ffff:7f00:1]:443 HTTP/1.1\r\nHost: example.org\r\n\r\n".into(), TargetHost(Embedded)),
        ("CONNECT example.org:443 HTTP/1.1\r\nHost: evil.net:443\r\n\r\n".into(), HostDiffers),
        ("CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:444\r\n\r\n".into(), HostDiffers),
        ("CONNECT example.org:443 HTTP/1.1\r\n\r\n".into(), HostMissing),
        (
            "CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\nContent-Length: 5\r\n\r\nGET /".into(),
            Length,
        ),
        ("connect example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n".into(), Form),
        // The target
        (with_host("/path"), Form),
        (with_host("*"), Form),
        (with_host("example.org"), Form),
        (with_host("https://example.org/"), Scheme),
        (with_host("ftp://example.org/"), Scheme),
        (with_host("http://user:secret@example.org/"), TargetHost(Port)),
        (with_host("http://user@example.org/"), TargetHost(Character)),
        (with_host("http://example.org/#a"), Target),
        (with_host("http://example.org\\@evil.net/"), Target),
        (with_host("http://evil.net#@example.org/"), Target),
        (with_host("http:///path"), TargetHost(Empty)),
        (with_host("http://evil.net/"), HostDiffers),
        (with_host("http://example.org:8080/"), HostDiffers),
        (with_host("http://ex\u{e4}mple.org/"), Target),
        ("OPTIONS http://example.org HTTP/1.1\r\nHost: example.org\r\n\r\n".into(), Form),
        // Host
        ("GET http://example.org/ HTTP/1.1\r\n\r\n".into(), HostMissing),
        (with("Host: example.org\r\n"), HostTwice),
        (with("hOST: evil.net\r\n"), HostTwice),
        ("GET http://example.org/ HTTP/1.1\r\nHost: example.org, evil.net\r\n\r\n".into(), HostDiffers),
        ("GET http://example.org/ HTTP/1.1\r\nHost:\r\n\r\n".into(), HostDiffers),
        ("GET http://example.org/ HTTP/1.1\r\nHost: example.org@evil.net\r\n\r\n".into(), HostDiffers),
        // Where the body ends
        (with("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"), Length),
        (with("Content-Length: 5\r\nContent-Length: 5\r\n"), Length),
        (with("Content-Length: 5, 5\r\n"), Length),
        (with("Content-Length: +5\r\n"), Length),
        (with("Content-Length: 0x5\r\n"), Length),
        (with("Content-Length: -0\r\n"), Length),
        (with("Content-Length: 5 5\r\n"), Length),
        (with("Content-Length:\r\n"), Length),
        (with("Content-Length: 18446744073709551616\r\n"), Length),
        (with("Transfer-Encoding: gzip, chunked\r\n"), TransferEncoding),
        (with("Transfer-Encoding: chunked, chunked\r\n"), TransferEncoding),
        (with("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n"), TransferEncoding),
        (with("Transfer-Encoding: xchunked\r\n"), TransferEncoding),
        (with("Transfer-Encoding: \"chunked\"\r\n"), TransferEncoding),
        (with("Transfer-Encoding:\r\n"), TransferEncoding),
        ("POST http://example.org/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n".into(), TransferEncoding),
        (with("Expect: the-unexpected\r\n"), Expect),
        // Lines
        ("GET http://example.org/ HTTP/1.1\nHost: example.org\n\n".into(), LineEnd),
        ("GET http://example.org/ HTTP/1.1\r\nHost: example.org\n\r\n".into(), LineEnd),
        ("GET http://example.org/ HTTP/1.1\r\nHost: example.org\rX: y\r\n\r\n".into(), LineEnd),
        (with("X: a\r\n b\r\n"), Grammar("a field name is wrong, or a line is folded")),
        (with("X: a\r\n\tb\r\n"), Grammar("a field name is wrong, or a line is folded")),
        (with(" X: a\r\n"), Grammar("a field name is wrong, or a line is folded")),
        (with("Content-Length : 5\r\n"), Grammar("a field name is wrong, or a line is folded")),
        (with("Content\0Length: 5\r\n"), Grammar("a field name is wrong, or a line is folded")),
        (with(": 5\r\n"), Grammar("a field name is wrong, or a line is folded")),
        (with("no colon\r\n"), Grammar("a field name is wrong, or a line is folded")),
        (with("X: a\0b\r\n"), Grammar("a field value is wrong")),
        (
            "\r\nGET http://example.org/ HTTP/1.1\r\nHost: example.org\r\n\r\n".into(),
            Grammar("the first byte is no method's"),
        ),
        (
            " GET http://example.org/ HTTP/1.1\r\nHost: example.org\r\n\r\n".into(),
            Grammar("the first byte is no method's"),
        ),
        (
            "GET  http://example.org/ HTTP/1.1\r\nHost: example.org\r\n\r\n".into(),
            Grammar("the first line is wrong"),
        ),
        (
            "GET\thttp://example.org/ HTTP/1.1\r\nHost: example.org\r\n\r\n".into(),
            Grammar("the first line is wrong"),
        ),
        (
            "GET http://example.org/ HTTP/2.0\r\nHost: example.org\r\n\r\n".into(),
            Grammar("the version is neither 1.0 nor 1.1"),
        ),
        (
            "GET http://example.org/ HTTP/1.2\r\nHost: example.org\r\n\r\n".into(),
            Grammar("the version is neither 1.0 nor 1.1"),
        ),
        ("GET http://example.org/\r\nHost: example.org\r\n\r\n".into(), Grammar("the first line is wrong")),
        (
            "GET http://example.org/ HTTP/1.1 \r\nHost: example.org\r\n\r\n".into(),
            Grammar("the first line is wrong"),
        ),
        (with(&many), TooLarge),
        (with(&long), TooLarge),
        ("GET http://example.org/ HTTP/1.1\r\nHost: exa".into(), Truncated),
    ];
    for (head, why) in cases {
        match (proxy(&head), why) {
            // Which word httparse has for a broken first line is its own affair.
            (Err(Grammar(_)), Grammar("the first line is wrong")) => {}
            (found, why) => assert_eq!(found, Err(why), "{:?}", &head[..head.len().min(200)]),
        }
    }
}

#[test]
fn inside_a_known_connection_only_that_host_is_named() {
    let good = inside("GET /a?b HTTP/1.1\r\nHost: example.org\r\n\r\n").unwrap();
    assert_eq!((good.path.as_str(), good.destination.to_string().as_str()), ("/a?b", "example.org:80"));
    for (head, why) in [
        ("GET / HTTP/1.1\r\nHost: evil.net\r\n\r\n", HeadError::HostDiffers),
        ("GET http://example.org/ HTTP/1.1\r\nHost: example.org\r\n\r\n", HeadError::Form),
        ("CONNECT example.org:80 HTTP/1.1\r\nHost: example.org\r\n\r\n", HeadError::Form),
        ("CONNECT /x HTTP/1.1\r\nHost: example.org\r\n\r\n", HeadError::Form),
        ("OPTIONS * HTTP/1.1\r\nHost: example.org\r\n\r\n", HeadError::Form),
        ("GET / HTTP/1.1\r\n\r\n", HeadError::HostMissing),
    ] {
        assert_eq!(inside(head), Err(why), "{head:?}");
    }
}

#[test]
fn the_port_that_may_be_left_out_is_the_scheme_s() {
    let head = b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n";
    let to = |port| Destination::new(crate::name::Host::parse("example.org").unwrap(), port).unwrap();
    for (port, inside, good) in [
        (80, Inside::Clear, true),
        (443, Inside::Tls, true),
        (443, Inside::Clear, false),
        (80, Inside::Tls, false),
    ] {
        let found = parse_inside(head, &to(port), inside);
        assert_eq!(found.is_ok(), good, "{port} {inside:?}");
        if let Ok(request) = found {
            assert!(request.to_host().starts_with(b"GET / HTTP/1.1\r\nHost: example.org\r\n"));
        }
    }
}

#[test]
fn what_belongs_to_one_connection_stays_there() {
    let request = proxy(
        "POST http://example.org:81/a HTTP/1.1\r\nProxy-Authorization: Basic c2VjcmV0\r\nProxy-Connection: keep-alive\r\n\
         Host: EXAMPLE.org:81\r\nConnection: Keep-Alive, X-Hop , upgrade\r\nKeep-Alive: 5\r\nX-Hop: 1\r\nTE: trailers\r\n\
         Upgrade: websocket\r\nTrailer: X\r\nTransfer-Encoding: Chunked\r\nAccept: */*\r\n\r\n",
    )
    .unwrap();
    assert!(request.keep_alive);
    assert_eq!(
        String::from_utf8(request.to_host()).unwrap(),
        "POST /a HTTP/1.1\r\nHost: example.org:81\r\nAccept: */*\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    );
    let answer = answer(
        "HTTP/1.1 200 OK\r\nConnection: X-Hop\r\nX-Hop: 1\r\nProxy-Authenticate: Basic\r\nContent-Length: 3\r\nETag: \"a\"\r\n\r\n",
        "GET",
    )
    .unwrap();
    assert_eq!(
        String::from_utf8(answer.to_agent(true, Version::Http11)).unwrap(),
        "HTTP/1.1 200 OK\r\nETag: \"a\"\r\nContent-Length: 3\r\nConnection: keep-alive\r\n\r\n"
    );
}

#[test]
fn answers() {
    for (head, method, body) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", "GET", Length::Bytes(3)),
        ("HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n", "GET", Length::Chunked),
        ("HTTP/1.0 200 OK\r\n\r\n", "GET", Length::UntilClose),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", "HEAD", Length::Bytes(0)),
        ("HTTP/1.1 204 No Content\r\n\r\n", "GET", Length::Bytes(0)),
        ("HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n", "GET", Length::Bytes(0)),
        ("HTTP/1.1 100 Continue\r\n\r\n", "POST", Length::Bytes(0)),
    ] {
        assert_eq!(answer(head, method).unwrap().body, body, "{head:?}");
    }
    for (head, why) in [
        ("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n", HeadError::Upgrade),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", HeadError::Length),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n", HeadError::Length),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", HeadError::TransferEncoding),
        ("HTTP/1.1 200 OK\nContent-Length: 3\n\n", HeadError::LineEnd),
        ("HTTP/1.1 999 Odd\r\n\r\n", HeadError::Grammar("a status outside 100 to 599")),
    ] {
        assert_eq!(answer(head, "GET"), Err(why), "{head:?}");
    }
    assert!(answer("HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n", "GET").is_err(), "a folded line");
    assert!(answer("SSH-2.0-x\r\n\r\n", "GET").is_err());
}

proptest! {
    /// What we write, we read as the same request: nothing hides in a field that another reader would find.
    #[test]
    fn what_is_passed_on_has_the_meaning_that_was_decided(
        method in "[A-Z]{1,7}",
        path in "/[!-\"$-\\[\\]-~]{0,20}",
        fields in proptest::collection::vec(("[!#$%&'*+.^_`|~0-9A-Za-z-]{1,12}", "[ -~\t\u{e4}]{0,12}"), 0..5),
        body in prop_oneof![Just(""), Just("Content-Length: 7\r\n"), Just("Transfer-Encoding: chunked\r\n")],
    ) {
        let fields: String = fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let head = format!("{method} http://example.org{path} HTTP/1.1\r\nHost: example.org\r\n{fields}{body}\r\n");
        if let Ok(request) = proxy(&head) && request.kind == Kind::Forward {
            let wire = request.to_host();
            prop_assert_eq!(head_end(&wire, 0), Ok(Some(wire.len())));
            let again = parse_inside(&wire, &request.destination, Inside::Clear).unwrap();
            prop_assert!(!again.keep_alive);
            prop_assert_eq!(Request { keep_alive: request.keep_alive, ..again }, request);
        }
    }

    #[test]
    fn any_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = parse_proxy(&bytes);
        let _ = parse_response(&bytes, "GET");
    }

    /// The end is found whatever the pieces in which the head arrives.
    #[test]
    fn the_end_does_not_depend_on_pieces(bytes in "[a-c\r\n]{0,30}", cut in 0usize..30) {
        let bytes = bytes.as_bytes();
        let cut = cut.min(bytes.len());
        let whole = head_end(bytes, 0);
        match head_end(&bytes[..cut], 0) {
            Ok(None) => prop_assert_eq!(head_end(bytes, cut), whole),
            early => prop_assert_eq!(early, whole),
        }
    }
}
