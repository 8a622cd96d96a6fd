//! The hinge of a batch that is computed in parts.
//!
//! A hinge over the whole batch is no sum over its parts: whether it presses at all depends on everyone's fold rates. So it
//! is taken here, on the host, from the rates of all sequences, and each part's backward pass is seeded with its share of
//! the gradient.

use kvfold_kernels::Grad;
use kvfold_kernels::ops::{Hinge, Span, Spans};
use std::ops::Range;

/// Fold rates of a batch's sequences, and what they should be.
#[derive(Debug)]
pub(crate) struct BatchRates<'a> {
    spans: &'a Spans,
    kv: usize,
    /// `[S,G]` of each layer.
    rates: Vec<Vec<f32>>,
}

impl<'a> BatchRates<'a> {
    /// Nothing folds yet.
    pub(crate) fn new(spans: &'a Spans, layers: usize, kv: usize) -> Self {
        Self { spans, kv, rates: vec![vec![0.0; spans.len() * kv]; layers] }
    }

    /// Enters the rates of some sequences, `[S,G]` of each layer.
    pub(crate) fn set<O: Grad>(&mut self, ops: &O, sequences: &Range<usize>, rates: &[&O::Tensor]) {
        let at = sequences.start * self.kv..sequences.end * self.kv;
        for (all, part) in self.rates.iter_mut().zip(rates) {
            all[at.clone()].copy_from_slice(&ops.to_host(part));
        }
    }

    fn tensors<O: Grad>(&self, ops: &O) -> Vec<O::Tensor> {
        self.rates.iter().map(|rates| ops.tensor(&[self.spans.len(), self.kv], rates)).collect()
    }

    /// The hinge over all sequences.
    pub(crate) fn hinge<O: Grad>(&self, ops: &O, hinge: Hinge) -> f64 {
        f64::from(ops.to_host(&ops.hinge(&self.tensors(ops), self.spans, hinge))[0])
    }

    /// The gradient of `weight` times the hinge over all sequences by the rates of some of them.
    pub(crate) fn grads<O: Grad>(
        &self,
        ops: &O,
        sequences: &Range<usize>,
        (hinge, weight): (Hinge, f64),
    ) -> Vec<O::Tensor> {
        let weight = ops.tensor(&[1], &[weight as f32]);
        let all = ops.hinge_grad(&self.tensors(ops), self.spans, hinge, &weight);
        let at = sequences.start * self.kv..sequences.end * self.kv;
        all.iter().map(|grad| ops.tensor(&[sequences.len(), self.kv], &ops.to_host(grad)[at.clone()])).collect()
    }

    /// Tokens seen per slot held, by layer and KV head.
    pub(crate) fn heads(&self) -> Vec<Vec<f64>> {
        let ratio = |layer: &Vec<f32>, g: usize| self.spans.rows() as f64 / self.slots(layer, g);
        self.rates.iter().map(|layer| (0..self.kv).map(|g| ratio(layer, g)).collect()).collect()
    }

    /// Tokens seen per slot held, over all heads.
    pub(crate) fn ratio(&self) -> f64 {
        let heads = self.rates.iter().flat_map(|layer| (0..self.kv).map(move |g| self.slots(layer, g)));
        let slots: f64 = heads.sum();
        (self.spans.rows() * self.rates.len() * self.kv) as f64 / slots
    }

    /// Slots that a head holds at the ends of all sequences.
    fn slots(&self, layer: &[f32], g: usize) -> f64 {
        let held = |(s, span): (usize, &Span)| span.len as f64 * (1.0 - f64::from(layer[s * self.kv + g]));
        self.spans.iter().enumerate().map(held).sum()
    }
}

/// The ratio that a hinge asks of a batch.
pub(crate) fn asked(hinge: Hinge, spans: &Spans) -> f64 {
    let tokens = spans.rows() as f64;
    let folds: f64 = spans.iter().map(|span| hinge.target_of(span.len) * span.len as f64).sum();
    tokens / (tokens - folds)
}
