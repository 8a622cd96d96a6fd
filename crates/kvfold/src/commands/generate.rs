//! `kvfold generate`.

use crate::cli::GenerateArgs;
use crate::error::AppError;
use crate::output;
use kvfold_engine::{Engine, Options, Sampler, Stop, generate};
use kvfold_kernels::FastCpu;
use kvfold_model::Checkpoint;
use kvfold_report::format;
use serde::Serialize;
use std::io::Write;
use std::time::Instant;

/// New tokens when the user does not say.
const NEW_TOKENS: usize = 256;

#[derive(Serialize)]
struct Output<'a> {
    schema: &'static str,
    model: &'a str,
    prompt: &'a str,
    text: &'a str,
    prompt_tokens: usize,
    new_tokens: usize,
    stopped: bool,
    seed: u64,
    temperature: f64,
    logical_ratio: f64,
    physical_ratio: f64,
    kv_bytes: usize,
    dense_kv_bytes: usize,
    tokens_per_second: f64,
}

pub(crate) fn run(args: &GenerateArgs) -> Result<(), AppError> {
    let checkpoint = Checkpoint::open(&args.model)?;
    let mut prompt = checkpoint.tokenizer.encode(&args.prompt, true)?;
    prompt.extend(checkpoint.config.bos_token_id.filter(|_| prompt.is_empty()));
    let room = checkpoint.config.max_position_embeddings.saturating_sub(prompt.len());
    let options = Options {
        sampler: Sampler { temperature: args.temperature, seed: args.seed },
        stop: Stop {
            max_new_tokens: args.max_new_tokens.unwrap_or(NEW_TOKENS.min(room.max(1))),
            at: stop_tokens(&checkpoint),
        },
    };
    let mut engine = Engine::new(FastCpu::new(), &checkpoint);
    let mut stream = checkpoint.tokenizer.stream(true);
    for &token in &prompt {
        stream.push(token)?;
    }
    let mut text = String::new();
    let mut failed = None;
    let mut show = |piece: Result<Option<String>, kvfold_model::ModelError>| match piece {
        Ok(piece) => {
            let piece = piece.unwrap_or_default();
            text.push_str(&piece);
            if !args.json {
                let mut out = std::io::stdout().lock();
                let written = out.write_all(piece.as_bytes()).and_then(|()| out.flush());
                failed = failed.take().or(written.err().map(AppError::Output));
            }
        }
        Err(error) => failed = failed.take().or(Some(error.into())),
    };
    if !args.json {
        print!("{}", args.prompt);
    }
    let started = Instant::now();
    let generation = generate(&mut engine, &prompt, &options, |token| show(stream.push(token)))?;
    let seconds = started.elapsed().as_secs_f64();
    show(stream.finish());
    if let Some(error) = failed {
        return Err(error);
    }

    let (held, usage) = (generation.sequence.held(), engine.usage(&generation.sequence));
    let dense = engine.dense_usage(held.tokens).bytes();
    let result = Output {
        schema: "kvfold.generate/1",
        model: &args.model,
        prompt: &args.prompt,
        text: &text,
        prompt_tokens: prompt.len(),
        new_tokens: generation.tokens.len(),
        stopped: generation.stopped,
        seed: args.seed,
        temperature: args.temperature,
        logical_ratio: held.logical_ratio(),
        physical_ratio: if usage.bytes() == 0 { 1.0 } else { dense as f64 / usage.bytes() as f64 },
        kv_bytes: usage.bytes(),
        dense_kv_bytes: dense,
        tokens_per_second: generation.tokens.len() as f64 / seconds,
    };
    if args.json {
        return output::json(&result);
    }
    output::line("")?;
    eprintln!(
        "\n{} tokens at {}; cache {} of {} ({} logical, {} physical)",
        result.new_tokens,
        format::rate(result.tokens_per_second),
        format::bytes(result.kv_bytes as u64),
        format::bytes(result.dense_kv_bytes as u64),
        format::ratio(result.logical_ratio),
        format::ratio(result.physical_ratio),
    );
    Ok(())
}

/// Tokens that end a text: the end-of-text tokens, and the one that starts the next text.
pub(crate) fn stop_tokens(checkpoint: &Checkpoint) -> Vec<u32> {
    let config = &checkpoint.config;
    config.eos_token_ids.iter().copied().chain(config.bos_token_id).collect()
}
