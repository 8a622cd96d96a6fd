//! Scores and weighted values of one page for all query heads of a group.
//!
//! Both read the page as it lies in memory and widen its numbers in registers, so decoding moves no more bytes than the
//! cache has. [`Plain`] is the definition; [`Vectors`] computes the same with the vectors of an instruction set. A score is
//! one chain of additions over D, an output one chain over the slots, both in ascending order: the order of the register
//! tile, which prefill runs on widened pages.

use super::PAGE_SLOTS;
use super::load::Load;
use super::page::{Numbers, Page};
use crate::real::Real;
use std::marker::PhantomData;

/// How a page, or the one open slot, is attended to.
pub(crate) trait PageKernel<F: Real> {
    /// Scores `[rows][16]` of all 16 slots, rows `stride` apart, without masses, for queries `[rows][D]`.
    fn scores(page: &Page<'_, F>, dim: usize, q: &[F], to: (&mut [F], usize));

    /// Adds the first `used` values, times weights `[rows][used]` that are `stride` apart, to `out [rows][D]`.
    fn values(page: &Page<'_, F>, used: usize, weights: (&[F], usize), to: (&mut [F], usize));

    /// Score of one key for queries `[rows][D]`, rows `stride` apart.
    fn score(k: &[F], q: &[F], to: (&mut [F], usize));

    /// Adds one value, times weights that are `stride` apart, to `out [rows][D]`.
    fn value(v: &[F], weights: (&[F], usize), out: &mut [F]);
}

/// The definition, in plain loops.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plain;

impl<F: Real> PageKernel<F> for Plain {
    fn scores(page: &Page<'_, F>, dim: usize, q: &[F], (scores, stride): (&mut [F], usize)) {
        let scales = page.numbers.key_scales();
        for (q, scores) in q.chunks_exact(dim).zip(scores.chunks_mut(stride)) {
            for (lane, score) in scores[..PAGE_SLOTS].iter_mut().enumerate() {
                let terms = q.iter().enumerate();
                let sum = terms.fold(F::zero(), |sum, (d, &q)| sum + q * page.numbers.key(d, lane));
                *score = scales.map_or(sum, |scales| sum * scales[lane]);
            }
        }
    }

    fn values(page: &Page<'_, F>, used: usize, (weights, stride): (&[F], usize), (out, dim): (&mut [F], usize)) {
        let scales = page.numbers.value_scales();
        for (weights, out) in weights.chunks(stride).zip(out.chunks_exact_mut(dim)) {
            for (d, out) in out.iter_mut().enumerate() {
                for lane in 0..used {
                    let weight = scales.map_or(weights[lane], |scales| weights[lane] * scales[lane]);
                    *out += weight * page.numbers.value((d, dim), lane);
                }
            }
        }
    }

    fn score(k: &[F], q: &[F], (scores, stride): (&mut [F], usize)) {
        for (q, scores) in q.chunks_exact(k.len()).zip(scores.chunks_mut(stride)) {
            scores[0] = q.iter().zip(k).fold(F::zero(), |sum, (&q, &k)| sum + q * k);
        }
    }

    fn value(v: &[F], (weights, stride): (&[F], usize), out: &mut [F]) {
        for (weights, out) in weights.chunks(stride).zip(out.chunks_exact_mut(v.len())) {
            out.iter_mut().zip(v).for_each(|(out, &v)| *out += weights[0] * v);
        }
    }
}

/// With vectors of an instruction set, in a function that is compiled for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vectors<V>(PhantomData<V>);

/// Query heads that share a register's keys.
const ROWS: usize = 4;

impl<V: Load<f32> + Load<u32> + Load<i8>> PageKernel<f32> for Vectors<V> {
    #[inline(always)]
    fn scores(page: &Page<'_, f32>, dim: usize, q: &[f32], (scores, stride): (&mut [f32], usize)) {
        match page.numbers {
            Numbers::Floats(numbers) => scores_of::<V, f32>(numbers, dim, q, (scores, stride)),
            Numbers::Bf16(words) => scores_of::<V, u32>(words, dim, q, (scores, stride)),
            Numbers::Int8 { numbers, .. } => scores_of::<V, i8>(numbers, dim, q, (scores, stride)),
        }
        if let Some(scales) = page.numbers.key_scales() {
            for row in scores.chunks_mut(stride) {
                row.iter_mut().zip(&scales).for_each(|(score, scale)| *score *= scale);
            }
        }
    }

    #[inline(always)]
    fn values(page: &Page<'_, f32>, used: usize, (weights, stride): (&[f32], usize), (out, dim): (&mut [f32], usize)) {
        match page.numbers {
            Numbers::Floats(numbers) => values_of::<V, f32>(numbers, used, (weights, stride), (out, dim)),
            Numbers::Bf16(words) => values_of::<V, u32>(words, used, (weights, stride), (out, dim)),
            Numbers::Int8 { numbers, .. } => {
                let scales = page.numbers.value_scales().expect("int8 has scales");
                for (weights, out) in weights.chunks(stride * ROWS).zip(out.chunks_mut(ROWS * dim)) {
                    let mut scaled = [[0.0; PAGE_SLOTS]; ROWS];
                    for (row, scaled) in weights.chunks(stride).zip(&mut scaled) {
                        for (scaled, (weight, scale)) in scaled.iter_mut().zip(row.iter().zip(&scales)) {
                            *scaled = weight * scale;
                        }
                    }
                    values_of::<V, i8>(numbers, used, (scaled.as_flattened(), PAGE_SLOTS), (out, dim));
                }
            }
        }
    }

    #[inline(always)]
    fn score(k: &[f32], q: &[f32], (scores, stride): (&mut [f32], usize)) {
        for (q, scores) in q.chunks_exact(k.len()).zip(scores.chunks_mut(stride)) {
            // SAFETY: the machine has V's instruction set, and only one element is stored.
            unsafe {
                let mut sum = V::zero();
                for (&q, &k) in q.iter().zip(k) {
                    sum = V::splat(q).mul_add(V::splat(k), sum);
                }
                sum.store_part(scores.as_mut_ptr(), 1);
            }
        }
    }

    #[inline(always)]
    fn value(v: &[f32], weights: (&[f32], usize), out: &mut [f32]) {
        add_values::<V, f32>(v, 1, weights, (out, v.len()));
    }
}

/// Scores of a page's keys, the first numbers of it, for all rows of `q`.
#[inline(always)]
fn scores_of<V: Load<T>, T: Copy + Default>(keys: &[T], dim: usize, q: &[f32], (scores, stride): (&mut [f32], usize)) {
    assert!(PAGE_SLOTS.is_multiple_of(V::LANES) && V::LANES * 2 >= PAGE_SLOTS);
    assert!(dim.is_multiple_of(V::TERMS) && keys.len() >= dim / V::TERMS * PAGE_SLOTS);
    for (q, scores) in q.chunks(ROWS * dim).zip(scores.chunks_mut(ROWS * stride)) {
        let rows = q.len() / dim;
        assert!(rows * dim == q.len() && (rows - 1) * stride + PAGE_SLOTS <= scores.len());
        // SAFETY: `keys` has 16 of each of `dim` channels, `q` and `scores` have `rows` rows, as asserted.
        unsafe {
            let at = (keys.as_ptr(), dim, q.as_ptr(), scores.as_mut_ptr(), stride);
            match rows {
                1 => score_rows::<V, T, 1>(at),
                2 => score_rows::<V, T, 2>(at),
                3 => score_rows::<V, T, 3>(at),
                _ => score_rows::<V, T, ROWS>(at),
            }
        }
    }
}

/// # Safety
/// Keys `[dim][16]`, queries `[R][dim]`, and 16 scores for each of R rows, `stride` apart, must be at the pointers.
#[inline(always)]
unsafe fn score_rows<V: Load<T>, T: Copy + Default, const R: usize>(
    (keys, dim, q, scores, stride): (*const T, usize, *const f32, *mut f32, usize),
) {
    // SAFETY: the caller's.
    unsafe {
        let mut sums = [[V::zero(); 2]; R];
        for d in (0..dim).step_by(V::TERMS) {
            let key = keys.add(d / V::TERMS * PAGE_SLOTS);
            add_channel::<V, T, R, 0>(key, q.add(d), dim, &mut sums);
            if V::TERMS == 2 {
                add_channel::<V, T, R, 1>(key, q.add(d + 1), dim, &mut sums);
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (j, sum) in sums.iter().enumerate().take(PAGE_SLOTS / V::LANES) {
                sum.store(scores.add(r * stride + j * V::LANES));
            }
        }
    }
}

/// Adds what one channel gives to the scores of 16 keys.
///
/// # Safety
/// The channel of 16 keys, and of R queries that are `dim` apart, must be at the pointers.
#[inline(always)]
unsafe fn add_channel<V: Load<T>, T: Copy + Default, const R: usize, const TERM: usize>(
    key: *const T,
    q: *const f32,
    dim: usize,
    sums: &mut [[V; 2]; R],
) {
    let vectors = PAGE_SLOTS / V::LANES;
    // SAFETY: the caller's.
    unsafe {
        let mut k = [V::zero(); 2];
        for (j, k) in k.iter_mut().enumerate().take(vectors) {
            *k = V::widen::<TERM>(key.add(j * V::LANES));
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            let q = V::splat(*q.add(r * dim));
            for (sum, &k) in sums.iter_mut().zip(&k).take(vectors) {
                *sum = q.mul_add(k, *sum);
            }
        }
    }
}

/// Adds weighted values of a page, the second half of its numbers.
#[inline(always)]
fn values_of<V: Load<T>, T: Copy + Default>(
    numbers: &[T],
    used: usize,
    weights: (&[f32], usize),
    to: (&mut [f32], usize),
) {
    add_values::<V, T>(&numbers[PAGE_SLOTS / V::TERMS * to.1..], used, weights, to);
}

/// Adds the first `used` rows of `values [..][dim]`, weighted, to all rows of `out`; neighbouring rows share one where
/// neighbouring terms do.
#[inline(always)]
fn add_values<V: Load<T>, T: Copy + Default>(
    values: &[T],
    used: usize,
    (weights, stride): (&[f32], usize),
    (out, dim): (&mut [f32], usize),
) {
    assert!(values.len() >= used.div_ceil(V::TERMS) * dim);
    for (weights, out) in weights.chunks(ROWS * stride).zip(out.chunks_mut(ROWS * dim)) {
        let rows = out.len() / dim;
        assert!(rows * dim == out.len() && (rows - 1) * stride + used <= weights.len());
        let at =
            Weighted { values: values.as_ptr(), used, weights: weights.as_ptr(), stride, out: out.as_mut_ptr(), dim };
        // SAFETY: `values` has `used` rows, `weights` and `out` have `rows` rows, as asserted.
        unsafe {
            match rows {
                1 => at.rows::<V, 1>(),
                2 => at.rows::<V, 2>(),
                3 => at.rows::<V, 3>(),
                _ => at.rows::<V, ROWS>(),
            }
        }
    }
}

/// Where values are read and added.
struct Weighted<T> {
    values: *const T,
    used: usize,
    weights: *const f32,
    stride: usize,
    out: *mut f32,
    dim: usize,
}

impl<T: Copy + Default> Weighted<T> {
    /// # Safety
    /// `used` values of `dim` channels, R rows of `used` weights and R rows of `dim` outputs must be at the pointers.
    #[inline(always)]
    unsafe fn rows<V: Load<T>, const R: usize>(&self) {
        let mut from = 0;
        // As many sums at once as there are registers for.
        // SAFETY: the caller's; no column beyond `dim` is asked for.
        unsafe {
            if R == 1 {
                from = self.columns::<V, R, 8>(from);
            }
            if R == 2 {
                from = self.columns::<V, R, 4>(from);
            }
            if R <= 3 {
                from = self.columns::<V, R, 3>(from);
            }
            from = self.columns::<V, R, 2>(from);
            from = self.columns::<V, R, 1>(from);
            if from < self.dim {
                self.add::<V, R, 1>(from, self.dim - from);
            }
        }
    }

    /// Adds columns in blocks of N vectors from a column on, while there are so many; returns the first that is left.
    ///
    /// # Safety
    /// As [`Weighted::rows`].
    #[inline(always)]
    unsafe fn columns<V: Load<T>, const R: usize, const N: usize>(&self, mut from: usize) -> usize {
        while from + N * V::LANES <= self.dim {
            // SAFETY: the caller's, and there are N whole vectors.
            unsafe { self.add::<V, R, N>(from, V::LANES) };
            from += N * V::LANES;
        }
        from
    }

    /// Adds N vectors of columns, of which `lanes` lanes are.
    ///
    /// # Safety
    /// As [`Weighted::rows`], and there must be so many columns from `from` on.
    #[inline(always)]
    unsafe fn add<V: Load<T>, const R: usize, const N: usize>(&self, from: usize, lanes: usize) {
        let whole = lanes == V::LANES;
        // SAFETY: the caller's.
        unsafe {
            let out = |r: usize, j: usize| self.out.add(r * self.dim + from + j * V::LANES);
            let mut sums = [[V::zero(); N]; R];
            for (r, sums) in sums.iter_mut().enumerate() {
                for (j, sum) in sums.iter_mut().enumerate() {
                    *sum = if whole { V::load(out(r, j)) } else { V::load_part(out(r, j), lanes) };
                }
            }
            for slot in (0..self.used).step_by(V::TERMS) {
                self.add_slot::<V, R, N, 0>(slot, from, lanes, &mut sums);
                if V::TERMS == 2 && slot + 1 < self.used {
                    self.add_slot::<V, R, N, 1>(slot + 1, from, lanes, &mut sums);
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                for (j, sum) in sums.iter().enumerate() {
                    if whole { sum.store(out(r, j)) } else { sum.store_part(out(r, j), lanes) }
                }
            }
        }
    }

    /// Adds what one slot gives to N vectors of columns.
    ///
    /// # Safety
    /// As [`Weighted::add`]; the slot must be one of those in use, and term `TERM` of where it is.
    #[inline(always)]
    unsafe fn add_slot<V: Load<T>, const R: usize, const N: usize, const TERM: usize>(
        &self,
        slot: usize,
        from: usize,
        lanes: usize,
        sums: &mut [[V; N]; R],
    ) {
        // SAFETY: the caller's.
        unsafe {
            let weights: [V; R] = std::array::from_fn(|r| V::splat(*self.weights.add(r * self.stride + slot)));
            for j in 0..N {
                let value = self.values.add(slot / V::TERMS * self.dim + from + j * V::LANES);
                let value =
                    if lanes == V::LANES { V::widen::<TERM>(value) } else { V::widen_part::<TERM>(value, lanes) };
                for (sums, &weight) in sums.iter_mut().zip(&weights) {
                    sums[j] = weight.mul_add(value, sums[j]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aligned::Aligned;
    use crate::kernel_set::{Fast, KernelSet};
    use crate::paged::page::Half;
    use crate::paged::{CacheDType, PageLayout};
    use crate::simd::{Gemm, Level, STRIP};
    use proptest::prelude::*;
    #[cfg(target_arch = "x86_64")]
    use std::arch::x86_64::{__m256, __m512};

    /// A page, queries, and weights.
    #[derive(Debug)]
    struct Case {
        layout: PageLayout,
        page: Vec<f32>,
        rows: usize,
        used: usize,
        q: Vec<f32>,
        weights: Vec<f32>,
        out: Vec<f32>,
    }

    /// Distance between rows of scores.
    const STRIDE: usize = PAGE_SLOTS + 5;

    impl Case {
        fn new(layout: PageLayout, rows: usize, used: usize, seed: u64) -> Self {
            let noise = |i: usize| {
                let bits = seed.wrapping_add(i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
                (bits as f32 / 8_388_608.0) - 1.0
            };
            let dim = layout.dim;
            let fill = |from: usize, len: usize| (from..from + len).map(noise).collect::<Vec<f32>>();
            let mut page = vec![0.0; layout.floats::<f32>()];
            for lane in 0..PAGE_SLOTS {
                layout.write(&mut page, lane, (&fill(lane * dim, dim), &fill(5000 + lane * dim, dim)), None);
            }
            let (q, weights, out) = (fill(10_000, rows * dim), fill(20_000, rows * STRIDE), fill(30_000, rows * dim));
            Self { layout, page, rows, used, q, weights, out }
        }

        /// Scores and outputs, of the page and of a single slot.
        #[inline(always)]
        fn computed<P: PageKernel<f32>>(&self) -> [Vec<f32>; 4] {
            let (dim, page) = (self.layout.dim, self.layout.view(&self.page));
            let mut scores = [vec![0.0; self.rows * STRIDE], vec![0.0; self.rows * STRIDE]];
            let mut outs = [self.out.clone(), self.out.clone()];
            P::scores(&page, dim, &self.q, (&mut scores[0], STRIDE));
            P::score(&self.q[..dim], &self.q, (&mut scores[1], STRIDE));
            P::values(&page, self.used, (&self.weights, STRIDE), (&mut outs[0], dim));
            P::value(&self.q[..dim], (&self.weights, STRIDE), &mut outs[1]);
            let ([a, b], [c, d]) = (scores, outs);
            [a, b, c, d]
        }

        fn at_level(&self, level: Level) -> [Vec<f32>; 4] {
            match level {
                Level::Portable => level.run(
                    #[inline(always)]
                    || self.computed::<Vectors<[f32; 8]>>(),
                ),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => level.run(
                    #[inline(always)]
                    || self.computed::<Vectors<__m256>>(),
                ),
                #[cfg(target_arch = "x86_64")]
                _ => level.run(
                    #[inline(always)]
                    || self.computed::<Vectors<__m512>>(),
                ),
                #[cfg(not(target_arch = "x86_64"))]
                _ => unreachable!("not an x86-64 machine"),
            }
        }

        /// Scores and outputs of the page by the register tile on widened numbers, as prefill computes them.
        fn by_tile(&self, level: Level) -> [Vec<f32>; 2] {
            let (dim, rows, page) = (self.layout.dim, self.rows, self.layout.view(&self.page));
            let (mut scores, mut out, mut weights) = (vec![0.0; rows * STRIDE], self.out.clone(), self.weights.clone());
            let (mut keys, mut values) = (Aligned::default(), Aligned::default());
            let product = Gemm {
                m: rows,
                n: PAGE_SLOTS,
                k: dim,
                a: &self.q,
                a_row: dim,
                a_col: 1,
                b: page.floats(Half::Keys, dim, &mut keys),
                b_row: PAGE_SLOTS,
                b_strip: STRIP,
                c_row: STRIDE,
                accumulate: false,
            };
            Fast(level).gemm(product, &mut scores);
            let scaled = |rows: &mut [f32], scales: Option<[f32; PAGE_SLOTS]>| {
                for row in rows.chunks_mut(STRIDE) {
                    row.iter_mut().zip(scales.iter().flatten()).for_each(|(x, scale)| *x *= scale);
                }
            };
            scaled(&mut scores, page.numbers.key_scales());
            scaled(&mut weights, page.numbers.value_scales());
            let (n, k, b) = (dim, self.used, page.floats(Half::Values, dim, &mut values));
            let sum = Gemm { n, k, a: &weights, a_row: STRIDE, b, b_row: dim, c_row: dim, accumulate: true, ..product };
            Fast(level).gemm(sum, &mut out);
            [scores, out]
        }
    }

    proptest! {
        /// Every instruction set computes the definition, for every type, and what the register tile computes to the bit.
        #[test]
        fn vectors_compute_the_definition_and_what_prefill_computes(
            dim in prop::sample::select(vec![2usize, 4, 6, 8, 16, 20, 64, 80, 128]),
            dtype in prop::sample::select(CacheDType::ALL.to_vec()),
            rows in 1usize..10,
            used in 1usize..=PAGE_SLOTS,
            seed: u64,
        ) {
            let case = Case::new(PageLayout { dim, dtype, mass: false }, rows, used, seed);
            let wanted = case.computed::<Plain>();
            for level in Level::available() {
                let found = case.at_level(level);
                for (part, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
                    for (i, (found, wanted)) in found.iter().zip(wanted).enumerate() {
                        let close = (found - wanted).abs() <= 2e-6 * (dim as f32).max(16.0);
                        prop_assert!(close, "{level:?}, part {part}, element {i}: {found} {wanted}");
                    }
                }
                let [scores, out] = case.by_tile(level);
                prop_assert!(found[0] == scores && found[2] == out, "{level:?} differs from the tile");
            }
        }
    }
}
