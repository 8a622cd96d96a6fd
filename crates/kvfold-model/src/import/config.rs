//! From the keys of a GGUF file to `config.json`.

use serde_json::{Value, json};

use super::metadata::Metadata;
use super::tokenizer::special_id;
use crate::error::Result;
use crate::family::Family;

/// The configuration, without the dtype of the weights.
pub(super) fn json(metadata: &Metadata, vocab_size: usize, tied: bool) -> Result<Value> {
    const ARCHITECTURE: &str = "general.architecture";
    match metadata.text(ARCHITECTURE)? {
        Some("llama") => {}
        Some(_) => return Err(metadata.unsupported(ARCHITECTURE, "dense models of architecture \"llama\" are")),
        None => return Err(metadata.wrong(ARCHITECTURE, "\"llama\"")),
    }
    refuse_what_is_not_computed(metadata)?;

    let hidden = metadata.need("llama.embedding_length")?;
    let heads = metadata.need("llama.attention.head_count")?;
    let head_dim = match metadata.integer("llama.attention.key_length")? {
        Some(dim) => dim,
        None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let expected = format!("a divisor of `llama.embedding_length`, {hidden}, as there is no key_length");
            return Err(metadata.wrong("llama.attention.head_count", expected));
        }
    };
    let all_channels = format!("only heads whose channels are all rotated, {head_dim}, are");
    for key in ["llama.rope.dimension_count", "llama.attention.value_length"] {
        if metadata.integer(key)?.is_some_and(|dim| dim != head_dim) {
            return Err(metadata.unsupported(key, all_channels));
        }
    }
    const EPS: &str = "llama.attention.layer_norm_rms_epsilon";
    let eps = metadata.number(EPS)?.ok_or_else(|| metadata.wrong(EPS, "a number"))?;

    let mut eos: Vec<u32> = Vec::new();
    for name in ["eos", "eot"] {
        eos.extend(special_id(metadata, name)?.filter(|id| !eos.contains(id)));
    }
    Ok(json!({
        "architectures": [Family::Llama.architecture()],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": metadata.need("llama.feed_forward_length")?,
        "num_hidden_layers": metadata.need("llama.block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer("llama.attention.head_count_kv")?.unwrap_or(heads),
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": metadata.need("llama.context_length")?,
        "rope_theta": metadata.number("llama.rope.freq_base")?.unwrap_or(10000.0),
        "rms_norm_eps": eps,
        "hidden_act": "silu",
        "attention_bias": false,
        "mlp_bias": false,
        "tie_word_embeddings": tied,
        "bos_token_id": special_id(metadata, "bos")?,
        "eos_token_id": match eos[..] { [] => Value::Null, [id] => json!(id), _ => json!(eos) },
    }))
}

/// Keys that would change the numbers if they were passed over.
fn refuse_what_is_not_computed(metadata: &Metadata) -> Result<()> {
    const SCALING: &str = "llama.rope.scaling.type";
    if metadata.text(SCALING)?.is_some_and(|kind| kind != "none") {
        return Err(metadata.unsupported(SCALING, "only plain RoPE is computed, without scaling"));
    }
    const LINEAR: &str = "llama.rope.scale_linear";
    if metadata.number(LINEAR)?.is_some_and(|scale| scale != 1.0) {
        return Err(metadata.unsupported(LINEAR, "only plain RoPE is computed, without scaling"));
    }
    const EXPERTS: &str = "llama.expert_count";
    if metadata.integer(EXPERTS)?.is_some_and(|count| count > 0) {
        return Err(metadata.unsupported(EXPERTS, "only dense models are, without experts"));
    }
    for key in ["llama.attention.scale", "llama.attention.clamp_kqv", "llama.logit_scale", "llama.residual_scale"] {
        if metadata.get(key).is_some() {
            return Err(metadata.unsupported(key, "a plain Llama has no such factor"));
        }
    }
    const WINDOW: &str = "llama.attention.sliding_window";
    let context = metadata.need("llama.context_length")?;
    if metadata.integer(WINDOW)?.is_some_and(|window| window > 0 && window < context) {
        return Err(metadata.unsupported(WINDOW, format!("all {context} tokens of the context attend to each other")));
    }
    Ok(())
}
