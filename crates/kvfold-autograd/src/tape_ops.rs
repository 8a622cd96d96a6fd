//! [`Ops`] on a tape: each op runs on the backend and names its adjoint.

use crate::tape::{Tape, Var};
use kvfold_kernels::Grad;
use kvfold_kernels::ops::{
    AttentionSaved, Borrowed, Channel, Decided, Exempt, Gate, Goal, Heads, Hinge, Keys, LossGrad, Ops, PoolInput,
    PoolOutput, PoolShape, Pooled, Precision, Predictions, Spans, Visible,
};

/// The backend's tensors behind a set of keys.
fn keys_value<T: Clone>(keys: &Keys<Var<T>>) -> Keys<T> {
    Keys { k: keys.k.value.clone(), v: keys.v.value.clone(), mass: keys.mass.as_ref().map(|m| m.value.clone()) }
}

fn visible_value<T: Clone>(visible: &Visible<Var<T>>) -> Visible<T> {
    Visible {
        exact: visible.exact.as_ref().map(keys_value),
        pooled: visible.pooled.as_ref().map(|p| Pooled { keys: keys_value(&p.keys), close: p.close.value.clone() }),
        delay: visible.delay,
        precision: visible.precision,
    }
}

impl<O: Grad + Clone + 'static> Ops for Tape<O>
where
    O::Tensor: 'static,
{
    type Tensor = Var<O::Tensor>;

    fn tensor(&self, shape: &[usize], data: &[f32]) -> Self::Tensor {
        Var::constant(self.ops.tensor(shape, data))
    }

    fn weight(&self, shape: &[usize], data: &[f32], precision: Precision) -> Self::Tensor {
        Var::constant(self.ops.weight(shape, data, precision))
    }

    fn precision(&self, weight: &Self::Tensor) -> Precision {
        self.ops.precision(&weight.value)
    }

    fn to_host(&self, x: &Self::Tensor) -> Vec<f32> {
        self.ops.to_host(&x.value)
    }

    fn scalar(&self, x: &Self::Tensor) -> f64 {
        self.ops.scalar(&x.value)
    }

    fn shape(&self, x: &Self::Tensor) -> Vec<usize> {
        self.ops.shape(&x.value)
    }

    fn linear(&self, x: &Self::Tensor, w: &Self::Tensor) -> Self::Tensor {
        let y = self.ops.linear(&x.value, &w.value);
        // Each is kept for the other's gradient alone: the inputs of frozen weights need not outlive the forward pass.
        let xs = w.id.map(|id| (id, x.value.clone(), w.value.clone()));
        let ws = x.id.map(|id| (id, w.value.clone()));
        self.one(&[x, w], y, move |ops, d, grads| {
            if let Some((id, w)) = ws {
                grads.give_onto(Some(id), |sum| ops.linear_grad_x(&w, d, sum));
            }
            if let Some((id, x, w)) = xs {
                grads.give(ops, Some(id), || ops.linear_grad_w(&x, &w, d));
            }
        })
    }

    fn embed(&self, ids: &[u32], table: &Self::Tensor) -> Self::Tensor {
        let y = self.ops.embed(ids, &table.value);
        let (ids, saved) = (ids.to_vec(), table.clone());
        self.one(&[table], y, move |ops, d, grads| {
            grads.give_onto(saved.id, |sum| ops.embed_grad(&ids, &saved.value, d, sum));
        })
    }

    fn add_row(&self, x: &Self::Tensor, row: &Self::Tensor) -> Self::Tensor {
        let y = self.ops.add_row(&x.value, &row.value);
        let (x_id, row_id) = (x.id, row.id);
        self.one(&[x, row], y, move |ops, d, grads| {
            grads.give(ops, x_id, || d.clone());
            grads.give(ops, row_id, || ops.add_row_grad(d));
        })
    }

    fn rms_norm(&self, x: &Self::Tensor, w: &Self::Tensor, eps: f64) -> Self::Tensor {
        let y = self.ops.rms_norm(&x.value, &w.value, eps);
        let (xs, ws) = (x.clone(), w.clone());
        self.one(&[x, w], y, move |ops, d, grads| {
            let (dx, dw) = ops.rms_norm_grad(&xs.value, &ws.value, eps, d, grads.take(xs.id));
            grads.give_onto(xs.id, |_| dx);
            grads.give(ops, ws.id, || dw);
        })
    }

    fn rope_table(&self, inv_freq: &[f64], positions: usize) -> Self::Tensor {
        Var::constant(self.ops.rope_table(inv_freq, positions))
    }

    fn rope(&self, x: &Self::Tensor, table: &Self::Tensor, spans: &Spans) -> Self::Tensor {
        let y = self.ops.rope(&x.value, &table.value, spans);
        let (id, table, spans) = (x.id, table.value.clone(), spans.clone());
        self.one(&[x], y, move |ops, d, grads| grads.give(ops, id, || ops.rope_grad(&table, &spans, d)))
    }

    fn scale_channel(&self, x: &Self::Tensor, channel: Channel, factor: f64) -> Self::Tensor {
        let y = self.ops.scale_channel(&x.value, channel, factor);
        let id = x.id;
        self.one(&[x], y, move |ops, d, grads| grads.give(ops, id, || ops.scale_channel(d, channel, factor)))
    }

    fn swiglu(&self, gate: &Self::Tensor, up: &Self::Tensor) -> Self::Tensor {
        let y = self.ops.swiglu(&gate.value, &up.value);
        let (g, u) = (gate.clone(), up.clone());
        self.one(&[gate, up], y, move |ops, d, grads| {
            let (dg, du) = ops.swiglu_grad(&g.value, &u.value, d);
            grads.give(ops, g.id, || dg);
            grads.give(ops, u.id, || du);
        })
    }

    fn add(&self, x: &Self::Tensor, y: &Self::Tensor, factor: f64) -> Self::Tensor {
        let sum = self.ops.add(&x.value, &y.value, factor);
        let (x_id, y_id) = (x.id, y.id);
        self.one(&[x, y], sum, move |ops, d, grads| {
            grads.give(ops, x_id, || d.clone());
            grads.give(ops, y_id, || if factor == 1.0 { d.clone() } else { ops.scale(d, factor) });
        })
    }

    fn affine(&self, x: &Self::Tensor, scale: f64, offset: f64) -> Self::Tensor {
        let y = self.ops.affine(&x.value, scale, offset);
        let id = x.id;
        self.one(&[x], y, move |ops, d, grads| grads.give(ops, id, || ops.scale(d, scale)))
    }

    fn scale(&self, x: &Self::Tensor, factor: f64) -> Self::Tensor {
        let y = self.ops.scale(&x.value, factor);
        let id = x.id;
        self.one(&[x], y, move |ops, d, grads| grads.give(ops, id, || ops.scale(d, factor)))
    }

    fn ln(&self, x: &Self::Tensor) -> Self::Tensor {
        let y = self.ops.ln(&x.value);
        let saved = x.clone();
        self.one(&[x], y, move |ops, d, grads| grads.give(ops, saved.id, || ops.ln_grad(&saved.value, d)))
    }

    fn prediction_loss(&self, predicted: Predictions<'_, Self::Tensor>, goal: Goal<'_, Self::Tensor>) -> Self::Tensor {
        let Predictions { x, w } = predicted;
        let goal = match goal {
            Goal::Tokens(targets) => Goal::Tokens(targets),
            Goal::Teacher(Predictions { x, w }, direction) => {
                Goal::Teacher(Predictions { x: &x.value, w: &w.value }, direction)
            }
        };
        let predicted = Predictions { x: &x.value, w: &w.value };
        if x.id.is_none() && w.id.is_none() {
            return Var::constant(self.ops.prediction_loss(predicted, goal));
        }
        let LossGrad { loss, x: dx, w: dw } = self.ops.prediction_loss_grad(predicted, goal, w.id.is_some());
        let (x_id, w_id) = (x.id, w.id);
        self.one(&[x, w], loss, move |ops, d, grads| {
            let factor = ops.scalar(d);
            let scaled = |grad: O::Tensor| if factor == 1.0 { grad } else { ops.scale(&grad, factor) };
            grads.give(ops, x_id, || scaled(dx));
            if let Some(dw) = dw {
                grads.give(ops, w_id, || scaled(dw));
            }
        })
    }

    fn borrowed_gate(&self, q: &Self::Tensor, k: &Self::Tensor, heads: Heads, by: Borrowed) -> Gate<Self::Tensor> {
        let gate = self.ops.borrowed_gate(&q.value, &k.value, heads, by);
        let (qs, ks) = (q.clone(), k.clone());
        self.gate(&[q, k], gate, move |ops, d, grads| {
            let (dq, dk) = ops.borrowed_gate_grad((&qs.value, &ks.value), heads, by, &d);
            grads.give(ops, qs.id, || dq);
            grads.give(ops, ks.id, || dk);
        })
    }

    fn query_logit(&self, q: &Self::Tensor, heads: Heads, by: Borrowed) -> Self::Tensor {
        let logit = self.ops.query_logit(&q.value, heads, by);
        let id = q.id;
        self.one(&[q], logit, move |ops, d, grads| grads.give(ops, id, || ops.query_logit_grad(heads, by, d)))
    }

    fn head_gate(&self, r: &Self::Tensor, scale: f64, offset: f64) -> Gate<Self::Tensor> {
        let gate = self.ops.head_gate(&r.value, scale, offset);
        let saved = r.clone();
        self.gate(&[r], gate, move |ops, d, grads| {
            grads.give(ops, saved.id, || ops.head_gate_grad(&saved.value, scale, &d));
        })
    }

    fn add_ahead(&self, logit: &Self::Tensor, ahead: &Self::Tensor, spans: &Spans) -> Self::Tensor {
        let y = self.ops.add_ahead(&logit.value, &ahead.value, spans);
        let (logit_id, ahead_id, spans) = (logit.id, ahead.id, spans.clone());
        self.one(&[logit, ahead], y, move |ops, d, grads| {
            grads.give(ops, logit_id, || d.clone());
            grads.give(ops, ahead_id, || ops.add_ahead_grad(&spans, d));
        })
    }

    fn share_columns(&self, x: &Self::Tensor) -> Self::Tensor {
        let y = self.ops.share_columns(&x.value);
        let id = x.id;
        self.one(&[x], y, move |ops, d, grads| grads.give(ops, id, || ops.share_columns(d)))
    }

    fn relax(&self, logit: &Self::Tensor, noise: &Self::Tensor, temperature: f64) -> Self::Tensor {
        let y = self.ops.relax(&logit.value, &noise.value, temperature);
        let id = logit.id;
        self.one(&[logit], y, move |ops, d, grads| grads.give(ops, id, || ops.scale(d, 1.0 / temperature)))
    }

    fn decide_soft(&self, relaxed: &Self::Tensor, spans: &Spans, sinks: usize) -> Decided<Self::Tensor> {
        let Decided { alpha, close } = self.ops.decide_soft(&relaxed.value, spans, sinks);
        let [alpha, close] = self.outputs(&[relaxed], [alpha, close]);
        if alpha.id.is_some() {
            let (saved, spans, outs) = (relaxed.clone(), spans.clone(), [alpha.clone(), close.clone()]);
            self.record(move |ops, grads| {
                if let Some([alpha, close]) = grads.take_or_zeros(ops, outs) {
                    let d = Decided { alpha, close };
                    grads.give(ops, saved.id, || ops.decide_soft_grad(&saved.value, &spans, sinks, &d));
                }
            });
        }
        Decided { alpha, close }
    }

    fn decide_hard(&self, logit: &Self::Tensor, spans: &Spans, sinks: usize) -> Decided<Self::Tensor> {
        let Decided { alpha, close } = self.ops.decide_hard(&logit.value, spans, sinks);
        Decided { alpha: Var::constant(alpha), close: Var::constant(close) }
    }

    fn fold_rate(&self, relaxed: &Self::Tensor, spans: &Spans, exempt: Exempt) -> Self::Tensor {
        let rate = self.ops.fold_rate(&relaxed.value, spans, exempt);
        let (saved, spans) = (relaxed.clone(), spans.clone());
        self.one(&[relaxed], rate, move |ops, d, grads| {
            grads.give(ops, saved.id, || ops.fold_rate_grad(&saved.value, &spans, exempt, d));
        })
    }

    fn hinge(&self, rates: &[Self::Tensor], spans: &Spans, hinge: Hinge) -> Self::Tensor {
        let values: Vec<_> = rates.iter().map(|rate| rate.value.clone()).collect();
        let loss = self.ops.hinge(&values, spans, hinge);
        let (ids, spans): (Vec<_>, _) = (rates.iter().map(|rate| rate.id).collect(), spans.clone());
        self.one(&rates.iter().collect::<Vec<_>>(), loss, move |ops, d, grads| {
            for (id, grad) in ids.into_iter().zip(ops.hinge_grad(&values, &spans, hinge, d)) {
                grads.give(ops, id, || grad);
            }
        })
    }

    fn pool(&self, input: &PoolInput<Self::Tensor>, spans: &Spans, shape: PoolShape) -> PoolOutput<Self::Tensor> {
        let PoolInput { k, v, alpha, omega } = input;
        let (ks, vs) = (k.value.clone(), v.value.clone());
        let saved = PoolInput { k: ks, v: vs, alpha: alpha.value.clone(), omega: omega.value.clone() };
        let out = self.ops.pool(&saved, spans, shape);
        let [k_out, v_out, mass] = self.outputs(&[k, v, alpha, omega], [out.k, out.v, out.mass]);
        if k_out.id.is_some() {
            let (inputs, outs) = ([k, v, alpha, omega].map(|x| x.id), [&k_out, &v_out, &mass].map(Var::clone));
            let spans = spans.clone();
            self.record(move |ops, grads| {
                let Some([k, v, mass]) = grads.take_or_zeros(ops, outs) else { return };
                let d = ops.pool_grad(&saved, &spans, shape, &PoolOutput { k, v, mass });
                for (id, grad) in inputs.into_iter().zip([d.k, d.v, d.alpha, d.omega]) {
                    grads.give(ops, id, || grad);
                }
            });
        }
        PoolOutput { k: k_out, v: v_out, mass }
    }

    fn attention(
        &self,
        q: &Self::Tensor,
        visible: &Visible<Self::Tensor>,
        spans: &Spans,
        heads: Heads,
    ) -> Self::Tensor {
        let (values, spans) = (visible_value(visible), spans.clone());
        let saved = self.ops.attention_saving(&q.value, &values, &spans, heads);
        let mut inputs = vec![q];
        let all_keys = visible.exact.iter().chain(visible.pooled.as_ref().map(|p| &p.keys));
        inputs.extend(all_keys.flat_map(|keys| [&keys.k, &keys.v].into_iter().chain(&keys.mass)));
        inputs.extend(visible.pooled.as_ref().map(|p| &p.close));
        let (qs, ids) = (q.clone(), visible.clone());
        let AttentionSaved { out, lse } = saved;
        let kept = out.clone();
        self.one(&inputs, out, move |ops, d, grads| {
            let saved = AttentionSaved { out: kept, lse };
            let back = ops.attention_grad((&qs.value, &values), &saved, &spans, heads, d);
            grads.give(ops, qs.id, || back.q);
            let mut give_keys = |ids: &Keys<Var<O::Tensor>>, d: Keys<O::Tensor>| {
                grads.give(ops, ids.k.id, || d.k);
                grads.give(ops, ids.v.id, || d.v);
                if let (Some(id), Some(d)) = (&ids.mass, d.mass) {
                    grads.give(ops, id.id, || d);
                }
            };
            if let (Some(ids), Some(d)) = (&ids.exact, back.exact) {
                give_keys(ids, d);
            }
            if let (Some(ids), Some(d)) = (&ids.pooled, back.pooled) {
                give_keys(&ids.keys, d.keys);
                grads.give(ops, ids.close.id, || d.close);
            }
        })
    }
}

impl<O: Grad + Clone + 'static> Tape<O>
where
    O::Tensor: 'static,
{
    /// Records an op whose outputs are a logit and an importance.
    fn gate(
        &self,
        inputs: &[&Var<O::Tensor>],
        gate: Gate<O::Tensor>,
        back: impl FnOnce(&O, Gate<O::Tensor>, &mut crate::Grads<O::Tensor>) + 'static,
    ) -> Gate<Var<O::Tensor>> {
        let [logit, omega] = self.outputs(inputs, [gate.logit, gate.omega]);
        if logit.id.is_some() {
            let outs = [logit.clone(), omega.clone()];
            self.record(move |ops, grads| {
                if let Some([logit, omega]) = grads.take_or_zeros(ops, outs) {
                    back(ops, Gate { logit, omega }, grads);
                }
            });
        }
        Gate { logit, omega }
    }
}
