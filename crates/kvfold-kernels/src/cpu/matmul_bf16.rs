//! The three products of a linear layer with bf16 operands.
//!
//! The output is divided into blocks of rows and of panels; which blocks there are does not touch a sum. A weight is
//! packed once and stays packed until it changes.

use super::{Array, Cpu, for_rows};
use crate::bf16::{self, GemmBf16, words};
use crate::kernel_set::KernelSet;
use crate::real::Real;
use crate::simd::PANEL;
use rayon::prelude::*;

/// Rows of a block: several register tiles, few enough to stay in cache beside a panel.
const ROWS: usize = 96;
/// Words that a weight gradient sums before it moves on, so that its inputs stay in cache.
const WORDS: usize = 256;
/// Multiplications that are worth a task.
const TASK: usize = 256 * 1024;

/// An output whose blocks threads write side by side.
struct Output<F>(*mut F);

// SAFETY: `Cpu::blocks` hands every thread columns and rows of its own.
unsafe impl<F: Send> Sync for Output<F> {}

impl<F> Output<F> {
    /// Where an element is.
    fn at(&self, index: usize) -> *mut F {
        self.0.wrapping_add(index)
    }
}

impl<F: Real, K: KernelSet<F>> Cpu<F, K> {
    /// `x [N,K] . w [M,K]^T`.
    pub(super) fn bf16_product(&self, x: &Array<F>, w: &Array<F>) -> Array<F> {
        let ((n, k), (m, wk)) = (x.matrix(), w.matrix());
        assert_eq!(k, wk, "linear of {:?} by {:?}", x.shape(), w.shape());
        let (a, b) = (self.packed_rows(x), self.packed_panels_of_rows(w));
        self.row_product(a, b, (n, m, k))
    }

    /// `d [N,M] . w [M,K]`.
    pub(super) fn bf16_product_grad_x(&self, w: &Array<F>, d: &Array<F>) -> Array<F> {
        let ((m, k), (n, dm)) = (w.matrix(), d.matrix());
        assert_eq!(m, dm, "gradient {:?} of a linear by {:?}", d.shape(), w.shape());
        let (a, b) = (self.packed_rows(d), self.packed_panels_of_columns(w));
        self.row_product(a, b, (n, k, m))
    }

    /// Packed rows times panels, `[N, outputs]`.
    fn row_product(&self, a: &[u32], b: &[u32], (n, outputs, terms): (usize, usize, usize)) -> Array<F> {
        let words = words(terms);
        let mut y = self.buffer(n * outputs);
        let out = Output(y.as_mut_ptr());
        blocks(n, outputs, terms, |rows, panels| {
            for panel in panels {
                let product = GemmBf16 {
                    m: rows.len(),
                    n: PANEL.min(outputs - panel * PANEL),
                    words,
                    a: &a[rows.start * words..],
                    a_row: words,
                    a_word: 1,
                    b: &b[panel * words * PANEL..][..words * PANEL],
                    c_row: outputs,
                    accumulate: false,
                };
                // SAFETY: these rows and columns are this block's alone.
                unsafe { self.set.gemm_bf16(product, out.at(rows.start * outputs + panel * PANEL)) };
            }
        });
        self.array(&[n, outputs], y)
    }

    /// `d [N,M]^T . x [N,K]`.
    pub(super) fn bf16_product_grad_w(&self, x: &Array<F>, d: &Array<F>) -> Array<F> {
        let ((n, k), (dn, m)) = (x.matrix(), d.matrix());
        assert_eq!(n, dn, "gradient {:?} of a linear of {:?}", d.shape(), x.shape());
        let (a, b) = (self.packed_panels_of_columns(d), self.packed_panels_of_columns(x));
        let words = words(n);
        let mut dw = self.buffer(m * k);
        dw.par_chunks_mut(PANEL * k).zip(a.par_chunks_exact(words * PANEL)).for_each(|(dw, a)| {
            for first in (0..words).step_by(WORDS) {
                for (panel, b) in b.chunks_exact(words * PANEL).enumerate() {
                    let product = GemmBf16 {
                        m: dw.len() / k,
                        n: PANEL.min(k - panel * PANEL),
                        words: WORDS.min(words - first),
                        a: &a[first * PANEL..],
                        a_row: 1,
                        a_word: PANEL,
                        b: &b[first * PANEL..],
                        c_row: k,
                        accumulate: first > 0,
                    };
                    // SAFETY: the rows are this task's alone, and the columns lie inside them.
                    unsafe { self.set.gemm_bf16(product, dw.as_mut_ptr().wrapping_add(panel * PANEL)) };
                }
            }
        });
        self.array(&[m, k], dw)
    }

    /// [`bf16::rows`] of an array, made at first use.
    fn packed_rows<'a>(&self, x: &'a Array<F>) -> &'a [u32] {
        let (rows, cols) = x.matrix();
        x.packings().rows.get_or_init(|| {
            let mut packed = self.home.words.take(rows * words(cols));
            for_rows(&mut packed, words(cols), |first, block| {
                let x = &x.data()[first * cols..][..block.len() / words(cols) * cols];
                self.set.run(
                    #[inline(always)]
                    || bf16::rows(x, cols, block),
                );
            });
            packed
        })
    }

    /// [`bf16::panels_of_rows`] of an array, made at first use.
    pub(super) fn packed_panels_of_rows<'a>(&self, x: &'a Array<F>) -> &'a [u32] {
        let (rows, cols) = x.matrix();
        x.packings().panels_of_rows.get_or_init(|| {
            let mut packed = self.home.words.take(rows.div_ceil(PANEL) * words(cols) * PANEL);
            let panels = packed.par_chunks_exact_mut(words(cols) * PANEL);
            panels.zip(x.data().par_chunks(PANEL * cols)).for_each(|(panel, x)| {
                self.set.run(
                    #[inline(always)]
                    || bf16::panels_of_rows(x, cols, panel),
                );
            });
            packed
        })
    }

    /// A row of a weight of which only the packing is held.
    pub(super) fn packed_row<T: Real>(&self, w: &Array<F>, row: usize, to: &mut [T]) {
        let words = words(to.len());
        let panel = &self.packed_panels_of_rows(w)[row / PANEL * words * PANEL..][..words * PANEL];
        for (to, words) in to.chunks_mut(2).zip(panel.chunks_exact(PANEL)) {
            let word = words[row % PANEL];
            let terms = [word & 0xffff, word >> 16];
            to.iter_mut().zip(terms).for_each(|(to, term)| *to = T::of(f64::from(bf16::widen(term))));
        }
    }

    /// [`bf16::panels_of_columns`] of an array, made at first use.
    fn packed_panels_of_columns<'a>(&self, x: &'a Array<F>) -> &'a [u32] {
        let (rows, cols) = x.matrix();
        x.packings().panels_of_columns.get_or_init(|| {
            let mut packed = self.home.words.take(cols.div_ceil(PANEL) * words(rows) * PANEL);
            packed.par_chunks_exact_mut(words(rows) * PANEL).enumerate().for_each(|(panel, words)| {
                self.set.run(
                    #[inline(always)]
                    || bf16::panels_of_columns(x.data(), cols, panel * PANEL, words),
                );
            });
            packed
        })
    }
}

/// Calls `f` with blocks of rows and panels that cover an output, in parallel where it pays.
fn blocks(n: usize, outputs: usize, terms: usize, f: impl Fn(std::ops::Range<usize>, std::ops::Range<usize>) + Sync) {
    let panels = outputs.div_ceil(PANEL);
    let rows = n.min(ROWS);
    // Blocks of few rows take more panels; few blocks of rows are divided by panels.
    let worth = TASK.div_ceil(rows.max(1) * terms * PANEL);
    let wanted = (4 * rayon::current_num_threads()).div_ceil(n.div_ceil(ROWS).max(1));
    let width = panels.div_ceil(wanted).max(worth).min(panels);
    let strips = panels.div_ceil(width);
    (0..n.div_ceil(ROWS) * strips).into_par_iter().for_each(|block| {
        let (row, panel) = (block / strips * ROWS, block % strips * width);
        f(row..n.min(row + ROWS), panel..panels.min(panel + width));
    });
}
