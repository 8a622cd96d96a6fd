//! Products and exponentials of attention over panels of 32 slots, two pages side by side, in words.
//!
//! An exponential is a power of two beside a whole number, the row's top, which is raised where a score is far above it: what
//! has been added up by then is scaled by a power of two, which is exact.

use super::PAGE_SLOTS;
use crate::bf16;
#[cfg(target_arch = "x86_64")]
use crate::kernel_set::Fast;
use crate::kernel_set::KernelSet;
#[cfg(target_arch = "x86_64")]
use crate::pack::Avx512Bf16;
use crate::pack::{Packer, Plain};
use crate::real::{self, LANES, Real};
use crate::simd::PANEL;
#[cfg(target_arch = "x86_64")]
use crate::simd::{EXP2_TERMS, Level};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::marker::PhantomData;

/// Words of a row of weights of a panel, and of a channel of a panel of values.
pub(crate) const PANEL_WORDS: usize = PANEL / 2;
/// Exponentials of a row's panels, in one lane, whose sum is worth raising its top for: that happens seldom, and none of them
/// overflows.
const MOST: f64 = 256.0;

/// Scores of packed queries and panels of keys.
#[derive(Clone, Copy, Debug)]
pub struct KeyPanels<'a> {
    /// Queries `[rows][words]`.
    pub q: &'a [u32],
    /// Words of a query, D/2.
    pub words: usize,
    /// Keys `[panels][2][words][16]`: pages.
    pub keys: &'a [u32],
}

impl KeyPanels<'_> {
    /// Panics unless every panel is whole and an output of this length has room for the scores; returns the rows.
    pub(crate) fn check(&self, len: usize) -> usize {
        let Self { q, words, keys } = *self;
        assert!(q.len().is_multiple_of(words) && !q.is_empty(), "queries of {words} words");
        assert!(keys.len().is_multiple_of(words * PANEL), "panels of {words} words");
        let rows = q.len() / words;
        assert_eq!(keys.len() / words * rows, len, "scores of {rows} rows");
        rows
    }

    /// The definition: scores `[panels][rows][32]`.
    pub(crate) fn define<F: Real>(self, scores: &mut [F]) {
        let rows = self.check(scores.len());
        let panels = self.keys.chunks_exact(self.words * PANEL);
        for (keys, panel) in panels.zip(scores.chunks_exact_mut(rows * PANEL)) {
            let pages = || keys.chunks_exact(self.words * PAGE_SLOTS);
            for (q, scores) in self.q.chunks_exact(self.words).zip(panel.chunks_exact_mut(PANEL)) {
                for (keys, scores) in pages().zip(scores.chunks_exact_mut(PAGE_SLOTS)) {
                    for (lane, score) in scores.iter_mut().enumerate() {
                        let pairs = q.iter().zip(keys.iter().skip(lane).step_by(PAGE_SLOTS));
                        *score = pairs.fold(F::zero(), |sum, (&q, &k)| bf16::add_pair(sum, q, k));
                    }
                }
            }
        }
    }
}

/// Sums of packed weights and panels of values.
#[derive(Clone, Copy, Debug)]
pub struct ValuePanels<'a> {
    /// Weights `[panels][rows][16]`.
    pub weights: &'a [u32],
    /// Values `[panels][16][D]`.
    pub values: &'a [u32],
    /// Head dim D.
    pub dim: usize,
}

impl ValuePanels<'_> {
    /// Panics unless every panel is whole and there are weights for the rows of an output of this length; returns the rows.
    pub(crate) fn check(&self, len: usize) -> usize {
        let Self { weights, values, dim } = *self;
        assert!(values.len().is_multiple_of(PANEL_WORDS * dim) && !values.is_empty(), "panels of {dim} channels");
        let rows = len / dim;
        assert!(rows * dim == len && weights.len() == values.len() / dim * rows, "{rows} rows of outputs");
        rows
    }

    /// The definition: adds to outputs `[rows][D]`.
    pub(crate) fn define<F: Real>(self, out: &mut [F]) {
        let rows = self.check(out.len());
        let panels = self.values.chunks_exact(PANEL_WORDS * self.dim);
        for (values, weights) in panels.zip(self.weights.chunks_exact(rows * PANEL_WORDS)) {
            for (weights, out) in weights.chunks_exact(PANEL_WORDS).zip(out.chunks_exact_mut(self.dim)) {
                for (&weight, values) in weights.iter().zip(values.chunks_exact(self.dim)) {
                    out.iter_mut().zip(values).for_each(|(out, &v)| *out = bf16::add_pair(*out, weight, v));
                }
            }
        }
    }
}

/// Rows of a softmax and what has been added up of them.
#[derive(Debug)]
pub struct Sums<'a, F> {
    /// A whole number that no score of a row is far above, `[rows]`; to begin with the lowest finite one.
    pub tops: &'a mut [F],
    /// Exponentials, lane by lane.
    pub totals: &'a mut [[F; LANES]],
    /// Weighted values `[rows][D]`.
    pub out: &'a mut [F],
}

/// How powers of two are computed, and rounded to words.
trait Powers<F: Real> {
    type Packer: Packer<F>;

    /// Of so many numbers beside a top.
    fn beside(top: F, scores: &[F; LANES]) -> [F; LANES];
}

/// The definition, with the powers of a kernel set.
struct Defined<K>(PhantomData<K>);

impl<F: Real, K: KernelSet<F>> Powers<F> for Defined<K> {
    type Packer = Plain;

    fn beside(top: F, scores: &[F; LANES]) -> [F; LANES] {
        scores.map(|score| K::exp2_weight(score - top))
    }
}

/// In registers of AVX-512, with the words of AVX512-BF16; only to be used where the machine has both.
#[cfg(target_arch = "x86_64")]
struct InRegisters;

#[cfg(target_arch = "x86_64")]
impl Powers<f32> for InRegisters {
    type Packer = Avx512Bf16;

    #[inline(always)]
    fn beside(top: f32, scores: &[f32; LANES]) -> [f32; LANES] {
        /// Downwards, and without exceptions.
        const FLOOR: i32 = 0b1001;
        // SAFETY: the user has AVX-512, and a register is 16 floats.
        unsafe {
            let x = _mm512_sub_ps(_mm512_loadu_ps(scores.as_ptr()), _mm512_set1_ps(top));
            let f = _mm512_reduce_ps::<FLOOR>(x);
            let terms = EXP2_TERMS.into_iter().map(|term| _mm512_set1_ps(term));
            let p = terms.reduce(|p, term| _mm512_fmadd_ps(p, f, term)).expect("terms");
            std::mem::transmute::<__m512, [f32; LANES]>(_mm512_scalef_ps(p, x))
        }
    }
}

impl<F: Real> Sums<'_, F> {
    /// Raises a row's top to the highest of its scores, `[panels][rows][32]`, if that is above it.
    #[inline(always)]
    fn raise<K: KernelSet<F>>(&mut self, row: usize, scores: &[[F; PANEL]]) {
        let (rows, dim) = (self.tops.len(), self.out.len() / self.tops.len());
        let mut highest = [F::neg_infinity(); PANEL];
        let mut at = row;
        while at < scores.len() {
            for l in 0..PANEL {
                highest[l] = if scores[at][l] > highest[l] { scores[at][l] } else { highest[l] };
            }
            at += rows;
        }
        let (top, highest) = (self.tops[row], real::max(&highest).ceil());
        if highest > top {
            let factor = K::exp2_weight(top - highest);
            self.totals[row].iter_mut().for_each(|total| *total *= factor);
            self.out[row * dim..][..dim].iter_mut().for_each(|out| *out *= factor);
            self.tops[row] = highest;
        }
    }
}

/// The powers of two of scores `[panels][rows][32]` beside their rows' tops, as words; they are added to the rows' totals before
/// they are rounded.
#[inline(always)]
fn weigh_by<F: Real, K: KernelSet<F>, P: Powers<F>>(scores: &[F], mut sums: Sums<'_, F>, weights: &mut [u32]) {
    let (rows, most) = (sums.tops.len(), F::of(MOST));
    let (scores, weights) = (scores.as_chunks().0, weights.as_chunks_mut().0);
    assert_eq!(scores.len(), weights.len(), "words of scores");
    // Row by row: lanes that are carried from panel to panel stay in registers, and the compiler leaves rows apart.
    for row in 0..rows {
        if sums.tops[row] == F::min_value() {
            sums.raise::<K>(row, scores);
        }
        let mut lanes = power_row::<F, P>(sums.tops[row], scores, (row, rows), weights);
        if lanes.iter().fold(false, |any, &lane| any | (lane > most)) {
            sums.raise::<K>(row, scores);
            lanes = power_row::<F, P>(sums.tops[row], scores, (row, rows), weights);
        }
        let total = &mut sums.totals[row];
        (0..LANES).for_each(|l| total[l] += lanes[l]);
    }
}

/// The powers of one of so many rows beside a top, as words; their sums, lane by lane.
#[inline(always)]
fn power_row<F: Real, P: Powers<F>>(
    top: F,
    scores: &[[F; PANEL]],
    (row, rows): (usize, usize),
    weights: &mut [[u32; PANEL_WORDS]],
) -> [F; LANES] {
    let mut lanes = [F::zero(); LANES];
    let mut at = row;
    while at < scores.len() {
        let mut powers = [F::zero(); PANEL];
        for (scores, powers) in scores[at].as_chunks().0.iter().zip(powers.as_chunks_mut().0) {
            *powers = P::beside(top, scores);
            (0..LANES).for_each(|l| lanes[l] += powers[l]);
        }
        weights[at] = P::Packer::neighbours(&powers);
        at += rows;
    }
    lanes
}

/// The definition of [`KernelSet::weigh`].
pub(crate) fn weigh<F: Real, K: KernelSet<F>>(scores: &[F], sums: Sums<'_, F>, weights: &mut [u32]) {
    weigh_by::<F, K, Defined<K>>(scores, sums, weights);
}

/// The same on a machine that has tiles, and rounds by itself.
#[cfg(target_arch = "x86_64")]
pub(crate) fn weigh_on_amx(scores: &[f32], sums: Sums<'_, f32>, weights: &mut [u32]) {
    #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    fn compiled(scores: &[f32], sums: Sums<'_, f32>, weights: &mut [u32]) {
        weigh_by::<f32, Fast, InRegisters>(scores, sums, weights);
    }
    assert!(Level::detect() >= Level::AmxBf16, "this machine has no tiles");
    // SAFETY: machines with tiles have these.
    unsafe { compiled(scores, sums, weights) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel_set::Scalar;
    use crate::noise::{hash, unit};

    /// Rows after some groups of panels.
    struct Weighed {
        tops: Vec<f32>,
        totals: Vec<[f32; LANES]>,
        out: Vec<f32>,
        words: Vec<Vec<u32>>,
    }

    impl Weighed {
        fn of(rows: usize, groups: &[Vec<f32>], weigh: impl Fn(&[f32], Sums<'_, f32>, &mut [u32])) -> Self {
            let (mut tops, mut totals, mut out) = (vec![f32::MIN; rows], vec![[0.0; LANES]; rows], vec![1.5; rows * 4]);
            let weighed = |scores: &Vec<f32>| {
                let mut weights = vec![0; scores.len() / 2];
                weigh(scores, Sums { tops: &mut tops, totals: &mut totals, out: &mut out }, &mut weights);
                weights
            };
            let words = groups.iter().map(weighed).collect();
            Self { tops, totals, out, words }
        }

        /// Bits of all floats; any NaN is as good as another.
        fn bits(&self) -> Vec<u32> {
            let floats = self.tops.iter().chain(self.totals.as_flattened()).chain(&self.out);
            floats.map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
        }
    }

    /// Scores of groups of panels, of which later ones are higher.
    fn groups(rows: usize, panels: usize) -> Vec<Vec<f32>> {
        let score = |group: usize, i: usize| unit(hash(&[group as u64, i as u64])) as f32 * -20.0 + 7.0 * group as f32;
        (0..4).map(|group| (0..panels * rows * PANEL).map(|i| score(group, i)).collect()).collect()
    }

    /// Words and sums are those of the definition, for any number of rows and panels.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn weights_on_amx_are_the_definition() {
        if Level::detect() < Level::AmxBf16 {
            return;
        }
        for (rows, panels) in [(1, 1), (3, 7), (17, 2), (96, 5)] {
            for odd in [0.0, -1e-9, -300.0, f32::MIN, f32::NEG_INFINITY, 3e7, f32::INFINITY, f32::NAN] {
                let mut groups = groups(rows, panels);
                groups[0][..PANEL].fill(f32::NEG_INFINITY);
                groups[1].iter_mut().step_by(13).for_each(|score| *score = odd);
                let (found, wanted) =
                    (Weighed::of(rows, &groups, weigh_on_amx), Weighed::of(rows, &groups, weigh::<f32, Fast>));
                let same = found.bits() == wanted.bits() && found.words == wanted.words;
                assert!(same, "{rows} rows, {panels} panels with {odd}");
            }
        }
    }

    /// Totals and what stands beside them are those of one softmax, wherever tops were raised on the way; what nobody sees has
    /// no weight, also where a row has seen nothing yet.
    #[test]
    fn tops_are_raised_without_a_trace() {
        let rows = 3;
        let mut groups = groups(rows, 2);
        groups[0][..PANEL].fill(f32::NEG_INFINITY);
        groups[0][rows * PANEL..][..PANEL].fill(f32::NEG_INFINITY);
        let Weighed { tops, totals, out, words } = Weighed::of(rows, &groups, weigh::<f32, Scalar>);
        assert!(words[0][..PANEL_WORDS].iter().all(|&word| word == 0), "weights of what is not seen");
        for row in 0..rows {
            let of_row = groups
                .iter()
                .flat_map(|scores| scores.chunks(rows * PANEL))
                .flat_map(|panel| &panel[row * PANEL..][..PANEL]);
            let highest = of_row.clone().fold(f32::MIN, |a, &b| a.max(b));
            let top = tops[row];
            assert!(top.fract() == 0.0 && highest <= top + 8.0 && top < highest + 1.0, "{top} for {highest}");
            let total: f64 = of_row.map(|&score| f64::from(score - top).exp2()).sum();
            let found = f64::from(totals[row].iter().sum::<f32>());
            assert!((found / total - 1.0).abs() < 1e-6, "{found} for {total}");
            assert!(out[row * 4..][..4].iter().all(|&out| out == 0.0), "a start that the first top replaces");
        }
    }
}
