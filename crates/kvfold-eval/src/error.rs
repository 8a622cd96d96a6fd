//! What can go wrong with an evaluation.

use kvfold_engine::EngineError;

/// An error of an evaluation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// The text does not fill one window.
    #[error("the text has {tokens} tokens and one window takes {window}; give more text or a smaller --window")]
    TooLittleText {
        /// Tokens of the text.
        tokens: usize,
        /// Tokens of a window.
        window: usize,
    },
    /// The limit does not leave one window.
    #[error("a limit of {limit} tokens is less than one window, {window}; raise --limit or lower --window")]
    Limit {
        /// Tokens that may be used.
        limit: usize,
        /// Tokens of a window.
        window: usize,
    },
    /// A window in which nothing is predicted.
    #[error("in a window of {window} tokens nothing is predicted; it takes at least 2")]
    SmallWindow {
        /// Tokens of a window.
        window: usize,
    },
    /// The window cannot be evaluated.
    #[error("a window of {window} tokens cannot be evaluated; it takes 2 to {context}, the model's context")]
    Window {
        /// Tokens of a window.
        window: usize,
        /// Longest sequence of the model.
        context: usize,
    },
    /// There is nothing to time.
    #[error("decoding cannot be timed: {reason}")]
    Workload {
        /// What is missing.
        reason: String,
    },
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
}
