use super::*;
use proptest::prelude::*;

#[test]
fn names_that_are_names() {
    let long_label = "a".repeat(63);
    let longest = format!("{long_label}.{long_label}.{long_label}.{}", "a".repeat(61));
    assert_eq!(longest.len(), 253);
    for (text, expected) in [
        ("example.org", "example.org"),
        ("API.Example.ORG", "api.example.org"),
        ("nas", "nas"),
        ("1password.com", "1password.com"),
        ("4.example", "4.example"),
        // Content networks have hyphens where IDNA has its prefix.
        ("r3---sn-4g5e6nz7.googlevideo.com", "r3---sn-4g5e6nz7.googlevideo.com"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("0xcafe.example", "0xcafe.example"),
        ("example.0xyz", "example.0xyz"),
        (&longest, &longest),
    ] {
        assert_eq!(Name::parse(text).as_ref().map(Name::as_str), Ok(expected));
    }
}

#[test]
fn hostile_names_are_refused_and_said_why() {
    use NameError::*;
    let long = format!("{}.example", "a".repeat(64));
    let longer = vec!["abcdefgh"; 29].join(".");
    for (text, why) in [
        ("", Empty),
        (".", TrailingDot),
        ("example.org.", TrailingDot),
        ("example..org", Label),
        (".example.org", Label),
        (&long, Label),
        (&longer, TooLong),
        ("-a.example", Hyphen),
        ("a-.example", Hyphen),
        ("attacker.net\0.example.org", Character),
        ("attacker.net%00.example.org", Character),
        ("attacker.net\r\n.example.org", Character),
        ("attacker.net/.example.org", Character),
        ("attacker.net#.example.org", Character),
        ("attacker.net?.example.org", Character),
        ("attacker.net\\.example.org", Character),
        ("user@example.org", Character),
        ("example.org:443", Character),
        (" example.org", Character),
        ("example.org\t", Character),
        ("exa_mple.org", Character),
        ("*.example.org", Character),
        ("ex\u{430}mple.org", NotAscii),
        ("example\u{3002}org", NotAscii),
        ("exam\u{ad}ple.org", NotAscii),
        ("\u{ff11}27.0.0.1", NotAscii),
        ("0x7f.1", Disguised),
        ("0x7f000001", Disguised),
        ("0X7F000001", Disguised),
        ("0x", Disguised),
        ("2130706433", Disguised),
        ("017700000001", Disguised),
        ("127.1", Disguised),
        ("127.0.1", Disguised),
        ("0177.0.0.1", Disguised),
        ("127.0.0.01", Disguised),
        ("127.0.0.256", Disguised),
        ("1.2.3.4.5", Disguised),
        ("a.b.c.9", Disguised),
        ("example.0x1f", Disguised),
    ] {
        assert_eq!(Host::parse(text), Err(why), "{text:?}");
    }
}

#[test]
fn addresses_have_one_spelling() {
    let v4 = |text: &str| Host::Address(text.parse::<Ipv4Addr>().unwrap().into());
    let v6 = |text: &str| Host::Address(text.parse::<Ipv6Addr>().unwrap().into());
    assert_eq!(Host::parse("127.0.0.1"), Ok(v4("127.0.0.1")));
    assert_eq!(Host::parse("[::1]"), Ok(v6("::1")));
    assert_eq!(Host::parse("[2001:DB8:0:0::1]"), Ok(v6("2001:db8::1")));
    for text in [
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[64:ff9b:1::7f00:1]",
        "[2002:7f00:1::]",
        "[2001:0:4136:e378:8000:63bf:3fff:fdd2]",
        "[::ffff:0:127.0.0.1]",
    ] {
        assert_eq!(Host::parse(text), Err(NameError::Embedded), "{text}");
    }
    for text in ["[::1", "[fe80::1%eth0]", "[fe80::1%25eth0]", "[]", "[127.0.0.1]", "[v1.x]", "[::1]]"] {
        assert_eq!(Host::parse(text), Err(NameError::Ipv6), "{text}");
    }
    assert_eq!(Host::parse("::1"), Err(NameError::Character));
}

#[test]
fn destinations() {
    let http = NonZeroU16::new(80);
    for (text, default, expected) in [
        ("example.org:443", None, Ok("example.org:443")),
        ("EXAMPLE.org", http, Ok("example.org:80")),
        ("[2001:db8::1]:8443", None, Ok("[2001:db8::1]:8443")),
        ("[2001:db8::1]", http, Ok("[2001:db8::1]:80")),
        ("192.0.2.1:1", None, Ok("192.0.2.1:1")),
        ("example.org", None, Err(NameError::PortMissing)),
        ("example.org:", None, Err(NameError::Port)),
        ("example.org:", http, Err(NameError::Port)),
        ("example.org:0", None, Err(NameError::Port)),
        ("example.org:65536", None, Err(NameError::Port)),
        ("example.org:+80", None, Err(NameError::Port)),
        ("example.org:080", None, Err(NameError::Port)),
        ("example.org: 80", None, Err(NameError::Port)),
        ("example.org:80:80", None, Err(NameError::Port)),
        ("example.org:80\0", None, Err(NameError::Port)),
        ("user@example.org:80", None, Err(NameError::Character)),
        ("user:80@example.org:80", None, Err(NameError::Port)),
        ("[::1]x:80", None, Err(NameError::Ipv6)),
        ("a]:80", None, Err(NameError::Character)),
        (":80", None, Err(NameError::Empty)),
    ] {
        let found = Destination::parse(text, default).map(|d| d.to_string());
        assert_eq!(found, expected.map(str::to_owned), "{text:?}");
    }
}

proptest! {
    /// What is accepted prints as it is compared, and reads again as itself: there is no second spelling.
    #[test]
    fn parsing_is_idempotent(text in "[ -~]{0,40}|([a-zA-Z0-9-]{1,8}\\.){0,4}[a-zA-Z0-9-]{1,8}") {
        if let Ok(host) = Host::parse(&text) {
            prop_assert_eq!(Host::parse(&host.to_string()), Ok(host.clone()));
            let printed = host.to_string();
            let lower_ldh = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.' | b'[' | b']' | b':');
            prop_assert!(printed.bytes().all(lower_ldh), "{}", printed);
        }
    }

    /// No name of ours is an address to the C library's liberal reader: its last label is never a number.
    #[test]
    fn no_name_is_an_address(text in "(0x[0-9a-fA-F]{0,8}|[0-9]{1,10})(\\.(0x[0-9a-fA-F]{0,4}|[0-9]{1,4})){0,4}") {
        prop_assert!(Name::parse(&text).is_err());
    }

    #[test]
    fn any_bytes_do_not_panic(text in any::<String>(), port in proptest::option::of(1u16..)) {
        let _ = Destination::parse(&text, port.and_then(NonZeroU16::new));
    }
}
