//! The numbers kernels compute with: `f32` in production, `f64` to check gradients against differences.

use num_traits::{Float, NumAssign};

/// A float that kernels are generic over.
pub trait Real: Float + NumAssign + Default + std::iter::Sum + std::fmt::Debug + Send + Sync + 'static {
    /// From a literal or a setting.
    fn of(x: f64) -> Self;
    /// To a statistic.
    fn f64(self) -> f64;
}

impl Real for f32 {
    #[inline(always)]
    fn of(x: f64) -> Self {
        x as f32
    }
    #[inline(always)]
    fn f64(self) -> f64 {
        f64::from(self)
    }
}

impl Real for f64 {
    #[inline(always)]
    fn of(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn f64(self) -> f64 {
        self
    }
}

/// Lanes of the sums below: one AVX-512 register of f32.
pub(crate) const LANES: usize = 16;

/// Sum of a function of every element, in a fixed order: 16 interleaved partial sums, then pairwise. The same for every
/// instruction set.
#[inline(always)]
pub fn sum_of<F: Real>(xs: &[F], f: impl Fn(F) -> F) -> F {
    let mut lanes = [F::zero(); LANES];
    let (whole, rest) = xs.as_chunks::<LANES>();
    for x in whole {
        for l in 0..LANES {
            lanes[l] += f(x[l]);
        }
    }
    if !rest.is_empty() {
        let x = filled(rest, F::zero());
        for l in 0..LANES {
            lanes[l] = if l < rest.len() { lanes[l] + f(x[l]) } else { lanes[l] };
        }
    }
    fold_lanes(lanes)
}

/// Elements that are fewer than fill the lanes, filled up. Lanes whose number the compiler does not know would have to leave
/// their registers.
#[inline(always)]
fn filled<F: Real>(rest: &[F], with: F) -> [F; LANES] {
    let mut lanes = [with; LANES];
    lanes[..rest.len()].copy_from_slice(rest);
    lanes
}

/// Puts a function of every element in its place; the sum of them, in the order of [`sum_of`].
#[inline(always)]
pub fn map_and_sum<F: Real>(xs: &mut [F], f: impl Fn(F) -> F) -> F {
    let mut lanes = [F::zero(); LANES];
    map_onto_lanes(xs, &mut lanes, f);
    fold_lanes(lanes)
}

/// A part of [`map_and_sum`], which is whole once its lanes are folded; every part but the last is a multiple of [`LANES`].
#[inline(always)]
pub(crate) fn map_onto_lanes<F: Real>(xs: &mut [F], lanes: &mut [F; LANES], f: impl Fn(F) -> F) {
    let (whole, rest) = xs.as_chunks_mut::<LANES>();
    for x in whole {
        for l in 0..LANES {
            x[l] = f(x[l]);
            lanes[l] += x[l];
        }
    }
    if !rest.is_empty() {
        let mut x = filled(rest, F::zero());
        for l in 0..LANES {
            x[l] = f(x[l]);
            lanes[l] = if l < rest.len() { lanes[l] + x[l] } else { lanes[l] };
        }
        rest.copy_from_slice(&x[..rest.len()]);
    }
}

/// Sum of a function of every pair of elements, in the order of [`sum_of`].
#[inline(always)]
pub fn sum_of_pairs<F: Real>(xs: &[F], ys: &[F], f: impl Fn(F, F) -> F) -> F {
    let mut lanes = [F::zero(); LANES];
    let len = xs.len().min(ys.len());
    let ((xc, xr), (yc, yr)) = (xs[..len].as_chunks::<LANES>(), ys[..len].as_chunks::<LANES>());
    for (x, y) in xc.iter().zip(yc) {
        for l in 0..LANES {
            lanes[l] += f(x[l], y[l]);
        }
    }
    if !xr.is_empty() {
        let (x, y) = (filled(xr, F::zero()), filled(yr, F::zero()));
        for l in 0..LANES {
            lanes[l] = if l < xr.len() { lanes[l] + f(x[l], y[l]) } else { lanes[l] };
        }
    }
    fold_lanes(lanes)
}

/// Sum of squares, in the order of [`sum_of`].
#[inline(always)]
pub fn sum_squares<F: Real>(xs: &[F]) -> F {
    dot(xs, xs)
}

/// Dot product, in the order of [`sum_of`].
#[inline(always)]
pub fn dot<F: Real>(xs: &[F], ys: &[F]) -> F {
    sum_of_pairs(
        xs,
        ys,
        #[inline(always)]
        |x, y| x * y,
    )
}

/// Sum of a slice, in the order of [`sum_of`].
#[inline(always)]
pub fn total<F: Real>(xs: &[F]) -> F {
    sum_of(
        xs,
        #[inline(always)]
        |x| x,
    )
}

/// Largest element; minus infinity when there is none.
#[inline(always)]
pub fn max<F: Real>(xs: &[F]) -> F {
    // Several registers' worth, since one would wait for itself.
    const WIDE: usize = 4 * LANES;
    let larger = |a: F, b: F| if b > a { b } else { a };
    let mut lanes = [F::neg_infinity(); WIDE];
    let (whole, rest) = xs.as_chunks::<WIDE>();
    for x in whole {
        for l in 0..WIDE {
            lanes[l] = larger(lanes[l], x[l]);
        }
    }
    let (lines, rest) = rest.as_chunks::<LANES>();
    for x in lines {
        for l in 0..LANES {
            lanes[l] = larger(lanes[l], x[l]);
        }
    }
    if !rest.is_empty() {
        let x = filled(rest, F::neg_infinity());
        for l in 0..LANES {
            lanes[l] = larger(lanes[l], x[l]);
        }
    }
    let mut width = WIDE / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] = larger(lanes[l], lanes[l + width]);
        }
        width /= 2;
    }
    lanes[0]
}

#[inline(always)]
pub(crate) fn fold_lanes<F: Real>(mut lanes: [F; LANES]) -> F {
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            let other = lanes[l + width];
            lanes[l] += other;
        }
        width /= 2;
    }
    lanes[0]
}

/// Logistic function, without overflow and with full relative precision for any input. `exp` is the kernel set's own.
#[inline(always)]
pub fn sigmoid<F: Real>(exp: impl Fn(F) -> F, x: F) -> F {
    let e = exp(-x.abs());
    let p = F::one() / (F::one() + e);
    if x >= F::zero() { p } else { e * p }
}

/// `gate * sigmoid(gate) * up`. `exp` is the kernel set's own.
#[inline(always)]
pub(crate) fn swiglu<F: Real>(exp: impl Fn(F) -> F, gate: F, up: F) -> F {
    gate * sigmoid(exp, gate) * up
}

/// `log(1 + exp(x))`, without overflow for any input.
#[inline(always)]
pub fn softplus<F: Real>(x: F) -> F {
    x.max(F::zero()) + (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sigmoid_keeps_its_precision_far_below_zero() {
        for n in -8000..=1000 {
            let x = n as f32 * 0.01;
            let (got, want) = (sigmoid(f32::exp, x).f64(), 1.0 / (1.0 + (-x.f64()).exp()));
            assert!((got - want).abs() <= 3e-7 * want, "sigmoid({x}): {got} {want}");
        }
        assert_eq!(sigmoid(f32::exp, f32::NEG_INFINITY), 0.0);
        assert_eq!(sigmoid(f32::exp, f32::INFINITY), 1.0);
    }

    #[test]
    fn sums_of_lanes_and_tails_add_everything_once() {
        for len in 0..70 {
            let xs: Vec<f64> = (0..len).map(|i| (i * i % 17) as f64 - 5.0).collect();
            let expected: f64 = xs.iter().sum();
            assert_eq!(total(&xs), expected);
            assert_eq!(sum_of(&xs, |x| 2.0 * x), 2.0 * expected);
            assert_eq!(sum_squares(&xs), xs.iter().map(|x| x * x).sum::<f64>());
            assert_eq!(max(&xs), xs.iter().copied().fold(f64::NEG_INFINITY, f64::max));
        }
    }
}
