//! What a training run shows while it runs.
//!
//! On a terminal a panel: progress, loss, ratio asked and reached, speed, and a map of ratios, layer by KV head. Elsewhere
//! a line twice a minute, so that a log says how far a run is.

use crate::output;
use indicatif::ProgressBar;
use kvfold_kernels::FastCpu;
use kvfold_report::{format, heat_map};
use kvfold_retrofit::settings::Loss;
use kvfold_retrofit::{StepReport, Trainer};
use std::time::{Duration, Instant};

/// Time between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(30);

/// Time between two looks at the panel.
const DRAW_EVERY: Duration = Duration::from_millis(200);

/// Rows of a terminal that are not for the map: bar, numbers, and what was there before.
const OTHER_ROWS: usize = 5;

/// A training run's progress.
#[derive(Debug)]
pub(crate) struct Panel {
    bar: ProgressBar,
    quiet: bool,
    total: u64,
    first: u64,
    started: Instant,
    shown: Instant,
    tokens: u64,
}

impl Panel {
    /// For a trainer that is about to take its next step.
    pub(crate) fn new(trainer: &Trainer<FastCpu>, quiet: bool) -> Self {
        let total = trainer.settings().stages.total();
        let bar = output::panel("retrofitting", total, "steps", quiet);
        bar.set_position(trainer.steps());
        bar.reset_eta();
        let now = Instant::now();
        Self { bar, quiet, total, first: trainer.steps(), started: now, shown: now, tokens: 0 }
    }

    /// After a step.
    pub(crate) fn show(&mut self, trainer: &Trainer<FastCpu>, report: &StepReport) {
        self.tokens += report.tokens;
        self.bar.set_position(report.step);
        let hidden = self.bar.is_hidden();
        let due = if hidden { LINE_EVERY } else { DRAW_EVERY };
        if self.quiet || self.shown.elapsed() < due {
            return;
        }
        self.shown = Instant::now();
        if hidden {
            let per_step = self.started.elapsed().as_secs_f64() / (report.step - self.first) as f64;
            let left = per_step * (self.total - report.step) as f64;
            output::note(&format!(
                "step {} of {}  {}  {} left",
                report.step,
                self.total,
                self.numbers(trainer, report),
                format::duration(left)
            ));
            return;
        }
        let mut message = self.numbers(trainer, report);
        let (style, rows) = output::error_style();
        let map = heat_map(trainer.heads(), &style);
        if !trainer.heads().is_empty() && map.lines().count() + OTHER_ROWS <= rows {
            message = format!("{message}\n{}", map.trim_end());
        }
        self.bar.set_message(message);
    }

    /// The end.
    pub(crate) fn close(self) {
        self.bar.finish_and_clear();
    }

    fn numbers(&self, trainer: &Trainer<FastCpu>, report: &StepReport) -> String {
        let task = match trainer.settings().loss {
            Loss::Distill { .. } => "KL",
            Loss::Lm => "cross-entropy",
        };
        format!(
            "loss {:.4}  {task} {:.4}  ratio {} of {}  {} tokens/s",
            report.loss,
            report.task_loss,
            format::ratio(report.ratio),
            format::ratio(report.ratio_target),
            format::exact((self.tokens as f64 / self.started.elapsed().as_secs_f64()) as u64),
        )
    }
}
