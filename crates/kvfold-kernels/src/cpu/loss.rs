//! Losses of predictions, a few hundred rows at a time: logits of all rows never exist together.

use super::array::Lent;
use super::{Array, Cpu};
use crate::kernel_set::KernelSet;
use crate::loss;
use crate::ops::{Goal, Grad, NO_TARGET, Ops, Predictions};
use crate::real::Real;
use crate::team;

/// Rows whose logits exist together.
pub const LOSS_ROWS: usize = 512;

/// Gradients of a mean loss.
pub(super) struct Gradients<'a, F: Real> {
    /// Of the predictions' `x`, overwritten.
    pub(super) x: Lent<'a, F>,
    /// Of their `w`.
    pub(super) w: Option<Array<F>>,
    /// Whether that one is wanted.
    pub(super) w_too: bool,
}

impl<F: Real, K: KernelSet<F>> Cpu<F, K> {
    /// The mean loss, and its gradients where they are wanted.
    pub(super) fn loss(
        &self,
        predicted: Predictions<'_, Array<F>>,
        goal: Goal<'_, Array<F>>,
        mut grads: Option<&mut Gradients<'_, F>>,
    ) -> Array<F> {
        let (rows, cols) = predicted.x.matrix();
        let (vocab, _) = predicted.w.matrix();
        let counted = match goal {
            Goal::Tokens(targets) => targets.iter().filter(|&&t| t != NO_TARGET).count().max(1),
            Goal::Teacher(..) => rows,
        };
        let factor = grads.is_some().then(|| F::one() / F::of(counted as f64));
        let mut total = 0.0;
        for first in (0..rows).step_by(LOSS_ROWS) {
            let count = LOSS_ROWS.min(rows - first);
            let logits_of = |of: Predictions<'_, Array<F>>| {
                let (_, cols) = of.x.matrix();
                let mut x = self.buffer(count * cols);
                x.copy_from_slice(&of.x.data()[first * cols..][..count * cols]);
                let x = self.array_of(&[count, cols], x);
                (self.linear(&x, of.w), x)
            };
            let teacher = match goal {
                Goal::Teacher(teacher, _) => Some(logits_of(teacher).0),
                Goal::Tokens(_) => None,
            };
            let (mut logits, x) = logits_of(predicted);
            let mut losses = vec![F::zero(); count];
            let rows = losses.iter_mut().zip(logits.data_mut().chunks_exact_mut(vocab)).enumerate();
            team::each(rows, |(row, (to, logits))| {
                *to = self.set.run(
                    #[inline(always)]
                    || match (goal, &teacher) {
                        (Goal::Teacher(_, direction), Some(teacher)) => {
                            loss::kl::<F, K>(logits, &teacher.data()[row * vocab..][..vocab], direction, factor)
                        }
                        (Goal::Tokens(targets), _) if targets[first + row] != NO_TARGET => {
                            loss::cross_entropy::<F, K>(logits, targets[first + row] as usize, factor)
                        }
                        _ => {
                            logits.fill(F::zero());
                            F::zero()
                        }
                    },
                );
            });
            total += losses.iter().map(|loss| loss.f64()).sum::<f64>();
            if let Some(grads) = grads.as_deref_mut() {
                let dx = self.linear_grad_x(predicted.w, &logits, None);
                grads.x[first * cols..][..count * cols].copy_from_slice(dx.data());
                if grads.w_too {
                    grads.w = Some(self.linear_grad_w_onto(&x, predicted.w, &logits, grads.w.take()));
                }
            }
        }
        self.array(&[1], vec![F::of(total / counted as f64)])
    }
}
