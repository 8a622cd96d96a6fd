//! Runs that begin at a retrofitted model and go on to a higher ratio.

use crate::error::RetrofitError;
use crate::settings::{Method, Settings};
use kvfold_model::Checkpoint;
use kvfold_model::digest::of_tensors;
use kvfold_model::shape::Shape;
use serde::{Deserialize, Serialize};

/// The retrofitted model that a run begins at.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// The ratio it was taught, from which the target rises.
    pub ratio: f64,
    /// SHA-256 of its tensors.
    pub digest: String,
}

impl Origin {
    /// A model as an origin, and how it compresses, which the run keeps. A plain model is none.
    pub fn of(model: &Checkpoint) -> Result<(Self, Method), RetrofitError> {
        let Some(compression) = &model.config.compression else {
            return Err(unfit(model, "a plain model", "a retrofitted model; for a plain one leave this out".into()));
        };
        let origin = Self { ratio: compression.ratio, digest: of_tensors(&model.tensors) };
        Ok((origin, compression.dmc.clone().into()))
    }

    /// Checks that a model is the origin of a run, and a retrofit of the run's base.
    pub(crate) fn check(model: &Checkpoint, base: &Checkpoint, settings: &Settings) -> Result<(), RetrofitError> {
        let (origin, method) = Self::of(model)?;
        if settings.method != method {
            return Err(unfit(model, "compressed in another way", "a model with the run's method and settings".into()));
        }
        if Shape::of(&model.config) != settings.shape(&Shape::of(&base.config)) {
            return Err(unfit(model, "of another shape", format!("a retrofit of {}", base.source)));
        }
        if settings.from.as_ref() != Some(&origin) {
            return Err(unfit(model, "not the model that the run began at", "the same model, unchanged".into()));
        }
        Ok(())
    }
}

fn unfit(model: &Checkpoint, found: &str, expected: String) -> RetrofitError {
    RetrofitError::Setting { setting: "from", found: format!("{}, {found}", model.source), expected }
}
