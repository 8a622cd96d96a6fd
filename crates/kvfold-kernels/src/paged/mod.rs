//! Attention over a paged cache that grows by appending, or folds into or replaces its newest slot (spec 1.4, 1.5, 5.5).
//!
//! A head's memory is a list of pages of 16 slots in the order of time, an optional ring of the newest W tokens, and an
//! open state. A closed slot is never written again. Inside a page, keys lie transposed, so that 16 scores are computed
//! at once, each as one chain of additions over D:
//!
//! ```text
//! page:  keys [D][16]   values [16][D]   log masses [16] (when the model uses them)
//! state: sums of keys [D], of values [D], of weights [1]; tokens in the segment [1]
//!        importances of the ring's tokens [W], negative when the token will fold
//!        with a pooling window P: weighted keys, values, weights of the newest P tokens [P][2D+1]
//!        of a rule that evicts: 1 per token of the ring, negative when the token will take the newest slot [W]
//! ```
//!
//! Tokens are taken one at a time: decide, carry out, attend. Prefill is the same loop over a chunk, in parallel over
//! heads and sequences, so a prompt gives the same bytes whatever the chunks; its cost falls with the ratio because
//! queries read survivors only. Scores are summed in the order of the slots, then the ring's.

mod arena;
mod evict;

pub use arena::{Arena, Block};

use crate::attention::View;
use crate::kernel_set::KernelSet;
use crate::ops::Heads;
use crate::pool::accumulate;
use crate::real::{self, Real};
use crate::rope::rotate;

/// Slots of a page.
pub const PAGE_SLOTS: usize = 16;

/// What becomes of a token's pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Every token keeps a slot of its own.
    Keep,
    /// A token is appended or folded into the newest slot, `delay` tokens after it was seen.
    Fold {
        /// Tokens that stay exact in the ring.
        delay: usize,
        /// Newest tokens that a slot averages at most.
        pool_window: Option<usize>,
        /// Whether a slot's score gets the log of its mass.
        log_mass: bool,
    },
    /// A token is appended or takes the newest slot, evicting what is there, `delay` tokens after it was seen.
    Evict {
        /// Tokens that stay exact in the ring.
        delay: usize,
    },
}

impl Rule {
    /// Tokens that stay exact in the ring.
    pub fn delay(self) -> usize {
        match self {
            Rule::Keep => 0,
            Rule::Fold { delay, .. } | Rule::Evict { delay } => delay,
        }
    }

    fn has_mass(self) -> bool {
        matches!(self, Rule::Fold { log_mass: true, .. })
    }

    /// Elements of a page.
    pub fn page_len(self, dim: usize) -> usize {
        PAGE_SLOTS * (2 * dim + usize::from(self.has_mass()))
    }

    /// Elements of an open state; 0 when there is none.
    pub fn state_len(self, dim: usize) -> usize {
        match self {
            Rule::Keep => 0,
            Rule::Fold { delay, pool_window, .. } => 2 * dim + 2 + delay + pool_window.unwrap_or(0) * (2 * dim + 1),
            Rule::Evict { delay } => delay,
        }
    }
}

/// The memory of one KV head of one layer of one sequence.
#[derive(Debug, Default)]
pub struct HeadTable {
    /// Pages of the slots, oldest first.
    pub pages: Vec<Block>,
    /// Slots in use.
    pub slots: usize,
    /// Pages of the ring of exact tokens.
    pub ring: Vec<Block>,
    /// The open state, for rules that have one.
    pub state: Option<Block>,
    /// Tokens seen.
    pub tokens: usize,
}

impl HeadTable {
    /// Tokens in the ring.
    pub fn exact(&self, rule: Rule) -> usize {
        self.tokens.min(rule.delay())
    }

    /// Slots held, the ring's included: what a ratio counts.
    pub fn held(&self, rule: Rule) -> usize {
        self.slots + self.exact(rule)
    }

    /// Pages of slots and of the ring that `more` tokens can need at most.
    pub fn worst_pages(&self, rule: Rule, more: usize) -> (usize, usize) {
        let left = |tokens: usize| tokens.saturating_sub(rule.delay());
        let tokens = self.tokens + more;
        let slots = self.slots + left(tokens) - left(self.tokens);
        (slots.div_ceil(PAGE_SLOTS), tokens.min(rule.delay()).div_ceil(PAGE_SLOTS))
    }
}

/// One head's new tokens and where everything is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadInput<'a, F> {
    /// Tokens to take.
    pub(crate) len: usize,
    pub(crate) heads: Heads,
    pub(crate) rule: Rule,
    /// Rotated queries; head g of the group begins at column g*D.
    pub(crate) q: View<'a, F>,
    /// Keys before rotation.
    pub(crate) k: View<'a, F>,
    pub(crate) v: View<'a, F>,
    /// Decision logit; not needed by [`Rule::Keep`].
    pub(crate) logit: Option<View<'a, F>>,
    /// Importance; needed by [`Rule::Fold`] alone.
    pub(crate) omega: Option<View<'a, F>>,
    /// The rotary table, `[P, D]`.
    pub(crate) angles: &'a [F],
    pub(crate) pages: &'a Arena<F>,
    pub(crate) states: &'a Arena<F>,
}

/// Scratch that a head's loop reuses.
struct Scratch<F> {
    rotated: Vec<F>,
    raw: Vec<F>,
    q: Vec<F>,
    scores: Vec<F>,
}

/// Takes the tokens of one head; outputs `[T][group*D]`.
pub(crate) fn run<F: Real, K: KernelSet<F>>(set: K, input: &HeadInput<'_, F>, table: &mut HeadTable, out: &mut [F]) {
    let Heads { dim, .. } = input.heads;
    let row = input.heads.group() * dim;
    let zeros = |n: usize| vec![F::zero(); n];
    let mut scratch = Scratch { rotated: zeros(dim), raw: zeros(2 * dim), q: zeros(row), scores: Vec::new() };
    set.run(
        #[inline(always)]
        || {
            for (t, out) in out.chunks_exact_mut(row).enumerate().take(input.len) {
                take(input, table, t, &mut scratch);
                attend::<F, K>(input, table, t, &mut scratch, out);
            }
        },
    );
}

/// Carries out what token t of the input causes.
#[inline(always)]
fn take<F: Real>(input: &HeadInput<'_, F>, table: &mut HeadTable, t: usize, scratch: &mut Scratch<F>) {
    let dim = input.heads.dim;
    let position = table.tokens;
    let (k, v) = (input.k.row(t, 0, dim), input.v.row(t, 0, dim));
    table.tokens += 1;
    let (delay, log_mass) = match input.rule {
        Rule::Keep => {
            rotate(k, angles(input, position), F::one(), &mut scratch.rotated);
            table.slots += 1;
            return write_newest(input, table, (&scratch.rotated, v), None);
        }
        Rule::Evict { delay } => return evict::take(input, table, (t, delay), scratch),
        Rule::Fold { delay, log_mass, .. } => (delay, log_mass),
    };
    let folds = folds(input, position, t);
    let omega = input.omega.expect("a folding rule comes with importances").at(t);
    if delay == 0 {
        scratch.raw[..dim].copy_from_slice(k);
        scratch.raw[dim..].copy_from_slice(v);
        absorb(input, table, (position, folds, omega), scratch);
        return;
    }
    let seat = position % delay;
    if position >= delay {
        let leaving = position - delay;
        read(input, &table.ring[seat / PAGE_SLOTS], seat % PAGE_SLOTS, (&mut scratch.rotated, &mut scratch.raw[dim..]));
        rotate(&scratch.rotated, angles(input, leaving), -F::one(), &mut scratch.raw[..dim]);
        let signed = state(input, table)[2 * dim + 2 + seat];
        absorb(input, table, (leaving, signed < F::zero(), signed.abs()), scratch);
    }
    state(input, table)[2 * dim + 2 + seat] = if folds { -omega } else { omega };
    rotate(k, angles(input, position), F::one(), &mut scratch.rotated);
    let mass = log_mass.then(|| omega.ln());
    write(input, &mut table.ring[seat / PAGE_SLOTS], seat % PAGE_SLOTS, (&scratch.rotated, v), mass);
}

/// Appends or folds the pair in `scratch.raw` and writes the newest slot anew.
#[inline(always)]
fn absorb<F: Real>(
    input: &HeadInput<'_, F>,
    table: &mut HeadTable,
    (position, folds, omega): (usize, bool, F),
    scratch: &mut Scratch<F>,
) {
    let dim = input.heads.dim;
    let Rule::Fold { delay, pool_window, log_mass } = input.rule else { return };
    table.slots += usize::from(!folds);
    let state = state(input, table);
    let (sums, rest) = state.split_at_mut(2 * dim);
    let (counts, rest) = rest.split_at_mut(2);
    if !folds {
        // Not by a factor of 0: the state may come from another sequence, and 0 times infinity is not 0.
        sums.fill(F::zero());
        counts.fill(F::zero());
    }
    match pool_window {
        None => {
            accumulate(sums, F::one(), omega, &scratch.raw);
            counts[0] += omega;
        }
        Some(window) => {
            let ring = &mut rest[delay..];
            let seat = |p: usize| (p % window) * (2 * dim + 1);
            let newest = &mut ring[seat(position)..][..2 * dim + 1];
            newest[..2 * dim].copy_from_slice(&scratch.raw);
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
        scratch.raw.iter_mut().zip(&*sums).for_each(|(mean, &sum)| *mean = sum * share);
    }
    let mass = log_mass.then(|| counts[0].ln());
    let (k, v) = scratch.raw.split_at(dim);
    rotate(k, angles(input, position), F::one(), &mut scratch.rotated);
    write_newest(input, table, (&scratch.rotated, v), mass);
}

/// Softmax over the slots and the ring, and the weighted values, for every query of token t.
#[inline(always)]
fn attend<F: Real, K: KernelSet<F>>(
    input: &HeadInput<'_, F>,
    table: &HeadTable,
    t: usize,
    scratch: &mut Scratch<F>,
    out: &mut [F],
) {
    let dim = input.heads.dim;
    let row = out.len();
    let scale = F::one() / F::of(dim as f64).sqrt();
    let Scratch { q, scores, .. } = scratch;
    q.iter_mut().zip(input.q.row(t, 0, row)).for_each(|(to, &q)| *to = q * scale);
    let exact = table.exact(input.rule);
    let pages = || lanes(input, &table.pages, table.slots).chain(lanes(input, &table.ring, exact));
    let padded = (table.slots.div_ceil(PAGE_SLOTS) + exact.div_ceil(PAGE_SLOTS)) * PAGE_SLOTS;
    scores.resize(padded * input.heads.group(), F::zero());
    for (q, (out, scores)) in q.chunks_exact(dim).zip(out.chunks_exact_mut(dim).zip(scores.chunks_exact_mut(padded))) {
        for (scores, (page, used)) in scores.chunks_exact_mut(PAGE_SLOTS).zip(pages()) {
            let mut sums = [F::zero(); PAGE_SLOTS];
            for (&q, keys) in q.iter().zip(page.chunks_exact(PAGE_SLOTS)) {
                for lane in 0..PAGE_SLOTS {
                    sums[lane] += q * keys[lane];
                }
            }
            if input.rule.has_mass() {
                let mass = &page[PAGE_SLOTS * 2 * dim..];
                for lane in 0..PAGE_SLOTS {
                    sums[lane] += mass[lane];
                }
            }
            sums[used..].fill(F::neg_infinity());
            scores.copy_from_slice(&sums);
        }
        let top = real::max(scores);
        scores.iter_mut().for_each(|s| *s = K::exp(*s - top));
        let share = F::one() / real::total(scores);
        out.fill(F::zero());
        for (scores, (page, used)) in scores.chunks_exact(PAGE_SLOTS).zip(pages()) {
            let values = page[PAGE_SLOTS * dim..].chunks_exact(dim);
            for (&p, v) in scores[..used].iter().zip(values) {
                accumulate(out, F::one(), p, v);
            }
        }
        out.iter_mut().for_each(|o| *o *= share);
    }
}

/// Pages with the number of slots in use in each.
#[inline(always)]
fn lanes<'a, F: Real>(
    input: &HeadInput<'a, F>,
    pages: &'a [Block],
    slots: usize,
) -> impl Iterator<Item = (&'a [F], usize)> + use<'a, F> {
    let arena = input.pages;
    let count = slots.div_ceil(PAGE_SLOTS);
    pages[..count].iter().enumerate().map(move |(n, page)| (arena.slice(page), PAGE_SLOTS.min(slots - n * PAGE_SLOTS)))
}

/// Whether token t of the input, at a position, gets no slot of its own. The first token of a sequence always does.
#[inline(always)]
fn folds<F: Real>(input: &HeadInput<'_, F>, position: usize, t: usize) -> bool {
    position > 0 && input.logit.expect("a rule that decides comes with logits").at(t) > F::zero()
}

fn angles<'a, F>(input: &HeadInput<'a, F>, position: usize) -> &'a [F] {
    &input.angles[position * input.heads.dim..][..input.heads.dim]
}

/// Writes the newest slot.
#[inline(always)]
fn write_newest<F: Real>(input: &HeadInput<'_, F>, table: &mut HeadTable, pair: (&[F], &[F]), mass: Option<F>) {
    let slot = table.slots - 1;
    write(input, &mut table.pages[slot / PAGE_SLOTS], slot % PAGE_SLOTS, pair, mass);
}

fn state<'a, F: Real>(input: &HeadInput<'a, F>, table: &'a mut HeadTable) -> &'a mut [F] {
    input.states.slice_mut(table.state.as_mut().expect("a folding rule comes with a state"))
}

/// Reads the key and the value of one slot of a page.
#[inline(always)]
fn read<F: Real>(input: &HeadInput<'_, F>, page: &Block, lane: usize, (k, v): (&mut [F], &mut [F])) {
    let dim = input.heads.dim;
    let page = input.pages.slice(page);
    for (d, k) in k.iter_mut().enumerate() {
        *k = page[d * PAGE_SLOTS + lane];
    }
    v.copy_from_slice(&page[(PAGE_SLOTS + lane) * dim..][..dim]);
}

/// Writes one slot of a page.
#[inline(always)]
fn write<F: Real>(input: &HeadInput<'_, F>, page: &mut Block, lane: usize, (k, v): (&[F], &[F]), mass: Option<F>) {
    let dim = input.heads.dim;
    let page = input.pages.slice_mut(page);
    for (d, &k) in k.iter().enumerate() {
        page[d * PAGE_SLOTS + lane] = k;
    }
    page[(PAGE_SLOTS + lane) * dim..][..dim].copy_from_slice(v);
    if let Some(mass) = mass {
        page[PAGE_SLOTS * 2 * dim + lane] = mass;
    }
}
