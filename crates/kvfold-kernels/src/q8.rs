//! Weights in 8 bits: 32 neighbouring terms of an output share a scale, and each is an integer from -127 to 127, as in
//! GGUF's Q8_0. The scale is a bf16, rounded up so that the largest term fits.
//!
//! Activations and sums stay floats. A weight is `scale * integer`, rounded to f32, and an output one chain of additions
//! over the terms in ascending order, whatever is computed beside it (promise I3).

use crate::bf16::widen;
use crate::real::Real;
use crate::simd::{Level, PANEL, Vector};
use crate::stored::{Store, Stored};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Terms that share a scale.
pub(crate) const BLOCK: usize = 32;

/// A weight `[M,K]` in panels of 32 outputs, the last one filled up with zeros.
#[derive(Debug)]
pub(crate) struct Panels {
    /// `[M/32][K][32]`.
    quants: Stored<i8>,
    /// bf16, `[M/32][K/32][32]`.
    scales: Stored<u16>,
    terms: usize,
}

/// One panel of a weight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Panel<'a> {
    quants: &'a [i8],
    scales: &'a [u16],
}

/// The smallest bf16 scale by which numbers up to `largest` become integers up to 127.
fn scale_of(largest: f32) -> u16 {
    ((largest / 127.0).to_bits().saturating_add(0xffff) >> 16) as u16
}

fn weight(quant: i8, scale: u16) -> f32 {
    f32::from(quant) * widen(u32::from(scale))
}

impl Panels {
    /// Quantises a row-major weight of `terms` columns. Numbers must be finite: loaders check that.
    pub(crate) fn of<F: Real>(data: &[F], terms: usize, memory: &Store) -> Self {
        let panels = data.len().div_ceil(terms * PANEL);
        let blocks = terms.div_ceil(BLOCK);
        let (mut quants, mut scales) = (memory.room(panels * terms * PANEL), memory.room(panels * blocks * PANEL));
        for (row, x) in data.chunks_exact(terms).enumerate() {
            let (panel, lane) = (row / PANEL, row % PANEL);
            for (block, x) in x.chunks(BLOCK).enumerate() {
                let scale = scale_of(x.iter().fold(0.0, |top, x| (x.f64() as f32).abs().max(top)));
                scales[(panel * blocks + block) * PANEL + lane] = scale;
                let inverse = if scale == 0 { 0.0 } else { 1.0 / widen(u32::from(scale)) };
                for (term, x) in (block * BLOCK..).zip(x) {
                    let quant = (x.f64() as f32 * inverse).round_ties_even().clamp(-127.0, 127.0);
                    quants[(panel * terms + term) * PANEL + lane] = quant as i8;
                }
            }
        }
        Self { quants: quants.stored(), scales: scales.stored(), terms }
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        size_of_val(&self.quants[..]) + size_of_val(&self.scales[..])
    }

    /// The panel of outputs from `32 * index` on.
    pub(crate) fn panel(&self, index: usize) -> Panel<'_> {
        let (quants, scales) = (self.terms * PANEL, self.terms.div_ceil(BLOCK) * PANEL);
        Panel { quants: &self.quants[index * quants..][..quants], scales: &self.scales[index * scales..][..scales] }
    }

    /// The terms of one output.
    pub(crate) fn row<F: Real>(&self, row: usize, to: &mut [F]) {
        let Panel { quants, scales } = self.panel(row / PANEL);
        for (term, to) in to.iter_mut().enumerate() {
            let at = |of: usize| of * PANEL + row % PANEL;
            *to = F::of(f64::from(weight(quants[at(term)], scales[at(term / BLOCK)])));
        }
    }
}

/// `c [m,n] = a [m,k] . panel [k,n]`; `n` is at most a panel.
#[derive(Clone, Copy, Debug)]
pub struct GemmQ8<'a, F> {
    /// Rows of the output.
    pub(crate) m: usize,
    /// Columns of the output, at most [`PANEL`].
    pub(crate) n: usize,
    /// Left factor, rows of `k` adjacent terms.
    pub(crate) a: &'a [F],
    /// Terms of each sum, and the distance between rows of `a`.
    pub(crate) k: usize,
    /// Right factor.
    pub(crate) b: Panel<'a>,
    /// Distance between the output's rows.
    pub(crate) c_row: usize,
}

impl<F> GemmQ8<'_, F> {
    /// Panics unless every element that the product reads lies inside its slice.
    fn check(&self) {
        let Panel { quants, scales } = self.b;
        assert!((1..=PANEL).contains(&self.n), "{} outputs of a panel", self.n);
        assert!(self.m * self.k <= self.a.len(), "a is too short");
        let fits = self.k * PANEL <= quants.len() && self.k.div_ceil(BLOCK) * PANEL <= scales.len();
        assert!(fits, "the panel is too short");
    }
}

/// The product in plain loops: the definition.
///
/// # Safety
/// Rows of `n` elements, `c_row` apart, must be valid at `c` for writes, and nobody else may use them.
pub(crate) unsafe fn gemm_scalar<F: Real>(g: GemmQ8<'_, F>, c: *mut F) {
    g.check();
    let of =
        |p: usize, j: usize| F::of(f64::from(weight(g.b.quants[p * PANEL + j], g.b.scales[p / BLOCK * PANEL + j])));
    for i in 0..g.m {
        for j in 0..g.n {
            let sum = (0..g.k).fold(F::zero(), |sum, p| sum + g.a[i * g.k + p] * of(p, j));
            // SAFETY: inside the rows that the caller vouches for.
            unsafe { *c.add(i * g.c_row + j) = sum };
        }
    }
}

/// The product with the vectors of an instruction set.
///
/// # Safety
/// As [`gemm_scalar`].
pub(crate) unsafe fn gemm(level: Level, g: GemmQ8<'_, f32>, c: *mut f32) {
    g.check();
    assert!(level <= Level::detect(), "{level:?} is not available on this machine");
    // SAFETY: `check` keeps every read inside the slices, the caller vouches for `c`, and the machine has the features.
    unsafe {
        match level {
            Level::Portable => tiles::<[f32; 8], 4, 2>(g, c),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => gemm_avx2(g, c),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx512Bf16 | Level::AmxBf16 => gemm_avx512(g, c),
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("not an x86-64 machine"),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn gemm_avx2(g: GemmQ8<'_, f32>, c: *mut f32) {
    // Few rows leave room for wide tiles only; more share the widening of fewer columns.
    // SAFETY: the caller's.
    unsafe {
        match g.m {
            ..3 => tiles::<__m256, 4, 2>(g, c),
            _ => tiles::<__m256, 2, 4>(g, c),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn gemm_avx512(g: GemmQ8<'_, f32>, c: *mut f32) {
    // SAFETY: the caller's.
    unsafe { tiles::<__m512, 2, 8>(g, c) }
}

/// Walks the output in tiles of up to `MR` rows and `NV` vectors.
///
/// # Safety
/// As [`gemm`], after [`GemmQ8::check`]; the machine must have `V`'s instruction set.
#[inline(always)]
unsafe fn tiles<V: Widen, const NV: usize, const MR: usize>(g: GemmQ8<'_, f32>, c: *mut f32) {
    // A vector set narrower than a panel takes it in strips.
    for strip in (0..g.n).step_by(NV * V::LANES) {
        let mut i = 0;
        while i < g.m {
            // SAFETY: no more rows than are left of the output.
            i += unsafe {
                match g.m - i {
                    rows if rows >= MR => tile::<V, NV, MR>(&g, (i, strip), c),
                    4.. => tile::<V, NV, 4>(&g, (i, strip), c),
                    2..4 => tile::<V, NV, 2>(&g, (i, strip), c),
                    _ => tile::<V, NV, 1>(&g, (i, strip), c),
                }
            };
        }
    }
}

/// Computes rows and columns from the first ones on; returns how many rows.
///
/// # Safety
/// As [`tiles`]; `MR` rows must be left, and `NV` vectors of the panel.
#[inline(always)]
unsafe fn tile<V: Widen, const NV: usize, const MR: usize>(
    g: &GemmQ8<'_, f32>,
    (row, column): (usize, usize),
    c: *mut f32,
) -> usize {
    // SAFETY: a panel's rows are whole, rows of `a` were checked, and `c` is touched in valid lanes only.
    unsafe {
        let (quants, a) = (g.b.quants.as_ptr().add(column), g.a.as_ptr().add(row * g.k));
        let mut acc = [[V::zero(); NV]; MR];
        for block in 0..g.k.div_ceil(BLOCK) {
            let scales = g.b.scales.as_ptr().add(block * PANEL + column);
            let scales: [V; NV] = std::array::from_fn(|j| V::of_bf16(scales.add(j * V::LANES)));
            for p in block * BLOCK..g.k.min((block + 1) * BLOCK) {
                let quant = |j: usize| V::of_i8(quants.add(p * PANEL + j * V::LANES));
                let b: [V; NV] = std::array::from_fn(|j| quant(j).times(scales[j]));
                for (i, row) in acc.iter_mut().enumerate() {
                    let a = V::splat(*a.add(i * g.k + p));
                    row.iter_mut().zip(&b).for_each(|(sum, &b)| *sum = a.mul_add(b, *sum));
                }
            }
        }
        for (i, sums) in acc.iter().enumerate() {
            for (j, &sum) in sums.iter().enumerate() {
                let valid = (g.n - column).saturating_sub(j * V::LANES).min(V::LANES);
                sum.store_part(c.wrapping_add((row + i) * g.c_row + column + j * V::LANES), valid);
            }
        }
    }
    MR
}

/// Vectors that widen smaller numbers.
///
/// # Safety
/// `of_i8` and `of_bf16` read as many numbers as the vector has lanes.
unsafe trait Widen: Vector {
    unsafe fn of_i8(p: *const i8) -> Self;
    unsafe fn of_bf16(p: *const u16) -> Self;
    unsafe fn times(self, b: Self) -> Self;
}

// SAFETY: reads as many numbers as there are lanes.
unsafe impl Widen for [f32; 8] {
    #[inline(always)]
    unsafe fn of_i8(p: *const i8) -> Self {
        // SAFETY: the caller's.
        unsafe { p.cast::<[i8; 8]>().read_unaligned() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn of_bf16(p: *const u16) -> Self {
        // SAFETY: the caller's.
        unsafe { p.cast::<[u16; 8]>().read_unaligned() }.map(|bits| widen(u32::from(bits)))
    }
    #[inline(always)]
    unsafe fn times(self, b: Self) -> Self {
        std::array::from_fn(|i| self[i] * b[i])
    }
}

#[cfg(target_arch = "x86_64")]
// SAFETY: reads as many numbers as there are lanes.
unsafe impl Widen for __m256 {
    #[inline(always)]
    unsafe fn of_i8(p: *const i8) -> Self {
        // SAFETY: the caller's, who has AVX2.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn of_bf16(p: *const u16) -> Self {
        // SAFETY: the caller's, who has AVX2.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))) }
    }
    #[inline(always)]
    unsafe fn times(self, b: Self) -> Self {
        // SAFETY: the caller has AVX2.
        unsafe { _mm256_mul_ps(self, b) }
    }
}

#[cfg(target_arch = "x86_64")]
// SAFETY: reads as many numbers as there are lanes.
unsafe impl Widen for __m512 {
    #[inline(always)]
    unsafe fn of_i8(p: *const i8) -> Self {
        // SAFETY: the caller's, who has AVX-512.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn of_bf16(p: *const u16) -> Self {
        // SAFETY: the caller's, who has AVX-512.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())))) }
    }
    #[inline(always)]
    unsafe fn times(self, b: Self) -> Self {
        // SAFETY: the caller has AVX-512.
        unsafe { _mm512_mul_ps(self, b) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn noise(seed: u64, i: usize) -> f32 {
        (crate::noise::unit(crate::noise::hash(&[seed, i as u64])) * 2.0 - 1.0) as f32
    }

    proptest! {
        /// A weight is off by half a step of its block's scale at most, and the largest is never cut off.
        #[test]
        fn quantised_weights_are_close(rows in 1usize..40, terms in 1usize..80, seed: u64) {
            let data: Vec<f32> = (0..rows * terms).map(|i| noise(seed, i) * noise(seed, i / BLOCK + 99_999)).collect();
            let panels = Panels::of(&data, terms, &Store::default());
            let mut row = vec![0.0f32; terms];
            for (r, data) in data.chunks_exact(terms).enumerate() {
                panels.row(r, &mut row);
                for (got, want) in row.chunks(BLOCK).zip(data.chunks(BLOCK)) {
                    let top = want.iter().fold(0.0f32, |top, x| x.abs().max(top));
                    let step = widen(u32::from(scale_of(top)));
                    prop_assert!(step * 127.0 >= top && step * 127.0 <= top * 1.01 + f32::MIN_POSITIVE);
                    got.iter().zip(want).for_each(|(got, want)| assert!((got - want).abs() <= 0.501 * step));
                }
            }
        }

        /// Every instruction set computes the definition, and a row the same bytes alone as among others.
        #[test]
        fn tiles_match_the_definition(m in 1usize..20, n in 1usize..33, k in 1usize..100, seed: u64) {
            let data: Vec<f32> = (0..n * k).map(|i| noise(seed, i)).collect();
            let a: Vec<f32> = (0..m * k).map(|i| noise(seed, i + 7000)).collect();
            let panels = Panels::of(&data, k, &Store::default());
            let g = GemmQ8 { m, n, a: &a, k, b: panels.panel(0), c_row: n };
            let mut expected = vec![0.0f32; m * n];
            // SAFETY: the output is as large as the product.
            unsafe { gemm_scalar(g, expected.as_mut_ptr()) };
            for level in Level::available() {
                let (mut c, mut alone) = (vec![0.0f32; m * n], vec![0.0f32; n]);
                // SAFETY: as above.
                unsafe { gemm(level, g, c.as_mut_ptr()) };
                for (got, want) in c.iter().zip(&expected) {
                    prop_assert!((got - want).abs() <= 1e-5 * (1.0 + k as f32).sqrt(), "{level:?}: {got} {want}");
                }
                for (row, c) in c.chunks_exact(n).enumerate() {
                    // SAFETY: one row of outputs.
                    unsafe { gemm(level, GemmQ8 { m: 1, a: &a[row * k..], ..g }, alone.as_mut_ptr()) };
                    prop_assert_eq!(c, &alone[..], "{:?}", level);
                }
            }
        }
    }
}
