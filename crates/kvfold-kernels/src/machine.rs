//! What the machine can do at best: products per second from cached operands, and bytes read per second from memory.
//!
//! Kernels are judged by these. Both are measured on all threads of the pool that kernels run on.

use crate::bf16::{self, GemmBf16, words};
use crate::kernel_set::{Fast, KernelSet};
use crate::ops::Precision;
use crate::simd::{Gemm, Level, PANEL};
use rayon::prelude::*;
use std::hint::black_box;
use std::time::Instant;

/// Repetitions, of which the fastest counts: what else runs only ever slows down.
const ROUNDS: usize = 5;

/// Floating-point operations per second, a product and its addition being two, of the register tile on operands that stay
/// in the first-level cache: the most that a product of this precision can reach.
pub fn peak(level: Level, precision: Precision) -> f64 {
    const ROWS: usize = 24;
    const TERMS: usize = 128;
    const TIMES: usize = 4000;
    let set = Fast(level);
    let (a, b) = (vec![0.5f32; ROWS * TERMS], vec![0.25f32; TERMS * PANEL]);
    let mut packed_a = vec![0; ROWS * words(TERMS)];
    bf16::rows(&a, TERMS, &mut packed_a);
    let packed_b = vec![0x3e80_3e80; words(TERMS) * PANEL];
    let work = || {
        let mut c = vec![0.0f32; ROWS * PANEL];
        for _ in 0..TIMES {
            match precision {
                Precision::F32 | Precision::Q8 => {
                    let (a, b) = (black_box(&a), black_box(&b));
                    let shape = Gemm {
                        m: ROWS,
                        n: PANEL,
                        k: TERMS,
                        a,
                        a_row: TERMS,
                        a_col: 1,
                        b,
                        b_row: PANEL,
                        c_row: PANEL,
                        accumulate: false,
                    };
                    set.gemm(shape, &mut c);
                }
                Precision::Bf16 => {
                    let (a, b) = (black_box(&packed_a), black_box(&packed_b));
                    let product = GemmBf16 {
                        m: ROWS,
                        n: PANEL,
                        words: words(TERMS),
                        a,
                        a_row: words(TERMS),
                        a_word: 1,
                        b,
                        c_row: PANEL,
                        accumulate: false,
                    };
                    // SAFETY: `c` has ROWS rows of a panel and is this thread's alone.
                    unsafe { set.gemm_bf16(product, c.as_mut_ptr()) }
                }
            }
        }
        black_box(c);
    };
    let threads = rayon::current_num_threads();
    let seconds = fastest(|| (0..threads).into_par_iter().for_each(|_| work()));
    (2 * ROWS * TERMS * PANEL * TIMES * threads) as f64 / seconds
}

/// Bytes per second that all threads together read from memory, in order.
pub fn read_bandwidth() -> f64 {
    /// Several times any cache.
    const BYTES: usize = 1 << 28;
    let data = vec![1u64; BYTES / 8];
    let part = data.len().div_ceil(rayon::current_num_threads());
    let seconds = fastest(|| {
        let sums = data.par_chunks(part).map(|part| part.iter().fold(0u64, |sum, &x| sum.wrapping_add(x)));
        black_box(sums.sum::<u64>());
    });
    BYTES as f64 / seconds
}

fn fastest(work: impl Fn()) -> f64 {
    let times = (0..ROUNDS).map(|_| {
        let started = Instant::now();
        work();
        started.elapsed().as_secs_f64()
    });
    times.fold(f64::INFINITY, f64::min)
}
