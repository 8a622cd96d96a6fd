//! The tests of the crate, in one binary: each would be linked, and its generics compiled, anew.

mod batcher;
mod common;
mod goldens;
mod promises;
mod scheduler;
mod worked_example;
