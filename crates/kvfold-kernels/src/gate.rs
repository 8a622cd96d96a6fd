//! Decisions and importances: where they come from, how they are relaxed, what they cost (spec 1.2, 2.1, 2.5, 2.6).

use crate::kernel_set::KernelSet;
use crate::ops::{Borrowed, Channel, Exempt, Heads, Hinge, MIN_IMPORTANCE, Over, Scope, Span, Spans};
use crate::real::{Real, sigmoid, softplus};

/// One row of the borrowed gate: `a = scale * k[D-1] - offset`, `omega = sigmoid(mean_g q[D-1] + offset) + eps`.
pub(crate) fn borrowed_row<F: Real>(
    (q, k): (&[F], &[F]),
    heads: Heads,
    by: Borrowed,
    logit: &mut [F],
    omega: &mut [F],
) {
    let Heads { kv, dim, .. } = heads;
    for g in 0..kv {
        logit[g] = k[(g + 1) * dim - 1] * F::of(by.scale) - F::of(by.offset);
        omega[g] = sigmoid(F::exp, importance_logit(q, heads, by, g)) + F::of(MIN_IMPORTANCE);
    }
}

fn importance_logit<F: Real>(q: &[F], heads: Heads, by: Borrowed, g: usize) -> F {
    let group = heads.group();
    let channels = (0..group).map(|h| q[(g * group + h + 1) * heads.dim - 1]);
    channels.sum::<F>() / F::of(group as f64) + F::of(by.offset)
}

/// Gradients of one row of the borrowed gate, into rows of zeros.
pub(crate) fn borrowed_row_grad<F: Real>(
    q: &[F],
    heads: Heads,
    by: Borrowed,
    (d_logit, d_omega): (&[F], &[F]),
    (dq, dk): (&mut [F], &mut [F]),
) {
    let (group, dim) = (heads.group(), heads.dim);
    for g in 0..heads.kv {
        dk[(g + 1) * dim - 1] = d_logit[g] * F::of(by.scale);
        let s = sigmoid(F::exp, importance_logit(q, heads, by, g));
        let du = d_omega[g] * s * (F::one() - s) / F::of(group as f64);
        (0..group).for_each(|h| dq[(g * group + h + 1) * dim - 1] = du);
    }
}

/// One row of the queries' logits: `a = scale * q[first of the group][D-1] - offset`.
pub(crate) fn query_row<F: Real>(q: &[F], heads: Heads, by: Borrowed, logit: &mut [F]) {
    let Channel { every, at } = Channel::last_of_first_query(heads);
    for (group, logit) in q.chunks_exact(every).zip(logit) {
        *logit = group[at] * F::of(by.scale) - F::of(by.offset);
    }
}

/// Gradient of one row of queries, into zeros.
pub(crate) fn query_row_grad<F: Real>(heads: Heads, by: Borrowed, d: &[F], dq: &mut [F]) {
    let Channel { every, at } = Channel::last_of_first_query(heads);
    for (group, &d) in dq.chunks_exact_mut(every).zip(d) {
        group[at] = d * F::of(by.scale);
    }
}

/// One row of the head's gate: `a = scale * r - offset`, `omega = eps + (2 - 2 eps) * sigmoid(scale * r')`.
pub(crate) fn head_row<F: Real>(r: &[F], scale: F, offset: F, logit: &mut [F], omega: &mut [F]) {
    let kv = logit.len();
    for g in 0..kv {
        logit[g] = scale * r[g] - offset;
        omega[g] = F::of(MIN_IMPORTANCE) + importance_span::<F>() * sigmoid(F::exp, scale * r[kv + g]);
    }
}

/// Gradient of one row of the head's outputs.
pub(crate) fn head_row_grad<F: Real>(r: &[F], scale: F, (d_logit, d_omega): (&[F], &[F]), dr: &mut [F]) {
    let kv = d_logit.len();
    for g in 0..kv {
        dr[g] = scale * d_logit[g];
        let s = sigmoid(F::exp, scale * r[kv + g]);
        dr[kv + g] = scale * importance_span::<F>() * s * (F::one() - s) * d_omega[g];
    }
}

/// Adds to each row of a sequence's logits `[T,G]` what the row before it says ahead.
pub(crate) fn add_ahead<F: Real>(logit: &mut [F], ahead: &[F], kv: usize) {
    logit[kv.min(ahead.len())..].iter_mut().zip(ahead).for_each(|(logit, &ahead)| *logit += ahead);
}

/// Gradient of what the rows of a sequence say ahead, `[T,G]`, into zeros: the last one speaks to nobody.
pub(crate) fn add_ahead_grad<F: Real>(d: &[F], kv: usize, d_ahead: &mut [F]) {
    d_ahead.iter_mut().zip(&d[kv.min(d.len())..]).for_each(|(to, &d)| *to = d);
}

/// Width of the head's importances: from eps to 2 - eps, 1 in the middle.
fn importance_span<F: Real>() -> F {
    F::of(2.0 - 2.0 * MIN_IMPORTANCE)
}

/// How decisions of one sequence are laid out, and which of them are not free.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deciding {
    /// KV heads: columns.
    pub(crate) kv: usize,
    /// First tokens whose slots nothing folds into.
    pub(crate) sinks: usize,
}

impl Deciding {
    /// Numbers of the tokens that append whatever they decide, of `len`.
    fn forced(self, len: usize) -> usize {
        ((self.sinks + 1) * self.kv).min(len)
    }
}

/// Soft decisions of one sequence, `[T,G]` each; `close` is shifted by one.
#[inline(always)]
pub(crate) fn decide_soft<F: Real, K: KernelSet<F>>(relaxed: &[F], by: Deciding, alpha: &mut [F], close: &mut [F]) {
    let (forced, kv) = (by.forced(relaxed.len()), by.kv);
    alpha[..forced].fill(F::zero());
    for (alpha, &l) in alpha.iter_mut().zip(relaxed).skip(forced) {
        *alpha = sigmoid(K::exp, l);
    }
    close.fill(F::zero());
    for (close, &l) in close[forced - kv..].iter_mut().zip(&relaxed[forced..]) {
        *close = -softplus(l);
    }
}

/// Gradient of the relaxed logits of one sequence: `d_alpha * alpha (1 - alpha) - d_close[previous] * alpha`.
#[inline(always)]
pub(crate) fn decide_soft_grad<F: Real, K: KernelSet<F>>(
    relaxed: &[F],
    by: Deciding,
    (d_alpha, d_close): (&[F], &[F]),
    d: &mut [F],
) {
    let forced = by.forced(relaxed.len());
    d[..forced].fill(F::zero());
    for i in forced..relaxed.len() {
        let alpha = sigmoid(K::exp, relaxed[i]);
        d[i] = d_alpha[i] * alpha * (F::one() - alpha) - d_close[i - by.kv] * alpha;
    }
}

/// Hard decisions of one sequence: fold where the logit is above 0; ties append.
#[inline(always)]
pub(crate) fn decide_hard<F: Real>(logit: &[F], by: Deciding, alpha: &mut [F], close: &mut [F]) {
    let forced = by.forced(logit.len());
    let folds = |i: usize| i >= forced && logit.get(i).is_some_and(|&l| l > F::zero());
    for (i, (alpha, close)) in alpha.iter_mut().zip(close).enumerate() {
        *alpha = if folds(i) { F::one() } else { F::zero() };
        *close = if folds(i + by.kv) { F::neg_infinity() } else { F::zero() };
    }
}

/// Rows of a span whose decisions have been carried out when it ends.
pub(crate) fn carried_out(span: &Span, exempt: Exempt) -> std::ops::Range<usize> {
    let tokens = exempt.foldable(span.len);
    span.start + tokens.start..span.start + tokens.end
}

/// Folds per token seen of one sequence and every KV head.
pub(crate) fn fold_rate<F: Real>(relaxed: &[F], kv: usize, (span, exempt): (&Span, Exempt), rate: &mut [F]) {
    for (g, rate) in rate.iter_mut().enumerate() {
        let folds = carried_out(span, exempt).filter(|t| relaxed[t * kv + g] > F::zero()).count();
        *rate = F::of(folds as f64 / span.len as f64);
    }
}

/// The straight-through gradient of [`fold_rate`], into zeros.
pub(crate) fn fold_rate_grad<F: Real, K: KernelSet<F>>(
    relaxed: &[F],
    (span, exempt): (&Span, Exempt),
    d_rate: &[F],
    d: &mut [F],
) {
    let kv = d_rate.len();
    for t in carried_out(span, exempt) {
        for g in 0..kv {
            let alpha = sigmoid(K::exp, relaxed[t * kv + g]);
            d[t * kv + g] = d_rate[g] / F::of(span.len as f64) * alpha * (F::one() - alpha);
        }
    }
}

/// A rate among those that share a constraint.
struct HingeMember {
    layer: usize,
    /// Index into the layer's `[S,G]` rates.
    at: usize,
    /// Tokens that the rate stands for: a whole number, so that sums of rates at the target are at the target too, without
    /// rounding.
    tokens: f64,
    /// Folds per token asked for.
    target: f64,
}

/// Calls `visit` with the members of every unit of a hinge: the rates that share a constraint.
fn hinge_units(layers: usize, kv: usize, spans: &Spans, hinge: Hinge, mut visit: impl FnMut(&[HingeMember])) {
    let member = |(s, span): (usize, &Span), tokens| (s, tokens, hinge.target_of(span.len));
    let numbered = || spans.iter().enumerate();
    let token_units: Vec<Vec<(usize, f64, f64)>> = match hinge.over {
        Over::Sequence => numbered().map(|span| vec![member(span, 1.0)]).collect(),
        Over::Batch => vec![numbered().map(|span| member(span, span.1.len as f64)).collect()],
    };
    let all = || (0..layers).flat_map(|l| (0..kv).map(move |g| (l, g)));
    let head_units: Vec<Vec<(usize, usize)>> = match hinge.scope {
        Scope::Global => vec![all().collect()],
        Scope::Layer => (0..layers).map(|l| (0..kv).map(|g| (l, g)).collect()).collect(),
        Scope::Head => all().map(|head| vec![head]).collect(),
    };
    for tokens in &token_units {
        for heads in &head_units {
            let members = |&(s, tokens, target)| {
                heads.iter().map(move |&(layer, g)| HingeMember { layer, at: s * kv + g, tokens, target })
            };
            let unit: Vec<_> = tokens.iter().flat_map(members).collect();
            visit(&unit);
        }
    }
}

/// `target - rate` of a unit, with the weight of all its members.
fn shortfall<F: Real>(rates: &[&[F]], unit: &[HingeMember]) -> (f64, f64) {
    let weight: f64 = unit.iter().map(|member| member.tokens).sum();
    let missing = unit.iter().map(|&HingeMember { layer, at, tokens, target }| {
        // The target in the rates' own precision: a rate of 9/10 reaches a target of 0.9.
        tokens * (F::of(target).f64() - rates[layer][at].f64())
    });
    (missing.sum::<f64>() / weight, weight)
}

/// Mean over units of `max(0, target - rate)`, or of `|target - rate|` where a hinge pulls on both sides.
pub(crate) fn hinge<F: Real>(rates: &[&[F]], spans: &Spans, hinge: Hinge) -> F {
    let (mut total, mut units) = (0.0, 0);
    hinge_units(rates.len(), rates[0].len() / spans.len(), spans, hinge, |unit| {
        total += hinge.pull.on(shortfall(rates, unit).0).abs();
        units += 1;
    });
    F::of(total / f64::from(units))
}

/// Gradient of [`hinge`], scaled by `d`; exactly zero for units at the target, and for those above it unless it pulls on both sides.
pub(crate) fn hinge_grad<F: Real>(rates: &[&[F]], spans: &Spans, hinge: Hinge, d: F) -> Vec<Vec<F>> {
    let mut grads: Vec<Vec<F>> = rates.iter().map(|r| vec![F::zero(); r.len()]).collect();
    let mut units = 0;
    hinge_units(rates.len(), rates[0].len() / spans.len(), spans, hinge, |unit| {
        let (missing, weight) = shortfall(rates, unit);
        let sign = match hinge.pull.on(missing) {
            0.0 => 0.0,
            missing => -missing.signum(),
        };
        unit.iter().for_each(|member| grads[member.layer][member.at] += F::of(sign * member.tokens / weight));
        units += 1;
    });
    let share = d / F::of(f64::from(units));
    grads.iter_mut().flatten().for_each(|g| *g *= share);
    grads
}
