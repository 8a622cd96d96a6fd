//! The tests of the crate, in one binary: each would be linked, and its generics compiled, anew.

mod chat;
mod checkpoint;
mod common;
mod compression;
mod config;
mod delta;
mod families;
mod goldens;
mod megatron;
mod tokenizer;
