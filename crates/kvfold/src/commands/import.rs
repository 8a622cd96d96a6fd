//! `kvfold import`.

use crate::cli::{ImportArgs, ImportDType};
use crate::error::AppError;
use crate::output;
use kvfold_model::import::{self, Imported};
use kvfold_model::{ModelError, ensure_absent};
use kvfold_report::format;
use kvfold_tensor::DType;
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

#[derive(Serialize)]
struct Output {
    schema: &'static str,
    file: String,
    format: &'static str,
    sha256: String,
    out: String,
    name: Option<String>,
    license: Option<String>,
    parameters: u64,
    stored: Vec<Stored>,
    dtype: &'static str,
}

#[derive(Serialize)]
struct Stored {
    kind: String,
    tensors: usize,
}

pub(crate) fn run(args: &ImportArgs) -> Result<(), AppError> {
    ensure_absent(&args.out)?;
    let dtype = args.dtype.map(|dtype| match dtype {
        ImportDType::F32 => DType::F32,
        ImportDType::Bf16 => DType::BF16,
        ImportDType::F16 => DType::F16,
    });
    let megatron = args.file.is_dir() || args.file.extension().is_some_and(|extension| extension == "pt");
    let Imported { checkpoint, dtype, kinds, name, license, files } = match (&args.tokenizer, megatron) {
        (Some(tokenizer), true) => import::megatron(&args.file, tokenizer, dtype)?,
        (None, false) => import::gguf(&args.file, dtype)?,
        (tokenizer, _) => {
            let reason = match tokenizer {
                Some(_) => "is no Megatron checkpoint (a directory, or a .pt file), and --tokenizer is for these alone",
                None => {
                    "is a Megatron checkpoint, which holds no tokenizer: name the directory of one with --tokenizer"
                }
            };
            return Err(AppError::Text { file: args.file.display().to_string(), reason: reason.into() });
        }
    };
    let result = Output {
        schema: "kvfold.import/1",
        file: args.file.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        format: if megatron { "Megatron checkpoint" } else { "GGUF file" },
        sha256: sha256(&files)?,
        out: args.out.display().to_string(),
        name,
        license,
        parameters: checkpoint.tensors.values().map(|tensor| tensor.numel() as u64).sum(),
        stored: kinds.into_iter().map(|(kind, tensors)| Stored { kind, tensors }).collect(),
        dtype: dtype.name(),
    };
    checkpoint.save(&args.out, &[("README.md", card(&result).as_bytes())])?;
    if args.json {
        return output::json(&result);
    }
    output::line(&format!(
        "{}\nparameters  {}\nstored as   {}\nwritten as  {}\nsha256      {}  {}",
        result.out,
        format::exact(result.parameters),
        stored(&result),
        result.dtype,
        result.sha256,
        result.file,
    ))
}

/// The digest of files one after the other, read a piece at a time.
fn sha256(paths: &[PathBuf]) -> Result<String, ModelError> {
    let mut digest = Sha256::new();
    let mut piece = vec![0; 1 << 20];
    for path in paths {
        let io = |source: io::Error| ModelError::Io { file: path.display().to_string(), action: "read", source };
        let mut file = File::open(path).map_err(io)?;
        loop {
            match file.read(&mut piece).map_err(io)? {
                0 => break,
                n => digest.update(&piece[..n]),
            }
        }
    }
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn stored(result: &Output) -> String {
    let kinds: Vec<String> = result.stored.iter().map(|s| format!("{} ({} tensors)", s.kind, s.tensors)).collect();
    kinds.join(", ")
}

/// The model card. What the file says of itself is quoted as one line of code, whatever it holds.
fn card(result: &Output) -> String {
    let quoted = |text: &str| {
        let line: String = text.chars().map(|c| if c.is_control() || c == '`' { ' ' } else { c }).take(200).collect();
        format!("`{line}`")
    };
    let title = result.name.as_deref().map_or("Imported model".into(), quoted);
    let license = match &result.license {
        Some(license) => format!("{}, by the file", quoted(license)),
        None => "not stated in the file; see where it came from".into(),
    };
    let made = match result.format {
        "GGUF file" => {
            "Weights are the stored ones, dequantised; rows of queries and keys are in Hugging Face's order. \
             Configuration,\ntokenizer and chat template are made from the file's metadata."
        }
        _ => {
            "Weights are the stored ones, parts of tensor-parallel ranks put together. The configuration is made from the\n\
             training arguments in the checkpoint; the tokenizer was given at the import."
        }
    };
    format!(
        "# {title}\n\n\
         Imported by kvfold {version} from a {format}. The original model's terms apply.\n\n\
         | | |\n|---|---|\n\
         | source | {file} |\n\
         | sha256 | `{sha256}` |\n\
         | licence | {license} |\n\
         | parameters | {parameters} |\n\
         | stored as | {stored} |\n\
         | weights here | {dtype} |\n\n\
         {made}\n",
        format = result.format,
        version = env!("CARGO_PKG_VERSION"),
        file = quoted(&result.file),
        sha256 = result.sha256,
        parameters = format::exact(result.parameters),
        stored = stored(result),
        dtype = result.dtype,
    )
}
