//! A sequence's cache outside of any pool, to be kept in a file.

use crate::accounts::lock;
use crate::error::CacheError;
use crate::pool::PagePool;
use crate::sequence::SequenceCache;
use kvfold_kernels::CacheOps;
use kvfold_kernels::paged::{HeadTable, PAGE_SLOTS, SharedBlock};

/// What a sequence held. Heads are in the order of layers and KV heads; blocks are bytes as they lie in the backend's memory,
/// those of a head after one another, with zeros where no slot is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StoredCache {
    /// Tokens seen.
    pub tokens: usize,
    /// Slots of each head, the open one included and the ring's not.
    pub slots: Vec<usize>,
    /// What each head's newest token adds to the logit of the next.
    pub ahead: Vec<f64>,
    /// Pages of closed slots.
    pub pages: Vec<u8>,
    /// Pages of the rings.
    pub rings: Vec<u8>,
    /// Open states.
    pub states: Vec<u8>,
}

impl<O: CacheOps> PagePool<O> {
    /// What a sequence holds.
    ///
    /// # Panics
    /// When the sequence is not of this pool.
    pub fn store(&self, ops: &O, sequence: &SequenceCache) -> StoredCache {
        self.own(sequence);
        let (rule, dim, dtype) = (self.rule(), self.shape().heads.dim, self.dtype());
        let mut stored = StoredCache { tokens: sequence.tokens(), ..StoredCache::default() };
        for table in sequence.tables() {
            stored.slots.push(table.slots);
            stored.ahead.push(table.ahead);
            let used = |n: usize, of: usize| PAGE_SLOTS.min(of - n * PAGE_SLOTS);
            for (n, page) in table.pages.iter().enumerate() {
                let used = used(n, table.closed(rule));
                stored.pages.extend(ops.page_to_host(self.pages(), page, rule.page(dim, dtype), used));
            }
            for (n, page) in table.ring.iter().enumerate() {
                let used = used(n, table.exact(rule));
                stored.rings.extend(ops.page_to_host(self.rings(), page, rule.ring_page(dim, dtype), used));
            }
            if let Some(state) = &table.state {
                stored.states.extend(ops.block_to_host(self.states(), state));
            }
        }
        stored
    }

    /// A sequence as it was stored. An error if what is stored fits no sequence of this pool, or the pool has no room for it.
    pub fn restore(&mut self, ops: &O, stored: &StoredCache) -> Result<SequenceCache, CacheError> {
        let needed = self.check(ops, stored)?;
        self.ensure_free(needed)?;
        let rule = self.rule();
        let mut pages = stored.pages.chunks_exact(ops.block_bytes(self.pages()));
        let mut rings = stored.rings.chunks_exact(ops.block_bytes(self.rings()));
        // A rule without an open slot has states of no bytes.
        let mut states = stored.states.chunks_exact(ops.block_bytes(self.states()).max(1));
        let mut sequence = self.sequence();
        let accounts = &mut *lock(&self.accounts);
        let heads = stored.slots.iter().zip(&stored.ahead);
        for (table, (&slots, &ahead)) in sequence.layers.iter_mut().flatten().zip(heads) {
            *table = HeadTable { slots, ahead, tokens: stored.tokens, ..HeadTable::default() };
            for bytes in pages.by_ref().take(table.closed(rule).div_ceil(PAGE_SLOTS)) {
                let mut page = self.pages.take(ops, &mut accounts.pages, 1);
                ops.block_from_host(&self.pages.arena, bytes, &mut page);
                accounts.enter(&page);
                table.pages.push(SharedBlock::new(page));
            }
            for bytes in rings.by_ref().take(table.exact(rule).div_ceil(PAGE_SLOTS)) {
                let mut page = self.rings.take(ops, &mut accounts.rings, 1);
                ops.block_from_host(&self.rings.arena, bytes, &mut page);
                accounts.enter_rings(1);
                table.ring.push(page);
            }
            if let Some(bytes) = states.next() {
                let mut state = self.states.take(ops, &mut accounts.states, 1);
                ops.block_from_host(&self.states.arena, bytes, &mut state);
                table.state = Some(state);
            }
        }
        Ok(sequence)
    }

    /// The pages that a stored sequence takes, if it could be one of this pool.
    pub fn check(&self, ops: &O, stored: &StoredCache) -> Result<usize, CacheError> {
        let (rule, shape) = (self.rule(), self.shape());
        let heads = shape.layers * shape.heads.kv;
        let must = |holds: bool, field: &'static str, found: String, expected: String| match holds {
            true => Ok(()),
            false => Err(CacheError::Stored { field, found, expected }),
        };
        let count = |field, found: usize, expected: usize| {
            must(found == expected, field, found.to_string(), format!("{expected}, one per head"))
        };
        count("slots", stored.slots.len(), heads)?;
        count("ahead", stored.ahead.len(), heads)?;
        let exact = stored.tokens.min(rule.delay());
        let gone = stored.tokens - exact;
        // The first token, and those that follow sinks, have slots of their own; so has every one when nothing is decided.
        let fewest = if rule.state_len(shape.heads.dim) > 0 { gone.min(rule.sinks().saturating_add(1)) } else { gone };
        for &slots in &stored.slots {
            let expected = format!("{fewest} to {gone} slots for {} tokens", stored.tokens);
            must((fewest..=gone).contains(&slots), "slots", slots.to_string(), expected)?;
        }
        let pages = |slots: usize| HeadTable { slots, ..HeadTable::default() }.closed(rule).div_ceil(PAGE_SLOTS);
        let slot_pages: usize = stored.slots.iter().map(|&slots| pages(slots)).sum();
        let ring_pages = heads * exact.div_ceil(PAGE_SLOTS);
        let states = heads * usize::from(stored.tokens > 0);
        let blocks = [
            ("pages", &stored.pages, slot_pages, ops.block_bytes(self.pages())),
            ("rings", &stored.rings, ring_pages, ops.block_bytes(self.rings())),
            ("states", &stored.states, states, ops.block_bytes(self.states())),
        ];
        for (field, found, blocks, size) in blocks {
            let expected = format!("{blocks} blocks of {size} bytes");
            must(Some(found.len()) == blocks.checked_mul(size), field, format!("{} bytes", found.len()), expected)?;
        }
        Ok(slot_pages + ring_pages)
    }
}
