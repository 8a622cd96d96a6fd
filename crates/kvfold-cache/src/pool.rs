//! The page pool: memory that sequences take and give back.

use crate::accounts::{Accounts, lock};
use crate::error::CacheError;
use crate::sequence::{Role, SequenceCache, missing, partial};
use crate::usage::Usage;
use kvfold_kernels::CacheOps;
use kvfold_kernels::ops::Heads;
use kvfold_kernels::paged::{Block, CacheDType, HeadTable, PAGE_SLOTS, Rule, SharedBlock};
use std::sync::{Arc, Mutex};

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
pub(crate) struct Made<A> {
    pub(crate) arena: A,
    blocks: usize,
}

impl<A> Made<A> {
    fn new(arena: A) -> Self {
        Self { arena, blocks: 0 }
    }

    /// A block that nobody holds, after growing by `wanted` when there is none.
    pub(crate) fn take<O: CacheOps<Arena = A>>(&mut self, ops: &O, free: &mut Vec<Block>, wanted: usize) -> Block {
        if free.is_empty() {
            let blocks = ops.grow(&mut self.arena, wanted);
            self.blocks += blocks.len();
            // The last of them is taken next: a head's pages lie in the order of time, as they are read.
            free.extend(blocks.into_iter().rev());
        }
        free.pop().expect("an arena grows when it is asked to")
    }

    /// A block like another.
    fn copy<O: CacheOps<Arena = A>>(&mut self, ops: &O, free: &mut Vec<Block>, from: &Block) -> Block {
        let mut to = self.take(ops, free, 1);
        ops.copy_block(&self.arena, from, &mut to);
        to
    }
}

/// Cache memory for sequences of one model under one rule.
#[derive(Debug)]
pub struct PagePool<O: CacheOps> {
    shape: CacheShape,
    pub(crate) pages: Made<O::Arena>,
    pub(crate) rings: Made<O::Arena>,
    pub(crate) states: Made<O::Arena>,
    limit: usize,
    pub(crate) accounts: Arc<Mutex<Accounts>>,
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
            accounts: Arc::default(),
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
        let layers = (0..layers).map(|_| layer()).collect();
        SequenceCache { rule, layers, accounts: Arc::clone(&self.accounts), role: Role::Sequence }
    }

    /// A second sequence with the tokens of `source`. It shares the pages that are full, which nobody writes any more, and
    /// has copies of the others, of the rings and of the open states; from here on the two know nothing of each other.
    ///
    /// # Panics
    /// When the sequence is not of this pool.
    pub fn fork(&mut self, ops: &O, source: &mut SequenceCache) -> Result<SequenceCache, CacheError> {
        self.copy(ops, source, Role::Sequence)
    }

    /// The same, for somebody else.
    pub(crate) fn copy(
        &mut self,
        ops: &O,
        source: &mut SequenceCache,
        role: Role,
    ) -> Result<SequenceCache, CacheError> {
        self.own(source);
        self.ensure_free(source.pages_to_copy())?;
        let mut copy = self.sequence();
        copy.role = Role::Snapshot;
        let rule = self.rule();
        let mut accounts = lock(&self.accounts);
        let Accounts { pages, rings, states, .. } = &mut *accounts;
        for (from, to) in source.layers.iter_mut().flatten().zip(copy.layers.iter_mut().flatten()) {
            let full = from.closed(rule) / PAGE_SLOTS;
            to.pages.extend(from.pages[..full].iter_mut().map(SharedBlock::share));
            if let Some(last) = partial(from, rule) {
                to.pages.push(SharedBlock::new(self.pages.copy(ops, pages, &from.pages[last])));
            }
            to.ring.extend(from.ring.iter().map(|page| self.rings.copy(ops, rings, page)));
            to.state = from.state.as_ref().map(|state| self.states.copy(ops, states, state));
            (to.slots, to.tokens, to.ahead) = (from.slots, from.tokens, from.ahead);
        }
        drop(accounts);
        Ok(copy.with_role(role))
    }

    /// Panics when a sequence is not of this pool.
    pub(crate) fn own(&self, sequence: &SequenceCache) {
        assert!(Arc::ptr_eq(&self.accounts, &sequence.accounts), "a sequence of another pool");
    }

    /// Says whether so many pages are free.
    pub(crate) fn ensure_free(&self, needed: usize) -> Result<(), CacheError> {
        let available = self.pages_free();
        match needed <= available {
            true => Ok(()),
            false => Err(CacheError::OutOfPages { needed, available, limit: self.limit }),
        }
    }

    /// Says whether the pool can take `more` tokens of each sequence even if nothing folds. While it can, and sequences
    /// take no other tokens, [`PagePool::reserve`] cannot run out.
    pub fn admit<'s>(&self, more: impl IntoIterator<Item = (&'s SequenceCache, usize)>) -> Result<(), CacheError> {
        self.ensure_free(more.into_iter().map(|(sequence, more)| sequence.pages_needed(more)).sum())
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
        self.own(sequence);
        let CacheShape { heads: Heads { dim, .. }, rule, .. } = self.shape;
        let mut left = self.pages_free();
        let accounts = &mut *lock(&self.accounts);
        for table in &mut sequence.layers[layer] {
            let wanted = missing(table, rule, more);
            let (slots, ring) = table.worst_pages(rule, more);
            assert!(wanted <= left, "the pool's {} pages are gone: admit was not asked", self.limit);
            left -= wanted;
            for n in table.pages.len()..slots {
                let page = self.pages.take(ops, &mut accounts.pages, slots - n);
                accounts.enter(&page);
                table.pages.push(SharedBlock::new(page));
            }
            for n in table.ring.len()..ring {
                table.ring.push(self.rings.take(ops, &mut accounts.rings, ring - n));
                accounts.enter_rings(1);
            }
            if table.state.is_none() && rule.state_len(dim) > 0 {
                let mut state = self.states.take(ops, &mut accounts.states, 1);
                // What the state's last owner left in it is never read, but would be written to a file.
                ops.block_from_host(&self.states.arena, &vec![0; ops.block_bytes(&self.states.arena)], &mut state);
                table.state = Some(state);
            }
        }
    }

    /// Takes back the pages of a layer that its heads turned out not to need.
    pub fn trim(&mut self, sequence: &mut SequenceCache, layer: usize) {
        let rule = self.rule();
        let mut accounts = lock(&self.accounts);
        for table in &mut sequence.layers[layer] {
            let used = table.closed(rule).div_ceil(PAGE_SLOTS);
            for page in table.pages.drain(used..) {
                accounts.leave(&page);
                accounts.give_back(page);
            }
        }
    }

    /// Pages that anybody holds, of slots and of rings; one that several hold counts once.
    pub fn pages_held(&self) -> usize {
        let accounts = lock(&self.accounts);
        self.pages.blocks - accounts.pages.len() + self.rings.blocks - accounts.rings.len()
    }

    /// Of these, pages that sequences hold; the others are held by snapshots alone.
    pub fn pages_in_use(&self) -> usize {
        lock(&self.accounts).in_use()
    }

    /// Pages that nobody holds.
    pub fn pages_free(&self) -> usize {
        self.limit - self.pages_held()
    }

    /// Open states that anybody holds.
    pub fn states_held(&self) -> usize {
        self.states.blocks - lock(&self.accounts).states.len()
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

    /// What a sequence holds, in this pool's bytes; pages that it shares with others count for each of them.
    pub fn usage(&self, ops: &O, sequence: &SequenceCache) -> Usage {
        let mut usage = Usage {
            page_bytes: ops.block_bytes(self.pages()),
            ring_page_bytes: ops.block_bytes(self.rings()),
            state_bytes: ops.block_bytes(self.states()),
            ..Usage::default()
        };
        for table in sequence.tables() {
            usage.slot_pages += table.pages.len();
            usage.ring_pages += table.ring.len();
            usage.states += usize::from(table.state.is_some());
        }
        usage
    }
}
