//! Decisions that land on the ratio that was asked for.
//!
//! A fit sees inputs of a model that folds nothing yet, and training steers decisions that have noise on them. Taken without
//! noise, on what folding makes of the inputs, they fold more than either meant, and every token folded beyond what was
//! asked costs quality. So at the end of a run decisions are taken as the cache will take them, on text that was not
//! trained on, and the biases of the decision heads are moved until the share that the ratio asks for folds. What a decision
//! changes downstream moves other decisions, so this is repeated until it holds.

use crate::calibrate::{Reader, thresholds};
use crate::corpus::Corpus;
use kvfold_kernels::Grad;
use kvfold_kernels::dmc::Dmc;
use kvfold_kernels::ops::{Scope, Spans};
use kvfold_model::attend::{Folding, Mode};
use kvfold_model::block::Pass;
use serde::Serialize;

/// Tokens of text that decisions are taken on.
pub const TOKENS: usize = 8_192;
/// Times that decisions are taken at most.
pub const PASSES: usize = 5;
/// What a ratio may be off, relatively.
const TOLERANCE: f64 = 0.005;

/// Ratios at a sequence's full length, without noise.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Settled {
    /// Tokens that decisions were taken on.
    pub tokens: usize,
    /// Times that they were taken.
    pub passes: usize,
    /// Tokens seen per slot held before anything was moved.
    pub before: f64,
    /// The same at the end.
    pub after: f64,
}

/// Minus the logits of tokens that may fold, by layer and KV head: below 0 folds.
pub(crate) struct Taken(Vec<Vec<Vec<f64>>>);

impl Taken {
    /// Takes the decisions of a model on sequences of a corpus.
    pub(crate) fn of<O: Grad>(reader: &Reader<'_, O>, dmc: &Dmc, corpus: &Corpus, sequences: &[usize]) -> Self {
        let Reader { ops, shape, angles, weights } = *reader;
        let mut taken = vec![vec![Vec::new(); shape.heads.kv]; shape.layers];
        for &n in sequences {
            let spans = Spans::of_lengths(&corpus.lengths(n).collect::<Vec<_>>());
            let pass = Pass { ops, shape, angles, spans: &spans, wanted: None };
            let mut x = ops.embed(corpus.sequence(n), &weights.embed);
            for (layer, (block, heads)) in weights.blocks.iter().zip(&mut taken).enumerate() {
                let mut attend = Folding::new(dmc, Mode::Hard);
                x = pass.block(layer, block, &x, &mut attend);
                let logits: Vec<f32> = attend.logits.iter().flat_map(|logits| ops.to_host(logits)).collect();
                let kv = heads.len();
                for row in spans.iter().flat_map(|span| dmc.exempt().foldable(span.len).map(|token| span.start + token))
                {
                    let row = &logits[row * kv..][..kv];
                    heads.iter_mut().zip(row).for_each(|(head, &logit)| head.push(-f64::from(logit)));
                }
            }
        }
        Self(taken)
    }

    /// Share of the tokens that fold; none where no token may.
    pub(crate) fn share(&self) -> Option<f64> {
        let (mut folds, mut all) = (0, 0);
        for head in self.0.iter().flatten() {
            folds += head.iter().filter(|&&x| x < 0.0).count();
            all += head.len();
        }
        (all > 0).then(|| folds as f64 / all as f64)
    }

    /// What has to be added to the logits of each layer's KV heads so that `share` of the tokens fold, over the heads that share a target.
    pub(crate) fn shifts(&self, scope: Scope, share: f64) -> Vec<Vec<f64>> {
        thresholds(&self.0, scope, share)
    }
}

/// Whether a ratio is what was asked for.
pub(crate) fn settled(ratio: f64, asked: f64) -> bool {
    (ratio / asked - 1.0).abs() <= TOLERANCE
}
