//! Requests that begin where others have been, or where they themselves were before they were sent back.

use super::{Active, Batcher};
use crate::engine::{Engine, Sequence};
use crate::scheduler::Id;
use kvfold_cache::{Prefix, PrefixCache, SequenceCache};
use kvfold_kernels::CacheOps;

/// How a batcher keeps beginnings of texts. They live in pages that nobody else needs at the time, and in
/// [`Engine::prefixes`], which outlives the batcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefixSettings {
    /// A prompt is kept at multiples of so many tokens, at its end, and at the end of its answer. Shorter texts are not kept.
    /// No step takes a prompt past such a place, so fewer than an engine takes in a pass make prefill slower.
    pub every: usize,
    /// Beginnings that are kept at most. Their open states do not count against the pool's limit of pages: who has so many bytes
    /// sets those of `most` states aside.
    pub most: usize,
}

impl Default for PrefixSettings {
    fn default() -> Self {
        Self { every: 128, most: 256 }
    }
}

/// What came of looking for beginnings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixStats {
    /// Tokens of prompts that were looked for.
    pub queried: u64,
    /// Of these, tokens that were found and not computed.
    pub hit: u64,
}

impl Active {
    /// Its first tokens.
    pub(super) fn prefix(&self, tokens: usize) -> Prefix<'_> {
        Prefix { tokens: &self.tokens[..tokens], compress: !self.kind.full }
    }

    /// What it could begin with, if it does not run: all of its tokens but the last, whose logits are wanted.
    pub(super) fn beginning<'a>(&self, prefixes: &'a PrefixCache) -> Option<&'a SequenceCache> {
        let waits = self.reuse && self.sequence.is_none();
        waits.then(|| prefixes.longest(self.prefix(self.tokens.len() - 1))).flatten()
    }

    /// Tokens that will be kept when this one, which has read `read` of its own, has read them, and that another could begin
    /// with; 0 if there will be none.
    pub(super) fn will_keep(&self, read: usize, other: &Active, every: usize) -> usize {
        if read >= self.prompt || self.kind.full != other.kind.full {
            return 0;
        }
        let (ours, theirs) = (&self.tokens[..self.prompt], &other.tokens[..other.tokens.len() - 1]);
        let common = ours.iter().zip(theirs).take_while(|(a, b)| a == b).count();
        let kept = if common == self.prompt { common } else { common - common % every };
        if kept >= every && kept > read { kept } else { 0 }
    }
}

impl<O: CacheOps> Batcher<'_, O> {
    /// The same batcher, keeping beginnings of texts for requests that begin so. To be said before the first request.
    pub fn with_prefixes(mut self, settings: PrefixSettings) -> Self {
        self.engine.prefixes.set_most(settings.most);
        self.scheduler.stop_at_multiples_of(settings.every);
        self.every = Some(settings.every);
        self
    }

    /// The engine, to save, load or keep sequences between steps.
    pub fn engine_mut(&mut self) -> &mut Engine<O> {
        self.engine
    }

    /// What came of looking for beginnings so far.
    pub fn prefix_stats(&self) -> PrefixStats {
        self.prefix_stats
    }

    /// Gives requests that were admitted what they begin with.
    pub(super) fn begin(&mut self, admitted: &[Id]) {
        let Engine { model, pool, prefixes, .. } = &mut *self.engine;
        let start = |id| {
            let active: &Active = &self.active[id];
            active.prefix(active.beginning(prefixes).map_or(0, SequenceCache::tokens))
        };
        let starts: Vec<Prefix<'_>> = admitted.iter().map(start).collect();
        let caches = prefixes.begin(&model.ops, pool, &starts);
        for (id, cache) in admitted.iter().zip(caches) {
            let active = self.active.get_mut(id).expect("the scheduler knows of live requests alone");
            if active.reuse && active.cached.is_none() {
                self.prefix_stats.queried += active.prompt as u64;
                self.prefix_stats.hit += cache.tokens() as u64;
                active.cached = Some(cache.tokens());
            }
            active.sequence = Some(Sequence::of(cache, active.kind));
        }
    }

    /// Takes its cache from a request, and keeps it for when the request begins again, or another one does that begins so.
    pub(super) fn send_back(&mut self, id: Id) {
        let Some(sequence) = self.request(id).sequence.take() else { return };
        if self.every.is_some() {
            self.engine.prefixes.keep(self.active[&id].prefix(sequence.tokens()), sequence.cache);
        }
    }

    /// Keeps what a request has read, if that is worth it: at a place where its prompt is kept, or when it has ended.
    pub(super) fn offer(&mut self, id: Id, ended: bool) {
        let Self { engine, active, every: Some(every), .. } = self else { return };
        let Some(active) = active.get_mut(&id) else { return };
        let Some(mut sequence) = active.sequence.take() else { return };
        let tokens = sequence.tokens();
        let stop = tokens.is_multiple_of(*every) && tokens < active.prompt || tokens == active.prompt;
        if tokens >= *every && (ended || stop) {
            let Engine { model, pool, prefixes, .. } = &mut **engine;
            prefixes.offer(&model.ops, pool, active.prefix(tokens), &mut sequence.cache);
        }
        active.sequence = Some(sequence);
    }
}
