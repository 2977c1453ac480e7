use crate::{asked, compile, difference, parse_manifest};
use agentd_domain::manifest::Manifest;
use agentd_domain::plan::{FsAccess, Mount, NetworkPlan};

const HEAD: &str = "[agent]\nname = \"a\"\nexec = [\"/agent/run\"]\n";

fn manifest(net: &str) -> Manifest {
    parse_manifest(&format!("{HEAD}{net}")).unwrap()
}

fn whys(net: &str) -> Vec<String> {
    let problems = parse_manifest(&format!("{HEAD}{net}")).unwrap_err();
    problems.into_iter().map(|report| report.why).collect()
}

const MAIL: &str = r#"
[net]
bytes_per_day = "1G"
[[net.allow]]
host = "api.example.org"
ports = [8443, 443]
methods = ["GET", "POST"]
paths = ["/v1/messages", "/v1/files/*"]
bytes_per_day = "50M"
secret = "mail-api"
[[net.allow]]
host = "imap.example.org"
protocol = "tcp"
ports = [993]
[[net.allow]]
host = "*.cdn.example.org"
"#;

#[test]
fn every_key_is_read_and_every_rule_is_a_right_and_a_line_of_the_plan() {
    let manifest = manifest(MAIL);
    let lines = [
        "https://*.cdn.example.org:443",
        "https://api.example.org:443,8443 GET POST /v1/messages /v1/files/* bytes/day=52428800 \
         secret=mail-api authorization: Bearer {}",
        "tcp://imap.example.org:993",
    ];
    assert_eq!(asked(&manifest).net.iter().map(String::as_str).collect::<Vec<_>>(), lines);
    let plan = compile(&manifest, &crate::Subject::nobody());
    let NetworkPlan::Egress { rules, capture_tcp, bytes_per_day } = &plan.network else {
        panic!("no network")
    };
    assert_eq!(rules, &lines);
    assert_eq!((&capture_tcp[..], *bytes_per_day), (&[443, 993, 8443][..], Some(1 << 30)));
    assert_eq!(plan.landlock.connect_tcp, [53, 443, 993, 7070, 7071, 8443]);
    assert_eq!(plan.seccomp.datagram_families, [2]);
    let variable = |name: &str| plan.env.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"] {
        assert_eq!(variable(name), Some("http://127.0.0.1:7071"), "{name}");
    }
    assert_eq!(variable("ALL_PROXY"), variable("all_proxy"));
    assert_eq!(variable("ALL_PROXY"), Some("socks5h://127.0.0.1:7071"));
    let bundle = plan.mounts.iter().find_map(|mount| match mount {
        Mount::ReadOnly { source, target, .. } if target == "/etc/ssl/certs/ca-certificates.crt" => {
            Some(source)
        }
        _ => None,
    });
    assert_eq!(bundle.unwrap(), "/run/agentd/egress/ca-certificates.crt");
    assert!(plan.mounts.iter().any(|mount| matches!(mount, Mount::Text { target, text }
        if target == "/etc/resolv.conf" && text.starts_with("nameserver 127.0.0.1\n"))));
    assert!(
        plan.landlock
            .rules
            .iter()
            .any(|rule| rule.path == "/etc/resolv.conf" && rule.access == FsAccess::Read)
    );
}

#[test]
fn without_rules_there_is_no_network_at_all() {
    for text in ["", "[net]\n", "[net]\nallow = []\n"] {
        let plan = compile(&manifest(text), &crate::Subject::nobody());
        assert_eq!(plan.network, NetworkPlan::LoopbackOnly);
        assert_eq!(plan.landlock.connect_tcp, [7070]);
        assert!(plan.seccomp.datagram_families.is_empty());
        assert!(!plan.env.iter().any(|(name, _)| name.to_ascii_lowercase().ends_with("_proxy")
            && !name.to_ascii_lowercase().starts_with("no")));
        assert!(!plan.mounts.iter().any(|mount| matches!(mount, Mount::Text { .. })));
    }
}

#[test]
fn what_cannot_be_meant_is_refused_with_its_key() {
    let rule = |keys: &str| whys(&format!("[[net.allow]]\n{keys}\n"));
    for (keys, expected) in [
        ("", "`net.allow[0].host`: it is missing"),
        ("host = 1", "`net.allow[0].host`: it is the number 1"),
        ("host = \"a.example.org\"\nport = 443", "`net.allow[0].port` is not a key"),
        ("host = \"nas\"\nreach = \"private\"", "`net.allow[0].reach` is not a key"),
        ("host = \"nas\"\nprivate = true", "`net.allow[0].private` is not a key"),
        ("host = \"a.example.org\"\nports = [0]", "0 is no port"),
        ("host = \"a.example.org\"\nports = [443, 443]", "443 is no port, or is there twice"),
        ("host = \"a.example.org\"\nports = []", "it is empty"),
        ("host = \"a.example.org\"\nprotocol = \"udp\"", "`udp` is not a protocol"),
        ("host = \"a.example.org\"\nprotocol = \"tcp\"", "`tcp` needs its ports named"),
        ("host = \"a.example.org\"\nmethods = [\"get\"]", "`get` is not a method"),
        ("host = \"a.example.org\"\nmethods = [\"TRACE\"]", "`TRACE` is not a method"),
        ("host = \"a.example.org\"\npaths = [\"/a/../b\"]", "the path `/a/../b`"),
        ("host = \"a.example.org\"\npaths = [\"/a b\"]", "an entry holds white space"),
        ("host = \"a.example.org\"\nbytes_per_day = \"much\"", "`much` is not a size"),
        ("host = \"*.example.org\"\nsecret = \"s\"", "a secret is for one host by name"),
        ("host = \"a.example.org\"\nsecret = \"S\"", "a secret's name is"),
        ("host = \"a.example.org\"\nheader = \"x: {}\"", "it carries no secret"),
        ("host = \"a.example.org\"\nsecret = \"s\"\nheader = \"host: {}\"", "`host` is not a field"),
        // Wildcards over public suffixes, from both sections of the list, and of networks without a list.
        ("host = \"*.com\"", "means everybody who registers a name below `com`"),
        ("host = \"*.co.uk\"", "below `co.uk`"),
        ("host = \"*.github.io\"", "below `github.io`"),
        ("host = \"*.internal\"", "below `internal`"),
        ("host = \"*\"", "a star may only stand as the whole first label"),
        ("host = \"api.*.org\"", "a star may only stand"),
        ("host = \"**.example.org\"", "a star may only stand"),
        // Letters that look like others: Cyrillic a, full-width letters, a soft hyphen, a Greek question mark.
        ("host = \"\u{430}pi.example.org\"", "`\\u{430}pi.example.org` is not a host: it is not ASCII"),
        ("host = \"\u{ff41}pi.example.org\"", "it is not ASCII"),
        ("host = \"*.ex\u{e1}mple.org\"", "it is not ASCII"),
        ("host = \"api\u{ad}.example.org\"", "it is not ASCII"),
        ("host = \"api.example.org\u{37e}\"", "it is not ASCII"),
        ("host = \"api.example.org.\"", "it ends with a dot"),
        ("host = \"https://api.example.org\"", "it holds something other"),
        ("host = \"api.example.org:443\"", "it holds something other"),
        ("host = \"127.1\"", "read it as an address"),
        ("host = \"0x7f000001\"", "read it as an address"),
        ("host = \"224.0.0.1\"", "a multicast address"),
    ] {
        let whys = rule(keys);
        assert!(whys.iter().any(|why| why.contains(expected)), "{keys}: {whys:?}");
    }
    let twice = "[[net.allow]]\nhost = \"a.example.org\"\n".repeat(2);
    assert!(whys(&twice)[0].contains("is there twice"));
    let star = "[[net.allow]]\nhost = \"*.example.org\"\n[[net.allow]]\nhost = \"a.example.org\"\n";
    assert!(whys(star)[0].contains("a star and a name that it covers"));
    let many: String =
        (1..=17).map(|port| format!("[[net.allow]]\nhost = \"h{port}\"\nports = [{port}]\n")).collect();
    assert!(whys(&many)[0].contains("more than 16 different ports"));
}

#[test]
fn a_rule_that_allows_more_is_a_widening_and_one_within_another_is_not() {
    let rule = |keys: &str| manifest(&format!("[[net.allow]]\nhost = \"api.example.org\"\n{keys}\n"));
    let (get, both) = (rule("methods = [\"GET\"]"), rule("methods = [\"GET\", \"POST\"]"));
    let wider = difference(&get, &both);
    assert_eq!(wider.wider, ["net https://api.example.org:443 GET POST"]);
    assert_eq!(wider.narrower, Vec::<String>::new());
    assert_eq!(difference(&both, &get).narrower, ["net https://api.example.org:443 GET POST"]);
    assert_eq!(difference(&both, &get).wider, Vec::<String>::new());
    let none = manifest("");
    let first = difference(&none, &get);
    assert!(first.wider.contains(&"net https://api.example.org:443 GET".to_owned()), "{first:?}");
}

#[test]
fn a_larger_budget_of_the_agent_is_a_widening_and_none_at_all_the_largest() {
    let with =
        |budget: &str| manifest(&format!("[net]\n{budget}\n[[net.allow]]\nhost = \"a.example.org\"\n"));
    let (small, large, free) = (with("bytes_per_day = \"1M\""), with("bytes_per_day = \"2M\""), with(""));
    assert_eq!(difference(&small, &large).wider, ["net.bytes 2097152 instead of 1048576"]);
    assert_eq!(difference(&large, &free).wider, ["net.bytes no limit instead of 2097152"]);
    let back = difference(&large, &small);
    assert_eq!(
        (back.wider, back.narrower),
        (vec![], vec!["net.bytes 2097152 instead of 1048576".to_owned()])
    );
    for wrong in ["0", "much", "9223372036854775807"] {
        let why = whys(&format!("[net]\nbytes_per_day = \"{wrong}\"\n"));
        assert_eq!(why, [format!("`net.bytes_per_day`: `{wrong}` is not a size")]);
    }
}
