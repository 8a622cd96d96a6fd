//! Memory cut into blocks of one size, and the handles that own or share them.

use crate::aligned::{Aligned, HUGE_PAGE};
use crate::real::Real;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Blocks that are allocated together, a power of two: as many as fill a huge page, within limits.
fn slab_blocks(block_bytes: usize) -> usize {
    (HUGE_PAGE / block_bytes.max(1)).clamp(64, 1024).next_power_of_two()
}

/// The right to read and write one block of one arena. It cannot be copied, so whoever can write a block is alone with it.
#[derive(Debug, PartialEq, Eq)]
pub struct Block {
    arena: u64,
    index: usize,
}

impl Block {
    /// Which of its arena's blocks it is, from 0.
    pub fn index(&self) -> usize {
        self.index
    }
}

/// A block that has one holder, who may write it, or several, who read it.
///
/// It gives a shared borrow of its [`Block`] at any time and an exclusive one only while nobody else holds the block. The
/// block itself comes out again when its last holder gives it up.
#[derive(Debug)]
pub struct SharedBlock {
    block: Block,
    /// Counts the holders, once there was more than one.
    holders: Option<Arc<()>>,
}

impl SharedBlock {
    /// A block with one holder.
    pub fn new(block: Block) -> Self {
        Self { block, holders: None }
    }

    /// One more holder of the same block; from now on nobody writes it until all but one have given it up.
    pub fn share(&mut self) -> Self {
        let holders = self.holders.get_or_insert_default();
        let Block { arena, index } = self.block;
        Self { block: Block { arena, index }, holders: Some(Arc::clone(holders)) }
    }

    /// Whether others hold the block, too.
    pub fn is_shared(&self) -> bool {
        self.holders.as_ref().is_some_and(|holders| Arc::strong_count(holders) > 1)
    }

    /// The block for writing; `None` while others hold it.
    #[inline(always)]
    pub fn get_mut(&mut self) -> Option<&mut Block> {
        match &mut self.holders {
            None => Some(&mut self.block),
            Some(holders) => Arc::get_mut(holders).map(|()| &mut self.block),
        }
    }

    /// Gives it up: the block, if nobody else holds it.
    pub fn into_block(self) -> Option<Block> {
        match self.holders {
            None => Some(self.block),
            Some(holders) => Arc::into_inner(holders).map(|()| self.block),
        }
    }
}

impl Deref for SharedBlock {
    type Target = Block;

    #[inline(always)]
    fn deref(&self) -> &Block {
        &self.block
    }
}

/// Memory in blocks of `block_len` elements.
///
/// Many threads may work on one arena at once, each on blocks that it owns: a shared reference to the arena and an
/// exclusive one to the handle give exclusive access to the block.
#[derive(Debug)]
pub struct Arena<F> {
    id: u64,
    block_len: usize,
    slabs: Vec<Slab<F>>,
    /// Blocks of a slab.
    slab_blocks: usize,
}

/// Memory of some blocks.
struct Slab<F> {
    /// Where its elements are. Nothing reaches them through `_memory` while the slab lives.
    first: *mut F,
    _memory: Aligned<F>,
}

// By hand, since a derived one would read the elements, which other threads may write.
impl<F> std::fmt::Debug for Slab<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Slab").field(&self.first).finish()
    }
}

impl<F: Real> Slab<F> {
    fn new(len: usize) -> Self {
        let mut memory = Aligned::new(len);
        Self { first: memory.as_mut_ptr(), _memory: memory }
    }
}

// SAFETY: elements are reached through `slice` and `slice_mut` only, which borrow a handle of the block as shared or
// exclusive. A block has more than one handle in `SharedBlock`s alone; those give an exclusive borrow only to the last of
// them, whose count says that the others are gone, reads and all. So two threads never touch a block that one of them
// writes.
unsafe impl<F: Send + Sync> Sync for Arena<F> {}
// SAFETY: a slab owns the memory that it points to.
unsafe impl<F: Send> Send for Arena<F> {}

impl<F: Real> Arena<F> {
    /// An arena without blocks.
    pub fn new(block_len: usize) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let slab_blocks = slab_blocks(block_len * size_of::<F>());
        Self { id: NEXT.fetch_add(1, Ordering::Relaxed), block_len, slabs: Vec::new(), slab_blocks }
    }

    /// Makes at least `wanted` more blocks, filled with zeros, and returns their handles.
    pub fn grow(&mut self, wanted: usize) -> Vec<Block> {
        let first = self.blocks();
        let slab = self.slab_blocks * self.block_len;
        self.slabs.extend((0..wanted.div_ceil(self.slab_blocks)).map(|_| Slab::new(slab)));
        (first..self.blocks()).map(|index| Block { arena: self.id, index }).collect()
    }

    /// Elements of a block.
    pub fn block_len(&self) -> usize {
        self.block_len
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> usize {
        self.block_len * size_of::<F>()
    }

    /// Blocks made so far.
    pub fn blocks(&self) -> usize {
        self.slabs.len() * self.slab_blocks
    }

    /// Where a block begins.
    #[inline(always)]
    fn at(&self, block: &Block) -> *mut F {
        assert_eq!(block.arena, self.id, "a block of another arena");
        // A power of two: a shift and a mask.
        let shift = self.slab_blocks.trailing_zeros();
        let slab = &self.slabs[block.index >> shift];
        slab.first.wrapping_add((block.index & (self.slab_blocks - 1)) * self.block_len)
    }

    /// A block's elements.
    #[inline]
    pub fn slice<'a>(&'a self, block: &'a Block) -> &'a [F] {
        // SAFETY: a slab has room for all of its blocks, and handles are made for those alone. While the result lives, the
        // shared borrow of this handle rules out an exclusive one of it, and `SharedBlock` one of another.
        unsafe { std::slice::from_raw_parts(self.at(block), self.block_len) }
    }

    /// A block's elements for writing.
    #[inline]
    #[allow(clippy::mut_from_ref)] // exclusive through the handle
    pub fn slice_mut<'a>(&'a self, block: &'a mut Block) -> &'a mut [F] {
        // SAFETY: as in `slice`; an exclusive borrow is given of the only handle alone, so it rules out every other access
        // while the result lives.
        unsafe { std::slice::from_raw_parts_mut(self.at(block), self.block_len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aligned::CACHE_LINE;

    #[test]
    fn blocks_are_disjoint_and_zeroed() {
        let mut arena = Arena::<f32>::new(3);
        let mut blocks = arena.grow(1);
        let slab = blocks.len();
        blocks.extend(arena.grow(slab + 1));
        assert_eq!((blocks.len(), arena.blocks()), (3 * slab, 3 * slab));
        for (i, block) in blocks.iter_mut().enumerate() {
            assert_eq!(arena.slice(block), [0.0; 3]);
            arena.slice_mut(block).fill(i as f32);
        }
        for (i, block) in blocks.iter().enumerate() {
            assert_eq!(arena.slice(block), [i as f32; 3]);
        }
    }

    #[test]
    fn pages_begin_at_cache_lines() {
        let mut arena = Arena::<f32>::new(48);
        let more_than_a_slab = arena.slab_blocks + 1;
        for block in arena.grow(more_than_a_slab) {
            assert_eq!(arena.slice(&block).as_ptr() as usize % CACHE_LINE, 0);
        }
    }

    #[test]
    fn a_shared_block_is_written_by_nobody_and_comes_out_once() {
        let mut arena = Arena::<f32>::new(3);
        let mut first = SharedBlock::new(arena.grow(1).remove(0));
        arena.slice_mut(first.get_mut().expect("one holder")).fill(7.0);
        let (mut second, third) = (first.share(), first.share());
        assert!(first.is_shared() && first.get_mut().is_none() && second.get_mut().is_none());
        assert_eq!((arena.slice(&first), arena.slice(&third)), (&[7.0; 3][..], &[7.0; 3][..]));
        assert!(first.into_block().is_none() && third.into_block().is_none());
        assert!(!second.is_shared());
        arena.slice_mut(second.get_mut().expect("the last holder")).fill(8.0);
        assert_eq!(second.into_block().map(|block| block.index()), Some(0));
    }

    #[test]
    #[should_panic(expected = "another arena")]
    fn a_foreign_block_is_refused() {
        let (mut ours, theirs) = (Arena::<f32>::new(3), Arena::<f32>::new(3));
        theirs.slice(&ours.grow(1)[0]);
    }
}
