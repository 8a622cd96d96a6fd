//! Numbers of a page, widened to f32 in a register. Widening is exact, so it makes no difference where it happens.

use super::PAGE_SLOTS;
use crate::bf16;
use crate::simd::Vector;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// A register of f32 lanes that stored numbers are widened to.
///
/// # Safety
/// As [`Vector`].
pub(crate) unsafe trait Load<T: Copy + Default>: Vector {
    /// Neighbouring terms of a sum that are stored as one.
    const TERMS: usize = 1;

    /// Term `TERM` of each of the `LANES` at `p`.
    unsafe fn widen<const TERM: usize>(p: *const T) -> Self;

    /// Of the `n` first at `p`, then zeros.
    #[inline(always)]
    unsafe fn widen_part<const TERM: usize>(p: *const T, n: usize) -> Self {
        let mut whole = [T::default(); PAGE_SLOTS];
        // SAFETY: the caller has n of them at p, and no vector has more lanes than a page has slots.
        unsafe {
            std::ptr::copy_nonoverlapping(p, whole.as_mut_ptr(), n);
            Self::widen::<TERM>(whole.as_ptr())
        }
    }
}

// SAFETY: reads LANES numbers as the contract says.
unsafe impl Load<f32> for [f32; 8] {
    #[inline(always)]
    unsafe fn widen<const TERM: usize>(p: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::load(p) }
    }
}

// SAFETY: as above.
unsafe impl Load<u32> for [f32; 8] {
    const TERMS: usize = 2;
    #[inline(always)]
    unsafe fn widen<const TERM: usize>(p: *const u32) -> Self {
        // SAFETY: the caller's.
        std::array::from_fn(|i| bf16::widen(unsafe { *p.add(i) } >> (16 * TERM)))
    }
}

// SAFETY: as above.
unsafe impl Load<i8> for [f32; 8] {
    #[inline(always)]
    unsafe fn widen<const TERM: usize>(p: *const i8) -> Self {
        // SAFETY: the caller's.
        std::array::from_fn(|i| f32::from(unsafe { *p.add(i) }))
    }
}

#[cfg(target_arch = "x86_64")]
// SAFETY: reads LANES numbers as the contract says.
unsafe impl Load<f32> for __m256 {
    #[inline(always)]
    unsafe fn widen<const TERM: usize>(p: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::load(p) }
    }
}

#[cfg(target_arch = "x86_64")]
// SAFETY: as above.
unsafe impl Load<u32> for __m256 {
    const TERMS: usize = 2;
    #[inline(always)]
    unsafe fn widen<const TERM: usize>(p: *const u32) -> Self {
        // SAFETY: the caller's, who has AVX2.
        unsafe {
            let words = _mm256_loadu_si256(p.cast());
            _mm256_castsi256_ps(match TERM {
                0 => _mm256_slli_epi32::<16>(words),
                _ => _mm256_and_si256(words, _mm256_set1_epi32(-0x1_0000)),
            })
        }
    }
}

#[cfg(target_arch = "x86_64")]
// SAFETY: as above.
unsafe impl Load<i8> for __m256 {
    #[inline(always)]
    unsafe fn widen<const TERM: usize>(p: *const i8) -> Self {
        // SAFETY: the caller's, who has AVX2.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
    }
}

#[cfg(target_arch = "x86_64")]
// SAFETY: reads LANES numbers as the contract says.
unsafe impl Load<f32> for __m512 {
    #[inline(always)]
    unsafe fn widen<const TERM: usize>(p: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::load(p) }
    }
}

#[cfg(target_arch = "x86_64")]
// SAFETY: as above.
unsafe impl Load<u32> for __m512 {
    const TERMS: usize = 2;
    #[inline(always)]
    unsafe fn widen<const TERM: usize>(p: *const u32) -> Self {
        // SAFETY: the caller's, who has AVX-512.
        unsafe {
            let words = _mm512_loadu_si512(p.cast());
            _mm512_castsi512_ps(match TERM {
                0 => _mm512_slli_epi32::<16>(words),
                _ => _mm512_and_si512(words, _mm512_set1_epi32(-0x1_0000)),
            })
        }
    }
}

#[cfg(target_arch = "x86_64")]
// SAFETY: as above.
unsafe impl Load<i8> for __m512 {
    #[inline(always)]
    unsafe fn widen<const TERM: usize>(p: *const i8) -> Self {
        // SAFETY: the caller's, who has AVX-512.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }
}
