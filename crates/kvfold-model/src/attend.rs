//! Attention over whole sequences: plain, while the borrowed channel fades out, and with folding.
//!
//! [`gated`] and [`rotated_query`] are what training, evaluation and the paged cache share: where decisions come from,
//! and what borrowing a channel does to queries and keys. The borrowed channel is zeroed before rotation in queries and
//! keys, and again after it in queries; that alone keeps it out of every score, since scores are products of the two
//! (spec 1.3 zeroes it in the keys as well, to the same effect).

use crate::block::{Attend, Pass, Projected};
use kvfold_kernels::Ops;
use kvfold_kernels::dmc::{Decision, Dmc, Share};
use kvfold_kernels::noise::{self, NoiseKey};
use kvfold_kernels::ops::{Borrowed, Gate, Keys, PoolInput, PoolShape, Pooled, Visible};

/// Plain causal attention: the original model.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plain;

impl<O: Ops> Attend<O> for Plain {
    fn attend(&mut self, _: usize, pass: &Pass<'_, O>, p: Projected<O::Tensor>) -> O::Tensor {
        let Pass { ops, shape, angles, spans } = *pass;
        let q = ops.rope(&p.q, angles, spans);
        let exact = Some(Keys { k: ops.rope(&p.k, angles, spans), v: p.v, mass: None });
        ops.attention(&q, &Visible { exact, pooled: None, delay: 0 }, spans, shape.heads)
    }
}

/// Plain attention while the last channel of queries and keys fades out (stage 1 of the paper, spec 2.8).
#[derive(Clone, Copy, Debug)]
pub struct Fading {
    /// What is left of the channel, from 1 to 0.
    pub factor: f64,
}

impl<O: Ops> Attend<O> for Fading {
    fn attend(&mut self, _: usize, pass: &Pass<'_, O>, p: Projected<O::Tensor>) -> O::Tensor {
        let Pass { ops, shape, angles, spans } = *pass;
        let fade = |x: &O::Tensor| ops.scale_last_channel(x, shape.heads.dim, self.factor);
        let turn = |x: &O::Tensor| fade(&ops.rope(&fade(x), angles, spans));
        let exact = Some(Keys { k: turn(&p.k), v: p.v, mass: None });
        ops.attention(&turn(&p.q), &Visible { exact, pooled: None, delay: 0 }, spans, shape.heads)
    }
}

/// Projections that no longer hold the borrowed channel, and what it or the head decided.
#[derive(Clone, Debug)]
pub struct Gated<T> {
    /// Queries before rotation.
    pub q: T,
    /// Keys before rotation.
    pub k: T,
    /// Values.
    pub v: T,
    /// Decision logits and importances `[N, G]`.
    pub gate: Gate<T>,
}

/// Decisions and importances of one layer (spec 1.2), and the projections without the borrowed channel.
pub fn gated<O: Ops>(pass: &Pass<'_, O>, dmc: &Dmc, p: Projected<O::Tensor>) -> Gated<O::Tensor> {
    let (ops, heads) = (pass.ops, pass.shape.heads);
    let Projected { mut q, mut k, v, decide } = p;
    let mut gate = match dmc.decision {
        Decision::Borrowed { scale, offset } => {
            let gate = ops.borrowed_gate(&q, &k, heads, Borrowed { scale, offset });
            q = ops.scale_last_channel(&q, heads.dim, 0.0);
            k = ops.scale_last_channel(&k, heads.dim, 0.0);
            gate
        }
        Decision::Head { scale, offset } => {
            let r = decide.expect("a model that decides by a head has decision heads: checked when it is loaded");
            ops.head_gate(&r, scale, offset)
        }
    };
    if dmc.share == Share::Layer {
        gate.logit = ops.share_columns(&gate.logit);
    }
    Gated { q, k, v, gate }
}

/// Queries as scores need them: rotated, and without the borrowed channel.
pub fn rotated_query<O: Ops>(pass: &Pass<'_, O>, dmc: &Dmc, q: &O::Tensor) -> O::Tensor {
    let q = pass.ops.rope(q, pass.angles, pass.spans);
    match dmc.decision.borrows_channel() {
        true => pass.ops.scale_last_channel(&q, pass.shape.heads.dim, 0.0),
        false => q,
    }
}

/// Where the noise on decisions comes from.
#[derive(Clone, Debug)]
pub enum Noise<T> {
    /// A run's own, by (seed, step, layer, row).
    Keyed {
        /// Seed of the run.
        seed: u64,
        /// Optimiser step.
        step: u64,
        /// The pass's first row among those of the step, above 0 in the later parts of a batch.
        first_row: usize,
    },
    /// Given per layer, `[N, G]`.
    Given(Vec<T>),
}

/// How decisions are taken over whole sequences.
#[derive(Clone, Debug)]
pub enum Mode<T> {
    /// Relaxed, for training: every token is partly folded.
    Soft {
        /// Temperature of the relaxation.
        temperature: f64,
        /// Logistic noise.
        noise: Noise<T>,
    },
    /// As the cache will take them.
    Hard,
}

/// Folding attention over whole sequences (spec 2.5, with a delay).
#[derive(Clone, Debug)]
pub struct Folding<T> {
    /// How the model compresses.
    pub dmc: Dmc,
    /// Relaxed or hard.
    pub mode: Mode<T>,
    /// Folds per token seen `[S, G]`, one entry per layer that has run.
    pub rates: Vec<T>,
}

impl<T> Folding<T> {
    /// Folding attention that has seen no layer yet.
    pub fn new(dmc: &Dmc, mode: Mode<T>) -> Self {
        Self { dmc: dmc.clone(), mode, rates: Vec::new() }
    }

    fn noise<O: Ops<Tensor = T>>(&self, pass: &Pass<'_, O>, layer: usize, noise: &Noise<T>) -> T
    where
        T: Clone,
    {
        match *noise {
            Noise::Given(ref given) => given[layer].clone(),
            Noise::Keyed { seed, step, first_row } => {
                let key = NoiseKey { seed, step, layer: layer as u64 };
                let (rows, kv) = (pass.spans.rows(), pass.shape.heads.kv);
                let draw = |columns: usize| noise::logistic_at(key, first_row * columns..(first_row + rows) * columns);
                let noise = match self.dmc.share {
                    Share::Head => draw(kv),
                    Share::Layer => draw(1).into_iter().flat_map(|x| std::iter::repeat_n(x, kv)).collect(),
                };
                pass.ops.tensor(&[rows, kv], &noise)
            }
        }
    }
}

impl<O: Ops> Attend<O> for Folding<O::Tensor> {
    fn attend(&mut self, layer: usize, pass: &Pass<'_, O>, p: Projected<O::Tensor>) -> O::Tensor {
        let Pass { ops, shape, angles, spans } = *pass;
        let Gated { q, k, v, gate } = gated(pass, &self.dmc, p);
        let (logit, decided) = match &self.mode {
            Mode::Soft { temperature, noise } => {
                let relaxed = ops.relax(&gate.logit, &self.noise(pass, layer, noise), *temperature);
                let decided = ops.decide_soft(&relaxed, spans);
                (relaxed, decided)
            }
            Mode::Hard => {
                let decided = ops.decide_hard(&gate.logit, spans);
                (gate.logit, decided)
            }
        };
        self.rates.push(ops.fold_rate(&logit, spans, self.dmc.delay));

        let input = PoolInput { k, v, alpha: decided.alpha, omega: gate.omega };
        let states = ops.pool(&input, spans, PoolShape { heads: shape.heads, window: self.dmc.pool_window });
        let mass = |z: &O::Tensor| self.dmc.log_mass.then(|| ops.ln(z));
        let turn = |k: &O::Tensor| ops.rope(k, angles, spans);
        let pooled = Keys { k: turn(&states.k), mass: mass(&states.mass), v: states.v };
        let exact =
            (self.dmc.delay > 0).then(|| Keys { k: turn(&input.k), v: input.v.clone(), mass: mass(&input.omega) });
        let visible =
            Visible { exact, pooled: Some(Pooled { keys: pooled, close: decided.close }), delay: self.dmc.delay };
        ops.attention(&rotated_query(pass, &self.dmc, &q), &visible, spans, shape.heads)
    }
}
