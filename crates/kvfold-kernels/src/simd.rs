//! Instruction sets, chosen at run time, and the register tile that every matrix product is made of.
//!
//! Elementwise kernels are written once and compiled per instruction set ([`Level::run`]); they use no fused
//! multiply-add, so their results are the same on every machine. The tile uses explicit vectors and fused
//! multiply-adds; each of its outputs is one chain of additions over k in ascending order, so an output does not depend
//! on how many rows are computed beside it (promise I3).

use crate::aligned::CACHE_LINE;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::sync::OnceLock;

/// An instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Whatever the target guarantees.
    Portable,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AVX-512 with dot products of bf16 (BF16) and of bytes (VNNI); for f32 the same as [`Level::Avx512`].
    Avx512Bf16,
    /// [`Level::Avx512Bf16`] with tiles of bf16 (AMX), which only products of bf16 use.
    AmxBf16,
}

impl Level {
    /// The best this machine has.
    pub fn detect() -> Self {
        static LEVEL: OnceLock<Level> = OnceLock::new();
        *LEVEL.get_or_init(|| {
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                return match is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vnni") {
                    true if crate::amx::detect() => Level::AmxBf16,
                    true => Level::Avx512Bf16,
                    false => Level::Avx512,
                };
            } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Level::Avx2;
            }
            Level::Portable
        })
    }

    /// Every instruction set this machine can run, for tests that compare them.
    pub fn available() -> Vec<Self> {
        let all = [Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16, Level::AmxBf16];
        all.into_iter().filter(|&level| level <= Self::detect()).collect()
    }

    /// Runs `f` compiled with this instruction set, where the compiler can inline it.
    #[inline(always)]
    pub fn run<R>(self, f: impl FnOnce() -> R) -> R {
        assert!(self <= Self::detect(), "{self:?} is not available on this machine");
        match self {
            Level::Portable => f(),
            // SAFETY: the assertion above says that the machine has these features.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { run_avx2(f) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx512Bf16 | Level::AmxBf16 => unsafe { run_avx512(f) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("not an x86-64 machine"),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2<R>(f: impl FnOnce() -> R) -> R {
    f()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn run_avx512<R>(f: impl FnOnce() -> R) -> R {
    f()
}

/// Columns of a tile, and of a panel of packed weights: two AVX-512 registers.
pub const PANEL: usize = 32;

/// Columns of a strip: a right factor that is laid out for products is strips of columns, `[k][16]` each, so that the rows a
/// tile reads one after the other are cache lines one after the other.
pub const STRIP: usize = 16;
/// Rows of a block of a left factor that is laid out for products, `[k][24]`: every tile's height divides it.
pub(crate) const BLOCK_ROWS: usize = 24;

/// `c [m,n] (+)= a [m,k] . b [k,n]` on raw blocks; `a` may be read transposed through its strides.
#[derive(Clone, Copy, Debug)]
pub struct Gemm<'a, F> {
    /// Rows of the output.
    pub m: usize,
    /// Columns of the output.
    pub n: usize,
    /// Terms of each sum.
    pub k: usize,
    /// Left factor.
    pub a: &'a [F],
    /// Distance between its rows.
    pub a_row: usize,
    /// Distance between its columns.
    pub a_col: usize,
    /// Right factor: strips of 16 columns, which are adjacent.
    pub b: &'a [F],
    /// Distance between its rows.
    pub b_row: usize,
    /// Distance between its strips: 16 where whole rows are adjacent.
    pub b_strip: usize,
    /// Distance between the output's rows.
    pub c_row: usize,
    /// Adds to the output instead of replacing it.
    pub accumulate: bool,
}

impl<F> Gemm<'_, F> {
    /// Panics unless every element of the factors lies inside its slice.
    fn check_factors(&self) {
        let last = |rows: usize, row: usize, cols: usize, col: usize| (rows - 1) * row + (cols - 1) * col;
        assert!(last(self.m, self.a_row, self.k, self.a_col) < self.a.len(), "a is too short");
        let (strips, rest) = ((self.n - 1) / STRIP, (self.n - 1) % STRIP);
        let ends = [(strips, rest), (strips.saturating_sub(1), if strips > 0 { STRIP - 1 } else { rest })];
        for (strip, column) in ends {
            assert!((self.k - 1) * self.b_row + strip * self.b_strip + column < self.b.len(), "b is too short");
        }
    }

    /// Panics unless every element of the output lies inside a slice of this length.
    pub(crate) fn check_output(&self, c_len: usize) {
        let needed = if self.m == 0 || self.n == 0 { 0 } else { (self.m - 1) * self.c_row + self.n };
        assert!(needed <= c_len, "c is too short");
    }
}

/// The product in plain loops: the definition. `c` is a pointer, since several threads may write columns of the same rows.
///
/// # Safety
/// Rows of `n` elements, `c_row` apart, must be valid at `c` for reads and writes, and nobody else may use them.
pub(crate) unsafe fn gemm_scalar<F: crate::real::Real>(g: Gemm<'_, F>, c: *mut F) {
    for i in 0..g.m {
        for j in 0..g.n {
            // SAFETY: inside the rows that the caller vouches for.
            let c = unsafe { &mut *c.add(i * g.c_row + j) };
            let start = if g.accumulate { *c } else { F::zero() };
            *c = (0..g.k).fold(start, |s, p| {
                s + g.a[i * g.a_row + p * g.a_col] * g.b[p * g.b_row + j / STRIP * g.b_strip + j % STRIP]
            });
        }
    }
}

/// The product with the vectors of an instruction set.
///
/// # Safety
/// As [`gemm_scalar`].
pub(crate) unsafe fn gemm(level: Level, g: Gemm<'_, f32>, c: *mut f32) {
    if g.m == 0 || g.n == 0 {
        return;
    }
    if g.k == 0 {
        if !g.accumulate {
            // SAFETY: the caller's.
            (0..g.m).for_each(|i| unsafe { c.add(i * g.c_row).write_bytes(0, g.n) });
        }
        return;
    }
    g.check_factors();
    assert!(level <= Level::detect(), "{level:?} is not available on this machine");
    // SAFETY: every read is inside the slices, the caller vouches for `c`, and the machine has the features.
    unsafe {
        match level {
            Level::Portable => gemm_tiles::<[f32; 8], 4, 2>(g, c),
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
unsafe fn gemm_avx2(g: Gemm<'_, f32>, c: *mut f32) {
    // Few rows leave room for wide tiles only; more share the loads of fewer columns.
    // SAFETY: the caller's.
    unsafe {
        match g.m {
            ..4 => gemm_tiles::<__m256, 4, 2>(g, c),
            _ => gemm_tiles::<__m256, 2, 6>(g, c),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn gemm_avx512(g: Gemm<'_, f32>, c: *mut f32) {
    // SAFETY: the caller's.
    unsafe { gemm_tiles::<__m512, 2, 8>(g, c) }
}

/// Walks the output in tiles of `MR` rows and `NV` vectors.
///
/// # Safety
/// The product must pass [`Gemm::check_factors`] and its output be valid, and the machine must have `V`'s instruction set.
#[inline(always)]
unsafe fn gemm_tiles<V: Vector, const NV: usize, const MR: usize>(g: Gemm<'_, f32>, c: *mut f32) {
    let mut j = 0;
    while j < g.n {
        let cols = (g.n - j).min(NV * V::LANES);
        let mut i = 0;
        while i < g.m {
            // Two tiles of four rows are faster than one of six and one that is almost empty.
            let rows = match g.m - i {
                7 | 8 if MR == 6 => 4,
                left => left.min(MR),
            };
            // SAFETY: rows and cols are what is left of the output, so the tile stays inside what was checked.
            unsafe {
                let at = Tile {
                    k: g.k,
                    a: g.a.as_ptr().add(i * g.a_row),
                    a_row: g.a_row,
                    a_col: g.a_col,
                    b: g.b.as_ptr().add(j / STRIP * g.b_strip),
                    b_row: g.b_row,
                    b_strip: g.b_strip,
                    c: c.add(i * g.c_row + j),
                    c_row: g.c_row,
                    cols,
                    accumulate: g.accumulate,
                };
                // One vector is enough for narrow outputs (small head dims).
                match (rows == MR, rows, cols <= V::LANES) {
                    (true, _, false) => at.compute::<V, NV, MR>(),
                    (true, _, true) => at.compute::<V, 1, MR>(),
                    (_, 4.., _) => at.compute::<V, NV, 4>(),
                    (_, 2..4, _) => at.compute::<V, NV, 2>(),
                    _ => at.compute::<V, NV, 1>(),
                }
            }
            i += match rows {
                _ if rows == MR => MR,
                4.. => 4,
                2..4 => 2,
                _ => 1,
            };
        }
        j += cols;
    }
}

/// Terms of a sum that are added between two looks at the end of it.
const UNROLL: usize = 4;

/// Where one tile reads and writes.
struct Tile {
    k: usize,
    a: *const f32,
    a_row: usize,
    a_col: usize,
    b: *const f32,
    b_row: usize,
    b_strip: usize,
    c: *mut f32,
    c_row: usize,
    cols: usize,
    accumulate: bool,
}

impl Tile {
    /// # Safety
    /// `MR` rows and `cols` columns must be readable and writable at the pointers.
    #[inline(always)]
    unsafe fn compute<V: Vector, const NV: usize, const MR: usize>(self) {
        if self.cols == NV * V::LANES {
            // SAFETY: the caller's.
            unsafe { self.sum::<V, NV, MR, true>() }
        } else {
            // SAFETY: the caller's.
            unsafe { self.sum::<V, NV, MR, false>() }
        }
    }

    /// Lanes of vector j that are columns of the tile.
    #[inline(always)]
    fn valid<V: Vector>(&self, j: usize) -> usize {
        self.cols.saturating_sub(j * V::LANES).min(V::LANES)
    }

    /// Adds term p to every sum.
    ///
    /// # Safety
    /// As [`Tile::sum`]; `columns` are where the vectors of the right factor's first row are.
    #[inline(always)]
    unsafe fn add<V: Vector, const NV: usize, const MR: usize, const FULL: bool>(
        &self,
        columns: &[*const f32; NV],
        p: usize,
        acc: &mut [[V; NV]; MR],
    ) {
        // SAFETY: the caller's.
        unsafe {
            let mut b = [V::zero(); NV];
            for (j, b) in b.iter_mut().enumerate() {
                let at = columns[j].wrapping_add(p * self.b_row);
                *b = if FULL { V::load(at) } else { V::load_part(at, self.valid::<V>(j)) };
            }
            for (i, row) in acc.iter_mut().enumerate() {
                let a = V::splat(*self.a.add(i * self.a_row + p * self.a_col));
                for (sum, &b) in row.iter_mut().zip(&b) {
                    *sum = a.mul_add(b, *sum);
                }
            }
        }
    }

    /// # Safety
    /// As [`Tile::compute`]; `FULL` only when every vector is whole.
    #[inline(always)]
    unsafe fn sum<V: Vector, const NV: usize, const MR: usize, const FULL: bool>(self) {
        // A vector with no valid lane may begin beyond its array, so places are computed wrapping.
        // SAFETY: partial vectors touch `valid(j)` lanes only, so all accesses stay inside the tile.
        unsafe {
            let mut acc = [[V::zero(); NV]; MR];
            if self.accumulate {
                for (i, row) in acc.iter_mut().enumerate() {
                    for (j, sum) in row.iter_mut().enumerate() {
                        let p = self.c.wrapping_add(i * self.c_row + j * V::LANES);
                        *sum = if FULL { V::load(p) } else { V::load_part(p, self.valid::<V>(j)) };
                    }
                }
            }
            let columns: [_; NV] = std::array::from_fn(|j| {
                let at = j * V::LANES;
                self.b.wrapping_add(at / STRIP * self.b_strip + at % STRIP)
            });
            // Edges are rare: no code is spent on them.
            let turn = if FULL && MR >= 4 { UNROLL } else { 1 };
            let unrolled = self.k - self.k % turn;
            let mut p = 0;
            while p < unrolled {
                for q in 0..turn {
                    self.add::<V, NV, MR, FULL>(&columns, p + q, &mut acc);
                }
                p += turn;
            }
            for p in unrolled..self.k {
                self.add::<V, NV, MR, FULL>(&columns, p, &mut acc);
            }
            for (i, row) in acc.iter().enumerate() {
                for (j, &sum) in row.iter().enumerate() {
                    let p = self.c.wrapping_add(i * self.c_row + j * V::LANES);
                    if FULL { sum.store(p) } else { sum.store_part(p, self.valid::<V>(j)) }
                }
            }
        }
    }
}

/// Asks for memory that will be read soon; nothing else depends on it.
#[inline(always)]
pub(crate) fn prefetch<T>(data: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for byte in (0..size_of_val(data)).step_by(CACHE_LINE) {
        // SAFETY: a prefetch is a hint, and the address lies inside the slice.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(data.as_ptr().cast::<i8>().add(byte)) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = data;
}

/// A register of f32 lanes.
///
/// # Safety
/// Every method that takes a pointer touches `LANES` elements there, or the `n` first where it is `_part`. The vector
/// types of an instruction set must only be used where the machine has it.
pub(crate) unsafe trait Vector: Copy {
    const LANES: usize;
    unsafe fn zero() -> Self;
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn load_part(p: *const f32, n: usize) -> Self;
    unsafe fn store(self, p: *mut f32);
    unsafe fn store_part(self, p: *mut f32, n: usize);
    /// `self * b + c`, rounded once.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
}

// SAFETY: touches LANES or n elements as the contract says.
unsafe impl Vector for [f32; 8] {
    const LANES: usize = 8;
    #[inline(always)]
    unsafe fn zero() -> Self {
        [0.0; 8]
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { p.cast::<Self>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> Self {
        // SAFETY: the caller's.
        std::array::from_fn(|i| if i < n { unsafe { *p.add(i) } } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller's.
        unsafe { p.cast::<Self>().write_unaligned(self) }
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, n: usize) {
        for (i, x) in self.into_iter().enumerate().take(n) {
            // SAFETY: the caller's.
            unsafe { *p.add(i) = x }
        }
    }
    /// Rounded twice: without FMA hardware a fused multiply-add is a function call per lane.
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        std::array::from_fn(|i| self[i] * b[i] + c[i])
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn mask8(n: usize) -> __m256i {
    const ONES: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
    // SAFETY: n <= 8, so eight elements from 8 - n on lie inside ONES.
    unsafe { _mm256_loadu_si256(ONES.as_ptr().add(8 - n).cast()) }
}

#[cfg(target_arch = "x86_64")]
// SAFETY: touches LANES or n elements as the contract says (masked-out lanes are not accessed).
unsafe impl Vector for __m256 {
    const LANES: usize = 8;
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller has AVX2.
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller has AVX2.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> Self {
        // SAFETY: the caller's.
        unsafe { _mm256_maskload_ps(p, mask8(n)) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller's.
        unsafe { _mm256_storeu_ps(p, self) }
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, n: usize) {
        // SAFETY: the caller's.
        unsafe { _mm256_maskstore_ps(p, mask8(n), self) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: the caller has FMA.
        unsafe { _mm256_fmadd_ps(self, b, c) }
    }
}

#[cfg(target_arch = "x86_64")]
// SAFETY: touches LANES or n elements as the contract says (masked-out lanes are not accessed).
unsafe impl Vector for __m512 {
    const LANES: usize = 16;
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller has AVX-512.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller has AVX-512.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> Self {
        // SAFETY: the caller's.
        unsafe { _mm512_maskz_loadu_ps(((1u32 << n) - 1) as u16, p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller's.
        unsafe { _mm512_storeu_ps(p, self) }
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, n: usize) {
        // SAFETY: the caller's.
        unsafe { _mm512_mask_storeu_ps(p, ((1u32 << n) - 1) as u16, self) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: the caller has AVX-512.
        unsafe { _mm512_fmadd_ps(self, b, c) }
    }
}

/// `exp` to about 2 units in the last place for x <= 88, 0 below -87; branch-free, so loops over it vectorise.
#[inline(always)]
pub fn exp_fast(x: f32) -> f32 {
    const LOG2E: f32 = std::f32::consts::LOG2_E;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let clamped = x.clamp(-87.3, 88.0);
    let shifted = clamped * LOG2E + SHIFT;
    let n = shifted - SHIFT;
    let r = clamped - n * LN2_HI - n * LN2_LO;
    let p = 1.987_569_2e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    let exponent = (shifted.to_bits() << 23).wrapping_add(127 << 23);
    let y = y * f32::from_bits(exponent);
    if x < -87.3 { 0.0 } else { y }
}

/// `exp` of a number that is at most 88, such as the distance to the largest of a softmax, to 2e-7 of 1 below 0, for a third less work than
/// [`exp_fast`]. 0 below -88; branch-free, so loops over it vectorise.
#[inline(always)]
pub fn exp_share(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    const LOWEST: f32 = -127.0; // the power whose exponent's bits are those of 0
    let power = x * std::f32::consts::LOG2_E;
    // Not `max`, which would pass over a NaN.
    let power = if power < LOWEST { LOWEST } else { power };
    let shifted = power + SHIFT;
    let f = power - (shifted - SHIFT);
    let p = 1.330_060_4e-3;
    let p = p * f + 9.669_691e-3;
    let p = p * f + 5.550_558_5e-2;
    let p = p * f + 2.402_228_3e-1;
    let p = p * f + std::f32::consts::LN_2;
    let p = p * f + 1.0;
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// Terms of 2^f for a fraction f, from the fourth power down, to 4e-6 of the value; exact at 0 and at 1.
pub(crate) const EXP2_TERMS: [f32; 5] = [0.013_555_747, 0.052_032_37, 0.241_379_77, 0.693_032_15, 1.0];

/// 2^x to 4e-6 of the value, far less than rounding to bf16 leaves, and exact for whole numbers: the definition of what machines
/// with tiles compute with an instruction each for the fraction and for the power.
pub(crate) fn exp2_weight(x: f32) -> f32 {
    let whole = x.floor();
    let f = if whole.is_infinite() { 0.0 } else { x - whole };
    let p = EXP2_TERMS.into_iter().reduce(|p, term| p.mul_add(f, term)).expect("terms");
    // Exact before it is rounded once: a float's whole range, and more.
    let power = f64::from_bits(((whole.clamp(-300.0, 300.0) as i64 + 1023) as u64) << 52);
    (f64::from(p) * power) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Every instruction set computes the definition, for odd sizes, strides and both modes.
        #[test]
        fn tiles_match_the_definition(m in 1usize..20, n in 1usize..70, k in 0usize..40, pad in 0usize..3, transposed: bool, strips: bool, accumulate: bool, seed: u64) {
            let noise = |i: usize| ((seed.wrapping_add(i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as f32 / 8_388_608.0) - 1.0;
            let (a_row, a_col) = if transposed { (1, m + pad) } else { (k + pad, 1) };
            let a: Vec<f32> = (0..(m + pad) * (k + pad + 1)).map(noise).collect();
            let (b_row, b_strip) = if strips { (STRIP, k * STRIP + pad) } else { (n + pad, STRIP) };
            let b: Vec<f32> = (0..n.div_ceil(STRIP) * (k + 1) * (STRIP + pad)).map(|i| noise(i + 7000)).collect();
            let b = if strips { b } else { (0..(k + 1) * (n + pad)).map(|i| noise(i + 7000)).collect() };
            let start: Vec<f32> = (0..m * (n + pad)).map(|i| noise(i + 90_000)).collect();
            let g = Gemm { m, n, k, a: &a, a_row, a_col, b: &b, b_row, b_strip, c_row: n + pad, accumulate };
            let mut expected = start.clone();
            // SAFETY: the output is as large as the product.
            unsafe { gemm_scalar(g, expected.as_mut_ptr()) };
            for level in Level::available() {
                let mut c = start.clone();
                // SAFETY: as above.
                unsafe { gemm(level, g, c.as_mut_ptr()) };
                for (i, (got, want)) in c.iter().zip(&expected).enumerate() {
                    prop_assert!((got - want).abs() <= 1e-5 * (1.0 + k as f32).sqrt(), "{level:?} element {i}: {got} {want}");
                }
            }
        }

        #[test]
        fn an_output_does_not_depend_on_its_neighbours(rows in 2usize..40, k in 1usize..50, seed: u64) {
            let noise = |i: usize| ((seed.wrapping_add(i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as f32 / 8_388_608.0) - 1.0;
            let a: Vec<f32> = (0..rows * k).map(noise).collect();
            let b: Vec<f32> = (0..k * PANEL).map(|i| noise(i + 7000)).collect();
            for level in Level::available() {
                let all = Gemm { m: rows, n: PANEL, k, a: &a, a_row: k, a_col: 1, b: &b, b_row: PANEL, b_strip: STRIP, c_row: PANEL, accumulate: false };
                let mut together = vec![0.0; rows * PANEL];
                // SAFETY: the output is as large as the product.
                unsafe { gemm(level, all, together.as_mut_ptr()) };
                for r in 0..rows {
                    let mut alone = vec![0.0; PANEL];
                    // SAFETY: as above.
                    unsafe { gemm(level, Gemm { m: 1, a: &a[r * k..], ..all }, alone.as_mut_ptr()) };
                    prop_assert_eq!(&alone[..], &together[r * PANEL..][..PANEL]);
                }
            }
        }
    }

    #[test]
    fn exp_is_close_everywhere() {
        let mut x = -100.0f32;
        while x < 87.9 {
            let (got, want) = (exp_fast(x), x.exp());
            assert!((got - want).abs() <= 3e-7 * want + 2e-38, "exp({x}): {got} {want}");
            x += 0.00137;
        }
        assert_eq!(exp_fast(0.0), 1.0);
        assert_eq!(exp_fast(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn shares_are_close_wherever_they_count() {
        let mut x = -100.0f32;
        while x < 1.0 {
            let (got, want) = (exp_share(x), x.exp());
            assert!((got - want).abs() <= 2e-7 * (1.0 + x.abs()) * want + 2e-38, "exp({x}): {got} {want}");
            x += 0.00137;
        }
        assert_eq!(exp_share(0.0), 1.0);
        assert_eq!(exp_share(f32::NEG_INFINITY).to_bits(), 0);
        assert!(exp_share(f32::NAN).is_nan());
    }

    #[test]
    fn powers_are_close_and_exact_for_whole_numbers() {
        let mut x = -140.0f32;
        while x < 20.0 {
            let (got, want) = (exp2_weight(x), x.exp2());
            assert!((got - want).abs() <= 4e-6 * want + f32::MIN_POSITIVE * 1e-6, "2^{x}: {got} {want}");
            x += 0.00137;
        }
        for n in -160..140 {
            assert_eq!(exp2_weight(n as f32), (n as f32).exp2(), "2^{n}");
        }
        for lowest in [f32::MIN, f32::NEG_INFINITY] {
            assert_eq!(exp2_weight(lowest).to_bits(), 0);
        }
        assert!(exp2_weight(f32::NAN).is_nan());
    }
}
