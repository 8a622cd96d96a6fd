//! The blocked algorithm against the definition, both in f64, so that only the algorithm can differ.

use super::*;
use crate::kernel_set::Scalar;
use crate::noise::{hash, unit};
use crate::ops::{Late, LateReads, Precision};

/// Largest difference of an output or a gradient; what is left is the order of the sums.
const TOLERANCE: f64 = 1e-12;

/// The same for factors in bf16, of the largest number: some times the 2^-9 that one of them is rounded by.
const ROUNDED: f64 = 0.02;

/// A job's shape: tokens, head dim, group, delay, and which keys there are.
#[derive(Clone, Copy, Debug)]
struct Shape {
    len: usize,
    dim: usize,
    group: usize,
    delay: usize,
    exact: bool,
    pooled: bool,
    mass: bool,
    hard: bool,
}

/// Token-major arrays that hold a job amid other columns and rows, as in a batch.
struct Data {
    wide: Vec<f64>,
    closes: Vec<f64>,
}

const ROW: usize = 900;
const START: usize = 7;

impl Data {
    fn new(shape: Shape, seed: u64) -> Self {
        let number = |place: usize| unit(hash(&[seed, place as u64]));
        let close = |t: usize| match (shape.hard, number(t) < 0.6) {
            (false, _) => -3.0 * number(t),
            (true, closes) => {
                if closes {
                    f64::NEG_INFINITY
                } else {
                    0.0
                }
            }
        };
        Self {
            wide: (0..START + shape.len * ROW).map(|i| 2.0 * number(1000 + i) - 1.0).collect(),
            closes: (0..shape.len).map(close).collect(),
        }
    }

    fn columns(&self, at: usize) -> View<'_, f64> {
        View { data: &self.wide, start: START + at, row: ROW }
    }

    fn job(&self, shape: Shape) -> AttentionJob<'_, f64> {
        let keys = |at: usize| KeyView {
            k: self.columns(at),
            v: self.columns(at + 64),
            mass: shape.mass.then(|| self.columns(at + 128)),
        };
        let close = View { data: &self.closes, start: 0, row: 1 };
        AttentionJob {
            len: shape.len,
            dim: shape.dim,
            group: shape.group,
            q: self.columns(0),
            exact: shape.exact.then(|| keys(260)),
            pooled: shape.pooled.then(|| (keys(400), close)),
            delay: shape.delay,
            precision: Precision::F32,
        }
    }
}

/// Output, log-sum-exp and every gradient, one after the other, with the name of each.
fn run(
    job: &AttentionJob<'_, f64>,
    d: View<'_, f64>,
    forward: impl Fn(&AttentionJob<'_, f64>, &mut [f64], &mut [f64]),
    backward: impl Fn(&AttentionJob<'_, f64>, &mut AttentionJobGrad<'_, f64>),
) -> Vec<(&'static str, Vec<f64>)> {
    let rows = job.group * job.len;
    // What a forward pass finds in its buffers must not matter.
    let (mut out, mut lse) = (vec![f64::NAN; rows * job.dim], vec![f64::NAN; rows]);
    forward(job, &mut out, &mut lse);
    let zeros = |width: usize| vec![0.0; job.len * width];
    let mut q = vec![0.0; rows * job.dim];
    let mut buffers = [0, 1].map(|_| [zeros(job.dim), zeros(job.dim), zeros(1), zeros(1)]);
    let [exact, pooled] = buffers.each_mut().map(|[k, v, mass, close]| KeyGrad { k, v, mass, close });
    backward(job, &mut AttentionJobGrad { d, out: &out, lse: &lse, q: &mut q, exact, pooled });
    let names = ["exact k", "exact v", "exact mass", "exact close", "pooled k", "pooled v", "pooled mass", "close"];
    let keys = names.into_iter().zip(buffers.into_iter().flatten());
    [("out", out), ("lse", lse), ("q", q)].into_iter().chain(keys).collect()
}

fn assert_blocked_is_the_definition(shape: Shape, seed: u64) {
    let data = Data::new(shape, seed);
    let (job, d) = (data.job(shape), data.columns(550));
    let expected = run(&job, d, reference, reference_grad);
    // In floats, and with factors that are rounded to bf16.
    for (precision, tolerance) in [(Precision::F32, 0.0), (Precision::Bf16, ROUNDED)] {
        let job = AttentionJob { precision, ..data.job(shape) };
        let got = run(
            &job,
            d,
            |job, out, lse| blocked::forward(Scalar, job, out, lse),
            |job, grad| blocked::backward(Scalar, job, grad),
        );
        for ((name, expected), (_, got)) in expected.iter().zip(&got) {
            let size = expected.iter().fold(1.0, |size: f64, x| if x.is_finite() { size.max(x.abs()) } else { size });
            for (i, (expected, got)) in expected.iter().zip(got).enumerate() {
                let close = (expected - got).abs() <= TOLERANCE + tolerance * size;
                assert!(close, "{shape:?}, {precision:?}, {name}, element {i}: {got}, expected {expected}");
            }
        }
    }
}

#[test]
fn blocks_compute_the_definition_at_every_border() {
    let plain = Shape { len: 0, dim: 4, group: 1, delay: 0, exact: true, pooled: false, mass: false, hard: false };
    for len in [1, 2, 31, 32, 33, 64, 127, 128, 129, 161, 260] {
        for mass in [false, true] {
            assert_blocked_is_the_definition(Shape { len, mass, ..plain }, 1);
            for (delay, exact) in [(0, false), (0, true), (1, true), (5, true), (32, true), (129, true), (300, true)] {
                for hard in [false, true] {
                    let shape = Shape { len, delay, exact, mass, hard, pooled: true, ..plain };
                    assert_blocked_is_the_definition(shape, 2);
                }
            }
        }
    }
}

#[test]
fn late_reads_are_the_definition_at_every_border() {
    let plain = Shape { len: 0, dim: 6, group: 2, delay: 0, exact: true, pooled: false, mass: false, hard: false };
    for len in [1, 2, 33, 48, 97, 128, 260] {
        for (later, mass) in [(0, false), (1, true), (17, false), (64, true), (127, false), (300, false)] {
            let shape = Shape { len, mass, ..plain };
            let data = Data::new(shape, 4);
            let job = data.job(shape);
            let rows = job.group * len;
            let (mut out, mut lse) = (vec![0.0; rows * job.dim], vec![0.0; rows]);
            reference(&job, &mut out, &mut lse);
            for pair in [1.0, 2.0] {
                let sums = |fill: &dyn Fn(LateReads<&mut [f64]>)| {
                    let [mut own, mut apart, mut lost] = [(); 3].map(|()| vec![f64::NAN; rows]);
                    fill(LateReads { own: &mut own, apart: &mut apart, lost: &mut lost });
                    [own, apart, lost]
                };
                let late = Late { later, pair };
                let expected = sums(&|to| reference_reads(&job, &lse, late, to));
                let got = sums(&|to| blocked::reads(Scalar, &job, &lse, late, to));
                for (n, (expected, got)) in expected.iter().flatten().zip(got.iter().flatten()).enumerate() {
                    assert!(
                        (expected - got).abs() <= TOLERANCE,
                        "{shape:?}, {late:?}, {n}: {got}, expected {expected}"
                    );
                }
                // A query gives shares of 1 in all: none of the keys gets more than one per query that reads it late.
                for (n, own) in got[0].iter().enumerate() {
                    let queries = (len - n % len).saturating_sub(later) as f64;
                    assert!(*own <= queries && (*own > 0.0) == (queries > 0.0), "{shape:?}, {late:?}, {n}: {own}");
                }
            }
        }
    }
}

#[test]
fn blocks_compute_the_definition_for_every_head_shape() {
    for (dim, group) in [(1, 1), (6, 4), (8, 2), (33, 1), (64, 4)] {
        for (exact, pooled, delay) in [(true, false, 0), (false, true, 0), (true, true, 9)] {
            for hard in [false, true] {
                let shape = Shape { len: 70, dim, group, delay, exact, pooled, mass: true, hard };
                assert_blocked_is_the_definition(shape, 3);
            }
        }
    }
}
