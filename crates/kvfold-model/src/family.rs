//! The families of models that are one architecture with different parts left out, and how Hugging Face names them.
//!
//! All are Llama's block: norm, grouped-query attention with RoPE, norm, gated MLP. Qwen2 adds biases to queries, keys and
//! values; Qwen3 a norm to each head's queries and keys; Mistral a window that attention does not see beyond. What they
//! assume where `config.json` is silent differs too.

/// A family of models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// Llama 2, 3 and what follows their architecture, such as SmolLM2.
    Llama,
    /// Mistral.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on queries, keys and values.
    Qwen2,
    /// Qwen3: norms on the queries and keys of each head.
    Qwen3,
}

/// What a field of `config.json` means to Hugging Face where it is absent.
pub(crate) struct Defaults {
    pub(crate) max_position_embeddings: usize,
    /// `None` for as many as query heads.
    pub(crate) num_key_value_heads: Option<usize>,
    /// `None` for the hidden size shared out among the query heads.
    pub(crate) head_dim: Option<usize>,
    pub(crate) bos_token_id: Option<u32>,
    pub(crate) eos_token_id: Option<u32>,
    pub(crate) sliding_window: Option<usize>,
}

impl Family {
    /// Every family, the one that the others vary first.
    pub const ALL: [Family; 4] = [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3];

    /// The name in `architectures` of a plain model.
    pub fn architecture(self) -> &'static str {
        match self {
            Family::Llama => "LlamaForCausalLM",
            Family::Mistral => "MistralForCausalLM",
            Family::Qwen2 => "Qwen2ForCausalLM",
            Family::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// The name in `architectures` of a model that this program has retrofitted.
    pub fn retrofitted_architecture(self) -> &'static str {
        match self {
            Family::Llama => "KvfoldLlamaForCausalLM",
            Family::Mistral => "KvfoldMistralForCausalLM",
            Family::Qwen2 => "KvfoldQwen2ForCausalLM",
            Family::Qwen3 => "KvfoldQwen3ForCausalLM",
        }
    }

    /// The `model_type` of a plain model.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
        }
    }

    /// The `model_type` of a model that this program has retrofitted.
    pub fn retrofitted_model_type(self) -> &'static str {
        match self {
            Family::Llama => "kvfold_llama",
            Family::Mistral => "kvfold_mistral",
            Family::Qwen2 => "kvfold_qwen2",
            Family::Qwen3 => "kvfold_qwen3",
        }
    }

    pub(crate) fn defaults(self) -> Defaults {
        let llama = Defaults {
            max_position_embeddings: 2048,
            num_key_value_heads: None,
            head_dim: None,
            bos_token_id: Some(1),
            eos_token_id: Some(2),
            sliding_window: None,
        };
        let qwen = Defaults {
            max_position_embeddings: 32768,
            num_key_value_heads: Some(32),
            bos_token_id: None,
            eos_token_id: None,
            sliding_window: Some(4096),
            ..llama
        };
        match self {
            Family::Llama => llama,
            Family::Mistral => Defaults {
                max_position_embeddings: 131_072,
                num_key_value_heads: Some(8),
                sliding_window: Some(4096),
                ..llama
            },
            Family::Qwen2 => qwen,
            Family::Qwen3 => Defaults { head_dim: Some(128), ..qwen },
        }
    }
}
