//! What a run takes, before it starts: steps, tokens, and memory from the shapes.
//!
//! Memory is counted in f32 arrays that are alive at the same time, for the backend as it is: what the tape keeps for the
//! backward pass, weights packed for products, and the buffers that the backend keeps for the next step. What is not
//! counted is the text.

use crate::settings::{Loss, Method, Settings};
use kvfold_kernels::cpu::{LOSS_ROWS, RECYCLED};
use kvfold_model::Checkpoint;
use kvfold_model::names;
use kvfold_model::shape::Shape;
use kvfold_model::weights::Weights;
use serde::Serialize;

/// Bytes of a number.
const F32: u64 = 4;

/// Bytes of a number of a regression.
const F64: u64 = 8;

/// Bytes that a run held beyond what is counted below, at most: 35 to 55 million in what was measured.
const PROGRAM: u64 = 55_000_000;

/// Rows that packed weights are filled up to.
const PANEL: u64 = 32;

/// What a run takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// Optimiser steps.
    pub steps: u64,
    /// Sequences of a step.
    pub batch: usize,
    /// Sequences that are in memory at a time.
    pub part: usize,
    /// Tokens of a sequence.
    pub length: usize,
    /// Tokens of the run at most; documents do not always fill their sequences.
    pub tokens: u64,
    /// Parameters of the model, decision heads included.
    pub parameters: u64,
    /// Parameters that train.
    pub trained_parameters: u64,
    /// Bytes of main memory.
    pub memory: Memory,
    /// Bytes on disk of the run's two checkpoints, and a third while it is written.
    pub run_bytes: u64,
}

/// Bytes of main memory, by what they are for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Memory {
    /// What the program holds whatever it works on, and what its allocator does not fill of huge pages.
    pub program: u64,
    /// The base model as it is stored; the new model takes from it what does not train.
    pub base: u64,
    /// Weights of the model and of its teacher; those that do not train count once.
    pub weights: u64,
    /// The same, packed for products.
    pub packed: u64,
    /// Gradients of what trains; the sum and a part's when a step is computed in parts.
    pub gradients: u64,
    /// First and second moments of what trains.
    pub moments: u64,
    /// What the backward pass needs of the forward pass, and one layer's gradients.
    pub activations: u64,
    /// Logits of model and teacher, and their gradient.
    pub logits: u64,
    /// What decisions are fitted to: before the first step, when there are no gradients.
    pub fitting: u64,
    /// A checkpoint before it is written.
    pub checkpoint: u64,
    /// The new model, and both as they are measured at the end, when the trainer is gone.
    pub evaluation: u64,
    /// The highest of fitting, training, saving and evaluating.
    pub peak: u64,
}

impl Plan {
    /// The plan of a run that [`Settings::validate`] has passed.
    pub fn new(base: &Checkpoint, settings: &Settings) -> Self {
        let plain = Shape::of(&base.config);
        let shape = settings.shape(&plain);
        let student = Weights::<()>::expected(&shape);
        let (mut trained, mut own) = (student.clone(), Vec::new());
        trained.retain(|(name, _)| settings.train.trains(name));
        // The teacher has its own copy of what trains, and of what is merged in the model.
        let teaches = matches!(settings.loss, Loss::Distill { .. });
        if teaches {
            own = Weights::<()>::expected(&plain);
            own.retain(|weight| settings.train.trains(&weight.0) || !student.contains(weight));
        }
        let packed_of = |weights: &[(String, Vec<usize>)]| packed(weights, shape.tied);
        let (parameters, trained) = (count(&student), count(&trained));
        let weights = (parameters + count(&own)) * F32;
        let packed = (packed_of(&student) + packed_of(&own)) * F32;
        // Afterwards both models are there whole.
        let (original, packed_original) = match settings.method {
            Method::Gqa { .. } => {
                let plain = Weights::<()>::expected(&plain);
                (count(&plain), packed_of(&plain))
            }
            Method::Dynamic(_) => (parameters, packed_of(&student)),
        };
        let base_bytes = base.tensors.values().map(|tensor| tensor.bytes().len() as u64).sum();

        let rows = (settings.part() * settings.length) as u64;
        let activations = rows * activations(&shape, settings) * F32;
        // Logits, the teacher's, and the gradient's two packings, of as many rows as exist together.
        let logits = rows.min(LOSS_ROWS as u64) * shape.vocab as u64 * F32 * if teaches { 3 } else { 2 };
        let gradients = trained * F32 * if settings.accumulate > 1 { 2 } else { 1 };
        let moments = 2 * trained * F32;
        let fitting = fitting(&shape, settings);
        let checkpoint = 3 * trained * F32;
        let new_model = base_bytes + trained * F32;
        let evaluation = new_model + (parameters + original + packed_of(&student) + packed_original) * F32;

        let step = gradients + activations + logits;
        let saving = step.min(RECYCLED as u64 * F32) + checkpoint.max(new_model);
        let training = weights + packed + moments + step.max(saving).max(fitting);
        Self {
            steps: settings.stages.total(),
            batch: settings.batch,
            part: settings.part(),
            length: settings.length,
            tokens: settings.stages.total() * (settings.batch * settings.length) as u64,
            parameters,
            trained_parameters: trained,
            memory: Memory {
                program: PROGRAM,
                base: base_bytes,
                weights,
                packed,
                gradients,
                moments,
                activations,
                logits,
                fitting,
                checkpoint,
                evaluation,
                peak: PROGRAM + base_bytes + training.max(evaluation),
            },
            run_bytes: 3 * checkpoint,
        }
    }
}

fn count(weights: &[(String, Vec<usize>)]) -> u64 {
    weights.iter().map(|(_, dims)| dims.iter().product::<usize>() as u64).sum()
}

/// Numbers that matrices are packed into.
fn packed(weights: &[(String, Vec<usize>)], tied: bool) -> u64 {
    let matrices = weights.iter().filter(|(name, dims)| dims.len() == 2 && (name != names::EMBED || tied));
    matrices.map(|(_, dims)| (dims[0] as u64).next_multiple_of(PANEL) * dims[1] as u64).sum()
}

/// Bytes that a fit takes at its highest: the residual streams of all its text, and a layer's inputs of decisions, twice
/// while they are centred; the square of their number as products, covariance and its root.
fn fitting(shape: &Shape, settings: &Settings) -> u64 {
    let Some(calibration) = settings.calibration else { return 0 };
    let hidden = shape.hidden as u64;
    let inputs = if shape.decide_ahead { 2 * hidden } else { hidden };
    // Whole sequences are read.
    let rows = (calibration.tokens.div_ceil(settings.length) * settings.length) as u64;
    rows * (hidden + 2 * inputs) * F32 + inputs * inputs * (F32 + 2 * F64)
}

/// Numbers per token that a part's passes hold at their highest.
fn activations(shape: &Shape, settings: &Settings) -> u64 {
    let heads = shape.heads;
    let (c, f) = (shape.hidden as u64, shape.intermediate as u64);
    let (q, kv) = ((heads.query * heads.dim) as u64, (heads.kv * heads.dim) as u64);
    let per_head = heads.query as u64 + 12 * heads.kv as u64;
    // Inputs of frozen matrices are not kept.
    let trains = |part: &str| u64::from(settings.train.trains(&names::layer(0, part)));
    // Both norms' inputs and the first's output; the second's; rotated queries and attention's output; keys and values,
    // exact, rotated and pooled; the two halves of the MLP and their product.
    let kept = 3 * c + c * trains(names::UP_PROJ) + 2 * q + 5 * kv + per_head + 2 * f + f * trains(names::DOWN_PROJ);
    // Gradients of one layer on the way back.
    let gradients = 4 * c + 2 * q + 6 * kv + 3 * f;
    let layers = shape.layers as u64;
    match settings.recompute {
        true => layers * c + kept + gradients,
        false => layers * kept + gradients,
    }
}
