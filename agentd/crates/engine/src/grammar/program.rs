//! How is a grammar kept, so that it can be read by?
//!
//! Owns:  rules as one list of elements, and the classes of characters between which no set makes a difference: a machine
//!        looks at classes only, whatever alphabet a text has.
//! True:  no rule begins with itself, which [`begins_with_itself`] tells before there is a program; there is a class for
//!        every character.

/// The last that Unicode has.
pub(super) const LAST_CHARACTER: u32 = 0x10_FFFF;

/// Something in an alternative of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Element {
    /// One character of this set.
    Set(u32),
    Rule(u32),
    /// Of the alternative.
    End,
}

/// Rules, ready to be read by.
#[derive(Debug)]
pub(crate) struct Program {
    elements: Vec<Element>,
    /// Where each rule's alternatives begin.
    rules: Vec<Vec<u32>>,
    root: u32,
    /// Ranges of classes, sorted.
    sets: Vec<Vec<(u16, u16)>>,
    /// The first character of each class.
    classes: Vec<u32>,
    ascii: [u16; 128],
}

impl Program {
    /// The alternatives of each rule. None may begin with itself ([`begins_with_itself`]).
    pub(super) fn new(rules: Vec<Vec<Vec<Element>>>, sets: &[Ranges], root: u32) -> Self {
        let (classes, sets) = classes(sets);
        let mut program = Self {
            elements: Vec::new(),
            rules: Vec::with_capacity(rules.len()),
            root,
            sets,
            ascii: std::array::from_fn(|character| class_in(&classes, character as u32)),
            classes,
        };
        for rule in rules {
            let mut begins = Vec::with_capacity(rule.len());
            for alternative in rule {
                begins.push(program.elements.len() as u32);
                program.elements.extend(alternative);
                program.elements.push(Element::End);
            }
            program.rules.push(begins);
        }
        program
    }

    pub(crate) fn element(&self, at: u32) -> Element {
        self.elements.get(at as usize).copied().unwrap_or(Element::End)
    }

    pub(crate) fn alternatives(&self, rule: u32) -> &[u32] {
        self.rules.get(rule as usize).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn root(&self) -> u32 {
        self.root
    }

    /// Characters between which no set makes a difference are of one class.
    pub(crate) fn classes(&self) -> usize {
        self.classes.len()
    }

    pub(crate) fn class_of(&self, character: u32) -> u16 {
        match self.ascii.get(character as usize) {
            Some(class) => *class,
            None => class_in(&self.classes, character),
        }
    }

    pub(crate) fn has(&self, set: u32, class: u16) -> bool {
        let ranges = self.sets.get(set as usize).map_or(&[][..], Vec::as_slice);
        let after = ranges.partition_point(|(first, _)| *first <= class);
        after > 0 && ranges[after - 1].1 >= class
    }
}

fn class_in(classes: &[u32], character: u32) -> u16 {
    // The first class begins at 0, and `finish` refuses more of them than 16 bits count.
    (classes.partition_point(|first| *first <= character) - 1) as u16
}

/// Inclusive ranges of characters, and whether the set is everything but these.
pub(super) type Ranges = (Vec<(u32, u32)>, bool);

/// A rule that comes again before a character was read.
pub(super) fn begins_with_itself(rules: &[Vec<Vec<Element>>]) -> Option<usize> {
    let empty = may_be_empty(rules);
    // What a rule may begin with: up to the first that reads something.
    let begins = |rule: usize| {
        let mut found = Vec::new();
        for alternative in &rules[rule] {
            for element in alternative {
                let Element::Rule(inner) = element else { break };
                found.push(*inner as usize);
                if !empty[*inner as usize] {
                    break;
                }
            }
        }
        found
    };
    #[derive(Clone, Copy, PartialEq)]
    enum Mark {
        New,
        Open,
        Done,
    }
    let mut marks = vec![Mark::New; rules.len()];
    for rule in 0..rules.len() {
        if marks[rule] != Mark::New {
            continue;
        }
        marks[rule] = Mark::Open;
        let mut path = vec![(rule, begins(rule))];
        while let Some((at, left)) = path.last_mut() {
            match left.pop() {
                Some(next) => match marks[next] {
                    Mark::Open => return Some(next),
                    Mark::Done => {}
                    Mark::New => {
                        marks[next] = Mark::Open;
                        path.push((next, begins(next)));
                    }
                },
                None => {
                    marks[*at] = Mark::Done;
                    path.pop();
                }
            }
        }
    }
    None
}

/// Rules that may read nothing.
fn may_be_empty(rules: &[Vec<Vec<Element>>]) -> Vec<bool> {
    let mut empty = vec![false; rules.len()];
    // Alternatives of rules alone, with how many of these are not known to be empty; and where each rule stands.
    let mut waiting: Vec<(usize, usize)> = Vec::new();
    let mut stands: Vec<Vec<usize>> = vec![Vec::new(); rules.len()];
    let mut found = Vec::new();
    for (rule, alternatives) in rules.iter().enumerate() {
        for alternative in alternatives {
            if alternative.iter().any(|element| matches!(element, Element::Set(_))) {
                continue;
            }
            if alternative.is_empty() && !empty[rule] {
                empty[rule] = true;
                found.push(rule);
            }
            for element in alternative {
                if let Element::Rule(inner) = element {
                    stands[*inner as usize].push(waiting.len());
                }
            }
            waiting.push((rule, alternative.len()));
        }
    }
    while let Some(rule) = found.pop() {
        for place in std::mem::take(&mut stands[rule]) {
            let (of, left) = &mut waiting[place];
            *left -= 1;
            if *left == 0 && !empty[*of] {
                empty[*of] = true;
                found.push(*of);
            }
        }
    }
    empty
}

/// Cuts the characters where a set begins or ends, and writes the sets in these classes.
fn classes(sets: &[Ranges]) -> (Vec<u32>, Vec<Vec<(u16, u16)>>) {
    let mut cuts = vec![0];
    for (first, last) in sets.iter().flat_map(|(ranges, _)| ranges) {
        cuts.push(*first);
        if *last < LAST_CHARACTER {
            cuts.push(last + 1);
        }
    }
    cuts.sort_unstable();
    cuts.dedup();
    let last_class = (cuts.len() - 1) as u16;
    let in_classes = |(ranges, negated): &Ranges| {
        let mut joined: Vec<(u16, u16)> = Vec::new();
        for (first, last) in ranges {
            let (first, last) = (class_in(&cuts, *first), class_in(&cuts, *last));
            match joined.last_mut() {
                Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
                _ => joined.push((first, last)),
            }
        }
        if !negated {
            return joined;
        }
        let mut others = Vec::new();
        let mut next: u32 = 0;
        for (first, last) in joined {
            if u32::from(first) > next {
                others.push((next as u16, first - 1));
            }
            next = u32::from(last) + 1;
        }
        if next <= u32::from(last_class) {
            others.push((next as u16, last_class));
        }
        others
    };
    let sets = sets.iter().map(in_classes).collect();
    (cuts, sets)
}
