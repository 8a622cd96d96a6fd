//! Models in other formats, turned into the Hugging Face layout.
//!
//! A GGUF file of a dense model holds what a model directory holds, in other words: metadata instead of `config.json`,
//! tensors under names of their own, a Llama's rows of queries and keys in the order of interleaved RoPE pairs, a vocabulary
//! instead of `tokenizer.json`. Each part is translated by a module of this one, and what comes out is a [`Checkpoint`]
//! that has passed the same checks as one that was opened. `megatron` does the same for checkpoints of Megatron-LM, those
//! of DMC's authors among them.
//!
//! As everywhere in this crate, what would change the numbers if it were passed over is refused: another architecture,
//! experts, a scaling of RoPE that is not computed, tensors without a place, a pre-tokenizer that was not proven equal.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use kvfold_tensor::gguf::{Gguf, Kind};
use kvfold_tensor::{DType, HostTensor};
use serde_json::Value;

use crate::error::{ModelError, Result};
use crate::names;
use crate::shape::Shape;
use crate::weights::Weights;
use crate::{Checkpoint, Config, Family, Tokenizer};

mod config;
mod megatron;
mod metadata;
mod tokenizer;

pub use megatron::megatron;
use metadata::Metadata;

/// A model that came from another format.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The model.
    pub checkpoint: Checkpoint,
    /// The element type its weights have now.
    pub dtype: DType,
    /// How they were stored: the names of the types and how many tensors had each.
    pub kinds: BTreeMap<String, usize>,
    /// The model's name, if the file gives one.
    pub name: Option<String>,
    /// Its licence, if the file gives one.
    pub license: Option<String>,
    /// The files that it was read from.
    pub files: Vec<PathBuf>,
}

/// Reads the GGUF file at `path`.
///
/// Without a `dtype`, weights keep the float type they are stored in, so that nothing is lost; quantised ones become `BF16`,
/// whose rounding (2^-9 of a weight) is far below the steps of four to eight bits, at half the size of `F32`.
pub fn gguf(path: &Path, dtype: Option<DType>) -> Result<Imported> {
    let mut source = Gguf::open(path)?;
    let file = source.file().to_string();
    let scaled = source.tensors().contains_key(config::ROPE_FACTORS);
    let rope_factors = scaled.then(|| source.tensor(config::ROPE_FACTORS)).transpose()?.map(|tensor| tensor.to_f32());
    let metadata = Metadata { file: &file, map: source.metadata() };
    metadata.whole()?;

    let family = config::family(&metadata)?;
    let has = |tensor: &str| source.tensors().contains_key(tensor);
    let vocab = source.tensors().get("token_embd.weight");
    let stated = config::Tensors {
        vocab_size: vocab.and_then(|info| info.shape.first()).copied().unwrap_or(0),
        tied: !has("output.weight"),
        biases: has("blk.0.attn_q.bias") && family != Family::Qwen2,
        rope_factors,
    };
    let config = config::json(&metadata, family, &stated)?;
    let mut config = match config {
        Value::Object(map) => map,
        _ => unreachable!("the configuration is written as an object"),
    };

    let kinds: Vec<Kind> = source.tensors().values().map(|info| info.kind).collect();
    let matrices = source.tensors().values().filter(|info| info.shape.len() > 1).map(|info| info.kind);
    let dtype = dtype.unwrap_or_else(|| natural(matrices));
    let torch = match dtype {
        DType::F64 => "float64",
        DType::F32 => "float32",
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
    };
    config.insert("torch_dtype".into(), torch.into());
    let label = format!("{file}: as config.json");
    let config = Config::parse(Value::Object(config).to_string().as_bytes(), &label)?;

    let label = format!("{file}: as tokenizer.json");
    let vocabulary = tokenizer::Vocabulary::read(&metadata)?;
    let tokenizer = Tokenizer::from_json(vocabulary.tokenizer_json(&metadata)?.to_string().as_bytes(), &label)?;
    tokenizer.check_vocabulary(config.vocab_size, &label)?;
    let mut companion = vocabulary.tokenizer_config(&metadata, config.max_position_embeddings)?.into_bytes();
    companion.push(b'\n');
    let text = |key| metadata.text(key).map(|text| text.map(str::to_owned));
    let (name, license) = (text("general.name")?, text("general.license")?);

    let plan = plan(&source, family, &Shape::of(&config))?;
    let mut tensors = BTreeMap::new();
    for Planned { theirs, ours, rotated } in plan {
        let mut tensor = source.tensor(&theirs)?;
        if let Some(head_dim) = rotated {
            tensor = half_rotation(&tensor, head_dim);
        }
        let tensor = tensor.to_dtype(dtype);
        crate::checkpoint::check(&tensor, &theirs, tensor.shape(), &file)?;
        tensors.insert(ours, tensor);
    }
    let mut counts = BTreeMap::new();
    for kind in kinds {
        *counts.entry(kind.to_string()).or_insert(0) += 1;
    }
    let companions = BTreeMap::from([("tokenizer_config.json".to_string(), companion)]);
    let checkpoint = Checkpoint { config, tensors, tokenizer, companions, ignored: Vec::new(), source: file };
    Ok(Imported { checkpoint, dtype, kinds: counts, name, license, files: vec![path.to_path_buf()] })
}

/// The dtype that loses nothing of float weights, and nothing that matters of quantised ones.
fn natural(kinds: impl Iterator<Item = Kind>) -> DType {
    let mut dtypes: BTreeSet<&str> = BTreeSet::new();
    for kind in kinds {
        dtypes.insert(match kind {
            Kind::F32 => "F32",
            Kind::F16 => "F16",
            Kind::BF16 => "BF16",
            _ => return DType::BF16,
        });
    }
    match dtypes.into_iter().collect::<Vec<_>>()[..] {
        ["F16"] => DType::F16,
        ["BF16"] => DType::BF16,
        _ => DType::F32,
    }
}

/// A tensor to be read.
struct Planned {
    theirs: String,
    ours: String,
    /// The head dimension, if its rows are in the order of interleaved pairs.
    rotated: Option<usize>,
}

/// Which tensor becomes which weight. Shapes are compared before anything is read, and nothing may be left over.
fn plan(source: &Gguf, family: Family, shape: &Shape) -> Result<Vec<Planned>> {
    let file = || source.file().to_string();
    let mut left: BTreeSet<&String> = source.tensors().keys().filter(|name| *name != config::ROPE_FACTORS).collect();
    let mut plan = Vec::new();
    for (ours, expected) in Weights::<()>::expected(shape) {
        let (theirs, rotated) = translate(&ours);
        let Some(info) = source.tensors().get(&theirs) else {
            return Err(ModelError::MissingTensor { file: file(), tensor: theirs, expected });
        };
        if info.shape != expected {
            let found = info.shape.clone();
            return Err(ModelError::Shape { file: file(), tensor: theirs, found, expected });
        }
        left.remove(&theirs);
        let rotated = rotated && family == Family::Llama;
        plan.push(Planned { theirs, ours, rotated: rotated.then_some(shape.heads.dim) });
    }
    match left.into_iter().next().cloned() {
        None => Ok(plan),
        Some(tensor) if tensor.ends_with(".bias") => Err(ModelError::NoPlace { file: file(), tensor }),
        Some(tensor) => Err(ModelError::UnknownTensor { file: file(), tensor }),
    }
}

/// GGUF's name for a weight of ours, and whether its rows are queries' or keys', which a Llama's file has in the order of
/// interleaved pairs.
fn translate(ours: &str) -> (String, bool) {
    const PARTS: [(&str, &str); 15] = [
        (names::INPUT_NORM, "attn_norm.weight"),
        (names::Q_PROJ, "attn_q.weight"),
        (names::K_PROJ, "attn_k.weight"),
        (names::V_PROJ, "attn_v.weight"),
        (names::Q_BIAS, "attn_q.bias"),
        (names::K_BIAS, "attn_k.bias"),
        (names::V_BIAS, "attn_v.bias"),
        (names::Q_NORM, "attn_q_norm.weight"),
        (names::K_NORM, "attn_k_norm.weight"),
        (names::O_PROJ, "attn_output.weight"),
        (names::O_BIAS, "attn_output.bias"),
        (names::POST_ATTENTION_NORM, "ffn_norm.weight"),
        (names::GATE_PROJ, "ffn_gate.weight"),
        (names::UP_PROJ, "ffn_up.weight"),
        (names::DOWN_PROJ, "ffn_down.weight"),
    ];
    match ours {
        names::EMBED => return ("token_embd.weight".into(), false),
        names::NORM => return ("output_norm.weight".into(), false),
        names::LM_HEAD => return ("output.weight".into(), false),
        _ => {}
    }
    let layer = ours.split('.').nth(2).and_then(|index| index.parse().ok()).unwrap_or(0);
    let part = PARTS.into_iter().find(|(part, _)| names::layer(layer, part) == ours);
    let (part, theirs) = part.expect("a plain model has no other weights");
    (format!("blk.{layer}.{theirs}"), [names::Q_PROJ, names::K_PROJ, names::Q_BIAS, names::K_BIAS].contains(&part))
}

/// Rows of each head from pairs (2i, 2i+1), which llama.cpp rotates, to halves (i, i + D/2), which Hugging Face does.
fn half_rotation(weight: &HostTensor, head_dim: usize) -> HostTensor {
    let mut out = HostTensor::zeros(weight.dtype(), weight.shape());
    let head_bytes = weight.bytes().len() / weight.shape()[0] * head_dim;
    let row_bytes = head_bytes / head_dim;
    let heads = weight.bytes().chunks_exact(head_bytes).zip(out.bytes_mut().chunks_exact_mut(head_bytes));
    for (from, to) in heads {
        for (i, row) in from.chunks_exact(row_bytes).enumerate() {
            let place = (i / 2 + i % 2 * (head_dim / 2)) * row_bytes;
            to[place..place + row_bytes].copy_from_slice(row);
        }
    }
    out
}

#[cfg(test)]
mod tests;
