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
    /// The window cannot be evaluated.
    #[error("a window of {window} tokens cannot be evaluated; it takes 2 to {context}, the model's context")]
    Window {
        /// Tokens of a window.
        window: usize,
        /// Longest sequence of the model.
        context: usize,
    },
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
}
