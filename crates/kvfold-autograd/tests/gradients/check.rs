//! Gradients by differences, and how far an adjoint may be from them.

use kvfold_autograd::{Tape, Var};
use kvfold_kernels::noise::{hash, unit};
use kvfold_kernels::ops::Spans;
use kvfold_kernels::{Array, Reference};

pub(crate) type Tensor = Array<f64>;
pub(crate) type Variable = Var<Tensor>;
pub(crate) type Recorder = Tape<Reference<f64>>;

/// Largest error of an op's adjoint, relative to the largest gradient of the same input.
///
/// What is left is the error of the differences: rounding for ops that are linear in each input, the next term of the
/// series for the others.
const TOLERANCES: [(&str, f64); 27] = [
    ("linear", 1e-10),
    ("embed", 1e-10),
    ("rms_norm", 1e-8),
    ("rope", 1e-10),
    ("scale_channel", 1e-10),
    ("affine", 1e-10),
    ("swiglu", 1e-9),
    ("add", 1e-10),
    ("add_row", 1e-10),
    ("scale", 1e-10),
    ("ln", 1e-8),
    ("prediction_loss", 1e-9),
    ("borrowed_gate", 1e-9),
    ("query_logit", 1e-10),
    ("head_gate", 1e-9),
    ("add_ahead", 1e-10),
    ("share_columns", 1e-10),
    ("relax", 1e-10),
    ("decide_soft", 1e-9),
    ("fold_rate", 1e-9),
    ("hinge", 1e-9),
    ("pool", 1e-8),
    ("attention", 1e-9),
    ("block", 1e-8),
    ("block, head gate", 1e-8),
    ("block, evicting", 1e-8),
    ("segment", 1e-8),
];

/// Step of the differences. Five points cancel the errors of order h^2, so h can stay large against rounding.
const STEP: f64 = 1e-3;

/// Numbers between `lo` and `hi` that depend on `seed` alone.
pub(crate) fn uniform(seed: u64, shape: &[usize], (lo, hi): (f64, f64)) -> Tensor {
    let number = |place: u64| lo + (hi - lo) * unit(hash(&[seed, place]));
    let len = shape.iter().product::<usize>() as u64;
    Reference::reference().array(shape, (0..len).map(number).collect())
}

/// Three sequences, one of them a single token.
pub(crate) fn ragged() -> Spans {
    Spans::of_lengths(&[5, 1, 7])
}

pub(crate) fn recorder() -> Recorder {
    Tape::new(Reference::reference())
}

/// Gradients of `sum(seed * output)` over some outputs by every input that `tracked` names; zeros where there is none.
pub(crate) fn gradients(
    inputs: &[Tensor],
    tracked: impl Fn(usize) -> bool,
    seeds: &[Option<Tensor>],
    f: impl Fn(&Recorder, &[Variable]) -> Vec<Variable>,
) -> Vec<Vec<f64>> {
    let tape = recorder();
    let variable = |(i, x): (usize, &Tensor)| if tracked(i) { tape.param(x.clone()) } else { Var::constant(x.clone()) };
    let variables: Vec<_> = inputs.iter().enumerate().map(variable).collect();
    let outs = f(&tape, &variables);
    let seeds: Vec<_> = outs.iter().zip(seeds).filter_map(|(out, seed)| Some((out, seed.clone()?))).collect();
    let grads = tape.backward_seeded(&seeds);
    let of = |(variable, x): (&Variable, &Tensor)| match grads.get(variable) {
        Some(grad) => {
            assert_eq!(grad.shape(), x.shape());
            grad.data().to_vec()
        }
        None => vec![0.0; x.data().len()],
    };
    variables.iter().zip(inputs).map(of).collect()
}

/// Random output gradients, one per output.
pub(crate) fn output_seeds(outs: &[Tensor]) -> Vec<Tensor> {
    outs.iter().enumerate().map(|(n, out)| uniform(900 + n as u64, out.shape(), (-1.0, 1.0))).collect()
}

/// Checks the gradient of every output of `f` by every input against differences.
pub(crate) fn check(op: &str, inputs: &[Tensor], f: impl Fn(&Recorder, &[Variable]) -> Vec<Variable>) {
    let value = |inputs: &[Tensor]| {
        let constants: Vec<_> = inputs.iter().cloned().map(Var::constant).collect();
        f(&recorder(), &constants).into_iter().map(|out| out.value).collect()
    };
    check_against(op, inputs, &f, value);
}

/// [`check`], taking the differences of `value` instead of `f`.
pub(crate) fn check_against(
    op: &str,
    inputs: &[Tensor],
    f: impl Fn(&Recorder, &[Variable]) -> Vec<Variable>,
    value: impl Fn(&[Tensor]) -> Vec<Tensor>,
) {
    let tolerance = TOLERANCES.iter().find(|(name, _)| *name == op).expect("every checked op has a tolerance").1;
    let seeds = output_seeds(&value(inputs));
    let expected = differences(inputs, &seeds, &value);

    let all: Vec<_> = seeds.iter().cloned().map(Some).collect();
    let together = gradients(inputs, |_| true, &all, &f);
    for (i, together) in together.iter().enumerate() {
        let alone = gradients(inputs, |input| input == i, &all, &f);
        assert_eq!(&alone[i], together, "{op}: the gradient of input {i} depends on what else is differentiated");
        let sums = (0..together.len()).map(|e| expected.iter().map(|by_output| by_output[i][e]).sum());
        compare(&format!("{op}: all outputs by input {i}"), tolerance, together, &sums.collect::<Vec<_>>());
    }
    for (n, expected) in expected.iter().enumerate() {
        let only: Vec<_> = seeds.iter().enumerate().map(|(m, seed)| (m == n).then(|| seed.clone())).collect();
        let got = gradients(inputs, |_| true, &only, &f);
        for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
            compare(&format!("{op}: output {n} by input {i}"), tolerance, got, expected);
        }
    }
}

fn compare(what: &str, tolerance: f64, got: &[f64], expected: &[f64]) {
    let largest = expected.iter().fold(1e-3f64, |m, x| m.max(x.abs()));
    for (e, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (got - expected).abs() / largest;
        assert!(error <= tolerance, "{what}, element {e}: {got}, by differences {expected} (error {error:.1e})");
    }
}

/// Per output and input: the derivatives of `sum(seed * output)`.
fn differences(inputs: &[Tensor], seeds: &[Tensor], value: impl Fn(&[Tensor]) -> Vec<Tensor>) -> Vec<Vec<Vec<f64>>> {
    let at = |i: usize, e: usize, step: f64| -> Vec<f64> {
        let mut moved = inputs.to_vec();
        let mut data = inputs[i].data().to_vec();
        data[e] += step;
        moved[i] = Reference::reference().array(inputs[i].shape(), data);
        let dot = |(out, seed): (&Tensor, &Tensor)| out.data().iter().zip(seed.data()).map(|(x, s)| x * s).sum();
        value(&moved).iter().zip(seeds).map(dot).collect()
    };
    let derivative = |i: usize, e: usize| -> Vec<f64> {
        let [near, minus_near] = [STEP, -STEP].map(|step| at(i, e, step));
        let [far, minus_far] = [2.0 * STEP, -2.0 * STEP].map(|step| at(i, e, step));
        let difference = |n: usize| 8.0 * (near[n] - minus_near[n]) - (far[n] - minus_far[n]);
        (0..seeds.len()).map(|n| difference(n) / (12.0 * STEP)).collect()
    };
    let mut derivatives = vec![vec![Vec::new(); inputs.len()]; seeds.len()];
    for (i, input) in inputs.iter().enumerate() {
        for e in 0..input.data().len() {
            derivatives.iter_mut().zip(derivative(i, e)).for_each(|(of, derivative)| of[i].push(derivative));
        }
    }
    derivatives
}
