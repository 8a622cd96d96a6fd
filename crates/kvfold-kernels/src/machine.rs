//! What the machine can do at best: products per second in registers, and bytes read per second from memory.
//!
//! Kernels are judged by these, so neither may depend on how good a kernel is: the peak is taken from multiply-adds that
//! touch no memory, each thread running enough independent chains of them to hide their latency. Both are measured on all
//! threads of the pool that kernels run on, in many short rounds of which the fastest counts: what else runs on the machine
//! only ever slows a round down, and of rounds this short some are left alone on a machine that is seldom idle for long.

use crate::aligned::Aligned;
use crate::kernel_set::Fast;
use crate::ops::Precision;
use crate::paged::{CacheDType, in_words};
use crate::simd::{Level, Vector};
use crate::team;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::hint::black_box;
use std::time::Instant;

/// What a kernel spends its time on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Matrix products on the register tile of a precision.
    Product(Precision),
    /// Loops that are compiled for every instruction set.
    Elementwise,
    /// Loops that are compiled once, for any machine of the target, and run on one thread.
    Plain,
}

/// What the dispatcher has such work computed with at an instruction set.
pub fn path(level: Level, work: Work) -> &'static str {
    match (work, level) {
        (Work::Plain, _) => "one plain loop",
        (_, Level::Portable) => "portable",
        (Work::Product(Precision::F32), Level::Avx2) => "avx2 fma",
        (Work::Product(Precision::F32), Level::Avx512 | Level::Avx512Bf16 | Level::AmxBf16) => "avx512 fma",
        (Work::Product(Precision::Bf16), Level::Avx2) => "avx2 fma, widened",
        (Work::Product(Precision::Q8), Level::Avx2 | Level::Avx512) => "avx2 vpmaddwd",
        (Work::Product(Precision::Bf16), Level::Avx512) => "avx512 fma, widened",
        (Work::Product(Precision::Q8), Level::Avx512Bf16 | Level::AmxBf16) => "avx512 vpdpbusd",
        (Work::Product(Precision::Bf16), Level::Avx512Bf16) => "avx512 vdpbf16ps",
        (Work::Product(Precision::Bf16), Level::AmxBf16) => "amx tdpbf16ps",
        (Work::Elementwise, Level::Avx2) => "avx2",
        (Work::Elementwise, Level::Avx512 | Level::Avx512Bf16 | Level::AmxBf16) => "avx512",
    }
}

/// What attention over a cache of a type is multiplied in.
pub fn cached_attention(level: Level, dtype: CacheDType) -> Precision {
    match in_words(Fast(level), dtype) {
        true => Precision::Bf16,
        false => Precision::F32,
    }
}

/// Rounds of multiply-adds, of about a millisecond each.
const SHORT_ROUNDS: usize = 300;

/// Rounds of reading, of about 20 milliseconds each.
const LONG_ROUNDS: usize = 30;

/// Multiply-adds of each chain in a round.
const STEPS: usize = 1 << 18;

/// Floating-point operations per second, a product and its addition being two, that a product of this precision can reach.
/// Where the machine has no multiply-adds of bf16, such products are f32's.
pub fn peak(level: Level, precision: Precision) -> f64 {
    assert!(level <= Level::detect(), "{level:?} is not available on this machine");
    let chains: fn() -> usize = match (precision, level) {
        (_, Level::Portable) => chains_portable,
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the assertion above says that the machine has these features.
        (_, Level::Avx2) => || unsafe { chains_avx2() },
        #[cfg(target_arch = "x86_64")]
        (Precision::F32 | Precision::Q8, Level::Avx512Bf16 | Level::AmxBf16) | (_, Level::Avx512) => {
            // SAFETY: as above.
            || unsafe { chains_avx512() }
        }
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        (Precision::Bf16, Level::Avx512Bf16) => || unsafe { chains_avx512_bf16() },
        #[cfg(target_arch = "x86_64")]
        (Precision::Bf16, Level::AmxBf16) => products_amx,
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("not an x86-64 machine"),
    };
    fastest(SHORT_ROUNDS, || team::map(0..team::threads(), |_| chains()).into_iter().sum())
}

/// Runs `N` chains of multiply-adds; returns their floating-point operations. `N` vectors must fit the registers, and be
/// as many as a multiply-add's latency times the number begun per cycle.
///
/// # Safety
/// The machine must have `V`'s instruction set.
#[inline(always)]
unsafe fn chains<V: Vector, const N: usize>() -> usize {
    // SAFETY: the caller's; `sink` has room for every lane.
    unsafe {
        // Each chain tends to 0.5, away from the numbers that are slow.
        let (a, b) = (V::splat(black_box(0.5)), V::splat(black_box(0.25)));
        let mut sums = [V::zero(); N];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = sum.mul_add(a, b);
            }
        }
        let mut sink = [0.0f32; 16];
        for sum in sums {
            sum.store(sink.as_mut_ptr());
            black_box(&mut sink);
        }
    }
    2 * N * V::LANES * STEPS
}

fn chains_portable() -> usize {
    // SAFETY: arrays need no features.
    unsafe { chains::<[f32; 8], 6>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn chains_avx2() -> usize {
    // SAFETY: the caller's.
    unsafe { chains::<__m256, 12>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn chains_avx512() -> usize {
    // SAFETY: the caller's.
    unsafe { chains::<__m512, 16>() }
}

/// [`chains`] of dot products of two bf16 terms.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn chains_avx512_bf16() -> usize {
    const N: usize = 16;
    const LANES: usize = 16;
    // 2^-60 in both halves: a sum of its squares is no number that is slow, and never large.
    // SAFETY: the two types are 512 bits of any content.
    let term: __m512bh = unsafe { std::mem::transmute(_mm512_set1_epi32(black_box(0x2180_2180))) };
    let mut sums = [_mm512_set1_ps(black_box(0.5)); N];
    for _ in 0..STEPS {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, term, term);
        }
    }
    let mut sink = [0.0f32; LANES];
    for sum in sums {
        // SAFETY: `sink` has room for every lane.
        unsafe { _mm512_storeu_ps(sink.as_mut_ptr(), sum) };
        black_box(&mut sink);
    }
    2 * 2 * N * LANES * STEPS
}

/// Products of tiles, which touch no memory either.
#[cfg(target_arch = "x86_64")]
fn products_amx() -> usize {
    // SAFETY: the caller asserts that the machine multiplies tiles.
    unsafe { crate::amx::products(STEPS / 32) }
}

/// Bytes per second that all threads together read from memory, each its own part in order.
pub fn read_bandwidth() -> f64 {
    /// Several times any cache.
    const BYTES: usize = 1 << 28;
    let mut data = Aligned::<u64>::new(BYTES / 8);
    data.fill(1);
    let part = data.len().div_ceil(team::threads());
    let level = Level::detect();
    fastest(LONG_ROUNDS, || {
        let sums = team::map(data.chunks(part), |part| {
            level.run(
                #[inline(always)]
                || part.iter().fold(0u64, |sum, &x| sum.wrapping_add(x)),
            )
        });
        black_box(sums);
        BYTES
    })
}

/// What `work` returns, per second of its fastest round.
fn fastest(rounds: usize, work: impl Fn() -> usize) -> f64 {
    let rates = (0..rounds).map(|_| {
        let started = Instant::now();
        let amount = work();
        amount as f64 / started.elapsed().as_secs_f64()
    });
    rates.fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_has_a_peak_and_memory_a_bandwidth() {
        for level in Level::available() {
            for precision in [Precision::F32, Precision::Bf16] {
                let peak = peak(level, precision);
                assert!(peak.is_finite() && peak > 1e8, "{level:?} {precision:?}: {peak}");
            }
        }
        assert!(read_bandwidth() > 1e8);
    }
}
