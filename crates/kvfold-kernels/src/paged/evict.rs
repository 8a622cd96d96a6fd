//! Dynamic Memory Sparsification in the cache (spec 5.5): a token that leaves the ring takes the newest slot, whose key
//! and value are evicted, or is appended.
//!
//! The decision of a token judges the one before it, which by then is the newest slot. So slots stay in the order of
//! time, a closed slot is never written again, and a token that is kept is kept to the last bit: it is rotated once, when
//! it comes, and copied from the ring to its slot.

use super::{HeadInput, HeadTable, PAGE_SLOTS, Scratch, angles, folds, read, state, write, write_newest};
use crate::real::Real;
use crate::rope::rotate;

/// Carries out what token t of the input causes.
#[inline(always)]
pub(super) fn take<F: Real>(
    input: &HeadInput<'_, F>,
    table: &mut HeadTable,
    (t, delay): (usize, usize),
    scratch: &mut Scratch<F>,
) {
    let dim = input.heads.dim;
    let position = table.tokens - 1;
    let (k, v) = (input.k.row(t, 0, dim), input.v.row(t, 0, dim));
    let evicts = folds(input, position, t);
    if delay == 0 {
        rotate(k, angles(input, position), F::one(), &mut scratch.rotated);
        table.slots += usize::from(!evicts);
        return write_newest(input, table, (&scratch.rotated, v), None);
    }
    let (seat, lane) = (position % delay, position % delay % PAGE_SLOTS);
    if position >= delay {
        let (leaving_k, leaving_v) = scratch.raw.split_at_mut(dim);
        read(input, &table.ring[seat / PAGE_SLOTS], lane, (&mut *leaving_k, &mut *leaving_v));
        table.slots += usize::from(state(input, table)[seat] > F::zero());
        write_newest(input, table, (leaving_k, leaving_v), None);
    }
    state(input, table)[seat] = if evicts { -F::one() } else { F::one() };
    rotate(k, angles(input, position), F::one(), &mut scratch.rotated);
    write(input, &mut table.ring[seat / PAGE_SLOTS], lane, (&scratch.rotated, v), None);
}
