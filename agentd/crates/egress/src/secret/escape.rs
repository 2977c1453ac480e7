//! Which letter is meant by what stands here?
//!
//! In:     a text from some place on, and whether more of it may follow.
//! Out:    each escape that begins there: how many bytes it has, and the letter that it means.
//! Always: an escape is read by itself, so a text may escape one letter and leave the next. What was escaped twice
//!         or three times (a URL inside a URL, JSON inside JSON) is read as its letter too. Nothing is longer than
//!         [`LONGEST`], so no text can make somebody wait for the end of an escape for ever.
//! Never:  a character outside ASCII; secrets have none.
//! Source: RFC 3986, 2.1; RFC 8259, 7; WHATWG HTML, 13.2.5.72 and 13.5.

/// In bytes; `&amp;amp;amp;#x0000;` and `&amp;amp;amp;lowbar;` are among the longest.
pub(super) const LONGEST: usize = 32;
/// How often `%25` or `&amp;` may stand in the place of the sign itself.
const NESTED_MOST: usize = 3;
/// Each time that JSON is put into JSON doubles them.
const BACKSLASHES_MOST: usize = 8;
const DIGITS_MOST: usize = 6;

/// Names of HTML for characters of ASCII that are neither letters nor digits.
const NAMES: [(&str, u8); 45] = [
    ("amp", b'&'),
    ("lt", b'<'),
    ("gt", b'>'),
    ("quot", b'"'),
    ("apos", b'\''),
    ("excl", b'!'),
    ("num", b'#'),
    ("dollar", b'$'),
    ("percnt", b'%'),
    ("lpar", b'('),
    ("rpar", b')'),
    ("ast", b'*'),
    ("midast", b'*'),
    ("plus", b'+'),
    ("comma", b','),
    ("period", b'.'),
    ("sol", b'/'),
    ("colon", b':'),
    ("semi", b';'),
    ("equals", b'='),
    ("quest", b'?'),
    ("commat", b'@'),
    ("lsqb", b'['),
    ("lbrack", b'['),
    ("bsol", b'\\'),
    ("rsqb", b']'),
    ("rbrack", b']'),
    ("Hat", b'^'),
    ("lowbar", b'_'),
    ("UnderBar", b'_'),
    ("grave", b'`'),
    ("DiacriticalGrave", b'`'),
    ("lcub", b'{'),
    ("lbrace", b'{'),
    ("verbar", b'|'),
    ("vert", b'|'),
    ("VerticalLine", b'|'),
    ("rcub", b'}'),
    ("rbrace", b'}'),
    ("LT", b'<'),
    ("GT", b'>'),
    ("QUOT", b'"'),
    ("AMP", b'&'),
    ("NewLine", b'\n'),
    ("Tab", b'\t'),
];

/// Whether what stands here may still become an escape with what follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reading {
    Complete,
    Open,
}

/// Tells `take` of each escape that begins with the first byte.
pub(super) fn read(text: &[u8], mut take: impl FnMut(usize, u8)) -> Reading {
    match text.first() {
        Some(b'%') => percent(text, &mut take),
        Some(b'\\') => backslash(text, &mut take),
        Some(b'&') => entity(text, &mut take),
        _ => Reading::Complete,
    }
}

/// `%61`, `%2561`.
fn percent(text: &[u8], take: &mut impl FnMut(usize, u8)) -> Reading {
    let mut at = 1;
    for _ in 0..=NESTED_MOST {
        match number(text, at, 2, 16) {
            Number::Is(value) => take_ascii(take, at + 2, value),
            Number::Open => return Reading::Open,
            Number::No => return Reading::Complete,
        }
        if text.get(at..at + 2) != Some(b"25") {
            return Reading::Complete;
        }
        at += 2;
    }
    Reading::Complete
}

/// `\u0061`, `\u{61}`, `\x61`, `\141`, `\/`, and all of them with more backslashes.
fn backslash(text: &[u8], take: &mut impl FnMut(usize, u8)) -> Reading {
    let run = text.iter().take(BACKSLASHES_MOST).take_while(|byte| **byte == b'\\').count();
    for length in [2, 4, 8] {
        if length <= run {
            take(length, b'\\');
        }
    }
    let at = run + 1;
    let digits = match text.get(run) {
        None => return Reading::Open,
        Some(b'u') => match text.get(at) {
            None => return Reading::Open,
            Some(b'{') => return until(text, at + 1, 16, b'}', take),
            Some(_) => number(text, at, 4, 16).with(at + 4),
        },
        Some(b'x') => number(text, at, 2, 16).with(at + 2),
        Some(b'0'..=b'7') => number(text, run, 3, 8).with(run + 3),
        Some(b'n') => (Number::Is(u32::from(b'\n')), at),
        Some(b'r') => (Number::Is(u32::from(b'\r')), at),
        Some(sign) if sign.is_ascii_punctuation() => (Number::Is(u32::from(*sign)), at),
        Some(_) => return Reading::Complete,
    };
    match digits {
        (Number::Is(value), length) => take_ascii(take, length, value),
        (Number::Open, _) => return Reading::Open,
        (Number::No, _) => {}
    }
    Reading::Complete
}

/// `&#97;`, `&#x61;`, `&sol;`, `&amp;#97;`.
fn entity(text: &[u8], take: &mut impl FnMut(usize, u8)) -> Reading {
    let mut at = 1;
    for _ in 0..=NESTED_MOST {
        let reading = match text.get(at..).unwrap_or_default() {
            [] | [b'#'] => return Reading::Open,
            [b'#', b'x' | b'X', ..] => until(text, at + 2, 16, b';', take),
            [b'#', ..] => until(text, at + 1, 10, b';', take),
            rest => named(rest, at, take),
        };
        if reading == Reading::Open || text.get(at..at + 4) != Some(b"amp;") {
            return reading;
        }
        at += 4;
    }
    Reading::Complete
}

fn named(rest: &[u8], at: usize, take: &mut impl FnMut(usize, u8)) -> Reading {
    let mut reading = Reading::Complete;
    for (name, byte) in NAMES {
        match rest.strip_prefix(name.as_bytes()) {
            Some([b';', ..]) => take(at + name.len() + 1, byte),
            Some([]) => reading = Reading::Open,
            None if name.as_bytes().starts_with(rest) => reading = Reading::Open,
            Some(_) | None => {}
        }
    }
    reading
}

/// A number of up to [`DIGITS_MOST`] digits, and then this sign.
fn until(text: &[u8], at: usize, radix: u32, end: u8, take: &mut impl FnMut(usize, u8)) -> Reading {
    let digits = text.get(at..).unwrap_or_default();
    let count = digits.iter().take(DIGITS_MOST).take_while(|byte| char::from(**byte).is_digit(radix)).count();
    match digits.get(count) {
        None => return Reading::Open,
        Some(byte) if *byte == end => {
            if let Number::Is(value) = number(text, at, count, radix) {
                take_ascii(take, at + count + 1, value);
            }
        }
        Some(_) => {}
    }
    Reading::Complete
}

enum Number {
    Is(u32),
    Open,
    No,
}

impl Number {
    fn with(self, length: usize) -> (Self, usize) {
        (self, length)
    }
}

/// So many digits.
fn number(text: &[u8], at: usize, digits: usize, radix: u32) -> Number {
    let found = text.get(at..).unwrap_or_default();
    let mut value = 0;
    for index in 0..digits {
        match found.get(index).map(|byte| char::from(*byte).to_digit(radix)) {
            Some(Some(digit)) => value = value * radix + digit,
            Some(None) => return Number::No,
            None => return Number::Open,
        }
    }
    if digits == 0 { Number::No } else { Number::Is(value) }
}

fn take_ascii(take: &mut impl FnMut(usize, u8), length: usize, value: u32) {
    if let Ok(byte) = u8::try_from(value) {
        take(length, byte);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &str) -> (Vec<(usize, u8)>, Reading) {
        let mut found = Vec::new();
        let reading = read(text.as_bytes(), |length, byte| found.push((length, byte)));
        (found, reading)
    }

    #[test]
    fn escapes_and_their_letters() {
        for text in [
            "%61",
            "%2561",
            "%25252561",
            "\\u0061",
            "\\\\u0061",
            "\\\\\\\\u0061",
            "\\x61",
            "\\u{61}",
            "\\141",
            "&#97;",
            "&#097;",
            "&#x61;",
            "&#X0061;",
            "&amp;#97;",
            "&amp;amp;amp;#x61;",
        ] {
            let (found, reading) = all(text);
            assert!(found.contains(&(text.len(), b'a')), "{text}: {found:?}");
            assert_eq!(reading, Reading::Complete, "{text}");
            assert!(text.len() <= LONGEST);
            // Half of it may become all of it, and whoever waits waits for no more than that.
            for length in 1..text.len() {
                let (found, reading) = all(&text[..length]);
                assert!(reading == Reading::Open || !found.is_empty(), "{}", &text[..length]);
            }
        }
        for (text, byte) in [("\\/", b'/'), ("\\\"", b'"'), ("\\\\", b'\\'), ("%2B", b'+'), ("%2b", b'+')] {
            assert!(all(text).0.contains(&(text.len(), byte)), "{text}");
        }
        for (name, byte) in NAMES {
            let text = format!("&amp;{name};");
            assert!(all(&text).0.contains(&(text.len(), byte)), "{text}");
        }
    }

    #[test]
    fn what_is_no_escape_is_not_waited_for() {
        for text in ["%zz", "%6z", "\\q", "\\u00zz", "\\xz", "& ", "&#a", "&#12345678", "&zzz", "&amp ", "a"]
        {
            assert_eq!(all(text), (Vec::new(), Reading::Complete), "{text}");
        }
        assert_eq!(all(&"\\".repeat(64)).1, Reading::Complete);
    }
}
