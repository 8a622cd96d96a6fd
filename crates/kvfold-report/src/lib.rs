//! What it looks like: receipts, heat maps, training curves, model cards.
//!
//! Claims about cache compression are cheap and often wrong, so kvfold answers
//! them with a *receipt*: one JSON document holding every number somebody would
//! need to check the claim, and one rendering of it for people. Everything in
//! this crate is data in, text out. Nothing here measures, opens a file, reads
//! the environment or asks whether it writes to a terminal; the caller knows
//! those things and says them, for example by a [`Style`].
//!
//! | module | what it holds |
//! |---|---|
//! | [`receipt`] | [`Receipt`], the JSON document, and the check that it agrees with itself |
//! | [`quantiles`] | mean, P95 and P99 of a set of samples |
//! | [`verdict`] | what the model kept and what it lost, in sentences |
//! | [`heatmap`] | compression ratios, layer by KV head, as a coloured map |
//! | [`terminal`] | the whole receipt for a person at a terminal |
//! | [`curve`] | the training curve: JSON, and a sparkline |
//! | [`card`] | the `README.md` of a retrofitted model |
//! | [`text`] | text that came from elsewhere, made safe to show |
//! | [`format`](mod@format) | the only place that decides how a number is written |
//!
//! Two rules hold everywhere. The logical ratio (tokens seen over slots held)
//! never appears without the physical one (dense bytes over bytes held), because
//! the first alone flatters. And a number that could not be computed is shown as
//! such; it is never left out.

pub mod card;
pub mod curve;
pub mod format;
pub mod heatmap;
pub mod quantiles;
pub mod receipt;
pub mod style;
pub mod terminal;
pub mod verdict;

mod non_finite;
#[cfg(test)]
mod sample;
pub mod text;

pub use card::Card;
pub use curve::{Curve, Point};
pub use heatmap::heat_map;
pub use quantiles::Quantiles;
pub use receipt::Receipt;
pub use style::Style;
pub use terminal::render;
pub use verdict::Verdict;
