//! How many sequences are decoded at once, and what comes out.
//!
//! An [`Engine`] is a model on a backend with a cache policy and a page pool. It takes ragged batches: any number of
//! sequences, each with any number of new tokens, one for decoding, a chunk for prefill. [`CachedAttend`] is the one place
//! where a pass meets the cache. [`generate`] decodes texts, [`sample_corpus`] lets a model write its own training data.

mod attend;
mod engine;
mod generate;
mod sampler;

pub use attend::CachedAttend;
pub use engine::{Engine, EngineError, Sequence};
pub use generate::{Generation, Options, Stop, ensure_fits, generate, sample_corpus};
pub use sampler::Sampler;
