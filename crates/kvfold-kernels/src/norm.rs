//! Root-mean-square norm: `y = x / sqrt(mean(x^2) + eps) * w`, per row of as many channels as `w` has.

use crate::real::{self, Real};

#[inline(always)]
fn inverse_rms<F: Real>(x: &[F], eps: F) -> F {
    F::one() / (real::sum_squares(x) / F::of(x.len() as f64) + eps).sqrt()
}

/// Rows of `y` from rows of `x`.
#[inline(always)]
pub(crate) fn forward<F: Real>(x: &[F], w: &[F], eps: F, y: &mut [F]) {
    for (x, y) in x.chunks_exact(w.len()).zip(y.chunks_exact_mut(w.len())) {
        let r = inverse_rms(x, eps);
        for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
            *y = x * r * w;
        }
    }
}

/// Rows of the gradient of `x`, added to what `dx` holds, and of `w` summed over these rows into `dw`.
///
/// With `r = 1/rms` and `g = d*w`: `dx = r*g - x * r^3 * mean(g*x)`, `dw = sum d*x*r`.
#[inline(always)]
pub(crate) fn backward<F: Real>((x, w, eps): (&[F], &[F], F), d: &[F], dx: &mut [F], dw: &mut [F]) {
    let cols = w.len();
    let mut g = vec![F::zero(); cols];
    let rows = x.chunks_exact(cols).zip(d.chunks_exact(cols)).zip(dx.chunks_exact_mut(cols));
    for ((x, d), dx) in rows {
        let r = inverse_rms(x, eps);
        for c in 0..cols {
            g[c] = d[c] * w[c];
            dw[c] += d[c] * x[c] * r;
        }
        let mean = real::dot(&g, x) / F::of(cols as f64);
        let pull = mean * r * r * r;
        for ((dx, &g), &x) in dx.iter_mut().zip(&g).zip(x) {
            *dx += g * r - x * pull;
        }
    }
}
