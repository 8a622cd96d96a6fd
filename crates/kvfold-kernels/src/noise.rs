//! Noise from a counter: each number is a function of its place, so recomputing a segment or resuming a run draws the
//! same numbers, whatever the batch, the thread count or the order (spec pitfall 13).

/// The place of a batch's noise in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoiseKey {
    /// Seed of the run.
    pub seed: u64,
    /// Optimiser step.
    pub step: u64,
    /// Layer of the model.
    pub layer: u64,
}

/// The finaliser of SplitMix64: a bijection whose output bits all depend on all input bits.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// A hash of a few words, for keys of counters.
pub fn hash(words: &[u64]) -> u64 {
    const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
    words.iter().fold(GOLDEN, |h, &w| mix((h ^ mix(w.wrapping_add(GOLDEN))).wrapping_add(GOLDEN)))
}

/// A number strictly between 0 and 1, from the 53 high bits.
pub fn unit(bits: u64) -> f64 {
    ((bits >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

/// Standard logistic noise (the difference of two Gumbels) for `n` places: `ln u - ln(1-u)`.
pub fn logistic(key: NoiseKey, n: usize) -> Vec<f32> {
    logistic_at(key, 0..n)
}

/// The noise of [`logistic`] for some of its places: a part of a batch draws what it would draw in the whole.
pub fn logistic_at(key: NoiseKey, places: std::ops::Range<usize>) -> Vec<f32> {
    let stream = hash(&[key.seed, key.step, key.layer]);
    (places.start as u64..places.end as u64)
        .map(|place| {
            let u = unit(hash(&[stream, place]));
            (u.ln() - (-u).ln_1p()) as f32
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logistic_noise_has_its_mean_and_variance() {
        let n = 200_000;
        let xs = logistic(NoiseKey { seed: 1, step: 2, layer: 3 }, n);
        let mean = xs.iter().map(|&x| f64::from(x)).sum::<f64>() / n as f64;
        let variance = xs.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n as f64;
        assert!(mean.abs() < 0.02, "{mean}");
        assert!((variance - std::f64::consts::PI.powi(2) / 3.0).abs() < 0.05, "{variance}");
    }

    #[test]
    fn every_part_of_the_key_matters_and_prefixes_agree() {
        let key = NoiseKey { seed: 1, step: 2, layer: 3 };
        let xs = logistic(key, 64);
        assert_eq!(logistic(key, 100)[..64], xs);
        assert_eq!(logistic_at(key, 17..64), xs[17..]);
        for other in [NoiseKey { seed: 2, ..key }, NoiseKey { step: 3, ..key }, NoiseKey { layer: 4, ..key }] {
            assert!(logistic(other, 64).iter().zip(&xs).all(|(a, b)| a != b));
        }
    }
}
