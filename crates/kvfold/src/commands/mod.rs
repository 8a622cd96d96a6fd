//! One file per command, and what they share.

pub(crate) mod bench_kernels;
pub(crate) mod bench_model;
pub(crate) mod chat;
pub(crate) mod demo;
pub(crate) mod eval_ppl;
pub(crate) mod export;
pub(crate) mod generate;
pub(crate) mod import;
mod measure;
mod panel;
mod papers;
mod plan;
pub(crate) mod retrofit;
pub(crate) mod serve;
mod texts;
mod train;

use crate::error::AppError;
use kvfold_model::{Checkpoint, Tokenizer};
use std::path::Path;

/// The token that a text starts with: the model's own, or the end-of-text token of models that have no other.
fn start_token(checkpoint: &Checkpoint) -> Result<u32, AppError> {
    let config = &checkpoint.config;
    config.bos_token_id.or(config.eos_token_ids.first().copied()).ok_or_else(|| AppError::Text {
        file: format!("{}: config.json", checkpoint.source),
        reason: "names no token to start a text with (bos_token_id), so the model cannot write its own training text; \
                 give some with --text"
            .into(),
    })
}

/// The tokens of a text file, without special tokens.
fn tokens_of(path: &Path, tokenizer: &Tokenizer) -> Result<Vec<u32>, AppError> {
    let file = path.display().to_string();
    let bytes = std::fs::read(path).map_err(|source| AppError::File { file: file.clone(), action: "read", source })?;
    let text = String::from_utf8(bytes).map_err(|error| AppError::Text {
        file: file.clone(),
        reason: format!("not UTF-8 text: the byte at {} does not belong there", error.utf8_error().valid_up_to()),
    })?;
    if text.trim().is_empty() {
        return Err(AppError::Text { file, reason: "no text in it".into() });
    }
    Ok(tokenizer.encode(&text, false)?)
}
