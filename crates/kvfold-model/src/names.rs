//! What Hugging Face calls the weights of a Llama, and which shape each has.
//!
//! A linear layer's weight is `[out, in]`: row `i` holds what makes output `i`. This is the only place where the names are
//! spelled, and [`expected`] the only list; the loader checks against it and the forward pass uploads by it.

use kvfold_kernels::dmc::Decision;

use crate::Config;

/// The embedding, `[V, C]`; also the output head if the two are tied.
pub const EMBED: &str = "model.embed_tokens.weight";

/// The gain of the last norm, `[C]`.
pub const NORM: &str = "model.norm.weight";

/// The output head, `[V, C]`; absent if it is tied to the embedding.
pub const LM_HEAD: &str = "lm_head.weight";

/// The gain of the norm before the attention, `[C]`.
pub const INPUT_NORM: &str = "input_layernorm";

/// Queries, `[H*D, C]`.
pub const Q_PROJ: &str = "self_attn.q_proj";

/// Keys, `[G*D, C]`.
pub const K_PROJ: &str = "self_attn.k_proj";

/// Values, `[G*D, C]`.
pub const V_PROJ: &str = "self_attn.v_proj";

/// The heads' outputs back to the residual stream, `[C, H*D]`.
pub const O_PROJ: &str = "self_attn.o_proj";

/// Decision and importance logits of each KV head, `[2*G, C]`; ours, in models whose decisions have a head of their own.
pub const DECIDE_PROJ: &str = "self_attn.decide_proj";

/// The gain of the norm before the MLP, `[C]`.
pub const POST_ATTENTION_NORM: &str = "post_attention_layernorm";

/// The MLP's gate, `[I, C]`.
pub const GATE_PROJ: &str = "mlp.gate_proj";

/// What the gate lets through, `[I, C]`.
pub const UP_PROJ: &str = "mlp.up_proj";

/// The MLP's output, `[C, I]`.
pub const DOWN_PROJ: &str = "mlp.down_proj";

/// The name of a weight of layer `index`, such as `model.layers.3.self_attn.q_proj.weight` for [`Q_PROJ`].
pub fn layer(index: usize, part: &str) -> String {
    format!("model.layers.{index}.{part}.weight")
}

/// Every tensor that a model of this configuration has, in the order of the walk through it, with its shape.
pub fn expected(config: &Config) -> Vec<(String, Vec<usize>)> {
    let (hidden, mlp) = (config.hidden_size, config.intermediate_size);
    let (queries, kv) = (config.query_width(), config.kv_width());

    let mut parts = vec![
        (INPUT_NORM, vec![hidden]),
        (Q_PROJ, vec![queries, hidden]),
        (K_PROJ, vec![kv, hidden]),
        (V_PROJ, vec![kv, hidden]),
        (O_PROJ, vec![hidden, queries]),
        (POST_ATTENTION_NORM, vec![hidden]),
        (GATE_PROJ, vec![mlp, hidden]),
        (UP_PROJ, vec![mlp, hidden]),
        (DOWN_PROJ, vec![hidden, mlp]),
    ];
    let decision = config.compression.as_ref().map(|compression| compression.dmc.decision);
    if let Some(Decision::Head { .. }) = decision {
        parts.push((DECIDE_PROJ, vec![2 * config.num_key_value_heads, hidden]));
    }

    let mut all = vec![(EMBED.to_string(), vec![config.vocab_size, hidden])];
    for index in 0..config.num_hidden_layers {
        all.extend(parts.iter().map(|(part, shape)| (layer(index, part), shape.clone())));
    }
    all.push((NORM.to_string(), vec![hidden]));
    if !config.tie_word_embeddings {
        all.push((LM_HEAD.to_string(), vec![config.vocab_size, hidden]));
    }
    all
}
