//! Which record is the first that is not as it was written?
//!
//! In:    the bytes of an export, the key it must be signed with, and what was seen of the log before.
//! Out:   a [`Summary`], or the [`FirstBad`] line and why.
//! Always: every record up to the newest head is vouched for by a signature. Records behind it are bound to it by
//!         their hashes alone: whoever can write the store could replace those, until the next head (30 s).
//! Never:  a judgement of what was decided.
//!
//! What it cannot see by itself: a log that was cut at a head, with all heads behind it. [`Demands::seen`] shows
//! that: whoever verifies remembers the newest head.

use crate::chain::{authentic, genesis, link};
use crate::export::{Line, lines, meant_record};
use agentd_domain::audit::{Digest, Head, Linked, PublicKey, SignedHead, Verdict};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fmt;

/// Canonical JSON has no larger integers (RFC 8785, 3.2.2.3, and RFC 7493, 2.2).
const NUMBERS_END: u64 = 1 << 53;

/// By what an export is judged.
#[derive(Debug, Clone, Copy, Default)]
pub struct Demands<'d> {
    /// Without one the export's own is taken: that shows damage and no forgery.
    pub key: Option<PublicKey>,
    pub seen: Option<&'d Seen>,
}

/// What whoever verified a log remembers of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seen {
    pub key: PublicKey,
    pub seq: u64,
    pub hash: Digest,
}

/// A log that is whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// The oldest record; those before it were dropped, and a head says so.
    pub first_seq: u64,
    /// The newest record; one less than `first_seq` when there is none.
    pub last_seq: u64,
    /// Up to here a signature vouches.
    pub signed_seq: u64,
    /// The hash of the record `signed_seq`.
    pub signed_hash: Digest,
    pub key: PublicKey,
    pub heads: u64,
    pub decisions: Tally,
}

/// Decisions, not records: one record may stand for many.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    pub allowed: u64,
    pub denied: u64,
    pub killed: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{at} is the first bad one: {why}")]
pub struct FirstBad {
    pub at: At,
    /// In the export, from 1; one past its end when something is missing there.
    pub line: usize,
    pub why: Why,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "snake_case")]
pub enum At {
    Record {
        seq: u64,
    },
    /// The head behind the record `seq`.
    Head {
        seq: u64,
    },
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Record { seq } => write!(f, "record {seq}"),
            Self::Head { seq } => write!(f, "the head behind record {seq}"),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Why {
    #[error("it does not match its hash and the record before it")]
    Altered,
    #[error("its line cannot be read: {text}")]
    Unreadable { text: String },
    #[error("it is missing")]
    Dropped,
    #[error("it is missing at the beginning, and no head says that it was dropped")]
    CutFront,
    #[error("it is missing, and the signed head of record {signed_seq} says that it was there")]
    CutTail { signed_seq: u64 },
    #[error("it is not in its place")]
    Reordered,
    #[error("it is there twice")]
    Duplicated,
    #[error("it or one that follows, up to {to_seq}, was written anew: the signed head has another hash")]
    Rewritten { to_seq: u64 },
    #[error("its signature is not valid")]
    Forged,
    #[error("it is signed with the key {found}, and not with {wanted}")]
    OtherKey { wanted: PublicKey, found: PublicKey },
    #[error("no signed head vouches for the log")]
    NoHead,
    #[error("it is missing, and record {seen_seq} was seen before")]
    RolledBack { seen_seq: u64 },
    #[error("it or one before it was written anew since it was seen")]
    ChangedSinceSeen,
}

/// Reads a whole export. `Err` names the first line that is not as it was written.
pub fn verify(export: &[u8], demands: &Demands<'_>) -> Result<Summary, FirstBad> {
    let lines = lines(export);
    let heads = Heads::of(&lines, demands.key);
    let start = heads.start(&lines);
    let mut walk = Walk { lines: &lines, heads: &heads, start, at: start, signed_from: start };
    let mut hashes = Vec::new();
    let mut tally = Tally::default();
    for (index, line) in lines.iter().enumerate() {
        let before = hashes.last().copied().unwrap_or(start.before);
        if let Some(linked) = walk.step(index, line, before)? {
            hashes.push(linked.hash);
            tally.count(linked);
        }
    }
    let last_seq = walk.at.seq - 1;
    let end = |at, why| FirstBad { at, line: lines.len() + 1, why };
    let Some(newest) = heads.newest() else { return Err(end(At::Head { seq: last_seq }, Why::NoHead)) };
    let (signed_seq, key) = (newest.head.seq, newest.head.key);
    if signed_seq > last_seq {
        return Err(end(At::Record { seq: last_seq + 1 }, Why::CutTail { signed_seq }));
    }
    if let Some(seen) = demands.seen {
        not_unlike(seen, key, &start, &hashes, last_seq).map_err(|(at, why)| end(at, why))?;
    }
    Ok(Summary {
        first_seq: start.seq,
        last_seq,
        signed_seq,
        signed_hash: newest.head.hash,
        key,
        heads: heads.good.len() as u64,
        decisions: tally,
    })
}

/// Whether these lines follow the record with this number and hash; the last one's number and hash. For the end of
/// a log that no head vouches for yet.
pub fn follow<'l>(
    seq: u64,
    hash: Digest,
    lines: impl IntoIterator<Item = &'l Linked>,
) -> Result<(u64, Digest), u64> {
    lines.into_iter().try_fold((seq, hash), |(seq, hash), linked| {
        let next = seq + 1;
        let fits = linked.record.seq == next && link(&hash, &linked.record) == linked.hash;
        if fits { Ok((next, linked.hash)) } else { Err(next) }
    })
}

/// Where the log begins, or what is expected next: a number and the hash before it.
#[derive(Clone, Copy)]
struct Place {
    seq: u64,
    before: Digest,
}

/// The heads that are signed with the right key, and why the others vouch for nothing.
struct Heads<'l> {
    good: Vec<&'l SignedHead>,
    /// By the line's index.
    faults: BTreeMap<usize, Why>,
}

impl<'l> Heads<'l> {
    /// Checks each signature once: it is the most expensive thing here.
    fn of(lines: &'l [Line<'l>], demanded: Option<PublicKey>) -> Self {
        let judged = lines.iter().enumerate().filter_map(|(index, line)| match line {
            Line::Head(signed) => Some((index, &**signed, possible(&signed.head) && authentic(signed))),
            _ => None,
        });
        let judged: Vec<_> = judged.collect();
        // An export has one key: agentd drops the heads of a lost one.
        let newest = judged.iter().filter(|(.., authentic)| *authentic).max_by_key(|(_, s, _)| s.head.seq);
        let wanted = demanded.or(newest.map(|(_, signed, _)| signed.head.key));
        let mut heads = Self { good: Vec::new(), faults: BTreeMap::new() };
        for (index, signed, authentic) in judged {
            let found = signed.head.key;
            match wanted {
                Some(wanted) if authentic && wanted == found => heads.good.push(signed),
                Some(wanted) if authentic => {
                    heads.faults.insert(index, Why::OtherKey { wanted, found });
                }
                _ => {
                    heads.faults.insert(index, Why::Forged);
                }
            }
        }
        heads
    }

    fn newest(&self) -> Option<&'l SignedHead> {
        self.good.iter().max_by_key(|signed| signed.head.seq).copied()
    }

    /// Where the records must begin: where the newest head says. They may begin before, if they were read while the
    /// log was shortened; then an older head says so.
    fn start(&self, lines: &[Line<'_>]) -> Place {
        let beginning = Place { seq: 1, before: genesis() };
        let main = self.newest().map_or(beginning, Place::of);
        let Some(first) = lines.iter().find_map(Line::record) else { return main };
        let older = self.good.iter().map(|signed| Place::of(signed)).chain([beginning]);
        older
            .filter(|place| place.seq < main.seq && place.seq == first.record.seq)
            .find(|place| link(&place.before, &first.record) == first.hash)
            .unwrap_or(main)
    }
}

/// Numbers that a log can have; a signature of others is no use.
fn possible(head: &Head) -> bool {
    (1..NUMBERS_END).contains(&head.first_seq) && head.seq < NUMBERS_END
}

impl Place {
    fn of(signed: &SignedHead) -> Self {
        Self { seq: signed.head.first_seq, before: signed.head.before }
    }
}

/// A way through the lines, one expected number after the other.
struct Walk<'l> {
    lines: &'l [Line<'l>],
    heads: &'l Heads<'l>,
    start: Place,
    /// Expected next. Its hash is not used here.
    at: Place,
    /// The first record that no head has vouched for so far.
    signed_from: Place,
}

impl<'l> Walk<'l> {
    /// The record of this line, if it is one and in its place.
    fn step(
        &mut self,
        index: usize,
        line: &'l Line<'l>,
        before: Digest,
    ) -> Result<Option<&'l Linked>, FirstBad> {
        match line {
            Line::Bad { bytes, why } => Err(self.unreadable(index, bytes, why)),
            Line::Head(signed) => self.head(index, signed, before).map(|()| None),
            Line::Record(linked) => {
                self.record(index, linked, before)?;
                self.at.seq += 1;
                Ok(Some(linked))
            }
        }
    }

    fn unreadable(&self, index: usize, bytes: &[u8], why: &str) -> FirstBad {
        let next = self.lines[index + 1..].iter().find_map(Line::record).map(|linked| linked.record.seq);
        let record = meant_record(bytes).unwrap_or(next != Some(self.at.seq));
        let why = Why::Unreadable { text: why.to_owned() };
        let at = if record { At::Record { seq: self.at.seq } } else { At::Head { seq: self.at.seq - 1 } };
        FirstBad { at, line: index + 1, why }
    }

    fn head(&mut self, index: usize, signed: &SignedHead, hash: Digest) -> Result<(), FirstBad> {
        let here = self.at.seq - 1;
        let bad = |at, why| Err(FirstBad { at, line: index + 1, why });
        if let Some(why) = self.heads.faults.get(&index) {
            return bad(At::Head { seq: here }, why.clone());
        }
        match signed.head.seq {
            seq if seq > here => Err(self.missing(index)),
            seq if seq < here => bad(At::Head { seq }, Why::Reordered),
            seq if signed.head.hash != hash => {
                bad(At::Record { seq: self.signed_from.seq }, Why::Rewritten { to_seq: seq })
            }
            _ => {
                self.signed_from.seq = here + 1;
                Ok(())
            }
        }
    }

    fn record(&self, index: usize, linked: &Linked, before: Digest) -> Result<(), FirstBad> {
        let expected = self.at.seq;
        let found = linked.record.seq;
        let bad = |seq, why| Err(FirstBad { at: At::Record { seq }, line: index + 1, why });
        if found == expected {
            let fits = link(&before, &linked.record) == linked.hash;
            return if fits { Ok(()) } else { bad(expected, Why::Altered) };
        }
        if found > expected {
            return Err(self.missing(index));
        }
        let twice = self.lines[..index].iter().filter_map(Line::record).any(|earlier| earlier == linked);
        if twice { bad(found, Why::Duplicated) } else { bad(expected, Why::Altered) }
    }

    /// A line that comes too early stands where the expected record should.
    fn missing(&self, index: usize) -> FirstBad {
        let expected = self.at.seq;
        let line = index + 1;
        // Where the records begin is what a head says. If one cannot be believed, that is the first fault.
        if let (true, Some(fault)) = (expected == self.start.seq, self.unsure_beginning()) {
            return fault;
        }
        let mut rest = self.lines[index..].iter().filter_map(Line::record).map(|linked| linked.record.seq);
        let why = match (rest.clone().any(|seq| seq == expected), rest.nth(1)) {
            (true, _) => Why::Reordered,
            // Its number was changed: the next one is in its place.
            (false, Some(next)) if next == expected + 1 => Why::Altered,
            _ if expected == self.start.seq => Why::CutFront,
            _ => Why::Dropped,
        };
        FirstBad { at: At::Record { seq: expected }, line, why }
    }

    /// The first head that vouches for nothing, or line that cannot be read, wherever it stands: it may have swallowed
    /// the head that says where the log begins.
    fn unsure_beginning(&self) -> Option<FirstBad> {
        let fault = |index: usize, line: &Line<'_>| match line {
            Line::Head(_) => self.heads.faults.get(&index).map(|why| (false, why.clone())),
            Line::Bad { bytes, why } => {
                Some((meant_record(bytes).unwrap_or(true), Why::Unreadable { text: why.clone() }))
            }
            Line::Record(_) => None,
        };
        let mut lines = self.lines.iter().enumerate();
        let (index, (record, why)) = lines.find_map(|(index, line)| Some((index, fault(index, line)?)))?;
        let number = |line: &Line<'_>| line.record().map(|linked| linked.record.seq);
        let (before, behind) = self.lines.split_at(index);
        let behind = || behind.iter().find_map(number)?.checked_sub(1 + u64::from(record));
        let last = before.iter().rev().find_map(number).or_else(behind).unwrap_or(0);
        let at = if record { At::Record { seq: last + 1 } } else { At::Head { seq: last } };
        Some(FirstBad { at, line: index + 1, why })
    }
}

/// Whether what was seen before can have become this.
fn not_unlike(
    seen: &Seen,
    key: PublicKey,
    start: &Place,
    hashes: &[Digest],
    last_seq: u64,
) -> Result<(), (At, Why)> {
    if seen.key != key {
        return Err((At::Head { seq: last_seq }, Why::OtherKey { wanted: seen.key, found: key }));
    }
    if seen.seq > last_seq {
        return Err((At::Record { seq: last_seq + 1 }, Why::RolledBack { seen_seq: seen.seq }));
    }
    let known: HashMap<u64, Digest> = [(start.seq - 1, start.before)]
        .into_iter()
        .chain((start.seq..).zip(hashes.iter().copied()))
        .collect();
    match known.get(&seen.seq) {
        Some(hash) if *hash != seen.hash => Err((At::Record { seq: seen.seq }, Why::ChangedSinceSeen)),
        // What was seen may have been dropped since.
        _ => Ok(()),
    }
}

impl Tally {
    fn count(&mut self, linked: &Linked) {
        let of = match linked.record.verdict {
            Verdict::Allowed => &mut self.allowed,
            Verdict::Denied => &mut self.denied,
            Verdict::Killed => &mut self.killed,
        };
        *of += u64::from(linked.record.count);
    }
}
