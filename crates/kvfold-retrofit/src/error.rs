//! What can go wrong with a retrofit.

use kvfold_kernels::ops::Exempt;
use kvfold_model::ModelError;

/// An error of a retrofit run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RetrofitError {
    /// A setting cannot be.
    #[error("`{setting}` is {found}; expected {expected}")]
    Setting {
        /// The setting.
        setting: &'static str,
        /// Its value.
        found: String,
        /// What it may be.
        expected: String,
    },
    /// The training text is too short.
    #[error(
        "the training text has {tokens} tokens and one sequence takes {length}; give more text or a smaller --length"
    )]
    TooLittleText {
        /// Tokens of the text.
        tokens: usize,
        /// Tokens of a sequence.
        length: usize,
    },
    /// A text cannot be used.
    #[error("{place}: {reason}")]
    Text {
        /// The file, and where in it.
        place: String,
        /// Why not, and what to do.
        reason: String,
    },
    /// No document is long enough to fold anything.
    #[error(
        "the longest document has {longest} tokens, of which the {} newest stay exact and the {} first have slots, so nothing \
         is ever folded; give longer documents or a smaller --delay, or join them with --no-reset",
        exempt.delay,
        exempt.sinks + 1
    )]
    ShortDocuments {
        /// Tokens of the longest document or part of one.
        longest: usize,
        /// Tokens that do not fold.
        exempt: Exempt,
    },
    /// No document is long enough to show what folding costs.
    #[error(
        "the longest document that decisions would be fitted on has {longest} tokens, and {needed} are needed to see what \
         later tokens read of the first ones; give longer documents or more of them, or begin without: --calibrate 0"
    )]
    NothingToCalibrate {
        /// Tokens of the longest document or part of one.
        longest: usize,
        /// Tokens of the shortest one that shows anything.
        needed: usize,
    },
    /// The loss or a gradient is not a number.
    #[error(
        "step {step}: {what} is {value} on {documents} (sequences {sequences:?} of the corpus); the weights before this \
         step are kept: try a lower --lr"
    )]
    NotFinite {
        /// The step that failed, as reports count them: the first is 1.
        step: u64,
        /// Loss or gradient norm.
        what: &'static str,
        /// Its value.
        value: f64,
        /// The batch.
        sequences: Vec<usize>,
        /// Where its texts came from.
        documents: String,
    },
    /// The loss is a number and beyond hope.
    #[error(
        "step {step}: the loss is {loss:.3}, in the last {steps} steps over {limit:.3} ({factor} times what it was, or a third \
         of what knowing nothing costs); this step's batch is {documents}; the last good checkpoint is kept: start again \
         with a lower --lr"
    )]
    Exploding {
        /// The step at which it was given up, as reports count them.
        step: u64,
        /// Cross-entropy or KL divergence of that step, nats per token.
        loss: f64,
        /// Steps over the limit, this one included.
        steps: usize,
        /// The limit.
        limit: f64,
        /// Times the median.
        factor: f64,
        /// Where the batch's texts came from.
        documents: String,
    },
    /// A run directory is in the way.
    #[error("{dir} holds an unfinished run; go on with --resume, or remove it to start again")]
    Unfinished {
        /// The run directory.
        dir: String,
    },
    /// Another process works on the run.
    #[error("{dir}: another process works on this run; wait for it, or stop it and go on with --resume")]
    Busy {
        /// The run directory.
        dir: String,
    },
    /// There is no run to resume.
    #[error("{dir} holds no run to resume; start one without --resume")]
    NothingToResume {
        /// The run directory.
        dir: String,
    },
    /// The run was started with something else.
    #[error("{dir}: the run was started with {what} {found}, not {wanted}; use the same, or start a new run")]
    OtherRun {
        /// The run directory.
        dir: String,
        /// What differs.
        what: String,
        /// What the run has.
        found: String,
        /// What was asked for.
        wanted: String,
    },
    /// A file of the run directory is not what was written.
    #[error("{file} is damaged: {reason}")]
    Damaged {
        /// The file.
        file: String,
        /// How it shows.
        reason: String,
    },
    /// A file could not be read or written.
    #[error("cannot {action} {file}: {source}")]
    Io {
        /// The file.
        file: String,
        /// What was attempted.
        action: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A model could not be read or written.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Tensors could not be read or written.
    #[error(transparent)]
    Tensor(#[from] kvfold_tensor::Error),
}
