//! The arguments of `kvfold retrofit`.

use super::PrecisionArg;
use clap::{Args, ValueEnum};
use kvfold_kernels::dmc::Share;
use kvfold_kernels::ops::{KlDirection, Over, Pull, Scope};
use kvfold_retrofit::settings::{self, Train};
use std::path::PathBuf;

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

    /// Tokens of text that decision heads are fitted on before training; 0 begins without [default: 16384, with --from only
    /// where fitted decisions go to a higher ratio]
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
