//! Decisions, importances, and what compression costs.

use crate::check::{Tensor, check, check_against, gradients, ragged, uniform};
use kvfold_autograd::Var;
use kvfold_kernels::Reference;
use kvfold_kernels::ops::{Borrowed, Exempt, Heads, Hinge, Ops, Over, Pull, Scope, Spans, StatedAt};

const LOGITS: (f64, f64) = (-3.0, 3.0);

#[test]
fn borrowed_gate_for_every_group_size() {
    for group in [1, 2, 4] {
        let heads = Heads { query: 3 * group, kv: 3, dim: 4 };
        let inputs = [uniform(1, &[5, heads.query * 4], LOGITS), uniform(2, &[5, 3 * 4], LOGITS)];
        check("borrowed_gate", &inputs, |t, x| {
            let gate = t.borrowed_gate(&x[0], &x[1], heads, Borrowed { scale: 1.7, offset: 0.6 });
            vec![gate.logit, gate.omega]
        });
    }
}

#[test]
fn query_logit_for_every_group_size() {
    for group in [1, 2, 4] {
        let heads = Heads { query: 3 * group, kv: 3, dim: 4 };
        check("query_logit", &[uniform(1, &[5, heads.query * 4], LOGITS)], |t, x| {
            vec![t.query_logit(&x[0], heads, Borrowed { scale: 1.7, offset: 0.6 })]
        });
    }
}

#[test]
fn head_gate() {
    check("head_gate", &[uniform(1, &[5, 2 * 3], (-1.0, 1.0))], |t, x| {
        let gate = t.head_gate(&x[0], 2.5, 0.6);
        vec![gate.logit, gate.omega]
    });
}

#[test]
fn add_ahead() {
    let spans = ragged();
    let inputs = [1, 2].map(|seed| uniform(seed, &[spans.rows(), 3], LOGITS));
    check("add_ahead", &inputs, |t, x| vec![t.add_ahead(&x[0], &x[1], &spans)]);
}

#[test]
fn share_columns() {
    check("share_columns", &[uniform(1, &[5, 3], LOGITS)], |t, x| vec![t.share_columns(&x[0])]);
}

#[test]
fn relax() {
    let noise = uniform(2, &[5, 3], LOGITS);
    check("relax", &[uniform(1, &[5, 3], LOGITS)], |t, x| vec![t.relax(&x[0], &Var::constant(noise.clone()), 0.3)]);
}

#[test]
fn decide_soft() {
    let spans = ragged();
    for sinks in [0, 2, 20] {
        check("decide_soft", &[uniform(1, &[spans.rows(), 3], LOGITS)], |t, x| {
            let decided = t.decide_soft(&x[0], &spans, sinks);
            vec![decided.alpha, decided.close]
        });
    }
}

#[test]
fn hard_decisions_get_no_gradient() {
    let spans = ragged();
    let tape = crate::check::recorder();
    let logit = tape.param(uniform(1, &[spans.rows(), 3], LOGITS));
    let alpha = tape.decide_hard(&logit, &spans, 0).alpha;
    let seed = alpha.value.clone();
    assert!(tape.backward_seeded(&[(&alpha, seed)]).get(&logit).is_none());
}

/// Forward counts hard decisions; backward is that of the mean of the soft ones.
#[test]
fn fold_rate_is_straight_through() {
    let (spans, kv) = (ragged(), 3);
    for (delay, sinks) in [(0, 0), (1, 2), (4, 0), (6, 1), (20, 0)] {
        let soft_mean = |x: &[Tensor]| {
            let mut rates = Vec::new();
            for span in &spans {
                for g in 0..kv {
                    let carried_out = sinks + 1..span.len.saturating_sub(delay).max(sinks + 1);
                    let sigmoid = |t: usize| 1.0 / (1.0 + (-x[0].data()[(span.start + t) * kv + g]).exp());
                    rates.push(carried_out.map(sigmoid).sum::<f64>() / span.len as f64);
                }
            }
            vec![Reference::reference().array(&[spans.len(), kv], rates)]
        };
        let relaxed = [uniform(1, &[spans.rows(), kv], LOGITS)];
        check_against(
            "fold_rate",
            &relaxed,
            |t, x| vec![t.fold_rate(&x[0], &spans, Exempt { sinks, delay })],
            soft_mean,
        );
    }
}

fn hinges(target: f64) -> impl Iterator<Item = Hinge> {
    let scopes = [Scope::Global, Scope::Layer, Scope::Head];
    let lengths = [None, Some(StatedAt { length: 11, exempt: Exempt { sinks: 1, delay: 2 } })];
    let overs = [Over::Sequence, Over::Batch];
    let places = scopes.into_iter().flat_map(move |scope| overs.map(|over| (scope, over)));
    places.flat_map(move |(scope, over)| {
        let pulls = [Pull::Up, Pull::Both].into_iter();
        pulls.flat_map(move |pull| lengths.map(|stated_at| Hinge { target, scope, over, pull, stated_at }))
    })
}

#[test]
fn hinge_over_every_scope() {
    let spans = ragged();
    let rates = [1, 2, 3].map(|layer| uniform(layer, &[spans.len(), 2], (0.0, 1.0)));
    for hinge in [0.3, 0.5, 0.97].into_iter().flat_map(hinges) {
        check("hinge", &rates, |t, x| vec![t.hinge(x, &spans, hinge)]);
    }
}

/// T9: reached is reached, with no gradient left over from rounding.
#[test]
fn hinge_has_exactly_no_gradient_once_reached() {
    let seed = Some(Reference::reference().array(&[1], vec![1.0]));
    for lengths in [&[8][..], &[5, 1, 7], &[3, 3, 3, 3, 3, 3], &[11, 29, 7, 13, 1]] {
        let spans = Spans::of_lengths(lengths);
        for layers in 1..12 {
            for hinge in [0.3, 0.5, 0.75, 1.0 - 1.0 / 1.37].into_iter().flat_map(hinges) {
                let reached: &[f64] = if hinge.pull == Pull::Up { &[0.0, 0.01] } else { &[0.0] };
                for above in reached {
                    let rate = spans.iter().flat_map(|span| [hinge.target_of(span.len) + above; 3]).collect::<Vec<_>>();
                    let rates = vec![Reference::reference().array(&[spans.len(), 3], rate); layers];
                    let seeds = std::slice::from_ref(&seed);
                    let grads = gradients(&rates, |_| true, seeds, |t, x| vec![t.hinge(x, &spans, hinge)]);
                    assert!(grads.iter().flatten().all(|&d| d == 0.0), "{hinge:?}, {layers} layers, {lengths:?}");
                }
            }
        }
    }
}
