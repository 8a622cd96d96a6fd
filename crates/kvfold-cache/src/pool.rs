//! The page pool and what sequences hold of it.

use crate::error::CacheError;
use crate::usage::{Held, Usage};
use kvfold_kernels::CacheOps;
use kvfold_kernels::ops::Heads;
use kvfold_kernels::paged::{Block, CacheDType, HeadTable, PAGE_SLOTS, Rule};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Blocks that nobody holds.
#[derive(Debug, Default)]
struct Free {
    pages: Vec<Block>,
    rings: Vec<Block>,
    states: Vec<Block>,
}

fn lock(free: &Mutex<Free>) -> MutexGuard<'_, Free> {
    // Blocks are moved one list at a time, so a panic elsewhere cannot leave a list half-changed.
    free.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a pool's memory is for.
#[derive(Clone, Copy, Debug)]
pub struct CacheShape {
    /// Layers of the model.
    pub layers: usize,
    /// Its heads.
    pub heads: Heads,
    /// What becomes of a token.
    pub rule: Rule,
    /// Type of keys and values in slots.
    pub dtype: CacheDType,
}

/// Memory of one kind and how much of it was made.
#[derive(Debug)]
struct Made<A> {
    arena: A,
    blocks: usize,
}

impl<A> Made<A> {
    fn new(arena: A) -> Self {
        Self { arena, blocks: 0 }
    }

    /// A block that nobody holds, after growing by `wanted` when there is none.
    fn take<O: CacheOps<Arena = A>>(&mut self, ops: &O, free: &mut Vec<Block>, wanted: usize) -> Option<Block> {
        if free.is_empty() {
            let blocks = ops.grow(&mut self.arena, wanted);
            self.blocks += blocks.len();
            free.extend(blocks);
        }
        free.pop()
    }
}

/// Cache memory for sequences of one model under one rule.
#[derive(Debug)]
pub struct PagePool<O: CacheOps> {
    shape: CacheShape,
    pages: Made<O::Arena>,
    rings: Made<O::Arena>,
    states: Made<O::Arena>,
    limit: usize,
    free: Arc<Mutex<Free>>,
}

impl<O: CacheOps> PagePool<O> {
    /// A pool that grows with demand up to `limit` pages, of slots and of rings together.
    pub fn new(ops: &O, shape: CacheShape, limit: usize) -> Self {
        let CacheShape { heads: Heads { dim, .. }, rule, dtype, .. } = shape;
        Self {
            shape,
            pages: Made::new(ops.page_arena(rule.page(dim, dtype))),
            rings: Made::new(ops.page_arena(rule.ring_page(dim, dtype))),
            states: Made::new(ops.state_arena(rule.state_len(dim))),
            limit,
            free: Arc::default(),
        }
    }

    /// What becomes of a token in this pool.
    pub fn rule(&self) -> Rule {
        self.shape.rule
    }

    /// Type of keys and values in this pool's slots.
    pub fn dtype(&self) -> CacheDType {
        self.shape.dtype
    }

    /// What this pool's memory is for.
    pub fn shape(&self) -> CacheShape {
        self.shape
    }

    /// Pages that this pool has at most.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Memory of pages of slots, for the kernel.
    pub fn pages(&self) -> &O::Arena {
        &self.pages.arena
    }

    /// Memory of pages of rings, for the kernel.
    pub fn rings(&self) -> &O::Arena {
        &self.rings.arena
    }

    /// Memory of open states, for the kernel.
    pub fn states(&self) -> &O::Arena {
        &self.states.arena
    }

    /// An empty cache for one sequence.
    pub fn sequence(&self) -> SequenceCache {
        let CacheShape { layers, heads, rule, .. } = self.shape;
        let layer = || (0..heads.kv).map(|_| HeadTable::default()).collect();
        SequenceCache { rule, layers: (0..layers).map(|_| layer()).collect(), free: Arc::clone(&self.free) }
    }

    /// Says whether the pool can take `more` tokens of each sequence even if nothing folds. While it can, and sequences
    /// take no other tokens, [`PagePool::reserve`] cannot run out.
    pub fn admit<'s>(&self, more: impl IntoIterator<Item = (&'s SequenceCache, usize)>) -> Result<(), CacheError> {
        let needed = more.into_iter().map(|(sequence, more)| sequence.pages_needed(more)).sum();
        let available = self.limit - self.pages_held();
        if needed > available {
            return Err(CacheError::OutOfPages { needed, available, limit: self.limit });
        }
        Ok(())
    }

    /// Pages that a sequence of `tokens` tokens holds if nothing folds.
    pub fn worst_pages(&self, tokens: usize) -> usize {
        let (slots, ring) = HeadTable::default().worst_pages(self.rule(), tokens);
        (slots + ring) * self.shape.layers * self.shape.heads.kv
    }

    /// Gives a layer of a sequence the pages that `more` tokens can need at most.
    ///
    /// # Panics
    /// When the pool runs out, which [`PagePool::admit`] rules out, or when the sequence is not of this pool.
    pub fn reserve(&mut self, ops: &O, sequence: &mut SequenceCache, (layer, more): (usize, usize)) {
        assert!(Arc::ptr_eq(&self.free, &sequence.free), "a sequence of another pool");
        let CacheShape { heads: Heads { dim, .. }, rule, .. } = self.shape;
        let mut left = self.limit - self.pages_held();
        let Free { pages, rings, states } = &mut *lock(&self.free);
        for table in &mut sequence.layers[layer] {
            let wanted = missing(table, rule, more);
            let (slots, ring) = table.worst_pages(rule, more);
            assert!(wanted <= left, "the pool's {} pages are gone: admit was not asked", self.limit);
            left -= wanted;
            for n in table.pages.len()..slots {
                table.pages.extend(self.pages.take(ops, pages, slots - n));
            }
            for n in table.ring.len()..ring {
                table.ring.extend(self.rings.take(ops, rings, ring - n));
            }
            if table.state.is_none() && rule.state_len(dim) > 0 {
                table.state = self.states.take(ops, states, 1);
            }
        }
    }

    /// Takes back the pages of a layer that its heads turned out not to need.
    pub fn trim(&mut self, sequence: &mut SequenceCache, layer: usize) {
        let rule = self.rule();
        let mut free = lock(&self.free);
        for table in &mut sequence.layers[layer] {
            let used = table.closed(rule).div_ceil(PAGE_SLOTS);
            free.pages.extend(table.pages.drain(used..));
        }
    }

    /// Pages that sequences hold, of slots and of rings.
    pub fn pages_held(&self) -> usize {
        let free = lock(&self.free);
        self.pages.blocks - free.pages.len() + self.rings.blocks - free.rings.len()
    }

    /// Open states that sequences hold.
    pub fn states_held(&self) -> usize {
        self.states.blocks - lock(&self.free).states.len()
    }

    /// What the full cache of a sequence of `tokens` holds: every token a slot, in whole pages of this pool's type.
    pub fn dense_usage(&self, ops: &O, tokens: usize) -> Usage {
        let CacheShape { layers, heads, dtype, .. } = self.shape;
        Usage {
            slot_pages: layers * heads.kv * tokens.div_ceil(PAGE_SLOTS),
            page_bytes: ops.block_bytes(&ops.page_arena(Rule::Keep.page(heads.dim, dtype))),
            ..Usage::default()
        }
    }

    /// What a sequence holds, in this pool's bytes.
    pub fn usage(&self, ops: &O, sequence: &SequenceCache) -> Usage {
        let mut usage = Usage {
            page_bytes: ops.block_bytes(self.pages()),
            ring_page_bytes: ops.block_bytes(self.rings()),
            state_bytes: ops.block_bytes(self.states()),
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

/// Pages that `more` tokens of a head can need beyond those that it holds, at most.
fn missing(table: &HeadTable, rule: Rule, more: usize) -> usize {
    let (slots, ring) = table.worst_pages(rule, more);
    slots.saturating_sub(table.pages.len()) + ring.saturating_sub(table.ring.len())
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

    /// Pages of slots and of the ring that it holds.
    pub fn pages(&self) -> usize {
        self.layers.iter().flatten().map(|table| table.pages.len() + table.ring.len()).sum()
    }

    /// Pages that `more` tokens can need beyond those that it holds, at most.
    pub fn pages_needed(&self, more: usize) -> usize {
        self.layers.iter().flatten().map(|table| missing(table, self.rule, more)).sum()
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
            free.rings.append(&mut table.ring);
            free.states.extend(table.state.take());
        }
    }
}
