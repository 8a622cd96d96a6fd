//! What stands beside the weights of a retrofitted model: its card and its training curve.

use super::train::Trained;
use crate::error::AppError;
use crate::output;
use kvfold_kernels::dmc::{self, Decision};
use kvfold_model::{Checkpoint, embedded};
use kvfold_report::card::Recipe;
use kvfold_report::receipt::{self, Memory, Quality, Training};
use kvfold_report::{Card, Curve, Point};
use kvfold_retrofit::Settings;
use kvfold_retrofit::settings::{Loss, Method, Text};
use std::path::{Path, PathBuf};

/// A finished retrofit and what came of it.
#[derive(Debug)]
pub(crate) struct Papers<'a> {
    pub(crate) base: &'a Checkpoint,
    pub(crate) settings: &'a Settings,
    pub(crate) trained: &'a Trained,
    pub(crate) memory: &'a Memory,
    pub(crate) quality: &'a Quality,
    /// The user's training text, if it was not the model's own.
    pub(crate) text: &'a [PathBuf],
}

impl Papers<'_> {
    /// Writes `model` into the new directory `dir` with the papers and `extra` files beside it. `out` is the name it will
    /// be known by.
    pub(crate) fn save(
        &self,
        model: &Checkpoint,
        (dir, out): (&Path, &Path),
        extra: &[(&str, &[u8])],
    ) -> Result<(), AppError> {
        let card = self.card(out, model.config.architecture()).render();
        let curve = self.curve()?.to_json();
        let papers = [("README.md", card.as_bytes()), ("training_curve.json", curve.as_bytes())];
        Ok(model.save(dir, &[&papers, extra].concat())?)
    }

    /// What the training of this process took.
    pub(crate) fn training(&self) -> Training {
        let reports = &self.trained.reports;
        let before = reports.len() - self.trained.steps as usize;
        let tokens = reports[before..].iter().map(|report| report.tokens).sum();
        let seconds = self.trained.stepping.as_secs_f64();
        Training {
            steps: self.trained.steps,
            tokens,
            seconds,
            saving_seconds: self.trained.saving.as_secs_f64(),
            tokens_per_second: tokens as f64 / seconds.max(f64::MIN_POSITIVE),
        }
    }

    fn card(&self, out: &Path, architecture: &str) -> Card {
        let settings = self.settings;
        let base_model = self.base.source.clone();
        Card {
            name: out.file_name().unwrap_or(out.as_os_str()).to_string_lossy().into_owned(),
            license: (base_model == embedded::STORIES260K).then(|| "mit".to_owned()),
            base_model,
            architecture: architecture.to_owned(),
            recipe: Recipe {
                ratio_asked: settings.ratio,
                ratio_trained: self.trained.reports.last().map(|report| report.ratio),
                context_tokens: settings.length as u64,
                method: method(&settings.method),
                delay: settings.method.exempt().delay as u64,
                sinks: settings.method.exempt().sinks as u64,
                decision: settings.method.dynamic().map(|dmc| decision(dmc.decision)),
                looks_back: settings.method.dynamic().is_some_and(dmc::Dmc::decide_ahead),
                fitted_tokens: settings.calibration.map(|calibration| calibration.tokens as u64),
                loss: match settings.loss {
                    Loss::Lm => "lm".to_owned(),
                    Loss::Distill { .. } => "distill".to_owned(),
                },
                steps: settings.stages.total(),
                tokens: self.trained.reports.iter().map(|report| report.tokens).sum(),
                seed: settings.seed,
                text: match settings.text {
                    Text::Own { samples } => format!("{samples} texts that the model wrote itself"),
                    Text::Given { .. } => {
                        self.text.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
                    }
                },
            },
            memory: Some(self.memory.clone()),
            quality: Some(*self.quality),
            command: output::command_line(),
            kvfold_version: output::VERSION.to_owned(),
        }
    }

    fn curve(&self) -> Result<Curve, AppError> {
        let settings = self.settings;
        let value = serde_json::to_value(settings).map_err(|error| AppError::Output(error.into()))?;
        let speed = self.training().tokens_per_second;
        let mut curve = Curve::new(value);
        let mut tokens = 0;
        let seen = self.trained.reports.iter().map(|report| {
            tokens += report.tokens;
            (report, tokens)
        });
        curve.points.extend(seen.map(|(report, tokens)| Point {
            step: report.step,
            tokens,
            stage: report.stage.name().to_owned(),
            loss: report.loss,
            task_loss: report.task_loss,
            hinge: report.hinge,
            ratio_target: report.ratio_target,
            ratio: report.ratio,
            grad_norm: report.grad_norm,
            lr: report.rate,
            tokens_per_second: speed,
        }));
        Ok(curve)
    }
}

/// The report's name for a method.
pub(crate) fn method(method: &Method) -> receipt::Method {
    match method {
        Method::Dynamic(dmc) => match dmc.method {
            dmc::Method::Dmc => receipt::Method::Dmc,
            dmc::Method::Dms => receipt::Method::Dms,
        },
        Method::Gqa { .. } => receipt::Method::Gqa,
    }
}

/// The report's name for where decisions come from.
pub(crate) fn decision(decision: Decision) -> receipt::Decision {
    match decision {
        Decision::Head { .. } => receipt::Decision::Head,
        Decision::Borrowed { .. } => receipt::Decision::Borrowed,
    }
}
