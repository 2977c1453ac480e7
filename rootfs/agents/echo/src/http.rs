//! One HTTP/1.1 request on one connection, with std alone.
//!
//! Always: every wait has a limit; heads and lines are bounded. A body is read as it comes, so a stream is a stream.
//! Source: RFC 9112.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

const CONNECT_LIMIT: Duration = Duration::from_secs(30);
const HEAD_MOST_BYTES: u64 = 16 * 1024;
pub const BODY_MOST_BYTES: u64 = 4 * 1024 * 1024;

/// How a request's body is sent.
pub enum Body<'a> {
    None,
    Whole(&'a [u8]),
}

pub struct Request<'a> {
    pub method: &'a str,
    pub path: &'a str,
    pub headers: &'a [(&'a str, &'a str)],
    pub body: Body<'a>,
    /// The longest silence that is waited for.
    pub patience: Duration,
}

pub struct Response {
    pub status: u16,
    body: BodyReader,
}

impl Response {
    /// The whole body; longer than [`BODY_MOST_BYTES`] is cut.
    pub fn text(self) -> io::Result<String> {
        let mut bytes = Vec::new();
        self.body.take(BODY_MOST_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The body line by line, as it comes.
    pub fn lines(self) -> impl Iterator<Item = io::Result<String>> {
        BufReader::with_capacity(1024, self.body).lines()
    }
}

/// Sends a request and reads the head of the answer.
pub fn send(authority: &str, request: &Request<'_>) -> io::Result<Response> {
    let mut stream = connect(authority, request.patience)?;
    let mut head = head(authority, request.method, request.path, request.headers);
    let body = match request.body {
        Body::None => &[][..],
        Body::Whole(bytes) => {
            head.push_str(&format!("content-type: application/json\r\ncontent-length: {}\r\n", bytes.len()));
            bytes
        }
    };
    head.push_str("\r\n");
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;
    read_head(stream)
}

/// A request whose body is sent piece by piece (chunked), and whose answer comes after its end.
pub struct Upload {
    stream: TcpStream,
}

impl Upload {
    pub fn begin(authority: &str, path: &str, patience: Duration) -> io::Result<Self> {
        let mut stream = connect(authority, patience)?;
        let mut head = head(authority, "POST", path, &[("content-type", "application/x-ndjson")]);
        head.push_str("transfer-encoding: chunked\r\n\r\n");
        stream.write_all(head.as_bytes())?;
        Ok(Self { stream })
    }

    pub fn piece(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut chunk = format!("{:x}\r\n", bytes.len()).into_bytes();
        chunk.extend_from_slice(bytes);
        chunk.extend_from_slice(b"\r\n");
        self.stream.write_all(&chunk)
    }

    pub fn end(mut self) -> io::Result<Response> {
        self.stream.write_all(b"0\r\n\r\n")?;
        read_head(self.stream)
    }
}

fn connect(authority: &str, patience: Duration) -> io::Result<TcpStream> {
    let address = authority.parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, authority))?;
    let stream = TcpStream::connect_timeout(&address, CONNECT_LIMIT)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn head(authority: &str, method: &str, path: &str, headers: &[(&str, &str)]) -> String {
    let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {authority}\r\nconnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head
}

fn read_head(stream: impl Read + 'static) -> io::Result<Response> {
    let mut reader = BufReader::new(Box::new(stream) as Box<dyn Read>);
    loop {
        let lines = head_lines(&mut reader)?;
        let status = lines
            .first()
            .and_then(|line| line.split(' ').nth(1)?.parse().ok())
            .ok_or_else(|| invalid("no status line"))?;
        // 100 Continue and its like are followed by the real answer.
        if (100..200).contains(&status) {
            continue;
        }
        let framing = framing(status, &lines[1..])?;
        return Ok(Response { status, body: BodyReader { reader, framing } });
    }
}

fn head_lines(reader: &mut impl BufRead) -> io::Result<Vec<String>> {
    let mut lines = Vec::new();
    let mut head = reader.take(HEAD_MOST_BYTES);
    loop {
        let mut line = String::new();
        if head.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let line = line.trim_end();
        if line.is_empty() {
            return Ok(lines);
        }
        lines.push(line.to_owned());
    }
}

enum Framing {
    Left(u64),
    /// Bytes left of the present chunk; `None` before the first and after each.
    Chunks(Option<u64>),
    UntilClosed,
    Over,
}

fn framing(status: u16, headers: &[String]) -> io::Result<Framing> {
    if status == 204 || status == 304 {
        return Ok(Framing::Over);
    }
    let value = |wanted: &str| {
        headers.iter().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case(wanted).then(|| value.trim().to_ascii_lowercase())
        })
    };
    if value("transfer-encoding").is_some_and(|coding| coding.ends_with("chunked")) {
        return Ok(Framing::Chunks(None));
    }
    match value("content-length") {
        Some(length) => {
            Ok(Framing::Left(length.parse().map_err(|_| invalid("content-length is no number"))?))
        }
        None => Ok(Framing::UntilClosed),
    }
}

struct BodyReader {
    reader: BufReader<Box<dyn Read>>,
    framing: Framing,
}

impl Read for BodyReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        loop {
            match &mut self.framing {
                Framing::Over => return Ok(0),
                Framing::UntilClosed => return self.reader.read(into),
                Framing::Left(0) => self.framing = Framing::Over,
                Framing::Left(left) => {
                    let count = read_some(&mut self.reader, into, *left)?;
                    *left -= count as u64;
                    return Ok(count);
                }
                Framing::Chunks(Some(0)) => {
                    expect_line_end(&mut self.reader)?;
                    self.framing = Framing::Chunks(None);
                }
                Framing::Chunks(Some(left)) => {
                    let count = read_some(&mut self.reader, into, *left)?;
                    *left -= count as u64;
                    return Ok(count);
                }
                Framing::Chunks(None) => {
                    let length = chunk_length(&mut self.reader)?;
                    self.framing = if length == 0 { Framing::Over } else { Framing::Chunks(Some(length)) };
                }
            }
        }
    }
}

/// At least one byte: an end within a body is an error, so that half an answer is not taken for a whole one.
fn read_some(reader: &mut impl Read, into: &mut [u8], left: u64) -> io::Result<usize> {
    let most = usize::try_from(left).unwrap_or(usize::MAX).min(into.len());
    match reader.read(&mut into[..most])? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        count => Ok(count),
    }
}

fn chunk_length(reader: &mut impl BufRead) -> io::Result<u64> {
    let mut line = String::new();
    if reader.take(1024).read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let digits = line.split(';').next().unwrap_or_default().trim();
    u64::from_str_radix(digits, 16).map_err(|_| invalid("a chunk's length is no number"))
}

fn expect_line_end(reader: &mut impl BufRead) -> io::Result<()> {
    let mut line = String::new();
    reader.take(8).read_line(&mut line)?;
    if line.trim_end().is_empty() { Ok(()) } else { Err(invalid("a chunk is longer than it said")) }
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn response(text: &str) -> io::Result<Response> {
        read_head(Cursor::new(text.to_owned().into_bytes()))
    }

    #[test]
    fn bodies_of_each_kind_are_read() {
        let whole = response("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhelloXX").unwrap();
        assert_eq!((whole.status, whole.text().unwrap().as_str()), (200, "hello"));
        let chunked =
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\n\r\n";
        assert_eq!(response(chunked).unwrap().text().unwrap(), "hello");
        let closed = response("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 500 No\r\n\r\nwhy").unwrap();
        assert_eq!((closed.status, closed.text().unwrap().as_str()), (500, "why"));
        assert_eq!(response("HTTP/1.1 204 No Content\r\n\r\n").unwrap().text().unwrap(), "");
    }

    #[test]
    fn half_an_answer_is_an_error() {
        for text in [
            "",
            "HTTP/1.1 200",
            "nonsense\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhello",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhel",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        ] {
            assert!(response(text).and_then(Response::text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn lines_come_one_by_one() {
        let text =
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\na\nb\n\r\n2\r\nc\n\r\n0\r\n\r\n";
        let lines: Vec<_> = response(text).unwrap().lines().map(Result::unwrap).collect();
        assert_eq!(lines, ["a", "b", "c"]);
    }
}
