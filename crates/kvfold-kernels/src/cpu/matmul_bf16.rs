//! The three products of a linear layer with bf16 operands.
//!
//! Which blocks an output is divided into does not touch a sum. A weight is packed once and stays packed until it changes.
//!
//! Without bf16 instructions each word costs a shift and a mask before it is multiplied. A few rows pay that gladly for
//! half the bytes. Many rows are multiplied as floats instead: each block rounds its activations and widens its panels of
//! weights once. The sums are the same, term by term.

use super::array::{Lent, PackedPanels};
use super::blocks::{Output, Product, ROWS, Sizes};
use super::{Array, Cpu, for_rows};
use crate::bf16::{self, GemmBf16, words};
use crate::kernel_set::KernelSet;
use crate::pack::Packing;
use crate::real::Real;
use crate::simd::{BLOCK_ROWS, Gemm, PANEL, STRIP};
use crate::team;
use std::ops::Range;

/// Rows from which widening a panel once is cheaper than widening it in registers for every four rows.
const MANY: usize = 64;
/// Words of a left factor that stay in the second-level cache while panels pass by: each is read from far away as often as
/// there are blocks of rows, which tiles wait for sooner than other products.
const LEFT: usize = 192 * 1024;
/// Words of a sum that are added before the next panel's are, so that so much of a left factor is read from near for each: a
/// multiple of every instruction set's step.
const NEAR_WORDS: usize = 1024;
/// Rows of a weight gradient that a task computes at most, from words.
const TALL: usize = 128;
/// Words between the rows that it packs: as many as a power of two would put a tile's rows into one set of the first-level cache.
const APART: usize = 16;
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

/// Packed rows times packed panels.
pub(super) struct Words<'a, K> {
    set: K,
    a: &'a [u32],
    b: &'a [u32],
    sizes: Sizes,
    accumulate: bool,
}

impl<F: Real, K: KernelSet<F>> Product<F> for Words<'_, K> {
    const SMALL_BLOCKS: bool = true;

    fn sizes(&self) -> Sizes {
        self.sizes
    }

    unsafe fn block(&self, rows: Range<usize>, panels: Range<usize>, to: *mut F, row: usize) {
        let (words, outputs) = (words(self.sizes.terms), self.sizes.outputs);
        // Where a sum is longer than what stays near, all panels add a part of it before the next.
        for first in (0..words).step_by(NEAR_WORDS) {
            let product = GemmBf16 {
                m: rows.len(),
                n: (panels.len() * PANEL).min(outputs - panels.start * PANEL),
                words: NEAR_WORDS.min(words - first),
                a: &self.a[rows.start * words + first..],
                a_row: words,
                b: &self.b[(panels.start * words + first) * PANEL..],
                b_panel: words * PANEL,
                c_row: row,
                accumulate: self.accumulate || first > 0,
            };
            // SAFETY: the caller's.
            unsafe { self.set.gemm_bf16(product, to) };
        }
    }
}

/// Rows, which each block rounds, times packed panels, which it widens.
struct Widened<'a, F: Real, K> {
    cpu: &'a Cpu<F, K>,
    a: &'a [F],
    b: &'a [u32],
    sizes: Sizes,
    accumulate: bool,
}

impl<F: Real, K: KernelSet<F>> Product<F> for Widened<'_, F, K> {
    const SMALL_BLOCKS: bool = false;

    fn sizes(&self) -> Sizes {
        self.sizes
    }

    unsafe fn block(&self, rows: Range<usize>, panels: Range<usize>, to: *mut F, row: usize) {
        let Self { cpu, sizes: Sizes { outputs, terms, .. }, accumulate, .. } = *self;
        let panel_words = words(terms) * PANEL;
        // Packed pairs fill an odd end up.
        let strip = terms.next_multiple_of(2) * STRIP;
        let (mut left, mut wide) = (cpu.buffer(rows.len() * terms), cpu.buffer(PANEL / STRIP * strip));
        let a = &self.a[rows.start * terms..rows.end * terms];
        cpu.set.run(
            #[inline(always)]
            || left.iter_mut().zip(a).for_each(|(left, &a)| *left = bf16::rounded(a)),
        );
        for (n, panel) in panels.enumerate() {
            cpu.set.run(
                #[inline(always)]
                || bf16::widen_panel(&self.b[panel * panel_words..][..panel_words], &mut wide),
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
                c_row: row,
                accumulate,
            };
            // SAFETY: the caller's.
            unsafe { cpu.set.gemm_at(product, to.wrapping_add(n * PANEL)) };
        }
    }
}

impl<F: Real, K: KernelSet<F>> Cpu<F, K> {
    /// `x [N,K] . w [M,K]^T` for each weight.
    pub(super) fn bf16_products(&self, x: &Array<F>, weights: &[&Array<F>]) -> Vec<Array<F>> {
        let (n, _) = x.matrix();
        let factors = weights.iter().map(|w| self.factor(x, w)).collect();
        let outputs = self.row_products(x, factors).into_iter().zip(weights);
        outputs.map(|(y, w)| self.array_of(&[n, w.matrix().0], y)).collect()
    }

    /// `d [N,M] . w [M,K]`, added to `onto`.
    pub(super) fn bf16_product_grad_x(&self, w: &Array<F>, d: &Array<F>, onto: Option<Array<F>>) -> Array<F> {
        let ((m, k), (n, dm)) = (w.matrix(), d.matrix());
        assert_eq!(m, dm, "gradient {:?} of a linear by {:?}", d.shape(), w.shape());
        let b = self.packed_panels_of_columns(w);
        let Some(mut sum) = onto else {
            let y = self.row_products(d, vec![(b, k)]).pop();
            return self.array_of(&[n, k], y.expect("one output of one product"));
        };
        assert_eq!(sum.matrix(), (n, k), "a gradient of {:?} beside one of [{n}, {k}]", sum.shape());
        match self.multiplies_words(n) {
            true => {
                let product = Words { accumulate: true, ..self.words(self.packed_rows(d), b, [n, m, k]) };
                self.place(&[product], &[Output::of(sum.data_mut())]);
            }
            false => {
                let product = Widened { accumulate: true, ..self.widened(d.data(), b, [n, m, k]) };
                self.place(&[product], &[Output::of(sum.data_mut())]);
            }
        }
        sum
    }

    /// What `x [N,K]` is multiplied by for `x . w [M,K]^T`: the packed panels and M.
    pub(super) fn factor<'a>(&self, x: &Array<F>, w: &'a Array<F>) -> (&'a [u32], usize) {
        let ((_, k), (m, wk)) = (x.matrix(), w.matrix());
        assert_eq!(k, wk, "linear of {:?} by {:?}", x.shape(), w.shape());
        (self.packed_panels_of_rows(w), m)
    }

    /// `base + x [N,K] . w [M,K]^T`.
    pub(super) fn bf16_linear_onto(&self, base: &Array<F>, x: &Array<F>, w: &Array<F>) -> Array<F> {
        if let Some(sum) = self.linear_onto_by_rows(base, x, w) {
            return sum;
        }
        let ((n, terms), (b, outputs)) = (x.matrix(), self.factor(x, w));
        match self.multiplies_words(n) {
            true => self.onto(base, self.words(self.packed_rows(x), b, [n, terms, outputs])),
            false => self.onto(base, self.widened(x.data(), b, [n, terms, outputs])),
        }
    }

    /// `x [N,terms]` times panels, each of so many columns.
    fn row_products(&self, x: &Array<F>, factors: Vec<(&[u32], usize)>) -> Vec<Lent<'_, F>> {
        let (n, terms) = x.matrix();
        if factors.is_empty() {
            return Vec::new();
        }
        match self.multiplies_words(n) {
            true => {
                let a = self.packed_rows(x);
                let products = factors.into_iter().map(|(b, outputs)| self.words(a, b, [n, terms, outputs]));
                self.products(&products.collect::<Vec<_>>())
            }
            false => {
                let products = factors.into_iter().map(|(b, outputs)| self.widened(x.data(), b, [n, terms, outputs]));
                self.products(&products.collect::<Vec<_>>())
            }
        }
    }

    /// Whether so many rows are multiplied as words.
    pub(super) fn multiplies_words(&self, n: usize) -> bool {
        self.set.pairs() || n < MANY
    }

    /// Packed rows `[n, terms]` times packed panels of `outputs` columns.
    pub(super) fn words<'a>(&self, a: &'a [u32], b: &'a [u32], [n, terms, outputs]: [usize; 3]) -> Words<'a, K> {
        let rows = (LEFT / words(terms).min(NEAR_WORDS)).clamp(ROWS, 4 * ROWS);
        Words { set: self.set, a, b, sizes: Sizes { n, outputs, terms, rows }, accumulate: false }
    }

    /// Rows `[n, terms]` times packed panels of `outputs` columns.
    fn widened<'a>(&'a self, a: &'a [F], b: &'a [u32], [n, terms, outputs]: [usize; 3]) -> Widened<'a, F, K> {
        Widened { cpu: self, a, b, sizes: Sizes { n, outputs, terms, rows: ROWS }, accumulate: false }
    }

    /// [`Ops::feed_forward`](crate::ops::Ops::feed_forward) from words to words; nothing where rows are multiplied as
    /// floats.
    pub(super) fn bf16_feed_forward(
        &self,
        base: &Array<F>,
        x: &Array<F>,
        [gate, up, down]: [&Array<F>; 3],
    ) -> Option<Array<F>> {
        let ((n, terms), (inner, _), (outputs, _)) = (x.matrix(), gate.matrix(), down.matrix());
        if !self.multiplies_words(n) {
            return None;
        }
        let [w_gate, w_up, w_down] = [gate, up, down].map(|w| self.packed_panels_of_rows(w));
        let row = words(inner);
        let mut hidden = self.home.words.lend(n * row);
        let to = Output::of(&mut hidden);
        let a = self.packed_rows(x);
        self.gated([w_gate, w_up].map(|w| self.words(a, w, [n, terms, inner])), |rows, columns, gated| {
            // SAFETY: these words of the rows are this block's alone.
            unsafe { self.place_words(gated, columns, to.at(rows.start * row), row) };
        });
        Some(self.onto(base, self.words(&hidden, w_down, [n, inner, outputs])))
    }

    /// Packs numbers `[..][columns]` to these columns of rows that begin at `to`, `row` words apart.
    ///
    /// # Safety
    /// The words of the columns must be valid for writes, and nobody else may use them.
    unsafe fn place_words(&self, numbers: &[F], columns: Range<usize>, to: *mut u32, row: usize) {
        let width = words(columns.len());
        let mut lines = self.home.words.lend(numbers.len() / columns.len() * width);
        self.set.pack(Packing::rows(numbers, columns.len()), &mut lines);
        for (n, line) in lines.chunks_exact(width).enumerate() {
            // SAFETY: the caller's.
            unsafe { to.add(n * row + columns.start / 2).copy_from_nonoverlapping(line.as_ptr(), width) };
        }
    }

    /// `d [N,M]^T . x [N,K]`, added to `onto`.
    pub(super) fn bf16_product_grad_w(&self, x: &Array<F>, d: &Array<F>, onto: Option<Array<F>>) -> Array<F> {
        let ((n, k), (dn, m)) = (x.matrix(), d.matrix());
        assert_eq!(n, dn, "gradient {:?} of a linear of {:?}", d.shape(), x.shape());
        let accumulate = onto.is_some();
        let mut dw = onto.unwrap_or_else(|| self.array_of(&[m, k], self.buffer(m * k)));
        assert_eq!(dw.matrix(), (m, k), "a gradient of {:?} beside one of [{m}, {k}]", dw.shape());
        match self.set.pairs() {
            true => self.word_product_of_columns(d, x, dw.data_mut(), accumulate),
            false => self.rounded_product_of_columns(d, x, dw.data_mut(), accumulate),
        }
        dw
    }

    /// `d^T . x` of packed columns: those of `x` are laid out once, those of `d` by the task that needs them.
    fn word_product_of_columns(&self, d: &Array<F>, x: &Array<F>, dw: &mut [F], accumulate: bool) {
        let ((_, m), (n, k)) = (d.matrix(), x.matrix());
        let (b, words) = (self.packed_panels_of_columns(x), words(n));
        let row = words + APART;
        // Rows that share the reading of x, where there are enough of them for every thread.
        let rows = m.div_ceil(2 * team::threads()).next_multiple_of(PANEL).min(TALL);
        team::each(dw.chunks_mut(rows * k).enumerate(), |(task, dw)| {
            let height = dw.len() / k;
            let mut left = self.home.words.lend(height * row);
            self.set.pack(Packing::Columns { x: d.data(), cols: m, first: task * rows, row }, &mut left);
            for first in (0..words).step_by(NEAR_WORDS) {
                let product = GemmBf16 {
                    m: height,
                    n: k,
                    words: NEAR_WORDS.min(words - first),
                    a: &left[first..],
                    a_row: row,
                    b: &b[first * PANEL..],
                    b_panel: words * PANEL,
                    c_row: k,
                    accumulate: accumulate || first > 0,
                };
                // SAFETY: the rows are this task's alone.
                unsafe { self.set.gemm_bf16(product, dw.as_mut_ptr()) };
            }
        });
    }

    /// `d^T . x` of rounded columns: those of `x` are laid out once, those of `d` by the task that needs them.
    fn rounded_product_of_columns(&self, d: &Array<F>, x: &Array<F>, dw: &mut [F], accumulate: bool) {
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
                            accumulate: accumulate || first > 0,
                        };
                        self.set.gemm(product, &mut dw[column..]);
                    }
                }
            }
        });
    }

    /// [`Packing::Rows`] of an array, made at first use.
    fn packed_rows<'a>(&self, x: &'a Array<F>) -> &'a [u32] {
        let (rows, cols) = x.matrix();
        x.packings().rows.get_or_init(|| {
            let mut packed = self.home.words.take(rows * words(cols));
            for_rows(&mut packed, words(cols), |first, block| {
                let x = &x.data()[first * cols..][..block.len() / words(cols) * cols];
                self.set.pack(Packing::rows(x, cols), block);
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
            PackedPanels::Recycled(packed)
        })
    }

    /// The same of a weight that is only read, to stay.
    pub(super) fn store_panels_of_rows(&self, w: &Array<F>) {
        w.packings().panels_of_rows.get_or_init(|| {
            let (rows, cols) = w.matrix();
            let mut packed = self.home.weights.room(rows.div_ceil(PANEL) * words(cols) * PANEL);
            self.pack_panels_of_rows(w, &mut packed);
            PackedPanels::Stored(packed.stored())
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
