//! Attention over pages, as serving runs it: a step of decoding over caches of some depth, and a prompt chunk by chunk.

use super::{Bench, Cost, DECODED, Tensor};
use kvfold_cache::{CacheShape, PagePool, SequenceCache};
use kvfold_kernels::machine;
use kvfold_kernels::ops::{CachedAttention, Heads, Spans};
use kvfold_kernels::paged::{CacheDType, Rule};
use kvfold_kernels::simd::Level;
use kvfold_kernels::{CacheOps, FastCpu, Ops};

/// Tokens that a sequence takes in one pass, as the engine has it.
const CHUNK: usize = 128;

/// Of how many tokens one gets a slot of its own where a rule decides.
const APPENDED: usize = 4;

/// One layer's memory, and tokens to put into it.
struct Layer {
    pool: PagePool<FastCpu>,
    heads: Heads,
    angles: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logit: Tensor,
    omega: Tensor,
}

impl Layer {
    /// A layer for batches of `rows` tokens.
    fn new(bench: &Bench<'_>, (rule, dtype): (Rule, CacheDType), heads: Heads, rows: usize) -> Self {
        let ops = &bench.ops;
        let shape = CacheShape { layers: 1, heads, rule, dtype };
        let logits: Vec<f32> =
            (0..rows * heads.kv).map(|i| if (i / heads.kv).is_multiple_of(APPENDED) { -1.0 } else { 1.0 }).collect();
        // The deepest cache is decoded from once per round, and once more to warm up.
        let positions = bench.work.length + bench.work.rounds + 1;
        Self {
            pool: PagePool::new(ops, shape, usize::MAX),
            heads,
            angles: ops.rope_table(&vec![0.1; heads.dim / 2], positions),
            q: bench.array(rows, heads.query * heads.dim),
            k: bench.array(rows, heads.kv * heads.dim),
            v: bench.array(rows, heads.kv * heads.dim),
            logit: ops.tensor(&[rows, heads.kv], &logits),
            omega: ops.tensor(&[rows, heads.kv], &vec![1.0; rows * heads.kv]),
        }
    }

    /// Gives each cache its share of the tokens.
    fn step(&mut self, ops: &FastCpu, caches: &mut [SequenceCache]) {
        let rows = ops.shape(&self.q)[0];
        let each = rows / caches.len();
        let spans = Spans::of_chunks(caches.iter().map(|cache| (each, cache.tokens())));
        for cache in caches.iter_mut() {
            self.pool.reserve(ops, cache, (0, each));
        }
        drop(ops.cached_attention(CachedAttention {
            q: &self.q,
            zeroed: None,
            k: &self.k,
            v: &self.v,
            logit: Some(&self.logit),
            ahead: None,
            omega: Some(&self.omega),
            angles: &self.angles,
            spans: &spans,
            heads: self.heads,
            rule: self.pool.rule(),
            dtype: self.pool.dtype(),
            pages: self.pool.pages(),
            rings: self.pool.rings(),
            states: self.pool.states(),
            tables: caches.iter_mut().map(|cache| cache.layer_mut(0)).collect(),
            wanted: None,
        }));
        for cache in caches {
            self.pool.trim(cache, 0);
        }
    }

    /// Pairs of a query head and a slot for one more token of every cache.
    fn pairs(&self, caches: &[SequenceCache]) -> usize {
        let slots = caches.iter().flat_map(|cache| cache.held().slots).flatten().sum::<usize>();
        slots * self.heads.group()
    }

    fn bytes(&self, ops: &FastCpu, caches: &[SequenceCache]) -> usize {
        caches.iter().map(|cache| self.pool.usage(ops, cache).bytes()).sum()
    }
}

impl Bench<'_> {
    pub(super) fn paged(&mut self, heads: Heads) {
        let delay = self.work.delay;
        let folding = Rule::Fold { sinks: 0, delay, pool_window: None, log_mass: false };
        let rules = [
            ("paged attention", Rule::Keep),
            ("paged folding", folding),
            ("paged evicting", Rule::Evict { sinks: 0, delay }),
        ];
        for (name, rule) in rules {
            for dtype in CacheDType::ALL {
                let name = format!("{name} {}", dtype.name());
                self.paged_prefill(&name, (rule, dtype), heads);
                self.paged_decode(&name, (rule, dtype), heads);
            }
        }
    }

    fn paged_prefill(&mut self, name: &str, cache: (Rule, CacheDType), heads: Heads) {
        let chunk = CHUNK.min(self.work.length);
        let chunks = self.work.length / chunk;
        let mut layer = Layer::new(self, cache, heads, chunk);
        let mut caches = vec![layer.pool.sequence()];
        let mut pairs = 0.0;
        for _ in 0..chunks {
            let before = layer.pairs(&caches);
            layer.step(&self.ops, &mut caches);
            // A token sees itself, so the mean is of one more than before and of what is there after.
            pairs += chunk as f64 * (before + heads.query + layer.pairs(&caches)) as f64 / 2.0;
        }
        let moved = chunk * chunks * heads.dim * 2 * (heads.query + heads.kv);
        let precision = machine::cached_attention(Level::detect(), cache.1);
        let cost = Cost::of_products(precision, 4.0 * pairs * heads.dim as f64, moved);
        let shape =
            format!("{} tokens by {chunk}, {}/{} heads of {}", chunk * chunks, heads.query, heads.kv, heads.dim);
        drop(caches);
        self.time(&format!("{name} prefill"), shape, cost, |ops| {
            let mut caches = vec![layer.pool.sequence()];
            (0..chunks).for_each(|_| layer.step(ops, &mut caches));
        });
    }

    fn paged_decode(&mut self, name: &str, cache: (Rule, CacheDType), heads: Heads) {
        let chunk = CHUNK.min(self.work.length);
        let chunks = self.work.length / chunk;
        let mut fill = Layer::new(self, cache, heads, DECODED * chunk);
        let mut caches: Vec<SequenceCache> = (0..DECODED).map(|_| fill.pool.sequence()).collect();
        (0..chunks).for_each(|_| fill.step(&self.ops, &mut caches));
        let mut layer = Layer { pool: fill.pool, ..Layer::new(self, cache, heads, DECODED) };
        let flops = 4.0 * (layer.pairs(&caches) * heads.dim) as f64;
        let mut cost = Cost::of_products(machine::cached_attention(Level::detect(), cache.1), flops, 0);
        cost.bytes = layer.bytes(&self.ops, &caches);
        let depth = chunk * chunks;
        let shape = format!("{DECODED} at {depth}, {}/{} heads of {}", heads.query, heads.kv, heads.dim);
        self.time(&format!("{name} decode"), shape, cost, |ops| layer.step(ops, &mut caches));
    }
}
