//! The page pool and what sequences hold of it.

use crate::error::CacheError;
use crate::usage::{Held, Usage};
use kvfold_kernels::CacheOps;
use kvfold_kernels::ops::Heads;
use kvfold_kernels::paged::{Block, HeadTable, PAGE_SLOTS, Rule};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Blocks that nobody holds.
#[derive(Debug, Default)]
struct Free {
    pages: Vec<Block>,
    states: Vec<Block>,
}

fn lock(free: &Mutex<Free>) -> MutexGuard<'_, Free> {
    // Blocks are moved one list at a time, so a panic elsewhere cannot leave a list half-changed.
    free.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Cache memory for sequences of one model under one rule.
#[derive(Debug)]
pub struct PagePool<O: CacheOps> {
    rule: Rule,
    layers: usize,
    heads: Heads,
    pages: O::Arena,
    states: O::Arena,
    made: (usize, usize),
    limit: usize,
    free: Arc<Mutex<Free>>,
}

impl<O: CacheOps> PagePool<O> {
    /// A pool that grows with demand up to `limit` pages.
    pub fn new(ops: &O, (layers, heads): (usize, Heads), rule: Rule, limit: usize) -> Self {
        Self {
            rule,
            layers,
            heads,
            pages: ops.arena(rule.page_len(heads.dim)),
            states: ops.arena(rule.state_len(heads.dim)),
            made: (0, 0),
            limit,
            free: Arc::default(),
        }
    }

    /// What becomes of a token in this pool.
    pub fn rule(&self) -> Rule {
        self.rule
    }

    /// Memory of pages, for the kernel.
    pub fn pages(&self) -> &O::Arena {
        &self.pages
    }

    /// Memory of open states, for the kernel.
    pub fn states(&self) -> &O::Arena {
        &self.states
    }

    /// An empty cache for one sequence.
    pub fn sequence(&self) -> SequenceCache {
        let layer = || (0..self.heads.kv).map(|_| HeadTable::default()).collect();
        SequenceCache {
            rule: self.rule,
            layers: (0..self.layers).map(|_| layer()).collect(),
            free: Arc::clone(&self.free),
        }
    }

    /// Says whether the pool can take `more` tokens of each sequence even if nothing folds. While it can, and sequences
    /// take no other tokens, [`PagePool::reserve`] cannot run out.
    pub fn admit<'s>(&self, more: impl IntoIterator<Item = (&'s SequenceCache, usize)>) -> Result<(), CacheError> {
        let needed = more
            .into_iter()
            .flat_map(|(sequence, more)| sequence.layers.iter().flatten().map(move |table| (table, more)))
            .map(|(table, more)| {
                let (slots, ring) = table.worst_pages(self.rule, more);
                slots.saturating_sub(table.pages.len()) + ring.saturating_sub(table.ring.len())
            })
            .sum();
        let available = self.limit - self.pages_held();
        if needed > available {
            return Err(CacheError::OutOfPages { needed, available, limit: self.limit });
        }
        Ok(())
    }

    /// Gives a layer of a sequence the pages that `more` tokens can need at most.
    ///
    /// # Panics
    /// When the pool runs out, which [`PagePool::admit`] rules out, or when the sequence is not of this pool.
    pub fn reserve(&mut self, ops: &O, sequence: &mut SequenceCache, (layer, more): (usize, usize)) {
        assert!(Arc::ptr_eq(&self.free, &sequence.free), "a sequence of another pool");
        let mut free = lock(&self.free);
        for table in &mut sequence.layers[layer] {
            let (slots, ring) = table.worst_pages(self.rule, more);
            for (pages, wanted) in [(&mut table.pages, slots), (&mut table.ring, ring)] {
                while pages.len() < wanted {
                    if free.pages.is_empty() {
                        assert!(
                            self.made.0 < self.limit,
                            "the pool's {} pages are gone: admit was not asked",
                            self.limit
                        );
                        let blocks = ops.grow(&mut self.pages, wanted - pages.len());
                        self.made.0 += blocks.len();
                        free.pages.extend(blocks);
                    }
                    pages.extend(free.pages.pop());
                }
            }
            if table.state.is_none() && self.rule.state_len(self.heads.dim) > 0 {
                if free.states.is_empty() {
                    let blocks = ops.grow(&mut self.states, 1);
                    self.made.1 += blocks.len();
                    free.states.extend(blocks);
                }
                table.state = free.states.pop();
            }
        }
    }

    /// Takes back the pages of a layer that its heads turned out not to need.
    pub fn trim(&mut self, sequence: &mut SequenceCache, layer: usize) {
        let mut free = lock(&self.free);
        for table in &mut sequence.layers[layer] {
            let used = table.slots.div_ceil(PAGE_SLOTS);
            free.pages.extend(table.pages.drain(used..));
        }
    }

    /// Pages that sequences hold.
    pub fn pages_held(&self) -> usize {
        self.made.0 - lock(&self.free).pages.len()
    }

    /// Open states that sequences hold.
    pub fn states_held(&self) -> usize {
        self.made.1 - lock(&self.free).states.len()
    }

    /// What the full cache of a sequence of `tokens` holds: every token a slot, in whole pages of this pool's elements.
    pub fn dense_usage(&self, ops: &O, tokens: usize) -> Usage {
        let element = ops.block_bytes(&self.pages) / self.rule.page_len(self.heads.dim);
        Usage {
            slot_pages: self.layers * self.heads.kv * tokens.div_ceil(PAGE_SLOTS),
            page_bytes: Rule::Keep.page_len(self.heads.dim) * element,
            ..Usage::default()
        }
    }

    /// What a sequence holds, in this pool's bytes.
    pub fn usage(&self, ops: &O, sequence: &SequenceCache) -> Usage {
        let mut usage = Usage {
            page_bytes: ops.block_bytes(&self.pages),
            state_bytes: ops.block_bytes(&self.states),
            ..Usage::default()
        };
        for table in sequence.layers.iter().flatten() {
            usage.slot_pages += table.pages.len();
            usage.ring_pages += table.ring.len();
            usage.states += usize::from(table.state.is_some());
        }
        usage
    }
}

/// The cache of one sequence. Dropping it gives its pages and states back to the pool.
#[derive(Debug)]
pub struct SequenceCache {
    rule: Rule,
    layers: Vec<Vec<HeadTable>>,
    free: Arc<Mutex<Free>>,
}

impl SequenceCache {
    /// Tokens seen.
    pub fn tokens(&self) -> usize {
        self.layers.first().and_then(|heads| heads.first()).map_or(0, |head| head.tokens)
    }

    /// The heads of a layer, for the kernel.
    pub fn layer_mut(&mut self, layer: usize) -> &mut [HeadTable] {
        &mut self.layers[layer]
    }

    /// Slots held by layer and KV head.
    pub fn held(&self) -> Held {
        let slots = self.layers.iter().map(|heads| heads.iter().map(|head| head.held(self.rule)).collect());
        Held { tokens: self.tokens(), slots: slots.collect() }
    }
}

impl Drop for SequenceCache {
    fn drop(&mut self) {
        let mut free = lock(&self.free);
        for mut table in self.layers.drain(..).flatten() {
            free.pages.append(&mut table.pages);
            free.pages.append(&mut table.ring);
            free.states.extend(table.state.take());
        }
    }
}
