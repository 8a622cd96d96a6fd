//! Who folds: logits and importances, from a decision head or a borrowed channel, and what is made of them.

use super::{Bench, Cost};
use kvfold_kernels::ops::{Borrowed, Decided, Exempt, Gate, Heads, Spans};
use kvfold_kernels::{Grad, Ops};

impl Bench<'_> {
    pub(super) fn decisions(&mut self, heads: Heads, spans: &Spans) {
        let (rows, kv, delay) = (self.work.rows, heads.kv, self.work.delay);
        let of = || format!("[{rows},{kv}]");
        let (x, outputs) = (self.array(rows, kv), self.array(rows, 2 * kv));
        let d = Gate { logit: x.clone(), omega: x.clone() };
        self.time("head gate", of(), Cost::of_plain(4 * rows * kv), |ops| drop(ops.head_gate(&outputs, 4.0, 3.0)));
        self.time("head gate backward", of(), Cost::of_numbers(6 * rows * kv), |ops| {
            drop(ops.head_gate_grad(&outputs, 4.0, &d));
        });

        self.time("look back", of(), Cost::of_plain(3 * rows * kv), |ops| drop(ops.add_ahead(&x, &x, spans)));

        let (q, k) = (self.array(rows, heads.query * heads.dim), self.array(rows, kv * heads.dim));
        let by = Borrowed { scale: 1.0, offset: 5.0 };
        // A number per query head and KV head is read, and two are written.
        let read = rows * (heads.query + kv);
        self.time("borrowed gate", of(), Cost::of_plain(read + 2 * rows * kv), |ops| {
            drop(ops.borrowed_gate(&q, &k, heads, by));
        });
        let both = rows * heads.dim * (heads.query + kv);
        self.time("borrowed gate backward", of(), Cost::of_plain(both + read + 2 * rows * kv), |ops| {
            drop(ops.borrowed_gate_grad((&q, &k), heads, by, &d));
        });
        self.time("query logit", of(), Cost::of_plain(2 * rows * kv), |ops| drop(ops.query_logit(&q, heads, by)));

        let d = Decided { alpha: x.clone(), close: x.clone() };
        self.time("soft decision", of(), Cost::of_numbers(3 * rows * kv), |ops| drop(ops.decide_soft(&x, spans, 0)));
        self.time("soft decision backward", of(), Cost::of_numbers(4 * rows * kv), |ops| {
            drop(ops.decide_soft_grad(&x, spans, 0, &d));
        });
        self.time("hard decision", of(), Cost::of_numbers(3 * rows * kv), |ops| drop(ops.decide_hard(&x, spans, 0)));
        self.time("fold rate", of(), Cost::of_plain(rows * kv), |ops| {
            drop(ops.fold_rate(&x, spans, Exempt { sinks: 0, delay }))
        });
    }
}
