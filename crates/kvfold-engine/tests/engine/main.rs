//! The tests of the crate, in one binary: each would be linked, and its generics compiled, anew.

mod batcher;
mod common;
mod goldens;
mod prefixes;
mod promises;
mod scheduler;
mod sessions;
mod worked_example;
