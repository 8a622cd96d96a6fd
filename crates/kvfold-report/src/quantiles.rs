//! Mean, P95 and P99 of a set of samples.

use serde::{Deserialize, Serialize};

/// What a distribution looks like in its middle and in its tail.
///
/// A mean divergence hides the few positions where a compressed model goes
/// astray, and those are the ones a reader of its text notices. So the tail
/// always travels with the mean.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    /// The arithmetic mean.
    #[serde(deserialize_with = "crate::non_finite::nullable")]
    pub mean: f64,
    /// The smallest sample that at least 95 % of the samples do not exceed.
    #[serde(deserialize_with = "crate::non_finite::nullable")]
    pub p95: f64,
    /// The smallest sample that at least 99 % of the samples do not exceed.
    #[serde(deserialize_with = "crate::non_finite::nullable")]
    pub p99: f64,
}

impl Quantiles {
    /// Computes the three by the nearest-rank method: each quantile is one of
    /// the samples, never a value in between. Gives nothing without samples.
    ///
    /// NaN sorts above every number, so a model that breaks at more than one
    /// position in a hundred shows it in P99, and one that breaks at all in the
    /// mean.
    pub fn of(samples: impl IntoIterator<Item = f64>) -> Option<Quantiles> {
        let mut samples: Vec<f64> = samples.into_iter().collect();
        if samples.is_empty() {
            return None;
        }
        let mean = samples.iter().sum::<f64>() / samples.len() as f64;
        for sample in &mut samples {
            // A NaN with its sign bit set would sort below every number.
            if sample.is_nan() {
                *sample = f64::NAN;
            }
        }
        samples.sort_unstable_by(f64::total_cmp);
        let rank = |percent: usize| (samples.len() * percent).div_ceil(100) - 1;
        Some(Quantiles { mean, p95: samples[rank(95)], p99: samples[rank(99)] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_to_a_hundred_in_any_order() {
        let q = Quantiles::of((1..=100).rev().map(f64::from)).expect("samples");
        assert_eq!(q, Quantiles { mean: 50.5, p95: 95.0, p99: 99.0 });
    }

    #[test]
    fn nearest_rank_takes_a_sample_and_rounds_the_rank_up() {
        // 0.95 * 21 = 19.95, so rank 20 of 21; 0.99 * 21 = 20.79, so rank 21.
        let q = Quantiles::of((1..=21).map(f64::from)).expect("samples");
        assert_eq!((q.p95, q.p99), (20.0, 21.0));
        let q = Quantiles::of([7.0]).expect("samples");
        assert_eq!(q, Quantiles { mean: 7.0, p95: 7.0, p99: 7.0 });
    }

    #[test]
    fn no_samples_no_quantiles() {
        assert_eq!(Quantiles::of([]), None);
    }

    #[test]
    fn nan_of_either_sign_counts_as_the_worst() {
        let q = Quantiles::of([-f64::NAN, 1.0, 2.0]).expect("samples");
        assert!(q.mean.is_nan() && q.p99.is_nan());
    }
}
