//! The arguments, with the help a newcomer reads.

mod bench;
mod serve;

pub(crate) use bench::{BenchCommand, KernelsArgs, ModelBenchArgs};
pub(crate) use serve::ServeArgs;

use clap::{Args, Parser, Subcommand, ValueEnum};
use kvfold_engine::{Engine, Sampler};
use kvfold_kernels::FastCpu;
use kvfold_kernels::dmc::Share;
use kvfold_kernels::ops::{KlDirection, Over, Precision, Pull, Scope};
use kvfold_kernels::paged::CacheDType;
use kvfold_model::{Checkpoint, Loaded, ModelError};
use kvfold_retrofit::settings::{self, Train};
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
    /// 8 bits and a scale per 32 weights, activations in floats; for serving only
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

/// How tokens are chosen, and how many.
#[derive(Clone, Debug, Args)]
pub(crate) struct SamplingArgs {
    /// New tokens at most [default: 256, or what the model's context leaves]
    #[arg(long, value_name = "N")]
    pub(crate) max_new_tokens: Option<usize>,

    /// 0 takes the most likely token; higher is more varied
    #[arg(long, default_value_t = 0.0, value_name = "T", value_parser = temperature, allow_negative_numbers = true)]
    pub(crate) temperature: f64,

    /// Draw from the N most likely tokens alone; 0 for all
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) top_k: usize,

    /// Draw from the most likely tokens that have probability P together
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    pub(crate) top_p: f64,

    /// Draw no token of less than P times the most likely one's probability
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    pub(crate) min_p: f64,

    /// Divide the logits of tokens that are there already (multiply negative ones) by X
    #[arg(long, default_value_t = 1.0, value_name = "X")]
    pub(crate) repetition_penalty: f64,

    /// Seed of the draws
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) seed: u64,
}

impl SamplingArgs {
    /// The sampler.
    pub(crate) fn sampler(&self) -> Sampler {
        Sampler {
            temperature: self.temperature,
            seed: self.seed,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            ..Sampler::GREEDY
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// Text to continue
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) prompt: String,

    /// Take the prompt for a user's message and answer it, through the model's chat template
    #[arg(long)]
    pub(crate) chat: bool,

    /// What the model is told before the chat
    #[arg(long, value_name = "TEXT", requires = "chat", allow_hyphen_values = true)]
    pub(crate) system: Option<String>,

    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,

    /// Print one JSON document instead of the text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// What the model is told before the chat
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) system: Option<String>,

    /// Answer with the full cache: nothing folds, nothing is evicted
    #[arg(long)]
    pub(crate) full: bool,

    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
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

/// How the cache becomes smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum MethodArg {
    /// Dynamic Memory Compression: tokens are folded into the newest slot
    Dmc,
    /// Dynamic Memory Sparsification: tokens are evicted when they leave the newest --delay
    Dms,
    /// Grouped-query attention: fewer KV heads, means of the original's; a plain model comes out
    Gqa,
}

impl MethodArg {
    /// Its name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            MethodArg::Dmc => "dmc",
            MethodArg::Dms => "dms",
            MethodArg::Gqa => "gqa",
        }
    }
}

/// Where decisions come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DecisionSource {
    /// A linear layer of its own, which leaves the original model untouched at the start
    Head,
    /// The last channel of keys and queries (the paper; dms: of a query per group); costs more training
    Borrowed,
}

/// What the model is asked to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LossKind {
    /// The original model's predictions (KL divergence)
    Distill,
    /// The text's own next tokens (the paper)
    Lm,
}

/// Which distribution leads the divergence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kl {
    /// KL(original || compressed)
    Forward,
    /// KL(compressed || original)
    Reverse,
}

impl From<Kl> for KlDirection {
    fn from(kl: Kl) -> Self {
        match kl {
            Kl::Forward => KlDirection::Forward,
            Kl::Reverse => KlDirection::Reverse,
        }
    }
}

/// Heads that share one target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ScopeArg {
    /// All together: the model chooses where to compress (the paper)
    Global,
    /// Each layer by itself
    Layer,
    /// Each KV head by itself
    Head,
}

impl From<ScopeArg> for Scope {
    fn from(scope: ScopeArg) -> Self {
        match scope {
            ScopeArg::Global => Scope::Global,
            ScopeArg::Layer => Scope::Layer,
            ScopeArg::Head => Scope::Head,
        }
    }
}

/// Tokens that share one target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OverArg {
    /// Each sequence by itself (the paper's code)
    Sequence,
    /// The whole batch (the paper's formula)
    Batch,
}

impl From<OverArg> for Over {
    fn from(over: OverArg) -> Self {
        match over {
            OverArg::Sequence => Over::Sequence,
            OverArg::Batch => Over::Batch,
        }
    }
}

/// Sides of the ratio on which training presses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PullArg {
    /// Below it only (the paper): the model may fold more than it was asked to
    Up,
    /// Below and above it
    Both,
}

impl From<PullArg> for Pull {
    fn from(pull: PullArg) -> Self {
        match pull {
            PullArg::Up => Pull::Up,
            PullArg::Both => Pull::Both,
        }
    }
}

/// Which weights change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TrainArg {
    /// The decision heads alone
    Decide,
    /// Queries and keys, and the decision heads
    Qk,
    /// Queries, keys, values, the heads' output, and the decision heads
    Attention,
    /// Everything
    All,
}

impl From<TrainArg> for Train {
    fn from(train: TrainArg) -> Self {
        match train {
            TrainArg::Decide => Train::Decide,
            TrainArg::Qk => Train::Qk,
            TrainArg::Attention => Train::Attention,
            TrainArg::All => Train::All,
        }
    }
}

/// Who decides together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ShareArg {
    /// Every KV head for itself
    Head,
    /// All KV heads of a layer together, so their caches stay equally long
    Layer,
}

impl From<ShareArg> for Share {
    fn from(share: ShareArg) -> Self {
        match share {
            ShareArg::Head => Share::Head,
            ShareArg::Layer => Share::Layer,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct RetrofitArgs {
    /// Model directory, or stories260k
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: String,

    /// New directory for the retrofitted model
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,

    /// Compression: tokens seen per slot held, exact recent tokens counted; 4 keeps a quarter
    #[arg(
        long,
        value_name = "R",
        allow_negative_numbers = true,
        required_unless_present = "kv_heads",
        conflicts_with = "kv_heads"
    )]
    pub(crate) ratio: Option<f64>,

    /// Retrofitted model, or delta over --model, to go on from towards a higher --ratio; the original is still the teacher
    ///
    /// It keeps its own way to compress. So one training passes through several ratios, each of which can be kept. With
    /// --steps 0 a model whose decisions were fitted moves to any --ratio, lower ones too, and nothing is trained.
    #[arg(long, value_name = "MODEL", conflicts_with_all = [
        "kv_heads", "method", "decision", "delay", "sinks", "pool_window", "log_mass", "share", "decision_scale", "decision_offset",
    ])]
    pub(crate) from: Option<PathBuf>,

    /// How the cache becomes smaller; dms keeps more of a model at equal training and ratio (docs/LOG.md)
    #[arg(long, value_enum, default_value_t = MethodArg::Dms)]
    pub(crate) method: MethodArg,

    /// KV heads that are left by --method gqa; divides the model's
    #[arg(long, value_name = "N", required_if_eq("method", "gqa"))]
    pub(crate) kv_heads: Option<usize>,

    /// Training text: files or folders [default: the model writes its own]
    ///
    /// A .jsonl file holds a document per line, a .parquet file one per row, any other file is one; each may be compressed
    /// (.zst). Folders are read with their folders. Attention, positions and folding start afresh at each document.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub(crate) text: Vec<PathBuf>,

    /// What the model is asked to keep
    #[arg(long, value_enum, default_value_t = LossKind::Distill)]
    pub(crate) loss: LossKind,

    /// Where the decision to append or to fold comes from
    #[arg(long, value_enum, default_value_t = DecisionSource::Head, conflicts_with = "kv_heads")]
    pub(crate) decision: DecisionSource,

    /// Tokens of text that decision heads are fitted on before training; 0 begins without [default: 16384, without --from]
    ///
    /// The original model shows what folding a token would cost: who reads it later, and how far its value is from the one
    /// before it. Heads that predict this begin at the full ratio; without them the target rises step by step.
    #[arg(long, value_name = "TOKENS", conflicts_with = "kv_heads")]
    pub(crate) calibrate: Option<usize>,

    /// Optimiser steps; 0 leaves the model as it was fitted. At the end fitted decisions are moved to the --ratio
    #[arg(long, default_value_t = settings::STEPS, value_name = "N")]
    pub(crate) steps: u64,

    /// Seed of everything random
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) seed: u64,

    /// Go on with the interrupted run of --out; the other arguments must be the same
    #[arg(long)]
    pub(crate) resume: bool,

    /// Print tokens, steps, memory and expected hours, and stop
    ///
    /// Hours are from a few sequences that are trained on for the measurement; nothing is written.
    #[arg(long, conflicts_with = "resume")]
    pub(crate) plan: bool,

    /// Which weights change; what does not costs no gradient and no moments
    #[arg(long, value_enum, default_value_t = TrainArg::All)]
    pub(crate) train: TrainArg,

    /// Print one JSON document at the end
    #[arg(long)]
    pub(crate) json: bool,

    /// Newest tokens that stay exact before they are folded or evicted; 0 folds at once (the paper)
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = settings::DELAY,
        conflicts_with = "kv_heads",
        help_heading = "How to compress"
    )]
    pub(crate) delay: usize,

    /// First tokens that keep slots of their own, whatever is decided (attention sinks); 0 as in the papers
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = settings::SINKS,
        conflicts_with = "kv_heads",
        help_heading = "How to compress"
    )]
    pub(crate) sinks: usize,

    /// A slot averages this many newest tokens at most; 0 averages all (the paper's code: 12)
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = 0,
        conflicts_with = "kv_heads",
        help_heading = "How to compress"
    )]
    pub(crate) pool_window: usize,

    /// Add the log of a slot's mass to its score; costs a float per slot [default: with dmc decisions that are fitted]
    #[arg(
        long,
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        conflicts_with = "kv_heads",
        help_heading = "How to compress"
    )]
    pub(crate) log_mass: Option<bool>,

    /// Who decides together
    #[arg(
        long,
        value_enum,
        default_value_t = ShareArg::Head,
        conflicts_with = "kv_heads",
        help_heading = "How to compress"
    )]
    pub(crate) share: ShareArg,

    /// Factor on the decision logit [default: 4 for head, 20 for borrowed, 100 with dms; the paper: 1]
    #[arg(
        long,
        value_name = "X",
        allow_negative_numbers = true,
        conflicts_with = "kv_heads",
        help_heading = "How to compress"
    )]
    pub(crate) decision_scale: Option<f64>,

    /// Subtracted from the decision logit, so that nothing folds at the start [default: 3, or 5 for borrowed with dms; the
    /// paper: 5]
    #[arg(
        long,
        value_name = "X",
        allow_negative_numbers = true,
        conflicts_with = "kv_heads",
        help_heading = "How to compress"
    )]
    pub(crate) decision_offset: Option<f64>,

    /// Sequences of a step
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "How to train")]
    pub(crate) batch: usize,

    /// Compute a step's sequences in this many parts: less memory, the same result up to rounding
    ///
    /// With --over batch the fold rates of all parts are needed before the first gradient, which costs a further forward
    /// pass; with --over sequence nothing.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "How to train")]
    pub(crate) accumulate: usize,

    /// The documents' field in JSON objects and their column in tables
    #[arg(long, value_name = "NAME", default_value = "text", help_heading = "How to train")]
    pub(crate) text_field: String,

    /// Tokens of --text that are used at most [default: what the steps take]
    ///
    /// Of each document as many as a sequence has, from somewhere inside, if that makes enough: many texts say more than one.
    /// With --no-reset, whole documents.
    #[arg(long, value_name = "N", help_heading = "How to train")]
    pub(crate) max_tokens: Option<usize>,

    /// Join the documents to one stream: no fresh start at each (the paper's code)
    #[arg(long, help_heading = "How to train")]
    pub(crate) no_reset: bool,

    /// Tokens of a sequence at most [default: 512, or the model's context if shorter]
    #[arg(long, value_name = "N", help_heading = "How to train")]
    pub(crate) length: Option<usize>,

    /// Texts that the model writes when there is no --text
    #[arg(long, value_name = "N", default_value_t = 256, help_heading = "How to train")]
    pub(crate) samples: usize,

    /// Highest learning rate [default: 1e-3 * (64 / hidden size)^0.75, a tenth of it after a fit]
    #[arg(long, value_name = "X", allow_negative_numbers = true, help_heading = "How to train")]
    pub(crate) lr: Option<f64>,

    /// Factor on the learning rate of the decision heads [default: 10]
    #[arg(
        long,
        value_name = "X",
        allow_negative_numbers = true,
        conflicts_with = "kv_heads",
        help_heading = "How to train"
    )]
    pub(crate) decide_factor: Option<f64>,

    /// Direction of the distillation's divergence
    #[arg(long, value_enum, default_value_t = Kl::Forward, help_heading = "How to train")]
    pub(crate) kl: Kl,

    /// Heads that must reach the ratio together
    #[arg(
        long,
        value_enum,
        default_value_t = ScopeArg::Global,
        conflicts_with = "kv_heads",
        help_heading = "How to train"
    )]
    pub(crate) scope: ScopeArg,

    /// Tokens that must reach the ratio together
    #[arg(
        long,
        value_enum,
        default_value_t = OverArg::Batch,
        conflicts_with = "kv_heads",
        help_heading = "How to train"
    )]
    pub(crate) over: OverArg,

    /// Sides of the ratio on which training presses
    #[arg(
        long,
        value_enum,
        default_value_t = PullArg::Up,
        conflicts_with = "kv_heads",
        help_heading = "How to train"
    )]
    pub(crate) pull: PullArg,

    /// Operands of all products with weights; the trained numbers are f32 [default: bf16 from 256 channels on]
    #[arg(long, value_enum, help_heading = "How to train")]
    pub(crate) precision: Option<PrecisionArg>,

    /// Recompute each block in the backward pass: less memory, more time
    #[arg(long, help_heading = "How to train")]
    pub(crate) recompute: bool,

    /// Steps between checkpoints of the run
    #[arg(long, value_name = "N", default_value_t = 25, help_heading = "How to train")]
    pub(crate) checkpoint_every: u64,
}

fn temperature(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(t) if t.is_finite() && t >= 0.0 => Ok(t),
        _ => Err("a number of at least 0 is expected".into()),
    }
}
