//! `kvfold retrofit`.

use super::measure::measure;
use super::papers::Papers;
use super::plan::plan;
use super::texts::{self, Split, Texts};
use super::train::train;
use crate::cli::{DecisionSource, LossKind, MethodArg, RetrofitArgs};
use crate::error::AppError;
use crate::interrupt::Interrupt;
use crate::output;
use kvfold_engine::Engine;
use kvfold_kernels::FastCpu;
use kvfold_kernels::dmc::{self, Decision, Dmc};
use kvfold_model::shape::Shape;
use kvfold_model::{Checkpoint, ModelError, ensure_absent};
use kvfold_report::receipt::{Memory, Quality, Training};
use kvfold_report::{format, heat_map};
use kvfold_retrofit::settings::{BORROWED_SCALE, CALIBRATION_TOKENS, DMS_BORROWED, HEAD_SCALE, Loss, Method, OFFSET};
use kvfold_retrofit::{Corpus, Fit, Origin, RetrofitError, RunDir, SETTLE_PASSES, Settings, Settled, Trainer};
use serde::Serialize;
use std::path::Path;

#[derive(Serialize)]
struct Output<'a> {
    schema: &'static str,
    kvfold_version: &'static str,
    commit: &'static str,
    out: String,
    model: &'a str,
    method: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    delay: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_heads: Option<usize>,
    ratio_asked: f64,
    #[serde(flatten)]
    memory: &'a Memory,
    #[serde(flatten)]
    quality: &'a Quality,
    training: Training,
    /// What fitting the decisions found, where this process did it.
    #[serde(skip_serializing_if = "Option::is_none")]
    calibration: Option<Fit>,
    /// How far decisions were moved at the end, where their heads have biases.
    #[serde(skip_serializing_if = "Option::is_none")]
    settled: Option<Settled>,
    command: String,
}

pub(crate) fn run(args: &RetrofitArgs, interrupt: &Interrupt) -> Result<(), AppError> {
    ensure_absent(&args.out)?;
    let base = Checkpoint::open(&args.model)?;
    let origin = args.from.as_deref().map(|model| open_over(&args.model, model)).transpose()?;
    let texts = Texts::read(args)?;
    let settings = settings(args, (&base, origin.as_ref()), &texts)?;
    if args.plan {
        return plan(args, &base, settings);
    }
    let run = RunDir::of(&args.out);
    if run.exists() && !args.resume {
        return Err(RetrofitError::Unfinished { dir: run.path().display().to_string() }.into());
    }
    let mut trainer = match &origin {
        None => Trainer::new(FastCpu::new(), &base, settings)?,
        Some(origin) => Trainer::from_model(FastCpu::new(), &base, origin, settings)?,
    };
    drop(origin);
    let (corpus, reports) = if args.resume {
        let resumed = run.resume(&base, &mut trainer).map_err(other_text)?;
        for reason in &resumed.damaged {
            output::note(&format!("kvfold: {reason}; going on without it"));
        }
        output::note(&format!("going on after step {} of {}", trainer.steps(), trainer.settings().stages.total()));
        (resumed.corpus, resumed.reports)
    } else {
        let corpus = texts.corpus(trainer.settings(), &base, args.json)?;
        texts::check(&corpus, trainer.settings())?;
        run.create(&base, trainer.settings(), &corpus)?;
        (corpus, Vec::new())
    };
    drop(texts);
    let Split { training, settling, held_out } = texts::split(&corpus);

    let bar = output::bar("fitting decisions", trainer.shape().layers, "layers", args.json);
    let fit = trainer.calibrate(&training, |done| bar.set_position(done as u64))?;
    let seen = !bar.is_hidden();
    bar.finish_and_clear();
    if let Some(fit) = fit.filter(|_| seen) {
        output::note(&format!(
            "decisions fitted on {} tokens: on held-out ones their folds cost {} of what random ones do; the cheapest cost {}",
            format::exact(fit.tokens as u64),
            format::percent(fit.chosen / fit.random),
            format::percent(fit.best / fit.random),
        ));
    }
    let saved = format!("the run is saved in {}: go on with --resume", run.path().display());
    interrupt.farewell(&format!("interrupted; {saved}"));
    let trained = interrupt.deferred(|asked| {
        train(&mut trainer, &training, reports, args.json, |trainer, reports, wary| {
            let stop = asked() && !trainer.finished();
            let due = trainer.steps().is_multiple_of(args.checkpoint_every) || trainer.finished();
            if stop || due && !wary {
                run.save(trainer, reports)?;
            }
            match stop {
                true => Err(AppError::Interrupted(format!("interrupted after step {}; {saved}", trainer.steps()))),
                false => Ok(()),
            }
        })
    })?;

    let settled = settle(&mut trainer, &settling, args.json);
    let model = trainer.checkpoint(&base)?;
    let settings = trainer.settings().clone();
    // Teacher, moments and buffers make room for the two models that are measured.
    drop(trainer);
    let mut original = Engine::new(FastCpu::new(), &base);
    let mut compressed = Engine::new(FastCpu::new(), &model);
    let (memory, quality) = measure((&mut original, &mut compressed), &held_out, args.json)?;
    let papers = Papers {
        base: &base,
        settings: &settings,
        trained: &trained,
        memory: &memory,
        quality: &quality,
        text: &args.text,
    };
    papers.save(&model, (&run.staging(), &args.out), &[])?;
    run.publish(&args.out)?;

    let result = Output {
        schema: "kvfold.retrofit/1",
        kvfold_version: env!("CARGO_PKG_VERSION"),
        commit: output::COMMIT,
        out: args.out.display().to_string(),
        model: &args.model,
        method: settings.method.name(),
        delay: settings.method.dynamic().map(|dmc| dmc.delay),
        kv_heads: args.kv_heads,
        ratio_asked: settings.ratio,
        memory: &memory,
        quality: &quality,
        training: papers.training(),
        calibration: fit,
        settled,
        command: output::command_line(),
    };
    if args.json {
        return output::json(&result);
    }
    output::line(&format!(
        "{}\n\n{}: {} logical, {} physical; perplexity {:.3} -> {:.3} ({}) on {} held-out tokens",
        heat_map(&memory.heads, &output::style()).trim_end(),
        result.out,
        format::ratio(memory.logical_ratio),
        format::ratio(memory.physical_ratio),
        quality.perplexity.dense,
        quality.perplexity.compressed,
        format::change(quality.perplexity.rise()),
        format::exact(quality.evaluated_tokens),
    ))
}

/// Moves decisions to the ratio that was asked for, and says how far.
fn settle(trainer: &mut Trainer<FastCpu>, text: &Corpus, quiet: bool) -> Option<Settled> {
    let bar = output::bar("settling on the ratio", SETTLE_PASSES, "passes at most", quiet);
    let settled = trainer.settle(text, |passes| bar.set_position(passes as u64));
    let seen = !bar.is_hidden();
    bar.finish_and_clear();
    let settled = settled?;
    if seen && settled.passes > 1 {
        let Settled { tokens, before, after, .. } = settled;
        output::note(&format!(
            "decisions moved from {} to {} on {} tokens of text",
            format::ratio(before),
            format::ratio(after),
            format::exact(tokens as u64),
        ));
    }
    Some(settled)
}

/// A model that is a directory, or a delta over a base.
fn open_over(base: &str, model: &Path) -> Result<Checkpoint, ModelError> {
    match model.is_file() {
        true => Checkpoint::open_delta(base, model),
        false => Checkpoint::open(&model.display().to_string()),
    }
}

/// The run that the arguments define.
fn settings(
    args: &RetrofitArgs,
    (base, origin): (&Checkpoint, Option<&Checkpoint>),
    texts: &Texts,
) -> Result<Settings, AppError> {
    let shape = Shape::of(&base.config);
    let recipe = |method| Settings::recipe(&shape, method, args.ratio.unwrap_or(1.0), args.steps);
    let mut settings = match (origin.map(Origin::of).transpose()?, args.method) {
        (Some((origin, method)), _) => recipe(method).beginning_at(origin),
        (None, MethodArg::Gqa) => {
            let kv_heads = args.kv_heads.unwrap_or(shape.heads.kv);
            let ratio = shape.heads.kv as f64 / kv_heads.max(1) as f64;
            Settings::recipe(&shape, Method::Gqa { kv_heads }, ratio, args.steps)
        }
        (None, MethodArg::Dmc | MethodArg::Dms) if args.kv_heads.is_some() => {
            let (setting, found) = ("method", args.method.name().to_owned());
            let expected = "gqa, since --kv-heads says how many KV heads are to be left".into();
            return Err(RetrofitError::Setting { setting, found, expected }.into());
        }
        (None, MethodArg::Dmc) => recipe(dmc(args, dmc::Method::Dmc).into()),
        (None, MethodArg::Dms) => recipe(dmc(args, dmc::Method::Dms).into()),
    };
    let fits = match &settings.from {
        None => fits_at_first(args),
        // What was fitted for a lower ratio does not know what else costs little.
        Some(origin) => settings.settles() && args.steps > 0 && args.ratio.is_some_and(|ratio| ratio > origin.ratio),
    };
    if let tokens @ 1.. = args.calibrate.unwrap_or(if fits { CALIBRATION_TOKENS } else { 0 }) {
        settings = settings.calibrated(tokens);
    }
    settings.loss = match args.loss {
        LossKind::Lm => Loss::Lm,
        LossKind::Distill => Loss::Distill { direction: args.kl.into() },
    };
    settings.pressure.scope = args.scope.into();
    settings.pressure.over = args.over.into();
    settings.pressure.pull = args.pull.into();
    settings.learning.rate = args.lr.unwrap_or(settings.learning.rate);
    settings.learning.decide_factor = args.decide_factor.unwrap_or(settings.learning.decide_factor);
    settings.length = args.length.unwrap_or(settings.length);
    settings.batch = args.batch;
    settings.seed = args.seed;
    settings.precision = args.precision.map_or(settings.precision, Into::into);
    settings.recompute = args.recompute;
    settings.accumulate = args.accumulate;
    settings.train = args.train.into();
    settings.text = texts.settings(args, &settings);
    settings.validate(&shape)?;
    if args.checkpoint_every == 0 {
        let expected = "at least 1 step".into();
        return Err(RetrofitError::Setting { setting: "checkpoint_every", found: "0".into(), expected }.into());
    }
    Ok(settings)
}

/// Whether decisions of a run that begins at the original are fitted before its first step.
fn fits_at_first(args: &RetrofitArgs) -> bool {
    let heads = args.decision == DecisionSource::Head && args.method != MethodArg::Gqa;
    args.calibrate.map_or(heads, |tokens| tokens > 0)
}

/// How the model decides, token by token.
fn dmc(args: &RetrofitArgs, method: dmc::Method) -> Dmc {
    let (scale, offset) = match (args.decision, method) {
        (DecisionSource::Head, _) => (HEAD_SCALE, OFFSET),
        (DecisionSource::Borrowed, dmc::Method::Dmc) => (BORROWED_SCALE, OFFSET),
        (DecisionSource::Borrowed, dmc::Method::Dms) => DMS_BORROWED,
    };
    let (scale, offset) = (args.decision_scale.unwrap_or(scale), args.decision_offset.unwrap_or(offset));
    Dmc {
        method,
        decision: match args.decision {
            DecisionSource::Head => Decision::Head { scale, offset, bias: false, ahead: false },
            DecisionSource::Borrowed => Decision::Borrowed { scale, offset },
        },
        delay: args.delay,
        sinks: args.sinks,
        pool_window: (args.pool_window > 0).then_some(args.pool_window),
        log_mass: args.log_mass.unwrap_or(method == dmc::Method::Dmc && fits_at_first(args)),
        share: args.share.into(),
    }
}

/// Says in words that the texts are not those that the run was started with.
fn other_text(error: RetrofitError) -> RetrofitError {
    match error {
        RetrofitError::OtherRun { dir, what, .. } if what == "text.digest" => RetrofitError::OtherRun {
            dir,
            what: "text".into(),
            found: "of other contents".into(),
            wanted: "what the files of --text hold now".into(),
        },
        other => other,
    }
}
