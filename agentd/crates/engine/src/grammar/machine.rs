//! What may come after what was read so far?
//!
//! A *stack* is what is still to be read one way: where in which alternative, for each rule within which it stands. A
//! *state* is all stacks that what was read leaves open. States and the ways between them are found as they are needed
//! and kept, so that every sequence with the same grammar finds what another one has found.
//!
//! True:  equal stacks are one number, equal states are one number; each state is worked out once. What is kept is
//!        bounded ([`KEPT_BYTES`]): beyond that everything is forgotten and found again.
//! Cost:  counted in stacks looked at, so that a limit is the same on every machine. Ambiguous grammars have very many
//!        stacks in one state; that is where the limit strikes.

use super::program::{Element, Program};
use super::vocabulary::Words;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// What one grammar may keep: as much again while one token is looked for.
const KEPT_BYTES: usize = 4 * 1024 * 1024;
const MASKS_BYTES: usize = 2 * 1024 * 1024;
/// Of a node or a stack of a state, with their places in the tables.
const NODE_BYTES: usize = 40;

/// The stack with nothing left to read.
const NOTHING: u32 = 0;
/// The state in which no text can be.
const DEAD: u32 = 0;
const UNKNOWN: u32 = u32::MAX;

/// Why there is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The work of this turn is used up. What was found is kept: asked again, it goes on from there.
    Later,
    /// It needs more than will ever be given.
    TooMuch,
}

/// The tokens that may come next.
#[derive(Debug)]
pub(crate) struct Mask {
    bits: Box<[u64]>,
}

impl Mask {
    #[cfg(test)]
    pub(crate) fn has(&self, token: u32) -> bool {
        self.bits.get(token as usize / 64).is_some_and(|word| word >> (token % 64) & 1 == 1)
    }

    pub(crate) fn tokens(&self) -> impl Iterator<Item = u32> + '_ {
        self.bits.iter().enumerate().flat_map(|(index, word)| {
            let mut left = *word;
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros())?;
                left &= left - 1;
                Some(index as u32 * 64 + bit)
            })
        })
    }

    fn set(&mut self, token: u32) {
        if let Some(word) = self.bits.get_mut(token as usize / 64) {
            *word |= 1 << (token % 64);
        }
    }
}

/// A character of which some bytes were read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Begun {
    bits: u32,
    /// Bytes still to come.
    left: u8,
    /// The least character that may be written with so many bytes.
    least: u32,
}

/// Where a text stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Position {
    state: u32,
    begun: Begun,
}

pub(crate) struct Machine {
    program: Program,
    /// Stacks: what is on top (a place in the program), and the stack below it.
    nodes: Vec<(u32, u32)>,
    node_ids: HashMap<(u32, u32), u32>,
    /// States: stacks whose top reads a character, or that have nothing left to read.
    states: Vec<Arc<[u32]>>,
    state_ids: HashMap<Arc<[u32]>, u32>,
    /// For each state and class, the state after it.
    next: Vec<u32>,
    masks: HashMap<Position, Arc<Mask>>,
    /// Stacks of all states.
    held: usize,
    start: u32,
    /// Changes when everything is forgotten: positions of before mean nothing then.
    epoch: u64,
    /// Stacks that may still be looked at.
    work: u64,
}

impl Machine {
    pub(crate) fn new(program: Program) -> Self {
        let mut machine = Self {
            program,
            nodes: Vec::new(),
            node_ids: HashMap::new(),
            states: Vec::new(),
            state_ids: HashMap::new(),
            next: Vec::new(),
            masks: HashMap::new(),
            held: 0,
            start: UNKNOWN,
            epoch: 0,
            work: 0,
        };
        machine.forget();
        machine
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Stacks that may be looked at from now on; returns what was left.
    pub(crate) fn give(&mut self, work: u64) -> u64 {
        std::mem::replace(&mut self.work, work)
    }

    /// Makes room, if too much is kept. Positions are worth nothing then.
    pub(crate) fn tidy(&mut self) {
        if self.kept_bytes() > KEPT_BYTES {
            self.forget();
        }
        if self.masks.values().map(|mask| mask.bits.len() * 8).sum::<usize>() > MASKS_BYTES {
            self.masks.clear();
        }
    }

    fn kept_bytes(&self) -> usize {
        self.nodes.len() * NODE_BYTES + self.held * NODE_BYTES / 4 + self.next.len() * 4
    }

    pub(super) fn forget(&mut self) {
        self.epoch += 1;
        (self.nodes, self.states, self.next) = (vec![(u32::MAX, NOTHING)], Vec::new(), Vec::new());
        self.node_ids.clear();
        self.state_ids.clear();
        self.masks.clear();
        self.held = 0;
        self.start = UNKNOWN;
        // The first state is the one without a stack.
        self.state(Vec::new());
    }

    /// Before anything was read.
    pub(crate) fn start(&mut self) -> Result<Position, Stop> {
        if self.start == UNKNOWN {
            let mut found = Vec::new();
            for begin in self.program.alternatives(self.program.root()).to_vec() {
                match self.program.element(begin) {
                    Element::End => found.push(NOTHING),
                    _ => {
                        let stack = self.node(begin, NOTHING);
                        self.open(stack, &mut found)?;
                    }
                }
            }
            self.start = self.state(found);
        }
        Ok(Position { state: self.start, begun: Begun::default() })
    }

    /// What was read may be all of it.
    pub(crate) fn is_complete(&self, at: Position) -> bool {
        at.begun.left == 0 && self.states[at.state as usize].contains(&NOTHING)
    }

    /// What was read is all of it: nothing can follow.
    pub(crate) fn is_finished(&self, at: Position) -> bool {
        at.begun.left == 0 && *self.states[at.state as usize] == [NOTHING]
    }

    /// After some bytes more; `None` where no text goes on like that.
    pub(crate) fn read(&mut self, mut at: Position, bytes: &[u8]) -> Result<Option<Position>, Stop> {
        for byte in bytes {
            match self.step(at, *byte)? {
                Some(next) => at = next,
                None => return Ok(None),
            }
        }
        Ok(self.is_open(at)?.then_some(at))
    }

    /// The tokens that may come next.
    pub(crate) fn mask(&mut self, at: Position, words: &Words) -> Result<Arc<Mask>, Stop> {
        if let Some(known) = self.masks.get(&at) {
            return Ok(Arc::clone(known));
        }
        let mut mask = Mask { bits: vec![0; words.tokens().div_ceil(64)].into() };
        // Where the word before stood after each of its bytes, and how many of these were possible.
        let mut stood = vec![at];
        let mut possible = usize::MAX;
        for word in words.in_order() {
            if word.common > possible {
                continue;
            }
            stood.truncate(word.common.min(stood.len() - 1) + 1);
            possible = usize::MAX;
            while stood.len() <= word.bytes.len() {
                let (here, depth) = (stood[stood.len() - 1], stood.len() - 1);
                match self.step(here, word.bytes[depth])? {
                    Some(next) => stood.push(next),
                    None => {
                        possible = depth;
                        break;
                    }
                }
            }
            if possible == usize::MAX && self.is_open(stood[stood.len() - 1])? {
                mask.set(word.token);
            }
        }
        if self.is_complete(at) {
            words.ends().iter().for_each(|token| mask.set(*token));
        }
        let mask = Arc::new(mask);
        self.masks.insert(at, Arc::clone(&mask));
        Ok(mask)
    }

    fn step(&mut self, at: Position, byte: u8) -> Result<Option<Position>, Stop> {
        let begun = if at.begun.left == 0 {
            match byte {
                0..0x80 => return self.after(at.state, u32::from(byte)),
                0xc2..0xe0 => Begun { bits: u32::from(byte & 0x1f), left: 1, least: 0x80 },
                0xe0..0xf0 => Begun { bits: u32::from(byte & 0x0f), left: 2, least: 0x800 },
                0xf0..0xf5 => Begun { bits: u32::from(byte & 0x07), left: 3, least: 0x1_0000 },
                _ => return Ok(None),
            }
        } else if byte & 0xc0 == 0x80 {
            let begun = at.begun;
            Begun { bits: begun.bits << 6 | u32::from(byte & 0x3f), left: begun.left - 1, ..begun }
        } else {
            return Ok(None);
        };
        let Some((first, _)) = begun.range() else { return Ok(None) };
        if begun.left == 0 {
            return self.after(at.state, first);
        }
        Ok(Some(Position { state: at.state, begun }))
    }

    fn after(&mut self, state: u32, character: u32) -> Result<Option<Position>, Stop> {
        let next = self.next(state, self.program.class_of(character))?;
        Ok((next != DEAD).then_some(Position { state: next, begun: Begun::default() }))
    }

    /// Some character that begins like this may come.
    fn is_open(&mut self, at: Position) -> Result<bool, Stop> {
        if at.begun.left == 0 {
            return Ok(true);
        }
        let Some((first, last)) = at.begun.range() else { return Ok(false) };
        for class in self.program.class_of(first)..=self.program.class_of(last) {
            if self.next(at.state, class)? != DEAD {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn next(&mut self, state: u32, class: u16) -> Result<u32, Stop> {
        let place = state as usize * self.program.classes() + usize::from(class);
        if self.next[place] != UNKNOWN {
            return Ok(self.next[place]);
        }
        let stacks = Arc::clone(&self.states[state as usize]);
        let mut found = Vec::new();
        for stack in stacks.iter().copied().filter(|stack| *stack != NOTHING) {
            self.spend()?;
            let (top, below) = self.nodes[stack as usize];
            let Element::Set(set) = self.program.element(top) else { continue };
            if !self.program.has(set, class) {
                continue;
            }
            let rest = self.rest(top, below);
            self.open(rest, &mut found)?;
        }
        let next = self.state(found);
        self.next[place] = next;
        Ok(next)
    }

    /// The stack once its top was read.
    fn rest(&mut self, top: u32, below: u32) -> u32 {
        match self.program.element(top + 1) {
            Element::End => below,
            _ => self.node(top + 1, below),
        }
    }

    /// Goes into rules until a character is to be read, in every way.
    fn open(&mut self, stack: u32, found: &mut Vec<u32>) -> Result<(), Stop> {
        let mut seen = HashSet::new();
        let mut left = vec![stack];
        while let Some(stack) = left.pop() {
            if stack == NOTHING {
                found.push(NOTHING);
                continue;
            }
            if !seen.insert(stack) {
                continue;
            }
            self.spend()?;
            let (top, below) = self.nodes[stack as usize];
            match self.program.element(top) {
                Element::Set(_) => found.push(stack),
                Element::End => {}
                Element::Rule(rule) => {
                    let rest = self.rest(top, below);
                    for index in 0..self.program.alternatives(rule).len() {
                        self.spend()?;
                        let begin = self.program.alternatives(rule)[index];
                        match self.program.element(begin) {
                            Element::End => left.push(rest),
                            _ => left.push(self.node(begin, rest)),
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn spend(&mut self) -> Result<(), Stop> {
        if self.kept_bytes() > 2 * KEPT_BYTES {
            return Err(Stop::TooMuch);
        }
        self.work = self.work.checked_sub(1).ok_or(Stop::Later)?;
        Ok(())
    }

    fn node(&mut self, top: u32, below: u32) -> u32 {
        let new = self.nodes.len() as u32;
        let id = *self.node_ids.entry((top, below)).or_insert(new);
        if id == new {
            self.nodes.push((top, below));
        }
        id
    }

    fn state(&mut self, mut stacks: Vec<u32>) -> u32 {
        stacks.sort_unstable();
        stacks.dedup();
        if let Some(known) = self.state_ids.get(stacks.as_slice()) {
            return *known;
        }
        let id = self.states.len() as u32;
        let stacks: Arc<[u32]> = stacks.into();
        self.held += stacks.len();
        self.states.push(Arc::clone(&stacks));
        self.state_ids.insert(stacks, id);
        let unknown = if id == DEAD { DEAD } else { UNKNOWN };
        self.next.resize(self.next.len() + self.program.classes(), unknown);
        id
    }
}

impl Begun {
    /// The characters that it may become, if any.
    fn range(self) -> Option<(u32, u32)> {
        let low = self.bits << (6 * self.left);
        let high = (low | ((1 << (6 * self.left)) - 1)).min(0x10_ffff);
        let low = low.max(self.least);
        let surrogates = 0xd800 <= low && high <= 0xdfff;
        (low <= high && !surrogates).then_some((low, high))
    }
}

impl Position {
    /// Of a machine that was forgotten, or of none: to be found again.
    pub(crate) fn nowhere() -> Self {
        Self { state: DEAD, begun: Begun::default() }
    }
}
