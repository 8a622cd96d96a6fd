//! Products with 8-bit weights: what is served, never what is trained.

use super::blocks::{Output, Product, ROWS, Sizes};
use super::{Array, Cpu, rows_per_block};
use crate::kernel_set::KernelSet;
use crate::q8::{GemmQ8, Panels, Rows};
use crate::real::Real;
use crate::simd::PANEL;
use crate::team;
use std::ops::Range;

/// Rows of integers times panels of integers.
struct Quantised<'a, K> {
    set: K,
    a: &'a Rows,
    b: &'a Panels,
    sizes: Sizes,
}

impl<F: Real, K: KernelSet<F>> Product<F> for Quantised<'_, K> {
    const SMALL_BLOCKS: bool = true;

    fn sizes(&self) -> Sizes {
        self.sizes
    }

    unsafe fn block(&self, rows: Range<usize>, panels: Range<usize>, to: *mut F, row: usize) {
        for (nth, panel) in panels.enumerate() {
            let n = PANEL.min(self.sizes.outputs - panel * PANEL);
            let b = self.b.panel(panel);
            let product = GemmQ8 { m: rows.len(), n, a: self.a, first: rows.start, b, c_row: row };
            // SAFETY: the caller's.
            unsafe { self.set.gemm_q8(product, to.wrapping_add(nth * PANEL)) };
        }
    }
}

impl<F: Real, K: KernelSet<F>> Cpu<F, K> {
    /// `x [N,K] . w [M,K]^T` for each weight.
    pub(super) fn q8_products(&self, x: &Array<F>, weights: &[&Array<F>]) -> Vec<Array<F>> {
        let (n, terms) = x.matrix();
        if weights.is_empty() {
            return Vec::new();
        }
        let rows = self.rounded_rows(x.data(), terms);
        let products: Vec<_> = weights.iter().map(|w| self.by_quantised((&rows, n, terms), w)).collect();
        let outputs = self.products(&products).into_iter().zip(weights);
        outputs.map(|(y, w)| self.array_of(&[n, w.matrix().0], y)).collect()
    }

    /// `base + x [N,K] . w [M,K]^T`.
    pub(super) fn q8_linear_onto(&self, base: &Array<F>, x: &Array<F>, w: &Array<F>) -> Array<F> {
        let (n, terms) = x.matrix();
        self.onto(base, self.by_quantised((&self.rounded_rows(x.data(), terms), n, terms), w))
    }

    /// Rows `[n, terms]` times a weight.
    fn by_quantised<'a>(&self, (a, n, terms): (&'a Rows, usize, usize), w: &'a Array<F>) -> Quantised<'a, K> {
        let (outputs, wk) = w.matrix();
        assert_eq!(terms, wk, "linear of [{n}, {terms}] by {:?}", w.shape());
        Quantised { set: self.set, a, b: self.quantised(w), sizes: Sizes { n, outputs, terms, rows: ROWS } }
    }

    /// [`Ops::feed_forward`](crate::ops::Ops::feed_forward).
    pub(super) fn q8_feed_forward(&self, base: &Array<F>, x: &Array<F>, [gate, up, down]: [&Array<F>; 3]) -> Array<F> {
        let ((n, terms), (inner, _)) = (x.matrix(), gate.matrix());
        let mut hidden = self.buffer(n * inner);
        let to = Output::of(&mut hidden);
        let rows = self.rounded_rows(x.data(), terms);
        let both = [gate, up].map(|w| self.by_quantised((&rows, n, terms), w));
        self.gated(both, |rows, columns, gated| {
            for (n, gated) in rows.zip(gated.chunks_exact(columns.len())) {
                // SAFETY: these columns of the row are this block's alone.
                unsafe { to.at(n * inner + columns.start).copy_from_nonoverlapping(gated.as_ptr(), gated.len()) };
            }
        });
        self.onto(base, self.by_quantised((&self.rounded_rows(&hidden, inner), n, inner), down))
    }

    /// Activations `[n, terms]` in 16 bits.
    fn rounded_rows(&self, x: &[F], terms: usize) -> Rows {
        let n = x.len() / terms;
        let (mut rows, few) = (Rows::room(n, terms), rows_per_block(n, terms).max(1));
        team::each(rows.blocks(few).zip(x.chunks(few * terms)), |(rows, x)| {
            self.set.run(
                #[inline(always)]
                || rows.take(x, terms),
            );
        });
        rows
    }

    /// A weight in 8 bits, made at first use.
    pub(super) fn quantised<'a>(&self, w: &'a Array<F>) -> &'a Panels {
        w.packings().quantised.get_or_init(|| Panels::of(w.data(), w.matrix().1, &self.home.weights))
    }
}
