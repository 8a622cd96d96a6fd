//! What the model is: configuration, weights by their Hugging Face names, tokenizer, the block walk.
//!
//! A model enters as a Hugging Face directory and leaves as one. In between, everything that can be wrong with such a
//! directory is found *here*, before the first multiplication: a field that is missing, a feature this version does not
//! compute, a tensor of another shape, a weight that is NaN, a token without an embedding. The code behind this crate may
//! therefore index without looking, and a user learns of a bad download from a sentence and not from a story that babbles.
//!
//! * [`config`] reads `config.json` into typed fields and keeps the rest of it for the way back;
//! * [`family`] names what is supported and [`rope`] makes rotary frequencies, plain or scaled;
//! * [`compression`] is the `kvfold` section that a retrofitted model carries, versioned, because a DMC model that runs with
//!   other settings than it was trained with diverges without a sound;
//! * [`names`] is the one place that knows what Hugging Face calls a weight and which shape it has;
//! * [`shape`] and [`weights`] are what the forward pass needs of these, whatever holds the numbers;
//! * [`block`] is the walk through the model, one for training, prefill and decode, and [`attend`] the attention over whole
//!   sequences that training and the teacher put into it;
//! * [`tokenizer`] turns text into ids and, piece by piece as they are sampled, ids into text;
//! * [`chat`] puts a conversation into the words that a model was trained on;
//! * [`checkpoint`] puts these together: opened from a directory or from the binary itself, saved whole or not at all;
//! * [`delta`] is a retrofitted model as what it changed of its base, one small file;
//! * [`import`] turns models in other formats into such directories;
//! * [`embedded`] is the small model that is always at hand.
//!
//! A retrofitted Llama calls its architecture `KvfoldLlamaForCausalLM`, and so with the other [families](family). Its
//! tensors would fit a plain Llama, and a loader that took it for one would compute nonsense from the borrowed channel or ignore the decisions; with a name it does not
//! know, it refuses.

pub mod attend;
pub mod block;
pub mod chat;
pub mod checkpoint;
pub mod compression;
pub mod config;
pub mod delta;
pub mod digest;
pub mod embedded;
mod error;
pub mod family;
mod fields;
mod files;
pub mod import;
mod loaded;
pub mod names;
pub mod rope;
pub mod shape;
pub mod tokenizer;
pub mod weights;

pub use chat::{Chat, ChatTemplate};
pub use checkpoint::{Checkpoint, ensure_absent};
pub use compression::Compression;
pub use config::Config;
pub use error::{ModelError, Result};
pub use family::Family;
pub use loaded::Loaded;
pub use tokenizer::{DecodeStream, Tokenizer};
