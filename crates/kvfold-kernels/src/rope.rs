//! Rotary position embedding in the half-rotation layout: channel d pairs with d + D/2.

use crate::real::Real;

/// The table: row p holds `cos(p * f)` for every inverse frequency f, then `sin(p * f)`. Angles are computed in f64.
pub(crate) fn table<F: Real>(inv_freq: &[f64], positions: usize) -> Vec<F> {
    let mut table = Vec::with_capacity(positions * inv_freq.len() * 2);
    for p in 0..positions {
        let angle = |f: &f64| p as f64 * f;
        table.extend(inv_freq.iter().map(|f| F::of(angle(f).cos())));
        table.extend(inv_freq.iter().map(|f| F::of(angle(f).sin())));
    }
    table
}

/// Rotates one head by a row of the table; `sign` -1 rotates back.
#[inline(always)]
pub(crate) fn rotate<F: Real>(x: &[F], row: &[F], sign: F, y: &mut [F]) {
    let half = x.len() / 2;
    let (cos, sin) = row.split_at(half);
    let (x1, x2) = x.split_at(half);
    let (y1, y2) = y.split_at_mut(half);
    let halves = y1.iter_mut().zip(y2).zip(x1.iter().zip(x2)).zip(cos.iter().zip(sin));
    for (((y1, y2), (&x1, &x2)), (&cos, &sin)) in halves {
        *y1 = x1 * cos - x2 * sin * sign;
        *y2 = x2 * cos + x1 * sin * sign;
    }
}

/// Rotates every head of a row of `heads * D` channels.
#[inline(always)]
pub(crate) fn rotate_row<F: Real>(x: &[F], row: &[F], sign: F, y: &mut [F]) {
    for (x, y) in x.chunks_exact(row.len()).zip(y.chunks_exact_mut(row.len())) {
        rotate(x, row, sign, y);
    }
}
