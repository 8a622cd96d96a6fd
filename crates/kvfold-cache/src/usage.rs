//! Bytes and slots, as the allocator counts them.

/// Memory of a pool or of one sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Pages that hold slots.
    pub slot_pages: usize,
    /// Pages that hold exact recent tokens.
    pub ring_pages: usize,
    /// Open states.
    pub states: usize,
    /// Bytes of a page of slots.
    pub page_bytes: usize,
    /// Bytes of a page of exact tokens.
    pub ring_page_bytes: usize,
    /// Bytes of an open state.
    pub state_bytes: usize,
}

impl Usage {
    /// Bytes of all of it: whole pages, used or not, and open states.
    pub fn bytes(&self) -> usize {
        self.slot_pages * self.page_bytes + self.ring_pages * self.ring_page_bytes + self.states * self.state_bytes
    }
}

/// What a sequence's heads hold against what they have seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Tokens seen.
    pub tokens: usize,
    /// Slots held, the ring's included, by layer and KV head.
    pub slots: Vec<Vec<usize>>,
}

impl Held {
    /// Tokens seen per slot held, over all heads; 1 before the first token.
    pub fn logical_ratio(&self) -> f64 {
        let heads: usize = self.slots.iter().map(Vec::len).sum();
        let slots: usize = self.slots.iter().flatten().sum();
        if slots == 0 { 1.0 } else { (self.tokens * heads) as f64 / slots as f64 }
    }
}
