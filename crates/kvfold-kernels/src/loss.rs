//! Losses over a row of logits, with their gradients: cross-entropy, and KL divergence in either direction.

use crate::kernel_set::KernelSet;
use crate::ops::KlDirection;
use crate::real::{self, Real};

/// Largest logit and the sum of exponentials below it.
#[inline(always)]
fn normaliser<F: Real, K: KernelSet<F>>(logits: &[F]) -> (F, F) {
    let top = real::max(logits);
    let total = real::sum_of(
        logits,
        #[inline(always)]
        |x| K::exp_share(x - top),
    );
    (top, total)
}

/// `-log softmax(logits)[target]`. With a factor, the logits become `factor * (softmax(logits) - onehot(target))`.
#[inline(always)]
pub(crate) fn cross_entropy<F: Real, K: KernelSet<F>>(logits: &mut [F], target: usize, factor: Option<F>) -> F {
    let (top, total) = normaliser::<F, K>(logits);
    let loss = top + total.ln() - logits[target];
    if let Some(factor) = factor {
        let share = factor / total;
        logits.iter_mut().for_each(|x| *x = K::exp_share(*x - top) * share);
        logits[target] -= factor;
    }
    loss
}

/// Divergence between the softmaxes of two rows of logits. With a factor, the student's logits become `factor` times its
/// gradient: forward `p_s - p_t`, reverse `p_s (log p_s - log p_t - KL)`.
#[inline(always)]
pub(crate) fn kl<F: Real, K: KernelSet<F>>(
    student: &mut [F],
    teacher: &[F],
    direction: KlDirection,
    factor: Option<F>,
) -> F {
    // sum p (log p - log q), with log p = x - top - log total
    let ((s_top, s_total), (t_top, t_total)) = (normaliser::<F, K>(student), normaliser::<F, K>(teacher));
    let shift = t_top + t_total.ln() - s_top - s_total.ln();
    let loss = match direction {
        KlDirection::Forward => {
            let sum = real::sum_of_pairs(
                teacher,
                student,
                #[inline(always)]
                |t, s| K::exp_share(t - t_top) * (t - s - shift),
            );
            sum / t_total
        }
        KlDirection::Reverse => {
            let sum = real::sum_of_pairs(
                student,
                teacher,
                #[inline(always)]
                |s, t| K::exp_share(s - s_top) * (s - t + shift),
            );
            sum / s_total
        }
    };
    if let Some(factor) = factor {
        let (s_share, t_share) = (factor / s_total, factor / t_total);
        let pairs = student.iter_mut().zip(teacher);
        match direction {
            KlDirection::Forward => {
                pairs.for_each(|(s, &t)| *s = K::exp_share(*s - s_top) * s_share - K::exp_share(t - t_top) * t_share);
            }
            KlDirection::Reverse => {
                pairs.for_each(|(s, &t)| *s = K::exp_share(*s - s_top) * s_share * (*s - t + shift - loss));
            }
        }
    }
    loss
}
