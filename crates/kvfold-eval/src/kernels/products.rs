//! Matrix products: linear layers, logits, and the losses that are made of them.

use super::{Bench, Cost, DECODED, Tensor, name};
use kvfold_kernels::ops::{Goal, KlDirection, Norm, Precision, Predictions};
use kvfold_kernels::{Grad, Ops};
use kvfold_model::shape::Shape;

/// Precisions of weights that train.
const TRAINED: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// Precisions of weights that are served.
const SERVED: [Precision; 3] = [Precision::F32, Precision::Bf16, Precision::Q8];

/// Numbers of 32 bits that as many numbers of a precision take.
fn held(numbers: usize, precision: Precision) -> usize {
    match precision {
        Precision::F32 => numbers,
        Precision::Bf16 => numbers / 2,
        Precision::Q8 => numbers * 17 / 64,
    }
}

impl Bench<'_> {
    /// A linear layer `K -> M` for one token, for those that decode together, and for the batch; that one also backward.
    pub(super) fn linear(&mut self, (k, m): (usize, usize)) {
        let mut counts = vec![1, DECODED.min(self.work.rows), self.work.rows];
        counts.dedup();
        for rows in counts {
            self.product("linear", rows, (k, m), rows == self.work.rows);
        }
    }

    /// The logits of one token and of those that decode together.
    pub(super) fn logits(&mut self, shape: &Shape) {
        for rows in [1, DECODED] {
            self.product("logits", rows, (shape.hidden, shape.vocab), false);
        }
    }

    /// Products of a block that share their work, as serving has them: projections of the same rows, normed first, one that is
    /// added to the residual stream, and the feed-forward layer with its norm.
    pub(super) fn fused(&mut self, shape: &Shape) {
        let (c, f, heads) = (shape.hidden, shape.intermediate, shape.heads);
        let [q, kv] = [heads.query, heads.kv].map(|count| count * heads.dim);
        let mut counts = vec![1, DECODED.min(self.work.rows), self.work.rows];
        counts.dedup();
        for (rows, precision) in counts.into_iter().flat_map(|rows| SERVED.map(|precision| (rows, precision))) {
            let (base, x, attended) = (self.array(rows, c), self.array(rows, c), self.array(rows, q));
            let gain = self.ops.tensor(&[c], &vec![1.0; c]);
            let norm = Norm { gain: &gain, eps: shape.norm_eps };
            let [to_q, to_k, to_v] = [q, kv, kv].map(|m| self.weight(m, c, precision));
            let [out, gate, up, down] = [(c, q), (f, c), (f, c), (c, f)].map(|(m, k)| self.weight(m, k, precision));
            let cost = |weights: usize, others: usize| {
                let numbers = rows * others + held(weights, precision);
                Cost::of_products(precision, 2.0 * (rows * weights) as f64, numbers)
            };
            let name = |what: &str| format!("{what} {}", name(precision));
            let of = |inner: String| format!("[{rows},{c}] and {inner}");
            self.time(
                &name("q, k, v"),
                of(format!("[{},{c}]", q + 2 * kv)),
                cost((q + 2 * kv) * c, c + q + 2 * kv),
                |ops| {
                    drop(ops.normed_linears(&x, norm, &[&to_q, &to_k, &to_v]));
                },
            );
            self.time(&name("product onto"), of(format!("[{rows},{q}] x [{c},{q}]")), cost(c * q, 2 * c + q), |ops| {
                drop(ops.linear_onto(&base, &attended, &out));
            });
            self.time(&name("feed-forward"), of(format!("3 x [{f},{c}]")), cost(3 * f * c, 2 * c), |ops| {
                drop(ops.feed_forward(&x, norm, [&gate, &up, &down]));
            });
        }
    }

    fn product(&mut self, what: &str, rows: usize, (k, m): (usize, usize), backward: bool) {
        for precision in SERVED {
            let (x, d) = (self.array(rows, k), self.array(rows, m));
            let w = self.master(m, k, precision);
            let numbers = rows * (k + m) + held(m * k, precision);
            let cost = Cost::of_products(precision, 2.0 * (rows * k * m) as f64, numbers);
            let shape = || format!("[{rows},{k}] x [{m},{k}]");
            let name = |way: &str| format!("{what}{way} {}", name(precision));
            self.time(&name(""), shape(), cost, |ops| drop(ops.linear(&x, &w)));
            if backward && TRAINED.contains(&precision) {
                self.time(&name(" backward x"), shape(), cost, |ops| drop(ops.linear_grad_x(&w, &d, None)));
                self.time(&name(" backward w"), shape(), cost, |ops| drop(ops.linear_grad_w(&x, &w, &d)));
            }
        }
    }

    /// Losses of predictions, alone and with gradients.
    pub(super) fn loss(&mut self, shape: &Shape) {
        let (rows, c, v) = (self.work.rows, shape.hidden, shape.vocab);
        let next: Vec<u32> = (0..rows).map(|row| (row % v) as u32).collect();
        for precision in TRAINED {
            let (x, y) = (self.array(rows, c), self.array(rows, c));
            let w = self.master(v, c, precision);
            let (student, teacher) = (Predictions { x: &x, w: &w }, Predictions { x: &y, w: &w });
            let product = 2.0 * (rows * c * v) as f64;
            let cost = |products: f64, gradient: usize| {
                Cost::of_products(precision, products * product, held(v * c, precision) + gradient)
            };
            let of = || format!("[{rows},{c}] x [{v},{c}]");
            let name = |what: &str| format!("{what} {}", name(precision));
            self.time(&name("cross-entropy"), of(), cost(1.0, 0), |ops| {
                drop(ops.prediction_loss(student, Goal::Tokens(&next)));
            });
            self.time(&name("cross-entropy and gradients"), of(), cost(3.0, v * c), |ops| {
                drop(ops.prediction_loss_grad(student, Goal::Tokens(&next), true));
            });
            self.time(&name("KL loss and gradients"), of(), cost(4.0, v * c), |ops| {
                drop(ops.prediction_loss_grad(student, Goal::Teacher(teacher, KlDirection::Forward), true));
            });
        }
    }

    fn weight(&self, m: usize, k: usize, precision: Precision) -> Tensor {
        self.ops.weight(&[m, k], &self.ops.to_host(&self.array(m, k)), precision)
    }

    fn master(&self, m: usize, k: usize, precision: Precision) -> Tensor {
        self.ops.master(&[m, k], &self.ops.to_host(&self.array(m, k)), precision)
    }
}
