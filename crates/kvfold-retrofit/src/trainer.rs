//! One step, from ids to new weights.

use crate::calibrate::{self, Fit, Reader};
use crate::corpus::Corpus;
use crate::error::RetrofitError;
use crate::gqa::mean_pooled;
use crate::origin::Origin;
use crate::pressure::{BatchRates, asked};
use crate::schedule::{Place, Stage, place};
use crate::settings::{Loss, Method, Pressure, Settings};
use crate::settle::{self, Settled, Taken, settled};
use kvfold_autograd::{Optimizer, Rates, Tape, Var};
use kvfold_kernels::Grad;
use kvfold_kernels::dmc::{Borrows, Decision, Dmc};
use kvfold_kernels::ops::{Goal, Hinge, Moments, NO_TARGET, Ops, Over, Precision, Predictions, Spans};
use kvfold_model::attend::{Fading, Folding, Mode, Noise, Plain};
use kvfold_model::block::Pass;
use kvfold_model::shape::Shape;
use kvfold_model::weights::{Block, Weights};
use kvfold_model::{Checkpoint, Compression, names};
use kvfold_tensor::HostTensor;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ops::Range;

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
    /// Compression asked of this batch; less than at full length where documents are short.
    pub ratio_target: f64,
    /// Compression of this batch, counting hard decisions with noise; where heads are merged, heads merged.
    pub ratio: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub rate: f64,
    /// Tokens of the batch.
    pub tokens: u64,
}

/// A model in training.
#[derive(Debug)]
pub struct Trainer<O: Grad> {
    ops: O,
    settings: Settings,
    shape: Shape,
    angles: O::Tensor,
    weights: Weights<O::Tensor>,
    teacher: Option<Teacher<O::Tensor>>,
    /// Moments of the weights that train, in their order.
    optimizer: Optimizer<O::Tensor>,
    /// All weights, in their order.
    names: Vec<Name>,
    heads: Vec<Vec<f64>>,
}

/// The original model, whose shape is another where heads are merged.
#[derive(Debug)]
struct Teacher<T> {
    shape: Shape,
    weights: Weights<T>,
}

/// Which attention a block runs with; makes a fresh one each time a segment runs.
#[derive(Clone, Debug)]
enum Attention {
    Plain,
    Fading(Fading),
    Folding { dmc: Dmc, temperature: f64, seed: u64, step: u64, first_row: usize },
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
        self.block_of(
            &Pass { ops: tape, shape: &self.shape, angles: &angles, spans: &self.spans, wanted: None },
            layer,
            block,
            x,
        )
    }

    /// The same on any backend.
    fn block_of<P: Ops>(
        &self,
        pass: &Pass<'_, P>,
        layer: usize,
        block: &Block<P::Tensor>,
        x: &P::Tensor,
    ) -> Vec<P::Tensor> {
        match &self.attention {
            Attention::Plain => vec![pass.block(layer, block, x, &mut Plain)],
            Attention::Fading(fading) => vec![pass.block(layer, block, x, &mut { *fading })],
            &Attention::Folding { ref dmc, temperature, seed, step, first_row } => {
                let mode = Mode::Soft { temperature, noise: Noise::Keyed { seed, step, first_row } };
                let mut attend = Folding::new(dmc, mode);
                let x = pass.block(layer, block, x, &mut attend);
                std::iter::once(x).chain(attend.rates).collect()
            }
        }
    }
}

/// A part of a batch, which is computed by itself.
#[derive(Debug)]
struct Part<T> {
    /// Its sequences in the corpus.
    sequences: Vec<usize>,
    ids: Vec<u32>,
    /// Its spans among the batch's.
    spans: Range<usize>,
    frame: Frame<T>,
}

impl<O: Grad + Clone + 'static> Trainer<O>
where
    O::Tensor: 'static,
{
    /// A run's beginning: the base model, with zero-initialised decision heads or with merged KV heads where they are
    /// asked for.
    pub fn new(ops: O, base: &Checkpoint, settings: Settings) -> Result<Self, RetrofitError> {
        settings.validate(&Shape::of(&base.config))?;
        if settings.from.is_some() {
            return Err(RetrofitError::Setting {
                setting: "from",
                found: "missing".into(),
                expected: "the model that the run began at".into(),
            });
        }
        let merged = match settings.method {
            Method::Gqa { kv_heads } => mean_pooled(base, kv_heads),
            Method::Dynamic(_) => BTreeMap::new(),
        };
        Self::beginning_at(ops, base, |name| merged.get(name), settings)
    }

    /// The beginning of a run that goes on from a retrofitted model, its origin, with the base as the teacher.
    pub fn from_model(
        ops: O,
        base: &Checkpoint,
        origin: &Checkpoint,
        settings: Settings,
    ) -> Result<Self, RetrofitError> {
        settings.validate(&Shape::of(&base.config))?;
        Origin::check(origin, base, &settings)?;
        let changed = |name: &str| origin.tensors.get(name).filter(|&tensor| base.tensors.get(name) != Some(tensor));
        Self::beginning_at(ops, base, changed, settings)
    }

    /// A student that differs from the base in some tensors. Weights that do not train are in memory once, for the model
    /// and its teacher, unless they differ.
    fn beginning_at<'t>(
        ops: O,
        base: &Checkpoint,
        changed: impl Fn(&str) -> Option<&'t HostTensor>,
        settings: Settings,
    ) -> Result<Self, RetrofitError> {
        let plain = Shape::of(&base.config);
        if base.config.compression.is_some() {
            return Err(RetrofitError::Setting {
                setting: "model",
                found: format!("{}, which is retrofitted already", base.source),
                expected: "a plain model; to go on from this one, give its base as --model and this as --from".into(),
            });
        }
        let shape = settings.shape(&plain);
        let mut loaded: BTreeMap<(String, bool), O::Tensor> = BTreeMap::new();
        let mut load = |shape: &Shape, changed: &dyn Fn(&str) -> Option<&'t HostTensor>| {
            let built = Weights::build(shape, |name, dims| {
                let own = changed(name);
                let weight = loaded.entry((name.to_owned(), own.is_some())).or_insert_with(|| {
                    let values = own.or(base.tensors.get(name)).map(HostTensor::to_f32);
                    let values = values.unwrap_or_else(|| vec![0.0; dims.iter().product()]);
                    ops.master(dims, &values, names::precision(name, dims, settings.precision))
                });
                Ok::<_, Infallible>(weight.clone())
            });
            let Ok(weights) = built;
            weights
        };
        let weights = load(&shape, &changed);
        let distills = matches!(settings.loss, Loss::Distill { .. });
        let teacher = distills.then(|| Teacher { weights: load(&plain, &|_| None), shape: plain });
        drop(loaded);
        let names = Weights::<()>::expected(&shape);
        let names: Vec<Name> =
            names.into_iter().map(|(name, dims)| Name { trains: settings.train.trains(&name), name, dims }).collect();
        let optimizer = Optimizer::new(&ops, &trained(&names, weights.list()));
        let angles = ops.rope_table(&shape.inv_freq(), settings.length);
        let mut trainer = Self { angles, weights, teacher, optimizer, shape, settings, names, heads: Vec::new(), ops };
        if trainer.settings.stages.zeroing == 0 {
            trainer.zero_borrowed_rows();
        }
        Ok(trainer)
    }

    /// The run's definition.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The sizes of the model in training.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.optimizer.steps()
    }

    /// Whether all steps are done.
    pub fn finished(&self) -> bool {
        self.steps() >= self.settings.stages.total()
    }

    /// Fits the decision heads to the corpus, where that is how the run begins: before its first step. `progress` is told how
    /// many layers are done.
    pub fn calibrate(&mut self, corpus: &Corpus, progress: impl FnMut(usize)) -> Result<Option<Fit>, RetrofitError> {
        let (Some(calibration), Some(dmc)) = (self.settings.calibration, self.settings.method.dynamic()) else {
            return Ok(None);
        };
        if self.steps() > 0 {
            return Ok(None);
        }
        let Self { ops, shape, angles, weights, .. } = &*self;
        let reader = Reader { ops, shape, angles, weights };
        let (heads, fit) = calibrate::fit(&reader, (&self.settings, dmc, calibration), corpus, progress)?;
        let (outputs, hidden, kv) = (self.shape.decide_outputs, self.shape.hidden, self.shape.heads.kv);
        let master = |dims: &[usize], values: &[f32]| Some(self.ops.master(dims, values, Precision::F32));
        for (block, fitted) in self.weights.blocks.iter_mut().zip(heads) {
            block.decide = master(&[outputs, hidden], &fitted.weights);
            block.decide_bias = master(&[outputs], &fitted.biases);
            block.decide_ahead = fitted.ahead.and_then(|ahead| master(&[kv, hidden], &ahead));
        }
        Ok(Some(fit))
    }

    /// Moves the biases of decision heads until the model folds, without noise, what the ratio asks for: the end of a run.
    /// Where heads have no biases, as in the papers, nothing is done. `progress` is told how often decisions were taken.
    pub fn settle(&mut self, corpus: &Corpus, mut progress: impl FnMut(usize)) -> Option<Settled> {
        let dmc = self.settings.method.dynamic().filter(|_| self.settings.settles())?.clone();
        let (asked, share) = (self.settings.target_ratio(), self.settings.fold_share(&dmc));
        let sequences = corpus.first_taken(self.settings.seed, settle::TOKENS);
        let tokens = sequences.iter().map(|&n| corpus.sequence(n).len()).sum();
        let mut found: Option<Settled> = None;
        for passes in 1..=settle::PASSES {
            let Self { ops, shape, angles, weights, .. } = &*self;
            let taken = Taken::of(&Reader { ops, shape, angles, weights }, &dmc, corpus, &sequences);
            progress(passes);
            let after = self.settings.ratio_of_share(&dmc, taken.share()?);
            let before = found.map_or(after, |found| found.before);
            found = Some(Settled { tokens, passes, before, after });
            // What was moved last has been looked at.
            if settled(after, asked) || passes == settle::PASSES {
                break;
            }
            self.shift_decisions(&dmc, &taken.shifts(self.settings.pressure.scope, share));
        }
        found
    }

    /// Adds numbers by layer and KV head to the decision logits, by the heads' biases.
    fn shift_decisions(&mut self, dmc: &Dmc, shifts: &[Vec<f64>]) {
        let Decision::Head { scale, .. } = dmc.decision else { unreachable!("only decision heads have biases") };
        for (block, shifts) in self.weights.blocks.iter_mut().zip(shifts) {
            let bias = block.decide_bias.as_mut().expect("a shape whose decisions have biases has them in every layer");
            let mut biases = self.ops.to_host(bias);
            biases.iter_mut().zip(shifts).for_each(|(bias, shift)| *bias += (shift / scale) as f32);
            *bias = self.ops.master(&[biases.len()], &biases, Precision::F32);
        }
    }

    /// Tokens seen per slot held in the last step's batch, by layer and KV head; empty while nothing is folded.
    pub fn heads(&self) -> &[Vec<f64>] {
        &self.heads
    }

    /// One step on the corpus. On an error the weights are those before the step.
    pub fn step(&mut self, corpus: &Corpus) -> Result<StepReport, RetrofitError> {
        let step = self.optimizer.steps();
        let at = place(&self.settings, step);
        let sequences = corpus.batch(self.settings.seed, step, self.settings.batch);
        let lengths: Vec<usize> = sequences.iter().flat_map(|&n| corpus.lengths(n)).collect();
        let spans = Spans::of_lengths(&lengths);
        let parts = self.parts(corpus, &sequences, at);
        let folds = self.settings.method.dynamic().is_some() && at.stage != Stage::Zeroing;
        let Pressure { scope, over, pull, weight, .. } = self.settings.pressure;
        let target = 1.0 - 1.0 / at.ratio;
        let hinge = Hinge { target, scope, over, pull, stated_at: Some(self.settings.stated_at()) };

        let not_finite = |what, value, sequences: &[usize]| {
            let (sequences, documents) = (sequences.to_vec(), corpus.describe(sequences));
            RetrofitError::NotFinite { step: step + 1, what, value, sequences, documents }
        };
        let predictions: usize = parts.iter().map(|part| self.predictions(&part.frame.spans)).sum();
        let mut rates = BatchRates::new(&spans, if folds { self.shape.layers } else { 0 }, self.shape.heads.kv);
        if folds && over == Over::Batch && parts.len() > 1 {
            parts.iter().for_each(|part| {
                let ahead = self.rates_ahead(part);
                rates.set(&self.ops, &part.spans, &ahead.iter().collect::<Vec<_>>());
            });
        }
        let (mut task_loss, mut grads) = (0.0, Vec::new());
        for part in &parts {
            let tape = Tape::new(self.ops.clone());
            let mut names = self.names.iter();
            let vars = self.weights.map(&self.shape, |w| match names.next().is_some_and(|name| name.trains) {
                true => tape.param(w.clone()),
                false => Var::constant(w.clone()),
            });
            let (x, part_rates) = self.forward(&tape, &part.frame, &vars, &part.ids);
            let task = self.task_loss(&tape, &part.frame, Predictions { x: &x, w: vars.unembed() }, &part.ids);
            drop(x);
            let share = self.predictions(&part.frame.spans) as f64 / predictions as f64;
            let part_loss = self.ops.scalar(&task.value);
            if !part_loss.is_finite() {
                return Err(not_finite("the loss", part_loss, &part.sequences));
            }
            task_loss += share * part_loss;
            let mut seeds = vec![(&task, self.ops.tensor(&[1], &[share as f32]))];
            if folds {
                rates.set(&self.ops, &part.spans, &part_rates.iter().map(|rate| &rate.value).collect::<Vec<_>>());
                let pressure = rates.grads(&self.ops, &part.spans, (hinge, weight));
                seeds.extend(part_rates.iter().zip(pressure));
            }
            let found = tape.backward_seeded(&seeds);
            let found = trained(&self.names, vars.list()).into_iter().map(|var| found.get(var).cloned());
            grads = match grads.is_empty() {
                true => found.collect(),
                false => grads.into_iter().zip(found).map(|(sum, grad)| self.sum(sum, grad)).collect(),
            };
        }
        let grad_norm = Optimizer::norm(&self.ops, &grads);
        if !grad_norm.is_finite() {
            return Err(not_finite("the gradient norm", grad_norm, &sequences));
        }
        let missing = if folds { rates.hinge(&self.ops, hinge) } else { 0.0 };
        let full = lengths.iter().all(|&length| length == self.settings.length);
        let report = StepReport {
            step: step + 1,
            stage: at.stage,
            loss: task_loss + weight * missing,
            task_loss,
            hinge: missing,
            ratio_target: if full || !folds { at.ratio } else { asked(hinge, &spans) },
            ratio: match self.settings.method {
                Method::Dynamic(_) if folds => rates.ratio(),
                Method::Dynamic(_) => 1.0,
                Method::Gqa { .. } => self.settings.ratio,
            },
            grad_norm,
            rate: at.rate,
            tokens: spans.rows() as u64,
        };
        self.heads = rates.heads();
        self.update(&grads, at, grad_norm);
        Ok(report)
    }

    /// The parts of a batch.
    fn parts(&self, corpus: &Corpus, sequences: &[usize], at: Place) -> Vec<Part<O::Tensor>> {
        let settings = &self.settings;
        let (mut first_row, mut first_span) = (0, 0);
        let parts = sequences.chunks(settings.part()).map(|sequences| {
            let lengths: Vec<usize> = sequences.iter().flat_map(|&n| corpus.lengths(n)).collect();
            let spans = Spans::of_lengths(&lengths);
            let attention = match (&settings.method, at.stage) {
                (Method::Gqa { .. }, _) => Attention::Plain,
                (Method::Dynamic(dmc), Stage::Zeroing) => {
                    Attention::Fading(Fading { borrows: dmc.borrows(), factor: at.channel })
                }
                (Method::Dynamic(dmc), Stage::Ramp | Stage::Hold) => Attention::Folding {
                    dmc: dmc.clone(),
                    temperature: settings.temperature,
                    seed: settings.seed,
                    step: self.steps(),
                    first_row,
                },
            };
            first_row += spans.rows();
            first_span += spans.len();
            Part {
                sequences: sequences.to_vec(),
                ids: sequences.iter().flat_map(|&n| corpus.sequence(n)).copied().collect(),
                spans: first_span - spans.len()..first_span,
                frame: Frame { shape: self.shape.clone(), angles: self.angles.clone(), spans, attention },
            }
        });
        parts.collect()
    }

    /// Fold rates of a part by layer, from a forward pass alone.
    fn rates_ahead(&self, part: &Part<O::Tensor>) -> Vec<O::Tensor> {
        let frame = &part.frame;
        let pass =
            Pass { ops: &self.ops, shape: &frame.shape, angles: &frame.angles, spans: &frame.spans, wanted: None };
        let mut x = self.ops.embed(&part.ids, &self.weights.embed);
        let mut rates = Vec::new();
        for (layer, block) in self.weights.blocks.iter().enumerate() {
            let mut outs = frame.block_of(&pass, layer, block, &x).into_iter();
            x = outs.next().expect("a block returns the residual stream first");
            rates.extend(outs);
        }
        rates
    }

    /// Tokens of a part that the task loss is a mean over.
    fn predictions(&self, spans: &Spans) -> usize {
        match self.settings.loss {
            Loss::Distill { .. } => spans.rows(),
            Loss::Lm => spans.rows() - spans.len(),
        }
    }

    fn sum(&self, sum: Option<O::Tensor>, grad: Option<O::Tensor>) -> Option<O::Tensor> {
        match (sum, grad) {
            (Some(sum), Some(grad)) => Some(self.ops.add(&sum, &grad, 1.0)),
            (sum, grad) => sum.or(grad),
        }
    }

    /// What the logits are made from and, when folding, fold rates by layer.
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
        let pass = Pass { ops: tape, shape: &frame.shape, angles: &angles, spans: &frame.spans, wanted: None };
        (pass.normed(vars, &x), rates)
    }

    fn task_loss(
        &self,
        tape: &Tape<O>,
        frame: &Frame<O::Tensor>,
        predicted: Predictions<'_, Var<O::Tensor>>,
        ids: &[u32],
    ) -> Var<O::Tensor> {
        match (self.settings.loss, &self.teacher) {
            (Loss::Distill { direction }, Some(teacher)) => {
                let pass = Pass {
                    ops: &self.ops,
                    shape: &teacher.shape,
                    angles: &frame.angles,
                    spans: &frame.spans,
                    wanted: None,
                };
                let hidden = pass.hidden(&teacher.weights, ids, &mut Plain);
                let x = Var::constant(pass.normed(&teacher.weights, &hidden));
                let w = Var::constant(teacher.weights.unembed().clone());
                tape.prediction_loss(predicted, Goal::Teacher(Predictions { x: &x, w: &w }, direction))
            }
            _ => {
                let mut targets: Vec<u32> = ids[1..].iter().copied().chain([NO_TARGET]).collect();
                frame.spans.iter().for_each(|span| targets[span.start + span.len - 1] = NO_TARGET);
                tape.prediction_loss(predicted, Goal::Tokens(&targets))
            }
        }
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
        let group = |name: &Name| if name.name.contains(names::DECIDE) { learning.decide_factor } else { 1.0 };
        let groups = self.names.iter().filter(|name| name.trains).map(group);
        let params = trained(&self.names, self.weights.list_mut()).into_iter().zip(groups).collect();
        self.optimizer.step(&self.ops, params, grads, (rates, norm));
        if self.optimizer.steps() == self.settings.stages.zeroing {
            self.zero_borrowed_rows();
        }
    }

    /// Ends the zeroing stage: the rows that make the borrowed channels become 0, so every logit starts at `-offset`.
    /// Their moments go with them: they are those of a channel with another meaning.
    fn zero_borrowed_rows(&mut self) {
        let heads = self.shape.heads;
        // The last channel of every n-th head, beginning with the first.
        let rows =
            |count: usize, n: usize| (0..count).step_by(n).map(|head| (head + 1) * heads.dim - 1).collect::<Vec<_>>();
        let (query, kv) = match self.settings.method.borrows() {
            Borrows::Nothing => return,
            Borrows::KeysAndQueries => (rows(heads.query, 1), rows(heads.kv, 1)),
            Borrows::FirstQueries => (rows(heads.query, heads.group()), Vec::new()),
        };
        let names = self.names.iter().filter(|name| name.trains);
        let params = trained(&self.names, self.weights.list_mut()).into_iter().zip(self.optimizer.moments_mut());
        for (Name { name, .. }, (weight, moments)) in names.zip(params) {
            let rows = match name {
                name if name.contains(names::Q_PROJ) || name.contains(names::Q_BIAS) => &query,
                name if name.contains(names::K_PROJ) || name.contains(names::K_BIAS) => &kv,
                _ => continue,
            };
            [weight, &mut moments.m, &mut moments.v].into_iter().for_each(|x| self.ops.zero_rows(x, rows));
        }
    }

    /// The weights that train and their moments by name, for a checkpoint of the run.
    pub fn state(&self) -> Vec<(String, HostTensor)> {
        let host = |x: &O::Tensor| HostTensor::from_f32(self.ops.shape(x), &self.ops.to_host(x));
        let names = self.names.iter().filter(|name| name.trains);
        let params = trained(&self.names, self.weights.list()).into_iter().zip(self.optimizer.moments());
        let mut state = Vec::with_capacity(params.len() * 3);
        for (Name { name, .. }, (weight, moments)) in names.zip(params) {
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
        let names = self.names.iter().filter(|name| name.trains);
        let loaded = names.map(|Name { name, dims, .. }| {
            let (m, v) = (load(&format!("m.{name}"), dims)?, load(&format!("v.{name}"), dims)?);
            let weight = tensor(name, dims)?.to_f32();
            Ok((
                self.ops.master(dims, &weight, names::precision(name, dims, self.settings.precision)),
                Moments { m, v },
            ))
        });
        let (weights, moments): (Vec<_>, Vec<_>) =
            loaded.collect::<Result<Vec<_>, RetrofitError>>()?.into_iter().unzip();
        for (weight, loaded) in trained(&self.names, self.weights.list_mut()).into_iter().zip(weights) {
            *weight = loaded;
        }
        self.optimizer = Optimizer::resume(moments, steps);
        Ok(())
    }

    /// The model as trained so far: the base's files with new weights in the base's dtypes, and our section, or fewer KV
    /// heads, in its configuration.
    pub fn checkpoint(&self, base: &Checkpoint) -> Result<Checkpoint, RetrofitError> {
        let config = match &self.settings.method {
            Method::Gqa { kv_heads } => base.config.with_kv_heads(*kv_heads)?,
            Method::Dynamic(dmc) => base.config.with_compression(Compression {
                dmc: dmc.clone(),
                ratio: self.settings.ratio,
                trained_length: self.settings.length,
                base_model: base.source.clone(),
            })?,
        };
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

/// A weight's name and shape, and whether it trains.
#[derive(Clone, Debug)]
struct Name {
    name: String,
    dims: Vec<usize>,
    trains: bool,
}

/// Of things that go with all weights, those of the weights that train.
fn trained<T>(names: &[Name], all: Vec<T>) -> Vec<T> {
    names.iter().zip(all).filter(|(name, _)| name.trains).map(|(_, one)| one).collect()
}
