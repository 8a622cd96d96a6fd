//! How a product's output is divided among threads.

use super::Cpu;
use crate::aligned::Aligned;
use crate::kernel_set::KernelSet;
use crate::real::Real;
use crate::simd::PANEL;
use crate::team;
use std::ops::Range;

/// Rows of a block: several register tiles, few enough to stay in cache beside a panel.
pub(super) const ROWS: usize = 128;
/// Multiplications that are worth a task.
const TASK: usize = 256 * 1024;

/// Sizes of a product `[n, terms] x [outputs, terms]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) n: usize,
    pub(super) outputs: usize,
    pub(super) terms: usize,
    /// Rows of a block at most.
    pub(super) rows: usize,
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
fn blocks(Sizes { n, outputs, terms, rows }: Sizes, f: impl Fn(Range<usize>, Range<usize>) + Sync) {
    let panels = outputs.div_ceil(PANEL);
    // As few blocks as hold all rows, of equal height but for what fills register tiles.
    let rows = n.div_ceil(n.div_ceil(rows).max(1)).next_multiple_of(PANEL);
    // Blocks of few rows take more panels; few blocks of rows are divided by panels.
    let worth = TASK.div_ceil(rows.min(n).max(1) * terms * PANEL);
    let wanted = (4 * team::threads()).div_ceil(n.div_ceil(rows).max(1));
    let width = panels.div_ceil(wanted).max(worth).min(panels);
    let strips = panels.div_ceil(width);
    team::run(n.div_ceil(rows) * strips, |block| {
        let (row, panel) = (block / strips * rows, block % strips * width);
        f(row..n.min(row + rows), panel..panels.min(panel + width));
    });
}

impl<F: Real, K: KernelSet<F>> Cpu<F, K> {
    /// An output of which `product` writes a block of rows and of panels of columns at a time: the rows, the panels, and where
    /// each panel's columns begin.
    pub(super) fn block_product(
        &self,
        sizes: Sizes,
        product: impl Fn(Range<usize>, Range<usize>, &dyn Fn(usize) -> *mut F) + Sync,
    ) -> Aligned<F> {
        let Sizes { n, outputs, .. } = sizes;
        let mut y = self.buffer(n * outputs);
        let out = Output::of(&mut y);
        blocks(sizes, |rows, panels| {
            let first = rows.start * outputs;
            product(rows, panels, &|panel| out.at(first + panel * PANEL));
        });
        y
    }

    /// An output of which `product` writes a block of rows and a panel of columns at a time: the rows, the panel, the
    /// columns that it has, and where they begin.
    pub(super) fn panel_product(
        &self,
        sizes: Sizes,
        product: impl Fn(Range<usize>, usize, usize, *mut F) + Sync,
    ) -> Aligned<F> {
        let Sizes { outputs, .. } = sizes;
        self.block_product(sizes, |rows, panels, at| {
            for panel in panels {
                product(rows.clone(), panel, PANEL.min(outputs - panel * PANEL), at(panel));
            }
        })
    }
}
