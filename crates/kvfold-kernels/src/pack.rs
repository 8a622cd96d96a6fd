//! Packing to words of two bf16 terms.
//!
//! All products of a layer, forward and backward, read four packings of a row-major matrix `[R, C]`:
//!
//! | packing | words | reads as |
//! |---|---|---|
//! | [`Packing::Rows`] | `[R][C/2]` | left factor, terms along the columns |
//! | [`Packing::PanelOfRows`] | `[R/32][C/2][32]` | right factor, outputs are the rows, terms along the columns |
//! | [`Packing::Columns`] | `[C][R/2]` | left factor, outputs are the columns, terms along the rows |
//! | [`Packing::PanelOfColumns`] | `[C/32][R/2][32]` | right factor, outputs are the columns, terms along the rows |
//!
//! Odd ends are filled up with zeros. Everything is made of squares of 16 x 16 words, or lines of 16: rounded, and where
//! rows become columns exchanged, in registers.

use crate::bf16::{pair, words};
use crate::real::Real;
use crate::simd::{Level, PANEL};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// What is packed: rows of `cols` numbers.
#[derive(Clone, Copy, Debug)]
pub enum Packing<'a, F> {
    /// Rows as `[..][C/2]`.
    Rows {
        /// `[.., C]`.
        x: &'a [F],
        /// C.
        cols: usize,
        /// Words from one row of the packing to the next; those beyond C/2 are left as they are.
        row: usize,
    },
    /// Up to 32 rows as one panel `[C/2][32]`.
    PanelOfRows {
        /// `[.., C]`.
        x: &'a [F],
        /// C.
        cols: usize,
    },
    /// Columns from `first` on as rows `[..][R/2]`, as many as there is room for.
    Columns {
        /// `[R, C]`.
        x: &'a [F],
        /// C.
        cols: usize,
        /// The first of them.
        first: usize,
        /// Words from one row of the packing to the next; those beyond R/2 are left as they are.
        row: usize,
    },
    /// Up to 32 columns from `first` on as one panel `[R/2][32]`.
    PanelOfColumns {
        /// `[R, C]`.
        x: &'a [F],
        /// C.
        cols: usize,
        /// The first of them.
        first: usize,
    },
}

impl<'a, F> Packing<'a, F> {
    /// [`Packing::Rows`] that follow each other.
    pub fn rows(x: &'a [F], cols: usize) -> Self {
        Self::Rows { x, cols, row: words(cols) }
    }
}

/// Rows and columns of a square of words, and words of a line.
const SQUARE: usize = 16;
/// Neighbouring terms that a line holds.
pub(crate) const TERMS: usize = 2 * SQUARE;

pub(crate) type Line = [u32; SQUARE];
pub(crate) type Square = [Line; SQUARE];

/// How lines and squares are made.
///
/// # Safety
/// An implementation must only be used where the machine has its instruction set.
pub(crate) unsafe trait Packer<F: Real> {
    /// Words of lower and of upper terms.
    fn pairs(lower: &[F; SQUARE], upper: &[F; SQUARE]) -> Line;

    /// Words of neighbouring terms.
    fn neighbours(terms: &[F; TERMS]) -> Line;

    /// Exchanges rows and columns.
    fn transposed(square: &Square) -> Square;
}

/// Packs with the vectors of an instruction set.
pub(crate) fn pack(level: Level, packing: Packing<'_, f32>, out: &mut [u32]) {
    assert!(level <= Level::detect(), "{level:?} is not available on this machine");
    match level {
        Level::Portable | Level::Avx2 => level.run(
            #[inline(always)]
            || with::<f32, Plain>(packing, out),
        ),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => level.run(
            #[inline(always)]
            || with::<f32, Avx512>(packing, out),
        ),
        // SAFETY: the machine has the level's instruction set.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 | Level::AmxBf16 => unsafe { pack_avx512_bf16(packing, out) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("not an x86-64 machine"),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn pack_avx512_bf16(packing: Packing<'_, f32>, out: &mut [u32]) {
    with::<f32, Avx512Bf16>(packing, out);
}

/// Packs by the definition.
pub(crate) fn pack_scalar<F: Real>(packing: Packing<'_, F>, out: &mut [u32]) {
    with::<F, Plain>(packing, out);
}

#[inline(always)]
fn with<F: Real, P: Packer<F>>(packing: Packing<'_, F>, out: &mut [u32]) {
    match packing {
        Packing::Rows { x, cols, row } => rows::<F, P>(x, cols, row, out),
        Packing::PanelOfRows { x, cols } => panel_of_rows::<F, P>(x, cols, out),
        Packing::Columns { x, cols, first, row } => columns::<F, P>(x, cols, first, row, out),
        Packing::PanelOfColumns { x, cols, first } => panel_of_columns::<F, P>(x, cols, first, out),
    }
}

/// The `N` first numbers, and zeros where there are fewer; without a copy of what the compiler knows to be whole.
#[inline(always)]
fn filled<F: Real, const N: usize>(x: &[F]) -> [F; N] {
    match x.first_chunk() {
        Some(whole) => *whole,
        None => std::array::from_fn(|i| x.get(i).copied().unwrap_or(F::zero())),
    }
}

#[inline(always)]
fn rows<F: Real, P: Packer<F>>(x: &[F], cols: usize, row: usize, out: &mut [u32]) {
    for (x, out) in x.chunks_exact(cols).zip(out.chunks_mut(row)) {
        let (whole, rest) = x.as_chunks::<TERMS>();
        let (to, to_rest) = out[..words(cols)].split_at_mut(whole.len() * SQUARE);
        to.as_chunks_mut().0.iter_mut().zip(whole).for_each(|(to, terms)| *to = P::neighbours(terms));
        if !rest.is_empty() {
            to_rest.copy_from_slice(&P::neighbours(&filled(rest))[..to_rest.len()]);
        }
    }
}

#[inline(always)]
fn panel_of_rows<F: Real, P: Packer<F>>(x: &[F], cols: usize, panel: &mut [u32]) {
    for half in 0..PANEL / SQUARE {
        let x = x.get(half * SQUARE * cols..).unwrap_or_default();
        for (n, panel) in panel.chunks_mut(SQUARE * PANEL).enumerate() {
            let mut square = [[0; SQUARE]; SQUARE];
            for (line, row) in square.iter_mut().zip(x.chunks_exact(cols)) {
                *line = P::neighbours(&filled(&row[n * TERMS..]));
            }
            for (to, line) in panel.chunks_exact_mut(PANEL).zip(P::transposed(&square)) {
                to[half * SQUARE..][..SQUARE].copy_from_slice(&line);
            }
        }
    }
}

/// Words of 16 columns from `first` on of two rows, of which the second may be missing; zeros beyond `width` columns.
#[inline(always)]
fn two_rows<F: Real, P: Packer<F>>(two: &[F], cols: usize, first: usize, width: usize) -> Line {
    let of_row = |row: usize| {
        let row = two.get(row * cols + first..).unwrap_or_default();
        filled(if width < SQUARE { &row[..width.min(row.len())] } else { row })
    };
    P::pairs(&of_row(0), &of_row(1))
}

#[inline(always)]
fn columns<F: Real, P: Packer<F>>(x: &[F], cols: usize, first: usize, row: usize, out: &mut [u32]) {
    let words = words(x.len() / cols);
    for (strip, out) in out.chunks_mut(SQUARE * row).enumerate() {
        let (first, width) = (first + strip * SQUARE, out.len() / row);
        for (at, rows) in (0..words).step_by(SQUARE).zip(x.chunks(2 * SQUARE * cols)) {
            let mut square = [[0; SQUARE]; SQUARE];
            for (line, two) in square.iter_mut().zip(rows.chunks(2 * cols)) {
                *line = two_rows::<F, P>(two, cols, first, width);
            }
            let count = SQUARE.min(words - at);
            for (column, line) in out.chunks_exact_mut(row).zip(P::transposed(&square)) {
                column[at..at + count].copy_from_slice(&line[..count]);
            }
        }
    }
}

#[inline(always)]
fn panel_of_columns<F: Real, P: Packer<F>>(x: &[F], cols: usize, first: usize, panel: &mut [u32]) {
    for (two, words) in x.chunks(2 * cols).zip(panel.chunks_exact_mut(PANEL)) {
        for (n, words) in words.as_chunks_mut::<SQUARE>().0.iter_mut().enumerate() {
            let first = first + n * SQUARE;
            *words = two_rows::<F, P>(two, cols, first.min(cols), cols.saturating_sub(first).min(SQUARE));
        }
    }
}

/// The definition.
pub(crate) struct Plain;

// SAFETY: needs nothing.
unsafe impl<F: Real> Packer<F> for Plain {
    #[inline(always)]
    fn pairs(lower: &[F; SQUARE], upper: &[F; SQUARE]) -> Line {
        std::array::from_fn(|i| pair(lower[i], upper[i]))
    }

    #[inline(always)]
    fn neighbours(terms: &[F; TERMS]) -> Line {
        std::array::from_fn(|i| pair(terms[2 * i], terms[2 * i + 1]))
    }

    #[inline(always)]
    fn transposed(square: &Square) -> Square {
        std::array::from_fn(|i| std::array::from_fn(|j| square[j][i]))
    }
}

/// Squares in registers.
#[cfg(target_arch = "x86_64")]
struct Avx512;

#[cfg(target_arch = "x86_64")]
// SAFETY: as the trait says.
unsafe impl Packer<f32> for Avx512 {
    #[inline(always)]
    fn pairs(lower: &[f32; SQUARE], upper: &[f32; SQUARE]) -> Line {
        Plain::pairs(lower, upper)
    }

    #[inline(always)]
    fn neighbours(terms: &[f32; TERMS]) -> Line {
        Plain::neighbours(terms)
    }

    #[inline(always)]
    fn transposed(square: &Square) -> Square {
        // SAFETY: the user has AVX-512, and registers are 16 words of any content.
        unsafe {
            let lines = std::mem::transmute::<Square, [__m512i; SQUARE]>(*square);
            std::mem::transmute::<[__m512i; SQUARE], Square>(transpose_avx512(lines))
        }
    }
}

/// Squares in registers, and terms that the machine rounds. It takes numbers below the smallest normal one for zero.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Avx512Bf16;

#[cfg(target_arch = "x86_64")]
// SAFETY: as the trait says.
unsafe impl Packer<f32> for Avx512Bf16 {
    #[inline(always)]
    fn pairs(lower: &[f32; SQUARE], upper: &[f32; SQUARE]) -> Line {
        // SAFETY: the user has AVX512-BF16 and AVX512-BW, and registers are 16 words of any content.
        unsafe {
            let (lower, upper) = (_mm512_loadu_ps(lower.as_ptr()), _mm512_loadu_ps(upper.as_ptr()));
            let words =
                |x: __m512| _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x)));
            let both = _mm512_or_si512(words(lower), _mm512_slli_epi32::<16>(words(upper)));
            std::mem::transmute::<__m512i, Line>(both)
        }
    }

    #[inline(always)]
    fn neighbours(terms: &[f32; TERMS]) -> Line {
        // SAFETY: the user has AVX512-BF16, and there are 32 terms.
        unsafe {
            let (first, second) = (_mm512_loadu_ps(terms.as_ptr()), _mm512_loadu_ps(terms.as_ptr().add(SQUARE)));
            std::mem::transmute::<__m512bh, Line>(_mm512_cvtne2ps_pbh(second, first))
        }
    }

    #[inline(always)]
    fn transposed(square: &Square) -> Square {
        Avx512::transposed(square)
    }
}

/// Pairs of lines first, then of pairs, then the quarters of registers.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn transpose_avx512(lines: [__m512i; SQUARE]) -> [__m512i; SQUARE] {
    const EVEN: i32 = 0b10_00_10_00;
    const ODD: i32 = 0b11_01_11_01;
    let pairs: [__m512i; SQUARE] = std::array::from_fn(|i| {
        let (x, y) = (lines[i & !1], lines[i | 1]);
        if i & 1 == 0 { _mm512_unpacklo_epi32(x, y) } else { _mm512_unpackhi_epi32(x, y) }
    });
    // Line 4 i + j holds column j of each quarter, of lines 4 i to 4 i + 3.
    let fours: [__m512i; SQUARE] = std::array::from_fn(|i| {
        let (x, y) = (pairs[i & !3 | i >> 1 & 1], pairs[i & !3 | 2 | i >> 1 & 1]);
        if i & 1 == 0 { _mm512_unpacklo_epi64(x, y) } else { _mm512_unpackhi_epi64(x, y) }
    });
    // The even quarters of two lines, or the odd ones.
    let halves: [__m512i; SQUARE] = std::array::from_fn(|i| {
        let (x, y) = (fours[i & !4], fours[i | 4]);
        if i & 4 == 0 { _mm512_shuffle_i32x4::<EVEN>(x, y) } else { _mm512_shuffle_i32x4::<ODD>(x, y) }
    });
    std::array::from_fn(|i| {
        let (x, y) = (halves[i & !8], halves[i | 8]);
        if i & 8 == 0 { _mm512_shuffle_i32x4::<EVEN>(x, y) } else { _mm512_shuffle_i32x4::<ODD>(x, y) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise;
    use proptest::prelude::*;

    fn numbers(seed: u64, len: usize) -> Vec<f32> {
        (0..len).map(|i| (noise::unit(noise::hash(&[seed, i as u64])) * 2.0 - 1.0) as f32).collect()
    }

    fn transposed(x: &[f32], cols: usize) -> Vec<f32> {
        let rows = x.len() / cols;
        (0..x.len()).map(|i| x[i % rows * cols + i / rows]).collect()
    }

    /// Packings of every instruction set, which must fill their outputs.
    fn packed(packing: Packing<'_, f32>, len: usize) -> Vec<(Level, Vec<u32>)> {
        let of_level = |level| {
            let mut out = vec![7; len];
            pack(level, packing, &mut out);
            (level, out)
        };
        Level::available().into_iter().map(of_level).collect()
    }

    proptest! {
        /// Words of rows are pairs of neighbours, and the other packings the same words elsewhere.
        #[test]
        fn every_packing_has_the_words_of_rows(r in 1usize..80, c in 1usize..80, at in 0.0..1.0, apart in 0usize..20, seed: u64) {
            let x = numbers(seed, r * c);
            let mut rows = Vec::new();
            for row in x.chunks(c) {
                rows.extend(row.chunks(2).map(|two| pair(two[0], two.get(1).copied().unwrap_or(0.0))));
            }
            let row = words(c) + apart;
            for (level, found) in packed(Packing::Rows { x: &x, cols: c, row }, r * row) {
                let near: Vec<u32> = found.chunks(row).flat_map(|row| &row[..words(c)]).copied().collect();
                prop_assert_eq!(&near, &rows, "{:?}", level);
                prop_assert!(found.chunks(row).all(|row| row[words(c)..].iter().all(|&word| word == 7)), "{:?}", level);
            }
            // Of rows, and of the columns of the transposed.
            let (few, first) = (r.min(PANEL), (at * c as f64) as usize);
            let panel: Vec<u32> = (0..words(c) * PANEL)
                .map(|i| if i % PANEL < few { rows[i % PANEL * words(c) + i / PANEL] } else { 0 })
                .collect();
            let turned = transposed(&x[..few * c], c);
            let of_rows = packed(Packing::PanelOfRows { x: &x[..few * c], cols: c }, panel.len());
            let of_columns = packed(Packing::PanelOfColumns { x: &turned, cols: few, first: 0 }, panel.len());
            for (level, found) in of_rows.into_iter().chain(of_columns) {
                prop_assert_eq!(&found, &panel, "{:?}", level);
            }
            let mut columns = vec![0; (c - first) * words(r)];
            pack(Level::Portable, Packing::rows(&transposed(&x, c)[first * r..], r), &mut columns);
            let row = words(r) + apart;
            for (level, found) in packed(Packing::Columns { x: &x, cols: c, first, row }, (c - first) * row) {
                let of_rows: Vec<u32> = found.chunks(row).flat_map(|row| &row[..words(r)]).copied().collect();
                prop_assert_eq!(&of_rows, &columns, "{:?}", level);
                prop_assert!(found.chunks(row).all(|row| row[words(r)..].iter().all(|&word| word == 7)), "{:?}", level);
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        let mut x = numbers(1, 64);
        (x[3], x[20], x[41]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
        for (level, words) in packed(Packing::rows(&x, 64), 32) {
            let term = |i: usize| crate::bf16::widen(words[i / 2] >> (16 * (i % 2)) & 0xffff);
            assert!(term(3).is_nan() && term(20) == f32::INFINITY && term(41) == f32::NEG_INFINITY, "{level:?}");
        }
    }
}
