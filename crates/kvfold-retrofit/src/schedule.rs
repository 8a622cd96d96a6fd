//! Stages, compression targets and learning rates, by step.

use crate::settings::Settings;
use serde::{Deserialize, Serialize};

/// What a step does.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The borrowed channel fades out; nothing is folded.
    Zeroing,
    /// The target rises.
    Ramp,
    /// The target is reached and kept.
    Hold,
}

impl Stage {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Zeroing => "zeroing",
            Stage::Ramp => "ramp",
            Stage::Hold => "hold",
        }
    }
}

/// A step's place in the schedule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Place {
    /// The stage.
    pub stage: Stage,
    /// Compression asked for at this step; 1 while nothing is folded.
    pub ratio: f64,
    /// What is left of the borrowed channel, 1 to 0.
    pub channel: f64,
    /// Learning rate.
    pub rate: f64,
}

/// Share of the zeroing stage after which nothing of the channel is left (spec 2.8).
const FADED: f64 = 0.8;

/// The place of step `step`, counted from 0.
pub fn place(settings: &Settings, step: u64) -> Place {
    let stages = settings.stages;
    let rate = rate(settings, step);
    if step < stages.zeroing {
        let channel = (1.0 - step as f64 / (FADED * stages.zeroing as f64)).max(0.0);
        return Place { stage: Stage::Zeroing, ratio: 1.0, channel, rate };
    }
    let target = settings.target_ratio();
    let ramped = step - stages.zeroing + 1;
    if ramped <= stages.ramp {
        let first = settings.first_ratio();
        let ratio = first + (target - first) * ramped as f64 / stages.ramp as f64;
        return Place { stage: Stage::Ramp, ratio, channel: 0.0, rate };
    }
    Place { stage: Stage::Hold, ratio: target, channel: 0.0, rate }
}

/// Linear warm-up, then a cosine down to the floor.
fn rate(settings: &Settings, step: u64) -> f64 {
    let learning = settings.learning;
    let warm = ((step + 1) as f64 / learning.warmup.max(1) as f64).min(1.0);
    let done = (step as f64 / settings.stages.total().max(1) as f64).min(1.0);
    let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
    learning.rate * warm * (learning.floor + (1.0 - learning.floor) * cosine)
}
