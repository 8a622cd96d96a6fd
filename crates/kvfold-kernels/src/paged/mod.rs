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
//! Tokens are taken one at a time: decide and carry out. What each sees is computed for one token at a time in decode
//! and for blocks of them in prefill (`attend.rs`), with the same bytes; the cost falls with the ratio because queries
//! read survivors only.

mod arena;
mod attend;
mod evict;

pub use arena::{Arena, Block};
pub(crate) use attend::{Prepared, block, one, prepare};

use crate::attention::View;
use crate::ops::Heads;
use crate::pool::accumulate;
use crate::real::Real;
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

    /// Whether later tokens can change the newest slot.
    fn has_open_slot(self) -> bool {
        self != Rule::Keep
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
}

impl<F: Real> Scratch<F> {
    fn new(dim: usize) -> Self {
        Self { rotated: vec![F::zero(); dim], raw: vec![F::zero(); 2 * dim] }
    }
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

impl<'a, F: Real> HeadInput<'a, F> {
    /// Pages with the number of slots in use in each.
    fn lanes<'b>(&self, pages: &'b [Block], slots: usize) -> impl Iterator<Item = (&'b [F], usize)> + use<'a, 'b, F>
    where
        'a: 'b,
    {
        let arena = self.pages;
        let used = move |n: usize| PAGE_SLOTS.min(slots - n * PAGE_SLOTS);
        let pages = &pages[..slots.div_ceil(PAGE_SLOTS)];
        pages.iter().enumerate().map(move |(n, page)| (arena.slice(page), used(n)))
    }
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
