//! How a model is taught to compress its cache.
//!
//! A run is a function of its [`Settings`], the base model and the [`Corpus`]: batches, noise and schedules are computed
//! from the step, so a run that is killed and resumed ends with the weights it would have had (promise I5).
//!
//! * [`settings`]: everything that defines a run, checked before it starts;
//! * [`schedule`]: stages, compression targets and learning rates by step;
//! * [`documents`]: texts from files and folders;
//! * [`corpus`]: sequences, packed from documents, and which of them make which batch;
//! * `calibrate`: decision heads that begin where folding costs little;
//! * `gqa`: a model with fewer KV heads, where a student of GQA starts;
//! * `origin`: a retrofitted model, where a run to a higher ratio starts;
//! * [`trainer`]: one step, from ids to new weights;
//! * `settle`: decisions that land on the ratio that was asked for;
//! * [`run`]: the directory in which a run survives;
//! * [`watch`]: whether the loss is beyond hope;
//! * [`plan`]: what a run takes, before it starts.

mod calibrate;
pub mod corpus;
pub mod documents;
mod error;
mod gqa;
mod origin;
pub mod plan;
mod pressure;
pub mod run;
pub mod schedule;
pub mod settings;
mod settle;
pub mod trainer;
pub mod watch;

pub use calibrate::Fit;
pub use corpus::Corpus;
pub use error::RetrofitError;
pub use gqa::mean_pooled;
pub use origin::Origin;
pub use run::RunDir;
pub use settings::Settings;
pub use settle::{PASSES as SETTLE_PASSES, Settled, TOKENS as SETTLE_TOKENS};
pub use trainer::{StepReport, Trainer};
pub use watch::Watch;
