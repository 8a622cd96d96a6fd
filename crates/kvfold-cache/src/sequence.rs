//! What one sequence, or a snapshot of one, holds of a pool.

use crate::accounts::{Accounts, lock};
use crate::usage::Held;
use kvfold_kernels::paged::{HeadTable, PAGE_SLOTS, Rule};
use std::sync::{Arc, Mutex};

/// For whom pages are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// A text that goes on.
    Sequence,
    /// A text's beginning that is kept in case another begins so: its pages may be asked for at any time.
    Snapshot,
}

/// The cache of one sequence. Dropping it gives its pages and states back to the pool, shared pages when nobody else holds
/// them.
#[derive(Debug)]
pub struct SequenceCache {
    pub(crate) rule: Rule,
    pub(crate) layers: Vec<Vec<HeadTable>>,
    pub(crate) accounts: Arc<Mutex<Accounts>>,
    pub(crate) role: Role,
}

/// Pages that `more` tokens of a head can need beyond those that it holds, at most.
pub(crate) fn missing(table: &HeadTable, rule: Rule, more: usize) -> usize {
    let (slots, ring) = table.worst_pages(rule, more);
    slots.saturating_sub(table.pages.len()) + ring.saturating_sub(table.ring.len())
}

/// The page of a head that is partly filled.
pub(crate) fn partial(table: &HeadTable, rule: Rule) -> Option<usize> {
    let closed = table.closed(rule);
    (!closed.is_multiple_of(PAGE_SLOTS)).then_some(closed / PAGE_SLOTS)
}

impl SequenceCache {
    pub(crate) fn tables(&self) -> impl Iterator<Item = &HeadTable> {
        self.layers.iter().flatten()
    }

    /// Tokens seen.
    pub fn tokens(&self) -> usize {
        self.tables().next().map_or(0, |head| head.tokens)
    }

    /// Pages of slots and of the ring that it holds, those included that it shares with others.
    pub fn pages(&self) -> usize {
        self.tables().map(|table| table.pages.len() + table.ring.len()).sum()
    }

    /// Pages that it holds and no other sequence does: those that its end gives back.
    pub fn pages_alone(&self) -> usize {
        let others = u32::from(self.role == Role::Sequence);
        let accounts = lock(&self.accounts);
        let alone = |table: &HeadTable| table.pages.iter().filter(|page| accounts.users(page) == others).count();
        self.tables().map(|table| alone(table) + table.ring.len()).sum()
    }

    /// Pages that a fork of it does not share: each head's partly filled one, and the ring's.
    pub fn pages_to_copy(&self) -> usize {
        self.tables().map(|table| usize::from(partial(table, self.rule).is_some()) + table.ring.len()).sum()
    }

    /// Pages that `more` tokens can need beyond those that it holds, at most.
    pub fn pages_needed(&self, more: usize) -> usize {
        self.tables().map(|table| missing(table, self.rule, more)).sum()
    }

    /// The heads of a layer, for the kernel.
    pub fn layer_mut(&mut self, layer: usize) -> &mut [HeadTable] {
        &mut self.layers[layer]
    }

    /// Slots held by layer and KV head.
    pub fn held(&self) -> Held {
        let slots = self.layers.iter().map(|heads| heads.iter().map(|head| head.held(self.rule)).collect());
        Held { tokens: self.tokens(), slots: slots.collect() }
    }

    /// The same pages, held for somebody else.
    pub(crate) fn with_role(mut self, role: Role) -> Self {
        let mut accounts = lock(&self.accounts);
        for table in self.layers.iter().flatten().filter(|_| role != self.role) {
            match role {
                Role::Sequence => {
                    table.pages.iter().for_each(|page| accounts.enter(page));
                    accounts.enter_rings(table.ring.len());
                }
                Role::Snapshot => {
                    table.pages.iter().for_each(|page| accounts.leave(page));
                    accounts.leave_rings(table.ring.len());
                }
            }
        }
        drop(accounts);
        self.role = role;
        self
    }
}

impl Drop for SequenceCache {
    fn drop(&mut self) {
        let mut accounts = lock(&self.accounts);
        for mut table in self.layers.drain(..).flatten() {
            if self.role == Role::Sequence {
                table.pages.iter().for_each(|page| accounts.leave(page));
                accounts.leave_rings(table.ring.len());
            }
            table.pages.drain(..).for_each(|page| accounts.give_back(page));
            accounts.rings.append(&mut table.ring);
            accounts.states.extend(table.state.take());
        }
    }
}
