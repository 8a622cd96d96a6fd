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
    /// `LANES` numbers at `p`.
    unsafe fn widen(p: *const T) -> Self;

    /// The `n` first numbers at `p`, then zeros.
    #[inline(always)]
    unsafe fn widen_part(p: *const T, n: usize) -> Self {
        let mut whole = [T::default(); PAGE_SLOTS];
        // SAFETY: the caller has n numbers at p, and no vector has more lanes than a page has slots.
        unsafe {
            std::ptr::copy_nonoverlapping(p, whole.as_mut_ptr(), n);
            Self::widen(whole.as_ptr())
        }
    }
}

// SAFETY: reads LANES numbers as the contract says.
unsafe impl Load<f32> for [f32; 8] {
    #[inline(always)]
    unsafe fn widen(p: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::load(p) }
    }
}

// SAFETY: as above.
unsafe impl Load<u16> for [f32; 8] {
    #[inline(always)]
    unsafe fn widen(p: *const u16) -> Self {
        // SAFETY: the caller's.
        std::array::from_fn(|i| bf16::widen(u32::from(unsafe { *p.add(i) })))
    }
}

// SAFETY: as above.
unsafe impl Load<i8> for [f32; 8] {
    #[inline(always)]
    unsafe fn widen(p: *const i8) -> Self {
        // SAFETY: the caller's.
        std::array::from_fn(|i| f32::from(unsafe { *p.add(i) }))
    }
}

#[cfg(target_arch = "x86_64")]
// SAFETY: reads LANES numbers as the contract says.
unsafe impl Load<f32> for __m256 {
    #[inline(always)]
    unsafe fn widen(p: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::load(p) }
    }
}

#[cfg(target_arch = "x86_64")]
// SAFETY: as above.
unsafe impl Load<u16> for __m256 {
    #[inline(always)]
    unsafe fn widen(p: *const u16) -> Self {
        // SAFETY: the caller's, who has AVX2.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())), 16)) }
    }
}

#[cfg(target_arch = "x86_64")]
// SAFETY: as above.
unsafe impl Load<i8> for __m256 {
    #[inline(always)]
    unsafe fn widen(p: *const i8) -> Self {
        // SAFETY: the caller's, who has AVX2.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
    }
}

#[cfg(target_arch = "x86_64")]
// SAFETY: reads LANES numbers as the contract says.
unsafe impl Load<f32> for __m512 {
    #[inline(always)]
    unsafe fn widen(p: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::load(p) }
    }
}

#[cfg(target_arch = "x86_64")]
// SAFETY: as above.
unsafe impl Load<u16> for __m512 {
    #[inline(always)]
    unsafe fn widen(p: *const u16) -> Self {
        // SAFETY: the caller's, who has AVX-512.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())), 16)) }
    }
}

#[cfg(target_arch = "x86_64")]
// SAFETY: as above.
unsafe impl Load<i8> for __m512 {
    #[inline(always)]
    unsafe fn widen(p: *const i8) -> Self {
        // SAFETY: the caller's, who has AVX-512.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }
}
