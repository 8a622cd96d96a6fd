//! Products of bf16 operands with f32 sums.
//!
//! Operands are rounded to bf16 (to nearest, ties to even) and packed so that two neighbouring terms of a sum share a
//! 32-bit word, the lower term in the lower half (`pack.rs`). Each output is one chain of additions over the terms in ascending order, whatever
//! is computed beside it (promise I3). With `vdpbf16ps` a step of the chain takes two terms at once, with `tdpbf16ps`
//! 32 (see `amx.rs`); without, one by one, so instruction sets differ in rounding as they do in f32.

use crate::real::Real;
use crate::simd::{Level, PANEL, STRIP, Vector};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// The bits of the nearest bf16, ties to even; NaN stays NaN.
#[inline(always)]
pub(crate) fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { bits >> 16 | 0x40 } else { rounded }
}

/// The number that bf16 bits in the lower half of a word stand for.
#[inline(always)]
pub(crate) fn widen(bits: u32) -> f32 {
    f32::from_bits(bits << 16)
}

/// The nearest bf16 as a float.
#[inline(always)]
pub(crate) fn rounded<F: Real>(x: F) -> F {
    F::of(f64::from(widen(round(x.f64() as f32))))
}

/// The terms of packed words `[..][width]`, each row as two rows of its lower and of its upper terms: `[..][2][width]`.
#[inline(always)]
pub(crate) fn widen_rows<F: Real>(words: &[u32], width: usize, terms: &mut [F]) {
    let of = |bits: u32| F::of(f64::from(f32::from_bits(bits)));
    for (words, terms) in words.chunks_exact(width).zip(terms.chunks_exact_mut(2 * width)) {
        let (lower, upper) = terms.split_at_mut(width);
        lower.iter_mut().zip(words).for_each(|(term, word)| *term = of(word << 16));
        upper.iter_mut().zip(words).for_each(|(term, word)| *term = of(word & 0xffff_0000));
    }
}

/// A panel of packed words `[K/2][32]` as strips of terms, `[2][K][16]`, with K rounded up to an even number.
#[inline(always)]
pub(crate) fn widen_panel<F: Real>(words: &[u32], strips: &mut [F]) {
    let (left, right) = strips.split_at_mut(strips.len() / 2);
    let terms = left.chunks_exact_mut(2 * STRIP).zip(right.chunks_exact_mut(2 * STRIP));
    for (words, (left, right)) in words.chunks_exact(PANEL).zip(terms) {
        widen_rows(&words[..STRIP], STRIP, left);
        widen_rows(&words[STRIP..], STRIP, right);
    }
}

/// Two neighbouring terms as a word.
#[inline(always)]
pub(crate) fn pair<F: Real>(lower: F, upper: F) -> u32 {
    round(lower.f64() as f32) | round(upper.f64() as f32) << 16
}

/// Whether both terms of a word are finite.
#[inline(always)]
pub(crate) fn finite(word: u32) -> bool {
    const EXPONENT: u32 = 0x7f80;
    word & EXPONENT != EXPONENT && word >> 16 & EXPONENT != EXPONENT
}

/// Adds the products of two words' lower terms and of their upper ones.
#[inline(always)]
pub(crate) fn add_pair<F: Real>(sum: F, a: u32, b: u32) -> F {
    let of = |bits: u32| F::of(f64::from(widen(bits)));
    sum + of(a & 0xffff) * of(b & 0xffff) + of(a >> 16) * of(b >> 16)
}

/// Words of a row of `terms` terms.
pub(crate) fn words(terms: usize) -> usize {
    terms.div_ceil(2)
}

/// `c [m,n] (+)= a . b` on packed operands.
#[derive(Clone, Copy, Debug)]
pub struct GemmBf16<'a> {
    /// Rows of the output.
    pub m: usize,
    /// Columns of the output.
    pub n: usize,
    /// Words of each sum: two terms each.
    pub words: usize,
    /// Left factor.
    pub a: &'a [u32],
    /// Distance between its rows, in words.
    pub a_row: usize,
    /// Right factor: panels, `[words][32]` each.
    pub b: &'a [u32],
    /// Distance between them.
    pub b_panel: usize,
    /// Distance between the output's rows.
    pub c_row: usize,
    /// Adds to the output instead of replacing it.
    pub accumulate: bool,
}

impl GemmBf16<'_> {
    /// Panics unless every element that the product reads lies inside its slice.
    fn check(&self) {
        assert!(self.n > 0 && self.m > 0 && self.words > 0, "{} x {} outputs of {} words", self.m, self.n, self.words);
        assert!((self.m - 1) * self.a_row + self.words <= self.a.len(), "a is too short");
        assert!((self.n - 1) / PANEL * self.b_panel + self.words * PANEL <= self.b.len(), "b is too short");
    }
}

/// The product in plain loops: the definition. `c` is a pointer, since several threads may write columns of the same
/// rows.
///
/// # Safety
/// Rows of `n` elements, `c_row` apart, must be valid at `c` for reads and writes, and nobody else may use them.
pub(crate) unsafe fn gemm_scalar<F: Real>(g: GemmBf16<'_>, c: *mut F) {
    g.check();
    for i in 0..g.m {
        for j in 0..g.n {
            // SAFETY: inside the rows that the caller vouches for.
            let c = unsafe { &mut *c.add(i * g.c_row + j) };
            let start = if g.accumulate { *c } else { F::zero() };
            *c = (0..g.words).fold(start, |sum, p| {
                add_pair(sum, g.a[i * g.a_row + p], g.b[j / PANEL * g.b_panel + p * PANEL + j % PANEL])
            });
        }
    }
}

/// The product with the vectors of an instruction set.
///
/// # Safety
/// As [`gemm_scalar`].
pub(crate) unsafe fn gemm(level: Level, g: GemmBf16<'_>, c: *mut f32) {
    g.check();
    assert!(level <= Level::detect(), "{level:?} is not available on this machine");
    // SAFETY: `check` keeps every read inside the slices, the caller vouches for `c`, and the machine has the features.
    unsafe {
        match level {
            Level::Portable => tiles::<Portable, 4, 2>(g, c),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => gemm_avx2(g, c),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => gemm_avx512(g, c),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => gemm_avx512_bf16(g, c),
            #[cfg(target_arch = "x86_64")]
            Level::AmxBf16 => crate::amx::gemm(g, c),
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("not an x86-64 machine"),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn gemm_avx2(g: GemmBf16<'_>, c: *mut f32) {
    // Few rows leave room for wide tiles only; more share the widening of fewer columns.
    // SAFETY: the caller's.
    unsafe {
        match g.m {
            ..3 => tiles::<Avx2, 4, 2>(g, c),
            _ => tiles::<Avx2, 2, 4>(g, c),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn gemm_avx512(g: GemmBf16<'_>, c: *mut f32) {
    // SAFETY: the caller's.
    unsafe { tiles::<Avx512, 2, 8>(g, c) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn gemm_avx512_bf16(g: GemmBf16<'_>, c: *mut f32) {
    // SAFETY: the caller's.
    unsafe { tiles::<Avx512Bf16, 2, 12>(g, c) }
}

/// Walks the output in tiles of `MR` rows and `NV` vectors.
///
/// # Safety
/// As [`gemm`], after [`GemmBf16::check`]; the machine must have `V`'s instruction set.
#[inline(always)]
unsafe fn tiles<V: Dot, const NV: usize, const MR: usize>(g: GemmBf16<'_>, c: *mut f32) {
    // A vector set narrower than a panel takes it in strips.
    for strip in (0..g.n).step_by(NV * V::Sum::LANES) {
        let at = |i: usize| Tile {
            words: g.words,
            a: g.a[i * g.a_row..].as_ptr(),
            a_row: g.a_row,
            b: g.b[strip / PANEL * g.b_panel + strip % PANEL..].as_ptr(),
            c: c.wrapping_add(i * g.c_row + strip),
            c_row: g.c_row,
            cols: (g.n - strip).min(NV * V::Sum::LANES),
            accumulate: g.accumulate,
        };
        let mut i = 0;
        while i < g.m {
            // SAFETY: no more rows than are left of the output.
            i += unsafe {
                match g.m - i {
                    rows if rows >= MR => at(i).sum::<V, NV, MR>(),
                    8.. => at(i).sum::<V, NV, 8>(),
                    4..8 => at(i).sum::<V, NV, 4>(),
                    2..4 => at(i).sum::<V, NV, 2>(),
                    _ => at(i).sum::<V, NV, 1>(),
                }
            };
        }
    }
}

/// Where one tile reads and writes.
struct Tile {
    words: usize,
    a: *const u32,
    a_row: usize,
    b: *const u32,
    c: *mut f32,
    c_row: usize,
    cols: usize,
    accumulate: bool,
}

impl Tile {
    /// Computes the tile; returns its rows.
    ///
    /// # Safety
    /// `MR` rows must be readable at `a`, `words` rows of a panel at `b`, and `MR` rows of `cols` valid at `c`.
    #[inline(always)]
    unsafe fn sum<V: Dot, const NV: usize, const MR: usize>(self) -> usize {
        let valid = |j: usize| self.cols.saturating_sub(j * V::Sum::LANES).min(V::Sum::LANES);
        // SAFETY: a panel's rows are whole, and `c` is touched in `valid` lanes only; a vector with no valid lane may
        // begin beyond its array, so places are computed wrapping.
        unsafe {
            let mut acc = [[V::Sum::zero(); NV]; MR];
            if self.accumulate {
                for (i, row) in acc.iter_mut().enumerate() {
                    for (j, sum) in row.iter_mut().enumerate() {
                        *sum = V::Sum::load_part(self.c.wrapping_add(i * self.c_row + j * V::Sum::LANES), valid(j));
                    }
                }
            }
            for p in 0..self.words {
                let b: [V::Pairs; NV] = std::array::from_fn(|j| V::pairs(self.b.add(p * PANEL + j * V::Sum::LANES)));
                for (i, row) in acc.iter_mut().enumerate() {
                    let a = V::splat(*self.a.add(i * self.a_row + p));
                    for (sum, &b) in row.iter_mut().zip(&b) {
                        *sum = V::dot(*sum, a, b);
                    }
                }
            }
            for (i, row) in acc.iter().enumerate() {
                for (j, &sum) in row.iter().enumerate() {
                    sum.store_part(self.c.wrapping_add(i * self.c_row + j * V::Sum::LANES), valid(j));
                }
            }
        }
        MR
    }
}

/// Vectors of an instruction set: f32 sums, and words of two bf16 terms in the form that it multiplies.
///
/// # Safety
/// `pairs` reads as many words as a sum has lanes. An implementation must only be used where the machine has its
/// instruction set.
unsafe trait Dot {
    type Sum: Vector;
    type Pairs: Copy;
    unsafe fn pairs(p: *const u32) -> Self::Pairs;
    unsafe fn splat(word: u32) -> Self::Pairs;
    /// Adds the products of the lower terms and those of the upper ones.
    unsafe fn dot(sum: Self::Sum, a: Self::Pairs, b: Self::Pairs) -> Self::Sum;
}

struct Portable;

// SAFETY: reads as many words as the sum has lanes.
unsafe impl Dot for Portable {
    type Sum = [f32; 8];
    type Pairs = [u32; 8];
    #[inline(always)]
    unsafe fn pairs(p: *const u32) -> [u32; 8] {
        // SAFETY: the caller's.
        unsafe { p.cast::<[u32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat(word: u32) -> [u32; 8] {
        [word; 8]
    }
    #[inline(always)]
    unsafe fn dot(sum: [f32; 8], a: [u32; 8], b: [u32; 8]) -> [f32; 8] {
        let upper = |word: u32| f32::from_bits(word & 0xffff_0000);
        std::array::from_fn(|i| sum[i] + widen(a[i]) * widen(b[i]) + upper(a[i]) * upper(b[i]))
    }
}

/// Words as floats of their lower and of their upper terms.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Halves<V> {
    lower: V,
    upper: V,
}

#[cfg(target_arch = "x86_64")]
struct Avx2;

#[cfg(target_arch = "x86_64")]
impl Avx2 {
    /// # Safety
    /// The machine must have AVX2.
    #[inline(always)]
    unsafe fn halves(words: __m256i) -> Halves<__m256> {
        // SAFETY: the caller's.
        unsafe {
            Halves {
                lower: _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words)),
                upper: _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(-0x1_0000))),
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
// SAFETY: reads as many words as the sum has lanes.
unsafe impl Dot for Avx2 {
    type Sum = __m256;
    type Pairs = Halves<__m256>;
    #[inline(always)]
    unsafe fn pairs(p: *const u32) -> Halves<__m256> {
        // SAFETY: the caller's.
        unsafe { Self::halves(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn splat(word: u32) -> Halves<__m256> {
        // SAFETY: the caller has AVX2.
        unsafe { Self::halves(_mm256_set1_epi32(word as i32)) }
    }
    #[inline(always)]
    unsafe fn dot(sum: __m256, a: Halves<__m256>, b: Halves<__m256>) -> __m256 {
        // SAFETY: the caller has AVX2 and FMA.
        unsafe { _mm256_fmadd_ps(a.upper, b.upper, _mm256_fmadd_ps(a.lower, b.lower, sum)) }
    }
}

#[cfg(target_arch = "x86_64")]
struct Avx512;

#[cfg(target_arch = "x86_64")]
impl Avx512 {
    /// # Safety
    /// The machine must have AVX-512, and 16 words must be at the pointer.
    #[inline(always)]
    unsafe fn words(p: *const u32) -> __m512i {
        // SAFETY: the caller's.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    /// # Safety
    /// The machine must have AVX-512.
    #[inline(always)]
    unsafe fn halves(words: __m512i) -> Halves<__m512> {
        // SAFETY: the caller's.
        unsafe {
            Halves {
                lower: _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)),
                upper: _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-0x1_0000))),
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
// SAFETY: reads as many words as the sum has lanes.
unsafe impl Dot for Avx512 {
    type Sum = __m512;
    type Pairs = Halves<__m512>;
    #[inline(always)]
    unsafe fn pairs(p: *const u32) -> Halves<__m512> {
        // SAFETY: the caller's.
        unsafe { Self::halves(Self::words(p)) }
    }
    #[inline(always)]
    unsafe fn splat(word: u32) -> Halves<__m512> {
        // SAFETY: the caller has AVX-512.
        unsafe { Self::halves(_mm512_set1_epi32(word as i32)) }
    }
    #[inline(always)]
    unsafe fn dot(sum: __m512, a: Halves<__m512>, b: Halves<__m512>) -> __m512 {
        // SAFETY: the caller has AVX-512.
        unsafe { _mm512_fmadd_ps(a.upper, b.upper, _mm512_fmadd_ps(a.lower, b.lower, sum)) }
    }
}

#[cfg(target_arch = "x86_64")]
struct Avx512Bf16;

#[cfg(target_arch = "x86_64")]
// SAFETY: as for `Avx512`.
unsafe impl Dot for Avx512Bf16 {
    type Sum = __m512;
    type Pairs = __m512bh;
    #[inline(always)]
    unsafe fn pairs(p: *const u32) -> __m512bh {
        // SAFETY: as above.
        unsafe { std::mem::transmute(Avx512::words(p)) }
    }
    #[inline(always)]
    unsafe fn splat(word: u32) -> __m512bh {
        // SAFETY: as above.
        unsafe { std::mem::transmute(_mm512_set1_epi32(word as i32)) }
    }
    #[inline(always)]
    unsafe fn dot(sum: __m512, a: __m512bh, b: __m512bh) -> __m512 {
        // SAFETY: the caller has AVX512-BF16.
        unsafe { _mm512_dpbf16_ps(sum, a, b) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::{Packing, pack};
    use proptest::prelude::*;

    fn noise(seed: u64, i: usize) -> f32 {
        (crate::noise::unit(crate::noise::hash(&[seed, i as u64])) * 2.0 - 1.0) as f32
    }

    proptest! {
        /// Every instruction set computes the definition, for odd sizes, in both modes.
        #[test]
        fn tiles_match_the_definition(m in 1usize..70, n in 1usize..100, k in 1usize..70, pad in 0usize..3, accumulate: bool, seed: u64) {
            let mut a = vec![0; m * words(k)];
            let x: Vec<f32> = (0..m * k).map(|i| noise(seed, i)).collect();
            pack(Level::Portable, Packing::rows(&x, k), &mut a);
            let y: Vec<f32> = (0..n * k).map(|i| noise(seed ^ 1, i)).collect();
            let b_panel = words(k) * PANEL;
            let mut b = vec![7; n.div_ceil(PANEL) * b_panel];
            b.chunks_mut(b_panel).zip(y.chunks(PANEL * k)).for_each(|(panel, x)| pack(Level::Portable, Packing::PanelOfRows { x, cols: k }, panel));
            let start: Vec<f32> = (0..m * (n + pad)).map(|i| noise(seed ^ 2, i)).collect();
            let g = GemmBf16 { m, n, words: words(k), a: &a, a_row: words(k), b: &b, b_panel: words(k) * PANEL, c_row: n + pad, accumulate };
            let mut expected: Vec<f64> = start.iter().map(|&x| f64::from(x)).collect();
            // SAFETY: `expected` has m rows of n + pad elements.
            unsafe { gemm_scalar(g, expected.as_mut_ptr()) };
            for level in Level::available() {
                let mut c = start.clone();
                // SAFETY: `c` has m rows of n + pad elements.
                unsafe { gemm(level, g, c.as_mut_ptr()) };
                for (i, (&got, &want)) in c.iter().zip(&expected).enumerate() {
                    prop_assert!((f64::from(got) - want).abs() <= 1e-6 * (1.0 + k as f64).sqrt(), "{level:?} element {i}: {got} {want}");
                }
            }
        }

        #[test]
        fn an_output_does_not_depend_on_its_neighbours(m in 2usize..40, k in 1usize..60, seed: u64) {
            let x: Vec<f32> = (0..m * k).map(|i| noise(seed, i)).collect();
            let y: Vec<f32> = (0..PANEL * k).map(|i| noise(seed ^ 1, i)).collect();
            let (mut a, mut b) = (vec![0; m * words(k)], vec![0; words(k) * PANEL]);
            pack(Level::Portable, Packing::rows(&x, k), &mut a);
            pack(Level::Portable, Packing::PanelOfRows { x: &y, cols: k }, &mut b);
            for level in Level::available() {
                let all = GemmBf16 { m, n: PANEL, words: words(k), a: &a, a_row: words(k), b: &b, b_panel: words(k) * PANEL, c_row: PANEL, accumulate: false };
                let mut together = vec![0.0; m * PANEL];
                // SAFETY: m rows of a panel.
                unsafe { gemm(level, all, together.as_mut_ptr()) };
                for r in 0..m {
                    let mut alone = vec![0.0; PANEL];
                    // SAFETY: one row of a panel.
                    unsafe { gemm(level, GemmBf16 { m: 1, a: &a[r * words(k)..], ..all }, alone.as_mut_ptr()) };
                    prop_assert_eq!(&alone[..], &together[r * PANEL..][..PANEL]);
                }
            }
        }
    }

    #[test]
    fn rounding_is_to_nearest_with_ties_to_even() {
        for (x, want) in [(1.0, 1.0), (1.0 + 0.00390625, 1.0), (1.0 + 3.0 * 0.00390625, 1.015625), (-0.0, -0.0)] {
            assert_eq!(widen(round(x)).to_bits(), f32::to_bits(want), "{x}");
        }
        assert_eq!(widen(round(f32::MAX)), f32::INFINITY);
        assert!(widen(round(f32::NAN)).is_nan() && widen(round(f32::from_bits(0x7f80_0001))).is_nan());
    }
}
