//! Perplexity over windows of a text, and what the cache held at the end of each.

use crate::error::EvalError;
use kvfold_cache::{Held, Usage};
use kvfold_engine::Engine;
use kvfold_kernels::CacheOps;

/// Cuts tokens into consecutive windows of `window`, an incomplete last one dropped, at most `limit` tokens in all.
pub fn cut(tokens: &[u32], window: usize, limit: Option<usize>) -> Result<Vec<&[u32]>, EvalError> {
    if let Some(limit) = limit.filter(|&limit| limit < window) {
        return Err(EvalError::Limit { limit, window });
    }
    let tokens = &tokens[..tokens.len().min(limit.unwrap_or(usize::MAX))];
    if window < 2 {
        return Err(EvalError::SmallWindow { window });
    }
    if tokens.len() < window {
        return Err(EvalError::TooLittleText { tokens: tokens.len(), window });
    }
    Ok(tokens.chunks_exact(window).collect())
}

/// What caches held at the ends of windows, added up.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    windows: usize,
    tokens: usize,
    slots: Vec<Vec<usize>>,
    usage: Vec<Usage>,
    dense_bytes: usize,
}

impl Measured {
    pub(crate) fn add(&mut self, held: &Held, usage: Usage, dense: Usage) {
        self.dense_bytes += dense.bytes();
        self.windows += 1;
        self.tokens += held.tokens;
        if self.slots.is_empty() {
            self.slots = held.slots.clone();
        } else {
            for (sums, slots) in self.slots.iter_mut().zip(&held.slots) {
                sums.iter_mut().zip(slots).for_each(|(sum, &slots)| *sum += slots);
            }
        }
        self.usage.push(usage);
    }

    /// Tokens seen per slot held, exact recent tokens counted.
    pub fn logical_ratio(&self) -> f64 {
        let (heads, slots) = self.slots.iter().flatten().fold((0, 0), |(n, sum), &slots| (n + 1, sum + slots));
        if slots == 0 { 1.0 } else { (self.tokens * heads) as f64 / slots as f64 }
    }

    /// Tokens seen per slot held, by layer and KV head.
    pub fn heads(&self) -> Vec<Vec<f64>> {
        let ratio = |&slots: &usize| self.tokens as f64 / slots.max(1) as f64;
        self.slots.iter().map(|layer| layer.iter().map(ratio).collect()).collect()
    }

    /// Bytes of the full caches over bytes held, pages and open states counted.
    pub fn physical_ratio(&self) -> f64 {
        let held: usize = self.usage.iter().map(Usage::bytes).sum();
        self.dense_bytes as f64 / held.max(1) as f64
    }

    /// Mean over windows of a part of the memory that the allocator had given out at the end.
    pub fn mean_bytes(&self, part: impl Fn(&Usage) -> usize) -> f64 {
        self.usage.iter().map(|usage| part(usage) as f64).sum::<f64>() / self.windows.max(1) as f64
    }
}

/// Perplexity of a text.
#[derive(Clone, Debug)]
pub struct Perplexity {
    /// Negative log likelihood of all predicted tokens, nats.
    pub nll: f64,
    /// Predicted tokens.
    pub predicted: usize,
    /// What the caches held.
    pub measured: Measured,
}

impl Perplexity {
    /// `exp` of the mean negative log likelihood.
    pub fn value(&self) -> f64 {
        (self.nll / self.predicted.max(1) as f64).exp()
    }
}

/// Perplexity over windows; `on_window` is told how many are done.
pub fn perplexity<O: CacheOps>(
    engine: &mut Engine<O>,
    windows: &[&[u32]],
    mut on_window: impl FnMut(usize),
) -> Result<Perplexity, EvalError> {
    let mut result = Perplexity { nll: 0.0, predicted: 0, measured: Measured::default() };
    for (n, window) in windows.iter().enumerate() {
        let logits = run(engine, window, &mut result.measured)?;
        for (row, &target) in logits.chunks_exact(logits.len() / window.len()).zip(&window[1..]) {
            result.nll -= log_softmax_at(row, target as usize);
            result.predicted += 1;
        }
        on_window(n + 1);
    }
    Ok(result)
}

/// Logits of all of a window's tokens, and what its cache held at the end.
pub(crate) fn run<O: CacheOps>(
    engine: &mut Engine<O>,
    window: &[u32],
    measured: &mut Measured,
) -> Result<Vec<f32>, EvalError> {
    let context = engine.model().shape.context;
    if !(2..=context).contains(&window.len()) {
        return Err(EvalError::Window { window: window.len(), context });
    }
    let mut sequence = engine.sequence();
    let logits = engine.logits(&mut sequence, window)?;
    measured.add(&sequence.held(), engine.usage(&sequence), engine.dense_usage(window.len()));
    Ok(logits)
}

/// `log sum exp` of a row, in f64.
pub(crate) fn log_sum_exp(row: &[f32]) -> f64 {
    let top = row.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
    f64::from(top) + row.iter().map(|&x| f64::from(x - top).exp()).sum::<f64>().ln()
}

fn log_softmax_at(row: &[f32], target: usize) -> f64 {
    f64::from(row[target]) - log_sum_exp(row)
}
