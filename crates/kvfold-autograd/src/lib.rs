//! How gradients flow: a small tape over [`Ops`](kvfold_kernels::Ops), explicit checkpoint segments, AdamW.
//!
//! [`Tape`] implements `Ops` by running each op on a backend and recording which adjoint to call, so the model's one
//! block walk serves inference and training. There is no graph to inspect and nothing is traced twice: backward calls
//! the records in reverse. A [segment](Tape::segment) keeps only its inputs and runs again when its gradient is due.

mod grads;
mod optimizer;
mod tape;
mod tape_ops;

pub use grads::Grads;
pub use optimizer::{Optimizer, Rates};
pub use tape::{Tape, Var};
