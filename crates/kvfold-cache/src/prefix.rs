//! Beginnings of texts that are kept for texts that begin so.
//!
//! A compressed cache cannot be cut: a slot may hold tokens from before and after any place. So what is kept is the whole
//! cache as it was after some tokens, a snapshot: full pages shared with whoever else holds them, and a copy of the little
//! that can still change. Since a sequence's bytes do not depend on where it was cut into chunks (promise I3), a text that
//! goes on from a snapshot is the same to the last bit as one that was read from its start.
//!
//! Snapshots live in memory that nobody else needs: their pages count against the pool's limit, and the least recently used
//! ones are given up before anything else has to wait.

use crate::pool::PagePool;
use crate::sequence::{Role, SequenceCache};
use kvfold_kernels::CacheOps;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

/// A text's first tokens. Nothing else decides what its cache holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix<'a> {
    /// The tokens.
    pub tokens: &'a [u32],
    /// Whether its cache may be compressed.
    pub compress: bool,
}

/// A kept beginning.
#[derive(Debug)]
struct Entry {
    snapshot: SequenceCache,
    /// Its place in [`PrefixCache::order`].
    used: u64,
}

/// Snapshots by the tokens that they hold.
#[derive(Debug, Default)]
pub struct PrefixCache {
    most: usize,
    /// Without and with compression. In the order of tokens, so that a text's beginnings stand before it.
    entries: [BTreeMap<Arc<[u32]>, Entry>; 2],
    /// Least recently used first.
    order: BTreeMap<u64, (bool, Arc<[u32]>)>,
    clock: u64,
}

impl PrefixCache {
    /// A cache of at most `most` snapshots; 0 keeps none.
    pub fn new(most: usize) -> Self {
        Self { most, ..Self::default() }
    }

    /// Keeps at most `most` snapshots from now on.
    pub fn set_most(&mut self, most: usize) {
        self.most = most;
        while self.len() > most && self.evict(&[]) {}
    }

    /// Snapshots that are kept.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// The longest snapshot that a text begins with.
    pub fn longest(&self, text: Prefix<'_>) -> Option<&SequenceCache> {
        let tokens = self.beginnings(text).next()?;
        self.of(text.compress).get(tokens).map(|entry| &entry.snapshot)
    }

    /// Sequences that go on from snapshots of exactly these tokens; empty ones where there are no tokens. Other snapshots
    /// are given up where memory is short; and where there is none even so, a snapshot becomes the sequence itself. So no
    /// more pages are needed than [`SequenceCache::pages_alone`] of each snapshot, which may belong to no sequence before.
    ///
    /// # Panics
    /// When there is no such snapshot, or less memory than that.
    pub fn begin<O: CacheOps>(
        &mut self,
        ops: &O,
        pool: &mut PagePool<O>,
        prefixes: &[Prefix<'_>],
    ) -> Vec<SequenceCache> {
        prefixes.iter().for_each(|prefix| self.touch(*prefix));
        let one = |n: usize| {
            let prefix = prefixes[n];
            if prefix.tokens.is_empty() {
                return pool.sequence();
            }
            let entry = self.of(prefix.compress).get(prefix.tokens);
            let copies = entry.expect("the snapshot that was found is there").snapshot.pages_to_copy();
            while pool.pages_free() < copies && self.evict(&prefixes[n..]) {}
            let entry = self.entries[usize::from(prefix.compress)].get_mut(prefix.tokens);
            match entry.and_then(|entry| pool.fork(ops, &mut entry.snapshot).ok()) {
                Some(sequence) => sequence,
                None => self.remove(prefix).expect("it is there").with_role(Role::Sequence),
            }
        };
        (0..prefixes.len()).map(one).collect()
    }

    /// Keeps a snapshot of a sequence, whose tokens `prefix` gives, unless the memory that this needs is in use.
    pub fn offer<O: CacheOps>(
        &mut self,
        ops: &O,
        pool: &mut PagePool<O>,
        prefix: Prefix<'_>,
        sequence: &mut SequenceCache,
    ) {
        if self.wants(prefix) {
            self.make_room(pool, sequence.pages_to_copy());
            if let Ok(snapshot) = pool.copy(ops, sequence, Role::Snapshot) {
                self.insert(prefix, snapshot);
            }
        }
    }

    /// Keeps a sequence, whose tokens `prefix` gives, that nobody goes on with: without a copy.
    pub fn keep(&mut self, prefix: Prefix<'_>, sequence: SequenceCache) {
        if self.wants(prefix) {
            self.insert(prefix, sequence.with_role(Role::Snapshot));
        }
    }

    /// Gives up snapshots until so many pages of the pool are free, if sequences have left so many.
    pub fn make_room<O: CacheOps>(&mut self, pool: &PagePool<O>, pages: usize) {
        if pages <= pool.limit() - pool.pages_in_use() {
            while pool.pages_free() < pages && self.evict(&[]) {}
        }
    }

    /// Gives up all snapshots.
    pub fn clear(&mut self) {
        *self = Self { clock: self.clock, ..Self::new(self.most) };
    }

    fn of(&self, compress: bool) -> &BTreeMap<Arc<[u32]>, Entry> {
        &self.entries[usize::from(compress)]
    }

    /// What is kept of a text's beginnings, the longest first.
    fn beginnings<'a>(&'a self, text: Prefix<'a>) -> impl Iterator<Item = &'a Arc<[u32]>> {
        let entries = self.of(text.compress);
        let mut rest = text.tokens;
        std::iter::from_fn(move || {
            loop {
                // All beginnings of `rest` stand at or before it; so if what stands next to it is none, they are beginnings
                // of what the two have in common.
                let at_most = (Bound::Unbounded, Bound::Included(rest));
                let (tokens, _) = entries.range::<[u32], _>(at_most).next_back()?;
                let common = tokens.iter().zip(rest).take_while(|(a, b)| a == b).count();
                if common == tokens.len() {
                    rest = &rest[..common - 1];
                    return Some(tokens);
                }
                rest = &rest[..common];
            }
        })
    }

    /// Whether a snapshot is to be kept: of some tokens, and of which there is none. One that is there was used.
    fn wants(&mut self, prefix: Prefix<'_>) -> bool {
        let known = self.of(prefix.compress).contains_key(prefix.tokens);
        if known {
            self.touch(prefix);
        }
        self.most > 0 && !prefix.tokens.is_empty() && !known
    }

    fn insert(&mut self, prefix: Prefix<'_>, snapshot: SequenceCache) {
        assert_eq!(prefix.tokens.len(), snapshot.tokens(), "a snapshot holds the tokens that it is kept for");
        while self.len() >= self.most && self.evict(&[]) {}
        let tokens: Arc<[u32]> = prefix.tokens.into();
        self.order.insert(self.clock, (prefix.compress, Arc::clone(&tokens)));
        self.entries[usize::from(prefix.compress)].insert(tokens, Entry { snapshot, used: self.clock });
        self.clock += 1;
        self.touch(prefix);
    }

    /// A text was met. Its beginnings count as used after it: more texts have them, and the longer ones share their pages.
    fn touch(&mut self, text: Prefix<'_>) {
        let beginnings: Vec<_> = self.beginnings(text).cloned().collect();
        for tokens in beginnings {
            if let Some(entry) = self.entries[usize::from(text.compress)].get_mut(&tokens) {
                self.order.remove(&entry.used);
                entry.used = self.clock;
                self.order.insert(self.clock, (text.compress, tokens));
                self.clock += 1;
            }
        }
    }

    fn remove(&mut self, prefix: Prefix<'_>) -> Option<SequenceCache> {
        let entry = self.entries[usize::from(prefix.compress)].remove(prefix.tokens)?;
        self.order.remove(&entry.used);
        Some(entry.snapshot)
    }

    /// Gives up the least recently used snapshot but for these; false when there is none.
    fn evict(&mut self, but: &[Prefix<'_>]) -> bool {
        let spared = |(compress, tokens): &&(bool, Arc<[u32]>)| {
            !but.contains(&Prefix { tokens: &tokens[..], compress: *compress })
        };
        let oldest = self.order.values().find(spared).cloned();
        oldest.is_some_and(|(compress, tokens)| self.remove(Prefix { tokens: &tokens, compress }).is_some())
    }
}
