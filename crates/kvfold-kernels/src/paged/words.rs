//! Attention over bf16 pages as they lie, for machines that multiply words: decode and prefill.
//!
//! Queries and weights are rounded to bf16, sums are floats. One token and a block of them are the same function: what
//! differs is where the pages of [`Seen`] come from. Pages stand in one order: slots, open slots, the ring's seats since its
//! last turn, and those before it. Per query: scores; their maximum; the exponentials, added up lane by lane in the order of
//! pages; and the output, of which two pages are a step of 32 terms. What a query does not see of a page has the exponential 0,
//! and a sum begins at +0, so it makes no difference which pages others of the block see (promise I3), as long as what is not
//! seen is finite; what is not is left out of a copy ([`Seen::outputs_of_one`]).
//!
//! Two pages of a part are a panel of 32 lanes, filled up with a page that nobody sees, and rows of a panel lie side by side, so
//! that scores are written, looked at and read again in the order of memory, some panels at a time while they are near.

use super::attend::{DecodeJob, Scratch, add_masses, scale_queries};
use super::page::{Page, place_pairs};
use super::prefill::Prepared;
use super::take::take;
use super::{CacheDType, HeadInput, HeadTable, PAGE_SLOTS};
use crate::aligned::Aligned;
use crate::bf16;
use crate::kernel_set::{Fast, KernelSet};
#[cfg(target_arch = "x86_64")]
use crate::pack::Avx512Bf16;
use crate::pack::{Packer, Packing, Plain};
use crate::real::{self, LANES, Real};
use crate::simd::{Level, PANEL};
use std::ops::Range;

/// Words of a channel of a page's values.
pub(crate) const PAGE_WORDS: usize = PAGE_SLOTS / 2;
/// Words of a row of weights of a panel.
pub(crate) const PANEL_WORDS: usize = PANEL / 2;
/// Scores of panels that are written, or read, at a time: they stay in the first-level cache.
const NEAR: usize = 12 * 1024;

/// Scores of packed queries and pages of keys.
#[derive(Clone, Copy, Debug)]
pub struct KeyPages<'a> {
    /// Queries `[rows][words]`.
    pub q: &'a [u32],
    /// Words of a query, D/2.
    pub words: usize,
    /// Pages `[words][16]`, two of each panel.
    pub keys: &'a [&'a [u32]],
}

impl KeyPages<'_> {
    /// Panics unless every page is whole and an output of this length has room for the scores; returns the rows.
    pub(crate) fn check(&self, len: usize) -> usize {
        assert!(self.q.len().is_multiple_of(self.words) && !self.q.is_empty(), "queries of {} words", self.words);
        assert!(self.keys.iter().all(|page| page.len() == self.words * PAGE_SLOTS), "pages of {} words", self.words);
        let rows = self.q.len() / self.words;
        assert!(self.keys.len().is_multiple_of(2), "{} pages of keys", self.keys.len());
        assert_eq!(self.keys.len() / 2 * rows * PANEL, len, "scores of {rows} rows");
        rows
    }

    /// The definition: scores `[panels][rows][16 of each of two pages]`.
    pub(crate) fn define<F: Real>(self, scores: &mut [F]) {
        let rows = self.check(scores.len());
        for (two, panel) in self.keys.chunks(2).zip(scores.chunks_exact_mut(rows * PANEL)) {
            for (q, scores) in self.q.chunks_exact(self.words).zip(panel.chunks_exact_mut(PANEL)) {
                for (keys, scores) in two.iter().zip(scores.chunks_exact_mut(PAGE_SLOTS)) {
                    for (lane, score) in scores.iter_mut().enumerate() {
                        let pairs = q.iter().zip(keys.iter().skip(lane).step_by(PAGE_SLOTS));
                        *score = pairs.fold(F::zero(), |sum, (&q, &k)| bf16::add_pair(sum, q, k));
                    }
                }
            }
        }
    }
}

/// Sums of packed weights and pages of values.
#[derive(Clone, Copy, Debug)]
pub struct ValuePages<'a> {
    /// Weights `[panels][rows][8 of each of two pages]`.
    pub weights: &'a [u32],
    /// Pages `[8][D]`, two of each panel.
    pub values: &'a [&'a [u32]],
    /// Head dim D.
    pub dim: usize,
}

impl ValuePages<'_> {
    /// Panics unless every page is whole and there are weights for the rows of an output of this length; returns the rows.
    pub(crate) fn check(&self, len: usize) -> usize {
        assert!(self.values.iter().all(|page| page.len() == PAGE_WORDS * self.dim), "pages of {} channels", self.dim);
        let rows = len / self.dim;
        let words = self.values.len() / 2 * rows * PANEL_WORDS;
        assert!(rows * self.dim == len && self.weights.len() == words && words > 0, "{rows} rows of outputs");
        assert!(self.values.len().is_multiple_of(2), "{} pages of values", self.values.len());
        rows
    }

    /// The definition: adds to outputs `[rows][D]`.
    pub(crate) fn define<F: Real>(self, out: &mut [F]) {
        let rows = self.check(out.len());
        for (n, values) in self.values.iter().enumerate() {
            let weights = self.weights[n / 2 * rows * PANEL_WORDS + n % 2 * PAGE_WORDS..].chunks(PANEL_WORDS);
            for (weights, out) in weights.zip(out.chunks_exact_mut(self.dim)) {
                for (&weight, values) in weights.iter().zip(values.chunks_exact(self.dim)).take(PAGE_WORDS) {
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

/// Pages of one kind that some tokens see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// Slots that are closed to the last of the tokens.
    Slots,
    /// Open slots, one of each token.
    Open,
    /// Seats of the ring since its last turn, from the first page on.
    Newer,
    /// Seats of the ring before that, from a page on; none before the first turn.
    Older,
}

/// All parts, in their order.
const PARTS: [Part; 4] = [Part::Slots, Part::Open, Part::Newer, Part::Older];

/// What tokens that follow each other, with no turn of the ring between them, see of a head.
#[derive(Debug)]
struct Seen<'a, F> {
    /// Of each token.
    sights: Vec<Sight<F>>,
    /// Pages of words, part by part.
    pages: [Vec<Page<'a, F>>; PARTS.len()],
    /// Lane of the first token's open slot, from that of its position on.
    open_lane: usize,
    /// Page of the ring that the older seats begin with.
    older_page: usize,
    /// Seats of the ring.
    delay: usize,
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

/// Open slots of a chunk's tokens, as pages; a token's is in the lane of its position.
#[derive(Debug, Default)]
pub(super) struct OpenSlots<F> {
    words: Aligned<u32>,
    /// Log masses; absent while there is no slot.
    masses: Vec<Option<F>>,
    /// Lane of the first one.
    first: usize,
}

impl<F: Real> OpenSlots<F> {
    /// None, of tokens from a position on.
    pub(super) fn clear(&mut self, position: usize) {
        self.words.clear();
        self.masses.clear();
        self.first = position % PAGE_SLOTS;
    }

    /// Adds the open slot that a token left.
    #[inline(always)]
    pub(super) fn push(&mut self, input: &HeadInput<'_, F>, table: &HeadTable) {
        let lane = (self.first + self.masses.len()) % PAGE_SLOTS;
        let page = input.heads.dim * PAGE_SLOTS;
        if lane == 0 || self.masses.is_empty() {
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
        let (start, end) = (self.first + tokens.start, self.first + tokens.end);
        let pages = match self.masses.is_empty() {
            true => 0..0,
            false => start / PAGE_SLOTS..end.div_ceil(PAGE_SLOTS),
        };
        let page = dim * PAGE_SLOTS;
        let pages = self.words[pages.start * page..pages.end * page].chunks_exact(page).map(Page::of_words);
        (pages, start % PAGE_SLOTS)
    }
}

/// Takes a token and attends to what it sees.
pub(crate) fn decode<F: Real, K: KernelSet<F>>(set: K, job: DecodeJob<'_, F>) {
    let DecodeJob { input, table, scratch, out } = job;
    let dim = input.heads.dim;
    let mut open = std::mem::take(&mut scratch.open);
    open.clear(table.tokens);
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
    };
    set.run(
        #[inline(always)]
        || scale_queries(input, tokens, &mut scratch.q),
    );
    seen.attend(set, dim, scratch, out);
}

impl<F: Real> Seen<'_, F> {
    /// Lanes of a page that a token sees.
    fn lanes(&self, part: Part, page: usize, t: usize) -> Range<usize> {
        let Sight { closed, open, seat } = self.sights[t];
        let lane = self.open_lane + t;
        let (before, seen) = match part {
            Part::Slots => (0, 0..closed),
            Part::Open => (0, lane..lane + usize::from(open.is_some())),
            Part::Newer => (0, 0..seat + 1),
            Part::Older => (self.older_page, seat + 1..self.delay),
        };
        let first = (before + page) * PAGE_SLOTS;
        let lane = |at: usize| at.clamp(first, first + PAGE_SLOTS) - first;
        lane(seen.start)..lane(seen.end).max(lane(seen.start))
    }

    /// Every page: its part, its place there, and what it holds.
    fn all(&self) -> impl Iterator<Item = (Part, usize, &Page<'_, F>)> {
        let pages = PARTS.into_iter().zip(&self.pages);
        pages.flat_map(|(part, pages)| pages.iter().enumerate().map(move |(n, page)| (part, n, page)))
    }

    /// Whether all tokens see all of a page: what one token sees of a part and a later one does too, those between see.
    fn seen_by_all(&self, part: Part, n: usize) -> bool {
        [0, self.sights.len() - 1].into_iter().all(|t| self.lanes(part, n, t) == (0..PAGE_SLOTS))
    }

    /// Whether values that some of the tokens do not see are finite, so that weights of 0 leave them out.
    fn rest_is_finite(&self) -> bool {
        self.all()
            .all(|(part, n, page)| self.seen_by_all(part, n) || page.values().iter().all(|&word| bf16::finite(word)))
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
        let copy = |(part, n, page): (Part, usize, &Page<'_, F>)| {
            let mut copy = page.words().to_vec();
            let seen = self.lanes(part, n, t);
            let nothing = vec![F::zero(); dim];
            let unseen = (0..PAGE_SLOTS).filter(|lane| !seen.contains(lane));
            unseen.for_each(|lane| place_pairs(&mut copy, lane, (&nothing, &nothing)));
            copy
        };
        let copies: Vec<Vec<u32>> = self.all().map(copy).collect();
        let mut pages = [const { Vec::new() }; PARTS.len()];
        for ((part, _, page), copy) in self.all().zip(&copies) {
            pages[part as usize].push(Page { mass: page.mass, ..Page::of_words(copy) });
        }
        let Self { open_lane, older_page, delay, .. } = *self;
        let one = Seen { sights: vec![self.sights[t]], pages, open_lane: open_lane + t, older_page, delay };
        one.outputs(set, dim, scratch, out);
    }

    /// The pages of panels: of every part, those at even places begin one. Where there is none, a panel is filled up.
    fn panels(&self) -> Vec<Option<(Part, usize, &Page<'_, F>)>> {
        let mut panels = Vec::new();
        for (part, pages) in PARTS.into_iter().zip(&self.pages) {
            // A seat has its lane whichever pages are seen before it.
            let before = if part == Part::Older { self.older_page % 2 } else { 0 };
            if !pages.is_empty() {
                panels.extend(std::iter::repeat_n(None, before));
            }
            panels.extend(pages.iter().enumerate().map(|(n, page)| Some((part, n, page))));
            panels.extend(std::iter::repeat_n(None, panels.len() % 2));
        }
        panels
    }

    /// Outputs `[tokens][group][D]`.
    fn outputs<K: KernelSet<F>>(&self, set: K, dim: usize, scratch: &mut Scratch<F>, out: &mut [F]) {
        let Scratch { q, words, scores, lanes, tops, weights, nothing, near, .. } = scratch;
        let rows = q.len() / dim;
        words.resize(q.len() / 2, 0);
        set.pack(Packing::rows(q, dim), words);

        nothing.resize(dim * PAGE_WORDS, 0);
        let pages = self.panels();
        let keys: Vec<&[u32]> = pages.iter().map(|page| page.map_or(&nothing[..], |(.., page)| page.keys())).collect();
        let values: Vec<&[u32]> =
            pages.iter().map(|page| page.map_or(&nothing[..], |(.., page)| page.values())).collect();
        let panel = rows * PANEL;
        let some = (NEAR / panel).max(1);
        scores.resize(pages.len() / 2 * panel, F::zero());
        lanes.clear();
        lanes.resize(rows, [F::neg_infinity(); LANES]);
        let parts = pages.chunks(2 * some).zip(keys.chunks(2 * some)).zip(scores.chunks_mut(some * panel));
        for ((pages, keys), scores) in parts {
            set.key_pages(KeyPages { q: words, words: dim / 2, keys }, scores);
            set.run(
                #[inline(always)]
                || {
                    let panels = pages.as_chunks().0.iter().zip(scores.chunks_exact_mut(panel));
                    panels.for_each(|(two, panel)| self.leave_seen(two, panel));
                    raise(scores, lanes);
                },
            );
        }
        tops.clear();
        tops.extend(lanes.iter().map(|lanes| real::max(lanes)));

        out.fill(F::zero());
        lanes.fill([F::zero(); LANES]);
        weights.resize(some * panel / 2, 0);
        for (values, scores) in values.chunks(2 * some).zip(scores.chunks(some * panel)) {
            let weights = &mut weights[..scores.len() / 2];
            set.weigh(scores, tops, lanes, weights);
            set.value_pages(ValuePages { weights, values, dim }, near, out);
        }
        for (out, &lanes) in out.chunks_exact_mut(dim).zip(&*lanes) {
            let share = F::one() / real::fold_lanes(lanes);
            out.iter_mut().for_each(|o| *o *= share);
        }
    }

    /// Adds log masses to scores of two pages, `[rows][32]`, and makes minus infinity of what a query does not see.
    #[inline(always)]
    fn leave_seen(&self, pages: &[Option<(Part, usize, &Page<'_, F>)>; 2], panel: &mut [F]) {
        let group = panel.len() / PANEL / self.sights.len();
        for (half, page) in pages.iter().enumerate() {
            let lanes = half * PAGE_SLOTS..(half + 1) * PAGE_SLOTS;
            let &Some((part, n, page)) = page else {
                panel.chunks_exact_mut(PANEL).for_each(|row| row[lanes.clone()].fill(F::neg_infinity()));
                continue;
            };
            add_masses(&mut panel[lanes.start..], PANEL, page.mass);
            if self.seen_by_all(part, n) {
                continue;
            }
            for (t, of_token) in panel.chunks_exact_mut(group * PANEL).enumerate() {
                let seen = self.lanes(part, n, t);
                for row in of_token.chunks_exact_mut(PANEL) {
                    let scores = &mut row[lanes.clone()];
                    scores[..seen.start].fill(F::neg_infinity());
                    scores[seen.end..].fill(F::neg_infinity());
                    if let (Part::Open, Some(mass)) = (part, self.sights[t].open) {
                        scores[seen.clone()].iter_mut().for_each(|score| *score += mass);
                    }
                }
            }
        }
    }
}

/// Raises the rows' maxima, lane by lane, to scores `[panels][rows][32]`.
#[inline(always)]
fn raise<F: Real>(scores: &[F], tops: &mut [[F; LANES]]) {
    let panel = tops.len() * PANEL;
    // Row by row: lanes that are carried from panel to panel stay in registers, and the compiler leaves rows apart.
    for (row, top) in tops.iter_mut().enumerate() {
        let mut lanes = *top;
        for panel in scores.chunks_exact(panel) {
            for scores in panel[row * PANEL..][..PANEL].as_chunks::<LANES>().0 {
                for l in 0..LANES {
                    lanes[l] = if scores[l] > lanes[l] { scores[l] } else { lanes[l] };
                }
            }
        }
        *top = lanes;
    }
}

/// The exponentials of scores `[panels][rows][32]` beside their rows' maxima, as words; they are added to the rows' totals before
/// they are rounded.
#[inline(always)]
fn weigh_by<F: Real, K: KernelSet<F>, P: Packer<F>>(
    scores: &[F],
    tops: &[F],
    totals: &mut [[F; LANES]],
    weights: &mut [u32],
) {
    assert_eq!(scores.len(), 2 * weights.len(), "words of scores");
    let panel = tops.len() * PANEL;
    for (row, (&top, total)) in tops.iter().zip(totals).enumerate() {
        let mut lanes = *total;
        for (scores, weights) in scores.chunks_exact(panel).zip(weights.chunks_exact_mut(panel / 2)) {
            let mut exps = [F::zero(); PANEL];
            let scores = scores[row * PANEL..][..PANEL].as_chunks::<LANES>().0;
            for (scores, exps) in scores.iter().zip(exps.as_chunks_mut::<LANES>().0) {
                for l in 0..LANES {
                    exps[l] = K::exp_weight(scores[l] - top);
                    lanes[l] += exps[l];
                }
            }
            weights[row * PANEL_WORDS..][..PANEL_WORDS].copy_from_slice(&P::neighbours(&exps));
        }
        *total = lanes;
    }
}

/// The definition of [`KernelSet::weigh`].
pub(crate) fn weigh<F: Real, K: KernelSet<F>>(
    scores: &[F],
    tops: &[F],
    totals: &mut [[F; LANES]],
    weights: &mut [u32],
) {
    weigh_by::<F, K, Plain>(scores, tops, totals, weights);
}

/// The same on a machine that has tiles, and rounds by itself.
#[cfg(target_arch = "x86_64")]
pub(crate) fn weigh_on_amx(scores: &[f32], tops: &[f32], totals: &mut [[f32; LANES]], weights: &mut [u32]) {
    #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    fn compiled(scores: &[f32], tops: &[f32], totals: &mut [[f32; LANES]], weights: &mut [u32]) {
        weigh_by::<f32, Fast, Avx512Bf16>(scores, tops, totals, weights);
    }
    assert!(Level::detect() >= Level::AmxBf16, "this machine has no tiles");
    // SAFETY: machines with tiles have these.
    unsafe { compiled(scores, tops, totals, weights) }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::noise::{hash, unit};

    /// Words and totals are those of the definition, for any number of rows and panels.
    #[test]
    fn weights_on_amx_are_the_definition() {
        if Level::detect() < Level::AmxBf16 {
            return;
        }
        for (rows, panels) in [(1, 1), (3, 7), (17, 2), (96, 5)] {
            let scores: Vec<f32> = (0..panels * rows * PANEL).map(|i| unit(hash(&[i as u64])) as f32 * -20.0).collect();
            let tops: Vec<f32> = (0..rows).map(|row| unit(hash(&[1, row as u64])) as f32).collect();
            let room = || (vec![[0.5; LANES]; rows], vec![0; scores.len() / 2]);
            let (mut found, mut wanted) = (room(), room());
            weigh_on_amx(&scores, &tops, &mut found.0, &mut found.1);
            weigh::<f32, Fast>(&scores, &tops, &mut wanted.0, &mut wanted.1);
            assert!(found == wanted, "{rows} rows, {panels} panels");
        }
    }
}
