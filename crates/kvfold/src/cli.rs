//! The arguments, with the help a newcomer reads.

mod bench;
mod retrofit;
mod serve;
mod text;

pub(crate) use bench::{BenchCommand, KernelsArgs, ModelBenchArgs};
pub(crate) use retrofit::{DecisionSource, LossKind, MethodArg, RetrofitArgs};
pub(crate) use serve::ServeArgs;
pub(crate) use text::{ChatArgs, GenerateArgs};

use clap::{Args, Parser, Subcommand, ValueEnum};
use kvfold_engine::Engine;
use kvfold_kernels::FastCpu;
use kvfold_kernels::ops::Precision;
use kvfold_kernels::paged::CacheDType;
use kvfold_model::{Checkpoint, Loaded, ModelError};
use std::path::PathBuf;

const AFTER_HELP: &str = "\
A MODEL is a Hugging Face directory (config.json, model.safetensors, tokenizer.json), a delta over one (a file that \
`kvfold export --delta` wrote), or the name of the embedded model: stories260k.

Exit codes:
  0    done, or the reader of the output went away
  1    the machine failed: a disk, a permission
  2    the arguments are wrong
  3    the input cannot be used: a model, a text, a setting
  4    training failed: a loss that is not a number, or that exploded
  130  interrupted; what can be resumed is saved";

/// Dynamic Memory Compression for Llama-family models: teach a model to keep a smaller cache, and prove what it costs.
#[derive(Debug, Parser)]
#[command(version = crate::output::VERSION, after_help = AFTER_HELP, arg_required_else_help = true, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,

    /// Threads to compute with [default: one per core]; results do not depend on it
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Retrofit the embedded model to 4x in a minute or two, and print a receipt
    ///
    /// Samples training text from the model itself, teaches it to fold its cache, evaluates it on held-out text, tells
    /// the same story with the full and the compressed cache, and prints every number that a doubter would ask for.
    Demo(DemoArgs),
    /// Teach a model to compress its cache
    ///
    /// Writes a complete model directory: weights, config, tokenizer, model card, training curve. An interrupted run goes
    /// on with --resume and ends with the same weights.
    Retrofit(Box<RetrofitArgs>),
    /// Turn a GGUF file or a Megatron checkpoint into a model directory
    ///
    /// GGUF: dense models of architecture "llama" (Mistral too), "qwen2" and "qwen3": weights in F32, F16, BF16, Q4_0, Q4_1,
    /// Q5_0, Q5_1, Q8_0 or Q2_K to Q6_K; tokenizer, chat template and configuration from the file's metadata. Megatron: GPT
    /// models with a Llama's layers, also those that were retrofitted with DMC by its authors' code; a .pt file's pickle is
    /// read as data, nothing in it is run.
    Import(ImportArgs),
    /// Write a retrofitted model as what it changed of its base
    ///
    /// One file with the tensors that differ, by name; it opens wherever a model does, over the same base.
    Export(ExportArgs),
    /// Continue a prompt
    Generate(GenerateArgs),
    /// Talk with a model in the terminal
    ///
    /// A line after each answer says what the cache holds of the conversation. A line that begins with / is a command; /help
    /// lists them. Ctrl-C ends an answer, Ctrl-D the talk.
    Chat(ChatArgs),
    /// Serve a model by OpenAI's HTTP API, with a page to chat at /
    ///
    /// Many requests share the cache's memory; how many depends on how far their texts compress. Listens on this machine
    /// alone unless --host says otherwise, which needs a key. Ctrl-C or SIGTERM let what runs come to its end.
    Serve(ServeArgs),
    /// Measure how good a model is, through the cache that serves it
    Eval {
        #[command(subcommand)]
        command: EvalCommand,
    },
    /// Measure how fast it is on this machine
    Bench {
        #[command(subcommand)]
        command: BenchCommand,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum EvalCommand {
    /// Perplexity of a text
    ///
    /// The text is tokenised once, without special tokens, and cut into consecutive windows; a last incomplete one is
    /// dropped. In each window the first token is given and the others are predicted.
    Ppl(PplArgs),
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Also write the receipt as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,

    /// Seed of everything random
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) seed: u64,

    /// Keep the retrofitted model in this new directory
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
}

/// How an imported model's weights are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ImportDType {
    /// Exact, whatever they were
    F32,
    /// Half the size; rounds to 8 bits
    Bf16,
    /// Half the size; rounds to 11 bits, and holds nothing above 65504
    F16,
}

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// GGUF file, or Megatron checkpoint: a .pt file, or a directory of mp_rank_XX
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,

    /// New directory for the model
    #[arg(value_name = "OUT")]
    pub(crate) out: PathBuf,

    /// Directory with the tokenizer.json of a Megatron checkpoint's model
    #[arg(long, value_name = "DIR")]
    pub(crate) tokenizer: Option<PathBuf>,

    /// How weights are written [default: as they are stored; bf16 if they are quantised]
    #[arg(long, value_enum)]
    pub(crate) dtype: Option<ImportDType>,

    /// Print one JSON document at the end
    #[arg(long)]
    pub(crate) json: bool,
}

/// How a delta's matrices are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeltaDType {
    /// 32 bits
    F32,
    /// 16 bits, 11 of them precision
    F16,
    /// 16 bits, 8 of them precision
    Bf16,
    /// 8.25 bits: 64 numbers share a scale
    Int8,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// Write a delta: the only form there is
    #[arg(long, required = true)]
    pub(crate) delta: bool,

    /// Retrofitted model
    #[arg(value_name = "MODEL")]
    pub(crate) model: String,

    /// File for the delta
    #[arg(value_name = "OUT")]
    pub(crate) out: PathBuf,

    /// Model that was retrofitted [default: the one that MODEL names]
    #[arg(long, value_name = "MODEL")]
    pub(crate) base: Option<String>,

    /// How matrices are written; vectors and decision heads are exact
    #[arg(long, value_enum, default_value_t = DeltaDType::Bf16)]
    pub(crate) dtype: DeltaDType,

    /// Print one JSON document at the end
    #[arg(long)]
    pub(crate) json: bool,
}

/// A model, whole or as a delta over another.
#[derive(Clone, Debug, Args)]
pub(crate) struct ModelArgs {
    /// Model directory, delta, or stories260k
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: String,

    /// A delta over --model
    #[arg(long, value_name = "FILE")]
    pub(crate) delta: Option<PathBuf>,

    /// How weights are held and multiplied [default: bf16 if they are stored in 16 bits]
    #[arg(long, value_enum)]
    pub(crate) precision: Option<PrecisionArg>,

    /// How the cache holds keys and values [default: as the weights are held]
    #[arg(long, value_enum, value_name = "TYPE")]
    pub(crate) cache: Option<CacheArg>,
}

/// Keys and values in slots; sums are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CacheArg {
    /// 32 bits
    F32,
    /// 16 bits
    Bf16,
    /// 8 bits and a scale per key and per value; the newest tokens of a model with a delay in 16 bits
    Int8,
}

impl From<CacheArg> for CacheDType {
    fn from(cache: CacheArg) -> Self {
        match cache {
            CacheArg::F32 => CacheDType::F32,
            CacheArg::Bf16 => CacheDType::Bf16,
            CacheArg::Int8 => CacheDType::Int8,
        }
    }
}

/// Operands of products with weights; sums are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PrecisionArg {
    /// 32 bits
    F32,
    /// 16 bits: half the memory, and faster
    Bf16,
    /// 8 bits and a scale per 32 weights, activations in 16 bits; for serving only
    Q8,
}

impl From<PrecisionArg> for Precision {
    fn from(precision: PrecisionArg) -> Self {
        match precision {
            PrecisionArg::F32 => Precision::F32,
            PrecisionArg::Bf16 => Precision::Bf16,
            PrecisionArg::Q8 => Precision::Q8,
        }
    }
}

impl ModelArgs {
    /// Opens the model.
    pub(crate) fn open(&self) -> Result<Checkpoint, ModelError> {
        match &self.delta {
            Some(delta) => Checkpoint::open_delta(&self.model, delta),
            None => Checkpoint::open(&self.model),
        }
    }

    /// An engine that serves it.
    pub(crate) fn engine(&self, checkpoint: &Checkpoint) -> Engine<FastCpu> {
        let precision = self.precision(checkpoint);
        let cache = self.cache.map_or_else(|| precision.into(), CacheDType::from);
        Engine::of(Loaded::with_precision(FastCpu::new(), checkpoint, precision)).with_cache_dtype(cache)
    }

    /// How its weights are held and multiplied.
    pub(crate) fn precision(&self, checkpoint: &Checkpoint) -> Precision {
        self.precision.map_or_else(|| checkpoint.precision(), Precision::from)
    }

    /// What the user called it.
    pub(crate) fn name(&self) -> String {
        match &self.delta {
            Some(delta) => format!("{} + {}", self.model, delta.display()),
            None => self.model.clone(),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct PplArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// Text to predict (UTF-8)
    #[arg(long, value_name = "FILE")]
    pub(crate) text: PathBuf,

    /// Tokens of a window [default: 1024, or the model's context if shorter]
    #[arg(long, value_name = "N")]
    pub(crate) window: Option<usize>,

    /// Tokens of the text that are used at most
    #[arg(long, value_name = "TOKENS")]
    pub(crate) limit: Option<usize>,

    /// Print one JSON document instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}
