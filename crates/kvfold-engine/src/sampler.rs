//! From logits to a token.
//!
//! In this order, as vLLM does: the bias and the penalties change logits; the temperature divides them; `min_p`, `top_k` and
//! `top_p` each take away what is too unlikely of what the one before left; the rest is drawn from.

use kvfold_kernels::noise::{hash, unit};
use std::cmp::Ordering;

/// How tokens are chosen. Draws are a function of (seed, stream, position), so a sequence's text depends on nothing that
/// runs beside it.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampler {
    /// 0 takes the most likely token; above 0 divides the logits.
    pub temperature: f64,
    /// Seed of the draws.
    pub seed: u64,
    /// Tokens that are drawn from at most; 0 for all.
    pub top_k: usize,
    /// The most likely tokens that have this probability together are drawn from; 1 for all.
    pub top_p: f64,
    /// Tokens that have less than this share of the most likely one's probability are not drawn; 0 for all.
    pub min_p: f64,
    /// Divides the positive logits of tokens that the prompt or the text has, and multiplies the negative ones; 1 for none.
    pub repetition_penalty: f64,
    /// Taken from the logits of tokens that the new text has.
    pub presence_penalty: f64,
    /// The same, as often as it has them.
    pub frequency_penalty: f64,
    /// Added to the logits of tokens.
    pub bias: Vec<(u32, f32)>,
}

/// A setting that means nothing.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("`{setting}` is {found}; expected {expected}")]
pub struct BadSampler {
    /// The setting.
    pub setting: &'static str,
    /// What it is.
    pub found: String,
    /// What it may be.
    pub expected: &'static str,
}

/// Where a token is drawn: what comes before it, and which draw it is.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Tokens of the prompt.
    pub prompt: &'a [u32],
    /// New tokens.
    pub new: &'a [u32],
    /// Of draws with one seed, which stream.
    pub stream: u64,
}

impl Default for Sampler {
    fn default() -> Self {
        Self::GREEDY
    }
}

impl Sampler {
    /// The most likely token, always.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        seed: 0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        bias: Vec::new(),
    };

    /// Says whether all settings mean something for a vocabulary.
    pub fn validate(&self, vocab: usize) -> Result<(), BadSampler> {
        let must = |holds: bool, setting, found: &dyn ToString, expected| match holds {
            true => Ok(()),
            false => Err(BadSampler { setting, found: found.to_string(), expected }),
        };
        let within = |x: f64, low: f64, high: f64| x.is_finite() && (low..=high).contains(&x);
        must(within(self.temperature, 0.0, 100.0), "temperature", &self.temperature, "a number from 0 to 100")?;
        must(within(self.top_p, 0.0, 1.0) && self.top_p > 0.0, "top_p", &self.top_p, "a number above 0, at most 1")?;
        must(within(self.min_p, 0.0, 1.0), "min_p", &self.min_p, "a number from 0 to 1")?;
        let repetition = self.repetition_penalty;
        let positive = repetition.is_finite() && repetition > 0.0;
        must(positive, "repetition_penalty", &repetition, "a number above 0; 1 for none")?;
        let penalties = [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)];
        for (setting, penalty) in penalties {
            must(within(penalty, -2.0, 2.0), setting, &penalty, "a number from -2 to 2")?;
        }
        for (token, bias) in &self.bias {
            must((*token as usize) < vocab, "logit_bias", token, "tokens of the model's vocabulary")?;
            must(within(f64::from(*bias), -100.0, 100.0), "logit_bias", bias, "numbers from -100 to 100")?;
        }
        Ok(())
    }

    /// The token for a row of logits; of equally likely ones the first.
    pub fn sample(&self, logits: &[f32], place: Place<'_>) -> u32 {
        let changed = self.changed(logits, place);
        let logits = changed.as_deref().unwrap_or(logits);
        let best = most_likely(logits);
        if self.temperature <= 0.0 {
            return best as u32;
        }
        let weight = |&x: &f32| (f64::from(x - logits[best]) / self.temperature).exp();
        let mut weights: Vec<f64> = logits.iter().map(weight).collect();
        self.cut(logits, &mut weights);
        let total: f64 = weights.iter().sum();
        let position = (place.prompt.len() + place.new.len()) as u64;
        let mut left = unit(hash(&[self.seed, place.stream, position])) * total;
        for (token, weight) in weights.into_iter().enumerate() {
            left -= weight;
            if left < 0.0 {
                return token as u32;
            }
        }
        best as u32
    }

    /// The logits with bias and penalties; none where there are none.
    fn changed(&self, logits: &[f32], Place { prompt, new, .. }: Place<'_>) -> Option<Vec<f32>> {
        let repeats = self.repetition_penalty != 1.0;
        let counts = self.presence_penalty != 0.0 || self.frequency_penalty != 0.0;
        if !repeats && !counts && self.bias.is_empty() {
            return None;
        }
        let mut changed = logits.to_vec();
        for &(token, bias) in &self.bias {
            changed[token as usize] += bias;
        }
        if repeats {
            let mut seen = [prompt, new].concat();
            seen.sort_unstable();
            seen.dedup();
            let penalty = self.repetition_penalty as f32;
            for token in seen {
                let logit = &mut changed[token as usize];
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
        if counts {
            let mut written = new.to_vec();
            written.sort_unstable();
            for same in written.chunk_by(|a, b| a == b) {
                let taken = self.presence_penalty + self.frequency_penalty * same.len() as f64;
                changed[same[0] as usize] -= taken as f32;
            }
        }
        Some(changed)
    }

    /// Takes the weights of what is not drawn from; 1 is the most likely token's.
    fn cut(&self, logits: &[f32], weights: &mut [f64]) {
        if self.min_p > 0.0 {
            weights.iter_mut().filter(|weight| **weight < self.min_p).for_each(|weight| *weight = 0.0);
        }
        if self.top_k == 0 && self.top_p >= 1.0 {
            return;
        }
        let mut order: Vec<u32> = (0..weights.len() as u32).filter(|&token| weights[token as usize] > 0.0).collect();
        let likelier = |a: &u32, b: &u32| by_likelihood(logits, *a, *b);
        if (1..order.len()).contains(&self.top_k) {
            let (_, _, rest) = order.select_nth_unstable_by(self.top_k - 1, likelier);
            rest.iter().for_each(|&token| weights[token as usize] = 0.0);
            order.truncate(self.top_k);
        }
        if self.top_p < 1.0 {
            order.sort_unstable_by(likelier);
            let enough = self.top_p * weights.iter().sum::<f64>();
            let mut sum = 0.0;
            for token in order {
                let weight = &mut weights[token as usize];
                if sum >= enough {
                    *weight = 0.0;
                }
                sum += *weight;
            }
        }
    }
}

/// The first of the most likely tokens.
fn most_likely(logits: &[f32]) -> usize {
    (1..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best })
}

/// Likelier tokens first, of equally likely ones the first.
fn by_likelihood(logits: &[f32], a: u32, b: u32) -> Ordering {
    logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b))
}

/// Natural logarithms of probabilities of one place, as the model has them: before any sampling setting.
#[derive(Clone, Debug, PartialEq)]
pub struct LogProbs {
    /// Of the token that is there.
    pub token: f64,
    /// Of the most likely tokens, likeliest first.
    pub top: Vec<(u32, f64)>,
}

impl LogProbs {
    /// Those of a row of logits, with the `top` most likely tokens.
    pub fn of(logits: &[f32], token: u32, top: usize) -> Self {
        let highest = f64::from(logits[most_likely(logits)]);
        let sum = highest + logits.iter().map(|&x| (f64::from(x) - highest).exp()).sum::<f64>().ln();
        let of = |token: u32| f64::from(logits[token as usize]) - sum;
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let likelier = |a: &u32, b: &u32| by_likelihood(logits, *a, *b);
        if (1..order.len()).contains(&top) {
            order.select_nth_unstable_by(top - 1, likelier);
        }
        order.truncate(top);
        order.sort_unstable_by(likelier);
        Self { token: of(token), top: order.into_iter().map(|token| (token, of(token))).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.9, -5.0, 3.0];

    /// Shares of the tokens in many draws.
    fn drawn(sampler: &Sampler, logits: &[f32]) -> Vec<f64> {
        const DRAWS: usize = 40_000;
        let mut counts = vec![0; logits.len()];
        for n in 0..DRAWS {
            let place = Place { prompt: &[], new: &[], stream: n as u64 };
            counts[sampler.sample(logits, place) as usize] += 1;
        }
        counts.into_iter().map(|count| f64::from(count) / DRAWS as f64).collect()
    }

    fn close(found: &[f64], wanted: &[f64]) {
        for (found, wanted) in found.iter().zip(wanted) {
            assert!((found - wanted).abs() < 0.01 && (*wanted > 0.0 || *found == 0.0), "{found}, expected {wanted}");
        }
    }

    fn warm() -> Sampler {
        Sampler { temperature: 1.0, seed: 3, ..Sampler::GREEDY }
    }

    fn next(sampler: &Sampler, logits: &[f32], prompt: &[u32], new: &[u32]) -> u32 {
        sampler.sample(logits, Place { prompt, new, stream: 0 })
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits = [0.0f32, 2.0f32.ln(), 5.0f32.ln()];
        close(&drawn(&warm(), &logits), &[0.125, 0.25, 0.625]);
        let hot = Sampler { temperature: 2.0, ..warm() };
        let roots: Vec<f64> = [1.0f64, 2.0, 5.0].iter().map(|p| p.sqrt()).collect();
        let total: f64 = roots.iter().sum();
        close(&drawn(&hot, &logits), &roots.iter().map(|root| root / total).collect::<Vec<_>>());
    }

    #[test]
    fn a_low_temperature_approaches_greedy() {
        assert_eq!(next(&Sampler::GREEDY, &LOGITS, &[], &[]), 1, "the first of two");
        let cold = Sampler { temperature: 1e-3, ..Sampler::GREEDY };
        let unlike = [1.0f32, 3.0, 2.9, -5.0];
        assert!((0..200).all(|n| cold.sample(&unlike, Place { prompt: &[], new: &[], stream: n }) == 1));
    }

    #[test]
    fn what_is_too_unlikely_is_never_drawn() {
        // Probabilities 0.4, 0.3, 0.2, 0.1.
        let logits = [0.4f32.ln(), 0.1f32.ln(), 0.3f32.ln(), 0.2f32.ln()];
        let drawn = |sampler: Sampler| drawn(&sampler, &logits);
        close(&drawn(Sampler { top_k: 2, ..warm() }), &[4.0 / 7.0, 0.0, 3.0 / 7.0, 0.0]);
        close(&drawn(Sampler { top_k: 9, ..warm() }), &[0.4, 0.1, 0.3, 0.2]);
        close(&drawn(Sampler { top_p: 0.65, ..warm() }), &[4.0 / 7.0, 0.0, 3.0 / 7.0, 0.0]);
        close(&drawn(Sampler { top_p: 0.75, ..warm() }), &[4.0 / 9.0, 0.0, 3.0 / 9.0, 2.0 / 9.0]);
        close(&drawn(Sampler { top_p: 1e-9, ..warm() }), &[1.0, 0.0, 0.0, 0.0]);
        close(&drawn(Sampler { min_p: 0.6, ..warm() }), &[4.0 / 7.0, 0.0, 3.0 / 7.0, 0.0]);
        close(&drawn(Sampler { min_p: 1.0, ..warm() }), &[1.0, 0.0, 0.0, 0.0]);
        // Each takes of what the one before it left: of 4/7 and 3/7, the first is enough.
        close(&drawn(Sampler { min_p: 0.6, top_p: 0.55, ..warm() }), &[1.0, 0.0, 0.0, 0.0]);
        // Of equally likely ones the first.
        let like = [0.0f32; 6];
        close(&super::tests::drawn(&Sampler { top_k: 2, ..warm() }, &like), &[0.5, 0.5, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn penalties_and_bias_change_logits() {
        let greedy = |sampler: Sampler, prompt: &[u32], new: &[u32]| next(&sampler, &LOGITS, prompt, new);
        let bias = Sampler { bias: vec![(3, 100.0)], ..Sampler::GREEDY };
        assert_eq!(greedy(bias, &[], &[]), 3);
        let banned = Sampler { bias: vec![(1, -100.0), (4, -100.0)], ..Sampler::GREEDY };
        assert_eq!(greedy(banned, &[], &[]), 2);
        // 3.0 / 1.2 is below 2.9; a negative logit falls, too.
        let repetition = Sampler { repetition_penalty: 1.2, ..Sampler::GREEDY };
        assert_eq!(greedy(repetition.clone(), &[1], &[4, 4]), 2);
        assert_eq!(next(&repetition, &[-1.0, -1.1], &[0], &[]), 1);
        // The prompt does not count for these.
        let presence = Sampler { presence_penalty: 0.2, ..Sampler::GREEDY };
        assert_eq!((greedy(presence.clone(), &[1, 4], &[]), greedy(presence, &[], &[1, 4])), (1, 2));
        let frequency = Sampler { frequency_penalty: 0.06, ..Sampler::GREEDY };
        assert_eq!((greedy(frequency.clone(), &[], &[1, 4]), greedy(frequency, &[], &[1, 4, 1, 4])), (1, 2));
    }

    #[test]
    fn settings_that_mean_nothing_are_named() {
        let refused = |setting: &str, sampler: Sampler| {
            let error = sampler.validate(5).unwrap_err();
            assert!(error.setting == setting && error.to_string().contains("expected"), "{error}");
        };
        let base = Sampler::GREEDY;
        base.validate(5).unwrap();
        refused("temperature", Sampler { temperature: -0.1, ..base.clone() });
        refused("temperature", Sampler { temperature: f64::NAN, ..base.clone() });
        refused("top_p", Sampler { top_p: 0.0, ..base.clone() });
        refused("min_p", Sampler { min_p: 1.1, ..base.clone() });
        refused("repetition_penalty", Sampler { repetition_penalty: 0.0, ..base.clone() });
        refused("presence_penalty", Sampler { presence_penalty: 2.1, ..base.clone() });
        refused("frequency_penalty", Sampler { frequency_penalty: f64::INFINITY, ..base.clone() });
        refused("logit_bias", Sampler { bias: vec![(5, 0.0)], ..base.clone() });
        refused("logit_bias", Sampler { bias: vec![(4, 101.0)], ..base });
    }

    #[test]
    fn log_probabilities_are_the_models_own() {
        let logits = [0.4f32.ln() + 3.0, 0.1f32.ln() + 3.0, 0.3f32.ln() + 3.0, 0.2f32.ln() + 3.0];
        let LogProbs { token, top } = LogProbs::of(&logits, 1, 2);
        assert!((token - 0.1f64.ln()).abs() < 1e-6);
        assert_eq!(top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [0, 2]);
        assert!((top[1].1 - 0.3f64.ln()).abs() < 1e-6);
        assert_eq!(LogProbs::of(&logits, 0, 0).top, []);
        let all = LogProbs::of(&logits, 0, 9).top;
        assert!(all.len() == 4 && (all.iter().map(|(_, p)| p.exp()).sum::<f64>() - 1.0).abs() < 1e-6);
    }
}
