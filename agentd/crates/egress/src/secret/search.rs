//! Where in a text does one of the forms stand?
//!
//! In:     a text in pieces. Out: the same text, in which every form is overwritten with as many stars.
//! Always: every way to read a text is followed at once: at each place a byte may be itself, or the beginning of an
//!         escape. So a form is found whatever stands before it and however its letters are escaped. What may still
//!         become a form is held back, from its first byte on, and no more than that.
//! Cost:   for each byte of the text one shift of all [`Forms`] (64 of their letters at a time), and next to nothing where
//!         no form begins. Once more backwards for what was found, and a few times for what is held at the end of a
//!         piece, to see where it began. So it is bounded by the length of the text and that of the secret, whatever
//!         they are.
//! Never:  a match that is shorter than a form: parts of a secret are not looked for.

use super::escape::{self, Reading};
use super::forms::{Forms, Places};
use std::collections::BTreeMap;
use std::ops::Range;

/// Base64 that is wrapped into lines has 60 letters and more in each (RFC 2045, 6.8: up to 76). A line end behind fewer is
/// taken for the end of what stands there: without this every other line of plain text would wait for the next one.
const WRAPPED_LEAST: usize = 16;

/// The text that was not passed on yet, and what was read of it.
pub(super) struct Search<'a> {
    forms: &'a Forms,
    text: Vec<u8>,
    /// So many bytes of the text were read.
    read: usize,
    /// The places that end with the last byte read. Bit `n` says that the text ends with the first letters of a form
    /// up to its letter `n`.
    now: Places,
    any: bool,
    /// The same for bytes ahead: an escape's letter counts where the escape ends.
    ahead: BTreeMap<usize, Places>,
    found: Vec<Range<usize>>,
    next: Places,
    /// How many letters of base64 were read last, line ends and what may escape one left out.
    letters: usize,
    /// How much was held back when this was last looked at, and how much has come since. Pieces of a byte each would
    /// otherwise cost the length of the secret each.
    held: usize,
    fresh: usize,
}

/// One step from a place of the text.
enum Step {
    /// So many bytes mean this letter.
    Letter(usize, u8),
    /// So many bytes mean nothing inside a form that is wrapped into lines, or inside any (the other half of a letter
    /// of UTF-16).
    Over(usize, Within),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Within {
    Wrapped,
    Any,
}

impl<'a> Search<'a> {
    pub(super) fn new(forms: &'a Forms) -> Self {
        Self {
            forms,
            text: Vec::new(),
            read: 0,
            now: forms.none(),
            any: false,
            ahead: BTreeMap::new(),
            found: Vec::new(),
            next: forms.none(),
            letters: 0,
            held: 0,
            fresh: 0,
        }
    }

    /// The whole of a text.
    pub(super) fn whole(forms: &'a Forms, text: &[u8]) -> Vec<u8> {
        let mut search = Self::new(forms);
        let mut out = search.piece(text);
        out.extend(search.rest());
        out
    }

    /// What can be passed on now.
    pub(super) fn piece(&mut self, content: &[u8]) -> Vec<u8> {
        self.text.extend_from_slice(content);
        self.advance(Reading::Open);
        self.fresh += content.len();
        if self.any && self.fresh < self.held / 8 {
            return Vec::new();
        }
        let mut ends = std::mem::take(&mut self.ahead);
        if self.any {
            ends.insert(self.read, self.now.clone());
        }
        let held = self.began(&ends).unwrap_or(self.read);
        self.ahead = ends.split_off(&(self.read + 1));
        self.fresh = 0;
        self.held = self.text.len() - held;
        self.pass_on(held)
    }

    /// What was held back; the text is over.
    pub(super) fn rest(&mut self) -> Vec<u8> {
        self.advance(Reading::Complete);
        let all = self.pass_on(self.text.len());
        self.now.fill(0);
        self.any = false;
        self.ahead.clear();
        all
    }

    /// Reads on, up to an escape whose end is not there; when nothing follows, to the end.
    fn advance(&mut self, more: Reading) {
        while let Some(&byte) = self.text.get(self.read) {
            let plain = match byte {
                b'%' | b'\\' | b'&' => false,
                0 | b'\r' | b'\n' => !self.any,
                _ => true,
            };
            if plain && self.ahead.is_empty() {
                self.letter(byte);
            } else if self.steps(more) == Reading::Open {
                return;
            }
            self.read += 1;
            self.letters = match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'+' | b'/' | b'-' | b'_' => self.letters + 1,
                b'\r' | b'\\' | b'%' => self.letters,
                _ => 0,
            };
            if self.any {
                self.look();
            }
        }
    }

    /// The usual case: the byte is itself and nothing else.
    fn letter(&mut self, byte: u8) {
        match self.forms.may_stand(byte) {
            Some(row) => {
                self.any = follow(self.any.then_some(&self.now), &self.forms.first, row, &mut self.next)
            }
            None if self.any => {
                self.next.fill(0);
                self.any = false;
            }
            None => return,
        }
        std::mem::swap(&mut self.now, &mut self.next);
    }

    /// All ways to go on from here.
    fn steps(&mut self, more: Reading) -> Reading {
        let at = self.read;
        let (steps, reading) = steps(&self.text, at);
        if reading == Reading::Open && more == Reading::Open {
            return Reading::Open;
        }
        let mut reached = self.forms.none();
        for step in steps {
            let length = match step {
                Step::Letter(length, byte) => {
                    let Some(row) = self.forms.may_stand(byte) else { continue };
                    if !follow(Some(&self.now), &self.forms.first, row, &mut reached) {
                        continue;
                    }
                    length
                }
                Step::Over(length, within) => {
                    let wraps = within == Within::Any || self.letters >= WRAPPED_LEAST;
                    if !(self.any && wraps && self.over(within, &mut reached)) {
                        continue;
                    }
                    length
                }
            };
            let there = self.ahead.entry(at + length).or_insert_with(|| self.forms.none());
            union(there, &reached);
        }
        match self.ahead.remove(&(at + 1)) {
            Some(next) => {
                self.now = next;
                self.any = true;
            }
            None => {
                self.now.fill(0);
                self.any = false;
            }
        }
        Reading::Complete
    }

    /// The places of now that stay what they are.
    fn over(&self, within: Within, reached: &mut Places) -> bool {
        let mut any = 0;
        let forms = self.forms;
        let rows = self.now.iter().zip(&forms.last).zip(&forms.wrapped).zip(reached.iter_mut());
        for (((now, last), wrapped), to) in rows {
            *to = now & !last & if within == Within::Any { u64::MAX } else { *wrapped };
            any |= *to;
        }
        any != 0
    }

    /// Marks what ends here.
    fn look(&mut self) {
        let mut any = 0;
        for ((now, last), to) in self.now.iter().zip(&self.forms.last).zip(self.next.iter_mut()) {
            *to = now & last;
            any |= *to;
        }
        if any == 0 {
            return;
        }
        let ends = BTreeMap::from([(self.read, self.next.clone())]);
        if let Some(from) = self.began(&ends) {
            self.found.push(from..self.read);
        }
        // What overlaps with this one has lost a letter to it, so each byte is gone back over once. But if the last
        // letter is a sign that begins an escape, all of the escape belongs to the form.
        self.now.fill(0);
        self.any = false;
        self.ahead.retain(|_, places| {
            let rows = places.iter_mut().zip(&self.forms.last);
            rows.fold(0, |any, (place, last)| {
                *place &= last;
                any | *place
            }) != 0
        });
    }

    /// Where the earliest form begins that has come to one of these places.
    fn began(&self, ends: &BTreeMap<usize, Places>) -> Option<usize> {
        let (end, _) = ends.last_key_value()?;
        let mut back = ends.clone();
        let mut earliest = None;
        for at in (0..(*end).min(self.text.len())).rev() {
            // What lies further ahead than any step goes is done with.
            while back.last_key_value().is_some_and(|(place, _)| *place > at + escape::LONGEST) {
                back.pop_last();
            }
            if back.is_empty() {
                break;
            }
            let (steps, _) = steps(&self.text, at);
            let mut reached = self.forms.none();
            let mut any = false;
            for step in steps {
                let (length, row) = match step {
                    Step::Letter(length, byte) => (length, self.forms.may_stand(byte)),
                    Step::Over(length, _) => (length, None),
                };
                let Some(there) = back.get(&(at + length)) else { continue };
                match step {
                    Step::Letter(..) => {
                        let Some(row) = row else { continue };
                        let (begins, before) = unfollow(there, &self.forms.first, row, &mut reached);
                        if begins {
                            earliest = Some(at);
                        }
                        any |= before;
                    }
                    Step::Over(_, within) => {
                        let rows = there.iter().zip(&self.forms.last).zip(&self.forms.wrapped);
                        for (((there, last), wrapped), to) in rows.zip(reached.iter_mut()) {
                            *to |= there & !last & if within == Within::Any { u64::MAX } else { *wrapped };
                            any |= *to != 0;
                        }
                    }
                }
            }
            if any {
                match back.get_mut(&at) {
                    Some(there) => union(there, &reached),
                    None => drop(back.insert(at, reached)),
                }
            }
        }
        earliest
    }

    /// Takes the text up to here, with its stars, and forgets it.
    fn pass_on(&mut self, end: usize) -> Vec<u8> {
        let kept = self.text.split_off(end);
        let mut out = std::mem::replace(&mut self.text, kept);
        for range in std::mem::take(&mut self.found) {
            if let Some(place) = out.get_mut(range.start..range.end.min(end)) {
                place.fill(b'*');
            }
            if range.end > end {
                self.found.push(range.start.saturating_sub(end)..range.end - end);
            }
        }
        self.read -= end;
        self.ahead =
            std::mem::take(&mut self.ahead).into_iter().map(|(at, places)| (at - end, places)).collect();
        out
    }
}

/// The ways to go on from a place, and whether an escape may begin there whose end is not in the text.
fn steps(text: &[u8], at: usize) -> (Vec<Step>, Reading) {
    let (before, here) = text.split_at(at.min(text.len()));
    let Some(byte) = here.first() else { return (Vec::new(), Reading::Complete) };
    let mut steps = vec![Step::Letter(1, *byte)];
    if *byte == 0 && before.last() != Some(&0) {
        steps.push(Step::Over(1, Within::Any));
    }
    if may_end_line(before, *byte) {
        steps.push(Step::Over(1, Within::Wrapped));
    }
    let reading = escape::read(here, |length, byte| {
        steps.push(Step::Letter(length, byte));
        if may_end_line(before, byte) {
            steps.push(Step::Over(length, Within::Wrapped));
        }
    });
    (steps, reading)
}

/// Whether this byte ends a line, and is the only one to do so here or the second half of CR LF. More of them would let
/// a text be held back for ever.
fn may_end_line(before: &[u8], byte: u8) -> bool {
    if !matches!(byte, b'\r' | b'\n') {
        return false;
    }
    let ended = |raw: u8, letter: &[u8], escaped: &[u8]| {
        before.last() == Some(&raw)
            || before.ends_with(letter)
            || before
                .len()
                .checked_sub(3)
                .and_then(|at| before.get(at..))
                .is_some_and(|last| last.eq_ignore_ascii_case(escaped))
    };
    let after_lf = ended(b'\n', b"\\n", b"%0a");
    let after_cr = ended(b'\r', b"\\r", b"%0d");
    !after_lf && (!after_cr || byte == b'\n')
}

/// The places that a letter leads to: `to` is the next place of each of `from`, and each form's first, as far as the
/// letter may stand there. Whether there is any.
fn follow(from: Option<&Places>, first: &Places, row: &[u64], to: &mut Places) -> bool {
    let mut any = 0;
    let Some(from) = from else {
        for ((first, row), to) in first.iter().zip(row).zip(to.iter_mut()) {
            *to = first & row;
            any |= *to;
        }
        return any != 0;
    };
    let mut carry = 0;
    for (((from, first), row), to) in from.iter().zip(first).zip(row).zip(to.iter_mut()) {
        // What a form's last place carries over is the next form's first, which is there anyway.
        *to = (from << 1 | carry | first) & row;
        carry = from >> 63;
        any |= *to;
    }
    any != 0
}

/// The way back: adds to `to` the places from which the letter led to `there`. Whether a form begins with the letter,
/// and whether there is any such place.
fn unfollow(there: &Places, first: &Places, row: &[u64], to: &mut Places) -> (bool, bool) {
    let (mut begins, mut any, mut carry) = (0, 0, 0);
    for (((there, first), row), to) in there.iter().zip(first).zip(row).zip(to.iter_mut()).rev() {
        let letters = there & row;
        begins |= letters & first;
        let inner = letters & !first;
        *to |= inner >> 1 | carry;
        any |= inner;
        carry = inner << 63;
    }
    (begins != 0, any != 0)
}

fn union(into: &mut Places, more: &Places) {
    for (into, more) in into.iter_mut().zip(more) {
        *into |= more;
    }
}
