//! Whether the loss is beyond hope.
//!
//! A loss that is not a number stops a run by itself ([`Trainer::step`](crate::Trainer::step)). One that explodes is a
//! number: it is told from a hard batch by staying for several steps at more than a multiple of what it was, and from the
//! rise that compression brings about, which starts at a divergence of nothing, by being a good part of what knowing
//! nothing at all would cost.

use crate::corpus::Corpus;
use crate::error::RetrofitError;
use crate::settings::Settings;
use crate::trainer::StepReport;
use std::collections::VecDeque;

/// Steps whose median is what the loss was.
const WINDOW: usize = 32;
/// Times the median.
const FACTOR: f64 = 3.0;
/// Share of `ln V`, the cross-entropy of knowing nothing, below which no loss is an explosion.
const FLOOR: f64 = 1.0 / 3.0;
/// Steps in a row that make an explosion.
const STREAK: usize = 3;

/// Looks at every step's loss.
#[derive(Clone, Debug)]
pub struct Watch {
    floor: f64,
    before: VecDeque<f64>,
    streak: usize,
}

impl Watch {
    /// For a model of `vocab` tokens.
    pub fn new(vocab: usize) -> Self {
        Self { floor: FLOOR * (vocab as f64).ln(), before: VecDeque::new(), streak: 0 }
    }

    /// Takes note of a step; true once the loss has exploded. Reports of steps before a resume are to be shown as well, so
    /// that a run ends as it would have.
    pub fn exploded(&mut self, report: &StepReport) -> bool {
        self.streak = if report.task_loss > self.limit() { self.streak + 1 } else { 0 };
        // What may be the beginning of an explosion is not what the loss was before it.
        if self.streak == 0 {
            self.before.push_back(report.task_loss);
            if self.before.len() > WINDOW {
                self.before.pop_front();
            }
        }
        self.streak >= STREAK
    }

    /// Whether the last step may be the beginning of an explosion: no moment to save a run.
    pub fn is_wary(&self) -> bool {
        self.streak > 0
    }

    /// The error for a run whose loss has exploded.
    pub fn error(&self, report: &StepReport, corpus: &Corpus, settings: &Settings) -> RetrofitError {
        let batch = corpus.batch(settings.seed, report.step - 1, settings.batch);
        RetrofitError::Exploding {
            step: report.step,
            loss: report.task_loss,
            steps: self.streak,
            limit: self.limit(),
            factor: FACTOR,
            documents: corpus.describe(&batch),
        }
    }

    /// The highest loss that is no sign of an explosion; none is before there is anything to compare with.
    fn limit(&self) -> f64 {
        let mut before: Vec<f64> = self.before.iter().copied().collect();
        before.sort_by(f64::total_cmp);
        match before.get(before.len() / 2) {
            Some(median) => (FACTOR * median).max(self.floor),
            None => f64::INFINITY,
        }
    }
}
