//! The tests of the crate, in one binary: each would be linked, and its generics compiled, anew.

mod common;
mod compare;
mod perplexity;
