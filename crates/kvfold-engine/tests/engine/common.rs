//! Tiny random models that fold a lot, and what their training path says of a text.

use kvfold_cache::{CachePolicy, Dense, policy_of};
use kvfold_engine::{Engine, Sequence};
use kvfold_kernels::dmc::{Decision, Dmc, Method, Share};
use kvfold_kernels::kernel_set::KernelSet;
use kvfold_kernels::noise::{hash, unit};
use kvfold_kernels::ops::{Heads, Spans};
use kvfold_kernels::real::Real;
use kvfold_kernels::{Array, Cpu, Ops};
use kvfold_model::Loaded;
use kvfold_model::attend::{Folding, Gated, Mode, gated};
use kvfold_model::block::{Attend, Pass, Projected};
use kvfold_model::rope::{Rope, Scaling};
use kvfold_model::shape::Shape;
use kvfold_model::weights::Weights;
use std::convert::Infallible;
use std::ops::Range;

/// Draws from a counter: the same on every machine.
#[derive(Clone, Debug)]
pub(crate) struct Rng {
    seed: u64,
    drawn: u64,
}

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, drawn: 0 }
    }

    /// Between 0 and 1.
    pub(crate) fn unit(&mut self) -> f64 {
        self.drawn += 1;
        unit(hash(&[self.seed, self.drawn]))
    }

    /// Between -1 and 1.
    pub(crate) fn signed(&mut self) -> f64 {
        2.0 * self.unit() - 1.0
    }

    pub(crate) fn within(&mut self, range: Range<usize>) -> usize {
        range.start + (self.unit() * range.len() as f64) as usize
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.within(0..from.len())]
    }

    pub(crate) fn tokens(&mut self, len: usize, vocab: usize) -> Vec<u32> {
        (0..len).map(|_| self.within(0..vocab) as u32).collect()
    }
}

/// A model to draw, and how it compresses.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) seed: u64,
    pub(crate) shape: Shape,
    pub(crate) dmc: Dmc,
    /// Factor on the weights of the decision head.
    pub(crate) decide: f64,
}

pub(crate) const LAYERS: usize = 2;

/// The methods that every promise holds for.
pub(crate) const METHODS: [Method; 2] = [Method::Dmc, Method::Dms];

impl Case {
    /// A case of a method and of any kind that the promises speak of. Offsets are small, so decisions are mixed.
    pub(crate) fn draw_of(method: Method, seed: u64) -> Self {
        let Self { dmc, shape, .. } = Self::draw(seed);
        match method {
            Method::Dmc => Self::new(seed, shape.heads, dmc),
            Method::Dms => Self::new(seed, shape.heads, Dmc { method, pool_window: None, log_mass: false, ..dmc }),
        }
    }

    /// A case of DMC.
    pub(crate) fn draw(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let offset = rng.pick(&[-1.2, -0.5, 0.4]);
        let dmc = Dmc {
            method: Method::Dmc,
            decision: match rng.pick(&[true, false]) {
                true => Decision::Borrowed { scale: rng.pick(&[1.0, 2.5]), offset },
                false => Decision::Head {
                    scale: rng.pick(&[1.0, 2.5]),
                    offset,
                    bias: rng.pick(&[true, false]),
                    ahead: rng.pick(&[true, false]),
                },
            },
            delay: rng.pick(&[0, 0, 1, 5, 16, 33]),
            sinks: rng.pick(&[0, 0, 1, 4]),
            pool_window: rng.pick(&[None, Some(1), Some(3), Some(12)]),
            log_mass: rng.pick(&[true, false]),
            share: rng.pick(&[Share::Head, Share::Head, Share::Layer]),
        };
        let (group, kv) = rng.pick(&[(1, 2), (1, 3), (4, 1), (4, 2), (8, 1)]);
        let dim = rng.pick(&[2, 4, 6, 8, 16]);
        let mut case = Self::new(seed, Heads { query: group * kv, kv, dim }, dmc);
        let llama3 = Scaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 40 };
        let (beta_fast, beta_slow) = (8.0, 1.0);
        let yarn =
            Scaling::Yarn { factor: 4.0, beta_fast, beta_slow, truncate: true, original: 40, attention_factor: 1.14 };
        // Half of the cases are plain Llamas; the others have what other families have.
        if rng.pick(&[true, false]) {
            case.shape.rope.scaling = rng.pick(&[Scaling::None, Scaling::Linear { factor: 4.0 }, llama3, yarn]);
            case.shape.qkv_bias = rng.pick(&[true, false]);
            case.shape.o_bias = rng.pick(&[true, false]);
            case.shape.qk_norm = rng.pick(&[true, false]);
        }
        case
    }

    pub(crate) fn new(seed: u64, heads: Heads, dmc: Dmc) -> Self {
        let shape = Shape {
            layers: LAYERS,
            hidden: 14,
            intermediate: 18,
            heads,
            vocab: 37,
            context: 160,
            norm_eps: 1e-5,
            rope: Rope { theta: 10_000.0, scaling: Scaling::None },
            qkv_bias: false,
            o_bias: false,
            qk_norm: false,
            tied: seed.is_multiple_of(2),
            decide_outputs: dmc.decide_outputs(heads.kv),
            decide_bias: dmc.decide_bias(),
            decide_ahead: dmc.decide_ahead(),
        };
        Self { seed, shape, dmc, decide: 1.0 }
    }

    /// The same model with decisions that never fold.
    pub(crate) fn never(mut self) -> Self {
        match &mut self.dmc.decision {
            Decision::Borrowed { offset, .. } | Decision::Head { offset, .. } => *offset = 1e6,
        }
        self
    }

    /// The model on a backend: weights of a size that keeps the residual stream near 1, attention away from uniform,
    /// and decision logits near 1.
    pub(crate) fn model<F: Real, K: KernelSet<F>>(&self, ops: Cpu<F, K>) -> Loaded<Cpu<F, K>> {
        let mut rng = Rng::new(self.seed ^ 0x5EED);
        let built = Weights::build(&self.shape, |name, dims| {
            let inputs = *dims.last().expect("a dimension") as f64;
            let spread = (3.0 / inputs).sqrt();
            let mut draw = |centre: f64, spread: f64| {
                let len = dims.iter().product();
                (0..len).map(|_| (centre + spread * rng.signed()) as f32).collect::<Vec<f32>>()
            };
            let data = match name {
                _ if name.contains("decide_proj.bias") => draw(0.0, 0.3 * self.decide),
                _ if name.ends_with("bias") => draw(0.0, 0.3),
                _ if dims.len() == 1 => draw(1.0, 0.3),
                _ if name.contains("embed") => draw(0.0, 1.7),
                _ if name.contains("decide") => draw(0.0, spread * self.decide),
                _ if name.contains("q_proj") => draw(0.0, 1.5 * spread),
                _ => draw(0.0, spread),
            };
            Ok::<_, Infallible>(ops.tensor(dims, &data))
        });
        let Ok(weights) = built;
        let angles = ops.rope_table(&self.shape.inv_freq(), self.shape.context);
        Loaded { shape: self.shape.clone(), weights, angles, dmc: Some(self.dmc.clone()), ops }
    }

    /// An engine that serves the model as it was taught to.
    pub(crate) fn engine<F: Real, K: KernelSet<F>>(&self, ops: Cpu<F, K>) -> Engine<Cpu<F, K>> {
        self.engine_under(ops, policy_of(Some(&self.dmc)))
    }

    /// An engine that serves the model with a full cache.
    pub(crate) fn dense_engine<F: Real, K: KernelSet<F>>(&self, ops: Cpu<F, K>) -> Engine<Cpu<F, K>> {
        self.engine_under(ops, Box::new(Dense))
    }

    fn engine_under<F: Real, K: KernelSet<F>>(
        &self,
        ops: Cpu<F, K>,
        policy: Box<dyn CachePolicy>,
    ) -> Engine<Cpu<F, K>> {
        Engine::with_policy(self.model(ops), policy)
    }
}

/// Which tokens of one sequence ask to be folded, by layer and KV head.
#[derive(Clone, Debug)]
pub(crate) struct Decisions {
    folds: Vec<Vec<Vec<bool>>>,
    delay: usize,
}

impl Decisions {
    /// By layer, KV head and token.
    pub(crate) fn folds(&self) -> &[Vec<Vec<bool>>] {
        &self.folds
    }

    fn heads(&self) -> impl Iterator<Item = &Vec<bool>> {
        self.folds.iter().flatten()
    }

    /// Slots outside the ring once `tokens` tokens are seen: those that left it and did not fold.
    pub(crate) fn closed(&self, tokens: usize) -> Vec<Vec<usize>> {
        let gone = tokens.saturating_sub(self.delay);
        let count = |folds: &Vec<bool>| (0..gone).filter(|&t| !folds[t]).count();
        self.folds.iter().map(|heads| heads.iter().map(count).collect()).collect()
    }

    /// Slots once `tokens` tokens are seen, the ring's included.
    pub(crate) fn slots(&self, tokens: usize) -> Vec<Vec<usize>> {
        let mut slots = self.closed(tokens);
        slots.iter_mut().flatten().for_each(|slots| *slots += tokens.min(self.delay));
        slots
    }

    /// Tokens of the longest segment that `tokens` tokens fold into.
    pub(crate) fn longest(&self, tokens: usize) -> usize {
        let gone = tokens.saturating_sub(self.delay);
        let longest = |folds: &Vec<bool>| {
            let runs = (0..gone).scan(0, |run, t| {
                *run = if folds[t] { *run + 1 } else { 1 };
                Some(*run)
            });
            runs.max().unwrap_or(0)
        };
        self.heads().map(longest).max().unwrap_or(0)
    }
}

/// What the training path says of one sequence.
#[derive(Clone, Debug)]
pub(crate) struct Trained<F> {
    /// `[T, V]`.
    pub(crate) logits: Vec<F>,
    pub(crate) decisions: Decisions,
    /// Folds per token seen, by layer and KV head, as the loss counts them.
    pub(crate) rates: Vec<Vec<f64>>,
    /// Smallest distance of a decision logit from its threshold.
    pub(crate) margin: f64,
}

/// Folding attention that keeps the decision logits.
struct Watched<F: Real> {
    folding: Folding<Array<F>>,
    logits: Vec<Array<F>>,
}

impl<F: Real, K: KernelSet<F>> Attend<Cpu<F, K>> for Watched<F> {
    fn attend(&mut self, layer: usize, pass: &Pass<'_, Cpu<F, K>>, p: Projected<Array<F>>) -> Array<F> {
        let Gated { logit, ahead, .. } = gated(pass, &self.folding.dmc, p.clone());
        let kv = pass.shape.heads.kv;
        let mut logits = logit.data().to_vec();
        for (span, ahead) in pass.spans.iter().flat_map(|span| ahead.iter().map(move |ahead| (span, ahead))) {
            let (first, end) = (span.start * kv, (span.start + span.len) * kv);
            let said = &ahead.data()[first..end - kv];
            logits[first + kv..end].iter_mut().zip(said).for_each(|(logit, &said)| *logit += said);
        }
        self.logits.push(pass.ops.array(logit.shape(), logits));
        self.folding.attend(layer, pass, p)
    }
}

/// The training path with hard decisions, all texts in one ragged batch.
pub(crate) fn train<F: Real, K: KernelSet<F>>(model: &Loaded<Cpu<F, K>>, texts: &[Vec<u32>]) -> Vec<Trained<F>> {
    let lengths: Vec<usize> = texts.iter().map(Vec::len).collect();
    let spans = Spans::of_lengths(&lengths);
    let dmc = model.dmc.clone().expect("a model that folds");
    let mut watched = Watched { folding: Folding::new(&dmc, Mode::Hard), logits: Vec::new() };
    let logits = model.pass(&spans).forward(&model.weights, &texts.concat(), &mut watched);
    let (vocab, kv) = (model.shape.vocab, model.shape.heads.kv);
    let one = |(n, span): (usize, &kvfold_kernels::ops::Span)| {
        let of_head = |layer: &Array<F>, g: usize| -> Vec<F> {
            (span.start..span.start + span.len).map(|t| layer.data()[t * kv + g]).collect()
        };
        let heads: Vec<Vec<Vec<F>>> =
            watched.logits.iter().map(|layer| (0..kv).map(|g| of_head(layer, g)).collect()).collect();
        let margin = heads.iter().flatten().flatten().map(|l| l.f64().abs()).fold(f64::INFINITY, f64::min);
        let folds = |head: &Vec<F>| head.iter().enumerate().map(|(t, &l)| t > dmc.sinks && l > F::zero()).collect();
        Trained {
            logits: logits.data()[span.start * vocab..][..span.len * vocab].to_vec(),
            decisions: Decisions {
                folds: heads.iter().map(|heads| heads.iter().map(folds).collect()).collect(),
                delay: dmc.delay,
            },
            rates: watched
                .folding
                .rates
                .iter()
                .map(|rates| rates.data()[n * kv..][..kv].iter().map(|r| r.f64()).collect())
                .collect(),
            margin,
        }
    };
    spans.iter().enumerate().map(one).collect()
}

/// How many tokens a sequence takes at a time: the entries of `sizes` in turn.
pub(crate) fn cut(len: usize, sizes: &[usize]) -> Vec<Range<usize>> {
    let mut at = 0;
    let mut chunks = Vec::new();
    for size in sizes.iter().cycle() {
        if at == len {
            break;
        }
        chunks.push(at..len.min(at + size));
        at = len.min(at + size);
    }
    chunks
}

/// Serves one text in chunks; `seen` looks at the sequence after every pass. Returns the logits `[T, V]`.
pub(crate) fn serve<F: Real, K: KernelSet<F>>(
    engine: &mut Engine<Cpu<F, K>>,
    text: &[u32],
    chunks: &[Range<usize>],
    mut seen: impl FnMut(&Engine<Cpu<F, K>>, &Sequence),
) -> Vec<F> {
    let mut sequence = engine.sequence();
    let mut logits = Vec::new();
    for chunk in chunks {
        let pass = engine.pass(&mut [(&mut sequence, &text[chunk.clone()])]).expect("an unlimited pool");
        logits.extend_from_slice(pass.data());
        seen(engine, &sequence);
    }
    logits
}

/// Largest difference relative to the larger of 1 and the wanted number's own size.
pub(crate) fn worst<F: Real>(got: &[F], want: &[F]) -> f64 {
    assert_eq!(got.len(), want.len());
    let error = |(g, w): (&F, &F)| (g.f64() - w.f64()).abs() / w.f64().abs().max(1.0);
    // Not `f64::max`, which would pass over a NaN.
    got.iter().zip(want).map(error).fold(0.0, |a, b| if b <= a { a } else { b })
}
