//! Layers of many rows with bf16 weights: a task takes some rows through all of a layer, from their norm to their sum, so that
//! what lies between stays near and threads wait for each other once. Every number is what the ops one by one make.

use super::blocks::{Output, Product};
use super::{Array, Cpu, Lent};
use crate::bf16::words;
use crate::kernel_set::KernelSet;
use crate::norm;
use crate::ops::Norm;
use crate::pack::Packing;
use crate::real::Real;
use crate::simd::PANEL;
use crate::team;
use std::ops::{Range, RangeInclusive};

/// Rows of a task, about: fewer read the weights too often, and what more leave between products does not stay in the second-level
/// cache.
const ROWS: RangeInclusive<usize> = 64..=128;
/// Rows that tiles are filled by.
const TILE: usize = 16;
/// Rows that are normed before they are packed: they stay in the first-level cache.
const NORMED: usize = 8;

impl<F: Real, K: KernelSet<F>> Cpu<F, K> {
    /// [`Ops::normed_linears`](crate::ops::Ops::normed_linears); nothing where rows are few, or multiplied as floats.
    pub(super) fn normed_linears_by_rows(
        &self,
        x: &Array<F>,
        norm: Norm<'_, Array<F>>,
        weights: &[&Array<F>],
    ) -> Option<Vec<Array<F>>> {
        let (n, terms) = x.matrix();
        assert_eq!(norm.gain.shape(), [terms], "a gain for {:?}", x.shape());
        let tasks = self.tasks(n)?;
        let factors: Vec<_> = weights.iter().map(|w| self.factor(x, w)).collect();
        let mut outputs: Vec<_> = factors.iter().map(|&(_, outputs)| self.buffer(n * outputs)).collect();
        let places: Vec<_> = outputs.iter_mut().map(|output| Output::of(output)).collect();
        team::each(tasks, |rows| {
            let a = self.normed_words(rows_of(x, &rows), norm);
            for (&(b, outputs), to) in factors.iter().zip(&places) {
                let product = self.words(&a, b, [rows.len(), terms, outputs]);
                let panels = Product::<F>::sizes(&product).panels();
                // SAFETY: the rows are this task's.
                unsafe { product.block(0..rows.len(), 0..panels, to.at(rows.start * outputs), outputs) };
            }
        });
        let shaped = outputs.into_iter().zip(&factors).map(|(y, &(_, outputs))| self.array_of(&[n, outputs], y));
        Some(shaped.collect())
    }

    /// [`Ops::linear_onto`](crate::ops::Ops::linear_onto), under the same conditions.
    pub(super) fn linear_onto_by_rows(&self, base: &Array<F>, x: &Array<F>, w: &Array<F>) -> Option<Array<F>> {
        let ((n, terms), (b, outputs)) = (x.matrix(), self.factor(x, w));
        self.sum_by_rows(base, outputs, n, |rows, base, to| {
            let mut a = self.home.words.lend(rows.len() * words(terms));
            self.set.pack(Packing::rows(rows_of(x, &rows), terms), &mut a);
            // SAFETY: the rows are this task's.
            unsafe { self.all_onto(base, self.words(&a, b, [rows.len(), terms, outputs]), to) };
        })
    }

    /// [`Ops::feed_forward`](crate::ops::Ops::feed_forward), under the same conditions.
    pub(super) fn feed_forward_by_rows(
        &self,
        x: &Array<F>,
        norm: Norm<'_, Array<F>>,
        [gate, up, down]: [&Array<F>; 3],
    ) -> Option<Array<F>> {
        let ((n, terms), (outputs, width)) = (x.matrix(), down.matrix());
        let [(gate, inner), (up, others)] = [gate, up].map(|w| self.factor(x, w));
        assert_eq!(norm.gain.shape(), [terms], "a gain for {:?}", x.shape());
        assert!(inner == others && inner == width, "{inner} gates, {others} gated, and {width} columns for them");
        let down = self.packed_panels_of_rows(down);
        self.sum_by_rows(x, outputs, n, |rows, base, to| {
            let (count, row) = (rows.len(), words(inner));
            let a = self.normed_words(base, norm);
            let both = [gate, up].map(|b| self.words(&a, b, [count, terms, inner]));
            let mut hidden = self.home.words.lend(count * row);
            self.gated_block(&both, 0..count, 0..inner.div_ceil(PANEL), |rows, columns, gated| {
                let words = &mut hidden[rows.start * row + columns.start / 2..rows.end * row];
                self.set.pack(Packing::Rows { x: gated, cols: columns.len(), row }, words);
            });
            // SAFETY: the rows are this task's.
            unsafe { self.all_onto(base, self.words(&hidden, down, [count, inner, outputs]), to) };
        })
    }

    /// A sum `[n, outputs]` of which `f` computes the rows of a task: it is given them, what they are added to, and where to.
    fn sum_by_rows(
        &self,
        base: &Array<F>,
        outputs: usize,
        n: usize,
        f: impl Fn(Range<usize>, &[F], *mut F) + Sync,
    ) -> Option<Array<F>> {
        let tasks = self.tasks(n)?;
        assert_eq!(base.matrix(), (n, outputs), "a sum of {:?} and a product", base.shape());
        let mut sum = self.buffer(n * outputs);
        let to = Output::of(&mut sum);
        team::each(tasks, |rows| f(rows.clone(), rows_of(base, &rows), to.at(rows.start * outputs)));
        Some(self.array_of(base.shape(), sum))
    }

    /// The rows of tasks, about as many for each thread; nothing where there are too few, or where they are multiplied as floats.
    fn tasks(&self, n: usize) -> Option<impl Iterator<Item = Range<usize>>> {
        let threads = team::threads();
        let wanted = n.div_ceil(*ROWS.end()).max(4 * threads).min(n / ROWS.start());
        let even = wanted / threads * threads;
        if even == 0 || !self.multiplies_words(n) {
            return None;
        }
        let rows = n.div_ceil(even).next_multiple_of(TILE);
        Some((0..n).step_by(rows).map(move |first| first..n.min(first + rows)))
    }

    /// The words of normed rows.
    fn normed_words(&self, x: &[F], norm: Norm<'_, Array<F>>) -> Lent<'_, u32> {
        let gain = norm.gain.data();
        let cols = gain.len();
        let mut packed = self.home.words.lend(x.len() / cols * words(cols));
        let mut near = self.buffer(NORMED * cols);
        for (x, packed) in x.chunks(NORMED * cols).zip(packed.chunks_mut(NORMED * words(cols))) {
            let near = &mut near[..x.len()];
            self.set.run(
                #[inline(always)]
                || norm::forward(x, gain, F::of(norm.eps), near),
            );
            self.set.pack(Packing::rows(near, cols), packed);
        }
        packed
    }
}

/// Some rows of a matrix.
fn rows_of<'a, F: Real>(x: &'a Array<F>, rows: &Range<usize>) -> &'a [F] {
    let (_, cols) = x.matrix();
    &x.data()[rows.start * cols..rows.end * cols]
}
