//! Causal attention over exact keys of the newest tokens and pooled states of the older ones (spec 2.5).
//!
//! For query i and delay W:
//!
//! ```text
//! score(i, j) = q_i . k_j / sqrt(D) + mass_j                              exact key,    i-W < j <= i
//!             = q_i . k~_j / sqrt(D) + mass~_j + close_j [j < i-W]         pooled state, j <= i-W
//! out_i       = softmax(score(i, .)) . (v, v~)
//! ```
//!
//! One softmax over the union. `close` of the newest state a query sees is spared: whether that state is folded on is
//! not decided yet. A job is one KV head of one sequence with all queries of its group; jobs are independent, so they
//! run in parallel and no sum crosses a job. [`reference`] is the definition, [`blocked`] the fast version.

pub(crate) mod blocked;
mod reference;
#[cfg(test)]
mod tests;

pub(crate) use reference::{reference, reference_grad, reference_reads};

use crate::ops::Precision;
use crate::real::Real;

/// Rows of a token-major array, seen from one head: element (t, d) is `data[start + t*row + d]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View<'a, F> {
    pub(crate) data: &'a [F],
    pub(crate) start: usize,
    pub(crate) row: usize,
}

impl<'a, F: Real> View<'a, F> {
    /// `width` elements of row t, from column `col` of this view.
    pub(crate) fn row(&self, t: usize, col: usize, width: usize) -> &'a [F] {
        &self.data[self.start + t * self.row + col..][..width]
    }

    /// The first element of row t.
    pub(crate) fn at(&self, t: usize) -> F {
        self.data[self.start + t * self.row]
    }
}

/// Keys, values and log masses of one head.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeyView<'a, F> {
    pub(crate) k: View<'a, F>,
    pub(crate) v: View<'a, F>,
    pub(crate) mass: Option<View<'a, F>>,
}

/// One KV head of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct AttentionJob<'a, F> {
    /// Tokens T.
    pub(crate) len: usize,
    /// Head dim D.
    pub(crate) dim: usize,
    /// Query heads of this KV head.
    pub(crate) group: usize,
    /// Queries; head g of the group begins at column g*D.
    pub(crate) q: View<'a, F>,
    pub(crate) exact: Option<KeyView<'a, F>>,
    pub(crate) pooled: Option<(KeyView<'a, F>, View<'a, F>)>,
    pub(crate) delay: usize,
    /// What factors of products may be rounded to.
    pub(crate) precision: Precision,
}

impl<F: Real> AttentionJob<'_, F> {
    fn scale(&self) -> F {
        F::one() / F::of(self.dim as f64).sqrt()
    }

    /// Exact keys that query i sees: `[lo, hi)`.
    fn exact_range(&self, i: usize) -> (usize, usize) {
        match (&self.exact, &self.pooled) {
            (None, _) => (0, 0),
            (_, None) => (0, i + 1),
            _ => ((i + 1).saturating_sub(self.delay), i + 1),
        }
    }

    /// Pooled states that query i sees, `[0, n)`; the last of them is the spared one.
    fn pooled_count(&self, i: usize) -> usize {
        if self.pooled.is_some() { (i + 1).saturating_sub(self.delay) } else { 0 }
    }
}

/// Gradients of one set of keys, `[T,D]`, `[T,D]`, `[T]`, adjacent; all accumulate.
#[derive(Debug)]
pub(crate) struct KeyGrad<'a, F> {
    pub(crate) k: &'a mut [F],
    pub(crate) v: &'a mut [F],
    pub(crate) mass: &'a mut [F],
    /// Used for pooled states only.
    pub(crate) close: &'a mut [F],
}

/// What the adjoint of a job reads and writes.
#[derive(Debug)]
pub struct AttentionJobGrad<'a, F> {
    /// Gradient of the output, laid out like the queries.
    pub(crate) d: View<'a, F>,
    /// The output of the forward pass, `[group][T][D]`.
    pub(crate) out: &'a [F],
    /// Log-sum-exp of the forward pass, `[group][T]`.
    pub(crate) lse: &'a [F],
    /// Gradient of the queries, `[group][T][D]`; accumulates.
    pub(crate) q: &'a mut [F],
    pub(crate) exact: KeyGrad<'a, F>,
    pub(crate) pooled: KeyGrad<'a, F>,
}
