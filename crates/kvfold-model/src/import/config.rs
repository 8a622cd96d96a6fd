//! From the keys of a GGUF file to `config.json`.

use serde_json::{Value, json};

use super::metadata::Metadata;
use super::tokenizer::special_id;
use crate::error::Result;
use crate::family::Family;
use crate::rope::{Rope, Scaling};

/// What the tensors of a file say of its configuration.
pub(super) struct Tensors {
    pub(super) vocab_size: usize,
    pub(super) tied: bool,
    /// Whether attention's projections have biases.
    pub(super) biases: bool,
    /// What each rotary frequency is divided by.
    pub(super) rope_factors: Option<Vec<f32>>,
}

/// The tensor of [`Tensors::rope_factors`].
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The family of a file, by its architecture. Mistral's is Llama's.
pub(super) fn family(metadata: &Metadata) -> Result<Family> {
    const ARCHITECTURE: &str = "general.architecture";
    match metadata.text(ARCHITECTURE)? {
        Some("llama") => Ok(Family::Llama),
        Some("qwen2") => Ok(Family::Qwen2),
        Some("qwen3") => Ok(Family::Qwen3),
        Some(_) => Err(metadata.unsupported(ARCHITECTURE, "dense models of \"llama\", \"qwen2\" and \"qwen3\" are")),
        None => Err(metadata.wrong(ARCHITECTURE, "\"llama\", \"qwen2\" or \"qwen3\"")),
    }
}

/// The configuration, without the dtype of the weights.
pub(super) fn json(metadata: &Metadata, family: Family, tensors: &Tensors) -> Result<Value> {
    let key = |name: &str| format!("{}.{name}", family.model_type());
    let need = |name: &str| metadata.need(&key(name));
    refuse_what_is_not_computed(metadata, key)?;

    let (hidden, heads) = (need("embedding_length")?, need("attention.head_count")?);
    let head_dim = match metadata.integer(&key("attention.key_length"))? {
        Some(dim) => dim,
        None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let expected = format!("a divisor of `{}`, {hidden}, as there is no key_length", key("embedding_length"));
            return Err(metadata.wrong(&key("attention.head_count"), expected));
        }
    };
    let all_channels = format!("only heads whose channels are all rotated, {head_dim}, are");
    for key in [key("rope.dimension_count"), key("attention.value_length")] {
        if metadata.integer(&key)?.is_some_and(|dim| dim != head_dim) {
            return Err(metadata.unsupported(&key, all_channels));
        }
    }
    let eps = key("attention.layer_norm_rms_epsilon");
    let eps = metadata.number(&eps)?.ok_or_else(|| metadata.wrong(&eps, "a number"))?;
    let theta = metadata.number(&key("rope.freq_base"))?.unwrap_or(10000.0);
    let scaling = match &tensors.rope_factors {
        Some(factors) => from_factors(metadata, factors, theta)?,
        None => rope_scaling(metadata, key)?,
    };

    let mut eos: Vec<u32> = Vec::new();
    for name in ["eos", "eot"] {
        eos.extend(special_id(metadata, name)?.filter(|id| !eos.contains(id)));
    }
    Ok(json!({
        "architectures": [family.architecture()],
        "model_type": family.model_type(),
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length")?,
        "num_hidden_layers": need("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer(&key("attention.head_count_kv"))?.unwrap_or(heads),
        "head_dim": head_dim,
        "vocab_size": tensors.vocab_size,
        "max_position_embeddings": need("context_length")?,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rms_norm_eps": eps,
        "hidden_act": "silu",
        "attention_bias": tensors.biases,
        "mlp_bias": false,
        "tie_word_embeddings": tensors.tied,
        "bos_token_id": special_id(metadata, "bos")?,
        "eos_token_id": match eos[..] { [] => Value::Null, [id] => json!(id), _ => json!(eos) },
    }))
}

/// `rope_scaling` from the metadata, as llama.cpp reads it: linear unless another kind is named.
fn rope_scaling(metadata: &Metadata, key: impl Fn(&str) -> String) -> Result<Value> {
    let number = |name: &str| metadata.number(&key(name));
    let kind = key("rope.scaling.type");
    let factor = match number("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => number("rope.scale_linear")?,
    };
    let factor = factor.filter(|&factor| factor != 0.0 && factor != 1.0);
    match (metadata.text(&kind)?, factor) {
        (Some("none"), _) | (None | Some("linear"), None) => Ok(Value::Null),
        (None | Some("linear"), Some(factor)) => Ok(json!({ "rope_type": "linear", "factor": factor })),
        (Some("yarn"), factor) => {
            let as_usual = [
                ("rope.scaling.attn_factor", 1.0),
                ("rope.scaling.yarn_ext_factor", 1.0),
                ("rope.scaling.yarn_attn_factor", 1.0),
                ("rope.scaling.yarn_log_multiplier", 0.0),
            ];
            for (name, usual) in as_usual {
                if number(name)?.is_some_and(|x| x != usual) {
                    return Err(metadata.unsupported(&key(name), format!("only YaRN's own, {usual}, is")));
                }
            }
            Ok(json!({
                "rope_type": "yarn",
                "factor": factor.unwrap_or(1.0),
                "original_max_position_embeddings": metadata.need(&key("rope.scaling.original_context_length"))?,
                "beta_fast": number("rope.scaling.yarn_beta_fast")?,
                "beta_slow": number("rope.scaling.yarn_beta_slow")?,
            }))
        }
        _ => Err(metadata.unsupported(&kind, "\"none\", \"linear\" and \"yarn\" are")),
    }
}

/// `rope_scaling` from what each frequency is divided by, which is all that a file says of Llama 3.1's scaling.
///
/// The largest factor is the scaling's own. Between the frequencies that are divided by it and those that are kept, the
/// factors follow from the original length, given that 1 and 4 turns are the bounds, as in all of Meta's models. So one of
/// them gives the length, and all of them must agree.
fn from_factors(metadata: &Metadata, factors: &[f32], theta: f64) -> Result<Value> {
    const BOUNDS: (f64, f64) = (1.0, 4.0);
    let factors: Vec<f64> = factors.iter().map(|&factor| f64::from(factor)).collect();
    let plain = Rope::plain(theta).inv_freq(2 * factors.len());
    let factor = factors.iter().copied().fold(1.0, f64::max);
    if factors.iter().all(|&x| x == 1.0) {
        return Ok(Value::Null);
    }
    let (low, high) = BOUNDS;
    let between = factors.iter().zip(&plain).find(|(x, _)| **x > 1.0 + 1e-6 && **x < factor * (1.0 - 1e-6));
    let llama3 = between.map(|(x, f)| {
        let keep = (1.0 / x - 1.0 / factor) / (1.0 - 1.0 / factor);
        let turns = low + keep * (high - low);
        let original = (turns * 2.0 * std::f64::consts::PI / f).round() as usize;
        Scaling::Llama3 { factor, low, high, original }
    });
    if let Some(scaling @ Scaling::Llama3 { original, .. }) = llama3 {
        let scaled = Rope { theta, scaling }.inv_freq(2 * factors.len());
        let same = |((x, plain), scaled): ((&f64, &f64), &f64)| (plain / scaled / x - 1.0).abs() < 1e-4;
        if factors.iter().zip(&plain).zip(&scaled).all(same) {
            return Ok(json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }));
        }
    }
    let first: Vec<f64> = factors.iter().copied().take(8).collect();
    Err(crate::ModelError::Unsupported {
        file: metadata.file.into(),
        field: ROPE_FACTORS.into(),
        found: format!("{first:?} and so on"),
        reason: "only factors that follow from Llama 3.1's scaling are".into(),
    })
}

/// Keys that would change the numbers if they were passed over.
fn refuse_what_is_not_computed(metadata: &Metadata, key: impl Fn(&str) -> String) -> Result<()> {
    let experts = key("expert_count");
    if metadata.integer(&experts)?.is_some_and(|count| count > 0) {
        return Err(metadata.unsupported(&experts, "only dense models are, without experts"));
    }
    for name in ["attention.scale", "attention.clamp_kqv", "logit_scale", "residual_scale"] {
        if metadata.get(&key(name)).is_some() {
            return Err(metadata.unsupported(&key(name), "a plain model has no such factor"));
        }
    }
    let window = key("attention.sliding_window");
    let context = metadata.need(&key("context_length"))?;
    if metadata.integer(&window)?.is_some_and(|window| window > 0 && window < context) {
        return Err(metadata.unsupported(&window, format!("all {context} tokens of the context attend to each other")));
    }
    Ok(())
}
