//! A model, a cache policy, and the pool its sequences share.

use crate::attend::{CachedAttend, Member};
use crate::trace::Trace;
use kvfold_cache::{
    CacheError, CachePolicy, CacheShape, Held, PagePool, Prefix, PrefixCache, SequenceCache, Usage, policy_of,
};
use kvfold_kernels::CacheOps;
use kvfold_kernels::ops::Spans;
use kvfold_kernels::paged::CacheDType;
use kvfold_model::block::Pass;
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

/// How a sequence is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kind {
    /// Every token keeps its slots, whatever the model decides.
    pub full: bool,
    /// What the model decides on each token is noted.
    pub trace: bool,
}

/// One sequence's tokens so far, as its cache holds them. Dropping it gives its pages back.
#[derive(Debug)]
pub struct Sequence {
    pub(crate) cache: SequenceCache,
    pub(crate) full: bool,
    trace: Option<Trace>,
}

impl Sequence {
    /// A sequence of a kind. Of tokens that its cache has seen already nothing is noted.
    pub(crate) fn of(cache: SequenceCache, Kind { full, trace }: Kind) -> Self {
        Self { cache, full, trace: trace.then(Trace::default) }
    }

    /// Tokens seen.
    pub fn tokens(&self) -> usize {
        self.cache.tokens()
    }

    /// Slots held by layer and KV head.
    pub fn held(&self) -> Held {
        self.cache.held()
    }

    /// Whether every token keeps its slots, whatever the model decides.
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// What the model decided on each token, if that was to be noted.
    pub fn trace(&self) -> Option<&Trace> {
        self.trace.as_ref()
    }
}

/// Which of a part's tokens are wanted as logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// None: more tokens follow before anything is chosen.
    None,
    /// The last one's.
    Last,
    /// All.
    All,
}

/// A sequence's new tokens in a batch.
#[derive(Debug)]
pub struct Part<'a> {
    /// The sequence.
    pub sequence: &'a mut Sequence,
    /// The tokens, at least one.
    pub tokens: &'a [u32],
    /// Which logits are wanted.
    pub rows: Rows,
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
    /// Tokens that a sequence takes in one pass at most, where the caller said so.
    chunk: Option<usize>,
}

/// Tokens that a sequence takes in one pass where there are many others, or where the logits of all are wanted. Bounds the
/// pages of a layer that a prompt holds before it is known what folds.
const CHUNK: usize = 128;
/// Tokens of a pass that few long sequences share: reading the weights costs little beside multiplying by them, and threads wait
/// for each other seldom.
const ROWS: usize = 2048;

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
        Self { model, policy, pool, prefixes, identity, chunk: None }
    }

    /// The same engine with another limit on the tokens that a sequence takes in one pass.
    pub fn with_chunk(self, chunk: usize) -> Self {
        Self { chunk: Some(chunk.max(1)), ..self }
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
        self.sequence_of(Kind::default())
    }

    /// An empty sequence of a kind.
    pub fn sequence_of(&self, kind: Kind) -> Sequence {
        Sequence::of(self.pool.sequence(), kind)
    }

    /// A second sequence with the same tokens, for the price of a copy of what can still change. From here on the two know
    /// nothing of each other.
    pub fn fork(&mut self, sequence: &mut Sequence) -> Result<Sequence, EngineError> {
        self.prefixes.make_room(&self.pool, sequence.cache.pages_to_copy());
        let cache = self.pool.fork(&self.model.ops, &mut sequence.cache)?;
        Ok(Sequence { cache, full: sequence.full, trace: sequence.trace.clone() })
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
        self.prefixes.keep(Prefix { tokens, compress: !sequence.full }, sequence.cache);
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

    /// The full cache's bytes over those that a sequence holds; 1 for an empty one.
    pub fn physical_ratio(&self, sequence: &Sequence) -> f64 {
        match self.usage(sequence).bytes() {
            0 => 1.0,
            bytes => self.dense_usage(sequence.tokens()).bytes() as f64 / bytes as f64,
        }
    }

    /// Logits `[tokens, V]` of every new token of one sequence, chunk by chunk. On an error it has taken none of them.
    pub fn logits(&mut self, sequence: &mut Sequence, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
        let mut all = Vec::with_capacity(tokens.len() * self.model.shape.vocab);
        self.read(&mut [Part { sequence, tokens, rows: Rows::All }], |_, _, logits| all.extend_from_slice(logits))?;
        Ok(all)
    }

    /// Logits `[N, V]` of every new token of a ragged batch, in one pass and in the backend's own precision. On an error
    /// no sequence has changed.
    pub fn pass(&mut self, batch: &mut [(&mut Sequence, &[u32])]) -> Result<O::Tensor, EngineError> {
        self.admit(batch.iter().map(|(sequence, tokens)| (&**sequence, tokens.len())))?;
        let parts = batch.iter_mut().map(|(sequence, tokens)| (&mut **sequence, *tokens, tokens.len())).collect();
        let (spans, x) = self.step(parts);
        Ok(self.model.pass(&spans).logits(&self.model.weights, &x))
    }

    /// Logits `[S, V]` of the last new token of each sequence of a ragged batch, each with at least one; chunk by chunk.
    /// On an error no sequence has changed.
    pub fn last_logits(&mut self, batch: &mut [(&mut Sequence, &[u32])]) -> Result<Vec<f32>, EngineError> {
        let vocab = self.model.shape.vocab;
        let mut last = vec![0.0; batch.len() * vocab];
        let parts = batch.iter_mut().map(|(sequence, tokens)| Part { sequence, tokens, rows: Rows::Last });
        let mut parts: Vec<Part<'_>> = parts.collect();
        self.read(&mut parts, |member, _, logits| last[member * vocab..][..vocab].copy_from_slice(logits))?;
        Ok(last)
    }

    /// Takes the tokens of a ragged batch, chunk by chunk. `on_logits` is given wanted logits `[rows, V]` as they come: the
    /// part's number in the batch, which of its new tokens the first row is of, the rows. On an error no sequence has changed.
    pub fn read(
        &mut self,
        batch: &mut [Part<'_>],
        mut on_logits: impl FnMut(usize, usize, &[f32]),
    ) -> Result<(), EngineError> {
        self.admit(batch.iter().map(|part| (&*part.sequence, part.tokens.len())))?;
        let vocab = self.model.shape.vocab;
        let longest = batch.iter().map(|part| part.tokens.len()).max().unwrap_or(0);
        let chunk = self.chunk_of(batch);
        for start in (0..longest).step_by(chunk) {
            // What this pass takes, of how many of the last tokens logits are wanted, and whose those are: part, first, how many.
            let (mut step, mut whose) = (Vec::new(), Vec::new());
            for (n, part) in batch.iter_mut().enumerate().filter(|(_, part)| start < part.tokens.len()) {
                let end = part.tokens.len().min(start + chunk);
                let wanted = match part.rows {
                    Rows::All => end - start,
                    Rows::Last if end == part.tokens.len() => 1,
                    Rows::Last | Rows::None => 0,
                };
                if wanted > 0 {
                    whose.push((n, end - wanted, wanted));
                }
                step.push((&mut *part.sequence, &part.tokens[start..end], wanted));
            }
            let (spans, x) = self.step(step);
            if whose.is_empty() {
                continue;
            }
            let Loaded { ops, weights, .. } = &self.model;
            let logits = ops.to_host(&self.model.pass(&spans).logits(weights, &x));
            let mut rest = &logits[..];
            for (n, first, wanted) in whose {
                let (ours, others) = rest.split_at(wanted * vocab);
                on_logits(n, first, ours);
                rest = others;
            }
        }
        Ok(())
    }

    /// Tokens that each sequence of a batch takes in one pass at most.
    fn chunk_of(&self, batch: &[Part<'_>]) -> usize {
        self.chunk.unwrap_or_else(|| {
            let long = batch.iter().filter(|part| part.tokens.len() > CHUNK);
            match batch.iter().any(|part| part.rows == Rows::All) {
                true => CHUNK,
                false => (ROWS / long.count().max(1)).max(CHUNK),
            }
        })
    }

    /// Says whether the model and the pool can take a batch, sequences and numbers of new tokens, to its end, even if nothing
    /// folds.
    ///
    /// All of it is asked for at the start, since tokens that were folded cannot be taken back. A caller that would
    /// rather try a prompt that fits only once it has folded can hand it over in pieces. Kept beginnings of texts make room.
    fn admit<'s>(&mut self, batch: impl Iterator<Item = (&'s Sequence, usize)> + Clone) -> Result<(), EngineError> {
        let context = self.model.shape.context;
        for (sequence, more) in batch.clone() {
            let tokens = sequence.tokens() + more;
            if tokens > context {
                return Err(EngineError::TooLong { tokens, context });
            }
        }
        let needed = batch.clone().map(|(sequence, more)| sequence.cache.pages_needed(more)).sum();
        self.prefixes.make_room(&self.pool, needed);
        Ok(self.pool.admit(batch.map(|(sequence, more)| (&sequence.cache, more)))?)
    }

    /// One pass over a ragged batch that was admitted, each with the number of its last tokens that are wanted: its spans, and what
    /// the last block leaves of those tokens, `[rows, C]`.
    fn step(&mut self, batch: Vec<(&mut Sequence, &[u32], usize)>) -> (Spans, O::Tensor) {
        let spans = Spans::of_chunks(batch.iter().map(|(sequence, tokens, _)| (tokens.len(), sequence.tokens())));
        let ids: Vec<u32> = batch.iter().flat_map(|(_, tokens, _)| tokens.iter().copied()).collect();
        let wanted: Vec<usize> = batch.iter().map(|&(_, _, wanted)| wanted).collect();
        let all = batch.iter().all(|&(_, tokens, wanted)| wanted == tokens.len());
        let members = batch.into_iter().map(|(Sequence { cache, full, trace }, ..)| Member {
            cache,
            full: *full,
            trace: trace.as_mut(),
        });
        let members = members.collect();
        let mut attend = CachedAttend { policy: &*self.policy, pool: &mut self.pool, members };
        let pass = Pass { wanted: (!all).then_some(&wanted[..]), ..self.model.pass(&spans) };
        let x = pass.hidden(&self.model.weights, &ids, &mut attend);
        (spans, x)
    }
}
