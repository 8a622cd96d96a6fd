//! The three products of a linear layer, in the backend's floats. Forward reads the weight packed into panels; the two
//! gradients read rows as they lie.

use super::{Array, Cpu};
use crate::kernel_set::KernelSet;
use crate::real::Real;
use crate::simd::{Gemm, PANEL, STRIP};
use crate::team;

/// Rows of a task.
const ROWS: usize = 64;
/// Terms that a weight gradient sums before it moves on, so that its inputs stay in cache.
const TERMS: usize = 512;
/// Multiplications below which a product stays on the calling thread.
const SERIAL: usize = 128 * 1024;

impl<F: Real, K: KernelSet<F>> Cpu<F, K> {
    /// `x [N,K] . w [M,K]^T`.
    pub(super) fn float_product(&self, x: &Array<F>, w: &Array<F>) -> Array<F> {
        let ((n, k), (m, wk)) = (x.matrix(), w.matrix());
        assert_eq!(k, wk, "linear of {:?} by {:?}", x.shape(), w.shape());
        let strips = w.float_strips();
        let mut y = self.buffer(n * m);
        let tile = |rows: usize, x: &[F], panel: usize, y: &mut [F]| {
            let product = Gemm {
                m: rows,
                n: PANEL.min(m - panel * PANEL),
                k,
                a: x,
                a_row: k,
                a_col: 1,
                b: &strips[panel * k * PANEL..][..k * PANEL],
                b_row: STRIP,
                b_strip: k * STRIP,
                c_row: m,
                accumulate: false,
            };
            self.set.gemm(product, y);
        };
        let all = m.div_ceil(PANEL);
        if n == 1 && m * k >= SERIAL {
            team::each(y.chunks_mut(PANEL).enumerate(), |(panel, y)| tile(1, x.data(), panel, y));
        } else {
            let rows = if n * m * k < SERIAL { n } else { ROWS };
            team::each(y.chunks_mut(rows * m).zip(x.data().chunks(rows * k)), |(y, x)| {
                (0..all).for_each(|panel| tile(x.len() / k, x, panel, &mut y[panel * PANEL..]));
            });
        }
        self.array_of(&[n, m], y)
    }

    /// `d [N,M] . w [M,K]`.
    pub(super) fn float_product_grad_x(&self, w: &Array<F>, d: &Array<F>) -> Array<F> {
        let ((m, k), (n, dm)) = (w.matrix(), d.matrix());
        assert_eq!(m, dm, "gradient {:?} of a linear by {:?}", d.shape(), w.shape());
        let mut dx = self.buffer(n * k);
        team::each(dx.chunks_mut(ROWS * k).zip(d.data().chunks(ROWS * m)), |(dx, d)| {
            let product = Gemm {
                m: dx.len() / k,
                n: k,
                k: m,
                a: d,
                a_row: m,
                a_col: 1,
                b: w.data(),
                b_row: k,
                b_strip: STRIP,
                c_row: k,
                accumulate: false,
            };
            self.set.gemm(product, dx);
        });
        self.array_of(&[n, k], dx)
    }

    /// `d [N,M]^T . x [N,K]`.
    pub(super) fn float_product_grad_w(&self, x: &Array<F>, d: &Array<F>) -> Array<F> {
        let ((n, k), (dn, m)) = (x.matrix(), d.matrix());
        assert_eq!(n, dn, "gradient {:?} of a linear of {:?}", d.shape(), x.shape());
        let rows = m.div_ceil(2 * team::threads()).next_multiple_of(8).min(ROWS);
        let mut dw = self.buffer(m * k);
        team::each(dw.chunks_mut(rows * k).enumerate(), |(task, dw)| {
            for first in (0..n).step_by(TERMS) {
                let product = Gemm {
                    m: dw.len() / k,
                    n: k,
                    k: TERMS.min(n - first),
                    a: &d.data()[first * m + task * rows..],
                    a_row: 1,
                    a_col: m,
                    b: &x.data()[first * k..],
                    b_row: k,
                    b_strip: STRIP,
                    c_row: k,
                    accumulate: first > 0,
                };
                self.set.gemm(product, dw);
            }
        });
        self.array_of(&[m, k], dw)
    }
}
