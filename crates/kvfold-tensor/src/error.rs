//! What can go wrong with a tensor file.

use std::fs::File;
use std::io;
use std::path::Path;

/// The result of reading or writing tensors.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A tensor file that could not be read or written.
///
/// Every variant names the file, and the message says what to do where there is something to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file does not exist.
    #[error("{file}: no such file")]
    NotFound {
        /// The file asked for.
        file: String,
    },

    /// The operating system refused.
    #[error("{file}: cannot {action}: {source}")]
    Io {
        /// The file in question.
        file: String,
        /// What was being done, as a verb: `read`, `write`.
        action: &'static str,
        /// The system's reason.
        source: io::Error,
    },

    /// The file ends before what its header promises.
    #[error(
        "{file}: truncated: {what} needs {needed} bytes and the file has {found}; an interrupted download or copy looks \
         like this, fetch the file again"
    )]
    Truncated {
        /// The file in question.
        file: String,
        /// The part that is cut off.
        what: &'static str,
        /// The bytes that the file would have if it were whole.
        needed: u64,
        /// The bytes that it has.
        found: u64,
    },

    /// The header claims, or would need, more bytes than any real model has a use for.
    #[error(
        "{file}: a header of {length} bytes is over the limit of {limit}; the file is damaged or is no safetensors file \
         (a pickle, or the text pointer that git-lfs leaves in place of a file)"
    )]
    HeaderTooLarge {
        /// The file in question.
        file: String,
        /// The length that its first eight bytes claim.
        length: u64,
        /// The most that is accepted.
        limit: u64,
    },

    /// The header is not what safetensors prescribes, or does not describe the data that follows it.
    #[error(
        "{file}: invalid safetensors header: {reason}; fetch the file again, or save the model anew in floating point with \
         `save_pretrained`"
    )]
    Header {
        /// The file in question.
        file: String,
        /// What is wrong with it, in the words of the library that parses it. It names the tensor where that does.
        reason: String,
    },

    /// A file is no GGUF file that can be read.
    #[error("{file}: invalid GGUF file: {reason}")]
    Gguf {
        /// The file in question.
        file: String,
        /// What is wrong with it.
        reason: String,
    },

    /// A file is no PyTorch file that can be read.
    #[error("{file}: not a PyTorch file that is read: {reason}")]
    Torch {
        /// The file in question.
        file: String,
        /// What is wrong with it, and where.
        reason: String,
    },

    /// A key of a GGUF file's metadata cannot be read.
    #[error("{file}: invalid GGUF file: key `{key}` {reason}")]
    GgufKey {
        /// The file in question.
        file: String,
        /// The key.
        key: String,
        /// What is wrong with its value.
        reason: String,
    },

    /// A tensor cannot be written, or not be read from a GGUF or PyTorch file.
    #[error("{file}: tensor `{tensor}`: {reason}")]
    Tensor {
        /// The file in question.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// Why not, and what to do.
        reason: String,
    },
}

/// Opens a file for reading: the file, its length, and what errors call it.
pub(crate) fn open(path: &Path) -> Result<(File, u64, String)> {
    let name = path.display().to_string();
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => Error::NotFound { file: name.clone() },
        _ => Error::Io { file: name.clone(), action: "read", source },
    };
    let file = File::open(path).map_err(failed)?;
    let len = file.metadata().map_err(failed)?.len();
    Ok((file, len, name))
}
