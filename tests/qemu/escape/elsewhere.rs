//! Which rows of the suite are attacks on agentd itself (its parsers, its proxy, its tokens), and which test makes each?
//!
//! They need no kernel, so they are tests of the crates that they attack. A control there is the same attempt with the
//! check replaced by "allow", in the tests' build alone. A row without one is unproven here too.

pub struct Elsewhere {
    pub row: &'static str,
    pub what: &'static str,
    /// `file::test`, from the repository's root.
    pub test: &'static str,
    /// The test that shows the effect without the check; it may be the same one.
    pub control: Option<&'static str>,
}

const fn shown(
    row: &'static str,
    what: &'static str,
    test: &'static str,
    control: Option<&'static str>,
) -> Elsewhere {
    Elsewhere { row, what, test, control }
}

const HTTP: &str = "agentd/crates/egress/src/http1/tests.rs::hostile_requests_are_refused_and_said_why";
const SOCKS: &str = "agentd/crates/egress/src/socks5/tests.rs::hostile_requests_are_refused_and_said_why";
const ADDRESSES: &str =
    "agentd/crates/egress/src/relay/tests.rs::addresses_are_vetted_after_the_name_was_allowed";
const ROWS: &str = "agentd/crates/egress/src/relay/rows.rs::each_attack_is_stopped_and_succeeds_when_its_check_is_replaced_by_allow";
const READ: &str =
    "agentd/crates/egress/src/relay/rows.rs::a_secret_comes_back_when_nobody_looks_and_not_otherwise";
const ATTACKS: &str = "agentd/crates/capability/src/token/tests/attacks.rs::each_attack_on_a_token_is_stopped_and_succeeds_without_its_check";
const STOLEN: &str = "agentd/src/agent_api/tests.rs::a_stolen_token_is_worth_nothing_and_is_recorded";
const OVER: &str = "agentd/src/agent_api/tests.rs::a_token_that_is_over_its_time_denies_every_call";
const REVOKED: &str = "agentd/src/agent_api/tests.rs::a_revoked_token_denies_every_call_at_once";
const NARROWER: &str =
    "agentd/src/agent_api/tests.rs::a_request_with_a_narrower_token_is_decided_by_that_one";
const ROUTES: &str = "agentd/src/agent_api/tests.rs::every_route_needs_its_right";
const TIERS: &str = "agentd/src/agent_api/tests.rs::a_right_for_one_tier_is_none_for_another";
const STORM: &str = "agentd/src/children/plan/tests.rs::a_spawn_storm_ends_where_the_token_says_and_without_the_checks_does_not";
const CHILDREN: &str = "agentd/src/agent_api/tests.rs::without_the_right_there_are_no_children";

pub const ELSEWHERE: &[Elsewhere] = &[
    shown(
        "53",
        "a request from another site's page",
        "agentd/crates/console/tests/router.rs::other_sites_cannot_use_the_cookie",
        None,
    ),
    shown("55", "names that carry data out, by CONNECT, SOCKS5 and the proxy", ROWS, Some(ROWS)),
    shown(
        "55",
        "the same by questions to the name server",
        "agentd/src/egress/tests.rs::a_known_name_gets_a_synthetic_address_and_another_one_a_record",
        None,
    ),
    shown(
        "56, 57",
        "an allowed name that leads to an address of the house, at once or later",
        ROWS,
        Some(ROWS),
    ),
    shown("56, 57", "which class of address it is, said in words", ADDRESSES, None),
    shown("57", "metadata and private addresses themselves", ROWS, Some(ROWS)),
    shown("59", "host names and addresses with two readings", ROWS, Some(ROWS)),
    shown("59", "more of them, by HTTP", HTTP, None),
    shown("59", "more of them, by SOCKS5", SOCKS, None),
    shown("60", "a name that only looks like an allowed one", ROWS, Some(ROWS)),
    shown("61", "a tunnel, a path or another handshake through an allowed host", ROWS, Some(ROWS)),
    shown(
        "61",
        "the same inside TLS",
        "agentd/crates/egress/src/relay/ended_tests.rs::methods_and_paths_are_held_inside_tls_and_nothing_is_dialled_for_what_is_refused",
        None,
    ),
    shown("63", "a request with two lengths, two hosts, or two readings of its path", ROWS, Some(ROWS)),
    shown("65", "where a redirect leads an agent", ROWS, Some(ROWS)),
    shown("66", "the console by its public name or address", ROWS, Some(ROWS)),
    shown("67", "the injected secret in an answer, also encoded or compressed, and TRACE", READ, Some(READ)),
    shown("68", "more bytes than the budget", ROWS, Some(ROWS)),
    shown("69", "another's token, and one handed on to oneself", ATTACKS, Some(ATTACKS)),
    shown("69", "the same over the agent's API", STOLEN, Some(STOLEN)),
    shown("70", "a token over its time, and a later end by a block of one's own", ATTACKS, Some(ATTACKS)),
    shown("70", "the same over the agent's API", OVER, Some(OVER)),
    shown("71", "a right that was taken away, a limit that was lowered", ATTACKS, Some(ATTACKS)),
    shown("71", "a request beyond the narrower token that it brings", NARROWER, Some(NARROWER)),
    shown("71", "a route without its right", ROUTES, Some(ROUTES)),
    shown("72", "a grandchild of a revoked token", ATTACKS, Some(ATTACKS)),
    shown("72", "a call after the revocation", REVOKED, Some(REVOKED)),
    shown(
        "73",
        "another key, other Datalog than is said, too many blocks, too much text",
        ATTACKS,
        Some(ATTACKS),
    ),
    shown(
        "73",
        "each bit flipped",
        "agentd/crates/capability/src/token/tests.rs::every_flipped_bit_is_refused_in_words_or_changes_nothing",
        Some(
            "agentd/crates/capability/src/token/tests/attacks.rs::without_signature_and_profile_a_flipped_bit_changes_what_a_token_means",
        ),
    ),
    shown("78", "a memory in a tier that is not one's own", TIERS, Some(TIERS)),
    shown(
        "86",
        "many at once against one budget",
        "agentd/crates/egress/src/relay/tests.rs::a_budget_is_never_overdrawn_by_many_at_once",
        None,
    ),
    shown("90", "agents that start agents that start agents", STORM, Some(STORM)),
    shown("90", "children without the right to them", CHILDREN, Some(CHILDREN)),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// A test that was renamed or removed must not stay in the table.
    #[test]
    fn every_test_that_is_named_exists() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        for row in ELSEWHERE {
            for named in [Some(row.test), row.control].into_iter().flatten() {
                let (file, test) = named.split_once("::").unwrap();
                let text = std::fs::read_to_string(root.join(file)).unwrap();
                assert!(text.contains(&format!("fn {test}(")), "row {}: no {test} in {file}", row.row);
            }
        }
    }

    /// Who claims a control says so in the test's text.
    #[test]
    fn every_control_replaces_a_check() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        for control in ELSEWHERE.iter().filter_map(|row| row.control) {
            let (file, test) = control.split_once("::").unwrap();
            let text = std::fs::read_to_string(root.join(file)).unwrap();
            let body = text.split_once(&format!("fn {test}(")).unwrap().1;
            let body = body.split("\n}\n").next().unwrap();
            let replaces =
                ["allow_all()", "without(&[", "(allow, ", "has_effect(row, off", "ends_without(off"]
                    .iter()
                    .any(|words| body.contains(words));
            assert!(replaces, "{control} replaces no check");
        }
    }
}
