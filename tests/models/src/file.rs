//! How is a GGUF file written that is larger than one wants in memory?
//!
//! In:  keys and the table of tensors first, then each tensor's bytes in the order of the table.
//! Source: the GGUF specification, `docs/gguf.md` of ggml-org/ggml, version 3, alignment 32.

use std::io::{self, Write};

const ALIGNMENT: usize = 32;

pub(crate) enum Value<'a> {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(&'a str),
    I32s(&'a [i32]),
    Texts(&'a [String]),
}

/// A row of the table of tensors.
pub(crate) struct Entry {
    pub(crate) name: String,
    /// The fastest dimension first, as GGUF counts.
    pub(crate) sizes: Vec<usize>,
    /// `ggml_type`.
    pub(crate) kind: u32,
    pub(crate) bytes: usize,
}

pub(crate) fn head(keys: &[(&str, Value<'_>)], tensors: &[Entry]) -> Vec<u8> {
    let mut head = b"GGUF".to_vec();
    head.extend(3u32.to_le_bytes());
    head.extend((tensors.len() as u64).to_le_bytes());
    head.extend((keys.len() as u64).to_le_bytes());
    for (name, value) in keys {
        text(&mut head, name);
        write_value(&mut head, value);
    }
    let mut offset = 0;
    for tensor in tensors {
        text(&mut head, &tensor.name);
        head.extend((tensor.sizes.len() as u32).to_le_bytes());
        tensor.sizes.iter().for_each(|size| head.extend((*size as u64).to_le_bytes()));
        head.extend(tensor.kind.to_le_bytes());
        head.extend((offset as u64).to_le_bytes());
        offset += tensor.bytes.next_multiple_of(ALIGNMENT);
    }
    head.resize(head.len().next_multiple_of(ALIGNMENT), 0);
    head
}

/// Fills up to the next tensor's place.
pub(crate) fn pad(bytes: usize, into: &mut impl Write) -> io::Result<()> {
    into.write_all(&[0; ALIGNMENT][..bytes.next_multiple_of(ALIGNMENT) - bytes])
}

fn write_value(into: &mut Vec<u8>, value: &Value<'_>) {
    match value {
        Value::U32(number) => {
            into.extend(4u32.to_le_bytes());
            into.extend(number.to_le_bytes());
        }
        Value::F32(number) => {
            into.extend(6u32.to_le_bytes());
            into.extend(number.to_le_bytes());
        }
        Value::Bool(truth) => {
            into.extend(7u32.to_le_bytes());
            into.push(u8::from(*truth));
        }
        Value::Text(value) => {
            into.extend(8u32.to_le_bytes());
            text(into, value);
        }
        Value::I32s(numbers) => {
            array(into, 5, numbers.len());
            numbers.iter().for_each(|number| into.extend(number.to_le_bytes()));
        }
        Value::Texts(values) => {
            array(into, 8, values.len());
            values.iter().for_each(|value| text(into, value));
        }
    }
}

fn text(into: &mut Vec<u8>, text: &str) {
    into.extend((text.len() as u64).to_le_bytes());
    into.extend(text.as_bytes());
}

fn array(into: &mut Vec<u8>, kind: u32, length: usize) {
    into.extend(9u32.to_le_bytes());
    into.extend(kind.to_le_bytes());
    into.extend((length as u64).to_le_bytes());
}
