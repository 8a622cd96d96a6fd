//! The numbers of a model that its forward pass needs.

use crate::Config;
use crate::rope::Rope;
use crate::weights::Weights;
use kvfold_kernels::ops::Heads;

/// Sizes and constants of a Llama-family model.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// Decoder blocks L.
    pub layers: usize,
    /// Channels of the residual stream C.
    pub hidden: usize,
    /// Channels of the feed-forward layer F.
    pub intermediate: usize,
    /// Query heads H, KV heads G, head dim D.
    pub heads: Heads,
    /// Tokens of the vocabulary V.
    pub vocab: usize,
    /// Longest sequence.
    pub context: usize,
    /// Added to the mean square in norms.
    pub norm_eps: f64,
    /// Rotary frequencies.
    pub rope: Rope,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether attention's output projection has a bias.
    pub o_bias: bool,
    /// Whether the queries and keys of each head are normed.
    pub qk_norm: bool,
    /// Whether the embeddings also make the logits.
    pub tied: bool,
    /// Outputs of each block's decision head; 0 without one.
    pub decide_outputs: usize,
    /// Whether decision heads have biases.
    pub decide_bias: bool,
    /// Whether decisions are also read from the token before.
    pub decide_ahead: bool,
}

impl Shape {
    /// The sizes that a configuration states.
    pub fn of(config: &Config) -> Self {
        let kv = config.num_key_value_heads;
        Self {
            layers: config.num_hidden_layers,
            hidden: config.hidden_size,
            intermediate: config.intermediate_size,
            heads: Heads { query: config.num_attention_heads, kv, dim: config.head_dim },
            vocab: config.vocab_size,
            context: config.max_position_embeddings,
            norm_eps: config.rms_norm_eps,
            rope: config.rope,
            qkv_bias: config.qkv_bias,
            o_bias: config.o_bias,
            qk_norm: config.qk_norm,
            tied: config.tie_word_embeddings,
            decide_outputs: config.compression.as_ref().map_or(0, |c| c.dmc.decide_outputs(kv)),
            decide_bias: config.compression.as_ref().is_some_and(|c| c.dmc.decide_bias()),
            decide_ahead: config.compression.as_ref().is_some_and(|c| c.dmc.decide_ahead()),
        }
    }

    /// Rotary frequencies, radians per token for each of the D/2 pairs.
    pub fn inv_freq(&self) -> Vec<f64> {
        self.rope.inv_freq(self.heads.dim)
    }

    /// Parameters of the model.
    pub fn parameters(&self) -> usize {
        let expected = Weights::<()>::expected(self);
        expected.iter().map(|(_, dims)| dims.iter().product::<usize>()).sum()
    }
}
