//! Numbers that JSON cannot say.
//!
//! JSON has neither NaN nor infinity; serde_json writes both as `null`. A run
//! that diverges must still produce a receipt and a curve that can be read
//! back, so `null` is read as NaN in the fields that may hold one.

use serde::{Deserialize, Deserializer};

/// Reads a number, or NaN from `null`.
pub(crate) fn nullable<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}
