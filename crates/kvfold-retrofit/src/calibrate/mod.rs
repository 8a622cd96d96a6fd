//! Decision heads that begin where folding costs little, before anything is trained.
//!
//! A decision head that begins at zero folds tokens at random, and what it is to learn, which tokens a KV head can do
//! without, is drowned for hundreds of steps in the noise of its own decisions. But the original model shows it: what
//! later queries make of two tokens, and of the slot that they become. Let a query give them the shares p and p' of its
//! attention. It sees `p v_t + p' v_{t-1} = (p + p') m + (p - p') (v_t - v_{t-1}) / 2` with m the mean of their values. Of the slot it
//! sees m; its key is the mean of the two keys, so the exponential of its score is the geometric mean of theirs, counted
//! twice where log masses are added, and it is read with about `2 sqrt(p p')` in place of `p + p'`. The rest goes to other tokens. Of
//! a text that the original reads once,
//!
//! ```text
//! cost(t)^2 = sum over the query heads h of the KV head of
//!             mean (p - p')^2                 * |O_h (v_t - v_{t-1}) / 2|^2 / |x|^2        DMC: t folds into t-1
//!           + mean (p + p' - 2 sqrt(p p'))^2  * |O_h (m - mean v)|^2 / |x|^2
//!             mean p'^2                       * |O_h (v_{t-1} - mean v)|^2 / |x|^2         DMS: t evicts t-1
//! ```
//!
//! where means are over queries at least W tokens later, `O_h` are the head's columns of the output projection and `|x|` is the
//! mean norm of the residual stream that it adds to, so that costs of all heads and layers can be compared. Tokens that are
//! read alike cost nothing to fold, however far apart their values are. A decision head becomes the linear function of its input that predicts the expected
//! cost (`regression`), and of the input of the token before where it looks back (`Decision::Head`); its threshold is the cost below which as many tokens of the text fold as the ratio asks for.
//!
//! The text goes through the model block by block, so memory is that of one layer's inputs.

mod costs;
mod regression;

use crate::corpus::Corpus;
use crate::error::RetrofitError;
use crate::settings::{Calibration, Settings};
use costs::{Reading, costs, known};
use kvfold_kernels::Grad;
use kvfold_kernels::dmc::{Decision, Dmc};
use kvfold_kernels::ops::{Scope, Spans};
use kvfold_model::block::Pass;
use kvfold_model::shape::Shape;
use kvfold_model::weights::Weights;
use regression::{Inputs, Linear};
use serde::Serialize;

/// Of the text, what is held out to judge the fit: one sequence in so many.
const HELD_OUT: usize = 8;

/// What was fitted. Of the folds that are chosen on held-out text, `chosen` is the summed cost; `random` that of as many folds
/// at random, and `best` that of the cheapest ones, which only the future shows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Fit {
    /// Tokens that were read.
    pub tokens: usize,
    /// Summed cost of the folds that the heads choose.
    pub chosen: f64,
    /// Summed cost of folds at random.
    pub random: f64,
    /// Summed cost of the cheapest folds.
    pub best: f64,
}

/// A layer's decision head.
pub(crate) struct HeadWeights {
    /// `[2G, C]`; in DMS `[G, C]`.
    pub(crate) weights: Vec<f32>,
    /// `[2G]`; in DMS `[G]`.
    pub(crate) biases: Vec<f32>,
    /// `[G, C]` of the token before, where decisions look back.
    pub(crate) ahead: Option<Vec<f32>>,
}

/// The model whose decisions are fitted, as it is without them.
pub(crate) struct Reader<'a, O: Grad> {
    pub(crate) ops: &'a O,
    pub(crate) shape: &'a Shape,
    pub(crate) angles: &'a O::Tensor,
    pub(crate) weights: &'a Weights<O::Tensor>,
}

/// A sequence on its way through the blocks.
struct Passage<T> {
    spans: Spans,
    /// Tokens whose cost is known.
    known: Vec<bool>,
    held_out: bool,
    x: T,
}

/// What a layer's decisions are fitted to.
struct Seen {
    /// Inputs of known tokens `[N, C]`; `[N, 2C]` with those of the tokens before them.
    inputs: Vec<f32>,
    /// Their costs `[G][N]`.
    costs: Vec<Vec<f64>>,
    /// Whether decisions look back.
    ahead: bool,
}

/// A KV head's function, what it says of all tokens, and what it says of held-out ones beside what they cost.
struct Head {
    linear: Linear,
    all: Vec<f64>,
    predicted: Vec<f64>,
    costs: Vec<f64>,
}

/// Fits the decision heads of a run, layer by layer. `progress` is told how many are done.
pub(crate) fn fit<O: Grad>(
    reader: &Reader<'_, O>,
    (settings, dmc, calibration): (&Settings, &Dmc, Calibration),
    corpus: &Corpus,
    mut progress: impl FnMut(usize),
) -> Result<(Vec<HeadWeights>, Fit), RetrofitError> {
    let Reader { ops, shape, angles, weights } = *reader;
    let sequences = corpus.first_taken(settings.seed, calibration.tokens);
    let held_out = sequences.len().div_ceil(HELD_OUT);
    let mut passages: Vec<_> = sequences
        .iter()
        .enumerate()
        .map(|(at, &n)| {
            let spans = Spans::of_lengths(&corpus.lengths(n).collect::<Vec<_>>());
            let known = known(&spans, dmc);
            // A single sequence is both learned from and held out.
            Passage {
                known,
                held_out: at + held_out >= sequences.len(),
                x: ops.embed(corpus.sequence(n), &weights.embed),
                spans,
            }
        })
        .collect();
    let alone = passages.len() == 1;
    let any = |held_out: bool| passages.iter().any(|p| (p.held_out == held_out || alone) && p.known.contains(&true));
    if !any(false) || !any(true) {
        let longest = sequences.iter().flat_map(|&n| corpus.lengths(n)).max().unwrap_or(0);
        return Err(RetrofitError::NothingToCalibrate { longest, needed: dmc.sinks + 1 + dmc.delay + 1 });
    }

    let mut layers: Vec<Vec<Head>> = Vec::new();
    for (layer, block) in weights.blocks.iter().enumerate() {
        let empty = || Seen { inputs: Vec::new(), costs: vec![Vec::new(); shape.heads.kv], ahead: dmc.decide_ahead() };
        let (mut learned, mut checked) = (empty(), empty());
        for passage in &mut passages {
            let Passage { spans, known, held_out, x } = passage;
            let pass = Pass { ops, shape, angles, spans, wanted: None };
            let mut reading = Reading::of(dmc);
            let next = pass.block(layer, block, x, &mut reading);
            let (reads, v) = reading.seen.expect("a block attends");
            if known.contains(&true) {
                let input = ops.to_host(&ops.rms_norm(x, &block.input_norm, shape.norm_eps));
                let costs = costs(reader, dmc, (spans, known), block, (x, &reads, &v));
                if *held_out {
                    checked.take(&input, &costs, known);
                }
                if !*held_out || alone {
                    learned.take(&input, &costs, known);
                }
            }
            *x = next;
        }
        let columns = learned.columns(shape.hidden);
        let Seen { inputs, costs, .. } = learned;
        let inputs = Inputs::new(ops, inputs, columns);
        let heads = costs.iter().zip(checked.costs).map(|(costs, known)| {
            let linear = inputs.fit(costs);
            let predicted = linear.of(ops, &checked.inputs);
            let mut all = inputs.values(&linear);
            if !alone {
                all.extend_from_slice(&predicted);
            }
            Head { linear, all, predicted, costs: known }
        });
        layers.push(heads.collect());
        progress(layer + 1);
    }

    let all: Vec<Vec<&[f64]>> =
        layers.iter().map(|heads| heads.iter().map(|head| head.all.as_slice()).collect()).collect();
    let thresholds = thresholds(&all, settings.pressure.scope, settings.fold_share(dmc));
    let tokens = sequences.iter().map(|&n| corpus.sequence(n).len()).sum();
    let fit = judge(&layers, &thresholds, tokens);
    let heads = layers.iter().zip(&thresholds);
    Ok((heads.map(|(heads, thresholds)| head_weights(shape, dmc, calibration, (heads, thresholds))).collect(), fit))
}

/// Numbers below which `share` of all lie, by layer and KV head, over the heads that share a target.
pub(crate) fn thresholds<H: AsRef<[f64]>>(layers: &[Vec<H>], scope: Scope, share: f64) -> Vec<Vec<f64>> {
    let of = |heads: &mut dyn Iterator<Item = &H>| {
        let mut all: Vec<f64> = heads.flat_map(|head| head.as_ref()).copied().collect();
        let at = ((all.len() as f64 * share) as usize).min(all.len() - 1);
        *all.select_nth_unstable_by(at, f64::total_cmp).1
    };
    match scope {
        Scope::Global => {
            let all = of(&mut layers.iter().flatten());
            layers.iter().map(|heads| vec![all; heads.len()]).collect()
        }
        Scope::Layer => layers.iter().map(|heads| vec![of(&mut heads.iter()); heads.len()]).collect(),
        Scope::Head => {
            layers.iter().map(|heads| heads.iter().map(|head| of(&mut std::iter::once(head))).collect()).collect()
        }
    }
}

/// What the folds below the thresholds cost, beside as many others.
fn judge(layers: &[Vec<Head>], thresholds: &[Vec<f64>], tokens: usize) -> Fit {
    let heads = layers.iter().flatten().zip(thresholds.iter().flatten());
    let (mut chosen, mut folds, mut all) = (0.0, 0, Vec::new());
    for (head, threshold) in heads {
        for (predicted, &cost) in head.predicted.iter().zip(&head.costs) {
            if predicted < threshold {
                chosen += cost;
                folds += 1;
            }
            all.push(cost);
        }
    }
    let random = all.iter().sum::<f64>() * folds as f64 / all.len() as f64;
    all.sort_unstable_by(f64::total_cmp);
    Fit { tokens, chosen, random, best: all[..folds].iter().sum() }
}

/// A decision head whose logits are `gain * (threshold - prediction)`; importances stay as they begin, all alike.
fn head_weights(
    shape: &Shape,
    dmc: &Dmc,
    calibration: Calibration,
    (heads, thresholds): (&[Head], &[f64]),
) -> HeadWeights {
    let Decision::Head { scale, offset, .. } = dmc.decision else {
        unreachable!("settings that calibrate have decision heads: checked when they are validated")
    };
    let factor = calibration.gain / scale;
    let mut weights: Vec<f32> = Vec::with_capacity(shape.decide_outputs * shape.hidden);
    let (mut biases, mut ahead) = (vec![0.0; shape.decide_outputs], Vec::new());
    for (bias, (Head { linear, .. }, threshold)) in biases.iter_mut().zip(heads.iter().zip(thresholds)) {
        let (own, before) = linear.weights.split_at(shape.hidden);
        let scaled = |&w: &f64| (-factor * w) as f32;
        weights.extend(own.iter().map(scaled));
        ahead.extend(before.iter().map(scaled));
        *bias = (factor * (threshold - linear.bias) + offset / scale) as f32;
    }
    weights.resize(shape.decide_outputs * shape.hidden, 0.0);
    HeadWeights { weights, biases, ahead: (!ahead.is_empty()).then_some(ahead) }
}

impl Seen {
    /// Columns of the inputs, for tokens of `hidden` numbers.
    fn columns(&self, hidden: usize) -> usize {
        if self.ahead { 2 * hidden } else { hidden }
    }

    /// Takes in the known tokens of inputs `[N, C]` and costs `[N, G]`.
    fn take(&mut self, inputs: &[f32], costs: &[f64], known: &[bool]) {
        let (columns, kv) = (inputs.len() / known.len(), self.costs.len());
        for (row, _) in known.iter().enumerate().filter(|(_, known)| **known) {
            self.inputs.extend_from_slice(&inputs[row * columns..][..columns]);
            if self.ahead {
                // A token that may fold is never its sequence's first.
                self.inputs.extend_from_slice(&inputs[(row - 1) * columns..][..columns]);
            }
            self.costs.iter_mut().zip(&costs[row * kv..]).for_each(|(to, &cost)| to.push(cost));
        }
    }
}
