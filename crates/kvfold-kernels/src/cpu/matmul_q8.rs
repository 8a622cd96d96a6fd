//! Products with 8-bit weights: what is served, never what is trained.

use super::blocks::{MANY, Output, Sizes, blocks};
use super::{Array, Cpu};
use crate::kernel_set::KernelSet;
use crate::q8::{GemmQ8, Panels};
use crate::real::Real;
use crate::simd::PANEL;

impl<F: Real, K: KernelSet<F>> Cpu<F, K> {
    /// `x [N,K] . w [M,K]^T`.
    pub(super) fn q8_product(&self, x: &Array<F>, w: &Array<F>) -> Array<F> {
        let ((n, terms), (outputs, wk)) = (x.matrix(), w.matrix());
        assert_eq!(terms, wk, "linear of {:?} by {:?}", x.shape(), w.shape());
        let (panels, sizes) = (self.quantised(w), Sizes { n, outputs, terms });
        let y = match n < MANY {
            true => self.quantised_product(x.data(), panels, sizes),
            false => self.widened_product(
                x.data(),
                sizes,
                #[inline(always)]
                |panel, wide| panels.panel(panel).widen(wide),
            ),
        };
        self.array(&[n, outputs], y)
    }

    fn quantised_product(&self, a: &[F], b: &Panels, sizes: Sizes) -> Vec<F> {
        let Sizes { n, outputs, terms } = sizes;
        let mut y = self.buffer(n * outputs);
        let out = Output::of(&mut y);
        blocks(sizes, |rows, panels| {
            for panel in panels {
                let product = GemmQ8 {
                    m: rows.len(),
                    n: PANEL.min(outputs - panel * PANEL),
                    a: &a[rows.start * terms..],
                    k: terms,
                    b: b.panel(panel),
                    c_row: outputs,
                };
                // SAFETY: these rows and columns are this block's alone.
                unsafe { self.set.gemm_q8(product, out.at(rows.start * outputs + panel * PANEL)) };
            }
        });
        y
    }

    /// A weight in 8 bits, made at first use.
    pub(super) fn quantised<'a>(&self, w: &'a Array<F>) -> &'a Panels {
        w.packings().quantised.get_or_init(|| Panels::of(w.data(), w.matrix().1))
    }
}
