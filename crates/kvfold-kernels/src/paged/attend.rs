//! Attention of new tokens over slots and ring: one token at a time in decode, blocks of queries in prefill.
//!
//! Both compute every number in the same order, so it makes no difference how a text is cut into chunks (promise I3).
//! Per query: scores, each one chain of additions over D; their maximum; the exponentials, added up lane by lane over
//! the pages of the slots and then of the ring; and the output, one chain over slots, then seats. A block of queries
//! computes scores that some of them do not see; there the exponential is 0, and adding 0 changes nothing.
//!
//! What a query of a chunk sees of the past differs from the pages as they are after the chunk in two places only: the
//! newest slot, which later tokens fold into or take, and the ring. [`Prepared`] keeps both as they were.

use super::{HeadInput, HeadTable, PAGE_SLOTS, Scratch, read, take};
use crate::kernel_set::KernelSet;
use crate::real::{self, Real};
use crate::simd::Gemm;
use std::ops::Range;

/// Queries of a block.
pub(crate) const QUERIES: usize = 16;

/// `c [m,n] (+)= a [m,k] . b [k,n]` with rows of `a` and `b` adjacent to columns.
fn product<'a, F>([m, n, k]: [usize; 3], (a, a_row): (&'a [F], usize), (b, b_row): (&'a [F], usize)) -> Gemm<'a, F> {
    Gemm { m, n, k, a, a_row, a_col: 1, b, b_row, c_row: 0, accumulate: false }
}

/// Queries of tokens, `[tokens * group][D]`, times 1/sqrt(D).
fn scaled_queries<F: Real>(input: &HeadInput<'_, F>, tokens: Range<usize>) -> Vec<F> {
    let row = input.heads.group() * input.heads.dim;
    let scale = F::one() / F::of(input.heads.dim as f64).sqrt();
    tokens.flat_map(|t| input.q.row(t, 0, row)).map(|&q| q * scale).collect()
}

/// Scores `[rows][16]` of a page into `scores`, rows `stride` apart.
fn page_scores<F: Real, K: KernelSet<F>>(
    set: K,
    input: &HeadInput<'_, F>,
    (q, page): (&[F], &[F]),
    scores: &mut [F],
    stride: usize,
) {
    let dim = input.heads.dim;
    let rows = q.len() / dim;
    set.gemm(Gemm { c_row: stride, ..product([rows, PAGE_SLOTS, dim], (q, dim), (page, PAGE_SLOTS)) }, scores);
    if input.rule.has_mass() {
        let mass = &page[PAGE_SLOTS * 2 * dim..][..PAGE_SLOTS];
        scores.chunks_mut(stride).for_each(|row| add(row, mass));
    }
}

fn add<F: Real>(to: &mut [F], more: &[F]) {
    to.iter_mut().zip(more).for_each(|(to, &more)| *to += more);
}

/// Adds the values of a page's `used` first slots, weighted by `weights`, rows `stride` apart, to rows of `out`.
fn page_values<F: Real, K: KernelSet<F>>(
    set: K,
    dim: usize,
    (weights, stride): (&[F], usize),
    (page, used): (&[F], usize),
    out: &mut [F],
) {
    let weighted = product([out.len() / dim, dim, used], (weights, stride), (&page[PAGE_SLOTS * dim..], dim));
    set.gemm(Gemm { c_row: dim, accumulate: true, ..weighted }, out);
}

/// Turns a row of scores into exponentials; returns what makes them probabilities.
#[inline(always)]
fn exponentials<F: Real, K: KernelSet<F>>(scores: &mut [F]) -> F {
    let top = real::max(scores);
    scores.iter_mut().for_each(|s| *s = K::exp(*s - top));
    F::one() / real::total(scores)
}

/// Takes one token and computes its output `[group][D]`.
pub(crate) fn one<F: Real, K: KernelSet<F>>(set: K, input: &HeadInput<'_, F>, table: &mut HeadTable, out: &mut [F]) {
    let dim = input.heads.dim;
    set.run(
        #[inline(always)]
        || take(input, table, 0, &mut Scratch::new(dim)),
    );
    let q = scaled_queries(input, 0..1);
    let pages: Vec<_> =
        input.lanes(&table.pages, table.slots).chain(input.lanes(&table.ring, table.exact(input.rule))).collect();
    let stride = pages.len() * PAGE_SLOTS;
    let mut scores = vec![F::zero(); input.heads.group() * stride];
    for (n, &(page, used)) in pages.iter().enumerate() {
        page_scores(set, input, (&q, page), &mut scores[n * PAGE_SLOTS..], stride);
        scores.chunks_exact_mut(stride).for_each(|row| row[n * PAGE_SLOTS..][used..PAGE_SLOTS].fill(F::neg_infinity()));
    }
    let mut shares = vec![F::zero(); input.heads.group()];
    set.run(
        #[inline(always)]
        || {
            let rows = scores.chunks_exact_mut(stride).zip(&mut shares);
            rows.for_each(|(row, share)| *share = exponentials::<F, K>(row));
        },
    );
    out.fill(F::zero());
    for (n, &page) in pages.iter().enumerate() {
        page_values(set, dim, (&scores[n * PAGE_SLOTS..], stride), page, out);
    }
    out.chunks_exact_mut(dim).zip(shares).for_each(|(out, share)| out.iter_mut().for_each(|o| *o *= share));
}

/// Rows of keys `[n][D]`, values `[n][D]` and log masses `[n]`.
#[derive(Debug, Default)]
struct Rows<F> {
    k: Vec<F>,
    v: Vec<F>,
    mass: Vec<F>,
}

impl<F: Real> Rows<F> {
    /// Adds a slot of a page.
    fn push(&mut self, input: &HeadInput<'_, F>, page: &super::Block, lane: usize) {
        let dim = input.heads.dim;
        let at = self.k.len();
        self.k.resize(at + dim, F::zero());
        self.v.resize(at + dim, F::zero());
        read(input, page, lane, (&mut self.k[at..], &mut self.v[at..]));
        if input.rule.has_mass() {
            self.mass.push(input.pages.slice(page)[PAGE_SLOTS * 2 * dim + lane]);
        }
    }
}

/// A head that has taken a chunk, with what its queries saw and later tokens changed.
#[derive(Debug)]
pub(crate) struct Prepared<F> {
    /// Position of the chunk's first token.
    start: usize,
    /// Slots after each token.
    slots: Vec<usize>,
    /// The newest slot as each token left it; empty when slots do not change.
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
) -> Prepared<F> {
    let dim = input.heads.dim;
    let (start, delay) = (table.tokens, input.rule.delay());
    let first = start - table.exact(input.rule);
    let (mut exact, mut open) = (Rows::default(), Rows::default());
    let newest = |rows: &mut Rows<F>, table: &HeadTable, position: usize| {
        let seat = position % delay;
        rows.push(input, &table.ring[seat / PAGE_SLOTS], seat % PAGE_SLOTS);
    };
    (first..start).for_each(|position| newest(&mut exact, table, position));
    let mut slots = Vec::with_capacity(input.len);
    let mut scratch = Scratch::new(dim);
    for t in 0..input.len {
        set.run(
            #[inline(always)]
            || take(input, table, t, &mut scratch),
        );
        slots.push(table.slots);
        if delay > 0 {
            newest(&mut exact, table, start + t);
        }
        if input.rule.has_open_slot() {
            match table.slots.checked_sub(1) {
                Some(slot) => open.push(input, &table.pages[slot / PAGE_SLOTS], slot % PAGE_SLOTS),
                None => open.skip(dim, input.rule.has_mass()),
            }
        }
    }
    let n = exact.k.len() / dim;
    let mut exact_kt = vec![F::zero(); n * dim];
    for (i, k) in exact.k.chunks_exact(dim).enumerate() {
        k.iter().enumerate().for_each(|(d, &k)| exact_kt[d * n + i] = k);
    }
    Prepared { start, slots, open, exact, first, exact_kt }
}

impl<F: Real> Rows<F> {
    /// Adds a row that nobody sees.
    fn skip(&mut self, dim: usize, mass: bool) {
        self.k.resize(self.k.len() + dim, F::zero());
        self.v.resize(self.v.len() + dim, F::zero());
        self.mass.resize(self.mass.len() + usize::from(mass), F::zero());
    }
}

impl<F: Real> Prepared<F> {
    /// The chunk's tokens in blocks, none of which crosses a turn of the ring.
    pub(crate) fn blocks(&self, delay: usize) -> Vec<Range<usize>> {
        let (mut blocks, mut from) = (Vec::new(), 0);
        while from < self.slots.len() {
            let turn = if delay > 0 { delay - (self.start + from) % delay } else { usize::MAX };
            let to = self.slots.len().min(from + QUERIES.min(turn));
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
    tokens: Range<usize>,
    /// Where the ring's seats begin in a row of scores, behind the slots.
    ring: usize,
    /// Length of a row of scores.
    stride: usize,
    /// Position of seat 0 since the last turn.
    turn: usize,
}

/// Outputs `[tokens][group][D]` of a block of a chunk's tokens.
pub(crate) fn block<F: Real, K: KernelSet<F>>(
    set: K,
    (input, table, prepared): (&HeadInput<'_, F>, &HeadTable, &Prepared<F>),
    tokens: Range<usize>,
    out: &mut [F],
) {
    let delay = input.rule.delay();
    let last = prepared.start + tokens.end - 1;
    let ring = prepared.slots[tokens.end - 1].next_multiple_of(PAGE_SLOTS);
    let stride = ring + delay.next_multiple_of(PAGE_SLOTS);
    let turn = if delay > 0 { last - last % delay } else { last };
    let queries = Queries { input, table, prepared, tokens, ring, stride, turn };
    let mut scores = queries.scores(set);
    let mut shares = vec![F::zero(); scores.len() / stride];
    set.run(
        #[inline(always)]
        || {
            let all = scores.chunks_exact_mut(stride).zip(&mut shares);
            all.for_each(|(row, share)| *share = exponentials::<F, K>(row));
        },
    );
    queries.values(set, &scores, out);
    let rows = out.chunks_exact_mut(input.heads.dim).zip(shares);
    rows.for_each(|(out, share)| out.iter_mut().for_each(|o| *o *= share));
}

impl<F: Real> Queries<'_, '_, F> {
    /// The seat of a token.
    fn seat(&self, t: usize) -> usize {
        self.prepared.start + t - self.turn
    }

    /// First row of a token.
    fn row(&self, t: usize) -> usize {
        (t - self.tokens.start) * self.input.heads.group()
    }

    /// Slots that a token sees and that no later one of the chunk changes.
    fn closed(&self, t: usize) -> usize {
        self.prepared.slots[t].saturating_sub(usize::from(self.input.rule.has_open_slot()))
    }

    /// The position of seat 0 before the last turn, when there was one.
    fn turn_before(&self) -> Option<usize> {
        self.turn.checked_sub(self.input.rule.delay())
    }

    /// Where a seat's token is among the exact ones, its seat 0 having been of a token at position `from`.
    fn exact(&self, from: usize, seat: usize) -> usize {
        from + seat - self.prepared.first
    }

    /// Scores, minus infinity where a query sees nothing.
    fn scores<K: KernelSet<F>>(&self, set: K) -> Vec<F> {
        let Self { input, prepared, stride, ring, .. } = *self;
        let (dim, group, delay) = (input.heads.dim, input.heads.group(), input.rule.delay());
        let q = scaled_queries(input, self.tokens.clone());
        let mut scores = vec![F::neg_infinity(); self.tokens.len() * group * stride];
        for (n, (page, _)) in input.lanes(&self.table.pages, prepared.slots[self.tokens.end - 1]).enumerate() {
            page_scores(set, input, (&q, page), &mut scores[n * PAGE_SLOTS..], stride);
        }
        for t in self.tokens.clone() {
            let seen = prepared.slots[t];
            let of_token = &mut scores[self.row(t) * stride..][..group * stride];
            of_token.chunks_exact_mut(stride).for_each(|row| row[seen..ring].fill(F::neg_infinity()));
            if input.rule.has_open_slot() && seen > 0 {
                let k = &prepared.open.k[t * dim..][..dim];
                let open = product([group, 1, dim], (&q[self.row(t) * dim..], dim), (k, 1));
                set.gemm(Gemm { c_row: stride, ..open }, &mut of_token[seen - 1..]);
                if input.rule.has_mass() {
                    of_token.chunks_exact_mut(stride).for_each(|row| row[seen - 1] += prepared.open.mass[t]);
                }
            }
        }
        if delay > 0 {
            self.ring_scores(set, &q, &mut scores);
        }
        scores
    }

    fn ring_scores<K: KernelSet<F>>(&self, set: K, q: &[F], scores: &mut [F]) {
        let Self { input, prepared, stride, ring, .. } = *self;
        let (dim, delay) = (input.heads.dim, input.rule.delay());
        let (rows, n) = (q.len() / dim, prepared.exact.k.len() / dim);
        let part = |from: usize, seats: Range<usize>, to: &mut [F], to_row: usize| {
            let first = self.exact(from, seats.start);
            let keys = (&prepared.exact_kt[first..], n);
            let scores = Gemm { c_row: to_row, ..product([rows, seats.len(), dim], (q, dim), keys) };
            set.gemm(scores, &mut to[seats.start..]);
            if input.rule.has_mass() {
                let mass = &prepared.exact.mass[first..][..seats.len()];
                to.chunks_mut(to_row).for_each(|row| add(&mut row[seats.start..], mass));
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

    /// Adds up values in decode's order. What only some of the queries see is added for those alone: 0 times infinity is not
    /// 0, and a token must not touch those before it, whatever it holds.
    fn values<K: KernelSet<F>>(&self, set: K, scores: &[F], out: &mut [F]) {
        let Self { input, prepared, stride, ring, .. } = *self;
        let (dim, group, delay) = (input.heads.dim, input.heads.group(), input.rule.delay());
        let weighted = |weights: &[F], v: &[F], terms: usize, out: &mut [F]| {
            if terms > 0 {
                let sum = product([out.len() / dim, dim, terms], (weights, stride), (v, dim));
                set.gemm(Gemm { c_row: dim, accumulate: true, ..sum }, out);
            }
        };
        out.fill(F::zero());
        let of_all = self.closed(self.tokens.start);
        for (n, page) in input.lanes(&self.table.pages, of_all).enumerate() {
            page_values(set, dim, (&scores[n * PAGE_SLOTS..], stride), page, out);
        }
        for (t, out) in self.tokens.clone().zip(out.chunks_exact_mut(group * dim)) {
            let scores = &scores[self.row(t) * stride..];
            let (mut from, closed) = (of_all, self.closed(t));
            while from < closed {
                let to = closed.min((from / PAGE_SLOTS + 1) * PAGE_SLOTS);
                let page = input.pages.slice(&self.table.pages[from / PAGE_SLOTS]);
                weighted(&scores[from..], &page[(PAGE_SLOTS + from % PAGE_SLOTS) * dim..], to - from, out);
                from = to;
            }
            if closed < prepared.slots[t] {
                weighted(&scores[closed..], &prepared.open.v[t * dim..], 1, out);
            }
        }
        if delay == 0 {
            return;
        }
        let v = |from: usize, seat: usize| &prepared.exact.v[self.exact(from, seat) * dim..];
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
