//! [`Ops`] on the CPU.

use super::array::Lent;
use super::heads::{JobLayout, key_view, split_jobs, view};
use super::{Array, Cpu};
use crate::attention::AttentionJob;
use crate::gate::{self, Deciding};
use crate::kernel_set::KernelSet;
use crate::ops::{
    self, Borrowed, Channel, Decided, Exempt, Gate, Goal, Grad, Heads, Hinge, Norm, Ops, PoolInput, PoolOutput,
    PoolShape, Precision, Predictions, Span, Spans, Visible,
};
use crate::pool::{self, PoolJob};
use crate::real::{self, Real};
use crate::team;
use crate::{norm, rope};

impl<F: Real, K: KernelSet<F>> Cpu<F, K> {
    /// A row of a weight that is held in its precision only.
    fn stored_row<T: Real>(&self, w: &Array<F>, row: usize, to: &mut [T]) {
        match w.precision() {
            Precision::Q8 => self.quantised(w).row(row, to),
            Precision::F32 | Precision::Bf16 => self.packed_row(w, row, to),
        }
    }
}

impl<F: Real, K: KernelSet<F>> Ops for Cpu<F, K> {
    type Tensor = Array<F>;

    fn tensor(&self, shape: &[usize], data: &[f32]) -> Array<F> {
        self.array_of(shape, self.of_host(data))
    }

    fn weight(&self, shape: &[usize], data: &[f32], precision: Precision) -> Array<F> {
        let whole = self.master(shape, data, precision);
        match precision {
            Precision::F32 => whole,
            Precision::Bf16 => {
                self.store_panels_of_rows(&whole);
                whole.keep_packed()
            }
            Precision::Q8 => {
                self.quantised(&whole);
                whole.keep_packed()
            }
        }
    }

    fn precision(&self, weight: &Array<F>) -> Precision {
        weight.precision()
    }

    fn to_host(&self, x: &Array<F>) -> Vec<f32> {
        match x.is_whole() {
            true => x.data().iter().map(|x| x.f64() as f32).collect(),
            false => {
                let (rows, cols) = x.matrix();
                let mut data = vec![0.0; rows * cols];
                data.chunks_exact_mut(cols).enumerate().for_each(|(row, to)| self.stored_row(x, row, to));
                data
            }
        }
    }

    fn scalar(&self, x: &Array<F>) -> f64 {
        assert_eq!(x.shape(), [1], "a scalar was expected");
        x.data()[0].f64()
    }

    fn shape(&self, x: &Array<F>) -> Vec<usize> {
        x.shape().to_vec()
    }

    fn linear(&self, x: &Array<F>, w: &Array<F>) -> Array<F> {
        self.linears(x, &[w]).pop().expect("one output of one weight")
    }

    fn linears(&self, x: &Array<F>, weights: &[&Array<F>]) -> Vec<Array<F>> {
        let of = |precision| weights.iter().copied().filter(move |w| w.precision() == precision).collect::<Vec<_>>();
        let mut bf16 = self.bf16_products(x, &of(Precision::Bf16)).into_iter();
        let mut q8 = self.q8_products(x, &of(Precision::Q8)).into_iter();
        let next = |w: &&Array<F>| match w.precision() {
            Precision::F32 => Some(self.float_product(x, w)),
            Precision::Bf16 => bf16.next(),
            Precision::Q8 => q8.next(),
        };
        weights.iter().map(next).map(|y| y.expect("as many outputs as weights")).collect()
    }

    fn normed_linears(&self, x: &Array<F>, norm: Norm<'_, Array<F>>, weights: &[&Array<F>]) -> Vec<Array<F>> {
        let normed = || self.rms_norm(x, norm.gain, norm.eps);
        let in_words = |w: &&&Array<F>| w.precision() == Precision::Bf16;
        let (bf16, others): (Vec<_>, Vec<_>) = weights.iter().partition(in_words);
        let by_rows = if bf16.is_empty() { None } else { self.normed_linears_by_rows(x, norm, &bf16) };
        let Some(by_rows) = by_rows else { return self.linears(&normed(), weights) };
        // Decision heads are floats.
        let others = if others.is_empty() { Vec::new() } else { self.linears(&normed(), &others) };
        let (mut by_rows, mut others) = (by_rows.into_iter(), others.into_iter());
        let next = |w: &&Array<F>| if in_words(&w) { by_rows.next() } else { others.next() };
        weights.iter().map(next).map(|y| y.expect("as many outputs as weights")).collect()
    }

    fn linear_onto(&self, base: &Array<F>, x: &Array<F>, w: &Array<F>) -> Array<F> {
        match w.precision() {
            Precision::F32 => self.add(base, &self.float_product(x, w), 1.0),
            Precision::Bf16 => self.bf16_linear_onto(base, x, w),
            Precision::Q8 => self.q8_linear_onto(base, x, w),
        }
    }

    fn feed_forward(&self, x: &Array<F>, norm: Norm<'_, Array<F>>, weights: [&Array<F>; 3]) -> Array<F> {
        let all = |precision| weights.iter().all(|w| w.precision() == precision);
        let by_rows = all(Precision::Bf16).then(|| self.feed_forward_by_rows(x, norm, weights)).flatten();
        by_rows.unwrap_or_else(|| {
            let y = self.rms_norm(x, norm.gain, norm.eps);
            let fused = match weights[0].precision() {
                Precision::Bf16 if all(Precision::Bf16) => self.bf16_feed_forward(x, &y, weights),
                Precision::Q8 if all(Precision::Q8) => Some(self.q8_feed_forward(x, &y, weights)),
                _ => None,
            };
            fused.unwrap_or_else(|| ops::feed_forward(self, x, &y, weights))
        })
    }

    fn embed(&self, ids: &[u32], table: &Array<F>) -> Array<F> {
        let (_, cols) = table.matrix();
        self.by_rows(
            [ids.len(), cols],
            #[inline(always)]
            |first, block| {
                for (row, &id) in block.chunks_exact_mut(cols).zip(&ids[first..]) {
                    match table.is_whole() {
                        true => row.copy_from_slice(&table.data()[id as usize * cols..][..cols]),
                        false => self.stored_row(table, id as usize, row),
                    }
                }
            },
        )
    }

    fn add_row(&self, x: &Array<F>, row: &Array<F>) -> Array<F> {
        let (rows, cols) = x.matrix();
        assert_eq!(row.shape(), [cols], "a row for {:?}", x.shape());
        self.by_rows(
            [rows, cols],
            #[inline(always)]
            |first, y| {
                let x = &x.data()[first * cols..][..y.len()];
                for (y, x) in y.chunks_exact_mut(cols).zip(x.chunks_exact(cols)) {
                    y.iter_mut().zip(x).zip(row.data()).for_each(|((y, &x), &b)| *y = x + b);
                }
            },
        )
    }

    fn rms_norm(&self, x: &Array<F>, w: &Array<F>, eps: f64) -> Array<F> {
        let (rows, cols) = x.matrix();
        assert!(cols.is_multiple_of(w.data().len()), "a gain {:?} for {:?}", w.shape(), x.shape());
        self.by_rows(
            [rows, cols],
            #[inline(always)]
            |first, y| {
                norm::forward(&x.data()[first * cols..][..y.len()], w.data(), F::of(eps), y);
            },
        )
    }

    fn rope_table(&self, inv_freq: &[f64], positions: usize) -> Array<F> {
        self.array(&[positions, inv_freq.len() * 2], rope::table(inv_freq, positions))
    }

    fn rope(&self, x: &Array<F>, table: &Array<F>, spans: &Spans) -> Array<F> {
        self.rotated(x, table, spans, F::one())
    }

    fn scale_channel(&self, x: &Array<F>, channel: Channel, factor: f64) -> Array<F> {
        let (rows, cols) = x.matrix();
        self.by_rows(
            [rows, cols],
            #[inline(always)]
            |first, y| {
                y.copy_from_slice(&x.data()[first * cols..][..y.len()]);
                y.chunks_exact_mut(channel.every).for_each(|head| head[channel.at] *= F::of(factor));
            },
        )
    }

    fn swiglu(&self, gate: &Array<F>, up: &Array<F>) -> Array<F> {
        self.map(
            [gate, up],
            #[inline(always)]
            |[g, u]| real::swiglu(K::exp, g, u),
        )
    }

    fn add(&self, x: &Array<F>, y: &Array<F>, factor: f64) -> Array<F> {
        let factor = F::of(factor);
        self.map(
            [x, y],
            #[inline(always)]
            |[x, y]| x + factor * y,
        )
    }

    fn affine(&self, x: &Array<F>, scale: f64, offset: f64) -> Array<F> {
        let (scale, offset) = (F::of(scale), F::of(offset));
        self.map(
            [x],
            #[inline(always)]
            |[x]| scale * x - offset,
        )
    }

    fn scale(&self, x: &Array<F>, factor: f64) -> Array<F> {
        let factor = F::of(factor);
        self.map(
            [x],
            #[inline(always)]
            |[x]| x * factor,
        )
    }

    fn ln(&self, x: &Array<F>) -> Array<F> {
        self.map(
            [x],
            #[inline(always)]
            |[x]| x.ln(),
        )
    }

    fn prediction_loss(&self, predicted: Predictions<'_, Array<F>>, goal: Goal<'_, Array<F>>) -> Array<F> {
        self.loss(predicted, goal, None)
    }

    fn borrowed_gate(&self, q: &Array<F>, k: &Array<F>, heads: Heads, by: Borrowed) -> Gate<Array<F>> {
        let ((rows, q_cols), (_, k_cols)) = (q.matrix(), k.matrix());
        self.gate(rows, heads.kv, |row, logit, omega| {
            let (q, k) = (&q.data()[row * q_cols..][..q_cols], &k.data()[row * k_cols..][..k_cols]);
            gate::borrowed_row((q, k), heads, by, logit, omega);
        })
    }

    fn query_logit(&self, q: &Array<F>, heads: Heads, by: Borrowed) -> Array<F> {
        let (rows, cols) = q.matrix();
        let mut logit = self.buffer(rows * heads.kv);
        for (q, logit) in q.data().chunks_exact(cols).zip(logit.chunks_exact_mut(heads.kv)) {
            gate::query_row(q, heads, by, logit);
        }
        self.array_of(&[rows, heads.kv], logit)
    }

    fn head_gate(&self, r: &Array<F>, scale: f64, offset: f64) -> Gate<Array<F>> {
        let (rows, cols) = r.matrix();
        self.gate(rows, cols / 2, |row, logit, omega| {
            gate::head_row(&r.data()[row * cols..][..cols], F::of(scale), F::of(offset), logit, omega);
        })
    }

    fn add_ahead(&self, logit: &Array<F>, ahead: &Array<F>, spans: &Spans) -> Array<F> {
        let (rows, kv) = logit.matrix();
        let mut sum = self.buffer(rows * kv);
        sum.copy_from_slice(logit.data());
        for &Span { start, len, .. } in spans {
            let at = start * kv..(start + len) * kv;
            gate::add_ahead(&mut sum[at.clone()], &ahead.data()[at], kv);
        }
        self.array_of(logit.shape(), sum)
    }

    fn share_columns(&self, x: &Array<F>) -> Array<F> {
        let (rows, cols) = x.matrix();
        self.by_rows(
            [rows, cols],
            #[inline(always)]
            |first, y| {
                for (row, y) in y.chunks_exact_mut(cols).enumerate() {
                    let x = &x.data()[(first + row) * cols..][..cols];
                    y.fill(x.iter().copied().sum::<F>() / F::of(cols as f64));
                }
            },
        )
    }

    fn relax(&self, logit: &Array<F>, noise: &Array<F>, temperature: f64) -> Array<F> {
        let t = F::of(temperature);
        self.map(
            [logit, noise],
            #[inline(always)]
            |[a, g]| (a + g) / t,
        )
    }

    fn decide_soft(&self, relaxed: &Array<F>, spans: &Spans, sinks: usize) -> Decided<Array<F>> {
        self.decide(relaxed, (spans, sinks), gate::decide_soft::<F, K>)
    }

    fn decide_hard(&self, logit: &Array<F>, spans: &Spans, sinks: usize) -> Decided<Array<F>> {
        self.decide(logit, (spans, sinks), gate::decide_hard)
    }

    fn fold_rate(&self, relaxed: &Array<F>, spans: &Spans, exempt: Exempt) -> Array<F> {
        let (_, kv) = relaxed.matrix();
        let mut rates = vec![F::zero(); spans.len() * kv];
        for (span, rate) in spans.iter().zip(rates.chunks_exact_mut(kv)) {
            gate::fold_rate(relaxed.data(), kv, (span, exempt), rate);
        }
        self.array(&[spans.len(), kv], rates)
    }

    fn hinge(&self, rates: &[Array<F>], spans: &Spans, hinge: Hinge) -> Array<F> {
        let rates: Vec<&[F]> = rates.iter().map(Array::data).collect();
        self.array(&[1], vec![gate::hinge(&rates, spans, hinge)])
    }

    fn pool(&self, input: &PoolInput<Array<F>>, spans: &Spans, shape: PoolShape) -> PoolOutput<Array<F>> {
        let Heads { kv, dim, .. } = shape.heads;
        let rows = spans.rows();
        let (mut mean, mut mass) = (self.buffer(rows * kv * 2 * dim), self.buffer(rows * kv));
        let jobs = self.pool_jobs(input, spans, shape);
        let outs = split_jobs(&mut mean, spans, kv, 2 * dim).into_iter().zip(split_jobs(&mut mass, spans, kv, 1));
        team::each(outs.zip(&jobs), |((mean, mass), (x, alpha, omega))| {
            let job = PoolJob { x, alpha, omega, window: shape.window };
            self.set.run(
                #[inline(always)]
                || pool::forward(&job, mean, mass),
            );
        });
        let (k, v) = self.split_pairs(&mean, spans, shape.heads);
        let mass = self.to_rows(&mass, spans, JobLayout { kv, parts: 1, width: 1 });
        PoolOutput { k, v, mass }
    }

    fn attention(&self, q: &Array<F>, visible: &Visible<Array<F>>, spans: &Spans, heads: Heads) -> Array<F> {
        let (out, _) = self.attend(q, visible, spans, heads);
        self.to_rows(&out, spans, JobLayout { kv: heads.kv, parts: heads.group(), width: heads.dim })
    }
}

/// A head's pairs (key beside value), alphas and omegas, copied out of token order.
pub(super) type PoolSlices<F> = (Vec<F>, Vec<F>, Vec<F>);

impl<F: Real, K: KernelSet<F>> Cpu<F, K> {
    pub(super) fn rotated(&self, x: &Array<F>, table: &Array<F>, spans: &Spans, sign: F) -> Array<F> {
        let (rows, cols) = x.matrix();
        let (positions, dim) = table.matrix();
        let mut position = Vec::with_capacity(rows);
        for span in spans {
            assert!(span.position + span.len <= positions, "{span:?} reaches beyond {positions} rotary positions");
            position.extend(span.position..span.position + span.len);
        }
        self.by_rows(
            [rows, cols],
            #[inline(always)]
            |first, y| {
                for (row, y) in y.chunks_exact_mut(cols).enumerate() {
                    let angles = &table.data()[position[first + row] * dim..][..dim];
                    rope::rotate_row(&x.data()[(first + row) * cols..][..cols], angles, sign, y);
                }
            },
        )
    }

    fn gate(&self, rows: usize, kv: usize, fill: impl Fn(usize, &mut [F], &mut [F])) -> Gate<Array<F>> {
        let (mut logit, mut omega) = (self.buffer(rows * kv), self.buffer(rows * kv));
        for (row, (logit, omega)) in logit.chunks_exact_mut(kv).zip(omega.chunks_exact_mut(kv)).enumerate() {
            fill(row, logit, omega);
        }
        Gate { logit: self.array_of(&[rows, kv], logit), omega: self.array_of(&[rows, kv], omega) }
    }

    fn decide(
        &self,
        l: &Array<F>,
        (spans, sinks): (&Spans, usize),
        f: impl Fn(&[F], Deciding, &mut [F], &mut [F]),
    ) -> Decided<Array<F>> {
        let (rows, kv) = l.matrix();
        let (mut alpha, mut close) = (self.buffer(rows * kv), self.buffer(rows * kv));
        for &Span { start, len, .. } in spans {
            let at = start * kv..(start + len) * kv;
            self.set.run(
                #[inline(always)]
                || f(&l.data()[at.clone()], Deciding { kv, sinks }, &mut alpha[at.clone()], &mut close[at.clone()]),
            );
        }
        Decided { alpha: self.array_of(&[rows, kv], alpha), close: self.array_of(&[rows, kv], close) }
    }

    /// Per head: pairs `[T, 2D]`, alphas, omegas.
    pub(super) fn pool_jobs(&self, input: &PoolInput<Array<F>>, spans: &Spans, shape: PoolShape) -> Vec<PoolSlices<F>> {
        let Heads { kv, dim, .. } = shape.heads;
        let pairs = spans.iter().flat_map(|span| (0..kv).map(move |g| (span, g)));
        team::map(pairs, |(span, g)| {
            let (k, v) = (view(&input.k, span, g, dim), view(&input.v, span, g, dim));
            let mut x = Vec::with_capacity(span.len * 2 * dim);
            for t in 0..span.len {
                x.extend_from_slice(k.row(t, 0, dim));
                x.extend_from_slice(v.row(t, 0, dim));
            }
            let (alpha, omega) = (view(&input.alpha, span, g, 1), view(&input.omega, span, g, 1));
            let column = |of: crate::attention::View<'_, F>| (0..span.len).map(|t| of.at(t)).collect();
            (x, column(alpha), column(omega))
        })
    }

    /// Job-major pairs `[T, 2D]` as keys and values `[N, G*D]`.
    pub(super) fn split_pairs(&self, pairs: &[F], spans: &Spans, heads: Heads) -> (Array<F>, Array<F>) {
        let Heads { kv, dim, .. } = heads;
        let both = self.to_rows(pairs, spans, JobLayout { kv, parts: 1, width: 2 * dim });
        let half = |side: usize| {
            self.by_rows(
                [spans.rows(), kv * dim],
                #[inline(always)]
                |first, block| {
                    let from = both.data()[first * kv * 2 * dim..].chunks_exact(2 * dim);
                    for (to, pair) in block.chunks_exact_mut(dim).zip(from) {
                        to.copy_from_slice(&pair[side * dim..][..dim]);
                    }
                },
            )
        };
        (half(0), half(1))
    }

    /// Attention jobs in order.
    pub(super) fn attention_jobs<'a>(
        q: &'a Array<F>,
        visible: &'a Visible<Array<F>>,
        spans: &'a Spans,
        heads: Heads,
    ) -> Vec<AttentionJob<'a, F>> {
        let Heads { kv, dim, .. } = heads;
        let job = |span: &'a Span, g: usize| AttentionJob {
            len: span.len,
            dim,
            group: heads.group(),
            q: view(q, span, g, heads.group() * dim),
            exact: visible.exact.as_ref().map(|keys| key_view(keys, span, g, dim)),
            pooled: visible
                .pooled
                .as_ref()
                .map(|pooled| (key_view(&pooled.keys, span, g, dim), view(&pooled.close, span, g, 1))),
            delay: visible.delay,
            precision: visible.precision,
        };
        spans.iter().flat_map(|span| (0..kv).map(move |g| job(span, g))).collect()
    }

    /// Output and log-sum-exp, job-major.
    pub(super) fn attend(
        &self,
        q: &Array<F>,
        visible: &Visible<Array<F>>,
        spans: &Spans,
        heads: Heads,
    ) -> (Lent<'_, F>, Lent<'_, F>) {
        let (rows, group) = (spans.rows(), heads.group());
        let (mut out, mut lse) = (self.buffer(rows * heads.query * heads.dim), self.buffer(rows * heads.query));
        let jobs = Self::attention_jobs(q, visible, spans, heads);
        let outs = split_jobs(&mut out, spans, heads.kv, group * heads.dim);
        let lses = split_jobs(&mut lse, spans, heads.kv, group);
        let work = jobs.iter().zip(outs.into_iter().zip(lses));
        team::each(work, |(job, (out, lse))| self.set.attention(job, out, lse));
        (out, lse)
    }
}
