//! Where does this body end, and which of its bytes are content?
//!
//! In:  the bytes that have arrived, again and again. Out: how many are used up, and whether they are content.
//! States: `Bytes(left)` → done at 0. `Size` → `Data(left)` → `DataEnd` → `Size` … → `Trailers` → done.
//!         `UntilClose` ends with the connection.
//! Source: RFC 9112, 6 and 7.1.

use super::{HeadError, Length};

/// A chunk's size with an extension that a host may add. Ours have none.
const SIZE_LINE_MAX_BYTES: usize = 1024;
/// All trailers of an answer together; they are dropped.
const TRAILERS_MAX_BYTES: usize = 8 * 1024;
/// 15 hexadecimal digits cannot overflow 64 bits.
const SIZE_MAX_DIGITS: usize = 15;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strictness {
    /// From an agent: chunk extensions and trailers are refused, as some servers read them differently.
    Request,
    /// From a host: they are dropped.
    Answer,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Bytes(u64),
    Size,
    Data(u64),
    DataEnd,
    Trailers { seen: usize },
    UntilClose,
    Done,
}

#[derive(Debug)]
pub struct Body {
    state: State,
    strictness: Strictness,
}

/// What the first bytes of the input were.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// So many bytes of content.
    Content(usize),
    /// So many bytes of framing.
    Framing(usize),
    /// Nothing yet: more has to arrive.
    More,
    /// The body is over; the input belongs to what follows.
    Done,
}

impl Body {
    pub fn new(length: Length, strictness: Strictness) -> Self {
        let state = match length {
            Length::Bytes(0) => State::Done,
            Length::Bytes(bytes) => State::Bytes(bytes),
            Length::Chunked => State::Size,
            Length::UntilClose => State::UntilClose,
        };
        Self { state, strictness }
    }

    /// Whether the body may end when the connection does.
    pub fn may_end_here(&self) -> bool {
        matches!(self.state, State::UntilClose | State::Done)
    }

    pub fn next(&mut self, input: &[u8]) -> Result<Piece, HeadError> {
        if self.state == State::Done {
            return Ok(Piece::Done);
        }
        if input.is_empty() {
            return Ok(Piece::More);
        }
        match self.state {
            State::Bytes(left) => {
                let taken = take(input, left);
                let left = left - taken as u64;
                self.state = if left == 0 { State::Done } else { State::Bytes(left) };
                Ok(Piece::Content(taken))
            }
            State::Data(left) => {
                let taken = take(input, left);
                let left = left - taken as u64;
                self.state = if left == 0 { State::DataEnd } else { State::Data(left) };
                Ok(Piece::Content(taken))
            }
            State::UntilClose => Ok(Piece::Content(input.len())),
            State::DataEnd => match line(input, 0)? {
                Some([]) => self.framing(2, State::Size),
                Some(_) => Err(HeadError::Chunk),
                None => Ok(Piece::More),
            },
            State::Size => match line(input, SIZE_LINE_MAX_BYTES)? {
                Some(text) => {
                    let size = self.size(text)?;
                    let next = if size == 0 { State::Trailers { seen: 0 } } else { State::Data(size) };
                    self.framing(text.len() + 2, next)
                }
                None => Ok(Piece::More),
            },
            State::Trailers { seen } => match line(input, TRAILERS_MAX_BYTES - seen)? {
                Some([]) => self.framing(2, State::Done),
                Some(_) if self.strictness == Strictness::Request => Err(HeadError::Chunk),
                Some(text) => {
                    let seen = (seen + text.len() + 2).min(TRAILERS_MAX_BYTES);
                    self.framing(text.len() + 2, State::Trailers { seen })
                }
                None => Ok(Piece::More),
            },
            State::Done => Ok(Piece::Done),
        }
    }

    fn framing(&mut self, bytes: usize, next: State) -> Result<Piece, HeadError> {
        self.state = next;
        Ok(Piece::Framing(bytes))
    }

    fn size(&self, text: &[u8]) -> Result<u64, HeadError> {
        let digits = match (text.iter().position(|byte| *byte == b';'), self.strictness) {
            (None, _) => text,
            (Some(at), Strictness::Answer) => text.get(..at).unwrap_or_default().trim_ascii_end(),
            (Some(_), Strictness::Request) => return Err(HeadError::Chunk),
        };
        let plain = (1..=SIZE_MAX_DIGITS).contains(&digits.len()) && digits.iter().all(u8::is_ascii_hexdigit);
        let number = std::str::from_utf8(digits).ok().filter(|_| plain);
        number.and_then(|text| u64::from_str_radix(text, 16).ok()).ok_or(HeadError::Chunk)
    }
}

fn take(input: &[u8], left: u64) -> usize {
    usize::try_from(left).map_or(input.len(), |left| left.min(input.len()))
}

/// The first line without its CR LF, when it is there. A CR or LF elsewhere is an error, as is a line too long.
fn line(input: &[u8], max: usize) -> Result<Option<&[u8]>, HeadError> {
    let Some(at) = input.iter().take(max + 1).position(|byte| matches!(byte, b'\r' | b'\n')) else {
        return if input.len() > max { Err(HeadError::Chunk) } else { Ok(None) };
    };
    match (input.get(at), input.get(at + 1)) {
        (Some(b'\r'), Some(b'\n')) => Ok(input.get(..at)),
        (Some(b'\r'), None) => Ok(None),
        _ => Err(HeadError::Chunk),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Feeds `input` in pieces of `step` bytes; the content, and what is left over.
    fn read(
        length: Length,
        strictness: Strictness,
        input: &[u8],
        step: usize,
    ) -> Result<(Vec<u8>, Vec<u8>), HeadError> {
        let mut body = Body::new(length, strictness);
        let (mut content, mut buffer, mut rest) = (Vec::new(), Vec::new(), input);
        loop {
            match body.next(&buffer)? {
                Piece::Content(n) => content.extend(buffer.drain(..n)),
                Piece::Framing(n) => drop(buffer.drain(..n)),
                Piece::Done => {
                    buffer.extend_from_slice(rest);
                    return Ok((content, buffer));
                }
                Piece::More if rest.is_empty() && body.may_end_here() => return Ok((content, buffer)),
                Piece::More if rest.is_empty() => return Err(HeadError::Truncated),
                Piece::More => {
                    let (now, later) = rest.split_at(step.min(rest.len()));
                    buffer.extend_from_slice(now);
                    rest = later;
                }
            }
        }
    }

    #[test]
    fn chunks_as_they_should_be() {
        let text = b"5\r\nhello\r\nA\r\n, world!!!\r\n0\r\n\r\nGET next";
        for step in [1, 2, 3, 100] {
            let (content, rest) = read(Length::Chunked, Strictness::Request, text, step).unwrap();
            assert_eq!((&content[..], &rest[..]), (&b"hello, world!!!"[..], &b"GET next"[..]));
        }
    }

    #[test]
    fn chunks_that_could_be_read_twice_are_refused() {
        for text in [
            "5\nhello\r\n0\r\n\r\n",
            "5\r\nhello0\r\n\r\n",
            "5\r\nhello\n0\r\n\r\n",
            "+5\r\nhello\r\n0\r\n\r\n",
            " 5\r\nhello\r\n0\r\n\r\n",
            "5 \r\nhello\r\n0\r\n\r\n",
            "0x5\r\nhello\r\n0\r\n\r\n",
            "\r\n\r\n",
            "5;a=b\r\nhello\r\n0\r\n\r\n",
            "5\r\nhello\r\n0\r\nX: y\r\n\r\n",
            "5\rhello\r\n0\r\n\r\n",
            "ffffffffffffffff\r\n",
            "0000000000000005\r\nhello\r\n0\r\n\r\n",
            "-1\r\n",
            "g\r\n",
            "5\r\r\nhello",
            "5\r\nhellox\r\n0\r\n\r\n",
            "0\r\n\n",
            "0\r\n\rx",
        ] {
            for step in [1, 100] {
                let found = read(Length::Chunked, Strictness::Request, text.as_bytes(), step);
                assert_eq!(found, Err(HeadError::Chunk), "{text:?} by {step}");
            }
        }
        for text in ["", "5\r\nhel", "5\r\nhello\r\n0\r\n", "5\r\nhello\r\n"] {
            let found = read(Length::Chunked, Strictness::Request, text.as_bytes(), 100);
            assert_eq!(found, Err(HeadError::Truncated), "{text:?}");
        }
        let answer = b"5 ; a=b\r\nhello\r\n0\r\nX: y\r\n\r\n";
        assert_eq!(read(Length::Chunked, Strictness::Answer, answer, 1).unwrap().0, b"hello");
        let endless = format!("0\r\n{}", "X: y\r\n".repeat(5000));
        assert_eq!(read(Length::Chunked, Strictness::Answer, endless.as_bytes(), 100), Err(HeadError::Chunk));
    }

    proptest! {
        #[test]
        fn what_was_chunked_comes_out(
            chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..40), 0..6),
            rest in proptest::collection::vec(any::<u8>(), 0..20),
            step in 1usize..60,
        ) {
            let mut wire = Vec::new();
            for chunk in &chunks {
                wire.extend(format!("{:x}\r\n", chunk.len()).into_bytes());
                wire.extend(chunk);
                wire.extend(b"\r\n");
            }
            wire.extend(b"0\r\n\r\n");
            wire.extend(&rest);
            let found = read(Length::Chunked, Strictness::Request, &wire, step);
            prop_assert_eq!(found, Ok((chunks.concat(), rest)));
        }

        #[test]
        fn a_counted_body_ends_where_it_says(content in proptest::collection::vec(any::<u8>(), 0..60), more in 0usize..20, step in 1usize..30) {
            let mut wire = content.clone();
            wire.extend(vec![7; more]);
            let found = read(Length::Bytes(content.len() as u64), Strictness::Request, &wire, step);
            prop_assert_eq!(found, Ok((content, vec![7; more])));
        }

        #[test]
        fn any_bytes_end_or_are_refused(wire in proptest::collection::vec(any::<u8>(), 0..200), step in 1usize..50) {
            let _ = read(Length::Chunked, Strictness::Answer, &wire, step);
        }
    }
}
