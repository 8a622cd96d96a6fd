//! AdamW against its formula, and what differs from parameter to parameter.

use kvfold_autograd::{Optimizer, Rates};
use kvfold_kernels::ops::Grad;
use kvfold_kernels::{Array, Reference};

const RATES: Rates = Rates { lr: 0.1, beta1: 0.9, beta2: 0.95, weight_decay: 0.2, clip: 1e9 };

fn array(shape: &[usize], data: &[f64]) -> Array<f64> {
    Reference::reference().array(shape, data.to_vec())
}

fn step(optimizer: &mut Optimizer<Array<f64>>, params: &mut [Array<f64>], grads: &[Option<Array<f64>>], rates: Rates) {
    let ops = Reference::<f64>::reference();
    let norm = Optimizer::norm(&ops, grads);
    optimizer.step(&ops, params.iter_mut().map(|p| (p, 1.0)).collect(), grads, (rates, norm));
}

fn fresh(params: &[Array<f64>]) -> Optimizer<Array<f64>> {
    Optimizer::new(&Reference::<f64>::reference(), &params.iter().collect::<Vec<_>>())
}

#[test]
fn steps_follow_the_formula() {
    let mut params = [array(&[1, 2], &[1.0, -2.0])];
    let mut optimizer = fresh(&params);
    let (mut p, mut m, mut v) = ([1.0, -2.0], [0.0; 2], [0.0; 2]);
    for (t, grad) in (1..).zip([[0.3, -0.1], [0.0, 0.5], [-2.0, 0.01]]) {
        step(&mut optimizer, &mut params, &[Some(array(&[1, 2], &grad))], RATES);
        for i in 0..2 {
            m[i] = 0.9 * m[i] + 0.1 * grad[i];
            v[i] = 0.95 * v[i] + 0.05 * grad[i] * grad[i];
            let (m_hat, v_hat) = (m[i] / (1.0 - 0.9f64.powi(t)), v[i] / (1.0 - 0.95f64.powi(t)));
            p[i] -= 0.1 * 0.2 * p[i] + 0.1 * m_hat / (v_hat.sqrt() + 1e-8);
            assert!((params[0].data()[i] - p[i]).abs() < 1e-14, "step {t}");
        }
    }
}

#[test]
fn only_matrices_decay() {
    let mut params = [array(&[2], &[1.0, 1.0]), array(&[1, 2], &[1.0, 1.0])];
    let zeros = [Some(array(&[2], &[0.0; 2])), Some(array(&[1, 2], &[0.0; 2]))];
    step(&mut fresh(&params), &mut params, &zeros, RATES);
    assert_eq!(params[0].data(), [1.0; 2]);
    assert_eq!(params[1].data(), [1.0 - 0.1 * 0.2; 2]);
}

#[test]
fn a_parameter_without_a_gradient_stays() {
    let mut params = [array(&[1, 1], &[1.0]), array(&[1, 1], &[1.0])];
    let mut optimizer = fresh(&params);
    step(&mut optimizer, &mut params, &[None, Some(array(&[1, 1], &[1.0]))], RATES);
    assert_eq!(params[0].data(), [1.0]);
    assert_ne!(params[1].data(), [1.0]);
}

#[test]
fn gradients_are_clipped_together() {
    let grads = [Some(array(&[1], &[3.0])), None, Some(array(&[1], &[-4.0]))];
    assert_eq!(Optimizer::norm(&Reference::<f64>::reference(), &grads), 5.0);
    let mut params = [0.0; 3].map(|x| array(&[1], &[x]));
    let mut optimizer = fresh(&params);
    step(&mut optimizer, &mut params, &grads, Rates { clip: 1.0, ..RATES });
    let first_moments: Vec<f64> = optimizer.moments().iter().map(|moments| moments.m.data()[0]).collect();
    for (got, expected) in first_moments.iter().zip([0.1 * 0.6, 0.0, -0.1 * 0.8]) {
        assert!((got - expected).abs() < 1e-16);
    }
}

#[test]
fn groups_scale_the_learning_rate() {
    let ops = Reference::<f64>::reference();
    let mut params = [array(&[1], &[0.0]), array(&[1], &[0.0])];
    let grads = [1.0, 1.0].map(|g| Some(array(&[1], &[g])));
    let groups = params.iter_mut().zip([1.0, 10.0]).collect();
    fresh(&[array(&[1], &[0.0]), array(&[1], &[0.0])]).step(&ops, groups, &grads, (RATES, 1.0));
    assert!((params[1].data()[0] - 10.0 * params[0].data()[0]).abs() < 1e-15);
    assert!((params[0].data()[0] + 0.1).abs() < 1e-8);
}

#[test]
fn a_resumed_optimizer_goes_on_as_if_nothing_had_happened() {
    let grads = [[0.3, -0.1], [0.0, 0.5]].map(|g| [Some(array(&[1, 2], &g))]);
    let mut straight = [array(&[1, 2], &[1.0, -2.0])];
    let mut optimizer = fresh(&straight);
    step(&mut optimizer, &mut straight, &grads[0], RATES);
    let mut resumed = straight.clone();
    let mut saved = Optimizer::resume(optimizer.moments().to_vec(), optimizer.steps());
    step(&mut optimizer, &mut straight, &grads[1], RATES);
    step(&mut saved, &mut resumed, &grads[1], RATES);
    assert_eq!(straight[0].data(), resumed[0].data());
    assert_eq!(saved.steps(), 2);
}

/// Clones of a parameter, such as a teacher's, are not changed with it.
#[test]
fn a_step_leaves_clones_alone() {
    let mut params = [array(&[1, 1], &[1.0])];
    let clone = params[0].clone();
    step(&mut fresh(&params), &mut params, &[Some(array(&[1, 1], &[1.0]))], RATES);
    assert_eq!(clone.data(), [1.0]);
    let mut zeroed = clone.clone();
    Reference::reference().zero_rows(&mut zeroed, &[0]);
    assert_eq!((clone.data(), zeroed.data()), (&[1.0][..], &[0.0][..]));
}
