//! Products of bf16 operands on the tile registers of AMX.
//!
//! A tile holds up to 16 rows of 16 words, and `tdpbf16ps` multiplies two of them: the words of a row of `rows` are a
//! row of the left tile as they lie, and 16 columns of 16 rows of a panel are a right tile. A step adds 16 words, 32
//! terms, to each output: the lower and the upper terms in a chain each, from zero, then both together to the sum.
//! Steps begin at multiples of 16 words, and a shorter last one gets smaller tiles, so that an output does not depend
//! on how many rows or columns are computed beside it (promise I3). The instruction takes numbers below the smallest
//! normal one for zero.
//!
//! Tile registers belong to the thread. A [`Block`] sets them up and gives them back inside one `asm!`, so that nothing
//! outside of it has to know of them.

use crate::bf16::GemmBf16;
use crate::simd::PANEL;
use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

/// Rows of a tile, and words of its rows.
const TILE: usize = 16;
/// Bytes of a word or of a sum.
const BYTES: usize = 4;
/// Steps for which a left factor with adjacent columns is transposed at a time.
const STEPS: usize = 16;

/// Two tiles of rows of a left factor, 32 KiB.
type Transposed = [MaybeUninit<u32>; 2 * TILE * STEPS * TILE];

/// Whether the machine multiplies tiles of bf16 and the system lets this process use them.
pub(crate) fn detect() -> bool {
    /// State that the system saves: the configuration and the data of tiles.
    const STATE: u64 = 1 << 17 | 1 << 18;
    const OSXSAVE: u32 = 1 << 27;
    const BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 || __cpuid_count(7, 0).edx & BF16_AND_TILE != BF16_AND_TILE {
        return false;
    }
    // SAFETY: OSXSAVE says that the instruction is there.
    let saved = unsafe { extended_states() };
    saved & STATE == STATE && permitted()
}

/// # Safety
/// The machine must have XSAVE, enabled by the system.
#[target_feature(enable = "xsave")]
unsafe fn extended_states() -> u64 {
    // SAFETY: the caller's.
    unsafe { _xgetbv(0) }
}

/// Asks the system for tile registers, once for all threads of the process: they make its signal frames larger.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: isize = 158;
    const REQUEST_PERMISSION: usize = 0x1023;
    const TILE_DATA: usize = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: a system call that touches no memory of the process; it clobbers rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") REQUEST_PERMISSION,
            in("rsi") TILE_DATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack)
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// The product, of which each output is summed as the module says.
///
/// # Safety
/// The machine must have AVX-512, and [`detect`] must have said yes. `g` must pass its check, one of the left factor's
/// distances must be 1, and `c` must be valid for rows of `g.n` elements, `g.c_row` apart.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn gemm(g: GemmBf16<'_>, c: *mut f32) {
    assert!(g.a_word == 1 || g.a_row == 1, "neither the rows nor the columns of the left factor are adjacent");
    let longest = if g.a_word == 1 { usize::MAX } else { STEPS };
    let mut first = 0;
    while first < g.words {
        let (words, steps) = match g.words - first {
            last @ ..TILE => (last, 1),
            left => (TILE, (left / TILE).min(longest)),
        };
        for row in (0..g.m).step_by(2 * TILE) {
            let mut transposed: Transposed = [const { MaybeUninit::uninit() }; _];
            let rows = (g.m - row).min(2 * TILE);
            let a = &g.a[row * g.a_row + first * g.a_word..];
            let (a, a_row) = match g.a_word {
                1 => (a.as_ptr(), g.a_row),
                // SAFETY: `rows` adjacent words are readable at each of `words * steps` places, and there is space for
                // two tiles of rows in STEPS.
                word => unsafe {
                    transpose(a.as_ptr(), word, (rows, words * steps), &mut transposed);
                    (transposed.as_ptr().cast(), STEPS * TILE)
                },
            };
            let block = Block {
                rows,
                cols: g.n,
                words,
                steps,
                a,
                a_row: a_row * BYTES,
                b: g.b[first * PANEL..].as_ptr(),
                c: c.wrapping_add(row * g.c_row),
                c_row: g.c_row * BYTES,
                accumulate: g.accumulate || first > 0,
            };
            // SAFETY: the block lies inside the product.
            unsafe { block.add() };
        }
        first += words * steps;
    }
}

/// What one configuration of the tiles computes: up to two tiles of rows by two of columns, over the steps of a sum.
struct Block {
    rows: usize,
    cols: usize,
    /// Words of a step.
    words: usize,
    steps: usize,
    a: *const u32,
    /// Bytes between the rows of the left factor.
    a_row: usize,
    b: *const u32,
    c: *mut f32,
    /// Bytes between the rows of the output.
    c_row: usize,
    accumulate: bool,
}

/// The operand of `ldtilecfg`.
#[repr(C, align(64))]
#[derive(Default)]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Block {
    /// # Safety
    /// As [`gemm`], for the rows and words of the block: 1 to 32 rows and columns, 1 to 16 words to a step.
    unsafe fn add(self) {
        // SAFETY: the caller's.
        unsafe {
            match (self.rows > TILE, self.cols > TILE) {
                (false, false) => self.sum::<0, 0>(),
                (false, true) => self.sum::<0, 1>(),
                (true, false) => self.sum::<1, 0>(),
                (true, true) => self.sum::<1, 1>(),
            }
        }
    }

    /// Tiles 0 to 3 are the output's, 4 and 5 the left factor's, 6 and 7 the right one's. One that is not in use has no
    /// rows.
    fn config(&self) -> Config {
        let mut config = Config { palette: 1, ..Config::default() };
        let part = |of: usize, second: usize| if second == 0 { of.min(TILE) } else { of.saturating_sub(TILE) };
        let output = |tile: usize| (tile, part(self.rows, tile / 2), part(self.cols, tile % 2));
        let left = |tile: usize| (4 + tile, part(self.rows, tile), self.words);
        let right = |tile: usize| (6 + tile, self.words, part(self.cols, tile));
        for (tile, rows, cols) in [output(0), output(1), output(2), output(3), left(0), left(1), right(0), right(1)] {
            if rows > 0 && cols > 0 {
                config.rows[tile] = rows as u8;
                config.row_bytes[tile] = (cols * BYTES) as u16;
            }
        }
        config
    }

    /// # Safety
    /// As [`Block::add`]; `TALL` is 1 where there are more than 16 rows, and `WIDE` where there are more columns.
    unsafe fn sum<const TALL: usize, const WIDE: usize>(self) {
        let config = self.config();
        let b_row = PANEL * BYTES;
        // SAFETY: tiles in use are configured no larger than what is left of the product, so every access is inside it,
        // and the tiles are released at the end.
        unsafe {
            asm!(
                // Configuring sets every tile to zero.
                "ldtilecfg [{config}]",
                "test {accumulate:e}, {accumulate:e}",
                "jz 2f",
                "tileloadd tmm0, [{c} + {c_row}]",
                ".if {wide}",
                "tileloadd tmm1, [{c} + {c_row} + 64]",
                ".endif",
                ".if {tall}",
                "tileloadd tmm2, [{lower_c} + {c_row}]",
                ".if {wide}",
                "tileloadd tmm3, [{lower_c} + {c_row} + 64]",
                ".endif",
                ".endif",
                "2:",
                "tileloadd tmm4, [{a} + {a_row}]",
                "tileloadd tmm6, [{b} + {b_row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                ".if {wide}",
                "tileloadd tmm7, [{b} + {b_row} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                ".endif",
                ".if {tall}",
                "tileloadd tmm5, [{lower_a} + {a_row}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                ".if {wide}",
                "tdpbf16ps tmm3, tmm5, tmm7",
                ".endif",
                "add {lower_a}, 64",
                ".endif",
                "add {a}, 64",
                "add {b}, 2048",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{c} + {c_row}], tmm0",
                ".if {wide}",
                "tilestored [{c} + {c_row} + 64], tmm1",
                ".endif",
                ".if {tall}",
                "tilestored [{lower_c} + {c_row}], tmm2",
                ".if {wide}",
                "tilestored [{lower_c} + {c_row} + 64], tmm3",
                ".endif",
                ".endif",
                "tilerelease",
                config = in(reg) &config,
                accumulate = in(reg) u32::from(self.accumulate),
                c = in(reg) self.c,
                lower_c = in(reg) self.c.wrapping_byte_add(TILE * self.c_row),
                c_row = in(reg) self.c_row,
                a = inout(reg) self.a => _,
                lower_a = inout(reg) self.a.wrapping_byte_add(TILE * self.a_row) => _,
                a_row = in(reg) self.a_row,
                b = inout(reg) self.b => _,
                b_row = in(reg) b_row,
                steps = inout(reg) self.steps => _,
                tall = const TALL,
                wide = const WIDE,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack)
            );
        }
    }
}

/// Writes `a`, whose rows are adjacent and whose words lie `a_word` apart, as rows of `STEPS` tiles.
///
/// # Safety
/// The machine must have AVX-512; `rows` words must be readable at each of `words` places, and both counts must fit `to`.
#[target_feature(enable = "avx512f")]
unsafe fn transpose(a: *const u32, a_word: usize, (rows, words): (usize, usize), to: &mut Transposed) {
    let mask = |left: usize| (u32::MAX >> (32 - left.min(TILE))) as u16;
    for row in (0..rows).step_by(TILE) {
        for word in (0..words).step_by(TILE) {
            // SAFETY: masked to the rows and words there are.
            unsafe {
                let mut square = [_mm512_setzero_si512(); TILE];
                for (i, line) in square.iter_mut().enumerate().take(words - word) {
                    *line = _mm512_maskz_loadu_epi32(mask(rows - row), a.add((word + i) * a_word + row).cast());
                }
                for (i, line) in transpose_square(square).into_iter().enumerate().take(rows - row) {
                    let to = to[(row + i) * STEPS * TILE + word..].as_mut_ptr();
                    _mm512_mask_storeu_epi32(to.cast(), mask(words - word), line);
                }
            }
        }
    }
}

/// Exchanges the rows and columns of 16 x 16 words: pairs of lines first, then of pairs, then the quarters of registers.
#[target_feature(enable = "avx512f")]
fn transpose_square(lines: [__m512i; TILE]) -> [__m512i; TILE] {
    const EVEN: i32 = 0b10_00_10_00;
    const ODD: i32 = 0b11_01_11_01;
    let pairs: [__m512i; TILE] = std::array::from_fn(|i| {
        let (x, y) = (lines[i & !1], lines[i | 1]);
        if i & 1 == 0 { _mm512_unpacklo_epi32(x, y) } else { _mm512_unpackhi_epi32(x, y) }
    });
    // Line 4 i + j holds column j of each quarter, of lines 4 i to 4 i + 3.
    let fours: [__m512i; TILE] = std::array::from_fn(|i| {
        let (x, y) = (pairs[i & !3 | i >> 1 & 1], pairs[i & !3 | 2 | i >> 1 & 1]);
        if i & 1 == 0 { _mm512_unpacklo_epi64(x, y) } else { _mm512_unpackhi_epi64(x, y) }
    });
    // The even quarters of two lines, or the odd ones.
    let halves: [__m512i; TILE] = std::array::from_fn(|i| {
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
    use crate::bf16::{self, GemmBf16, widen, words};
    use crate::simd::{Level, PANEL};
    use crate::team::Team;
    use proptest::prelude::*;

    fn noise(seed: u64, i: usize) -> f32 {
        (crate::noise::unit(crate::noise::hash(&[seed, i as u64])) * 2.0 - 1.0) as f32
    }

    /// What the manual says of `tdpbf16ps`, in steps of 16 words.
    fn by_the_manual(g: GemmBf16<'_>, c: &mut [f32]) {
        for i in 0..g.m {
            for j in 0..g.n {
                let c = &mut c[i * g.c_row + j];
                let mut sum = if g.accumulate { *c } else { 0.0 };
                for step in (0..g.words).step_by(16) {
                    let (mut lower, mut upper) = (0.0f32, 0.0f32);
                    for p in step..g.words.min(step + 16) {
                        let (a, b) = (g.a[i * g.a_row + p * g.a_word], g.b[p * PANEL + j]);
                        lower = widen(a & 0xffff).mul_add(widen(b & 0xffff), lower);
                        upper = widen(a >> 16).mul_add(widen(b >> 16), upper);
                    }
                    sum += lower + upper;
                }
                *c = sum;
            }
        }
    }

    /// Random operands; a left factor with adjacent columns has no more than a panel of rows.
    struct Operands {
        k: usize,
        a: Vec<u32>,
        strides: (usize, usize),
        b: Vec<u32>,
    }

    impl Operands {
        fn new(m: usize, k: usize, columns: bool, seed: u64) -> Self {
            let x: Vec<f32> = (0..m * k).map(|i| noise(seed, i)).collect();
            let y: Vec<f32> = (0..PANEL * k).map(|i| noise(seed ^ 1, i)).collect();
            let (mut a, mut b) = (vec![0; m.max(PANEL) * words(k)], vec![0; words(k) * PANEL]);
            match columns {
                false => bf16::rows(&x, k, &mut a[..m * words(k)]),
                true => bf16::panels_of_columns(&x, m, 0, &mut a),
            }
            bf16::panels_of_rows(&y, k, &mut b);
            Self { k, a, strides: if columns { (1, PANEL) } else { (words(k), 1) }, b }
        }

        fn product(&self, m: usize, n: usize, c_row: usize, accumulate: bool) -> GemmBf16<'_> {
            let (a_row, a_word) = self.strides;
            GemmBf16 { m, n, words: words(self.k), a: &self.a, a_row, a_word, b: &self.b, c_row, accumulate }
        }
    }

    /// The product on tiles, where the machine has them, and by the manual.
    fn both(g: GemmBf16<'_>, start: &[f32]) -> Option<[Vec<u32>; 2]> {
        Level::available().contains(&Level::AmxBf16).then(|| {
            let (mut tiles, mut manual) = (start.to_vec(), start.to_vec());
            // SAFETY: `start` has g.m rows.
            unsafe { bf16::gemm(Level::AmxBf16, g, tiles.as_mut_ptr()) };
            by_the_manual(g, &mut manual);
            [tiles, manual].map(|c| c.iter().map(|x| x.to_bits()).collect())
        })
    }

    fn check(m: usize, n: usize, k: usize, columns: bool, accumulate: bool) {
        let operands = Operands::new(m, k, columns, k as u64);
        let start: Vec<f32> = (0..m * (n + 3)).map(|i| noise(2, i)).collect();
        if let Some([tiles, manual]) = both(operands.product(m, n, n + 3, accumulate), &start) {
            assert!(tiles == manual, "{m} x {n} of {k} terms, columns {columns}, accumulate {accumulate}");
        }
    }

    proptest! {
        #[test]
        fn every_bit_is_as_the_manual_says(m in 1usize..70, n in 1usize..33, k in 1usize..200, columns: bool, accumulate: bool) {
            check(if columns { m.min(PANEL) } else { m }, n, k, columns, accumulate);
        }
    }

    /// One more and one less than a tile, two, a step, and the steps that are transposed at a time.
    #[test]
    fn edges_are_as_the_manual_says() {
        let around = |x: usize| [x - 1, x, x + 1];
        for m in [1, 2].into_iter().chain(around(16)).chain(around(32)).chain(around(96)) {
            for n in [1, 15, 16, 17, 31, 32] {
                for k in [1, 2, 31, 32, 33, 64, 65] {
                    check(m, n, k, false, k % 2 == 0);
                    if m <= PANEL {
                        check(m, n, k, true, k % 2 == 1);
                    }
                }
            }
        }
        for k in around(512).into_iter().chain(around(1024)) {
            check(32, 32, k, true, false);
            check(17, 5, k, true, true);
        }
    }

    /// The instruction takes subnormal operands and results for zero; a lone row goes through it as well.
    #[test]
    fn subnormal_numbers_are_zero_in_every_number_of_rows() {
        const SMALLEST_NORMAL: u32 = 0x0080;
        const ONE: u32 = 0x3f80;
        const HALF: u32 = 0x3f00;
        let cases = [(0x0001, ONE, 0.0), (SMALLEST_NORMAL, HALF, 0.0), (SMALLEST_NORMAL, ONE, f32::MIN_POSITIVE)];
        for ((a, b, want), m) in cases.into_iter().flat_map(|case| [1, 2, 17].map(|m| (case, m))) {
            let operands = Operands { k: 2, a: vec![a; m], strides: (1, 1), b: vec![b; PANEL] };
            if let Some([tiles, _]) = both(operands.product(m, PANEL, PANEL, false), &vec![7.0; m * PANEL]) {
                assert!(tiles.iter().all(|&x| x == want.to_bits()), "{m} rows of {a:x} by {b:x}: {tiles:x?}");
            }
        }
    }

    /// Tiles are a thread's own, and survive its being interrupted.
    #[test]
    fn threads_do_not_disturb_each_other() {
        let team = Team::new(4).unwrap();
        let shapes: Vec<(usize, usize)> = (0..200).map(|i| (1 + i % 33, 1 + i * 7 % 32)).collect();
        team.run(shapes.len(), |index| check(shapes[index].0, shapes[index].1, 700, false, true));
    }
}
