//! A sequence in a file: a compressed cache that is put away, and goes on where it was.
//!
//! A safetensors file, `.kv` by convention, with one entry of metadata, `kvfold`: the version of the format, which model
//! the cache is of, the rule and the type that it is held under, a digest of the tensors, and a note of whoever saved it.
//!
//! ```text
//! tokens [T]      ids of the tokens, numbers
//! slots [L, G]    slots of each head, the open one included and the ring's not, numbers
//! ahead [L, G]    what each head's newest token adds to the logit of the next, numbers
//! pages, rings, states    blocks of memory, head by head, as they are: bits and not numbers
//! ```
//!
//! A file is taken for what it says only where that is checked: nothing in one can make a cache that no text makes but for
//! the values of numbers, and those have a digest.

use crate::engine::{Engine, Kind, Sequence};
use kvfold_cache::{CacheError, StoredCache};
use kvfold_kernels::CacheOps;
use kvfold_kernels::paged::{CacheDType, Rule};
use kvfold_model::digest;
use kvfold_tensor::{DType, HostTensor, TensorFile};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// The entry of the metadata.
const ENTRY: &str = "kvfold";

/// The version that this build writes and reads.
const VERSION: u64 = 2;

/// What a file says of itself.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    version: u64,
    /// Fingerprint of the model.
    model: String,
    rule: Rule,
    cache: CacheDType,
    /// Whether all tokens keep slots of their own, whatever the model decides.
    full: bool,
    /// Fingerprint of the tensors.
    digest: String,
    /// What whoever saved it keeps with it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    note: String,
}

/// What was saved.
#[derive(Debug)]
pub struct Session {
    /// The tokens that the sequence has seen.
    pub tokens: Vec<u32>,
    /// The sequence, which goes on with the same bytes as the one that was saved.
    pub sequence: Sequence,
    /// What whoever saved it keeps with it.
    pub note: String,
}

/// A sequence that could not be saved or taken up again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// No file that can be read or written.
    #[error(transparent)]
    File(#[from] kvfold_tensor::Error),
    /// The tokens are not those of the sequence.
    #[error("{file}: cannot save {tokens} tokens for a sequence that has seen {seen}; give all that it has seen")]
    Tokens {
        /// The file in question.
        file: String,
        /// Tokens that were given.
        tokens: usize,
        /// Tokens that the sequence has seen.
        seen: usize,
    },
    /// A file of something else.
    #[error("{file}: no saved session: its metadata has no entry `{ENTRY}`; give a file that a session was saved to")]
    NotASession {
        /// The file in question.
        file: String,
    },
    /// A file of another version.
    #[error(
        "{file}: `version` is {found}, and this build reads version {VERSION}; use the kvfold that saved the session"
    )]
    Version {
        /// The file in question.
        file: String,
        /// Its version.
        found: u64,
    },
    /// A session of another model, or of a cache that is held otherwise.
    #[error("{file}: `{field}` is {found}, and the engine's is {expected}; {advice}")]
    Mismatch {
        /// The file in question.
        file: String,
        /// What does not fit.
        field: &'static str,
        /// What the file has.
        found: String,
        /// What the engine has.
        expected: String,
        /// What to do.
        advice: &'static str,
    },
    /// A field that no saved session has.
    #[error(
        "{file}: `{field}` is {found}; expected {expected}; the file is damaged, use another copy or read the text anew"
    )]
    Field {
        /// The file in question.
        file: String,
        /// The field.
        field: String,
        /// What it is.
        found: String,
        /// What it has to be.
        expected: String,
    },
    /// Not what was written.
    #[error(
        "{file}: its tensors do not have the `digest` that was written with them; use another copy or read the text anew"
    )]
    Damaged {
        /// The file in question.
        file: String,
    },
    /// The pool has no room for it.
    #[error("{file}: {source}")]
    Cache {
        /// The file in question.
        file: String,
        /// The pool's reason.
        source: CacheError,
    },
}

impl<O: CacheOps> Engine<O> {
    /// Saves a sequence, which has seen these tokens, in one step: at no moment is half of it in the file at `path`. `note` is
    /// kept with it and means nothing here.
    ///
    /// # Panics
    /// When the sequence is of another engine.
    pub fn save(&self, sequence: &Sequence, tokens: &[u32], note: &str, path: &Path) -> Result<(), SessionError> {
        let file = path.display().to_string();
        if tokens.len() != sequence.tokens() {
            return Err(SessionError::Tokens { file, tokens: tokens.len(), seen: sequence.tokens() });
        }
        let StoredCache { slots, ahead, pages, rings, states, .. } = self.pool.store(&self.model.ops, &sequence.cache);
        let shape = self.pool.shape();
        let heads = [shape.layers, shape.heads.kv];
        let counts = |counts: Vec<usize>| counts.into_iter().map(|count| count as f64).collect::<Vec<_>>();
        let ids: Vec<f64> = tokens.iter().map(|&id| f64::from(id)).collect();
        let tensors = BTreeMap::from([
            ("tokens".to_owned(), HostTensor::from_f64([ids.len()], &ids)),
            ("slots".to_owned(), HostTensor::from_f64(heads, &counts(slots))),
            ("ahead".to_owned(), HostTensor::from_f64(heads, &ahead)),
            ("pages".to_owned(), blocks(&pages)),
            ("rings".to_owned(), blocks(&rings)),
            ("states".to_owned(), blocks(&states)),
        ]);
        let header = Header {
            version: VERSION,
            model: self.identity().to_owned(),
            rule: self.pool.rule(),
            cache: self.pool.dtype(),
            full: sequence.full,
            digest: digest::of_tensors(&tensors),
            note: note.to_owned(),
        };
        let header = serde_json::to_string(&header).expect("a struct of numbers and strings is JSON");
        Ok(kvfold_tensor::write(path, &tensors, &BTreeMap::from([(ENTRY.to_owned(), header)]))?)
    }

    /// Takes a saved sequence up again. An error if the file is damaged, or is of another model, cache rule or cache type.
    pub fn load(&mut self, path: &Path) -> Result<Session, SessionError> {
        let file = File { name: path.display().to_string(), content: kvfold_tensor::read(path)? };
        let header = file.header()?;
        let policy = "serve the model under the policy that the session was saved under";
        file.must_fit("model", header.model, self.identity().to_owned(), "load the model that the session is of")?;
        file.must_fit("rule", header.rule, self.pool.rule(), policy)?;
        file.must_fit("cache", header.cache, self.pool.dtype(), "serve the model with that type of cache")?;
        if header.digest != digest::of_tensors(&file.content.tensors) {
            return Err(SessionError::Damaged { file: file.name });
        }
        let (vocab, context) = (self.model.shape.vocab, self.model.shape.context);
        let tokens: Vec<u32> = file.counts("tokens", vocab)?.into_iter().map(|id| id as u32).collect();
        if tokens.len() > context {
            return Err(file.wrong("tokens", format!("{} tokens", tokens.len()), format!("at most {context}")));
        }
        let stored = StoredCache {
            tokens: tokens.len(),
            slots: file.counts("slots", context + 1)?,
            ahead: file.tensor("ahead", DType::F64)?.to_f64(),
            pages: file.tensor("pages", DType::F32)?.bytes().to_vec(),
            rings: file.tensor("rings", DType::F32)?.bytes().to_vec(),
            states: file.tensor("states", DType::F32)?.bytes().to_vec(),
        };
        let refused = |error| match error {
            CacheError::Stored { field, found, expected } => file.wrong(field, found, expected),
            source => SessionError::Cache { file: file.name.clone(), source },
        };
        let pages = self.pool.check(&self.model.ops, &stored).map_err(refused)?;
        self.prefixes.make_room(&self.pool, pages);
        let cache = self.pool.restore(&self.model.ops, &stored).map_err(refused)?;
        let sequence = Sequence::of(cache, Kind { full: header.full, trace: false });
        Ok(Session { tokens, sequence, note: header.note })
    }

    /// Fingerprint of the model. The first call reads all of its weights.
    fn identity(&self) -> &str {
        self.identity.get_or_init(|| digest::of_loaded(&self.model))
    }
}

/// Bytes of whole floats as a tensor.
fn blocks(bytes: &[u8]) -> HostTensor {
    let mut tensor = HostTensor::zeros(DType::F32, [bytes.len() / DType::F32.size()]);
    tensor.bytes_mut().copy_from_slice(bytes);
    tensor
}

/// A file that was read.
struct File {
    name: String,
    content: TensorFile,
}

impl File {
    fn wrong(&self, field: &str, found: impl ToString, expected: impl ToString) -> SessionError {
        let (found, expected) = (found.to_string(), expected.to_string());
        SessionError::Field { file: self.name.clone(), field: field.to_owned(), found, expected }
    }

    /// What the file says of itself. Of another version nothing is known but the version.
    fn header(&self) -> Result<Header, SessionError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u64,
        }
        let text = self.content.metadata.get(ENTRY);
        let text = text.ok_or_else(|| SessionError::NotASession { file: self.name.clone() })?;
        let unreadable = |error: serde_json::Error| self.wrong(ENTRY, error, "the header of a saved session");
        match serde_json::from_str(text).map_err(unreadable)? {
            Versioned { version: VERSION } => serde_json::from_str(text).map_err(unreadable),
            Versioned { version } => Err(SessionError::Version { file: self.name.clone(), found: version }),
        }
    }

    fn must_fit<T: PartialEq + Serialize>(
        &self,
        field: &'static str,
        found: T,
        expected: T,
        advice: &'static str,
    ) -> Result<(), SessionError> {
        let json = |value: &T| serde_json::to_string(value).expect("numbers and strings are JSON");
        match found == expected {
            true => Ok(()),
            false => {
                let (found, expected) = (json(&found), json(&expected));
                Err(SessionError::Mismatch { file: self.name.clone(), field, found, expected, advice })
            }
        }
    }

    fn tensor(&self, name: &str, dtype: DType) -> Result<&HostTensor, SessionError> {
        let tensor = self.content.tensors.get(name).ok_or_else(|| self.wrong(name, "absent", dtype))?;
        match tensor.dtype() == dtype {
            true => Ok(tensor),
            false => Err(self.wrong(name, tensor.dtype(), dtype)),
        }
    }

    /// A tensor of integers from 0 up, below `limit`.
    fn counts(&self, name: &str, limit: usize) -> Result<Vec<usize>, SessionError> {
        let count = |x: f64| {
            let count = x as usize;
            let expected = || format!("integers from 0, below {limit}");
            if count as f64 == x && count < limit { Ok(count) } else { Err(self.wrong(name, x, expected())) }
        };
        self.tensor(name, DType::F64)?.to_f64().into_iter().map(count).collect()
    }
}
