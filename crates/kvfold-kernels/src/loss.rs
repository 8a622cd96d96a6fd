//! Losses over logits, one row at a time: cross-entropy, and KL divergence in either direction.

use crate::kernel_set::KernelSet;
use crate::ops::KlDirection;
use crate::real::{self, Real};

/// Largest logit and the sum of exponentials below it.
#[inline(always)]
fn normaliser<F: Real, K: KernelSet<F>>(logits: &[F]) -> (F, F) {
    let top = real::max(logits);
    (top, real::sum(logits.iter().map(|&x| K::exp(x - top))))
}

/// `-log softmax(logits)[target]`.
#[inline(always)]
pub(crate) fn cross_entropy<F: Real, K: KernelSet<F>>(logits: &[F], target: usize) -> F {
    let (top, total) = normaliser::<F, K>(logits);
    top + total.ln() - logits[target]
}

/// `factor * (softmax(logits) - onehot(target))`.
#[inline(always)]
pub(crate) fn cross_entropy_grad<F: Real, K: KernelSet<F>>(logits: &[F], target: usize, factor: F, d: &mut [F]) {
    let (top, total) = normaliser::<F, K>(logits);
    let share = factor / total;
    for (d, &x) in d.iter_mut().zip(logits) {
        *d = K::exp(x - top) * share;
    }
    d[target] -= factor;
}

/// Divergence between the softmaxes of two rows of logits.
#[inline(always)]
pub(crate) fn kl<F: Real, K: KernelSet<F>>(student: &[F], teacher: &[F], direction: KlDirection) -> F {
    let (p, q) = match direction {
        KlDirection::Forward => (teacher, student),
        KlDirection::Reverse => (student, teacher),
    };
    // sum p (log p - log q), with log p = x - top - log total
    let ((p_top, p_total), (q_top, q_total)) = (normaliser::<F, K>(p), normaliser::<F, K>(q));
    let shift = q_top + q_total.ln() - p_top - p_total.ln();
    real::sum(p.iter().zip(q).map(|(&x, &y)| K::exp(x - p_top) * (x - y + shift))) / p_total
}

/// `factor` times the gradient of [`kl`] by the student's logits: forward `p_s - p_t`, reverse
/// `p_s (log p_s - log p_t - KL)`.
#[inline(always)]
pub(crate) fn kl_grad<F: Real, K: KernelSet<F>>(
    (student, teacher): (&[F], &[F]),
    direction: KlDirection,
    factor: F,
    d: &mut [F],
) {
    let ((s_top, s_total), (t_top, t_total)) = (normaliser::<F, K>(student), normaliser::<F, K>(teacher));
    let (s_share, t_share) = (factor / s_total, factor / t_total);
    let divergence = match direction {
        KlDirection::Forward => F::zero(),
        KlDirection::Reverse => kl::<F, K>(student, teacher, direction),
    };
    let shift = t_top + t_total.ln() - s_top - s_total.ln();
    for ((d, &s), &t) in d.iter_mut().zip(student).zip(teacher) {
        let p = K::exp(s - s_top) * s_share;
        *d = match direction {
            KlDirection::Forward => p - K::exp(t - t_top) * t_share,
            KlDirection::Reverse => p * (s - t + shift - divergence),
        };
    }
}
