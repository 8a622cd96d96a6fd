//! How good a model is, measured through the cache that serves it: perplexity, divergence from the original, agreement;
//! and how fast: prefill and decode, and every kernel, beside what the machine can do.
//!
//! Every number of quality comes from an [`Engine`](kvfold_engine::Engine)'s paged cache, never from a mask: the same kernel, pages and decisions that
//! generate text. Texts are cut into consecutive windows; per window the first token is given and the others are
//! predicted.

mod compare;
mod error;
mod kernels;
mod load;
mod machine;
mod speed;
mod throughput;
mod windows;

pub use compare::{Comparison, compare};
pub use error::EvalError;
pub use kernels::{KernelTime, KernelWork, kernel_times};
pub use load::{Load, Others};
pub use machine::Machine;
pub use speed::{Workload, decode_speed};
pub use throughput::{Batch, Caches, Rates, StepCost, Throughput, decode, prefill};
pub use windows::{Measured, Perplexity, cut, perplexity};
