//! Kernels that go through their arrays once: embeddings, norms, rotations, activations, the optimiser.

use super::{Bench, Cost};
use kvfold_kernels::ops::{AdamW, Channel, Moments, Precision, Spans};
use kvfold_kernels::{Grad, Ops};
use kvfold_model::shape::Shape;

impl Bench<'_> {
    pub(super) fn elementwise(&mut self, shape: &Shape, spans: &Spans) {
        let rows = self.work.rows;
        let (c, f, q) = (shape.hidden, shape.intermediate, shape.heads.query * shape.heads.dim);
        let of = |cols: usize| format!("[{rows},{cols}]");
        self.embedding(shape);
        self.norm("rms_norm", c, c);
        self.norm("rms_norm of heads", q, shape.heads.dim);

        let angles = self.ops.rope_table(&vec![0.1; shape.heads.dim / 2], self.work.length);
        let queries = self.array(rows, q);
        self.time("rope", of(q), Cost::of_numbers(2 * rows * q), |ops| drop(ops.rope(&queries, &angles, spans)));
        self.time("rope backward", of(q), Cost::of_numbers(2 * rows * q), |ops| {
            drop(ops.rope_grad(&angles, spans, &queries));
        });
        let last = Channel::last(shape.heads.dim);
        self.time("scale_channel", of(q), Cost::of_numbers(2 * rows * q), |ops| {
            drop(ops.scale_channel(&queries, last, 0.5));
        });

        let (gate, up) = (self.array(rows, f), self.array(rows, f));
        self.time("swiglu", of(f), Cost::of_numbers(3 * rows * f), |ops| drop(ops.swiglu(&gate, &up)));
        self.time("swiglu backward", of(f), Cost::of_numbers(5 * rows * f), |ops| {
            drop(ops.swiglu_grad(&gate, &up, &gate));
        });

        let (x, bias) = (self.array(rows, c), self.ops.tensor(&[c], &vec![0.5; c]));
        self.time("add", of(c), Cost::of_numbers(3 * rows * c), |ops| drop(ops.add(&x, &x, 1.0)));
        self.time("add_row", of(c), Cost::of_numbers(2 * rows * c), |ops| drop(ops.add_row(&x, &bias)));
        self.time("add_row backward", of(c), Cost::of_numbers(rows * c), |ops| drop(ops.add_row_grad(&x)));
    }

    fn embedding(&mut self, shape: &Shape) {
        let (rows, c, v) = (self.work.rows, shape.hidden, shape.vocab);
        let ids: Vec<u32> = (0..rows).map(|row| (row * 7919 % v) as u32).collect();
        let numbers = self.ops.to_host(&self.array(v, c));
        let of = || format!("{rows} of [{v},{c}]");
        let whole = self.ops.master(&[v, c], &numbers, Precision::F32);
        self.time("embed f32", of(), Cost::of_numbers(2 * rows * c), |ops| drop(ops.embed(&ids, &whole)));
        let packed = self.ops.weight(&[v, c], &numbers, Precision::Bf16);
        self.time("embed bf16", of(), Cost::of_numbers(rows * c * 3 / 2), |ops| drop(ops.embed(&ids, &packed)));
        let d = self.array(rows, c);
        self.time("embed backward", of(), Cost::of_plain(v * c + 2 * rows * c), |ops| {
            drop(ops.embed_grad(&ids, &whole, &d, None));
        });
    }

    /// Norms of every `width` channels of rows of `cols`.
    fn norm(&mut self, name: &str, cols: usize, width: usize) {
        let rows = self.work.rows;
        let (x, d) = (self.array(rows, cols), self.array(rows, cols));
        let gain = self.ops.tensor(&[width], &vec![1.0; width]);
        let of = || format!("[{rows},{cols}]");
        self.time(name, of(), Cost::of_numbers(2 * rows * cols), |ops| drop(ops.rms_norm(&x, &gain, 1e-5)));
        self.time(&format!("{name} backward"), of(), Cost::of_numbers(3 * rows * cols), |ops| {
            drop(ops.rms_norm_grad(&x, &gain, 1e-5, &d, None));
        });
    }

    /// What a step does to the numbers of one weight of the feed-forward layer.
    pub(super) fn optimizer(&mut self, shape: &Shape) {
        let (c, f) = (shape.hidden, shape.intermediate);
        let (grad, mut param) = (self.array(f, c), self.array(f, c));
        let mut moments = Moments { m: self.ops.zeros_like(&param), v: self.ops.zeros_like(&param) };
        let by = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 1, grad_scale: 1.0 };
        let of = || format!("[{f},{c}]");
        self.time("sum of squares", of(), Cost::of_numbers(f * c), |ops| {
            std::hint::black_box(ops.sum_squares(&grad));
        });
        self.time("adamw", of(), Cost::of_numbers(7 * f * c), |ops| ops.adamw(&mut param, &grad, &mut moments, by));
    }
}
