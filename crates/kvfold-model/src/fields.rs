//! Fields of a JSON object, read with errors that name file, field, value and expectation.
//!
//! Serde's derive would be shorter and says "invalid type: string "64", expected usize at line 9": the reader of such a
//! message has to count lines. A configuration comes from strangers, so its fields are read one by one.

use serde_json::{Map, Value};

use crate::error::{ModelError, Result};

/// A JSON object of a file, and where in the file it lies.
pub(crate) struct Fields<'a> {
    pub(crate) file: &'a str,
    /// Put before each field's name in errors: empty, or `kvfold.` with the dot.
    pub(crate) prefix: &'a str,
    pub(crate) map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The value of `field`; `null` counts as absent, as it does for Hugging Face's own reader.
    pub(crate) fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// The error for a value that is not what it should be.
    pub(crate) fn wrong(&self, field: &str, expected: impl Into<String>) -> ModelError {
        ModelError::Field {
            file: self.file.into(),
            field: format!("{}{field}", self.prefix),
            found: self.found(field),
            expected: expected.into(),
        }
    }

    /// The error for a valid value that asks too much of this version.
    pub(crate) fn unsupported(&self, field: &str, reason: impl Into<String>) -> ModelError {
        ModelError::Unsupported {
            file: self.file.into(),
            field: format!("{}{field}", self.prefix),
            found: self.found(field),
            reason: reason.into(),
        }
    }

    /// An integer from 1 to `limit`.
    pub(crate) fn count(&self, field: &str, limit: usize, default: Option<usize>) -> Result<usize> {
        let expected = || self.wrong(field, format!("an integer from 1 to {limit}"));
        match (self.get(field), default) {
            (None, Some(default)) => Ok(default),
            (None, None) => Err(expected()),
            (Some(value), _) => value
                .as_u64()
                .and_then(|n| usize::try_from(n).ok())
                .filter(|n| (1..=limit).contains(n))
                .ok_or_else(expected),
        }
    }

    /// A number for which `valid` holds; `expected` says so in words.
    pub(crate) fn number(
        &self,
        field: &str,
        default: Option<f64>,
        valid: impl Fn(f64) -> bool,
        expected: &str,
    ) -> Result<f64> {
        match (self.get(field), default) {
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.wrong(field, expected)),
            (Some(value), _) => {
                value.as_f64().filter(|&x| x.is_finite() && valid(x)).ok_or_else(|| self.wrong(field, expected))
            }
        }
    }

    /// True or false; false where absent.
    pub(crate) fn flag(&self, field: &str) -> Result<bool> {
        match self.get(field) {
            None => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| self.wrong(field, "true or false")),
        }
    }

    /// A string, if there is one.
    pub(crate) fn text(&self, field: &str) -> Result<Option<&'a str>> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| self.wrong(field, "a string")),
        }
    }

    /// The value for an error message: short enough to read, whatever somebody put into the file.
    fn found(&self, field: &str) -> String {
        const LIMIT: usize = 100;
        let Some(value) = self.map.get(field) else {
            return "missing".into();
        };
        let mut text = value.to_string();
        if let Some((cut, _)) = text.char_indices().nth(LIMIT) {
            text.truncate(cut);
            text.push_str("...");
        }
        text
    }
}
