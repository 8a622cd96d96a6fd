//! Who holds which blocks.

use kvfold_kernels::paged::{Block, SharedBlock};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Blocks that nobody holds, and how many sequences hold the others.
#[derive(Debug, Default)]
pub(crate) struct Accounts {
    /// Pages of slots that nobody holds.
    pub(crate) pages: Vec<Block>,
    /// Pages of rings that nobody holds.
    pub(crate) rings: Vec<Block>,
    /// Open states that nobody holds.
    pub(crate) states: Vec<Block>,
    /// Sequences that hold a page of slots, by the page's index. Snapshots do not count.
    users: Vec<u32>,
    /// Pages that sequences hold, each counted once.
    in_use: usize,
}

impl Accounts {
    /// A sequence holds a page of slots from now on.
    pub(crate) fn enter(&mut self, page: &Block) {
        let index = page.index();
        if index >= self.users.len() {
            self.users.resize(index + 1, 0);
        }
        self.users[index] += 1;
        self.in_use += usize::from(self.users[index] == 1);
    }

    /// A sequence no longer holds a page of slots.
    pub(crate) fn leave(&mut self, page: &Block) {
        let users = &mut self.users[page.index()];
        *users -= 1;
        self.in_use -= usize::from(*users == 0);
    }

    /// Sequences that hold a page of slots.
    pub(crate) fn users(&self, page: &Block) -> u32 {
        self.users.get(page.index()).copied().unwrap_or(0)
    }

    /// A sequence holds so many more pages of rings.
    pub(crate) fn enter_rings(&mut self, pages: usize) {
        self.in_use += pages;
    }

    /// A sequence holds so many fewer pages of rings.
    pub(crate) fn leave_rings(&mut self, pages: usize) {
        self.in_use -= pages;
    }

    /// Pages of slots and of rings that sequences hold, each counted once.
    pub(crate) fn in_use(&self) -> usize {
        self.in_use
    }

    /// Takes a page of slots back from a holder; it is free when that was the last.
    pub(crate) fn give_back(&mut self, page: SharedBlock) {
        self.pages.extend(page.into_block());
    }
}

/// The accounts, for as long as the guard lives.
pub(crate) fn lock(accounts: &Mutex<Accounts>) -> MutexGuard<'_, Accounts> {
    // Blocks are moved one list at a time, so a panic elsewhere cannot leave a list half-changed.
    accounts.lock().unwrap_or_else(PoisonError::into_inner)
}
