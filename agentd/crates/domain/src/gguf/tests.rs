use super::*;
use proptest::prelude::*;

/// A small honest file: two tensors, a vocabulary of three tokens.
#[derive(Clone)]
struct File {
    bytes: Vec<u8>,
}

fn text(into: &mut Vec<u8>, text: &str) {
    into.extend((text.len() as u64).to_le_bytes());
    into.extend(text.as_bytes());
}

fn key_u32(into: &mut Vec<u8>, key: &str, value: u32) {
    text(into, key);
    into.extend(4u32.to_le_bytes());
    into.extend(value.to_le_bytes());
}

fn key_text(into: &mut Vec<u8>, key: &str, value: &str) {
    text(into, key);
    into.extend(8u32.to_le_bytes());
    text(into, value);
}

fn key_texts(into: &mut Vec<u8>, key: &str, values: &[&str]) {
    text(into, key);
    into.extend(9u32.to_le_bytes());
    into.extend(8u32.to_le_bytes());
    into.extend((values.len() as u64).to_le_bytes());
    values.iter().for_each(|value| text(into, value));
}

struct Tensor {
    name: &'static str,
    shape: Vec<u64>,
    kind: u32,
    offset: u64,
}

fn file(keys: &[Vec<u8>], tensors: &[Tensor], data_bytes: usize) -> File {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((keys.len() as u64).to_le_bytes());
    keys.iter().for_each(|key| bytes.extend(key));
    for tensor in tensors {
        text(&mut bytes, tensor.name);
        bytes.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().for_each(|size| bytes.extend(size.to_le_bytes()));
        bytes.extend(tensor.kind.to_le_bytes());
        bytes.extend(tensor.offset.to_le_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(32) + data_bytes, 0);
    File { bytes }
}

fn key(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = Vec::new();
    write(&mut bytes);
    bytes
}

fn honest_keys() -> Vec<Vec<u8>> {
    vec![
        key(|b| key_text(b, "general.architecture", "llama")),
        key(|b| key_u32(b, "llama.block_count", 2)),
        key(|b| key_u32(b, "llama.embedding_length", 8)),
        key(|b| key_u32(b, "llama.attention.head_count", 4)),
        key(|b| key_u32(b, "llama.attention.head_count_kv", 2)),
        key(|b| key_texts(b, "tokenizer.ggml.tokens", &["a", "b", "c"])),
        key(|b| key_text(b, "tokenizer.chat_template", "{{ messages }}")),
    ]
}

fn honest_tensors() -> Vec<Tensor> {
    vec![
        Tensor { name: "one", shape: vec![8, 3], kind: 0, offset: 0 },
        Tensor { name: "two", shape: vec![32], kind: 8, offset: 96 },
    ]
}

fn honest() -> File {
    file(&honest_keys(), &honest_tensors(), 96 + 34)
}

fn corrupt(file: &File) -> String {
    match check_slice(&file.bytes) {
        Err(GgufError::Corrupt { what, .. }) => what,
        other => panic!("expected a corrupt file, got {other:?}"),
    }
}

#[test]
fn an_honest_file_is_described() {
    let summary = check_slice(&honest().bytes).unwrap();
    assert_eq!(summary.architecture, "llama");
    assert_eq!(summary.parameters, 24 + 32);
    assert_eq!(summary.tensor_bytes, 96 + 34);
    assert_eq!(summary.vocabulary, 3);
    assert_eq!(summary.chat_template.as_deref(), Some("{{ messages }}"));
}

#[test]
fn every_shorter_copy_is_refused() {
    let whole = honest().bytes;
    for length in 0..whole.len() {
        let error = check_slice(&whole[..length]).unwrap_err();
        let code = error.report("half.gguf").code;
        let expected = if length < 4 { "model_not_gguf" } else { "model_file_truncated" };
        assert_eq!(code, expected, "cut to {length} bytes: {error}");
    }
}

#[test]
fn a_foreign_file_is_named_as_such() {
    let error = check_slice(b"PK\x03\x04 and the rest of an archive").unwrap_err();
    assert_eq!(error, GgufError::NotGguf(*b"PK\x03\x04"));
    assert_eq!(error.report("x").code, "model_not_gguf");
}

#[test]
fn another_version_is_refused() {
    let mut file = honest();
    file.bytes[4] = 1;
    assert_eq!(check_slice(&file.bytes), Err(GgufError::Version(1)));
}

#[test]
fn counts_and_lengths_that_no_file_could_hold_are_refused_without_allocating() {
    for at in [8, 16] {
        let mut file = honest();
        file.bytes[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(corrupt(&file).contains("number of"));
    }
    let mut file = honest();
    // The length of the first key.
    file.bytes[24..32].copy_from_slice(&(1u64 << 60).to_le_bytes());
    assert!(corrupt(&file).contains("at most 256"));
}

/// Found by the fuzzer (`scripts/test long fuzz`): texts without a length cost a file eight zeros each, and a file of a
/// terabyte could be head all over. Who checked it would have read it all.
#[test]
fn a_head_without_an_end_is_not_read_to_the_end() {
    let elements: u64 = 4 * 1024 * 1024;
    let texts = |name: &str| {
        let mut bytes = Vec::new();
        text(&mut bytes, name);
        bytes.extend([9u32, 8].map(u32::to_le_bytes).concat());
        bytes.extend(elements.to_le_bytes());
        bytes
    };
    let mut first =
        [b"GGUF".as_slice(), &3u32.to_le_bytes(), &1u64.to_le_bytes(), &100u64.to_le_bytes()].concat();
    let mut places: Vec<(u64, Vec<u8>)> = Vec::new();
    let mut at = 0;
    for number in 0..100 {
        first.extend(texts(&format!("key.{number}")));
        let bytes = std::mem::take(&mut first);
        let end = at + bytes.len() as u64 + 8 * elements;
        places.push((at, bytes));
        at = end;
    }
    let mut read_bytes = 0;
    let error = check(1 << 40, &mut |at, into: &mut [u8]| {
        read_bytes += into.len() as u64;
        into.fill(0);
        for (begin, bytes) in &places {
            for (offset, byte) in (*begin..).zip(bytes) {
                if let Some(place) = offset.checked_sub(at).and_then(|place| into.get_mut(place as usize)) {
                    *place = *byte;
                }
            }
        }
        Ok(())
    });
    assert!(error.unwrap_err().to_string().contains("a head has at most"));
    assert!(read_bytes <= 2 * cursor::MAX_HEAD_BYTES, "{read_bytes} bytes were read");
}

#[test]
fn tensors_may_not_overlap_or_leave_the_file() {
    let mut tensors = honest_tensors();
    tensors[1].offset = 32;
    assert!(corrupt(&file(&honest_keys(), &tensors, 200)).contains("at offset 32, expected 96"));
    let mut tensors = honest_tensors();
    tensors[0].shape = vec![u64::MAX, 3];
    assert!(corrupt(&file(&honest_keys(), &tensors, 200)).contains("dimension"));
    let mut tensors = honest_tensors();
    tensors[1].shape = vec![33];
    assert!(corrupt(&file(&honest_keys(), &tensors, 200)).contains("not a multiple"));
    let mut tensors = honest_tensors();
    tensors[1].kind = 4;
    assert!(corrupt(&file(&honest_keys(), &tensors, 200)).contains("unknown type 4"));
    let mut tensors = honest_tensors();
    tensors[1].name = "one";
    assert!(corrupt(&file(&honest_keys(), &tensors, 200)).contains("twice"));
}

#[test]
fn hyperparameters_that_llama_cpp_divides_by_are_bounded() {
    for (name, value, finding) in [
        ("llama.block_count", 100_000, "block_count"),
        ("llama.attention.head_count_kv", 3, "do not divide"),
        ("llama.embedding_length", 0, "embedding_length"),
    ] {
        let mut keys = honest_keys();
        keys.retain(|k| !k.windows(name.len()).any(|w| w == name.as_bytes()));
        keys.push(key(|b| key_u32(b, name, value)));
        assert!(corrupt(&file(&keys, &honest_tensors(), 130)).contains(finding), "{name}");
    }
}

#[test]
fn arrays_beside_the_vocabulary_have_its_length() {
    let mut keys = honest_keys();
    keys.push(key(|b| {
        text(b, "tokenizer.ggml.scores");
        b.extend(9u32.to_le_bytes());
        b.extend(6u32.to_le_bytes());
        b.extend(2u64.to_le_bytes());
        b.extend([0; 8]);
    }));
    assert!(corrupt(&file(&keys, &honest_tensors(), 130)).contains("2 elements for 3 tokens"));
}

#[test]
fn a_part_of_a_split_model_is_refused_with_the_way_to_merge() {
    let mut keys = honest_keys();
    keys.push(key(|b| key_u32(b, "split.count", 3)));
    let error = check_slice(&file(&keys, &honest_tensors(), 130).bytes).unwrap_err();
    assert_eq!(error, GgufError::Split { part: 1, parts: 3 });
    assert!(error.report("x").fix.contains("--merge"));
}

#[test]
fn a_medium_that_fails_is_the_environments_fault() {
    let error = check(1000, &mut |_, _| Err("input/output error".to_owned())).unwrap_err();
    assert_eq!(error.report("x").code, "model_file_unreadable");
}

proptest! {
    /// Whatever is in the file: an answer, no panic, no allocation by a claimed length.
    #[test]
    fn any_damage_is_survived(at in 0usize..700, value: u8, cut in 0usize..900) {
        let mut bytes = honest().bytes;
        if let Some(byte) = bytes.get_mut(at) {
            *byte = value;
        }
        bytes.truncate(cut);
        let _answer = check_slice(&bytes);
    }

    #[test]
    fn any_bytes_after_a_good_start_are_survived(tail in proptest::collection::vec(any::<u8>(), 0..400)) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(1u64.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
        bytes.extend(tail);
        let _answer = check_slice(&bytes);
    }
}
