//! Sampling and training with progress bars, shared by `retrofit` and `demo`.

use super::panel::Panel;
use super::start_token;
use crate::error::AppError;
use crate::output;
use kvfold_engine::{Engine, Sampler, sample_corpus};
use kvfold_kernels::FastCpu;
use kvfold_model::Checkpoint;
use kvfold_retrofit::{Corpus, StepReport, Trainer, Watch};
use std::time::{Duration, Instant};

/// Texts that a model writes about itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SelfText {
    /// Number of texts.
    pub(crate) texts: usize,
    /// Tokens of each.
    pub(crate) length: usize,
    /// Seed of the draws.
    pub(crate) seed: u64,
}

/// Lets the model write `wanted.texts` texts at temperature 1, its own distribution.
pub(crate) fn self_text(
    engine: &mut Engine<FastCpu>,
    checkpoint: &Checkpoint,
    wanted: SelfText,
    quiet: bool,
) -> Result<Vec<Vec<u32>>, AppError> {
    let SelfText { texts, length, seed } = wanted;
    let start = start_token(checkpoint)?;
    let bar = output::bar("sampling its own text", texts * (length - 1), "tokens", quiet);
    let sampler = Sampler { temperature: 1.0, seed, ..Sampler::GREEDY };
    let corpus = sample_corpus(engine, sampler, (texts, length), start, |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    Ok(corpus)
}

/// A training loop's end.
#[derive(Debug)]
pub(crate) struct Trained {
    /// One report per step.
    pub(crate) reports: Vec<StepReport>,
    /// Time of this process's steps.
    pub(crate) stepping: Duration,
    /// Time of the checkpoints between them.
    pub(crate) saving: Duration,
    /// Steps that this process took.
    pub(crate) steps: u64,
}

/// Trains to the end, or until the loss explodes. `after_step` sees all reports so far, and whether the last loss is
/// suspicious; it may stop the run with an error.
pub(crate) fn train(
    trainer: &mut Trainer<FastCpu>,
    corpus: &Corpus,
    mut reports: Vec<StepReport>,
    quiet: bool,
    mut after_step: impl FnMut(&Trainer<FastCpu>, &[StepReport], bool) -> Result<(), AppError>,
) -> Result<Trained, AppError> {
    let mut panel = Panel::new(trainer, quiet);
    let mut watch = Watch::new(trainer.shape().vocab);
    reports.iter().for_each(|report| {
        watch.exploded(report);
    });
    let (started, first) = (Instant::now(), trainer.steps());
    let mut saving = Duration::ZERO;
    while !trainer.finished() {
        let report = trainer.step(corpus)?;
        reports.push(report);
        if watch.exploded(&report) {
            return Err(watch.error(&report, corpus, trainer.settings()).into());
        }
        panel.show(trainer, &report);
        let saves = Instant::now();
        after_step(trainer, &reports, watch.is_wary())?;
        saving += saves.elapsed();
    }
    panel.close();
    Ok(Trained { reports, stepping: started.elapsed() - saving, saving, steps: trainer.steps() - first })
}
