use super::*;
use llama_cpp_2::json_schema_to_grammar;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::token::data::LlamaTokenData;
use llama_cpp_2::token::data_array::LlamaTokenDataArray;
use proptest::prelude::*;
use serde_json::json;
use std::path::PathBuf;

/// Every byte is a token, and some longer ones; the last one ends an answer.
fn words(longer: &[&str]) -> Arc<Words> {
    let bytes = (0..=255u8).map(|byte| vec![byte]);
    let mut texts: Vec<Vec<u8>> = bytes.chain(longer.iter().map(|text| text.as_bytes().to_vec())).collect();
    texts.push(Vec::new());
    let end = texts.len() as u32 - 1;
    Arc::new(Words::new(texts, vec![end]))
}

fn matcher(grammar: &str) -> Matcher {
    Matcher::new(grammar, &words(&[])).expect(grammar)
}

/// How far a text can be read, and whether it may end there.
fn reads(matcher: &Matcher, text: &[u8]) -> (usize, bool) {
    let mut matcher = matcher.clone();
    let end = matcher.words.ends()[0];
    for (index, byte) in text.iter().enumerate() {
        if !matcher.accept(u32::from(*byte)).expect("little work") {
            return (index, matcher.allows(end).expect("little work"));
        }
    }
    (text.len(), matcher.allows(end).expect("little work"))
}

fn takes(grammar: &str, text: &str) -> bool {
    reads(&matcher(grammar), text.as_bytes()) == (text.len(), true)
}

#[test]
fn texts_are_taken_as_the_grammar_says() {
    for (grammar, good, bad) in [
        ("root ::= \"yes\" | \"no\"", vec!["yes", "no"], vec!["", "ye", "yesno", "No"]),
        ("root ::= [a-c]+ [^a-c]", vec!["abc!", "a\n", "cé"], vec!["a", "!", "aab"]),
        ("root ::= (\"a\" | \"b\")* \"-\"?", vec!["", "abba", "-", "b-"], vec!["--", "-a", "c"]),
        ("root ::= \"x\"{2,4} \"y\"{3}\n", vec!["xxyyy", "xxxxyyy"], vec!["xyyy", "xxxxxyyy", "xxyy"]),
        ("root ::= \"z\"{2,}", vec!["zz", "zzzzzzzzzz"], vec!["z", ""]),
        ("root ::= pair\npair ::= \"(\" pair? \")\" # nested\n", vec!["()", "((()))"], vec!["(()", "())"]),
        ("root ::= \"\\x41\\u00e4\\U0001F600\\n\\\"\\\\\"", vec!["Aä😀\n\"\\"], vec!["Aä😀\n\""]),
        ("root ::= .{2} [-a] [\\]\\[]", vec!["é😀-]", "\n\na["], vec!["a-]"]),
        ("root ::= a b\r\na ::= \"1\" |\r\n  \"2\"\r\nb ::= [α-ω]", vec!["1β", "2ω"], vec!["1a", "3β"]),
    ] {
        for text in good {
            assert!(takes(grammar, text), "{grammar}: {text:?}");
        }
        for text in bad {
            assert!(!takes(grammar, text), "{grammar}: {text:?}");
        }
    }
}

#[test]
fn what_cannot_be_read_by_is_refused() {
    let deep = format!("root ::= {}\"a\"{}", "(".repeat(65), ")".repeat(65));
    for (grammar, why) in [
        ("", "no rule `root`"),
        ("root = nothing", "`::=`"),
        ("root ::= root \"a\"", "the rule `root` begins with itself"),
        ("root ::= a\na ::= \"x\"? b\nb ::= a", "begins with itself"),
        ("root ::= (\"a\"?)*", "begins with itself"),
        ("root ::= other", "no rule `other`"),
        ("root ::= \"a", "too early"),
        ("root ::= [a", "too early"),
        ("root ::= \"\\q\"", "escape"),
        ("root ::= \"\\xg0\"", "hexadecimal"),
        ("root ::= \"\\U00110000\"", "hexadecimal"),
        ("root ::= *", "nothing to repeat"),
        ("root ::= \"a\"{3,2}", "less often"),
        ("root ::= \"a\"{99999999999999999999}", "too large"),
        ("root ::= \"a\"{,3}", "a number is missing"),
        ("root ::= \"ab\"{150000}", "elements"),
        ("root ::= (\"a\" | \"b\"", "`)`"),
        ("root ::= \"a\" )", "should end here"),
        ("root ::= <think>", "references to tokens"),
        (&deep, "brackets"),
    ] {
        let error = Matcher::new(grammar, &words(&[])).err().unwrap_or_else(|| panic!("{grammar} was taken"));
        assert!(error.contains(why), "{grammar}: {error}");
    }
}

/// A byte that begins a character is allowed only where a character that begins like it is.
#[test]
fn characters_are_whole() {
    let grammar = matcher("root ::= [α-ω]+ \"!\"");
    assert_eq!(reads(&grammar, "αω!".as_bytes()), (5, true));
    assert_eq!(reads(&grammar, &[0xce]), (1, false), "α to ο begin like this");
    assert_eq!(reads(&grammar, &[0xc3]), (0, false), "é begins like this");
    assert_eq!(reads(&grammar, &[0xce, b'!']), (1, false));
    let any = matcher("root ::= .*");
    for wrong in [&[0x80][..], &[0xc0], &[0xc1, 0x81], &[0xe0, 0x80], &[0xed, 0xa0], &[0xf4, 0x90], &[0xf5]] {
        assert!(reads(&any, wrong).0 < wrong.len(), "{wrong:x?} is no text");
    }
    assert!(reads(&any, "\u{10ffff}\u{d7ff}\u{800}".as_bytes()).1);
}

#[test]
fn a_mask_is_what_is_allowed_one_by_one() {
    let words = words(&["ab", "abc", "b", "ba", "é", "\u{e9}x", "(((", "))", "a(", "!"]);
    let mut matcher =
        Matcher::new("root ::= (\"a\" | \"b\" | [é])* inner\ninner ::= \"(\" inner? \")\"", &words).unwrap();
    for token in [u32::from(b'a'), 256, 262, 262] {
        let mask = matcher.mask().unwrap();
        let one_by_one: Vec<u32> =
            (0..words.tokens() as u32).filter(|token| matcher.allows(*token).unwrap()).collect();
        assert_eq!(mask.tokens().collect::<Vec<_>>(), one_by_one);
        assert!(one_by_one.iter().all(|token| mask.has(*token)));
        assert!(matcher.accept(token).unwrap(), "{token}");
    }
    assert!(!matcher.accept(u32::from(b'a')).unwrap(), "and nothing has changed:");
    for _ in 0..6 {
        assert!(!matcher.is_finished().unwrap());
        assert!(matcher.accept(u32::from(b')')).unwrap());
    }
    assert!(matcher.is_finished().unwrap());
    assert_eq!(matcher.mask().unwrap().tokens().collect::<Vec<_>>(), words.ends());
}

/// Very many readings: it ends with a reason, in bounded work, and in turns that others can go between.
#[test]
fn what_never_ends_is_told() {
    let rules = (0..24)
        .map(|n| format!("r{n} ::= \"a\" r{n}x | \"a\" r{n}y\nr{n}x ::= \"a\" s\nr{n}y ::= \"a\" s\n"));
    let any = (0..24).map(|n| format!("r{n} | r{n} s")).collect::<Vec<_>>().join(" | ");
    let grammar = format!("root ::= s\ns ::= {any}\n{}", rules.collect::<String>());
    let mut matcher = matcher(&grammar);
    let mut turns = 0;
    let ended = (0..4000).find_map(|_| {
        loop {
            match matcher.accept(u32::from(b'a')) {
                Ok(taken) => break (!taken).then_some("refused"),
                Err(Stop::Later) => turns += 1,
                Err(Stop::TooMuch) => break Some("too much"),
            }
        }
    });
    assert_eq!(ended, Some("too much"));
    assert!(turns > 0, "it was interrupted");
}

/// A machine that had to forget finds the same again.
#[test]
fn what_is_forgotten_is_found_again() {
    let mut first =
        matcher("root ::= \"[\" (item \",\")* item \"]\"\nitem ::= [0-9]{1,9} | \"[\" item \"]\"");
    let mut second = first.clone();
    for byte in b"[12,[[3" {
        assert!(first.accept(u32::from(*byte)).unwrap());
    }
    let before = first.mask().unwrap().tokens().collect::<Vec<_>>();
    lock(&first.machine).tidy();
    let epoch = lock(&first.machine).epoch();
    // As `tidy` does when too much is kept.
    lock(&first.machine).forget();
    assert_ne!(lock(&first.machine).epoch(), epoch);
    assert!(second.accept(u32::from(b'[')).unwrap());
    assert_eq!(first.mask().unwrap().tokens().collect::<Vec<_>>(), before);
    assert!(first.accept(u32::from(b']')).unwrap());
}

/// Expressions over two letters, and a way to decide about them that has nothing in common with the machine.
#[derive(Debug, Clone)]
enum Expression {
    Letter(char),
    Both(Box<Expression>, Box<Expression>),
    Either(Box<Expression>, Box<Expression>),
    Maybe(Box<Expression>),
    Some(Box<Expression>),
}

impl Expression {
    fn gbnf(&self) -> String {
        match self {
            Self::Letter(letter) => format!("\"{letter}\""),
            Self::Both(a, b) => format!("({} {})", a.gbnf(), b.gbnf()),
            Self::Either(a, b) => format!("({} | {})", a.gbnf(), b.gbnf()),
            Self::Maybe(a) => format!("({})?", a.gbnf()),
            Self::Some(a) => format!("({})+", a.gbnf()),
        }
    }

    /// Ends of what can be read from each of these places.
    fn ends(
        &self,
        text: &[char],
        from: &std::collections::BTreeSet<usize>,
    ) -> std::collections::BTreeSet<usize> {
        match self {
            Self::Letter(letter) => {
                from.iter().filter(|at| text.get(**at) == Some(letter)).map(|at| at + 1).collect()
            }
            Self::Both(a, b) => b.ends(text, &a.ends(text, from)),
            Self::Either(a, b) => a.ends(text, from).union(&b.ends(text, from)).copied().collect(),
            Self::Maybe(a) => a.ends(text, from).union(from).copied().collect(),
            Self::Some(a) => {
                let mut all = a.ends(text, from);
                loop {
                    let more: std::collections::BTreeSet<usize> =
                        a.ends(text, &all).union(&all).copied().collect();
                    if more == all {
                        return all;
                    }
                    all = more;
                }
            }
        }
    }

    fn may_be_empty(&self) -> bool {
        self.ends(&[], &[0].into()).contains(&0)
    }
}

fn expression() -> impl Strategy<Value = Expression> {
    let letter = prop_oneof![Just('a'), Just('b')].prop_map(Expression::Letter);
    letter.prop_recursive(5, 24, 2, |inner| {
        let two = (inner.clone(), inner.clone());
        prop_oneof![
            two.clone().prop_map(|(a, b)| Expression::Both(Box::new(a), Box::new(b))),
            two.prop_map(|(a, b)| Expression::Either(Box::new(a), Box::new(b))),
            inner.clone().prop_map(|a| Expression::Maybe(Box::new(a))),
            // Of what may be nothing it would begin with itself.
            inner.prop_map(|a| {
                if a.may_be_empty() { Expression::Maybe(Box::new(a)) } else { Expression::Some(Box::new(a)) }
            }),
        ]
    })
}

proptest! {
    #[test]
    fn any_expression_takes_what_it_means(expression in expression(), text in "[ab]{0,8}") {
        let letters: Vec<char> = text.chars().collect();
        let means = expression.ends(&letters, &[0].into()).contains(&letters.len());
        let grammar = format!("root ::= {}", expression.gbnf());
        prop_assert_eq!(takes(&grammar, &text), means, "{}: {}", grammar, text);
    }

    /// E20: no text ends the engine or keeps it busy.
    #[test]
    fn any_text_is_a_grammar_or_refused(text in "(root ::= )?([a-c\"\\[\\]\\^(){}*+?|<!.,:=0-9\\\\ \n#-]|::=){0,60}") {
        if let Ok(mut matcher) = Matcher::new(&text, &words(&["ab", "ba"])) {
            for _ in 0..4 {
                let Ok(mask) = matcher.mask() else { break };
                let Some(token) = mask.tokens().next() else { break };
                if matcher.accept(token) != Ok(true) {
                    break;
                }
            }
        }
    }
}

/// The tiny model of the image, with its vocabulary only; where the models were built before.
fn tiny() -> Option<(LlamaBackend, LlamaModel)> {
    let Some(folder) = std::env::var_os("AGENTD_MODELS").map(PathBuf::from) else {
        println!("SKIP: AGENTD_MODELS does not say where the models are");
        return None;
    };
    let backend = LlamaBackend::init().expect("one back end for this process");
    let parameters = LlamaModelParams::default().with_vocab_only(true);
    let model =
        LlamaModel::load_from_file(&backend, folder.join("tiny.gguf"), &parameters).expect("the tiny model");
    Some((backend, model))
}

/// What llama.cpp's own sampler allows is allowed here, over the model's whole vocabulary, at every token of answers that
/// keep to the form. It looks at less of a character that was begun, so such tokens are not compared.
#[test]
fn masks_are_those_of_llama_cpp() {
    let Some((_backend, model)) = tiny() else { return };
    let words = Arc::new(Words::of_model(&model));
    let schema = json!({ "type": "object", "additionalProperties": false, "required": ["name", "count", "tags"],
        "properties": { "name": { "type": "string", "maxLength": 12 }, "count": { "type": "integer", "minimum": -5,
            "maximum": 120 }, "tags": { "type": "array", "items": { "enum": ["red", "green", "rosé"] }, "maxItems": 3 },
            "more": { "anyOf": [{ "type": "number" }, { "type": "null" }, { "type": "string", "format": "date" }] } } });
    let mut compared = 0;
    for grammar in [
        json_schema_to_grammar(&schema.to_string()).expect("a grammar"),
        json_schema_to_grammar(r#"{"type":"object"}"#).expect("a grammar"),
        "root ::= (word \" \")* [.!?]\nword ::= [a-zéü]{1,8} | [0-9]+".to_owned(),
    ] {
        for seed in 0..6u64 {
            let mut theirs = LlamaSampler::grammar(&model, &grammar, "root").expect("llama.cpp takes it");
            let mut ours = Matcher::new(&grammar, &words).expect("it is taken");
            for step in 0..60u64 {
                let data = model.vocab().tokens().map(|token| LlamaTokenData::new(token, 1.0, 0.0)).collect();
                let mut all = LlamaTokenDataArray::new(data, false);
                all.apply_sampler(&mut theirs);
                let mask = ours.mask().expect("little work");
                for candidate in &all.data {
                    let token = candidate.id().0 as u32;
                    let whole = words.text(token).is_none_or(|text| std::str::from_utf8(text).is_ok());
                    let control = words.text(token).is_none() && !words.ends().contains(&token);
                    if whole && !control {
                        let text = words.text(token).map(String::from_utf8_lossy);
                        assert_eq!(
                            mask.has(token),
                            candidate.logit().is_finite(),
                            "{text:?} after {:?} in {grammar}",
                            String::from_utf8_lossy(&ours.text)
                        );
                        compared += 1;
                    }
                }
                let whole: Vec<u32> = mask
                    .tokens()
                    .filter(|token| words.text(*token).is_some_and(|text| std::str::from_utf8(text).is_ok()))
                    .collect();
                let Some(token) = whole.get((seed * 7919 + step * 104_729) as usize % whole.len().max(1))
                else {
                    break;
                };
                assert!(ours.accept(*token).expect("little work"));
                theirs.try_accept(LlamaToken(*token as i32)).expect("llama.cpp goes on too");
            }
        }
    }
    assert!(compared > 10_000, "{compared} tokens were compared");
}
