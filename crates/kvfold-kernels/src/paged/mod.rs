//! Attention over a paged cache that grows by appending, or folds into or replaces its newest slot (spec 1.4, 1.5, 5.5).
//!
//! A head's memory is a list of pages of 16 closed slots in the order of time, an optional ring of the newest W tokens in
//! pages of its own, and a state with the open slot. A slot is written to its page once, when it closes, and is then
//! rounded to the cache's type ([`CacheDType`]; `page.rs` has the layout); the open one is in full precision. A page whose
//! slots have all been written never changes again, so tables of several sequences may share it ([`SharedBlock`]):
//!
//! ```text
//! state: rotated key [D] and value [D] of the open slot, when later tokens can change it
//!        sums of keys [D], of values [D], of weights [1]; tokens in the segment [1]
//!        importances of the ring's tokens [W], negative when the token will fold
//!        with a pooling window P: weighted keys, values, weights of the newest P tokens [P][2D+1]
//!        of a rule that evicts, after the open slot: 1 per token of the ring, negative when the token will take it [W]
//! ```
//!
//! Tokens are taken one at a time: decide and carry out (`take.rs`, `evict.rs`). What each sees is computed for one token
//! at a time in decode (`attend.rs`) and for blocks of them in prefill (`prefill.rs`), with the same bytes; the cost falls
//! with the ratio because queries read survivors only.

mod arena;
mod attend;
mod evict;
mod load;
mod page;
mod page_kernel;
mod panels;
mod prefill;
mod take;
mod words;

pub use arena::{Arena, Block, SharedBlock};
pub(crate) use attend::{DecodeJob, Scratch, decode, one};
use page::Page;
pub use page::{CacheDType, PageLayout};
pub(crate) use page::{bytes, bytes_mut};
pub(crate) use page_kernel::Plain;
#[cfg(target_arch = "x86_64")]
pub(crate) use panels::weigh_on_amx;
pub use panels::{KeyPanels, Sums, ValuePanels};
pub(crate) use panels::{PANEL_WORDS, weigh};
pub(crate) use prefill::{Prepared, block, prepare};
pub(crate) use words::{decode as decode_words, in_words};

use crate::attention::View;
use crate::ops::{Channel, Heads};
use crate::real::Real;

/// Slots of a page.
pub const PAGE_SLOTS: usize = 16;

/// What becomes of a token's pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case", tag = "does", deny_unknown_fields)]
pub enum Rule {
    /// Every token keeps a slot of its own.
    Keep,
    /// A token is appended or folded into the newest slot, `delay` tokens after it was seen.
    Fold {
        /// First tokens that keep slots of their own.
        sinks: usize,
        /// Tokens that stay exact in the ring.
        delay: usize,
        /// Newest tokens that a slot averages at most.
        pool_window: Option<usize>,
        /// Whether a slot's score gets the log of its mass.
        log_mass: bool,
    },
    /// A token is appended or takes the newest slot, evicting what is there, `delay` tokens after it was seen.
    Evict {
        /// First tokens that keep slots of their own.
        sinks: usize,
        /// Tokens that stay exact in the ring.
        delay: usize,
    },
}

impl Rule {
    /// Tokens that stay exact in the ring.
    pub fn delay(self) -> usize {
        match self {
            Rule::Keep => 0,
            Rule::Fold { delay, .. } | Rule::Evict { delay, .. } => delay,
        }
    }

    /// First tokens that keep slots of their own.
    pub fn sinks(self) -> usize {
        match self {
            Rule::Keep => 0,
            Rule::Fold { sinks, .. } | Rule::Evict { sinks, .. } => sinks,
        }
    }

    /// Whether a token at this position carries out a decision to fold or to evict. The first token of a sequence, and those
    /// after sinks, always get slots of their own.
    pub fn may_fold(self, position: usize) -> bool {
        position > self.sinks()
    }

    /// Whether later tokens can change the newest slot.
    fn has_open_slot(self) -> bool {
        self != Rule::Keep
    }

    /// Of `slots` slots, those that no later token changes.
    fn closed(self, slots: usize) -> usize {
        slots.saturating_sub(usize::from(self.has_open_slot()))
    }

    fn has_mass(self) -> bool {
        matches!(self, Rule::Fold { log_mass: true, .. })
    }

    /// The layout of a page of closed slots.
    pub fn page(self, dim: usize, dtype: CacheDType) -> PageLayout {
        PageLayout { dim, dtype, mass: self.has_mass() }
    }

    /// The layout of a page of the ring.
    pub fn ring_page(self, dim: usize, dtype: CacheDType) -> PageLayout {
        self.page(dim, dtype.of_ring())
    }

    /// Floats of an open state; 0 when there is none.
    pub fn state_len(self, dim: usize) -> usize {
        let open = 2 * dim;
        match self {
            Rule::Keep => 0,
            Rule::Fold { delay, pool_window, .. } => {
                open + 2 * dim + 2 + delay + pool_window.unwrap_or(0) * (2 * dim + 1)
            }
            Rule::Evict { delay, .. } => open + delay,
        }
    }
}

/// The memory of one KV head of one layer of one sequence.
#[derive(Debug, Default)]
pub struct HeadTable {
    /// Pages of the closed slots, oldest first. Full ones may be shared with other heads' tables, since nothing changes them
    /// any more.
    pub pages: Vec<SharedBlock>,
    /// Slots in use, the open one included.
    pub slots: usize,
    /// Pages of the ring of exact tokens.
    pub ring: Vec<Block>,
    /// The open state, for rules that have one.
    pub state: Option<Block>,
    /// Tokens seen.
    pub tokens: usize,
    /// What the newest token adds to the logit of the next; 0 where decisions do not look back.
    pub ahead: f64,
}

impl HeadTable {
    /// Tokens in the ring.
    pub fn exact(&self, rule: Rule) -> usize {
        self.tokens.min(rule.delay())
    }

    /// Slots in pages: all but the open one.
    pub fn closed(&self, rule: Rule) -> usize {
        rule.closed(self.slots)
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
        (rule.closed(slots).div_ceil(PAGE_SLOTS), tokens.min(rule.delay()).div_ceil(PAGE_SLOTS))
    }
}

/// One head's new tokens and where everything is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadInput<'a, F> {
    /// Position of the first token.
    pub(crate) start: usize,
    /// Tokens to take.
    pub(crate) len: usize,
    /// Of how many of the last of them the output is wanted.
    pub(crate) wanted: usize,
    pub(crate) heads: Heads,
    pub(crate) rule: Rule,
    /// Queries before rotation; head g of the group begins at column g*D.
    pub(crate) q: View<'a, F>,
    /// The channel of queries that is zero after rotation, where there is one.
    pub(crate) zeroed: Option<Channel>,
    /// Keys before rotation.
    pub(crate) k: View<'a, F>,
    pub(crate) v: View<'a, F>,
    /// Decision logit; not needed by [`Rule::Keep`].
    pub(crate) logit: Option<View<'a, F>>,
    /// What each token adds to the logit of the next, where decisions look back.
    pub(crate) ahead: Option<View<'a, F>>,
    /// Importance; needed by [`Rule::Fold`] alone.
    pub(crate) omega: Option<View<'a, F>>,
    /// The rotary table, `[P, D]`.
    pub(crate) angles: &'a [F],
    /// Type of the slots.
    pub(crate) dtype: CacheDType,
    pub(crate) pages: &'a Arena<F>,
    pub(crate) rings: &'a Arena<F>,
    pub(crate) states: &'a Arena<F>,
}

impl<'a, F: Real> HeadInput<'a, F> {
    /// Pages of the first `closed` slots, with the number of slots in use in each.
    #[inline(always)]
    fn slot_pages<'b>(
        &self,
        table: &'b HeadTable,
        closed: usize,
    ) -> impl Iterator<Item = (Page<'b, F>, usize)> + use<'a, 'b, F>
    where
        'a: 'b,
    {
        let pages = table.pages[..closed.div_ceil(PAGE_SLOTS)].iter();
        let pages = pages.map(
            #[inline(always)]
            |page| &**page,
        );
        lanes(self.pages, self.rule.page(self.heads.dim, self.dtype), pages, closed)
    }

    /// Pages of the ring, with the number of seats in use in each.
    #[inline(always)]
    fn ring_pages<'b>(&self, table: &'b HeadTable) -> impl Iterator<Item = (Page<'b, F>, usize)> + use<'a, 'b, F>
    where
        'a: 'b,
    {
        let layout = self.rule.ring_page(self.heads.dim, self.dtype);
        let seats = table.exact(self.rule);
        lanes(self.rings, layout, table.ring[..seats.div_ceil(PAGE_SLOTS)].iter(), seats)
    }

    /// The page of a seat of the ring.
    #[inline(always)]
    fn seat_page<'b>(&self, table: &'b HeadTable, seat: usize) -> Page<'b, F>
    where
        'a: 'b,
    {
        self.rule.ring_page(self.heads.dim, self.dtype).view(self.rings.slice(&table.ring[seat / PAGE_SLOTS]))
    }

    /// The page of a slot, for writing.
    #[inline(always)]
    fn slot_page_mut<'b>(&self, pages: &'b mut [SharedBlock], slot: usize) -> &'b mut [F]
    where
        'a: 'b,
    {
        let page = pages[slot / PAGE_SLOTS].get_mut();
        self.pages.slice_mut(page.expect("a page that is not full is not shared"))
    }

    /// The rotary row of a position.
    fn angles(&self, position: usize) -> &'a [F] {
        &self.angles[position * self.heads.dim..][..self.heads.dim]
    }

    /// The open state.
    fn state_mut<'b>(&self, table: &'b mut HeadTable) -> &'b mut [F]
    where
        'a: 'b,
    {
        self.states.slice_mut(table.state.as_mut().expect("a rule that decides comes with a state"))
    }

    /// Key, value and log mass (0 when the model uses none) of the open slot.
    #[inline(always)]
    fn open_slot<'b>(&self, state: &'b Option<Block>) -> (&'b [F], &'b [F], F)
    where
        'a: 'b,
    {
        let dim = self.heads.dim;
        let state = self.states.slice(state.as_ref().expect("a rule that decides comes with a state"));
        let mass = if self.rule.has_mass() { state[4 * dim].ln() } else { F::zero() };
        (&state[..dim], &state[dim..2 * dim], mass)
    }
}

/// Pages of one layout with the number of lanes in use in each, `used` in all.
#[inline(always)]
fn lanes<'b, F: Real>(
    arena: &'b Arena<F>,
    layout: PageLayout,
    pages: impl Iterator<Item = &'b Block>,
    used: usize,
) -> impl Iterator<Item = (Page<'b, F>, usize)> {
    pages.enumerate().map(
        #[inline(always)]
        move |(n, page)| (layout.view(arena.slice(page)), PAGE_SLOTS.min(used - n * PAGE_SLOTS)),
    )
}
