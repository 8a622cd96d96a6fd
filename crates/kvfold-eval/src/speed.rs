//! How fast sequences are decoded: several engines in turn on the same work, medians.

use crate::error::EvalError;
use kvfold_engine::{Engine, Sequence};
use kvfold_kernels::CacheOps;
use std::time::Instant;

/// What is timed: decoding, with the prompt already in the cache.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Tokens of each prompt.
    pub prompt: usize,
    /// Tokens decoded per sequence.
    pub decode: usize,
    /// Times that each engine is measured.
    pub rounds: usize,
}

/// Tokens per second of each engine over all sequences: the median over rounds. Every window is a sequence: its beginning
/// is the prompt, and what follows is fed back in place of sampled tokens, so all engines do the same work. Within a round
/// the engines take turns, so a machine that slows down slows all of them.
pub fn decode_speed<O: CacheOps>(
    engines: &mut [&mut Engine<O>],
    windows: &[&[u32]],
    work: Workload,
    mut on_run: impl FnMut(),
) -> Result<Vec<f64>, EvalError> {
    let Workload { prompt, decode, rounds } = work;
    let nothing = |reason: String| Err(EvalError::Workload { reason });
    if prompt == 0 || decode == 0 || rounds == 0 || windows.is_empty() {
        return nothing("prompt, decoded tokens, rounds and windows are each at least 1".into());
    }
    if let Some(short) = windows.iter().find(|window| window.len() < prompt + decode) {
        return nothing(format!(
            "a window has {} tokens and prompt and decoding take {}",
            short.len(),
            prompt + decode
        ));
    }
    let mut rates = vec![Vec::new(); engines.len()];
    for _ in 0..rounds {
        for (engine, rates) in engines.iter_mut().zip(&mut rates) {
            rates.push(run(engine, windows, work)?);
            on_run();
        }
    }
    Ok(rates.into_iter().map(median).collect())
}

fn run<O: CacheOps>(engine: &mut Engine<O>, windows: &[&[u32]], work: Workload) -> Result<f64, EvalError> {
    let mut sequences: Vec<Sequence> = windows.iter().map(|_| engine.sequence()).collect();
    for (sequence, window) in sequences.iter_mut().zip(windows) {
        engine.last_logits(&mut [(sequence, &window[..work.prompt])])?;
    }
    let started = Instant::now();
    for at in work.prompt..work.prompt + work.decode {
        let mut batch: Vec<(&mut Sequence, &[u32])> =
            sequences.iter_mut().zip(windows).map(|(sequence, window)| (sequence, &window[at..=at])).collect();
        engine.last_logits(&mut batch)?;
    }
    Ok((windows.len() * work.decode) as f64 / started.elapsed().as_secs_f64())
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    if values.len() % 2 == 1 { values[half] } else { (values[half - 1] + values[half]) / 2.0 }
}
