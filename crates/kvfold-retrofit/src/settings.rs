//! Everything that defines a run.

use crate::error::RetrofitError;
use crate::origin::Origin;
use kvfold_kernels::dmc::{self, Borrows, Decision, Dmc, Share};
use kvfold_kernels::ops::{Exempt, Heads, KlDirection, Over, Precision, Pull, Scope, StatedAt};
use kvfold_model::names;
use kvfold_model::shape::Shape;
use serde::{Deserialize, Serialize};

/// How the cache is to become smaller.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// The model decides token by token: DMC or DMS.
    Dynamic(Dmc),
    /// Up-trained grouped-query attention: fewer KV heads, each at first the mean of those it stands for (spec 3.2). The
    /// result is a plain model.
    Gqa {
        /// KV heads that are left; a divisor of the model's.
        kv_heads: usize,
    },
}

impl Method {
    /// What the model decides with; `None` when it decides nothing.
    pub fn dynamic(&self) -> Option<&Dmc> {
        match self {
            Method::Dynamic(dmc) => Some(dmc),
            Method::Gqa { .. } => None,
        }
    }

    /// Channels that attention cannot use.
    pub fn borrows(&self) -> Borrows {
        self.dynamic().map_or(Borrows::Nothing, Dmc::borrows)
    }

    /// Tokens of a sequence that do not fold, whatever is decided.
    pub fn exempt(&self) -> Exempt {
        self.dynamic().map_or(Exempt::default(), Dmc::exempt)
    }

    /// Its name on the command line and in reports.
    pub fn name(&self) -> &'static str {
        match self {
            Method::Dynamic(dmc) => dmc.method.name(),
            Method::Gqa { .. } => "gqa",
        }
    }
}

impl From<Dmc> for Method {
    fn from(dmc: Dmc) -> Self {
        Method::Dynamic(dmc)
    }
}

/// What the model is asked to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Loss {
    /// Next-token cross-entropy on the text (the paper).
    Lm,
    /// KL divergence to the original model's predictions.
    Distill {
        /// Which distribution leads.
        direction: KlDirection,
    },
}

/// Where the training text comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Text {
    /// The user gives it.
    Given {
        /// SHA-256 of the documents.
        digest: String,
        /// Tokens that are used at most.
        max_tokens: Option<usize>,
        /// Whether attention, positions and folding start afresh at each document.
        reset: bool,
    },
    /// The model writes it.
    Own {
        /// Texts that it writes, each as long as a sequence.
        samples: usize,
    },
}

/// Which weights change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Train {
    /// Decision heads alone: what the model computes of its text stays the original's.
    Decide,
    /// Queries and keys, and decision heads.
    Qk,
    /// Queries, keys, values, the heads' output, and decision heads.
    Attention,
    /// Everything.
    #[default]
    All,
}

impl Train {
    /// Its name in settings.
    pub fn name(self) -> &'static str {
        match self {
            Train::Decide => "decide",
            Train::Qk => "qk",
            Train::Attention => "attention",
            Train::All => "all",
        }
    }

    /// Whether the weight of this name changes: `self_attn.q_proj` and whatever else queries have, biases and norms, and so
    /// on.
    pub fn trains(self, name: &str) -> bool {
        let of = |parts: &[&str]| parts.iter().any(|part| name.contains(part));
        match self {
            Train::Decide => of(&[names::DECIDE]),
            Train::Qk => of(&[".self_attn.q_", ".self_attn.k_", names::DECIDE]),
            Train::Attention => of(&[".self_attn."]),
            Train::All => true,
        }
    }
}

/// How decision heads are fitted before the first step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Tokens of the training text that are read for it.
    pub tokens: usize,
    /// Logit per unit of the logarithm of the cost: how steep decisions are, beside noise of scale 1.
    pub gain: f64,
}

/// The pressure to compress.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pressure {
    /// Heads that share one target.
    pub scope: Scope,
    /// Tokens that share one target.
    pub over: Over,
    /// Sides of the target on which it presses.
    #[serde(default)]
    pub pull: Pull,
    /// Factor on the hinge; 1 in the paper.
    pub weight: f64,
    /// Trains towards `ratio * (1 + margin)`, since decisions without noise fold a little less or more than with it.
    pub margin: f64,
}

/// Steps of each stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stages {
    /// Steps in which the borrowed channel fades out, 0 to zero it before the first; 0 for a decision head.
    pub zeroing: u64,
    /// Steps in which the target rises linearly from 1.
    pub ramp: u64,
    /// Steps at the full target.
    pub hold: u64,
}

impl Stages {
    /// Steps of the run.
    pub fn total(&self) -> u64 {
        self.zeroing + self.ramp + self.hold
    }
}

/// AdamW and its schedule.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Learning {
    /// Highest learning rate.
    pub rate: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// Share of the highest rate that is left at the end of the cosine.
    pub floor: f64,
    /// Factor on the decision heads' learning rate.
    pub decide_factor: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Decoupled weight decay on matrices.
    pub weight_decay: f64,
    /// Largest gradient norm.
    pub clip: f64,
}

/// A run's definition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// How the cache is to become smaller.
    pub method: Method,
    /// Compression asked for: tokens seen per slot held, exact recent tokens counted, at `length` tokens. Of shorter
    /// documents the same share of the tokens that are no longer exact is asked for. In GQA the KV heads of the original
    /// per KV head that is left.
    pub ratio: f64,
    /// The retrofitted model that the run begins at; `None` for the original.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Origin>,
    /// How decision heads begin; `None` for zero, where every logit is minus the offset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
    /// What the model is asked to keep.
    pub loss: Loss,
    /// Where the training text comes from.
    pub text: Text,
    /// The pressure to compress.
    pub pressure: Pressure,
    /// Temperature of relaxed decisions; 0.1 in the paper.
    pub temperature: f64,
    /// Tokens of a sequence.
    pub length: usize,
    /// Sequences of a step.
    pub batch: usize,
    /// Parts in which a step's batch is computed, one after the other: less memory, the same result up to rounding.
    pub accumulate: usize,
    /// Which weights change.
    pub train: Train,
    /// Steps of each stage.
    pub stages: Stages,
    /// The optimiser.
    pub learning: Learning,
    /// Seed of batches and noise.
    pub seed: u64,
    /// Operands of the products, forward and backward; the trained numbers themselves are f32.
    pub precision: Precision,
    /// Recomputes each block in the backward pass instead of keeping its activations.
    pub recompute: bool,
}

/// Newest tokens that stay exact: most of what delaying gives (`docs/LOG.md`).
pub const DELAY: usize = 32;
/// First tokens that keep slots of their own: one spares most of what folding costs before anything is learned
/// (`docs/LOG.md`).
pub const SINKS: usize = 1;
/// Subtracted from the decision logit; smaller than the paper's 5, where the gate sees almost no gradient.
pub const OFFSET: f64 = 3.0;
/// Factor on a decision head's outputs.
pub const HEAD_SCALE: f64 = 4.0;
/// Factor on a channel that DMC borrows.
pub const BORROWED_SCALE: f64 = 20.0;
/// Factor on a channel that DMS borrows, and what is subtracted then: its authors' numbers (spec 5.2).
pub const DMS_BORROWED: (f64, f64) = (100.0, 5.0);
/// Optimiser steps that teach a small model 4x.
pub const STEPS: u64 = 120;

/// Tokens of text that decision heads are fitted on.
pub const CALIBRATION_TOKENS: usize = 16_384;
/// Logit per unit of the logarithm of a cost.
const CALIBRATION_GAIN: f64 = 4.0;
/// Factor on the learning rate of heads that were fitted: what they know should not be lost in the first steps.
const CALIBRATED_DECIDE_FACTOR: f64 = 1.0;
/// Factor on the learning rate of all weights then: the model is near what it is to become, and large steps lead away from it.
const CALIBRATED_RATE_FACTOR: f64 = 0.1;

/// How a model compresses unless somebody wants it otherwise.
pub fn default_dmc() -> Dmc {
    Dmc {
        method: dmc::Method::Dmc,
        decision: Decision::Head { scale: HEAD_SCALE, offset: OFFSET, bias: false, ahead: false },
        delay: DELAY,
        sinks: SINKS,
        pool_window: None,
        log_mass: false,
        share: Share::Head,
    }
}

/// Channels below which a model gains no speed worth mentioning from bf16.
const NARROW: usize = 256;

/// Share of the steps at the full target, and of those in which a borrowed channel fades out.
const HOLD: f64 = 0.4;
const ZEROING: f64 = 0.15;

/// Most sequences of a step, and most texts that a model writes, that are believed: beyond, it is a slip of the finger.
const MAX_BATCH: usize = 1 << 16;
const MAX_SAMPLES: usize = 1 << 20;

impl Settings {
    /// The recipe for a model, a method, a ratio and a budget of steps. The numbers are measured: see `docs/LOG.md`.
    pub fn recipe(shape: &Shape, method: impl Into<Method>, ratio: f64, steps: u64) -> Self {
        let method = method.into();
        let share = |part: f64| (steps as f64 * part).round() as u64;
        let zeroing = if method.borrows() == Borrows::Nothing { 0 } else { share(ZEROING) };
        let hold = match method {
            Method::Dynamic(_) => share(HOLD).min(steps - zeroing),
            Method::Gqa { .. } => steps,
        };
        Self {
            method,
            ratio,
            from: None,
            calibration: None,
            loss: Loss::Distill { direction: KlDirection::Forward },
            text: Text::Given { digest: String::new(), max_tokens: None, reset: true },
            pressure: Pressure { scope: Scope::Global, over: Over::Batch, pull: Pull::Up, weight: 2.0, margin: 0.03 },
            temperature: 0.1,
            length: shape.context.min(512),
            batch: 8,
            accumulate: 1,
            train: Train::All,
            stages: Stages { zeroing, ramp: steps - zeroing - hold, hold },
            learning: Learning {
                rate: default_rate(shape),
                warmup: share(0.05).max(1),
                floor: 0.05,
                decide_factor: 10.0,
                beta1: 0.9,
                beta2: 0.95,
                weight_decay: 0.0,
                clip: 1.0,
            },
            seed: 0,
            precision: if shape.hidden < NARROW { Precision::F32 } else { Precision::Bf16 },
            recompute: false,
        }
    }

    /// The same run beginning at a retrofitted model, whose channels are free already.
    pub fn beginning_at(mut self, origin: Origin) -> Self {
        self.stages.ramp += std::mem::take(&mut self.stages.zeroing);
        Self { from: Some(origin), ..self }
    }

    /// The same run with decision heads that are fitted before its first step, for the full ratio: there is no ramp. The
    /// heads of a model that the run begins at stay of the form they have.
    pub fn calibrated(mut self, tokens: usize) -> Self {
        if self.from.is_none()
            && let Method::Dynamic(Dmc { decision: Decision::Head { bias, ahead, .. }, .. }) = &mut self.method
        {
            (*bias, *ahead) = (true, true);
        }
        self.stages.hold += std::mem::take(&mut self.stages.ramp);
        self.learning.decide_factor = CALIBRATED_DECIDE_FACTOR;
        self.learning.rate *= CALIBRATED_RATE_FACTOR;
        Self { calibration: Some(Calibration { tokens, gain: CALIBRATION_GAIN }), ..self }
    }

    /// The ratio from which the target rises.
    pub fn first_ratio(&self) -> f64 {
        self.from.as_ref().map_or(1.0, |origin| origin.ratio)
    }

    /// The ratio that is trained towards.
    pub fn target_ratio(&self) -> f64 {
        (self.ratio * (1.0 + self.pressure.margin)).min(self.highest_ratio())
    }

    /// The highest ratio that is possible at this length: what is exempt, and nothing else, is held. Heads that are merged
    /// are as many as they are.
    pub fn highest_ratio(&self) -> f64 {
        match &self.method {
            Method::Dynamic(dmc) => {
                let held = self.length - dmc.exempt().foldable(self.length).len();
                self.length as f64 / held.max(1) as f64
            }
            Method::Gqa { .. } => self.ratio,
        }
    }

    /// Of the tokens that may fold, the share that does at the ratio that is trained towards.
    pub(crate) fn fold_share(&self, dmc: &Dmc) -> f64 {
        (1.0 - 1.0 / self.target_ratio()) / self.foldable_share(dmc)
    }

    /// The ratio of a sequence of full length of whose tokens that may fold this share does.
    pub(crate) fn ratio_of_share(&self, dmc: &Dmc, share: f64) -> f64 {
        1.0 / (1.0 - share * self.foldable_share(dmc))
    }

    /// Of the tokens of a sequence of full length, the share that may fold.
    fn foldable_share(&self, dmc: &Dmc) -> f64 {
        dmc.exempt().foldable(self.length).len() as f64 / self.length as f64
    }

    /// Whether the decisions of this run settle on its ratio at the end: they do by the biases of their heads.
    pub fn settles(&self) -> bool {
        self.method.dynamic().is_some_and(Dmc::decide_bias)
    }

    /// Sequences of each part of a step's batch.
    pub fn part(&self) -> usize {
        self.batch.div_ceil(self.accumulate)
    }

    /// Where the ratio is stated: at a sequence's full length.
    pub fn stated_at(&self) -> StatedAt {
        StatedAt { length: self.length, exempt: self.method.exempt() }
    }

    /// The sizes of the model that is trained, for an original of these.
    pub fn shape(&self, original: &Shape) -> Shape {
        let Heads { kv: all, .. } = original.heads;
        let (kv, dmc) = match &self.method {
            Method::Dynamic(dmc) => (all, Some(dmc)),
            Method::Gqa { kv_heads } => (*kv_heads, None),
        };
        Shape {
            heads: Heads { kv, ..original.heads },
            decide_outputs: dmc.map_or(0, |dmc| dmc.decide_outputs(all)),
            decide_bias: dmc.is_some_and(Dmc::decide_bias),
            decide_ahead: dmc.is_some_and(Dmc::decide_ahead),
            ..original.clone()
        }
    }

    /// The ratio that is asked of documents of these lengths; an error if nothing of them is ever folded. Merged heads are
    /// as many on every document.
    pub fn ratio_on(&self, lengths: impl Iterator<Item = usize>) -> Result<f64, RetrofitError> {
        let Method::Dynamic(dmc) = &self.method else { return Ok(self.ratio) };
        let (mut tokens, mut folds, mut longest) = (0.0, 0.0, 0);
        for length in lengths {
            tokens += length as f64;
            folds += self.stated_at().target(1.0 - 1.0 / self.ratio, length) * length as f64;
            longest = longest.max(length);
        }
        match dmc.exempt().foldable(longest).is_empty() {
            false => Ok(tokens / (tokens - folds)),
            true => Err(RetrofitError::ShortDocuments { longest, exempt: dmc.exempt() }),
        }
    }

    /// Checks a run's definition for a model.
    pub fn validate(&self, shape: &Shape) -> Result<(), RetrofitError> {
        let must = |holds: bool, setting, found: String, expected: String| match holds {
            true => Ok(()),
            false => Err(RetrofitError::Setting { setting, found, expected }),
        };
        let number = |x: f64, from: f64, setting| {
            must(x.is_finite() && x >= from, setting, x.to_string(), format!("a finite number of at least {from}"))
        };
        number(self.ratio, 1.0, "ratio")?;
        let (first, expected) = (self.first_ratio(), "at least that of the model the run begins at".to_owned());
        let moves_only = self.stages.total() == 0;
        must(self.ratio >= first || moves_only, "ratio", self.ratio.to_string(), format!("{expected}, {first}"))?;
        let (context, length) = (shape.context, self.length);
        let in_context = (2..=context).contains(&length);
        must(in_context, "length", length.to_string(), format!("2 to {context}, the model's context"))?;
        let (Exempt { sinks, delay }, highest) = (self.method.exempt(), self.highest_ratio());
        let expected =
            format!("less than {length}, the tokens of a sequence: no token of a longer delay is ever folded");
        must(delay < length, "delay", delay.to_string(), expected)?;
        let expected = format!("less than {}, the tokens of a sequence that do not stay exact", length - delay);
        must(sinks < length - delay, "sinks", sinks.to_string(), expected)?;
        // Rounded down, since what the message states has to be accepted.
        let stated = (highest * 100.0).floor() / 100.0;
        let expected =
            format!("at most {stated:.2}: of {length} tokens, {delay} stay exact and {} have slots", sinks + 1);
        must(self.ratio <= highest, "ratio", self.ratio.to_string(), expected)?;
        let sequences = (1..=MAX_BATCH).contains(&self.batch);
        must(sequences, "batch", self.batch.to_string(), format!("1 to {MAX_BATCH} sequences"))?;
        let (parts, expected) = (self.accumulate, format!("1 to {}, the sequences of a step", self.batch));
        must((1..=self.batch).contains(&parts), "accumulate", parts.to_string(), expected)?;
        let something = self.stages.total() > 0 || self.calibration.is_some() || self.from.is_some() && self.settles();
        let expected = "at least 1 step, or decisions that are fitted (--calibrate) or, of a model that was fitted, moved (--from)";
        must(something, "steps", "0".into(), expected.into())?;
        let heads = self.shape(shape).decide_outputs > 0;
        let expected = "qk, attention or all: without decision heads nothing would train".into();
        must(heads || self.train != Train::Decide, "train", self.train.name().into(), expected)?;
        if let Some(Calibration { tokens, gain }) = self.calibration {
            let fits = self.method.dynamic().is_some_and(Dmc::decide_bias);
            let expected = "0: only decision heads with biases can be fitted".into();
            must(fits, "calibrate", tokens.to_string(), expected)?;
            must(tokens > 0, "calibrate", "0".into(), "at least 1 token".into())?;
            number(gain, 1e-6, "calibration gain")?;
        }
        let (borrows, zeroing) = (self.method.borrows() != Borrows::Nothing, self.stages.zeroing);
        let expected = "0: no channel is borrowed".into();
        must(borrows || zeroing == 0, "zeroing steps", zeroing.to_string(), expected)?;
        if let Text::Own { samples } = self.text {
            let expected = format!("2 (one to train on and one to measure on) to {MAX_SAMPLES}");
            must((2..=MAX_SAMPLES).contains(&samples), "samples", samples.to_string(), expected)?;
        }
        match &self.method {
            Method::Gqa { kv_heads } => {
                let all = shape.heads.kv;
                let expected = format!("a divisor of {all}, the model's KV heads, below it");
                let fewer = (1..all).contains(kv_heads) && all.is_multiple_of(*kv_heads);
                must(fewer, "kv_heads", kv_heads.to_string(), expected)?;
                let ratio = all as f64 / *kv_heads as f64;
                let expected = format!("{ratio}, since {kv_heads} of {all} KV heads are left");
                must(self.ratio == ratio, "ratio", self.ratio.to_string(), expected)?;
            }
            Method::Dynamic(dmc) => {
                if let Some(window) = dmc.pool_window {
                    let expected = format!("1 to {context}, the model's context, or none for the whole segment");
                    must((1..=context).contains(&window), "pool_window", window.to_string(), expected)?;
                }
                if dmc.method == dmc::Method::Dms {
                    let window = dmc.pool_window.unwrap_or(0);
                    must(window == 0, "pool_window", window.to_string(), "none: DMS averages nothing".into())?;
                    must(!dmc.log_mass, "log_mass", "true".into(), "false: DMS has no importances".into())?;
                }
                let (Decision::Borrowed { scale, offset } | Decision::Head { scale, offset, .. }) = dmc.decision;
                number(scale, 1e-6, "decision scale")?;
                must(offset.is_finite(), "decision offset", offset.to_string(), "a finite number".into())?;
            }
        }
        let expected = "f32 or bf16: 8-bit weights have no gradient".into();
        must(self.precision != Precision::Q8, "precision", "q8".into(), expected)?;
        number(self.temperature, 1e-6, "temperature")?;
        number(self.pressure.weight, 0.0, "hinge weight")?;
        number(self.pressure.margin, 0.0, "margin")?;
        let learning = self.learning;
        number(learning.rate, 0.0, "lr")?;
        must((0.0..=1.0).contains(&learning.floor), "lr floor", learning.floor.to_string(), "0 to 1".into())?;
        number(learning.decide_factor, 0.0, "decision lr factor")?;
        for (beta, setting) in [(learning.beta1, "beta1"), (learning.beta2, "beta2")] {
            must((0.0..1.0).contains(&beta), setting, beta.to_string(), "at least 0 and below 1".into())?;
        }
        number(learning.weight_decay, 0.0, "weight decay")?;
        number(learning.clip, 1e-12, "clip")
    }
}

/// Highest learning rate by width: 1e-3 was best for 64 channels, and 2e-4 worked for 576.
pub fn default_rate(shape: &Shape) -> f64 {
    1e-3 * (64.0 / shape.hidden as f64).powf(0.75)
}
