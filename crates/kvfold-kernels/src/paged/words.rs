//! Attention over bf16 pages as they lie, for machines that multiply words: decode and prefill.
//!
//! Queries and weights are rounded to bf16, sums are floats. One token and a block of them are the same function: what
//! differs is where the pages of [`Seen`] come from. Pages stand in one order: slots, open slots, the ring's seats since its
//! last turn, and those before it. Two pages of a part are a panel of 32 lanes, filled up with nothing, and some panels of a part a
//! group. Group by group, per query: scores; the exponentials beside a top, added up lane by lane in the order of pages; and the
//! output, of which a panel is a step of 32 terms ([`panels`](super::panels)). What is near stays near: panels are copied together,
//! and scores are used up before those of the next group are computed. What a query does not see of a page has the exponential 0
//! and raises no top, so it makes no difference which pages others of the block see (promise I3), as long as what is not seen is
//! finite; what is not is left out of a copy ([`Seen::outputs_of_one`]).

use super::attend::{DecodeJob, Scratch, add_masses, turn_queries};
use super::page::{Page, place_pairs};
use super::panels::{KeyPanels, PANEL_WORDS, Sums, ValuePanels};
use super::prefill::Prepared;
use super::take::take;
use super::{CacheDType, HeadInput, HeadTable, PAGE_SLOTS};
use crate::aligned::Aligned;
use crate::bf16;
use crate::kernel_set::KernelSet;
use crate::pack::Packing;
use crate::real::{self, LANES, Real};
use crate::simd::PANEL;
use std::ops::Range;

/// Words of a channel of a page's values.
const PAGE_WORDS: usize = PAGE_SLOTS / 2;
/// Panels whose scores are computed, weighed, and multiplied by values before those of the next: they stay in the first-level cache.
const GROUP: usize = 4;
/// Rows that go through a group at a time.
const UNIT: usize = 32;
/// Groups that are brought at a time for few rows, which wait for memory: a long copy keeps many lines on their way.
const BROUGHT: usize = 4;

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
            turn_queries(input, 0..1, log2_e(), &mut scratch.q);
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
    seen.attend(set, dim, scratch, &mut [out]);
    scratch.open = open;
}

/// Outputs of a block of a chunk's tokens, `[group][D]` each.
pub(super) fn block<F: Real, K: KernelSet<F>>(
    set: K,
    (input, table, prepared): (&HeadInput<'_, F>, &HeadTable, &Prepared<F>),
    (open, turns): (&OpenSlots<F>, &Option<Turns<F>>),
    tokens: Range<usize>,
    scratch: &mut Scratch<F>,
    out: &mut [&mut [F]],
) {
    let (dim, delay) = (input.heads.dim, input.rule.delay());
    let position = |t: usize| input.start + t;
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
        || turn_queries(input, tokens, log2_e(), &mut scratch.q),
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
    fn attend<K: KernelSet<F>>(&self, set: K, dim: usize, scratch: &mut Scratch<F>, out: &mut [&mut [F]]) {
        let finite = set.run(
            #[inline(always)]
            || self.rest_is_finite(),
        );
        if finite {
            return self.outputs(set, dim, scratch, out);
        }
        let queries = std::mem::take(&mut scratch.q);
        for (t, (q, out)) in queries.chunks(queries.len() / self.sights.len()).zip(out).enumerate() {
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
        one.outputs(set, dim, scratch, &mut [out]);
    }

    /// All panels, in their order.
    fn panels(&self) -> Vec<Panel<'_, F>> {
        let mut panels = Vec::new();
        for (part, pages) in PARTS.into_iter().zip(&self.pages).filter(|(_, pages)| !pages.is_empty()) {
            // A seat has its lane, and its group, whichever pages are seen before it.
            let before = if part == Part::Older { self.older_page } else { 0 };
            let page = |at: usize| {
                let n = at.checked_sub(before)?;
                Some(Placed { page: pages.get(n)?, n, whole: self.seen_by_all(part, n) })
            };
            let of_part = before / 2..(before + pages.len()).div_ceil(2);
            panels
                .extend(of_part.map(|at| Panel { group: (part, at / GROUP), pages: [page(2 * at), page(2 * at + 1)] }));
        }
        panels
    }

    /// Outputs of all tokens, `[group][D]` each.
    fn outputs<K: KernelSet<F>>(&self, set: K, dim: usize, scratch: &mut Scratch<F>, out: &mut [&mut [F]]) {
        let Scratch { q, words, scores, tops, totals, weights, keys, values, sums, .. } = scratch;
        let rows = q.len() / dim;
        words.resize(q.len() / 2, 0);
        set.pack(Packing::rows(q, dim), words);
        tops.clear();
        tops.resize(rows, F::min_value());
        totals.clear();
        totals.resize(rows, [F::zero(); LANES]);
        sums.clear();
        sums.resize(rows * dim, F::zero());
        let unit = rows.min(UNIT);
        scores.resize(GROUP * unit * PANEL, F::zero());
        weights.resize(GROUP * unit * PANEL_WORDS, 0);

        let (panels, mut tiles) = (self.panels(), K::Tiles::default());
        let groups: Vec<&[Panel<'_, F>]> = panels.chunk_by(|a, b| a.group == b.group).collect();
        for groups in groups.chunks(if rows <= UNIT { BROUGHT } else { 1 }) {
            bring(groups, dim, keys, values);
            let mut at = 0;
            for group in groups {
                let words_of_group = at..at + group.len() * PANEL_WORDS * dim;
                at = words_of_group.end;
                for first in (0..rows).step_by(UNIT) {
                    let of_unit = first..rows.min(first + UNIT);
                    if !self.sees(group, (&of_unit, rows)) {
                        continue;
                    }
                    let scores = &mut scores[..group.len() * of_unit.len() * PANEL];
                    let weights = &mut weights[..group.len() * of_unit.len() * PANEL_WORDS];
                    let q = &words[of_unit.start * dim / 2..of_unit.end * dim / 2];
                    set.key_panels(
                        &mut tiles,
                        KeyPanels { q, words: dim / 2, keys: &keys[words_of_group.clone()] },
                        scores,
                    );
                    set.run(
                        #[inline(always)]
                        || self.leave_seen(group, (of_unit.clone(), rows), scores),
                    );
                    let out = &mut sums[of_unit.start * dim..of_unit.end * dim];
                    let (tops, totals) = (&mut tops[of_unit.clone()], &mut totals[of_unit]);
                    set.weigh(scores, Sums { tops, totals, out: &mut *out }, weights);
                    set.value_panels(
                        &mut tiles,
                        ValuePanels { weights, values: &values[words_of_group.clone()], dim },
                        out,
                    );
                }
            }
        }
        set.run(
            #[inline(always)]
            || {
                let heads = out.iter_mut().flat_map(|out| out.chunks_exact_mut(dim));
                for ((out, sums), &totals) in heads.zip(sums.chunks_exact(dim)).zip(&*totals) {
                    let share = F::one() / real::fold_lanes(totals);
                    out.iter_mut().zip(sums).for_each(|(out, &sum)| *out = sum * share);
                }
            },
        );
    }

    /// Whether some of a unit of so many rows see something of panels of a part.
    fn sees(&self, panels: &[Panel<'_, F>], (unit, rows): (&Range<usize>, usize)) -> bool {
        let (group, (part, _)) = (rows / self.sights.len(), panels[0].group);
        let tokens = unit.start / group..(unit.end - 1) / group + 1;
        let mut pages = panels.iter().flat_map(|panel| &panel.pages).flatten();
        pages.any(|page| page.whole || tokens.clone().any(|t| !self.lanes(part, page.n, t).is_empty()))
    }

    /// Adds log masses to scores of panels, `[panels][unit][32]`, and makes minus infinity of what a query does not see; the unit are
    /// some of so many rows.
    #[inline(always)]
    fn leave_seen(&self, panels: &[Panel<'_, F>], (unit, rows): (Range<usize>, usize), scores: &mut [F]) {
        let group = rows / self.sights.len();
        for (panel, scores) in panels.iter().zip(scores.chunks_exact_mut(unit.len() * PANEL)) {
            for (half, page) in panel.pages.iter().enumerate() {
                let lanes = half * PAGE_SLOTS..(half + 1) * PAGE_SLOTS;
                let &Some(Placed { page, n, whole }) = page else {
                    scores.chunks_exact_mut(PANEL).for_each(|row| row[lanes.clone()].fill(F::neg_infinity()));
                    continue;
                };
                let (part, _) = panel.group;
                add_masses(&mut scores[lanes.start..], PANEL, (page.mass, log2_e()));
                if whole {
                    continue;
                }
                for (row, scores) in unit.clone().zip(scores.chunks_exact_mut(PANEL)) {
                    let t = row / group;
                    let (seen, scores) = (self.lanes(part, n, t), &mut scores[lanes.clone()]);
                    scores[..seen.start].fill(F::neg_infinity());
                    scores[seen.end..].fill(F::neg_infinity());
                    if let (Part::Open, Some(mass)) = (part, self.sights[t].open) {
                        scores[seen].iter_mut().for_each(|score| *score += mass * log2_e());
                    }
                }
            }
        }
    }
}

/// Two pages side by side, either of which may be missing.
#[derive(Debug)]
struct Panel<'a, F> {
    /// Of panels that go together.
    group: (Part, usize),
    pages: [Option<Placed<'a, F>>; 2],
}

/// A page at its place in its part.
#[derive(Debug)]
struct Placed<'a, F> {
    page: &'a Page<'a, F>,
    n: usize,
    /// Whether all tokens see all of it.
    whole: bool,
}

/// Copies panels, their keys `[2][D/2][16]` and their values `[16][D]`.
fn bring<F: Real>(groups: &[&[Panel<'_, F>]], dim: usize, keys: &mut Aligned<u32>, values: &mut Aligned<u32>) {
    keys.clear();
    values.clear();
    for page in groups.iter().copied().flatten().flat_map(|panel| &panel.pages) {
        match page {
            Some(Placed { page, .. }) => {
                keys.extend_from_slice(page.keys());
                values.extend_from_slice(page.values());
            }
            None => {
                let words = keys.len() + PAGE_WORDS * dim;
                keys.resize(words, 0);
                values.resize(words, 0);
            }
        }
    }
}

/// What scores are multiplied by for powers of two.
fn log2_e<F: Real>() -> F {
    F::of(std::f64::consts::LOG2_E)
}
