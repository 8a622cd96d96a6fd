//! The three products of a linear layer with bf16 operands.
//!
//! Which blocks an output is divided into does not touch a sum. A weight is packed once and stays packed until it changes.
//!
//! Without bf16 instructions each word costs a shift and a mask before it is multiplied. A few rows pay that gladly for
//! half the bytes. Many rows are multiplied as floats instead: each block rounds its activations and widens its panels of
//! weights once. The sums are the same, term by term.

use super::array::Words;
use super::blocks::{ROWS, Sizes};
use super::{Array, Cpu, for_rows};
use crate::aligned::Aligned;
use crate::bf16::{self, GemmBf16, words};
use crate::kernel_set::KernelSet;
use crate::pack::Packing;
use crate::real::Real;
use crate::simd::{BLOCK_ROWS, Gemm, PANEL, STRIP};
use crate::team;

/// Rows from which widening a panel once is cheaper than widening it in registers for every four rows.
const MANY: usize = 64;
/// Words of a left factor that stay in the second-level cache while panels pass by: each is read from far away as often as
/// there are blocks of rows, which tiles wait for sooner than other products.
const LEFT: usize = 192 * 1024;
/// Words of a sum that are added before the next panel's are, so that so much of a left factor is read from near for each: a
/// multiple of every instruction set's step.
const NEAR_WORDS: usize = 1024;
/// Words that a weight gradient sums before it moves on, so that its inputs stay in cache.
const WORDS: usize = 256;
/// Rows of a weight gradient that a task computes at most, from words.
const TALL: usize = 128;
/// Terms that it sums where they are floats.
const TERMS: usize = 128;

/// `W` columns from `first` on of rows `[R, cols]`, rounded to bf16, as `[R][W]`; zeros beyond the last column.
#[inline(always)]
fn round_columns<F: Real, const W: usize>(x: &[F], cols: usize, first: usize, to: &mut [F]) {
    let rows = to.as_chunks_mut::<W>().0.iter_mut().zip(x.chunks_exact(cols));
    for (to, x) in rows {
        match x.get(first..).and_then(|x| x.first_chunk::<W>()) {
            // Of a length that the compiler knows, so that it computes in vectors.
            Some(x) => to.iter_mut().zip(x).for_each(|(to, &x)| *to = bf16::rounded(x)),
            None => {
                let rest = x.get(first..).unwrap_or_default();
                to[..rest.len()].iter_mut().zip(rest).for_each(|(to, &x)| *to = bf16::rounded(x));
                to[rest.len()..].fill(F::zero());
            }
        }
    }
}

impl<F: Real, K: KernelSet<F>> Cpu<F, K> {
    /// `x [N,K] . w [M,K]^T`.
    pub(super) fn bf16_product(&self, x: &Array<F>, w: &Array<F>) -> Array<F> {
        let ((_, k), (m, wk)) = (x.matrix(), w.matrix());
        assert_eq!(k, wk, "linear of {:?} by {:?}", x.shape(), w.shape());
        self.row_product(x, self.packed_panels_of_rows(w), m)
    }

    /// `d [N,M] . w [M,K]`.
    pub(super) fn bf16_product_grad_x(&self, w: &Array<F>, d: &Array<F>) -> Array<F> {
        let ((m, k), (_, dm)) = (w.matrix(), d.matrix());
        assert_eq!(m, dm, "gradient {:?} of a linear by {:?}", d.shape(), w.shape());
        self.row_product(d, self.packed_panels_of_columns(w), k)
    }

    /// `x [N,terms]` times panels of `outputs` columns.
    fn row_product(&self, x: &Array<F>, panels: &[u32], outputs: usize) -> Array<F> {
        let (n, terms) = x.matrix();
        let y = match self.set.pairs() || n < MANY {
            true => {
                let rows = (LEFT / words(terms).min(NEAR_WORDS)).clamp(ROWS, 4 * ROWS);
                self.word_product(self.packed_rows(x), panels, Sizes { n, outputs, terms, rows })
            }
            false => self.widened_product(x.data(), panels, Sizes { n, outputs, terms, rows: ROWS }),
        };
        self.array_of(&[n, outputs], y)
    }

    /// Packed rows times panels.
    fn word_product(&self, a: &[u32], b: &[u32], sizes: Sizes) -> Aligned<F> {
        let (words, outputs) = (words(sizes.terms), sizes.outputs);
        self.block_product(sizes, |rows, panels, at| {
            // Where a sum is longer than what stays near, all panels add a part of it before the next.
            for first in (0..words).step_by(NEAR_WORDS) {
                let product = GemmBf16 {
                    m: rows.len(),
                    n: (panels.len() * PANEL).min(outputs - panels.start * PANEL),
                    words: NEAR_WORDS.min(words - first),
                    a: &a[rows.start * words + first..],
                    a_row: words,
                    b: &b[(panels.start * words + first) * PANEL..],
                    b_panel: words * PANEL,
                    c_row: outputs,
                    accumulate: first > 0,
                };
                // SAFETY: these rows and columns are this block's alone.
                unsafe { self.set.gemm_bf16(product, at(panels.start)) };
            }
        })
    }

    /// Rows `[n, terms]`, which each block rounds, times packed panels, which it widens.
    fn widened_product(&self, a: &[F], b: &[u32], sizes: Sizes) -> Aligned<F> {
        let Sizes { outputs, terms, .. } = sizes;
        let panel_words = words(terms) * PANEL;
        // Packed pairs fill an odd end up.
        let strip = terms.next_multiple_of(2) * STRIP;
        self.block_product(sizes, |rows, panels, at| {
            let (mut left, mut wide) = (self.buffer(rows.len() * terms), self.buffer(PANEL / STRIP * strip));
            let a = &a[rows.start * terms..rows.end * terms];
            self.set.run(
                #[inline(always)]
                || left.iter_mut().zip(a).for_each(|(left, &a)| *left = bf16::rounded(a)),
            );
            for panel in panels {
                self.set.run(
                    #[inline(always)]
                    || bf16::widen_panel(&b[panel * panel_words..][..panel_words], &mut wide),
                );
                let product = Gemm {
                    m: rows.len(),
                    n: PANEL.min(outputs - panel * PANEL),
                    k: terms,
                    a: &left,
                    a_row: terms,
                    a_col: 1,
                    b: &wide,
                    b_row: STRIP,
                    b_strip: strip,
                    c_row: outputs,
                    accumulate: false,
                };
                // SAFETY: these rows and columns are this block's alone.
                unsafe { self.set.gemm_at(product, at(panel)) };
            }
            self.home.floats.give(left);
            self.home.floats.give(wide);
        })
    }

    /// `d [N,M]^T . x [N,K]`.
    pub(super) fn bf16_product_grad_w(&self, x: &Array<F>, d: &Array<F>) -> Array<F> {
        let ((n, k), (dn, m)) = (x.matrix(), d.matrix());
        assert_eq!(n, dn, "gradient {:?} of a linear of {:?}", d.shape(), x.shape());
        let mut dw = self.buffer(m * k);
        match self.set.pairs() {
            true => self.word_product_of_columns(d, x, &mut dw),
            false => self.rounded_product_of_columns(d, x, &mut dw),
        }
        self.array_of(&[m, k], dw)
    }

    /// `d^T . x` of packed columns: those of `x` are laid out once, those of `d` by the task that needs them.
    fn word_product_of_columns(&self, d: &Array<F>, x: &Array<F>, dw: &mut [F]) {
        let ((_, m), (n, k)) = (d.matrix(), x.matrix());
        let (b, words) = (self.packed_panels_of_columns(x), words(n));
        // Rows that share the reading of x, where there are enough of them for every thread.
        let rows = m.div_ceil(2 * team::threads()).next_multiple_of(PANEL).min(TALL);
        team::each(dw.chunks_mut(rows * k).enumerate(), |(task, dw)| {
            let mut left = self.home.words.take(dw.len() / k * words);
            self.set.pack(Packing::Columns { x: d.data(), cols: m, first: task * rows }, &mut left);
            for first in (0..words).step_by(WORDS) {
                let product = GemmBf16 {
                    m: dw.len() / k,
                    n: k,
                    words: WORDS.min(words - first),
                    a: &left[first..],
                    a_row: words,
                    b: &b[first * PANEL..],
                    b_panel: words * PANEL,
                    c_row: k,
                    accumulate: first > 0,
                };
                // SAFETY: the rows are this task's alone.
                unsafe { self.set.gemm_bf16(product, dw.as_mut_ptr()) };
            }
            self.home.words.give(left);
        });
    }

    /// `d^T . x` of rounded columns: those of `x` are laid out once, those of `d` by the task that needs them.
    fn rounded_product_of_columns(&self, d: &Array<F>, x: &Array<F>, dw: &mut [F]) {
        let ((n, k), (_, m)) = (x.matrix(), d.matrix());
        let mut strips = self.buffer(k.next_multiple_of(PANEL) * n);
        team::each(strips.chunks_exact_mut(n * STRIP).enumerate(), |(strip, to)| {
            self.set.run(
                #[inline(always)]
                || round_columns::<F, STRIP>(x.data(), k, strip * STRIP, to),
            );
        });
        // Blocks of rows share the reading of x, where there are enough of them for every thread.
        let together = (m.div_ceil(BLOCK_ROWS) / (2 * team::threads())).clamp(1, 4);
        let rows = together * BLOCK_ROWS;
        team::each(dw.chunks_mut(rows * k).enumerate(), |(task, dw)| {
            let mut left = self.buffer(TERMS * rows);
            for first in (0..n).step_by(TERMS) {
                let terms = TERMS.min(n - first);
                for (block, left) in left.chunks_exact_mut(TERMS * BLOCK_ROWS).enumerate() {
                    let (d, column) = (&d.data()[first * m..][..terms * m], task * rows + block * BLOCK_ROWS);
                    self.set.run(
                        #[inline(always)]
                        || round_columns::<F, BLOCK_ROWS>(d, m, column, left),
                    );
                }
                for column in (0..k).step_by(PANEL) {
                    for (dw, left) in dw.chunks_mut(BLOCK_ROWS * k).zip(left.chunks_exact(TERMS * BLOCK_ROWS)) {
                        let product = Gemm {
                            m: dw.len() / k,
                            n: PANEL.min(k - column),
                            k: terms,
                            a: left,
                            a_row: 1,
                            a_col: BLOCK_ROWS,
                            b: &strips[column * n + first * STRIP..],
                            b_row: STRIP,
                            b_strip: n * STRIP,
                            c_row: k,
                            accumulate: first > 0,
                        };
                        self.set.gemm(product, &mut dw[column..]);
                    }
                }
            }
            self.home.floats.give(left);
        });
        self.home.floats.give(strips);
    }

    /// [`Packing::Rows`] of an array, made at first use.
    fn packed_rows<'a>(&self, x: &'a Array<F>) -> &'a [u32] {
        let (rows, cols) = x.matrix();
        x.packings().rows.get_or_init(|| {
            let mut packed = self.home.words.take(rows * words(cols));
            for_rows(&mut packed, words(cols), |first, block| {
                let x = &x.data()[first * cols..][..block.len() / words(cols) * cols];
                self.set.pack(Packing::Rows { x, cols }, block);
            });
            packed
        })
    }

    /// [`Packing::PanelOfRows`]s of an array, made at first use.
    pub(super) fn packed_panels_of_rows<'a>(&self, x: &'a Array<F>) -> &'a [u32] {
        x.packings().panels_of_rows.get_or_init(|| {
            let (rows, cols) = x.matrix();
            let mut packed = self.home.words.take(rows.div_ceil(PANEL) * words(cols) * PANEL);
            self.pack_panels_of_rows(x, &mut packed);
            Words::Lent(packed)
        })
    }

    /// The same of a weight that is only read, to stay.
    pub(super) fn store_panels_of_rows(&self, w: &Array<F>) {
        w.packings().panels_of_rows.get_or_init(|| {
            let (rows, cols) = w.matrix();
            let mut packed = self.home.weights.room(rows.div_ceil(PANEL) * words(cols) * PANEL);
            self.pack_panels_of_rows(w, &mut packed);
            Words::Stored(packed.stored())
        });
    }

    fn pack_panels_of_rows(&self, x: &Array<F>, packed: &mut [u32]) {
        let (_, cols) = x.matrix();
        let panels = packed.chunks_exact_mut(words(cols) * PANEL);
        team::each(panels.zip(x.data().chunks(PANEL * cols)), |(panel, x)| {
            self.set.pack(Packing::PanelOfRows { x, cols }, panel);
        });
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

    /// [`Packing::PanelOfColumns`]s of an array, made at first use.
    fn packed_panels_of_columns<'a>(&self, x: &'a Array<F>) -> &'a [u32] {
        let (rows, cols) = x.matrix();
        x.packings().panels_of_columns.get_or_init(|| {
            let mut packed = self.home.words.take(cols.div_ceil(PANEL) * words(rows) * PANEL);
            team::each(packed.chunks_exact_mut(words(rows) * PANEL).enumerate(), |(panel, words)| {
                self.set.pack(Packing::PanelOfColumns { x: x.data(), cols, first: panel * PANEL }, words);
            });
            packed
        })
    }
}
