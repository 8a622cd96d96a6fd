//! What can be wrong with a model.

use std::io;

/// The result of loading, checking or saving a model.
pub type Result<T, E = ModelError> = std::result::Result<T, E>;

/// A model that could not be loaded, used or saved.
///
/// Each message starts with the file or directory it is about, names the field or tensor, and states what was found and
/// what was expected, so that it can be acted on without reading the source.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A weight file could not be read or written.
    #[error(transparent)]
    Tensor(#[from] kvfold_tensor::Error),

    /// The operating system refused.
    #[error("{file}: cannot {action}: {source}")]
    Io {
        /// The file or directory in question.
        file: String,
        /// What was being done, as a verb: `read`, `write`.
        action: &'static str,
        /// The system's reason.
        source: io::Error,
    },

    /// The name given is neither an embedded model nor a directory nor a delta.
    #[error(
        "{model}: no such model: it is neither a directory, nor a delta, nor one of the embedded models ({embedded})"
    )]
    NoModel {
        /// What was asked for.
        model: String,
        /// The names of the models that are part of the binary.
        embedded: String,
    },

    /// A file that every model directory has is not there.
    #[error("{file}: no such file; {hint}")]
    MissingFile {
        /// The file in question.
        file: String,
        /// What to do.
        hint: String,
    },

    /// A file is not the JSON it should be.
    #[error("{file}: invalid JSON: {reason}")]
    Json {
        /// The file in question.
        file: String,
        /// What is wrong, with line and column.
        reason: String,
    },

    /// A field of a configuration is missing, of the wrong type, or impossible.
    #[error("{file}: `{field}` is {found}; expected {expected}")]
    Field {
        /// The file in question.
        file: String,
        /// The field, with dots for nesting: `kvfold.dmc.delay`.
        field: String,
        /// The value found, as JSON, or `missing`.
        found: String,
        /// What would have been accepted.
        expected: String,
    },

    /// The `kvfold` section, or a part of it, is not what this version writes.
    #[error("{file}: `{section}` cannot be read: {reason}")]
    Section {
        /// The file in question.
        file: String,
        /// The section, with dots for nesting: `kvfold.dmc`.
        section: String,
        /// What is wrong with it.
        reason: String,
    },

    /// The configuration is valid and asks for something that this version does not compute.
    #[error("{file}: `{field}` is {found}, which this version does not support: {reason}")]
    Unsupported {
        /// The file in question.
        file: String,
        /// The field, with dots for nesting.
        field: String,
        /// The value found, as JSON.
        found: String,
        /// What is supported instead.
        reason: String,
    },

    /// The index of a model in several files cannot be followed.
    #[error("{file}: {reason}")]
    Index {
        /// The index file.
        file: String,
        /// What is wrong with it.
        reason: String,
    },

    /// The weights lack a tensor that the architecture needs.
    #[error("{file}: tensor `{tensor}` is missing; the configuration calls for one of shape {expected:?}")]
    MissingTensor {
        /// The file that should hold it, or the index of the files.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// Its shape by the configuration.
        expected: Vec<usize>,
    },

    /// A model to be saved has a tensor that would be ignored when it is opened.
    #[error("{file}: tensor `{tensor}` has no place in a model of this configuration")]
    UnknownTensor {
        /// The file it was to be written to.
        file: String,
        /// The tensor's name.
        tensor: String,
    },

    /// A tensor's shape is not what the configuration says.
    #[error("{file}: tensor `{tensor}` has shape {found:?}; the configuration calls for {expected:?}")]
    Shape {
        /// The file that holds it.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// Its shape in the file.
        found: Vec<usize>,
        /// Its shape by the configuration.
        expected: Vec<usize>,
    },

    /// A tensor that the architecture needs is stored in a type that kvfold does not compute with.
    #[error(
        "{file}: tensor `{tensor}` is stored as {dtype}; kvfold reads F64, F32, F16 and BF16: use the model's unquantized \
         checkpoint"
    )]
    UnsupportedDType {
        /// The file that holds it.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// The type's name in the file.
        dtype: String,
    },

    /// A weight is NaN or infinite.
    #[error(
        "{file}: tensor `{tensor}` has a weight that is {value}, element {index} of its shape {shape:?}; the file is \
         damaged or the training that made it diverged"
    )]
    NonFinite {
        /// The file that holds it.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// The first such element, in row-major order.
        index: usize,
        /// NaN or an infinity.
        value: f64,
    },

    /// The weights hold a bias or a norm that the configuration has no place for; leaving it out would change every result.
    #[error(
        "{file}: tensor `{tensor}` has no place in a model of this configuration, and leaving it out would change every \
         result; see `architectures` and `attention_bias` in config.json"
    )]
    NoPlace {
        /// The file that holds it.
        file: String,
        /// The tensor's name.
        tensor: String,
    },

    /// The tokenizer could not be understood.
    #[error("{file}: invalid tokenizer: {reason}")]
    Tokenizer {
        /// The tokenizer's file.
        file: String,
        /// What is wrong with it.
        reason: String,
    },

    /// The tokenizer knows a token that the model has no embedding for.
    #[error(
        "{file}: token `{token}` has id {id}, but `vocab_size` in config.json is {vocab_size}, so ids must stay below \
         that; the tokenizer belongs to another model, or tokens were added to it and not to the weights"
    )]
    Vocabulary {
        /// The tokenizer's file.
        file: String,
        /// The token with the largest id.
        token: String,
        /// That id.
        id: u32,
        /// The rows of the model's embedding.
        vocab_size: usize,
    },

    /// A chat cannot be put into words: the model says nothing of how.
    #[error(
        "{model}: has no chat template, neither in chat_template.jinja nor in tokenizer_config.json; it may be a base \
         model, which continues a plain prompt"
    )]
    NoTemplate {
        /// The model in question.
        model: String,
    },

    /// A chat template that is not valid, or fails on a chat.
    #[error("{file}: line {line} of the chat template: {reason}")]
    Template {
        /// The file that holds it.
        file: String,
        /// The line within the template, from 1; 0 if it cannot be told.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },

    /// A chat template that turns a chat away, by its `raise_exception`.
    #[error("{file}: the model's chat template does not take this chat: {reason}")]
    ChatRefused {
        /// The file that holds it.
        file: String,
        /// The template's own words.
        reason: String,
    },

    /// A text could not be turned into ids or back.
    #[error("cannot {action}: {reason}")]
    Text {
        /// `encode` or `decode`, with what.
        action: &'static str,
        /// The tokenizer's reason.
        reason: String,
    },

    /// A delta cannot be written or read.
    #[error("{file}: {reason}")]
    Delta {
        /// The delta.
        file: String,
        /// What is wrong with it.
        reason: String,
    },

    /// A delta is over another base.
    #[error(
        "{file}: made over {base}, whose tensors have the digest {wanted:.16}, and not over {given} ({found:.16}); the same \
         model in another dtype or version is another base"
    )]
    OtherBase {
        /// The delta.
        file: String,
        /// The base that it names.
        base: String,
        /// The digest of that base.
        wanted: String,
        /// The base that was given.
        given: String,
        /// Its digest.
        found: String,
    },

    /// The directory to be written exists.
    #[error("{dir}: already exists; kvfold does not overwrite a model: choose another name or remove it first")]
    Exists {
        /// The directory in question.
        dir: String,
    },

    /// A path that cannot name a new model directory, or a file to be saved whose name is taken or leads elsewhere.
    #[error("{name:?} {reason}")]
    Name {
        /// The path or name in question.
        name: String,
        /// Why it cannot be used.
        reason: &'static str,
    },
}
