//! A model on a backend, ready to run.

use crate::Checkpoint;
use crate::block::Pass;
use crate::names;
use crate::shape::Shape;
use crate::weights::Weights;
use kvfold_kernels::Ops;
use kvfold_kernels::dmc::Dmc;
use kvfold_kernels::ops::{Precision, Spans};
use std::convert::Infallible;

/// A model's weights in a backend's memory.
#[derive(Debug)]
pub struct Loaded<O: Ops> {
    /// The backend.
    pub ops: O,
    /// The model's sizes.
    pub shape: Shape,
    /// The weights.
    pub weights: Weights<O::Tensor>,
    /// Rotary table for every position of the context, `[P, D]`.
    pub angles: O::Tensor,
    /// How the model compresses; `None` for a plain one.
    pub dmc: Option<Dmc>,
}

impl<O: Ops> Loaded<O> {
    /// Uploads a checkpoint in the precision that it is stored in.
    pub fn new(ops: O, checkpoint: &Checkpoint) -> Self {
        Self::with_precision(ops, checkpoint, checkpoint.precision())
    }

    /// Uploads a checkpoint. Its tensors were checked when it was opened. Norms and decision heads stay in f32.
    pub fn with_precision(ops: O, checkpoint: &Checkpoint, precision: Precision) -> Self {
        let shape = Shape::of(&checkpoint.config);
        let built = Weights::build(&shape, |name, dims| {
            let values = checkpoint.tensors[name].to_f32();
            Ok::<_, Infallible>(ops.weight(dims, &values, names::precision(name, dims, precision)))
        });
        let Ok(weights) = built;
        let dmc = checkpoint.config.compression.as_ref().map(|compression| compression.dmc.clone());
        Self { angles: ops.rope_table(&shape.inv_freq(), shape.context), weights, dmc, shape, ops }
    }

    /// A pass over a batch.
    pub fn pass<'a>(&'a self, spans: &'a Spans) -> Pass<'a, O> {
        Pass { ops: &self.ops, shape: &self.shape, angles: &self.angles, spans, wanted: None }
    }
}
