use super::*;
use proptest::prelude::*;

fn rules(json: &str) -> EgressRules {
    serde_json::from_str(json).unwrap()
}

fn to(text: &str) -> Destination {
    Destination::parse(text, NonZeroU16::new(443)).unwrap()
}

fn stream(rules: &EgressRules, text: &str) -> Result<(usize, Way), Refusal> {
    decide(rules, &to(text), Asked::Stream).map(|allow| (allow.rule, allow.way))
}

fn get(rules: &EgressRules, text: &str, method: &str, path: &str) -> Result<usize, Refusal> {
    decide(rules, &to(text), Asked::Request { inside: Inside::Clear, method, path }).map(|allow| allow.rule)
}

#[test]
fn nothing_is_allowed_by_nothing() {
    let refused = stream(&EgressRules::default(), "example.org");
    assert_eq!(refused, Err(Refusal::Host { destination: to("example.org") }));
}

#[test]
fn the_rule_that_decides_is_named() {
    let rules = rules(
        r#"[{"host": "*.example.org"},
            {"host": "api.example.org", "methods": ["GET"]},
            {"host": "mail.example.org", "protocol": "tcp", "ports": [993, 587]},
            {"host": "plain.example.org", "protocol": "http"},
            {"host": "both.example.org", "paths": ["/v1/*"]},
            {"host": "both.example.org"}]"#,
    );
    assert_eq!(stream(&rules, "www.example.org"), Ok((0, Way::Tls)));
    // The exact rule hides the star for this host and port, and cannot be kept without looking inside.
    assert_eq!(stream(&rules, "api.example.org"), Ok((1, Way::EndTls)));
    assert_eq!(stream(&rules, "mail.example.org:993"), Ok((2, Way::Tcp)));
    // For port 443 no exact rule speaks, so the star does.
    assert_eq!(stream(&rules, "mail.example.org:443"), Ok((0, Way::Tls)));
    assert_eq!(stream(&rules, "plain.example.org:80"), Ok((3, Way::Http)));
    // One of two rules allows everything: there is nothing to look for inside.
    assert_eq!(stream(&rules, "both.example.org"), Ok((5, Way::Tls)));
    assert_eq!(
        stream(&rules, "www.example.org:8443"),
        Err(Refusal::Port { destination: to("www.example.org:8443") })
    );
    assert_eq!(stream(&rules, "example.org"), Err(Refusal::Host { destination: to("example.org") }));
    assert!(matches!(get(&rules, "www.example.org", "GET", "/"), Err(Refusal::Protocol { rule: 0, .. })));
}

#[test]
fn requests_are_held_to_methods_and_paths() {
    let rules = rules(
        r#"[{"host": "h.example.org", "protocol": "http", "methods": ["GET", "POST"], "paths": ["/v1/messages", "/v1/files/*"]},
            {"host": "h.example.org", "protocol": "http", "methods": ["DELETE"], "paths": ["/v1/jobs/*"]},
            {"host": "any.example.org", "protocol": "http"}]"#,
    );
    let ask = |method, path| get(&rules, "h.example.org:80", method, path);
    for (method, path, expected) in [
        ("GET", "/v1/messages", 0),
        ("GET", "/v1/messages?a=/../b//c", 0),
        ("POST", "/v1/files/", 0),
        ("POST", "/v1/files/a/b", 0),
        ("POST", "/v1/files/b%20c/%C3%A9", 0),
        ("DELETE", "/v1/jobs/7", 1),
    ] {
        assert_eq!(ask(method, path), Ok(expected), "{method} {path}");
    }
    for path in
        ["/", "/v1/messages/", "/v1/messages/x", "/v1/Messages", "/v1/files", "/v1/filesystem", "/v1/jobs/7"]
    {
        assert!(matches!(ask("GET", path), Err(Refusal::Path { .. })), "{path}");
    }
    for path in [
        "/v1/files/../admin",
        "/v1/files/..",
        "/v1/files/./a",
        "/v1/files//a",
        "//v1/files/a",
        "/v1/files/%2e%2e/a",
        "/v1/files/%2E./a",
        "/v1/files/a%2fb",
        "/v1/files/a%2Fb",
        "/v1/files/a%5cb",
        "/v1/files/a\\b",
        "/v1/files/..;/admin",
        "/v1/files/%3b",
        "/v1/files/%252e",
        "/v1/files/%00",
        "/v1/files/%0d%0a",
        "/v1/files/%",
        "/v1/files/%4",
        "/v1/files/%zz",
        "/v1/files/%41",
        "/v1/files/%3f",
        "*",
        "v1/files/a",
    ] {
        assert!(matches!(ask("GET", path), Err(Refusal::AmbiguousPath { .. })), "{path}");
    }
    for method in ["TRACE", "CONNECT", "get", "PUT", ""] {
        assert!(matches!(ask(method, "/v1/messages"), Err(Refusal::Method { .. })), "{method}");
    }
    // Without paths in the rule the path decides nothing, so it may be anything.
    assert_eq!(get(&rules, "any.example.org:80", "PATCH", "//..;/%2f"), Ok(2));
    for method in ["TRACE", "CONNECT"] {
        assert!(matches!(get(&rules, "any.example.org:80", method, "/"), Err(Refusal::Method { .. })));
    }
}

#[test]
fn rules_that_cannot_be_meant_are_refused_all_at_once() {
    let wrong = |json: &str| {
        let list: Vec<Rule> = serde_json::from_str(json).unwrap();
        EgressRules::new(list).unwrap_err().0
    };
    let errors = wrong(
        r#"[{"host": "a.example.org", "protocol": "tcp"},
            {"host": "a.example.org", "protocol": "tcp", "ports": [1], "methods": ["GET"]},
            {"host": "a.example.org", "methods": ["get", "TRACE", ""]},
            {"host": "a.example.org", "paths": ["v1", "/a/../b", "/a*", "/*/b", "/a//b", "/a?b"]},
            {"host": "*.example.org", "reach": "private"},
            {"host": "192.168.1.1"},
            {"host": "0.0.0.0", "reach": "private"},
            {"host": "a.example.org", "protocol": "http", "ports": [443]}]"#,
    );
    let count = |test: fn(&RuleError) -> bool| errors.iter().filter(|e| test(e)).count();
    assert_eq!(count(|e| matches!(e, RuleError::NoPort { rule: 0, .. })), 1);
    assert_eq!(count(|e| matches!(e, RuleError::OpaqueRequest { rule: 1, .. })), 1);
    assert_eq!(count(|e| matches!(e, RuleError::Method { rule: 2, .. })), 3);
    assert_eq!(count(|e| matches!(e, RuleError::Path { rule: 3, .. })), 6);
    assert_eq!(count(|e| matches!(e, RuleError::PrivateStar { rule: 4, .. })), 1);
    assert_eq!(count(|e| matches!(e, RuleError::NeedsPrivate { rule: 5, .. })), 1);
    assert_eq!(count(|e| matches!(e, RuleError::NoReach { rule: 6, .. })), 1);
    assert_eq!(count(|e| matches!(e, RuleError::Conflict { first: 2, second: 7, .. })), 1);
    assert_eq!(errors.len(), 15, "{errors:#?}");
    let conflict = wrong(r#"[{"host": "nas"}, {"host": "nas", "reach": "private"}]"#);
    assert!(matches!(conflict[..], [RuleError::Conflict { first: 0, second: 1, .. }]));
    for json in
        [r#"[{"host": "*.com"}]"#, r#"[{"host": "a", "port": 1}]"#, r#"[{"host": "a", "ports": [0]}]"#]
    {
        assert!(serde_json::from_str::<EgressRules>(json).is_err(), "{json}");
    }
}

fn some_rules() -> impl Strategy<Value = EgressRules> {
    let host = prop_oneof![
        Just("a.example.org"),
        Just("b.example.org"),
        Just("*.example.org"),
        Just("c.d.example.net"),
        Just("*.d.example.net"),
        Just("93.184.216.34"),
        Just("nas"),
    ];
    let protocol = prop_oneof![Just(Protocol::Https), Just(Protocol::Http), Just(Protocol::Tcp)];
    let ports = proptest::collection::vec((1u16..4).prop_map(|p| NonZeroU16::new(p).unwrap()), 1..3);
    let rule = (host, protocol, ports).prop_map(|(host, protocol, ports)| Rule {
        host: host.parse().unwrap(),
        protocol,
        ports,
        methods: vec![],
        paths: vec![],
        reach: Reach::Public,
    });
    proptest::collection::vec(rule, 0..6)
        .prop_filter_map("rules that agree", |list| EgressRules::new(list).ok())
}

proptest! {
    /// What is allowed, a rule names: host and port. And removing rules never allows more from a star's host.
    #[test]
    fn allowed_means_a_rule_names_it(
        rules in some_rules(),
        host in "(a|b|c|d|evil)(\\.(example|d|evilexample)){0,2}(\\.(org|net))?|93\\.184\\.216\\.3[45]|nas",
        port in 1u16..5,
    ) {
        let destination = Destination::new(Host::parse(&host).unwrap(), port).unwrap();
        match decide(&rules, &destination, Asked::Stream) {
            Ok(allow) => {
                let rule = &rules.as_slice()[allow.rule];
                prop_assert!(rule.host.matches(&destination.host));
                prop_assert!(rule.ports.contains(&destination.port));
            }
            Err(_) => {
                let named = |r: &Rule| r.host.matches(&destination.host) && r.ports.contains(&destination.port);
                prop_assert!(!rules.as_slice().iter().any(named));
            }
        }
    }

    /// An independent reading of a path: after one round of decoding and removing dots, it is still itself.
    #[test]
    fn a_path_with_one_reading_does_not_move(path in "/([a-c]|/|\\.|%2[eEfF]|%5c|;|%[0-9a-f]{2}){0,12}") {
        if has_one_reading(&path) {
            let mut decoded = Vec::new();
            let mut rest = path.bytes();
            while let Some(byte) = rest.next() {
                decoded.push(if byte == b'%' {
                    let digits = [rest.next().unwrap(), rest.next().unwrap()];
                    u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap()
                } else { byte });
            }
            let count = |bytes: &[u8]| bytes.iter().filter(|b| **b == b'/').count();
            prop_assert_eq!(count(&decoded), count(path.as_bytes()));
            prop_assert!(!decoded.contains(&b'\\') && !decoded.contains(&0));
            prop_assert!(!decoded.split(|b| *b == b'/').any(|s| s == b"." || s == b".."));
        }
    }
}
