//! A model, a cache policy, and the pool its sequences share.

use crate::attend::CachedAttend;
use kvfold_cache::{
    CacheError, CachePolicy, CacheShape, Held, PagePool, Prefix, PrefixCache, SequenceCache, Usage, policy_of,
};
use kvfold_kernels::CacheOps;
use kvfold_kernels::ops::Spans;
use kvfold_kernels::paged::CacheDType;
use kvfold_model::shape::Shape;
use kvfold_model::{Checkpoint, Loaded};
use std::sync::OnceLock;

/// What can go wrong while sequences run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A sequence would outgrow the model's context.
    #[error(
        "the sequence would be {tokens} tokens long and the model's context is {context}; shorten the prompt or ask for fewer new tokens"
    )]
    TooLong {
        /// Tokens that the sequence would have.
        tokens: usize,
        /// Tokens that the model takes.
        context: usize,
    },
    /// Nothing to start from.
    #[error(
        "the prompt is empty and the model names no token to start a text with; give a prompt of at least one token"
    )]
    EmptyPrompt,
    /// A sampling setting that means nothing.
    #[error(transparent)]
    Sampler(#[from] crate::sampler::BadSampler),
    /// The cache could never take the text to its end.
    #[error(transparent)]
    TooLarge(#[from] crate::scheduler::TooLarge),
    /// The cache cannot take the tokens.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

/// One sequence's tokens so far, as its cache holds them. Dropping it gives its pages back.
#[derive(Debug)]
pub struct Sequence {
    pub(crate) cache: SequenceCache,
}

impl Sequence {
    /// Tokens seen.
    pub fn tokens(&self) -> usize {
        self.cache.tokens()
    }

    /// Slots held by layer and KV head.
    pub fn held(&self) -> Held {
        self.cache.held()
    }
}

/// A model with cache memory.
#[derive(Debug)]
pub struct Engine<O: CacheOps> {
    pub(crate) model: Loaded<O>,
    policy: Box<dyn CachePolicy>,
    pub(crate) pool: PagePool<O>,
    /// Beginnings of texts, in pages of the pool that nobody else needs.
    pub(crate) prefixes: PrefixCache,
    /// What the model is told from others by, once somebody asked.
    pub(crate) identity: OnceLock<String>,
    chunk: usize,
}

/// Tokens that a sequence takes in one pass at most: bounds the pages that a prompt holds before it is known what folds.
const CHUNK: usize = 128;

impl<O: CacheOps> Engine<O> {
    /// An engine for a checkpoint, folding or evicting if the model was taught to.
    pub fn new(ops: O, checkpoint: &Checkpoint) -> Self {
        Self::of(Loaded::new(ops, checkpoint))
    }

    /// An engine for a model, folding or evicting if it was taught to.
    pub fn of(model: Loaded<O>) -> Self {
        let policy = policy_of(model.dmc.as_ref());
        Self::with_policy(model, policy)
    }

    /// An engine for a model under a policy of the caller's choice.
    pub fn with_policy(model: Loaded<O>, policy: Box<dyn CachePolicy>) -> Self {
        let Shape { layers, heads, .. } = model.shape;
        let shape = CacheShape { layers, heads, rule: policy.rule(), dtype: CacheDType::F32 };
        let pool = PagePool::new(&model.ops, shape, usize::MAX);
        let (prefixes, identity) = (PrefixCache::default(), OnceLock::new());
        Self { model, policy, pool, prefixes, identity, chunk: CHUNK }
    }

    /// The same engine with another limit on the tokens that a sequence takes in one pass.
    pub fn with_chunk(self, chunk: usize) -> Self {
        Self { chunk: chunk.max(1), ..self }
    }

    /// The same engine with an empty pool of at most `pages` pages.
    pub fn with_page_limit(self, pages: usize) -> Self {
        let pool = PagePool::new(&self.model.ops, self.pool.shape(), pages);
        Self { pool, prefixes: PrefixCache::default(), ..self }
    }

    /// The same engine with an empty pool whose slots hold another type of numbers; f32 by default.
    pub fn with_cache_dtype(self, dtype: CacheDType) -> Self {
        let shape = CacheShape { dtype, ..self.pool.shape() };
        let pool = PagePool::new(&self.model.ops, shape, self.pool.limit());
        Self { pool, prefixes: PrefixCache::default(), ..self }
    }

    /// The model.
    pub fn model(&self) -> &Loaded<O> {
        &self.model
    }

    /// The cache policy.
    pub fn policy(&self) -> &dyn CachePolicy {
        &*self.policy
    }

    /// The pool.
    pub fn pool(&self) -> &PagePool<O> {
        &self.pool
    }

    /// An empty sequence.
    pub fn sequence(&self) -> Sequence {
        Sequence { cache: self.pool.sequence() }
    }

    /// A second sequence with the same tokens, for the price of a copy of what can still change. From here on the two know
    /// nothing of each other.
    pub fn fork(&mut self, sequence: &mut Sequence) -> Result<Sequence, EngineError> {
        self.prefixes.make_room(&self.pool, sequence.cache.pages_to_copy());
        Ok(Sequence { cache: self.pool.fork(&self.model.ops, &mut sequence.cache)? })
    }

    /// Beginnings of texts that are kept for requests that begin so.
    pub fn prefixes(&self) -> &PrefixCache {
        &self.prefixes
    }

    /// Keeps a sequence that nobody goes on with, such as one from a file, as the beginning of texts that begin with its
    /// tokens; if beginnings are kept at all, which a [`Batcher`](crate::Batcher) decides.
    ///
    /// # Panics
    /// When these are not as many tokens as the sequence has seen.
    pub fn keep_prefix(&mut self, tokens: &[u32], sequence: Sequence) {
        self.prefixes.keep(Prefix { tokens, compress: true }, sequence.cache);
    }

    /// Gives up all beginnings of texts.
    pub fn clear_prefixes(&mut self) {
        self.prefixes.clear();
    }

    /// Bytes and pages that a sequence holds, those included that it shares with others.
    pub fn usage(&self, sequence: &Sequence) -> Usage {
        self.pool.usage(&self.model.ops, &sequence.cache)
    }

    /// Pages that a sequence holds, those included that it shares with others.
    pub fn pages_held(&self, sequence: &Sequence) -> usize {
        sequence.cache.pages()
    }

    /// Pages that `more` tokens of a sequence can need beyond those that it holds, at most.
    pub fn pages_needed(&self, sequence: &Sequence, more: usize) -> usize {
        sequence.cache.pages_needed(more)
    }

    /// Bytes and pages that the full cache of a sequence of `tokens` holds.
    pub fn dense_usage(&self, tokens: usize) -> Usage {
        self.pool.dense_usage(&self.model.ops, tokens)
    }

    /// Logits `[tokens, V]` of every new token of one sequence, chunk by chunk. On an error it has taken none of them.
    pub fn logits(&mut self, sequence: &mut Sequence, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
        self.admit(&[(sequence, tokens)])?;
        let mut all = Vec::with_capacity(tokens.len() * self.model.shape.vocab);
        for chunk in tokens.chunks(self.chunk) {
            let logits = self.step(&mut [(sequence, chunk)], Want::All);
            all.extend(self.model.ops.to_host(&logits));
        }
        Ok(all)
    }

    /// Logits `[N, V]` of every new token of a ragged batch, in one pass and in the backend's own precision. On an error
    /// no sequence has changed.
    pub fn pass(&mut self, batch: &mut [(&mut Sequence, &[u32])]) -> Result<O::Tensor, EngineError> {
        self.admit(batch)?;
        Ok(self.step(batch, Want::All))
    }

    /// Logits `[S, V]` of the last new token of each sequence of a ragged batch, each with at least one; chunk by chunk.
    /// On an error no sequence has changed.
    pub fn last_logits(&mut self, batch: &mut [(&mut Sequence, &[u32])]) -> Result<Vec<f32>, EngineError> {
        self.admit(batch)?;
        let vocab = self.model.shape.vocab;
        let mut last = vec![0.0; batch.len() * vocab];
        let longest = batch.iter().map(|(_, tokens)| tokens.len()).max().unwrap_or(0);
        for start in (0..longest).step_by(self.chunk) {
            let mut members = Vec::new();
            let mut step: Vec<(&mut Sequence, &[u32])> = Vec::new();
            for (member, (sequence, tokens)) in batch.iter_mut().enumerate() {
                if start < tokens.len() {
                    members.push(member);
                    step.push((sequence, &tokens[start..tokens.len().min(start + self.chunk)]));
                }
            }
            let logits = self.step(&mut step, Want::Last);
            let logits = self.model.ops.to_host(&logits);
            for (member, logits) in members.into_iter().zip(logits.chunks_exact(vocab)) {
                last[member * vocab..][..vocab].copy_from_slice(logits);
            }
        }
        Ok(last)
    }

    /// Says whether the model and the pool can take a batch to its end, even if nothing folds.
    ///
    /// All of it is asked for at the start, since tokens that were folded cannot be taken back. A caller that would
    /// rather try a prompt that fits only once it has folded can hand it over in pieces. Kept beginnings of texts make room.
    fn admit(&mut self, batch: &[(&mut Sequence, &[u32])]) -> Result<(), EngineError> {
        let context = self.model.shape.context;
        for (sequence, tokens) in batch {
            let tokens = sequence.tokens() + tokens.len();
            if tokens > context {
                return Err(EngineError::TooLong { tokens, context });
            }
        }
        let caches = || batch.iter().map(|(sequence, tokens)| (&sequence.cache, tokens.len()));
        let needed = caches().map(|(cache, more)| cache.pages_needed(more)).sum();
        self.prefixes.make_room(&self.pool, needed);
        Ok(self.pool.admit(caches())?)
    }

    /// One pass over a ragged batch that was admitted.
    fn step(&mut self, batch: &mut [(&mut Sequence, &[u32])], want: Want) -> O::Tensor {
        let spans = Spans::of_chunks(batch.iter().map(|(sequence, tokens)| (tokens.len(), sequence.tokens())));
        let ids: Vec<u32> = batch.iter().flat_map(|(_, tokens)| tokens.iter().copied()).collect();
        let caches = batch.iter_mut().map(|(sequence, _)| &mut sequence.cache).collect();
        let mut attend = CachedAttend { policy: &*self.policy, pool: &mut self.pool, caches };
        let Loaded { ops, weights, .. } = &self.model;
        let pass = self.model.pass(&spans);
        let mut x = pass.hidden(weights, &ids, &mut attend);
        if want == Want::Last && spans.rows() > spans.len() {
            let last: Vec<u32> = spans.iter().map(|span| (span.start + span.len - 1) as u32).collect();
            x = ops.embed(&last, &x);
        }
        pass.logits(weights, &x)
    }
}

/// Which rows of a pass are wanted as logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    Last,
    All,
}
