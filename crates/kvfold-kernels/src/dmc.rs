//! How a model's cache stays small, in numbers: the settings that training, prefill and decode must share.
//!
//! Two methods have one form. Dynamic Memory Compression (DMC) folds a token into the newest slot, which holds the mean
//! of its tokens; Dynamic Memory Sparsification (DMS) lets the token replace what the slot holds, so the older one is
//! evicted. With a delay W both keep the newest W tokens and one more exact, DMS's window, and count slots alike.
//!
//! A model that was trained with one set of these and run with another diverges silently, so they travel with the
//! weights (in the `kvfold` section of `config.json`) and every code path reads this one struct.

use crate::ops::Exempt;
use serde::{Deserialize, Serialize};

/// What becomes of a token that does not get a slot of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Dynamic Memory Compression: it is averaged into the newest slot (spec sections 1 and 2).
    #[default]
    Dmc,
    /// Dynamic Memory Sparsification: it takes the newest slot, and what was there is evicted (spec section 5).
    Dms,
}

impl Method {
    /// Its name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Method::Dmc => "dmc",
            Method::Dms => "dms",
        }
    }
}

/// How a model compresses its cache (spec sections 1, 2 and 5).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dmc {
    /// What becomes of a token that does not get a slot of its own.
    pub method: Method,
    /// Where the decision and the importance of a token come from.
    pub decision: Decision,
    /// Tokens that stay exact in a ring before their decision is carried out; 0 folds at once (the DMC paper). DMS's
    /// window.
    pub delay: usize,
    /// First tokens of a sequence that keep slots of their own, whatever is decided: attention sinks. Models attend to them
    /// from everywhere and lose much when something is folded into them, or they are evicted.
    #[serde(default)]
    pub sinks: usize,
    /// A slot is the mean of at most this many newest tokens of its segment; `None` averages the whole segment. `None`
    /// in DMS, which averages nothing.
    pub pool_window: Option<usize>,
    /// Adds the log of a slot's mass (the sum of its tokens' importances) to its attention score. False in DMS, which
    /// has no importances.
    pub log_mass: bool,
    /// Whether the KV heads of a layer decide alone or together.
    pub share: Share,
}

/// Where the decision logit and the importance come from.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "source", deny_unknown_fields)]
pub enum Decision {
    /// The last channel of each key and query, freed for this purpose; in DMS that of each group's first query alone.
    Borrowed {
        /// Factor on the channel before the offset is subtracted; 1 in DMC's paper, 100 in DMS's code.
        scale: f64,
        /// Subtracted from the decision logit and added to the importance logit; 5 in the papers.
        offset: f64,
    },
    /// A zero-initialised linear per layer, `hidden -> 2 x KV heads` (`KV heads` in DMS, which needs no importance), on
    /// the normed input of the attention block.
    Head {
        /// Factor on the linear's outputs, a multiplier of its learning rate.
        scale: f64,
        /// Subtracted from the decision logit.
        offset: f64,
        /// Whether the linear has a bias. The papers' have none; one that is fitted (`--calibrate`) has one.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        bias: bool,
        /// Whether a second linear, `hidden -> KV heads`, adds to each token's decision logit what the input of the token
        /// before it says: a fold joins the two, and how dear it is depends on both. The papers decide by one token's
        /// input.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        ahead: bool,
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

/// Channels that decisions are read from, so that attention cannot use them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Borrows {
    /// None: a head decides.
    Nothing,
    /// The last of every key and query head (DMC).
    KeysAndQueries,
    /// The last of the first query head of every group (DMS).
    FirstQueries,
}

impl Dmc {
    /// Tokens of a sequence that are exempt from folding.
    pub fn exempt(&self) -> Exempt {
        Exempt { sinks: self.sinks, delay: self.delay }
    }

    /// Channels that attention cannot use.
    pub fn borrows(&self) -> Borrows {
        match (self.decision, self.method) {
            (Decision::Head { .. }, _) => Borrows::Nothing,
            (Decision::Borrowed { .. }, Method::Dmc) => Borrows::KeysAndQueries,
            (Decision::Borrowed { .. }, Method::Dms) => Borrows::FirstQueries,
        }
    }

    /// Whether decision heads have biases.
    pub fn decide_bias(&self) -> bool {
        matches!(self.decision, Decision::Head { bias: true, .. })
    }

    /// Whether decisions are also read from the token before.
    pub fn decide_ahead(&self) -> bool {
        matches!(self.decision, Decision::Head { ahead: true, .. })
    }

    /// Outputs of each layer's decision head for `kv` KV heads: logits, and importances where there are means; 0
    /// without a head.
    pub fn decide_outputs(&self, kv: usize) -> usize {
        match (self.decision, self.method) {
            (Decision::Borrowed { .. }, _) => 0,
            (Decision::Head { .. }, Method::Dmc) => 2 * kv,
            (Decision::Head { .. }, Method::Dms) => kv,
        }
    }
}
