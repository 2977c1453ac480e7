use super::*;
use crate::name::Host;
use proptest::prelude::*;
use std::num::NonZeroU16;

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
            {"host": "api.example.net", "methods": ["GET"]},
            {"host": "mail.example.org", "protocol": "tcp", "ports": [993, 587]},
            {"host": "plain.example.org", "protocol": "http"},
            {"host": "both.example.net", "paths": ["/v1/*"]},
            {"host": "both.example.net"}]"#,
    );
    assert_eq!(stream(&rules, "www.example.org"), Ok((0, Way::Tls)));
    // Cannot be kept without looking inside.
    assert_eq!(stream(&rules, "api.example.net"), Ok((1, Way::EndTls)));
    assert_eq!(stream(&rules, "mail.example.org:993"), Ok((2, Way::Tcp)));
    // For port 443 no exact rule speaks, so the star does.
    assert_eq!(stream(&rules, "mail.example.org:443"), Ok((0, Way::Tls)));
    assert_eq!(stream(&rules, "plain.example.org:80"), Ok((3, Way::Http)));
    // One of two rules allows everything: there is nothing to look for inside.
    assert_eq!(stream(&rules, "both.example.net"), Ok((5, Way::Tls)));
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
        bytes_per_day: None,
        secret: None,
        reach: Reach::Public,
    });
    proptest::collection::vec(rule, 0..6)
        .prop_filter_map("rules that agree", |list| EgressRules::new(list).ok())
}

proptest! {
    /// What is allowed, a rule names: host and port. And without some of the rules nothing more is allowed.
    #[test]
    fn allowed_means_a_rule_names_it(
        rules in some_rules(),
        host in "(a|b|c|d|evil)(\\.(example|d|evilexample)){0,2}(\\.(org|net))?|93\\.184\\.216\\.3[45]|nas",
        port in 1u16..5,
        kept in proptest::collection::vec(any::<bool>(), 6),
    ) {
        let destination = Destination::new(Host::parse(&host).unwrap(), port).unwrap();
        let fewer = rules.as_slice().iter().zip(&kept).filter(|(_, kept)| **kept).map(|(rule, _)| rule.clone());
        let fewer = EgressRules::new(fewer.collect()).unwrap();
        if let Ok(allow) = decide(&fewer, &destination, Asked::Stream) {
            let before = decide(&rules, &destination, Asked::Stream).unwrap();
            prop_assert_eq!((before.way, before.reach), (allow.way, allow.reach));
        }
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
}
