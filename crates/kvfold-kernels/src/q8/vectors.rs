//! Products with 8-bit weights by the vectors of x86-64. A few rows at a time share what is loaded of a block.

use super::{Block, FOUR, GemmQ8, Part, TERMS};
use crate::simd::PANEL;
use std::arch::x86_64::*;

/// Computes all rows, so many at a time.
macro_rules! rows {
    ($few:ident, $g:expr, $c:expr) => {{
        let mut first = 0;
        while first < $g.m {
            // SAFETY: the rows are there, and the caller has the features.
            first += unsafe {
                match $g.m - first {
                    4.. => $few::<4>(&$g, first, $c),
                    2.. => $few::<2>(&$g, first, $c),
                    _ => $few::<1>(&$g, first, $c),
                }
            };
        }
    }};
}

/// The product by `vpmaddwd`: integers of 16 bits, two products at a time.
///
/// # Safety
/// As [`super::gemm_scalar`].
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2(g: GemmQ8<'_>, c: *mut f32) {
    rows!(avx2_rows, g, c);
}

/// The product by `vpdpbusd`: bytes, four products at a time.
///
/// # Safety
/// As [`super::gemm_scalar`].
#[target_feature(enable = "avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub(super) unsafe fn vnni(g: GemmQ8<'_>, c: *mut f32) {
    rows!(vnni_rows, g, c);
}

/// Some rows from the first one on; says how many.
///
/// # Safety
/// As [`super::gemm_scalar`], and there must be so many rows.
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_rows<const R: usize>(g: &GemmQ8<'_>, first: usize, c: *mut f32) -> usize {
    /// Outputs of a vector.
    const WIDE: usize = 8;
    let a: [&[Part]; R] = std::array::from_fn(|row| g.row(first + row));
    let mut sums = [[_mm256_setzero_ps(); PANEL / WIDE]; R];
    for (block, b) in g.b.iter().enumerate() {
        let integers: [[u64; TERMS / FOUR]; R] = std::array::from_fn(|row| words(&a[row][block]));
        for strip in 0..PANEL / WIDE {
            // Of outputs 0 to 3 and 4 to 7, sums of the first and of the last two of four terms.
            let mut products = [[_mm256_setzero_si256(); 2]; R];
            for (four, quants) in b.quants.iter().enumerate() {
                let quants: &[[u8; FOUR]; WIDE] = quants[strip * WIDE..].first_chunk().expect("a vector of the panel");
                // SAFETY: 32 bytes.
                let quants = unsafe { _mm256_loadu_si256(quants.as_ptr().cast()) };
                let (low, high) = (_mm256_castsi256_si128(quants), _mm256_extracti128_si256::<1>(quants));
                let quants = [_mm256_cvtepu8_epi16(low), _mm256_cvtepu8_epi16(high)];
                for (products, integers) in products.iter_mut().zip(&integers) {
                    let a = _mm256_set1_epi64x(integers[four] as i64);
                    for (sum, quants) in products.iter_mut().zip(quants) {
                        *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(a, quants));
                    }
                }
            }
            let of_output: &[u16; WIDE] = b.scales[strip * WIDE..].first_chunk().expect("a vector of the panel");
            // SAFETY: 16 bytes.
            let of_output = unsafe { _mm_loadu_si128(of_output.as_ptr().cast()) };
            let of_output = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(of_output)));
            for (row, (sums, products)) in sums.iter_mut().zip(products).enumerate() {
                let &Part { start, scale, .. } = &a[row][block];
                // Pairs of pairs are of outputs 0, 1, 4, 5 and 2, 3, 6, 7.
                let product = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_hadd_epi32(products[0], products[1]));
                let product = _mm256_cvtepi32_ps(_mm256_add_epi32(product, _mm256_set1_epi32(start)));
                sums[strip] = _mm256_fmadd_ps(product, _mm256_mul_ps(_mm256_set1_ps(scale), of_output), sums[strip]);
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        // SAFETY: vectors of floats are floats, and the caller vouches for the output.
        unsafe { g.write(c, first + row, &*sums.as_ptr().cast()) };
    }
    R
}

/// A row's integers in 16 bits, four to a word.
#[target_feature(enable = "avx2,fma")]
fn words(part: &Part) -> [u64; TERMS / FOUR] {
    let mut words = [0; TERMS / FOUR];
    let bytes = part.upper.iter().zip(&part.lower);
    for (word, (upper, lower)) in words.iter_mut().zip(bytes) {
        for (nth, (&upper, &lower)) in upper.iter().zip(lower).enumerate() {
            let integer = 256 * i64::from(upper) + i64::from(lower);
            *word |= u64::from(integer as u16) << (16 * nth);
        }
    }
    words
}

/// Some rows from the first one on; says how many.
///
/// # Safety
/// As [`super::gemm_scalar`], and there must be so many rows.
#[target_feature(enable = "avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn vnni_rows<const R: usize>(g: &GemmQ8<'_>, first: usize, c: *mut f32) -> usize {
    let a: [&[Part]; R] = std::array::from_fn(|row| g.row(first + row));
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    for (block, b) in g.b.iter().enumerate() {
        ask_for(b);
        let mut products = [[[_mm512_setzero_si512(); 2]; 2]; R];
        for (four, quants) in b.quants.iter().enumerate() {
            let [left, right] = halves(quants);
            // SAFETY: 64 bytes each.
            let quants = unsafe { [left, right].map(|half| _mm512_loadu_si512(half.as_ptr().cast())) };
            for (a, [upper, lower]) in a.iter().zip(&mut products) {
                for (bytes, sums) in [(&a[block].upper, upper), (&a[block].lower, lower)] {
                    let bytes = _mm512_set1_epi32(i32::from_le_bytes(bytes[four].map(|byte| byte as u8)));
                    for (sum, quants) in sums.iter_mut().zip(quants) {
                        *sum = _mm512_dpbusd_epi32(*sum, quants, bytes);
                    }
                }
            }
        }
        // SAFETY: 32 bytes each.
        let scales = unsafe { halves(&b.scales).map(|half| _mm256_loadu_si256(half.as_ptr().cast())) };
        let scales = scales.map(|half| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half))));
        for ((a, [upper, lower]), sums) in a.iter().zip(products).zip(&mut sums) {
            let &Part { start, scale, .. } = &a[block];
            for (half, sum) in sums.iter_mut().enumerate() {
                let lower = _mm512_add_epi32(lower[half], _mm512_set1_epi32(start));
                let product = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32::<8>(upper[half]), lower));
                *sum = _mm512_fmadd_ps(product, _mm512_mul_ps(_mm512_set1_ps(scale), scales[half]), *sum);
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        // SAFETY: vectors of floats are floats, and the caller vouches for the output.
        unsafe { g.write(c, first + row, &*sums.as_ptr().cast()) };
    }
    R
}

/// What the first and the last sixteen outputs of a panel have.
#[inline(always)]
fn halves<T>(panel: &[T; PANEL]) -> [&[T; PANEL / 2]; 2] {
    let [left, right] = panel.as_chunks().0 else { unreachable!("a panel is two halves") };
    [left, right]
}

/// Asks for the lines of the block some blocks after this one, which is the next panel's where this one ends: into the
/// second-level cache, which can wait for more lines at a time than the first.
#[inline(always)]
fn ask_for(block: &Block) {
    /// How far ahead.
    const AHEAD: usize = 8;
    let ahead = std::ptr::from_ref(block).wrapping_add(AHEAD).cast::<i8>();
    for line in (0..size_of::<Block>()).step_by(crate::aligned::CACHE_LINE) {
        // SAFETY: an address that need not be valid.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(line)) };
    }
}
