//! How queries, keys, values and their gradients are laid out for the products of attention, and multiplied.
//!
//! A block of scores is `[queries][KEYS]`, floats in either way. [`Floats`] multiplies everything as it is. [`Words`] rounds
//! every factor to bf16, the weights of values and the gradients of scores among them, and adds products up as floats: for
//! machines whose tiles multiply bf16 an order of magnitude faster than anything multiplies floats.

use super::KEYS;
use crate::aligned::Aligned;
use crate::bf16::{self, GemmBf16, words};
use crate::kernel_set::KernelSet;
use crate::pack::Packing;
use crate::real::Real;
use crate::simd::{Gemm, PANEL, STRIP};
use std::ops::Range;

/// A block of scores, or of their gradients: rows [`KEYS`] apart, of the keys `j0..j0 + width`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    /// First query.
    pub(super) i0: usize,
    pub(super) rows: usize,
    /// First key; a multiple of [`Factors::ALIGN`].
    pub(super) j0: usize,
    pub(super) width: usize,
}

/// Products of factors that are laid out in one way. All factors are `[T,D]`, tokens by channels; `size` is `(T, D)`.
pub(super) trait Factors<F: Real, K: KernelSet<F>> {
    /// What factors are made of.
    type Number: Copy;
    /// Queries of a block at most.
    const QUERIES: usize;
    /// What blocks of keys begin at multiples of.
    const ALIGN: usize;

    fn new(set: K) -> Self;

    /// As a left factor whose terms are channels.
    fn left(&self, x: Aligned<F>, size: (usize, usize)) -> Aligned<Self::Number>;

    /// As a right factor whose terms are channels.
    fn by_token(&self, x: &[F], size: (usize, usize)) -> Aligned<Self::Number>;

    /// As a right factor whose terms are tokens.
    fn by_channel(&self, x: &[F], size: (usize, usize)) -> Aligned<Self::Number>;

    /// `s = left . by_token^T` of a block.
    fn scores(&self, size: (usize, usize), block: Block, left: &[Self::Number], by_token: &[Self::Number], s: &mut [F]);

    /// Adds `s . by_channel` to `out [rows][D]`, sums over the block's keys.
    fn over_keys(&mut self, size: (usize, usize), block: Block, s: &[F], by_channel: &[Self::Number], out: &mut [F]);

    /// Adds `s^T . by_channel` to `out [width][D]`, sums over the block's queries.
    fn over_queries(&mut self, size: (usize, usize), block: Block, s: &[F], by_channel: &[Self::Number], out: &mut [F]);
}

/// Factors in the backend's floats, as strips of 16 columns.
#[derive(Debug)]
pub(super) struct Floats<K>(K);

impl<K> Floats<K> {
    /// A sum over the tokens from `first` on, whose rows of output are `a_row` apart in the left factor.
    fn over_tokens<'a, F>(
        (len, dim): (usize, usize),
        (m, k): (usize, usize),
        (a, a_row, a_col): (&'a [F], usize, usize),
        (b, first): (&'a [F], usize),
    ) -> Gemm<'a, F> {
        let b = &b[first * STRIP..];
        Gemm { m, n: dim, k, a, a_row, a_col, b, b_row: STRIP, b_strip: len * STRIP, c_row: dim, accumulate: true }
    }
}

impl<F: Real, K: KernelSet<F>> Factors<F, K> for Floats<K> {
    type Number = F;
    const QUERIES: usize = 48;
    const ALIGN: usize = STRIP;

    fn new(set: K) -> Self {
        Self(set)
    }

    fn left(&self, x: Aligned<F>, _: (usize, usize)) -> Aligned<F> {
        x
    }

    /// Strips of 16 tokens, `[T/16][D][16]`.
    fn by_token(&self, x: &[F], (len, dim): (usize, usize)) -> Aligned<F> {
        let mut strips = Aligned::new(len.div_ceil(STRIP) * dim * STRIP);
        for (strip, rows) in strips.chunks_exact_mut(dim * STRIP).zip(x.chunks(dim * STRIP)) {
            for (t, row) in rows.chunks_exact(dim).enumerate() {
                row.iter().enumerate().for_each(|(d, &x)| strip[d * STRIP + t] = x);
            }
        }
        strips
    }

    /// Strips of 16 channels, `[D/16][T][16]`.
    fn by_channel(&self, x: &[F], (len, dim): (usize, usize)) -> Aligned<F> {
        let mut strips = Aligned::new(dim.div_ceil(STRIP) * len * STRIP);
        for (n, strip) in strips.chunks_exact_mut(len * STRIP).enumerate() {
            let width = STRIP.min(dim - n * STRIP);
            for (to, row) in strip.chunks_exact_mut(STRIP).zip(x.chunks_exact(dim)) {
                to[..width].copy_from_slice(&row[n * STRIP..][..width]);
            }
        }
        strips
    }

    fn scores(&self, (_, dim): (usize, usize), block: Block, left: &[F], by_token: &[F], s: &mut [F]) {
        let product = Gemm {
            m: block.rows,
            n: block.width,
            k: dim,
            a: &left[block.i0 * dim..],
            a_row: dim,
            a_col: 1,
            b: &by_token[block.j0 * dim..],
            b_row: STRIP,
            b_strip: dim * STRIP,
            c_row: KEYS,
            accumulate: false,
        };
        self.0.gemm(product, s);
    }

    fn over_keys(&mut self, size: (usize, usize), block: Block, s: &[F], by_channel: &[F], out: &mut [F]) {
        let Block { rows, j0, width, .. } = block;
        self.0.gemm(Self::over_tokens(size, (rows, width), (s, KEYS, 1), (by_channel, j0)), out);
    }

    fn over_queries(&mut self, size: (usize, usize), block: Block, s: &[F], by_channel: &[F], out: &mut [F]) {
        let Block { i0, rows, width, .. } = block;
        self.0.gemm(Self::over_tokens(size, (width, rows), (s, 1, KEYS), (by_channel, i0)), out);
    }
}

/// Factors in bf16, packed as `bf16.rs` says.
#[derive(Debug)]
pub(super) struct Words<K> {
    set: K,
    /// A block of scores as a left factor.
    left: Aligned<u32>,
}

impl<K> Words<K> {
    /// A sum over tokens, two by two, for `m` rows of the left factor, which are `a_row` words apart.
    fn over_tokens<F: Real>(
        &self,
        (len, dim): (usize, usize),
        (m, a_row): (usize, usize),
        tokens: Range<usize>,
        by_channel: &[u32],
        out: &mut [F],
    ) where
        K: KernelSet<F>,
    {
        let product = GemmBf16 {
            m,
            n: dim,
            words: words(tokens.len()),
            a: &self.left,
            a_row,
            b: &by_channel[tokens.start / 2 * PANEL..],
            b_panel: bf16::words(len) * PANEL,
            c_row: dim,
            accumulate: true,
        };
        assert!(m * dim <= out.len(), "{m} rows of {dim} channels");
        // SAFETY: the rows lie inside the exclusive slice.
        unsafe { self.set.gemm_bf16(product, out.as_mut_ptr()) };
    }
}

impl<F: Real, K: KernelSet<F>> Factors<F, K> for Words<K> {
    type Number = u32;
    /// Pairs of tiles, and pairs of terms.
    const QUERIES: usize = 64;
    const ALIGN: usize = PANEL;

    fn new(set: K) -> Self {
        Self { set, left: Aligned::new(KEYS * KEYS / 2) }
    }

    fn left(&self, x: Aligned<F>, (len, dim): (usize, usize)) -> Aligned<u32> {
        let mut packed = Aligned::new(len * words(dim));
        self.set.pack(Packing::rows(&x, dim), &mut packed);
        packed
    }

    fn by_token(&self, x: &[F], (len, dim): (usize, usize)) -> Aligned<u32> {
        let panel = words(dim) * PANEL;
        let mut packed = Aligned::new(len.div_ceil(PANEL) * panel);
        for (panel, x) in packed.chunks_exact_mut(panel).zip(x.chunks(PANEL * dim)) {
            self.set.pack(Packing::PanelOfRows { x, cols: dim }, panel);
        }
        packed
    }

    fn by_channel(&self, x: &[F], (len, dim): (usize, usize)) -> Aligned<u32> {
        let mut packed = Aligned::new(dim.div_ceil(PANEL) * words(len) * PANEL);
        for (n, panel) in packed.chunks_exact_mut(words(len) * PANEL).enumerate() {
            self.set.pack(Packing::PanelOfColumns { x, cols: dim, first: n * PANEL }, panel);
        }
        packed
    }

    fn scores(&self, (_, dim): (usize, usize), block: Block, left: &[u32], by_token: &[u32], s: &mut [F]) {
        let words = words(dim);
        let product = GemmBf16 {
            m: block.rows,
            n: block.width,
            words,
            a: &left[block.i0 * words..],
            a_row: words,
            b: &by_token[block.j0 * words..],
            b_panel: words * PANEL,
            c_row: KEYS,
            accumulate: false,
        };
        assert!((block.rows - 1) * KEYS + block.width <= s.len(), "{block:?} does not fit");
        // SAFETY: the rows lie inside the exclusive slice.
        unsafe { self.set.gemm_bf16(product, s.as_mut_ptr()) };
    }

    fn over_keys(&mut self, size: (usize, usize), block: Block, s: &[F], by_channel: &[u32], out: &mut [F]) {
        let Block { rows, j0, width, .. } = block;
        // Whole rows at once: sums end at the width, an odd one's last word is made whole below.
        let left = &mut self.left[..rows * words(KEYS)];
        self.set.pack(Packing::rows(&s[..rows * KEYS], KEYS), left);
        if width % 2 == 1 {
            left.iter_mut().skip(width / 2).step_by(words(KEYS)).for_each(|word| *word &= 0xffff);
        }
        self.over_tokens(size, (rows, words(KEYS)), j0..j0 + width, by_channel, out);
    }

    fn over_queries(&mut self, size: (usize, usize), block: Block, s: &[F], by_channel: &[u32], out: &mut [F]) {
        let Block { i0, rows, width, .. } = block;
        let left = &mut self.left[..width * words(rows)];
        self.set.pack(Packing::Columns { x: &s[..rows * KEYS], cols: KEYS, first: 0, row: words(rows) }, left);
        self.over_tokens(size, (width, words(rows)), i0..i0 + rows, by_channel, out);
    }
}
