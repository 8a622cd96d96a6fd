//! How fast each kernel is for a model's shapes, beside what the machine can do at best.

use crate::speed::median;
use kvfold_kernels::machine::{peak, read_bandwidth};
use kvfold_kernels::ops::{
    Goal, Heads, Keys, KlDirection, PoolInput, PoolShape, Pooled, Precision, Predictions, Spans, Visible,
};
use kvfold_kernels::simd::Level;
use kvfold_kernels::{FastCpu, Grad, Ops};
use kvfold_model::shape::Shape;
use serde::Serialize;
use std::time::Instant;

/// What the machine can do at best.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The instruction set that kernels run with.
    pub level: String,
    /// Threads.
    pub threads: usize,
    /// Floating-point operations per second of f32 products.
    pub peak_f32: f64,
    /// Of bf16 products.
    pub peak_bf16: f64,
    /// Bytes read per second.
    pub bandwidth: f64,
}

impl Machine {
    /// Measures this machine.
    pub fn measure() -> Self {
        let level = Level::detect();
        Self {
            level: format!("{level:?}"),
            threads: kvfold_kernels::cpu::threads(),
            peak_f32: peak(level, Precision::F32),
            peak_bf16: peak(level, Precision::Bf16),
            bandwidth: read_bandwidth(),
        }
    }
}

/// What is timed.
#[derive(Clone, Copy, Debug)]
pub struct KernelWork {
    /// Rows of the batch, as sequences of at most `length` tokens.
    pub rows: usize,
    /// Tokens of a sequence at most.
    pub length: usize,
    /// Newest tokens that stay exact in folding attention.
    pub delay: usize,
    /// Times that each kernel runs, after one that does not count.
    pub rounds: usize,
}

/// One kernel's time.
#[derive(Clone, Debug, Serialize)]
pub struct KernelTime {
    /// The kernel, forward unless it says backward.
    pub kernel: String,
    /// Its shape.
    pub shape: String,
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
    times: Vec<KernelTime>,
}

/// Operations and bytes of a kernel.
struct Cost {
    flops: f64,
    precision: Precision,
    /// Numbers of 32 bits.
    numbers: usize,
}

impl Cost {
    fn of_numbers(numbers: usize) -> Self {
        Self { flops: 0.0, precision: Precision::F32, numbers }
    }
}

impl Bench<'_> {
    fn array(&self, rows: usize, cols: usize) -> <FastCpu as Ops>::Tensor {
        let number = |i: usize| (i.wrapping_mul(0x9E37_79B9) >> 16 & 0xfff) as f32 / 4096.0 - 0.5;
        self.ops.tensor(&[rows, cols], &(0..rows * cols).map(number).collect::<Vec<_>>())
    }

    fn time(&mut self, kernel: &str, shape: String, cost: Cost, run: impl Fn(&FastCpu)) {
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
        let peak = match cost.precision {
            Precision::F32 | Precision::Q8 => self.machine.peak_f32,
            Precision::Bf16 => self.machine.peak_bf16,
        };
        let bytes = 4.0 * cost.numbers as f64;
        self.times.push(KernelTime {
            kernel: kernel.into(),
            shape,
            seconds,
            flops: cost.flops,
            of_peak: (cost.flops > 0.0).then(|| cost.flops / seconds / peak),
            bytes,
            of_bandwidth: bytes / seconds / self.machine.bandwidth,
        });
    }

    /// A linear layer `K -> M`, forward and backward.
    fn linear(&mut self, (k, m): (usize, usize)) {
        for rows in [1, self.work.rows] {
            for precision in [Precision::F32, Precision::Bf16] {
                let (x, d) = (self.array(rows, k), self.array(rows, m));
                let w = self.ops.master(&[m, k], &self.ops.to_host(&self.array(m, k)), precision);
                let weight = if precision == Precision::Bf16 { m * k / 2 } else { m * k };
                let cost = || Cost { flops: 2.0 * (rows * k * m) as f64, precision, numbers: rows * (k + m) + weight };
                let shape = || format!("[{rows},{k}] x [{m},{k}]");
                let name = |what: &str| format!("linear{what} {}", format!("{precision:?}").to_lowercase());
                self.time(&name(""), shape(), cost(), |ops| drop(ops.linear(&x, &w)));
                if rows > 1 {
                    self.time(&name(" backward x"), shape(), cost(), |ops| drop(ops.linear_grad_x(&w, &d)));
                    self.time(&name(" backward w"), shape(), cost(), |ops| drop(ops.linear_grad_w(&x, &w, &d)));
                }
            }
        }
    }

    fn elementwise(&mut self, shape: &Shape, spans: &Spans) {
        let rows = self.work.rows;
        let (c, f, q) = (shape.hidden, shape.intermediate, shape.heads.query * shape.heads.dim);
        let (x, w, d) = (self.array(rows, c), self.ops.tensor(&[c], &vec![1.0; c]), self.array(rows, c));
        let of = |cols: usize| format!("[{rows},{cols}]");
        self.time("rms_norm", of(c), Cost::of_numbers(2 * rows * c), |ops| drop(ops.rms_norm(&x, &w, 1e-5)));
        self.time("rms_norm backward", of(c), Cost::of_numbers(3 * rows * c), |ops| {
            drop(ops.rms_norm_grad(&x, &w, 1e-5, &d));
        });
        let table = self.ops.rope_table(&vec![0.1; shape.heads.dim / 2], self.work.length);
        let queries = self.array(rows, q);
        self.time("rope", of(q), Cost::of_numbers(2 * rows * q), |ops| drop(ops.rope(&queries, &table, spans)));
        let (gate, up) = (self.array(rows, f), self.array(rows, f));
        self.time("swiglu", of(f), Cost::of_numbers(3 * rows * f), |ops| drop(ops.swiglu(&gate, &up)));
        self.time("swiglu backward", of(f), Cost::of_numbers(5 * rows * f), |ops| {
            drop(ops.swiglu_grad(&gate, &up, &gate));
        });
    }

    fn loss(&mut self, shape: &Shape) {
        let (rows, c, v) = (self.work.rows, shape.hidden, shape.vocab);
        for precision in [Precision::F32, Precision::Bf16] {
            let (x, y) = (self.array(rows, c), self.array(rows, c));
            let w = self.ops.master(&[v, c], &self.ops.to_host(&self.array(v, c)), precision);
            let goal = Goal::Teacher(Predictions { x: &y, w: &w }, KlDirection::Forward);
            let cost = Cost { flops: 8.0 * (rows * c * v) as f64, precision, numbers: 2 * v * c };
            let name = format!("KL loss and gradients {}", format!("{precision:?}").to_lowercase());
            self.time(&name, format!("[{rows},{c}] x [{v},{c}]"), cost, |ops| {
                drop(ops.prediction_loss_grad(Predictions { x: &x, w: &w }, goal, true));
            });
        }
    }

    /// Attention and pooling over whole sequences, as training runs them.
    fn attention(&mut self, heads: Heads, spans: &Spans) {
        let rows = self.work.rows;
        let Heads { query, kv, dim } = heads;
        let (q, d) = (self.array(rows, query * dim), self.array(rows, query * dim));
        let keys = Keys { k: self.array(rows, kv * dim), v: self.array(rows, kv * dim), mass: None };
        let close = self.ops.tensor(&[rows, kv], &vec![-0.5; rows * kv]);
        let plain = Visible { exact: Some(keys.clone()), pooled: None, delay: 0 };
        let pooled = Some(Pooled { keys: keys.clone(), close: close.clone() });
        let folding = Visible { exact: Some(keys.clone()), pooled, delay: self.work.delay };
        let pairs: usize = spans.iter().map(|span| span.len * (span.len + 1) / 2).sum();
        let flops = 4.0 * (pairs * query * dim) as f64;
        let numbers = rows * dim * (2 * query + 2 * kv);
        let shape = || format!("{} x {} tokens, {query}/{kv} heads of {dim}", spans.len(), self_length(spans));
        for (name, visible) in [("attention", &plain), ("folding attention", &folding)] {
            let cost = |factor: f64| Cost { flops: flops * factor, precision: Precision::F32, numbers };
            self.time(name, shape(), cost(1.0), |ops| drop(ops.attention(&q, visible, spans, heads)));
            let saved = self.ops.attention_saving(&q, visible, spans, heads);
            self.time(&format!("{name} backward"), shape(), cost(2.5), |ops| {
                drop(ops.attention_grad((&q, visible), &saved, spans, heads, &d));
            });
        }
        let alpha = self.ops.tensor(&[rows, kv], &vec![0.5; rows * kv]);
        let input = PoolInput { k: keys.k, v: keys.v, omega: alpha.clone(), alpha };
        let pool = PoolShape { heads, window: None };
        let numbers = 4 * rows * kv * dim;
        self.time("pool", shape(), Cost::of_numbers(numbers), |ops| drop(ops.pool(&input, spans, pool)));
        let d = self.ops.pool(&input, spans, pool);
        self.time("pool backward", shape(), Cost::of_numbers(2 * numbers), |ops| {
            drop(ops.pool_grad(&input, spans, pool, &d));
        });
    }
}

fn self_length(spans: &Spans) -> usize {
    spans.iter().map(|span| span.len).max().unwrap_or(0)
}

/// Times the kernels of training and prefill for a model's shapes; `on_group` hears of each group that is done.
pub fn kernel_times(machine: &Machine, shape: &Shape, work: KernelWork, mut on_group: impl FnMut()) -> Vec<KernelTime> {
    let mut bench = Bench { ops: FastCpu::new(), machine, work, times: Vec::new() };
    let (full, rest) = (work.rows / work.length, work.rows % work.length);
    let lengths: Vec<usize> = std::iter::repeat_n(work.length, full).chain((rest > 0).then_some(rest)).collect();
    let spans = Spans::of_lengths(&lengths);
    let (c, f, heads) = (shape.hidden, shape.intermediate, shape.heads);
    let mut layers = vec![(c, heads.query * heads.dim), (c, heads.kv * heads.dim), (c, f), (f, c)];
    layers.dedup();
    for layer in layers {
        bench.linear(layer);
        on_group();
    }
    bench.elementwise(shape, &spans);
    on_group();
    bench.attention(heads, &spans);
    on_group();
    bench.loss(shape);
    on_group();
    bench.times
}

/// Groups that [`kernel_times`] tells of at most.
pub const KERNEL_GROUPS: usize = 7;
