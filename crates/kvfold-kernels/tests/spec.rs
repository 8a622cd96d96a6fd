//! What the specification of DMC says, against the reference backend: pooling in its other forms (T1, T2, T7), the
//! worked example (T8), the limit of cold decisions (T11), and the parallel form against a cache that streams (T4).

use kvfold_kernels::noise::{hash, unit};
use kvfold_kernels::ops::{
    Decided, Exempt, Heads, Keys, PoolInput, PoolOutput, PoolShape, Pooled, Precision, Span, Spans, Visible,
};
use kvfold_kernels::{Array, Ops, Reference};

/// Rounding in f64, and no more.
const EXACT: f64 = 1e-12;

fn ops() -> Reference<f64> {
    Reference::reference()
}

fn uniform(seed: u64, shape: &[usize], (lo, hi): (f64, f64)) -> Array<f64> {
    let len = shape.iter().product::<usize>() as u64;
    ops().array(shape, (0..len).map(|place| lo + (hi - lo) * unit(hash(&[seed, place]))).collect())
}

fn assert_close(what: &str, got: &[f64], expected: &[f64]) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() <= EXACT, "{what}, element {i}: {got}, expected {expected}");
    }
}

/// Two heads of one sequence; keys and values have one channel.
const HEADS: Heads = Heads { query: 2, kv: 2, dim: 1 };

fn pool_input(len: usize, alpha: (f64, f64)) -> PoolInput<Array<f64>> {
    let shape = [len, HEADS.kv];
    let mut alpha = uniform(3, &shape, alpha).data().to_vec();
    alpha[..HEADS.kv].fill(0.0);
    PoolInput {
        k: uniform(1, &shape, (-1.0, 1.0)),
        v: uniform(2, &shape, (-1.0, 1.0)),
        alpha: ops().array(&shape, alpha),
        omega: uniform(4, &shape, (0.1, 1.0)),
    }
}

fn pool(input: &PoolInput<Array<f64>>, window: Option<usize>) -> PoolOutput<Array<f64>> {
    let spans = Spans::of_lengths(&[input.k.shape()[0]]);
    ops().pool(input, &spans, PoolShape { heads: HEADS, window })
}

/// Product of the alphas of tokens `range` of head g.
fn product(input: &PoolInput<Array<f64>>, g: usize, range: std::ops::Range<usize>) -> f64 {
    range.map(|t| input.alpha.data()[t * HEADS.kv + g]).product()
}

/// T1: `sum_j C_ij omega x / sum_j C_ij omega`, C_ij the product of the alphas after token i-j.
#[test]
fn pooling_is_its_coefficient_form() {
    for alpha in [(0.0, 1.0), (0.95, 1.0)] {
        let input = pool_input(40, alpha);
        for window in [None, Some(1), Some(12), Some(40), Some(100)] {
            let out = pool(&input, window);
            let (mut k, mut v, mut mass) = (vec![], vec![], vec![]);
            for (i, g) in (0..40usize).flat_map(|i| [(i, 0), (i, 1)]) {
                let first = (i + 1).saturating_sub(window.unwrap_or(40));
                let at = |t: usize| t * HEADS.kv + g;
                let weight = |t: usize| product(&input, g, t + 1..i + 1) * input.omega.data()[at(t)];
                let sum = |x: &Array<f64>| (first..=i).map(|t| weight(t) * x.data()[at(t)]).sum::<f64>();
                let z: f64 = (first..=i).map(weight).sum();
                k.push(sum(&input.k) / z);
                v.push(sum(&input.v) / z);
                mass.push(z);
            }
            assert_close("keys", out.k.data(), &k);
            assert_close("values", out.v.data(), &v);
            assert_close("masses", out.mass.data(), &mass);
        }
    }
}

/// T2: `X^W_i = X_i - P_i X_{i-W}`, P_i the product of the last W alphas.
#[test]
fn a_window_is_a_difference_of_unwindowed_sums() {
    let (input, window) = (pool_input(50, (0.6, 1.0)), 12);
    let (whole, windowed) = (pool(&input, None), pool(&input, Some(window)));
    let sum = |out: &PoolOutput<Array<f64>>, at: usize| out.k.data()[at] * out.mass.data()[at];
    for (i, g) in (window..50).flat_map(|i| [(i, 0), (i, 1)]) {
        let (at, before) = (i * HEADS.kv + g, (i - window) * HEADS.kv + g);
        let p = product(&input, g, i + 1 - window..i + 1);
        assert_close("sum", &[sum(&windowed, at)], &[sum(&whole, at) - p * sum(&whole, before)]);
        let mass = whole.mass.data()[at] - p * whole.mass.data()[before];
        assert_close("mass", &[windowed.mass.data()[at]], &[mass]);
    }
}

/// T7: one slot, the weighted mean of all tokens, or of the newest of them.
#[test]
fn always_folding_is_the_weighted_mean() {
    let input = pool_input(30, (1.0, 1.0));
    for window in [None, Some(12)] {
        let out = pool(&input, window);
        for (i, g) in (0..30usize).flat_map(|i| [(i, 0), (i, 1)]) {
            let tokens = (i + 1).saturating_sub(window.unwrap_or(30))..=i;
            let weight = |t: usize| input.omega.data()[t * HEADS.kv + g];
            let z: f64 = tokens.clone().map(weight).sum();
            let mean = tokens.map(|t| weight(t) * input.v.data()[t * HEADS.kv + g]).sum::<f64>() / z;
            assert_close("mean", &[out.v.data()[i * HEADS.kv + g]], &[mean]);
            assert_close("mass", &[out.mass.data()[i * HEADS.kv + g]], &[z]);
        }
    }
}

#[test]
fn never_folding_leaves_every_token_as_it_is() {
    let input = pool_input(30, (0.0, 0.0));
    let out = pool(&input, None);
    assert_close("keys", out.k.data(), input.k.data());
    assert_close("values", out.v.data(), input.v.data());
    assert_eq!(out.mass.data(), input.omega.data());
}

/// The keys that each query sees: pooled states from 0, exact keys from T on. Found by attending to one-hot values with
/// equal scores.
fn visible_keys(close: &Array<f64>, delay: usize) -> Vec<Vec<usize>> {
    let len = close.shape()[0];
    let (heads, shape) = (Heads { query: 1, kv: 1, dim: 2 * len }, [len, 2 * len]);
    let zeros = ops().array(&shape, vec![0.0; 2 * len * len]);
    let one_hot = |from: usize| {
        let mut v = vec![0.0; 2 * len * len];
        (0..len).for_each(|j| v[j * 2 * len + from + j] = 1.0);
        Keys { k: zeros.clone(), v: ops().array(&shape, v), mass: None }
    };
    let pooled = Some(Pooled { keys: one_hot(0), close: close.clone() });
    let visible = Visible { exact: Some(one_hot(len)), pooled, delay, precision: Precision::F32 };
    let out = ops().attention(&zeros, &visible, &Spans::of_lengths(&[len]), heads);
    let seen = |row: &[f64]| {
        let seen: Vec<usize> = (0..2 * len).filter(|&j| row[j] > 0.0).collect();
        let shares: Vec<f64> = seen.iter().map(|&j| row[j]).collect();
        assert_close("shares", &shares, &vec![1.0 / seen.len() as f64; seen.len()]);
        seen
    };
    out.data().chunks_exact(2 * len).map(seen).collect()
}

/// T8: the worked example of section 1.11, and what a delay makes of it.
#[test]
fn the_worked_example_shows_these_keys() {
    let logits = ops().array(&[5, 1], vec![-1.0, 1.0, -1.0, 1.0, -1.0]);
    let close = ops().decide_hard(&logits, &Spans::of_lengths(&[5]), 0).close;
    assert_eq!(visible_keys(&close, 0), [&[0][..], &[1], &[1, 2], &[1, 3], &[1, 3, 4]]);
    assert_eq!(visible_keys(&close, 1), [&[5][..], &[0, 6], &[1, 7], &[1, 2, 8], &[1, 3, 9]]);
    assert_eq!(visible_keys(&close, 3), [&[5][..], &[5, 6], &[5, 6, 7], &[0, 6, 7, 8], &[1, 7, 8, 9]]);
}

#[test]
fn the_first_token_of_every_sequence_appends() {
    let spans = Spans::of_lengths(&[3, 1, 2]);
    let logits = ops().array(&[6, 2], vec![9.0; 12]);
    let by_row = |x: &Array<f64>| x.data().chunks_exact(2).map(<[f64]>::to_vec).collect::<Vec<_>>();
    let both = |x: [f64; 6]| x.map(|x| vec![x; 2]);
    let hard = ops().decide_hard(&logits, &spans, 0);
    let closed = f64::NEG_INFINITY;
    assert_eq!(by_row(&hard.alpha), both([0.0, 1.0, 1.0, 0.0, 0.0, 1.0]));
    assert_eq!(by_row(&hard.close), both([closed, closed, 0.0, 0.0, closed, 0.0]));
    let soft = ops().decide_soft(&logits, &spans, 0);
    for (first, last) in [(0, 2), (3, 3), (4, 5)] {
        assert_eq!(by_row(&soft.alpha)[first], [0.0; 2]);
        assert_eq!(by_row(&soft.close)[last], [0.0; 2]);
    }
}

/// The tokens after a sink append as the first token does, so that nothing is folded into its slot.
#[test]
fn nothing_is_folded_into_a_sink() {
    let spans = Spans::of_lengths(&[4, 2]);
    let logits = ops().array(&[6, 1], vec![9.0; 6]);
    let hard = ops().decide_hard(&logits, &spans, 1);
    let closed = f64::NEG_INFINITY;
    assert_eq!(hard.alpha.data(), [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]);
    assert_eq!(hard.close.data(), [0.0, closed, closed, 0.0, 0.0, 0.0]);
    let soft = ops().decide_soft(&logits, &spans, 1);
    let free = |x: &Array<f64>| x.data().iter().map(|&x| x != 0.0).collect::<Vec<_>>();
    assert_eq!(free(&soft.alpha), [false, false, true, true, false, false]);
    assert_eq!(free(&soft.close), [false, true, true, false, false, false]);
    let rates = ops().fold_rate(&logits, &spans, Exempt { sinks: 1, delay: 1 });
    assert_eq!(rates.data(), [0.25, 0.0]);
    let all = ops().decide_hard(&logits, &spans, 9);
    assert!(all.alpha.data().iter().chain(all.close.data()).all(|&x| x == 0.0));
}

#[test]
fn ties_append() {
    let logits = ops().array(&[3, 1], vec![0.0, 0.0, 1e-300]);
    assert_eq!(ops().decide_hard(&logits, &Spans::of_lengths(&[3]), 0).alpha.data(), [0.0, 0.0, 1.0]);
}

/// T11: alpha and the survival of every key go to the hard decision, nearer with every colder temperature.
#[test]
fn soft_decisions_freeze_into_hard_ones() {
    let spans = Spans::of_lengths(&[40, 1, 23]);
    let logit = uniform(5, &[64, 2], (-4.0, 4.0));
    let noise = ops().array(&[64, 2], vec![0.0; 128]);
    let numbers = |decided: &Decided<Array<f64>>| -> Vec<f64> {
        decided.alpha.data().iter().copied().chain(decided.close.data().iter().map(|c| c.exp())).collect()
    };
    let hard = numbers(&ops().decide_hard(&logit, &spans, 0));
    let mut errors = vec![f64::INFINITY; hard.len()];
    for temperature in [4.0, 2.0, 1.0, 0.5, 0.1, 0.03, 0.001, 1e-5] {
        let soft = numbers(&ops().decide_soft(&ops().relax(&logit, &noise, temperature), &spans, 0));
        for (i, error) in errors.iter_mut().enumerate() {
            let new = (soft[i] - hard[i]).abs();
            assert!(new < *error || new == 0.0, "element {i} at {temperature}: {new} after {error}");
            *error = new;
        }
    }
    assert!(errors.iter().all(|&error| error < EXACT));
}

#[test]
fn slots_are_tokens_less_folds_carried_out() {
    // Folds at tokens 1, 2, 4, 5, 6 and 8; token 0 appends whatever it says.
    let logits = [1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0, -1.0, 1.0, 0.0];
    let relaxed = ops().array(&[10, 1], logits.to_vec());
    let spans = Spans::of_lengths(&[10]);
    let slots = |delay: usize| 10.0 * (1.0 - ops().fold_rate(&relaxed, &spans, Exempt { sinks: 0, delay }).data()[0]);
    for (delay, expected) in [(0, 4.0), (1, 4.0), (2, 5.0), (3, 5.0), (4, 6.0), (8, 9.0), (9, 10.0), (30, 10.0)] {
        assert_close("slots", &[slots(delay)], &[expected]);
    }
}

/// A head's cache as a server keeps it: slots, and the newest tokens exact in a ring until their decision is due.
struct Streaming {
    /// Tokens of every slot, oldest first.
    slots: Vec<Vec<usize>>,
    delay: usize,
    window: Option<usize>,
}

/// One KV head of one sequence, a row per token.
struct Stream {
    k: Vec<Vec<f64>>,
    v: Vec<Vec<f64>>,
    logit: Vec<f64>,
    omega: Vec<f64>,
}

impl Streaming {
    /// Takes token i in and attends with its query; a key counts as often as its mass says.
    fn step(&mut self, i: usize, q: &[f64], stream: &Stream) -> Vec<f64> {
        if let Some(due) = i.checked_sub(self.delay) {
            match self.slots.last_mut() {
                Some(slot) if stream.logit[due] > 0.0 => slot.push(due),
                _ => self.slots.push(vec![due]),
            }
        }
        let newest = |slot: &Vec<usize>| slot[slot.len().saturating_sub(self.window.unwrap_or(usize::MAX))..].to_vec();
        let ring = (i + 1).saturating_sub(self.delay)..=i;
        let states = self.slots.iter().map(newest).chain(ring.map(|t| vec![t]));
        let (mut out, mut total) = (vec![0.0; q.len()], 0.0);
        for tokens in states {
            let mass: f64 = tokens.iter().map(|&t| stream.omega[t]).sum();
            let mean = |x: &[Vec<f64>], d: usize| tokens.iter().map(|&t| stream.omega[t] * x[t][d]).sum::<f64>() / mass;
            let score: f64 = (0..q.len()).map(|d| q[d] * mean(&stream.k, d)).sum();
            let weight = mass * (score / (q.len() as f64).sqrt()).exp();
            (0..q.len()).for_each(|d| out[d] += weight * mean(&stream.v, d));
            total += weight;
        }
        out.iter().map(|x| x / total).collect()
    }
}

/// Rows of a span, the columns of one head.
fn head(x: &Array<f64>, span: &Span, at: usize, width: usize) -> Vec<Vec<f64>> {
    let cols = x.shape()[1];
    (span.start..span.start + span.len).map(|t| x.data()[t * cols + at * width..][..width].to_vec()).collect()
}

/// T4 at the level of ops: the parallel form is the cache that streams, and holds as many slots.
#[test]
fn the_parallel_form_is_a_streaming_cache() {
    let spans = Spans::of_lengths(&[37, 1, 64]);
    let rows = spans.rows();
    let settings = [(0, None), (0, Some(12)), (1, None), (7, Some(3)), (40, None)];
    for (group, dim, (delay, window)) in settings.into_iter().flat_map(|s| [(1, 4, s), (4, 3, s)]) {
        let heads = Heads { query: 2 * group, kv: 2, dim };
        let [k, v] = [11, 12].map(|seed| uniform(seed, &[rows, 2 * dim], (-1.0, 1.0)));
        let q = uniform(13, &[rows, heads.query * dim], (-2.0, 2.0));
        let (logit, omega) = (uniform(14, &[rows, 2], (-0.2, 1.0)), uniform(15, &[rows, 2], (0.2, 1.0)));

        let decided = ops().decide_hard(&logit, &spans, 0);
        let input = PoolInput { k: k.clone(), v: v.clone(), alpha: decided.alpha, omega: omega.clone() };
        let pooled = ops().pool(&input, &spans, PoolShape { heads, window });
        let states = Keys { k: pooled.k, v: pooled.v, mass: Some(ops().ln(&pooled.mass)) };
        let exact = Keys { k: k.clone(), v: v.clone(), mass: Some(ops().ln(&omega)) };
        let pooled = Some(Pooled { keys: states, close: decided.close });
        let visible = Visible { exact: (delay > 0).then_some(exact), pooled, delay, precision: Precision::F32 };
        let out = ops().attention(&q, &visible, &spans, heads);
        let rates = ops().fold_rate(&logit, &spans, Exempt { sinks: 0, delay });

        for (s, span) in spans.iter().enumerate() {
            for g in 0..2 {
                let (logit, omega) = (head(&logit, span, g, 1).concat(), head(&omega, span, g, 1).concat());
                let stream = Stream { k: head(&k, span, g, dim), v: head(&v, span, g, dim), logit, omega };
                for h in g * group..(g + 1) * group {
                    let (q, out) = (head(&q, span, h, dim), head(&out, span, h, dim));
                    let mut cache = Streaming { slots: vec![], delay, window };
                    for i in 0..span.len {
                        assert_close("output", &out[i], &cache.step(i, &q[i], &stream));
                    }
                    let slots = span.len as f64 * (1.0 - rates.data()[s * 2 + g]);
                    assert_close("slots", &[slots], &[(cache.slots.len() + delay.min(span.len)) as f64]);
                }
            }
        }
    }
}
