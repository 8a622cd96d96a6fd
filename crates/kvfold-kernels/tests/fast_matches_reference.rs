//! The fast kernels compute what the reference does, whatever the instruction set; and no result depends on threads, on
//! old buffers or on what else is in the batch (promise I3).

use kvfold_kernels::noise::{hash, unit};
use kvfold_kernels::ops::{
    AdamW, Borrowed, Channel, Decided, Exempt, Gate, Goal, Heads, Hinge, Keys, KlDirection, Late, Moments, NO_TARGET,
    Norm, Over, PoolInput, PoolOutput, PoolShape, Pooled, Precision, Predictions, Pull, Scope, Spans, Visible,
};
use kvfold_kernels::simd::Level;
use kvfold_kernels::team::Team;
use kvfold_kernels::{FastCpu, Grad, Ops, Reference};
use std::sync::Arc;

/// Largest difference of an f32 result from the f64 reference, relative to the largest element of the result (or to
/// 0.1, where all are smaller).
const TOLERANCES: [(&str, f32); 41] = [
    ("linear", 2e-6),
    ("linear_grad", 2e-6),
    ("linear_bf16", 2e-6),
    ("linear_bf16_grad", 2e-6),
    ("weight_bf16", 0.0),
    ("linear_q8", 2e-6),
    ("weight_q8", 0.0),
    ("embed", 0.0),
    ("embed_grad", 5e-7),
    ("rms_norm", 5e-7),
    ("rms_norm_grad", 2e-6),
    ("rope", 3e-7),
    ("rope_grad", 3e-7),
    ("scale_channel", 2e-7),
    ("swiglu", 5e-7),
    ("swiglu_grad", 1e-6),
    ("add", 2e-7),
    ("affine", 2e-7),
    ("add_row", 2e-7),
    ("add_row_grad", 1e-6),
    ("scale", 2e-7),
    ("ln", 3e-7),
    ("ln_grad", 3e-7),
    ("loss", 2e-6),
    ("loss_grad", 3e-5),
    ("loss_bf16", 2e-6),
    // Gradients of logits that lie between two bf16 may be rounded to either.
    ("loss_bf16_grad", 1e-3),
    ("gate", 3e-7),
    ("gate_grad", 1e-6),
    ("add_ahead", 2e-7),
    ("share_columns", 3e-7),
    ("relax", 3e-7),
    ("decide", 2e-7),
    ("decide_grad", 5e-7),
    ("fold_rate", 2e-7),
    ("hinge", 3e-7),
    ("pool", 5e-6),
    ("attention", 1e-6),
    ("attention_grad", 5e-6),
    ("late_reads", 1e-5),
    ("optimizer", 1e-6),
];

/// A batch and its sizes.
#[derive(Clone, Debug)]
struct Case {
    lengths: Vec<usize>,
    heads: Heads,
    /// Model dim, feed-forward dim, vocabulary.
    sizes: [usize; 3],
    delay: usize,
    sinks: usize,
    window: usize,
    /// Place of the first row in the batch that this one is taken from.
    first: usize,
}

impl Case {
    fn new(lengths: &[usize], (query, kv, dim): (usize, usize, usize), sizes: [usize; 3], delay: usize) -> Self {
        let heads = Heads { query, kv, dim };
        Self { lengths: lengths.to_vec(), heads, sizes, delay, sinks: 0, window: 3, first: 0 }
    }

    /// Any sizes, all of them odd ones.
    fn random(seed: u64) -> Self {
        let mut place = 0;
        let mut draw = |lo: usize, hi: usize| {
            place += 1;
            lo + (hash(&[seed, place]) % (hi - lo) as u64) as usize
        };
        let lengths = (0..draw(1, 5)).map(|_| draw(1, 70)).collect();
        let (kv, group, dim) = (draw(1, 4), draw(1, 5), 2 * draw(1, 20));
        let heads = Heads { query: kv * group, kv, dim };
        let sizes = [draw(1, 100), draw(1, 100), draw(2, 100)];
        Self { lengths, heads, sizes, delay: draw(0, 40), sinks: draw(0, 3), window: draw(1, 20), first: 0 }
    }

    /// Sizes that cross the borders of blocks, tiles and tasks, and enough elements for threads to share.
    fn borders() -> Vec<Self> {
        vec![
            Self::new(&[1, 5, 2], (2, 1, 6), [7, 5, 11], 2),
            Self::new(&[1], (1, 1, 2), [1, 1, 2], 0),
            Self::new(&[33, 1, 65], (4, 2, 8), [33, 70, 37], 5),
            Self::new(&[129, 1, 161], (4, 1, 64), [130, 260, 129], 33),
            Self::new(&[40, 1, 31], (2, 2, 80), [520, 264, 300], 20),
            Self::new(&[600, 3], (3, 1, 20), [64, 96, 64], 140),
        ]
    }

    /// The sequences of a batch, each as a batch of its own.
    fn apart(&self) -> Vec<Self> {
        let spans = Spans::of_lengths(&self.lengths);
        spans.iter().map(|span| Self { lengths: vec![span.len], first: span.start, ..self.clone() }).collect()
    }
}

/// What an op computed.
struct Outcome {
    /// The op, and which of its outputs.
    name: String,
    /// One row per token; other outcomes sum over the batch.
    per_token: bool,
    cols: usize,
    data: Vec<f32>,
}

/// Runs ops on numbers that depend on their name and place only.
struct Bench<'a, O: Grad> {
    ops: &'a O,
    case: &'a Case,
    rows: usize,
    outcomes: Vec<Outcome>,
}

impl<O: Grad> Bench<'_, O> {
    fn numbers(&self, name: &str, first: usize, len: usize, (lo, hi): (f64, f64)) -> Vec<f32> {
        let name = name.bytes().fold(0, |h, byte| hash(&[h, u64::from(byte)]));
        (first..first + len).map(|place| (lo + (hi - lo) * unit(hash(&[name, place as u64]))) as f32).collect()
    }

    /// An array that does not depend on the batch.
    fn weight(&self, name: &str, shape: &[usize]) -> O::Tensor {
        self.ops.tensor(shape, &self.numbers(name, 0, shape.iter().product(), (-1.0, 1.0)))
    }

    /// A row per token.
    fn tokens(&self, name: &str, cols: usize, range: (f64, f64)) -> O::Tensor {
        self.ops.tensor(&[self.rows, cols], &self.numbers(name, self.case.first * cols, self.rows * cols, range))
    }

    fn units(&self, name: &str, cols: usize) -> O::Tensor {
        self.tokens(name, cols, (-1.0, 1.0))
    }

    fn keep(&mut self, name: &str, per_token: bool, x: &O::Tensor) {
        let (shape, data) = (self.ops.shape(x), self.ops.to_host(x));
        assert_eq!(shape.iter().product::<usize>(), data.len());
        assert!(!per_token || shape[0] == self.rows, "{name}: {shape:?}");
        let cols = data.len() / shape[0];
        self.outcomes.push(Outcome { name: name.into(), per_token, cols, data });
    }

    fn keep_tokens<'x>(&mut self, name: &str, xs: impl IntoIterator<Item = &'x O::Tensor>)
    where
        O::Tensor: 'x,
    {
        for (n, x) in xs.into_iter().enumerate() {
            self.keep(&format!("{name} {n}"), true, x);
        }
    }

    fn layers(&mut self) {
        let (ops, [dim, wide, vocab]) = (self.ops, self.case.sizes);
        let (x, w, d) = (self.units("x", dim), self.weight("w", &[wide, dim]), self.units("d", wide));
        self.keep("linear", true, &ops.linear(&x, &w));
        self.keep("linear_grad x", true, &ops.linear_grad_x(&w, &d, None));
        self.keep("linear_grad x onto", true, &ops.linear_grad_x(&w, &d, Some(x.clone())));
        self.keep("linear_grad w", false, &ops.linear_grad_w(&x, &w, &d));
        let numbers = self.numbers("w", 0, wide * dim, (-1.0, 1.0));
        let w = ops.master(&[wide, dim], &numbers, Precision::Bf16);
        self.keep("linear_bf16", true, &ops.linear(&x, &w));
        self.keep("linear_bf16_grad x", true, &ops.linear_grad_x(&w, &d, None));
        self.keep("linear_bf16_grad x onto", true, &ops.linear_grad_x(&w, &d, Some(x.clone())));
        self.keep("linear_bf16_grad w", false, &ops.linear_grad_w(&x, &w, &d));
        let packed = ops.weight(&[wide, dim], &numbers, Precision::Bf16);
        self.keep("linear_bf16 packed", true, &ops.linear(&x, &packed));
        self.keep("weight_bf16", false, &packed);
        let ids: Vec<u32> = (0..wide as u32).rev().collect();
        self.keep("weight_bf16 rows", false, &ops.embed(&ids, &packed));
        let quantised = ops.weight(&[wide, dim], &numbers, Precision::Q8);
        self.keep("linear_q8", true, &ops.linear(&x, &quantised));
        self.keep("weight_q8", false, &quantised);
        self.keep("weight_q8 rows", false, &ops.embed(&ids, &quantised));

        let first = self.case.first;
        let ids: Vec<u32> = (0..self.rows).map(|row| (hash(&[(first + row) as u64]) % vocab as u64) as u32).collect();
        let (table, d) = (self.weight("table", &[vocab, dim]), self.units("d embed", dim));
        self.keep("embed", true, &ops.embed(&ids, &table));
        self.keep("embed_grad", false, &ops.embed_grad(&ids, &table, &d, None));
        self.keep("embed_grad onto", false, &ops.embed_grad(&ids, &table, &d, Some(table.clone())));

        let (w, d) = (self.weight("norm", &[dim]), self.units("d norm", dim));
        self.keep("rms_norm", true, &ops.rms_norm(&x, &w, 1e-5));
        let (dx, dw) = ops.rms_norm_grad(&x, &w, 1e-5, &d, None);
        self.keep("rms_norm_grad x", true, &dx);
        self.keep("rms_norm_grad w", false, &dw);
        self.keep("rms_norm_grad x onto", true, &ops.rms_norm_grad(&x, &w, 1e-5, &d, Some(d.clone())).0);

        let (gate, up, d) = (self.tokens("gate", wide, (-9.0, 9.0)), self.units("up", wide), self.units("d ff", wide));
        self.keep("swiglu", true, &ops.swiglu(&gate, &up));
        let (d_gate, d_up) = ops.swiglu_grad(&gate, &up, &d);
        self.keep_tokens("swiglu_grad", [&d_gate, &d_up]);
        self.keep("add", true, &ops.add(&gate, &up, 0.3));
        let row = self.weight("row", &[wide]);
        self.keep("add_row", true, &ops.add_row(&gate, &row));
        self.keep("add_row_grad", false, &ops.add_row_grad(&gate));
        self.keep("scale", true, &ops.scale(&gate, 0.3));
        self.keep("affine", true, &ops.affine(&gate, 1.7, 0.4));
        self.keep("scale zeros", true, &ops.zeros_like(&gate));
        let mass = self.tokens("mass", wide, (0.01, 90.0));
        self.keep("ln", true, &ops.ln(&mass));
        self.keep("ln_grad", true, &ops.ln_grad(&mass, &d));
    }

    fn rotation(&mut self, spans: &Spans) {
        let (ops, Heads { query, dim, .. }) = (self.ops, self.case.heads);
        let x = self.units("rope", query * dim);
        let (gain, d) = (self.weight("head norm", &[dim]), self.units("d head norm", query * dim));
        self.keep("rms_norm heads", true, &ops.rms_norm(&x, &gain, 1e-5));
        let (dx, dw) = ops.rms_norm_grad(&x, &gain, 1e-5, &d, None);
        self.keep("rms_norm_grad heads x", true, &dx);
        self.keep("rms_norm_grad heads w", false, &dw);
        let inv_freq: Vec<f64> = (0..dim / 2).map(|d| 10_000f64.powf(-2.0 * d as f64 / dim as f64)).collect();
        let table = ops.rope_table(&inv_freq, self.rows);
        self.keep("rope", true, &ops.rope(&x, &table, spans));
        self.keep("rope_grad", true, &ops.rope_grad(&table, spans, &x));
        for channel in [Channel::last(dim), Channel::last_of_first_query(self.case.heads)] {
            self.keep("scale_channel", true, &ops.scale_channel(&x, channel, 0.7));
        }
    }

    fn losses(&mut self) {
        let (ops, [dim, _, vocab]) = (self.ops, self.case.sizes);
        let (x, teacher) = (self.tokens("x loss", dim, (-3.0, 3.0)), self.tokens("x teacher", dim, (-3.0, 3.0)));
        let (w, teacher_w) = (self.weight("unembed", &[vocab, dim]), self.weight("unembed teacher", &[vocab, dim]));
        let target = |row: usize| match hash(&[row as u64, 5]) {
            skip if skip % 5 == 0 => NO_TARGET,
            place => (place % vocab as u64) as u32,
        };
        let targets: Vec<u32> = (0..self.rows).map(|row| target(self.case.first + row)).collect();
        let teacher = Predictions { x: &teacher, w: &teacher_w };
        let goals = [
            ("tokens", Goal::Tokens(&targets)),
            ("forward", Goal::Teacher(teacher, KlDirection::Forward)),
            ("reverse", Goal::Teacher(teacher, KlDirection::Reverse)),
        ];
        for (name, goal) in goals {
            let predicted = Predictions { x: &x, w: &w };
            self.keep(&format!("loss {name}"), false, &ops.prediction_loss(predicted, goal));
            let grad = ops.prediction_loss_grad(predicted, goal, true);
            self.keep(&format!("loss {name} again"), false, &grad.loss);
            self.keep(&format!("loss_grad {name} x"), false, &grad.x);
            self.keep(&format!("loss_grad {name} w"), false, &grad.w.expect("asked for"));
            let x_only = ops.prediction_loss_grad(predicted, goal, false);
            assert!(x_only.w.is_none() && ops.to_host(&x_only.x) == ops.to_host(&grad.x));
        }
        // Words of weights, whose gradient grows from one part of the rows to the next.
        let w = ops.master(&[vocab, dim], &self.numbers("unembed", 0, vocab * dim, (-1.0, 1.0)), Precision::Bf16);
        let grad = ops.prediction_loss_grad(Predictions { x: &x, w: &w }, Goal::Tokens(&targets), true);
        self.keep("loss_bf16", false, &grad.loss);
        self.keep("loss_bf16_grad x", false, &grad.x);
        self.keep("loss_bf16_grad w", false, &grad.w.expect("asked for"));
    }

    fn gates(&mut self, spans: &Spans) {
        let (ops, heads @ Heads { query, kv, dim }, delay) = (self.ops, self.case.heads, self.case.delay);
        let sinks = self.case.sinks;
        let logits = (-9.0, 9.0);
        let (q, k) = (self.tokens("gate q", query * dim, logits), self.tokens("gate k", kv * dim, logits));
        let by = Borrowed { scale: 1.3, offset: 0.4 };
        let gate = ops.borrowed_gate(&q, &k, heads, by);
        let d = Gate { logit: self.units("d logit", kv), omega: self.units("d omega", kv) };
        let (dq, dk) = ops.borrowed_gate_grad((&q, &k), heads, by, &d);
        self.keep_tokens("gate borrowed", [&gate.logit, &gate.omega]);
        self.keep_tokens("gate_grad borrowed", [&dq, &dk]);
        let r = self.tokens("r", 2 * kv, (-3.0, 3.0));
        let gate = ops.head_gate(&r, 2.0, 0.4);
        self.keep_tokens("gate head", [&gate.logit, &gate.omega]);
        self.keep("gate query", true, &ops.query_logit(&q, heads, by));
        self.keep("gate_grad query", true, &ops.query_logit_grad(heads, by, &d.logit));
        self.keep("gate_grad head", true, &ops.head_gate_grad(&r, 2.0, &d));

        let (logit, noise) = (self.tokens("logit", kv, logits), self.units("noise", kv));
        self.keep("add_ahead", false, &ops.add_ahead(&logit, &noise, spans));
        self.keep("add_ahead", false, &ops.add_ahead_grad(spans, &noise));
        self.keep("share_columns", true, &ops.share_columns(&logit));
        self.keep("relax", true, &ops.relax(&logit, &noise, 0.3));
        let (soft, hard) = (ops.decide_soft(&logit, spans, sinks), ops.decide_hard(&logit, spans, sinks));
        self.keep_tokens("decide", [&soft.alpha, &soft.close, &hard.alpha, &hard.close]);
        let d = Decided { alpha: d.logit, close: d.omega };
        self.keep("decide_grad", true, &ops.decide_soft_grad(&logit, spans, sinks, &d));

        let rate = ops.fold_rate(&logit, spans, Exempt { sinks, delay });
        self.keep("fold_rate", false, &rate);
        let d = self.weight("d rate", &[spans.len(), kv]);
        self.keep("fold_rate grad", false, &ops.fold_rate_grad(&logit, spans, Exempt { sinks, delay }, &d));
        let rates = [rate, ops.fold_rate(&ops.share_columns(&logit), spans, Exempt::default())];
        for (scope, over, pull) in [
            (Scope::Global, Over::Sequence, Pull::Up),
            (Scope::Layer, Over::Batch, Pull::Both),
            (Scope::Head, Over::Batch, Pull::Up),
        ] {
            let hinge = Hinge { target: 0.47, scope, over, pull, stated_at: None };
            self.keep("hinge", false, &ops.hinge(&rates, spans, hinge));
            for d in ops.hinge_grad(&rates, spans, hinge, &ops.tensor(&[1], &[0.7])) {
                self.keep("hinge grad", false, &d);
            }
        }
    }

    fn memory(&mut self, spans: &Spans, hard: bool) {
        let (ops, sinks, heads @ Heads { kv, dim, .. }) = (self.ops, self.case.sinks, self.case.heads);
        let name = if hard { "hard" } else { "soft" };
        let logit = self.tokens("fold", kv, (-3.0, 3.0));
        let Decided { alpha, close } =
            if hard { ops.decide_hard(&logit, spans, sinks) } else { ops.decide_soft(&logit, spans, sinks) };
        let (k, v) = (self.units("k", kv * dim), self.units("v", kv * dim));
        let omega = self.tokens("omega", kv, (0.1, 1.0));
        let d =
            PoolOutput { k: self.units("d k", kv * dim), v: self.units("d v", kv * dim), mass: self.units("d z", kv) };
        let input = PoolInput { k: k.clone(), v: v.clone(), alpha, omega: omega.clone() };
        for window in [None, Some(self.case.window)] {
            let shape = PoolShape { heads, window };
            let out = ops.pool(&input, spans, shape);
            self.keep_tokens(&format!("pool {name} {window:?}"), [&out.k, &out.v, &out.mass]);
            let back = ops.pool_grad(&input, spans, shape, &d);
            self.keep_tokens(&format!("pool {name} {window:?} grad"), [&back.k, &back.v, &back.alpha, &back.omega]);
        }
        let pooled = ops.pool(&input, spans, PoolShape { heads, window: None });
        let exact = Keys { k, v, mass: Some(ops.ln(&omega)) };
        let states = Keys { k: pooled.k, v: pooled.v, mass: Some(ops.ln(&pooled.mass)) };
        let states = Pooled { keys: states, close };
        let view = |exact: Option<&Keys<_>>, pooled: Option<&Pooled<_>>, delay: usize| Visible {
            exact: exact.cloned(),
            pooled: pooled.cloned(),
            delay,
            precision: Precision::F32,
        };
        self.attend(&format!("{name} plain"), &view(Some(&Keys { mass: None, ..exact.clone() }), None, 0), spans);
        self.attend(&format!("{name} at once"), &view(None, Some(&states), 0), spans);
        self.attend(&format!("{name} delayed"), &view(Some(&exact), Some(&states), self.case.delay), spans);
    }

    fn attend(&mut self, name: &str, visible: &Visible<O::Tensor>, spans: &Spans) {
        let (ops, heads) = (self.ops, self.case.heads);
        let q = self.tokens("q", heads.query * heads.dim, (-2.0, 2.0));
        let d = self.units("d attention", heads.query * heads.dim);
        let saved = ops.attention_saving(&q, visible, spans, heads);
        let out = ops.attention(&q, visible, spans, heads);
        self.keep_tokens(&format!("attention {name}"), [&out, &saved.out, &saved.lse]);
        if visible.pooled.is_none() {
            for pair in [1.0, 2.0] {
                let late = Late { later: self.case.delay, pair };
                let reads = ops.late_reads((&q, visible), &saved, spans, heads, late);
                self.keep_tokens(&format!("late_reads {name} {pair}"), [&reads.own, &reads.apart, &reads.lost]);
            }
        }
        let back = ops.attention_grad((&q, visible), &saved, spans, heads, &d);
        self.keep(&format!("attention_grad {name} q"), true, &back.q);
        let close = back.pooled.as_ref().map(|pooled| &pooled.close);
        for (side, keys) in [("exact", &back.exact), ("pooled", &back.pooled.as_ref().map(|p| p.keys.clone()))] {
            let Some(keys) = keys else { continue };
            let all = [Some(&keys.k), Some(&keys.v), keys.mass.as_ref()];
            self.keep_tokens(&format!("attention_grad {name} {side}"), all.into_iter().flatten());
        }
        self.keep_tokens(&format!("attention_grad {name} close"), close);
    }

    fn optimizer(&mut self) {
        let (ops, [dim, wide, _]) = (self.ops, self.case.sizes);
        let mut param = self.weight("param", &[wide, dim]);
        let zeros = || ops.zeros_like(&param);
        let mut moments = Moments { m: zeros(), v: zeros() };
        let before = param.clone();
        for step in 1..=3 {
            let grad = self.weight(&format!("step {step}"), &[wide, dim]);
            let rates =
                AdamW { lr: 0.01, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step, grad_scale: 0.5 };
            ops.adamw(&mut param, &grad, &mut moments, rates);
            let norm = ops.sum_squares(&grad);
            self.keep("optimizer norm", false, &ops.tensor(&[1], &[norm as f32]));
        }
        let mut zeroed = param.clone();
        ops.zero_rows(&mut zeroed, &[0, wide - 1]);
        for x in [&param, &moments.m, &moments.v, &zeroed, &before] {
            self.keep("optimizer", false, x);
        }
    }
}

/// Every op and every adjoint.
fn every_op<O: Grad>(ops: &O, case: &Case) -> Vec<Outcome> {
    let spans = Spans::of_lengths(&case.lengths);
    let mut bench = Bench { ops, case, rows: spans.rows(), outcomes: Vec::new() };
    bench.layers();
    bench.rotation(&spans);
    bench.losses();
    bench.gates(&spans);
    bench.memory(&spans, false);
    bench.memory(&spans, true);
    bench.optimizer();
    bench.outcomes
}

/// Every level against the reference.
fn assert_close(case: &Case) {
    let expected = every_op(&Reference::<f64>::reference(), case);
    for level in Level::available() {
        for (want, got) in expected.iter().zip(every_op(&FastCpu::at_level(level), case)) {
            let name = &want.name;
            let op = name.split(' ').next();
            let tolerance = TOLERANCES.iter().find(|(name, _)| Some(*name) == op).expect("every op has a tolerance").1;
            let largest = want.data.iter().filter(|x| x.is_finite()).fold(0.1f32, |m, x| m.max(x.abs()));
            for (i, (&want, &got)) in want.data.iter().zip(&got.data).enumerate() {
                let error = if got == want { 0.0 } else { (got - want).abs() / largest };
                assert!(error <= tolerance, "{level:?} {name} {i}: {got}, not {want} (error {error:.1e}) in {case:?}");
            }
        }
    }
}

/// Sums of products by the definition: `sum_p a(i, p) b(p, j)`.
fn product([m, n, k]: [usize; 3], a: impl Fn(usize, usize) -> f64, b: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    (0..m * n).map(|at| (0..k).map(|p| a(at / n, p) * b(p, at % n)).sum()).collect()
}

/// How products divide into tasks is the same in every backend, so no backend can check another here. The numbers are
/// multiples of 1/64 below 1/2, which bf16 holds exactly.
#[test]
fn products_are_their_definition_across_the_borders_of_tasks() {
    let ops = Reference::<f64>::reference();
    let sizes = [[1, 300, 450], [1, 3, 5], [70, 33, 100], [603, 20, 37], [1025, 3, 70], [130, 64, 1], [97, 1, 33]];
    for ([n, k, m], precision) in sizes.into_iter().flat_map(|size| [(size, Precision::F32), (size, Precision::Bf16)]) {
        let numbers = |seed: u64, len: usize| {
            (0..len as u64).map(|i| (hash(&[seed, i]) % 64) as f64 / 64.0 - 0.5).collect::<Vec<_>>()
        };
        let (x, w, d) = (numbers(1, n * k), numbers(2, m * k), numbers(3, n * m));
        let f32s: Vec<f32> = w.iter().map(|&x| x as f32).collect();
        let weight = ops.master(&[m, k], &f32s, precision);
        let arrays = (ops.array(&[n, k], x.clone()), weight, ops.array(&[n, m], d.clone()));
        for (got, expected) in [
            (ops.linear(&arrays.0, &arrays.1), product([n, m, k], |i, p| x[i * k + p], |p, j| w[j * k + p])),
            (
                ops.linear_grad_x(&arrays.1, &arrays.2, None),
                product([n, k, m], |i, p| d[i * m + p], |p, j| w[p * k + j]),
            ),
            (
                ops.linear_grad_w(&arrays.0, &arrays.1, &arrays.2),
                product([m, k, n], |i, p| d[p * m + i], |p, j| x[p * k + j]),
            ),
        ] {
            let error = got.data().iter().zip(&expected).fold(0f64, |m, (got, want)| m.max((got - want).abs()));
            assert!(
                got.data().len() == expected.len() && error < 1e-12,
                "{precision:?} {n} rows by [{m},{k}]: {error}"
            );
        }
    }
}

/// Products that share a round of work, and a feed-forward layer whose inner activations nobody sees, are bit for bit what
/// their parts are one by one: for every precision, also where weights differ in it, and wherever tasks meet.
#[test]
fn fused_products_are_their_parts() {
    for threads in [1, 3] {
        Arc::new(Team::new(threads).expect("threads")).install(compare_fused_products);
    }
}

fn compare_fused_products() {
    use Precision::{Bf16, F32, Q8};
    let numbers =
        |seed: u64, len: usize| (0..len as u64).map(|i| unit(hash(&[seed, i])) as f32 - 0.5).collect::<Vec<_>>();
    let bits = |x: Vec<f32>| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let sizes = [
        [1, 7, 33],
        [2, 64, 192],
        [5, 40, 1],
        [63, 33, 65],
        [64, 33, 65],
        [600, 70, 129],
        [1101, 5, 41],
        [200, 33, 2113],
    ];
    let precisions = [[F32; 3], [Bf16; 3], [Q8; 3], [Bf16, F32, Q8], [Q8, Bf16, Bf16]];
    for level in Level::available() {
        let ops = FastCpu::at_level(level);
        for ([rows, dim, inner], kinds) in sizes.into_iter().flat_map(|size| precisions.map(|kinds| (size, kinds))) {
            let weight =
                |n: usize, shape: [usize; 2]| ops.weight(&shape, &numbers(n as u64, shape[0] * shape[1]), kinds[n]);
            let (gate, up, down) = (weight(0, [inner, dim]), weight(1, [inner, dim]), weight(2, [dim, inner]));
            let x = ops.tensor(&[rows, dim], &numbers(4, rows * dim));
            let narrow = ops.weight(&[3, dim], &numbers(5, 3 * dim), kinds[1]);
            let weights = [&gate, &narrow, &up];
            let gain = ops.tensor(&[dim], &numbers(6, dim));
            let norm = Norm { gain: &gain, eps: 1e-5 };
            let normed = ops.rms_norm(&x, &gain, 1e-5);
            let together = ops.normed_linears(&x, norm, &weights);
            for (x, together) in [(&normed, &together), (&x, &ops.linears(&x, &weights))] {
                assert_eq!(together.len(), weights.len());
                for (w, got) in weights.iter().zip(together) {
                    assert_eq!(ops.shape(got), ops.shape(&ops.linear(x, w)));
                    let same = bits(ops.to_host(got)) == bits(ops.to_host(&ops.linear(x, w)));
                    assert!(same, "{level:?} {kinds:?}: {rows} rows of {dim} by {:?}", ops.shape(w));
                }
            }
            let inner_rows = ops.swiglu(&together[0], &together[2]);
            let want = bits(ops.to_host(&ops.add(&x, &ops.linear(&inner_rows, &down), 1.0)));
            let got = bits(ops.to_host(&ops.linear_onto(&x, &inner_rows, &down)));
            assert!(got == want, "{level:?} {kinds:?}: {rows} rows of {inner} by {dim}, onto");
            let got = bits(ops.to_host(&ops.feed_forward(&x, norm, [&gate, &up, &down])));
            assert!(got == want, "{level:?} {kinds:?}: feed-forward of {rows} rows, {dim} by {inner}");
        }
    }
}

fn bits(outcome: &Outcome) -> Vec<u32> {
    outcome.data.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn every_level_computes_the_reference_at_every_border() {
    Case::borders().iter().for_each(assert_close);
}

#[test]
fn every_level_computes_the_reference_for_any_sizes() {
    (0..30).for_each(|seed| assert_close(&Case::random(seed)));
}

/// Twice on one backend: the second time, buffers hold what the first time left there.
#[test]
fn no_result_depends_on_threads_or_on_old_buffers() {
    for case in Case::borders() {
        for level in Level::available() {
            let ops = FastCpu::at_level(level);
            let expected = every_op(&ops, &case);
            for threads in [1, 2, 3] {
                let team = Arc::new(Team::new(threads).unwrap());
                let got = team.install(|| every_op(&ops, &case));
                for (want, got) in expected.iter().zip(&got) {
                    assert!(bits(want) == bits(got), "{level:?}, {threads} threads: {} in {case:?}", want.name);
                }
            }
        }
    }
}

#[test]
fn no_row_depends_on_what_else_is_in_the_batch() {
    for case in Case::borders().into_iter().chain((0..10).map(Case::random)) {
        for level in Level::available() {
            let ops = FastCpu::at_level(level);
            let together = every_op(&ops, &case);
            for alone in case.apart() {
                for (all, one) in together.iter().zip(every_op(&ops, &alone)).filter(|(all, _)| all.per_token) {
                    let rows = &bits(all)[alone.first * all.cols..][..one.data.len()];
                    assert!(rows == bits(&one), "{level:?}: {} of {alone:?} in {case:?}", all.name);
                }
            }
        }
    }
}
