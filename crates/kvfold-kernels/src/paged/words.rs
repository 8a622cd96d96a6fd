//! Attention over bf16 pages as they lie, for machines that multiply words: decode and prefill.
//!
//! Queries and weights are rounded to bf16, sums are floats. One token and a block of them are the same function: what
//! differs is where the pages of [`Seen`] come from. Per query: scores; their maximum; the exponentials, added up lane by
//! lane over the slots and then the ring; and the output, over closed slots, the open one, the ring's seats since its last
//! turn, and those before it. A page is a step of the output's sum, of 16 terms. One that a query sees in part, or not
//! at all, is added with weights of 0 where it sees nothing: a sum begins at +0, so this changes no bit (promise I3), as
//! long as what is not seen is finite; what is not is left out of a copy ([`Seen::for_one`]).

use super::attend::{DecodeJob, Scratch, add_masses, scale_queries};
use super::page::{Page, place_pairs};
use super::prefill::Prepared;
use super::take::take;
use super::{CacheDType, HeadInput, HeadTable, PAGE_SLOTS};
use crate::aligned::Aligned;
use crate::bf16;
use crate::kernel_set::KernelSet;
use crate::pack::Packing;
use crate::real::{self, LANES, Real};
use std::ops::Range;

/// Words of a channel of a page's values.
pub(crate) const PAGE_WORDS: usize = PAGE_SLOTS / 2;

/// Scores of packed queries and pages of keys.
#[derive(Clone, Copy, Debug)]
pub struct KeyPages<'a> {
    /// Queries `[rows][words]`.
    pub q: &'a [u32],
    /// Words of a query, D/2.
    pub words: usize,
    /// Pages `[words][16]`.
    pub keys: &'a [&'a [u32]],
}

impl KeyPages<'_> {
    /// Panics unless every page is whole and the rows of scores, `row` apart, lie inside an output of this length.
    pub(crate) fn check(&self, row: usize, len: usize) {
        assert!(self.q.len().is_multiple_of(self.words) && !self.q.is_empty(), "queries of {} words", self.words);
        assert!(self.keys.iter().all(|page| page.len() == self.words * PAGE_SLOTS), "pages of {} words", self.words);
        let rows = self.q.len() / self.words;
        assert!((rows - 1) * row + self.keys.len() * PAGE_SLOTS <= len, "{rows} rows of scores do not fit");
    }

    /// The definition: scores `[rows][16 of each page]`, rows `row` apart.
    pub(crate) fn define<F: Real>(self, scores: &mut [F], row: usize) {
        self.check(row, scores.len());
        for (q, scores) in self.q.chunks_exact(self.words).zip(scores.chunks_mut(row)) {
            for (keys, scores) in self.keys.iter().zip(scores.chunks_exact_mut(PAGE_SLOTS)) {
                for (lane, score) in scores.iter_mut().enumerate() {
                    let pairs = q.iter().zip(keys.iter().skip(lane).step_by(PAGE_SLOTS));
                    *score = pairs.fold(F::zero(), |sum, (&q, &k)| bf16::add_pair(sum, q, k));
                }
            }
        }
    }
}

/// Sums of packed weights and pages of values.
#[derive(Clone, Copy, Debug)]
pub struct ValuePages<'a> {
    /// Weights `[rows][8 of each page]`.
    pub weights: &'a [u32],
    /// Pages `[8][D]`.
    pub values: &'a [&'a [u32]],
    /// Head dim D.
    pub dim: usize,
}

impl ValuePages<'_> {
    /// Panics unless every page is whole and the rows of outputs are those of an output of this length.
    pub(crate) fn check(&self, len: usize) {
        assert!(self.values.iter().all(|page| page.len() == PAGE_WORDS * self.dim), "pages of {} channels", self.dim);
        let rows = len / self.dim;
        let words = rows * self.values.len() * PAGE_WORDS;
        assert!(rows * self.dim == len && self.weights.len() == words && words > 0, "{rows} rows of outputs");
    }

    /// The definition: adds to outputs `[rows][D]`.
    pub(crate) fn define<F: Real>(self, out: &mut [F]) {
        self.check(out.len());
        let row = self.values.len() * PAGE_WORDS;
        for (weights, out) in self.weights.chunks_exact(row).zip(out.chunks_exact_mut(self.dim)) {
            for (weights, values) in weights.chunks_exact(PAGE_WORDS).zip(self.values) {
                for (&weight, values) in weights.iter().zip(values.chunks_exact(self.dim)) {
                    out.iter_mut().zip(values).for_each(|(out, &v)| *out = bf16::add_pair(*out, weight, v));
                }
            }
        }
    }
}

/// Whether a cache of a type is attended to in words.
pub(crate) fn in_words<F: Real, K: KernelSet<F>>(set: K, dtype: CacheDType) -> bool {
    dtype == CacheDType::Bf16 && set.tiles()
}

/// What a query sees.
#[derive(Clone, Copy, Debug)]
struct Sight<F> {
    /// Slots that no later token changes.
    closed: usize,
    /// Log mass of the open slot, where there is one.
    open: Option<F>,
    /// Its own seat of the ring.
    seat: usize,
}

/// Slots that are closed to the last of some tokens.
const SLOTS: usize = 0;
/// Open slots, one of each token.
const OPEN: usize = 1;
/// Seats of the ring since its last turn, from the first page on.
const NEWER: usize = 2;
/// Seats of the ring before that, from a page on; none before the first turn.
const OLDER: usize = 3;

/// What tokens that follow each other, with no turn of the ring between them, see of a head.
#[derive(Debug)]
struct Seen<'a, F> {
    /// Of each token.
    sights: Vec<Sight<F>>,
    /// Pages of words: slots, open slots, newer and older seats.
    pages: [Vec<Page<'a, F>>; 4],
    /// Lane of the first token's open slot.
    open_lane: usize,
    /// Page of the ring that the older seats begin with.
    older_page: usize,
    /// Seats of the ring, and lanes of a row of scores that they take.
    delay: usize,
    ring: usize,
}

/// A turn's pages of a ring, as they were while a chunk was taken.
#[derive(Debug)]
pub(super) struct Turns<F> {
    /// Copies of pages, one after the other.
    pages: Aligned<F>,
    page_len: usize,
    /// Which of them are a turn's, page by page; first the turn before the chunk's first token.
    turns: Vec<Vec<usize>>,
    /// The turn of the chunk's first token.
    first: usize,
}

impl<F: Real> Turns<F> {
    /// The ring before the first token of a chunk is taken.
    pub(super) fn new(input: &HeadInput<'_, F>, table: &HeadTable) -> Self {
        let delay = input.rule.delay().max(1);
        let seats = table.exact(input.rule);
        let page_len = input.rule.ring_page(input.heads.dim, input.dtype).floats::<F>();
        let mut turns =
            Self { pages: Aligned::default(), page_len, turns: vec![Vec::new()], first: table.tokens / delay };
        (0..seats.div_ceil(PAGE_SLOTS)).for_each(|page| turns.keep(input, table, 0, page));
        turns
    }

    /// Keeps a page as the turn's.
    fn keep(&mut self, input: &HeadInput<'_, F>, table: &HeadTable, turn: usize, page: usize) {
        let copy = self.pages.len() / self.page_len;
        self.pages.extend_from_slice(input.rings.slice(&table.ring[page]));
        if turn == self.turns.len() {
            // Pages that this turn has not reached are those of the turn before.
            self.turns.push(self.turns[turn - 1].clone());
        }
        match self.turns[turn].get_mut(page) {
            Some(kept) => *kept = copy,
            None => self.turns[turn].push(copy),
        }
    }

    /// A token has been taken, the newest one that the table counts; `last` is that of the chunk.
    pub(super) fn taken(&mut self, input: &HeadInput<'_, F>, table: &HeadTable, last: bool) {
        let delay = input.rule.delay();
        let (turn, seat) = ((table.tokens - 1) / delay, (table.tokens - 1) % delay);
        if last || seat + 1 == delay || (seat + 1).is_multiple_of(PAGE_SLOTS) {
            self.keep(input, table, turn + 1 - self.first, seat / PAGE_SLOTS);
        }
    }

    /// Pages of a turn; none before the first one.
    fn of<'a>(&'a self, input: &HeadInput<'_, F>, turn: Option<usize>) -> impl Iterator<Item = Page<'a, F>> {
        let layout = input.rule.ring_page(input.heads.dim, input.dtype);
        let kept = turn.and_then(|turn| self.turns.get(turn + 1 - self.first)).map_or(&[][..], |kept| &kept[..]);
        kept.iter().map(move |&page| layout.view(&self.pages[page * self.page_len..][..self.page_len]))
    }
}

/// Open slots of a chunk's tokens, as pages.
#[derive(Debug, Default)]
pub(super) struct OpenSlots<F> {
    words: Aligned<u32>,
    /// Log masses; absent while there is no slot.
    masses: Vec<Option<F>>,
}

impl<F: Real> OpenSlots<F> {
    fn clear(&mut self) {
        self.words.clear();
        self.masses.clear();
    }

    /// Adds the open slot that a token left.
    #[inline(always)]
    pub(super) fn push(&mut self, input: &HeadInput<'_, F>, table: &HeadTable) {
        let lane = self.masses.len() % PAGE_SLOTS;
        let page = input.heads.dim * PAGE_SLOTS;
        if lane == 0 {
            let words = self.words.len() + page;
            self.words.resize(words, 0);
        }
        self.masses.push((table.slots > 0).then(|| {
            let (k, v, mass) = input.open_slot(&table.state);
            let from = self.words.len() - page;
            place_pairs(&mut self.words[from..], lane, (k, v));
            mass
        }));
    }

    /// Pages of tokens, and the lane of the first one.
    fn of(&self, tokens: &Range<usize>, dim: usize) -> (impl Iterator<Item = Page<'_, F>>, usize) {
        let pages = match self.masses.is_empty() {
            true => 0..0,
            false => tokens.start / PAGE_SLOTS..tokens.end.div_ceil(PAGE_SLOTS),
        };
        let page = dim * PAGE_SLOTS;
        let pages = self.words[pages.start * page..pages.end * page].chunks_exact(page).map(Page::of_words);
        (pages, tokens.start % PAGE_SLOTS)
    }
}

/// Takes a token and attends to what it sees.
pub(crate) fn decode<F: Real, K: KernelSet<F>>(set: K, job: DecodeJob<'_, F>) {
    let DecodeJob { input, table, scratch, out } = job;
    let dim = input.heads.dim;
    let mut open = std::mem::take(&mut scratch.open);
    open.clear();
    set.run(
        #[inline(always)]
        || {
            scratch.moving.resize(dim);
            take(input, table, 0, &mut scratch.moving);
            if input.rule.has_open_slot() {
                open.push(input, table);
            }
            scale_queries(input, 0..1, &mut scratch.q);
        },
    );
    let (closed, delay, last) = (table.closed(input.rule), input.rule.delay(), table.tokens - 1);
    let seat = last % delay.max(1);
    let ring = || input.ring_pages(table).map(|(page, _)| page);
    let wraps = delay > 0 && last >= delay && seat + 1 < delay;
    let (open_pages, open_lane) = open.of(&(0..1), dim);
    let older_page = (seat + 1) / PAGE_SLOTS;
    let seen = Seen {
        sights: vec![Sight { closed, open: open.masses.first().copied().flatten(), seat }],
        pages: [
            input.slot_pages(table, closed).map(|(page, _)| page).collect(),
            open_pages.collect(),
            ring().take(seat / PAGE_SLOTS + 1).collect(),
            if wraps { ring().skip(older_page).collect() } else { Vec::new() },
        ],
        open_lane,
        older_page,
        delay,
        ring: table.exact(input.rule).next_multiple_of(PAGE_SLOTS),
    };
    seen.attend(set, dim, scratch, out);
    scratch.open = open;
}

/// Outputs `[tokens][group][D]` of a block of a chunk's tokens.
pub(super) fn block<F: Real, K: KernelSet<F>>(
    set: K,
    (input, table, prepared): (&HeadInput<'_, F>, &HeadTable, &Prepared<F>),
    (open, turns): (&OpenSlots<F>, &Option<Turns<F>>),
    tokens: Range<usize>,
    scratch: &mut Scratch<F>,
    out: &mut [F],
) {
    let (dim, delay) = (input.heads.dim, input.rule.delay());
    let position = |t: usize| prepared.start + t;
    let seat = |t: usize| position(t) % delay.max(1);
    let sight = |t: usize| Sight {
        closed: input.rule.closed(prepared.slots[t]),
        open: open.masses.get(t).copied().flatten(),
        seat: seat(t),
    };
    let (first, last) = (tokens.start, tokens.end - 1);
    let turn = position(last) / delay.max(1);
    let of_turn = |turn: Option<usize>| turns.iter().flat_map(move |turns| turns.of(input, turn));
    let older_page = (seat(first) + 1) / PAGE_SLOTS;
    let (open_pages, open_lane) = open.of(&tokens, dim);
    let seen = Seen {
        sights: tokens.clone().map(sight).collect(),
        pages: [
            input.slot_pages(table, sight(last).closed).map(|(page, _)| page).collect(),
            open_pages.collect(),
            of_turn(Some(turn)).take(seat(last) / PAGE_SLOTS + 1).collect(),
            of_turn(turn.checked_sub(1)).skip(older_page).collect(),
        ],
        open_lane,
        older_page,
        delay,
        ring: delay.next_multiple_of(PAGE_SLOTS),
    };
    set.run(
        #[inline(always)]
        || scale_queries(input, tokens, &mut scratch.q),
    );
    seen.attend(set, dim, scratch, out);
}

impl<F: Real> Seen<'_, F> {
    /// Lanes of a page that a token sees.
    fn lanes(&self, part: usize, page: usize, t: usize) -> Range<usize> {
        let Sight { closed, open, seat } = self.sights[t];
        let lane = self.open_lane + t;
        let (before, seen) = match part {
            SLOTS => (0, 0..closed),
            OPEN => (0, lane..lane + usize::from(open.is_some())),
            NEWER => (0, 0..seat + 1),
            _ => (self.older_page, seat + 1..self.delay),
        };
        let first = (before + page) * PAGE_SLOTS;
        let lane = |at: usize| at.clamp(first, first + PAGE_SLOTS) - first;
        lane(seen.start)..lane(seen.end).max(lane(seen.start))
    }

    /// Every page: its part, its place there, and what it holds.
    fn all(&self) -> impl Iterator<Item = (usize, usize, &Page<'_, F>)> {
        let pages = self.pages.iter().enumerate();
        pages.flat_map(|(part, pages)| pages.iter().enumerate().map(move |(n, page)| (part, n, page)))
    }

    /// Whether values that some of the tokens do not see are finite, so that weights of 0 leave them out.
    fn rest_is_finite(&self) -> bool {
        // What one token sees of a part and a later one does too, those between see.
        let by_all =
            |part, n| [0, self.sights.len() - 1].into_iter().all(|t| self.lanes(part, n, t) == (0..PAGE_SLOTS));
        self.all().all(|(part, n, page)| by_all(part, n) || page.values().iter().all(|&word| bf16::finite(word)))
    }

    /// Outputs of all tokens for the scratch's queries.
    fn attend<K: KernelSet<F>>(&self, set: K, dim: usize, scratch: &mut Scratch<F>, out: &mut [F]) {
        let finite = set.run(
            #[inline(always)]
            || self.rest_is_finite(),
        );
        if finite {
            return self.outputs(set, dim, scratch, out);
        }
        let queries = std::mem::take(&mut scratch.q);
        let (of_token, row) = (out.len() / self.sights.len(), self.sights.len());
        for (t, (q, out)) in queries.chunks(queries.len() / row).zip(out.chunks_mut(of_token)).enumerate() {
            scratch.q.clear();
            scratch.q.extend_from_slice(q);
            self.outputs_of_one(set, t, dim, scratch, out);
        }
    }

    /// Outputs of one token, from copies of the pages in which nothing is that it does not see.
    fn outputs_of_one<K: KernelSet<F>>(&self, set: K, t: usize, dim: usize, scratch: &mut Scratch<F>, out: &mut [F]) {
        let copy = |(part, n, page): (usize, usize, &Page<'_, F>)| {
            let mut copy = page.words().to_vec();
            let seen = self.lanes(part, n, t);
            let nothing = vec![F::zero(); dim];
            let unseen = (0..PAGE_SLOTS).filter(|lane| !seen.contains(lane));
            unseen.for_each(|lane| place_pairs(&mut copy, lane, (&nothing, &nothing)));
            copy
        };
        let copies: Vec<Vec<u32>> = self.all().map(copy).collect();
        let mut pages = [const { Vec::new() }; 4];
        for ((part, _, page), copy) in self.all().zip(&copies) {
            pages[part].push(Page { mass: page.mass, ..Page::of_words(copy) });
        }
        let Self { open_lane, older_page, delay, ring, .. } = *self;
        let one = Seen { sights: vec![self.sights[t]], pages, open_lane: open_lane + t, older_page, delay, ring };
        one.outputs(set, dim, scratch, out);
    }

    /// Outputs `[tokens][group][D]`.
    fn outputs<K: KernelSet<F>>(&self, set: K, dim: usize, scratch: &mut Scratch<F>, out: &mut [F]) {
        // Where the ring's seats begin in a row of scores.
        let most = self.sights.iter().map(|sight| sight.closed + usize::from(sight.open.is_some())).max();
        let ring = most.unwrap_or(0).max(self.pages[SLOTS].len() * PAGE_SLOTS).next_multiple_of(PAGE_SLOTS);
        let stride = ring + self.ring;
        self.scores(set, dim, (ring, stride), scratch);
        self.weights(set, (ring, stride), scratch);
        let values: Vec<&[u32]> = self.all().map(|(_, _, page)| page.values()).collect();
        out.fill(F::zero());
        set.value_pages(ValuePages { weights: &scratch.weights, values: &values, dim }, out);
        let rows = out.chunks_exact_mut(dim).zip(&scratch.shares);
        rows.for_each(|(out, &share)| out.iter_mut().for_each(|o| *o *= share));
    }

    /// Scores `[rows][slots, ring]`, minus infinity where a query sees nothing.
    fn scores<K: KernelSet<F>>(
        &self,
        set: K,
        dim: usize,
        (ring, stride): (usize, usize),
        Scratch { q, words, scores, apart, .. }: &mut Scratch<F>,
    ) {
        let rows = q.len() / dim;
        words.resize(q.len() / 2, 0);
        set.pack(Packing::Rows { x: q, cols: dim }, words);
        scores.resize(rows * stride, F::zero());
        let of_part = |part: usize, scores: &mut [F], row: usize| {
            let keys: Vec<&[u32]> = self.pages[part].iter().map(Page::keys).collect();
            if !keys.is_empty() {
                set.key_pages(KeyPages { q: words, words: dim / 2, keys: &keys }, scores, row);
            }
            for (n, page) in self.pages[part].iter().enumerate() {
                add_masses(&mut scores[n * PAGE_SLOTS..], row, page.mass);
            }
        };
        of_part(SLOTS, scores, stride);
        of_part(NEWER, &mut scores[ring..], stride);
        let beside = [OPEN, OLDER].map(|part| self.pages[part].len() * PAGE_SLOTS);
        let beside_row = beside[0] + beside[1];
        apart.resize(rows * beside_row, F::zero());
        of_part(OPEN, apart, beside_row);
        if let Some(before) = apart.get_mut(beside[0]..) {
            of_part(OLDER, before, beside_row);
        }
        let group = rows / self.sights.len();
        for (row, scores) in scores.chunks_exact_mut(stride).enumerate() {
            let (t, apart) = (row / group, &apart[row * beside_row..][..beside_row]);
            let Sight { closed, open, seat } = self.sights[t];
            let (slots, seats) = scores.split_at_mut(ring);
            slots[closed..].fill(F::neg_infinity());
            if let Some(mass) = open {
                slots[closed] = apart[self.open_lane + t] + mass;
            }
            if let Some(unseen) = seats.get_mut(seat + 1..) {
                unseen.fill(F::neg_infinity());
                if beside[1] > 0 {
                    let before = &apart[beside[0] + seat + 1 - self.older_page * PAGE_SLOTS..];
                    unseen[..self.delay - seat - 1].copy_from_slice(&before[..self.delay - seat - 1]);
                }
            }
        }
    }

    /// Exponentials as words `[rows][pages][8]`, 0 where a query sees nothing, and their shares.
    fn weights<K: KernelSet<F>>(
        &self,
        set: K,
        (ring, stride): (usize, usize),
        Scratch { scores, shares, weights, row: words, .. }: &mut Scratch<F>,
    ) {
        let counts = [SLOTS, OPEN, NEWER, OLDER].map(|part| self.pages[part].len());
        let row_words = counts.iter().sum::<usize>() * PAGE_WORDS;
        let rows = scores.len() / stride;
        let group = rows / self.sights.len();
        let [slots, opened, newer, older] = counts.map(|pages| pages * PAGE_WORDS);
        weights.resize(rows * row_words, 0);
        words.resize(stride / 2 - slots, 0);
        shares.clear();
        let rows = scores.chunks_exact_mut(stride).zip(weights.chunks_exact_mut(row_words));
        for (row, (scores, weights)) in rows.enumerate() {
            let t = row / group;
            let Sight { closed, open, seat } = self.sights[t];
            let (to_slots, rest) = weights.split_at_mut(slots);
            let (to_open, rest) = rest.split_at_mut(opened);
            let (to_newer, to_older) = rest.split_at_mut(newer);
            shares.push(F::one() / exponential_words(set, scores, [to_slots, words]));
            to_open.fill(0);
            if open.is_some() {
                let (lane, word) = (self.open_lane + t, closed / 2);
                let both = to_slots.get(word).copied().unwrap_or_else(|| words[word - slots]);
                to_open[lane / 2] = (both >> (16 * (closed % 2)) & 0xffff) << (16 * (lane % 2));
            }
            leave(to_slots, 0..closed);
            let keep = |first: usize, seen: Range<usize>, to: &mut [u32]| {
                to.copy_from_slice(&words[(ring + first) / 2 - slots..][..to.len()]);
                leave(to, seen);
            };
            keep(0, 0..seat + 1, to_newer);
            if older > 0 {
                let first = self.older_page * PAGE_SLOTS;
                keep(first, seat + 1 - first..self.delay - first, to_older);
            }
        }
    }
}

/// The exponentials of a row of scores as words, in two parts, of which the first is of whole pages; returns their sum, lane
/// by lane. Leaves them in the place of the scores.
fn exponential_words<F: Real, K: KernelSet<F>>(set: K, scores: &mut [F], [first, rest]: [&mut [u32]; 2]) -> F {
    /// Exponentials that are packed while they are in the first-level cache.
    const PART: usize = 256;
    let top = set.run(
        #[inline(always)]
        || real::max(scores),
    );
    let mut lanes = [F::zero(); LANES];
    let (of_first, of_rest) = scores.split_at_mut(2 * first.len());
    for (scores, words) in [(of_first, first), (of_rest, rest)] {
        for (scores, words) in scores.chunks_mut(PART).zip(words.chunks_mut(PART / 2)) {
            set.run(
                #[inline(always)]
                || {
                    real::map_onto_lanes(
                        scores,
                        &mut lanes,
                        #[inline(always)]
                        |s| K::exp_share(s - top),
                    );
                },
            );
            set.pack(Packing::Rows { x: scores, cols: scores.len() }, words);
        }
    }
    real::fold_lanes(lanes)
}

/// Leaves the weights of a range as they are; the others become 0.
fn leave(words: &mut [u32], seen: Range<usize>) {
    for unseen in [0..seen.start, seen.end..2 * words.len()] {
        let mut blank = |lane: usize| words[lane / 2] &= !(0xffff << (16 * (lane % 2)));
        let (start, end) = (unseen.start, unseen.end.max(unseen.start));
        // Whole words, and a half at either end.
        if start % 2 == 1 && start < end {
            blank(start);
        }
        if end % 2 == 1 && start < end {
            blank(end - 1);
        }
        if start.div_ceil(2) < end / 2 {
            words[start.div_ceil(2)..end / 2].fill(0);
        }
    }
}
