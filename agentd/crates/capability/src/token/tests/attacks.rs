//! Every attack on a token, with its control: refused as the crate is built for the appliance, and successful when the
//! check that it is aimed at is replaced by "allow". Without the second half a refusal may have any reason.

use super::*;
use crate::token::checks::{Check, without};

struct Attack {
    what: &'static str,
    token: String,
    /// Who shows it, and when.
    caller: u128,
    now: i64,
    revoked: HashSet<RevocationId>,
    /// The checks without any one of which it succeeds.
    stopped_by: &'static [Check],
    effect: fn(&str, &Verified) -> bool,
}

impl Attack {
    fn new(
        what: &'static str,
        token: String,
        stopped_by: &'static [Check],
        effect: fn(&str, &Verified) -> bool,
    ) -> Self {
        Self { what, token, caller: 1, now: NOW, revoked: HashSet::new(), stopped_by, effect }
    }

    fn succeeds(&self) -> bool {
        let at = Circumstances { caller: agent(self.caller), now_unix_s: self.now, revoked: &self.revoked };
        verify(&self.token, key().public(), &at).is_ok_and(|verified| (self.effect)(&self.token, &verified))
    }
}

fn has_models(_: &str, verified: &Verified) -> bool {
    verified.rights.api.contains("models")
}

fn is_accepted(_: &str, _: &Verified) -> bool {
    true
}

/// What the plan is made from says yes, and Biscuit's own authorizer, which reads the same text, says no.
fn readers_disagree(token: &str, verified: &Verified) -> bool {
    let models = Request::Api("models".to_owned());
    let theirs = authorize(token, key().public(), verified.holder, NOW, &models);
    verified.rights.allows(&models) && theirs.is_ok_and(|allowed| !allowed)
}

/// Appended with Biscuit itself, as whoever has the text can.
fn appended(token: &str, blocks: impl IntoIterator<Item = biscuit_auth::BlockBuilder>) -> String {
    let mut token = UnverifiedBiscuit::from_base64(token).unwrap();
    for block in blocks {
        token = token.append_with_keypair(&keypair(&[5; 32]).unwrap(), block).unwrap();
    }
    token.to_base64().unwrap()
}

fn signed_by(other: &RootKey, token: &str, to: u128) -> String {
    let unsigned = UnverifiedBiscuit::from_base64(token).unwrap();
    let block = datalog::later(&Later { to: Some(agent(to)), by: Narrowing::default() }).unwrap();
    let request = unsigned.third_party_request().unwrap();
    let block = request.create_block(&other.0.private(), block).unwrap().serialize().unwrap();
    let signed = unsigned.append_third_party_with_keypair(&block, keypair(&[5; 32]).unwrap()).unwrap();
    signed.to_base64().unwrap()
}

fn attacks() -> Vec<Attack> {
    let token = mint(&key(), &grant(), &Fresh([1; 32])).unwrap();
    let his = RootKey::from_secret(&[66; 32]).unwrap();
    let narrow = |by: Narrowing| attenuate(&token, &by, &Fresh([2; 32])).unwrap();
    let messages = Narrowing { api: names(&["messages"]), ..Narrowing::default() };
    let wider = Narrowing { api: names(&["messages", "models"]), ..Narrowing::default() };
    let widened = attenuate(&narrow(messages.clone()), &wider, &Fresh([3; 32])).unwrap();
    let memory = Narrowing { limits: [(Limit::Pids, 4)].into(), ..Narrowing::default() };
    let more = Narrowing { limits: [(Limit::Pids, 4_000)].into(), ..Narrowing::default() };
    let more = attenuate(&narrow(memory), &more, &Fresh([3; 32])).unwrap();
    let later = narrow(Narrowing { expires_unix_s: Some(NOW + 600), ..Narrowing::default() });
    let child = hand_on(&key(), &token, agent(2), &Narrowing::default(), &Fresh([2; 32])).unwrap();
    let grandchild = hand_on(&key(), &child, agent(3), &Narrowing::default(), &Fresh([3; 32])).unwrap();
    let parent_id = inspect(&token).unwrap().revocation_ids.remove(0);
    let foreign = mint(&his, &grant(), &Fresh([1; 32])).unwrap();
    let himself = Later { to: Some(agent(9)), by: Narrowing::default() };
    let nothing_taken = || datalog::later(&Later::default()).unwrap();
    let other_datalog = nothing_taken().code("check if asks($k, $w, $a), $w != \"models\"").unwrap();
    // Folders that nobody has take room and nothing else.
    let folders: BTreeSet<String> = (0..160).map(|number| format!("/usr/share/dict/{number:040}")).collect();
    let long = Later { to: None, by: Narrowing { read: Some(folders), ..Narrowing::default() } };
    let large = appended(&token, (0..4).map(|_| datalog::later(&long).unwrap()));
    assert!(large.len() > TOKEN_MAX_BYTES, "{} bytes", large.len());
    let deep = appended(&token, (0..BLOCKS_MAX).map(|_| nothing_taken()));
    assert!(deep.len() < TOKEN_MAX_BYTES, "{} bytes", deep.len());
    let by_9 = |attack: Attack| Attack { caller: 9, ..attack };
    vec![
        // 69: whoever has the text is not its holder.
        by_9(Attack::new("69: another's token", token.clone(), &[Check::Holder], has_models)),
        Attack::new("69: a child's token in its parent's hands", child, &[Check::Holder], has_models),
        by_9(Attack::new(
            "69: handed to himself without a signature",
            appended(&token, [datalog::later(&himself).unwrap()]),
            &[Check::Kind],
            has_models,
        )),
        by_9(Attack::new(
            "69: handed to himself with his own signature",
            signed_by(&his, &token, 9),
            // Who signed is looked at when the signatures are.
            &[Check::Signature, Check::Signer],
            has_models,
        )),
        // 70: time.
        Attack {
            now: NOW + 60,
            ..Attack::new("70: over its time", token.clone(), &[Check::InForce], has_models)
        },
        Attack {
            now: NOW + 100,
            ..Attack::new(
                "70: a later end by a block of his own",
                later,
                &[Check::Subset, Check::InForce],
                has_models,
            )
        },
        // 71: more than the block before it has.
        Attack::new("71: a right that was taken away", widened, &[Check::Subset], has_models),
        Attack::new("71: a limit that was lowered", more, &[Check::Subset], |_, verified| {
            verified.rights.limit(Limit::Pids) == 4_000
        }),
        // 72: what hangs from a revoked token.
        Attack {
            caller: 3,
            revoked: HashSet::from([parent_id]),
            ..Attack::new("72: a grandchild of a revoked token", grandchild, &[Check::InForce], has_models)
        },
        // 73: what only looks like a token.
        Attack::new("73: signed with another key", foreign, &[Check::Signature], has_models),
        Attack::new(
            "73: Datalog that is not what the block says",
            appended(&token, [other_datalog]),
            &[Check::Profile],
            readers_disagree,
        ),
        Attack::new("73: more blocks than are read", deep, &[Check::Depth], is_accepted),
        Attack::new("73: more text than is read", large, &[Check::Size], is_accepted),
    ]
}

const ALL: [Check; 9] = [
    Check::Size,
    Check::Depth,
    Check::Profile,
    Check::Kind,
    Check::Signature,
    Check::Signer,
    Check::Subset,
    Check::InForce,
    Check::Holder,
];

/// With one check at a time replaced by "allow": an attack succeeds without the check that it is aimed at, and without
/// no other; and each check is needed by some attack.
#[test]
fn each_attack_on_a_token_is_stopped_and_succeeds_without_its_check() {
    let attacks = attacks();
    for attack in &attacks {
        assert!(!attack.succeeds(), "{} succeeds", attack.what);
        let needed: Vec<Check> =
            ALL.into_iter().filter(|check| without(&[*check], || attack.succeeds())).collect();
        assert_eq!(needed, attack.stopped_by, "{}: without these alone it succeeds", attack.what);
    }
    for check in ALL {
        assert!(attacks.iter().any(|attack| attack.stopped_by.contains(&check)), "{check:?} stops nothing");
    }
    println!("RESULT: {} attacks on tokens, each stopped, each with its control", attacks.len());
}

/// The control of `every_flipped_bit_is_refused_in_words_or_changes_nothing`: without the signature and the profile some
/// flips are read, and change what the token means.
#[test]
fn without_signature_and_profile_a_flipped_bit_changes_what_a_token_means() {
    let token = mint(&key(), &grant(), &Fresh([1; 32])).unwrap();
    let before = verify(&token, key().public(), &at(1, NOW)).unwrap();
    let changed = |text: &str| verify(text, key().public(), &at(1, NOW)).is_ok_and(|after| after != before);
    let mut with_checks = 0;
    let mut without_checks = 0;
    for bit in (0..token.len() * 8).step_by(3) {
        let mut bytes = token.clone().into_bytes();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let Ok(text) = String::from_utf8(bytes) else { continue };
        with_checks += usize::from(changed(&text));
        without_checks += usize::from(without(&[Check::Signature, Check::Profile], || changed(&text)));
    }
    assert_eq!(with_checks, 0);
    assert!(without_checks > 0, "no flip was ever read: the other test shows nothing");
}
