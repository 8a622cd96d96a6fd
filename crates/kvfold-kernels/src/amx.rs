//! Products of bf16 operands on the tile registers of AMX.
//!
//! A tile holds up to 16 rows of 16 words, and `tdpbf16ps` multiplies two of them: the words of a row of `rows` are a
//! row of the left tile as they lie, and 16 columns of 16 rows of a panel are a right tile. A step adds 16 words, 32
//! terms, to each output: the lower and the upper terms in a chain each, from zero, then both together to the sum.
//! Steps begin at multiples of 16 words, and a shorter last one gets smaller tiles, so that an output does not depend
//! on how many rows or columns are computed beside it (promise I3). The instruction takes numbers below the smallest
//! normal one for zero.
//!
//! Tile registers belong to the thread: [`Tiles`] are set up for blocks of one size after the other and given back after them.
//! Nothing else of this process uses them, so they stay as they are from one `asm!` to the next.

use crate::bf16::GemmBf16;
use crate::paged::{KeyPanels, PAGE_SLOTS, PANEL_WORDS, ValuePanels};
use crate::simd::{Level, PANEL};
use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::cell::Cell;
use std::marker::PhantomData;

/// Rows of a tile, and words of its rows.
const TILE: usize = 16;
/// Bytes of a word or of a sum.
const BYTES: usize = 4;
/// Instructions that do nothing after each one of a step: there is time for them, and where another program runs on the core's
/// other thread a step takes two thirds of the time with them (measured: 150 cycles instead of 250, and 59 with and without when alone).
const PACE: usize = 8;
/// Words of panels that stay in the second-level cache while blocks of rows pass by.
const STRIP: usize = 128 * 1024;

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
/// [`detect`] must have said yes. `g` must pass its check, and `c` must be valid for rows of `g.n` elements, `g.c_row`
/// apart.
pub(crate) unsafe fn gemm(g: GemmBf16<'_>, c: *mut f32) {
    let mut tiles = Tiles::default();
    for (first, words, steps) in parts(g.words, TILE) {
        for (col, cols, panels) in parts(g.n, PANEL) {
            let strip = (STRIP / (g.words * PANEL)).max(1);
            for (row, rows, blocks) in parts(g.m, 2 * TILE) {
                // SAFETY: the machine has tiles, and these sizes fit them.
                unsafe { tiles.fit(rows, cols, words) };
                // A block's outputs are written side by side, from panels that are near.
                let places = (0..panels).step_by(strip).flat_map(|first| {
                    let strip = first..panels.min(first + strip);
                    (0..blocks).flat_map(move |block| strip.clone().map(move |panel| (panel, block)))
                });
                for (panel, block) in places {
                    let (col, row) = (col + panel * PANEL, row + block * 2 * TILE);
                    let block = Block {
                        steps,
                        a: g.a[row * g.a_row + first..].as_ptr(),
                        a_row: g.a_row * BYTES,
                        a_next: TILE * BYTES,
                        b: g.b[col / PANEL * g.b_panel + first * PANEL..].as_ptr(),
                        b_second: TILE * BYTES,
                        b_row: PANEL * BYTES,
                        c: c.wrapping_add(row * g.c_row + col),
                        c_row: g.c_row * BYTES,
                        accumulate: g.accumulate || first > 0,
                    };
                    // SAFETY: the block lies inside the product and is of the tiles' sizes.
                    unsafe { block.sum::<FAR>((rows, cols), &mut tiles) };
                }
            }
        }
    }
}

/// Scores, each summed as the module says, on a machine that has tiles.
pub(crate) fn key_panels(tiles: &mut Tiles, product: KeyPanels<'_>, scores: &mut [f32]) {
    assert!(Level::detect() >= Level::AmxBf16, "this machine has no tiles");
    let queries = product.check(scores.len());
    let (KeyPanels { q, words, keys }, c) = (product, scores.as_mut_ptr());
    for (first, part, steps) in parts(words, TILE) {
        for (query, rows, blocks) in parts(queries, 2 * TILE) {
            // SAFETY: the machine has tiles, and these sizes fit them.
            unsafe { tiles.fit(rows, PANEL, part) };
            for (n, keys) in keys.chunks_exact(words * PANEL).enumerate() {
                for query in (0..blocks).map(|b| query + b * 2 * TILE) {
                    let block = Block {
                        steps,
                        a: q[query * words + first..].as_ptr(),
                        a_row: words * BYTES,
                        a_next: TILE * BYTES,
                        b: keys[first * PAGE_SLOTS..].as_ptr(),
                        b_second: words * PAGE_SLOTS * BYTES,
                        b_row: PAGE_SLOTS * BYTES,
                        c: c.wrapping_add((n * queries + query) * PANEL),
                        c_row: PANEL * BYTES,
                        accumulate: first > 0,
                    };
                    // SAFETY: the block lies inside the product and is of the tiles' sizes.
                    unsafe { block.sum::<NEAR>((rows, PANEL), tiles) };
                }
            }
        }
    }
}

/// Adds weighted values, a step of each sum per panel, on a machine that has tiles.
pub(crate) fn value_panels(tiles: &mut Tiles, product: ValuePanels<'_>, out: &mut [f32]) {
    assert!(Level::detect() >= Level::AmxBf16, "this machine has no tiles");
    let queries = product.check(out.len());
    let (ValuePanels { weights, values, dim }, c) = (product, out.as_mut_ptr());
    for (col, cols, panels) in parts(dim, PANEL) {
        for (query, rows, blocks) in parts(queries, 2 * TILE) {
            // SAFETY: the machine has tiles, and these sizes fit them.
            unsafe { tiles.fit(rows, cols, PANEL_WORDS) };
            for col in (0..panels).map(|p| col + p * PANEL) {
                for query in (0..blocks).map(|b| query + b * 2 * TILE) {
                    let block = Block {
                        steps: values.len() / (PANEL_WORDS * dim),
                        a: weights[query * PANEL_WORDS..].as_ptr(),
                        a_row: PANEL_WORDS * BYTES,
                        a_next: queries * PANEL_WORDS * BYTES,
                        b: values[col..].as_ptr(),
                        b_second: TILE * BYTES,
                        b_row: dim * BYTES,
                        c: c.wrapping_add(query * dim + col),
                        c_row: dim * BYTES,
                        accumulate: true,
                    };
                    // SAFETY: the block lies inside the product and is of the tiles' sizes.
                    unsafe { block.sum::<NEAR>((rows, cols), tiles) };
                }
            }
        }
    }
}

/// The units that a length is made of, and a rest that is shorter, where there are any: where they begin, how long each is,
/// and how many there are.
fn parts(len: usize, unit: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    let whole = len / unit;
    [(0, unit, whole), (whole * unit, len % unit, 1)].into_iter().filter(|&(_, size, count)| size * count > 0)
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

thread_local! {
    /// Whether somebody has the thread's tile registers.
    static TAKEN: Cell<bool> = const { Cell::new(false) };
}

/// The thread's tile registers, set up for blocks of the size that was last asked for; given back when dropped.
///
/// Tiles 0 to 3 are the output's, 4 and 5 the left factor's, 6 and 7 the right one's. One that is not in use has no rows and
/// must not be named.
#[derive(Debug)]
pub struct Tiles {
    size: Option<[usize; 3]>,
    /// They stay on their thread.
    thread: PhantomData<*const ()>,
}

impl Default for Tiles {
    /// Those of this thread, not set up; panics if somebody has them.
    fn default() -> Self {
        assert!(!TAKEN.replace(true), "somebody else has this thread's tile registers");
        Self { size: None, thread: PhantomData }
    }
}

impl Tiles {
    /// # Safety
    /// [`detect`] must have said yes; 1 to 32 rows and columns, 1 to 16 words.
    unsafe fn fit(&mut self, rows: usize, cols: usize, words: usize) {
        if self.size == Some([rows, cols, words]) {
            return;
        }
        let mut config = Config { palette: 1, ..Config::default() };
        let part = |of: usize, second: usize| if second == 0 { of.min(TILE) } else { of.saturating_sub(TILE) };
        let output = |tile: usize| (tile, part(rows, tile / 2), part(cols, tile % 2));
        let left = |tile: usize| (4 + tile, part(rows, tile), words);
        let right = |tile: usize| (6 + tile, words, part(cols, tile));
        for (tile, rows, cols) in [output(0), output(1), output(2), output(3), left(0), left(1), right(0), right(1)] {
            if rows > 0 && cols > 0 {
                config.rows[tile] = rows as u8;
                config.row_bytes[tile] = (cols * BYTES) as u16;
            }
        }
        // SAFETY: the caller's; a tile is no larger than 16 rows of 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
        self.size = Some([rows, cols, words]);
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        if self.size.is_some() {
            // SAFETY: whoever set them up has a machine with tiles.
            unsafe { asm!("tilerelease", options(nostack, nomem)) };
        }
        TAKEN.set(false);
    }
}

/// What is done between two instructions of a step: nothing for a moment, and of a panel an eighth of the lines that are loaded two
/// steps later is asked for.
macro_rules! between {
    ($eighth:literal) => {
        concat!(
            ".rept {pace}\nnop\n.endr\n.if {far}\n.irp line, 0, 1, 2, 3\nprefetcht0 [{b} + {panel_step} + {panel_step} / 8 * ",
            $eighth,
            " + 64 * \\line]\n.endr\n.endif"
        )
    };
}

/// Up to two tiles of rows by two of columns, over the steps of a sum, each of up to 16 words. Distances are in bytes.
struct Block {
    steps: usize,
    a: *const u32,
    /// Between rows of the left factor.
    a_row: usize,
    /// To its next step.
    a_next: usize,
    b: *const u32,
    /// To the second tile's columns.
    b_second: usize,
    /// Between rows of the right factor, of which the next step's are below.
    b_row: usize,
    c: *mut f32,
    /// Between rows of the output.
    c_row: usize,
    accumulate: bool,
}

/// Whether the right factor, then a panel, and the output are worth asking for before they are used.
const NEAR: usize = 0;
const FAR: usize = 1;

impl Block {
    /// Computes a block of so many rows and columns.
    ///
    /// # Safety
    /// As [`gemm`], for a block that the tiles are set up for. There must be a step.
    unsafe fn sum<const FROM: usize>(self, (rows, cols): (usize, usize), tiles: &mut Tiles) {
        // SAFETY: the caller's.
        unsafe {
            match (rows > TILE, cols > TILE) {
                (false, false) => self.sum_of::<0, 0, FROM>(tiles),
                (false, true) => self.sum_of::<0, 1, FROM>(tiles),
                (true, false) => self.sum_of::<1, 0, FROM>(tiles),
                (true, true) => self.sum_of::<1, 1, FROM>(tiles),
            }
        }
    }

    /// # Safety
    /// As [`Block::sum`]; `TALL` is 1 where the block has more than 16 rows, and `WIDE` where it has more columns.
    unsafe fn sum_of<const TALL: usize, const WIDE: usize, const FROM: usize>(self, _: &mut Tiles) {
        // SAFETY: the tiles are no larger than what is left of the product, so every access is inside it.
        unsafe {
            asm!(
                "test {line:e}, {line:e}",
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
                "jmp 3f",
                "2:",
                ".if {whole}",
                "mov {line}, {c}",
                ".rept 2 * {tile}",
                "prefetchw [{line}]",
                "prefetchw [{line} + 64]",
                "add {line}, {c_row}",
                ".endr",
                ".endif",
                "tilezero tmm0",
                ".if {wide}",
                "tilezero tmm1",
                ".endif",
                ".if {tall}",
                "tilezero tmm2",
                ".if {wide}",
                "tilezero tmm3",
                ".endif",
                ".endif",
                "3:",
                "tileloadd tmm4, [{a} + {a_row}]",
                "tileloadd tmm6, [{b} + {b_row}]",
                ".if {wide}",
                "tileloadd tmm7, [{right_b} + {b_row}]",
                ".endif",
                ".if {tall}",
                "tileloadd tmm5, [{lower_a} + {a_row}]",
                ".endif",
                "dec {steps}",
                "jz 5f",
                // Each tile is loaded again as soon as the products that read it are under way.
                "4:",
                "add {b}, {b_next}",
                "add {right_b}, {b_next}",
                "add {a}, {a_next}",
                "add {lower_a}, {a_next}",
                "tdpbf16ps tmm0, tmm4, tmm6",
                between!(0),
                ".if {wide}",
                "tdpbf16ps tmm1, tmm4, tmm7",
                between!(1),
                ".endif",
                "tileloadd tmm4, [{a} + {a_row}]",
                between!(2),
                ".if {tall}",
                "tdpbf16ps tmm2, tmm5, tmm6",
                between!(3),
                ".endif",
                "tileloadd tmm6, [{b} + {b_row}]",
                between!(4),
                ".if {wide}",
                ".if {tall}",
                "tdpbf16ps tmm3, tmm5, tmm7",
                between!(5),
                ".endif",
                "tileloadd tmm7, [{right_b} + {b_row}]",
                between!(6),
                ".endif",
                ".if {tall}",
                "tileloadd tmm5, [{lower_a} + {a_row}]",
                between!(7),
                ".endif",
                "dec {steps}",
                "jnz 4b",
                "5:",
                // Lines beyond a panel are those of the next one.
                ".if {far}",
                "add {b}, {b_next}",
                ".endif",
                "tdpbf16ps tmm0, tmm4, tmm6",
                between!(0),
                between!(1),
                ".if {wide}",
                "tdpbf16ps tmm1, tmm4, tmm7",
                between!(2),
                between!(3),
                ".endif",
                ".if {tall}",
                "tdpbf16ps tmm2, tmm5, tmm6",
                between!(4),
                between!(5),
                ".if {wide}",
                "tdpbf16ps tmm3, tmm5, tmm7",
                between!(6),
                between!(7),
                ".endif",
                ".endif",
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
                line = inout(reg) u64::from(self.accumulate) => _,
                c = in(reg) self.c,
                lower_c = in(reg) self.c.wrapping_byte_add(TILE * self.c_row),
                c_row = in(reg) self.c_row,
                a = inout(reg) self.a => _,
                lower_a = inout(reg) self.a.wrapping_byte_add(TILE * self.a_row) => _,
                a_row = in(reg) self.a_row,
                a_next = in(reg) self.a_next,
                b = inout(reg) self.b => _,
                right_b = inout(reg) self.b.wrapping_byte_add(self.b_second) => _,
                b_row = in(reg) self.b_row,
                b_next = in(reg) TILE * self.b_row,
                steps = inout(reg) self.steps => _,
                panel_step = const TILE * PANEL * BYTES,
                tall = const TALL,
                wide = const WIDE,
                far = const FROM,
                whole = const TALL * WIDE * FROM,
                tile = const TILE,
                pace = const PACE,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack)
            );
        }
    }
}

/// Multiplies tiles `steps` times four, four sums in turn, and touches no memory; returns the floating-point operations.
///
/// # Safety
/// [`detect`] must have said yes.
pub(crate) unsafe fn products(steps: usize) -> usize {
    // SAFETY: the caller's, and whole tiles are set up.
    unsafe {
        let mut tiles = Tiles::default();
        tiles.fit(2 * TILE, PANEL, TILE);
        asm!(
            "2:",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "dec {steps}",
            "jnz 2b",
            steps = inout(reg) steps => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, nomem)
        );
    }
    2 * 2 * 4 * TILE * TILE * TILE * steps
}

#[cfg(test)]
mod tests {
    use super::{Tiles, key_panels, value_panels};
    use crate::bf16::{self, GemmBf16, widen, words};
    use crate::pack::{Packing, pack};
    use crate::paged::{KeyPanels, PAGE_SLOTS, PANEL_WORDS, ValuePanels};
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
                let (a, panel) = (&g.a[i * g.a_row..][..g.words], &g.b[j / PANEL * g.b_panel..][..g.words * PANEL]);
                for (a, b) in a.chunks(16).zip(panel.chunks(16 * PANEL)) {
                    sum += step(a.iter().zip(b.iter().skip(j % PANEL).step_by(PANEL)));
                }
                *c = sum;
            }
        }
    }

    /// Panels of a right factor.
    const PANELS: usize = 3;

    /// One step of a sum by the manual: the products of lower terms, and of upper ones, in a chain each.
    fn step<'a>(pairs: impl Iterator<Item = (&'a u32, &'a u32)>) -> f32 {
        let (mut lower, mut upper) = (0.0f32, 0.0f32);
        for (&a, &b) in pairs {
            lower = widen(a & 0xffff).mul_add(widen(b & 0xffff), lower);
            upper = widen(a >> 16).mul_add(widen(b >> 16), upper);
        }
        lower + upper
    }

    /// Random words of ordinary terms.
    fn words_of(seed: u64, len: usize) -> Vec<u32> {
        let x: Vec<f32> = (0..2 * len).map(|i| noise(seed, i)).collect();
        let mut packed = vec![0; len];
        pack(Level::Portable, Packing::rows(&x, 2 * len), &mut packed);
        packed
    }

    proptest! {
        /// Panels of keys and of values, for any head dim and number of panels and rows.
        #[test]
        fn panels_are_as_the_manual_says(rows in 1usize..100, half in 1usize..70, panels in 1usize..9, seed: u64) {
            if !Level::available().contains(&Level::AmxBf16) {
                return Ok(());
            }
            let (dim, bits) = (2 * half, |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<u32>>());
            let panel = half * PANEL;
            let (q, keys) = (words_of(seed, rows * half), words_of(seed ^ 2, panels * panel));
            let mut scores = vec![0.5; panels * rows * PANEL];
            let mut wanted = scores.clone();
            let mut tiles = Tiles::default();
            key_panels(&mut tiles, KeyPanels { q: &q, words: half, keys: &keys }, &mut scores);
            for (keys, wanted) in keys.chunks(panel).zip(wanted.chunks_exact_mut(rows * PANEL)) {
                for (q, wanted) in q.chunks_exact(half).zip(wanted.chunks_exact_mut(PANEL)) {
                    for (n, score) in wanted.iter_mut().enumerate() {
                        let page = &keys[n / PAGE_SLOTS * half * PAGE_SLOTS..][..half * PAGE_SLOTS];
                        let pairs: Vec<_> = q.iter().zip(page.iter().skip(n % PAGE_SLOTS).step_by(PAGE_SLOTS)).collect();
                        *score = pairs.chunks(16).fold(0.0, |sum, pairs| sum + step(pairs.iter().copied()));
                    }
                }
            }
            prop_assert_eq!(bits(&scores), bits(&wanted), "scores");

            let (weights, values) = (words_of(seed ^ 1, panels * rows * PANEL_WORDS), words_of(seed ^ 3, panels * panel));
            let mut out: Vec<f32> = (0..rows * dim).map(|i| noise(!seed, i)).collect();
            let mut wanted = out.clone();
            value_panels(&mut tiles, ValuePanels { weights: &weights, values: &values, dim }, &mut out);
            for (values, weights) in values.chunks(panel).zip(weights.chunks_exact(rows * PANEL_WORDS)) {
                for (weights, wanted) in weights.chunks_exact(PANEL_WORDS).zip(wanted.chunks_exact_mut(dim)) {
                    for (d, out) in wanted.iter_mut().enumerate() {
                        *out += step(weights.iter().zip(values.iter().skip(d).step_by(dim)));
                    }
                }
            }
            prop_assert_eq!(bits(&out), bits(&wanted), "values");
        }
    }

    /// Random operands.
    struct Operands {
        words: usize,
        a: Vec<u32>,
        b: Vec<u32>,
    }

    impl Operands {
        fn new(m: usize, k: usize, seed: u64) -> Self {
            let x: Vec<f32> = (0..m * k).map(|i| noise(seed, i)).collect();
            let y: Vec<f32> = (0..PANELS * PANEL * k).map(|i| noise(seed ^ 1, i)).collect();
            let (mut a, mut b) = (vec![0; m * words(k)], vec![0; PANELS * words(k) * PANEL]);
            pack(Level::Portable, Packing::rows(&x, k), &mut a);
            let panels = b.chunks_exact_mut(words(k) * PANEL).zip(y.chunks(PANEL * k));
            panels.for_each(|(panel, x)| pack(Level::Portable, Packing::PanelOfRows { x, cols: k }, panel));
            Self { words: words(k), a, b }
        }

        fn product(&self, m: usize, n: usize, c_row: usize, accumulate: bool) -> GemmBf16<'_> {
            let (a_row, b_panel) = (self.words, self.words * PANEL);
            GemmBf16 { m, n, words: self.words, a: &self.a, a_row, b: &self.b, b_panel, c_row, accumulate }
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

    fn check(m: usize, n: usize, k: usize, accumulate: bool) {
        let operands = Operands::new(m, k, k as u64);
        let start: Vec<f32> = (0..m * (n + 3)).map(|i| noise(2, i)).collect();
        if let Some([tiles, manual]) = both(operands.product(m, n, n + 3, accumulate), &start) {
            assert!(tiles == manual, "{m} x {n} of {k} terms, accumulate {accumulate}");
        }
    }

    proptest! {
        #[test]
        fn every_bit_is_as_the_manual_says(m in 1usize..140, n in 1usize..=PANELS * PANEL, k in 1usize..200, accumulate: bool) {
            check(m, n, k, accumulate);
        }
    }

    /// One more and one less than a tile, two, and a step.
    #[test]
    fn edges_are_as_the_manual_says() {
        let around = |x: usize| [x - 1, x, x + 1];
        for m in [1, 2].into_iter().chain(around(16)).chain(around(32)).chain(around(96)) {
            for n in [1, 15, 16, 17, 31, 32, 33, 64] {
                for k in [1, 2, 31, 32, 33, 64, 65] {
                    check(m, n, k, k % 2 == 0);
                }
            }
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
            let operands = Operands { words: 1, a: vec![a; m], b: vec![b; PANEL] };
            if let Some([tiles, _]) = both(operands.product(m, PANEL, PANEL, false), &vec![7.0; m * PANEL]) {
                assert!(tiles.iter().all(|&x| x == want.to_bits()), "{m} rows of {a:x} by {b:x}: {tiles:x?}");
            }
        }
    }

    #[test]
    fn a_thread_has_one_set_of_tiles_at_a_time() {
        drop(Tiles::default());
        let first = Tiles::default();
        assert!(std::panic::catch_unwind(Tiles::default).is_err(), "a second set");
        assert!(std::thread::spawn(|| drop(Tiles::default())).join().is_ok(), "another thread's");
        drop(first);
    }

    /// Tiles are a thread's own, and survive its being interrupted.
    #[test]
    fn threads_do_not_disturb_each_other() {
        let team = Team::new(4).unwrap();
        let shapes: Vec<(usize, usize)> = (0..200).map(|i| (1 + i % 33, 1 + i * 7 % 32)).collect();
        team.run(shapes.len(), |index| check(shapes[index].0, shapes[index].1, 700, true));
    }
}
