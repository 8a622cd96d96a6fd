//! Keys of a GGUF file, read with errors that name file, key, value and expectation.

use std::collections::BTreeMap;

use kvfold_tensor::gguf::Value;

use crate::error::{ModelError, Result};

/// The metadata of a file.
pub(super) struct Metadata<'a> {
    pub(super) file: &'a str,
    pub(super) map: &'a BTreeMap<String, Value>,
}

impl<'a> Metadata<'a> {
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key)
    }

    fn found(&self, key: &str) -> String {
        self.get(key).map_or("missing".into(), Value::brief)
    }

    /// The error for a value that is not what it should be.
    pub(super) fn wrong(&self, key: &str, expected: impl Into<String>) -> ModelError {
        let (file, found) = (self.file.into(), self.found(key));
        ModelError::Field { file, field: key.into(), found, expected: expected.into() }
    }

    /// The error for a valid value that asks too much of this version.
    pub(super) fn unsupported(&self, key: &str, reason: impl Into<String>) -> ModelError {
        let (file, found) = (self.file.into(), self.found(key));
        ModelError::Unsupported { file, field: key.into(), found, reason: reason.into() }
    }

    /// An integer of at least 0, if the key is there.
    pub(super) fn integer(&self, key: &str) -> Result<Option<u64>> {
        let read = |value: &Value| value.as_unsigned().ok_or_else(|| self.wrong(key, "an integer of at least 0"));
        self.get(key).map(read).transpose()
    }

    /// An integer that must be there.
    pub(super) fn need(&self, key: &str) -> Result<u64> {
        self.integer(key)?.ok_or_else(|| self.wrong(key, "an integer of at least 0"))
    }

    /// A number, if the key is there.
    pub(super) fn number(&self, key: &str) -> Result<Option<f64>> {
        let finite = |value: &Value| value.as_float().filter(|x| x.is_finite());
        let read = |value: &Value| finite(value).ok_or_else(|| self.wrong(key, "a finite number"));
        self.get(key).map(read).transpose()
    }

    /// True or false, if the key is there.
    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        let read = |value: &Value| value.as_bool().ok_or_else(|| self.wrong(key, "true or false"));
        self.get(key).map(read).transpose()
    }

    /// A text, if the key is there.
    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let read = |value: &'a Value| value.as_str().ok_or_else(|| self.wrong(key, "a text"));
        self.get(key).map(read).transpose()
    }

    /// A list of texts that must be there.
    pub(super) fn texts(&self, key: &str) -> Result<&'a [String]> {
        match self.get(key) {
            Some(Value::Strings(list)) => Ok(list),
            _ => Err(self.wrong(key, "a list of texts")),
        }
    }

    /// Checks that the model is in this one file.
    pub(super) fn whole(&self) -> Result<()> {
        const PARTS: &str = "split.count";
        match self.integer(PARTS)? {
            Some(2..) => Err(self.unsupported(PARTS, "merge the files first, with `llama-gguf-split --merge`")),
            _ => Ok(()),
        }
    }
}
