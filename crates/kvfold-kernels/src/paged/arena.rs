//! Memory cut into blocks of one size, and the handles that own them.

use crate::real::Real;
use crate::simd::CACHE_LINE;
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU64, Ordering};

/// Blocks that are allocated together.
const SLAB_BLOCKS: usize = 64;

/// The right to read and write one block of one arena. It cannot be copied, so a block has one owner.
#[derive(Debug, PartialEq, Eq)]
pub struct Block {
    arena: u64,
    index: usize,
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
    blocks: usize,
}

/// Memory of some blocks and where in it the first begins.
#[derive(Debug)]
struct Slab<F> {
    cells: Box<[UnsafeCell<F>]>,
    first: usize,
}

impl<F: Real> Slab<F> {
    fn new(len: usize) -> Self {
        // A slab begins at a cache line: a vector of a page then never lies across two.
        let spare = CACHE_LINE / size_of::<F>();
        let cells: Box<[_]> = (0..len + spare).map(|_| UnsafeCell::new(F::zero())).collect();
        // `align_offset` may decline; then blocks begin anywhere, which is slower and no worse.
        let first = cells.as_ptr().align_offset(CACHE_LINE).min(spare);
        Self { cells, first }
    }
}

// SAFETY: elements are reached through `slice` and `slice_mut` only, which borrow the block's unique handle as shared
// or exclusive; so two threads never touch a block that one of them writes.
unsafe impl<F: Send + Sync> Sync for Arena<F> {}

impl<F: Real> Arena<F> {
    /// An arena without blocks.
    pub fn new(block_len: usize) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { id: NEXT.fetch_add(1, Ordering::Relaxed), block_len, slabs: Vec::new(), blocks: 0 }
    }

    /// Makes at least `wanted` more blocks, filled with zeros, and returns their handles.
    pub fn grow(&mut self, wanted: usize) -> Vec<Block> {
        let slabs = wanted.div_ceil(SLAB_BLOCKS);
        for _ in 0..slabs {
            self.slabs.push(Slab::new(SLAB_BLOCKS * self.block_len));
        }
        let first = self.blocks;
        self.blocks += slabs * SLAB_BLOCKS;
        (first..self.blocks).map(|index| Block { arena: self.id, index }).collect()
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
        self.blocks
    }

    fn cells(&self, block: &Block) -> &[UnsafeCell<F>] {
        assert_eq!(block.arena, self.id, "a block of another arena");
        let slab = &self.slabs[block.index / SLAB_BLOCKS];
        &slab.cells[slab.first + block.index % SLAB_BLOCKS * self.block_len..][..self.block_len]
    }

    /// A block's elements.
    #[inline]
    pub fn slice<'a>(&'a self, block: &'a Block) -> &'a [F] {
        let cells = self.cells(block);
        // SAFETY: the shared borrow of the only handle rules out `slice_mut` while the result lives; UnsafeCell<F> has
        // the layout of F.
        unsafe { std::slice::from_raw_parts(cells.as_ptr().cast(), cells.len()) }
    }

    /// A block's elements for writing.
    #[inline]
    #[allow(clippy::mut_from_ref)] // exclusive through the handle
    pub fn slice_mut<'a>(&'a self, block: &'a mut Block) -> &'a mut [F] {
        let cells = self.cells(block);
        // SAFETY: the exclusive borrow of the only handle rules out every other access while the result lives; writing
        // through a shared reference is what UnsafeCell allows.
        unsafe { std::slice::from_raw_parts_mut(UnsafeCell::raw_get(cells.as_ptr()), cells.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_disjoint_and_zeroed() {
        let mut arena = Arena::<f32>::new(3);
        let mut blocks = arena.grow(1);
        blocks.extend(arena.grow(SLAB_BLOCKS + 1));
        assert_eq!((blocks.len(), arena.blocks()), (3 * SLAB_BLOCKS, 3 * SLAB_BLOCKS));
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
        for block in arena.grow(SLAB_BLOCKS + 1) {
            assert_eq!(arena.slice(&block).as_ptr() as usize % CACHE_LINE, 0);
        }
    }

    #[test]
    #[should_panic(expected = "another arena")]
    fn a_foreign_block_is_refused() {
        let (mut ours, theirs) = (Arena::<f32>::new(3), Arena::<f32>::new(3));
        theirs.slice(&ours.grow(1)[0]);
    }
}
