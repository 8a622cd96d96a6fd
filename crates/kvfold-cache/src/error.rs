//! What can go wrong with cache memory.

/// An error of the cache.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// The pool's limit is reached.
    #[error(
        "the cache needs up to {needed} more pages and {available} are left of {limit}; finish or cancel a sequence, or \
         allow more memory"
    )]
    OutOfPages {
        /// Pages that the next tokens can need at most.
        needed: usize,
        /// Pages that nobody holds.
        available: usize,
        /// Pages of the pool.
        limit: usize,
    },
    /// What was stored of a sequence is of no sequence of this pool.
    #[error("`{field}` is {found}; expected {expected}")]
    Stored {
        /// The part.
        field: &'static str,
        /// What it is.
        found: String,
        /// What it has to be.
        expected: String,
    },
}
