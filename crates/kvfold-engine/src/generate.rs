//! Decoding texts, one or many at a time.

use crate::engine::{Engine, EngineError, Sequence};
use crate::sampler::Sampler;
use kvfold_kernels::CacheOps;
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
    ensure_fits(engine, prompt, options.stop.max_new_tokens)?;
    let mut sequence = engine.sequence();
    let mut tokens = Vec::new();
    let mut stopped = false;
    if options.stop.max_new_tokens > 0 {
        let mut logits = engine.last_logits(&mut [(&mut sequence, prompt)])?;
        loop {
            let token = options.sampler.sample(&logits, (0, (prompt.len() + tokens.len()) as u64));
            stopped = options.stop.at.contains(&token);
            if stopped {
                break;
            }
            tokens.push(token);
            if on_token(token).is_break() || tokens.len() == options.stop.max_new_tokens {
                break;
            }
            logits = engine.last_logits(&mut [(&mut sequence, &[token])])?;
        }
    }
    Ok(Generation { tokens, stopped, sequence })
}

/// Texts that the model writes itself, each `start` and then draws up to `length` tokens in all, `batch` at a time.
/// Whatever the batch, text n is the same. `on_text` is told how many tokens are there.
pub fn sample_corpus<O: CacheOps>(
    engine: &mut Engine<O>,
    sampler: Sampler,
    (texts, length): (usize, usize),
    start: u32,
    mut on_step: impl FnMut(usize),
) -> Result<Vec<Vec<u32>>, EngineError> {
    const BATCH: usize = 64;
    let vocab = engine.model().shape.vocab;
    let mut corpus = Vec::with_capacity(texts);
    let mut drawn = 0;
    for first in (0..texts).step_by(BATCH) {
        let count = BATCH.min(texts - first);
        let mut members: Vec<(Sequence, Vec<u32>)> = (0..count).map(|_| (engine.sequence(), vec![start])).collect();
        for position in 1..length {
            let mut batch: Vec<(&mut Sequence, &[u32])> =
                members.iter_mut().map(|(sequence, tokens)| (sequence, &tokens[position - 1..])).collect();
            let logits = engine.last_logits(&mut batch)?;
            for (n, ((_, tokens), logits)) in members.iter_mut().zip(logits.chunks_exact(vocab)).enumerate() {
                tokens.push(sampler.sample(logits, ((first + n) as u64, position as u64)));
            }
            drawn += count;
            on_step(drawn);
        }
        corpus.extend(members.into_iter().map(|(_, tokens)| tokens));
    }
    Ok(corpus)
}
