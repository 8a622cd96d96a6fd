//! Weights in 8 bits: 32 neighbouring terms of an output share a scale, and each is an integer from -127 to 127, as in
//! GGUF's `Q8_0`. The scale is a bf16, rounded up so that the largest term fits.
//!
//! Activations are rounded to 16 bits where they are multiplied, 32 neighbouring terms of a row to a scale: nearer to what
//! they were than a bf16 is. The products of a block's integers are added up exactly, times both scales, and an output is one
//! chain of additions over the blocks in ascending order, whatever is computed beside it (promise I3).
//!
//! Machines multiply bytes, one side without a sign. So weights are stored 128 higher, an activation is 256 times one byte
//! plus another, both signed, and what the 128 add up to is known with the activations: sums begin below zero by it.

#[cfg(target_arch = "x86_64")]
mod vectors;

use crate::aligned::Aligned;
use crate::bf16::widen;
use crate::real::Real;
use crate::simd::{Level, PANEL};
use crate::stored::{Store, Stored};
use bytemuck::{Pod, Zeroable};

/// Terms that share a scale.
pub(crate) const TERMS: usize = 32;
/// Neighbouring terms of an output that lie side by side: machines add their products at once.
const FOUR: usize = 4;
/// What is added to a weight's integer, so that it is not negative.
const SHIFT: i32 = 128;
/// The integer of an activation that is the largest of its block: the largest of two signed bytes, whichever way the lower
/// one is rounded.
const LARGEST: f32 = (127 * 256 + 127) as f32;

/// 32 terms of 32 outputs, seventeen cache lines one after the other.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Block {
    /// Integers and [`SHIFT`], `[32/4][32][4]`.
    quants: [[[u8; FOUR]; PANEL]; TERMS / FOUR],
    /// Scales of the outputs, bf16.
    scales: [u16; PANEL],
}

// SAFETY: integers without a gap between them, of which every pattern is valid.
unsafe impl Zeroable for Block {}
// SAFETY: as above.
unsafe impl Pod for Block {}

/// A weight `[M,K]` in panels of 32 outputs, filled up with zeros to whole panels and blocks: `[M/32][K/32]`.
#[derive(Debug)]
pub(crate) struct Panels {
    blocks: Stored<Block>,
    terms: usize,
}

/// The smallest bf16 scale by which numbers up to `largest` become integers up to 127.
fn scale_of(largest: f32) -> u16 {
    ((largest / 127.0).to_bits().saturating_add(0xffff) >> 16) as u16
}

impl Block {
    /// The integer of a term of an output.
    fn quant(&self, term: usize, lane: usize) -> i32 {
        i32::from(self.quants[term / FOUR][lane][term % FOUR]) - SHIFT
    }

    fn scale(&self, lane: usize) -> f32 {
        widen(u32::from(self.scales[lane]))
    }

    /// Rounds up to 32 terms of an output.
    fn take<F: Real>(&mut self, lane: usize, x: &[F]) {
        let scale = scale_of(x.iter().fold(0.0, |top, x| (x.f64() as f32).abs().max(top)));
        self.scales[lane] = scale;
        let inverse = if scale == 0 { 0.0 } else { 1.0 / widen(u32::from(scale)) };
        for (term, x) in x.iter().enumerate() {
            let quant = (x.f64() as f32 * inverse).round_ties_even().clamp(-127.0, 127.0);
            self.quants[term / FOUR][lane][term % FOUR] = (quant as i32 + SHIFT) as u8;
        }
    }
}

impl Panels {
    /// Quantises a row-major weight of `terms` columns. Numbers must be finite: loaders check that.
    pub(crate) fn of<F: Real>(data: &[F], terms: usize, memory: &Store) -> Self {
        let (panels, row) = (data.len().div_ceil(terms * PANEL), terms.div_ceil(TERMS));
        let mut blocks = memory.room::<Block>(panels * row);
        let zero = [[[SHIFT as u8; FOUR]; PANEL]; TERMS / FOUR];
        blocks.fill(Block { quants: zero, scales: [0; PANEL] });
        for (output, x) in data.chunks_exact(terms).enumerate() {
            let blocks = &mut blocks[output / PANEL * row..][..row];
            blocks.iter_mut().zip(x.chunks(TERMS)).for_each(|(block, x)| block.take(output % PANEL, x));
        }
        Self { blocks: blocks.stored(), terms }
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        size_of_val(&self.blocks[..])
    }

    /// The panel of outputs from `32 * index` on.
    pub(crate) fn panel(&self, index: usize) -> &[Block] {
        let row = self.terms.div_ceil(TERMS);
        &self.blocks[index * row..][..row]
    }

    /// The terms of one output.
    pub(crate) fn row<F: Real>(&self, row: usize, to: &mut [F]) {
        let (panel, lane) = (self.panel(row / PANEL), row % PANEL);
        for (term, to) in to.iter_mut().enumerate() {
            let (block, term) = (&panel[term / TERMS], term % TERMS);
            *to = F::of(f64::from(block.quant(term, lane) as f32 * block.scale(lane)));
        }
    }
}

/// 32 terms of a row of activations.
#[derive(Clone, Copy, Debug)]
struct Part {
    /// Upper bytes of the integers, `[32/4][4]`.
    upper: [[i8; FOUR]; TERMS / FOUR],
    /// Lower bytes, signed as well.
    lower: [[i8; FOUR]; TERMS / FOUR],
    /// Where sums begin: what [`SHIFT`] adds to them, negative.
    start: i32,
    scale: f32,
}

impl Part {
    /// The integer of a term.
    fn integer(&self, term: usize) -> i32 {
        let of = |bytes: &[[i8; FOUR]]| i32::from(bytes[term / FOUR][term % FOUR]);
        256 * of(&self.upper) + of(&self.lower)
    }

    /// Rounds up to 32 numbers: by the scale, the largest becomes [`LARGEST`]. Where one is not finite, neither is the scale,
    /// and no output is.
    #[inline(always)]
    fn of<F: Real>(x: &[F]) -> Self {
        /// Added to a small number, leaves its nearest integer in the lowest bits, ties to even.
        const ROUND: f32 = 12_582_912.0;
        let mut numbers = [0.0f32; TERMS];
        numbers.iter_mut().zip(x).for_each(|(to, x)| *to = x.f64() as f32);
        // Without their signs, floats are in the order of their bits, what is not finite last.
        let top = f32::from_bits(numbers.iter().fold(0, |top, x| top.max(x.abs().to_bits())));
        let inverse = if top > 0.0 { LARGEST / top } else { 0.0 };
        let integers = numbers.map(|x| i32::from((x * inverse + ROUND).to_bits() as i16));
        let lower = integers.map(|a| a as i8);
        let mut upper = [0i8; TERMS];
        for ((upper, a), &lower) in upper.iter_mut().zip(integers).zip(&lower) {
            *upper = ((a - i32::from(lower)) >> 8) as i8;
        }
        let fours = |bytes: &[i8; TERMS]| {
            let mut fours = [[0; FOUR]; TERMS / FOUR];
            fours.as_flattened_mut().copy_from_slice(bytes);
            fours
        };
        let start = -SHIFT * integers.iter().sum::<i32>();
        Self { upper: fours(&upper), lower: fours(&lower), start, scale: top / LARGEST }
    }
}

impl Default for Part {
    fn default() -> Self {
        Self { upper: Default::default(), lower: Default::default(), start: 0, scale: 0.0 }
    }
}

/// Rows of activations in 16 bits, filled up to whole blocks: `[M][K/32]`.
#[derive(Debug)]
pub(crate) struct Rows {
    parts: Aligned<Part>,
    row: usize,
}

/// Some of the rows, to be written.
pub(crate) struct RowsMut<'a> {
    parts: &'a mut [Part],
    row: usize,
}

impl Rows {
    /// Room for rows of so many terms.
    pub(crate) fn room(rows: usize, terms: usize) -> Self {
        let row = terms.div_ceil(TERMS);
        Self { parts: Aligned::new(rows * row), row }
    }

    /// Blocks of so many rows.
    pub(crate) fn blocks(&mut self, rows: usize) -> impl Iterator<Item = RowsMut<'_>> {
        let row = self.row;
        self.parts.chunks_mut(rows * row).map(move |parts| RowsMut { parts, row })
    }
}

impl RowsMut<'_> {
    /// Rounds rows of `terms` numbers.
    #[inline(always)]
    pub(crate) fn take<F: Real>(self, x: &[F], terms: usize) {
        for (parts, x) in self.parts.chunks_exact_mut(self.row).zip(x.chunks_exact(terms)) {
            parts.iter_mut().zip(x.chunks(TERMS)).for_each(|(part, x)| *part = Part::of(x));
        }
    }
}

/// `c [m,n] = a [m,k] . panel [k,n]`; `n` is at most a panel.
#[derive(Clone, Copy, Debug)]
pub struct GemmQ8<'a> {
    /// Rows of the output.
    pub(crate) m: usize,
    /// Columns of the output, at most [`PANEL`].
    pub(crate) n: usize,
    /// Left factor.
    pub(crate) a: &'a Rows,
    /// Its first row.
    pub(crate) first: usize,
    /// Right factor: [`Panels::panel`].
    pub(crate) b: &'a [Block],
    /// Distance between the output's rows.
    pub(crate) c_row: usize,
}

impl GemmQ8<'_> {
    /// Panics unless there are as many rows and terms as it says.
    fn check(&self) {
        assert!((1..=PANEL).contains(&self.n), "{} outputs of a panel", self.n);
        assert!((self.first + self.m) * self.a.row <= self.a.parts.len(), "a is too short");
        assert_eq!(self.a.row, self.b.len(), "blocks of both factors");
    }

    /// A row of the left factor.
    #[inline(always)]
    fn row(&self, row: usize) -> &[Part] {
        &self.a.parts[(self.first + row) * self.a.row..][..self.a.row]
    }

    /// Writes a row of the output.
    ///
    /// # Safety
    /// As [`gemm_scalar`].
    #[inline(always)]
    unsafe fn write(&self, c: *mut f32, row: usize, sums: &[f32; PANEL]) {
        // SAFETY: the caller's.
        unsafe { c.add(row * self.c_row).copy_from_nonoverlapping(sums.as_ptr(), self.n) };
    }
}

/// The product in plain loops: the definition.
///
/// # Safety
/// Rows of `n` elements, `c_row` apart, must be valid at `c` for writes, and nobody else may use them.
pub(crate) unsafe fn gemm_scalar<F: Real>(g: GemmQ8<'_>, c: *mut F) {
    g.check();
    for row in 0..g.m {
        for lane in 0..g.n {
            let mut sum = F::zero();
            for (a, b) in g.row(row).iter().zip(g.b) {
                let product: i32 = (0..TERMS).map(|term| a.integer(term) * b.quant(term, lane)).sum();
                let scale = F::of(f64::from(a.scale)) * F::of(f64::from(b.scale(lane)));
                sum += scale * F::of(f64::from(product));
            }
            // SAFETY: inside the rows that the caller vouches for.
            unsafe { *c.add(row * g.c_row + lane) = sum };
        }
    }
}

/// The product with the vectors of an instruction set.
///
/// # Safety
/// As [`gemm_scalar`].
pub(crate) unsafe fn gemm(level: Level, g: GemmQ8<'_>, c: *mut f32) {
    g.check();
    assert!(level <= Level::detect(), "{level:?} is not available on this machine");
    // SAFETY: the caller vouches for `c`, and the machine has the features.
    unsafe {
        match level {
            Level::Portable => plain(g, c),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::Avx512 => vectors::avx2(g, c),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 | Level::AmxBf16 => vectors::vnni(g, c),
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("not an x86-64 machine"),
        }
    }
}

/// The product without vectors of its own, in the order in which weights lie.
///
/// # Safety
/// As [`gemm_scalar`].
unsafe fn plain(g: GemmQ8<'_>, c: *mut f32) {
    for row in 0..g.m {
        let mut sums = [0.0f32; PANEL];
        for (a, b) in g.row(row).iter().zip(g.b) {
            let mut products = [a.start; PANEL];
            for (four, quants) in b.quants.iter().enumerate() {
                let a: [i32; FOUR] = std::array::from_fn(|nth| a.integer(four * FOUR + nth));
                for (sum, quants) in products.iter_mut().zip(quants) {
                    *sum += a.iter().zip(quants).map(|(&a, &b)| a * i32::from(b)).sum::<i32>();
                }
            }
            for ((lane, sum), &product) in sums.iter_mut().enumerate().zip(&products) {
                *sum += a.scale * b.scale(lane) * product as f32;
            }
        }
        // SAFETY: the caller's.
        unsafe { g.write(c, row, &sums) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn noise(seed: u64, i: usize) -> f32 {
        (crate::noise::unit(crate::noise::hash(&[seed, i as u64])) * 2.0 - 1.0) as f32
    }

    /// Numbers whose blocks differ in size.
    fn uneven(seed: u64, len: usize) -> Vec<f32> {
        (0..len).map(|i| noise(seed, i) * noise(seed, i / TERMS + 99_999)).collect()
    }

    proptest! {
        /// A weight is off by half a step of its block's scale at most, and the largest is never cut off.
        #[test]
        fn quantised_weights_are_close(rows in 1usize..40, terms in 1usize..80, seed: u64) {
            let data = uneven(seed, rows * terms);
            let panels = Panels::of(&data, terms, &Store::default());
            let mut row = vec![0.0f32; terms];
            for (r, data) in data.chunks_exact(terms).enumerate() {
                panels.row(r, &mut row);
                for (got, want) in row.chunks(TERMS).zip(data.chunks(TERMS)) {
                    let top = want.iter().fold(0.0f32, |top, x| x.abs().max(top));
                    let step = widen(u32::from(scale_of(top)));
                    prop_assert!(step * 127.0 >= top && step * 127.0 <= top * 1.01 + f32::MIN_POSITIVE);
                    got.iter().zip(want).for_each(|(got, want)| assert!((got - want).abs() <= 0.501 * step));
                }
            }
        }

        /// An activation is off by half of a 32,639th of its block's largest at most.
        #[test]
        fn rounded_activations_are_close(terms in 1usize..=TERMS, seed: u64) {
            let x = uneven(seed, terms);
            let (part, top) = (Part::of(&x), x.iter().fold(0.0f32, |top, x| x.abs().max(top)));
            for (term, x) in x.iter().enumerate() {
                let got = part.integer(term) as f32 * part.scale;
                prop_assert!((got - x).abs() <= 0.51 * top / LARGEST + f32::MIN_POSITIVE, "{} {}", got, x);
            }
            prop_assert_eq!(part.start, -SHIFT * (0..TERMS).map(|term| part.integer(term)).sum::<i32>());
        }

        /// Every instruction set computes the definition, and a row the same bytes alone as among others.
        #[test]
        fn tiles_match_the_definition(m in 1usize..20, n in 1usize..33, k in 1usize..100, seed: u64) {
            let data: Vec<f32> = (0..n * k).map(|i| noise(seed, i)).collect();
            let x: Vec<f32> = (0..m * k).map(|i| noise(seed, i + 7000)).collect();
            let (panels, mut rows) = (Panels::of(&data, k, &Store::default()), Rows::room(m, k));
            rows.blocks(m).for_each(|rows| rows.take(&x, k));
            let g = GemmQ8 { m, n, a: &rows, first: 0, b: panels.panel(0), c_row: n };
            let mut expected = vec![0.0f32; m * n];
            // SAFETY: the output is as large as the product.
            unsafe { gemm_scalar(g, expected.as_mut_ptr()) };
            for level in Level::available() {
                let (mut c, mut alone) = (vec![0.0f32; m * n], vec![0.0f32; n]);
                // SAFETY: as above.
                unsafe { gemm(level, g, c.as_mut_ptr()) };
                for (got, want) in c.iter().zip(&expected) {
                    prop_assert!((got - want).abs() <= 1e-6 * (1.0 + k as f32).sqrt(), "{level:?}: {got} {want}");
                }
                for (first, c) in c.chunks_exact(n).enumerate() {
                    // SAFETY: one row of outputs.
                    unsafe { gemm(level, GemmQ8 { m: 1, first, ..g }, alone.as_mut_ptr()) };
                    prop_assert_eq!(c, &alone[..], "{:?}", level);
                }
            }
        }
    }

    /// Sums of the largest integers of both signs do not overflow, and what is not finite is not hidden.
    #[test]
    fn extremes_are_computed() {
        let data: Vec<f32> =
            (0..PANEL * TERMS).map(|i| if (i / TERMS).is_multiple_of(2) { 1.0 } else { -1.0 }).collect();
        let panels = Panels::of(&data, TERMS, &Store::default());
        let x: Vec<f32> = [3.0, -3.0, f32::NAN, f32::INFINITY, 0.0].iter().flat_map(|&x| [x; TERMS]).collect();
        let m = x.len() / TERMS;
        let mut rows = Rows::room(m, TERMS);
        rows.blocks(m).for_each(|rows| rows.take(&x, TERMS));
        let g = GemmQ8 { m, n: PANEL, a: &rows, first: 0, b: panels.panel(0), c_row: PANEL };
        for level in Level::available() {
            let mut c = vec![0.0f32; m * PANEL];
            // SAFETY: the output is as large as the product.
            unsafe { gemm(level, g, c.as_mut_ptr()) };
            for (lane, sign) in [1.0f32, -1.0].into_iter().cycle().take(PANEL).enumerate() {
                let of = |row: usize| c[row * PANEL + lane];
                assert!((of(0) - 96.0 * sign).abs() < 1.0 && of(0) == -of(1), "{level:?}: {} {}", of(0), of(1));
                assert!(!of(2).is_finite() && !of(3).is_finite() && of(4) == 0.0, "{level:?}: lane {lane}");
            }
        }
    }
}
