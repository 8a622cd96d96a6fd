//! Attention over whole sequences: plain, while the borrowed channel fades out, and with folding.
//!
//! [`gated`] and [`lost_by_queries`] are what training, evaluation and the paged cache share: where decisions come from,
//! and what borrowing a channel does to queries and keys. A borrowed channel is zeroed before rotation in queries and
//! (DMC) keys, and again after it in queries; that alone keeps it out of every score, since scores are products of the
//! two (spec 1.3 zeroes it in the keys as well, to the same effect; in DMS, spec 5.2, keys stay whole).

use crate::block::{Attend, Pass, Projected};
use kvfold_kernels::Ops;
use kvfold_kernels::dmc::{Borrows, Decision, Dmc, Method, Share};
use kvfold_kernels::noise::{self, NoiseKey};
use kvfold_kernels::ops::{Borrowed, Channel, Gate, Heads, Keys, PoolInput, PoolShape, Pooled, Visible};

/// Plain causal attention: the original model.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plain;

impl<O: Ops> Attend<O> for Plain {
    fn attend(&mut self, _: usize, pass: &Pass<'_, O>, p: Projected<O::Tensor>) -> O::Tensor {
        let Pass { ops, shape, angles, spans, .. } = *pass;
        let q = ops.rope(&p.q, angles, spans);
        let exact = Some(Keys { k: ops.rope(&p.k, angles, spans), v: p.v, mass: None });
        ops.attention(&q, &Visible { exact, pooled: None, delay: 0, precision: p.precision }, spans, shape.heads)
    }
}

/// Plain attention while the borrowed channels fade out (stage 1 of the paper, spec 2.8).
#[derive(Clone, Copy, Debug)]
pub struct Fading {
    /// Which channels.
    pub borrows: Borrows,
    /// What is left of them, from 1 to 0.
    pub factor: f64,
}

/// The channel of queries that is borrowed, where one is.
pub fn lost_by_queries(borrows: Borrows, heads: Heads) -> Option<Channel> {
    match borrows {
        Borrows::Nothing => None,
        Borrows::KeysAndQueries => Some(Channel::last(heads.dim)),
        Borrows::FirstQueries => Some(Channel::last_of_first_query(heads)),
    }
}

/// Queries with `factor` left of what is borrowed from them.
fn fade_queries<O: Ops>(pass: &Pass<'_, O>, Fading { borrows, factor }: Fading, q: O::Tensor) -> O::Tensor {
    let lost = lost_by_queries(borrows, pass.shape.heads);
    lost.into_iter().fold(q, |q, channel| pass.ops.scale_channel(&q, channel, factor))
}

/// Keys with `factor` left of what is borrowed from them.
fn fade_keys<O: Ops>(pass: &Pass<'_, O>, Fading { borrows, factor }: Fading, k: O::Tensor) -> O::Tensor {
    match borrows {
        Borrows::Nothing | Borrows::FirstQueries => k,
        Borrows::KeysAndQueries => pass.ops.scale_channel(&k, Channel::last(pass.shape.heads.dim), factor),
    }
}

impl<O: Ops> Attend<O> for Fading {
    fn attend(&mut self, _: usize, pass: &Pass<'_, O>, p: Projected<O::Tensor>) -> O::Tensor {
        let Pass { ops, shape, angles, spans, .. } = *pass;
        let turn = |x: &O::Tensor| ops.rope(x, angles, spans);
        let q = fade_queries(pass, *self, turn(&fade_queries(pass, *self, p.q)));
        let k = fade_keys(pass, *self, turn(&fade_keys(pass, *self, p.k)));
        let exact = Some(Keys { k, v: p.v, mass: None });
        ops.attention(&q, &Visible { exact, pooled: None, delay: 0, precision: p.precision }, spans, shape.heads)
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
    /// Decision logits `[N, G]`.
    pub logit: T,
    /// What each token adds to the logit of the next, `[N, G]`; none where decisions do not look back.
    pub ahead: Option<T>,
    /// Importances `[N, G]`; none in DMS.
    pub omega: Option<T>,
}

/// Decisions and importances of one layer (spec 1.2, 5.2), and the projections without the borrowed channels.
pub fn gated<O: Ops>(pass: &Pass<'_, O>, dmc: &Dmc, p: Projected<O::Tensor>) -> Gated<O::Tensor> {
    let (ops, heads) = (pass.ops, pass.shape.heads);
    let Projected { q, k, v, decide, ahead, .. } = p;
    let with_importance = |gate: Gate<O::Tensor>| (gate.logit, Some(gate.omega));
    let ((mut logit, omega), mut ahead) = match dmc.decision {
        Decision::Borrowed { scale, offset } => {
            let by = Borrowed { scale, offset };
            let decided = match dmc.method {
                Method::Dmc => with_importance(ops.borrowed_gate(&q, &k, heads, by)),
                Method::Dms => (ops.query_logit(&q, heads, by), None),
            };
            (decided, None)
        }
        Decision::Head { scale, offset, .. } => {
            let r = decide.expect("a model that decides by a head has decision heads: checked when it is loaded");
            let decided = match dmc.method {
                Method::Dmc => with_importance(ops.head_gate(&r, scale, offset)),
                Method::Dms => (ops.affine(&r, scale, offset), None),
            };
            (decided, ahead.map(|ahead| ops.scale(&ahead, scale)))
        }
    };
    if dmc.share == Share::Layer {
        logit = ops.share_columns(&logit);
        ahead = ahead.map(|ahead| ops.share_columns(&ahead));
    }
    let gone = Fading { borrows: dmc.borrows(), factor: 0.0 };
    Gated { q: fade_queries(pass, gone, q), k: fade_keys(pass, gone, k), v, logit, ahead, omega }
}

/// Queries as scores need them: rotated, and without the borrowed channels.
fn rotated_query<O: Ops>(pass: &Pass<'_, O>, dmc: &Dmc, q: &O::Tensor) -> O::Tensor {
    fade_queries(pass, Fading { borrows: dmc.borrows(), factor: 0.0 }, pass.ops.rope(q, pass.angles, pass.spans))
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

/// Folding or evicting attention over whole sequences (spec 2.5, with a delay, and 5.3).
#[derive(Clone, Debug)]
pub struct Folding<T> {
    /// How the model compresses.
    pub dmc: Dmc,
    /// Relaxed or hard.
    pub mode: Mode<T>,
    /// Folds per token seen `[S, G]`, one entry per layer that has run.
    pub rates: Vec<T>,
    /// Decision logits `[N, G]`, one entry per layer that has run; in training relaxed.
    pub logits: Vec<T>,
}

impl<T> Folding<T> {
    /// Folding attention that has seen no layer yet.
    pub fn new(dmc: &Dmc, mode: Mode<T>) -> Self {
        Self { dmc: dmc.clone(), mode, rates: Vec::new(), logits: Vec::new() }
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
        let Pass { ops, shape, angles, spans, .. } = *pass;
        let precision = p.precision;
        let Gated { q, k, v, logit, ahead, omega } = gated(pass, &self.dmc, p);
        let logit = ahead.into_iter().fold(logit, |logit, ahead| ops.add_ahead(&logit, &ahead, spans));
        let (logit, decided) = match &self.mode {
            Mode::Soft { temperature, noise } => {
                let relaxed = ops.relax(&logit, &self.noise(pass, layer, noise), *temperature);
                let decided = ops.decide_soft(&relaxed, spans, self.dmc.sinks);
                (relaxed, decided)
            }
            Mode::Hard => {
                let decided = ops.decide_hard(&logit, spans, self.dmc.sinks);
                (logit, decided)
            }
        };
        let delay = self.dmc.delay;
        self.rates.push(ops.fold_rate(&logit, spans, self.dmc.exempt()));
        self.logits.push(logit);

        let turn = |k: &O::Tensor| ops.rope(k, angles, spans);
        let (exact, pooled) = match omega {
            // A slot of DMS is its newest token: nothing to pool.
            None => {
                let keys = Keys { k: turn(&k), v, mass: None };
                ((delay > 0).then(|| keys.clone()), keys)
            }
            Some(omega) => {
                let input = PoolInput { k, v, alpha: decided.alpha, omega };
                let states = ops.pool(&input, spans, PoolShape { heads: shape.heads, window: self.dmc.pool_window });
                let mass = |z: &O::Tensor| self.dmc.log_mass.then(|| ops.ln(z));
                let exact =
                    (delay > 0).then(|| Keys { k: turn(&input.k), v: input.v.clone(), mass: mass(&input.omega) });
                (exact, Keys { k: turn(&states.k), mass: mass(&states.mass), v: states.v })
            }
        };
        let pooled = Some(Pooled { keys: pooled, close: decided.close });
        let visible = Visible { exact, pooled, delay, precision };
        ops.attention(&rotated_query(pass, &self.dmc, &q), &visible, spans, shape.heads)
    }
}
