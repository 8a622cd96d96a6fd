//! `kvfold export`.

use crate::cli::{DeltaDType, ExportArgs};
use crate::error::AppError;
use crate::output;
use kvfold_model::delta::{self, Precision};
use kvfold_model::{Checkpoint, ModelError};
use kvfold_report::format;
use serde::Serialize;

#[derive(Serialize)]
struct Output<'a> {
    schema: &'static str,
    model: &'a str,
    base: &'a str,
    out: String,
    bytes: u64,
    tensors: usize,
    relative_error: f64,
    largest_error: f64,
}

pub(crate) fn run(args: &ExportArgs) -> Result<(), AppError> {
    output::ensure_writable(&args.out)?;
    let model = Checkpoint::open(&args.model)?;
    // A model whose heads were merged is a plain one, which does not say where it comes from.
    let named = model.config.compression.as_ref().map(|compression| &compression.base_model);
    let Some(base) = args.base.as_ref().or(named) else {
        let reason = "does not say what it was retrofitted from: name it with --base".into();
        return Err(ModelError::Delta { file: args.model.clone(), reason }.into());
    };
    let base = Checkpoint::open(base)?;
    let precision = match args.dtype {
        DeltaDType::F32 => Precision::F32,
        DeltaDType::F16 => Precision::F16,
        DeltaDType::Bf16 => Precision::Bf16,
        DeltaDType::Int8 => Precision::Int8,
    };
    let written = delta::write(&args.out, &model, &base, precision)?;
    let result = Output {
        schema: "kvfold.export/1",
        model: &args.model,
        base: &base.source,
        out: args.out.display().to_string(),
        bytes: written.bytes,
        tensors: written.tensors,
        relative_error: written.relative_error,
        largest_error: written.largest_error,
    };
    if args.json {
        return output::json(&result);
    }
    output::line(&format!(
        "{}\nbytes     {} in {} tensors over {}\nerror     {:.2e} of the change (RMS), {:.2e} at most",
        result.out,
        format::exact(result.bytes),
        result.tensors,
        result.base,
        result.relative_error,
        result.largest_error,
    ))
}
