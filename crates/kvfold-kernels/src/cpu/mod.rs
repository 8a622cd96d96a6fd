//! The CPU backend: arrays, threads, and the wiring from ops to kernels.
//!
//! Work is split by rows, by heads or by output columns, never inside a sum, so no result depends on the thread count.

mod array;
mod backward;
mod blocks;
mod by_rows;
mod cache;
mod forward;
mod heads;
mod loss;
mod matmul;
mod matmul_bf16;
mod matmul_q8;

pub use array::{Array, RECYCLED};
pub use loss::LOSS_ROWS;

use crate::kernel_set::{Fast, KernelSet, Scalar};
use crate::real::Real;
use crate::simd::Level;
use crate::team;
use array::{Home, Lent};
use std::sync::Arc;

/// The CPU backend with a kernel set.
#[derive(Clone, Debug)]
pub struct Cpu<F: Real, K> {
    set: K,
    home: Arc<Home<F>>,
}

/// The reference backend: every op by its definition.
pub type Reference<F> = Cpu<F, Scalar>;

/// The production backend: f32 with this machine's vectors.
pub type FastCpu = Cpu<f32, Fast>;

impl<F: Real> Reference<F> {
    /// A reference backend.
    pub fn reference() -> Self {
        Self::with(Scalar)
    }
}

impl FastCpu {
    /// A backend with the best instruction set of this machine.
    pub fn new() -> Self {
        Self::with(Fast(Level::detect()))
    }

    /// A backend with a given instruction set, which the machine must have.
    pub fn at_level(level: Level) -> Self {
        Self::with(Fast(level))
    }
}

impl Default for FastCpu {
    fn default() -> Self {
        Self::new()
    }
}

/// Elementwise work below this many elements stays on the calling thread.
const PARALLEL: usize = 32 * 1024;

impl<F: Real, K: KernelSet<F>> Cpu<F, K> {
    fn with(set: K) -> Self {
        Self { set, home: Arc::default() }
    }

    /// An array from numbers of this backend's own precision.
    pub fn array(&self, shape: &[usize], data: Vec<F>) -> Array<F> {
        let mut buffer = self.buffer(data.len());
        buffer.copy_from_slice(&data);
        self.array_of(shape, buffer)
    }

    /// An array of a buffer.
    fn array_of(&self, shape: &[usize], buffer: Lent<'_, F>) -> Array<F> {
        Array::new(shape, buffer.kept(), &self.home)
    }

    /// A buffer of any content, to be overwritten.
    fn buffer(&self, len: usize) -> Lent<'_, F> {
        self.home.floats.lend(len)
    }

    /// Numbers of the host in this backend's own precision.
    fn of_host(&self, data: &[f32]) -> Lent<'_, F> {
        let mut buffer = self.buffer(data.len());
        buffer.iter_mut().zip(data).for_each(|(to, &x)| *to = F::of(f64::from(x)));
        buffer
    }

    fn zeros(&self, shape: &[usize]) -> Array<F> {
        let mut data = self.buffer(shape.iter().product());
        data.fill(F::zero());
        self.array_of(shape, data)
    }

    /// An array whose rows `fill(first row, rows)` writes, in parallel where it pays.
    fn by_rows(&self, shape: [usize; 2], fill: impl Fn(usize, &mut [F]) + Sync) -> Array<F> {
        let [rows, cols] = shape;
        let mut data = self.buffer(rows * cols);
        for_rows(&mut data, cols, |first, block| {
            self.set.run(
                #[inline(always)]
                || fill(first, block),
            )
        });
        self.array_of(&shape, data)
    }

    /// An array of the elementwise function of some arrays' elements.
    fn map<const N: usize>(&self, xs: [&Array<F>; N], f: impl Fn([F; N]) -> F + Sync) -> Array<F> {
        let len = xs[0].data().len();
        assert!(xs.iter().all(|x| x.data().len() == len), "elementwise on {:?}", xs.map(Array::shape));
        let mut data = self.buffer(len);
        for_rows(&mut data, 1, |first, block| {
            self.set.run(
                #[inline(always)]
                || {
                    let xs = xs.map(|x| &x.data()[first..][..block.len()]);
                    for (i, y) in block.iter_mut().enumerate() {
                        *y = f(xs.map(|x| x[i]));
                    }
                },
            );
        });
        self.array_of(xs[0].shape(), data)
    }
}

/// Calls `f(first row, rows)` for blocks of rows that cover `data`, in parallel where it pays.
fn for_rows<T: Send>(data: &mut [T], cols: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    if data.is_empty() {
        return;
    }
    let rows = data.len() / cols;
    let block = if data.len() < PARALLEL { rows } else { rows_per_block(rows, cols) };
    team::each(data.chunks_mut(block * cols).enumerate(), |(n, chunk)| f(n * block, chunk));
}

/// Rows of a block large enough to be worth a task.
fn rows_per_block(rows: usize, cols: usize) -> usize {
    (PARALLEL / 2).div_ceil(cols).min(rows)
}
