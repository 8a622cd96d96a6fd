//! How fast each kernel is for a model's shapes, beside what the machine can do at best.
//!
//! One file per kind of kernel. Ops over a number per head or fewer (a scale, a logarithm of masses, the hinge) are left
//! out: they take no time that anybody would see.

mod attention;
mod decisions;
mod elementwise;
mod paged;
mod products;

use crate::machine::Machine;
use crate::speed::median;
use kvfold_kernels::machine::{Work, path};
use kvfold_kernels::ops::{Precision, Spans};
use kvfold_kernels::simd::Level;
use kvfold_kernels::{FastCpu, Ops};
use kvfold_model::shape::Shape;
use serde::Serialize;
use std::time::Instant;

/// What is timed.
#[derive(Clone, Copy, Debug)]
pub struct KernelWork {
    /// Rows of the batch, as sequences of at most `length` tokens.
    pub rows: usize,
    /// Tokens of a sequence at most, and the depth of the caches that are decoded from.
    pub length: usize,
    /// Newest tokens that stay exact in folding attention.
    pub delay: usize,
    /// Times that each kernel runs, after one that does not count.
    pub rounds: usize,
}

/// Sequences that decode together.
const DECODED: usize = 8;

/// One kernel's time.
#[derive(Clone, Debug, Serialize)]
pub struct KernelTime {
    /// The kernel, forward unless it says backward.
    pub kernel: String,
    /// Its shape.
    pub shape: String,
    /// What the dispatcher has it computed with.
    pub path: &'static str,
    /// Median seconds.
    pub seconds: f64,
    /// Floating-point operations of its products; 0 for kernels without.
    pub flops: f64,
    /// Share of the peak of its precision, for kernels with products.
    pub of_peak: Option<f64>,
    /// Bytes that it must read and write at least.
    pub bytes: f64,
    /// Share of the bandwidth; above 1 when the operands come from a cache.
    pub of_bandwidth: f64,
}

struct Bench<'a> {
    ops: FastCpu,
    machine: &'a Machine,
    work: KernelWork,
    /// What is in the names of the kernels that are timed.
    only: &'a str,
    times: Vec<KernelTime>,
}

/// An array of the backend.
type Tensor = <FastCpu as Ops>::Tensor;

/// Operations and bytes of a kernel, and what kind of work it is.
#[derive(Clone, Copy)]
struct Cost {
    flops: f64,
    bytes: usize,
    work: Work,
}

impl Cost {
    /// Of products: operations, and numbers of 32 bits.
    fn of_products(precision: Precision, flops: f64, numbers: usize) -> Self {
        Self { flops, bytes: 4 * numbers, work: Work::Product(precision) }
    }

    /// Of a kernel that goes through numbers of 32 bits, as elementwise ones do.
    fn of_numbers(numbers: usize) -> Self {
        Self { flops: 0.0, bytes: 4 * numbers, work: Work::Elementwise }
    }

    /// Of one that does so in plain loops.
    fn of_plain(numbers: usize) -> Self {
        Self { work: Work::Plain, ..Self::of_numbers(numbers) }
    }
}

impl Bench<'_> {
    fn array(&self, rows: usize, cols: usize) -> Tensor {
        let number = |i: usize| (i.wrapping_mul(0x9E37_79B9) >> 16 & 0xfff) as f32 / 4096.0 - 0.5;
        self.ops.tensor(&[rows, cols], &(0..rows * cols).map(number).collect::<Vec<_>>())
    }

    fn time(&mut self, kernel: &str, shape: String, cost: Cost, mut run: impl FnMut(&FastCpu)) {
        if !kernel.contains(self.only) {
            return;
        }
        run(&self.ops);
        let seconds = median(
            (0..self.work.rounds)
                .map(|_| {
                    let started = Instant::now();
                    run(&self.ops);
                    started.elapsed().as_secs_f64()
                })
                .collect(),
        );
        let peak = match cost.work {
            Work::Product(precision) => Some(self.machine.peak(precision)),
            Work::Elementwise | Work::Plain => None,
        };
        let bytes = cost.bytes as f64;
        self.times.push(KernelTime {
            kernel: kernel.into(),
            shape,
            path: path(Level::detect(), cost.work),
            seconds,
            flops: cost.flops,
            of_peak: peak.map(|peak| cost.flops / seconds / peak),
            bytes,
            of_bandwidth: bytes / seconds / self.machine.bandwidth,
        });
    }
}

/// A precision's name in a kernel's.
fn name(precision: Precision) -> String {
    format!("{precision:?}").to_lowercase()
}

/// A group of kernels.
type Group<'a> = Box<dyn Fn(&mut Bench<'_>) + 'a>;

/// Times the kernels of serving and training for a model's shapes, those that have `only` in their names; `on_group` hears
/// how many groups of how many are done.
pub fn kernel_times(
    machine: &Machine,
    shape: &Shape,
    work: KernelWork,
    only: &str,
    mut on_group: impl FnMut(usize, usize),
) -> Vec<KernelTime> {
    let mut bench = Bench { ops: FastCpu::new(), machine, work, only, times: Vec::new() };
    let (full, rest) = (work.rows / work.length, work.rows % work.length);
    let lengths: Vec<usize> = std::iter::repeat_n(work.length, full).chain((rest > 0).then_some(rest)).collect();
    let spans = Spans::of_lengths(&lengths);
    let (c, f, heads) = (shape.hidden, shape.intermediate, shape.heads);
    let mut layers = vec![(c, heads.query * heads.dim), (c, heads.kv * heads.dim), (c, f), (f, c)];
    layers.dedup();
    let mut groups: Vec<Group<'_>> = Vec::new();
    for layer in layers {
        groups.push(Box::new(move |bench| bench.linear(layer)));
    }
    groups.push(Box::new(|bench| bench.fused(shape)));
    groups.push(Box::new(|bench| bench.logits(shape)));
    groups.push(Box::new(|bench| bench.loss(shape)));
    groups.push(Box::new(|bench| bench.elementwise(shape, &spans)));
    groups.push(Box::new(|bench| bench.decisions(heads, &spans)));
    groups.push(Box::new(|bench| bench.attention(heads, &spans)));
    groups.push(Box::new(|bench| bench.paged(heads)));
    groups.push(Box::new(|bench| bench.optimizer(shape)));
    for (n, group) in groups.iter().enumerate() {
        group(&mut bench);
        on_group(n + 1, groups.len());
    }
    bench.times
}
