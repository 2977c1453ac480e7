//! What does a program that asks for a name get to hear?
//!
//! In:     one DNS question over UDP, or from a TCP message without its length; the agent's rules; the [`Pool`].
//! Out:    the answer, and what was asked. A for a name that some rule knows: a synthetic address. AAAA and any
//!         other type for such a name: no data. Anything else: the name does not exist.
//! Never:  a question to another server: data leaves as easily in the labels of a name as in a connection.
//!         Whether the name exists outside is known when it is dialled.
//! Source: RFC 1035, 4.1; RFC 2308, 2.2 (no data). The wire format is the crate `simple-dns`'.

use crate::name::{Name, NameError};
use crate::rules::EgressRules;
use crate::synthetic::{Pool, TTL};
use simple_dns::rdata::{A, RData};
use simple_dns::{CLASS, OPCODE, Packet, PacketFlag, QCLASS, QTYPE, Question, RCODE, ResourceRecord, TYPE};
use std::net::Ipv4Addr;
use std::time::Instant;

/// RFC 1035, 2.3.4. A question fits many times; a longer message carries something else.
pub const MESSAGE_MAX_BYTES: usize = 512;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Absent when the message was not even a question: it is not answered.
    pub message: Option<Vec<u8>>,
    pub outcome: Outcome,
}

/// For the audit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Address(Name, Ipv4Addr),
    /// A known name, and a type that synthetic addresses do not have.
    NoData(Name),
    /// No rule knows the name.
    Unknown(Name),
    /// Not a name of ours; why.
    BadName(NameError),
    /// All synthetic addresses are taken.
    Full(Name),
    /// Not one question of class IN.
    Malformed,
}

pub fn answer(message: &[u8], rules: &EgressRules, pool: &mut Pool, now: Instant) -> Answer {
    let silent = Answer { message: None, outcome: Outcome::Malformed };
    if message.len() > MESSAGE_MAX_BYTES {
        return silent;
    }
    let Ok(query) = Packet::parse(message) else { return silent };
    // Two programs that answer each other's answers never stop.
    if query.has_flags(PacketFlag::RESPONSE) {
        return silent;
    }
    let (outcome, code) = match &query.questions[..] {
        [question]
            if query.opcode() == OPCODE::StandardQuery
                && question.qclass == QCLASS::CLASS(CLASS::IN)
                && query.answers.is_empty()
                && query.name_servers.is_empty() =>
        {
            look_up(question, rules, pool, now)
        }
        _ => (Outcome::Malformed, RCODE::FormatError),
    };
    Answer { message: reply(&query, &outcome, code), outcome }
}

fn look_up(question: &Question<'_>, rules: &EgressRules, pool: &mut Pool, now: Instant) -> (Outcome, RCODE) {
    let name = match read_name(question) {
        Ok(name) => name,
        Err(error) => return (Outcome::BadName(error), RCODE::NameError),
    };
    if !rules.knows(&name) {
        return (Outcome::Unknown(name), RCODE::NameError);
    }
    if question.qtype != QTYPE::TYPE(TYPE::A) {
        return (Outcome::NoData(name), RCODE::NoError);
    }
    match pool.address(&name, now) {
        Ok(address) => (Outcome::Address(name, address), RCODE::NoError),
        Err(_) => (Outcome::Full(name), RCODE::ServerFailure),
    }
}

/// Label by label: a label may hold a dot on the wire, and in text that would be two labels.
fn read_name(question: &Question<'_>) -> Result<Name, NameError> {
    let mut text = String::new();
    for label in question.qname.get_labels() {
        let bytes: &[u8] = label.as_ref();
        if bytes.contains(&b'.') {
            return Err(NameError::Character);
        }
        if !text.is_empty() {
            text.push('.');
        }
        text.push_str(std::str::from_utf8(bytes).map_err(|_| NameError::NotAscii)?);
    }
    Name::parse(&text)
}

fn reply(query: &Packet<'_>, outcome: &Outcome, code: RCODE) -> Option<Vec<u8>> {
    let mut reply = Packet::new_reply(query.id());
    reply.set_flags(PacketFlag::RECURSION_AVAILABLE);
    if query.has_flags(PacketFlag::RECURSION_DESIRED) {
        reply.set_flags(PacketFlag::RECURSION_DESIRED);
    }
    *reply.rcode_mut() = code;
    if let [question] = &query.questions[..] {
        reply.questions.push(question.clone());
        if let Outcome::Address(_, address) = outcome {
            let ttl_seconds = u32::try_from(TTL.as_secs()).unwrap_or(0);
            let record = RData::A(A::from(*address));
            reply.answers.push(ResourceRecord::new(question.qname.clone(), CLASS::IN, ttl_seconds, record));
        }
    }
    reply.build_bytes_vec().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::{Class, classify};
    use proptest::prelude::*;

    fn rules() -> EgressRules {
        serde_json::from_str(r#"[{"host": "api.example.org"}, {"host": "*.example.net", "ports": [8443]}]"#)
            .unwrap()
    }

    fn question(labels: &[&[u8]], kind: u16, class: u16) -> Vec<u8> {
        let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in labels {
            bytes.push(label.len() as u8);
            bytes.extend(*label);
        }
        bytes.push(0);
        bytes.extend(kind.to_be_bytes());
        bytes.extend(class.to_be_bytes());
        bytes
    }

    fn ask(labels: &[&[u8]], kind: u16) -> (Outcome, Option<(RCODE, Vec<RData<'static>>)>) {
        let answer = answer(&question(labels, kind, 1), &rules(), &mut Pool::new(8), Instant::now());
        let said = answer.message.map(|bytes| {
            let packet = Packet::parse(&bytes).unwrap();
            assert!(packet.has_flags(PacketFlag::RESPONSE | PacketFlag::RECURSION_DESIRED));
            assert_eq!((packet.id(), packet.questions.len()), (0x1234, 1));
            (packet.rcode(), packet.answers.iter().map(|record| record.rdata.clone().into_owned()).collect())
        });
        (answer.outcome, said)
    }

    #[test]
    fn known_names_have_an_address_and_no_other_name_exists() {
        let api = Name::parse("api.example.org").unwrap();
        let first = Ipv4Addr::new(198, 18, 0, 1);
        assert_eq!(classify(first.into()), Class::Reserved, "nothing dials it by mistake");
        let address = RData::A(A::from(first));
        let (outcome, said) = ask(&[b"API", b"example", b"org"], 1);
        assert_eq!(outcome, Outcome::Address(api.clone(), first));
        assert_eq!(said, Some((RCODE::NoError, vec![address])));
        let any_star = ask(&[b"x", b"example", b"net"], 1);
        assert!(matches!(any_star.0, Outcome::Address(..)));
        // AAAA, TXT, HTTPS (which could carry another name or an encrypted hello).
        for kind in [28, 16, 65] {
            let (outcome, said) = ask(&[b"api", b"example", b"org"], kind);
            assert_eq!(outcome, Outcome::NoData(api.clone()));
            assert_eq!(said, Some((RCODE::NoError, vec![])));
        }
        let unknown: &[&[&[u8]]] = &[
            &[b"example", b"org"],
            &[b"a", b"b", b"example", b"net"],
            &[b"mzxw6ytboi", b"evil", b"net"],
            &[b"localhost"],
        ];
        for labels in unknown {
            for kind in [1, 28] {
                let (outcome, said) = ask(labels, kind);
                assert!(matches!(outcome, Outcome::Unknown(_)), "{labels:?}");
                assert_eq!(said, Some((RCODE::NameError, vec![])));
            }
        }
    }

    #[test]
    fn hostile_questions() {
        let bad: &[&[&[u8]]] = &[
            &[b"api.example.org"],
            &[b"api.example", b"org"],
            &[b"evil\0", b"api", b"example", b"org"],
            &[b"\xff", b"example", b"net"],
            &[b"a b", b"example", b"net"],
            &[],
        ];
        for labels in bad {
            let (outcome, said) = ask(labels, 1);
            assert!(matches!(outcome, Outcome::BadName(_)), "{labels:?}: {outcome:?}");
            assert_eq!(said.unwrap().0, RCODE::NameError);
        }
        let mut pool = Pool::new(1);
        let mut send = |bytes: &[u8]| answer(bytes, &rules(), &mut pool, Instant::now());
        let good = question(&[b"api", b"example", b"org"], 1, 1);
        let silent = Answer { message: None, outcome: Outcome::Malformed };
        let mut response = good.clone();
        response[2] |= 0x80;
        assert_eq!(send(&response), silent, "an answer is not answered");
        assert_eq!(send(&good[..good.len() - 1]), silent);
        assert_eq!(send(&[0; 3]), silent);
        assert_eq!(send(&[good.clone(), vec![0; 600]].concat()), silent);
        let mut two = good.clone();
        two[5] = 2;
        two.extend(&good[12..]);
        assert_eq!(send(&two).outcome, Outcome::Malformed);
        assert_eq!(send(&question(&[b"api", b"example", b"org"], 1, 3)).outcome, Outcome::Malformed, "CHAOS");
        // A name that points at itself.
        let looped = [&good[..12], &[0xc0, 12, 0, 1, 0, 1]].concat();
        assert_eq!(send(&looped), silent);
        assert!(matches!(send(&good).outcome, Outcome::Address(..)));
        let full = send(&question(&[b"x", b"example", b"net"], 1, 1));
        assert!(matches!(full.outcome, Outcome::Full(_)));
    }

    proptest! {
        /// An address is given only for a name that the rules know, and any bytes are survived.
        #[test]
        fn only_known_names_get_addresses(
            noise in proptest::collection::vec(any::<u8>(), 0..80),
            flips in proptest::collection::vec((0usize..200, any::<u8>()), 0..6),
        ) {
            let mut pool = Pool::new(4);
            answer(&noise, &rules(), &mut pool, Instant::now());
            let mut bytes = question(&[b"api", b"example", b"org"], 1, 1);
            for (at, byte) in flips {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            if let Outcome::Address(name, _) = answer(&bytes, &rules(), &mut pool, Instant::now()).outcome {
                prop_assert!(rules().knows(&name));
            }
        }
    }
}
