//! What does a grammar's text say?
//!
//! In:     GBNF from strangers, or from llama.cpp's converter of JSON schemas.
//! Out:    a [`Program`]: rules as lists of elements, characters as sets of classes.
//! Always: bounded in size and depth, whatever the text; no rule begins with itself, so that reading ends.
//! Never:  a bound that is left out: a repetition that is too long to be written out is refused. References to tokens
//!         (`<[7]>`, `<think>`) are refused: what is never shown can keep no form.
//! Source: `grammars/README.md` and `src/llama-grammar.cpp` of llama.cpp, whose rewriting of repetitions this is.

use super::program::{Element, LAST_CHARACTER, Program, Ranges, begins_with_itself};
use std::collections::HashMap;

/// Brackets within brackets; each level of the parser takes some hundred bytes of stack.
const MAX_DEPTH: usize = 64;
/// Elements of all rules, repetitions written out: some megabytes.
const MAX_ELEMENTS: usize = 200_000;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("at byte {at}: {why}")]
pub(crate) struct ParseError {
    pub(crate) at: usize,
    pub(crate) why: String,
}

impl Program {
    /// `root` is the rule to begin with.
    pub(crate) fn parse(text: &str, root: &str) -> Result<Self, ParseError> {
        let mut parser = Parser { text: text.as_bytes(), ..Parser::default() };
        parser.space(true);
        while parser.at < parser.text.len() {
            parser.rule()?;
        }
        parser.finish(root)
    }
}

#[derive(Default)]
struct Parser<'text> {
    text: &'text [u8],
    at: usize,
    depth: usize,
    names: HashMap<Vec<u8>, u32>,
    /// Alternatives of each rule; `None` for one that was named and not written yet.
    rules: Vec<Option<Vec<Vec<Element>>>>,
    sets: Vec<Ranges>,
    known_sets: HashMap<Ranges, u32>,
    elements: usize,
}

impl Parser<'_> {
    fn wrong<T>(&self, why: impl Into<String>) -> Result<T, ParseError> {
        Err(ParseError { at: self.at, why: why.into() })
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn takes(&mut self, wanted: &[u8]) -> bool {
        let found = self.text[self.at..].starts_with(wanted);
        if found {
            self.at += wanted.len();
        }
        found
    }

    fn space(&mut self, lines: bool) {
        while let Some(byte) = self.peek() {
            match byte {
                b' ' | b'\t' => self.at += 1,
                b'\r' | b'\n' if lines => self.at += 1,
                b'#' => {
                    while self.peek().is_some_and(|byte| byte != b'\r' && byte != b'\n') {
                        self.at += 1;
                    }
                }
                _ => return,
            }
        }
    }

    fn name(&mut self) -> Option<&[u8]> {
        let begin = self.at;
        while self.peek().is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
            self.at += 1;
        }
        (self.at > begin).then(|| &self.text[begin..self.at])
    }

    fn rule_of(&mut self, name: Vec<u8>) -> u32 {
        let next = self.rules.len() as u32;
        let id = *self.names.entry(name).or_insert(next);
        if id == next {
            self.rules.push(None);
        }
        id
    }

    fn new_rule(&mut self, alternatives: Vec<Vec<Element>>) -> Result<u32, ParseError> {
        self.count(alternatives.iter().map(|one| one.len() + 1).sum())?;
        self.rules.push(Some(alternatives));
        Ok(self.rules.len() as u32 - 1)
    }

    fn count(&mut self, elements: usize) -> Result<(), ParseError> {
        self.elements = self.elements.saturating_add(elements);
        if self.elements > MAX_ELEMENTS {
            return self.wrong(format!("repetitions written out, it has more than {MAX_ELEMENTS} elements"));
        }
        Ok(())
    }

    fn rule(&mut self) -> Result<(), ParseError> {
        let Some(name) = self.name().map(<[u8]>::to_vec) else {
            return self.wrong("the name of a rule is missing");
        };
        self.space(false);
        if !self.takes(b"::=") {
            return self.wrong("`::=` is missing");
        }
        self.space(true);
        let alternatives = self.alternatives(false)?;
        self.count(alternatives.iter().map(|one| one.len() + 1).sum())?;
        let id = self.rule_of(name);
        // Written twice, the later one holds, as with llama.cpp.
        self.rules[id as usize] = Some(alternatives);
        match self.peek() {
            None => {}
            Some(b'\r' | b'\n') => self.space(true),
            Some(_) => return self.wrong("the rule should end here"),
        }
        Ok(())
    }

    fn alternatives(&mut self, nested: bool) -> Result<Vec<Vec<Element>>, ParseError> {
        let mut alternatives = vec![self.sequence(nested)?];
        while self.takes(b"|") {
            self.space(true);
            alternatives.push(self.sequence(nested)?);
        }
        Ok(alternatives)
    }

    fn sequence(&mut self, nested: bool) -> Result<Vec<Element>, ParseError> {
        let mut elements: Vec<Element> = Vec::new();
        // Where the last item begins: what a repetition repeats.
        let mut last = None;
        while let Some(byte) = self.peek() {
            match byte {
                b'"' => {
                    last = Some(elements.len());
                    self.at += 1;
                    while !self.takes(b"\"") {
                        let character = self.character()?;
                        let set = self.set((vec![(character, character)], false));
                        elements.push(Element::Set(set));
                    }
                }
                b'[' => {
                    last = Some(elements.len());
                    let ranges = self.ranges()?;
                    elements.push(Element::Set(self.set(ranges)));
                }
                b'.' => {
                    self.at += 1;
                    last = Some(elements.len());
                    elements.push(Element::Set(self.set((Vec::new(), true))));
                }
                b'(' => {
                    last = Some(elements.len());
                    let group = self.group()?;
                    elements.push(Element::Rule(group));
                }
                b'*' | b'+' | b'?' | b'{' => {
                    let (least, most) = self.times()?;
                    let Some(begin) = last else { return self.wrong("there is nothing to repeat") };
                    self.repeat(&mut elements, begin, least, most)?;
                }
                b'<' | b'!' => return self.wrong("references to tokens are not taken"),
                byte if byte.is_ascii_alphanumeric() || byte == b'-' => {
                    last = Some(elements.len());
                    let name = self.name().unwrap_or_default().to_vec();
                    elements.push(Element::Rule(self.rule_of(name)));
                }
                _ => break,
            }
            if elements.len() > MAX_ELEMENTS {
                return self.wrong(format!("it has more than {MAX_ELEMENTS} elements"));
            }
            self.space(nested);
        }
        Ok(elements)
    }

    fn group(&mut self) -> Result<u32, ParseError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return self.wrong(format!("more than {MAX_DEPTH} brackets within brackets"));
        }
        self.at += 1;
        self.space(true);
        let alternatives = self.alternatives(true)?;
        if !self.takes(b")") {
            return self.wrong("`)` is missing");
        }
        self.depth -= 1;
        self.new_rule(alternatives)
    }

    /// `*`, `+`, `?`, `{m}`, `{m,}`, `{m,n}`.
    fn times(&mut self) -> Result<(usize, Option<usize>), ParseError> {
        for (sign, times) in [(b"*", (0, None)), (b"+", (1, None)), (b"?", (0, Some(1)))] {
            if self.takes(sign) {
                return Ok(times);
            }
        }
        self.at += 1;
        self.space(true);
        let Some(least) = self.number()? else { return self.wrong("a number is missing") };
        self.space(true);
        let most = if self.takes(b",") {
            self.space(true);
            let most = self.number()?;
            self.space(true);
            most
        } else {
            Some(least)
        };
        if !self.takes(b"}") {
            return self.wrong("`}` is missing");
        }
        if most.is_some_and(|most| most < least) {
            return self.wrong(format!("nothing is there at least {least} times and less often"));
        }
        Ok((least, most))
    }

    fn number(&mut self) -> Result<Option<usize>, ParseError> {
        let begin = self.at;
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
        let digits = String::from_utf8_lossy(&self.text[begin..self.at]);
        match digits.parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) if begin == self.at => Ok(None),
            Err(_) => self.wrong("this number is too large"),
        }
    }

    /// `S{m,n}` is S m times and a chain of rules for the rest: `S'(x) ::= S S'(x-1) |`. Without an end, `S' ::= S S' |`.
    fn repeat(
        &mut self,
        elements: &mut Vec<Element>,
        begin: usize,
        least: usize,
        most: Option<usize>,
    ) -> Result<(), ParseError> {
        let item: Vec<Element> = elements.split_off(begin);
        self.count(item.len().saturating_mul(least))?;
        for _ in 0..least {
            elements.extend_from_slice(&item);
        }
        let with = |more: Option<u32>| {
            let more = more.map(Element::Rule);
            vec![item.iter().copied().chain(more).collect::<Vec<_>>(), Vec::new()]
        };
        match most {
            None => {
                let own = self.rules.len() as u32;
                let rest = self.new_rule(with(Some(own)))?;
                elements.push(Element::Rule(rest));
            }
            Some(most) => {
                let mut rest = None;
                for _ in least..most {
                    rest = Some(self.new_rule(with(rest))?);
                }
                elements.extend(rest.map(Element::Rule));
            }
        }
        Ok(())
    }

    /// `[a-z]`, `[^"]`
    fn ranges(&mut self) -> Result<Ranges, ParseError> {
        self.at += 1;
        let negated = self.takes(b"^");
        let mut ranges = Vec::new();
        while !self.takes(b"]") {
            let first = self.character()?;
            let ranged = self.peek() == Some(b'-') && self.text.get(self.at + 1) != Some(&b']');
            let last = if ranged {
                self.at += 1;
                self.character()?
            } else {
                first
            };
            // Written backwards it has nothing, as with llama.cpp.
            if first <= last {
                ranges.push((first, last));
            }
        }
        ranges.sort_unstable();
        ranges.dedup();
        Ok((ranges, negated))
    }

    fn character(&mut self) -> Result<u32, ParseError> {
        if self.takes(b"\\") {
            let Some(byte) = self.peek() else { return self.wrong("the text ends in an escape") };
            self.at += 1;
            return match byte {
                b'x' => self.hexadecimal(2),
                b'u' => self.hexadecimal(4),
                b'U' => self.hexadecimal(8),
                b't' => Ok(u32::from(b'\t')),
                b'r' => Ok(u32::from(b'\r')),
                b'n' => Ok(u32::from(b'\n')),
                b'\\' | b'"' | b'[' | b']' => Ok(u32::from(byte)),
                _ => self.wrong("there is no such escape"),
            };
        }
        // It was a `&str`, and every step so far was over whole characters.
        let rest = std::str::from_utf8(&self.text[self.at..]).unwrap_or_default();
        match rest.chars().next() {
            Some(character) => {
                self.at += character.len_utf8();
                Ok(character.into())
            }
            None => self.wrong("the text ends too early"),
        }
    }

    fn hexadecimal(&mut self, digits: usize) -> Result<u32, ParseError> {
        let found =
            self.text.get(self.at..self.at + digits).and_then(|digits| std::str::from_utf8(digits).ok());
        let value = found.and_then(|digits| u32::from_str_radix(digits, 16).ok());
        match value.filter(|value| *value <= LAST_CHARACTER) {
            Some(value) => {
                self.at += digits;
                Ok(value)
            }
            None => self.wrong(format!("{digits} hexadecimal digits of a character are missing")),
        }
    }

    fn set(&mut self, ranges: Ranges) -> u32 {
        if let Some(known) = self.known_sets.get(&ranges) {
            return *known;
        }
        let id = self.sets.len() as u32;
        self.sets.push(ranges.clone());
        self.known_sets.insert(ranges, id);
        id
    }

    fn finish(self, root: &str) -> Result<Program, ParseError> {
        let wrong = |why: String| Err(ParseError { at: self.text.len(), why });
        let Some(root_rule) = self.names.get(root.as_bytes()).copied() else {
            return wrong(format!("there is no rule `{root}`"));
        };
        let mut written: Vec<Vec<Vec<Element>>> = Vec::with_capacity(self.rules.len());
        for (id, rule) in self.rules.iter().enumerate() {
            let Some(rule) = rule else {
                let name = self.names.iter().find(|(_, named)| **named as usize == id);
                let name = name.map(|(name, _)| String::from_utf8_lossy(name).into_owned());
                return wrong(format!("there is no rule `{}`", name.unwrap_or_default()));
            };
            written.push(rule.clone());
        }
        if let Some(rule) = begins_with_itself(&written) {
            let name = self.names.iter().find(|(_, named)| **named as usize == rule);
            let name = name.map_or("a repetition of what may be nothing".to_owned(), |(name, _)| {
                format!("the rule `{}`", String::from_utf8_lossy(name))
            });
            return wrong(format!("{name} begins with itself"));
        }
        let cuts: usize = self.sets.iter().map(|(ranges, _)| 2 * ranges.len()).sum();
        if cuts >= usize::from(u16::MAX) {
            return wrong(format!("its sets of characters have {cuts} ends, which is too many"));
        }
        Ok(Program::new(written, &self.sets, root_rule))
    }
}
