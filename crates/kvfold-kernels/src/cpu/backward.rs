//! [`Grad`] on the CPU.

use super::heads::{JobLayout, split_jobs, view};
use super::loss::Gradients;
use super::{Array, Cpu, PARALLEL};
use crate::attention::{AttentionJobGrad, KeyGrad};
use crate::gate::{self, Deciding};
use crate::kernel_set::KernelSet;
use crate::norm;
use crate::ops::{
    AdamW, AttentionGrad, AttentionSaved, Borrowed, Decided, Exempt, Gate, Goal, Grad, Heads, Hinge, Keys, Late,
    LateReads, LossGrad, Moments, Ops, PoolInput, PoolOutput, PoolShape, Pooled, Precision, Predictions, Span, Spans,
    Visible,
};
use crate::pool::{self, PoolJob, PoolJobGrad};
use crate::real::{self, Real};
use crate::team;

/// Why there is no gradient of an 8-bit weight.
const NOT_TRAINED: &str = "8-bit weights have no gradient: a run's settings are checked for that";

/// Rows whose gradients of a gain or a bias are summed by one task.
const SUMMED_ROWS: usize = 256;

impl<F: Real, K: KernelSet<F>> Grad for Cpu<F, K> {
    fn master(&self, shape: &[usize], data: &[f32], precision: Precision) -> Array<F> {
        let data = self.of_host(data);
        Array::with_precision(shape, data.kept(), precision, &self.home)
    }

    fn linear_grad_x(&self, w: &Array<F>, d: &Array<F>, onto: Option<Array<F>>) -> Array<F> {
        match w.precision() {
            Precision::F32 => self.sum(onto, self.float_product_grad_x(w, d)),
            Precision::Bf16 => self.bf16_product_grad_x(w, d, onto),
            Precision::Q8 => panic!("{NOT_TRAINED}"),
        }
    }

    fn linear_grad_w(&self, x: &Array<F>, w: &Array<F>, d: &Array<F>) -> Array<F> {
        self.linear_grad_w_onto(x, w, d, None)
    }

    fn embed_grad(&self, ids: &[u32], table: &Array<F>, d: &Array<F>, onto: Option<Array<F>>) -> Array<F> {
        let (_, cols) = table.matrix();
        let mut grad = onto.unwrap_or_else(|| self.zeros(table.shape()));
        let to = grad.data_mut();
        for (&id, d) in ids.iter().zip(d.data().chunks_exact(cols)) {
            pool::accumulate(&mut to[id as usize * cols..][..cols], F::one(), F::one(), d);
        }
        grad
    }

    fn add_row_grad(&self, d: &Array<F>) -> Array<F> {
        let (_, cols) = d.matrix();
        let parts = team::map(d.data().chunks(SUMMED_ROWS * cols), |d| {
            let mut part = vec![F::zero(); cols];
            self.set.run(
                #[inline(always)]
                || d.chunks_exact(cols).for_each(|d| pool::accumulate(&mut part, F::one(), F::one(), d)),
            );
            part
        });
        self.array(&[cols], sum_of(&parts, cols))
    }

    fn rms_norm_grad(
        &self,
        x: &Array<F>,
        w: &Array<F>,
        eps: f64,
        d: &Array<F>,
        onto: Option<Array<F>>,
    ) -> (Array<F>, Array<F>) {
        let cols = w.data().len();
        let block = SUMMED_ROWS * cols;
        let mut sum = onto.unwrap_or_else(|| self.zeros(x.shape()));
        let blocks = sum.data_mut().chunks_mut(block).zip(x.data().chunks(block).zip(d.data().chunks(block)));
        let parts = team::map(blocks, |(dx, (x, d))| {
            let mut dw = vec![F::zero(); cols];
            self.set.run(
                #[inline(always)]
                || norm::backward((x, w.data(), F::of(eps)), d, dx, &mut dw),
            );
            dw
        });
        (sum, self.array(w.shape(), sum_of(&parts, cols)))
    }

    fn rope_grad(&self, table: &Array<F>, spans: &Spans, d: &Array<F>) -> Array<F> {
        self.rotated(d, table, spans, -F::one())
    }

    fn swiglu_grad(&self, gate: &Array<F>, up: &Array<F>, d: &Array<F>) -> (Array<F>, Array<F>) {
        let shape = d.shape();
        let [mut d_gate, mut d_up] = [(); 2].map(|()| self.buffer(d.data().len()));
        let blocks = d_gate.chunks_mut(PARALLEL).zip(d_up.chunks_mut(PARALLEL)).enumerate();
        team::each(blocks, |(n, (d_gate, d_up))| {
            let [gate, up, d] = [gate, up, d].map(|x| &x.data()[n * PARALLEL..][..d_gate.len()]);
            self.set.run(
                #[inline(always)]
                || {
                    for i in 0..d.len() {
                        let s = real::sigmoid(K::exp, gate[i]);
                        d_gate[i] = d[i] * up[i] * s * (F::one() + gate[i] * (F::one() - s));
                        d_up[i] = d[i] * gate[i] * s;
                    }
                },
            );
        });
        (self.array_of(shape, d_gate), self.array_of(shape, d_up))
    }

    fn ln_grad(&self, x: &Array<F>, d: &Array<F>) -> Array<F> {
        self.map(
            [x, d],
            #[inline(always)]
            |[x, d]| d / x,
        )
    }

    fn prediction_loss_grad(
        &self,
        predicted: Predictions<'_, Array<F>>,
        goal: Goal<'_, Array<F>>,
        w_too: bool,
    ) -> LossGrad<Array<F>> {
        let (rows, cols) = predicted.x.matrix();
        let mut grads = Gradients { x: self.buffer(rows * cols), w: None, w_too };
        let loss = self.loss(predicted, goal, Some(&mut grads));
        LossGrad { loss, x: self.array_of(&[rows, cols], grads.x), w: grads.w }
    }

    fn borrowed_gate_grad(
        &self,
        (q, k): (&Array<F>, &Array<F>),
        heads: Heads,
        by: Borrowed,
        d: &Gate<Array<F>>,
    ) -> (Array<F>, Array<F>) {
        let ((rows, q_cols), (_, k_cols)) = (q.matrix(), k.matrix());
        let (mut dq, mut dk) = (self.zeros(q.shape()), self.zeros(k.shape()));
        let (to_q, to_k) = (dq.data_mut(), dk.data_mut());
        for row in 0..rows {
            let d_row = |x: &'_ Array<F>| x.data()[row * heads.kv..][..heads.kv].to_vec();
            gate::borrowed_row_grad(
                &q.data()[row * q_cols..][..q_cols],
                heads,
                by,
                (&d_row(&d.logit), &d_row(&d.omega)),
                (&mut to_q[row * q_cols..][..q_cols], &mut to_k[row * k_cols..][..k_cols]),
            );
        }
        (dq, dk)
    }

    fn query_logit_grad(&self, heads: Heads, by: Borrowed, d: &Array<F>) -> Array<F> {
        let (rows, kv) = d.matrix();
        let cols = heads.query * heads.dim;
        let mut dq = self.zeros(&[rows, cols]);
        for (dq, d) in dq.data_mut().chunks_exact_mut(cols).zip(d.data().chunks_exact(kv)) {
            gate::query_row_grad(heads, by, d, dq);
        }
        dq
    }

    fn head_gate_grad(&self, r: &Array<F>, scale: f64, d: &Gate<Array<F>>) -> Array<F> {
        let (rows, cols) = r.matrix();
        let kv = cols / 2;
        self.by_rows(
            [rows, cols],
            #[inline(always)]
            |first, block| {
                for (row, to) in block.chunks_exact_mut(cols).enumerate() {
                    let at = first + row;
                    let d = (&d.logit.data()[at * kv..][..kv], &d.omega.data()[at * kv..][..kv]);
                    gate::head_row_grad(&r.data()[at * cols..][..cols], F::of(scale), d, to);
                }
            },
        )
    }

    fn add_ahead_grad(&self, spans: &Spans, d: &Array<F>) -> Array<F> {
        let (_, kv) = d.matrix();
        let mut grad = self.zeros(d.shape());
        for &Span { start, len, .. } in spans {
            let at = start * kv..(start + len) * kv;
            gate::add_ahead_grad(&d.data()[at.clone()], kv, &mut grad.data_mut()[at]);
        }
        grad
    }

    fn decide_soft_grad(&self, relaxed: &Array<F>, spans: &Spans, sinks: usize, d: &Decided<Array<F>>) -> Array<F> {
        let (_, kv) = relaxed.matrix();
        let mut grad = self.buffer(relaxed.data().len());
        for &Span { start, len, .. } in spans {
            let at = start * kv..(start + len) * kv;
            let d = (&d.alpha.data()[at.clone()], &d.close.data()[at.clone()]);
            let l = &relaxed.data()[at.clone()];
            self.set.run(
                #[inline(always)]
                || gate::decide_soft_grad::<F, K>(l, Deciding { kv, sinks }, d, &mut grad[at.clone()]),
            );
        }
        self.array_of(relaxed.shape(), grad)
    }

    fn fold_rate_grad(&self, relaxed: &Array<F>, spans: &Spans, exempt: Exempt, d: &Array<F>) -> Array<F> {
        let (_, kv) = relaxed.matrix();
        let mut grad = self.zeros(relaxed.shape());
        let to = grad.data_mut();
        for (span, d) in spans.iter().zip(d.data().chunks_exact(kv)) {
            gate::fold_rate_grad::<F, K>(relaxed.data(), (span, exempt), d, to);
        }
        grad
    }

    fn hinge_grad(&self, rates: &[Array<F>], spans: &Spans, hinge: Hinge, d: &Array<F>) -> Vec<Array<F>> {
        let slices: Vec<&[F]> = rates.iter().map(Array::data).collect();
        let grads = gate::hinge_grad(&slices, spans, hinge, d.data()[0]);
        grads.into_iter().zip(rates).map(|(grad, rate)| self.array(rate.shape(), grad)).collect()
    }

    fn pool_grad(
        &self,
        input: &PoolInput<Array<F>>,
        spans: &Spans,
        shape: PoolShape,
        d: &PoolOutput<Array<F>>,
    ) -> PoolInput<Array<F>> {
        let Heads { kv, dim, .. } = shape.heads;
        let rows = spans.rows();
        let jobs = self.pool_jobs(input, spans, shape);
        // The output gradients in the same layout: pairs beside masses (twice, for want of a third column).
        let d_input = PoolInput { k: d.k.clone(), v: d.v.clone(), alpha: d.mass.clone(), omega: d.mass.clone() };
        let d_jobs = self.pool_jobs(&d_input, spans, shape);
        let (mut x, mut alpha, mut omega) =
            (self.zeros(&[rows * kv * 2 * dim]), self.zeros(&[rows * kv]), self.zeros(&[rows * kv]));
        let xs = split_jobs(x.data_mut(), spans, kv, 2 * dim);
        let alphas = split_jobs(alpha.data_mut(), spans, kv, 1);
        let omegas = split_jobs(omega.data_mut(), spans, kv, 1);
        let to = xs.into_iter().zip(alphas).zip(omegas).map(|((x, alpha), omega)| PoolJobGrad { x, alpha, omega });
        team::each(jobs.iter().zip(&d_jobs).zip(to), |(((x, alpha, omega), (d_mean, d_mass, _)), mut to)| {
            let job = PoolJob { x, alpha, omega, window: shape.window };
            self.set.run(
                #[inline(always)]
                || pool::backward(&job, (d_mean, d_mass), &mut to),
            );
        });
        let (k, v) = self.split_pairs(x.data(), spans, shape.heads);
        let column = |jobs: &Array<F>| self.to_rows(jobs.data(), spans, JobLayout { kv, parts: 1, width: 1 });
        PoolInput { k, v, alpha: column(&alpha), omega: column(&omega) }
    }

    fn attention_saving(
        &self,
        q: &Array<F>,
        visible: &Visible<Array<F>>,
        spans: &Spans,
        heads: Heads,
    ) -> AttentionSaved<Array<F>> {
        let (out, lse) = self.attend(q, visible, spans, heads);
        let layout = JobLayout { kv: heads.kv, parts: heads.group(), width: 1 };
        let lse = self.to_rows(&lse, spans, layout);
        AttentionSaved { out: self.to_rows(&out, spans, JobLayout { width: heads.dim, ..layout }), lse }
    }

    fn late_reads(
        &self,
        (q, visible): (&Array<F>, &Visible<Array<F>>),
        saved: &AttentionSaved<Array<F>>,
        spans: &Spans,
        heads: Heads,
        late: Late,
    ) -> LateReads<Array<F>> {
        let (kv, group) = (heads.kv, heads.group());
        let [mut own, mut apart, mut lost] = [(); 3].map(|()| self.buffer(spans.rows() * heads.query));
        let jobs = Self::attention_jobs(q, visible, spans, heads);
        let places = spans.iter().flat_map(|span| (0..kv).map(move |g| (span, g)));
        let [owns, aparts, losts] = [&mut own, &mut apart, &mut lost].map(|sums| split_jobs(sums, spans, kv, group));
        let reads = owns.into_iter().zip(aparts).zip(losts).map(|((own, apart), lost)| LateReads { own, apart, lost });
        team::each(jobs.iter().zip(places).zip(reads), |((job, (span, g)), reads)| {
            self.set.late_reads(job, &by_head(&saved.lse, (span, g), (group, 1)), late, reads);
        });
        let [own, apart, lost] =
            [own, apart, lost].map(|sums| self.to_rows(&sums, spans, JobLayout { kv, parts: group, width: 1 }));
        LateReads { own, apart, lost }
    }

    fn attention_grad(
        &self,
        (q, visible): (&Array<F>, &Visible<Array<F>>),
        saved: &AttentionSaved<Array<F>>,
        spans: &Spans,
        heads: Heads,
        d: &Array<F>,
    ) -> AttentionGrad<Array<F>> {
        let (kv, dim, group, rows) = (heads.kv, heads.dim, heads.group(), spans.rows());
        let jobs = Self::attention_jobs(q, visible, spans, heads);
        let mut dq = self.zeros(&[rows * group * kv * dim]);
        let mut exact = KeyBuffers::new(self, visible.exact.is_some(), rows * kv, dim);
        let mut pooled = KeyBuffers::new(self, visible.pooled.is_some(), rows * kv, dim);
        let to_q = split_jobs(dq.data_mut(), spans, kv, group * dim);
        let (to_exact, to_pooled) = (exact.split(spans, kv, dim), pooled.split(spans, kv, dim));
        let places = spans.iter().flat_map(|span| (0..kv).map(move |g| (span, g)));
        let work = jobs.iter().zip(places).zip(to_q).zip(to_exact.into_iter().zip(to_pooled));
        team::each(work, |(((job, (span, g)), q), (exact, pooled))| {
            let rows_of = |x: &Array<F>, width: usize| by_head(x, (span, g), (group, width));
            let (out, lse) = (rows_of(&saved.out, dim), rows_of(&saved.lse, 1));
            let d = view(d, span, g, group * dim);
            let mut grad = AttentionJobGrad { d, out: &out, lse: &lse, q, exact, pooled };
            self.set.attention_grad(job, &mut grad);
        });
        let q = self.to_rows(dq.data(), spans, JobLayout { kv, parts: group, width: dim });
        AttentionGrad {
            q,
            exact: visible.exact.as_ref().map(|keys| exact.keys(self, spans, (kv, dim), keys.mass.is_some())),
            pooled: visible.pooled.as_ref().map(|states| Pooled {
                keys: pooled.keys(self, spans, (kv, dim), states.keys.mass.is_some()),
                close: self.to_rows(pooled.close.data(), spans, JobLayout { kv, parts: 1, width: 1 }),
            }),
        }
    }

    fn zeros_like(&self, x: &Array<F>) -> Array<F> {
        self.zeros(x.shape())
    }

    fn sum_squares(&self, x: &Array<F>) -> f64 {
        let part = |x: &[F]| {
            self.set.run(
                #[inline(always)]
                || real::sum_squares(x).f64(),
            )
        };
        team::map(x.data().chunks(PARALLEL), part).iter().sum()
    }

    fn adamw(&self, param: &mut Array<F>, grad: &Array<F>, moments: &mut Moments<Array<F>>, by: AdamW) {
        let (m, v) = (moments.m.data_mut(), moments.v.data_mut());
        let correct = |beta: f64| F::of(1.0 / (1.0 - beta.powf(by.step as f64)));
        let (m_correct, v_correct) = (correct(by.beta1), correct(by.beta2));
        let (beta1, beta2, eps) = (F::of(by.beta1), F::of(by.beta2), F::of(by.eps));
        let (lr, keep, grad_scale) = (F::of(by.lr), F::of(1.0 - by.lr * by.weight_decay), F::of(by.grad_scale));
        let moments = m.chunks_mut(PARALLEL).zip(v.chunks_mut(PARALLEL));
        let params = param.data_mut().chunks_mut(PARALLEL).zip(grad.data().chunks(PARALLEL));
        team::each(params.zip(moments), |((p, g), (m, v))| {
            self.set.run(
                #[inline(always)]
                || {
                    for i in 0..p.len() {
                        let g = g[i] * grad_scale;
                        m[i] = beta1 * m[i] + (F::one() - beta1) * g;
                        v[i] = beta2 * v[i] + (F::one() - beta2) * g * g;
                        p[i] = p[i] * keep - lr * (m[i] * m_correct) / ((v[i] * v_correct).sqrt() + eps);
                    }
                },
            );
        });
    }

    fn zero_rows(&self, x: &mut Array<F>, rows: &[usize]) {
        let cols = x.data().len() / x.shape()[0];
        let data = x.data_mut();
        rows.iter().for_each(|row| data[row * cols..][..cols].fill(F::zero()));
    }
}

impl<F: Real, K: KernelSet<F>> Cpu<F, K> {
    /// [`Grad::linear_grad_w`], added to what there is.
    pub(super) fn linear_grad_w_onto(
        &self,
        x: &Array<F>,
        w: &Array<F>,
        d: &Array<F>,
        onto: Option<Array<F>>,
    ) -> Array<F> {
        match w.precision() {
            Precision::F32 => self.sum(onto, self.float_product_grad_w(x, d)),
            Precision::Bf16 => self.bf16_product_grad_w(x, d, onto),
            Precision::Q8 => panic!("{NOT_TRAINED}"),
        }
    }

    fn sum(&self, onto: Option<Array<F>>, grad: Array<F>) -> Array<F> {
        match onto {
            Some(sum) => self.add(&sum, &grad, 1.0),
            None => grad,
        }
    }
}

/// The tasks' sums, added up in their order.
fn sum_of<F: Real>(parts: &[Vec<F>], cols: usize) -> Vec<F> {
    let mut sum = vec![F::zero(); cols];
    parts.iter().for_each(|part| pool::accumulate(&mut sum, F::one(), F::one(), part));
    sum
}

/// A KV head's rows of `x [N, G*parts*width]` in one sequence, `[parts][T][width]`.
fn by_head<F: Real>(x: &Array<F>, (span, g): (&Span, usize), (parts, width): (usize, usize)) -> Vec<F> {
    let view = view(x, span, g, parts * width);
    let mut rows = Vec::with_capacity(parts * span.len * width);
    for h in 0..parts {
        (0..span.len).for_each(|t| rows.extend_from_slice(view.row(t, h * width, width)));
    }
    rows
}

/// Gradients of keys, job-major; empty where there are no such keys.
struct KeyBuffers<F: Real> {
    k: Array<F>,
    v: Array<F>,
    mass: Array<F>,
    close: Array<F>,
}

impl<F: Real> KeyBuffers<F> {
    fn new<K: KernelSet<F>>(cpu: &Cpu<F, K>, used: bool, heads: usize, dim: usize) -> Self {
        let zeros = |width: usize| cpu.zeros(&[if used { heads * width } else { 0 }]);
        Self { k: zeros(dim), v: zeros(dim), mass: zeros(1), close: zeros(1) }
    }

    fn split(&mut self, spans: &Spans, kv: usize, dim: usize) -> Vec<KeyGrad<'_, F>> {
        if self.k.data().is_empty() {
            let empty = || KeyGrad { k: &mut [], v: &mut [], mass: &mut [], close: &mut [] };
            return (0..spans.len() * kv).map(|_| empty()).collect();
        }
        let (k, v) = (split_jobs(self.k.data_mut(), spans, kv, dim), split_jobs(self.v.data_mut(), spans, kv, dim));
        let mass = split_jobs(self.mass.data_mut(), spans, kv, 1);
        let close = split_jobs(self.close.data_mut(), spans, kv, 1);
        let both = k.into_iter().zip(v).zip(mass.into_iter().zip(close));
        both.map(|((k, v), (mass, close))| KeyGrad { k, v, mass, close }).collect()
    }

    fn keys<K: KernelSet<F>>(
        &self,
        cpu: &Cpu<F, K>,
        spans: &Spans,
        (kv, dim): (usize, usize),
        mass: bool,
    ) -> Keys<Array<F>> {
        let rows = |x: &Array<F>, width| cpu.to_rows(x.data(), spans, JobLayout { kv, parts: 1, width });
        Keys { k: rows(&self.k, dim), v: rows(&self.v, dim), mass: mass.then(|| rows(&self.mass, 1)) }
    }
}
