//! `kvfold generate`.

use crate::cli::GenerateArgs;
use crate::error::AppError;
use crate::output;
use kvfold_engine::{EngineError, Options, Stop, ensure_fits, generate};
use kvfold_kernels::paged::CacheDType;
use kvfold_model::{Chat, ChatTemplate, Checkpoint, DecodeStream, ModelError};
use kvfold_report::format;
use serde::Serialize;
use std::ops::ControlFlow;
use std::time::Instant;

/// New tokens when the user does not say.
const NEW_TOKENS: usize = 256;

#[derive(Serialize)]
struct Output<'a> {
    schema: &'static str,
    model: String,
    prompt: &'a str,
    text: &'a str,
    prompt_tokens: usize,
    new_tokens: usize,
    stopped: bool,
    seed: u64,
    temperature: f64,
    cache: CacheDType,
    logical_ratio: f64,
    physical_ratio: f64,
    kv_bytes: usize,
    dense_kv_bytes: usize,
    tokens_per_second: f64,
}

pub(crate) fn run(args: &GenerateArgs) -> Result<(), AppError> {
    let checkpoint = args.model.open()?;
    let mut prompt = match args.chat {
        true => checkpoint.tokenizer.encode(&chat(&checkpoint, args)?, false)?,
        false => checkpoint.tokenizer.encode(&args.prompt, true)?,
    };
    prompt.extend(checkpoint.config.bos_token_id.filter(|_| prompt.is_empty()));
    let room = checkpoint.config.max_position_embeddings.saturating_sub(prompt.len());
    let options = Options {
        sampler: args.sampling.sampler(),
        stop: Stop {
            max_new_tokens: args.sampling.max_new_tokens.unwrap_or(NEW_TOKENS.min(room.max(1))),
            at: checkpoint.stop_token_ids()?,
            min_new_tokens: 0,
        },
    };
    let mut engine = args.model.engine(&checkpoint);
    ensure_fits(&engine, &prompt, options.stop.max_new_tokens)?;
    options.validate(engine.model().shape.vocab).map_err(EngineError::from)?;

    let mut text = Shown { stream: checkpoint.tokenizer.stream_after(&prompt)?, all: String::new(), silent: args.json };
    if !args.json && !args.chat {
        output::piece(&args.prompt)?;
    }
    let mut failed = None;
    let started = Instant::now();
    let generation = generate(&mut engine, &prompt, &options, |token| match text.push(token) {
        Ok(()) => ControlFlow::Continue(()),
        Err(error) => {
            failed = Some(error);
            ControlFlow::Break(())
        }
    })?;
    let seconds = started.elapsed().as_secs_f64();
    if let Some(error) = failed {
        return Err(error);
    }
    text.finish()?;

    let (held, usage) = (generation.sequence.held(), engine.usage(&generation.sequence));
    let dense = engine.dense_usage(held.tokens).bytes();
    let result = Output {
        schema: "kvfold.generate/1",
        model: args.model.name(),
        prompt: &args.prompt,
        text: &text.all,
        prompt_tokens: prompt.len(),
        new_tokens: generation.tokens.len(),
        stopped: generation.stopped,
        seed: args.sampling.seed,
        temperature: args.sampling.temperature,
        cache: engine.pool().dtype(),
        logical_ratio: held.logical_ratio(),
        physical_ratio: engine.physical_ratio(&generation.sequence),
        kv_bytes: usage.bytes(),
        dense_kv_bytes: dense,
        tokens_per_second: generation.tokens.len() as f64 / seconds,
    };
    if args.json {
        return output::json(&result);
    }
    output::line("")?;
    output::note(&format!(
        "\n{} tokens at {}; {} cache {} of {} ({} logical, {} physical)",
        result.new_tokens,
        format::rate(result.tokens_per_second),
        result.cache.name(),
        format::bytes(result.kv_bytes as u64),
        format::bytes(result.dense_kv_bytes as u64),
        format::ratio(result.logical_ratio),
        format::ratio(result.physical_ratio),
    ));
    Ok(())
}

/// The prompt as a user's message, in the words of the model's template.
fn chat(checkpoint: &Checkpoint, args: &GenerateArgs) -> Result<String, ModelError> {
    let system = args.system.as_ref().map(|text| Chat::message("system", text));
    let messages = system.into_iter().chain([Chat::message("user", &args.prompt)]).collect();
    ChatTemplate::of(checkpoint)?.render(&Chat::new(messages))
}

/// The text as it grows, on standard output unless that is to be silent.
struct Shown {
    stream: DecodeStream,
    all: String,
    silent: bool,
}

impl Shown {
    fn push(&mut self, token: u32) -> Result<(), AppError> {
        let piece = self.stream.push(token)?;
        self.show(piece)
    }

    fn finish(&mut self) -> Result<(), AppError> {
        let piece = self.stream.finish()?;
        self.show(piece)
    }

    fn show(&mut self, piece: Option<String>) -> Result<(), AppError> {
        let Some(piece) = piece else { return Ok(()) };
        self.all.push_str(&piece);
        if self.silent { Ok(()) } else { output::piece(&piece) }
    }
}
