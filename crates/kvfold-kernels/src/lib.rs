//! How each op is computed, forward and backward side by side.

pub mod dmc;
