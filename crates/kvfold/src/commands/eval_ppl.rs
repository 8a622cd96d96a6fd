//! `kvfold eval ppl`.

use super::tokens_of;
use crate::cli::PplArgs;
use crate::error::AppError;
use crate::output;
use kvfold_eval::{cut, perplexity};
use kvfold_kernels::paged::CacheDType;
use kvfold_report::format;
use serde::Serialize;

/// Tokens of a window when the user does not say.
const WINDOW: usize = 1024;

#[derive(Serialize)]
struct Output {
    schema: &'static str,
    model: String,
    text: String,
    cache: CacheDType,
    perplexity: f64,
    tokens: usize,
    windows: usize,
    window: usize,
    logical_ratio: f64,
    physical_ratio: f64,
}

pub(crate) fn run(args: &PplArgs) -> Result<(), AppError> {
    let checkpoint = args.model.open()?;
    let context = checkpoint.config.max_position_embeddings;
    let window = args.window.unwrap_or(WINDOW.min(context));
    if !(2..=context).contains(&window) {
        return Err(kvfold_eval::EvalError::Window { window, context }.into());
    }
    let tokens = tokens_of(&args.text, &checkpoint.tokenizer)?;
    let windows = cut(&tokens, window, args.limit)?;
    let mut engine = args.model.engine(&checkpoint);
    let bar = output::bar("evaluating", windows.len(), "windows", args.json);
    let result = perplexity(&mut engine, &windows, |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    let result = Output {
        schema: "kvfold.perplexity/1",
        model: args.model.name(),
        text: args.text.display().to_string(),
        cache: engine.pool().dtype(),
        perplexity: result.value(),
        tokens: result.predicted,
        windows: windows.len(),
        window,
        logical_ratio: result.measured.logical_ratio(),
        physical_ratio: result.measured.physical_ratio(),
    };
    if args.json {
        return output::json(&result);
    }
    output::line(&format!(
        "perplexity      {:.4}\ntokens          {} predicted, in {} windows of {}\ncache           {}\nlogical ratio   {}\nphysical ratio  {}",
        result.perplexity,
        format::exact(result.tokens as u64),
        result.windows,
        result.window,
        result.cache.name(),
        format::ratio_and_removed(result.logical_ratio),
        format::ratio_and_removed(result.physical_ratio),
    ))
}
