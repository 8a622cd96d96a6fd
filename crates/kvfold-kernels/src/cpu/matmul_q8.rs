//! Products with 8-bit weights: what is served, never what is trained.

use super::blocks::{ROWS, Sizes};
use super::{Array, Cpu};
use crate::kernel_set::KernelSet;
use crate::q8::{GemmQ8, Panels};
use crate::real::Real;

impl<F: Real, K: KernelSet<F>> Cpu<F, K> {
    /// `x [N,K] . w [M,K]^T`.
    pub(super) fn q8_product(&self, x: &Array<F>, w: &Array<F>) -> Array<F> {
        let ((n, terms), (outputs, wk)) = (x.matrix(), w.matrix());
        assert_eq!(terms, wk, "linear of {:?} by {:?}", x.shape(), w.shape());
        let panels = self.quantised(w);
        let y = self.panel_product(Sizes { n, outputs, terms, rows: ROWS }, |rows, panel, n, to| {
            let (a, b) = (&x.data()[rows.start * terms..], panels.panel(panel));
            let product = GemmQ8 { m: rows.len(), n, a, k: terms, b, c_row: outputs };
            // SAFETY: these rows and columns are this call's alone.
            unsafe { self.set.gemm_q8(product, to) };
        });
        self.array_of(&[n, outputs], y)
    }

    /// A weight in 8 bits, made at first use.
    pub(super) fn quantised<'a>(&self, w: &'a Array<F>) -> &'a Panels {
        w.packings().quantised.get_or_init(|| Panels::of(w.data(), w.matrix().1, &self.home.weights))
    }
}
