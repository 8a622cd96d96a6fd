//! Pooling and attention, and all of a compressing block together.

use crate::check::{Recorder, Tensor, Variable, check, gradients, ragged, uniform};
use kvfold_autograd::Var;
use kvfold_kernels::Reference;
use kvfold_kernels::ops::{
    Borrowed, Channel, Heads, Keys, Ops, PoolInput, PoolShape, Pooled, Precision, Spans, Visible,
};

const UNIT: (f64, f64) = (-1.0, 1.0);

/// Shares kept, 0 at sequence starts.
fn alphas(seed: u64, spans: &Spans, kv: usize, range: (f64, f64)) -> Tensor {
    let mut alpha = uniform(seed, &[spans.rows(), kv], range).data().to_vec();
    spans.iter().for_each(|span| alpha[span.start * kv..][..kv].fill(0.0));
    Reference::reference().array(&[spans.rows(), kv], alpha)
}

fn pool_inputs(spans: &Spans, heads: Heads, alpha: (f64, f64)) -> [Tensor; 4] {
    let (rows, width) = (spans.rows(), heads.kv * heads.dim);
    [
        uniform(1, &[rows, width], UNIT),
        uniform(2, &[rows, width], UNIT),
        alphas(3, spans, heads.kv, alpha),
        uniform(4, &[rows, heads.kv], (0.3, 1.5)),
    ]
}

fn pool(t: &Recorder, x: &[Variable], spans: &Spans, shape: PoolShape) -> Vec<Variable> {
    let [k, v, alpha, omega] = x else { panic!("four inputs") };
    let input = PoolInput { k: k.clone(), v: v.clone(), alpha: alpha.clone(), omega: omega.clone() };
    let out = t.pool(&input, spans, shape);
    vec![out.k, out.v, out.mass]
}

#[test]
fn pool_with_and_without_a_window() {
    let heads = Heads { query: 2, kv: 2, dim: 3 };
    for window in [None, Some(1), Some(3), Some(12)] {
        for alpha in [(0.05, 0.95), (0.9, 1.0)] {
            for spans in [ragged(), Spans::of_lengths(&[17])] {
                let inputs = pool_inputs(&spans, heads, alpha);
                check("pool", &inputs, |t, x| pool(t, x, &spans, PoolShape { heads, window }));
            }
        }
    }
}

/// What a query sees, from the inputs in order: exact k, v, mass, pooled k, v, mass, close.
#[derive(Clone, Copy, Debug)]
struct View {
    exact: bool,
    pooled: bool,
    mass: bool,
    delay: usize,
}

impl View {
    fn visible(self, x: &[Variable]) -> Visible<Variable> {
        let mut rest = x.iter().cloned();
        let mut next = || rest.next().expect("as many inputs as the view has");
        let mut keys = || Keys { k: next(), v: next(), mass: self.mass.then(&mut next) };
        let exact = self.exact.then(&mut keys);
        let pooled = self.pooled.then(keys);
        let pooled = pooled.map(|keys| Pooled { keys, close: x.last().expect("pooled views end with close").clone() });
        Visible { exact, pooled, delay: self.delay, precision: Precision::F32 }
    }

    fn inputs(self, spans: &Spans, heads: Heads) -> Vec<Tensor> {
        let (rows, width) = (spans.rows(), heads.kv * heads.dim);
        let mut seed = 10;
        let mut draw = |cols: usize, range| {
            seed += 1;
            uniform(seed, &[rows, cols], range)
        };
        let mut inputs = vec![draw(heads.query * heads.dim, (-2.0, 2.0))];
        for _ in 0..usize::from(self.exact) + usize::from(self.pooled) {
            inputs.extend([draw(width, (-2.0, 2.0)), draw(width, UNIT)]);
            inputs.extend(self.mass.then(|| draw(heads.kv, (-0.5, 2.0))));
        }
        inputs.extend(self.pooled.then(|| draw(heads.kv, (-3.0, -0.1))));
        inputs
    }
}

#[test]
fn attention_over_everything_that_can_be_visible() {
    let spans = ragged();
    for group in [1, 2, 4] {
        for (mass, dim) in [(false, 3), (true, 2)] {
            let heads = Heads { query: 2 * group, kv: 2, dim };
            let view = |exact, pooled, delay| View { exact, pooled, mass, delay };
            let delayed = [1, 3, 5, 20].map(|delay| view(true, true, delay));
            for view in [view(true, false, 0), view(false, true, 0), view(true, true, 0)].into_iter().chain(delayed) {
                check("attention", &view.inputs(&spans, heads), |t, x| {
                    vec![t.attention(&x[0], &view.visible(&x[1..]), &spans, heads)]
                });
            }
        }
    }
}

/// The last tokens' biases act on nobody: their states have no later query.
#[test]
fn the_newest_state_of_every_query_is_spared_from_its_close_bias() {
    let (spans, heads) = (Spans::of_lengths(&[4, 1, 3]), Heads { query: 1, kv: 1, dim: 2 });
    let view = View { exact: true, pooled: true, mass: false, delay: 1 };
    let inputs = view.inputs(&spans, heads);
    let seed = uniform(7, &[8, 2], UNIT);
    let grads = gradients(
        &inputs,
        |_| true,
        &[Some(seed)],
        |t, x| vec![t.attention(&x[0], &view.visible(&x[1..]), &spans, heads)],
    );
    let acts: Vec<bool> = grads.last().unwrap().iter().map(|&d| d != 0.0).collect();
    assert_eq!(acts, [true, true, false, false, false, true, false, false]);
}

/// A compressing attention block, from projections to output, as the model walks it.
pub(crate) fn block(t: &Recorder, x: &[Variable], spans: &Spans, shape: (PoolShape, usize)) -> Vec<Variable> {
    let [q, k, v] = x else { panic!("three inputs") };
    let (PoolShape { heads, window }, delay) = shape;
    let gate = t.borrowed_gate(q, k, heads, Borrowed { scale: 1.3, offset: 0.4 });
    let last = Channel::last(heads.dim);
    let (q, k) = (t.scale_channel(q, last, 0.0), t.scale_channel(k, last, 0.0));
    attend(t, (&q, &k, v), (&gate.logit, &gate.omega), spans, (PoolShape { heads, window }, delay))
}

fn attend(
    t: &Recorder,
    (q, k, v): (&Variable, &Variable, &Variable),
    (logit, omega): (&Variable, &Variable),
    spans: &Spans,
    (shape, delay): (PoolShape, usize),
) -> Vec<Variable> {
    let heads = shape.heads;
    let noise = Var::constant(uniform(77, &[spans.rows(), heads.kv], (-1.0, 1.0)));
    let decided = t.decide_soft(&t.relax(&t.share_columns(logit), &noise, 0.7), spans, 1);
    let input = PoolInput { k: k.clone(), v: v.clone(), alpha: decided.alpha, omega: omega.clone() };
    let pooled = t.pool(&input, spans, shape);
    let table = t.rope_table(&[1.0, 0.1], 16);
    let rotate = |x: &Variable| t.rope(x, &table, spans);
    let exact = Keys { k: rotate(k), v: v.clone(), mass: Some(t.ln(omega)) };
    let states = Keys { k: rotate(&pooled.k), v: pooled.v, mass: Some(t.ln(&pooled.mass)) };
    let visible = Visible {
        exact: (delay > 0).then_some(exact),
        pooled: Some(Pooled { keys: states, close: decided.close }),
        delay,
        precision: Precision::F32,
    };
    vec![t.attention(&rotate(q), &visible, spans, heads)]
}

pub(crate) fn block_inputs(spans: &Spans, heads: Heads) -> Vec<Tensor> {
    let width = |heads_of: usize| [spans.rows(), heads_of * heads.dim];
    vec![
        uniform(1, &width(heads.query), (-1.5, 1.5)),
        uniform(2, &width(heads.kv), (-1.5, 1.5)),
        uniform(3, &width(heads.kv), UNIT),
    ]
}

#[test]
fn a_compressing_block_end_to_end() {
    let spans = ragged();
    for (group, window, delay) in [(1, None, 2), (2, Some(3), 0), (4, Some(12), 3)] {
        let heads = Heads { query: 2 * group, kv: 2, dim: 4 };
        let shape = (PoolShape { heads, window }, delay);
        check("block", &block_inputs(&spans, heads), |t, x| block(t, x, &spans, shape));
    }
}

/// As in DMS: one set of keys is seen as exact ones and, beyond the window, as what may have been evicted.
#[test]
fn an_evicting_block_end_to_end() {
    let spans = ragged();
    for (group, delay) in [(1, 2), (2, 0), (4, 3), (2, 20)] {
        let heads = Heads { query: 2 * group, kv: 2, dim: 4 };
        check("block, evicting", &block_inputs(&spans, heads), |t, x| {
            let logit = t.query_logit(&x[0], heads, Borrowed { scale: 1.3, offset: 0.4 });
            let q = t.scale_channel(&x[0], Channel::last_of_first_query(heads), 0.0);
            let noise = Var::constant(uniform(77, &[spans.rows(), heads.kv], (-1.0, 1.0)));
            let close = t.decide_soft(&t.relax(&logit, &noise, 0.7), &spans, 1).close;
            let table = t.rope_table(&[1.0, 0.1], 16);
            let keys = Keys { k: t.rope(&x[1], &table, &spans), v: x[2].clone(), mass: None };
            let visible = Visible {
                exact: (delay > 0).then(|| keys.clone()),
                pooled: Some(Pooled { keys, close }),
                delay,
                precision: Precision::F32,
            };
            vec![t.attention(&t.rope(&q, &table, &spans), &visible, &spans, heads)]
        });
    }
}

#[test]
fn a_compressing_block_with_a_gate_of_its_own() {
    let spans = ragged();
    let heads = Heads { query: 4, kv: 2, dim: 4 };
    let mut inputs = block_inputs(&spans, heads);
    inputs.push(uniform(4, &[spans.rows(), 2 * heads.kv], UNIT));
    check("block, head gate", &inputs, |t, x| {
        let gate = t.head_gate(&x[3], 1.5, 0.2);
        let shape = (PoolShape { heads, window: None }, 2);
        attend(t, (&x[0], &x[1], &x[2]), (&gate.logit, &gate.omega), &spans, shape)
    });
}
