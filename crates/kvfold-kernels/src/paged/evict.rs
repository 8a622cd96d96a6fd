//! Dynamic Memory Sparsification in the cache (spec 5.5): a token that leaves the ring takes the open slot, whose key
//! and value are evicted, or closes it and opens the next.
//!
//! The decision of a token judges the one before it, which by then is in the open slot. So slots stay in the order of
//! time, a closed slot is never written again, and a token is rotated once, when it comes, and then copied from the ring
//! to its slot.

use super::take::{Moving, close, folds, write_seat};
use super::{HeadInput, HeadTable, PAGE_SLOTS};
use crate::real::Real;
use crate::rope::rotate;

/// Carries out what token t of the input causes.
#[inline(always)]
pub(super) fn take<F: Real>(
    input: &HeadInput<'_, F>,
    table: &mut HeadTable,
    (t, delay): (usize, usize),
    moving: &mut Moving<F>,
) {
    let dim = input.heads.dim;
    let position = table.tokens - 1;
    let (k, v) = (input.k.row(t, 0, dim), input.v.row(t, 0, dim));
    let evicts = folds(input, table, t);
    if delay == 0 {
        rotate(k, input.angles(position), F::one(), &mut moving.pair[..dim]);
        moving.pair[dim..].copy_from_slice(v);
        return fill_open_slot(input, table, evicts, &moving.pair);
    }
    let seat = position % delay;
    if position >= delay {
        let (leaving_k, leaving_v) = moving.pair.split_at_mut(dim);
        input.seat_page(table, seat).read(seat % PAGE_SLOTS, (leaving_k, leaving_v));
        let evicts = input.state_mut(table)[2 * dim + seat] < F::zero();
        fill_open_slot(input, table, evicts, &moving.pair);
    }
    input.state_mut(table)[2 * dim + seat] = if evicts { -F::one() } else { F::one() };
    rotate(k, input.angles(position), F::one(), &mut moving.rotated);
    write_seat(input, table, seat, (&moving.rotated, v), None);
}

/// Puts a rotated key and a value into the open slot, or closes that and puts them into the next.
#[inline(always)]
fn fill_open_slot<F: Real>(input: &HeadInput<'_, F>, table: &mut HeadTable, evicts: bool, pair: &[F]) {
    if !evicts {
        close(input, table);
        table.slots += 1;
    }
    input.state_mut(table)[..pair.len()].copy_from_slice(pair);
}
