//! AdamW over a list of parameters, with f32 master weights and moments, global-norm clipping and learning-rate groups.

use kvfold_kernels::Grad;
use kvfold_kernels::ops::{AdamW, Moments};

/// What may change from step to step.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// Base learning rate; each parameter's group multiplies it.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Decoupled weight decay, for matrices only: norms and vectors are spared.
    pub weight_decay: f64,
    /// Largest global gradient norm; larger gradients are scaled down to it.
    pub clip: f64,
}

/// The state of AdamW: moments per parameter and the step count.
#[derive(Debug)]
pub struct Optimizer<T> {
    moments: Vec<Moments<T>>,
    steps: u64,
}

impl<T: Clone> Optimizer<T> {
    /// Fresh moments for these parameters.
    pub fn new<O: Grad<Tensor = T>>(ops: &O, params: &[&T]) -> Self {
        let zeros = |p: &&T| Moments { m: ops.zeros_like(p), v: ops.zeros_like(p) };
        Self { moments: params.iter().map(zeros).collect(), steps: 0 }
    }

    /// Goes on from saved moments after `steps` steps.
    pub fn resume(moments: Vec<Moments<T>>, steps: u64) -> Self {
        Self { moments, steps }
    }

    /// Moments in parameter order.
    pub fn moments(&self) -> &[Moments<T>] {
        &self.moments
    }

    /// Moments in parameter order, to change them when a parameter is changed by something else than a step.
    pub fn moments_mut(&mut self) -> &mut [Moments<T>] {
        &mut self.moments
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The norm over all gradients.
    pub fn norm<O: Grad<Tensor = T>>(ops: &O, grads: &[Option<T>]) -> f64 {
        grads.iter().flatten().map(|g| ops.sum_squares(g)).sum::<f64>().sqrt()
    }

    /// One step on every parameter that has a gradient; `group` is the factor on each parameter's learning rate.
    pub fn step<O: Grad<Tensor = T>>(
        &mut self,
        ops: &O,
        params: Vec<(&mut T, f64)>,
        grads: &[Option<T>],
        (rates, norm): (Rates, f64),
    ) {
        self.steps += 1;
        let grad_scale = if norm > rates.clip { rates.clip / norm } else { 1.0 };
        for (((param, group), grad), moments) in params.into_iter().zip(grads).zip(&mut self.moments) {
            let Some(grad) = grad else { continue };
            let decays = ops.shape(param).len() > 1;
            let adamw = AdamW {
                lr: rates.lr * group,
                beta1: rates.beta1,
                beta2: rates.beta2,
                eps: 1e-8,
                weight_decay: if decays { rates.weight_decay } else { 0.0 },
                step: self.steps,
                grad_scale,
            };
            ops.adamw(param, grad, moments, adamw);
        }
    }
}
