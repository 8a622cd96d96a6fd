//! Where keys and values live: pages of 16 slots, one page table per sequence, layer and KV head.
//!
//! Heads of one sequence hold different numbers of slots, because each decides for itself what to fold; so memory is given
//! out page by page, to one head at a time, and comes back the moment a head no longer needs it. [`PagePool`] is that
//! memory and its accounts; every byte that kvfold reports is counted there. [`SequenceCache`] is what one sequence
//! holds; dropping it gives everything back, whatever the reason it ended (promise I4).
//!
//! What becomes of a token is a [`CachePolicy`]: one policy, one small file under `policies/`. All of them run in the same
//! kernel over the same pages, so comparisons at equal bytes are real.

mod error;
mod policies;
mod pool;
mod usage;

pub use error::CacheError;
pub use policies::{CachePolicy, Dense, Evicting, Folding, policy_of};
pub use pool::{CacheShape, PagePool, SequenceCache};
pub use usage::{Held, Usage};
