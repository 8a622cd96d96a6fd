//! What Hugging Face calls the weights of a model, and which shape each has.
//!
//! A linear layer's weight is `[out, in]`: row `i` holds what makes output `i`. This is the only place where the names are
//! spelled; [`Weights::build`](crate::weights::Weights::build) is the only list, and the loader, the forward pass and the
//! trainer all go by it.

use kvfold_kernels::ops::Precision;

/// The embedding, `[V, C]`; also the output head if the two are tied.
pub const EMBED: &str = "model.embed_tokens.weight";

/// The gain of the last norm, `[C]`.
pub const NORM: &str = "model.norm.weight";

/// The output head, `[V, C]`; absent if it is tied to the embedding.
pub const LM_HEAD: &str = "lm_head.weight";

/// The gain of the norm before the attention, `[C]`.
pub const INPUT_NORM: &str = "input_layernorm.weight";

/// Queries, `[H*D, C]`.
pub const Q_PROJ: &str = "self_attn.q_proj.weight";

/// Keys, `[G*D, C]`.
pub const K_PROJ: &str = "self_attn.k_proj.weight";

/// Values, `[G*D, C]`.
pub const V_PROJ: &str = "self_attn.v_proj.weight";

/// Added to the queries, `[H*D]`; in Qwen2 and in models with `attention_bias`.
pub const Q_BIAS: &str = "self_attn.q_proj.bias";

/// Added to the keys, `[G*D]`.
pub const K_BIAS: &str = "self_attn.k_proj.bias";

/// Added to the values, `[G*D]`.
pub const V_BIAS: &str = "self_attn.v_proj.bias";

/// The gain of the norm of each head's queries, `[D]`; in Qwen3.
pub const Q_NORM: &str = "self_attn.q_norm.weight";

/// The gain of the norm of each head's keys, `[D]`; in Qwen3.
pub const K_NORM: &str = "self_attn.k_norm.weight";

/// The heads' outputs back to the residual stream, `[C, H*D]`.
pub const O_PROJ: &str = "self_attn.o_proj.weight";

/// Added to attention's output, `[C]`; in models with `attention_bias`.
pub const O_BIAS: &str = "self_attn.o_proj.bias";

/// Decision and importance logits of each KV head, `[2*G, C]`, in DMS `[G, C]`; ours, in models whose decisions have a
/// head of their own.
pub const DECIDE_PROJ: &str = "self_attn.decide_proj.weight";

/// Added to the decision head's outputs, `[2*G]`, in DMS `[G]`; in models whose decisions say so.
pub const DECIDE_BIAS: &str = "self_attn.decide_proj.bias";

/// What each token adds to the decision logits of the next, `[G, C]`; in models whose decisions say so.
pub const DECIDE_AHEAD: &str = "self_attn.decide_proj.ahead";

/// What the names of a decision head's weights have in common.
pub const DECIDE: &str = "self_attn.decide_proj.";

/// The gain of the norm before the MLP, `[C]`.
pub const POST_ATTENTION_NORM: &str = "post_attention_layernorm.weight";

/// The MLP's gate, `[I, C]`.
pub const GATE_PROJ: &str = "mlp.gate_proj.weight";

/// What the gate lets through, `[I, C]`.
pub const UP_PROJ: &str = "mlp.up_proj.weight";

/// The MLP's output, `[C, I]`.
pub const DOWN_PROJ: &str = "mlp.down_proj.weight";

/// The precision in which a weight is multiplied when the model's is `precision`: norms are not multiplied by, and a
/// decision is a threshold, so its logit is worth more bits.
pub fn precision(name: &str, dims: &[usize], precision: Precision) -> Precision {
    if dims.len() < 2 || name.contains(DECIDE) { Precision::F32 } else { precision }
}

/// The name of a weight of layer `index`, such as `model.layers.3.self_attn.q_proj.weight` for [`Q_PROJ`].
pub fn layer(index: usize, part: &str) -> String {
    format!("model.layers.{index}.{part}")
}
