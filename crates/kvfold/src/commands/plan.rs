//! `kvfold retrofit --plan`: what a run takes, before it starts.

use crate::cli::RetrofitArgs;
use crate::error::AppError;
use crate::output;
use kvfold_kernels::FastCpu;
use kvfold_kernels::noise::hash;
use kvfold_kernels::ops::Over;
use kvfold_model::Checkpoint;
use kvfold_report::format;
use kvfold_retrofit::plan::Plan;
use kvfold_retrofit::settings::Stages;
use kvfold_retrofit::{Corpus, SETTLE_TOKENS, Settings, Trainer};
use serde::Serialize;
use std::time::{Duration, Instant};

/// Steps of each kind that are timed, after one that is not.
const TIMED: usize = 2;

#[derive(Serialize)]
struct Output<'a> {
    schema: &'static str,
    model: &'a str,
    method: &'static str,
    ratio: f64,
    train: &'static str,
    recompute: bool,
    #[serde(flatten)]
    plan: &'a Plan,
    /// Of this machine, which has this memory; 0 if it is not known.
    machine_memory_bytes: u64,
    tokens_per_second: f64,
    hours: f64,
}

/// What a token of a fit costs of one that is trained on, about: no gradients, and attention twice.
const FIT_COST: f64 = 0.4;

/// What a token that decisions settle on costs of one that is trained on, about: two forward passes.
const SETTLE_COST: f64 = 0.5;

/// Prints the plan.
pub(crate) fn plan(args: &RetrofitArgs, base: &Checkpoint, settings: Settings) -> Result<(), AppError> {
    let plan = Plan::new(base, &settings);
    let step = measured_step(base, &settings)?;
    let rate = (plan.batch * plan.length) as f64 / step.as_secs_f64();
    let fitted = settings.calibration.as_ref().map_or(0, |calibration| calibration.tokens);
    let settled = if settings.settles() { SETTLE_TOKENS } else { 0 };
    let tokens = plan.tokens as f64 + FIT_COST * fitted as f64 + SETTLE_COST * settled as f64;
    let seconds = tokens / rate;
    let result = Output {
        schema: "kvfold.plan/1",
        model: &args.model,
        method: settings.method.name(),
        ratio: settings.ratio,
        train: settings.train.name(),
        recompute: settings.recompute,
        machine_memory_bytes: output::machine().memory_bytes,
        tokens_per_second: rate,
        hours: seconds / 3600.0,
        plan: &plan,
    };
    if args.json {
        return output::json(&result);
    }
    let memory = &plan.memory;
    let rows = [
        ("steps", format!("{} of {} x {} tokens", plan.steps, plan.batch, plan.length)),
        ("tokens", format::exact(plan.tokens)),
        (
            "trained",
            format!("{} of {} parameters", format::exact(plan.trained_parameters), format::exact(plan.parameters)),
        ),
        (
            "memory",
            format!(
                "{} at its highest; this machine has {}",
                format::bytes(memory.peak),
                format::bytes(result.machine_memory_bytes)
            ),
        ),
        ("  program", format::bytes(memory.program)),
        ("  model", format::bytes(memory.base + memory.weights + memory.packed)),
        ("  moments", format::bytes(memory.moments)),
        ("  gradients", format::bytes(memory.gradients)),
        ("  activations", format!("{} for {} sequences at a time", format::bytes(memory.activations), plan.part)),
        ("  logits", format::bytes(memory.logits)),
        ("  fitting", format::bytes(memory.fitting)),
        ("  evaluation", format::bytes(memory.evaluation)),
        ("disk", format!("{} for checkpoints", format::bytes(plan.run_bytes))),
        (
            "time",
            format!(
                "{} at {} tokens/s, measured on this machine",
                format::duration(seconds),
                format::exact(result.tokens_per_second as u64)
            ),
        ),
    ];
    let lines: Vec<String> = rows.iter().map(|(label, value)| format!("{label:<14}{value}")).collect();
    output::line(&lines.join("\n"))
}

/// The time of a step: what any step costs, and what each of its sequences adds.
fn measured_step(base: &Checkpoint, settings: &Settings) -> Result<Duration, AppError> {
    let stages = Stages { zeroing: 0, ramp: 0, hold: u64::MAX };
    let probe = Settings { batch: 1, accumulate: 1, stages, from: None, ..settings.clone() };
    let vocab = base.config.vocab_size as u64;
    let corpus = |tokens: usize| {
        let ids = (0..tokens as u64).map(|n| (hash(&[n]) % vocab) as u32).collect();
        Corpus::cut(ids, tokens)
    };
    let (short, full) = (corpus(2)?, corpus(settings.length)?);
    let mut trainer = Trainer::new(FastCpu::new(), base, probe)?;
    let mut timed = |corpus: &Corpus| -> Result<Duration, AppError> {
        let mut best = Duration::MAX;
        for n in 0..=TIMED {
            let started = Instant::now();
            trainer.step(corpus)?;
            if n > 0 {
                best = best.min(started.elapsed());
            }
        }
        Ok(best)
    };
    let (fixed, whole) = (timed(&short)?, timed(&full)?);
    let mut sequence = whole.saturating_sub(fixed);
    let folds = settings.method.dynamic().is_some();
    if folds && settings.accumulate > 1 && settings.pressure.over == Over::Batch {
        // Forward, teacher and backward pass are worth four forward passes, and there is a fifth.
        sequence = sequence.mul_f64(1.25);
    }
    Ok(fixed + sequence.mul_f64(settings.batch as f64))
}
