//! How is a GGUF file written?
//!
//! In:    keys and tensors in the order they shall have. Out: the file's bytes, version 3, alignment 32.
//! Source: the GGUF specification, `docs/gguf.md` of ggml-org/ggml.

use half::{bf16, f16};

const ALIGNMENT: usize = 32;
/// Elements of a Q8_0 block: one scale in f16 and 32 signed bytes.
const Q8_0_BLOCK: usize = 32;

pub(super) enum Value<'a> {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(&'a str),
    I32s(Vec<i32>),
    Texts(Vec<String>),
}

/// How a tensor's elements are stored.
#[derive(Clone, Copy)]
pub(super) enum Storage {
    F32,
    Bf16,
    Q8_0,
}

/// A tensor in the order of NumPy and PyTorch: `shape` slowest dimension first, `data` row by row.
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) storage: Storage,
    pub(super) data: Vec<f32>,
}

#[derive(Default)]
pub(super) struct Writer {
    keys: Vec<u8>,
    key_count: u64,
    tensors: Vec<Tensor>,
}

impl Writer {
    pub(super) fn key(&mut self, name: &str, value: Value<'_>) {
        self.key_count += 1;
        text(&mut self.keys, name);
        let keys = &mut self.keys;
        match value {
            Value::U32(number) => {
                keys.extend(4u32.to_le_bytes());
                keys.extend(number.to_le_bytes());
            }
            Value::F32(number) => {
                keys.extend(6u32.to_le_bytes());
                keys.extend(number.to_le_bytes());
            }
            Value::Bool(truth) => {
                keys.extend(7u32.to_le_bytes());
                keys.push(u8::from(truth));
            }
            Value::Text(value) => {
                keys.extend(8u32.to_le_bytes());
                text(keys, value);
            }
            Value::I32s(numbers) => {
                array(keys, 5, numbers.len());
                numbers.iter().for_each(|number| keys.extend(number.to_le_bytes()));
            }
            Value::Texts(values) => {
                array(keys, 8, values.len());
                values.iter().for_each(|value| text(keys, value));
            }
        }
    }

    pub(super) fn tensor(&mut self, tensor: Tensor) {
        assert_eq!(tensor.shape.iter().product::<usize>(), tensor.data.len(), "{}", tensor.name);
        self.tensors.push(tensor);
    }

    pub(super) fn finish(self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend(self.key_count.to_le_bytes());
        file.extend(&self.keys);
        let mut offset = 0;
        for tensor in &self.tensors {
            text(&mut file, &tensor.name);
            file.extend((tensor.shape.len() as u32).to_le_bytes());
            // GGUF counts the fastest dimension first.
            tensor.shape.iter().rev().for_each(|size| file.extend((*size as u64).to_le_bytes()));
            file.extend(tensor.storage.kind().to_le_bytes());
            file.extend((offset as u64).to_le_bytes());
            offset += tensor.storage.bytes(tensor.data.len()).next_multiple_of(ALIGNMENT);
        }
        for tensor in &self.tensors {
            file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
            match tensor.storage {
                Storage::F32 => tensor.data.iter().for_each(|x| file.extend(x.to_le_bytes())),
                Storage::Bf16 => {
                    tensor.data.iter().for_each(|x| file.extend(bf16::from_f32(*x).to_le_bytes()));
                }
                Storage::Q8_0 => quantise_q8_0(&tensor.data, &mut file),
            }
        }
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
        file
    }
}

impl Storage {
    fn kind(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::Q8_0 => 8,
            Self::Bf16 => 30,
        }
    }

    fn bytes(self, elements: usize) -> usize {
        match self {
            Self::F32 => elements * 4,
            Self::Bf16 => elements * 2,
            Self::Q8_0 => elements / Q8_0_BLOCK * (2 + Q8_0_BLOCK),
        }
    }
}

/// As `quantize_row_q8_0_ref` of ggml: scale = largest magnitude / 127, rounded half away from zero.
fn quantise_q8_0(data: &[f32], into: &mut Vec<u8>) {
    assert_eq!(data.len() % Q8_0_BLOCK, 0, "rows are multiples of {Q8_0_BLOCK}");
    for block in data.chunks_exact(Q8_0_BLOCK) {
        let largest = block.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let scale = largest / 127.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        into.extend(f16::from_f32(scale).to_le_bytes());
        into.extend(block.iter().map(|x| ((x * inverse).round() as i8).cast_unsigned()));
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
