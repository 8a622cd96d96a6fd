//! What a DMC model is, in numbers: the settings that training, prefill and decode must share.
//!
//! A model that was trained with one set of these and run with another diverges silently, so they travel with the
//! weights (in the `kvfold` section of `config.json`) and every code path reads this one struct.

use serde::{Deserialize, Serialize};

/// How a model compresses its cache (spec sections 1 and 2).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dmc {
    /// Where the decision and the importance of a token come from.
    pub decision: Decision,
    /// Tokens that stay exact in a ring before their decision is carried out; 0 folds at once (the paper).
    pub delay: usize,
    /// A slot is the mean of at most this many newest tokens of its segment; `None` averages the whole segment.
    pub pool_window: Option<usize>,
    /// Adds the log of a slot's mass (the sum of its tokens' importances) to its attention score.
    pub log_mass: bool,
    /// Whether the KV heads of a layer decide alone or together.
    pub share: Share,
}

/// Where the decision logit and the importance come from.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "source", deny_unknown_fields)]
pub enum Decision {
    /// The last channel of each key and query, freed for this purpose (the paper).
    Borrowed {
        /// Factor on the channel before the offset is subtracted; 1 in the paper.
        scale: f64,
        /// Subtracted from the decision logit and added to the importance logit; 5 in the paper.
        offset: f64,
    },
    /// A zero-initialised linear per layer, `hidden -> 2 x KV heads`, on the normed input of the attention block.
    Head {
        /// Factor on the linear's outputs, a multiplier of its learning rate.
        scale: f64,
        /// Subtracted from the decision logit.
        offset: f64,
    },
}

/// Whether the KV heads of a layer take their append-or-fold decision alone or together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Share {
    /// Every KV head decides for itself.
    #[default]
    Head,
    /// The mean logit of the layer's KV heads decides for all of them.
    Layer,
}
