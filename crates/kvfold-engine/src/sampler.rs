//! From logits to a token.

use kvfold_kernels::noise::{hash, unit};

/// How tokens are chosen. Draws are a function of (seed, stream, position), so a sequence's text depends on nothing that
/// runs beside it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampler {
    /// 0 takes the most likely token; above 0 divides the logits.
    pub temperature: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Sampler {
    /// The most likely token, always.
    pub const GREEDY: Self = Self { temperature: 0.0, seed: 0 };

    /// The token for a row of logits; of equally likely ones the first.
    pub fn sample(&self, logits: &[f32], (stream, position): (u64, u64)) -> u32 {
        let best = (1..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
        if self.temperature <= 0.0 {
            return best as u32;
        }
        let weight = |&x: &f32| (f64::from(x - logits[best]) / self.temperature).exp();
        let total: f64 = logits.iter().map(weight).sum();
        let mut left = unit(hash(&[self.seed, stream, position])) * total;
        for (i, x) in logits.iter().enumerate() {
            left -= weight(x);
            if left < 0.0 {
                return i as u32;
            }
        }
        best as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_the_distribution() {
        let logits = [0.0f32, 2.0f32.ln(), 5.0f32.ln()];
        let sampler = Sampler { temperature: 1.0, seed: 3 };
        let mut counts = [0; 3];
        (0..80_000).for_each(|n| counts[sampler.sample(&logits, (0, n)) as usize] += 1);
        for (count, want) in counts.into_iter().zip([10_000.0, 20_000.0, 50_000.0]) {
            assert!((f64::from(count) - want).abs() < 600.0, "{counts:?}");
        }
    }

    #[test]
    fn a_low_temperature_approaches_greedy() {
        let logits = [1.0f32, 3.0, 2.9, -5.0];
        assert_eq!(Sampler::GREEDY.sample(&logits, (0, 0)), 1);
        let cold = Sampler { temperature: 1e-3, seed: 0 };
        assert!((0..200).all(|n| cold.sample(&logits, (1, n)) == 1));
    }
}
