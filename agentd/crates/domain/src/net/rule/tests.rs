use super::*;
use proptest::prelude::*;

fn line(json: &str) -> String {
    serde_json::from_str::<Rule>(json).unwrap().to_string()
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
            {"host": "*.example.net", "reach": "private"},
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
    assert_eq!(count(|e| matches!(e, RuleError::NoReach { rule: 6, .. })), 1);
    assert_eq!(count(|e| matches!(e, RuleError::Conflict { second: 7, .. })), 2);
    assert_eq!(errors.len(), 15, "{errors:#?}");
    let conflict = wrong(r#"[{"host": "nas"}, {"host": "nas", "reach": "private"}]"#);
    assert!(matches!(conflict[..], [RuleError::Conflict { first: 0, second: 1, .. }]));
    for json in
        [r#"[{"host": "*.com"}]"#, r#"[{"host": "a", "port": 1}]"#, r#"[{"host": "a", "ports": [0]}]"#]
    {
        assert!(serde_json::from_str::<EgressRules>(json).is_err(), "{json}");
    }
}

#[test]
fn a_secret_is_for_one_named_host_over_tls_and_in_a_field_of_its_own() {
    let rule = |host: &str, protocol: &str, header: &str, template: &str| {
        let json = format!(
            r#"[{{"host": "{host}", "protocol": "{protocol}", "ports": [443],
                 "secret": {{"name": "mail", "header": "{header}", "template": "{template}"}}}}]"#
        );
        EgressRules::new(serde_json::from_str(&json).unwrap()).map(drop).map_err(|errors| errors.0.len())
    };
    assert_eq!(rule("api.example.org", "https", "authorization", "Bearer {}"), Ok(()));
    for (host, protocol, header, template) in [
        ("*.example.org", "https", "authorization", "{}"),
        ("93.184.216.34", "https", "authorization", "{}"),
        ("api.example.org", "http", "authorization", "{}"),
        ("api.example.org", "https", "host", "{}"),
        ("api.example.org", "https", "Authorization", "{}"),
        ("api.example.org", "https", "x key", "{}"),
        ("api.example.org", "https", "x-key", "none"),
        ("api.example.org", "https", "x-key", "{} {}"),
        ("api.example.org", "https", "x-key", " {}"),
    ] {
        assert_eq!(rule(host, protocol, header, template), Err(1), "{host} {protocol} {header} {template}");
    }
}

#[test]
fn a_star_and_a_name_that_it_covers_are_not_accepted_together() {
    let rules = |json: &str| EgressRules::new(serde_json::from_str(json).unwrap());
    let both = rules(r#"[{"host": "*.example.org"}, {"host": "api.example.org", "methods": ["GET"]}]"#);
    assert!(matches!(both.unwrap_err().0[..], [RuleError::Overlap { first: 0, second: 1, .. }]));
    assert!(rules(r#"[{"host": "*.example.org"}, {"host": "api.example.org", "ports": [8443]}]"#).is_ok());
}

#[test]
fn a_rule_is_one_line_and_has_one_spelling() {
    assert_eq!(line(r#"{"host": "api.example.org"}"#), "https://api.example.org:443");
    let full = line(
        r#"{"host": "api.example.org", "ports": [443, 8443], "methods": ["GET", "POST"], "paths": ["/v1/*"],
            "bytes_per_day": 50000000,
            "secret": {"name": "mail", "header": "authorization", "template": "Bearer {}"}}"#,
    );
    assert_eq!(
        full,
        "https://api.example.org:443,8443 GET POST /v1/* bytes/day=50000000 secret=mail authorization: Bearer {}"
    );
    assert_eq!(full.parse::<Rule>().unwrap().to_string(), full);
    for bad in [
        "",
        "https://api.example.org",
        "https://API.example.org:443",
        "https://api.example.org:0443",
        "https://api.example.org:443 ",
        "https://api.example.org:443  GET",
        "https://api.example.org:443 /a GET",
        "https://*.com:443",
        "https://b\u{fc}cher.example:443",
        "https://\u{430}pi.example.org:443",
        "ftp://api.example.org:21",
        "tcp://mail.example.org:",
    ] {
        assert!(bad.parse::<Rule>().is_err(), "{bad}");
    }
}

#[test]
fn one_rule_is_within_another_when_it_allows_nothing_beyond() {
    let within =
        |inner: &str, outer: &str| inner.parse::<Rule>().unwrap().is_within(&outer.parse::<Rule>().unwrap());
    let outer = "https://*.example.org:443,8443 GET POST /v1/* bytes/day=100";
    assert!(within(outer, outer));
    assert!(within("https://api.example.org:443 GET /v1/a/* bytes/day=99", outer));
    for beyond in [
        "https://*.example.net:443 GET /v1/* bytes/day=1",
        "https://api.example.org:444 GET /v1/* bytes/day=1",
        "https://api.example.org:443 PUT /v1/* bytes/day=1",
        "https://api.example.org:443 GET /v2/* bytes/day=1",
        "https://api.example.org:443 GET /* bytes/day=1",
        "https://api.example.org:443 GET bytes/day=1",
        "https://api.example.org:443 /v1/* bytes/day=1",
        "https://api.example.org:443 GET /v1/*",
        "https://api.example.org:443 bytes/day=1",
        "http://api.example.org:443 GET /v1/* bytes/day=1",
        "https://api.example.org:443 GET /v1/* bytes/day=1 secret=mail authorization: {}",
    ] {
        assert!(!within(beyond, outer), "{beyond}");
    }
}

proptest! {
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
