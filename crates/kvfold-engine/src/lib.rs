//! How many sequences are decoded at once, and what comes out.
//!
//! An [`Engine`] is a model on a backend with a cache policy and a page pool. It takes ragged batches: any number of
//! sequences, each with any number of new tokens, one for decoding, a chunk for prefill. [`CachedAttend`] is the one place
//! where a pass meets the cache. A [`Batcher`] runs many requests on an engine, in the order and at the pace that its
//! [`scheduler`] finds memory for, and may keep beginnings of texts for requests that begin so ([`PrefixSettings`]). A
//! sequence is saved to a file and goes on from it as a [`Session`]. [`generate`] decodes a text, [`sample_corpus`] lets a model write its own training data.

mod attend;
mod batcher;
mod constraint;
mod engine;
mod generate;
mod sampler;
pub mod scheduler;
mod session;
mod trace;

pub use attend::{CachedAttend, Member};
pub use batcher::{Batcher, Event, PrefixSettings, PrefixStats, Request};
pub use constraint::Constraint;
pub use engine::{Engine, EngineError, Kind, Part, Rows, Sequence};
pub use generate::{Generation, Options, Stop, ensure_fits, generate, sample_corpus};
pub use sampler::{BadSampler, LogProbs, Place, Sampler};
pub use session::{Session, SessionError};
pub use trace::Trace;
