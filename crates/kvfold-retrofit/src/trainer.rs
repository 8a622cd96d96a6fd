//! One step, from ids to new weights.

use crate::corpus::Corpus;
use crate::error::RetrofitError;
use crate::schedule::{Place, Stage, place};
use crate::settings::{Loss, Settings};
use kvfold_autograd::{Optimizer, Rates, Tape, Var};
use kvfold_kernels::Grad;
use kvfold_kernels::dmc::Dmc;
use kvfold_kernels::ops::{Hinge, NO_TARGET, Ops, Spans};
use kvfold_model::attend::{Fading, Folding, Mode, Noise, Plain};
use kvfold_model::block::Pass;
use kvfold_model::shape::Shape;
use kvfold_model::weights::{Block, Weights};
use kvfold_model::{Checkpoint, Compression, names};
use kvfold_tensor::HostTensor;
use serde::{Deserialize, Serialize};
use std::convert::Infallible;

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: u64,
    /// The stage.
    pub stage: Stage,
    /// Task loss and weighted hinge together.
    pub loss: f64,
    /// Cross-entropy or KL divergence, nats per token.
    pub task_loss: f64,
    /// The hinge, without its weight.
    pub hinge: f64,
    /// Compression asked for.
    pub ratio_target: f64,
    /// Compression of this batch, counting hard decisions with noise.
    pub ratio: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub rate: f64,
}

/// A model in training.
#[derive(Debug)]
pub struct Trainer<O: Grad> {
    ops: O,
    settings: Settings,
    shape: Shape,
    angles: O::Tensor,
    weights: Weights<O::Tensor>,
    teacher: Option<Weights<O::Tensor>>,
    optimizer: Optimizer<O::Tensor>,
}

/// Which attention a block runs with; makes a fresh one each time a segment runs.
#[derive(Clone, Debug)]
enum Attention {
    Fading { factor: f64 },
    Folding { dmc: Dmc, temperature: f64, seed: u64, step: u64 },
}

/// A pass without the tape it runs on, so that a segment can own it.
#[derive(Clone, Debug)]
struct Frame<T> {
    shape: Shape,
    angles: T,
    spans: Spans,
    attention: Attention,
}

impl<T: Clone + std::fmt::Debug + 'static> Frame<T> {
    /// One block: the residual stream and, when folding, the layer's fold rate.
    fn block<O: Grad<Tensor = T> + Clone + 'static>(
        &self,
        tape: &Tape<O>,
        layer: usize,
        block: &Block<Var<T>>,
        x: &Var<T>,
    ) -> Vec<Var<T>> {
        let angles = Var::constant(self.angles.clone());
        let pass = Pass { ops: tape, shape: &self.shape, angles: &angles, spans: &self.spans };
        match &self.attention {
            Attention::Fading { factor } => vec![pass.block(layer, block, x, &mut Fading { factor: *factor })],
            Attention::Folding { dmc, temperature, seed, step } => {
                let noise = Noise::Keyed { seed: *seed, step: *step };
                let mode = Mode::Soft { temperature: *temperature, noise };
                let mut attend = Folding::new(dmc, mode);
                let x = pass.block(layer, block, x, &mut attend);
                std::iter::once(x).chain(attend.rates).collect()
            }
        }
    }
}

impl<O: Grad + Clone + 'static> Trainer<O>
where
    O::Tensor: 'static,
{
    /// A run's beginning: the base model, with zero-initialised decision heads where they are asked for.
    pub fn new(ops: O, base: &Checkpoint, settings: Settings) -> Result<Self, RetrofitError> {
        let plain = Shape::of(&base.config);
        settings.validate(&plain)?;
        if base.config.compression.is_some() {
            return Err(RetrofitError::Setting {
                setting: "model",
                found: format!("{}, which is retrofitted already", base.source),
                expected: "a plain model".into(),
            });
        }
        let shape = Shape { decides_by_head: !settings.dmc.decision.borrows_channel(), ..plain.clone() };
        let load = |shape: &Shape| {
            let built = Weights::build(shape, |name, dims| {
                let values = base.tensors.get(name).map(HostTensor::to_f32);
                let values = values.unwrap_or_else(|| vec![0.0; dims.iter().product()]);
                Ok::<_, Infallible>(ops.tensor(dims, &values))
            });
            let Ok(weights) = built;
            weights
        };
        let weights = load(&shape);
        let teacher = matches!(settings.loss, Loss::Distill { .. }).then(|| load(&plain));
        let optimizer = Optimizer::new(&ops, &weights.list());
        let angles = ops.rope_table(&shape.inv_freq(), settings.length);
        let mut trainer = Self { angles, weights, teacher, optimizer, shape, settings, ops };
        let Settings { dmc, stages, .. } = &trainer.settings;
        if dmc.decision.borrows_channel() && stages.zeroing == 0 {
            trainer.zero_borrowed_rows();
        }
        Ok(trainer)
    }

    /// The run's definition.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.optimizer.steps()
    }

    /// Whether all steps are done.
    pub fn finished(&self) -> bool {
        self.steps() >= self.settings.stages.total()
    }

    /// One step on the corpus. On an error the weights are those before the step.
    pub fn step(&mut self, corpus: &Corpus) -> Result<StepReport, RetrofitError> {
        let settings = &self.settings;
        let step = self.optimizer.steps();
        let at = place(settings, step);
        let sequences = corpus.batch(settings.seed, step, settings.batch);
        let ids: Vec<u32> = sequences.iter().flat_map(|&n| corpus.sequence(n)).copied().collect();
        let spans = Spans::of_lengths(&vec![corpus.length(); sequences.len()]);
        let attention = match at.stage {
            Stage::Zeroing => Attention::Fading { factor: at.channel },
            Stage::Ramp | Stage::Hold => Attention::Folding {
                dmc: settings.dmc.clone(),
                temperature: settings.temperature,
                seed: settings.seed,
                step,
            },
        };
        let frame = Frame { shape: self.shape.clone(), angles: self.angles.clone(), spans, attention };

        let tape = Tape::new(self.ops.clone());
        let vars = self.weights.map(&self.shape, |w| tape.param(w.clone()));
        let (logits, rates) = self.forward(&tape, &frame, &vars, &ids);
        let task = self.task_loss(&tape, &frame, &logits, &ids);
        let (total, hinge) = if rates.is_empty() {
            (task.clone(), None)
        } else {
            let target = 1.0 - 1.0 / at.ratio;
            let pressure = settings.pressure;
            let hinge = Hinge { target, scope: pressure.scope, over: pressure.over };
            let hinge = tape.hinge(&rates, &frame.spans, hinge);
            (tape.add(&task, &hinge, pressure.weight), Some(hinge))
        };
        let scalar = |x: &Var<O::Tensor>| f64::from(self.ops.to_host(&x.value)[0]);
        let mut report = StepReport {
            step: step + 1,
            stage: at.stage,
            loss: scalar(&total),
            task_loss: scalar(&task),
            hinge: hinge.as_ref().map_or(0.0, scalar),
            ratio_target: at.ratio,
            ratio: self.ratio(&rates),
            grad_norm: 0.0,
            rate: at.rate,
        };
        let not_finite =
            |what, value| Err(RetrofitError::NotFinite { step: step + 1, what, value, sequences: sequences.clone() });
        if !report.loss.is_finite() {
            return not_finite("the loss", report.loss);
        }
        drop((logits, rates, task, hinge));
        let grads = tape.backward(&total);
        let grads: Vec<_> = vars.list().into_iter().map(|var| grads.get(var).cloned()).collect();
        drop(vars);
        report.grad_norm = Optimizer::norm(&self.ops, &grads);
        if !report.grad_norm.is_finite() {
            return not_finite("the gradient norm", report.grad_norm);
        }
        self.update(&grads, at, report.grad_norm);
        Ok(report)
    }

    /// Logits and, when folding, fold rates by layer.
    fn forward(
        &self,
        tape: &Tape<O>,
        frame: &Frame<O::Tensor>,
        vars: &Weights<Var<O::Tensor>>,
        ids: &[u32],
    ) -> (Var<O::Tensor>, Vec<Var<O::Tensor>>) {
        let mut x = tape.embed(ids, &vars.embed);
        let mut rates = Vec::new();
        for (layer, block) in vars.blocks.iter().enumerate() {
            let outs = if self.settings.recompute {
                let frame = frame.clone();
                let inputs = std::iter::once(&x).chain(block.list()).cloned().collect();
                tape.segment(inputs, move |tape, inputs| {
                    let mut parts = inputs[1..].iter().cloned();
                    let built = Block::build(&frame.shape, |_, _| {
                        Ok::<_, Infallible>(parts.next().expect("as many inputs as the block has weights"))
                    });
                    let Ok(block) = built;
                    frame.block(tape, layer, &block, &inputs[0])
                })
            } else {
                frame.block(tape, layer, block, &x)
            };
            let mut outs = outs.into_iter();
            x = outs.next().expect("a block returns the residual stream first");
            rates.extend(outs);
        }
        let angles = Var::constant(frame.angles.clone());
        let pass = Pass { ops: tape, shape: &frame.shape, angles: &angles, spans: &frame.spans };
        (pass.logits(vars, &x), rates)
    }

    fn task_loss(
        &self,
        tape: &Tape<O>,
        frame: &Frame<O::Tensor>,
        logits: &Var<O::Tensor>,
        ids: &[u32],
    ) -> Var<O::Tensor> {
        match (self.settings.loss, &self.teacher) {
            (Loss::Distill { direction }, Some(teacher)) => {
                let pass = Pass { ops: &self.ops, shape: &frame.shape, angles: &frame.angles, spans: &frame.spans };
                let wanted = pass.forward(teacher, ids, &mut Plain);
                tape.kl(logits, &Var::constant(wanted), direction)
            }
            _ => {
                let mut targets: Vec<u32> = ids[1..].iter().copied().chain([NO_TARGET]).collect();
                frame.spans.iter().for_each(|span| targets[span.start + span.len - 1] = NO_TARGET);
                tape.cross_entropy(logits, &targets)
            }
        }
    }

    /// Tokens seen per slot held, over the batch.
    fn ratio(&self, rates: &[Var<O::Tensor>]) -> f64 {
        let rates: Vec<f32> = rates.iter().flat_map(|rate| self.ops.to_host(&rate.value)).collect();
        let mean = rates.iter().map(|&r| f64::from(r)).sum::<f64>() / rates.len().max(1) as f64;
        1.0 / (1.0 - mean)
    }

    fn update(&mut self, grads: &[Option<O::Tensor>], at: Place, norm: f64) {
        let learning = self.settings.learning;
        let rates = Rates {
            lr: at.rate,
            beta1: learning.beta1,
            beta2: learning.beta2,
            weight_decay: learning.weight_decay,
            clip: learning.clip,
        };
        let names = Weights::<()>::expected(&self.shape);
        let group = |name: &str| if name.contains(names::DECIDE_PROJ) { learning.decide_factor } else { 1.0 };
        let params = self.weights.list_mut().into_iter().zip(&names).map(|(w, (name, _))| (w, group(name)));
        self.optimizer.step(&self.ops, params.collect(), grads, (rates, norm));
        if self.optimizer.steps() == self.settings.stages.zeroing {
            self.zero_borrowed_rows();
        }
    }

    /// Ends the zeroing stage: the rows that make the borrowed channel become 0, so every logit starts at `-offset`.
    /// Their moments go with them: they are those of a channel with another meaning.
    fn zero_borrowed_rows(&mut self) {
        let heads = self.shape.heads;
        let rows = |count: usize| (1..=count).map(|head| head * heads.dim - 1).collect::<Vec<_>>();
        let (query, kv) = (rows(heads.query), rows(heads.kv));
        let names = Weights::<()>::expected(&self.shape);
        let params = self.weights.list_mut().into_iter().zip(self.optimizer.moments_mut());
        for ((name, _), (weight, moments)) in names.iter().zip(params) {
            let rows = match name {
                name if name.contains(names::Q_PROJ) || name.contains(names::Q_BIAS) => &query,
                name if name.contains(names::K_PROJ) || name.contains(names::K_BIAS) => &kv,
                _ => continue,
            };
            [weight, &mut moments.m, &mut moments.v].into_iter().for_each(|x| self.ops.zero_rows(x, rows));
        }
    }

    /// Weights and moments by name, for a checkpoint of the run.
    pub fn state(&self) -> Vec<(String, HostTensor)> {
        let host = |x: &O::Tensor| HostTensor::from_f32(self.ops.shape(x), &self.ops.to_host(x));
        let names = Weights::<()>::expected(&self.shape);
        let mut state = Vec::with_capacity(names.len() * 3);
        for ((name, _), (weight, moments)) in
            names.iter().zip(self.weights.list().into_iter().zip(self.optimizer.moments()))
        {
            state.push((name.clone(), host(weight)));
            state.push((format!("m.{name}"), host(&moments.m)));
            state.push((format!("v.{name}"), host(&moments.v)));
        }
        state
    }

    /// Goes on from a state that [`Trainer::state`] wrote after `steps` steps; `tensor` finds a tensor by name.
    pub fn restore<'t>(
        &mut self,
        steps: u64,
        tensor: impl Fn(&str, &[usize]) -> Result<&'t HostTensor, RetrofitError>,
    ) -> Result<(), RetrofitError> {
        let load =
            |name: &str, dims: &[usize]| Ok::<_, RetrofitError>(self.ops.tensor(dims, &tensor(name, dims)?.to_f32()));
        let weights = Weights::build(&self.shape, load)?;
        let moments = Weights::<()>::expected(&self.shape)
            .iter()
            .map(|(name, dims)| {
                let (m, v) = (load(&format!("m.{name}"), dims)?, load(&format!("v.{name}"), dims)?);
                Ok(kvfold_kernels::ops::Moments { m, v })
            })
            .collect::<Result<Vec<_>, RetrofitError>>()?;
        self.weights = weights;
        self.optimizer = Optimizer::resume(moments, steps);
        Ok(())
    }

    /// The model as trained so far: the base's files with new weights in the base's dtypes, and our section in its
    /// configuration.
    pub fn checkpoint(&self, base: &Checkpoint) -> Result<Checkpoint, RetrofitError> {
        let config = base.config.with_compression(Compression {
            dmc: self.settings.dmc.clone(),
            ratio: self.settings.ratio,
            trained_length: self.settings.length,
            base_model: base.source.clone(),
        })?;
        let tensors = Weights::<()>::expected(&self.shape)
            .into_iter()
            .zip(self.weights.list())
            .map(|((name, dims), weight)| {
                let tensor = HostTensor::from_f32(dims, &self.ops.to_host(weight));
                let tensor = match base.tensors.get(&name) {
                    Some(original) => tensor.to_dtype(original.dtype()),
                    None => tensor,
                };
                (name, tensor)
            })
            .collect();
        Ok(Checkpoint { config, tensors, ..base.clone() })
    }
}
