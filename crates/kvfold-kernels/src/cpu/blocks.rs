//! How products are divided among threads: one, several of the same rows in one round of work, or two that gate each other.

use super::array::Lent;
use super::{Array, Cpu};
use crate::kernel_set::KernelSet;
use crate::real::{self, Real};
use crate::simd::PANEL;
use crate::team;
use std::marker::PhantomData;
use std::ops::Range;

/// Rows of a block: several register tiles, few enough to stay in cache beside a panel.
pub(super) const ROWS: usize = 128;
/// Panels of a product that are gated or added to a sum at once: their weights stay in the second-level cache.
const NEAR_PANELS: usize = 4;
/// Rows of them that are gated at once: what they make stays in the first-level cache.
const GATED_ROWS: usize = 64;
/// Rows of them that are added to a sum at once.
const ONTO_ROWS: usize = 32;
/// Multiplications that are worth a task.
const TASK: usize = 64 * 1024;

/// Sizes of a product `[n, terms] x [outputs, terms]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) n: usize,
    pub(super) outputs: usize,
    pub(super) terms: usize,
    /// Rows of a block at most.
    pub(super) rows: usize,
}

impl Sizes {
    pub(super) fn panels(&self) -> usize {
        self.outputs.div_ceil(PANEL)
    }
}

/// A product whose right factor lies in panels of 32 columns.
pub(super) trait Product<F>: Sync {
    /// Whether smaller blocks cost nothing: else a block prepares its factors first.
    const SMALL_BLOCKS: bool;

    fn sizes(&self) -> Sizes;

    /// Computes some rows of some panels' columns; the output's rows are `row` apart.
    ///
    /// # Safety
    /// The rows and columns must be valid from `to` on, and nobody else may use them.
    unsafe fn block(&self, rows: Range<usize>, panels: Range<usize>, to: *mut F, row: usize);
}

/// A product that is added to rows of as many columns.
struct Onto<'a, F, K, P> {
    set: K,
    base: &'a [F],
    product: P,
}

impl<F: Real, K: KernelSet<F>, P: Product<F>> Product<F> for Onto<'_, F, K, P> {
    const SMALL_BLOCKS: bool = P::SMALL_BLOCKS;

    fn sizes(&self) -> Sizes {
        self.product.sizes()
    }

    unsafe fn block(&self, rows: Range<usize>, panels: Range<usize>, to: *mut F, row: usize) {
        if !P::SMALL_BLOCKS {
            // SAFETY: the caller's.
            return unsafe { self.piece(rows, panels, to, row) };
        }
        for (some, few) in pieces(panels.clone(), rows.clone(), ONTO_ROWS) {
            let to = to.wrapping_add((few.start - rows.start) * row + (some.start - panels.start) * PANEL);
            // SAFETY: the caller's.
            unsafe { self.piece(few, some, to, row) };
        }
    }
}

impl<F: Real, K: KernelSet<F>, P: Product<F>> Onto<'_, F, K, P> {
    /// # Safety
    /// As [`Product::block`].
    unsafe fn piece(&self, rows: Range<usize>, panels: Range<usize>, to: *mut F, row: usize) {
        let Sizes { outputs, .. } = self.product.sizes();
        // SAFETY: the caller's.
        unsafe { self.product.block(rows.clone(), panels.clone(), to, row) };
        let columns = panels.start * PANEL..outputs.min(panels.end * PANEL);
        for (n, base) in rows.clone().zip(self.base[rows.start * outputs..].chunks_exact(outputs)) {
            let (base, to) = (&base[columns.clone()], to.wrapping_add((n - rows.start) * row));
            // SAFETY: the caller's, and the product has written them.
            let to = unsafe { std::slice::from_raw_parts_mut(to, base.len()) };
            self.set.run(
                #[inline(always)]
                || to.iter_mut().zip(base).for_each(|(to, &base)| *to = base + *to),
            );
        }
    }
}

/// A few panels at a time by so many rows.
fn pieces(
    panels: Range<usize>,
    rows: Range<usize>,
    height: usize,
) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    let cut =
        |range: Range<usize>, step| range.clone().step_by(step).map(move |first| first..range.end.min(first + step));
    cut(panels, NEAR_PANELS).flat_map(move |some| cut(rows.clone(), height).map(move |few| (some.clone(), few)))
}

/// An output whose blocks threads write side by side.
pub(super) struct Output<'a, T> {
    first: *mut T,
    len: usize,
    data: PhantomData<&'a mut [T]>,
}

// SAFETY: whoever divides an output hands every thread columns or rows of its own.
unsafe impl<T: Send> Sync for Output<'_, T> {}

impl<'a, T> Output<'a, T> {
    pub(super) fn of(data: &'a mut [T]) -> Self {
        Self { first: data.as_mut_ptr(), len: data.len(), data: PhantomData }
    }

    /// Where an element is.
    pub(super) fn at(&self, index: usize) -> *mut T {
        assert!(index < self.len, "element {index} of {}", self.len);
        self.first.wrapping_add(index)
    }
}

/// Calls `f` with blocks of rows and of `panels` that cover an output, in parallel where it pays.
fn blocks(Sizes { n, terms, rows, .. }: Sizes, panels: usize, f: impl Fn(Range<usize>, Range<usize>) + Sync) {
    // As few blocks as hold all rows, of equal height but for what fills register tiles.
    let rows = n.div_ceil(n.div_ceil(rows).max(1)).next_multiple_of(PANEL);
    let heights = n.div_ceil(rows);
    // Few blocks of rows are divided by panels, and blocks of few rows take more panels: as many blocks for every thread, and
    // none of them more than a panel larger than another.
    let (threads, worth) = (team::threads(), TASK.div_ceil(rows.min(n).max(1) * terms * PANEL));
    let wanted = (4 * threads).div_ceil(heights.max(1)).min(panels.div_ceil(worth));
    let even = (wanted..).find(|strips| (heights * strips).is_multiple_of(threads)).unwrap_or(wanted);
    let strips = even.clamp(1, panels.max(1));
    let edge = |strip: usize| strip * panels / strips;
    team::run(heights * strips, |block| {
        let (row, strip) = (block / strips * rows, block % strips);
        f(row..n.min(row + rows), edge(strip)..edge(strip + 1));
    });
}

impl<F: Real, K: KernelSet<F>> Cpu<F, K> {
    /// The sum of an array and a product.
    pub(super) fn onto(&self, base: &Array<F>, product: impl Product<F>) -> Array<F> {
        let Sizes { n, outputs, .. } = product.sizes();
        assert_eq!(base.matrix(), (n, outputs), "a sum of {:?} and a product", base.shape());
        let sum = self.products(&[Onto { set: self.set, base: base.data(), product }]).pop();
        self.array_of(base.shape(), sum.expect("one output of one product"))
    }

    /// The outputs of products of the same rows.
    pub(super) fn products<P: Product<F>>(&self, products: &[P]) -> Vec<Lent<'_, F>> {
        let buffer = |product: &P| self.buffer(product.sizes().n * product.sizes().outputs);
        let mut outputs: Vec<_> = products.iter().map(buffer).collect();
        self.place(products, &outputs.iter_mut().map(|output| Output::of(output)).collect::<Vec<_>>());
        outputs
    }

    /// Computes products of the same rows, each to its own output.
    pub(super) fn place<P: Product<F>>(&self, products: &[P], outputs: &[Output<F>]) {
        let Some(first) = products.first().map(P::sizes) else { return };
        let (mut parts, mut panels) = (Vec::new(), 0);
        for (product, to) in products.iter().zip(outputs) {
            let sizes = product.sizes();
            assert_eq!((sizes.n, sizes.terms), (first.n, first.terms), "products of the same rows");
            assert!(sizes.n * sizes.outputs <= to.len, "an output that is too short");
            parts.push((product, to, panels));
            panels += sizes.panels();
        }
        blocks(first, panels, |rows, panels| {
            for (product, to, before) in &parts {
                let sizes = product.sizes();
                let ours = |panel: usize| panel.clamp(*before, before + sizes.panels()) - before;
                let panels = ours(panels.start)..ours(panels.end);
                if !panels.is_empty() {
                    let to = to.at(rows.start * sizes.outputs + panels.start * PANEL);
                    // SAFETY: these rows and columns are this block's alone.
                    unsafe { product.block(rows.clone(), panels, to, sizes.outputs) };
                }
            }
        });
    }

    /// `gate * sigmoid(gate) * up` of two products of the same rows: `place` is given rows, columns, and what is in them,
    /// `[rows][columns]`.
    pub(super) fn gated<P: Product<F>>(&self, both: [P; 2], place: impl Fn(Range<usize>, Range<usize>, &[F]) + Sync) {
        let sizes = both[0].sizes();
        blocks(sizes, sizes.panels(), |rows, panels| self.gated_block(&both, rows, panels, &place));
    }

    /// A block of [`Cpu::gated`].
    pub(super) fn gated_block<P: Product<F>>(
        &self,
        [gate, up]: &[P; 2],
        rows: Range<usize>,
        panels: Range<usize>,
        mut place: impl FnMut(Range<usize>, Range<usize>, &[F]),
    ) {
        let outputs = gate.sizes().outputs;
        let [mut gated, mut other] = [(); 2].map(|()| self.buffer(GATED_ROWS * NEAR_PANELS * PANEL));
        for (some, few) in pieces(panels, rows, GATED_ROWS) {
            let columns = some.start * PANEL..outputs.min(some.end * PANEL);
            let [gated, other] = [&mut gated, &mut other].map(|buffer| &mut buffer[..few.len() * columns.len()]);
            for (product, to) in [(gate, &mut *gated), (up, &mut *other)] {
                // SAFETY: the buffers are this task's and have room for the block.
                unsafe { product.block(few.clone(), some.clone(), to.as_mut_ptr(), columns.len()) };
            }
            self.set.run(
                #[inline(always)]
                || gated.iter_mut().zip(other).for_each(|(g, &mut u)| *g = real::swiglu(K::exp, *g, u)),
            );
            place(few, columns, gated);
        }
    }

    /// Computes all of a product of few rows that is added to `base`, to rows from `to` on.
    ///
    /// # Safety
    /// As [`Product::block`].
    pub(super) unsafe fn all_onto<P: Product<F>>(&self, base: &[F], product: P, to: *mut F) {
        let sizes = product.sizes();
        assert_eq!(base.len(), sizes.n * sizes.outputs, "what a product is added to");
        // SAFETY: the caller's.
        unsafe { Onto { set: self.set, base, product }.block(0..sizes.n, 0..sizes.panels(), to, sizes.outputs) };
    }
}
