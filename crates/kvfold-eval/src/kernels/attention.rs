//! Attention and pooling over whole sequences, as training runs them.

use super::{Bench, Cost};
use kvfold_kernels::ops::{Heads, Keys, Late, PoolInput, PoolShape, Pooled, Precision, Spans, Visible};
use kvfold_kernels::simd::Level;
use kvfold_kernels::{Grad, Ops};

impl Bench<'_> {
    pub(super) fn attention(&mut self, heads: Heads, spans: &Spans) {
        let (rows, delay) = (self.work.rows, self.work.delay);
        let Heads { query, kv, dim } = heads;
        let (q, d) = (self.array(rows, query * dim), self.array(rows, query * dim));
        let keys = Keys { k: self.array(rows, kv * dim), v: self.array(rows, kv * dim), mass: None };
        let close = self.ops.tensor(&[rows, kv], &vec![-0.5; rows * kv]);
        let plain = |precision| Visible { exact: Some(keys.clone()), pooled: None, delay: 0, precision };
        let pooled = Some(Pooled { keys: keys.clone(), close: close.clone() });
        let folding = |precision| Visible { exact: Some(keys.clone()), pooled: pooled.clone(), delay, precision };
        let pairs: usize = spans.iter().map(|span| span.len * (span.len + 1) / 2).sum();
        let flops = 4.0 * (pairs * query * dim) as f64;
        let numbers = rows * dim * (2 * query + 2 * kv);
        let longest = spans.iter().map(|span| span.len).max().unwrap_or(0);
        let shape = || format!("{} x {longest} tokens, {query}/{kv} heads of {dim}", spans.len());
        // Without tiles, attention is computed in floats, whatever its precision.
        let tiles = Level::detect() >= Level::AmxBf16;
        let precisions = [("f32", Precision::F32), ("bf16", Precision::Bf16)].into_iter().take(1 + usize::from(tiles));
        for (of, precision) in precisions {
            for (name, visible) in [("attention", plain(precision)), ("folding attention", folding(precision))] {
                let cost = |factor: f64| Cost::of_products(precision, flops * factor, numbers);
                self.time(&format!("{name} {of}"), shape(), cost(1.0), |ops| {
                    drop(ops.attention(&q, &visible, spans, heads));
                });
                let saved = self.ops.attention_saving(&q, &visible, spans, heads);
                self.time(&format!("{name} backward {of}"), shape(), cost(2.5), |ops| {
                    drop(ops.attention_grad((&q, &visible), &saved, spans, heads, &d));
                });
            }
        }
        // Scores alone, and a number per query head.
        let plain = plain(Precision::F32);
        let saved = self.ops.attention_saving(&q, &plain, spans, heads);
        let late = Late { later: delay, pair: 2.0 };
        let cost = Cost::of_products(Precision::F32, flops / 2.0, rows * (dim * (query + kv) + 4 * query));
        self.time("late reads", shape(), cost, |ops| {
            drop(ops.late_reads((&q, &plain), &saved, spans, heads, late));
        });

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
