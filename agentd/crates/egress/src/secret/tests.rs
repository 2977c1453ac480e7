use super::*;
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD};
use proptest::prelude::*;

fn bearer() -> SecretUse {
    with("Bearer {}")
}

fn with(template: &str) -> SecretUse {
    SecretUse {
        name: "mail".to_owned().try_into().unwrap(),
        header: "authorization".to_owned(),
        template: template.to_owned(),
    }
}

fn secret(text: &str) -> Secret {
    Secret::new(text.as_bytes().to_vec()).unwrap()
}

fn scrubbed(forms: &Forms, pieces: &[&[u8]]) -> Vec<u8> {
    let mut scrubber = Scrubber::new(Some(forms));
    let mut out: Vec<u8> = pieces.iter().flat_map(|piece| scrubber.piece(piece.to_vec())).collect();
    out.extend(scrubber.rest());
    out
}

fn in_pieces<'a>(text: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
    let mut pieces = Vec::new();
    let mut rest = text;
    for cut in cuts {
        let (piece, after) = rest.split_at((*cut).min(rest.len()));
        pieces.push(piece);
        rest = after;
    }
    pieces.push(rest);
    pieces
}

#[test]
fn a_secret_has_a_length_and_letters_that_a_field_can_carry() {
    assert!(Secret::new(b"correct-horse".to_vec()).is_ok());
    assert_eq!(Secret::new(b"short".to_vec()), Err(SecretError::Length(5)));
    assert_eq!(Secret::new(vec![b'x'; 4097]), Err(SecretError::Length(4097)));
    for bad in ["two words here", "line\r\nX: injected", "naïve-secret", "nul\0nul\0nul"] {
        assert_eq!(Secret::new(bad.as_bytes().to_vec()), Err(SecretError::Character), "{bad:?}");
    }
    assert_eq!(format!("{:?}", Secret::new(b"correct-horse".to_vec()).unwrap()), "Secret");
}

#[test]
fn only_what_may_begin_the_secret_waits() {
    let forms = Forms::of(&secret("abcabcabd"), &bearer());
    let mut scrubber = Scrubber::new(Some(&forms));
    assert_eq!(scrubber.piece(b"data: x\n\n".to_vec()), b"data: x\n\n");
    assert_eq!(scrubber.piece(b"data: abcab".to_vec()), b"data: ");
    assert_eq!(scrubber.piece(b"cabcabd.".to_vec()), b"abc*********.");
    assert_eq!(scrubber.rest(), b"");
    // Half an escape waits for its other half, and goes on its way when there is none.
    assert_eq!(scrubber.piece(b"100 %".to_vec()), b"100 ");
    assert_eq!(scrubber.piece(b" of it, AT&".to_vec()), b"% of it, AT");
    assert_eq!(scrubber.piece(b"T\n".to_vec()), b"&T\n");
    assert_eq!(scrubber.piece(b"a line of plain text a\n".to_vec()), b"a line of plain text a\n");
    assert_eq!(scrubber.rest(), b"");
}

/// How a letter of a form may be written.
const ESCAPES: [fn(u8) -> String; 14] = [
    |byte| char::from(byte).to_string(),
    |byte| format!("%{byte:02x}"),
    |byte| format!("%{byte:02X}"),
    |byte| format!("%25{byte:02X}"),
    |byte| format!("\\u{byte:04x}"),
    |byte| format!("\\u{byte:04X}"),
    |byte| format!("\\\\u{byte:04x}"),
    |byte| format!("\\x{byte:02x}"),
    |byte| format!("\\{byte:03o}"),
    |byte| format!("&#{byte};"),
    |byte| format!("&#x{byte:X};"),
    |byte| format!("&amp;#{byte};"),
    |byte| {
        let byte = char::from(byte);
        if byte.is_ascii_punctuation() { format!("\\{byte}") } else { byte.to_string() }
    },
    |byte| format!("{}\0", char::from(byte)),
];

/// A form of the secret as some program writes it, and which letters of it tell something of the secret.
fn written(secret: &[u8], form: usize, before: &[u8], after: &[u8]) -> (Vec<u8>, std::ops::Range<usize>) {
    let around = [before, secret, after].concat();
    let own = 8 * before.len()..8 * (before.len() + secret.len());
    let text = match form {
        0 => return (secret.to_vec(), 0..secret.len()),
        1 => return (secret.to_ascii_uppercase(), 0..secret.len()),
        2 => hex::encode(&around),
        3 => hex::encode_upper(&around),
        4 => STANDARD.encode(&around),
        5 => STANDARD_NO_PAD.encode(&around),
        6 => URL_SAFE.encode(&around),
        _ => URL_SAFE_NO_PAD.encode(&around),
    };
    let bits = if form < 4 { 4 } else { 6 };
    (text.into_bytes(), own.start / bits..own.end.div_ceil(bits))
}

#[test]
fn the_usual_programs_forms_are_found() {
    let plain = "s3cr+t/k-y_of=mail&co";
    let pair = STANDARD.encode("somebody:correct horse");
    let basic = Forms::of(&secret(&pair), &with("Basic {}"));
    let forms = Forms::of(&secret(plain), &bearer());
    let long =
        STANDARD.encode(format!("a longer text before it, of more than one line {plain} and after it"));
    let wrapped: Vec<&str> =
        long.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    let utf16: Vec<u8> = plain.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let cases: [(&str, &Forms, Vec<u8>); 17] = [
        ("itself", &forms, plain.into()),
        ("a URL's query", &forms, b"q=s3cr%2Bt%2Fk-y_of%3Dmail%26co".into()),
        ("a URL in a URL", &forms, b"u=q%3Ds3cr%252Bt%252Fk-y_of%253Dmail%2526co".into()),
        ("PHP's JSON", &forms, br#"{"key": "s3cr+t\/k-y_of=mail&co"}"#.into()),
        ("Go's JSON", &forms, br#"{"key": "s3cr+t/k-y_of=mail\u0026co"}"#.into()),
        ("JSON in JSON", &forms, br#"{"a": "{\"key\": \"s3cr+t\\/k-y_of=mail\\u0026co\"}"}"#.into()),
        ("HTML", &forms, b"<p>s3cr+t/k-y_of=mail&amp;co</p>".into()),
        ("HTML in numbers", &forms, b"<p>s3cr&#43;t&#x2F;k-y_of&equals;mail&#038;co</p>".into()),
        ("the name of a field", &forms, b"S3CR+T/K-Y_OF=MAIL&CO".into()),
        ("a dump", &forms, hex::encode(plain).into()),
        ("UTF-16", &forms, utf16),
        ("base64 in lines", &forms, wrapped.join("\r\n").into()),
        ("base64 in lines in JSON", &forms, wrapped.join("\\n").into()),
        ("base64 in a URL", &forms, STANDARD.encode(plain).replace('+', "%2B").replace('/', "%2F").into()),
        ("Basic, whole", &basic, format!("Authorization: Basic {pair}").into()),
        ("Basic, both", &basic, b"you are somebody:correct horse".into()),
        ("Basic, its password", &basic, b"wrong password: correct%20horse".into()),
    ];
    for (name, forms, text) in cases {
        let out = scrubbed(forms, &[&text]);
        assert_eq!(out.len(), text.len(), "{name}");
        let stars = out.iter().filter(|byte| **byte == b'*').count();
        assert!(stars >= 13, "{name}: {}", String::from_utf8_lossy(&out));
        // Piece by piece as well, and the same.
        let single: Vec<&[u8]> = text.chunks(1).collect();
        assert_eq!(scrubbed(forms, &single), out, "{name}");
    }
    let signs = Forms::of(&secret("ends in a-sign%".replace(' ', "-").as_str()), &bearer());
    assert_eq!(scrubbed(&signs, &[b"ends-in-a-sign%2", b"5."]), b"*****************.");
    let out = scrubbed(&basic, &[b"somebody"]);
    assert_eq!(out, b"somebody", "a user's name is no secret");
}

#[test]
fn a_coded_answer_is_told_from_a_plain_one() {
    let answer = |value: &str, length| {
        let headers = vec![Header { name: "Content-ENCODING".to_owned(), value: value.as_bytes().to_vec() }];
        Response { status: 200, reason: String::new(), headers, body: length, declared: None }
    };
    for plain in ["identity", "", " , Identity"] {
        assert_eq!(coding(&answer(plain, Length::Chunked)), None, "{plain}");
    }
    for coded in ["gzip", "br", "zstd", "identity, deflate", "x-unheard-of"] {
        assert_eq!(coding(&answer(coded, Length::UntilClose)).as_deref(), Some(coded));
    }
    assert_eq!(coding(&answer("gzip", Length::Bytes(0))), None, "an answer to HEAD has no content");
}

proptest! {
    /// However it is cut, the secret is not in what comes out, and what comes out is as long as what went in.
    #[test]
    fn no_cut_lets_the_secret_through(
        secret in "[ab]{8,12}",
        text in proptest::collection::vec("[ab]{0,6}|SECRET|SECRET", 0..8),
        cuts in proptest::collection::vec(0usize..40, 0..8),
    ) {
        let forms = Forms::of(&self::secret(&secret), &bearer());
        let text = text.concat().replace("SECRET", &secret).into_bytes();
        let out = scrubbed(&forms, &in_pieces(&text, &cuts));
        prop_assert_eq!(out.len(), text.len());
        prop_assert!(!out.windows(secret.len()).any(|window| window == secret.as_bytes()));
    }

    /// Whatever the form, whatever stands around it, however each letter is escaped and wherever the pieces end: each
    /// letter that tells something of the secret is a star, and nothing else is touched.
    #[test]
    fn every_form_is_found_in_every_escape_at_every_cut(
        secret in "[!-~]{8,40}",
        form in 0usize..8,
        before in proptest::collection::vec(any::<u8>(), 0..7),
        after in proptest::collection::vec(any::<u8>(), 0..7),
        escapes in proptest::collection::vec(0..ESCAPES.len(), 1..20),
        around in ("[ ,.:<>{}]{0,9}", "[ ,.:<>{}]{0,9}"),
        cuts in proptest::collection::vec(0usize..60, 0..12),
    ) {
        let forms = Forms::of(&self::secret(&secret), &bearer());
        let (letters, own) = written(secret.as_bytes(), form, &before, &after);
        let mut text = around.0.clone().into_bytes();
        let mut expected = text.clone();
        for (at, letter) in letters.iter().enumerate() {
            // What stands around the form stays as it is: a backslash there would belong to the first escape.
            let escape = if own.contains(&at) { ESCAPES[escapes[at % escapes.len()]] } else { ESCAPES[0] };
            let piece = escape(*letter);
            // The other half of the last letter in UTF-16 is no letter.
            let told = if own.contains(&at) && at + 1 == own.end { piece.trim_end_matches('\0').len() } else { piece.len() };
            expected.extend(piece.bytes().enumerate().map(|(index, byte)| {
                if own.contains(&at) && index < told { b'*' } else { byte }
            }));
            text.extend(piece.bytes());
        }
        text.extend(around.1.bytes());
        expected.extend(around.1.bytes());
        let out = scrubbed(&forms, &in_pieces(&text, &cuts));
        let shown = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        prop_assert_eq!(shown(&out), shown(&expected), "of {}", shown(&text));
    }

    /// A text without the secret passes as it is, and what has a line's end waits for nothing.
    #[test]
    fn what_is_no_secret_passes_unchanged(
        text in proptest::collection::vec(prop_oneof!["[a-z ]{1,9}", "[%&\\\\#;u0-9a-f]{1,9}", "&amp;|%25|\\\\n|\r\n|\0"], 0..30),
        cuts in proptest::collection::vec(0usize..60, 0..12),
    ) {
        let forms = Forms::of(&secret("Zx9-Qv7-Wk3-Jp1"), &bearer());
        let text = text.concat().into_bytes();
        prop_assert_eq!(scrubbed(&forms, &in_pieces(&text, &cuts)), text.clone());
        let mut scrubber = Scrubber::new(Some(&forms));
        let line = [&text[..], b".\n\n"].concat();
        prop_assert_eq!(scrubber.piece(line.clone()), line);
    }
}
