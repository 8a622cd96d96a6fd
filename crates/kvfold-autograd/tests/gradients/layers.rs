//! The ops of an ordinary transformer.

use crate::check::{Recorder, Tensor, Variable, check, gradients, ragged, uniform};
use kvfold_autograd::Var;
use kvfold_kernels::Reference;
use kvfold_kernels::ops::{Channel, Goal, KlDirection, NO_TARGET, Ops, Predictions, Spans};

const UNIT: (f64, f64) = (-1.0, 1.0);

#[test]
fn linear() {
    for (n, k, m) in [(3, 5, 7), (1, 4, 33), (2, 1, 1)] {
        let inputs = [uniform(1, &[n, k], UNIT), uniform(2, &[m, k], UNIT)];
        check("linear", &inputs, |t, x| vec![t.linear(&x[0], &x[1])]);
    }
}

#[test]
fn embed_sums_over_repeated_ids() {
    check("embed", &[uniform(1, &[5, 3], UNIT)], |t, x| vec![t.embed(&[4, 0, 4, 4, 1], &x[0])]);
}

#[test]
fn rms_norm() {
    for (rows, cols) in [(3, 5), (1, 1), (2, 37)] {
        let inputs = [uniform(1, &[rows, cols], UNIT), uniform(2, &[cols], UNIT)];
        check("rms_norm", &inputs, |t, x| vec![t.rms_norm(&x[0], &x[1], 0.1)]);
    }
}

#[test]
fn rms_norm_sums_the_weight_gradient_over_more_rows_than_a_task_has() {
    let inputs = [uniform(1, &[259, 1], (0.3, 1.0)), uniform(2, &[1], UNIT)];
    check("rms_norm", &inputs, |t, x| vec![t.rms_norm(&x[0], &x[1], 0.1)]);
}

#[test]
fn rms_norm_of_each_head_sums_the_weight_gradient_over_heads() {
    for (rows, heads, dim) in [(3, 4, 6), (1, 2, 1), (130, 2, 2)] {
        let inputs = [uniform(1, &[rows, heads * dim], (0.3, 1.0)), uniform(2, &[dim], UNIT)];
        check("rms_norm", &inputs, |t, x| vec![t.rms_norm(&x[0], &x[1], 0.1)]);
    }
}

#[test]
fn add_row_sums_the_gradient_of_the_row_over_rows() {
    for (rows, cols) in [(5, 7), (1, 3), (4, 1)] {
        let inputs = [uniform(1, &[rows, cols], UNIT), uniform(2, &[cols], UNIT)];
        check("add_row", &inputs, |t, x| vec![t.add_row(&x[0], &x[1])]);
    }
}

#[test]
fn scale() {
    check("scale", &[uniform(1, &[3, 5], UNIT)], |t, x| vec![t.scale(&x[0], -1.7)]);
}

#[test]
fn rope_at_positions_that_each_sequence_counts_for_itself() {
    for spans in [ragged(), Spans::of_chunks([(5, 0), (1, 3), (2, 6)])] {
        check("rope", &[uniform(1, &[spans.rows(), 3 * 6], UNIT)], |t, x| {
            let table = t.rope_table(&[1.0, 0.3, 0.01], 8);
            vec![t.rope(&x[0], &table, &spans)]
        });
    }
}

#[test]
fn scale_channel() {
    for factor in [0.0, 0.7] {
        for channel in [Channel::last(5), Channel { every: 10, at: 4 }] {
            check("scale_channel", &[uniform(1, &[3, 20], UNIT)], |t, x| vec![t.scale_channel(&x[0], channel, factor)]);
        }
    }
}

#[test]
fn affine() {
    check("affine", &[uniform(1, &[3, 4], UNIT)], |t, x| vec![t.affine(&x[0], 2.5, 0.6)]);
}

#[test]
fn swiglu() {
    let inputs = [uniform(1, &[3, 7], (-6.0, 6.0)), uniform(2, &[3, 7], UNIT)];
    check("swiglu", &inputs, |t, x| vec![t.swiglu(&x[0], &x[1])]);
}

#[test]
fn add_with_a_factor_and_to_itself() {
    let inputs = [uniform(1, &[3, 5], UNIT), uniform(2, &[3, 5], UNIT)];
    for factor in [1.0, -0.3] {
        check("add", &inputs, |t, x| vec![t.add(&x[0], &x[1], factor)]);
        check("add", &inputs[..1], |t, x| vec![t.add(&x[0], &x[0], factor)]);
    }
}

#[test]
fn ln() {
    check("ln", &[uniform(1, &[3, 5], (0.5, 3.0))], |t, x| vec![t.ln(&x[0])]);
}

/// Normed residual stream and output projection, small enough for logits of a few units.
fn predictions(seed: u64) -> [Tensor; 2] {
    [uniform(seed, &[5, 4], UNIT), uniform(seed + 1, &[7, 4], UNIT)]
}

fn loss(tape: &Recorder, x: &[Variable], goal: Goal<'_, Variable>) -> Vec<Variable> {
    vec![tape.prediction_loss(Predictions { x: &x[0], w: &x[1] }, goal)]
}

#[test]
fn cross_entropy_passes_over_rows_without_a_target() {
    let goal = Goal::Tokens(&[2, NO_TARGET, 6, 0, NO_TARGET]);
    check("prediction_loss", &predictions(1), |t, x| loss(t, x, goal));
    let seed = Some(Reference::reference().array(&[1], vec![1.0]));
    let none = gradients(&predictions(1), |_| true, &[seed], |t, x| loss(t, x, Goal::Tokens(&[NO_TARGET; 5])));
    assert!(none.iter().flatten().all(|&d| d == 0.0));
}

#[test]
fn kl_in_both_directions() {
    let [x, w] = predictions(3).map(Var::constant);
    for direction in [KlDirection::Forward, KlDirection::Reverse] {
        let goal = Goal::Teacher(Predictions { x: &x, w: &w }, direction);
        check("prediction_loss", &predictions(1), |t, x| loss(t, x, goal));
    }
}

#[test]
fn kl_of_equal_predictions_has_no_gradient() {
    let [x, w] = predictions(1).map(Var::constant);
    let seed = Some(Reference::reference().array(&[1], vec![1.0]));
    for direction in [KlDirection::Forward, KlDirection::Reverse] {
        let goal = Goal::Teacher(Predictions { x: &x, w: &w }, direction);
        let grads = gradients(&predictions(1), |_| true, std::slice::from_ref(&seed), |t, x| loss(t, x, goal));
        assert!(grads.iter().flatten().all(|d| d.abs() < 1e-15), "{direction:?}: {grads:?}");
    }
}
