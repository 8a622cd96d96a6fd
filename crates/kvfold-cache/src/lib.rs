//! Where keys and values live: pages of 16 slots, one page table per sequence, layer and KV head.
//!
//! Heads of one sequence hold different numbers of slots, because each decides for itself what to fold; so memory is given
//! out page by page, to one head at a time, and comes back the moment a head no longer needs it. [`PagePool`] is that
//! memory and its accounts; every byte that kvfold reports is counted there. [`SequenceCache`] is what one sequence
//! holds; dropping it gives everything back, whatever the reason it ended (promise I4).
//!
//! A page that is full never changes, so sequences that begin alike share it: [`PagePool::fork`] copies what can still
//! change and counts the holders of the rest. [`PrefixCache`] keeps beginnings of texts as snapshots, for texts that begin
//! so, in memory that nobody else needs at the time. [`StoredCache`] is a sequence outside of any pool.
//!
//! What becomes of a token is a [`CachePolicy`]: one policy, one small file under `policies/`. All of them run in the same
//! kernel over the same pages, so comparisons at equal bytes are real.

mod accounts;
mod error;
mod policies;
mod pool;
mod prefix;
mod sequence;
mod stored;
mod usage;

pub use error::CacheError;
pub use policies::{CachePolicy, Dense, Evicting, Folding, policy_of};
pub use pool::{CacheShape, PagePool};
pub use prefix::{Prefix, PrefixCache};
pub use sequence::SequenceCache;
pub use stored::StoredCache;
pub use usage::{Held, Usage};
