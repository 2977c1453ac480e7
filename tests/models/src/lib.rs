//! Which models do tests and benchmarks run, when no model may be fetched?
//!
//! Files in the shape of real models, with weights that follow from a seed: their words mean nothing, their
//! arithmetic, memory and speed are those of the model whose shape they have. Both agentd and llama-server load them.
//!
//! Owns:  a folder of the build cache, `seeded-models/<digest of the recipe>/`. Nothing here is committed.
//! Out:   [`ensure`]: the file of a [`Shape`] in a [`Layout`].
//! True:  the same recipe gives the same bytes on every machine: whole numbers, one multiplication and the
//!        conversion to 16-bit floats, no library of mathematics. Greedy answers neither end by chance (rows of the
//!        tokens that end one are small) nor are they one token again and again (the layers outweigh the tied
//!        embedding). A text of [`words`] has one token for each word.
#![forbid(unsafe_code)]

mod blocks;
mod file;
mod vocabulary;
mod weights;

pub use vocabulary::{CHAT_TEMPLATE, words};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Everything that decides the bytes. A change of any of these files makes the models anew.
const RECIPE: [&str; 5] = [
    include_str!("lib.rs"),
    include_str!("blocks.rs"),
    include_str!("file.rs"),
    include_str!("vocabulary.rs"),
    include_str!("weights.rs"),
];

/// A model of the architecture `qwen2`, with its token embedding as output too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub name: &'static str,
    pub layers: usize,
    pub width: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub feed_forward: usize,
    pub vocabulary: usize,
    pub context_tokens: u32,
    pub seed: u64,
    /// Its layers add nothing, so that it says its last token for ever: at the same cost as any other, what it says next
    /// can be known.
    pub repeats: bool,
}

impl Shape {
    /// The same shape, under this name, of a model that repeats itself.
    pub const fn repeating(self, name: &'static str) -> Self {
        Self { name, repeats: true, ..self }
    }
}

/// Qwen2.5-0.5B. Source: its `config.json` (`hidden_size` 896, `num_hidden_layers` 24, `num_attention_heads` 14,
/// `num_key_value_heads` 2, `intermediate_size` 4864, `vocab_size` 151,936, `tie_word_embeddings`).
pub const QWEN_HALF_BILLION: Shape = Shape {
    name: "qwen2.5-0.5b",
    layers: 24,
    width: 896,
    heads: 14,
    kv_heads: 2,
    feed_forward: 4864,
    vocabulary: 151_936,
    context_tokens: 32_768,
    seed: 0x7177_656e_3035_6221,
    repeats: false,
};

/// Five million weights: reads some thousand tokens a second on one core, for tests of every change.
pub const SMALL: Shape = Shape {
    name: "small",
    layers: 4,
    width: 256,
    heads: 4,
    kv_heads: 2,
    feed_forward: 1024,
    vocabulary: 4096,
    context_tokens: 8192,
    seed: 0x736d_616c_6c21_2121,
    repeats: false,
};

/// Which types the tensors have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// All matrices in Q8_0.
    Q8_0,
    /// llama.cpp's mix: Q4_K, and Q6_K where more bits pay; Q5_0 and Q8_0 for rows that 256 does not divide.
    Q4KM,
}

impl Layout {
    /// As in the names of files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q8_0 => "q8_0",
            Self::Q4KM => "q4_k_m",
        }
    }
}

/// The file below `cache`; made when it is missing, which takes seconds.
///
/// # Errors
/// The cache cannot be written.
pub fn ensure(cache: &Path, shape: &Shape, layout: Layout) -> Result<PathBuf> {
    let folder = cache.join("seeded-models").join(digest(shape));
    let path = folder.join(format!("{}.{}.gguf", shape.name, layout.name()));
    if path.exists() {
        return Ok(path);
    }
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    // Of this process alone: two that make the same file at once do not meet.
    let partial = path.with_extension(format!("partial-{}", std::process::id()));
    let mut file =
        BufWriter::new(File::create(&partial).with_context(|| format!("creating {}", partial.display()))?);
    weights::write(shape, layout, &mut file)
        .and_then(|()| file.flush())
        .with_context(|| format!("writing {}", partial.display()))?;
    fs::rename(&partial, &path).with_context(|| format!("renaming to {}", path.display()))?;
    Ok(path)
}

/// The cache of this machine, as `image` finds it: `AGENTD_CACHE`, or a folder of the user.
///
/// # Errors
/// Neither `AGENTD_CACHE` nor `HOME` is set.
pub fn cache() -> Result<PathBuf> {
    if let Some(cache) = std::env::var_os("AGENTD_CACHE") {
        return Ok(cache.into());
    }
    let home = std::env::var_os("HOME").context("neither AGENTD_CACHE nor HOME is set")?;
    Ok(Path::new(&home).join(".cache/agentd-os"))
}

fn digest(shape: &Shape) -> String {
    let mut digest = Sha256::new();
    for part in RECIPE {
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    }
    digest.update(format!("{shape:?}"));
    let mut name = hex::encode(digest.finalize());
    name.truncate(16);
    name
}

/// splitmix64. Source: Steele, Lea and Flood 2014.
#[derive(Debug, Clone)]
pub struct Dice(pub u64);

impl Dice {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// From 0 up to, not including, 1.
    pub fn share(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_small_shape_is_the_same_every_time_and_passes_agentds_check() {
        for layout in [Layout::Q8_0, Layout::Q4KM] {
            let (mut once, mut again) = (Vec::new(), Vec::new());
            weights::write(&SMALL, layout, &mut once).unwrap();
            weights::write(&SMALL, layout, &mut again).unwrap();
            assert!(once == again, "two writings differ");
            let summary = agentd_domain::gguf::check_slice(&once).unwrap();
            assert_eq!(summary.architecture, "qwen2");
            assert_eq!(summary.vocabulary, SMALL.vocabulary as u64);
            assert_eq!(summary.context_length, Some(SMALL.context_tokens.into()));
            assert_eq!(summary.chat_template.as_deref(), Some(CHAT_TEMPLATE));
        }
    }

    #[test]
    fn a_file_is_made_once() {
        let cache = tempfile::tempdir().unwrap();
        let path = ensure(cache.path(), &SMALL, Layout::Q4KM).unwrap();
        let made = fs::metadata(&path).unwrap().modified().unwrap();
        assert_eq!(ensure(cache.path(), &SMALL, Layout::Q4KM).unwrap(), path);
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), made);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no half file is left");
    }
}
