//! Attention of a chunk's tokens over slots and ring: blocks of queries share the reading of pages.
//!
//! Every number is computed in decode's order (`attend.rs`). A block of queries computes scores that some of them do not
//! see; there the exponential is 0, and adding 0 changes nothing.
//!
//! What a query of a chunk sees of the past differs from the cache as it is after the chunk in two places only: the open
//! slot, which later tokens fold into or take, and the ring. [`Prepared`] keeps both as they were.

use super::attend::{Scratch, add_masses, exponentials, turn_queries};
use super::page::{Half, Page};
use super::take::take;
use super::words::{self, OpenSlots, Turns, in_words};
use super::{HeadInput, HeadTable, PAGE_SLOTS};
use crate::aligned::Aligned;
use crate::kernel_set::KernelSet;
use crate::real::Real;
use crate::simd::{Gemm, STRIP};
use std::ops::Range;

/// Tokens of a block.
const TOKENS: usize = 16;
/// Rows, one per query head of a token, of a block in words: whole pairs of tiles, where heads are few enough.
const ROWS: usize = 192;

/// `c [m,n] (+)= a [m,k] . b [k,n]` with rows of `a` and `b` adjacent to columns.
fn product<'a, F>([m, n, k]: [usize; 3], (a, a_row): (&'a [F], usize), (b, b_row): (&'a [F], usize)) -> Gemm<'a, F> {
    Gemm { m, n, k, a, a_row, a_col: 1, b, b_row, b_strip: STRIP, c_row: 0, accumulate: false }
}

/// Half a page as floats.
fn widened<'b, 'a: 'b, F: Real, K: KernelSet<F>>(
    set: K,
    page: &Page<'a, F>,
    (half, dim): (Half, usize),
    buffer: &'b mut Aligned<F>,
) -> &'b [F] {
    set.run(
        #[inline(always)]
        || page.floats(half, dim, buffer),
    )
}

/// Rows of keys `[n][D]`, values `[n][D]` and log masses `[n]`.
#[derive(Debug, Default)]
struct Rows<F> {
    k: Vec<F>,
    v: Vec<F>,
    mass: Vec<F>,
}

impl<F: Real> Rows<F> {
    /// Adds the token in a seat of the ring.
    #[inline(always)]
    fn push_seat(&mut self, input: &HeadInput<'_, F>, table: &HeadTable, seat: usize) {
        let (page, lane, dim) = (input.seat_page(table, seat), seat % PAGE_SLOTS, input.heads.dim);
        let at = self.k.len();
        self.k.resize(at + dim, F::zero());
        self.v.resize(at + dim, F::zero());
        page.read(lane, (&mut self.k[at..], &mut self.v[at..]));
        self.mass.extend(page.mass.get(lane));
    }

    /// Adds the open slot; a row that nobody sees while there is none.
    #[inline(always)]
    fn push_open(&mut self, input: &HeadInput<'_, F>, table: &HeadTable) {
        let dim = input.heads.dim;
        if table.slots == 0 {
            self.k.resize(self.k.len() + dim, F::zero());
            self.v.resize(self.v.len() + dim, F::zero());
            self.mass.push(F::zero());
            return;
        }
        let (k, v, mass) = input.open_slot(&table.state);
        self.k.extend(k);
        self.v.extend(v);
        self.mass.push(mass);
    }
}

/// A head that has taken a chunk, with what its queries saw and later tokens changed.
#[derive(Debug)]
pub(crate) struct Prepared<F> {
    /// Slots after each token.
    pub(super) slots: Vec<usize>,
    kept: Kept<F>,
}

/// What was there while a chunk was taken.
#[derive(Debug)]
enum Kept<F> {
    Floats(Exact<F>),
    /// The ring is absent where there is none.
    Words {
        open: OpenSlots<F>,
        turns: Option<Turns<F>>,
    },
}

/// The open slot and the ring's tokens in floats.
#[derive(Debug)]
struct Exact<F> {
    /// The open slot as each token left it; empty when slots do not change.
    open: Rows<F>,
    /// Exact tokens from position `first` on, in the order of time; empty without a ring.
    exact: Rows<F>,
    first: usize,
    /// `exact.k` as `[D][n]`.
    exact_kt: Vec<F>,
}

/// Takes all tokens of a chunk.
pub(crate) fn prepare<F: Real, K: KernelSet<F>>(
    set: K,
    input: &HeadInput<'_, F>,
    table: &mut HeadTable,
    scratch: &mut Scratch<F>,
) -> Prepared<F> {
    scratch.moving.resize(input.heads.dim);
    let mut slots = Vec::with_capacity(input.len);
    let mut taken = |table: &mut HeadTable, t: usize| {
        take(input, table, t, &mut scratch.moving);
        slots.push(table.slots);
    };
    let kept = match in_words(set, input.dtype) {
        true => {
            let mut open = OpenSlots::default();
            open.clear(input.start);
            let mut turns = (input.rule.delay() > 0).then(|| Turns::new(input, table));
            set.run(
                #[inline(always)]
                || {
                    for t in 0..input.len {
                        taken(table, t);
                        if input.rule.has_open_slot() {
                            open.push(input, table);
                        }
                        if let Some(turns) = &mut turns {
                            turns.taken(input, table, t + 1 == input.len);
                        }
                    }
                },
            );
            Kept::Words { open, turns }
        }
        false => Kept::Floats(prepare_floats(set, input, table, taken)),
    };
    Prepared { slots, kept }
}

/// Takes all tokens with `take`.
fn prepare_floats<F: Real, K: KernelSet<F>>(
    set: K,
    input: &HeadInput<'_, F>,
    table: &mut HeadTable,
    mut take: impl FnMut(&mut HeadTable, usize),
) -> Exact<F> {
    let dim = input.heads.dim;
    let (start, delay) = (input.start, input.rule.delay());
    let first = start - table.exact(input.rule);
    let (mut exact, mut open) = (Rows::default(), Rows::default());
    set.run(
        #[inline(always)]
        || {
            (first..start).for_each(|position| exact.push_seat(input, table, position % delay));
            for t in 0..input.len {
                take(table, t);
                if delay > 0 {
                    exact.push_seat(input, table, (start + t) % delay);
                }
                if input.rule.has_open_slot() {
                    open.push_open(input, table);
                }
            }
        },
    );
    let n = exact.k.len() / dim;
    let mut exact_kt = vec![F::zero(); n * dim];
    for (i, k) in exact.k.chunks_exact(dim).enumerate() {
        k.iter().enumerate().for_each(|(d, &k)| exact_kt[d * n + i] = k);
    }
    Exact { open, exact, first, exact_kt }
}

impl<F: Real> Prepared<F> {
    /// The chunk's wanted tokens in blocks, none of which crosses a turn of the ring.
    pub(crate) fn blocks(&self, input: &HeadInput<'_, F>) -> Vec<Range<usize>> {
        let delay = input.rule.delay();
        let most = match self.kept {
            Kept::Floats(_) => TOKENS,
            Kept::Words { .. } => (ROWS / input.heads.group()).clamp(TOKENS, 4 * TOKENS),
        };
        let (mut blocks, mut from) = (Vec::new(), input.len - input.wanted);
        while from < input.len {
            let turn = if delay > 0 { delay - (input.start + from) % delay } else { usize::MAX };
            let to = input.len.min(from + most.min(turn));
            blocks.push(from..to);
            from = to;
        }
        blocks
    }
}

/// A block of queries of a chunk.
///
/// The ring turns over while a chunk is taken: to token t, seats up to its own hold tokens since the last turn, the newer,
/// and seats above it those from before, the older. No block crosses a turn.
struct Queries<'a, 'b, F> {
    input: &'a HeadInput<'b, F>,
    table: &'a HeadTable,
    prepared: &'a Prepared<F>,
    exact: &'a Exact<F>,
    tokens: Range<usize>,
    /// Where the ring's seats begin in a row of scores, behind the slots.
    ring: usize,
    /// Length of a row of scores.
    stride: usize,
    /// Position of seat 0 since the last turn.
    turn: usize,
}

/// Outputs of a block of a chunk's tokens, `[group][D]` each.
pub(crate) fn block<F: Real, K: KernelSet<F>>(
    set: K,
    (input, table, prepared): (&HeadInput<'_, F>, &HeadTable, &Prepared<F>),
    tokens: Range<usize>,
    scratch: &mut Scratch<F>,
    out: &mut [&mut [F]],
) {
    let exact = match &prepared.kept {
        Kept::Floats(exact) => exact,
        Kept::Words { open, turns } => {
            return words::block(set, (input, table, prepared), (open, turns), tokens, scratch, out);
        }
    };
    let delay = input.rule.delay();
    let last = input.start + tokens.end - 1;
    let ring = prepared.slots[tokens.end - 1].next_multiple_of(PAGE_SLOTS);
    let stride = ring + delay.next_multiple_of(PAGE_SLOTS);
    let turn = if delay > 0 { last - last % delay } else { last };
    let queries = Queries { input, table, prepared, exact, tokens, ring, stride, turn };
    queries.scores(set, scratch);
    set.run(
        #[inline(always)]
        || exponentials::<F, K>(&mut scratch.scores, stride, &mut scratch.shares),
    );
    let (dim, mut sums) = (input.heads.dim, std::mem::take(&mut scratch.sums));
    sums.clear();
    sums.resize(out.len() * input.heads.group() * dim, F::zero());
    queries.values(set, scratch, &mut sums);
    let rows = out.iter_mut().flat_map(|out| out.chunks_exact_mut(dim)).zip(sums.chunks_exact(dim));
    for ((out, sums), &share) in rows.zip(&scratch.shares) {
        out.iter_mut().zip(sums).for_each(|(out, &sum)| *out = sum * share);
    }
    scratch.sums = sums;
}

impl<F: Real> Queries<'_, '_, F> {
    /// The seat of a token.
    fn seat(&self, t: usize) -> usize {
        self.input.start + t - self.turn
    }

    /// First row of a token.
    fn row(&self, t: usize) -> usize {
        (t - self.tokens.start) * self.input.heads.group()
    }

    /// Slots that a token sees and that no later one changes.
    fn closed(&self, t: usize) -> usize {
        self.input.rule.closed(self.prepared.slots[t])
    }

    /// The position of seat 0 before the last turn, when there was one.
    fn turn_before(&self) -> Option<usize> {
        self.turn.checked_sub(self.input.rule.delay())
    }

    /// Where a seat's token is among the exact ones, its seat 0 having been of a token at position `from`.
    fn exact(&self, from: usize, seat: usize) -> usize {
        from + seat - self.exact.first
    }

    /// Scores, minus infinity where a query sees nothing.
    fn scores<K: KernelSet<F>>(&self, set: K, scratch: &mut Scratch<F>) {
        let Self { input, prepared, exact, stride, ring, .. } = *self;
        let (dim, group, delay) = (input.heads.dim, input.heads.group(), input.rule.delay());
        let Scratch { q, scores, page: buffer, .. } = scratch;
        turn_queries(input, self.tokens.clone(), F::one(), q);
        let rows = q.len() / dim;
        scores.clear();
        scores.resize(rows * stride, F::neg_infinity());
        for (n, (page, _)) in input.slot_pages(self.table, self.closed(self.tokens.end - 1)).enumerate() {
            let scores = &mut scores[n * PAGE_SLOTS..];
            let keys = widened(set, &page, (Half::Keys, dim), buffer);
            set.gemm(Gemm { c_row: stride, ..product([rows, PAGE_SLOTS, dim], (q, dim), (keys, PAGE_SLOTS)) }, scores);
            if let Some(scales) = page.numbers.key_scales() {
                scores.chunks_mut(stride).for_each(|row| scale(row, &scales));
            }
            add_masses(scores, stride, (page.mass, F::one()));
        }
        for t in self.tokens.clone() {
            let (seen, closed) = (prepared.slots[t], self.closed(t));
            let of_token = &mut scores[self.row(t) * stride..][..group * stride];
            of_token.chunks_exact_mut(stride).for_each(|row| row[closed..ring].fill(F::neg_infinity()));
            if closed < seen {
                let k = &exact.open.k[t * dim..][..dim];
                let open = product([group, 1, dim], (&q[self.row(t) * dim..], dim), (k, 1));
                set.gemm(Gemm { c_row: stride, ..open }, &mut of_token[closed..]);
                if input.rule.has_mass() {
                    of_token.chunks_exact_mut(stride).for_each(|row| row[closed] += exact.open.mass[t]);
                }
            }
        }
        if delay > 0 {
            self.ring_scores(set, q, scores);
        }
    }

    fn ring_scores<K: KernelSet<F>>(&self, set: K, q: &[F], scores: &mut [F]) {
        let Self { input, exact, stride, ring, .. } = *self;
        let (dim, delay) = (input.heads.dim, input.rule.delay());
        let (rows, n) = (q.len() / dim, exact.exact.k.len() / dim);
        let part = |from: usize, seats: Range<usize>, to: &mut [F], to_row: usize| {
            let first = self.exact(from, seats.start);
            let keys = (&exact.exact_kt[first..], n);
            let scores = Gemm { c_row: to_row, ..product([rows, seats.len(), dim], (q, dim), keys) };
            let to = &mut to[seats.start..];
            set.gemm(scores, to);
            if input.rule.has_mass() {
                add_masses(to, to_row, (&exact.exact.mass[first..][..seats.len()], F::one()));
            }
        };
        part(self.turn, 0..self.seat(self.tokens.end - 1) + 1, &mut scores[ring..], stride);
        let mut before = vec![F::neg_infinity(); rows * delay];
        let first = self.seat(self.tokens.start) + 1;
        if let Some(from) = self.turn_before().filter(|_| first < delay) {
            part(from, first..delay, &mut before, delay);
        }
        for (row, (scores, before)) in scores.chunks_exact_mut(stride).zip(before.chunks_exact(delay)).enumerate() {
            let above = self.seat(self.tokens.start + row / input.heads.group()) + 1;
            scores[ring + above..][..delay - above].copy_from_slice(&before[above..]);
        }
    }

    /// Adds up values in decode's order, to zeros. What only some of the queries see is added for those alone: 0 times infinity is not
    /// 0, and a token must not touch those before it, whatever it holds.
    fn values<K: KernelSet<F>>(&self, set: K, scratch: &mut Scratch<F>, out: &mut [F]) {
        let Self { input, prepared, exact, stride, ring, .. } = *self;
        let (dim, group, delay) = (input.heads.dim, input.heads.group(), input.rule.delay());
        let Scratch { scores, page: buffer, .. } = scratch;
        let weighted = |weights: &[F], v: &[F], terms: usize, out: &mut [F]| {
            if terms > 0 {
                let sum = product([out.len() / dim, dim, terms], (weights, stride), (v, dim));
                set.gemm(Gemm { c_row: dim, accumulate: true, ..sum }, out);
            }
        };
        let (of_all, of_last) = (self.closed(self.tokens.start), self.closed(self.tokens.end - 1));
        for (n, (page, used)) in input.slot_pages(self.table, of_last).enumerate() {
            let at = n * PAGE_SLOTS;
            if let Some(scales) = page.numbers.value_scales() {
                for (row, weights) in scores.chunks_exact_mut(stride).enumerate() {
                    let closed = self.closed(self.tokens.start + row / group);
                    scale(&mut weights[at..closed.max(at)], &scales);
                }
            }
            let values = widened(set, &page, (Half::Values, dim), buffer);
            let shared = of_all.clamp(at, at + used) - at;
            weighted(&scores[at..], values, shared, out);
            for (t, out) in self.tokens.clone().zip(out.chunks_exact_mut(group * dim)) {
                let own = self.closed(t).clamp(at + shared, at + used) - at;
                weighted(&scores[self.row(t) * stride + at + shared..], &values[shared * dim..], own - shared, out);
            }
        }
        for (t, out) in self.tokens.clone().zip(out.chunks_exact_mut(group * dim)) {
            let closed = self.closed(t);
            if closed < prepared.slots[t] {
                weighted(&scores[self.row(t) * stride + closed..], &exact.open.v[t * dim..], 1, out);
            }
        }
        if delay == 0 {
            return;
        }
        let v = |from: usize, seat: usize| &exact.exact.v[self.exact(from, seat) * dim..];
        let (first, last) = (self.seat(self.tokens.start), self.seat(self.tokens.end - 1));
        weighted(&scores[ring..], v(self.turn, 0), first + 1, out);
        for (t, out) in self.tokens.clone().zip(out.chunks_exact_mut(group * dim)) {
            let (scores, own) = (&scores[self.row(t) * stride + ring..], self.seat(t));
            weighted(&scores[first + 1..], v(self.turn, first + 1), own - first, out);
            if let Some(before) = self.turn_before() {
                weighted(&scores[own + 1..], v(before, own + 1), last - own, out);
            }
        }
        if let Some(before) = self.turn_before() {
            weighted(&scores[ring + last + 1..], v(before, last + 1), delay - last - 1, out);
        }
    }
}

/// Multiplies numbers by scales, as far as there are both.
fn scale<F: Real>(numbers: &mut [F], scales: &[F]) {
    numbers.iter_mut().zip(scales).for_each(|(number, &scale)| *number *= scale);
}
