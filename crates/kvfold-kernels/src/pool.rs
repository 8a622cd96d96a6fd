//! Running weighted means: the partial accumulation that turns tokens into slots (spec 2.2 - 2.4).
//!
//! ```text
//! X_i = alpha_i X_{i-1} + omega_i x_i      Z_i = alpha_i Z_{i-1} + omega_i      x~_i = X_i / Z_i
//! ```
//!
//! With a window of P, the sums run over the newest P tokens only: coefficients `C_{i,0} = 1` and
//! `C_{i,j} = alpha_i ... alpha_{i-j+1}` for j < P. A job is one KV head of one sequence, x the key and the value side
//! by side (`[T, 2D]`).

use crate::real::{self, Real};

/// One head of one sequence: what is averaged, and with which weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PoolJob<'a, F> {
    /// `[T,E]`, E = 2D.
    pub(crate) x: &'a [F],
    /// `[T]`; the first is 0.
    pub(crate) alpha: &'a [F],
    /// `[T]`.
    pub(crate) omega: &'a [F],
    pub(crate) window: Option<usize>,
}

impl<F: Real> PoolJob<'_, F> {
    fn width(&self) -> usize {
        self.x.len() / self.alpha.len()
    }

    /// First token of the sum that ends at i.
    fn first(&self, i: usize) -> usize {
        self.window.map_or(0, |window| (i + 1).saturating_sub(window))
    }
}

/// `X += x * omega`, after `X *= alpha`.
#[inline(always)]
pub(crate) fn accumulate<F: Real>(sum: &mut [F], alpha: F, omega: F, x: &[F]) {
    for (sum, &x) in sum.iter_mut().zip(x) {
        *sum = alpha * *sum + omega * x;
    }
}

/// Means `[T,E]` and masses `[T]`.
#[inline(always)]
pub(crate) fn forward<F: Real>(job: &PoolJob<'_, F>, mean: &mut [F], mass: &mut [F]) {
    let width = job.width();
    let mut sum = vec![F::zero(); width];
    let mut z = F::zero();
    for i in 0..mass.len() {
        let (x, mean) = (&job.x[i * width..][..width], &mut mean[i * width..][..width]);
        if job.window.is_some() {
            (sum, z) = windowed_sum(job, i);
        } else {
            accumulate(&mut sum, job.alpha[i], job.omega[i], x);
            z = job.alpha[i] * z + job.omega[i];
        }
        mass[i] = z;
        if job.alpha[i] == F::zero() {
            mean.copy_from_slice(x); // the mean of one token is that token, to the last bit (promise I2)
        } else {
            let share = F::one() / z;
            mean.iter_mut().zip(&sum).for_each(|(mean, &sum)| *mean = sum * share);
        }
    }
}

#[inline(always)]
fn windowed_sum<F: Real>(job: &PoolJob<'_, F>, i: usize) -> (Vec<F>, F) {
    let width = job.width();
    let (mut sum, mut z, mut c) = (vec![F::zero(); width], F::zero(), F::one());
    for t in (job.first(i)..=i).rev() {
        let w = c * job.omega[t];
        accumulate(&mut sum, F::one(), w, &job.x[t * width..][..width]);
        z += w;
        c *= job.alpha[t];
        if c == F::zero() {
            break;
        }
    }
    (sum, z)
}

/// Gradients of a job's inputs; all accumulate.
#[derive(Debug)]
pub(crate) struct PoolJobGrad<'a, F> {
    pub(crate) x: &'a mut [F],
    pub(crate) alpha: &'a mut [F],
    pub(crate) omega: &'a mut [F],
}

/// The adjoint of [`forward`] for output gradients `d_mean [T,E]` and `d_mass [T]`.
#[inline(always)]
pub(crate) fn backward<F: Real>(job: &PoolJob<'_, F>, (d_mean, d_mass): (&[F], &[F]), to: &mut PoolJobGrad<'_, F>) {
    let len = job.alpha.len();
    match job.window {
        None => sweep(job, 0, len, |i| Some((&d_mean[i * job.width()..][..job.width()], d_mass[i])), to),
        Some(_) => {
            for i in 0..len {
                let seed = (&d_mean[i * job.width()..][..job.width()], d_mass[i]);
                sweep(job, job.first(i), i + 1, |t| (t == i).then_some(seed), to);
            }
        }
    }
}

/// Backward recursion over tokens `first..end` with output gradients from `seed` (spec 2.4):
///
/// ```text
/// Xbar_i = dx~_i / Z_i + alpha_{i+1} Xbar_{i+1}      Zbar_i = dz_i - (dx~_i . x~_i) / Z_i + alpha_{i+1} Zbar_{i+1}
/// ```
#[inline(always)]
fn sweep<'s, F: Real>(
    job: &PoolJob<'_, F>,
    first: usize,
    end: usize,
    seed: impl Fn(usize) -> Option<(&'s [F], F)>,
    to: &mut PoolJobGrad<'_, F>,
) {
    let (width, len) = (job.width(), end - first);
    let x = |t: usize| &job.x[t * width..][..width];
    // Sums of the recursion that starts at `first`: all that the window holds.
    let (mut sums, mut z) = (vec![F::zero(); len * width], vec![F::zero(); len]);
    for n in 0..len {
        let t = first + n;
        if n == 0 {
            accumulate(&mut sums[..width], F::zero(), job.omega[t], x(t));
            z[0] = job.omega[t];
        } else {
            let (past, now) = sums.split_at_mut(n * width);
            now[..width].copy_from_slice(&past[(n - 1) * width..]);
            accumulate(&mut now[..width], job.alpha[t], job.omega[t], x(t));
            z[n] = job.alpha[t] * z[n - 1] + job.omega[t];
        }
    }
    let (mut xbar, mut zbar) = (vec![F::zero(); width], F::zero());
    for n in (0..len).rev() {
        let t = first + n;
        if let Some((d_mean, d_mass)) = seed(t) {
            let share = F::one() / z[n];
            let dot = real::dot(d_mean, &sums[n * width..][..width]);
            xbar.iter_mut().zip(d_mean).for_each(|(xbar, &d)| *xbar += d * share);
            zbar += d_mass - dot * share * share;
        }
        accumulate(&mut to.x[t * width..][..width], F::one(), job.omega[t], &xbar);
        to.omega[t] += real::dot(&xbar, x(t)) + zbar;
        if n > 0 {
            to.alpha[t] += real::dot(&xbar, &sums[(n - 1) * width..][..width]) + zbar * z[n - 1];
        }
        xbar.iter_mut().for_each(|xbar| *xbar *= job.alpha[t]);
        zbar *= job.alpha[t];
    }
}
