//! Errors of the command line, and the exit codes they map to.

use kvfold_engine::{EngineError, SessionError};
use kvfold_eval::EvalError;
use kvfold_model::ModelError;
use kvfold_retrofit::RetrofitError;
use std::io;

/// Everything that ends a command early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AppError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Eval(#[from] EvalError),
    #[error(transparent)]
    Retrofit(#[from] RetrofitError),
    /// A file that the user named.
    #[error("{file}: cannot {action}: {source}")]
    File { file: String, action: &'static str, source: io::Error },
    /// A text that the user named.
    #[error("{file}: {reason}")]
    Text { file: String, reason: String },
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
    #[error("cannot {what}: {reason}")]
    Setup { what: &'static str, reason: String },
    /// Ctrl-C, after everything was saved.
    #[error("{0}")]
    Interrupted(String),
}

/// Something on the machine failed: a disk, a permission.
const MACHINE: u8 = 1;
/// The input cannot be used: a model, a text, a setting. (2 is clap's, for arguments.)
const INPUT: u8 = 3;
/// Training went wrong: a loss that is not a number, or that exploded.
const TRAINING: u8 = 4;
/// The shell's code for Ctrl-C.
pub(crate) const INTERRUPTED: u8 = 130;

impl AppError {
    /// The documented exit code.
    pub(crate) fn exit_code(&self) -> u8 {
        use kvfold_tensor::Error as TensorError;
        match self {
            AppError::Model(ModelError::Io { source, .. } | ModelError::Tensor(TensorError::Io { source, .. }))
            | AppError::Retrofit(
                RetrofitError::Io { source, .. }
                | RetrofitError::Tensor(TensorError::Io { source, .. })
                | RetrofitError::Model(
                    ModelError::Io { source, .. } | ModelError::Tensor(TensorError::Io { source, .. }),
                ),
            )
            | AppError::Session(SessionError::File(TensorError::Io { source, .. }))
            | AppError::File { source, .. } => of_io(source.kind()),
            AppError::Output(_) | AppError::Setup { .. } => MACHINE,
            AppError::Retrofit(RetrofitError::NotFinite { .. } | RetrofitError::Exploding { .. }) => TRAINING,
            AppError::Interrupted(_) => INTERRUPTED,
            AppError::Text { .. }
            | AppError::Model(_)
            | AppError::Engine(_)
            | AppError::Session(_)
            | AppError::Eval(_)
            | AppError::Retrofit(_) => INPUT,
        }
    }

    /// Whether the reader of our output went away.
    pub(crate) fn is_broken_pipe(&self) -> bool {
        matches!(self, AppError::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// A name that leads to no file is the user's mistake; everything else is the machine's.
fn of_io(kind: io::ErrorKind) -> u8 {
    use io::ErrorKind::{InvalidFilename, InvalidInput, IsADirectory, NotADirectory, NotFound};
    match kind {
        NotFound | IsADirectory | NotADirectory | InvalidFilename | InvalidInput => INPUT,
        _ => MACHINE,
    }
}
