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
    let (width, len) = (job.width(), job.alpha.len());
    match job.window {
        None => sweep(job, (d_mean, d_mass), to),
        Some(window) => {
            let mut terms = Vec::with_capacity(window);
            for i in 0..len {
                windowed_grad(job, i, (&d_mean[i * width..][..width], d_mass[i]), &mut terms, to);
            }
        }
    }
}

/// A token in the windowed sum of a newer one.
#[derive(Clone, Copy, Debug)]
struct Term<F> {
    /// Its coefficient C.
    c: F,
    /// Output gradient times its x.
    dot: F,
}

/// What the mean and the mass at i give to the window's tokens (spec 2.4): with weights `w_t = C_t omega_t` that sum to Z,
///
/// ```text
/// wbar_t = (dx~ . x_t - dx~ . x~) / Z + dz      xbar_t += dx~ w_t / Z
/// omegabar_t += C_t wbar_t      Cbar_t = omega_t wbar_t + alpha_t Cbar_{t-1}      alphabar_t += C_t Cbar_{t-1}
/// ```
#[inline(always)]
fn windowed_grad<F: Real>(
    job: &PoolJob<'_, F>,
    i: usize,
    (d_mean, d_mass): (&[F], F),
    terms: &mut Vec<Term<F>>,
    to: &mut PoolJobGrad<'_, F>,
) {
    let (width, first) = (job.width(), job.first(i));
    terms.clear();
    let (mut c, mut z, mut sum) = (F::one(), F::zero(), F::zero());
    for t in (first..=i).rev() {
        let dot = real::dot(d_mean, &job.x[t * width..][..width]);
        z += c * job.omega[t];
        sum += c * job.omega[t] * dot;
        terms.push(Term { c, dot });
        c *= job.alpha[t];
    }
    let share = F::one() / z;
    let mean = sum * share;
    // Of the coefficient of the token before.
    let mut c_bar = F::zero();
    for (t, &Term { c, dot }) in (first..=i).zip(terms.iter().rev()) {
        to.alpha[t] += c * c_bar;
        let w_bar = (dot - mean) * share + d_mass;
        to.omega[t] += c * w_bar;
        c_bar = job.omega[t] * w_bar + job.alpha[t] * c_bar;
        accumulate(&mut to.x[t * width..][..width], F::one(), c * job.omega[t] * share, d_mean);
    }
}

/// Backward recursion without a window (spec 2.4):
///
/// ```text
/// Xbar_i = dx~_i / Z_i + alpha_{i+1} Xbar_{i+1}      Zbar_i = dz_i - (dx~_i . x~_i) / Z_i + alpha_{i+1} Zbar_{i+1}
/// ```
#[inline(always)]
fn sweep<F: Real>(job: &PoolJob<'_, F>, (d_mean, d_mass): (&[F], &[F]), to: &mut PoolJobGrad<'_, F>) {
    let (width, len) = (job.width(), job.alpha.len());
    let x = |t: usize| &job.x[t * width..][..width];
    let (mut sums, mut z) = (vec![F::zero(); len * width], vec![F::zero(); len]);
    for t in 0..len {
        if t == 0 {
            accumulate(&mut sums[..width], F::zero(), job.omega[t], x(t));
            z[0] = job.omega[t];
        } else {
            let (past, now) = sums.split_at_mut(t * width);
            now[..width].copy_from_slice(&past[(t - 1) * width..]);
            accumulate(&mut now[..width], job.alpha[t], job.omega[t], x(t));
            z[t] = job.alpha[t] * z[t - 1] + job.omega[t];
        }
    }
    let (mut xbar, mut zbar) = (vec![F::zero(); width], F::zero());
    for t in (0..len).rev() {
        let (d_mean, share) = (&d_mean[t * width..][..width], F::one() / z[t]);
        let dot = real::dot(d_mean, &sums[t * width..][..width]);
        xbar.iter_mut().zip(d_mean).for_each(|(xbar, &d)| *xbar += d * share);
        zbar += d_mass[t] - dot * share * share;
        accumulate(&mut to.x[t * width..][..width], F::one(), job.omega[t], &xbar);
        to.omega[t] += real::dot(&xbar, x(t)) + zbar;
        if t > 0 {
            to.alpha[t] += real::dot(&xbar, &sums[(t - 1) * width..][..width]) + zbar * z[t - 1];
        }
        xbar.iter_mut().for_each(|xbar| *xbar *= job.alpha[t]);
        zbar *= job.alpha[t];
    }
}
