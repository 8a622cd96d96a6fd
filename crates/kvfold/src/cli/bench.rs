//! The arguments of `kvfold bench`.

use super::{CacheArg, ModelArgs, PrecisionArg};
use clap::{Args, Subcommand};
use kvfold_eval::Batch;
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Prefill and decode of a whole model, in tokens per second, beside what reading its bytes allows
    ///
    /// All sequences of a row are computed together, and its rate is of all of them. With --against, two models take turns
    /// round by round in one process. A row of decoding fills the caches once, by a real prefill, and then decodes --tokens
    /// per sequence in every round, each round from where the one before stopped: its rate is of the depths that it names.
    /// The byte ceiling is what the row would reach if nothing but reading the weights and the caches took time, at the
    /// bandwidth that the machine was measured to have. Close other programs for numbers worth keeping.
    Model(Box<ModelBenchArgs>),
    /// Every kernel of serving and training, beside the machine's best
    ///
    /// Shapes are a model's. The machine's best is measured first: products per second in registers, and bytes per second
    /// from memory. Close other programs for numbers worth keeping.
    Kernels(KernelsArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ModelBenchArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// A second model to measure in turn: a directory, or a delta
    #[arg(long, value_name = "MODEL")]
    pub(crate) against: Option<String>,

    /// How the second model's weights are held and multiplied [default: bf16 if they are stored in 16 bits]
    #[arg(long, value_enum, requires = "against")]
    pub(crate) against_precision: Option<PrecisionArg>,

    /// Type of the second model's cache [default: as its weights are held, but no coarser than bf16]
    #[arg(long, value_enum, requires = "against")]
    pub(crate) against_cache: Option<CacheArg>,

    /// Prefill of S sequences of N tokens, such as 8x1810 [default: 1x512, or the context if shorter]
    #[arg(long, value_name = "SxN", num_args = 1.., value_parser = prompts)]
    pub(crate) prefill: Vec<Batch>,

    /// Decoding of S sequences from depth N, such as 8x2048 [default: 1x0 and 8x512, or what the context leaves]
    #[arg(long, value_name = "SxN", num_args = 1.., value_parser = batch)]
    pub(crate) decode: Vec<Batch>,

    /// Tokens that each sequence decodes in a round
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) tokens: u32,

    /// Rounds; the median counts, and the slowest and the fastest are told
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: u32,

    /// Text that the sequences are parts of, since what folds depends on it [default: random tokens]
    ///
    /// Sequences begin at places spread evenly over it; where it is short they overlap.
    #[arg(long, value_name = "FILE")]
    pub(crate) text: Option<PathBuf>,

    /// Seed of random tokens
    #[arg(long, default_value_t = 0, value_name = "N", conflicts_with = "text")]
    pub(crate) seed: u64,

    /// Print one JSON document instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct KernelsArgs {
    /// Model directory, delta, or stories260k, whose shapes are used
    #[arg(long, value_name = "MODEL", default_value = "stories260k")]
    pub(crate) model: String,

    /// Tokens of the batch
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub(crate) tokens: u32,

    /// Times that each kernel runs; the median counts
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: u32,

    /// Time those alone whose names have this text in them
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub(crate) only: String,

    /// Print one JSON document instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

/// `SxN` with N at least 1.
fn prompts(text: &str) -> Result<Batch, String> {
    match batch(text)? {
        Batch { tokens: 0, .. } => Err("a prompt has at least 1 token".into()),
        batch => Ok(batch),
    }
}

/// `SxN` with S at least 1.
fn batch(text: &str) -> Result<Batch, String> {
    let numbers = text.split_once('x').and_then(|(s, n)| Some((s.parse().ok()?, n.parse().ok()?)));
    match numbers {
        Some((sequences @ 1..=4096, tokens @ 0..=1_048_576)) => Ok(Batch { sequences, tokens }),
        _ => Err("sequences x tokens are expected, such as 8x2048".into()),
    }
}
