//! What became of each token, for whoever wants to look.

use kvfold_kernels::ops::Span;
use kvfold_kernels::paged::{HeadTable, Rule};

/// Which tokens of a sequence were told to fold into the slot of the token before them, or to evict it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// By layer, KV head and token. A decision is carried out once its token has left the window of exact ones.
    folds: Vec<Vec<Vec<bool>>>,
}

impl Trace {
    /// By layer, KV head and token: whether it folds. Of a full cache nothing.
    pub fn folds(&self) -> &[Vec<Vec<bool>>] {
        &self.folds
    }

    /// Notes what a layer's heads decide on the tokens of a span; logits, and what tokens add to the next one's, are `[N, G]`.
    /// To be told before the heads take the tokens.
    pub(crate) fn note(
        &mut self,
        layer: usize,
        (heads, rule): (&[HeadTable], Rule),
        span: &Span,
        (logit, ahead): (&[f32], Option<&[f32]>),
    ) {
        let kv = heads.len();
        if self.folds.len() <= layer {
            self.folds.resize(layer + 1, vec![Vec::new(); kv]);
        }
        for (g, (head, folds)) in heads.iter().zip(&mut self.folds[layer]).enumerate() {
            let mut before = head.ahead as f32;
            for t in 0..span.len {
                let at = (span.start + t) * kv + g;
                let logit = ahead.map_or(logit[at], |_| logit[at] + before);
                before = ahead.map_or(0.0, |ahead| ahead[at]);
                folds.push(rule.may_fold(span.position + t) && logit > 0.0);
            }
        }
    }
}
