//! A token enters the cache: it is kept, or appended or folded (spec 1.4, 1.5).

use super::{HeadInput, HeadTable, PAGE_SLOTS, Rule, evict};
use crate::pool::accumulate;
use crate::real::Real;
use crate::rope::rotate;

/// Buffers for a token on its way.
#[derive(Debug, Default)]
pub(super) struct Moving<F> {
    /// A rotated key.
    pub(super) rotated: Vec<F>,
    /// A key, not rotated, and a value.
    pub(super) pair: Vec<F>,
}

impl<F: Real> Moving<F> {
    pub(super) fn resize(&mut self, dim: usize) {
        self.rotated.resize(dim, F::zero());
        self.pair.resize(2 * dim, F::zero());
    }
}

/// Carries out what token t of the input causes.
#[inline(always)]
pub(super) fn take<F: Real>(input: &HeadInput<'_, F>, table: &mut HeadTable, t: usize, moving: &mut Moving<F>) {
    let dim = input.heads.dim;
    let position = table.tokens;
    let (k, v) = (input.k.row(t, 0, dim), input.v.row(t, 0, dim));
    table.tokens += 1;
    let (delay, log_mass) = match input.rule {
        Rule::Keep => {
            rotate(k, input.angles(position), F::one(), &mut moving.rotated);
            write_slot(input, table, table.slots, (&moving.rotated, v), None);
            table.slots += 1;
            return;
        }
        Rule::Evict { delay, .. } => return evict::take(input, table, (t, delay), moving),
        Rule::Fold { delay, log_mass, .. } => (delay, log_mass),
    };
    let folds = folds(input, table, t);
    let omega = input.omega.expect("a folding rule comes with importances").at(t);
    if delay == 0 {
        moving.pair[..dim].copy_from_slice(k);
        moving.pair[dim..].copy_from_slice(v);
        absorb(input, table, (position, folds, omega), moving);
        return;
    }
    let seat = position % delay;
    let importance = 4 * dim + 2 + seat;
    if position >= delay {
        let leaving = position - delay;
        let page = input.seat_page(table, seat);
        page.read(seat % PAGE_SLOTS, (&mut moving.rotated, &mut moving.pair[dim..]));
        rotate(&moving.rotated, input.angles(leaving), -F::one(), &mut moving.pair[..dim]);
        let signed = input.state_mut(table)[importance];
        absorb(input, table, (leaving, signed < F::zero(), signed.abs()), moving);
    }
    input.state_mut(table)[importance] = if folds { -omega } else { omega };
    rotate(k, input.angles(position), F::one(), &mut moving.rotated);
    let mass = log_mass.then(|| omega.ln());
    write_seat(input, table, seat, (&moving.rotated, v), mass);
}

/// Folds the pair in `moving` into the open slot, or closes that and opens one with the pair.
#[inline(always)]
fn absorb<F: Real>(
    input: &HeadInput<'_, F>,
    table: &mut HeadTable,
    (position, folds, omega): (usize, bool, F),
    moving: &mut Moving<F>,
) {
    let dim = input.heads.dim;
    let Rule::Fold { delay, pool_window, .. } = input.rule else { return };
    if !folds {
        close(input, table);
        table.slots += 1;
    }
    let (open, rest) = input.state_mut(table).split_at_mut(2 * dim);
    let (sums, rest) = rest.split_at_mut(2 * dim);
    let (counts, rest) = rest.split_at_mut(2);
    if !folds {
        // Not by a factor of 0: the state may come from another sequence, and 0 times infinity is not 0.
        sums.fill(F::zero());
        counts.fill(F::zero());
    }
    match pool_window {
        None => {
            accumulate(sums, F::one(), omega, &moving.pair);
            counts[0] += omega;
        }
        Some(window) => {
            let ring = &mut rest[delay..];
            let seat = |p: usize| (p % window) * (2 * dim + 1);
            let newest = &mut ring[seat(position)..][..2 * dim + 1];
            newest[..2 * dim].copy_from_slice(&moving.pair);
            newest[2 * dim] = omega;
            counts[1] = (counts[1] + F::one()).min(F::of(window as f64));
            sums.fill(F::zero());
            counts[0] = F::zero();
            let mut p = position;
            let mut left = counts[1];
            while left > F::zero() {
                let token = &ring[seat(p)..][..2 * dim + 1];
                accumulate(sums, F::one(), token[2 * dim], &token[..2 * dim]);
                counts[0] += token[2 * dim];
                left -= F::one();
                p = p.wrapping_sub(1);
            }
        }
    }
    // A slot of one token is that token, to the last bit (promise I2).
    if folds {
        let share = F::one() / counts[0];
        moving.pair.iter_mut().zip(&*sums).for_each(|(mean, &sum)| *mean = sum * share);
    }
    let ((k, v), (open_k, open_v)) = (moving.pair.split_at(dim), open.split_at_mut(dim));
    rotate(k, input.angles(position), F::one(), open_k);
    open_v.copy_from_slice(v);
}

/// Whether token t of the input, the newest of those that the table counts, gets no slot of its own.
#[inline(always)]
pub(super) fn folds<F: Real>(input: &HeadInput<'_, F>, table: &mut HeadTable, t: usize) -> bool {
    let mut logit = input.logit.expect("a rule that decides comes with logits").at(t);
    if let Some(ahead) = input.ahead {
        logit += F::of(table.ahead);
        table.ahead = ahead.at(t).f64();
    }
    input.rule.may_fold(table.tokens - 1) && logit > F::zero()
}

/// Writes the open slot, when there is one, to its page.
#[inline(always)]
pub(super) fn close<F: Real>(input: &HeadInput<'_, F>, table: &mut HeadTable) {
    let Some(slot) = table.slots.checked_sub(1) else { return };
    let layout = input.rule.page(input.heads.dim, input.dtype);
    let (k, v, mass) = input.open_slot(&table.state);
    let page = input.slot_page_mut(&mut table.pages, slot);
    layout.write(page, slot % PAGE_SLOTS, (k, v), layout.mass.then_some(mass));
}

/// Writes a closed slot to its page.
#[inline(always)]
fn write_slot<F: Real>(
    input: &HeadInput<'_, F>,
    table: &mut HeadTable,
    slot: usize,
    pair: (&[F], &[F]),
    mass: Option<F>,
) {
    let page = input.slot_page_mut(&mut table.pages, slot);
    input.rule.page(input.heads.dim, input.dtype).write(page, slot % PAGE_SLOTS, pair, mass);
}

/// Writes a seat of the ring.
#[inline(always)]
pub(super) fn write_seat<F: Real>(
    input: &HeadInput<'_, F>,
    table: &mut HeadTable,
    seat: usize,
    pair: (&[F], &[F]),
    mass: Option<F>,
) {
    let page = input.rings.slice_mut(&mut table.ring[seat / PAGE_SLOTS]);
    input.rule.ring_page(input.heads.dim, input.dtype).write(page, seat % PAGE_SLOTS, pair, mass);
}
