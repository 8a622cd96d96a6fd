//! Prefill and decode of a batch, engine against engine: what `kvfold bench model` measures.
//!
//! Within a round the engines take turns, so a machine that slows down slows all of them. Depth is reached by a real
//! prefill, once per engine: a cache cannot go back, so every round of decoding goes on where the one before stopped, and
//! a rate belongs to the depths that its rounds went through.

use crate::error::EvalError;
use crate::speed::median;
use kvfold_engine::{Engine, Sequence};
use kvfold_kernels::ops::Precision;
use kvfold_kernels::{CacheOps, FastCpu, Ops};
use kvfold_model::Loaded;
use serde::Serialize;
use std::ops::Range;
use std::time::Instant;

/// Sequences that are computed together, and the tokens of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Batch {
    /// Sequences.
    pub sequences: usize,
    /// Tokens of each: of a prompt, or before the first that is decoded.
    pub tokens: usize,
}

/// Tokens per second of all sequences together, over rounds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rates {
    /// The median.
    pub median: f64,
    /// The slowest round.
    pub min: f64,
    /// The fastest round.
    pub max: f64,
    /// Every round, in order.
    pub rounds: Vec<f64>,
}

impl Rates {
    fn of(rounds: Vec<f64>) -> Self {
        let (min, max) = rounds.iter().fold((f64::INFINITY, 0.0f64), |(min, max), &x| (min.min(x), max.max(x)));
        Self { median: median(rounds.clone()), min, max, rounds }
    }
}

/// The caches of all sequences of a row, as the allocator counts them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Caches {
    /// Bytes held: whole pages and open states.
    pub bytes: f64,
    /// Bytes of full caches of as many tokens.
    pub dense_bytes: f64,
    /// Tokens seen per slot held.
    pub logical_ratio: f64,
}

impl Caches {
    fn of<O: CacheOps>(engine: &Engine<O>, sequences: &[Sequence]) -> Self {
        let (mut bytes, mut dense_bytes, mut seen, mut slots) = (0, 0, 0, 0);
        for sequence in sequences {
            let held = sequence.held();
            bytes += engine.usage(sequence).bytes();
            dense_bytes += engine.dense_usage(held.tokens).bytes();
            seen += held.tokens * held.slots.iter().map(Vec::len).sum::<usize>();
            slots += held.slots.iter().flatten().sum::<usize>();
        }
        let logical_ratio = if slots == 0 { 1.0 } else { seen as f64 / slots as f64 };
        Self { bytes: bytes as f64, dense_bytes: dense_bytes as f64, logical_ratio }
    }

    /// The means of several looks.
    fn mean(looks: &[Self]) -> Self {
        let mean = |of: fn(&Self) -> f64| looks.iter().map(of).sum::<f64>() / looks.len().max(1) as f64;
        Self {
            bytes: mean(|look| look.bytes),
            dense_bytes: mean(|look| look.dense_bytes),
            logical_ratio: mean(|look| look.logical_ratio),
        }
    }

    /// Bytes of full caches over bytes held.
    pub fn physical_ratio(&self) -> f64 {
        if self.bytes == 0.0 { 1.0 } else { self.dense_bytes / self.bytes }
    }
}

/// What one step of decoding must read and compute with weights.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepCost {
    /// Bytes of all weights that every step reads, as they are held; not those of an embedding table that makes no logits.
    pub weight_bytes: usize,
    /// Floating-point operations of the products with weights, logits included, for one token.
    pub flops: f64,
    /// Those of the logits alone, which prefill makes of the last token only.
    pub logit_flops: f64,
    /// How weights are held and multiplied.
    pub precision: Precision,
}

impl StepCost {
    /// The cost of a loaded model.
    pub fn of(model: &Loaded<FastCpu>, precision: Precision) -> Self {
        let weights = &model.weights;
        let blocks = || weights.blocks.iter().flat_map(|block| block.list());
        let read = blocks().chain([&weights.norm, weights.unembed()]);
        let flops = |w: &<FastCpu as Ops>::Tensor| match *model.ops.shape(w) {
            [outputs, inputs] => 2.0 * (outputs * inputs) as f64,
            _ => 0.0,
        };
        let logit_flops = flops(weights.unembed());
        Self {
            weight_bytes: read.map(|w| w.read_bytes()).sum(),
            flops: blocks().map(flops).sum::<f64>() + logit_flops,
            logit_flops,
            precision,
        }
    }

    /// Floating-point operations of the products with weights in a prefill.
    pub fn prefill_flops(&self, batch: Batch) -> f64 {
        batch.sequences as f64 * (batch.tokens as f64 * (self.flops - self.logit_flops) + self.logit_flops)
    }

    /// Bytes that a step must read beside caches of so many bytes.
    pub fn step_bytes(&self, cache_bytes: f64) -> f64 {
        self.weight_bytes as f64 + cache_bytes
    }

    /// Tokens per second of `sequences` together where nothing but reading these bytes takes time.
    pub fn byte_ceiling(&self, sequences: usize, cache_bytes: f64, bandwidth: f64) -> f64 {
        sequences as f64 * bandwidth / self.step_bytes(cache_bytes)
    }

    /// How many times faster the same weights decode with these caches than with full ones, where nothing but reading
    /// bytes takes time: `(W + B*T*k) / (W + B*T*k/CR)`.
    pub fn byte_speed_up(&self, caches: &Caches) -> f64 {
        self.step_bytes(caches.dense_bytes) / self.step_bytes(caches.bytes)
    }
}

/// A measured row of one engine.
#[derive(Clone, Debug, Serialize)]
pub struct Throughput {
    /// Tokens per second.
    pub rates: Rates,
    /// The caches: after prefill, or the mean over the rounds of decoding.
    pub caches: Caches,
}

/// Prefill of each window's first `batch.tokens` tokens, all sequences together, `rounds` times per engine; fresh caches
/// every time. `on_run` hears of each run.
pub fn prefill<O: CacheOps>(
    engines: &mut [&mut Engine<O>],
    windows: &[&[u32]],
    (batch, rounds): (Batch, usize),
    mut on_run: impl FnMut(),
) -> Result<Vec<Throughput>, EvalError> {
    let windows = ensure(windows, batch, (1, rounds), 0)?;
    let mut measured: Vec<(Vec<f64>, Vec<Caches>)> = vec![Default::default(); engines.len()];
    for _ in 0..rounds {
        for (engine, (rates, caches)) in engines.iter_mut().zip(&mut measured) {
            let mut sequences = empty(engine, batch.sequences);
            let seconds = timed(|| feed(engine, &mut sequences, windows, 0..batch.tokens))?;
            rates.push((batch.sequences * batch.tokens) as f64 / seconds);
            caches.push(Caches::of(engine, &sequences));
            on_run();
        }
    }
    Ok(measured.into_iter().map(Throughput::of).collect())
}

/// Decoding from depth `batch.tokens`, all sequences together, `tokens` each per round. Windows are fed back in place of
/// sampled tokens, so all engines do the same work; they need `batch.tokens + rounds * tokens` tokens. `on_run` hears of
/// each engine's prefill and each run.
pub fn decode<O: CacheOps>(
    engines: &mut [&mut Engine<O>],
    windows: &[&[u32]],
    batch: Batch,
    (tokens, rounds): (usize, usize),
    mut on_run: impl FnMut(),
) -> Result<Vec<Throughput>, EvalError> {
    let windows = ensure(windows, batch, (tokens, rounds), tokens * rounds)?;
    let mut all = Vec::with_capacity(engines.len());
    for engine in engines.iter_mut() {
        let mut sequences = empty(engine, batch.sequences);
        if batch.tokens > 0 {
            feed(engine, &mut sequences, windows, 0..batch.tokens)?;
        }
        all.push(sequences);
        on_run();
    }
    let mut measured: Vec<(Vec<f64>, Vec<Caches>)> = vec![Default::default(); engines.len()];
    for round in 0..rounds {
        let start = batch.tokens + round * tokens;
        for ((engine, sequences), (rates, caches)) in engines.iter_mut().zip(&mut all).zip(&mut measured) {
            let before = Caches::of(engine, sequences);
            let seconds =
                timed(|| (start..start + tokens).try_for_each(|at| feed(engine, sequences, windows, at..at + 1)))?;
            rates.push((batch.sequences * tokens) as f64 / seconds);
            caches.push(Caches::mean(&[before, Caches::of(engine, sequences)]));
            on_run();
        }
    }
    Ok(measured.into_iter().map(Throughput::of).collect())
}

impl Throughput {
    fn of((rates, caches): (Vec<f64>, Vec<Caches>)) -> Self {
        Self { rates: Rates::of(rates), caches: Caches::mean(&caches) }
    }
}

/// The windows of a batch, when there is work and they are long enough for it.
fn ensure<'a, 'b>(
    windows: &'a [&'b [u32]],
    batch: Batch,
    (tokens, rounds): (usize, usize),
    after: usize,
) -> Result<&'a [&'b [u32]], EvalError> {
    let nothing = |reason: String| Err(EvalError::Workload { reason });
    if batch.sequences == 0 || tokens == 0 || rounds == 0 || batch.tokens + after == 0 {
        return nothing("sequences, tokens and rounds are each at least 1".into());
    }
    let needed = batch.tokens + after;
    match windows.get(..batch.sequences) {
        Some(windows) if windows.iter().all(|window| window.len() >= needed) => Ok(windows),
        _ => nothing(format!("it takes {} windows of {needed} tokens", batch.sequences)),
    }
}

fn empty<O: CacheOps>(engine: &Engine<O>, sequences: usize) -> Vec<Sequence> {
    (0..sequences).map(|_| engine.sequence()).collect()
}

/// Hands a part of each window to its sequence, all in one batch.
fn feed<O: CacheOps>(
    engine: &mut Engine<O>,
    sequences: &mut [Sequence],
    windows: &[&[u32]],
    part: Range<usize>,
) -> Result<(), EvalError> {
    let mut batch: Vec<(&mut Sequence, &[u32])> =
        sequences.iter_mut().zip(windows).map(|(sequence, window)| (sequence, &window[part.clone()])).collect();
    engine.last_logits(&mut batch)?;
    Ok(())
}

fn timed(work: impl FnOnce() -> Result<(), EvalError>) -> Result<f64, EvalError> {
    let started = Instant::now();
    work()?;
    Ok(started.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    const COST: StepCost =
        StepCost { weight_bytes: 1000, flops: 500.0, logit_flops: 100.0, precision: Precision::Bf16 };

    fn caches(bytes: f64, dense_bytes: f64) -> Caches {
        Caches { bytes, dense_bytes, logical_ratio: 1.0 }
    }

    #[test]
    fn a_step_reads_the_weights_once_and_every_cache() {
        assert_eq!(COST.step_bytes(600.0), 1600.0);
        // 8 tokens per 1600 bytes at 3200 bytes per second.
        assert_eq!(COST.byte_ceiling(8, 600.0, 3200.0), 16.0);
    }

    #[test]
    fn the_speed_up_that_bytes_allow_is_the_ratio_only_when_caches_outweigh_weights() {
        assert_eq!(COST.byte_speed_up(&caches(1000.0, 4000.0)), 2.5);
        let free = StepCost { weight_bytes: 0, ..COST };
        assert_eq!(free.byte_speed_up(&caches(1000.0, 4000.0)), 4.0);
        assert_eq!(COST.byte_speed_up(&caches(0.0, 0.0)), 1.0);
        // The formula, with B*T*k = 4000 and CR = 4000/1600.
        let (w, k, cr) = (1000.0, 4000.0, 2.5);
        assert!((COST.byte_speed_up(&caches(1600.0, 4000.0)) - (w + k) / (w + k / cr)).abs() < 1e-12);
    }

    #[test]
    fn prefill_makes_logits_of_the_last_token_only() {
        assert_eq!(COST.prefill_flops(Batch { sequences: 2, tokens: 10 }), 2.0 * (10.0 * 400.0 + 100.0));
    }

    #[test]
    fn rates_are_told_with_their_spread() {
        let rates = Rates::of(vec![3.0, 9.0, 4.0, 5.0]);
        assert_eq!((rates.median, rates.min, rates.max), (4.5, 3.0, 9.0));
        assert_eq!(rates.rounds, [3.0, 9.0, 4.0, 5.0]);
    }

    #[test]
    fn ratios_are_of_bytes_and_of_slots() {
        assert_eq!(caches(50.0, 200.0).physical_ratio(), 4.0);
        assert_eq!(caches(0.0, 0.0).physical_ratio(), 1.0);
        let mean = Caches::mean(&[caches(50.0, 200.0), caches(70.0, 240.0)]);
        assert_eq!((mean.bytes, mean.dense_bytes), (60.0, 220.0));
    }
}
