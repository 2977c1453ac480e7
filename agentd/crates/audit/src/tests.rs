use super::*;
use agentd_domain::audit::{Actor, Digest, Head, Linked, PublicKey, Record, SignedHead, VERSION, Verdict};
use agentd_domain::ids::{AgentId, RunId};
use proptest::prelude::*;
use proptest::sample::Index;
use uuid::Uuid;

fn signer(n: u8) -> Signer {
    Signer::from_seed(&[n; 32]).expect("32 bytes")
}

fn record(seq: u64, detail: &str) -> Record {
    Record {
        action: "api.use".into(),
        actor: Actor::Agent,
        agent_id: Some(AgentId(Uuid::from_u128(7))),
        boot_ms: 1000 + seq,
        count: 1,
        detail: detail.into(),
        right: Some("memory.recall.spirit".into()),
        run_id: Some(RunId(Uuid::from_u128(9))),
        seq,
        unix_ms: 1_795_176_243_000,
        v: VERSION,
        verdict: if seq.is_multiple_of(3) { Verdict::Denied } else { Verdict::Allowed },
    }
}

/// A log as agentd would write it: some records, heads behind some of them and behind the last, a front that was
/// dropped with a head that says so.
#[derive(Debug, Clone)]
struct Log {
    records: Vec<Linked>,
    heads: Vec<SignedHead>,
    first_seq: u64,
}

impl Log {
    fn new(details: &[String], head_every: usize, dropped: usize) -> Self {
        let mut before = genesis();
        let records: Vec<Linked> = (1..)
            .zip(details)
            .map(|(seq, detail)| {
                let record = record(seq, detail);
                before = link(&before, &record);
                Linked { hash: before, record }
            })
            .collect();
        let mut log = Self { records, heads: Vec::new(), first_seq: 1 };
        let last = details.len() as u64;
        for seq in (0..last).step_by(head_every) {
            log.heads.push(log.head(seq));
        }
        log.drop_front(dropped.min(details.len()));
        log.heads.retain(|signed| signed.head.seq + 1 >= log.first_seq && signed.head.seq != last);
        log.heads.push(log.head(last));
        log
    }

    fn hash(&self, seq: u64) -> Digest {
        self.records.iter().find(|linked| linked.record.seq == seq).map_or_else(genesis, |linked| linked.hash)
    }

    fn head(&self, seq: u64) -> SignedHead {
        let head = Head {
            before: self.hash(self.first_seq - 1),
            first_seq: self.first_seq,
            hash: self.hash(seq),
            key: signer(1).key(),
            seq,
            unix_ms: 5,
            v: VERSION,
        };
        signer(1).sign(head)
    }

    fn drop_front(&mut self, count: usize) {
        self.first_seq += count as u64;
    }

    /// What is kept, line by line, and what each line is.
    fn lines(&self) -> Vec<(At, Vec<u8>)> {
        let head_behind = |seq: u64| {
            let signed = self.heads.iter().find(move |signed| signed.head.seq == seq)?;
            Some((At::Head { seq }, signed_line(signed)))
        };
        let kept = self.records.iter().filter(|linked| linked.record.seq >= self.first_seq);
        let records = kept.flat_map(|linked| {
            let seq = linked.record.seq;
            [Some((At::Record { seq }, linked_line(linked))), head_behind(seq)].into_iter().flatten()
        });
        let ended = |(at, mut line): (At, Vec<u8>)| {
            line.push(b'\n');
            (at, line)
        };
        head_behind(self.first_seq - 1).into_iter().chain(records).map(ended).collect()
    }

    fn export(&self) -> Vec<u8> {
        joined(&self.lines())
    }

    fn kept(&self) -> usize {
        self.records.len() + 1 - usize::try_from(self.first_seq).expect("small")
    }
}

fn joined(lines: &[(At, Vec<u8>)]) -> Vec<u8> {
    lines.iter().flat_map(|(_, line)| line.iter().copied()).collect()
}

fn demands() -> Demands<'static> {
    Demands { key: Some(signer(1).key()), seen: None }
}

fn bad(export: &[u8]) -> FirstBad {
    verify(export, &demands()).expect_err("it was changed")
}

/// Positions of the lines that are records.
fn records_of(lines: &[(At, Vec<u8>)]) -> Vec<usize> {
    let is_record =
        |(index, (at, _)): (usize, &(At, Vec<u8>))| matches!(at, At::Record { .. }).then_some(index);
    lines.iter().enumerate().filter_map(is_record).collect()
}

prop_compose! {
    /// At least four records are kept.
    fn logs()(
        details in prop::collection::vec("\\PC{0,12}", 4..40),
        head_every in 1usize..12,
        dropped in any::<Index>(),
    ) -> Log {
        let most = details.len() - 4;
        Log::new(&details, head_every, dropped.index(most + 1))
    }
}

/// Whether a flipped bit is named by the line that it is in.
fn check_flip(log: &Log, place: usize, bit: u8) {
    let lines = log.lines();
    let mut export = joined(&lines);
    export[place] ^= 1 << bit;
    let ends = lines.iter().scan(0, |end, (at, line)| {
        *end += line.len();
        Some((*end, *at))
    });
    let (_, at) = ends.into_iter().find(|(end, _)| *end > place).expect("inside");
    let found = bad(&export);
    assert_eq!(found.at, at, "{found}: {}", String::from_utf8_lossy(&export));
}

proptest! {
    #[test]
    fn what_was_not_touched_verifies(log in logs()) {
        let last = log.records.len() as u64;
        let summary = verify(&log.export(), &demands()).expect("whole");
        prop_assert_eq!((summary.first_seq, summary.last_seq, summary.signed_seq), (log.first_seq, last, last));
        prop_assert_eq!(summary.decisions.allowed + summary.decisions.denied, log.kept() as u64);
        prop_assert_eq!(summary.signed_hash, log.hash(last));
    }

    #[test]
    fn a_flipped_bit_is_named_by_its_line(log in logs(), place in any::<Index>(), bit in 0u8..8) {
        let place = place.index(log.export().len());
        check_flip(&log, place, bit);
    }

    #[test]
    fn a_dropped_record_is_named(log in logs(), which in any::<Index>()) {
        let mut lines = log.lines();
        let (at, _) = lines.remove(*which.get(&records_of(&lines)));
        prop_assert_eq!(bad(&joined(&lines)).at, at);
    }

    #[test]
    fn swapped_records_are_named_by_the_first(log in logs(), a in any::<Index>(), b in any::<Index>()) {
        let mut lines = log.lines();
        let records = records_of(&lines);
        let (a, b) = (*a.get(&records), *b.get(&records));
        prop_assume!(a != b);
        let at = lines[a.min(b)].0;
        lines.swap(a, b);
        let found = bad(&joined(&lines));
        prop_assert_eq!((found.at, found.why), (at, Why::Reordered));
    }

    #[test]
    fn a_doubled_record_is_named(log in logs(), which in any::<Index>(), to in any::<Index>()) {
        let mut lines = log.lines();
        let from = *which.get(&records_of(&lines));
        let line = lines[from].clone();
        let to = from + 1 + to.index(lines.len() - from);
        lines.insert(to, line.clone());
        let found = bad(&joined(&lines));
        prop_assert_eq!((found.at, found.why), (line.0, Why::Duplicated));
    }

    #[test]
    fn a_cut_tail_is_named_while_a_head_is_left(log in logs(), cut in any::<Index>()) {
        let mut lines = log.lines();
        let records = records_of(&lines);
        let cut = records[cut.index(records.len())];
        let (head, at) = (lines.pop().expect("a head"), lines[cut].0);
        lines.truncate(cut);
        lines.push(head);
        prop_assert_eq!(bad(&joined(&lines)).at, at);
    }

    #[test]
    fn a_cut_in_bytes_is_named_or_leaves_whole_lines_behind_a_head(log in logs(), cut in any::<Index>()) {
        let mut export = log.export();
        let whole = export.len();
        let cut = cut.index(whole);
        export.truncate(cut);
        let newest = log.head(log.records.len() as u64);
        let seen = Seen { key: newest.head.key, seq: newest.head.seq, hash: newest.head.hash };
        let judged = verify(&export, &Demands { key: demands().key, seen: Some(&seen) });
        // Only the last head's own line may be missing whole: then all records are there.
        let all_records = whole - signed_line(&newest).len() - 1 == cut;
        prop_assert!(judged.is_err() || all_records, "{:?}", judged);
    }

    #[test]
    fn a_cut_front_is_named(log in logs(), cut in any::<Index>()) {
        let mut lines = log.lines();
        let records = records_of(&lines);
        let from = records[1 + cut.index(records.len() - 1)];
        lines.drain(..from);
        let found = bad(&joined(&lines));
        prop_assert_eq!((found.at, found.why), (At::Record { seq: log.first_seq }, Why::CutFront));
    }

    #[test]
    fn a_log_that_was_chained_anew_is_named_by_the_stretch(log in logs(), which in any::<Index>()) {
        let first = usize::try_from(log.first_seq - 1).expect("small");
        let which = first + which.index(log.kept());
        let mut forged = log.clone();
        forged.records[which].record.detail.push('!');
        for at in which..forged.records.len() {
            let before = at.checked_sub(1).map_or_else(genesis, |at| forged.records[at].hash);
            forged.records[at].hash = link(&before, &forged.records[at].record);
        }
        let seq = which as u64 + 1;
        let FirstBad { at: At::Record { seq: from }, why: Why::Rewritten { to_seq }, .. } = bad(&forged.export())
        else { panic!("not named") };
        prop_assert!((from..=to_seq).contains(&seq), "{} is not in {}..={}", seq, from, to_seq);
        // The stretch is as short as the heads allow.
        let between = log.heads.iter().filter(|s| (from..to_seq).contains(&s.head.seq)).count();
        prop_assert_eq!(between, 0);
    }

    #[test]
    fn no_bytes_are_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(verify(&bytes, &demands()).is_err());
    }
}

fn log() -> Log {
    let details: Vec<String> = (0..10).map(|n| n.to_string()).collect();
    Log::new(&details, 4, 0)
}

#[test]
fn a_new_log_and_an_empty_one_after_a_drop_verify() {
    let summary = verify(&Log::new(&[], 1, 0).export(), &demands()).expect("whole");
    assert_eq!((summary.first_seq, summary.last_seq, summary.signed_seq), (1, 0, 0));
    let summary = verify(&Log::new(&["a".into(), "b".into()], 1, 2).export(), &demands()).expect("whole");
    assert_eq!((summary.first_seq, summary.last_seq, summary.signed_seq), (3, 2, 2));
}

/// Among them the one that joined the last record's line to the newest head, which alone knew where the log began:
/// the missing beginning was blamed.
#[test]
fn each_bit_of_a_small_log_is_named() {
    for head_every in [1, 9] {
        let log = Log::new(&["a".into(), "b".into(), "c".into()], head_every, 1);
        for place in 0..log.export().len() {
            (0..8).for_each(|bit| check_flip(&log, place, bit));
        }
    }
}

#[test]
fn a_forged_head_is_named() {
    let mut log = log();
    let forged = Head { hash: Digest([9; 32]), ..log.heads[1].head.clone() };
    log.heads[1].head = forged.clone();
    let found = bad(&log.export());
    assert_eq!((found.at, found.why), (At::Head { seq: 4 }, Why::Forged));
    log.heads[1] = signer(2).sign(forged);
    let (wanted, found_key) = (signer(1).key(), signer(2).key());
    let found = bad(&log.export());
    assert_eq!((found.at, found.why), (At::Head { seq: 4 }, Why::OtherKey { wanted, found: found_key }));
}

#[test]
fn a_log_signed_with_another_key_is_refused_even_when_its_front_was_dropped() {
    for dropped in [0, 5] {
        let details: Vec<String> = (0..10).map(|n| n.to_string()).collect();
        let export = Log::new(&details, 4, dropped).export();
        let found =
            verify(&export, &Demands { key: Some(PublicKey([3; 32])), seen: None }).expect_err("foreign");
        assert!(matches!(found.why, Why::OtherKey { .. }), "{found}");
        assert!(verify(&export, &Demands::default()).is_ok(), "its own key is taken when none is demanded");
    }
}

#[test]
fn records_without_a_head_are_not_vouched_for() {
    let mut log = log();
    log.heads.clear();
    let found = bad(&log.export());
    assert_eq!((found.at, found.why), (At::Head { seq: 10 }, Why::NoHead));
}

#[test]
fn what_is_behind_the_newest_head_is_bound_by_its_hashes() {
    let mut log = log();
    log.heads.pop();
    let summary = verify(&log.export(), &demands()).expect("whole");
    assert_eq!((summary.signed_seq, summary.last_seq), (8, 10));
    log.records[9].record.detail.push('!');
    assert_eq!(bad(&log.export()).at, At::Record { seq: 10 });
}

#[test]
fn what_was_seen_must_still_be_there() {
    let seen_of = |log: &Log, seq| Seen { key: signer(1).key(), seq, hash: log.hash(seq) };
    let judge = |log: &Log, seen: &Seen| verify(&log.export(), &Demands { key: None, seen: Some(seen) });
    let whole = log();
    for seq in 0..=10 {
        judge(&whole, &seen_of(&whole, seq)).expect("unchanged");
    }
    // Cut back to a head, with all heads behind it: whole by itself.
    let mut cut = whole.clone();
    cut.records.truncate(8);
    cut.heads.retain(|signed| signed.head.seq <= 8);
    let found = judge(&cut, &seen_of(&whole, 10)).expect_err("cut");
    assert_eq!((found.at, found.why), (At::Record { seq: 9 }, Why::RolledBack { seen_seq: 10 }));
    // Begun anew and signed anew with the same key.
    let anew = Log::new(&["x".into(), "y".into()], 4, 0);
    let found = judge(&anew, &seen_of(&whole, 2)).expect_err("another log");
    assert_eq!((found.at, found.why), (At::Record { seq: 2 }, Why::ChangedSinceSeen));
    // What was seen and dropped since cannot be compared.
    let details: Vec<String> = (0..10).map(|n| n.to_string()).collect();
    judge(&Log::new(&details, 4, 5), &seen_of(&whole, 3)).expect("a head says that it was dropped");
}

#[test]
fn an_export_that_began_before_the_front_was_dropped_verifies() {
    let mut log = log();
    let later = {
        let mut later = log.clone();
        later.drop_front(5);
        later.head(10)
    };
    log.heads.pop();
    log.heads.push(later);
    assert_eq!(verify(&log.export(), &demands()).expect("whole").first_seq, 1);
}

#[test]
fn the_end_of_a_log_is_followed() {
    let log = log();
    assert_eq!(follow(4, log.hash(4), &log.records[4..]), Ok((10, log.hash(10))));
    assert_eq!(follow(4, log.hash(3), &log.records[4..]), Err(5));
    assert_eq!(follow(4, log.hash(4), &log.records[5..]), Err(5));
}

/// The format does not change by accident: exports are kept for years.
#[test]
fn the_format_is_the_one_that_is_written_down() {
    assert_eq!(genesis().to_string(), "164a0e3075434016cd2950c2eee87e4fda81a15c2a279b7641e2a530a6f2f185");
    let log = Log::new(&["plan\u{e9} \"x\"".into()], 4, 0);
    // Its hashes and signatures were also checked with Python's hashlib and OpenSSL.
    assert_eq!(String::from_utf8_lossy(&log.export()), include_str!("example.jsonl"));
}
