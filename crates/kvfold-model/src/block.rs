//! The block walk: one forward pass for training, teacher, prefill and decode.
//!
//! What differs between them is the [`Attend`] object and the backend; the walk itself has no flags. Shapes: N rows
//! (tokens of all sequences), C channels, H query heads, G KV heads, D head dim, F feed-forward channels, V vocabulary.

use crate::shape::Shape;
use crate::weights::{Block, Weights};
use kvfold_kernels::Ops;
use kvfold_kernels::ops::{Norm, Precision, Spans};

/// What a pass over a batch shares between its layers.
#[derive(Debug)]
pub struct Pass<'a, O: Ops> {
    /// The backend.
    pub ops: &'a O,
    /// The model's sizes.
    pub shape: &'a Shape,
    /// Rotary table, `[P, D]`.
    pub angles: &'a O::Tensor,
    /// The batch's sequences.
    pub spans: &'a Spans,
    /// Per sequence, of how many of its last tokens the last block's output is wanted; of all, where absent.
    pub wanted: Option<&'a [usize]>,
}

/// The projections of one layer, before rotation.
#[derive(Clone, Debug)]
pub struct Projected<T> {
    /// Queries `[N, H*D]`, times the factor on scores that a scaled RoPE may bring.
    pub q: T,
    /// Keys `[N, G*D]`.
    pub k: T,
    /// Values `[N, G*D]`.
    pub v: T,
    /// Outputs of the decision head `[N, 2G]` (DMS: `[N, G]`), in models that have one.
    pub decide: Option<T>,
    /// What each token adds to the decision logits of the next, before scaling `[N, G]`, in models that have it.
    pub ahead: Option<T>,
    /// The precision of the projections, which attention's products may be in, too.
    pub precision: Precision,
}

/// What the queries of a layer attend to, and how: the only difference between training and serving.
pub trait Attend<O: Ops> {
    /// Attention's output `[N, H*D]` for one layer's projections; in the last layer, of the rows that the pass wants.
    fn attend(&mut self, layer: usize, pass: &Pass<'_, O>, projected: Projected<O::Tensor>) -> O::Tensor;
}

impl<O: Ops> Pass<'_, O> {
    /// One decoder block, `[N, C] -> [N, C]`.
    pub fn block(&self, layer: usize, w: &Block<O::Tensor>, x: &O::Tensor, attend: &mut impl Attend<O>) -> O::Tensor {
        let y = attend.attend(layer, self, self.projected(w, x)); // [N, H*D]
        self.after_attention(w, x, &y)
    }

    /// What a block does with attention's output `y [N, H*D]`, `[N, C] -> [N, C]`: row by row.
    fn after_attention(&self, w: &Block<O::Tensor>, x: &O::Tensor, y: &O::Tensor) -> O::Tensor {
        let ops = self.ops;
        let x = match &w.o_bias {
            None => ops.linear_onto(x, y, &w.o),
            Some(bias) => ops.add(x, &ops.add_row(&ops.linear(y, &w.o), bias), 1.0),
        }; // [N, C]
        ops.feed_forward(&x, self.norm(&w.post_norm), [&w.gate, &w.up, &w.down]) // [N, C]
    }

    /// The projections of the residual stream `[N, C]`, normed.
    fn projected(&self, w: &Block<O::Tensor>, x: &O::Tensor) -> Projected<O::Tensor> {
        let heads = [&w.decide, &w.decide_ahead].map(Option::as_ref);
        let weights: Vec<_> = [&w.q, &w.k, &w.v].into_iter().chain(heads.into_iter().flatten()).collect();
        let mut products = self.ops.normed_linears(x, self.norm(&w.input_norm), &weights).into_iter();
        let mut next = || products.next().expect("as many products as weights");
        Projected {
            q: self.query(self.head_norm(self.biased(next(), &w.q_bias), &w.q_norm)), // [N, H*D]
            k: self.head_norm(self.biased(next(), &w.k_bias), &w.k_norm),             // [N, G*D]
            v: self.biased(next(), &w.v_bias),                                        // [N, G*D]
            decide: w.decide.as_ref().map(|_| self.biased(next(), &w.decide_bias)),   // [N, 2G]
            ahead: w.decide_ahead.as_ref().map(|_| next()),                           // [N, G]
            precision: self.ops.precision(&w.q),
        }
    }

    /// A norm of the residual stream.
    fn norm<'a>(&self, gain: &'a O::Tensor) -> Norm<'a, O::Tensor> {
        Norm { gain, eps: self.shape.norm_eps }
    }

    /// What the logits are made from, `[N, C]`: the residual stream after the last block, normed.
    pub fn normed(&self, weights: &Weights<O::Tensor>, x: &O::Tensor) -> O::Tensor {
        self.ops.rms_norm(x, &weights.norm, self.shape.norm_eps)
    }

    /// A projection with a bias where the family has one.
    fn biased(&self, x: O::Tensor, bias: &Option<O::Tensor>) -> O::Tensor {
        bias.iter().fold(x, |x, bias| self.ops.add_row(&x, bias))
    }

    /// `x [N, heads*D]` with each head normed where the family does it.
    fn head_norm(&self, x: O::Tensor, gain: &Option<O::Tensor>) -> O::Tensor {
        gain.iter().fold(x, |x, gain| self.ops.rms_norm(&x, gain, self.shape.norm_eps))
    }

    /// Queries times the factor on scores, where it is not 1.
    fn query(&self, q: O::Tensor) -> O::Tensor {
        match self.shape.rope.score_factor() {
            1.0 => q,
            factor => self.ops.scale(&q, factor),
        }
    }

    /// Logits `[N, V]` of the residual stream after the last block.
    pub fn logits(&self, weights: &Weights<O::Tensor>, x: &O::Tensor) -> O::Tensor {
        self.ops.linear(&self.normed(weights, x), weights.unembed())
    }

    /// The residual stream after the last block, of the rows that the pass wants `[rows, C]`: once it has attended, the last block
    /// computes no others.
    pub fn hidden(&self, weights: &Weights<O::Tensor>, ids: &[u32], attend: &mut impl Attend<O>) -> O::Tensor {
        let mut x = self.ops.embed(ids, &weights.embed); // [N, C]
        let last = weights.blocks.len() - 1;
        for (layer, block) in weights.blocks.iter().enumerate() {
            let y = attend.attend(layer, self, self.projected(block, &x)); // [N, H*D]
            if let (true, Some(wanted)) = (layer == last, self.wanted) {
                x = self.ops.embed(&self.spans.last_rows(wanted), &x); // [rows, C]
                if self.ops.shape(&x)[0] == 0 {
                    return x;
                }
            }
            x = self.after_attention(block, &x, &y);
        }
        x
    }

    /// Logits `[N, V]` of token ids.
    pub fn forward(&self, weights: &Weights<O::Tensor>, ids: &[u32], attend: &mut impl Attend<O>) -> O::Tensor {
        let x = self.hidden(weights, ids, attend);
        self.logits(weights, &x)
    }
}
