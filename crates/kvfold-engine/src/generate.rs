//! Decoding texts, one or many at a time.

use crate::batcher::{Batcher, Event, Request};
use crate::engine::{Engine, EngineError, Sequence};
use crate::sampler::Sampler;
use crate::scheduler::Limits;
use kvfold_kernels::CacheOps;
use std::collections::BTreeMap;
use std::ops::ControlFlow;

/// When to stop.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    /// New tokens at most.
    pub max_new_tokens: usize,
    /// Tokens that end a text; they are not part of it.
    pub at: Vec<u32>,
}

/// How to decode.
#[derive(Clone, Debug)]
pub struct Options {
    /// How tokens are chosen.
    pub sampler: Sampler,
    /// When to stop.
    pub stop: Stop,
}

/// A finished text.
#[derive(Debug)]
pub struct Generation {
    /// New tokens.
    pub tokens: Vec<u32>,
    /// Whether a stop token ended it.
    pub stopped: bool,
    /// The sequence as its cache holds it: all tokens but the last new one.
    pub sequence: Sequence,
}

/// Whether a prompt and `max_new_tokens` after it fit the model: what [`generate`] would refuse, before anything is shown.
pub fn ensure_fits<O: CacheOps>(engine: &Engine<O>, prompt: &[u32], max_new_tokens: usize) -> Result<(), EngineError> {
    let context = engine.model().shape.context;
    let tokens = prompt.len().saturating_add(max_new_tokens);
    match () {
        () if prompt.is_empty() => Err(EngineError::EmptyPrompt),
        () if tokens > context => Err(EngineError::TooLong { tokens, context }),
        () => Ok(()),
    }
}

/// Continues a prompt; `on_token` sees each new token as it is chosen, and may break off.
pub fn generate<O: CacheOps>(
    engine: &mut Engine<O>,
    prompt: &[u32],
    options: &Options,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generation, EngineError> {
    let request =
        Request { prompt: prompt.to_vec(), options: options.clone(), stream: 0, log_probs: None, reuse: false };
    let limits = Limits { tokens: prompt.len().max(1), running: 1 };
    let mut batcher = Batcher::new(engine, limits, 1.0);
    let id = batcher.submit(request)?;
    let mut tokens = Vec::new();
    loop {
        for event in batcher.step()? {
            match event {
                Event::Token { token, .. } => {
                    tokens.push(token);
                    if on_token(token).is_break()
                        && let Some(sequence) = batcher.cancel(id)
                    {
                        return Ok(Generation { tokens, stopped: false, sequence });
                    }
                }
                Event::Finished { stopped, sequence, .. } => return Ok(Generation { tokens, stopped, sequence }),
            }
        }
    }
}

/// Texts that the model writes itself, each `start` and then draws up to `length` tokens in all, some at a time. Whatever
/// runs beside it, text n is the same. `on_step` is told how many tokens are there.
pub fn sample_corpus<O: CacheOps>(
    engine: &mut Engine<O>,
    sampler: Sampler,
    (texts, length): (usize, usize),
    start: u32,
    mut on_step: impl FnMut(usize),
) -> Result<Vec<Vec<u32>>, EngineError> {
    const TOGETHER: usize = 64;
    let mut batcher = Batcher::new(engine, Limits { tokens: TOGETHER, running: TOGETHER }, 1.0);
    let mut corpus = vec![vec![start]; texts];
    let stop = Stop { max_new_tokens: length.saturating_sub(1), at: Vec::new() };
    let options = Options { sampler, stop };
    let mut places = BTreeMap::new();
    for n in 0..texts {
        let request =
            Request { prompt: vec![start], options: options.clone(), stream: n as u64, log_probs: None, reuse: false };
        places.insert(batcher.submit(request)?, n);
    }
    let mut drawn = 0;
    while !batcher.is_idle() {
        for event in batcher.step()? {
            if let Event::Token { id, token, .. } = event {
                corpus[places[&id]].push(token);
                drawn += 1;
            }
        }
        on_step(drawn);
    }
    Ok(corpus)
}
