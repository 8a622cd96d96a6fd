//! How a product's output is divided among threads, and products with weights that are widened block by block.

use super::Cpu;
use crate::kernel_set::KernelSet;
use crate::real::Real;
use crate::simd::{Gemm, PANEL, STRIP};
use rayon::prelude::*;
use std::ops::Range;

/// Rows of a block: several register tiles, few enough to stay in cache beside a panel.
const ROWS: usize = 96;
/// Rows from which widening a panel of smaller numbers is paid back.
pub(super) const MANY: usize = 4;
/// Multiplications that are worth a task.
const TASK: usize = 256 * 1024;

/// Sizes of a product `[n, terms] x [outputs, terms]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) n: usize,
    pub(super) outputs: usize,
    pub(super) terms: usize,
}

/// An output whose blocks threads write side by side.
struct Output<F>(*mut F);

// SAFETY: `blocks` hands every thread columns and rows of its own.
unsafe impl<F: Send> Sync for Output<F> {}

impl<F> Output<F> {
    fn of(data: &mut [F]) -> Self {
        Self(data.as_mut_ptr())
    }

    /// Where an element is.
    fn at(&self, index: usize) -> *mut F {
        self.0.wrapping_add(index)
    }
}

/// Calls `f` with blocks of rows and panels that cover an output, in parallel where it pays.
fn blocks(Sizes { n, outputs, terms }: Sizes, f: impl Fn(Range<usize>, Range<usize>) + Sync) {
    let panels = outputs.div_ceil(PANEL);
    let rows = n.min(ROWS);
    // Blocks of few rows take more panels; few blocks of rows are divided by panels.
    let worth = TASK.div_ceil(rows.max(1) * terms * PANEL);
    let wanted = (4 * rayon::current_num_threads()).div_ceil(n.div_ceil(ROWS).max(1));
    let width = panels.div_ceil(wanted).max(worth).min(panels);
    let strips = panels.div_ceil(width);
    (0..n.div_ceil(ROWS) * strips).into_par_iter().for_each(|block| {
        let (row, panel) = (block / strips * ROWS, block % strips * width);
        f(row..n.min(row + ROWS), panel..panels.min(panel + width));
    });
}

impl<F: Real, K: KernelSet<F>> Cpu<F, K> {
    /// An output of which `product` writes a block of rows and a panel of columns at a time: the rows, the panel, the
    /// columns that it has, and where they begin.
    pub(super) fn panel_product(
        &self,
        sizes: Sizes,
        product: impl Fn(Range<usize>, usize, usize, *mut F) + Sync,
    ) -> Vec<F> {
        let Sizes { n, outputs, .. } = sizes;
        let mut y = self.buffer(n * outputs);
        let out = Output::of(&mut y);
        blocks(sizes, |rows, panels| {
            for panel in panels {
                let (columns, to) = (outputs - panel * PANEL, out.at(rows.start * outputs + panel * PANEL));
                product(rows.clone(), panel, columns.min(PANEL), to);
            }
        });
        y
    }

    /// Rows `[n, terms]`, which each block takes in by `take`, times panels that it widens to strips `[2][terms][16]`.
    pub(super) fn widened_product(
        &self,
        a: &[F],
        sizes: Sizes,
        take: impl Fn(&[F], &mut [F]) + Sync,
        widen: impl Fn(usize, &mut [F]) + Sync,
    ) -> Vec<F> {
        let Sizes { n, outputs, terms } = sizes;
        // Packed pairs fill an odd end up.
        let strip = terms.next_multiple_of(2) * STRIP;
        let mut y = self.buffer(n * outputs);
        let out = Output::of(&mut y);
        blocks(sizes, |rows, panels| {
            let (mut left, mut wide) = (self.buffer(rows.len() * terms), self.buffer(PANEL / STRIP * strip));
            self.set.run(
                #[inline(always)]
                || take(&a[rows.start * terms..rows.end * terms], &mut left),
            );
            for panel in panels {
                self.set.run(
                    #[inline(always)]
                    || widen(panel, &mut wide),
                );
                let product = Gemm {
                    m: rows.len(),
                    n: PANEL.min(outputs - panel * PANEL),
                    k: terms,
                    a: &left,
                    a_row: terms,
                    a_col: 1,
                    b: &wide,
                    b_row: STRIP,
                    b_strip: strip,
                    c_row: outputs,
                    accumulate: false,
                };
                // SAFETY: these rows and columns are this block's alone.
                unsafe { self.set.gemm_at(product, out.at(rows.start * outputs + panel * PANEL)) };
            }
            self.home.floats.give(left);
            self.home.floats.give(wide);
        });
        y
    }
}
