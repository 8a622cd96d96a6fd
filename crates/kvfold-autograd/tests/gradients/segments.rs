//! Checkpoint segments: the same gradients, for less memory.

use crate::check::{Recorder, Tensor, Variable, check, gradients, output_seeds, ragged, recorder, uniform};
use crate::memory::{block, block_inputs};
use kvfold_autograd::Var;
use kvfold_kernels::ops::{Channel, Heads, Ops, PoolShape};
use std::cell::Cell;
use std::rc::Rc;

const UNIT: (f64, f64) = (-1.0, 1.0);

/// x, norm weight, up and down projections.
fn inputs() -> Vec<Tensor> {
    let shapes: [&[usize]; 4] = [&[5, 6], &[6], &[9, 6], &[6, 9]];
    shapes.iter().zip(1..).map(|(shape, seed)| uniform(seed, shape, UNIT)).collect()
}

/// A feed-forward block with its residual: x is used twice.
fn feed_forward(t: &Recorder, x: &[Variable]) -> Vec<Variable> {
    let h = t.rms_norm(&x[0], &x[1], 0.1);
    let h = t.linear(&h, &x[2]);
    let h = t.swiglu(&h, &h);
    vec![t.add(&x[0], &t.linear(&h, &x[3]), 1.0)]
}

/// Asserts that two ways to compute the same have the same gradients, bit for bit.
fn assert_same(
    inputs: &[Tensor],
    f: impl Fn(&Recorder, &[Variable]) -> Vec<Variable>,
    g: impl Fn(&Recorder, &[Variable]) -> Vec<Variable>,
) {
    let constants: Vec<_> = inputs.iter().cloned().map(Var::constant).collect();
    let values = |outs: Vec<Variable>| outs.into_iter().map(|out| out.value).collect::<Vec<_>>();
    let outs = values(f(&recorder(), &constants));
    for (f, g) in outs.iter().zip(values(g(&recorder(), &constants))) {
        assert_eq!(f.data(), g.data());
    }
    let seeds: Vec<_> = output_seeds(&outs).into_iter().map(Some).collect();
    let (plain, segmented) = (gradients(inputs, |_| true, &seeds, f), gradients(inputs, |_| true, &seeds, g));
    assert!(plain.iter().all(|d| d.iter().any(|&d| d != 0.0)), "the comparison would say nothing");
    assert_eq!(plain, segmented);
}

#[test]
fn a_segment_changes_no_gradient() {
    assert_same(&inputs(), feed_forward, |t, x| t.segment(x.to_vec(), feed_forward));
    check("segment", &inputs(), |t, x| t.segment(x.to_vec(), feed_forward));
}

/// The inputs with `y` in the place of x.
fn with_x(x: &[Variable], y: Vec<Variable>) -> Vec<Variable> {
    [&y, &x[1..]].concat()
}

/// Weights are used in both blocks, so gradients meet across the border of a segment.
#[test]
fn segments_follow_and_contain_each_other() {
    let plain = |t: &Recorder, x: &[Variable]| feed_forward(t, &with_x(x, feed_forward(t, x)));
    let following = |t: &Recorder, x: &[Variable]| {
        let y = t.segment(x.to_vec(), feed_forward);
        t.segment(with_x(x, y), feed_forward)
    };
    assert_same(&inputs(), plain, following);
    assert_same(&inputs(), plain, move |t, x| t.segment(x.to_vec(), following));
    assert_same(&inputs(), following, move |t, x| t.segment(x.to_vec(), move |t, x| t.segment(x.to_vec(), following)));
}

#[test]
fn a_variable_may_be_used_inside_and_outside() {
    let scaled = |t: &Recorder, x: &[Variable]| vec![t.scale_channel(&x[0], Channel::last(3), 0.7)];
    let outside = |t: &Recorder, x: &[Variable], y: &Variable| vec![t.add(y, &t.linear(&x[0], &x[0]), 0.3), y.clone()];
    let inputs = [uniform(1, &[3, 3], UNIT)];
    let plain = move |t: &Recorder, x: &[Variable]| outside(t, x, &scaled(t, x)[0]);
    assert_same(&inputs, plain, move |t, x| outside(t, x, &t.segment(x.to_vec(), scaled)[0]));
}

#[test]
fn a_compressing_block_may_be_a_segment() {
    let (spans, heads) = (ragged(), Heads { query: 4, kv: 2, dim: 4 });
    let shape = (PoolShape { heads, window: Some(3) }, 2);
    let plain = move |t: &Recorder, x: &[Variable]| block(t, x, &spans, shape);
    let segmented = plain.clone();
    assert_same(&block_inputs(&ragged(), heads), plain, move |t, x| t.segment(x.to_vec(), segmented.clone()));
}

#[test]
fn outputs_may_be_unused_inputs_or_the_same() {
    let both = |t: &Recorder, x: &[Variable]| {
        let y = t.linear(&x[0], &x[0]);
        vec![t.swiglu(&y, &x[0]), y.clone(), y, x[0].clone()]
    };
    let inputs = [uniform(1, &[3, 3], UNIT)];
    assert_same(&inputs, both, move |t, x| t.segment(x.to_vec(), both));
    for used in 0..4 {
        let plain = move |t: &Recorder, x: &[Variable]| vec![both(t, x).swap_remove(used)];
        assert_same(&inputs, plain, move |t, x| vec![t.segment(x.to_vec(), both).swap_remove(used)]);
    }
}

#[test]
fn an_input_may_come_twice() {
    let product = |t: &Recorder, x: &[Variable]| vec![t.linear(&x[0], &x[1])];
    let inputs = [uniform(1, &[3, 3], UNIT)];
    let twice = |x: &[Variable]| vec![x[0].clone(), x[0].clone()];
    assert_same(&inputs, move |t, x| product(t, &twice(x)), move |t, x| t.segment(twice(x), product));
}

#[test]
fn a_segment_runs_again_only_for_a_gradient() {
    let runs = Rc::new(Cell::new(0));
    let tape = recorder();
    let x = tape.param(uniform(1, &[3, 3], UNIT));
    let segment = |input: &Variable| {
        let runs = Rc::clone(&runs);
        tape.segment(vec![input.clone()], move |t, x| {
            runs.set(runs.get() + 1);
            vec![t.linear(&x[0], &x[0])]
        })
    };
    let [used, unused, constant] = [&x, &x, &Var::constant(x.value.clone())].map(|x| segment(x).remove(0));
    assert_eq!(runs.get(), 3);
    let seed = used.value.clone();
    let grads = tape.backward_seeded(&[(&used, seed)]);
    assert_eq!(runs.get(), 4);
    assert!(grads.get(&x).is_some());
    assert!(grads.get(&unused).is_none() && grads.get(&constant).is_none());
}

#[test]
fn constants_get_no_gradient_inside_a_segment_either() {
    let all = inputs();
    for tracked in 0..all.len() {
        let tape = recorder();
        let variable = |(i, x): (usize, &Tensor)| {
            if i == tracked { tape.param(x.clone()) } else { Var::constant(x.clone()) }
        };
        let x: Vec<_> = all.iter().enumerate().map(variable).collect();
        let y = tape.segment(x.clone(), feed_forward).remove(0);
        let seed = y.value.clone();
        let grads = tape.backward_seeded(&[(&y, seed)]);
        for (i, x) in x.iter().enumerate() {
            assert_eq!(grads.get(x).is_some(), i == tracked);
        }
    }
}

/// An op none of whose outputs matter leaves its inputs without a gradient, rather than with one of zeros.
#[test]
fn what_the_result_does_not_depend_on_has_no_gradient() {
    let (spans, heads) = (ragged(), Heads { query: 2, kv: 2, dim: 4 });
    let tape = recorder();
    let x: Vec<_> = block_inputs(&spans, heads).into_iter().map(|x| tape.param(x)).collect();
    block(&tape, &x, &spans, (PoolShape { heads, window: None }, 1));
    let other = tape.param(uniform(9, &[2, 2], UNIT));
    let y = tape.linear(&other, &other);
    let seed = y.value.clone();
    let grads = tape.backward_seeded(&[(&y, seed)]);
    assert!(grads.get(&other).is_some());
    assert!(x.iter().all(|x| grads.get(x).is_none()));
}
